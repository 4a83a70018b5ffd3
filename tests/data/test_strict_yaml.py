"""Unchecked YAML: both parsers read the same values, and refuse the same texts on the same line."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from microgpt import strict_yaml
from microgpt.settings import FIXTURES

pytestmark = pytest.mark.quick

LOADERS = [strict_yaml.PythonLoader]
if yaml.__with_libyaml__:
    LOADERS.append(strict_yaml.LibyamlLoader)
FILES = sorted(FIXTURES.rglob("*.yaml"))


def _plain(value: Any) -> Any:
    """A value with the lines of its keys."""
    if isinstance(value, dict):
        lines = getattr(value, "lines", None)
        return {key: (_plain(x), lines and lines[key]) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, list) else (type(value), value)


def test_libyaml_is_used_where_it_is_there() -> None:
    assert strict_yaml.Loader is LOADERS[-1]


@pytest.mark.skipif(len(LOADERS) == 1, reason="PyYAML without libyaml")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_both_parsers_read_the_same(path: Any) -> None:
    text = path.read_text(encoding="utf-8")
    python, libyaml = (_plain(yaml.load(text, loader)) for loader in LOADERS)
    assert python == libyaml


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("a: 1\nb: *c\n", 2, "aliases are not read"),
        ("a: &c 1\nb: *c\n", 2, "aliases are not read"),
        ("a: 1\nb: !!python/name:os.system x\n", 2, "tags are not read"),
        ("a: 1\nb: !!str 2\n", 2, "tags are not read"),
        ("a: 1\nb: 2\na: 3\n", 3, "the key 'a' is there twice, first on line 1"),
        ("a: 1\n? [b]\n: 2\n", 2, "a key that is a list or a mapping"),
        ("a: 1\nb: " + "[" * 30 + "]" * 30, 2, "nested more than 20 levels deep"),
        ("a: 1\nb: " + "9" * 200, 2, "a number of 200 characters"),
        ("a: 1\nb: 1." + "9" * 200, 2, "a number of 202 characters"),
        ("a: 1\nb: 017\n", 2, "YAML reads 017 as 15; write it as a decimal number"),
        ("a: 1\nb: [1, -1:30]\n", 2, "YAML reads -1:30 as -90; write it as a decimal number"),
        ("a: 1\nb: 1:30.5\n", 2, "YAML reads 1:30.5 as 90.5; write it as a decimal number"),
        ("a: 1\nb: 0x1f\n", 2, "YAML reads 0x1f as 31; write it as a decimal number"),
        ("a: 1\nb: 0b11\n", 2, "YAML reads 0b11 as 3; write it as a decimal number, or as '0b11'"),
        ("a: 1\n010: 2\n", 2, "YAML reads 010 as 8"),
        ("a: 1\nb: [1, 2\n", 3, "expected ',' or ']'"),
        ("a: 1\nb: 'x\n", 3, "found unexpected end of stream"),
    ],
)
def test_what_is_refused_and_where(loader: Any, text: str, line: int, problem: str) -> None:
    with pytest.raises(yaml.MarkedYAMLError) as refused:
        yaml.load(text, loader)
    assert refused.value.problem_mark
    assert refused.value.problem_mark.line + 1 == line
    assert problem in str(refused.value.problem)


@pytest.mark.parametrize("loader", LOADERS)
def test_numbers_are_what_they_are_written_as(loader: Any) -> None:
    text = "[0, -7, +7, 10_000, 1.5, -0.5, 017.5, .5, 1.0e-8, '017', '1:30']"
    values = [0, -7, 7, 10_000, 1.5, -0.5, 17.5, 0.5, 1e-8, "017", "1:30"]
    assert yaml.load(text, loader) == values
