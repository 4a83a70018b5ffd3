"""Functions of one's own: what is right passes, what is wrong is found, and what is said of it."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from crosscheck import alone as judging
from crosscheck import check as checking
from crosscheck import placed
from crosscheck.__main__ import main
from crosscheck.alone import alone
from crosscheck.candidate import (
    RESULTS,
    TEXTS,
    Told,
    in_place,
    load_candidate,
    text_functions,
)
from crosscheck.check import CANNOT, INCOMPLETE, RIGHT, WRONG, Verdict, check
from crosscheck.defects import load_defects
from crosscheck.functions import inputs
from microgpt.errors import MicrogptError
from microgpt.settings import FIXTURES

NORM = """\
def rmsnorm_backward(dy, y, scale):
    dx = scale * (dy - y * (dy * y).mean(-1, keepdims=True))
    return dx
"""
ATTENTION = """\
import numpy as np


def attention_backward(dattn_res, w, dw, config, tap, dtap):
    B, T, C = dattn_res.shape
    q, k, v, dout = (
        x.reshape(B, T, config.n_head, -1)
        for x in (tap.q, tap.k, tap.v, dattn_res @ w.attn_wo)
    )
    p = tap.attn_weights
    dw.attn_wo = np.einsum("bto,bti->oi", dattn_res, tap.attn_out)
    dp = np.einsum("bthd,buhd->bhtu", dout, v)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / config.head_dim**0.5
    dq = np.einsum("bhtu,buhd->bthd", ds, k).reshape(B, T, C)
    dk = np.einsum("bhtu,bthd->buhd", ds, q).reshape(B, T, C)
    dv = np.einsum("bhtu,bthd->buhd", p, dout).reshape(B, T, C)
    n, s = tap.attn_norm, tap.attn_scale
    dw.attn_wq, dw.attn_wk, dw.attn_wv = (np.einsum("bto,bti->oi", d, n) for d in (dq, dk, dv))
    dn = dq @ w.attn_wq + dk @ w.attn_wk + dv @ w.attn_wv
    return s * (dn - n * (dn * n).mean(-1, keepdims=True)) + dattn_res
"""
WHOLE = """\
import numpy as np


def norm(x, eps):
    s = ((x * x).mean(-1, keepdims=True) + eps) ** -0.5
    return x * s, s


def dnorm(dy, y, s):
    return s * (dy - y * (dy * y).mean(-1, keepdims=True))


def activated(x, kind):
    if kind == "gelu":
        t = np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))
        slope = 0.5 * x * (1 - t * t) * (2 / np.pi) ** 0.5 * (1 + 0.134145 * x**2)
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + slope
    r = np.maximum(x, 0)
    return (r * r, 2 * r) if kind == "squared_relu" else (r, (x > 0) * 1.0)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def loss_and_grads(params, docs, config):
    grads = {k: np.zeros_like(p) for k, p in params.items()}
    losses = [one(params, doc, config, grads, 1 / len(docs)) for doc in docs]
    return sum(losses), grads


