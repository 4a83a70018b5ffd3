"""The exercises: made from the texts, told apart when wrong, and counted when done."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from crosscheck import judge as judging
from crosscheck.defects import load_defects
from crosscheck.exercises import (
    Exercise,
    exercise_named,
    exercises,
    filename,
    made,
    solution,
    source_text,
)
from crosscheck.functions import Input, inputs
from crosscheck.judge import DONE, RIGHT_SO_FAR, UNTRIED, WRONG, Verdict, judge
from crosscheck.learn import check, place, read_progress, shown_solution, write_exercises
from microgpt.cli.commands import main
from microgpt.errors import MicrogptError

SEED = 7
SLEEP = "import time; time.sleep(60)"
FUNCTIONS = [exercise for exercise in exercises() if not exercise.defect]
PLANTED = [exercise for exercise in exercises() if exercise.defect]


@cache
def all_inputs() -> dict[str, list[Input]]:
    """The inputs of every function that is checked by itself."""
    names = [x for one in FUNCTIONS if one.package == "vectorized" for x in one.functions]
    return inputs([name for name in names if name in judging.RESULTS and name != "read"], SEED)


@pytest.fixture(autouse=True)
def _the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the inputs of all functions are made once for all tests."""
    monkeypatch.setattr(judging, "_inputs", lambda name, seed: all_inputs()[name])
    monkeypatch.setattr(judging, "_seed", lambda text: SEED)
    monkeypatch.setattr(judging, "DRAWN", 1)
    monkeypatch.setattr(judging, "STEPS", 2)


def named(name: str) -> Exercise:
    found = exercise_named(name)
    assert found is not None
    return found


def node_of(tree: ast.Module, name: str) -> ast.AST:
    """A function, or a method by the name of its class and its own."""
    body: list[ast.stmt] = tree.body
    for part in name.split("."):
        node = next(x for x in body if getattr(x, "name", "") == part)
        body = getattr(node, "body", [])
    return node


def put(text: str, name: str, source: str) -> str:
    """The text with a function as it stands in the source."""
    there, ours = node_of(ast.parse(text), name), node_of(ast.parse(source), name)
    lines, own = text.splitlines(), source.splitlines()
    lines[there.lineno - 1 : there.end_lineno] = own[ours.lineno - 1 : ours.end_lineno]
    return "\n".join(lines) + "\n"


def solved(exercise: Exercise, source: str = "") -> str:
    """The file of an exercise with the functions of the source in it: the text's by default."""
    source = source or source_text(exercise.source)
    text = source if exercise.defect else made(exercise)
    for name in exercise.functions:
        text = put(text, name, source)
    used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    if "total" in used and exercise.name.startswith("rmsnorm_"):  # a defect's own
        text += "\n\ndef total(x):\n    return x.sum(axis=-1, keepdims=True)\n"
    return text


def judged(tmp_path: Path, exercise: Exercise, text: str, hint: int = 0) -> Verdict:
    path = tmp_path / filename(exercise)
    path.write_text(text, encoding="utf-8")
    return judge(exercise, path, hint)


def said(verdict: Verdict) -> str:
    return re.sub(r"\s+", " ", " ".join(verdict.report))


@cache
def dumped(source: str, name: str) -> str:
    """A function or method of a source, without comments and layout."""
    return ast.dump(node_of(parsed(source), name))


parsed = cache(ast.parse)


def defects() -> Iterator[tuple[Exercise, str, str, str]]:
    """The named defects of functions that exercises are about: what is planted, what is said."""
    for defect in load_defects():
        files = {patch.file for patch in defect.patches}
        about = [exercise for exercise in FUNCTIONS if files == {exercise.source}]
        text = faulty = source_text(min(files)) if about else ""
        for patch in defect.patches:
            faulty = faulty.replace(patch.old, patch.new)
        for exercise in about:
            if any(dumped(text, name) != dumped(faulty, name) for name in exercise.functions):
                yield exercise, defect.name, faulty, defect.says


DEFECTS = list(defects())


@pytest.mark.parametrize("exercise", exercises(), ids=lambda one: one.name)
def test_a_stub_is_not_attempted(exercise: Exercise, tmp_path: Path) -> None:
    assert judged(tmp_path, exercise, made(exercise)).state == UNTRIED


@pytest.mark.parametrize("exercise", exercises(), ids=lambda one: one.name)
def test_the_real_function_in_its_place_passes(exercise: Exercise, tmp_path: Path) -> None:
    verdict = judged(tmp_path, exercise, solved(exercise))
    assert (verdict.state, verdict.report) == (DONE, ())


