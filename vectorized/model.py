"""The GPT in arrays: all documents, positions and channels of a batch at once.

Same as scalar:         the functions, their order, their equations, the names of the taps.
Different from scalar:  vector -> column, so that a batch is a matrix (channels, N);
                        position loop -> T axis; growing key/value list -> mask;
                        one document -> B axis with weights; graph -> explicit backward.

Each f_forward has its f_backward directly beneath: the forward read upside down. dy stands for the
derivative of the loss with respect to y. At the end of a line: (its shape).
B = rows (a document in each, or several short ones), T = positions in a row, N = B T columns,
C = n_embd, H = n_head, D = C / H channels a head, F = 4 C, V = vocabulary, U = positions looked
at: T, and while sampling those before them too.

`out` is where a result goes, as everywhere in NumPy. The arrays of `tap` are there beforehand
(vectorized.arrays shows them all), constants among them; what forward writes there, backward reads,
and anyone may see. Among the constants are ones and mean: ones.dot(x) is the sum of every column,
mean.dot(x) its mean (see `summing`).
Two-dimensional products are a.dot(b): for small matrices half the cost of a @ b.
"""

from __future__ import annotations

import numpy as np

from microgpt.config import Config
from microgpt.layout import Tree
from vectorized.arrays import Array, set_ones
from vectorized.batch import Batch


def linear_forward(x: Array, w: Array, out: Array) -> Array:
    """y = w . x"""
    return w.dot(x, out)  # (n_out, n_in), (n_in, N) -> (n_out, N)


def linear_backward(dy: Array, x: Array, w: Array, dw: Array, out: Array) -> Array:
    """dx = w^T . dy, dw = dy . x^T

    forward: y_o = sum_i w_oi x_i, in every column. So dy_o / dx_i = w_oi, summed over the outputs
    that x_i goes into, and dy_o / dw_oi = x_i, summed over the columns that share w_oi.
    """
    dy.dot(x.T, dw)  # (n_out, n_in)
    return w.T.dot(dy, out)  # (n_in, N)


def softmax_forward(x: Array, ones: Array, out: Array) -> Array:
    """y = exp(x - max(x)) / sum(exp(x - max(x)))"""
    below = np.subtract(x, np.maximum.reduce(x), out)  # (n, N)
    exps = np.exp(below, out)  # (n, N)
    return np.divide(exps, ones.dot(exps), out)  # (n, N)


def softmax_backward(dy: Array, y: Array, ones: Array, out: Array) -> Array:
    """dx = y * (dy - sum(dy * y))

    forward: y_i = e_i / sum_j e_j, e_i = exp(x_i - max(x)). So dy_i / dx_j = y_i ([i = j] - y_j):
    when one input rises every output gives way, hence the sum over the column. The max divides
    numerator and denominator alike and has no part in it.
    """
    return np.multiply(y, dy - ones.dot(dy * y), out)  # (n, N)


def rmsnorm_forward(x: Array, mean: Array, eps: Array, out: Array) -> tuple[Array, Array]:
    """y = x * (mean(x * x) + eps) ** -0.5

    Divided by the root, which is faster than a power. Returns y and the root.
    """
    rms = np.sqrt(mean.dot(x * x) + eps)  # (N,) or (n, N), as mean has it
    return np.divide(x, rms, out), rms  # (n, N), as rms


def rmsnorm_backward(dy: Array, y: Array, mean: Array, rms: Array, out: Array) -> Array:
    """dx = (dy - y * mean(dy * y)) / rms

    forward: y_i = x_i / rms, rms = sqrt(1/n sum_j x_j^2 + eps). As the numerator, x_i receives
    dy_i / rms. The denominator receives -sum_j dy_j x_j / rms^2, and changes by x_i / (n rms) when
    x_i changes by 1; with x = y rms, the product of the two is -y_i (1/n sum_j dy_j y_j) / rms.
    """
    return np.divide(dy - y * mean.dot(dy * y), rms, out)  # (n, N)


