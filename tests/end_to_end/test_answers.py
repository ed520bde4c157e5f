from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

BOX = (70, 80, 100, 100)  # of the defect


def overlap(box: list[int]) -> int:
    width = min(box[2], BOX[2]) - max(box[0], BOX[0])
    height = min(box[3], BOX[3]) - max(box[1], BOX[1])
    return max(0, width) * max(0, height)


def test_a_normal_and_a_defective_picture(server: Any, fitted: Any, normal: bytes, defective: bytes) -> None:
    good, bad = server.detect(normal, product="parts"), server.detect(defective, product="parts")
    assert (good["verdict"], bad["verdict"]) == ("normal", "anomalous")
    for answer in (good, bad):
        assert (answer["product"], answer["version"]) == ("parts", fitted.first)
        assert set(answer["detectors"]) == {"memory_bank", "mahalanobis", "vae", "softmax"}
        assert (answer["verdict"] == "anomalous") == (answer["p_value"] <= answer["alpha"])
        assert {"decode", "features", "vae", "memory_bank", "judge", "total"} <= set(answer["timing_ms"])
    assert bad["score"] > good["score"]
    assert bad["p_value"] < good["p_value"]
    strongest = bad["regions"][0]
    assert overlap(strongest["box"]) > 0.5 * 30 * 20
    assert strongest["p_value"] <= bad["alpha"]


def test_alpha_moves_the_verdict_and_not_the_p_value(server: Any, normal: bytes) -> None:
    own = server.detect(normal, product="parts")
    strict = server.detect(normal, product="parts", alpha=str(min(0.99, own["p_value"] + 0.01)))
    assert strict["p_value"] == own["p_value"]
    assert (own["verdict"], strict["verdict"]) == ("normal", "anomalous")


def test_heatmap_is_a_png_of_the_pictures_size(server: Any, fitted: Any, normal: bytes, defective: bytes) -> None:
    pictures = []
    for data in (normal, defective):
        answer = server.post("/heatmap", data, product="parts")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
        assert answer.headers["x-ood-version"] == fitted.first
        image = Image.open(io.BytesIO(answer.content))
        assert (image.format, image.size) == ("PNG", (160, 144))
        pictures.append(np.asarray(image.convert("RGB"), np.int16))
    assert answer.headers["x-ood-verdict"] == "anomalous"
    good, bad = ((picture[..., 0] - picture[..., 2])[80:100, 70:100].mean() for picture in pictures)
    assert bad > good + 30  # redder where the defect is


def test_anomaly_map_is_numbers(server: Any, normal: bytes, defective: bytes) -> None:
    maps = []
    for data in (normal, defective):
        answer = server.post("/anomaly_map", data, product="parts")
        assert answer.status_code == 200
        maps.append(np.load(io.BytesIO(answer.content), allow_pickle=False))
    assert maps[0].shape == maps[1].shape == (96, 96)
    assert maps[0].dtype == np.float32
    assert maps[1].max() > 1 > maps[0].mean()


def test_a_product_without_a_map(server: Any, normal: bytes) -> None:
    assert server.detect(normal, product="plain")["regions"] == []
    for path in ("/heatmap", "/anomaly_map"):
        answer = server.post(path, normal, product="plain")
        assert answer.status_code == 422
        assert "memory_bank" in answer.json()["error"]["message"]


def test_one_bad_picture_of_a_batch_fails_alone(server: Any, normal: bytes, defective: bytes) -> None:
    files = [normal, b"no picture", defective, b"", *[normal] * 17]
    answer = server.http.post(
        "/detect_batch", files=[("images", ("a.png", data)) for data in files], data={"product": "parts"}
    )
    assert answer.status_code == 200, answer.text
    answers = answer.json()
    assert [one.get("verdict") for one in answers] == ["normal", None, "anomalous", None, *["normal"] * 17]
    assert [answers[i]["error"]["code"] for i in (1, 3)] == ["not_a_picture", "not_a_picture"]
    alone = server.detect(defective, product="parts")
    assert answers[2]["score"] == pytest.approx(alone["score"], rel=1e-3)


def test_a_version_can_be_named(server: Any, fitted: Any, normal: bytes) -> None:
    answer = server.detect(normal, product="parts", version=fitted.second)
    assert answer["version"] == fitted.second
    assert set(answer["detectors"]) == {"memory_bank", "softmax"}
    assert "vae" not in answer["timing_ms"]