@pytest.mark.parametrize(
    ("exercise", "name", "faulty", "says"), DEFECTS, ids=[defect for _, defect, _, _ in DEFECTS]
)
def test_every_named_defect_fails_and_its_diagnosis_is_the_hint(
    exercise: Exercise, name: str, faulty: str, says: str, tmp_path: Path
) -> None:
    verdict = judged(tmp_path, exercise, solved(exercise, faulty), hint=1)
    assert verdict.state == WRONG
    assert verdict.function in exercise.functions
    # by what the numbers look like, or by the name under which the same defect is listed
    assert re.search(f"{says}|looks like {name.replace('-', ' ')}:", said(verdict))


@pytest.mark.parametrize("exercise", PLANTED, ids=lambda one: one.name)
def test_a_planted_defect_is_wrong_until_it_is_mended(exercise: Exercise, tmp_path: Path) -> None:
    touched = made(exercise) + "\n\nseen = True\n"
    assert judged(tmp_path, exercise, touched).state == WRONG
    assert exercise.defect not in made(exercise)


def test_every_function_is_looked_at(tmp_path: Path) -> None:
    """One that does nothing is wrong, so none passes because it is never called."""
    for exercise in FUNCTIONS:
        for name in exercise.functions:
            text = solved(exercise)
            node = node_of(ast.parse(text), name)
            assert isinstance(node, ast.FunctionDef)
            last = node.body[-1]
            lines = text.splitlines()
            lines[node.body[0].lineno - 1 : last.end_lineno] = [
                f"{' ' * (node.col_offset + 4)}return None"
            ]
            verdict = judged(tmp_path, exercise, "\n".join(lines) + "\n")
            assert (name, verdict.state) == (name, WRONG)


def test_no_exercise_needs_one_after_it() -> None:
    """What a file imports from the texts was an exercise before it, or is none."""
    at = {(x.module, name): i for i, x in enumerate(FUNCTIONS) for name in x.functions}
    for i, exercise in enumerate(FUNCTIONS):
        for node in ast.walk(ast.parse(made(exercise))):
            if isinstance(node, ast.ImportFrom) and node.module:
                for name in node.names:
                    assert at.get((node.module, name.name), -1) < i, (exercise.name, name.name)


def test_what_is_left_in_is_the_signature_the_equation_and_the_shapes() -> None:
    text = made(named("linear_backward"))
    assert '"""dx = w^T . dy, dw = dy . x^T' in text
    assert "    # dx = ..  # (B, T, n_in)\n" in text
    assert "dy @ w" not in text.replace(solution(named("linear_backward")), "")
    assert "einsum" not in text.partition("def ")[2]


def test_functions_that_are_not_written_yet_do_not_count_against_the_others(
    tmp_path: Path,
) -> None:
    exercise = named("heads")
    text = put(made(exercise), "merge_heads", source_text(exercise.source))
    verdict = judged(tmp_path, exercise, text)
    assert (verdict.state, verdict.written) == (RIGHT_SO_FAR, ("merge_heads",))


def test_the_operation_that_is_wrong_is_named(tmp_path: Path) -> None:
    exercise = named("value")
    text = solved(exercise).replace("(exp,))", "(self.data,))")
    verdict = judged(tmp_path, exercise, text, hint=2)
    assert verdict.function == "Value.exp"
    assert "Value.exp gives a wrong derivative" in said(verdict)
    assert "d(a.exp()) / da" in said(verdict)
    assert "it is a itself" in said(verdict)
    assert "exp(a): value e^a, derivatives e^a" in said(verdict)
    text = solved(exercise).replace("return Value(tanh,", "return 1, Value(tanh,")
    assert "gives tuple for a.tanh(); expected a Value" in said(judged(tmp_path, exercise, text))


@pytest.mark.parametrize(
    "line",
    [
        "from vectorized.model import rmsnorm_backward as theirs",
        "import vectorized.model",
        "from vectorized import model",
        "from vectorized.model import *",
        "import importlib",
        "from crosscheck.functions import inputs",
        "theirs = mean.__globals__",
        "theirs = __import__('vectorized')",
        "theirs = getattr(mean, '__glo' + 'bals__')",
        "from collections import _sys",
    ],
)
def test_the_texts_own_answer_cannot_be_reached(line: str, tmp_path: Path) -> None:
    exercise = named("rmsnorm_backward")
    verdict = judged(tmp_path, exercise, solved(exercise) + f"\n{line}\n")
    assert verdict.state == WRONG
    assert f"{filename(exercise)}:" in said(verdict)
    assert re.search("imports|uses", said(verdict))


