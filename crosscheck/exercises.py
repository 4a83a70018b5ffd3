"""The exercises: the two texts with bodies taken out, in the order in which they were built.

An exercise is one file, made from the source of scalar/ or vectorized/, so that the two cannot
differ: signatures, docstrings, equations, block comments and shapes stay, and the rest of a body
becomes `raise NotImplementedError`. The last exercises are whole sources with a named defect.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from textwrap import fill
from typing import NamedTuple

from crosscheck.candidate import is_stub
from crosscheck.defects import ROOT, Defect, load_defects

LIBRARIES = (  # what an exercise may import besides the imports of its file
    *("__future__", "collections", "dataclasses", "functools", "itertools", "math", "numpy"),
    *("random", "typing"),
)
# names and attributes by which Python reaches objects that were not imported
DOORS = (
    *("__import__", "__builtins__", "compile", "eval", "exec", "getattr", "globals", "locals"),
    *("open", "vars"),
)
INNER = (
    *("__globals__", "__builtins__", "__dict__", "__subclasses__", "__code__", "__closure__"),
    *("__wrapped__", "__module__", "f_globals", "gi_frame", "modules", "sys", "os", "_sys", "_os"),
)
NUMPY = "import numpy as np"
HELPERS = {"Value._topological_order": "Value.backward"}  # taken out with the method that calls it


class Exercise(NamedTuple):
    """What is taken out of a source, and the task in words."""

    name: str
    source: str  # such as vectorized/model.py
    functions: tuple[str, ...]  # taken out, methods as Value.exp; empty where a defect is planted
    task: str
    defect: str = ""  # its name in fixtures/defects.yaml

    @property
    def package(self) -> str:
        """The text that it belongs to."""
        return self.source.partition("/")[0]

    @property
    def module(self) -> str:
        """The name by which Python imports the source."""
        return self.source.removesuffix(".py").replace("/", ".")


def _scalar(name: str, task: str, functions: str = "", file: str = "model") -> Exercise:
    return Exercise(name, f"scalar/{file}.py", tuple((functions or name).split()), task)


def _tensors(name: str, task: str, functions: str = "", file: str = "model") -> Exercise:
    return Exercise(name, f"vectorized/{file}.py", tuple((functions or name).split()), task)


def _wrong(number: int, defect: str) -> Exercise:
    task = (
        "Something is wrong in this copy of the text, in one place. The report says which number"
        " is not what it should be; from there, find the line, and mend it."
    )
    (file,) = {patch.file for patch in _defect(defect).patches}
    return Exercise(f"something_wrong_{number}", file, (), task, defect)


@cache
def _defect(name: str) -> Defect:
    return next(one for one in load_defects() if one.name == name)


OPERATIONS = "Value.__add__ Value.__mul__ Value.__pow__ Value.log Value.exp Value.relu Value.tanh"
SCALAR = (
    _scalar(
        "value",
        "A number that remembers how it was made. Each operation returns a new Value: the number,"
        " the Values that it was made from, and the derivative with respect to each of them.",
        OPERATIONS,
        file="value",
    ),
    _scalar(
        "sums",
        "Sums as one Value, so that a product of two vectors is one node of the graph, and not two"
        " nodes for every element.",
        "total mean dot",
        file="value",
    ),
    _scalar(
        "backward",
        "The chain rule: from the last value that was made to the first, each value adds a term to"
        " the derivatives of the values that it was made from. A value used twice receives two.",
        "Value.backward",
        file="value",
    ),
    _scalar("linear", "A matrix times a vector."),
    _scalar("softmax", "Numbers of any size become positive ones whose sum is 1."),
    _scalar("rmsnorm", "A vector is brought to a mean square of 1."),
    _scalar("activation", "The function between the two products of an MLP."),
    _scalar(
        "attention",
        "A position looks back: the products of its query with the keys of all positions so far"
        " become weights, and the values are added with these weights. The lists `keys` and"
        " `values` grow by one entry with every position.",
    ),
    _scalar("mlp", "Two products for each position by itself."),
    _scalar("gpt", "One token in; out, a logit for every token that may follow."),
    _scalar(
        "loss",
        "How improbable the model finds the next tokens: a mean over the positions of a document,"
        " and a mean of that over the documents.",
        "cross_entropy loss",
    ),
    _scalar("adam", "One step downhill, with means over earlier steps.", "clip adam", file="adam"),
    _scalar(
        "sampling",
        "Write a document: read a token, draw the next one, and read that.",
        "probabilities sample",
        file="sample",
    ),
)
TENSORS = (
    _tensors("linear_forward", "A matrix times the vectors of all positions."),
    _tensors("softmax_forward", "The softmax of each row along the last axis."),
    _tensors("rmsnorm_forward", "The norm of each vector along the last axis."),
    _tensors("activation_forward", "The activation of each number by itself."),
    _tensors(
        "heads",
        "What attention needs: the channels cut into heads and put together again, and the mask"
        " that hides what comes later.",
        "split_heads merge_heads causal_mask",
    ),
    _tensors(
        "attention_forward",
        "All positions look back at once. The lists that grow become an axis U, and the mask"
        " hides from each position those that come later.",
    ),
    _tensors("mlp_forward", "The MLP of all positions."),
    _tensors(
        "gpt_forward",
        "The embedding is a look-up with two axes; the layers follow; tied weights read wte"
        " once more, as lm_head.",
    ),
    _tensors(
        "loss_forward",
        "The loss of a batch. `weights` makes it the mean over documents of the mean over"
        " positions, and leaves padding out.",
        "cross_entropy_forward loss_forward",
    ),
    _tensors(
        "ragged_batches",
        "Documents of different lengths side by side: tokens, targets, and the weight of every"
        " position. Padding is token 0 with a weight of 0.",
        "fill",
        file="batch",
    ),
    _tensors("cross_entropy_backward", "The first derivative on the way back."),
    _tensors(
        "linear_backward",
        "The derivatives with respect to both factors. A weight is used at every position.",
    ),
    _tensors("softmax_backward", "When one output rises, the others fall."),
    _tensors(
        "rmsnorm_backward", "Each number is used twice: as a factor, and in the scale of all."
    ),
    _tensors("activation_backward", "The slope of the forward function, number by number."),
    _tensors("mlp_backward", "The MLP read upside down."),
    _tensors(
        "attention_backward",
        "Attention read upside down: three paths lead back to its input, through q, k and v, and"
        " the residual is a fourth.",
    ),
    _tensors(
        "gpt_backward",
        "The model read upside down, to the embedding: a token that occurs twice adds twice,"
        " wpe is shared by all documents, and tied weights have two gradients to add.",
    ),
    _tensors("loss_backward", "The backward pass begins here."),
    _tensors(
        "adam_in_one_buffer",
        "All parameters are one array, and so are the gradients, m, and v.",
        "clip adam",
        file="adam",
    ),
    _tensors(
        "sampling_with_a_cache",
        "Write a document without reading its beginning again for every token: the keys and"
        " values of what has been read are kept.",
        "Cache.extend read probabilities sample",
        file="sample",
    ),
)
DEFECTS = (
    "attention-scaled-by-width",
    "rmsnorm-backward-sum-for-mean",
    "gradient-assigned-not-added",
    "repeated-tokens-once",
    "adam-eps-inside-root",
    "value-path-lost",
    "token-mean-for-document-mean",
    "tied-gradient-lost",
    "cached-values-in-front",
    "residual-gradient-before-the-norm",
)


@cache
def exercises() -> tuple[Exercise, ...]:
    """All exercises, in order."""
    return (*SCALAR, *TENSORS, *(_wrong(i, name) for i, name in enumerate(DEFECTS, 1)))


def exercise_named(name: str) -> Exercise | None:
    """The exercise of that name, if there is one."""
    return next((one for one in exercises() if one.name == name), None)


def exercise_about(function: str) -> Exercise | None:
    """The first exercise that is about a function or method of that name, if there is one."""
    return next(
        (
            one
            for one in exercises()
            for name in one.functions
            if function in (name, name.rpartition(".")[2], name.rpartition(".")[2].strip("_"))
        ),
        None,
    )


def filename(exercise: Exercise) -> str:
    """The name of an exercise's file."""
    return f"{exercises().index(exercise) + 1:02}_{exercise.name}.py"