def test_products_are_listed(server: Any, fitted: Any) -> None:
    products = {one["product"]: one for one in server.http.get("/products").json()["products"]}
    assert set(products) == {"parts", "plain"}
    parts = products["parts"]
    assert parts["version"] == parts["production"] == fitted.first
    assert sorted(parts["versions"]) == sorted([fitted.first, fitted.second])
    assert parts["refused"] is None
    assert products["plain"]["detectors"] == ["mahalanobis"]


def png_header(width: int, height: int) -> bytes:
    """A small file that says that it is a large picture."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def form(image: bytes, **fields: str) -> dict[str, Any]:
    return {"files": {"image": ("picture.png", image)}, "data": {"product": "parts"} | fields}


@pytest.mark.parametrize("path", ["/detect", "/heatmap", "/anomaly_map"])
@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        pytest.param(form(b""), 415, "not_a_picture", id="empty"),
        pytest.param(form(b"This is not a picture."), 415, "not_a_picture", id="text"),
        pytest.param(form(png_header(30_000, 30_000)), 413, "too_large", id="bomb"),
        pytest.param(form(png_header(64, 64)), 415, "not_a_picture", id="cut short"),
        pytest.param({"data": {"image": "http://127.0.0.1:9/a.png", "product": "parts"}}, 400, "malformed", id="url"),
        pytest.param({"json": {"image": "http://127.0.0.1:9/a.png", "product": "parts"}}, 400, "malformed", id="json"),
        pytest.param({"content": b"http://127.0.0.1:9/a.png"}, 400, "malformed", id="no form"),
        pytest.param({"data": {"product": "parts"}}, 400, "malformed", id="no image"),
        pytest.param({"files": {"image": ("a.png", png_header(9, 9))}}, 400, "malformed", id="no product"),
        pytest.param(form(png_header(64, 64), product="nosuch"), 404, "not_found", id="unknown product"),
        pytest.param(form(png_header(64, 64), product="../../etc"), 404, "not_found", id="path as product"),
        pytest.param(form(png_header(64, 64), version="nosuch"), 404, "not_found", id="unknown version"),
        pytest.param(form(png_header(64, 64), alpha="2"), 422, "bad_parameter", id="alpha 2"),
        pytest.param(form(png_header(64, 64), alpha="much"), 422, "bad_parameter", id="alpha no number"),
        pytest.param(form(b"x" * (33 * 2**20)), 413, "too_large", id="large file"),
        pytest.param(form(b"x" * (140 * 2**20)), 413, "too_large", id="large body"),
    ],
)
def test_bad_requests(server: Any, path: str, request_: dict[str, Any], status: int, code: str) -> None:
    answer = server.http.post(path, **request_)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert answer.json()["error"]["message"].endswith(".")


def test_an_unknown_product_is_told_those_that_exist(server: Any, normal: bytes) -> None:
    message = server.post("/detect", normal, product="nosuch").json()["error"]["message"]
    assert "parts" in message
    assert "plain" in message


def test_too_many_pictures(server: Any) -> None:
    answer = server.http.post("/detect_batch", files=[("images", ("a", b"x"))] * 65, data={"product": "parts"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_pickle_is_not_read(server: Any) -> None:
    answer = server.http.post("/detect", content=b"x", headers={"content-type": "application/vnd.bentoml+pickle"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert server.http.post("/infer", content=b"x").status_code == 404


def test_the_openapi_page_shows_the_forms_and_calls_nobody(server: Any) -> None:
    page = server.http.get("/").text
    assert "swagger-ui-bundle.js" in page
    assert "http://" not in page
    assert "https://" not in page
    assert server.http.get("/static_content/swagger-ui-bundle.js").status_code == 200
    paths = server.http.get("/openapi.json").json()["paths"]
    assert {"/detect", "/detect_batch", "/heatmap", "/anomaly_map", "/products"} <= set(paths)
    assert "multipart/form-data" in paths["/detect"]["post"]["requestBody"]["content"]


def test_probes_and_metrics(server: Any) -> None:
    assert server.http.get("/livez").status_code == 200
    assert server.http.get("/readyz").status_code == 200
    assert 'endpoint="/detect"' in server.http.get("/metrics").text
