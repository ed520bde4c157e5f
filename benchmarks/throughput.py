"""Pictures a second in one process: the backbone alone, a whole verdict by stage, and anomalib's PatchCore.

    python benchmarks/throughput.py                                         # some minutes
    python benchmarks/throughput.py --anomalib-python VENV/bin/python       # with the peer
    python benchmarks/throughput.py --device cuda                           # on a GPU: of its pure forward pass
    python benchmarks/throughput.py --quick                                 # a look at the script, no figures

A product with all four detectors is fitted on a folder, with a bank of 10 % of its patches, as anomalib's. The VAE
trains for seconds, since only its speed matters here. Every time is the median over many calls.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import numpy as np
import threadpoolctl
import typer
from common import (
    Peer,
    Weights,
    as_jpegs,
    auroc,
    choose_pictures,
    files_in,
    find_weights,
    fit_product,
    gemm_peak,
    heading,
    median_seconds,
    operations,
    show,
)
from numpy.typing import NDArray

from ood_runners.cores import available_cores

if TYPE_CHECKING:
    from ood_runners.artifacts import Stored
    from ood_runners.backbones import FeatureNetwork
    from ood_runners.features import Scores
    from ood_runners.pipeline import Product

BATCHES = (1, 8)
STAGES = ("decode and resize", "backbone", "memory_bank", "mahalanobis", "softmax", "vae", "judge")
CORESET = 0.1
PATCHES = 784  # of a picture of 224 px
BAR_BACKBONE, BAR_PEER = 0.70, 10.0


def verdict(product: Product, jpegs: Sequence[bytes], took: Callable[[str], None], known: dict[str, Scores]) -> None:
    """Judge a batch of JPEGs, with maps; `took` hears of each stage, and scores that are `known` are not computed."""
    from ood_runners import images
    from ood_runners.pipeline import score_all

    pictures = np.stack([images.decode_at(data, product.input_size)[0] for data in jpegs])
    took("decode and resize")
    assert product.own.network is not None
    features = product.own.network(pictures)
    took("backbone")
    scores = dict(known)
    for name, detector in product.own.detectors.items():
        if name in known:
            continue
        if name == "vae":
            scores |= score_all(None, {name: detector}, pictures)
        else:
            scores[name] = detector.score(features)
        took(name)
    product.calibration.judge(scores)
    product.anomaly_maps(scores, product.input_size)
    took("judge")


def verdicts(product: Product, jpegs: Sequence[bytes], seconds: float) -> dict[str, float]:
    """Median seconds of each stage of the verdicts, with maps, of a batch of JPEGs."""
    times: dict[str, list[float]] = defaultdict(list)

    def once() -> None:
        last = time.perf_counter()

        def took(stage: str) -> None:
            nonlocal last
            now = time.perf_counter()
            times[stage].append(now - last)
            last = now

        verdict(product, jpegs, took, {})

    median_seconds(once, seconds)
    return {stage: float(np.median(times[stage][1:])) for stage in STAGES if stage in times}  # the first warms up


@dataclass(frozen=True)
class Stream:
    """Pictures a second, and seconds of processor time a picture, with several at once."""

    rate: float
    cpu: float


def stream(work: Callable[[int], object], seconds: float, at_once: int) -> Stream:
    """Call `work` with 0, 1, … from `at_once` threads."""
    numbers = itertools.count()
    end = 0.0

    def call() -> int:
        done = 0
        while time.perf_counter() < end:
            work(next(numbers))
            done += 1
        return done

    work(next(numbers))
    with ThreadPoolExecutor(at_once) as pool:
        start, used = time.perf_counter(), time.process_time()
        end = start + seconds
        count = sum(one.result() for one in [pool.submit(call) for _ in range(at_once)])
        return Stream(count / (time.perf_counter() - start), (time.process_time() - used) / count)


def streams(
    product: Product, pure: FeatureNetwork, jpegs: Sequence[bytes], seconds: float
) -> dict[int, dict[str, Stream]]:
    """The pure backbone and whole verdicts without the VAE, one and two for each core at once, in turns: the best."""
    from ood_runners import images

    pictures = [images.decode_at(data, product.input_size)[0][np.newaxis] for data in jpegs]
    known = [vae_scores(product, [one]) for one in jpegs]

    def whole(number: int) -> None:
        i = number % len(jpegs)
        verdict(product, [jpegs[i]], lambda stage: None, known[i])

    def alone(number: int) -> None:
        pure(pictures[number % len(pictures)])

    works = {"pure": alone, "whole": whole}
    numbers = [available_cores(), 2 * available_cores()]
    found: dict[tuple[int, str], list[Stream]] = defaultdict(list)
    for _, at_once, name in itertools.product(range(3), numbers, works):
        found[at_once, name].append(stream(works[name], seconds, at_once))
    return {
        at_once: {
            name: Stream(max(one.rate for one in found[at_once, name]), min(one.cpu for one in found[at_once, name]))
            for name in works
        }
        for at_once in numbers
    }


def vae_scores(product: Product, jpegs: Sequence[bytes]) -> dict[str, Scores]:
    """The VAE's scores of JPEGs, by its name."""
    from ood_runners import images
    from ood_runners.pipeline import score_all

    vae = {name: one for name, one in product.own.detectors.items() if name == "vae"}
    return score_all(None, vae, np.stack([images.decode_at(data, product.input_size)[0] for data in jpegs]))


