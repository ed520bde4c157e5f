"""A compiled network: the same rows, whoever computes them and however many ask at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray
from openvino import opset13 as ops

from ood_runners.errors import ArtifactError
from ood_runners.inference import CPUNetwork

Rows = NDArray[np.float32]


def model() -> ov.Model:
    """Rows (n, 6) to their products with a matrix (n, 4), and to their sums (n,)."""
    given = ops.parameter([-1, 6], ov.Type.f32)
    matrix = ops.constant(np.arange(24, dtype=np.float32).reshape(6, 4))
    products = ops.matmul(given, matrix, False, False)
    sums = ops.reduce_sum(given, np.array([1]))
    return ov.Model([ops.result(products), ops.result(sums)], [given], "rows")


def rows(count: int, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).integers(-9, 9, (count, 6)).astype(np.float32)


def check(found: list[Rows], given: Rows) -> None:
    np.testing.assert_array_equal(found[0], given @ np.arange(24, dtype=np.float32).reshape(6, 4))
    np.testing.assert_array_equal(found[1], given.sum(axis=1))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("piece", [1, 3, 100])
@pytest.mark.parametrize("lone", [False, True])
def test_every_row_gets_its_own_answer(threads: int, piece: int, lone: bool) -> None:
    network = CPUNetwork(model, piece=piece, threads=threads, lone=lone)
    for count in (1, 2, 3, 7, 50):
        given = rows(count, seed=count)
        check(network(given), given)


def test_no_rows_give_empty_outputs_of_the_right_kind() -> None:
    products, sums = CPUNetwork(model)(rows(0))
    assert products.shape == (0, 4) and sums.shape == (0,)
    assert products.dtype == sums.dtype == np.float32


@pytest.mark.parametrize("lone", [False, True])
def test_many_threads_do_not_mix_their_answers(lone: bool) -> None:
    network = CPUNetwork(model, piece=2, threads=2, lone=lone)

    def ask(seed: int) -> None:
        given = rows(1 + seed % 9, seed)
        check(network(given), given)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(400)))


def test_read_only_and_strided_rows_are_taken() -> None:
    network = CPUNetwork(model, piece=2)
    given = rows(10)[::2]
    given.flags.writeable = False
    check(network(given), given)


def test_answers_stay_when_others_ask() -> None:
    network = CPUNetwork(model, threads=1)
    first = network(rows(1, seed=1))
    kept = [one.copy() for one in first]
    network(rows(1, seed=2))
    for found, before in zip(first, kept, strict=True):
        np.testing.assert_array_equal(found, before)


def test_what_fails_keeps_no_request() -> None:
    network = CPUNetwork(model, piece=1, threads=2)
    for _ in range(5):
        with pytest.raises(RuntimeError):
            network(np.zeros((4, 7), np.float32))
    given = rows(4)
    answers: list[list[Rows]] = []
    asking = threading.Thread(target=lambda: answers.append(network(given)), daemon=True)
    asking.start()
    asking.join(30)
    assert answers, "a request that failed was not given back"
    check(answers[0], given)


def test_a_lone_piece_has_every_thread_and_others_one_each() -> None:
    network = CPUNetwork(model, threads=2, lone=True)
    network(rows(1))
    assert network._apart is None  # nobody has needed it
    network(rows(2))
    end = time.monotonic() + 30
    while network._apart is None and time.monotonic() < end:
        time.sleep(0.01)
    assert network._choose(1) == (network._together, 1)  # nothing is under way
    network._under_way = 2
    assert network._choose(1) == (network._apart, 1)


def test_without_its_second_copy_it_answers_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, failures = threading.Event(), []
    models = iter([model()])

    def once() -> ov.Model:
        try:
            return next(models)
        except StopIteration:
            tried.set()
            raise ArtifactError("The files are gone.") from None

    monkeypatch.setattr(threading, "excepthook", failures.append)
    network = CPUNetwork(once, threads=2, lone=True)
    for _ in range(3):
        given = rows(5)
        check(network(given), given)
    assert tried.wait(30)
    for thread in threading.enumerate():
        if thread.name == "compile":
            thread.join(30)
    assert not failures
