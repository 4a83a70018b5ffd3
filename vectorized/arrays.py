"""How the arrays lie: a batch as columns, activations in one block, parameters in one buffer.

A vector of scalar/ is a column here. N = B T columns stand side by side, row after row of T
positions (vectorized.batch says what is in them), so that y = w . x is one matrix product and every
sum over channels runs along axis 0.

Same as scalar:         the names of what is computed in between.
Different from scalar:  what comes into being as it is computed -> arrays that are there beforehand;
                        one parameter -> a view of the buffer that holds them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from microgpt.config import Config
from microgpt.layout import Tree, grow

Array = NDArray[Any]
New = Callable[..., Array]  # shape -> array
TapsAndDerivatives = tuple[Tree, Tree]

KEEPABLE = 2**16  # numbers of a constant that is worth keeping
REPEATED = 8192  # multiplications: to sum columns with so many is faster than to broadcast the sum


class Shape(NamedTuple):
    """B rows of T positions; packed if there are several documents in some of them."""

    B: int
    T: int
    packed: bool = False


def activations(config: Config, V: int, shape: Shape, U: int, watch: bool, new: New) -> Tree:
    """Everything that the forward pass fills, in that order, and the constants that it reads.

    The taps are there by their names. What forward adds are the roots of the norms, .._rms.

    Unless somebody watches, a softmax overwrites its logits and the activation its input, which
    nothing else reads.

    one_hot             a row for each token, and below them one for each position: see gpt_forward
    token_rows          the former, one after the other: a view of one_hot
    mlp_slope, probs    what the backward pass needs besides
    norm_eps            as config has it, an array without axes: see `numbers`
    logit_scale         1 / sqrt(D), likewise
    mean, ones          what sums columns in the norms and in the softmaxes: see `summing`
    zeros               as many as mlp_pre has numbers
    mask                0 where position t may look at position u, else -inf: (U, H B T), or one
                        row for all where a single position looks at those before it. Of a packed
                        batch (U, 1, B T), the same for all heads
    masked              what it is added to: attn_logits, of a packed batch as (U, H, B T)
    U                   positions looked at: those of the batch, and in sampling those before them

    Of a packed batch, positions and mask are for `arrange` to fill in.
    """
    B, T, packed = shape
    C, H, F, N = config.n_embd, config.n_head, 4 * config.n_embd, B * T
    tap = Tree(config.n_layer)
    tap.one_hot = new(V + U, N)
    tap.token_rows = tap.one_hot[:V].reshape(-1)
    dtype = tap.one_hot.dtype
    if not packed:
        tap.one_hot[V:] = 0.0
        tap.one_hot[-T:] = side_by_side(np.eye, T, B, dtype)
    tap.emb = new(C, N)
    if config.norm_embedding:
        tap.emb_norm = new(C, N)
    norm_eps, logit_scale = numbers(dtype, config.norm_eps, config.head_dim**-0.5)
    mean, ones = summing(C, N, 1 / C, dtype), summing(U, H * N, 1.0, dtype)
    zeros = zeroed(F, N, dtype)
    mask = None if packed else side_by_side(causal_mask, T, H * B, dtype)
    tap.mean, tap.norm_eps = mean, norm_eps
    for layer in tap.layers:
        layer.mean, layer.norm_eps, layer.zeros = mean, norm_eps, zeros
        layer.logit_scale, layer.mask, layer.ones = logit_scale, mask, ones
        layer.attn_norm = new(C, N)
        layer.qkv = new(3 * C, N)
        layer.attn_logits = new(U, H * N)
        layer.masked = layer.attn_logits.reshape(U, H, N) if packed else layer.attn_logits
        layer.attn_weights = new(U, H * N) if watch else layer.attn_logits
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
    tap.ones = summing(V, N, 1.0, dtype)
    tap.loss_t = new(N)
    return tap


def derivatives(config: Config, V: int, shape: Shape, watch: bool, new: New) -> Tree:
    """Everything that the backward pass fills, in that order: the derivatives of the taps.

    Unless somebody watches, what has been used is overwritten: the layers share their arrays,
    and the residual stream has a single derivative that each block adds to.
    """
    B, T, _ = shape
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
        layer.attn_weights = new(T, H * N)
        layer.attn_logits = new(T, H * N) if watch else layer.attn_weights
        layer.qkv = new(3 * C, N)
        layer.attn_norm = new(C, N)
        _add_views(layer, B, H)
    dtap.emb_norm = new(C, N) if watch else stream
    return dtap


def _add_views(layer: Tree, B: int, H: int) -> None:
    """What attention works on: the arrays of a layer, head by head and row by row.

    q, k, v       (H, B, D, T)   rows of qkv: the channels of a head lie together
    qk            (2 C, N)       the rows of both
    scores        (H, B, U, T)   of attn_logits
    head_weights  (H, B, U, T)   of attn_weights
    head_out      (H, B, D, T)   of attn_out
    """
    N = layer.qkv.shape[-1]
    layer.q, layer.k, layer.v = layer.qkv.reshape(3, H, -1, B, N // B).transpose(0, 1, 3, 2, 4)
    layer.qk = layer.qkv[: len(layer.qkv) // 3 * 2]
    layer.scores = layer.attn_logits.reshape(-1, H, B, N // B).transpose(1, 2, 0, 3)
    layer.head_weights = layer.attn_weights.reshape(-1, H, B, N // B).transpose(1, 2, 0, 3)
    layer.head_out = layer.attn_out.reshape(H, -1, B, N // B).transpose(0, 2, 1, 3)


class Workspace:
    """Where activations and their derivatives lie, and lie again in the next step.

    Small batches have arrays of their own, one set for each shape that comes again. Large ones, and
    those in pieces, lie in one block of memory, which is laid out anew for every batch: first the
    activations of all pieces, then the derivatives of one, since they are done one by one. How
    packed ones lie is remembered: they hold nothing that has to be there beforehand.
    """

    SMALL = 256  # columns of a batch
    KEPT = 1024  # columns of small batches in all
    LAYOUTS = 32  # that are remembered

    def __init__(self, config: Config, V: int, dtype: np.dtype, watch: bool) -> None:
        self.config, self.V, self.watch = config, V, watch
        self.kept: dict[Shape, TapsAndDerivatives] = {}
        self.layouts: dict[tuple[Shape, ...], list[TapsAndDerivatives]] = {}
        self.block = np.empty(0, dtype)
        self.used = self.wanted = 0

    def arrays(self, shapes: Sequence[Shape]) -> list[TapsAndDerivatives]:
        """The taps and their derivatives for each piece of a batch."""
        if len(shapes) == 1 and shapes[0].B * shapes[0].T <= self.SMALL:
            return [self._own(shapes[0])]
        laid = self.layouts.get(tuple(shapes))
        if laid is not None:
            return laid
        laid = self._lay_out(shapes)
        if self.wanted > len(self.block):  # which is known only now
            del laid
            self.layouts.clear()
            self.block = self.new(0)
            self.block = self.new(self.wanted * 5 // 4)  # what is not used costs nothing
            laid = self._lay_out(shapes)
        if all(shape.packed for shape in shapes):
            if len(self.layouts) == self.LAYOUTS:
                self.layouts.clear()
            self.layouts[tuple(shapes)] = laid
        return laid

    def new(self, *shape: int) -> Array:
        """An array that belongs to whoever asks."""
        return np.empty(shape, self.block.dtype)

    def _own(self, shape: Shape) -> TapsAndDerivatives:
        if shape not in self.kept:
            if sum(B * T for B, T, _ in (shape, *self.kept)) > self.KEPT:
                self.kept.clear()
            tap, dtap = self._activations(shape, self.new), self._derivatives(shape, self.new)
            self.kept[shape] = tap, dtap
        return self.kept[shape]

    def _lay_out(self, shapes: Sequence[Shape]) -> list[TapsAndDerivatives]:
        self.used = self.wanted = 0
        taps = [self._activations(shape, self._from_block) for shape in shapes]
        after = self.used
        dtaps = []
        for shape in shapes:
            self.used = after
            dtaps.append(self._derivatives(shape, self._from_block))
        return list(zip(taps, dtaps))

    def _from_block(self, *shape: int) -> Array:
        start, size = self.used, math.prod(shape)
        self.used += size
        self.wanted = max(self.wanted, self.used)
        if self.used > len(self.block):
            return self.new(*shape)
        return self.block[start : start + size].reshape(shape)

    def _activations(self, shape: Shape, new: New) -> Tree:
        return activations(self.config, self.V, shape, shape.T, self.watch, new)

    def _derivatives(self, shape: Shape, new: New) -> Tree:
        return derivatives(self.config, self.V, shape, self.watch, new)


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


def summing(n: int, N: int, weight: float, dtype: np.dtype) -> Array:
    """What summing(..).dot(x) is the weighted sum of every column with: (n, N) -> (N,) or (n, N).

    As a product the sum is faster than sum(). Of a small array, a product with a square takes no
    longer; that gives n rows alike, and what is computed with them need not be broadcast.
    """
    return filled((n, n) if n * n * N <= REPEATED else (n,), weight, dtype)


def causal_mask(T: int, dtype: np.dtype) -> Array:
    """0 where position t may look at position u, u <= t, else -inf: (U, T), U = T."""
    return np.tril(np.full((T, T), -np.inf, dtype), -1)


@cache
def packed_masks(T: int, dtype: np.dtype) -> Array:
    """0 where t may look at u in a document that starts at s, s <= u <= t, else -inf: (T, T T).

    A column for every s and t, s T + t: all that there can be, as long as T is at most SHARED.
    """
    u, s, t = np.ogrid[:T, :T, :T]
    masks = np.where((s <= u) & (u <= t), 0.0, -np.inf)  # (T, T, T)
    return _read_only(masks.astype(dtype).reshape(T, -1))


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


@lru_cache(maxsize=256)
def filled(shape: tuple[int, ...], value: float, dtype: np.dtype) -> Array:
    """An array of one number, to be read only."""
    return _read_only(np.full(shape, value, dtype))


def zeroed(n: int, N: int, dtype: np.dtype) -> Array:
    """Zeros, to be read only: (n, N)."""
    size = 1 << (n * N - 1).bit_length()  # a few sizes serve all
    return filled((size,), 0.0, dtype)[: n * N].reshape(n, N)


@lru_cache(maxsize=64)
def counted(n: int) -> Array:
    """0, 1, .., n - 1, to be read only."""
    return _read_only(np.arange(n))


def _read_only(array: Array) -> Array:
    array.setflags(write=False)  # there is one for all who ask
    return array
