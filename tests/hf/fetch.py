# SPDX-License-Identifier: Apache-2.0
"""
Fetch the common tests of the installed Transformers: `python tests/hf/fetch.py FOLDER` puts them in FOLDER/VERSION.

They lie in the source distribution, which pip downloads, and not in the wheel. What is there already is kept.
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


def fetch(folder: Path) -> Path:
    """The folder of the common tests, of the version of Transformers that is installed."""
    number = version("transformers")
    tests = folder / number
    if tests.is_dir():
        return tests
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", "transformers", "--dest", temporary, f"transformers=={number}"]
        subprocess.run(command, check=True)
        (archive,) = Path(temporary).glob("*.tar.gz")
        with tarfile.open(archive) as source:
            root = archive.name.removesuffix(".tar.gz")
            members = [member for member in source.getmembers() if member.name.startswith(f"{root}/tests/")]
            source.extractall(temporary, members, filter="data")
        (Path(temporary) / root / "tests").rename(tests)
    return tests


if __name__ == "__main__":
    print(f"Transformers' common tests: {fetch(Path(sys.argv[1]))}")
