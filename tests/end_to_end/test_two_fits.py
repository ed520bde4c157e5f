"""Two fits of one product at the same time, as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ood_runners import artifacts
from tests.end_to_end.conftest import COMMAND_LINE, draw, encode
from tests.end_to_end.test_live_versions import store_of


def test_two_fits_of_one_product_at_once_are_two_sound_versions(tmp_path: Path) -> None:
    pictures, home = tmp_path / "pictures", tmp_path / "home"
    for folder in (pictures, home):
        folder.mkdir()
    for seed in range(12):
        (pictures / f"{seed:03}.png").write_bytes(encode(draw(seed)))
    options = ["--backbone", "efficientnet_lite0", "--size", "96", "--alpha", "0.2", "--detectors", "mahalanobis"]
    command = [sys.executable, "-c", COMMAND_LINE, "fit", str(pictures), "--product", "bolts", *options]
    environment = os.environ | {"BENTOML_HOME": str(home), "OMP_NUM_THREADS": "1"}
    fits = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [fit.communicate(timeout=200) for fit in fits]
    assert [fit.returncode for fit in fits] == [0, 0], printed
    tags = {out.splitlines()[-1].removeprefix("ood-") for out, _ in printed}
    with store_of(home):
        lines = artifacts.list_versions("bolts")
        assert {f"bolts:{line.version}" for line in lines} == tags
        assert len(tags) == 2
        for line in lines:
            assert line.problem is None
            artifacts.read_version(line.tag)
        assert f"bolts:{artifacts.production('bolts')}" in tags
        moves = artifacts.history("bolts")
        assert [move.came_from for move in moves] == [None, *(move.to for move in moves[:-1])]
    assert list(home.glob("ood-staging/*")) == []
    assert len(list(home.glob("models/ood-backbone-*/[0-9a-f]*"))) == 1  # neither fit found one there
