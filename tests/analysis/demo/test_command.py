# SPDX-License-Identifier: Apache-2.0
import socket
import sys
from pathlib import Path

from PIL import Image

from analysis.__main__ import main
from analysis.demo import command, page
from analysis.demo.command import find_examples
from analysis.models import load_checkpoint
from tests.analysis.conftest import karat_model, save


def refusal(capsys, *words) -> str:
    assert main(["demo", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_served_is_refused(tmp_path, karat, capsys, monkeypatch):
    assert "`--port` is 70000" in refusal(capsys, "--model", karat, "--port", 70000)
    assert "go with --push-to-space" in refusal(capsys, "--model", karat, "--private")
    assert "`--examples` nowhere does not exist" in refusal(capsys, "--model", karat, "--examples", "nowhere")
    Path(karat, "preprocessor_config.json").unlink()
    assert "has no image processor" in refusal(capsys, "--model", karat)


def test_without_a_model_it_shows_the_example_if_there_is_one(karat, photos, tmp_path, capsys, monkeypatch):
    served = []
    monkeypatch.setattr(page, "build", lambda viewers, examples: (viewers, list(map(Image.open, examples))))
    monkeypatch.setattr(page, "serve", lambda built, *where: served.append(built))
    monkeypatch.setattr(command, "EXAMPLE", tmp_path / "none")
    assert "`--model`" in refusal(capsys) and not served
    monkeypatch.setattr(command, "EXAMPLE", Path(karat))
    Path(photos).rename(Path(karat, "photos"))
    assert main(["demo"]) == 0
    ((viewers, examples),) = served
    assert [viewer.checkpoint.source for viewer in viewers] == [karat] and len(examples) == 6
    assert karat in capsys.readouterr().out


def test_a_port_that_is_taken_is_refused(karat, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot be served at --host 127.0.0.1 --port {port}" in refusal(
            capsys, "--model", karat, "--port", port
        )


def test_models_of_other_channels_are_refused(tmp_path, capsys):
    grey = save(karat_model(num_channels=1), tmp_path / "grey")
    assert "does not run on an RGB image" in refusal(capsys, "--model", grey)


def test_without_gradio_the_error_says_what_to_install(karat, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "analysis.demo.page", raising=False)
    monkeypatch.delattr("analysis.demo.page", raising=False)
    assert '".[demo]"' in refusal(capsys, "--model", karat)


def test_examples_are_the_runs_held_out_images(run_folder, karat, tmp_path, capsys):
    runs = [load_checkpoint(run_folder)]
    files = find_examples(None, runs, tmp_path)
    assert len(files) == 12
    assert all(Image.open(file).size == (8, 8) for file in files)
    assert find_examples(None, [load_checkpoint(karat)], tmp_path) == []
    assert "--examples" in capsys.readouterr().out
    # Nothing is downloaded to have examples.
    runs[0].run["settings"] |= {"data_set": "IMNET"}
    assert find_examples(None, runs, tmp_path) == []
