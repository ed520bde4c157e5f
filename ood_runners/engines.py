"""What runs inside a runner: items in, items out, one answer for each and never an exception for a batch.

The engines know nothing of BentoML, so that one process can also hold them all.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ood_runners.artifacts import LoadedVersions, read_part
from ood_runners.backbones.runtime import FeatureNetwork, choose_device
from ood_runners.cores import available_cores
from ood_runners.detectors.base import Detector
from ood_runners.errors import OODError
from ood_runners.features import LOAD, Features, Scores
from ood_runners.pipeline import INT8, load_detector, load_network
from ood_runners.telemetry import logs, metrics, tracing
from ood_runners.telemetry.requests import working_for

logger = logging.getLogger(f"bentoml.{__name__}")  # configured by BentoML when it serves
Item = dict[str, Any]
Part = TypeVar("Part")
# What a part takes once it has worked, measured with OpenVINO (96 to 448 px, int8 and float32, one and two threads):
# its weights as they are stored and as they are computed with, which a backbone on a CPU does in two ways; for each
# pixel of the pictures that are computed at a time, if it runs a network; and what every part takes.
COPIES, NETWORK_COPIES, PIXEL_BYTES, PART_BYTES = 2, 3, 250, 4 * 2**20


class Engine(ABC, Generic[Part]):
    """Groups a batch by version, loads what it needs and answers each item.

    An item is ``{"tag": …, <feature name>: array, …}``; an answer is arrays, or ``{"error": {"code", "message"}}``.
    One with ``"load": True`` in the place of features only has its version loaded. Where an item names its request and
    trace, so do the log and the spans. An answer says for how many ``seconds`` its batch was computed.

    Parameters
    ----------
    loaded : opens the versions
    stage : what metrics and spans call this
    """

    def __init__(self, loaded: LoadedVersions[Part], stage: str) -> None:
        self._loaded = loaded
        self._stage = stage
        self._show_loaded()

    def infer(self, items: Sequence[Item]) -> list[Item]:
        """One answer an item, in order."""
        if not items:
            return []
        start = time.perf_counter()
        with tracing.batch(self._stage, items), working_for(items):
            answers = self._infer(items)
            seconds = time.perf_counter() - start
            if pictures := sum(not item.get(LOAD) for item in items):
                logs.event(logger, "computed", stage=self._stage, pictures=pictures, ms=round(seconds * 1000, 1))
                metrics.batch_pictures.labels(self._stage).observe(pictures)
                metrics.compute_seconds.labels(self._stage).observe(seconds)
        self._show_loaded()
        return [answer if "error" in answer else answer | {"seconds": seconds} for answer in answers]

    def _show_loaded(self) -> None:
        metrics.loaded_versions.labels(self._stage).set(len(self._loaded.tags()))
        metrics.loaded_bytes.labels(self._stage).set(self._loaded.total)

    def _infer(self, items: Sequence[Item]) -> list[Item]:
        rows_of: dict[str, list[int]] = {}
        for row, item in enumerate(items):
            rows_of.setdefault(str(item.get("tag")), []).append(row)
        answers: dict[int, Item] = {}
        for tag, rows in rows_of.items():
            answers.update(zip(rows, self._answer(tag, [items[row] for row in rows]), strict=True))
        return [answers[row] for row in range(len(items))]

    def _answer(self, tag: str, items: Sequence[Item]) -> list[Item]:
        with working_for(items):
            try:
                with self._loaded.lease(tag) as part:
                    asked = [item for item in items if not item.get(LOAD)]
                    answers = iter(self._compute_each(part, asked) if asked else ())
                    return [{} if item.get(LOAD) else next(answers) for item in items]
            except Exception as error:  # it could not be loaded
                return [_failure(error, f"{self._stage} could not load {tag}")] * len(items)

    def _compute_each(self, part: Part, items: Sequence[Item]) -> list[Item]:
        try:
            answers = self.compute(part, Features.from_items(items))
            if len(answers) != len(items):
                raise ValueError(f"{len(items)} items gave {len(answers)} answers")
            return answers
        except Exception as error:
            if len(items) == 1:
                with working_for(items):
                    return [_failure(error, f"{self._stage} failed on a picture of {items[0].get('tag')}")]
            # One of them is to blame: the others get their answers.
            return [answer for item in items for answer in self._compute_each(part, [item])]

    @abstractmethod
    def compute(self, part: Part, features: Features) -> list[Item]:
        """The answers of a batch of one version."""


@dataclass(frozen=True)
class Network:
    """A network and about what it takes in memory."""

    run: FeatureNetwork
    nbytes: int


class FeatureEngine(Engine[Network]):
    """Pictures to patches, pooled features and logits."""

    def compute(self, part: Network, features: Features) -> list[Item]:
        """Answers are the items of ``Features``."""
        if features.pictures is None:
            raise ValueError("an item without pictures")
        return part.run(features.pictures).to_items()


class DetectorEngine(Engine[Detector]):
    """Features to one detector's scores."""

    def compute(self, part: Detector, features: Features) -> list[Item]:
        """Answers are ``{"score": float32}``, with ``"map"`` float32 (h, w) and ``"predicted"`` where there are any."""
        return to_items(part.score(features))


