"""Tolerances: how far two numbers may lie apart, in double and in single precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from crosscheck.cases import Case
from crosscheck.noise import SQUARES, Noise, least_noise, of_operands
from crosscheck.trace import PHASES, Array, Step, split_key
from microgpt.config import Config

RTOL, ATOL = 1e-9, 1e-12
OF_THE_TABLE = ("forward", "eval", "read", "backward", "gradient", "unwatched")  # phases
# A number may be off by FACTOR times its noise. In the stored cases the worst number is off by 31
# times its noise, and with the exp, log and order of sums of another machine by 40 times.
FACTOR = 512


@dataclass(frozen=True)
class Tolerance:
    """How far two numbers may lie apart: atol + rtol * |reference| + scale * max |reference|.

    If the noise is known, they may lie apart at most FACTOR times the noise, too.
    """

    rtol: float
    atol: Array | float
    scale: float = 0.0  # the share of the largest number in the tensor
    noise: Array | float | None = None  # see crosscheck.noise
    root: bool = False  # whether the noise is of the square roots of the numbers

    def __str__(self) -> str:
        parts = {"rtol": self.rtol, "atol": self.atol, "scale": self.scale}
        words = ", ".join(f"{name} {value:g}" for name, value in parts.items() if np.any(value))
        if self.noise is None:
            return words
        return f"{FACTOR:,} times its noise" + " in the root" * self.root + f"; at most {words}"

    def at(self, index: tuple[int, ...]) -> Tolerance:
        """The tolerance of one element."""
        noise = None if self.noise is None else float(np.asarray(self.noise)[index])
        atol = float(np.asarray(self.atol)[index if np.ndim(self.atol) else ()])
        return replace(self, atol=atol, noise=noise)

    def allowed(self, reference: Array) -> Array:
        """How far another number may lie from each of the reference's."""
        sizes = np.abs(reference)
        most = self.atol + self.rtol * sizes + self.scale * sizes.max(initial=0.0)
        if self.noise is None:
            return most
        least = FACTOR * np.asarray(self.noise)
        if self.root:
            least = np.fmin(least, ATOL + RTOL * sizes**0.5)
            return 2 * least * sizes**0.5 + least**2  # (root + least) ** 2 - root ** 2
        return np.fmin(least, most)

    def shares(self, reference: Array, candidate: Array) -> Array:
        """The distance of each pair as a share of what is allowed; inf for NaN."""
        with np.errstate(all="ignore"):
            return as_shares(distance(reference, candidate), self.allowed(reference))

    def excused(self, reference: Array, candidate: Array) -> Array:
        """Which pairs lie farther apart than rtol alone allows."""
        with np.errstate(all="ignore"):
            return distance(reference, candidate) > self.rtol * np.abs(reference)


def distance(reference: Array, candidate: Array) -> Array:
    """How far apart each pair of numbers lies."""
    apart: Array = np.abs(candidate.astype("float64", copy=False) - reference)
    return apart


def as_shares(apart: Array, allowed: Array) -> Array:
    """Each distance as a share of what is allowed; inf for NaN."""
    shares = np.where(apart == 0, 0.0, apart / allowed)
    return np.where(np.isnan(shares), np.inf, shares)


@dataclass(frozen=True)
class Standard:
    """The tolerances of a comparison, by phase, in one precision."""

    dtype: str
    tolerances: Mapping[str, Tolerance]
    noise: Sequence[Noise] | Callable[[], Sequence[Noise]] = ()  # by step; or what measures it
    config: Config | None = None  # of the model; with it, the noise of fewer tensors is measured
    of_operands: dict[int, Noise] = field(default_factory=dict, compare=False, repr=False)
    rows: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)  # see at_once

    def tolerance(self, step: int, key: str) -> Tolerance:
        """The tolerance of a tensor; step: its number, from 1."""
        phase, _ = split_key(key)
        noise = self.noise() if callable(self.noise) else self.noise
        known = noise[step - 1].get(key) if step <= len(noise) else None
        return self.tolerances[phase] if known is None else self._with(known, phase)

    def widening(self, step: int, key: str, reference: Step) -> Iterator[tuple[Tolerance, bool]]:
        """Tolerances of a tensor, the narrowest first, and whether each goes by the least noise.

        The last tolerance is that of `tolerance`. It may need a measurement of the noise, which
        takes long; a tensor within one of the tolerances before it needs no measurement.
        """
        phase, name = split_key(key)
        if callable(self.noise) and (phase != "update" or f"params/{name}" in reference):
            if self.dtype != "float64":
                yield self.tolerances[phase], False
            yield self._with(least_noise(reference, key), phase), self.dtype == "float64"
            if self.config and phase in OF_THE_TABLE:
                if step not in self.of_operands:
                    self.of_operands[step] = of_operands(self.config, reference)
                if (known := self.of_operands[step].get(key)) is not None:
                    yield self._with(known, phase), self.dtype == "float64"
        yield self.tolerance(step, key), False

    def _with(self, noise: Array, phase: str) -> Tolerance:
        """The tolerance of a tensor of a phase, by its noise."""
        most = self.tolerances[phase]
        if self.dtype == "float64":
            return replace(most, noise=noise, root=phase in SQUARES)
        return most if phase in SQUARES else replace(most, atol=most.atol + SINGLE * noise)


# Adam's v has no atol: many of its numbers are smaller than ATOL, and any other would pass for them
FLOAT64 = Standard(
    "float64",
    {phase: Tolerance(RTOL, 0.0 if phase in SQUARES else ATOL) for phase in PHASES},
)


def float64(
    noise: Sequence[Noise] | Callable[[], Sequence[Noise]], config: Config | None = None
) -> Standard:
    """FLOAT64, but no tensor may be off by more than its noise allows."""
    return replace(FLOAT64, noise=noise, config=config, of_operands={}, rows={})


# Single precision loses digits where numbers of unlike size are added, so an error is given as a
# share of the largest number of its tensor. These are the largest errors against float64 of any
# case, with nine sets of parameters, where every step starts from the reference's state. The
# tolerance is MARGIN times these. Sums in another order have other errors, within the tolerance:
# `python -m crosscheck float32` prints them.
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
# Random models may lose any number of digits by cancellation. So beyond the above, a number may be
# off by SINGLE times its noise, which is 32 times what that noise is in single precision. In 200
# random models no number was off by more than once that.
SINGLE = 32 * 2.0**29


def float32(case: Case, noise: Sequence[Noise] | Callable[[], Sequence[Noise]] = ()) -> Standard:
    """The tolerances of single precision; wider for a case that declares a slack.

    noise    widens the tolerance of numbers that cancel, in random models
    """
    slack = case.float32.get("slack", 1.0)
    return Standard(
        "float32",
        {
            phase: Tolerance(rtol=0.0, atol=1e-30, scale=MARGIN * slack * measured)
            for phase, measured in FLOAT32_MEASURED.items()
        },
        noise,
        case.config,
    )


def decided_by_rounding(reference_step: Step, noise: Noise) -> bool:
    """Whether an input of ReLU is so near 0 that single precision may give it the other sign."""
    inputs = [
        key for key in reference_step if key.startswith("forward/") and key.endswith("mlp_pre")
    ]
    return any(
        bool((np.abs(reference_step[key]) < SINGLE * noise[key])[reference_step[key] != 0].any())
        for key in inputs
        if key in noise
    )
