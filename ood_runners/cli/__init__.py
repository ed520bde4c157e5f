"""The command line: arguments in, library calls, progress and tables out.

Progress and errors go to standard error; results to standard output, whose last line is the tag or path that was
made. Exit status: 0 done, 1 failed (one sentence says why), 2 wrong usage, 130 interrupted. Whatever is heavy is
imported by the command that needs it, so that ``--help`` is instant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ood_runners.cli import building, carrying, interrupts, versions
from ood_runners.cli.app import app

__all__ = ["app", "building", "carrying", "main", "versions"]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line on `args` (the process's own unless given), and exit."""
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    interrupts.listen()  # SIGTERM ends as Ctrl-C does: nothing half-written stays
    app(args=args, prog_name=Path(sys.argv[0]).name)
