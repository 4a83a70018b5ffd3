"""YAML that is not believed: plain values, each key once, no more work than its size asks for."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import yaml

from microgpt.errors import shortened

DEEPEST = 20  # levels of lists and mappings
LONGEST = 100  # characters of a number: longer ones take time out of all proportion


class Section(dict[Any, Any]):
    """A mapping as it stands in a file."""

    lines: dict[Any, int]  # on which each key stands, from 1


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which makes nothing but plain values, and stricter than that.

    Aliases are refused: a file of a few lines can ask for billions of values by them. So are tags,
    which nothing here needs, and keys that are there twice, of which PyYAML would take the last.
    """

    level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _refusal(event, "aliases are not read")
        if getattr(event, "tag", None):
            raise _refusal(event, "tags are not read")
        if self.level == DEEPEST:
            raise _refusal(event, f"nested more than {DEEPEST} levels deep")
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
        return self.construct_yaml_int(_short(node))

    def real(self, node: yaml.ScalarNode) -> float:
        """A number with a point."""
        return self.construct_yaml_float(_short(node))


Loader.add_constructor("tag:yaml.org,2002:map", Loader.section)
Loader.add_constructor("tag:yaml.org,2002:int", Loader.whole)
Loader.add_constructor("tag:yaml.org,2002:float", Loader.real)


def _short(node: yaml.ScalarNode) -> yaml.ScalarNode:
    if len(node.value) > LONGEST:
        raise _refusal(node, f"a number of {len(node.value):,} characters")
    return node


def _refusal(what: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=what.start_mark)
