"""What a person is told of a fitted version."""

from __future__ import annotations

from ood_runners.artifacts import Manifest
from ood_runners.calibration import needed_for
from ood_runners.detectors import MemoryBank
from ood_runners.training import contamination as contaminated


def advice(manifest: Manifest) -> list[str]:
    """What to look at, and what the false-alarm rate rests on."""
    calibration, data = manifest.calibration, manifest.data
    lines = [f"Skipped {one.path}: {one.reason}" for one in data.skipped]
    lines += contaminated.notes(data.left_out, calibration.n, calibration.alpha)
    lines += [
        f"Look at {path}: it is unlike all other training pictures. If it is not normal, remove it and fit again; "
        "while it counts as normal, so do pictures as strange as it is."
        for path in data.suspects
    ]
    attained = calibration.alpha
    if attained > calibration.alpha_requested:
        lines.append(
            f"alpha is {attained:.4g}, not {calibration.alpha_requested:g}: {calibration.n} normal pictures decide no "
            f"finer; {needed_for(calibration.alpha_requested)} are needed."
        )
    bound, needed = calibration.certificate["bound"], calibration.certificate["n_needed"]
    lines.append(
        f"Of new normal pictures like these, at most {attained:.2%} on average are called anomalous; with 95 % "
        f"confidence in this very set, at most {bound:.2%} ({needed} pictures would certify {attained:.2%})."
    )
    return lines


def cost_of(manifest: Manifest) -> list[str]:
    """What a picture and the files take, and whether that is more than was asked for."""
    cost, bank = manifest.cost, manifest.detectors.get(MemoryBank.name)
    facts = "" if bank is None else f"; {bank.info['entries']} entries in the memory bank ({bank.info['search']})"
    lines = [f"A verdict takes {cost['ms']:.1f} ms here, from pixels on, and the files {cost['mb']:.1f} MB{facts}."]
    for unit, allowed in cost.get("budget", {}).items():
        if allowed is not None and cost[unit] > allowed:
            lines.append(f"That is more than the budget of {allowed:g} {unit}: this machine was busier than before.")
    return lines
