"""The inputs on which a candidate's function is checked by itself, with the results it should give.

The calls of the text's own functions are recorded while the text computes the cases, and models
drawn at random whose axes differ in size. For functions of rows, more inputs are drawn directly.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np

from crosscheck.candidate import RESULTS, replaced, text_functions
from crosscheck.cases import Case, case_names, draw_params, load_case, with_params
from crosscheck.compare import simplicity
from crosscheck.trace import backward_order
from microgpt.backend import State, fresh_state
from microgpt.layout import Tree, grow, pick
from microgpt.settings import config_from
from microgpt.taps import ACTIVATIONS
from vectorized.batch import pad

Array = Any
OUTPUTS = {"forward": ("tap",), "backward": ("dtap", "dw", "dparams")}  # arguments to be filled
IN_PLACE = {"adam": ("m", "v", "params")}  # arguments to be updated
MOST = 40  # recorded inputs of a function
LAYER = re.compile(r"layer(\d+)\.")
UNUSUAL = ("impossible-padding",)  # has infinities in its padding
LARGEST_LOSS = 30.0  # of a position in a model drawn at random


@dataclass(eq=False)
class Input:
    """The arguments of a call, and the results that it should give."""

    function: str
    origin: str  # where the arguments come from, in words
    args: list[Any]
    wanted: dict[str, Array] = field(default_factory=dict)
    case: Case | None = None
    traits: tuple[str, ...] = ()  # properties by which inputs that fail are told from others
    noise: dict[str, Array] = field(default_factory=dict)  # of each result, once it is measured

    @property
    def names(self) -> list[str]:
        """The names of the arguments."""
        return ARGUMENTS[self.function]


class _Arguments(dict[str, list[str]]):
    """The names of a function's arguments, by the function's name."""

    def __missing__(self, name: str) -> list[str]:
        function = text_functions("vectorized")[name]
        self[name] = list(inspect.signature(function).parameters)
        return self[name]


ARGUMENTS = _Arguments({"loss_and_grads": ["params", "docs", "config"]})


# --- inputs --------------------------------------------------------------------------------------


def inputs(names: list[str], seed: int) -> dict[str, list[Input]]:
    """The inputs of each of these functions of vectorized/, by the function's name."""
    found: dict[str, list[Input]] = {name: [] for name in names}
    for case in (*stored_cases(), *drawn_cases(seed)):
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
            given = copied(one.args)
            one.wanted = outputs(name, call(shipped[name], given), given)
        found[name] = [*direct[:1], *found[name], *direct[1:]]
    return found


def stored_cases() -> list[Case]:
    """The cases, the simplest first, without UNUSUAL."""
    cases = [load_case(name) for name in case_names() if name not in UNUSUAL]
    return sorted(cases, key=lambda case: simplicity(case, 1))


def drawn_cases(seed: int, count: int = 14) -> list[Case]:
    """Models drawn at random, their axes of different sizes. Among them are models with a single
    position, document or head, one channel to a head, three layers, tied weights, rows of zeros."""
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
    """The case with weights so small that no probability is rounded to 0."""
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
            before = outputs(name, None, kept)  # written by earlier calls into the same trees
            found = outputs(name, result, args)
            wanted = {k: x for k, x in found.items() if "." not in k or k not in before}
            number = 1 + sum(one.function == name for one in calls)
            words = f"case {case.name}, call {number}"
            calls.append(Input(name, words, kept, copied(wanted), case, traits(case)))
            return result

        return record

    if "loss_and_grads" in names:
        params = {name: np.array(x) for name, x in case.params.items()}
        args = [params, case.docs(0), case.config]
        wanted = text_loss_and_grads(args, shipped)
        calls.append(Input("loss_and_grads", f"case {case.name}", args, wanted, case, traits(case)))
    own = {name: (shipped[name], recorder(name)) for name in names if name in shipped}
    with replaced("vectorized", own), np.errstate(all="ignore"):
        backend = watched_backend(case)
        backend.forward(case.docs(0))
        backend.backward()
        if {"adam", "clip"} & set(names):
            backend.update(0.01)
            backend.update(0.01)
        if "probabilities" in names and not case.name.startswith("drawn"):
            with patch("vectorized.backend.most_walkers", lambda _: 1):  # on plain arrays
                backend.sample(case.tokenizer, Random(0), 1, case.temperature, [], 2)
                backend.sample(case.tokenizer, Random(0), 1, 0.0, [])
    yield from (one for one in calls if one.function in names)


def watched_backend(case: Case, start: State | None = None) -> Any:
    """The backend of vectorized/ for a case, which runs the text without a recording."""
    from vectorized.backend import Backend

    return Backend(case.config, start or fresh_state(case.params), watch=True)


def traits(case: Case) -> tuple[str, ...]:
    """The properties of a case's model and first batch, in words."""
    docs, config = case.docs(0), case.config
    B, T = len(docs), max(map(len, docs)) - 1
    return _that_hold(
        ("T = 1", T == 1),
        ("T > 1", T > 1),
        ("B = 1", B == 1),
        ("B > 1", B > 1),
        ("documents of different length", len({len(doc) for doc in docs}) > 1),
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
        (f"activation {config.activation}", True),
    )


def _that_hold(*properties: tuple[str, bool]) -> tuple[str, ...]:
    return tuple(words for words, holds in properties if holds)


