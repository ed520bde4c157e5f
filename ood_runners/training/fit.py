"""A folder of normal pictures -> a fitted, calibrated version in the store."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from ood_runners import images
from ood_runners.artifacts import Manifest, check_product, check_writable
from ood_runners.artifacts import promote as promote_version
from ood_runners.artifacts.store import open_writer
from ood_runners.backbones.classifier import read_classifier
from ood_runners.backbones.runtime import choose_device
from ood_runners.calibration import Calibration
from ood_runners.calibration.weights import fusion_weights, knows_pictures
from ood_runners.detectors import DETECTORS, Detector, MemoryBank, Softmax, Vae
from ood_runners.detectors.base import Probes
from ood_runners.detectors.heads import HEADS, Linear
from ood_runners.detectors.memory_bank import SEARCHES
from ood_runners.detectors.softmax import AUTO
from ood_runners.errors import BadParameter
from ood_runners.features import Features, Scores
from ood_runners.pipeline import INT8, place, score_all
from ood_runners.training import attention as attending
from ood_runners.training import contamination as contaminated
from ood_runners.training.advice import advice, cost_of
from ood_runners.training.augment import LIGHT, check_augment, fit_held_out, under_light
from ood_runners.training.datasets import Dataset, discover
from ood_runners.training.extract import StoredBackbone, store_backbone
from ood_runners.training.pictures import read_training
from ood_runners.training.prepare import Prepared, prepare
from ood_runners.training.probes import probes_of
from ood_runners.training.profiles import DEFAULT, Budget, Cost, largest_bank, milliseconds, nbytes, trial
from ood_runners.training.profiles import resolve as resolve_profile
from ood_runners.training.progress import Progress, SilentProgress, Stage
from ood_runners.training.writing import FOLDS, Fitted, Task, thumbnails, write

# A network is trained anew for each fold: three cost what a user will wait for.
FOLDS_OF = {"vae": 3}
BANK = MemoryBank.name


@dataclass(frozen=True)
class FitResult:
    """What a fit made: the version's tag, its manifest, and lines for the person who asked."""

    tag: str
    manifest: Manifest
    lines: list[str]


