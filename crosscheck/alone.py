"""What a candidate's function gets wrong by itself, on the inputs of crosscheck.functions.

A result may differ from the shipped function's by RTOL of its size, or by FACTOR times its noise.
To measure the noise, the shipped function runs again with every operand of every operation moved
at random by one unit in the last place, as crosscheck.noise does with scalar/. A backward function
is also compared with a derivative of the shipped forward function, taken by a complex step.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crosscheck.candidate import Candidate, Told, each, guarded_whole, in_place, text_functions
from crosscheck.functions import (
    IN_PLACE,
    Array,
    Input,
    call,
    copied,
    filled,
    leaves,
    outputs,
    text_loss_and_grads,
)
from crosscheck.noise import ULP, smoothed
from crosscheck.tolerance import FACTOR, RTOL
from crosscheck.witness import STEP
from microgpt.layout import Tree, grow
from vectorized.batch import pad

ENOUGH = 2.0  # seconds after which no more inputs are tried, if one has failed
RUNS = 6  # of the shipped function with moved operands, for the noise
WHOLE = "loss_and_grads"


@dataclass
class Wrong:
    """What a function got wrong by itself: everything a report says about it."""

    function: str
    origin: str
    problem: str
    line: str = ""
    label: str = ""  # of the wrong result: dx, dw.attn_wq
    shape: tuple[int, ...] = ()
    index: tuple[int, ...] = ()
    reference: float = 0.0
    candidate: float = 0.0
    exceeding: int = 0
    elements: int = 0
    arguments: str = ""
    share: str = ""  # how many inputs fail, and which
    right: list[str] = field(default_factory=list)  # the names of the other results
    wrong: list[str] = field(default_factory=list)
    evidence: list[tuple[Input, Mapping[str, Array]]] = field(default_factory=list)

    @property
    def numbers(self) -> bool:
        """Whether a number is wrong, and not only a shape, a type or a name."""
        return self.exceeding > 0


def alone(candidate: Candidate, name: str, given: list[Input]) -> Wrong | None:
    """The first result that a function gets wrong on these inputs; None if all are right.

    Raises Told for what is not a wrong result: an exception, an input that was written to, ..
    """
    kept: list[tuple[dict[str, Array], dict[str, Array], str]] = []
    evidence: list[tuple[Input, Mapping[str, Array]]] = []
    first: Wrong | None = None
    tried: list[Input] = []
    since = time.monotonic()
    with in_place(candidate, [name]) as guards:
        for one in given:
            if first and time.monotonic() - since > ENOUGH:
                break
            tried.append(one)
            try:
                found = _called(candidate, one, guards)
                wrong = judged(candidate, one, found)
            except Told as told:
                if first is None:
                    told.words += f"\non {one.origin}: {shapes(one)}"
                    raise
                continue
            kept.append((found, copied(found), one.origin))
            if wrong:
                evidence.append((one, copied(found)))
                first = first or wrong
    if first is None:
        _refuse_reused_memory(candidate, name, kept)
        return None
    failed = [one for one, _ in evidence]
    first.share = _shared(failed, tried)
    first.evidence = [*evidence[:: len(evidence) // 3 + 1], evidence[-1]]
    return first


def _called(
    candidate: Candidate, one: Input, guards: Mapping[str, Callable[..., Any]]
) -> dict[str, Array]:
    """What the candidate's function gives back and writes, by name."""
    name, args = one.function, copied(one.args)
    if name == WHOLE:
        found = guarded_whole(candidate, args)
    else:
        found = outputs(name, guards[name](*args), args)
    written = _changed(one, args)
    if written:
        line = candidate.statement(name, _writes_to(written.partition(".")[0].partition("[")[0]))
        raise Told(name, f"writes into {written}, which is its input", line)
    return found


def judged(candidate: Candidate, one: Input, found: Mapping[str, Array]) -> Wrong | None:
    """What is wrong with the results for an input; None if nothing is."""
    wrong = _compared(candidate, one, found)
    return _off_slope(candidate, one, found) if not wrong and one.function in ALONG else wrong


