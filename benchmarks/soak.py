"""Many requests from many clients, and what they leave behind: failures by kind, latencies, memory.

    python benchmarks/soak.py                                    # 10,000 requests, 64 clients, a store of its own
    python benchmarks/soak.py --requests 2000 --clients 16
    python benchmarks/soak.py --store ~/bentoml --product hazelnut --pictures parts/

It starts a server on a loopback port, warms it up with as many clients, sends the requests with Locust, and stops the
server. Exit status 1 for any failure that is no deliberate 503 (with Retry-After), for fewer answers than requests
within ``--minutes``, and for a growth of memory of 5 % or more. The clients run on the same machine and take their
share of it.
"""

from __future__ import annotations

import locust  # first: it makes the standard library cooperative

# isort: split
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import gevent
import httpx
import psutil
import typer
from locust.env import Environment
from locust.exception import StopUser
from locust.stats import RequestStats
from urllib3 import encode_multipart_formdata

from ood_runners.images import SUFFIXES
from ood_runners.training.inspection_set import generate

ROOT = Path(__file__).resolve().parent.parent
# The command line, with a VAE that trains for seconds: what it learns makes no difference here.
COMMAND_LINE = """
from ood_runners.detectors import vae_network
from ood_runners.cli import main
vae_network.EPOCHS, vae_network.STEPS_PER_EPOCH = 2, 8
main()
"""
READY_S = 180.0
MAX_GROWTH = 0.05
PRODUCT = "soak"
SETTLE_S = 5.0


def memory(server: psutil.Process) -> int:
    """Resident bytes of all of the server's processes; what they share counts for each."""
    return sum(process.memory_info().rss for process in (server, *server.children(recursive=True)))


def client_class(url: str, pictures: list[bytes], product: str, tickets: Iterator[int], refused: list[int]) -> type:
    """A Locust user who sends one picture after the other for as long as there are tickets."""
    forms = [encode_multipart_formdata({"image": ("a.png", data), "product": product}) for data in pictures]

    class Client(locust.FastHttpUser):
        host = url
        network_timeout = connection_timeout = 60.0

        @locust.task
        def detect(self) -> None:
            ticket = next(tickets, None)
            if ticket is None:
                raise StopUser
            body, kind = forms[ticket % len(forms)]
            request = self.client.post(
                "/detect",
                data=body,  # type: ignore[arg-type]  # bytes are taken as they are
                headers={"Content-Type": kind},
                catch_response=True,
            )
            with request as answer:
                if answer.status_code == 503 and answer.headers.get("Retry-After"):
                    refused.append(ticket)
                    answer.request_meta["name"] = "refused"
                    answer.success()
                    gevent.sleep(float(answer.headers["Retry-After"]))
                elif answer.status_code == 200 and '"verdict"' not in answer.text:
                    answer.failure("200 without a verdict")

    return Client


def send(
    url: str, pictures: list[bytes], product: str, requests: int, clients: int, seconds: float
) -> tuple[RequestStats, int]:
    """Send `requests` requests from `clients` clients at once; Locust's statistics, and how many were refused."""
    refused: list[int] = []
    user = client_class(url, pictures, product, iter(range(requests)), refused)
    environment = Environment(user_classes=[user])
    runner = environment.create_local_runner()
    environment.stats.use_response_times_cache = False
    runner.start(clients, spawn_rate=clients)
    end = time.monotonic() + seconds
    gevent.sleep(0.5)
    while runner.user_count and time.monotonic() < end:
        gevent.sleep(0.1)
    runner.quit()
    return environment.stats, len(refused)


def prepare(folder: Path) -> Path:
    """Generate an inspection set and fit it with the backbone that needs no download; the folder of test pictures."""
    generate(folder / "pictures", train=60)
    options = ("--product", PRODUCT, "--backbone", "efficientnet_lite0", "--alpha", "0.05")
    command = [sys.executable, "-c", COMMAND_LINE, "fit", str(folder / "pictures"), *options]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"BENTOML_HOME": str(folder)}, check=True)
    return folder / "pictures" / "test"


@contextmanager
def serving(home: Path, log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A server on a store, ready; it and all its processes are gone when the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bentoml", "serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--timeout-keep-alive", "75"]  # longer than the clients keep theirs
    environment = os.environ | {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"}
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + READY_S
    try:
        while not is_ready(url):
            if server.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"The server did not become ready; the end of its log:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield url, psutil.Process(server.pid)
    finally:
        for how in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(server.pid, how)
            with suppress(subprocess.TimeoutExpired):
                server.wait(timeout=30)


def is_ready(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    return False


def soak(
    requests: Annotated[int, typer.Option(help="requests to send")] = 10_000,
    clients: Annotated[int, typer.Option(help="clients that send at the same time")] = 64,
    minutes: Annotated[float, typer.Option(help="give up after these")] = 30.0,
    warm_up: Annotated[int, typer.Option(help="requests before memory is first read")] = 1_000,
    store: Annotated[Path | None, typer.Option(help="a BENTOML_HOME; one is made if left out")] = None,
    product: Annotated[str, typer.Option(help="the product in that store")] = PRODUCT,
    pictures: Annotated[Path | None, typer.Option(help="a folder of pictures to send; needed with --store")] = None,
) -> None:
    """Send many requests to a server of its own and say what came of it."""
    if (store is None) != (pictures is None):
        raise typer.BadParameter("--store and --pictures go together.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        folder = pictures or prepare(Path(scratch))
        files = [file.read_bytes() for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES]
        with serving(store or Path(scratch), Path(scratch) / "server.log") as (url, server):
            send(url, files, product, warm_up, clients, 60 * minutes)
            time.sleep(SETTLE_S)
            before = memory(server)
            stats, refused = send(url, files, product, requests, clients, 60 * minutes)
            time.sleep(SETTLE_S)
            after = memory(server)
    raise typer.Exit(report(stats, refused, requests, clients, before, after))


def report(stats: RequestStats, refused: int, requests: int, clients: int, before: int, after: int) -> int:
    """Print what was found; the exit status."""
    total, growth = stats.total, after / before - 1
    failures = Counter({f"{error.error}": error.occurrences for error in stats.errors.values()})
    taken = stats.get("/detect", "POST")
    p50, p95, p99 = (taken.get_response_time_percentile(share) for share in (0.5, 0.95, 0.99))
    seconds = (total.last_request_timestamp or 0) - total.start_time
    print(f"requests      {total.num_requests:,} of {requests:,} from {clients} clients in {seconds:.0f} s")
    print(f"answered      {taken.num_requests - taken.num_failures:,} with a verdict, {refused:,} refused with 503")
    print(f"failures      {total.num_failures:,}", *(f"\n  {count:6,}  {kind}" for kind, count in failures.items()))
    print(f"latency       p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms")
    print(f"rate          {taken.num_requests / seconds:.1f} requests a second")
    print(f"memory        {before / 2**20:.0f} MiB, then {after / 2**20:.0f} MiB: {growth:+.1%}")
    return int(total.num_failures > 0 or total.num_requests < requests or growth >= MAX_GROWTH)


if __name__ == "__main__":
    typer.run(soak)
