# SPDX-License-Identifier: Apache-2.0
"""The model card of a run: README.md of its folder, and of its repository on the Hub."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..data.sources import ImageData
from ..errors import one_line
from ..models import transfer
from ..models.building import describe_model
from ..models.families import OWN, is_karatized, name_of
from ..settings.arguments import to_json
from .curves import CURVES, HISTORY
from .recipe import AGAIN, RECIPE
from .summary import RESULTS, SAMPLE, describe_choice, describe_reported


CARD = "README.md"
_LOCAL = "`model` is this folder, or its name on the Hub. "
_REPEAT = f"python {AGAIN}"
# What a reader of the card wants to know first; the rest is in the recipe.
_HYPERPARAMETERS = (
    "num_train_epochs per_device_train_batch_size gradient_accumulation_steps optim weight_decay max_grad_norm "
    "label_smoothing_factor seed train_crop_scale horizontal_flip color_jitter auto_augment random_erasing mixup "
    "cutmix repeated_aug"
).split()


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


@dataclass(frozen=True)
class RunCard:
    """README.md of a run's checkpoints: what one is, how good, how it is made and loaded; with the Hub's metadata."""

    folder: Path  # Of the run, whose name is the model's.
    record: dict[str, Any]  # The settings as they were given.
    learning_rate: str  # The rates that run, in words.
    reported: dict[str, float]  # The paper's figures, if any.
    model: PreTrainedModel
    data: ImageData

    def text(self, metrics: dict[str, float], weights: str | None, progress: str | None = None) -> str:
        """
        Write the card of the model as it is now: with the metrics of training and of the evaluation of the weights that
        are written, if there was one; which these are, `ema`, `model`, or `None` where there was no choice; and how far
        training is, if it is not finished.
        """
        data, record = self.data, to_json(self.record)
        name = one_line(self.folder.resolve().name)
        started_from = record["finetune"] or (record["model"] if record["karatize"] else None)
        kind, karatized = self.model.config.model_type, is_karatized(self.model.config)
        karat, family = karatized or kind == "karat_vit", name_of(self.model.config)
        tags = ["karat-vit", "kolmogorov-arnold-attention"] * karat + [family] * (kind != "karat_vit")
        remarks = [describe_choice(weights, metrics)] if weights is not None else []
        if paper := describe_reported(self.reported):
            remarks.append(f"For this recipe, {paper}.")
        header = ModelCardData(
            library_name="transformers",
            pipeline_tag="image-classification",
            tags=["vision", *tags],
            datasets=[data.hub_name] if data.hub_name else None,
            metrics=["accuracy"],
            base_model=started_from if started_from is not None and not Path(started_from).exists() else None,
            model_name=name,
            eval_results=self._results(metrics) or None,
        )
        card = ModelCard.from_template(
            header,
            template_path=str(Path(__file__).with_name("model_card.md")),
            name=name,
            karat=karat,
            karatized=karatized,
            family=None if kind in OWN else family,
            teacher=transfer.needs(self.model.config),
            progress=progress,
            described=describe_model(self.model),
            start=Path(started_from).name if started_from else None,
            data=data,
            metrics=metrics,
            remarks=remarks,
            learning_rate=self.learning_rate,
            settings={key: _shown(record[key]) for key in _HYPERPARAMETERS if record.get(key) is not None},
            escaped=escaped,
            code_span=code_span,
            quoted=_quoted,
            local=_LOCAL,
            repeat=_REPEAT,
            files={"results": RESULTS, "history": HISTORY, "curves": CURVES, "recipe": RECIPE, "sample": SAMPLE},
        )
        return str(card)

    def _results(self, metrics: dict[str, float]) -> list[EvalResult]:
        data, called = self.data, one_line(self.data.name)
        return [
            EvalResult(
                task_type="image-classification",
                dataset_type=data.hub_name or called,
                dataset_name=called,
                dataset_config=self.record["dataset_config_name"],
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
