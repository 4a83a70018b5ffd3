"""Programs that climb the ladder, and programs that misbehave."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from crosscheck.__main__ import main
from crosscheck.cases import load_case, save_case, with_params
from crosscheck.kit import STAGES, write_kit
from crosscheck.port import Climb, PortError, climb, command_line, read_output
from microgpt.errors import MicrogptError

CASES = ["single-character", "two-layers"]

Tensors = dict[str, np.ndarray]
Edit = Callable[[Tensors], object]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensors]:
    """What a port should write, by case."""
    folder = tmp_path_factory.mktemp("kit")
    write_kit(folder, CASES, answers=True)
    return {name: load_file(folder / f"{name}.answers.safetensors") for name in CASES}


@pytest.fixture
def program(answers: dict[str, Tensors], tmp_path: Path) -> Callable[..., list[str]]:
    """A program that writes the answers, edited, or other bytes."""

    def write(edit: Edit = lambda _: None, change: Callable[[bytes], bytes] = bytes) -> list[str]:
        for name, tensors in answers.items():
            edited = {key: tensor.copy() for key, tensor in tensors.items()}
            edit(edited)
            (tmp_path / f"{name}.out.safetensors").write_bytes(change(save(edited)))
        copy = "import os, shutil, sys; given, out = sys.argv[1:];"
        copy += f" shutil.copy(os.path.join({str(tmp_path)!r}, os.path.basename(out)), out)"
        return script(copy)

    return write


def script(text: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", text, "{in}", "{out}"]


def run(words: list[str], names: list[str] = CASES, **options: object) -> Climb:
    usual = {"stages": STAGES, "dtype": "float64", "reference": "vectorized", "time_limit": 30.0}
    return climb(words, names, **{**usual, "go_on": False, **options})  # type: ignore[arg-type]


def statuses(result: Climb) -> dict[str, str]:
    return {rung.stage: rung.status for rung in result.rungs}


def renamed(header: bytes, old: bytes, new: bytes) -> bytes:
    """A file with something else in its header, in as many bytes."""
    assert old in header
    assert len(old) == len(new)
    return header.replace(old, new, 1)


# The ladder


def test_the_answers_pass_every_stage(program: Callable[..., list[str]]) -> None:
    result = run(program())
    assert set(statuses(result).values()) == {"passed"}
    assert result.exit_status == 0


def test_a_case_of_one_layer_has_no_further_layers(program: Callable[..., list[str]]) -> None:
    result = run(program(), ["single-character"])
    assert statuses(result)["layers"] == "does not apply"
    assert result.exit_status == 0


def test_nine_gradients_alone_are_right_and_not_complete(program: Callable[..., list[str]]) -> None:
    def gradients(tensors: Tensors) -> None:
        for key in [key for key in tensors if not key.startswith("step1/gradient/")]:
            del tensors[key]

    result = run(program(gradients), ["single-character"])
    found = statuses(result)
    assert found.pop("gradients") == "passed"
    assert found.pop("layers") == "does not apply"
    assert set(found.values()) == {"not attempted"}
    assert result.exit_status == 3


def test_a_stage_in_part_is_incomplete(program: Callable[..., list[str]]) -> None:
    result = run(program(lambda tensors: tensors.pop("step1/forward/layer0.q")))
    assert statuses(result)["attention"] == "incomplete"
    assert result.exit_status == 3
    assert "12 of 14 tensors are there, and right" in str(result)


@pytest.mark.parametrize(
    ("key", "stage"),
    [
        ("step1/forward/emb", "embedding"),
        ("step1/forward/layer0.attn_norm", "norm"),
        ("step1/forward/layer0.attn_out", "attention"),
        ("step1/forward/layer0.mlp_pre", "MLP"),
        ("step1/forward/logits", "logits"),
        ("step1/forward/loss", "loss"),
        ("step1/backward/dlogits", "backward"),
        ("step1/gradient/dwpe", "gradients"),
        ("step1/adam_v/wte", "Adam"),
        ("step1/params/wte", "Adam"),
        ("step3/forward/emb", "several steps"),
    ],
)
def test_a_wrong_number_is_found_at_its_stage_and_those_behind_are_not_reached(
    key: str, stage: str, program: Callable[..., list[str]]
) -> None:
    def wrong(tensors: Tensors) -> None:
        tensors[key].reshape(-1)[0] *= 1 + 1e-6

    result = run(program(wrong))
    found = list(statuses(result).values())
    at = STAGES.index(stage)
    assert set(found[:at]) <= {"passed"}
    assert found[at] == "wrong"
    assert set(found[at + 1 :]) <= {"not reached"}
    assert result.exit_status == 1
    reported = next(rung for rung in result.rungs if rung.wrong).wrong[CASES[0]]
    assert f"step{reported.step}/{reported.key}".replace("update/", "params/") == key


def test_with_all_the_stages_behind_a_wrong_one_are_looked_at(
    program: Callable[..., list[str]],
) -> None:
    def wrong(tensors: Tensors) -> None:
        tensors["step1/forward/emb"][0, 0, 0] += 1
        tensors["step1/gradient/dwte"][0, 0] += 1

    result = run(program(wrong), go_on=True)
    assert [rung.stage for rung in result.rungs if rung.status == "wrong"] == [
        "embedding",
        "gradients",
    ]
    assert str(result).count("disagrees") == 2


def test_a_chosen_stage_is_all_that_is_looked_at(program: Callable[..., list[str]]) -> None:
    def wrong(tensors: Tensors) -> None:
        tensors["step1/forward/emb"][0, 0, 0] += 1

    result = run(program(wrong), stages=["norm"])
    assert statuses(result) == {"norm": "passed"}
    assert result.exit_status == 0


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda x: x.update({"step1/forward/emb": x["step1/forward/emb"][..., :1]}), "has shape"),
        (lambda x: x.update({"step1/forward/emb": x["step1/forward/emb"] * np.nan}), "nan"),
        (
            lambda x: x.update({"step1/forward/emb": x["step1/forward/emb"].astype("int64")}),
            "int64",
        ),
        (
            lambda x: x.update({"step1/forward/emb": x["step1/forward/emb"].astype("float32")}),
            "is float32, and float64 was promised",
        ),
    ],
    ids=["shape", "nan", "whole numbers", "float32"],
)
def test_a_tensor_of_the_wrong_kind_is_reported(
    edit: Edit, words: str, program: Callable[..., list[str]]
) -> None:
    result = run(program(edit))
    assert statuses(result)["embedding"] == "wrong"
    assert words in str(result)


def test_a_float32_program_is_told_of_the_option(program: Callable[..., list[str]]) -> None:
    def rounded(tensors: Tensors) -> None:
        tensors |= {key: x.astype("float32") for key, x in tensors.items()}

    assert "--dtype float32" in problem(run(program(rounded)))


def test_what_fills_the_padding_is_free(program: Callable[..., list[str]]) -> None:
    def filled(tensors: Tensors) -> None:
        tensors["step3/forward/emb"][2, -1] = np.nan  # two-layers: "al" beside "isabella"

    assert run(program(filled), ["two-layers"]).exit_status == 0


# Programs that misbehave


def problem(result: Climb) -> str:
    """The one line that a program gets that wrote no trace."""
    assert result.exit_status == 1
    assert result.rungs == []
    assert len(str(result).splitlines()) == 1
    return str(result).removeprefix(f"case {CASES[0]}: ")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("pass", "the program ended well, and wrote no file {out}"),
        ("import sys; sys.exit(3)", "the program ended with exit status 3"),
        (
            "import sys; print('no such layer', file=sys.stderr); sys.exit(1)",
            "the program ended with exit status 1: no such layer",
        ),
        (
            "import os, sys; os.mkdir(sys.argv[2])",
            "the program ended well, and wrote no file {out}",
        ),
        ("import sys; open(sys.argv[2], 'w')", "its file has 0 bytes in all: cut short?"),
    ],
)
def test_a_program_that_fails_gets_one_line(text: str, line: str) -> None:
    assert problem(run(script(text))) == line


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals")
def test_a_program_that_crashes_is_told_by_which_signal() -> None:
    line = problem(run(script("import os; os.kill(os.getpid(), 11)")))
    assert line.startswith("the program was ended by signal 11 (")


def test_what_a_program_says_last_cannot_command_the_terminal() -> None:
    line = problem(run(script("import sys; sys.exit('\\x1b[2J' + 'x' * 1000)")))
    assert line.isprintable()
    assert len(line) < 300


def test_a_program_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    beats = tmp_path / "beats"
    child = f"import time\nwhile True:\n open({str(beats)!r}, 'a').write('.'); time.sleep(0.05)"
    text = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]);"
    assert problem(run(script(text + "time.sleep(60)"), time_limit=1.0)) == (
        "not done after 1 seconds (--time-limit)"
    )
    if os.name != "nt":
        before = beats.stat().st_size
        time.sleep(0.5)
        assert beats.stat().st_size == before > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file[: len(file) // 2], "bytes of numbers, and its header says"),
        (lambda file: file[:-8], "cut short?"),
        (lambda file: file + bytes(8), "bytes of numbers, and its header says"),
        (lambda file: file[:100], "cut short?"),
        (lambda file: file[:5], "its file has 5 bytes in all"),
        (lambda file: (1 << 40).to_bytes(8, "little") + file[8:], "has 1,099,511,627,776 bytes"),
        (lambda file: renamed(file, b'"dtype"', b'"dtyep"'), "without dtype"),
        (lambda file: renamed(file, b'"F64"', b'"F32"'), "not the size of a tensor"),
        (lambda file: renamed(file, b'"F64"', b'"BF8"'), "expected F64 or F32"),
        (lambda file: renamed(file, b"[0,", b"[8,"), "not the size of a tensor"),
        (lambda file: renamed(file, b'"shape":[', b'"shape":{'), "not JSON"),
        (lambda file: (8).to_bytes(8, "little") + b"[1, 2]  ", "not JSON"),
        (
            lambda file: renamed(file, b"step1/forward/emb", b"step1/forward/enb"),
            "no name of a tensor here; did you mean 'step1/forward/emb'?",
        ),
        (lambda file: file.replace(b"step3/", b"step4/"), "no name of a tensor here"),
    ],
)
def test_a_file_that_is_not_what_it_says_gets_one_line(
    change: Callable[[bytes], bytes], words: str, program: Callable[..., list[str]]
) -> None:
    assert words in problem(run(program(change=change), ["single-character"]))


def test_a_gap_between_two_tensors_is_named(program: Callable[..., list[str]]) -> None:
    def gap(file: bytes) -> bytes:
        length = int.from_bytes(file[:8], "little")
        header = json.loads(file[8 : 8 + length])
        last = max(header, key=lambda name: header[name]["data_offsets"][1])
        header[last]["data_offsets"] = [n + 8 for n in header[last]["data_offsets"]]
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + file[8 + length :] + bytes(8)

    assert "begins at byte" in problem(run(program(change=gap), ["single-character"]))


def test_a_header_with_random_faults_is_refused_in_one_line_or_read(
    answers: dict[str, Tensors], tmp_path: Path
) -> None:
    whole, rng = save(answers[CASES[0]]), Random(1)
    length, path = int.from_bytes(whole[:8], "little"), tmp_path / "out"
    lines = []
    for _ in range(200):
        file, at = bytearray(whole), rng.randrange(8 + length)
        faults = (b"", b"9" * 6000, b"[" * 3000, b"1e999", b"-1", b'"', b"\xff", b"\\u0000")
        file[at : at + rng.randrange(9)] = rng.choice(faults)
        path.write_bytes(file)
        try:
            read_output(path)
        except PortError as error:
            lines.append(str(error))
    assert len(lines) > 150
    assert all(len(line) < 400 and "\n" not in line for line in lines)


def test_with_all_a_program_that_fails_once_goes_on_with_the_other_cases(
    program: Callable[..., list[str]],
) -> None:
    words = program()
    words[4] = f"import sys; 'single' in sys.argv[2] and sys.exit(1); {words[4]}"
    result = run(words, go_on=True)
    assert result.problems == ["case single-character: the program ended with exit status 1"]
    assert statuses(result)["several steps"] == "passed"
    assert result.exit_status == 1


# The command line


def test_stages_that_no_case_has_are_refused(program: Callable[..., list[str]]) -> None:
    with pytest.raises(MicrogptError, match="none of these cases has tensors of the stage layers"):
        run(program(), ["single-character"], stages=["layers"])


def test_a_case_that_the_reference_cannot_compute_is_refused(
    program: Callable[..., list[str]], tmp_path: Path
) -> None:
    case = load_case("single-character")
    params = {name: np.array(matrix) * 1e200 for name, matrix in case.params.items()}
    save_case(with_params(case, params), tmp_path / "infinite.yaml")
    with pytest.raises(MicrogptError, match="case infinite: vectorized itself stops with"):
        run(program(), [str(tmp_path / "infinite.yaml")])


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("./mine {in}", "has no {out}"),
        ("{in} {out}", "has no {in}"),
        ("", "has no {in}"),
        ("'./mine {in} {out}", "No closing quotation"),
        ("no-such-program {in} {out}", "'no-such-program' is no program that can be run"),
    ],
)
def test_a_command_that_cannot_be_run_is_refused(program: str, words: str) -> None:
    with pytest.raises(MicrogptError, match=words):
        command_line(program)


def test_a_command_is_split_as_a_shell_would_and_no_shell_sees_it() -> None:
    words = command_line(f'"{sys.executable}" -c "a b; $HOME" --in={{in}} {{out}}')
    assert words == [sys.executable, "-c", "a b; $HOME", "--in={in}", "{out}"]


def test_a_folder_with_blanks_and_quotes_is_one_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "it's a $HOME; folder"
    odd.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(odd))
    line = problem(run(script("import os, sys; sys.exit(str(os.path.isfile(sys.argv[1])))")))
    assert line.endswith("exit status 1: True")


def test_the_exit_status_and_json_tell_other_programs(
    program: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = program(lambda tensors: tensors.pop("step1/forward/emb"))
    command = " ".join(f'"{word}"' for word in words)
    call = ["port", "--program", command, "--case", "single-character"]
    assert main([*call, "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["exit_status"] == 3
    assert report["stages"][0] == {
        "stage": "embedding",
        "status": "not attempted",
        "expected": 1,
        "agreed": 0,
        "wrong": [],
    }
    assert main([*call, "--stage", "norm"]) == 0
    assert main(["port", "--program", "mine"]) == 2
    assert main([*call, "--time-limit", "nan"]) == 2
    assert main([*call, "--case", "no-such"]) == 2


def test_a_map_is_drawn_of_all_cases(
    program: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jinja2", reason="pages need the extra `pages`")

    def wrong(tensors: Tensors) -> None:
        tensors["step1/backward/demb"] *= 2

    command = " ".join(f'"{word}"' for word in program(wrong))
    out = tmp_path / "map.html"
    assert main(["port", "--program", command, "--case", *CASES, "--html", str(out)]) == 1
    page = out.read_text(encoding="utf-8")
    assert all(f">{name}</figcaption>" in page for name in CASES)
    assert page.count("demb disagrees") >= 1
    assert "Crosscheck of vectorized and port" in page


def test_no_line_is_wider_than_80_columns(
    program: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(tensors: Tensors) -> None:
        tensors["step1/forward/layer0.attn_norm"] += 1

    print(run(program(wrong)))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
