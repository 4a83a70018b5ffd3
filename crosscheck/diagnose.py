"""The diagnosis of a disagreement: the reading of the wrong numbers with the fewest changes.

A reading is a sentence on a mistake, and the numbers that this mistake would give. It is told only
if these are the faulty numbers: all of them, or all that are wrong, and then with their region.
Readings are made from the table of operations: an operation by another formula, with an argument
exchanged, or with a contribution or term that is missing, there twice, negated or scaled. Numbers
that no reading gives are described by their region, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import e, log, sqrt

import numpy as np

from crosscheck.adam_forms import of_adam
from crosscheck.cases import Case
from crosscheck.explain import clipping
from crosscheck.formulas import Mechanical
from crosscheck.operations import Around, Call, calls
from crosscheck.read_again import other_draws, other_readings
from crosscheck.trace import DERIVED, PHASES, Array, Step, axes, real, split_key
from crosscheck.variants import (
    OTHER_FORMS,
    Guess,
    alternatives,
    micro_batch_weights,
    overflowing,
    rearranged,
)
from crosscheck.where import where
from microgpt.train import learning_rate

NOISE = {"float64": 1e-12, "float32": 1e-5}  # of the largest number: differences by rounding
ENOUGH = 8  # wrong elements that a guess must know, if it does not know half of them
MOST_PARTS = 40  # of a sum, for a least-squares fit of all their coefficients
OF_ANOTHER = "these are the numbers of"
NOT_CLEARED = "of the step before has not been cleared"
ALL_OF_THEM, THE_WRONG_ONES = "all", "wrong"


@dataclass(frozen=True)
class Pair:
    """A sound tensor and the faulty one in its place, with the steps that they belong to."""

    case: Case
    number: int  # of the step, from 1
    key: str
    sound_step: Step
    before: Step | None  # the sound side's step before
    faulty_step: Step
    sound: Array  # the tensor in the sound step
    faulty: Array  # the tensor in the faulty step
    there: Array  # which elements are no padding
    noise: float

    @property
    def phase(self) -> str:
        """The phase of the tensor."""
        return split_key(self.key)[0]

    @property
    def name(self) -> str:
        """The name of the tensor, without the d of a derivative."""
        name = split_key(self.key)[1]
        return name.removeprefix("d") if self.phase in DERIVED else name

    @property
    def loose(self) -> float:
        """The share of a number by which others of the same mistake may differ: 1e-6 in float64."""
        return sqrt(self.noise)

    @cached_property
    def around(self) -> Around:
        """The sound step in the form that the table's operations take."""
        return Around(self.case.config, self.sound_step)

    @cached_property
    def calls(self) -> list[Call]:
        """The operations whose results add up to the tensor."""
        return calls(self.around, self.key)

    @cached_property
    def size(self) -> float:
        """The largest number of either side."""
        sound = float(np.abs(self.sound[self.there]).max(initial=0.0))
        return max(sound, float(np.abs(self.faulty[self.there]).max(initial=0.0)))

    @cached_property
    def wrong(self) -> Array:
        """Which elements differ by more than noise."""
        floor = self.noise * (1e3 * np.abs(self.sound) + self.size)
        return (np.abs(self.faulty - self.sound) > floor) & self.there

    @cached_property
    def moved(self) -> float:
        """The largest difference."""
        return float(np.abs(self.faulty - self.sound)[self.there].max(initial=0.0))

    @cached_property
    def where(self) -> str:
        """The region of the wrong elements, in words."""
        live = self.there & ((self.sound != 0) | (self.faulty != 0))
        return where(self.case, self.key, self.wrong, live, self.around.tokens)

    def fits(self, guess: Array) -> str:
        """Whether a guess gives the faulty numbers: all of them, only the wrong ones, or neither.

        NaN in a guess stands for an unknown element. At least half of the wrong elements, or
        ENOUGH, must be known.
        """
        guess = np.asarray(guess)
        if guess.shape != self.faulty.shape:
            return ""
        known = np.isfinite(guess) & self.there
        wanted = min(ENOUGH, np.count_nonzero(self.wrong) / 2)
        if np.count_nonzero(known & self.wrong) < max(1, wanted):
            return ""
        error = np.abs(self.faulty - guess)
        allowed = np.minimum(
            self.loose * self.moved + self.noise * self.size,
            self.loose * (np.abs(self.faulty) + 1e-3 * self.size),
        )
        good = (error <= allowed) | ~known
        if good.all():
            return ALL_OF_THEM
        return THE_WRONG_ONES if good[self.wrong].all() else ""


