"""Sampling in arrays: many documents at once, with a key/value cache.

Same as scalar:         the documents, draw for draw.
Different from scalar:  one document after another -> walkers side by side.

One document after another, each starts in the random stream where the one before it stopped, and
where that is, nobody knows beforehand. So a walker starts at every place in the stream; when all
have arrived, the documents are those met by going from end to start to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np

from microgpt.config import Config
from microgpt.layout import Tree
from microgpt.memory import most_walkers
from microgpt.tokenizer import Tokenizer
from vectorized.arrays import Array, Shape, activations, set_ones, summing
from vectorized.batch import places
from vectorized.model import gpt_forward, softmax_forward


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
    past = empty_past(params, config)
    # all walkers read the same opening
    logits = read(np.array([[tokenizer.bos, *prompt]]), params, past, config)
    logits = np.repeat(logits[:, -1:], walkers, axis=1)  # (V, walkers)
    for layer in past.layers:
        layer.k, layer.v = np.repeat(layer.k, walkers, axis=1), np.repeat(layer.v, walkers, axis=1)
    drawn = np.full((walkers, longest), tokenizer.eos)
    awake = np.arange(walkers)
    for i in range(longest):
        colder = logits.astype(float) * temperature**-1  # (V, awake), as float32 may overflow
        ones = summing(len(logits), len(awake), 1.0, colder.dtype)
        probs = softmax_forward(colder, ones, colder)  # (V, awake)
        tokens = choose(probs, draws[awake + i])
        drawn[awake, i] = tokens
        going = tokens != tokenizer.eos
        awake, tokens = awake[going], tokens[going]
        if i + 1 == longest or not len(awake):
            break
        for layer in past.layers:
            layer.k, layer.v = layer.k[:, going], layer.v[:, going]
        logits = read(tokens[:, None], params, past, config)  # (V, awake)
    return drawn


def empty_past(params: Tree, config: Config) -> Tree:
    """The keys and values of no position, for one document."""
    past = Tree(config.n_layer)
    for layer in past.layers:
        nothing = np.empty((config.n_head, 1, config.head_dim, 0), params.wte.dtype)
        layer.k = layer.v = nothing  # (H, B, D, U), U = 0
    return past


def read(tokens: Array, params: Tree, past: Tree, config: Config) -> Array:
    """The logits that follow these tokens (B, T), which join the past: (V, B T)."""
    B, T = tokens.shape
    U = past.layers[0].k.shape[-1] + T
    dtype = params.wte.dtype
    tap = activations(
        config, len(params.wte), Shape(B, T), U, False, lambda *shape: np.empty(shape, dtype)
    )
    set_ones(tap.position_rows, tap.at)
    return gpt_forward(places(tokens * tokens.size), params, past, config, tap)


def choose(probs: Array, draws: Array) -> Array:
    """The index that random.choices would return for each column and its draw: (V, W) -> (W,)."""
    cumulative = probs.cumsum(axis=0)
    return (cumulative[:-1] <= draws * cumulative[-1]).sum(axis=0)