def test_an_answer_from_a_look_up_is_wrong_on_numbers_that_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers follow from the text of the file, so that a file cannot hold their answers."""
    monkeypatch.undo()
    drawn: list[list[Input]] = []
    alone = judging.alone

    def noted(learner: Any, name: str, given: list[Input]) -> Any:
        drawn.append(given)
        return alone(learner, name, given)

    monkeypatch.setattr(judging, "alone", noted)
    for comment in "ab":
        judged(
            tmp_path, named("softmax_backward"), f"# {comment}\n{solved(named('softmax_backward'))}"
        )
    numbers = [{one.args[0].tobytes() for one in inputs if one.case is None} for inputs in drawn]
    assert numbers[0]
    assert not numbers[0] & numbers[1]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("return scale", "dy *= 2\n    return scale", "writes into dy"),
        ("return scale", 'return "x"\n    return scale', "returns str"),
        ("return scale", "return scale[0]\n    return scale", "of shape"),
        ("return scale", "while True: pass\n    return scale", "not done after|does not end"),
        ("return scale", "return undefined\n    return scale", "NameError"),
        ("return scale *", "return scale *)", "cannot be read"),
        ("return scale * (", "return np.float32(scale) * np.float32(", "float32"),
    ],
)
def test_what_is_no_matter_of_numbers_is_told_in_words_with_the_learners_line(
    old: str, new: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "SECONDS", 0.5)
    exercise = named("rmsnorm_backward")
    verdict = judged(tmp_path, exercise, solved(exercise).replace(old, new))
    assert re.search(says, said(verdict))
    assert filename(exercise) in said(verdict)
    assert "vectorized/" not in said(verdict)


def test_a_file_with_null_bytes_is_told_without_a_line(tmp_path: Path) -> None:
    exercise = named("rmsnorm_backward")
    words = said(judged(tmp_path, exercise, solved(exercise) + "\0"))
    assert "null bytes" in words
    assert "None" not in words


# --- the folder ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_exercises(tmp_path / "mine")
    return tmp_path / "mine"


def test_an_exercise_that_sleeps_is_ended_with_a_list_of_all(folder: Path) -> None:
    file = folder / "01_value.py"
    text = file.read_text(encoding="utf-8").replace("raise NotImplementedError", SLEEP, 1)
    file.write_text(text, encoding="utf-8")
    program = "import sys; from crosscheck import judge; judge.SECONDS = 0.2;"
    program += "from microgpt.cli.commands import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "check", str(folder)]
    plain, found = (
        subprocess.run([*command, *more], capture_output=True, text=True, timeout=50, check=False)
        for more in ([], ["--json"])
    )
    assert (plain.returncode, found.returncode) == (1, 1)
    assert "01_value.py" in plain.stdout
    states = {name: one["state"] for name, one in json.loads(found.stdout)["exercises"].items()}
    assert states == dict.fromkeys(states, UNTRIED) | {exercises()[0].name: WRONG}
    assert len(states) == len(exercises())


def test_the_first_run_says_that_nothing_is_broken(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(folder)]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("not attempted") for line in lines) == len(exercises())
    assert "Nothing is broken: nothing has been written yet. This is exercise 1." in lines
    assert max(map(len, lines[:-1])) <= 80


def test_check_shows_the_first_that_is_not_done_and_hints_tell_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exercise = named("rmsnorm_backward")
    text = solved(exercise).replace("(dy - y * mean(dy * y))", "dy")
    place(folder, exercise).write_text(text, encoding="utf-8")
    before = FUNCTIONS[: FUNCTIONS.index(exercise)]
    monkeypatch.setattr(
        "crosscheck.learn.judge",
        lambda one, *rest: Verdict(DONE) if one in before else judge(one, *rest),
    )
    where, diagnosis, equation = (str(check(folder, hint)) for hint in range(3))
    assert "rmsnorm_backward gives wrong numbers in dx" in where
    assert "second term" not in where
    assert "for what it looks like: microgpt check" in where
    assert "second term of the norm's derivative is missing" in " ".join(diagnosis.split())
    assert "equation" not in diagnosis.replace("for the equation", "")
    assert "\n  equation " in equation
    assert f"{FUNCTIONS.index(exercise)} of {len(exercises())} done" in where
    assert check(folder).exit_status == 1


def test_what_is_done_is_not_judged_again_until_it_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exercise = named("softmax_forward")
    path = place(folder, exercise)
    path.write_text(solved(exercise), encoding="utf-8")
    assert check(folder).verdicts[exercise.name].state == DONE
    monkeypatch.setattr("crosscheck.learn.judge", lambda *_: Verdict(WRONG))
    assert check(folder).verdicts[exercise.name].state == DONE
    path.write_text(solved(exercise) + "\n", encoding="utf-8")
    assert check(folder).verdicts[exercise.name].state == WRONG


def test_progress_and_what_was_written_survive_an_update(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exercise more in front, and another text of one that nobody has touched."""
    mine = place(folder, named("linear"))
    text = solved(named("linear"))
    mine.write_text(text, encoding="utf-8")
    assert check(folder).done == 1
    added = named("gpt")._replace(name="a_new_one")
    later = (added, *exercises())
    monkeypatch.setattr("crosscheck.exercises.exercises", lambda: later)
    monkeypatch.setattr("crosscheck.learn.exercises", lambda: later)
    made.cache_clear()
    try:
        write_exercises(folder)
        assert mine.read_text(encoding="utf-8") == text
        assert len(list(folder.glob("*.py"))) == len(later)
        assert check(folder).verdicts["linear"].state == DONE
        assert "Exercise 2 of" in place(folder, named("value")).read_text(encoding="utf-8")
    finally:
        made.cache_clear()


