"""The wrong forms of each line of Adam, as guesses at a faulty tensor."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import Any

import numpy as np

from crosscheck.explain import clipping
from crosscheck.formulas import slipped, values
from crosscheck.trace import Array, Step
from crosscheck.variants import Guess
from microgpt.config import Config
from microgpt.train import learning_rate

M = "beta1 * m + (1 - beta1) * g"
V = "beta2 * v + (1 - beta2) * g ** 2"


def _update(of_m: str = "t", of_v: str = "t", m: str = "m", v: str = "v", lr: str = "lr") -> str:
    """The formula of the update; of_m and of_v are the exponents in the bias corrections."""
    return f"-{lr} * ({m} / (1 - beta1 ** {of_m})) / (({v} / (1 - beta2 ** {of_v})) ** 0.5 + eps)"


UPDATE = _update()

# what may take the place of the gradient, g, in the line of m; _names says what each name means
GRADIENTS = {
    "the gradient is not clipped": "raw",
    "every tensor is clipped by its own length": "min(1, limit / own_length) * raw",
    "clipped number by number": "clip(raw, -limit, limit)",
    "the gradient is clipped twice": "factor * g",
    "scaled up to grad_clip, though it is shorter: the min with 1 is missing": (
        "limit / length * raw"
    ),
    "divided by its length, whatever grad_clip is": "raw / length",
    "clipped by the largest element, not by the length": "min(1, limit / largest) * raw",
    "clipped by the sum of sizes, not by the length": "min(1, limit / sizes) * raw",
    "1e-6 is added to the length, as in PyTorch's clip_grad_norm_": (
        "min(1, limit / (length + 1e-6)) * raw"
    ),
    "clipped by the square of the length: the root is missing": "min(1, limit / length**2) * raw",
    "the weight decay is added to the gradient": "g + decay * p",
    "the sign of the gradient alone": "sign(g)",
    "the gradient's square in place of the gradient": "g * g",
}
OF_M = {
    "m does not change": "m",
    **{words: M.replace("g", f"({g})") for words, g in GRADIENTS.items()},
    "the gradient enters m without the factor 1 - beta1": "beta1 * m + g",
    "beta1 and 1 - beta1 exchanged": "(1 - beta1) * m + beta1 * g",
    "m does not remember: beta1 m is missing": "(1 - beta1) * g",
    "beta1 m without its beta1": "m + (1 - beta1) * g",
    "m is the gradient itself": "g",
    "beta2 in place of beta1": "beta2 * m + (1 - beta2) * g",
    "beta2 in place of beta1 before m": "beta2 * m + (1 - beta1) * g",
    "1 - beta2 in place of 1 - beta1": "beta1 * m + (1 - beta2) * g",
    "1 + beta1 in place of 1 - beta1": "beta1 * m + (1 + beta1) * g",
    "a sign: beta1 m - (1 - beta1) g": "beta1 * m - (1 - beta1) * g",
    "the sum of all gradients": "m + g",
    "corrected for its bias in place: m_hat is kept": f"({M}) / (1 - beta1 ** t)",
    "v in place of m": "beta1 * v + (1 - beta1) * g",
}
OF_THE_STEP_BEFORE = {
    "the gradient of the step before": "beta1 * m + (1 - beta1) * g_before",
    "the clip factor is that of the step before": "beta1 * m + (1 - beta1) * factor_before * raw",
}
SQUARES = {  # what may take the place of g ** 2 in the line of v
    "the gradient is not clipped": "raw ** 2",
    "the clip factor is not squared": "factor * raw ** 2",
    "the clip factor enters to the fourth power": "factor ** 4 * raw ** 2",
    "the gradient enters v without its square": "g",
    "the gradient enters v by its size, not its square": "abs(g)",
    "the gradient's cube in place of its square": "g ** 3",
    "the mean gradient is squared in place of the gradient": "m ** 2",
    "the corrected mean gradient is squared in place of the gradient": "m_hat ** 2",
    "the gradient times its mean in place of its square": "g * m",
    "the gradient's distance from its mean is squared": "(g - m) ** 2",
    "the mean of the tensor's squares in place of each number's own": "0 * g + mean(g ** 2)",
}
OF_V = {
    "v does not change": "v",
    **{words: V.replace("g ** 2", f"({g})") for words, g in SQUARES.items()},
    "the gradient enters v without the factor 1 - beta2": "beta2 * v + g ** 2",
    "beta2 and 1 - beta2 exchanged": "(1 - beta2) * v + beta2 * g ** 2",
    "v does not remember: beta2 v is missing": "(1 - beta2) * g ** 2",
    "beta2 v without its beta2": "v + (1 - beta2) * g ** 2",
    "v is the gradient's square itself": "g ** 2",
    "the sum of all squares, as in Adagrad": "v + g ** 2",
    "the largest square so far": "maximum(beta2 * v, (1 - beta2) * g ** 2)",
    "beta1 in place of beta2": "beta1 * v + (1 - beta1) * g ** 2",
    "beta1 in place of beta2 before v": "beta1 * v + (1 - beta2) * g ** 2",
    "1 - beta1 in place of 1 - beta2": "beta2 * v + (1 - beta1) * g ** 2",
    "1 + beta2 in place of 1 - beta2": "beta2 * v + (1 + beta2) * g ** 2",
    "1 - beta2 is squared with the gradient": "beta2 * v + ((1 - beta2) * g) ** 2",
    "a sign: beta2 v - (1 - beta2) g^2": "beta2 * v - (1 - beta2) * g ** 2",
    "m in place of v": "beta2 * m_before + (1 - beta2) * g ** 2",
    "corrected for its bias in place: v_hat is kept": f"({V}) / (1 - beta2 ** t)",
    "v never falls, as in AMSGrad": f"maximum(v, {V})",
}
OF_UPDATE = {
    "the weight does not change": "0 * p",
    "bias correction is absent": "-lr * m / (v ** 0.5 + eps)",
    "bias correction of m is absent": "-lr * m / (v_hat ** 0.5 + eps)",
    "bias correction of v is absent": "-lr * m_hat / (v ** 0.5 + eps)",
    "bias corrections exchanged": (
        "-lr * (m / (1 - beta2 ** t)) / ((v / (1 - beta1 ** t)) ** 0.5 + eps)"
    ),
    "the bias correction of v uses beta1": "-lr * m_hat / ((v / (1 - beta1 ** t)) ** 0.5 + eps)",
    "the bias correction of m uses beta2": "-lr * (m / (1 - beta2 ** t)) / (v_hat ** 0.5 + eps)",
    "multiplied by the bias corrections, not divided": (
        "-lr * m * (1 - beta1 ** t) / ((v * (1 - beta2 ** t)) ** 0.5 + eps)"
    ),
    "m is multiplied by its correction, not divided": (
        "-lr * m * (1 - beta1 ** t) / (v_hat ** 0.5 + eps)"
    ),
    "v is multiplied by its correction, not divided": (
        "-lr * m_hat / ((v * (1 - beta2 ** t)) ** 0.5 + eps)"
    ),
    "the correction is 1 - beta * t, not 1 - beta^t": (
        "-lr * (m / (1 - beta1 * t)) / ((v / (1 - beta2 * t)) ** 0.5 + eps)"
    ),
    "the correction of v comes after the root": (
        "-lr * m_hat / (v ** 0.5 / (1 - beta2 ** t) + eps)"
    ),
    "eps in the wrong place: under the root": "-lr * m_hat / (v_hat + eps) ** 0.5",
    "eps is missing": "-lr * m_hat / v_hat ** 0.5",
    "eps is not corrected along with v": (
        "-lr * m_hat * (1 - beta2 ** t) ** 0.5 / (v ** 0.5 + eps)"
    ),
    "the root of v is missing": "-lr * m_hat / (v_hat + eps)",
    "multiplied by the root of v, not divided": "-lr * m_hat * (v_hat ** 0.5 + eps)",
    "not divided by the root of v: momentum alone": "-lr * m_hat",
    "the sign: the update goes uphill": "lr * m_hat / (v_hat ** 0.5 + eps)",
    "the gradient in place of its mean": "-lr * g / (v_hat ** 0.5 + eps)",
    "m from before this step": _update(m="m_before"),
    "v from before this step": _update(v="v_before"),
    "m and v from before this step": _update(m="m_before", v="v_before"),
    "plain gradient descent": "-lr * g",
    "the learning rate is missing": "-m_hat / (v_hat ** 0.5 + eps)",
    "the learning rate is not decayed": "-lr_full * m_hat / (v_hat ** 0.5 + eps)",
    "the learning rate is squared": "-lr ** 2 * m_hat / (v_hat ** 0.5 + eps)",
    "the learning rate is a step ahead": "-lr_next * m_hat / (v_hat ** 0.5 + eps)",
    "Nesterov's step: beta1 m_hat + (1 - beta1) g": (
        "-lr * (beta1 * m_hat + (1 - beta1) * g / (1 - beta1 ** t)) / (v_hat ** 0.5 + eps)"
    ),
    "the parameters are not updated at all": "0 * m",
}
for _t in ("t + 1", "t - 1"):
    _words = f"off by one step: {_t} in place of t"
    OF_UPDATE |= {
        f"bias correction {_words}": _update(f"({_t})", f"({_t})"),
        f"bias correction of m {_words}": _update(of_m=f"({_t})"),
        f"bias correction of v {_words}": _update(of_v=f"({_t})"),
    }
AFTER_THE_FIRST = {  # from the second step on; at the first, these are the rule itself
    "the learning rate is a step behind": _update(lr="lr_before"),
    "always corrected as at the first step": _update("1", "1"),
    "corrections and learning rate are those of the first step": _update("1", "1", lr="lr_first"),
}
# what may take the place of -lr * decay * p, which weight decay adds to the rule
OF_DECAY = {
    "the weight decay is missing": "0",
    "the weight decay is not multiplied by the learning rate": "-decay * p",
    "the sign of the weight decay": "lr * decay * p",
    "the weight decay is applied twice": "-2 * lr * decay * p",
    "the weight decay is applied after the update": "-lr * decay * (p + rule)",
    "the weight decay is divided by the root of v too": "-lr * decay * p / (v_hat ** 0.5 + eps)",
    "the weight decay goes by the learning rate before the schedule": "-lr_full * decay * p",
    "the weight is multiplied by the square of 1 - lr decay": "p * ((1 - lr * decay) ** 2 - 1)",
}


def of_adam(
    phase: str, name: str, number: int, config: Config, step: Step, before: Step | None
) -> Iterator[Guess]:
    """A tensor of Adam by every wrong form; nothing if the tensor is not one of Adam's.

    number    of the step, from 1
    before    the step before this one
    """
    if phase not in ("adam_m", "adam_v", "update"):
        return
    names = _names(name, number, config, step)
    if phase == "adam_m":
        yield from values(OF_M, names)
        if before and f"gradient/d{name}" in before:
            names["factor_before"] = clipping(config, before)
            names["g_before"] = names["factor_before"] * before[f"gradient/d{name}"]
            yield from values(OF_THE_STEP_BEFORE, names)
        yield from slipped(M, names, {"g": ["raw"], "m": ["v"]})
    elif phase == "adam_v":
        names["m"] = step[f"adam_m/{name}"]
        names["m_hat"] = names["m"] / (1 - config.beta1**number)
        yield from values(OF_V, names)
        yield from slipped(V, names, {"g": ["raw", "m"], "v": ["m_before"]})
    else:
        names |= {"m": step[f"adam_m/{name}"], "v": step[f"adam_v/{name}"]}
        yield from _updates(number, config, names)


def _updates(number: int, config: Config, names: dict[str, Any]) -> Iterator[Guess]:
    b1, b2 = config.beta1, config.beta2
    names |= {"m_hat": names["m"] / (1 - b1**number), "v_hat": names["v"] / (1 - b2**number)}
    rates = {"lr": number - 1, "lr_next": number, "lr_first": 0, "lr_before": max(number - 2, 0)}
    names |= {name: learning_rate(step, config) for name, step in rates.items()}
    names["lr_full"] = config.learning_rate
    ((_, names["rule"]),) = values({"": UPDATE}, names)
    decay = -names["lr"] * config.weight_decay * names["p"]
    if config.weight_decay:  # without it, every form of the decay is the rule itself
        for words, other in values(OF_DECAY, names):
            yield words, names["rule"] + other
    forms = OF_UPDATE | (AFTER_THE_FIRST if number > 1 else {})
    for other_eps in (1e-3, 1e-5, 1e-6, 1e-7, 1e-8, 1e-10, 1e-12):
        if other_eps != config.adam_eps:
            words = f"eps is {other_eps:g}, not {config.adam_eps:g}"
            forms[words] = f"-lr * m_hat / (v_hat ** 0.5 + {other_eps})"
    for words, update in (*values(forms, names), *slipped(UPDATE, names)):
        yield words, update + decay


def _names(name: str, number: int, config: Config, step: Step) -> dict[str, Any]:
    """The number that each name of the formulas stands for; `raw`: the gradient before clipping."""
    raw, factor = step[f"gradient/d{name}"], clipping(config, step)
    every = [np.abs(step[key]) for key in step if key.startswith("gradient/")]
    return {
        "beta1": config.beta1, "beta2": config.beta2, "eps": config.adam_eps, "t": number,
        "decay": config.weight_decay, "p": step[f"entry/{name}"],
        "raw": raw, "g": factor * raw, "factor": factor,
        "m": step[f"entry_m/{name}"], "v": step[f"entry_v/{name}"],
        "m_before": step[f"entry_m/{name}"], "v_before": step[f"entry_v/{name}"],
        "limit": config.grad_clip or np.inf, "own_length": _not_zero(sqrt((raw**2).sum())),
        "length": _not_zero(sqrt(sum(float((x**2).sum()) for x in every))),
        "largest": _not_zero(max(float(x.max()) for x in every)),
        "sizes": _not_zero(sum(float(x.sum()) for x in every)),
        "clip": np.clip, "min": min, "sign": np.sign, "abs": np.abs, "mean": np.mean,
        "maximum": np.maximum,
    }  # fmt: skip


def _not_zero(number: float | Array) -> float:
    return max(float(number), 1e-300)
