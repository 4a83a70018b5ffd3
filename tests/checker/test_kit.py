"""The kit for a port: the form of the files, the inputs, the guide."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from crosscheck import kit
from crosscheck.cases import case_names, load_case
from crosscheck.compare import compare
from crosscheck.kit import (
    GUIDE,
    LATER,
    NOT_FOR_PORTS,
    REQUIRED,
    STAGES,
    expected_keys,
    kit_cases,
    write_kit,
)
from crosscheck.trace import split_key
from microgpt.config import FIELDS
from microgpt.runs.checkpoint import read_tensors, write_tensors
from microgpt.settings import FIXTURES
from microgpt.taps import ACTIVATIONS

ENTRY = re.compile(
    r'"([\w./]+)":\{"dtype":"(\w+)","shape":\[([\d,]*)\],"data_offsets":\[(\d+),(\d+)\]\}'
)
TENSORS = {
    "b": np.arange(6.0).reshape(2, 3),
    "a": np.array([1, -1]),
    "aa/x": np.array(0.5, "float32"),
    "c.d": np.array(2.5),
}
METADATA = {"z": 'a "quoted" {text}', "a": "caf\u00e9 \\ \n"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit with answers."""
    folder = tmp_path_factory.mktemp("kit")
    write_kit(folder, kit_cases(), answers=True)
    return folder


