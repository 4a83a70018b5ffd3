"""Each function by itself: the inputs that it gets, and what it should make of them.

Inputs are recorded from the text while it computes the cases and models drawn at random, whose axes
differ in size; and drawn directly, for functions of single rows. What a function should give back
is what the shipped one gives for them. A backward function is also held to the derivative of the
shipped forward function along a direction, by a complex step.
"""

from __future__ import annotations

import ast
import cmath
import copy
import dataclasses
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np

from crosscheck.candidate import (
    RESULTS,
    TEXTS,
    Candidate,
    Told,
    as_our_array,
    in_place,
    text_functions,
    to_theirs,
    watched,
)
from crosscheck.cases import Case, case_names, draw_params, load_case, with_params
from crosscheck.compare import simplicity
from crosscheck.noise import ULP
from crosscheck.tolerance import FACTOR, RTOL
from crosscheck.trace import backward_order
from crosscheck.witness import STEP
from microgpt.backend import State, fresh_state
from microgpt.layout import Tree, grow
from microgpt.settings import config_from
from microgpt.taps import ACTIVATIONS
from vectorized.batch import pad

Array = Any
OUTPUTS = {"forward": ("tap",), "backward": ("dw", "dparams", "dtap")}  # trees that are filled
IN_PLACE = {"adam": ("params", "m", "v")}
MOST = 40  # inputs of a function
UNUSUAL = ("impossible-padding",)  # holds infinities in padding, which nothing depends on
LARGEST_LOSS = 30.0  # of a position in a model drawn at random
ENOUGH = 2.0  # seconds, after which no more inputs are counted that fail
RUNS = 2  # of the shipped function with its input moved by rounding


@dataclass(eq=False)
class Input:
    """What a function is called with, and what it should make of that."""

    function: str
    origin: str  # where it comes from, in words
    args: list[Any]
    wanted: dict[str, Array] = field(default_factory=dict)
    case: Case | None = None
    traits: tuple[str, ...] = ()  # what is special about it

    @property
    def names(self) -> list[str]:
        """What the arguments are called."""
        return ARGUMENTS[self.function]


@dataclass
class Wrong:
    """What a function got wrong, alone: everything a report says about it."""

    function: str
    origin: str
    problem: str
    line: str = ""
    label: str = ""  # of the result: dx, dw.attn_wq
    shape: tuple[int, ...] = ()
    index: tuple[int, ...] = ()
    reference: float = 0.0
    candidate: float = 0.0
    exceeding: int = 0
    elements: int = 0
    arguments: str = ""
    share: str = ""  # how many inputs fail, and which
    case: Case | None = None
    evidence: list[tuple[Input, Mapping[str, Array]]] = field(default_factory=list)


class _Arguments(dict[str, list[str]]):
    def __missing__(self, name: str) -> list[str]:
        function = text_functions("vectorized")[name]
        self[name] = list(inspect.signature(function).parameters)
        return self[name]


ARGUMENTS = _Arguments({"loss_and_grads": ["params", "docs", "config"]})


# --- inputs --------------------------------------------------------------------------------------


def inputs(names: list[str], seed: int) -> dict[str, list[Input]]:
    """The inputs of each of these functions of vectorized/, with what it should make of them."""
    found: dict[str, list[Input]] = {name: [] for name in names}
    models = [*stored_cases(), *drawn_cases(seed)]
    for case in models:
        for one in recorded(case, names):
            found[one.function].append(one)
    shipped = text_functions("vectorized")
    for name in names:
        if len(found[name]) > MOST:
            order = Random(seed).sample(range(len(found[name])), MOST)
            found[name] = [found[name][i] for i in sorted(order)]
        direct = [
            Input(name, f"numbers drawn {words}", args, traits=traits)
            for words, traits, args in (DIRECT[name](seed) if name in DIRECT else ())
        ]
        for one in direct:
            one.wanted = outputs(name, call(shipped[name], one.args), one.args)
        found[name] = [*direct[:1], *found[name], *direct[1:]]
    return found


def stored_cases() -> list[Case]:
    """The cases with finite numbers, the smallest models first."""
    cases = [load_case(name) for name in case_names() if name not in UNUSUAL]
    return sorted(cases, key=lambda case: simplicity(case, 1))


