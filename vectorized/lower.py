"""From the calls that were written down to the calls that run.

products     q, k and v are one product, and so are their gradients: `merged` (1.04 at 1, 1.02 at
             64).
places       Results share memory when their lives do not overlap. A result that is only copied is
             computed where the copy would lie (1.06 at 1): `placed`.
few axes     Element-wise calls get views with as few axes as memory allows: `_fused`.
one object   Equal views of the same memory are one array object, so that NumPy need not find out
             how they overlap when a call writes over its operand (1.08 at a batch of one).

In brackets: how many times as long a step of the default model takes without it, in float64, at
that number of documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vectorized.model import Array

if TYPE_CHECKING:
    from vectorized.record import Traced

Ints = tuple[int, ...]
Line = tuple[str, int]  # a line of the text: its file and number
Varying = tuple[Array, Callable[[], float]]  # a number, where it lies, found anew for every run
Run = tuple[Callable[..., Any], tuple[Any, ...]]  # a function and its arguments

NEAR = 4  # calls back, in which a product is looked for that can be merged
ALIGN = 64  # bytes of a cache line

# How the list calls these operations. A method of an array is faster than NumPy's function.
BOUND: dict[Any, Callable[..., Run]] = {
    "dot": lambda a, b, out: (a.dot, (b, out)),
    "matmul": lambda a, b, out: (np.matmul, (a, b, out)),
    "max": lambda x, out: (np.maximum.reduce, (x, 0, None, out)),
    np.maximum: lambda x, y, out: (
        partial(np.maximum, out=out),
        (x, y),
    ),  # out by position is deprecated
    "take": lambda table, at, out: (table.take, (at, 0, out, "clip")),  # "clip" spares a copy
    "put": lambda at, values, out: (out.__setitem__, (at, values)),
    "add_at": lambda at, rows, out: (np.add.at, (out, at, rows)),
    "copy": lambda x, out: (out.__setitem__, (..., x)),
    "fill": lambda value, out: (out.fill, (value,)),
}


@dataclass(eq=False, slots=True)
class Place:
    """Where results lie: in an array that exists, or else in the block of memory."""

    nbytes: int
    home: Array | None = None  # the array that exists, if it is one
    offset: int = 0  # bytes from the beginning of that, or of the block
    end: int = 0  # in the block, where the next may begin: 0 as long as that is not known
    uses: list[int] = field(default_factory=list)  # numbers of the calls that use it


@dataclass(eq=False, slots=True)
class Buffer:
    """The memory of a result, or of an array of the caller."""

    array: Array  # of a result: all of one form share it, for its shape and strides
    place: Place  # that of a result is found when the recording ends
    shift: int = 0  # bytes from the beginning of the place
    fixed: bool = False  # whether its numbers are the same in every run
    rows: Any = None  # if each number was computed n times: the view (.., n) of all of them


class Call:
    """One call of the list. Its last operand is its result."""

    def __init__(self, f: Any, operands: Sequence[Traced], line: Line, part: int) -> None:
        self.f = f  # a ufunc, or a name in BOUND
        self.operands = operands
        *self.inputs, self.out = operands
        self.line = line
        self.part = part  # of the list
        self.elementwise = isinstance(f, np.ufunc) or f == "copy"


def lowered(
    calls: list[Call], parts: int, numbers: list[Varying], memory: Callable[[int], Array]
) -> Recording:
    """The list of calls as it is run, in memory(bytes)."""
    calls, nbytes = placed(merged(calls))
    by_part = [[call for call in calls if call.part == part] for part in range(parts)]
    block = memory(nbytes)
    views: dict[Any, Array] = {}  # NumPy is faster where input and output are one object
    return Recording(
        [[bound(call, block, views) for call in part] for part in by_part],
        [[(getattr(c.f, "__name__", c.f), c.line) for c in part] for part in by_part],
        numbers,
    )


def merged(calls: list[Call]) -> list[Call]:
    """Products that share an operand, or are added, as one product.

    Their matrices must lie one behind the other, or be results, which can be laid there.

    wq . x, wk . x, wv . x             -> (wq, wk, wv) . x
    dq . x^T, dk . x^T, dv . x^T       -> (dq, dk, dv) . x^T
    wq^T . dq + wk^T . dk + wv^T . dv  -> (wq, wk, wv)^T . (dq, dk, dv)
    """
    reads = Counter(x.buffer for call in calls for x in call.inputs)
    kept: list[Call] = []
    for call in calls:
        operands: Any = ()  # of this call and the products of `terms`, as one product
        if call.f == "dot" or call.f is np.add:
            near = [c for c in kept[-NEAR:] if c.f == "dot" and c.part == call.part]
        if call.f == "dot":
            left, right, out = call.operands
            terms = [c for c in near if c.inputs[1].buffer is right.buffer][-1:]
            if terms and terms[0].inputs[1].form == right.form and can_wait(terms, kept, call):
                both = stacked((terms[0].inputs[0], left), (terms[0].out, out))
                operands = both and (both[0], right, both[1])
        elif call.f is np.add:
            once = [x.buffer for x in call.inputs if reads[x.buffer] == 1 and alike(x, call.out)]
            terms = [c for x in once for c in near if c.out.buffer is x and x.place.home is None]
            # the second is moved: had it been merged before, a part of it would be left behind
            if len(terms) == 2 and terms[1] in calls and can_wait(terms, kept, call):
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
    """Whether products can be made later, together with a call: nothing in between reads their
    results or changes their operands, and the call reads the results only to add them."""
    for term in terms:
        after = [*kept[kept.index(term) + 1 :], call]
        places = [x.buffer.place for x in term.operands]
        readers = after if call.f == "dot" else after[:-1]  # an addition reads them
        read = [x.buffer.place for c in readers for x in c.inputs]
        if places[-1] in read or any(c.out.buffer.place in places for c in after):
            return False
    return True


def stacked(*pairs: tuple[Traced, Traced]) -> list[Traced]:
    """Each pair of matrices as one, the first above the second; empty if one pair cannot be.

    The second is moved into the place of the first.
    """
    places, others = ({x.buffer.place for x in pair} for pair in pairs)
    if places & others:
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
        both.append(type(x)(x.recorder, array, Buffer(array, place, start)))
    return both


def placed(calls: list[Call]) -> tuple[list[Call], int]:
    """The calls that remain, their results each at its place in one block, and the block's bytes.

    Goes from the last call to the first: a result takes a place at the last call that reads it, and
    leaves the place at the first that writes it. An operand takes the place of the result where
    that is possible, and a copy is then left out. So is a call whose result no later call reads.
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
                x.buffer.place = out
                out.uses += own.uses
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
            taken.remove(out)
    return kept[::-1], nbytes


