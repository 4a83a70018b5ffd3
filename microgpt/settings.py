"""Configurations from presets, YAML files, the command line, checkpoints: every field checked."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from microgpt.config import FIELDS, LARGEST_WHOLE, Config
from microgpt.errors import MicrogptError, shortened

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
CONFIGS = FIXTURES / "configs"
DEFAULT_PRESET = "microgpt"
TINIEST = 1e-300  # the inverse of anything smaller may be infinite
LARGEST_YAML = 1_000_000  # bytes
POINTLESS = re.compile("[-+]?[0-9]{1,30}[.]?[0-9]{0,30}[eE][-+]?[0-9]{1,9}")  # text to YAML
NUMERIC = set("+-.0123456789eEinfa")  # characters of a number; 1e-5, inf and nan among them
BEFORE = {
    name: field.metadata["before"]
    for name, field in FIELDS.items()
    if field.metadata["before"] is not None
}
KINDS = {"int": int, "float": float, "bool": bool, "str": str}
WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


def presets() -> list[str]:
    """The names of the presets, which `--config` takes."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load_config(source: str = DEFAULT_PRESET, overrides: Mapping[str, str] | None = None) -> Config:
    """The configuration of a preset or YAML file, with overrides as typed on the command line.

    A file that leaves fields out takes them from the preset it names under `preset`, or from
    the default preset.

    Raises MicrogptError naming the file or flag, the field, and what it should hold.
    """
    config = asdict(config_from(_read_source(source), source))
    typed = {name: typed_flag(name, text) for name, text in (overrides or {}).items()}
    return checked({**config, **typed})


def config_from(raw: dict[Any, Any], where: str) -> Config:
    """The configuration of a mapping: the name of a preset, and the fields that differ."""
    fields = copy(raw)
    base = fields.pop("preset", DEFAULT_PRESET)
    if base not in presets():
        raise MicrogptError(
            f"{where}: unknown preset {shortened(base)}; the presets are {', '.join(presets())}"
        )
    preset = CONFIGS / f"{base}.yaml"
    return checked({**typed_fields(read_yaml(preset), str(preset)), **typed_fields(fields, where)})


def checked(fields: Mapping[str, Any]) -> Config:
    """The configuration of these fields; MicrogptError if two fields contradict each other."""
    config = Config(**fields)
    if config.n_embd % config.n_head:
        widest = min(config.n_embd, 1000)
        divisors = [str(n) for n in range(1, widest + 1) if config.n_embd % n == 0]
        raise MicrogptError(
            f"n_head {config.n_head} does not divide n_embd {config.n_embd}, and every head takes"
            f" an equal share of the channels; n_head can be {', '.join(divisors[:12])}"
            + (", .." if len(divisors) > 12 else "")
        )
    if config.warmup_steps >= config.steps:
        raise MicrogptError(
            f"--warmup-steps {config.warmup_steps} must be less than --steps {config.steps}"
        )
    if config.cores > config.batch_size:
        raise MicrogptError(
            f"--cores {config.cores} needs --batch-size {config.cores} or more;"
            f" it is {config.batch_size}"
        )
    if config.crop == "tokens" and config.block_size < 2:
        raise MicrogptError(
            "block_size 1 with crop 'tokens' leaves no position to learn from;"
            " take block_size 2 or more, or crop 'positions'"
        )
    return config


def stored_config(fields: Mapping[Any, Any], where: str) -> Config:
    """The configuration that a checkpoint or run directory holds, with every field."""
    missing = [name for name in FIELDS if name not in fields and name not in BEFORE]
    if missing:
        raise MicrogptError(
            f"{where}: its configuration lacks {missing[0]!r}: written by another version;"
            " use the version that wrote it"
        )
    return checked({**BEFORE, **typed_fields(fields, f"{where}: config")})


