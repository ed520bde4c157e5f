from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from ood_runners.errors import MalformedRequest
from ood_runners.wire.frames import decode, encode


def items() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "tag": "ood-parts:v1",
            "pictures": rng.integers(0, 256, (4, 6, 3), np.uint8),
            "patches": rng.normal(size=(3, 5, 2)).astype(np.float16).transpose(1, 0, 2),
            "pooled.layer3": rng.normal(size=7).astype(np.float32),
        },
        {"score": np.float32(1.5), "predicted": np.int64(-3), "map": np.zeros((0, 4), np.float32)},
        {"error": {"code": "internal", "message": "Ärger."}},
        {},
    ]


def test_items_come_back_as_they_were() -> None:
    sent, got = items(), decode(encode(items()))
    assert [set(item) for item in got] == [set(item) for item in sent]
    for before, after in zip(sent, got, strict=True):
        for name, value in before.items():
            if isinstance(value, np.ndarray | np.generic):
                assert (after[name].dtype, after[name].shape) == (value.dtype, value.shape)
                np.testing.assert_array_equal(after[name], value)
            else:
                assert after[name] == value


def test_no_items_are_a_frame_too() -> None:
    assert decode(encode([])) == []


def test_an_array_takes_its_own_bytes_and_little_more() -> None:
    array = np.random.default_rng(0).normal(size=(28, 28, 128)).astype(np.float16)
    assert len(encode([{"patches": array}])) < array.nbytes + 300


def test_what_is_no_number_is_not_sent() -> None:
    with pytest.raises(SafetensorError):
        encode([{"patches": np.array([object()])}])


def frame(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


FIELDS = {"fields": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no frame at all",
        struct.pack("<Q", 2**62) + b"{}",
        frame({}, b""),
        frame(FIELDS, b"[{}"),
        frame({"fields": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 4]}}, b"[{}]"),
        frame({"fields": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}, b"[{}]"),
        frame({"fields": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"1234"),
        frame({"fields": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"[12]"),
        frame(FIELDS | {"1.x": {"dtype": "U8", "shape": [1], "data_offsets": [4, 5]}}, b"[{}]x"),
        frame(FIELDS | {"a.x": {"dtype": "U8", "shape": [1], "data_offsets": [4, 5]}}, b"[{}]x"),
        frame(FIELDS | {"x": {"dtype": "U8", "shape": [1], "data_offsets": [4, 5]}}, b"[{}]x"),
        frame({"fields": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"\xff\xff\xff\xff"),
    ],
)
def test_what_is_no_frame_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedRequest):
        decode(body)


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 50))
def test_a_changed_frame_is_read_or_refused(place: int, value: int, cut: int) -> None:
    changed = bytearray(encode(items()))
    changed[place % len(changed)] = value
    try:
        read = decode(bytes(changed[: len(changed) - cut]))
    except MalformedRequest:
        return
    assert all(isinstance(item, dict) for item in read)


def test_a_header_nested_without_end_is_refused() -> None:
    body = b"[" * 100_000
    header = {"fields": {"dtype": "U8", "shape": [len(body)], "data_offsets": [0, len(body)]}}
    with pytest.raises(MalformedRequest):
        decode(frame(header, body))
