from __future__ import annotations

import pytest
from pydantic import ValidationError

from ood_runners import settings as module
from ood_runners.settings import Settings, runner_config


def test_pins_are_read() -> None:
    assert Settings(products="a:v1, b:v2,").pins == {"a": "v1", "b": "v2"}
    assert Settings().pins == {}


@pytest.mark.parametrize("products", ["a", "a:", ":v", "a:v1,a:v2"])
def test_pins_that_say_nothing_exact_are_refused(products: str) -> None:
    with pytest.raises(ValidationError, match="products"):
        Settings(products=products)


@pytest.mark.parametrize("wrong", [{"devcie": "cpu"}, {"device": "tpu"}, {"deadline_s": "-1"}, {"max_batch": "many"}])
def test_a_wrong_argument_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate(wrong)


@pytest.mark.parametrize(
    ("device", "present", "asks"), [("cpu", True, False), ("auto", False, False), ("auto", True, True)]
)
def test_a_gpu_is_asked_for_where_there_is_one(
    device: str, present: bool, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "settings", Settings.model_validate({"device": device}))
    monkeypatch.setattr(module, "has_gpu", lambda: present)
    assert ("resources" in runner_config(gpu=True)) is asks
    assert "resources" not in runner_config(gpu=False)


def test_a_dependencys_client_keeps_its_session() -> None:
    connection = runner_config(gpu=False)["runner_connection"]
    assert connection["max_requests"] > 10**9
    assert connection["max_age"] > 10**8


def test_urls_of_runners_are_read() -> None:
    urls = Settings(runner_urls="resnet50=http://gpu:3001/, vae=https://[::1]:3002").urls
    assert urls == {"resnet50": "http://gpu:3001", "vae": "https://[::1]:3002"}
    assert Settings().urls == {}


@pytest.mark.parametrize(
    "urls",
    ["http://a:1", "resnet=http://a:1", "vae=a:1", "vae=file:///a", "vae=http://a/b", "vae=http://a,vae=http://b"],
)
def test_urls_that_lead_nowhere_are_refused(urls: str) -> None:
    with pytest.raises(ValidationError, match="runner_urls"):
        Settings(runner_urls=urls)


def test_the_environment_sets_what_no_argument_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OOD_DEVICE", "cpu")
    monkeypatch.setenv("OOD_MAX_BATCH", "3")
    assert (Settings().device, Settings().max_batch, Settings(max_batch=5).max_batch) == ("cpu", 3, 5)
    monkeypatch.setenv("OOD_DEVICE", "tpu")
    with pytest.raises(ValidationError, match="device"):
        Settings()
