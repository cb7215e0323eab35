# SPDX-License-Identifier: Apache-2.0
"""How the page becomes a Space, and that this one runs."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml

from analysis.__main__ import main
from analysis.demo import space
from tests.hub_server import READ_TOKEN, TOKEN


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def environment(changes: dict[str, str]) -> dict[str, str]:
    return {**os.environ, **changes}


def push(*words) -> int:
    return main(["demo", "--push-to-space", "me/page", *map(str, words)])


def pushed(hub):
    return hub.repositories["space", "me/page"]


def test_a_space_has_all_that_it_needs(hub, karat, softmax, photos, capsys):
    Path(karat, "run.json").write_text("{}")  # with paths of this machine
    Path(karat, "optimizer.bin").write_bytes(b"large")
    words = ["--model", karat, "--compare", softmax, "--examples", photos]
    assert push(*words, "--private") == 0, capsys.readouterr().err
    assert capsys.readouterr().out.endswith(f"{hub.endpoint}/spaces/me/page\n")
    files = pushed(hub).files()
    assert pushed(hub).private
    assert sorted(file for file in files if file.startswith("models/karat/")) == [
        "models/karat/config.json",
        "models/karat/model.safetensors",
        "models/karat/preprocessor_config.json",
    ]
    assert files["models/softmax/model.safetensors"] == Path(softmax, "model.safetensors").read_bytes()
    assert len([file for file in files if file.startswith("examples/")]) == 6
    metadata = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (metadata["sdk"], metadata["app_file"]) == ("gradio", "app.py")
    assert len(metadata["title"]) <= 60
    import gradio

    assert metadata["sdk_version"] == gradio.__version__
    pinned = dict(line.split("==") for line in files["requirements.txt"].decode().splitlines())
    assert pinned["torch"] == torch.__version__.partition("+")[0]
    assert {"transformers", "datasets", "matplotlib", "pillow"} <= set(pinned)
    assert "gradio" not in pinned


def test_a_space_of_models_on_the_hub_names_them(hub, karat):
    hub.add("somebody/karat", {path.name: path.read_bytes() for path in Path(karat).iterdir() if path.is_file()})
    assert push("--model", "somebody/karat") == 0
    files = pushed(hub).files()
    assert not [file for file in files if file.startswith("models/")]
    assert "'--model', 'somebody/karat'" in files["app.py"].decode()
    assert yaml.safe_load(files["README.md"].decode().split("---")[1])["models"] == ["somebody/karat"]


def test_an_update_keeps_what_somebody_added_and_drops_what_is_not_needed(hub, karat, softmax):
    assert push("--model", karat, "--compare", softmax) == 0
    hub.change("me/page", {"notes.md": b"mine"}, kind="space")
    assert push("--model", karat) == 0
    files = pushed(hub).files()
    assert files["notes.md"] == b"mine"
    assert "models/karat/config.json" in files
    assert "models/softmax/config.json" not in files
    assert "softmax" not in files["app.py"].decode()
    assert hub.count("POST /api/repos/create") == 1
    assert set(json.loads(files[space.RECORD])["files"]) == set(files) - {"notes.md", space.RECORD}


def test_another_space_is_not_overwritten_unasked(hub, karat, capsys):
    theirs = {"app.py": b"theirs", "data.csv": b"1"}
    hub.add("me/page", theirs, kind="space")
    assert push("--model", "no-such-model") == 2  # said before any model is loaded
    error = capsys.readouterr().err
    assert "did not make it: it holds app.py, data.csv." in error
    assert "--overwrite" in error
    assert pushed(hub).files() == theirs
    assert push("--model", karat, "--overwrite") == 0
    assert pushed(hub).files()["data.csv"] == b"1"
    assert pushed(hub).files()["app.py"] != b"theirs"


def test_a_new_empty_space_is_filled(hub, karat):
    hub.add("me/page", kind="space")
    assert push("--model", karat) == 0
    assert "app.py" in pushed(hub).files()


def test_nothing_that_somebody_pushed_in_the_meantime_is_overwritten(hub, karat, capsys, monkeypatch):
    hub.add("me/page", kind="space")
    files = space.files

    def meanwhile(*args):
        hub.change("me/page", {"app.py": b"theirs"}, kind="space")
        return files(*args)

    monkeypatch.setattr(space, "files", meanwhile)
    assert push("--model", karat) == 2
    assert "somebody else wrote there at the same time" in capsys.readouterr().err
    assert pushed(hub).files() == {"app.py": b"theirs"}


@pytest.mark.parametrize(
    ("token", "status", "words"),
    [
        (None, None, "log in with `hf auth login`"),
        ("hf_nobody", None, "does not know your token"),
        (READ_TOKEN, None, "your token may not write there: Your token has not the permission to write"),
        (TOKEN, 500, "the Hub answers 500 (told so)"),
        (TOKEN, "drop", "the Hub cannot be reached ("),
    ],
)
def test_what_the_hub_refuses_is_said(hub, karat, capsys, monkeypatch, token, status, words):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    if status is not None:
        hub.fail("GET /api/whoami-v2", status)
    assert push("--model", karat) == 2
    assert words in capsys.readouterr().err


def test_an_upload_that_the_hub_refuses_is_said(hub, karat, capsys):
    hub.fail("PUT /lfs/", 403)
    assert push("--model", karat) == 2
    error = capsys.readouterr().err
    assert "your token may not write there" in error and "Traceback" not in error


def test_names_of_spaces(hub, capsys):
    assert main(["demo", "--model", "x", "--push-to-space", "page"]) == 2
    assert "expected USER/NAME" in capsys.readouterr().err


@pytest.mark.system
def test_the_space_runs(hub, karat, photos, tmp_path):
    """What was pushed serves the page by itself, away from this clone, at the address that a Space sets."""
    assert push("--model", karat, "--examples", photos) == 0
    folder = tmp_path / "space"
    for name, content in pushed(hub).files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    settings = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(free_port()), "PYTHONPATH": ""}
    with (tmp_path / "log").open("w") as log:
        app = subprocess.Popen(
            [sys.executable, "space/app.py"], cwd=tmp_path, env=environment(settings), stdout=log, stderr=log
        )
    try:
        address = f"http://127.0.0.1:{settings['GRADIO_SERVER_PORT']}/"
        while f"The page is at {address}" not in (tmp_path / "log").read_text():
            assert app.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        page = urllib.request.urlopen(address).read().decode()
        assert "What the model looks at" in page
    finally:
        app.terminate()
        app.wait()
