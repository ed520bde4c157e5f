"""Marks for tests that run on an NVIDIA GPU where there is one."""

from __future__ import annotations

import pytest
import torch

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="There is no NVIDIA GPU here that torch can use; this is about one."
)
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
