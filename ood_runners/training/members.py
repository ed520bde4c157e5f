"""Further networks and picture sizes in one version (``fit --also``), each a task of its own on the same pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ood_runners import images
from ood_runners.backbones.spec import get_spec
from ood_runners.errors import BadParameter, WeightsError
from ood_runners.features import scorer
from ood_runners.sizes import parse_size, size_name
from ood_runners.training.pictures import TrainingPictures
from ood_runners.training.progress import RenamedProgress
from ood_runners.training.storing import store_backbone
from ood_runners.training.writing import Task

DETECTORS = ("memory_bank", "mahalanobis")  # what looks at features alone; the others are the version's own


@dataclass(frozen=True)
class Also:
    """A backbone, the size (height, width) of the pictures that it sees, and its weights where they are of a file."""

    backbone: str
    size: tuple[int, int]
    weights: Path | None = None

    @property
    def name(self) -> str:
        """What the member is called: ``resnet50-224``."""
        return f"{self.backbone}-{size_name(self.size)}"


def check_also(texts: Sequence[str], own: Also, names: Sequence[str], *, has_budget: bool) -> list[Also]:
    """Read ``BACKBONE[@SIZE][=FILE]``, each a member beside the version's `own` network.

    Size and weights are the own ones' where none are given; those of another backbone are its default ones.

    Raises
    ------
    BadParameter
        There is no such backbone or size, one is named twice or larger than the version's pictures, or what else was
        asked for leaves members nothing to do.
    """
    if texts and not set(names) & set(DETECTORS):
        raise BadParameter(f"--also fits {' and '.join(DETECTORS)} on another network; ask for one of them.")
    if texts and has_budget:
        raise BadParameter("A budget chooses the memory bank of one network; leave it or --also out.")
    found = [own]
    for text in texts:
        named, _, file = text.partition("=")
        backbone, _, size = named.partition("@")
        get_spec(backbone)
        weights = Path(file) if file else own.weights if backbone == own.backbone else None
        one = Also(backbone, parse_size(size) if size else own.size, weights)
        if one == own or one.name in [other.name for other in found[1:]]:
            raise BadParameter(f"--also {text}: {one.name} is there already; name another backbone or size.")
        if one.size[0] > own.size[0] or one.size[1] > own.size[1]:
            raise BadParameter(
                f"--also {text} is larger than the version's pictures of {size_name(own.size)}; give the largest size "
                f"to --size, and the smaller one to --also."
            )
        found.append(one)
    return found[1:]


def member_tasks(task: Task, others: Sequence[Also], scratch: Path) -> dict[str, Task]:
    """A task for each member, by its name.

    Members see the version's pictures, resized once more: so do they when it is served.
    """
    tasks: dict[str, Task] = {}
    for other in others:
        folder = scratch / other.name
        folder.mkdir()
        progress = RenamedProgress(task.progress, lambda stage, name=other.name: scorer(stage, name))  # type: ignore[misc]
        with progress.stage("backbone", total=1) as stage:
            try:
                backbone = store_backbone(other.backbone, other.weights, scratch)
            except WeightsError as error:
                raise WeightsError(
                    f"--also {other.name}: {error.message} For --also a file is named as in {other.backbone}=FILE."
                ) from error
            stage.advance(note=backbone.info.origin)
        missing = [layer for layer in backbone.info.spec.patch_layers if layer not in backbone.info.layers]
        names = [name for name in task.names if name in DETECTORS]
        if missing and "memory_bank" in names:
            raise BadParameter(f"--also {other.name}: the weights have no {', '.join(missing)}.")
        tasks[other.name] = replace(
            task,
            training=_smaller(task.training, other.size, folder),
            backbone=backbone,
            names=names,
            profile=replace(task.profile, size=other.size),
            progress=progress,
        )
    return tasks


def _smaller(training: TrainingPictures, size: tuple[int, int], folder: Path) -> TrainingPictures:
    """The pictures at another size, memory-mapped in `folder`; other pixels have another fingerprint."""
    own = training.pictures.shape[1:3]
    if own == size:
        return training
    pictures: NDArray[np.uint8] = np.lib.format.open_memmap(
        folder / "pictures.npy", mode="w+", dtype=np.uint8, shape=(len(training.pictures), *size, 3)
    )
    for row, picture in enumerate(training.pictures):
        pictures[row] = images.resize(picture, size)
    return replace(training, pictures=pictures, fingerprint=f"{training.fingerprint} by way of {own[0]}x{own[1]}")
