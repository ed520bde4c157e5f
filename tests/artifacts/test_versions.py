from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path

import bentoml
import pytest
from bentoml import Tag
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from ood_runners import artifacts
from ood_runners.artifacts import Stored, history, names, production, promote, record, rollback
from ood_runners.artifacts.versions import pile
from ood_runners.errors import ArtifactError, BadParameter, NotFound, Overloaded
from tests.artifacts.samples import python, snapshot

Fit = Callable[..., Tag]


def test_promote_and_roll_back_leave_a_history(fit: Fit) -> None:
    first, second = fit(), fit(seed=1)
    assert production("bolts") is None and history("bolts") == []
    change = promote(first, who="ada", why="first light")
    assert (change.came_from, change.to, change.action) == (None, first.version, "promote")
    promote(f"bolts:{second.version}")
    assert production("bolts") == second.version
    back = rollback("bolts", who="bob", why="false alarms")
    assert (back.came_from, back.to) == (second.version, first.version) and production("bolts") == first.version
    assert [(c.action, c.to) for c in history("bolts")] == [
        ("promote", first.version),
        ("promote", second.version),
        ("rollback", first.version),
    ]
    assert history("bolts")[0].who == "ada" and history("bolts")[2].why == "false alarms" and history("bolts")[1].who
    assert change.when <= back.when


def test_bentomls_latest_is_left_alone(fit: Fit, bento_home: Path) -> None:
    first, second = fit(), fit(seed=1)
    latest = bento_home / "models" / "ood-bolts" / "latest"
    stamp = latest.stat().st_mtime_ns
    promote(second)
    promote(first)
    rollback("bolts")
    assert latest.read_text() == second.version and latest.stat().st_mtime_ns == stamp


def test_rollbacks_go_further_back_each_time_and_say_when_they_cannot(fit: Fit) -> None:
    a, b, c, d = (fit(seed=i) for i in range(4))
    for tag in (a, b, c):
        promote(tag)
    assert rollback("bolts").to == b.version
    promote(d)
    assert rollback("bolts").to == b.version
    assert rollback("bolts").to == a.version
    with pytest.raises(NotFound, match=f"no earlier production version.*{a.version}"):
        rollback("bolts")
    assert production("bolts") == a.version


def test_a_rollback_to_a_chosen_version(fit: Fit) -> None:
    a, b, c, d = (fit(seed=i) for i in range(4))
    for tag in (a, b, c):
        promote(tag)
    assert rollback("bolts", to=str(d)).to == d.version  # never promoted: takes the place of c
    assert rollback("bolts").to == b.version
    assert rollback("bolts", to=a.version).to == a.version
    for wrong in (":", "nuts:v1", "ood-nuts:v1", "../x"):
        with pytest.raises(BadParameter):
            rollback("bolts", to=wrong)
    with pytest.raises(BadParameter, match="--to v1"):
        rollback("bolts:v1")
    with pytest.raises(NotFound, match="no version 'v1'"):
        rollback("bolts", to="v1")


def test_deleted_versions_are_passed_over(fit: Fit) -> None:
    a, b, c = (fit(seed=i) for i in range(3))
    for tag in (a, b, c):
        promote(tag)
    artifacts.delete_version(b)
    assert rollback("bolts").to == a.version


def test_a_rollback_works_when_the_current_version_is_gone(fit: Fit) -> None:
    a, b = fit(), fit(seed=1)
    promote(a)
    promote(b)
    bentoml.models.delete(b)
    assert rollback("bolts").to == a.version
    assert artifacts.resolve("bolts") == a


@given(st.lists(st.sampled_from("abcd<")))
def test_rolling_back_from_anywhere_ends_without_a_repeat(moves: list[str]) -> None:
    changes: list[artifacts.Change] = []

    def move(action: str, to: str) -> None:
        came_from = changes[-1].to if changes else None
        entry = {
            "when": "2026-01-01T00:00:00Z",
            "who": "x",
            "action": action,
            "product": "p",
            "from": came_from,
            "to": to,
        }
        changes.append(artifacts.Change.model_validate(entry))

    for step in moves:
        if step != "<" and (not changes or changes[-1].to != step):
            move("promote", step)
        elif step == "<" and len(pile(changes)) > 1:
            move("rollback", pile(changes)[-2])
    length = len(pile(changes))
    while len(pile(changes)) > 1:
        assert pile(changes)[-1] == changes[-1].to
        move("rollback", pile(changes)[-2])
        length -= 1
        assert len(pile(changes)) == length


