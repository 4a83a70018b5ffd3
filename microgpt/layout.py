"""Tensors by name: the shapes of parameters, the names of taps, and trees of both.

Inside a model, tensors are attributes of a tree (`params.wte`, `params.layers[0].attn_wq`).
In files and comparisons, tensors go by their full names ("wte", "layer0.attn_wq").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from microgpt.config import Config
from microgpt.taps import params, shape_of, sizes, taps

MANY = 2_000_000  # weights of a model: drawing them, or a document from it, takes seconds


def param_shapes(config: Config, vocab_size: int) -> dict[str, tuple[Any, ...]]:
    """Each parameter's shape, (n_out, n_in) or (n,), in the order in which they are stored."""
    letters = sizes(config, vocab_size)
    return {name: shape_of(param.axes, letters) for name, param in params(config).items()}


def count_params(config: Config, vocab_size: int) -> int:
    """How many parameters a model has."""
    return sum(map(prod, param_shapes(config, vocab_size).values()))


def rows(tensor: Any) -> Any:
    """The rows of a matrix; a vector is one row."""
    return tensor if hasattr(tensor[0], "__len__") else [tensor]


def mapped(function: Callable[[Any], Any], tensor: Any) -> list[Any]:
    """The matrix or vector, in lists, of a function of each number, row by row."""
    lists = [[function(x) for x in row] for row in rows(tensor)]
    return lists if rows(tensor) is tensor else lists[0]


def tap_names(config: Config) -> list[str]:
    """Every intermediate, in the order in which the forward pass computes it."""
    return list(taps(config))


class Tree:
    """Tensors as attributes, none at first. Python reads them faster than a SimpleNamespace's."""

    def __init__(self, n_layer: int = 0) -> None:
        self.layers = [Tree() for _ in range(n_layer)]

    if TYPE_CHECKING:  # a tree may have attributes of any name

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...


def grow(named: Mapping[str, Any], n_layer: int) -> Tree:
    """The tree of these tensors, given by their full names."""
    root = Tree(n_layer)
    for name, tensor in named.items():
        node, last = _holder(root, name)
        setattr(node, last, tensor)
    return root


def pick(root: Tree, name: str) -> Any:
    """The tensor of this full name."""
    node, last = _holder(root, name)
    return getattr(node, last)


def written(root: Tree, names: Iterable[str]) -> dict[str, Any]:
    """The tensors of these full names that are in the tree, by full name."""
    held = {name: _holder(root, name) for name in names}
    return {name: getattr(*node) for name, node in held.items() if hasattr(*node)}


def _holder(root: Tree, name: str) -> tuple[Tree, str]:
    layer, dot, last = name.rpartition(".")
    return (root.layers[int(layer.removeprefix("layer"))] if dot else root), last