# the phases that ranks compute together; one rank, or the text without ranks, gives the others
OF_SHARES = "shares of the ranks, if one rank agrees"
ON_RANKS = ("entry", "entry_m", "entry_v", "unwatched", "adam_m", "adam_v", "update", "params")


def diagnose(
    case: Case,
    number: int,
    key: str,
    sound_step: Step,
    faulty_step: Step,
    before: Step | None,
    promised: str = "float64",
) -> str:
    """A sentence on the mistake; "" if nothing can be said.

    number      of the step, from 1
    before      the sound side's step before
    promised    the candidate's precision
    """
    if key not in sound_step or key not in faulty_step:
        return ""
    sound, faulty = sound_step[key], faulty_step[key]
    if sound.shape != faulty.shape:
        return "transposed" if sound.shape == faulty.shape[::-1] else ""
    if faulty.dtype == "float32" and promised == "float64" and sound.dtype == "float64":
        return "float32 where float64 was promised"
    if split_key(key)[0] == "batch":
        return ""
    if split_key(key)[0] == "sample":
        drawn = other_draws(case, key, number, sound_step)
        same = [words for words, guess in drawn if np.array_equal(guess, faulty)]
        return ", or ".join(same[:2])
    there, noise = real(key, sound.shape, sound_step["batch/tokens"]), NOISE[promised]
    faulty = faulty.astype("float64")
    pair = Pair(case, number, key, sound_step, before, faulty_step, sound, faulty, there, noise)
    shared = case.config.cores > 1 and pair.phase in ON_RANKS
    with np.errstate(all="ignore"):
        if shared and np.isnan(faulty[there]).any():  # see crosscheck.ranks.Together
            return "shares of the ranks: the ranks have different numbers"
        said = not_finite(pair) or lost(pair)
        if not said and not pair.wrong.any():
            return logarithm(pair)
        said = said or reading(pair) or description(pair, promised)
    if shared:
        return f"{OF_SHARES}: {said}" if said else OF_SHARES
    return said


def reading(pair: Pair) -> str:
    """The first reading, by kind, that gives all elements; or else the first for the wrong ones.

    Of the readings of one kind the closest is told; if two are equally close, both are.
    """
    partly = ""
    for kind in KINDS:
        whole: dict[str, float] = {}
        for words, guess in kind(pair):
            if isinstance(words, Mechanical) and any(type(one) is str for one in whole):
                continue  # a reading with a name of its own gives the same numbers
            fit = pair.fits(guess)
            if fit == ALL_OF_THEM and words not in whole:
                whole[words] = float(np.nanmax(np.abs(pair.faulty - guess)[pair.there]))
                if kind in ONE_IS_ENOUGH:
                    break
            elif fit == THE_WRONG_ONES and not partly:
                partly = words
        if whole:
            close = max(10 * min(whole.values()), pair.noise * pair.size)
            return ", or ".join(_told([words for words, error in whole.items() if error <= close]))
    if partly and np.count_nonzero(pair.wrong) > 1:
        wrong, there = np.count_nonzero(pair.wrong), np.count_nonzero(pair.there)
        return f"{partly}, {pair.where or f'in {wrong:,} of {there:,} elements'}"
    return ""


def _told(closest: list[str]) -> list[str]:
    """At most two readings; mechanical slips only if no reading has a name of its own."""
    named = [words for words in closest if not isinstance(words, Mechanical)]
    return (named or closest)[:2]


# --- without the table ---------------------------------------------------------------------------


