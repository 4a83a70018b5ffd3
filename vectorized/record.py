"""The recorder: runs the text once, and from then on only the NumPy calls that the text made.

A function of the text is called with arrays that have a shape and no numbers. NumPy hands every
operation on them to the recorder, which writes down a list of calls (function, arrays in, array
out). A step of training puts its tokens into place and runs down the list. On the way from the
text to the list:

memory order   The last axis of a result lies slowest, documents and positions fastest. Sums over
               channels then add rows, and a linear layer is one product w . x of matrices.
few axes       Element-wise calls see views with as few axes as memory allows: `_fused`.
one object     Views of the same memory are one array: where a call writes over its operand, NumPy
               need not find out how the two overlap (1.08 at a batch of one).
sums           A sum over the last axis is a product with ones. A small sum takes an (n, n) matrix
               of ones: its n result rows are equal, and later calls need no broadcast (1.08 at 1).
look-ups       The gradient of a small table is a product with a one-hot matrix (1.05 at 1, 1.1 at
               64).
copies         A result that is only copied is computed in its place: `without_copies` (1.06 at 1).
numbers        What is scaled by two numbers of a run is scaled once: `scaled` (1.01 at 1).
memory         Results share memory when their lives do not overlap: `placed`.

In brackets: how many times as long a step of the default model takes without it, in float64, at
that number of documents.

What a list cannot repeat is refused with a RecordingError that names the line of the text: a
decision that depends on the numbers in an array, or an operation that is not known here.
"""

from __future__ import annotations

import operator
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from microgpt.errors import MicrogptError
from vectorized.model import Array

Ints = tuple[int, ...]

EQUAL_ROWS = 8192  # multiplications up to which a sum is computed as n equal rows
ONE_HOT = 512  # rows of a table up to which its gradient is a product
ALIGN = 64  # bytes of a cache line

