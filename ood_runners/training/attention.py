"""Directions of the patch features that count for more because labelled defects show there.

The memory bank measures a patch by its difference from the nearest normal patches. Where the user has pictures of
defects, a linear map of the patches, learned from them, makes directions count for more in which the strangest places
of defects differ most: with S the mean outer product of their differences, its square is ``S ** (1 / 4)``. The quarter
keeps most of the plain distance: few defects say little of 128 directions. Normal pictures have no part in it: weights
that make theirs small would make the scores that calibrate smaller than those of new normal pictures.

Whether it helps is judged by cross-validation: weights from four fifths of the defects, the AUROC of the last
fifth against held-out normal pictures. Otherwise the product is fitted as if there were no defects.

Synthetic defects do not do here: what is learned from some of them finds others far better, and real ones worse
(docs/accuracy.md).

References
----------
Arsigny et al., "Log-Euclidean metrics for fast and simple calculus on diffusion tensors", 2006 (means and powers of
covariances by their logarithms).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_runners.backbones import FeatureNetwork
from ood_runners.detectors import MemoryBank
from ood_runners.detectors.base import top_count, top_mean
from ood_runners.detectors.position import LEAST_PICTURES, MOST_EXPLAINED, Position, explained
from ood_runners.detectors.search import Search
from ood_runners.errors import BadParameter, DataError
from ood_runners.features import Features
from ood_runners.training.datasets import Dataset, defects_in
from ood_runners.training.extract import BATCH
from ood_runners.training.progress import Progress
from ood_runners.training.robustness import read_some

LEAST, MOST = 5, 100  # pictures of defects
NORMALS = 60  # of the normal pictures, at most, that are learned and judged from
BANK, NEAREST, K = 2_000, 5, 3
PARTS = 5
STRENGTH = 0.25
CORRELATED = 0.8  # share of the off-diagonal of mean outer products that is kept
_FLOOR = 1e-3  # of the largest eigenvalue: fewer differences than directions say nothing of the rest

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Attention:
    """What came of it.

    Attributes
    ----------
    matrix : float32 (d, d), symmetric, that patches are multiplied by; None where it does not help
    defects : pictures of defects that it was learned from
    plain, weighted : AUROC of defects left out against normal pictures left out, without and with weights
    """

    matrix: Floats | None
    defects: int
    plain: float
    weighted: float

    def note(self) -> str:
        """One sentence for the manifest and the person who asked."""
        change = f"AUROC of those left out in turn {self.plain:.3f} without, {self.weighted:.3f} with weights"
        used = "are used" if self.matrix is not None else "are not used, as they do not help"
        return f"Weights learned from {self.defects} pictures of defects {used} ({change})."

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "attention": {
                "used": self.matrix is not None,
                "defects": self.defects,
                "auroc": round(self.plain, 4),
                "auroc_weighted": round(self.weighted, 4),
            }
        }


@dataclass(frozen=True)
class Compared:
    """Pictures' patches (n, h, w, d), their nearest entries of a bank float32 (m, d), int64 (n, cells, 5), and the mean
    outer products of the differences of their strangest cells, float64 (n, d, d).
    """

    patches: NDArray[Any]
    bank: Floats
    nearest: NDArray[np.int64]
    moments: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        patches: NDArray[Any],
        bank: Floats,
        without: NDArray[np.bool_] | None = None,
        cells: NDArray[np.bool_] | None = None,
    ) -> Compared:
        """`without` bool (m,): entries passed over; `cells` bool (n, cells): where to look for the strangest."""
        n, h, w, d = patches.shape
        search = Search(bank, NEAREST, without=without)
        nearest = np.empty((n, h * w, min(NEAREST, search.k)), np.int64)
        moments = np.empty((n, d, d))
        for i in range(n):
            points = np.asarray(patches[i], np.float32).reshape(-1, d)
            nearest[i] = search.search(points)[1]
            differences = points[:, None] - bank[nearest[i][:, :K]]
            distance = np.sqrt(np.einsum("ijk,ijk->ij", differences, differences)).mean(axis=1)
            where = np.arange(h * w) if cells is None else np.flatnonzero(cells[i])
            chosen = differences[where[np.argsort(-distance[where])[: top_count(h * w)]]].reshape(-1, d)
            moments[i] = chosen.T @ chosen / len(chosen)
        return cls(np.asarray(patches), bank, nearest, moments)

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, rows: NDArray[Any]) -> Compared:
        return Compared(self.patches[rows], self.bank, self.nearest[rows], self.moments[rows])

    def maps(self, weights: Floats | None = None) -> Floats:
        """Mean distance to the nearest three of the five entries, float32 (n, h, w), with weights (d, d)."""
        n, h, w, d = self.patches.shape
        found = np.empty((n, h, w), np.float32)
        entries = self.bank if weights is None else self.bank @ weights
        for i in range(n):
            points = np.asarray(self.patches[i], np.float32).reshape(-1, d)
            points = points if weights is None else points @ weights
            differences = points[:, None] - entries[self.nearest[i]]
            distance = np.sqrt(np.einsum("ijk,ijk->ij", differences, differences))
            found[i] = np.sort(distance, axis=1)[:, :K].mean(axis=1).reshape(h, w)
        return found


def weights(defective: NDArray[np.float64], normal: NDArray[np.float64]) -> Floats:
    """The symmetric map float32 (d, d) from the mean outer product of defects' differences (d, d); that of normal
    pictures gives the scale alone: the mean square of theirs stays as it is.
    """
    shrunk = CORRELATED * defective + (1 - CORRELATED) * np.diag(np.diag(defective))
    values, vectors = np.linalg.eigh(shrunk)
    values = np.maximum(values, _FLOOR * max(float(values[-1]), 1e-30))
    logs = STRENGTH * (np.log(values) - np.log(values).mean())
    root = (vectors * np.exp(logs / 2)) @ vectors.T
    kept = float(np.trace(root @ normal @ root))
    return np.asarray(root * np.sqrt(np.trace(normal) / kept) if kept > 0 else root, np.float32)


def compare_normals(patches: NDArray[Any], seed: int = 0) -> tuple[Compared, NDArray[np.int64]]:
    """Normal pictures (n, h, w, d) by a small bank of the others, and the fold of each."""
    folds = np.random.default_rng(seed).permutation(np.arange(len(patches)) % PARTS)
    bank = MemoryBank(size=BANK, seed=seed, search="exact")
    bank.fit_held_out(Features(patches=patches), folds)
    entries = bank.bank_.astype(np.float32)
    parts = [Compared.of(patches[folds == fold], entries, bank.fold_ == fold) for fold in range(PARTS)]
    order = np.argsort(np.argsort(folds, kind="stable"))
    return (
        Compared(
            np.asarray(patches),
            entries,
            np.concatenate([part.nearest for part in parts])[order],
            np.concatenate([part.moments for part in parts])[order],
        ),
        folds,
    )


def judge(normal: Compared, folds: NDArray[np.int64], defects: Compared, seed: int = 0) -> Attention:
    """Learn from all, and cross-validate whether that helps."""
    parts = np.random.default_rng(seed).permutation(np.arange(len(defects)) % PARTS)
    plain_maps, plain_odd = normal.maps(), defects.maps()
    by_place = len(normal) >= LEAST_PICTURES and explained(plain_maps) <= MOST_EXPLAINED
    scores: list[list[NDArray[np.float32]]] = [[], []]
    strange: list[NDArray[np.bool_]] = []
    for part in range(PARTS):
        inside, others, one = folds == part, folds != part, parts == part
        learned = weights(defects.moments[~one].mean(axis=0), normal.moments.mean(axis=0))
        pairs = ((plain_maps, plain_odd[one]), (normal.maps(learned), defects[one].maps(learned)))
        for which, (maps, odd) in enumerate(pairs):
            if by_place:
                position = Position.fit(maps[others])
                maps, odd = position.apply(maps), position.apply(odd)
            scores[which] += [top_mean(maps[inside]), top_mean(odd)]
        strange += [np.zeros(int(inside.sum()), bool), np.ones(int(one.sum()), bool)]
    from sklearn.metrics import roc_auc_score

    plain, weighted = (float(roc_auc_score(np.concatenate(strange), np.concatenate(one))) for one in scores)
    matrix = weights(defects.moments.mean(axis=0), normal.moments.mean(axis=0)) if weighted > plain else None
    return Attention(matrix, len(defects), plain, weighted)


def check_defects(folder: Path | None, detectors: Collection[str]) -> None:
    """DataError or BadParameter where the folder holds no pictures, or no detector learns from them."""
    if folder is None:
        return
    if MemoryBank.name not in detectors:
        raise BadParameter(f"--defects is for {MemoryBank.name}; fit it too, or leave the defects out.")
    defects_in(folder)


def learn(
    features: Features, network: FeatureNetwork, folder: Path, dataset: Dataset, *, seed: int, progress: Progress
) -> Attention:
    """Weights from the pictures in `folder`, for a bank of the normal pictures' `features`.

    At most 100 defects and 60 normal pictures are looked at, drawn by `seed`. No training picture of `dataset` may
    lie in `folder`.

    Raises
    ------
    DataError
        Fewer than 5 pictures of defects can be read, or the folder holds normal pictures that are fitted on.
    """
    files = defects_in(folder)
    known = {file.path.resolve() for file in dataset.train}
    if any(file.path.resolve() in known for file in files):
        raise DataError(f"{folder} holds pictures that are fitted on as normal; give a folder of defects only.")
    rng = np.random.default_rng(seed)
    read = read_some([files[i] for i in rng.permutation(len(files))], network.size, MOST)
    if len(read) < LEAST:
        raise DataError(
            f"{len(read)} pictures of defects in {folder} can be read; at least {LEAST} are needed to learn from, so "
            "give more or leave --defects out."
        )
    pictures = np.stack([picture for _, picture in read])
    if features.patches is None:
        raise RuntimeError("weights without patches")
    rows = np.sort(rng.permutation(len(features))[:NORMALS])
    with progress.stage("defects", total=len(pictures) + len(rows)) as stage:
        parts = []
        for start in range(0, len(pictures), BATCH):
            parts.append(network(pictures[start : start + BATCH]))
            stage.advance(len(parts[-1]))
        patches = Features.concatenate(parts).patches
        if patches is None:
            raise RuntimeError("a network asked for patches gave none")
        normal, folds = compare_normals(np.asarray(features.patches[rows]), seed)
        found = judge(normal, folds, Compared.of(patches, normal.bank), seed)
        stage.advance(len(rows))
    return found
