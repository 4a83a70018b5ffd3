"""A recording computes what the text computes, and a text that cannot be replayed is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import vectorized.record
import vectorized.replay
from microgpt.backend import Backend, Docs, fresh_state, load_backend
from microgpt.config import Config
from microgpt.errors import MicrogptError
from microgpt.init import init_params
from microgpt.settings import load_config
from microgpt.taps import ACTIVATIONS
from vectorized.adam import adam
from vectorized.batch import MicroBatch
from vectorized.model import Array
from vectorized.record import Number, Recorder, RecordingError
from vectorized.replay import Replay

V = 5  # tokens
LIMITS = ["EQUAL_ROWS", "LOOK_UP", "ONE_HOT", "SPREAD"]  # up to which arrays are small
DOCS = [[4, 0, 1, 4], [4, 2, 3], [4, 1, 1, 0, 2, 4]]


def small(**fields: Any) -> Config:
    fields = {"n_embd": 4, "n_head": 2, "block_size": 6, **fields}
    return replace(load_config(), init_std=0.5, init_std_residual=0.5, **fields)


def load(config: Config, watch: bool = False, size: int = V) -> Any:
    params = init_params(config, size, Random(config.seed))
    return load_backend("vectorized", config, fresh_state(params), watch)


def measured(backend: Backend, docs: Docs) -> dict[str, Array]:
    """The loss of a batch, of every position, and the gradients."""
    loss = backend.forward(docs)
    backend.backward()
    grads = {f"d{name}": np.array(grad) for name, grad in backend.grads().items()}
    losses = np.concatenate(list(map(np.asarray, backend.position_losses(docs))))
    return {"loss": np.array(loss), "losses": losses, **grads}


def assert_close(found: dict[str, Array], expected: dict[str, Array], digits: float) -> None:
    """Compare with the largest number: some gradients are small differences of large terms."""
    most = digits * largest_of(expected)
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, 0, most, err_msg=name)


def apart(found: dict[str, Array], expected: dict[str, Array]) -> float:
    """The largest difference, as a share of the largest number."""
    differences = {name: found[name] - tensor for name, tensor in expected.items()}
    return largest_of(differences) / largest_of(expected)


def largest_of(tensors: dict[str, Array]) -> float:
    return max(float(np.abs(tensor).max()) for tensor in tensors.values())


def assert_equal(found: dict[str, Array], expected: dict[str, Array]) -> None:
    for name, tensor in expected.items():
        assert np.isfinite(tensor).all()
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return small(
        n_layer=draw(st.integers(1, 3)),
        n_embd=heads * head_dim,
        n_head=heads,
        block_size=draw(st.integers(1, 9)),
        tie_lm_head=draw(st.booleans()),
        activation=draw(st.sampled_from([*ACTIVATIONS])),
        norm_embedding=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float64", "float32"])),
        seed=draw(st.integers(0, 9)),
    )


def drawn_docs(config: Config, seed: int, rows: int, longest: int, size: int = V) -> Docs:
    """Documents of which one has the greatest length."""
    rng, most = Random(seed), min(longest, config.block_size)
    lengths = [most, *(rng.randint(1, most) for _ in range(rows - 1))]
    return [[rng.randrange(size) for _ in range(n + 1)] for n in lengths]


@given(
    config=configs(),
    size=st.integers(2, 7),
    rows=st.integers(1, 5),
    longest=st.integers(1, 9),
    limits=st.sets(st.sampled_from(LIMITS)),
    seed=st.integers(0, 99),
)
@example(config=small(), size=5, rows=3, longest=5, limits=set(), seed=1)
@example(
    config=small(n_layer=2),
    size=5,
    rows=3,
    longest=5,
    limits={*LIMITS},
    seed=1,
)
@settings(max_examples=150, deadline=None)
def test_a_recording_computes_what_the_text_does(
    config: Config, size: int, rows: int, longest: int, limits: set[str], seed: int
) -> None:
    docs = drawn_docs(config, seed, rows, longest, size)
    text = load(config, watch=True, size=size)
    expected = measured(text, docs)
    taps = text.taps()
    assume(all(min_size(taps[f"layer{i}.mlp_pre"]) > 1e-5 for i in range(config.n_layer)))
    other = replace(config, dtype="float32" if config.dtype == "float64" else "float64")
    in_other = measured(load(other, watch=True, size=size), docs)
    assume(apart(in_other, expected) < 5e-5)  # else rounding alone makes a difference
    now = {name: 0 if name in limits else getattr(vectorized.record, name) for name in LIMITS}
    with patch.multiple(vectorized.record, **now):
        found = measured(load(config, size=size), docs)
    assert_close(found, expected, 1e-12 if config.dtype == "float64" else 2e-4)


def min_size(tap: Array) -> float:
    """The least distance of numbers outside padding from 0, where a ReLU has its kink."""
    return float(np.abs(tap[tap != 0]).min(initial=1.0))


@pytest.mark.parametrize("preset", ["microgpt", "microgpt-243"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_text_of_a_whole_model_is_recorded(preset: str, dtype: str) -> None:
    config = replace(load_config(preset), dtype=dtype, batch_size=20, n_layer=2)
    docs = [[i % 27] * (2 + i % config.block_size) for i in range(20)]
    expected = measured(load(config, True, 27), docs)
    assert_close(
        measured(load(config, False, 27), docs), expected, 1e-12 if dtype == "float64" else 1e-3
    )


@given(
    config=configs(),
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=2, max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_a_recording_leaves_nothing_to_the_next_run(
    config: Config, shapes: list[tuple[int, int]]
) -> None:
    batches = [drawn_docs(config, i, *shape) for i, shape in enumerate(shapes)]
    backend = load(config)
    first = [measured(backend, docs) for docs in batches]
    again = [measured(backend, docs) for docs in batches]
    for docs, one, other in zip(batches, first, again):
        assert_equal(other, one)
        assert_equal(measured(load(config), docs), one)


def spoil(backend: Any, batches: list[Docs]) -> None:
    """Leave nothing but NaN in all memory that these batches use."""
    flat = backend.state().params
    kept = {name: np.array(tensor) for name, tensor in flat.items()}
    for tensor in flat.values():
        tensor[:] = np.nan
    for docs in batches:
        for run in (backend.forward, backend.position_losses):
            with pytest.raises(FloatingPointError):
                run(docs)
        backend.backward()
    for name, tensor in flat.items():
        tensor[:] = kept[name]


@given(
    config=configs(),
    rows=st.integers(1, 4),
    longest=st.integers(1, 9),
    others=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_what_other_shapes_leave_in_memory_changes_nothing(
    config: Config, rows: int, longest: int, others: list[tuple[int, int]]
) -> None:
    docs, backend = drawn_docs(config, 1, rows, longest), load(config)
    batches = [drawn_docs(config, i, *shape) for i, shape in enumerate(others)]
    undisturbed = measured(backend, docs)
    spoil(backend, [*batches, docs])
    assert_equal(measured(backend, docs), undisturbed)


def test_an_update_does_not_depend_on_what_is_left_in_memory() -> None:
    spoiled, undisturbed = load(small()), load(small())
    for backend in (spoiled, undisturbed):
        backend.forward(DOCS)
        backend.backward()
        backend.update(0.1)
    spoil(spoiled, [DOCS, DOCS[:1]])
    for backend in (spoiled, undisturbed):
        measured(backend, DOCS)
        backend.update(0.2)
    assert_equal(spoiled.state().params, undisturbed.state().params)


# Texts that are refused, each of one line.


def decides(x: Any) -> Any:
    return x if x[0, 0, 0] > 0 else -x


def takes_a_number(x: Any) -> Any:
    return x * float(x)


def takes_a_whole_number(x: Any) -> Any:
    return x * int(x)


def counts_with_it(x: Any) -> Any:
    return list(range(5))[x]


def takes_a_root(x: Any) -> Any:
    return x * math.sqrt(x)


def makes_an_array(x: Any) -> Any:
    return np.asarray(x) + 1.0


def makes_a_list(x: Any) -> Any:
    return x.tolist()


def sorts(x: Any) -> Any:
    return np.sort(x)


def measures(x: Any) -> Any:
    return np.linalg.norm(x)


def iterates(x: Any) -> Any:
    return [row * 2.0 for row in x]


def unpacks(x: Any) -> Any:
    return (*x,)


def adds_up(x: Any) -> Any:
    return sum(x)


def looks_for(x: Any) -> Any:
    return 1.0 in x


def compares(x: Any) -> Any:
    return x if (x == x).all() else -x


def copies(x: Any) -> Any:
    return x.copy()


def accumulates(x: Any) -> Any:
    return np.add.accumulate(x)


def chooses(x: Any) -> Any:
    return np.where(x > 0.0, x, 0.0)


def sums_another_axis(x: Any) -> Any:
    return x.sum(axis=1)


def takes_the_mean_of_all(x: Any) -> Any:
    return x.mean()


def returns_two(x: Any) -> Any:
    return np.modf(x)[0]


def multiplies_three(x: Any) -> Any:
    return np.einsum("bti,bti,bti->bt", x, x, x)


def looks_up_in_all_rows(x: Any) -> Any:
    return x[:, :, x]


def takes_known_rows(x: Any) -> Any:
    return x.T[:, [0, 0]]


def takes_rows_by_a_condition(x: Any) -> Any:
    return x[np.array([True, False])]


def writes_known_rows(x: Any) -> Any:
    x[[0, 0]] = 1.0


def writes_into_an_array(x: Any) -> Any:
    return np.add(x, 1.0, out=np.ones((2, 3, 4)))


def multiplies_without_a_result(x: Any) -> Any:
    return np.einsum("bti,bti", x, x)


def gives_one_letter_two_lengths(x: Any) -> Any:
    return np.einsum("bti,jti->bj", x, x[:, :1])


def looks_up_truths(x: Any) -> Any:
    return x[np.array([True, False]), 0, np.array([0, 1])]


def looks_up_more_than_it_says(x: Any) -> Any:
    return x[np.arange(2)[:, None], 0, np.array([0, 1, 2])]


def looks_up_in_a_part(x: Any) -> Any:
    return x.recorder.hold(np.ones((2, 3, 8))[..., :4])[0, 0, np.array([0, 1])]


def looks_up_from_the_end(x: Any) -> Any:
    return x[np.array([-1])]


def looks_up_a_place_from_the_end(x: Any) -> Any:
    return x[np.array([-1]), np.array([0]), np.array([0])]


REFUSED = [
    looks_up_from_the_end, looks_up_a_place_from_the_end,
    writes_into_an_array, multiplies_without_a_result, gives_one_letter_two_lengths,
    looks_up_truths, looks_up_more_than_it_says, looks_up_in_a_part,
    decides, takes_a_number, takes_a_whole_number, counts_with_it, takes_a_root, makes_an_array,
    makes_a_list, sorts, measures, iterates, unpacks, adds_up, looks_for, compares, copies,
    accumulates, chooses, sums_another_axis, takes_the_mean_of_all, returns_two,
    multiplies_three, looks_up_in_all_rows, takes_known_rows, takes_rows_by_a_condition,
    writes_known_rows,
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_repeated_is_refused_where_it_stands(text: Callable[[Any], Any]) -> None:
    x = Recorder("float64").hold(np.ones((2, 3, 4)))
    with pytest.raises(RecordingError) as refused:
        text(x)
    line = text.__code__.co_firstlineno + 1
    assert str(refused.value).startswith(f"{Path(__file__)}:{line}: ")
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value, MicrogptError)


# Short texts: a recording computes the same, or the text is refused.


def changes_after_relu(x: Any, y: Any) -> Any:
    z = x * 1.0
    relu = np.maximum(z, 0.0)
    z += 1.0
    return (z > 0.0) * 1.0 + relu


def takes_a_part_after_relu(x: Any, y: Any) -> Any:
    z = x * 1.0
    return np.maximum(z, 0.0)[0] + (z[0] > 0.0)


def reads_what_it_has_assigned(x: Any, y: Any) -> Any:
    z, both = x * 1.0, x + y
    z[:] = both
    return both * 2.0 + z


def averages_what_is_given(x: Any, y: Any) -> Any:
    return x.mean(axis=-1, keepdims=True) + x.sum(axis=-1, keepdims=True)


def sums_over_one_alone(x: Any, y: Any) -> Any:
    return np.einsum("btc,bud->cd", x, y)


def reads_zeros(x: Any, y: Any) -> Any:
    zeros = np.zeros_like(x)
    zeros[0] = x[0]
    return zeros + y


def adds_in_place(x: Any, y: Any) -> Any:
    z = x * y
    part = z[0]
    z *= y
    z -= x
    return part + z


def reshapes(x: Any, y: Any) -> Any:
    return (x * y).reshape(2, 12) + 0.0


def divides(x: Any, y: Any) -> Any:
    return x / np.array([1, 2, 3, 4]) / (y * y + 1.0) / 3.0


def takes_powers(x: Any, y: Any) -> Any:
    return (x * x) ** -0.5 + y**2 + (y * y) ** 0.5 + (x * x) ** 1.5 + x**3


def multiplies(x: Any, y: Any) -> Any:
    return np.einsum("btc,buc->but", x, y) + np.einsum("btc,buc->btu", x, y)


def adds_products(x: Any, y: Any) -> Any:
    w = np.einsum("btc,btd->cd", x, y)
    v = np.einsum("btc,btd->cd", y, y)
    return x @ w + x @ v + y @ w + (x @ w) * y


def averages_documents(x: Any, y: Any) -> Any:
    return x[..., :1].mean(axis=0) + y[0, :, :1]


def changes_a_view_of_a_mean(x: Any, y: Any) -> Any:
    m = x.mean(axis=-1, keepdims=True)
    part = m[..., :1]
    part += y[..., :1]
    return x - m


def reverses(x: Any, y: Any) -> Any:
    return (x * y)[:, ::-1] + y


def multiplies_what_it_sums(x: Any, y: Any) -> Any:
    w = np.einsum("btc,btd->cd", y, y)
    return x.sum(axis=-1, keepdims=True) + (x @ w) + x.sum(axis=-1, keepdims=True)


def adds_a_number_for_each_channel(x: Any, y: Any) -> Any:
    return x.sum(axis=-1, keepdims=True) + np.array([1.0, 2.0, 3.0, 4.0])


def moves_within_itself(x: Any, y: Any) -> Any:
    z = x * 1.0
    z[1:] = z[:-1]
    return z + y


def squares_in_place(x: Any, y: Any) -> Any:
    z = x * 1.0
    z **= 2
    return z + y


def assigns_to_fewer_axes(x: Any, y: Any) -> Any:
    z = x * 1.0
    z[0] = y[:1]
    z[...] = z[None]
    return z


def multiplies_in_place(x: Any, y: Any) -> Any:
    z = x * 1.0
    z @= np.einsum("btc,btd->cd", y, y)
    return z


def adds_a_table_to_itself(x: Any, y: Any) -> Any:
    z = np.zeros_like(x[0])
    np.add.at(z, np.array([[0, 1, 2]]), z[None])
    return z


def adds_one_row_everywhere(x: Any, y: Any) -> Any:
    z = np.zeros_like(x[0])
    np.add.at(z, np.array([[0, 1, 1]]), y[:1, :1])
    return z


SHORT = [
    adds_a_table_to_itself, adds_one_row_everywhere,
    assigns_to_fewer_axes, multiplies_in_place,
    changes_after_relu, takes_a_part_after_relu, reads_what_it_has_assigned, averages_what_is_given,
    sums_over_one_alone, reads_zeros, adds_in_place, reshapes, divides, takes_powers, multiplies,
    adds_products, averages_documents, changes_a_view_of_a_mean, reverses, multiplies_what_it_sums,
    moves_within_itself, squares_in_place, adds_a_number_for_each_channel,
]  # fmt: skip


def decays(p: Any) -> None:
    p[:] = p - 0.01 * p


def adds_itself(p: Any) -> None:
    p[:] = 3 * p + p


def multiplies_with_itself(p: Any) -> None:
    p[:] = (p - 1) * p


def adds_its_neighbour(p: Any) -> None:
    p[1:] = 2 * p[1:] + p[:-1]


def adds_two_of_its_products(p: Any) -> None:
    p[:] = p * 2 + p * 3


def moves_its_neighbour(p: Any) -> None:
    p[1:] = p[:-1]


def keeps_what_it_was(p: Any) -> None:
    q = p * 2
    p -= 1
    p[:] = q


@pytest.mark.parametrize(
    "text",
    [
        decays,
        adds_itself,
        multiplies_with_itself,
        adds_its_neighbour,
        adds_two_of_its_products,
        moves_its_neighbour,
        keeps_what_it_was,
    ],
)
def test_an_array_that_is_assigned_to_is_read_before(text: Callable[[Any], None]) -> None:
    expected, found = np.arange(1.0, 7.0), np.arange(1.0, 7.0)
    text(expected)
    recorder = Recorder("float64")
    text(recorder.hold(found))
    recording = recorder.recording(lambda nbytes: np.empty(nbytes, np.uint8))
    recording.run(0)
    np.testing.assert_array_equal(found, expected)


def replayed(text: Callable[..., Any], *arrays: Array) -> list[Array]:
    """The results of a text, from a recording of the text that is run twice."""
    return results_and_calls(text, *arrays)[0]


def results_and_calls(text: Callable[..., Any], *arrays: Array) -> tuple[list[Array], list[str]]:
    """The same, and the calls of the recording."""
    recorder = Recorder("float64")
    results = text(*map(recorder.hold, arrays))
    results = results if isinstance(results, list) else [results]
    found = [np.full(result.shape, np.nan) for result in results]
    for result, array in zip(results, found):
        recorder.put(result, array)
    recording = recorder.recording(lambda n: np.full(n // 8 + 1, np.nan).view(np.uint8))
    for _ in range(2):
        recording.run(0)
    return found, [call for call, _ in recording.lines[0]]


@pytest.mark.parametrize("text", SHORT)
def test_a_text_is_recorded_as_it_computes_or_refused(text: Callable[[Any, Any], Any]) -> None:
    x, y = np.random.default_rng(1).normal(size=(2, 2, 3, 4))
    expected = text(x.copy(), y.copy())
    try:
        (found,) = replayed(text, x, y)
    except RecordingError:
        return
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_result_may_lie_in_two_places() -> None:
    x = np.arange(6.0)
    once, twice = replayed(lambda x: [z := x * 2.0, z], x)
    np.testing.assert_array_equal([once, twice], [x * 2.0, x * 2.0])


def test_a_result_may_lie_where_it_came_from() -> None:
    recorder = Recorder("float64")
    x, y = np.arange(6.0), np.zeros(6)
    held = recorder.hold(x)
    recorder.put(held * 2.0, x)
    recorder.put(held + 0.0, y)
    recorder.recording(lambda nbytes: np.empty(nbytes, np.uint8)).run(0)
    np.testing.assert_array_equal([x, y], [np.arange(6.0) * 2.0, np.arange(6.0) * 2.0])


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("rows", [5, 40, 600])  # a product, or not, or not in its gradient either
def test_the_same_rows_in_every_run_are_looked_up(rows: int, shape: tuple[int, ...]) -> None:
    index = np.random.default_rng(1).integers(0, rows, shape)

    def text(table: Any) -> list[Any]:
        found = (table * 1.0)[index]
        sums = np.zeros_like(table)
        np.add.at(sums, index, found)
        return [found, sums]

    table = np.random.default_rng(2).normal(size=(rows, 4))
    for found, expected in zip(replayed(text, table), text(table)):
        np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_one_index_is_looked_up_in_two_tables_and_two_in_one() -> None:
    def text(wte: Any, wpe: Any, index: Any) -> list[Any]:
        return [wte[index], wpe[index], wte[index[:1]], wte[index[1:]]]

    rng = np.random.default_rng(1)
    arrays = rng.normal(size=(5, 4)), rng.normal(size=(7, 4)), rng.integers(0, 5, (2, 3))
    for found, expected in zip(replayed(text, *arrays), text(*arrays)):
        np.testing.assert_array_equal(found, expected)


def test_positions_may_be_the_rows_of_a_matrix() -> None:
    dy, x = np.arange(24.0).reshape(2, 3, 4), np.arange(30.0).reshape(2, 3, 5)

    def text(dy: Any, x: Any) -> Any:
        return (2.0 * dy).reshape(-1, 4).T @ (x - 7.0).reshape(-1, 5)

    (found,) = replayed(text, dy, x)
    np.testing.assert_array_equal(found, text(dy, x))


@pytest.mark.parametrize("numbers", [0, 10**6])
def test_a_constant_may_be_as_large_as_what_it_is_added_to(numbers: int) -> None:
    x, mask = np.arange(48.0).reshape(2, 2, 4, 3), np.arange(12.0).reshape(4, 3)
    with patch.object(vectorized.record, "SPREAD", numbers):
        (found,) = replayed(lambda x: (x * 2.0 + mask) * (1.0 - mask), x)
    np.testing.assert_array_equal(found, (x * 2.0 + mask) * (1.0 - mask))


def shares_an_operand(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    return [x @ q.T, x @ k.T, x @ v.T]


def adds_products_of_parts(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    parts = x * 1.0, x * 2.0, x * 3.0
    products = [part @ w for part, w in zip(parts, (q, k, v))]
    return [products[0] + products[1] + products[2]]


def takes_gradients(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    grads = [np.einsum("bto,bti->oi", x * n, x) for n in (1.0, 2.0, 3.0)]
    return [grad * 2.0 for grad in grads]


def reads_one_before_the_next(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    first = x @ q.T
    return [first * 2.0, x @ k.T, first]


def multiplies_one_by_the_next(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    first = np.einsum("bto,bti->oi", x * 1.0, x)
    return [np.einsum("bto,bti->oi", x @ first, x), first]


def changes_what_is_shared(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    x = x * 1.0
    first = x @ q.T
    x += 1.0
    return [first, x @ k.T]


def reads_a_term_again(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    first, second = (x * 2.0) @ q, (x * 3.0) @ k
    return [first + second, first * 2.0]


def changes_a_factor_of_a_term(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    y, z = x * 2.0, x * 3.0
    first, second = y @ q, z @ k
    y += 1.0
    return [first + second, y]


def adds_them_the_other_way_round(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    first, second = (x * 2.0) @ q, (x * 3.0) @ k
    return [second + first]


def adds_over_a_factor(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    y = x * 2.0
    first, second = y @ q, (x * 3.0) @ k
    np.add(first, second, out=y)
    return [y]


def shares_parts_of_an_operand(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    return [x[:1] @ q.T, x[1:] @ k.T]


def takes_some_rows_of_a_weight(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    first, second = x @ q[1:3].T, x @ q[3:].T
    return [first * 2.0, second * 2.0]


def leaves_rows_out(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    return [x @ q.T, x @ k[2:].T]


def adds_and_returns_a_term(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    first, second = (x[:1, :1] * 2.0) @ q, (x[:1, :1] * 3.0) @ k
    return [first + second, first]


def adds_a_sum_to_a_term(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    first, second, third = (x * 1.0) @ q, (x * 2.0) @ k, (x * 3.0) @ v
    return [first + (second + third)]


def adds_gradients_of_one_position(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    y = x[:1, :1]
    grads = [np.einsum("bto,bti->oi", y * n, y * (n + 1.0)) for n in (1.0, 2.0)]
    return [grads[0] + grads[1]]


def adds_products_of_two_widths(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    one, two = (x[:1, :1, :n] * (n + 1.0) for n in (1, 2))
    wide = np.einsum("btd,bthc->dhc", one * 2.0, two.reshape(1, 1, 2, 1))
    return [wide + np.einsum("btdh,btc->dhc", two.reshape(1, 1, 1, 2) * 3.0, one)]


def takes_one_weight_as_it_is(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    return [x @ q.T, x @ k]


@pytest.mark.parametrize(
    ("text", "products"),
    [
        (shares_an_operand, 1),
        (shares_parts_of_an_operand, 2),
        (takes_some_rows_of_a_weight, 1),
        (leaves_rows_out, 2),
        (adds_and_returns_a_term, 2),
        (adds_a_sum_to_a_term, 2),
        (adds_gradients_of_one_position, 1),
        (adds_products_of_two_widths, 2),
        (takes_one_weight_as_it_is, 2),
        (adds_products_of_parts, 1),
        (takes_gradients, 1),
        (reads_one_before_the_next, 2),
        (multiplies_one_by_the_next, 3),
        (changes_what_is_shared, 2),
        (reads_a_term_again, 2),
        (changes_a_factor_of_a_term, 2),
        (adds_them_the_other_way_round, 2),
        (adds_over_a_factor, 2),
    ],
)
def test_products_are_merged_where_nothing_comes_between(
    text: Callable[..., list[Any]], products: int
) -> None:
    rng = np.random.default_rng(1)
    x, weights = rng.normal(size=(2, 3, 4)), rng.normal(size=(12, 4))
    arrays = x, weights[:4], weights[4:8], weights[8:]
    results, calls = results_and_calls(text, *arrays)
    for found, expected in zip(results, text(*arrays)):
        np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)
    assert calls.count("dot") == products


def adds_products_the_other_way_up(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    return [((x * 2.0) @ q).T + ((x * 3.0) @ k).T]


def multiplies_by_a_product(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    y = x + x
    return [(y @ np.einsum("bti,bto->io", y * 0.1, y)) * 2.0]


def takes_a_factor_from_the_other_term(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    a, b, n = x[:1] * 2.0, x[:1] * 3.0, x.shape[-1]
    w = np.einsum("bti,bto->io", x, x)
    return [a @ a.T.reshape(n, n) + b @ w, a @ w + b @ b.T.reshape(n, n)]


def adds_a_sum_turned_round(x: Any, q: Any, k: Any, v: Any) -> list[Any]:
    return [x + (x * 2.0).sum(axis=-1, keepdims=True)[..., 0].T[..., None]]


@pytest.mark.parametrize("n", [1, 4])  # rows are columns where all axes have one length
@pytest.mark.parametrize(
    "text",
    [
        adds_products_the_other_way_up,
        multiplies_by_a_product,
        adds_over_a_factor,
        takes_a_factor_from_the_other_term,
        adds_a_sum_turned_round,
    ],
)
def test_arrays_are_told_apart_by_more_than_their_shapes(
    text: Callable[..., list[Any]], n: int
) -> None:
    rng = np.random.default_rng(1)
    x, weights = rng.normal(size=(n, n, n)), rng.normal(size=(3 * n, n))
    arrays = x, weights[:n], weights[n : 2 * n], weights[2 * n :]
    for found, expected in zip(replayed(text, *arrays), text(*arrays)):
        np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)


def test_products_of_two_parts_of_the_list_are_two() -> None:
    recorder = Recorder("float64")
    weights, (q, k) = np.ones((4, 2)), np.zeros((2, 1, 1, 2))
    x = recorder.hold(np.ones((1, 1, 2)))
    recorder.put(x @ recorder.hold(weights[:2]).T, q)
    recorder.mark()
    recorder.put(x @ recorder.hold(weights[2:]).T, k)
    recording = recorder.recording(lambda nbytes: np.empty(nbytes, np.uint8))
    recording.run(0)
    assert (q.tolist(), k.tolist()) == ([[[2.0, 2.0]]], [[[0.0, 0.0]]])
    recording.run(1)
    assert k.tolist() == [[[2.0, 2.0]]]


def test_what_is_assigned_in_the_second_part_is_not_in_the_first() -> None:
    recorder, p = Recorder("float64"), np.ones(3)
    held = recorder.hold(p)
    doubled = held * 2.0
    recorder.mark()
    held[:] = doubled
    recording = recorder.recording(lambda nbytes: np.empty(nbytes, np.uint8))
    recording.run(0)
    recording.run(0)
    assert p.tolist() == [1.0, 1.0, 1.0]
    recording.run(1)
    assert p.tolist() == [2.0, 2.0, 2.0]


def scales_twice(x: Any, a: Any, b: Any) -> Any:
    return b * (x / a)


def changes_what_it_scales(x: Any, a: Any, b: Any) -> Any:
    scaled = x / a
    x += 1.0
    return b * scaled + x


def changes_what_it_has_scaled(x: Any, a: Any, b: Any) -> Any:
    scaled = x / a
    scaled += 1.0
    return b * scaled


@pytest.mark.parametrize("text", [scales_twice, changes_what_it_scales, changes_what_it_has_scaled])
def test_what_is_scaled_twice_may_change_in_between(text: Callable[..., Any]) -> None:
    a, b = Number(lambda: 4.0), Number(lambda: 3.0)
    (found,) = replayed(lambda x: text(x * 1.0, a, b), np.arange(6.0))
    np.testing.assert_allclose(found, text(np.arange(6.0), 4.0, 3.0), rtol=1e-15)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (lambda lr: -lr, "numpy.negative of a number of one run"),
        (lambda lr: lr if lr > 0.5 else 0.0, "numpy.greater of a number of one run"),
        (lambda lr: math.sqrt(lr), "a decision that depends on a number of one run"),
    ],
)
def test_what_a_list_cannot_do_with_a_number_is_refused(
    text: Callable[..., Any], what: str
) -> None:
    with pytest.raises(RecordingError, match=what):
        text(Number(lambda: 1.0))


def test_one_index_into_two_rows_is_two_elements() -> None:
    b, t = np.ogrid[:2, :3]
    index = np.array([[0, 1, 2], [3, 2, 1]])

    def text(x: Any, index: Any) -> Any:
        z = x * 1.0
        return z[b, t, index] - z[0 * b, t, index]

    x = np.arange(24.0).reshape(2, 3, 4)
    (found,) = replayed(text, x, index)
    np.testing.assert_array_equal(found, text(x, index))


OPERATIONS: list[Callable[..., Any]] = [
    lambda x, y, w, v: x + y,
    lambda x, y, w, v: x * y,
    lambda x, y, w, v: x / (y * y + 1.0),
    lambda x, y, w, v: x @ w,
    lambda x, y, w, v: x @ v,
    lambda x, y, w, v: x @ w.T,
    lambda x, y, w, v: ((z := x @ w) + y @ v) * z,
    lambda x, y, w, v: ((z := x @ w.T) * 2.0 + x @ v.T) * z,
    lambda x, y, w, v: x @ w + y @ v,
    lambda x, y, w, v: 0.3 - x,
    lambda x, y, w, v: np.maximum(x, 0.0),
    lambda x, y, w, v: (x > 0.0) * y,
    lambda x, y, w, v: (x * x + 1.0) ** -0.5,
    lambda x, y, w, v: x - (x * y).mean(axis=-1, keepdims=True),
    lambda x, y, w, v: x - x.max(axis=-1, keepdims=True) - (y + 0.0).sum(axis=-1, keepdims=True),
    lambda x, y, w, v: x @ np.einsum("bti,bto->io", x * 0.1, y),
]
steps = st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 9), st.integers(0, 9))


@given(
    steps=st.lists(steps, min_size=1, max_size=9),
    returned=st.sets(st.integers(0, 9), min_size=1, max_size=3),
    shape=st.sampled_from([(2, 3, 4), (1, 3, 4), (3, 1, 2), (2, 2, 1), (1, 1, 1)]),
)
@settings(max_examples=400, deadline=None)
def test_any_order_of_operations_is_recorded_as_it_computes(
    steps: list[tuple[Any, int, int]], returned: set[int], shape: tuple[int, int, int]
) -> None:
    n = shape[-1]

    def text(x: Any, y: Any, both: Any) -> list[Any]:
        known = [x * 1.0, y * 1.0]
        for operation, i, j in steps:
            operands = known[i % len(known)], known[j % len(known)]
            known.append(operation(*operands, both[:n], both[n:]))
        return [known[2 + i] for i in {i % len(steps) for i in returned}]

    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=size) for size in (shape, shape, (2 * n, n))]
    for found, expected in zip(replayed(text, *arrays), text(*arrays)):
        largest = float(np.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * largest)


def test_documents_of_one_length_may_be_an_array() -> None:
    docs = [[4, 0, 1, 4], [4, 2, 3, 0], [4, 1, 1, 2]]
    assert_equal(measured(load(small()), np.array(docs)), measured(load(small()), docs))


def test_a_line_of_the_model_that_is_refused_is_named() -> None:
    def decide(x: Any, squared: bool) -> Any:
        return x if x[0, 0, 0] > 0 else -x

    with (
        patch("vectorized.model.activation_forward", decide),
        pytest.raises(MicrogptError) as error,
    ):
        load(small()).forward(DOCS)
    assert f"{Path(__file__).name}:{decide.__code__.co_firstlineno + 1}: " in str(error.value)


def test_a_length_is_recorded_once() -> None:
    backend = load(small())
    recordings = 0
    recording = Recorder.recording

    def counted(self: Recorder, memory: Any) -> Any:
        nonlocal recordings
        recordings += 1
        return recording(self, memory)

    with patch.object(Recorder, "recording", counted):
        for docs in (DOCS[:2], [doc[::-1] for doc in DOCS[:2]], DOCS[1::-1]):
            measured(backend, docs)
            backend.update(0.1)
        assert recordings == 3  # training, evaluation, the update
        measured(backend, DOCS)
        measured(backend, DOCS[:2])
    assert recordings == 5


def test_few_recordings_are_kept() -> None:
    backend = load(small(block_size=40))
    with patch.object(vectorized.replay, "CALLS", 400):
        for _ in range(2):
            for n in range(1, 30):
                backend.forward([[1] * (n + 1)] * 2)
                backend.backward()
                kept = list(backend.worker.kept.values())
                assert kept
                assert sum(step.recording.size for step in kept) <= 400
    docs = [[1] * 21, [2] * 20]
    assert_equal(measured(backend, docs), measured(load(small(block_size=40)), docs))


def test_the_recordings_used_last_are_kept() -> None:
    backend = load(small(block_size=40))
    replay, often = backend.worker, MicroBatch([[1] * 41], [], (1, 40))
    one = replay.training(often)  # the largest: a larger one would drop all recordings
    with patch.object(vectorized.replay, "CALLS", 3 * one.recording.size):
        for n in range(5, 30):
            replay.training(MicroBatch([[1] * (n + 1)], [], (1, n)))
            assert replay.training(often) is one


@pytest.mark.parametrize("docs", [[[0] * 7], [[0] * 9] * 16], ids=len)
def test_a_step_of_the_default_model_is_of_few_calls(docs: Docs) -> None:
    backend = load(load_config(), size=27)
    backend.forward(docs)
    backend.backward()
    backend.update(0.01)
    assert sum(recording.size for _, recording in backend.recordings(docs)) <= 110


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("rows", [3, 12345])  # the second in several chunks
@pytest.mark.parametrize(
    "fields",
    [{}, {"weight_decay": 0.3}, {"grad_clip": 2.0}, {"weight_decay": 0.1, "grad_clip": 1.0}],
    ids=str,
)
def test_the_recorded_update_is_adam(fields: dict[str, float], rows: int, dtype: str) -> None:
    config, rng = small(dtype=dtype, **fields), np.random.default_rng(1)
    numbers = [rng.normal(size=4 * rows).astype(dtype) for _ in range(3)]
    numbers.append(np.abs(numbers[-1]))
    params, grads, m, v = [x.copy() for x in numbers]
    ours, ours_grads, ours_m, ours_v = numbers
    replay = Replay(config, {"w": (rows, 4)}, ours, ours_grads, ours_m, ours_v)
    for step in range(4):  # from the same numbers, so that rounding does not add up
        ours[:], ours_m[:], ours_v[:] = params, m, v
        ours_grads[:] = grads[:] = rng.normal(size=4 * rows)
        lr_t, factor = 0.1 / (step + 1), 1.0 - step / 10 if config.grad_clip else 1.0
        replay.update(3 * step, lr_t, factor)
        adam(params, np.dtype(dtype).type(factor) * grads, m, v, 3 * step, lr_t, config)
        for found, expected in ((ours, params), (ours_m, m), (ours_v, v)):
            eps = float(np.finfo(dtype).eps)
            np.testing.assert_allclose(found, expected, rtol=eps, atol=eps)
