from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import bentoml
import numpy as np
import pytest
from bentoml import Tag

from ood_runners import artifacts
from ood_runners.artifacts import names, read_version, store
from ood_runners.artifacts.staging import staging_folder
from ood_runners.errors import ArtifactError, BadParameter, NotFound
from tests.artifacts.samples import (
    TinyBackbone,
    backbone_folder,
    describe,
    fill,
    mounted,
    python,
    read_only,
    snapshot,
)

Fit = Callable[..., Tag]


def test_what_is_written_is_read_back(fit: Fit) -> None:
    stored = read_version(fit(seed=4, notes=["softmax is left out: the weights have no head"]))
    expected = np.random.default_rng(4).normal(size=(10, 8)).astype(np.float32)
    np.testing.assert_array_equal(stored.arrays("memory_bank")["bank"], expected)
    assert stored.arrays("memory_bank")["k"].shape == ()
    assert stored.manifest.notes == ["softmax is left out: the weights have no head"]
    assert stored.manifest.tag == str(stored.tag)
    assert {"model.yaml", "memory_bank.safetensors", "thumbnails/0.png"} == stored.manifest.files.keys()
    assert stored.manifest.packages["numpy"] == np.__version__
    assert (stored.backbone_path / "network.xml").read_text() == "<net/>"
    with pytest.raises(ArtifactError, match=r"holds no vae\.safetensors"):
        stored.arrays("vae")


def test_arrays_that_do_not_lie_in_order_come_back_right(tmp_path: Path, fit: Fit, backbone: Tag) -> None:
    plain = np.arange(12, dtype=np.float32).reshape(3, 4)
    odd = {"turned": plain.T, "every_other": plain[:, ::2], "big_endian": plain.astype(">f4"), "none": plain[:0]}
    tag = artifacts.write_version(describe("bolts", backbone), lambda folder: artifacts.save_arrays(folder, "odd", odd))
    for name, array in read_version(tag).arrays("odd").items():
        np.testing.assert_array_equal(array, odd[name])
    with pytest.raises(TypeError, match="only numbers"):
        artifacts.save_arrays(tmp_path, "objects", {"names": np.array(["a"], dtype=object)})


def test_bentoml_sees_a_model_like_any_other(fit: Fit, bento_home: Path, tmp_path: Path) -> None:
    first, second = fit(), fit(seed=1)
    assert [str(model.tag) for model in bentoml.models.list("ood-bolts")] == [str(first), str(second)]
    assert bentoml.models.get("ood-bolts:latest").tag == second
    assert bentoml.models.BentoModel(first).resolve().path == str(names.folder_of(first))
    run = [sys.executable, "-m", "bentoml", "models"]
    listing = subprocess.run([*run, "list", "-o", "json"], capture_output=True, text=True, check=True)
    assert {str(first), str(second)} < {line["tag"] for line in json.loads(listing.stdout)}
    file = tmp_path / "bolts.bentomodel"
    before = snapshot(bento_home)
    bentoml.models.export_model(second, str(file))
    bentoml.models.delete(second)
    assert bentoml.models.get("ood-bolts:latest").tag == first
    bentoml.models.import_model(str(file))
    assert snapshot(bento_home) == before
    assert read_version(second).version == second.version


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["memory_bank.safetensors", "thumbnails/0.png", "model.yaml", "manifest.json"])
def test_one_flipped_bit_anywhere_is_found(fit: Fit, name: str) -> None:
    tag = fit()
    _flip(names.folder_of(tag) / name)
    with pytest.raises(ArtifactError, match=f"^{tag}: {name} .*roll back"):
        read_version(tag)


def test_missing_and_extra_files_are_named(fit: Fit) -> None:
    tag = fit()
    thumbnail = names.folder_of(tag) / "thumbnails" / "0.png"
    thumbnail.rename(thumbnail.with_name("1.png"))
    with pytest.raises(ArtifactError, match=r"thumbnails/0\.png is missing"):
        read_version(tag)
    thumbnail.with_name("1.png").rename(thumbnail)
    thumbnail.with_name("extra.pkl").touch()
    with pytest.raises(ArtifactError, match=r"thumbnails/extra\.pkl does not belong"):
        read_version(tag)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.json.sha256", "model.yaml"])
def test_a_version_without_its_description_is_refused(fit: Fit, name: str) -> None:
    tag = fit()
    (names.folder_of(tag) / name).unlink()
    with pytest.raises(ArtifactError, match=f"{tag}: {name}"):
        read_version(tag)


