"""The variational autoencoder itself: network, training loop and export (needs torch; serving does not).

Training is imported by `vae.py` only inside ``fit`` and on a GPU; a CPU serves the exported OpenVINO graph.

References
----------
Kingma, Welling: Auto-Encoding Variational Bayes, 2014.
Rybkin et al.: Simple and Effective VAE Training with Calibrated Decoders, 2021 (log of the squared error, so
that the weight of the KL term needs no tuning).
Bergmann et al.: Improving Unsupervised Defect Segmentation by Applying Structural Similarity to Autoencoders, 2019.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import openvino as ov
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

EPOCHS = 8
STEPS_PER_EPOCH = 25
BATCH = 16
LEARNING_RATE = 2e-3
PATIENCE = 5
WARM_UP = 0.3
STRUCTURE_WEIGHT = 0.5
SHIFT = 3  # pixels at the working size
STRIDE = 16  # of the encoder: working sizes are multiples of it
SHORT_SIDE = 96
MAX_AREA = 2.5 * SHORT_SIDE**2  # of the working size, so that a long strip trains as fast as a square
HELD_OUT = 0.2  # of the pictures, for early stopping and the map's scale
MAX_HELD_OUT = 200
MAX_PICTURES = 2000  # in memory, at the working size: about 220 MB
CHUNK = 64
NEIGHBOURHOOD = 9  # pixels at the working size
SHRINKAGE = 0.5  # of the spread at a position, towards that of all positions

Report = Callable[[int, int, float], None]


def working_size(size: tuple[int, int]) -> tuple[int, int]:
    """The (h, w) that pictures of `size` are reduced to: about 96 pixels on the short side."""
    factor = min(SHORT_SIDE / min(size), (MAX_AREA / (size[0] * size[1])) ** 0.5, 1.0)
    height, width = (max(STRIDE, STRIDE * round(side * factor / STRIDE)) for side in size)
    return height, width


class Reduce(nn.Module):
    """Area averaging of uint8 (n, H, W, 3) to float32 (n, 3, h, w) in 0..1, as two matrix products."""

    rows: Tensor
    columns: Tensor

    def __init__(self, size: tuple[int, int], working: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("rows", area_weights(size[0], working[0]))
        self.register_buffer("columns", area_weights(size[1], working[1]).T.contiguous())

    def forward(self, pictures: Tensor) -> Tensor:
        return self.rows @ (pictures.permute(0, 3, 1, 2).float() / 255.0) @ self.columns


def area_weights(size: int, working: int) -> Tensor:
    """Weights float32 (working, size): the share of each input pixel in each output pixel; rows sum to 1."""
    edges = np.arange(working + 1) * (size / working)
    low = np.maximum(edges[:-1, None], np.arange(size)[None])
    high = np.minimum(edges[1:, None], np.arange(1, size + 1)[None])
    overlap = np.clip(high - low, 0.0, None)
    return torch.from_numpy((overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32))


def _block(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    padding = (kernel - 1) // 2
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.SiLU())


class Network(nn.Module):
    """Encoder and decoder at the working size; a dense latent code, so that layout is what is remembered."""

    def __init__(self, working: tuple[int, int], latent: int) -> None:
        super().__init__()
        self.grid = (working[0] // STRIDE, working[1] // STRIDE)
        flat = 16 * self.grid[0] * self.grid[1]
        self.encoder = nn.Sequential(
            _block(3, 32, 7, 4), _block(32, 64, 4, 2), _block(64, 128, 4, 2), _block(128, 16, 1, 1)
        )
        self.to_latent = nn.Linear(flat, 2 * latent)
        self.from_latent = nn.Linear(latent, flat)
        self.decoder = nn.Sequential(
            _block(16, 128, 1, 1),
            nn.Upsample(scale_factor=2.0),
            _block(128, 64, 3, 1),
            nn.Upsample(scale_factor=2.0),
            _block(64, 48, 3, 1),
            nn.Conv2d(48, 8 * 16, 3, 1, 1),
            nn.PixelShuffle(4),
            nn.SiLU(),
        )
        self.to_picture = nn.Conv2d(8, 3, 3, 1, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the code, each (n, latent)."""
        mean, log_variance = self.to_latent(self.encoder(x).flatten(1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-8.0, 4.0)

    def decode(self, code: Tensor) -> Tensor:
        """Picture (n, 3, h, w) in 0..1 of a code (n, latent)."""
        grid = self.from_latent(code).unflatten(1, (16, *self.grid))
        return torch.sigmoid(self.to_picture(self.decoder(grid)))

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction from the mean of the code, (n, 3, h, w) to the same."""
        return self.decode(self.encode(x)[0])


def _box(x: Tensor, width: int) -> Tensor:
    """Moving average over width x width pixels, with the border's own pixels repeated.

    Two products take a third of the time that average pooling and its gradient do.
    """
    rows, columns = (_moving_average(int(length), width, x.device) for length in x.shape[-2:])
    return rows @ x @ columns.T


@cache
def _moving_average(length: int, width: int, device: torch.device) -> Tensor:
    """Weights float32 (length, length): of each pixel of a line in the average around each."""
    near = np.arange(length)[:, np.newaxis] + np.arange(width) - width // 2
    weights = np.zeros((length, length), np.float32)
    np.add.at(weights, (np.arange(length)[:, np.newaxis], near.clip(0, length - 1)), np.float32(1 / width))
    with torch.inference_mode(False):  # made while scoring, it may be trained with later
        return torch.from_numpy(weights).to(device)


def dissimilarity(x: Tensor, y: Tensor, width: int = 7) -> Tensor:
    """1 - SSIM a pixel of the luminance of two pictures (n, 3, h, w): (n, 1, h, w), 0 where alike."""
    a, b = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    means = _box(torch.cat([a, b, a * a, b * b, a * b], dim=1), width)
    mean_a, mean_b, square_a, square_b, product = means.split(1, dim=1)
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    covariance = product - mean_a * mean_b
    structure = (2 * covariance + 9e-4) / (square_a - mean_a**2 + square_b - mean_b**2 + 9e-4)
    return 1 - luminance * structure


def errors(x: Tensor, y: Tensor) -> Tensor:
    """Local differences of picture and reconstruction (n, 4, h, w): fine, coarse, of hue, of structure."""
    difference = x - y
    hue = _box(difference - difference.mean(1, keepdim=True), 5)
    parts = [_box(difference, 3), _box(difference, 9), hue]
    return torch.cat([part.abs().mean(1, keepdim=True) for part in parts] + [dissimilarity(x, y)], dim=1)


class AnomalyMap(nn.Module):
    """From uint8 pictures (n, H, W, 3) to the anomaly map float32 (n, h, w), as exported."""

    centre: Tensor
    scale: Tensor

    def __init__(self, size: tuple[int, int], working: tuple[int, int], latent: int) -> None:
        super().__init__()
        self.reduce = Reduce(size, working)
        self.network = Network(working, latent)
        self.register_buffer("centre", torch.zeros(1, 4, *working))
        self.register_buffer("scale", torch.ones(1, 4, *working))

    def errors(self, pictures: Tensor) -> Tensor:
        """The four errors (n, 4, h, w) before they are set against those of normal pictures."""
        x = self.reduce(pictures)
        return errors(x, self.network(x))

    def forward(self, pictures: Tensor) -> Tensor:
        return ((self.errors(pictures) - self.centre) / self.scale).mean(1)


def reconstruction_loss(x: Tensor, y: Tensor) -> Tensor:
    """Log of the squared error plus the weighted structural term, (n,)."""
    squared = (x - y).pow(2).mean((1, 2, 3))
    return 0.5 * torch.log(squared + 1e-5) + STRUCTURE_WEIGHT * dissimilarity(x, y).mean((1, 2, 3))


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the code from a standard normal, (n,) nats."""
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)


