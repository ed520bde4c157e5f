from __future__ import annotations

import base64
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from ood_runners import images
from ood_runners.training import plots, report
from ood_runners.training.evaluate import evaluate
from ood_runners.training.evaluation import Row
from tests.training.brightness import Dataset, PictureFile, picture

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]


class Page(HTMLParser):
    """Every start tag with its attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def found(product, inspection):
    return evaluate(product, inspection)


@pytest.fixture(scope="module")
def page(found, product):
    return report.render(found, product)


def test_page_holds_what_was_found(page, found):
    text = re.sub(r"\s+", " ", Page(page).text)
    assert "washer" in text and "Version 20260102-030405-678abc" in text
    assert found.headline() in text and found.false_alarm_sentence() in text
    assert "No pixel AUROC, AUPRO for light: there is no anomaly map." in text
    for file in found.skipped:
        assert f"{file.path}: {file.reason}" in text
    assert "Defects found" in text and "Normal pictures passed" in text
    assert "Missed defects" not in text  # there are none


def test_page_needs_nothing_beside_itself(page):
    parsed = Page(page)
    for _, attributes in parsed.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/jpeg;base64,", "#")), value[:80]
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in parsed.tags}
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert re.search(r"default-src 'none'; img-src data:", page)
    assert len(page) < 5_000_000


def test_plots_take_the_colours_of_the_page_and_keep_their_ids_apart(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(page.split("<svg")) - 1 == 5  # three histograms, ROC, uniformity
    assert len(ids) == len(set(ids)) > 5
    assert all(target in ids for target in re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert "var(--normal)" in page and "var(--defect)" in page
    assert not re.search(r"#(0[1-8])\1\1\b", page)
    defined = set(re.findall(r"--([a-z0-9-]+):", page))
    assert set(re.findall(r"var\(--([a-z0-9-]+)\)", page)) <= defined


def test_names_from_the_disk_are_escaped(product, save, tmp_path):
    hostile = "<img src=x onerror=alert(1)>&.png"
    files = [PictureFile(save(f"test/good/{hostile}", picture(1)), "good")]
    files += [PictureFile(tmp_path / "data" / "test" / "<b>gone<b>.png", "good")]
    page = report.render(evaluate(product, Dataset(tmp_path / "data", "mvtec", [], files)), product)
    assert hostile not in page and "<b>gone" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;.png" in page


def test_normals_only_and_file_names_that_are_no_utf8(product, save, tmp_path):
    strange = tmp_path / "data" / "\udce9.png"
    save("a.png", picture(1)).rename(strange)
    found = evaluate(product, Dataset(tmp_path / "data", "folder", [PictureFile(strange, "good")]))
    report.write_report(found, tmp_path / "page.html", product)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Measures by detector" not in page and 'aria-label="ROC curves"' not in page
    assert "p-values of normal pictures" in page


def test_only_defects(product, inspection):
    only = replace(inspection, test=[file for file in inspection.test if file.label == "dark"])
    page = report.render(evaluate(product, only), product)
    assert "p-values of normal pictures" not in page.split("What the figures mean")[0]
    assert "there are no normal pictures" in page


def test_a_picture_that_has_gone_is_named_without_its_pixels(product, save, tmp_path):
    file = save("gone.png", picture(1))
    found = evaluate(product, Dataset(tmp_path / "data", "folder", [PictureFile(file, "good")]))
    file.unlink()
    assert report._example(found, found.rows[0], product) == report.Example(found.rows[0], None, None)
    page = report.render(found, product)
    assert "gone.png" in page and "can no longer be read" in page


def test_the_groups_are_right_and_in_order():
    def row(path, anomalous, verdict, score):
        return Row(path, "x", anomalous, verdict, 0.5, score, {})

    rows = [row(f"found{i}", True, "anomalous", i) for i in range(9)]
    rows += [row("missed2", True, "normal", 2), row("missed1", True, "normal", 1)]
    rows += [row("alarm5", False, "anomalous", 5), row("alarm7", False, "anomalous", 7)]
    rows += [row("passed3", False, "normal", 3), row("passed0", False, "normal", 0)]
    groups = {title: [r.path for r in chosen] for title, _, chosen in report.choose(rows, count=3)}
    assert list(groups.values()) == [
        ["missed1", "missed2"],
        ["alarm7", "alarm5"],
        ["found8", "found7", "found6"],
        ["passed0", "passed3"],
    ]


def test_thumbnails_keep_the_proportions_and_the_heat_map_shows_the_spot(product, save, tmp_path):
    wide = np.full((300, 900, 3), 100, np.uint8)
    wide[100:200, 600:800] = 255
    file = PictureFile(save("test/bright/wide.png", wide), "bright")
    found = evaluate(product, Dataset(tmp_path / "data", "mvtec", [], [file]))
    example = report._example(found, found.rows[0], product)
    sizes = [decoded(uri).shape for uri in (example.picture, example.heat)]
    assert sizes == [(85, 256, 3)] * 2
    heat = decoded(example.heat).astype(int)
    spot, rest = heat[43, 200], heat[43, 50]
    assert spot[0] - spot[2] > 40 > rest[0] - rest[2]  # red over the spot, blue beside it


def test_dividing_score():
    scores = np.array([1.0, 2.0, 4.0, 5.0])
    assert plots.dividing_score(scores, np.array([False, False, True, True])) == 3.0
    assert plots.dividing_score(scores, np.array([False, True, False, True])) is None
    assert plots.dividing_score(scores, np.zeros(4, bool)) is None
    assert plots.dividing_score(scores, np.ones(4, bool)) is None


def test_a_browser_shows_the_page_and_asks_for_nothing(found, product, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("No Chromium is on PATH, so the page was not opened in a browser.")
    path, shot = tmp_path / "page.html", tmp_path / "page.png"
    report.write_report(found, path, product)
    command = [chromium, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1180,1200"]
    command += ["--dump-dom", f"--screenshot={shot}", path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert found.headline() in shown.stdout
    # A browser mends what is badly nested; a page that is well formed keeps its elements.
    for tag in ("section", "svg", "table", "img", "figure"):
        assert shown.stdout.count(f"<{tag}") == path.read_text().count(f"<{tag}"), tag
    assert "Content Security Policy" not in shown.stderr  # what the page may not load, the console names

    pixels = images.read(shot)
    assert pixels.shape == (1200, 1180, 3)
    assert pixels.std() > 10  # not a blank page


def decoded(uri):
    return images.decode(base64.b64decode(uri.split(",", 1)[1]))
