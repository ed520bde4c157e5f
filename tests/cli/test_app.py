"""Exit status and what is said when something goes wrong, whatever the command."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ood_runners import __version__
from ood_runners.cli.app import Commands, app
from ood_runners.errors import BadParameter, DataError

ROOT = Path(__file__).resolve().parents[2]


def run_failing(error: BaseException) -> tuple[int, str]:
    """Exit status and standard error of a command that raises `error`."""
    failing = typer.Typer(cls=Commands, pretty_exceptions_enable=False)

    @failing.callback()
    def group() -> None:
        pass

    @failing.command()
    def go() -> None:
        raise error

    result = CliRunner().invoke(failing, ["go"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.stdout == ""
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (DataError("The folder holds no pictures."), 1, "error: The folder holds no pictures.\n"),
        (BadParameter("There is no backbone 'x'."), 2, "error: There is no backbone 'x'.\n"),
        (KeyboardInterrupt(), 130, "interrupted: nothing was stored or changed\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/store/a"), 1, "error: No space left on device: /store/a\n"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            1,
            "error: This command needs torch; install it with: pip install 'ood-runners[build]'\n",
        ),
    ],
)
def test_what_a_person_can_mend_is_one_line(error: BaseException, status: int, said: str) -> None:
    assert run_failing(error) == (status, said)


@pytest.mark.parametrize("bug", [ZeroDivisionError(), ModuleNotFoundError("No module named 'ours'", name="ours")])
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    with pytest.raises(type(bug)):
        run_failing(bug)


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "build_artifacts.py", *args],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_version() -> None:
    assert run("--version").stdout == f"ood-runners {__version__}\n"


@pytest.mark.parametrize("command", ["fit", "evaluate", "list", "show", "promote", "rollback", "export", "import"])
def test_help_names_and_explains_every_command(command: str) -> None:
    assert command in CliRunner().invoke(app, ["--help"]).stdout
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f" {command} " in result.stdout


@pytest.mark.parametrize(
    "args",
    [
        ["fly"],
        ["fit"],
        ["fit", "folder"],
        ["fit", "folder", "--product", "p", "--alpha", "2"],
        ["fit", "folder", "--product", "p", "--size", "big"],
        ["fit", "folder", "--product", "p", "--size", "8"],
        ["evaluate", "folder", "--product", "p", "--alpha", "0"],
        ["evaluate", "folder", "--product", "p", "--html", "no/such/folder/report.html"],
        ["list", "--product", "No Such Name"],
    ],
)
def test_wrong_usage_is_2(args: list[str], bento_home: Path) -> None:
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2
    assert result.stderr
    assert "Traceback" not in result.stderr


def test_a_process_says_it_in_one_line_without_a_traceback(tmp_path: Path) -> None:
    done = run("show", "hazelnut", BENTOML_HOME=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: There is no product 'hazelnut'; the store is empty, fit one first.\n"


def test_an_empty_store_is_no_error(tmp_path: Path) -> None:
    done = run("list", BENTOML_HOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "fit DATA" in done.stdout
