"""The Python interface to one GPT and both implementations; docs/python.md shows every call."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any
from warnings import warn

import numpy as np

from microgpt.backend import BACKENDS, Backend, State, drawing, fresh_state, load_backend
from microgpt.config import Config
from microgpt.data import IN_PYTHON, cropped, digest, load_documents, located, parts
from microgpt.errors import MicrogptError, shortened
from microgpt.evaluate import evaluation
from microgpt.init import init_params
from microgpt.runs.checkpoint import (
    FILE_NAME,
    Checkpoint,
    load_checkpoint,
    not_finite,
    save_checkpoint,
)
from microgpt.runs.memory import check_memory
from microgpt.settings import checked, load_config, typed, typed_fields
from microgpt.tokenizer import Tokenizer, build_tokenizer, prompt_ids
from microgpt.train import batch, learning_rate

REPR_LINES = 30  # at most


class TensorCopies(Mapping[str, Any]):
    """Read-only copies of arrays, by name. To change a model, call `set_params` or `set_grads`."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._arrays = {name: np.array(tensor) for name, tensor in tensors.items()}
        for array in self._arrays.values():
            array.flags.writeable = False

    def __getitem__(self, name: str) -> Any:
        if name in self._arrays:
            return self._arrays[name]
        raise MicrogptError(f"there is no tensor {shortened(name)}{meant(name, self)}")

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __setitem__(self, name: str, tensor: object) -> None:
        raise MicrogptError(
            f"{shortened(name)}: these tensors are copies, and writing to them would change nothing"
            " in the model; use set_params({name: array}), or set_grads"
        )

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        lines = [f"{name:{width}}  {array.shape}" for name, array in self.items()]
        return "\n".join([*lines[:REPR_LINES], ".."] if len(lines) > REPR_LINES else lines)


