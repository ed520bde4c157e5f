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


def serve(gate: Admission, clock: Clock, seconds: float, pictures: int = 1, measured: float = 0.1) -> None:
    """Serve a request whose pictures were measured to take `measured` seconds each in `seconds` seconds."""
    with gate.admit(pictures) as place:
        place.weigh(measured)
        clock.now += seconds


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
    gate = Admission(most=4, patience_s=1)
    with gate.admit(9) as place:
        place.weigh(60)
        assert gate.pending == 9


def test_knows_who_had_the_service_to_itself() -> None:
    gate = Admission(most=4, patience_s=10)
    with gate.admit(2) as first:
        assert not first.shared
        with gate.admit(1) as second:
            assert second.shared
        assert first.shared  # the other has its answer, but took its time
    with gate.admit(1) as third:
        assert not third.shared


def test_gives_back_the_places_of_a_failed_request() -> None:
    gate = Admission(most=4, patience_s=10)
    with pytest.raises(ValueError, match="x"), gate.admit(4) as place:
        place.weigh(1)
        raise ValueError("x")
    assert (gate.pending, gate.work) == (0, 0)


def test_a_first_crowd_is_not_taken_on_without_knowing_what_it_costs() -> None:
    gate = Admission(most=1000, patience_s=5)
    taken = [gate.admit() for _ in range(64)]
    held = 0
    for one in taken:
        try:
            one.__enter__().weigh(0.5)
            held += 1
        except Overloaded:
            continue
    assert held == 10


def test_a_costly_version_is_weighed_when_it_is_known() -> None:
    gate = Admission(most=1000, patience_s=5)
    with gate.admit() as cheap:
        cheap.weigh(0.01)
        with pytest.raises(Overloaded), gate.admit() as costly:
            costly.weigh(6)
        assert (gate.pending, gate.work) == (1, pytest.approx(0.01))


def test_one_long_pause_does_not_shut_the_door(clock: Clock) -> None:
    gate = Admission(most=1000, patience_s=5)
    for _ in range(100):
        serve(gate, clock, 0.1)
    serve(gate, clock, 4)  # a version is loaded
    assert 1 < gate.pace < 2.5


def test_what_a_runner_that_is_away_takes_is_nobodys_cost(clock: Clock) -> None:
    gate = Admission(most=1000, patience_s=5)
    for _ in range(50):
        with gate.admit() as place:
            place.weigh(0.1)
            clock.now += 4
            place.served = False
        with pytest.raises(TimeoutError), gate.admit() as place:
            place.weigh(0.1)
            clock.now += 20
            raise TimeoutError
    assert gate.pace == 1


def test_idle_time_is_nobodys_cost(clock: Clock) -> None:
    gate = Admission(most=1000, patience_s=5)
    for _ in range(200):
        clock.now += 60
        serve(gate, clock, 0.2)
    assert gate.pace == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize(("ahead", "refused"), [(23, False), (26, True)])
def test_learns_from_its_answers_how_long_a_line_can_be(clock: Clock, ahead: int, refused: bool) -> None:
    gate = Admission(most=1000, patience_s=5)
    for _ in range(100):  # ten pictures take two seconds, a fifth of a second each and not a tenth
        serve(gate, clock, 2, pictures=10)
    assert gate.pace == pytest.approx(2, rel=0.01)
    with gate.admit(ahead) as place:
        place.weigh(0.1)
        assert (gate.refusal() is not None) is refused
        try:
            with gate.admit(1):
                assert not refused
        except Overloaded:
            assert refused


def test_those_who_are_sent_away_do_not_come_back_together(clock: Clock) -> None:
    gate = Admission(most=10, patience_s=60)
    with gate.admit(10) as place:
        place.weigh(0.5)
        told = [one.retry_after for one in (gate.refusal() for _ in range(200)) if one is not None]
        assert told[:4] == [1, 2, 2, 3]  # half a second each
        assert told == sorted(told)
        assert told[-1] == admission.LONGEST_RETRY_S
        clock.now += admission.LONGEST_RETRY_S
        again = gate.refusal()
        assert again is not None
        assert again.retry_after == 1


def test_a_long_line_is_to_be_given_time(clock: Clock) -> None:
    gate = Admission(most=100, patience_s=4)
    with gate.admit(20) as place:
        place.weigh(0.5)  # an empty service takes any request: ten seconds of work
        refusal = gate.refusal()
        assert refusal is not None
        assert refusal.retry_after == 7
