"""Containers and what they answer, by podman."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

READY_S = 120.0
# As docs/deployment.md tells users to run it.
RIGHTS = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
LIMITS = ("--memory", "2g", "--cpus", "2")
HOME = ("--tmpfs", "/var/lib/ood")


def podman(*arguments: str, check: bool = True, timeout: float = 120) -> str:
    """What podman printed, without the last line's end."""
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True, timeout=timeout, check=False)
    if check:
        assert done.returncode == 0, f"podman {' '.join(arguments)}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def inspect(name: str, kind: str = "container") -> dict[str, Any]:
    return dict(json.loads(podman("inspect", "--type", kind, name))[0])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], object], seconds: float, why: Callable[[], str] = str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s\n{why()}"
        time.sleep(0.2)


@dataclass
class Container:
    """One that serves at `url`, on the loopback interface."""

    name: str
    url: str
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=60)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def detect(self, picture: bytes, product: str = "parts") -> dict[str, Any]:
        answer = self.http.post("/detect", files={"image": ("picture.png", picture)}, data={"product": product})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return self.http.get("/readyz").status_code == 200
        return False

    def wait_until_ready(self) -> None:
        wait_for(self.is_ready, READY_S, self.log)

    def log(self) -> str:
        # What a container writes to its standard error comes on podman's own.
        done = subprocess.run(["podman", "logs", self.name], capture_output=True, text=True, check=False)
        return (done.stdout + done.stderr)[-6000:]

    def state(self) -> dict[str, Any]:
        return dict(inspect(self.name)["State"])

    def end(self, number: signal.Signals) -> None:
        """Send a signal to its first process, as the kernel or an orchestrator would."""
        os.kill(self.state()["Pid"], number)

    def stop(self) -> int:
        """SIGTERM and the time to answer what was taken on; the exit status."""
        podman("stop", "--time", "60", self.name)
        return int(self.state()["ExitCode"])


def start(image: str, *options: str, command: Sequence[str] = ("serve",), home: Sequence[str] = HOME) -> Container:
    """Start a container on a free port of the loopback interface; it need not be ready yet."""
    container = Container(f"ood-test-{uuid.uuid4().hex[:8]}", f"http://127.0.0.1:{free_port()}")
    where = ("--host", "127.0.0.1", "--port", str(container.port))
    named = ("--detach", "--name", container.name, "--network", "host")
    podman("run", *named, *RIGHTS, *LIMITS, *home, *options, image, *command, *where)
    return container


def remove(container: Container) -> None:
    container.http.close()
    podman("rm", "--force", "--time", "5", "--volumes", container.name)


@contextmanager
def running(*arguments: Any, **options: Any) -> Iterator[Container]:
    """As `start`, ready, and gone when the block ends."""
    container = start(*arguments, **options)
    try:
        container.wait_until_ready()
        yield container
    finally:
        remove(container)
