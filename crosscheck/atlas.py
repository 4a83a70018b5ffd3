"""The atlas: every intermediate of one document, in both implementations, forward and backward.

What is shown is what ran: the lines come from the sources, the numbers from both backends, and the
parts of a derivative from the additions that scalar's backward pass makes in its own graph.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from crosscheck.cases import Case
from crosscheck.explain import expression
from crosscheck.report import axes as axis_names
from crosscheck.sides import IncompleteError
from crosscheck.trace import Array, Pair, Step, real, suited, trace_step
from microgpt.backend import State, Tensors, fresh_state, load_backend
from microgpt.config import Config
from microgpt.data import IN_PYTHON, TEXTS_ARE_GONE, digest, load_documents, nth, parts
from microgpt.errors import MicrogptError
from microgpt.init import init_params
from microgpt.layout import pick
from microgpt.pages.page import render
from microgpt.pages.pictures import heat
from microgpt.pages.sources import Line, Row, Source, side_by_side, upside_down
from microgpt.runs.checkpoint import load_checkpoint, not_finite
from microgpt.settings import DEFAULT_PRESET, load_config
from microgpt.taps import Tap, axes_of, consumers, params, taps
from microgpt.tokenizer import Tokenizer, build_tokenizer
from microgpt.train import batch, learning_rate
from scalar.backend import Backend as Scalar
from scalar.value import Value

TEXT = "emma"
MOST = 1_000_000  # products in scalar's graph: weights times positions
SHOWN = 16  # additions of a derivative that are listed
NUMBERS = 12_000  # numbers of all taps that are written out, twice; of more, the first rows
LETTERS = {  # what an axis counts: one, and several
    "B": ("document", "documents"),
    "T": ("position", "positions"),
    "U": ("position looked at", "positions looked at"),
    "C": ("channel", "channels"),
    "H": ("head", "heads"),
    "F": ("channel of the MLP", "channels of the MLP"),
    "V": ("token of the vocabulary", "tokens of the vocabulary"),
    "block_size": ("position of the context", "positions of the context"),
}

Index = tuple[int, ...]


@dataclass(frozen=True)
class Addition:
    """One += of scalar's backward pass."""

    local: float
    factor: str  # what the local derivative is: the other factor, where there is one
    grad: float
    towards: str  # the element that the value it came through is a part of
    looks: str  # who looks at whom there, if it is attention
    total: float  # after it

    @property
    def product(self) -> float:
        """What it adds."""
        return self.local * self.grad


@dataclass(frozen=True)
class Picture:
    """A matrix, or one of several side by side."""

    image: str
    width: int  # pixels
    height: int
    rows: Sequence[str]
    columns: Sequence[str]
    title: str = ""


@dataclass(frozen=True)
class View:
    """A tensor as one implementation has it."""

    code: str  # what to type to see it
    pictures: list[Picture]
    numbers: str


@dataclass(frozen=True)
class Snippet:
    """Lines of a source."""

    path: str
    lines: list[Line]


@dataclass(frozen=True)
class Part:
    """What one consumer contributes to a derivative."""

    name: str
    pictures: list[Picture]
    count: int  # additions to the element that is followed
    value: float  # what they come to there
    largest: float


@dataclass(frozen=True)
class Reason:
    """What a backward pass says about itself."""

    function: str
    equation: str
    words: str


@dataclass(frozen=True)
class Element:
    """The element of a tensor whose number is followed."""

    at: str
    scalar: float
    vectorized: float
    formula: str
    operands: Mapping[str, str]


@dataclass(frozen=True)
class Stop:
    """A tensor in its place on the way from token to loss, or back."""

    id: str
    kind: str  # "forward", "backward" or "home"
    section: str
    name: str
    words: str
    equation: str
    letters: str
    shape: str
    left: Snippet
    right: Snippet
    views: list[View]
    scale: float
    apart: float
    element: Element
    links: Sequence[tuple[str, list[str]]]
    parts: list[Part] = field(default_factory=list)
    additions: list[Addition] = field(default_factory=list)
    more: int = 0
    why: list[Reason] = field(default_factory=list)
    uses: list[tuple[str, str]] = field(default_factory=list)  # the taps that use it, equations
    states: list[tuple[str, list[Picture], float]] = field(default_factory=list)


