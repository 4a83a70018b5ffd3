"""What a disagreement looks like, when the pattern is a known one.

Each pattern is a function that is shown the two tensors and everything around them, and answers
with a sentence or with nothing. The first to answer is believed, so the narrow ones come first.
Most must reproduce the faulty numbers from the sound ones, all of them, not resemble them; the
last few only say where, or of what size, the fault is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from math import sqrt

import numpy as np

from crosscheck.cases import Case
from crosscheck.explain import Place, clipping
from crosscheck.trace import PHASES, Array, Step, real, split_key
from microgpt.backend import Docs
from microgpt.train import learning_rate
from vectorized.batch import micro_batches


@dataclass(frozen=True)
class Pair:
    """A tensor of the reference and what the candidate has in its place."""

    case: Case
    number: int  # of the step, from 1
    key: str
    step: Step  # of the reference
    before: Step | None  # the reference's step before it
    ours: Array
    theirs: Array
    there: Array  # which elements there are

    @property
    def phase(self) -> str:
        """What kind of tensor it is."""
        return split_key(self.key)[0]

    @property
    def name(self) -> str:
        """Its name, without the d of derivatives."""
        name = split_key(self.key)[1]
        return name[1:] if self.phase == "backward" or self.of_parameter else name

    @property
    def of_parameter(self) -> bool:
        """Whether it is the gradient of a parameter."""
        return self.phase in ("gradient", "unwatched") and self.key != "unwatched/loss"

    @property
    def tap(self) -> str:
        """Its name without the layer."""
        return self.name.rpartition(".")[2]

    @property
    def place(self) -> Place:
        """Where tensors of the same layer are found."""
        return Place(self.case, self.number, self.name, (), self.step)

    def explains(self, guess: Array) -> bool:
        """Whether these numbers are the candidate's, and are not also the reference's."""
        if np.shape(guess) != self.theirs.shape:
            return False
        guess, ours = np.asarray(guess)[self.there], self.ours[self.there]
        theirs = self.theirs[self.there]
        size = float(np.abs(theirs).max(initial=0.0))
        atol = 1e-9 * size + 1e-300

        def same(a: Array, b: Array) -> bool:
            return bool(np.allclose(a, b, rtol=1e-6, atol=atol))

        return same(theirs, guess) and not same(theirs, ours)


def diagnose(
    case: Case,
    number: int,
    key: str,
    reference: Step,
    candidate: Step,
    before: Step | None,
    promised: str = "float64",
) -> str:
    """A sentence on what went wrong, or nothing where no known pattern fits.

    number       which step it is, from 1
    before       the reference's step before it
    promised     the candidate's precision
    """
    if key not in reference or key not in candidate:
        return ""
    ours, theirs = reference[key], candidate[key]
    if ours.shape != theirs.shape:
        return "transposed" if ours.shape == theirs.shape[::-1] else ""
    if theirs.dtype == "float32" and promised == "float64" and ours.dtype == "float64":
        return "float32 where float64 was promised"
    there = real(key, ours.shape, reference["batch/tokens"])
    pair = Pair(case, number, key, reference, before, ours, theirs.astype("float64"), there)
    with np.errstate(all="ignore"):
        patterns = [one for one in PATTERNS if one is not single_precision or promised == "float64"]
        return next((answer for pattern in patterns if (answer := pattern(pair))), "")


def not_finite(pair: Pair) -> str:
    """Infinities or NaN."""
    bad = ~np.isfinite(pair.theirs[pair.there])
    if pair.tap == "attn_logits" and np.isneginf(pair.theirs[pair.there]).any():
        return f"-inf at {bad.sum():,} places that a position may look at: the mask hides too much"
    return f"not a finite number in {bad.sum():,} of {bad.size:,} elements" if bad.any() else ""


def single_precision(pair: Pair) -> str:
    """Rounded to float32, or computed from what was."""
    ours, theirs = pair.ours[pair.there], pair.theirs[pair.there]
    error = np.abs(theirs - ours).max()
    scale = np.abs(ours).max()
    fits = np.array_equal(theirs, theirs.astype("float32"))
    if (fits and error < 1e-5 * scale) or 1e-9 * scale < error < 3e-7 * scale:
        return "float32 where float64 was promised: the error is that of single precision"
    return ""


def normalisation(pair: Pair) -> str:
    """The norms, with eps elsewhere or the mean replaced."""
    if pair.phase != "forward" or not pair.tap.endswith("norm"):
        return ""
    x, eps = pair.step[f"forward/{_inside(pair)}"], pair.case.config.norm_eps
    ms = (x * x).mean(axis=-1, keepdims=True)
    C = x.shape[-1]
    centred = x - x.mean(axis=-1, keepdims=True)
    guesses = {
        "eps in the wrong place: added to the root, not under it": x / (np.sqrt(ms) + eps),
        "eps is missing under the root": x / np.sqrt(ms),
        "the sum of squares in place of their mean": x / np.sqrt(ms * C + eps),
        "n - 1 in place of n in the mean": x / np.sqrt(ms * C / (C - 1) + eps),
        "the root is missing": x / (ms + eps),
        "mean subtracted: this is a LayerNorm": centred
        / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps),
        "not normalised": x,
        "normalised twice": pair.ours / np.sqrt((pair.ours**2).mean(axis=-1, keepdims=True) + eps),
    }
    for other in (1e-3, 1e-4, 1e-6, 1e-8, 1e-12):
        guesses[f"eps is {other:g}, not {eps:g}"] = x / np.sqrt(ms + other)
    return _first(pair, guesses)


def norm_backward(pair: Pair) -> str:
    """The derivative of a norm without one of its parts, around the residual stream."""
    found = _stream_parts(pair)
    if not found:
        return ""
    around, dy, x = found
    eps = pair.case.config.norm_eps
    scale = ((x * x).mean(axis=-1, keepdims=True) + eps) ** -0.5
    y = x * scale
    mean = (dy * y).mean(axis=-1, keepdims=True)
    through = scale * (dy - y * mean)
    return _first(
        pair,
        {
            "the second term of the norm's derivative is missing": around + scale * dy,
            "the residual's contribution is missing": through,
            "the contribution through the norm is missing": around,
            "the residual's contribution is there twice": through + 2 * around,
            "the sign of the second term of the norm's derivative": around
            + scale * (dy + y * mean),
            "the norm's derivative lacks the factor scale": around + dy - y * mean,
            "a sum in place of the mean in the norm's derivative": around
            + scale * (dy - y * mean * x.shape[-1]),
            "the norm is passed as if it were not there": around + dy,
            "x in place of y in the norm's derivative": around + scale * (dy - x * mean),
        },
    )


def attention_forward(pair: Pair) -> str:
    """Weights and what they see, with the mask or the softmax at fault."""
    if pair.phase != "forward":
        return ""
    p, config = pair.place, pair.case.config
    if pair.tap == "attn_weights":
        x = p["forward/attn_logits"]
        unpadded = (pair.step["batch/tokens"] >= 0).all(axis=1)  # of the others, we know too little
        whole = replace(pair, ours=pair.ours[unpadded], theirs=pair.theirs[unpadded],
                        there=pair.there[unpadded])  # fmt: skip
        q, k = (_by_head(pair, p[f"forward/{name}"])[unpadded] for name in "qk")
        everything = np.exp(q @ k.swapaxes(-1, -2) / sqrt(config.head_dim))
        everything /= everything.sum(axis=-1, keepdims=True)
        exps = np.exp(x - x.max(axis=-1, keepdims=True, where=pair.there, initial=-np.inf))
        unmasked = "the mask is missing or comes after the softmax: positions to come take part"
        answer = _first(whole, {unmasked: everything})
        answer = answer or _first(pair, {"not normalised: softmax without its division": exps})
        sums = np.where(pair.there, pair.theirs, 0.0).sum(axis=-1)[pair.there.any(axis=-1)]
        if not answer and np.any(sums < 1 - 1e-6):
            answer = "rows sum to less than one: positions to come take part"
        return answer
    if pair.tap == "attn_logits":
        later = np.triu(np.ones(pair.ours.shape[-2:], bool), 0)
        own = np.where(later, -np.inf, 0.0)
        if np.array_equal(np.isneginf(pair.theirs), np.isneginf(np.where(pair.there, own, 0.0))):
            return "the mask hides a position from itself"
    return ""


def heads(pair: Pair) -> str:
    """Heads in another order, or put together channel by channel."""
    config, shape = pair.case.config, pair.ours.shape
    H, D = config.n_head, config.head_dim
    if pair.phase not in ("forward", "backward") or H == 1:
        return ""
    if pair.tap in ("attn_logits", "attn_weights"):
        axis, by_head = 1, pair.ours
    elif pair.tap in ("q", "k", "v", "attn_out"):
        axis, by_head = 2, pair.ours.reshape(*shape[:2], H, D)
        merged = by_head.swapaxes(2, 3).reshape(shape)
        split = pair.ours.reshape(*shape[:2], D, H).swapaxes(2, 3).reshape(shape)
        mixed = pair.ours.reshape(shape[0], shape[1], H, D).swapaxes(1, 2).reshape(shape)
        if any(pair.explains(guess) for guess in (merged, split, mixed)):
            return "heads merged wrongly: channels of different heads are interleaved"
    else:
        return ""
    orders = permutations(range(H)) if H <= 4 else [(*range(i, H), *range(i)) for i in range(1, H)]
    for order in [*orders, tuple(reversed(range(H)))]:
        if pair.explains(by_head.take(order, axis=axis).reshape(shape)):
            return f"heads permuted: in the order {', '.join(map(str, order))}"
    return ""


def transposed(pair: Pair) -> str:
    """The last two axes exchanged."""
    if pair.ours.ndim < 2 or (pair.phase in ("forward", "backward") and pair.ours.ndim < 4):
        return ""
    return "transposed" if pair.explains(pair.ours.swapaxes(-1, -2)) else ""


def missing_consumer(pair: Pair) -> str:
    """One of several contributions to a sum is not there, or is there twice."""
    for label, contribution in _contributions(pair):
        if pair.explains(pair.ours - contribution):
            return f"one contribution is missing: {label}"
        if pair.explains(pair.ours + contribution):
            return f"one contribution is there twice: {label}"
        if pair.explains(contribution):
            return f"only one contribution is there: {label}"
    return ""


def repeated_tokens(pair: Pair) -> str:
    """The gradient of wte with one contribution per token, not per occurrence."""
    if not pair.of_parameter or pair.tap != "wte":
        return ""
    tokens, demb = pair.step["batch/tokens"][:, :-1], pair.step["backward/demb"]
    inputs = np.where(pair.step["batch/tokens"][:, 1:] >= 0, tokens, -1)
    bad = ~np.isclose(pair.theirs, pair.ours, rtol=1e-7, atol=1e-13).all(axis=1)
    counts = np.array([(inputs == row).sum() for row in range(len(pair.ours))])
    if bad.any() and (counts[bad] > 1).all():
        head = _head_gradient(pair) if pair.case.config.tie_lm_head else np.zeros_like(pair.ours)
        single = [
            any(
                np.allclose(pair.theirs[row], part + head[row], rtol=1e-7, atol=1e-13)
                for part in [*demb[inputs == row], np.zeros_like(head[row])]
            )
            for row in np.flatnonzero(bad)
        ]
        if not np.any(pair.theirs[bad]):
            return "all contributions of these tokens are lost"
        if all(single):
            return "repeated tokens accumulated once: one occurrence counts, the others are lost"
        return "wrong only in the rows of tokens that occur more than once"
    return ""


def adam_m(pair: Pair) -> str:
    """The running mean of the gradient by another rule."""
    if pair.phase != "adam_m":
        return ""
    config, name = pair.case.config, pair.name
    beta1, beta2, limit = config.beta1, config.beta2, config.grad_clip
    m0, raw = pair.step[f"entry_m/{name}"], pair.step[f"gradient/d{name}"]
    g = clipping(config, pair.step) * raw
    own = min(1.0, limit / float(np.sqrt((raw * raw).sum()))) if limit else 1.0
    return _first(
        pair,
        {
            "the gradient is not clipped": beta1 * m0 + (1 - beta1) * raw,
            "every tensor is clipped by its own length": beta1 * m0 + (1 - beta1) * own * raw,
            "clipped number by number": beta1 * m0 + (1 - beta1) * np.clip(raw, -limit, limit),
            "the gradient enters m without the factor 1 - beta1": beta1 * m0 + g,
            "beta1 and 1 - beta1 exchanged": (1 - beta1) * m0 + beta1 * g,
            "m does not remember: beta1 m is missing": (1 - beta1) * g,
            "beta2 in place of beta1": beta2 * m0 + (1 - beta2) * g,
        },
    )


def adam_v(pair: Pair) -> str:
    """The running mean of the gradient's square by another rule."""
    if pair.phase != "adam_v":
        return ""
    config, name = pair.case.config, pair.name
    beta1, beta2 = config.beta1, config.beta2
    v0, m = pair.step[f"entry_v/{name}"], pair.step[f"adam_m/{name}"]
    g = clipping(config, pair.step) * pair.step[f"gradient/d{name}"]
    kept = beta2 * v0
    return _first(
        pair,
        {
            "the gradient enters v without the factor 1 - beta2": kept + g * g,
            "beta2 and 1 - beta2 exchanged": (1 - beta2) * v0 + beta2 * g * g,
            "the gradient enters v without its square": kept + (1 - beta2) * g,
            "the gradient enters v by its size, not its square": kept + (1 - beta2) * np.abs(g),
            "v does not remember: beta2 v is missing": (1 - beta2) * g * g,
            "beta1 in place of beta2": beta1 * v0 + (1 - beta1) * g * g,
            "the mean gradient is squared in place of the gradient": kept + (1 - beta2) * m * m,
        },
    )


