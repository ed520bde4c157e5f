"""Several networks and picture sizes in one version: fitted, stored, carried, served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ood_runners import images
from ood_runners.artifacts import export_version, import_version, read_version
from ood_runners.artifacts.store import read_part
from ood_runners.errors import ArtifactError, BadParameter
from ood_runners.gateway.local import fused_graph
from ood_runners.gateway.served import load
from ood_runners.gateway.timing import Timing
from ood_runners.pins import pinned_models
from ood_runners.pipeline import Product
from ood_runners.settings import Settings
from ood_runners.sizes import parse_size, size_name
from ood_runners.training.fit import FitResult, fit
from ood_runners.training.members import Also, check_also
from tests.conftest import store_at

LITE = "efficientnet_lite0"
MEMBER = f"{LITE}-64"
SCORES = ["memory_bank", "mahalanobis", f"memory_bank@{MEMBER}", f"mahalanobis@{MEMBER}"]


def picture(seed: int, *, spot: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn = np.full((120, 120, 3), 110, np.float64) + rng.normal(scale=12, size=(120, 120, 1))
    drawn[:, 20 + seed % 5 :: 10] += 40
    if spot:
        drawn[50:68, 70:88] = (210, 40, 30)
    return drawn.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module", autouse=True)
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FitResult]:
    """A version of two members, in a store that the tests here share."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(20):
        (folder / f"{seed:02}.png").write_bytes(images.encode_png(picture(seed)))
    with pytest.MonkeyPatch.context() as patch, store_at(tmp_path_factory.mktemp("members"), patch):
        yield fit(
            folder,
            product="both",
            backbone=LITE,
            size=(96, 96),
            detectors=["memory_bank", "mahalanobis"],
            alpha=0.05,
            bank_size=300,
            device="cpu",
            precision="float32",
            also=[f"{LITE}@64"],
        )


def pictures(*, size: tuple[int, int] = (96, 96)) -> np.ndarray:
    return np.stack([images.resize(one, size) for one in (picture(77), picture(78, spot=True))])


def test_all_members_have_a_say_and_the_spot_is_found(fitted: FitResult) -> None:
    manifest = fitted.manifest
    assert list(manifest.scorers) == SCORES == list(manifest.golden.scores)
    assert (manifest.input.height, manifest.members[MEMBER].input.height) == (96, 64)
    stored = read_version("both")
    assert f"members/{MEMBER}/memory_bank.safetensors" in stored.manifest.files
    product = Product.open(stored)
    normal, odd = product.judge(pictures())
    assert (normal.verdict, odd.verdict) == ("normal", "anomalous")
    assert list(odd.detectors) == SCORES
    # The two networks of a kind share its weight, and each is cross-fitted on all pictures.
    weights = product.calibration.weights
    assert 0 < weights["memory_bank"] <= 0.5 and 0 < weights[f"memory_bank@{MEMBER}"] <= 0.5
    assert {one.n for one in product.calibration.calibrators.values()} == {manifest.calibration.n}
    top = np.unravel_index(product.anomaly_maps(product.raw_scores(pictures()), (120, 120))[1].argmax(), (120, 120))
    assert abs(top[0] - 59) < 20 and abs(top[1] - 79) < 20


def test_a_member_sees_the_versions_pictures_resized_once_more(fitted: FitResult) -> None:
    stored = read_version("both")
    product = Product.open(stored)
    smaller = pictures(size=(96, 96))
    smaller = np.stack([images.resize(one, (64, 64)) for one in smaller])
    alone = product.members[MEMBER].raw_scores(smaller)
    among = product.raw_scores(pictures())
    np.testing.assert_array_equal(alone["memory_bank"].image, among[f"memory_bank@{MEMBER}"].image)
    assert not np.array_equal(among["memory_bank"].image, among[f"memory_bank@{MEMBER}"].image)


def test_the_graph_gives_the_scores_of_every_member(fitted: FitResult) -> None:
    product, version = fitted.tag.removeprefix("ood-").split(":")
    served = load(product, version)
    assert [part.tag for part in served.parts] == [fitted.tag, f"{fitted.tag}#{MEMBER}"]
    expected = Product.open(read_version("both")).raw_scores(pictures())

    async def ask() -> list[object]:
        return list(
            await fused_graph(Settings(device="cpu")).scores(served, pictures(), time.monotonic() + 60, Timing())
        )

    outcomes = asyncio.run(ask())
    for row, outcome in enumerate(outcomes):
        assert set(outcome) == set(SCORES)  # type: ignore[call-overload]
        for name in SCORES:
            np.testing.assert_allclose(outcome[name].image[0], expected[name].image[row], rtol=1e-4)  # type: ignore[index]


def test_it_is_carried_whole_and_damage_to_a_member_is_found(
    fitted: FitResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = export_version(fitted.tag, tmp_path / "both.oodmodel")
    assert len(pinned_models({"both": fitted.tag.split(":")[1]})) == 2  # one backbone for both
    with store_at(tmp_path / "other", monkeypatch):
        import_version(file)
        product = Product.open(read_version(fitted.tag))
        assert list(product.raw_scores(pictures())) == SCORES
        bank = read_part(f"{fitted.tag}#{MEMBER}").path / "memory_bank.safetensors"
        bank.write_bytes(bank.read_bytes()[:-1] + b"!")
        with pytest.raises(ArtifactError, match=f"members/{MEMBER}/memory_bank.safetensors is damaged"):
            read_version(fitted.tag)


def test_a_member_that_is_not_there(fitted: FitResult) -> None:
    with pytest.raises(ArtifactError, match="has no member 'other-64'"):
        read_part(f"{fitted.tag}#other-64")


def test_what_is_asked_for_also() -> None:
    own = Also("resnet50", (320, 320), Path("own.safetensors"))
    names = ["memory_bank", "vae"]
    found = check_also(["resnet50@224", "resnet18", "resnet18@96x128=eighteen.pth"], own, names, has_budget=False)
    assert [one.name for one in found] == ["resnet50-224", "resnet18-320", "resnet18-96x128"]
    assert [one.weights for one in found] == [Path("own.safetensors"), None, Path("eighteen.pth")]
    for texts, message in (
        (["resnet50"], "is there already"),
        (["resnet18@224", "resnet18@224=file.pth"], "is there already"),
        (["resnet18@448"], "larger than the version's pictures of 320"),
        (["resnet19"], "resnet19"),
        (["resnet18@big"], "is no size"),
    ):
        with pytest.raises(BadParameter, match=message):
            check_also(texts, own, names, has_budget=False)
    with pytest.raises(BadParameter, match="ask for one of them"):
        check_also(["resnet18"], own, ["softmax", "vae"], has_budget=False)
    with pytest.raises(BadParameter, match="A budget"):
        check_also(["resnet18"], own, names, has_budget=True)


def test_sizes_are_read_as_they_are_written() -> None:
    for text in ("224", "96x128"):
        assert size_name(parse_size(text)) == text
    for text in ("", "x", "224x", "31", "64x16", "-64"):
        with pytest.raises(BadParameter):
            parse_size(text)
