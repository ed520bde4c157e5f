"""What a stored version says of itself."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from ood_runners.artifacts.names import check_product
from ood_runners.errors import ArtifactError, BadParameter
from ood_runners.features import scorer

SCHEMA_VERSION: Final = 1
MEMBERS: Final = "members"  # the folder in a version that holds one folder a member
SHA256 = re.compile(r"[0-9a-f]{64}")


def check_file_name(name: str) -> str:
    """Return `name` if it is a plain relative path inside a version.

    Raises
    ------
    ValueError
        It is absolute, climbs out, or holds a backslash, a control character or an empty part.
    """
    path = PurePosixPath(name)
    if not name or str(path) != name or path.is_absolute() or ".." in path.parts or name == ".":
        raise ValueError(f"{name!r} is no plain relative path")
    if "\\" in name or not name.isprintable():
        raise ValueError(f"{name!r} holds a character that no stored file's name may have")
    return name


def _check_sha256(text: str) -> str:
    if not SHA256.fullmatch(text):
        raise ValueError("a SHA-256 is 64 lowercase hexadecimal digits")
    return text


def _product(name: str) -> str:
    try:
        return check_product(name)
    except BadParameter as error:
        raise ValueError(str(error)) from error


BackboneTag = Annotated[str, Field(pattern=r"^ood-backbone-[a-z0-9._-]{0,49}[a-z0-9]:[0-9a-f]{12}$")]
Sha256 = Annotated[str, AfterValidator(_check_sha256)]
FileName = Annotated[str, AfterValidator(check_file_name)]
ProductName = Annotated[str, AfterValidator(_product)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
MemberName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Rate = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BackboneEntry(_Part):
    """Which backbone a version was fitted on: its tag in the store, and the SHA-256 of its weights."""

    name: str
    tag: BackboneTag
    sha256: Sha256
    origin: str
    precision: str = "float32"


class InputEntry(_Part):
    """The size, in pixels, that pictures are resized to."""

    height: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]


class FeaturesEntry(_Part):
    """What the backbone is asked for; `projection_dim` is None where patches are not projected."""

    patch_layers: list[str] = []
    pooled_layers: list[str] = []
    logits: bool = False
    neighbourhood: Annotated[int, Field(ge=1)] = 3
    projection_dim: int | None = None


class DetectorEntry(_Part):
    """A detector's constructor parameters, and whatever else is worth recording of it."""

    params: dict[str, Any] = {}
    info: dict[str, Any] = {}


class MemberEntry(_Part):
    """Another network, or another picture size, whose detectors have a say in the same verdict."""

    backbone: BackboneEntry
    input: InputEntry
    features: FeaturesEntry
    detectors: dict[str, DetectorEntry]


class CalibrationEntry(_Part):
    """How scores became p-values: the numbers of scores and folds, the rate asked for and the rate attained."""

    method: str
    n: Count
    folds: Count
    alpha_requested: Rate
    alpha: Rate
    certificate: dict[str, Any] = {}


class SkippedFile(_Part):
    """A file of the folder that was left out, and why."""

    path: str
    reason: str


class LeftOutFile(_Part):
    """A picture unlike the others, and whether it was `fitted` on or `calibrated` on all the same."""

    path: str
    reason: str
    fitted: bool
    calibrated: bool = False


class DataEntry(_Part):
    """What it was fitted on: `train_count` pictures, without those `left_out` that are not fitted on.

    `suspects` are training pictures that look unlike all others and count as normal all the same.
    """

    layout: str
    fingerprint: str
    train_count: Count
    skipped: list[SkippedFile] = []
    left_out: list[LeftOutFile] = []
    suspects: list[str] = []
    classes: list[str] | None = None


class GoldenEntry(_Part):
    """The golden picture's raw scores and fused p-value, and how far a loaded version may stray from them."""

    scores: dict[str, Finite]
    p_value: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Stored(_Part):
    """What every stored manifest has; the store fills in `tag` and `files`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    tag: str = ""
    created: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    packages: dict[str, str] = {}
    files: dict[FileName, Sha256] = {}

    def to_json(self) -> str:
        """The manifest as indented JSON; NumPy scalars and arrays in free dicts become numbers and lists."""
        return self.model_dump_json(indent=1, fallback=_plain) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, tag: str) -> Self:
        """Read a manifest; `tag` is named in what is raised.

        Raises
        ------
        ArtifactError
            It is no manifest, or of a schema that this release does not know.
        """
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise ArtifactError(f"{tag}: manifest.json is no JSON ({error}); {WAYS_ON}.") from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise ArtifactError(
                f"{tag} was written in schema version {version} and this release reads up to {SCHEMA_VERSION}; "
                "update ood-runners, or use another version of the product."
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise ArtifactError(f"{tag}: manifest.json is not valid at {where} ({first['msg']}); {WAYS_ON}.") from error


class Manifest(_Stored):
    """One version of a product.

    `members` are networks and picture sizes beside its own; their files lie in ``members/<name>/``. What is asked
    of a version is about its own network and size, except for `scorers`, `backbones` and `member`.
    """

    kind: Literal["product"] = "product"
    product: ProductName
    backbone: BackboneEntry
    input: InputEntry
    features: FeaturesEntry
    detectors: dict[str, DetectorEntry]
    members: dict[MemberName, MemberEntry] = {}
    calibration: CalibrationEntry
    data: DataEntry
    metrics: dict[str, Any] = {}
    golden: GoldenEntry
    notes: list[str] = []
    cost: dict[str, Any] = {}

    @property
    def scorers(self) -> tuple[str, ...]:
        """What all scores that are fused are called, in the calibration's order: ``detector``, ``detector@member``."""
        others = (scorer(detector, name) for name, member in self.members.items() for detector in member.detectors)
        return (*self.detectors, *others)

    @property
    def backbones(self) -> list[BackboneEntry]:
        """Its own backbone and those of its members, each once."""
        entries = [self.backbone, *(member.backbone for member in self.members.values())]
        return list({entry.tag: entry for entry in entries}.values())

    def member(self, name: str) -> Manifest:
        """What a version that consists of one member says of itself; raises KeyError where there is none."""
        root = f"{MEMBERS}/{name}/"
        files = {path.removeprefix(root): digest for path, digest in self.files.items() if path.startswith(root)}
        return self.model_copy(update={**dict(self.members[name]), "members": {}, "files": files})


class BackboneManifest(_Stored):
    """One exported backbone, shared by products; `sha256` is that of its weights."""

    kind: Literal["backbone"] = "backbone"
    name: str
    sha256: Sha256
    origin: str


WAYS_ON = "roll back to another version, import it again or fit again"


def _plain(value: Any) -> Any:
    """NumPy values and paths as JSON values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)
