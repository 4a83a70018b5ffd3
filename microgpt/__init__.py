"""What the two GPTs share: configuration, tokens, data, files, the training loop, the shell."""

from __future__ import annotations

import os

from microgpt.errors import MicrogptError

TYPE_CHECKING = False  # type checkers read it as True; importing `typing` takes time
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.2.0"
__all__ = ["GPT", "MicrogptError"]

# NumPy's OpenBLAS reads this variable when it is loaded. Threads make products of this size slower,
# and many times slower where another program keeps a core busy; --cores shares batches instead.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def __getattr__(name: str) -> Any:
    """GPT, imported on first use, because importing NumPy takes time."""
    if name == "GPT":
        from microgpt.gpt import GPT

        return GPT
    raise AttributeError(f"module 'microgpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
