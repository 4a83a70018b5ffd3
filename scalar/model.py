"""The GPT in plain numbers: one document, one position, one channel at a time.

A vector is a list of Values, a matrix a list of rows. At the end of a line: [its shape].
C = n_embd, H = n_head, D = C / H channels a head, F = 4 C, V = vocabulary, t = this position.
`tap.name = ...` keeps an intermediate under its name; after backward(), d<name> is its .grad.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from microgpt.config import Config
from microgpt.layout import Tree
from scalar.value import Value, dot, mean, total

Vector = list[Value]
Matrix = list[list[Value]]


def linear(x: Vector, w: Matrix) -> Vector:
    """y = w . x"""
    return [dot(row, x) for row in w]  # [n_in], [n_out][n_in] -> [n_out]


def softmax(x: Vector) -> Vector:
    """y = exp(x - max(x)) / sum(exp(x - max(x)))"""
    largest = max(x_i.data for x_i in x)  # a plain number: y does not depend on it
    exps = [(x_i - largest).exp() for x_i in x]
    exps_sum = total(exps)
    return [e_i / exps_sum for e_i in exps]  # [n] -> [n]


def rmsnorm(x: Vector, eps: float) -> Vector:
    """y = x * (mean(x * x) + eps) ** -0.5"""
    ms = dot(x, x) / len(x)
    scale = (ms + eps) ** -0.5
    return [x_i * scale for x_i in x]  # [n] -> [n]


def activation(x: Vector, kind: str) -> Vector:
    """y = relu(x), relu(x) ** 2, or gelu: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))"""
    if kind == "relu":
        return [x_i.relu() for x_i in x]  # [n] -> [n]
    if kind == "squared_relu":
        return [x_i.relu() ** 2 for x_i in x]  # [n] -> [n]
    if kind == "gelu":
        cubic = [math.sqrt(2 / math.pi) * (x_i + 0.044715 * x_i**3) for x_i in x]  # [n]
        return [0.5 * x_i * (1 + c_i.tanh()) for x_i, c_i in zip(x, cubic)]  # [n] -> [n]
    raise ValueError(f"no formula here for the activation {kind!r}")


def attention(
    x: Vector, w: Tree, keys: Matrix, values: Matrix, config: Config, tap: Tree
) -> Vector:
    """attn_res = attn_wo . (softmax(q . k / sqrt(D)) . v) + x, where q, k, v = w . rmsnorm(x)"""
    heads = [slice(h, h + config.head_dim) for h in range(0, config.n_embd, config.head_dim)]
    # queries, keys and values
    attn_norm = tap.attn_norm = rmsnorm(x, config.norm_eps)  # [C]
    q = tap.q = linear(attn_norm, w.attn_wq)  # [C]
    k = tap.k = linear(attn_norm, w.attn_wk)  # [C]
    v = tap.v = linear(attn_norm, w.attn_wv)  # [C]
    keys.append(k)  # [t+1][C]
    values.append(v)  # [t+1][C]
    # how much each head looks at each position up to this one
    attn_logits = tap.attn_logits = [
        [dot(q[head], k_u[head]) / config.head_dim**0.5 for k_u in keys] for head in heads
    ]  # [H][t+1]
    attn_weights = tap.attn_weights = [softmax(logits_h) for logits_h in attn_logits]  # [H][t+1]
    # what it sees there, heads side by side
    attn_out = tap.attn_out = [
        dot(weights_h, v_d)
        for head, weights_h in zip(heads, attn_weights)
        for v_d in zip(*(v_u[head] for v_u in values))
    ]  # [C]
    # residual
    projected = linear(attn_out, w.attn_wo)  # [C]
    attn_res = tap.attn_res = [p_i + x_i for p_i, x_i in zip(projected, x)]  # [C]
    return attn_res


def mlp(x: Vector, w: Tree, config: Config, tap: Tree) -> Vector:
    """mlp_res = mlp_fc2 . activation(mlp_fc1 . rmsnorm(x)) + x"""
    mlp_norm = tap.mlp_norm = rmsnorm(x, config.norm_eps)  # [C]
    mlp_pre = tap.mlp_pre = linear(mlp_norm, w.mlp_fc1)  # [F]
    mlp_act = tap.mlp_act = activation(mlp_pre, config.activation)  # [F]
    # residual
    projected = linear(mlp_act, w.mlp_fc2)  # [C]
    mlp_res = tap.mlp_res = [p_i + x_i for p_i, x_i in zip(projected, x)]  # [C]
    return mlp_res


def gpt(
    token: int,
    position: int,
    params: Tree,
    keys: list[Matrix],
    values: list[Matrix],
    config: Config,
    tap: Tree,
) -> Vector:
    """logits = lm_head . blocks(rmsnorm(wte[token] + wpe[position]))"""
    emb = tap.emb = [t_i + p_i for t_i, p_i in zip(params.wte[token], params.wpe[position])]  # [C]
    res = emb
    if config.norm_embedding:
        res = tap.emb_norm = rmsnorm(emb, config.norm_eps)  # [C]
    for i in range(config.n_layer):
        res = attention(res, params.layers[i], keys[i], values[i], config, tap.layers[i])  # [C]
        res = mlp(res, params.layers[i], config, tap.layers[i])  # [C]
    logits = tap.logits = linear(res, params.wte if config.tie_lm_head else params.lm_head)  # [V]
    return logits


def cross_entropy(logits: Vector, target: int) -> Value:
    """loss_t = -log(softmax(logits)[target])"""
    probs = softmax(logits)  # [V]
    return -probs[target].log()


def loss(
    docs: Sequence[Sequence[int]], params: Tree, config: Config
) -> tuple[Value, list[list[Tree]]]:
    """loss = mean over documents of the mean over positions of loss_t

    Each position predicts the token after it, so a document of n + 1 tokens has n positions.
    Returns the loss, and the taps by document and position.
    """
    taps = [[Tree(config.n_layer) for _ in pairwise(tokens)] for tokens in docs]
    doc_losses = []
    for tokens, doc_taps in zip(docs, taps):
        keys: list[Matrix] = [[] for _ in range(config.n_layer)]
        values: list[Matrix] = [[] for _ in range(config.n_layer)]
        for position, (token, target) in enumerate(pairwise(tokens)):
            tap = doc_taps[position]
            logits = gpt(token, position, params, keys, values, config, tap)
            tap.loss_t = cross_entropy(logits, target)
        doc_losses.append(mean([tap.loss_t for tap in doc_taps]))
    return mean(doc_losses), taps