def test_nothing_moves_to_what_does_not_load(fit: Fit, bento_home: Path) -> None:
    a, b = fit(), fit(seed=1)
    promote(a)
    promote(b)
    (names.folder_of(a) / "thumbnails" / "0.png").write_bytes(b"changed")
    before = snapshot(bento_home)
    for move in (lambda: promote(a), lambda: rollback("bolts"), lambda: rollback("bolts", to=str(a))):
        with pytest.raises(ArtifactError, match="is damaged"):
            move()
    c = fit(seed=2)
    before = snapshot(bento_home)

    def refuse(stored: Stored) -> None:
        raise ArtifactError(f"{stored.tag} does not reproduce its golden picture.")

    with pytest.raises(ArtifactError, match="golden picture"):
        promote(c, check=refuse)
    assert snapshot(bento_home) == before
    seen: list[Tag] = []
    promote(c, check=lambda stored: seen.append(stored.tag))
    assert seen == [c]


def test_promoting_what_is_in_production_changes_nothing(fit: Fit) -> None:
    tag = fit()
    promote(tag)
    stamp = artifacts.record_stamp("bolts")
    change = promote(tag)
    assert change.came_from == change.to and artifacts.record_stamp("bolts") == stamp
    with pytest.raises(NotFound, match="no earlier"):
        rollback("bolts")


def test_what_is_not_there_cannot_be_moved(fit: Fit) -> None:
    fit()
    with pytest.raises(BadParameter, match="Name the version"):
        promote("bolts")
    with pytest.raises(NotFound, match="no version 'v1'"):
        promote("bolts:v1")
    with pytest.raises(NotFound, match="No version of 'bolts' is in production"):
        rollback("bolts")
    with pytest.raises(NotFound, match="no product 'nuts'; the store has: bolts"):
        rollback("nuts")


@pytest.mark.parametrize("text", ["", "{", "{}", '{"production": "v1"}', "\0" * 200, '{"schema_version": 2}'])
def test_a_damaged_record_is_never_no_record(fit: Fit, text: str) -> None:
    tag = fit()
    promote(tag)
    record.record_path("bolts").write_text(text)
    for look in (
        lambda: production("bolts"),
        lambda: promote(tag),
        lambda: rollback("bolts"),
        lambda: artifacts.resolve("bolts"),
    ):
        with pytest.raises(ArtifactError, match=r"bolts\.json is damaged or from a later release"):
            look()
    assert artifacts.list_versions()[0].problem is not None
    record.record_path("bolts").unlink()
    assert promote(tag).to == tag.version


def test_a_record_of_another_product_is_refused(fit: Fit) -> None:
    promote(fit())
    record.record_path("bolts").rename(record.record_path("nuts"))
    with pytest.raises(ArtifactError, match="that of 'bolts'"):
        production("nuts")


def test_stamps_change_with_every_move(fit: Fit) -> None:
    a, b = fit(), fit(seed=1)
    assert artifacts.stamps() == {} and artifacts.record_stamp("bolts") is None
    seen = set()
    for tag in (a, b, a, b):
        promote(tag)
        seen.add(artifacts.record_stamp("bolts"))
        assert artifacts.stamps() == {"bolts": artifacts.record_stamp("bolts")}
    assert len(seen) == 4


def test_the_history_stops_growing_and_still_leads_back(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "KEPT_ENTRIES", 3)
    tags = [fit(seed=i) for i in range(5)]
    for tag in tags:
        promote(tag)
    assert len(history("bolts")) == 3
    assert [rollback("bolts").to for _ in range(2)] == [tags[3].version, tags[2].version]


def test_one_process_at_a_time(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    tag = fit()
    promote(tag)
    monkeypatch.setattr(record, "LOCK_SECONDS", 0.1)
    with FileLock(record.record_path("bolts").with_suffix(".lock")):
        held = threading.Thread(target=lambda: results.append(_outcome(tag)))
        results: list[str] = []
        held.start()
        held.join()
    assert "try again" in results[0]


def _outcome(tag: Tag) -> str:
    try:
        return promote(tag).to
    except Overloaded as error:
        return error.message


def test_readers_never_meet_half_a_record(fit: Fit, bento_home: Path) -> None:
    tags = [fit(seed=i) for i in range(2)]
    code = """
        import sys
        from ood_runners.artifacts import promote
        for _ in range(12):
            for tag in sys.argv[1:]:
                promote(tag, why="x" * 2000)
    """
    writers = [python(code, *tags), python(code, *reversed(tags))]
    met, versions = set(), {None, *(tag.version for tag in tags)}
    while any(writer.poll() is None for writer in writers):
        met.add(production("bolts"))
        met.update(json.loads(record.record_path("bolts").read_text())["production"] for _ in artifacts.stamps())
    for writer in writers:
        assert writer.communicate()[1] == ""
    assert met <= versions and len(met) > 1
    moves = history("bolts")
    assert all(later.came_from == earlier.to for earlier, later in itertools.pairwise(moves))
    assert [path.suffix for path in bento_home.glob("ood-production/.*")] == []


def test_a_write_that_was_killed_is_cleared_away(fit: Fit) -> None:
    tag = fit()
    promote(tag)
    leftover = record.record_path("bolts").with_name(".bolts.json.abc.tmp")
    leftover.write_text('{"half":')
    assert artifacts.stamps().keys() == {"bolts"}
    promote(fit(seed=1))
    assert not leftover.exists()
