"""A candidate: a learner's own versions of the text's functions, loaded and put in the text.

The text is vectorized/ or scalar/. A candidate's function has the name and the arguments of the
text's function, is called where the text calls its own, and its results are converted to arrays.
What it does wrong besides wrong numbers is reported in words, with the candidate's own line and
without a traceback: it raises, takes too long, writes into an input, or calls the text's own.
"""

from __future__ import annotations

import ast
import ctypes
import difflib
import importlib.util
import inspect
import io
import linecache
import os
import re
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np

from microgpt.cli.shell import Plain
from microgpt.errors import MicrogptError, printable, shortened
from microgpt.layout import Tree
from microgpt.runs.signals import exit_now

TEXTS = {
    "vectorized": ("vectorized.model", "vectorized.adam", "vectorized.sample"),
    "scalar": ("scalar.model", "scalar.adam", "scalar.sample"),
}
USERS = {  # modules in which a candidate's functions replace the text's, except in recorded runs
    "vectorized": (*TEXTS["vectorized"], "vectorized.backend"),
    "scalar": (*TEXTS["scalar"], "scalar.value", "scalar.backend"),
}
# functions of the text that are not checked: a candidate's function of that name is its own helper
HELPERS = {"total", "mean", "split_heads", "merge_heads", "causal_mask", "empty_caches", "fortran"}
HELPERS |= {"choose", "draw", "dot"}
WHOLE = ("loss_and_grads", "Backend")
# words for a derivative in the names that learners give
BACKWARD = ("backward", "backwards", "back", "bwd", "grad", "gradient", "derivative", "vjp", "d")
RESULTS = {  # the names of what a function returns; functions not listed return no arrays
    "linear_forward": "y",
    "linear_backward": "dx dw",
    "softmax_forward": "y",
    "softmax_backward": "dx",
    "rmsnorm_forward": "y scale",
    "rmsnorm_backward": "dx",
    "activation_forward": "y",
    "activation_backward": "dx",
    "attention_forward": "attn_res",
    "attention_backward": "dx",
    "mlp_forward": "mlp_res",
    "mlp_backward": "dx",
    "gpt_forward": "logits",
    "gpt_backward": "",
    "cross_entropy_forward": "loss_t probs",
    "cross_entropy_backward": "dlogits",
    "loss_forward": "loss",
    "loss_backward": "",
    "clip": "factor",
    "adam": "",
    "read": "logits",
    "probabilities": "p",
}
UNDONE = "is not attempted"
IMPORT = 10  # times the time limit of a call: a candidate's import imports its libraries too
GRACE = 2.0  # seconds after the time limit until the process is ended
DEEPEST = 5000  # Python's recursion limit: a `backward` that recurses along the graph goes deep


class Told(BaseException):  # no Exception, so that nothing in the text catches it
    """A mistake of a candidate's function that is not a wrong number, in words, with its line."""

    def __init__(self, function: str, words: str, line: str = "") -> None:
        super().__init__(words)
        self.function, self.words, self.line = function, words, line

    @property
    def undone(self) -> bool:
        """Whether the function raises NotImplementedError."""
        return self.words.startswith(UNDONE)


class Late(BaseException):
    """Raised inside a function that takes too long."""


