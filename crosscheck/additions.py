"""Every `child.grad += ..` of scalar's backward pass to chosen elements, with the tap behind it.

The derivative of a number is a sum, with one term for every operation that uses the number. scalar
adds one term at a time; this module keeps the terms, and the name of the tap that each comes from.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from crosscheck.trace import Array
from microgpt.layout import pick
from microgpt.taps import axes_of, taps
from scalar.backend import Backend
from scalar.value import Value

Index = tuple[int, ...]
ALL = -1  # in an index: every element along that axis


class Place(NamedTuple):
    """An element of a tap or parameter, or all elements along an axis."""

    name: str
    at: Index

    def written(self, token: Callable[[int], str], layer: str = "") -> str:
        """The element with a letter for each axis but B (there is one document): wte[v=4 (e), c=8].

        token    gives the text of a token id
        layer    a prefix of the name, which is left out
        """
        shown = []
        for axis, i in zip(axes_of(self.name), self.at):
            letter = "t" if axis == "block_size" else axis.lower()
            number = ":" if i == ALL else f"{i} ({token(i)})" if axis == "V" else str(i)
            shown += [f"{letter}={number}"] * (axis != "B")
        name = self.name.removeprefix(layer)
        return f"{name}[{', '.join(shown)}]" if shown else name


# the elements of the next tap that a value goes into, each with the element's slope by the value
Towards = Mapping[Place, float]


@dataclass(frozen=True)
class Addition:
    """One `child.grad += local_grad * value.grad`."""

    towards: Towards
    value_grad: float
    local_grad: float
    factor: Place | None  # the other factor, where `value` is a product: it equals local_grad

    @property
    def source(self) -> Place:
        """The element that `value` goes into; if there are several, ALL stands for their axis."""
        first, *others = self.towards
        return Place(
            first.name,
            tuple(
                i if all(other.at[n] == i for other in others) else ALL
                for n, i in enumerate(first.at)
            ),
        )

    @property
    def share(self) -> float | None:
        """value_grad divided by the source's gradient; None if the source is several elements."""
        return next(iter(self.towards.values())) if len(self.towards) == 1 else None

    @property
    def product(self) -> float:
        """The number that is added."""
        return self.local_grad * self.value_grad


@contextmanager
def no_search_for_cycles() -> Iterator[None]:
    """Within this context, Python does not search for cycles of objects: scalar's graph has none,
    and the search takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Edge(NamedTuple):
    """The i-th operand of a value, with the local derivative."""

    child: Value
    value: Value
    i: int
    local: float
    towards: Towards


class Additions:
    """What scalar's backward pass, which this class runs, adds to chosen elements.

    followed     the elements of which every addition is kept
    several      the tensors with several consumers: what each consumer adds in all is kept

    one          by followed element, its additions in the order of the backward pass
    parts        by tensor and consumer, the sum of the additions
    """

    def __init__(
        self, backend: Backend, followed: Collection[Place], several: Collection[str]
    ) -> None:
        self.backend, self.followed, self.several = backend, followed, several
        self.places = dict(_named(backend))
        edges = self._edges()  # before the backward pass, which forgets the local derivatives
        backend.backward()
        self.one: dict[Place, list[Addition]] = defaultdict(list)
        self.parts: dict[str, dict[str, Array]] = defaultdict(dict)
        for edge in edges:
            self._keep(edge)

    def _edges(self) -> list[_Edge]:
        """The uses of the chosen elements, in the order of the backward pass."""
        known = set(self.places)
        wanted = {
            value
            for value, place in self.places.items()
            if place.name in self.several or place in self.followed
        }
        towards: dict[Value, dict[Place, float]] = defaultdict(dict)
        edges: list[_Edge] = []
        for value in self.backend.loss._topological_order()[::-1]:
            children, local_grads = value._children, value._local_grads or ()
            place = self.places.get(value)
            own = {place: 1.0} if place else towards[value]
            if not wanted.isdisjoint(children):
                pairs = enumerate(zip(children, local_grads))
                edges += [_Edge(x, value, i, local, own) for i, (x, local) in pairs if x in wanted]
            if not known.issuperset(children):
                for child, local in zip(children, local_grads):
                    if child not in known:
                        for at, slope in own.items():
                            before = towards[child].get(at, 0.0)
                            towards[child][at] = before + slope * local
        return edges

    def _keep(self, edge: _Edge) -> None:
        """Keep the term of an edge: in the part of its consumer, and as an addition if followed."""
        child, value, i, local, towards = edge
        place, source = self.places[child], next(iter(towards)).name
        if place.name in self.several:
            parts = self.parts[place.name]
            if source not in parts:
                parts[source] = np.zeros(self._shape(place.name))
            parts[source][place.at] += local * value.grad
        if place in self.followed:
            # the other factor, also in dot(x, y), whose children are all of x and then all of y
            partner = value._children[i - len(value._children) // 2]
            factor = self.places.get(partner) if partner.data == local else None
            self.one[place].append(Addition(towards, value.grad, local, factor))

    def _shape(self, name: str) -> tuple[int, ...]:
        indices = [place.at for place in self.places.values() if place.name == name]
        return tuple(1 + max(axis) for axis in zip(*indices))


def _named(backend: Backend) -> Iterator[tuple[Value, Place]]:
    """Every value that is an element of a tap or parameter, with its place."""
    *names, last = taps(backend.config)
    for b, doc_taps in enumerate(backend.doc_taps):
        for t, tap in enumerate(doc_taps):
            for name in names:
                for value, index in _elements(pick(tap, name), ()):
                    at = (b, index[0], t, index[1]) if "U" in axes_of(name) else (b, t, *index)
                    yield value, Place(name, at)
    yield backend.loss, Place(last, ())
    for name, matrix in backend.matrices.items():
        for weight, index in _elements(matrix, ()):
            yield weight, Place(name, index)


def _elements(nested: Any, index: Index) -> Iterator[tuple[Value, Index]]:
    if isinstance(nested, Value):
        yield nested, index
    else:
        for i, inner in enumerate(nested):
            yield from _elements(inner, (*index, i))