class GPT:
    """A model and its training documents.

    data       names, pride, makemore, the path of a text file, or a list of texts; by default the
               data set of the configuration
    config     a preset, or the path of a YAML file
    backend    vectorized or scalar
    fields     what differs from the configuration, such as n_layer=2

    Raises MicrogptError, as every method does, for mistakes that the caller can mend.
    """

    _watched: Backend | None

    def __init__(
        self,
        data: str | Iterable[str] | None = None,
        config: str = "microgpt",
        *,
        backend: str = "vectorized",
        **fields: Any,
    ) -> None:
        given = typed_fields({name: plain(value) for name, value in fields.items()}, "GPT")
        if data is not None and "dataset" in given:
            raise MicrogptError("GPT: data and dataset are both given; leave one out")
        settings = checked({**asdict(load_config(str(config))), **given})
        if "cores" not in fields:  # several processes only where the caller names `cores`
            settings = replace(settings, cores=1)
        texts, settings = _texts(data, settings)
        if settings.documents == "lines" and len(said := cropped(texts, settings.window)) > 1:
            warn(f"{said[0]}; to learn all of it: documents='windows'", stacklevel=2)
        rng = Random(settings.seed)
        rng.shuffle(texts)
        tokenizer = build_tokenizer("".join(texts), settings)
        _check_backend(backend)
        check_memory(settings, tokenizer.vocab_size, texts, backend)
        self._set_documents(texts, settings)
        params = init_params(settings, tokenizer.vocab_size, rng)
        self._set_model(settings, tokenizer, fresh_state(params), rng, backend)

    @classmethod
    def load(
        cls,
        path: str | Path,
        data: str | Iterable[str] | None = None,
        *,
        backend: str = "vectorized",
    ) -> GPT:
        """The model of a checkpoint or a run directory; the data set is read on first use."""
        _check_backend(backend)
        held = load_checkpoint(_path(path, "GPT.load"))
        dtype = "float64" if backend == "scalar" else held.config.dtype
        config = replace(held.config, cores=1, dtype=dtype)
        gpt: GPT = cls.__new__(cls)
        gpt._digest, gpt._parts = held.documents, None
        gpt._set_model(config, held.tokenizer, held.state, held.rng, backend)
        if data is not None:
            texts, gpt.config = _texts(data, config)
            Random(config.seed).shuffle(texts)
            gpt._set_documents(texts, gpt.config)
        return gpt

    def save(self, path: str | Path) -> Path:
        """Write a checkpoint, which `microgpt sample` and `GPT.load` read; returns its path."""
        path = _path(path, "save")
        path = path / FILE_NAME if path.is_dir() else path
        config = replace(self.config, steps=max(self.config.steps, self.updates))
        state = self._backend.state()
        try:
            save_checkpoint(
                path, Checkpoint(config, self.tokenizer, state, self._rng, self._digest)
            )
        except FloatingPointError as error:
            raise MicrogptError(f"save: {error}; nothing was written") from None
        return path

    # a step of training

    def forward(self, documents: Any = None) -> float:
        """The loss of a batch, texts or lists of token ids; by default the next training batch."""
        docs = self._tokens(documents)
        self._stage, self._watched = "", None
        try:
            loss = float(self._backend.forward(docs))
        except ArithmeticError as error:
            raise MicrogptError(f"forward: {error.args[-1]}; the weights are too large") from None
        self._stage, self._docs = "forward", docs
        return loss

    def backward(self) -> None:
        """Find the gradient of the loss of the latest forward pass."""
        if self._stage != "forward":
            done = "has been called already" if self._stage else "needs a forward pass"
            raise MicrogptError(f"backward: {done}; call forward(documents) first")
        self._stage = ""
        with np.errstate(all="ignore"):  # gradients that overflow show in the next loss
            self._backend.backward()
        self._stage = "backward"

    def update(self, lr: float | None = None) -> None:
        """One update by Adam; the learning rate is by default that of the schedule."""
        self._need("update", "backward")
        if lr is None and self.updates >= self.config.steps:
            raise MicrogptError(
                f"update: all {self.config.steps:,} steps of the schedule are done; give a learning"
                " rate, as in update(lr=0.001), or make a model with more steps"
            )
        lr_t = learning_rate(self.updates, self.config) if lr is None else _rate(lr)
        self._stage, self._watched = "", None
        with np.errstate(all="ignore"):  # weights that overflow show in the next loss
            self._backend.update(lr_t)
        self.updates += 1

    def step(self, documents: Any = None, lr: float | None = None) -> float:
        """forward, backward and update; returns the loss before the update."""
        if lr is not None:
            _rate(lr)
        loss = self.forward(documents)
        self.backward()
        self.update(lr)
        return loss

    # parameters, gradients, intermediates

    @property
    def params(self) -> TensorCopies:
        """The parameters by name."""
        return TensorCopies(self._backend.state().params)

    @property
    def grads(self) -> TensorCopies:
        """The derivative of the loss with respect to each parameter; void after the update."""
        self._need("grads", "backward")
        return TensorCopies(self._backend.grads())

    @property
    def taps(self) -> TensorCopies:
        """The intermediates of the latest forward pass, zero after the end of a document."""
        self._need("taps", "forward")
        return TensorCopies(self._watching().taps())

    @property
    def dtaps(self) -> TensorCopies:
        """The derivative of the loss with respect to each tap."""
        self._need("dtaps", "backward")
        watching = self._watching()
        if watching is not self._backend:
            watching.backward()
        return TensorCopies(watching.dtaps())

    def set_params(self, tensors: Mapping[str, Any]) -> None:
        """Replace the parameters of these names by these tensors."""
        state = self._backend.state()
        params = {**state.params, **self._checked(tensors, "set_params")}
        self._set_model(self.config, self.tokenizer, replace(state, params=params), self._rng,
                    self.backend)  # fmt: skip

    def set_grads(self, tensors: Mapping[str, Any]) -> None:
        """Replace the gradients of these names by these tensors; update then uses them."""
        self._need("set_grads", "backward")
        self._backend.set_grads({**self._backend.grads(), **self._checked(tensors, "set_grads")})

    # evaluation and sampling

    def evaluate(self, documents: Any = None) -> float:
        """The mean loss over texts; by default the held-out documents."""
        texts = self.held_out if documents is None else documents
        if documents is None and not texts:
            raise MicrogptError("evaluate: nothing was held out of training; give texts")
        if documents is not None:
            texts = _items(documents)
            self._tokens(texts)
        if not all(isinstance(text, str) for text in texts):
            raise MicrogptError("evaluate: expected texts; for token ids there is forward")
        try:
            return evaluation(self._backend, texts, self.tokenizer, self.config).loss
        except ArithmeticError as error:
            raise MicrogptError(f"evaluate: {error.args[-1]}") from None

    def sample(
        self,
        num: int = 1,
        prompt: str = "",
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> list[str]:
        """Texts drawn from the model; without a seed, every call draws different texts.

        temperature    divides the logits; 0: the likeliest token each time
        top_k          draw from the top_k likeliest tokens; 0: from all
        """
        if temperature is None:
            temperature = self.config.temperature
        temperature = typed("temperature", plain(temperature), "sample: temperature")
        top_k = self.config.top_k if top_k is None else top_k
        top_k = typed("top_k", plain(top_k), "sample: top_k")
        num = typed("num_samples", plain(num), "sample: num")
        if not isinstance(prompt, str):
            raise MicrogptError(f"sample: prompt: expected a text, got {shortened(prompt)}")
        start = prompt_ids(prompt, self.tokenizer, self.config, "sample: prompt")
        rng = self._rng if seed is None else Random(typed("seed", plain(seed), "sample: seed"))
        with drawing("sample: "):
            drawn = self._backend.sample(self.tokenizer, rng, num, temperature, start, top_k)
        return [self.tokenizer.decode(ids) for ids in drawn]

    @property
    def training(self) -> Any:
        """The training documents, shuffled; or windows of a text."""
        return self._split()[0]

    @property
    def held_out(self) -> list[str]:
        """The documents that are kept from training."""
        return self._split()[1]

    def __repr__(self) -> str:
        c, numbers = self.config, sum(array.size for array in self.params.values())
        return (
            f"GPT({self.backend}, {c.n_layer} x {c.n_embd} with {c.n_head} heads, context"
            f" {c.block_size}, vocabulary {self.tokenizer.vocab_size}, {numbers:,} parameters,"
            f" {self.updates:,} updates)"
        )

    # private

    def _set_model(
        self, config: Config, tokenizer: Tokenizer, state: State, rng: Random, backend: str
    ) -> None:
        self.config, self.tokenizer, self.backend = config, tokenizer, backend
        self.updates = state.updates
        self._rng = rng
        self._stage = ""  # forward or backward, if done since the latest change of parameters
        self._watched = None
        self._backend = load_backend(backend, config, state)

    def _set_documents(self, texts: list[str], config: Config) -> None:
        self._parts: Any = parts(texts, config)
        self._digest = digest(texts)

    def _split(self) -> Any:
        if self._parts is None:  # a loaded model reads its data set here
            if self.config.dataset == IN_PYTHON:
                raise MicrogptError(
                    "the documents of this model are not in its checkpoint; give some, as in"
                    " step(documents), or all, as in GPT.load(path, data)"
                )
            texts = load_documents(self.config.dataset, self.config.documents)
            Random(self.config.seed).shuffle(texts)
            if digest(texts) != self._digest:
                raise MicrogptError(
                    f"{self.config.dataset}: has changed since this model was trained; give its"
                    " data, as in GPT.load(path, data)"
                )
            self._set_documents(texts, self.config)
        return self._parts

    def _need(self, what: str, stage: str) -> None:
        if self._stage not in ("backward", stage):
            after = "backward()" if stage == "backward" and self._stage else "forward(documents)"
            also = " and backward()" if stage == "backward" and not self._stage else ""
            raise MicrogptError(
                f"{what}: call {after}{also} first; an update or new parameters make them void"
            )

    def _watching(self) -> Backend:
        """A backend that has kept all taps of the latest batch."""
        if self.backend == "scalar":  # keeps its taps anyway
            return self._backend
        if self._watched is None:
            config = replace(self.config, cores=1)
            self._watched = load_backend(self.backend, config, self._backend.state(), watch=True)
            self._watched.forward(self._docs)
        return self._watched

    def _tokens(self, documents: Any) -> list[list[int]]:
        """The token ids of documents, each of which fits into the context."""
        if documents is None:
            return batch(self.updates, self.training, self.tokenizer, self.config)
        items = _items(documents)
        return [self._document(item, f"document {i}") for i, item in enumerate(items, 1)]

    def _document(self, item: Any, where: str) -> list[int]:
        longest, V = self.config.max_tokens, self.tokenizer.vocab_size
        if isinstance(item, str):
            if len(item) > self.config.window:
                raise MicrogptError(
                    f"{where}: {shortened(item, 20)} has {len(item):,} characters, and the context"
                    f" takes {self.config.window:,}; cut it, or take a larger block_size"
                )
            return self.tokenizer.document(item, longest)
        try:
            ids = [] if isinstance(item, (bytes, Mapping)) else [operator.index(i) for i in item]
        except TypeError:
            ids = []
        if len(ids) < 2:
            raise MicrogptError(
                f"{where}: expected a text, or two token ids or more, got {shortened(item)}"
            )
        for token in ids:
            if not 0 <= token < V:
                raise MicrogptError(
                    f"{where}: the token id {shortened(token)} is outside the vocabulary, which"
                    f" has 0 to {V - 1}"
                )
        if len(ids) > longest:
            raise MicrogptError(
                f"{where}: has {len(ids):,} tokens, and the context takes {longest:,}; cut it, or"
                " take a larger block_size"
            )
        return ids

    def _checked(self, tensors: Any, where: str) -> dict[str, Any]:
        """The caller's tensors as arrays; MicrogptError unless names and shapes are known."""
        if not isinstance(tensors, Mapping):
            raise MicrogptError(f"{where}: expected tensors by name, got {shortened(tensors)}")
        params = self._backend.state().params
        found: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if name not in params:
                raise MicrogptError(
                    f"{where}: there is no parameter {shortened(name)}{meant(name, params)}"
                )
            try:
                if np.iscomplexobj(tensor):
                    raise TypeError
                found[name] = np.array(tensor, float)
            except (TypeError, ValueError, OverflowError):
                raise MicrogptError(f"{where}: {name}: expected rows of real numbers") from None
            if found[name].shape != np.shape(params[name]):
                raise MicrogptError(
                    f"{where}: {name}: expected the shape {np.shape(params[name])}, got"
                    f" {found[name].shape}"
                )
        if not_finite(found):
            raise MicrogptError(f"{where}: {not_finite(found)}: is not finite everywhere")
        return found


def _items(documents: Any) -> list[Any]:
    """The documents of a batch as a list; a single text is a batch of one."""
    try:
        items = [documents] if isinstance(documents, str) else list(documents)
    except TypeError:
        raise MicrogptError(f"expected a list of documents, got {shortened(documents)}") from None
    if not items:
        raise MicrogptError("an empty batch has no loss; give one document or more")
    return items


def meant(name: object, names: Iterable[str]) -> str:
    """The end of an error about an unknown name: the closest known name, or some of them."""
    known = list(names)
    ends = [full for full in known if full.endswith(f".{name}")]
    close = ends or difflib.get_close_matches(str(name)[:80], known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known[:4])}, .."