Drawn = tuple[str, tuple[str, ...], list[Any]]  # words, traits, arguments
SHAPES = [(2, 3, 5), (1, 1, 1), (1, 1, 4), (3, 1, 2), (1, 4, 3), (4, 2, 1), (5, 4, 7), (2, 2, 2)]
SIZES = [(1.0, ""), (1e8, "and large"), (1e-8, "and tiny"), (0.0, "and some zero")]


def _drawn(seed: int) -> Iterator[tuple[str, tuple[str, ...], np.random.Generator, Any, Any]]:
    """For each shape and size: words, traits, a generator, a function that draws, the shape."""
    rng = np.random.default_rng(seed)
    for shape, (size, words) in product(SHAPES, SIZES):

        def numbers(shape: Any, size: float = size) -> Array:
            x = rng.standard_normal(shape) * (size or 1.0)
            return x * rng.integers(0, 2, shape) if size == 0.0 else x

        B, T, n = shape
        about = _that_hold(
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
            x = np.clip(x, -800, 800)  # exp(800) overflows, exp(800 - max) does not
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
        dy = [rng.standard_normal(shape)] if backward else []
        yield words, (*about, f"activation {kind}"), [*dy, x, kind]


def _cross_entropies(seed: int, backward: bool) -> Iterator[Drawn]:
    text = text_functions("vectorized")
    for words, about, rng, draw, shape in _drawn(seed):
        logits, targets = np.clip(draw(shape), -30, 30), rng.integers(0, shape[-1], shape[:2])
        if backward:
            _, probs = text["cross_entropy_forward"](logits, targets)
            yield words, about, [rng.random(shape[:2]), probs, targets]
        else:
            yield words, about, [logits, targets]


def _updates(seed: int) -> Iterator[Drawn]:
    """Updates early and late, with moments of any size and some gradients of zero."""
    rng = np.random.default_rng(seed)
    for step, decay in product((0, 1, 2, 9, 500), (0.0, 0.1)):
        config = config_from({"weight_decay": decay, "adam_eps": 1e-3}, "drawn at random")
        params, grads, m = rng.standard_normal((3, 7))
        grads[::3] = 0.0
        words = "for a late step" if step > 2 else "at random"
        at = "step 0" if step == 0 else "step > 0"
        about = (at, "weight_decay" if decay else "no weight_decay")
        yield words, about, [params, grads, m, rng.random(7) ** 2, step, 0.01, config]


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
    "adam": _updates,
}


# --- the results of a call -----------------------------------------------------------------------


def call(function: Callable[..., Any], args: list[Any]) -> Any:
    """What a shipped function returns."""
    with np.errstate(all="ignore"):
        return function(*args)


def text_loss_and_grads(args: Sequence[Any], text: Mapping[str, Any]) -> dict[str, Array]:
    """The loss and the gradients by name, computed by the functions of a text.

    args    parameters by name, documents, configuration
    text    the functions of the text by name
    """
    params, docs, config = args
    tree, dparams = grow(params, config.n_layer), Tree(config.n_layer)
    batch, tap = pad(docs, np.dtype("float64")), Tree(config.n_layer)
    with np.errstate(all="ignore"):
        loss = text["loss_forward"](batch, tree, config, tap)
        text["loss_backward"](batch, tree, dparams, config, tap, Tree(config.n_layer))
    return {"loss": loss, **{f"d{name}": pick(dparams, name) for name in backward_order(params)}}


def copied(x: Any) -> Any:
    """A copy that shares no memory."""
    return copy.deepcopy(x)


def outputs(name: str, result: Any, args: Any) -> dict[str, Array]:
    """What a call wrote and returned, by name (dw.attn_wq, dx), in the order of computation."""
    given = dict(zip(ARGUMENTS[name], args))
    found: dict[str, Array] = {}
    for argument in filled(name):
        if isinstance(given.get(argument), Tree):
            found |= _in_order(leaves(given[argument], f"{argument}."), name)
    found |= {argument: given[argument] for argument in IN_PLACE.get(name, ())}
    labels = RESULTS.get(name, "").split() if result is not None else []
    return found | dict(zip(labels, result if len(labels) > 1 else [result]))


def _in_order(found: dict[str, Array], name: str) -> dict[str, Array]:
    """The tensors of a tree in the order in which a function of that name computes them."""
    backward = name.endswith("_backward")

    def place(label: str) -> int:
        layer = LAYER.search(label)
        if layer:
            return -int(layer[1]) if backward else int(layer[1])
        first = label.rpartition(".")[2] in ("emb", "emb_norm", "emb_scale", "wte", "wpe")
        return len(found) if first is backward else -len(found)

    return {label: found[label] for label in sorted(found, key=place)}


def leaves(tree: Tree, prefix: str) -> dict[str, Array]:
    """The tensors of a tree by name."""
    found = {f"{prefix}{name}": x for name, x in vars(tree).items() if name != "layers"}
    for i, layer in enumerate(getattr(tree, "layers", [])):
        found |= leaves(layer, f"{prefix}layer{i}.")
    return found


def filled(name: str) -> tuple[str, ...]:
    """The names of the arguments that a function fills."""
    return OUTPUTS["backward" if name.endswith("_backward") else "forward"]
