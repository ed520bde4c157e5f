"""Training pictures that hold something no other picture holds: defects among the normals, and views taken otherwise.

Each patch is measured by its distance to the nearest patch of the m-th nearest *other picture*, m a tenth of the
pictures and one more: defects of one kind cannot vouch for each other as long as they are at most a tenth of the
folder. A picture's strangeness is that of its strangest hundredth, as in the memory bank.

What is strange is dropped: a memory bank that holds a defect forgives the next one like it. But a picture that is as
strange in its calmest places as in its strangest, and whose brightness or contrast is clearly that of no other, shows
no defect but another way of taking pictures; the detectors keep it, and only the calibration, whose threshold it would
set alone, goes without it.

Where one picture stands out so clearly, nobody has sorted the folder, and there may be more. So a second, lower limit
counts then (as in Canny's edges: a weak one counts where there is a strong one), for the same distances of pooled
features too, which see defects that no single place shows. What lies above it is held back: no detector learns it, yet
it is calibrated on, as any new picture would be that no detector has seen. So a normal picture held back by mistake
leaves the promise of alpha as it was, and costs the detectors one picture.

References
----------
Jiang et al., "SoftPatch: Unsupervised Anomaly Detection with Noisy Data", NeurIPS 2022, which weighs single patches
by their local outlier factor.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_runners.artifacts.manifest import LeftOutFile
from ood_runners.detectors.base import Detector, top_mean
from ood_runners.detectors.checks import finite_float32, pooled_features
from ood_runners.detectors.coreset import greedy_coreset
from ood_runners.errors import BadParameter
from ood_runners.features import Features, Scores
from ood_runners.inference import CPUNetwork
from ood_runners.training.keeping import entry_of, find, keep
from ood_runners.training.pictures import TrainingPictures
from ood_runners.training.prepare import Prepared
from ood_runners.training.progress import Progress, SilentProgress

AUTO, NONE = "auto", "none"
SHARE = 0.10  # of defects that cannot hide each other
MOST = 0.15  # of the pictures, at most, that are left out
CHANCE = 0.05  # that a folder of normal pictures, their upper half as of a Gaussian, loses one
# The same for the lower limit. It lies among the largest normal values, so that of 20 to 200 normal pictures 1 to 3
# are above it (simulated, Gaussian to skewed).
MORE = 0.5
LEAST = 16  # pictures; among fewer nothing is called unusual
REFERENCES, PATCHES = 200, 64  # pictures compared with, and patches of each
# All over: the calmest fiftieth of the cells is raised by so large a part of the peak's rise.
CALM, ALL_OVER = 0.02, 2 / 3
# Taken under other light: its brightness or contrast stands out twice as clearly as patches must.
LIT = 2.0
EVERY = 4  # pixel in either direction; brightness needs no more
_HALF_NORMAL = math.sqrt(2 / math.pi)  # mean of the upper half of a standard Gaussian
CHUNK = 64
# A product of so many patches and the references of so many pictures stays in a core's cache until it was looked at:
# a quarter to a third less time than with all references at once.
ROWS, TOGETHER = 392, 8
AT_ONCE = 8  # pictures searched in one call: pieces for sixteen cores


@dataclass(frozen=True)
class Screened:
    """Which of n pictures are left out.

    Attributes
    ----------
    strangeness : float64 (n,), see `strangeness_of`
    limit : the strangeness from which on a picture is left out
    dropped : bool (n,), strange: neither fitted nor calibrated on
    aside : bool (n,), strange all over and taken under other light: fitted on, not calibrated on
    held_back : bool (n,), above the lower limit: calibrated on, not fitted on
    lower : that limit
    """

    strangeness: NDArray[np.float64]
    limit: float
    dropped: NDArray[np.bool_]
    aside: NDArray[np.bool_]
    held_back: NDArray[np.bool_]
    lower: float = math.inf

    @classmethod
    def nothing(cls, n: int) -> Screened:
        """All n pictures stay."""
        none = np.zeros(n, bool)
        return cls(np.zeros(n), math.inf, none, none, none)

    @property
    def fitted(self) -> NDArray[np.int64]:
        """Indices of the pictures that are fitted on."""
        return np.flatnonzero(~self.dropped & ~self.held_back)

    @property
    def calibrated(self) -> NDArray[np.int64]:
        """Indices, among those fitted on, of the pictures that are calibrated on beside those held back."""
        return np.flatnonzero(~self.aside[self.fitted])

    @property
    def rows(self) -> NDArray[np.int64]:
        """Indices of all pictures that are calibrated on: those fitted on, then those held back."""
        return np.concatenate([self.fitted[self.calibrated], np.flatnonzero(self.held_back)])

    def left_out(self, training: TrainingPictures, root: Path) -> list[LeftOutFile]:
        """The pictures left out of the fit or the calibration, strangest first, each with the reason."""
        found: list[LeftOutFile] = []
        for i in map(int, np.argsort(-self.strangeness, kind="stable")):
            limit = self.lower if self.held_back[i] else self.limit
            if self.dropped[i]:
                what = "a place in it is unlike anything in the others"
            elif self.aside[i]:
                what = "it is all over unlike the others, and taken under other light"
            elif self.held_back[i]:
                what = "it is rather unlike the others, in a folder with one that clearly is"
            else:
                continue
            found.append(
                LeftOutFile(
                    path=training.files[i].path.relative_to(root).as_posix(),
                    reason=f"{what} (strangeness {self.strangeness[i]:.1f}, limit {limit:.1f})",
                    fitted=bool(self.aside[i]),
                    calibrated=bool(self.held_back[i]),
                )
            )
        return found


def check_contamination(contamination: str) -> None:
    """BadParameter where there is no such way."""
    if contamination not in (AUTO, NONE):
        raise BadParameter(f"There is no contamination {contamination!r}; choose {AUTO} or {NONE}.")


def screen(
    features: Features, *, seed: int = 0, progress: Progress | None = None, entry: Path | None = None
) -> Screened:
    """Find the pictures to leave out by their patches, float16 or float32 (n, h, w, d), which may be memory-mapped, and
    by their pooled features where there are any.

    At most 200 pictures, drawn by `seed`, are compared with, by 64 patches of each that lie far apart. Where the
    features are kept at `entry`, so are the distances. Without the pictures themselves nobody knows their light, and
    what is strange all over counts as taken under other light.
    """
    n = len(features)
    if n < LEAST or features.patches is None:
        return Screened.nothing(n)
    place = None if entry is None else entry_of("contamination", entry.name, seed)
    kept = None if place is None else find(place)
    if kept is not None and "distances" in kept.arrays:
        distances = np.asarray(kept.arrays["distances"])
    else:
        distances = patch_distances(features.patches, seed=seed, progress=progress)
        if place is not None:
            keep(place, {"distances": distances})
    peak = top_mean(distances).astype(np.float64)
    calm = np.quantile(distances.reshape(n, -1), CALM, axis=1).astype(np.float64)
    strangeness, limit = strangeness_of(peak), limit_of(CHANCE, n)
    strange = strangeness > limit
    raised = calm - np.median(calm) >= ALL_OVER * (peak - np.median(peak))
    if features.pictures is not None and (strange & raised).any():
        raised &= strangeness_of(light_distances(features.pictures)) > LIT * limit
    found = Screened(strangeness, limit, strange & ~raised, strange & raised, np.zeros(n, bool))
    if not strange.any():
        return found
    if features.pooled:
        strangeness = np.maximum(strangeness, strangeness_of(pooled_distances(features, seed=seed)))
    lower = limit_of(MORE, n)
    return replace(found, strangeness=strangeness, held_back=(strangeness > lower) & ~strange, lower=lower)


def patch_distances(patches: NDArray[Any], *, seed: int = 0, progress: Progress | None = None) -> NDArray[np.float32]:
    """Distance of each patch to the m-th nearest other picture, float32 (n, h, w)."""
    n, h, w, d = patches.shape
    chosen, m = _references(n, seed)
    each = min(PATCHES, h * w)
    references = np.empty((len(chosen), each, d), np.float32)
    found = np.empty((n, h * w), np.float32)
    with (progress or SilentProgress()).stage("contamination", total=len(chosen) + n) as stage:
        for row, i in enumerate(chosen):
            points = finite_float32(patches[i].reshape(-1, d), "patch features")
            picked = greedy_coreset(points, each, seed=seed, projection_dim=None)
            references[row] = points[np.resize(picked, each)]  # repeats where patches coincide
            stage.advance()
        nearest = _nearest_of_each(references)
        for start in range(0, n, AT_ONCE):
            points = finite_float32(patches[start : start + AT_ONCE].reshape(-1, d), "patch features")
            squared = np.einsum("ij,ij->i", points, points)[:, np.newaxis] - 2 * nearest(points)[0]
            for i, one in enumerate(squared.reshape(-1, h * w, len(chosen)), start):
                one[:, chosen == i] = np.inf
                found[i] = np.sqrt(np.maximum(np.partition(one, m - 1, axis=1)[:, m - 1], 0))
                stage.advance()
    return found.reshape(n, h, w)


def _nearest_of_each(references: NDArray[np.float32]) -> CPUNetwork:
    """Points float32 (n, d) to their highest q.r - |r|^2 / 2 among each picture's references, float32 (n, pictures).

    `references` are float32 (pictures, each, d). Matrix products and a pass over each, compiled.
    """
    import openvino as ov
    from openvino import opset13 as ops

    pictures, each, d = references.shape
    points = ops.parameter([-1, d], ov.Type.f32)
    highest = []
    for start in range(0, pictures, TOGETHER):
        some = references[start : start + TOGETHER]
        rows = some.transpose(1, 0, 2).reshape(-1, d).copy()  # a picture's lie apart: their maximum is then faster
        half = 0.5 * np.einsum("ij,ij->i", rows, rows)[np.newaxis]
        products = ops.subtract(ops.matmul(points, ops.constant(rows), False, True), ops.constant(half))
        grouped = ops.reshape(products, np.array([0, each, len(some)]), True)
        highest.append(ops.reduce_max(grouped, np.array([1])))
    model = ov.Model([ops.result(ops.concat(highest, 1))], [points], "nearest_of_each")
    return CPUNetwork(lambda: model, piece=ROWS)


def pooled_distances(features: Features, *, seed: int = 0) -> NDArray[np.float64]:
    """Distance of each picture's pooled features to those of the m-th nearest other picture, float64 (n,).

    Features are scaled to unit length, and a layer's distances by their median; the mean over the layers.
    """
    n = len(features)
    chosen, m = _references(n, seed)
    total = np.zeros(n)
    for layer in features.pooled:
        x = pooled_features(features, layer).astype(np.float64)
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        squared = np.maximum(2 - 2 * x @ x[chosen].T, 0)
        squared[chosen, np.arange(len(chosen))] = np.inf
        distance = np.sqrt(np.partition(squared, m - 1, axis=1)[:, m - 1])
        total += distance / max(float(np.median(distance)), np.finfo(np.float32).tiny)
    return total / len(features.pooled)


def light_distances(pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How far each picture's brightness and contrast lie from what is usual, float64 (n,): uint8 (n, h, w, 3).

    The largest deviation, in robust standard deviations, of nine statistics from their medians: mean and standard
    deviation of each channel, and the 2nd, 50th and 98th percentile of grey. A grey level more or less is nothing.
    """
    rows = []
    for picture in pictures:
        pixels = picture[::EVERY, ::EVERY].reshape(-1, 3).astype(np.float32)
        grey = np.percentile(pixels.mean(axis=1), [2, 50, 98])
        rows.append(np.concatenate([pixels.mean(axis=0), pixels.std(axis=0), grey]))
    away = np.abs(np.stack(rows) - np.median(rows, axis=0))
    return np.asarray((away / (1.4826 * np.median(away, axis=0) + 1)).max(axis=1), np.float64)


