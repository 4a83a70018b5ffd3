"""The GPT in arrays: all documents, positions and channels of a batch at once.

Same as scalar:         the functions, their order, their equations, the names of the taps.
Different from scalar:  vector -> column, so that a batch is a matrix (channels, N);
                        position loop -> T axis; growing key/value list -> causal mask;
                        one document -> B axis with weights; graph -> explicit backward.

Each f_forward has its f_backward directly beneath: the forward read upside down. dy stands for the
derivative of the loss with respect to y. At the end of a line: (its shape).
B = documents, T = positions, N = B T columns, C = n_embd, H = n_head, D = C / H channels a head,
F = 4 C, V = vocabulary, U = positions looked at: T, and while sampling those before them too.
`tap.name = ...` keeps a value for the backward pass, and for whoever wants to see it.
Two-dimensional products are written a.dot(b), which is a @ b at half the cost for small matrices.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np

from microgpt.config import Config
from vectorized.arrays import Array, Batch, column_mean, column_sum


def linear_forward(x: Array, w: Array) -> Array:
    """y = w . x"""
    return w.dot(x)  # (n_out, n_in), (n_in, N) -> (n_out, N)


def linear_backward(dy: Array, x: Array, w: Array, dw: Array) -> Array:
    """dx = w^T . dy, dw = dy . x^T

    forward: y_o = sum_i w_oi x_i, in every column. So dy_o / dx_i = w_oi, summed over the outputs
    that x_i goes into, and dy_o / dw_oi = x_i, summed over the columns that share w_oi.
    """
    np.dot(dy, x.T, out=dw)  # (n_out, n_in)
    return w.T.dot(dy)  # (n_in, N)


def softmax_forward(x: Array) -> Array:
    """y = exp(x - max(x)) / sum(exp(x - max(x)))"""
    exps = np.exp(x - np.maximum.reduce(x))  # (n, N)
    return exps / column_sum(exps)  # (n, N)


def softmax_backward(dy: Array, y: Array) -> Array:
    """dx = y * (dy - sum(dy * y))

    forward: y_i = e_i / sum_j e_j, e_i = exp(x_i - max(x)). So dy_i / dx_j = y_i ([i = j] - y_j):
    when one input rises every output gives way, hence the sum over the column. The max divides
    numerator and denominator alike and has no part in it.
    """
    return y * (dy - column_sum(dy * y))  # (n, N)


def rmsnorm_forward(x: Array, eps: float) -> tuple[Array, Array]:
    """y = x * (mean(x * x) + eps) ** -0.5"""
    ms = column_mean(x * x)  # (N,)
    scale = (ms + eps) ** -0.5  # (N,)
    return x * scale, scale  # (n, N), (N,)


def rmsnorm_backward(dy: Array, y: Array, scale: Array) -> Array:
    """dx = scale * (dy - y * mean(dy * y))

    forward: y_i = x_i scale, scale = (ms + eps)^-1/2, ms = 1/n sum_j x_j^2. Through the first
    factor x_i receives dy_i scale. Through the second, dscale = sum_j dy_j x_j, and
    dscale / dx_i = -1/2 scale^3 2/n x_i. With x = y / scale that is -scale y_i 1/n sum_j dy_j y_j.
    """
    return scale * (dy - y * column_mean(dy * y))  # (n, N)


def activation_forward(x: Array, squared: bool) -> Array:
    """y = relu(x), or relu(x) ** 2"""
    relu = np.maximum(x, 0.0)  # (n, N)
    return relu * relu if squared else relu  # (n, N)


def activation_backward(dy: Array, x: Array, squared: bool) -> Array:
    """dx = dy * (x > 0), or dy * 2 relu(x)

    forward: y = x where x > 0, else 0: the slope is 1, else 0. The slope of its square is 2 x.
    """
    return dy * (2.0 * np.maximum(x, 0.0)) if squared else dy * (x > 0.0)  # (n, N)


def attention_forward(
    x: Array,
    w: SimpleNamespace,
    past: SimpleNamespace | None,
    B: int,
    config: Config,
    tap: SimpleNamespace,
) -> Array:
    """attn_res = attn_wo . (softmax(q . k / sqrt(D)) . v) + x, where q, k, v = w . rmsnorm(x)

    past holds the keys and values of the positions before these; there are none in training.
    """
    # queries, keys and values
    tap.attn_norm, tap.attn_scale = rmsnorm_forward(x, config.norm_eps)  # (C, N), (N,)
    qkv = linear_forward(tap.attn_norm, w.attn_wqkv)  # (3 C, N)
    q, k, v = tap.q, tap.k, tap.v = split_heads(qkv, 3, B, config)  # (B, H, D, T) each
    if past is not None:
        k = past.k = np.concatenate((past.k, k), axis=-1)  # (B, H, D, U)
        v = past.v = np.concatenate((past.v, v), axis=-1)  # (B, H, D, U)
    # how much each head looks at each position up to this one
    attn_logits = tap.attn_logits = np.empty((k.shape[-1], x.shape[-1] * config.n_head), x.dtype)
    scores = by_head(attn_logits, B, config)  # (B, H, U, T), a view
    np.matmul(k.swapaxes(2, 3), q, out=scores)
    scores *= config.head_dim**-0.5
    scores += causal_mask(q.shape[-1], x.dtype)
    attn_weights = tap.attn_weights = softmax_forward(attn_logits)  # (U, B H T)
    # what it sees there, heads side by side
    attn_out = tap.attn_out = np.empty_like(x)  # (C, N)
    np.matmul(v, by_head(attn_weights, B, config), out=split_heads(attn_out, 1, B, config)[0])
    # residual
    projected = linear_forward(attn_out, w.attn_wo)  # (C, N)
    attn_res = tap.attn_res = projected + x  # (C, N)
    return attn_res


def attention_backward(
    dattn_res: Array,
    w: SimpleNamespace,
    dw: SimpleNamespace,
    B: int,
    config: Config,
    tap: SimpleNamespace,
    dtap: SimpleNamespace,
) -> Array:
    """dx = rmsnorm_backward(w^T . dq, dk, dv) + dattn_res

    forward: out_dt = sum_u v_du weights_ut and logits_ut = sum_d k_du q_dt / sqrt(D), in every
    head of every document. Each is a product of two matrices, so each factor receives the
    derivative of the product times the other factor, summed over the index it does not have:
    dv over t, dweights over d; dk over t, dq over u.
    """
    # residual
    dtap.attn_res = dattn_res  # (C, N)
    # forward: attn_res = attn_wo . attn_out + x
    dattn_out = dtap.attn_out = linear_backward(dattn_res, tap.attn_out, w.attn_wo, dw.attn_wo)
    # what it sees there, heads side by side
    dqkv = np.empty((3 * config.n_embd, dattn_res.shape[-1]), dattn_res.dtype)  # (3 C, N)
    dq, dk, dv = split_heads(dqkv, 3, B, config)  # (B, H, D, T) each, views
    dout = split_heads(dattn_out, 1, B, config)[0]  # (B, H, D, T), a view
    # forward: out = v . weights
    dattn_weights = dtap.attn_weights = np.empty_like(tap.attn_weights)  # (T, B H T)
    np.matmul(tap.v.swapaxes(2, 3), dout, out=by_head(dattn_weights, B, config))
    np.matmul(dout, by_head(tap.attn_weights, B, config).swapaxes(2, 3), out=dv)
    # how much each head looks at each position up to this one
    # forward: weights = softmax(logits)
    dattn_logits = dtap.attn_logits = softmax_backward(dattn_weights, tap.attn_weights)
    # forward: logits = k^T . q / sqrt(D)
    dscores = by_head(dattn_logits * config.head_dim**-0.5, B, config)  # (B, H, T, T)
    np.matmul(tap.q, dscores.swapaxes(2, 3), out=dk)
    np.matmul(tap.k, dscores, out=dq)
    dtap.v, dtap.k, dtap.q = dv, dk, dq
    # queries, keys and values
    # forward: q, k, v = attn_wq, attn_wk, attn_wv . attn_norm
    dattn_norm = linear_backward(dqkv, tap.attn_norm, w.attn_wqkv, dw.attn_wqkv)  # (C, N)
    dtap.attn_norm = dattn_norm
    # forward: attn_norm = rmsnorm(x), and x goes on to the residual
    return rmsnorm_backward(dattn_norm, tap.attn_norm, tap.attn_scale) + dattn_res  # (C, N)


def mlp_forward(x: Array, w: SimpleNamespace, config: Config, tap: SimpleNamespace) -> Array:
    """mlp_res = mlp_fc2 . activation(mlp_fc1 . rmsnorm(x)) + x"""
    tap.mlp_norm, tap.mlp_scale = rmsnorm_forward(x, config.norm_eps)  # (C, N), (N,)
    mlp_pre = tap.mlp_pre = linear_forward(tap.mlp_norm, w.mlp_fc1)  # (F, N)
    mlp_act = tap.mlp_act = activation_forward(mlp_pre, config.squared_relu)  # (F, N)
    # residual
    projected = linear_forward(mlp_act, w.mlp_fc2)  # (C, N)
    mlp_res = tap.mlp_res = projected + x  # (C, N)
    return mlp_res


def mlp_backward(
    dmlp_res: Array,
    w: SimpleNamespace,
    dw: SimpleNamespace,
    config: Config,
    tap: SimpleNamespace,
    dtap: SimpleNamespace,
) -> Array:
    """dx = rmsnorm_backward(mlp_fc1^T . activation_backward(mlp_fc2^T . dmlp_res)) + dmlp_res"""
    # residual
    dtap.mlp_res = dmlp_res  # (C, N)
    # forward: mlp_res = mlp_fc2 . mlp_act + x
    dmlp_act = dtap.mlp_act = linear_backward(dmlp_res, tap.mlp_act, w.mlp_fc2, dw.mlp_fc2)
    # forward: mlp_act = activation(mlp_pre)
    dmlp_pre = dtap.mlp_pre = activation_backward(dmlp_act, tap.mlp_pre, config.squared_relu)
    # forward: mlp_pre = mlp_fc1 . mlp_norm
    dmlp_norm = dtap.mlp_norm = linear_backward(dmlp_pre, tap.mlp_norm, w.mlp_fc1, dw.mlp_fc1)
    # forward: mlp_norm = rmsnorm(x), and x goes on to the residual
    return rmsnorm_backward(dmlp_norm, tap.mlp_norm, tap.mlp_scale) + dmlp_res  # (C, N)


def gpt_forward(
    tokens: Array,
    params: SimpleNamespace,
    past: SimpleNamespace | None,
    config: Config,
    tap: SimpleNamespace,
) -> Array:
    """logits = lm_head . blocks(rmsnorm(wte[token] + wpe[position]))"""
    B, T = tokens.shape
    start = 0 if past is None else past.layers[0].k.shape[-1]
    positions = params.wpe[start : start + T]  # (T, C)
    emb = tap.emb = np.empty((config.n_embd, B * T), positions.dtype)  # (C, N)
    np.add(params.wte.take(tokens, axis=0), positions, out=emb.T.reshape(B, T, -1))
    res = emb
    if config.norm_embedding:
        res, tap.emb_scale = rmsnorm_forward(emb, config.norm_eps)  # (C, N), (N,)
        tap.emb_norm = res
    for i in range(config.n_layer):
        past_i = None if past is None else past.layers[i]
        res = attention_forward(res, params.layers[i], past_i, B, config, tap.layers[i])  # (C, N)
        res = mlp_forward(res, params.layers[i], config, tap.layers[i])  # (C, N)
    logits = tap.logits = linear_forward(
        res, params.wte if config.tie_lm_head else params.lm_head
    )  # (V, N)
    return logits


def gpt_backward(
    dlogits: Array,
    tokens: Array,
    params: SimpleNamespace,
    dparams: SimpleNamespace,
    config: Config,
    tap: SimpleNamespace,
    dtap: SimpleNamespace,
) -> None:
    """dparams, from dlogits: every parameter's gradient, written over what was there"""
    B, T = tokens.shape
    dtap.logits = dlogits  # (V, N)
    # forward: logits = lm_head . res
    res = tap.layers[-1].mlp_res  # (C, N)
    dparams.wte.fill(0.0)
    if config.tie_lm_head:
        dres = linear_backward(dlogits, res, params.wte, dparams.wte)  # (C, N)
    else:
        dres = linear_backward(dlogits, res, params.lm_head, dparams.lm_head)  # (C, N)
    for i in reversed(range(config.n_layer)):
        w, dw = params.layers[i], dparams.layers[i]
        dres = mlp_backward(dres, w, dw, config, tap.layers[i], dtap.layers[i])  # (C, N)
        dres = attention_backward(dres, w, dw, B, config, tap.layers[i], dtap.layers[i])  # (C, N)
    if config.norm_embedding:
        dtap.emb_norm = dres  # (C, N)
        dres = rmsnorm_backward(dres, tap.emb_norm, tap.emb_scale)  # (C, N)
    demb = dtap.emb = dres  # (C, N)
    # forward: emb = wte[token] + wpe[position]; a token that occurs twice receives twice, and
    # where wte is also lm_head, this comes on top of what that has received
    np.add.at(dparams.wte, tokens.reshape(-1), demb.T)
    dparams.wpe[T:] = 0.0
    np.add.reduce(demb.reshape(-1, B, T), axis=1, out=dparams.wpe[:T].T)