@dataclass
class Candidate:
    """A file or package, and which functions of the text it has."""

    path: Path
    module: ModuleType
    side: str  # "vectorized" or "scalar", the text that its functions belong to
    functions: dict[str, Any]  # attempted, in the order of the text
    stubs: list[str]  # defined, and not attempted
    absent: list[str]
    unknown: dict[str, str]  # names that are not the text's, and for each the nearest name that is
    seed: int  # of the random inputs, from the candidate's source
    time_limit: float = 5.0
    calls: Counter[str] = field(default_factory=Counter)
    said: dict[str, str] = field(default_factory=dict)  # the first line that a function printed
    parts: dict[str, Any] = field(default_factory=dict)  # the text's functions beside a whole model
    different: list[str] = field(default_factory=list)  # those with other arguments than the text's
    borrowed: dict[str, str] = field(default_factory=dict)  # our functions that a whole model calls
    torch: bool = False  # whether its functions take tensors of PyTorch

    @property
    def whole(self) -> str:
        """The name of a whole model, if it has one."""
        return next((name for name in WHOLE if name in self.functions), "")

    def describe(self) -> str:
        """The functions that the candidate has, has not attempted, has not, or has misspelt."""
        found = [f"{self.path.name} has {', '.join(self.functions) or 'nothing written yet'}"]
        if self.parts:
            found.append(f"and beside it {', '.join(self.parts)}")
        if self.different:
            found.append(f"not checked, since the arguments are not the text's:"
                         f" {', '.join(self.different)}")  # fmt: skip
        if self.stubs:
            found.append(f"not attempted: {', '.join(self.stubs)}")
        if self.absent:
            names = self.absent if len(self.absent) <= 3 else [f"{len(self.absent)} others"]
            found.append(f"not there: {', '.join(names)}")
        for name, nearest in self.unknown.items():
            found.append(f"unknown: {name} (did you mean {nearest}?)")
        return "; ".join(found)

    def line_of(self, name: str, node: ast.AST | None = None) -> str:
        """A line of the candidate, such as "mine.py:7 return dy"; without a node, the def line."""
        function = inspect.unwrap(self.functions.get(name, self.module))
        code = getattr(function, "__code__", None)
        if code is None:
            with suppress(OSError, TypeError):  # a class
                file = inspect.getsourcefile(function) or ""
                return _line(file, inspect.getsourcelines(function)[1])
            return ""
        number = getattr(node, "lineno", code.co_firstlineno)
        return _line(code.co_filename, number)

    def statement(self, name: str, wanted: Callable[[ast.AST], bool]) -> str:
        """The last line of a function that has a wanted node, or else the def line."""
        code = getattr(inspect.unwrap(self.functions[name]), "__code__", None)
        if code is None:
            return self.line_of(name)
        tree = ast.parse("".join(linecache.getlines(code.co_filename)))
        found = [
            node
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and function.name == code.co_name
            for node in ast.walk(function)
            if wanted(node)
        ]
        return self.line_of(
            name, max(found, key=lambda node: getattr(node, "lineno", 0), default=None)
        )

    def own(self, filename: str) -> bool:
        """Whether a file is the candidate's."""
        root = self.path.resolve()
        file = Path(filename).resolve()
        return file == root or (root.is_dir() and file.is_relative_to(root))


def load_candidate(path: Path, time_limit: float = 5.0) -> Candidate:
    """The candidate in a file or package.

    time_limit    seconds for one call of its functions

    Raises MicrogptError if the file cannot be read, or has no function of the text; Told if the
    file raises, or imports the text's own version of one of its functions.
    """
    file = source_file(path)
    sources = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    seed = zlib.crc32(b"".join(one.read_bytes() for one in sources if one.is_file()))
    module = _imported(path, file, time_limit)
    given = {name: x for name, x in vars(module).items() if callable(x) and name[:1] != "_"}
    own = {name: x for name, x in given.items() if not _ours(x)}
    side = _side(own)
    known = text_functions(side)
    names = [name for name in (*WHOLE, *known) if name in own and name not in HELPERS]
    if side == "scalar" and "Value" in own:
        names.append("Value")
    whole = [name for name in names if name in WHOLE][-1:]
    beside = [name for name in names if name not in WHOLE] if whole else []
    names = whole or names
    stubs = [name for name in names if _is_unwritten(own[name])]
    functions = {name: own[name] for name in names if name not in stubs}
    alike = [name for name in beside if _takes_the_same(own[name], known[name])]
    absent = [name for name in known if name not in {*names, *HELPERS}] if not whole else []
    unknown = {} if whole else _misspelt(module, own, known, absent)
    if not names:
        raise MicrogptError(_nothing(path, own, known, unknown))
    imported = {x.__name__.partition(".")[0] for x in vars(module).values() if inspect.ismodule(x)}
    found = Candidate(path, module, side, functions, stubs, absent, unknown, seed, time_limit)
    _refuse_imported(found, file, [*functions, *alike])
    found.torch = "torch" in imported and "numpy" not in imported
    found.parts = {name: own[name] for name in alike if not _is_unwritten(own[name])}
    found.different = [name for name in beside if name not in alike]
    return found


