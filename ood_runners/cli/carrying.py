"""Carry versions to and from a shared place, and clear away old ones."""

from __future__ import annotations

from typing import Annotated

import typer

from ood_runners.cli.app import app, short
from ood_runners.errors import BadParameter

Place = Annotated[
    str,
    typer.Argument(metavar="PLACE", help="A folder, or a URL such as s3://bucket/models."),
]


@app.command()
def push(
    name: Annotated[
        str, typer.Argument(metavar="NAME[:VERSION]", help="The product; the version in production unless named.")
    ],
    place: Place,
) -> None:
    """Put a version and its backbone into a folder or an object store, from which other machines `pull` it.

    \b
      push hazelnut /mnt/models
      push hazelnut:VERSION s3://bucket/models
    S3 needs one more package (pip install 'ood-runners[s3]'). Its credentials come from AWS's own variables and files;
    AWS_ENDPOINT_URL names another store than Amazon's.
    """
    from ood_runners.artifacts import push_version

    typer.echo(push_version(name, place))


@app.command()
def pull(
    names: Annotated[
        str,
        typer.Argument(
            metavar="NAME[:VERSION],…",
            help="Products; the newest version that is there unless named.",
        ),
    ],
    place: Place,
) -> None:
    """Bring versions that `push` put somewhere into this machine's store; `promote` puts them into production.

    \b
      pull hazelnut /mnt/models
      pull hazelnut:VERSION,walnut:VERSION s3://bucket/models
    """
    from ood_runners.artifacts import pull_version

    wanted = list(filter(None, (name.strip() for name in names.split(","))))
    if not wanted:
        raise BadParameter("Name the products to pull, as hazelnut:VERSION,walnut:VERSION.")
    for name in wanted:
        typer.echo(short(str(pull_version(name, place))))


@app.command()
def prune(
    product: Annotated[str | None, typer.Option(help="Only this product.", show_default=False)] = None,
    keep: Annotated[int, typer.Option(help="How many of the newest versions of a product stay.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove old versions, and backbones that no version needs.

    The version in production and the one that a rollback would go to are kept whatever their age.
    """
    from ood_runners.artifacts import prune as prune_store

    pruned = prune_store(product, keep, dry_run=dry_run)
    for line in pruned.kept:
        typer.echo(f"kept: {line}", err=True)
    verb = "would remove" if dry_run else "removed"
    for tag in pruned.versions:
        typer.echo(f"{verb} {short(str(tag))}")
    for tag in pruned.backbones:
        typer.echo(f"{verb} {tag}")
    typer.echo(f"{verb} {pruned.size / 2**20:.1f} MB")
