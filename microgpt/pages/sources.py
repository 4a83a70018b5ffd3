"""The two texts as they stand: their functions, highlighted lines, and the lines behind a name."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache, cached_property
from pathlib import Path

from markupsafe import Markup, escape
from pygments.lexers import PythonLexer
from pygments.token import (
    Comment,
    Keyword,
    Name,
    Number,
    Operator,
    String,
    _TokenType,
)

from microgpt.config import Config

ROOT = Path(__file__).resolve().parent.parent.parent
Simple = ast.Assign | ast.AugAssign | ast.Expr | ast.Return
TREES = ("tap", "dtap", "tap_i", "dtap_i", "dw", "dparams")
STREAM = ("res", "dres")  # the residual stream, under one name in every layer

LEXER = PythonLexer(stripnl=False)

# what a token looks like: the style sheet has a colour for each
LOOKS: tuple[tuple[_TokenType, str], ...] = (
    (Comment, "c"),
    (String, "s"),
    (Number, "n"),
    (Keyword, "k"),
    (Operator.Word, "k"),
    (Name.Function, "f"),
    (Name.Builtin, "b"),
)


@dataclass(frozen=True)
class Line:
    """A line of a source, highlighted."""

    number: int
    code: Markup


@dataclass(frozen=True)
class Row:
    """Lines of both texts that do the same."""

    left: list[Line]
    right: list[Line]


@dataclass(frozen=True)
class Text:
    """A function in both texts: the forward pass, and the backward pass beneath it.

    Of a helper, `forward` and `backward` are empty.
    """

    name: str
    forward: str
    backward: str
    rows: list[Row]
    back: list[Row]


def highlighted(code: str) -> Markup:
    """A line of code by itself."""
    tokens = LEXER.get_tokens(code)
    return Markup().join(_coloured(kind, text) for kind, text in tokens if text != "\n")


def _coloured(kind: _TokenType, text: str) -> Markup:
    look = next((look for parent, look in LOOKS if _is(kind, parent)), "")
    return Markup('<i class="{}">{}</i>').format(look, text) if look else escape(text)


def _is(kind: _TokenType, parent: _TokenType) -> bool:
    """Whether a token's type is another, or one of its subtypes."""
    return kind[: len(parent)] == parent


