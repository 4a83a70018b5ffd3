"""What --hint adds to the report on a function: the likely cause, and the equation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from crosscheck.alone import WHOLE, Wrong
from crosscheck.candidate import RESULTS, Candidate, text_functions
from crosscheck.cases import Case, load_case
from crosscheck.diagnose import OF_SHARES
from crosscheck.explain import expression, shown
from crosscheck.functions import Input
from crosscheck.likeness import likeness
from crosscheck.placed import PANEL, compared, reference_steps
from crosscheck.report import PLACE
from crosscheck.tolerance import FLOAT64

Rows = list[tuple[str, str]]
NOTHING = "no mistake that has a name here"
AGREEING = 4  # how many failing cases are diagnosed; a cause has to explain all of them
FEW = 5  # the least count of numbers whose signs are telling
# how a diagnosis begins that is no cause; single precision is asked for separately
NOT_FINITE = "not a finite number"
NO_CAUSE = (PLACE, "float32 ", NOT_FINITE)


def hints(candidate: Candidate, wrong: Wrong, hint: int) -> Rows:
    """The rows that a hint adds to the report on a function.

    hint    0 for no rows, 1 for the cause, 2 for the equation with its numbers as well
    """
    if not hint or not wrong.numbers or not wrong.evidence:
        return []
    rows = [("looks like", cause(candidate, wrong) or NOTHING)]
    return rows + equation(wrong) if hint > 1 else rows


# --- the cause -----------------------------------------------------------------------------------


def cause(candidate: Candidate, wrong: Wrong) -> str:
    """The cause that explains the wrong numbers of all failing cases; "" if there is none."""
    known = dict(_readings(candidate, wrong))
    first, *others = known.values() or [[]]
    common = [words for words in first if all(_bare(words) in map(_bare, one) for one in others)]
    causes = [words for words in common if not words.startswith(NO_CAUSE)]
    if not causes and single_precision(wrong):
        return "the error is of the size of single precision: is something computed in float32?"
    if not causes:
        causes = [likeness(wrong.function, wrong.evidence)]
    if any(causes):
        return ", or ".join(causes[:2])
    first = [words for words in first if not words.startswith("float32 ")]
    alike = [words for words in first if all(_plain(words) in map(_plain, x) for x in others)]
    return f"{alike[0]} (on case {next(iter(known))})" if alike else ""


def _bare(words: str) -> str:
    """A diagnosis without the names of layers."""
    return re.sub(r"layer\d+\.", "", words)


def _plain(words: str) -> str:
    """A diagnosis without the names of layers and with # for every number."""
    return re.sub(r"[-\d./^e]*\d", "#", _bare(words))


def single_precision(wrong: Wrong) -> bool:
    """Whether the errors are of the size of float32's last place, up about as often as down."""
    parts = []
    for one, found in wrong.evidence:
        for label in (wrong.label, *wrong.wrong):
            ours, theirs = np.asarray(one.wanted[label]), np.asarray(found.get(label))
            if ours.shape != theirs.shape:
                return False
            large = np.abs(ours) > 1e-3 * np.abs(ours).max(initial=0.0)
            parts.append(theirs[large] / ours[large] - 1)
    off = np.concatenate(parts)
    if off.size < FEW or not np.abs(off).max() < 1e-2:
        return False
    return bool(1e-10 < np.median(np.abs(off)) < 1e-6 and 0.2 < (off > 0).mean() < 0.8)


def _readings(candidate: Candidate, wrong: Wrong) -> Iterator[tuple[str, list[str]]]:
    """The names of failing cases, each with the diagnoses of the model's wrong numbers."""
    own = [one.case for one, _ in wrong.evidence if one.case]
    cases = {case.name: case for case in own}
    if len(cases) < AGREEING and wrong.function != WHOLE:
        cases |= {name: load_case(name) for name in PANEL if name not in cases}
    count = 0
    for case in cases.values():
        found = compared(candidate, case, reference_steps(case), [wrong.function], 1, FLOAT64)
        if found and count < AGREEING:
            count += 1
            yield case.name, _parts(found.diagnosis.removeprefix(OF_SHARES).removeprefix(": "))


def _parts(words: str) -> list[str]:
    """The diagnoses that a sentence names, one for each name of a factor.

    "x, or multiplied by 2 (here also n)" names three, as does "divided by D = H = 2, not by 1".
    """
    found = []
    for one in filter(None, words.split(", or ")):
        also = re.fullmatch(r"(.*multiplied by )(.*) \(here also (.*)\)()", one)
        equal = re.fullmatch(r"(.*divided by )(.*?)()(, not by .*)", one)
        match = also or equal
        if match:
            factors = [match[2], *match[3].split(", ")] if also else match[2].split(" = ")
            found += [f"{match[1]}{factor}{match[4]}" for factor in factors]
        else:  # the count of elements that are not finite differs from case to case
            found.append(NOT_FINITE if one.startswith(NOT_FINITE) else one)
    return found