def source_file(path: Path) -> Path:
    """The file that is imported for a candidate; for a package, its __init__.py.

    Raises MicrogptError if there is no such file.
    """
    name = printable(str(path))
    if path.is_dir():
        if not (path / "__init__.py").is_file():
            which = "this folder" if path == Path() else f"the folder {name}"
            raise MicrogptError(
                f"{which} is no package: it has no __init__.py; name a file, such as mine.py"
            )
        return path / "__init__.py"
    if not path.exists():
        raise MicrogptError(f"there is no file {name}; expected such as mine.py")
    if not path.is_file():
        raise MicrogptError(f"{name} is a device or a pipe, not a file; expected such as mine.py")
    return path


def _takes_the_same(theirs: Any, ours: Any) -> bool:
    """Whether two functions have the same arguments, by name."""
    try:
        return [*inspect.signature(theirs).parameters] == [*inspect.signature(ours).parameters]
    except (TypeError, ValueError):
        return False


def _refuse_imported(candidate: Candidate, file: Path, names: Iterable[str]) -> None:
    """Raise Told if the file imports the text's own version of one of these functions."""
    held = [x for x in vars(candidate.module).values() if inspect.isfunction(x)]
    for name in names:
        if text_functions(candidate.side).get(name) in held:
            words = f"may be looked up: {candidate.path.name} imports {candidate.side}'s own"
            raise Told(name, words, _line(str(file), _imports(file, name)))


def _nothing(
    path: Path, own: Mapping[str, Any], known: Mapping[str, Any], unknown: Mapping[str, str]
) -> str:
    """Why nothing in a file can be checked, and what to do."""
    helpers = [name for name in own if name in known and name in HELPERS]
    if helpers:
        return (
            f"of the text {path.name} has only helpers ({', '.join(helpers)}), which are not"
            " checked by themselves; write a function that uses them, such as rmsnorm_backward"
        )
    if unknown:
        meant = "; ".join(f"{name}: did you mean {to}?" for name, to in unknown.items())
        return f"{path.name} has no function under a name of the text's. {meant}"
    return (
        f"{path.name} defines none of the text's functions, such as rmsnorm_backward, and no"
        " loss_and_grads, Backend or Value; their signatures are in vectorized/model.py"
    )


def _misspelt(
    module: ModuleType, own: Mapping[str, Any], known: Mapping[str, Any], absent: Sequence[str]
) -> dict[str, str]:
    """Names that the text does not have, each with the absent name of the text that is nearest."""
    spelt = {_spelt_out(name): name for name in (*absent, *WHOLE)}
    found: dict[str, str] = {}
    for name, x in own.items():
        here = str(getattr(x, "__module__", "")).startswith(module.__name__)
        if here and name not in known and name not in (*WHOLE, "Value"):
            near = difflib.get_close_matches(_spelt_out(name), spelt, 1, 0.8)
            found |= {name: spelt[near[0]]} if near else {}
    return found


def _spelt_out(name: str) -> str:
    """A name in one spelling: grad_rms_norm and RMSNormBwd both become rmsnormbackward."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    words = name.split("_")
    backward = any(word in BACKWARD for word in words)
    forward = any(word in ("forward", "fwd") for word in words)
    rest = "".join(word for word in words if word not in (*BACKWARD, "forward", "fwd"))
    if rest in ("lossand", "loss", "lossgrads"):
        return name
    return rest + "backward" * backward + "forward" * (forward and not backward)


@cache
def text_functions(side: str) -> dict[str, FunctionType]:
    """The functions of a text by name, in its order."""
    return {
        name: x
        for module in TEXTS[side]
        for name, x in vars(import_module(module)).items()
        if inspect.isfunction(x) and x.__module__ == module
    }


def _side(own: Mapping[str, Any]) -> str:
    """The text that the functions belong to; vectorized, if their names are in both texts."""
    ours, others = (set(text_functions(side)) - HELPERS for side in ("vectorized", "scalar"))
    if set(own) & ((ours - others) | set(WHOLE)):
        return "vectorized"
    return "scalar" if set(own) & ((others - ours) | {"Value"}) else "vectorized"


def _imports(file: Path, name: str) -> int:
    """The line on which a file imports a name."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ImportFrom) and any(one.name == name for one in node.names):
            return node.lineno
    return 1


def _ours(x: Any) -> bool:
    """Whether something comes from this project, not from the candidate."""
    home = str(getattr(x, "__module__", "")).partition(".")[0]
    return home in ("scalar", "vectorized", "crosscheck", "microgpt")