def one(P, doc, c, G, share):
    x, y = np.array(doc[:-1]), np.array(doc[1:])
    T, H, D = len(x), c.n_head, c.head_dim
    h = P["wte"][x] + P["wpe"][:T]
    if c.norm_embedding:
        h, es = norm(h, c.norm_eps)
        en = h
    kept = []
    for i in range(c.n_layer):
        w = {k.partition(".")[2]: p for k, p in P.items() if k.startswith(f"layer{i}.")}
        n1, s1 = norm(h, c.norm_eps)
        q, k, v = ((n1 @ w[n].T).reshape(T, H, D) for n in ("attn_wq", "attn_wk", "attn_wv"))
        a = softmax(np.einsum("thd,uhd->htu", q, k) / D**0.5 + np.triu(np.full((T, T), -np.inf), 1))
        o = np.einsum("htu,uhd->thd", a, v).reshape(T, -1)
        h = h + o @ w["attn_wo"].T
        n2, s2 = norm(h, c.norm_eps)
        act, slope = activated(n2 @ w["mlp_fc1"].T, c.activation)
        h = h + act @ w["mlp_fc2"].T
        kept.append((w, n1, s1, q, k, v, a, o, n2, s2, act, slope))
    head = "wte" if c.tie_lm_head else "lm_head"
    p = softmax(h @ P[head].T)
    loss = -np.log(p[np.arange(T), y]).mean()
    d = p.copy()
    d[np.arange(T), y] -= 1
    d *= share / T
    G[head] += d.T @ h
    d = d @ P[head]
    for i in reversed(range(c.n_layer)):
        w, n1, s1, q, k, v, a, o, n2, s2, act, slope = kept[i]
        g = {}
        g["mlp_fc2"] = d.T @ act
        dpre = d @ w["mlp_fc2"] * slope
        g["mlp_fc1"] = dpre.T @ n2
        d = d + dnorm(dpre @ w["mlp_fc1"], n2, s2)
        g["attn_wo"] = d.T @ o
        do = (d @ w["attn_wo"]).reshape(T, H, D)
        da = np.einsum("thd,uhd->htu", do, v)
        ds = a * (da - (da * a).sum(-1, keepdims=True)) / D**0.5
        dq = np.einsum("htu,uhd->thd", ds, k).reshape(T, -1)
        dk = np.einsum("htu,thd->uhd", ds, q).reshape(T, -1)
        dv = np.einsum("htu,thd->uhd", a, do).reshape(T, -1)
        g |= {"attn_wq": dq.T @ n1, "attn_wk": dk.T @ n1, "attn_wv": dv.T @ n1}
        dn = dq @ w["attn_wq"] + dk @ w["attn_wk"] + dv @ w["attn_wv"]
        d = d + dnorm(dn, n1, s1)
        for name, gradient in g.items():
            G[f"layer{i}.{name}"] += gradient
    if c.norm_embedding:
        d = dnorm(d, en, es)
    np.add.at(G["wte"], x, d)
    G["wpe"][:T] += d
    return loss * share
"""
BACKEND = (
    WHOLE
    + """

class Backend:
    def __init__(self, config, state, watch=False):
        self.config, self.params, self.t = config, state.params, 0
        self.m = {k: 0 for k in self.params}
        self.v = {k: 0 for k in self.params}

    def forward(self, docs):
        self.loss, self.g = loss_and_grads(self.params, docs, self.config)
        return self.loss

    def backward(self):
        pass

    def grads(self):
        return self.g

    def state(self):
        return self

    def update(self, lr):
        c = self.config
        length = sum((g * g).sum() for g in self.g.values()) ** 0.5
        clip = min(1, c.grad_clip / length) if c.grad_clip else 1
        self.t += 1
        for k, p in self.params.items():
            g = clip * self.g[k]
            self.m[k] = c.beta1 * self.m[k] + (1 - c.beta1) * g
            self.v[k] = c.beta2 * self.v[k] + (1 - c.beta2) * g * g
            m, v = self.m[k] / (1 - c.beta1**self.t), self.v[k] / (1 - c.beta2**self.t)
            p *= 1 - lr * c.weight_decay
            p -= lr * m / (v**0.5 + c.adam_eps)
"""
)
VALUE = """\
import math


class Value:
    def __init__(self, data, parents=(), slopes=()):
        self.data, self.grad, self.parents, self.slopes = data, 0.0, parents, slopes

    def __add__(self, o):
        o = o if isinstance(o, Value) else Value(o)
        return Value(self.data + o.data, (self, o), (1.0, 1.0))

    def __mul__(self, o):
        o = o if isinstance(o, Value) else Value(o)
        return Value(self.data * o.data, (self, o), (o.data, self.data))

    def __pow__(self, n):
        return Value(self.data**n, (self,), (n * self.data ** (n - 1),))

    def log(self):
        return Value(math.log(self.data), (self,), (1 / self.data,))

    def exp(self):
        return Value(math.exp(self.data), (self,), (math.exp(self.data),))

    def relu(self):
        return Value(max(0.0, self.data), (self,), (float(self.data > 0),))

    def __neg__(self):
        return self * -1

    def __sub__(self, o):
        return self + (-o)

    def __truediv__(self, o):
        return self * o**-1

    __radd__, __rmul__ = __add__, __mul__

    def backward(self):
        order, seen = [], set()

        def visit(v):
            if v not in seen:
                seen.add(v)
                for p in v.parents:
                    visit(p)
                order.append(v)

        visit(self)
        self.grad = 1.0
        for v in reversed(order):
            for p, slope in zip(v.parents, v.slopes):
                p.grad += slope * v.grad
