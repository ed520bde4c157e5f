"""Out-of-distribution and visual anomaly detection as a BentoML service."""

import sys

__version__ = "0.1.0"

# `import openvino` reports to a web analytics host and writes into the user's home unless its telemetry package is
# absent (its own fallback then). What looks at pictures of a line or a patient calls nobody.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
