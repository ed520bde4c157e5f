"""Sizes of pictures as people write them."""

from __future__ import annotations

from ood_runners.errors import BadParameter

SMALLEST = 32  # pixels; the networks halve a picture five times


def parse_size(text: str) -> tuple[int, int]:
    """``224`` or ``256x384`` as (height, width) in pixels; BadParameter for anything else, and below 32 pixels."""
    try:
        height, width = (int(part) for part in (text.split("x") if "x" in text else (text, text)))
    except ValueError:
        raise BadParameter(f"{text!r} is no size; give 224, or HEIGHTxWIDTH such as 256x384.") from None
    if min(height, width) < SMALLEST:
        raise BadParameter(f"The smallest size is {SMALLEST} pixels, not {text}.")
    return height, width


def size_name(size: tuple[int, int]) -> str:
    """The inverse of `parse_size`: ``224``, ``256x384``."""
    height, width = size
    return f"{height}" if height == width else f"{height}x{width}"
