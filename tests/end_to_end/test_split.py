"""The graph split over processes that reach each other by TCP, and what their ports refuse."""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from tests.end_to_end.traffic import alike

pytestmark = pytest.mark.slow

ALONE = {
    "resnet50": "ood_runners.resnet50_runner:ResNet50Runner",
    "vae": "ood_runners.vae_runner:VAERunner",
    "mahalanobis": "ood_runners.mahalanobis_runner:MahalanobisRunner",
}
PICKLE = "application/vnd.bentoml+pickle"
FRAME = "application/vnd.ood-runners.frame"
KEY = "key-of-the-split-0123456789"


@dataclass(frozen=True)
class Split:
    """Three runners served alone, and the gateway, with the fourth beside it on a TCP port of its own."""

    gateway: Any
    runners: dict[str, Any]


@pytest.fixture(scope="module")
def split(serve: Any, fitted: Any) -> Iterator[Split]:
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setenv("BENTOML_NO_UDS", "1")
        patch.setenv("OOD_API_KEY", KEY)
        started = {name: serve(fitted.home, target=target) for name, target in ALONE.items()}
        runners = dict(zip(started, pool.map(stack.enter_context, started.values()), strict=True))
        urls = ",".join(f"{name}={runner.url}" for name, runner in runners.items())
        whole = Split(stack.enter_context(serve(fitted.home, f"runner_urls={urls}")), runners)
        for one in (whole.gateway, *runners.values()):
            one.http.headers["X-API-Key"] = KEY
        yield whole


def ports(server: Any) -> set[int]:
    """The ports of its services; the process that starts them again has two of its own, which speak no HTTP."""
    workers = psutil.Process(server.process.pid).children(recursive=True)
    found = [one for process in workers for one in process.net_connections("tcp")]
    return {one.laddr.port for one in found if one.status == psutil.CONN_LISTEN}


def test_scores_are_those_of_one_process_group(split: Split, server: Any, many: list[bytes]) -> None:
    for data in many[:4]:
        apart, together = (one.detect(data, product="parts") for one in (split.gateway, server))
        assert alike(apart, together), (apart, together)
    apart_map, together_map = (one.post("/anomaly_map", many[1], product="parts") for one in (split.gateway, server))
    maps = [np.load(io.BytesIO(one.content), allow_pickle=False) for one in (apart_map, together_map)]
    np.testing.assert_allclose(*maps, rtol=1e-4, atol=1e-5)


def test_calls_are_batched_and_none_is_lost(split: Split, many: list[bytes]) -> None:
    def batches() -> tuple[float, float]:
        text = split.runners["resnet50"].http.get("/metrics").text
        return tuple(  # type: ignore[return-value]
            float(re.findall(rf"^bentoml_service_adaptive_batch_size_{kind}{{.*}} (\S+)$", text, re.MULTILINE)[0])
            for kind in ("count", "sum")
        )

    calls, pictures = batches()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: split.gateway.post("/detect", many[i % 12], product="parts"), range(64)))
    assert {answer.status_code for answer in answers} == {200}
    alone = [split.gateway.detect(data, product="parts")["score"] for data in many]
    assert [answer.json()["score"] for answer in answers] == pytest.approx([alone[i % 12] for i in range(64)], rel=1e-3)
    more_calls, more_pictures = (after - before for after, before in zip(batches(), (calls, pictures), strict=True))
    assert more_pictures == 64 + 12
    assert more_calls < 0.9 * more_pictures


class Trap:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_no_port_reads_pickle(split: Split, tmp_path: Path) -> None:
    folder = tmp_path / "caught"
    trap = pickle.dumps(Trap(folder))
    pickle.loads(trap)
    folder.rmdir()  # the trap works
    servers = [split.gateway, *split.runners.values()]
    doors = {port for server in servers for port in ports(server)}
    assert len(doors) == len(servers) + 1
    headers = [
        {"content-type": PICKLE},
        {"content-type": PICKLE.title() + "; charset=utf-8"},
        {"content-type": PICKLE, "buffer-lengths": str(len(trap))},
    ]
    for port in doors:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            routes = {"/", "/infer", "/livez", "/readyz", "/metrics", "/detect", "/detect_batch", "/heatmap", "/nosuch"}
            schema = http.get("/schema.json", headers={"X-API-Key": KEY})
            assert schema.status_code == 200
            routes |= set(schema.json()["paths"])
            for route in sorted(routes):
                for one in headers:
                    answer = http.post(route, content=trap, headers=one)
                    assert answer.status_code == 415, (port, route, answer.text)
                    assert answer.json()["error"]["code"] == "unsupported_media_type"
    assert not folder.exists()
    assert split.gateway.is_ready()


def test_a_runners_port_reads_frames_only(split: Split) -> None:
    for runner in split.runners.values():
        assert runner.http.post("/infer", json={"items": [{"pictures": [[[0, 0, 0]]]}]}).status_code == 415
        assert runner.http.post("/infer", files={"items": b"x"}).status_code == 415
        assert runner.http.post("/infer").status_code == 415
        frame = {"content-type": FRAME}
        assert runner.http.post("/infer", content=b"no frame", headers=frame).status_code == 400


def test_every_port_asks_for_the_key(split: Split) -> None:
    for port in {port for server in (split.gateway, *split.runners.values()) for port in ports(server)}:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            for wrong in ({}, {"X-API-Key": KEY[:-1] + "x"}, {"Authorization": f"Bearer {KEY}x"}):
                answer = http.post("/infer", content=b"no frame", headers={"content-type": FRAME} | wrong)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorised")
                assert http.get("/metrics", headers=wrong).status_code == 401
            assert http.get("/livez").status_code == 200
    for server in (split.gateway, *split.runners.values()):
        assert KEY not in server.log.read_text()
        assert "EVERYBODY" not in server.log.read_text()


def test_a_runner_that_is_open_to_others_says_so(serve: Any, fitted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OOD_API_KEY", raising=False)  # the other servers of this file have one
    with serve(fitted.home, target=ALONE["mahalanobis"], host="0.0.0.0") as runner:
        assert runner.log.read_text().count("EVERYBODY MAY ASK") == 1


def test_a_runner_that_is_away_is_named(split: Split, normal: bytes) -> None:
    split.runners["vae"].process.terminate()
    split.runners["vae"].process.wait(timeout=20)
    answer = split.gateway.post("/detect", normal, product="parts")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
    assert "VAERunner" in answer.json()["error"]["message"]
    split.gateway.wait_for(lambda: split.gateway.http.get("/readyz").status_code == 503, 5)
