"""An orderly end: what the gateway has taken on is finished before the runners go.

BentoML, told to end, removes the runners' socket files and then stops all processes at the same time. A gateway that
finishes its requests would find no way to the runners, and no runners.
"""

from __future__ import annotations

import itertools
import os
import signal
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.utils.uri import path_to_uri, uri_to_path

GATEWAY = "OODService"


def keep_sockets() -> Path:
    """Reach the runners by second names of their socket files, in a folder that is to be removed at the end.

    To be called in the gateway before the first use of a dependency.
    """
    runners: dict[str, str] = BentoMLContainer.remote_runner_mapping.get()
    own = {name: uri_to_path(uri) for name, uri in runners.items() if uri.startswith("file:")}
    folder = Path(tempfile.mkdtemp(prefix="ood-sockets-"))
    for i, (name, path) in enumerate(own.items()):
        with suppress(OSError):  # a file system without hard links: all is well until the end
            os.link(path, folder / str(i))
            runners[name] = path_to_uri(str(folder / str(i)))
    BentoMLContainer.remote_runner_mapping.set(runners)
    return folder


def end_after_gateway(patience_s: float) -> None:
    """Put off this process's SIGTERM until the gateways beside it have ended, at most `patience_s` seconds.

    To be called when the server is being started, with its own handler in place. A second SIGTERM is not put off.
    """
    server_ends = signal.getsignal(signal.SIGTERM)
    if not callable(server_ends) or threading.current_thread() is not threading.main_thread():
        return

    def wait_and_end(number: int, frame: FrameType | None) -> None:
        psutil.wait_procs(gateways_beside(), timeout=patience_s)
        server_ends(number, frame)

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, server_ends)
        threading.Thread(target=wait_and_end, args=(number, frame), daemon=True).start()

    signal.signal(signal.SIGTERM, on_signal)


def gateways_beside() -> list[psutil.Process]:
    """The gateway processes that were started by the process that started this one."""
    found = []
    for process in psutil.Process(os.getppid()).children():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if ("--service-name", GATEWAY) in itertools.pairwise(command):
            found.append(process)
    return found