def header(path: Path) -> str:
    """The header of a file, without the blanks at its end."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    return content[8 : 8 + length].decode().rstrip(" ")


# The form of the files


def test_the_same_tensors_have_the_same_bytes_in_whichever_order_they_come(tmp_path: Path) -> None:
    write_tensors(tmp_path / "one", TENSORS, METADATA)
    write_tensors(
        tmp_path / "two", dict(reversed(TENSORS.items())), dict(reversed(METADATA.items()))
    )
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_header_has_the_form_that_is_promised(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", TENSORS, METADATA)
    assert header(tmp_path / "file") == (
        '{"__metadata__":{"a":"caf\u00e9 \\\\ \\n","z":"a \\"quoted\\" {text}"},'
        '"a":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
        '"b":{"dtype":"F64","shape":[2,3],"data_offsets":[16,64]},'
        '"c.d":{"dtype":"F64","shape":[],"data_offsets":[64,72]},'
        '"aa/x":{"dtype":"F32","shape":[],"data_offsets":[72,76]}}'
    )


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", TENSORS, METADATA)
    tensors, metadata = read_tensors(tmp_path / "file")
    assert metadata == METADATA
    assert {name: x.dtype for name, x in tensors.items()} == {
        name: x.dtype for name, x in TENSORS.items()
    }
    assert all(np.array_equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_without_metadata_the_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", TENSORS)
    assert (tmp_path / "file").read_bytes() == save(TENSORS)


def test_a_big_endian_or_transposed_array_is_written_like_any_other(tmp_path: Path) -> None:
    x = TENSORS["b"]
    write_tensors(tmp_path / "plain", {"x": x})
    write_tensors(tmp_path / "big", {"x": np.asfortranarray(x).astype(">f8")})
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "big").read_bytes()


@pytest.mark.parametrize(
    "path", sorted(FIXTURES.rglob("*.safetensors")), ids=lambda path: path.stem
)
def test_the_fixtures_have_that_form(path: Path, tmp_path: Path) -> None:
    write_tensors(tmp_path / "again", *read_tensors(path))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


# The inputs


def test_there_is_an_input_and_an_answer_for_every_case_and_a_guide(folder: Path) -> None:
    names = {f"{case}.{kind}.safetensors" for case in case_names() for kind in ("in", "answers")}
    assert {path.name for path in folder.iterdir()} == {*names, "GUIDE.md", "CASES.md"}


@pytest.mark.parametrize("name", case_names())
def test_an_input_can_be_read_without_a_library(name: str, folder: Path) -> None:
    text = header(folder / f"{name}.in.safetensors")
    entries = ENTRY.findall(text)
    assert text == "{" + ",".join(entry[0] for entry in ENTRY.finditer(text)) + "}"
    assert {dtype for _, dtype, *_ in entries} == {"F64", "I64"}
    assert all(first[4] == second[3] for first, second in pairwise(entries))
    assert json.loads(text).keys() == load_file(folder / f"{name}.in.safetensors").keys()


@pytest.mark.parametrize("name", case_names())
def test_an_input_says_what_the_case_says(name: str, folder: Path) -> None:
    given, case = load_file(folder / f"{name}.in.safetensors"), load_case(name)
    for field, number in vars(case.config).items():
        if f"config/{field}" in given and field not in ("activation", "steps"):
            assert given[f"config/{field}"] == number, field
    assert list(ACTIVATIONS)[int(given["config/activation"])] == case.config.activation
    assert given["config/vocab_size"] == case.tokenizer.vocab_size
    assert given.keys() >= {f"config/{name}" for name in FIELDS if name not in NOT_FOR_PORTS}
    assert all(f"`{key}`" in GUIDE.read_text() for key in given if key.startswith("config/"))
    first = int(given["config/first_step"])
    for number in range(first, first + int(given["config/steps"])):
        docs = [[*filter(lambda i: i >= 0, doc)] for doc in given[f"step{number}/batch/tokens"]]
        assert docs == case.docs(number - 1)
    if first == 1:
        assert all((given[f"step1/entry/{p}"] == case.params[p]).all() for p in case.params)


def test_adam_begins_with_moments_in_one_case_and_without_in_the_others(folder: Path) -> None:
    for name in case_names():
        first = LATER.get(name, 1)
        given = load_file(folder / f"{name}.in.safetensors")
        for moment in ("entry_m", "entry_v"):
            assert bool(given[f"step{first}/{moment}/wte"].any()) == (first > 1), name
    assert any(first > 1 for first in LATER.values())


def test_the_learning_rates_are_those_of_the_schedule(folder: Path) -> None:
    given = load_file(folder / "decay-and-clip.in.safetensors")  # 0.05, two steps of warm-up of 8
    rates = [float(given[f"step{number}/learning_rate"]) for number in (2, 3, 4)]
    assert rates == pytest.approx([0.05, 0.05, 0.05 * (1 + np.cos(np.pi / 6)) / 2])


@pytest.mark.parametrize("name", case_names())
def test_the_answers_are_all_that_a_port_writes(name: str, folder: Path) -> None:
    answers, case = load_file(folder / f"{name}.answers.safetensors"), load_case(name)
    first = LATER.get(name, 1)
    steps = range(first, first + kit.STEPS)
    assert answers.keys() == {f"step{n}/{key}" for n in steps for key in expected_keys(case)}


def test_the_answers_of_both_implementations_agree() -> None:
    case = load_case("tied-two-layers")
    ours, theirs = (kit.reference_steps(case, name) for name in ("scalar", "vectorized"))
    assert compare(case, ours.values(), theirs.values()).found == []


def test_every_tensor_of_a_port_has_its_stage() -> None:
    keys = {key for name in case_names() for key in expected_keys(load_case(name))}
    assert {kit.stage(key) for key in keys} == set(STAGES) - {"several steps"}
    assert {split_key(key)[0] for key in keys} == set(REQUIRED)


# The guide


def test_the_guide_names_everything_that_a_port_reads(folder: Path) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert (folder / "GUIDE.md").read_text(encoding="utf-8") == text
    for name in load_file(folder / "one-document.in.safetensors"):
        assert re.search(rf"[`/.]{name.rpartition('/')[2].rpartition('.')[2]}\b", text), name


def test_the_guide_names_everything_that_a_port_writes() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for key in expected_keys(load_case("two-layers")):
        phase, name = split_key(key)
        last = name.rpartition(".")[2] if "." in name else name
        if phase in ("backward", "gradient"):
            last = last.removeprefix("d")
        assert re.search(rf"[`.]{last}`", text), key
        assert f"{phase}/" in text
    for stage in STAGES:
        assert stage in text.partition("## The ladder")[2], stage


def test_the_guide_says_which_number_is_which_activation() -> None:
    row = next(line for line in GUIDE.read_text().splitlines() if "config/activation" in line)
    for number in range(len(ACTIVATIONS)):
        assert f"{number}: " in row


def test_the_guide_is_two_pages_of_text() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert text.isascii()
    assert len(text.split()) < 1800
