"""How the scores and the false-alarm rate of normal pictures move when light or camera change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ood_runners import images
from ood_runners.errors import DataError, OODError
from ood_runners.training.changes import CHANGES, Change
from ood_runners.training.evaluation import aligned, percent, plural
from ood_runners.training.metrics import Proportion
from ood_runners.training.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from ood_runners.pipeline import Product
    from ood_runners.training.datasets import Dataset, PictureFile

MAX_PICTURES = 50  # 25 passes over them
BATCH = 8
UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Changed:
    """What one change at one strength does.

    Attributes
    ----------
    change, strength, label : which; `strength` 0 of "unchanged" is the pictures as they are
    score : median fused score
    false_alarms : flagged pictures among all
    detectors : the share of pictures that each detector alone would flag at alpha
    """

    change: str
    strength: float
    label: str
    score: float
    false_alarms: Proportion
    detectors: dict[str, float]

    def breaks(self, alpha: float) -> bool:
        """Whether there are more false alarms than chance makes of `alpha` (95 % interval)."""
        return self.false_alarms.low > alpha


@dataclass(frozen=True)
class Robustness:
    """The unchanged pictures, and each change from its mildest strength to its strongest."""

    alpha: float
    pictures: int
    known: bool  # the pictures may be those that the product was fitted on
    unchanged: Changed
    changed: Sequence[Changed]

    def by_change(self) -> dict[str, list[Changed]]:
        """The strengths of each change, mildest first."""
        names = dict.fromkeys(one.change for one in self.changed)
        return {name: [one for one in self.changed if one.change == name] for name in names}

    def advice(self) -> str:
        """Which change breaks alpha first, which do not."""
        alpha = percent(self.alpha)
        if self.unchanged.breaks(self.alpha):
            return (
                f"Even unchanged, {_rate(self.unchanged)} of these pictures are flagged, more than alpha ({alpha}): "
                "fit again on pictures like these before asking what changes of light and camera do."
            )
        first: list[tuple[int, Changed]] = []
        holding: list[str] = []
        for row in self.by_change().values():
            broken = [(step, one) for step, one in enumerate(row) if one.breaks(self.alpha)]
            if broken:
                first.append(broken[0])
            else:
                holding.append(row[-1].label)
        if not first:
            return f"No change tried breaks alpha ({alpha}), up to {_join(holding)}."
        # Mildest step first; of several at the same step, the one that raises most false alarms.
        first.sort(key=lambda pair: (pair[0], -pair[1].false_alarms.count))
        (_, worst), *others = first
        text = f"The first change that breaks alpha ({alpha}) is {worst.label}, with {_rate(worst)} false alarms"
        text += f"; then {_join([f'{one.label} ({_rate(one)})' for _, one in others])}." if others else "."
        return f"{text} It holds up to {_join(holding)}." if holding else text

    def notes(self) -> list[str]:
        """What to know when reading the figures."""
        notes = [
            f"{plural(self.pictures, 'normal picture')}, changed at the input size; alpha counts as broken where the "
            "95 % interval of the false-alarm rate lies above it."
        ]
        if self.known:
            notes.append(
                "There are no normal test pictures, so these are training pictures: if the product was fitted on them "
                "it knows them, and new ones raise more false alarms."
            )
        return notes

    def lines(self) -> list[str]:
        """For a terminal: a sentence, a table, the notes."""
        rows = [["change", "median score", "false alarms", "95 % interval"]]
        for one in (self.unchanged, *self.changed):
            alarms = one.false_alarms
            rows.append(
                [
                    one.label,
                    f"{one.score:.3g}",
                    f"{alarms.count} of {alarms.total}{' *' if one.breaks(self.alpha) else '  '}",
                    f"{percent(alarms.low)} to {percent(alarms.high)}",
                ]
            )
        return [self.advice(), *aligned(rows), "* breaks alpha", *self.notes()]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "alpha": self.alpha,
            "pictures": self.pictures,
            "advice": self.advice(),
            "notes": self.notes(),
            "changes": [
                asdict(one) | {"breaks_alpha": one.breaks(self.alpha)} for one in (self.unchanged, *self.changed)
            ],
        }


def robustness(
    product: Product,
    dataset: Dataset,
    *,
    alpha: float,
    changes: Sequence[Change] = CHANGES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Robustness:
    """Judge at most 50 normal pictures as they are and under each change.

    They are the data set's normal test pictures; where there are none, its training pictures, and a note says so.
    Files that cannot be read are passed over. `alpha` is the false-alarm rate to judge at, such as the
    evaluation's.

    Raises
    ------
    DataError
        No normal picture can be read.
    """
    normal = [file for file in dataset.test if dataset.layout != "mvtec" or file.label == "good"]
    files = normal or dataset.train
    order = np.random.default_rng(seed).permutation(len(files))
    pictures = [picture for _, picture in read_some([files[i] for i in order], product.input_size, MAX_PICTURES)]
    if not pictures:
        raise DataError(f"None of the {len(files)} normal pictures in {dataset.root} could be read.")
    with (progress or SilentProgress()).stage("robustness", total=1 + sum(len(c.strengths) for c in changes)) as stage:
        unchanged = _measure(product, pictures, alpha, UNCHANGED, 0, UNCHANGED)
        stage.advance()
        changed = []
        for change in changes:
            for strength in change.strengths:
                made = [change.apply(picture, strength) for picture in pictures]
                changed.append(_measure(product, made, alpha, change.name, strength, change.label(strength)))
                stage.advance()
    return Robustness(alpha, len(pictures), not normal, unchanged, changed)


def read_some(
    files: Sequence[PictureFile], size: tuple[int, int], most: int
) -> list[tuple[PictureFile, NDArray[np.uint8]]]:
    """The first `most` files that can be read, each with its picture, uint8 (h, w, 3) at `size`."""
    found: list[tuple[PictureFile, NDArray[np.uint8]]] = []
    for file in files:
        if len(found) == most:
            break
        try:
            found.append((file, images.resize(images.read(file.path), size)))
        except OODError:
            continue
    return found


def _measure(
    product: Product, pictures: Sequence[images.Picture], alpha: float, name: str, strength: float, label: str
) -> Changed:
    judged = [
        judgement
        for start in range(0, len(pictures), BATCH)
        for judgement in product.calibration.judge(product.raw_scores(np.stack(pictures[start : start + BATCH])), alpha)
    ]
    total = len(judged)
    return Changed(
        name,
        float(strength),
        label,
        float(np.median([one.score for one in judged])),
        Proportion.of(sum(one.verdict == "anomalous" for one in judged), total),
        {part: sum(one.detectors[part].p_value <= alpha for one in judged) / total for part in judged[0].detectors},
    )


def _rate(one: Changed) -> str:
    return percent(one.false_alarms.count / one.false_alarms.total)


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