class Source:
    """A module's text, by function and by line.

    config    of `if config.field`, only the branch that this model takes is behind a name
    """

    def __init__(self, path: str, config: Config | None = None) -> None:
        self.path, self.config = path, config
        self.text = (ROOT / path).read_text(encoding="utf-8")
        self.lines = self.text.splitlines()
        self.functions = {
            node.name: node
            for top in ast.parse(self.text).body
            for node in ([top] if isinstance(top, ast.FunctionDef) else getattr(top, "body", []))
            if isinstance(node, ast.FunctionDef)
        }

    @cached_property
    def _tokens(self) -> list[list[tuple[_TokenType, str]]]:
        """The tokens of every line."""
        lines: list[list[tuple[_TokenType, str]]] = [[]]
        for kind, text in LEXER.get_tokens(self.text):
            for i, part in enumerate(text.split("\n")):
                if i:
                    lines.append([])
                if part:
                    lines[-1].append((kind, part))
        return lines

    def highlighted(self, numbers: Iterable[int], links: Mapping[str, str]) -> list[Line]:
        """These lines, with links on the names that lead somewhere, `tap.q` or `softmax`."""
        return [Line(n, self._highlighted(n, links)) for n in numbers]

    def _highlighted(self, number: int, links: Mapping[str, str]) -> Markup:
        found, before = Markup(), ""
        for kind, text in self._tokens[number - 1]:
            link = links.get(before + text) or (links.get(text) if before != "." else None)
            if link and _is(kind, Name):
                found += Markup('<a href="#{}">{}</a>').format(link, text)
            else:
                found += _coloured(kind, text)
            if text == "." and before.split(".")[0] in TREES:
                before += "."
            else:
                before = text
        return found

    def span(self, function: str) -> range:
        """The lines of a function."""
        node = self.functions[function]
        return range(node.lineno, (node.end_lineno or 0) + 1)

    def body(self, function: str) -> range:
        """The lines of a function below its docstring."""
        node = self.functions[function]
        first = node.body[1 if ast.get_docstring(node) else 0]
        return range(first.lineno, (node.end_lineno or 0) + 1)

    def equation(self, function: str) -> str:
        """The first line of a docstring."""
        return (ast.get_docstring(self.functions[function]) or "").partition("\n")[0]

    def words_of(self, function: str) -> str:
        """What a docstring says after its first line."""
        text = ast.get_docstring(self.functions[function]) or ""
        return text.partition("\n")[2].strip()

    def comment_above(self, function: str, number: int) -> str:
        """The block comment that a line stands under, without what quotes the forward pass."""
        first = self.functions[function].lineno
        for line in reversed(self.lines[first : number - 1]):
            text = line.strip()
            if text.startswith("# ") and not text.startswith("# forward:"):
                return text.removeprefix("# ")
        return ""

    def keeping(self, tree: str, name: str) -> tuple[str, int] | None:
        """The function and line in which a tap is kept: (tree, name) = ("dtap", "q")."""
        for function, node in self.functions.items():
            for statement in _simple(node):
                if any(kept in (f"{tree}.{name}", f"{tree}_i.{name}") for kept in _kept(statement)):
                    return function, statement.lineno
        return None

    def behind(
        self, tree: str, name: str, taps: Iterable[str], first: bool | None = None
    ) -> list[int]:
        """The lines that compute what is kept as tap.name, back to the taps that they start from.

        taps     the names where the search ends: every other tap is explained in its own place
        first    whether it is kept in the first turn of the loop over layers, if that is known
        """
        ends = {f"{d}{tap}" for tap in taps for d in ("", "d")} | {*TREES, *STREAM, "x", "w"}
        place = self.keeping(tree, name)
        if place is None:  # the last tap of scalar, which its function returns
            return sorted(self._given_back(name, ends)) if name in self.functions else []
        derivative = "d" if tree != "tap" else ""
        return sorted(
            self._behind(self.functions[place[0]], place[1], ends, derivative + name, first)
        )

    def _behind(
        self,
        function: ast.FunctionDef,
        line: int,
        ends: set[str],
        goal: str,
        first: bool | None = None,
    ) -> set[int]:
        branches = self._branches(function)
        dead = {one for _, _, off in branches for top in off for one in _simple(top)}
        statements = [one for one in _simple(function) if one not in dead]
        target = next(one for one in statements if one.lineno == line)
        lines: set[int] = set()
        taken: set[int] = set()
        waiting = [(target, goal)]
        while waiting:
            statement, name = waiting.pop()
            lines |= self._with_comment(statement) | self._called(statement, ends)
            lines |= {number for number, on, _ in branches for top in on if statement is top}
            taken.add(statement.lineno)
            if self._section(statement):
                continue  # whose taps are explained in their own place
            value = self._branch(_value_for(statement, name))
            again = isinstance(value, ast.Name)  # another name for the same array
            for found in {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}:
                if found in ends and found != goal and not again:
                    continue
                made = [one for one in statements if found in _targets(one)]
                if found in STREAM:  # several names in turn: what it holds here
                    made = _reaching(statement, made, function, first)
                waiting += [(one, found) for one in made if one.lineno not in taken]
        return lines

    def _with_comment(self, statement: Simple) -> set[int]:
        """The lines of a statement, and of the comment above it."""
        number = statement.lineno
        while self.lines[number - 2].strip().startswith("#"):
            number -= 1
        return set(range(number, (statement.end_lineno or 0) + 1))

    def _taken(self, test: ast.expr) -> bool | None:
        """Whether this model takes a branch, if its configuration decides that."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            taken = self._taken(test.operand)
            return None if taken is None else not taken
        if self.config and isinstance(test, ast.Attribute) and ast.unparse(test.value) == "config":
            return bool(getattr(self.config, test.attr))
        return None

    def _branches(
        self, function: ast.FunctionDef
    ) -> list[tuple[int, list[ast.stmt], list[ast.stmt]]]:
        """Of every branch that the configuration decides: its line, what is run, what is not."""
        nodes = [node for node in ast.walk(function) if isinstance(node, ast.If)]
        taken = [(node, self._taken(node.test)) for node in nodes]
        return [
            (node.lineno, *((node.body, node.orelse) if run else (node.orelse, node.body)))
            for node, run in taken
            if run is not None
        ]

    def _branch(self, value: ast.expr) -> ast.expr:
        """Of `a if config.field else b`, what this model takes."""
        taken = self._taken(value.test) if isinstance(value, ast.IfExp) else None
        return value if taken is None else getattr(value, "body" if taken else "orelse")

    def _section(self, statement: Simple) -> ast.FunctionDef | None:
        """The function of a section, with taps of its own, that a statement calls."""
        call = statement.value
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            return None
        node = self.functions.get(call.func.id)
        return node if node and {"tap", "dtap"} & {one.arg for one in node.args.args} else None

    def _called(self, statement: Simple, ends: set[str]) -> set[int]:
        """What the backward pass of a section gives back, where a statement is a call of it."""
        node = self._section(statement)
        if node is None or "dtap" not in {one.arg for one in node.args.args}:
            return set()
        return self._given_back(node.name, ends)

    def _given_back(self, function: str, ends: set[str]) -> set[int]:
        """The lines of what a function returns."""
        node = self.functions[function]
        last = [one.lineno for one in _simple(node) if isinstance(one, ast.Return)][-1]
        return self._behind(node, last, ends, "")


def _reaching(
    statement: Simple, made: list[Simple], function: ast.FunctionDef, first: bool | None
) -> list[Simple]:
    """Of the statements that assign a name, those that a statement may read it from; without those
    that keep a tap, which are explained in their own place.

    first    whether the loop that a statement stands in takes its first turn, if that is known
    """
    loops = [node for node in ast.walk(function) if isinstance(node, ast.For)]
    around = {one for loop in loops if statement in ast.walk(loop) for one in _simple(loop)}
    before = [one for one in made if one.lineno < statement.lineno]
    inside, outside = ([one for one in made if (one in around) is it] for it in (True, False))
    if inside and not (before and before[-1] in around):
        before = [one for one in outside if one.lineno < statement.lineno][-1:]
        found = {True: before, False: inside[-1:], None: before + inside[-1:]}[first]
    else:
        found = before[-1:]
    return [one for one in found if not _kept(one)]


def _value_for(statement: Simple, name: str) -> ast.expr:
    """The right side of an assignment; of a tuple to a tuple, the part for one name."""
    value = statement.value or ast.Constant(None)
    if isinstance(statement, ast.Return) and isinstance(value, ast.Tuple):
        return value.elts[0]
    for target in statement.targets if isinstance(statement, ast.Assign) else ():
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for part, its_value in zip(target.elts, value.elts):
                last = _name(part).rpartition(".")[2]
                if name in (last, f"d{last}"):
                    return its_value
    return value


@cache
def _simple(function: ast.AST) -> list[Simple]:
    """The statements of a function, those in its loops and branches too, from top to bottom."""
    found = [node for node in ast.walk(function) if isinstance(node, Simple)]
    return sorted(found, key=lambda node: node.lineno)


def _name(target: ast.expr) -> str:
    """A target as a text, `tap.q`; of a[i], a."""
    return ast.unparse(target.value if isinstance(target, ast.Subscript) else target)


@cache
def _targets(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.AugAssign):
        return [_name(statement.target)]
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        called, arguments = ast.unparse(statement.value.func), statement.value.args
        if called.endswith(".append"):
            return [called.removesuffix(".append")]
        return [_name(arguments[0])] if called.endswith(".at") and arguments else []
    if not isinstance(statement, ast.Assign):
        return []
    return [
        _name(part)
        for target in statement.targets
        for part in (target.elts if isinstance(target, ast.Tuple) else [target])
    ]


def _kept(statement: ast.stmt) -> list[str]:
    return [name for name in _targets(statement) if name.split(".")[0] in TREES]


def _key(statement: ast.stmt) -> str:
    """The key by which a statement is found in the other text: the tap or name that it makes."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Assign):
            kept = _kept(node)
            return kept[0].partition(".")[2] if kept else _targets(node)[0]
        if isinstance(node, ast.Return):
            return "return"
    return ast.unparse(statement)[:20]


