"""The stops of the atlas: a stop is one named tensor of a document, in both implementations.

The stops are in the order of computation: the taps from the token to the loss, their derivatives
back to the embedding, and after each derivative the gradients of the parameters that are computed
from that derivative. Lines come from the sources, numbers from runs of both backends, and the terms
of a derivative from the backward pass in scalar's graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from crosscheck.additions import ALL, Addition, Place
from crosscheck.document import Document
from crosscheck.explain import expression
from crosscheck.trace import Array, real
from crosscheck.trace import axes as axes_of_key
from microgpt.pages.numbers import Numbers, rows
from microgpt.pages.pictures import LARGEST, heat
from microgpt.pages.sources import Line, Source, Text, texts
from microgpt.taps import EMBEDDING, LAYER, OUTPUT, axes_of, consumers, sizes

LETTERS = {  # what an axis counts, in the singular and the plural
    "B": ("document", "documents"),
    "T": ("position", "positions"),
    "U": ("position looked at", "positions looked at"),
    "C": ("channel", "channels"),
    "H": ("head", "heads"),
    "D": ("channel of a head", "channels of a head"),
    "F": ("channel of the MLP", "channels of the MLP"),
    "V": ("token of the vocabulary", "tokens of the vocabulary"),
    "block_size": ("position of the context", "positions of the context"),
}
MORE = {  # what the legend says of a letter besides
    "U": ": position t looks at positions u = 0 .. t; k[u] is the k computed at position u",
    "D": ": channel c belongs to head h = c // {D} and is its channel d = c % {D}",
}
LABELS = {letter: letter.lower() for letter in LETTERS} | {"block_size": "t"}
# by operation: what `value` is if the operand goes into a Value that is not an element of the tap
INSIDE = {
    "scores": "{x} goes into the dot product q . k. That is divided by sqrt({D}) = {root:g} to give"
    " attn_logits, so value.grad is dattn_logits / {root:g}.",
    "softmax": "Here value is the logit less the largest one. All elements of attn_weights with the"
    " same t depend on it, so value.grad is the sum of what they send back:",
    "rmsnorm": "'several': here value is the sum x . x inside rmsnorm, x = {x}. All {C} outputs"
    " depend on it. The row stands twice because x is both factors of x . x.",
    "activation": "Here value is a step inside {activation}. What follows it on the way to mlp_act"
    " multiplies the gradient by the factor given.",
    "cross_entropy": "Here value is the logit less the largest one. The factor is the derivative of"
    " -log(softmax(logits)[target]): softmax(logits)[v] - [v = target] = {p:.4g} - {hit}.",
    "mean": "{x} goes into the sum over positions. That is divided by their number, {T}, to give"
    " the loss, so value.grad is dloss / {T}.",
}
ROWS = 20  # how many rows of a tensor are shown before the rest is unfolded
RESIDUAL = 2  # the index of the operand that is added to the result of a linear map
GENERAL = {tap.name: tap.operands for tap in (*EMBEDDING, *LAYER, *OUTPUT)}


class Detail(NamedTuple):
    """How much the page shows."""

    numbers: int  # how many numbers of all taps and parameters; of each tensor, the first rows
    additions: int  # how many additions to an element, the largest
    pixels: int  # how many pixels across a picture


class Link(NamedTuple):
    """A place on the page, and the text of the link to that place."""

    to: str
    text: str


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
class Side:
    """A tensor as one implementation has it, and the lines that compute it."""

    path: str
    lines: list[Line]
    code: str  # what to type to see the tensor
    pictures: list[Picture]
    numbers: Numbers


@dataclass(frozen=True)
class Term:
    """An addition to a derivative, in words and numbers."""

    source: str  # the derivative that the addition comes from
    gradient: float | None  # the number of that derivative; None if there are several elements
    looks: str  # in attention: which token looks at which
    factor: str  # what local_grad is, if it is the other factor of a product
    followed: bool  # whether the addition comes from the number that is followed
    addition: Addition


@dataclass(frozen=True)
class Share:
    """What one element of attn_weights adds to the derivative with respect to a logit."""

    source: str
    gradient: float
    slope: str  # the element's derivative with respect to the logit, in letters
    factor: float  # the same derivative, as a number

    @property
    def product(self) -> float:
        """What the element adds to value.grad."""
        return self.gradient * self.factor


@dataclass(frozen=True)
class Part:
    """What one consumer of a tensor contributes to the tensor's derivative."""

    link: Link
    pictures: list[Picture]
    count: int  # how many additions to the element that is followed
    value: float  # the sum of these additions
    largest: float  # the largest number of the contribution


