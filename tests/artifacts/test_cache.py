from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ood_runners.artifacts import LoadedVersions
from ood_runners.errors import ArtifactError


class Loader:
    """Loads a one-item list that holds the tag; a tag's size is its number, as in ``a:30``."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.lock = threading.Lock()

    def __call__(self, tag: str) -> list[str]:
        with self.lock:
            self.loads.append(tag)
        return [tag]


def size(value: list[str]) -> int:
    return int(value[0].partition(":")[2])


def touch(cache: LoadedVersions[list[str]], *tags: str) -> None:
    for tag in tags:
        with cache.lease(tag) as value:
            assert value == [tag]


def test_what_was_used_longest_ago_is_let_go() -> None:
    load = Loader()
    cache = LoadedVersions(load, size, budget=100)
    touch(cache, "a:40", "b:40", "a:40", "c:40")
    assert cache.tags() == ["a:40", "c:40"] and cache.total == 80
    touch(cache, "a:40", "b:40")
    assert load.loads == ["a:40", "b:40", "c:40", "b:40"]


def test_the_budget_is_used_to_the_last_byte() -> None:
    cache = LoadedVersions(Loader(), size, budget=100)
    touch(cache, "a:60", "b:40")
    assert cache.tags() == ["a:60", "b:40"]
    touch(cache, "c:1")
    assert cache.tags() == ["b:40", "c:1"]


def test_one_that_is_larger_than_the_budget_stays_until_another_comes() -> None:
    load = Loader()
    cache = LoadedVersions(load, size, budget=10)
    touch(cache, "large:50", "large:50")
    assert load.loads == ["large:50"]
    touch(cache, "small:5")
    assert cache.tags() == ["small:5"]


def test_what_is_leased_stays_and_goes_afterwards() -> None:
    cache = LoadedVersions(Loader(), size, budget=50)
    with cache.lease("a:40") as held:
        touch(cache, "b:40", "c:40")
        assert cache.tags() == ["a:40", "c:40"]
        with cache.lease("a:40") as again:
            assert again is held
        touch(cache, "c:40")
        assert "a:40" in cache.tags()
    assert cache.tags() == ["c:40"] and cache.total == 40


def test_a_lease_ends_with_an_error_in_its_block() -> None:
    cache = LoadedVersions(Loader(), size, budget=50)
    with pytest.raises(ValueError, match="in the block"), cache.lease("a:40"):
        raise ValueError("in the block")
    touch(cache, "b:40")
    assert cache.tags() == ["b:40"]


def test_many_threads_one_load() -> None:
    begun, go = threading.Event(), threading.Event()
    load = Loader()

    def slow(tag: str) -> list[str]:
        begun.set()
        assert go.wait(30)
        return load(tag)

    cache = LoadedVersions(slow, size, budget=100)

    def use() -> list[str]:
        with cache.lease("a:40") as value:
            return value

    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(use) for _ in range(8)]
        assert begun.wait(30)
        assert cache.tags() == []
        go.set()
        values = [result.result(30) for result in results]
    assert load.loads == ["a:40"] and all(value is values[0] for value in values)


def test_one_slow_load_does_not_hold_up_another_tag() -> None:
    go = threading.Event()

    def load(tag: str) -> list[str]:
        assert tag != "slow:1" or go.wait(30)
        return [tag]

    cache = LoadedVersions(load, size, budget=100)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(touch, cache, "slow:1")
        touch(cache, "quick:1")
        assert not slow.done()
        go.set()
        slow.result(30)
    assert sorted(cache.tags()) == ["quick:1", "slow:1"]


def test_an_error_reaches_all_who_wait_and_is_not_kept() -> None:
    broken, begun, go = True, threading.Event(), threading.Event()

    def load(tag: str) -> list[str]:
        if not broken:
            return [tag]
        begun.set()
        assert go.wait(30)
        raise ArtifactError(f"{tag} is damaged")

    cache = LoadedVersions(load, size, budget=100)
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(touch, cache, "a:40") for _ in range(4)]
        assert begun.wait(30)
        go.set()
        for result in results:
            with pytest.raises(ArtifactError, match="a:40 is damaged"):
                result.result(30)
    assert cache.tags() == [] and cache.total == 0
    broken = False
    touch(cache, "a:40")


def test_those_who_wait_load_themselves_when_the_loader_is_interrupted() -> None:
    begun, go = threading.Event(), threading.Event()
    loads: list[str] = []

    def load(tag: str) -> list[str]:
        loads.append(tag)
        if len(loads) > 1:
            return [tag]
        begun.set()
        assert go.wait(30)
        raise SystemExit

    cache = LoadedVersions(load, size, budget=100)

    def interrupted() -> None:
        with pytest.raises(SystemExit):
            touch(cache, "a:40")

    first = threading.Thread(target=interrupted)
    first.start()
    assert begun.wait(30)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(touch, cache, "a:40")
        go.set()
        second.result(30)
    first.join()
    assert cache.tags() == ["a:40"]


def test_under_many_threads_the_books_stay_right() -> None:
    load = Loader()
    cache = LoadedVersions(load, size, budget=100)
    tags = [f"{name}:{20 + 10 * i}" for i, name in enumerate("abcdef")]

    def use(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(200):
            tag = chosen.choice(tags)
            with cache.lease(tag) as value:
                assert value == [tag] and tag in cache.tags()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(use, range(6)))
    assert cache.total <= 100 and cache.total == sum(int(tag.partition(":")[2]) for tag in cache.tags())
    touch(cache, *tags)
    assert cache.total <= 100