def not_finite(pair: Pair) -> str:
    """What infinities or NaN say; "" if there are none."""
    faulty = pair.faulty[pair.there]
    bad = ~np.isfinite(faulty)
    if not bad.any():
        return ""
    if "U" in axes(pair.key) and np.isneginf(faulty).any():
        hidden = np.isneginf(pair.faulty) & pair.there
        if not hidden[..., ~np.eye(hidden.shape[-1], dtype=bool)].any():
            return "the mask hides each position from itself"
        return f"-inf at {bad.sum():,} positions that may be looked at: the mask hides too much"
    dtype = pair.faulty_step[pair.key].dtype
    for words, guess in (guess for call in pair.calls for guess in overflowing(call, dtype)):
        known = guess[pair.there]
        same = np.isfinite(known)
        if np.array_equal(same, ~bad) and np.allclose(known[same], faulty[same], 1e-3, 1e-6):
            return words
    return f"not a finite number in {bad.sum():,} of {bad.size:,} elements"


def lost(pair: Pair) -> str:
    """What a tensor of zeros says; "" if it is none."""
    largest = np.abs(pair.faulty[pair.there]).max(initial=0.0)
    if largest < 1e-100 * pair.size:
        return "zero everywhere: lost or never written"
    if largest < 1e-13 * pair.size:
        return "zero but for rounding: the terms of the sum cancel"
    return ""