def adam_update(pair: Pair) -> str:
    """The update by another rule."""
    if pair.phase != "update":
        return ""
    config, n, name = pair.case.config, pair.number, pair.name
    beta1, beta2, eps = config.beta1, config.beta2, config.adam_eps
    lr = learning_rate(n - 1, config)
    m, v, p0 = (pair.step[f"{phase}/{name}"] for phase in ("adam_m", "adam_v", "entry"))
    g = clipping(config, pair.step) * pair.step[f"gradient/d{name}"]
    m_hat, v_hat = m / (1 - beta1**n), v / (1 - beta2**n)
    decay = -lr * config.weight_decay * p0

    def rule(t1: int | None = n, t2: int | None = n, lr: float = lr) -> Array:
        corrected_m = m / (1 - beta1**t1) if t1 else m
        corrected_v = v / (1 - beta2**t2) if t2 else v
        return -lr * corrected_m / (np.sqrt(corrected_v) + eps)

    guesses = {
        "bias correction is absent": rule(None, None),
        "bias correction of m is absent": rule(None, n),
        "bias correction of v is absent": rule(n, None),
        "bias correction off by one step: t + 1 in place of t": rule(n + 1, n + 1),
        "bias correction off by one step: t - 1 in place of t": rule(n - 1, n - 1),
        "bias corrections exchanged": -lr
        * (m / (1 - beta2**n))
        / (np.sqrt(v / (1 - beta1**n)) + eps),
        "eps in the wrong place: under the root": -lr * m_hat / np.sqrt(v_hat + eps),
        "eps is missing": -lr * m_hat / np.sqrt(v_hat),
        "eps is not corrected along with v": -lr * m_hat * sqrt(1 - beta2**n) / (np.sqrt(v) + eps),
        "the root of v is missing": -lr * m_hat / (v_hat + eps),
        "the sign: the update goes uphill": lr * m_hat / (np.sqrt(v_hat) + eps),
        "the gradient in place of its mean": -lr * g / (np.sqrt(v_hat) + eps),
        "plain gradient descent": -lr * g,
        "the learning rate is not decayed": rule(lr=config.learning_rate),
        "the learning rate is a step ahead": rule(lr=learning_rate(n, config)),
    }
    # without weight decay these are the rule itself, which explains nothing
    of_decay = {
        "the weight decay is missing": rule(),
        "the weight decay is not multiplied by the learning rate": rule()
        - config.weight_decay * p0,
        "the sign of the weight decay": rule() - decay,
    }
    return _first(pair, {**of_decay, **{label: decay + one for label, one in guesses.items()}})


