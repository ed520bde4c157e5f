"""The key that the gateway shows to the runners: the same keys guard both."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from ood_runners.api.keys import FILE_VARIABLE, LOOK_S, VARIABLE, file_stamp, parse_keys, read_keys
from ood_runners.errors import OODError


class Credential:
    """The key in ``OOD_API_KEY`` or else the last one in ``OOD_API_KEY_FILE``, which is read again when it changes.

    The last one is the newest where new keys are appended, so an old one can be taken out of the file at any time.

    Parameters
    ----------
    environment : where the variables are looked up

    Raises
    ------
    OODError
        The variable holds what is no key.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        fixed, file = environment.get(VARIABLE), environment.get(FILE_VARIABLE)
        self._keys = parse_keys(fixed or "", VARIABLE)
        self._file = Path(file) if file and not self._keys else None
        self._stamp: tuple[int, int, int] | None = None
        self._looked = float("-inf")

    def headers(self) -> dict[str, str]:
        """What a request to a runner carries; nothing where no key is set. OODError for a file that was never read."""
        self._look()
        return {"X-API-Key": self._keys[-1]} if self._keys else {}

    def _look(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._looked < LOOK_S:
            return
        self._looked = now
        try:
            if self._stamp is None or file_stamp(self._file) != self._stamp:
                self._keys, self._stamp = read_keys(self._file)
        except (OSError, OODError):  # the guard, which reads the same file, logs it
            if self._stamp is None:
                raise
