"""One GPT in plain Python: a graph of Values."""