def _imported(path: Path, file: Path, time_limit: float) -> ModuleType:
    """The module of a candidate, imported under a name of its own."""
    name = f"candidate_{path.stem}"
    folders = [str(path)] if path.is_dir() else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=folders)
    if spec is None or spec.loader is None:
        raise MicrogptError(f"{printable(str(path))} is not Python; expected a name in .py")
    module = importlib.util.module_from_spec(spec)
    for known in [one for one in sys.modules if one.partition(".")[0] == name]:
        del sys.modules[known]
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    linecache.clearcache()
    where = Candidate(path, module, "", {}, [], [], {}, 0, IMPORT * time_limit)
    try:
        with redirect_stdout(io.StringIO()), contained(where, path.name):
            # compiled here, since Python's cached bytecode misses a change within the same second
            exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
    except SyntaxError as error:
        line = unreadable_line(Path(error.filename or file).name, error)
        raise Told(path.name, f"cannot be read: {error.msg}", line) from None
    except ModuleNotFoundError as error:
        raise MicrogptError(f"{path.name} imports {error.name}, which is not there") from None
    except Exception as error:
        raise Told(path.name, f"raises {_words(error)}", innermost(where, error)) from None
    return module


def unreadable_line(name: str, error: SyntaxError | ValueError) -> str:
    """The line that is no Python: file, number, text; "" if the error names no line."""
    number, text = getattr(error, "lineno", None), getattr(error, "text", None) or ""
    return f"{name}:{number} {text.strip()}" if number else ""


def _is_unwritten(x: Any) -> bool:
    """Whether a function or class of the candidate is a stub."""
    try:
        node = ast.parse(inspect.cleandoc("\n" + inspect.getsource(x))).body[0]
    except (OSError, TypeError, SyntaxError):
        return False
    own = isinstance(node, ast.FunctionDef) or (isinstance(node, ast.ClassDef) and not node.bases)
    return own and is_stub(node)