def cross_entropy_forward(logits: Array, targets: Array) -> tuple[Array, Array]:
    """loss_t = -log(softmax(logits)[target])"""
    probs = softmax_forward(logits)  # (V, N)
    return -np.log(probs.take(targets)), probs  # (N,), (V, N)


def cross_entropy_backward(dloss_t: Array, probs: Array, targets: Array) -> Array:
    """dlogits = dloss_t * (probs - [target])

    forward: loss_t = log(sum_j exp(x_j)) - x_target, the same thing in other words. The slope of
    the first term is softmax(x), that of the second is 1 at the target and 0 elsewhere.
    """
    dlogits = dloss_t * probs  # (V, N)
    dlogits.reshape(-1)[targets] -= dloss_t
    return dlogits


def loss_forward(
    batch: Batch, params: SimpleNamespace, config: Config, tap: SimpleNamespace
) -> Array:
    """loss = mean over documents of the mean over positions of loss_t"""
    logits = gpt_forward(batch.tokens, params, None, config, tap)  # (V, N)
    tap.loss_t, tap.probs = cross_entropy_forward(logits, batch.targets)  # (N,), (V, N)
    if batch.ragged:
        tap.loss_t[batch.weights == 0] = 0.0  # padding, where it need not even be finite
    tap.loss = batch.weights.dot(tap.loss_t)  # weights of 1 / (B n) make the sum that mean
    return tap.loss


