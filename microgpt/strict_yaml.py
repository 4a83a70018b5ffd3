"""YAML from files that are not trusted: plain values, each key once, in a second at most.

Where PyYAML comes with libyaml, its parser reads the text, in a fraction of the time.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from typing import Any, TypeVar

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from microgpt.errors import shortened

DEEPEST = 20  # levels of lists and mappings
LONGEST_NUMBER = 100  # characters of a number: longer ones take time out of all proportion
MOST = 10_000  # keys and values: the parser that PyYAML has everywhere takes a second for these
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*)")

T = TypeVar("T", int, float)


class Section(dict[Any, Any]):
    """A mapping as it stands in a file."""

    lines: dict[Any, int]  # on which each key stands, from 1


class Strict(Composer, SafeConstructor, Resolver):
    """What makes plain values of what a parser finds, and nothing else, as PyYAML's safe loader.

    Aliases are refused: a file of a few lines can ask for billions of values by them. So are tags,
    which nothing here needs, and keys that are there twice, of which PyYAML would take the last.
    Numbers are decimal: YAML 1.1 takes 017 for 15 and 1:30 for 90, and these are refused.
    """

    level = count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[attr-defined]
        if isinstance(event, yaml.AliasEvent):
            raise _refusal(event, "aliases are not read")
        if getattr(event, "tag", None):
            raise _refusal(event, "tags are not read")
        if self.level == DEEPEST:
            raise _refusal(event, f"nested more than {DEEPEST} levels deep")
        self.count += 1
        if self.count > MOST:
            raise _refusal(event, f"more than {MOST:,} keys and values")
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def section(self, node: yaml.MappingNode) -> Iterator[Section]:
        """A mapping, empty until what it holds has been made."""
        section = Section()
        yield section
        section.lines = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _refusal(key_node, "a key that is a list or a mapping")
            if key in section:
                again = f"the key {shortened(key)} is there twice"
                raise _refusal(key_node, f"{again}, first on line {section.lines[key]}")
            section.lines[key] = key_node.start_mark.line + 1
            section[key] = self.construct_object(value_node, deep=True)

    def whole(self, node: yaml.ScalarNode) -> int:
        """A whole number."""
        number = self.construct_yaml_int(_short(node))
        return _as_written(node, number, WHOLE.fullmatch(node.value) is not None)

    def real(self, node: yaml.ScalarNode) -> float:
        """A number with a point."""
        number = self.construct_yaml_float(_short(node))
        return _as_written(node, number, ":" not in node.value)


constructors: dict[str, Any] = {"map": Strict.section, "int": Strict.whole, "float": Strict.real}
for tag, constructor in constructors.items():
    Strict.add_constructor(f"tag:yaml.org,2002:{tag}", constructor)


class PythonLoader(Strict, yaml.SafeLoader):
    """With the parser that PyYAML has everywhere."""


Loader: Any = PythonLoader
if yaml.__with_libyaml__:
    from yaml._yaml import CParser

    class LibyamlLoader(Strict, CParser):
        """With the parser of libyaml."""

        def __init__(self, stream: str | bytes) -> None:
            CParser.__init__(self, stream)
            for part in (Composer, SafeConstructor, Resolver):
                part.__init__(self)

    Loader = LibyamlLoader


def _short(node: yaml.ScalarNode) -> yaml.ScalarNode:
    if len(node.value) > LONGEST_NUMBER:
        raise _refusal(node, f"a number of {len(node.value):,} characters")
    return node


def _as_written(node: yaml.ScalarNode, number: T, decimal: bool) -> T:
    """The number, if it is what one reads; in YAML 1.1 there are other bases, and minutes."""
    if not decimal:
        text = shortened(node.value)
        problem = f"YAML reads {text[1:-1]} as {shortened(number)}; write it as a decimal number"
        raise _refusal(node, f"{problem}, or as {text} if it is a text")
    return number


def _refusal(what: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=what.start_mark)
