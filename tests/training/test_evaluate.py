from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from ood_runners.errors import DataError
from ood_runners.training import metrics
from ood_runners.training.evaluate import NO_MAP, evaluate
from tests.training.brightness import SIZE, BrightnessProduct, Dataset, PictureFile, picture, raw_scores, spotted


class CountingProgress:
    def __init__(self):
        self.stages: list[tuple[str, int | None]] = []
        self.done = 0

    def stage(self, name, total=None):
        self.stages.append((name, total))
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def advance(self, n=1, note=""):
        self.done += n


def test_overall_and_by_defect(product, inspection):
    found = evaluate(product, inspection)
    assert found.product == "ood-washer:20260102-030405-678abc"
    assert list(found.overall) == ["fused", "spots", "light"]
    fused = found.overall["fused"]
    assert (fused.normals, fused.defects) == (20, 12)
    assert fused.image_auroc.value == 1.0
    assert fused.caught == 12
    assert fused.pixel_auroc.value > 0.97
    assert 0.8 < fused.aupro.value <= 1.0

    anomalous = [row.anomalous for row in found.rows]
    light = [row.detectors["light"][0] for row in found.rows]
    assert found.overall["light"].image_auroc.value == pytest.approx(roc_auc_score(anomalous, light))
    by_light = np.array([row.detectors["light"][1] for row in found.rows]) <= found.alpha
    assert found.overall["light"].caught == (by_light & anomalous).sum() > 0
    assert found.overall["light"].f1.value == pytest.approx(f1_score(anomalous, by_light))
    assert found.overall["light"].pixel_auroc == metrics.Metric(None, NO_MAP)
    assert found.overall["spots"].pixel_auroc.value == pytest.approx(fused.pixel_auroc.value, abs=0.05)

    assert list(found.by_defect) == ["bright", "dark"]
    assert [measured.normals for measured in found.by_defect.values()] == [20, 20]
    assert [measured.defects for measured in found.by_defect.values()] == [8, 4]
    assert "2 defective pictures left out of the pixel measures: no mask." in found.notes


def test_pixel_measures_equal_those_of_maps_and_masks_computed_at_once(product, save, tmp_path):
    files, maps, masks = [], [], []
    for label, first, contrast in (("good", 0, 0), ("faint", 100, 12), ("clear", 200, 25)):
        for seed in range(first, first + 6):
            pixels, mask = spotted(seed, contrast)
            file = save(f"test/{label}/{seed}.png", pixels)
            stored = None if label == "good" else save(f"ground_truth/{label}/{seed}_mask.png", mask)
            files.append(PictureFile(file, label, stored))
            maps.append(product.calibration.anomaly_map(raw_scores(pixels[None]), (SIZE, SIZE))[0])
            masks.append((mask > 0) & (label != "good"))
    found = evaluate(product, Dataset(tmp_path / "data", "mvtec", [], files), batch_size=4)

    def auroc(*rows):
        chosen = np.concatenate([np.arange(start, start + 6) for start in rows])
        return roc_auc_score(np.array(masks)[chosen].ravel(), np.array(maps)[chosen].ravel())

    assert found.overall["fused"].pixel_auroc.value == pytest.approx(auroc(0, 6, 12), abs=2e-4)
    assert found.by_defect["faint"].pixel_auroc.value == pytest.approx(auroc(0, 6), abs=2e-4)
    assert found.by_defect["clear"].pixel_auroc.value == pytest.approx(auroc(0, 12), abs=2e-4)
    # The pictures make a difference between these, and so do the normal ones' pixels.
    assert len({round(value, 3) for value in (auroc(0, 6, 12), auroc(0, 6), auroc(0, 12), auroc(6), auroc(12))}) == 5


def test_broken_files_are_skipped_and_listed(product, inspection):
    progress = CountingProgress()
    found = evaluate(product, inspection, progress=progress)
    assert [file.path for file in found.skipped] == ["test/good/empty.png", "test/bright/text.png"]
    assert found.skipped[0].reason == "The picture is empty (0 bytes)."
    assert len(found.rows) == 32
    assert progress.stages == [("evaluate", 34)] and progress.done == 34