@cache
def source_text(file: str) -> str:
    """The source of a module of the project."""
    return (ROOT / file).read_text(encoding="utf-8")


# --- making the files ----------------------------------------------------------------------------


@cache
def made(exercise: Exercise) -> str:
    """The file of an exercise, as a learner gets it."""
    source = source_text(exercise.source)
    tree = ast.parse(source)
    heading = _heading(exercise, ast.get_docstring(tree) or "")
    if exercise.defect:
        for patch in _defect(exercise.defect).patches:
            source = source.replace(patch.old, patch.new)
        return heading + "\n".join(source.splitlines()[tree.body[0].end_lineno :]) + "\n"
    parts = [_part(exercise, tree, source, name) for name in _homes(exercise)]
    return "\n\n".join([heading + _imports(exercise, tree), *parts])


def _heading(exercise: Exercise, about: str) -> str:
    number = exercises().index(exercise) + 1
    title = exercise.name.replace("_", " ")
    text = about.partition("\n")[2].strip("\n")
    return (
        f'"""Exercise {number} of {len(exercises())}: {title}.\n\n{fill(exercise.task, 98)}\n\n'
        "To check it, type `microgpt check` in this folder. `microgpt check --hint` says what a\n"
        "mistake looks like, `--hint --hint` what the number should be, and of what it is made.\n"
        + (f"\n{text}\n" if text and not exercise.defect else "")
        + '"""\n'
        + "\n" * (not exercise.defect)
    )


