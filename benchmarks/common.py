"""What the benchmarks of speed share: weights, pictures, fitted products, servers, the clock and the table."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
READY_S = 180.0
SENT = 512  # pixels: the side of the pictures that are sent
# Python keeps what it compiled, unless a shell forbids it: then every process compiles some thousand modules anew.
ENVIRONMENT = {"BENTOML_DO_NOT_TRACK": "True", "PYTHONDONTWRITEBYTECODE": ""}


@dataclass(frozen=True)
class Weights:
    """A backbone's name, its file, and one line on what that is."""

    backbone: str
    path: Path
    what: str


def find_weights(scratch: Path) -> Weights:
    """ResNet50 from ../shared, or the same architecture with random weights, as fast and of no other use."""
    path = SHARED / "weights" / "resnet50_v1_full_int8.safetensors"
    if path.is_file():
        return Weights("resnet50_v1", path, f"ResNet50 v1 from {path.name}")
    import torch
    from safetensors.torch import save_file
    from torchvision.models import resnet50

    torch.manual_seed(0)
    path = scratch / "random_resnet50.safetensors"
    save_file(resnet50(weights=None).state_dict(), path)
    return Weights("resnet50", path, "ResNet50 with random weights: its speed is right, its scores mean nothing")


def find_pictures(scratch: Path, train: int, size: int) -> tuple[Path, str]:
    """A generated inspection set with `train` normals of `size` pixels, and one line on it."""
    from ood_runners.training.inspection_set import generate

    folder = generate(scratch / f"inspection_{train}_{size}", train=train, good=16, per_defect=4, size=size)
    return folder, f"{train} generated normals of {size} x {size} pixels"


def choose_pictures(data: Path | None, scratch: Path, train: int) -> tuple[Path, str]:
    """The folder `data`, or ball_screws from ../shared, or, with fewer pictures asked for, a generated set."""
    chosen = data or SHARED / "data" / "ball_screws"
    if data is None and (train < 200 or not chosen.is_dir()):
        return find_pictures(scratch, train, SENT)
    return chosen, f"{len(files_in(chosen / 'train'))} normals in {chosen.name}"


def files_in(folder: Path) -> list[Path]:
    """A folder's pictures, in order."""
    from ood_runners.images import SUFFIXES

    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def as_jpegs(files: Sequence[Path], side: int = SENT, most: int = 32) -> list[bytes]:
    """JPEG bytes of at most `most` of the files, evenly spread, at `side` x `side` pixels."""
    from ood_runners import images

    chosen = np.unique(np.linspace(0, len(files) - 1, min(most, len(files))).astype(int))
    return [images.encode_jpeg(images.resize(images.read(files[i]), (side, side))) for i in chosen]


@dataclass(frozen=True)
class Fitted:
    """What `fit_product` found.

    Attributes
    ----------
    tag : of the version
    wall : seconds of the whole command, imports and the export of the backbone with it
    seconds : by stage, as the manifest has them
    peak : bytes, the highest resident memory of the process
    own : bytes, the highest of what of it is no mapped file
    """

    tag: str
    wall: float
    seconds: Mapping[str, float]
    peak: int
    own: int = 0


def fit_product(folder: Path, home: Path, product: str, weights: Weights, **options: Any) -> Fitted:
    """Fit in a process of its own; `options` are those of `fitting.py`."""
    (home / "models").mkdir(parents=True, exist_ok=True)
    asked = {"folder": str(folder), "product": product, "backbone": weights.backbone, "weights": str(weights.path)}
    command = [sys.executable, str(ROOT / "benchmarks" / "fitting.py"), json.dumps(asked | options)]
    answer, wall = run_timed(command, {"BENTOML_HOME": str(home)})
    return Fitted(answer["tag"], wall, answer["seconds"], answer["peak"], answer["own"])


def run_timed(command: Sequence[str], more: Mapping[str, str], *, quiet: bool = False) -> tuple[dict[str, Any], float]:
    """Run a command whose last line is JSON: that, and its seconds; with `quiet`, its errors only if it fails."""
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | dict(more)
    start = time.perf_counter()
    errors = subprocess.PIPE if quiet else None
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, check=False
    )
    if done.returncode:
        told = (done.stderr or "")[-3000:]
        raise SystemExit(f"{told}\nThis ended with status {done.returncode}: {' '.join(command)}")
    return json.loads(done.stdout.strip().splitlines()[-1]), time.perf_counter() - start