"""
SCALAR = """\
def softmax(x):
    m = max(v.data for v in x)
    e = [(v - m).exp() for v in x]
    s = e[0]
    for v in e[1:]:
        s = s + v
    return [v / s for v in e]
"""
LISTS = """\
def rmsnorm_backward(dy, y, scale):
    if len(dy.shape) == 1:
        mean = sum(a * b for a, b in zip(dy, y)) / len(y)
        return [scale[0] * (a - b * mean) for a, b in zip(dy.tolist(), y.tolist())]
    return [rmsnorm_backward(a, b, c) for a, b, c in zip(dy, y, scale)]
"""

Check = Callable[..., Verdict]


@pytest.fixture
def checked(tmp_path: Path) -> Check:
    """The verdict on a text as mine.py."""

    def judge(source: str, hint: int = 0, **settings: float) -> Verdict:
        path = tmp_path / "mine.py"
        path.write_text(source, encoding="utf-8")
        return check(path, hint, **settings)

    return judge


@pytest.mark.parametrize(
    ("source", "status"),
    [
        (NORM, INCOMPLETE),
        (LISTS, INCOMPLETE),
        (ATTENTION, INCOMPLETE),
        (WHOLE, RIGHT),
        (BACKEND, RIGHT),
        (VALUE, INCOMPLETE),
        (SCALAR, INCOMPLETE),
    ],
    ids=["norm", "lists", "attention", "whole", "backend", "value", "scalar"],
)
def test_what_is_right_passes(source: str, status: int, checked: Check) -> None:
    verdict = checked(source)
    assert verdict.status == status, str(verdict)
    assert "right" in verdict.functions.values()


SOFTMAX = """\
def softmax_backward(dy, y):
    return y * dy - y * (y * dy).sum(-1, keepdims=True)
