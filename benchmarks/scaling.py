"""Cost against bank size, picture size, products loaded and clients, as tables and a plot.

    python benchmarks/scaling.py                    # some minutes; writes docs/images/scaling.png
    python benchmarks/scaling.py --plot FILE.png
    python benchmarks/scaling.py --quick --plot FILE.png            # a look at the script, no figures

A product with bank, Mahalanobis and softmax is fitted on made pictures; the banks of other sizes hold random vectors,
whose search takes as long. Products are the same version opened again and again, each with networks and a bank of its
own. Clients are Locust's, on the same machine, at the fused profile.
"""

from __future__ import annotations

from http_load import send  # first: it makes the standard library cooperative

# isort: split
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from common import ROOT, as_jpegs, files_in, find_pictures, find_weights, fit_product, gemm_peak, heading, serving
from curves import Curve, over_banks, over_inputs, over_products, over_sent, plot

BANKS = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
SENT = (256, 512, 1024, 2048)
INPUTS = (128, 224, 320, 448)
PRODUCTS = (1, 2, 4, 8)
CLIENTS = (1, 2, 4, 8, 16, 32, 64)
DETECTORS = ["memory_bank", "mahalanobis", "softmax"]


def over_clients(numbers: list[int], home: Path, log: Path, jpegs: list[bytes], seconds: float) -> Curve:
    """Pictures a second and latencies of the fused profile with so many clients."""
    found: dict[str, list[float]] = {"pictures/s": [], "p50 ms": [], "p99 ms": []}
    with serving(home, log, "profile=fused") as (url, _):
        for number in numbers:
            send(url, jpegs, "parts", 10**9, number, seconds / 3)
            stats, _ = send(url, jpegs, "parts", 10**9, number, seconds)
            taken = stats.get("/detect", "POST")
            passed = max((stats.total.last_request_timestamp or 0) - stats.total.start_time, 1e-9)
            found["pictures/s"].append((taken.num_requests - taken.num_failures) / passed)
            for name, share in (("p50 ms", 0.5), ("p99 ms", 0.99)):
                found[name].append(float(taken.get_response_time_percentile(share) or 0))
    return Curve("Clients", "clients", "of the fused profile", [*map(float, numbers)], found)


def main(
    seconds: Annotated[float, typer.Option(help="of each measurement; three times as long over HTTP")] = 2.0,
    only: Annotated[str, typer.Option(help="of banks, sent, inputs, products, clients")] = "",
    plotted: Annotated[Path, typer.Option("--plot", help="the picture to write")] = ROOT / "docs/images/scaling.png",
    quick: Annotated[bool, typer.Option(help="few points and short times: for a look at the script")] = False,
) -> None:
    """Measure how cost grows."""
    seconds = 0.1 if quick else seconds
    with TemporaryDirectory(prefix="scaling-") as name:
        scratch = Path(name)
        home, log = scratch / "store", scratch / "server.log"
        os.environ["BENTOML_HOME"] = str(home)  # before anything imports BentoML
        weights = find_weights(scratch)
        folder, what = find_pictures(scratch, 12 if quick else 60, 256)
        heading(weights.what, what)
        fitted = fit_product(folder, home, "parts", weights, detectors=DETECTORS, precision="int8")
        from ood_runners.artifacts import read_version

        stored = read_version(fitted.tag)
        size = (stored.manifest.input.height, stored.manifest.input.width)
        files = files_in(folder / "test")
        peak = gemm_peak(seconds)
        print(f"float32 matrix product: {peak / 1e9:.0f} GFLOP/s")

        def some(values: tuple[int, ...]) -> list[int]:
            return list(values[:2] if quick else values)

        panels: dict[str, Callable[[], Curve]] = {
            "banks": lambda: over_banks(some(BANKS), seconds, peak),
            "sent": lambda: over_sent(some(SENT), files, size, seconds),
            "inputs": lambda: over_inputs(some(INPUTS), stored, seconds, peak),
            "products": lambda: over_products(some(PRODUCTS), stored, seconds),
            "clients": lambda: over_clients(some(CLIENTS), home, log, as_jpegs(files), max(1.0, 3 * seconds)),
        }
        chosen = only.split(",") if only else list(panels)
        if unknown := set(chosen) - set(panels):
            raise typer.BadParameter(f"--only knows {', '.join(panels)}, not {', '.join(unknown)}.")
        curves = [panels[one]() for one in chosen]
        for curve in curves:
            curve.table()
        plot(curves, plotted)
        print(plotted)


if __name__ == "__main__":
    typer.run(main)
