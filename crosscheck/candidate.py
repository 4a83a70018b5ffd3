"""A candidate: a learner's own versions of the text's functions, loaded and put in place.

Each has the name and the arguments that it has in vectorized/ or scalar/. It is called with what
the text hands over, and its results are made arrays again. An exception, a time limit, an input
that is written to, an answer taken from this project: each is told in words with the candidate's
own line, and no traceback shows lines of this project.
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
USERS = {  # modules that use the text as it stands; what is recorded keeps ours
    "vectorized": (*TEXTS["vectorized"], "vectorized.backend"),
    "scalar": (*TEXTS["scalar"], "scalar.value", "scalar.backend"),
}
# functions of the text that are not checked; a candidate's of that name is its own helper
HELPERS = {"total", "mean", "split_heads", "merge_heads", "causal_mask", "empty_caches", "fortran"}
HELPERS |= {"choose", "draw", "dot"}
WHOLE = ("loss_and_grads", "Backend")
# what a derivative is called in names that are not the text's
BACKWARD = ("backward", "backwards", "back", "bwd", "grad", "gradient", "derivative", "vjp", "d")
RESULTS = {  # what a function returns, by name; the others return nothing, or no arrays
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
IMPORT = 10  # times the limit of a call: libraries are imported with it
GRACE = 2.0  # seconds after the time limit until the process is ended
DEEPEST = 5000  # calls within calls; a `backward` that recurses along the graph needs many


class Told(BaseException):  # no Exception, so that nothing in the text catches it
    """What a candidate's function did, in words, and its own line."""

    def __init__(self, function: str, words: str, line: str = "") -> None:
        super().__init__(words)
        self.function, self.words, self.line = function, words, line

    @property
    def undone(self) -> bool:
        """Whether the function says itself that it is not written."""
        return self.words.startswith(UNDONE)


class Late(BaseException):
    """Raised in a function that has taken too long."""