def drawn_cases(seed: int, count: int = 14) -> list[Case]:
    """Models drawn at random, no two axes of one size; among them one position, one document, one
    head, one channel a head, three layers, tied weights, rows of zeros."""
    rng, found = Random(seed), []
    for number in range(count):
        H, D, L = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 5]), rng.choice([1, 2, 3])
        T = 1 if number % 7 == 1 else rng.choice([2, 3, 4, 5, 6, 7])
        B = 1 if number % 5 == 2 else rng.choice([2, 3, 4, 6])
        while len({H * D, T, B, *([H, D] if number % 3 else [])}) < (5 if number % 3 else 3):
            H, D = rng.choice([1, 2, 3, 4]), rng.choice([1, 2, 3, 5])
            T, B = (1 if T == 1 else rng.randint(2, 8)), (1 if B == 1 else rng.randint(2, 7))
            if (T == 1) + (B == 1) and H * D not in (T, B):
                break
        config = config_from(
            {
                "n_layer": L,
                "n_embd": H * D,
                "n_head": H,
                "block_size": T + rng.choice([0, 1]),
                "norm_embedding": rng.random() < 0.7,
                "activation": [*ACTIVATIONS][number % len(ACTIVATIONS)],
                "tie_lm_head": rng.random() < 0.3,
                "norm_eps": rng.choice([1e-5, 1e-2]),
                "init_std": rng.choice([0.3, 1.0]),
                "init_std_residual": rng.choice([0.3, 1.0]),
                "weight_decay": rng.choice([0.0, 0.1]),
                "grad_clip": rng.choice([0.0, 0.5]),
                "seed": rng.randrange(1000),
            },
            "drawn at random",
        )
        chars = "abcdefghi"[: rng.randint(2, 9)]
        longest = max(1, T - 1)
        docs = [[rng.choice(chars) for _ in range(longest)]]
        docs += [[rng.choice(chars) for _ in range(rng.randint(1, longest))] for _ in range(B - 1)]
        if T == 1:
            config = dataclasses.replace(config, block_size=1)
        rng.shuffle(docs)
        name = f"drawn-{number + 1}"
        batch = ["".join(doc) for doc in docs]
        zeros = "rows of zeros" if number % 4 == 3 else ""
        case = Case(name, "", config, chars, [batch], kink=zeros, random="drawn at random")
        params = {p: np.array(x) for p, x in draw_params(case).items()}
        if zeros:
            for x in params.values():
                x[:: rng.choice([2, 3])] = 0.0
        found.append(_tame(with_params(case, params)))
    return found


def _tame(case: Case) -> Case:
    """The case with weights so small that every probability is a number, not 0."""
    while not _losses(case).max() < LARGEST_LOSS:
        case = with_params(case, {name: x / 2 for name, x in case.params.items()})
    return case


def _losses(case: Case) -> Array:
    with np.errstate(all="ignore"):
        return np.nan_to_num(watched_backend(case).worker.losses(case.docs(0)), nan=np.inf)


def recorded(case: Case, names: list[str]) -> Iterator[Input]:
    """The calls of these functions while the shipped text computes a step."""
    calls: list[Input] = []
    shipped = text_functions("vectorized")

    def recorder(name: str) -> Callable[..., Any]:
        def record(*args: Any) -> Any:
            kept = copied(args)
            result = shipped[name](*args)
            wanted = outputs(name, result, args)
            number = 1 + sum(one.function == name for one in calls)
            words = f"case {case.name}, call {number}"
            calls.append(Input(name, words, kept, copied(wanted), case, traits(case)))
            return result

        return record

    modules = [import_module(name) for name in (*TEXTS["vectorized"], "vectorized.backend")]
    before = [(module, name, vars(module)[name]) for module in modules for name in names
              if vars(module).get(name) is shipped.get(name) is not None]  # fmt: skip
    for module, name, _ in before:
        setattr(module, name, recorder(name))
    try:
        backend = watched_backend(case)
        with np.errstate(all="ignore"):
            loss = backend.forward(case.docs(0))
            backend.backward()
            if "loss_and_grads" in names:
                args = [dict(case.params), case.docs(0), case.config]
                args[0] = {name: np.array(x) for name, x in case.params.items()}
                grads = backend.grads()
                wanted = {"loss": np.array(loss)}
                wanted |= {f"d{k}": np.array(grads[k]) for k in backward_order(grads)}
                calls.append(
                    Input("loss_and_grads", f"case {case.name}", args, wanted, case, traits(case))
                )
            if {"adam", "clip"} & set(names):
                backend.update(0.01)
                backend.update(0.01)
            if "probabilities" in names and not case.name.startswith("drawn"):
                with patch("vectorized.backend.most_walkers", lambda _: 1):  # on plain arrays
                    backend.sample(case.tokenizer, Random(0), 1, case.temperature, [], 2)
                    backend.sample(case.tokenizer, Random(0), 1, 0.0, [])
    finally:
        for module, name, function in before:
            setattr(module, name, function)
    first = [one for one in calls if one.function in names]
    yield from first


