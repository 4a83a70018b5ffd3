"""The recorder: runs the text once, and from then on only the NumPy calls that the text made.

A function of the text is called with arrays that have a shape and no numbers. NumPy hands every
operation on them to the recorder, which writes down a list of calls (function, arrays in, array
out). A step of training puts its tokens into place and runs down the list. The recorder chooses:

memory order   The last axis of a result lies slowest, documents and positions fastest: `in_memory`.
               A linear layer is then one product w . x of matrices.
few axes       Element-wise calls get views with as few axes as memory allows: `_fused`.
one object     Views of the same memory are one array object, so that NumPy need not find out how
               they overlap when a call writes over its operand (1.08 at a batch of one).
sums           A sum over the last axis is a product with ones. A small sum takes an (n, n) matrix
               of ones: its n result rows are equal, and later calls need no broadcast (1.08 at 1).
look-ups       The gradient of a small table is a product with a one-hot matrix (1.05 at 1, 1.1 at
               64), and so is a look-up in it (1.01 at 1, 0.99 at 64; 1.01 in float32).
products       q, k and v are one product, and so are their gradients: `merged` (1.04 at 1, 1.02 at
               64).
constants      Positions and mask, where they are always the same, are one-hot and spread over the
               heads once (1.02 at 1).
places         Results share memory when their lives do not overlap. A result that is only copied
               is computed where the copy would lie (1.06 at 1): `placed`, `put`.

In brackets: how many times as long a step of the default model takes without it, in float64, at
that number of documents.

What a list cannot repeat is refused with a RecordingError that names the line of the text: a
decision that depends on the numbers in an array, or an operation that is not known here.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import prod
from operator import add, mul, sub, truediv
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from microgpt.errors import MicrogptError
from vectorized.model import Array

Ints = tuple[int, ...]
Line = tuple[str, int]  # a line of the text: its file and number
Run = tuple[Callable[..., Any], tuple[Any, ...]]  # a function and its arguments

EQUAL_ROWS = 8192  # multiplications up to which a sum is computed as n equal rows
LOOK_UP = 32  # rows of a table up to which a look-up is a product
ONE_HOT = 512  # rows of a table up to which its gradient is a product
SPREAD = 2**11  # numbers up to which a constant array becomes as large as what it is added to
NEAR = 4  # calls among which products are merged
ALIGN = 64  # bytes of a cache line

# How the list calls these operations. A method of an array is faster than NumPy's function.
BOUND: dict[Any, Callable[..., Run]] = {
    "dot": lambda a, b, out: (a.dot, (b, out)),
    "matmul": lambda a, b, out: (np.matmul, (a, b, out)),
    "max": lambda x, out: (np.maximum.reduce, (x, 0, None, out)),
    np.maximum: lambda x, y, out: (partial(np.maximum, out=out), (x, y)),  # by position: deprecated
    "take": lambda table, at, out: (table.take, (at, 0, out, "clip")),  # "clip" spares a copy
    "put": lambda at, values, out: (out.__setitem__, (at, values)),
    "add_at": lambda at, rows, out: (np.add.at, (out, at, rows)),
    "copy": lambda x, out: (out.__setitem__, (..., x)),
    "fill": lambda value, out: (out.fill, (value,)),
}
# How these powers are computed.
POWERS: dict[Any, list[np.ufunc]] = {2: [np.square], 0.5: [np.sqrt], -0.5: [np.sqrt, np.reciprocal]}
# The ufuncs as Python's operations, for numbers that are no arrays.
PLAIN: dict[str, Any] = {
    "add": add, "subtract": sub, "multiply": mul, "divide": truediv, "power": pow
}  # fmt: skip


class RecordingError(MicrogptError):
    """The text does something that a list of calls cannot repeat."""


@dataclass(eq=False, slots=True)
class Place:
    """Where results lie: in an array of the caller, or else in the block of memory."""

    nbytes: int
    home: Array | None = None  # the array of the caller, if it is one
    offset: int = 0  # bytes from the beginning of that, or of the block,
    end: int = 0  # in the block, to the end: 0 as long as that is not known
    uses: list[int] = field(default_factory=list)  # numbers of the calls that use it


@dataclass(eq=False, slots=True)
class Buffer:
    """The memory of a result, or of an array of the caller."""

    array: Array  # of a result: it has the size of the memory, and its numbers are never used
    place: Place  # that of a result is found when the recording ends
    shift: int = 0  # bytes from the beginning of the place
    fixed: bool = False  # whether its numbers are the same in every run
    rows: Any = None  # of a sum computed as n equal numbers, all of them: the view (.., n)


class Call:
    """One call of the list. Of its operands, the last is written."""

    def __init__(self, f: Any, operands: Sequence[Traced], line: Line, part: int) -> None:
        self.f = f  # a ufunc, or a name in BOUND
        self.operands = operands
        *self.inputs, self.out = operands
        self.line = line
        self.part = part  # of the list
        self.elementwise = isinstance(f, np.ufunc) or f == "copy"


class Number(NDArrayOperatorsMixin):
    """A number of Python's that differs from run to run: a learning rate, a bias correction."""

    def __init__(self, find: Callable[[], float]) -> None:
        self.find = find

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, Traced) for x in inputs):
            return NotImplemented
        f = PLAIN[ufunc.__name__] if ufunc.__name__ in PLAIN else self._decision()
        x, y = (x.find if isinstance(x, Number) else partial(float, x) for x in inputs)
        return Number(lambda: f(x(), y()))

    def _decision(self) -> Any:
        raise refusal("a decision that depends on a number of one run")

    __bool__ = __float__ = __int__ = __index__ = _decision


