from __future__ import annotations

from pathlib import Path

import pytest
from bentoml import Tag
from hypothesis import given
from hypothesis import strategies as st

from ood_runners.artifacts import names
from ood_runners.errors import BadParameter


@pytest.mark.parametrize("product", ["a", "7", "ball-screws", "line_2", "a" * names.MAX_PRODUCT])
def test_good_names_make_tags(product: str) -> None:
    assert str(names.product_tag(product, names.new_version())).startswith(f"ood-{product}:2")


@pytest.mark.parametrize(
    "product",
    [
        "",
        "Bolts",
        "-a",
        "a-",
        "a b",
        "a/b",
        "..",
        "ä",
        "a:b",
        "a\n",
        "ood-a",
        "backbone-x",
        "a" * (names.MAX_PRODUCT + 1),
    ],
)
def test_bad_names_are_refused_with_the_rule(product: str) -> None:
    with pytest.raises(BadParameter, match="is no product name"):
        names.check_product(product)


@given(st.text(alphabet="abz09-_.:/A", max_size=70))
def test_each_name_that_passes_is_one_that_bentoml_takes(product: str) -> None:
    try:
        names.check_product(product)
    except BadParameter:
        return
    assert Tag(names.PRODUCT_PREFIX + product).name == f"ood-{product}"


def test_parse() -> None:
    assert names.parse("bolts") == ("bolts", None)
    assert (
        names.parse("bolts:v1") == names.parse("ood-bolts:v1") == names.parse(Tag("ood-bolts", "v1")) == ("bolts", "v1")
    )
    for wrong in ("", ":", "bolts:a:b", "bolts:../x", "ood-backbone-resnet18:0123"):
        with pytest.raises(BadParameter):
            names.parse(wrong)


def test_versions_are_unique_and_follow_time() -> None:
    made = [names.new_version() for _ in range(300)]
    assert len(set(made)) == 300
    instants = [version[:19] for version in made]
    assert instants == sorted(instants)


def test_foreign_models_are_no_products(bento_home: Path) -> None:
    for name in ("resnet:v1", "ood-a.b:v1", "ood-backbone-resnet18:0123", "ood-bolts:v1"):
        (bento_home / "models" / name.replace(":", "/")).mkdir(parents=True)
    (bento_home / "models" / "ood-empty").mkdir()
    (bento_home / "models" / "ood-bolts" / "latest").write_text("v1")
    assert names.products() == ["bolts"]
    assert names.versions_in("ood-bolts") == ["v1"]
