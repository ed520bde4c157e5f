"""Versions that change below a server under load, and damaged ones that it does not take."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from ood_runners import artifacts, images
from ood_runners.artifacts.verify import manifest_sum
from ood_runners.pipeline import Product
from tests.end_to_end.traffic import Answer, clients_of, paced, send

SWITCHES = 10
A_SECOND = 20  # requests


@contextmanager
def store_of(home: Path) -> Iterator[None]:
    """This process works on the store in `home` within the block."""
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml._internal.models import ModelStore

    with (
        BentoMLContainer.bentoml_home.patch(str(home)),
        BentoMLContainer.model_store.patch(ModelStore(str(home / "models"))),
    ):
        yield


def scores_here(name: str, version: str, pictures: Sequence[bytes]) -> list[float]:
    """The fused score of each picture by a version of a product, computed in this process."""
    product = Product.open(artifacts.read_version(name, version), device="cpu", threads=1)
    resized = [images.resize(images.decode(data), product.input_size) for data in pictures]
    return [judgement.score for judgement in product.judge(np.stack(resized))]


@pytest.mark.slow
def test_ten_switches_under_constant_load_drop_and_mix_nothing(server: Any, fitted: Any, many: list[bytes]) -> None:
    taken_up: list[float] = []

    async def is_answering(http: aiohttp.ClientSession, version: str) -> bool:
        return bool((await send(http, many, 0, "plain")).body["version"] == version)

    async def switch() -> tuple[list[Answer], float]:
        done, began = asyncio.Event(), time.monotonic()
        running = asyncio.create_task(paced(server.url, many, A_SECOND, done, "plain"))
        async with clients_of(server.url) as http:
            for turn in range(SWITCHES):
                if turn % 2 == 0:
                    change = await asyncio.to_thread(artifacts.promote, f"plain:{fitted.mapped}")
                else:
                    change = await asyncio.to_thread(artifacts.rollback, "plain")
                start = time.monotonic()
                while not await is_answering(http, change.to):
                    assert time.monotonic() < start + 5, f"{change.to} was not taken up within 5 s"
                    await asyncio.sleep(0.05)
                taken_up.append(time.monotonic() - start)
                await asyncio.sleep(0.5)
        done.set()
        return await running, time.monotonic() - began

    with store_of(fitted.home):
        expected = {version: scores_here("plain", version, many) for version in (fitted.plain, fitted.mapped)}
        try:
            answers, took = asyncio.run(switch())
        finally:
            if artifacts.production("plain") != fitted.plain:
                artifacts.promote(f"plain:{fitted.plain}")
    slowest = max(answer.seconds for answer in answers)
    a_second = len(answers) / took
    print(f"{len(answers)} at {a_second:.1f}/s; taken up within {max(taken_up):.2f} s; slowest {slowest:.2f} s")
    assert Counter(answer.status for answer in answers) == {200: len(answers)}
    assert a_second > 0.95 * A_SECOND
    by_version = Counter(answer.body["version"] for answer in answers)
    assert by_version.keys() == expected.keys()
    assert min(by_version.values()) > len(answers) / 10
    for answer in answers:
        assert answer.body["score"] == pytest.approx(expected[answer.body["version"]][answer.picture], rel=1e-3)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def from_the_future(manifest: Path) -> None:
    """As a later release would write it: sound in itself."""
    text = json.dumps(json.loads(manifest.read_text()) | {"schema_version": 99}).encode()
    manifest.write_bytes(text)
    manifest.with_name(manifest.name + ".sha256").write_text(manifest_sum(text))


@pytest.mark.slow
def test_no_damaged_version_is_taken_up(serve: Any, fitted: Any, tmp_path: Path, normal: bytes) -> None:
    home = tmp_path / "home"
    shutil.copytree(fitted.home, home)
    sound = home / "models" / "ood-parts" / fitted.second
    record = home / "ood-production" / "parts.json"
    before = record.read_text()
    damages: dict[str, tuple[str, Callable[[Path], None]]] = {
        f"flipped {file.name}": (file.name, flip) for file in sorted(sound.iterdir())
    }
    damages |= {f"without {name}": (name, Path.unlink) for name in ("memory_bank.safetensors", "manifest.json")}
    damages["schema 99"] = ("manifest.json", from_the_future)
    kept = sound.rename(tmp_path / "kept")
    with serve(home) as server:

        def parts() -> dict[str, Any]:
            [line] = [one for one in server.http.get("/products").json()["products"] if one["product"] == "parts"]
            return dict(line)

        def name_in_record(version: str) -> None:
            # `promote` would refuse it: here it is damaged after it had been promoted.
            (record.parent / "new").write_text(
                before.replace(f'"production": "{fitted.first}"', f'"production": "{version}"')
            )
            (record.parent / "new").rename(record)

        for label, (name, damage) in damages.items():
            shutil.copytree(kept, sound)
            damage(sound / name)
            name_in_record(fitted.second)
            server.wait_for(lambda: parts()["refused"], 10)
            line = parts()
            assert fitted.second in line["refused"], label
            reason = "99" if label == "schema 99" else name.removesuffix(".sha256")
            assert reason in line["refused"], (label, line["refused"])
            assert line["version"] == fitted.first
            assert server.detect(normal, product="parts")["version"] == fitted.first
            shutil.rmtree(sound)
            name_in_record(fitted.first)
            server.wait_for(lambda: parts()["refused"] is None, 10)
        # Nor a sound one on a damaged backbone.
        shutil.copytree(kept, sound)
        [backbone] = (home / "models").glob("ood-backbone-*/[0-9a-f]*")
        for file in sorted(backbone.iterdir()):
            whole = file.read_bytes()
            flip(file)
            name_in_record(fitted.second)
            server.wait_for(lambda: parts()["refused"], 10)
            line = parts()
            assert backbone.parent.name in line["refused"], line["refused"]
            assert file.name.removesuffix(".sha256") in line["refused"], (file.name, line["refused"])
            assert line["version"] == fitted.first
            assert server.detect(normal, product="parts")["version"] == fitted.first
            file.write_bytes(whole)
            name_in_record(fitted.first)
            server.wait_for(lambda: parts()["refused"] is None, 10)
        # The sound one on a sound backbone is.
        name_in_record(fitted.second)
        server.wait_for(lambda: parts()["version"] == fitted.second, 5)