"""
WITH_DTAP = ATTENTION.replace(
    "    n, s = tap",
    "    dtap.q, dtap.k, dtap.v, dtap.attn_weights = dq, dk, dv, dp\n    n, s = tap",
)


@pytest.mark.parametrize("source", [SOFTMAX, WITH_DTAP], ids=["softmax", "attention"])
@pytest.mark.parametrize("seed", range(4))
def test_rounding_where_terms_cancel_is_not_wrong(seed: int, source: str, checked: Check) -> None:
    verdict = checked(f"# {seed}\n{source}")  # another text gets other numbers
    assert verdict.status == INCOMPLETE, str(verdict)


def test_what_is_zero_by_structure_and_what_is_small_gets_no_allowance(checked: Check) -> None:
    for wrong in ("+ 1e-14 * (y > 0)", "+ 1e-18 * (y == 0)"):
        source = SOFTMAX.replace("keepdims=True)", f"keepdims=True) {wrong}")
        assert checked(source).status == WRONG, wrong


WRONG_NUMBERS = {  # what is exchanged for what, and what must be said
    "only for T = 1": (NORM, "    return", "    dx *= 1 + (dy.shape[1] == 1)\n    return", "T = 1"),
    "only where axes differ": (
        NORM,
        "    return",
        "    dx *= 1 + 1e-7 * (len({*dy.shape}) == 3)\n    return",
        "by itself",
    ),
    "in single precision": (NORM, "return dx", "return dx.astype('float32')", "float32"),
    "a document short": (NORM, "return dx", "return dx[:-1]", "shape (1, 3, 5)"),
    "broadcast": (NORM, "return dx", "return dx + 0.1 * dy[:1]", "rmsnorm_backward gives wrong"),
    "zero": (NORM, "return dx", "return 0 * dx", ", 1 relative"),
    "a hundred-millionth": (NORM, "return dx", "return dx * (1 + 1e-8)", "1e-08 relative"),
    "no keys": (ATTENTION, " + dk @ w.attn_wk", "", "T > 1"),
    "no residual": (ATTENTION, " + dattn_res\n", "\n", "dx"),
    "a gradient missing": (ATTENTION, "    dw.attn_wo = np", "    np", "dw.attn_wo"),
    "the last of three layers": (
        WHOLE,
        "d.T @ act",
        "d.T @ act * (1 + (c.n_layer - 1 == i == 2))",
        "n_layer >= 3",
    ),
    "a token once": (WHOLE, 'np.add.at(G["wte"], x, d)', 'G["wte"][x] += d', "occurs again"),
    "epsilon under the root": (BACKEND, "v**0.5 + c.adam_eps", "(v + c.adam_eps)**0.5", "update"),
    "gradients assigned": (VALUE, "p.grad += slope", "p.grad = slope", "wrong numbers in da"),
    "the sum short": (SCALAR, "e[1:]", "e[2:]", "attn_weights"),
}


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_what_is_wrong_is_found(name: str, checked: Check) -> None:
    source, old, new, words = WRONG_NUMBERS[name]
    assert source.count(old) == 1
    verdict = checked(source.replace(old, new))
    assert verdict.status == WRONG, str(verdict)
    assert words in str(verdict)
    assert "looks like" not in str(verdict)
    assert all(len(line) <= 80 for line in str(verdict).splitlines() if "pytest-" not in line)


BESIDES = {  # what else a function may do, and what must be said
    "writes": (NORM.replace("    dx", "    dy *= 2\n    dx"), ["writes into dy", "mine.py:2 dy *"]),
    "keeps": (
        "kept = {}\n" + NORM.replace("return dx", "kept.setdefault(dx.shape, dx)[:] = dx\n"
                                     "    return kept[dx.shape]"),
        ["returns dx in memory that it writes again"],
    ),
    "nothing": (NORM.replace("    return dx\n", ""), ["returns None; expected dx"]),
    "too much": (NORM.replace("return dx", "return dx, dx"), ["returns a tuple of 2", "mine.py:3"]),
    "raises": (NORM.replace("return dx", "return dy @ y"), ["raises ValueError", "mine.py:3"]),
    "loops": (NORM.replace("return dx", "while True: pass"), ["is not done after", "mine.py:3"]),
    "signature": (NORM.replace(", scale)", ")"), ["takes (dy, y); the text calls it with (dy, y,"]),
    "syntax": ("def rmsnorm_backward(:\n", ["cannot be read", "mine.py:1"]),
    "look-up": (
        "from vectorized.model import rmsnorm_backward as known\n" + NORM,
        ["mine.py imports vectorized's own"],
    ),
    "by way of the module": (
        "import vectorized.model as text\n"
        + NORM.replace("return dx", "return text.rmsnorm_backward(dy, y, scale)"),
        ["calls vectorized's function of that name"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDES)
def test_what_else_a_function_does_is_told_with_its_own_line(name: str, checked: Check) -> None:
    source, words = BESIDES[name]
    verdict = checked(source, time_limit=0.5)
    text = str(verdict)
    assert verdict.status in (WRONG, CANNOT)
    assert all(one in text for one in words), text
    assert "Traceback" not in text
    assert "functions.py" not in text


def test_a_file_with_null_bytes_is_told_without_a_line(checked: Check) -> None:
    text = str(checked(NORM.replace("    dx", "\0   dx")))
    assert "null bytes" in text
    assert "None" not in text


def test_what_is_printed_is_left_out_and_said(
    checked: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = checked(NORM.replace("return dx", "print('hm')\n    return dx"))
    assert verdict.status == INCOMPLETE
    assert "rmsnorm_backward prints; left out here: hm" in str(verdict)
    assert capsys.readouterr().out == ""


def test_the_first_line_says_what_was_found(checked: Check) -> None:
    stub = "\n\ndef softmax_backward(dy, y):\n    raise NotImplementedError\n"
    typo = "\n\ndef linear_backwards(dy, x, w):\n    return dy\n"
    first = checked(NORM + stub + typo).first
    assert "mine.py has rmsnorm_backward" in first
    assert "not attempted: softmax_backward" in first
    assert "unknown: linear_backwards (did you mean linear_backward?)" in first


@pytest.mark.parametrize(
    "name", ["rmsnorm_grad", "rms_norm_backward", "d_rmsnorm", "RMSNormBwd", "rmsnorm_bakward"]
)
def test_a_name_that_means_one_of_the_text_is_understood(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(NORM.replace("rmsnorm_backward", name), encoding="utf-8")
    with pytest.raises(MicrogptError, match=f"{name}: did you mean rmsnorm_backward"):
        check(path)


def test_a_file_of_helpers_is_told_that_they_are_not_checked_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def mean(x):\n    return x\n", encoding="utf-8")
    with pytest.raises(MicrogptError, match=r"has only helpers \(mean\)"):
        check(path)


def test_nothing_is_called_right_where_only_stubs_are(checked: Check) -> None:
    verdict = checked("def rmsnorm_backward(dy, y, scale):\n    raise NotImplementedError\n")
    assert verdict.status == INCOMPLETE
    assert "nothing is written yet" in str(verdict)
    assert "right so far" not in str(verdict)


def test_what_turns_out_to_be_a_stub_does_not_keep_the_rest_from_its_verdict(
    checked: Check,
) -> None:
    undone = "def linear_forward(x, w):\n    x = 2 * x\n    raise NotImplementedError\n\n\n"
    verdict = checked(undone + NORM)
    assert verdict.functions["linear_forward"] == "not attempted"
    assert verdict.functions["rmsnorm_backward"] == "right"
    assert verdict.status == INCOMPLETE


def test_a_function_written_as_a_lambda_counts_as_written(checked: Check) -> None:
    norm = "dy, y, scale: scale * (dy - y * (dy * y).mean(-1, keepdims=True))"
    verdict = checked(f"rmsnorm_backward = lambda {norm}\n")
    assert verdict.functions["rmsnorm_backward"] == "right", str(verdict)


def test_a_function_that_was_never_called_is_an_error(
    checked: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placed, "PANEL", {})
    monkeypatch.setattr(checking, "inputs", lambda names, seed: {name: [] for name in names})
    verdict = checked(NORM)
    assert verdict.status == WRONG
    assert "was never called" in str(verdict)


def test_hints_tell_more_each_time(checked: Check) -> None:
    wrong = NORM.replace("dy - y * (dy * y).mean(-1, keepdims=True)", "dy")
    none, one, two = (str(checked(wrong, hint)) for hint in range(3))
    words = "the second term of the norm's derivative is missing"
    assert words not in none
    assert words in one
    assert "equation" not in one
    assert "equation" in two
    assert none.endswith("mine.py --hint")
    assert one.endswith("mine.py --hint --hint")
    assert two.endswith("mine.py")


def test_the_readme_shows_what_is_said(checked: Check) -> None:
    readme = (FIXTURES.parent / "README.md").read_text(encoding="utf-8")
    source = readme.partition("```python\n")[2].partition("```")[0]
    said = str(checked(source, 1)).partition("\n\n(")[0]
    assert said in readme, said


def test_the_hint_names_what_was_computed_instead(checked: Check) -> None:
    verdict = checked(ATTENTION.replace(" + dk @ w.attn_wk", ""), 1)
    assert "goes on without the contribution of layer0.k" in str(verdict)


def test_the_equation_is_that_of_the_element_that_is_shown(checked: Check) -> None:
    text = str(checked(NORM.replace("return dx", "return -dx"), 2))
    at = text.partition("dx[")[2].partition("]")[0]
    row = at.rpartition(", ")[0]
    assert f"dy[{row}] = " in text
    assert f"scale[{row}] = " in text
    key = str(checked(ATTENTION.replace("for d in (dq, dk, dv)", "for d in (dq, dq, dv)"), 2))
    shown = float(key.partition("should be")[2].split()[0])
    assert f"= {shown:.6g}" in " ".join(key.partition("equation")[2].split())


def test_a_cause_explains_every_input_that_was_looked_at(checked: Check) -> None:
    """With two positions in each document and D = 4, sqrt(D) looks like n."""
    verdict = checked(WHOLE.replace("/ D**0.5\n        dq", "\n        dq"), 1)
    assert "attention scale not differentiated" in str(verdict)
    assert "weighted a second time" not in str(verdict)


def test_a_softmax_that_overflows_is_named(checked: Check) -> None:
    source = "import numpy as np\n\ndef softmax_forward(x):\n    e = np.exp(x)\n"
    text = str(checked(source + "    return e / e.sum(axis=-1, keepdims=True)\n", 1))
    assert "exp overflows: the maximum is not subtracted first" in text


def test_a_value_gets_no_hint_that_was_not_looked_for(checked: Check) -> None:
    wrong = VALUE.replace("p.grad += slope", "p.grad = slope")
    assert "looks like" not in str(checked(wrong, 2))
    assert "--hint" not in str(checked(wrong))


def test_single_precision_is_named(checked: Check) -> None:
    source = NORM.replace("return dx", "return dx.astype('float32').astype('float64')")
    assert "is something computed in float32?" in " ".join(str(checked(source, 1)).split())
    assert "float32" not in str(checked(NORM.replace("return dx", "return 1.0000001 * dx"), 1))


# --- a whole model -------------------------------------------------------------------------------


def words_of(verdict: Verdict) -> str:
    return " ".join(str(verdict).split())


def test_a_whole_model_that_is_wrong_is_told_what_is_right_and_where_to_look(
    checked: Check,
) -> None:
    wrong = WHOLE.replace('"htu,thd->uhd", ds, q', '"htu,uhd->thd", ds, q')
    text = words_of(checked(wrong))
    assert "gives wrong numbers in dlayer0.attn_wk" in text
    assert "right loss, dlm_head, dlayer0.mlp_fc2, dlayer0.mlp_fc1, dlayer0.attn_wo" in text
    assert "wrong too dwte, dwpe" in text
    assert "softmax_backward and attention_backward lead to it" in text
    assert "for a hint about loss_and_grads" in text
    assert "axes transposed: dk_heads" in words_of(checked(wrong, 1))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("sum(losses), grads", "sum(losses), {k: g for k, g in grads.items() if k[1] != 'p'}",
         "gives no gradient of wpe, by itself"),
        ("sum(losses), grads", "sum(losses), {'d' + k: g for k, g in grads.items()}",
         "their keys are to be the names of the parameters: lm_head"),
        ("sum(losses), grads", "sum(losses), {**grads, 'bias': 1.0}",
         "gives a gradient of bias, which are no parameters"),
        ("losses = [", "params['wte'] *= 1.001\n    losses = [",
         "writes into params['wte'], which is its input"),
        ("sum(losses), grads", "grads", "returns dict; expected loss, {name: gradient}"),
    ],
    ids=["missing", "other keys", "extra", "writes", "grads alone"],
)  # fmt: skip
def test_what_a_whole_model_hands_back_is_told_in_words(
    old: str, new: str, says: str, checked: Check
) -> None:
    verdict = checked(WHOLE.replace(old, new))
    assert verdict.status == WRONG
    assert says in words_of(verdict)


LOOK_UPS = {
    "the backend": """\
