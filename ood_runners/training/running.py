"""The work of a fit: features, screening, detectors and their held-out scores, calibration."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ood_runners import images
from ood_runners.backbones.classifier import read_classifier
from ood_runners.calibration import Calibration
from ood_runners.calibration.weights import fusion_weights, knows_pictures
from ood_runners.detectors import DETECTORS, Detector, MemoryBank, Softmax, Vae
from ood_runners.detectors.base import Probes
from ood_runners.detectors.heads import Linear
from ood_runners.features import Features, Scores, scorer
from ood_runners.pipeline import place, score_all
from ood_runners.training import attention as attending
from ood_runners.training import contamination as contaminated
from ood_runners.training.augment import LIGHT, fit_held_out, under_light
from ood_runners.training.prepare import Prepared, prepare
from ood_runners.training.probes import probes_of
from ood_runners.training.profiles import Cost, largest_bank, milliseconds, nbytes, trial
from ood_runners.training.progress import Stage
from ood_runners.training.writing import FOLDS, Fitted, FittedPart, Task, thumbnails

# A network is trained anew for each fold: three cost what a user will wait for.
FOLDS_OF = {"vae": 3}
BANK = MemoryBank.name


def run(task: Task, members: Mapping[str, Task], scratch: Path) -> Fitted:
    """Fit a version's own detectors and those of its `members` on the same pictures, and calibrate them together."""
    clock = _Clock()
    prepared = _prepare(task, scratch)
    clock("features")
    folders, categories = bool(task.dataset.classes), knows_pictures(prepared.features.logits)
    screened = contaminated.Screened.nothing(len(task.training.pictures))
    if (
        task.contamination == contaminated.AUTO
        and prepared.features.patches is not None
        and not (folders or categories)
    ):
        screened = contaminated.screen(prepared.features, seed=task.seed, progress=task.progress, entry=prepared.entry)
        clock("contamination")
    # A scratch does not make it another category.
    probing = len(task.names) + len(members) > 1 and not (folders or categories)
    own = _fit_part(task, prepared, screened, scratch, clock, probing)
    parts = {"": own}
    for name, other in members.items():
        parts[name] = _fit_part(other, _prepare(other, scratch / name), screened, scratch / name, clock, probing, name)
    held_out = {scorer(detector, name): one for name, part in parts.items() for detector, one in part.held_out.items()}
    probed = {scorer(detector, name): one for name, part in parts.items() for detector, one in part.probed.items()}
    with task.progress.stage("calibration", total=1) as stage:
        fusion = fusion_weights(held_out, folders=folders, categories=categories)
        calibration = Calibration.fit(
            held_out, fusion, task.profile.size, task.alpha, probes=probed if probing else None
        )
        stage.advance()
    clock("calibration")
    left_out = screened.left_out(task.training, task.dataset.root)
    return Fitted(parts.pop(""), parts, left_out, screened.rows, held_out, calibration, clock.seconds)


def _prepare(task: Task, scratch: Path) -> Prepared:
    return prepare(
        task.training,
        task.backbone,
        task.names,
        device=task.device,
        precision=task.precision,
        seed=task.seed,
        scratch=scratch,
        progress=task.progress,
    )


def _fit_part(
    task: Task,
    prepared: Prepared,
    screened: contaminated.Screened,
    scratch: Path,
    clock: _Clock,
    probing: bool,
    member: str = "",
) -> FittedPart:
    """The detectors of one network, fitted on the pictures that `screened` leaves."""
    rng = np.random.default_rng(task.seed)
    every = prepared.features
    if member:
        clock(scorer("features", member))
    training, prepared = contaminated.only(task.training, prepared, screened.fitted, scratch)
    features = prepared.features
    light = None
    if task.augment == LIGHT:
        light = under_light(prepared, training.pictures, scratch, task.progress)
        clock(scorer(LIGHT, member))
    labels = training.labels(task.dataset.classes)
    probes = None
    if probing:
        probes = probes_of(training.pictures, screened.fitted, prepared, task.seed, task.progress)
        clock(scorer("synthetic", member))
    attention = None
    if task.defects is not None and prepared.network is not None and BANK in task.names:
        attention = attending.learn(
            features, prepared.network, task.defects, task.dataset, seed=task.seed, progress=task.progress
        )
        clock(scorer("defects", member))
    weights = None if attention is None else attention.matrix
    # Weights that were learned say what counts, in the map too.
    fine = None if weights is not None or prepared.projection is None else prepared.projection.fine
    detectors: dict[str, Detector] = {}
    held_out: dict[str, Scores] = {}
    probed: dict[str, Scores] = {}
    for name in sorted(task.names, key=lambda name: bool(task.budget) and name == BANK):  # then it comes last
        bank = task.profile.bank
        if task.budget and name == BANK:
            bank = _affordable(task, prepared, detectors, weights, fine)
            clock("budget")
        detectors[name], scores = _fit_detector(task, name, features, light, labels, probes, rng, bank, weights, fine)
        unseen = contaminated.score_held_back(detectors[name], every, screened)
        held_out[name] = Scores.concatenate([scores[: len(features)][screened.calibrated], *unseen])
        probed[name] = scores[len(features) :]
        clock(scorer(name, member))
    return FittedPart(
        task=task,
        training=training,
        prepared=prepared,
        detectors={name: detectors[name] for name in task.names},
        held_out={name: held_out[name] for name in task.names},
        probed={name: probed[name] for name in task.names},
        attention=attention,
    )


