"""The fused profile: one process, the same answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from tests.end_to_end.conftest import Fitted, Serve, Server


def test_answers_as_the_graph_does_from_one_process(
    fitted: Fitted, server: Server, serve: Serve, many: list[bytes]
) -> None:
    with serve(fitted.home, "profile=fused") as fused:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda data: fused.detect(data, product="parts"), many))
        commands = [" ".join(child.cmdline()) for child in psutil.Process(fused.process.pid).children(recursive=True)]
        assert not [command for command in commands if "Runner" in command], commands
        assert fused.post("/detect", b"no picture", product="parts").status_code == 415
        assert fused.http.get("/livez").status_code == 200
        of_members = [fused.detect(data, product="plain", version=fitted.mapped) for data in many[:4]]
    for data, answer in zip(many, of_members, strict=False):
        compare(answer, server.detect(data, product="plain", version=fitted.mapped))
        assert len(answer["detectors"]) == 4, answer  # type: ignore[arg-type]
    for data, answer in zip(many, answers, strict=True):
        compare(answer, server.detect(data, product="parts"))


def compare(answer: dict[str, Any], expected: dict[str, Any]) -> None:
    """Both are the same judgement, up to rounding."""
    assert answer["verdict"] == expected["verdict"] and answer["version"] == expected["version"]
    assert answer["score"] == pytest.approx(expected["score"], rel=1e-3)
    assert answer["detectors"].keys() == expected["detectors"].keys()
    for name, view in expected["detectors"].items():
        assert answer["detectors"][name]["score"] == pytest.approx(view["score"], rel=1e-3), name
