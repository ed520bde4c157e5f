"""The backbone in int8, for a CPU: several times faster, and only where it tells pictures apart as well.

Everything after it (projection, bank, Gaussians, calibration) is fitted on the int8 network's own features, so that
there is no difference between what is fitted and what is served. The principal components then also see the noise of
the rounding. The first convolution stays in float32: it costs little, and what is rounded there is lost to all layers.
Weights have seven bits: processors without VNNI add two products in 16 bits, which those of eight-bit factors overflow,
and a version is to score alike wherever it is served.

References
----------
Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
CVPR 2018. NNCF's post-training quantisation, https://github.com/openvinotoolkit/nncf.
"""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from threading import Event, get_ident
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_runners.artifacts.manifest import FeaturesEntry
from ood_runners.backbones import FeatureNetwork, Projection, ProjectionFitter
from ood_runners.backbones.openvino_engine import read_graph
from ood_runners.backbones.spec import GRAPH_FILE
from ood_runners.detectors import Detector, Mahalanobis, MemoryBank
from ood_runners.features import Features
from ood_runners.training.extract import BATCH, PROJECTION_DIM
from ood_runners.training.progress import Progress
from ood_runners.training.storing import StoredBackbone
from ood_runners.training.synthetic import synthetic_defects

SAMPLE = 8  # pictures that the ranges are taken from, half of them with a synthetic defect; 32 give the same errors
# Normal pictures that both precisions are compared on, where there are so many: as many as settle it at first, and more
# where what they say lies nearer to a bound than to what is perfect.
FIRST, COMPARED = 40, 60
DEFECTS = 2  # synthetic ones of each normal picture that is not fitted on
SMALL_BANK = 1_500
TRIED = 8  # pictures computed at a time, before a look at whether the fit was interrupted
PROJECTED = 16  # pictures whose patches the components are taken from
# int8 is taken where synthetic defects are told apart as well but for this much AUROC, and pictures keep their order.
# Fourteen or twenty normal pictures and twice as many defects tell no smaller differences apart.
MAX_LOSS, MIN_CORRELATION = 0.02, 0.95


@dataclass(frozen=True)
class Comparison:
    """What float32 and int8 make of the same pictures; the worst of the detectors compared.

    Attributes
    ----------
    auroc_float32, auroc_int8 : of synthetic defects against normal pictures that were not fitted on
    correlation : Spearman's, of the two precisions' image scores
    pictures : normal ones that were fitted or scored
    """

    auroc_float32: float
    auroc_int8: float
    correlation: float
    pictures: int

    @property
    def good_enough(self) -> bool:
        """Whether int8 may be used."""
        return self._within(1.0)

    @property
    def settled(self) -> bool:
        """Whether it may, by so much that other pictures would hardly say otherwise."""
        return self._within(0.5)

    def _within(self, share: float) -> bool:
        loss, disorder = self.auroc_float32 - self.auroc_int8, 1 - self.correlation
        return loss <= share * MAX_LOSS and disorder <= share * (1 - MIN_CORRELATION)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the bounds."""
        return {
            "auroc_float32": round(self.auroc_float32, 4),
            "auroc_int8": round(self.auroc_int8, 4),
            "rank_correlation": round(self.correlation, 4),
            "pictures": self.pictures,
            "bounds": {"auroc_loss": MAX_LOSS, "rank_correlation": MIN_CORRELATION},
        }


class _Absent(MetaPathFinder, Loader):
    """To one thread's imports a module is not installed."""

    def __init__(self, module: str) -> None:
        self._module, self._thread = module, get_ident()

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        found = fullname == self._module and get_ident() == self._thread
        return ModuleSpec(fullname, self) if found else None

    def create_module(self, spec: ModuleSpec) -> None:
        raise ModuleNotFoundError(f"No module named {spec.name!r}", name=spec.name)