def backbones(stored: Stored, product: Product) -> dict[str, tuple[FeatureNetwork, int]]:
    """The backbone alone and its operations a picture, by name."""
    import openvino as ov

    from ood_runners.backbones import FeatureNetwork
    from ood_runners.backbones.openvino_engine import build_graph, read_graph
    from ood_runners.backbones.runtime import Tapping
    from ood_runners.backbones.spec import GRAPH_FILE

    wanted = stored.manifest.features
    layers = tuple(dict.fromkeys((*wanted.patch_layers, *wanted.pooled_layers)))
    graphs = {"float32": stored.backbone_path / GRAPH_FILE}
    if (stored.path / GRAPH_FILE).is_file():
        graphs["int8"] = stored.path / GRAPH_FILE
    found = {}
    for precision, graph in graphs.items():
        # Pooled features stand for their layers: the network computes them, and hands out little.
        for name, pooled, logits in (("as tapped", layers, wanted.logits), ("to layer3", ("layer2", "layer3"), False)):
            network = FeatureNetwork.load(
                stored.backbone_path,
                size=product.input_size,
                pooled_layers=pooled,
                logits=logits,
                device="cpu",
                graph=graph,
            )
            tapping = Tapping(product.input_size, (), pooled, logits, None, 1)
            model = build_graph(read_graph(graph, product.input_size), network.info, tapping)
            model.reshape(ov.PartialShape([1, *product.input_size, 3]))
            found[f"backbone {precision}, {name}"] = (network, operations(model))
    return found


def alone(network: FeatureNetwork, batch: int, seconds: float) -> float:
    """Pictures a second of a network in one batch after the other."""
    pictures = np.random.default_rng(0).integers(0, 256, (batch, *network.size, 3), np.uint8)
    return batch / median_seconds(lambda: network(pictures), seconds)


def scores_of(product: Product, files: Sequence[Path]) -> NDArray[np.float64]:
    """Fused scores of pictures in files."""
    from ood_runners import images

    found = []
    for file in files:
        found += product.judge(images.resize(images.read(file), product.input_size)[np.newaxis])
    return np.array([one.score for one in found])


def with_peer(
    peer: Peer, folder: Path, weights: Weights, jpegs: Sequence[bytes], scratch: Path, seconds: float
) -> dict[int, float]:
    """Pictures a second of anomalib's TorchInferencer by batch size, fitted on the same folder."""
    fitted, wall = peer.run("fit", folder=str(folder), weights=str(weights.path))
    print(f"anomalib: {fitted['entries']:,} entries, fitted in {fitted['fit']:.1f} s ({wall:.1f} s with imports)")
    sent = scratch / "jpegs"
    sent.mkdir()
    for i, data in enumerate(jpegs):
        (sent / f"{i:03}.jpg").write_bytes(data)
    return {
        batch: 1 / peer.run("rate", pictures=str(sent), seconds=max(seconds, 0.1), batch=batch)[0]["seconds"]
        for batch in BATCHES
    }