def stale(pair: Pair) -> str:
    """Gradients that remember an earlier step."""
    if not pair.of_parameter or pair.before is None:
        return ""
    earlier = pair.before[pair.key]
    return _first(
        pair,
        {
            "stale: the gradient of the step before": earlier,
            "the gradient of the step before has not been cleared": pair.ours + earlier,
        },
    )


def weighting(pair: Pair) -> str:
    """The mean over tokens in place of the mean over documents, and the like."""
    if pair.key not in ("forward/loss", "backward/dloss_t", "backward/dlogits", "unwatched/loss"):
        return ""
    tokens = pair.step["batch/tokens"]
    B, T = tokens.shape[0], tokens.shape[1] - 1
    n = (tokens >= 0).sum(axis=1) - 1  # (B,)
    of_loss_t = {
        "token mean for document mean: every token weighs the same": np.full(B, 1 / n.sum()),
        "mean over B x T: padding is counted": np.full(B, 1 / (B * T)),
        "sum over positions in place of their mean": np.full(B, 1 / B),
        "sum over documents in place of their mean": 1 / n,
        "sum over all tokens": np.ones(B),
    }
    sizes = [len(part) for part in _micro_batches(pair)] if pair.phase == "unwatched" else []
    if sizes and sum(sizes) != B:
        return f"the micro-batches hold {sum(sizes)} of {B} documents"
    if sizes:
        size = np.empty(B)  # of the micro-batch that a document is in
        size[np.argsort(n, kind="stable")] = np.repeat(sizes, sizes)
        of_loss_t |= {
            "mean of means: every micro-batch weighs the same": 1 / (len(sizes) * size * n),
            "the means of the micro-batches are summed": 1 / (size * n),
        }
    for label, weights in of_loss_t.items():
        if pair.tap == "loss":
            guess = (pair.step["forward/loss_t"].sum(axis=1) * weights).sum()
        else:
            factor = weights * B * n
            guess = pair.ours * factor.reshape(B, *[1] * (pair.ours.ndim - 1))
        if pair.explains(guess):
            return label
    return ""


