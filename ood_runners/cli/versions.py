"""List, show, promote, roll back, export and import versions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ood_runners.cli.app import app, short

if TYPE_CHECKING:
    from ood_runners.artifacts import Change, Stored

Name = Annotated[
    str, typer.Argument(metavar="NAME[:VERSION]", help="The product; the version in production unless named.")
]


@app.command("list")
def list_(
    product: Annotated[str | None, typer.Option(help="Only this product.", show_default=False)] = None,
) -> None:
    """List products and versions, oldest first, and which version is in production."""
    from ood_runners.artifacts import list_versions

    versions = list_versions(product)
    if not versions:
        typer.echo("No products yet; `fit DATA --product NAME` makes one.")
        return
    rows = [
        (
            f"{v.product}:{v.version}",
            "production" if v.in_production else "",
            f"{v.created:%Y-%m-%d %H:%M}" if v.created else "",
            "" if v.alpha is None else f"{v.alpha:.3g}",
            v.problem or v.backbone or "",
            f"{v.size / 2**20:.1f} MB",
        )
        for v in versions
    ]
    _print_table(("version", "", "created (UTC)", "alpha", "backbone", "size"), rows)


@app.command()
def show(name: Name) -> None:
    """Show what a version was made from, how it is calibrated, and how it came into production."""
    from ood_runners.artifacts import history, read_version

    stored = read_version(name, verify=False)
    manifest = stored.manifest
    calibration, data = manifest.calibration, manifest.data
    asked = (
        "" if calibration.alpha == calibration.alpha_requested else f" ({calibration.alpha_requested:.3g} asked for)"
    )
    facts = {
        "version": f"{stored.product}:{stored.version}",
        "created": f"{manifest.created:%Y-%m-%d %H:%M} UTC",
        "backbone": f"{manifest.backbone.tag} ({manifest.backbone.origin}, {manifest.backbone.precision})",
        "input": f"{manifest.input.height} x {manifest.input.width} pixels",
        "detectors": ", ".join(manifest.scorers),
        "alpha": f"{calibration.alpha:.3g}{asked}",
        "calibration": f"{calibration.method}, {calibration.n} scores, {calibration.folds} folds",
        "data": f"{data.train_count} pictures, layout {data.layout}, fingerprint {data.fingerprint[:16]}",
        "classes": ", ".join(data.classes or []),
        "skipped": "; ".join(f"{file.path} ({file.reason})" for file in data.skipped),
        "packages": ", ".join(f"{package} {version}" for package, version in manifest.packages.items()),
        "notes": "\n".join(manifest.notes),
        "folder": str(stored.path),
    }
    _print_table(None, [(key, value) for key, value in facts.items() if value])
    changes = history(stored.product)
    if changes:
        typer.echo("\nproduction:")
        rows = [(f"{c.when:%Y-%m-%d %H:%M}", c.action, c.came_from or "", c.to, c.who, c.why) for c in changes]
        _print_table(("when (UTC)", "", "from", "to", "who", "why"), rows)


Why = Annotated[str, typer.Option(help="The reason, kept in the product's history.", show_default=False)]


@app.command()
def promote(
    name: Annotated[str, typer.Argument(metavar="NAME:VERSION", help="The version, as `list` shows it.")], why: Why = ""
) -> None:
    """Put a version into production, after checking that it loads and scores as it did when it was fitted.

    A running service takes it up within seconds.
    """
    from ood_runners import artifacts

    _say_change(artifacts.promote(name, why=why, check=_check_opens))


@app.command()
def rollback(
    product: Annotated[str, typer.Argument(metavar="NAME", help="The product.")],
    to: Annotated[
        str | None, typer.Option(metavar="VERSION", help="This version, not the previous one.", show_default=False)
    ] = None,
    why: Why = "",
) -> None:
    """Go back to the version that was in production before; needs no network.

    \b
      rollback hazelnut
      rollback hazelnut --to VERSION --why "false alarms since the lamp was changed"
    """
    from ood_runners import artifacts

    _say_change(artifacts.rollback(product, to, why=why, check=_check_opens))


@app.command("export")
def export_(name: Name, file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")]) -> None:
    """Write a version and its backbone to one file, for another machine's `import`."""
    from ood_runners.artifacts import export_version

    typer.echo(export_version(name, file))


@app.command("import")
def import_(file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `export` wrote.")]) -> None:
    """Bring a version into this machine's store; it goes into production with `promote`."""
    from ood_runners.artifacts import import_version

    typer.echo(short(str(import_version(file))))


def _check_opens(stored: Stored) -> None:
    """Refuse a version that does not load, or does not score its golden picture as it did when it was fitted."""
    from ood_runners.pipeline import Product, check_golden, load_golden

    golden = stored.manifest.golden
    scores = Product.open(stored).raw_scores(load_golden(stored)[None])
    check_golden(str(stored.tag), golden.scores, golden.tolerance, scores)


def _say_change(change: Change) -> None:
    if change.came_from == change.to:
        typer.echo(f"{change.product}: {change.to} is in production already.")
    else:
        typer.echo(f"{change.product}: from {change.came_from or 'no version'} to {change.to}.")
    typer.echo(f"{change.product}:{change.to}")


def _print_table(header: tuple[str, ...] | None, rows: Iterable[tuple[str, ...]]) -> None:
    """Aligned columns on standard output, whole even where there is no terminal to fit them to."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=header is not None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in header or ("", ""):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal:
        console.width = 1000
    console.print(table)