@dataclass
class Candidate:
    """A file or package, and what of the text it has."""

    path: Path
    module: ModuleType
    side: str  # "vectorized" or "scalar", the text that its functions belong to
    functions: dict[str, Any]  # attempted, in the order of the text
    stubs: list[str]  # there, and not attempted
    absent: list[str]
    unknown: dict[str, str]  # names that the text does not have, and the nearest that it has
    seed: int  # of what is drawn: another text, other numbers
    time_limit: float = 5.0
    calls: Counter[str] = field(default_factory=Counter)
    said: dict[str, str] = field(default_factory=dict)  # the first line that a function printed
    parts: dict[str, Any] = field(default_factory=dict)  # the text's functions beside a whole model
    different: list[str] = field(default_factory=list)  # functions that take other arguments
    borrowed: dict[str, str] = field(default_factory=dict)  # of ours, that a whole model calls
    torch: bool = False  # whether it is to be handed tensors of PyTorch

    @property
    def whole(self) -> str:
        """The name of a whole model, if it has one."""
        return next((name for name in WHOLE if name in self.functions), "")

    def describe(self) -> str:
        """What was found, what is not attempted, which names the text does not have."""
        found = [f"{self.path.name} has {', '.join(self.functions) or 'nothing written yet'}"]
        if self.parts:
            found.append(f"and beside it {', '.join(self.parts)}")
        if self.different:
            verb = "takes" if len(self.different) == 1 else "take"
            found.append(f"not held to the text, since {verb} other arguments than the text's:"
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
        """A line of the candidate's: "mine.py:7 return dy"; that of the definition by default."""
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
        """The last line of a function that does something, or else its first."""
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
    """The candidate in a file or package; time_limit: for one call of its functions.

    Raises MicrogptError if it cannot be read, or has nothing of the text; Told if it raises.
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
    stubs = [name for name in names if _is_stub(own[name])]
    functions = {name: own[name] for name in names if name not in stubs}
    alike = [name for name in beside if _takes_the_same(own[name], known[name])]
    _refuse_imported(path, file, module, [*functions, *alike], known, side)
    absent = [name for name in known if name not in {*names, *HELPERS}] if not whole else []
    unknown = {} if whole else _misspelt(module, own, known, absent)
    if not names:
        raise MicrogptError(_nothing(path, own, known, unknown))
    imported = {x.__name__.partition(".")[0] for x in vars(module).values() if inspect.ismodule(x)}
    found = Candidate(path, module, side, functions, stubs, absent, unknown, seed, time_limit)
    found.torch = "torch" in imported and "numpy" not in imported
    found.parts = {name: own[name] for name in alike if not _is_stub(own[name])}
    found.different = [name for name in beside if name not in alike]
    return found


def source_file(path: Path) -> Path:
    """The file that is imported for a candidate: of a package, its __init__.py.

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


def _refuse_imported(
    path: Path,
    file: Path,
    module: ModuleType,
    names: Iterable[str],
    known: Mapping[str, Any],
    side: str,
) -> None:
    """Raises Told if the text's own function is at hand under any name, where one is written."""
    for name in names:
        if name in known and any(x is known[name] for x in vars(module).values()):
            words = f"has {side}'s own function of that name beside it: {path.name} imports it"
            raise Told(name, words, _line(str(file), _imports(file, name)))


def _nothing(
    path: Path, own: Mapping[str, Any], known: Mapping[str, Any], unknown: Mapping[str, str]
) -> str:
    """What to say of a file in which there is nothing to check."""
    helpers = [name for name in own if name in known and name in HELPERS]
    if helpers:
        return (
            f"{path.name} has {', '.join(helpers)}, which the text's functions use and which are"
            " not checked by themselves; write one of those functions, such as rmsnorm_backward"
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
    """Names that neither text has, each with the nearest that the text has and the file has not."""
    spelt = {_spelt_out(name): name for name in (*absent, *WHOLE)}
    found: dict[str, str] = {}
    for name, x in own.items():
        here = str(getattr(x, "__module__", "")).startswith(module.__name__)
        if here and name not in known and name not in (*WHOLE, "Value"):
            near = difflib.get_close_matches(_spelt_out(name), spelt, 1, 0.8)
            found |= {name: spelt[near[0]]} if near else {}
    return found


def _spelt_out(name: str) -> str:
    """A name as the text would write it: grad_rms_norm and RMSNormBwd are rmsnormbackward."""
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
    """The text that the functions belong to; of names that are in both, vectorized."""
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
            # compiled anew: what is cached beside it may be of a change within the same second
            exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
    except SyntaxError as error:
        line = f"{Path(error.filename or file).name}:{error.lineno} {(error.text or '').strip()}"
        raise Told(path.name, f"cannot be read: {error.msg}", line) from None
    except ModuleNotFoundError as error:
        raise MicrogptError(f"{path.name} imports {error.name}, which is not there") from None
    except Exception as error:
        raise Told(path.name, f"raises {_words(error)}", innermost(where, error)) from None
    return module


def _is_stub(x: Any) -> bool:
    """Whether a function's body is a docstring and `raise NotImplementedError`, or nothing."""
    try:
        node = ast.parse(inspect.cleandoc("\n" + inspect.getsource(x))).body[0]
    except (OSError, TypeError, SyntaxError):
        return False
    body = [one for one in getattr(node, "body", []) if not _is_constant(one)]
    if isinstance(node, ast.ClassDef) and node.bases:
        return False
    if not body or all(isinstance(one, ast.Pass) for one in body):
        return True
    return len(body) == 1 and isinstance(body[0], ast.Raise) and _is_undone(body[0].exc)


def _is_constant(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_undone(raised: ast.expr | None) -> bool:
    raised = raised.func if isinstance(raised, ast.Call) else raised
    return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"


# --- in its place --------------------------------------------------------------------------------


@contextmanager
def in_place(candidate: Candidate, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Within this context, these functions of the candidate stand in the text that is watched.

    Gives them as they stand there. The text as it is shipped is back afterwards.
    """
    shipped: dict[str, Any] = dict(text_functions(candidate.side))
    exchanged: dict[str, tuple[Any, Any]]
    guards = {name: guard(candidate, name) for name in names if name != "Value"}
    exchanged = {name: (shipped[name], guards[name]) for name in guards if name in shipped}
    if "Value" in names:
        value = import_module("scalar.value")
        exchanged["Value"] = (value.Value, candidate.functions["Value"])
        for name, written_out in WRITTEN_OUT.items():
            exchanged[name] = (getattr(value, name), written_out)
    before: list[tuple[ModuleType, str, Any]] = []
    deepest = sys.getrecursionlimit()
    sys.setrecursionlimit(max(deepest, DEEPEST))
    with ExitStack() as stack:
        if "Value" in names:
            stack.enter_context(_counted(candidate, candidate.functions["Value"]))
        try:
            for module in map(import_module, USERS[candidate.side]):
                for name, (old, new) in exchanged.items():
                    if vars(module).get(name) is old:
                        before.append((module, name, old))
                        setattr(module, name, new)
            yield guards
        finally:
            sys.setrecursionlimit(deepest)
            for module, name, old in before:
                setattr(module, name, old)


def guard(candidate: Candidate, name: str) -> Callable[..., Any]:
    """A function of the candidate as the text calls it: arrays in, arrays out, told in words."""
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
            raise Told(name, f"calls {candidate.side}'s function of that name, which it is to"
                       " take the place of", candidate.line_of(name))  # fmt: skip
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
    """What the candidate's own loss_and_grads gives, by name.

    Raises Told if that is not a loss and gradients by name.
    """
    name = "loss_and_grads"
    candidate.calls[name] += 1
    theirs = candidate.functions[name]
    given = list(args)
    if candidate.torch:
        given[0] = {k: to_theirs(x) for k, x in given[0].items()}
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
    """What a call of the candidate gives back.

    Raises Told if it raises, or takes longer than the time limit. What it prints is kept.
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

    What it prints to standard error does not command the terminal. Exit status 0 would say that
    all is right.

    Raises Told for what is no Exception.
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
        if os.getpid() != here:  # of a process that the candidate began, and left to the caller
            exit_now(0)


@contextmanager
def no_look_up(candidate: Candidate, name: str) -> Iterator[None]:
    """Raises Told if the first call of a function takes its answer from this project."""
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
            return  # what calls the candidate, and not what the candidate calls
        called = frame.f_code.co_name
        if _is_answer(candidate, name, home, frame.f_code):
            words = f"has its answer from {home}.{called}; it is to compute that itself"
            told.append(Told(name, words, line))
            raise told[0]
        if candidate.whole and home in TEXTS["vectorized"] and called[0] != "<":
            candidate.borrowed.setdefault(called, home)

    sys.setprofile(heard)
    try:
        yield
    finally:
        sys.setprofile(None)
    if told:  # and the candidate has caught it
        raise told[0]


def _is_answer(candidate: Candidate, name: str, home: str, code: Any) -> bool:
    """Whether a function of ours gives what a candidate's function of that name should find."""
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
    """Within this context, Late is raised once the time is over; no signals, so on Windows too."""
    caller, done = threading.get_ident(), threading.Event()

    def watch() -> None:
        if done.wait(candidate.time_limit):
            return
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(caller), ctypes.py_object(Late))
        if not done.wait(GRACE):  # it sleeps, or catches everything
            line = _own_line(candidate, sys._current_frames().get(caller))
            told = Told(name, _late(candidate), line)
            with suppress(Exception):  # of an output that is closed, full or read by no program
                out: Any = Plain(sys.__stdout__)  # type: ignore[arg-type]
                print(last_words(told), file=out, flush=True)
            exit_now(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


def innermost(candidate: Candidate, error: BaseException) -> str:
    """The last line of the candidate's that an exception came through."""
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
    with suppress(Exception):  # an error of the candidate's own may not know its words
        first = printable(str(error).strip().partition("\n")[0])
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__


# --- the border ----------------------------------------------------------------------------------


def as_our_array(x: Any) -> Any:
    """The array of NumPy's that holds what an array of NumPy, PyTorch or JAX, or a list, holds.

    Raises ValueError for anything else.
    """
    if hasattr(x, "detach"):
        x = x.detach().cpu().numpy()
    try:
        array = np.asarray(x)
    except (Exception, SystemExit):  # what is no list converts itself, and may do anything
        raise ValueError("ragged lists") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{type(x).__name__} {shortened(x)}" if x is not None else "None")
    return array


def _results(candidate: Candidate, name: str, found: Any, results: Sequence[str]) -> Any:
    """What a function gave back, as the arrays that the text expects."""

    def refusal(words: str) -> Told:
        return Told(name, words, candidate.statement(name, lambda x: isinstance(x, ast.Return)))

    if not results:
        if found is not None:
            raise refusal(
                f"returns {_kind(found)}; it is to write into its arguments, and return nothing"
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
    """What kind of thing something is, in words."""
    if isinstance(x, tuple):
        return f"a tuple of {len(x)}"
    return f"an array {x.shape}" if isinstance(x, np.ndarray) else f"{type(x).__name__}"


def _as_arrays(tree: Tree) -> None:
    """Make arrays of what a candidate left in a tree, where that can be done."""
    for name, x in vars(tree).items():
        if name != "layers" and (isinstance(x, list) or hasattr(x, "detach")):
            setattr(tree, name, _converted(x))
    for one in tree.layers:
        _as_arrays(one)


def _converted(x: Any) -> Any:
    if isinstance(x, list) and x and not isinstance(x[0], (int, float, list, np.number)):
        return x  # Values, of which scalar's trees are made
    try:
        return as_our_array(x)
    except ValueError:
        return x


def to_theirs(x: Any) -> Any:
    """An argument with tensors of PyTorch in the place of arrays; they share their memory."""
    import torch

    if isinstance(x, np.ndarray):
        return torch.from_numpy(np.require(x, requirements=["W"]))
    if isinstance(x, Tree):
        tree = Tree()
        vars(tree).update({name: to_theirs(y) for name, y in vars(x).items()})
        return tree
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(to_theirs, x))
    return [to_theirs(y) for y in x] if isinstance(x, list) else x


def _back(x: Any, given: Any) -> None:
    """Put what a candidate wrote into its tree into ours."""
    if isinstance(x, Tree):
        for name, y in vars(given).items():
            if name == "layers":
                for mine, theirs in zip(x.layers, y):
                    _back(mine, theirs)
            else:
                setattr(x, name, _converted(y))


# --- a Value of one's own ------------------------------------------------------------------------


@contextmanager
def _counted(candidate: Candidate, value: type) -> Iterator[None]:
    """Within this context, operations of the candidate's Value are counted, their errors told."""

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

    before = {name: vars(value)[name] for name in VALUE_METHODS if name in vars(value)}
    for name, own in before.items():
        setattr(value, name, counted(name, own))
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(value, name, own)


VALUE_METHODS = (
    *("__add__", "__mul__", "__pow__", "log", "exp", "relu", "tanh", "__neg__", "__sub__"),
    *("__truediv__", "__radd__", "__rmul__", "__rsub__", "__rtruediv__", "backward"),
)


def _total(x: Sequence[Any]) -> Any:
    return sum(x[1:], start=x[0])


WRITTEN_OUT = {  # what scalar/value.py makes one Value of, by the operations alone
    "total": _total,
    "mean": lambda x: _total(x) * (1 / len(x)),
    "dot": lambda x, y: _total([a * b for a, b in zip(x, y)]),
}
