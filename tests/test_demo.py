"""The demo, in a folder of its own; what it starts is gone when it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ood_runners import demo
from ood_runners.errors import ArtifactError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bento_home: Path) -> Path:
    """An empty folder that the demo runs in, with the demo's own folder made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "demo").mkdir()
    return tmp_path


def processes_in(folder: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder and process.pid != os.getpid():
                yield process
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue


def test_a_server_that_does_not_start_is_one_error_with_the_end_of_its_log(folder: Path) -> None:
    (folder / "service.py").write_text("raise RuntimeError('the lamp is out')\n")
    with pytest.raises(ArtifactError, match="the lamp is out"), demo.served():
        pytest.fail("it is not ready")
    assert not list(processes_in(folder))


def test_a_server_that_ignores_the_polite_way_is_stopped_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STOP_S", 0.5)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert server.stdout is not None
    server.stdout.readline()
    demo.stop(server)
    assert server.poll() == -signal.SIGKILL


def test_elsewhere_it_says_where_to_run_it(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "ood_runners.demo"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "error: Run the demo in the project's own folder, where service.py is.\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_tells_a_normal_from_a_defective_picture(folder: Path) -> None:
    shutil.copy(ROOT / "service.py", folder)
    done = subprocess.run([sys.executable, "-m", "ood_runners.demo"], capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert [line.split(": ")[1].split()[0] for line in said if " picture demo/" in line] == ["normal", "anomalous"]
    for name in ("normal_heatmap.png", "defective_heatmap.png", "heatmaps.jpg", "report.html"):
        assert (folder / "demo" / name).stat().st_size > 1000
    end = time.monotonic() + 10
    while left := list(processes_in(folder)):
        assert time.monotonic() < end, left