def logarithm(pair: Pair) -> str:
    """-log(p + something)."""
    if pair.key != "forward/loss_t":
        return ""
    p = np.exp(-pair.ours)
    for eps in (1e-12, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5):
        guess = -np.log(p + eps)
        allowed = 1e-3 * np.abs(guess - pair.ours) + 1e-12 * (1 + np.abs(pair.ours))
        if (np.abs(pair.theirs - guess) <= allowed)[pair.there].all():
            return f"a constant inside the logarithm: -log(p + {eps:g})"
    return _first(pair, {"log2 in place of ln": pair.ours / np.log(2.0)})


def constant_factor(pair: Pair) -> str:
    """The whole tensor times a number."""
    ours, theirs = pair.ours[pair.there], pair.theirs[pair.there]
    large = np.abs(ours) > 1e-3 * np.abs(ours).max(initial=0.0)
    if not large.any():
        return ""
    factor = float(np.median(theirs[large] / ours[large]))
    if factor == 0 or not pair.explains(factor * pair.ours):
        return ""
    config, shape = pair.case.config, pair.step["batch/tokens"].shape
    named = {
        "-1": -1.0,
        "2": 2.0,
        "1/2": 0.5,
        "sqrt(D)": sqrt(config.head_dim),
        "1/sqrt(D)": 1 / sqrt(config.head_dim),
        "D": config.head_dim,
        "1/D": 1 / config.head_dim,
        "B": shape[0],
        "1/B": 1 / shape[0],
        "T": shape[1] - 1,
        "1/T": 1 / (shape[1] - 1),
        "F/C": 4.0,
        "C/F": 0.25,
        "C": config.n_embd,
        "1/C": 1 / config.n_embd,
        "sqrt(C)": sqrt(config.n_embd),
        "sqrt(D)/sqrt(C)": sqrt(config.head_dim / config.n_embd),
        "n_layer": config.n_layer,
    }
    close = [name for name, value in named.items() if abs(factor - value) < 1e-6 * abs(value)]
    if factor == 2.0 or abs(factor - 2) < 1e-6:
        close = ["2 (doubled)", *close[1:]]
    if ours.size < 2 and not close:
        return ""
    return f"a constant factor of {factor:.6g}" + (f" = {' = '.join(close)}" if close else "")


