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

from http_load import send  # first: it makes the standard library cooperative

# isort: split
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from common import ROOT, memory, serving
from locust.stats import RequestStats

from ood_runners.images import SUFFIXES
from ood_runners.training.inspection_set import generate

# The command line, with a VAE that trains for seconds: what it learns makes no difference here.
COMMAND_LINE = """
from ood_runners.detectors import vae_network
from ood_runners.cli import main
vae_network.EPOCHS, vae_network.STEPS_PER_EPOCH = 2, 8
main()
"""
MAX_GROWTH = 0.05
PRODUCT = "soak"
SETTLE_S = 5.0


def prepare(folder: Path) -> Path:
    """Generate an inspection set and fit it with the backbone that needs no download; the folder of test pictures."""
    generate(folder / "pictures", train=60)
    options = ("--product", PRODUCT, "--backbone", "efficientnet_lite0", "--alpha", "0.05")
    command = [sys.executable, "-c", COMMAND_LINE, "fit", str(folder / "pictures"), *options]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"BENTOML_HOME": str(folder)}, check=True)
    return folder / "pictures" / "test"


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
