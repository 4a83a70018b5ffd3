"""The import rule, and the mapping between the two implementations, read from their sources.

Each rule is a function from source text to complaints, and each is shown a text that breaks it.
"""

from __future__ import annotations

import ast
import io
import itertools
import re
import sys
import tokenize
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from microgpt.config import Config
from microgpt.init import init_params
from microgpt.layout import Tree, grow, tap_names
from microgpt.settings import load_config
from microgpt.taps import ACTIVATIONS
from scalar.value import Value

pytestmark = pytest.mark.quick

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
TAPS = [name.removeprefix("layer0.") for name in tap_names(load_config(overrides={"n_layer": "1"}))]
EXTRAS = ("attn_scale", "mlp_scale", "emb_scale", "probs")  # taps for the backward pass alone


# --- the import rule -----------------------------------------------------------------------------


@cache
def read(source: str) -> tuple[list[tuple[ast.stmt, bool]], set[str]]:
    """The import statements of a source, each with whether it stands in no function; its names."""
    statements, names = [], set()
    waiting: list[tuple[ast.AST, bool]] = [(ast.parse(source), True)]
    for node, outside in waiting:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            statements.append((node, outside))
        elif isinstance(node, ast.Name):
            names.add(node.id)
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        waiting += [(child, outside and not function) for child in ast.iter_child_nodes(node)]
    return statements, names


def imports(source: str, sources: Mapping[str, str], inside: bool = True) -> Iterator[str]:
    """The modules that a source imports, those inside its functions only on demand."""
    for node, outside in read(source)[0]:
        if not (inside or outside):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = "." * node.level + (node.module or "")
            for alias in node.names:
                submodule = f"{package}.{alias.name}"
                yield submodule if submodule in sources else package


def is_plain(module: str, sources: Mapping[str, str], above: tuple[str, ...] = ()) -> bool:
    """Whether importing a module needs nothing but the standard library."""
    if module.split(".")[0] in sys.stdlib_module_names or module in above:
        return True
    if not module.startswith("microgpt") or module not in sources:
        return False
    needed = {"microgpt", *imports(sources[module], sources, inside=False)}
    return all(is_plain(name, sources, (*above, module)) for name in needed)


def import_complaints(sources: Mapping[str, str]) -> Complaints:
    for module, text in sources.items():
        package = module.split(".")[0]
        at_module_level = set(imports(text, sources, inside=False))
        for name in imports(text, sources):
            top = name.split(".")[0]
            if package == "crosscheck" or top == package:
                continue
            if package == "scalar":
                allowed = is_plain(name, sources)
            elif package == "vectorized":
                allowed = top in sys.stdlib_module_names or top in ("numpy", "microgpt")
            elif top == "crosscheck":
                allowed = module == "microgpt.cli.commands" and name not in at_module_level
            else:
                allowed = top not in ("scalar", "vectorized")
            if not allowed:
                yield f"{module} imports {name}"
        if package != "crosscheck" and module != "microgpt.backend":
            _, names = read(text)
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
        ("vectorized.batch", "import scipy.special", "vectorized.batch imports scipy.special"),
        ("vectorized.batch", "import crosscheck", "vectorized.batch imports crosscheck"),
        ("microgpt.train", "def f():\n    import scalar.model", "train imports scalar.model"),
        ("microgpt.train", "import_module('scalar.model')", "microgpt.train imports by name"),
        ("microgpt.train", "def f():\n    import crosscheck", "microgpt.train imports crosscheck"),
        (
            "microgpt.cli.commands",
            "from crosscheck.cases import CASES",
            "imports crosscheck.cases",
        ),
        ("scalar.model", "__import__('vectorized')", "scalar.model imports by name"),
    ],
)
def test_an_import_against_the_rule_is_found(module: str, line: str, complaint: str) -> None:
    doctored = {**SOURCES, module: f"{SOURCES[module]}\n{line}\n"}
    assert any(found.endswith(complaint) for found in import_complaints(doctored))


def test_the_command_line_may_import_the_crosscheck_where_it_needs_it() -> None:
    text = SOURCES["microgpt.cli.commands"] + "\ndef f():\n    import crosscheck.cases\n"
    assert list(import_complaints({**SOURCES, "microgpt.cli.commands": text})) == []