def _chunks(source: Source, function: str) -> list[tuple[str, int, int]]:
    """The statements of a function: a key, the first line, and the first line of the next."""
    node = source.functions[function]
    starts = [("head", node.lineno)]
    body = node.body[1:] if ast.get_docstring(node) else node.body
    statements = [
        one
        for top in body
        for one in ([top] if not hasattr(top, "body") else [top, *getattr(top, "body", [])])
    ]
    seen: set[int] = set()
    for statement in sorted(statements, key=lambda one: one.lineno):
        number = statement.lineno
        while source.lines[number - 2].strip().startswith("# ") and number - 1 not in seen:
            number -= 1
        if number < statement.lineno:
            starts.append((source.lines[number - 1].strip(), number))
        starts.append((_key(statement), statement.lineno))
        seen |= set(
            range(
                number,
                (statement.end_lineno or 0) + 1
                if not hasattr(statement, "body")
                else statement.lineno + 1,
            )
        )
    ends = [start for _, start in starts[1:]] + [(node.end_lineno or 0) + 1]
    return [(key, start, end) for (key, start), end in zip(starts, ends) if start < end]


def side_by_side(
    left: Source, ours: str, right: Source, theirs: str, links: Mapping[str, str]
) -> list[Row]:
    """Two functions, each line beside the line of the other text that does the same."""
    a, b = _chunks(left, ours), _chunks(right, theirs)
    matcher = SequenceMatcher(a=[key for key, *_ in a], b=[key for key, *_ in b], autojunk=False)
    cuts = [
        (i, j)
        for i, j, n in matcher.get_matching_blocks()
        for i, j in zip(range(i, i + n), range(j, j + n))
    ]
    rows = []
    for (i, j), (i_end, j_end) in zip(cuts, [*cuts[1:], (len(a), len(b))]):
        ours_lines = range(a[i][1], a[i_end - 1][2])
        theirs_lines = range(b[j][1], b[j_end - 1][2])
        rows.append(
            Row(left.highlighted(ours_lines, links), right.highlighted(theirs_lines, links))
        )
    return rows


