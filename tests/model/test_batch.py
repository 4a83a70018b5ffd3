"""A batch is the mean of its documents, and sampling side by side is sampling one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import scalar.sample
import vectorized.batch
import vectorized.sample
from microgpt.backend import BACKENDS, Backend, Docs, fresh_state, load_backend
from microgpt.config import Config
from microgpt.data import load_documents
from microgpt.init import init_params
from microgpt.layout import Tree, grow, pick
from microgpt.runs import memory
from microgpt.settings import load_config
from microgpt.tokenizer import Tokenizer, build_tokenizer
from scalar.value import Value
from vectorized.batch import MicroBatch, empty_batch, fill, fill_packed, micro_batches, pad, rounded
from vectorized.model import Array, Batch, causal_mask, loss_backward, loss_forward
from vectorized.sample import choose

# both revisions of the model, small, with weights so large that every error shows
HISTORICAL = ("microgpt", "microgpt-243")
CONFIGS = {
    name: replace(
        load_config(name), n_embd=4, n_head=2, block_size=6, init_std=0.5, init_std_residual=0.5
    )
    for name in HISTORICAL
}
TOKENIZERS = {name: build_tokenizer("abc", config) for name, config in CONFIGS.items()}

backends = pytest.mark.parametrize("backend", BACKENDS)
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
    """The mean loss and gradients of the documents, each in a batch of its own."""
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
@example(texts=["a", "abcabcab"])  # each document counts the same, whatever its length
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
    together = [list(losses) for losses in model.position_losses(docs)]
    for losses, doc in zip(together, docs, strict=True):
        (alone,) = model.position_losses([doc])
        padding = [0.0] * (len(together[0]) - len(alone))
        assert losses == pytest.approx([*alone, *padding], rel=1e-14)
        assert len(alone) == len(doc) - 1


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
    row=st.sampled_from([16, 2, 1]),
)
@example(batches=[["ab"] * 2, ["a"] * 3, ["ab"] * 2], columns=12, row=1)
@example(batches=[["ab", "a"], ["abca"]], columns=12, row=2)
def test_batches_that_are_computed_in_micro_batches_are_the_batches(
    preset: str, batches: list[list[str]], columns: int, row: int
) -> None:
    whole, cut = (load("vectorized", CONFIGS[preset], TOKENIZERS[preset]) for _ in range(2))
    docs = [encoded(texts, preset) for texts in batches]
    with patch.multiple(vectorized.batch, COLUMNS=columns, ROW=row, PRICE=0):
        found = [measured(cut, batch) for batch in docs]
    for batch, measures in zip(docs, found):
        assert_same(measures, measured(whole, batch))


@models
def test_a_large_batch_is_the_mean_of_its_documents_too(preset: str) -> None:
    model = load("vectorized", CONFIGS[preset], TOKENIZERS[preset])
    rng = Random(1)
    docs = encoded(["".join(rng.choices("abc", k=rng.randint(1, 8))) for _ in range(300)], preset)
    with patch.object(vectorized.batch, "COLUMNS", 500):
        assert len(micro_batches(docs, CONFIGS[preset])) > 1
        found = measured(model, docs)
    assert_same(found, mean_alone(model, docs))


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=70)


def documents(lengths: Sequence[int]) -> list[list[int]]:
    """Documents of these numbers of positions, each of one token that no other has."""
    return [[i] * (n + 1) for i, n in enumerate(lengths)]


def positions(docs: Docs) -> list[int]:
    return [len(doc) - 1 for doc in docs]


def rows_of(part: MicroBatch) -> list[list[tuple[int, int]]]:
    """Of every row, where each of its documents begins and ends."""
    B, T = part.shape
    rows: list[list[tuple[int, int]]] = [[] for _ in range(B)]
    for doc, start in zip(part.docs, part.starts or range(0, B * T, T), strict=True):
        rows[start // T].append((start % T, start % T + len(doc) - 1))
    return rows


contexts = st.sampled_from([30, 33, 100])
limits = st.integers(1, 200)


@given(lengths=lengths, block_size=contexts, columns=limits, price=st.sampled_from([0, 2**12]))
def test_every_document_has_a_place_of_its_own(
    lengths: list[int], block_size: int, columns: int, price: int
) -> None:
    docs, config = documents(lengths), replace(CONFIGS["microgpt"], block_size=block_size)
    with patch.multiple(vectorized.batch, COLUMNS=columns, PRICE=price):
        parts = micro_batches(docs, config)
    assert sorted(list(doc) for part in parts for doc in part.docs) == docs
    for part in parts:
        B, T = part.shape
        assert B == 1 or columns >= B * T
        for row in rows_of(part):
            ends = [0, *(end for _, end in row)]
            assert ends[:-1] == [start for start, _ in row]
            assert ends[-1] <= T <= block_size


@given(lengths=lengths, block_size=contexts)
@example(lengths=[9, 7, 5, 3], block_size=30)
def test_no_document_of_a_later_row_fits_into_an_earlier_one(
    lengths: list[int], block_size: int
) -> None:
    config = replace(CONFIGS["microgpt"], block_size=block_size)
    for part in micro_batches(documents(lengths), config):
        T, rows = part.shape[1], rows_of(part)
        room = [T - row[-1][1] for row in rows if row]
        first = [min((end - start for start, end in row), default=T) for row in rows]
        assert all(left < n for i, left in enumerate(room) for n in first[i + 1 :])


def test_rows_of_an_odd_length_do_not_exceed_the_positions_of_a_micro_batch() -> None:
    config = replace(CONFIGS["microgpt"], block_size=13)
    assert [part.shape for part in micro_batches(documents([13] * 45), config)] == [
        (39, 13),
        (6, 13),
    ]


def test_much_shorter_documents_have_shorter_rows() -> None:
    config = replace(CONFIGS["microgpt"], block_size=512)
    parts = micro_batches(documents([500, 400, 100, 90, *[10] * 100]), config)
    assert [part.shape[1] for part in parts] == [512, 400, 112, 16, 16, 16]


@pytest.mark.parametrize(("size", "share"), [(1, 0.1), (3, 0.5), (16, 0.15), (64, 0.1), (256, 0.1)])
def test_few_shapes_occur_and_padding_is_bounded(size: int, share: float) -> None:
    names, config = load_documents("names"), load_config()
    rng, shapes, padded, real = Random(1), set(), 0, 0
    for _ in range(300):
        docs = [[0] * (len(name) + 2) for name in rng.sample(names, size)]
        for part in micro_batches(docs, config):
            shapes.add(part.shape)
            padded += part.shape[0] * part.shape[1]
            real += sum(positions(part.docs))
    assert len(shapes) <= 20
    assert padded <= (1 + share) * real


@given(T=st.integers(1, 5000), beyond=st.integers(0, 300), step=st.sampled_from([1, 2, 16]))
def test_a_length_is_rounded_up_by_little_and_never_beyond_the_context(
    T: int, beyond: int, step: int
) -> None:
    config = replace(CONFIGS["microgpt"], block_size=T + beyond)
    assert T <= rounded(T, step, config) <= min(T + max(step - 1, T // 8), T + beyond)


@pytest.mark.parametrize("step", [1, 2, 16])
def test_few_lengths_occur(step: int) -> None:
    config = replace(CONFIGS["microgpt"], block_size=4096)
    assert len({rounded(T, step, config) for T in range(1, 33)}) <= 32 // step
    for T in (32, 64, 1024, 2048):
        assert len({rounded(n, step, config) for n in range(T + 1, 2 * T + 1)}) <= 16


def test_a_batch_is_what_its_documents_say() -> None:
    tokens, targets, weights, positions, mask = pad([[3, 1, 2, 3], [3, 2]], np.dtype("f4"), of=4)
    assert tokens.tolist() == [[3, 1, 2], [3, 2, 0]]  # the last token has weight 0
    assert targets.tolist() == [[1, 2, 3], [2, 0, 0]]
    assert weights.dtype == "float32"
    np.testing.assert_allclose(weights, [[1 / 12] * 3, [1 / 4, 0, 0]])
    assert positions.tolist() == [[0, 1, 2]] * 2
    assert np.isfinite(mask).tolist() == [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]] * 2


def test_packed_documents_are_a_row_and_do_not_see_each_other() -> None:
    batch = empty_batch(2, 4, np.dtype("float32"), packed=True)
    for docs in ([[7] * 5, [7] * 5], [[3, 1, 2, 3], [3, 4], [3, 5, 3]]):  # all of the first goes
        fill_packed(batch, MicroBatch(docs, [0, 3, 4][: len(docs)], (2, 4)), 4)
    assert batch.tokens.tolist() == [[3, 1, 2, 3], [3, 5, 0, 0]]
    assert batch.targets.tolist() == [[1, 2, 3, 4], [5, 3, 0, 0]]
    np.testing.assert_allclose(batch.weights, [[1 / 12] * 3 + [1 / 4], [1 / 8, 1 / 8, 0, 0]])
    assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 1, 0, 0]]
    assert np.isfinite(batch.mask[:, 0]).tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
    ]


@given(before=lengths, lengths=lengths, longer=st.integers(0, 3))
@example(before=[9], lengths=[4], longer=0)
def test_nothing_is_left_of_the_batch_before(
    before: list[int], lengths: list[int], longer: int
) -> None:
    before = (before * len(lengths))[: len(lengths)]
    B, T = len(lengths), max(before + lengths) + longer
    used, fresh = (empty_batch(B, T, np.dtype("float64")) for _ in range(2))
    fill(used, [[7] * (n + 1) for n in before], 1)
    for batch in (used, fresh):
        fill(batch, documents(lengths), 5)
    for name in Batch._fields:
        np.testing.assert_array_equal(getattr(used, name), getattr(fresh, name))
    assert weight_of(fresh) == pytest.approx(len(lengths) / 5)


def weight_of(batch: Batch) -> float:
    return float(batch.weights.sum())


def padded_further(docs: Docs, T: int, rng: Random, V: int) -> Batch:
    """A batch with more padding than it needs, and random tokens in the padding."""
    B = len(docs)
    tokens = np.array([[rng.randrange(V) for _ in range(T)] for _ in docs])
    targets = np.array([[rng.randrange(V) for _ in range(T)] for _ in docs])
    weights = np.zeros((B, T))
    for b, doc in enumerate(docs):
        n = len(doc) - 1
        tokens[b, :n], targets[b, :n], weights[b, :n] = doc[:-1], doc[1:], 1 / (B * n)
    return Batch(
        tokens, targets, weights, np.tile(np.arange(T), (B, 1)), causal_mask(T, weights.dtype)
    )


def by_the_text(batch: Batch, backend: Backend, config: Config) -> tuple[float, dict[str, Array]]:
    """The loss of a batch and its gradients."""
    named = backend.state().params
    params = grow({name: np.array(tensor) for name, tensor in named.items()}, config.n_layer)
    tap, dtap, dparams = (Tree(config.n_layer) for _ in range(3))
    loss = float(loss_forward(batch, params, config, tap))
    loss_backward(batch, params, dparams, config, tap, dtap)
    return loss, {name: pick(dparams, name) for name in named}


@models
@given(texts=texts, seed=st.integers(0, 99))
@settings(deadline=None)
def test_more_padding_changes_nothing(preset: str, texts: list[str], seed: int) -> None:
    config, tokenizer, docs = CONFIGS[preset], TOKENIZERS[preset], encoded(texts, preset)
    model = load("vectorized", config, tokenizer)
    batch = padded_further(docs, config.block_size, Random(seed), tokenizer.vocab_size)
    assert_same(by_the_text(batch, model, config), measured(model, docs))


@models
@few
@given(texts=texts)
def test_a_recording_for_longer_documents_serves_shorter_ones(
    preset: str, texts: list[str]
) -> None:
    config, docs = CONFIGS[preset], encoded(texts, preset)
    expected = measured(load("vectorized", config, TOKENIZERS[preset]), docs)
    with patch.object(vectorized.batch, "rounded", lambda *_: config.block_size):
        assert_same(measured(load("vectorized", config, TOKENIZERS[preset]), docs), expected)


def with_an_impossible_token(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """Parameters by which token 0 cannot follow at position 2, where its logit is -2000."""
    params = init_params(config, tokenizer.vocab_size, Random(config.seed))
    for name in ("wte", "wpe", "layer0.attn_wo", "layer0.mlp_fc2"):  # channel 0 has no other use
        rows = params[name]
        params[name] = (
            [[0.0] * len(rows[0]), *rows[1:]] if "." in name else [[0.0, *row[1:]] for row in rows]
        )
    params["wpe"][2] = [1e6, 0.0, 0.0, 0.0]
    params["lm_head"][0] = [-1000.0, 0.0, 0.0, 0.0]
    return params


def test_padding_may_be_impossible() -> None:
    config, tokenizer = CONFIGS["microgpt"], TOKENIZERS["microgpt"]
    params = with_an_impossible_token(config, tokenizer)
    model = load_backend("vectorized", config, fresh_state(params))
    docs = [[3, 1, 2, 1, 2, 3], [3, 0, 3]]  # padded with token 0
    assert_same(measured(model, docs), mean_alone(model, docs))


def exact_losses(logits: Sequence[Sequence[float]], doc: Sequence[int]) -> list[float]:
    """-log(softmax(logits)[target]) without the softmax, which may be too small for a number."""
    return [
        math.log(math.fsum(math.exp(x - max(row)) for x in row)) + max(row) - row[target]
        for row, target in zip(logits, doc[1:])
    ]


singly_and_doubly = pytest.mark.parametrize(
    ("dtype", "digits"), [("float64", 1e-12), ("float32", 1e-5)]
)
either_way = pytest.mark.parametrize("watch", [False, True])


@singly_and_doubly
@either_way
def test_the_loss_of_an_impossible_token_is_finite_and_exact(
    dtype: str, digits: float, watch: bool
) -> None:
    config, doc = CONFIGS["microgpt"], [3, 1, 2, 0, 3]
    state = fresh_state(with_an_impossible_token(config, TOKENIZERS["microgpt"]))
    expected = exact_losses(load_backend("scalar", config, state).read(doc[:-1]), doc)
    assert max(expected) > 1000
    model = load_backend("vectorized", replace(config, dtype=dtype), state, watch)
    (losses,) = model.position_losses([doc])
    assert list(losses) == pytest.approx(expected, rel=digits, abs=digits)
    assert model.forward([doc]) == pytest.approx(sum(expected) / 4, rel=digits)


def test_scalar_refuses_a_token_of_probability_0() -> None:
    config = CONFIGS["microgpt"]
    state = fresh_state(with_an_impossible_token(config, TOKENIZERS["microgpt"]))
    model = load_backend("scalar", config, state)
    for run in (model.forward, model.position_losses):
        with pytest.raises(FloatingPointError):
            run([[3, 1, 2, 0, 3]])


@either_way
@pytest.mark.parametrize("factor", [100.0, 1000.0])
@pytest.mark.parametrize("seed", range(4))
def test_single_precision_has_a_loss_and_a_gradient_wherever_double_has(
    seed: int, factor: float, watch: bool
) -> None:
    config, tokenizer = replace(CONFIGS["microgpt"], seed=seed), TOKENIZERS["microgpt"]
    params, docs = init_params(config, tokenizer.vocab_size, Random(seed)), [[3, 1, 2, 0, 3]]
    params["lm_head"] = [[factor * x for x in row] for row in params["lm_head"]]
    double, single = (
        load_backend("vectorized", replace(config, dtype=dtype), fresh_state(params), watch)
        for dtype in ("float64", "float32")
    )
    expected, found = measured(double, docs), measured(single, docs)
    assert np.ptp(np.asarray(double.read(docs[0]))) > 104  # exp(-104) is 0 in single precision
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    for name, grad in expected[1].items():
        np.testing.assert_allclose(found[1][name], grad, atol=1e-3 * np.abs(grad).max())


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
    top_k: int = 0,
) -> None:
    """Both backends draw the same documents, and leave the random stream in the same state."""
    ours, theirs = Random(seed), Random(seed)
    expected, found = (
        load(backend, config, tokenizer).sample(tokenizer, rng, num, temperature, prompt, top_k)
        for backend, rng in (("scalar", ours), ("vectorized", theirs))
    )
    assert found == expected
    assert len(found) == num
    assert ours.getstate() == theirs.getstate()


@pytest.mark.parametrize("top_k", [1, 10, 30])
def test_of_equal_logits_the_lower_tokens_are_kept(top_k: int) -> None:
    logits = np.random.default_rng(1).integers(0, 3, (50, 40)).astype(float)
    found = vectorized.sample.probabilities(logits, 1.0, top_k)
    for row, probs in zip(logits, found):
        expected = scalar.sample.probabilities([Value(x) for x in row.tolist()], 1.0, top_k)
        np.testing.assert_allclose(probs, expected, rtol=1e-12)


@settings(max_examples=400, deadline=None)
@given(
    model=models_to_sample(),
    seed=st.integers(0, 10**6),
    num=st.sampled_from([7, 12, 3, 1, 0]),
    temperature=st.floats(0.2, 2) | st.just(0.0),
    top_k=st.sampled_from([0, 0, 1, 2, 3, 9]),
    rows=st.sampled_from([1024, 5, 2, 1]),
    data=st.data(),
)
def test_samples_are_the_same_draw_for_draw(
    model: tuple[Config, Tokenizer],
    seed: int,
    num: int,
    temperature: float,
    top_k: int,
    rows: int,
    data: st.DataObject,
) -> None:
    config, tokenizer = model
    chars = st.sampled_from(sorted(tokenizer.ids.values()))
    prompt = data.draw(st.lists(chars, max_size=config.block_size - 1))
    cached = rows * 2 * config.n_layer * config.n_embd * config.block_size
    with patch.object(memory, "CACHED", cached):
        assert_same_samples(config, tokenizer, seed, num, temperature, prompt, top_k)


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


# eighths, so that many draws fall exactly between two choices
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
    cumulative = np.array([weights] * len(draws)).cumsum(axis=1)
    assert choose(cumulative, np.array(draws)).tolist() == expected


@backends
@pytest.mark.parametrize("name", ["wpe", "lm_head", "layer0.mlp_fc2"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(backend: str, name: str, number: float) -> None:
    config, tokenizer = CONFIGS["microgpt"], TOKENIZERS["microgpt"]
    params = init_params(config, tokenizer.vocab_size, Random(config.seed))
    params[name][1] = [number] * len(params[name][1])
    for watch in {False, backend == "vectorized"}:
        model = load_backend(backend, config, fresh_state(params), watch)
        with pytest.raises(FloatingPointError, match="position"):
            model.position_losses([[3, 1, 2, 0, 3]])
        with pytest.raises(FloatingPointError):
            model.forward([[3, 1, 2, 0, 3]])
