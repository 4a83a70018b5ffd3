"""Sampling in plain numbers: one document after another, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from microgpt.config import Config
from microgpt.layout import Tree
from microgpt.tokenizer import Tokenizer
from scalar.model import Matrix, gpt, softmax


def sample(
    params: Tree,
    config: Config,
    tokenizer: Tokenizer,
    rng: Random,
    temperature: float,
    prompt: Sequence[int],
) -> list[int]:
    """next token ~ softmax(logits / temperature), until the closing token or the context is full

    Returns the prompt and what was drawn after it, without BOS and closing token.
    """
    keys: list[Matrix] = [[] for _ in range(config.n_layer)]
    values: list[Matrix] = [[] for _ in range(config.n_layer)]
    tokens = [tokenizer.bos, *prompt]
    for position in range(config.block_size):
        logits = gpt(tokens[position], position, params, keys, values, config, Tree(config.n_layer))
        if position < len(prompt):
            continue  # still reading
        probs = softmax([logit / temperature for logit in logits])
        token = rng.choices(range(tokenizer.vocab_size), weights=[p.data for p in probs])[0]
        if token == tokenizer.eos:
            break
        tokens.append(token)
    return tokens[1:]