def watched_backend(case: Case, start: State | None = None) -> Any:
    """vectorized/ as it stands, for this case."""
    from vectorized.backend import Backend

    return Backend(case.config, start or fresh_state(case.params), watch=True)


def traits(case: Case) -> tuple[str, ...]:
    """What is special about a case's first batch and model, in words."""
    docs, config = case.docs(0), case.config
    B, T = len(docs), max(map(len, docs)) - 1
    lengths = {len(doc) for doc in docs}
    return tuple(
        words
        for words, holds in (
            ("T = 1", T == 1),
            ("T > 1", T > 1),
            ("B = 1", B == 1),
            ("B > 1", B > 1),
            ("documents of different length", len(lengths) > 1),
            ("a token that occurs again", any(len({*doc[:-1]}) < len(doc) - 1 for doc in docs)),
            ("one layer", config.n_layer == 1),
            ("n_layer >= 2", config.n_layer >= 2),
            ("n_layer >= 3", config.n_layer >= 3),
            ("n_head = 1", config.n_head == 1),
            ("n_head > 1", config.n_head > 1),
            ("B other than T", T != B),
            ("an lm_head of its own", not config.tie_lm_head),
            ("tie_lm_head", config.tie_lm_head),
            ("norm_embedding off", not config.norm_embedding),
            *((f"activation {kind}", config.activation == kind) for kind in ACTIVATIONS),
        )
        if holds
    )


Drawn = tuple[str, tuple[str, ...], list[Any]]
SHAPES = [(2, 3, 5), (1, 1, 1), (1, 1, 4), (3, 1, 2), (1, 4, 3), (4, 2, 1), (5, 4, 7), (2, 2, 2)]
SIZES = [(1.0, ""), (1e8, "and large"), (1e-8, "and tiny"), (0.0, "and some zero")]


def _drawn(seed: int) -> Iterator[tuple[str, tuple[str, ...], np.random.Generator, Any, Any]]:
    """Shapes and sizes: words, traits, a generator, a function that draws, the shape."""
    rng = np.random.default_rng(seed)
    for shape, (size, words) in product(SHAPES, SIZES):

        def numbers(shape: Any, size: float = size) -> Array:
            x = rng.standard_normal(shape) * (size or 1.0)
            return x * rng.integers(0, 2, shape) if size == 0.0 else x

        B, T, n = shape
        about = tuple(
            words
            for words, holds in (
                ("T = 1", T == 1),
                ("T > 1", T > 1),
                ("B = 1", B == 1),
                ("B > 1", B > 1),
                ("one channel", n == 1),
                ("an odd number of channels", n % 2 == 1),
                ("axes of different size", len({*shape}) == 3),
                ("large numbers", size > 1),
                ("tiny numbers", 0 < size < 1),
                ("zeros", size == 0),
            )
            if holds
        )
        yield words or "at random", about, rng, numbers, shape


def _linear(seed: int, backward: bool) -> Iterator[Drawn]:
    for words, about, rng, draw, (B, T, n) in _drawn(seed):
        o = int(rng.integers(1, 9))
        x, w = draw((B, T, n)), draw((o, n), 1.0)
        yield words, about, [draw((B, T, o), 1.0), x, w] if backward else [x, w]


def _rows(seed: int, function: str) -> Iterator[Drawn]:
    text = text_functions("vectorized")
    for words, about, rng, draw, shape in _drawn(seed):
        x, dy = draw(shape), rng.standard_normal(shape)
        if function.startswith("softmax"):
            x = np.clip(x, -600, 600)
        if function.endswith("forward"):
            extra = [1e-5] if function == "rmsnorm_forward" else []
            yield words, about, [x, *extra]
        elif function == "softmax_backward":
            yield words, about, [dy, text["softmax_forward"](x)]
        else:
            yield words, about, [dy, *text["rmsnorm_forward"](x, 1e-5)]


