"""Pictures a second and latencies over HTTP: the graph of runners, the fused profile, and anomalib behind BentoML.

    python benchmarks/serving.py                                        # some minutes
    python benchmarks/serving.py --anomalib-python VENV/bin/python      # with the peer
    python benchmarks/serving.py --quick                                # a look at the script, no figures

The clients are Locust's, in this process on the same machine: the share of a core that they take is printed beside
what they measured. Each server starts anew, is warmed up, and answers one number of clients after the other.
"""

from __future__ import annotations

from http_load import send  # first: it makes the standard library cooperative

# isort: split
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import psutil
import typer
from common import ROOT, Peer, as_jpegs, choose_pictures, files_in, find_weights, fit_product, heading, serving, show

CORESET, PATCHES = 0.1, 784
ENDLESS = 10**9  # requests: the time ends a measurement
BAR_PEER, BAR_GRAPH = 10.0, 0.5


@dataclass(frozen=True)
class Measured:
    """What came of some clients' requests; latencies in milliseconds, `generator` in cores."""

    clients: int
    rate: float
    p50: float
    p99: float
    failures: int
    refused: int
    generator: float

    def row(self, name: str) -> list[str]:
        """For the table."""
        figures = f"{self.rate:.1f}", f"{self.p50:.0f}", f"{self.p99:.0f}"
        return [name, str(self.clients), *figures, str(self.failures), str(self.refused), f"{self.generator:.2f}"]


COLUMNS = ["server", "clients", "pictures/s", "p50 ms", "p99 ms", "failures", "refused", "generator, cores"]


def measure(url: str, jpegs: list[bytes], product: str, clients: int, seconds: float) -> Measured:
    """Send for `seconds` after a third of them to warm up."""
    send(url, jpegs, product, ENDLESS, clients, seconds / 3)
    used, start = sum(psutil.Process().cpu_times()[:2]), time.perf_counter()
    stats, refused = send(url, jpegs, product, ENDLESS, clients, seconds)
    cores = (sum(psutil.Process().cpu_times()[:2]) - used) / (time.perf_counter() - start)
    taken = stats.get("/detect", "POST")
    passed = max((stats.total.last_request_timestamp or 0) - stats.total.start_time, 1e-9)
    answered = taken.num_requests - taken.num_failures
    p50, p99 = (float(taken.get_response_time_percentile(share) or 0) for share in (0.5, 0.99))
    found = Measured(clients, answered / passed, p50, p99, stats.total.num_failures, refused, cores)
    print(f"{clients} clients: {found.rate:.1f} pictures/s, p50 {p50:.0f} ms, p99 {p99:.0f} ms", flush=True)
    return found