class Received(NamedTuple):
    """A += as the graph has it: through which value, and which of its operands."""

    local: float
    value: Value
    operand: int
    through: str
    where: Index | None
    total: float


class Graph:
    """scalar's graph of a loss: which += its backward pass makes, and through which taps.

    followed    the elements of which every single += is kept
    """

    def __init__(self, case: Case, state: State, followed: Container[tuple[str, Index]]) -> None:
        backend = Scalar(suited(case.config, "scalar", "float64"), state)
        backend.forward(case.docs(0))
        self.places = dict(_places(backend))
        order = backend.loss._topological_order()[::-1]
        towards: dict[Value, tuple[str, Index | None]] = {}
        edges: list[tuple[Value, Value, float, int]] = []
        for value in order:
            own = self.places.get(value) or towards[value]
            for i, (child, local) in enumerate(zip(value._children, value._local_grads or ())):
                if child in self.places:
                    edges.append((child, value, local, i))
                elif child._children:
                    before = towards.setdefault(child, own)
                    if before != own:
                        towards[child] = own[0], None
        backend.backward()
        self.parts: dict[str, dict[str, Array]] = defaultdict(dict)
        self.received: dict[tuple[str, Index], list[Received]] = defaultdict(list)
        shapes = {name: np.shape(x) for name, x in {**backend.taps(), **state.params}.items()}
        total: dict[Value, float] = defaultdict(float)
        for child, value, local, i in edges:
            name, index = self.places[child]
            through, where = self.places.get(value) or towards[value]
            if through not in self.parts[name]:
                self.parts[name][through] = np.zeros(shapes[name])
            self.parts[name][through][index] += local * value.grad
            if (name, index) in followed:
                total[child] += local * value.grad
                self.received[name, index].append(
                    Received(local, value, i, through, where, total[child])
                )

    def addition(self, one: Received, letters: Sequence[str], layer: str) -> Addition:
        """A += with everything by its name."""
        half = len(one.value._children) // 2  # of a product of two lists, the other factor
        partner = one.value._children[one.operand - half] if half else one.value
        factor = ""
        if partner in self.places and partner.data == one.local:
            factor = element_name(*self.places[partner], layer)
        looks = ""
        if one.where and "U" in axes_of(one.through):
            looks = f"{letters[one.where[2]]} looks at {letters[one.where[3]]}"
        towards = element_name(one.through, one.where, layer)
        return Addition(one.local, factor, one.value.grad, towards, looks, one.total)


def _places(backend: Scalar) -> Iterator[tuple[Value, tuple[str, Index]]]:
    """The values of every tap and parameter, with its name and the index of the value in it."""

    def elements(nested: Any, index: Index) -> Iterator[tuple[Value, Index]]:
        if isinstance(nested, Value):
            yield nested, index
        else:
            for i, inner in enumerate(nested):
                yield from elements(inner, (*index, i))

    for name, matrix in backend.matrices.items():
        yield from ((value, (name, index)) for value, index in elements(matrix, ()))
    *names, last = taps(backend.config)
    for b, doc_taps in enumerate(backend.doc_taps):
        for t, tap in enumerate(doc_taps):
            for name in names:
                for value, index in elements(pick(tap, name), ()):
                    at = (b, index[0], t, index[1]) if "U" in axes_of(name) else (b, t, *index)
                    yield value, (name, at)
    yield backend.loss, (last, ())


