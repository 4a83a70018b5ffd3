"""Every hand-written backward pass against finite differences, and what else only arrays have."""

from __future__ import annotations

import math
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from microgpt.backend import NAMES, fresh_state, load_backend
from microgpt.config import Config, load_config
from microgpt.init import init_params
from microgpt.layout import Tree, param_shapes
from vectorized.arrays import (
    Array,
    Shape,
    Workspace,
    model_tree,
    named_views,
    set_ones,
    summing,
)
from vectorized.batch import pad, places
from vectorized.model import (
    activation_backward,
    activation_forward,
    attention_backward,
    attention_forward,
    cross_entropy_backward,
    cross_entropy_forward,
    gpt_backward,
    gpt_forward,
    linear_backward,
    linear_forward,
    loss_backward,
    loss_forward,
    mlp_backward,
    mlp_forward,
    rmsnorm_backward,
    rmsnorm_forward,
    softmax_backward,
    softmax_forward,
)

H = 1e-6  # the step of the finite differences
KINK = 1e-4  # ReLU inputs are kept further than this from 0, where there is no slope

# An operation, ready to be checked: its inputs by name, forward() -> y, and backward(dy) -> the
# derivative of sum(dy * y) with respect to each input. forward reads the inputs as they stand.
Grads = dict[str, Array]
Op = tuple[Grads, Callable[[], Array], Callable[[Array], Grads]]


def linear(rng: np.random.Generator, size: SimpleNamespace) -> Op:
    x, w = rng.normal(size=(size.C, size.N)), rng.normal(size=(size.V, size.C))

    def forward() -> Array:
        return linear_forward(x, w, blank(size.V, size.N))

    def backward(dy: Array) -> Grads:
        dw = blank(size.V, size.C)
        return {"x": linear_backward(dy, x, w, dw, blank(size.C, size.N)), "w": dw}

    return {"x": x, "w": w}, forward, backward


def softmax(rng: np.random.Generator, size: SimpleNamespace) -> Op:
    x = rng.normal(size=(size.V, size.N))
    ones = summing(size.V, size.N, 1.0, x.dtype)

    def forward() -> Array:
        return softmax_forward(x, ones, blank(size.V, size.N))

    def backward(dy: Array) -> Grads:
        return {"x": softmax_backward(dy, forward(), ones, blank(size.V, size.N))}

    return {"x": x}, forward, backward


def rmsnorm(rng: np.random.Generator, size: SimpleNamespace) -> Op:
    x, eps = rng.normal(size=(size.C, size.N)), 0.1
    mean = summing(size.C, size.N, 1 / size.C, x.dtype)

    def forward() -> Array:
        return rmsnorm_forward(x, mean, eps, blank(size.C, size.N))[0]

    def backward(dy: Array) -> Grads:
        y, rms = rmsnorm_forward(x, mean, eps, blank(size.C, size.N))
        return {"x": rmsnorm_backward(dy, y, mean, rms, blank(size.C, size.N))}

    return {"x": x}, forward, backward


def activation(rng: np.random.Generator, size: SimpleNamespace) -> Op:
    x = rng.choice([-1, 1], (size.C, size.N)) * rng.uniform(0.1, 2, (size.C, size.N))
    zeros, slope = np.zeros_like(x), blank(size.C, size.N)

    def forward() -> Array:
        return activation_forward(x, size.squared, zeros, blank(size.C, size.N), slope)

    def backward(dy: Array) -> Grads:
        forward()
        return {"x": activation_backward(dy, slope, blank(size.C, size.N))}

    return {"x": x}, forward, backward


def attention(rng: np.random.Generator, size: SimpleNamespace) -> Op:
    gpt, x = model(rng, size), rng.normal(size=(size.C, size.N))
    w, dw, tap, dtap = (tree.layers[0] for tree in (gpt.params, gpt.dparams, gpt.tap, gpt.dtap))

    def forward() -> Array:
        return attention_forward(x, w, None, tap)

    def backward(dy: Array) -> Grads:
        forward()
        dx = attention_backward(dy, w, dw, tap, dtap, blank(size.C, size.N))
        return {"x": dx, **starting_with("layer0.attn", gpt.grads)}

    return {"x": x, **starting_with("layer0.attn", gpt.named)}, forward, backward


