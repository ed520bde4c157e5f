"""What each process of the service does when it starts."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil

from ood_runners.settings import settings
from ood_runners.telemetry import logs, paths

paths.install()  # when a service is imported, which is before its application is made


def start() -> None:
    """Set up the log and the metrics of this process; to be called when its service is made."""
    logs.configure(settings.log_format)
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder:
        forget_killed(Path(folder))


def forget_killed(folder: Path) -> None:
    """Drop what killed processes of this server counted as going on.

    A process that ends takes its own requests in progress out of the sum; one that is killed leaves them there.
    """
    from prometheus_client import multiprocess  # only now has BentoML said where

    for pid in {int(file.stem.rpartition("_")[2]) for file in folder.glob("gauge_live*_*.db")}:
        if not psutil.pid_exists(pid):
            with suppress(FileNotFoundError):  # another process is at it as well
                multiprocess.mark_process_dead(pid, str(folder))
