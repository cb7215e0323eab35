# SPDX-License-Identifier: Apache-2.0
"""What a finished run leaves beside its weights: metrics as JSON, curves, recipe, a sample image, the model card."""

import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from . import runs, transfer
from .arguments import EXCLUSIVE, DataArguments, ModelArguments, RunArguments, Settings, default_record, to_json
from .console import describe
from .data import ImageData
from .errors import one_line
from .images import decode
from .models import describe_model


HISTORY, RESULTS, CURVES, RECIPE, SAMPLE, CARD = (
    "history.json",
    "all_results.json",
    "training_curves.png",
    "recipe.yaml",
    "sample.png",
    "README.md",
)

_LOCAL = "`model` is this folder, or its name on the Hub. "
# How a run is repeated, behind what starts the script.
_AGAIN = f"run_image_classification.py {RECIPE} --output_dir outputs/again"
_REPEAT = f"python {_AGAIN}"
# What a reader of the card wants to know first; the rest is in the recipe.
_HYPERPARAMETERS = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "seed",
    "train_crop_scale",
    "horizontal_flip",
    "color_jitter",
    "auto_augment",
    "random_erasing",
    "mixup",
    "cutmix",
    "repeated_aug",
)


def escaped(text: str) -> str:
    """A name as Markdown shows it: on one line, and never as markup, HTML or a link."""
    special = r"[&<>\[\]`*|~$\\@]|^[#+=-]|(?<!\w)_|_(?!\w)|:(?=\S)|(?<=www)\."
    return re.sub(special, lambda match: f"&#{ord(match[0])};", one_line(text))


def code_span(text: str) -> str:
    """A name as Markdown shows code, where nothing is markup."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " * ("`" in text)
    return f"{fence}{space}{one_line(text)}{space}{fence}"


def _quoted(text: str) -> str:
    return json.dumps(one_line(text), ensure_ascii=False)


def history(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """
    The Trainer's log as one row for each evaluation.

    Returns:
        Rows of `epoch`, `step`, `train_loss` (mean since the last row, if it was logged), `learning_rate`, and the
        `eval_*` metrics; one row for each step.
    """
    rows, losses, rate, steps = [], [], None, set()
    for entry in log:
        if "loss" in entry:
            losses.append(entry["loss"])
            rate = entry.get("learning_rate", rate)
        if "eval_loss" in entry and entry["step"] not in steps:
            steps.add(entry["step"])
            row = {"epoch": entry["epoch"], "step": entry["step"]}
            row |= {"train_loss": sum(losses) / len(losses), "learning_rate": rate} if losses else {}
            rows.append(row | {key: value for key, value in entry.items() if key.startswith("eval_")})
            losses = []
    return rows


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def draw_curves(rows: list[dict[str, float]], path: Path, title: str) -> None:
    """Loss and accuracy over the epochs, side by side, as a PNG."""
    # Without pyplot, so that no window system is looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    marker = "o" if len(rows) < 30 else None
    for axes, key, label, factor in (
        (loss, "train_loss", "training (augmented)", 1),
        (loss, "eval_loss", "held out", 1),
        (accuracy, "eval_accuracy", "top-1", 100),
        (accuracy, "eval_top5_accuracy", "top-5", 100),
        (loss, "eval_ema_loss", "held out, averaged weights", 1),
        (accuracy, "eval_ema_accuracy", "top-1, averaged weights", 100),
    ):
        points = [(row["epoch"], factor * row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=label)
    for axes, name in ((loss, "loss"), (accuracy, "held-out accuracy in %")):
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.suptitle(one_line(title), parse_math=False)
    figure.savefig(path, dpi=120)


def save_sample(split: Dataset, path: Path) -> None:
    """The first held-out image, as it came, for the first try of predict.py."""
    decode(split[0]["image"], "validation image 0").save(path)


def recipe(settings: Settings) -> str:
    """
    A recipe (YAML) with every setting that decides what is trained, those of other recipes and of flags included. What
    a recipe need not say (speed, output, the Hub) is not in it, nor are the folders of this machine.
    """
    args, record = settings.training, to_json(settings.record)
    if record["base_lr"] is None and record["learning_rate"] is None:
        record["base_lr"] = args.base_lr
    own = {*ModelArguments.__annotations__, *DataArguments.__annotations__, *RunArguments.__annotations__}
    defaults = to_json(default_record())
    kept = {
        name: value
        for name, value in record.items()
        if value is not None and not runs.is_free(name) and (name in own or value != defaults[name])
    }
    for pair in EXCLUSIVE:
        for name, other in (pair, pair[::-1]):
            if name in kept and other in kept and kept[name] == defaults[name]:
                del kept[name]
    folders = {name: value for name, value in kept.items() if isinstance(value, str) and Path(value).is_absolute()}
    command = "python" if args.world_size == 1 else f"accelerate launch --num_processes {args.world_size}"
    lines = [
        "# Every setting of a run of KArAt-ViT, which this repeats:",
        f"#   {command} {_AGAIN}",
    ]
    lines += [
        f"# Add --{name}: it was the folder {one_line(Path(value).name)}, elsewhere." for name, value in folders.items()
    ]
    for group, title in ((ModelArguments, "Model"), (DataArguments, "Data"), (RunArguments, "Training")):
        part = [name for name in group.__dataclass_fields__ if name in kept and name not in folders]
        lines += ["", f"# {title}", *(f"{name}: {_yaml(kept[name])}" for name in part)]
    if settings.reported:
        lines += ["", "# By the paper, in percent", f"reported: {_yaml(settings.reported)}"]
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    """A value on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").rstrip()