def logarithm(pair: Pair) -> str:
    """Whether the loss is -log(p + eps), whose difference may be as small as NOISE; or ""."""
    if pair.key not in ("forward/loss_t", "eval/loss_t"):
        return ""
    p = np.exp(-pair.sound)
    for eps in (1e-15, 1e-12, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        guess = -np.log(p + eps)
        allowed = 1e-3 * np.abs(guess - pair.sound) + 1e-12 * (1 + np.abs(pair.sound))
        fits = (np.abs(pair.faulty - guess) <= allowed)[pair.there].all()
        if fits and np.abs(guess - pair.sound)[pair.there].max() > 1e-12:
            return f"a constant inside the logarithm: -log(p + {eps:g})"
    return ""


# --- from the table ------------------------------------------------------------------------------


def other_forms(pair: Pair) -> Iterator[Guess]:
    """One of the operations by another formula that has a name."""
    if words := logarithm(pair):
        yield words, pair.faulty
    for call in pair.calls:
        rest = pair.sound - call.total()
        for words, guess in OTHER_FORMS.get(call.function.__name__, lambda _: ())(call):
            yield words, rest + guess
    if pair.key == "unwatched/loss":
        for words, weights in micro_batch_weights(pair.around):
            yield words, np.asarray((pair.sound_step["forward/loss_t"] * weights).sum())
    tied = len(pair.calls) > 1 and pair.name == "wte"
    if tied:  # the embedding's rows are assigned to the gradient, and not added
        embedding, head = pair.calls
        for words, guess in OTHER_FORMS["d_wte"](embedding):
            rows = np.isin(np.arange(len(guess)), pair.around.token)[:, None]
            assigned = np.where(rows, guess, head.total())
            yield f"assigned, not added: what the head contributed is lost; {words}", assigned


def repeated_tokens(pair: Pair) -> Iterator[Guess]:
    """One occurrence of every token counts: for each row, the one that fits best."""
    if pair.phase not in DERIVED or pair.name != "wte":
        return
    embedding = pair.calls[0]
    dy, a = embedding.slots["dy"].value, pair.around
    rest = pair.sound - embedding.total()
    guess = pair.sound.copy()
    for row in np.unique(a.token[a.real]):
        each = rest[row] + np.array([*dy[a.real & (a.token == row)], np.zeros(dy.shape[-1])])
        guess[row] = each[np.abs(each - pair.faulty[row]).max(axis=1).argmin()]
    yield "repeated tokens accumulated once: one occurrence counts, the others are lost", guess


def parts_of(pair: Pair) -> list[Guess]:
    """What the tensor is a sum of: the contributions of its consumers, and their terms."""
    whole = [(call.label, call.total()) for call in pair.calls] if len(pair.calls) > 1 else []
    terms = [
        (name or call.label, term)
        for call in pair.calls
        for name, term in call.terms().items()
        if len(call.terms()) > 1
    ]
    # a term may be one number for a whole row
    return [(label, np.broadcast_to(part, pair.faulty.shape)) for label, part in (*whole, *terms)]


def changed_parts(pair: Pair) -> Iterator[Guess]:
    """One part of the sum missing, there twice, negated, or times a factor; or two parts."""
    parts = parts_of(pair)
    scaled: list[Guess] = []
    for label, part in parts:
        change = _coefficient(pair.faulty - pair.sound, part, pair.wrong)
        if change is None:
            continue
        times, guess = 1 + change, pair.sound + change * part
        if abs(times) < pair.loose:
            yield f"missing: {label}", pair.sound - part
        elif abs(times - 2) < pair.loose:
            yield f"there twice: {label}", pair.sound + part
        elif abs(times + 1) < pair.loose:
            yield f"the sign of {label}", pair.sound - 2 * part
        elif name := factor_name(pair, times):
            yield f"{label} is multiplied by {name}", guess
        else:
            scaled.append((f"{label} is multiplied by {times:.6g}; no name for this factor", guess))
    for label, part in parts:
        yield f"only {label} is there", part
    contributions = [one for one in parts if any(one[0] == call.label for call in pair.calls)]
    for (first, a), (second, b) in combinations(contributions or parts, 2):
        yield f"missing: {first} and {second}", pair.sound - a - b
        yield f"the sign of {first} and of {second}", pair.sound - 2 * a - 2 * b
        yield f"multiplied, not added: {first} and {second}", a * b
    if len(pair.calls) == 2:
        yield from _added_before(pair)
    yield from scaled


def _added_before(pair: Pair) -> Iterator[Guess]:
    """One consumer's contribution is added to the gradient that enters the other's derivative."""
    for call, other in (pair.calls, pair.calls[::-1]):
        dy = call.slots["dy"].value
        around = other.total()
        if dy.shape == around.shape:
            words = f"{other.label.removesuffix(',')} is added before the derivative of"
            yield f"{words} {call.operation}", call.total(dy=dy + around)
            yield f"{words} {call.operation}, and after it", (call.total(dy=dy + around) + around)


def known(pair: Pair) -> list[str]:
    """The tensors that a mistake may use: those before, and of a gradient, the other gradients."""
    keys = list(pair.sound_step)
    at = keys.index(pair.key)
    own = f"{pair.phase}/" if pair.phase in ("gradient", "unwatched") else None
    return [*keys[:at], *(key for key in keys[at + 1 :] if own and key.startswith(own))]


def exchanged(pair: Pair) -> Iterator[Guess]:
    """One argument of one operation exchanged for something else."""
    earlier = {key: pair.sound_step[key] for key in known(pair)}
    for call in pair.calls:
        rest = pair.sound - call.total()
        tensors = {name: slot for name, slot in call.slots.items() if slot.is_tensor}
        for (a, one), (b, two) in combinations(tensors.items(), 2):
            if np.shape(one.value) == np.shape(two.value):
                exchanged = call.total(**{a: two.value, b: one.value})
                yield f"{one.name} and {two.name} exchanged with each other", rest + exchanged
        for name in call.slots:
            for words, other in alternatives(call, name, earlier, pair.before):
                try:
                    yield words, rest + call.total(**{name: other})
                except (IndexError, ValueError):
                    continue


def added(pair: Pair) -> Iterator[Guess]:
    """A tensor that is no part of the sum is added, or subtracted."""
    for key in known(pair):
        tensor, (phase, name) = pair.sound_step[key], split_key(key)
        if tensor.shape != pair.sound.shape or tensor.size < 3 or phase in ("batch", "sample"):
            continue
        times = _coefficient(pair.faulty - pair.sound, tensor, pair.wrong)
        for k, words in ((1, "added"), (-1, "subtracted"), (2, "added twice")):
            if times is not None and abs(times - k) < pair.loose:
                words = f"{name} ({PHASES[phase]}) is {words}, and has no part in it"
                yield words, pair.sound + k * tensor


def formulas(pair: Pair) -> Iterator[Guess]:
    """Another formula; if one fits, also exchanged arguments, which may give the same numbers."""
    found = False
    for words, guess in other_forms(pair):
        found = found or pair.fits(guess) == ALL_OF_THEM
        yield words, guess
    if found:
        yield from exchanged(pair)


def read_again(pair: Pair) -> Iterator[Guess]:
    """Sampling that reads the first document with a wrong cache or position."""
    if pair.phase == "read":
        yield from other_readings(pair.around)


def moved_about(pair: Pair) -> Iterator[Guess]:
    """The right numbers at other indices, or the numbers of another tensor."""
    sound, a = pair.sound, pair.around
    if sound.ndim >= 2 and sound.shape[-1] == sound.shape[-2] and axes(pair.key)[0] != "T":
        yield "transposed", sound.swapaxes(-1, -2)
    order = _order(pair)
    if order:
        yield order, pair.faulty
    own = split_key(pair.key)[1]
    if axes(pair.key)[:1] == ("B",):
        yield from rearranged(a, own, sound, axes(pair.key))
    if pair.phase == "backward" and sound.ndim:
        yield f"{pair.name} in place of its derivative", pair.sound_step[f"forward/{pair.name}"]
    for words in other_layer(pair):
        yield words, pair.faulty
    for key, tensor in pair.sound_step.items():
        phase, name = split_key(key)
        same = name == own and {phase, pair.phase} <= {*DERIVED}  # the same gradient once more
        if tensor.shape == sound.shape and key != pair.key and not same and sound.size > 1:
            yield f"{OF_ANOTHER} {name} ({PHASES[phase]})", tensor


def other_layer(pair: Pair) -> Iterator[str]:
    """The reading that the faulty side has this layer's numbers in another layer, if it has."""
    layer, dot, last = split_key(pair.key)[1].rpartition(".")
    prefix = pair.key.split("/")[0] + "/" + layer.rstrip("0123456789")
    for i in range(pair.case.config.n_layer if dot else 0):
        key = f"{prefix}{i}.{last}"
        other = pair.faulty_step.get(key) if key != pair.key else None
        if other is not None and other.shape == pair.sound.shape:
            apart = np.abs(np.asarray(other, "float64") - pair.sound)[pair.there]
            if apart.size > 1 and apart.max() <= 1e3 * pair.noise * pair.size:
                yield (
                    f"the layers run in another order: what belongs here is in {split_key(key)[1]}"
                )


def _order(pair: Pair) -> str:
    """The reading that along one axis indices have the numbers of others; "" if they have not."""
    names = {"H": "head", "B": "document", "V": "token", "block_size": "position", "C": "channel"}
    letters, config = axes(pair.key), pair.case.config
    views = [(letter, pair.sound, pair.faulty, i) for i, letter in enumerate(letters)]
    if letters[-1:] == ("C",) and letters[0] == "B" and config.n_head > 1:
        sound, faulty = (pair.around.heads(x) for x in (pair.sound, pair.faulty))
        views.insert(0, ("H", sound, faulty, sound.ndim - 2))
    for letter, sound, faulty, axis in views:
        if letter not in names or sound.shape[axis] < 2 or sound.ndim < 2:
            continue
        a, b = (np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) for x in (sound, faulty))
        close = pair.loose * pair.moved + pair.noise * pair.size
        if a.size * len(a) > 1e7 or not (np.abs(a) > close).any():
            continue
        apart = np.abs(b[:, None] - a[None])
        if letter == "B":  # compare the positions that both documents have
            there = np.moveaxis(pair.there, axis, 0).reshape(len(a), -1)
            apart = np.where(there[:, None] & there[None], apart, 0.0)
        apart = apart.max(axis=2)
        own = np.diag(apart) <= close
        source = np.where(own, np.arange(len(a)), apart.argmin(axis=1))
        if (apart[np.arange(len(a)), source] <= close).all() and not own.all():
            word = names[letter]
            changed = np.flatnonzero(~own)
            if len(changed) > 4 and letter != "H":
                return (
                    f"{word}s in another order: {word} {changed[0]} has that of"
                    f" {source[changed[0]]}, and so on"
                )
            if letter == "H":
                return f"heads permuted: in the order {', '.join(map(str, source))}"
            pairs = ", ".join(f"{i} has that of {source[i]}" for i in changed)
            return f"{word}s exchanged: {word} {pairs}"
    return ""