def _homes(exercise: Exercise) -> list[str]:
    """The functions of an exercise, a class in the place of its methods, without repeats."""
    return list(dict.fromkeys(name.partition(".")[0] for name in exercise.functions))


def _by_name(tree: ast.Module) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """The functions and classes of a module, and their methods as Value.exp."""
    found: dict[str, ast.FunctionDef | ast.ClassDef] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
            inner = [one for one in node.body if isinstance(one, ast.FunctionDef)]
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{one.name}": one for one in inner}
    return found


def _part(exercise: Exercise, tree: ast.Module, source: str, name: str) -> str:
    """A function or class of the source, without the bodies that the learner should write."""
    nodes, lines = _by_name(tree), source.splitlines()
    node = nodes[name]
    if isinstance(node, ast.FunctionDef):
        return _stub(node, source)
    methods = {full: one for full, one in nodes.items() if full.startswith(f"{name}.")}
    parts = ["\n".join(lines[node.lineno - 1 : next(iter(methods.values())).lineno - 1])]
    for full, method in methods.items():
        if full in exercise.functions:
            parts.append(_stub(method, source))
        elif full not in taken_out():
            parts.append("\n".join(lines[method.lineno - 1 : method.end_lineno]) + "\n")
    return "\n".join(part.rstrip("\n") + "\n" for part in parts).replace("\n\n\n", "\n\n")


@cache
def taken_out() -> frozenset[str]:
    """The methods that some exercise is about."""
    names = {name for one in exercises() for name in one.functions if "." in name}
    return frozenset({*names, *HELPERS})


def _stub(node: ast.FunctionDef | ast.ClassDef, source: str) -> str:
    """A function with only the comments and shapes of its body."""
    lines = source.splitlines()
    indent = " " * (node.col_offset + 4)
    documented = ast.get_docstring(node) is not None
    first = node.body[0]
    head = first.end_lineno if documented else first.lineno - 1
    kept = lines[node.lineno - 1 : head or 0]
    comments = _comments(source)
    for statement in _statements(node.body[1:] if documented else node.body):
        above = statement.lineno - 1
        block: list[str] = []
        while above in comments and lines[above - 1].strip() == comments[above]:
            block.insert(0, comments[above])
            above -= 1
        kept += [indent + one for one in block if indent + one not in kept]
        shape = comments.get(statement.end_lineno or 0, "").removeprefix("# ")
        left = _left(statement)
        if left and shape[:1] in ("(", "[", "."):
            kept.append(f"{indent}# {left}..  # {shape}")
        elif "tap." in left:
            kept.append(f"{indent}# {left}..")
    return "\n".join([*kept, f"{indent}raise NotImplementedError"]) + "\n"


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body; those within a loop or condition in place of that statement."""
    for statement in body:
        inner = [*getattr(statement, "body", []), *getattr(statement, "orelse", [])]
        yield from _statements(inner) if inner else [statement]


def _left(statement: ast.stmt) -> str:
    """The text before the value of a statement: `y = ` or `return `."""
    if isinstance(statement, ast.Assign):
        return "".join(f"{ast.unparse(target).strip('(),')} = " for target in statement.targets)
    if isinstance(statement, ast.AugAssign):
        return f"{ast.unparse(statement.target)} = "
    return "return " if isinstance(statement, ast.Return) else ""


@cache
def _comments(source: str) -> dict[int, str]:
    """The comment of each line that has one."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {one.start[0]: one.string for one in tokens if one.type == tokenize.COMMENT}


