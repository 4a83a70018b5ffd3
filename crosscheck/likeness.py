"""A defect of the text under which a function gives the same wrong results as a learner's.

The defect is a frequent slip, a named defect, or a change in one place (crosscheck.domain), in the
function itself or in a function that it calls. The text with that defect is run on the same inputs;
if it gives the same wrong results for all inputs, the defect is reported.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from inspect import getsource
from types import CodeType
from typing import Any

import numpy as np

from crosscheck.alone import WHOLE
from crosscheck.candidate import text_functions
from crosscheck.defects import load_defects
from crosscheck.domain import mutations
from crosscheck.functions import Input, call, copied, outputs, text_loss_and_grads
from crosscheck.variants import OVERFLOWS

CLOSE = 1e-9
FIRST = "from __future__ import annotations\n"
Space = dict[str, Any]
# frequent slips: in words, a part of the text, and what is often written in its place
SLIPS = (
    (OVERFLOWS, "exp(x - largest)", "exp(x)"),
    (
        OVERFLOWS,
        "x = logits - logits.max(axis=-1, keepdims=True)",
        "x = logits",
    ),
    ("divided by sqrt(n_embd), and not by sqrt(D)", "head_dim**0.5", "n_embd**0.5"),
    ("divided by D, and not by sqrt(D)", "head_dim**0.5", "head_dim"),
    (
        "heads are cut by reshaping to (B, H, T, D), which mixes positions and heads: reshape to"
        " (B, T, H, D), then exchange the axes",
        "x.reshape(*x.shape[:2], config.n_head, config.head_dim)",
        "x.reshape(len(x), config.n_head, x.shape[1], -1).swapaxes(1, 2)",
    ),
    (
        "heads are merged from (B, H, T, D), which mixes positions and heads: exchange the axes"
        " H and T first",
        "x.reshape(*x.shape[:2], -1)",
        "x.swapaxes(1, 2).reshape(*x.shape[:2], -1)",
    ),
    (
        "over all rows together, and not over each row",
        "(axis=-1, keepdims=True)",
        "(keepdims=True)",
    ),
)


def likeness(name: str, evidence: Sequence[tuple[Input, Mapping[str, Any]]]) -> str:
    """The first defect under which the text's function gives these results, in words; or "".

    evidence    inputs, each with the results that a learner's function gave
    """
    ordered = sorted(evidence, key=lambda one: sum(np.size(x) for x in one[1].values()))
    for words, space in _faulty(name):
        with np.errstate(all="ignore"):
            found = all(_gives(space, one, results) for one, results in ordered)
        if found:
            return words()
    return ""


def _gives(space: Space, one: Input, found: Mapping[str, Any]) -> bool:
    """Whether the function of a text with a defect gives these results.

    space    the names of that text
    """
    args = copied(one.args)
    try:
        if one.function == WHOLE:
            results = [text_loss_and_grads(args, space), _one_by_one(args, space)]
        else:
            results = [outputs(one.function, call(space[one.function], args), args)]
    except Exception:  # the text with this defect stops on this input
        return False
    return any(_same(result, found, one.wanted) for result in results)


def _one_by_one(args: Sequence[Any], space: Space) -> Mapping[str, Any]:
    """The mean of each document's loss and gradients, which needs no padding."""
    params, docs, config = args
    each = [text_loss_and_grads((params, [doc], config), space) for doc in docs]
    return {label: sum(one[label] for one in each) / len(docs) for label in each[0]}


def _same(result: Mapping[str, Any], found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether the results are those that were found, and at least one of them is wrong."""
    differs = False
    for label, x in found.items():
        if label not in wanted:  # no result, but a tensor that was there before the call
            continue
        ours = np.asarray(result.get(label, np.nan))
        theirs = np.asarray(x)
        if ours.shape != theirs.shape:
            return False
        finite = np.isfinite(theirs)
        if not np.array_equal(ours[~finite], theirs[~finite], equal_nan=True):
            return False
        size = CLOSE * np.abs(theirs[finite]).max(initial=0.0)
        if not (np.abs(ours - theirs)[finite] <= size).all():
            return False
        right = np.asarray(wanted[label])
        differs = differs or bool((np.abs(right - ours)[finite] > size).any())
        differs = differs or not np.array_equal(right[~finite], ours[~finite], equal_nan=True)
    return differs


def _faulty(name: str) -> Iterator[tuple[Callable[[], str], Space]]:
    """Each defect: a function that says it in words, and the names of a text that has it."""
    home = "vectorized.model" if name == WHOLE else text_functions("vectorized")[name].__module__
    called = _called(name, _codes(home))
    sources = {one: getsource(text_functions("vectorized")[one]) for one in called}
    for own in sources.values():
        for words, old, new in SLIPS:
            if old in own:
                yield partial(str, words), _with(home, own.replace(old, new))
    for words, old, new in _named(home, sources):
        yield partial(_told, words, old, new), _with(home, new)
    for own in sources.values():
        for what, changed in mutations(own, lists=False):
            yield partial(_told, what, own, changed), _with(home, changed)


def _named(home: str, sources: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """The named defects of these functions: the name, the functions' source, the same with it."""
    file = home.replace(".", "/") + ".py"
    for defect in load_defects():
        faulty = dict(sources)
        for patch in defect.patches:
            homes = [one for one, source in faulty.items() if source.count(patch.old) == 1]
            if patch.file != file or not homes:
                break
            faulty[homes[0]] = faulty[homes[0]].replace(patch.old, patch.new)
        else:
            changed = [one for one in sources if faulty[one] != sources[one]]
            old, new = ("".join(x[one] for one in changed) for x in (sources, faulty))
            yield defect.name.replace("-", " "), old, new


def _with(home: str, changed: str) -> Space:
    """The names of a module in which some functions are replaced, for their callers too."""
    space = dict(vars(import_module(home)))
    for code in _codes(home).values():
        exec(code, space)
    exec(compile(FIRST + changed, "<a defect>", "exec"), space)
    return space


@cache
def _codes(home: str) -> dict[str, CodeType]:
    """The compiled definition of each function of a module."""
    return {
        name: compile(FIRST + getsource(x), home, "exec")
        for name, x in text_functions("vectorized").items()
        if x.__module__ == home
    }


def _called(name: str, codes: Mapping[str, CodeType]) -> list[str]:
    """A function, and all functions of its module that it calls, directly or not."""
    functions = text_functions("vectorized")
    found: list[str] = []
    left = ["loss_backward", "loss_forward"] if name == WHOLE else [name]
    while left:
        one = left.pop(0)
        if one in codes and one not in found:
            found.append(one)
            left += functions[one].__code__.co_names
    return found


def _told(what: str, old: str, new: str) -> str:
    """A defect in words, and the line that it changes."""
    lines = [
        line[2:].partition("  # ")[0].strip()
        for line in difflib.ndiff(old.splitlines(), new.splitlines())
        if line.startswith("+ ")
    ]
    return f"{what}: {' '.join(lines)}"
