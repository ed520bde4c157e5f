"""One guarded server: its metrics, its log and its keys."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ood_runners.gateway.versions import TRAINING_CALLS
from tests.deploy.exposed import metrics_asked_for

FIRST, SECOND = "first-key-0123456789", "second-key-0123456789"
RUNNERS = {"ResNet50Runner", "VAERunner", "NearestNeighbourRunner", "MahalanobisRunner"}
STAGES = {"features", "vae", "memory_bank", "mahalanobis"}
TRACE = "0af7651916cd43dd8448eb211c8031{:02d}"


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"{FIRST}\n")
    return file


@pytest.fixture(scope="module")
def guarded(serve: Any, fitted: Any, key_file: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OOD_API_KEY_FILE", str(key_file))
        with serve(fitted.home, "log_format=json") as server:
            server.http.headers["X-API-Key"] = FIRST
            server.wait_for(lambda: has_learned(server))
            yield server


def samples(server: Any) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = server.http.get("/metrics").text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: dict[Any, float], name: str, **labels: str) -> float:
    return found.get((name, frozenset(labels.items())), 0.0)


def has_learned(server: Any) -> bool:
    """Whether the golden pictures are counted that runners learn their speed from, once the service is ready."""

    def counts() -> dict[str, float]:
        found = samples(server)
        return {stage: value(found, "ood_queue_seconds_count", stage=stage) for stage in STAGES}

    before = counts()
    time.sleep(0.5)
    return min(before.values()) > TRAINING_CALLS and counts() == before


def labels(found: dict[Any, float], name: str, label: str) -> set[str]:
    return {dict(pairs)[label] for sample, pairs in found if sample == name}


def log_lines(server: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]


def test_pictures_are_counted_by_what_became_of_them(
    guarded: Any, fitted: Any, normal: bytes, defective: bytes
) -> None:
    before = samples(guarded)
    good = guarded.detect(normal, product="parts")
    bad = guarded.detect(defective, product="parts")
    files = [("images", ("a.png", data)) for data in (normal, b"no picture", defective)]
    assert guarded.http.post("/detect_batch", files=files, data={"product": "parts"}).status_code == 200
    after = samples(guarded)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    for verdict in ("normal", "anomalous"):
        assert grown("ood_verdicts_total", product="parts", version=fitted.first, verdict=verdict) == 2
    assert grown("ood_rejected_pictures_total", code="not_a_picture") == 1
    assert value(after, "ood_alpha", product="parts", version=fitted.first) == good["alpha"]
    for detector in ("fused", "memory_bank", "mahalanobis", "vae", "softmax"):
        assert grown("ood_p_value_count", product="parts", detector=detector) == 4
        assert grown("ood_relative_score_count", product="parts", detector=detector) == 4
    sum_of_p = grown("ood_p_value_sum", product="parts", detector="fused")
    assert sum_of_p == pytest.approx(2 * (good["p_value"] + bad["p_value"]), rel=1e-6)
    # 0 is a median normal picture and 1 is where alpha is reached.
    below_alpha = grown("ood_relative_score_bucket", product="parts", detector="fused", le="1.0")
    assert below_alpha == 2
    for stage in STAGES:
        assert grown("ood_batch_pictures_sum", stage=stage) == 4
        assert 0 < grown("ood_compute_seconds_sum", stage=stage) <= grown("ood_stage_seconds_sum", stage=stage)
        assert grown("ood_queue_seconds_count", stage=stage) == grown("ood_stage_seconds_count", stage=stage) == 3
        assert value(after, "ood_loaded_versions", stage=stage) >= 1
        assert value(after, "ood_loaded_bytes", stage=stage) > 1000
    assert value(after, "ood_served_products") == 2
    assert value(after, "ood_refused_products") == value(after, "ood_pending_pictures") == 0


def test_dashboard_and_alerts_ask_for_what_is_there(guarded: Any, normal: bytes) -> None:
    assert guarded.post("/detect", normal, product="parts").status_code == 200
    assert guarded.post("/detect", b"no picture", product="parts").status_code == 415
    there: dict[str, set[str]] = {}
    for name, pairs in samples(guarded):
        there.setdefault(name, set()).update(dict(pairs))
    asked = metrics_asked_for()
    assert len(asked) > 20
    for name, labels in asked.items():
        assert labels <= there[name], name


def test_what_clients_make_up_is_no_label(guarded: Any, normal: bytes) -> None:
    before = samples(guarded)
    for i in range(5):
        answer = guarded.http.get(f"/made/up/{i}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        assert guarded.post("/detect", normal, product=f"made-up-{i}").status_code == 404
        assert guarded.post("/detect", normal, product="parts", version=f"made-up-{i}").status_code == 404
        assert guarded.http.post("/detect", data={"image": "made-up"}).status_code == 400
        assert guarded.http.get("/products", headers={"X-API-Key": f"made-up-{i}"}).status_code == 401
    after = samples(guarded)
    assert "made-up" not in str(after)
    assert "/made" not in str(after)
    assert "other" in labels(after, "bentoml_service_request_total", "endpoint")
    for code, count in {"not_found": 15, "malformed": 5, "unauthorised": 5}.items():
        grown = value(after, "ood_rejected_requests_total", code=code)
        assert grown - value(before, "ood_rejected_requests_total", code=code) == count


def test_a_request_is_followed_through_all_processes(guarded: Any, normal: bytes, defective: bytes) -> None:
    for i, data in enumerate((normal, defective)):
        traceparent = f"00-{TRACE.format(i)}-b7ad6b7169203331-01"
        answer = guarded.http.post(
            "/detect",
            files={"image": ("secret-name.png", data)},
            data={"product": "parts"},
            headers={"X-Request-Id": f"part-{i}", "traceparent": traceparent},
        )
        assert answer.headers["x-request-id"] == f"part-{i}"

    def access() -> list[str]:
        return [line["request_id"] for line in log_lines(guarded) if line["logger"] == "bentoml.access"]

    guarded.wait_for(lambda: {"part-0", "part-1"} <= set(access()), 5)
    for i in range(2):
        lines = [line for line in log_lines(guarded) if line.get("request_id") == f"part-{i}"]
        assert {line["trace_id"] for line in lines} == {TRACE.format(i)}
        components = {re.split("[:\\]]", line["component"])[1] for line in lines}
        assert components == {*RUNNERS, "OODService"}
        [judged] = [line for line in lines if "smallest_p" in line]
        assert (judged["product"], judged["pictures"], judged["anomalous"]) == ("parts", 1, i)
    assert "secret-name" not in guarded.log.read_text()


def test_an_id_is_made_where_none_is_sent(guarded: Any) -> None:
    made = [guarded.http.get(path).headers["x-request-id"] for path in ("/products", "/livez", "/nowhere")]
    assert len(set(made)) == 3
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in made)


def test_nothing_but_probes_and_the_page_is_open(guarded: Any) -> None:
    guarded.http.headers.pop("X-API-Key")
    try:
        for path in ("/livez", "/readyz", "/", "/openapi.json", "/static_content/swagger-ui.css"):
            assert guarded.http.get(path).status_code == 200, path
        # BentoML's own as well as ours.
        for path in ("/products", "/metrics", "/schema.json", "/docs.json", "/detect", "/nowhere"):
            answer = guarded.http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorised"), path
            assert answer.headers["www-authenticate"].startswith("Bearer")
        # A browser asks first without a key, and learns nothing: no headers allow it to go on.
        asked = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
        for path in ("/products", "/metrics", "/schema.json", "/docs.json", "/detect", "/nowhere", "/livez"):
            answer = guarded.http.request("OPTIONS", path, headers=asked)
            assert answer.status_code == (404 if path == "/nowhere" else 405), path
            assert set(answer.json()) == {"error"}
            assert not [name for name in answer.headers if name.startswith("access-control")]
        assert guarded.http.request("OPTIONS", "/products").status_code == 401
        for size in (10, 20 * 2**20):  # the answer arrives whatever is being sent
            assert guarded.post("/detect", b"x" * size).status_code == 401
        assert guarded.http.get("/products", headers={"Authorization": f"Bearer {FIRST}"}).status_code == 200
    finally:
        guarded.http.headers["X-API-Key"] = FIRST
    schemes = guarded.http.get("/openapi.json").json()["components"]["securitySchemes"]
    assert {scheme["type"] for scheme in schemes.values()} == {"http", "apiKey"}


def test_the_guard_can_see_where_the_server_listens(guarded: Any) -> None:
    gateway = next(
        child for child in psutil.Process(guarded.process.pid).children() if "OODService" in " ".join(child.cmdline())
    )
    listening = {one.laddr for one in gateway.net_connections(kind="inet") if one.status == psutil.CONN_LISTEN}
    assert guarded.http.base_url.port in {address.port for address in listening}
    assert "EVERYBODY" not in guarded.log.read_text()


def test_keys_rotate_and_show_nowhere(guarded: Any, key_file: Path) -> None:
    def status(key: str) -> int:
        return int(guarded.http.get("/products", headers={"X-API-Key": key}).status_code)

    assert (status(FIRST), status(SECOND)) == (200, 401)
    try:
        key_file.write_text(f"{FIRST}\n{SECOND}\n")
        guarded.wait_for(lambda: status(SECOND) == 200, 5)
        assert status(FIRST) == 200
        key_file.write_text(f"{SECOND}\n")
        guarded.wait_for(lambda: status(FIRST) == 401, 5)
        assert status(SECOND) == 200
    finally:
        key_file.write_text(f"{FIRST}\n{SECOND}\n")
        time.sleep(1.1)
    guarded.wait_for(lambda: status(FIRST) == 200, 5)
    shown = [
        guarded.log.read_text(),
        *(guarded.http.get(path).text for path in ("/metrics", "/products", "/docs.json")),
    ]
    for key in (FIRST, SECOND):
        assert not any(key in text for text in shown)
