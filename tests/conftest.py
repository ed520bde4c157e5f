"""What every test shares: an environment of its own, and the real data and weights where they are at hand."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Before anything imports BentoML or NumPy: tests never touch the user's model store, never report usage, and
# do not fight each other for cores. A test that needs a store takes `bento_home`.
_SESSION_HOME = tempfile.TemporaryDirectory(prefix="ood-tests-")
os.environ["BENTOML_HOME"] = _SESSION_HOME.name
os.environ["BENTOML_DO_NOT_TRACK"] = "True"
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
DATA_SETS = ("hazelnut_toy", "cookies", "ball_screws", "ood_dev")


def _found(folder: Path, names: list[str]) -> str:
    return f"{', '.join(names)} (in {folder})" if names else f"none in {folder}; tests that need it skip"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say, whatever the verbosity, which real data and weights this run could use."""
    data, weights = SHARED / "data", SHARED / "weights"
    found_weights = sorted(path.name for path in weights.glob("*.safetensors"))
    terminalreporter.section("real data and weights")
    terminalreporter.line(f"data: {_found(data, [name for name in DATA_SETS if (data / name).is_dir()])}")
    terminalreporter.line(f"weights: {_found(weights, found_weights)}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the repository."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("The real data sets are not here: no folder ../shared/data beside the repository.")
    return folder


@pytest.fixture(scope="session")
def shared_weights() -> Path:
    """The folder of real ResNet50 weights beside the repository."""
    folder = SHARED / "weights"
    if not folder.is_dir():
        pytest.skip("The real weights are not here: no folder ../shared/weights beside the repository.")
    return folder


@pytest.fixture
def bento_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty model store for this test and for the processes it starts."""
    with store_at(tmp_path / "bentoml", monkeypatch) as home:
        yield home


@contextmanager
def store_at(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The model store in `home`, for this process and those it starts."""
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml._internal.models import ModelStore

    (home / "models").mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("BENTOML_HOME", str(home))
    # BentoML reads the variable once a process, so this process's own store is set beside it.
    with (
        BentoMLContainer.bentoml_home.patch(str(home)),
        BentoMLContainer.model_store.patch(ModelStore(str(home / "models"))),
    ):
        yield home
