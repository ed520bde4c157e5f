"""How cost grows with bank, picture and products, each as a curve; and their plot."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
from common import as_jpegs, median_seconds, operations, show

if TYPE_CHECKING:
    from ood_runners.artifacts import Stored

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
    """Milliseconds that a search of a picture's patches takes, exact and with candidates in int8."""
    from ood_runners.detectors.search import Search

    rng = np.random.default_rng(0)
    queries = rng.standard_normal((PATCHES, DIMENSIONS), np.float32)
    found: dict[str, list[float]] = {}
    for size in sizes:
        bank = rng.standard_normal((size, DIMENSIONS), np.float32)
        for name, rounded in (("exact", False), ("int8", True)):
            search = Search(bank, NEIGHBOURS, rounded=rounded)
            taken = median_seconds(lambda search=search: search.search(queries), seconds)
            found.setdefault(f"{name}, ms", []).append(1000 * taken)
            share = 100 * 2 * size * PATCHES * DIMENSIONS / taken / peak
            found.setdefault(f"{name}, % of the float32 GEMM peak", []).append(share)
    return Curve("Search", "entries in the bank", "of a picture's 784 patches", [*map(float, sizes)], found)


def over_sent(sides: list[int], files: list[Path], size: tuple[int, int], seconds: float) -> Curve:
    """Milliseconds of decoding and resizing JPEGs of so many pixels a side."""
    from ood_runners import images

    found: dict[str, list[float]] = {"decode, ms": [], "resize, ms": []}
    for side in sides:
        [data] = as_jpegs(files, side, 1)
        decoded = images.decode(data)
        found["decode, ms"].append(1000 * median_seconds(lambda data=data: images.decode(data), seconds))
        found["resize, ms"].append(1000 * median_seconds(lambda one=decoded: images.resize(one, size), seconds))
    return Curve("Pictures as sent", "pixels a side", "a picture", [*map(float, sides)], found)


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


def plot(curves: list[Curve], path: Path) -> None:
    """Draw a panel for each curve: on the left axis what has the first one's unit, the end of its name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, -(-len(curves) // 2), figsize=(13, 7), constrained_layout=True)
    for curve, axis in zip(curves, axes.flat, strict=False):
        unit = next(iter(curve.y)).split()[-1]
        others = [name for name in curve.y if name.split()[-1] != unit]
        right = axis.twinx() if others else None
        for i, (name, values) in enumerate(curve.y.items()):
            chosen = right if right is not None and name in others else axis
            style = "--" if name in others else "-"
            chosen.plot(curve.x, values, style, marker="o", color=f"C{i}", label=name)
        for one in filter(None, (axis, right)):
            one.set_ylim(bottom=0)  # once all lines are there: it ends the choice of limits
        axis.set(title=curve.title, xlabel=curve.x_label, ylabel=curve.y_label, xscale="log", xticks=curve.x)
        axis.set_xticks(curve.x, [f"{x:,.0f}" for x in curve.x], minor=False)
        axis.minorticks_off()
        lines = [line for one in (axis, right) if one is not None for line in one.get_lines()]
        axis.legend(lines, [str(line.get_label()) for line in lines], fontsize=7)
    for axis in list(axes.flat)[len(curves) :]:
        axis.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