def remembered(pair: Pair) -> Iterator[Guess]:
    """What the step before has left behind."""
    earlier = pair.before.get(pair.key) if pair.before else None
    if earlier is None or earlier.shape != pair.sound.shape:
        return
    what = "gradient" if pair.phase in DERIVED else "tensor"
    yield f"stale: the {what} of the step before", earlier
    yield f"the {what} {NOT_CLEARED}", pair.sound + earlier
    words = "stale: what the step before left where this one has zeros"
    yield words, np.where(pair.sound == 0, earlier, pair.sound)


def scaled(pair: Pair) -> Iterator[Guess]:
    """Every element times one number that has a name, or times a number of its position."""
    times = _coefficient(pair.faulty, pair.sound, pair.wrong)
    name = factor_name(pair, times) if times is not None and abs(times - 1) > 1e-9 else ""
    if times is not None and name:
        plain = {
            "2": "doubled: every element is twice what it should be",
            "-1": "the sign of every element is turned",
        }.get(name.partition(" (here")[0])
        yield plain or f"every element is multiplied by {name}", times * pair.sound
    if axes(pair.key)[:1] == ("B",) and "T" in axes(pair.key):
        a = pair.around
        n, t, p = a.n[:, None], a.position + 1, np.exp(-pair.sound_step["forward/loss_t"])
        own = {"n, the positions of its document": n + 0 * t, "1/n of its document": 1 / n + 0 * t,
               "t + 1, the positions so far": t, "1/(t + 1), of the positions so far": 1 / t,
               "its loss": -np.log(p), "its target's probability": p,
               "its target's probability squared": p**2,
               "1/(its target's probability)": 1 / p, "p / log(p) of its target": p / np.log(p),
               "B n, 1/its weight": len(n) * n + 0 * t, "its weight": a.weights}  # fmt: skip
        for what, factor in own.items():
            shaped = (
                factor[:, None, :, None]
                if "H" in axes(pair.key)
                else factor.reshape(*factor.shape, *[1] * (pair.sound.ndim - 2))
            )
            yield f"every position is multiplied by {what}", pair.sound * shaped


