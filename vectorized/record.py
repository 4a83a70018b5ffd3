"""The recorder: runs the text once, and from then on only the NumPy calls that the text made.

A function of the text is called with arrays that have a shape and no numbers. NumPy hands every
operation on them to the recorder, which writes down a list of calls (function, arrays in, array
out). A step of training puts its tokens into place and runs down the list. On the way from the
text to the list:

memory order   The last axis of a result lies slowest, documents and positions fastest. Sums over
               channels then add rows, and a linear layer is one product w . x of matrices.
few axes       Element-wise calls see views with as few axes as memory allows.
sums           A sum over the last axis is a product with ones. A small sum takes an (n, n) matrix
               of ones: its n result rows are equal, and later calls need no broadcast.
look-ups       The gradient of a small table is a product with a one-hot matrix.
products       q, k and v are one product, and so are their gradients: see `merged_products`.
memory         Results share memory when their lives do not overlap: see `place`.

What a list cannot repeat is refused with a RecordingError that names the line of the text: a
decision that depends on the numbers in an array, or an operation that is not known here.
"""

from __future__ import annotations

import operator
import sys
from bisect import insort
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.lib.stride_tricks import as_strided

from microgpt.errors import MicrogptError
from vectorized.model import Array

Ints = tuple[int, ...]

EQUAL_ROWS = 8192  # multiplications up to which a sum is computed as n equal rows
EXPANDED = 2**14  # numbers up to which a mask is expanded to the shape of what it is added to
ONE_HOT = 512  # rows of a table up to which its gradient is a product
ALIGN = 64  # bytes of a cache line