def vary(x: Tensor, generator: torch.Generator) -> Tensor:
    """The pictures slightly shifted, brighter or darker, as a camera would see them on another day."""
    n, _, height, width = x.shape
    top, left = torch.randint(0, 2 * SHIFT + 1, (2,), generator=generator).tolist()
    padded = F.pad(x, (SHIFT, SHIFT, SHIFT, SHIFT), mode="replicate")
    shifted = padded[:, :, top : top + height, left : left + width]
    gain = 1 + 0.04 * torch.randn(n, 1, 1, 1, generator=generator)
    offset = 0.02 * torch.randn(n, 1, 1, 1, generator=generator)
    return (shifted * gain.to(x.device) + offset.to(x.device)).clamp(0, 1)


def train(
    module: AnomalyMap,
    x: Tensor,
    held_out: Tensor,
    generator: torch.Generator,
    report: Report | None = None,
) -> None:
    """Train `module` on pictures `x` float32 (n, 3, h, w), stopping early on `held_out`, whose best weights stay.

    All chance comes from `generator` (on the CPU). `report` is called after each epoch with its number from 1,
    the most there will be, and the training loss; what it raises ends the training.
    """
    network = module.network
    network.train()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    total = EPOCHS * STEPS_PER_EPOCH
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=total, pct_start=0.15)
    best, best_epoch, state = float("inf"), 0, copy.deepcopy(network.state_dict())
    for epoch in range(1, EPOCHS + 1):
        sum_of_losses = 0.0
        for step in range((epoch - 1) * STEPS_PER_EPOCH, epoch * STEPS_PER_EPOCH):
            rows = torch.randint(0, len(x), (BATCH,), generator=generator).to(x.device)
            seen = vary(x[rows], generator)
            mean, log_variance = network.encode(seen.contiguous(memory_format=torch.channels_last))
            noise = torch.randn(mean.shape, generator=generator).to(x.device)
            restored = network.decode(mean + noise * (0.5 * log_variance).exp())
            # Both terms are per colour value; the KL term grows to its full weight while the decoder learns to listen.
            warm_up = min(1.0, step / (WARM_UP * total))
            kl = divergence(mean, log_variance) / seen[0].numel()
            loss = (reconstruction_loss(seen, restored) + warm_up * kl).mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            sum_of_losses += loss.item()
        network.eval()
        with torch.no_grad():
            parts = [reconstruction_loss(part, network(part)) for part in held_out.split(BATCH)]
        network.train()
        held_out_loss = torch.cat(parts).mean().item()
        if held_out_loss < best:
            best, best_epoch, state = held_out_loss, epoch, copy.deepcopy(network.state_dict())
        if report is not None:
            report(epoch, EPOCHS, sum_of_losses / STEPS_PER_EPOCH)
        if epoch - best_epoch >= PATIENCE:
            break
    network.load_state_dict(state)
    module.eval()


