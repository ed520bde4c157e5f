"""Out-of-distribution and visual anomaly detection as a BentoML service."""

__version__ = "0.1.0"
