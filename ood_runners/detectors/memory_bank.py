"""Distance of each patch to its nearest normal patches: the detector that localises small defects.

References
----------
Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (PatchCore), CVPR 2022.
Cohen and Hoshen, "Sub-Image Anomaly Detection with Deep Pyramid Correspondences" (SPADE), 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from ood_runners.backbones.runtime import choose_device
from ood_runners.detectors.base import Detector, Probes, top_count, top_mean
from ood_runners.detectors.checks import finite_float32
from ood_runners.detectors.coreset import coreset_of_pictures
from ood_runners.detectors.indexes import KINDS, Index, fit_effort
from ood_runners.detectors.position import TRIAL_ENTRIES, Position, by_place, explained, held_out, trial
from ood_runners.detectors.search import Metric, Search, recall
from ood_runners.errors import ArtifactError, DataError
from ood_runners.features import Features, Scores

if TYPE_CHECKING:
    from ood_runners.detectors.torch_search import TorchMetric, TorchSearch

SEARCH_PICTURES = 32  # scored at a time
LARGE = 2_000  # entries from which on the search in int8 pays
MIN_RECALL, RECALL_QUERIES, INDEX_QUERIES = 0.99, 1_024, 8_192
AUTO, EXACT, INT8, IVF, PQ = "auto", "exact", "int8", "ivf", "pq"
SEARCHES = (AUTO, EXACT, INT8, *KINDS)
# Entries from which on "auto" takes an index, the first that finds enough; see docs/performance.md.
INDEX_FROM = {PQ: 2_000, IVF: 5_000}
MOST_SHARE = 0.2  # of the cells looked into; an entry in a list costs some five times as much as one in a product


class MemoryBank(Detector):
    """Mean Euclidean distance to the k nearest patches of a greedy k-centre coreset of normal patches.

    After `fit_held_out`, where the pictures' frame is filled alike (see `position`), distances are given in deviations
    from what held-out normal pictures have at the same place.

    With a `fine_` metric the map shows the mean distance to the same k entries in that metric, while the picture's
    score stays that of the plain one: places are found better where fine features count for more, pictures are not.

    Parameters
    ----------
    size : entries in the bank, at most
    k : neighbours; clipped to the bank's size
    seed : of the coreset's first point and its projection
    search : how the entries are searched, one of `SEARCHES`; "auto" takes inverted lists from `INDEX_FROM`
        entries on, where that is less work. What finds the nearest entry too rarely is replaced, in the end by the
        exact search. Held-out scores come from `pq` with more effort, the exact search or the one in int8

    Attributes
    ----------
    device : "auto", "cpu" or "cuda"
        Where entries are searched; on a GPU exactly, whatever `search`. Set it before a fit or the first ``score``.
    bank_ : float16 (m, d)
        The entries. Scores are computed from these rounded values at fit time too, so that a stored
        bank scores as the fitted one.
    source_ : int32 (m, 2)
        Index of the training picture and of the cell in its grid (row-major) that each entry comes from.
    fold_ : int32 (m,)
        The fold each entry was chosen from (all 0 after a plain ``fit``).
    recall_ : float
        The share of training patches whose nearest entry is found by the search in int8; below 0.99, and for a small
        bank, where it is not asked, the search is exact.
    index_ : Index or None
        The approximate search that scores new pictures, where one is used.
    index_recall_ : dict
        By each kind of index that was tried, the share of training patches whose nearest entry it found.
    index_excess_ : dict
        Likewise, by what share it overstated their largest 1 % of distances.
    position_ : Position or None
        What maps are measured by; None where they are distances.
    attention_ : float32 (d, d) or None
        What patches are multiplied by first, so that some directions count for more; set before the fit.
    fine_ : float32 (d, d) or None
        What patches are multiplied by for the map (`Projection.fine`); set before the fit.
    fine_position_ : Position or None
        What such maps are measured by.
    explained_ : float or None
        The share of the variance of held-out maps of a small bank that the place explains, which decides on that.
    """

    name = "memory_bank"
    localises = True

    def __init__(self, *, size: int = 10_000, k: int = 3, seed: int = 0, search: str = AUTO) -> None:
        self.size = size
        self.k = k
        self.seed = seed
        self.search = search
        self.device = "cpu"
        self.threads: int | None = None
        self.attention_: NDArray[np.float32] | None = None
        self.fine_: NDArray[np.float32] | None = None
        self._metric: Metric | TorchMetric | None = None
        self._search: Search | Index | TorchSearch | None = None
        self._exact: Search | None = None

    def params(self) -> dict[str, Any]:
        return {"size": self.size, "k": self.k, "seed": self.seed, "search": self.search}

    def fit(
        self,
        features: Features,
        labels: NDArray[np.int64] | None = None,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Self:
        """Choose the bank from all patches, taken as one fold.

        ``features.patches`` is float16 or float32 (n, h, w, d) and may be memory-mapped: at most
        `coreset.MAX_PATCHES` patches are in memory at a time. `progress` is called with how many of the `size`
        entries are done.
        """
        self._choose(_patches(features), np.zeros(len(features), np.int64), progress)
        self.explained_: float | None = None
        return self

    def fit_held_out(
        self,
        features: Features,
        folds: NDArray[np.int64],
        labels: NDArray[np.int64] | None = None,
        *,
        probes: Probes | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Scores:
        """Choose one coreset a fold; the bank is their union, and a fold is scored without its own entries.

        One pass gives bank and held-out scores. The final bank is a superset of the one that scored each
        held-out picture, so held-out scores are, if anything, larger than those of new normal pictures:
        p-values from them err on the side of fewer false alarms.
        """
        folds = np.asarray(folds)
        maps = self._fit_distances(features, folds, probes, progress)
        share = self._explained(features, folds)
        return self._measured(
            maps, folds if probes is None else np.append(folds, folds[probes.origin]), len(features), share
        )

    def score(self, features: Features) -> Scores:
        """``map`` float32 (n, h, w): mean distance to the k nearest entries; ``image``: the mean of the highest 1 %.

        With `fine_`, ``image`` is that of the plain distances, which ``map`` does not show. An index may overstate a
        cell of the map, never one of the highest 1 %: those are measured exactly, so that the image score is what the
        exact search gives.
        """
        maps = self._score(features, np.arange(len(features)), self._opened(), self._exact)
        if self.position_ is None:
            return _of_maps(maps)
        places = (self.position_, self.fine_position_ or self.position_)
        return _of_maps([place.apply(one) for place, one in zip(places, maps, strict=False)])

    def open(self) -> None:
        """Compile the searches and the map's metric, for the ``device`` set by then."""
        self._opened()
        self._opened_metric()

    def info(self) -> dict[str, Any]:
        """The number of entries, how they are searched, and the measured recall, of each index that was tried too."""
        facts: dict[str, Any] = {"entries": len(self.bank_)}
        if self.index_ is not None:
            facts |= {"search": self.index_.kind, "effort": self.index_.effort}
            facts["recall"] = self.index_recall_[self.index_.kind]
        else:
            facts["search"] = INT8 if self.recall_ >= MIN_RECALL else EXACT
            facts |= {"recall": self.recall_} if self.recall_ else {}
        tried = {"index_recall": self.index_recall_, "index_excess": self.index_excess_}
        facts |= tried if self.index_recall_ else {}
        if self.explained_ is not None:
            facts |= {"by_position": self.position_ is not None, "explained_by_position": round(self.explained_, 3)}
        return facts

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {
            "bank": self.bank_,
            "source": self.source_,
            "fold": self.fold_,
            "recall": np.array([self.recall_]),
        }
        if self.index_recall_:
            for name, by_kind in (("index_recall", self.index_recall_), ("index_excess", self.index_excess_)):
                arrays[name] = np.array([by_kind.get(kind, np.nan) for kind in KINDS])
        if self.explained_ is not None:
            arrays["explained"] = np.array([self.explained_])
        if self.attention_ is not None:
            arrays["attention"] = self.attention_
        if self.fine_ is not None:
            arrays["fine"] = self.fine_
        for name, place in (("", self.position_), ("fine_", self.fine_position_)):
            if place is not None:
                arrays |= {f"{name}centre": place.centre, f"{name}spread": place.spread}
        return arrays | (self.index_.to_arrays() if self.index_ is not None else {})

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Self:
        detector = cls(**params)
        detector.bank_, detector.source_, detector.fold_ = arrays["bank"], arrays["source"], arrays["fold"]
        detector.recall_ = float(arrays["recall"][0]) if "recall" in arrays else 0.0
        detector.explained_ = float(arrays["explained"][0]) if "explained" in arrays else None
        detector.attention_, detector.fine_ = arrays.get("attention"), arrays.get("fine")
        detector.position_, detector.fine_position_ = (
            Position(arrays[f"{name}centre"], arrays[f"{name}spread"]) if f"{name}centre" in arrays else None
            for name in ("", "fine_")
        )
        if detector.bank_.ndim != 2 or not len(detector.bank_):
            raise ArtifactError("The stored memory bank is empty or has no (entries, dimensions) shape.")
        detector.index_recall_, detector.index_excess_ = (
            {kind: float(found) for kind, found in zip(KINDS, arrays.get(name, ()), strict=False) if np.isfinite(found)}
            for name in ("index_recall", "index_excess")
        )
        detector.index_ = Index.from_arrays(arrays, detector.bank_, detector._k()) if "index" in arrays else None
        return detector

    def _fit_distances(
        self,
        features: Features,
        folds: NDArray[np.int64],
        probes: Probes | None,
        progress: Callable[[int], None] | None,
    ) -> NDArray[np.float32]:
        """Choose the bank; held-out maps of the pictures, followed by those of the probes, as `_score` gives them."""
        if len(np.unique(folds)) < 2:
            raise DataError("Held-out scores need at least two folds; give at least two normal pictures.")
        self._choose(_patches(features), folds, progress)
        parts: list[NDArray[np.float32]] = []
        order: list[NDArray[np.int64]] = []
        for fold in np.unique(folds):
            rows = np.flatnonzero(folds == fold)
            rest, exact = self._without(self.fold_ == fold)
            parts.append(self._score(features, rows, rest, exact))
            order.append(rows)
            if probes is not None and len(made := probes.of(folds, fold)):
                parts.append(self._score(probes.features, made, rest, exact))
                order.append(len(features) + made)
        return np.concatenate(parts, axis=1)[:, np.argsort(np.concatenate(order))]

    def _without(self, entries: NDArray[np.bool_]) -> tuple[Search | Index | TorchSearch, Search | None]:
        """The search for pictures that these entries are of, and what measures the highest cells of what it gives."""
        if self.index_ is None or self.index_.kind != PQ or self._on_gpu:
            return self._open(without=entries), None
        return self.index_.without(entries), Search(self.bank_, self._k(), without=entries, threads=self.threads)

    def _explained(self, features: Features, folds: NDArray[np.int64]) -> float:
        """What the place explains of the held-out maps of a small bank of a few pictures, 0 to 1."""
        small = MemoryBank(size=TRIAL_ENTRIES, k=self.k, seed=self.seed, search=EXACT)
        small.device, small.threads, small.attention_ = self.device, self.threads, self.attention_
        rows, parts = trial(folds, self.seed)
        return explained(small._fit_distances(Features(_patches(features)[rows]), parts, None, None)[0])

    def _choose(self, patches: NDArray[Any], folds: NDArray[np.int64], progress: Callable[[int], None] | None) -> None:
        bank: list[NDArray[np.float16]] = []
        source: list[NDArray[np.int32]] = []
        fold_of: list[NDArray[np.int32]] = []
        taken = 0
        for fold in np.unique(folds):
            rows = np.flatnonzero(folds == fold)
            # Shares by cumulative rounding: proportional to the pictures, and they add up to `size`.
            start, end = (round(self.size * part / len(patches)) for part in (taken, taken + len(rows)))
            taken += len(rows)
            report = None if progress is None else lambda count, start=start: progress(start + count)
            entries, origin = coreset_of_pictures(patches, rows, max(1, end - start), self.seed, self._attended, report)
            if progress is not None:
                progress(end)
            bank.append(entries)
            source.append(origin)
            fold_of.append(np.full(len(entries), fold, np.int32))
        self.bank_ = np.concatenate(bank)
        self.source_ = np.concatenate(source)
        self.fold_ = np.concatenate(fold_of)
        self._choose_search(patches, folds)

    def _queries(
        self, patches: NDArray[Any], folds: NDArray[np.int64], count: int
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """So many patches of one fold, float32 (n, d), to measure with, and which entries are that fold's own."""
        rng = np.random.default_rng(self.seed)
        fold = folds[0]
        rows = rng.permutation(np.flatnonzero(folds == fold))[:count]
        cells = rng.integers(patches.shape[1] * patches.shape[2], size=count)
        chosen = rows[np.arange(count) % len(rows)]
        queries = patches[chosen, cells // patches.shape[2], cells % patches.shape[2]]
        own = self.fold_ == fold
        return self._attended(finite_float32(queries, "patch features")), None if own.all() else own

    def _choose_search(self, patches: NDArray[Any], folds: NDArray[np.int64]) -> None:
        """Measure what may be taken, and take an index where one was asked for, or is less work, and finds enough."""
        self._search = self._exact = self.index_ = self._metric = None
        self.position_: Position | None = None
        self.fine_position_: Position | None = None
        self.recall_, self.index_recall_, self.index_excess_ = 0.0, {}, {}
        large = len(self.bank_) >= LARGE
        if self.search == INT8 or (large and self.search != EXACT):
            queries, without = self._queries(patches, folds, RECALL_QUERIES)
            self.recall_ = recall(self.bank_, queries, self.k, without, self.threads)
        kinds = [self.search] if self.search in KINDS else []
        if self.search == AUTO:
            kinds = [kind for kind, least in INDEX_FROM.items() if len(self.bank_) >= least]
        for kind in kinds:
            queries, without = self._queries(patches, folds, INDEX_QUERIES)
            others = self.bank_ if without is None else self.bank_[~without]
            effort, found = fit_effort(kind, others, queries, self.k, MIN_RECALL, seed=self.seed, threads=self.threads)
            self.index_recall_[kind], self.index_excess_[kind] = found.recall, found.excess
            if found.enough(MIN_RECALL):
                index = Index(kind, self.bank_, self._k(), effort, seed=self.seed, threads=self.threads)
                if self.search == kind or index.share <= MOST_SHARE:
                    self.index_ = index
                    break

    def _attended(self, patches: NDArray[Any]) -> NDArray[Any]:
        """Patches float16 or float32 (..., d), multiplied by the weights, in float32, where there are any."""
        return patches if self.attention_ is None else patches.astype(np.float32) @ self.attention_

    def _k(self) -> int:
        """As many neighbours as there are without any one fold, so that held-out and new pictures have the same."""
        largest = np.bincount(self.fold_).max() if len(np.unique(self.fold_)) > 1 else 0
        return min(self.k, len(self.bank_) - int(largest))

    def _measured(self, maps: NDArray[np.float32], folds: NDArray[np.int64], n: int, share: float) -> Scores:
        """Decide whether place counts, from held-out maps of n normal pictures, which those of probes may follow."""
        normal = np.arange(maps.shape[1]) < n
        self.explained_ = share
        self.position_ = self.fine_position_ = None
        found = held_out(maps[0], folds, normal, share)
        if found is None:
            return _of_maps(maps)
        self.position_, plain = found
        if len(maps) == 1:
            return _of_maps([plain])
        self.fine_position_, fine = by_place(maps[1], folds, normal)
        return _of_maps([plain, fine])

    @property
    def _on_gpu(self) -> bool:
        return choose_device(self.device) == "cuda"

    def _opened(self) -> Search | Index | TorchSearch:
        """What new pictures are searched with; `_exact` beside it where that is an index."""
        if self._search is None:
            self._search = self._open() if self._on_gpu or self.index_ is None else self.index_
        if isinstance(self._search, Index):
            self._search.threads = self.threads
            if self._exact is None:
                self._exact = Search(self.bank_, self._k(), threads=self.threads)
        return self._search

    def _open(self, without: NDArray[np.bool_] | None = None) -> Search | TorchSearch:
        """The search over all entries, or those left `without` some."""
        if self._on_gpu:
            from ood_runners.detectors.torch_search import TorchSearch

            return TorchSearch(self.bank_, self._k(), "cuda", without=without)
        rounded = self.recall_ >= MIN_RECALL
        return Search(self.bank_, self._k(), rounded=rounded, without=without, threads=self.threads)

    def _opened_metric(self) -> Metric | TorchMetric | None:
        """That of the map, where there is one."""
        if self.fine_ is not None and self._metric is None:
            if self._on_gpu:
                from ood_runners.detectors.torch_search import TorchMetric

                self._metric = TorchMetric(self.bank_, self.fine_, "cuda")
            else:
                self._metric = Metric(self.bank_, self.fine_, self.threads)
        return self._metric

    def _score(
        self, features: Features, rows: NDArray[np.int64], search: Search | Index | TorchSearch, exact: Search | None
    ) -> NDArray[np.float32]:
        """Maps of the pictures in `rows`, float32 (1 or 2, n, h, w): the plain ones and, with `fine_`, those of it.

        With `exact`, the highest cells of what `search` gives are measured by it.
        """
        patches = _patches(features)
        if patches.shape[-1] != self.bank_.shape[1]:
            raise DataError(
                f"The patches have {patches.shape[-1]} dimensions and the memory bank {self.bank_.shape[1]}; "
                "use the backbone and projection that the bank was fitted with."
            )
        metric = self._opened_metric()
        maps = np.empty((1 if metric is None else 2, len(rows), *patches.shape[1:3]), np.float32)
        for start in range(0, len(rows), SEARCH_PICTURES):
            part = self._attended(finite_float32(patches[rows[start : start + SEARCH_PICTURES]], "patch features"))
            squared, entries = search.search(part.reshape(-1, part.shape[-1]))
            found = np.sqrt(squared).mean(axis=1).reshape(len(part), -1)
            entries = entries.reshape(*found.shape, -1)
            if exact is not None:
                _settle(found, entries, part.reshape(*found.shape, -1), exact, self.position_)
            maps[0, start : start + SEARCH_PICTURES] = found.reshape(part.shape[:3])
            if metric is not None:
                shown = metric.measure(part.reshape(-1, part.shape[-1]), entries.reshape(found.size, -1))
                maps[1, start : start + SEARCH_PICTURES] = shown.reshape(part.shape[:3])
        return maps


def _of_maps(maps: Sequence[NDArray[np.float32]] | NDArray[np.float32]) -> Scores:
    """Pictures are scored by the first of the maps (n, h, w), and the last one is shown."""
    return Scores(image=top_mean(maps[0]), map=maps[-1])


def _settle(
    maps: NDArray[np.float32],
    entries: NDArray[np.int64],
    patches: NDArray[np.float32],
    exact: Search,
    position: Position | None,
) -> None:
    """Measure the highest cells of each map, float32 (n, cells), exactly, until the highest 1 % are certain.

    `patches` are float32 (n, cells, d) and `entries` int64 (n, cells, k) what was found nearest; the highest are those
    by `position`, where there is one. What an index finds is never nearer than what there is, so a cell that was not
    measured lies no higher than the map says: once as many as `top_mean` looks at lie above all of those, the mean is
    exact. Half as many more are measured at first, and that is mostly enough.
    """
    count, cells = top_count(maps.shape[1]), maps.shape[1]
    centre, spread = np.zeros(cells, np.float32), np.ones(cells, np.float32)
    if position is not None:
        centre, spread = position.centre.ravel(), position.spread.ravel()
    shown = (maps - centre) / spread
    order = np.argsort(-shown, axis=1, kind="stable")
    rows, done = np.arange(len(maps)), 0
    while len(rows) and done < cells:
        step = order[rows, done : done + count + count // 2]
        done += step.shape[1]
        squared, nearest = exact.search(patches[rows[:, np.newaxis], step].reshape(-1, patches.shape[-1]))
        entries[rows[:, np.newaxis], step] = nearest.reshape(*step.shape, -1)
        measured = np.sqrt(squared).mean(axis=1).reshape(step.shape)
        # Rounding of the two searches apart, an exact distance is the smaller one.
        measured = np.minimum(measured, maps[rows[:, np.newaxis], step])
        maps[rows[:, np.newaxis], step] = measured
        shown[rows[:, np.newaxis], step] = (measured - centre[step]) / spread[step]
        if done < cells:
            known = np.take_along_axis(shown[rows], order[rows, :done], axis=1)
            least = np.partition(known, done - count, axis=1)[:, done - count]
            rows = rows[least < shown[rows, order[rows, done]]]


def _patches(features: Features) -> NDArray[Any]:
    """The patches (n, h, w, d), or a DataError when there are none."""
    if features.patches is None or features.patches.ndim != 4:
        raise DataError("The memory bank needs patch features of shape (pictures, height, width, dimensions).")
    return features.patches
