"""Imports run one way, and a server on a CPU loads neither torch nor scikit-learn."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ood_runners"

# From the bottom up; a part may import those before it and itself. What is not named here is a runner, or of the api.
LAYERS = (
    "errors",
    "sizes",
    "cores",
    "inference",
    "features",
    "images",
    "maps",
    "backbones",
    "detectors",
    "calibration",
    "artifacts",
    "pipeline",
)
PART_OF = {"image_guards": "images", "torch_inference": "inference", "compiled": "inference"}
SERVING = "serving"
MAY_IMPORT: dict[str, set[str]] = {
    **{layer: {*LAYERS[: i + 1], ""} for i, layer in enumerate(LAYERS)},
    "training": {*LAYERS, "training", ""},
    SERVING: {*LAYERS, SERVING, ""},
    "service": {*LAYERS, SERVING, ""},
    "cli": {*LAYERS, "training", "cli", ""},
    "build_artifacts": {"cli", ""},
    "demo": {*LAYERS, "training", "cli", ""},
    "": set(),
}


def layer_of(module: str) -> str:
    """The part that `module` belongs to; the package itself is the empty name."""
    if module == PACKAGE:
        return ""
    name = module.removeprefix(PACKAGE + ".").split(".")[0]
    name = PART_OF.get(name, name)
    return name if name in MAY_IMPORT else SERVING


def is_allowed(importer: str, imported: str) -> bool:
    return layer_of(imported) in MAY_IMPORT[layer_of(importer)]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def own_imports(path: Path) -> list[tuple[int, str]]:
    """Line and module of every import of this project in `path`, those inside functions too."""
    found: list[tuple[int, str]] = []
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from ood_runners import images` names a module, not an attribute.
            found += [(node.lineno, f"{base}.{a.name}" if base == PACKAGE else base) for a in node.names]
    dunder = PACKAGE + ".__"
    return [(line, PACKAGE if name.startswith(dunder) else name) for line, name in found if name.startswith(PACKAGE)]


SOURCES = sorted([*(ROOT / PACKAGE).rglob("*.py"), *(p for p in ROOT.glob("*.py"))])


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_imports_run_one_way(path: Path) -> None:
    importer = module_name(path)
    wrong = [f"line {line}: {name}" for line, name in own_imports(path) if not is_allowed(importer, name)]
    assert not wrong, f"{importer} imports what lies above it: {', '.join(wrong)}"


def test_the_rule_sees_a_wrong_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / PACKAGE / "detectors" / "new.py"
    source.parent.mkdir(parents=True)
    source.write_text(
        "from ood_runners.features import Scores\n"
        "def late():\n    from ood_runners import artifacts\n"
        "from .base import Detector\nfrom ..training import fit\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    found = own_imports(source)
    assert [name for _, name in sorted(found)] == [
        "ood_runners.features",
        "ood_runners.artifacts",
        "ood_runners.detectors.base",
        "ood_runners.training",
    ]
    wrong = {name for _, name in found if not is_allowed(module_name(source), name)}
    assert wrong == {"ood_runners.artifacts", "ood_runners.training"}
    assert not is_allowed("service", "ood_runners.training.fit")
    assert not is_allowed("ood_runners.vae_runner", "ood_runners.cli")


def loaded_after(code: str) -> set[str]:
    """Top-level modules in memory after `code` ran in a process of its own."""
    report = "\nimport sys\nprint(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_the_service_loads_neither_torch_nor_scikit_learn() -> None:
    # The last two are the gateway's: each runner imports the service too.
    heavy = {"torch", "torchvision", "sklearn", "scipy", "nncf", "matplotlib", "openvino", "fastapi"}
    assert loaded_after("import service") & {"bentoml", *heavy} == {"bentoml"}


def test_help_loads_nothing_heavy() -> None:
    code = "import build_artifacts as b, contextlib\nwith contextlib.suppress(SystemExit): b.main(['--help'])"
    heavy = {"torch", "sklearn", "openvino", "bentoml", "cv2", "faiss"}
    assert loaded_after(code) & {"typer", *heavy} == {"typer"}


def test_openvino_reports_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)  # OpenVINO keeps quiet there by itself
    watch = (
        "import socket, time\nasked = []\nsocket.getaddrinfo = lambda *a, **k: asked.append(a[0])\n"
        "import ood_runners, openvino\ntime.sleep(0.5)\nassert not asked, asked"
    )
    assert "openvino" in loaded_after(watch)
    assert not list(tmp_path.iterdir())
