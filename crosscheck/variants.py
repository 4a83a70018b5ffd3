"""Wrong forms of every operation: what people compute instead, each as a guess at numbers.

A guess is a sentence and the tensor that the wrong form leads to. An element that a guess cannot
know, since a trace does not hold what padding holds, is NaN. A function of_NAME gives the guesses
of the operation NAME (crosscheck.operations).

A table has a line "formula | sentence" for each wrong form. A formula is Python; its names are the
arguments of the operation and what `known` adds. Where a sentence has a letter in braces, such as
{c} for a constant or {b} for a document, there is a guess for each of them. A formula without a
sentence is the right one: each of its slips (crosscheck.formulas) is a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import combinations
from math import erf, log, nan, sqrt
from typing import Any

import numpy as np

from crosscheck.formulas import Mechanical, slipped, value
from crosscheck.operations import (
    ELEMENTARY,
    Around,
    Call,
    Slot,
    calls,
    cross_entropy,
    elementwise,
    merge,
    row_mean,
    row_sum,
    softmax,
)
from crosscheck.trace import Array, Step, axes
from microgpt.taps import ACTIVATIONS, taps

Guess = tuple[str, Any]  # a sentence, and the numbers that it leads to

# that are put anywhere, as they are written
CONSTANTS = {f"{c}": c for c in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-12)}
LIKELY = {"y": ["x"], "dy": ["y"]}  # for a name of a right formula, what is written in its place


def known(call: Call, **more: Any) -> dict[str, Any]:
    """What the names in the formulas of a table stand for."""
    a = call.around
    B, T = a.real.shape
    return {
        **ELEMENTARY, "abs": np.abs, "maximum": np.maximum, "where": np.where, "roll": np.roll,
        "B": B, "T": T, "n": a.n[:, None],
        "real": a.real, "token": a.token, "target": a.target, "position": a.position,
        "total": call.total, "c": CONSTANTS, "b": {b: b for b in range(B) if B > 1},
        **{name: slot.value for name, slot in call.slots.items()}, **more,
    }  # fmt: skip


def of_table(table: str, names: Mapping[str, Any]) -> Iterator[Guess]:
    """The guesses of a table, line by line."""
    for line in table.strip().splitlines():
        formula, _, words = (part.strip() for part in line.partition(" | "))
        if not words:
            yield from slipped(formula, names, LIKELY)
            continue
        each = re.search(r"\{(\w)\}", words)
        for shown, one in names[each[1]].items() if each else [("", 0)]:
            letter = each[1] if each else ""
            yield words.format_map({**names, letter: shown}), value(formula, {**names, letter: one})


# --- an operation by another formula -------------------------------------------------------------

RMSNORM = """
x / (ms ** 0.5 + eps)          | eps in the wrong place: added to the root, not under it
x / ms ** 0.5                  | eps is missing under the root
x / (n * ms + eps) ** 0.5      | the sum of squares in place of their mean
x / (ms * n / (n + 1) + eps) ** 0.5    | n + 1 in place of n in the mean
x / (ms + eps)                 | the root is missing
x * (ms + eps) ** 0.5          | multiplied by the root mean square in place of divided by it
centred / (var + eps) ** 0.5   | mean subtracted: this is a LayerNorm
x / (var + eps) ** 0.5         | divided by the standard deviation, the mean not subtracted
centred / (ms + eps) ** 0.5    | the mean is subtracted, and the norm is of what was before
x                              | not normalised
y / (mean(y * y) + eps) ** 0.5 | normalised twice
x / (mean(abs(x)) + eps)       | the mean of |x| in place of the root of the mean square
x / (whole + eps) ** 0.5       | one mean over all positions, not one for each
x / (over_t + eps) ** 0.5      | the mean square over the positions, not over the channels
x / (ms * n / less + eps) ** 0.5       | n - 1 in place of n in the mean
centred / (var * n / less + eps) ** 0.5 | a LayerNorm that divides by n - 1: the mean is subtracted
x / (ms + 1e-2) ** 0.5         | eps is 0.01, not {eps:g}
x / (ms + c) ** 0.5            | eps is {c}, not {eps:g}
x / (ms + e) ** 0.5            | eps enters as {e}
x * (mean(x * x) + eps) ** -0.5
"""


def of_rmsnorm(call: Call) -> Iterator[Guess]:
    x, eps, a = call.slots["x"].value, call.slots["eps"].value, call.around
    ms, n, centred = row_mean(x * x), x.shape[-1], x - row_mean(x)
    over_t = (x * x).sum(axis=1, keepdims=True) / a.n[:, None, None]
    yield from of_table(RMSNORM, known(
        call, ms=ms, n=n, less=n - 1 or nan, centred=centred, var=row_mean(centred**2),
        y=x * (ms + eps) ** -0.5, whole=(x * x)[a.real].mean(), over_t=over_t,
        e={"eps ** 0.5": eps**0.5, "eps ** 2": eps**2, "n * eps": n * eps, "eps / n": eps / n,
           "2 * eps": 2 * eps, "-eps": -eps},
    ))  # fmt: skip


D_RMSNORM = """
scale * dy                       | the second term of the norm's derivative is missing
dy                               | the norm is passed as if it were not there
scale * (dy + y * mean(dy * y))  | the sign of the second term of the norm's derivative
scale * (dy - y * sum(dy * y))   | a sum in place of the mean in the norm's derivative
dy - y * mean(dy * y)            | the norm's derivative lacks the factor scale
scale * (dy - mean(dy * y))      | the factor y is missing {lost}
scale * (dy - y * mean(dy))      | mean(dy) in place of mean(dy * y) {lost}
scale * (dy - y * mean(y * y))   | mean(y) in place of mean(dy * y) {lost}
scale * dy - y * mean(dy * y)    | 1 in place of scale {lost}
scale * (dy - x * mean(dy * x))  | x in place of y in the norm's derivative
scale * (dy - x * mean(dy * y))  | x in place of y before the mean {lost}
scale * (dy - y * mean(dy * x))  | x in place of y inside the mean {lost}
scale ** 2 * (dy - y * mean(dy * y)) | scale^2 in place of scale in the norm's derivative
(dy - y * mean(dy * y)) / scale  | divided by scale in place of multiplied in the norm's derivative
scale * (dy - mean(dy) - y * mean(dy * y)) | the derivative of a LayerNorm
scale * (dy - y * over_t)        | the mean over positions, not over channels, {lost}
scale * dy - scale ** k * y * mean(dy * y) | scale^{k} in place of scale {lost}
scale * (dy - y * mean(dy * y))
"""


def of_d_rmsnorm(call: Call) -> Iterator[Guess]:
    dy, y, scale = (call.slots[name].value for name in ("dy", "y", "scale"))
    a, own = call.around, call.slots["y"].name
    over_t = (dy * y).sum(axis=1, keepdims=True) / a.n[:, None, None]
    lost = "in the second term of the norm's derivative"
    powers = {k: k for k in (2, 3, 4)}
    yield from of_table(D_RMSNORM, known(call, x=y / scale, over_t=over_t, k=powers, lost=lost))
    for tap in taps(a.config).values():
        if tap.operation == "rmsnorm" and tap.name != own:
            x = a[tap.operands[0]]
            scale = (row_mean(x * x) + a.config.norm_eps) ** -0.5
            yield f"the scale of {tap.name} in place of that of {own}", call.total(scale=scale)
            yield (
                f"{tap.name} and its scale in place of {own}",
                call.total(y=a[tap.name], scale=scale),
            )


SOFTMAX = """
late / row(late)     | the mask is missing or comes after the softmax: positions to come take part
upper / row(upper)   | positions to come take part with a logit of 0: masked by 0, not by -inf
seen / over_queries(seen) | each column sums to one, not each row: the softmax runs over the queries
exps                 | not normalised: softmax without its division
exp(x)               | not normalised: softmax without its division, and without the max
full(x) / over_heads(full(x))  | the softmax runs over the heads
1 / (1 + full(-x))   | a sigmoid in place of the softmax
exps / sum(exps ** 2) ** 0.5   | normalised by the root of the sum of squares
softmax(y)           | the softmax is taken twice
x / sum(x)           | the logits are divided by their sum, without exp
log(y)               | log-softmax: the exp after it is missing
exps / (sum(exps) + c)       | {c} is added to the sum that the softmax divides by
(exps + c) / sum(exps + c)   | {c} is added to each exp of the softmax
softmax(x * f)       | the logits are multiplied by {f} once more before the softmax
exp(x - max(x)) / sum(exp(x - max(x)))
"""


def of_softmax(call: Call) -> Iterator[Guess]:
    x, looked_at = call.slots["x"].value, call.around.looked_at

    def exp(x: Array) -> Array:
        return np.where(looked_at, np.exp(np.minimum(np.where(looked_at, x, 0.0), 700)), 0.0)

    def largest(x: Array) -> Array:
        return np.where(looked_at, x, -1e300).max(axis=-1, keepdims=True)

    def total(x: Array) -> Array:
        return np.maximum(row_sum(np.where(looked_at, x, 0.0)), 1e-300)

    def of_rows(x: Array) -> Array:
        return exp(x - largest(x)) / total(exp(x - largest(x)))

    D, C = call.around.config.head_dim, call.around.config.n_embd
    factors = {"sqrt(D)": D**0.5, "1/sqrt(D)": D**-0.5, "2": 2, "1/2": 0.5, "-1": -1, "D": D,
               "1/D": 1 / D, "sqrt(C)": C**0.5, "1/sqrt(C)": C**-0.5}  # fmt: skip
    late = np.exp(_unmasked_logits(call))
    lower = np.tri(x.shape[-1], dtype=bool)
    yield from of_table(SOFTMAX, known(
        call, exp=exp, max=largest, sum=total, softmax=of_rows, y=of_rows(x),
        exps=exp(x - largest(x)), full=np.exp, row=row_sum, late=late,
        upper=np.where(lower, late, 1.0), seen=np.where(lower, late, 0.0),
        log=lambda x: np.log(np.maximum(x, 1e-300)),
        over_queries=lambda x: np.maximum(x.sum(axis=-2, keepdims=True), 1e-300),
        over_heads=lambda x: x.sum(axis=1, keepdims=True), f=factors,
    ))  # fmt: skip


OVERFLOWS = "exp overflows: the maximum is not subtracted first"


def overflowing(call: Call, dtype: np.dtype) -> Iterator[Guess]:
    """A softmax, or the loss of one, without the maximum, whose exps overflow in that precision."""
    if call.function not in (softmax, cross_entropy):
        return
    of_logits = call.function is cross_entropy
    x = call.slots["logits" if of_logits else "x"].value
    seen = call.around.real[..., None] if of_logits else call.around.looked_at
    exps = np.exp(np.where(seen, x, -np.inf).astype(dtype))
    probs = exps / row_sum(exps)
    if of_logits:
        target = call.slots["target"].value[..., None]
        yield OVERFLOWS, -np.log(np.take_along_axis(probs, target, axis=-1)[..., 0])
    else:
        yield OVERFLOWS, probs


def _unmasked_logits(call: Call) -> Array:
    """All q . k / sqrt(D), positions to come included; NaN in documents with padding."""
    a, prefix = call.around, call.slots["x"].name.rpartition(".")[0]
    q, k = (a.heads(a[f"{prefix}.{name}"]) for name in "qk")
    logits = np.einsum("bthd,buhd->bhtu", q, k) / sqrt(a.config.head_dim)
    return np.where(unpadded(a), logits - logits.max(), np.nan)


def unpadded(a: Around) -> Array:
    """(B, 1, 1, 1): the documents that are as long as the longest."""
    return (a.n == a.real.shape[1]).reshape(-1, 1, 1, 1)


def _unmasked_derivative(a: Around, prefix: str) -> Array:
    """All dout . v, positions to come included; NaN in documents with padding."""
    dout, v = a.heads(a.step[f"backward/d{prefix}.attn_out"]), a.heads(a[f"{prefix}.v"])
    return np.where(unpadded(a), np.einsum("bthd,buhd->bhtu", dout, v), np.nan)


D_SOFTMAX = """
y * dy                      | missing: the sum over the row {end}
y * (dy - sum(dy))          | sum(dy) in place of sum(dy * y) {end}
y * (dy - sum(all_dy))      | sum(dy) in place of sum(dy * y), positions to come included, {end}
dy - sum(dy * y)            | the factor y is missing {end}
y * (1 - y) * dy | y (1 - y) dy is the derivative of a sigmoid: the rest of the row is left out
y * dy - sum(dy * y)        | the factor y is missing before the sum {end}
dy                          | the softmax is passed as if it were not there
y * (dy + sum(dy * y))      | the sign of the sum over the row {end}
y * (dy - sum(dy * y) / T)  | a mean over all T positions in place of the sum over the row {end}
y * (dy - mean(dy * y))     | a mean in place of the sum over the row {end}
y * (dy - column(dy * y))   | the sum over the column in place of the row {end}
y * (dy - heads(dy * y))    | the sum over the heads in place of the row {end}
y * dy - y * y * sum(dy * y) | y squared before the sum over the row {end}
x * (dy - sum(dy * x))      | the softmax's input in place of its output {end}
y * (dy - sum(dy * y)) / exp(shifted) * shifted | exp is differentiated by its input, {by_output}
exps * (dy - sum(dy * exps)) | exp(x), which is not divided by the sum, in place of y {end}
y * (dy - sum(dy * y))
"""


def of_d_softmax(call: Call) -> Iterator[Guess]:
    a, name = call.around, call.slots["y"].name
    x = a.step[f"forward/{name.replace('attn_weights', 'attn_logits')}"]
    largest = np.where(a.looked_at, x, -1e300).max(axis=-1, keepdims=True)
    end = "in the softmax's derivative"
    yield from of_table(D_SOFTMAX, known(
        call, x=x, all_dy=_unmasked_derivative(a, name.rpartition(".")[0]),
        shifted=np.where(a.looked_at, x - largest, 0.0),
        exps=np.where(a.looked_at, np.exp(x), 0.0),
        mean=lambda x: row_sum(x) / np.arange(1, x.shape[-1] + 1)[:, None],
        column=lambda x: x.sum(axis=-2, keepdims=True),
        heads=lambda x: x.sum(axis=1, keepdims=True),
        end=end, by_output=f"not its output, {end}",
    ))  # fmt: skip


KINDS = [  # other activations: name, value, slope
    ("no activation at all", "x", "1 + 0 * x"),
    ("a leaky ReLU of slope 0.01", "where(x > 0, x, 0.01 * x)", "where(x > 0, 1, 0.01)"),
    ("a leaky ReLU of slope 0.1", "where(x > 0, x, 0.1 * x)", "where(x > 0, 1, 0.1)"),
    ("the absolute value", "abs(x)", "sign(x)"),
    ("the square", "x * x", "2 * x"),
    ("a cubed ReLU", "relu(x) ** 3", "3 * relu(x) ** 2"),
    ("tanh", "tanh(x)", "1 - tanh(x) ** 2"),
    ("a sigmoid", "sigmoid(x)", "sigmoid(x) * sigmoid(-x)"),
    ("SiLU", "x * sigmoid(x)", "sigmoid(x) * (1 + x * sigmoid(-x))"),
    ("the sigmoid form of GELU, x sigmoid(1.702 x)", "x * sigmoid(1.702 * x)",
     "sigmoid(1.702 * x) * (1 + 1.702 * x * sigmoid(-1.702 * x))"),
    ("GELU by erf", "x * normal(x)", "normal(x) + x * exp(-x * x / 2) / (2 * pi) ** 0.5"),
    ("softplus", "log(1 + exp(x))", "sigmoid(x)"),
    ("ELU", "where(x > 0, x, exp(x) - 1)", "where(x > 0, 1, exp(x))"),
    ("a step", "(x > 0) * 1.0", "0 * x"),
    ("a ReLU with its sign turned", "-relu(-x)", "(x < 0) * 1.0"),
]  # fmt: skip


def _normal(x: Array) -> Array:
    """The distribution function of the normal distribution."""
    return np.array([0.5 * (1 + erf(number / sqrt(2))) for number in x.ravel()]).reshape(x.shape)


def of_activation(call: Call) -> Iterator[Guess]:
    own, others = call.slots["kind"].value, [(k, *a) for k, a in ACTIVATIONS.items()]
    names = known(call, sigmoid=lambda x: 1 / (1 + np.exp(-x)), normal=_normal)
    for kind, formula, _ in (*others, *KINDS):
        if kind != own:
            yield f"{kind} in place of {own}", value(formula, names)
    for words, wrong in slipped(ACTIVATIONS[own].value, names):
        yield Mechanical(f"in {own}, {words}"), wrong


D_ACTIVATION = """
dy * twice             | the factor 2 of the square's derivative is missing
dy                     | the slope of the activation is left out: it is taken to be 1
dy * (dy > 0)          | the slope is taken from the derivative that comes in, not from x
dy * on_the_kink       | the slope is 1 at x = 0, where it is 0
dy * slope_of(y)       | the slope is taken from the output, not from x
dy * y                 | the output in place of the slope
maximum(dy, 0) * slope | only positive derivatives are passed on
dy * slope ** 2        | the slope is squared
slope                  | the slope without what comes in
"""


def of_d_activation(call: Call) -> Iterator[Guess]:
    x, own = (call.slots[name].value for name in ("x", "kind"))
    names = known(
        call, sigmoid=lambda x: 1 / (1 + np.exp(-x)), normal=_normal, sign=np.sign,
        y=elementwise(ACTIVATIONS[own].value, x), slope=elementwise(ACTIVATIONS[own].slope, x),
        slope_of=lambda y: elementwise(ACTIVATIONS[own].slope, y),
        twice=np.maximum(x, 0) if own == "squared_relu" else nan,
        on_the_kink=x >= 0 if own == "relu" else nan,
    )  # fmt: skip
    yield from of_table(D_ACTIVATION, names)
    for kind in ACTIVATIONS:
        if kind != own:
            yield f"the slope of {kind} in place of that of {own}", call.total(kind=kind)
    for words, wrong in slipped(ACTIVATIONS[own].slope, names):
        yield Mechanical(f"in the slope of {own}, {words}"), call.slots["dy"].value * wrong
    for name, _, formula in KINDS[1:]:  # the first has a line in D_ACTIVATION
        yield f"the slope is that of {name}", call.slots["dy"].value * value(formula, names)


CROSS_ENTROPY = """
(log(sum(exp(x))) - sum(x * at)) / ln(2)   | log2 in place of ln
(log(sum(exp(x))) - sum(x * at)) / ln(10)  | log10 in place of ln
1 - sum(p * at)                       | the logarithm is missing: 1 - p
-sum(p * at)                          | the logarithm is missing: -p
sum(x * at) - log(sum(exp(x)))        | the sign: log(p) in place of -log(p)
-sum(logits * at)                     | the softmax is missing: -logits[target]
-sum(x * at)                          | log(sum(exp)) is missing
log(sum(exp(x))) - sum(logits * at)   | the largest logit is subtracted from one term only
log(sum(exp(x)))                      | the logit of the target is missing: log(sum(exp)) alone
log(sum(exp(p))) - sum(p * at)        | the softmax is taken twice
-sum(log(p))                          | the sum over all tokens, not the target's alone
-mean(log(p))                         | the mean over all tokens, not the target's alone
sum((p - at) ** 2)                    | squared error in place of cross entropy
log(sum(exp(x)) + c) - sum(x * at)    | {c} is added to the sum inside the logarithm
log(sum(exp(x))) - sum(x * at)
"""


def of_cross_entropy(call: Call) -> Iterator[Guess]:
    logits, target = call.slots["logits"].value, call.slots["target"].value
    x = logits - logits.max(axis=-1, keepdims=True)
    yield from of_table(CROSS_ENTROPY, known(
        call, x=x, p=np.exp(x) / row_sum(np.exp(x)), ln=log,
        at=(np.arange(x.shape[-1]) == target[..., None]).astype("float64"),
        sum=lambda x: x.sum(axis=-1), mean=lambda x: x.mean(axis=-1),
    ))  # fmt: skip


D_CROSS_ENTROPY = """
d * p                  | the - 1 at the target is missing: the softmax alone
d * p - at             | the - 1 at the target is not weighted by dloss_t
p - d * at             | the softmax is not weighted by dloss_t
p - at                 | the weights dloss_t are missing
d * (at - p)           | the sign: the target minus the softmax
d * (exps - at)        | the softmax without its division
d * (logits - at)      | the logits in place of their softmax
d * (p - at) * at      | the derivative is kept at the target alone
d * p * ((p - at) - sum((p - at) * p)) | the softmax's own derivative is applied once more
d * (p - at) * shifted / exp(shifted)  | exp is differentiated by its input, not its output
d * (p - at) * (own / log(own))        | the derivative of the log is that of 1/log(p), not 1/p
d * (log_p - at)       | the log-probability in place of the probability
d * (p - at)
"""


def of_d_cross_entropy(call: Call) -> Iterator[Guess]:
    dy, logits, target = (call.slots[name].value for name in ("dy", "logits", "target"))
    real = call.around.real[..., None]
    at = (np.arange(logits.shape[-1]) == target[..., None]) * real
    shifted = logits - logits.max(axis=-1, keepdims=True)
    p = np.exp(shifted) / row_sum(np.exp(shifted)) * real
    yield from of_table(D_CROSS_ENTROPY, known(
        call, d=dy[..., None], p=p, at=at, shifted=shifted, exps=np.exp(shifted) * real,
        logits=logits * real, own=np.maximum(row_sum(p * at), 1e-300),
        log_p=np.log(np.maximum(p, 1e-300)) * real,
    ))  # fmt: skip


def of_scores(call: Call) -> Iterator[Guess]:
    a, q, k = call.around, call.slots["q"].value, call.slots["k"].value
    for words, split in _splits(a):
        yield words, call.total(q=split(q), k=split(k))
        yield f"{words}, of q only", call.total(q=split(q))
        yield f"{words}, of k only", call.total(k=split(k))
    T, scale = q.shape[1], call.slots["scale"].value
    own = np.einsum("bthd,buhd->bhtu", a.heads(q), a.heads(k)) / scale  # positions to come included
    if (every := all_layers_in_one(a, call.slots["k"].name)) is not None:
        yield "the keys of all layers lie in one list", call.total(k=every)
    back = np.broadcast_to((np.arange(T)[:, None] - np.arange(T)) % T, own.shape)
    yield "keys are kept newest first", np.take_along_axis(own, back, axis=-1)
    itself = np.diagonal(own, axis1=-2, axis2=-1)[..., None] * a.looked_at
    yield "each position's own key in place of the keys that it looks at", itself
    whole = np.einsum("btc,buc->btu", q, k)[:, None] / scale + 0 * own
    yield "all channels in every head: the heads are not separated", whole
    unit = {name: merge(a.heads(x) / np.maximum(np.sqrt(row_sum(a.heads(x) ** 2)), 1e-300))
            for name, x in (("q", q), ("k", k))}  # fmt: skip
    yield "cosine similarity: q and k are normalised", call.total(**unit, scale=1.0)
    for words, other in scales(a):
        yield words, call.total(scale=other)


def scales(a: Around) -> Iterator[Guess]:
    """What attention logits may be divided by, in place of sqrt(D)."""
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
    """Other ways to deal the channels to the heads: (B, T, C) -> (B, T, C)."""
    D, H = a.config.head_dim, a.config.n_head
    if H == 1:
        return
    own, d = np.arange(H * D).reshape(H, D), np.arange(D)
    ways = {
        "channels of different heads are interleaved: split as (D, H), not (H, D)":
            own.reshape(D, H).T,
        "a head begins one channel after the head before, not D channels": own // D + d,
        "a head begins one channel too early": np.maximum(own[:, :1] - 1, 0) + d,
        "a head begins one channel too late": own + 1,
        "every head has the channels of the first": d + 0 * own,
    }  # fmt: skip
    for words, channels in ways.items():
        if (channels != own).any():
            yield words, partial(_channels, channels=channels.reshape(-1))


def _channels(x: Array, channels: Array) -> Array:
    """The channels of these numbers, 0 for a number that is too large."""
    C = x.shape[-1]
    return np.where(channels < C, x[..., np.minimum(channels, C - 1)], 0.0)


def all_layers_in_one(a: Around, name: str) -> Array | None:
    """(B, U, C): what is found at u if all layers put a tap into one list; or None.

    Layer i appends its own behind those of the layers before it, so at u lies that of layer u % L,
    position u // L.
    """
    layer, _, last = name.rpartition(".")
    L = a.config.n_layer
    if L < 2 or not layer:
        return None
    of_layers: list[Array] = [a[f"layer{i}.{last}"] for i in range(L)]
    found = np.stack([of_layers[u % L][:, u // L] for u in range(of_layers[0].shape[1])], axis=1)
    found[:, L:] = np.nan  # what later layers make of the first wrong position is not known
    return found


def of_weighted_sum(call: Call) -> Iterator[Guess]:
    a, weights, v = call.around, call.slots["weights"].value, call.slots["v"].value
    heads, out = a.heads(v), a.heads(call.total())
    B, T, H, _ = out.shape
    if (every := all_layers_in_one(a, call.slots["v"].name)) is not None:
        missing: Array = np.isnan(every[..., 0])  # (B, U)
        unknown = missing[:, None] & a.looked_at[:, 0]  # (B, T, U)
        found = call.total(v=np.nan_to_num(every))
        found[unknown.any(axis=-1)] = nan
        yield "the values of all layers lie in one list", found
    back = np.broadcast_to((np.arange(T)[:, None] - np.arange(T)) % T, weights.shape)
    newest_first = np.take_along_axis(weights, back, axis=-1) * a.looked_at
    yield "values are kept newest first", call.total(weights=newest_first)
    if H == 1:
        return
    for words, merged in {
        "channels of different heads are interleaved": out.swapaxes(2, 3),
        "(B, H, T, D) is reshaped before H and T are exchanged": out.swapaxes(1, 2),
    }.items():
        yield f"heads merged wrongly: {words}", merged.reshape(B, T, -1)
    for words, split in _splits(a):
        yield words, call.total(v=split(v))
    for h in range(H):
        yield f"the values of head {h} in every head", call.total(v=merge(heads[:, :, [h] * H]))
        yield f"the weights of head {h} in every head", call.total(weights=weights[:, [h] * H])


MEAN = """
real / n.sum()         | token mean for document mean: every token weighs the same
real / (B * T)         | mean over B x T: padding is counted
real / B               | sum over positions in place of their mean
real / n               | sum over documents in place of their mean
real / (n * (B - 1))   | the sum over documents divided by B - 1
real * 1.0             | sum over all tokens
real / (B * (n + 1))   | n + 1 in place of n: the mean counts one position too many
real / ((B - 1) * (n - 1)) | one too few in both means: B - 1 and n - 1
real / (B * (n - 1))   | n - 1 in place of n: the mean counts one position too few
real / (B * block_size)    | divided by block_size in place of the positions
last / B               | only the last position counts
last / (B * n)         | only the last position counts
first / (B * n)        | only the first position counts
(real & ~last) / (B * n)   | the last position does not count
(real & ~last) / (B * fewer)   | the last position does not count
(real & ~first) / (B * n)  | the first position does not count
(real & ~first) / (B * fewer)  | the first position does not count
real * (document == b) / (B * n) | only document {b} counts
real * (document == b) / n       | only document {b} counts
real * (document != b) / (B * n) | document {b} does not count
"""


def of_mean(call: Call) -> Iterator[Guess]:
    a, n = call.around, call.around.n[:, None]
    names = known(
        call, last=a.real & (a.position == n - 1), first=a.real & (a.position == 0),
        document=np.arange(len(n))[:, None], fewer=np.maximum(n - 1, 1),
        block_size=a.config.block_size,
    )  # fmt: skip
    for words, weights in of_table(MEAN, names):
        yield words, call.total(weights=weights)


of_d_mean = of_mean


def micro_batch_weights(a: Around) -> Iterator[Guess]:
    """The weights of losses (B, T) where documents, sorted by length, are cut into micro-batches.

    Into two or three, in every way.
    """
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
    for start, stop in combinations(range(B + 1), 2):
        if stop - start < B:
            counted = np.isin(np.arange(B), order[start:stop])[:, None]
            words = f"the micro-batches hold {stop - start} of {B} documents"
            yield words, real * counted / (B * n)


EMBEDDING = """
row_at(position + 1)       | shifted by one position: wpe is one position ahead
row_at(position - 1)       | shifted by one position: wpe is one position behind
row_at(position + T - n)   | padding in front: positions count from the longest document's end
row_at(0 * position)       | every position has wpe[0]
row_at(n - 1 - position)   | positions count from the end
row_at(where(token < len(wpe), token, -1)) | the token indexes wpe as well
wte[target] + wpe[position]    | the token itself is shifted: the target's embedding
wte[(token - 1) % len(wte)] + wpe[position] | wte[token - 1] in place of wte[token]
wte[(token + 1) % len(wte)] + wpe[position] | wte[token + 1] in place of wte[token]
before + wpe[position]     | the token before in place of the token
wte[token] * wpe[position] | multiplied, not added
wte[token] - wpe[position] | wpe is subtracted
"""


def of_embedding(call: Call) -> Iterator[Guess]:
    a, wte, wpe = call.around, call.slots["wte"].value, call.slots["wpe"].value
    before = wte[np.roll(a.token, 1, axis=1)]
    before[:, 0] = np.nan

    def row_at(position: Array) -> Array:
        there = (position >= 0) & (position < len(wpe))
        rows = wpe[np.clip(position, 0, len(wpe) - 1)]
        return np.where(there[..., None], wte[a.token] + rows, np.nan)

    yield from of_table(EMBEDDING, known(call, row_at=row_at, before=before, len=len))


def of_d_wte(call: Call) -> Iterator[Guess]:
    a, dy, wte = call.around, call.slots["dy"].value, call.slots["wte"].value

    def added(token: Array, dy: Array) -> Array:
        total = np.zeros_like(wte)
        np.add.at(total, token, dy)
        return total

    real = np.argwhere(a.real).tolist()
    for places in (np.argwhere(a.real >= 0).tolist(), real[::-1], real):  # padding has token 0
        assigned = np.zeros_like(wte)
        for b, t in places:
            assigned[a.token[b, t]] = dy[b, t]
        yield (
            "repeated tokens accumulated once: one occurrence counts, the others are lost",
            assigned,
        )
    yield "summed by target, not by token", added(a.target, dy)
    counts = np.maximum(added(a.token, a.real[..., None]), 1)
    yield "the mean over a token's occurrences, not their sum", added(a.token, dy) / counts
    for axis, words in ((0, "document"), (1, "position")):
        for edge, index in (("first", 0), ("last", -1)):
            part = added(a.token.take(index, axis=axis), dy.take(index, axis=axis))
            if a.token.shape[axis] > 1:
                yield f"only the {edge} {words} counts in the embedding's gradient", part


D_WPE = """
roll(rows(dy.sum(0)), -1, 0) | shifted by one position: each row has what belongs one row later
roll(rows(dy.sum(0)), 1, 0)  | shifted by one position: each row has what belongs one row earlier
rows(dy[b])                  | only document {b} counts
rows(dy.sum(0) / B)          | the mean over documents in place of their sum: 1/B
rows(dy.sum(0) / present)    | the mean over the documents that are as long, in place of their sum
rows(dy.sum(0)) * 0 + dy.sum(0).sum(0) | every row has the sum over all positions
by_token                     | summed by token, not by position
"""


def of_d_wpe(call: Call) -> Iterator[Guess]:
    a, wpe = call.around, call.slots["wpe"].value
    yield from of_table(D_WPE, known(
        call, present=np.maximum(a.real.sum(axis=0)[:, None], 1),
        rows=lambda x: np.concatenate([x, np.zeros_like(wpe)[len(x) :]]),
        by_token=call.total(position=a.token),
    ))  # fmt: skip


def of_linear(call: Call) -> Iterator[Guess]:
    goes_in, w = (call.slots[name] for name in ("x" if "x" in call.slots else "dy", "w"))
    if w.value.shape[0] == w.value.shape[1]:
        rest = call.slots["res"].value if "res" in call.slots else 0.0
        yield f"{w.name} is left out: {goes_in.name} goes on as it is", goes_in.value + rest


of_linear_residual = of_d_input = of_linear


D_WEIGHT = """
total(dy=dy / B)       | the mean over documents in place of their sum: 1/B
total(dy=dy / n)       | the mean over positions in place of their sum
total(dy=dy / T)       | the mean over T positions, padding counted, in place of their sum: 1/T
total(dy=dy / n.sum()) | the mean over documents and positions in place of their sum
total(dy=dy * n)       | each document's part times its positions n: weighted a second time
dy.sum(0).T @ x.sum(0) | summed over documents before the product, not after
dy.sum(1).T @ x.sum(1) | summed over positions before the product, not after
turned                 | transposed: x dy^T in place of dy x^T
"""


def of_d_weight(call: Call) -> Iterator[Guess]:
    own = call.total()
    turned = own.T if own.shape == own.T.shape else nan * own
    yield from of_table(D_WEIGHT, known(call, n=call.around.n[:, None, None], turned=turned))


OTHER_FORMS: dict[str, Callable[[Call], Iterator[Guess]]] = {
    name.removeprefix("of_"): forms
    for name, forms in list(globals().items())
    if name.startswith("of_") and forms is not of_table
}


# --- an operand exchanged ------------------------------------------------------------------------


def alternatives(call: Call, name: str, earlier: Step, before: Step | None) -> Iterator[Guess]:
    """What may stand in the place of an argument of an operation, each with a sentence.

    earlier    what the step has computed before
    before     the step before
    """
    a, slot = call.around, call.slots[name]
    own, x = slot.name, slot.value
    if name == "target":
        yield from of_table(OTHER_TARGETS, known(call, logits=a["logits"]))
    if name == "scale" and not slot.is_tensor:
        yield from scales(a)
    if not slot.is_tensor or slot.axes[-1] == "1":
        return
    of_param = f"entry/{own}" in a.step
    if x.ndim > 1 and x.shape[-1] == x.shape[-2] and (of_param or "U" in slot.axes):
        turned = x.swapaxes(-1, -2)
        # what the rows of padding hold is not known
        yield (
            f"{own} transposed",
            np.where(unpadded(a), turned, nan) if "U" in slot.axes else turned,
        )
    yield from _of_the_same_shape(call, slot, earlier)
    if own.endswith("attn_weights") and name == "weights":
        yield f"d{own} in place of {own}", _unmasked_derivative(a, own.rpartition(".")[0])
    if of_param:
        for key, tensor in a.step.items():
            other = key.startswith("entry/") and key != f"entry/{own}"
            if other and x.ndim > 1 and tensor.shape == x.shape[::-1]:
                yield f"{key.partition('/')[2]} transposed in place of {own}", tensor.T
    else:
        yield from _only_a_term(a, own)
        yield from rearranged(a, own, x, slot.axes)
        yield from restricted(a, own, x, slot.axes)
        if x.ndim == 3:
            yield f"{own} is normalised first", x * (row_mean(x * x) + a.config.norm_eps) ** -0.5
            for kind, words in ACTIVATIONS.items():
                yield f"{kind} of {own} in place of {own}", elementwise(words.value, x)
    if x.ndim > 1:
        yield f"the square of {own}", x * x
    yield f"{own} is left out: 1 in its place", np.ones_like(x)
    yield f"the absolute value of {own}", np.abs(x)
    for phase in ("entry", "forward", "backward"):
        was = before.get(f"{phase}/{own}") if before else None
        if was is not None and was.shape == x.shape:
            yield f"{own} of the step before", was
    if of_param and f"params/{own}" in a.step:
        yield f"{own} after the update, not before", a.step[f"params/{own}"]


OTHER_TARGETS = """
token                | the target is the token itself, not the next
roll(target, -1, 1)  | the target is one position too far
(target - 1) % logits.shape[-1] | the target is one token id too low
(target + 1) % logits.shape[-1] | the target is one token id too high
roll(target, 1, 1)   | the target is one position too early
target[:1] + 0 * target | the targets are those of the first document
roll(target, -1, 0)  | the targets are those of the next document
roll(target, 1, 0)   | the targets are those of the document before
logits.argmax(-1)    | the target is the largest logit's token
"""


def _of_the_same_shape(call: Call, slot: Slot, earlier: Step) -> Iterator[Guess]:
    """Other tensors of that shape, the same tensor in other layers first."""
    step, own = call.around.step, slot.name
    kind = "entry" if f"entry/{own}" in step else "backward" if own[0] == "d" else "forward"
    if f"{kind}/{own}" not in step:
        kind = "forward"
    last = own.rpartition(".")[2].removeprefix("d" if kind == "backward" else "")
    others = {"entry": [], "forward": ["backward"], "backward": ["forward"]}
    for phase in (kind, *others[kind]):
        found = [
            (key.partition("/")[2], tensor)
            for key, tensor in earlier.items()
            if key.startswith(f"{phase}/")
            and tensor.shape == slot.value.shape
            and key.partition("/")[2] != own
            and axes(key) == slot.axes
        ]
        for name, tensor in sorted(
            found, key=lambda one: not one[0].rpartition(".")[2].endswith(last)
        ):
            yield f"{name} in place of {own}", tensor


def _only_a_term(a: Around, name: str) -> Iterator[Guess]:
    """A tap or a derivative without one of the terms of which it is the sum."""
    key = f"backward/{name}" if f"backward/{name}" in a.step else f"forward/{name}"
    if key not in a.step:
        return
    terms = {
        label or one.label: term for one in calls(a, key) for label, term in one.terms().items()
    }
    for label, term in terms.items() if len(terms) > 1 else ():
        yield f"{name} goes on without {label}", a.step[key] - term


def rearranged(a: Around, name: str, x: Array, axes: tuple[str, ...]) -> Iterator[Guess]:
    """The same numbers in another order: of positions, documents or heads."""
    if axes[:1] != ("B",):
        return
    B, H, D = len(x), a.config.n_head, a.config.head_dim
    if "T" in axes and x.shape[t := axes.index("T")] > 1:
        last = np.take_along_axis(x, a.n.reshape(-1, *[1] * (x.ndim - 1)) - 1, axis=t)
        yield f"{name} of the position before", np.roll(x, 1, axis=t)
        yield f"{name} of the position after", np.roll(x, -1, axis=t)
        yield f"{name} of the first position at every position", x.take([0], axis=t) + 0 * x
        yield f"{name} of the last position at every position", last + 0 * x
    if B > 1:
        yield f"{name} of the next document", np.roll(x, -1, axis=0)
        yield f"{name} of the document before", np.roll(x, 1, axis=0)
        for b in range(B):
            yield f"{name} of document {b} in every document", x[[b] * B]
    if H == 1 or ("H" not in axes and axes[-1] != "C"):
        return
    heads, h = (x, axes.index("H")) if "H" in axes else (a.heads(x), x.ndim - 1)
    for words, order in {
        "of the next head": np.roll(np.arange(H), -1),
        "of the head before": np.roll(np.arange(H), 1),
        "of the first head in every head": np.zeros(H, int),
        "of the last head in every head": np.full(H, H - 1),
        "with its heads in reverse": np.arange(H)[::-1],
    }.items():
        yield f"{name} {words}", heads.take(order, axis=h).reshape(x.shape)
    if h == 2 and D > 1:
        interleaved = f"{name} with channels of different heads interleaved"
        yield interleaved, x.reshape(*x.shape[:2], D, H).swapaxes(2, 3).reshape(x.shape)
        yield interleaved, heads.swapaxes(2, 3).reshape(x.shape)
        mixed = heads.swapaxes(1, 2).reshape(x.shape)
        yield f"{name} reshaped from (B, H, T, D) before H and T are exchanged", mixed


def restricted(a: Around, name: str, x: Array, axes: tuple[str, ...]) -> Iterator[Guess]:
    """The same numbers with zeros at some positions: sums that leave out part of their range."""
    if axes[:1] != ("B",) or "T" not in axes or len(a.real[0]) < 2:
        return
    T = len(a.real[0])
    t, u, n = np.arange(T)[:, None], np.arange(T), a.n[:, None]
    if "U" in axes:
        yield f"only each position's own {name}, where u = t, counts", x * (u == t)
        yield f"each position's own {name}, where u = t, is left out", x * (u != t)
        yield f"only the first position's part of {name} counts", x * (u == 0)
        yield f"the first position's part of {name} is left out", x * (u > 0)
        yield f"only the position before's part of {name} counts", x * (u == t - 1)
    for words, place in {"last": a.position == n - 1, "first": a.position == 0}.items():
        shape = (len(x), 1, T, 1) if "H" in axes else (len(x), T, *[1] * (x.ndim - 2))
        yield f"only the {words} position of {name} counts", x * place.reshape(shape)
        yield f"the {words} position of {name} is left out", x * ~place.reshape(shape)