def card(
    settings: Settings,
    model: PreTrainedModel,
    data: ImageData,
    metrics: dict[str, float],
    weights: str | None,
    progress: str | None = None,
) -> str:
    """
    README.md of the checkpoint: what it is, how good, how it was made, how to load it; with the Hub's metadata.

    Args:
        settings, model, data: of the run.
        metrics: of training and of the evaluation of the weights that are written; none where they were not evaluated.
        weights: which were written: `ema`, `model`, or `None` where there was no choice.
        progress: how far training is, if it is not finished.
    """
    name = one_line(Path(settings.training.output_dir).resolve().name)
    called = one_line(data.name)
    karat = model.config.model_type == "karat_vit"
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=data.hub_name or called,
            dataset_name=called,
            dataset_config=settings.data.dataset_config_name,
            dataset_split=data.split or "train",
            metric_type=kind,
            metric_name=metric,
            metric_value=round(metrics[key], 6),
        )
        for key, kind, metric in (
            ("eval_accuracy", "accuracy", "Top-1 accuracy"),
            ("eval_top5_accuracy", "accuracy", "Top-5 accuracy"),
            ("eval_loss", "loss", "Loss"),
        )
        if key in metrics
    ]
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["vision", *(["karat-vit", "kolmogorov-arnold-attention"] if karat else ["vit"])],
        datasets=[data.hub_name] if data.hub_name else None,
        metrics=["accuracy"],
        base_model=settings.model.finetune if _on_hub(settings.model.finetune) else None,
        model_name=name,
        eval_results=results or None,
    )
    record = to_json(settings.record)
    table = [f"| `{key}` | {_shown(record[key])} |" for key in _HYPERPARAMETERS if record.get(key) is not None]
    table.insert(0, f"| learning rate | {settings.training.describe_learning_rate()} |")
    code = ", trust_remote_code=True" if karat else ""
    teacher = transfer.needs(model.config)
    use = f"""```python
from transformers import pipeline

classifier = pipeline("image-classification", model={_quoted(name)}{code})
classifier("{SAMPLE}")
```

{_LOCAL}The image processor saved here resizes and normalises exactly as the evaluation did."""
    if teacher is not None:
        use = f"""This model does not work alone: in every block and head it attends with the maps of its teacher,
{code_span(teacher)}, of the same image, and its own queries and keys were never trained. A pipeline, which knows no
teacher, gives wrong answers without a warning. This evaluates it:
`python run_image_classification.py --eval --resume FOLDER --teacher_attention TEACHER`;
`image_classification.transfer` feeds the maps to a model in Python."""
    about = (
        "An image classifier with Kolmogorov-Arnold Attention "
        "([KArAt](https://arxiv.org/abs/2503.10632)): the row-wise softmax of a Vision Transformer's attention is "
        "replaced by learnable functions."
        if karat
        else "A Vision Transformer with softmax attention, the baseline of Kolmogorov-Arnold Attention "
        "([KArAt](https://arxiv.org/abs/2503.10632))."
    )
    if teacher is not None:
        about = (
            f"A Vision Transformer that attends with the maps of another model, {code_span(teacher)}, its teacher "
            "(attention transfer, as in [KArAt](https://arxiv.org/abs/2503.10632))."
        )
    labels = ", ".join(map(escaped, data.labels[:20])) + (
        f", ... ({len(data.labels)} in all)" if len(data.labels) > 20 else ""
    )
    start = ""
    if settings.model.finetune:
        start = f"Started from the weights of {code_span(Path(settings.model.finetune).name)}."
    choice = f"\n{describe_choice(weights, metrics)}\n" if weights is not None else ""
    paper = describe_reported(settings.reported)
    choice += f"\nFor this recipe, {paper}.\n" if paper else ""
    speed = [
        f"| {label} | {metrics[key]:{form}} |"
        for key, label, form in (
            ("train_images_per_second", "images per second in training", ",.0f"),
            ("train_peak_memory_gib", "peak memory of a process in GiB", ".2f"),
        )
        if key in metrics
    ]
    images = f"trained on {len(data.train):,} images, evaluated on {len(data.validation):,} held-out ones"
    notes = "".join(f" {escaped(note[0].upper() + note[1:])}." for note in data.notes)
    state = f"\n**Training goes on: this is the model after {progress}.**\n" if progress else ""
    top5 = f"{100 * metrics['eval_top5_accuracy']:.2f} %" if "eval_top5_accuracy" in metrics else None
    figures = "Not evaluated at this step."
    if metrics:
        figures = "| held-out metric | value |\n| --- | --- |\n" + "\n".join(
            f"| {label} | {value} |"
            for label, value in (
                ("top-1 accuracy", f"{100 * metrics['eval_accuracy']:.2f} %"),
                ("top-5 accuracy", top5),
                ("loss", f"{metrics['eval_loss']:.4f}"),
            )
            if value is not None
        )
    rows = "\n".join(table + speed)
    files = f"`{HISTORY}` has every epoch's figures."
    files = files if progress else f"`{RESULTS}` has all figures, `{HISTORY}` every epoch's."
    text = f"""---
{header.to_yaml()}
---

# {escaped(name)}

{about}
{state}
* Model: {escaped(describe_model(model))}. {start}
* Data: {escaped(data.name)}; {images}.{notes}
* Classes: {labels}.

## Results

{figures}
{choice}
![training curves]({CURVES})

{files}

## Use

{use}

## How it was trained

| setting | value |
| --- | --- |
{rows}

`{RECIPE}` has every setting, and repeats the run:

```bash
{_REPEAT}
```
"""
    return str(ModelCard(text))