def activation_forward(x: Array, squared: bool, zeros: Array, out: Array, slope: Array) -> Array:
    """y = relu(x), or relu(x) ** 2

    zeros    as many as there are x, which maximum() takes two to four times as fast as one
    slope    where dy / dx goes, for the way back: [x > 0], or 2 relu(x)
    """
    relu = np.maximum(x, zeros, out=out)  # (n, N)
    if squared:
        np.multiply(relu, 2.0, out=slope)  # (n, N)
        return np.multiply(relu, relu, out)  # (n, N)
    slope[:] = relu > zeros  # (n, N)
    return relu


def activation_backward(dy: Array, slope: Array, out: Array) -> Array:
    """dx = dy * slope

    forward: y = x where x > 0, else 0: the slope is 1, else 0. That of its square is 2 relu(x).
    """
    return np.multiply(dy, slope, out)  # (n, N)


def attention_forward(x: Array, w: Tree, past: Tree | None, tap: Tree) -> Array:
    """attn_res = attn_wo . (softmax(q . k / sqrt(D)) . v) + x, where q, k, v = w . rmsnorm(x)

    past holds the keys and values of the positions before these; there are none in training.
    """
    # queries, keys and values
    attn_norm, tap.attn_rms = rmsnorm_forward(x, tap.mean, tap.norm_eps, tap.attn_norm)  # (C, N)
    linear_forward(attn_norm, w.attn_wqkv, tap.qkv)  # (3 C, N): one product for the three
    q, k, v = tap.q, tap.k, tap.v  # (H, B, D, T), views of qkv
    if past is not None:
        k = past.k = np.concatenate((past.k, k), axis=-1)  # (H, B, D, U)
        v = past.v = np.concatenate((past.v, v), axis=-1)  # (H, B, D, U)
    # how much each head looks at each position up to this one
    np.matmul(k.swapaxes(2, 3), q, out=tap.head_logits)  # (H, B, U, T), a view of attn_logits
    logits = tap.attn_logits  # (U, H B T)
    logits *= tap.logit_scale
    unmasked = tap.unmasked  # another view, (U, H B T / n, n), of which the mask has (U, 1, n)
    unmasked += tap.mask
    softmax_forward(logits, tap.ones, tap.attn_weights)  # (U, H B T)
    # what it sees there, heads side by side
    np.matmul(v, tap.head_weights, out=tap.head_out)  # (H, B, D, T), a view of attn_out
    # residual
    attn_res = linear_forward(tap.attn_out, w.attn_wo, tap.attn_res)  # (C, N)
    attn_res += x
    return attn_res


def attention_backward(
    dattn_res: Array, w: Tree, dw: Tree, tap: Tree, dtap: Tree, out: Array
) -> Array:
    """dx = rmsnorm_backward(w^T . (dq, dk, dv)) + dattn_res

    forward: out_dt = sum_u v_du weights_ut and logits_ut = sum_d k_du q_dt / sqrt(D), in every
    head of every row. Each is a product of two matrices, so each factor receives the
    derivative of the product times the other factor, summed over the index it does not have:
    dv over t, dweights over d; dk over t, dq over u.
    """
    # residual
    # forward: attn_res = attn_wo . attn_out + x
    linear_backward(dattn_res, tap.attn_out, w.attn_wo, dw.attn_wo, dtap.attn_out)  # (C, N)
    # what it sees there, heads side by side
    # forward: out = v . weights
    np.matmul(tap.v.swapaxes(2, 3), dtap.head_out, out=dtap.head_weights)  # (H, B, T, T)
    np.matmul(dtap.head_out, tap.head_weights.swapaxes(2, 3), out=dtap.v)  # (H, B, D, T)
    # how much each head looks at each position up to this one
    # forward: weights = softmax(logits)
    softmax_backward(dtap.attn_weights, tap.attn_weights, tap.ones, dtap.attn_logits)  # (T, H B T)
    # forward: logits = k^T . q / sqrt(D)
    np.matmul(tap.k, dtap.head_logits, out=dtap.q)  # (H, B, D, T)
    np.matmul(tap.q, dtap.head_logits.swapaxes(2, 3), out=dtap.k)  # (H, B, D, T)
    dqk = dtap.qk  # (2 C, N), fewer numbers to divide by sqrt(D) than dlogits
    dqk *= tap.logit_scale
    # queries, keys and values
    # forward: q, k, v = attn_wq, attn_wk, attn_wv . attn_norm
    dattn_norm = linear_backward(
        dtap.qkv, tap.attn_norm, w.attn_wqkv, dw.attn_wqkv, dtap.attn_norm
    )  # (C, N)
    # forward: attn_norm = rmsnorm(x), and x goes on to the residual
    dx = rmsnorm_backward(dattn_norm, tap.attn_norm, tap.mean, tap.attn_rms, dtap.attn_x)  # (C, N)
    return np.add(dx, dattn_res, out)  # (C, N)


