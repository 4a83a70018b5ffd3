"""The same GPT in NumPy, every backward pass derived by hand."""
