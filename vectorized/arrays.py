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

TILED = 2**16  # numbers of a mask for all heads and rows, at most
REPEATED = 8192  # multiplications at most, for which a sum is computed once for every row


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
    token_rows          the former, one after the other: (V B T,), a view of one_hot
    position_rows       those of the positions of the batch: (T B T,), likewise
    at                  where each column has its one in them, unless the batch is packed: (B T,)
    mlp_slope, probs    what the backward pass needs besides
    norm_eps            as config has it, an array without axes: see `numbers`
    logit_scale         1 / sqrt(D), likewise
    mean, ones          what sums columns in the norms and in the softmaxes: see `summing`
    zeros               as many as mlp_pre has numbers
    mask                0 where position t may look at position u, else -inf: (U, 1, n), n = H B T,
                        or T if that is many, and of a packed batch B T. In sampling a position
                        looks at all that came before it: one row of zeros, for every u
    unmasked            what it is added to: attn_logits as (U, H B T / n, n)
    U                   positions looked at: those of the batch, and in sampling those before them

    The positions are set before each batch (see `arrange`), and the mask of a packed one.
    """
    B, T, _ = shape
    C, H, F, N = config.n_embd, config.n_head, 4 * config.n_embd, B * T
    tap = Tree(config.n_layer)
    tap.one_hot = new(V + U, N)
    tap.token_rows, tap.position_rows = tap.one_hot[:V].reshape(-1), tap.one_hot[-T:].reshape(-1)
    tap.emb = new(C, N)
    if config.norm_embedding:
        tap.emb_norm = new(C, N)
    for layer in tap.layers:
        layer.attn_norm = new(C, N)
        layer.qkv = new(3 * C, N)
        layer.attn_logits = new(U, H * N)
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
    tap.loss_t = new(N)
    _add_constants(tap, config, shape, U, new)
    return tap


def derivatives(config: Config, V: int, shape: Shape, watch: bool, new: New) -> Tree:
    """Everything that the backward pass fills, in that order: the derivatives of the taps.

    Unless somebody watches, what has been used is overwritten: the layers share their arrays,
    attention those of the MLP after it, and the residual stream has a single derivative that each
    block adds to.

    attn_x, mlp_x    of what a block reads, as its norm passes it on: the residual is still to come
    """
    B, T, _ = shape
    C, H, F, N = config.n_embd, config.n_head, 4 * config.n_embd, B * T
    dtap = Tree(config.n_layer)
    dtap.logits = new(V, N)
    stream, wide, narrow = new(C, N), new(F, N), new(C, N)

    def over(used: Array) -> Array:
        return new(*used.shape) if watch else used

    for i in reversed(range(config.n_layer)):
        if not watch and i < config.n_layer - 1:
            dtap.layers[i] = dtap.layers[-1]
            continue
        layer = dtap.layers[i]
        layer.mlp_res = over(stream)
        layer.mlp_act = over(wide)
        layer.mlp_pre = over(layer.mlp_act)
        layer.mlp_norm = over(narrow)
        layer.mlp_x = over(layer.mlp_norm)
        layer.attn_res = over(stream)
        layer.attn_out = over(wide[:C])
        layer.attn_weights = new(T, H * N)
        layer.attn_logits = over(layer.attn_weights)
        layer.qkv = over(wide[C:])
        layer.attn_norm = over(narrow)
        layer.attn_x = over(layer.attn_norm)
        _add_views(layer, B, H)
    dtap.emb_norm = over(stream)
    dtap.emb = over(dtap.emb_norm) if config.norm_embedding else dtap.emb_norm
    return dtap


def _add_constants(tap: Tree, config: Config, shape: Shape, U: int, new: New) -> None:
    """What is there beforehand. Of a packed batch, the mask has its place only."""
    B, T, packed = shape
    V, C, H, N, dtype = len(tap.logits), config.n_embd, config.n_head, B * T, tap.logits.dtype
    if packed:
        mask = new(T, N)
    elif T * T * _rounded(H * B) <= TILED:
        mask = tiled_mask(T, H * B, dtype)
    else:
        mask = causal_mask(T, dtype)
    if not packed:
        column = counted(N)
        tap.at = column % T * N + column
        tap.one_hot[V:-T] = 0.0  # positions before those of the batch
    tap.mask = mask[:, None]
    tap.norm_eps, logit_scale = numbers(dtype, config.norm_eps, config.head_dim**-0.5)
    tap.mean, tap.ones = summing(C, N, 1 / C, dtype), summing(V, N, 1.0, dtype)
    ones, zeros = summing(U, H * N, 1.0, dtype), zeroed(4 * C, N, dtype)
    for layer in tap.layers:
        layer.mean, layer.norm_eps, layer.zeros = tap.mean, tap.norm_eps, zeros
        layer.logit_scale, layer.mask, layer.ones = logit_scale, tap.mask, ones
        layer.unmasked = layer.attn_logits.reshape(U, -1, mask.shape[-1])


def _add_views(layer: Tree, B: int, H: int) -> None:
    """What attention works on: the arrays of a layer, head by head and row by row.

    q, k, v       (H, B, D, T)   rows of qkv: the channels of a head lie together
    qk            (2 C, N)       the rows of both
    head_logits   (H, B, U, T)   of attn_logits
    head_weights  (H, B, U, T)   of attn_weights
    head_out      (H, B, D, T)   of attn_out
    """
    N = layer.qkv.shape[-1]
    layer.q, layer.k, layer.v = layer.qkv.reshape(3, H, -1, B, N // B).transpose(0, 1, 3, 2, 4)
    layer.qk = layer.qkv[: len(layer.qkv) // 3 * 2]
    layer.head_logits = layer.attn_logits.reshape(-1, H, B, N // B).transpose(1, 2, 0, 3)
    layer.head_weights = layer.attn_weights.reshape(-1, H, B, N // B).transpose(1, 2, 0, 3)
    layer.head_out = layer.attn_out.reshape(H, -1, B, N // B).transpose(0, 2, 1, 3)


class Workspace:
    """Where activations and their derivatives lie, and lie again in the next step.

    Whatever its shape, a batch lies in the same block of memory: first the activations of all
    pieces, then the derivatives of one, since they are done one by one.
    """

    LAYOUTS = 32  # are remembered, of batches in one piece; when there is one more, it alone

    def __init__(self, config: Config, V: int, dtype: np.dtype, watch: bool) -> None:
        self.config, self.V, self.watch = config, V, watch
        self.layouts: dict[Shape, TapsAndDerivatives] = {}
        self.block = np.empty(0, dtype)
        self.used = self.wanted = 0

    def arrays(self, shapes: Sequence[Shape]) -> list[TapsAndDerivatives]:
        """The taps and their derivatives for each piece of a batch."""
        if len(shapes) == 1 and shapes[0] in self.layouts:
            return [self.layouts[shapes[0]]]
        layout = self._lay_out(shapes)
        if self.wanted > len(self.block):  # which is known only now
            del layout
            self.layouts.clear()
            self.block = self.new(0)
            self.block = self.new(self.wanted * 5 // 4)  # what is not used costs nothing
            layout = self._lay_out(shapes)
        if len(shapes) == 1:
            if len(self.layouts) == self.LAYOUTS:
                self.layouts.clear()
            self.layouts[shapes[0]] = layout[0]
        return layout

    def new(self, *shape: int) -> Array:
        """An array that belongs to whoever asks."""
        return np.empty(shape, self.block.dtype)

    def _lay_out(self, shapes: Sequence[Shape]) -> list[TapsAndDerivatives]:
        self.used = self.wanted = 0
        new = self._from_block
        taps = [
            activations(self.config, self.V, shape, shape.T, self.watch, new) for shape in shapes
        ]
        after = self.used
        dtaps = []
        for shape in shapes:
            self.used = after
            dtaps.append(derivatives(self.config, self.V, shape, self.watch, new))
        return list(zip(taps, dtaps))

    def _from_block(self, *shape: int) -> Array:
        start, size = self.used, math.prod(shape)
        self.used += size
        self.wanted = max(self.wanted, self.used)
        if self.used > len(self.block):
            return self.new(*shape)
        return self.block[start : start + size].reshape(shape)


def flatten(tensors: Mapping[str, Any], dtype: np.dtype) -> Array:
    """One buffer that holds all tensors, one after the other, row by row."""
    flat = np.empty(sum(len(tensor) * len(tensor[0]) for tensor in tensors.values()), dtype)
    start = 0
    for tensor in tensors.values():  # one by one, for a copy of each would take as much again
        end = start + len(tensor) * len(tensor[0])
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is found as such
            flat[start:end].reshape(len(tensor), -1)[:] = tensor
        start = end
    return flat


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
    """Weights w so that w.dot(x) is `weight` times the sum of every column of x, which is (n, N).

    As a product the sum is faster than sum(). It comes out as (N,), or of a small x, where that
    takes no longer, as n rows alike, (n, N): what is computed with them need not be broadcast.
    """
    return filled((n, n) if n * n * N <= REPEATED else (n,), weight, dtype)


def causal_mask(T: int, dtype: np.dtype) -> Array:
    """0 where position t may look at position u, u <= t, else -inf: (U, T), U = T."""
    largest = _largest_masks.get(dtype)
    if largest is None or len(largest) < T:  # a smaller one is a corner of it
        u, t = np.ogrid[:T, :T]
        largest = np.where(u <= t, dtype.type(0.0), dtype.type(-np.inf))  # (T, T)
        _largest_masks[dtype] = _read_only(largest)
    return largest[:T, :T]


_largest_masks: dict[np.dtype, Array] = {}


def tiled_mask(T: int, copies: int, dtype: np.dtype) -> Array:
    """That over and over: (U, copies T)."""
    return _tiled_mask(T, _rounded(copies), dtype)[:, : copies * T]


@lru_cache(maxsize=64)
def _tiled_mask(T: int, copies: int, dtype: np.dtype) -> Array:
    return _read_only(np.tile(causal_mask(T, dtype), copies))


def _rounded(size: int) -> int:
    """The next power of two: a few sizes serve all, so that they can be kept."""
    return 1 << (size - 1).bit_length()


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


@lru_cache(maxsize=256)
def filled(shape: tuple[int, ...], value: float, dtype: np.dtype) -> Array:
    """An array of one number, to be read only."""
    return _read_only(np.full(shape, value, dtype))


def zeroed(n: int, N: int, dtype: np.dtype) -> Array:
    """Zeros, to be read only: (n, N)."""
    return _zeros(_rounded(n * N), dtype)[: n * N].reshape(n, N)


@cache
def _zeros(size: int, dtype: np.dtype) -> Array:
    return _read_only(np.zeros(size, dtype))  # many take no memory, unlike those of filled()


def set_ones(x: Array, at: Array) -> None:
    """x = 1 at these places, 0 everywhere else."""
    x.fill(0.0)
    x[at] = 1.0


@lru_cache(maxsize=64)
def counted(n: int) -> Array:
    """0, 1, .., n - 1, to be read only."""
    return _read_only(np.arange(n))


def _read_only(array: Array) -> Array:
    array.setflags(write=False)  # there is one for all who ask
    return array