def upside_down(
    left: Source, ours: str, right: Source, theirs: str, links: Mapping[str, str]
) -> list[Row]:
    """A backward pass beside what it differentiates, block by block, the last block first."""
    a, b = _blocks(left, ours), _blocks(right, theirs)
    if [key for key, *_ in a[1:]] != [key for key, *_ in b[1:]][::-1]:
        a, b = [("", a[0][1], a[-1][2])], [("", b[0][1], b[-1][2])]
    pairs: Sequence[tuple[tuple[str, int, int], tuple[str, int, int]]] = [
        (a[0], b[0]),
        *zip(a[:0:-1], b[1:]),
    ]
    return [
        Row(left.highlighted(range(*x[1:]), links), right.highlighted(range(*y[1:]), links))
        for x, y in pairs
    ]


def _blocks(source: Source, function: str) -> list[tuple[str, int, int]]:
    """A function cut at its block comments, what comes before the first of them at the head."""
    node = source.functions[function]
    end = (node.end_lineno or 0) + 1
    starts, quoting = [("", node.lineno)], False
    for number in range(node.lineno, end):
        line = source.lines[number - 1].strip()
        quoting = line.startswith("# forward:") or (quoting and line.startswith("#"))
        if line.startswith("# ") and not quoting:
            starts.append((line, number))
    ends = [start for _, start in starts[1:]] + [end]
    return [(key, start, stop) for (key, start), stop in zip(starts, ends)]


def texts(left: Source, right: Source, value: Source, links: Mapping[str, str]) -> list[Text]:
    """The functions of both models, then the helpers of the right one.

    value    where the helpers' twins of the same name are
    """
    found = []
    for name in left.functions:
        forward, backward = f"{name}_forward", f"{name}_backward"
        if forward in right.functions:
            rows = side_by_side(left, name, right, forward, links)
            back = upside_down(left, name, right, backward, links)
            found.append(Text(name, forward, backward, rows, back))
    paired = {name for text in found for name in (text.forward, text.backward)}
    for name in right.functions:
        if name in value.functions and name not in paired:
            rows = side_by_side(value, name, right, name, links)
            found.append(Text(name, "", "", rows, []))
        elif name not in paired:
            alone = Row([], right.highlighted(right.span(name), links))
            found.append(Text(name, "", "", [alone], []))
    return found
