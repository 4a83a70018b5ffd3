"""What a batch means, and that sampling side by side is sampling one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import vectorized.arrays
import vectorized.batch
import vectorized.sample
import vectorized.worker
from microgpt.backend import NAMES, Backend, Docs, fresh_state, load_backend
from microgpt.config import Config, load_config
from microgpt.init import init_params
from microgpt.layout import Tree
from microgpt.tokenizer import Tokenizer, build_tokenizer
from vectorized.arrays import Array, Shape, Workspace
from vectorized.batch import SHARED, Batch, Row, pieces, places, together
from vectorized.sample import choose

# both revisions of the model, small, with weights that tell everything apart
HISTORICAL = ("microgpt", "microgpt-243")
CONFIGS = {
    name: replace(
        load_config(name), n_embd=4, n_head=2, block_size=6, init_std=0.5, init_std_residual=0.5
    )
    for name in HISTORICAL
}
TOKENIZERS = {name: build_tokenizer("abc", config) for name, config in CONFIGS.items()}

backends = pytest.mark.parametrize("backend", NAMES)
models = pytest.mark.parametrize("preset", CONFIGS)
texts = st.lists(st.text("abc", min_size=1, max_size=8), min_size=1, max_size=4)
few = settings(max_examples=40, deadline=None)


def load(backend: str, config: Config, tokenizer: Tokenizer, watch: bool = False) -> Backend:
    params = init_params(config, tokenizer.vocab_size, Random(config.seed))
    return load_backend(backend, config, fresh_state(params), watch)


def encoded(texts: Sequence[str], preset: str) -> list[list[int]]:
    tokenizer, longest = TOKENIZERS[preset], CONFIGS[preset].max_tokens
    return [tokenizer.document(text)[:longest] for text in texts]


def measured(backend: Backend, docs: Docs) -> tuple[float, dict[str, Array]]:
    """The loss of a batch and its gradients."""
    loss = backend.forward(docs)
    backend.backward()
    return loss, {name: np.array(grad) for name, grad in backend.grads().items()}


def assert_same(
    found: tuple[float, dict[str, Array]], expected: tuple[float, dict[str, Array]]
) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-14)
    for name, grad in expected[1].items():
        np.testing.assert_allclose(found[1][name], grad, rtol=1e-12, atol=1e-15, err_msg=name)


def mean_alone(backend: Backend, docs: Docs) -> tuple[float, dict[str, Array]]:
    """The mean of what is measured of each document by itself."""
    alone = [measured(backend, [doc]) for doc in docs]
    names = alone[0][1]
    return (
        sum(loss for loss, _ in alone) / len(docs),
        {name: sum(grads[name] for _, grads in alone) / len(docs) for name in names},
    )


@backends
@models
@few
@given(texts=texts)
@example(texts=["ab", "ab", "c"])  # a document that occurs twice counts twice
@example(texts=["a", "abcabcab"])  # each counts the same, however long it is
def test_a_batch_is_the_mean_of_its_documents_run_alone(
    backend: str, preset: str, texts: list[str]
) -> None:
    model = load(backend, CONFIGS[preset], TOKENIZERS[preset])
    docs = encoded(texts, preset)
    assert_same(measured(model, docs), mean_alone(model, docs))


@backends
@models
@few
@given(texts=texts)
@example(texts=["a", "abcabcab"])
def test_the_losses_of_a_document_are_the_same_in_any_company(
    backend: str, preset: str, texts: list[str]
) -> None:
    model = load(backend, CONFIGS[preset], TOKENIZERS[preset])
    docs = encoded(texts, preset)
    together = model.position_losses(docs)
    for losses, doc in zip(together, docs, strict=True):
        (alone,) = model.position_losses([doc])
        assert losses == pytest.approx(alone, rel=1e-14)
        assert len(losses) == len(doc) - 1


@backends
@models
@few
@given(texts=texts, seed=st.integers(0, 99))
def test_the_order_of_a_batch_changes_nothing(
    backend: str, preset: str, texts: list[str], seed: int
) -> None:
    model = load(backend, CONFIGS[preset], TOKENIZERS[preset])
    docs = encoded(texts, preset)
    shuffled = Random(seed).sample(docs, len(docs))
    assert_same(measured(model, shuffled), measured(model, docs))


@models
@few
@given(
    batches=st.lists(st.lists(st.text("abc", min_size=1, max_size=8), min_size=1), min_size=1),
    columns=st.sampled_from([12, 5, 1]),
    tiled=st.sampled_from([99, 4, 0]),
    padding=st.sampled_from([2560, 8, 0]),
    packing=st.sampled_from([1200, 0]),
    layouts=st.sampled_from([32, 1]),
)
@example(
    batches=[["ab"] * 2, ["a"] * 3, ["ab"] * 2],
    columns=12,
    tiled=0,
    padding=9,
    packing=1200,
    layouts=32,
)
@example(batches=[["ab", "a"], ["abca"]], columns=12, tiled=0, padding=9, packing=0, layouts=32)
def test_batches_that_are_computed_in_pieces_are_the_batches(
    preset: str,
    batches: list[list[str]],
    columns: int,
    tiled: int,
    padding: int,
    packing: int,
    layouts: int,
) -> None:
    whole, cut = (load("vectorized", CONFIGS[preset], TOKENIZERS[preset]) for _ in range(2))
    workspace = cut.worker.workspace

    def spoiled(shapes: Sequence[Shape]) -> list[tuple[Tree, Tree]]:
        """Whatever a batch relies on, another has written over it."""
        laid = Workspace.arrays(workspace, shapes)
        workspace.block.fill(np.nan)
        return laid

    with (
        patch.object(workspace, "arrays", spoiled),
        patch.multiple(vectorized.batch, COLUMNS=columns, PADDING=padding, PACKING=packing),
        patch.object(vectorized.arrays, "TILED", tiled),
        patch.object(vectorized.arrays.Workspace, "LAYOUTS", layouts),
    ):
        found = [measured(cut, encoded(texts, preset)) for texts in batches]
    for texts, measures in zip(batches, found):
        assert_same(measures, measured(whole, encoded(texts, preset)))


@models
def test_a_large_batch_is_the_mean_of_its_documents_too(preset: str) -> None:
    model = load("vectorized", CONFIGS[preset], TOKENIZERS[preset])
    rng = Random(1)
    docs = encoded(["".join(rng.choices("abc", k=rng.randint(1, 8))) for _ in range(300)], preset)
    with patch.object(vectorized.batch, "COLUMNS", 500):
        assert len(pieces(docs, CONFIGS[preset])) > 1
        found = measured(model, docs)
    assert_same(found, mean_alone(model, docs))


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=40)


def documents(lengths: list[int]) -> list[list[int]]:
    """Documents of so many positions, each of a token of its own."""
    return [[i] * (n + 1) for i, n in enumerate(lengths)]


@given(lengths=lengths, block_size=st.integers(1, 30))
@example(lengths=[7] * 5 + [2] * 5, block_size=16)
def test_documents_are_packed_into_rows_as_far_as_there_is_room(
    lengths: list[int], block_size: int
) -> None:
    rows = together(documents(lengths), block_size)
    assert sorted(doc for _, row in rows for doc in row) == documents(lengths)
    room = min(SHARED, block_size)
    for i, (taken, row) in enumerate(rows):
        assert taken == sum(len(doc) - 1 for doc in row)
        assert len(row) == 1 or taken <= room
        later = [len(doc) - 1 for _, row in rows[i + 1 :] for doc in row]
        assert not later or taken + min(later) > room


@given(lengths=lengths, n_embd=st.integers(1, 40))
@example(lengths=[20, 10, 10, 10, 3], n_embd=1)
@example(lengths=[17, 16], n_embd=1)
def test_pieces_are_small_and_hardly_padded(lengths: list[int], n_embd: int) -> None:
    config = replace(CONFIGS["microgpt"], n_embd=n_embd, block_size=30)
    with patch.multiple(vectorized.batch, COLUMNS=60, PADDING=200, PACKING=50):
        cut = pieces(documents(lengths), config)
    assert sorted(doc for piece in cut for _, row in piece for doc in row) == documents(lengths)
    packs = (len(lengths) * max(lengths) - sum(lengths)) * n_embd > 50
    assert packs or all(len(row) == 1 for piece in cut for _, row in piece)

    def too_much(piece: list[Row]) -> bool:
        taken = [positions for positions, _ in piece]
        columns = len(piece) * max(taken)
        padding = columns - sum(taken)
        return (
            columns > 60 or padding > 200 // n_embd or (packs and max(taken) > SHARED >= min(taken))
        )

    assert not any(too_much(piece) for piece in cut if len(piece) > 1)
    for one, other in pairwise(cut):  # no cut without need
        assert too_much([*one, other[0]])


def padded_further(docs: Docs, T: int, rng: Random, V: int) -> Batch:
    """A batch with more padding than it needs, and anything at all in the padding."""
    B = len(docs)
    tokens = np.array([[rng.randrange(V) for _ in range(T)] for _ in docs])
    targets = np.array([[rng.randrange(V) for _ in range(T)] for _ in docs])
    weights = np.zeros((B, T))
    for b, doc in enumerate(docs):
        n = len(doc) - 1
        tokens[b, :n], targets[b, :n], weights[b, :n] = doc[:-1], doc[1:], 1 / (B * n)
    inputs, outputs = places(tokens * (B * T)), places(targets * (B * T))
    return Batch(Shape(B, T), inputs, outputs, weights.reshape(-1), ragged=True)


@models
@given(texts=texts, seed=st.integers(0, 99))
@settings(deadline=None)
def test_more_padding_changes_nothing(preset: str, texts: list[str], seed: int) -> None:
    config, tokenizer = CONFIGS[preset], TOKENIZERS[preset]
    model = load("vectorized", config, tokenizer, watch=True)  # which packs nothing
    docs = encoded(texts, preset)
    expected = measured(model, docs)

    def pad(docs: Docs, dtype: np.dtype, of: int) -> Batch:
        return padded_further(docs, config.block_size, Random(seed), tokenizer.vocab_size)

    with patch.object(vectorized.worker, "pad", pad):
        assert_same(measured(model, docs), expected)


def with_an_impossible_token(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """Parameters by which token 0 cannot follow at position 2, where its logit is -2000."""
    params = init_params(config, tokenizer.vocab_size, Random(config.seed))
    for name in ("wte", "wpe", "layer0.attn_wo", "layer0.mlp_fc2"):  # channel 0 is of no other use
        rows = params[name]
        params[name] = (
            [[0.0] * len(rows[0]), *rows[1:]] if "." in name else [[0.0, *row[1:]] for row in rows]
        )
    params["wpe"][2] = [1e6, 0.0, 0.0, 0.0]
    params["lm_head"][0] = [-1000.0, 0.0, 0.0, 0.0]
    return params


@pytest.mark.parametrize(
    "docs",
    [
        [[3, 1, 2, 1, 2, 3], [3, 0, 3]],  # each in a row of its own
        [[3, 1, 2, 1, 3], [3, 1, 2, 3], [3, 0, 3], [3, 1, 3]],  # two rows of two, one with padding
    ],
)
def test_padding_may_have_a_loss_that_is_not_finite(docs: Docs) -> None:
    config, tokenizer = CONFIGS["microgpt"], TOKENIZERS["microgpt"]
    params = with_an_impossible_token(config, tokenizer)
    model = load_backend("vectorized", config, fresh_state(params))
    with patch.object(vectorized.batch, "PACKING", 0):
        found = measured(model, docs)  # pad() fills up with token 0
    assert_same(found, mean_alone(model, docs))


@backends
def test_a_token_of_probability_0_is_refused(backend: str) -> None:
    config, tokenizer = CONFIGS["microgpt"], TOKENIZERS["microgpt"]
    params = with_an_impossible_token(config, tokenizer)
    model = load_backend(backend, config, fresh_state(params))
    with pytest.raises(FloatingPointError):
        model.forward([[3, 1, 2, 0, 3]])


def test_both_backends_say_the_same_of_the_loss_of_an_impossible_token() -> None:
    config, tokenizer = CONFIGS["microgpt"], TOKENIZERS["microgpt"]
    params = with_an_impossible_token(config, tokenizer)
    outcomes: list[Any] = []
    for backend in NAMES:
        model = load_backend(backend, config, fresh_state(params))
        try:
            (losses,) = model.position_losses([[3, 1, 2, 0, 3]])
            outcomes.append([math.isinf(loss) for loss in losses])
        except FloatingPointError:
            outcomes.append("refused")
    assert outcomes[0] == outcomes[1]


@st.composite
def models_to_sample(draw: st.DrawFn) -> tuple[Config, Tokenizer]:
    D, H = draw(st.sampled_from([2, 1])), draw(st.sampled_from([2, 1]))
    config = replace(
        CONFIGS[draw(st.sampled_from(sorted(CONFIGS)))],
        n_layer=draw(st.integers(1, 2)),
        n_embd=D * H,
        n_head=H,
        block_size=draw(st.sampled_from([5, 6, 4, 3, 2, 1])),
        vocabulary=draw(st.sampled_from(["chars-bos", "bos-eos-chars"])),
        seed=draw(st.integers(0, 10**6)),
    )
    return config, build_tokenizer("abcd"[: draw(st.sampled_from([4, 3, 2, 1]))], config)


def assert_same_samples(
    config: Config,
    tokenizer: Tokenizer,
    seed: int,
    num: int,
    temperature: float,
    prompt: Sequence[int],
) -> None:
    """The same documents from both backends, which leave the random stream in the same place."""
    ours, theirs = Random(seed), Random(seed)
    expected = load("scalar", config, tokenizer).sample(tokenizer, ours, num, temperature, prompt)
    found = load("vectorized", config, tokenizer).sample(
        tokenizer, theirs, num, temperature, prompt
    )
    assert found == expected
    assert len(found) == num
    assert ours.getstate() == theirs.getstate()


@settings(max_examples=400, deadline=None)
@given(
    model=models_to_sample(),
    seed=st.integers(0, 10**6),
    num=st.sampled_from([7, 12, 3, 1, 0]),
    temperature=st.floats(0.2, 2),
    walkers=st.sampled_from([1024, 5, 2, 1]),
    data=st.data(),
)
def test_samples_are_the_same_draw_for_draw(
    model: tuple[Config, Tokenizer],
    seed: int,
    num: int,
    temperature: float,
    walkers: int,
    data: st.DataObject,
) -> None:
    config, tokenizer = model
    chars = st.sampled_from(sorted(tokenizer.ids.values()))
    prompt = data.draw(st.lists(chars, max_size=config.block_size - 1))
    with patch.object(vectorized.sample, "most_walkers", lambda config: walkers):
        assert_same_samples(config, tokenizer, seed, num, temperature, prompt)


@models
def test_samples_of_a_whole_model_are_the_same_draw_for_draw(preset: str) -> None:
    config = load_config(preset)
    tokenizer = build_tokenizer("abcdefghijklmnopqrstuvwxyz", config)
    assert_same_samples(config, tokenizer, 1, config.num_samples, config.temperature, [])


def test_single_precision_can_draw_at_any_temperature() -> None:
    config = replace(load_config(), num_samples=3)
    tokenizer = build_tokenizer("abcdefghijklmnopqrstuvwxyz", config)
    single = replace(config, dtype="float32")
    for temperature in (1e-3, 1e-40, 1e-300):
        expected, found = (
            load(backend, settings, tokenizer).sample(tokenizer, Random(1), 3, temperature, [])
            for backend, settings in (("scalar", config), ("vectorized", single))
        )
        assert found == expected


def test_no_sample_takes_no_draw() -> None:
    config, tokenizer = CONFIGS["microgpt"], TOKENIZERS["microgpt"]
    assert_same_samples(config, tokenizer, seed=1, num=0, temperature=1.0, prompt=[])


def test_a_context_of_one_position_gives_one_character_at_most() -> None:
    config = replace(CONFIGS["microgpt"], block_size=1)
    assert_same_samples(config, TOKENIZERS["microgpt"], 1, 30, 1.0, [])


# eighths, so that many draws fall exactly on the border between two choices
eighths = st.integers(0, 8).map(lambda n: n / 8)
weights = st.lists(eighths | st.floats(0, 1), min_size=1, max_size=5).filter(any)
draws = st.integers(0, 7).map(lambda n: n / 8) | st.floats(0, 1, exclude_max=True)


@settings(deadline=None)
@given(weights=weights, draws=st.lists(draws, min_size=1, max_size=5))
@example(weights=[0.25, 0.0, 0.25, 0.5], draws=[0.0, 0.25, 0.5, 0.75])
@example(weights=[0.0, 1.0, 0.0], draws=[0.0, 1 - 2**-53])
def test_choose_is_random_choices_on_the_same_draws(
    weights: list[float], draws: list[float]
) -> None:
    expected = []
    for draw in draws:
        rng = Random()
        with patch.object(rng, "random", lambda: draw):  # noqa: B023
            expected += rng.choices(range(len(weights)), weights)
    columns = np.array([weights] * len(draws)).T
    assert choose(columns, np.array(draws)).tolist() == expected


@backends
def test_a_position_whose_loss_is_no_number_is_refused(backend: str) -> None:
    config, tokenizer = CONFIGS["microgpt"], TOKENIZERS["microgpt"]
    params = init_params(config, tokenizer.vocab_size, Random(config.seed))
    params["wpe"][1][0] = math.nan
    model = load_backend(backend, config, fresh_state(params))
    with pytest.raises(FloatingPointError, match="position"):
        model.position_losses([[3, 1, 2, 0, 3]])