from crosscheck.functions import watched_backend
from vectorized.backend import Backend as Ours
from microgpt.backend import fresh_state


def loss_and_grads(params, docs, config):
    ours = Ours(config, fresh_state(params), watch=True)
    loss = ours.forward(docs)
    ours.backward()
    return loss, ours.grads()
""",
    "the text": """\
from crosscheck.functions import text_loss_and_grads
from vectorized import model


def loss_and_grads(params, docs, config):
    found = text_loss_and_grads((params, docs, config), vars(model))
    return found.pop("loss"), {name[1:]: x for name, x in found.items()}
""",
    "the other text": """\
import numpy as np
from scalar.backend import Backend as Scalar
from microgpt.backend import fresh_state


def loss_and_grads(params, docs, config):
    ours = Scalar(config, fresh_state(params), watch=True)
    loss = ours.forward(docs)
    ours.backward()
    return loss, {name: np.array(x) for name, x in ours.grads().items()}
""",
    "a subclass": "from vectorized.backend import Backend as Ours\n\n\nclass Backend(Ours):\n"
    "    pass\n",
    "the arbiter": """\
from crosscheck.operations import d_rmsnorm


def rmsnorm_backward(dy, y, scale):
    return sum(d_rmsnorm(None, dy, y, scale).values())
