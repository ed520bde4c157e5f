"""Several gateway processes behind one address."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from ood_runners.shutdown import GATEWAY
from tests.end_to_end.conftest import Fitted, Serve, Server


def gateways(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if ("--service-name", GATEWAY) in itertools.pairwise(child.cmdline())]


@pytest.mark.parametrize("profile", ["graph", "fused"])
def test_one_gateway_answers_while_another_is_started_again(
    profile: str, fitted: Fitted, serve: Serve, many: list[bytes]
) -> None:
    with serve(fitted.home, f"profile={profile}", "gateways=2") as server:
        server.wait_for(lambda: len(gateways(server)) == 2)

        def ask(data: bytes) -> dict[str, object]:  # by a connection of its own, which either of them may take
            form = {"product": "parts"}
            answer = httpx.post(f"{server.url}/detect", files={"image": ("p.png", data)}, data=form, timeout=60)
            assert answer.status_code == 200, answer.text
            return dict(answer.json())

        with ThreadPoolExecutor(8) as pool:
            before = list(pool.map(ask, many))
            killed = gateways(server)[0]
            killed.kill()
            killed.wait(10)
            after = list(pool.map(ask, many))
        for one, other in zip(before, after, strict=True):
            assert one["verdict"] == other["verdict"]
            assert one["score"] == pytest.approx(other["score"], rel=1e-3)
        server.wait_for(lambda: len(gateways(server)) == 2, 60)
        assert killed.pid not in [one.pid for one in gateways(server)]
