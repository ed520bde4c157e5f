"""Nearest neighbours as matrix products on a GPU: `search.Search` and `search.Metric` again, in torch.

A GPU multiplies by every entry in less time than a processor looks into an index, and exactly. Products are in
float32, not in the ten bits of TF32: a version then scores as it does on a CPU. Imported where torch runs only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

GROUP = 32  # entries whose maximum is taken together; see `search`
PRODUCTS = 2**27  # at a time: 512 MB
FAR = 1e30  # subtracted from products that must not be found


class TorchSearch:
    """The k nearest entries of a bank, by Euclidean distance; exact, and safe to call from several threads.

    Parameters
    ----------
    bank : float16 or float32 (m, d), m >= 1
    k : neighbours; clipped to m
    device : a torch device
    without : bool (m,), entries that are passed over; at least k must be left
    """

    def __init__(self, bank: NDArray[Any], k: int, device: str, *, without: NDArray[np.bool_] | None = None) -> None:
        entries = torch.from_numpy(np.asarray(bank, np.float32))
        self.size, self.d = entries.shape
        self.k = min(k, self.size)
        self._group = max(1, min(GROUP, self.size // self.k))
        padding = -self.size % self._group
        half = 0.5 * (entries * entries).sum(1)
        if without is not None:
            half[torch.from_numpy(without)] = FAR
        self._bank = torch.nn.functional.pad(entries, (0, 0, 0, padding)).to(device)
        self._half = torch.nn.functional.pad(half, (0, padding), value=FAR).to(device)
        self._rows = max(1, PRODUCTS // len(self._bank))

    @torch.inference_mode()
    def search(self, queries: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """As `search.Search.search`."""
        parts = [self._nearest(part) for part in _parts(queries, self._rows, self._bank.device)]
        if not parts:
            return np.empty((0, self.k), np.float32), np.empty((0, self.k), np.int64)
        squared, found = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
        return squared, found

    def _nearest(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        products = torch.addmm(-self._half, queries, self._bank.T).view(len(queries), -1, self._group)
        groups = products.amax(2).topk(self.k, 1).indices  # the k highest lie within them
        inside = products.gather(1, groups[:, :, None].expand(-1, -1, self._group))
        best = inside.flatten(1).topk(self.k, 1)
        entries = groups.gather(1, best.indices // self._group) * self._group + best.indices % self._group
        squared = (queries * queries).sum(1, keepdim=True) - 2 * best.values
        return squared.clamp_(min=0), entries


class TorchMetric:
    """See `search.Metric`."""

    def __init__(self, bank: NDArray[Any], matrix: NDArray[np.float32], device: str) -> None:
        moved = (np.asarray(bank, np.float32) @ matrix).astype(np.float16)  # rounded as there
        self._entries = torch.from_numpy(moved).to(device, torch.float32)
        self._matrix = torch.from_numpy(matrix).to(device)

    @torch.inference_mode()
    def measure(self, queries: NDArray[np.float32], entries: NDArray[np.int64]) -> NDArray[np.float32]:
        """As `search.Metric.measure`."""
        if not len(queries):
            return np.empty(0, np.float32)
        rows = max(1, PRODUCTS // (entries.shape[1] * self._entries.shape[1]))
        device = self._entries.device
        found = [
            torch.linalg.vector_norm(self._entries[near] - (part @ self._matrix)[:, None], dim=2).mean(1)
            for part, near in zip(_parts(queries, rows, device), _parts(entries, rows, device), strict=True)
        ]
        return np.asarray(torch.cat(found).cpu().numpy(), np.float32)


def _parts(array: NDArray[Any], rows: int, device: torch.device) -> list[torch.Tensor]:
    whole = torch.from_numpy(np.ascontiguousarray(array))
    return [whole[start : start + rows].to(device) for start in range(0, len(whole), rows)]