""",
}


@pytest.mark.parametrize("name", LOOK_UPS)
def test_an_answer_of_ours_is_refused(name: str, checked: Check) -> None:
    verdict = checked(LOOK_UPS[name])
    assert verdict.status == WRONG
    assert "has its answer from" in words_of(verdict)


def test_functions_beside_a_whole_model_are_checked_and_are_no_part_of_its_verdict(
    checked: Check,
) -> None:
    beside = "\n\ndef linear_backward(dy, x, w):\n    return dy @ w, dy.T @ x\n"
    other = "\n\ndef softmax_backward(y, dy):\n    return y\n"
    verdict = checked(WHOLE + "\n\n" + NORM + beside + other)
    assert verdict.status == RIGHT, str(verdict)
    assert "and beside it linear_backward, rmsnorm_backward" in words_of(verdict)
    assert "the arguments are not the text's: softmax_backward" in words_of(verdict)
    assert "besides, without an effect on the verdict: linear_backward" in words_of(verdict)
    assert verdict.functions["rmsnorm_backward"] == "right alone"


def test_a_wrong_part_of_a_wrong_model_is_reported(checked: Check) -> None:
    norm = NORM.replace("dy - y * (dy * y).mean(-1, keepdims=True)", "dy")
    whole = WHOLE.replace("    return s * (dy - y * (dy * y).mean(-1, keepdims=True))",
                          "    return rmsnorm_backward(dy, y, s)")  # fmt: skip
    text = words_of(checked(whole + "\n\n" + norm, 1))
    assert "loss_and_grads gives wrong numbers in dlayer0.attn_wo" in text
    assert "rmsnorm_backward gives wrong numbers in dx, by itself" in text


def test_the_text_is_back_after_a_check(checked: Check) -> None:
    shipped = dict(text_functions("vectorized"))
    checked(NORM.replace("return dx", "raise KeyError"))
    text_functions.cache_clear()
    assert text_functions("vectorized") == shipped


def test_a_candidate_is_never_recorded(checked: Check) -> None:
    plain = "    assert type(dy).__name__ == 'ndarray', type(dy)\n    return"
    assert checked(NORM.replace("    return", plain)).status == INCOMPLETE


def test_the_status_and_the_report_for_other_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(NORM.replace("return dx", "return -dx"), encoding="utf-8")
    assert main(["check", str(path), "--json"]) == WRONG
    report = json.loads(capsys.readouterr().out)
    assert report["functions"]["rmsnorm_backward"] == "wrong"
    assert report["fields"]["candidate"] == -report["fields"]["reference"]
    path.write_text("x = 1\n", encoding="utf-8")
    assert main(["check", str(path)]) == CANNOT
    assert "defines none of the text's functions" in capsys.readouterr().err


def test_what_sleeps_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(NORM.replace("return dx", "import time; time.sleep(60)"), encoding="utf-8")
    command = [sys.executable, "-m", "crosscheck", "check", str(path), "--time-limit", "0.2"]
    for more in ([], ["--json"]):
        run = [*command, *more]
        done = subprocess.run(run, capture_output=True, text=True, timeout=50, check=False)
        assert done.returncode == WRONG
        assert "mine.py:3" in done.stdout
    assert json.loads(done.stdout)["functions"] == {"rmsnorm_backward": "wrong"}


# --- pytest --------------------------------------------------------------------------------------


def _pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_pytest_takes_a_candidate_anywhere(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(NORM.replace("return dx", "return -dx"), encoding="utf-8")
    done = _pytest(tmp_path, "crosscheck", "--candidate", "mine.py")
    assert done.returncode == WRONG, done.stderr
    assert done.stdout.startswith("mine.py has rmsnorm_backward")
    assert _pytest(tmp_path, "crosscheck", "--candidate", "no.py").returncode == CANNOT


def test_pytest_crosscheck_means_the_installed_one_elsewhere(tmp_path: Path) -> None:
    done = _pytest(tmp_path, "crosscheck", "--case", "one-position", "--collect-only", "-q")
    assert "test_first_step[one-position]" in done.stdout, done.stdout + done.stderr


def test_other_runs_of_pytest_import_nothing_of_ours(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(
        "import sys\n\n\ndef test_own():\n"
        "    ours = {'numpy', 'microgpt', 'vectorized', 'crosscheck.check'}\n"
        "    assert not ours & set(sys.modules)\n",
        encoding="utf-8",
    )
    done = _pytest(tmp_path, "-q")
    assert done.returncode == 0, done.stdout


# --- the text itself, and its named defects ------------------------------------------------------


def _as_candidate(name: str, old: str = "", new: str = "") -> str:
    """A function of the text as a file of one's own, with what it calls imported."""
    function = text_functions("vectorized")[name]
    home = sys.modules[function.__module__]
    names = sorted(x for x in vars(home) if x.isidentifier() and x[:2] != "__" and x != name)
    source = inspect.getsource(function)
    first = "from __future__ import annotations\n"
    imports = f"from {home.__name__} import ({', '.join(names)})\n"
    return first + imports + (source.replace(old, new) if old else source)


