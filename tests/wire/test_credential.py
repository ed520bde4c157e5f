from __future__ import annotations

from pathlib import Path

import pytest

from ood_runners.errors import OODError
from ood_runners.wire import credential
from ood_runners.wire.credential import Credential

OLD, NEW = "old-0123456789abcdef", "new-0123456789abcdef"


def test_nothing_is_sent_where_no_key_is_set() -> None:
    assert Credential({}).headers() == {}


def test_the_key_of_the_environment_is_sent() -> None:
    assert Credential({"OOD_API_KEY": OLD}).headers() == {"X-API-Key": OLD}


def test_the_newest_of_a_file_is_sent_as_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credential, "LOOK_S", -1.0)
    file = tmp_path / "keys"
    file.write_text(f"# of the line\n{OLD}\n")
    own = Credential({"OOD_API_KEY_FILE": str(file)})
    assert own.headers() == {"X-API-Key": OLD}
    file.write_text(f"{OLD}\n{NEW}\n")
    assert own.headers() == {"X-API-Key": NEW}
    file.unlink()
    assert own.headers() == {"X-API-Key": NEW}  # as the guard, it keeps what it read


def test_a_file_that_cannot_be_read_at_first_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OODError, match="cannot be read"):
        Credential({"OOD_API_KEY_FILE": str(tmp_path / "none")}).headers()
