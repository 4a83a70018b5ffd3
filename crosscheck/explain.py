"""The scalar expression behind an element of a tensor, with its operands and its value.

The table says which operations and operands give a tensor. This module writes each operation as a
formula for one element; crosscheck.operations computes the value.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from crosscheck.cases import Case
from crosscheck.operations import Around, Call, calls
from crosscheck.read_again import read
from crosscheck.trace import Array, Step, split_key
from microgpt.config import Config
from microgpt.taps import ACTIVATIONS
from microgpt.train import learning_rate


@dataclass(frozen=True)
class Expression:
    """A formula for one element, the operands that its names stand for, and its value.

    The name of an operand may say what a letter of the formula stands for: "x = emb".
    """

    formula: str
    operands: dict[str, Any]
    value: float


def expression(
    case: Case, number: int, key: str, index: tuple[int, ...], step: Step
) -> Expression | None:
    """The expression of an element; None if there is none (of the batch, of the state at entry).

    number    of the step, from 1
    step      the tensors from which the operands are taken

    Raises KeyError if an operand is missing, or is not numbers in the shape of the table.
    """
    phase, name = split_key(key)
    if phase in ADAM:
        return ADAM[phase](case.config, number, name, index, step)
    if key == "backward/dloss":
        return Expression("1", {}, 1.0)
    around = Around(case.config, step)
    if phase == "read":
        t, token = index
        formula = f"logits[{token}] of position {t}, which looks at the keys and values of 0..{t}"
        return Expression(formula, {"tokens": around.token[0, : t + 1]}, read(around)[index])
    written = [_written(call, index) for call in calls(around, key)]
    if not written:
        return None
    own = name.removeprefix("d").rpartition(".")[0] + "."

    def short(words: str) -> str:
        """The words with the names of the same layer without the layer."""
        return words.replace(own, "") if own != "." else words

    parts = [
        f"({one.formula})" if len(written) > 1 and one.in_words else one.formula for one in written
    ]
    operands = {short(k): v for one in written for k, v in one.operands.items()}
    value = sum(float(one.value) for one in written)
    return Expression(short(" + ".join(parts)), operands, value)


@dataclass(frozen=True)
class Written:
    """An operation as a formula for one element."""

    formula: str
    operands: dict[str, Any]
    value: float = 0.0
    in_words: bool = False  # "sum of .. where ..", which is put in brackets within a sum


def _written(call: Call, index: tuple[int, ...]) -> Written:
    words = WORDS.get(call.function.__name__, _by_name)(call, index)
    return replace(words, value=float(call.total()[index]))


def _by_name(call: Call, index: tuple[int, ...]) -> Written:
    """An operation of the table for which WORDS has no function."""
    tensors = {slot.name: slot.value for slot in call.slots.values() if slot.is_tensor}
    return Written(f"{call.function.__name__}({', '.join(tensors)})", tensors)


def _embedding(call: Call, index: tuple[int, ...]) -> Written:
    b, t, c = index
    wte, wpe, token = (call.slots[name].value for name in ("wte", "wpe", "token"))
    row = int(token[b, t])
    return Written(f"wte[{row}] + wpe[{t}]", {"wte": wte[row, c], "wpe": wpe[t, c]})


def _d_wte(call: Call, index: tuple[int, ...]) -> Written:
    row, c = index
    dy = call.slots["dy"].value[:, :, c][(call.around.tokens[:, :-1] == row) & call.around.real]
    formula = f"sum of demb[{c}] where the token is {row}"
    return Written(formula, {"demb": dy}, in_words=True)


def _d_wpe(call: Call, index: tuple[int, ...]) -> Written:
    row, c = index
    dy = call.slots["dy"].value[:, row : row + 1, c].reshape(-1)
    formula = f"sum over documents of demb[t={row}, c={c}]"
    return Written(formula, {"demb": dy}, in_words=True)


def _rmsnorm(call: Call, index: tuple[int, ...]) -> Written:
    x, eps = call.slots["x"], call.slots["eps"].value
    formula = f"x[{index[-1]}] (mean(x x) + {eps:g})^-0.5"
    return Written(formula, {f"x = {x.name}": x.value[index[:-1]]})


def _d_rmsnorm(call: Call, index: tuple[int, ...]) -> Written:
    *at, c = index
    dy, y, scale = (call.slots[name] for name in ("dy", "y", "scale"))
    numbers = {
        f"d = {dy.name}": dy.value[tuple(at)],
        f"y = {y.name}": y.value[tuple(at)],
        f"s = (mean(x x) + {call.around.config.norm_eps:g})^-0.5": scale.value[tuple(at)][0],
    }
    return Written(f"s (d[{c}] - y[{c}] mean(d y))", numbers)


def _linear(call: Call, index: tuple[int, ...]) -> Written:
    b, t, o = index
    x, w = call.slots["x"], call.slots["w"]
    numbers = {w.name: w.value[o], x.name: x.value[b, t]}
    return Written(f"{w.name}[{o}] . {x.name}", numbers)


def _linear_residual(call: Call, index: tuple[int, ...]) -> Written:
    product, res = _linear(call, index), call.slots["res"]
    numbers = {**product.operands, res.name: res.value[index]}
    return Written(f"{product.formula} + {res.name}[{index[-1]}]", numbers)


def _d_input(call: Call, index: tuple[int, ...]) -> Written:
    b, t, c = index
    dy, w = call.slots["dy"], call.slots["w"]
    numbers = {w.name: w.value[:, c], dy.name: dy.value[b, t]}
    return Written(f"{w.name}[:, {c}] . {dy.name}", numbers)


def _d_weight(call: Call, index: tuple[int, ...]) -> Written:
    o, i = index
    dy, x = call.slots["dy"], call.slots["x"]
    numbers = {
        dy.name: dy.value[:, :, o][call.around.real],
        x.name: x.value[:, :, i][call.around.real],
    }
    formula = f"sum over positions of {dy.name}[{o}] {x.name}[{i}]"
    return Written(formula, numbers, in_words=True)


def _d_residual(call: Call, index: tuple[int, ...]) -> Written:
    dy = call.slots["dy"]
    return Written(f"{dy.name}[{index[-1]}]", {dy.name: dy.value[index]})


def _scores(call: Call, index: tuple[int, ...]) -> Written:
    b, h, t, u = index
    D = call.around.config.head_dim
    q, k = (call.around.heads(call.slots[name].value) for name in "qk")
    numbers = {
        f"q[t={t}, {_channels(D, h)}]": q[b, t, h],
        f"k[u={u}, {_channels(D, h)}]": k[b, u, h],
    }
    return Written(f"q . k / sqrt({D})", numbers)


def _channels(D: int, h: int) -> str:
    """The channels of a head: "c=4..7"."""
    return f"c={h * D}..{h * D + D - 1}"


def _over_positions(call: Call, index: tuple[int, ...], at: str, other: str, late: bool) -> Written:
    """A sum over positions.

    at, other    the names of the operands: one with the axes T and U, and one with channels
    late         sum over the later positions, t = u.., and not over the earlier ones, u = 0..t
    """
    b, here, c = index
    D, n = call.around.config.head_dim, int(call.around.n[b])
    of_pairs, x = call.slots[at], call.slots[other]
    seen = slice(here, n) if late else slice(0, here + 1)
    h = c // D
    pairs = of_pairs.value[b, h, seen, here] if late else of_pairs.value[b, h, here, seen]
    over = f"t={here}..{n - 1}" if late else f"u=0..{here}"
    scale = f" / sqrt({D})" if "scale" in call.slots else ""
    fixed = f"u={here}" if late else f"t={here}"
    numbers = {
        f"{of_pairs.name}[h={h}, {fixed}, {over}]": pairs,
        f"{x.name}[{over}, c={c}]": x.value[b, seen, c],
    }
    return Written(f"{of_pairs.name}[h={h}, {fixed}] . {x.name}[c={c}]{scale}", numbers)


def _softmax(call: Call, index: tuple[int, ...]) -> Written:
    b, h, t, u = index
    x = call.slots["x"]
    formula = f"exp(x[{u}] - max(x)) / sum(exp(x - max(x)))"
    return Written(formula, {f"x = {x.name}[u=0..{t}]": x.value[b, h, t, : t + 1]})


def _d_softmax(call: Call, index: tuple[int, ...]) -> Written:
    b, h, t, u = index
    dy, y = (call.slots[name] for name in ("dy", "y"))
    w, dw = y.value[b, h, t, : t + 1], dy.value[b, h, t, : t + 1]
    numbers = {f"w = {y.name}[u=0..{t}]": w, f"dw = {dy.name}[u=0..{t}]": dw}
    return Written(f"w[{u}] (dw[{u}] - dw . w)", numbers)


def _d_weights(call: Call, index: tuple[int, ...]) -> Written:
    b, h, t, u = index
    D = call.around.config.head_dim
    dy, v = (call.slots[name] for name in ("dy", "v"))
    numbers = {
        f"{dy.name}[t={t}, {_channels(D, h)}]": call.around.heads(dy.value)[b, t, h],
        f"{v.name}[u={u}, {_channels(D, h)}]": call.around.heads(v.value)[b, u, h],
    }
    return Written(f"{dy.name} . {v.name}", numbers)


def _activation(call: Call, index: tuple[int, ...]) -> Written:
    x, kind = call.slots["x"], call.slots["kind"].value
    return Written(ACTIVATIONS[kind].value, {f"x = {x.name}": x.value[index]})


def _d_activation(call: Call, index: tuple[int, ...]) -> Written:
    dy, x, kind = (call.slots[name] for name in ("dy", "x", "kind"))
    formula = f"{dy.name} * {_factor(ACTIVATIONS[kind.value].slope)}"
    return Written(formula, {dy.name: dy.value[index], f"x = {x.name}": x.value[index]})


def _factor(formula: str) -> str:
    """A Python formula as a factor: in brackets if it is a sum."""
    tree = ast.parse(formula, mode="eval").body
    is_sum = isinstance(tree, ast.BinOp) and isinstance(tree.op, (ast.Add, ast.Sub))
    return f"({formula})" if is_sum else formula


def _cross_entropy(call: Call, index: tuple[int, ...]) -> Written:
    target = int(call.slots["target"].value[index])
    return Written(
        f"-log(softmax(logits)[{target}])", {"logits": call.slots["logits"].value[index]}
    )


def _d_cross_entropy(call: Call, index: tuple[int, ...]) -> Written:
    *at, i = index
    dy, logits, target = (call.slots[name].value for name in ("dy", "logits", "target"))
    hit = " - 1" if int(target[tuple(at)]) == i else ""
    numbers = {"dloss_t": dy[tuple(at)], "logits": logits[tuple(at)]}
    return Written(f"dloss_t (softmax(logits)[{i}]{hit})", numbers)


def _mean(call: Call, index: tuple[int, ...]) -> Written:
    means = call.slots["loss_t"].value.sum(axis=1) / call.around.n
    formula = "mean over documents of the mean over positions of loss_t"
    return Written(formula, {"document means": means})


def _d_mean(call: Call, index: tuple[int, ...]) -> Written:
    B, n = len(call.around.n), int(call.around.n[index[0]])
    return Written(f"1 / (B n) = 1 / ({B} * {n})", {})


WORDS: dict[str, Callable[[Call, tuple[int, ...]], Written]] = {
    "embedding": _embedding,
    "d_wte": _d_wte,
    "d_wpe": _d_wpe,
    "rmsnorm": _rmsnorm,
    "d_rmsnorm": _d_rmsnorm,
    "linear": _linear,
    "linear_residual": _linear_residual,
    "d_input": _d_input,
    "d_weight": _d_weight,
    "d_residual": _d_residual,
    "scores": _scores,
    "d_query": lambda call, index: _over_positions(call, index, "dy", "k", late=False),
    "d_key": lambda call, index: _over_positions(call, index, "dy", "q", late=True),
    "softmax": _softmax,
    "d_softmax": _d_softmax,
    "weighted_sum": lambda call, index: _over_positions(call, index, "weights", "v", late=False),
    "d_weights": _d_weights,
    "d_value": lambda call, index: _over_positions(call, index, "weights", "dy", late=True),
    "activation": _activation,
    "d_activation": _d_activation,
    "cross_entropy": _cross_entropy,
    "d_cross_entropy": _d_cross_entropy,
    "mean": _mean,
    "d_mean": _d_mean,
}


def clipping(config: Config, step: Step) -> float:
    """The factor by which Adam multiplies the gradients to clip them."""
    squares = sum(float((step[key] ** 2).sum()) for key in step if key.startswith("gradient/"))
    if not config.grad_clip or not squares:
        return 1.0
    return min(1.0, config.grad_clip / math.sqrt(squares))


Index = tuple[int, ...]


def _m(config: Config, n: int, name: str, index: Index, step: Step) -> Expression:
    factor, g, written = _clipped(config, name, index, step)
    beta, m = config.beta1, step[f"entry_m/{name}"][index]
    formula = f"{beta:g} m + (1 - {beta:g}) {written}"
    return Expression(formula, {"m before": m, "g": g}, beta * m + (1 - beta) * (factor * g))


def _v(config: Config, n: int, name: str, index: Index, step: Step) -> Expression:
    factor, g, written = _clipped(config, name, index, step)
    beta, v = config.beta2, step[f"entry_v/{name}"][index]
    formula = f"{beta:g} v + (1 - {beta:g}) {written}^2"
    return Expression(formula, {"v before": v, "g": g}, beta * v + (1 - beta) * (factor * g) ** 2)


def _update(config: Config, n: int, name: str, index: Index, step: Step) -> Expression:
    m, v = (step[f"{phase}/{name}"][index] for phase in ("adam_m", "adam_v"))
    lr_t = learning_rate(n - 1, config)
    m_hat, v_hat = m / (1 - config.beta1**n), v / (1 - config.beta2**n)
    numbers = {
        "lr_t": lr_t,
        f"m_hat = m / (1 - {config.beta1:g}^{n})": m_hat,
        f"v_hat = v / (1 - {config.beta2:g}^{n})": v_hat,
        "m": m,
        "v": v,
    }
    rest = f"lr_t m_hat / (sqrt(v_hat) + {config.adam_eps:g})"
    value = -lr_t * m_hat / (math.sqrt(v_hat) + config.adam_eps)
    if not config.weight_decay:
        return Expression(f"-{rest}", numbers, value)
    weight = step[f"entry/{name}"][index]
    formula = f"-lr_t {config.weight_decay:g} p - {rest}"
    value -= lr_t * config.weight_decay * weight
    return Expression(formula, {"p": weight, **numbers}, value)


def _params(config: Config, n: int, name: str, index: Index, step: Step) -> Expression:
    before, update = step[f"entry/{name}"][index], step[f"update/{name}"][index]
    return Expression("p + update", {"p": before, "update": update}, before + update)


def _clipped(config: Config, name: str, index: Index, step: Step) -> tuple[float, float, str]:
    """The factor of clipping, the element's gradient, and the text for their product."""
    factor = clipping(config, step)
    text = "g" if factor == 1 else f"({factor:.6g} g)"
    return factor, float(step[f"gradient/d{name}"][index]), text


ADAM = {"adam_m": _m, "adam_v": _v, "update": _update, "params": _params}


def shown(operand: Any, longest: int = 4) -> str:
    """An operand as text: the first few of its numbers, and how many there are."""
    if not np.ndim(operand):
        return f"{float(operand):.6g}"
    numbers: Array = np.asarray(operand).reshape(-1)
    text = " ".join(f"{x:.5g}" for x in numbers[:longest])
    return f"[{text}]" if len(numbers) <= longest else f"[{text} ..] ({len(numbers)} numbers)"