AnyEngine = FeatureEngine | DetectorEngine


def feature_engine(device: str, budget: int, max_batch: int) -> FeatureEngine:
    """The engine behind ResNet50Runner; `budget` is in bytes, `max_batch` in pictures."""
    at_once = _at_once(device, max_batch)

    def load(tag: str) -> Network:
        stored = read_part(tag)
        folder = stored.path if stored.manifest.backbone.precision == INT8 else stored.backbone_path
        weights = sum(file.stat().st_size for file in folder.glob("*.bin"))
        network = load_network(stored, device)
        return Network(network, _memory(NETWORK_COPIES * weights, network.size, at_once))

    return FeatureEngine(LoadedVersions(_told(load), lambda network: network.nbytes, budget), "features")


def detector_engine(name: str, device: str, budget: int, max_batch: int) -> DetectorEngine:
    """The engine behind the runner of the detector `name`; `budget` is in bytes, `max_batch` in pictures."""
    at_once = _at_once(device, max_batch)

    def load(tag: str) -> Detector:
        detector = load_detector(read_part(tag), name, device)
        detector.open()
        return detector

    def size(detector: Detector) -> int:
        arrays = detector.to_arrays()
        pictures = tuple(arrays["size"].tolist()) if "size" in arrays else (0, 0)  # those that a network looks at
        return _memory(COPIES * sum(array.nbytes for array in arrays.values()), pictures, at_once)

    return DetectorEngine(LoadedVersions(_told(load), size, budget), name)


def _told(load: Callable[[str], Part]) -> Callable[[str], Part]:
    """`load`, and a line in the log."""

    def load_and_tell(tag: str) -> Part:
        start = time.perf_counter()
        part = load(tag)
        logger.info("Loaded %s in %.2f s", tag, time.perf_counter() - start)
        return part

    return load_and_tell


def _at_once(device: str, max_batch: int) -> int:
    """Pictures computed at a time; BadParameter where there is no such device."""
    return max_batch if choose_device(device) == "cuda" else min(max_batch, available_cores())


def _memory(weights: int, size: tuple[int, int], at_once: int) -> int:
    """Bytes that a part takes whose weights take `weights` and which looks at pictures of (h, w) `size`."""
    return weights + PIXEL_BYTES * size[0] * size[1] * at_once + PART_BYTES


def _failure(error: Exception, context: str) -> Item:
    if isinstance(error, OODError):
        return {"error": error.to_dict()}
    logger.error("%s", context, exc_info=error)
    return {"error": OODError(f"{context}; the runner's log says why.").to_dict()}


def to_items(scores: Scores) -> list[Item]:
    """One flat dict a picture, for the wire."""
    columns: Mapping[str, Any] = {"score": scores.image, "map": scores.map, "predicted": scores.predicted}
    present = {name: column for name, column in columns.items() if column is not None}
    return [{name: column[i] for name, column in present.items()} for i in range(len(scores))]
