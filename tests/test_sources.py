"""The import rule, and the mapping between the two implementations, read from their sources.

Each rule is a function from source text to complaints, and each is shown a text that breaks it.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest

from microgpt.backend import fresh_state, load_backend
from microgpt.config import load_config
from microgpt.init import init_params
from microgpt.layout import pick, tap_names

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("scalar", "vectorized", "microgpt", "crosscheck")
Complaints = Iterator[str]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path.read_text(encoding="utf-8")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
SCALAR, VECTORIZED = SOURCES["scalar.model"], SOURCES["vectorized.model"]


# --- the import rule -----------------------------------------------------------------------------


def imports(tree: ast.AST, sources: Mapping[str, str], inside: bool = True) -> Iterator[str]:
    """The modules that a source imports, those inside its functions only on demand."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = "." * node.level + (node.module or "")
            for alias in node.names:
                submodule = f"{package}.{alias.name}"
                yield submodule if submodule in sources else package
        elif inside or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports(node, sources, inside)


def is_plain(module: str, sources: Mapping[str, str], above: tuple[str, ...] = ()) -> bool:
    """Whether importing a module needs nothing but the standard library."""
    if module.split(".")[0] in sys.stdlib_module_names or module in above:
        return True
    if not module.startswith("microgpt") or module not in sources:
        return False
    needed = {"microgpt", *imports(ast.parse(sources[module]), sources, inside=False)}
    return all(is_plain(name, sources, (*above, module)) for name in needed)


def import_complaints(sources: Mapping[str, str]) -> Complaints:
    for module, text in sources.items():
        tree, package = ast.parse(text), module.split(".")[0]
        at_module_level = set(imports(tree, sources, inside=False))
        for name in imports(tree, sources):
            top = name.split(".")[0]
            if package == "crosscheck" or top == package:
                continue
            if package == "scalar":
                allowed = is_plain(name, sources)
            elif package == "vectorized":
                allowed = top in sys.stdlib_module_names or top in ("numpy", "microgpt")
            elif top == "crosscheck":
                allowed = module == "microgpt.cli" and name not in at_module_level
            else:
                allowed = top not in ("scalar", "vectorized")
            if not allowed:
                yield f"{module} imports {name}"
        if package != "crosscheck" and module != "microgpt.backend":
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            if names & {"import_module", "importlib", "__import__"}:
                yield f"{module} imports by name"


def test_the_sources_keep_the_import_rule() -> None:
    assert set(PACKAGES) <= {module.split(".")[0] for module in SOURCES}
    assert list(import_complaints(SOURCES)) == []


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("scalar.model", "import vectorized.model", "scalar.model imports vectorized.model"),
        ("scalar.model", "from vectorized import model", "scalar.model imports vectorized.model"),
        ("scalar.value", "def f():\n    import numpy as np", "scalar.value imports numpy"),
        ("scalar.adam", "from microgpt import train", "scalar.adam imports microgpt.train"),
        ("scalar.adam", "from .value import Value", "scalar.adam imports .value"),
        ("microgpt.errors", "import yaml", "scalar.model imports microgpt.config"),
        ("microgpt", "import numpy", "scalar.model imports microgpt.config"),
        ("vectorized.adam", "from scalar.adam import adam", "vectorized.adam imports scalar.adam"),
        ("vectorized.arrays", "import scipy.special", "vectorized.arrays imports scipy.special"),
        ("vectorized.arrays", "import crosscheck", "vectorized.arrays imports crosscheck"),
        ("microgpt.train", "def f():\n    import scalar.model", "train imports scalar.model"),
        ("microgpt.train", "import_module('scalar.model')", "microgpt.train imports by name"),
        ("microgpt.train", "def f():\n    import crosscheck", "microgpt.train imports crosscheck"),
        ("microgpt.cli", "from crosscheck.cases import CASES", "cli imports crosscheck.cases"),
        ("scalar.model", "__import__('vectorized')", "scalar.model imports by name"),
    ],
)
def test_an_import_against_the_rule_is_found(module: str, line: str, complaint: str) -> None:
    doctored = {**SOURCES, module: f"{SOURCES[module]}\n{line}\n"}
    assert any(found.endswith(complaint) for found in import_complaints(doctored))


