# SPDX-License-Identifier: Apache-2.0
"""The page of `python -m analysis demo`, in Gradio: what is on it, and what happens when. `viewer` draws it."""

import html
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass


# Gradio asks when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

from image_classification.errors import InputError
from image_classification.models.building import describe_model
from image_classification.reports.card import escaped

from .. import style
from .viewer import STAGES, TOP, VIEWS, Viewer


# Uploaded images, and pictures made of them, are deleted after this many seconds, and when the page ends.
KEPT = 3600
# Who comes when so many wait is told to try again later.
QUEUE = 64
LARGEST_FILE = "200mb"

TITLE = "What the model looks at"
INTRODUCTION = f"""# {TITLE}
Give it a picture. You get its best guesses, and where it looks: the **redder** a part, the more the model takes from
there. It looks many times: with several *heads* side by side, in several *blocks* one after the other."""
ABOUT_KARAT = """ How a head turns scores into attention is one fixed function in the usual model, *softmax*; **KArAt**
(Kolmogorov-Arnold attention) learns thousands of them."""
OVERVIEW = "**All heads.** Click one to choose it. Red: positive, blue: negative, each on its own scale."

# None where they would cover what is to be clicked.
BUTTONS = ["download", "fullscreen"]

CSS = """
.gradio-container { max-width: 1480px !important; margin: auto; }
#status .problem { padding: 0.6em 0.9em; border-left: 4px solid #D55E00; background: #D55E0018; }
#picture img { width: 100%; height: 100%; object-fit: contain; }
.model { min-height: 7em; }
.model h2 { margin: 0; }
.model p { opacity: 0.75; font-size: 0.9em; }
.overview img { cursor: pointer; }
"""

# For screen readers: Gradio leaves the pictures that are buttons without a name, as often as it draws them.
NAMES = """() => {
    const name = () => {
        document.querySelectorAll("#examples img").forEach((img, index) => { img.alt ||= `Example ${index + 1}`; });
        document.querySelectorAll("#picture img").forEach((img) => { img.alt ||= "Your picture"; });
    };
    new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
    name();
}"""


@dataclass
class Part:
    """
    A part of a model's column.

    Args:
        components: of Gradio.
        show: their values for an image file and the settings of a visitor: see `Viewer.draw_attention`.
        empty: their values where there is no image.
    """

    components: list
    show: Callable[[str, int, int, str, str, float], list]
    empty: list


def build(viewers: list[Viewer], examples: list[str]) -> gr.Blocks:
    """
    Build the page, which is not yet served, of one model or several side by side, and image files as examples.

    It keeps nothing about its visitors: each request brings its image and its settings along, so that nobody is ever
    shown what is another's.
    """
    blocks = max(viewer.checkpoint.blocks for viewer in viewers)
    heads = max(viewer.checkpoint.heads for viewer in viewers)
    karat = any(viewer.checkpoint.is_karat for viewer in viewers)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT // 6, KEPT)) as page:
        gr.Markdown(INTRODUCTION + ABOUT_KARAT * karat)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(
                    label="Your picture",
                    sources=["upload", "webcam", "clipboard"],
                    type="filepath",
                    height=300,
                    buttons=[],
                    elem_id="picture",
                )
                # The file itself: `reading.read_image` reads or refuses it, in its words and not in Gradio's. Set here,
                # since beside a class of our own Gradio would write a file.
                vars(image)["preprocess"] = lambda payload: None if payload is None else payload.path
                status = gr.HTML(elem_id="status", padding=False)
                if examples:
                    gr.Examples(
                        examples,
                        image,
                        label="Or one of these",
                        elem_id="examples",
                        examples_per_page=12,
                        cache_examples=False,
                    )
            with gr.Column(scale=6, min_width=320):
                with gr.Group():
                    with gr.Row():
                        block = _number("block", blocks, blocks - 1)
                        head = _number("head", heads, 0)
                        opacity = gr.Slider(0, 1, 0.85, step=0.05, label="Strength of the red", elem_id="opacity")
                    with gr.Row():
                        view = gr.Radio(VIEWS, value=VIEWS[0], label="Show", elem_id="view")
                        stage = gr.Radio(list(STAGES), value=next(iter(STAGES)), label="Of the head", elem_id="stage")
                with gr.Row():
                    columns = [_column(viewer, number) for number, viewer in enumerate(viewers)]
        settings = [block, head, view, stage, opacity]

        def answer(event: str, triggers: list, parts: list[str], progress: str) -> None:
            """Have these triggers show these parts of all columns anew."""
            shown = [column[part] for column in columns for part in parts]
            outputs = [component for part in shown for component in part.components]

            def handler(path, block, head, view, stage, opacity):
                empty = [value for part in shown for value in part.empty]
                if path is None:
                    # A setting that moves while an image is on its way may be told after it: it clears nothing.
                    return ["", *empty] if event == "image" else gr.skip()
                chosen = int(block), int(head), view, STAGES[stage], opacity
                try:
                    values = [value for part in shown for value in part.show(path, *chosen)]
                    notes = dict.fromkeys(note for viewer in viewers for note in viewer.see(path).notes)
                except InputError as error:
                    return [f'<div class="problem" role="alert">{html.escape(str(error))}</div>', *empty]
                return [html.escape(" ".join(notes)), *values]

            gr.on(
                triggers,
                handler,
                [image, *settings],
                [status, *outputs],
                api_name=event,
                api_visibility="undocumented",
                show_progress=progress,
                show_progress_on=outputs,
                trigger_mode="always_last",
                # One at a time, whoever asks: memory is needed once, and the place in the queue that is shown is true.
                concurrency_id="models",
                concurrency_limit=1,
            )

        answer("image", [image.change], ["guesses", "attention", "overview", "functions"], "full")
        answer("attention", [setting.change for setting in settings], ["attention"], "minimal")
        answer("functions", [block.change, head.change], ["functions"], "minimal")
        answer("overview", [block.change, head.change, stage.change], ["overview"], "hidden")
        for viewer, column in zip(viewers, columns):
            column["overview"].components[1].select(
                _choose(viewer), None, [block, head], show_progress="hidden", api_visibility="private"
            )
    return page