# How the list calls these operations. A method of an array is faster than NumPy's function.
BOUND: dict[str, Callable[..., tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "dot": lambda a, b, out: (a.dot, (b, out)),
    "matmul": lambda a, b, out: (np.matmul, (a, b, out)),
    "sum": lambda x, out: (np.add.reduce, (x, 0, None, out)),
    "max": lambda x, out: (np.maximum.reduce, (x, 0, None, out)),
    "maximum": lambda x, y, out: (partial(np.maximum, out=out), (x, y)),  # positional: deprecated
    "minimum": lambda x, y, out: (partial(np.minimum, out=out), (x, y)),
    "take": lambda table, at, out: (table.take, (at, 0, out, "clip")),  # "clip" spares a copy
    "put": lambda at, values, out: (out.__setitem__, (at, values)),
    "add_at": lambda at, rows, out: (np.add.at, (out, at, rows)),
    "copy": lambda x, out: (out.__setitem__, (..., x)),
    "fill": lambda value, out: (out.fill, (value,)),
}
POWERS = {
    2: (np.square,),
    0.5: (np.sqrt,),
    -0.5: (np.sqrt, np.reciprocal),
}  # and how they are computed


class RecordingError(MicrogptError):
    """The text does something that a list of calls cannot repeat."""


class Line(NamedTuple):
    """A line of the text."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"


class Buffer:
    """The memory of one result. Its place is decided when the recording ends."""

    __slots__ = ("address", "array", "changed", "group", "home", "offset", "zero")

    def __init__(self, array: Array, zero: bool = False) -> None:
        self.array = array  # gives each buffer an address of its own; is never touched
        self.address = address(array)
        self.home: Array | None = None  # the caller's array, if the result has to lie there
        self.offset = 0  # in the block of memory otherwise
        self.group = [self]  # buffers that lie side by side, in this order
        self.zero = zero  # zeros, as long as no call has had to write them
        self.changed = False  # whether the text has written into it


class Call:
    """One call of the list. The last operand is written."""

    __slots__ = ("elementwise", "f", "inputs", "line", "operands")

    def __init__(self, f: Any, operands: Sequence[Any], line: Line) -> None:
        self.f = f  # a ufunc, or a name in BOUND
        self.operands = list(operands)
        self.inputs = [x for x in operands[:-1] if isinstance(x, Traced)]
        self.line = line
        self.elementwise = isinstance(f, np.ufunc) or f in ("maximum", "minimum", "copy")

    @property
    def out(self) -> Any:
        return self.operands[-1]


class Number:
    """A plain number that differs from run to run: a learning rate, a bias correction."""

    def __init__(self, find: Callable[[], float]) -> None:
        self.find = find


def _number_operation(f: Callable[[float, float], float], swap: bool) -> Any:
    def combined(self: Number, other: Any) -> Any:
        if isinstance(other, Traced):
            return NotImplemented
        return Number(lambda: f(other, self.find()) if swap else f(self.find(), other))

    return combined


def _number_decision(*_: Any) -> Any:
    raise RecordingError(f"{_line()}: a decision that depends on a number of one run")


for _name in ("bool", "eq", "ne", "lt", "le", "gt", "ge", "float", "int", "neg"):
    setattr(Number, f"__{_name}__", _number_decision)
for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(Number, f"__{_name}__", _number_operation(getattr(operator, _name), False))
    setattr(Number, f"__r{_name}__", _number_operation(getattr(operator, _name), True))


class Traced(NDArrayOperatorsMixin):
    """An array of the text while it is recorded."""

    __slots__ = ("_rows", "buffer", "dtype", "ndim", "recorder", "shape", "tail", "view")

    def __init__(
        self, recorder: Recorder, view: Array, buffer: Buffer | None, rows: Array | None = None
    ) -> None:
        self.recorder = recorder
        self.view = view  # of the buffer's array; without a buffer, of an array that exists
        self.buffer = buffer
        self.tail = buffer  # the last buffer, where the view spans several of a group
        self._rows = rows
        self.shape, self.ndim, self.dtype = view.shape, view.ndim, view.dtype

    @property
    def rows(self) -> Array | None:
        """(.., n): n equal rows, and view is the first, (.., 1); else None."""
        changed = self.buffer is not None and self.buffer.changed
        return None if changed else self._rows

    @property
    def address(self) -> int:
        """Where this array begins."""
        return address(self.view)

    @property
    def form(self) -> tuple[int, Ints, Ints]:
        """Address, shape and strides."""
        return self.address, self.shape, self.view.strides

    @property
    def fixed(self) -> bool:
        """Whether this memory is the caller's."""
        return self.buffer is None or self.buffer.home is not None

    @property
    def whole(self) -> bool:
        """Whether this is all of a result."""
        return self.buffer is not None and self.view.nbytes == self.buffer.array.nbytes

    @property
    def T(self) -> Traced:  # noqa: N802, as arrays have it
        return self.like(self.view.T)

    def like(self, view: Array) -> Traced:
        """Another view of the same memory."""
        return Traced(self.recorder, view, self.buffer)

    def reshape(self, *shape: int) -> Traced:
        return self.recorder.reshaped(self, self.view, shape)

    def sum(self, axis: int | None = None, keepdims: bool = False) -> Traced:
        return self.recorder.reduced(self, "sum", axis, keepdims, 1.0)

    def mean(self, axis: int | None = None, keepdims: bool = False) -> Traced:
        n = self.view.size if axis is None else self.shape[axis]
        return self.recorder.reduced(self, "sum", axis, keepdims, 1 / n)

    def max(self, axis: int | None = None, keepdims: bool = False) -> Traced:
        return self.recorder.reduced(self, "max", axis, keepdims)

    def __len__(self) -> int:
        return len(self.view)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        (out,) = kwargs.pop("out", (None,))
        if ufunc is np.add and method == "at":
            return self.recorder.add_at(*inputs)
        if method != "__call__" or kwargs or ufunc.nout > 1:
            raise self.recorder.refusal(f"numpy.{ufunc.__name__} with these arguments")
        if ufunc is np.matmul:
            return self.recorder.matmul(*inputs)
        return self.recorder.elementwise(ufunc, inputs, out)

    def __array_function__(self, f: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if f is np.einsum and len(args) == 3 and not kwargs:
            return self.recorder.einsum(*args)
        if f is np.zeros_like and not kwargs:
            array = np.empty(args[0].shape, self.recorder.dtype)
            return Traced(self.recorder, array, Buffer(array, zero=True))
        raise self.recorder.refusal(f"numpy.{f.__name__} with these arguments")

    def __getattr__(self, name: str) -> Any:
        raise self.recorder.refusal(f".{name} of an array")

    def _no_numbers(self, *_: Any) -> Any:
        raise self.recorder.refusal("a decision that depends on the numbers in an array")

    __array__ = __bool__ = __complex__ = __contains__ = __float__ = __index__ = _no_numbers
    __int__ = __iter__ = _no_numbers

    def __getitem__(self, key: Any) -> Traced:
        keys = key if isinstance(key, tuple) else (key,)
        if any(isinstance(k, Traced) for k in keys):
            return self.recorder.gather(self, keys)
        part = self.like(self.view[key])
        if min(part.view.strides, default=0) < 0:
            raise self.recorder.refusal("an array in reverse order")
        return part

    def __setitem__(self, key: Any, value: Any) -> None:
        keys = key if isinstance(key, tuple) else (key,)
        if any(isinstance(k, Traced) for k in keys):
            self.recorder.scatter(self, keys, value)
        else:
            self.recorder.assign(self.like(self.view[key]), value)


class Recorder:
    """Writes down what the text does with arrays of one precision."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.calls: list[Call] = []
        self.marks = [0]  # where the parts of the list begin
        self.numbers: list[tuple[Array, Callable[[], float]]] = []
        self.known: dict[Any, Any] = {}  # constants and flat indices
        self.relus: dict[Any, tuple[Traced, Traced]] = {}  # x and maximum(x, 0), by the form of x

    def hold(self, array: Array) -> Any:
        """An array that exists, for the text to work on: parameters, tokens."""
        return Traced(self, array, None)

    def mark(self) -> None:
        """Begin another part of the list, which is run by itself."""
        self.marks.append(len(self.calls))

    def put(self, result: Any, place: Array) -> None:
        """Let the call write its result to an existing array; if it cannot, copy the result."""
        whole = isinstance(result, Traced) and result.whole and not result.fixed
        if whole and result.view.strides == place.strides:
            self._write_zeros(result)
            result.buffer.home = place
        else:
            self.assign(self.hold(place), result)

    def recording(self) -> Recording:
        """What has been written down."""
        parts = [self.calls[start:end] for start, end in pairwise([*self.marks, len(self.calls)])]
        parts = [merged_products(without_copies(part)) for part in without_unused(parts)]
        nbytes = place([call for part in parts for call in part])
        for call in self.calls:  # no circles of references, so that memory is free at once
            for x in [*call.inputs, call.out]:
                if x.buffer is not None:
                    x.buffer.group = []
        self.calls, self.known, self.relus = [], {}, {}
        return Recording(parts, nbytes, self.numbers)

    def refusal(self, what: str) -> RecordingError:
        """The error for something that a list of calls cannot repeat."""
        return RecordingError(f"{_line()}: {what} cannot be recorded")

    # --- element by element

    def elementwise(self, ufunc: Any, inputs: Sequence[Any], out: Traced | None = None) -> Traced:
        """A ufunc, or what does the same in less time."""
        x, y = inputs[0], inputs[-1]
        plain = isinstance(y, (int, float))
        relu = x.form if plain and y == 0 and isinstance(x, Traced) else None
        if ufunc is np.divide and (plain or isinstance(y, Number)):
            ufunc, inputs = np.multiply, (x, 1 / y)
        elif ufunc is np.power and plain and y in POWERS:
            for root in POWERS[y]:
                x = self._on_rows(root, (x,))
            return x
        elif ufunc in (np.maximum, np.minimum):
            ufunc = ufunc.__name__
        elif ufunc is np.greater and relu:  # x > 0 where relu(x) > 0: x need not stay in memory
            inputs = (self.relus.get(relu, (x, x))[1], y)
        if ufunc == "maximum" and relu and out is None:
            self.relus[relu] = x, self._apply(ufunc, inputs)
            return self.relus[relu][1]
        if len(inputs) == 2 and out is None:
            return self._on_rows(ufunc, inputs)
        return self._apply(ufunc, inputs, out)

    def _on_rows(self, ufunc: Any, inputs: Sequence[Any]) -> Traced:
        """The result for all equal rows, if all arrays have such rows."""
        wide = list(inputs)
        for i, x in enumerate(inputs):
            if isinstance(x, Traced):
                if x.rows is None:
                    return self._apply(ufunc, inputs)
                wide[i] = x.like(x.rows)
        out = self._apply(ufunc, wide)
        return Traced(self, out.view[..., :1], out.buffer, out.view)

    def _apply(self, f: Any, inputs: Sequence[Any], out: Traced | None = None) -> Traced:
        operands = [self._operand(x) for x in inputs]
        shape = _broadcast(*[x.shape for x in operands]) if out is None else out.shape
        for i, x in enumerate(operands):
            if isinstance(x, Traced) and x.rows is not None and x.rows.shape == shape:
                operands[i] = x.like(x.rows)
        if out is not None:
            self._overwrite(out)
            self._emit(f, *operands, out)
            return out
        alike = (x for x in operands if isinstance(x, Traced) and x.shape == shape)
        out = self._new(shape, like=next(alike, None))
        for i, x in enumerate(operands):
            if isinstance(x, np.ndarray) and x.ndim and out.view.size <= EXPANDED:
                operands[i] = np.empty_like(out.view)
                operands[i][...] = x
        self._emit(f, *operands, out)
        if out.ndim > 2 and out.view.flags.c_contiguous and shape[-1] > 1:  # rows of a table
            rows, out = out, self._new(shape)
            self._emit("copy", rows, out)
        return out

    def _operand(self, x: Any) -> Any:
        if isinstance(x, Traced):
            return x
        if isinstance(x, Number):
            self.numbers.append((np.empty((), self.dtype), x.find))
            return self.numbers[-1][0]
        if isinstance(x, np.ndarray):
            return x.astype(self.dtype, copy=False)
        return self._constant(("number", x), lambda: x)

    def assign(self, place: Traced, value: Any) -> None:
        """place[:] = value"""
        self._overwrite(place)
        self._emit("copy", self._operand(value), place)

    def _overwrite(self, place: Traced) -> None:
        """Get ready for a call that writes into an array that the text has a name for."""
        self._write_zeros(place)
        if place.buffer is not None:
            place.buffer.changed = True  # equal rows would not all be written
        for form, arrays in list(self.relus.items()):
            if place.buffer in [x.buffer for x in arrays]:
                del self.relus[form]

    # --- sums, maxima, products

    def reduced(
        self, x: Traced, f: str, axis: int | None, keepdims: bool, weight: float = 1.0
    ) -> Traced:
        """The sum times a weight, or the maximum: over the last axis, or the sum over the first."""
        if f == "sum" and axis == 0 and not keepdims and weight == 1:
            out = self._new(x.shape[1:])
            self._emit(*("sum", x) if len(x) > 1 else ("copy", x[0]), out)
            return out
        if axis != -1 or not keepdims:
            raise self.refusal(f"a {f} over this axis")
        columns = self.matrix(x)  # (n, N)
        n, N = columns.shape
        if f == "sum" and n * n * N <= EQUAL_ROWS:
            out = self._new(x.shape)
            ones = self._constant(("rows", n, weight), lambda: np.full((n, n), weight))
            self._emit("dot", self.hold(ones), columns, self.matrix(out))
            return Traced(self, out.view[..., :1], out.buffer, out.view)
        out = self._new((*x.shape[:-1], 1))
        if f == "sum":
            ones = self._constant(("ones", n, weight), lambda: np.full(n, weight))
            self._emit("dot", self.hold(ones), columns, self.flat(out))
        else:
            self._emit("max", columns, self.flat(out))
        return out

    def matmul(self, x: Any, w: Any) -> Traced:
        """x @ w, computed as w^T . x^T: (.., k), (k, n) -> (.., n)"""
        if not isinstance(x, Traced) or not isinstance(w, Traced) or w.ndim != 2 or x.ndim < 2:
            raise self.refusal("this product")
        out = self._new((*x.shape[:-1], w.shape[1]))
        self._emit("dot", w.T, self.matrix(x), self.matrix(out))
        return out

    def einsum(self, letters: str, a: Traced, b: Traced) -> Traced:
        """One matrix product for each value of the indices that a, b and the result share."""
        of_a, of_b, to = letters.replace("->", ",").split(",")
        size = {**dict(zip(of_a, a.shape)), **dict(zip(of_b, b.shape))}
        every, summed, rows, columns, order = _plan(of_a, of_b, to)
        if set(of_a + of_b) != set(every + summed + rows + columns):
            raise self.refusal(f"numpy.einsum({letters!r})")
        out = self._new([size[letter] for letter in to], order)
        if not to:
            self._emit("dot", self.flat(a), self.flat(b), out)
            return out

        def matrices(x: Traced, of: str, left: str, right: str) -> Traced:
            view = x.view.transpose([of.index(letter) for letter in every + left + right])
            sizes = (prod(size[letter] for letter in side) for side in (left, right))
            return self.reshaped(x, view, (*(size[letter] for letter in every), *sizes))

        if rows and to[order[-1]] in rows:  # what lies fastest in the result are its columns
            a, b, of_a, of_b, rows, columns = b, a, of_b, of_a, columns, rows
        left, right = matrices(a, of_a, rows, summed), matrices(b, of_b, summed, columns)
        self._emit("matmul" if every else "dot", left, right, matrices(out, to, rows, columns))
        return out

    # --- look-ups

    def gather(self, x: Traced, keys: tuple[Any, ...]) -> Traced:
        """x[keys]: a row of a table for every position, or one number for each."""
        index = keys[-1]
        if len(keys) > 1:
            out = self._new(index.shape, (0, 1))
            self._emit("take", self._memory(x), self._flat_index(x, keys), self.flat(out))
        else:
            width = x.shape[1]
            out = self._new((*index.shape, width), (*range(index.ndim), index.ndim))
            self._emit("take", x, self.flat(index), self.reshaped(out, out.view, (-1, width)))
        return out

    def scatter(self, x: Traced, keys: tuple[Any, ...], value: Traced) -> None:
        """x[keys] = value: a row of a table for every position, or one number for each."""
        self._overwrite(x)
        if len(keys) > 1:
            self._emit("put", self._flat_index(x, keys), self.flat(value), self._memory(x))
        else:
            self._emit("put", self.flat(keys[0]), self.matrix(value).T, x)

    def add_at(self, table: Traced, index: Traced, values: Traced) -> None:
        """np.add.at(table, index, values), a row for every position"""
        if not all(isinstance(x, Traced) for x in (table, index, values)):
            raise self.refusal("np.add.at into an array that is not like another (np.zeros_like)")
        rows, n = self.matrix(values).T, len(table)  # (N, C)
        if n > ONE_HOT:
            self._overwrite(table)
            self._emit("add_at", self.flat(index), rows, table)
            return
        eye = self.hold(self._constant(("eye", n), lambda: np.eye(n)))
        one_hot = self._new((len(rows), n), (0, 1))
        self._emit("take", eye, self.flat(index), one_hot)
        if table.buffer is not None and table.buffer.zero:
            table.buffer.zero = False
            self._emit("dot", one_hot.T, rows, table)
        else:
            sums = self._new(table.shape, (0, 1))
            self._emit("dot", one_hot.T, rows, sums)
            self._emit(np.add, table, sums, table)

    def _flat_index(self, x: Traced, keys: tuple[Any, ...]) -> Traced:
        """Where x[keys] are in the memory of x: the sum of keys times strides."""
        *rest, index = keys
        *strides, last = (stride // x.view.itemsize for stride in x.view.strides)
        first = np.ravel(sum(k * stride for k, stride in zip(rest, strides)))
        if (key := (index.address, last, first.tobytes())) not in self.known:
            self.known[key] = out = self._new((index.view.size,), (0,), dtype=np.intp)
            self._emit(np.multiply, self.flat(index), np.array(last), out)
            self._emit(np.add, out, first, out)
        found: Traced = self.known[key]
        return found

    # --- arrays and views

    def _new(
        self,
        shape: Sequence[int],
        order: Ints | None = None,
        like: Traced | None = None,
        dtype: Any = None,
    ) -> Traced:
        """A result. order: its axes, the slowest first; without one, it lies like another array,
        or its last axis lies slowest."""
        if like is not None:
            view = np.empty_like(like.view, self.dtype)
            return Traced(self, view, Buffer(view))
        n = len(shape)
        order = (n - 1, *range(n - 1))[:n] if order is None else order
        array = np.empty([shape[axis] for axis in order], dtype or self.dtype)
        return Traced(self, array.transpose(_inverse(order)), Buffer(array))

    def _constant(self, key: Any, value: Callable[[], Any]) -> Array:
        if key not in self.known:
            self.known[key] = np.asarray(value(), self.dtype)
        constant: Array = self.known[key]
        return constant

    def matrix(self, x: Traced) -> Traced:
        """The last axis as rows and all others as columns: (n, N)"""
        last = x.ndim - 1
        return self.reshaped(x, x.view.transpose(last, *range(last)), (x.shape[-1], -1))

    def flat(self, x: Traced) -> Traced:
        """All elements in one axis: (N,)"""
        return self.reshaped(x, x.view, (-1,))

    def _memory(self, x: Traced) -> Traced:
        """A result as it lies, in one axis."""
        if not x.whole:
            raise self.refusal("an index into a part of an array")
        return x.like(x.buffer.array.ravel("K"))  # type: ignore[union-attr]

    def reshaped(self, x: Traced, view: Array, shape: Ints) -> Traced:
        """A view of x in another shape."""
        out = view.reshape(shape)
        if out.base is not (view if view.base is None else view.base):  # it is a copy
            raise self.refusal("this operation on an array that lies in this order")
        return x.like(out)

    def _write_zeros(self, x: Traced) -> None:
        """Fill a zeros_like with zeros before a call reads it or writes only a part of it."""
        if x.buffer is not None and x.buffer.zero:
            x.buffer.zero = False
            self._emit("fill", 0.0, x.like(x.buffer.array))

    def _emit(self, f: Any, *operands: Any) -> None:
        call = Call(f, operands, _line())
        for x in call.inputs:
            self._write_zeros(x)
        self.calls.append(call)


def without_unused(parts: list[list[Call]]) -> list[list[Call]]:
    """The calls whose results are read, or lie where the caller wants them."""
    read: set[Buffer | None] = set()
    kept: list[list[Call]] = []
    for part in reversed(parts):
        kept.append([])
        for call in reversed(part):
            if call.out.fixed or call.out.buffer in read:
                read.update(x.buffer for x in call.inputs)
                kept[-1].append(call)
    return [part[::-1] for part in kept[::-1]]


def without_copies(calls: list[Call]) -> list[Call]:
    """A call whose result is only copied writes to the target of the copy. In `p[:] = a * p + y`
    that is the sum, and also the product if no call between the two uses p."""
    read = Counter(x.buffer for call in calls for x in call.inputs)
    kept: list[Call] = []

    def moves(x: Any, call: Call, place: Traced) -> bool:
        """Whether this call computes x, which is read once, and can write it to that place."""
        computed = call.out is x and x.whole and not x.fixed and read[x.buffer] == 1
        return computed and x.shape == place.shape and (call.elementwise or call.f == "sum")

    for call in calls:
        place, at = call.out, len(kept) - 1
        while at > 0 and kept[at].f == "fill":  # zeros around the place
            at -= 1
        if call.f == "copy" and at >= 0 and moves(call.operands[0], kept[at], place):
            call = kept.pop(at)
            operands = [*call.operands[:-1], place]
            for i, x in enumerate(operands[:-1]):
                if any(_overlap(y, place) for y in operands[:-1]):
                    break  # the call itself reads the place
                for earlier in reversed(kept):
                    if earlier.elementwise and moves(x, earlier, place):
                        earlier.operands[-1] = operands[i] = place
                    if any(_overlap(y, place) for y in earlier.operands):
                        break
            call = Call(call.f, operands, call.line)
        kept.append(call)
    return kept


def _overlap(x: Any, y: Traced) -> bool:
    """Whether two arrays may share memory."""
    if not isinstance(x, Traced) or x.buffer is not y.buffer:
        return False
    return x.buffer is not None or np.may_share_memory(x.view, y.view)


def merged_products(calls: list[Call]) -> list[Call]:
    """Merge products that share an operand, or are added, if their other matrices are adjacent.

    wq . x, wk . x, wv . x               -> (wq, wk, wv) . x
    dq . x^T, dk . x^T, dv . x^T         -> (dq, dk, dv) . x^T
    wq^T . dq + wk^T . dk + wv^T . dv    -> (wq, wk, wv)^T . (dq, dk, dv)
    """
    read: dict[Any, list[int]] = {}  # by which calls a buffer is read
    for i, call in enumerate(calls):
        for x in call.inputs:
            read.setdefault(x.buffer, []).append(i)
    merged: dict[int, Call] = dict(enumerate(calls))
    same_right: dict[Any, int] = {}  # the last product with this right operand
    written: dict[Any, int] = {}  # the product that writes a buffer
    for i, call in enumerate(calls):
        if call.f == "dot" and call.out.ndim == 2:
            left, right, out = call.operands
            earlier = merged.get(j := same_right.get(right.form, -1))
            same_right[right.form] = written[out.buffer] = i
            if earlier is None or min(read.get(earlier.out.buffer, [i])) < i:
                continue
            if both := side_by_side((earlier.operands[0], left), (earlier.out, out)):
                del merged[j]
                merged[i] = Call("dot", [both[0], right, both[1]], call.line)
        elif call.f is np.add and len(call.inputs) == 2:
            at = [written.get(x.buffer, -1) for x in call.inputs]
            terms = [merged[j] for j in at if j in merged]
            if len(terms) < 2 or any(len(read[term.out.buffer]) > 1 for term in terms):
                continue
            (left1, right1, _), (left2, right2, _) = (term.operands for term in terms)
            out = call.out if call.out.ndim == 2 else call.out.recorder.matrix(call.out)
            if not out.view.flags.c_contiguous:
                continue
            if both := side_by_side((left1.T, left2.T), (right1, right2)):
                del merged[at[0]], merged[at[1]]
                merged[i] = Call("dot", [both[0].T, both[1], out], call.line)
                written[out.buffer] = i
    return [merged[i] for i in sorted(merged)]


def side_by_side(*pairs: tuple[Traced, Traced]) -> list[Traced]:
    """Each pair as one matrix, first above second; empty if a pair cannot be adjacent in memory."""
    if not all(_can_follow(x, y) for x, y in pairs):
        return []
    both = []
    for x, y in pairs:
        if x.buffer and y.buffer and not x.fixed and y.buffer not in x.buffer.group:
            x.buffer.group += [y.buffer]
            y.buffer.group = x.buffer.group
        both.append(x.like(as_strided(x.view, (len(x) + len(y), x.shape[1]))))
        both[-1].tail = y.tail
    return both


def _can_follow(x: Traced, y: Traced) -> bool:
    """Whether the rows of y come after those of x in memory, or can be placed there."""
    contiguous = x.view.flags.c_contiguous and y.view.flags.c_contiguous
    if x.shape[1] != y.shape[1] or not contiguous:
        return False
    if x.fixed or y.fixed:
        first, second = (z.view if z.buffer is None else z.buffer.home for z in (x, y))
        if first is None or second is None:
            return False
        return address(first) + x.view.nbytes == address(second)
    group = x.tail.group  # type: ignore[union-attr]
    after = group[group.index(x.tail) + 1 :]  # type: ignore[arg-type]
    alone = y.buffer.group == [y.buffer] != group  # type: ignore[union-attr]
    return y.whole and (after[0] is y.buffer if after else alone)


def place(calls: Sequence[Call]) -> int:
    """Give every result its place in one block of memory, and return the bytes of the block.

    A place is free again after the last call that uses it. An element-wise call writes to the place
    of an operand that no later call reads.
    """
    used: list[set[int]] = []  # by each call: the groups of buffers
    last: dict[int, int] = {}  # the last call that uses a group
    for i, call in enumerate(calls):
        used.append({id(x.buffer.group) for x in [*call.inputs, call.out] if not x.fixed})
        last.update(dict.fromkeys(used[-1], i))
    places: dict[int, tuple[int, int]] = {}  # the start and end of each group
    taken: list[tuple[int, int]] = []  # those in use, in order
    for i, call in enumerate(calls):
        if not call.out.fixed and id(group := call.out.buffer.group) not in places:
            for x in call.inputs:
                if _inherits(call, x) and last[id(x.buffer.group)] == i:  # type: ignore[union-attr]
                    heir = id(x.buffer.group)  # type: ignore[union-attr]
                    places[id(group)], last[heir] = places[heir], -1
                    break
            else:
                size, start = sum(buffer.array.nbytes for buffer in group), 0
                for other in taken:
                    if start + size <= other[0]:
                        break
                    start = max(start, other[1])
                places[id(group)] = start, start + size + -size % ALIGN
                insort(taken, places[id(group)])
            start = places[id(group)][0]
            for buffer in group:
                buffer.offset = start
                start += buffer.array.nbytes
        for group_id in used[i]:
            if last[group_id] == i:
                taken.remove(places[group_id])
    return max((end for _, end in places.values()), default=0)


def _inherits(call: Call, x: Traced) -> bool:
    """Whether the call can write its result over this operand, if no later call reads it."""
    return (
        call.elementwise
        and x.whole
        and not x.fixed
        and call.out.whole
        and len(x.buffer.group) == len(call.out.buffer.group) == 1  # type: ignore[union-attr]
        and (x.shape, x.view.strides) == (call.out.shape, call.out.view.strides)
    )


class Recording:
    """A list of calls in parts, which can be run over and over."""

    def __init__(
        self,
        parts: list[list[Call]],
        nbytes: int,
        numbers: list[tuple[Array, Callable[[], float]]],
    ) -> None:
        self.parts = parts
        self.nbytes = nbytes  # of the block of memory that its results share
        self.numbers = numbers
        self.lines = [[(getattr(c.f, "__name__", c.f), c.line) for c in part] for part in parts]

    def bind(self, block: Array) -> None:
        """Give the calls their memory."""
        views: dict[Any, Array] = {}  # NumPy is faster where input and output are one object
        self.runs = [[_bound(call, block, views) for call in part] for part in self.parts]
        self.size = sum(map(len, self.runs))  # calls
        self.parts = []

    def run(self, part: int) -> None:
        """Run a part of the list."""
        for number, find in self.numbers:
            number[()] = find()
        for f, arguments in self.runs[part]:
            f(*arguments)


def _bound(
    call: Call, block: Array, known: dict[Any, Array]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function and its arguments, in memory that exists."""
    arrays = [x.view if isinstance(x, Traced) else np.asarray(x) for x in call.operands]
    forms = [(x.shape, x.strides) for x in arrays]
    if call.elementwise:
        forms = _fused(tuple(forms))
    views = []
    for x, form in zip(call.operands, forms):
        view = _in_memory(x, block, *form)
        if isinstance(view, np.ndarray):
            view = known.setdefault((address(view), view.shape, view.strides, view.dtype), view)
        views.append(view)
    return BOUND[call.f](*views) if call.f in BOUND else (call.f, tuple(views))


@lru_cache(maxsize=4096)
def _fused(forms: tuple[tuple[Ints, Ints], ...]) -> list[tuple[Ints, Ints]]:
    """Shapes and strides of the same elements with as few axes as possible, the slowest first."""
    shape, out = forms[-1]
    strides = []  # of every operand as if it had all axes of the result, 0 where it is broadcast
    for own_shape, own in forms:
        own = tuple(0 if n == 1 else stride for n, stride in zip(own_shape, own))
        strides.append((0,) * (len(shape) - len(own)) + own)
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


def _in_memory(x: Any, block: Array, shape: Ints, strides: Ints) -> Any:
    """An operand where it lies."""
    if not isinstance(x, Traced):
        return as_strided(x, shape, strides) if isinstance(x, np.ndarray) and x.ndim else x
    if x.buffer is None:
        same = (x.shape, x.view.strides) == (shape, strides)
        return x.view if same else as_strided(x.view, shape, strides)
    start = 0 if x.whole else x.address - x.buffer.address
    if x.buffer.home is not None:
        return as_strided(x.buffer.home.ravel()[start // x.dtype.itemsize :], shape, strides)
    return np.ndarray(shape, x.dtype, block.data, x.buffer.offset + start, strides)


def address(array: Array) -> int:
    """Where an array begins in memory."""
    return array.__array_interface__["data"][0]


def _line() -> Line:
    """The line of the text that is running."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename in INSIDE and frame.f_back is not None:
        frame = frame.f_back
    return Line(frame.f_code.co_filename, frame.f_lineno)


INSIDE = (__file__, sys.modules[NDArrayOperatorsMixin.__module__].__file__)


@lru_cache(maxsize=1024)
def _broadcast(*shapes: Ints) -> Ints:
    return np.broadcast_shapes(*shapes)


@lru_cache(maxsize=64)
def _inverse(order: Ints) -> Ints:
    return tuple(order.index(axis) for axis in range(len(order)))


@lru_cache(maxsize=64)
def _plan(of_a: str, of_b: str, to: str) -> tuple[str, str, str, str, Ints]:
    """Four groups of letters: in a, b and the result; in a and b only (summed); in a and the
    result (rows); in b and the result (columns). And the axes of the result, the slowest first.

    b, t and u are documents and positions and lie fastest; where t looks at u, u lies slowest.
    """
    every = "".join(x for x in to if x in of_a and x in of_b)
    summed = "".join(x for x in of_a if x in of_b and x not in to)
    rows, columns = ("".join(x for x in to if x in of and x not in every) for of in (of_a, of_b))
    if "t" in to and "u" in to:
        order = "u" + to.replace("u", "")
    else:
        order = "".join(sorted(to, key="btu".__contains__))
    return every, summed, rows, columns, tuple(to.index(x) for x in order)
