from __future__ import annotations

import logging

import numpy as np
import pytest
from prometheus_client import REGISTRY

from ood_runners import engines
from ood_runners.artifacts import LoadedVersions
from ood_runners.detectors import Detector, MemoryBank
from ood_runners.engines import DetectorEngine
from ood_runners.errors import ArtifactError
from ood_runners.features import Features
from ood_runners.telemetry.logs import RequestIdFilter

CELLS = (4, 5, 8)


def patches(seed: int, n: int) -> Features:
    return Features(patches=np.random.default_rng(seed).normal(size=(n, *CELLS)).astype(np.float16))


@pytest.fixture(scope="module")
def banks() -> dict[str, Detector]:
    return {f"ood-parts:v{seed}": MemoryBank(size=30, k=2).fit(patches(seed, 4)) for seed in (1, 2)}


@pytest.fixture
def engine(banks: dict[str, Detector]) -> DetectorEngine:
    def load(tag: str) -> Detector:
        if tag not in banks:
            raise ArtifactError(f"{tag} is damaged")
        return banks[tag]

    return DetectorEngine(LoadedVersions(load, lambda _: 1, 10), "memory_bank")


def items(tags: list[str]) -> list[dict[str, object]]:
    return [{"tag": tag} | item for tag, item in zip(tags, patches(9, len(tags)).to_items(), strict=True)]


def test_each_item_is_answered_by_its_own_version(engine: DetectorEngine, banks: dict[str, Detector]) -> None:
    tags = ["ood-parts:v2", "ood-parts:v1", "ood-parts:v2"]
    answers = engine.infer(items(tags))
    for row, tag in enumerate(tags):
        expected = banks[tag].score(patches(9, 3)[[row]])
        assert answers[row]["score"] == pytest.approx(expected.image[0], rel=1e-5)
        np.testing.assert_allclose(answers[row]["map"], expected.map[0], rtol=1e-4)
    assert answers[0]["score"] != answers[1]["score"]


def test_one_bad_item_fails_alone(engine: DetectorEngine) -> None:
    batch = items(["ood-parts:v1"] * 3)
    good = engine.infer(batch)
    batch[1]["patches"] = np.zeros((4, 5, 7), np.float16)
    answers = engine.infer(batch)
    assert set(answers[1]) == {"error"}
    for row in (0, 2):
        assert answers[row]["score"] == pytest.approx(good[row]["score"], rel=1e-5)


def test_a_version_that_cannot_be_loaded_fails_its_own_items(engine: DetectorEngine) -> None:
    answers = engine.infer(items(["ood-parts:v1", "ood-parts:v7", "ood-parts:v2"]))
    assert answers[1] == {"error": {"code": "artifact_refused", "message": "ood-parts:v7 is damaged"}}
    assert "score" in answers[0]
    assert "score" in answers[2]


def test_an_item_without_a_tag_or_features(engine: DetectorEngine) -> None:
    answers = engine.infer([{}, {"tag": "ood-parts:v1"}, *items(["ood-parts:v1"])])
    assert ["error" in answer for answer in answers] == [True, True, False]


def test_nothing_in_nothing_out(engine: DetectorEngine) -> None:
    assert engine.infer([]) == []


def test_a_part_is_counted_with_what_it_computes_in() -> None:
    """A budget of stored bytes alone let a runner take four times as much."""
    weights = 10 * 2**20
    small, large = (engines._memory(weights, (side, side), 16) for side in (96, 224))
    assert 2 * weights < small < large
    assert large - small == pytest.approx(16 * 250 * (224**2 - 96**2))
    assert engines._memory(weights, (0, 0), 16) < 3 * weights


def test_a_failure_is_logged_with_the_request_it_belongs_to(
    banks: dict[str, Detector], caplog: pytest.LogCaptureFixture
) -> None:
    engine = DetectorEngine(LoadedVersions(banks.__getitem__, lambda _: 1, 10), "memory_bank")
    tags = ["ood-parts:v1", "ood-parts:defect", "ood-parts:v1"]
    batch = [item | {"request_id": name} for name, item in zip("abc", items(tags), strict=True)]
    caplog.handler.addFilter(RequestIdFilter())
    before = REGISTRY.get_sample_value("ood_batch_pictures_sum", {"stage": "memory_bank"}) or 0.0
    with caplog.at_level(logging.INFO):
        answers = engine.infer(batch)
    assert ["error" in answer for answer in answers] == [False, True, False]
    lines = [(record.levelname, record.__dict__["request_id"]) for record in caplog.records]
    assert lines == [("ERROR", "b"), ("INFO", "a,b,c")]
    assert REGISTRY.get_sample_value("ood_batch_pictures_sum", {"stage": "memory_bank"}) == before + 3
    assert REGISTRY.get_sample_value("ood_loaded_versions", {"stage": "memory_bank"}) == 1


def test_an_item_may_only_ask_for_its_version_to_be_loaded(engine: DetectorEngine) -> None:
    before = REGISTRY.get_sample_value("ood_batch_pictures_sum", {"stage": "memory_bank"}) or 0.0
    [answer] = engine.infer([{"tag": "ood-parts:v1", "load": True}])
    assert set(answer) == {"seconds"}
    assert engine._loaded.tags() == ["ood-parts:v1"]
    one, *asked = items(["ood-parts:v1"] * 2)
    alone = engine.infer([one])
    among = engine.infer([{"tag": "ood-parts:v1", "load": True}, one, {"tag": "ood-parts:v7", "load": True}, *asked])
    assert among[1]["score"] == pytest.approx(alone[0]["score"], rel=1e-5)
    assert ["score" in answer for answer in among] == [False, True, False, True]
    assert among[2]["error"]["message"] == "ood-parts:v7 is damaged"
    after = REGISTRY.get_sample_value("ood_batch_pictures_sum", {"stage": "memory_bank"})
    assert after == before + 3  # pictures, and what is only loaded is none