def mlp(rng: np.random.Generator, size: SimpleNamespace) -> Op:
    gpt, x = model(rng, size), rng.normal(size=(size.C, size.N))
    w, dw, tap, dtap = (tree.layers[0] for tree in (gpt.params, gpt.dparams, gpt.tap, gpt.dtap))

    def forward() -> Array:
        return mlp_forward(x, w, gpt.config, tap)

    def backward(dy: Array) -> Grads:
        forward()
        dx = mlp_backward(dy, w, dw, tap, dtap, blank(size.C, size.N))
        return {"x": dx, **starting_with("layer0.mlp", gpt.grads)}

    forward()
    assume(np.abs(w.mlp_fc1 @ tap.mlp_norm).min() > KINK)
    return {"x": x, **starting_with("layer0.mlp", gpt.named)}, forward, backward


def gpt(rng: np.random.Generator, size: SimpleNamespace) -> Op:
    gpt, N = model(rng, size), size.B * size.T
    tokens = places(rng.integers(size.V, size=N) * N)

    def forward() -> Array:
        return gpt_forward(tokens, gpt.params, None, gpt.config, gpt.tap)

    def backward(dy: Array) -> Grads:
        forward()
        gpt_backward(dy, gpt.params, gpt.dparams, gpt.config, gpt.tap, gpt.dtap)
        return gpt.grads

    forward()
    assume(all(np.abs(w.mlp_fc1 @ tap.mlp_norm).min() > KINK for w, tap in layers(gpt)))
    return gpt.named, forward, backward


def cross_entropy(rng: np.random.Generator, size: SimpleNamespace) -> Op:
    logits, probs = rng.normal(size=(size.V, size.N)), blank(size.V, size.N)
    targets = places(rng.integers(size.V, size=size.N) * size.N)
    ones = summing(size.V, size.N, 1.0, logits.dtype)

    def forward() -> Array:
        return cross_entropy_forward(logits, targets, ones, blank(size.N), probs)

    def backward(dy: Array) -> Grads:
        forward()
        return {"logits": cross_entropy_backward(dy, probs, targets, blank(size.V, size.N))}

    return {"logits": logits}, forward, backward


def loss(rng: np.random.Generator, size: SimpleNamespace) -> Op:
    gpt = model(rng, size)
    lengths = [size.T, *rng.integers(1, size.T + 1, size=size.B - 1)]  # ragged more often than not
    batch = pad([rng.integers(size.V, size=n + 1).tolist() for n in lengths], np.dtype("float64"))

    def forward() -> Array:
        return loss_forward(batch, gpt.params, gpt.config, gpt.tap)

    def backward(dy: Array) -> Grads:
        forward()
        loss_backward(batch, gpt.params, gpt.dparams, gpt.config, gpt.tap, gpt.dtap)
        return {name: dy * grad for name, grad in gpt.grads.items()}

    forward()
    assume(all(np.abs(w.mlp_fc1 @ tap.mlp_norm).min() > KINK for w, tap in layers(gpt)))
    return gpt.named, forward, backward


OPS = [linear, softmax, rmsnorm, activation, attention, mlp, gpt, cross_entropy, loss]


def blank(*shape: int) -> Array:
    """An array to write to: what is not written stays not a number, and is found."""
    return np.full(shape, np.nan)


def model(rng: np.random.Generator, size: SimpleNamespace) -> SimpleNamespace:
    """A GPT of that size, its parameters by name, and blank arrays for everything else."""
    config = replace(
        load_config(),
        n_layer=size.L,
        n_embd=size.C,
        n_head=size.H,
        block_size=size.T + 1,
        norm_embedding=size.norm_embedding,
        squared_relu=size.squared,
        tie_lm_head=size.tied,
        norm_eps=0.1,  # large enough to be missed
    )
    shapes = param_shapes(config, size.V)
    flat = rng.normal(size=sum(n_out * n_in for n_out, n_in in shapes.values())) * 0.7
    flat_grads = np.full_like(flat, np.nan)
    workspace = Workspace(config, size.V, flat.dtype, size.watch)
    ((tap, dtap),) = workspace.arrays([Shape(size.B, size.T)])
    for array in floats([tap, dtap]):
        if array.flags.writeable:  # others are constants
            array[...] = np.nan
    set_ones(tap.position_rows, tap.at)
    return SimpleNamespace(
        config=config,
        params=model_tree(flat, shapes, size.L),
        named=named_views(flat, shapes),
        dparams=model_tree(flat_grads, shapes, size.L),
        grads=named_views(flat_grads, shapes),
        tap=tap,
        dtap=dtap,
    )


def layers(gpt: SimpleNamespace) -> Iterator[tuple[Tree, Tree]]:
    """Each layer's parameters, and what was computed with them."""
    return zip(gpt.params.layers, gpt.tap.layers)


def starting_with(prefix: str, named: Mapping[str, Array]) -> Grads:
    return {name: array for name, array in named.items() if name.startswith(prefix)}


