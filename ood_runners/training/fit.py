"""A folder of normal pictures -> a fitted, calibrated version in the store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ood_runners.artifacts import Manifest, check_product, check_writable
from ood_runners.artifacts import promote as promote_version
from ood_runners.artifacts.store import open_writer
from ood_runners.backbones.runtime import choose_device
from ood_runners.detectors import DETECTORS
from ood_runners.detectors.heads import HEADS
from ood_runners.detectors.memory_bank import SEARCHES
from ood_runners.detectors.softmax import AUTO
from ood_runners.errors import BadParameter
from ood_runners.pipeline import INT8
from ood_runners.training import attention as attending
from ood_runners.training import contamination as contaminated
from ood_runners.training.advice import advice, cost_of
from ood_runners.training.augment import check_augment
from ood_runners.training.datasets import Dataset, discover
from ood_runners.training.members import Also, check_also, member_tasks
from ood_runners.training.pictures import read_training
from ood_runners.training.profiles import DEFAULT, Budget
from ood_runners.training.profiles import resolve as resolve_profile
from ood_runners.training.progress import Progress, SilentProgress
from ood_runners.training.running import run
from ood_runners.training.storing import StoredBackbone, storing
from ood_runners.training.writing import Task, write


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
    also: Sequence[str] = (),
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
    also : ``BACKBONE[@SIZE][=FILE]`` each: further networks and picture sizes whose memory bank and Gaussians have a
        say in the same verdict (`training.members`)

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
    others = check_also(also, Also(backbone, chosen.size, weights), names, has_budget=bool(budget))
    precision = _precision(precision, device)
    dataset = discover(folder)
    check_writable()
    started = time.monotonic()
    with TemporaryDirectory(prefix="ood-fit-", ignore_cleanup_errors=True) as scratch_name:
        scratch = Path(scratch_name)
        with storing(backbone, weights, scratch) as wait_for_backbone:
            pictures = read_training(dataset, chosen.size, scratch, progress)
            with progress.stage("backbone", total=1) as stage:
                stored_backbone = wait_for_backbone()
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
        fitted = run(task, member_tasks(task, others, scratch), scratch)
        with open_writer(product) as writer:
            notes += [part.attention.note() for part in fitted.parts if part.attention is not None]
            manifest = write(writer, product, task, fitted, notes, started)
            tag = str(writer.commit(manifest))
    lines = notes + advice(manifest) + cost_of(manifest)
    if promote:
        promote_version(tag, why="fitted")
        lines.append(f"{tag} is in production.")
    else:
        lines.append(f"{tag} is not in production; `promote` puts it there.")
    return FitResult(tag, manifest, lines)


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