def loss_backward(
    batch: Batch,
    params: SimpleNamespace,
    dparams: SimpleNamespace,
    config: Config,
    tap: SimpleNamespace,
    dtap: SimpleNamespace,
) -> None:
    """dloss_t = weights, dloss = 1

    forward: loss = sum over columns of weight * loss_t.
    """
    dtap.loss = np.ones_like(tap.loss)
    dtap.loss_t = batch.weights  # (N,)
    dlogits = cross_entropy_backward(batch.weights, tap.probs, batch.targets)  # (V, N)
    gpt_backward(dlogits, batch.tokens, params, dparams, config, tap, dtap)


def split_heads(x: Array, parts: int, B: int, config: Config) -> Array:
    """(parts C, N) -> (parts, B, H, D, T), a view: the channels of a head are rows of x."""
    by_channel = x.reshape(parts, config.n_head, config.head_dim, B, -1)
    return by_channel.transpose(0, 3, 1, 2, 4)


def by_head(x: Array, B: int, config: Config) -> Array:
    """(U, B H T) -> (B, H, U, T), a view."""
    return x.reshape(len(x), B, config.n_head, -1).transpose(1, 2, 0, 3)


@cache
def causal_mask(T: int, dtype: np.dtype) -> Array:
    """0 where position t may look at position u, u <= t, else -inf: (U, T), U = T."""
    return np.tril(np.full((T, T), -np.inf, dtype), -1)
