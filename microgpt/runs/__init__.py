"""A run on disk: its directory, checkpoint, lock, signals, memory."""
