"""What the two GPTs share: configuration, tokens, data, files, the training loop, the shell."""

import os

__version__ = "0.1.0"

# For NumPy's OpenBLAS, which reads it when it is loaded. Threads make products of this size slower,
# and many times slower where another program keeps a core busy; --cores shares batches instead.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
