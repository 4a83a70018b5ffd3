"""What the two GPTs share: configuration, tokens, data, files, the training loop, the shell."""

__version__ = "0.1.0"