def main(
    seconds: Annotated[float, typer.Option(help="of each measurement, after a third of it to warm up")] = 15.0,
    clients: Annotated[str, typer.Option(help="how many at the same time, one number after the other")] = "1,8,32,128",
    profiles: Annotated[str, typer.Option(help="graph, fused, or both")] = "graph,fused",
    gateways: Annotated[str, typer.Option(help="processes of the gateway, one number after the other")] = "1",
    data: Annotated[Path | None, typer.Option(help="a folder in MVTec's layout; ball_screws or a made one")] = None,
    precision: Annotated[str, typer.Option(help="of the product's backbone: int8 or float32")] = "int8",
    vae: Annotated[bool, typer.Option(help="a product with the VAE as well")] = False,
    anomalib_python: Annotated[str | None, typer.Option(help="an interpreter that has anomalib and bentoml")] = None,
    anomalib_openvino: Annotated[bool, typer.Option(help="measure its OpenVINO export too; needs onnx there")] = False,
    anomalib_drawn: Annotated[bool, typer.Option(help="draw its coreset: its own choice takes up to an hour")] = False,
    quick: Annotated[bool, typer.Option(help="few pictures and short times: for a look at the script")] = False,
) -> None:
    """Measure pictures a second and latencies over HTTP."""
    numbers = [1, 4] if quick else [int(number) for number in clients.split(",")]
    seconds = 1.0 if quick else seconds
    detectors = ["memory_bank", "mahalanobis", *(["vae"] if vae else []), "softmax"]
    with TemporaryDirectory(prefix="serving-") as name:
        scratch = Path(name)
        home, log = scratch / "store", scratch / "server.log"
        weights = find_weights(scratch)
        folder, what = choose_pictures(data, scratch, 12 if quick else 209)
        heading(weights.what, what)
        bank = round(CORESET * PATCHES * len(files_in(folder / "train")))
        options = {"bank": bank, "brief_vae": True, "precision": precision, "detectors": detectors}
        fit_product(folder, home, "parts", weights, **options)
        jpegs = as_jpegs(files_in(folder / "test"))
        print(f"{', '.join(detectors)}; bank of {bank:,} entries; {precision}; {len(jpegs)} JPEGs of 512 px; Locust")
        found: dict[str, list[Measured]] = {}
        for profile, many in itertools.product(profiles.split(","), gateways.split(",")):
            server = profile if many == "1" else f"{profile}, {many} gateways"
            print(f"{server}:", flush=True)
            with serving(home, log, f"profile={profile}", f"gateways={many}") as (url, _):
                found[server] = [measure(url, jpegs, "parts", number, seconds) for number in numbers]
            print("\n".join(line for line in log.read_text().splitlines() if "the network computes in" in line))
        alone = 0.0
        peer = Peer.find(anomalib_python, scratch / "anomalib")
        if peer is not None:
            peer.run(
                "fit", folder=str(folder), weights=str(weights.path), openvino=anomalib_openvino, drawn=anomalib_drawn
            )
            sent = scratch / "jpegs"
            sent.mkdir()
            for i, jpeg in enumerate(jpegs):
                (sent / f"{i:03}.jpg").write_bytes(jpeg)
            alone = 1 / peer.run("rate", pictures=str(sent), seconds=seconds)[0]["seconds"]
            for kind in ["torch", *(["openvino"] if anomalib_openvino else [])]:
                print(f"anomalib ({kind}):", flush=True)
                found[f"anomalib ({kind})"] = behind_bentoml(peer, home, log, kind, jpegs, numbers, seconds)
        rows = [one.row(name) for name, measured in found.items() for one in measured]
        show("Over HTTP", COLUMNS, rows)
        ratios(found, alone)


def behind_bentoml(
    peer: Peer, home: Path, log: Path, kind: str, jpegs: list[bytes], numbers: list[int], seconds: float
) -> list[Measured]:
    """The peer behind the smallest BentoML service."""
    more = {"ANOMALIB_MODEL": str(peer.out), "ANOMALIB_OPENVINO": str(int(kind == "openvino"))}
    more |= {"PYTHONPATH": str(ROOT / "benchmarks"), "PYTHONWARNINGS": "ignore"}
    target, folder = ["anomalib_service:AnomalibPeer"], ROOT / "benchmarks"
    with serving(home, log, python=peer.python, target=target, folder=folder, more=more) as (url, _):
        return [measure(url, jpegs, "parts", number, seconds) for number in numbers if number <= 32]


def ratios(found: dict[str, list[Measured]], alone: float) -> None:
    """Print what the profiles' best rates are to each other and to anomalib in process."""
    best = {name: max(one.rate for one in measured) for name, measured in found.items()}
    if {"graph", "fused"} <= set(best) and best["fused"]:
        print(
            f"graph / fused, each at its best number of clients: {best['graph'] / best['fused']:.2f} (bar {BAR_GRAPH})"
        )
    if alone and "fused" in best:
        print(f"anomalib's TorchInferencer in process: {alone:.2f} pictures/s")
        print(f"fused over HTTP / anomalib in process: {best['fused'] / alone:.1f} (bar {BAR_PEER:g})")


if __name__ == "__main__":
    typer.run(main)