def _refuse_reused_memory(
    candidate: Candidate, name: str, kept: list[tuple[dict[str, Array], dict[str, Array], str]]
) -> None:
    """Raises Told if a later call has changed what an earlier one returned."""
    for found, before, origin in kept:
        for label in found:
            if not _same(found[label], before[label]):
                words = (
                    f"returns {label} in memory that it writes again later: the result"
                    f"\non {origin} has changed since"
                )
                raise Told(name, words, candidate.line_of(name))


def _writes_to(name: str) -> Callable[[Any], bool]:
    """A test of statements: whether one writes into the array, tree or mapping of that name."""

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


def _changed(one: Input, given: list[Any]) -> str:
    """The first input that a call has written into; "" if none."""
    outputs = {*IN_PLACE.get(one.function, ()), *filled(one.function), "cache", "caches"}
    for name, before, after in zip(one.names, one.args, given):
        now = _by_label(name, after)
        for label, x in _by_label(name, before).items():
            if name not in outputs and (label not in now or not _same(x, now[label])):
                return label
    return ""


def _by_label(name: str, x: Any) -> dict[str, Any]:
    """The arrays and lists in an argument."""
    if isinstance(x, Tree):
        return leaves(x, f"{name}.")
    if isinstance(x, dict):
        return {f"{name}[{key!r}]": value for key, value in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return {f"{name}.{field}": value for field, value in zip(x._fields, x)}
    return {name: x} if isinstance(x, (np.ndarray, list)) else {}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return bool(a == b)
    x, y = np.asarray(a), np.asarray(b)
    return x.shape == y.shape and bool(np.array_equal(x, y, equal_nan=x.dtype.kind == "f"))


# --- the results ---------------------------------------------------------------------------------


def _compared(candidate: Candidate, one: Input, found: Mapping[str, Array]) -> Wrong | None:
    """The first wrong result, in the order of computation; None if all are right."""
    name = one.function
    base = Wrong(name, one.origin, "", candidate.line_of(name), arguments=shapes(one))
    if name == WHOLE and (words := _names_apart(one, found)):
        return dataclasses.replace(base, problem=words)
    first: Wrong | None = None
    others: dict[bool, list[str]] = {True: [], False: []}
    for label in one.wanted:
        if label not in found and _may_be_left_out(candidate, name, label):
            continue
        wrong = _one_compared(base, one, label, found.get(label))
        if wrong and not first:
            first = wrong
        else:
            others[not wrong].append(label)
    return first and dataclasses.replace(first, right=others[True], wrong=others[False])


def _may_be_left_out(candidate: Candidate, name: str, label: str) -> bool:
    """Whether no function but the candidate's own reads this result."""
    tree = label.partition(".")[0]
    other_half = name.replace("_forward", "_backward")
    return tree == "dtap" or (tree == "tap" and other_half in candidate.functions)


def _names_apart(one: Input, found: Mapping[str, Array]) -> str:
    """Which gradients are missing, and which are of no parameter; "" if the names are right."""
    missing = [name.removeprefix("d") for name in one.wanted if name not in found]
    unknown = [name.removeprefix("d") for name in found if name not in one.wanted]
    if missing and {f"d{name}" for name in missing} <= {*unknown}:
        return (
            f"calls its gradients {_listed(unknown)}; their keys are to be the names of the"
            f" parameters: {_listed(missing)}"
        )
    words = []
    if missing:
        words.append(f"gives no gradient of {_listed(missing)}")
    if unknown:
        verb = "and has the keys" if missing else "gives a gradient of"
        words.append(f"{verb} {_listed(unknown)}, which are no parameters")
    return "; ".join(words)


def _listed(names: list[str], most: int = 6) -> str:
    """The names; of many, the first and the number of the others."""
    rest = len(names) - most
    return ", ".join(names) if rest < 2 else f"{', '.join(names[:most])} and {rest} others"


def _one_compared(base: Wrong, one: Input, label: str, result: Any) -> Wrong | None:
    """What is wrong with one result; None if nothing is."""
    if result is None:
        words = "does not write" if "." in label else "gives no"
        return dataclasses.replace(base, problem=f"{words} {label}", label=label)
    theirs, ours = np.asarray(result), np.asarray(one.wanted[label])
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
        good = (theirs == ours) | (np.isnan(theirs) & np.isnan(ours))
        good |= apart <= RTOL * np.abs(ours)
        if not good.all():
            good |= apart <= FACTOR * noise(one)[label]
    if good.all():
        return None
    size = np.where(good, -1.0, np.nan_to_num(apart, nan=np.inf))
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(size)), ours.shape))
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


