"""Sampling in plain numbers: one document after another, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from random import Random

from microgpt.config import Config
from microgpt.layout import Tree
from microgpt.tokenizer import Tokenizer
from scalar.model import Matrix, Vector, gpt, softmax


def probabilities(logits: Vector, temperature: float, top_k: int) -> list[float]:
    """p = softmax(logits / temperature) over the top_k largest logits, 0 elsewhere

    top_k 0 keeps all logits, temperature 0 the largest alone; of equal logits, the lower token id.

    Raises FloatingPointError if a logit is not finite, before or after the division.
    """
    scaled = [logit / (temperature or 1.0) for logit in logits]  # [V]
    if not all(isfinite(logit.data) for logit in scaled):
        raise FloatingPointError("a logit is not finite")
    by_size = sorted(range(len(scaled)), key=lambda i: -scaled[i].data)
    kept = sorted(by_size[: 1 if temperature == 0 else top_k or len(logits)])
    probs = softmax([scaled[i] for i in kept])  # [K]
    chances = {i: p.data for i, p in zip(kept, probs)}
    return [chances.get(i, 0.0) for i in range(len(logits))]  # [V]


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
    keys: list[Matrix] = [[] for _ in range(config.n_layer)]
    values: list[Matrix] = [[] for _ in range(config.n_layer)]
    tokens = [tokenizer.bos, *prompt]
    for position in range(config.block_size):
        logits = gpt(tokens[position], position, params, keys, values, config, Tree(config.n_layer))
        if position < len(prompt):
            continue  # the next token is the prompt's
        probs = probabilities(logits, temperature, top_k)
        token = rng.choices(range(tokenizer.vocab_size), weights=probs)[0]
        if token == tokenizer.eos:
            break
        tokens.append(token)
    return tokens[1:]
