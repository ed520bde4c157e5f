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
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import numpy as np
import psutil
import typer
from common import (
    ROOT,
    as_jpegs,
    files_in,
    find_pictures,
    find_weights,
    fit_product,
    gemm_peak,
    heading,
    median_seconds,
    operations,
    serving,
    show,
)

if TYPE_CHECKING:
    from ood_runners.artifacts import Stored

BANKS = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
SENT = (256, 512, 1024, 2048)
INPUTS = (128, 224, 320, 448)
PRODUCTS = (1, 2, 4, 8)
CLIENTS = (1, 2, 4, 8, 16, 32, 64)
DETECTORS = ["memory_bank", "mahalanobis", "softmax"]
PATCHES, DIMENSIONS, NEIGHBOURS = 784, 128, 3
BATCH = 8
MIB = 2**20


@dataclass(frozen=True)
class Curve:
    """One panel of the plot: `y` over `x`, and the table behind it."""

    title: str
    x_label: str
    y_label: str
    x: list[float]
    y: dict[str, list[float]]

    def table(self) -> None:
        """Print it."""
        rows = [[f"{x:,.0f}", *(f"{values[i]:,.2f}" for values in self.y.values())] for i, x in enumerate(self.x)]
        show(f"{self.title} ({self.y_label})", [self.x_label, *self.y], rows)


def over_banks(sizes: list[int], seconds: float, peak: float) -> Curve:
    """Milliseconds that the exact search of a picture's patches takes, in batches of 1 and 8 pictures."""
    from ood_runners.detectors.search import ExactSearch

    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {"batch 1": [], f"batch {BATCH}": [], "% of the GEMM peak": []}
    for size in sizes:
        search = ExactSearch(rng.standard_normal((size, DIMENSIONS), np.float32), NEIGHBOURS)
        for batch in (1, BATCH):
            queries = rng.standard_normal((batch * PATCHES, DIMENSIONS), np.float32)
            taken = median_seconds(lambda search=search, queries=queries: search.search(queries), seconds) / batch
            found[f"batch {batch}"].append(taken * 1000)
        best = min(found["batch 1"][-1], found[f"batch {BATCH}"][-1]) / 1000
        found["% of the GEMM peak"].append(100 * 2 * size * PATCHES * DIMENSIONS / best / peak)
    return Curve("Search", "entries in the bank", "ms a picture", [*map(float, sizes)], found)


def over_sent(sides: list[int], files: list[Path], size: tuple[int, int], seconds: float) -> Curve:
    """Milliseconds of decoding and resizing JPEGs of so many pixels a side."""
    from ood_runners import images

    found: dict[str, list[float]] = {"decode": [], "resize": []}
    for side in sides:
        [data] = as_jpegs(files, side, 1)
        decoded = images.decode(data)
        found["decode"].append(1000 * median_seconds(lambda data=data: images.decode(data), seconds))
        found["resize"].append(1000 * median_seconds(lambda one=decoded: images.resize(one, size), seconds))
    return Curve("Pictures as sent", "pixels a side", "ms a picture", [*map(float, sides)], found)


def over_inputs(sides: list[int], stored: Stored, seconds: float, peak: float) -> Curve:
    """Milliseconds of the backbone with all that the product taps, at other input sizes."""
    import openvino as ov

    from ood_runners.backbones import FeatureNetwork
    from ood_runners.backbones.openvino_engine import build_graph, read_graph
    from ood_runners.backbones.runtime import Tapping
    from ood_runners.backbones.spec import GRAPH_FILE

    wanted = stored.manifest.features
    graphs = {"float32": stored.backbone_path / GRAPH_FILE, "int8": stored.path / GRAPH_FILE}
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {}
    for precision, graph in graphs.items():
        for side in sides:
            size = (side, side)
            network = FeatureNetwork.load(
                stored.backbone_path,
                size=size,
                patch_layers=wanted.patch_layers,
                pooled_layers=wanted.pooled_layers,
                logits=wanted.logits,
                neighbourhood=wanted.neighbourhood,
                device="cpu",
                graph=graph,
            )
            pictures = rng.integers(0, 256, (BATCH, side, side, 3), np.uint8)
            taken = median_seconds(lambda network=network, pictures=pictures: network(pictures), seconds) / BATCH
            tapping = Tapping(size, tuple(wanted.patch_layers), tuple(wanted.pooled_layers), wanted.logits, None, 3)
            model = build_graph(read_graph(graph, size), network.info, tapping)
            model.reshape(ov.PartialShape([1, side, side, 3]))
            found.setdefault(f"{precision}, ms", []).append(1000 * taken)
            found.setdefault(f"{precision}, % of the float32 GEMM peak", []).append(
                100 * operations(model) / taken / peak
            )
    return Curve("Backbone", "input, pixels a side", "of a picture, in batches of 8", [*map(float, sides)], found)


def over_products(numbers: list[int], stored: Stored, seconds: float) -> Curve:
    """Resident memory, milliseconds to open one more, and of a picture of each in turn, with so many products open."""
    from ood_runners.pipeline import Product

    rng = np.random.default_rng(0)
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    opened: list[Product] = []
    found: dict[str, list[float]] = {"MiB": [], "ms to open one": [], "ms a picture": []}
    for number in numbers:
        took = []
        while len(opened) < number:
            start = time.perf_counter()
            opened.append(Product.open(stored, "cpu"))
            took.append(time.perf_counter() - start)
        picture = rng.integers(0, 256, (1, *opened[0].input_size, 3), np.uint8)

        def each(picture: np.ndarray = picture) -> None:
            for product in opened:
                product.raw_scores(picture)

        found["ms a picture"].append(1000 * median_seconds(each, seconds) / number)
        found["MiB"].append((process.memory_info().rss - before) / MIB)
        found["ms to open one"].append(1000 * float(np.median(took)))
    return Curve("Products open in one process", "products", "of all, or of one", [*map(float, numbers)], found)


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
    return Curve("Clients, fused profile", "clients", "", [*map(float, numbers)], found)


def plot(curves: list[Curve], path: Path) -> None:
    """Draw a panel for each curve; a quantity of another kind than the first is on the right axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, -(-len(curves) // 2), figsize=(13, 7), constrained_layout=True)
    for curve, axis in zip(curves, axes.flat, strict=False):
        right = None
        for i, (name, values) in enumerate(curve.y.items()):
            other = name.split()[-1] != next(iter(curve.y)).split()[-1] and ("%" in name or "ms" in name)
            if other and right is None:
                right = axis.twinx()
                right.set_ylim(bottom=0)
            chosen = right if other else axis
            style = "--" if other else "-"
            chosen.plot(curve.x, values, style, marker="o", color=f"C{i}", label=name)
            chosen.set_ylim(bottom=0)
        axis.set(title=curve.title, xlabel=curve.x_label, xscale="log", xticks=curve.x)
        axis.set_xticks(curve.x, [f"{x:,.0f}" for x in curve.x], minor=False)
        axis.minorticks_off()
        lines = [line for one in (axis, right) if one is not None for line in one.get_lines()]
        axis.legend(lines, [str(line.get_label()) for line in lines], fontsize=7)
    for axis in list(axes.flat)[len(curves) :]:
        axis.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


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
