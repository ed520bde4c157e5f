"""The whole way in one run: pictures, a fitted version, a server, two verdicts over HTTP (``make demo``).

Everything it writes lies in ``demo/`` and, unless BENTOML_HOME says otherwise, ``.bentoml/`` of the current folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
from numpy.typing import NDArray

from ood_runners import images
from ood_runners.errors import ArtifactError, OODError
from ood_runners.training.progress import progress_for

if TYPE_CHECKING:
    from ood_runners.training.evaluation import Evaluation

PRODUCT = "demo"
ALPHA = 0.05
READY_S = 180.0  # five processes start on a machine that may have two slow cores
STOP_S = 20.0
FOLDER = Path("demo")
NEXT = """\
Now with a folder of your own normal pictures (with the environment of `make` and its store):

  source .venv/bin/activate && export BENTOML_HOME="$PWD/.bentoml"
  python build_artifacts.py fit FOLDER --product NAME
  bentoml serve
  curl -F image=@PICTURE -F product=NAME http://localhost:3000/detect
  curl -F image=@PICTURE -F product=NAME http://localhost:3000/heatmap -o heatmap.png
"""


def say(text: str) -> None:
    """One line of what is going on, at once."""
    print(text, flush=True)


def prepare() -> Path:
    """Generate the inspection set; the folder it lies in."""
    from ood_runners.training.inspection_set import generate

    folder = FOLDER / "inspection_set"
    shutil.rmtree(folder, ignore_errors=True)
    generate(folder, progress=progress_for())
    say(f"Inspection set: {folder} (sound flanges to fit on; chips, scratches, stains and missing holes to find).")
    return folder


def fit_and_evaluate(folder: Path) -> Evaluation:
    """Fit a version, put it into production and measure it on the set's test pictures."""
    from ood_runners.artifacts import read_version
    from ood_runners.backbones import auto_backbone
    from ood_runners.pipeline import Product
    from ood_runners.training.datasets import discover
    from ood_runners.training.evaluate import evaluate
    from ood_runners.training.fit import fit
    from ood_runners.training.report import write_report

    backbone, why = auto_backbone()
    say(why)
    started = time.monotonic()
    result = fit(folder, product=PRODUCT, backbone=backbone, alpha=ALPHA, progress=progress_for())
    say("\n".join(result.lines))
    say(f"Fitted {result.tag} in {time.monotonic() - started:.0f} s.")
    product = Product.open(read_version(result.tag))
    evaluation = evaluate(product, discover(folder), progress=progress_for())
    say("\n".join(evaluation.lines()))
    report = FOLDER / "report.html"
    write_report(evaluation, report, product)
    say(f"Report: {report}")
    return evaluation


def typical(evaluation: Evaluation, folder: Path, *, anomalous: bool) -> Path:
    """The sound, or faulty, test picture that scores in the middle of its kind."""
    rows = sorted((row for row in evaluation.rows if row.anomalous == anomalous), key=lambda row: row.score)
    return folder / rows[len(rows) // 2].path


@contextmanager
def served() -> Iterator[str]:
    """A running server's address; the server and all its processes are gone when the block ends, however it ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = FOLDER / "server.log"
    command = [
        sys.executable,
        "-m",
        "bentoml",
        "serve",
        "service:OODService",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(server)


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Return when the server answers /readyz with 200.

    Raises
    ------
    ArtifactError
        It ended or was not ready in time; the message shows the end of its log.
    """
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        time.sleep(0.3)
    why = f"was not ready within {READY_S:.0f} s" if server.poll() is None else f"ended with {server.returncode}"
    last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise ArtifactError(f"The server {why}; the end of {log}:\n{last}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """Stop the server and the processes it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, how)
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=STOP_S)


def judge(url: str, name: str, picture: Path) -> list[NDArray[np.uint8]]:
    """Ask for a verdict and a heat map over HTTP; the picture and its heat map."""
    data = picture.read_bytes()

    def ask(path: str) -> httpx.Response:
        answer = httpx.post(f"{url}/{path}", files={"image": data}, data={"product": PRODUCT}, timeout=60)
        if answer.is_error:
            raise ArtifactError(f"/{path} answered {answer.status_code}: {answer.text}")
        return answer

    found = ask("detect").json()
    say(
        f"{name} picture {picture}: {found['verdict']} (p = {found['p_value']:.3g}, alpha = {found['alpha']:.3g}, "
        f"{found['timing_ms']['total']:.0f} ms)"
    )
    file = FOLDER / f"{name}_heatmap.png"
    file.write_bytes(ask("heatmap").content)
    say(f"  heat map: {file}")
    return [images.decode(data), images.read(file)]


def run() -> None:
    """The demo, from the pictures to the verdicts."""
    if not Path("service.py").is_file():
        raise OODError("Run the demo in the project's own folder, where service.py is.")
    FOLDER.mkdir(exist_ok=True)
    folder = prepare()
    evaluation = fit_and_evaluate(folder)
    say("Starting the service (log in demo/server.log) …")
    with served() as url:
        rows = [
            judge(url, "normal", typical(evaluation, folder, anomalous=False)),
            judge(url, "defective", typical(evaluation, folder, anomalous=True)),
        ]
    both = FOLDER / "heatmaps.jpg"
    both.write_bytes(images.encode_jpeg(np.concatenate([np.concatenate(row, axis=1) for row in rows])))
    say(f"Both beside their heat maps: {both}\nThe server is stopped.\n\n{NEXT}")


def main() -> None:
    """Run the demo and exit: 0 done, 1 failed (one sentence says why), 130 interrupted."""
    home = Path(os.environ.setdefault("BENTOML_HOME", str(Path.cwd() / ".bentoml")))
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        home.mkdir(parents=True, exist_ok=True)
        run()
    except OODError as error:
        sys.exit(f"error: {error.message}")
    except KeyboardInterrupt:
        print("interrupted: the server is stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
