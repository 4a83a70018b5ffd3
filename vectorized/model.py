"""The GPT in arrays: all documents, positions and channels of a batch at once.

Same as scalar:         the functions, their order, their equations, the names of the taps.
Different from scalar:  position loop -> T axis; growing key/value list -> causal mask;
                        head slices -> H axis; one document -> B axis with weights;
                        graph and loss.backward() -> explicit backward, loss_backward;
                        p.grad = 0 -> gradients are assigned; -log(p) -> log of a sum.

Each f_forward has its f_backward directly beneath: the forward pass read upside down. dy stands for
the derivative of the loss with respect to y. At the end of a line: (its shape).
B = documents (or rows of several: Batch), T = positions, U = positions looked at (T in training),
C = n_embd, H = n_head, D = C / H channels a head, F = 4 C, V = vocabulary, `..` = any axes. In
einsum, lower case. `tap.name = ...` keeps an intermediate, to be looked at or for the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy import einsum, exp, log, maximum, pi, tanh
from numpy.typing import NDArray

from microgpt.config import Config
from microgpt.layout import Tree

Array = NDArray[Any]


class Batch(NamedTuple):
    """Rows of one length: a padded document each, or short documents one after another (packed)."""

    tokens: Array  # (B, T)
    targets: Array  # (B, T), the token after each
    weights: Array  # (B, T), factor of loss_t: 1 / documents / positions of its own, 0 in padding
    positions: Array  # (B, T), of each token in its document
    mask: Array  # (B, 1, T, U), zero where t may look at u, else -inf


def linear_forward(x: Array, w: Array) -> Array:
    """y = w . x"""
    return x @ w.T  # (B, T, n_in), (n_out, n_in) -> (B, T, n_out)


def linear_backward(dy: Array, x: Array, w: Array) -> tuple[Array, Array]:
    """dx = w^T . dy, dw = dy . x^T

    forward: y_o = sum_i w_oi x_i, at every position. So dx_i = sum_o w_oi dy_o, over the outputs
    that x_i goes into, and dw_oi is the sum of dy_o x_i over the positions that share w_oi.
    """
    dx = dy @ w  # (B, T, n_in)
    dw = einsum("bto,bti->oi", dy, x)  # (n_out, n_in)
    return dx, dw


def softmax_forward(x: Array) -> Array:
    """y = exp(x - max(x)) / sum(exp(x - max(x)))"""
    largest = x.max(axis=-1, keepdims=True)  # (.., 1)
    exps = exp(x - largest)  # (.., n)
    return exps / total(exps)  # (.., n) -> (.., n)


def softmax_backward(dy: Array, y: Array) -> Array:
    """dx = y * (dy - sum(dy * y))

    forward: y_i = e_i / sum_j e_j, e_i = exp(x_i - max(x)). When x_j rises by 1, y_i changes by
    y_i ([i = j] - y_j): y_j rises and the other y_i fall. So dx_j = sum_i dy_i y_i ([i = j] - y_j).
    exp(max(x)) divides numerator and denominator alike, and has no part in it.
    """
    return y * (dy - total(dy * y))  # (.., n), (.., n) -> (.., n)


def rmsnorm_forward(x: Array, eps: float) -> tuple[Array, Array]:
    """y = x * (mean(x * x) + eps) ** -0.5"""
    ms = mean(x * x)  # (.., 1)
    scale = (ms + eps) ** -0.5  # (.., 1)
    return x * scale, scale  # (.., n) -> (.., n), (.., 1)


def rmsnorm_backward(dy: Array, y: Array, scale: Array) -> Array:
    """dx = scale * (dy - y * mean(dy * y))

    forward: y_i = x_i scale, scale = (1/n sum_j x_j^2 + eps)^-0.5. As a factor, x_i receives
    dy_i scale. The scale receives sum_j dy_j x_j, and changes by -scale^3 x_i / n when x_i changes
    by 1; with x = y / scale, the product of the two is -scale y_i (1/n sum_j dy_j y_j).
    """
    return scale * (dy - y * mean(dy * y))  # (.., n), (.., n), (.., 1) -> (.., n)


def activation_forward(x: Array, kind: str) -> Array:
    """y = relu(x), relu(x) ** 2, or gelu: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))"""
    if kind == "relu":
        return maximum(x, 0.0)  # (.., n) -> (.., n)
    if kind == "squared_relu":
        return maximum(x, 0.0) ** 2  # (.., n) -> (.., n)
    if kind == "gelu":
        cubic = (2 / pi) ** 0.5 * (x + 0.044715 * x**3)  # (.., n)
        return 0.5 * x * (1.0 + tanh(cubic))  # (.., n) -> (.., n)
    raise ValueError(f"no formula here for the activation {kind!r}")


def activation_backward(dy: Array, x: Array, kind: str) -> Array:
    """dx = dy * [x > 0], dy * 2 relu(x), or dy times the slope of gelu

    forward: relu is x where x > 0, else 0: the slope is 1, else 0. Its square has 2 relu(x). gelu
    is x / 2 times 1 + tanh(c), and tanh(c) has the slope 1 - tanh(c)^2 times that of c.
    """
    if kind == "relu":
        return dy * (x > 0.0)  # (.., n), (.., n) -> (.., n)
    if kind == "squared_relu":
        return dy * (2.0 * maximum(x, 0.0))  # (.., n), (.., n) -> (.., n)
    if kind == "gelu":
        cubic = (2 / pi) ** 0.5 * (x + 0.044715 * x**3)  # (.., n)
        cubic_slope = (2 / pi) ** 0.5 * (1.0 + 3 * 0.044715 * x**2)  # (.., n)
        gate = tanh(cubic)  # (.., n)
        gelu_slope = 0.5 * (1.0 + gate) + 0.5 * x * (1.0 - gate**2) * cubic_slope  # (.., n)
        return dy * gelu_slope  # (.., n), (.., n) -> (.., n)
    raise ValueError(f"no formula here for the activation {kind!r}")


def attention_forward(
    x: Array, w: Tree, cache: Any, mask: Array | float, config: Config, tap: Tree
) -> Array:
    """attn_res = attn_wo . (softmax(q . k / sqrt(D)) . v) + x, where q, k, v = w . rmsnorm(x)

    cache    keys and values of the earlier positions, when sampling; None in training
    mask     0 where position t may look at position u, else -inf; 0.0 when sampling
    """
    # queries, keys and values
    tap.attn_norm, tap.attn_scale = rmsnorm_forward(x, config.norm_eps)  # (B, T, C), (B, T, 1)
    q = tap.q = linear_forward(tap.attn_norm, w.attn_wq)  # (B, T, C)
    k = tap.k = linear_forward(tap.attn_norm, w.attn_wk)  # (B, T, C)
    v = tap.v = linear_forward(tap.attn_norm, w.attn_wv)  # (B, T, C)
    keys, values = (k, v) if cache is None else cache.extend(k, v)  # (B, U, C), (B, U, C)
    q_heads = split_heads(q, config)  # (B, T, H, D)
    k_heads = split_heads(keys, config)  # (B, U, H, D)
    v_heads = split_heads(values, config)  # (B, U, H, D)
    # how much each head looks at each position up to this one
    scores = einsum("bthd,buhd->bhtu", q_heads, k_heads)  # (B, H, T, U)
    attn_logits = tap.attn_logits = scores / config.head_dim**0.5 + mask  # (B, H, T, U)
    attn_weights = tap.attn_weights = softmax_forward(attn_logits)  # (B, H, T, U)
    # what it sees there, heads side by side
    out_heads = einsum("bhtu,buhd->bthd", attn_weights, v_heads)  # (B, T, H, D)
    attn_out = tap.attn_out = merge_heads(out_heads)  # (B, T, C)
    # residual
    projected = linear_forward(attn_out, w.attn_wo)  # (B, T, C)
    attn_res = tap.attn_res = projected + x  # (B, T, C)
    return attn_res


def attention_backward(
    dattn_res: Array, w: Tree, dw: Tree, config: Config, tap: Tree, dtap: Tree
) -> Array:
    """dx = rmsnorm_backward(w^T . (dq, dk, dv)) + dattn_res

    forward: attn_out_td = sum_u weights_tu v_ud and logits_tu = sum_d q_td k_ud / sqrt(D), in every
    head of every row. Each is a product of two arrays, and each factor receives the derivative
    of the product times the other factor, summed over the index that the factor does not have.
    """
    q_heads = split_heads(tap.q, config)  # (B, T, H, D)
    k_heads = split_heads(tap.k, config)  # (B, U, H, D)
    v_heads = split_heads(tap.v, config)  # (B, U, H, D)
    # residual
    # forward: attn_res = attn_wo . attn_out + x
    dattn_out, dw.attn_wo = linear_backward(dattn_res, tap.attn_out, w.attn_wo)  # (B, T, C), (C, C)
    dtap.attn_out = dattn_out  # (B, T, C)
    # what it sees there, heads side by side
    # forward: attn_out = attn_weights . v
    dout_heads = split_heads(dattn_out, config)  # (B, T, H, D)
    dattn_weights = einsum("bthd,buhd->bhtu", dout_heads, v_heads)  # (B, H, T, U)
    dtap.attn_weights = dattn_weights  # (B, H, T, U)
    dv_heads = einsum("bthd,bhtu->buhd", dout_heads, tap.attn_weights)  # (B, U, H, D)
    # how much each head looks at each position up to this one
    # forward: attn_weights = softmax(attn_logits)
    dattn_logits = softmax_backward(dattn_weights, tap.attn_weights)  # (B, H, T, U)
    dtap.attn_logits = dattn_logits  # (B, H, T, U)
    # forward: attn_logits = q . k / sqrt(D) + mask
    dscores = dattn_logits / config.head_dim**0.5  # (B, H, T, U)
    dq_heads = einsum("bhtu,buhd->bthd", dscores, k_heads)  # (B, T, H, D)
    dk_heads = einsum("bhtu,bthd->buhd", dscores, q_heads)  # (B, U, H, D)
    # queries, keys and values
    # forward: q, k, v = attn_wq, attn_wk, attn_wv . attn_norm
    dq, dk, dv = merge_heads(dq_heads), merge_heads(dk_heads), merge_heads(dv_heads)
    dtap.q, dtap.k, dtap.v = dq, dk, dv  # (B, T, C), (B, T, C), (B, T, C)
    dnorm_q, dw.attn_wq = linear_backward(dq, tap.attn_norm, w.attn_wq)  # (B, T, C), (C, C)
    dnorm_k, dw.attn_wk = linear_backward(dk, tap.attn_norm, w.attn_wk)  # (B, T, C), (C, C)
    dnorm_v, dw.attn_wv = linear_backward(dv, tap.attn_norm, w.attn_wv)  # (B, T, C), (C, C)
    dattn_norm = dtap.attn_norm = dnorm_q + dnorm_k + dnorm_v  # (B, T, C)
    # forward: attn_norm = rmsnorm(x), and x goes on to the residual
    return rmsnorm_backward(dattn_norm, tap.attn_norm, tap.attn_scale) + dattn_res  # (B, T, C)


def mlp_forward(x: Array, w: Tree, config: Config, tap: Tree) -> Array:
    """mlp_res = mlp_fc2 . activation(mlp_fc1 . rmsnorm(x)) + x"""
    tap.mlp_norm, tap.mlp_scale = rmsnorm_forward(x, config.norm_eps)  # (B, T, C), (B, T, 1)
    mlp_pre = tap.mlp_pre = linear_forward(tap.mlp_norm, w.mlp_fc1)  # (B, T, F)
    mlp_act = tap.mlp_act = activation_forward(mlp_pre, config.activation)  # (B, T, F)
    # residual
    projected = linear_forward(mlp_act, w.mlp_fc2)  # (B, T, C)
    mlp_res = tap.mlp_res = projected + x  # (B, T, C)
    return mlp_res


def mlp_backward(
    dmlp_res: Array, w: Tree, dw: Tree, config: Config, tap: Tree, dtap: Tree
) -> Array:
    """dx = rmsnorm_backward(mlp_fc1^T . activation_backward(mlp_fc2^T . dmlp_res)) + dmlp_res"""
    # residual
    # forward: mlp_res = mlp_fc2 . mlp_act + x
    dmlp_act, dw.mlp_fc2 = linear_backward(dmlp_res, tap.mlp_act, w.mlp_fc2)  # (B, T, F), (C, F)
    dtap.mlp_act = dmlp_act  # (B, T, F)
    # forward: mlp_act = activation(mlp_pre)
    dmlp_pre = activation_backward(dmlp_act, tap.mlp_pre, config.activation)  # (B, T, F)
    dtap.mlp_pre = dmlp_pre  # (B, T, F)
    # forward: mlp_pre = mlp_fc1 . mlp_norm
    dmlp_norm, dw.mlp_fc1 = linear_backward(dmlp_pre, tap.mlp_norm, w.mlp_fc1)  # (B, T, C), (F, C)
    dtap.mlp_norm = dmlp_norm  # (B, T, C)
    # forward: mlp_norm = rmsnorm(x), and x goes on to the residual
    return rmsnorm_backward(dmlp_norm, tap.mlp_norm, tap.mlp_scale) + dmlp_res  # (B, T, C)


def gpt_forward(
    tokens: Array,
    positions: Array,
    params: Tree,
    caches: Sequence[Any],
    mask: Array | float,
    config: Config,
    tap: Tree,
) -> Array:
    """logits = lm_head . blocks(rmsnorm(wte[token] + wpe[position]))"""
    emb = tap.emb = params.wte[tokens] + params.wpe[positions]  # (B, T, C)
    res = emb
    if config.norm_embedding:
        tap.emb_norm, tap.emb_scale = rmsnorm_forward(emb, config.norm_eps)  # (B, T, C), (B, T, 1)
        res = tap.emb_norm  # (B, T, C)
    for w, cache, tap_i in zip(params.layers, caches, tap.layers):
        res = attention_forward(res, w, cache, mask, config, tap_i)  # (B, T, C)
        res = mlp_forward(res, w, config, tap_i)  # (B, T, C)
    lm_head = params.wte if config.tie_lm_head else params.lm_head  # (V, C)
    logits = tap.logits = linear_forward(res, lm_head)  # (B, T, V)
    return logits


def gpt_backward(
    dlogits: Array,
    tokens: Array,
    positions: Array,
    params: Tree,
    dparams: Tree,
    config: Config,
    tap: Tree,
    dtap: Tree,
) -> None:
    """dwte[token] = sum of demb where token is, dwpe[position] = sum of demb where position is

    dparams    where the gradient of every parameter goes
    """
    # forward: logits = lm_head . res
    res = tap.layers[-1].mlp_res  # (B, T, C)
    lm_head = params.wte if config.tie_lm_head else params.lm_head  # (V, C)
    dres, dlm_head = linear_backward(dlogits, res, lm_head)  # (B, T, C), (V, C)
    for i in reversed(range(config.n_layer)):
        w, dw, tap_i, dtap_i = params.layers[i], dparams.layers[i], tap.layers[i], dtap.layers[i]
        dtap_i.mlp_res = dres  # (B, T, C)
        dres = dtap_i.attn_res = mlp_backward(dres, w, dw, config, tap_i, dtap_i)  # (B, T, C)
        dres = attention_backward(dres, w, dw, config, tap_i, dtap_i)  # (B, T, C)
    demb = dres  # (B, T, C)
    if config.norm_embedding:
        dtap.emb_norm = dres  # (B, T, C)
        demb = rmsnorm_backward(dres, tap.emb_norm, tap.emb_scale)  # (B, T, C)
    dtap.emb = demb  # (B, T, C)
    # forward: emb = wte[token] + wpe[position]. Each occurrence adds to a row of dwte and of dwpe.
    # If wte is also lm_head, dwte starts from dlm_head.
    dwte = dlm_head if config.tie_lm_head else np.zeros_like(params.wte)  # (V, C)
    np.add.at(dwte, tokens, demb)
    dwpe = np.zeros_like(params.wpe)  # (block_size, C)
    np.add.at(dwpe, positions, demb)
    dparams.wte, dparams.wpe = dwte, dwpe
    if not config.tie_lm_head:
        dparams.lm_head = dlm_head


def cross_entropy_forward(logits: Array, targets: Array) -> tuple[Array, Array]:
    """loss_t = -log(softmax(logits)[target])

    Computed as log(sum(exp(x))) - x[target], where x = logits - max(logits): the same, and finite
    even where the probability is too small for a number. Returns loss_t and the probabilities.
    """
    b, t = np.ogrid[: targets.shape[0], : targets.shape[1]]  # (B, 1), (1, T)
    x = logits - logits.max(axis=-1, keepdims=True)  # (B, T, V)
    exps = exp(x)  # (B, T, V)
    exps_sum = total(exps)  # (B, T, 1)
    loss_t = log(exps_sum[..., 0]) - x[b, t, targets]  # (B, T)
    return loss_t, exps / exps_sum  # (B, T, V), (B, T) -> (B, T), (B, T, V)


def cross_entropy_backward(dloss_t: Array, probs: Array, targets: Array) -> Array:
    """dlogits = dloss_t * (probs - [target])

    forward: loss_t = log(sum_j exp(x_j)) - x_target. The first term has the slope softmax(x), the
    second takes off 1 at the target and 0 elsewhere.
    """
    b, t = np.ogrid[: targets.shape[0], : targets.shape[1]]  # (B, 1), (1, T)
    dlogits = dloss_t[..., None] * probs  # (B, T, V)
    dlogits[b, t, targets] -= dloss_t
    return dlogits


def loss_forward(batch: Batch, params: Tree, config: Config, tap: Tree) -> Array:
    """loss = mean over documents of the mean over positions of loss_t"""
    tokens, targets, weights, positions, mask = batch
    no_caches = [None] * config.n_layer
    logits = gpt_forward(tokens, positions, params, no_caches, mask, config, tap)  # (B, T, V)
    tap.loss_t, tap.probs = cross_entropy_forward(logits, targets)  # (B, T), (B, T, V)
    loss = tap.loss = einsum("bt,bt->", weights, tap.loss_t)  # ()
    return loss


def loss_backward(
    batch: Batch, params: Tree, dparams: Tree, config: Config, tap: Tree, dtap: Tree
) -> None:
    """dloss_t = weights, dloss = 1

    forward: loss = sum over documents and positions of weights * loss_t.
    """
    tokens, targets, weights, positions, _ = batch
    dtap.loss, dtap.loss_t = 1.0, weights  # (), (B, T)
    dlogits = cross_entropy_backward(weights, tap.probs, targets)  # (B, T, V)
    dtap.logits = dlogits  # (B, T, V)
    gpt_backward(dlogits, tokens, positions, params, dparams, config, tap, dtap)


def total(x: Array) -> Array:
    """s = x_0 + x_1 + .. + x_n-1, over the last axis"""
    return x.sum(axis=-1, keepdims=True)  # (.., n) -> (.., 1)


def mean(x: Array) -> Array:
    """s = 1/n * (x_0 + x_1 + .. + x_n-1), over the last axis"""
    return x.mean(axis=-1, keepdims=True)  # (.., n) -> (.., 1)


def split_heads(x: Array, config: Config) -> Array:
    """The channels of each head by themselves."""
    return x.reshape(*x.shape[:2], config.n_head, config.head_dim)  # (.., C) -> (.., H, D)


def merge_heads(x: Array) -> Array:
    """The channels of all heads side by side."""
    return x.reshape(*x.shape[:2], -1)  # (.., H, D) -> (.., C)


def causal_mask(T: int, dtype: Any) -> Array:
    """0 where position t may look at position u, u <= t, else -inf."""
    return np.where(np.tri(T, dtype=bool), dtype.type(0), dtype.type(-np.inf))  # (T, U)
