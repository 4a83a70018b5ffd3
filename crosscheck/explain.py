"""The scalar expression behind an element of a tensor, with the numbers that went into it.

There is one function for each kind of tensor. Each states the expression for an index, collects
its operands from a step, and evaluates it, so that a step can be held against its own words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscheck.cases import Case
from crosscheck.trace import Array, Step, split_key
from microgpt.config import Config
from microgpt.train import learning_rate


@dataclass(frozen=True)
class Expression:
    """A formula for one element, what its letters stand for, and what it comes to."""

    formula: str
    operands: dict[str, Any]
    value: float


@dataclass(frozen=True)
class Place:
    """An element of a tensor of a step."""

    case: Case
    number: int  # of the step, from 1
    name: str  # of the tensor, without d for derivatives
    index: tuple[int, ...]
    step: Step

    @property
    def layer(self) -> str:
        """The prefix of the layer's names, "layer0.", or nothing."""
        before, dot, _ = self.name.rpartition(".")
        return before + dot

    @property
    def tap(self) -> str:
        """The name without the layer."""
        return self.name.rpartition(".")[2]

    def __getitem__(self, key: str) -> Array:
        """A tensor of the step: "forward/q" is that of this layer where layers have one."""
        phase, name = split_key(key)
        d, name = ("d", name[1:]) if phase in ("backward", "gradient") else ("", name)
        own = f"{phase}/{d}{self.layer}{name}"
        return self.step[own] if own in self.step else self.step[f"{phase}/{d}{name}"]

    @property
    def tokens(self) -> Array:
        """(B, T + 1) token ids, -1 for padding."""
        return self.step["batch/tokens"]


def expression(
    case: Case, number: int, key: str, index: tuple[int, ...], step: Step
) -> Expression | None:
    """The expression of an element, or None where there is none (the batch, the state at entry).

    number    which step it is, from 1
    step      the tensors from which the operands are taken
    """
    phase, name = split_key(key)
    if phase in ("batch", "sample", "read", "entry", "entry_m", "entry_v"):
        return None
    if phase == "unwatched":
        phase = "forward" if name == "loss" else "gradient"
    elif phase == "eval":
        phase = "forward"
    if phase in ("backward", "gradient"):
        name = name[1:]
    place = Place(case, number, name, index, step)
    table = {"forward": FORWARD, "backward": BACKWARD, "gradient": GRADIENT}.get(phase, ADAM)
    return table[phase if table is ADAM else place.tap](place)


def _emb(p: Place) -> Expression:
    b, t, c = p.index
    token = int(p.tokens[b, t])
    wte, wpe = p["entry/wte"][token, c], p["entry/wpe"][t, c]
    return Expression(f"wte[{token}] + wpe[{t}]", {"wte": wte, "wpe": wpe}, wte + wpe)


def _norm(p: Place) -> Expression:
    b, t, c = p.index
    eps, inside = p.case.config.norm_eps, _inside_norm(p)
    x = p.step[f"forward/{inside}"][b, t]
    value = x[c] * (np.mean(x * x) + eps) ** -0.5
    return Expression(f"x[{c}] (mean(x x) + {eps:g})^-0.5, x = {inside}", {"x": x}, value)


def _linear(weight: str, inside: str, plus: Callable[[Place], str] | None = None) -> Any:
    """weight[c] . inside, plus the residual stream."""

    def expression(p: Place) -> Expression:
        b, t, c = p.index
        matrix = _lm_head(p) if weight == "lm_head" else weight
        x_name = _last(p) if inside == "last" else inside
        w, x = p[f"entry/{matrix}"][c], p[f"forward/{x_name}"][b, t]
        formula, operands, value = f"{matrix}[{c}] . {x_name}", {matrix: w, x_name: x}, w.dot(x)
        if plus:
            stream = p.step[f"forward/{plus(p)}"][b, t, c]
            formula += f" + {plus(p)}[{c}]"
            operands[plus(p)] = stream
            value += stream
        return Expression(formula, operands, value)

    return expression


