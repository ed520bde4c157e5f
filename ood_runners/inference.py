"""How networks are compiled for a CPU and run there: in one way, for fitting and serving alike.

Threads that share a picture wait for one another at the end of each layer, and for a core that decodes the next
picture meanwhile. So pieces of a batch (pictures, or some hundred queries) are computed side by side, each by one
thread; only a lone piece may have every core.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ood_runners import compiled
from ood_runners.cores import available_cores
from ood_runners.errors import OODError

if TYPE_CHECKING:
    import openvino as ov


class CPUNetwork:
    """An ``openvino.Model`` compiled for this machine's CPU; safe to call from several threads.

    The first dimension of each input and output counts rows, which do not depend on one another.

    Parameters
    ----------
    model : makes the model, which takes any number of rows; called for each time that it is compiled
    piece : rows that are computed together, by one thread
    threads : CPU threads; all cores if None
    lone : a lone piece is computed by all threads, as long as half of them would be idle. That needs the network twice;
        the copy with a thread for each piece is compiled while the first pieces that need it are computed without it
    kept : where it is kept, compiled (see `compiled.file_of`)
    """

    def __init__(
        self,
        model: Callable[[], ov.Model],
        *,
        piece: int = 1,
        threads: int | None = None,
        lone: bool = False,
        kept: Path | None = None,
    ) -> None:
        self._threads = threads or available_cores()
        self._piece = piece
        self._compile = partial(_Streams, model, threads=self._threads, kept=kept)
        self._lock = threading.Lock()
        self._under_way = 0  # pieces
        self._together: _Streams | None = None
        self._apart: _Streams | None = None
        self._preparing = False  # the second
        if lone and self._threads > 1:
            self._together = self._compile(1)
        else:
            self._apart = self._compile(self._threads)

    def __call__(self, *inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """The outputs, each (n, …), for inputs (n, …) of the types and shapes of the model; arrays of the caller's."""
        rows = len(inputs[0])
        if rows == 0:
            return list(self._any().empty)
        given = [np.require(one, requirements=["C", "W"]) for one in inputs]  # OpenVINO does not share read-only memory
        pieces = -(-rows // self._piece)
        with self._lock:
            self._under_way += pieces
            streams, step = self._choose(rows)
        try:
            return streams.run(given, rows, step)
        finally:
            with self._lock:
                self._under_way -= pieces

    def _choose(self, rows: int) -> tuple[_Streams, int]:
        """What computes so many rows, and in pieces of how many; called with the lock."""
        if self._together is not None and 2 * self._under_way <= self._threads:
            return self._together, rows
        if self._apart is not None:
            return self._apart, self._piece
        assert self._together is not None
        if not self._preparing:
            self._preparing = True
            threading.Thread(target=self._prepare, name="compile").start()
        return self._together, self._piece  # a large batch once would keep its memory for good

    def _prepare(self) -> None:
        with suppress(OODError, RuntimeError):  # its files are gone: the first one does all, as it did until now
            apart = self._compile(self._threads)
            with self._lock:
                self._apart = apart

    def _any(self) -> _Streams:
        streams = self._together or self._apart
        assert streams is not None
        return streams


class _Streams:
    """A compiled model and as many requests of it as run at a time."""

    def __init__(self, model: Callable[[], ov.Model], count: int, *, threads: int, kept: Path | None) -> None:
        import openvino as ov

        config = {
            # Always float32 where the model is: processors with bfloat16 would otherwise give other scores.
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": count,
            "INFERENCE_NUM_THREADS": threads,
            # The threads of several networks and processes would be bound to the same cores while others idle.
            "ENABLE_CPU_PINNING": False,
        }
        network = None if kept is None else compiled.read(kept, config)
        if network is None:
            network = ov.Core().compile_model(model(), "CPU", config)
            if kept is not None:
                compiled.write(kept, network)
        self.empty = [np.zeros((0, *_lengths(one)[1:]), one.element_type.to_dtype()) for one in network.outputs]
        self._free: SimpleQueue[ov.InferRequest] = SimpleQueue()
        for _ in range(count):
            self._free.put(network.create_infer_request())

    def run(self, inputs: list[NDArray[Any]], rows: int, step: int) -> list[NDArray[Any]]:
        """The outputs of all rows, computed `step` at a time."""
        import openvino as ov

        results: list[NDArray[Any]] = []
        waiting: deque[tuple[slice, ov.InferRequest]] = deque()

        def take() -> None:
            part, request = waiting.popleft()
            try:
                request.wait()
                for i in range(len(self.empty)):
                    found = request.get_output_tensor(i).data
                    if len(results) == i:
                        results.append(np.empty((rows, *found.shape[1:]), found.dtype))
                    results[i][part] = found
            finally:
                self._free.put(request)

        try:
            for start in range(0, rows, step):
                part = slice(start, min(start + step, rows))
                try:
                    request = self._free.get_nowait()
                except Empty:
                    if waiting:  # one's own first: two that hold some and want more would wait for each other
                        take()
                    request = self._free.get()
                try:
                    for i, one in enumerate(inputs):
                        request.set_input_tensor(i, ov.Tensor(one[part], shared_memory=True))
                    request.start_async()
                except BaseException:
                    self._free.put(request)
                    raise
                waiting.append((part, request))
            while waiting:
                take()
        finally:
            while waiting:  # after a failure: the others go back once they are done
                with suppress(RuntimeError):
                    take()
        return results


def _lengths(output: Any) -> list[int]:
    """The shape, 0 where it is open."""
    return [0 if d.is_dynamic else d.get_length() for d in output.partial_shape]