# --- the mapping ---------------------------------------------------------------------------------


def functions(text: str) -> dict[str, ast.FunctionDef]:
    """The public functions of a source, in order."""
    body = ast.parse(text).body
    found = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    return {name: node for name, node in found.items() if not name.startswith("_")}


def equation(function: ast.FunctionDef) -> str:
    """The first line of a docstring."""
    return (ast.get_docstring(function) or "").partition("\n")[0]


def assigned(node: ast.AST, *trees: str) -> list[str]:
    """The names under which something is put into tap or dtap, in order."""
    places = [
        (target.lineno, target.col_offset, target.attr)
        for target in ast.walk(node)
        if isinstance(target, ast.Attribute)
        and isinstance(target.ctx, ast.Store)
        and isinstance(target.value, ast.Name)
        and target.value.id in trees
    ]
    return [name for _, _, name in sorted(places)]


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
        if not re.match(r"d\w+(\[\w+\])?(, d\w+(\[\w+\])?)* = ", back):
            yield f"{name}_backward does not say what it computes"


def tap_complaints(scalar: str, vectorized: str) -> Complaints:
    every = ["loss"]  # which scalar returns
    for name, function in functions(scalar).items():
        taps = assigned(function, "tap") + ["loss"] * (name == "loss")
        every += assigned(function, "tap")
        forward, backward = (functions(vectorized)[f"{name}_{x}"] for x in ("forward", "backward"))
        found = [tap for tap in assigned(forward, "tap") if tap not in EXTRAS]
        if found != taps:
            yield f"{name} has the taps {taps}, {name}_forward {found}"
        if found := assigned(backward, "tap"):
            yield f"{name}_backward has the taps {found}"
        received = backward.args.args[0].arg.removeprefix("d")  # the derivative that comes in
        found = [tap for tap in (received, *assigned(backward, "dtap")) if tap in taps]
        if together(found) != together(taps)[::-1]:
            yield f"{name}_backward has the taps {found}, not {taps} from the last to the first"
    if sorted(assigned(ast.parse(vectorized), "dtap", "dtap_i")) != sorted(every):
        yield "the backward pass does not keep every derivative once"


def together(taps: list[str]) -> list[str]:
    """q, k and v as one: their order is the same in both directions."""
    return re.sub(r"\bq k v\b", "qkv", " ".join(taps)).split()


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
    for text, bracket in ((scalar, "["), (vectorized, "(")):
        lines = comments(text)
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Assign):
                continue
            shape = lines.get(node.end_lineno or 0, "")
            for tap in assigned(node, "tap", "dtap", "tap_i", "dtap_i"):
                single = text == scalar and tap == "loss_t"  # a single number
                if not single and not shape.startswith(f"# {bracket}"):
                    yield f"line {node.lineno}: {tap} has no shape"


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
    twice = tap.twice = x + x  # (n)
    # as it is
    tap.y, tap.attn_scale = twice, 1.0  # (n), ()
    return tap.y


def double_backward(dy, tap, dtap):
    """dx = 2 dy"""
    # as it is
    # forward: y = twice, which changes nothing,
    # in either direction
    dtwice = dtap.twice = tap.attn_scale * dy  # (n)
    # twice
    return 2 * dtwice


def loss_forward(x, tap):
    """loss = sum(x)"""
    tap.loss_t = x  # (n)
    tap.loss = x.sum()  # ()