def _activations(seed: int, backward: bool) -> Iterator[Drawn]:
    kinds = [*ACTIVATIONS]
    for i, (words, about, rng, draw, shape) in enumerate(_drawn(seed)):
        kind = kinds[i // len(SIZES) % len(kinds)]
        x = np.clip(draw(shape), -1e3, 1e3)
        about = (*about, f"activation {kind}")
        yield words, about, [*([rng.standard_normal(shape)] if backward else []), x, kind]


def _cross_entropies(seed: int, backward: bool) -> Iterator[Drawn]:
    text = text_functions("vectorized")
    for words, about, rng, draw, shape in _drawn(seed):
        logits, targets = np.clip(draw(shape), -30, 30), rng.integers(0, shape[-1], shape[:2])
        if backward:
            _, probs = text["cross_entropy_forward"](logits, targets)
            yield words, about, [rng.random(shape[:2]), probs, targets]
        else:
            yield words, about, [logits, targets]


DIRECT: dict[str, Callable[[int], Any]] = {
    "linear_forward": lambda seed: _linear(seed, False),
    "linear_backward": lambda seed: _linear(seed, True),
    "softmax_forward": lambda seed: _rows(seed, "softmax_forward"),
    "softmax_backward": lambda seed: _rows(seed, "softmax_backward"),
    "rmsnorm_forward": lambda seed: _rows(seed, "rmsnorm_forward"),
    "rmsnorm_backward": lambda seed: _rows(seed, "rmsnorm_backward"),
    "activation_forward": lambda seed: _activations(seed, False),
    "activation_backward": lambda seed: _activations(seed, True),
    "cross_entropy_forward": lambda seed: _cross_entropies(seed, False),
    "cross_entropy_backward": lambda seed: _cross_entropies(seed, True),
}


# --- what a call gives ---------------------------------------------------------------------------


def call(function: Callable[..., Any], args: list[Any]) -> Any:
    """What a shipped function returns."""
    with np.errstate(all="ignore"):
        return function(*args)


def copied(x: Any) -> Any:
    """A copy that shares no numbers."""
    return copy.deepcopy(x)


def outputs(name: str, result: Any, args: Any) -> dict[str, Array]:
    """What a call gave back and wrote, by name: dx, dw.attn_wq, tap.layer0.q."""
    labels = RESULTS.get(name, "").split()
    found = dict(zip(labels, result if len(labels) > 1 else [result]))
    for argument, x in zip(ARGUMENTS[name], args):
        if isinstance(x, Tree) and argument in _filled(name):
            found.update(leaves(x, f"{argument}."))
        elif argument in IN_PLACE.get(name, ()):
            found[argument] = x
    return found


def leaves(tree: Tree, prefix: str) -> dict[str, Array]:
    """The tensors of a tree by name."""
    found = {f"{prefix}{name}": x for name, x in vars(tree).items() if name != "layers"}
    for i, layer in enumerate(getattr(tree, "layers", [])):
        found |= leaves(layer, f"{prefix}layer{i}.")
    return found


def _filled(name: str) -> tuple[str, ...]:
    """The trees that a function fills."""
    return OUTPUTS["backward" if name.endswith("_backward") else "forward"]


def _changed(one: Input, given: list[Any]) -> str:
    """The first input that a call has written into; "" if none."""
    for name, before, after in zip(one.names, one.args, given):
        if name in IN_PLACE.get(one.function, ()) or name in ("cache", "caches"):
            continue
        if isinstance(before, Tree):
            if name in _filled(one.function):
                continue
            was, now = leaves(before, f"{name}."), leaves(after, f"{name}.")
            for label, x in was.items():
                if label not in now or not _same(x, now[label]):
                    return label
        elif isinstance(before, dict):
            for label, x in before.items():
                if label not in after or not _same(x, after[label]):
                    return f"{name}[{label!r}]"
        elif isinstance(before, tuple) and hasattr(before, "_fields"):
            for label, x, y in zip(before._fields, before, after):
                if not _same(x, y):
                    return f"{name}.{label}"
        elif (isinstance(before, np.ndarray) and not _same(before, after)) or (
            isinstance(before, list) and before != after
        ):
            return name
    return ""


def _same(a: Any, b: Any) -> bool:
    x, y = np.asarray(a), np.asarray(b)
    return x.shape == y.shape and bool(np.array_equal(x, y, equal_nan=x.dtype.kind == "f"))


# --- alone ---------------------------------------------------------------------------------------


def alone(candidate: Candidate, name: str, given: list[Input]) -> Wrong | None:
    """The first thing that a function gets wrong on these inputs, by itself.

    Raises Told for what is no matter of numbers.
    """
    kept: list[tuple[dict[str, Array], dict[str, Array], str]] = []
    failed: list[Input] = []
    evidence: list[tuple[Input, Mapping[str, Array]]] = []
    first: Wrong | None = None
    tried: list[Input] = []
    since = time.monotonic()
    with in_place(candidate, [name]) as guards:
        for one in given:
            if first and time.monotonic() - since > ENOUGH:
                break
            tried.append(one)
            args = copied(one.args)
            try:
                if name == "loss_and_grads":
                    found = loss_and_grads(candidate, args)
                else:
                    found = outputs(name, guards[name](*args), args)
                written = _changed(one, args)
                if written:
                    line = candidate.statement(name, _writes_to(written.partition(".")[0]))
                    raise Told(name, f"writes into {written}, which is its input", line)
                noise = _noise(one)
                wrong = _compared(candidate, one, found, noise)
                if not wrong and name in WITNESSED:
                    wrong = _witnessed(candidate, one, found, noise)
            except Told as told:
                if first is None:
                    told.words += f"\non {one.origin}: {shapes(one)}"
                    raise
                continue
            kept.append((found, copied(found), one.origin))
            if wrong:
                failed.append(one)
                evidence.append((one, copied(found)))
                first = first or wrong
        for found, before, origin in kept:
            for label in found if first is None else ():
                if not _same(found[label], before[label]):
                    words = (
                        f"returns {label} in memory that it writes again later: what it returned"
                        f"\non {origin} has changed since"
                    )
                    raise Told(name, words, candidate.line_of(name))
    if first:
        first.share = _shared(failed, tried)
        first.evidence = [*evidence[:: len(evidence) // 3 + 1], evidence[-1]]
    return first


def _writes_to(name: str) -> Callable[[Any], bool]:
    def writes(node: Any) -> bool:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for target in targets if isinstance(node, (ast.Assign, ast.AugAssign)) else []:
            plain = isinstance(target, ast.Name) and isinstance(node, ast.Assign)
            while isinstance(target, (ast.Subscript, ast.Attribute)):
                target = target.value
            if isinstance(target, ast.Name) and target.id == name and not plain:
                return True
        return False

    return writes


def loss_and_grads(candidate: Candidate, args: list[Any]) -> dict[str, Array]:
    """What the candidate's own loss_and_grads gives, by name.

    Raises Told if that is not a loss and gradients by name.
    """
    name = "loss_and_grads"
    candidate.calls[name] += 1
    theirs = candidate.functions[name]
    given = list(args)
    if candidate.torch:
        given[0] = {k: to_theirs(x) for k, x in given[0].items()}
    result = watched(candidate, name, lambda: theirs(*given))
    line = candidate.line_of(name)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Told(
            name, f"returns {type(result).__name__}; expected loss, {{name: gradient}}", line
        )
    loss, grads = result
    if not isinstance(grads, Mapping):
        words = f"returns {type(grads).__name__} for the gradients; expected {{name: gradient}}"
        raise Told(name, words, line)
    found: dict[str, Array] = {}
    for label, x in {"loss": loss, **{f"d{k}": x for k, x in grads.items()}}.items():
        try:
            found[label] = as_our_array(x)
        except ValueError as error:
            raise Told(name, f"returns {error} for {label}", line) from None
    return found


def _compared(
    candidate: Candidate, one: Input, found: Mapping[str, Array], noise: Mapping[str, Array]
) -> Wrong | None:
    """The first result that is not as it should be."""
    name, line = one.function, candidate.line_of(one.function)
    base = Wrong(name, one.origin, "", line, arguments=shapes(one), case=one.case)
    for label, ours in one.wanted.items():
        if label not in found:
            tree = label.partition(".")[0]
            if tree == "dtap" or (tree == "tap" and _other_half(name) in candidate.functions):
                continue
            words = f"does not write {label}" if tree in ("tap", "dw", "dparams") else (
                f"gives no {label}"
            )  # fmt: skip
            return dataclasses.replace(base, problem=words, label=label)
        theirs, ours = np.asarray(found[label]), np.asarray(ours)
        if theirs.shape != ours.shape:
            words = f"gives {label} of shape {theirs.shape}, and should {ours.shape}"
            return dataclasses.replace(base, problem=words, label=label)
        if ours.dtype.kind == "f" and theirs.dtype != ours.dtype and theirs.ndim:
            words = f"gives {label} in {theirs.dtype}, and should in {ours.dtype}"
            if "jax" in sys.modules:
                words += "; for JAX: jax.config.update('jax_enable_x64', True)"
            return dataclasses.replace(base, problem=words, label=label)
        with np.errstate(all="ignore"):
            apart = np.abs(theirs.astype("float64") - ours)
            bound = np.maximum(RTOL * np.abs(ours), FACTOR * noise[label])
            good = (theirs == ours) | (np.isnan(theirs) & np.isnan(ours)) | (apart <= bound)
        if not good.all():
            size = np.where(good, -1.0, np.nan_to_num(apart, nan=np.inf))
            at = np.unravel_index(int(np.argmax(size)), ours.shape)
            index = tuple(int(i) for i in at)
            return dataclasses.replace(
                base,
                problem=f"gives wrong numbers in {label}",
                label=label,
                shape=ours.shape,
                index=index,
                reference=float(ours[index]),
                candidate=float(theirs[index]),
                exceeding=int((~good).sum()),
                elements=ours.size,
            )
    extra = [label for label in found if label not in one.wanted and name == "loss_and_grads"]
    if extra:
        return dataclasses.replace(
            base, problem=f"gives {extra[0]}, and there is no such parameter"
        )
    return None


def _other_half(name: str) -> str:
    return name.replace("_forward", "_backward")


def _noise(one: Input) -> dict[str, Array]:
    """How far each result moves when every number of the input moves by its last place."""
    rng = np.random.default_rng(0)
    runs = []
    for _ in range(RUNS):
        args = _moved(one.args, rng)
        if one.function == "loss_and_grads":
            assert one.case is not None
            backend = watched_backend(with_params(one.case, args[0]))
            loss = backend.forward(args[1])
            backend.backward()
            again: dict[str, Any] = {"loss": loss}
            again |= {f"d{k}": x for k, x in backend.grads().items()}
        else:
            result = call(text_functions("vectorized")[one.function], args)
            again = outputs(one.function, result, args)
        runs.append(again)
    found = {}
    for label, ours in one.wanted.items():
        with np.errstate(all="ignore"):
            ours = np.asarray(ours, "float64")
            moves = [np.abs(np.asarray(run[label]) - ours) for run in runs]
            most = np.nan_to_num(np.max(moves, axis=0), nan=0.0, posinf=0.0)
            row = np.sqrt((most**2).mean(-1, keepdims=True)) if most.ndim else most
        found[label] = np.where(ours == 0.0, most, np.maximum(most, row))
    return found


def _moved(x: Any, rng: np.random.Generator) -> Any:
    """The same with every number of every array moved by one unit in the last place."""
    if isinstance(x, np.ndarray):
        return x + ULP * x * rng.choice((-1, 1), x.shape) if x.dtype.kind == "f" else x.copy()
    if isinstance(x, Tree):
        tree = Tree()
        vars(tree).update({name: _moved(y, rng) for name, y in vars(x).items()})
        return tree
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(_moved(y, rng) for y in x))
    if isinstance(x, dict):
        return {name: _moved(y, rng) for name, y in x.items()}
    return [_moved(y, rng) for y in x] if isinstance(x, list) else copied(x)


def shapes(one: Input) -> str:
    """The arguments that are arrays, with their shapes."""
    words = []
    for name, x in zip(one.names, one.args):
        if isinstance(x, np.ndarray):
            words.append(f"{name} {x.shape}")
        elif name == "docs":
            words.append(f"docs of {', '.join(str(len(doc)) for doc in x)} tokens")
        elif isinstance(x, (float, str)):
            words.append(f"{name} {x}")
    return ", ".join(words)


def _shared(failed: list[Input], given: list[Input]) -> str:
    """How many inputs fail, and what these have that the others have not."""
    count = f"{len(failed)} of {len(given)} inputs"
    passed = [one for one in given if one not in failed]
    if not passed:
        return f"all {len(given)} inputs"
    common = [
        words
        for words in failed[0].traits
        if all(words in one.traits for one in failed)
        and not any(words in one.traits for one in passed)
    ]
    if common:
        return f"{count}: those with {' and '.join(common[:2])}"
    every = [
        words
        for words in failed[0].traits
        if all(words in one.traits for one in failed)
        and sum(words in one.traits for one in passed) < len(passed) / 2
    ]
    if every:
        return f"{count}, all of them with {' and '.join(every[:2])}"
    return count


# --- the complex step ----------------------------------------------------------------------------


Direction = dict[str, Array]  # by the result that is the derivative along it


def _linear_way(one: Input, direction: Callable[[Array], Array]) -> tuple[Array, Direction]:
    _, x, w = one.args
    ways = {"dx": direction(x), "dw": direction(w)}
    return _text("linear_forward")(_step(x, ways["dx"]), _step(w, ways["dw"])), ways


def _softmax_way(one: Input, direction: Callable[[Array], Array]) -> tuple[Array, Direction]:
    x = np.log(one.args[1])
    way = np.where(np.isfinite(x), direction(x), 0.0)
    return _text("softmax_forward")(_step(x, way)), {"dx": way}


def _rmsnorm_way(one: Input, direction: Callable[[Array], Array]) -> tuple[Array, Direction]:
    _, y, scale = one.args
    x = y / scale
    eps = scale**-2.0 - (x * x).mean(axis=-1, keepdims=True)
    way = direction(x)
    return _text("rmsnorm_forward")(_step(x, way), eps)[0], {"dx": way}


def _activation_way(one: Input, direction: Callable[[Array], Array]) -> tuple[Array, Direction]:
    _, x, kind = one.args
    way = np.where(x == 0.0, 0.0, direction(x))  # not where the slope jumps
    return _text("activation_forward")(_step(x, way), kind), {"dx": way}


def _cross_entropy_way(one: Input, direction: Callable[[Array], Array]) -> tuple[Array, Direction]:
    _, probs, targets = one.args
    logits = np.log(probs)
    way = np.where(np.isfinite(logits), direction(logits), 0.0)
    return _text("cross_entropy_forward")(_step(logits, way), targets)[0], {"dlogits": way}


def _block_way(one: Input, direction: Callable[[Array], Array]) -> tuple[Array, Direction]:
    """Of attention and MLP: their input, and every weight of theirs."""
    args = dict(zip(one.names, one.args))
    block = "mlp" if one.function == "mlp_backward" else "attn"
    norm, scale = (getattr(args["tap"], f"{block}_{name}") for name in ("norm", "scale"))
    x = norm / scale
    ways = {"dx": direction(x)}
    w = Tree()
    for name, weight in vars(args["w"]).items():
        if name.startswith(f"{block}_"):
            ways[f"dw.{name}"] = direction(weight)
            setattr(w, name, _step(weight, ways[f"dw.{name}"]))
    moved = _step(x, ways["dx"])
    if block == "mlp":
        return _text("mlp_forward")(moved, w, args["config"], Tree()), ways
    mask = _text("causal_mask")(x.shape[1], np.dtype("float64"))
    return _text("attention_forward")(moved, w, None, mask, args["config"], Tree()), ways


def _whole_way(one: Input, direction: Callable[[Array], Array]) -> tuple[Array, Direction]:
    """Of a whole model: every parameter."""
    params, docs, config = one.args
    ways = {f"d{name}": direction(x) for name, x in params.items()}
    tree = grow({name: _step(x, ways[f"d{name}"]) for name, x in params.items()}, config.n_layer)
    batch = pad(docs, np.dtype("float64"))
    return _text("loss_forward")(batch, tree, config, Tree(config.n_layer)), ways


def _text(name: str) -> Callable[..., Any]:
    return text_functions("vectorized")[name]


def _step(x: Array, way: Array) -> Array:
    return x + 1j * STEP * way


WITNESSED: dict[str, Callable[..., tuple[Array, Direction]]] = {
    "linear_backward": _linear_way,
    "softmax_backward": _softmax_way,
    "rmsnorm_backward": _rmsnorm_way,
    "activation_backward": _activation_way,
    "cross_entropy_backward": _cross_entropy_way,
    "attention_backward": _block_way,
    "mlp_backward": _block_way,
    "loss_and_grads": _whole_way,
}
WITNESS = 1e-7  # of the size of the terms: operands that are made from results have lost digits


def _witnessed(
    candidate: Candidate, one: Input, found: Mapping[str, Array], noise: Mapping[str, Array]
) -> Wrong | None:
    """A derivative that does not agree with the shipped forward function, by a complex step."""
    if one.case and one.case.kink:
        return None  # where a slope jumps, either is right
    rng = np.random.default_rng(0)
    dy = 1.0 if one.function == "loss_and_grads" else np.asarray(one.args[0])
    with np.errstate(all="ignore"):
        y, ways = WITNESSED[one.function](one, lambda x: rng.standard_normal(np.shape(x)))
        terms = np.where(dy == 0.0, 0.0, dy * np.imag(y) / STEP)
        wanted, size = float(terms.sum()), float(np.abs(terms).sum())
        products = [np.asarray(found[label]) * way for label, way in ways.items()]
        given = sum(float(x.sum()) for x in products)
        size += sum(float(np.abs(x).sum()) for x in products)
        lost = sum(float((noise[label] * np.abs(way)).sum()) for label, way in ways.items())
    if not np.isfinite(wanted) or abs(given - wanted) <= WITNESS * size + FACTOR * lost:
        return None
    forward = one.function.replace("_backward", "_forward")
    forward = "the loss" if forward == "loss_and_grads" else forward
    words = f"gives {given:.9g} along a direction in which {forward} has the slope {wanted:.9g}"
    return Wrong(one.function, one.origin, words, candidate.line_of(one.function),
                 arguments=shapes(one), case=one.case)  # fmt: skip


# --- a Value -------------------------------------------------------------------------------------

OPERATIONS: dict[str, tuple[int, Callable[..., Any], Callable[..., Any]]] = {
    "a + b": (2, lambda a, b: a + b, lambda a, b: a + b),
    "a * b": (2, lambda a, b: a * b, lambda a, b: a * b),
    "a ** 3": (1, lambda a: a**3, lambda a: a**3),
    "a ** -0.5": (1, lambda a: a**-0.5, lambda a: a**-0.5),
    "a.log()": (1, lambda a: a.log(), cmath.log),
    "a.exp()": (1, lambda a: a.exp(), cmath.exp),
    "a.relu()": (1, lambda a: a.relu(), lambda a: a if a.real > 0 else 0 * a),
    "(a - 9).relu()": (1, lambda a: (a - 9).relu(), lambda a: 0 * a),
    "a.tanh()": (1, lambda a: a.tanh(), cmath.tanh),
    "-a": (1, lambda a: -a, lambda a: -a),
    "a - b": (2, lambda a, b: a - b, lambda a, b: a - b),
    "a / b": (2, lambda a, b: a / b, lambda a, b: a / b),
    "2 + a": (1, lambda a: 2 + a, lambda a: 2 + a),
    "2 * a": (1, lambda a: 2 * a, lambda a: 2 * a),
    "a + a": (1, lambda a: a + a, lambda a: a + a),
    "a * a": (1, lambda a: a * a, lambda a: a * a),
    "a * b + a": (2, lambda a, b: a * b + a, lambda a, b: a * b + a),
    "c * c, c = a * b": (2, lambda a, b: (c := a * b) * c, lambda a, b: (a * b) ** 2),
}
NEEDED_BY_GELU = "a.tanh()"


def value_alone(candidate: Candidate) -> Wrong | None:
    """The first operation of a Value whose number or derivative is wrong, by a complex step."""
    rng, value = Random(candidate.seed), candidate.functions["Value"]
    for formula, (count, theirs, ours) in OPERATIONS.items():
        if formula == NEEDED_BY_GELU and not hasattr(value, "tanh"):
            continue
        for _ in range(3):
            numbers = [rng.uniform(0.2, 3.0) for _ in range(count)]
            leaves_ = [value(x) for x in numbers]

            def call(leaves_: list[Any] = leaves_, theirs: Callable[..., Any] = theirs) -> Any:
                result = theirs(*leaves_)
                result.backward()
                return result

            result = watched(candidate, "Value", call)
            candidate.calls["Value"] += 1
            wanted = {"the value": (complex(ours(*numbers)).real, result.data)}
            for i, (letter, leaf) in enumerate(zip("ab", leaves_)):
                moved = [x + 1j * STEP * (i == j) for j, x in enumerate(numbers)]
                wanted[f"d{letter}"] = complex(ours(*moved)).imag / STEP, leaf.grad
            for label, (right, found) in wanted.items():
                if not abs(found - right) <= 1e-12 * max(1.0, abs(right)) * bool(right):
                    given = ", ".join(f"{a} = {x!r}" for a, x in zip("ab", numbers))
                    return Wrong("Value", formula, f"gives wrong numbers in {label}", label=label,
                                 reference=right, candidate=float(found), exceeding=1, elements=1,
                                 arguments=given, line=candidate.line_of("Value"))  # fmt: skip
    return None