def fit(
    folder: Path,
    *,
    product: str,
    backbone: str = "resnet50",
    weights: Path | None = None,
    alpha: float = 0.01,
    profile: str = DEFAULT,
    size: tuple[int, int] | None = None,
    detectors: Sequence[str] | None = None,
    bank_size: int | None = None,
    search: str = AUTO,
    budget_ms: float | None = None,
    budget_mb: float | None = None,
    head: str = AUTO,
    seed: int = 0,
    promote: bool = True,
    device: str = "auto",
    precision: str = "auto",
    augment: str | None = None,
    contamination: str = contaminated.AUTO,
    defects: Path | None = None,
    progress: Progress | None = None,
) -> FitResult:
    """Fit detectors on a folder's normal pictures, calibrate them and store them as a new version.

    Parameters
    ----------
    folder : pictures, MVTec's layout or class folders; see `datasets.discover`
    product : what the version is fitted for
    backbone, weights : see `backbones.BACKBONES`; `weights` is a state dict's file
    alpha : the false-alarm rate; where there are too few pictures to decide at it, the smallest that can be
    profile : a name of `profiles.PROFILES`: the size, the bank and the detectors where these are None
    size : height and width, in pixels, that pictures are resized to
    detectors : names from `detectors.DETECTORS`; None fits all that the profile and the weights allow
    bank_size : entries of the memory bank, at most
    search : of the memory bank; one of `detectors.memory_bank.SEARCHES`
    budget_ms, budget_mb : the bank is made as small as it must be for a verdict to take so many milliseconds on this
        machine, from pixels on and one picture at a time, and for the version's own files to take so many megabytes
    head : of the softmax detector; a name of `detectors.heads.HEADS`, or "auto": several of them together
    promote : put the version into production
    device : "auto", "cpu" or "cuda"
    precision : of the backbone: "float32", "int8" (on a CPU), or "auto": int8 where it costs no accuracy
    augment : "light" fits the memory bank and the Gaussians on each picture darker and brighter as well
    contamination : "auto" leaves out training pictures that look unlike all others (`training.contamination`);
        "none" only names them
    defects : a folder of pictures of defects, of which the memory bank learns what to look at, if that helps
        (`training.attention`)

    Raises
    ------
    DataError, WeightsError, BadParameter, ArtifactError
        Each with one sentence; the store is then as it was.
    """
    progress = progress or SilentProgress()
    check_product(product)
    names = _check(detectors, alpha, head, search)
    budget = Budget(budget_ms, budget_mb)
    chosen = resolve_profile(profile, size=size, bank=bank_size, budget=budget, has_bank="memory_bank" in names)
    if detectors is None:
        names = [name for name in names if name not in chosen.leave_out]
    check_augment(augment, names)
    contaminated.check_contamination(contamination)
    attending.check_defects(defects, names)
    precision = _precision(precision, device)
    dataset = discover(folder)
    check_writable()
    started = time.monotonic()
    with TemporaryDirectory(prefix="ood-fit-", ignore_cleanup_errors=True) as scratch_name:
        scratch = Path(scratch_name)
        pictures = read_training(dataset, chosen.size, scratch, progress)
        with progress.stage("backbone", total=1) as stage:
            stored_backbone = store_backbone(backbone, weights, scratch)
            stage.advance(note=stored_backbone.info.origin)
        names, notes = _possible(names, detectors is not None, dataset, stored_backbone)
        task = Task(
            dataset=dataset,
            training=pictures,
            backbone=stored_backbone,
            names=names,
            head=head,
            profile=chosen,
            search=search,
            budget=budget,
            alpha=alpha,
            seed=seed,
            device=device,
            precision=precision,
            progress=progress,
            augment=augment,
            contamination=contamination,
            defects=defects,
        )
        fitted = _run(task, scratch)
        with open_writer(product) as writer:
            if fitted.attention is not None:
                notes = [*notes, fitted.attention.note()]
            manifest = write(writer, product, task, fitted, notes, started)
            tag = str(writer.commit(manifest))
    lines = notes + advice(manifest) + cost_of(manifest)
    if promote:
        promote_version(tag, why="fitted")
        lines.append(f"{tag} is in production.")
    else:
        lines.append(f"{tag} is not in production; `promote` puts it there.")
    return FitResult(tag, manifest, lines)


