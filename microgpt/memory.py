"""How much memory a file or a run would take, held against what the machine has."""

from __future__ import annotations

import os
from pathlib import Path

from microgpt.errors import MicrogptError


def machine_memory() -> float:
    """The bytes of memory that this machine has; infinite where nobody knows."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, others not every name
        return float("inf")


def check_size(path: Path, times: int = 1) -> None:
    """Refuse a file that would not fit into memory so many times."""
    size, memory = path.stat().st_size * times, machine_memory()
    if size > memory:
        raise MicrogptError(
            f"{path}: to read it would take {gigabytes(size)} of memory, and this machine has"
            f" {gigabytes(memory)}"
        )


def gigabytes(size: float) -> str:
    """A number of bytes in words."""
    return f"{size / 1e9:,.1f} GB"
