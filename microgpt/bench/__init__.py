"""The bench: backends and opponents, timed by turns."""
