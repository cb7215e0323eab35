# SPDX-License-Identifier: Apache-2.0
"""The page: what it shows, by numbers; how it becomes a Space; and, in test_demo_browser.py, the page in Chromium."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import ExifTags, Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from analysis import attention, demo, functions, space
from analysis.__main__ import main
from analysis.checkpoints import load_checkpoint
from image_classification.errors import InputError
from tests.hub_server import READ_TOKEN, TOKEN

from .conftest import karat_model, save


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def environment(changes: dict[str, str]) -> dict[str, str]:
    return {**os.environ, **changes}


LEFT_RED = np.zeros((60, 90, 3), np.uint8)
LEFT_RED[:, :45] = (250, 10, 10)


@pytest.fixture
def viewer(karat):
    return demo.Viewer(load_checkpoint(karat), "mine")


@pytest.fixture
def photo(photos):
    return f"{photos}/0.png"


def write(path: Path, image: Image.Image, **how) -> str:
    image.save(path, **how)
    return str(path)


# Reading what people have.


def test_an_image_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees, clockwise
    image, notes = demo.read_image(write(tmp_path / "turned.jpg", Image.fromarray(LEFT_RED), exif=exif, quality=95))
    assert image.size == (60, 90)
    assert image.getpixel((30, 20))[0] > 200
    assert image.getpixel((30, 70))[0] < 50
    assert notes == []


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK"])
def test_the_modes_that_images_have(tmp_path, mode):
    image, notes = demo.read_image(write(tmp_path / "a.tif", Image.new("L", (9, 7), 255).convert(mode)))
    assert (image.mode, image.size, image.getpixel((3, 3)), notes) == ("RGB", (9, 7), (255, 255, 255), [])


def test_sixteen_bits_become_eight(tmp_path):
    deep = Image.fromarray(np.array([[0, 256 * 100, 65535]], np.uint16))
    for name in ("a.png", "a.tif"):
        image, notes = demo.read_image(write(tmp_path / name, deep))
        assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]
        assert "16 bits" in notes[0]


def test_sixteen_bits_are_turned_upright_too(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    deep = Image.fromarray(np.full((4, 9), 30000, np.uint16))
    assert demo.read_image(write(tmp_path / "a.png", deep, exif=exif))[0].size == (4, 9)


def test_transparency_is_ignored_and_said(tmp_path):
    clear, opaque = Image.new("RGBA", (5, 5), (9, 8, 7, 0)), Image.new("RGBA", (5, 5), (9, 8, 7, 255))
    image, notes = demo.read_image(write(tmp_path / "clear.png", clear))
    assert image.getpixel((0, 0)) == (9, 8, 7)
    assert "Transparency" in notes[0]
    assert demo.read_image(write(tmp_path / "opaque.png", opaque))[1] == []


def test_the_first_of_several_frames(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    image, notes = demo.read_image(write(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:]))
    assert image.getpixel((4, 4)) == (255, 0, 0)
    assert "first" in notes[0]


def test_large_images_shrink_as_they_are_read(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = write(tmp_path / "large.jpg", Image.new("RGB", (8192, 6144), (200, 40, 30)), exif=exif)
    image, notes = demo.read_image(path)
    assert image.width * image.height <= demo.SHRINK_ABOVE
    assert image.width / image.height == pytest.approx(6144 / 8192, rel=1e-3)  # turned, too
    assert image.getpixel((100, 100)) == pytest.approx((200, 40, 30), abs=3)
    assert "50 megapixels" in notes[0]


def test_images_beyond_the_limit_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "a.png", Image.new("L", (20, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 199)
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(InputError, match="too large: at most"), pytest.warns(Image.DecompressionBombWarning):
        demo.read_image(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\x89PNG\r\n\x1a\n\x00\x00", None]
)
def test_what_is_no_image_is_refused_in_words(tmp_path, content):
    path = tmp_path / "a.png"
    if content is None:  # cut short
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        content = path.read_bytes()[:3000]
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read") as refused:
        demo.read_image(str(path))
    assert str(tmp_path) not in str(refused.value)  # visitors need not know where files lie


def test_a_deleted_upload_is_asked_for_again(tmp_path):
    with pytest.raises(InputError, match="upload it again"):
        demo.read_image(str(tmp_path / "gone.png"))


# What is shown.


def test_guesses_are_the_models(viewer, karat, photo):
    model = AutoModelForImageClassification.from_pretrained(karat)
    pixels = AutoImageProcessor.from_pretrained(karat)(Image.open(photo), return_tensors="pt")
    with torch.no_grad():
        expected = model(**pixels).logits.softmax(-1)[0]
    guesses = viewer.see(photo).guesses
    assert list(guesses) == [model.config.id2label[index] for index in expected.argsort(descending=True).tolist()]
    np.testing.assert_allclose(list(guesses.values()), expected.sort(descending=True).values, rtol=1e-4)


def test_classes_of_one_name_are_told_apart(tmp_path, photo):
    names = {0: "crane", 1: "crane", 2: "newt"}
    folder = save(karat_model(id2label=names, label2id={"crane": 1, "newt": 2}), tmp_path / "model")
    guesses = demo.Viewer(load_checkpoint(folder), "mine").see(photo).guesses
    assert set(guesses) == {"crane", "crane (2)", "newt"}
    assert sum(guesses.values()) == pytest.approx(1, abs=1e-4)


def test_without_a_classifier_there_are_no_guesses_but_maps(tmp_path, photo):
    folder = tmp_path / "encoder"
    save(karat_model(), folder)
    karat_model().vit.save_pretrained(folder, save_original_format=False)
    encoder = demo.Viewer(load_checkpoint(str(folder)), "mine")
    assert encoder.see(photo).guesses == {}
    assert encoder.draw_attention(photo, 0, 0)[0] is not None


def redness(picture: np.ndarray) -> np.ndarray:
    """Of each of 3 x 3 patches at its centre: how much more red than green there is."""
    height, width = picture.shape[:2]
    ys, xs = (((np.arange(3) + 0.5) * side / 3).astype(int) for side in (height, width))
    return (picture[..., 0].astype(float) - picture[..., 1])[np.ix_(ys, xs)]


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("view", demo.VIEWS)
def test_the_veil_is_where_the_map_is_large(viewer, photos, view, stage):
    compared = 0
    for photo in map(str, Path(photos).iterdir()):
        maps = attention.compute_all(viewer.checkpoint, viewer.see(photo).pixels)
        for block, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
            heads = getattr(maps[block], stage)[0]
            row = {"One head": heads[head], "Mean of the heads": heads.mean(0)}.get(view, maps[0].rollout[0])
            picture, words = viewer.draw_attention(photo, block, head, view, stage)
            expected = {
                "One head": f"block {block}, head {head} (KArAt)",
                "Mean of the heads": f"block {block}, mean of 2 heads",
            }.get(view, "rollout over all 2 blocks")
            if row[1:].max() <= 0:
                assert words == f"{expected}: positive nowhere"
                assert redness(picture).max() == 0
            else:
                assert words == expected
                # Not equal, since the veil is smooth.
                positive = row[1:].clip(0)
                assert np.corrcoef(redness(picture).flatten(), positive)[0, 1] > 0.95
                compared += 1
    assert compared > 5


def test_the_strength_of_the_veil(viewer, photo):
    pictures = [viewer.draw_attention(photo, 0, 0, opacity=opacity)[0] for opacity in (0, 0.4, 1)]
    means = [redness(picture).max() for picture in pictures]
    assert means[0] == 0 < means[1] < means[2]


def test_compute_all_is_compute_of_every_block(viewer):
    pixels = torch.randn(3, 3, 12, 12)
    for block, maps in enumerate(attention.compute_all(viewer.checkpoint, pixels, query=2, batch_size=2)):
        alone = attention.compute(viewer.checkpoint, pixels, block, query=2)
        assert (maps.block, maps.query) == (alone.block, alone.query) == (block, 2)
        for field in ("before", "after", "rollout"):
            np.testing.assert_allclose(getattr(maps, field), getattr(alone, field), atol=1e-6)


def test_a_click_on_the_overview_finds_the_head_that_is_framed(tmp_path, photo):
    viewer = demo.Viewer(load_checkpoint(save(karat_model(num_attention_heads=3), tmp_path / "three")), "mine")
    plain = viewer.draw_overview(photo).astype(int)
    for chosen in ((0, 0), (0, 2), (1, 1)):
        ys, xs = np.nonzero(np.abs(viewer.draw_overview(photo, chosen=chosen) - plain).sum(-1))
        assert viewer.head_at((xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2) == chosen
    assert viewer.head_at(1, 1) is None  # the margin


def test_the_overview_shows_signs(viewer, photo):
    maps = viewer.see(photo).maps
    rows = np.stack([each.after[0] for each in maps])
    axes = demo.style.figure().subplots()
    (image,) = attention.draw_overview(rows, (3, 3), axes).images
    side = image.get_array().shape[0] // 2  # 2 heads
    for block in range(2):
        for head in range(2):
            tile = image.get_array()[head * side : (head + 1) * side, block * side : (block + 1) * side]
            row = rows[block, head, 1:]
            # Between the maps there is 0.
            assert tile.max() == pytest.approx(max(0, (row / np.abs(row).max()).max()))
            assert tile.min() == pytest.approx(min(0, (row / np.abs(row).max()).min()))


def test_learned_functions_are_those_of_the_analysis(viewer, photo, monkeypatch):
    drawn = []
    monkeypatch.setattr(functions, "draw_all", lambda data, figure, **_: drawn.extend(data))
    picture, words = viewer.draw_functions(photo, 1, 0)
    (expected,) = functions.compute(viewer.checkpoint, viewer.see(photo).pixels, 1, [0])
    np.testing.assert_array_equal(drawn[0].curves, expected.curves)
    assert drawn[0].edges == expected.edges
    assert picture is not None
    assert "40 learned functions" in words  # r = 4 times N = 10


def test_what_has_nothing_learned_says_so(tmp_path, softmax, photo):
    plain = demo.Viewer(load_checkpoint(softmax), "plain")
    mixed = demo.Viewer(load_checkpoint(save(karat_model(num_karat_heads=1), tmp_path / "mixed")), "mixed")
    for viewer, head in ((plain, 0), (mixed, 1)):
        picture, words = viewer.draw_functions(photo, 1, head)
        assert picture is None
        assert "softmax: one fixed function" in words
    assert mixed.draw_functions(photo, 1, 0)[0] is not None


def test_operators_of_several_steps_say_which_is_shown(tmp_path, photo):
    deep = demo.Viewer(load_checkpoint(save(karat_model(modular_mode=None), tmp_path / "deep")), "deep")
    assert "the first of its 2 steps" in deep.draw_functions(photo, 0, 0)[1]


def test_a_block_or_head_that_a_model_lacks(viewer, photo):
    assert viewer.draw_attention(photo, 2, 0) == (None, "This model has no block 2: its blocks are 0 to 1.")
    assert viewer.draw_functions(photo, 0, 5) == (None, "This model has no head 5: its heads are 0 to 1.")
    # The mean needs no head, rollout neither.
    assert viewer.draw_attention(photo, 1, 5, "Mean of the heads")[0] is not None
    assert viewer.draw_attention(photo, 9, 5, "All blocks (rollout)")[0] is not None
    np.testing.assert_array_equal(viewer.draw_overview(photo, chosen=(9, 9)), viewer.draw_overview(photo))


def test_visitors_at_once_get_their_own(karat, photos):
    """Each of many threads must get what it would get alone: hooks on a shared model would mix them up."""
    files = sorted(map(str, Path(photos).iterdir()))
    alone = demo.Viewer(load_checkpoint(karat), "alone")
    expected = {file: alone.see(file).maps[0].after for file in files}
    shared = demo.Viewer(load_checkpoint(karat), "shared")
    start = threading.Barrier(len(files))

    def visit(file):
        start.wait()
        seen = shared.see(file).maps[0].after
        shared.draw_functions(file, 0, 0)
        return file, seen

    with ThreadPoolExecutor(len(files)) as pool:
        for file, seen in pool.map(visit, files):
            np.testing.assert_allclose(seen, expected[file], atol=1e-6)


# The command.


def refusal(capsys, *words) -> str:
    assert main(["demo", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_served_is_refused(tmp_path, karat, capsys, monkeypatch):
    assert "`--port` is 70000" in refusal(capsys, "--model", karat, "--port", 70000)
    assert "go with --push_to_space" in refusal(capsys, "--model", karat, "--private")
    assert "`--examples` nowhere does not exist" in refusal(capsys, "--model", karat, "--examples", "nowhere")
    Path(karat, "preprocessor_config.json").unlink()
    assert "has no image processor" in refusal(capsys, "--model", karat)


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
    monkeypatch.delitem(sys.modules, "analysis.page", raising=False)
    monkeypatch.delattr("analysis.page", raising=False)
    assert '".[demo]"' in refusal(capsys, "--model", karat)


def test_examples_are_the_runs_held_out_images(run_folder, karat, tmp_path, capsys):
    runs = [load_checkpoint(run_folder)]
    files = demo.find_examples(None, runs, tmp_path)
    assert len(files) == 12
    assert all(Image.open(file).size == (8, 8) for file in files)
    assert demo.find_examples(None, [load_checkpoint(karat)], tmp_path) == []
    assert "--examples" in capsys.readouterr().out
    # Nothing is downloaded to have examples.
    runs[0].run["settings"] |= {"data_set": "IMNET"}
    assert demo.find_examples(None, runs, tmp_path) == []


# The Space.


def push(*words) -> int:
    return main(["demo", "--push_to_space", "me/page", *map(str, words)])


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
    assert main(["demo", "--model", "x", "--push_to_space", "page"]) == 2
    assert "expected USER/NAME" in capsys.readouterr().err


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
