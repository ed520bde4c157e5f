"""What weights on the patches' features give, learned from synthetic defects or from labelled ones (`fit --defects`).

    python benchmarks/channel_weights.py generated ../shared/data/cookies          # folders in MVTec's layout
    python benchmarks/channel_weights.py --backbone resnet50_v1 ../shared/data/cookies

The memory bank measures a patch by its difference from the nearest normal patches. Directions count for
more in which the strangest cells of defects differ most (`training/attention.py`).
"Unseen types": for each of the seven synthetic defects, weights come from the other six on one half of the training
pictures and are judged by the seventh on the other half. "Real defects": the test pictures, with weights from all
seven. "Labelled": weights from 10 of the real defects, judged by the others, 4 draws: used always, and used where
cross-validation says that they help.

Differences are those to the five nearest entries of the bank as it is, measured anew. Points of image AUROC of the
memory bank, by place where it goes by it; at most 60 pictures of each kind. The last column is `MemoryBank` itself,
fitted without and with the weights of the first draw of 10.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from contamination import network_of
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from ood_runners.detectors import MemoryBank
from ood_runners.detectors.base import top_mean
from ood_runners.detectors.position import LEAST_PICTURES, MOST_EXPLAINED, Position, explained
from ood_runners.features import Features
from ood_runners.training.attention import BANK, PARTS, Compared, compare_normals, judge, weights
from ood_runners.training.datasets import discover
from ood_runners.training.inspection_set import generate
from ood_runners.training.robustness import read_some
from ood_runners.training.synthetic import KINDS, synthetic_defects

SIZE, BATCH, MOST = (224, 224), 8, 60
EACH = 28  # synthetic defects of each type
LABELLED, DRAWS = 10, 4


@dataclass(frozen=True)
class Pictures:
    """Patches (n, h, w, d) of normal pictures, of synthetic defects made from them, and of test pictures.

    `origin` and `kind` int64: of the synthetic defects; `painted` bool (n, cells): where they are; `defective` bool: of
    the test pictures.
    """

    normal: NDArray[Any]
    made: NDArray[Any]
    origin: NDArray[np.int64]
    kind: NDArray[np.int64]
    painted: NDArray[np.bool_]
    test: NDArray[Any]
    defective: NDArray[np.bool_]


def read(root: Path, backbone: str) -> Pictures:
    """The folder's pictures, synthetic defects on its training pictures, and the patches of all."""
    dataset, rng = discover(root), np.random.default_rng(0)
    train, good, bad = (
        np.stack([picture for _, picture in read_some([files[i] for i in rng.permutation(len(files))], SIZE, MOST)])
        for files in (
            dataset.train,
            [file for file in dataset.test if file.label == "good"],
            [file for file in dataset.test if file.label != "good"],
        )
    )
    origin = np.concatenate([np.resize(rng.permutation(len(train)), EACH) for _ in KINDS])
    kind = np.repeat(np.arange(len(KINDS)), EACH)
    made = [synthetic_defects(train[origin[kind == i]], rng, [name]) for i, name in enumerate(KINDS)]
    with TemporaryDirectory() as folder:
        network = network_of(backbone, Path(folder), train)

        def patches(pictures: NDArray[np.uint8]) -> NDArray[Any]:
            parts = [network(pictures[i : i + BATCH]).patches for i in range(0, len(pictures), BATCH)]
            return np.concatenate([part for part in parts if part is not None])

        normal, test = patches(train), patches(np.concatenate([good, bad]))
        synthetic = patches(np.concatenate([one for one, _ in made]))
    rows, columns = normal.shape[1:3]
    cover = np.concatenate([mask for _, mask in made])
    share = cover.reshape(len(cover), rows, SIZE[0] // rows, columns, SIZE[1] // columns).mean(axis=(2, 4))
    painted = (share >= np.minimum(0.25, share.max(axis=(1, 2), keepdims=True))).reshape(len(cover), -1)
    return Pictures(normal, synthetic, origin, kind, painted, test, np.arange(len(test)) >= len(good))


class Trial:
    """One set's pictures, compared with a bank once."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures
        self.normal, self.folds = compare_normals(pictures.normal)
        parts, rows = [], []
        bank = MemoryBank(size=BANK, search="exact")  # as in `compare_normals`
        bank.fit_held_out(Features(patches=pictures.normal), self.folds)
        for fold in range(PARTS):
            rows.append(np.flatnonzero(self.folds[pictures.origin] == fold))
            painted = pictures.painted[rows[-1]]
            parts.append(Compared.of(pictures.made[rows[-1]], self.normal.bank, bank.fold_ == fold, painted))
        order = np.argsort(np.concatenate(rows))
        arrays = (np.concatenate([getattr(part, name) for part in parts])[order] for name in ("nearest", "moments"))
        self.made = Compared(pictures.made, self.normal.bank, *arrays)
        self.test = Compared.of(pictures.test, self.normal.bank)
        self.by_place = len(self.normal) >= LEAST_PICTURES and explained(self.normal.maps()) <= MOST_EXPLAINED
        self.plain = self.scores(self.normal, self.test)[1]

    def scores(
        self, normal: Compared, others: Compared, matrix: NDArray[np.float32] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Image scores of held-out normal pictures and of others."""
        maps, odd = normal.maps(matrix), others.maps(matrix)
        if self.by_place:
            position = Position.fit(maps)
            maps, odd = position.apply(maps), position.apply(odd)
        return top_mean(maps), top_mean(odd)

    def gain(self, matrix: NDArray[np.float32] | None, without: NDArray[np.int64] | None = None) -> float:
        """By how much AUROC of the test pictures, some left out, rises: in points."""
        keep = np.ones(len(self.test), bool)
        keep[[] if without is None else without] = False
        strange = self.pictures.defective[keep]
        found = self.plain if matrix is None else self.scores(self.normal, self.test, matrix)[1]
        return 100 * float(roc_auc_score(strange, found[keep]) - roc_auc_score(strange, self.plain[keep]))

    def unseen(self) -> NDArray[np.float64]:
        """AUROC of each synthetic type by weights from the others: float64 (types, 2), as it is and weighted."""
        half, kind = self.folds % 2, self.pictures.kind
        half_made = half[self.pictures.origin]
        found = np.empty((len(KINDS), 2))
        for one in range(len(KINDS)):
            others = self.made.moments[(kind != one) & (half_made == 0)].mean(axis=0)
            learned = weights(others, self.normal.moments.mean(axis=0))
            normal, made = self.normal[half == 1], self.made[(kind == one) & (half_made == 1)]
            strange = np.arange(len(normal) + len(made)) >= len(normal)
            for which, matrix in enumerate((None, learned)):
                found[one, which] = 100 * roc_auc_score(strange, np.concatenate(self.scores(normal, made, matrix)))
        return found

    def by_bank(self, matrix: NDArray[np.float32] | None, without: NDArray[np.int64]) -> float:
        """AUROC of the test pictures, some left out, by `MemoryBank` itself."""
        bank = MemoryBank(size=BANK)
        bank.attention_ = matrix
        bank.fit_held_out(Features(patches=self.pictures.normal), self.folds)
        rows = np.setdiff1d(np.arange(len(self.test)), without)
        scores = bank.score(Features(patches=self.pictures.test[rows])).image
        return 100 * float(roc_auc_score(self.pictures.defective[rows], scores))


def row(name: str, pictures: Pictures) -> str:
    """One row of the table."""
    trial = Trial(pictures)
    cells = [f"{100 * roc_auc_score(pictures.defective, trial.plain):.2f}"]
    unseen = trial.unseen()
    rise = unseen[:, 1] - unseen[:, 0]
    learned = weights(trial.made.moments.mean(axis=0), trial.normal.moments.mean(axis=0))
    cells += [f"{rise.mean():+.2f} ({rise.min():+.2f})", f"{trial.gain(learned):+.2f}"]
    defects = np.flatnonzero(pictures.defective)
    if len(defects) < LABELLED + 10:
        return f"| {name} | {' | '.join(cells)} | too few | | |"
    always, kept, used = [], [], 0
    for draw in range(DRAWS):
        chosen = np.random.default_rng(draw).permutation(defects)[:LABELLED]
        found = judge(trial.normal, trial.folds, trial.test[chosen], draw)
        learned = weights(trial.test.moments[chosen].mean(axis=0), trial.normal.moments.mean(axis=0))
        always.append(trial.gain(learned, chosen))
        kept.append(0.0 if found.matrix is None else always[-1])
        used += found.matrix is not None
    cells += [
        f"{np.mean(always):+.2f} ({min(always):+.2f})",
        f"{np.mean(kept):+.2f} ({min(kept):+.2f}), {used} of {DRAWS}",
    ]
    chosen = np.random.default_rng(0).permutation(defects)[:LABELLED]
    learned = weights(trial.test.moments[chosen].mean(axis=0), trial.normal.moments.mean(axis=0))
    cells.append(f"{trial.by_bank(None, chosen):.2f}, {trial.by_bank(learned, chosen):.2f}")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    arguments = parser.parse_args()
    titles = [
        "set",
        "as it is",
        "synthetic: unseen types (worst)",
        "synthetic: real defects",
        "labelled: always (worst)",
    ]
    titles += ["labelled: if it helps (worst)", "MemoryBank, without and with labelled"]
    print(f"| {' | '.join(titles)} |")
    print("| --- " * len(titles) + "|")
    with TemporaryDirectory() as scratch:
        for folder in arguments.folders:
            root = Path(folder)
            if folder == "generated":
                root = generate(Path(scratch) / "pictures", train=60, good=40, per_defect=8)
            print(row(folder if folder == "generated" else root.name, read(root, arguments.backbone)), flush=True)


if __name__ == "__main__":
    main()
