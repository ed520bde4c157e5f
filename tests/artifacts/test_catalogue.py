from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bentoml
import pytest
from bentoml import Tag

from ood_runners import artifacts
from ood_runners.artifacts import names, resolve
from ood_runners.errors import ArtifactError, BadParameter, NotFound

Fit = Callable[..., Tag]


def test_a_product_alone_is_the_version_in_production_never_the_latest(fit: Fit) -> None:
    first, second = fit(), fit(seed=1)
    with pytest.raises(NotFound, match=f"No version of 'bolts' is in production; promote one of: .*{second.version}"):
        resolve("bolts")
    artifacts.promote(first)
    assert bentoml.models.get("ood-bolts:latest").tag == second
    assert resolve("bolts") == first
    assert resolve("bolts", second.version) == resolve(f"bolts:{second.version}") == resolve(second) == second


def test_not_found_names_what_there_is(fit: Fit) -> None:
    tag = fit()
    fit("nuts")
    with pytest.raises(NotFound, match="no product 'screws'; the store has: bolts, nuts"):
        resolve("screws")
    for missing in ("latest", "v1", "../nuts", str(tag.version)[:-1]):
        with pytest.raises(NotFound, match=f"no version '{missing}' of 'bolts'; it has: {tag.version}"):
            resolve("bolts", missing)
    with pytest.raises(NotFound, match="no product 'screws'"):
        artifacts.list_versions("screws")
    with pytest.raises(BadParameter, match="no version name"):
        resolve("bolts:../nuts")


def test_a_production_version_that_is_gone_is_no_unknown_product(fit: Fit) -> None:
    first, second = fit(), fit(seed=1)
    artifacts.promote(second)
    bentoml.models.delete(second)
    with pytest.raises(ArtifactError, match=f"{second.version} .*in production but not in the store"):
        resolve("bolts")
    assert resolve(first) == first
    bentoml.models.delete(first)
    with pytest.raises(ArtifactError, match="not in the store"):
        resolve("bolts")


def test_listing(fit: Fit, backbone: Tag) -> None:
    first, second, nuts = fit(metrics={"image_auroc": 0.75}), fit(seed=1), fit("nuts")
    artifacts.promote(first)
    lines = artifacts.list_versions()
    assert [line.tag for line in lines] == [first, second, nuts]
    assert [line.in_production for line in lines] == [True, False, False]
    assert lines[0].metrics == {"image_auroc": 0.75}
    assert lines[0].alpha == 0.01 and lines[0].backbone == str(backbone) and lines[0].created is not None
    assert lines[0].size == sum(p.stat().st_size for p in names.folder_of(first).rglob("*") if p.is_file())
    assert [line.tag for line in artifacts.list_versions("nuts")] == [nuts]
    assert artifacts.products() == ["bolts", "nuts"]


def test_a_version_that_cannot_be_read_is_listed_as_such(fit: Fit) -> None:
    tag = fit()
    (names.folder_of(tag) / "manifest.json").write_text("{}")
    with bentoml.models.create("ood-foreign:v1"):
        pass
    foreign, bolts = sorted(artifacts.list_versions(), key=lambda line: line.product, reverse=True)
    assert bolts.problem is not None and "manifest.json" in bolts.problem and bolts.created is None
    assert foreign.problem is not None and "ood-foreign:v1" in foreign.problem


def test_delete(fit: Fit, bento_home: Path) -> None:
    first, second = fit(), fit(seed=1)
    artifacts.promote(first)
    with pytest.raises(BadParameter, match="is in production"):
        artifacts.delete_version(first)
    with pytest.raises(BadParameter, match="Name the version"):
        artifacts.delete_version("bolts")
    assert artifacts.delete_version(second) == second
    assert bentoml.models.get("ood-bolts:latest").tag == first
    with pytest.raises(NotFound):
        artifacts.delete_version(second)
    nuts = fit("nuts")
    artifacts.delete_version(nuts)
    assert artifacts.products() == ["bolts"] and not (bento_home / "models" / "ood-nuts").exists()