def floats(node: Any) -> Iterator[Array]:
    """Every array of floating-point numbers inside an object, however deep."""
    if isinstance(node, (np.ndarray, np.generic)):
        if np.issubdtype(node.dtype, np.floating):
            yield node
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from floats(item)
    elif isinstance(node, dict):
        yield from floats(list(node.values()))
    elif hasattr(node, "__dict__"):
        yield from floats(vars(node))


def size_of(**drawn: Any) -> SimpleNamespace:
    return SimpleNamespace(**drawn, C=drawn["H"] * drawn["D"], N=drawn["B"] * drawn["T"])


sizes = st.builds(
    size_of,
    B=st.integers(1, 3),
    T=st.integers(1, 4),
    H=st.integers(1, 3),
    D=st.integers(1, 2),
    V=st.integers(2, 5),
    L=st.integers(1, 2),
    norm_embedding=st.booleans(),
    squared=st.booleans(),
    tied=st.booleans(),
    watch=st.booleans(),
)
SIZE = size_of(
    B=2, T=3, H=2, D=2, V=4, L=2, norm_embedding=True, squared=False, tied=False, watch=False
)


def check(op: Op, dy: Array, wrong: Mapping[str, float] = {}) -> None:
    """Hold each derivative against the change of sum(dy * y) when its number moves by 2 H.

    wrong    factors by which to spoil derivatives first
    """
    inputs, forward, backward = op
    rounding = 1e-9 * (np.abs(dy) * (1 + np.abs(forward()))).sum()  # 1e-16 of a sum, over 2 H
    found = {name: grad * wrong.get(name, 1.0) for name, grad in backward(dy.copy()).items()}
    for name, x in inputs.items():
        expected = np.empty_like(x)
        for place in np.ndindex(x.shape):
            held = x[place]
            x[place] = held + H
            up = (dy * forward()).sum()
            x[place] = held - H
            expected[place] = (up - (dy * forward()).sum()) / (2 * H)
            x[place] = held
        atol = rounding + 1e-7 * np.abs(expected).max()
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=atol, err_msg=name)


