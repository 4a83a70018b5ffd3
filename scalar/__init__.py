"""One GPT in plain Python: a graph of Values."""

from scalar.value import Value

__all__ = ["Value"]