@dataclass(frozen=True)
class Reason:
    """What the source of a backward function says about it."""

    function: str
    equation: str
    words: str


@dataclass(frozen=True)
class Element:
    """The element of a tensor whose number is followed."""

    place: Place
    at: str
    scalar: float
    vectorized: float
    formula: str
    operands: Mapping[str, str]


@dataclass(frozen=True)
class Shown:
    """Another tensor that is shown at a stop."""

    id: str  # the name that links lead to, or ""
    title: str
    pictures: list[Picture]
    scale: float
    numbers: Numbers | None = None


@dataclass(frozen=True)
class Stop:
    """One tensor of the atlas and all that is shown of it."""

    id: str
    kind: str  # "forward", "backward", or "home" for a parameter's gradient
    layer: str  # "layer 0", or ""
    name: str
    of: str  # the name without the d of a derivative
    words: str
    equation: str
    letters: str
    shape: str
    sides: list[Side]
    scale: float
    apart: float  # the largest difference between the two implementations
    element: Element
    before: list[Link]  # to the tensors that this tensor is computed from
    after: list[Link]  # to the tensors that are computed from this tensor
    beside: list[Shown]
    used_in: list[str] = field(default_factory=list)  # of a derivative: equations with its tap
    parts: list[Part] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    left_out: int = 0  # how many smaller additions are not listed
    rest: float = 0.0  # the sum of the smaller additions
    zeros: int = 0  # how many additions are 0
    notes: list[str] = field(default_factory=list)  # what `value` is if it is not a tap
    shares: list[Share] = field(default_factory=list)  # whose sum is the gradient of a logit
    why: list[Reason] = field(default_factory=list)


@dataclass(frozen=True)
class Example:
    """One element of dk as a sum in both implementations, and the dk of a head as a product."""

    stop: Stop
    head: int
    u: int
    d: int  # the channel within the head
    products: list[tuple[int, float, float]]  # t, dscores and q_heads
    factors: list[Shown]  # dscores transposed, q_heads, and their product