def compare_auroc(peer: Peer, product: Product, folder: Path, most: int) -> tuple[float, float]:
    """AUROC of the product's fused score and of anomalib's on at most `most` test pictures of each kind."""
    test = folder / "test"
    normal = files_in(test / "good")[:most]
    strange = [file for file in files_in(test) if file.parent.name != "good"][:most]
    theirs = peer.run("rank", normal=[*map(str, normal)], strange=[*map(str, strange)])[0]
    ours = auroc(scores_of(product, normal), scores_of(product, strange))
    return ours, auroc(np.array(theirs["normal"]), np.array(theirs["strange"]))


def main(
    seconds: Annotated[float, typer.Option(help="of each measurement")] = 5.0,
    data: Annotated[Path | None, typer.Option(help="a folder in MVTec's layout; ball_screws or a made one")] = None,
    precision: Annotated[str, typer.Option(help="of the product's backbone: int8 or float32")] = "int8",
    device: Annotated[
        str, typer.Option(help="cpu, or cuda: the product's network there, in float32's precision")
    ] = "cpu",
    anomalib_python: Annotated[str | None, typer.Option(help="an interpreter that has anomalib")] = None,
    most: Annotated[int, typer.Option(help="test pictures of each kind for AUROC beside anomalib's; 0: none")] = 60,
    quick: Annotated[bool, typer.Option(help="few pictures and short times: for a look at the script")] = False,
) -> None:
    """Measure pictures a second in one process."""
    seconds = 0.2 if quick else seconds
    with TemporaryDirectory(prefix="throughput-") as name:
        scratch = Path(name)
        home = scratch / "store"
        os.environ["BENTOML_HOME"] = str(home)  # before anything imports BentoML
        weights = find_weights(scratch)
        folder, what = choose_pictures(data, scratch, 12 if quick else 209)
        heading(weights.what, what)
        bank = round(CORESET * PATCHES * len(files_in(folder / "train")))
        precision = "float32" if device == "cuda" else precision
        options = {"bank": bank, "brief_vae": True, "precision": precision, "device": device}
        fitted = fit_product(folder, home, "parts", weights, **options)
        from ood_runners.artifacts import read_version
        from ood_runners.pipeline import Product

        stored = read_version(fitted.tag)
        product = Product.open(stored, device)
        threadpoolctl.threadpool_limits(1, user_api="blas")  # as where pictures are served
        print(f"bank of {bank:,} entries, {precision}; each measurement {seconds:g} s")
        jpegs = as_jpegs(files_in(folder / "test"))
        if device == "cuda":
            import gpu_rates

            known = vae_scores(product, [jpegs[i % len(jpegs)] for i in range(max(gpu_rates.BATCHES))])

            def judge(given: Sequence[bytes]) -> None:
                first = {name: one[np.arange(len(given))] for name, one in known.items()}
                verdict(product, given, lambda stage: None, first)

            gpu_rates.report(stored, judge, jpegs, seconds)
        peak = gemm_peak(seconds)
        networks = backbones(stored, product)
        pure = {
            batch: {name: (alone(network, batch, seconds), count) for name, (network, count) in networks.items()}
            for batch in BATCHES
        }
        stages = {batch: verdicts(product, [jpegs[i % len(jpegs)] for i in range(batch)], seconds) for batch in BATCHES}
        report(peak, pure, stages, precision)
        tapped = networks.get(f"backbone {precision}, as tapped") if device == "cpu" else None
        if tapped is not None:
            together = streams(product, tapped[0], jpegs, seconds)
            report_streams(together, precision)
        peer = Peer.find(anomalib_python, scratch / "anomalib")
        if peer is not None:
            rates = with_peer(peer, folder, weights, jpegs, scratch, seconds)
            best = [batch / without_vae(stages[batch]) for batch in BATCHES]
            best += [one["whole"].rate for one in together.values()] if tapped is not None else []
            rows = [[f"anomalib, batch {batch}", f"{rate:.2f}"] for batch, rate in rates.items()]
            show("anomalib's TorchInferencer in process, JPEG in", ["", "pictures/s"], rows)
            ratio = max(best) / max(rates.values())
            print(f"whole verdict / anomalib, each at its best: {ratio:.1f} (bar {BAR_PEER:g})")
            if most:
                ours, theirs = compare_auroc(peer, product, folder, 4 if quick else most)
                print(f"image AUROC on the same test pictures: {ours:.3f}, anomalib {theirs:.3f}")


