"""Logits read, and documents drawn, token by token: by the table, and with one fault.

A fault lies in the KV cache, in the position, in the probabilities that are computed from logits,
or in where a document ends. The logits and documents of a fault are computed from the parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from random import Random

import numpy as np

from crosscheck.cases import Case
from crosscheck.operations import Around, elementwise, row_mean
from crosscheck.trace import SAMPLES, TOP_K, Array, Step, part
from crosscheck.variants import Guess
from microgpt.config import Config
from microgpt.taps import ACTIVATIONS, taps

Order = Callable[[int], list[int]]  # which of n cached keys are looked at, and in which order


def _all(n: int) -> list[int]:
    return list(range(n))


def _latest(n: int) -> list[int]:
    return [n - 1] * n


def _newest_first(n: int) -> list[int]:
    return _all(n)[::-1]


@dataclass(frozen=True)
class Fault:
    """How a KV cache is filled and read; the defaults are right."""

    position: Callable[[int], int] = int
    keys: Order = _all
    values: Order = _all
    key: str = "k"  # the tap that goes into the cache as a key
    value: str = "v"  # the tap that goes into the cache as a value
    key_layers: bool = True  # whether every layer has a list of keys of its own
    value_layers: bool = True  # whether every layer has a list of values of its own


LOST = "of earlier positions are lost: the latest stands for all"
FAULTS = {
    "the position does not advance: wpe[0] throughout": Fault(position=lambda t: 0),
    "positions are one too high": Fault(position=lambda t: t + 1),
    "positions are one too low": Fault(position=lambda t: max(t - 1, 0)),
    f"the keys {LOST}": Fault(keys=_latest),
    f"the values {LOST}": Fault(values=_latest),
    f"the keys and values {LOST}": Fault(keys=_latest, values=_latest),
    "keys are kept newest first": Fault(keys=_newest_first),
    "values are kept newest first": Fault(values=_newest_first),
    "keys and values are one position apart": Fault(
        values=lambda n: [max(u - 1, 0) for u in range(n)]
    ),
    "the caches of all layers are one": Fault(key_layers=False, value_layers=False),
    "the keys of all layers lie in one list": Fault(key_layers=False),
    "the values of all layers lie in one list": Fault(value_layers=False),
}
for _words, _seen in {
    "the cache is lost: each position looks at itself alone": lambda n: [n - 1],
    "the first position is not in the cache": lambda n: _all(n)[1:] or [0],
    "the cache holds the last two positions only": lambda n: _all(n)[-2:],
    "a position's own key is not in the cache yet": lambda n: _all(n)[:-1] or [0],
}.items():
    FAULTS[_words] = Fault(keys=_seen, values=_seen)
for _other in ("q", "v", "attn_norm"):
    FAULTS[f"{_other} goes into the cache in place of k"] = Fault(key=_other)
for _other in ("q", "k", "attn_norm"):
    FAULTS[f"{_other} goes into the cache in place of v"] = Fault(value=_other)


class Reader:
    """A model that reads one document, a token at a time."""

    def __init__(self, config: Config, params: Step, fault: Fault) -> None:
        self.config, self.params, self.fault = config, params, fault
        self.keys: dict[str, list[Array]] = defaultdict(list)
        self.values: dict[str, list[Array]] = defaultdict(list)
        self.t = 0

    def read(self, token: int) -> Array:
        """The logits after this token, (V,)."""
        known: dict[str, Array] = dict(self.params)
        config, fault = self.config, self.fault
        for tap in taps(config).values():
            x = [known[name] for name in tap.operands]
            layer = tap.name.rpartition(".")[0]
            if tap.operation == "embedding":
                row = min(fault.position(self.t), len(x[1]) - 1)
                out = x[0][token] + x[1][row]
            elif tap.operation == "rmsnorm":
                out = x[0] * (row_mean(x[0] ** 2) + config.norm_eps) ** -0.5
            elif tap.operation in ("linear", "linear_residual"):
                out = x[1] @ x[0] + (x[2] if len(x) > 2 else 0)
            elif tap.operation == "scores":
                keys = self.keys[layer * fault.key_layers]
                keys.append(known[f"{layer}.{fault.key}"])
                out = np.einsum("hd,uhd->hu", self._heads(x[0]), self._seen(keys, fault.keys))
                out = out / sqrt(config.head_dim)
            elif tap.operation == "softmax":
                exps = np.exp(x[0] - x[0].max(axis=-1, keepdims=True))
                out = exps / exps.sum(axis=-1, keepdims=True)
            elif tap.operation == "weighted_sum":
                values = self.values[layer * fault.value_layers]
                values.append(known[f"{layer}.{fault.value}"])
                seen = self._seen(values, fault.values)
                n = min(x[0].shape[1], len(seen))  # keys and values, if there are more of one
                out = np.einsum("hu,uhd->hd", x[0][:, :n], seen[:n]).reshape(-1)
            elif tap.operation == "activation":
                out = elementwise(ACTIVATIONS[config.activation].value, x[0])
            else:
                break
            known[tap.name] = out
        self.t += 1
        return known["logits"]

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.config.n_head, -1)

    def _seen(self, cached: list[Array], order: Order) -> Array:
        return self._heads(np.array(cached))[order(len(cached))]


def read(a: Around, fault: Fault | None = None) -> Array:
    """(n, V): the logits of the first document, read with a fault or without."""
    reader = Reader(a.config, part(a.step, "entry"), fault or Fault())
    return np.array([reader.read(token) for token in a.token[0, : int(a.n[0])].tolist()])


def other_readings(a: Around) -> Iterator[Guess]:
    """The logits of the first document, read with each fault."""
    for words, fault in FAULTS.items():
        yield words, read(a, fault)


# --- drawing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """How a document is drawn; the defaults are right."""

    scaled: Callable[[Array, float], Array] = lambda logits, temperature: logits / temperature
    kept: Callable[[int], int] = int  # how many logits are kept for a top_k
    greedy: bool = True  # whether temperature 0, which is top_k = 1, has the fault of `kept` too
    smallest: bool = False  # whether the smallest logits are kept, not the largest
    end: str = "eos"  # the token that closes a document; "" for none
    longest: int = 0  # how many positions too many a document may have
    lost: int = 0  # draws lost at the beginning of each document; -1 for one for each prompt token
    likeliest: bool = False  # whether the likeliest token is taken, whatever the temperature is
    prompt: bool = True  # whether the prompt is read


DRAWS = {
    "the logits are multiplied by the temperature, not divided": Draw(scaled=lambda x, t: x * t),
    "the temperature has no effect": Draw(scaled=lambda x, t: x),
    "the temperature is squared": Draw(scaled=lambda x, t: x / t**2),
    "the root of the temperature divides the logits": Draw(scaled=lambda x, t: x / t**0.5),
    "top_k keeps one too many": Draw(kept=lambda k: k + 1),
    "top_k keeps one too many, except at temperature 0": Draw(kept=lambda k: k + 1, greedy=False),
    "top_k keeps one too few": Draw(kept=lambda k: max(k - 1, 1)),
    "top_k has no effect": Draw(kept=lambda k: 0),
    "top_k keeps the smallest logits": Draw(smallest=True),
    "BOS closes a document, not the closing token": Draw(end="bos"),
    "the closing token does not end a document": Draw(end=""),
    "documents end one position too early": Draw(longest=-1),
    "a draw is lost at the beginning of each document": Draw(lost=1),
    "a draw is made for every token of the prompt": Draw(lost=-1),
    "the likeliest token is taken, whatever the temperature is": Draw(likeliest=True),
    "the prompt is not read": Draw(prompt=False),
}


def other_draws(case: Case, key: str, number: int, step: Step) -> Iterator[Guess]:
    """The token ids of the drawn documents, for each fault of drawing or reading.

    number    which step it is, from 1
    """
    params = part(step, "params")
    for words, draw in DRAWS.items():
        yield words, _drawn(case, key, number, params, draw, Fault())
    for words, fault in FAULTS.items():
        yield words, _drawn(case, key, number, params, Draw(), fault)


def drawn_again(case: Case, key: str, number: int, step: Step) -> Array:
    """The token ids of the documents, drawn without a fault."""
    return _drawn(case, key, number, part(step, "params"), Draw(), Fault())


def _drawn(case: Case, key: str, number: int, params: Step, draw: Draw, fault: Fault) -> Array:
    """The token ids of the documents that crosscheck.trace.drawn draws, with a fault."""
    rng, tokenizer = Random(number - 1), case.tokenizer
    prompt = tokenizer.encode(case.chars[:2])[: case.config.block_size - 1]
    none: list[int] = []
    plain = [(none, case.temperature, 0)] * SAMPLES + [(prompt, case.temperature, 0)] * SAMPLES
    docs = [_document(case, params, rng, draw, fault, *settings) for settings in plain]
    if key == "sample/likeliest":
        greedy = [(none, case.temperature, TOP_K), (none, 0.0, 0)]
        docs = [_document(case, params, rng, draw, fault, *settings) for settings in greedy]
    longest = case.config.block_size + 1
    rows = [[*doc, *[-1] * (longest - len(doc))][:longest] for doc in docs]
    return np.array(rows)


def _document(
    case: Case,
    params: Step,
    rng: Random,
    draw: Draw,
    fault: Fault,
    prompt: Sequence[int],
    temperature: float,
    top_k: int,
) -> list[int]:
    """The token ids of one document, drawn with a fault."""
    tokenizer, V = case.tokenizer, case.tokenizer.vocab_size
    reader = Reader(case.config, params, fault)
    tokens = [tokenizer.bos, *prompt]
    end = {"eos": tokenizer.eos, "bos": tokenizer.bos}.get(draw.end, -1)
    for _ in range(draw.lost if draw.lost >= 0 else len(prompt)):
        rng.random()
    for position in range(case.config.block_size + draw.longest):
        if 0 < position <= len(prompt) and not draw.prompt:
            reader.t += 1
        else:
            logits = reader.read(tokens[position])
        if position < len(prompt):
            continue
        scaled = draw.scaled(logits, temperature) if temperature else logits
        most = 1 if temperature == 0 else top_k
        if most and (temperature or draw.greedy):
            most = draw.kept(most)
        most = 1 if draw.likeliest else most
        order = np.argsort(scaled if draw.smallest and top_k else -scaled, kind="stable")
        chances = np.zeros(V)
        kept = order[: most or V]
        chances[kept] = np.exp(scaled[kept] - scaled[kept].max())
        token = rng.choices(range(V), weights=(chances / chances.sum()).tolist())[0]
        if token == end:
            break
        tokens.append(token)
    return tokens
