from __future__ import annotations

import io

import pytest
from rich.console import Console

from ood_runners.training.progress import BarProgress, LineProgress, Progress, SilentProgress, progress_for


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_at_most_every_five_seconds_and_once_at_the_end() -> None:
    clock, stream = Clock(), io.StringIO()
    with LineProgress(stream, clock=clock).stage("features", total=20) as stage:
        for _ in range(20):
            clock.now += 1.0
            stage.advance(note="good")
    assert stream.getvalue().splitlines() == [
        "features: 5 of 20, about 15 s left, good",
        "features: 10 of 20, about 10 s left, good",
        "features: 15 of 20, about 5 s left, good",
        "features: 20 done in 20.0 s, good",
    ]


def test_a_stage_of_unknown_length_counts() -> None:
    clock, stream = Clock(), io.StringIO()
    with LineProgress(stream, clock=clock).stage("pictures") as stage:
        clock.now = 6.0
        stage.advance(3)
    assert stream.getvalue().splitlines() == ["pictures: 3 done", "pictures: 3 done in 6.0 s"]


def test_a_total_that_is_known_late_gives_the_time_that_is_left() -> None:
    clock, stream = Clock(), io.StringIO()
    with LineProgress(stream, clock=clock).stage("vae") as stage:
        clock.now = 6.0
        stage.advance(note="loss 0.5", total=4)
    assert stream.getvalue().splitlines()[0] == "vae: 1 of 4, about 18 s left, loss 0.5"
    bars, console = terminal()
    with BarProgress(console).stage("vae") as stage:
        stage.advance(total=4)
    assert "1/4" in bars.getvalue()


def test_a_stage_that_fails_claims_no_end() -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), LineProgress(stream).stage("features", 2) as stage:
        stage.advance()
        raise RuntimeError
    assert stream.getvalue() == ""


def terminal() -> tuple[io.StringIO, Console]:
    stream = io.StringIO()
    return stream, Console(file=stream, force_terminal=True, width=120)


def test_bars_show_name_count_and_note_once_a_stage() -> None:
    stream, console = terminal()
    progress = BarProgress(console)
    with progress.stage("features", 3) as stage:
        stage.advance(3)
    first = stream.getvalue()
    assert "features" in first
    assert "3/3" in first
    with progress.stage("vae epoch", 2) as stage:
        stage.advance(note="loss 0.012")
    second = stream.getvalue().removeprefix(first)
    assert "vae epoch" in second
    assert "loss 0.012" in second
    assert "features" not in second


def test_bars_nest_and_end_with_the_outermost_even_when_one_fails() -> None:
    stream, console = terminal()
    progress = BarProgress(console)
    with pytest.raises(KeyboardInterrupt), progress.stage("outer", 2) as outer, progress.stage("inner", 4) as inner:
        inner.advance()
        outer.advance()
        raise KeyboardInterrupt
    # The cursor is shown again, and the next stage starts afresh.
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")
    with progress.stage("next", 1) as stage:
        stage.advance()
    assert "outer" not in stream.getvalue().rsplit("\x1b[?25l", 1)[1]


@pytest.mark.parametrize("progress", [SilentProgress(), LineProgress(io.StringIO()), BarProgress(terminal()[1])])
def test_all_serve_as_progress(progress: Progress) -> None:
    with progress.stage("a", None) as stage:
        stage.advance()


def test_a_pipe_gets_lines() -> None:
    assert isinstance(progress_for(io.StringIO()), LineProgress)
