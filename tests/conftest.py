"""Set before NumPy is imported: tests run in parallel, so each process keeps to one thread and all share one cache."""

import os
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("BESPOKE_CACHE", str(Path(__file__).resolve().parent.parent / ".bespoke_cache"))