def element_name(name: str, index: Index | None, layer: str = "") -> str:
    """An element as reports write it, `q[t=1, c=3]`; the first document is understood.

    layer    the prefix that goes without saying
    """
    short = name.removeprefix(layer)
    if not index:
        return short if index == () else f"all of {short}"
    names = axis_names(f"forward/{name}")
    if names == ("row", "column"):
        return f"{short}[{index[0]}, {index[1]}]"
    pairs = [f"{axis}={i}" for axis, i in zip(names, index) if axis != "b"]
    return f"{short}[{', '.join(pairs)}]"


def layer_of(name: str) -> str:
    """The prefix of a layer's names, or nothing."""
    return "".join(name.rpartition(".")[:2])


class Atlas:
    """All that the page shows of a model on one document."""

    def __init__(self, case: Case, state: State, update: bool) -> None:
        case = replace(case, batches=[case.batches[0][:1]])
        self.case, self.config, self.state = case, case.config, state
        docs, number = case.docs(0), state.updates
        T = len(docs[0]) - 1
        weights = sum(np.size(tensor) for tensor in state.params.values())
        if weights * T > MOST:
            raise MicrogptError(
                f"{weights:,} weights at {T} positions are more than the atlas can show"
                f" ({MOST:,} products); take a shorter --text, or a smaller model"
            )
        self.tokens = docs[0]
        self.table, self.params = taps(self.config), params(self.config)
        self.steps: list[Step] = []
        self.after: list[Step] = []
        rate = learning_rate(min(number, self.config.steps - 1), self.config)
        for name in ("scalar", "vectorized"):
            config = suited(self.config, name, "float64")
            pair = Pair(name, replace(config, cores=1), state)
            self.steps.append(trace_step(pair, docs, rate))
            if update:
                self.after.append(trace_step(pair, docs, rate))
        names = (*self.table, *self.params)
        self.graph = Graph(case, state, {(name, self.index(name)) for name in names})
        self.number = number + 1
        self.sources = Source("scalar/model.py"), Source("vectorized/model.py")
        self.links = {name: f"text-{name}" for source in self.sources for name in source.functions}
        self.short = {name.rpartition(".")[2] for name in self.table}
        count = sum(self.steps[0][f"forward/{name}"].size for name in self.table)
        self.budget = NUMBERS / max(count, 1)

    def stops(self) -> Iterator[Stop]:
        """The way from the token to the loss, back again, and home to the parameters."""
        for tap in self.table.values():
            yield self._forward(tap)
        for tap in reversed(self.table.values()):
            yield self._backward(tap)
        for name in reversed(self.params):
            yield self._home(name)

    # --- the three kinds of stops ---

    def _forward(self, tap: Tap) -> Stop:
        key, short = f"forward/{tap.name}", tap.name.rpartition(".")[2]
        users = list(dict.fromkeys(user.name for user, _ in consumers(self.config)[tap.name]))
        stop = self._stop(tap.name, "forward", key, f"{short} = {tap.equation}", "tap", "tap")
        links = [("computed from", list(tap.operands)), ("used by", users)]
        return replace(stop, links=links, states=self._afterwards(key))

    def _backward(self, tap: Tap) -> Stop:
        name, short = tap.name, tap.name.rpartition(".")[2]
        users = list(dict.fromkeys(user.name for user, _ in consumers(self.config)[name]))
        key = f"backward/d{name}"
        rule = "" if users else f"d{short} = 1: the loss rises by 1 when it rises by 1"
        stop = self._stop(name, "backward", key, rule, "uses", "dtap")
        links = [("comes from", [f"d{user}" for user in users])]
        stop = replace(stop, links=links, why=self._why(stop.right, short), uses=self._uses(users))
        return self._with_parts(stop, key)

    def _home(self, name: str) -> Stop:
        short = name.rpartition(".")[2]
        users = list(dict.fromkeys(user.name for user, _ in consumers(self.config)[name]))
        key, tree = f"gradient/d{name}", "dw" if "." in name else "dparams"
        stop = self._stop(name, "home", key, "", "uses", tree)
        states = [("the weights", *self._shown(f"entry/{name}"))]
        if self.after:
            for title, phase in (
                ("m after the step", "adam_m"),
                ("v after the step", "adam_v"),
                ("the update", "update"),
                ("the weights after it", "params"),
            ):
                states.append((title, *self._shown(f"{phase}/{name}")))
        links = [("comes from", [f"d{user}" for user in users])]
        stop = replace(stop, links=links, states=states, why=self._why(stop.right, short),
                       uses=self._uses(users))  # fmt: skip
        return self._with_parts(stop, key)

    # --- what they consist of ---

    def _stop(self, name: str, kind: str, key: str, equation: str, ours: str, theirs: str) -> Stop:
        short = name.rpartition(".")[2]
        tensors = [step[key] for step in self.steps]
        scale = self._scale(key)
        letters = axes_of(name)
        left, right = self._snippets(name, ours, theirs)
        views = [
            View(code, self._pictures(key, tensor, scale), self._numbers(key, tensor, side))
            for side, (tensor, code) in enumerate(zip(tensors, self._codes(name, kind)))
        ]
        return Stop(
            id=name if kind == "forward" else f"d{name}",
            kind=kind,
            section=self._section(name),
            name=short if kind == "forward" else f"d{short}",
            words=self._words(short),
            equation=equation,
            letters=f"({', '.join(letters)})",
            shape=self._in_words(key, tensors[0].shape),
            left=left,
            right=right,
            views=views,
            scale=scale,
            apart=float(np.abs(tensors[0] - tensors[1]).max()),
            element=self._element(key),
            links=[],
        )

    def _section(self, name: str) -> str:
        layer, dot, _ = name.rpartition(".")
        if not dot:
            return ""
        return layer.replace("layer", "layer ")

    def _words(self, short: str) -> str:
        """What the sources say about a tap: the comment above it."""
        place = self.sources[0].keeping("tap", short)
        return self.sources[0].comment_above(*place) if place else ""

    def _uses(self, users: Sequence[str]) -> list[tuple[str, str]]:
        return [(u, f"{u.rpartition('.')[2]} = {self.table[u].equation}") for u in users]

    def _why(self, snippet: Snippet, short: str) -> list[Reason]:
        """What the docstrings say of the backward passes that make a derivative."""
        right = self.sources[1]
        places = [right.keeping(tree, short) for tree in ("dtap", "dw", "dparams")]
        names = [place[0] for place in places if place]
        for line in snippet.lines:
            names += [name for name in right.functions
                      if name.endswith("_backward") and f"{name}(" in right.lines[line.number - 1]
                      and "dtap" not in right.lines[line.number - 1]]  # fmt: skip
        found = []
        for name in dict.fromkeys(names):
            words = right.words_of(name)
            if words.startswith("forward:"):
                found.append(Reason(name, right.equation(name), words))
        return found

    def _snippets(self, name: str, ours: str, theirs: str) -> tuple[Snippet, Snippet]:
        """The lines of both texts; for a derivative, those of scalar that use the tap."""
        short = name.rpartition(".")[2]
        left, right = self.sources
        if ours == "tap":
            numbers = left.behind("tap", short, self.short)
        else:
            users = {user.name.rpartition(".")[2] for user, _ in consumers(self.config)[name]}
            numbers = sorted({n for user in users for n in left.behind("tap", user, self.short)})
            if not users:
                numbers = left.behind("tap", short, self.short)
        return (
            Snippet(left.path, left.highlighted(numbers, self.links)),
            Snippet(right.path, right.highlighted(
                right.behind(theirs, short, self.short), self.links)),
        )  # fmt: skip

    def _codes(self, name: str, kind: str) -> tuple[str, str]:
        """How to get at a tensor in each text."""
        layer, dot, short = name.rpartition(".")
        tree = f"tap.layers[{layer.removeprefix('layer')}]" if dot else "tap"
        if kind == "home":
            tree = tree.replace("tap", "params")
        scalar = "loss" if name == "loss" else f"{tree}.{short}"
        what = "data" if kind == "forward" else "grad"
        vectorized = f"{tree}.{short}" if kind == "forward" else f"d{tree}.{short}"
        return f"{scalar}, .{what} of every Value", vectorized

    def _in_words(self, key: str, shape: tuple[int, ...]) -> str:
        name = key.partition("/")[2].removeprefix("d" if not key.startswith("forward") else "")
        words = [(n, *LETTERS[letter]) for letter, n in zip(axes_of(name), shape)]
        parts = [f"{n:,} {one if n == 1 else several}" for n, one, several in words]
        return " x ".join(parts) or "a single number"

    def _element(self, key: str) -> Element:
        """The element to follow: the one on whose account the loss moves most, at one position."""
        phase, name = key.partition("/")[::2]
        name = name if phase == "forward" else name[1:]
        index = self.index(name)
        scalar, vectorized = (float(step[key][index]) for step in self.steps)
        behind = expression(self.case, self.number, key, index, self.steps[0])
        d = "" if phase == "forward" else "d"
        return Element(
            at=d + element_name(name, index, layer_of(name)),
            scalar=scalar,
            vectorized=vectorized,
            formula=behind.formula if behind else "",
            operands={k: _operand(v) for k, v in behind.operands.items()} if behind else {},
        )

    def index(self, name: str) -> Index:
        """Where the derivative is largest, at the second position if the tensor has positions."""
        step, axes = self.steps[0], axes_of(name)
        key = f"backward/d{name}" if name in self.table else f"gradient/d{name}"
        sizes = np.abs(step[key])
        there = real(key, sizes.shape, step["batch/tokens"])
        if "T" in axes:
            T = sizes.shape[axes.index("T")]
            wanted = T - 1 if "U" in axes else min(1, T - 1)
            positions = np.arange(T).reshape([-1 if a == "T" else 1 for a in axes])
            there = there & (positions == wanted)
        found = np.unravel_index(np.argmax(np.where(there, sizes, -1.0)), sizes.shape)
        return tuple(map(int, found))

    def _with_parts(self, stop: Stop, key: str) -> Stop:
        name = key.partition("/")[2][1:]
        received = self.graph.received[name, self.index(name)]
        parts = [
            Part(
                f"d{user}",
                self._pictures(key, tensor, stop.scale),
                sum(one.through == user for one in received),
                sum(one.local * one.value.grad for one in received if one.through == user),
                float(np.abs(tensor).max()),
            )
            for user, tensor in self.graph.parts[name].items()
        ]
        kept = received if len(received) <= SHOWN else received[: SHOWN - 1]
        letters = [self.token(i) for i in self.tokens]
        additions = [self.graph.addition(one, letters, layer_of(name)) for one in kept]
        return replace(stop, parts=parts, additions=additions, more=len(received) - len(kept))

    def _afterwards(self, key: str) -> list[tuple[str, list[Picture], float]]:
        """The same tensor after the update."""
        if not self.after:
            return []
        before, after = (steps[1][key] for steps in (self.steps, self.after))
        scale = max(self._scale(key), float(np.abs(after).max()))
        change = float(np.abs(after - before).max())
        return [
            ("after the update", self._pictures(key, after, scale), scale),
            ("the change", self._pictures(key, after - before, change), change),
        ]

    def _shown(self, key: str) -> tuple[list[Picture], float]:
        tensor = self.steps[1][key]
        scale = float(np.abs(tensor).max())
        return self._pictures(key, tensor, scale), scale

    def _scale(self, key: str) -> float:
        tensors = [step[key] for step in self.steps]
        return max(float(np.abs(tensor).max()) for tensor in tensors)

    # --- pictures and numbers ---

    def token(self, i: int) -> str:
        """A token as it is written beside a row."""
        tokenizer = self.case.tokenizer
        if i in (tokenizer.bos, tokenizer.eos):
            return "BOS" if i == tokenizer.bos else "EOS"
        char = tokenizer.decode([i])
        return char if char.isprintable() and char.strip() else f"U+{ord(char):04X}"

    def _labels(self, letter: str, n: int) -> list[str]:
        if letter in "TU":
            return [self.token(i) for i in self.tokens[:n]]
        if letter == "V" and n <= 64:
            return [self.token(i) for i in range(n)]
        return [str(i) for i in range(n)] if letter == "block_size" and n <= 32 else []

    def _pictures(self, key: str, tensor: Array, scale: float) -> list[Picture]:
        """One matrix, or one for each head; what has no rows is one row."""
        phase, name = key.partition("/")[::2]
        axes = axes_of(name[1:] if phase in ("backward", "gradient") else name)
        if not axes:
            return []
        there = real(key, tensor.shape, self.steps[0]["batch/tokens"])
        if axes[0] == "B":
            axes, tensor, there = axes[1:], tensor[0], there[0]
        if len(axes) == 1:
            axes, tensor, there = ("", *axes), tensor[None], there[None]
        heads = axes[0] == "H"
        if not heads:
            tensor, there = tensor[None], there[None]
        *_, rows, columns = tensor.shape
        row_labels = self._labels(axes[-2], rows) if axes[-2] else []
        column_labels = self._labels(axes[-1], columns)
        height = 20 if row_labels else 20 if rows == 1 else max(3, min(12, 220 // rows))
        width = 22 if heads else max(3, min(20, 560 // columns))
        return [
            Picture(
                heat(tensor[h], scale, there[h]),
                width=width * columns,
                height=height * rows,
                rows=row_labels,
                columns=column_labels,
                title=f"head {h}" if heads else "",
            )
            for h in range(len(tensor))
        ]

    def _numbers(self, key: str, tensor: Array, side: int) -> str:
        """The numbers in rows, as lists on the left and as an array on the right."""
        phase, name = key.partition("/")[::2]
        name = name if phase == "forward" else name[1:]
        axes = axes_of(name)
        if not axes:
            return f"{float(tensor)!r}"
        if phase == "gradient":
            return ""
        most = max(1, int(tensor.size * self.budget)) if self.budget < 1 else tensor.size
        largest = float(np.abs(tensor).max())
        digits = 3 - math.floor(math.log10(largest)) if largest else 1
        form = f"{{:{max(1, digits) + 3}.{max(1, digits)}f}}" if -4 < digits < 10 else "{:11.3e}"

        def row(numbers: Iterable[float], comma: str) -> str:
            return comma.join(form.format(x) for x in numbers)

        lines = []
        comma = ", " if side == 0 else " "
        letters = self._labels("T", len(self.tokens) - 1)
        if "U" in axes:
            H, T = tensor.shape[1:3]
            order = (
                [(t, h) for t in range(T) for h in range(H)]
                if side == 0
                else [(t, h) for h in range(H) for t in range(T)]
            )
            width = len(form.format(0.0))
            for t, h in order:
                later = "" if side == 0 else (" " + ".".rjust(width)) * (T - 1 - t)
                lines.append(
                    f"t={t} {letters[t]:4} h={h} [{row(tensor[0, h, t, : t + 1], comma)}{later}]"
                )
            per_line = max(1, T)
        elif len(axes) == 2:  # one number a position
            if side == 0:
                lines = [f"t={t} {letters[t]:4} {row([x], comma)}" for t, x in enumerate(tensor[0])]
            else:
                lines = [f"[[{row(tensor[0], comma)}]]"]
            per_line = 1
        else:
            lines = [
                f"t={t} {letters[t]:4} [{row(numbers, comma)}]"
                for t, numbers in enumerate(tensor[0])
            ]
            per_line = tensor.shape[-1]
        kept = max(2, most // per_line)
        left_out = len(lines) - kept
        return "\n".join(lines[:kept]) + (f"\n.. and {left_out} rows more" if left_out > 0 else "")

    # --- the texts ---

    def texts(self) -> list[dict[str, Any]]:
        """Both models function by function: the forward pass, and the backward pass beneath."""
        left, right = self.sources
        links = dict(self.links)
        first = "layer0."
        for name in self.table:
            if "." not in name or name.startswith(first):
                short = name.rpartition(".")[2]
                links |= {f"tap.{short}": name, f"dtap.{short}": f"d{name}"}
                links |= {f"dtap_i.{short}": f"d{name}"}
        for name in self.params:
            if "." not in name or name.startswith(first):
                short = name.rpartition(".")[2]
                links |= {f"dw.{short}": f"d{name}", f"dparams.{short}": f"d{name}"}
        found = []
        for name in left.functions:
            forward, backward = f"{name}_forward", f"{name}_backward"
            if forward in right.functions:
                found.append({"name": name, "forward": forward, "backward": backward,
                              "rows": side_by_side(left, name, right, forward, links),
                              "back": upside_down(left, name, right, backward, links)})  # fmt: skip
        paired = {text[way] for text in found for way in ("forward", "backward")}
        value = Source("scalar/value.py")
        for name in right.functions:  # helpers, which have a twin beside Value or none
            if name not in paired:
                twin = name in value.functions
                rows = side_by_side(value, name, right, name, links) if twin else [
                    Row([], right.highlighted(right.span(name), links))]  # fmt: skip
                found.append({"name": name, "forward": "", "backward": "", "rows": rows})
        return found


def _operand(numbers: Any) -> str:
    """The numbers that an expression takes, up to 16 of them."""
    if not np.ndim(numbers):
        return f"{float(numbers):.5g}"
    flat = np.asarray(numbers).reshape(-1)
    text = "  ".join(f"{x:.4g}" for x in flat[:16])
    return text if len(flat) <= 16 else f"{text}  .. ({len(flat)} numbers)"


def atlas(case: Case, state: State, origin: str, update: bool = False) -> str:
    """The page for a model and the first document of a case.

    origin    where the model comes from, in words
    update    show the model after this step's update, too
    """
    with np.errstate(all="ignore"):  # what overflows is refused
        made = _finite_atlas(case, state, origin, update)
    value = Source("scalar/value.py")
    stops = list(made.stops())
    example = next(stop for stop in stops if stop.id.endswith("dlayer0.k"))
    return render(
        "atlas.html.j2",
        title=f"Atlas of {origin}",
        origin=origin,
        config=made.config,
        letters=[made.token(i) for i in made.tokens],
        stops=stops,
        ids={stop.id for stop in stops},
        short=lambda name: name.rpartition(".")[2],
        groups=groups(made),
        texts=made.texts(),
        example=example,
        engine=Snippet(value.path, value.highlighted(value.span("backward"), {})),
        apart=max(stop.apart for stop in stops),
        losses=[float(step["forward/loss"]) for step in (made.steps[1], *made.after[1:])],
        number=made.number,
        weights=sum(np.size(tensor) for tensor in state.params.values()),
        paths=[source.path for source in made.sources],
        update=update,
    )


def _finite_atlas(case: Case, state: State, origin: str, update: bool) -> Atlas:
    """An atlas whose every number is finite. Raises MicrogptError if there is none."""
    try:
        made = Atlas(case, state, update)
        for step in (*made.steps, *made.after):
            spoiled = not_finite({key: x for key, x in step.items() if x.dtype.kind == "f"})
            if spoiled:
                raise FloatingPointError(f"{spoiled} is not finite everywhere")
        return made
    except IncompleteError as error:
        stop = error.stop
        why = stop.error.partition(": ")[2] if stop.not_finite else f"{stop.error} ({stop.line})"
        reason = f"{stop.side} stops: {why}"
    except FloatingPointError as error:
        reason = str(error)
    raise MicrogptError(
        f"{origin}: {reason}, so there is nothing to draw; choose an earlier --step, or a run"
        " with a smaller --learning-rate or --init-std"
    )


def groups(made: Atlas) -> list[tuple[str, list[tuple[str, str]]]]:
    """The taps by the function that computes them, in the order of the forward pass."""
    found: dict[str, list[tuple[str, str]]] = {}
    for tap in made.table.values():
        layer, dot, short = tap.name.rpartition(".")
        place = "output" if any("layer" in one for one in found) else "embedding"
        place = layer.replace("layer", "layer ") if dot else place
        title = f"{place}: {tap.within}"
        found.setdefault(title, []).append((tap.name, short))
    return list(found.items())


def of_run(path: Path | None, text: str | None, step: int | None) -> str:
    """The page for a run as it ended, or before and after its step N; without one, the default.

    Raises MicrogptError if there is no such step, or a character that the model does not know.
    """
    held = load_checkpoint(path) if path else None
    config = held.config if held else load_config()
    origin = path.resolve().name if path else f"the preset {DEFAULT_PRESET}"
    if step is not None and not 1 <= step <= config.steps:
        raise MicrogptError(f"--step: expected 1 to {config.steps:,}, got {step:,}")
    if held and step is None:
        tokenizer, state, document = held.tokenizer, held.state, ""
    else:
        done = config.steps if step is None else step - 1
        tokenizer, state, document = _trained(config, done, held.documents if held else "")
    if text is None:
        known = set(TEXT) <= set(tokenizer.chars)
        text = document if step else TEXT if known else _known_document(config, tokenizer)
    tokenizer.encode(text)
    steps = f"{state.updates:,} step{'' if state.updates == 1 else 's'}"
    where = f"after {steps}" if step is None else f"before and after step {step:,}"
    params, m, v = (_double(named) for named in (state.params, state.m, state.v))
    state = State(params, m, v, state.updates)
    case = Case(
        name="atlas",
        why="to be looked at",
        config=config,
        chars="".join(tokenizer.chars),
        batches=[[text]],
        params=params,
    )
    return atlas(case, state, f"{origin}, {where}", update=step is not None)


def _double(named: Tensors) -> dict[str, Array]:
    return {name: np.array(tensor, "float64") for name, tensor in named.items()}


def _trained(config: Config, steps: int, known: str) -> tuple[Tokenizer, State, str]:
    """A model trained from the beginning, and the first document of the step that follows.

    known    the digest of the documents that the run was trained on, if there was one
    """
    if config.dataset == IN_PYTHON:
        raise MicrogptError(f"{TEXTS_ARE_GONE}; leave --step out")
    rng = Random(config.seed)
    documents = load_documents(config.dataset, config.documents)
    rng.shuffle(documents)
    if known and digest(documents) != known:
        raise MicrogptError(f"{config.dataset}: has changed since the run; leave --step out")
    tokenizer = build_tokenizer("".join(documents), config)
    params = init_params(config, tokenizer.vocab_size, rng)
    backend = load_backend("vectorized", replace(config, cores=1), fresh_state(params))
    training, _ = parts(documents, config)
    try:
        with np.errstate(all="ignore"):
            for step in range(steps):
                backend.forward(batch(step, training, tokenizer, config))
                backend.backward()
                backend.update(learning_rate(step, config))
    except FloatingPointError as error:
        raise MicrogptError(f"step {step + 1}: {error}; choose an earlier --step") from None
    return tokenizer, backend.state(), nth(training, steps * config.batch_size)


def _known_document(config: Config, tokenizer: Tokenizer) -> str:
    """A document of the model's own alphabet: the first of its data set, if that can be had."""
    with suppress(MicrogptError):
        first = load_documents(config.dataset)[0]
        if set(first) <= set(tokenizer.chars):
            return first
    return "".join(tokenizer.chars[:4])
