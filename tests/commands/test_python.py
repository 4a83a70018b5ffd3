"""The Python interface: its page, every misuse, and the same model as on the command line."""

from __future__ import annotations

import doctest
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import metrics_of

import microgpt
from microgpt.backend import BACKENDS
from microgpt.cli.commands import main
from microgpt.layout import param_shapes, tap_names
from microgpt.runs.checkpoint import load_checkpoint
from microgpt.settings import flag, load_config
from scalar import Value

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
TEXTS = ["emma", "ava", "olivia", "mia"]


@pytest.fixture(params=BACKENDS)
def gpt(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small model that has had no forward pass."""
    monkeypatch.chdir(tmp_path)
    return microgpt.GPT(TEXTS, n_embd=4, n_head=2, block_size=6, steps=9, backend=request.param)


def test_every_example_of_the_page_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert (failed, tried > 20) == (0, True)


def test_an_import_waits_for_nothing() -> None:
    code = "import sys, microgpt; print('numpy' in sys.modules, 'GPT' in dir(microgpt))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert ran.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("documents", ["lines", "windows"])
def test_steps_are_those_of_microgpt_train(
    backend: str, documents: str, tiny: dict[str, str], tmp_path: Path
) -> None:
    typed = {**tiny, "documents": documents, "held_out": "2", "batch_size": "2"}
    flags = [word for name, text in typed.items() for word in (flag(name), text)]
    assert main(["train", *flags, "--backend", backend, "--out", str(tmp_path / "run")]) == 0
    config = load_config(overrides=typed)
    fields = {name: getattr(config, name) for name in typed if name != "dataset"}
    gpt = microgpt.GPT(tiny["dataset"], backend=backend, **fields)
    assert [gpt.step() for _ in range(12)] == [x["loss"] for x in metrics_of(str(tmp_path / "run"))]
    gpt.save(tmp_path / "saved")
    ours, theirs = load_checkpoint(tmp_path / "saved"), load_checkpoint(tmp_path / "run")
    assert (ours.config, ours.documents) == (theirs.config, theirs.documents)
    for name, matrix in theirs.state.params.items():
        np.testing.assert_array_equal(ours.state.params[name], matrix)
    loaded = microgpt.GPT.load(tmp_path / "run", backend=backend)
    assert loaded.held_out == gpt.held_out
    assert loaded.sample(6) == gpt.sample(6)
    assert loaded.evaluate() == gpt.evaluate()


def test_every_tap_and_gradient_is_there_for_either_backend() -> None:
    found = []
    for backend in BACKENDS:
        gpt = microgpt.GPT(TEXTS, n_layer=2, n_embd=4, n_head=2, backend=backend)
        gpt.forward(["emma", "olivia"])
        taps = gpt.taps
        gpt.backward()
        assert list(taps) == list(gpt.dtaps) == tap_names(gpt.config)
        shapes = param_shapes(gpt.config, gpt.tokenizer.vocab_size)
        assert {name: grad.shape for name, grad in gpt.grads.items()} == shapes
        found.append({**taps, **{f"d{name}": x for name, x in gpt.dtaps.items()}, **gpt.grads})
    for name, reference in found[0].items():
        np.testing.assert_allclose(found[1][name], reference, rtol=1e-9, atol=1e-12)


def test_taps_are_those_of_the_latest_forward_pass(gpt: Any) -> None:
    for documents in (["emma", "ava"], ["mia"], ["olivia", "mia"]):
        loss = gpt.forward(documents)
        assert gpt.taps["loss"] == pytest.approx(loss)
        gpt.backward()
        assert gpt.dtaps["emb"].shape == gpt.taps["emb"].shape
        dwte = np.zeros(gpt.params["wte"].shape)
        tokens = [gpt.tokenizer.document(text, gpt.config.max_tokens) for text in documents]
        for b, ids in enumerate(tokens):
            np.add.at(dwte, ids[:-1], gpt.dtaps["emb"][b, : len(ids) - 1])
        np.testing.assert_allclose(gpt.grads["wte"], dwte, rtol=1e-9, atol=1e-12)


def test_looking_changes_nothing(gpt: Any) -> None:
    other = microgpt.GPT(TEXTS, n_embd=4, n_head=2, block_size=6, steps=9, backend=gpt.backend)
    for _ in range(3):
        looked_at = gpt.forward()
        assert gpt.taps["loss"] == pytest.approx(looked_at)
        gpt.evaluate(TEXTS)
        gpt.backward()
        gpt.dtaps, gpt.grads, gpt.params, repr(gpt)
        gpt.update()
        assert other.step() == looked_at
    for name, matrix in other.params.items():
        np.testing.assert_array_equal(gpt.params[name], matrix)


def test_parameters_and_gradients_can_be_replaced(gpt: Any) -> None:
    gpt.step()
    loss = gpt.forward(TEXTS)
    gpt.set_params({"wte": 2 * gpt.params["wte"]})
    assert gpt.forward(TEXTS) != loss
    gpt.set_params({"wte": gpt.params["wte"] / 2})
    assert gpt.forward(TEXTS) == loss
    gpt.backward()
    before = gpt.params
    gpt.set_grads({name: np.zeros(grad.shape) for name, grad in gpt.grads.items()})
    assert not any(grad.any() for grad in gpt.grads.values())
    gpt.update(lr=np.float64(0.1))
    assert gpt.updates == 2
    assert any((gpt.params[name] != matrix).any() for name, matrix in before.items())  # by Adam's m


def test_a_model_goes_on_from_its_checkpoint(gpt: Any, tmp_path: Path) -> None:
    for _ in range(4):
        gpt.step()
    again = microgpt.GPT.load(gpt.save(tmp_path), TEXTS, backend=gpt.backend)
    assert repr(again) == repr(gpt)
    assert [again.step() for _ in range(5)] == [gpt.step() for _ in range(5)]
    assert again.sample(3) == gpt.sample(3)


def test_numbers_arrays_and_texts_of_any_kind_will_do(gpt: Any) -> None:
    expected = gpt.forward(["ava"])
    ids = gpt.tokenizer.document("ava")
    for documents in ("ava", ("ava",), iter(["ava"]), [ids], np.array([ids]), [np.array(ids)]):
        assert gpt.forward(documents) == expected
    assert microgpt.GPT(iter(TEXTS), n_embd=np.int64(4)).config.n_embd == 4


def test_what_is_printed_is_short(gpt: Any, tmp_path: Path) -> None:
    gpt.forward(TEXTS)
    held = load_checkpoint(gpt.save(tmp_path))
    for shown in (gpt, held, held.state, held.tokenizer):
        assert len(repr(shown)) < 120
        assert "\n" not in repr(shown)
    deep = microgpt.GPT(TEXTS, n_layer=9, n_embd=4, n_head=2)
    assert len(repr(deep.params).splitlines()) <= 31
    assert repr(Value(2.0)) == "Value(data=2.0, grad=0.0)"


Misuse = Callable[[Any], object]
MISUSES: list[tuple[Misuse, str]] = [
    (lambda gpt: gpt.forward([]), "an empty batch has no loss"),
    (lambda gpt: gpt.forward(np.zeros((0, 3), int)), "an empty batch has no loss"),
    (lambda gpt: gpt.forward(5), "expected a list of documents, got 5"),
    (lambda gpt: gpt.forward([5]), "document 1: expected a text, or two token ids or more, got 5"),
    (lambda gpt: gpt.forward([[]]), "document 1: expected a text, or two token ids or more"),
    (lambda gpt: gpt.forward(["ava", [3]]), "document 2: expected a text, or two token ids or"),
    (lambda gpt: gpt.forward([[0.5, 1]]), "document 1: expected a text, or two token ids or"),
    (lambda gpt: gpt.forward([b"ava"]), "document 1: expected a text, or two token ids or more"),
    (lambda gpt: gpt.forward([[0, 99]]), "document 1: the token id 99 is outside the vocabulary"),
    (lambda gpt: gpt.forward([[0, -1]]), "document 1: the token id -1 is outside the vocabulary"),
    (lambda gpt: gpt.forward(["avq"]), "the character 'q' (U+0071) in 'avq' is not in the"),
    (lambda gpt: gpt.forward(["a" * 7]), "document 1: 'aaaaaaa' has 7 characters, and the context"),
    (lambda gpt: gpt.forward([[0] * 8]), "document 1: has 8 tokens, and the context takes 7"),
    (lambda gpt: gpt.backward(), "backward: needs a forward pass"),
    (lambda gpt: (gpt.forward(TEXTS), gpt.backward(), gpt.backward()), "has been called already"),
    (lambda gpt: gpt.update(), "update: call forward(documents) and backward() first"),
    (lambda gpt: (gpt.forward(TEXTS), gpt.update()), "update: call backward() first"),
    (lambda gpt: gpt.grads, "grads: call forward(documents) and backward() first"),
    (lambda gpt: (gpt.forward(TEXTS), gpt.grads), "grads: call backward() first"),
    (lambda gpt: (gpt.step(), gpt.grads), "grads: call forward(documents) and backward() first"),
    (lambda gpt: gpt.taps, "taps: call forward(documents) first"),
    (lambda gpt: (gpt.step(), gpt.taps), "taps: call forward(documents) first"),
    (lambda gpt: (gpt.forward(TEXTS), gpt.dtaps), "dtaps: call backward() first"),
    (lambda gpt: (gpt.forward(TEXTS), gpt.taps["q"]), "no tensor 'q'; did you mean 'layer0.q'?"),
    (lambda gpt: [gpt.step() for _ in range(10)], "update: all 9 steps of the schedule are done"),
    (lambda gpt: gpt.step(lr=0), "lr: expected more than 0, got 0.0"),
    (lambda gpt: gpt.step(lr="fast"), "lr: expected a number, got 'fast'"),
    (lambda gpt: gpt.set_params({"wtf": 0}), "there is no parameter 'wtf'; did you mean 'wte'?"),
    (lambda gpt: gpt.set_params({"wte": [[1]]}), "wte: expected the shape (8, 4), got (1, 1)"),
    (lambda gpt: gpt.set_params({"wte": "a"}), "set_params: wte: expected rows of real numbers"),
    (lambda gpt: gpt.set_params({"wte": np.ones((8, 4), complex)}), "wte: expected rows of real"),
    (lambda gpt: gpt.params.__setitem__("wte", 0), "'wte': these tensors are copies"),
    (lambda gpt: microgpt.GPT("names", dataset="pride"), "data and dataset are both given"),
    (lambda gpt: gpt.tokenizer.decode([99]), "the token id 99 is outside the vocabulary"),
    (lambda gpt: gpt.tokenizer.decode(3), "decode: expected token ids, got 3"),
    (lambda gpt: gpt.tokenizer.decode(["a"]), "the token id 'a' is outside the vocabulary"),
    (lambda gpt: gpt.set_params({"wte": np.full((8, 4), np.nan)}), "wte: is not finite"),
    (lambda gpt: gpt.set_params([1]), "set_params: expected tensors by name, got [1]"),
    (lambda gpt: gpt.set_grads({}), "set_grads: call forward(documents) and backward() first"),
    (lambda gpt: gpt.evaluate(), "evaluate: nothing was held out of training; give texts"),
    (lambda gpt: gpt.evaluate([[0, 1]]), "evaluate: expected texts"),
    (lambda gpt: gpt.evaluate(5), "expected a list of documents, got 5"),
    (lambda gpt: gpt.evaluate([]), "an empty batch has no loss"),
    (lambda gpt: gpt.sample(-1), "sample: num: expected 0 or more, got -1"),
    (lambda gpt: gpt.sample("ava"), "sample: num: expected a whole number, got 'ava'"),
    (lambda gpt: gpt.sample(prompt="q"), "the character 'q' (U+0071)"),
    (lambda gpt: gpt.sample(prompt=3), "sample: prompt: expected a text, got 3"),
    (lambda gpt: gpt.sample(prompt="aaaaaa"), "sample: prompt: 6 characters leave no room"),
    (lambda gpt: gpt.sample(temperature=-1), "sample: temperature: expected"),
    (lambda gpt: gpt.sample(top_k=-1), "sample: top_k: expected 0 or more, got -1"),
    (lambda gpt: gpt.sample(seed=-5), "sample: seed: expected 0 or more, got -5"),
    (lambda gpt: (gpt.save("file"), gpt.save("file/x")), "file/x: cannot be written: "),
    (lambda gpt: gpt.save(""), "save: expected a path, got ''"),
    (lambda gpt: gpt.save("no\0path"), "save: expected a path, got 'no"),
    (lambda gpt: gpt.load("missing"), "there is no run and no checkpoint"),
    (lambda gpt: gpt.load(3), "GPT.load: expected a path, got 3"),
    (lambda gpt: microgpt.GPT([]), "data: there is no text in it"),
    (lambda gpt: microgpt.GPT([""]), "data: there is no text in it"),
    (lambda gpt: microgpt.GPT([1]), "data: expected a name, a path or texts, got 1"),
    (lambda gpt: microgpt.GPT(["a\ud800"]), "data: '\\ud800' is no character"),
    (
        lambda gpt: gpt.set_params({"wte": [[10**400] * 4] * 8}),
        "wte: expected rows of real numbers",
    ),
    (lambda gpt: microgpt.GPT({"a", "b"}), "data: a set comes in another order each time"),
    (lambda gpt: microgpt.GPT("missing"), "'missing' names no data set and no file"),
    (lambda gpt: microgpt.GPT(TEXTS, "wombat"), "there is no preset and no file 'wombat'"),
    (lambda gpt: microgpt.GPT(TEXTS, backend="torch"), "expected scalar or vectorized, got 'torc"),
    (lambda gpt: microgpt.GPT(TEXTS, n_layer="2"), "GPT: n_layer: expected a whole number"),
    (lambda gpt: microgpt.GPT(TEXTS, n_layers=2), "unknown key 'n_layers'; did you mean 'n_layer'"),
    (lambda gpt: microgpt.GPT(TEXTS, n_head=3), "n_head can be 1, 2, 4, 8, 16"),
    (lambda gpt: microgpt.GPT(TEXTS, seed=-5), "seed: expected 0 or more, got -5"),
    (lambda gpt: microgpt.GPT(TEXTS, n_embd=10**9), "and this machine has"),
]


def test_steps_that_overflow_give_no_warning_of_numpy(gpt: Any) -> None:
    for _ in range(3):
        with suppress(microgpt.MicrogptError):  # a loss that is not finite
            gpt.step(lr=1e300)


def test_the_texts_of_a_model_from_python_are_asked_for_in_one_line(
    gpt: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    gpt.save("saved")
    for command, remedy in (
        (["eval", "saved"], "name a text file with --dataset"),
        (["atlas", "saved", "--step", "1"], "leave --step out"),
    ):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "trained on texts given in Python, which are not in its checkpoint; " in line
        assert line.endswith(remedy)


@pytest.mark.parametrize(("misuse", "said"), MISUSES)
def test_a_misuse_is_told_in_one_sentence(misuse: Misuse, said: str, gpt: Any) -> None:
    before = gpt.params
    with pytest.raises(microgpt.MicrogptError) as refusal:
        misuse(gpt)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
    if "step" not in said and "(documents) first" not in said and "and backward" not in said:
        assert all((gpt.params[name] == matrix).all() for name, matrix in before.items())


def test_numbers_that_are_too_large_are_told_in_one_sentence(gpt: Any) -> None:
    gpt.set_params({"lm_head": np.where(np.arange(32).reshape(8, 4) % 2, 1.7e308, -1.7e308)})
    for misuse in (lambda: gpt.forward(TEXTS), lambda: gpt.evaluate(TEXTS), gpt.sample, gpt.step):
        with pytest.raises(microgpt.MicrogptError):
            misuse()
    with pytest.raises(microgpt.MicrogptError, match=r"^taps: call forward\(documents\) first"):
        gpt.taps  # noqa: B018


def test_a_text_of_which_little_is_seen_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"1 of 1 documents is .* 1\.6 % .*: documents='windows'"):
        microgpt.GPT(["ab" * 500])
    microgpt.GPT(["ab" * 500], documents="windows")


def test_what_is_held_out_may_be_longer_than_the_context() -> None:
    gpt = microgpt.GPT([*TEXTS, "o" * 9], n_embd=4, n_head=2, block_size=6, held_out=4)
    assert gpt.evaluate() > 0


def test_processes_are_for_those_who_ask_for_them() -> None:
    assert microgpt.GPT(TEXTS, "names-fast", held_out=0).config.cores == 1


def test_documents_that_are_not_in_a_checkpoint_are_asked_for(gpt: Any, tmp_path: Path) -> None:
    loaded = microgpt.GPT.load(gpt.save(tmp_path), backend=gpt.backend)
    with pytest.raises(microgpt.MicrogptError, match="give some, as in step"):
        loaded.step()
    assert loaded.step(["ava"]) == gpt.step(["ava"])


def test_what_is_given_out_cannot_be_written_to(gpt: Any) -> None:
    with pytest.raises(ValueError, match="read-only"):
        gpt.params["wte"][0, 0] = 1.0


def test_several_cores_are_left_to_the_command() -> None:
    with pytest.raises(microgpt.MicrogptError, match="used by the command alone: microgpt train"):
        microgpt.GPT(TEXTS, cores=2, batch_size=2)