def fits_over(x: Traced, i: int, calls: list[Call]) -> bool:
    """Whether operand x of call i can lie where the result of call i will lie."""
    call = calls[i]
    if not (call.elementwise and alike(x, call.out)):
        return False
    first = x.buffer.place.uses[0]
    if call.out.buffer.place.home is not None and calls[first].part != call.part:
        return False
    since = first + calls[first].elementwise  # an element-wise call may write over its operands
    uses = call.out.buffer.place.uses  # i once: this call does not read what lies there
    return [j for j in uses if since <= j <= i] == [i]


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
    numbers: list[Varying]

    @property
    def size(self) -> int:
        """How many calls it has."""
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
        start = place.offset + x.buffer.shift + x.offset
        key = id(memory), start, shape, strides, x.dtype
        if (view := views.get(key)) is None:
            view = views[key] = np.ndarray(shape, x.dtype, memory, start, strides)
        arguments.append(view)
    return BOUND[call.f](*arguments) if call.f in BOUND else (call.f, tuple(arguments))


@lru_cache(maxsize=4096)
def _fused(forms: tuple[tuple[Ints, Ints], ...]) -> list[tuple[Ints, Ints]]:
    """Shapes and strides of the same elements with as few axes as possible, the slowest first."""
    shape, out = forms[-1]
    strides = []  # of every operand as if it had all axes of the result, 0 where it is broadcast
    for own_shape, own in forms:
        own = tuple(0 if n == 1 else stride for n, stride in zip(own_shape, own))
        strides.append(((0,) * len(shape) + own)[len(own) :])  # axes of length 1 left out or added
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
    return [(tuple(sizes), own) for own in zip(*steps)] or [((), ())] * len(forms)