def mlp_forward(x: Array, w: Tree, config: Config, tap: Tree) -> Array:
    """mlp_res = mlp_fc2 . activation(mlp_fc1 . rmsnorm(x)) + x"""
    mlp_norm, tap.mlp_rms = rmsnorm_forward(x, tap.mean, tap.norm_eps, tap.mlp_norm)  # (C, N)
    mlp_pre = linear_forward(mlp_norm, w.mlp_fc1, tap.mlp_pre)  # (F, N)
    mlp_act = activation_forward(
        mlp_pre, config.squared_relu, tap.zeros, tap.mlp_act, tap.mlp_slope
    )  # (F, N)
    # residual
    mlp_res = linear_forward(mlp_act, w.mlp_fc2, tap.mlp_res)  # (C, N)
    mlp_res += x
    return mlp_res


def mlp_backward(dmlp_res: Array, w: Tree, dw: Tree, tap: Tree, dtap: Tree, out: Array) -> Array:
    """dx = rmsnorm_backward(mlp_fc1^T . activation_backward(mlp_fc2^T . dmlp_res)) + dmlp_res"""
    # residual
    # forward: mlp_res = mlp_fc2 . mlp_act + x
    dmlp_act = linear_backward(dmlp_res, tap.mlp_act, w.mlp_fc2, dw.mlp_fc2, dtap.mlp_act)  # (F, N)
    # forward: mlp_act = activation(mlp_pre)
    dmlp_pre = activation_backward(dmlp_act, tap.mlp_slope, dtap.mlp_pre)  # (F, N)
    # forward: mlp_pre = mlp_fc1 . mlp_norm
    dmlp_norm = linear_backward(
        dmlp_pre, tap.mlp_norm, w.mlp_fc1, dw.mlp_fc1, dtap.mlp_norm
    )  # (C, N)
    # forward: mlp_norm = rmsnorm(x), and x goes on to the residual
    dx = rmsnorm_backward(dmlp_norm, tap.mlp_norm, tap.mean, tap.mlp_rms, dtap.mlp_x)  # (C, N)
    return np.add(dx, dmlp_res, out)  # (C, N)


def gpt_forward(
    token_at: Array, params: Tree, past: Tree | None, config: Config, tap: Tree
) -> Array:
    """logits = lm_head . blocks(rmsnorm(wte[token] + wpe[position]))

    token_at    (N,), where each column's token sits in a flattened (V, N)

    wte[token] + wpe[position] is one product, (wte, wpe)^T . one_hot: a column has a one at its
    token and, further down, a one at its position, which is there beforehand. (Rows that are not
    asked for are multiplied by 0: what is not finite in one of them spoils every column.)
    """
    one_hot = tap.one_hot  # (V + U, N)
    set_ones(tap.token_rows, token_at)  # (V N,), the upper part of one_hot
    emb = res = params.wte_wpe[: len(one_hot)].T.dot(one_hot, tap.emb)  # (C, N)
    if config.norm_embedding:
        res, tap.emb_rms = rmsnorm_forward(emb, tap.mean, tap.norm_eps, tap.emb_norm)  # (C, N)
    for i in range(config.n_layer):
        past_i = None if past is None else past.layers[i]
        res = attention_forward(res, params.layers[i], past_i, tap.layers[i])  # (C, N)
        res = mlp_forward(res, params.layers[i], config, tap.layers[i])  # (C, N)
    lm_head = params.wte if config.tie_lm_head else params.lm_head
    return linear_forward(res, lm_head, tap.logits)  # (V, N)


