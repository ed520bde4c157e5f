from __future__ import annotations

import asyncio
import logging
import socket
import traceback
from pathlib import Path

import httpx
import pytest
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ood_runners.api import keys as keys_module
from ood_runners.api.keys import KeyGuard, Keys, listening_beyond_loopback, warn_if_open
from ood_runners.api.plain import PlainErrors
from ood_runners.errors import OODError

OLD, NEW, WRONG = "old-0123456789abcdef", "new-0123456789abcdef", "wrong-0123456789abcdef"


@pytest.fixture
def always_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "LOOK_S", -1.0)


def ask(keys: Keys, path: str = "/products", method: str = "GET", **headers: str) -> httpx.Response:
    async def view(request: Request) -> JSONResponse:
        return JSONResponse([name for name, _ in request.headers.items()])

    async def go() -> httpx.Response:
        routes = [Route(p, view) for p in ("/products", "/metrics", "/livez", "/readyz", "/static_content/a.js")]
        app = PlainErrors(KeyGuard(Starlette(routes=routes), keys))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
            return await http.request(
                method, path, headers={name.replace("_", "-"): value for name, value in headers.items()}
            )

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x_api_key": OLD}, 200),
        ({"authorization": f"Bearer {OLD}"}, 200),
        ({"authorization": f"bearer  {OLD}"}, 200),
        ({"authorization": "Basic dTpw", "x_api_key": OLD}, 200),
        ({}, 401),
        ({"x_api_key": ""}, 401),
        ({"x_api_key": WRONG}, 401),
        ({"x_api_key": OLD[:-1]}, 401),
        ({"x_api_key": OLD + "0"}, 401),
        ({"x_api_key": OLD.upper()}, 401),
        ({"authorization": OLD}, 401),
        ({"authorization": f"Basic {OLD}"}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"cookie": f"x-api-key={OLD}"}, 401),
    ],
)
def test_only_a_key_opens(headers: dict[str, str], status: int) -> None:
    answer = ask(Keys(OLD), **headers)
    assert answer.status_code == status
    if status == 401:
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.json()["error"]["code"] == "unauthorised"
    else:
        assert not {"x-api-key", "authorization"} & set(answer.json())  # nothing behind the guard can tell it on


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/livez", 200),
        ("/readyz", 200),
        ("/static_content/a.js", 200),
        ("/metrics", 401),
        ("/livez/", 401),
        ("/livez//", 401),
        ("/livez/../products", 401),
        ("/static_content", 401),
        ("/nowhere", 401),
    ],
)
def test_what_is_open(path: str, status: int) -> None:
    assert ask(Keys(OLD), path).status_code == status


def test_a_preflight_carries_no_key_and_gets_no_data() -> None:
    def status(**headers: str) -> int:
        return ask(Keys(OLD), "/products", "OPTIONS", **headers).status_code

    assert status(access_control_request_method="POST", origin="https://a.example") == 405
    assert status() == 401


def test_an_unknown_path_is_an_error_in_our_shape() -> None:
    answer = ask(Keys(OLD), "/nowhere", x_api_key=OLD)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_keys_are_rotated_without_a_gap(tmp_path: Path, always_look: None) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the line\n{OLD}\n\n")
    keys = Keys(file=file)
    accepted = []
    for text in (f"{OLD}\n{NEW}\n", f"{NEW}\n"):
        other = tmp_path / "other"
        other.write_text(text)
        other.replace(file)
        accepted.append((keys.accept(OLD.encode()), keys.accept(NEW.encode())))
    assert accepted == [(True, True), (False, True)]
    assert not keys.accept(b"# of the line")


def test_a_file_is_looked_at_once_a_second_at_most(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(OLD)
    keys = Keys(file=file)
    assert keys.accept(OLD.encode())
    file.write_text(NEW + "\n")
    assert not keys.accept(NEW.encode())


@pytest.mark.parametrize("damage", ["gone", "short", "binary"])
def test_a_damaged_file_leaves_the_keys_in_force(
    tmp_path: Path, always_look: None, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(OLD)
    keys = Keys(file=file)
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(b"hunter2" if damage == "short" else b"\xff\xfe\x00" * 9)
    with caplog.at_level(logging.ERROR):
        assert keys.accept(OLD.encode())
    assert "stay in force" in caplog.text
    assert "hunter2" not in caplog.text


def test_an_emptied_file_lets_nobody_in(tmp_path: Path, always_look: None) -> None:
    file = tmp_path / "keys"
    file.write_text(OLD)
    keys = Keys(file=file)
    file.write_text("")
    assert not keys.accept(OLD.encode())
    assert not keys.accept(b"")


def test_the_environment_names_them(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(NEW)
    assert Keys.from_environment({}) is None
    both = Keys.from_environment({"OOD_API_KEY": OLD, "OOD_API_KEY_FILE": str(file)})
    assert both is not None
    assert [both.accept(key.encode()) for key in (OLD, NEW, WRONG)] == [True, True, False]


@pytest.mark.parametrize(
    "environment",
    [
        {"OOD_API_KEY": ""},
        {"OOD_API_KEY": "hunter2"},
        {"OOD_API_KEY": "hunter2 with spaces in it"},
        {"OOD_API_KEY": "hunter2-and-\N{EURO SIGN}-and-more"},
        {"OOD_API_KEY_FILE": ""},
        {"OOD_API_KEY_FILE": "/no/such/file"},
    ],
)
def test_what_cannot_protect_is_refused_at_the_start(environment: dict[str, str]) -> None:
    with pytest.raises(OODError) as caught:
        Keys.from_environment(environment)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_key_shows_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    keys = Keys(OLD)
    with caplog.at_level(logging.DEBUG):
        for sent in (OLD, WRONG):
            ask(keys, x_api_key=sent)
    for key in (OLD, WRONG):
        assert key not in caplog.text
        assert key not in repr(vars(keys))
        assert key not in generate_latest().decode()


@pytest.mark.parametrize(("host", "beyond"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_listening_elsewhere_without_a_key_is_said(host: str, beyond: bool, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as listening:
        listening.bind((host, 0))
        listening.listen()
        address = f"{host}:{listening.getsockname()[1]}"
        assert (address in listening_beyond_loopback()) == beyond
        with caplog.at_level(logging.WARNING):
            warn_if_open(Keys(OLD))
            assert not caplog.text
            warn_if_open(None)
    assert (address in caplog.text) == beyond
