"""Items to bytes and back.

A frame is one safetensors file (https://github.com/huggingface/safetensors): a JSON header with the dtype, shape and
place of every array, then the arrays' bytes. Array `name` of item 3 is called ``3.name``; what is no number of an
item (its tag, an error) travels as JSON, in the array of bytes that is called ``fields``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ood_runners.errors import MalformedRequest

MEDIA_TYPE = "application/vnd.ood-runners.frame"
FIELDS = "fields"
Item = dict[str, Any]


def encode(items: Sequence[Mapping[str, Any]]) -> bytes:
    """A frame of items whose values are arrays or numbers of NumPy, or what JSON can hold."""
    arrays: dict[str, NDArray[Any]] = {}
    fields: list[Item] = [{} for _ in items]
    for row, item in enumerate(items):
        for name, value in item.items():
            if isinstance(value, np.ndarray | np.generic):
                arrays[f"{row}.{name}"] = np.asarray(value, order="C")
            else:
                fields[row][name] = value
    arrays[FIELDS] = np.frombuffer(json.dumps(fields).encode(), np.uint8)
    return bytes(save(arrays))


def decode(frame: bytes) -> list[Item]:
    """The items of a frame; raises MalformedRequest for bytes that are none. The arrays are read-only."""
    try:
        arrays = load(frame)
        items = json.loads(arrays.pop(FIELDS).tobytes())
        for key, array in arrays.items():
            row, _, name = key.partition(".")
            items[int(row)][name] = array
    except (SafetensorError, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise MalformedRequest(f"The body is no frame of items ({error}).") from error
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise MalformedRequest("The body's fields are no list of items.")
    return items
