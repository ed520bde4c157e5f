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
