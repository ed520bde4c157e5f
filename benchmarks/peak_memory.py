"""The highest resident memory of this process; imports nothing, for interpreters that have little."""

from __future__ import annotations

from pathlib import Path


def peak_memory() -> int:
    """Bytes, as Linux has counted since the program was started.

    Not ``getrusage``'s, which begins with what the process that started this one had.
    """
    status = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in status if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