@contextmanager
def _without_torch() -> Iterator[None]:
    """NNCF looks for torch, does without it, and where it is there spends seconds and memory on importing it."""
    absent = _Absent("torch")
    sys.meta_path.insert(0, absent)  # asked only for what is not loaded yet
    try:
        yield
    finally:
        sys.meta_path.remove(absent)


def quantise(
    backbone: StoredBackbone, wanted: FeaturesEntry, pictures: NDArray[np.uint8], folder: Path, seed: int
) -> Path:
    """Write the backbone's graph, cut to what is wanted, in int8 into `folder`; the path of its ``network.xml``.

    `pictures` are normal ones, uint8 (n, h, w, 3). The ranges are taken from a sample of them and of synthetic
    defects, so that what is strange is not clipped.
    """
    import openvino as ov

    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(pictures))
    half = SAMPLE // 2
    defective, _ = synthetic_defects(np.asarray(pictures[rows[:half]]), rng)
    sample = [*pictures[rows[-half:]], *defective]
    model = read_graph(backbone.path / GRAPH_FILE, pictures.shape[1:3])
    names = {*wanted.patch_layers, *wanted.pooled_layers, *(["logits"] if wanted.logits else [])}
    results = [output.get_node() for output in model.outputs if output.any_name in names]
    model = ov.Model(results, model.get_parameters(), backbone.info.name)
    first = next(node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution")
    with _without_torch(), redirect_stdout(io.StringIO()), warnings.catch_warnings():  # its progress bars beside ours
        warnings.simplefilter("ignore")
        # Where torch is loaded already, for a VAE, say, it warns where there is CUDA and no GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        nncf = import_module("nncf")
        logging.getLogger("nncf").setLevel(logging.ERROR)
        small = nncf.quantize(
            model,
            nncf.Dataset([picture[np.newaxis] for picture in sample]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(sample),
            ignored_scope=nncf.IgnoredScope(names=[first.get_friendly_name()]),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE,
                inplace_statistics=False,  # of weights too, they would be computed while the network is compiled
            ),
        )
    for new, old in zip(small.outputs, model.outputs, strict=True):
        new.get_tensor().set_names(old.get_names())
    folder.mkdir(parents=True, exist_ok=True)
    ov.save_model(small, folder / GRAPH_FILE, compress_to_fp16=False)
    return folder / GRAPH_FILE


class Trial:
    """Small detectors, fitted in float32 on two thirds of a sample; they score the rest and its synthetic defects.

    It ends with a CancelledError soon after `stop` is set.
    """

    def __init__(
        self,
        backbone: StoredBackbone,
        wanted: FeaturesEntry,
        pictures: NDArray[np.uint8],
        seed: int,
        most: int,
        stop: Event,
    ) -> None:
        rng = np.random.default_rng(seed)
        rows = rng.permutation(len(pictures))[:most]
        split = max(1, len(rows) * 2 // 3)
        known, new = np.asarray(pictures[rows[:split]]), np.asarray(pictures[rows[split:]])
        judged = np.concatenate([new, *(synthetic_defects(new, rng)[0] for _ in range(DEFECTS))])
        self._pictures = len(rows)
        self._strange = np.arange(len(judged)) >= len(new)
        projection = _projection(backbone, wanted, known[:PROJECTED])
        self._scores = partial(_scores, backbone, wanted, projection, known, judged, seed=seed, stop=stop)
        self._plain = self._scores(graph=None)

    def compare(self, graph: Path) -> Comparison:
        """Fit and score the same in int8."""
        from scipy.stats import spearmanr
        from sklearn.metrics import roc_auc_score

        plain, small, strange = self._plain, self._scores(graph=graph), self._strange
        found = [
            Comparison(
                float(roc_auc_score(strange, plain[name])),
                float(roc_auc_score(strange, small[name])),
                float(spearmanr(plain[name], small[name]).statistic),
                self._pictures,
            )
            for name in plain
        ]
        worst = min(found, key=lambda one: one.auroc_int8 - one.auroc_float32)
        return replace(worst, correlation=min(one.correlation for one in found))


def _projection(backbone: StoredBackbone, wanted: FeaturesEntry, pictures: NDArray[np.uint8]) -> Projection | None:
    """Of float32 patches, for both precisions: the networks then give few channels, and neither chooses its own."""
    if not wanted.patch_layers:
        return None
    network = _network(backbone, wanted.model_copy(update={"pooled_layers": [], "logits": False}), None, pictures, None)
    fitter = ProjectionFitter()
    for start in range(0, len(pictures), BATCH):
        patches = network(pictures[start : start + BATCH]).patches
        if patches is None:
            raise RuntimeError("a network asked for patches gave none")
        fitter.partial_fit(patches)
    return fitter.finish(PROJECTION_DIM)


def _network(
    backbone: StoredBackbone,
    wanted: FeaturesEntry,
    projection: Projection | None,
    pictures: NDArray[np.uint8],
    graph: Path | None,
) -> FeatureNetwork:
    return FeatureNetwork.load(
        backbone.path,
        size=(pictures.shape[1], pictures.shape[2]),
        patch_layers=wanted.patch_layers,
        pooled_layers=wanted.pooled_layers,
        logits=wanted.logits,
        projection=projection,
        neighbourhood=wanted.neighbourhood,
        device="cpu",
        graph=graph,
        lone=False,
    )


def _scores(
    backbone: StoredBackbone,
    wanted: FeaturesEntry,
    projection: Projection | None,
    known: NDArray[np.uint8],
    judged: NDArray[np.uint8],
    graph: Path | None,
    seed: int,
    stop: Event,
) -> dict[str, NDArray[np.float32]]:
    """Image scores of `judged`, by detector, from small detectors fitted on `known` with one graph."""
    network = _network(backbone, wanted.model_copy(update={"logits": False}), projection, known, graph)
    parts: list[Features] = []
    starts = [(of, start) for of in (known, judged) for start in range(0, len(of), TRIED)]
    for of, start in starts:
        if stop.is_set():
            raise CancelledError
        parts.append(network(of[start : start + TRIED]))
    split = -(-len(known) // TRIED)
    fit_on, score = Features.concatenate(parts[:split]), Features.concatenate(parts[split:])
    fitted: list[Detector] = []
    if fit_on.patches is not None:
        fitted.append(MemoryBank(size=SMALL_BANK, seed=seed))
    if wanted.pooled_layers:
        fitted.append(Mahalanobis())
    return {detector.name: detector.fit(fit_on).score(score).image for detector in fitted}


def choose_graph(
    precision: str,
    backbone: StoredBackbone,
    wanted: FeaturesEntry,
    pictures: NDArray[np.uint8],
    folder: Path,
    seed: int,
    progress: Progress,
) -> tuple[Path | None, dict[str, Any]]:
    """The int8 graph, written into `folder`, and the comparison to record; None where float32 is to be used.

    `precision` "auto" takes int8 where it is good enough, "int8" takes it whatever the comparison says (which is
    recorded), "float32" asks nothing.
    """
    if precision == "float32":
        return None, {}
    with progress.stage("int8", total=2) as stage, ThreadPoolExecutor(1) as aside:
        # Most of quantising is NNCF's own work in one thread; meanwhile the other cores compute in float32.
        stop = Event()
        try:
            trial = aside.submit(Trial, backbone, wanted, pictures, seed, FIRST, stop)
            graph = quantise(backbone, wanted, pictures, folder, seed)
            stage.advance()
            comparison = trial.result().compare(graph)
            if not comparison.settled and len(pictures) > FIRST:
                comparison = Trial(backbone, wanted, pictures, seed, COMPARED, stop).compare(graph)
        finally:
            stop.set()  # the other thread, where this one was interrupted
        stage.advance(note=f"rank correlation {comparison.correlation:.3f}")
    taken = precision == "int8" or comparison.good_enough
    return graph if taken else None, comparison.to_dict() | {"taken": taken}
