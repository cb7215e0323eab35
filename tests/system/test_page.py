# SPDX-License-Identifier: Apache-2.0
"""
The page of `python -m analysis demo` as a visitor sees it, in headless Chromium.

Pictures are compared with what `Viewer` draws for the same file and settings; test_viewer.py tests what that is.
"""

import io
import shutil
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from analysis.demo import page
from analysis.demo.command import load_viewers
from analysis.demo.viewer import STAGES, VIEWS, Viewer
from tests.analysis.conftest import SIZES, karat_model, save


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; on Debian: apt-get install chromium")

# Milliseconds, on a machine that does much else.
PATIENCE = 60_000
expect.set_options(timeout=PATIENCE)


def photo(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def viewers(folder) -> list[Viewer]:
    """A KArAt model, and a softmax model with other labels, more blocks and heads, and larger images."""
    torch.manual_seed(2)
    labels = {0: "oak", 1: "elm"}
    sizes = {
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 16,
        "id2label": labels,
        "label2id": {name: index for index, name in labels.items()},
    }
    other = save(ViTForImageClassification(ViTConfig(**{**SIZES, **sizes})), folder / "other")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(other)
    return load_viewers(save(karat_model(), folder / "mine"), other, "cpu")


@pytest.fixture(scope="module")
def served(folder, viewers):
    """The address of the page."""
    photo(7).save(folder / "example.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        running = page.launch(page.build(viewers, [str(folder / "example.png")]), port=None)
        yield running.local_url
        running.close()


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        # No sandbox: CI is root in a container.
        flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, served):
    """A function that opens the page as a new visitor; at the end, no request must have gone anywhere else."""
    contexts, elsewhere, errors = [], [], []

    def request(request):
        if not request.url.startswith((served, "data:", "blob:")):
            elsewhere.append(request.url)

    def call(**how) -> Page:
        context = chromium.new_context(**how)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        context.on("request", request)
        opened = context.new_page()
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.goto(served)
        opened.locator("#picture").wait_for()
        return opened

    yield call
    for context in contexts:
        context.close()
    assert elsewhere == []
    assert errors == []


def upload(visitor: Page, path: Path) -> None:
    visitor.set_input_files("#picture input[type=file]", path)


def saved(folder: Path, name: str, image: Image.Image) -> str:
    image.save(folder / name)
    return str(folder / name)


def shown(visitor: Page, name: str) -> np.ndarray | None:
    source = visitor.locator(f"#{name} img").first
    if source.count() == 0:
        return None
    return np.asarray(Image.open(io.BytesIO(visitor.request.get(source.get_attribute("src")).body())).convert("RGB"))


def expect_picture(visitor: Page, name: str, expected: np.ndarray) -> None:
    """Wait until the picture is the expected one."""
    last = None
    for _ in range(PATIENCE // 100):
        last = shown(visitor, name)
        if last is not None and last.shape == expected.shape and np.abs(last - expected.astype(int)).max() <= 1:
            return
        visitor.wait_for_timeout(100)
    raise AssertionError(f"{name} shows {'nothing' if last is None else 'another picture'}")


def expect_guesses(visitor: Page, name: str, guesses: dict[str, float]) -> None:
    box = visitor.locator(f"#{name}")
    expect(box.locator("h2")).to_have_text(next(iter(guesses)))
    bars = [text.split()[0] for text in box.locator("button, .confidence-set").all_inner_texts()]
    assert bars == list(guesses)


def move(visitor: Page, slider: str, key: str) -> None:
    visitor.locator(f"#{slider} input[type=range]").press(key)


def test_an_upload_gives_guesses_and_pictures_of_both_models(visit, viewers, tmp_path):
    visitor, path = visit(), saved(tmp_path, "a.png", photo(1))
    upload(visitor, path)
    for number, viewer in enumerate(viewers):
        expect_guesses(visitor, f"guesses-{number}", viewer.see(path).guesses)
        # The sliders start at the last block of the deeper model, which the first one lacks.
        if number == 1:
            expect_picture(visitor, "attention-1", viewer.draw_attention(path, 2, 0)[0])
        expect_picture(visitor, f"overview-{number}", viewer.draw_overview(path, chosen=(2, 0)))
    expect(visitor.locator("#attention-0-words")).to_contain_text("This model has no block 2")
    expect(visitor.locator("#attention-0")).to_be_hidden()
    expect(visitor.locator("#functions-1-words")).to_contain_text("nothing learned to draw")


def test_the_settings_change_what_is_shown(visit, viewers, tmp_path):
    visitor, path = visit(), saved(tmp_path, "a.png", photo(2))
    upload(visitor, path)
    expect_picture(visitor, "attention-1", viewers[1].draw_attention(path, 2, 0)[0])
    move(visitor, "block", "ArrowLeft")
    for number, viewer in enumerate(viewers):
        expect_picture(visitor, f"attention-{number}", viewer.draw_attention(path, 1, 0)[0])
        expect_picture(visitor, f"overview-{number}", viewer.draw_overview(path, chosen=(1, 0)))
    expect_picture(visitor, "functions-0", viewers[0].draw_functions(path, 1, 0)[0])
    move(visitor, "head", "ArrowRight")
    expect_picture(visitor, "attention-0", viewers[0].draw_attention(path, 1, 1)[0])
    expect_picture(visitor, "functions-0", viewers[0].draw_functions(path, 1, 1)[0])
    expect(visitor.locator("#attention-0-words")).to_contain_text("block 1, head 1 (KArAt)")
    move(visitor, "opacity", "Home")
    expect_picture(visitor, "attention-0", viewers[0].draw_attention(path, 1, 1, opacity=0)[0])
    move(visitor, "opacity", "End")
    visitor.get_by_label("Mean of the heads").check()
    expect_picture(visitor, "attention-0", viewers[0].draw_attention(path, 1, 1, VIEWS[1], opacity=1)[0])
    visitor.get_by_label("Scores, before the activation").check()
    before = viewers[0].draw_attention(path, 1, 1, VIEWS[1], "before", opacity=1)[0]
    expect_picture(visitor, "attention-0", before)
    expect_picture(visitor, "overview-0", viewers[0].draw_overview(path, "before", (1, 1)))
    visitor.get_by_label("All blocks (rollout)").check()
    expect_picture(visitor, "attention-0", viewers[0].draw_attention(path, 1, 1, VIEWS[2], opacity=1)[0])


def test_a_click_on_a_head_chooses_it(visit, viewers, tmp_path):
    visitor, path = visit(), saved(tmp_path, "a.png", photo(3))
    upload(visitor, path)
    overview = visitor.locator("#overview-0 img")
    overview.scroll_into_view_if_needed()
    overview.evaluate("image => image.decode()")
    box = overview.bounding_box()
    # Blocks to the right, heads downwards, within margins at the left and the bottom.
    overview.click(position={"x": box["width"] * 0.3, "y": box["height"] * 0.2})
    expect(visitor.locator("#block input[type=number]")).to_have_value("0")
    expect_picture(visitor, "attention-0", viewers[0].draw_attention(path, 0, 0)[0])
    overview.click(position={"x": box["width"] * 0.3, "y": box["height"] * 0.7})
    expect(visitor.locator("#head input[type=number]")).to_have_value("1")
    expect(visitor.locator("#block input[type=number]")).to_have_value("0")
    expect_picture(visitor, "attention-0", viewers[0].draw_attention(path, 0, 1)[0])


def test_a_broken_file_is_a_message_and_the_page_goes_on(visit, viewers, tmp_path):
    visitor = visit()
    good = saved(tmp_path, "good.png", photo(4))
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(good).read_bytes()[:200])
    upload(visitor, good)
    expect_guesses(visitor, "guesses-0", viewers[0].see(good).guesses)
    visitor.get_by_label("Remove Image").click()
    expect(visitor.locator("#attention-1")).to_be_hidden()
    upload(visitor, broken)
    expect(visitor.get_by_role("alert")).to_contain_text("This file cannot be read")
    # Nothing of the picture before is left beside the message, and no trace of Python.
    expect(visitor.locator("#guesses-0 h2")).to_have_count(0)
    expect(visitor.locator("#attention-1")).to_be_hidden()
    assert "Traceback" not in visitor.content()
    assert "PIL" not in visitor.content()
    visitor.get_by_label("Remove Image").click()
    expect(visitor.get_by_role("alert")).to_have_count(0)
    upload(visitor, good)
    expect_guesses(visitor, "guesses-0", viewers[0].see(good).guesses)


def test_an_image_of_50_megapixels(visit, viewers, tmp_path):
    visitor, path = visit(), saved(tmp_path, "large.jpg", Image.new("RGB", (8192, 6144), (200, 40, 30)))
    upload(visitor, path)
    expect_guesses(visitor, "guesses-1", viewers[1].see(path).guesses)
    expect(visitor.locator("#status")).to_contain_text("50 megapixels and was shrunk")


def test_two_visitors_at_once_see_their_own(visit, viewers, tmp_path):
    visitors = [visit(), visit()]
    paths = [saved(tmp_path, f"{name}.png", photo(seed)) for name, seed in (("one", 5), ("two", 6))]
    # Neither waits for the other.
    for visitor, path in zip(visitors, paths):
        upload(visitor, path)
    for visitor, key in zip(visitors, ("ArrowLeft", "Home")):
        move(visitor, "block", key)
    blocks = (1, 0)
    for visitor, path, block in zip(visitors, paths, blocks):
        for number, viewer in enumerate(viewers):
            expect_guesses(visitor, f"guesses-{number}", viewer.see(path).guesses)
            expect_picture(visitor, f"attention-{number}", viewer.draw_attention(path, block, 0)[0])
    # One moves on, the other stays.
    move(visitors[0], "head", "ArrowRight")
    expect_picture(visitors[0], "attention-0", viewers[0].draw_attention(paths[0], 1, 1)[0])
    expect_picture(visitors[1], "attention-0", viewers[0].draw_attention(paths[1], 0, 0)[0])
    expect(visitors[1].locator("#head input[type=number]")).to_have_value("0")


def test_a_setting_that_is_told_late_clears_nothing(viewers):
    """It has no image, where one was on its way as it moved, and its answer may come after the image's."""
    handlers = {each.api_name: each.fn for each in page.build(viewers, []).fns.values()}
    nothing = None, 0, 0, VIEWS[0], next(iter(STAGES)), 1.0
    assert handlers["attention"](*nothing) == handlers["overview"](*nothing) == gr.skip()
    assert handlers["image"](*nothing)[0] == ""


def test_an_example(visit, viewers, folder):
    visitor = visit()
    visitor.locator(".gallery-item, .gallery button").first.click()
    expect_guesses(visitor, "guesses-0", viewers[0].see(str(folder / "example.png")).guesses)


def test_the_webcam(visit):
    visitor = visit(permissions=["camera"])
    visitor.get_by_label("Capture from camera").click()
    visitor.get_by_text("Click to Access Webcam").click()
    visitor.wait_for_function("document.querySelector('#picture video')?.videoWidth > 0")
    visitor.get_by_label("capture photo").click()
    expect(visitor.locator("#overview-1")).to_be_visible()
    expect(visitor.locator("#guesses-0 h2")).not_to_be_empty()


def test_the_clipboard(visit, viewers, tmp_path):
    visitor = visit(permissions=["clipboard-read", "clipboard-write"])
    visitor.bring_to_front()  # only the page in front may read it
    visitor.evaluate(
        """async () => {
            const canvas = document.createElement("canvas");
            canvas.width = canvas.height = 16;
            canvas.getContext("2d").fillRect(0, 0, 9, 9);
            const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
            await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }"""
    )
    visitor.get_by_label("Paste from clipboard").click()
    expect(visitor.locator("#status")).to_contain_text("Transparency is ignored")
    pixels = Image.new("RGB", (16, 16))
    expect_guesses(visitor, "guesses-0", viewers[0].see(saved(tmp_path, "black.png", pixels)).guesses)


def test_a_model_of_one_block_and_one_head(chromium, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    model = save(karat_model(num_hidden_layers=1, num_attention_heads=1), tmp_path / "model")
    (viewer,) = load_viewers(model, None, "cpu")
    running, path = page.launch(page.build([viewer], [])), saved(tmp_path, "a.png", photo(9))
    try:
        visitor = chromium.new_page()
        visitor.goto(running.local_url)
        upload(visitor, path)
        expect_picture(visitor, "attention-0", viewer.draw_attention(path, 0, 0)[0])
        expect(visitor.locator("#block")).to_have_count(0)
        visitor.get_by_label("All blocks (rollout)").check()
        expect_picture(visitor, "attention-0", viewer.draw_attention(path, 0, 0, VIEWS[2])[0])
        visitor.close()
    finally:
        running.close()


def test_whatever_can_be_used_has_a_name(visit, tmp_path):
    """For those who hear the page instead of seeing it."""
    visitor = visit()
    upload(visitor, saved(tmp_path, "a.png", photo(9)))
    expect(visitor.locator("#overview-1")).to_be_visible()
    expect(visitor.locator("#picture img")).to_have_attribute("alt", "Your picture")
    nameless = visitor.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, img")]
            .filter((part) => part.offsetParent)
            .filter((part) => !(part.ariaLabel || part.title || part.alt || part.innerText ||
                (part.labels && part.labels[0]) || part.querySelector("[alt]:not([alt=''])")))
            .map((part) => part.outerHTML)"""
    )
    assert nameless == []


def test_it_fits_a_phone(visit, tmp_path):
    visitor = visit(viewport={"width": 360, "height": 740})
    upload(visitor, saved(tmp_path, "a.png", photo(8)))
    expect(visitor.locator("#overview-1")).to_be_visible()
    assert visitor.evaluate("document.documentElement.scrollWidth") <= 360
    assert visitor.locator("#overview-1").bounding_box()["width"] <= 360
