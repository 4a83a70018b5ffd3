"""Fixtures of several test files: the golden figures, a small data set, a small run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from safetensors.numpy import save_file

from microgpt.config import Config
from microgpt.runs.checkpoint import Checkpoint, checksum, read_tensors
from microgpt.settings import FIXTURES, load_config
from microgpt.train import new_run

# fewer documents than steps, one of a single character, two that are longer than the context
WORDS = ("emma", "zo\u00e9", "a", "maximilian", "ana", "mia", "emma", "evangeline", "noam")

# two layers and two heads: a step takes milliseconds; large weights make errors visible
TINY = {
    "n_layer": "2",
    "n_embd": "4",
    "n_head": "2",
    "block_size": "5",
    "init_std": "0.5",
    "init_std_residual": "0.5",
    "steps": "12",
    "learning_rate": "0.05",
    "num_samples": "6",
    "temperature": "1.0",
}

Edit = Callable[[dict[str, Any], dict[str, str]], object]  # of tensors and metadata


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m quick`, only the files that say so: to import them all takes seconds."""
    if config.getoption("markexpr") != "quick" or not collection_path.match("test_*.py"):
        return None
    return "pytest.mark.quick" not in collection_path.read_text(encoding="utf-8") or None


settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """The figures that the unchanged original program printed on the embedded names."""
    return json.loads((FIXTURES / "golden" / "microgpt-names.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of nine short documents."""
    path = tmp_path_factory.mktemp("data") / "words.txt"
    path.write_text("\n".join(WORDS), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny(words: Path) -> dict[str, str]:
    """Fields that replace those of the preset, as typed on the command line."""
    return {**TINY, "dataset": str(words)}


@pytest.fixture(scope="session")
def tiny_config(tiny: dict[str, str]) -> Config:
    return load_config(overrides=tiny)


@pytest.fixture
def trained(
    tiny_config: Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Checkpoint]]:
    """Train the small model with a backend: its run directory, and the checkpoint in memory."""

    def train(backend: str) -> tuple[Path, Checkpoint]:
        out = tmp_path_factory.mktemp(backend)
        run = new_run(tiny_config, backend, out, backend)
        assert run.train(lambda *_: None)
        return out, run.checkpoint()

    return train


@pytest.fixture(scope="session")
def rewrite() -> Callable[[Path, Path, Edit], None]:
    """Copy a checkpoint, with edited tensors and metadata, and the checksum of the edited file."""

    def copy(source: Path, target: Path, edit: Edit) -> None:
        tensors, metadata = read_tensors(source)
        edit(tensors, metadata)
        if "sha256" in metadata:
            metadata["sha256"] = checksum(tensors, metadata)
        save_file(tensors, target, metadata)

    return copy
