"""A product that looks at brightness: light breaks its alpha, a shift does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ood_runners.errors import DataError
from ood_runners.training import report
from ood_runners.training.changes import CHANGES
from ood_runners.training.evaluate import evaluate
from ood_runners.training.robustness import Robustness, read_some, robustness
from tests.training.brightness import SIZE, BrightnessProduct, Dataset, PictureFile, picture
from tests.training.conftest import Save


@pytest.fixture(scope="module")
def found(product: BrightnessProduct, inspection: Dataset) -> Robustness:
    return robustness(product, inspection, alpha=0.05)


def test_what_breaks_alpha_and_what_does_not(found: Robustness) -> None:
    assert found.pictures == 20  # normal ones; the broken file is passed over
    assert not found.known
    assert len(found.changed) == sum(len(change.strengths) for change in CHANGES)
    rows = found.by_change()
    darker = rows["darker"]
    assert [one.strength for one in darker] == [5, 10, 20]
    # 20 % of a light of 100 is ten times as far off as normal pictures are from each other.
    assert darker[2].false_alarms.count == 20 and darker[2].breaks(0.05)
    assert darker[2].detectors["light"] == 1.0 > darker[2].detectors["spots"]
    assert darker[2].score > darker[1].score > found.unchanged.score
    assert not found.unchanged.breaks(0.05)
    assert not any(one.breaks(0.05) for one in rows["shift"])


def test_the_advice_names_the_first_change_that_breaks_alpha(found: Robustness) -> None:
    broken = {name: [i for i, one in enumerate(row) if one.breaks(0.05)] for name, row in found.by_change().items()}
    mildest = min(steps[0] for steps in broken.values() if steps)
    advice = found.advice()
    named = [one for one in found.changed if f"alpha (5 %) is {one.label}, with" in advice]
    assert len(named) == 1 and found.by_change()[named[0].change].index(named[0]) == mildest
    assert "It holds up to" in advice and "shift of 4 %" in advice.split("It holds up to")[1]

    calm = replace(found, changed=[replace(one, false_alarms=found.unchanged.false_alarms) for one in found.changed])
    assert calm.advice().startswith("No change tried breaks alpha (5 %), up to brightness -20 %,")
    alarmed = replace(found, unchanged=found.by_change()["darker"][2])
    assert alarmed.advice().startswith("Even unchanged, 100 % of these pictures are flagged")


def test_terminal_json_and_page(found: Robustness, product: BrightnessProduct, inspection: Dataset) -> None:
    evaluation = replace(evaluate(product, inspection), robustness=found)
    lines = evaluation.lines()
    assert found.advice() in lines
    starred = [line for line in lines if " * " in line]
    assert len(starred) == sum(one.breaks(0.05) for one in found.changed)
    stored = json.loads(evaluation.to_json())["robustness"]
    assert stored["changes"][0]["change"] == "unchanged"
    assert [one["breaks_alpha"] for one in stored["changes"][1:]] == [one.breaks(0.05) for one in found.changed]
    page = report.render(evaluation, product)
    assert "Light and camera" in page and "brightness -20 %" in page
    assert "Light and camera" not in report.render(replace(evaluation, robustness=None), product)


def test_without_normal_test_pictures_it_says_that_the_product_may_know_them(
    product: BrightnessProduct, save: Save, tmp_path: Path
) -> None:
    train = [PictureFile(save(f"train/{i}.png", picture(i)), "good") for i in range(3)]
    found = robustness(product, Dataset(tmp_path, "folder", train), alpha=0.05, changes=CHANGES[:1])
    assert found.known and found.pictures == 3
    assert any("training pictures" in note for note in found.notes())


def test_no_readable_picture_is_one_sentence(product: BrightnessProduct, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(DataError, match="None of the 1 normal pictures"):
        robustness(product, Dataset(tmp_path, "folder", [PictureFile(tmp_path / "a.png", "good")]), alpha=0.05)


def test_reading_stops_at_the_most(inspection: Dataset) -> None:
    read = read_some(inspection.test, (SIZE, SIZE), 4)
    assert [file for file, _ in read] == inspection.test[:4]
    np.testing.assert_array_equal(read[3][1], picture(3))
