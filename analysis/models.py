# SPDX-License-Identifier: Apache-2.0
"""Models of any checkpoint, KArAt or softmax, and the training runs that they are from."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, set_seed
from transformers.image_processing_utils import BaseImageProcessor

from image_classification.errors import InputError
from image_classification.models import families, transfer
from image_classification.models.building import build_model, sum_of_weights
from image_classification.models.loading import load_config, load_image_processor, load_model
from image_classification.runs import checkpoints
from image_classification.runs.run_folder import RECORD, read_record
from image_classification.settings.arguments import ModelArguments
from modeling_karat_vit.configuration_karat_vit import height_and_width, patches_of
from modeling_karat_vit.karat_operator import KArAtOperator


@dataclass(kw_only=True)
class Checkpoint:
    """
    A model for looking at: in evaluation mode, in fp32, with attention computed by `eager`.

    Args:
        source: the folder or Hub name that it was loaded from.
        name: what figures call it.
        model: `KArAtViTForImageClassification`, `ViTForImageClassification`, or of another family, karatized or not.
        processor: the image processor beside it, if there is one.
        run: the settings and results of its run (run.json), if it is from one.
        has_classifier: False where only the encoder was saved.
    """

    source: str
    name: str
    model: PreTrainedModel
    processor: BaseImageProcessor | None
    run: dict[str, Any] | None
    has_classifier: bool = True

    @property
    def is_karat(self) -> bool:
        return self.model.config.model_type.startswith("karat_")

    @property
    def is_residual(self) -> bool:
        """Whether its KArAt heads are beside softmax, and not in its place."""
        config = self.model.config
        return families.is_karatized(config) and config.karat["start"] == "residual"

    @property
    def kind(self) -> str:
        return "karat" if self.is_karat else "softmax"

    @property
    def blocks(self) -> int:
        return len(self._attentions)

    @property
    def heads(self) -> int:
        """The number of heads of a block, of the widest where they differ."""
        return max(map(_heads_of, self._attentions))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return patches_of(self.image_size, self.patch_size)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return height_and_width(families.vision(self.model.config).patch_size)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of its images."""
        return families.image_size(self.model.config, self.processor)

    def prefix(self, block: int) -> int:
        """Count a block's special tokens before the patches, of which the first is [CLS]; SigLIP has none."""
        return families.prefix_tokens(self.model, block)

    @property
    def tokens(self) -> int:
        """The number of tokens of the last block, N: special ones, which come first, and the patches."""
        return self.grid[0] * self.grid[1] + self.prefix(self.blocks - 1)

    @property
    def labels(self) -> list[str]:
        config = self.model.config
        return [config.id2label[index] for index in range(config.num_labels)]

    def attention(self, block: int) -> torch.nn.Module:
        """Find the attention module of a block."""
        return self._attentions[block]

    @property
    def _attentions(self) -> list[Any]:
        if self.model.config.model_type in families.OWN:
            return [layer.attention for layer in self.model.vit.layers]
        return families.attention_of_blocks(self.model)

    def check_whole_maps(self) -> None:
        """Raise an `InputError` for a model whose attention maps do not span the image."""
        if families.has_windows(self.model.config):
            raise InputError(
                f"{self.source} attends within windows, and has no map of a whole image. Look at its functions, "
                "weights and landscape, and compare it."
            )

    def head_kinds(self, block: int) -> list[str]:
        """List for each head of a block whether it is `"karat"` or `"softmax"`; KArAt heads come first."""
        attention: Any = self.attention(block)
        within = getattr(attention, "karat", None)
        karat = getattr(attention, "karat_heads", 0) if within is None else within.heads
        return ["karat"] * karat + ["softmax"] * (_heads_of(attention) - karat)

    def operator(self, block: int) -> KArAtOperator:
        """
        Find the learnable activation of a block, its own or the universal one.

        Raises:
            InputError: the block has none.
        """
        if not self.is_karat:
            raise InputError(f"{self.source} is a softmax model: its activation has nothing that is learned.")
        if "karat" not in self.head_kinds(block):
            layers = ", ".join(str(index) for index in range(self.blocks) if "karat" in self.head_kinds(index))
            raise InputError(f"Block {block} of {self.source} is plain softmax: blocks with KArAt heads are {layers}.")
        attention: Any = self.attention(block)
        if families.is_karatized(self.model.config):
            return attention.karat.operator
        return self.model.vit.operator if attention.operator is None else attention.operator


def _heads_of(attention: Any) -> int:
    return getattr(attention, "num_attention_heads", None) or attention.num_heads