class Stops:
    """All stops of a document, in the order of computation.

    detail    how much the page shows
    """

    def __init__(self, document: Document) -> None:
        self.document, self.config = document, document.config
        self.table, self.params, self.users = document.table, document.params, document.users
        self.scalar, self.vectorized, self.after = (
            document.scalar,
            document.vectorized,
            document.after,
        )
        self.short = frozenset(map(short, self.table))
        self.sources = (
            Source("scalar/model.py", self.config),
            Source("vectorized/model.py", self.config),
        )
        self.links = {name: f"text-{name}" for source in self.sources for name in source.functions}
        self._behind = [cache(source.behind) for source in self.sources]
        self._line = [
            cache(partial(source.highlighted, links=self.links)) for source in self.sources
        ]
        taps = sum(self.scalar[f"forward/{name}"].size for name in self.table)
        self.count = taps + document.weights
        self.detail = Detail(self.count, 16, LARGEST)

    def __iter__(self) -> Iterator[Stop]:
        """The stops from the token to the loss, and from the loss back to the parameters."""
        for name in self.table:
            yield self._forward(name)
        for name in reversed(self.table):
            yield self._backward(name)
            for param in self._settled(name):
                yield self._home(param)

    def _settled(self, tap: str) -> list[str]:
        """The parameters whose first consumer is this tap: their gradients are then complete."""
        return [name for name in reversed(self.params) if self.users[name][0] == tap]

    # --- the three kinds of stops ---

    def _forward(self, name: str) -> Stop:
        key, tap = f"forward/{name}", self.table[name]
        beside = []
        if self.after:
            after, change = self.after[key], self.after[key] - self.vectorized[key]
            beside = [self._shown(key, "after the update", after),
                      self._shown(key, "the change", change)]  # fmt: skip
        return self._stop(
            name, "forward", key, "tap", "tap",
            equation=f"{short(name)} = {self._equation(name)}",
            before=[self._link(operand, name) for operand in tap.operands],
            after=[self._link(user, name) for user in self.users[name]],
            beside=beside,
        )  # fmt: skip

    def _backward(self, name: str) -> Stop:
        itself = f"d{name} = 1, the derivative of the loss with respect to itself"
        return self._stop(
            name, "backward", f"backward/d{name}", "uses", "dtap",
            equation="" if self.users[name] else itself,
            after=[self._link(operand, name, "d") for operand in self.table[name].operands],
        )  # fmt: skip

    def _home(self, name: str) -> Stop:
        tree = "dw" if layer_of(name) else "dparams"
        key, weights = f"entry/{name}", self.vectorized[f"entry/{name}"]
        beside = [self._shown(key, "the weights", weights, name, numbers=True)]
        if self.after:
            before, after = (step[f"entry/{name}"] for step in (self.vectorized, self.after))
            beside += [
                self._shown(f"adam_m/{name}", "m after the step", self.after[f"adam_m/{name}"]),
                self._shown(f"adam_v/{name}", "v after the step", self.after[f"adam_v/{name}"]),
                self._shown(f"update/{name}", "the update", after - before),
                self._shown(f"params/{name}", "the weights after it", after),
            ]
        return self._stop(name, "home", f"gradient/d{name}", "uses", tree, beside=beside)

    # --- what they consist of ---

    def _stop(
        self,
        name: str,
        kind: str,
        key: str,
        ours: str,
        theirs: str,
        equation: str = "",
        before: Sequence[Link] = (),
        after: Sequence[Link] = (),
        beside: Sequence[Shown] = (),
    ) -> Stop:
        """The stop of a tensor; that of a derivative with its terms."""
        tensors, d = (self.scalar[key], self.vectorized[key]), "" if kind == "forward" else "d"
        scale = max(float(np.abs(tensor).max()) for tensor in tensors)
        numbers, codes = self._lines(name, ours, theirs), self._codes(name, kind)
        sides = [
            Side(
                self.sources[i].path,
                [line for n in numbers[i] for line in self._line[i]((n,))],
                codes[i],
                self._pictures(key, tensor, scale),
                self._numbers(name, tensor, lists=i == 0),
            )
            for i, tensor in enumerate(tensors)
        ]
        stop = Stop(
            id=d + name,
            kind=kind,
            layer=layer_of(name).replace("layer", "layer ").removesuffix("."),
            name=d + short(name),
            of=short(name),
            words=self._words(name, d),
            equation=equation,
            letters=f"({', '.join(axes_of(name))})",
            shape=in_words(name, tensors[0].shape),
            sides=sides,
            scale=scale,
            apart=float(np.abs(tensors[0] - tensors[1]).max()),
            element=self._element(key, name),
            before=list(before),
            after=list(after),
            beside=list(beside),
        )
        return self._with_terms(stop, key, name) if d else stop

    def _with_terms(self, stop: Stop, key: str, name: str) -> Stop:
        """The stop of a derivative, with the additions whose sum is the derivative."""
        users, place = self.users[name], stop.element.place
        found = self.document.additions.one[place]
        by_size = sorted((one for one in found if one.product), key=lambda one: -abs(one.product))
        by_size[1:] = sorted(by_size[1:], key=lambda one: not self._follows(one, users[0]))
        most = self.detail.additions
        most -= len(by_size) > most  # the last row stands for the others
        rest, listed = by_size[most:], {id(one) for one in by_size[:most]}
        parts = [
            Part(
                self._link(user, name, "d"),
                self._pictures(key, tensor, stop.scale),
                sum(one.source.name == user for one in found),
                sum(one.product for one in found if one.source.name == user),
                float(np.abs(tensor).max()),
            )
            for user, tensor in self.document.additions.parts[name].items()
        ]
        return replace(
            stop,
            before=[self._link(user, name, "d") for user in users],
            used_in=[f"{self._link(user, name).text} = {self._equation(user)}" for user in users],
            parts=parts,
            terms=[self._term(one, name, users[0]) for one in found if id(one) in listed],
            left_out=len(rest),
            rest=sum(one.product for one in rest),
            zeros=sum(not one.product for one in found),
            notes=self._notes(place, found),
            shares=self._shares(place, found),
            why=self._why(name),
        )

    def _follows(self, one: Addition, user: str) -> bool:
        """Whether an addition comes from the number that is followed in this tap."""
        return self.document.chain[user] in one.towards

    def _notes(self, place: Place, found: Sequence[Addition]) -> list[str]:
        """Sentences on what `value` is in additions to an element, if it is not of a tap."""
        inside = [one for one in found if one.share != 1]
        operations = dict.fromkeys(self.table[one.source.name].operation for one in inside)
        hit = 0
        if place.name == "logits":
            _, t, v = place.at
            hit = int(v == self.document.tokens[t + 1])
        D, T = self.config.head_dim, len(self.document.tokens) - 1
        numbers = {
            "x": short(place.name), "D": D, "root": D**0.5, "C": self.config.n_embd, "T": T,
            "activation": self.config.activation, "hit": hit,
            "p": hit + (inside[0].share or 0.0) if inside else 0.0,
        }  # fmt: skip
        return [INSIDE[one].format_map(numbers) for one in operations if one in INSIDE]

    def _shares(self, place: Place, found: Sequence[Addition]) -> list[Share]:
        """What each attention weight adds to the derivative with respect to a logit."""
        u = place.at[-1] if place.at else 0
        return [
            Share(
                self._written(source, place.name, "d"),
                float(self.scalar[f"backward/d{source.name}"][source.at]),
                f"w[u={source.at[-1]}] ({int(source.at[-1] == u)} - w[u={u}])",
                slope,
            )
            for one in found
            if "U" in axes_of(place.name) and "U" in axes_of(one.source.name)
            for source, slope in sorted(one.towards.items())
        ]

    def _term(self, one: Addition, name: str, first: str) -> Term:
        """An addition to the derivative of a tensor; first: the tensor's first consumer."""
        name_of, at = one.source
        letters, looks = self.document.letters(), ""
        if "U" in axes_of(name_of) and ALL not in at:
            looks = f"{letters[at[2]]} looks at {letters[at[3]]}"
        return Term(
            source=self._written(one.source, name, "d"),
            gradient=float(self.scalar[f"backward/d{name_of}"][at])
            if one.share is not None
            else None,
            looks=looks,
            factor=self._written(one.factor, name) if one.factor else "",
            followed=self._follows(one, first),
            addition=one,
        )

    def _words(self, name: str, d: str) -> str:
        """The comment above a tap in scalar/model.py, as a sentence."""
        place = self.sources[0].keeping("tap", short(name))
        words = self.sources[0].comment_above(*place) if place else ""
        words = f"derivative of: {words}" if d and words else words
        return f"{words[0].upper()}{words[1:]}." if words else ""

    def _equation(self, name: str) -> str:
        """The equation of a tap, with the names of its operands in this model."""
        equation = self.table[name].equation
        for operand, general in zip(self.table[name].operands, GENERAL.get(short(name), ())):
            equation = re.sub(rf"\b{general}\b", self._link(operand, name).text, equation)
        return equation.replace("activation(", f"{self.config.activation}(")

    def _why(self, name: str) -> list[Reason]:
        """What the sources of the backward functions say that compute a derivative.

        These are the backward functions of the tap's consumers, or the function that keeps the
        derivative.
        """
        right = self.sources[1]
        uses = [(user.function, i) for user, i in consumers(self.config)[name]]
        found = [f"{function}_backward" for function, i in uses if function and i != RESIDUAL]
        kept = [right.keeping(tree, short(name)) for tree in ("dtap", "dw", "dparams")]
        found = found or [place[0] for place in kept if place]
        return [
            Reason(function, right.equation(function), right.words_of(function))
            for function in dict.fromkeys(found)
            if right.words_of(function).startswith("forward:")
        ]

    def _lines(self, name: str, ours: str, theirs: str) -> tuple[list[int], list[int]]:
        """The numbers of the lines of both texts; of a derivative, scalar's lines use the tap."""
        left, right = self._behind
        users = {short(user) for user in self.users[name]} if ours == "uses" else set()
        numbers = {n for user in users or {short(name)} for n in left("tap", user, self.short)}
        first = layer_of(name) == f"layer{self.config.n_layer - 1}."
        return sorted(numbers), right(theirs, short(name), self.short, first)

    def _codes(self, name: str, kind: str) -> tuple[str, str]:
        """The Python expressions for a tensor in each text."""
        layer = layer_of(name).removeprefix("layer").removesuffix(".")
        tree = "params" if kind == "home" else "tap"
        path = f"{tree}.layers[{layer}].{short(name)}" if layer else f"{tree}.{short(name)}"
        field = "data" if kind == "forward" else "grad"
        ours = f"{'loss' if name == 'loss' else path}, .{field} of every Value"
        return ours, path if kind == "forward" else f"d{path}"

    # --- the element that is followed ---

    def _element(self, key: str, name: str) -> Element:
        place, d = self.document.chain[name], "" if key.startswith("forward") else "d"
        behind = expression(self.document.case, self.document.number, key, place.at, self.scalar)
        return Element(
            place=place,
            at=self._written(place, name, d),
            scalar=float(self.scalar[key][place.at]),
            vectorized=float(self.vectorized[key][place.at]),
            formula=self._named(behind.formula) if behind else "",
            operands={self._named(k): _operand(x) for k, x in behind.operands.items()}
            if behind
            else {},
        )

    # --- names ---

    def _link(self, name: str, of: str, d: str = "") -> Link:
        """A link to a tensor or its derivative, from the stop of another."""
        return Link(d + name, d + name.removeprefix(self._unsaid(name, of)))

    def _written(self, place: Place, of: str, d: str = "") -> str:
        """An element, as the stop of another tensor names it."""
        return d + place.written(self.document.token, self._unsaid(place.name, of))

    def _unsaid(self, name: str, of: str) -> str:
        """The layer in a name if it need not be said: it is the same layer, or the only one."""
        layer = layer_of(name)
        return layer if self.config.n_layer == 1 or layer == layer_of(of) else ""

    def _named(self, words: str) -> str:
        """A formula with the token beside each id, and without the layer if there is only one."""
        words = re.sub(r"\b(wpe\[)(\d)", r"\1t=\2", words)
        words = re.sub(
            r"((?:wte|lm_head|logits\)?)\[|token is )(\d+)",
            lambda found: f"{found[1]}v={found[2]} ({self.document.token(int(found[2]))})",
            words,
        )
        return words.replace("layer0.", "") if self.config.n_layer == 1 else words

    def chain(self) -> list[tuple[Link, float]]:
        """The number that is followed: its name and value at every stop from the token on."""
        places = [self.document.chain[name] for name in ("wte", *self.table)]
        keys = ["entry/wte", *(f"forward/{name}" for name in self.table)]
        return [
            (Link(place.name, self._written(place, "")), float(self.scalar[key][place.at]))
            for place, key in zip(places, keys)
        ]

    def legend(self) -> list[tuple[str, str, int]]:
        """The letters of shapes, what each counts, and its size in this model."""
        n = sizes(self.config, len(self.scalar["entry/wte"]), 1, len(self.document.tokens) - 1)
        n["D"] = self.config.head_dim
        return [
            (letter, words + MORE.get(letter, "").format_map(n), n[letter])
            for letter, (_, words) in LETTERS.items()
        ]

    # --- pictures and numbers ---

    def _shown(
        self, key: str, title: str, tensor: Array, anchor: str = "", numbers: bool = False
    ) -> Shown:
        scale = float(np.abs(tensor).max())
        written = self._numbers(anchor, tensor, lists=False) if numbers else None
        return Shown(anchor, title, self._pictures(key, tensor, scale), scale, written)

    def _labels(self, letter: str, n: int) -> list[str]:
        if letter in ("T", "U"):
            return self.document.letters()[:n]
        if letter == "V" and n <= 64:
            return [self.document.token(i) for i in range(n)]
        if letter == "block_size" and n <= 32:
            return [str(i) for i in range(n)]
        step = 4 if n > 8 else 1
        ticks = [str(i) if i % max(step, n // 8) == 0 else "" for i in range(n)]
        return ticks if letter in ("C", "D", "F") else []

    def _pictures(self, key: str, tensor: Array, scale: float) -> list[Picture]:
        """The pictures of a tensor: one matrix, or one for each head; a vector is one row."""
        axes = axes_of_key(key)
        if not axes:
            return []
        there = real(key, tensor.shape, self.vectorized["batch/tokens"])
        if axes[0] == "B":
            axes, tensor, there = axes[1:], tensor[0], there[0]
        if len(axes) == 1:
            axes, tensor, there = ("", *axes), tensor[None], there[None]
        if axes[0] != "H":
            return [self._picture(tensor, scale, axes, there)]
        return [
            self._picture(matrix, scale, axes[1:], mask, f"head {h}")
            for h, (matrix, mask) in enumerate(zip(tensor, there))
        ]

    def _picture(
        self,
        matrix: Array,
        scale: float,
        axes: Sequence[str],
        there: Array | None = None,
        title: str = "",
    ) -> Picture:
        rows, columns = matrix.shape
        labels = self._labels(axes[0], rows), self._labels(axes[1], columns)
        named = rows == 1 or (labels[0] and all(labels[0]))
        height = 20 if named else max(3, min(12, 220 // rows))
        width = 22 if title else max(3, min(20, 560 // columns))
        size = width * columns, height * rows
        return Picture(heat(matrix, scale, there, self.detail.pixels), *size, *labels, title)

    def _numbers(self, name: str, tensor: Array, lists: bool) -> Numbers:
        """The rows of a tensor; of a parameter, first the rows that the document uses."""
        axes, tokens = axes_of(name), self.document.tokens
        letter = axes[-2] if name in self.params else "T"
        ids = range(len(tensor)) if name in self.params else tokens[:-1]
        labels = [f"{LABELS[letter]}={i}" for i in range(len(ids))]
        if letter in ("T", "V"):
            labels = [f"{label} {self.document.token(i):4}" for label, i in zip(labels, ids)]
        written = rows(tensor, axes, labels, lists)
        used = {"V": sorted(set(tokens)), "block_size": range(len(tokens) - 1)}
        first = list(used.get(letter, range(len(written))))[:ROWS]
        order = [*first, *sorted({*range(len(written))} - {*first})]
        kept = max(2, int(min(1.0, self.detail.numbers / self.count) * len(written)))
        lines = [written[i] for i in order[:kept]]
        return Numbers(lines[: len(first)], lines[len(first) :], len(written) - len(lines))

    # --- the example at the head of the page ---

    def example(self, stop: Stop) -> Example:
        """One element of dk as a sum of products, and dk of its head as one matrix product."""
        _, u, c = stop.element.place.at
        D = self.config.head_dim
        h, d, name = c // D, c % D, layer_of(stop.id[1:])
        dscores = self.vectorized[f"backward/d{name}attn_logits"][0, h] / D**0.5
        q = self.vectorized[f"forward/{name}q"][0, :, h * D : (h + 1) * D]
        looks = np.triu(np.ones(dscores.shape, bool))  # t >= u
        return Example(
            stop, h, u, d,
            [(t, float(dscores[t, u]), float(q[t, d])) for t in range(u, len(q))],
            [self._factor(f"dscores of head {h}, transposed", dscores.T, ("U", "T"), looks),
             self._factor(f"q of head {h}", q, ("T", "D")),
             self._factor(f"dk of head {h}", dscores.T @ q, ("U", "D"))],
        )  # fmt: skip

    def _factor(
        self, title: str, matrix: Array, axes: Sequence[str], there: Array | None = None
    ) -> Shown:
        """A factor of the product, or the product, as a picture and numbers."""
        down, across = (LABELS[letter] for letter in axes)
        title, scale = f"{title}: {down} down, {across} across", float(np.abs(matrix).max())
        lines = rows(matrix, axes, [f"{down}={i}" for i in range(len(matrix))], lists=False)
        picture = self._picture(matrix, scale, axes, there, title)
        return Shown("", title, [picture], scale, Numbers(lines, [], 0))

    # --- the map of the way, and the texts ---

    def groups(self) -> list[tuple[str, list[tuple[Link, Link, list[Link]]]]]:
        """Links to each tap, its derivative and the gradients of parameters behind the derivative.

        They are grouped by the function that computes the tap.
        """
        found: dict[str, list[tuple[Link, Link, list[Link]]]] = {}
        place = "embedding"
        for name, tap in self.table.items():
            layer = layer_of(name).replace("layer", "layer ").removesuffix(".")
            place = layer or ("output" if place.startswith("layer") else place)
            homes = [Link(f"d{param}", f"d{short(param)}") for param in self._settled(name)]
            links = Link(name, short(name)), Link(f"d{name}", f"d{short(name)}"), homes
            found.setdefault(f"{place}: {tap.within}", []).append(links)
        return list(found.items())

    def texts(self) -> list[Text]:
        """The sources of both models, function by function, with links from names to stops."""
        links = dict(self.links)
        for name in (*self.table, *self.params):
            if layer_of(name) in ("", "layer0."):
                trees = ("dtap", "dtap_i") if name in self.table else ("dw", "dparams")
                links |= {f"{tree}.{short(name)}": f"d{name}" for tree in trees}
                if name in self.table:
                    links[f"tap.{short(name)}"] = name
        return texts(*self.sources, Source("scalar/value.py"), links)


def short(name: str) -> str:
    """A name without its layer."""
    return name.rpartition(".")[2]


def layer_of(name: str) -> str:
    """The layer in a name, as `layer0.`; "" if it has none."""
    return "".join(name.rpartition(".")[:2])


def in_words(name: str, shape: Sequence[int]) -> str:
    """A shape in words: "5 positions x 16 channels"."""
    words = [(n, *LETTERS[letter]) for letter, n in zip(axes_of(name), shape)]
    parts = [f"{n:,} {one if n == 1 else several}" for n, one, several in words]
    return " x ".join(parts) or "a single number"


def _operand(numbers: Any) -> str:
    """The numbers of an operand as text, up to 16 of them."""
    if not np.ndim(numbers):
        return f"{float(numbers):.5g}"
    flat = np.asarray(numbers).reshape(-1)
    text = "  ".join(f"{x:.4g}" for x in flat[:16])
    return text if len(flat) <= 16 else f"{text}  .. ({len(flat)} numbers)"