def _fit_detector(
    task: Task,
    name: str,
    features: Features,
    light: Features | None,
    labels: NDArray[np.int64] | None,
    probes: Probes | None,
    rng: np.random.Generator,
    bank: int,
    attention: NDArray[np.float32] | None,
    fine: NDArray[np.float32] | None,
) -> tuple[Detector, Scores]:
    """The fitted detector, and the held-out scores of the pictures, followed by those of the probes."""
    detector = DETECTORS[name](**({} if name == "mahalanobis" else {"seed": task.seed}))
    if isinstance(detector, MemoryBank):
        detector.size, detector.search, detector.attention_, detector.fine_ = bank, task.search, attention, fine
    place(detector, task.device, None)
    if not detector.localises:  # it looks at no patches, and is fitted to copies of parts of the folder
        features = features.whole
        light = None if light is None else light.whole
        probes = None if probes is None else replace(probes, features=probes.features.whole)
    if isinstance(detector, Softmax):
        detector.head = task.head
        if (layer := read_classifier(task.backbone.path)) is not None:
            detector.classifier = Linear(*layer)
    folds = _folds(len(features), FOLDS_OF.get(name, FOLDS), labels, rng)
    with task.progress.stage(name, total=detector.size if isinstance(detector, MemoryBank) else None) as stage:
        if isinstance(detector, MemoryBank):
            # Choosing the bank is the long part of its fit, and it counts entries from 0.
            chosen = _Counter(stage)
            return detector, fit_held_out(detector, features, light, folds, labels, probes=probes, progress=chosen)
        if isinstance(detector, Vae):
            detector.progress = lambda epoch, epochs, loss: stage.advance(note=f"loss {loss:.3g}", total=epochs)
        return detector, fit_held_out(detector, features, light, folds, labels, probes=probes)


def _affordable(
    task: Task,
    prepared: Prepared,
    others: Mapping[str, Detector],
    attention: NDArray[np.float32] | None,
    fine: NDArray[np.float32] | None,
) -> int:
    """Entries of the largest bank that the budget leaves room for, beside the network and the other detectors."""
    picture = np.asarray(task.training.pictures[:1])
    arrays = [detector.to_arrays() for detector in others.values()] + [thumbnails(task.training.pictures)]
    if prepared.projection is not None:
        arrays.append(prepared.projection.to_arrays())
    graph = [] if prepared.graph is None else [file.stat().st_size for file in prepared.graph.parent.iterdir()]
    besides = Cost(
        milliseconds(lambda: score_all(prepared.network, others, picture)),
        sum(map(nbytes, arrays)) + sum(graph) + len(images.encode_png(picture[0])),
    )

    def cost_of(size: int) -> Cost:
        with task.progress.stage("budget", total=1) as stage:
            bank = MemoryBank(size=size, seed=task.seed, search=task.search)
            bank.attention_, bank.fine_ = attention, fine
            cost = trial(prepared.features, bank)
            stage.advance(note=f"{size} entries: {besides.ms:.1f} + {cost.ms:.1f} ms")
        return cost

    patches = prepared.features.patches
    most = task.profile.bank if patches is None else min(task.profile.bank, int(np.prod(patches.shape[:3])))
    return largest_bank(most, task.budget, besides, cost_of)


class _Counter:
    """Steps of a stage from a running count."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self._last = stage, 0

    def __call__(self, count: int) -> None:
        self._stage.advance(count - self._last)
        self._last = count


class _Clock:
    """Seconds since the stage before, by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def __call__(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage], self._last = now - self._last, now


def _folds(n: int, count: int, labels: NDArray[np.int64] | None, rng: np.random.Generator) -> NDArray[np.int64]:
    """Fold of each picture, int64 (n,): random, of equal sizes, and of equal shares of each class."""
    order = rng.permutation(n)
    if labels is not None:
        order = order[np.argsort(labels[order], kind="stable")]
    folds = np.empty(n, np.int64)
    folds[order] = np.arange(n) % min(count, n)
    return folds