def is_stub(node: ast.AST) -> bool:
    """Whether a body is a docstring and `raise NotImplementedError` or `pass`, or a docstring."""
    body = [x for x in getattr(node, "body", []) if not isinstance(x, ast.Pass)]
    body = [x for x in body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
    raised = body[0].exc if len(body) == 1 and isinstance(body[0], ast.Raise) else None
    raised = raised.func if isinstance(raised, ast.Call) else raised
    return not body or (isinstance(raised, ast.Name) and raised.id == "NotImplementedError")


# --- in the text ---------------------------------------------------------------------------------


@contextmanager
def in_place(candidate: Candidate, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Within this context, these functions of the candidate replace the text's own.

    Yields the functions by name, each as `guard` makes it. Recorded runs keep the text's own.
    """
    shipped: dict[str, Any] = dict(text_functions(candidate.side))
    guards = {name: guard(candidate, name) for name in names if name != "Value"}
    exchanged = {name: (shipped[name], guards[name]) for name in guards if name in shipped}
    deepest = sys.getrecursionlimit()
    with ExitStack() as stack:
        if "Value" in names:
            value, own = import_module("scalar.value"), candidate.functions["Value"]
            stack.enter_context(_counted(candidate, own))
            for name, new in {"Value": own, **WRITTEN_OUT}.items():
                exchanged[name] = (getattr(value, name), new)
        stack.callback(sys.setrecursionlimit, deepest)
        sys.setrecursionlimit(max(deepest, DEEPEST))
        stack.enter_context(replaced(candidate.side, exchanged))
        yield guards


@contextmanager
def replaced(side: str, objects: Mapping[str, tuple[Any, Any]]) -> Iterator[None]:
    """Within this context, the modules of a text have new objects in the place of old ones.

    objects    by name, the old object and the new one
    """
    with ExitStack() as stack:
        for module in map(import_module, USERS[side]):
            for name, (old, new) in objects.items():
                if vars(module).get(name) is old:
                    stack.enter_context(patch.object(module, name, new))
        yield


def guard(candidate: Candidate, name: str) -> Callable[..., Any]:
    """A function of the candidate, made to return arrays, and to raise Told for its mistakes."""
    theirs = candidate.functions[name]
    results = RESULTS.get(name)
    signature = None
    with suppress(ValueError, TypeError):  # of a function that is not written in Python
        signature = inspect.signature(theirs)
    wanted = text_functions(candidate.side).get(name)
    inside = False

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            raise Told(name, f"calls {candidate.side}'s function of that name, which it should"
                       " replace", candidate.line_of(name))  # fmt: skip
        try:
            if signature:
                signature.bind(*args, **kwargs)
        except TypeError:
            asked = ", ".join(inspect.signature(wanted).parameters) if wanted else "other arguments"
            taken = ", ".join(signature.parameters) if signature else ""
            words = f"takes ({taken}); the text calls it with ({asked})"
            raise Told(name, words, candidate.line_of(name)) from None
        candidate.calls[name] += 1
        inside = True
        try:
            given = [to_theirs(x) for x in args] if candidate.torch else list(args)
            found = watched(candidate, name, lambda: theirs(*given, **kwargs))
            if candidate.torch:
                for x, y in zip(args, given):
                    _back(x, y)
        finally:
            inside = False
        for tree in args:
            if isinstance(tree, Tree):
                _as_arrays(tree)
        if candidate.side == "scalar" or results is None:
            return found
        return _results(candidate, name, found, results.split())

    return call


def guarded_whole(candidate: Candidate, args: list[Any]) -> dict[str, Any]:
    """The loss and the gradients that the candidate's loss_and_grads returns, by name.

    Raises Told if it returns anything else.
    """
    name = "loss_and_grads"
    candidate.calls[name] += 1
    theirs = candidate.functions[name]
    given = to_theirs(args) if candidate.torch else args
    result = watched(candidate, name, lambda: theirs(*given))
    line = candidate.line_of(name)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Told(name, f"returns {_kind(result)}; expected loss, {{name: gradient}}", line)
    loss, grads = result
    if not isinstance(grads, Mapping):
        words = f"returns {type(grads).__name__} for the gradients; expected {{name: gradient}}"
        raise Told(name, words, line)
    found: dict[str, Any] = {}
    for label, x in {"loss": loss, **{f"d{k}": x for k, x in grads.items()}}.items():
        try:
            found[label] = as_our_array(x)
        except ValueError as error:
            raise Told(name, f"returns {error} for {label}", line) from None
    return found


def watched(candidate: Candidate, name: str, call: Callable[[], Any]) -> Any:
    """What a call of the candidate returns; the first line that it prints is kept in `said`.

    Raises Told if the call raises, or takes longer than the time limit.
    """
    printed = io.StringIO()
    try:
        with (
            redirect_stdout(printed),
            np.errstate(all="ignore"),
            contained(candidate, name),
            no_look_up(candidate, name),
        ):
            found = call()
    except NotImplementedError as error:
        raise Told(name, f"{UNDONE}: it raises NotImplementedError",
                   innermost(candidate, error)) from None  # fmt: skip
    except RecursionError as error:
        words = "calls itself until Python's limit"
        raise Told(name, words, innermost(candidate, error)) from None
    except Exception as error:
        raise Told(name, f"raises {_words(error)}", innermost(candidate, error)) from None
    if printed.getvalue() and name not in candidate.said:
        candidate.said[name] = printed.getvalue().strip().partition("\n")[0]
    return found


@contextmanager
def contained(candidate: Candidate, name: str) -> Iterator[None]:
    """Within this context, a candidate neither ends the process nor takes longer than its limit.

    A candidate that ended the process with exit status 0 would count as right. What the candidate
    writes to standard error is shown without the characters that control a terminal.

    Raises Told in place of exceptions that are not an Exception, such as SystemExit.
    """
    here = os.getpid()

    def exit_of_a_child(status: int) -> None:
        if os.getpid() == here:
            raise SystemExit(status)
        exit_now(status)

    errors = Plain(sys.stderr or io.StringIO())
    try:
        with (
            limited(candidate, name),
            patch.object(os, "_exit", exit_of_a_child),
            redirect_stderr(errors),
        ):
            yield
    except (Exception, KeyboardInterrupt, Told):
        raise
    except BaseException as error:
        words = f"raises {_words(error)}"
        if isinstance(error, SystemExit):
            words = "ends the program; leave exit() out"
        elif isinstance(error, Late):
            words = _late(candidate)
        raise Told(name, words, innermost(candidate, error)) from None
    finally:
        if os.getpid() != here:  # a child process that the candidate forked and did not end
            exit_now(0)


@contextmanager
def no_look_up(candidate: Candidate, name: str) -> Iterator[None]:
    """Within this context, Told is raised if the first call of a function uses the text's own."""
    if candidate.calls[name] > 1 or name == "Value" or sys.getprofile():
        yield
        return
    told: list[Told] = []

    def heard(frame: Any, event: str, _: Any) -> None:
        home = str(frame.f_globals.get("__name__", ""))
        if event != "call" or home.partition(".")[0] not in ("scalar", "vectorized", "crosscheck"):
            return
        line = _own_line(candidate, frame)
        if home.startswith("crosscheck") and not line:
            return  # this frame has called the candidate, and was not called by the candidate
        called = frame.f_code.co_name
        if _is_answer(candidate, name, home, frame.f_code):
            words = f"has its answer from {home}.{called}; it should compute that itself"
            told.append(Told(name, words, line))
            raise told[0]
        if candidate.whole and home in TEXTS["vectorized"] and called[0] != "<":
            candidate.borrowed.setdefault(called, home)

    sys.setprofile(heard)
    try:
        yield
    finally:
        sys.setprofile(None)
    if told:  # the candidate has caught the exception
        raise told[0]


def _is_answer(candidate: Candidate, name: str, home: str, code: Any) -> bool:
    """Whether a function of ours, by its module and code, is what the candidate should write."""
    package = home.partition(".")[0]
    if home == __name__:  # the guards of the candidate's own functions
        return False
    if package != candidate.side:
        return True
    if candidate.whole:
        return home not in TEXTS[package] or code.co_name in ("loss_backward", "gpt_backward")
    return code is getattr(text_functions(package).get(name), "__code__", None)


def _own_line(candidate: Candidate, frame: Any) -> str:
    """The candidate's line that led to a frame."""
    while frame and not candidate.own(frame.f_code.co_filename):
        frame = frame.f_back
    return _line(frame.f_code.co_filename, frame.f_lineno) if frame else ""


def _late(candidate: Candidate) -> str:
    return f"is not done after {candidate.time_limit:g} seconds (--time-limit)"


def last_words(told: Told) -> str:
    """What is printed of a function that nothing but the end of the process stops."""
    return f"{told.function} {told.words}\n  your line   {told.line}"


@contextmanager
def limited(candidate: Candidate, name: str) -> Iterator[None]:
    """Within this context, Late is raised at the time limit; by a thread, as Windows has no alarm.

    A call that sleeps, or that catches Late, is ended with the process after GRACE seconds more.
    """
    caller, done = threading.get_ident(), threading.Event()

    def watch() -> None:
        if done.wait(candidate.time_limit):
            return
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(caller), ctypes.py_object(Late))
        if not done.wait(GRACE):
            line = _own_line(candidate, sys._current_frames().get(caller))
            told = Told(name, _late(candidate), line)
            output: Any = Plain(sys.__stdout__)  # type: ignore[arg-type]
            with suppress(Exception):  # the output may be closed, full, or read by no program
                print(last_words(told), file=output, flush=True)
            exit_now(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


def innermost(candidate: Candidate, error: BaseException) -> str:
    """The innermost line of the candidate in the traceback of an exception."""
    trace, found = error.__traceback__, ""
    while trace:
        if candidate.own(trace.tb_frame.f_code.co_filename):
            found = _line(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return found


def _line(filename: str, number: int) -> str:
    return f"{Path(filename).name}:{number} {linecache.getline(filename, number).strip()}".strip()


def _words(error: BaseException) -> str:
    first = ""
    with suppress(Exception):  # str() of the candidate's own exception class may raise
        first = printable(str(error).strip().partition("\n")[0])
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__


# --- arrays of other libraries -------------------------------------------------------------------


def as_our_array(x: Any) -> Any:
    """An array of NumPy, PyTorch or JAX, or a list of numbers, as an array of NumPy.

    Raises ValueError for anything else.
    """
    if hasattr(x, "detach"):
        x = x.detach().cpu().numpy()
    try:
        array = np.asarray(x)
    except (Exception, SystemExit):  # a class of the candidate may raise anything when converted
        raise ValueError("ragged lists") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{type(x).__name__} {shortened(x)}" if x is not None else "None")
    return array


def _results(candidate: Candidate, name: str, found: Any, results: Sequence[str]) -> Any:
    """What a function returned, as the arrays that the text expects."""

    def refusal(words: str) -> Told:
        return Told(name, words, candidate.statement(name, lambda x: isinstance(x, ast.Return)))

    if not results:
        if found is not None:
            raise refusal(
                f"returns {_kind(found)}; it should write into its arguments, and return nothing"
            )
        return None
    many: Sequence[Any] = found if len(results) > 1 else [found]
    if len(results) > 1 and (not isinstance(found, (tuple, list)) or len(found) != len(results)):
        raise refusal(f"returns {_kind(found)}; expected the tuple {', '.join(results)}")
    if len(results) == 1 and isinstance(found, tuple):
        raise refusal(f"returns {_kind(found)}; expected {results[0]} alone")
    arrays = []
    for label, x in zip(results, many):
        try:
            arrays.append(as_our_array(x))
        except ValueError as error:
            raise refusal(f"returns {error}; expected {label}, an array of numbers") from None
    if name == "clip":
        return float(arrays[0])
    return tuple(arrays) if len(arrays) > 1 else arrays[0]


def _kind(x: Any) -> str:
    """The type of a result, in words."""
    if isinstance(x, tuple):
        return f"a tuple of {len(x)}"
    return f"an array {x.shape}" if isinstance(x, np.ndarray) else f"{type(x).__name__}"


def _as_arrays(tree: Tree) -> None:
    """Convert the lists and tensors that a candidate put into a tree to arrays, where possible."""
    for name, x in vars(tree).items():
        if name != "layers" and (isinstance(x, list) or hasattr(x, "detach")):
            setattr(tree, name, _converted(x))
    for one in tree.layers:
        _as_arrays(one)


def _converted(x: Any) -> Any:
    if isinstance(x, list) and x and not isinstance(x[0], (int, float, list, np.number)):
        return x  # a list of Values, in a tree of scalar/
    try:
        return as_our_array(x)
    except ValueError:
        return x


def to_theirs(x: Any) -> Any:
    """An argument with tensors of PyTorch in the place of arrays; they share their memory."""
    import torch

    def tensor(y: Any) -> Any:
        plain = isinstance(y, np.ndarray)
        return torch.from_numpy(np.require(y, requirements=["W"])) if plain else y

    return each(tensor, x)


def each(change: Callable[[Any], Any], x: Any) -> Any:
    """The argument or result with `change` applied to every array in it."""
    if isinstance(x, Tree):
        tree = Tree()
        vars(tree).update({name: each(change, y) for name, y in vars(x).items()})
        return tree
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(each(change, y) for y in x))
    if isinstance(x, dict):
        return {name: each(change, y) for name, y in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(each(change, y) for y in x)
    return change(x)


def _back(x: Any, given: Any) -> None:
    """Copy what a candidate wrote into `given`, its own copy of a tree, into the tree x."""
    if isinstance(x, Tree):
        for name, y in vars(given).items():
            if name == "layers":
                for mine, theirs in zip(x.layers, y):
                    _back(mine, theirs)
            else:
                setattr(x, name, _converted(y))


# --- the candidate's own Value -------------------------------------------------------------------


@contextmanager
def _counted(candidate: Candidate, value: type) -> Iterator[None]:
    """Within this context, the candidate's Value counts its operations, and raises Told."""

    def counted(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any) -> Any:
            candidate.calls["Value"] += 1
            try:
                if name == "backward":
                    return watched(candidate, "Value", lambda: own(self, *args))
                return own(self, *args)
            except FloatingPointError:
                raise
            except Exception as error:
                words = f"raises {_words(error)}, in {name}"
                raise Told("Value", words, innermost(candidate, error)) from None

        return call

    with ExitStack() as stack:
        for name in VALUE_METHODS:
            if name in vars(value):
                own = vars(value)[name]
                stack.enter_context(patch.object(value, name, counted(name, own)))
        yield


VALUE_METHODS = (
    *("__add__", "__mul__", "__pow__", "log", "exp", "relu", "tanh", "__neg__", "__sub__"),
    *("__truediv__", "__radd__", "__rmul__", "__rsub__", "__rtruediv__", "backward"),
)


def _total(x: Sequence[Any]) -> Any:
    return sum(x[1:], start=x[0])


WRITTEN_OUT = {  # sums that scalar/value.py computes as one Value, made of single operations here
    "total": _total,
    "mean": lambda x: _total(x) * (1 / len(x)),
    "dot": lambda x, y: _total([a * b for a, b in zip(x, y)]),
}
