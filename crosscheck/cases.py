"""The cases: models, parameters and batches on which two implementations are compared.

A case is fixtures/cases/NAME.yaml, with its parameters beside it in NAME.safetensors:

why        what the case is there to catch
config     what differs from the default preset, or from the one named under `preset`
chars      the characters of the vocabulary
batches    one list of documents per step; more steps begin again with the first
shift      what is added to every weight of a parameter as drawn, by name
rows       rows of parameters that hold one number throughout, by name: row and number
zero       gradients that are zero everywhere, by name, each with the reason why that is right
zero_rows  rows of gradients that are exactly zero, by name: the characters, and the reason
kink       the reason why ReLU inputs may lie on the kink
random     the reason why some tensors may happen to be zero, or ReLU inputs on the kink
float32    how much more single precision may lose here (`slack`), and the reason (`why`)
temperature    at which documents are drawn; 2 where it is left out, so that they differ

The parameters are drawn as training draws them, with the configuration's seed. A parameter that
training begins with one number is drawn around that number, since layers would be alike otherwise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import add
from pathlib import Path
from random import Random
from typing import Any

import yaml

from microgpt.backend import Tensors
from microgpt.config import Config
from microgpt.errors import MicrogptError, shortened
from microgpt.init import init_params
from microgpt.layout import mapped, param_shapes, rows
from microgpt.runs.checkpoint import load_params, save_params
from microgpt.runs.files import write_whole
from microgpt.settings import FIXTURES, config_from, on_line, read_yaml
from microgpt.taps import params as table
from microgpt.tokenizer import Tokenizer, build_tokenizer
from microgpt.train import learning_rate

CASES = FIXTURES / "cases"
KEYS: dict[str, tuple[Any, str]] = {  # the type of each key's value, for _made_of and in words
    "why": (str, "a string"),
    "config": (dict, "a mapping"),
    "chars": (str, "a string"),
    "batches": ([[str]], "a list of lists of strings"),
    "shift": ({str: float}, "numbers by name"),
    "rows": ({str: {int: float}}, "numbers by name and row"),
    "zero": ({str: str}, "strings by name"),
    "zero_rows": ({str: {str: str}}, "chars and why, by name"),
    "kink": (str, "a string"),
    "random": (str, "a string"),
    "float32": (dict, "a mapping"),
    "temperature": (float, "a number"),
}
APART = 0.3  # standard deviation around the number that training begins a parameter with
FLOAT32 = {"slack": float, "why": str}  # the keys of `float32`


@dataclass(frozen=True)
class Case:
    """One comparison: a model, its parameters, its batches, and what is expected of the numbers."""

    name: str
    why: str
    config: Config
    chars: str
    batches: list[list[str]]
    shift: Mapping[str, float] = field(default_factory=dict)
    rows: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    zero: Mapping[str, str] = field(default_factory=dict)
    zero_rows: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    kink: str = ""
    random: str = ""
    float32: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 2.0
    params: Tensors = field(default_factory=dict, repr=False)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer over the case's characters."""
        return build_tokenizer(self.chars, self.config)

    def docs(self, step: int) -> list[list[int]]:
        """The tokens of a step's batch, steps counted from 0."""
        tokenizer = self.tokenizer
        documents = self.batches[step % len(self.batches)]
        return [tokenizer.document(doc, self.config.max_tokens) for doc in documents]


def case_names() -> list[str]:
    """The names of the cases, the smallest models first."""
    return [path.stem for path in sorted(sorted(CASES.glob("*.yaml")), key=_size)]


def _size(path: Path) -> int:
    stored = path.with_suffix(".safetensors")
    return stored.stat().st_size if stored.is_file() else 0


def case_path(name: str) -> Path:
    """The file of a case.

    Raises MicrogptError if there is no case of that name; so no name leads out of the folder.
    """
    if name not in case_names():
        raise MicrogptError(f"there is no case {name!r}; the cases are {', '.join(case_names())}")
    return CASES / f"{name}.yaml"


def load_case(name: str) -> Case:
    """A case by its name, or by the path of its YAML file.

    Raises MicrogptError if there is no such case, or if its file is not as it should be.
    """
    path = case_path(name) if name in case_names() else Path(name)
    if not os.path.isfile(path):
        raise MicrogptError(
            f"there is no case and no file {name!r}; the cases are {', '.join(case_names())}"
        )
    case = read_case(path)
    shapes = param_shapes(case.config, case.tokenizer.vocab_size)
    return with_params(case, load_params(path.with_suffix(".safetensors"), shapes))


