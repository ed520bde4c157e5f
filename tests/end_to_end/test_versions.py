"""Which version a server takes up, and which it refuses."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ood_runners import artifacts
from tests.end_to_end.test_live_versions import store_of


def test_an_empty_store_is_served_and_says_how_to_fill_it(
    serve: Any, fitted: Any, tmp_path: Path, normal: bytes, command_line: Callable[..., str]
) -> None:
    home = tmp_path / "home"
    with serve(home) as server:
        assert server.http.get("/products").json() == {"products": []}
        answer = server.post("/detect", normal)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        assert "build_artifacts.py fit" in answer.json()["error"]["message"]
        file = tmp_path / "parts.tar"
        command_line("export", f"parts:{fitted.second}", str(file), home=fitted.home)
        command_line("import", str(file), home=home)
        command_line("promote", f"parts:{fitted.second}", home=home)
        # One product only: it need not be named.
        server.wait_for(lambda: server.post("/detect", normal).status_code == 200, 5)


def test_a_damaged_version_is_refused_and_the_old_one_stays(
    serve: Any, fitted: Any, tmp_path: Path, normal: bytes, command_line: Callable[..., str]
) -> None:
    home = tmp_path / "home"
    shutil.copytree(fitted.home, home)
    with serve(home) as server:
        assert server.detect(normal, product="parts")["version"] == fitted.first
        arrays = next((home / "models" / "ood-parts" / fitted.second).glob("memory_bank*"))
        flipped = bytearray(arrays.read_bytes())
        flipped[-1] ^= 1
        arrays.write_bytes(flipped)
        record = home / "ood-production" / "parts.json"
        # `promote` would refuse it: here it was damaged after it had been promoted.
        named = record.read_text().replace(f'"production": "{fitted.first}"', f'"production": "{fitted.second}"')
        record.write_text(named)

        def parts() -> dict[str, Any]:
            return next(one for one in server.http.get("/products").json()["products"] if one["product"] == "parts")

        server.wait_for(lambda: parts()["refused"], 5)
        assert arrays.name in parts()["refused"]
        assert (parts()["version"], parts()["production"]) == (fitted.first, fitted.second)
        assert server.detect(normal, product="parts")["version"] == fitted.first
        answer = server.post("/detect", normal, product="parts", version=fitted.second)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "artifact_refused")
        # Put right, it is taken up.
        command_line("promote", f"parts:{fitted.first}", home=home)
        server.wait_for(lambda: parts()["refused"] is None, 5)


def test_pins_hold_whatever_is_in_production(serve: Any, fitted: Any, normal: bytes) -> None:
    with serve(fitted.home, f"products=parts:{fitted.second}") as server:
        assert server.detect(normal)["version"] == fitted.second
        answer = server.post("/detect", normal, product="plain")
        assert answer.status_code == 404
        assert "pinned to parts" in answer.json()["error"]["message"]
        with store_of(fitted.home):
            for move in (lambda: artifacts.promote(f"parts:{fitted.second}"), lambda: artifacts.rollback("parts")):
                move()
                time.sleep(2.5)  # a service that is not pinned has taken it up by then
                assert server.detect(normal)["version"] == fitted.second
            assert artifacts.production("parts") == fitted.first
        [line] = [one for one in server.http.get("/products").json()["products"] if one["product"] == "parts"]
        assert line["version"] == line["production"] == fitted.second