# How the list calls these operations. A method of an array is faster than NumPy's function.
BOUND: dict[Any, Callable[..., tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "dot": lambda a, b, out: (a.dot, (b, out)),
    "matmul": lambda a, b, out: (np.matmul, (a, b, out)),
    "sum": lambda x, out: (np.add.reduce, (x, 0, None, out)),
    "max": lambda x, out: (np.maximum.reduce, (x, 0, None, out)),
    np.maximum: lambda x, y, out: (partial(np.maximum, out=out), (x, y)),  # positional: deprecated
    np.minimum: lambda x, y, out: (partial(np.minimum, out=out), (x, y)),
    "take": lambda table, at, out: (table.take, (at, 0, out, "clip")),  # "clip" spares a copy
    "put": lambda at, values, out: (out.__setitem__, (at, values)),
    "add_at": lambda at, rows, out: (np.add.at, (out, at, rows)),
    "copy": lambda x, out: (out.__setitem__, (..., x)),
    "fill": lambda value, out: (out.fill, (value,)),
}
# How these powers are computed.
POWERS: dict[Any, list[np.ufunc]] = {2: [np.square], 0.5: [np.sqrt], -0.5: [np.sqrt, np.reciprocal]}
# What they are called in `operator`, for numbers that are no arrays.
PLAIN = {"add": "add", "subtract": "sub", "multiply": "mul", "divide": "truediv", "power": "pow"}


class RecordingError(MicrogptError):
    """The text does something that a list of calls cannot repeat."""


class Line(NamedTuple):
    """A line of the text."""

    file: str
    number: int


class Buffer:
    """The memory of a result, which gets its place when the recording ends; or the caller's."""

    __slots__ = ("array", "end", "find", "home", "offset", "rows", "writes")

    def __init__(self, array: Array, home: Array | None = None) -> None:
        self.array = array  # of a result: as large as its memory, and never touched
        self.home = home  # the caller's array, if this memory is the caller's
        self.offset = self.end = 0  # of a result, in the block of memory
        self.rows: Array | None = None  # the view (.., n) if all n are equal and count as one
        self.find: Callable[[], float] | None = None  # what it holds, if that is a Number
        self.writes = 0  # so far


class Call:
    """One call of the list. Of its operands, the last is written."""

    __slots__ = ("elementwise", "ends", "f", "inputs", "line", "operands", "out", "part")

    def __init__(self, f: Any, operands: Sequence[Traced], line: Line, part: int) -> None:
        self.f = f  # a ufunc, or a name in BOUND
        self.operands = operands
        *self.inputs, self.out = operands
        self.ends: set[Buffer] = set()  # results that are used here for the last time
        self.line = line
        self.part = part  # of the list
        self.elementwise = isinstance(f, np.ufunc) or f == "copy"


class Number(NDArrayOperatorsMixin):
    """A plain number that differs from run to run: a learning rate, a bias correction."""

    def __init__(self, find: Callable[[], float]) -> None:
        self.find = find

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        x, y = inputs if ufunc.__name__ in PLAIN else self._decision()
        f = getattr(operator, PLAIN[ufunc.__name__])
        if isinstance(x, Traced) or isinstance(y, Traced):
            return NotImplemented
        if not isinstance(y, Number):
            return Number(lambda: f(x.find(), y))
        if not isinstance(x, Number):
            return Number(lambda: f(x, y.find()))
        return Number(lambda: f(x.find(), y.find()))

    def _decision(self) -> Any:
        raise refusal("a decision that depends on a number of one run")

    __bool__ = __float__ = __int__ = __index__ = _decision


class Traced(NDArrayOperatorsMixin):
    """An array of the text while it is recorded."""

    __slots__ = ("buffer", "dtype", "ndim", "recorder", "scaled", "shape", "view")

    def __init__(self, recorder: Recorder, view: Array, buffer: Buffer) -> None:
        self.recorder = recorder
        self.view = view  # of the buffer's array
        self.buffer = buffer
        self.shape, self.ndim, self.dtype = view.shape, view.ndim, view.dtype
        self.scaled: Any = None  # (x, n, x's writes) of what has been computed as x times Number n

    @property
    def whole(self) -> bool:
        """Whether this is all of a buffer."""
        return self.view.nbytes == self.buffer.array.nbytes

    @property
    def start(self) -> int:
        """Where in its memory it begins, in bytes."""
        return 0 if self.whole else address(self.view) - address(self.buffer.array)

    @property
    def rows(self) -> Array | None:
        """Of an array (.., 1) whose numbers have been computed n times, the view (.., n)."""
        rows = self.buffer.rows
        return rows if rows is not None and (*rows.shape[:-1], 1) == self.shape else None

    @property
    def T(self) -> Traced:  # noqa: N802, as arrays have it
        return self.like(self.view.T)

    @property
    def flat(self) -> Traced:
        """All elements in one axis: (N,)"""
        return self.reshaped(self.view, (-1,))

    @property
    def matrix(self) -> Traced:
        """The last axis as rows and all others as columns: (n, N)"""
        last = self.ndim - 1
        return self.reshaped(self.view.transpose(last, *range(last)), (self.shape[-1], -1))

    def like(self, view: Array) -> Traced:
        """Another view of the same memory."""
        return Traced(self.recorder, view, self.buffer)

    def reshaped(self, view: Array, shape: Sequence[int]) -> Traced:
        """A view of the same memory in another shape."""
        out = view.reshape(shape)
        if out.base is not (view if view.base is None else view.base):  # it is a copy
            raise refusal("this operation on an array that lies in this order")
        return self.like(out)

    def reshape(self, *shape: int) -> Traced:
        return self.reshaped(self.view, shape)

    def sum(self, axis: int | None = None, keepdims: bool = False) -> Traced:
        return self.recorder.reduced(self, "sum", axis, keepdims)

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
            raise refusal(f"numpy.{ufunc.__name__} with these arguments")
        if ufunc is np.matmul:
            return self.recorder.matmul(*inputs)
        return self.recorder.elementwise(ufunc, inputs, out)

    def __array_function__(self, f: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if f is np.einsum and len(args) == 3 and not kwargs:
            return self.recorder.einsum(*args)
        if f is np.zeros_like and not kwargs:
            zeros = self.recorder.new(args[0].shape, range(args[0].ndim))
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
        if any(isinstance(k, Traced) for k in keys):
            return self.recorder.gather(self, keys)
        part = self.like(self.view[key])
        if min(part.view.strides, default=0) < 0:
            raise refusal("an array in reverse order")
        return part

    def __setitem__(self, key: Any, value: Any) -> None:
        keys = key if isinstance(key, tuple) else (key,)
        if any(isinstance(k, Traced) for k in keys):
            memory, index = self.recorder.numbers_at(self, keys)
            self.recorder.emit("put", index, value.flat, memory)
        else:
            self.recorder.emit("copy", self.recorder.operand(value), self.like(self.view[key]))


class Recorder:
    """Writes down what the text does with arrays of one precision."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.calls: list[Call] = []
        self.part = 0
        self.known: dict[Any, Any] = {}  # constants and flat indices

    def hold(self, array: Array) -> Any:
        """An array that exists, for the text to work on: parameters, tokens."""
        return Traced(self, array, Buffer(array, array))

    def mark(self) -> None:
        """Begin another part of the list, which is run by itself."""
        self.part += 1

    def put(self, result: Any, place: Array) -> None:
        """Let a result lie in an existing array."""
        self.hold(place)[...] = result

    def recording(self) -> Recording:
        """What has been written down."""
        calls, nbytes = placed(without_copies(self.calls))
        parts = [[call for call in calls if call.part == part] for part in range(self.part + 1)]
        self.calls, self.known = [], {}  # no circles of references
        numbers = [(x.buffer.home, x.buffer.find) for call in calls for x in call.inputs]
        return Recording(parts, nbytes, [(home, find) for home, find in numbers if find])

    def emit(self, f: Any, *operands: Any) -> None:
        """Write down a call. The last operand is written."""
        self.calls.append(Call(f, operands, _line(), self.part))
        operands[-1].buffer.writes += 1
        if operands[-1].buffer.rows is not None:
            raise refusal("writing into a sum, or into what was computed from it,")

    def new(self, shape: Sequence[int], order: Sequence[int] = (), dtype: Any = None) -> Traced:
        """A result. order: its axes, the slowest first; without one, the last lies slowest."""
        n = len(shape)
        order = tuple(order) or (n - 1, *range(n - 1))[:n]
        array = np.empty([shape[axis] for axis in order], dtype or self.dtype)
        return Traced(
            self, array.transpose([order.index(axis) for axis in range(n)]), Buffer(array)
        )

    def constant(self, key: Any, value: Callable[[], Any]) -> Traced:
        """An array that is made once."""
        if key not in self.known:
            self.known[key] = self.hold(np.asarray(value(), self.dtype))
        return self.known[key]

    # --- element by element

    def elementwise(self, ufunc: Any, inputs: Sequence[Any], out: Traced | None) -> Traced:
        """A ufunc, or what does the same in less time."""
        x, y = inputs[0], inputs[-1]
        plain = isinstance(y, (int, float))
        if ufunc is np.divide and (plain or isinstance(y, Number)):
            ufunc, y = np.multiply, 1 / y
            inputs = (x, y)
        elif ufunc is np.power and plain and y in POWERS:
            *first, ufunc = POWERS[y]
            for root in first:
                x = self.apply(root, [x])
            inputs = (x,)
        if ufunc is np.multiply and out is None and isinstance(y, Number):
            return self.scaled(x, y)
        if ufunc is np.multiply and out is None and isinstance(x, Number):
            return self.scaled(y, x)
        return self.apply(ufunc, inputs, out)

    def scaled(self, x: Traced, number: Any) -> Traced:
        """x times a number; of y times another number, y times both."""
        if x.scaled and (x.buffer.writes, x.scaled[0].buffer.writes) == (1, x.scaled[2]):
            x, number = x.scaled[0], x.scaled[1] * number
        out = self.apply(np.multiply, (x, number))
        out.scaled = x, number, x.buffer.writes
        return out

    def apply(self, f: Any, inputs: Sequence[Any], out: Traced | None = None) -> Traced:
        """One call of a ufunc, on equal rows if all arrays have them or if that is the shape."""
        operands = [self.operand(x) for x in inputs]
        every = [x.rows for x in operands if x.ndim]
        wide = {rows.shape for rows in every if rows is not None}
        as_rows = out is None and len(wide) == 1 and not any(rows is None for rows in every)
        (shape,) = wide if as_rows else [_broadcast(*[x.shape for x in operands])]
        if shape in wide:
            operands = [
                x if x.rows is None or x.rows.shape != shape else x.like(x.rows) for x in operands
            ]
        if out is not None:
            self.emit(f, *operands, out)
            return out
        alike = [x.view for x in operands if x.shape == shape]
        if not alike or (len(shape) > 2 and alike[0].flags.c_contiguous):  # rows of a table
            out = self.new(shape)
        else:
            view = np.empty_like(alike[0], self.dtype)
            out = Traced(self, view, Buffer(view))
        self.emit(f, *operands, out)
        return self.as_one(out) if as_rows else out

    def as_one(self, rows: Traced) -> Traced:
        """The array (.., 1) of numbers that have been computed n times."""
        rows.buffer.rows = rows.view
        return rows.like(rows.view[..., :1])

    def operand(self, x: Any) -> Traced:
        """What a call is given."""
        if isinstance(x, Traced):
            return x
        if isinstance(x, Number):
            number: Traced = self.hold(np.empty((), self.dtype))
            number.buffer.find = x.find
            return number
        if isinstance(x, np.ndarray):
            return self.hold(np.asarray(x, self.dtype, order="C"))
        return self.constant(("number", x), lambda: x)

    # --- sums, maxima, products

    def reduced(
        self, x: Traced, f: str, axis: int | None, keepdims: bool, weight: float = 1.0
    ) -> Traced:
        """The sum times a weight, or the maximum: over the last axis, or the sum over the first."""
        if (f, axis, keepdims, weight) == ("sum", 0, False, 1.0):
            out = self.new(x.shape[1:], range(x.ndim - 1))
            self.emit(*("sum", x) if len(x) > 1 else ("copy", x[0]), out)
            return out
        if axis != -1 or not keepdims:
            raise refusal(f"a {f} over this axis")
        n, N = x.matrix.shape
        if f == "sum" and n * n * N <= EQUAL_ROWS:
            ones = self.constant(("rows", n, weight), lambda: np.full((n, n), weight))
            out = self.new(x.shape)
            self.emit("dot", ones, x.matrix, out.matrix)
            return self.as_one(out)
        out = self.new((*x.shape[:-1], 1))
        if f == "sum":
            ones = self.constant(("ones", n, weight), lambda: np.full(n, weight))
            self.emit("dot", ones, x.matrix, out.flat)
        else:
            self.emit("max", x.matrix, out.flat)
        return out

    def matmul(self, x: Any, w: Any) -> Traced:
        """x @ w, computed as w^T . x^T: (.., k), (k, n) -> (.., n)"""
        if not isinstance(x, Traced) or not isinstance(w, Traced) or w.ndim != 2 or x.ndim < 2:
            raise refusal("this product")
        out = self.new((*x.shape[:-1], w.shape[1]))
        self.emit("dot", w.T, x.matrix, out.matrix)
        return out

    def einsum(self, letters: str, a: Traced, b: Traced) -> Traced:
        """One matrix product for each value of the indices that a, b and the result share.

        b, t and u are documents and positions and lie fastest; where t looks at u, u lies slowest.
        """
        of_a, of_b, to = letters.replace("->", ",").split(",")
        size = {**dict(zip(of_a, a.shape)), **dict(zip(of_b, b.shape))}
        every = [x for x in to if x in of_a and x in of_b]
        summed = [x for x in of_a if x in of_b and x not in to]
        rows, columns = ([x for x in to if x in of and x not in every] for of in (of_a, of_b))
        if {*of_a, *of_b} != {*every, *summed, *rows, *columns}:
            raise refusal(f"numpy.einsum({letters!r})")
        order = sorted(to, key="u".__ne__ if "t" in to and "u" in to else "btu".__contains__)
        out = self.new([size[x] for x in to], [to.index(x) for x in order])
        if not to:
            self.emit("dot", a.flat, b.flat, out)
            return out

        def matrices(x: Traced, of: str, left: list[str], right: list[str]) -> Traced:
            view = x.view.transpose([of.index(letter) for letter in every + left + right])
            sizes = (prod(size[letter] for letter in side) for side in (left, right))
            return x.reshaped(view, (*(size[letter] for letter in every), *sizes))

        if order[-1] in rows:  # what lies fastest in the result are its columns
            a, b, of_a, of_b, rows, columns = b, a, of_b, of_a, columns, rows
        left, right = matrices(a, of_a, rows, summed), matrices(b, of_b, summed, columns)
        self.emit("matmul" if every else "dot", left, right, matrices(out, to, rows, columns))
        return out

    # --- look-ups

    def gather(self, x: Traced, keys: tuple[Any, ...]) -> Traced:
        """x[keys]: a row of a table for every position, or one number for each."""
        index = keys[-1]
        if len(keys) > 1:
            out = self.new(index.shape, range(index.ndim))
            self.emit("take", *self.numbers_at(x, keys), out.flat)
        else:
            out = self.new((*index.shape, x.shape[1]), range(index.ndim + 1))
            self.emit("take", x, index.flat, out.reshape(-1, x.shape[1]))
        return out

    def numbers_at(self, x: Traced, keys: tuple[Any, ...]) -> tuple[Traced, Traced]:
        """The memory of x, and where x[keys] are in it: the sum of keys times strides."""
        *rest, index = keys
        if not x.whole or len(keys) < x.ndim or any(isinstance(k, Traced) for k in rest):
            raise refusal("this index")
        *strides, last = (stride // x.view.itemsize for stride in x.view.strides)
        first = np.ravel(sum(k * stride for k, stride in zip(rest, strides)))
        place = index.buffer, index.start, index.shape, index.view.strides
        if (key := (place, last, first.tobytes())) not in self.known:
            self.known[key] = out = self.new((index.view.size,), dtype=np.intp)
            self.emit(np.multiply, index.flat, self.hold(np.array(last)), out)
            self.emit(np.add, out, self.hold(first), out)
        return x.like(x.buffer.array.ravel("K")), self.known[key]

    def add_at(self, table: Traced, index: Traced, values: Traced) -> None:
        """np.add.at(table, index, values), a row for every position"""
        if not all(isinstance(x, Traced) for x in (table, index, values)):
            raise refusal("np.add.at into an array that is not like another (np.zeros_like)")
        rows, n = values.matrix.T, len(table)  # (N, C)
        if n > ONE_HOT:
            self.emit("add_at", index.flat, rows, table)
            return
        eye = self.constant(("eye", n), lambda: np.eye(n))
        one_hot, sums = self.new((len(rows), n), (0, 1)), self.new(table.shape, (0, 1))
        if (zeros := self.calls[-1]).f == "fill" and zeros.out is table:
            self.calls.pop()
            sums = table
        self.emit("take", eye, index.flat, one_hot)
        self.emit("dot", one_hot.T, rows, sums)
        if sums is not table:
            self.emit(np.add, table, sums, table)


def without_copies(calls: list[Call]) -> list[Call]:
    """Let the results that are only copied lie where the copies would.

    In `p[:] = a * p + y` the sum lies in p, and so does the product: an element-wise call may write
    over its operands.
    """
    uses: dict[Any, list[int]] = defaultdict(list)  # the calls that use some memory
    for i, call in enumerate(calls):
        for x in call.operands:
            uses[_memory(x)].append(i)
    kept = []
    for i, call in reversed(list(enumerate(calls))):
        place, home = call.out, call.out.buffer.home
        for x in call.inputs if call.elementwise and home is not None else ():
            first, in_use = uses[_memory(x)][0], uses[id(home)]
            since = first + 1 if calls[first].elementwise else first
            if (
                x.buffer.home is None
                and _alike(x, place)
                and uses[x.buffer][-1] == i
                and not any(since <= j < i for j in in_use)
                and not any(_memory(y) == id(home) for y in call.inputs)
            ):
                in_use += uses[x.buffer]
                x.buffer.home = home
                if call.f != "copy":
                    kept.append(call)
                break
        else:
            kept.append(call)
    return kept[::-1]


def _memory(x: Traced) -> Any:
    """The same for all arrays in the same memory."""
    return x.buffer if x.buffer.home is None else id(x.buffer.home)


def _alike(x: Traced, y: Traced) -> bool:
    """Whether both are all of their memory, in the same order."""
    if x.shape != y.shape or not x.whole or not y.whole:
        return False
    form = zip(x.shape, x.view.strides, y.view.strides)
    return x.view.strides == y.view.strides or all(n == 1 or i == j for n, i, j in form)


def placed(calls: list[Call]) -> tuple[list[Call], int]:
    """Give every result its place in one block of memory. Returns the calls whose results are
    read, or lie where the caller wants them, and the bytes of the block.

    A place is free again after the last call that uses it. An element-wise call writes to the place
    of an operand that no later call reads.
    """
    kept: list[Call] = []
    later: set[Buffer] = set()  # results that later calls use
    for call in reversed(calls):
        if call.out.buffer.home is not None or call.out.buffer in later:
            call.ends = {x.buffer for x in call.operands if x.buffer.home is None} - later
            later |= call.ends
            kept.insert(0, call)
    taken: list[Buffer] = []  # the results in use, as they lie
    nbytes = 0
    for call in kept:
        out = call.out.buffer
        if out.home is None and not out.end:
            over = [x for x in call.inputs if call.elementwise and x.buffer in call.ends]
            over = [x for x in over if _alike(x, call.out)]
            if over:
                out.offset, out.end = over[0].buffer.offset, over[0].buffer.end
                taken[taken.index(over[0].buffer)] = out
            else:
                start, at, size = 0, 0, out.array.nbytes
                while at < len(taken) and start + size > taken[at].offset:
                    start, at = taken[at].end, at + 1
                out.offset, out.end = start, start + size + -size % ALIGN
                taken.insert(at, out)
                nbytes = max(nbytes, out.end)
        if call.ends:
            taken = [buffer for buffer in taken if buffer not in call.ends]
    return kept, nbytes


class Recording:
    """A list of calls in parts, which can be run over and over."""

    def __init__(
        self,
        parts: list[list[Call]],
        nbytes: int,
        numbers: list[tuple[Any, Callable[[], float]]],
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
    forms = [(x.shape, x.view.strides) for x in call.operands]
    if call.elementwise:
        forms = _fused(tuple(forms))
    views = []
    for x, (shape, strides) in zip(call.operands, forms):
        memory = block if x.buffer.home is None else x.buffer.home
        start = x.buffer.offset + x.start
        key = id(memory), start, shape, strides, x.dtype
        if (view := known.get(key)) is None:
            view = known[key] = np.ndarray(shape, x.dtype, memory, start, strides)
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


def address(array: Array) -> int:
    """Where an array begins in memory."""
    return array.__array_interface__["data"][0]


def refusal(what: str) -> RecordingError:
    """The error for something that a list of calls cannot repeat."""
    return RecordingError(f"{':'.join(map(str, _line()))}: {what} cannot be recorded")


def _line() -> Line:
    """The line of the text that is running."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename in INSIDE and frame.f_back is not None:
        frame = frame.f_back
    return Line(frame.f_code.co_filename, frame.f_lineno)


INSIDE = (__file__, sys.modules[NDArrayOperatorsMixin.__module__].__file__)


@lru_cache(maxsize=1024)
def _broadcast(*shapes: Ints) -> Ints:
    return np.broadcast_shapes(*shapes)
