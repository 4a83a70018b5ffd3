"""The atlas: a page of every tensor of one document, in both implementations, there and back."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np

from crosscheck.additions import no_search_for_cycles
from crosscheck.cases import Case
from crosscheck.document import Document
from crosscheck.stops import Detail, Stops
from crosscheck.trace import Array
from microgpt.backend import State, Tensors, fresh_state, load_backend
from microgpt.config import Config
from microgpt.data import IN_PYTHON, TEXTS_ARE_GONE, digest, load_documents, nth, parts
from microgpt.errors import MicrogptError
from microgpt.init import init_params
from microgpt.pages.page import render
from microgpt.pages.sources import Source
from microgpt.runs.checkpoint import load_checkpoint
from microgpt.settings import DEFAULT_PRESET, load_config
from microgpt.tokenizer import Tokenizer, build_tokenizer
from microgpt.train import batch, learning_rate

TEXT = "emma"
LARGEST = 2_000_000  # bytes of a page
DETAILS = (Detail(12_000, 16, 256), Detail(4_000, 8, 96), Detail(0, 4, 32))  # most first


def atlas(case: Case, state: State, origin: str, update: bool = False) -> str:
    """The page for a model and the first document of a case, with as many details as fit.

    origin    where the model comes from, in words
    update    show the model after this step's update, too

    Raises MicrogptError if the graph or the page would be too large, or a number is not finite.
    """
    try:
        with np.errstate(all="ignore"), no_search_for_cycles():  # Document refuses infinities
            made = Stops(Document(case, state, update))
    except FloatingPointError as error:
        raise MicrogptError(
            f"{origin}: {error}, so there is nothing to draw; choose an earlier --step, or a run"
            " with a smaller --learning-rate or --init-std"
        ) from None
    for made.detail in DETAILS:
        page = drawn(made, origin)
        if len(page.encode()) < LARGEST:
            return page
    raise MicrogptError(
        f"{origin}: {made.config.n_layer} layers are more than a page of {LARGEST:,} bytes can"
        " show; take a shorter --text, or a smaller model"
    )


def drawn(made: Stops, origin: str) -> str:
    """The page with these stops, one for each tensor."""
    value = Source("scalar/value.py")
    stops = list(made)
    (example,) = (made.example(stop) for stop in stops if stop.id == "dlayer0.k")
    return render(
        "atlas.html.j2",
        title=f"Atlas of {origin}",
        origin=origin,
        made=made,
        document=made.document,
        stops=stops,
        example=example,
        engine=value.highlighted(value.body("backward"), {}),
        apart=max(stop.apart for stop in stops),
        losses=[float(step["forward/loss"]) for step in (made.vectorized, made.after) if step],
        paths=[source.path for source in made.sources],
    )


def of_run(path: Path | None, text: str | None, step: int | None) -> str:
    """The page for a run.

    path    of the run; None: the default preset
    text    the document; None: that of the step, or one that the model can read
    step    show the model before and after this step; None: as the run ended

    Raises MicrogptError if there is no such step, or the model does not know a character.
    """
    held = load_checkpoint(path) if path else None
    config = held.config if held else load_config()
    origin = path.resolve().name if path else f"the preset {DEFAULT_PRESET}"
    if step is not None and not 1 <= step <= config.steps:
        raise MicrogptError(f"--step: expected 1 to {config.steps:,}, got {step:,}")
    if held and step is None:
        tokenizer, state, document = held.tokenizer, held.state, ""
    else:
        done = config.steps if step is None else step - 1
        tokenizer, state, document = _trained(config, done, held.documents if held else "")
    if text is None:
        known = set(TEXT) <= set(tokenizer.chars)
        text = document if step else TEXT if known else _known_document(config, tokenizer)
    tokenizer.encode(text)
    steps = f"{state.updates:,} step{'' if state.updates == 1 else 's'}"
    where = f"after {steps}" if step is None else f"before and after step {step:,}"
    params, m, v = (_double(named) for named in (state.params, state.m, state.v))
    state = State(params, m, v, state.updates)
    case = Case(
        name="atlas",
        why="to be looked at",
        config=config,
        chars="".join(tokenizer.chars),
        batches=[[text]],
        params=params,
    )
    return atlas(case, state, f"{origin}, {where}", update=step is not None)


def _double(named: Tensors) -> dict[str, Array]:
    return {name: np.array(tensor, "float64") for name, tensor in named.items()}


def _trained(config: Config, steps: int, known: str) -> tuple[Tokenizer, State, str]:
    """A model trained for some steps from the beginning, and the first document of the next step.

    known    the digest of the documents that the run was trained on; "" without a run
    """
    if config.dataset == IN_PYTHON:
        raise MicrogptError(f"{TEXTS_ARE_GONE}; leave --step out")
    rng = Random(config.seed)
    documents = load_documents(config.dataset, config.documents)
    rng.shuffle(documents)
    if known and digest(documents) != known:
        raise MicrogptError(f"{config.dataset}: has changed since the run; leave --step out")
    tokenizer = build_tokenizer("".join(documents), config)
    params = init_params(config, tokenizer.vocab_size, rng)
    backend = load_backend("vectorized", replace(config, cores=1), fresh_state(params))
    training, _ = parts(documents, config)
    try:
        with np.errstate(all="ignore"):
            for step in range(steps):
                backend.forward(batch(step, training, tokenizer, config))
                backend.backward()
                backend.update(learning_rate(step, config))
    except FloatingPointError as error:
        raise MicrogptError(f"step {step + 1}: {error}; choose an earlier --step") from None
    return tokenizer, backend.state(), nth(training, steps * config.batch_size)


def _known_document(config: Config, tokenizer: Tokenizer) -> str:
    """A document of characters that the model knows: the first of its data set, if possible."""
    with suppress(MicrogptError):
        first = load_documents(config.dataset)[0]
        if set(first) <= set(tokenizer.chars):
            return first
    return "".join(tokenizer.chars[:4])
