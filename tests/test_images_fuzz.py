"""Hostile bytes: only our own errors come out, soon, and memory stays."""

from __future__ import annotations

import functools
import gc
import io
import random
import struct
import zlib

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ood_runners import image_guards
from ood_runners.errors import OODError, PictureError, TooLarge
from ood_runners.images import Limits, decode
from tests.by_hand import chunk, png, tiff

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]

# Small limits, so that a mutated header cannot ask for much: 4 million pixels are 12 MB of RGB.
LIMITS = Limits(max_bytes=4 * 2**20, max_pixels=4_000_000)


@functools.cache
def seeds() -> dict[str, bytes]:
    """A sound picture of each format and coding, with metadata to break."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (40, 56, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a description of some length", 72.0
    kinds = {
        "jpeg": (rgb, "JPEG", {"exif": exif, "comment": b"c" * 50}),
        "jpeg progressive": (rgb, "JPEG", {"progressive": True, "exif": exif}),
        "jpeg cmyk": (rgb.convert("CMYK"), "JPEG", {}),
        "mpo": (rgb, "MPO", {"save_all": True, "append_images": [rgb]}),
        "png": (rgb, "PNG", {"exif": exif}),
        "png 16": (Image.fromarray(rng.integers(0, 65535, (40, 56), dtype=np.uint16)), "PNG", {}),
        "png palette": (rgb.convert("P"), "PNG", {"transparency": 3}),
        "apng": (rgb, "PNG", {"save_all": True, "append_images": [rgb.rotate(90)]}),
        "bmp": (rgb, "BMP", {}),
        "bmp palette": (rgb.convert("P"), "BMP", {}),
        "tiff": (rgb, "TIFF", {"exif": exif}),
        "tiff lzw": (rgb, "TIFF", {"compression": "tiff_lzw"}),
        "tiff jpeg": (rgb, "TIFF", {"compression": "jpeg"}),
        "tiff deflate": (rgb.convert("RGBA"), "TIFF", {"compression": "tiff_adobe_deflate"}),
        "tiff big": (rgb, "TIFF", {"big_tiff": True}),
        "tiff pages": (rgb, "TIFF", {"save_all": True, "append_images": [rgb]}),
        "webp": (rgb, "WEBP", {"exif": exif}),
        "webp lossless": (rgb.convert("RGBA"), "WEBP", {"lossless": True}),
        "webp frames": (rgb, "WEBP", {"save_all": True, "append_images": [rgb.rotate(90)]}),
    }
    files = {}
    for name, (image, kind, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files[name] = buffer.getvalue()
    return files


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to eight edits: flipped bits, cuts, extreme lengths, repeated and spliced pieces; mostly near the header."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if not out:
            break
        at = rng.randrange(min(len(out), rng.choice([32, 200, len(out)])))
        match rng.randrange(7):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.choice([0, 1, 127, 128, 255])
            case 2:
                del out[rng.randrange(len(out)) :]
            case 3:
                extreme = rng.choice([0, 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 65_000])
                out[at : at + 4] = struct.pack(rng.choice("<>") + "I", extreme)
            case 4:
                out[at:at] = out[at : at + rng.randint(1, 64)] * rng.randint(1, 50)
            case 5:
                del out[at : at + rng.randint(1, 32)]
            case 6:
                out[at : at + 2] = struct.pack(rng.choice("<>") + "H", rng.choice([0, 1, 2, 65_535, 32_768, 40_000]))
    return bytes(out)


def decode_or_refuse(data: bytes, limits: Limits = LIMITS) -> bool:
    """Whether the bytes were a picture; any error but ours escapes and fails the test."""
    try:
        picture = decode(data, limits)
    except OODError as error:
        message = error.message
        assert message.endswith(".") and "\n" not in message and len(message) < 300
        return False
    assert picture.dtype == np.uint8
    assert picture.ndim == 3 and picture.shape[2] == 3
    assert picture.shape[0] * picture.shape[1] <= limits.max_pixels
    return True


@pytest.mark.parametrize("name", sorted(seeds()))
def test_every_seed_is_sound_and_every_cut_of_it_is_survived(name: str) -> None:
    data = seeds()[name]
    assert decode_or_refuse(data)
    for end in [*range(0, min(len(data), 120)), *range(120, len(data), max(1, len(data) // 30))]:
        decode_or_refuse(data[:end])


def test_memory_stays_over_a_thousand_hostile_files() -> None:
    rng = random.Random(7)
    files = list(seeds().values())
    process = psutil.Process()

    def round_of(count: int) -> int:
        return sum(decode_or_refuse(mutate(rng.choice(files), rng)) for _ in range(count))

    round_of(200)  # the allocator and the codecs' tables settle
    gc.collect()
    before = process.memory_info().rss
    decoded = round_of(1_000)
    gc.collect()
    growth = process.memory_info().rss - before
    assert 50 < decoded < 950  # the edits reach the decoders, and break much
    assert growth < 48 * 2**20


@settings(max_examples=150, deadline=5_000, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=400), st.sampled_from(sorted(seeds())), st.integers(0, 60))
def test_any_bytes_behind_any_start(tail: bytes, name: str, kept: int) -> None:
    decode_or_refuse(seeds()[name][:kept] + tail)


@settings(max_examples=100, deadline=5_000, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.sampled_from([256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 339]),
            st.integers(0, 14),
            st.sampled_from([0, 1, 2, 3, 70_000, 2**31, 2**32 - 1]),
            st.one_of(st.integers(0, 12), st.sampled_from([60, 65_535, 2**32 - 1])),
        ),
        max_size=16,
    )
)
def test_any_tiff_directory(tags: list[tuple[int, int, int, int]]) -> None:
    sound = [(256, 4, 1, 4), (257, 4, 1, 4), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    decode_or_refuse(tiff(tags, bytes(500)))
    decode_or_refuse(tiff(tags + sound, bytes(500)))


def test_endless_jpeg_headers_are_refused() -> None:
    whole = seeds()["jpeg"]
    for filler in (b"\xff" * 2_000_000, b"\0" * 2_000_000, b"\xff\xfe\0\x02" * 500_000, b"\xff\xe5\0\x02" * 500_000):
        with pytest.raises(PictureError, match="damaged"):
            decode(whole[:2] + filler + whole[2:])
    assert decode(whole[:2] + b"\xff" * 100 + b"\xff\xfe\0\x02" * 100 + whole[2:]).shape == decode(whole).shape


def test_a_jpeg_of_hundreds_of_scans_is_refused() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (3_000, 3_000)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    scan = data[data.rfind(b"\xff\xda") : -2]
    assert decode(data[:-2] + scan * 5 + data[-2:]).shape == (3_000, 3_000, 3)
    with pytest.raises(TooLarge, match="scans"):
        decode(data[:-2] + scan * 200 + data[-2:])


def test_endless_png_chunks_are_refused() -> None:
    assert decode(png(8, 8, chunk(b"abCd", b"") * 1_000)).shape == (8, 8, 3)
    with pytest.raises(PictureError, match="chunks"):
        decode(png(8, 8, chunk(b"abCd", b"") * (image_guards.MAX_PNG_CHUNKS + 1)))


def test_endless_tiff_strips_tags_and_tiles_are_refused() -> None:
    sound = [(256, 4, 1, 100), (257, 4, 1, 100), (258, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    strips = [*sound, (259, 3, 1, 1), (273, 4, 2_000_000, 8 + 2 + 12 * 8 + 4), (278, 4, 1, 1)]
    with pytest.raises(PictureError, match="2,000,000 strips"):
        decode(tiff(strips, bytes(8_000_000)))
    packed = zlib.compress(bytes(20_000 * 20_000 // 100))
    tiles = [*sound, (259, 3, 1, 8), (322, 4, 1, 20_000), (323, 4, 1, 20_000)]
    tiles += [(324, 4, 1, 8 + 2 + 12 * 10 + 4), (325, 4, 1, len(packed))]
    with pytest.raises(TooLarge, match="tiles"):
        decode(tiff(tiles, packed))
    with pytest.raises(PictureError, match="tags"):
        decode(tiff([(60_000, 3, 1, 1)] * 5_000))


@pytest.mark.parametrize(("mode", "compression"), [("RGB", "lzma"), ("1", "group4")])
def test_rare_tiff_compressions_are_refused_by_name(mode: str, compression: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (20, 20)).save(buffer, "TIFF", compression=compression)
    with pytest.raises(PictureError, match=compression):
        decode(buffer.getvalue())


def test_large_run_length_bitmaps_are_refused() -> None:
    def bitmap(width: int, height: int, body: bytes) -> bytes:
        header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 256)
        return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 40 + 1024) + header + bytes(1024) + body

    assert decode(bitmap(4, 2, b"\x04\x00\x00\x00\x04\x00\x00\x01")).shape == (2, 4, 3)
    with pytest.raises(TooLarge, match="run-length"):
        decode(bitmap(49_000_000, 1, b"\x01\x05\0\0"))
    with pytest.raises(TooLarge, match="run-length"):
        decode(bitmap(1_000, 1_000, b"\x01\x05" * 1_500_000))
