"""How many cores this process may use: what its threads are counted by."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


@cache
def available_cores(cgroup: Path = CGROUP) -> int:
    """Cores of the process's affinity, or of its container's CPU limit if that is less; at least 1.

    Libraries count the machine's cores. In a container with two of sixty-four, their sixty-four threads would be
    stopped for most of each period of the scheduler. A limit of 1.5 cores counts as 2: the half is worth having.
    """
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), _limit(cgroup))))


def _limit(cgroup: Path) -> float:
    """The CPU limit of the container in cores, infinite where there is none (cgroup v2, or v1)."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in files).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1") and int(period) > 0:
            return int(quota) / int(period)
    return math.inf
