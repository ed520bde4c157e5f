from __future__ import annotations

import pytest

from ood_runners.errors import Overloaded
from ood_runners.gateway import admission
from ood_runners.gateway.admission import Admission


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(admission, "time", clock)
    return clock


def test_refuses_what_is_too_many_and_takes_it_again_afterwards() -> None:
    gate = Admission(most=4, patience_s=10)
    with gate.admit(3):
        with pytest.raises(Overloaded, match="3 pictures are waiting"), gate.admit(2):
            pass
        with gate.admit(1):
            assert gate.pending == 4
    assert gate.pending == 0
    with gate.admit(4):
        assert gate.pending == 4


def test_an_empty_service_takes_any_request() -> None:
    gate = Admission(most=4, patience_s=10)
    with gate.admit(9):
        assert gate.pending == 9


def test_gives_back_the_places_of_a_failed_request() -> None:
    gate = Admission(most=4, patience_s=10)
    with pytest.raises(ValueError, match="x"), gate.admit(4):
        raise ValueError("x")
    assert gate.pending == 0


def test_one_long_pause_does_not_shut_the_door(clock: Clock) -> None:
    gate = Admission(most=1000, patience_s=5)
    for _ in range(100):
        with gate.admit():
            clock.now += 0.1
    with gate.admit():  # a version is loaded
        clock.now += 4
    assert 0.1 < gate.seconds_per_picture < 0.25


def test_what_a_runner_that_is_away_takes_is_nobodys_cost(clock: Clock) -> None:
    gate = Admission(most=1000, patience_s=5)
    for _ in range(50):
        with gate.admit() as place:
            clock.now += 4
            place.served = False
        with pytest.raises(TimeoutError), gate.admit():
            clock.now += 20
            raise TimeoutError
    assert gate.seconds_per_picture == 0


def test_idle_time_is_nobodys_cost(clock: Clock) -> None:
    gate = Admission(most=1000, patience_s=5)
    for _ in range(200):
        clock.now += 60
        with gate.admit():
            clock.now += 0.1
    assert gate.seconds_per_picture == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize(("ahead", "refused"), [(24, False), (26, True)])
def test_learns_from_its_answers_how_long_a_line_can_be(clock: Clock, ahead: int, refused: bool) -> None:
    gate = Admission(most=1000, patience_s=5)
    for _ in range(100):  # ten pictures take two seconds: a fifth of a second each
        with gate.admit(10):
            clock.now += 2
    assert gate.seconds_per_picture == pytest.approx(0.2, rel=0.01)
    with gate.admit(ahead):
        try:
            with gate.admit(1):
                assert not refused
        except Overloaded:
            assert refused
