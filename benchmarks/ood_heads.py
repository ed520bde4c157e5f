"""Out-of-distribution heads against pytorch-ood's detectors, on the same features, logits and final layers.

    python benchmarks/ood_heads.py                   # with what is in ../shared, and what packages ship
    python benchmarks/ood_heads.py --markdown FILE   # the tables for docs/accuracy.md

Two protocols. *A network's own categories*: half of the known photographs, drawn by seed, for fitting, the other half
against each other set. *Class folders*: a few classes, drawn by seed, are known and half of their pictures are for
fitting; their other half against the classes left out, which is the near case, and against other sets.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from ood_peers import fit_peers
from ood_sets import SHARED, SIZE, Sets, find, spoilt
from sklearn.metrics import roc_auc_score

from ood_runners.backbones import FeatureNetwork, export_backbone, get_spec
from ood_runners.backbones.classifier import read_classifier
from ood_runners.detectors import Softmax
from ood_runners.detectors.heads import HEADS, Linear
from ood_runners.features import Features

OURS = ("auto", *HEADS)
SEEDS = 5
KNOWN_SHARE = 0.7  # of the classes
WEIGHTS = SHARED / "weights" / "resnet50_v1_full_int8.safetensors"
BATCH = 8
Table = dict[str, dict[str, list[tuple[float, float]]]]


class Extractor:
    """Features of pictures by one backbone, each set once."""

    def __init__(self, backbone: str, weights: Path | None, scratch: Path) -> None:
        self.name, self.layer = backbone, get_spec(backbone).embedding
        folder = scratch / backbone
        folder.mkdir()
        export_backbone(backbone, weights, folder)
        layer = read_classifier(folder)
        if layer is None:
            raise SystemExit(f"The weights of {backbone} have no classification head.")
        self.linear = Linear(*layer)
        self._network = FeatureNetwork.load(folder, size=SIZE, pooled_layers=[self.layer], logits=True)
        self._found: dict[str, Features] = {}

    def __call__(self, name: str, pictures: NDArray[np.uint8]) -> Features:
        """Features of the set of that name, computed at the first call."""
        if name not in self._found:
            parts = [self._network(pictures[i : i + BATCH]) for i in range(0, len(pictures), BATCH)]
            self._found[name] = Features.concatenate(parts)
        return self._found[name]


def rates(normal: NDArray[np.floating], strange: NDArray[np.floating]) -> tuple[float, float]:
    """AUROC, and the share of normal pictures above the score that 95 % of the strange ones reach."""
    truth = np.concatenate([np.zeros(len(normal)), np.ones(len(strange))])
    auroc = float(roc_auc_score(truth, np.concatenate([normal, strange])))
    return auroc, float((normal >= np.quantile(strange, 0.05)).mean())


def measure(
    table: Table,
    extractor: Extractor,
    known: Features,
    labels: NDArray[np.int64] | None,
    normal: Features,
    strange: Mapping[str, Features],
) -> None:
    """Fit every detector on `known` and add its rates on each set to the table."""
    scorers = {}
    linear = extractor.linear
    for head in OURS:
        detector = Softmax(head=head)
        detector.classifier = extractor.linear
        detector.fit(known, labels)
        linear = detector.linear_ or linear
        scorers[head] = lambda queries, detector=detector: detector.score(queries).image
    logits = linear(known.pooled[extractor.layer])
    classes = logits.argmax(axis=1) if labels is None else labels
    peers = fit_peers(known, logits, extractor.layer, linear, np.asarray(classes, np.int64))
    scorers |= {f"pytorch-ood {name}": score for name, score in peers.items()}
    for name, score in scorers.items():
        usual = score(normal)
        for where, features in strange.items():
            table[name][where].append(rates(usual, score(features)))


def own_categories(sets: Sets, extractor: Extractor) -> Table:
    """The network's own categories; spoilt pictures are made of those that are not for fitting."""
    assert sets.known is not None
    pictures = sets.known()
    known = extractor("known", pictures)
    outside = {name: extractor(name, load()) for name, load in sets.outside.items()}
    every = np.arange(0, len(pictures), 4)
    worse = {name: extractor(name, made) for name, made in spoilt(pictures[every]).items()}
    table: Table = defaultdict(lambda: defaultdict(list))
    for seed in range(SEEDS):
        order = np.random.default_rng(seed).permutation(len(known))
        fitting, rest = order[: len(order) // 2], order[len(order) // 2 :]
        unseen = np.flatnonzero(np.isin(every, rest))
        strange = outside | {name: features[unseen] for name, features in worse.items()}
        measure(table, extractor, known[fitting], None, known[rest], strange)
    return table


def class_folders(sets: Sets, extractor: Extractor) -> Table:
    """Categories of the user's own: ``near`` are the classes left out, ``far`` the other sets together."""
    table: Table = defaultdict(lambda: defaultdict(list))
    for name, load in sets.labelled.items():
        pictures, labels = load()
        features = extractor(f"{name} by class", pictures)
        others = [extractor(other, there()) for other, there in sets.outside.items() if other not in (name, "noise")]
        for seed in range(SEEDS):
            rng = np.random.default_rng(seed)
            classes = rng.permutation(np.unique(labels))
            chosen = np.isin(labels, classes[: round(KNOWN_SHARE * len(classes))])
            rows = rng.permutation(np.flatnonzero(chosen))
            fitting, rest = rows[: len(rows) // 2], rows[len(rows) // 2 :]
            numbers = np.unique(labels[fitting], return_inverse=True)[1].astype(np.int64)
            strange = {f"{name} near": features[np.flatnonzero(~chosen)], f"{name} far": Features.concatenate(others)}
            measure(table, extractor, features[fitting], numbers, features[rest], strange)
    return table


def written(title: str, table: Table) -> str:
    """A Markdown table, AUROC / FPR at 95 % in percent, and where `auto` stands beside the best of the others' row."""
    columns = list(next(iter(table.values())))
    lines = [f"**{title}**", "", f"| head | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for name, row in table.items():
        means = [np.mean(row[column], axis=0) for column in columns]
        lines.append(f"| {name} | {' | '.join(f'{auroc:.3f} / {100 * fpr:.0f}' for auroc, fpr in means)} |")
    behind = []
    for column in columns:
        auroc = {name: float(np.mean([pair[0] for pair in row[column]])) for name, row in table.items()}
        peer = max((name for name in auroc if name.startswith("pytorch")), key=auroc.__getitem__)
        if auroc["auto"] < auroc[peer]:
            behind.append(f"{column} ({peer.removeprefix('pytorch-ood ')} {auroc[peer]:.3f}, auto {auroc['auto']:.3f})")
    lines += ["", f"`auto` is behind the best of pytorch-ood's on {', '.join(behind) or 'no set'}.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables here")
    arguments = parser.parse_args()
    started = time.monotonic()
    sets = find()
    backbones: list[tuple[str, Path | None]] = [("efficientnet_lite0", None)]
    if WEIGHTS.exists():
        backbones.insert(0, ("resnet50_v1", WEIGHTS))
    text = []
    with TemporaryDirectory(prefix="ood-heads-") as scratch:
        for name, weights in backbones:
            extractor = Extractor(name, weights, Path(scratch))
            if sets.known is not None:
                text.append(written(f"{name}, its own categories", own_categories(sets, extractor)))
                print(text[-1], flush=True)
            text.append(written(f"{name}, class folders", class_folders(sets, extractor)))
            print(text[-1], flush=True)
    if arguments.markdown is not None:
        arguments.markdown.write_text("\n".join(text), encoding="utf-8")
    print(f"{SEEDS} seeds, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
