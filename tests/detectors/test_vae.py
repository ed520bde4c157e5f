"""The VAE on small generated pictures: it learns, finds a planted defect, and scores the same wherever it is opened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ood_runners.detectors import vae_network
from ood_runners.detectors.base import Probes
from ood_runners.detectors.vae import Vae, _torch_engine
from ood_runners.errors import ArtifactError, DataError
from ood_runners.features import Features, Scores

ROOT = Path(__file__).resolve().parents[2]
SIZE = (64, 96)


def parts(n: int, seed: int = 0) -> NDArray[np.uint8]:
    """A grey disc on a graded background: place, brightness and noise vary."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    pictures = np.empty((n, *SIZE, 3), dtype=np.uint8)
    for picture in pictures:
        y, x = 32 + rng.integers(-3, 4), 48 + rng.integers(-3, 4)
        disc = (rows - y) ** 2 + (columns - x) ** 2 < 20**2
        shade = np.where(disc, 150, 60 + columns / 3)[..., None] * rng.uniform(0.9, 1.1)
        picture[:] = np.clip(shade + rng.normal(0, 4, (*SIZE, 3)), 0, 255)
    return pictures


def with_defect(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The same, with a red square of 10 pixels at rows 28 to 37, columns 42 to 51."""
    defective = pictures.copy()
    defective[:, 28:38, 42:52] = (200, 30, 30)
    return defective


@pytest.fixture(autouse=True)
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_network, "EPOCHS", 2)
    monkeypatch.setattr(vae_network, "STEPS_PER_EPOCH", 4)


class Trained:
    """A detector trained long enough to mean something, the losses it told, and pictures to score."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.counts: list[tuple[int, int]] = []
        self.detector = Vae(latent=8)
        self.detector.device = "cpu"
        self.detector.progress = self.note
        self.detector.fit(Features(pictures=parts(24)))
        self.normal = parts(8, seed=1)
        self.scores = self.score(self.normal)

    def note(self, epoch: int, epochs: int, loss: float) -> None:
        self.counts.append((epoch, epochs))
        self.losses.append(loss)

    def score(self, pictures: NDArray[np.uint8]) -> Scores:
        return self.detector.score(Features(pictures=pictures))


@pytest.fixture(scope="module")
def trained() -> Trained:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae_network, "EPOCHS", 6)
        patch.setattr(vae_network, "STEPS_PER_EPOCH", 10)
        return Trained()


def quick(n: int = 8, seed: int = 0, **params: int) -> Vae:
    detector = Vae(latent=4, seed=seed, **params)
    detector.device = "cpu"
    return detector.fit(Features(pictures=parts(n)))


def test_loss_falls_and_is_told_epoch_by_epoch(trained: Trained) -> None:
    assert trained.counts == [(epoch, 6) for epoch in range(1, 7)]
    assert trained.losses[-1] < trained.losses[0] - 0.3


def test_a_defect_scores_higher_and_the_map_peaks_in_it(trained: Trained) -> None:
    scores = trained.score(with_defect(trained.normal))
    assert scores.image.min() > 2 * trained.scores.image.max()
    assert scores.map is not None and scores.map.shape == (8, 64, 96) and scores.map.dtype == np.float32
    for anomaly_map in scores.map:
        row, column = np.unravel_index(anomaly_map.argmax(), anomaly_map.shape)
        assert 26 <= row < 40 and 40 <= column < 54


def test_a_missing_part_scores_higher(trained: Trained) -> None:
    background = np.broadcast_to(60 + np.arange(SIZE[1])[:, None] / 3, (1, *SIZE, 3))
    empty = background.astype(np.uint8)
    assert trained.score(empty).image[0] > 1.5 * trained.scores.image.max()


def test_held_out_normals_lie_about_zero(trained: Trained) -> None:
    assert trained.scores.map is not None
    assert abs(float(trained.scores.map.mean())) < 0.5


def test_a_batch_scores_as_its_pictures_one_by_one(trained: Trained) -> None:
    many = parts(35, seed=2)  # more than are scored at a time
    together = trained.score(many)
    alone = Scores.concatenate([trained.score(many[i : i + 1]) for i in (0, 31, 32, 34)])
    assert together.map is not None
    np.testing.assert_allclose(together.image[[0, 31, 32, 34]], alone.image, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(together.map[[0, 31, 32, 34]], alone.map, rtol=1e-3, atol=1e-3)


def test_torch_on_the_stored_weights_scores_as_the_compiled_network(trained: Trained) -> None:
    engine = _torch_engine(trained.detector.to_arrays(), 8, "cpu")  # a GPU's, on the CPU
    maps = engine(trained.normal)
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps, trained.scores.map, rtol=1e-3, atol=2e-3)