def shifted(pair: Pair) -> str:
    """Every position has its neighbour's numbers."""
    if pair.of_parameter and pair.tap == "wpe":
        for label, by in (("later", -1), ("earlier", 1)):
            if pair.explains(np.roll(pair.ours, by, axis=0)):
                return f"shifted by one position: each row has what belongs one row {label}"
    if pair.phase not in ("forward", "backward") or pair.ours.ndim not in (2, 3):
        return ""
    T = pair.ours.shape[1]
    for label, ours, theirs in (
        ("later", slice(0, T - 1), slice(1, T)),
        ("earlier", slice(1, T), slice(0, T - 1)),
    ):
        both = pair.there[:, ours] & pair.there[:, theirs]
        a, b = pair.ours[:, ours][both], pair.theirs[:, theirs][both]
        if a.size and np.allclose(a, b, rtol=1e-7, atol=1e-13) and np.ptp(a) > 0:
            return f"shifted by one position: each has what belongs one position {label}"
    if pair.tap == "emb":
        p = pair.place
        tokens = pair.step["batch/tokens"][:, :-1]
        wte, wpe = p["entry/wte"], p["entry/wpe"]
        for label, by in (("ahead", 1), ("behind", -1)):
            guess = wte[tokens] + np.roll(wpe, -by, axis=0)[:T]
            if pair.explains(guess):
                return f"shifted by one position: wpe is one position {label}"
    return ""