# --- noise ---------------------------------------------------------------------------------------


class Rounded(np.ndarray):
    """An array whose operations first move their operands by one unit in the last place."""

    rng = np.random.default_rng(0)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        moved = [_moved(x) for x in inputs]
        if method == "at":  # writes into its first operand
            moved[0] = _plain(inputs[0])
        if "out" in kwargs:
            kwargs["out"] = tuple(map(_plain, kwargs["out"]))
        return _rounded(getattr(ufunc, method)(*moved, **kwargs))

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        change = _moved if func is np.einsum else _plain
        return _rounded(func(*each(change, args), **each(_plain, kwargs)))


def _plain(x: Any) -> Any:
    """The memory of a Rounded array as a plain array."""
    return x.view(np.ndarray) if isinstance(x, Rounded) else x


def _moved(x: Any) -> Any:
    """A copy with every number moved by one unit in the last place, up or down."""
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
        return _plain(x)
    plain = np.asarray(_plain(x))
    return plain * (1 + ULP * Rounded.rng.choice((-1, 1), plain.shape))


def _rounded(x: Any) -> Any:
    """The argument or result with Rounded arrays, in trees and lists too."""
    return each(lambda y: y.view(Rounded) if isinstance(y, (np.ndarray, np.generic)) else y, x)


def noise(one: Input) -> dict[str, Array]:
    """How far each result moves when the shipped function rounds at random: see crosscheck.noise.

    The noise of an element is smoothed over its neighbours, except where the element is 0 in all
    runs: such an element is 0 by construction, and has no noise.
    """
    if one.noise:
        return one.noise
    Rounded.rng = np.random.default_rng(0)
    shipped, runs = text_functions("vectorized"), []
    for _ in range(RUNS):
        args = _rounded(copied(one.args))
        if one.function == WHOLE:
            runs.append(text_loss_and_grads(args, shipped))
        else:
            runs.append(outputs(one.function, call(shipped[one.function], args), args))
    for label, ours in one.wanted.items():
        with np.errstate(all="ignore"):
            ours = np.asarray(ours, "float64")
            moves = [np.abs(np.asarray(_plain(run[label])) - ours) for run in runs]
            most = np.nan_to_num(np.max(moves, axis=0), nan=0.0, posinf=0.0)
            whole = smoothed(most, ours != 0.0)
        one.noise[label] = np.where((ours == 0.0) & (most == 0.0), 0.0, np.maximum(most, whole))
    return one.noise


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
    """How many inputs fail, and the traits that the others do not have."""
    count = f"{len(failed)} of {len(given)} inputs"
    passed = [one for one in given if one not in failed]
    if not passed:
        return f"all {len(given)} inputs"
    if len(failed) == 1:  # its traits are too many to tell the one that matters
        return count
    common = [t for t in failed[0].traits if all(t in one.traits for one in failed)]
    only = [t for t in common if not any(t in one.traits for one in passed)]
    if only:
        return f"{count}: those with {' and '.join(only[:2])}"
    mostly = [t for t in common if sum(t in one.traits for one in passed) < len(passed) / 2]
    if mostly:
        return f"{count}, all of them with {' and '.join(mostly[:2])}"
    return count


# --- the complex step ----------------------------------------------------------------------------

# Each function below runs a shipped forward function on inputs that are moved by i STEP along
# random directions. It returns the output, and the directions by the name of the gradient.


Draw = Callable[[Array], Array]  # a random direction for an array
Along = tuple[Array, dict[str, Array]]


def _along_linear(one: Input, draw: Draw) -> Along:
    _, x, w = one.args
    along = {"dx": draw(x), "dw": draw(w)}
    return _text("linear_forward")(_step(x, along["dx"]), _step(w, along["dw"])), along


def _along_softmax(one: Input, draw: Draw) -> Along:
    x = np.log(one.args[1])
    dx = np.where(np.isfinite(x), draw(x), 0.0)
    return _text("softmax_forward")(_step(x, dx)), {"dx": dx}


def _along_rmsnorm(one: Input, draw: Draw) -> Along:
    _, y, scale = one.args
    x = y / scale
    eps = scale**-2.0 - (x * x).mean(axis=-1, keepdims=True)
    dx = draw(x)
    return _text("rmsnorm_forward")(_step(x, dx), eps)[0], {"dx": dx}