def test_what_is_stored_scores_the_same_in_a_process_without_torch(trained: Trained, tmp_path: Path) -> None:
    np.savez(tmp_path / "vae.npz", **trained.detector.to_arrays())
    np.save(tmp_path / "pictures.npy", trained.normal)
    code = f"""
import sys, numpy as np
from ood_runners.detectors.vae import Vae
from ood_runners.features import Features
with np.load("vae.npz", allow_pickle=False) as file:
    detector = Vae.from_arrays(dict(file), {json.dumps(trained.detector.params())})
detector.device, detector.threads = "cpu", 1
np.save("scores.npy", detector.score(Features(pictures=np.load("pictures.npy"))).map)
heavy = {{"torch", "sklearn", "scipy"}} & set(sys.modules)
assert "openvino" in sys.modules and not heavy, heavy
"""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    assert trained.scores.map is not None
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), trained.scores.map, rtol=1e-4, atol=1e-3)


def test_one_seed_gives_one_fit_whatever_else_draws_random_numbers() -> None:
    first, state = quick(), torch.get_rng_state()
    torch.rand(1)
    second, other = quick(), quick(seed=1)
    weight = "weights.network.to_latent.weight"
    for name, array in first.to_arrays().items():
        if name.startswith("weights."):
            np.testing.assert_array_equal(array, second.to_arrays()[name])
    assert np.abs(first.to_arrays()[weight] - other.to_arrays()[weight]).max() > 1e-3
    torch.set_rng_state(state)
    quick()
    assert torch.equal(torch.get_rng_state(), state), "a fit moved the caller's random numbers"


def test_held_out_scores_come_from_fits_without_the_fold(tmp_path: Path) -> None:
    pictures = parts(9)
    np.save(tmp_path / "pictures.npy", pictures)
    mapped = np.load(tmp_path / "pictures.npy", mmap_mode="r")
    folds = np.array([0, 1, 0, 0, 1, 1, 0, 1, 0])
    counts: list[tuple[int, int]] = []
    detector = Vae(latent=4)
    detector.device = "cpu"
    detector.progress = lambda epoch, epochs, loss: counts.append((epoch, epochs))
    probes = Probes(Features(pictures=parts(3)), np.array([1, 0, 4]))
    scores = detector.fit_held_out(Features(pictures=mapped), folds, probes=probes)
    assert len(scores) == 9 + 3
    assert counts == [(i, 6) for i in range(1, 7)]  # 2 epochs of 3 fits
    rest = Vae(latent=4)
    rest.device = "cpu"
    alone = rest.fit(Features(pictures=pictures[folds != 1])).score(Features(pictures=pictures[folds == 1]))
    np.testing.assert_allclose(scores.image[:9][folds == 1], alone.image, rtol=1e-4)
    np.testing.assert_allclose(scores.image[[9, 11]], rest.score(Features(pictures=parts(3)[[0, 2]])).image, rtol=1e-4)
    whole = quick(9).score(Features(pictures=pictures))
    np.testing.assert_allclose(detector.score(Features(pictures=pictures)).image, whole.image, rtol=1e-4)
    assert not np.allclose(scores.image[:9], whole.image, rtol=1e-2)


def test_interrupting_a_fit_ends_it_and_leaves_the_detector_unfitted() -> None:
    def interrupt(epoch: int, epochs: int, loss: float) -> None:
        raise KeyboardInterrupt

    detector = Vae(latent=4)
    detector.device = "cpu"
    detector.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        detector.fit(Features(pictures=parts(8)))
    assert not hasattr(detector, "arrays_")


@pytest.mark.parametrize("n", [2, 3, 4])
def test_few_pictures_are_enough(n: int) -> None:
    scores = quick(n).score(Features(pictures=with_defect(parts(1, seed=5))))
    assert np.isfinite(scores.image).all() and scores.map is not None and np.isfinite(scores.map).all()