def _attn_logits(p: Place) -> Expression:
    b, h, t, u = p.index
    head, D = _head(p, h), p.case.config.head_dim
    q, k = p["forward/q"][b, t, head], p["forward/k"][b, u, head]
    formula = f"q . k / sqrt({D}), channels {head.start} to {head.stop - 1}"
    return Expression(formula, {f"q[t={t}]": q, f"k[u={u}]": k}, q.dot(k) / math.sqrt(D))


def _attn_weights(p: Place) -> Expression:
    b, h, t, u = p.index
    x = p["forward/attn_logits"][b, h, t, : t + 1]
    exps = np.exp(x - x.max())
    formula = f"exp(x[{u}]) / sum(exp(x)), x = attn_logits[u=0..{t}]"
    return Expression(formula, {"x": x}, exps[u] / exps.sum())


def _attn_out(p: Place) -> Expression:
    b, t, c = p.index
    h = c // p.case.config.head_dim
    weights, v = p["forward/attn_weights"][b, h, t, : t + 1], p["forward/v"][b, : t + 1, c]
    formula = f"attn_weights[h={h}] . v[c={c}], over u=0..{t}"
    return Expression(formula, {"attn_weights": weights, "v": v}, weights.dot(v))


def _mlp_act(p: Place) -> Expression:
    x = p["forward/mlp_pre"][p.index]
    squared = p.case.config.activation == "squared_relu"
    relu = max(x, 0.0)
    formula = "relu(mlp_pre) ** 2" if squared else "relu(mlp_pre)"
    return Expression(formula, {"mlp_pre": x}, relu**2 if squared else relu)


def _loss_t(p: Place) -> Expression:
    b, t = p.index
    target, logits = int(p.tokens[b, t + 1]), p["forward/logits"][b, t]
    value = math.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target]
    return Expression(f"-log(softmax(logits)[{target}])", {"logits": logits}, value)


def _loss(p: Place) -> Expression:
    lengths = (p.tokens >= 0).sum(axis=1) - 1
    means = p["forward/loss_t"].sum(axis=1) / lengths
    formula = "mean over documents of the mean over positions of loss_t"
    return Expression(formula, {"document means": means}, means.mean())


def _dloss(p: Place) -> Expression:
    return Expression("1", {}, 1.0)


def _dloss_t(p: Place) -> Expression:
    B, n = len(p.tokens), int((p.tokens[p.index[0]] >= 0).sum()) - 1
    return Expression(f"1 / (B n) = 1 / ({B} * {n})", {}, 1 / (B * n))


def _dlogits(p: Place) -> Expression:
    b, t, i = p.index
    hit = int(p.tokens[b, t + 1]) == i
    dloss_t, logits = p["backward/dloss_t"][b, t], p["forward/logits"][b, t]
    exps = np.exp(logits - logits.max())
    formula = f"dloss_t (softmax(logits)[{i}]{' - 1' if hit else ''})"
    value = dloss_t * (exps[i] / exps.sum() - hit)
    return Expression(formula, {"dloss_t": dloss_t, "logits": logits}, value)


def _linear_back(weight: str, outside: str) -> Any:
    """weight[:, c] . doutside."""

    def expression(p: Place) -> Expression:
        b, t, c = p.index
        w, dy = p[f"entry/{weight}"][:, c], p[f"backward/d{outside}"][b, t]
        formula = f"{weight}[:, {c}] . d{outside}"
        return Expression(formula, {weight: w, f"d{outside}": dy}, w.dot(dy))

    return expression


def _dmlp_pre(p: Place) -> Expression:
    dy, x = p["backward/dmlp_act"][p.index], p["forward/mlp_pre"][p.index]
    if p.case.config.activation == "squared_relu":
        formula, slope = "dmlp_act 2 relu(mlp_pre)", 2 * max(x, 0.0)
    else:
        formula, slope = "dmlp_act where mlp_pre > 0, else 0", float(x > 0)
    return Expression(formula, {"dmlp_act": dy, "mlp_pre": x}, dy * slope)