def median_seconds(work: Callable[[], object], seconds: float, least: int = 3) -> float:
    """Median time of one call of `work`, called for `seconds` and at least `least` times after one to warm up."""
    work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def gemm_peak(seconds: float, side: int = 2048) -> float:
    """Float32 operations a second of one large matrix product, compiled as the product's networks are."""
    import openvino as ov
    from openvino import opset13 as ops

    from ood_runners.inference import CPUNetwork

    rng = np.random.default_rng(0)
    left = ops.parameter([side, side], ov.Type.f32)
    right = ops.constant(rng.standard_normal((side, side), np.float32))
    model = ov.Model([ops.reduce_max(ops.matmul(left, right, False, True), np.array([1]))], [left], "gemm")
    network = CPUNetwork(lambda: model, piece=side, lone=True)
    given = rng.standard_normal((side, side), np.float32)
    return 2 * side**3 / median_seconds(lambda: network(given), seconds)


def operations(model: Any) -> int:
    """Multiplications and additions in the convolutions and matrix products of an ``openvino.Model`` of fixed shape.

    Each counts as one operation, as in statements of processors' peaks.
    """
    total = 0
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in ("Convolution", "GroupConvolution", "MatMul"):
            continue
        outputs = int(np.prod([int(n) for n in node.get_output_shape(0)]))
        weights = [int(n) for n in node.get_input_shape(1)]
        if kind == "Convolution":
            inner = int(np.prod(weights[1:]))
        elif kind == "GroupConvolution":
            inner = int(np.prod(weights[2:]))
        else:
            inner = int(node.get_input_shape(0)[-2 if node.get_attributes()["transpose_a"] else -1])
        total += 2 * outputs * inner
    return total


def auroc(normal: NDArray[Any], strange: NDArray[Any]) -> float:
    """Chance that a strange picture's score is above a normal one's; ties count half."""
    above = (strange[:, None] > normal[None, :]).mean()
    return float(above + 0.5 * (strange[:, None] == normal[None, :]).mean())


def machine() -> str:
    """One line on what this runs on, with how busy it is."""
    from ood_runners.cores import available_cores

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {available_cores()} cores to use, load average {psutil.getloadavg()[0]:.1f} at the start"


def heading(*lines: str) -> None:
    """The command line that is running, the machine, and what is used."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    print(f"$ python benchmarks/{' '.join(words)}", machine(), *lines, sep="\n", flush=True)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; numbers to the right."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=max(140, Console().width)).print(table)


@contextmanager
def serving(
    home: Path,
    log: Path,
    *arguments: str,
    python: str = sys.executable,
    target: Sequence[str] = (),
    folder: Path = ROOT,
    more: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, psutil.Process]]:
    """A server on a store, ready; it and all its processes are gone when the block ends.

    `arguments` are Bento arguments, such as ``profile=fused``; `target` names another service than that of `folder`,
    `python` another interpreter, and `more` goes into its environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "bentoml", "serve", *target, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--timeout-keep-alive", "75"]  # longer than the clients keep theirs
    command += [part for argument in arguments for part in ("--arg", argument)]
    environment = os.environ | ENVIRONMENT | {"BENTOML_HOME": str(home)} | dict(more or {})
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + READY_S
    try:
        while not is_ready(url):
            if server.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"The server did not become ready; the end of its log:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        yield url, psutil.Process(server.pid)
    finally:
        for how in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(server.pid, how)
            with suppress(subprocess.TimeoutExpired):
                server.wait(timeout=30)


def is_ready(url: str) -> bool:
    """Whether the server at `url` says that it is ready."""
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    return False


def memory(server: psutil.Process) -> int:
    """Resident bytes of all of the server's processes; what they share counts for each."""
    return sum(process.memory_info().rss for process in (server, *server.children(recursive=True)))


# glibc before 2.38 does not use again what it gave in aligned pieces of 2 to 32 MB, one a step of choosing a coreset.
ITS_OWN = {"PYTHONPATH": "", "MALLOC_MMAP_THRESHOLD_": str(2**20)}


@dataclass(frozen=True)
class Peer:
    """anomalib's PatchCore, in processes of an interpreter that has anomalib."""

    python: str
    out: Path

    @classmethod
    def find(cls, python: str | None, out: Path) -> Peer | None:
        """With that interpreter, or this one; None, and a line, where it has no anomalib."""
        chosen = python or sys.executable
        tried = subprocess.run([chosen, "-c", "import anomalib"], capture_output=True, check=False)
        if tried.returncode:
            print(f"anomalib is left out: {chosen} cannot import it; --anomalib-python names an interpreter that can.")
            return None
        return cls(chosen, out)

    def run(self, command: str, **options: Any) -> tuple[dict[str, Any], float]:
        """One of `anomalib_peer.py`'s commands: its answer, with the bytes of its ``peak`` memory, and its seconds."""
        script = str(ROOT / "benchmarks" / "anomalib_peer.py")
        asked = json.dumps({"out": str(self.out), **options})
        return run_timed([self.python, "-W", "ignore", script, command, asked], ITS_OWN, quiet=True)
