"""Reading token by token with a fault, by the table: what a wrong cache or position leads to."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import numpy as np

from crosscheck.operations import Around, elementwise, row_mean, row_sum
from crosscheck.trace import Array
from crosscheck.variants import Guess
from microgpt.taps import ACTIVATIONS, taps


def other_readings(a: Around) -> Iterator[Guess]:
    """The logits of the first document, read with a cache or a position that is at fault."""
    n = int(a.n[0])
    t, u = np.arange(n)[:, None], np.arange(n)
    seen, own, latest = u <= t, np.broadcast_to(u, (n, n)), t + 0 * u
    newest_first, last = (t - u) % n, len(a["wpe"]) - 1
    lost = "of earlier positions are lost: the latest stands for all"
    positions = {
        "the position does not advance: wpe[0] throughout": 0 * u,
        "positions are one too high": np.minimum(u + 1, last),
        "positions are one too low": np.maximum(u - 1, 0),
    }
    for words, position in positions.items():
        yield words, read(a, position=position)
    order = {
        f"the keys {lost}": (latest, own),
        f"the values {lost}": (own, latest),
        f"the keys and values {lost}": (latest, latest),
        "keys are kept newest first": (newest_first, own),
        "values are kept newest first": (own, newest_first),
        "keys and values are one position apart": (own, np.maximum(own - 1, 0)),
    }
    for words, (keys, values) in order.items():
        yield words, read(a, keys, values)
    masks = {
        "the cache is lost: each position looks at itself alone": u == t,
        "the first position is not in the cache": seen & ((u > 0) | (t == 0)),
        "the cache holds the last two positions only": seen & (u > t - 2),
        "a position's own key is not in the cache yet": (u < t) | ((t == 0) & seen),
    }
    for words, mask in masks.items():
        yield words, read(a, mask=mask)


def read(
    a: Around,
    keys: Array | None = None,
    values: Array | None = None,
    mask: Array | None = None,
    position: Array | None = None,
) -> Array:
    """(n, V) logits of the first document, by the table.

    keys, values    (n, n): whose key and value position t finds at u
    mask            (n, n): whether it finds any there
    position        (n,): which row of wpe is added
    """
    n = int(a.n[0])
    u = np.arange(n)
    own = np.broadcast_to(u, (n, n))
    keys, values = (own if order is None else order for order in (keys, values))
    mask = np.tri(n, dtype=bool) if mask is None else mask
    position = u if position is None else position
    known: dict[str, Array] = {}

    def value(name: str) -> Array:
        return known[name] if name in known else a[name]

    H = a.config.n_head

    def heads(x: Array) -> Array:
        return x.reshape(n, H, -1)

    for tap in taps(a.config).values():
        x = [value(name) for name in tap.operands]
        if tap.operation == "embedding":
            known[tap.name] = x[0][a.token[0, :n]] + x[1][position]
        elif tap.operation == "rmsnorm":
            known[tap.name] = x[0] * (row_mean(x[0] ** 2) + a.config.norm_eps) ** -0.5
        elif tap.operation in ("linear", "linear_residual"):
            known[tap.name] = x[0] @ x[1].T + (x[2] if len(x) > 2 else 0)
        elif tap.operation == "scores":
            q, k = heads(x[0]), heads(x[1])[keys]  # (n, H, D), (n, n, H, D)
            known[tap.name] = np.einsum("thd,tuhd->htu", q, k) / sqrt(a.config.head_dim)
        elif tap.operation == "softmax":
            seen = np.where(mask, x[0], -np.inf)
            exps = np.exp(seen - seen.max(axis=-1, keepdims=True))
            known[tap.name] = exps / row_sum(exps)
        elif tap.operation == "weighted_sum":
            out = np.einsum("htu,tuhd->thd", x[0], heads(x[1])[values])
            known[tap.name] = out.reshape(n, -1)
        elif tap.operation == "activation":
            known[tap.name] = elementwise(ACTIVATIONS[a.config.activation].value, x[0])
        if tap.name == "logits":
            break
    return known["logits"]
