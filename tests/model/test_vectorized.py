"""Every hand-written backward pass against finite differences; memory and precision of arrays."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from crosscheck.cases import load_case
from microgpt.backend import BACKENDS, Backend, fresh_state, load_backend
from microgpt.config import Config
from microgpt.init import init_params
from microgpt.layout import Tree, grow, param_shapes, pick
from microgpt.settings import load_config
from microgpt.taps import ACTIVATIONS
from microgpt.tokenizer import build_tokenizer
from vectorized.batch import micro_batches, pad
from vectorized.flat import flatten, named_views
from vectorized.model import (
    Array,
    activation_backward,
    activation_forward,
    attention_backward,
    attention_forward,
    causal_mask,
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
from vectorized.sample import sample_many

H = 1e-6  # the step of the finite differences
KINK = 1e-4  # ReLU inputs stay farther than this from 0, the kink

# An operation, ready to be checked: its inputs by name, forward() -> y, and backward(dy) -> the
# derivative of sum(dy * y) with respect to each input. forward reads the inputs as they stand.
Grads = dict[str, Array]
Op = tuple[Grads, Callable[[], Array], Callable[[Array], Grads]]


def linear(rng: np.random.Generator, size: SimpleNamespace) -> Op:
    x, w = rng.normal(size=(size.B, size.T, size.C)), rng.normal(size=(size.V, size.C))

    def backward(dy: Array) -> Grads:
        dx, dw = linear_backward(dy, x, w)
        return {"x": dx, "w": dw}

    return {"x": x, "w": w}, lambda: linear_forward(x, w), backward


def softmax(rng: np.random.Generator, size: SimpleNamespace) -> Op:
    x = rng.normal(size=(size.B, size.H, size.T, size.V))
    return (
        {"x": x},
        lambda: softmax_forward(x),
        lambda dy: {"x": softmax_backward(dy, softmax_forward(x))},
    )


def rmsnorm(rng: np.random.Generator, size: SimpleNamespace) -> Op:
    x, eps = rng.normal(size=(size.B, size.T, size.C)), 0.1
    return (
        {"x": x},
        lambda: rmsnorm_forward(x, eps)[0],
        lambda dy: {"x": rmsnorm_backward(dy, *rmsnorm_forward(x, eps))},
    )


def activation(rng: np.random.Generator, size: SimpleNamespace) -> Op:
    shape = (size.B, size.T, size.C)
    x = rng.choice([-1, 1], shape) * rng.uniform(0.1, 2, shape)
    return (
        {"x": x},
        lambda: activation_forward(x, size.activation),
        lambda dy: {"x": activation_backward(dy, x, size.activation)},
    )


def attention(rng: np.random.Generator, size: SimpleNamespace) -> Op:
    gpt, x = model(rng, size), rng.normal(size=(size.B, size.T, size.C))
    w, tap, mask = gpt.params.layers[0], Tree(), causal_mask(size.T, x.dtype)

    def forward() -> Array:
        return attention_forward(x, w, None, mask, gpt.config, tap)

    def backward(dy: Array) -> Grads:
        forward()
        dx = attention_backward(dy, w, gpt.dparams.layers[0], gpt.config, tap, Tree())
        return {"x": dx, **gpt.grads("layer0.attn")}

    return {"x": x, **starting_with("layer0.attn", gpt.named)}, forward, backward


def mlp(rng: np.random.Generator, size: SimpleNamespace) -> Op:
    gpt, x = model(rng, size), rng.normal(size=(size.B, size.T, size.C))
    w, tap = gpt.params.layers[0], Tree()

    def forward() -> Array:
        return mlp_forward(x, w, gpt.config, tap)

    def backward(dy: Array) -> Grads:
        forward()
        dx = mlp_backward(dy, w, gpt.dparams.layers[0], gpt.config, tap, Tree())
        return {"x": dx, **gpt.grads("layer0.mlp")}

    forward()
    assume(no_kink([tap]))
    return {"x": x, **starting_with("layer0.mlp", gpt.named)}, forward, backward


def gpt(rng: np.random.Generator, size: SimpleNamespace) -> Op:
    gpt, start = model(rng, size), rng.integers(size.start + 1, size=(size.B, 1))
    positions = start + np.arange(size.T)
    tokens, mask = rng.integers(size.V, size=(size.B, size.T)), causal_mask(size.T, gpt.dtype)
    caches = [None] * size.L

    def forward() -> Array:
        return gpt_forward(tokens, positions, gpt.params, caches, mask, gpt.config, gpt.tap)

    def backward(dy: Array) -> Grads:
        forward()
        dtap = Tree(size.L)
        gpt_backward(dy, tokens, positions, gpt.params, gpt.dparams, gpt.config, gpt.tap, dtap)
        return gpt.grads()

    forward()
    assume(no_kink(gpt.tap.layers))
    return gpt.named, forward, backward


def cross_entropy(rng: np.random.Generator, size: SimpleNamespace) -> Op:
    logits = rng.normal(size=(size.B, size.T, size.V))
    targets = rng.integers(size.V, size=(size.B, size.T))

    def backward(dy: Array) -> Grads:
        _, probs = cross_entropy_forward(logits, targets)
        return {"logits": cross_entropy_backward(dy, probs, targets)}

    return {"logits": logits}, lambda: cross_entropy_forward(logits, targets)[0], backward


def loss(rng: np.random.Generator, size: SimpleNamespace) -> Op:
    gpt = model(rng, size)
    lengths = [size.T, *rng.integers(1, size.T + 1, size=size.B - 1)]  # mostly ragged
    batch = pad([rng.integers(size.V, size=n + 1).tolist() for n in lengths], gpt.dtype)

    def forward() -> Array:
        return loss_forward(batch, gpt.params, gpt.config, gpt.tap)

    def backward(dy: Array) -> Grads:
        forward()
        loss_backward(batch, gpt.params, gpt.dparams, gpt.config, gpt.tap, Tree(size.L))
        return {name: dy * grad for name, grad in gpt.grads().items()}

    forward()
    assume(no_kink(gpt.tap.layers))
    return gpt.named, forward, backward


OPS = [linear, softmax, rmsnorm, activation, attention, mlp, gpt, cross_entropy, loss]


def model(rng: np.random.Generator, size: SimpleNamespace) -> SimpleNamespace:
    """A GPT of that size: its parameters by name and as a tree, and trees for everything else."""
    config = replace(
        load_config(),
        n_layer=size.L,
        n_embd=size.C,
        n_head=size.H,
        block_size=size.T + 1,
        norm_embedding=size.norm_embedding,
        activation=size.activation,
        tie_lm_head=size.tied,
        norm_eps=0.1,  # so large that an omission shows
    )
    shapes = param_shapes(config, size.V)
    named = {name: rng.normal(size=shape) * 0.7 for name, shape in shapes.items()}
    dparams = Tree(size.L)
    return SimpleNamespace(
        config=config,
        dtype=np.dtype("float64"),
        named=named,
        params=grow(named, size.L),
        tap=Tree(size.L),
        dparams=dparams,
        grads=lambda prefix="": {
            name: pick(dparams, name) for name in starting_with(prefix, shapes)
        },
    )


def no_kink(layers: Sequence[Tree]) -> bool:
    """Whether no input of a ReLU is so close to 0 that a finite difference would step over it."""
    return all(np.abs(tap.mlp_pre).min() > KINK for tap in layers)


def starting_with(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in named.items() if name.startswith(prefix)}


def size_of(**drawn: Any) -> SimpleNamespace:
    return SimpleNamespace(**drawn, C=drawn["H"] * drawn["D"])


sizes = st.builds(
    size_of,
    B=st.integers(1, 3),
    T=st.integers(1, 4),
    H=st.integers(1, 3),
    D=st.integers(1, 2),
    V=st.integers(2, 5),
    L=st.integers(1, 2),
    start=st.integers(0, 1),
    norm_embedding=st.booleans(),
    activation=st.sampled_from([*ACTIVATIONS]),
    tied=st.booleans(),
)
SWITCHES = {"start": 0, "norm_embedding": True, "activation": "relu", "tied": False}
SIZE = size_of(B=2, T=3, H=2, D=2, V=4, L=2, **SWITCHES)
ALL_DIFFERENT = size_of(B=4, T=5, H=2, D=3, V=7, L=1, **SWITCHES)  # C = 6, F = 24


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
@example(size=ALL_DIFFERENT, seed=1)
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
    x = np.random.default_rng(1).normal(size=(5, 4))
    np.testing.assert_allclose(softmax_forward(x + 5000.0), softmax_forward(x), rtol=1e-11)


@given(size=sizes, seed=st.integers(0, 2**32 - 1), data=st.data())
@settings(deadline=None)
def test_a_token_changes_no_logits_before_it_and_none_of_other_documents(
    size: SimpleNamespace, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    gpt, tokens = model(rng, size), rng.integers(size.V, size=(size.B, size.T))
    mask, caches = causal_mask(size.T, gpt.dtype), [None] * size.L
    positions = np.arange(size.T)[None]

    def logits() -> Array:
        return gpt_forward(tokens, positions, gpt.params, caches, mask, gpt.config, Tree(size.L))

    b, t = data.draw(st.integers(0, size.B - 1)), data.draw(st.integers(0, size.T - 1))
    before = logits()
    tokens[b, t] = (tokens[b, t] + 1) % size.V
    after = logits()
    unmoved = np.ones((size.B, size.T), bool)
    unmoved[b, t:] = False
    np.testing.assert_allclose(after[unmoved], before[unmoved], rtol=1e-15, atol=1e-15)
    assert (after[~unmoved] != before[~unmoved]).any()


def small_config(**fields: Any) -> Config:
    return replace(load_config(), n_embd=4, n_head=2, block_size=5, init_std=0.5, **fields)


# every way to compute: scalar, vectorized from a recording, and vectorized without one
WAYS = [
    (name, watch) for name in BACKENDS for watch in (False, True) if name != "scalar" or not watch
]
DOCS = [[3, 0, 1, 3], [3, 2, 3], [3, 1, 1, 0, 2, 3]]


@pytest.mark.parametrize(("name", "watch"), WAYS)
@pytest.mark.parametrize("fields", [{}, {"weight_decay": 0.3}, {"grad_clip": 2.0}], ids=str)
@pytest.mark.parametrize("updates", [0, 1000])
def test_adam_is_the_algorithm_of_the_textbook(
    name: str, watch: bool, fields: dict[str, float], updates: int
) -> None:
    config = small_config(**fields)
    init = init_params(config, 4, Random(1))
    backend = load_backend(name, config, replace(fresh_state(init), updates=updates), watch)
    rng = Random(2)
    expected = {p: [[(x, 0.0, 0.0) for x in row] for row in init[p]] for p in init}
    for t in range(1, 6):
        # from 0 to sizes beside which epsilon is small; in the last step too small to be clipped
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


def drawn(config: Config, watch: bool = False) -> Backend:
    """A model of four tokens."""
    init = init_params(config, 4, Random(1))
    return load_backend("vectorized", config, fresh_state(init), watch)


def floats(node: Any) -> Iterator[Any]:
    """Every array of floating-point numbers that is reachable from an object."""
    if isinstance(node, (np.ndarray, np.generic)):
        if np.issubdtype(node.dtype, np.inexact):
            yield node
    elif isinstance(node, (list, tuple, set)):
        for item in node:
            yield from floats(item)
    elif isinstance(node, dict):
        yield from floats(list(node.values()))
    elif hasattr(node, "__dict__"):
        yield from floats(vars(node))
    elif isinstance(getattr(node, "__self__", None), np.ndarray):  # a method of an array
        yield from floats(node.__self__)


@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_array_has_the_precision_of_the_configuration(dtype: str, watch: bool) -> None:
    backend = drawn(small_config(dtype=dtype, n_layer=2, grad_clip=1.0, weight_decay=0.1), watch)
    for _ in range(2):
        backend.forward(DOCS)
        backend.backward()
        backend.update(0.01)
        backend.position_losses(DOCS)
    seen = [backend, backend.state(), backend.grads(), backend.read(DOCS[0])]
    arrays = list(floats([*seen, backend.taps(), backend.dtaps()] if watch else seen))
    assert len(arrays) > 50
    assert {array.dtype.name for array in arrays} == {dtype}


def test_single_precision_finds_the_same_loss_in_fewer_digits() -> None:
    single, double = (
        drawn(small_config(dtype=dtype)).forward(DOCS) for dtype in ("float32", "float64")
    )
    assert single == pytest.approx(double, rel=1e-5)
    assert single != double


LOOKS: dict[str, Callable[[Backend], object]] = {
    "losses": lambda backend: backend.position_losses([doc[::-1] for doc in DOCS * 2]),
    "read": lambda backend: backend.read([3, 2, 1, 0]),
    "sample": lambda backend: backend.sample(
        build_tokenizer("abc", small_config()), Random(1), 3, 1.0, [0]
    ),
    "state": lambda backend: (backend.state(), backend.grads()),
    "taps": lambda backend: backend.taps(),
}


@pytest.mark.parametrize(
    ("look", "watch"),
    [(look, watch) for look in LOOKS for watch in (False, True) if look != "taps" or watch],
)
def test_nothing_that_is_looked_at_between_forward_and_backward_changes_the_gradients(
    look: str, watch: bool
) -> None:
    backend = drawn(small_config(), watch)
    backend.forward(DOCS)
    backend.backward()
    undisturbed = {name: grad.copy() for name, grad in backend.grads().items()}
    backend.set_grads({name: grad * np.nan for name, grad in undisturbed.items()})
    backend.forward(DOCS)
    LOOKS[look](backend)
    backend.backward()
    for name, grad in backend.grads().items():
        np.testing.assert_array_equal(grad, undisturbed[name])


# the bytes that training takes beyond those that the process had before
TAKEN = """
import sys
from random import Random
import numpy as np
import vectorized.backend
from microgpt.backend import fresh_state, load_backend
from microgpt.settings import load_config
from microgpt.init import init_params