def without_vae(stages: dict[str, float]) -> float:
    """Seconds of all stages but the VAE's."""
    return sum(value for stage, value in stages.items() if stage != "vae")


def report(
    peak: float,
    pure: dict[int, dict[str, tuple[float, int]]],
    stages: dict[int, dict[str, float]],
    precision: str,
) -> None:
    """Print rates, stages and ratios."""
    print(f"float32 matrix product: {peak / 1e9:.0f} GFLOP/s")
    columns = ["", *(f"pictures/s, batch {batch}" for batch in pure), "GFLOP a picture", "of the float32 peak"]
    rows = []
    for name, (_, count) in next(iter(pure.values())).items():
        rates = [found[name][0] for found in pure.values()]
        share = max(rates) * count / peak
        rows.append([name, *(f"{rate:.1f}" for rate in rates), f"{count / 1e9:.2f}", f"{share:.0%}"])
    kinds: list[tuple[str, Callable[[dict[str, float]], float]]] = [
        ("whole verdict, without the VAE", without_vae),
        ("whole verdict, with the VAE", lambda times: sum(times.values())),
    ]
    for name, total in kinds:
        rows.append([name, *(f"{batch / total(times):.1f}" for batch, times in stages.items()), "", ""])
    show("Pictures a second", columns, rows)
    columns = ["stage", *(f"{part}, batch {batch}" for batch in stages for part in ("ms a picture", "share"))]
    rows = []
    for stage in next(iter(stages.values())):
        row = [stage]
        for batch, times in stages.items():
            row += [f"{times[stage] / batch * 1000:.2f}", f"{times[stage] / sum(times.values()):.0%}"]
        rows.append(row)
    show("Where the time goes", columns, rows)
    for batch, times in stages.items():
        rate = batch / without_vae(times)
        tapped = pure[batch].get(f"backbone {precision}, as tapped")
        if tapped is not None:
            print(
                f"batch {batch}, one after the other: whole verdict / pure {precision} backbone: {rate / tapped[0]:.2f}"
            )
        print(f"batch {batch}: the VAE takes {times.get('vae', 0) / sum(times.values()):.0%} of the time with it")


def report_streams(found: dict[int, dict[str, Stream]], precision: str) -> None:
    """Print rates, processor time and their ratios."""
    bar = f" (bar {BAR_BACKBONE:.2f})" if precision == "int8" else ""
    rows = []
    for at_once, one in found.items():
        whole, pure = one["whole"], one["pure"]
        rows += [
            [f"backbone {precision}, as tapped, {at_once} at once", f"{pure.rate:.1f}", f"{1000 * pure.cpu:.1f}"],
            [f"whole verdict, without the VAE, {at_once} at once", f"{whole.rate:.1f}", f"{1000 * whole.cpu:.1f}"],
        ]
    show("Several pictures at once", ["", "pictures/s", "ms of processor time a picture"], rows)
    for at_once, one in found.items():
        ratio, cpu = one["whole"].rate / one["pure"].rate, one["pure"].cpu / one["whole"].cpu
        print(f"{at_once} at once: whole verdict / pure {precision} backbone: {ratio:.2f}{bar}")
        print(f"{at_once} at once, the same by processor time: {cpu:.2f}")


if __name__ == "__main__":
    typer.run(main)
