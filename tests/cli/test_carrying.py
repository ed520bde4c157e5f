"""Push, pull and prune as a person calls them; what they do is tested in tests/artifacts."""

from __future__ import annotations

from pathlib import Path

from ood_runners import artifacts
from tests.cli.test_versions import Store, run, store  # noqa: F401


def test_versions_go_and_come_back(store: Store, tmp_path: Path) -> None:  # noqa: F811
    bolts, nuts = store("bolts"), store("nuts")
    for name in (bolts, nuts):
        pushed = run("push", name, tmp_path)
        assert (pushed.exit_code, pushed.stdout) == (0, f"{tmp_path}/{name.replace(':', '/')}.oodmodel\n")
        artifacts.delete_version(name)
    pulled = run("pull", f"{bolts},nuts", tmp_path)
    assert (pulled.exit_code, pulled.stdout) == (0, f"{bolts}\n{nuts}\n")
    assert run("pull", " ,", tmp_path).exit_code == 2
    missing = run("pull", "screws", tmp_path)
    assert missing.exit_code == 1
    assert missing.stderr.startswith("error: There is no version of 'screws'")


def test_prune_says_what_goes_and_what_stays(store: Store) -> None:  # noqa: F811
    made = [store("bolts") for _ in range(3)]
    artifacts.promote(made[0])
    dry = run("prune", "--keep", "1", "--dry-run")
    assert dry.stdout.splitlines()[0] == f"would remove {made[1]}"
    assert f"kept: {made[0]} (in production)" in dry.stderr
    done = run("prune", "--keep", "1", "--product", "bolts")
    assert done.stdout.splitlines()[0] == f"removed {made[1]}"
    assert made[1] not in run("list").stdout
