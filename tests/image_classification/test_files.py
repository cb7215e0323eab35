# SPDX-License-Identifier: Apache-2.0
import hashlib
import os

import pytest

from image_classification.files import flush, part_of, sha256, written_whole


def test_a_file_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.json"
    with written_whole(path) as part:
        part.write_text("{}")
        assert part == part_of(path) and not path.exists()
    assert path.read_text() == "{}" and sha256(path) == hashlib.sha256(b"{}").hexdigest()
    with pytest.raises(ValueError, match="stopped"), written_whole(path) as part:
        part.write_text("half")
        raise ValueError("stopped")
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"] and path.read_text() == "{}"


@pytest.mark.parametrize("system", ["posix", "nt"])
def test_only_what_may_be_written_is_flushed(tmp_path, monkeypatch, system):
    """Windows refuses any other."""
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "a"
    file.touch()
    opened, os_open = [], os.open
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda path, flags: opened.append((path, flags)) or os_open(path, flags))
        patch.setattr(os, "name", system)
        flush(file)
        flush(file.parent)
    assert opened == [(file, os.O_RDWR)] + [(file.parent, os.O_RDONLY)] * (system == "posix")