def loss_backward(x, dtap):
    """dx[i] = 1, dloss = 1"""
    dtap.loss = 1.0  # ()
    dtap.loss_t = np.ones_like(x)  # (n)
    dtap.y = dtap.loss_t  # (n)


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
        (equation_complaints, '"""y = 2 x"""\n    # twice\n    twice', '"""y = x"""\n    twice'),
        (equation_complaints, '"""dx = 2 dy"""', '"""does what it does"""'),
        (equation_complaints, '"""dx = 2 dy"""', '"""dx dy = 2"""'),
        (equation_complaints, '"""loss = sum(x)"""', '"""The loss."""'),
        (tap_complaints, "twice = tap.twice = x + x", "twice = x + x"),
        (tap_complaints, "twice = tap.twice = x + x", "tap.y = tap.twice = x + x"),
        (tap_complaints, "twice = tap.twice = x + x", "twice = tap.more = tap.twice = x + x"),
        (tap_complaints, "tap.attn_scale = twice, 1.0", "tap.scale = twice, 1.0"),
        (tap_complaints, "tap.y, tap.attn_scale = ", "y, tap.attn_scale = "),
        (tap_complaints, "dtwice = dtap.twice", "dtwice"),
        (tap_complaints, "dtwice = dtap.twice", "dtwice = tap.twice"),
        (tap_complaints, "dtap.loss = 1.0", "dtap.loss_t = 1.0\n    dtap.loss = 1.0"),
        (tap_complaints, "dtap.y = dtap.loss_t", "dy = dtap.loss_t"),
        (tap_complaints, "dtap.y = dtap.loss_t", "dtap.probs = dtap.y = dtap.loss_t"),
        (comment_complaints, "# twice\n    twice", "twice"),
        (comment_complaints, "# twice\n    return", "return"),
        (comment_complaints, "# as it is\n    # forward", "# as it was\n    # forward"),
        (shape_complaints, "tap.twice = x + x  # [n]", "tap.twice = x + x"),
        (shape_complaints, "tap.twice = x + x  # (n)", "tap.twice = x + x"),
        (shape_complaints, "tap.twice = x + x  # (n)", "tap.twice = x + x  # [n]"),
        (shape_complaints, "twice, 1.0  # (n), ()", "twice, 1.0  # both"),
        (shape_complaints, "dtap.y = dtap.loss_t  # (n)", "dtap_i.y = dtap.loss_t"),
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
    taps = {name: assigned(function, "tap") for name, function in functions(SCALAR).items()}
    *embedding, logits = taps["gpt"]
    found = [*embedding, *taps["attention"], *taps["mlp"], logits, *taps["loss"], "loss"]
    assert found == TAPS


def test_what_vectorized_keeps_besides_is_what_its_backward_pass_reads_again() -> None:
    kept = [name for name in assigned(ast.parse(VECTORIZED), "tap") if name not in TAPS]
    assert kept == list(EXTRAS)
    backward = [node for name, node in functions(VECTORIZED).items() if name.endswith("_backward")]
    assert all(any(f"tap.{name}" in ast.unparse(node) for node in backward) for name in kept)


def adam_complaints(scalar: str, vectorized: str) -> Complaints:
    if list(functions(scalar)) != list(functions(vectorized)):
        yield "the functions differ"
    for ours, theirs in zip(functions(scalar).values(), functions(vectorized).values()):
        if equation(ours) != equation(theirs):
            yield f"{ours.name}: the equations differ"
        # scalar finds the gradients in the parameters, vectorized beside them
        names, others = ([argument.arg for argument in f.args.args] for f in (ours, theirs))
        wanted = ["params", "grads", *names[1:]] if "params" in others else ["grads", *names[1:]]
        if names[:1] != ["params"] or others != wanted:
            yield f"{ours.name}: the parameters are {names} and {others}"
        lines, other_lines = (statements(f) for f in (ours, theirs))
        if lines != other_lines:
            yield f"{ours.name}: {lines} is not {other_lines}"


def statements(function: ast.FunctionDef) -> list[str]:
    """What a function assigns and returns, written as if numbers were arrays."""
    kinds = (ast.Assign, ast.AugAssign, ast.Return)
    nodes = [node for node in ast.walk(function) if isinstance(node, kinds)]
    lines = [ast.unparse(node) for node in sorted(nodes, key=lambda node: node.lineno)]
    # sums are made by a loop here and a product there, and gradients are clipped in other places
    lines = [line for line in lines if not re.match("squares|factor|grad ", line)]
    as_arrays = {r"\[i\]|\[:\]": "", r"\bp\.data\b": "params", r"\bgrad\b": "grads"}
    for pattern, name in as_arrays.items():
        lines = [re.sub(pattern, name, line) for line in lines]
    return lines


