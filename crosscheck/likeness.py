"""What a wrong function of the text computes instead: a named defect, or a change of one place.

The shipped function with the defect in it is given the same input, and if it gives back the same
wrong numbers, that is what was found.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from inspect import getsource
from typing import Any

import numpy as np

from crosscheck.candidate import TEXTS, text_functions
from crosscheck.defects import load_defects
from crosscheck.domain import mutations
from crosscheck.functions import Input, call, copied, outputs

CLOSE = 1e-9


def likeness(name: str, evidence: Sequence[tuple[Input, Mapping[str, Any]]]) -> str:
    """The first defect under which the shipped function gives these results, in words; or "".

    evidence    inputs, and what was found for each
    """
    for words, function in _faulty(name):
        if all(_gives(function, one, found) for one, found in evidence):
            return words
    return ""


def _gives(function: Any, one: Input, found: Mapping[str, Any]) -> bool:
    """Whether a function gives these results."""
    args = copied(one.args)
    try:
        result = outputs(one.function, call(function, args), args)
    except Exception:  # a defect that this input does not get through
        return False
    return _same(result, found, one.wanted)


def _same(result: Mapping[str, Any], found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether all results are those that were found, and not all of them right."""
    differs = False
    for label, x in found.items():
        ours = np.asarray(result.get(label, np.nan))
        theirs = np.asarray(x)
        if ours.shape != theirs.shape or not np.isfinite(ours).all():
            return False
        size = CLOSE * np.abs(theirs).max(initial=0.0)
        if not (np.abs(ours - theirs) <= size).all():
            return False
        differs = differs or bool((np.abs(np.asarray(wanted[label]) - ours) > size).any())
    return differs


def _faulty(name: str) -> Iterator[tuple[str, Any]]:
    """The function with a defect in it, after what that is; named defects first."""
    home = text_functions("vectorized")[name].__module__
    module = import_module(home)
    file, source = home.replace(".", "/") + ".py", getsource(module)
    for defect in load_defects():
        (patch, *others) = defect.patches
        if patch.file == file and not others and source.count(patch.old) == 1:
            yield defect.story, _defined(name, source.replace(patch.old, patch.new), {})
    own = getsource(text_functions("vectorized")[name])
    for what, changed in mutations(own, lists=False):
        lines = [line[2:].partition("  # ")[0].strip()
                 for line in difflib.ndiff(own.splitlines(), changed.splitlines())
                 if line.startswith("+ ")]  # fmt: skip
        yield f"{what}: {' '.join(lines)}", _defined(name, changed, vars(module))


def _defined(name: str, source: str, names: Mapping[str, Any]) -> Any:
    """The function of that name in a source; what is not defined there is taken from `names`."""
    space = {**names, "__name__": TEXTS["vectorized"][0]}
    exec(compile(source, "<a defect>", "exec"), space)
    return space[name]