def somewhere(pair: Pair) -> str:
    """Wrong only in some places."""
    bad = ~np.isclose(pair.theirs, pair.ours, rtol=1e-9, atol=1e-12) & pair.there
    if pair.phase in ("forward", "backward") and pair.ours.ndim >= 2:
        tokens = pair.step["batch/tokens"]
        n = (tokens >= 0).sum(axis=1) - 1
        by_place = bad.any(axis=1) if pair.ours.ndim == 4 else bad
        while by_place.ndim > 2:
            by_place = by_place.any(axis=-1)
        docs, positions = np.nonzero(by_place)
        if not len(docs):
            return ""
        n_bad = set(docs.tolist())
        padded = {b for b in range(len(n)) if n[b] < n.max()}
        if padded and n_bad <= padded and len(padded) < len(n):
            return "wrong only in documents that are padded"
        if (positions == 0).all() and n.max() > 1:
            return "wrong only at the first position"
        if (positions == n[docs] - 1).all() and n.max() > 1:
            return "wrong only at the last position"
        return ""
    if pair.of_parameter and pair.tap == "wpe":
        rows = np.flatnonzero(bad.any(axis=1))
        used = int((pair.step["batch/tokens"] >= 0).sum(axis=1).max()) - 1
        if len(rows) and rows.min() >= used:
            return "wrong only beyond the last position: stale rows"
        if list(rows) == [0] and used > 1:
            return "wrong only at the first position"
    return ""


def other_tensor(pair: Pair) -> str:
    """The numbers of something else."""
    if not np.any(pair.theirs[pair.there]):
        return "never written, or lost: zero everywhere"
    for key, tensor in pair.step.items():
        alike = tensor.shape == pair.ours.shape and tensor.dtype == "float64" and key != pair.key
        if alike and pair.explains(tensor):
            return f"these are the numbers of {split_key(key)[1]} ({PHASES[split_key(key)[0]]})"
    return ""


def unwatched(pair: Pair) -> str:
    """What agrees where the text runs as it stands, and not where it is recorded for training."""
    if pair.phase not in ("eval", "unwatched"):
        return ""
    causes = ["the recording is not the text, or a result is overwritten too early"]
    if pair.phase == "unwatched":
        if len(_micro_batches(pair)) > 1:
            causes.insert(0, "the gradients of micro-batches are not added up")
        if pair.case.config.cores > 1:
            causes.insert(0, "the shares of the processes are not added up")
    return (
        "agrees as long as the text runs as it stands, in one process and one batch:"
        f" {', or '.join(causes)}"
    )


PATTERNS: list[Callable[[Pair], str]] = [
    not_finite,
    weighting,
    logarithm,
    normalisation,
    attention_forward,
    adam_m,
    adam_v,
    adam_update,
    stale,
    constant_factor,
    norm_backward,
    missing_consumer,
    repeated_tokens,
    transposed,
    heads,
    shifted,
    other_tensor,
    somewhere,
    single_precision,
    unwatched,
]


