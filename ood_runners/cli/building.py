"""Fit and evaluate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ood_runners.cli.app import app, short
from ood_runners.cli.interrupts import Interruptible
from ood_runners.sizes import parse_size
from ood_runners.training.progress import progress_for

Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help=(
            "A folder of pictures, MVTec's layout (train/good, test/*, ground_truth/*), or class folders "
            "(train/<class>/…)."
        ),
        show_default=False,
    ),
]


def _parse_alpha(value: float | None) -> float | None:
    if value is not None and not 0 < value < 1:
        raise typer.BadParameter("alpha is a false-alarm rate between 0 and 1, such as 0.01.")
    return value


Alpha = Annotated[
    float | None,
    typer.Option(callback=_parse_alpha, help="Another false-alarm rate than the product's own.", show_default=False),
]


@app.command()
def fit(
    data: Data,
    product: Annotated[str, typer.Option(help="What the version is fitted for, e.g. hazelnut.", show_default=False)],
    backbone: Annotated[
        str,
        typer.Option(
            help="resnet50, resnet50_v1, wide_resnet50_2, resnet18, efficientnet_lite0 (needs no download), or auto."
        ),
    ] = "resnet50",
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A state dict (.safetensors or .pth), such as your own classifier's; ImageNet's otherwise.",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(callback=_parse_alpha, help="The share of normal pictures that may be called anomalous.")
    ] = 0.01,
    profile: Annotated[
        str,
        typer.Option(
            help=(
                "fast: a small memory bank, no VAE. balanced. accurate: a larger bank. Options "
                "beside it go first. (Not the profile that `bentoml serve --arg` takes: that one is of processes.)"
            )
        ),
    ] = "balanced",
    size: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS",
            help="What pictures are resized to: 224, or HEIGHTxWIDTH; the profile's otherwise.",
            show_default=False,
        ),
    ] = None,
    detectors: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Some of memory_bank,mahalanobis,vae,softmax; all that profile and weights allow otherwise.",
            show_default=False,
        ),
    ] = None,
    bank_size: Annotated[
        int | None,
        typer.Option(min=1, help="Entries of the memory bank, at most; the profile's otherwise.", show_default=False),
    ] = None,
    search: Annotated[
        str,
        typer.Option(
            help=(
                "How the memory bank is searched: exact, int8, pq, ivf, hnsw, lsh, or auto, by its size. What finds "
                "fewer than 99 % of the nearest entries is replaced by the exact search."
            )
        ),
    ] = "auto",
    budget_ms: Annotated[
        float | None,
        typer.Option(
            metavar="MS",
            help="Choose the bank so that a verdict takes at most this on this machine, from pixels on.",
            show_default=False,
        ),
    ] = None,
    budget_mb: Annotated[
        float | None,
        typer.Option(
            metavar="MB",
            help="Choose the bank so that the version's files take at most this, beside the backbone's own.",
            show_default=False,
        ),
    ] = None,
    head: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=(
                "How softmax scores: msp, max_logit, energy, gen, vim, relative_mahalanobis, knn, react, scale; "
                "or auto: several of them together."
            ),
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Same seed, same version.")] = 0,
    promote: Annotated[bool, typer.Option(help="Put the new version into production.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="Of the backbone: float32; int8, faster on a CPU; auto takes int8 where it is as good.")
    ] = "auto",
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BACKBONE[@SIZE][=FILE]",
            help=(
                "Another network, with weights of a file or its default ones, or the same one on smaller pictures: "
                "its memory bank and Gaussians have a say too. May be given several times; each takes its time."
            ),
            show_default=False,
        ),
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(
            metavar="light",
            help="Fit on each picture 15 % darker and brighter as well: fewer false alarms under other light.",
            show_default=False,
        ),
    ] = None,
    contamination: Annotated[
        str,
        typer.Option(
            metavar="auto|none",
            help=(
                "auto leaves out training pictures that look unlike all others, such as defects among them, and lists "
                "them; none keeps all."
            ),
        ),
    ] = "auto",
    defects: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help=(
                "Pictures of known defects, in it or in its folders, that the memory bank learns from what to look at, "
                "if that finds more of them. Do not evaluate on these."
            ),
            show_default=False,
        ),
    ] = None,
) -> None:
    """Fit a new version of a product from a folder of normal pictures, and put it into production.

    The last line printed is the tag of the version. A fit that fails or is interrupted leaves the store as it was.

    \b
      fit photos/hazelnut --product hazelnut
      fit photos/hazelnut --product hazelnut --alpha 0.05 --no-promote
      fit photos/hazelnut --product hazelnut --profile fast --budget-ms 25
      fit photos/hazelnut --product hazelnut --size 320 --also resnet50@224 --also efficientnet_lite0@224
      fit photos --product lab --weights classifier.safetensors --detectors softmax,mahalanobis
    """
    pixels = None if size is None else parse_size(size)
    from ood_runners.training.fit import fit as fit_product

    if backbone == "auto":
        from ood_runners.backbones import auto_backbone  # imports torch, which takes seconds

        backbone, why = auto_backbone()
        typer.echo(why)
    result = fit_product(
        data,
        product=product,
        backbone=backbone,
        weights=weights,
        alpha=alpha,
        profile=profile,
        size=pixels,
        bank_size=bank_size,
        search=search,
        budget_ms=budget_ms,
        budget_mb=budget_mb,
        detectors=[name.strip() for name in detectors.split(",")] if detectors else None,
        head=head,
        seed=seed,
        promote=promote,
        device=device,
        precision=precision,
        augment=augment,
        contamination=contamination,
        defects=defects,
        also=also or (),
        progress=Interruptible(progress_for()),
    )
    for line in result.lines:
        typer.echo(line)
    typer.echo(short(result.tag))


@app.command()
def evaluate(
    data: Data,
    product: Annotated[
        str, typer.Option(metavar="NAME[:VERSION]", help="The version in production unless named.", show_default=False)
    ],
    alpha: Alpha = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the metrics here.", show_default=False)
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page with curves and pictures here.", show_default=False),
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one CSV row a picture here.", show_default=False)
    ] = None,
    learning_curve: Annotated[
        bool, typer.Option("--learning-curve", help="Report too how many normal pictures are enough.")
    ] = False,
    robustness: Annotated[
        bool,
        typer.Option("--robustness", help="Report too what other light or another camera does to normal pictures."),
    ] = False,
) -> None:
    """Judge a folder's test pictures and report how well the version tells normal from anomalous.

    \b
      evaluate photos/hazelnut --product hazelnut --html report.html
      evaluate photos/hazelnut --product hazelnut:VERSION --json metrics.json --scores scores.csv
      evaluate photos/hazelnut --product hazelnut --learning-curve --robustness --html report.html
    """
    for file in filter(None, (json, html, scores)):
        if not file.parent.is_dir():  # said now, not after minutes of work
            raise typer.BadParameter(f"there is no folder {file.parent} to write {file.name} into.")
    from ood_runners.artifacts import read_version
    from ood_runners.pipeline import Product
    from ood_runners.training.datasets import discover
    from ood_runners.training.evaluate import evaluate as evaluate_product

    dataset = discover(data)
    opened = Product.open(read_version(product))
    progress = Interruptible(progress_for())
    evaluation = evaluate_product(opened, dataset, alpha=alpha, progress=progress)
    if learning_curve:
        from ood_runners.training.learning import learning_curve as measure_learning

        evaluation = replace(evaluation, learning=measure_learning(opened, dataset, progress=progress))
    if robustness:
        from ood_runners.training.robustness import robustness as measure_robustness

        found = measure_robustness(opened, dataset, alpha=evaluation.alpha, progress=progress)
        evaluation = replace(evaluation, robustness=found)
    for line in evaluation.lines():
        typer.echo(line)
    if json is not None:
        json.write_text(evaluation.to_json(), encoding="utf-8")
    if scores is not None:
        evaluation.write_scores(scores)
    if html is not None:
        from ood_runners.training.report import write_report

        write_report(evaluation, html, opened)
    for made in filter(None, (json, scores, html)):
        typer.echo(made)
