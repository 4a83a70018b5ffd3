"""The kit for a port: the inputs of the cases as files, the guide, and if asked the answers.

GUIDE.md in this folder says what a port reads, computes and writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from crosscheck.cases import Case, case_names, load_case
from crosscheck.compare import simplicity
from crosscheck.sides import IncompleteError
from crosscheck.trace import ENTRY, Array, Step, keys, part, split_key, trace
from microgpt.config import FIELDS, Config
from microgpt.errors import MicrogptError, printable
from microgpt.runs.checkpoint import write_tensors
from microgpt.runs.files import write_whole
from microgpt.train import learning_rate

GUIDE = Path(__file__).with_name("GUIDE.md")
TOKENS = "batch/tokens"
STEPS = 3  # how many steps of every case a port computes
LATER = {"decay-and-clip": 2}  # the number of the first step, if not 1: Adam's moments are not 0
# phases that a complete port writes
REQUIRED = ("forward", "backward", "gradient", "adam_m", "adam_v", "params")
STAGES = (
    "embedding",
    "norm",
    "attention",
    "MLP",
    "layers",
    "logits",
    "loss",
    "backward",
    "gradients",
    "Adam",
    "several steps",
)
# fields that a port has no use for: batches hold token ids, steps their learning rate
NOT_FOR_PORTS = (
    *("vocabulary", "crop", "init_std", "init_std_residual", "batch_size", "learning_rate"),
    *("schedule", "warmup_steps", "dtype", "seed", "dataset", "documents", "held_out", "cores"),
    *("max_seconds", "checkpoint_every", "eval_every", "num_samples", "temperature", "top_k"),
    "steps",  # config/steps are those of the file
)
PHASES = {  # the stage of a phase, of all phases but the forward pass
    "eval": "loss",
    "read": "loss",
    "backward": "backward",
    "gradient": "gradients",
    "unwatched": "gradients",
    "adam_m": "Adam",
    "adam_v": "Adam",
    "update": "Adam",
    "params": "Adam",
}
TAPS = {  # the stage of a tap outside the layers or in layer 0, if its name does not tell
    "emb": "embedding",
    "emb_norm": "norm",
    "attn_norm": "norm",
    "attn_res": "attention",
    "logits": "logits",
    "loss_t": "loss",
    "loss": "loss",
}


def stage(key: str) -> str:
    """The stage of a tensor of the first step; "" for the batch, the state at entry and samples."""
    phase, name = split_key(key)
    if phase != "forward":
        return PHASES.get(phase, "")
    layer, dot, tap = name.rpartition(".")
    if dot and layer != "layer0":
        return "layers"
    return TAPS.get(tap, "MLP" if tap.startswith("mlp_") else "attention")


def kit_cases() -> list[str]:
    """The names of the cases, the simplest first."""
    return sorted(case_names(), key=lambda name: simplicity(load_case(name), 1))


def expected_keys(case: Case) -> list[str]:
    """The keys of a step that a complete port writes, in the order of comparison."""
    order = keys(case.config, case.tokenizer.vocab_size)
    return [key for key in order if split_key(key)[0] in REQUIRED]


def reference_steps(case: Case, reference: str) -> dict[int, Step]:
    """The steps that a port is asked for, by number, as scalar/ or vectorized/ computes them.

    Raises MicrogptError if the reference stops, as at numbers that are not finite.
    """
    first = LATER.get(case.name, 1)
    last = first + STEPS - 1
    steps = enumerate(trace(case, reference, "float64", last), 1)
    try:
        return dict(islice(steps, first - 1, last))
    except IncompleteError as error:
        raise MicrogptError(
            f"case {case.name}: {reference} itself stops with {error.stop.error}"
        ) from None


def _number(name: str, config: Config) -> float:
    """A field as a number: of choices, the index."""
    value, choices = getattr(config, name), FIELDS[name].metadata["choices"]
    return choices.index(value) if choices else value


def inputs(case: Case, steps: dict[int, Step]) -> dict[str, Array]:
    """The tensors that a port reads: configuration, batches, the state before the first step."""
    config, tokenizer, first = case.config, case.tokenizer, min(steps)
    numbers = {
        **{name: _number(name, config) for name in FIELDS if name not in NOT_FOR_PORTS},
        "vocab_size": tokenizer.vocab_size,
        "bos": tokenizer.bos,
        "eos": tokenizer.eos,
        "first_step": first,
        "steps": len(steps),
    }
    tensors = {f"config/{name}": np.array(x, "float64") for name, x in numbers.items()}
    for number, step in steps.items():
        tensors[f"step{number}/learning_rate"] = np.array(learning_rate(number - 1, config))
        tensors[f"step{number}/{TOKENS}"] = step[TOKENS].astype("int64")
    for phase in ENTRY:
        for name, tensor in part(steps[first], phase).items():
            tensors[f"step{first}/{phase}/{name}"] = tensor.astype("float64")
    return tensors


def write_kit(folder: Path, names: Sequence[str], answers: bool) -> list[Path]:
    """The paths of the files that are written: guides, each case's input, and if asked answers.

    Raises MicrogptError if the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise MicrogptError(f"{printable(str(folder))} is a file; name a folder for the kit")
    cases = [load_case(name) for name in names]
    write_whole(folder / GUIDE.name, GUIDE.read_bytes())
    rows = [f"| `{case.name}` | {' '.join(case.why.split())} |\n" for case in cases]
    table = "# What each case is there to catch\n\n| case | |\n|---|---|\n" + "".join(rows)
    write_whole(folder / "CASES.md", table.encode())
    written = [folder / GUIDE.name, folder / "CASES.md"]
    for case in cases:
        steps = reference_steps(case, "vectorized")
        written.append(folder / f"{case.name}.in.safetensors")
        write_tensors(written[-1], inputs(case, steps))
        if answers:
            tensors = {
                f"step{number}/{key}": step[key]
                for number, step in steps.items()
                for key in expected_keys(case)
            }
            written.append(folder / f"{case.name}.answers.safetensors")
            write_tensors(written[-1], tensors)
    return written
