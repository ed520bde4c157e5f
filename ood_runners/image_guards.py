"""Checks on the container of a hostile picture that Pillow does not make for us.

Pillow walks the markers of a JPEG, the chunks of a PNG and the strips of a TIFF in Python, and runs a
run-length decoder for BMP in Python too. A file of a few megabytes, or of a few bytes, can keep these
busy for minutes. Each limit here is far above what cameras and encoders write and keeps one picture's
decoding to a few seconds at worst.
"""

from __future__ import annotations

import struct

from PIL import Image

from ood_runners.errors import PictureError, TooLarge

MAX_JPEG_SEGMENTS = 4_096
MAX_JPEG_STRAY_BYTES = 65_536
MAX_JPEG_HEADER_BYTES = 16 * 2**20
MAX_JPEG_WORK = 1_000_000_000  # pixels times scans; twenty scans of 50 million pixels
MAX_PNG_CHUNKS = 32_768
MAX_TIFF_TAGS = 4_096
MAX_TIFF_PIECES = 131_072
MAX_RUN_LENGTH_PIXELS = 4_000_000
MAX_RUN_LENGTH_BYTES = 2 * 2**20

# Algorithms of TIFF that cameras and editors write. Of the others, LZMA can ask for gigabytes, and the fax codes
# (black-and-white documents) print a line to stderr for each damaged row, millions for one hostile file.
TIFF_COMPRESSIONS = frozenset(
    {"raw", "tiff_raw_16", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "zstd", "jpeg", "tiff_jpeg"}
)
_PIECES = frozenset({273, 279, 324, 325})  # StripOffsets, StripByteCounts, TileOffsets, TileByteCounts
_TILE_WIDTH, _TILE_LENGTH = 322, 323


def check_container(data: bytes) -> None:
    """Refuse bytes whose container alone would keep the parser busy; other bytes pass unseen.

    Raises
    ------
    PictureError
        The file has more segments, chunks, tags or strips than any real picture.
    """
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data)
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        _check_tiff(data)


def check_work(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Refuse an opened, not yet decoded picture whose decoding would take far longer than its size says.

    Raises
    ------
    TooLarge
        Too many progressive scans, too large tiles or a large run-length coded BMP.
    PictureError
        A TIFF compression that is not read here.
    """
    pixels = image.width * image.height
    pieces = 1
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        compression = image.info.get("compression")
        if compression not in TIFF_COMPRESSIONS:
            raise PictureError(f"A TIFF compressed with {compression} is not read; save it with LZW or deflate.")
        pieces = max(1, len(tags.get(273, ()) or tags.get(324, ())))
        if _TILE_WIDTH in tags or _TILE_LENGTH in tags:
            padded = 1
            for side, tile in ((image.width, tags[_TILE_WIDTH]), (image.height, tags[_TILE_LENGTH])):
                padded *= -(-side // tile) * tile
            if padded > 2 * max_pixels:
                raise TooLarge(f"The TIFF picture's tiles hold {padded:,} pixels; at most {2 * max_pixels:,} are read.")
    run_length = image.format == "BMP" and image.info.get("compression") in (1, 2)
    if run_length and (pixels > MAX_RUN_LENGTH_PIXELS or len(data) > MAX_RUN_LENGTH_BYTES):
        raise TooLarge("The run-length coded BMP is too large to be read; save it uncompressed or as PNG.")
    if image.format in ("JPEG", "MPO") or image.info.get("compression") == "jpeg":
        # An entropy-coded FF is always followed by 00, so this counts the scans (and those of thumbnails).
        scans = data.count(b"\xff\xda")
        if scans * pixels > MAX_JPEG_WORK * pieces:
            raise TooLarge(f"The JPEG picture has {scans:,} scans of {pixels:,} pixels, more than any camera writes.")


def _check_jpeg(data: bytes) -> None:
    """Walk the segments up to the first scan, as the decoder will, but with an end."""
    at, stray = 2, 0
    for _ in range(MAX_JPEG_SEGMENTS):
        marker_at = data.find(b"\xff", at)
        if marker_at < 0:
            break
        stray += marker_at - at
        at = marker_at + 1
        while data[at : at + 1] == b"\xff":  # fill bytes before a marker
            at, stray = at + 1, stray + 1
            if stray > MAX_JPEG_STRAY_BYTES:
                break
        if stray > MAX_JPEG_STRAY_BYTES or at > MAX_JPEG_HEADER_BYTES:
            break
        if at + 3 > len(data):
            break
        marker = data[at]
        if marker == 0xDA:
            return
        if not (0xC0 <= marker <= 0xFE) or marker == 0xC8 or 0xD0 <= marker <= 0xD9 or 0xF0 <= marker <= 0xFD:
            break  # no such marker stands before a scan, and only the others have a length
        at += 1 + max(2, struct.unpack_from(">H", data, at + 1)[0])
    raise PictureError("The JPEG picture is damaged or cut short: no picture data follows its header.")


def _check_png(data: bytes) -> None:
    at, chunks = 8, 0
    while at + 8 <= len(data):
        chunks += 1
        if chunks > MAX_PNG_CHUNKS:
            raise PictureError(f"The PNG picture has more than {MAX_PNG_CHUNKS:,} chunks; save it with another tool.")
        at += 12 + int(struct.unpack_from(">I", data, at)[0])


def _check_tiff(data: bytes) -> None:
    """Bound the tags of the first directory: classic TIFF (42) and BigTIFF (43)."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2] == 43 or data[3] == 43
    try:
        at = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
        count = struct.unpack_from(order + ("Q" if big else "H"), data, at)[0]
        at += 8 if big else 2
        if count > MAX_TIFF_TAGS:
            raise PictureError(f"The TIFF picture has {count:,} tags; at most {MAX_TIFF_TAGS:,} are read.")
        for _ in range(count):
            tag, _, values = struct.unpack_from(order + ("HHQ" if big else "HHI"), data, at)
            if tag in _PIECES and values > MAX_TIFF_PIECES:
                raise PictureError(f"The TIFF has {values:,} strips or tiles; at most {MAX_TIFF_PIECES:,} are read.")
            at += 20 if big else 12
    except (struct.error, OverflowError) as error:
        raise PictureError("The TIFF picture is damaged or cut short: its directory cannot be read.") from error
