"""The configuration: every number and switch of a run, from a preset, a file, the command line.

A field is declared once, in `Config`. Its checks, its place in the YAML files, its flag on the
command line and its line of help all come from that declaration.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from microgpt.taps import ACTIVATIONS

LARGEST_WHOLE = 10**18  # largest whole number that is accepted


def _field(help: str, *, least: float | None = None, above: float | None = None,
           below: float | None = None, most: int = LARGEST_WHOLE,
           choices: tuple[str, ...] = (), before: Any = None) -> Any:  # fmt: skip
    """A field with its checks; `before` is its value in files older than the field."""
    return dataclasses.field(
        metadata={"help": help, "least": least, "above": above, "below": below, "most": most,
                  "choices": choices, "before": before}
    )  # fmt: skip


@dataclass(frozen=True)
class Config:
    """All settings of a run. `microgpt.settings.load_config` builds it and checks every field."""

    # the model
    n_layer: int = _field("transformer blocks", least=1, most=10_000)
    n_embd: int = _field("channels of the residual stream", least=1)
    n_head: int = _field("attention heads; divides n_embd", least=1)
    block_size: int = _field("longest context, in positions", least=1)
    vocabulary: str = _field(
        "order of the token ids, one for every code point", choices=("chars-bos", "bos-eos-chars")
    )
    crop: str = _field("what block_size counts", choices=("positions", "tokens"))
    norm_embedding: bool = _field("rmsnorm after wte + wpe")
    activation: str = _field("activation of the MLP", choices=tuple(ACTIVATIONS), before="relu")
    tie_lm_head: bool = _field("use wte as lm_head")
    norm_eps: float = _field("epsilon of rmsnorm", above=0)
    # initialisation
    init_std: float = _field("standard deviation of the initial weights", least=0)
    init_std_residual: float = _field("standard deviation of attn_wo and mlp_fc2", least=0)
    # training
    steps: int = _field("optimizer steps", least=1)
    batch_size: int = _field("documents per step", least=1)
    learning_rate: float = _field("highest learning rate", above=0)
    schedule: str = _field("how the learning rate falls", choices=("linear", "cosine", "constant"))
    warmup_steps: int = _field("first steps, in which the rate rises", least=0)
    weight_decay: float = _field("decoupled weight decay, as in AdamW", least=0)
    grad_clip: float = _field("largest norm of the gradient; 0: no limit", least=0)
    beta1: float = _field("Adam's decay of the mean gradient", least=0, below=1)
    beta2: float = _field("Adam's decay of the mean square", least=0, below=1)
    adam_eps: float = _field("Adam's epsilon", above=0)
    dtype: str = _field("precision of vectorized", choices=("float64", "float32"))
    seed: int = _field("seed of all random draws", least=0)
    dataset: str = _field("names, makemore, pride, or a text file")
    documents: str = _field(
        "lines of the data set, or windows of its text, as long as the context",
        choices=("lines", "windows"),
        before="lines",
    )
    held_out: int = _field("documents kept from training, for evaluation", least=0)
    # how it runs
    cores: int = _field("processes that share a batch", least=1, most=256)
    max_seconds: float = _field("stop training after X seconds; 0: never", least=0)
    checkpoint_every: int = _field("steps between checkpoints; 0: at the end", least=0)
    eval_every: int = _field(
        "steps between evaluations of held-out documents; 0: at the end", least=0, before=0
    )
    # sampling
    num_samples: int = _field("samples drawn after training", least=0)
    temperature: float = _field(
        "divides the logits before sampling; 0: always the likeliest token", least=0
    )
    top_k: int = _field("draw from the N likeliest tokens; 0: from all", least=0, before=0)

    @property
    def head_dim(self) -> int:
        """D: the channels of one head."""
        return self.n_embd // self.n_head

    @property
    def max_tokens(self) -> int:
        """How many tokens a document is cropped to, BOS and the closing token included."""
        return self.block_size + 1 if self.crop == "positions" else self.block_size

    @property
    def documents_are(self) -> str:
        """The word for documents in counts."""
        return "windows" if self.documents == "windows" else "documents"

    @property
    def window(self) -> int:
        """How many characters fit into the context, after BOS."""
        return self.max_tokens - 1


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
# fields that do not change the losses of a run; `dataset` is where the text is
NOT_TRAINED = ("dataset", "cores", "max_seconds", "checkpoint_every", "eval_every", "num_samples",
               "temperature", "top_k")  # fmt: skip