def load_checkpoint(source: str, flag: str = "--model", device: torch.device | str = "cpu") -> Checkpoint:
    """
    Load a checkpoint from a folder (of a run, finished or not; a checkpoint-* folder; any other) or from the Hub.

    Args:
        source: folder or Hub name.
        flag: which flag named it, for errors.

    Raises:
        InputError: there is none, it is of another type of model, or weights are missing.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        # A run that was stopped has weights in its checkpoints only.
        source = str(checkpoints.newest(folder)[0] or source)
    config = load_config(source, flag)
    if teacher := transfer.needs(config):
        raise InputError(
            f"`{flag}` {source} attends with the maps of its teacher, {teacher}, and its own attention was never "
            "trained: look at the teacher."
        )
    model, new = load_model(source, flag, encoder_suffices=True, attn_implementation="eager")
    return Checkpoint(
        source=source,
        name=Path(source).resolve().name if Path(source).is_dir() else source.rpartition("/")[2],
        model=model.eval().to(device),
        processor=load_image_processor(source, flag, families.fixed_image_size(config)),
        run=read_run(source),
        has_classifier=not new,
    )


def use_default_attention(checkpoint: Checkpoint, karat: str | None = None) -> PreTrainedModel:
    """Have the model attend as it does by default, or KArAt heads by the implementation named."""
    model = checkpoint.model
    model.set_attn_implementation(
        (karat or model.get_correct_attn_implementation(None)) if checkpoint.is_karat else "sdpa"
    )
    return model


def run_folder(source: str | Path) -> Path | None:
    """Find the folder of the run that a checkpoint belongs to: itself, or for checkpoint-* the one above."""
    folder = Path(source).resolve()
    for candidate in (folder, folder.parent) if re.fullmatch(r"checkpoint-\d+", folder.name) else (folder,):
        if (candidate / RECORD).is_file():
            return candidate
    return None


def read_run(source: str | Path) -> dict[str, Any] | None:
    """Read what run.json says of the run that a checkpoint belongs to; `None` if it is of no run."""
    folder = run_folder(source)
    if folder is None:
        return None
    if (record := read_record(folder)) is not None:
        settings, text = record["settings"], str | None
        values = {**settings, "start": record.get("start")}
        kinds = {"seed": int, "data_set": text, "data_path": text, "dataset_name": text, "start": float | int | None}
        for name, kind in kinds.items():
            if not isinstance(values.get(name), kind) or (name == "seed" and not 0 <= values[name] < 2**32):
                raise InputError(f"{folder / RECORD} is damaged: `{name}` is {values.get(name)!r}.")
    return record


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the Trainer's state in a checkpoint-* folder: `epoch`, `global_step`, `log_history`."""
    checkpoints.check_progress(checkpoint)
    return checkpoints.read_json(checkpoint / checkpoints.STATE)


@dataclass
class Moment:
    """
    A point of a run.

    Args:
        folder: of the checkpoint; `None` for the start where no checkpoint-0 holds it.
        epoch, step: how far the run was.
    """

    folder: Path | None
    epoch: float
    step: int


def moments(source: str) -> list[Moment]:
    """
    List the points of a run whose weights can be had, in order: its start, then its checkpoint-* folders.

    Raises:
        InputError: `source` is no run's folder, or the run kept no checkpoint.
    """
    folder = run_folder(source)
    if folder is None:
        raise InputError(f"{source} is no folder of a run of run_image_classification.py: it holds no {RECORD}.")
    found = [Moment(entry, read_state(entry)["epoch"], step) for step, entry in checkpoints.checkpoints(folder).items()]
    if not found:
        raise InputError(f"{folder} keeps no checkpoints. Train with --save_total_limit 0 to keep one of every epoch.")
    return found if found[0].step == 0 else [Moment(None, 0.0, 0), *found]


def load_moment(source: str, moment: Moment, device: torch.device | str = "cpu") -> Checkpoint:
    """Load the model of a run at one of its `moments`."""
    if moment.folder is not None:
        return load_checkpoint(str(moment.folder), device=device)
    return load_start(source, device)


def load_start(source: str, device: torch.device | str = "cpu") -> Checkpoint:
    """
    Load the model of a run before its first step: its checkpoint-0 if it has one, else rebuilt as the run built it,
    from the settings and the seed in run.json, or from the weights that it fine-tuned.

    Raises:
        InputError: `source` is of no run, what the run started from is not there any more, or other random numbers are
            drawn here than where it ran: `trunc_normal_` of PyTorch 2.11 is not that of 2.15.
    """
    run, folder = read_run(source), run_folder(source)
    if run is None or folder is None:
        raise InputError(f"{source} is no folder of a run: it holds no {RECORD} to rebuild the start from.")
    if (first := checkpoints.checkpoints(folder).get(0)) is not None:
        return dataclasses.replace(load_checkpoint(str(first), device=device), source=str(folder), name="start")
    final = load_checkpoint(source, device=device)
    fields = {field.name for field in dataclasses.fields(ModelArguments)}
    args = ModelArguments(**{key: value for key, value in run["settings"].items() if key in fields})
    args.attn_implementation = "eager"
    if args.karatize == "replace":
        raise InputError(
            f"The operators that {folder} started with were fitted on its training images, and are not fitted again. "
            "Look at its checkpoints alone (functions: --before CHECKPOINT; landscape, weights: --no-start)."
        )
    set_seed(run["settings"]["seed"])
    model = build_model(args, final.labels)
    size = sum(parameter.detach().abs().sum().item() for parameter in model.parameters())
    if run.get("start") is not None and abs(sum_of_weights(model) - run["start"]) > 1e-7 * size:
        raise InputError(
            f"The start of {folder} cannot be rebuilt: its seed gives other weights here than where it ran, as under "
            "another version of PyTorch or Transformers. Use the versions that it ran with, or its checkpoints alone "
            "(functions: --before CHECKPOINT; landscape, weights: --no-start)."
        )
    return dataclasses.replace(final, source=str(folder), name="start", model=model.eval().to(device))
