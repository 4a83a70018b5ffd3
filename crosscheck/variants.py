"""What people compute instead: every operation in its wrong forms, each as a guess at numbers.

A guess is a sentence and the tensor that it leads to. Where a guess cannot know an element (what
padding holds is not in a trace), it has NaN there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import log, pi, sqrt
from typing import Any

import numpy as np

from crosscheck.formulas import Mechanical, slipped, value, values
from crosscheck.operations import (
    ELEMENTARY,
    Around,
    Call,
    Slot,
    calls,
    elementwise,
    merge,
    row_mean,
    row_sum,
)
from crosscheck.trace import Array, Step
from microgpt.taps import ACTIVATIONS, axes_of, taps

Guess = tuple[str, Any]  # words, and the numbers to which they lead


# --- an operation by another formula -------------------------------------------------------------


def of_rmsnorm(call: Call) -> Iterator[Guess]:
    x, eps = call.slots["x"].value, call.slots["eps"].value
    a, n = call.around, x.shape[-1]
    ms = row_mean(x * x)
    names = {
        "x": x, "eps": eps, "n": n, "mean": row_mean, "sum": row_sum, "ms": ms, "abs": np.abs,
        "centred": x - row_mean(x), "y": x * (ms + eps) ** -0.5,
        "whole": float((x * x)[a.real].mean()),
        "over_t": (x * x).sum(axis=1, keepdims=True) / a.n[:, None, None],
    }  # fmt: skip
    own = "x * (mean(x * x) + eps) ** -0.5"
    forms = {
        "eps in the wrong place: added to the root, not under it": "x / (ms ** 0.5 + eps)",
        "eps is missing under the root": "x / ms ** 0.5",
        "the sum of squares in place of their mean": "x / (n * ms + eps) ** 0.5",
        "n + 1 in place of n in the mean": "x / (ms * n / (n + 1) + eps) ** 0.5",
        "the root is missing": "x / (ms + eps)",
        "multiplied by the root mean square in place of divided by it": "x * (ms + eps) ** 0.5",
        "mean subtracted: this is a LayerNorm": "centred / (mean(centred ** 2) + eps) ** 0.5",
        "divided by the standard deviation, the mean not subtracted": (
            "x / (mean(centred ** 2) + eps) ** 0.5"
        ),
        "the mean is subtracted, and the norm is of what was before": (
            "centred / (ms + eps) ** 0.5"
        ),
        "not normalised": "x",
        "normalised twice": "y / (mean(y * y) + eps) ** 0.5",
        "the mean of |x| in place of the root of the mean square": "x / (mean(abs(x)) + eps)",
        "one mean over all positions, not one for each": "x / (whole + eps) ** 0.5",
        "the mean square over the positions, not over the channels": "x / (over_t + eps) ** 0.5",
    }
    if n > 1:
        forms |= {
            "n - 1 in place of n in the mean": "x / (ms * n / (n - 1) + eps) ** 0.5",
            "a LayerNorm that divides by n - 1: the mean is subtracted": (
                "centred / (sum(centred ** 2) / (n - 1) + eps) ** 0.5"
            ),
        }
    for other in (1e-2, *CONSTANTS):
        forms[f"eps is {other:g}, not {eps:g}"] = f"x / (ms + {other}) ** 0.5"
    for other_eps in ("eps ** 0.5", "eps ** 2", "n * eps", "eps / n", "2 * eps", "-eps"):
        forms[f"eps enters as {other_eps}"] = f"x / (ms + {other_eps}) ** 0.5"
    yield from values(forms, names)
    yield from slipped(own, names)


CONSTANTS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-12)  # that are put anywhere


def of_d_rmsnorm(call: Call) -> Iterator[Guess]:
    dy, y, scale = (call.slots[name].value for name in ("dy", "y", "scale"))
    a = call.around
    names = {
        "dy": dy, "y": y, "scale": scale, "x": y / scale, "n": y.shape[-1], "mean": row_mean,
        "sum": row_sum, "over_t": (dy * y).sum(axis=1, keepdims=True) / a.n[:, None, None],
    }  # fmt: skip
    lost = "in the second term of the norm's derivative"
    forms = {
        "the second term of the norm's derivative is missing": "scale * dy",
        "the norm is passed as if it were not there": "dy",
        "the sign of the second term of the norm's derivative": "scale * (dy + y * mean(dy * y))",
        "a sum in place of the mean in the norm's derivative": "scale * (dy - y * sum(dy * y))",
        "the norm's derivative lacks the factor scale": "dy - y * mean(dy * y)",
        f"the factor y is missing {lost}": "scale * (dy - mean(dy * y))",
        f"mean(dy) in place of mean(dy * y) {lost}": "scale * (dy - y * mean(dy))",
        f"mean(y) in place of mean(dy * y) {lost}": "scale * (dy - y * mean(y * y))",
        f"1 in place of scale {lost}": "scale * dy - y * mean(dy * y)",
        "x in place of y in the norm's derivative": "scale * (dy - x * mean(dy * x))",
        f"x in place of y before the mean {lost}": "scale * (dy - x * mean(dy * y))",
        f"x in place of y inside the mean {lost}": "scale * (dy - y * mean(dy * x))",
        "scale^2 in place of scale in the norm's derivative": "scale ** 2 * (dy - y * mean(dy*y))",
        "divided by scale in place of multiplied in the norm's derivative": (
            "(dy - y * mean(dy * y)) / scale"
        ),
        "the derivative of a LayerNorm": "scale * (dy - mean(dy) - y * mean(dy * y))",
        f"the mean over positions, not over channels, {lost}": "scale * (dy - y * over_t)",
    }
    for power in (2, 3, 4):
        words = f"scale^{power} in place of scale {lost}"
        forms[words] = f"scale * dy - scale ** {power} * y * mean(dy * y)"
    yield from values(forms, names)
    for tap in taps(a.config).values():
        if tap.operation == call.operation and tap.name != call.slots["y"].name:
            before = a[tap.operands[0]]
            scale = (row_mean(before * before) + a.config.norm_eps) ** -0.5
            others = {
                f"the scale of {tap.name} in place of that of {call.slots['y'].name}": y,
                f"{tap.name} and its scale in place of {call.slots['y'].name}": a[tap.name],
            }
            for words, other in others.items():
                yield words, scale * (dy - other * row_mean(dy * other))
    yield from slipped("scale * (dy - y * mean(dy * y))", names, {"y": ["x"], "dy": ["y"]})


def of_softmax(call: Call) -> Iterator[Guess]:
    a, x = call.around, call.slots["x"].value
    T, looked_at = x.shape[-1], a.looked_at

    def exp(x: Array) -> Array:
        return np.where(looked_at, np.exp(np.minimum(np.where(looked_at, x, 0.0), 700)), 0.0)

    def most(x: Array) -> Array:
        return np.where(looked_at, x, -1e300).max(axis=-1, keepdims=True)

    def total(x: Array) -> Array:
        return np.maximum(row_sum(np.where(looked_at, x, 0.0)), 1e-300)

    exps = exp(x - most(x))
    D, C = a.config.head_dim, a.config.n_embd
    names = {
        "x": x, "exp": exp, "max": most, "sum": total, "exps": exps, "y": exps / total(exps),
        "softmax": lambda x: exp(x - most(x)) / total(exp(x - most(x))), "D": D, "C": C,
        "log": lambda x: np.log(np.maximum(x, 1e-300)), "mean": row_mean, "full": np.exp,
        "over_queries": lambda x: np.maximum(x.sum(axis=-2, keepdims=True), 1e-300),
        "over_heads": lambda x: x.sum(axis=1, keepdims=True),
    }  # fmt: skip
    forms = {}
    columns = "each column sums to one, not each row: the softmax runs over the queries"
    everything = _unmasked_logits(call)
    if everything is not None and T > 1:
        late = np.exp(everything)
        lower = np.tri(T, dtype=bool)
        names |= {"late": late, "upper": np.where(lower, late, 1.0), "row": row_sum}
        names |= {"lower": np.where(lower, late, 0.0)}
        forms = {
            "the mask is missing or comes after the softmax: positions to come take part": (
                "late / row(late)"
            ),
            "positions to come take part with a logit of 0: masked by 0, not by -inf": (
                "upper / row(upper)"
            ),
            columns: "lower / over_queries(lower)",
        }
    else:
        forms = {columns: "exp(x) / over_queries(exp(x))"}
    forms |= {
        "not normalised: softmax without its division": "exps",
        "not normalised: softmax without its division, and without the max": "exp(x)",
        "the softmax runs over the heads": "full(x) / over_heads(full(x))",
        "a sigmoid in place of the softmax": "1 / (1 + full(-x))",
        "normalised by the root of the sum of squares": "exps / sum(exps ** 2) ** 0.5",
        "the softmax is taken twice": "softmax(y)",
        "the logits are divided by their sum, without exp": "x / sum(x)",
        "log-softmax: the exp after it is missing": "log(y)",
    }
    for eps in CONSTANTS:
        added = f"{eps:g} is added to"
        forms[f"{added} the sum that the softmax divides by"] = f"exps / (sum(exps) + {eps})"
        forms[f"{added} each exp of the softmax"] = f"(exps + {eps}) / sum(exps + {eps})"
    for factor in ("D ** 0.5", "1 / D ** 0.5", "2", "1 / 2", "-1", "D", "1 / D", "C ** 0.5",
                   "1 / C ** 0.5"):  # fmt: skip
        shown = factor.replace("D ** 0.5", "sqrt(D)").replace("C ** 0.5", "sqrt(C)")
        words = f"the logits are multiplied by {shown.replace(' ', '')} once more before the"
        forms[f"{words} softmax"] = f"softmax(({factor}) * x)"
    yield from values(forms, names)
    yield from slipped("exp(x - max(x)) / sum(exp(x - max(x)))", names)


def _unmasked_logits(call: Call) -> Array | None:
    """All q . k / sqrt(D), positions to come included; NaN in documents with padding."""
    a, prefix = call.around, call.slots["x"].name.rpartition(".")[0]
    q, k = (a.heads(a[f"{prefix}.{name}"]) for name in "qk")
    logits = np.einsum("bthd,buhd->bhtu", q, k) / sqrt(a.config.head_dim)
    return np.where(unpadded(a), logits - logits.max(), np.nan)


def unpadded(a: Around) -> Array:
    """(B, 1, 1, 1): the documents that are as long as the longest."""
    return (a.n == a.real.shape[1]).reshape(-1, 1, 1, 1)


def of_d_softmax(call: Call) -> Iterator[Guess]:
    a = call.around
    dy, y = (call.slots[name].value for name in ("dy", "y"))
    x = a.step[f"forward/{call.slots['y'].name.replace('attn_weights', 'attn_logits')}"]
    prefix = call.slots["y"].name.rpartition(".")[0]
    dout, v = a.heads(a.step[f"backward/d{prefix}.attn_out"]), a.heads(a[f"{prefix}.v"])
    top = np.where(a.looked_at, x, -1e300).max(axis=-1, keepdims=True)
    T = y.shape[-1]
    names = {
        "dy": dy, "y": y, "x": x, "sum": row_sum, "T": T, "t": np.arange(1, T + 1)[:, None],
        "all_dy": np.where(unpadded(a), np.einsum("bthd,buhd->bhtu", dout, v), np.nan),
        "shifted": np.where(a.looked_at, x - top, 0.0), "exp": np.exp,
        "exps": np.where(a.looked_at, np.exp(x), 0.0),
        "mean": lambda x: row_sum(x) / np.arange(1, T + 1)[:, None],
        "column": lambda x: x.sum(axis=-2, keepdims=True),
        "heads": lambda x: x.sum(axis=1, keepdims=True),
    }  # fmt: skip
    end = "in the softmax's derivative"
    forms = {
        f"missing: the sum over the row {end}": "y * dy",
        f"sum(dy) in place of sum(dy * y) {end}": "y * (dy - sum(dy))",
        f"sum(dy) in place of sum(dy * y), positions to come included, {end}": (
            "y * (dy - sum(all_dy))"
        ),
        f"the factor y is missing {end}": "dy - sum(dy * y)",
        "y (1 - y) dy is the derivative of a sigmoid: the rest of the row is left out": (
            "y * (1 - y) * dy"
        ),
        f"the factor y is missing before the sum {end}": "y * dy - sum(dy * y)",
        "the softmax is passed as if it were not there": "dy",
        f"the sign of the sum over the row {end}": "y * (dy + sum(dy * y))",
        f"a mean over all T positions in place of the sum over the row {end}": (
            "y * (dy - sum(dy * y) / T)"
        ),
        f"a mean in place of the sum over the row {end}": "y * (dy - mean(dy * y))",
        f"the sum over the column in place of the row {end}": "y * (dy - column(dy * y))",
        f"the sum over the heads in place of the row {end}": "y * (dy - heads(dy * y))",
        f"y squared before the sum over the row {end}": "y * dy - y * y * sum(dy * y)",
        f"the softmax's input in place of its output {end}": "x * (dy - sum(dy * x))",
        f"exp is differentiated by its input, not its output, {end}": (
            "y * (dy - sum(dy * y)) / exp(shifted) * shifted"
        ),
        f"exp(x), which is not divided by the sum, in place of y {end}": (
            "exps * (dy - sum(dy * exps))"
        ),
    }
    yield from values(forms, names)
    yield from slipped("y * (dy - sum(dy * y))", names, {"y": ["x"], "dy": ["y"]})


KINDS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "no activation at all": (lambda x: x, np.ones_like),
    "a leaky ReLU of slope 0.01": (
        lambda x: np.where(x > 0, x, 0.01 * x),
        lambda x: np.where(x > 0, 1.0, 0.01),
    ),
    "a leaky ReLU of slope 0.1": (
        lambda x: np.where(x > 0, x, 0.1 * x),
        lambda x: np.where(x > 0, 1.0, 0.1),
    ),
    "the absolute value": (np.abs, np.sign),
    "the square": (lambda x: x * x, lambda x: 2 * x),
    "a cubed ReLU": (lambda x: np.maximum(x, 0) ** 3, lambda x: 3 * np.maximum(x, 0) ** 2),
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "a sigmoid": (
        lambda x: 1 / (1 + np.exp(-x)),
        lambda x: np.exp(-x) / (1 + np.exp(-x)) ** 2,
    ),
    "SiLU": (
        lambda x: x / (1 + np.exp(-x)),
        lambda x: (1 + np.exp(-x) * (1 + x)) / (1 + np.exp(-x)) ** 2,
    ),
    "the sigmoid form of GELU, x sigmoid(1.702 x)": (
        lambda x: x / (1 + np.exp(-1.702 * x)),
        lambda x: (1 + np.exp(-1.702 * x) * (1 + 1.702 * x)) / (1 + np.exp(-1.702 * x)) ** 2,
    ),
    "GELU by erf": (
        lambda x: x * _normal(x),
        lambda x: _normal(x) + x * np.exp(-x * x / 2) / sqrt(2 * pi),
    ),
    "softplus": (lambda x: np.log1p(np.exp(x)), lambda x: 1 / (1 + np.exp(-x))),
    "ELU": (lambda x: np.where(x > 0, x, np.expm1(x)), lambda x: np.where(x > 0, 1, np.exp(x))),
    "a step": (lambda x: (x > 0) * 1.0, np.zeros_like),
    "a ReLU with its sign turned": (lambda x: np.minimum(x, 0), lambda x: (x < 0) * 1.0),
}


def _normal(x: Array) -> Array:
    from math import erf

    return np.array([0.5 * (1 + erf(number / sqrt(2))) for number in x.ravel()]).reshape(x.shape)


def of_activation(call: Call) -> Iterator[Guess]:
    x, own = call.slots["x"].value, call.slots["kind"].value
    for kind, other in ACTIVATIONS.items():
        if kind != own:
            yield f"{kind} in place of {own}", elementwise(other.value, x)
    for words, wrong in slipped(ACTIVATIONS[own].value, {**ELEMENTARY, "x": x}):
        yield Mechanical(f"in {own}, {words}"), wrong
    for name, (other_value, _) in KINDS.items():
        yield f"{name} in place of {own}", other_value(x)


def of_d_activation(call: Call) -> Iterator[Guess]:
    dy, x, own = (call.slots[name].value for name in ("dy", "x", "kind"))
    y = elementwise(ACTIVATIONS[own].value, x)
    if own == "squared_relu":
        yield "the factor 2 of the square's derivative is missing", dy * np.maximum(x, 0)
    yield "the slope of the activation is left out: it is taken to be 1", dy
    yield "the slope is taken from the derivative that comes in, not from x", dy * (dy > 0)
    if own == "relu":
        yield "the slope is 1 at x = 0, where it is 0", dy * (x >= 0)
    yield (
        "the slope is taken from the output, not from x",
        dy * elementwise(ACTIVATIONS[own].slope, y),
    )
    yield "the output in place of the slope", dy * y
    own_slope = elementwise(ACTIVATIONS[own].slope, x)
    yield "only positive derivatives are passed on", np.maximum(dy, 0) * own_slope
    yield "the slope is squared", dy * own_slope**2
    yield "the slope without what comes in", elementwise(ACTIVATIONS[own].slope, x)
    for kind, other in ACTIVATIONS.items():
        if kind != own:
            yield f"the slope of {kind} in place of that of {own}", dy * elementwise(other.slope, x)
    for words, wrong in slipped(ACTIVATIONS[own].slope, {**ELEMENTARY, "x": x}):
        yield Mechanical(f"in the slope of {own}, {words}"), dy * wrong
    for name, (_, slope) in [*KINDS.items()][1:]:  # the first has been named above
        yield f"the slope is that of {name}", dy * slope(x)


def of_cross_entropy(call: Call) -> Iterator[Guess]:
    logits, target = call.slots["logits"].value, call.slots["target"].value
    at = (np.arange(logits.shape[-1]) == target[..., None]).astype("float64")

    def total(x: Array) -> Array:
        return x.sum(axis=-1)

    names = {
        "logits": logits, "at": at, "x": logits - logits.max(axis=-1, keepdims=True), "exp": np.exp,
        "log": np.log, "sum": total, "mean": lambda x: x.mean(axis=-1), "row": row_sum, "ln": log,
    }  # fmt: skip
    names |= {"p": value("exp(x) / row(exp(x))", names)}
    own = "log(sum(exp(x))) - sum(x * at)"
    forms = {
        "log2 in place of ln": f"({own}) / ln(2)",
        "log10 in place of ln": f"({own}) / ln(10)",
        "the logarithm is missing: 1 - p": "1 - sum(p * at)",
        "the logarithm is missing: -p": "-sum(p * at)",
        "the sign: log(p) in place of -log(p)": f"-({own})",
        "the softmax is missing: -logits[target]": "-sum(logits * at)",
        "log(sum(exp)) is missing": "-sum(x * at)",
        "the largest logit is subtracted from one term only": "log(sum(exp(x))) - sum(logits * at)",
        "the logit of the target is missing: log(sum(exp)) alone": "log(sum(exp(x)))",
        "the softmax is taken twice": "log(sum(exp(p))) - sum(p * at)",
        "the sum over all tokens, not the target's alone": "-sum(log(p))",
        "the mean over all tokens, not the target's alone": "-mean(log(p))",
        "squared error in place of cross entropy": "sum((p - at) ** 2)",
    }
    for eps in CONSTANTS:
        words = f"{eps:g} is added to the sum inside the logarithm"
        forms[words] = f"log(sum(exp(x)) + {eps}) - sum(x * at)"
    yield from values(forms, names)
    yield from slipped(own, names)


def of_d_cross_entropy(call: Call) -> Iterator[Guess]:
    dy, logits, target = (call.slots[name].value for name in ("dy", "logits", "target"))
    real = call.around.real[..., None]
    at = (np.arange(logits.shape[-1]) == target[..., None]) * real
    shifted = logits - logits.max(axis=-1, keepdims=True)
    exps = np.exp(shifted)
    p = exps / row_sum(exps) * real
    names = {
        "d": dy[..., None], "p": p, "at": at, "real": real, "exps": exps * real,
        "shifted": shifted, "exp": np.exp, "sum": row_sum, "logits": logits * real,
        "own": np.maximum(row_sum(p * at), 1e-300), "log_p": np.log(np.maximum(p, 1e-300)) * real,
        "log": np.log,
    }  # fmt: skip
    forms = {
        "the - 1 at the target is missing: the softmax alone": "d * p",
        "the - 1 at the target is not weighted by dloss_t": "d * p - at",
        "the softmax is not weighted by dloss_t": "p - d * at",
        "the weights dloss_t are missing": "p - at",
        "the sign: the target minus the softmax": "d * (at - p)",
        "the softmax without its division": "d * (exps - at)",
        "the logits in place of their softmax": "d * (logits - at)",
        "the derivative is kept at the target alone": "d * (p - at) * at",
        "the softmax's own derivative is applied once more": (
            "d * p * ((p - at) - sum((p - at) * p))"
        ),
        "exp is differentiated by its input, not its output": (
            "d * (p - at) * shifted / exp(shifted)"
        ),
        "the derivative of the log is that of 1/log(p), not 1/p": (
            "d * (p - at) * (own / log(own))"
        ),
        "the log-probability in place of the probability": "d * (log_p - at)",
    }
    yield from values(forms, names)
    yield from slipped("d * (p - at)", names)


def of_scores(call: Call) -> Iterator[Guess]:
    a = call.around
    q, k = (call.slots[name].value for name in "qk")
    scale = call.slots["scale"].value
    for words, split in _splits(a):
        yield words, np.einsum("bthd,buhd->bhtu", split(q), split(k)) / scale
        yield f"{words}, of q only", np.einsum("bthd,buhd->bhtu", split(q), a.heads(k)) / scale
        yield f"{words}, of k only", np.einsum("bthd,buhd->bhtu", a.heads(q), split(k)) / scale
    own = np.einsum("bthd,buhd->bhtu", a.heads(q), a.heads(k)) / scale
    T = q.shape[1]
    every = all_layers_in_one(a, call.slots["k"].name)
    if every is not None:
        words = "the keys of all layers lie in one list"
        yield words, np.einsum("bthd,buhd->bhtu", a.heads(q), a.heads(every)) / scale
    back = (np.arange(T)[:, None] - np.arange(T)) % T
    yield (
        "keys are kept newest first",
        np.take_along_axis(own, np.broadcast_to(back, own.shape), axis=-1),
    )
    itself = np.diagonal(own, axis1=-2, axis2=-1)[..., None] * a.looked_at
    yield "each position's own key in place of the keys that it looks at", itself
    H = a.config.n_head
    yield (
        "all channels in every head: the heads are not separated",
        (np.einsum("btc,buc->btu", q, k)[:, None] / scale + np.zeros((1, H, 1, 1))),
    )
    norms = np.sqrt(row_sum(a.heads(q) ** 2)), np.sqrt(row_sum(a.heads(k) ** 2))
    unit = (a.heads(x) / np.maximum(norm, 1e-300) for x, norm in zip((q, k), norms))
    yield "cosine similarity: q and k are normalised", np.einsum("bthd,buhd->bhtu", *unit)
    products = np.einsum("bthd,buhd->bhtu", a.heads(q), a.heads(k))
    for words, other in scales(a):
        yield words, products / other


def scales(a: Around) -> Iterator[Guess]:
    """What logits may be divided by, in place of sqrt(D)."""
    config, T = a.config, a.real.shape[1]
    D, C, H = config.head_dim, config.n_embd, config.n_head
    named = {"D": D, "sqrt(n_embd)": sqrt(C), "n_embd": C, "sqrt(n_head)": sqrt(H), "n_head": H,
             "sqrt(T)": sqrt(T), "T": T, "the fourth root of D": D**0.25,
             "sqrt(block_size)": sqrt(config.block_size)}  # fmt: skip
    yield "not divided by sqrt(D)", 1.0
    yield "multiplied by sqrt(D), not divided", 1 / sqrt(D)
    for other in sorted(set(named.values())):
        names = [name for name, number in named.items() if number == other]
        yield f"divided by {' = '.join(names[:3])}, not by sqrt(D)", other


def _splits(a: Around) -> Iterator[tuple[str, Callable[[Array], Array]]]:
    """Other ways to take the channels of each head: (B, T, C) -> (B, T, H, D)."""
    D, H = a.config.head_dim, a.config.n_head
    if H == 1:
        return
    if D > 1:
        yield (
            "channels of different heads are interleaved: split as (D, H), not (H, D)",
            lambda x: x.reshape(*x.shape[:2], D, H).swapaxes(2, 3),
        )
    starts = {
        "a head begins one channel after the head before, not D channels": np.arange(H),
        "a head begins one channel too early": np.maximum(np.arange(H) * D - 1, 0),
        "a head begins one channel too late": np.arange(H) * D + 1,
        "every head has the channels of the first": np.zeros(H, int),
    }
    for words, start in starts.items():
        channels = start[:, None] + np.arange(D)  # (H, D)
        if (channels != np.arange(H * D).reshape(H, D)).any():
            yield words, partial(_channels, channels=channels)


def _channels(x: Array, channels: Array) -> Array:
    """These channels of the last axis, 0 for those that there are not."""
    C = x.shape[-1]
    return np.where(channels < C, x[..., np.minimum(channels, C - 1)], 0.0)


def _seen_only(a: Around, letters: str, weights: Array, v: Array) -> Array:
    """A product over the positions that are looked at; NaN where one of those is NaN."""
    missing: Array = np.isnan(v[:, :, 0, 0])  # (B, U)
    unknown: Array = missing[:, None, None] & a.looked_at  # (B, 1, T, U)
    out = np.einsum(letters, weights, np.nan_to_num(v))
    rows: Array = np.asarray(unknown[:, 0].any(axis=-1))  # (B, T)
    return np.where(rows[..., None, None], np.nan, out)


def all_layers_in_one(a: Around, name: str) -> Array | None:
    """(B, U, C): what is found at u if all layers put a tap into one list; or None.

    Layer i puts its own in after those before it, so at u lies that of layer u % L, position
    u // L.
    """
    layer, _, last = name.rpartition(".")
    L = a.config.n_layer
    if L < 2 or not layer:
        return None
    taps_of = [a[f"layer{i}.{last}"] for i in range(L)]
    U = taps_of[0].shape[1]
    found = np.stack([taps_of[u % L][:, u // L] for u in range(U)], axis=1)
    found[:, L:] = np.nan  # what later layers come to after the first wrong position is not known
    return found


def of_weighted_sum(call: Call) -> Iterator[Guess]:
    a = call.around
    weights, v = (call.slots[name].value for name in ("weights", "v"))
    out = np.einsum("bhtu,buhd->bthd", weights, a.heads(v))
    B, T, H, _ = out.shape
    t, u = np.arange(T)[:, None], np.arange(T)
    every = all_layers_in_one(a, call.slots["v"].name)
    if every is not None:
        words = "the values of all layers lie in one list"
        yield words, merge(_seen_only(a, "bhtu,buhd->bthd", weights, a.heads(every)))
    newest_first = np.take_along_axis(weights, np.broadcast_to((t - u) % T, weights.shape), axis=-1)
    yield (
        "values are kept newest first",
        merge(np.einsum("bhtu,buhd->bthd", np.where(a.looked_at, newest_first, 0.0), a.heads(v))),
    )
    if H > 1:
        words = "heads merged wrongly: channels of different heads are interleaved"
        yield words, out.swapaxes(2, 3).reshape(B, T, -1)
        yield (
            "heads merged wrongly: (B, H, T, D) is reshaped before H and T are exchanged",
            out.swapaxes(1, 2).reshape(B, T, -1),
        )
        for words, split in _splits(a):
            yield words, merge(np.einsum("bhtu,buhd->bthd", weights, split(v)))
        for h in range(H):
            same = np.broadcast_to(a.heads(v)[:, :, h : h + 1], out.shape)
            yield (
                f"the values of head {h} in every head",
                merge(np.einsum("bhtu,buhd->bthd", weights, same)),
            )
            one = np.broadcast_to(weights[:, h : h + 1], weights.shape)
            yield (
                f"the weights of head {h} in every head",
                merge(np.einsum("bhtu,buhd->bthd", one, a.heads(v))),
            )


def of_mean(call: Call) -> Iterator[Guess]:
    for words, weights in other_weights(call.around):
        yield words, np.asarray((call.slots["loss_t"].value * weights).sum())


def of_d_mean(call: Call) -> Iterator[Guess]:
    yield from other_weights(call.around)


def other_weights(a: Around) -> Iterator[Guess]:
    """What the loss of a position may count for, (B, T) each."""
    n, real = a.n[:, None], a.real
    B, T = real.shape
    if B > 1:
        yield "token mean for document mean: every token weighs the same", real / n.sum()
    yield "mean over B x T: padding is counted", real / (B * T)
    yield "sum over positions in place of their mean", real / B
    if B > 1:
        yield "sum over documents in place of their mean", real / n
        yield "the sum over documents divided by B - 1", real / (n * (B - 1))
    yield "sum over all tokens", real * 1.0
    yield "n + 1 in place of n: the mean counts one position too many", real / (B * (n + 1))
    if (n > 1).all() and B > 1:
        yield "one too few in both means: B - 1 and n - 1", real / ((B - 1) * (n - 1))
    if (n > 1).all():
        yield "n - 1 in place of n: the mean counts one position too few", real / (B * (n - 1))
    yield "divided by block_size in place of the positions", real / (B * a.config.block_size)
    t = np.arange(T)
    last = real & (t == n - 1)
    yield "only the last position counts", last / B
    yield "only the last position counts", last / (B * n)
    yield "only the first position counts", (real & (t == 0)) / (B * n)
    yield "the last position does not count", (real & ~last) / (B * n)
    yield "the last position does not count", (real & ~last) / (B * np.maximum(n - 1, 1))
    yield "the first position does not count", (real & (t > 0)) / (B * n)
    yield "the first position does not count", (real & (t > 0)) / (B * np.maximum(n - 1, 1))
    for b in range(B if B > 1 else 0):
        one = np.arange(B)[:, None] == b
        yield f"only document {b} counts", real * one / (B * n)
        yield f"only document {b} counts", real * one / n
        yield f"document {b} does not count", real * ~one / (B * n)


def micro_batch_weights(a: Around) -> Iterator[Guess]:
    """The same where documents, sorted by length, are cut in two or three, in every way."""
    B, real, n = len(a.n), a.real, a.n[:, None]
    order = np.argsort(a.n, kind="stable")
    cuts = [[i] for i in range(1, B)]
    cuts += [[i, j] for i in range(1, B) for j in range(i + 1, B)] if B <= 32 else []
    for cut in cuts:
        sizes = np.diff([0, *cut, B])
        size = np.empty((B, 1))  # of the micro-batch that a document is in
        size[order, 0] = np.repeat(sizes, sizes)
        listed = f"{', '.join(map(str, sizes[:-1]))} and {sizes[-1]} documents"
        if len(set(sizes.tolist())) > 1:
            words = f"mean of means: every micro-batch weighs the same, of {listed}"
            yield words, real / (len(sizes) * size * n)
        yield f"the means of the micro-batches are summed, of {listed}", real / (size * n)
    for start in range(B):
        for stop in range(start + 1, B + 1):
            if stop - start < B:
                counted = np.isin(np.arange(B), order[start:stop])[:, None]
                yield (
                    f"the micro-batches hold {stop - start} of {B} documents",
                    real * counted / (B * n),
                )


def of_embedding(call: Call) -> Iterator[Guess]:
    a = call.around
    wte, wpe = (call.slots[name].value for name in ("wte", "wpe"))
    token, position, T = a.token, a.position, a.real.shape[1]
    block = len(wpe)

    def with_positions(at: Array) -> Array:
        unknown = (at < 0) | (at >= block)
        rows = wpe[np.clip(at, 0, block - 1)]
        return np.where(unknown[..., None], np.nan, wte[token] + rows)

    shifted = "shifted by one position: wpe is one position"
    yield f"{shifted} ahead", with_positions(position + 1)
    yield f"{shifted} behind", with_positions(position - 1)
    yield (
        "padding in front: positions count from the longest document's end",
        with_positions(position + T - a.n[:, None]),
    )
    yield "every position has wpe[0]", with_positions(0 * position)
    yield "positions count from the end", with_positions(a.n[:, None] - 1 - position)
    yield "the token indexes wpe as well", with_positions(np.where(token < block, token, -1))
    yield "the token itself is shifted: the target's embedding", wte[a.target] + wpe[position]
    for words, other in {"token - 1": token - 1, "token + 1": token + 1}.items():
        yield f"wte[{words}] in place of wte[token]", wte[other % len(wte)] + wpe[position]
    before = np.where(position > 0, np.roll(token, 1, axis=1), 0)
    yield (
        "the token before in place of the token",
        np.where((position > 0)[..., None], wte[before] + wpe[position], np.nan),
    )
    yield "multiplied, not added", wte[token] * wpe[position]
    yield "wpe is subtracted", wte[token] - wpe[position]


def of_d_wte(call: Call) -> Iterator[Guess]:
    a = call.around
    dy, wte = (call.slots[name].value for name in ("dy", "wte"))
    once = "repeated tokens accumulated once: one occurrence counts, the others are lost"
    last = np.zeros_like(wte)
    last[a.token] = dy  # padding, which has token 0 and a derivative of 0, included
    yield once, last
    first, without = np.zeros_like(wte), np.zeros_like(wte)
    for b, t in reversed(np.argwhere(a.real).tolist()):
        first[a.token[b, t]] = dy[b, t]
    yield once, first
    for b, t in np.argwhere(a.real).tolist():
        without[a.token[b, t]] = dy[b, t]
    yield once, without
    by_target = np.zeros_like(wte)
    np.add.at(by_target, a.target, dy)
    yield "summed by target, not by token", by_target
    counts = np.zeros(len(wte))
    np.add.at(counts, a.token[a.real], 1)
    mean = np.zeros_like(wte)
    np.add.at(mean, a.token, dy)
    yield (
        "the mean over a token's occurrences, not their sum",
        mean / np.maximum(counts, 1)[:, None],
    )
    for axis, words in ((0, "document"), (1, "position")):
        for edge, index in (("first", 0), ("last", -1)):
            part = np.zeros_like(wte)
            np.add.at(part, a.token.take(index, axis=axis), dy.take(index, axis=axis))
            if a.token.shape[axis] > 1:
                yield f"only the {edge} {words} counts in the embedding's gradient", part


def of_d_wpe(call: Call) -> Iterator[Guess]:
    dy, wpe = (call.slots[name].value for name in ("dy", "wpe"))
    B, T, _ = dy.shape
    rows = dy.sum(axis=0)
    moved = np.zeros_like(wpe)
    moved[:T] = rows
    for label, by in (("later", -1), ("earlier", 1)):
        words = f"shifted by one position: each row has what belongs one row {label}"
        yield words, np.roll(moved, by, axis=0)
    if B > 1:
        for b in range(B):
            moved = np.zeros_like(wpe)
            moved[:T] = dy[b]
            yield f"only document {b} counts", moved
        moved = np.zeros_like(wpe)
        moved[:T] = rows / B
        yield "the mean over documents in place of their sum: 1/B", moved
        present = call.around.real.sum(axis=0)[:, None]
        moved[:T] = rows / np.maximum(present, 1)
        yield "the mean over the documents that are as long, in place of their sum", moved
    moved = np.zeros_like(wpe)
    moved[:] = rows.sum(axis=0)
    yield "every row has the sum over all positions", moved
    by_token = np.zeros_like(wpe)
    np.add.at(by_token, np.minimum(call.around.token, len(wpe) - 1), dy)
    yield "summed by token, not by position", by_token


def of_linear(call: Call) -> Iterator[Guess]:
    x, w = call.slots["x"], call.slots["w"]
    if x.value.shape[-1] == len(w.value):
        rest = sum((call.slots[name].value for name in ("res",) if name in call.slots), start=0.0)
        yield f"{w.name} is left out: {x.name} goes on as it is", x.value + rest


def of_d_input(call: Call) -> Iterator[Guess]:
    dy, w = call.slots["dy"], call.slots["w"]
    if dy.value.shape[-1] == w.value.shape[1]:
        yield f"{w.name} is left out: {dy.name} goes on as it is", dy.value


def of_d_weight(call: Call) -> Iterator[Guess]:
    dy, x, a = call.slots["dy"].value, call.slots["x"].value, call.around
    n, (B, T) = a.n[:, None, None], a.real.shape
    for words, weights in {
        "the mean over documents in place of their sum: 1/B": 1 / B,
        "the mean over positions in place of their sum": 1 / n,
        "the mean over T positions, padding counted, in place of their sum: 1/T": 1 / T,
        "the mean over documents and positions in place of their sum": 1 / a.real.sum(),
        "each document's part times its positions n: weighted a second time": 1.0 * n,
    }.items():
        yield words, np.einsum("bto,bti->oi", dy * weights, x)
    if B > 1:
        summed = dy.sum(axis=0), x.sum(axis=0)
        yield "summed over documents before the product, not after", np.einsum("to,ti->oi", *summed)
    if T > 1:
        summed = dy.sum(axis=1), x.sum(axis=1)
        yield "summed over positions before the product, not after", np.einsum("bo,bi->oi", *summed)
    outer = np.einsum("bto,bti->oi", x, dy)
    if outer.shape == (dy.shape[-1], x.shape[-1]):
        yield "transposed: x dy^T in place of dy x^T", outer


OTHER_FORMS: dict[str, Callable[[Call], Iterator[Guess]]] = {
    "embedding": of_embedding,
    "d_wte": of_d_wte,
    "d_wpe": of_d_wpe,
    "rmsnorm": of_rmsnorm,
    "d_rmsnorm": of_d_rmsnorm,
    "linear": of_linear,
    "linear_residual": of_linear,
    "d_input": of_d_input,
    "d_weight": of_d_weight,
    "scores": of_scores,
    "softmax": of_softmax,
    "d_softmax": of_d_softmax,
    "weighted_sum": of_weighted_sum,
    "activation": of_activation,
    "d_activation": of_d_activation,
    "cross_entropy": of_cross_entropy,
    "d_cross_entropy": of_d_cross_entropy,
    "mean": of_mean,
    "d_mean": of_d_mean,
}


# --- an operand exchanged ------------------------------------------------------------------------


def alternatives(call: Call, name: str, earlier: Step, before: Step | None) -> Iterator[Guess]:
    """What may stand in the place of an argument of an operation, and how that is called.

    earlier    what the step has computed before
    before     the step before
    """
    a, slot = call.around, call.slots[name]
    own = slot.name
    if name == "target":
        yield from _other_targets(a)
    if name == "scale" and not slot.is_tensor:
        yield from scales(a)
    if not slot.is_tensor or slot.axes[-1] == "1":
        return
    x = slot.value
    of_param = f"entry/{own}" in a.step
    if x.ndim > 1 and x.shape[-1] == x.shape[-2] and (of_param or "U" in slot.axes):
        turned = x.swapaxes(-1, -2)
        if "U" in slot.axes:  # what the rows of padding hold is not known
            turned = np.where(unpadded(a), turned, np.nan)
        yield f"{own} transposed", turned
    yield from _of_the_same_shape(call, slot, earlier)
    if own.endswith("attn_weights") and name == "weights":
        prefix = own.rpartition(".")[0]
        dout, v = (a.heads(a.step[f"backward/d{prefix}.attn_out"]), a.heads(a[f"{prefix}.v"]))
        dweights = np.einsum("bthd,buhd->bhtu", dout, v)  # positions to come included
        yield f"d{own} in place of {own}", np.where(unpadded(a), dweights, np.nan)
    if not of_param:
        yield from _only_a_term(a, own)
        yield from rearranged(a, own, x, slot.axes)
        yield from restricted(a, own, x, slot.axes)
    if of_param and x.ndim > 1:
        for key, tensor in a.step.items():
            if key.startswith("entry/") and tensor.shape == x.shape[::-1] and key != f"entry/{own}":
                yield f"{key.partition('/')[2]} transposed in place of {own}", tensor.T
    elif x.ndim == 3:
        yield f"{own} is normalised first", x * (row_mean(x * x) + a.config.norm_eps) ** -0.5
        for kind, words in ACTIVATIONS.items():
            yield f"{kind} of {own} in place of {own}", elementwise(words.value, x)
    if x.ndim > 1:
        yield f"the square of {own}", x * x
    yield f"{own} is left out: 1 in its place", np.ones_like(x)
    yield f"the absolute value of {own}", np.abs(x)
    if before is not None:
        for phase in ("entry", "forward", "backward"):
            was = before.get(f"{phase}/{own}")
            if was is not None and was.shape == x.shape:
                yield f"{own} of the step before", was
    if of_param and f"params/{own}" in a.step:
        yield f"{own} after the update, not before", a.step[f"params/{own}"]


def _of_the_same_shape(call: Call, slot: Slot, earlier: Step) -> Iterator[Guess]:
    """Other tensors, the same one in other layers first."""
    step, own = call.around.step, slot.name
    kind = "entry" if f"entry/{own}" in step else "backward" if own[0] == "d" else "forward"
    if f"{kind}/{own}" not in step:
        kind = "forward"
    phases = (
        ["entry"] if kind == "entry" else [kind, "backward" if kind == "forward" else "forward"]
    )
    last = own.rpartition(".")[2].removeprefix("d" if kind == "backward" else "")
    for phase in phases:
        found = [
            (key.partition("/")[2], tensor)
            for key, tensor in earlier.items()
            if key.startswith(f"{phase}/")
            and tensor.shape == slot.value.shape
            and key.partition("/")[2] != own
            and _axes(key) == slot.axes
        ]
        same_tap = [pair for pair in found if pair[0].rpartition(".")[2].endswith(last)]
        rest = [pair for pair in found if pair not in same_tap] if same_tap else found
        for name, tensor in [*same_tap, *rest]:
            yield f"{name} in place of {own}", tensor


def _only_a_term(a: Around, name: str) -> Iterator[Guess]:
    """A tap or a derivative that has lost one of the terms of which it is the sum."""
    derived = f"backward/{name}" in a.step
    key = f"{'backward' if derived else 'forward'}/{name}"
    if key not in a.step:
        return
    parts = calls(a, key)
    terms = {label or one.label: term for one in parts for label, term in one.terms().items()}
    if len(terms) > 1:
        for label, term in terms.items():
            yield f"{name} goes on without {label}", a.step[key] - term


def _axes(key: str) -> tuple[str, ...]:
    phase, _, name = key.partition("/")
    return axes_of(name.removeprefix("d") if phase == "backward" else name)


def _other_targets(a: Around) -> Iterator[Guess]:
    yield "the target is the token itself, not the next", a.token
    ahead = np.roll(a.target, -1, axis=1)
    yield "the target is one position too far", ahead
    V = a["logits"].shape[-1]
    yield "the target is one token id too low", (a.target - 1) % V
    yield "the target is one token id too high", (a.target + 1) % V
    yield "the target is one position too early", np.roll(a.target, 1, axis=1)
    if len(a.target) > 1:
        yield "the targets are those of the first document", a.target[:1] + 0 * a.target
        yield "the targets are those of the next document", np.roll(a.target, -1, axis=0)
        yield "the targets are those of the document before", np.roll(a.target, 1, axis=0)
    yield "the target is the largest logit's token", a["logits"].argmax(axis=-1)


def rearranged(a: Around, name: str, x: Array, axes: tuple[str, ...]) -> Iterator[Guess]:
    """The same numbers in another order: positions, documents, heads."""
    if axes[:1] != ("B",):
        return
    B, H, D = len(x), a.config.n_head, a.config.head_dim
    if "T" in axes:
        t = axes.index("T")
        if x.shape[t] > 1:
            yield f"{name} of the position before", np.roll(x, 1, axis=t)
            yield f"{name} of the position after", np.roll(x, -1, axis=t)
            first = x.take([0], axis=t) + 0 * x
            yield f"{name} of the first position at every position", first
            last = np.take_along_axis(x, _shaped(a.n - 1, x.ndim), axis=t) + 0 * x
            yield f"{name} of the last position at every position", last
    if B > 1:
        yield f"{name} of the next document", np.roll(x, -1, axis=0)
        yield f"{name} of the document before", np.roll(x, 1, axis=0)
        for b in range(B):
            yield f"{name} of document {b} in every document", x[b : b + 1] + 0 * x
    if H > 1 and (by_head := _by_head(a, x, axes)) is not None:
        heads, axis = by_head
        for words, moved in {
            f"{name} of the next head": np.roll(heads, -1, axis=axis),
            f"{name} of the head before": np.roll(heads, 1, axis=axis),
            f"{name} of the first head in every head": heads.take([0], axis=axis) + 0 * heads,
            f"{name} of the last head in every head": heads.take([H - 1], axis=axis) + 0 * heads,
            f"{name} with its heads in reverse": np.flip(heads, axis=axis),
        }.items():
            yield words, moved.reshape(x.shape)
        if axis == 2 and D > 1:
            dealt = x.reshape(*x.shape[:2], D, H).swapaxes(2, 3).reshape(x.shape)
            yield f"{name} with channels of different heads interleaved", dealt
            dealt = heads.swapaxes(2, 3).reshape(x.shape)
            yield f"{name} with channels of different heads interleaved", dealt
            mixed = heads.swapaxes(1, 2).reshape(x.shape)
            yield f"{name} reshaped from (B, H, T, D) before H and T are exchanged", mixed


def _shaped(n: Array, ndim: int) -> Array:
    return n.reshape(-1, *[1] * (ndim - 1))


def _by_head(a: Around, x: Array, axes: tuple[str, ...]) -> tuple[Array, int] | None:
    if "H" in axes:
        return x, axes.index("H")
    if axes[-1] == "C":
        return a.heads(x), x.ndim - 1
    return None


def restricted(a: Around, name: str, x: Array, axes: tuple[str, ...]) -> Iterator[Guess]:
    """Zero but for some positions, or for all but some: sums that leave out part of their range."""
    if axes[:1] != ("B",) or "T" not in axes:
        return
    if "U" in axes:
        T = x.shape[-1]
        if T > 1:
            eye = np.eye(T, dtype=bool)
            yield f"only each position's own {name}, where u = t, counts", x * eye
            yield f"each position's own {name}, where u = t, is left out", x * ~eye
            u, t = np.arange(T), np.arange(T)[:, None]
            yield f"only the first position's part of {name} counts", x * (u == 0)
            yield f"the first position's part of {name} is left out", x * (u > 0)
            yield f"only the position before's part of {name} counts", x * (u == t - 1)
    t = np.arange(x.shape[axes.index("T")])
    n = a.n[:, None]
    if len(t) < 2:
        return
    places = {"last": t == n - 1, "first": np.broadcast_to(t == 0, a.real.shape)}
    for words, place in places.items():
        mask = (
            place[:, None, :, None]
            if "H" in axes
            else place.reshape(*place.shape, *[1] * (x.ndim - 2))
        )
        yield f"only the {words} position of {name} counts", x * mask
        yield f"the {words} position of {name} is left out", x * ~mask