def read_case(path: Path) -> Case:
    """A case without its parameters."""
    if not path.stem.isprintable():
        raise MicrogptError(f"{path}: a case is named after its file; take printable characters")
    raw = read_yaml(path)
    for key, (kind, words) in KEYS.items():
        if key in raw and not _made_of(raw[key], kind):
            raise MicrogptError(f"{path}: {key}: expected {words}, got {shortened(raw[key])}")
    unknown = [key for key in raw if key not in KEYS]
    missing = [key for key in ("why", "chars", "batches") if not raw.get(key)]
    if unknown:
        line = on_line(raw, unknown[0])
        raise MicrogptError(f"{path}: unknown key {shortened(str(unknown[0]))}{line}")
    if missing:
        raise MicrogptError(f"{path}: {missing[0]} is missing")
    config = config_from(raw.get("config", {}), f"{path}: config")
    fields = {key: _plain(value) for key, value in raw.items() if key != "config"}
    case = Case(name=path.stem, config=config, **fields)
    _check_names(case, path)
    return case


def _made_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind: a type, [a kind] for a list, {a kind: a kind} for a mapping."""
    if isinstance(kind, list):
        return isinstance(value, list) and bool(value) and all(_made_of(x, kind[0]) for x in value)
    if isinstance(kind, dict):
        ((of, to),) = kind.items()
        return isinstance(value, dict) and all(
            _made_of(key, of) and _made_of(x, to) for key, x in value.items()
        )
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return isinstance(value, kind)


def _plain(value: Any) -> Any:
    """The value with plain mappings, which do not know the lines of their keys."""
    return {k: _plain(x) for k, x in value.items()} if isinstance(value, dict) else value


def _check_names(case: Case, path: Path) -> None:
    """Raise MicrogptError for characters, parameters or rows that the model does not have."""
    for document in {doc for batch in case.batches for doc in batch}:
        case.tokenizer.encode(document)
    shapes = param_shapes(case.config, case.tokenizer.vocab_size)
    for name in (*case.shift, *case.rows):
        if name not in shapes:
            raise MicrogptError(f"{path}: {shortened(name)} is no parameter of this model")
    for name, numbers in case.rows.items():
        if not all(0 <= row < shapes[name][0] for row in numbers):
            raise MicrogptError(f"{path}: rows: {name} has rows 0 to {shapes[name][0] - 1}")
    last = len(case.batches)  # counted from 0: a step for each batch, then one with the first again
    if learning_rate(last, case.config) <= 0:
        raise MicrogptError(
            f"{path}: config: steps {case.config.steps}: step {last + 1} of this case would have no"
            " learning rate left; leave steps out"
        )
    if case.temperature <= 0:
        raise MicrogptError(f"{path}: temperature: expected more than 0, got {case.temperature}")
    for name, declared in case.zero_rows.items():
        if set(declared) != {"chars", "why"}:
            raise MicrogptError(f"{path}: zero_rows: {shortened(name)}: expected chars and why")
        case.tokenizer.encode(declared["chars"])
    for key, value in case.float32.items():
        if not _made_of(value, FLOAT32.get(key, type(None))):
            raise MicrogptError(f"{path}: float32: expected slack, a number, and why, a string")


def with_params(case: Case, params: Tensors) -> Case:
    """The case with these parameters."""
    return Case(**{**vars(case), "params": params})


def draw_params(case: Case, seed: int | None = None) -> Tensors:
    """The parameters of a case, from its own seed or another."""
    rng = Random(case.config.seed if seed is None else seed)
    params = init_params(case.config, case.tokenizer.vocab_size, rng)
    for name, offset in case.shift.items():
        params[name] = mapped(partial(add, offset), params[name])
    for name, numbers in case.rows.items():
        for row, number in numbers.items():
            matrix = rows(params[name]) is params[name]
            params[name][row] = [number] * len(params[name][row]) if matrix else number
    for name, param in table(case.config).items():
        if not isinstance(param.init, str):  # in training, layers begin with the same numbers
            params[name] = mapped(lambda x: x + rng.gauss(0, APART), params[name])
    return params


def save_case(case: Case, path: Path) -> None:
    """Write a case, and its parameters beside it."""
    preset = asdict(config_from({}, "the default preset"))
    config = {name: value for name, value in asdict(case.config).items() if value != preset[name]}
    fields = {key: getattr(case, key) for key in KEYS if key != "config"}
    raw = {"config": config, **{key: value for key, value in fields.items() if value}}
    text = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
    write_whole(path.with_suffix(".yaml"), text.encode())
    save_params(path.with_suffix(".safetensors"), case.params)