def test_the_command_line_may_import_the_crosscheck_where_it_needs_it() -> None:
    text = SOURCES["microgpt.cli"] + "\ndef f():\n    import crosscheck.cases\n"
    assert list(import_complaints({**SOURCES, "microgpt.cli": text})) == []


# --- the mapping ---------------------------------------------------------------------------------


def functions(text: str) -> dict[str, ast.FunctionDef]:
    """The public functions of a source, in order."""
    body = ast.parse(text).body
    found = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    return {name: node for name, node in found.items() if not name.startswith("_")}


def equation(function: ast.FunctionDef) -> str:
    """The first line of a docstring."""
    return (ast.get_docstring(function) or "").partition("\n")[0]


def mentioned(function: ast.FunctionDef, tree: str) -> list[str]:
    """The names that a function takes from tap or dtap, in the order of their first mention."""
    places = [
        (node.lineno, node.col_offset, node.attr)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == tree
    ]
    return list(dict.fromkeys(name for _, _, name in sorted(places)))


def tap_assignments(function: ast.FunctionDef) -> list[tuple[str, ast.Assign]]:
    """The statements `tap.name = ..` of a function of scalar."""
    return [
        (target.attr, node)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute)
        and isinstance(target.value, ast.Name)
        and target.value.id == "tap"
    ]


def taps_of(function: ast.FunctionDef) -> list[str]:
    return [name for name, _ in sorted(tap_assignments(function), key=lambda tap: tap[1].lineno)]


