"""Fitted products as immutable versions in the BentoML model store: write, read, promote, roll back, carry."""

from ood_runners.artifacts.cache import LoadedVersions
from ood_runners.artifacts.catalogue import VersionInfo, delete_version, list_versions, resolve
from ood_runners.artifacts.manifest import (
    SCHEMA_VERSION,
    BackboneEntry,
    BackboneManifest,
    CalibrationEntry,
    DataEntry,
    DetectorEntry,
    FeaturesEntry,
    GoldenEntry,
    InputEntry,
    Manifest,
    MemberEntry,
    SkippedFile,
)
from ood_runners.artifacts.names import check_product, parse, products
from ood_runners.artifacts.prune import Pruned, prune
from ood_runners.artifacts.record import Change, history, production, record_stamp, stamps
from ood_runners.artifacts.remote import pull_version, push_version
from ood_runners.artifacts.staging import check_writable
from ood_runners.artifacts.store import (
    Stored,
    VersionWriter,
    backbone_weights,
    exporting,
    find_backbone,
    open_writer,
    read_part,
    read_version,
    save_arrays,
    write_backbone,
    write_version,
)
from ood_runners.artifacts.transfer import export_version, import_version
from ood_runners.artifacts.versions import promote, rollback

__all__ = [
    "SCHEMA_VERSION",
    "BackboneEntry",
    "BackboneManifest",
    "CalibrationEntry",
    "Change",
    "DataEntry",
    "DetectorEntry",
    "FeaturesEntry",
    "GoldenEntry",
    "InputEntry",
    "LoadedVersions",
    "Manifest",
    "MemberEntry",
    "Pruned",
    "SkippedFile",
    "Stored",
    "VersionInfo",
    "VersionWriter",
    "backbone_weights",
    "check_product",
    "check_writable",
    "delete_version",
    "export_version",
    "exporting",
    "find_backbone",
    "history",
    "import_version",
    "list_versions",
    "open_writer",
    "parse",
    "production",
    "products",
    "promote",
    "prune",
    "pull_version",
    "push_version",
    "read_part",
    "read_version",
    "record_stamp",
    "resolve",
    "rollback",
    "save_arrays",
    "stamps",
    "write_backbone",
    "write_version",
]
