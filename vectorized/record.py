"""The recorder: runs the text once, and from then on NumPy calls that compute the same.

The text is model.py and adam.py. Its functions are called with arrays that have a shape and no
numbers. NumPy hands every operation on them to the recorder, which writes down a list of calls
(function, arrays in, array out). A step of training puts its tokens into place and runs down the
list. The recorder chooses:

memory order   The last of three or more axes lies slowest, documents and positions fastest:
               `in_memory`. A linear layer is then one product w . x of matrices.
sums           A sum over the last axis is a product with ones. A small sum takes an (n, n) matrix
               of ones: its n result rows are equal, and later calls need no broadcast (1.08 at 1).
look-ups       The gradient of a small table is a product with a one-hot matrix (1.05 at 1, 1.1 at
               64), and so is a look-up in it (1.02 at 1, 0.99 at 64).
constants      Where they are the same in every run, positions are made one-hot once, and the mask
               is repeated for all heads once (1.01 at 1).

In brackets: how many times as long a step of the default model takes without it, in float64, at
that number of documents.

What a list cannot repeat is refused with a RecordingError that names the line of the text: a
decision that depends on the numbers in an array, or an operation that is not known here. A plain
array that the text makes by itself is taken for a constant.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, partial
from math import prod
from operator import add, mul, sub, truediv
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from microgpt.errors import MicrogptError
from vectorized.lower import Buffer, Call, Ints, Line, Place, Recording, Varying, alike, lowered
from vectorized.model import Array

EQUAL_ROWS = 8192  # multiplications up to which a sum is computed as n equal rows
LOOK_UP = 32  # rows of a table up to which a look-up is a product
ONE_HOT = 512  # rows of a table up to which its gradient is a product
SPREAD = 2**11  # numbers up to which a constant array becomes as large as what it is added to

# How these powers are computed: -0.5 from the root.
POWERS: dict[Any, np.ufunc] = {2: np.square, 0.5: np.sqrt, -0.5: np.reciprocal}
# What these ufuncs are for Python's numbers.
PLAIN: dict[str, Any] = {
    "add": add, "subtract": sub, "multiply": mul, "divide": truediv, "power": pow
}  # fmt: skip


class RecordingError(MicrogptError):
    """The text does something that a list of calls cannot repeat."""


class Number(NDArrayOperatorsMixin):
    """A number of Python's that differs from run to run: a learning rate, a bias correction."""

    def __init__(self, find: Callable[[], float]) -> None:
        self.find = find

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, Traced) for x in inputs):
            return NotImplemented
        f = PLAIN.get(ufunc.__name__)
        if f is None:
            raise refusal(f"numpy.{ufunc.__name__} of a number of one run")
        x, y = (x.find if isinstance(x, Number) else partial(float, x) for x in inputs)
        return Number(lambda: f(x(), y()))

    def _decision(self) -> Any:
        raise refusal("a decision that depends on a number of one run")

    __bool__ = __float__ = __int__ = __index__ = _decision