def parts_of_sums(pair: Pair) -> Iterator[Guess]:
    """Several parts of the sum with other coefficients; or a sum over documents or positions in
    which some do not count as they should."""
    parts = parts_of(pair)
    if 1 < len(parts) <= MOST_PARTS:
        found = _coefficients(pair, [part for _, part in parts])
        if found is not None:
            words = [
                f"{label} {_times(pair, k)}"
                for (label, _), k in zip(parts, found)
                if abs(k - 1) > pair.loose
            ]
            guess = sum(k * part for k, (_, part) in zip(found, parts))
            if len(words) <= 2 and all(words):
                yield " and ".join(words), guess
    for letter, word in (("B", "document"), ("T", "position")):
        yield from _some_of(pair, word, _by_index(pair, letter))


def _by_index(pair: Pair, letter: str) -> list[Array]:
    """What each document (B) or position (T) adds to a tensor; [] if it is no sum over them."""
    totals: list[Array] = []
    if letter in axes(pair.key) or not pair.calls:
        return totals
    for call in pair.calls:
        name = "dy" if "dy" in call.slots else "loss_t"
        slot = call.slots.get(name)
        if slot is None or letter not in slot.axes or slot.axes[0] != "B":
            return []
        axis = slot.axes.index(letter)
        count = slot.value.shape[axis]
        if not 1 < count <= MOST_PARTS:
            return []
        parts = [call.total(**{name: _only(slot.value, axis, i)}) for i in range(count)]
        totals = [a + b for a, b in zip(totals, parts)] if totals else parts
    return totals


def _only(x: Array, axis: int, index: int) -> Array:
    """The array with zeros at every other index of an axis."""
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    return x * (np.arange(x.shape[axis]) == index).reshape(shape)


