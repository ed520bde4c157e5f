from __future__ import annotations

import io
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ood_runners.errors import DataError, PictureError, TooLarge
from ood_runners.images import SUFFIXES, Limits, decode, decode_at, encode_jpeg, encode_png, read, resize
from tests.by_hand import chunk, png, tiff


def colours(height: int = 12, width: int = 20) -> np.ndarray:
    """A picture whose every corner and channel differs."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 12, y * 20, (x + y) * 7], axis=2).astype(np.uint8)


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_keep_every_pixel(kind: str, options: dict[str, object]) -> None:
    picture = decode(save(Image.fromarray(colours()), kind, **options))
    assert picture.dtype == np.uint8
    assert picture.flags.writeable
    np.testing.assert_array_equal(picture, colours())


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {"quality": 95})]
)
def test_lossy_formats_stay_close(kind: str, options: dict[str, object]) -> None:
    smooth = resize(colours(), (96, 160))
    picture = decode(save(Image.fromarray(smooth), kind, **options))
    assert np.abs(picture.astype(int) - smooth).mean() < 4


def test_encoders_round_trip() -> None:
    np.testing.assert_array_equal(decode(encode_png(colours())), colours())
    smooth = resize(colours(), (96, 160))
    assert np.abs(decode(encode_jpeg(smooth, quality=95)).astype(int) - smooth).mean() < 3
    assert len(encode_jpeg(smooth, quality=30)) < len(encode_jpeg(smooth, quality=95))
    assert decode(encode_png(colours()[..., 0])).shape == (12, 20, 3)


def test_grey_and_one_bit_fill_all_channels() -> None:
    grey = colours()[..., 0]
    for kind in ("PNG", "TIFF", "BMP"):
        np.testing.assert_array_equal(decode(save(Image.fromarray(grey), kind)), np.repeat(grey[..., None], 3, 2))
    bits = Image.fromarray(grey > 100)
    for kind in ("PNG", "TIFF", "BMP"):
        expected = np.where(grey > 100, 255, 0)
        np.testing.assert_array_equal(decode(save(bits, kind))[..., 1], expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_is_divided_by_257(kind: str) -> None:
    deep = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    expected = np.rint(deep / 257).astype(np.uint8)
    np.testing.assert_array_equal(decode(save(Image.fromarray(deep), kind))[..., 2], expected)


def test_big_endian_16_bit_tiff_equals_little_endian() -> None:
    values = (0, 257, 40000, 65535)
    fields = [(256, 4, 1, 4), (257, 4, 1, 1), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 1)]
    fields += [(273, 4, 1, 8 + 2 + 12 * 7 + 4), (277, 3, 1, 1)]
    little = tiff(fields, struct.pack("<4H", *values))
    big = struct.pack(">2sHIH", b"MM", 42, 8, len(fields))
    for tag, kind, count, value in fields:
        big += struct.pack(">HHI", tag, kind, count) + struct.pack(*((">HH", value, 0) if kind == 3 else (">I", value)))
    big += bytes(4) + struct.pack(">4H", *values)
    np.testing.assert_array_equal(decode(little)[0, :, 0], [0, 1, 156, 255])
    np.testing.assert_array_equal(decode(big), decode(little))


def test_white_is_zero_in_16_bits_is_turned_round() -> None:
    fields = [(256, 4, 1, 2), (257, 4, 1, 1), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 0)]
    fields += [(273, 4, 1, 8 + 2 + 12 * 7 + 4), (277, 3, 1, 1)]
    np.testing.assert_array_equal(decode(tiff(fields, struct.pack("<2H", 0, 65535)))[0, :, 0], [255, 0])


def test_12_bit_tiff_uses_its_own_full_scale() -> None:
    fields = [(256, 4, 1, 2), (257, 4, 1, 1), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1)]
    fields += [(273, 4, 1, 8 + 2 + 12 * 7 + 4), (277, 3, 1, 1)]
    np.testing.assert_array_equal(decode(tiff(fields, bytes([0xFF, 0xF8, 0x00])))[0, :, 0], [255, 128])


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_tiff_is_refused_with_a_reason(dtype: type) -> None:
    with pytest.raises(PictureError, match="unknown range"):
        decode(save(Image.fromarray(colours()[..., 0].astype(dtype)), "TIFF"))


def test_transparency_lies_on_white() -> None:
    alpha = np.full((12, 20, 1), 255, np.uint8)
    alpha[0], alpha[1] = 0, 128
    for kind in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        picture = decode(save(Image.fromarray(np.concatenate([colours(), alpha], 2)), kind, **options))
        assert (picture[0] == 255).all()
        blend = (colours()[1] * 128.0 + 255 * 127) / 255
        assert np.abs(picture[1] - blend).max() <= 1.5
        np.testing.assert_array_equal(picture[2:], colours()[2:])
    grey = Image.merge("LA", [Image.fromarray(colours()[..., 0]), Image.fromarray(alpha[..., 0])])
    picture = decode(save(grey, "PNG"))
    assert (picture[0] == 255).all()
    np.testing.assert_array_equal(picture[2:, :, 1], colours()[2:, :, 0])


def test_palette_with_and_without_transparency() -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0])
    palette.putdata([0, 1, 2])
    np.testing.assert_array_equal(decode(save(palette, "PNG"))[0], [[10, 20, 30], [200, 100, 50], [0, 0, 0]])
    clear = decode(save(palette, "PNG", transparency=1))
    np.testing.assert_array_equal(clear[0], [[10, 20, 30], [255, 255, 255], [0, 0, 0]])


def test_transparent_colour_of_an_rgb_png() -> None:
    picture = decode(save(Image.fromarray(colours()), "PNG", transparency=tuple(int(v) for v in colours()[3, 4])))
    assert (picture[3, 4] == 255).all()
    np.testing.assert_array_equal(picture[5], colours()[5])


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    inks = np.zeros((16, 32, 4), np.uint8)
    inks[:, :16, 0], inks[:, 16:, 3] = 255, 255  # cyan, then black
    picture = decode(save(Image.fromarray(inks, "CMYK"), kind)).astype(int)
    assert np.abs(picture[8, 4] - [0, 255, 255]).max() < 8
    assert np.abs(picture[8, 28]).max() < 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    upright = resize(colours(), (48, 80))
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"TIFF": {"compression": "tiff_lzw"}, "WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
    picture = decode(save(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options))
    assert picture.shape == upright.shape
    assert np.abs(picture.astype(int) - upright).mean() < (4 if kind == "JPEG" else 0.5)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_spoil_a_sound_picture() -> None:
    whole = save(Image.fromarray(colours()), "JPEG")
    junk = b"\xff\xe1" + struct.pack(">H", 2 + 6 + 40) + b"Exif\0\0" + b"II*\0\xff\xff\xff\xff" + bytes(32)
    np.testing.assert_array_equal(decode(whole[:2] + junk + whole[2:]), decode(whole))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_first_frame_of_several(kind: str) -> None:
    first, second = Image.fromarray(colours()), Image.new("RGB", (20, 12), "red")
    options = {"lossless": True} if kind == "WEBP" else {}
    data = save(first, kind, save_all=True, append_images=[second], **options)
    np.testing.assert_array_equal(decode(data), colours())


def test_first_picture_of_a_multi_picture_jpeg() -> None:
    smooth = resize(colours(), (96, 160))
    data = save(Image.fromarray(smooth), "MPO", save_all=True, append_images=[Image.new("RGB", (160, 96), "red")])
    assert np.abs(decode(data).astype(int) - smooth).mean() < 4


@pytest.mark.parametrize(
    "data", [b"hello, this is text", b"GIF89a" + bytes(50), b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0" * 100]
)
def test_other_bytes_are_no_picture(data: bytes) -> None:
    with pytest.raises(PictureError, match=r"JPEG, PNG, BMP, TIFF or WebP"):
        decode(data)


@pytest.mark.parametrize("kind", ["GIF", "ICO", "PPM", "TGA"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(PictureError):
        decode(save(Image.fromarray(colours()), kind))


def test_empty_bytes() -> None:
    with pytest.raises(PictureError, match="empty"):
        decode(b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.95])
def test_truncated_files_are_refused(kind: str, kept: float) -> None:
    rng = np.random.default_rng(0)
    data = save(Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)), kind)
    with pytest.raises(PictureError):
        decode(data[: int(kept * len(data))])


def test_a_vast_png_header_is_refused_before_decoding() -> None:
    header = png(30_000, 30_000, rows=b"")[:60]
    with pytest.raises(TooLarge):
        decode(header)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width", [8_000, 12_000, 20_000, 2**31 - 1])
def test_pixels_are_counted_from_the_header(width: int) -> None:
    with pytest.raises(TooLarge, match="50,000,000"):
        decode(png(width, 8_000, rows=b""))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_limits_hold_for_each_format(kind: str) -> None:
    data = save(Image.fromarray(colours()), kind)
    with pytest.raises(TooLarge, match=r"20 x 12 pixels; at most 239 "):
        decode(data, Limits(max_pixels=239))
    with pytest.raises(TooLarge, match="bytes"):
        decode(data, Limits(max_bytes=len(data) - 1))
    assert decode(data, Limits(max_bytes=len(data), max_pixels=240)).shape == (12, 20, 3)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_compressed_metadata_bombs_are_not_unpacked(kind: bytes) -> None:
    bomb = chunk(kind, b"k\0\0" + zlib.compress(bytes(40_000_000)))
    with pytest.raises(PictureError):
        decode(png(8, 8, bomb))


def test_read_names_the_path(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(encode_png(colours()))
    bad.write_bytes(b"text")
    np.testing.assert_array_equal(read(good), colours())
    with pytest.raises(PictureError, match=r"bad\.png"):
        read(bad)
    with pytest.raises(TooLarge, match=r"good\.png"):
        read(good, Limits(max_bytes=10))
    with pytest.raises(DataError, match=r"no file .*missing\.png"):
        read(tmp_path / "missing.png")
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read(Path("nul\0byte.png"))


def test_read_does_not_wait_on_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="not a regular file"):
        read(tmp_path / "pipe.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_read_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "locked.png"
    path.write_bytes(encode_png(colours()))
    path.chmod(0)
    with pytest.raises(DataError, match="permissions"):
        read(path)


def test_suffixes_are_lower_case_endings() -> None:
    assert {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"} <= SUFFIXES
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in SUFFIXES)


def test_resize_antialiases() -> None:
    board = np.indices((896, 896)).sum(0) % 2 * 255
    small = resize(np.repeat(board[..., None], 3, 2).astype(np.uint8), (224, 224))
    assert small.shape == (224, 224, 3)
    assert np.abs(small.astype(int) - 127.5).max() <= 2  # point sampling would give 0 or 255


def test_resize_of_one_axis_only_antialiases_that_axis() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), 500)[None, :, None].repeat(50, 0).repeat(3, 2)
    assert np.abs(resize(stripes, (224, 224)).astype(int) - 127.5).max() < 40
    assert resize(stripes, (224, 224)).astype(float).std() < 12


def test_resize_keeps_means_and_places() -> None:
    picture = colours(300, 700)
    small = resize(picture, (224, 320)).astype(float)
    assert np.abs(small.mean((0, 1)) - picture.mean((0, 1))).max() < 1
    spot = np.zeros((400, 400, 3), np.uint8)
    spot[300:320, 100:120] = 255
    rows, columns = np.nonzero(resize(spot, (200, 200))[..., 0] > 128)
    assert abs(rows.mean() - 154.5) < 0.6
    assert abs(columns.mean() - 54.5) < 0.6


def test_small_pictures_are_interpolated() -> None:
    one = np.full((1, 1, 3), (10, 20, 30), np.uint8)
    np.testing.assert_array_equal(resize(one, (224, 224)), np.broadcast_to(one, (224, 224, 3)))
    ramp = np.array([[0, 200]], np.uint8)[..., None].repeat(3, 2)
    large = resize(ramp, (8, 64))[0, :, 0].astype(int)
    assert (np.diff(large) >= 0).all()
    assert len(np.unique(large)) > 20


def test_resize_to_its_own_size_changes_nothing() -> None:
    np.testing.assert_array_equal(resize(colours(), (12, 20)), colours())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "I;16"])
@pytest.mark.parametrize("size", [(20, 16), (6, 7), (60, 50)])
def test_decoding_at_a_size_is_decoding_and_resizing(kind: str, mode: str, size: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8)
    image = Image.fromarray(picture[..., 0].astype(np.uint16) * 250) if mode == "I;16" else Image.fromarray(picture)
    if (mode, kind) in {("RGBA", "JPEG"), ("I;16", "JPEG"), ("I;16", "WEBP")}:
        pytest.skip("there is no such file")
    image = image if mode == "I;16" else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    data = save(image, kind, exif=exif)
    small, own = decode_at(data, size)
    assert own == decode(data).shape[:2] and own in ((50, 60), (60, 50)) and small.flags.writeable
    np.testing.assert_array_equal(small, resize(decode(data), size))


def test_resize_is_the_same_from_many_threads() -> None:
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 255, (300 + 37 * i, 500 - 21 * i, 3), dtype=np.uint8) for i in range(12)]
    alone = [resize(p, (224, 224)) for p in pictures]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda p: resize(p, (224, 224)), pictures * 4))
    for i, result in enumerate(together):
        np.testing.assert_array_equal(result, alone[i % 12])