@pytest.mark.parametrize("make", OPS)
@given(size=sizes, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_a_backward_pass_is_the_slope_of_its_forward_pass(
    make: Callable[[np.random.Generator, SimpleNamespace], Op], size: SimpleNamespace, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    op = make(rng, size)
    check(op, rng.normal(size=op[1]().shape))


@pytest.mark.parametrize("make", OPS)
@given(seed=st.integers(0, 9))
@settings(max_examples=4, deadline=None)
def test_the_check_objects_to_a_derivative_that_is_off_by_a_thousandth(
    make: Callable[[np.random.Generator, SimpleNamespace], Op], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    op = make(rng, SIZE)
    dy = rng.normal(size=op[1]().shape)
    check(op, dy)
    for name in op[0]:
        with pytest.raises(AssertionError, match=name):
            check(op, dy, wrong={name: 1.001})


def test_every_backward_pass_is_checked() -> None:
    import vectorized.model

    functions = {name for name in vars(vectorized.model) if name.endswith("_backward")}
    assert functions == {f"{make.__name__}_backward" for make in OPS}


def test_softmax_takes_logits_of_any_size() -> None:
    x, ones = np.random.default_rng(1).normal(size=(5, 4)), np.ones(5)
    far = softmax_forward(x + 5000.0, ones, blank(5, 4))
    np.testing.assert_allclose(far, softmax_forward(x, ones, blank(5, 4)), rtol=1e-11)


@given(size=sizes, seed=st.integers(0, 2**32 - 1), data=st.data())
@settings(deadline=None)
def test_a_token_changes_no_logits_before_it_and_none_of_other_documents(
    size: SimpleNamespace, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    gpt, tokens = model(rng, size), rng.integers(size.V, size=(size.B, size.T))
    b, t = data.draw(st.integers(0, size.B - 1)), data.draw(st.integers(0, size.T - 1))
    before = gpt_forward(places(tokens * tokens.size), gpt.params, None, gpt.config, gpt.tap).copy()
    tokens[b, t] = (tokens[b, t] + 1) % size.V
    after = gpt_forward(places(tokens * tokens.size), gpt.params, None, gpt.config, gpt.tap)
    unmoved = np.ones((size.B, size.T), bool)
    unmoved[b, t:] = False
    columns = unmoved.reshape(-1)
    np.testing.assert_allclose(after[:, columns], before[:, columns], rtol=1e-15, atol=1e-15)
    assert (after[:, ~columns] != before[:, ~columns]).any()


def small_config(**fields: Any) -> Config:
    return replace(load_config(), n_embd=4, n_head=2, block_size=5, init_std=0.5, **fields)


DOCS = [[3, 0, 1, 3], [3, 2, 3], [3, 1, 1, 0, 2, 3]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fields", [{}, {"weight_decay": 0.3}, {"grad_clip": 2.0}], ids=str)
@pytest.mark.parametrize("updates", [0, 1000])
def test_adam_is_the_algorithm_of_the_textbook(
    name: str, fields: dict[str, float], updates: int
) -> None:
    config = small_config(**fields)
    init = init_params(config, 4, Random(1))
    backend = load_backend(name, config, replace(fresh_state(init), updates=updates))
    rng = Random(2)
    expected = {p: [[(x, 0.0, 0.0) for x in row] for row in init[p]] for p in init}
    for t in range(1, 6):
        # from 0 to sizes beside which epsilon is small; too short to be clipped in the last step
        sizes = [0, 1e-9, 1e-3, 1] if t < 5 else [1e-3]
        grads = {
            p: [[rng.choice(sizes) * rng.gauss(0, 1) for _ in row] for row in init[p]] for p in init
        }
        alpha = 0.01 / t
        backend.set_grads(grads)
        backend.update(alpha)
        norm = math.sqrt(sum(g * g for rows in grads.values() for row in rows for g in row))
        assert (norm > 2.0) == (t < 5)
        factor = config.grad_clip / norm if 0 < config.grad_clip < norm else 1.0
        expected = {
            p: [
                [
                    textbook_adam(*number, factor * g, updates + t, alpha, config)
                    for number, g in zip(*rows)
                ]
                for rows in zip(expected[p], grads[p])
            ]
            for p in init
        }
    state = backend.state()
    for i, tensors in enumerate((state.params, state.m, state.v)):
        for p, rows in expected.items():
            numbers = [[number[i] for number in row] for row in rows]
            np.testing.assert_allclose(tensors[p], numbers, rtol=1e-12, atol=1e-18, err_msg=p)


def textbook_adam(
    theta: float, m: float, v: float, g: float, t: int, alpha: float, config: Config
) -> tuple[float, float, float]:
    """Kingma and Ba (2015), algorithm 1, with the decay of Loshchilov and Hutter (2019)."""
    m = config.beta1 * m + (1 - config.beta1) * g
    v = config.beta2 * v + (1 - config.beta2) * g * g
    m_hat = m / (1 - config.beta1**t)
    v_hat = v / (1 - config.beta2**t)
    step = m_hat / (math.sqrt(v_hat) + config.adam_eps)
    return theta - alpha * (step + config.weight_decay * theta), m, v


@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_array_has_the_precision_of_the_configuration(dtype: str, watch: bool) -> None:
    config = small_config(dtype=dtype, n_layer=2)
    init = init_params(config, 4, Random(1))
    backend = load_backend("vectorized", config, fresh_state(init), watch)
    for _ in range(2):
        backend.forward(DOCS)
        backend.backward()
        backend.update(0.01)
    state = backend.state()
    arrays = list(floats([backend, state, backend.grads(), backend.taps()]))
    assert len(arrays) > 50
    assert {array.dtype.name for array in arrays} == {dtype}


def test_single_precision_finds_the_same_loss_in_fewer_digits() -> None:
    init = init_params(small_config(), 4, Random(1))
    single, double = (
        load_backend("vectorized", small_config(dtype=dtype), fresh_state(init)).forward(DOCS)
        for dtype in ("float32", "float64")
    )
    assert single == pytest.approx(double, rel=1e-5)
    assert single != double


def test_nothing_that_is_looked_at_between_forward_and_backward_changes_the_gradients() -> None:
    config = small_config()
    backend = load_backend("vectorized", config, fresh_state(init_params(config, 4, Random(1))))
    backend.forward(DOCS)
    backend.backward()
    undisturbed = {name: grad.copy() for name, grad in backend.grads().items()}
    backend.forward(DOCS)
    backend.position_losses([doc[::-1] for doc in DOCS])
    backend.backward()
    for name, grad in backend.grads().items():
        np.testing.assert_array_equal(grad, undisturbed[name])


def test_the_pieces_of_a_batch_share_the_place_of_their_derivatives() -> None:
    workspace = Workspace(small_config(), 4, np.dtype("float64"), watch=False)
    workspace.arrays([Shape(300, 4)])
    one = workspace.wanted
    pairs = workspace.arrays([Shape(300, 4)] * 3)
    two = workspace._lay_out([Shape(300, 4)] * 2)
    taps = 2 * two[0][0].emb.size  # at least, for two more pieces
    assert one + taps < workspace.wanted < 3 * one
    assert len({dtap.logits.ctypes.data for _, dtap in pairs}) == 1
    assert len({tap.logits.ctypes.data for tap, _ in pairs}) == 3


def test_a_batch_lies_where_the_one_before_it_lay() -> None:
    workspace = Workspace(small_config(), 4, np.dtype("float64"), watch=False)
    ((before, _),) = workspace.arrays([Shape(300, 4)])
    block = workspace.block
    ((after, _),) = workspace.arrays([Shape(290, 4)])
    assert workspace.block is block
    assert np.shares_memory(before.emb, after.emb)


def test_layouts_are_remembered_as_long_as_there_are_few_and_the_block_is_the_same() -> None:
    workspace = Workspace(small_config(), 4, np.dtype("float64"), watch=False)
    shapes = [Shape(rows, 16) for rows in range(Workspace.LAYOUTS, 0, -1)]
    laid = [workspace.arrays([shape]) for shape in shapes]
    assert all(workspace.arrays([shape])[0] is known for shape, (known,) in zip(shapes, laid))
    workspace.arrays([Shape(1, 15), Shape(1, 16)])  # in two pieces
    assert list(workspace.layouts) == shapes
    block = workspace.block
    workspace.arrays([Shape(2, 15)])
    assert list(workspace.layouts) == [Shape(2, 15)]
    workspace.arrays([Shape(99, 16)])
    assert workspace.block is not block
    assert list(workspace.layouts) == [Shape(99, 16)]


def test_the_block_is_gone_before_there_is_a_larger_one() -> None:
    config = small_config()
    backend = load_backend("vectorized", config, fresh_state(init_params(config, 4, Random(1))))
    workspace = backend.worker.workspace
    backend.forward(DOCS)
    asked = []
    before = weakref.ref(workspace.block)

    def new(*shape: int) -> Array:
        if shape == (workspace.wanted * 5 // 4,):
            asked.append(before())
        return np.empty(shape)

    with patch.object(workspace, "new", new):
        backend.forward(DOCS * 9)
    assert asked == [None]


# what training takes beyond what the process took before, in bytes
TAKEN = """
import sys
from random import Random
import numpy as np
import vectorized.backend
from microgpt.backend import fresh_state, load_backend
from microgpt.config import load_config
from microgpt.init import init_params

def memory(which):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(which))

config = load_config(overrides=dict(pair.split("=") for pair in sys.argv[1:]))
np.ones((64, 64), config.dtype).dot(np.ones((64, 1024), config.dtype))  # BLAS takes its own
before = memory("VmRSS")
backend = load_backend("vectorized", config, fresh_state(init_params(config, 27, Random(1))))
for longest in (config.block_size, 2, 7, 9, config.block_size):
    backend.forward([[1] * (longest + 1 - i % 2) for i in range(config.batch_size)])
    backend.backward()
    backend.update(1e-4)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only there does a process know what it took")
@pytest.mark.parametrize(
    "sizes",
    [
        {"n_embd": "384", "n_layer": "2", "dtype": "float32"},
        {"n_embd": "64", "n_layer": "3", "batch_size": "256"},
        {"n_embd": "64", "n_layer": "2", "block_size": "64", "batch_size": "32"},
    ],
)
def test_memory_is_within_one_and_a_half_times_what_training_needs(sizes: dict[str, str]) -> None:
    config = load_config(overrides=sizes)
    C, H, N = config.n_embd, config.n_head, config.batch_size * config.block_size
    V = 27
    params = sum(n_out * n_in for n_out, n_in in param_shapes(config, V).values())
    # of each block the three inputs of its norms and products, q, k, v, the attention weights, and
    # the activation and its slope
    block = 5 * C + 3 * C + H * config.block_size + 2 * 4 * C
    needed = 4 * params + N * (config.n_layer * block + 2 * C + V)  # moments and gradients, too
    run = subprocess.run(
        [sys.executable, "-c", TAKEN, *(f"{name}={value}" for name, value in sizes.items())],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert int(run.stdout) < 1.5 * needed * np.dtype(config.dtype).itemsize


@pytest.mark.parametrize("N", [1, 10_000])
def test_sums_have_the_weight_that_is_asked_for(N: int) -> None:
    weights = summing(3, N, 1 / 3, np.dtype("float64"))
    assert weights.shape == ((3, 3) if N == 1 else (3,))
    assert set(weights.reshape(-1).tolist()) == {1 / 3}
