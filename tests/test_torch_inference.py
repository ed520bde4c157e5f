"""Batches of fixed sizes, replayed where that can be: any batch gives what its pictures give one by one.

All of it runs on the CPU; the same tests, and those of recording itself, run on an NVIDIA GPU where there is one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ood_runners.torch_inference import Buckets, Outputs, Pass
from tests.gpu import DEVICES, needs_gpu

SHAPE = (4, 5, 3)
SIZES = (1, 2, 4, 8)


def pictures(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), np.uint8)


def measured(batch: Tensor) -> Outputs:
    """A number, and something larger in another dtype, of each picture."""
    return {"sum": batch.float().sum((1, 2, 3)), "half": batch.flip(1).half().contiguous()}


def noting(seen: list[int]) -> Callable[[Tensor], Outputs]:
    """`measured`, which notes how large a batch it saw."""

    def run(batch: Tensor) -> Outputs:
        seen.append(len(batch))
        return measured(batch)

    return run


def expected(given: NDArray[np.uint8]) -> dict[str, NDArray[np.floating]]:
    return {"sum": given.sum((1, 2, 3), dtype=np.float32), "half": given[:, ::-1].astype(np.float16)}


def check(found: dict[str, NDArray[np.generic]], given: NDArray[np.uint8]) -> None:
    wanted = expected(given)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


class Recorded:
    """As a CUDA graph does: a replay computes into the same tensors every time."""

    def __init__(self, fails_from: int = 100) -> None:
        self.count, self._fails_from = 0, fails_from

    def __call__(self, once: Pass) -> tuple[Callable[[], object], Outputs]:
        self.count += 1
        if self.count >= self._fails_from:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")
        outputs = once()

        def replay() -> None:
            for name, value in once().items():
                outputs[name].copy_(value)

        return replay, outputs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("count", "sizes"),
    [(0, [1]), (1, [1]), (2, [2]), (3, [4]), (5, [8]), (8, [8]), (9, [8, 1]), (20, [8, 8, 4])],
)
def test_a_batch_is_cut_and_filled_up_to_the_next_size(count: int, sizes: list[int], device: str) -> None:
    buckets = Buckets(measured, SHAPE, torch.device(device), sizes=SIZES)
    check(buckets(pictures(count)), pictures(count))
    assert list(buckets.recorded()) == sorted(set(sizes))
    seen: list[int] = []
    eager = Buckets(noting(seen), SHAPE, torch.device("cpu"), sizes=SIZES)
    check(eager(pictures(count)), pictures(count))
    assert seen == sizes


@pytest.mark.parametrize("device", DEVICES)
def test_answers_are_the_callers_own(device: str) -> None:
    buckets = Buckets(measured, SHAPE, torch.device(device), sizes=SIZES, recorder=recorder_of(device))
    given = [pictures(count, seed) for seed, count in enumerate((4, 3, 4, 1, 4))]
    found = [buckets(one) for one in given]
    for one, of in zip(found, given, strict=True):
        check(one, of)
    found[0]["sum"][:] = 0
    check(buckets(given[0]), given[0])


def recorder_of(device: str) -> Recorded | None:
    return Recorded() if device == "cpu" else None


def test_every_size_is_recorded_once_when_it_first_comes() -> None:
    recorder = Recorded()
    buckets = Buckets(measured, SHAPE, torch.device("cpu"), sizes=SIZES, recorder=recorder)
    assert buckets.recorded() == {}
    for count in (3, 4, 1, 3, 11, 1):
        check(buckets(pictures(count, count)), pictures(count, count))
    assert buckets.recorded() == {1: True, 4: True, 8: True}
    assert recorder.count == 3


def test_without_a_recording_it_runs_all_the_same_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorded(fails_from=2)
    buckets = Buckets(measured, SHAPE, torch.device("cpu"), sizes=SIZES, recorder=recorder)
    with caplog.at_level(logging.INFO):
        for count in (1, 2, 4, 2, 1, 9):
            check(buckets(pictures(count, count)), pictures(count, count))
    assert buckets.recorded() == {1: True, 2: False, 4: False, 8: False}
    assert recorder.count == 2
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("No CUDA graph could be recorded (CUDA error: operation not permitted when stream is capt")
    assert "\n" not in line


@pytest.mark.parametrize("device", DEVICES)
def test_a_failure_is_the_callers_and_leaves_nothing_behind(device: str) -> None:
    broken = threading.Event()

    def sometimes(batch: Tensor) -> Outputs:
        if broken.is_set():
            raise ValueError("this batch")
        return measured(batch)

    buckets = Buckets(sometimes, SHAPE, torch.device(device), sizes=SIZES)
    check(buckets(pictures(2)), pictures(2))
    broken.set()
    with pytest.raises(ValueError, match="this batch"):
        buckets(pictures(4))
    broken.clear()
    check(buckets(pictures(4)), pictures(4))


@pytest.mark.parametrize("device", DEVICES)
def test_threads_do_not_mix_their_answers(device: str) -> None:
    buckets = Buckets(measured, SHAPE, torch.device(device), sizes=SIZES, recorder=recorder_of(device))

    def ask(seed: int) -> None:
        given = pictures(1 + seed % 9, seed)
        check(buckets(given), given)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(200)))


def test_a_pass_by_itself_is_of_the_size_asked_for() -> None:
    seen: list[int] = []
    buckets = Buckets(noting(seen), SHAPE, torch.device("cpu"))
    once = buckets.passes(16)
    once()
    once()
    assert seen == [16, 16]


# ---------------------------------------------------------------- on a GPU


@needs_gpu
def test_on_a_gpu_every_size_is_recorded_and_replayed() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 2)).cuda().eval()
    calls: list[int] = []

    def run(batch: Tensor) -> Outputs:
        calls.append(len(batch))
        return {"out": network(batch.permute(0, 3, 1, 2).float())}

    device = torch.device("cuda")
    buckets = Buckets(run, SHAPE, device, sizes=SIZES)
    for count in range(1, 20):
        given = pictures(count, count)
        found = buckets(given)["out"]
        with torch.inference_mode():
            plain = network(torch.from_numpy(given).cuda().permute(0, 3, 1, 2).float()).cpu().numpy()
        np.testing.assert_allclose(found, plain, rtol=1e-2, atol=1e-2 * np.abs(plain).max())
    assert buckets.recorded() == dict.fromkeys(SIZES, True)
    before = len(calls)
    buckets(pictures(19))
    assert len(calls) == before  # nothing but replays


@needs_gpu
def test_on_a_gpu_what_cannot_be_recorded_runs_without(caplog: pytest.LogCaptureFixture) -> None:
    def asks_back(batch: Tensor) -> Outputs:
        return measured(batch) if batch.float().sum().item() >= 0 else {}  # waits for the GPU: no graph may

    device = torch.device("cuda")
    stubborn = Buckets(asks_back, SHAPE, device, sizes=SIZES)
    for count in (1, 3, 9):
        check(stubborn(pictures(count, count)), pictures(count, count))
    assert not any(stubborn.recorded().values())
    assert len(caplog.records) == 1
    others = Buckets(measured, SHAPE, device, sizes=SIZES)  # are none the worse for it
    check(others(pictures(5)), pictures(5))
    assert others.recorded() == {8: True}


@needs_gpu
def test_on_a_gpu_one_is_recorded_while_others_run() -> None:
    device = torch.device("cuda")
    running = Buckets(measured, SHAPE, device, sizes=SIZES)
    running(pictures(8))
    stop = threading.Event()

    def keep_on() -> int:
        count = 0
        while not stop.is_set():
            given = pictures(1 + count % 8, count)
            check(running(given), given)
            count += 1
        return count

    with ThreadPoolExecutor(6) as pool:
        busy = [pool.submit(keep_on) for _ in range(2)]
        made = [Buckets(measured, SHAPE, device, sizes=SIZES) for _ in range(8)]
        for one in pool.map(lambda one: (one(pictures(3)), one(pictures(8)), one)[-1], made):
            assert one.recorded() == {4: True, 8: True}
        stop.set()
        assert all(one.result() > 0 for one in busy)
