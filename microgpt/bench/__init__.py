"""The bench: backends and opponents, timed in turn."""
