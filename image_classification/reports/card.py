# SPDX-License-Identifier: Apache-2.0
"""The model card of a run: README.md of its folder, and of its repository on the Hub."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..data.sources import ImageData
from ..errors import one_line
from ..models import transfer
from ..models.building import describe_model
from ..settings.arguments import (
    Settings,
    to_json,
)
from .curves import CURVES, HISTORY
from .recipe import AGAIN, RECIPE
from .summary import RESULTS, SAMPLE, describe_choice, describe_reported


CARD = "README.md"
_LOCAL = "`model` is this folder, or its name on the Hub. "
_REPEAT = f"python {AGAIN}"
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


def model_card(
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


def _on_hub(name: str | None) -> bool:
    return name is not None and not Path(name).exists()
