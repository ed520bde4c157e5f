from __future__ import annotations

import json

import numpy as np
import pytest
from bentoml import Tag
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ood_runners.artifacts.manifest import SCHEMA_VERSION, Manifest, check_file_name
from ood_runners.errors import ArtifactError
from tests.artifacts.samples import describe

BACKBONE = Tag("ood-backbone-resnet18", "0123456789ab")


def test_round_trip() -> None:
    manifest = describe("bolts", BACKBONE, files={"thumbnails/0.png": "0" * 64}, notes=["softmax is left out"])
    assert Manifest.from_json(manifest.to_json(), "x") == manifest
    assert manifest.created.tzinfo is not None


def test_numpy_values_in_free_dicts_become_json() -> None:
    metrics = {"auroc": np.float32(0.5), "counts": np.arange(3), "undefined": float("nan")}
    text = describe("bolts", BACKBONE, metrics=metrics).to_json()
    assert json.loads(text, parse_constant=pytest.fail)["metrics"] == {
        "auroc": 0.5,
        "counts": [0, 1, 2],
        "undefined": None,
    }


def test_a_later_schema_is_refused_with_both_versions_named() -> None:
    raw = describe("bolts", BACKBONE).model_dump(mode="json") | {"schema_version": 7, "invented_later": True}
    with pytest.raises(ArtifactError, match=f"ood-bolts:v1 .*schema version 7 .*up to {SCHEMA_VERSION}"):
        Manifest.from_json(json.dumps(raw), "ood-bolts:v1")


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"extra": 1}, "extra"),
        ({"schema_version": 0}, "schema_version"),
        ({"kind": "backbone"}, "kind"),
        ({"input": {"height": 224, "width": 0}}, "input.width"),
        ({"golden": {"scores": {}, "p_value": 2, "tolerance": 0}}, "golden.p_value"),
        ({"files": {"../../etc/passwd": "0" * 64}}, "files"),
        ({"files": {"bank": "short"}}, "files.bank"),
        ({"product": "Bolts"}, "product"),
        ({"created": "2026-01-01T00:00:00"}, "created"),
    ],
)
def test_what_is_not_valid_is_named(changes: dict[str, object], where: str) -> None:
    raw = describe("bolts", BACKBONE).model_dump(mode="json") | changes
    with pytest.raises(ArtifactError, match=f"not valid at {where}"):
        Manifest.from_json(json.dumps(raw), "ood-bolts:v1")


@pytest.mark.parametrize("text", ["", "[]", "null", '"x"', "{", '{"schema_version": "later"}'])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="ood-bolts:v1"):
        Manifest.from_json(text, "ood-bolts:v1")


def test_free_dicts_take_anything_and_the_rest_does_not() -> None:
    assert describe("bolts", BACKBONE, cost={"milliseconds": {"memory_bank": 7.5}}).cost["milliseconds"]
    with pytest.raises(ValidationError):
        describe("bolts", BACKBONE, data={"layout": "folder", "fingerprint": "f", "train_count": 9, "colour": "red"})


@pytest.mark.parametrize("name", ["", ".", "/a", "../a", "a/../b", "a//b", "./a", "a/", "a\\b", "a\nb", "a\0b"])
def test_file_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="'"):
        check_file_name(name)


@given(st.text(max_size=30))
def test_a_file_name_that_passes_stays_inside(name: str) -> None:
    try:
        check_file_name(name)
    except ValueError:
        return
    parts = name.split("/")
    assert all(part not in ("", ".", "..") for part in parts)
    assert not name.startswith("/")