def _references(n: int, seed: int) -> tuple[NDArray[np.int64], int]:
    """The pictures that all are compared with, and m."""
    chosen = np.sort(np.random.default_rng(seed).permutation(n)[:REFERENCES])
    return chosen, min(math.ceil(SHARE * len(chosen)) + 1, len(chosen) - 1)


def limit_of(count: float, n: int) -> float:
    """The strangeness that about so many of n normal values exceed on average, were their upper half Gaussian.

    Real scores are more skewed, and exceed it more often.
    """
    from scipy.stats import t

    return float(t.isf(count / n, n / 2)) / _HALF_NORMAL


def strangeness_of(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each of n values lies above the others: float64 (n,), 0 for those not looked at.

    Each of the largest 15 % is measured against all those below it, so that several do not hide each other: its
    distance from their median in units of their upper half's mean excess; what is above another is as strange at least.
    """
    order = np.argsort(-values, kind="stable")
    strangeness = np.zeros(len(values))
    candidates = int(MOST * len(values))
    for i in range(candidates):
        rest = values[order[i + 1 :]]
        middle = np.median(rest)
        above = rest[rest > middle]
        scale = float((above - middle).mean()) if len(above) else 0.0
        excess = float(values[order[i]] - middle)
        strangeness[order[i]] = excess / max(scale, 1e-6 * max(abs(float(middle)), 1e-12))
    looked_at = order[:candidates]
    strangeness[looked_at] = np.maximum.accumulate(strangeness[looked_at][::-1])[::-1]
    return strangeness


def only(
    training: TrainingPictures, prepared: Prepared, rows: NDArray[np.int64], scratch: Path
) -> tuple[TrainingPictures, Prepared]:
    """Both with the pictures in `rows` alone, memory-mapped in `scratch`; as they are where that is all of them."""
    if len(rows) == len(training.pictures):
        return training, prepared
    arrays: dict[str, NDArray[Any]] = {}
    for name, array in (prepared.features.to_arrays() | {"pictures": training.pictures}).items():
        arrays[name] = np.lib.format.open_memmap(
            scratch / f"kept.{name}.npy", mode="w+", dtype=array.dtype, shape=(len(rows), *array.shape[1:])
        )
        for start in range(0, len(rows), CHUNK):
            arrays[name][start : start + CHUNK] = array[rows[start : start + CHUNK]]
    kept = replace(training, pictures=arrays["pictures"], files=[training.files[i] for i in rows])
    return kept, replace(prepared, features=Features.from_arrays(arrays))


def score_held_back(detector: Detector, features: Features, screened: Screened) -> list[Scores]:
    """Scores of the pictures held back, by a detector that has not seen them; `features` are of all pictures."""
    rows = np.flatnonzero(screened.held_back)
    return [detector.score(features[rows[start : start + CHUNK]]) for start in range(0, len(rows), CHUNK)]


def notes(left_out: Collection[LeftOutFile], n: int, alpha: float) -> list[str]:
    """What was left out and what that does to the promise of alpha, for n calibration pictures."""
    if not left_out:
        return []
    lines: list[str] = []
    for one in left_out:
        if one.calibrated:
            done, then = "Held back", "The detectors do not know it; the threshold counts it."
        elif one.fitted:
            done, then = "Set aside", "It sets no threshold; the detectors know it."
        else:
            done, then = "Dropped", "Look at it."
        lines.append(f"{done} {one.path}: {one.reason}. {then}")
    k = sum(not one.calibrated for one in left_out)
    bound = (k + math.floor(alpha * (n + 1) + 1e-9)) / (n + k + 1)
    what = "1 picture" if k == 1 else f"{k} pictures"
    lines.append(
        f"The false-alarm rate holds for normal pictures unlike the {what} dropped or set aside. If all of these are "
        f"normal after all, up to {bound:.2%} are called anomalous; fit with --contamination none then."
    )
    return lines
