"""What the two GPTs share: configuration, tokens, data, files, the training loop, the shell."""

from __future__ import annotations

import os

from microgpt.errors import MicrogptError

TYPE_CHECKING = False  # known to type checkers by its name; typing takes a moment to import
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.2.0"
__all__ = ["GPT", "MicrogptError"]

# For NumPy's OpenBLAS, which reads it when it is loaded. Threads make products of this size slower,
# and many times slower where another program keeps a core busy; --cores shares batches instead.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def __getattr__(name: str) -> Any:
    """GPT is imported when it is asked for, since NumPy takes a moment."""
    if name == "GPT":
        from microgpt.gpt import GPT

        return GPT
    raise AttributeError(f"module 'microgpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