DEFECTS = [
    (defect.name, name, patch.old, patch.new)
    for defect in load_defects()
    for patch in defect.patches[:1]
    if len(defect.patches) == 1
    for name, function in text_functions("vectorized").items()
    if name in RESULTS
    and patch.file == function.__module__.replace(".", "/") + ".py"
    and function.__module__ in TEXTS["vectorized"][:2]
    and inspect.getsource(function).count(patch.old) == 1
]


def test_every_function_of_the_text_is_right_and_every_defect_of_it_is_wrong(
    tmp_path: Path,
) -> None:
    path = tmp_path / "mine.py"
    passed = []
    for name in RESULTS:
        if name == "read":
            continue
        given = inputs([name], 1)[name]
        path.write_text(_as_candidate(name), encoding="utf-8")
        candidate = load_candidate(path)
        assert alone(candidate, name, given) is None
        assert candidate.calls[name] == len(given) > 0
        for defect, of, old, new in DEFECTS:
            if of == name:
                path.write_text(_as_candidate(name, old, new), encoding="utf-8")
                try:
                    if alone(load_candidate(path), name, given) is None:
                        passed.append(defect)
                except Told:
                    pass
    assert passed == []
    assert len(DEFECTS) > 60


def test_the_whole_text_as_a_candidate_is_all_right(checked: Check) -> None:
    sources = [inspect.getsource(sys.modules[name]) for name in TEXTS["vectorized"]]
    lines = [
        line
        for line in "\n".join(sources).splitlines()
        if not line.startswith(("from vectorized", "from __future__"))
    ]
    verdict = checked("from __future__ import annotations\n" + "\n".join(lines))
    assert verdict.status == RIGHT, str(verdict)
    assert {*verdict.functions.values()} == {"right"}


