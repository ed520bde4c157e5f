"""Approximate nearest neighbours for large banks, through faiss: less work than a product with every entry.

ivf
    Inverted lists: the entries in cells around k-means centres; a query looks into the nearest cells (Jégou et al.,
    "Product Quantization for Nearest Neighbor Search", PAMI 2011).
hnsw
    A navigable graph (Malkov and Yashunin, "Efficient and Robust Approximate Nearest Neighbor Search Using
    Hierarchical Navigable Small World Graphs", PAMI 2020).
lsh
    Signs of random projections; the entries of nearest codes are then measured (Charikar, "Similarity Estimation
    Techniques from Rounding Algorithms", STOC 2002).
pq
    Inverted lists of codes, four bits for each few dimensions, which the processor compares 32 at a time (André et al.,
    "Quicker ADC: Unlocking the Hidden Potential of Product Quantization with SIMD", PAMI 2021); the entries of nearest
    codes are then measured.

All measure distances to the bank's own float16 entries, in float32. What they miss is a nearer entry, so they can
only overstate a distance. How often is measured when a bank is fitted, on patches that are not in the index, and by how
much where it matters: a picture's score is the mean of its largest distances, and one patch in a thousand for which a
graph ends up far away is enough to make every picture strange.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ood_runners.cores import available_cores
from ood_runners.detectors.base import top_mean
from ood_runners.detectors.search import Search
from ood_runners.errors import ArtifactError, DataError

# By kind: what a search may spend, least first: cells looked into, entries kept in view, candidates measured.
EFFORTS: Final[Mapping[str, tuple[int, ...]]] = {
    "ivf": (4, 8, 16, 32, 64, 128),
    "hnsw": (16, 32, 64, 128, 256),
    "lsh": (16, 64, 256),
    "pq": (16, 24, 32, 64),
}
KINDS: Final = tuple(EFFORTS)
ROWS = 256  # queries whose candidates are measured at a time
CELLS = 4.0  # of IVF, times the square root of the entries
A_CELL = 40  # entries a cell that k-means looks at
LINKS, BUILD_EFFORT = 16, 80  # of HNSW
BITS = 512  # of LSH
MOST_EXCESS = 0.01  # of the largest distances
CODED_CELLS, CODED_PROBES = 0.5, 4  # of PQ: cells, times the square root of the entries, and those looked into
# What held-out pictures may spend: on 41 of them, what is found is off by less than 1e-5 in the mean.
HELD_OUT_EFFORT, HELD_OUT_PROBES = 64, 8
CODED_DIMENSIONS, CODES = 4, 16  # to a code of four bits; how many there are of it
SLACK = {"pq": 1.05**2}  # of squared distances: what is found counts as nearest where it is at most 5 % farther
MANY = 20  # queries from which on faiss measures distances to the cells' centres by products
SPARE = 0.005  # recall beyond what is asked, for the choice of the effort: it is measured again on other queries


class Quality(NamedTuple):
    """What an index finds: recall@1 (see `SLACK`), and by what share the largest 1 % of distances are overstated."""

    recall: float
    excess: float

    def enough(self, least: float) -> bool:
        """Whether it may stand in for the exact search, with a recall of `least`."""
        return self.recall >= least and self.excess <= MOST_EXCESS


class Index:
    """The k nearest entries of a bank, by Euclidean distance, most of the time.

    Parameters
    ----------
    kind : one of `KINDS`
    bank : float16 (m, d), m >= 1
    k : neighbours; clipped to m
    effort : what a query may spend, in the units of `EFFORTS`
    seed : of k-means; the other two have none, or their own
    threads : CPU threads; all cores if None
    """

    def __init__(
        self,
        kind: str,
        bank: NDArray[np.float16],
        k: int,
        effort: int,
        *,
        seed: int = 0,
        threads: int | None = None,
    ) -> None:
        self._set(kind, bank, k, _build(kind, np.asarray(bank, np.float32), seed), threads)
        self.use(effort)

    def _set(self, kind: str, bank: NDArray[np.float16], k: int, built: Any, threads: int | None) -> None:
        self.kind, self.k, self.threads = kind, min(k, len(bank)), threads
        self._bank, self._built = bank, built
        self._names: NDArray[np.int64] | None = None  # of the entries, where they are some of a larger bank's
        if kind == "pq":
            faiss = _faiss()
            self._entries = faiss.IndexScalarQuantizer(bank.shape[1], faiss.ScalarQuantizer.QT_fp16)
            self._entries.add(np.ascontiguousarray(bank, np.float32))
            self._measuring: Any = faiss.IndexRefine(built, self._entries)

    def without(self, entries: NDArray[np.bool_]) -> Index:
        """A `pq` index of the bank but for some `entries`, bool (m,), that searches with care; cells and codes stay.

        What it finds is told by its place in the whole bank. At least one entry must be left.
        """
        faiss = _faiss()
        if self.kind != "pq":
            raise ValueError(f"an index {self.kind!r} is made anew, not made smaller")
        built = faiss.clone_index(self._built)
        built.reset()
        names = np.flatnonzero(~entries)
        built.add(np.ascontiguousarray(self._bank[names], np.float32))
        rest = Index.__new__(Index)
        rest._set(self.kind, self._bank[names], self.k, built, self.threads)
        rest._names = names
        rest.use(HELD_OUT_EFFORT)
        rest._built.nprobe = HELD_OUT_PROBES
        return rest

    def use(self, effort: int) -> None:
        """Spend so much on each query."""
        self.effort = min(effort, len(self._bank))
        if self.kind == "ivf":
            self._built.nprobe = self.effort
        elif self.kind == "hnsw":
            self._built.hnsw.efSearch = self.effort
        elif self.kind == "pq":
            self._built.nprobe = CODED_PROBES
            self._measuring.k_factor = max(1.0, (self.effort + 0.5) / self.k)

    @property
    def share(self) -> float:
        """The share of an index's cells that a query looks into; 0 for one without cells."""
        return self.effort / self._built.nlist if self.kind == "ivf" else 0.0

    def search(self, queries: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Squared distances float32 (n, k), nearest first, and indices int64 (n, k) of the entries.

        `queries` are float32 (n, d).
        """
        faiss = _faiss()
        faiss.omp_set_num_threads(self.threads or available_cores())  # counts for the calling thread alone
        queries = np.ascontiguousarray(queries, np.float32)
        if self.kind == "lsh":
            return self._measured(queries, self._built.search(queries, max(self.k, self.effort))[1])
        squared, found = (self._measuring if self.kind == "pq" else self._built).search(queries, self.k)
        for row in np.flatnonzero((found < 0).any(axis=1)):  # the cells looked into held fewer than k entries
            every = np.arange(len(self._bank))[np.newaxis]
            squared[row : row + 1], found[row : row + 1] = self._measured(queries[row : row + 1], every)
        return np.maximum(squared, 0, out=squared), found if self._names is None else self._names[found]

    def _measured(
        self, queries: NDArray[np.float32], candidates: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The k nearest of each query's candidates, int64 (n, c)."""
        squared = np.empty((len(queries), self.k), np.float32)
        found = np.empty((len(queries), self.k), np.int64)
        for start in range(0, len(queries), ROWS):
            rows = slice(start, start + ROWS)
            apart = self._bank[candidates[rows]].astype(np.float32) - queries[rows, np.newaxis]
            distances = np.einsum("ncd,ncd->nc", apart, apart)
            order = np.argsort(distances, axis=1, kind="stable")[:, : self.k]
            squared[rows] = np.take_along_axis(distances, order, axis=1)
            found[rows] = np.take_along_axis(candidates[rows], order, axis=1)
        return squared, found

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The index as faiss writes it, uint8, with its SHA-256; its kind and effort."""
        stored = _faiss().serialize_index(self._built)
        return {
            "index": stored,
            "index_sha256": _digest(stored),
            "index_use": np.array([KINDS.index(self.kind), self.effort], np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], bank: NDArray[np.float16], k: int) -> Self:
        """The inverse of `to_arrays`, over the bank that it was built on.

        Raises
        ------
        ArtifactError
            The bytes are damaged or are those of another index. faiss gets to read only what has its digest.
        """
        try:
            stored, digest, (kind, effort) = arrays["index"], arrays["index_sha256"], arrays["index_use"].tolist()
            if not np.array_equal(_digest(stored), digest):
                raise ValueError("its bytes have changed")
            built = _read(stored, KINDS[kind], bank)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, MemoryError, AssertionError) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise ArtifactError(f"The stored index of the memory bank cannot be read ({reason}); fit again.") from error
        index = cls.__new__(cls)
        index._set(KINDS[kind], bank, k, built, None)
        index.use(max(1, effort))
        return index


def fit_effort(
    kind: str,
    bank: NDArray[np.float16],
    queries: NDArray[np.float32],
    k: int,
    least: float,
    *,
    seed: int = 0,
    threads: int | None = None,
) -> tuple[int, Quality]:
    """The least effort with which an index of `bank` finds enough, with a recall of `least`, and what it then finds.

    One half of the queries, float32 (n, d), chooses the effort and the other half measures; where no effort is enough,
    the greatest comes back. Ties count as found.
    """
    if len(queries) < 2:
        raise DataError("Recall needs at least two queries.")
    index = Index(kind, bank, k, EFFORTS[kind][0], seed=seed, threads=threads)
    nearest = Search(bank, 1, threads=threads).search(queries)[0][:, 0]
    choosing, measuring = slice(0, None, 2), slice(1, None, 2)
    for effort in EFFORTS[kind]:
        index.use(effort)
        if _quality(index, queries[choosing], nearest[choosing]).enough(min(1.0, least + SPARE)):
            break
    return index.effort, _quality(index, queries[measuring], nearest[measuring])


def _quality(index: Index, queries: NDArray[np.float32], nearest: NDArray[np.float32]) -> Quality:
    """From the queries and their exact squared distances float32 (n,) to the nearest entry."""
    # The product rounds by the length of the query, the index by the distance.
    noise = 1e-5 * np.einsum("ij,ij->i", queries, queries) + 1e-6
    found = index.search(queries)[0][:, 0]
    high, due = (float(top_mean(np.sqrt(squared)[np.newaxis])[0]) for squared in (found, nearest))
    near = found <= nearest * SLACK.get(index.kind, 1 + 1e-4) + noise
    return Quality(float(np.mean(near)), high / max(due, 1e-9) - 1)


def _build(kind: str, entries: NDArray[np.float32], seed: int) -> Any:
    """A trained faiss index of all entries."""
    faiss = _faiss()
    m, d = entries.shape
    built: Any
    half: Any = faiss.ScalarQuantizer.QT_fp16  # the entries as the bank has them
    if kind == "ivf":
        cells = max(1, min(round(CELLS * m**0.5), m // A_CELL))
        built = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatL2(d), d, cells, half, faiss.METRIC_L2, False)
        built.cp.seed, built.cp.max_points_per_centroid = seed + 1, A_CELL
        built.cp.min_points_per_centroid = 1  # or faiss prints a warning
    elif kind == "hnsw":
        built = faiss.IndexHNSWSQ(d, half, LINKS)
        built.hnsw.efConstruction = BUILD_EFFORT
        faiss.omp_set_num_threads(1)  # several threads would link the entries in an order of their own
    elif kind == "lsh":
        built = faiss.IndexLSH(d, BITS, True, False)
    elif kind == "pq":
        cells = max(1, min(round(CODED_CELLS * m**0.5), m // A_CELL))
        codes = next(count for count in range(max(1, d // CODED_DIMENSIONS), 0, -1) if d % count == 0)
        built = faiss.IndexIVFPQFastScan(faiss.IndexFlatL2(d), d, cells, codes, 4)
        built.by_residual = False  # one table of distances for each query, not for each cell it looks into
        built.cp.seed, built.pq.cp.seed = seed + 1, seed + 1
        built.cp.min_points_per_centroid = built.pq.cp.min_points_per_centroid = 1
    else:
        raise ValueError(f"no index {kind!r}")
    built.train(entries if m >= CODES else np.resize(entries, (CODES, d)))
    built.add(entries)
    return built


def _read(stored: NDArray[np.uint8], kind: str, bank: NDArray[np.float16]) -> Any:
    """The faiss index in these bytes; ValueError where it is none of this bank's."""
    built: Any = _faiss().deserialize_index(np.ascontiguousarray(stored, np.uint8))
    types = {
        "ivf": "IndexIVFScalarQuantizer",
        "hnsw": "IndexHNSWSQ",
        "lsh": "IndexLSH",
        "pq": "IndexIVFPQFastScan",
    }
    if type(built).__name__ != types[kind] or (built.ntotal, built.d) != bank.shape or not built.is_trained:
        raise ValueError("it is not an index of these entries")
    if kind in ("ivf", "pq") and built.quantizer.ntotal != built.nlist:
        raise ValueError("its cells and their centres differ in number")
    if kind == "hnsw":
        links = _faiss().vector_to_array(built.hnsw.neighbors)
        if len(links) and not -1 <= links.min() <= links.max() < len(bank):
            raise ValueError("it links to entries that are not there")
    return built


def _faiss() -> Any:
    """faiss, told to find the cells of a picture's patches by products, in half of the time."""
    import faiss

    faiss.cvar.distance_compute_blas_threshold = MANY
    return faiss


def _digest(stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.frombuffer(hashlib.sha256(np.ascontiguousarray(stored).tobytes()).digest(), np.uint8)