# --- the equation --------------------------------------------------------------------------------


def equation(wrong: Wrong) -> Rows:
    """The equation of the element that the report shows, with the numbers that go into it."""
    one = wrong.evidence[0][0]
    rows = _from_the_model(wrong, one)
    if rows:
        return rows
    first = equation_of(wrong.function)
    numbers = [(name, x) for name, x in zip(one.names, one.args) if isinstance(x, np.ndarray)]
    operands = [row for name, x in numbers for row in _operand(wrong, name, x)]
    return [("equation", first), *operands] if first else []


def equation_of(name: str) -> str:
    """The equation of a function: the first line of its docstring in vectorized/."""
    function = text_functions("vectorized").get(name)
    return (function.__doc__ or "").partition("\n")[0] if function else ""


def _operand(wrong: Wrong, name: str, x: Any) -> Rows:
    """A row of the numbers of an argument that go into the element that is shown."""
    *lead, last = wrong.index or (0,)
    at = ", ".join(map(str, lead))
    if wrong.label == "dw" and name in ("dy", "x"):  # a sum over positions
        column = lead[0] if name == "dy" else last
        return [("", f"{name}[.., {column}] = {shown(x[..., column])}")]
    if name == "w" and x.ndim == 2:
        where = f"{last}, :" if wrong.label == "y" else f":, {last}"
        return [("", f"w[{where}] = {shown(x[last] if wrong.label == 'y' else x[:, last])}")]
    if x.shape == wrong.shape and x.ndim == 1:
        return [("", f"{name}[{last}] = {shown(x[last])}")]
    if x.shape[: len(lead)] == wrong.shape[:-1] and x.ndim <= len(wrong.shape):
        return [("", f"{name}[{at}] = {shown(x[tuple(lead)])}")]
    return []


def _from_the_model(wrong: Wrong, one: Input) -> Rows:
    """The equation of the element by the case's trace; [] if the result is no tensor of a trace."""
    key = _key(wrong, one) if one.case else ""
    if not key or not one.case:
        return []
    (step,) = reference_steps(one.case)
    if key not in step or np.shape(step[key]) != wrong.shape:
        return []
    found = expression(one.case, 1, key, wrong.index, step)
    if found is None or not np.isclose(found.value, wrong.reference, rtol=1e-6, atol=0.0):
        return []
    name = key.partition("/")[2]
    here = "" if wrong.label.rpartition(".")[2] in name else f"{wrong.label}, here "
    rows = [("equation", f"{here}{name} = {found.formula} = {found.value:.6g}")]
    return rows + [("", f"{x} = {shown(numbers)}") for x, numbers in found.operands.items()]


def _key(wrong: Wrong, one: Input) -> str:
    """The key of a function's result in a trace; "" if a trace does not hold the result."""
    name, label = wrong.function, wrong.label
    assert one.case is not None
    if name == WHOLE:
        return "forward/loss" if label == "loss" else f"gradient/{label}"
    number = int(one.origin.rpartition("call ")[2])
    L = one.case.config.n_layer
    i = L - number if name.endswith("_backward") else number - 1
    if not 0 <= i < L:
        return ""
    own = f"layer{i}." if name.partition("_")[0] in ("attention", "mlp") else ""
    tree, _, rest = label.partition(".")
    if rest:
        phase = {"tap": "forward/", "dtap": "backward/d"}.get(tree, "gradient/d")
        return f"{phase}{own}{rest}"
    if name == "attention_backward":
        return f"backward/d{_before(one.case, i)}"
    if name == "mlp_backward":
        return f"backward/d{own}attn_res"
    composite = name in ("attention_forward", "mlp_forward", "gpt_forward", "loss_forward")
    return f"forward/{own}{label}" if composite else ""


def _before(case: Case, layer: int) -> str:
    """The tap that goes into a layer."""
    first = "emb_norm" if case.config.norm_embedding else "emb"
    return f"layer{layer - 1}.mlp_res" if layer else first


def parts_of(first_wrong: str) -> Sequence[str]:
    """The functions that may be wrong if this is the first wrong result of the backward pass."""
    return SUSPECTS.get(first_wrong.rpartition(".")[2].removeprefix("d"), ())


SUSPECTS = {
    "loss": ("attention_forward", "mlp_forward", "cross_entropy_forward"),
    "lm_head": ("cross_entropy_backward", "linear_backward"),
    "wte": ("cross_entropy_backward", "gpt_backward"),
    "mlp_fc2": ("linear_backward", "mlp_backward"),
    "mlp_fc1": ("activation_backward", "mlp_backward"),
    "attn_wo": ("rmsnorm_backward", "mlp_backward"),
    "attn_wv": ("attention_backward",),
    "attn_wk": ("softmax_backward", "attention_backward"),
    "attn_wq": ("softmax_backward", "attention_backward"),
    "wpe": ("rmsnorm_backward", "gpt_backward"),
}
assert all(name in RESULTS for names in SUSPECTS.values() for name in names)
