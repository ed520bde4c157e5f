"""Seconds by stage and peak memory of a fit, beside anomalib's of the same folder.

    python benchmarks/fit.py                                        # 209 pictures of 900 x 900, some minutes
    python benchmarks/fit.py --anomalib-python VENV/bin/python      # with the peer
    python benchmarks/fit.py --many 1000,10000                      # memory as the folder grows; longer
    python benchmarks/fit.py --quick                                # a look at the script, no figures

Each fit runs in a process of its own, into a store of its own, with the defaults but for the detectors. "All" is what
the manifest says; "with imports" is the whole command's, which is what a user waits for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import cv2
import numpy as np
import typer
from common import Fitted, Peer, Weights, files_in, find_pictures, find_weights, fit_product, heading, run_timed, show

from ood_runners import images

WITHOUT = ["memory_bank", "mahalanobis", "softmax"]
WITH = ["memory_bank", "mahalanobis", "vae", "softmax"]
AGAIN = "without VAE, again with another head"
BAR = 5.0
MIB = 2**20
DISTINCT = 20  # generated scenes; other pictures are these, turned, shifted and with noise of their own


def draw(folder: Path, count: int, side: int, scratch: Path) -> Path:
    """`count` different normal pictures of `side` x `side` pixels, as JPEG, in ``train/good``; always the same."""
    made, _ = find_pictures(scratch, min(DISTINCT, count), max(side, 96))
    scenes = [images.resize(images.read(file), (side, side)) for file in files_in(made / "train")]
    (folder / "train" / "good").mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng([0, i])
        moved = np.float32([[1, 0, rng.uniform(-4, 4)], [0, 1, rng.uniform(-4, 4)]])
        turned = cv2.warpAffine(scenes[i % len(scenes)], moved, (side, side), borderMode=cv2.BORDER_REFLECT)
        noise = cv2.resize(rng.normal(0, 6, (side // 4, side // 4, 3)).astype(np.float32), (side, side))
        picture = np.clip(turned + noise, 0, 255).astype(np.uint8)
        (folder / "train" / "good" / f"{i:05}.jpg").write_bytes(images.encode_jpeg(picture))
    return folder


def columns_of(fits: dict[str, Fitted]) -> list[list[str]]:
    """Rows of the table: a stage, and its seconds in each fit."""
    stages = list(dict.fromkeys(stage for one in fits.values() for stage in one.seconds if stage != "all"))
    rows = [[stage, *(f"{one.seconds.get(stage, 0):.1f}" for one in fits.values())] for stage in stages]
    rest = [
        one.seconds["all"] - sum(value for stage, value in one.seconds.items() if stage != "all")
        for one in fits.values()
    ]
    rows.append(["reading, backbone, writing", *(f"{value:.1f}" for value in rest)])
    rows.append(["all", *(f"{one.seconds['all']:.1f}" for one in fits.values())])
    rows.append(["with imports", *(f"{one.wall:.1f}" for one in fits.values())])
    return [*rows, ["peak memory, MiB", *(f"{one.peak / MIB:.0f}" for one in fits.values())]]


def main(
    count: Annotated[int, typer.Option(help="pictures")] = 209,
    side: Annotated[int, typer.Option(help="their side in pixels")] = 900,
    data: Annotated[Path | None, typer.Option(help="a folder to fit on in the place of made pictures")] = None,
    vae: Annotated[bool, typer.Option(help="fit with the VAE too")] = True,
    bank: Annotated[int, typer.Option(help="entries of the memory bank; 16385 are 10 % of 209 pictures")] = 10_000,
    anomalib_python: Annotated[str | None, typer.Option(help="an interpreter that has anomalib")] = None,
    many: Annotated[str, typer.Option(help="numbers of small pictures to measure memory with, e.g. 1000,10000")] = "",
    many_size: Annotated[int, typer.Option(help="what those are resized to; they have 96 pixels a side")] = 96,
    quick: Annotated[bool, typer.Option(help="few small pictures, a VAE of seconds: for a look at the script")] = False,
) -> None:
    """Measure fits."""
    if quick:
        count, side = 12, 96
    with TemporaryDirectory(prefix="fit-") as name:
        scratch = Path(name)
        weights = find_weights(scratch)
        folder = data or draw(scratch / "pictures", count, side, scratch)
        what = f"{len(files_in(folder / 'train'))} normals in {folder.name}" + ("" if data else f" of {side} x {side}")
        heading(weights.what, what)
        imported = "import ood_runners.backbones.export, nncf, sklearn.metrics, ood_runners.training.fit; print({})"
        run_timed([sys.executable, "-W", "ignore", "-c", imported], {}, quiet=True)  # compiled now, if never before
        kinds = {"without VAE": WITHOUT} | ({"with VAE": WITH} if vae else {})
        fits = {
            kind: fit_product(folder, scratch / kind, "parts", weights, detectors=detectors, bank=bank, brief_vae=quick)
            for kind, detectors in kinds.items()
        }
        # The same store again: features are there, what they are fitted to may be another.
        other = {"detectors": WITHOUT, "bank": bank, "head": "energy"}
        again = fit_product(folder, scratch / "without VAE", "parts", weights, **other)
        show("Seconds of a fit", ["stage", *fits, AGAIN], columns_of(fits | {AGAIN: again}))
        beside_peer(Peer.find(anomalib_python, scratch / "anomalib"), folder, weights, fits, bank)
        if many:
            grown(scratch, weights, [int(number) for number in many.split(",")], many_size)


def beside_peer(peer: Peer | None, folder: Path, weights: Weights, fits: dict[str, Fitted], bank: int) -> None:
    """Fit anomalib's PatchCore on the folder, and print both."""
    if peer is None:
        return
    found, wall = peer.run("fit", folder=str(folder), weights=str(weights.path))
    rows = [
        [
            "anomalib PatchCore",
            f"{found['fit']:.1f}",
            f"{wall:.1f}",
            f"{found['peak'] / MIB:.0f}",
            f"{found['entries']:,}",
        ],
        *(
            [
                f"this, {kind}",
                f"{one.seconds['all']:.1f}",
                f"{one.wall:.1f}",
                f"{one.peak / MIB:.0f}",
                f"at most {bank:,}",
            ]
            for kind, one in fits.items()
        ),
    ]
    show("Beside anomalib", ["", "fit, s", "with imports, s", "peak memory, MiB", "bank"], rows)
    for kind, one in fits.items():
        print(f"anomalib / this, {kind}: {found['fit'] / one.seconds['all']:.1f} (bar {BAR:g})")


def grown(scratch: Path, weights: Weights, numbers: list[int], size: int) -> None:
    """Print memory and time of fits on more and more small pictures."""
    rows = []
    for i, number in enumerate(numbers):
        folder = draw(scratch / f"many{number}", number, 96, scratch)
        fitted = fit_product(folder, scratch / f"many_store{i}", "parts", weights, detectors=WITHOUT, size=[size, size])
        peaks = f"{fitted.peak / MIB:.0f}", f"{fitted.own / MIB:.0f}"
        rows.append([f"{number:,}", f"{fitted.seconds['all']:.1f}", *peaks])
    columns = ["pictures", "all, s", "peak memory, MiB", "peak without mapped files, MiB"]
    show(f"As the folder grows, at {size} x {size}, without the VAE", columns, rows)


if __name__ == "__main__":
    typer.run(main)