def _run(task: Task, scratch: Path) -> Fitted:
    seconds: dict[str, float] = {}
    clock = _Clock(seconds)
    rng = np.random.default_rng(task.seed)
    prepared = prepare(
        task.training,
        task.backbone,
        task.names,
        device=task.device,
        precision=task.precision,
        seed=task.seed,
        scratch=scratch,
        progress=task.progress,
    )
    clock("features")
    folders, categories = bool(task.dataset.classes), knows_pictures(prepared.features.logits)
    screened = contaminated.Screened.nothing(len(task.training.pictures))
    every = prepared.features
    if task.contamination == contaminated.AUTO and every.patches is not None and not (folders or categories):
        screened = contaminated.screen(every, seed=task.seed, progress=task.progress, entry=prepared.entry)
        clock("contamination")
    training, prepared = contaminated.only(task.training, prepared, screened.fitted, scratch)
    features = prepared.features
    light = None
    if task.augment == LIGHT:
        light = under_light(prepared, training.pictures, scratch, task.progress)
        clock(LIGHT)
    labels = training.labels(task.dataset.classes)
    probes = None
    if len(task.names) > 1 and not (folders or categories):  # a scratch does not make it another category
        probes = probes_of(training.pictures, screened.fitted, prepared, task.seed, task.progress)
        clock("synthetic")
    attention = None
    if task.defects is not None and prepared.network is not None and BANK in task.names:
        attention = attending.learn(
            features, prepared.network, task.defects, task.dataset, seed=task.seed, progress=task.progress
        )
        clock("defects")
    weights = None if attention is None else attention.matrix
    detectors: dict[str, Detector] = {}
    held_out: dict[str, Scores] = {}
    probed: dict[str, Scores] = {}
    for name in sorted(task.names, key=lambda name: bool(task.budget) and name == BANK):  # then it comes last
        bank = task.profile.bank
        if task.budget and name == BANK:
            bank = _affordable(task, prepared, detectors, weights)
            clock("budget")
        detectors[name], scores = _fit_detector(task, name, features, light, labels, probes, rng, bank, weights)
        unseen = contaminated.score_held_back(detectors[name], every, screened)
        held_out[name] = Scores.concatenate([scores[: len(features)][screened.calibrated], *unseen])
        probed[name] = scores[len(features) :]
        clock(name)
    detectors = {name: detectors[name] for name in task.names}
    held_out = {name: held_out[name] for name in task.names}
    with task.progress.stage("calibration", total=1) as stage:
        fusion = fusion_weights(task.names, folders=folders, categories=categories)
        calibration = Calibration.fit(
            held_out, fusion, task.profile.size, task.alpha, probes=None if probes is None else probed
        )
        stage.advance()
    clock("calibration")
    left_out = screened.left_out(task.training, task.dataset.root)
    return Fitted(training, left_out, screened.rows, detectors, held_out, calibration, prepared, seconds, attention)


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
) -> tuple[Detector, Scores]:
    """The fitted detector, and the held-out scores of the pictures, followed by those of the probes."""
    detector = DETECTORS[name](**({} if name == "mahalanobis" else {"seed": task.seed}))
    if isinstance(detector, MemoryBank):
        detector.size, detector.search, detector.attention_ = bank, task.search, attention
    place(detector, task.device, None)
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
    task: Task, prepared: Prepared, others: Mapping[str, Detector], attention: NDArray[np.float32] | None
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
            bank.attention_ = attention
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
    """Seconds since the stage before."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.monotonic()

    def __call__(self, stage: str) -> None:
        now = time.monotonic()
        self._seconds[stage], self._last = now - self._last, now


def _check(detectors: Sequence[str] | None, alpha: float, head: str, search: str) -> list[str]:
    if not 0 < alpha < 1:
        raise BadParameter(f"alpha is a false-alarm rate between 0 and 1, not {alpha:g}.")
    names = list(DETECTORS) if detectors is None else list(dict.fromkeys(detectors))
    unknown = [name for name in names if name not in DETECTORS]
    if unknown or not names:
        raise BadParameter(f"There is no detector {', '.join(unknown) or 'given'}; choose of {', '.join(DETECTORS)}.")
    if head not in (AUTO, *HEADS):
        raise BadParameter(f"There is no head {head}; choose {AUTO}, or one of {', '.join(HEADS)}.")
    if search not in SEARCHES:
        raise BadParameter(f"There is no search {search}; choose one of {', '.join(SEARCHES)}.")
    return names


def _precision(precision: str, device: str) -> str:
    """The precision to try: int8 is for the CPU."""
    if precision not in ("auto", "float32", INT8):
        raise BadParameter(f"There is no precision {precision!r}; choose auto, float32 or int8.")
    on_gpu = choose_device(device) == "cuda"
    if precision == INT8 and on_gpu:
        raise BadParameter("int8 runs on the CPU; add --device cpu, or use --precision float32.")
    return "float32" if on_gpu else precision


def _possible(
    names: Sequence[str], chosen: bool, dataset: Dataset, backbone: StoredBackbone
) -> tuple[list[str], list[str]]:
    """The detectors that these weights and folders allow, and a line for each that is left out."""
    info = backbone.info
    reasons: dict[str, str] = {}
    missing = [layer for layer in info.spec.patch_layers if layer not in info.layers]
    if missing:
        reasons["memory_bank"] = f"the weights have no {', '.join(missing)}"
    if not info.has_logits and not dataset.classes:
        reasons["softmax"] = "the weights have no classification head and the folder has no classes"
    possible = [name for name in names if name not in reasons]
    notes = [f"{name} is left out: {reasons[name]}." for name in names if name in reasons]
    if not possible or (chosen and notes):
        raise BadParameter(f"{notes[0].rstrip('.')}; choose other detectors or other weights.")
    return possible, notes


def _folds(n: int, count: int, labels: NDArray[np.int64] | None, rng: np.random.Generator) -> NDArray[np.int64]:
    """Fold of each picture, int64 (n,): random, of equal sizes, and of equal shares of each class."""
    order = rng.permutation(n)
    if labels is not None:
        order = order[np.argsort(labels[order], kind="stable")]
    folds = np.empty(n, np.int64)
    folds[order] = np.arange(n) % min(count, n)
    return folds