def test_pictures_that_are_all_alike_do_not_divide_by_zero() -> None:
    detector = Vae(latent=4)
    detector.device = "cpu"
    detector.fit(Features(pictures=np.full((4, 32, 32, 3), 128, dtype=np.uint8)))
    scores = detector.score(Features(pictures=np.full((1, 32, 32, 3), 30, dtype=np.uint8)))
    assert np.isfinite(scores.image).all()


def test_mistakes_are_said_in_a_sentence(trained: Trained) -> None:
    with pytest.raises(DataError, match="at least 2 pictures"):
        quick(1)
    with pytest.raises(DataError, match="hold no pictures"):
        Vae().fit(Features(logits=np.zeros((3, 2), dtype=np.float32)))
    with pytest.raises(DataError, match=r"uint8 \(n, h, w, 3\)"):
        Vae().fit(Features(pictures=np.zeros((3, 32, 32), dtype=np.uint8)))
    with pytest.raises(DataError, match="64 x 96"):
        trained.score(np.zeros((1, 96, 64, 3), dtype=np.uint8))
    arrays = trained.detector.to_arrays()
    with pytest.raises(ArtifactError, match="no network_bin"):
        Vae.from_arrays({k: v for k, v in arrays.items() if k != "network_bin"}, {})
    damaged = Vae.from_arrays(arrays | {"network_xml": arrays["network_xml"][:500]}, {"latent": 8})
    damaged.device = "cpu"
    with pytest.raises(ArtifactError, match="damaged"):
        damaged.score(Features(pictures=trained.normal))


def test_pictures_vary_a_little_and_keep_their_size() -> None:
    x = torch.from_numpy(parts(4)).permute(0, 3, 1, 2).float() / 255
    varied = vae_network.vary(x, torch.Generator().manual_seed(0))
    assert varied.shape == x.shape and varied.min() >= 0 and varied.max() <= 1
    assert 0.005 < (varied - x).abs().mean() < 0.1


def test_training_stops_when_held_out_pictures_get_no_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rate is zero, so that the first epoch's weights are the best there will be."""
    monkeypatch.setattr(vae_network, "EPOCHS", 9)
    monkeypatch.setattr(vae_network, "PATIENCE", 2)
    monkeypatch.setattr(vae_network, "LEARNING_RATE", 1e-12)
    module = vae_network.AnomalyMap((32, 32), (32, 32), 4)
    for layer in module.network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 0.0  # else the running averages go on moving
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    epochs: list[int] = []
    generator = torch.Generator().manual_seed(0)
    vae_network.train(module, x[1:], x[:1], generator, lambda epoch, total, loss: epochs.append(epoch))
    assert epochs[-1] < 9 and not module.training


def test_working_sizes_are_bounded_and_keep_the_shape() -> None:
    assert vae_network.working_size((224, 224)) == (96, 96)
    assert vae_network.working_size((160, 352)) == (96, 208)
    assert vae_network.working_size((1000, 100)) == (480, 48)
    assert vae_network.working_size((32, 48)) == (32, 48)


@pytest.mark.parametrize(("size", "working"), [(224, 96), (224, 112), (20, 32)])
def test_area_weights_keep_the_mean(size: int, working: int) -> None:
    weights = vae_network.area_weights(size, working)
    torch.testing.assert_close(weights.sum(1), torch.ones(working))
    torch.testing.assert_close(weights.sum(0), torch.full((size,), working / size))


def test_like_pictures_have_no_error() -> None:
    x = torch.from_numpy(parts(2)).permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(vae_network.errors(x, x), torch.zeros(2, 4, *SIZE), atol=1e-4, rtol=0)


@pytest.mark.parametrize("width", [3, 9])
def test_moving_averages_are_those_of_pooling(width: int) -> None:
    x = torch.rand((2, 3, 24, 31), requires_grad=True)
    padded = torch.nn.functional.pad(x, (width // 2,) * 4, mode="replicate")
    expected = torch.nn.functional.avg_pool2d(padded, width, 1)
    with torch.inference_mode():  # what is made here is used for training below
        found = vae_network._box(x, width)
    assert torch.allclose(found, expected, atol=1e-6)
    weights = torch.rand_like(expected)
    (gradient,) = torch.autograd.grad((vae_network._box(x, width) * weights).sum(), x)
    assert torch.allclose(gradient, torch.autograd.grad((expected * weights).sum(), x)[0], atol=1e-5)
