"""Pictures against their reconstruction: the detector of wrong layout, colour and missing pieces.

References
----------
Kingma, Welling: Auto-Encoding Variational Bayes, ICLR 2014.
Bergmann et al.: Improving Unsupervised Defect Segmentation by Applying Structural Similarity to Autoencoders, 2019.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ood_runners.backbones.runtime import choose_device
from ood_runners.cores import available_cores
from ood_runners.detectors.base import Detector, Probes, top_mean
from ood_runners.errors import ArtifactError, DataError
from ood_runners.features import Features, Scores
from ood_runners.inference import CPUNetwork

MIN_PICTURES = 2  # one to learn from and one to hold out
SCORE_CHUNK = 32
WEIGHTS_PREFIX = "weights."

ProgressHook = Callable[[int, int, float], None]


class Engine(Protocol):
    """One device's way to compute the map; safe to call from several threads."""

    def __call__(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (n, H, W, 3) to float32 (n, h, w)."""
        ...


class Vae(Detector):
    """Error of a variational autoencoder's reconstruction, set against the errors usual at each position.

    The network sees pictures reduced to about 96 pixels on the short side and paints them anew from a short code
    that it learned from normal pictures (see `vae_network`), so that what does not belong is missing from the
    reconstruction. The map is the mean of four local differences (of colour, fine and coarse, of
    hue, and of structure, 1 - SSIM), each in standard deviations of that difference on normal pictures that were held
    out from training; the image score is the mean of its top 1 %.

    Parameters
    ----------
    latent : length of the code
    seed : of the initial weights, the held-out pictures and the order of training; on a CPU a fit is reproducible

    Attributes
    ----------
    arrays_ : the fitted state, see `to_arrays`
    device : "auto", "cpu" or "cuda"; where to train and score. Set it before ``fit`` or the first ``score``.
    threads : CPU threads; all cores if None
    progress : called after each epoch of a fit with its number from 1, the most there will be (in
        ``fit_held_out``: of all its fits together) and the loss; what it raises ends the fit
    """

    name = "vae"
    localises = True

    def __init__(self, *, latent: int = 32, seed: int = 0) -> None:
        self.latent = latent
        self.seed = seed
        self.device = "auto"
        self.threads: int | None = None
        self.progress: ProgressHook | None = None
        self._engine: Engine | None = None
        self._lock = threading.Lock()

    def params(self) -> dict[str, Any]:
        """``latent`` and ``seed``."""
        return {"latent": self.latent, "seed": self.seed}

    def fit(self, features: Features, labels: NDArray[np.int64] | None = None) -> Self:
        """Train on ``pictures`` uint8 (n, H, W, 3), n >= 2, read in chunks and at most 2,000 of them."""
        pictures = _pictures(features)
        return self._fit(pictures, np.arange(len(pictures)), self.progress)

    def fit_held_out(
        self,
        features: Features,
        folds: NDArray[np.int64],
        labels: NDArray[np.int64] | None = None,
        *,
        probes: Probes | None = None,
    ) -> Scores:
        """As the base class says, without copies of the pictures and with one count of epochs for all the fits."""
        pictures = _pictures(features)
        numbers = np.unique(folds)
        parts: list[Scores] = []
        order: list[NDArray[np.int64]] = []
        for k, fold in enumerate(numbers):
            rest = type(self)(**self.params())
            rest.device, rest.threads = self.device, self.threads
            rest._fit(pictures, np.flatnonzero(folds != fold), self._share(k, len(numbers) + 1))
            order.append(np.flatnonzero(folds == fold))
            parts.append(rest._score(pictures, order[-1]))
            if probes is not None and len(made := probes.of(folds, fold)):
                parts.append(rest._score(_pictures(probes.features), made))
                order.append(len(pictures) + made)
        self._fit(pictures, np.arange(len(pictures)), self._share(len(numbers), len(numbers) + 1))
        return Scores.concatenate(parts)[np.argsort(np.concatenate(order))]

    def score(self, features: Features) -> Scores:
        """Maps float32 (n, h, w) in standard deviations (0 = usual for a normal picture) and their top means."""
        pictures = _pictures(features)
        return self._score(pictures, np.arange(len(pictures)))

    def open(self) -> None:
        """Compile the network, for the ``device`` set by then."""
        self._opened()

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """``size`` int64 (2,), ``network_xml`` and ``network_bin`` uint8 (OpenVINO IR), ``weights.<name>`` float32."""
        return dict(self.arrays_)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Self:
        """A fitted detector; its network is compiled by ``open`` or the first ``score``."""
        absent = {"size", "network_xml", "network_bin", "weights.centre"} - set(arrays)
        if absent:
            raise ArtifactError(f"The stored vae has no {', '.join(sorted(absent))}; fit the product again.")
        detector = cls(**params)
        detector.arrays_ = dict(arrays)
        return detector

    def _share(self, k: int, fits: int) -> ProgressHook | None:
        """The hook of the k-th of several fits, counting on from where those before it would end."""
        hook = self.progress
        if hook is None:
            return None
        return lambda epoch, epochs, loss: hook(k * epochs + epoch, fits * epochs, loss)

    def _fit(self, pictures: NDArray[np.uint8], rows: NDArray[np.int64], progress: ProgressHook | None) -> Self:
        if len(rows) < MIN_PICTURES:
            raise DataError(f"The vae needs at least {MIN_PICTURES} pictures to fit and got {len(rows)}; add more.")
        import torch

        from ood_runners.detectors import vae_network

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or available_cores())
        try:
            module = vae_network.fit(pictures, rows, self.latent, self.seed, choose_device(self.device), progress)
        finally:
            torch.set_num_threads(before)
        xml, weights = vae_network.export(module)
        self.arrays_: dict[str, NDArray[Any]] = {
            "size": np.array(pictures.shape[1:3], dtype=np.int64),
            "network_xml": np.frombuffer(xml, dtype=np.uint8),
            "network_bin": np.frombuffer(weights, dtype=np.uint8),
            **{WEIGHTS_PREFIX + name: value.numpy() for name, value in module.state_dict().items()},
        }
        self._engine = None
        return self

    def _score(self, pictures: NDArray[np.uint8], rows: NDArray[np.int64]) -> Scores:
        height, width = self.arrays_["size"].tolist()
        if pictures.shape[1:3] != (height, width):
            raise DataError(
                f"The vae was fitted on pictures of {height} x {width} pixels and got "
                f"{pictures.shape[1]} x {pictures.shape[2]}; resize them first."
            )
        engine = self._opened()
        maps = np.empty((len(rows), *self.arrays_["weights.centre"].shape[2:]), dtype=np.float32)
        for start in range(0, len(rows), SCORE_CHUNK):
            chunk = slice(start, start + SCORE_CHUNK)
            maps[chunk] = engine(np.ascontiguousarray(pictures[rows[chunk]]))
        return Scores(top_mean(maps), maps)

    def _opened(self) -> Engine:
        with self._lock:
            if self._engine is None:
                chosen = choose_device(self.device)
                if chosen == "cuda":
                    self._engine = _torch_engine(self.arrays_, self.latent, chosen)
                else:
                    self._engine = OpenVINOEngine(self.arrays_, self.threads)
            return self._engine


class OpenVINOEngine:
    """The stored graph compiled for the CPU."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], threads: int | None) -> None:
        import openvino as ov

        try:
            model = ov.Core().read_model(arrays["network_xml"].tobytes(), ov.Tensor(arrays["network_bin"]))
        except RuntimeError as error:
            raise ArtifactError("The stored vae's network is damaged; fit the product again.") from error
        self._network = CPUNetwork(lambda: model, threads=threads)

    def __call__(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (n, H, W, 3) to float32 (n, h, w)."""
        return self._network(pictures)[0]


def _torch_engine(arrays: Mapping[str, NDArray[Any]], latent: int, device: str) -> Engine:
    import torch

    from ood_runners.detectors import vae_network
    from ood_runners.torch_inference import Buckets

    weights = {k.removeprefix(WEIGHTS_PREFIX): v for k, v in arrays.items() if k.startswith(WEIGHTS_PREFIX)}
    height, width = arrays["size"].tolist()
    module = vae_network.restore(weights, (height, width), latent, device)
    buckets = Buckets(lambda pictures: {"map": module(pictures)}, (height, width, 3), torch.device(device))
    return lambda pictures: buckets(pictures)["map"]


def _pictures(features: Features) -> NDArray[np.uint8]:
    pictures = features.pictures
    if pictures is None:
        raise DataError("The vae looks at pixels, but these features hold no pictures.")
    if pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != np.uint8:
        raise DataError(f"The vae takes pictures as uint8 (n, h, w, 3), not {pictures.dtype} {pictures.shape}.")
    return pictures
