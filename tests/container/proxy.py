"""HAProxy before several containers, as a Service is before pods."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.container.podman import Container, free_port, wait_for

# Nothing is tried again, so that every request that a container loses is counted.
CONFIGURATION = """
global
    stats socket {folder}/admin mode 600 level admin
defaults
    mode http
    retries 0
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    timeout http-keep-alive 60s
    timeout check 5s
frontend service
    bind 127.0.0.1:{port}
    default_backend containers
backend containers
    balance leastconn
    option httpchk GET /readyz
    default-server check inter 1s fall 1 rise 1 observe layer4 error-limit 1 on-error mark-down disabled
{servers}
"""


@dataclass
class Proxy:
    """A running HAProxy with places for containers; those that are taken get requests."""

    url: str
    admin: Path
    places: Sequence[str]
    taken: dict[str, str] = field(default_factory=dict)

    def tell(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(self.admin))
            line.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: line.recv(65536), b"")).decode()

    def is_up(self, container: Container) -> bool:
        """Whether it gets requests: its check has passed."""
        [row] = [
            line.split(",")
            for line in self.tell("show stat").splitlines()
            if line.startswith(f"containers,{self.taken[container.name]},")
        ]
        return row[17] == "UP"

    def add(self, container: Container) -> None:
        """Send requests to a container that is ready."""
        place = self.taken[container.name] = next(one for one in self.places if one not in self.taken.values())
        self.tell(f"set server containers/{place} addr 127.0.0.1 port {container.port}")
        self.tell(f"set server containers/{place} state ready")
        wait_for(lambda: self.is_up(container), 30, lambda: self.tell("show stat"))

    def drain(self, container: Container) -> None:
        """Send no more requests there; those on their way are answered."""
        self.tell(f"set server containers/{self.taken[container.name]} state drain")

    def forget(self, container: Container) -> None:
        self.tell(f"set server containers/{self.taken.pop(container.name)} state maint")


@contextmanager
def proxy(folder: Path, places: int) -> Iterator[Proxy]:
    """An HAProxy on the loopback interface, gone when the block ends."""
    names = [f"place{i}" for i in range(places)]
    port = free_port()
    servers = "\n".join(f"    server {name} 127.0.0.1:9" for name in names)
    (folder / "haproxy.cfg").write_text(CONFIGURATION.format(folder=folder, port=port, servers=servers))
    process = subprocess.Popen(["haproxy", "-db", "-f", str(folder / "haproxy.cfg")])
    try:
        wait_for((folder / "admin").exists, 10)
        yield Proxy(f"http://127.0.0.1:{port}", folder / "admin", names)
    finally:
        process.terminate()
        process.wait(timeout=20)