def test_links_are_refused_even_to_the_right_content(fit: Fit, tmp_path: Path) -> None:
    tag = fit()
    bank = names.folder_of(tag) / "memory_bank.safetensors"
    bank.rename(tmp_path / "elsewhere")
    bank.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="is a link"):
        read_version(tag)


def test_a_copy_under_another_name_is_refused(fit: Fit) -> None:
    tag = fit()
    folder = names.folder_of(tag)
    folder.rename(folder.with_name("v1"))
    with pytest.raises(ArtifactError, match="cannot be copied"):
        read_version("bolts:v1")


def test_the_backbone_must_be_there_sound_and_the_same(fit: Fit, backbone: Tag) -> None:
    tag = fit()
    network = names.folder_of(backbone) / "network.bin"
    _flip(network)
    with pytest.raises(ArtifactError, match=rf"{backbone}: network\.bin is damaged"):
        read_version(tag)
    assert read_version(tag, verify=False).tag == tag
    bentoml.models.delete(backbone)
    with pytest.raises(ArtifactError, match=f"needs the backbone {backbone}"):
        read_version(tag, verify=False)
    with pytest.raises(ArtifactError, match="not in the store"):
        fit()


def test_a_version_is_not_written_for_other_weights(fit: Fit, backbone: Tag) -> None:
    entry = describe("bolts", backbone).backbone.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(ArtifactError, match="other weights"):
        fit(backbone=entry)
    assert artifacts.products() == []


def test_an_equal_backbone_is_stored_once_and_a_damaged_one_healed(
    backbone: Tag, tmp_path: Path, bento_home: Path
) -> None:
    before = snapshot(bento_home)
    assert artifacts.write_backbone(TinyBackbone(), backbone_folder(tmp_path / "again")) == backbone
    assert snapshot(bento_home) == before
    _flip(names.folder_of(backbone) / "network.bin")
    assert artifacts.find_backbone("resnet18", TinyBackbone.sha256) is None
    assert artifacts.write_backbone(TinyBackbone(), backbone_folder(tmp_path / "again")) == backbone
    assert artifacts.find_backbone("resnet18", TinyBackbone.sha256) == (backbone, names.folder_of(backbone))
    assert artifacts.find_backbone("resnet18", "0" * 64) is None
    other = artifacts.write_backbone(TinyBackbone(), backbone_folder(tmp_path / "other", b"weightz"))
    assert other.name == backbone.name and other != backbone


class Interrupted(BaseException):
    """As KeyboardInterrupt, which pytest would take for its own."""


@pytest.mark.parametrize("error", [ValueError("a bug"), Interrupted(), FileNotFoundError("a picture")])
def test_whatever_ends_a_fit_the_store_stays_as_it_was(
    fit: Fit, backbone: Tag, bento_home: Path, error: BaseException
) -> None:
    fit()
    before = snapshot(bento_home)

    def write(folder: Path) -> None:
        fill(folder)
        raise error

    with pytest.raises(type(error)):
        artifacts.write_version(describe("bolts", backbone), write)
    assert snapshot(bento_home) == before


def test_nothing_is_seen_before_it_is_whole(fit: Fit, backbone: Tag) -> None:
    first = fit()
    with store.open_writer("bolts") as writer:
        fill(writer.path)
        assert [model.tag for model in bentoml.models.list("ood-bolts")] == [first]
        assert [line.tag for line in artifacts.list_versions()] == [first]
        written = writer.path.stat().st_ino
        second = writer.commit(describe("bolts", backbone))
    assert names.folder_of(second).stat().st_ino == written  # moved in one step, not copied
    assert [line.tag for line in artifacts.list_versions()] == [first, second]


def test_a_killed_fit_is_never_listed_and_is_swept_up(fit: Fit, backbone: Tag, bento_home: Path) -> None:
    code = """
        import sys, time
        from samples import *
        from ood_runners.artifacts import *
        from ood_runners.artifacts.store import open_writer
        with open_writer("bolts") as writer:
            fill(writer.path)
            print("filled", flush=True)
            time.sleep(600)
    """
    with python(code) as process:
        assert process.stdout is not None and process.stdout.readline() == "filled\n"
        fit()  # another one meanwhile must not touch what the live one writes
        assert list(bento_home.glob("ood-staging/ood-bolts.*/memory_bank.safetensors"))
        process.send_signal(signal.SIGKILL)
    assert [line.problem for line in artifacts.list_versions()] == [None]
    assert list(bento_home.glob("ood-staging/ood-bolts.*/memory_bank.safetensors"))
    fit()
    assert list(bento_home.glob("ood-staging/*")) == []