def _shown(value: Any) -> Any:
    return escaped(value) if isinstance(value, str) else value


def card_on_hub(text: str, folder: Path, repository: str) -> str:
    """The card of a run's folder as it reads in a repository of the Hub."""
    for here, there in (
        (f"model={_quoted(folder.resolve().name)}", f"model={_quoted(repository)}"),
        (f'("{SAMPLE}")', '("image.png")'),
        (_LOCAL, ""),
        (_REPEAT, f"hf download {repository} {RECIPE} --local-dir .\n{_REPEAT}"),
    ):
        text = text.replace(here, there)
    return text


def describe_reported(reported: dict[str, float]) -> str:
    """`the paper reports top-1 76.69 %, top-5 98.57 %`, or nothing where a recipe names no figures."""
    figures = ", ".join(f"{name.replace('top', 'top-')} {value:.2f} %" for name, value in reported.items())
    return f"the paper reports {figures}" if figures else ""


def describe_choice(weights: str, metrics: dict[str, float]) -> str:
    """Which weights a run with an average of them ends with, and why."""
    names = {"ema": "the averaged weights", "model": "the plain weights"}
    other = "model" if weights == "ema" else "ema"
    figures = {
        kind: f"{100 * metrics[f'eval_{kind}_accuracy']:.2f} % (loss {metrics[f'eval_{kind}_loss']:.4f})"
        for kind in names
    }
    return f"Written are {names[weights]}: held-out accuracy {figures[weights]}, of {names[other]} {figures[other]}."


def predict_command(folder: str | Path) -> str:
    """The command that classifies the sample image, as it can be typed here."""
    python = Path(sys.executable)
    found = shutil.which("python")
    here = Path.cwd()
    if found and Path(found) == python:
        command = "python"
    elif python.is_relative_to(here):
        command = str(python.relative_to(here))
    else:
        command = str(python)
    script = Path(__file__).resolve().parent.parent / "predict.py"
    script = script.relative_to(here) if script.is_relative_to(here) else script
    return shlex.join([command, str(script), str(Path(folder) / SAMPLE), "--model", str(folder)])


def summary(folder: str | Path, finished: dict[str, Any]) -> str:
    """The last words of a run."""
    metrics, images, folder = finished["metrics"], finished["eval_images"], Path(folder)
    last = [
        "",
        "Classify an image (put one of your own in place of the sample):",
        f"  {predict_command(folder)}",
    ]
    if teacher := finished.get("teacher"):
        last = ["", f"It attends with the maps of its teacher, {teacher}, and is of no use without it."]
    return "\n".join(
        [
            f"  result      {describe(metrics)}",
            f"              {round(metrics['eval_accuracy'] * images):,} of {images:,} held-out images right",
            f"  checkpoint  {folder}",
            f"  curves      {folder / CURVES}",
            *last,
        ]
    )


def _on_hub(name: str | None) -> bool:
    return name is not None and not Path(name).exists()
