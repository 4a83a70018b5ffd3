"""How far two numbers may lie apart, in double and in single precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from crosscheck.cases import Case
from crosscheck.trace import PHASES, Array


@dataclass(frozen=True)
class Tolerance:
    """How far two numbers may lie apart: atol + rtol * |reference| + scale * max |reference|."""

    rtol: float
    atol: float
    scale: float = 0.0  # the share of the largest number in the tensor

    def __str__(self) -> str:
        parts = {"rtol": self.rtol, "atol": self.atol, "scale": self.scale}
        return ", ".join(f"{name} {value:g}" for name, value in parts.items() if value)

    def shares(self, reference: Array, candidate: Array) -> Array:
        """The distance of each pair as a share of what is allowed; not a number counts as inf."""
        exact = candidate.astype("float64")
        sizes = np.abs(reference)
        allowed = self.atol + self.rtol * sizes + self.scale * sizes.max(initial=0.0)
        with np.errstate(invalid="ignore", over="ignore"):
            shares = np.abs(exact - reference) / allowed
        return np.where(np.isnan(shares), np.inf, shares)


@dataclass(frozen=True)
class Standard:
    """What a comparison holds a candidate to: its precision, and what that allows by phase."""

    dtype: str
    tolerances: Mapping[str, Tolerance]


FLOAT64 = Standard("float64", dict.fromkeys(PHASES, Tolerance(rtol=1e-9, atol=1e-12)))

# Single precision loses digits where numbers of unlike size are added, so its error is measured
# as a share of the largest number of the tensor. These were the largest errors of any case and nine
# sets of parameters against float64, and a margin of four is on top of them. Sums in another order
# have others, within that margin: `python -m crosscheck float32` tells by how much.
# Every step starts from the reference's state.
FLOAT32_MEASURED = {
    "batch": 0.0,
    "entry": 5.9e-8,
    "entry_m": 5.9e-8,
    "entry_v": 5.9e-8,
    "forward": 9.4e-7,
    "eval": 9.4e-7,
    "read": 9.4e-7,
    "backward": 3.1e-5,
    "gradient": 3.1e-5,
    "unwatched": 3.1e-5,
    "adam_m": 3.7e-7,
    "adam_v": 2.3e-7,
    "update": 8.7e-6,
    "params": 1.1e-7,
}
MARGIN = 4


def float32(case: Case) -> Standard:
    """What is allowed to single precision, more where a case declares that it loses more."""
    slack = case.float32.get("slack", 1.0)
    return Standard(
        "float32",
        {
            phase: Tolerance(rtol=0.0, atol=1e-30, scale=MARGIN * slack * measured)
            for phase, measured in FLOAT32_MEASURED.items()
        },
    )