def test_adam_has_the_same_functions_equations_parameters_and_lines() -> None:
    assert len(statements(functions(SOURCES["vectorized.adam"])["adam"])) == 9
    assert list(adam_complaints(SOURCES["scalar.adam"], SOURCES["vectorized.adam"])) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("def f", "def g"),
        ("y = 2 x", "y = x"),
        ("step, lr", "t, lr"),
        ("step, ", ""),
        ("grads, ", ""),
        ("m, step", "step, m"),
        ("0.9 * m + grads", "0.9 * m + 0.1 * grads"),
        ("    params -= m\n", ""),
        ("    m[:] = 0.9 * m + grads\n    params -= m\n", "    params -= m\n    m[:] = m\n"),
    ],
)
def test_an_adam_that_differs_is_found(old: str, new: str) -> None:
    ours = '''
def f(params, m, step, lr):
    """y = 2 x"""
    for i, p in enumerate(params):
        grad = 2 * p.grad
        m[i] = 0.9 * m[i] + grad
        p.data -= m[i]
'''
    theirs = '''
def f(params, grads, m, step, lr):
    """y = 2 x"""
    m[:] = 0.9 * m + grads
    params -= m
'''
    assert list(adam_complaints(ours, theirs)) == []
    assert old in theirs
    assert list(adam_complaints(ours, theirs.replace(old, new)))


def list_complaints(sources: Mapping[str, str]) -> Complaints:
    for module, text in sources.items():
        package, _, name = module.partition(".")
        if package == "vectorized" and f"scalar.{name}" in sources:
            _, *paragraphs = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")
            same_and_different = r"Same as scalar:  +\S(.|\n)*\nDifferent from scalar:  \S.*"
            if not paragraphs or not re.match(same_and_different, paragraphs[0]):
                yield f"{module} does not begin with what is the same as in scalar, and what not"


def test_what_vectorized_has_in_common_with_scalar_is_the_first_thing_it_says() -> None:
    assert list(list_complaints(SOURCES)) == []


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("vectorized.model", "Same as scalar:", "As in scalar:"),
        ("vectorized.adam", "Different from scalar:", "Not as in scalar:"),
        ("vectorized.sample", "Same as scalar:", "In between.\n\nSame as scalar:"),
        ("vectorized.backend", SOURCES["vectorized.backend"].partition('"""\n\n')[0], '"""One.'),
    ],
)
def test_a_module_that_does_not_say_so_is_found(module: str, old: str, new: str) -> None:
    assert old in SOURCES[module]
    doctored = {**SOURCES, module: SOURCES[module].replace(old, new, 1)}
    assert len(list(list_complaints(doctored))) == 1


# --- no machinery in the text --------------------------------------------------------------------

MACHINERY = {"dot", "empty", "empty_like", "copyto", "add", "subtract", "multiply", "divide"}
# what a function may be given besides numbers and trees: tensors, and their derivatives
GIVEN = {"x", "y", "w", "scale", "mask", "tokens", "targets", "params", "grads", "m", "v"}
GIVEN |= {*TAPS, *EXTRAS, "positions", "cache", "caches", "dtype"}