def _along_activation(one: Input, draw: Draw) -> Along:
    _, x, kind = one.args
    dx = np.where(x == 0.0, 0.0, draw(x))  # none where the slope jumps
    return _text("activation_forward")(_step(x, dx), kind), {"dx": dx}


def _along_cross_entropy(one: Input, draw: Draw) -> Along:
    _, probs, targets = one.args
    logits = np.log(probs)
    dlogits = np.where(np.isfinite(logits), draw(logits), 0.0)
    loss_t = _text("cross_entropy_forward")(_step(logits, dlogits), targets)[0]
    return loss_t, {"dlogits": dlogits}


def _along_block(one: Input, draw: Draw) -> Along:
    """Attention or the MLP, along its input and all its weights."""
    args = dict(zip(one.names, one.args))
    block = "mlp" if one.function == "mlp_backward" else "attn"
    norm, scale = (getattr(args["tap"], f"{block}_{name}") for name in ("norm", "scale"))
    x = norm / scale
    along = {"dx": draw(x)}
    w = Tree()
    for name, weight in vars(args["w"]).items():
        if name.startswith(f"{block}_"):
            along[f"dw.{name}"] = draw(weight)
            setattr(w, name, _step(weight, along[f"dw.{name}"]))
    moved = _step(x, along["dx"])
    if block == "mlp":
        return _text("mlp_forward")(moved, w, args["config"], Tree()), along
    mask = _text("causal_mask")(x.shape[1], np.dtype("float64"))
    return _text("attention_forward")(moved, w, None, mask, args["config"], Tree()), along


def _along_whole(one: Input, draw: Draw) -> Along:
    """The loss of a whole model, along every parameter."""
    params, docs, config = one.args
    along = {f"d{name}": draw(x) for name, x in params.items()}
    tree = grow({name: _step(x, along[f"d{name}"]) for name, x in params.items()}, config.n_layer)
    batch = pad(docs, np.dtype("float64"))
    return _text("loss_forward")(batch, tree, config, Tree(config.n_layer)), along


def _text(name: str) -> Callable[..., Any]:
    return text_functions("vectorized")[name]


def _step(x: Array, direction: Array) -> Array:
    return x + 1j * STEP * direction


ALONG: dict[str, Callable[[Input, Draw], Along]] = {
    "linear_backward": _along_linear,
    "softmax_backward": _along_softmax,
    "rmsnorm_backward": _along_rmsnorm,
    "activation_backward": _along_activation,
    "cross_entropy_backward": _along_cross_entropy,
    "attention_backward": _along_block,
    "mlp_backward": _along_block,
    WHOLE: _along_whole,
}
SLACK = 1e-7  # of the size of the terms: x is computed back from results, which loses digits


def _off_slope(candidate: Candidate, one: Input, found: Mapping[str, Array]) -> Wrong | None:
    """A derivative that differs from the slope of the shipped forward function, or None."""
    if one.case and one.case.kink:
        return None  # where the slope jumps, the values on both sides are right
    rng = np.random.default_rng(0)
    dy = 1.0 if one.function == WHOLE else np.asarray(one.args[0])
    with np.errstate(all="ignore"):
        y, along = ALONG[one.function](one, lambda x: rng.standard_normal(np.shape(x)))
        terms = np.where(dy == 0.0, 0.0, dy * np.imag(y) / STEP)
        wanted, size = float(terms.sum()), float(np.abs(terms).sum())
        products = [np.asarray(found[label]) * direction for label, direction in along.items()]
        given = sum(float(x.sum()) for x in products)
        size += sum(float(np.abs(x).sum()) for x in products)
        if not np.isfinite(wanted) or abs(given - wanted) <= SLACK * size:
            return None
        lost = sum(float((noise(one)[k] * np.abs(x)).sum()) for k, x in along.items())
        if abs(given - wanted) <= SLACK * size + FACTOR * lost:
            return None
    forward = one.function.replace("_backward", "_forward").replace(WHOLE, "the loss")
    words = f"gives {given:.9g} along a direction in which {forward} has the slope {wanted:.9g}"
    line = candidate.line_of(one.function)
    return Wrong(one.function, one.origin, words, line, arguments=shapes(one))
