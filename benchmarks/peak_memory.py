"""The highest resident memory of this process; imports nothing, for interpreters that have little."""

from __future__ import annotations

import threading
import time
from pathlib import Path

EVERY_S = 0.05


def peak_memory() -> int:
    """Bytes, as Linux has counted since the program was started.

    Not ``getrusage``'s, which begins with what the process that started this one had.
    """
    status = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in status if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


class OwnMemory:
    """The highest resident memory that is this process's own, from now on, as looked at twenty times a second.

    What is left out are mapped files, such as the features of a folder, which the system drops where memory is short.
    """

    def __init__(self) -> None:
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text().splitlines()
            [line] = [line for line in status if line.startswith("RssAnon:")]
            self.peak = max(self.peak, int(line.split()[1]) * 1024)
            time.sleep(EVERY_S)