class Traced(NDArrayOperatorsMixin):
    """An array of the text while it is recorded."""

    __slots__ = ("buffer", "dtype", "ndim", "offset", "recorder", "rows", "shape", "view")

    def __init__(self, recorder: Recorder, view: Array, buffer: Buffer, offset: int = 0) -> None:
        self.recorder = recorder
        self.view = view  # of the buffer's array
        self.buffer = buffer
        self.offset = offset  # bytes from the beginning of the buffer
        self.rows: Ints | None = None  # (.., n), if it is (.., 1) and computed n times: `as_one`
        self.shape, self.ndim, self.dtype = view.shape, view.ndim, view.dtype

    @property
    def whole(self) -> bool:
        """Whether it fills its place. A result does, until another is laid behind it."""
        return self.view.nbytes == self.buffer.place.nbytes

    @property
    def start(self) -> int:
        """Where in its place it begins, in bytes."""
        return self.buffer.shift + self.offset

    @property
    def form(self) -> Any:
        """What two views of the same numbers have in common."""
        return self.buffer.place, self.start, self.shape, self.view.strides

    @property
    def T(self) -> Traced:  # noqa: N802, as arrays have it
        return self.like(self.view.T)

    @property
    def matrix(self) -> Traced:
        """The last axis as rows and all others as columns: (n, N)"""
        if self.ndim < 3:
            raise refusal("this operation on an array of fewer than three axes")
        return self.reshaped(self.view.transpose(in_memory(self.ndim)[0]), (self.shape[-1], -1))

    def like(self, view: Array) -> Traced:
        """Another view of the same memory, with the same first number."""
        return Traced(self.recorder, view, self.buffer, self.offset)

    def reshape(self, *shape: int) -> Traced:
        return self.reshaped(self.view, shape)

    def reshaped(self, view: Array, shape: Ints) -> Traced:
        """A view of this memory in another shape."""
        found = view.reshape(shape)
        if found.base is not (view if view.base is None else view.base):
            raise refusal("an operation that would copy this array")
        return self.like(found)

    def __len__(self) -> int:
        return len(self.view)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if ufunc is np.add and method == "at":
            return self.recorder.add_at(*inputs)
        if ufunc is np.matmul and not kwargs:  # not x @= w
            return self.recorder.matmul(*inputs)
        (out,) = kwargs.pop("out", (None,))
        one = method == "__call__" and ufunc.nout == 1 and not ufunc.signature and not kwargs
        if not one or not (out is None or isinstance(out, Traced)):
            raise refusal(f"numpy.{ufunc.__name__} with these arguments")
        return self.recorder.elementwise(ufunc, *inputs, out=out)

    def __array_function__(self, f: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if f is np.einsum and len(args) == 3 and "->" in args[0] and not kwargs:
            return self.recorder.einsum(*args)
        if f is np.zeros_like and not kwargs:
            zeros = self.recorder.new(args[0].shape)
            self.recorder.emit("fill", self.recorder.operand(0.0), zeros)
            return zeros
        raise refusal(f"numpy.{f.__name__} with these arguments")

    def __getattr__(self, name: str) -> Any:
        if name in ("sum", "mean", "max"):
            return partial(self.recorder.reduced, self, name)
        raise refusal(f".{name} of an array")

    def _no_numbers(self, *_: Any) -> Any:
        raise refusal("a decision or a loop that depends on the numbers in an array")

    __array__ = __bool__ = __complex__ = __contains__ = __float__ = __index__ = _no_numbers
    __int__ = __iter__ = _no_numbers

    def __getitem__(self, key: Any) -> Traced:
        keys = key if isinstance(key, tuple) else (key,)
        if isinstance(keys[-1], (Traced, np.ndarray)):
            return self.recorder.gather(self, keys)
        view = self.view[key]
        if not np.may_share_memory(view, self.view) or min(view.strides, default=0) < 0:
            raise refusal("an array in reverse order, or an index that is no slice")
        behind = address(view) - address(self.view)
        return Traced(self.recorder, view, self.buffer, self.offset + behind)

    def __setitem__(self, key: Any, value: Any) -> None:
        keys, value = key if isinstance(key, tuple) else (key,), self.recorder.operand(value)
        if isinstance(keys[-1], (Traced, np.ndarray)):
            table, index = self.recorder.table_and_index(self, keys)
            self.recorder.emit("put", index, value, table)
        else:
            self.recorder.emit("copy", value, self[key])


class Recorder:
    """Writes down what the text does with arrays of one precision."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.calls: list[Call] = []
        self.part = 0
        self.known: dict[Any, Any] = {}  # the caller's memory, constants, what indices become
        self.numbers: list[Varying] = []

    def hold(self, array: Array, fixed: bool = False) -> Any:
        """An array that exists, for the text to work on: parameters, tokens."""
        if id(array) not in self.known:
            home = array if array.base is None else array.base
            behind = 0 if home is array else address(array) - address(home)
            place = Place(array.nbytes, home, behind)
            self.known[id(array)] = Traced(self, array, Buffer(array, place, fixed=fixed))
        return self.known[id(array)]

    def mark(self) -> None:
        """Begin another part of the list, which is run by itself."""
        self.part += 1

    def put(self, result: Any, array: Array) -> None:
        """Let a result, which the text no longer changes, lie in an existing array."""
        unused = id(array) not in self.known  # by the text
        result, there = self.operand(result), self.hold(array)
        if unused and alike(result, there) and result.buffer.place.home is None:
            result.buffer.place = there.buffer.place
        else:
            there[...] = result

    def recording(self, memory: Callable[[int], Array]) -> Recording:
        """What has been written down, to be run in memory(bytes)."""
        calls, self.calls, self.known = self.calls, [], {}  # no circles of references
        return lowered(calls, self.part + 1, self.numbers, memory)

    def emit(self, f: Any, *operands: Any) -> None:
        """Write down a call. Its last operand is its result."""
        self.calls.append(Call(f, operands, line_of_the_text(), self.part))
        if operands[-1].buffer.rows is not None:
            raise refusal("writing into a sum, or into what was computed from it,")

    def new(self, shape: Ints, dtype: Any = None, orders: Any = None) -> Traced:
        """A result of this shape, in the order of `in_memory` or another."""
        order, back = orders or in_memory(len(shape))
        if (key := (shape, dtype, order)) not in self.known:
            array = np.empty([shape[axis] for axis in order], dtype or self.dtype)
            self.known[key] = array.transpose(back)
        view = self.known[key]
        return Traced(self, view, Buffer(view.base, Place(view.nbytes)))

    def constant(self, key: Any, value: Callable[[], Any]) -> Traced:
        """An array that is made once."""
        if key not in self.known:
            self.known[key] = self.hold(np.asarray(value(), self.dtype))
        return self.known[key]

    def operand(self, x: Any) -> Traced:
        """x as a call takes it: numbers become arrays without axes."""
        if isinstance(x, Traced):
            return x
        if isinstance(x, np.ndarray):
            return self.hold(np.asarray(x, self.dtype, order="C"), fixed=True)
        if isinstance(x, Number):
            self.numbers.append((np.empty((), self.dtype), x.find))
            return self.hold(self.numbers[-1][0])
        return self.constant(("number", x), lambda: x)

    # --- element by element

    def elementwise(self, ufunc: Any, *inputs: Any, out: Traced | None = None) -> Traced:
        """One call of a ufunc, or of others that give the same in less time, up to rounding.

        It computes n equal rows if all operands are such rows, and reads the rows of an operand if
        the result has their shape.
        """
        x, y = inputs[0], inputs[-1]
        if ufunc is np.divide and isinstance(y, (int, float, Number)):
            ufunc, inputs = np.multiply, (x, 1 / y)
        elif ufunc is np.power and isinstance(y, (int, float)) and y in POWERS:
            ufunc, inputs = POWERS[y], (x**0.5 if y < 0 else x,)
        operands = [self.operand(x) for x in inputs]
        rows = {x.rows for x in operands if x.shape}
        as_rows = out is None and len(rows) == 1 and None not in rows
        shape: Any = rows.pop() if as_rows else np.broadcast(*(x.view for x in operands)).shape
        for i, x in enumerate(operands):
            if x.rows == shape:
                operands[i] = x.like(x.buffer.rows)
            elif x.buffer.fixed and prod(shape) <= SPREAD:
                operands[i] = self.spread(x, shape)
        result = self.new(shape) if out is None else out
        self.emit(ufunc, *operands, result)
        return self.as_one(result) if as_rows else result

    def spread(self, x: Traced, shape: Ints) -> Traced:
        """Constants, repeated to the shape of a small result."""
        if (key := (x.form, shape)) not in self.known:
            order, back = in_memory(len(shape))
            full = np.empty([shape[axis] for axis in order], self.dtype).transpose(back)
            full[...] = x.view
            self.known[key] = self.hold(full)
        return self.known[key]

    def as_one(self, rows: Traced) -> Traced:
        """The array (.., 1) of numbers that have been computed n times."""
        one = rows.like(rows.view[..., :1])
        one.rows, rows.buffer.rows = rows.shape, rows.view
        return one

    # --- sums, maxima, products

    def reduced(self, x: Traced, f: str, axis: int | None = None, keepdims: bool = False) -> Traced:
        """The sum, mean or maximum over the last axis."""
        if axis != -1 or not keepdims:
            raise refusal(f"a {f} over this axis")
        n = x.shape[-1]
        if f == "max":
            out = self.new((*x.shape[:-1], 1))
            self.emit("max", x.matrix, out.matrix.reshape(-1))
            return out
        weight = 1 / n if f == "mean" else 1.0
        width = n if n * x.view.size <= EQUAL_ROWS else 1
        key = "ones", n, width, weight
        return self.as_one(self.matmul(x, self.constant(key, lambda: np.full((n, width), weight))))

    def matmul(self, x: Any, w: Any) -> Traced:
        """x @ w, with positions computed as w^T . x^T: (.., k), (k, n) -> (.., n)"""
        x, w = self.operand(x), self.operand(w)
        if w.ndim != 2:
            raise refusal("this product")
        out = self.new((*x.shape[:-1], w.shape[1]))
        matrices = (x, w, out) if x.ndim == 2 else (w.T, x.matrix, out.matrix)
        self.emit("dot", *matrices)
        return out

    def einsum(self, letters: str, a: Any, b: Any) -> Traced:
        """One matrix product for each value of the indices that a, b and the result share."""
        swapped, orders, axes = as_product(letters)
        a, b = self.operand(a), self.operand(b)
        named, _, to = letters.replace(",", "").partition("->")
        lengths = a.shape + b.shape
        size = dict(zip(named, lengths))
        if lengths != tuple([size[letter] for letter in named]):
            raise refusal(f"numpy.einsum({letters!r}) of a letter with two lengths")
        out = self.new(tuple([size[letter] for letter in to]), orders=orders)
        matrices = []
        for x, (all_axes, every, rows) in zip((b, a, out) if swapped else (a, b, out), axes):
            view = x.view.transpose(all_axes)
            height = prod(view.shape[every : every + rows])
            matrices.append(x.reshaped(view, (*view.shape[:every], height, -1)))
        self.emit("matmul" if axes[0][1] else "dot", *matrices)
        return out

    # --- look-ups

    def gather(self, x: Traced, keys: tuple[Any, ...]) -> Traced:
        """x[keys]: a row of a table for every position, or one number for each."""
        table, index = self.table_and_index(x, keys)
        shape = *index.shape, *table.shape[1:]
        if table.ndim == index.ndim == 2 and len(table) <= LOOK_UP:
            out = self.new(shape)
            self.emit("dot", table.T, self.one_hot(index, len(table)).T, out.matrix)
        else:
            out = self.new((index.view.size, *table.shape[1:])).reshape(*shape)
            self.emit("take", table, index, out)
        return out

    def one_hot(self, index: Traced, n: int) -> Traced:
        """For every position a row of n zeros, with a one where the index says: (N, n)"""
        key = index.form, n
        if index.buffer.fixed:
            return self.constant(key, lambda: np.eye(n)[index.view.ravel()])
        if key not in self.known:
            self.known[key] = out = self.new((index.view.size, n))
            eye = self.constant(("eye", n), lambda: np.eye(n))
            self.emit("take", eye, index, out.reshape(*index.shape, n))
        return self.known[key]

    def table_and_index(self, x: Traced, keys: tuple[Any, ...]) -> tuple[Traced, Traced]:
        """For x[index], x and the index; for x[.., index], the memory of x and a flat index.

        A flat index is the sum of keys times strides, so none may be negative. Those of constants
        are looked at.
        """
        *rest, indices = keys
        index = indices if isinstance(indices, Traced) else self.hold(indices, fixed=True)
        rest = [np.asarray(key) for key in rest]
        whole = len(keys) == x.ndim and x.whole and x.buffer.array.flags.forc
        fits = whole and np.broadcast(*rest, index.view).shape == index.shape
        known = [*rest, index.view] if index.buffer.fixed else rest
        numbers = all(key.dtype.kind == "i" for key in (*rest, index))
        if not numbers or (rest and not fits) or any(key.min(initial=0) < 0 for key in known):
            raise refusal("this index")
        if not rest:
            return x, index
        *strides, last = (stride // x.view.itemsize for stride in x.view.strides)
        start = np.zeros(index.shape, np.intp)
        start += sum(map(mul, rest, strides))
        if (key := (index.form, last, start.tobytes())) not in self.known:
            self.known[key] = out = self.new(index.shape, np.intp)
            self.emit(np.multiply, index, self.hold(np.array(last)), out)
            self.emit(np.add, out, self.hold(start), out)
        return x.like(x.buffer.array.ravel("K")), self.known[key]

    def add_at(self, table: Traced, index: Traced, values: Traced) -> None:
        """np.add.at(table, index, values), a row for every position"""
        if not (isinstance(table, Traced) and isinstance(values, Traced)):
            raise refusal("np.add.at of arrays that are not recorded (see np.zeros_like)")
        table, index = self.table_and_index(table, (index,))
        rows = index.ndim == table.ndim == 2 and values.shape == (*index.shape, table.shape[1])
        if len(table) > ONE_HOT or not rows or values.buffer is table.buffer:
            self.emit("add_at", index, values, table)
            return
        sums = self.new(table.shape)
        # new zeros need not be written: the product lies where they would
        if self.calls and (zeros := self.calls[-1]).f == "fill" and zeros.out is table:
            self.calls.pop()
            sums = table
        self.emit("dot", self.one_hot(index, len(table)).T, values.matrix.T, sums)
        if sums is not table:
            self.emit(np.add, table, sums, table)


@lru_cache
def in_memory(ndim: int) -> tuple[Ints, Ints]:
    """The axes of a result as they lie in memory, the slowest first, and the way back.

    (B, T, C) as (C, B, T), (B, H, T, U) as (U, H, B, T); up to two axes in their own order.
    """
    axes = tuple(range(ndim))
    order = axes if ndim < 3 else (axes[-1], *axes[1:-2], 0, axes[-2])
    return order, tuple(map(order.index, axes))


@lru_cache
def as_product(letters: str) -> Any:
    """How an einsum is a product of matrices: whether the two are exchanged; the memory order of
    the result, as in `in_memory`; and of each matrix (left, right, result) its axes, how many of
    them count products, and how many of the next are its rows.

    b, t and u are documents and positions and lie fastest; where t looks at u, u lies slowest.
    """
    of_a, of_b, to = letters.replace("->", ",").split(",")
    every = [x for x in to if x in of_a and x in of_b]
    summed = [x for x in of_a if x in of_b and x not in to]
    rows, columns = ([x for x in to if x in of and x not in every] for of in (of_a, of_b))
    if {*of_a, *of_b} != {*every, *summed, *rows, *columns}:
        raise refusal(f"numpy.einsum({letters!r})")
    order = sorted(to, key="uhbt".find if "t" in to and "u" in to else "btu".__contains__)
    swapped = bool(order) and order[-1] in rows  # what lies fastest are the columns of the result
    if swapped:
        of_a, of_b, rows, columns = of_b, of_a, columns, rows
    matrices = (of_a, rows, summed), (of_b, summed, columns), (to, rows, columns)
    return (
        swapped,
        (tuple(map(to.index, order)), tuple(map(order.index, to))),
        [([*map(of.index, every + x + y)], len(every), len(x)) for of, x, y in matrices],
    )


def address(array: Array) -> int:
    """Where an array begins in memory."""
    return array.__array_interface__["data"][0]


def refusal(what: str) -> RecordingError:
    """The error for something that a list of calls cannot repeat."""
    file, number = line_of_the_text()
    return RecordingError(f"{file}:{number}: {what} cannot be recorded")


def line_of_the_text() -> Line:
    """The line of the text that is running."""
    frame = sys._getframe(3)  # the text is three calls up at least
    while frame.f_code.co_filename in INSIDE and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


# The files whose lines are not the text.
INSIDE = (__file__, sys.modules[NDArrayOperatorsMixin.__module__].__file__)
