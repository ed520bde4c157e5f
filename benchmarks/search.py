"""What each search of the memory bank costs and finds, by the entries in the bank.

    python benchmarks/search.py                                # ball_screws from ../shared, or a generated set
    python benchmarks/search.py --data FOLDER --sizes 10000,30000 --kinds ivf,hnsw

The queries are the 784 patches of each of four normal test pictures. The bank is a greedy coreset of the training
pictures up to 30,000 entries, and drawn at random from all other pictures beyond. Each index has the least effort that
finds 99.5 % of the nearest entries (`pq`: of entries at most 5 % farther). Times are of one core (CPU time of one
thread, the least of several), a picture at a time, each index in turn with the products, so that other work on the
machine counts little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from common import choose_pictures, files_in, find_weights, heading, show
from numpy.typing import NDArray

NEIGHBOURS, QUERIES, GREEDY, DIMENSIONS, BATCH = 3, 4, 30_000, 128, 8
SIZE = (224, 224)
ENOUGH = 0.995


def extract(folder: Path, scratch: Path) -> tuple[NDArray[np.float16], int, NDArray[np.float32]]:
    """Projected patches (m, d) of all pictures but four, how many of them are of training, and those of the four."""
    from ood_runners import images
    from ood_runners.backbones import BackboneInfo, FeatureNetwork, Projection, ProjectionFitter, export_backbone

    weights = find_weights(scratch)
    export_backbone(weights.backbone, weights.path, scratch)
    layers = BackboneInfo.load(scratch).spec.patch_layers
    train, test = files_in(folder / "train"), files_in(folder / "test")
    good = [file for file in test if file.parent.name == "good"]
    asked = [good[i] for i in np.linspace(0, len(good) - 1, QUERIES).astype(int)]
    others = train + [file for file in test if file not in asked]

    def network(projection: Projection | None) -> FeatureNetwork:
        return FeatureNetwork.load(scratch, size=SIZE, patch_layers=layers, projection=projection, device="cpu")

    def run(one: FeatureNetwork, files: list[Path]) -> list[NDArray[np.float32]]:
        parts = []
        for start in range(0, len(files), BATCH):
            pixels = np.stack([images.resize(images.read(file), SIZE) for file in files[start : start + BATCH]])
            parts.append(np.asarray(one(pixels).patches))
        return parts

    fitter = ProjectionFitter()
    for part in run(network(None), train):
        fitter.partial_fit(part)
    projected = network(fitter.finish(DIMENSIONS))
    bank, queries = (np.concatenate(run(projected, files)).reshape(-1, DIMENSIONS) for files in (others, asked))
    trained = len(bank) * len(train) // len(others)
    return bank.astype(np.float16), trained, queries.astype(np.float32)


def cpu_ms(work: Callable[[], object]) -> float:
    """CPU milliseconds of one call."""
    start = time.process_time()
    work()
    return 1000 * (time.process_time() - start)


def rows_of(bank: NDArray[np.float16], queries: NDArray[np.float32], kinds: list[str]) -> list[list[str]]:
    """One line of the table for the products and for each kind of index."""
    from ood_runners.detectors.indexes import EFFORTS, SLACK, Index
    from ood_runners.detectors.search import Search

    exact, rounded = (Search(bank, NEIGHBOURS, rounded=one, threads=1) for one in (False, True))
    nearest = exact.search(queries)[0]
    noise = 1e-5 * np.einsum("ij,ij->i", queries, queries) + 1e-6

    def found(squared: NDArray[np.float32], kind: str = "") -> float:
        return float(np.mean(squared[:, 0] <= nearest[:, 0] * SLACK.get(kind, 1 + 1e-4) + noise))

    def farther(squared: NDArray[np.float32]) -> float:
        return float(np.sqrt(squared).mean() / np.sqrt(nearest).mean() - 1)

    picture, size = queries[: len(queries) // QUERIES], f"{len(bank):,}"
    lines: list[list[str]] = []
    for kind in kinds:
        start = time.process_time()
        index = Index(kind, bank, NEIGHBOURS, 1, threads=1)
        built = time.process_time() - start
        for effort in EFFORTS[kind]:
            index.use(effort)
            squared = index.search(queries)[0]
            if found(squared, kind) >= ENOUGH:
                break
        searches = [one.search for one in (exact, rounded, index)]
        times = [[cpu_ms(partial(search, picture)) for search in searches] for _ in range(3)]
        best = [f"{value:.1f}" for value in np.min(times, axis=0)]
        quality = f"{found(squared):.4f}, +{100 * farther(squared):.3f} %"
        lines.append([size, kind, str(index.effort), quality, f"{built:.1f}", best[2], best[0], best[1]])
    lines.append([size, "int8", "", f"{found(rounded.search(queries)[0]):.4f}", "", "", "", ""])
    return lines


def main() -> None:
    """Read the command line, measure every size and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a set in MVTec's layout")
    parser.add_argument("--sizes", default="1000,2000,5000,10000,30000,100000,300000")
    parser.add_argument("--kinds", default="pq,ivf,hnsw,lsh")
    parser.add_argument("--quick", action="store_true", help="a small generated set, to see that it works")
    options = parser.parse_args()
    sizes = [300, 1_000] if options.quick else [int(size) for size in options.sizes.split(",")]
    with TemporaryDirectory() as name:
        scratch = Path(name)
        folder, what = choose_pictures(options.data, scratch, 8 if options.quick else 400)
        heading(what)
        (scratch / "backbone").mkdir()
        patches, trained, queries = extract(folder, scratch / "backbone")
    from ood_runners.detectors.coreset import greedy_coreset

    rng, rows = np.random.default_rng(0), []
    for size in sizes:
        chosen = greedy_coreset(patches[:trained], size) if size <= GREEDY else rng.permutation(len(patches))[:size]
        for row in rows_of(patches[chosen], queries, options.kinds.split(",")):
            rows.append(row)
            print("| " + " | ".join(row) + " |", flush=True)
    columns = ["entries", "search", "effort", "recall@1, mean distance", "built, s", "ms", "exact, ms", "int8, ms"]
    show("CPU milliseconds of a picture's 784 patches", columns, rows)


if __name__ == "__main__":
    main()
