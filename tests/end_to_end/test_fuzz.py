"""Hostile requests over HTTP: an answer each time, soon, never a 500, and memory stays."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ood_runners.api.app import create_app
from tests.end_to_end.traffic import processes
from tests.test_images_fuzz import mutate, seeds

HANG_S = 5.0
FILES, SETTLE = 1_000, 300
GROWTH = 64 * 2**20  # of all the server's processes together, over `FILES` files

schema = schemathesis.openapi.from_dict(create_app(upload_s=30).openapi())
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@schema.parametrize()
@settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_any_request_that_the_page_allows_or_does_not(server: Any, case: Any) -> None:
    start = time.monotonic()
    answer = case.call(base_url=server.url, timeout=4 * HANG_S)
    assert time.monotonic() - start < HANG_S
    case.validate_response(answer, checks=CHECKS)


def memory(server: Any) -> int:
    """Bytes that belong to the server's processes alone, together."""
    return sum(process.memory_full_info().uss for process in processes(server))


@pytest.mark.slow
def test_a_thousand_hostile_files(server: Any, normal: bytes) -> None:
    rng = random.Random(11)
    files = [*seeds().values(), normal]
    statuses: Counter[int] = Counter()
    slowest = 0.0

    def post(count: int) -> None:
        nonlocal slowest
        for _ in range(count):
            start = time.monotonic()
            answer = server.post("/detect", mutate(rng.choice(files), rng), product="parts")
            slowest = max(slowest, time.monotonic() - start)
            statuses[answer.status_code] += 1
            if answer.status_code != 200:
                assert answer.json()["error"]["message"].endswith(".")

    post(SETTLE)  # the allocators and the codecs' tables
    before = memory(server)
    post(FILES)
    growth = memory(server) - before
    print(f"{dict(statuses)}, slowest {slowest:.2f} s, growth {growth / 2**20:.1f} MiB of {before / 2**20:.0f}")
    assert statuses.keys() <= {200, 413, 415}
    assert statuses[200] > 50 and statuses[415] > 50
    assert slowest < HANG_S
    assert growth < GROWTH


@pytest.mark.slow
def test_forms_that_are_broken_anywhere(server: Any, normal: bytes) -> None:
    form = httpx.Request("POST", "http://a/detect", files={"image": ("a.png", normal)}, data={"product": "parts"})
    body, kind = form.read(), form.headers["content-type"]
    rng = random.Random(12)
    statuses: Counter[int] = Counter()
    for _ in range(600):
        start = time.monotonic()
        broken = (
            kind
            if rng.random() < 0.8
            else mutate(kind.encode(), rng).translate(None, b"\r\n\0").strip().decode("latin-1")
        )
        answer = server.http.post(
            "/detect", content=mutate(body, rng), headers={b"content-type": broken.encode("latin-1")}
        )
        assert time.monotonic() - start < HANG_S
        statuses[answer.status_code] += 1
    print(dict(statuses))
    assert statuses.keys() <= {200, 400, 404, 413, 415, 422}
    assert statuses[400] > 10