def _dattn_weights(p: Place) -> Expression:
    b, h, t, u = p.index
    head = _head(p, h)
    dout, v = p["backward/dattn_out"][b, t, head], p["forward/v"][b, u, head]
    formula = f"dattn_out . v, channels {head.start} to {head.stop - 1}"
    return Expression(formula, {f"dattn_out[t={t}]": dout, f"v[u={u}]": v}, dout.dot(v))


def _dattn_logits(p: Place) -> Expression:
    b, h, t, u = p.index
    w = p["forward/attn_weights"][b, h, t, : t + 1]
    dw = p["backward/dattn_weights"][b, h, t, : t + 1]
    formula = f"w[{u}] (dw[{u}] - dw . w), w = attn_weights[u=0..{t}]"
    return Expression(formula, {"w": w, "dw": dw}, w[u] * (dw[u] - dw.dot(w)))


def _dv(p: Place) -> Expression:
    b, u, c = p.index
    h, n = c // p.case.config.head_dim, _positions(p, b)
    weights = p["forward/attn_weights"][b, h, u:n, u]
    dout = p["backward/dattn_out"][b, u:n, c]
    formula = f"attn_weights[h={h}, u={u}] . dattn_out[c={c}], over t={u}..{n - 1}"
    return Expression(formula, {"attn_weights": weights, "dattn_out": dout}, weights.dot(dout))