def test_two_processes_fit_one_product_at_once(backbone: Tag, bento_home: Path, tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from samples import *
        from ood_runners.artifacts import *
        for seed in range(5):
            write_backbone(TinyBackbone("shared"), backbone_folder(Path(sys.argv[1]), b"%d" % seed))
            name, _, version = sys.argv[2].partition(":")
            write_version(describe("bolts", Tag(name, version)), lambda folder: fill(folder, seed))
    """
    processes = [python(code, tmp_path / f"exported{i}", backbone) for i in range(2)]
    for process in processes:
        assert process.communicate()[1] == ""
    lines = artifacts.list_versions("bolts")
    assert len(lines) == 10 and all(line.problem is None for line in lines)
    for line in lines:
        read_version(line.tag)
    assert len(bentoml.models.list("ood-backbone-shared")) == 5
    assert list(bento_home.glob("ood-staging/*")) == []


def test_a_full_disk_is_a_sentence_and_leaves_nothing(bento_home: Path) -> None:
    with mounted(bento_home, "-t", "tmpfs", "-o", "size=2m", "tmpfs"):
        (bento_home / "models").mkdir()
        backbone = artifacts.write_backbone(TinyBackbone(), backbone_folder(bento_home / "exported"))
        manifest = describe("bolts", backbone)
        before = snapshot(bento_home)

        def arrays(folder: Path) -> None:
            artifacts.save_arrays(folder, "bank", {"bank": np.zeros(2**20, np.float32)})

        def plain(folder: Path) -> None:
            (folder / "thumbnails.bin").write_bytes(bytes(4 * 2**20))

        def unchecked(folder: Path) -> None:  # as a C++ stream does: as much as fits, and no error
            with suppress(OSError), (folder / "network.bin").open("wb", buffering=0) as stream:
                while stream.write(bytes(4096)) == 4096:
                    pass

        def of_another_class(folder: Path) -> None:
            unchecked(folder)
            raise RuntimeError("the stream failed")

        for write in (arrays, plain, unchecked, of_another_class):
            with pytest.raises(ArtifactError, match=rf"disk is full.* in {bento_home}.*free some space"):
                artifacts.write_version(manifest, write)
            assert snapshot(bento_home) == before
        with pytest.raises(ArtifactError, match="disk is full"):
            artifacts.write_backbone(TinyBackbone(), backbone_folder(bento_home.parent / "large", bytes(2**15)))
        assert snapshot(bento_home) == before
        assert artifacts.write_version(manifest, fill)


def test_a_read_only_store_serves_and_says_no_to_the_rest(
    fit: Fit, bento_home: Path, backbone: Tag, tmp_path: Path
) -> None:
    first, second = fit(), fit(seed=1)
    artifacts.promote(first)
    for folder in ("bentos", "envs", "tmp"):  # BentoML makes these when it starts
        (bento_home / folder).mkdir(exist_ok=True)
    with read_only(bento_home):
        assert read_version("bolts").tag == first
        assert artifacts.stamps().keys() == {"bolts"}
        assert [line.in_production for line in artifacts.list_versions()] == [True, False]
        assert artifacts.export_version(second, tmp_path / "bolts.tar").is_file()
        code = "from ood_runners.artifacts import read_version; print(read_version('bolts').tag)"
        assert python(code).communicate()[0] == f"{first}\n"
        for change in (
            lambda: artifacts.promote(second),
            lambda: artifacts.rollback("bolts", str(second)),
            lambda: artifacts.delete_version(second),
            lambda: artifacts.write_version(describe("bolts", backbone), fill),
            lambda: artifacts.import_version(tmp_path / "bolts.tar"),
            artifacts.check_writable,
        ):
            with pytest.raises(ArtifactError, match=rf"{bento_home}.* cannot be written \(Read-only"):
                change()
    artifacts.check_writable()
    assert artifacts.promote(second).to == second.version


def test_a_store_over_two_file_systems_is_found_out_before_the_fit(bento_home: Path) -> None:
    with (
        mounted(bento_home / "models", "-t", "tmpfs", "-o", "size=2m", "tmpfs"),
        pytest.raises(ArtifactError, match=r"different file systems.*mount BENTOML_HOME itself"),
    ):
        artifacts.check_writable()


def test_temporary_folders_are_gone_after_use(bento_home: Path) -> None:
    with staging_folder("one") as one, staging_folder("two") as two:
        (two / "file").touch()
        assert one.is_dir() and two.is_dir()
    assert list((bento_home / "ood-staging").iterdir()) == []


def test_bad_names_write_nothing(bento_home: Path, backbone: Tag) -> None:
    with pytest.raises(BadParameter, match="no product name"), store.open_writer("No Good"):
        pytest.fail("the block must not run")
    with pytest.raises(NotFound, match="store is empty"):
        read_version("bolts")