def memory(which):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(which))

lengths, *fields = sys.argv[1:]
config = load_config(overrides=dict(pair.split("=") for pair in fields))
np.ones((64, 64), config.dtype).dot(np.ones((64, 1024), config.dtype))  # BLAS takes its own
before = memory("VmRSS")
backend = load_backend("vectorized", config, fresh_state(init_params(config, 27, Random(1))))
for longest in map(int, lengths.split()):
    backend.forward([[1] * (longest + 1 - i % 2) for i in range(config.batch_size)])
    backend.backward()
    backend.update(1e-4)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only there does a process know what it took")
@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"n_embd": "384", "n_layer": "2", "dtype": "float32"},
        {"n_embd": "96", "n_layer": "3", "batch_size": "256"},
        {"n_embd": "64", "n_layer": "2", "block_size": "64", "batch_size": "32"},
    ],
)
def test_memory_is_within_one_and_a_half_times_what_training_needs(
    sizes: dict[str, str], growing: bool
) -> None:
    config = load_config(overrides=sizes)
    T, V, C, H = config.block_size, 27, config.n_embd, config.n_head
    batch = micro_batches([[1] * (T + 1 - i % 2) for i in range(config.batch_size)], config)
    N = max(B * T for _, _, (B, T) in batch)  # micro-batches share the same memory
    params = sum(n_out * n_in for n_out, n_in in param_shapes(config, V).values())
    # per block: the three inputs of its norms and products, q, k, v, the attention weights, and
    # the activation and its slope
    block = 5 * C + 3 * C + H * T + 2 * 4 * C
    needed = 4 * params + N * (config.n_layer * block + 2 * C + V)  # moments and gradients, too
    lengths = [2, 7, 9, T // 2, T] if growing else [T, 2, 7, 9, T]
    fields = [f"{name}={value}" for name, value in sizes.items()]
    command = [sys.executable, "-c", TAKEN, " ".join(map(str, lengths)), *fields]
    # huge pages round what is touched up to 2 MB, by where an array happens to begin
    plain = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"}
    taken = int(subprocess.check_output(command, encoding="utf-8", env=plain))
    assert taken < 1.5 * needed * np.dtype(config.dtype).itemsize


@pytest.mark.parametrize(
    "form",
    [
        lambda x, w: np.einsum("bti,oi->bto", x, w),
        lambda x, w: np.matmul(x, w.T),
        lambda x, w: (w @ x.swapaxes(1, 2)).swapaxes(1, 2),
    ],
)
def test_documents_are_drawn_whatever_the_form_of_a_product(
    form: Callable[[Array, Array], Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = load_case("two-layers")
    params = grow({name: np.array(x) for name, x in case.params.items()}, case.config.n_layer)
    given = params, case.config, case.tokenizer
    drawn = sample_many(*given, Random(3), 5, 1.0, [])
    monkeypatch.setattr("vectorized.model.linear_forward", form)
    assert sample_many(*given, Random(3), 5, 1.0, []) == drawn


@pytest.mark.parametrize("preset", ["microgpt", "microgpt-243"])
def test_documents_of_a_large_vocabulary_are_drawn_together_as_one_by_one(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(load_config(preset), n_embd=4, block_size=5)
    tokenizer = build_tokenizer("".join(map(chr, range(256, 656))), config)
    params = init_params(config, tokenizer.vocab_size, Random(1))
    backend = load_backend("vectorized", config, fresh_state(params))
    together = backend.sample(tokenizer, Random(2), 6, 1.0, [])
    monkeypatch.setattr("vectorized.backend.most_walkers", lambda config: 1)
    assert backend.sample(tokenizer, Random(2), 6, 1.0, []) == together
    assert max(token for document in together for token in document) > 255  # more than a byte


def test_matrices_and_vectors_lie_side_by_side_in_one_buffer() -> None:
    tensors = {"w": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], "gain": [7.0, 8.0], "v": [[9.0]]}
    flat = flatten(tensors, np.dtype("float32"))
    assert flat.tolist() == list(range(1, 10))
    views = named_views(flat, {name: np.shape(tensor) for name, tensor in tensors.items()})
    assert {name: view.tolist() for name, view in views.items()} == tensors
    views["gain"][1] = 0.0
    assert flat[7] == 0.0


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_tensors_are_known_by_name_and_index_whatever_lies_where(backend_name: str) -> None:
    case = load_case("one-head")
    start = fresh_state(case.params)

    def turned(tensors: Mapping[str, Any]) -> dict[str, Array]:
        """The same tensors in the opposite order, each column by column in memory."""
        return {name: np.asfortranarray(tensors[name]) for name in reversed(list(tensors))}

    def updated(change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Array]:
        params = {name: change({name: x})[name] for name, x in start.params.items()}
        state = replace(start, params=params, m=change(start.m), v=change(start.v))
        backend = load_backend(backend_name, case.config, state)
        backend.forward(case.docs(0))
        backend.backward()
        backend.set_grads(change({name: np.array(x) for name, x in backend.grads().items()}))
        backend.update(0.01)
        after = backend.state().params
        return {name: np.array(after[name]) for name in start.params}

    plain, other = updated(dict), updated(turned)
    for name in plain:
        np.testing.assert_array_equal(other[name], plain[name], err_msg=name)