def _some_of(pair: Pair, word: str, parts: list[Array]) -> Iterator[Guess]:
    """The sum over documents or positions with some left out, counted twice, or scaled."""
    count = len(parts)
    if not count:
        return
    order = np.argsort(pair.around.n, kind="stable") if word == "document" else np.arange(count)
    sums = [np.zeros_like(parts[0])]
    for i in order:
        sums.append(sums[-1] + parts[i])
    why = ""
    if pair.phase == "unwatched" and word == "document":
        why = "the gradients of micro-batches, or of ranks, are not added up: "
    for start, stop in combinations(range(count + 1), 2):
        if stop - start == count:
            continue
        listed = _and(word, sorted(order[start:stop].tolist()), count)
        some = sums[stop] - sums[start]
        if 2 * (stop - start) <= count:
            yield f"{why}only {listed} of {count} counted", some
            yield f"{why}not counted: {listed} of {count}", sums[-1] - some
        yield f"counted twice: {listed} of {count}", sums[-1] + some
    found = _coefficients(pair, parts)
    if found is None:
        return
    guess = sum(k * part for k, part in zip(found, parts))
    changed = [i for i, k in enumerate(found) if abs(k - 1) > pair.loose]
    missing = [i for i in changed if abs(found[i]) < pair.loose]
    if missing and len(missing) == len(changed):
        yield f"not counted: {_and(word, missing, count)} of {count}", guess
    elif len({round(float(found[i]), 6) for i in changed}) == 1 and len(changed) < count:
        times = factor_name(pair, float(found[changed[0]]))
        if times:
            yield f"counted {times} times: {_and(word, changed, count)} of {count}", guess


def _and(word: str, numbers: list[int], count: int) -> str:
    """The numbers in words: "documents 1 and 2", "the last position"."""
    if len(numbers) == 1:
        name = {0: "the first", count - 1: "the last"}.get(numbers[0])
        return f"{name} {word}" if name else f"{word} {numbers[0]}"
    if len(numbers) > 4:
        return f"{len(numbers)} {word}s"
    return f"{word}s {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _times(pair: Pair, k: float) -> str:
    if abs(k) < pair.loose:
        return "is missing"
    if abs(k - 2) < pair.loose:
        return "is there twice"
    if abs(k + 1) < pair.loose:
        return "has the wrong sign"
    name = factor_name(pair, k)
    return f"is multiplied by {name}" if name else ""


def _coefficient(target: Array, part: Array, where: Array) -> float | None:
    """The factor by which a part becomes the target, by least squares over the elements `where`."""
    x, y = part[where], target[where]
    square = float((x * x).sum())
    return float((x * y).sum()) / square if square > 0 else None


def _coefficients(pair: Pair, parts: list[Array]) -> Array | None:
    """The factors with which the parts add up to the faulty tensor; None if not determined."""
    there = pair.there
    matrix = np.array([np.broadcast_to(part, pair.sound.shape)[there] for part in parts]).T
    live = np.abs(matrix).max(axis=0) > 0
    if not live.any() or np.count_nonzero(np.abs(matrix).max(axis=1)) < live.sum() + 3:
        return None
    sizes = np.sqrt((matrix[:, live] ** 2).sum(axis=0))
    target = pair.faulty[there]
    found, _, rank, singular = np.linalg.lstsq(matrix[:, live] / sizes, target, rcond=1e-9)
    if rank < live.sum() or singular[-1] < 1e-6 * singular[0]:
        return None
    result = np.ones(len(parts))
    result[live] = found / sizes
    return result


def factor_name(pair: Pair, factor: float) -> str:
    """The names of a number in the configuration and the step, the likeliest first; "" if none."""
    tolerance = pair.loose * abs(factor)
    named = factors(pair)
    close = [name for name, value in named.items() if abs(factor - value) <= tolerance]
    also = f" (here also {', '.join(close[1:4])})" if close[1:] else ""
    return f"{close[0]}{also}" if close else ""