def test_in_place_exchanges_what_the_text_calls_and_no_recording(tmp_path: Path) -> None:
    from vectorized import model, replay, sample

    path = tmp_path / "mine.py"
    path.write_text("def gpt_forward(*_):\n    return 0\n", encoding="utf-8")
    candidate = load_candidate(path)
    before = model.gpt_forward
    with in_place(candidate, ["gpt_forward"]) as guards:
        assert model.gpt_forward is sample.gpt_forward is guards["gpt_forward"] is not before
        assert before not in vars(replay).values()
    assert model.gpt_forward is sample.gpt_forward is before


@pytest.mark.parametrize("scale", [1.0, 1.00001])
def test_a_complex_step_is_a_second_witness(
    scale: float, checked: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the reference is out of the way: whatever is given counts as equal to it."""
    monkeypatch.setattr(judging, "_compared", lambda *_: None)
    verdict = checked(WHOLE.replace("g |= {", f"g['attn_wo'] *= {scale}\n        g |= {{"))
    assert ("has the slope" in " ".join(str(verdict).split())) == (scale != 1)


def test_watch_says_what_changed_in_the_verdict(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(NORM.replace("return dx", "return -dx"), encoding="utf-8")
    command = [sys.executable, "-u", "-m", "crosscheck", "check", str(path), "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            first = list(iter(process.stdout.readline, "-" * 80 + "\n"))
            path.write_text(NORM, encoding="utf-8")
            second = list(iter(process.stdout.readline, "-" * 80 + "\n"))
        finally:
            process.kill()
    assert any("gives wrong numbers in dx" in line for line in first)
    assert second[-1] == "rmsnorm_backward: wrong -> right\n"


def test_a_package_is_a_candidate(tmp_path: Path) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "norm.py").write_text(NORM.replace("return dx", "return dx @ y"), encoding="utf-8")
    (package / "__init__.py").write_text("from .norm import rmsnorm_backward\n", encoding="utf-8")
    verdict = check(package)
    assert verdict.status == WRONG
    assert "norm.py:3" in str(verdict)


class Tensor(np.ndarray):
    """What PyTorch's tensors have that NumPy's arrays have not."""

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray:
        return self.view(np.ndarray)

    def __array__(self, *_: object) -> np.ndarray:
        raise TypeError("can't convert a tensor that requires grad")


def test_a_file_that_imports_torch_is_handed_tensors(
    checked: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = ModuleType("torch")
    torch.Tensor, torch.from_numpy = Tensor, lambda x: x.view(Tensor)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    given = "    assert isinstance(dy, torch.Tensor)\n    return"
    assert checked("import torch\n" + NORM.replace("    return", given)).status == INCOMPLETE
    attention = ATTENTION.replace("import numpy as np", "import torch\nimport numpy")
    trees = attention.replace("np.", "numpy.").replace("import numpy\n", "")
    trees = trees.replace("    B, T", "    import numpy\n    B, T").replace(
        "    p = tap", "    assert isinstance(q, torch.Tensor)\n    p = tap"
    )
    assert checked(trees).status == INCOMPLETE
