"""How the arrays lie: a batch as columns, activations in one block, parameters in one buffer.

A vector of scalar/ is a column here. N = B T columns stand side by side, document after document,
so that y = w . x is one matrix product and every sum over channels runs along axis 0.

Same as scalar:         the names of what is computed in between.
Different from scalar:  what comes into being as it is computed -> arrays that are there beforehand;
                        one parameter -> a view of the buffer that holds them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from microgpt.config import Config
from microgpt.layout import Tree, grow

Array = NDArray[Any]
New = Callable[..., Array]  # shape -> array
TapsAndDerivatives = tuple[Tree, Tree]

COLUMNS = 512  # of a piece of a batch
PADDING = 2560  # numbers of padding that cost as much as a piece more
KEEPABLE = 2**16  # numbers of a constant that is worth keeping
REPEATED = 4096  # multiplications: to sum columns with so many is faster than to broadcast the sum


class Batch(NamedTuple):
    """B documents, padded at the end to the T positions of the longest."""

    shape: tuple[int, int]  # (B, T)
    tokens: Array  # (N,), where each column's token sits in a flattened (V, N)
    targets: Array  # (N,), the same for the token after it
    weights: Array  # (N,), each position's share of the loss: 1 / (B n), and 0 for padding
    ragged: bool  # whether there is padding at all


def pieces(docs: Sequence[Sequence[int]], n_embd: int) -> list[Sequence[Sequence[int]]]:
    """A batch in pieces of at most COLUMNS columns, in which the documents are alike in length.

    A piece more costs what so much padding does: where there would be more of it, there is a cut.
    The loss of a batch is the sum over its pieces, and so is the gradient.
    """
    padding = PADDING // n_embd  # columns
    tokens, columns = sum(map(len, docs)) - len(docs), len(docs) * (max(map(len, docs)) - 1)
    if (columns <= COLUMNS and columns - tokens <= padding) or len(docs) == 1:
        return [docs]
    ordered = sorted(docs, key=len)
    cut: list[Sequence[Sequence[int]]] = []
    start = tokens = 0
    for end, doc in enumerate(ordered):
        T = len(doc) - 1
        columns = (end + 1 - start) * T
        tokens += T
        if end > start and (columns > COLUMNS or columns - tokens > padding):
            cut.append(ordered[start:end])
            start, tokens = end, T
    cut.append(ordered[start:])
    return cut


def pad(docs: Sequence[Sequence[int]], dtype: np.dtype, of: int | None = None) -> Batch:
    """Documents of n + 1 tokens, any n > 0, as one batch of inputs and targets.

    of    how many documents the whole batch has, if these are a piece of it
    """
    lengths = [len(doc) - 1 for doc in docs]
    B, T = len(docs), max(lengths)
    whole = of or B
    ragged = min(lengths) < T
    if ragged:
        n = np.array(lengths)[:, None]  # (B, 1)
        by_doc = np.zeros((B, T + 1), int)
        by_doc[np.arange(T + 1) <= n] = np.fromiter(chain.from_iterable(docs), int)
        weights = ((np.arange(T) < n) / (whole * n)).astype(dtype).reshape(-1)  # (N,)
    else:
        by_doc = np.array(docs)  # (B, T + 1)
        weights = np.full(B * T, 1 / (whole * T), dtype)  # (N,)
    return Batch((B, T), places(by_doc[:, :-1]), places(by_doc[:, 1:]), weights, ragged)


def places(tokens: Array) -> Array:
    """Where the token of each column sits in a flattened (V, N): (B, T) -> (N,)."""
    return tokens.reshape(-1) * tokens.size + np.arange(tokens.size)


def activations(config: Config, V: int, B: int, T: int, U: int, watch: bool, new: New) -> Tree:
    """Everything that the forward pass fills, in that order, and the constants that it reads.

    The taps are there by their names. What forward adds are the roots of the norms, .._rms.

    Unless somebody watches, a softmax overwrites its logits and the activation its input, which
    nothing else reads.

    one_hot             a row for each token, and below them one for each position: see gpt_forward
    mlp_slope, probs    what the backward pass needs besides
    norm_eps            as config has it, an array without axes: see `numbers`
    logit_scale         1 / sqrt(D), likewise
    causal_mask         0 where position t may look at position u, else -inf: (U, B H T), or one
                        row for all where a single position looks at those before it
    U                   positions looked at: those of the batch, and in sampling those before them
    """
    C, H, F, N = config.n_embd, config.n_head, 4 * config.n_embd, B * T
    tap = Tree(config.n_layer)
    tap.one_hot = new(V + U, N)
    tap.one_hot[V:] = 0.0
    tap.one_hot[-T:] = side_by_side(np.eye, T, B, tap.one_hot.dtype)
    tap.emb = new(C, N)
    if config.norm_embedding:
        tap.emb_norm = new(C, N)
    norm_eps, logit_scale = numbers(tap.emb.dtype, config.norm_eps, config.head_dim**-0.5)
    tap.norm_eps = norm_eps
    mask = side_by_side(causal_mask, T, B * H, tap.emb.dtype)
    for layer in tap.layers:
        layer.norm_eps, layer.logit_scale = norm_eps, logit_scale
        layer.attn_norm = new(C, N)
        layer.qkv = new(3 * C, N)
        layer.causal_mask = mask
        layer.attn_logits = new(U, B * H * T)
        layer.attn_weights = new(U, B * H * T) if watch else layer.attn_logits
        layer.attn_out = new(C, N)
        layer.attn_res = new(C, N)
        layer.mlp_norm = new(C, N)
        layer.mlp_pre = new(F, N)
        layer.mlp_slope = new(F, N)
        layer.mlp_act = new(F, N) if watch else layer.mlp_pre
        layer.mlp_res = new(C, N)
        _add_views(layer, B, H)
    tap.logits = new(V, N)
    tap.probs = new(V, N) if watch else tap.logits
    tap.loss_t = new(N)
    return tap


def derivatives(config: Config, V: int, B: int, T: int, watch: bool, new: New) -> Tree:
    """Everything that the backward pass fills, in that order: the derivatives of the taps.

    Unless somebody watches, what has been used is overwritten: the layers share their arrays,
    and the residual stream has a single derivative that each block adds to.
    """
    C, H, F, N = config.n_embd, config.n_head, 4 * config.n_embd, B * T
    dtap = Tree(config.n_layer)
    dtap.logits = new(V, N)
    stream = new(C, N)
    for i in reversed(range(config.n_layer)):
        if not watch and i < config.n_layer - 1:
            dtap.layers[i] = dtap.layers[-1]
            continue
        layer = dtap.layers[i]
        layer.mlp_res = new(C, N) if watch else stream
        layer.mlp_act = new(F, N)
        layer.mlp_pre = new(F, N) if watch else layer.mlp_act
        layer.mlp_norm = new(C, N)
        layer.attn_res = new(C, N) if watch else stream
        layer.attn_out = new(C, N)
        layer.attn_weights = new(T, B * H * T)
        layer.attn_logits = new(T, B * H * T) if watch else layer.attn_weights
        layer.qkv = new(3 * C, N)
        layer.attn_norm = new(C, N)
        _add_views(layer, B, H)
    dtap.emb_norm = new(C, N) if watch else stream
    return dtap


def _add_views(layer: Tree, B: int, H: int) -> None:
    """What attention works on: the arrays of a layer, document by document and head by head.

    q, k, v       (B, H, D, T)   rows of qkv: the channels of a head lie together
    qk            (2 C, N)       the rows of both
    scores        (B, H, U, T)   of attn_logits
    head_weights  (B, H, U, T)   of attn_weights
    head_out      (B, H, D, T)   of attn_out
    """
    N = layer.qkv.shape[-1]
    layer.q, layer.k, layer.v = layer.qkv.reshape(3, H, -1, B, N // B).transpose(0, 3, 1, 2, 4)
    layer.qk = layer.qkv[: len(layer.qkv) // 3 * 2]
    layer.scores = layer.attn_logits.reshape(-1, B, H, N // B).transpose(1, 2, 0, 3)
    layer.head_weights = layer.attn_weights.reshape(-1, B, H, N // B).transpose(1, 2, 0, 3)
    layer.head_out = layer.attn_out.reshape(H, -1, B, N // B).transpose(2, 0, 1, 3)


class Workspace:
    """Where activations and their derivatives lie, and lie again in the next step.

    Small batches have arrays of their own, one set for each shape that comes again. Large ones, and
    those in pieces, lie in one block of memory, which is laid out anew for every batch: first the
    activations of all pieces, then the derivatives of one, since they are done one by one.
    """

    SMALL = 256  # columns of a batch
    KEPT = 1024  # columns of small batches in all

    def __init__(self, config: Config, V: int, dtype: np.dtype, watch: bool) -> None:
        self.config, self.V, self.watch = config, V, watch
        self.kept: dict[tuple[int, int], TapsAndDerivatives] = {}
        self.block = np.empty(0, dtype)
        self.used = self.wanted = 0

    def arrays(self, sizes: Sequence[tuple[int, int]]) -> list[TapsAndDerivatives]:
        """The taps and their derivatives for each piece (B, T) of a batch."""
        if len(sizes) == 1 and math.prod(sizes[0]) <= self.SMALL:
            return [self._own(*sizes[0])]
        laid = self._lay_out(sizes)
        if self.wanted > len(self.block):  # which is known only now
            del laid
            self.block = self.new(0)
            self.block = self.new(self.wanted * 5 // 4)  # what is not used costs nothing
            laid = self._lay_out(sizes)
        return laid

    def new(self, *shape: int) -> Array:
        """An array that belongs to whoever asks."""
        return np.empty(shape, self.block.dtype)

    def _own(self, B: int, T: int) -> TapsAndDerivatives:
        if (B, T) not in self.kept:
            if B * T + sum(b * t for b, t in self.kept) > self.KEPT:
                self.kept.clear()
            self.kept[B, T] = self._activations(B, T, self.new), self._derivatives(B, T, self.new)
        return self.kept[B, T]

    def _lay_out(self, sizes: Sequence[tuple[int, int]]) -> list[TapsAndDerivatives]:
        self.used = self.wanted = 0
        taps = [self._activations(B, T, self._from_block) for B, T in sizes]
        after = self.used
        dtaps = []
        for B, T in sizes:
            self.used = after
            dtaps.append(self._derivatives(B, T, self._from_block))
        return list(zip(taps, dtaps))

    def _from_block(self, *shape: int) -> Array:
        start, size = self.used, math.prod(shape)
        self.used += size
        self.wanted = max(self.wanted, self.used)
        if self.used > len(self.block):
            return self.new(*shape)
        return self.block[start : start + size].reshape(shape)

    def _activations(self, B: int, T: int, new: New) -> Tree:
        return activations(self.config, self.V, B, T, T, self.watch, new)

    def _derivatives(self, B: int, T: int, new: New) -> Tree:
        return derivatives(self.config, self.V, B, T, self.watch, new)


def flatten(tensors: Mapping[str, Any], dtype: np.dtype) -> Array:
    """One buffer that holds all tensors, one after the other, row by row."""
    return np.concatenate([np.asarray(tensor, dtype).reshape(-1) for tensor in tensors.values()])


def named_views(flat: Array, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Array]:
    """The tensors of such a buffer: views, so that writing to one writes to the other."""
    return {name: _rows(flat, shapes, name, n_out) for name, (n_out, _) in shapes.items()}


def model_tree(flat: Array, shapes: Mapping[str, tuple[int, int]], n_layer: int) -> Tree:
    """The tensors of a buffer as the model reads them: params.wte, params.layers[0].attn_wo.

    Some lie one after the other and are used as one: wte_wpe (V + block_size, C) is a view of wte
    and wpe, attn_wqkv (3 C, C) one of attn_wq, attn_wk and attn_wv.
    """
    params = grow(named_views(flat, shapes), n_layer)
    params.wte_wpe = _rows(flat, shapes, "wte", len(params.wte) + len(params.wpe))
    for i, layer in enumerate(params.layers):
        layer.attn_wqkv = _rows(flat, shapes, f"layer{i}.attn_wq", 3 * len(layer.attn_wq))
    return params


def _rows(flat: Array, shapes: Mapping[str, tuple[int, int]], first: str, n: int) -> Array:
    """The n rows of a buffer that begin with those of the tensor `first`."""
    names = list(shapes)
    start = sum(math.prod(shapes[name]) for name in names[: names.index(first)])
    _, n_in = shapes[first]
    return flat[start : start + n * n_in].reshape(n, n_in)


def column_sum(x: Array, weight: float = 1.0) -> Array:
    """s = weight * (x_0 + .. + x_n-1), in every column: (n, N) -> (N,), or n such rows, (n, N).

    As a product with weights it is faster than sum(). Of a small array, a product with a square of
    them takes no longer, and what is computed with s then need not be broadcast.
    """
    n, N = x.shape
    return _filled((n, n) if n * n * N <= REPEATED else (n,), weight, x.dtype).dot(x)


def column_mean(x: Array) -> Array:
    """s = 1/n * (x_0 + .. + x_n-1), in every column: as column_sum."""
    return column_sum(x, 1 / len(x))


def causal_mask(T: int, dtype: np.dtype) -> Array:
    """0 where position t may look at position u, u <= t, else -inf: (U, T), U = T."""
    return np.tril(np.full((T, T), -np.inf, dtype), -1)


@cache
def numbers(dtype: np.dtype, *values: float) -> tuple[Array, ...]:
    """Each as an array without axes: one of Python's numbers would be converted at each use."""
    return tuple(_read_only(np.array(value, dtype)) for value in values)


def side_by_side(square: Callable[..., Array], T: int, copies: int, dtype: np.dtype) -> Array:
    """The matrix square(T, dtype=dtype) over and over, to be read only: (T, copies T)."""
    width = 1 << (copies - 1).bit_length()  # a few widths serve all, so that they can be kept
    repeat = _kept if T * width * T <= KEEPABLE else _repeated
    return repeat(square, T, width, dtype)[:, : copies * T]


def _repeated(square: Callable[..., Array], T: int, copies: int, dtype: np.dtype) -> Array:
    return _read_only(np.tile(square(T, dtype=dtype), copies))


_kept = lru_cache(maxsize=64)(_repeated)


@cache
def _filled(shape: tuple[int, ...], value: float, dtype: np.dtype) -> Array:
    return _read_only(np.full(shape, value, dtype))


def _read_only(array: Array) -> Array:
    array.setflags(write=False)  # there is one for all who ask
    return array