def factors(pair: Pair) -> Mapping[str, float]:
    """The numbers of the configuration and the step by name, the likeliest first."""
    config, (B, T) = pair.case.config, pair.around.real.shape
    D, C, H, V = config.head_dim, config.n_embd, config.n_head, pair.case.tokenizer.vocab_size
    sizes = {"D": D, "n_head": H, "C": C, "B": B, "T": T, "V": V, "n_layer": config.n_layer,
             "block_size": config.block_size, "4 (F / C)": 4, "sum of n": int(pair.around.n.sum()),
             "3": 3, "B T": B * T, "B - 1": B - 1, "T - 1": T - 1, "T + 1": T + 1}  # fmt: skip
    named: dict[str, float] = {"2": 2.0, "-1": -1.0, "1/2": 0.5}
    for name, size in sizes.items():
        if size > 1:
            base = f"({name})" if " " in name and "(" not in name else name
            named |= {f"sqrt({name})": sqrt(size), f"1/sqrt({name})": 1 / sqrt(size)}
            named |= {base: size, f"1/{base}": 1 / size}
    if H > 1:
        named |= {"sqrt(D)/sqrt(C)": sqrt(D / C)}
    b1, b2, n = config.beta1, config.beta2, pair.number
    if pair.phase in ("adam_m", "adam_v", "update", "params"):
        lr = learning_rate(n - 1, config)
        named |= {
            "beta1": b1, "beta2": b2, "1 - beta1": 1 - b1, "1 - beta2": 1 - b2,
            "1 + beta1": 1 + b1, "1 + beta2": 1 + b2,
            "1/(1 - beta1)": 1 / (1 - b1), "1/(1 - beta2)": 1 / (1 - b2),
            "lr_t": lr, "1/lr_t": 1 / lr if lr else 0.0,
            "the correction of m": 1 - b1**n, "the correction of v": 1 - b2**n,
            "1/(the correction of m)": 1 / (1 - b1**n), "1/(the correction of v)": 1 / (1 - b2**n),
            "the square root of the correction of v": sqrt(1 - b2**n),
        }  # fmt: skip
    factor = clipping(config, pair.sound_step)
    if factor < 1:
        named |= {"the clip factor": factor, "the clip factor squared": factor**2,
                  "1/(the clip factor)": 1 / factor, "the root of the clip factor": sqrt(factor),
                  "grad_clip": config.grad_clip, "1/grad_clip": 1 / config.grad_clip}  # fmt: skip
    named |= {"ln 2": log(2), "1/ln 2": 1 / log(2), "e": e, "1/4": 0.25}
    return {name: value for name, value in named.items() if abs(value - 1) > 1e-9}


def adam(pair: Pair) -> Iterator[Guess]:
    """Adam by a wrong form of its rule."""
    config, step = pair.case.config, pair.sound_step
    yield from of_adam(pair.phase, pair.name, pair.number, config, step, pair.before)


# the kinds of readings, those with the fewest changes first
KINDS = [
    adam,
    formulas,
    changed_parts,
    repeated_tokens,
    exchanged,
    read_again,
    moved_about,
    added,
    remembered,
    scaled,
    parts_of_sums,
]


# kinds of which only the first reading is told; later ones would say the same in other words
ONE_IS_ENOUGH = (changed_parts, moved_about, added, parts_of_sums)


# --- where no reading fits -----------------------------------------------------------------------


def description(pair: Pair, promised: str) -> str:
    """What can be said of numbers that no reading gives: their precision, factor or region."""
    sound, faulty = pair.sound[pair.there], pair.faulty[pair.there]
    if promised == "float64" and (words := single_precision(sound, faulty)):
        return words
    if np.count_nonzero(sound) >= 3:
        times = _coefficient(pair.faulty, pair.sound, pair.there)
        if times is not None and pair.fits(times * pair.sound) == ALL_OF_THEM:
            return f"every element is {times:.9g} times the reference's; no name for this factor"
        more = float(np.median(faulty - sound))
        if more and pair.fits(pair.sound + more) == ALL_OF_THEM:
            return f"every element is {more:.9g} more than it should be"
    sums = np.where(pair.there, pair.faulty, 0.0).sum(axis=-1) if pair.faulty.ndim else 0.0
    if pair.name.endswith("attn_weights"):
        rows = np.asarray(sums)[pair.there.any(axis=-1)]
        if (rows < 1 - pair.loose).any():
            return "rows sum to less than one: positions to come take part"
        if (rows > 1 + pair.loose).any():
            return "rows sum to more than one"
    return f"wrong {pair.where}" if pair.where else ""


def single_precision(sound: Array, faulty: Array) -> str:
    """The reading that numbers were rounded to float32 on the way; "" if they were not."""
    scale = np.abs(sound).max()
    error = faulty - sound
    rounded = np.array_equal(faulty, faulty.astype("float32")) and faulty.size > 2
    both_ways = 0.1 < (error > 0).mean() < 0.9 and faulty.size >= 16
    if (rounded and np.abs(error).max() < 1e-5 * scale) or (
        both_ways and 1e-9 * scale < np.abs(error).max() < 3e-7 * scale
    ):
        return "float32 where float64 was promised: the error is that of single precision"
    return ""
