"""The registry names each detector once, and importing it stays light."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from ood_runners.detectors import DETECTORS
from ood_runners.features import Features

HEAVY = ("torch", "sklearn", "scipy", "faiss", "openvino")


def test_names_and_parameters_round_trip() -> None:
    assert list(DETECTORS) == ["memory_bank", "mahalanobis", "vae", "softmax"]
    for name, detector in DETECTORS.items():
        made = detector()
        assert made.name == name and detector(**made.params()).params() == made.params()


def test_importing_and_scoring_need_no_torch_and_no_scikit_learn() -> None:
    code = "import sys, ood_runners.detectors; print(*[m for m in sys.argv[1:] if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_scoring_a_stored_detector_imports_no_scikit_learn(tmp_path) -> None:
    rng = np.random.default_rng(0)
    pooled = {"layer3": rng.normal(size=(20, 30)).astype(np.float32)}
    features, labels = Features(pooled=pooled), np.arange(20) % 2
    for name in ("mahalanobis", "softmax"):
        np.savez(tmp_path / f"{name}.npz", **DETECTORS[name]().fit(features, labels).to_arrays())
    code = (
        "import sys, numpy as np\nfrom ood_runners.detectors import DETECTORS\n"
        "from ood_runners.features import Features\n"
        "f = Features(pooled={'layer3': np.ones((2, 30), np.float32)})\n"
        "for name in ('mahalanobis', 'softmax'):\n"
        "    d = DETECTORS[name].from_arrays(np.load(f'{sys.argv[1]}/{name}.npz'), {})\n"
        "    assert len(d.score(f)) == 2\n"
        "print(*[m for m in sys.argv[2:] if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *HEAVY], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []
