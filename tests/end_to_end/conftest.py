"""A real store with fitted products, and real servers on it."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
READY_S = 90.0
# The command line, with a VAE that trains for seconds: what it learns is tested elsewhere.
COMMAND_LINE = """
from ood_runners.detectors import vae_network
from ood_runners.cli import main
vae_network.EPOCHS, vae_network.STEPS_PER_EPOCH = 2, 8
main()
"""
FLOAT = ("--precision", "float32")  # fitted faster
DEFECT = (70, 80, 100, 100)  # left, top, right, bottom

Serve = Callable[..., AbstractContextManager["Server"]]


def draw(seed: int, defect: bool = False, size: tuple[int, int] = (160, 144)) -> NDArray[np.uint8]:
    """A bright disc on a dark, noisy ground, uint8 (height, width, 3); the defect is a red bar in `DEFECT`."""
    rng = np.random.default_rng(seed)
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    centre = (width / 2 + rng.uniform(-3, 3), height / 2 + rng.uniform(-3, 3))
    disc = np.hypot(x - centre[0], y - centre[1]) < 50
    picture = np.where(disc[..., None], (170, 160, 120), (40, 50, 60)) * rng.uniform(0.92, 1.08)
    picture = picture + rng.normal(0, 6, (height, width, 3))
    if defect:
        left, top, right, bottom = DEFECT
        picture[top:bottom, left:right] = (230, 20, 30)
    return np.clip(picture, 0, 255).astype(np.uint8)


def encode(picture: NDArray[np.uint8], form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, form)
    return file.getvalue()


@dataclass(frozen=True)
class Fitted:
    """A store: `first` is in production of the product "parts", `second` is not; `plain`, of "plain", has no map.

    The versions of "plain" cost little; `mapped` has a member on smaller pictures and is not in production.
    """

    home: Path
    first: str
    second: str
    plain: str
    mapped: str


@dataclass
class Server:
    """A running ``bentoml serve``."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    home: Path
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def post(self, path: str, data: bytes, **form: str) -> httpx.Response:
        return self.http.post(path, files={"image": ("picture.png", data)}, data=form)

    def detect(self, data: bytes, **form: str) -> dict[str, object]:
        answer = self.post("/detect", data, **form)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def wait_for(self, condition: Callable[[], object], seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds} s; the end of the log:\n{self.tail()}"
            assert self.process.poll() is None, f"the server has ended; the end of its log:\n{self.tail()}"
            time.sleep(0.1)

    def is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return self.http.get("/readyz").status_code == 200
        return False

    def tail(self) -> str:
        return self.log.read_text()[-6000:]


def run(*arguments: str, home: Path) -> str:
    """Run the command line in a store and return what it printed."""
    command = [sys.executable, "-c", COMMAND_LINE, *arguments]
    environment = os.environ | {"BENTOML_HOME": str(home)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fit(folder: Path, home: Path, product: str, *options: str) -> str:
    """Fit a version and return its name."""
    common = ("--backbone", "efficientnet_lite0", "--size", "96", "--alpha", "0.05", "--device", "cpu")
    printed = run("fit", str(folder), "--product", product, *common, *options, home=home)
    return printed.splitlines()[-1].partition(":")[2]


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """The store that the tests here share; a test that changes it puts it back."""
    folder, home = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("store")
    for seed in range(40):
        (folder / f"{seed:03}.png").write_bytes(encode(draw(seed)))
    with ThreadPoolExecutor(1) as pool:  # the first takes as long as the others together
        first = pool.submit(fit, folder, home, "parts", "--precision", "int8")
        second = fit(folder, home, "parts", "--detectors", "memory_bank,softmax", "--seed", "1", "--no-promote", *FLOAT)
        plain = fit(folder, home, "plain", "--detectors", "mahalanobis", *FLOAT)
        options = ("--detectors", "memory_bank,mahalanobis", "--also", "efficientnet_lite0@64", "--no-promote", *FLOAT)
        mapped = fit(folder, home, "plain", *options)
        return Fitted(home, first.result(), second, plain, mapped)


@contextmanager
def serving(home: Path, log: Path, *arguments: str, target: str = ".", host: str = "127.0.0.1") -> Iterator[Server]:
    """A server of `target` on a free port; its process group is gone when the block ends, however it ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "bentoml", "serve", target, "--host", host]
    command += ["--port", str(port)]
    # Longer than its clients keep theirs, or a request may meet a connection that is just being closed.
    command += ["--timeout-keep-alive", "75"]
    for argument in arguments:
        command += ["--arg", argument]
    environment = os.environ | {"BENTOML_HOME": str(home), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(process, f"http://127.0.0.1:{port}", log, home)
    try:
        server.wait_for(server.is_ready, READY_S)
        yield server
    finally:
        server.http.close()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="session")
def server(fitted: Fitted, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on the shared store, for tests that only ask."""
    with serving(fitted.home, tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """Starts a server of a test's own: ``with serve(home, "products=parts:v1") as server``."""

    def start(home: Path, *arguments: str, **options: str) -> AbstractContextManager[Server]:
        return serving(home, tmp_path_factory.mktemp("server") / "log", *arguments, **options)

    return start


@pytest.fixture(scope="session")
def normal() -> bytes:
    return encode(draw(1000))


@pytest.fixture(scope="session")
def defective() -> bytes:
    return encode(draw(1000, defect=True))


@pytest.fixture(scope="session")
def many() -> list[bytes]:
    """Pictures of which every other one is defective, as JPEG."""
    return [encode(draw(2000 + seed, defect=seed % 2 == 1), "JPEG") for seed in range(12)]


@pytest.fixture(scope="session")
def command_line() -> Callable[..., str]:
    return run
