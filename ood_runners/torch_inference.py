"""How torch functions of pictures run on a GPU: in batches of a few sizes, each recorded once and then replayed.

A GPU computes a network of fifty layers on a few pictures in less time than Python takes to start its kernels one by
one. A CUDA graph starts all of them at once, but only for the shapes and the memory that it was recorded with. So there
is one for each of a few batch sizes, recorded when such a batch first comes; a batch in between is filled up to the
next size, a larger one is cut. Pictures and results cross in page-locked memory, in which copies need no help of the
processor, and nothing crosses but pictures and results.

The same code runs on a CPU, without recording, so that its tests need no GPU. It is imported where torch runs only.

References
----------
PyTorch, "CUDA semantics: CUDA Graphs", https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

logger = logging.getLogger(f"bentoml.{__name__}")  # configured by BentoML when it serves

SIZES = (1, 2, 4, 8, 16, 32, 64)
WARM_UPS = 2  # before recording: libraries choose their kernels and take their memory

Outputs = dict[str, Tensor]
Pass = Callable[[], Outputs]
# A pass to one that is started at once and the tensors that it fills each time.
Recorder = Callable[[Pass], tuple[Callable[[], object], Outputs]]

_one_at_a_time = threading.Lock()  # a process may record one graph at a time


class Buckets:
    """A function of pictures, on batches of any size; safe to call from several threads.

    Parameters
    ----------
    function : uint8 (n, h, w, 3) on `device` to named tensors (n, …) on it, row by row: what it makes of a picture must
        not depend on the others
    shape : (h, w, 3) of the pictures
    device : where it runs
    sizes : of batches, growing
    recorder : records a pass; by default a CUDA graph on a GPU, and nothing on a CPU
    """

    def __init__(
        self,
        function: Callable[[Tensor], Outputs],
        shape: tuple[int, int, int],
        device: torch.device,
        *,
        sizes: tuple[int, ...] = SIZES,
        recorder: Recorder | None = None,
    ) -> None:
        self._function = function
        self._shape = shape
        self._device = device
        self._sizes = sizes
        self._stream: torch.cuda.Stream | None = None
        self._recorder = recorder
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # for weights on their way
            self._recorder = recorder or CudaGraphs(self._stream)
        self._buckets: dict[int, _Bucket] = {}
        self._lock = threading.Lock()

    @torch.inference_mode()
    def __call__(self, pictures: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """The function's outputs for uint8 (n, h, w, 3), as arrays of the caller's own; n may be 0."""
        largest = self._sizes[-1]
        parts = [pictures[start : start + largest] for start in range(0, max(len(pictures), 1), largest)]
        with self._lock:
            found = [self._run(part) for part in parts]
        if len(found) == 1:
            return found[0]
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    @torch.inference_mode()
    def passes(self, size: int) -> Callable[[], None]:
        """One pass over a batch of `size`, one of `sizes`, that is there already, nothing copied: for measurements."""
        with self._lock:
            bucket = self._bucket(size)

        @torch.inference_mode()
        def once() -> None:
            with self._lock, self._on_stream():
                bucket.start()
                self._wait()

        return once

    def recorded(self) -> dict[int, bool]:
        """For each size that has come so far, whether it is replayed."""
        return {size: bucket.replayed for size, bucket in sorted(self._buckets.items())}

    def _run(self, pictures: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        bucket = self._bucket(len(pictures))
        with self._on_stream():
            received = bucket.run(pictures)
            self._wait()  # only now are they there, and may the buffers be filled anew
        return {name: value.numpy().copy() for name, value in received.items()}

    def _bucket(self, rows: int) -> _Bucket:
        size = next(size for size in self._sizes if size >= rows)
        if size not in self._buckets:
            with self._on_stream():
                bucket = _Bucket(self._function, size, self._shape, self._device)
                if self._recorder is not None:
                    for _ in range(WARM_UPS):
                        bucket.start()
                    self._wait()
                    self._record(bucket, self._recorder)
            self._buckets[size] = bucket
        return self._buckets[size]

    def _record(self, bucket: _Bucket, recorder: Recorder) -> None:
        try:
            bucket.record(recorder)
        except RuntimeError as error:  # torch's own errors of CUDA are such
            reason = str(error).partition("\n")[0]
            logger.warning("No CUDA graph could be recorded (%s): kernels start one by one, which is slower.", reason)
            self._recorder = None
            if self._stream is not None:
                self._stream = torch.cuda.Stream(self._device)  # the other may be of no more use

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


class _Bucket:
    """A batch size: its buffers, which stay where they are, and the pass over them."""

    def __init__(
        self, function: Callable[[Tensor], Outputs], size: int, shape: tuple[int, int, int], device: torch.device
    ) -> None:
        self._locked = device.type == "cuda"
        self._sent = torch.zeros((size, *shape), dtype=torch.uint8, pin_memory=self._locked)
        self._pictures = torch.zeros_like(self._sent, device=device)
        self._received: Outputs = {}
        self._once: Pass = partial(function, self._pictures)
        self.replayed = False

    def record(self, recorder: Recorder) -> None:
        """Replay from now on what `recorder` makes of the pass."""
        replay, outputs = recorder(self._once)

        def once() -> Outputs:
            replay()
            return outputs

        self._once, self.replayed = once, True

    def start(self) -> Outputs:
        """Start a pass over the pictures that are there; its outputs, of the whole size."""
        return self._once()

    def run(self, pictures: NDArray[np.uint8]) -> Outputs:
        """Start copying the pictures in, a pass, and copying its outputs out; those, which will be there after it all.

        Rows beyond the pictures hold what was there before, and what becomes of them is left where it is.
        """
        rows = len(pictures)
        self._sent.numpy()[:rows] = pictures
        self._pictures[:rows].copy_(self._sent[:rows], non_blocking=True)
        for name, value in self.start().items():
            if name not in self._received:
                self._received[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=self._locked)
            self._received[name][:rows].copy_(value[:rows], non_blocking=True)
        return {name: value[:rows] for name, value in self._received.items()}


class CudaGraphs:
    """Records passes on a stream, all in one pool of memory: they are replayed one after the other, on that stream.

    Other threads may go on using the GPU while one is recorded.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool: Any = None

    def __call__(self, once: Pass) -> tuple[Callable[[], object], Outputs]:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        with (
            _one_at_a_time,
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            outputs = once()
        self._pool = graph.pool()
        return graph.replay, outputs
