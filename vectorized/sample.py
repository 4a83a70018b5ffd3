"""Sampling in arrays, with a key/value cache.

Same as scalar:         the documents, draw for draw.
Different from scalar:  one document after another -> walkers side by side.

One document after another, each starts in the random stream where the one before it stopped, and
where that is, nobody knows beforehand. So a walker starts at every place in the stream; when all
have arrived, the documents are those met by going from end to start to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

from microgpt.config import Config
from microgpt.layout import Tree
from microgpt.memory import most_walkers
from microgpt.tokenizer import Tokenizer
from vectorized.model import Array, gpt_forward, softmax_forward


class Cache:
    """The keys and values (B, U, C) of one layer, for all positions up to now."""

    def __init__(self) -> None:
        self.keys: Any = None
        self.values: Any = None

    def extend(self, k: Array, v: Array) -> tuple[Array, Array]:
        """Keys and values with those of the next positions behind them."""
        if self.keys is None:
            self.keys, self.values = k, v
        else:
            self.keys = np.concatenate((self.keys, k), axis=1)
            self.values = np.concatenate((self.values, v), axis=1)
        return self.keys, self.values


def read(tokens: Array, start: int, params: Tree, caches: list[Cache], config: Config) -> Array:
    """The logits (B, V) that follow the next tokens (B, 1) of documents, at this position."""
    tap = Tree(config.n_layer)
    logits = gpt_forward(tokens, slice(start, start + 1), params, caches, 0.0, config, tap)
    return logits[:, -1]


def sample(
    params: Tree,
    config: Config,
    tokenizer: Tokenizer,
    rng: Random,
    num: int,
    temperature: float,
    prompt: Sequence[int],
) -> list[list[int]]:
    """next token ~ softmax(logits / temperature), until the closing token or the context is full

    Returns the prompt and what was drawn after it, without BOS and closing token, num times.
    """
    longest = config.block_size - len(prompt)
    most = most_walkers(config)
    samples: list[list[int]] = []
    while len(samples) < num:
        walkers = min(most, (num - len(samples)) * (longest // 2 + 1))
        here = rng.getstate()
        draws = np.array([rng.random() for _ in range(walkers + longest)])
        drawn = walk(params, config, tokenizer, draws, walkers, temperature, prompt)
        place = 0
        while place < walkers and len(samples) < num:
            text = [token for token in drawn[place].tolist() if token != tokenizer.eos]
            samples.append([*prompt, *text])
            place += min(len(text) + 1, longest)  # the closing token took a draw too
        rng.setstate(here)
        for _ in range(place):
            rng.random()
    return samples


def walk(
    params: Tree,
    config: Config,
    tokenizer: Tokenizer,
    draws: Array,
    walkers: int,
    temperature: float,
    prompt: Sequence[int],
) -> Array:
    """The tokens that each walker draws, its first with draws[walker], its next with the next one.

    Returns (walkers, longest), filled up with the closing token.
    """
    longest = config.block_size - len(prompt)
    caches = [Cache() for _ in range(config.n_layer)]
    for t, token in enumerate([tokenizer.bos, *prompt]):
        logits = read(np.array([[token]]), t, params, caches, config)
    logits = np.repeat(logits, walkers, axis=0)
    for cache in caches:
        cache.keys, cache.values = (np.repeat(x, walkers, axis=0) for x in (cache.keys, cache.values))
    drawn = np.full((walkers, longest), tokenizer.eos)
    awake = np.arange(walkers)
    for i in range(longest):
        probs = softmax_forward(logits.astype(float) * temperature**-1)
        tokens = choose(probs, draws[awake + i])
        drawn[awake, i] = tokens
        going = tokens != tokenizer.eos
        awake, tokens = awake[going], tokens[going]
        if i + 1 == longest or not len(awake):
            break
        for cache in caches:
            cache.keys, cache.values = cache.keys[going], cache.values[going]
        logits = read(tokens[:, None], len(prompt) + 1 + i, params, caches, config)
    return drawn


def choose(probs: Array, draws: Array) -> Array:
    """The index that random.choices would return for each row and its draw: (W, V) -> (W,)."""
    cumulative = probs.cumsum(axis=1)
    return (cumulative[:, :-1] <= draws[:, None] * cumulative[:, -1:]).sum(axis=1)
