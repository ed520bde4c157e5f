"""What each process of the service does when it starts."""

from __future__ import annotations

from ood_runners.settings import settings
from ood_runners.telemetry import logs, paths

paths.install()  # when a service is imported, which is before its application is made


def start() -> None:
    """Set up the log of this process; to be called when its service is made."""
    logs.configure(settings.log_format)