def _dk(p: Place) -> Expression:
    b, u, c = p.index
    D, n = p.case.config.head_dim, _positions(p, b)
    dlogits = p["backward/dattn_logits"][b, c // D, u:n, u]
    q = p["forward/q"][b, u:n, c]
    formula = f"dattn_logits[h={c // D}, u={u}] . q[c={c}] / sqrt({D}), over t={u}..{n - 1}"
    return Expression(formula, {"dattn_logits": dlogits, "q": q}, dlogits.dot(q) / math.sqrt(D))


def _dq(p: Place) -> Expression:
    b, t, c = p.index
    D = p.case.config.head_dim
    dlogits = p["backward/dattn_logits"][b, c // D, t, : t + 1]
    k = p["forward/k"][b, : t + 1, c]
    formula = f"dattn_logits[h={c // D}, t={t}] . k[c={c}] / sqrt({D}), over u=0..{t}"
    return Expression(formula, {"dattn_logits": dlogits, "k": k}, dlogits.dot(k) / math.sqrt(D))


def _dattn_norm(p: Place) -> Expression:
    b, t, c = p.index
    parts = {f"d{x}": p[f"backward/d{x}"][b, t] for x in "qkv"}
    value = sum(p[f"entry/attn_w{x}"][:, c].dot(parts[f"d{x}"]) for x in "qkv")
    formula = " + ".join(f"attn_w{x}[:, {c}] . d{x}" for x in "qkv")
    return Expression(formula, parts, value)


def _dstream(p: Place) -> Expression:
    """What comes back to the residual stream: past the next block, and through its norm."""
    b, t, c = p.index
    if p.name == _last(p):
        head = _lm_head(p)
        w, dy = p[f"entry/{head}"][:, c], p["backward/dlogits"][b, t]
        return Expression(f"{head}[:, {c}] . dlogits", {head: w, "dlogits": dy}, w.dot(dy))
    if p.tap == "attn_res":
        norm, beyond = f"{p.layer}mlp_norm", f"{p.layer}mlp_res"
    elif p.name == "emb" and p.case.config.norm_embedding:
        norm, beyond = "emb_norm", ""
    else:
        i = int(p.layer.removeprefix("layer").removesuffix(".")) + 1 if p.layer else 0
        norm, beyond = f"layer{i}.attn_norm", f"layer{i}.attn_res"
    x, dy = p.step[f"forward/{p.name}"][b, t], p.step[f"backward/d{norm}"][b, t]
    scale = (np.mean(x * x) + p.case.config.norm_eps) ** -0.5
    y = x * scale
    value = scale * (dy[c] - y[c] * np.mean(dy * y))
    formula = f"s (d[{c}] - y[{c}] mean(d y)), s = (mean(x x) + eps)^-0.5, y = s x, d = d{norm}"
    operands = {"x": x, "d": dy}
    if beyond:
        around = p.step[f"backward/d{beyond}"][b, t, c]
        formula, operands, value = (
            f"d{beyond}[{c}] + {formula}",
            {f"d{beyond}": around, **operands},
            value + around,
        )
    return Expression(formula, operands, value)


def _dweight(outside: str, inside: str) -> Any:
    """The sum over positions of doutside[row] inside[column]."""

    def expression(p: Place) -> Expression:
        row, column = p.index
        x_name = _last(p) if inside == "last" else inside
        dy = p[f"backward/d{outside}"][:, :, row].reshape(-1)
        x = p[f"forward/{x_name}"][:, :, column].reshape(-1)
        formula = f"sum over positions of d{outside}[{row}] {x_name}[{column}]"
        return Expression(formula, {f"d{outside}": dy, x_name: x}, dy.dot(x))

    return expression


def _dwte(p: Place) -> Expression:
    row, column = p.index
    demb = p["backward/demb"][:, :, column][p.tokens[:, :-1] == row]
    formula, operands, value = (
        f"sum of demb[{column}] where the token is {row}",
        {"demb": demb},
        float(demb.sum()),
    )
    if p.case.config.tie_lm_head:
        head = _dweight("logits", "last")(p)
        formula, operands = f"{formula}, + {head.formula}", {**operands, **head.operands}
        value += head.value
    return Expression(formula, operands, value)


def _dwpe(p: Place) -> Expression:
    row, column = p.index
    demb = p["backward/demb"][:, row : row + 1, column].reshape(-1)
    return Expression(
        f"sum over documents of demb[t={row}, c={column}]", {"demb": demb}, demb.sum()
    )


def clipping(config: Config, step: Step) -> float:
    """What Adam multiplies the gradients with."""
    squares = sum(float((step[key] ** 2).sum()) for key in step if key.startswith("gradient/"))
    if not config.grad_clip or not squares:
        return 1.0
    return min(1.0, config.grad_clip / math.sqrt(squares))


def _clipped(p: Place) -> tuple[float, str]:
    """The element's gradient as Adam takes it, and how it is written."""
    factor = clipping(p.case.config, p.step)
    g = p[f"gradient/d{p.name}"][p.index]
    return factor * g, "g" if factor == 1 else f"({factor:.6g} g)"


def _m(p: Place) -> Expression:
    beta = p.case.config.beta1
    (g, written), m = _clipped(p), p[f"entry_m/{p.name}"][p.index]
    formula = f"{beta:g} m + (1 - {beta:g}) {written}"
    return Expression(formula, {"m before": m, "g": g}, beta * m + (1 - beta) * g)


def _v(p: Place) -> Expression:
    beta = p.case.config.beta2
    (g, written), v = _clipped(p), p[f"entry_v/{p.name}"][p.index]
    formula = f"{beta:g} v + (1 - {beta:g}) {written}^2"
    return Expression(formula, {"v before": v, "g": g}, beta * v + (1 - beta) * g * g)


def _update(p: Place) -> Expression:
    config, n = p.case.config, p.number
    m, v = p[f"adam_m/{p.name}"][p.index], p[f"adam_v/{p.name}"][p.index]
    lr_t = learning_rate(n - 1, config)
    m_hat, v_hat = m / (1 - config.beta1**n), v / (1 - config.beta2**n)
    formula = (
        f"-lr_t m_hat / (sqrt(v_hat) + {config.adam_eps:g}), lr_t = {lr_t:g},"
        f" m_hat = m / (1 - {config.beta1:g}^{n}), v_hat = v / (1 - {config.beta2:g}^{n})"
    )
    value = -lr_t * m_hat / (math.sqrt(v_hat) + config.adam_eps)
    if not config.weight_decay:
        return Expression(formula, {"m": m, "v": v}, value)
    weight = p[f"entry/{p.name}"][p.index]
    formula = f"-lr_t {config.weight_decay:g} p {formula}"
    value -= lr_t * config.weight_decay * weight
    return Expression(formula, {"p": weight, "m": m, "v": v}, value)


def _params(p: Place) -> Expression:
    before, update = p[f"entry/{p.name}"][p.index], p[f"update/{p.name}"][p.index]
    return Expression("p + update", {"p": before, "update": update}, before + update)


def _head(p: Place, h: int) -> slice:
    D = p.case.config.head_dim
    return slice(h * D, (h + 1) * D)


def _positions(p: Place, b: int) -> int:
    return int((p.tokens[b] >= 0).sum()) - 1


def _lm_head(p: Place) -> str:
    return "wte" if p.case.config.tie_lm_head else "lm_head"


def _last(p: Place) -> str:
    return f"layer{p.case.config.n_layer - 1}.mlp_res"


def _stream_before(p: Place) -> str:
    """What the residual stream holds where this layer begins."""
    i = int(p.layer.removeprefix("layer").removesuffix("."))
    if i > 0:
        return f"layer{i - 1}.mlp_res"
    return "emb_norm" if p.case.config.norm_embedding else "emb"


def _stream_between(p: Place) -> str:
    return f"{p.layer}attn_res"


def _inside_norm(p: Place) -> str:
    if p.tap == "emb_norm":
        return "emb"
    return _stream_before(p) if p.tap == "attn_norm" else _stream_between(p)


Table = dict[str, Callable[[Place], Expression]]

FORWARD: Table = {
    "emb": _emb,
    "emb_norm": _norm,
    "attn_norm": _norm,
    "q": _linear("attn_wq", "attn_norm"),
    "k": _linear("attn_wk", "attn_norm"),
    "v": _linear("attn_wv", "attn_norm"),
    "attn_logits": _attn_logits,
    "attn_weights": _attn_weights,
    "attn_out": _attn_out,
    "attn_res": _linear("attn_wo", "attn_out", _stream_before),
    "mlp_norm": _norm,
    "mlp_pre": _linear("mlp_fc1", "mlp_norm"),
    "mlp_act": _mlp_act,
    "mlp_res": _linear("mlp_fc2", "mlp_act", _stream_between),
    "logits": _linear("lm_head", "last"),
    "loss_t": _loss_t,
    "loss": _loss,
}
BACKWARD: Table = {
    "loss": _dloss,
    "loss_t": _dloss_t,
    "logits": _dlogits,
    "mlp_res": _dstream,
    "mlp_act": _linear_back("mlp_fc2", "mlp_res"),
    "mlp_pre": _dmlp_pre,
    "mlp_norm": _linear_back("mlp_fc1", "mlp_pre"),
    "attn_res": _dstream,
    "attn_out": _linear_back("attn_wo", "attn_res"),
    "attn_weights": _dattn_weights,
    "attn_logits": _dattn_logits,
    "v": _dv,
    "k": _dk,
    "q": _dq,
    "attn_norm": _dattn_norm,
    "emb_norm": _dstream,
    "emb": _dstream,
}
GRADIENT: Table = {
    "wte": _dwte,
    "wpe": _dwpe,
    "lm_head": _dweight("logits", "last"),
    "attn_wq": _dweight("q", "attn_norm"),
    "attn_wk": _dweight("k", "attn_norm"),
    "attn_wv": _dweight("v", "attn_norm"),
    "attn_wo": _dweight("attn_res", "attn_out"),
    "mlp_fc1": _dweight("mlp_pre", "mlp_norm"),
    "mlp_fc2": _dweight("mlp_res", "mlp_act"),
}
ADAM: Table = {"adam_m": _m, "adam_v": _v, "update": _update, "params": _params}


def shown(operand: Any, longest: int = 4) -> str:
    """Numbers, the first few of them."""
    if not np.ndim(operand):
        return f"{float(operand):.6g}"
    numbers = np.asarray(operand).reshape(-1)
    text = " ".join(f"{x:.5g}" for x in numbers[:longest])
    return f"[{text}]" if len(numbers) <= longest else f"[{text} ..] ({len(numbers)} numbers)"