@torch.no_grad()
def set_normals(module: AnomalyMap, held_out: Tensor) -> None:
    """Learn the usual error and its spread at each position from pictures (n, 3, h, w) that were not trained on.

    Both are averaged over a neighbourhood, since pictures are few and parts move, and the spread is
    shrunk towards that of all positions, so that a spot that never varied does not outweigh all others.
    """
    found = torch.cat([errors(part, module.network(part)) for part in held_out.split(BATCH)])
    centre = _box(found.mean(0, keepdim=True), NEIGHBOURHOOD)
    spread = _box(((found - centre) ** 2).mean(0, keepdim=True), NEIGHBOURHOOD)
    everywhere = found.var((0, 2, 3), unbiased=False, keepdim=True)
    module.centre.copy_(centre)
    module.scale.copy_((SHRINKAGE * everywhere + (1 - SHRINKAGE) * spread + 1e-8).sqrt())


def fit(
    pictures: NDArray[np.uint8],
    rows: NDArray[np.int64],
    latent: int,
    seed: int,
    device: str,
    report: Report | None = None,
) -> AnomalyMap:
    """A trained `AnomalyMap` on the CPU from `rows` of pictures uint8 (N, H, W, 3); see `train` and `set_normals`."""
    generator = torch.Generator().manual_seed(seed)
    size = (pictures.shape[1], pictures.shape[2])
    with torch.random.fork_rng(devices=[]):  # the initial weights draw on torch's global generator
        torch.manual_seed(seed)
        module = AnomalyMap(size, working_size(size), latent)
    chosen = rows[torch.randperm(len(rows), generator=generator).numpy()[:MAX_PICTURES]]
    with torch.no_grad():
        reduced = [
            module.reduce(torch.from_numpy(np.ascontiguousarray(pictures[np.sort(chosen[i : i + CHUNK])])))
            for i in range(0, len(chosen), CHUNK)
        ]
    count = min(MAX_HELD_OUT, max(1, round(HELD_OUT * len(chosen))))
    x = torch.cat(reduced).to(device)
    module.to(device)
    train(module, x[count:], x[:count], generator, report)
    set_normals(module, x[:count])
    return module.cpu()


def export(module: AnomalyMap) -> tuple[bytes, bytes]:
    """The module as OpenVINO IR (xml, bin): uint8 (n, H, W, 3) to float32 (n, h, w), any n."""
    size = (module.reduce.rows.shape[1], module.reduce.columns.shape[0])
    example = torch.zeros(2, *size, 3, dtype=torch.uint8)
    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with warnings.catch_warnings():  # torch deprecates the tracing that OpenVINO's converter uses
        warnings.simplefilter("ignore", FutureWarning)
        # Averages are made for one size; all pictures have it.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        model = ov.convert_model(module, example_input=example, input=[ov.PartialShape([-1, *size, 3])])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.xml"
        ov.save_model(model, path, compress_to_fp16=False)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def restore(weights: Mapping[str, NDArray[np.float32]], size: tuple[int, int], latent: int, device: str) -> AnomalyMap:
    """The module from its state (`AnomalyMap.state_dict` as arrays), in evaluation mode on `device`."""
    module = AnomalyMap(size, working_size(size), latent)
    module.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in weights.items()})
    return module.eval().to(device)
