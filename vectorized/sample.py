"""Sampling in arrays, with a key/value cache.

Same as scalar:         `probabilities`, `sample`, and every draw that it makes.
Different from scalar:  growing lists of keys and values -> a cache (B, U, C) for each layer;
                        `sample_many`, many documents at once, in arrays of Fortran order.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

from microgpt.config import Config
from microgpt.layout import Tree, grow, param_shapes, pick
from microgpt.runs.memory import most_walkers
from microgpt.tokenizer import Tokenizer
from vectorized.model import Array, gpt_forward, softmax_forward


class Cache:
    """The keys and values of one layer: (B, U, C), at the U positions read so far."""

    def __init__(self, config: Config, dtype: np.dtype) -> None:
        self.keys = self.values = np.empty((1, 0, config.n_embd), dtype)  # (B, U, C), U = 0

    def extend(self, k: Array, v: Array) -> tuple[Array, Array]:
        """All keys and values, those of the next position (B, 1, C) behind the others."""
        self.keys = np.concatenate((self.keys, k), axis=1)  # (B, U, C)
        self.values = np.concatenate((self.values, v), axis=1)  # (B, U, C)
        return self.keys, self.values

    def select(self, rows: Array) -> None:
        """Keep the keys and values of these rows, in this order."""
        self.keys, self.values = fortran(self.keys, rows), fortran(self.values, rows)


def empty_caches(params: Tree, config: Config) -> list[Cache]:
    """The caches of one document that has not been read yet."""
    return [Cache(config, params.wte.dtype) for _ in range(config.n_layer)]


def read(tokens: Array, t: int, params: Tree, caches: Sequence[Cache], config: Config) -> Array:
    """The logits (B, V) after the tokens (B,) at position t."""
    tap = Tree(config.n_layer)
    positions = np.array([[t]])  # (1, 1)
    logits = gpt_forward(tokens[:, None], positions, params, caches, 0.0, config, tap)  # (B, 1, V)
    return logits[:, 0]


def probabilities(logits: Array, temperature: float, top_k: int) -> Array:
    """p = softmax(logits / temperature) over the top_k largest logits, 0 elsewhere

    top_k 0 keeps all logits, temperature 0 the largest alone; of equal logits, the lower token id.

    Raises FloatingPointError if a logit is not finite, before or after the division.
    """
    scaled = logits.astype(float) / (temperature or 1.0)  # (R, V); float32 might overflow
    if not np.isfinite(scaled).all():
        raise FloatingPointError("a logit is not finite")
    most = 1 if temperature == 0 else top_k or scaled.shape[1]
    if most < scaled.shape[1]:
        by_size = np.argsort(-scaled, axis=1, kind="stable")  # (R, V)
        np.put_along_axis(scaled, by_size[:, most:], -np.inf, axis=1)
    return softmax_forward(scaled)  # (R, V)


def sample(
    params: Tree,
    config: Config,
    tokenizer: Tokenizer,
    rng: Random,
    temperature: float,
    prompt: Sequence[int],
    top_k: int = 0,
) -> list[int]:
    """next token ~ probabilities(logits), until the closing token or the context is full

    Returns the prompt and the tokens drawn after the prompt, without BOS and closing token.
    """
    caches = empty_caches(params, config)
    tokens = [tokenizer.bos, *prompt]
    for position in range(config.block_size):
        logits = read(np.array([tokens[position]]), position, params, caches, config)  # (1, V)
        if position < len(prompt):
            continue  # the next token is the prompt's
        (probs,) = probabilities(logits, temperature, top_k)  # (V,)
        token = rng.choices(range(tokenizer.vocab_size), weights=probs.tolist())[0]
        if token == tokenizer.eos:
            break
        tokens.append(token)
    return tokens[1:]


def sample_many(
    params: Tree,
    config: Config,
    tokenizer: Tokenizer,
    rng: Random,
    num: int,
    temperature: float,
    prompt: Sequence[int],
    top_k: int = 0,
) -> list[list[int]]:
    """The documents that `sample` would return, called num times.

    A document takes its random numbers where the one before stopped, a place not known in advance.
    `draw` draws a document from each of many places, and each is kept that begins where the one
    kept before it stopped.
    """
    longest = config.block_size - len(prompt)
    length = longest // 2 + 1  # draws that a document takes, at a guess
    samples: list[list[int]] = []
    while left := num - len(samples):
        places = min(most_walkers(config), left * length)
        before = rng.getstate()
        draws = np.array([rng.random() for _ in range(places + longest)])
        rng.setstate(before)
        try:
            drawn = draw(params, config, tokenizer, draws, places, temperature, prompt, top_k)
        except FloatingPointError:  # perhaps at a place where no document begins
            one = params, config, tokenizer, rng, temperature, prompt, top_k
            return samples + [sample(*one) for _ in range(left)]
        place = 0
        while place < places and len(samples) < num:
            text = [token for token in drawn[place].tolist() if token != tokenizer.eos]
            samples.append([*prompt, *text])
            place += min(len(text) + 1, longest)  # the closing token took a draw too
        length = place // (left - (num - len(samples))) + 1
        for _ in range(place):
            rng.random()
    return samples


def draw(
    params: Tree,
    config: Config,
    tokenizer: Tokenizer,
    draws: Array,
    places: int,
    temperature: float,
    prompt: Sequence[int],
    top_k: int,
) -> Array:
    """One document from each of the places 0 to places - 1 in the stream of draws.

    Documents that have the same text so far share a row of the batch: R rows, for the W documents
    that go on. Returns the tokens after the prompt (places, longest), filled up with the closing
    token.
    """
    longest, V = config.block_size - len(prompt), tokenizer.vocab_size
    weights = {name: pick(params, name).view(Weight) for name in param_shapes(config, V)}
    tree = grow({**weights, "wpe": params.wpe}, config.n_layer)
    caches = empty_caches(params, config)
    for t, token in enumerate([tokenizer.bos, *prompt]):
        logits = read(np.array([token]), t, tree, caches, config)  # (R, V), R = 1
    drawn = np.full((places, longest), tokenizer.eos)
    place = np.arange(places)  # of the documents that go on
    row = np.zeros(places, int)  # of the batch, for each of them
    for i in range(longest):
        probs = probabilities(logits, temperature, top_k)  # (R, V)
        tokens = choose(fortran(probs.cumsum(axis=1), row), draws[place + i])
        drawn[place, i] = tokens
        going = tokens != tokenizer.eos
        place, text = place[going], row[going] * V + tokens[going]  # the texts, by number
        if i + 1 == longest or not len(place):
            break
        texts, row = np.unique(text, return_inverse=True)  # (R,)
        rows, next_tokens = np.divmod(texts, V)
        for cache in caches:
            cache.select(rows)
        logits = read(next_tokens, len(prompt) + 1 + i, tree, caches, config)  # (R, V)
    return drawn


def choose(cumulative: Array, draws: Array) -> Array:
    """The index that random.choices would return for each document and its draw: (W, V) -> (W,)."""
    return (cumulative[:, :-1] <= draws[:, None] * cumulative[:, -1:]).sum(axis=1)


class Weight(np.ndarray):
    """A weight whose products `x @ w.T` have results (R, 1, n) in Fortran order.

    Their rows then lie fastest in memory. All rows are one product of matrices, not a product for
    each, and element-wise loops are as long as the batch. So do the rows of a look-up. Any other
    use is that of an array.
    """

    def __rmatmul__(self, x: Any) -> Any:
        """x @ w.T, self being w.T: (R, 1, n_in) -> (R, 1, n_out)"""
        return (np.asarray(self).T @ x[:, 0].T).T[:, None]

    def __getitem__(self, tokens: Any) -> Any:
        """wte[tokens]: (R, 1) -> (R, 1, C)"""
        w = np.asarray(self)
        return fortran(w, tokens) if np.ndim(tokens) == 2 else w[tokens]

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """The same on plain arrays."""
        if method != "__call__":
            return NotImplemented
        return ufunc(*(np.asarray(x) if isinstance(x, Weight) else x for x in inputs), **kwargs)


def fortran(x: Array, rows: Array) -> Array:
    """x[rows] in Fortran order: the first axis is the fastest in memory."""
    return x.T.take(rows.T, axis=-1).T