def test_batches_do_not_change_the_outcome(inspection):
    ones, whole = BrightnessProduct(), BrightnessProduct()
    first, second = evaluate(ones, inspection, batch_size=1), evaluate(whole, inspection, batch_size=64)
    assert ones.batches == [1] * 32 and whole.batches == [32]
    assert first.rows == second.rows
    assert first.overall == second.overall and first.by_defect == second.by_defect


def test_alpha_is_passed_on_and_moves_verdicts_not_scores(product, inspection):
    strict, loose = evaluate(product, inspection), evaluate(product, inspection, alpha=0.5)
    assert (strict.alpha, loose.alpha) == (0.05, 0.5)
    assert loose.false_alarms.count > strict.false_alarms.count
    assert loose.false_alarms.count == sum(row.p_value <= 0.5 for row in loose.rows if not row.anomalous)
    assert loose.false_alarms.total == 20
    assert loose.overall["fused"].f1.value < strict.overall["fused"].f1.value
    assert [row.score for row in strict.rows] == [row.score for row in loose.rows]


def test_json_and_csv(product, inspection, tmp_path):
    found = evaluate(product, inspection)
    read = json.loads(found.to_json())
    assert read["overall"]["fused"]["image_auroc"] == 1.0
    assert read["overall"]["light"]["aupro"] is None
    assert read["overall"]["light"]["reasons"] == {"pixel_auroc": NO_MAP, "aupro": NO_MAP}
    assert read["false_alarms"]["total"] == 20
    assert read["pictures"][0]["detectors"]["spots"].keys() == {"score", "p_value"}

    found.write_scores(tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["path", "label", "verdict", "p_value", "score"]
    assert list(rows[0]) == [*columns, "spots_score", "spots_p_value", "light_score", "light_p_value"]
    assert len(rows) == 32
    assert rows[20]["path"] == "test/bright/00.png" and rows[20]["label"] == "bright"
    assert rows[20]["verdict"] == "anomalous"
    assert float(rows[20]["score"]) == found.rows[20].score
    assert float(rows[20]["light_p_value"]) == found.rows[20].detectors["light"][1]


def test_scores_that_are_not_finite_still_give_valid_json(product, inspection):
    found = evaluate(product, inspection)
    broken = replace(found, rows=[replace(found.rows[0], score=float("inf")), *found.rows[1:]])
    assert json.loads(broken.to_json())["pictures"][0]["score"] is None


def test_file_names_that_are_no_utf8_or_hold_commas(product, save, tmp_path):
    name = "a,b \udce9.png"
    save("c.png", picture(1)).rename(tmp_path / "data" / name)
    dataset = Dataset(tmp_path / "data", "folder", [PictureFile(tmp_path / "data" / name, "good")])
    found = evaluate(product, dataset)
    found.write_scores(tmp_path / "scores.csv")
    assert b'\n"a,b \xe9.png",good,' in (tmp_path / "scores.csv").read_bytes().replace(b"\r", b"")
    assert json.loads(found.to_json())["pictures"][0]["path"] == name


def test_plain_folder_counts_as_normal(product, save, tmp_path):
    files = [PictureFile(save(f"{i}.png", picture(i)), "good") for i in range(10)]
    found = evaluate(product, Dataset(tmp_path / "data", "folder", files))
    assert found.false_alarms.total == 10
    assert found.overall["fused"].image_auroc == metrics.Metric(None, metrics.NO_DEFECTS)
    assert found.overall["fused"].aupro == metrics.Metric(None, metrics.NO_MASKS)
    assert found.by_defect == {} and found.accuracy is None
    assert any("training pictures" in note for note in found.notes)
    assert any("false-alarm rate" in line for line in found.lines())


def test_class_folders_give_accuracy_and_no_auroc(save, tmp_path):
    product = BrightnessProduct(classes=["dim", "lit"])
    files = [PictureFile(save(f"test/dim/{i}.png", picture(i, light=80)), "dim") for i in range(6)]
    files += [PictureFile(save(f"test/lit/{i}.png", picture(i, light=120)), "lit") for i in range(3)]
    files += [PictureFile(save("test/lit/x.png", picture(9, light=80)), "lit")]
    files += [PictureFile(save("test/other/y.png", picture(9)), "other")]  # a class the product was not fitted on
    found = evaluate(product, Dataset(tmp_path / "data", "classes", [], files, ["dim", "lit", "other"]))
    assert not any(row.anomalous for row in found.rows)
    assert (found.accuracy.count, found.accuracy.total) == (9, 10)
    assert found.rows[0].predicted == "dim"
    assert "90 % (9 of 10" in found.accuracy_sentence()
    assert found.by_defect == {}


def test_only_defects(product, inspection):
    only = replace(inspection, test=[file for file in inspection.test if file.label != "good"])
    found = evaluate(product, only)
    assert found.false_alarms.rate is None
    assert found.overall["fused"].image_auroc == metrics.Metric(None, metrics.NO_NORMALS)
    assert found.overall["fused"].caught == 12
    assert found.overall["fused"].pixel_auroc.value > 0.9  # the pixels around the marked ones are normal
    assert "not measured" in found.false_alarm_sentence()


def test_masks_that_cannot_be_used_leave_the_picture_to_the_image_measures(product, save, tmp_path):
    pixels, mask = spotted(7)
    thin = np.zeros((640, 640), np.uint8)
    thin[1, 1] = 255  # lost when brought to 64 x 64
    broken = save("ground_truth/bright/c.png", mask)
    broken.write_bytes(broken.read_bytes()[:40])
    files = [
        PictureFile(save("test/good/a.png", picture(1)), "good"),
        PictureFile(save("test/bright/a.png", pixels), "bright", save("ground_truth/bright/a.png", 0 * mask)),
        PictureFile(save("test/bright/b.png", pixels), "bright", save("ground_truth/bright/b.png", thin)),
        PictureFile(save("test/bright/c.png", pixels), "bright", broken),
    ]
    found = evaluate(product, Dataset(tmp_path / "data", "mvtec", [], files))
    assert found.overall["fused"].defects == 3 and found.overall["fused"].image_auroc.value == 1.0
    assert found.overall["fused"].aupro == metrics.Metric(None, metrics.NO_MASKS)
    assert [file.path for file in found.skipped] == ["ground_truth/bright/c.png"]
    assert any("2 defective pictures left out" in note and "marks no pixel" in note for note in found.notes)


def test_lossy_masks_are_cut_at_the_middle_and_others_at_zero(product, save, tmp_path):
    pixels, mask = spotted(7)
    aurocs = []
    for suffix, values in (("png", mask), ("png", (mask > 0).astype(np.uint8)), ("jpg", mask)):
        files = [
            PictureFile(save("test/good/a.png", picture(1)), "good"),
            PictureFile(save("test/bright/a.png", pixels), "bright", save(f"ground_truth/bright/a.{suffix}", values)),
        ]
        aurocs.append(evaluate(product, Dataset(tmp_path / "data", "mvtec", [], files)).overall["fused"].pixel_auroc)
    assert aurocs[0].value is not None
    assert aurocs[0] == aurocs[1] == aurocs[2]


def test_nothing_readable_is_one_sentence(product, inspection):
    broken = replace(inspection, test=inspection.test[-2:])
    with pytest.raises(DataError, match="None of the 2 pictures"):
        evaluate(product, broken)


def test_sentences(product, inspection):
    found = evaluate(product, inspection)
    assert found.headline().startswith("12 of 12 defective pictures found, ")
    fine = replace(found, alpha=0.05, false_alarms=metrics.Proportion.of(1, 40))
    assert "2.5 % (1 of 40" in fine.false_alarm_sentence() and "within" in fine.false_alarm_sentence()
    chance = replace(fine, false_alarms=metrics.Proportion.of(3, 40))
    assert "chance alone" in chance.false_alarm_sentence()
    high = replace(fine, false_alarms=metrics.Proportion.of(12, 40))
    assert "more than the 5 % that alpha promises" in high.false_alarm_sentence()
    table = [line for line in found.lines() if line.startswith(("fused", "spots", "light"))]
    assert len(table) == 5 and len({len(line) for line in table}) == 1
