"""What a version may cost: the table, and the largest bank within a budget."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ood_runners.detectors import DETECTORS, MemoryBank
from ood_runners.errors import BadParameter
from ood_runners.features import Features
from ood_runners.training import profiles
from ood_runners.training.profiles import (
    DEFAULT,
    KEPT,
    PROFILES,
    SMALLEST,
    Budget,
    Cost,
    best_batch,
    largest_bank,
    milliseconds_by_batch,
    nbytes,
    resolve,
    trial,
)


def test_the_table_goes_from_small_to_large() -> None:
    fast, balanced, accurate = (PROFILES[name] for name in ("fast", "balanced", "accurate"))
    assert fast.bank < balanced.bank < accurate.bank and fast.size <= balanced.size <= accurate.size
    assert "vae" in fast.leave_out and not balanced.leave_out
    for profile in PROFILES.values():
        assert set(profile.leave_out) < set(DETECTORS)


def test_what_is_asked_for_goes_before_the_profile() -> None:
    assert resolve("fast", size=None, bank=None, budget=Budget()) == PROFILES["fast"]
    chosen = resolve("fast", size=(96, 128), bank=777, budget=Budget())
    assert (chosen.size, chosen.bank, chosen.leave_out) == ((96, 128), 777, PROFILES["fast"].leave_out)


@pytest.mark.parametrize(
    ("name", "bank", "budget", "has_bank", "sentence"),
    [
        ("quick", None, Budget(), True, "no profile 'quick'; choose fast, balanced, accurate"),
        (DEFAULT, 0, Budget(), True, "at least one entry"),
        (DEFAULT, None, Budget(ms=-1), True, "positive number of milliseconds, not -1"),
        (DEFAULT, None, Budget(mb=float("nan")), True, "positive number of megabytes"),
        (DEFAULT, 500, Budget(ms=10), True, "not both"),
        (DEFAULT, None, Budget(mb=10), False, "fit memory_bank, or leave the budget out"),
    ],
)
def test_says_what_makes_no_sense(name: str, bank: int | None, budget: Budget, has_bank: bool, sentence: str) -> None:
    with pytest.raises(BadParameter, match=sentence):
        resolve(name, size=None, bank=bank, budget=budget, has_bank=has_bank)


def linear(size: int) -> Cost:
    return Cost(1 + size / 1_000, 200_000 + 300 * size)


def test_the_largest_bank_within_the_budget() -> None:
    others = Cost(10, 5_000_000)
    assert largest_bank(10_000, Budget(ms=100, mb=100), others, linear) == 10_000
    for budget in (Budget(ms=15), Budget(mb=6.5), Budget(ms=15, mb=6.5)):
        size = largest_bank(10_000, budget, others, linear)
        assert SMALLEST < size < 5_000
        cost, more = linear(size), linear(int(size / 0.75))
        if budget.ms is not None:
            assert 10 + cost.ms <= budget.ms * KEPT
        if budget.mb is not None:
            assert 5_000_000 + cost.nbytes <= budget.mb * KEPT * 1e6
        # The size before this one was too large for one of the two.
        assert 10 + more.ms > 15 * KEPT or 5_000_000 + more.nbytes > 6.5e6 * KEPT


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [(Budget(ms=11), r"11\.2 ms here .* so 11 ms are too few"), (Budget(mb=5), r"5\.3 MB .* so 5 MB are too few")],
)
def test_a_budget_that_the_rest_alone_exceeds(budget: Budget, sentence: str) -> None:
    with pytest.raises(BadParameter, match=sentence):
        largest_bank(10_000, budget, Cost(10, 5_000_000), linear)


def test_a_trial_is_a_bank_of_that_size() -> None:
    features = Features(patches=np.random.default_rng(0).normal(size=(40, 10, 10, 8)).astype(np.float16))
    detector = MemoryBank(size=600)
    cost = trial(features, detector)
    assert len(detector.bank_) == 600 and detector.info()["search"] == "exact"
    assert cost.ms > 0 and cost.nbytes == nbytes(detector.to_arrays()) >= 600 * 8 * 2
    assert len(np.unique(detector.source_[:, 0])) <= 12  # of so few pictures
    few = MemoryBank(size=50_000)  # more than there are
    trial(features, few)
    assert len(few.bank_) <= 4_000


@pytest.mark.parametrize(
    ("a_call", "a_picture", "best"),
    [(0, 5, 1), (6, 5, 16), (0.2, 5, 1)],  # milliseconds: what does not gain, what does, what hardly does
)
def test_the_smallest_batch_that_is_as_good_as_the_best(
    a_call: float, a_picture: float, best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def took(work: Callable[[], float], repeats: int = 0) -> float:
        return work()

    monkeypatch.setattr(profiles, "milliseconds", took)
    taken = milliseconds_by_batch(lambda size: a_call + a_picture * size)
    assert best_batch(taken) == best
    assert list(taken) == [2**i for i in range(len(taken))] and max(taken) <= 2 * best


def test_larger_batches_are_tried_while_they_gain() -> None:
    sizes: list[int] = []
    taken = milliseconds_by_batch(sizes.append)
    assert sizes[0] == 1 and set(sizes) == set(taken)