class Traced(NDArrayOperatorsMixin):
    """An array of the text while it is recorded."""

    __slots__ = ("buffer", "dtype", "ndim", "offset", "recorder", "shape", "view")

    def __init__(self, recorder: Recorder, view: Array, buffer: Buffer, offset: int = 0) -> None:
        self.recorder = recorder
        self.view = view  # of the buffer's array,
        self.buffer = buffer
        self.offset = offset  # so many bytes behind its beginning
        self.shape, self.ndim, self.dtype = view.shape, view.ndim, view.dtype

    @property
    def whole(self) -> bool:
        """Whether this is all that lies in its place: a result is, until it lies beside others."""
        return self.view.nbytes == self.buffer.place.nbytes

    @property
    def start(self) -> int:
        """Where in its place it begins, in bytes."""
        return self.buffer.shift + self.offset

    @property
    def form(self) -> Any:
        """The same for two views of the same numbers."""
        return self.buffer.place, self.start, self.shape, self.view.strides

    @property
    def rows(self) -> Ints | None:
        """The shape (.., n), if this is an array (.., 1) that was computed as n equal numbers."""
        rows = self.buffer.rows
        same = rows is not None and (*rows.shape[:-1], 1) == self.shape
        return rows.shape if same and rows.strides[:-1] == self.view.strides[:-1] else None

    @property
    def T(self) -> Traced:  # noqa: N802, as arrays have it
        return self.like(self.view.T)

    @property
    def matrix(self) -> Traced:
        """The last axis as rows and all others as columns: (n, N)"""
        if self.ndim < 3:
            raise refusal("this operation on an array of fewer than three axes")
        order, _ = in_memory(self.ndim)
        return self.reshaped(self.view.transpose(order), (self.shape[-1], -1))

    def like(self, view: Array) -> Traced:
        """Another view of the same memory, from the same number on."""
        return Traced(self.recorder, view, self.buffer, self.offset)

    def reshape(self, *shape: int) -> Traced:
        return self.reshaped(self.view, shape)

    def reshaped(self, view: Array, shape: Ints) -> Traced:
        """A view of this memory in another shape."""
        found = view.reshape(shape)
        if found.base is not (view if view.base is None else view.base):
            raise refusal("this operation on an array that lies in this order")  # it is a copy
        return self.like(found)

    def sum(self, axis: int | None = None, keepdims: bool = False) -> Traced:
        return self.recorder.reduced(self, "sum", axis, keepdims)

    def mean(self, axis: int | None = None, keepdims: bool = False) -> Traced:
        return self.recorder.reduced(self, "mean", axis, keepdims)

    def max(self, axis: int | None = None, keepdims: bool = False) -> Traced:
        return self.recorder.reduced(self, "max", axis, keepdims)

    def __len__(self) -> int:
        return len(self.view)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        (out,) = kwargs.pop("out", (None,))
        if ufunc is np.add and method == "at":
            return self.recorder.add_at(*inputs)
        into = ufunc is np.matmul and out is not None  # x @= w
        if method != "__call__" or kwargs or ufunc.nout > 1 or into:
            raise refusal(f"numpy.{ufunc.__name__} with these arguments")
        if ufunc is np.matmul:
            return self.recorder.matmul(*inputs)
        return self.recorder.elementwise(ufunc, inputs, out)

    def __array_function__(self, f: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if f is np.einsum and len(args) == 3 and not kwargs:
            return self.recorder.einsum(*args)
        if f is np.zeros_like and not kwargs:
            zeros = self.recorder.new(args[0].shape)
            self.recorder.emit("fill", self.recorder.operand(0.0), zeros)
            return zeros
        raise refusal(f"numpy.{f.__name__} with these arguments")

    def __getattr__(self, name: str) -> Any:
        raise refusal(f".{name} of an array")

    def _no_numbers(self, *_: Any) -> Any:
        raise refusal("a decision that depends on the numbers in an array")

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
        self.numbers: list[tuple[Array, Callable[[], float]]] = []  # where they lie in each run

    def hold(self, array: Array, fixed: bool = False) -> Any:
        """An array that exists, for the text to work on: parameters, tokens."""
        if id(array) not in self.known:
            place = Place(array.nbytes, array)
            if array.base is not None:
                place.home, place.offset = array.base, address(array) - address(array.base)
            self.known[id(array)] = Buffer(array, place, fixed=fixed)
        return Traced(self, array, self.known[id(array)])

    def mark(self) -> None:
        """Begin another part of the list, which is run by itself."""
        self.part += 1

    def put(self, result: Any, array: Array) -> None:
        """Let a result, as it is at the end of the text, lie in an existing array."""
        unused = id(array) not in self.known  # by the text
        result, there = self.operand(result), self.hold(array)
        if unused and alike(result, there) and result.buffer.place.home is None:
            result.buffer.place = there.buffer.place
        else:
            there[...] = result

    def recording(self, memory: Callable[[int], Array]) -> Recording:
        """What has been written down, in a block of memory of so many bytes."""
        calls, nbytes = placed(merged(self.calls))
        self.calls, self.known = [], {}  # no circles of references
        parts = [[call for call in calls if call.part == part] for part in range(self.part + 1)]
        block = memory(nbytes)
        views: dict[Any, Array] = {}  # NumPy is faster where input and output are one object
        return Recording(
            [[bound(call, block, views) for call in part] for part in parts],
            [[(getattr(c.f, "__name__", c.f), c.line) for c in part] for part in parts],
            self.numbers,
        )

    def emit(self, f: Any, *operands: Any) -> None:
        """Write down a call. The last operand is written."""
        self.calls.append(Call(f, operands, line_of_the_text(), self.part))
        if operands[-1].buffer.rows is not None:
            raise refusal("writing into a sum, or into what was computed from it,")

    def new(self, shape: Sequence[int], dtype: Any = None, orders: Any = None) -> Traced:
        """Memory for a result of this shape, in the order that `in_memory` says, or another."""
        order, back = orders or in_memory(len(shape))
        array = np.empty([shape[axis] for axis in order], dtype or self.dtype)
        return Traced(self, array.transpose(back), Buffer(array, Place(array.nbytes)))

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

    def elementwise(self, ufunc: Any, inputs: Sequence[Any], out: Traced | None) -> Traced:
        """A ufunc, or others that compute the same in less time."""
        x, y = inputs[0], inputs[-1]
        if ufunc is np.divide and isinstance(y, (int, float, Number)):
            ufunc, inputs = np.multiply, (x, 1 / y)
        elif ufunc is np.power and isinstance(y, (int, float)) and y in POWERS:
            *first, ufunc = POWERS[y]
            for root in first:
                x = self.apply(root, (x,))
            inputs = (x,)
        return self.apply(ufunc, inputs, out)

    def apply(self, ufunc: Any, inputs: Sequence[Any], out: Traced | None = None) -> Traced:
        """One call of a ufunc.

        It computes n equal rows if all operands are such rows, and reads the rows of an operand if
        the result has as many.
        """
        operands = [self.operand(x) for x in inputs]
        every = {x.rows for x in operands if x.shape}
        as_rows = out is None and len(every) == 1 and None not in every
        shape: Any = every.pop() if as_rows else np.broadcast(*(x.view for x in operands)).shape
        for i, x in enumerate(operands):
            if x.buffer.rows is not None and x.rows == shape:
                operands[i] = x.like(x.buffer.rows)
            elif x.buffer.fixed:
                operands[i] = self.spread(x, shape)
        result = self.new(shape) if out is None else out
        self.emit(ufunc, *operands, result)
        return self.as_one(result) if as_rows else result

    def spread(self, x: Traced, shape: Ints) -> Traced:
        """A small array of constants as large as the result."""
        if prod(shape) > SPREAD:
            return x
        if (key := (x.form, shape)) not in self.known:
            self.known[key] = full = self.new(shape)
            full.view[...] = x.view
            full.buffer.place.home = full.buffer.array
        return self.known[key]

    def as_one(self, rows: Traced) -> Traced:
        """The array (.., 1) of numbers that have been computed n times."""
        rows.buffer.rows = rows.view
        return rows.like(rows.view[..., :1])

    # --- sums, maxima, products

    def reduced(self, x: Traced, f: str, axis: int | None, keepdims: bool) -> Traced:
        """The sum, mean or maximum over the last axis."""
        if axis != -1 or not keepdims:
            raise refusal(f"a {f} over this axis")
        n, N = x.shape[-1], prod(x.shape[:-1])
        if f == "max":
            out = self.new((*x.shape[:-1], 1))
            self.emit("max", x.matrix, out.matrix.reshape(-1))
            return out
        weight = 1 / n if f == "mean" else 1.0
        width = n if n * n * N <= EQUAL_ROWS else 1
        key = "ones", n, width, weight
        return self.as_one(self.matmul(x, self.constant(key, lambda: np.full((n, width), weight))))

    def matmul(self, x: Any, w: Any) -> Traced:
        """x @ w, computed as w^T . x^T: (.., k), (k, n) -> (.., n)"""
        x, w = self.operand(x), self.operand(w)
        if w.ndim != 2 or x.ndim < 3:
            raise refusal("this product")
        out = self.new((*x.shape[:-1], w.shape[1]))
        self.emit("dot", w.T, x.matrix, out.matrix)
        return out

    def einsum(self, letters: str, a: Any, b: Any) -> Traced:
        """One matrix product for each value of the indices that a, b and the result share."""
        swapped, orders, axes = as_product(letters)
        a, b = self.operand(a), self.operand(b)
        operands, _, to = letters.replace(",", "").partition("->")
        size = dict(zip(operands, a.shape + b.shape))
        out = self.new([size[letter] for letter in to], orders=orders)
        matrices = []
        for x, (all_axes, every, rows) in zip((b, a, out) if swapped else (a, b, out), axes):
            view = x.view.transpose(all_axes)
            shape = view.shape
            height = prod(shape[every : every + rows])
            matrices.append(x.reshaped(view, (*shape[:every], height, -1)))
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

        A flat index is the sum of keys times strides. Keys count from the beginning: -1 is no key.
        """
        *rest, indices = keys
        index = indices if isinstance(indices, Traced) else self.hold(indices, fixed=True)
        known = all(isinstance(key, (int, np.ndarray)) for key in rest)
        numbers = known and len(keys) == x.ndim and x.whole
        if index.dtype.kind != "i" or (rest and not numbers):
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
            raise refusal("np.add.at into an array that is not like another (np.zeros_like)")
        table, index = self.table_and_index(table, (index,))
        if len(table) > ONE_HOT or values.ndim != 3:
            self.emit("add_at", index, values, table)
            return
        sums = self.new(table.shape)
        if self.calls and (zeros := self.calls[-1]).f == "fill" and zeros.out is table:
            self.calls.pop()
            sums = table
        self.emit("dot", self.one_hot(index, len(table)).T, values.matrix.T, sums)
        if sums is not table:
            self.emit(np.add, table, sums, table)


def merged(calls: list[Call]) -> list[Call]:
    """Products that share an operand, or are added, as one product if their matrices can be one.

    wq . x, wk . x, wv . x             -> (wq, wk, wv) . x
    dq . x^T, dk . x^T, dv . x^T       -> (dq, dk, dv) . x^T
    wq^T . dq + wk^T . dk + wv^T . dv  -> (wq, wk, wv)^T . (dq, dk, dv)
    """
    reads = Counter(x.buffer for call in calls for x in call.inputs)
    kept: list[Call] = []
    for call in calls:
        near: list[Call] = []  # products
        operands: Any = ()  # of this call and the products of `terms`, as one product
        if call.f is np.add or call.f == "dot":
            near = [c for c in kept[-NEAR:] if c.f == "dot"]
        if call.f == "dot":
            left, right, out = call.operands
            terms = [c for c in near if c.inputs[1].buffer is right.buffer][-1:]
            if terms and terms[0].inputs[1].form == right.form and can_wait(terms, kept, call):
                both = stacked((terms[0].inputs[0], left), (terms[0].out, out))
                operands = both and (both[0], right, both[1])
        elif call.f is np.add:
            added = [x.buffer for x in call.inputs if alike(x, call.out)]  # and needed nowhere else
            added = [x for x in added if reads[x] == 1 and x.place.home is None]
            terms = [c for x in added for c in near if c.out.buffer is x]
            if len(terms) == 2 and can_wait(terms, kept, call):
                (left, right), (left2, right2) = (term.inputs for term in terms)
                both = stacked((right, right2), (left.T, left2.T))
                operands = both and (both[1].T, both[0], call.out.like(terms[0].out.view))
        if operands:
            for term in terms:
                kept.remove(term)
            call = Call("dot", operands, call.line, call.part)
        kept.append(call)
    return kept


def can_wait(terms: list[Call], kept: list[Call], call: Call) -> bool:
    """Whether products can be made later, together with a call: nothing in between reads or changes
    what belongs to them, and the call reads their results only to add them."""
    for term in terms:
        after = [*kept[kept.index(term) + 1 :], call]
        places = [x.buffer.place for x in term.operands]
        readers = after if call.f == "dot" else after[:-1]  # an addition reads them
        read = [x.buffer.place for c in readers for x in c.inputs]
        if places[-1] in read or any(c.out.buffer.place in places for c in after):
            return False
    return all(term.part == call.part for term in terms)


def stacked(*pairs: tuple[Traced, Traced]) -> list[Traced]:
    """Each pair of matrices as one, the first above the second; empty if one pair cannot be."""
    (one, another) = ({x.buffer.place for x in pair} for pair in pairs)
    if one & another:
        return []
    for x, y in pairs:
        here, there, end = x.buffer.place, y.buffer.place, x.start + x.view.nbytes
        if here is there:
            fits = y.start == end
        else:
            behind = here.nbytes if here.home is None else there.offset - here.offset
            fits = y.whole and here.home is there.home and behind == end
        fits = fits and x.shape[1] == y.shape[1]
        if not (fits and x.view.flags.c_contiguous and y.view.flags.c_contiguous):
            return []
    both = []
    for x, y in pairs:
        place, start, end = x.buffer.place, x.start, x.start + x.view.nbytes
        if y.buffer.place is not place:
            y.buffer.place, y.buffer.shift, place.nbytes = place, end, end + y.view.nbytes
        array = np.empty((len(x) + len(y), x.shape[1]), x.dtype)
        both.append(Traced(x.recorder, array, Buffer(array, place, start)))
    return both


def placed(calls: list[Call]) -> tuple[list[Call], int]:
    """The calls that remain, their results each at its place in one block, and the block's bytes.

    Goes from the last call to the first: a result takes a place at the last call that reads it, and
    leaves the place at the first that writes it. An operand takes the place of the result where
    that is possible, and a copy is then left out. So is a call whose result no later call reads.
    Operands and results in one place have one list of `uses`.
    """
    for i, call in enumerate(calls):
        for x in call.operands:
            x.buffer.place.uses.append(i)
    kept: list[Call] = []
    taken: list[Place] = []  # those in use, in the order of the block
    nbytes = 0
    for i, call in reversed(list(enumerate(calls))):
        out, in_place = call.out.buffer.place, False
        if out.home is None and not out.end:
            continue
        for x in reversed(call.inputs):
            own = x.buffer.place
            if own.home is not None or own.end:
                continue
            if in_place := fits_over(x, i, calls):
                own.home, own.offset, own.end = out.home, out.offset, out.end
                out.uses += own.uses
                own.uses = out.uses
            else:
                start, at, size = 0, 0, own.nbytes
                while at < len(taken) and start + size > taken[at].offset:
                    start, at = taken[at].end, at + 1
                own.offset, own.end = start, start + size + -size % ALIGN
                taken.insert(at, own)
                nbytes = max(nbytes, own.end)
        if call.f != "copy" or not in_place:
            kept.append(call)
        if out.home is None and min(out.uses) == i:
            taken = [place for place in taken if place.offset != out.offset]
    return kept[::-1], nbytes


def fits_over(x: Traced, i: int, calls: list[Call]) -> bool:
    """Whether operand x of call i can lie where the result of call i will lie."""
    call, first = calls[i], x.buffer.place.uses[0]
    if not call.elementwise or not alike(x, call.out):
        return False
    since = first + calls[first].elementwise  # an element-wise call may write over its operands
    uses = call.out.buffer.place.uses
    read = any(y.buffer.place.uses is uses for y in call.inputs)  # what lies there, by this call
    return not read and not any(since <= j < i for j in uses)


def alike(x: Traced, y: Traced) -> bool:
    """Whether both have one type, shape and memory order, and fill their places."""
    if x.shape != y.shape or x.dtype != y.dtype or not (x.whole and y.whole):
        return False
    steps, others = x.view.strides, y.view.strides
    return steps == others or all(n == 1 or i == j for n, i, j in zip(x.shape, steps, others))


@dataclass
class Recording:
    """A list of calls in parts, which can be run over and over."""

    runs: list[list[Run]]  # a list for each part
    lines: list[list[tuple[str, Line]]]  # what each of them calls, and for which line of the text
    numbers: list[tuple[Array, Callable[[], float]]]  # that are found anew for every run

    @property
    def size(self) -> int:
        """Its calls."""
        return sum(map(len, self.runs))

    def run(self, part: int) -> None:
        """Run a part of the list."""
        for number, find in self.numbers:
            number[()] = find()
        for f, arguments in self.runs[part]:
            f(*arguments)


def bound(call: Call, block: Array, views: dict[Any, Array]) -> Run:
    """The function and its arguments, in memory that exists."""
    forms = [(x.shape, x.view.strides) for x in call.operands]
    if call.elementwise:
        forms = _fused(tuple(forms))
    arguments = []
    for x, (shape, strides) in zip(call.operands, forms):
        place = x.buffer.place
        memory = block if place.home is None else place.home
        start = place.offset + x.start
        key = id(memory), start, shape, strides, x.dtype
        if key not in views:
            views[key] = np.ndarray(shape, x.dtype, memory, start, strides)
        arguments.append(views[key])
    return BOUND[call.f](*arguments) if call.f in BOUND else (call.f, tuple(arguments))


@lru_cache(maxsize=4096)
def _fused(forms: tuple[tuple[Ints, Ints], ...]) -> list[tuple[Ints, Ints]]:
    """Shapes and strides of the same elements with as few axes as possible, the slowest first."""
    shape, out = forms[-1]
    strides = []  # of every operand as if it had all axes of the result, 0 where it is broadcast
    for own_shape, own in forms:
        own = tuple(0 if n == 1 else stride for n, stride in zip(own_shape, own))
        more = len(shape) - len(own)  # below 0 where an operand has more axes, of length 1
        strides.append((0,) * more + own[max(0, -more) :])
    sizes: list[int] = []
    steps: list[list[int]] = []
    for axis in sorted(range(len(shape)), key=lambda axis: -out[axis]):
        step = [own[axis] for own in strides]
        if steps and all(slow == fast * shape[axis] for slow, fast in zip(steps[-1], step)):
            sizes[-1] *= shape[axis]
            steps[-1] = step
        elif shape[axis] > 1:
            sizes.append(shape[axis])
            steps.append(step)
    fused = list(zip(*steps)) or [()] * len(forms)
    return [
        (tuple(sizes), own) if prod(own_shape) > 1 else ((), ())
        for (own_shape, _), own in zip(forms, fused)
    ]


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
    """How an einsum is a product of matrices, after `letters`: whether the second times the first,
    the memory order of the result as in `in_memory`, and of each matrix (left, right, result) its
    axes, how many of them count products, and how many of the next are its rows.

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
        ([*map(to.index, order)], [*map(order.index, to)]),
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
    frame = sys._getframe(3)  # at the earliest: what asks for the line is called by a method
    while frame.f_code.co_filename in INSIDE and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


INSIDE = (__file__, sys.modules[NDArrayOperatorsMixin.__module__].__file__)