def comments(text: str) -> dict[int, str]:
    """The comments of a source by line."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}


def block_comments(text: str, function: ast.FunctionDef) -> list[str]:
    """The comments on lines of their own, without what quotes the forward pass."""
    found, lines, quoting = [], text.splitlines(), False
    for number in range(function.lineno, function.end_lineno or 0):
        line = lines[number - 1].strip()
        quoting = line.startswith("# forward:") or (quoting and line.startswith("#"))
        if line.startswith("#") and not quoting:
            found.append(line)
    return found


def order_complaints(scalar: str, vectorized: str) -> Complaints:
    expected = [f"{name}_{way}" for name in functions(scalar) for way in ("forward", "backward")]
    found = [name for name in functions(vectorized) if name.endswith(("_forward", "_backward"))]
    if list(functions(vectorized))[: len(expected)] != expected or found != expected:
        yield f"the functions are {found}, not {expected}"


def equation_complaints(scalar: str, vectorized: str) -> Complaints:
    for name, function in functions(scalar).items():
        ours, theirs = equation(function), equation(functions(vectorized)[f"{name}_forward"])
        if "=" not in ours or ours != theirs:
            yield f"{name} computes {ours!r}, {name}_forward {theirs!r}"
        back = equation(functions(vectorized)[f"{name}_backward"])
        if not re.match(r"d\w+(, d\w+)* = ", back):
            yield f"{name}_backward does not say what it computes"


def tap_complaints(scalar: str, vectorized: str) -> Complaints:
    for name, function in functions(scalar).items():
        taps = taps_of(function)
        if name == "loss":
            taps.append("loss")  # which scalar returns
        forward, backward = (functions(vectorized)[f"{name}_{x}"] for x in ("forward", "backward"))
        found = [tap for tap in mentioned(forward, "tap") if tap in taps]
        if found != taps:
            yield f"{name} has the taps {taps}, {name}_forward {found}"
        # dv comes with the derivative of the weights, dq and dk with that of the logits
        single = [tap for tap in taps if tap not in ("q", "k", "v")]
        received = backward.args.args[0].arg.removeprefix("d")  # the derivative that comes in
        derivatives = [received, *mentioned(backward, "dtap")]
        found = [tap for tap in dict.fromkeys(derivatives) if tap in single]
        if found != single[::-1]:
            yield f"{name}_backward has the taps {found}, not {single[::-1]}"
        if missing := set(taps) - set(derivatives):
            yield f"{name}_backward lacks {sorted(missing)}"


def comment_complaints(scalar: str, vectorized: str) -> Complaints:
    for name, function in functions(scalar).items():
        ours = block_comments(scalar, function)
        forward, backward = (
            block_comments(vectorized, functions(vectorized)[f"{name}_{way}"])
            for way in ("forward", "backward")
        )
        if ours != forward:
            yield f"{name} has the blocks {ours}, {name}_forward {forward}"
        if ours[::-1] != backward:
            yield f"{name} has the blocks {ours}, {name}_backward {backward}"


def shape_complaints(scalar: str, vectorized: str) -> Complaints:
    for name, function in functions(scalar).items():
        for tap, node in tap_assignments(function):
            shape = comments(scalar).get(node.end_lineno or 0, "")
            if tap != "loss_t" and not re.match(r"# \[", shape):  # loss_t is a single number
                yield f"{name}: tap.{tap} has no shape"


RULES = [
    order_complaints,
    equation_complaints,
    tap_complaints,
    comment_complaints,
    shape_complaints,
]


@pytest.mark.parametrize("rule", RULES)
def test_vectorized_is_scalar_function_by_function(
    rule: Callable[[str, str], Complaints],
) -> None:
    assert list(rule(SCALAR, VECTORIZED)) == []


# two sources that keep every rule
SMALL_SCALAR = '''
def double(x, tap):
    """y = 2 x"""
    # twice
    tap.twice = x + x  # [n]
    # as it is
    y = tap.y = [
        x_i for x_i in tap.twice
    ]  # [n]
    return y


def loss(x, tap):
    """loss = sum(x)"""
    tap.loss_t = x
    return total(x)
'''
SMALL_VECTORIZED = '''
def double_forward(x, tap):
    """y = 2 x"""
    # twice
    np.add(x, x, tap.twice)  # (n, N)
    # as it is
    return np.copy(tap.twice, tap.y)


def double_backward(dy, tap, dtap):
    """dx = 2 dy"""
    # as it is
    # forward: y = twice, which changes nothing,
    # in either direction
    np.copy(dy, dtap.twice)
    # twice
    return 2 * dtap.twice


def loss_forward(x, tap):
    """loss = sum(x)"""
    tap.loss_t = x
    tap.loss = x.sum()


def loss_backward(x, dtap):
    """dx = 1"""
    dtap.loss = 1.0
    dtap.loss_t = np.ones_like(x)


def helper(x):
    """Whatever it takes."""
'''


@pytest.mark.parametrize("rule", RULES)
def test_two_sources_that_keep_the_rules_meet_no_complaint(
    rule: Callable[[str, str], Complaints],
) -> None:
    assert list(rule(SMALL_SCALAR, SMALL_VECTORIZED)) == []


@pytest.mark.parametrize(
    ("rule", "old", "new"),
    [
        (order_complaints, "double_forward", "twofold_forward"),
        (order_complaints, "def double_backward", "def between(x): pass\ndef double_backward"),
        (order_complaints, "def helper", "def helper_forward"),
        (order_complaints, "def loss(x, tap):", "def another(x): pass\ndef loss(x, tap):"),
        (equation_complaints, '"""y = 2 x"""\n    # twice\n    np', '"""y = x"""\n    np'),
        (equation_complaints, '"""dx = 2 dy"""', '"""does what it does"""'),
        (equation_complaints, '"""loss = sum(x)"""', '"""The loss."""'),
        (tap_complaints, "np.add(x, x, tap.twice)", "np.add(x, x, tap.y)"),
        (tap_complaints, "np.copy(tap.twice, tap.y)", "tap.twice"),
        (tap_complaints, "dtap.twice", "dtwice"),
        (tap_complaints, "dtap.loss = 1.0", "dtap.loss_t = 1.0\n    dtap.loss = 1.0"),
        (comment_complaints, "# twice\n    np", "np"),
        (comment_complaints, "# twice\n    return", "return"),
        (comment_complaints, "# as it is\n    # forward", "# as it was\n    # forward"),
        (shape_complaints, "tap.twice = x + x  # [n]", "tap.twice = x + x"),
        (shape_complaints, "]  # [n]\n    return", "]\n    return"),
    ],
)
def test_a_source_against_a_rule_is_found(
    rule: Callable[[str, str], Complaints], old: str, new: str
) -> None:
    assert old in SMALL_SCALAR + SMALL_VECTORIZED
    doctored = (text.replace(old, new) for text in (SMALL_SCALAR, SMALL_VECTORIZED))
    assert list(rule(*doctored))


def test_the_taps_of_scalar_are_those_of_the_layout_in_order() -> None:
    taps = {name: taps_of(function) for name, function in functions(SCALAR).items()}
    *embedding, logits = taps["gpt"]
    found = [*embedding, *taps["attention"], *taps["mlp"], logits, *taps["loss"], "loss"]
    names = tap_names(load_config(overrides={"n_layer": "1"}))
    assert found == [name.removeprefix("layer0.") for name in names]


def test_the_shapes_beside_the_taps_of_scalar_are_their_shapes() -> None:
    config = load_config(overrides={"n_embd": "6", "n_head": "2"})
    params = init_params(config, 5, Random(1))
    backend: Any = load_backend("scalar", config, fresh_state(params))
    backend.forward([[4, 0, 1, 2, 4]])
    t = 2
    sizes = {"C": 6, "H": 2, "F": 24, "V": 5, "t+1": t + 1}
    for function in functions(SCALAR).values():
        for name, node in tap_assignments(function):
            letters = re.findall(r"\[(.+?)\]", comments(SCALAR).get(node.end_lineno or 0, ""))
            prefix = "" if name in ("emb", "emb_norm", "logits", "loss_t") else "layer0."
            tap = pick(backend.doc_taps[0][t], prefix + name)
            for letter in letters:
                assert len(tap) == sizes[letter], name
                tap = tap[0]
            assert not isinstance(tap, list), name


def adam_complaints(scalar: str, vectorized: str) -> Complaints:
    if list(functions(scalar)) != list(functions(vectorized)):
        yield "the functions differ"
    for ours, theirs in zip(functions(scalar).values(), functions(vectorized).values()):
        if equation(ours) != equation(theirs):
            yield f"{ours.name}: the equations differ"
        names, others = (
            # the gradients lie in the parameters, or beside them, and arrays want a place to lie
            [
                argument.arg
                for argument in f.args.args
                if argument.arg not in ("params", "grads", "scratch")
            ]
            for f in (ours, theirs)
        )
        if names != others:
            yield f"{ours.name}: the parameters are {names} and {others}"


def test_adam_has_the_same_functions_equations_and_parameters() -> None:
    assert list(adam_complaints(SOURCES["scalar.adam"], SOURCES["vectorized.adam"])) == []


@pytest.mark.parametrize(
    ("old", "new"), [("def f", "def g"), ("y = 2 x", "y = x"), ("step", "t"), ("step, ", "")]
)
def test_an_adam_that_differs_is_found(old: str, new: str) -> None:
    ours = 'def f(params, m, step, lr):\n    """y = 2 x"""\n'
    theirs = 'def f(params, grads, m, step, lr):\n    """y = 2 x"""\n'
    assert list(adam_complaints(ours, theirs)) == []
    assert list(adam_complaints(ours, theirs.replace(old, new)))


# --- the text ------------------------------------------------------------------------------------


def text_complaints(text: str) -> Complaints:
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > 100:
            yield f"line {number} has {len(line)} columns"
        if not line.isascii():
            yield f"line {number} is not ASCII"


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("*.py")), ids=lambda p: p.name)
def test_tests_are_ascii_of_100_columns(path: Path) -> None:
    assert list(text_complaints(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("module", SOURCES)
def test_sources_are_ascii_of_100_columns(module: str) -> None:
    assert list(text_complaints(SOURCES[module])) == []


def test_a_wide_line_and_a_character_that_is_not_ascii_are_found() -> None:
    assert list(text_complaints("x" * 100 + "\n" + "y" * 101)) == ["line 2 has 101 columns"]
    assert list(text_complaints("x\ny\u00e9")) == ["line 2 is not ASCII"]