def test_the_solution_comes_after_an_attempt_or_a_warning(folder: Path) -> None:
    assert "You have not tried mlp yet" in shown_solution(folder, "mlp")
    assert "projected = linear(mlp_act, w.mlp_fc2)" in shown_solution(folder, "09_mlp.py")
    text = made(named("linear")).replace("raise NotImplementedError", "return x")
    place(folder, named("linear")).write_text(text, encoding="utf-8")
    assert "dot(row, x)" in shown_solution(folder, "4")
    assert "You have not tried sums yet" in shown_solution(folder, "total")
    assert "You have not tried value yet" in shown_solution(folder, "Value.exp")
    with pytest.raises(MicrogptError, match=r"no exercise is called 'lineal', .* mean linear\?"):
        shown_solution(folder, "lineal")
    with pytest.raises(MicrogptError, match=r"called 'Value.add', .* did you mean Value.__add__\?"):
        shown_solution(folder, "Value.add")


def test_a_damaged_progress_is_refused_and_begins_anew_without_it(folder: Path) -> None:
    progress = folder / "progress.json"
    for content in ("", "[]", '{"format": 2}', '{"format": 1, "exercises": {"mlp": {}}}'):
        progress.write_text(content, encoding="utf-8")
        with pytest.raises(MicrogptError, match="damaged; delete it"):
            check(folder)
    place(folder, named("linear")).write_text(solved(named("linear")), encoding="utf-8")
    progress.unlink()
    write_exercises(folder)
    assert check(folder).done == 1


def test_mistakes_in_the_call_are_answered_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check"]) == 2
    assert "there are no exercises in this folder" in capsys.readouterr().err
    (tmp_path / "own.py").write_text("x = 1\n", encoding="utf-8")
    assert main(["learn", "."]) == 2
    assert "has other Python files" in capsys.readouterr().err
    assert main(["learn", "own.py"]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main(["check", "own.py"]) == 2
    assert "own.py is a file; name the folder of the exercises" in capsys.readouterr().err
    assert main(["learn"]) == 0
    assert main(["check", "--json"]) == 3
    found = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))
    assert found["first"] == "value"


def test_watch_looks_again_when_a_file_has_changed_and_says_what_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sleep(_: float) -> None:
        if slept:
            raise KeyboardInterrupt
        slept.append(1)
        text = made(named("linear")).replace("raise NotImplementedError", "return x")
        place(folder, named("linear")).write_text(text, encoding="utf-8")

    slept: list[int] = []
    monkeypatch.setattr("crosscheck.learn.time.sleep", sleep)
    assert main(["check", str(folder), "--watch"]) == 130
    assert "linear: not attempted -> wrong" in capsys.readouterr().out.splitlines()


def test_progress_is_read_as_it_was_written(folder: Path) -> None:
    assert set(read_progress(folder)) == {one.name for one in exercises()}