def machinery_complaints(text: str) -> Complaints:
    """Whatever keeps arrays out of the equations: memory to write to, helpers to be passed on."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "np.add.at":
            node.value = ast.Name("np")  # the one call that writes to what it is given
    for node in ast.walk(tree):
        place = f"line {getattr(node, 'lineno', 0)}: "
        for field in ("id", "attr", "arg", "name"):
            name = getattr(node, field, None)
            if name in MACHINERY or name == "out" or str(name).endswith("_at"):
                yield f"{place}{name}"
        if isinstance(node, ast.Call):
            function = getattr(np, ast.unparse(node.func).removeprefix("np."), None)
            if isinstance(function, np.ufunc) and len(node.args) > function.nin:
                yield f"{place}{function.__name__} writes to its last argument"
        if isinstance(node, ast.arg) and node.arg not in GIVEN:
            kind = ast.unparse(node.annotation) if node.annotation else "Any"
            if re.search("Array|Any", kind) and node.arg.removeprefix("d") not in GIVEN:
                yield f"{place}{node.arg} is an array that is no tensor"
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Call):
            yield f"line {node.lineno}: {ast.unparse(node)}"
    for number, comment in comments(text).items():
        if "type: ignore" in comment:
            yield f"line {number}: {comment}"


@pytest.mark.parametrize("module", ["vectorized.model", "vectorized.adam"])
def test_there_is_no_machinery_in_the_text(module: str) -> None:
    assert list(machinery_complaints(SOURCES[module])) == []


@pytest.mark.parametrize(
    "line",
    [
        "y = np.exp(x, out=y)",
        "y = x.sum(axis=0, out=y)",
        "exp(x, y)",
        "np.maximum(x, 0.0, y)",
        "y = w.dot(x)",
        "y = np.empty(3)",
        "from numpy import empty_like",
        "y = np.multiply(x, w)",
        "np.subtract(x, w, x)",
        "y = np.add(x, w)",
        "np.add.reduce(x)",
        "from numpy import add",
        "write_at(x)",
        "def write_at(x: Array) -> None: ...",
        "y = x.write_at",
        "y = x @ w  # type: ignore[misc]",
        "def f(x: Array, ones: Array) -> Array: ...",
        "def f(x: Array, ones: Any) -> Array: ...",
        "def f(x: Array, *, scratch) -> Array: ...",
        "ONES = np.ones(3)",
        "ONES: Array = np.ones(3)",
    ],
)
def test_machinery_in_the_text_is_found(line: str) -> None:
    assert list(machinery_complaints(f"{VECTORIZED}\n{line}\n"))


# --- the shapes ----------------------------------------------------------------------------------

AXIS = r"\.\.|t\+1|\w+"
SHAPE = rf"\((?:(?:{AXIS})(?:, (?:{AXIS}))*,?)?\)"
SHAPES = re.compile(rf"# (?:({SHAPE}(?:, {SHAPE})*) -> )?({SHAPE}(?:, {SHAPE})*)(?:, [a-z].*)?")


def agrees(wanted: str, shape: tuple[int, ...], known: ChainMap[str, Any]) -> bool:
    """Whether a shape is the one that is written, (.., n) for example.

    known    the sizes of letters; and of n, n_in, n_out and .., as soon as this call has met them
    """
    axes = re.findall(AXIS, wanted)
    if axes[:1] == [".."]:
        any_axes = shape[: max(0, len(shape) - len(axes) + 1)]
        if known.setdefault("..", any_axes) != any_axes:
            return False
        axes, shape = axes[1:], shape[len(any_axes) :]
    if len(axes) != len(shape):
        return False
    for axis, size in zip(axes, shape):
        if axis.startswith("n"):
            known.setdefault(axis, size)
        if (int(axis) if axis.isdigit() else known.get(axis)) != size:
            return False
    return True


class Checked(ast.NodeTransformer):
    """A source that, while it runs, compares the shapes at its line ends with what is there.

    Beside an assignment is the shape of what is assigned; beside x.append(..) that of x; beside a
    `return` that of what is returned, after those of the arrays that the function takes if there is
    an arrow. A comment that begins with a bracket is a shape.
    """

    def __init__(self, text: str, square: bool = False) -> None:
        self.written = {n: line for n, line in comments(text).items() if line[2:3] in ("(", "[")}
        self.shapes = {  # the same in round brackets, if they are square in this source
            number: shape.replace("][", ", ").translate(str.maketrans("[]()", "()[]"))
            if square
            else shape
            for number, shape in self.written.items()
        }
        self.sizes: dict[str, int] = {}
        self.wrong: dict[int, str] = {}  # the first complaint about a line
        self.reached: set[int] = set()
        self.fields: dict[str, int] = {}  # the lines of a named tuple's fields
        self.parameters: list[str] = []
        tree = ast.fix_missing_locations(self.visit(ast.parse(text)))
        self.module: dict[str, Any] = {"_check": self.check, "_known": {}}
        exec(compile(tree, "checked", "exec"), self.module)

    def complaints(self) -> list[str]:
        missed = [f"line {n} is not reached" for n in self.written if n not in self.reached]
        return [*self.wrong.values(), *missed]

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.FunctionDef):
            self.parameters = [argument.arg for argument in node.args.args]
            node.body[:0] = ast.parse("_known = {}").body
        node = self.generic_visit(node)
        number = getattr(node, "end_lineno", 0)
        if number not in self.shapes:
            return node
        if isinstance(node, ast.Return) and node.value:
            return ast.parse(f"return {self._call(number, node.value)}").body
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            return [node, *ast.parse(self._call(number, target)).body]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            self.fields[node.target.id] = number
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            function = node.value.func
            if isinstance(function, ast.Attribute) and function.attr == "append":
                return [node, *ast.parse(self._call(number, function.value)).body]
        return node

    def _call(self, number: int, value: ast.expr) -> str:
        return f"_check({number}, {ast.unparse(value)}, [{', '.join(self.parameters)}], _known)"

    def check(self, number: int, value: Any, taken: list[Any], known: dict[str, Any]) -> Any:
        self.reached.add(number)
        both = SHAPES.fullmatch(self.shapes[number])
        parts = both.groups("") if both else ("", "")
        taking, giving = (re.findall(SHAPE, part) for part in parts)
        arrays = [x for x in taken if taking and isinstance(x, (np.ndarray, list))]
        values = [*value] if isinstance(value, tuple) else [value]
        found = [np.shape(x) for x in (*arrays, *values)]
        sizes = ChainMap(known, self.sizes)
        if (len(taking), len(giving)) != (len(arrays), len(values)) or not all(
            agrees(wanted, shape, sizes) for wanted, shape in zip((*taking, *giving), found)
        ):
            self.wrong.setdefault(number, f"line {number}, {self.written[number]}: {found}")
        return value


SIZES = {"H": 2, "D": 3, "B": 4, "T": 5, "U": 5, "C": 6, "V": 7, "block_size": 20, "F": 24}
DOCS = [[6, 0, 3, 3, 2, 6], [6, 5, 1, 6], [6, 4, 6], [6, 6]]  # B of them, of T + 1 tokens at most


def small_models() -> Iterator[tuple[Config, dict[str, Any]]]:
    for first, second in zip(itertools.cycle(("true", "false")), ACTIVATIONS):
        config = load_config(
            overrides={
                "n_layer": "2",
                "n_embd": "6",
                "n_head": "2",
                "block_size": "20",
                "norm_embedding": "true",
                "tie_lm_head": first,
                "activation": second,
            }
        )
        yield config, init_params(config, 7, Random(1))


def scalar_shapes(text: str) -> Checked:
    """scalar/model.py, after it has found a loss."""
    checked = Checked(text, square=True)
    gpt, loss = checked.module["gpt"], checked.module["loss"]

    def gpt_at(token: int, position: int, *rest: Any) -> Any:
        checked.sizes["t+1"] = position + 1
        return gpt(token, position, *rest)

    checked.module["gpt"] = gpt_at
    for config, params in small_models():
        checked.sizes |= SIZES
        values = {name: [[Value(x) for x in row] for row in w] for name, w in params.items()}
        loss(DOCS, grow(values, config.n_layer), config)
    return checked


class Growing:
    """A cache."""

    def extend(self, *both: Any) -> Any:
        self.parts = [*getattr(self, "parts", []), both]
        return [np.concatenate(part, axis=1) for part in zip(*self.parts)]


def vectorized_shapes(text: str) -> Checked:
    """vectorized/model.py, after it has found a loss, its gradient, and logits by a cache."""
    checked = Checked(text)
    run = checked.module
    for config, params in small_models():
        checked.sizes |= SIZES
        arrays = grow({name: np.array(w) for name, w in params.items()}, config.n_layer)
        tokens = np.array([doc + [0] * (6 - len(doc)) for doc in DOCS])
        positions = np.tile(np.arange(5), (4, 1))
        mask = np.tile(run["causal_mask"](5, np.dtype("float64")), (4, 1, 1, 1))
        batch = run["Batch"](tokens[:, :-1], tokens[:, 1:], np.ones((4, 5)), positions, mask)
        for name, number in checked.fields.items():
            checked.check(number, getattr(batch, name), [], {})
        tap, dtap, grads = (Tree(config.n_layer) for _ in range(3))
        run["loss_forward"](batch, arrays, config, tap)
        run["loss_backward"](batch, arrays, grads, config, tap, dtap)
        # first 5 positions, then 8 that look at 13
        caches = [Growing() for _ in range(config.n_layer)]
        for start, T in ((0, 5), (5, 8)):
            checked.sizes |= {"T": T, "U": start + T}
            tokens = np.full((SIZES["B"], T), 3)
            positions = np.tile(np.arange(start, start + T), (SIZES["B"], 1))
            run["gpt_forward"](tokens, positions, arrays, caches, 0.0, config, tap)
    return checked


def adam_shapes(text: str) -> Checked:
    """vectorized/adam.py, after an update."""
    checked = Checked(text)
    checked.sizes["P"] = 11
    params, grads, m, v = (np.ones(11) for _ in range(4))
    checked.module["clip"](grads, 1.0)
    checked.module["adam"](params, grads, m, v, 0, 0.1, load_config())
    return checked


RUNS = {
    "scalar.model": scalar_shapes,
    "vectorized.model": vectorized_shapes,
    "vectorized.adam": adam_shapes,
}


@pytest.mark.parametrize(("module", "least"), [("scalar.model", 25), ("vectorized.model", 90)])
def test_the_shapes_at_the_line_ends_are_the_shapes(module: str, least: int) -> None:
    checked = RUNS[module](SOURCES[module])
    assert checked.complaints() == []
    assert len(checked.reached) >= least
    assert len(set(SIZES.values())) == len(SIZES) - 1  # all but T and U differ


def test_the_shapes_beside_adam_are_the_shapes() -> None:
    checked = adam_shapes(SOURCES["vectorized.adam"])
    assert checked.complaints() == []
    assert len(checked.reached) == 4


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("scalar.model", "w.attn_wv)  # [C]", "w.attn_wv)  # [F]"),
        ("scalar.model", "w.attn_wv)  # [C]", "w.attn_wv)  # (C)"),
        ("scalar.model", "w.attn_wv)  # [C]", "w.attn_wv)  # [channels]"),
        ("scalar.model", "keys.append(k)  # [t+1][C]", "keys.append(k)  # [C]"),
        ("scalar.model", "]  # [H][t+1]", "]  # [t+1][H]"),
        ("scalar.model", "[n_out][n_in] ->", "[n_in][n_out] ->"),
        ("scalar.model", "[n_out][n_in] -> [n_out]", "[n_out][n_in] -> [n_in]"),
        ("vectorized.model", "weights: Array  # (B, T)", "weights: Array  # (T, B)"),
        ("vectorized.model", "(n_out, n_in) ->", "(n_in, n_out) ->"),
        ("vectorized.model", "# (B, T, n_in), (n_out, n_in) ->", "# (B, T, n_in) ->"),
        ("vectorized.model", "dy, x)  # (n_out, n_in)", "dy, x)  # (n_in, n_out)"),
        ("vectorized.model", "# (.., n) -> (.., n), (.., 1)", "# (.., n) -> (.., 1), (.., n)"),
        ("vectorized.model", "# (.., n) -> (.., n), (.., 1)", "# (.., n) -> (.., n)"),
        (
            "vectorized.model",
            "exps = exp(x - largest)  # (.., n)",
            "exps = exp(x - largest)  # (n)",
        ),
        ("vectorized.model", "# (B, T, H, D)", "# (B, H, T, D)"),
        ("vectorized.model", "keys, config)  # (B, U, H, D)", "keys, config)  # (B, T, H, D)"),
        ("vectorized.model", "# (B, H, T, U)", "# (B, H, U, T)"),
        (
            "vectorized.model",
            "1.0, weights  # (), (B, T)",
            "1.0, weights  # (1), (B, T)",
        ),
        ("vectorized.model", "# (block_size, C)", "# (T, C)"),
        ("vectorized.model", "params.wte)  # (V, C)", "params.wte)  # (block_size, C)"),
        ("vectorized.model", "params.wte)  # (V, C)", "params.wte)  # (S, C)"),
        ("vectorized.model", "params.wte)  # (V, C)", "params.wte)  # (4, C)"),
        ("vectorized.adam", "m_hat = m / correction1  # (P,)", "m_hat = m / correction1  # ()"),
    ],
)
def test_a_wrong_shape_is_found(module: str, old: str, new: str) -> None:
    before, found, after = SOURCES[module].partition(old)
    assert found
    line = before.count("\n") + 1
    (complaint,) = RUNS[module](before + new + after).complaints()
    assert complaint.startswith(f"line {line}, # ")


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("scalar.model", "    res = emb\n", "    res = emb\n    # [C]\n"),
        (
            "scalar.model",
            "    res = emb\n",
            "    if not emb:\n        res = []  # [C]\n    res = emb\n",
        ),
        (
            "vectorized.model",
            "    demb = dres  # (B, T, C)\n",
            "    if config is None:\n        demb = 0  # ()\n    demb = dres\n",
        ),
        (
            "vectorized.model",
            "def total(x: Array) -> Array:",
            "def total(x: Array) -> Array:  # (.., 1)",
        ),
    ],
)
def test_a_shape_where_the_program_does_not_come_by_is_found(
    module: str, old: str, new: str
) -> None:
    assert old in SOURCES[module]
    (complaint,) = RUNS[module](SOURCES[module].replace(old, new)).complaints()
    assert complaint.endswith("is not reached")


def einsum_complaints(text: str) -> Complaints:
    """Where T = U, the letters of einsum tell which is which."""
    shapes: dict[str, str] = {}
    lines = comments(text)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assign)]
    for node in sorted(nodes, key=lambda node: node.lineno):
        for target in node.targets:
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            written = re.findall(SHAPE, lines.get(node.end_lineno or 0, "")) or ["none"]
            shapes |= zip(map(ast.unparse, parts), written)
        for call in ast.walk(node.value):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "einsum":
                subscripts, *named = call.args
                if call is node.value:
                    named.append(node.targets[0])
                letters = re.split(",|->", ast.literal_eval(subscripts))
                for axes, name in zip(letters, map(ast.unparse, named)):
                    shape = shapes.get(name, "any")
                    if shape != "any" and axes != in_letters(shape):
                        yield f"line {node.lineno}: {name} is {shape}, in einsum {axes}"


def in_letters(shape: str) -> str:
    letters = {"n_out": "o", "n_in": "i"}
    return "".join(letters.get(axis, axis.lower()) for axis in re.findall(AXIS, shape))


def test_the_letters_of_einsum_are_those_of_the_shapes() -> None:
    assert list(einsum_complaints(VECTORIZED)) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "split_heads(tap.k, config)  # (B, U, H, D)",
            "split_heads(tap.k, config)  # (B, T, H, D)",
        ),
        ("dscores, q_heads)  # (B, U, H, D)", "dscores, q_heads)  # (B, T, H, D)"),
        ("dscores, q_heads)  # (B, U, H, D)", "dscores, q_heads)"),
        ("bhtu,buhd->bthd", "bhtu,buhd->buhd"),
        ("dy, x)  # (n_out, n_in)", "dy, x)  # (n_in, n_out)"),
    ],
)
def test_letters_that_differ_are_found(old: str, new: str) -> None:
    assert old in VECTORIZED
    assert len(list(einsum_complaints(VECTORIZED.replace(old, new)))) >= 1


# --- the text ------------------------------------------------------------------------------------


def text_complaints(text: str) -> Complaints:
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > 100:
            yield f"line {number} has {len(line)} columns"
        if not line.isascii():
            yield f"line {number} is not ASCII"


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda p: p.name)
def test_tests_are_ascii_of_100_columns(path: Path) -> None:
    assert list(text_complaints(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("module", SOURCES)
def test_sources_are_ascii_of_100_columns(module: str) -> None:
    assert list(text_complaints(SOURCES[module])) == []


def test_a_wide_line_and_a_character_that_is_not_ascii_are_found() -> None:
    assert list(text_complaints("x" * 100 + "\n" + "y" * 101)) == ["line 2 has 101 columns"]
    assert list(text_complaints("x\ny\u00e9")) == ["line 2 is not ASCII"]
