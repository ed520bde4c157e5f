"""Bytes to a checked uint8 RGB picture, and its one resize: the only preprocessing there is.

Building and serving both come through here, so that a picture looks the same to both.

What is read, and how it becomes RGB
------------------------------------
- JPEG (baseline and progressive), PNG, BMP, TIFF and WebP; of several frames or pages the first.
- The EXIF (or TIFF) orientation is applied.
- Grey of 8 bits and 1 bit is repeated over the three channels; grey of 16 bits is divided by 257 and
  rounded (of a 12-bit TIFF by 4095 / 255), so full scale stays full scale. A 16-bit colour channel keeps its high byte.
- Transparency (alpha, a transparent palette entry or colour) is laid on white, as a viewer shows it.
- CMYK becomes RGB by the plain formula; CMYK JPEGs are taken as inverted, as Adobe writes them.
  Embedded colour profiles are not applied.
- Pictures of 32-bit or signed numbers are refused: their range is not known.
"""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ood_runners.errors import DataError, OODError, PictureError, TooLarge
from ood_runners.image_guards import check_container, check_work

Picture = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
SUFFIXES: frozenset[str] = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp"})

_ORIENTATION = 0x0112
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Limits:
    """What a single picture may cost; both are checked before anything is decoded.

    Attributes
    ----------
    max_bytes : int
        Size of the file.
    max_pixels : int
        Width times height as the header states them. Decoding takes up to 12 bytes of memory a pixel.
        Pillow's own bound of 178,956,970 pixels stays in force above it.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000


DEFAULT_LIMITS = Limits()


def decode(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Picture:
    """The picture in `data`: uint8 (height, width, 3), RGB, upright.

    Raises
    ------
    PictureError
        Empty, damaged or cut short, or in a format that is not read.
    TooLarge
        More bytes, or more pixels by its header, than `limits` allow; nothing was decoded.
    """
    return np.array(_decode(data, limits))  # a copy: Pillow's own view cannot be written to


def decode_at(data: bytes, size: tuple[int, int], limits: Limits = DEFAULT_LIMITS) -> tuple[Picture, tuple[int, int]]:
    """``resize(decode(data), size)``, without the picture at its own size in between, and that own height and width."""
    image = _decode(data, limits)
    return np.array(_resize(image, size)), (image.height, image.width)


def _decode(data: bytes, limits: Limits) -> Image.Image:
    """See `decode`: mode RGB, upright."""
    if len(data) > limits.max_bytes:
        raise TooLarge(f"The picture has {len(data):,} bytes; at most {limits.max_bytes:,} are accepted.")
    if not data:
        raise PictureError("The picture is empty (0 bytes).")
    check_container(data)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_pixels(image.width, image.height, limits)
            check_work(image, data, limits.max_pixels)
            image.load()
            return _to_rgb(image)
    except OODError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError(
            "This is not a picture that can be read; send a whole JPEG, PNG, BMP, TIFF or WebP file."
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(f"The picture has too many pixels; at most {limits.max_pixels:,} are accepted.") from error
    except Exception as error:  # Pillow's plug-ins raise a dozen types for damaged files
        raise PictureError(f"The picture is damaged or cut short ({_reason(error)}).") from error


def read(path: Path, limits: Limits = DEFAULT_LIMITS) -> Picture:
    """The picture in a file, as `decode` gives it; every error names the path.

    Raises
    ------
    DataError
        The file is missing, is no regular file or may not be read.
    PictureError, TooLarge
        As `decode`.
    """
    try:
        info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            raise DataError(f"{path} is a folder, not a picture.")
        if not stat.S_ISREG(info.st_mode):
            raise DataError(f"{path} is not a regular file.")
        if info.st_size > limits.max_bytes:
            raise TooLarge(f"{path} has {info.st_size:,} bytes; at most {limits.max_bytes:,} are accepted.")
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}.") from error
    except PermissionError as error:
        raise DataError(f"{path} may not be read; check its permissions.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    try:
        return decode(data, limits)
    except OODError as error:
        raise type(error)(f"{path}: {error.message}") from error


def resize(picture: Picture, size: tuple[int, int]) -> Picture:
    """`picture`, uint8 (h, w, 3), at `size` (height, width); the proportions are not kept.

    An antialiased bilinear (triangle) filter in integer arithmetic: the same bytes on every machine and
    from any thread. Pictures much larger than `size` are first reduced by a whole factor to no less than
    twice `size`, which halves the time. A smaller picture is interpolated bilinearly; one that already
    fits comes back as it is.
    """
    if picture.shape[:2] == tuple(size):
        return picture
    return np.array(_resize(Image.fromarray(np.ascontiguousarray(picture)), size))


def resize_all(pictures: Picture, size: tuple[int, int]) -> Picture:
    """`resize` of each of the pictures, uint8 (n, h, w, 3), to (n, height, width, 3)."""
    if pictures.shape[1:3] == tuple(size):
        return pictures
    return (
        np.stack([resize(picture, size) for picture in pictures])
        if len(pictures)
        else np.empty((0, *size, 3), np.uint8)
    )


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)


def encode_png(picture: Picture) -> bytes:
    """PNG bytes of a uint8 picture (h, w, 3) RGB or (h, w) grey; lossless."""
    return _encode(picture, "PNG", compress_level=3)


def encode_jpeg(picture: Picture, quality: int = 90) -> bytes:
    """JPEG bytes of a uint8 picture (h, w, 3) RGB or (h, w) grey; `quality` 1 to 95."""
    return _encode(picture, "JPEG", quality=quality)


def _encode(picture: Picture, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, kind, **options)
    return buffer.getvalue()


def _reason(error: Exception) -> str:
    told = isinstance(error, (OSError, SyntaxError, ValueError)) and str(error).strip().rstrip(".")
    return told or f"{type(error).__name__} while decoding"


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise TooLarge(
            f"The picture has {width:,} x {height:,} pixels; at most {limits.max_pixels:,} in all are accepted."
        )
    if width * height == 0:
        raise PictureError("The picture is empty (no pixels).")


def _to_rgb(image: Image.Image) -> Image.Image:
    image = _upright(image)
    if image.mode.startswith("I;16"):
        grey = _to_8_bits(image)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise PictureError("The picture holds 32-bit or signed numbers of unknown range; save it with 8 or 16 bits.")
    if image.mode in ("La", "RGBa"):  # premultiplied alpha, from TIFF
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation (Pillow applies a TIFF's own while loading); a damaged EXIF block counts as none."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # the pixels are sound, and viewers show such a picture too
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_8_bits(image: Image.Image) -> Picture:
    """Grey of 12 or 16 bits scaled to 8, white-is-zero TIFFs turned round."""
    bits, inverted = 16, False
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits = min(16, tags.get(_BITS_PER_SAMPLE, (16,))[0])
        inverted = tags.get(_PHOTOMETRIC) == 0
    top = 2**bits - 1
    table = np.minimum((np.arange(2**16, dtype=np.uint32) * 255 + top // 2) // top, 255).astype(np.uint8)
    grey = table[np.asarray(image)]
    return 255 - grey if inverted else grey
