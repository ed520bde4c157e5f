"""The application itself: what a person can mend becomes one line and an exit status."""

from __future__ import annotations

import errno
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from ood_runners import __version__
from ood_runners.errors import BadParameter, OODError

BUILD_MODULES = frozenset({"matplotlib", "nncf", "scipy", "sklearn", "torch"})


def _fail(message: str, status: int = 1) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(status)


class Commands(TyperGroup):
    """Runs a command and turns what a person can mend into one line and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command; anything that escapes from here is a bug and shows its traceback."""
        try:
            return super().invoke(ctx)
        except BadParameter as error:
            _fail(error.message, 2)
        except OODError as error:
            _fail(error.message)
        except KeyboardInterrupt:
            typer.echo("interrupted: nothing was stored or changed", err=True)
            raise typer.Exit(130) from None
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in BUILD_MODULES:
                raise
            _fail(f"This command needs {error.name}; install it with: pip install 'ood-runners[build]'")
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader (`| head`) has seen enough
                raise
            where = f": {error.filename}" if error.filename else ""
            _fail(f"{error.strerror or error}{where}")
        except MemoryError:
            _fail("Out of memory; choose a smaller --size, or fit on a larger machine.")


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=(
        "Fit, evaluate and manage the versions of anomaly detection products.\n\n"
        "A folder of normal pictures becomes an immutable version of a product; the version in production is what "
        "[bold]bentoml serve[/bold] answers with. Versions live in BentoML's model store (BENTOML_HOME)."
    ),
    epilog=(
        "From a folder to a served product:\n\n\b\n"
        "  python build_artifacts.py fit photos/hazelnut --product hazelnut\n"
        "  python build_artifacts.py evaluate photos/hazelnut --product hazelnut --html report.html\n"
        "  bentoml serve\n\n"
        "Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."
    ),
)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"ood-runners {__version__}")
        raise typer.Exit


def short(tag: str) -> str:
    """``product:version`` of a tag in the store, as every command takes it."""
    from ood_runners.artifacts import parse

    return ":".join(filter(None, parse(tag)))