def typed_fields(raw: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """The fields of an unchecked mapping, once the type and range of each are checked."""
    raw = _renamed(raw, where)
    for name in raw:
        if name not in FIELDS:
            close = difflib.get_close_matches(str(name)[:80], FIELDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(FIELDS)}"
            line = on_line(raw, name)
            raise MicrogptError(f"{where}: unknown key {shortened(str(name))}; {hint}{line}")
    return {name: typed(name, value, f"{where}: {name}") for name, value in raw.items()}


def _renamed(raw: Mapping[Any, Any], where: str) -> Mapping[Any, Any]:
    """The same fields, with `squared_relu` of earlier files replaced by `activation`."""
    if "squared_relu" not in raw or "activation" in raw:
        return raw
    fields = copy(raw)
    squared = fields.pop("squared_relu")  # type: ignore[attr-defined]
    if type(squared) is not bool:
        raise MicrogptError(
            f"{where}: squared_relu: expected true or false, got {shortened(squared)}"
        )
    return {**fields, "activation": "squared_relu" if squared else "relu"}


def typed_flag(name: str, text: str, where: str = "") -> Any:
    """The value of a text for a field; `where` is the flag, if it is not named as the field."""
    kind = KINDS[str(FIELDS[name].type)]
    value: Any = text
    with suppress(ValueError, KeyError):  # `typed` refuses a value that is still a text
        if kind is bool:
            value = {"true": True, "false": False}[text]
        elif not set(text) - NUMERIC:  # Python takes more for a number than people do
            value = kind(text)
    return typed(name, value, where or flag(name))


def flag(name: str) -> str:
    """The command line's name for a field: n_layer is --n-layer."""
    return "--" + name.replace("_", "-")


def _read_source(source: str) -> dict[Any, Any]:
    if source in presets():
        return {"preset": source}
    if not os.path.isfile(source):
        raise MicrogptError(
            f"--config: there is no preset and no file {source!r};"
            f" the presets are {', '.join(presets())}"
        )
    return read_yaml(Path(source))


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping that a YAML file holds; `on_line` gives the line of each key.

    Raises MicrogptError if the file holds no mapping, is larger than a megabyte or nested too
    deeply, or has aliases, tags or a key twice.
    """
    import yaml

    from microgpt.strict_yaml import Loader

    try:
        content = b""
        if path.stat().st_size:  # some files in /proc say 0, and a read of them never ends
            with open(path, "rb") as file:
                content = file.read(LARGEST_YAML + 1)
        if len(content) > LARGEST_YAML:
            raise MicrogptError(f"{path}: more than {LARGEST_YAML:,} bytes, too many for YAML here")
        raw = yaml.load(content.decode(), Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise MicrogptError(f"{path}: not readable as YAML: {line}{error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or no date
        reason = " ".join(str(error).split())
        raise MicrogptError(f"{path}: not readable as YAML: {reason}") from None
    except OSError as error:
        raise MicrogptError(f"{path}: {error.strerror}") from None
    if not isinstance(raw, dict):
        raise MicrogptError(f"{path}: expected lines of the form 'key: value'")
    return raw


def on_line(raw: Mapping[Any, Any], key: Any) -> str:
    """The line of a key as the end of a message, if the mapping was read from YAML."""
    line = getattr(raw, "lines", {}).get(key)
    return f" (line {line})" if line else ""


def typed(name: str, value: Any, where: str) -> Any:
    """The value of a field; MicrogptError unless its type and range are right."""
    field = FIELDS[name]
    kind = KINDS[str(field.type)]
    if type(value) is int and abs(value) > LARGEST_WHOLE:
        raise MicrogptError(
            f"{where}: expected {LARGEST_WHOLE:,} at most, got a number of more digits"
        )
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        hint = ""
        if isinstance(value, str) and kind is float and POINTLESS.fullmatch(value):
            hint = f" (YAML reads {value} as text: write {_with_point(value)})"
        raise MicrogptError(
            f"{where}: expected {WORDS[str(field.type)]}, got {shortened(value)}{hint}"
        )
    limits = field.metadata
    if limits["choices"] and value not in limits["choices"]:
        expected = " or ".join(limits["choices"])
        raise MicrogptError(f"{where}: expected {expected}, got {shortened(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise MicrogptError(f"{where}: expected a finite number, got {value}")
    if limits["least"] is not None and value < limits["least"]:
        why = "; a negative seed would draw the same as its positive" if name == "seed" else ""
        raise MicrogptError(f"{where}: expected {limits['least']} or more, got {value}{why}")
    if limits["above"] is not None and value <= limits["above"]:
        raise MicrogptError(f"{where}: expected more than {limits['above']}, got {value}")
    if isinstance(value, float) and name == "temperature" and 0 < value < TINIEST:
        raise MicrogptError(f"{where}: {value} is too close to 0; try 0.001, or 0")
    if kind is int and value > limits["most"]:
        raise MicrogptError(f"{where}: expected {limits['most']:,} at most, got {value}")
    if limits["below"] is not None and value >= limits["below"]:
        raise MicrogptError(f"{where}: expected less than {limits['below']}, got {value}")
    return value


def _with_point(text: str) -> str:
    """1e-8 as YAML reads a number: 1.0e-8."""
    mantissa, e, exponent = text.lower().partition("e")
    sign = "" if exponent[:1] in "+-" else "+"
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}{e}{sign}{exponent}"