def gpt_backward(
    dlogits: Array, params: Tree, dparams: Tree, config: Config, tap: Tree, dtap: Tree
) -> None:
    """dwte, dwpe = one_hot . demb^T, where demb = rmsnorm_backward(blocks_backward(dlogits))

    dparams    the gradient of every parameter, written over what was there
    """
    # forward: logits = lm_head . res
    res = tap.layers[-1].mlp_res  # (C, N)
    dres = dtap.layers[-1].mlp_res  # (C, N)
    if config.tie_lm_head:
        linear_backward(dlogits, res, params.wte, dparams.wte, dres)  # (C, N)
    else:
        linear_backward(dlogits, res, params.lm_head, dparams.lm_head, dres)  # (C, N)
    for i in reversed(range(config.n_layer)):
        w, dw, tap_i, dtap_i = params.layers[i], dparams.layers[i], tap.layers[i], dtap.layers[i]
        before = dtap.layers[i - 1].mlp_res if i > 0 else dtap.emb_norm  # (C, N)
        dres = mlp_backward(dres, w, dw, tap_i, dtap_i, dtap_i.attn_res)  # (C, N)
        dres = attention_backward(dres, w, dw, tap_i, dtap_i, before)  # (C, N)
    demb = dres
    if config.norm_embedding:
        demb = rmsnorm_backward(dres, tap.emb_norm, tap.mean, tap.emb_rms, dtap.emb)  # (C, N)
    # forward: emb = (wte, wpe)^T . one_hot. A token that occurs twice receives twice, a position
    # that no document reaches nothing; and where wte is lm_head as well, this comes on top of what
    # it has received as that.
    dparams.wpe.fill(0.0)
    dwte_wpe = dparams.wte_wpe[: len(tap.one_hot)]  # (V + T, C)
    if config.tie_lm_head:
        dwte_wpe += tap.one_hot.dot(demb.T)  # (V + T, C)
    else:
        tap.one_hot.dot(demb.T, dwte_wpe)  # (V + T, C)


def cross_entropy_forward(
    logits: Array, target_at: Array, ones: Array, out: Array, probs: Array
) -> Array:
    """loss_t = -log(softmax(logits)[target])"""
    softmax_forward(logits, ones, probs)  # (V, N)
    return np.negative(np.log(probs.take(target_at)), out)  # (N,)


def cross_entropy_backward(dloss_t: Array, probs: Array, target_at: Array, out: Array) -> Array:
    """dlogits = dloss_t * (probs - [target])

    forward: loss_t = log(sum_j exp(x_j)) - x_target, the same thing in other words. The slope of
    the first term is softmax(x), that of the second is 1 at the target and 0 elsewhere.
    """
    dlogits = np.multiply(dloss_t, probs, out)  # (V, N)
    dlogits.reshape(-1)[target_at] -= dloss_t
    return dlogits


def loss_forward(batch: Batch, params: Tree, config: Config, tap: Tree) -> Array:
    """loss = mean over documents of the mean over positions of loss_t"""
    logits = gpt_forward(batch.token_at, params, None, config, tap)  # (V, N)
    loss_t = cross_entropy_forward(logits, batch.target_at, tap.ones, tap.loss_t, tap.probs)  # (N,)
    if batch.ragged:
        loss_t[batch.weights == 0] = 0.0  # padding, where it need not even be finite
    tap.loss = batch.weights.dot(loss_t)  # weights of 1 / (documents n) make the sum that mean
    return tap.loss


def loss_backward(
    batch: Batch, params: Tree, dparams: Tree, config: Config, tap: Tree, dtap: Tree
) -> None:
    """dloss_t = weights, dloss = 1

    forward: loss = sum over columns of weight * loss_t.
    """
    dtap.loss, dtap.loss_t = 1.0, batch.weights  # (), (N,)
    dlogits = cross_entropy_backward(
        batch.weights, tap.probs, batch.target_at, dtap.logits
    )  # (V, N)
    gpt_backward(dlogits, params, dparams, config, tap, dtap)
