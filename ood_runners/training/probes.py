"""Synthetic defects on the training pictures and their features: what the detectors are compared by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ood_runners.backbones import FeatureNetwork
from ood_runners.detectors.base import Probes
from ood_runners.features import Features
from ood_runners.training.keeping import entry_of, find, keep
from ood_runners.training.prepare import Prepared
from ood_runners.training.progress import Progress
from ood_runners.training.synthetic import synthetic_defects

MOST = 100  # each passes through every detector; more would not change the weights
A_PICTURE = 4
BATCH = 8


def probes_of(
    pictures: NDArray[np.uint8], rows: NDArray[np.int64], prepared: Prepared, seed: int, progress: Progress
) -> Probes:
    """The probes of the pictures that are fitted on, whose places among the training pictures are `rows`.

    They are taken from an earlier fit where there was one.
    """
    entry = None if prepared.entry is None else entry_of("probes", prepared.entry.name, rows.tolist(), seed)
    if entry is not None and (kept := find(entry)) is not None and "origin" in kept.arrays:
        with progress.stage("synthetic", total=1) as stage:
            stage.advance(note="as in an earlier fit")
        return Probes(Features.from_arrays(kept.arrays), np.array(kept.arrays["origin"]))
    probes = make_probes(pictures, prepared.network, np.random.default_rng(seed), progress)
    if entry is not None:
        keep(entry, probes.features.to_arrays() | {"origin": probes.origin})
    return probes


def make_probes(
    pictures: NDArray[np.uint8], network: FeatureNetwork | None, rng: np.random.Generator, progress: Progress
) -> Probes:
    """At most 100 pictures, at most 4 of each normal one, with a defect painted on; `network` gives their features.

    `pictures` are uint8 (n, h, w, 3) and may be memory-mapped.
    """
    rounds = [rng.permutation(len(pictures)) for _ in range(A_PICTURE)]
    origin = np.concatenate(rounds)[:MOST]
    made = synthetic_defects(np.asarray(pictures[origin]), rng)[0]
    parts: list[Features] = []
    with progress.stage("synthetic", total=len(made)) as stage:
        for start in range(0, len(made), BATCH):
            part = made[start : start + BATCH]
            features = Features() if network is None else network(part)
            parts.append(replace(features, pictures=part))
            stage.advance(len(part))
    return Probes(Features.concatenate(parts), origin)