def _first(pair: Pair, guesses: dict[str, Array]) -> str:
    return next((label for label, guess in guesses.items() if pair.explains(guess)), "")


def _micro_batches(pair: Pair) -> list[Docs]:
    """Those that one process cuts the batch into."""
    docs = [doc[doc >= 0].tolist() for doc in pair.step["batch/tokens"]]
    return micro_batches(docs, pair.case.config)


def _inside(pair: Pair) -> str:
    """What a norm normalises."""
    if pair.tap == "emb_norm":
        return "emb"
    layer = pair.name.rpartition(".")[0]
    if pair.tap == "mlp_norm":
        return f"{layer}.attn_res"
    return _before(pair.case, int(layer.removeprefix("layer")))


def _before(case: Case, i: int) -> str:
    """The residual stream where layer i begins."""
    if i > 0:
        return f"layer{i - 1}.mlp_res"
    return "emb_norm" if case.config.norm_embedding else "emb"


def _stream_parts(pair: Pair) -> tuple[Array, Array, Array] | None:
    """For a derivative of the residual stream: what comes around the next norm, what comes into
    that norm, and the norm's input."""
    if pair.phase != "backward":
        return None
    layer = pair.name.rpartition(".")[0]
    if pair.tap == "attn_res":
        norm, around = f"{layer}.mlp_norm", f"{layer}.mlp_res"
    elif pair.name == "emb" and pair.case.config.norm_embedding:
        norm, around = "emb_norm", ""
    else:
        following = [
            i for i in range(pair.case.config.n_layer) if _before(pair.case, i) == pair.name
        ]
        if not following:
            return None
        norm, around = f"layer{following[0]}.attn_norm", f"layer{following[0]}.attn_res"
    dy, x = pair.step[f"backward/d{norm}"], pair.step[f"forward/{pair.name}"]
    return (pair.step[f"backward/d{around}"] if around else np.zeros_like(dy)), dy, x


def _by_head(pair: Pair, x: Array) -> Array:
    B, T, _ = x.shape
    return x.reshape(B, T, pair.case.config.n_head, -1).swapaxes(1, 2)


def _head_gradient(pair: Pair) -> Array:
    """The gradient of lm_head."""
    last = f"layer{pair.case.config.n_layer - 1}.mlp_res"
    return np.einsum("btv,btc->vc", pair.step["backward/dlogits"], pair.step[f"forward/{last}"])


def _contributions(pair: Pair) -> Iterator[tuple[str, Array]]:
    """The parts of which the tensor is the sum."""
    p, config = pair.place, pair.case.config
    layer = pair.name.rpartition(".")[0]
    if pair.phase == "forward":
        if pair.tap in ("attn_res", "mlp_res"):
            stream = (
                f"{layer}.attn_res"
                if pair.tap == "mlp_res"
                else _before(pair.case, int(layer.removeprefix("layer")))
            )
            yield f"the residual, {stream}", pair.step[f"forward/{stream}"]
        elif pair.tap == "emb":
            positions = p["entry/wpe"][: pair.ours.shape[1]]
            yield "wpe", np.broadcast_to(positions, pair.ours.shape)
    elif pair.phase == "backward":
        if pair.tap == "attn_norm":
            for x in "qkv":
                yield f"that of {x}", p[f"backward/d{x}"] @ p[f"entry/attn_w{x}"]
        elif pair.tap in ("q", "k") and config.head_dim:
            dlogits = p["backward/dattn_logits"] / sqrt(config.head_dim)
            own = np.diagonal(dlogits, axis1=-2, axis2=-1).swapaxes(1, 2)  # (B, T, H)
            other = p["forward/k" if pair.tap == "q" else "forward/q"]
            yield "each position's own", np.repeat(own, config.head_dim, axis=-1) * other
        elif pair.tap == "attn_logits":
            yield "the sum over the row", -_row_sums(pair)
    elif pair.of_parameter and pair.tap == "wte" and config.tie_lm_head:
        yield "that of wte as lm_head", _head_gradient(pair)


def _row_sums(pair: Pair) -> Array:
    """The second term of the derivative of softmax."""
    p = pair.place
    w, dw = p["forward/attn_weights"], p["backward/dattn_weights"]
    return w * (dw * w).sum(axis=-1, keepdims=True)