def plain(value: Any) -> Any:
    """A NumPy number as a Python number; any other value as it is."""
    return value.item() if isinstance(value, np.generic) else value


def _check_backend(name: object) -> None:
    if name not in BACKENDS:
        raise MicrogptError(f"backend: expected {' or '.join(BACKENDS)}, got {shortened(name)}")


def _path(path: Any, where: str) -> Path:
    if not isinstance(path, (str, Path)) or not str(path) or "\0" in str(path):
        raise MicrogptError(f"{where}: expected a path, got {shortened(path)}")
    return Path(path)


def _rate(lr: Any) -> float:
    rate: float = typed("learning_rate", plain(lr), "lr")
    return rate


def _texts(data: Any, config: Config) -> tuple[list[str], Config]:
    """The documents that `data` stands for, and the configuration with their data set's name."""
    if data is None or isinstance(data, (str, Path)):
        dataset = config.dataset if data is None else str(data)
        texts = load_documents(dataset, config.documents)
        return texts, replace(config, dataset=located(dataset))
    if isinstance(data, (set, frozenset)):
        raise MicrogptError("data: a set comes in another order each time; give a list")
    try:
        texts = list(data)
    except TypeError:
        texts = [data]
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise MicrogptError(f"data: expected a name, a path or texts, got {shortened(wrong)}")
    if not any(texts):
        raise MicrogptError("data: there is no text in it")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise MicrogptError(f"data: {error.object[error.start]!r} is no character") from None
    if config.documents == "windows":
        texts = ["\n".join(texts)]
    return texts, replace(config, dataset=IN_PYTHON)
