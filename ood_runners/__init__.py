"""Out-of-distribution and visual anomaly detection as a BentoML service."""

import os
import sys

__version__ = "0.1.0"

# `import openvino` reports to a web analytics host and writes into the user's home unless its telemetry package is
# absent (its own fallback then). What looks at pictures of a line or a patient calls nobody.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

# An OpenMP thread that waits spins for milliseconds by default. Where several processes share the cores, as the
# runners do, each then burns the time that the others need: training the vae beside one other process on two cores
# went from 60 s to 3 s an epoch with this, and from 2.3 s to 2.6 s alone. Must be set before torch or faiss load.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# NumPy's BLAS likewise: small products beside other work took half the time with threads that go to sleep at once.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
