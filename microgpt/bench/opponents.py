"""Opponents for `microgpt bench`: PyTorch with its autograd, and programs like the original."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from microgpt.backend import Docs, State
from microgpt.config import Config
from microgpt.errors import MicrogptError


def torch_backends(threads: int | None = None) -> dict[str, Callable[[Config, State], Any]]:
    """The makers of PyTorch's backends by name; threads None leaves their number to PyTorch.

    Raises MicrogptError if PyTorch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise MicrogptError(
            "--against torch: PyTorch is not installed; pip install torch"
        ) from None
    if threads is not None:
        torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = 1000  # beyond the limit, "compiled" runs eager
    return {
        "torch": lambda config, state: TorchBackend(torch, config, state, compiled=False),
        "torch compiled": lambda config, state: TorchBackend(torch, config, state, compiled=True),
    }


class TorchBackend:
    """The part of microgpt.backend.Backend that a benchmark needs, eager or compiled."""

    def __init__(self, torch: Any, config: Config, state: State, compiled: bool) -> None:
        self.torch, self.config = torch, config
        dtype = getattr(torch, config.dtype)
        self.params = {
            name: torch.tensor(np.asarray(tensor), dtype=dtype, requires_grad=True)
            for name, tensor in state.params.items()
        }
        self.adam = torch.optim.AdamW(  # Adam, unless there is weight decay
            self.params.values(),
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.updates = state.updates
        self.compiled = compiled
        self.loss_of = torch.compile(self._loss, dynamic=False) if compiled else self._loss

    def forward(self, docs: Docs) -> float:
        T = max(map(len, docs)) - 1
        if self.compiled:  # each shape is compiled anew: round T up, for few shapes
            T = min(-(-T // 4) * 4, self.config.block_size)
        ids = self.torch.tensor([[*doc, *[0] * (T + 1 - len(doc))] for doc in docs])
        weights = [
            [1 / (len(docs) * (len(doc) - 1))] * (len(doc) - 1) + [0.0] * (T + 1 - len(doc))
            for doc in docs
        ]
        shares = self.torch.tensor(weights, dtype=self.params["wte"].dtype)
        try:
            self.loss = self.loss_of(self.params, ids[:, :-1], ids[:, 1:], shares)
        except RuntimeError as error:  # usually because there is no C++ compiler
            first, *_ = str(error).splitlines()
            raise MicrogptError(f"--against torch: PyTorch cannot do it here: {first}") from None
        return float(self.loss.detach())

    def backward(self) -> None:
        self.adam.zero_grad(set_to_none=True)
        self.loss.backward()

    def update(self, lr_t: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = lr_t
        if self.config.grad_clip:
            parameters = self.params.values()
            self.torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
        self.adam.step()
        self.updates += 1

    def grads(self) -> dict[str, Any]:
        return {name: p.grad.numpy() for name, p in self.params.items()}

    def state(self) -> State:
        params = {name: p.detach().numpy() for name, p in self.params.items()}
        moments = {name: self.adam.state.get(p, {}) for name, p in self.params.items()}
        m, v = (
            {name: moment.get(key, np.zeros_like(params[name])) for name, moment in moments.items()}
            for key in ("exp_avg", "exp_avg_sq")
        )
        return State(params, m, v, self.updates)

    def _loss(self, p: Mapping[str, Any], tokens: Any, targets: Any, weights: Any) -> Any:
        config, functional = self.config, self.torch.nn.functional
        B, T = tokens.shape
        H, D = config.n_head, config.head_dim

        def norm(x: Any) -> Any:
            return x * (x.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt()

        def heads(x: Any) -> Any:
            return x.view(B, T, H, D).transpose(1, 2)

        activation = {
            "relu": functional.relu,
            "squared_relu": lambda x: functional.relu(x).square(),
            "gelu": lambda x: functional.gelu(x, approximate="tanh"),
        }[config.activation]
        x = p["wte"][tokens] + p["wpe"][:T]
        if config.norm_embedding:
            x = norm(x)
        for i in range(config.n_layer):
            w = f"layer{i}."
            n = norm(x)
            q, k, v = (heads(n @ p[f"{w}attn_w{c}"].T) for c in "qkv")
            seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + seen.transpose(1, 2).reshape(B, T, H * D) @ p[w + "attn_wo"].T
            x = x + activation(norm(x) @ p[w + "mlp_fc1"].T) @ p[w + "mlp_fc2"].T
        logits = x @ p["wte" if config.tie_lm_head else "lm_head"].T
        losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return (weights * losses).sum()


# runs a file, and waits for a byte before the file begins and after each loss that it prints
IN_STEPS = """
import builtins, os, runpy, sys

def wait():
    if not os.read(0, 1):
        os._exit(0)

def say_and_wait(*words, **options):
    say(*words, **{**options, "flush": True})
    if "loss" in " ".join(map(str, words)):
        wait()

say, builtins.print = print, say_and_wait
wait()
runpy.run_path(sys.argv[1], run_name="__main__")
"""


class Program:
    """A program that trains the same model on input.txt and prints "loss X" at every step.

    The original does so too. The program runs in a process of its own, which waits between two
    steps, and ends when this process has ended.
    """

    LOSS = re.compile(rb"loss (\S+)\s*[\r\n]")

    def __init__(self, path: Path, documents: Sequence[str]) -> None:
        if not path.is_file():
            raise MicrogptError(f"--against {path}: there is no such file")
        self.path = path
        self.losses: list[float] = []
        self.printed = b""
        folder = TemporaryDirectory()
        (Path(folder.name) / "input.txt").write_text("\n".join(documents), encoding="utf-8")
        self.process: Any = Popen(
            [sys.executable, "-c", IN_STEPS, path.resolve()],
            cwd=folder.name,
            stdin=PIPE,
            stdout=PIPE,
            stderr=STDOUT,
            bufsize=0,
        )
        weakref.finalize(self, _end, self.process, folder)

    def forward(self, docs: Docs) -> float:
        """The next loss that the program prints; it trains on documents of its own choice."""
        with suppress(BrokenPipeError):  # the process has ended, which the read below reports
            self.process.stdin.write(b".")
        while not (found := self.LOSS.search(self.printed)):
            more = self.process.stdout.read(1 << 16)
            if not more:
                *_, last = ["nothing", *self.printed.decode(errors="replace").splitlines()]
                raise MicrogptError(
                    f"--against {self.path}: has ended after {len(self.losses)} steps; the last"
                    f" that it said: {last}"
                )
            self.printed += more
        self.printed = self.printed[found.end() :]
        self.losses.append(float(found[1]))
        return self.losses[-1]

    def backward(self) -> None:
        """Nothing: the program does this by itself."""

    def update(self, lr_t: float) -> None:
        """Nothing: the program does this by itself, at its own learning rate."""


def _end(process: Any, folder: TemporaryDirectory[str]) -> None:
    process.kill()
    process.communicate()
    folder.cleanup()
