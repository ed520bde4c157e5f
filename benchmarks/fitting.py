"""One fit in a process of its own, so that its memory can be told from others'; run by the benchmarks of speed.

    BENTOML_HOME=STORE python benchmarks/fitting.py '{"folder": "DATA", "product": "parts", …}'

The options are those of `ood_runners.training.fit.fit`, with `bank`, the entries of the memory bank, and `brief_vae`,
which has the VAE train for seconds, as where only its speed matters. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from peak_memory import OwnMemory, peak_memory

from ood_runners.training.fit import fit
from ood_runners.training.progress import progress_for


def main(options: dict[str, Any]) -> None:
    own = OwnMemory()
    if "bank" in options:
        options["bank_size"] = options.pop("bank")
    if options.pop("brief_vae", False):
        from ood_runners.detectors import vae_network  # imports torch, which is not to count where nothing else does

        vae_network.EPOCHS, vae_network.STEPS_PER_EPOCH = 2, 8
    folder, weights = Path(options.pop("folder")), Path(options.pop("weights"))
    if "size" in options:
        options["size"] = tuple(options["size"])
    result = fit(folder, weights=weights, progress=progress_for(), **options)
    seconds = result.manifest.cost["seconds"]
    print(json.dumps({"tag": result.tag, "seconds": seconds, "peak": peak_memory(), "own": own.peak}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
