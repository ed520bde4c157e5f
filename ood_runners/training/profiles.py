"""`fit --profile`: what a version may cost, as a table; and the largest memory bank that fits into a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_runners.detectors import MemoryBank
from ood_runners.errors import BadParameter, DataError
from ood_runners.features import Features

MB = 1e6


@dataclass(frozen=True)
class Profile:
    """Picture size (height, width) in pixels, entries of the memory bank, and detectors that are not fitted."""

    size: tuple[int, int]
    bank: int
    leave_out: frozenset[str] = frozenset()


# The one place for these numbers; docs/accuracy.md says what they rest on.
PROFILES = MappingProxyType(
    {
        "fast": Profile((224, 224), 2_000, frozenset({"vae"})),
        "balanced": Profile((224, 224), 10_000),
        "accurate": Profile((224, 224), 20_000),
    }
)
DEFAULT = "balanced"

SMALLEST = 200  # entries below which a bank says little
STEP = 0.8  # from one size that is tried to the next
KEPT = 0.95  # of a budget: what is measured later may differ a little
TRIED_PATCHES = 2  # as many as entries, when a size is tried
REPEATS, OF_BATCHES = 5, 3  # measurements of which the median counts
LARGEST_BATCH = 64
WORTH = 0.95  # a batch twice as large is to take at most this share of the time a picture


@dataclass(frozen=True)
class Budget:
    """What a picture may take, in milliseconds, and a version's files, in megabytes (10^6 bytes); None is no limit."""

    ms: float | None = None
    mb: float | None = None

    def __bool__(self) -> bool:
        return self.ms is not None or self.mb is not None


def resolve(
    name: str, *, size: tuple[int, int] | None, bank: int | None, budget: Budget, has_bank: bool = True
) -> Profile:
    """The profile of that name, with what was asked for explicitly in its place.

    Raises
    ------
    BadParameter
        There is no such profile, or the sizes or the budget make no sense.
    """
    if name not in PROFILES:
        raise BadParameter(f"There is no profile {name!r}; choose {', '.join(PROFILES)}.")
    if bank is not None and bank < 1:
        raise BadParameter(f"A memory bank has at least one entry, not {bank}.")
    for value, what in ((budget.ms, "milliseconds"), (budget.mb, "megabytes")):
        if value is not None and not 0 < value < float("inf"):
            raise BadParameter(f"A budget is a positive number of {what}, not {value:g}.")
    if budget and bank is not None:
        raise BadParameter("A budget chooses the size of the memory bank; give it or --bank-size, not both.")
    if budget and not has_bank:
        raise BadParameter("A budget chooses the size of the memory bank; fit memory_bank, or leave the budget out.")
    chosen = PROFILES[name]
    return replace(chosen, size=size or chosen.size, bank=bank or chosen.bank)


def milliseconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """The median time of one call, after one to warm up."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return 1000 * float(np.median(taken))


def milliseconds_by_batch(work: Callable[[int], object]) -> dict[int, float]:
    """Batch size to milliseconds a picture of ``work(size)``, for sizes 1, 2, 4, … as long as they gain something."""
    taken = {1: milliseconds(lambda: work(1))}
    size = 2
    while size <= LARGEST_BATCH:
        taken[size] = milliseconds(lambda size=size: work(size), OF_BATCHES) / size  # type: ignore[misc]
        if taken[size] > WORTH * taken[size // 2]:
            break
        size *= 2
    return taken


def best_batch(taken: Mapping[int, float]) -> int:
    """The smallest of the batch sizes that is as good as the best, or nearly so."""
    return min(size for size, ms in taken.items() if WORTH * ms <= min(taken.values()))


@dataclass(frozen=True)
class Cost:
    """Milliseconds a picture and bytes of files."""

    ms: float
    nbytes: int


def trial(features: Features, detector: MemoryBank) -> Cost:
    """What a bank of that size costs, tried on so few of the pictures that choosing its entries takes a moment."""
    patches = features.patches
    if patches is None:
        raise DataError("The memory bank needs patch features.")
    cells = patches.shape[1] * patches.shape[2]
    count = min(len(features), max(4, -(-TRIED_PATCHES * detector.size // cells)))
    rows = np.random.default_rng(detector.seed).permutation(len(features))[:count]
    detector.fit_held_out(features[np.sort(rows)], np.arange(count) % 2)
    return Cost(milliseconds(lambda: detector.score(features[rows[:1]])), nbytes(detector.to_arrays()))


def largest_bank(most: int, budget: Budget, others: Cost, cost_of: Callable[[int], Cost]) -> int:
    """As many entries, `most` at most, as leave a picture and the files within the budget.

    `others` is what there is besides the bank, and `cost_of` what a bank of so many entries takes (see `trial`).

    Raises
    ------
    BadParameter
        Even `SMALLEST` entries are too many.
    """
    size = most
    while True:
        cost = cost_of(size)
        ms, mb = others.ms + cost.ms, (others.nbytes + cost.nbytes) / MB
        slow = budget.ms is not None and ms > KEPT * budget.ms
        large = budget.mb is not None and mb > KEPT * budget.mb
        if not slow and not large:
            return size
        if size <= SMALLEST:
            break
        size = max(SMALLEST, int(size * STEP))
    if slow:
        raise BadParameter(
            f"A picture takes {ms:.1f} ms here with the smallest memory bank, so {budget.ms:g} ms are too few; raise "
            "--budget-ms, or take a smaller --size or fewer --detectors."
        )
    raise BadParameter(
        f"The files take {mb:.1f} MB with the smallest memory bank, so {budget.mb:g} MB are too few; raise "
        "--budget-mb, or take fewer --detectors."
    )


def nbytes(arrays: Mapping[str, NDArray[Any]]) -> int:
    """What arrays take in a file."""
    return sum(np.asarray(array).nbytes for array in arrays.values())
