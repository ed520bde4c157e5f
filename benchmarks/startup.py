"""Seconds from ``bentoml serve`` to ready: graph and fused profile beside BentoML services that do nothing.

    python benchmarks/startup.py

*Ready* is the first 200 of ``/readyz``: the product is loaded, its golden picture has been scored and compared. Each
server is started in turn, the whole several times, and the least time of each is printed with the processor time that
all its processes took until then. What the empty services take is BentoML's own.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from common import ROOT, choose_pictures, find_weights, fit_product, heading, serving, show

SERVERS = {
    "graph": ("profile=graph",),
    "empty, five processes": ("empty_service:Composed",),
    "fused": ("profile=fused",),
    "empty, one process": ("empty_service:Alone",),
}


def start(home: Path, log: Path, name: str) -> tuple[float, float]:
    """Seconds until ready, and processor seconds of all its processes."""
    [what] = SERVERS[name]
    empty = ":" in what
    began = time.perf_counter()
    with serving(
        home,
        log,
        *([] if empty else [what]),
        target=[what] if empty else [],
        folder=ROOT / "benchmarks" if empty else ROOT,
    ) as (_, server):
        taken = time.perf_counter() - began
        processes = [server, *server.children(recursive=True)]
        return taken, sum(sum(one.cpu_times()[:2]) for one in processes)


def main(
    repeats: Annotated[int, typer.Option(help="times that each server is started")] = 3,
    data: Annotated[Path | None, typer.Option(help="a folder in MVTec's layout; ball_screws or a made one")] = None,
    vae: Annotated[bool, typer.Option(help="a product with the VAE as well")] = True,
) -> None:
    """Measure how long starting takes."""
    with TemporaryDirectory(prefix="startup-") as name:
        scratch = Path(name)
        home, log = scratch / "store", scratch / "server.log"
        weights = find_weights(scratch)
        folder, what = choose_pictures(data, scratch, 60)
        heading(weights.what, what)
        detectors = ["memory_bank", "mahalanobis", *(["vae"] if vae else []), "softmax"]
        fit_product(folder, home, "parts", weights, brief_vae=True, detectors=detectors)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in SERVERS}
        for _ in range(repeats):
            for server, measured in found.items():
                measured.append(start(home, log, server))
        rows = [
            [server, f"{min(wall for wall, _ in measured):.1f}", f"{min(cpu for _, cpu in measured):.1f}"]
            for server, measured in found.items()
        ]
        show("From the command to ready", ["server", "seconds", "processor seconds"], rows)


if __name__ == "__main__":
    typer.run(main)
