"""The table of the model: every parameter and every intermediate, in the order of computation.

A tap is an intermediate under its name. The order of comparison, the axes of reports, the
mask of padding, the shapes in trace files, the tables of crosscheck/TRACES.md, who consumes
what, and the skeleton of the explanations and diagnoses derive from this table. A new operation is
written in scalar/model.py and in vectorized/model.py, and entered here.

B documents, T positions, U positions looked at, C = n_embd, H = n_head, F = 4 C, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from microgpt.config import Config


class Param(NamedTuple):
    """Weights: a matrix (n_out, n_in) or a vector, and the numbers that they begin with."""

    name: str
    shape: str
    init: str | float = "init_std"  # the field with the standard deviation of its draws; or a
    # number, which every weight begins with, without a draw
    switch: str = ""  # see `is_on`

    @property
    def axes(self) -> tuple[str, ...]:
        """The letters of its shape."""
        return tuple(self.shape.split())


class Tap(NamedTuple):
    """An intermediate: its name, its shape, and how it is computed from its operands."""

    name: str
    shape: str
    operation: str  # see crosscheck.operations for the arithmetic of each
    operands: tuple[str, ...]  # taps and parameters; `res` is the last tap of the section before
    equation: str
    within: str  # the function of scalar/model.py that computes this tap
    function: str = ""  # f, which `within` calls for it; f_forward, f_backward in vectorized/
    switch: str = ""  # see `is_on`

    @property
    def axes(self) -> tuple[str, ...]:
        """The letters of its shape."""
        return tuple(self.shape.split())


PARAMS = (
    Param("wte", "V C"),
    Param("wpe", "block_size C"),
    Param("lm_head", "V C", switch="tie_lm_head=false"),
)
LAYER_PARAMS = (
    Param("attn_wq", "C C"),
    Param("attn_wk", "C C"),
    Param("attn_wv", "C C"),
    Param("attn_wo", "C C", init="init_std_residual"),
    Param("mlp_fc1", "F C"),
    Param("mlp_fc2", "C F", init="init_std_residual"),
)


class Activation(NamedTuple):
    """A function of x and its derivative, as Python expressions that crosscheck evaluates."""

    value: str
    slope: str


ACTIVATIONS = {
    "relu": Activation("relu(x)", "(x > 0)"),
    "squared_relu": Activation("relu(x) ** 2", "2 * relu(x)"),
    "gelu": Activation(
        "0.5 * x * (1 + tanh((2 / pi) ** 0.5 * (x + 0.044715 * x**3)))",
        "0.5 * (1 + tanh((2 / pi) ** 0.5 * (x + 0.044715 * x**3))) + 0.5 * x"
        " * (1 - tanh((2 / pi) ** 0.5 * (x + 0.044715 * x**3)) ** 2)"
        " * (2 / pi) ** 0.5 * (1 + 0.134145 * x**2)",
    ),
}

# fmt: off
EMBEDDING = (
    Tap("emb", "B T C", "embedding", ("wte", "wpe"), "wte[token] + wpe[position]", "gpt"),
    Tap("emb_norm", "B T C", "rmsnorm", ("emb",), "rmsnorm(emb)", "gpt", "rmsnorm",
        switch="norm_embedding"),
)
LAYER = (
    Tap("attn_norm", "B T C", "rmsnorm", ("res",), "rmsnorm(res)", "attention", "rmsnorm"),
    Tap("q", "B T C", "linear", ("attn_norm", "attn_wq"), "attn_wq . attn_norm", "attention",
        "linear"),
    Tap("k", "B T C", "linear", ("attn_norm", "attn_wk"), "attn_wk . attn_norm", "attention",
        "linear"),
    Tap("v", "B T C", "linear", ("attn_norm", "attn_wv"), "attn_wv . attn_norm", "attention",
        "linear"),
    Tap("attn_logits", "B H T U", "scores", ("q", "k"), "q[t] . k[u] / sqrt(D)", "attention"),
    Tap("attn_weights", "B H T U", "softmax", ("attn_logits",), "softmax(attn_logits)",
        "attention", "softmax"),
    Tap("attn_out", "B T C", "weighted_sum", ("attn_weights", "v"), "attn_weights . v",
        "attention"),
    Tap("attn_res", "B T C", "linear_residual", ("attn_out", "attn_wo", "res"),
        "attn_wo . attn_out + res", "attention", "linear"),
    Tap("mlp_norm", "B T C", "rmsnorm", ("attn_res",), "rmsnorm(attn_res)", "mlp", "rmsnorm"),
    Tap("mlp_pre", "B T F", "linear", ("mlp_norm", "mlp_fc1"), "mlp_fc1 . mlp_norm", "mlp",
        "linear"),
    Tap("mlp_act", "B T F", "activation", ("mlp_pre",), "activation(mlp_pre)", "mlp",
        "activation"),
    Tap("mlp_res", "B T C", "linear_residual", ("mlp_act", "mlp_fc2", "attn_res"),
        "mlp_fc2 . mlp_act + attn_res", "mlp", "linear"),
)
OUTPUT = (
    Tap("logits", "B T V", "linear", ("res", "lm_head"), "lm_head . res", "gpt", "linear"),
    Tap("loss_t", "B T", "cross_entropy", ("logits",), "-log(softmax(logits)[target])", "loss",
        "cross_entropy"),
    Tap("loss", "", "mean", ("loss_t",), "mean over documents of the mean over positions", "loss"),
)
# fmt: on


AXES = {one.name: one.axes for one in (*PARAMS, *LAYER_PARAMS, *EMBEDDING, *LAYER, *OUTPUT)}


def is_on(config: Config, switch: str) -> bool:
    """Whether a configuration has every field that a switch names, as "norm_embedding", true.

    A field with another value than true is named with that value, as "tie_lm_head=false".
    """
    wanted = (one.partition("=") for one in switch.split())
    return all(str(getattr(config, name)).lower() == (is_ or "true") for name, _, is_ in wanted)


@cache
def taps(config: Config) -> dict[str, Tap]:
    """Every tap by its full name, operands by theirs, in the order of the forward pass."""
    found: dict[str, Tap] = {}
    res = ""  # the last tap of the section before
    sections = [("", EMBEDDING), *[(f"layer{i}.", LAYER) for i in range(config.n_layer)]]
    for prefix, section in [*sections, ("", OUTPUT)]:
        own = {one.name for one in section} | {one.name for one in LAYER_PARAMS}
        names = {"res": res, "lm_head": "wte" if config.tie_lm_head else "lm_head"}
        for tap in section:
            if is_on(config, tap.switch):
                operands = (prefix + x if x in own else names.get(x, x) for x in tap.operands)
                full = tap._replace(name=prefix + tap.name, operands=tuple(operands))
                found[full.name] = full
        res = next(reversed(found))
    return found


@cache
def params(config: Config) -> dict[str, Param]:
    """Every parameter by its full name, in the order in which they are drawn and stored."""
    found = list(PARAMS)
    for i in range(config.n_layer):
        found += [one._replace(name=f"layer{i}.{one.name}") for one in LAYER_PARAMS]
    return {one.name: one for one in found if is_on(config, one.switch)}


@cache
def consumers(config: Config) -> dict[str, list[tuple[Tap, int]]]:
    """For every tap and parameter, the taps computed from it, each with the operand's index."""
    found: dict[str, list[tuple[Tap, int]]] = {
        name: [] for name in (*params(config), *taps(config))
    }
    for tap in taps(config).values():
        for i, operand in enumerate(tap.operands):
            found[operand].append((tap, i))
    return found


def sizes(config: Config, vocab_size: int = 0, B: int = 0, T: int = 0) -> dict[str, int]:
    """The number that each letter of a shape stands for."""
    C = config.n_embd
    return {
        "B": B,
        "T": T,
        "U": T,
        "C": C,
        "H": config.n_head,
        "F": 4 * C,
        "V": vocab_size,
        "block_size": config.block_size,
    }


def shape_of(axes: Sequence[str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A shape in numbers."""
    return tuple(sizes[letter] for letter in axes)


def axes_of(name: str) -> tuple[str, ...]:
    """The letters of a tap's or parameter's shape, in any layer; () for a single number."""
    return AXES[name.rpartition(".")[2]]