def _imports(exercise: Exercise, tree: ast.Module) -> str:
    """The imports that an exercise needs: those of the source, and one from the source itself."""
    used = _used(exercise, tree)
    found = ["from __future__ import annotations\n"]
    libraries: list[str] = []
    ours: list[str] = []
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [x for x in node.names if (x.asname or x.name) in used]
            module = getattr(node, "module", "") or ""
            if names and module != "__future__":
                node.names = names
                home = module.partition(".")[0]
                (ours if home in ("microgpt", "scalar", "vectorized") else libraries).append(
                    ast.unparse(node)
                )
    if exercise.package == "vectorized" and NUMPY not in libraries:
        libraries.append(NUMPY)  # the learner may need NumPy where the text does not
    own = sorted(used & _defined(tree) - {*_homes(exercise)}, key=str.lower)
    if own:
        line = f"from {exercise.module} import {', '.join(own)}"
        if len(line) > 100:
            line = f"from {exercise.module} import (\n    " + ",\n    ".join(own) + ",\n)"
        ours.append(line)
    blocks = ["\n".join(block) + "\n" for block in (libraries, ours) if block]
    return "\n".join([*found, *blocks])


def _defined(tree: ast.Module) -> set[str]:
    """The names that a module defines."""
    names = set(_by_name(tree))
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names |= {x.id for x in node.targets if isinstance(x, ast.Name)}
    return names


def _used(exercise: Exercise, tree: ast.Module) -> set[str]:
    """The names that the functions of an exercise mention in the source."""
    homes = _homes(exercise)
    nodes = [
        node
        for name, node in _by_name(tree).items()
        if name in exercise.functions
        or ("." in name and name.partition(".")[0] in homes and name not in taken_out())
    ]
    return {x.id for node in nodes for x in ast.walk(node) if isinstance(x, ast.Name)}


def solution(exercise: Exercise) -> str:
    """The source that was taken out, or what the defect changed."""
    if exercise.defect:
        defect = _defect(exercise.defect)
        rows = [defect.story]
        for patch in defect.patches:
            rows += ["", "it says", f"    {patch.new}", "and should say", f"    {patch.old}"]
        return "\n".join(rows)
    source = source_text(exercise.source)
    helpers = [name for name, caller in HELPERS.items() if caller in exercise.functions]
    nodes, lines = _by_name(ast.parse(source)), source.splitlines()
    taken = [nodes[name] for name in (*exercise.functions, *helpers)]
    return "\n\n".join("\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in taken)


# --- reading the learner's files -----------------------------------------------------------------


def attempted(exercise: Exercise, tree: ast.Module) -> list[str]:
    """The functions of an exercise that a learner has begun to write."""
    nodes = _by_name(tree)
    if exercise.defect:
        same = ast.dump(tree) == ast.dump(ast.parse(made(exercise)))
        return [] if same else [name for name in nodes if "." not in name]
    own = {name: node for name, node in nodes.items() if isinstance(node, ast.FunctionDef)}
    return [name for name in exercise.functions if name in own and not is_stub(own[name])]


def refused(exercise: Exercise, tree: ast.Module) -> tuple[int, str] | None:
    """A line that imports or reaches what it must not, and why; None if there is none."""
    given = _imported(ast.parse(made(exercise)))
    for node in ast.walk(tree):
        number = getattr(node, "lineno", 0)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in _imported(ast.Module([node], [])) - given:
                home, last = name.partition(".")[0], name.rpartition(".")[2]
                if home in ("scalar", "vectorized", "microgpt", "crosscheck", "fixtures"):
                    return number, (
                        f"imports {name}, which is not among the imports of the exercise: solve it"
                        " without the text's own answer. Write it yourself, and leave that import"
                        " out"
                    )
                if home not in LIBRARIES or last in INNER:
                    allowed = ", ".join(x for x in LIBRARIES if x != "__future__")
                    return number, f"imports {name}; an exercise may import {allowed}"
        reaching = isinstance(node, ast.Name) and node.id in DOORS
        inner = isinstance(node, ast.Attribute) and node.attr in INNER
        if reaching or inner:
            what = getattr(node, "id", getattr(node, "attr", ""))
            return number, (
                f"uses {what}, by which the text's own answer could be reached; an exercise"
                " does without"
            )
    return None


def _imported(tree: ast.Module) -> set[str]:
    """The full names of what a module imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {x.name for x in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{x.name}" for x in node.names}
    return names