def _column(viewer: Viewer, number: int) -> dict[str, Part]:
    """Build a model's column of the page; its parts by name."""
    known = viewer.checkpoint.has_classifier
    kind = style.KIND_NAMES[viewer.checkpoint.kind]
    with gr.Column(min_width=260):
        described = describe_model(viewer.checkpoint.model)
        gr.Markdown(f"## {kind}: {escaped(viewer.name)}\n{described}", elem_classes="model")
        # Beneath each other in a narrow column, side by side in a wide one.
        with gr.Row():
            with gr.Column(min_width=320):
                if not known:
                    gr.Markdown("It makes no guesses: this checkpoint has no classifier.")
                name = f"guesses-{number}"
                guesses = gr.Label(label="Best guesses", num_top_classes=TOP, visible=known, elem_id=name)
                looks, attention = _picture("Where it looks", f"attention-{number}", buttons=BUTTONS)
            with gr.Column(min_width=320):
                all_heads, overview = _picture("All heads", f"overview-{number}", buttons=[], elem_classes="overview")
                learned, functions = _picture("Learned functions", f"functions-{number}", buttons=BUTTONS)

    def show_guesses(path, *_):
        return [viewer.see(path).guesses or None]

    def show_attention(path, *chosen):
        picture, text = viewer.draw_attention(path, *chosen)
        return [f"**Where it looks:** {text}", _shown(picture)]

    def show_overview(path, block, head, view, stage, opacity):
        return [OVERVIEW, _shown(viewer.draw_overview(path, stage, (block, head)))]

    def show_functions(path, block, head, *_):
        picture, text = viewer.draw_functions(path, block, head)
        return [f"**What this head learned.** {text}", _shown(picture)]

    empty = ["", _shown(None)]
    return {
        "guesses": Part([guesses], show_guesses, [None]),
        "attention": Part([looks, attention], show_attention, empty),
        "overview": Part([all_heads, overview], show_overview, empty),
        "functions": Part([learned, functions], show_functions, empty),
    }


def _number(what: str, count: int, value: int) -> gr.Slider | gr.Number:
    """Make a slider for the block or head, from 0 as everywhere here; none where there is only one."""
    if count == 1:
        return gr.Number(0, visible=False)
    return gr.Slider(0, count - 1, value, step=1, label=f"{what.capitalize()}, from 0", elem_id=what)


def _picture(alt: str, name: str, **how) -> tuple[gr.Markdown, gr.Image]:
    """Make a picture that is there once there is one, and the words above it."""
    words = gr.Markdown(elem_id=f"{name}-words")
    picture = gr.Image(
        alt_text=alt,
        show_label=False,
        format="png",
        interactive=False,
        visible="hidden",
        elem_id=name,
        **how,
    )
    return words, picture


def _shown(picture) -> dict:
    # Not False, which takes the component off the page: what arrives while it comes back is lost.
    return gr.update(value=picture, visible="hidden" if picture is None else True)


def _choose(viewer: Viewer):
    """Make a handler of clicks on a model's overview, which moves the sliders to the head that was clicked."""

    def choose(event: gr.SelectData):
        found = viewer.head_at(*event.index)
        return [gr.skip(), gr.skip()] if found is None else list(found)

    return choose


def serve(page: gr.Blocks, host: str | None, port: int | None, share: bool) -> None:
    """
    Serve the page until Ctrl-C, and print its address.

    `host` and `port` are where to listen, `None` for Gradio's defaults, which its environment variables may set, and
    `share` makes a public address, too. Raises an `InputError` where the address cannot be listened at.
    """
    page = launch(page, host, port, share)
    print(f"The page is at {page.local_url}. Ctrl-C stops it.", flush=True)
    if share and page.share_url is None:
        print("Gradio could not make a public address.", file=sys.stderr, flush=True)
    elif share:
        print(f"For everybody, for a week: {page.share_url}", flush=True)
    page.block_thread()


def launch(page: gr.Blocks, host: str | None = None, port: int | None = None, share: bool = False) -> gr.Blocks:
    """Serve until `page.close()`, but return when the page can be reached, at `page.local_url`."""
    page.queue(max_size=QUEUE)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=share,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=LARGEST_FILE,
            ssr_mode=False,
            run_history=False,
            footer_links=["settings"],
            theme=gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=CSS,
            js=NAMES,
        )
    except (OSError, ValueError, RuntimeError) as error:
        at = f"--host {host or '127.0.0.1'} --port {port or '7860 to 7959'}"
        raise InputError(f"The page cannot be served at {at}: {error}") from error
    return page
