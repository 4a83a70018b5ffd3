"""A batch in shares: the same loss and gradient, and the same bits on every rank."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from random import Random
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosscheck.ranks import Thread, Together
from microgpt.backend import Docs, State, fresh_state, load_backend
from microgpt.init import init_params
from microgpt.settings import load_config
from microgpt.tokenizer import build_tokenizer
from vectorized.ranks import Sums, share

CONFIG = replace(load_config(), n_embd=4, n_head=2, init_std=0.5, init_std_residual=0.5)
TOKENIZER = build_tokenizer("abc", CONFIG)
DOCS = [TOKENIZER.document(text) for text in ("a", "abcabc", "cab", "bb", "abcc")]


def fresh() -> State:
    return fresh_state(init_params(CONFIG, TOKENIZER.vocab_size, Random(1)))


def trained(
    ranks: int, docs: Docs = DOCS, steps: int = 3, state: State | None = None
) -> tuple[list[float], State]:
    """The losses of a few steps, and the state that they lead to."""
    make: Any = Together if ranks > 1 else load_backend
    backend = make("vectorized", replace(CONFIG, cores=ranks), state or fresh())
    losses = []
    for _ in range(steps):
        losses.append(backend.forward(docs))
        backend.backward()
        backend.update(0.01)
    return losses, backend.state()


def assert_close(ours: State, theirs: State) -> None:
    for name, tensor in ours.params.items():
        np.testing.assert_allclose(theirs.params[name], tensor, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_shared_batch_is_the_batch_on_every_rank(ranks: int) -> None:
    ours, theirs = trained(1), trained(ranks)  # not a number where ranks differ
    np.testing.assert_allclose(theirs[0], ours[0], rtol=1e-14)
    assert_close(ours[1], theirs[1])


def test_a_run_that_goes_on_with_as_many_ranks_is_the_same_to_the_last_bit() -> None:
    losses, state = trained(3, steps=6)
    begun, half = trained(3)
    rest, resumed = trained(3, state=half)
    assert [*begun, *rest] == losses
    for kind in ("params", "m", "v"):
        for name, tensor in getattr(state, kind).items():
            assert (tensor == getattr(resumed, kind)[name]).all()


def test_more_ranks_than_documents() -> None:
    assert_close(trained(1, DOCS[:1])[1], trained(3, DOCS[:1])[1])


def test_a_forward_pass_whose_gradient_is_not_asked_for() -> None:
    backend = Together("vectorized", replace(CONFIG, cores=2), fresh())
    backend.forward(DOCS[:3])
    assert backend.forward(DOCS) == pytest.approx(trained(1, steps=1)[0][0], rel=1e-14)


@given(lengths=st.lists(st.integers(2, 9), max_size=12), size=st.integers(2, 4))
def test_shares_are_of_about_equal_work(lengths: list[int], size: int) -> None:
    docs = [list(range(i, i + n)) for i, n in enumerate(lengths)]
    shares = [share(docs, rank, size) for rank in range(size)]
    assert sorted(doc for one in shares for doc in one) == sorted(docs)
    sizes = [sum(map(len, one)) for one in shares]
    assert max(sizes) - min(sizes) <= 9  # a document


@pytest.mark.parametrize("numbers", [1, 3, 1000])
def test_gradients_are_added_in_rank_order(numbers: int) -> None:
    """Of the sums of three numbers, those in other orders differ in the last bits of some."""
    own = np.random.default_rng(0).standard_normal((3, numbers))
    rows: list[Any] = [None] * 3
    barrier = Barrier(3)

    def summed(rank: int) -> Any:
        sums = Sums(Thread(rank, rows, barrier), numbers, np.dtype("float64"))
        sums.grads[:] = own[rank]
        sums.gradient()
        return sums.grads

    with ThreadPoolExecutor(3) as threads:
        for found in threads.map(summed, range(3)):
            assert (found == (own[0] + own[1]) + own[2]).all()


def test_what_a_rank_raises_is_raised() -> None:
    backend = Together("vectorized", replace(CONFIG, cores=3), fresh())
    backend.ranks[1].state().params["wte"][:] = np.nan
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        backend.forward(DOCS)
