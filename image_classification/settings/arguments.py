# SPDX-License-Identifier: Apache-2.0
"""Settings of a run: three dataclasses, with the ranges of their numbers, and what follows from them."""

import dataclasses
import functools
import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate.utils import DynamoBackend
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..errors import InputError, did_you_mean, refusing
from ..paths import CONFIGURATION
from . import official_flags


DEFAULT_RECIPE = CONFIGURATION / "digits.yaml"
# The official learning rate is given for this many images a step.
REFERENCE_BATCH = 512
# Schedules that fall to `min_lr`, and all.
FALLING = ("cosine", "linear", "poly", "tanh")
SCHEDULES = (*FALLING, "step", "multistep", "constant")
# Settings of which a source may give only one; one given in a higher source replaces the other from a lower one.
EXCLUSIVE = (
    ("learning_rate", "base_lr"),
    ("sched", "lr_scheduler_type"),
    ("warmup_epochs", "warmup_steps"),
    ("data_set", "dataset_name"),
    ("data_path", "dataset_name"),
    ("num_train_epochs", "max_steps"),
)
MOST_WORKERS = 16
# Transformers 5.23 has renamed it.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    if name in TrainingArguments.__dataclass_fields__
)
# Images of an evaluation at a time on a GPU, which smaller batches would leave idle.
EVAL_BATCH = 256


@dataclass(frozen=True)
class Range:
    """What a number, or each of a list, may be: finite, and between the bounds, themselves out if `above`, `below`."""

    low: float = -1e15  # What lies beyond is no number that anyone means, and overflows somewhere.
    high: float = 1e15
    above: bool = False
    below: bool = False

    def __contains__(self, number: float) -> bool:
        low = number > self.low if self.above else number >= self.low
        return low and (number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        low = f"{'more than' if self.above else 'at least'} {self.low:.12g}"
        return f"{low} and {'less than' if self.below else 'at most'} {self.high:.12g}"


@dataclass(frozen=True)
class Numbers:
    """How many numbers a list has: one of `counts`; where `rising`, the first is not larger than the second."""

    counts: tuple[int, ...]
    rising: bool = False

    def __contains__(self, numbers: list[float]) -> bool:
        return len(numbers) in self.counts and not (self.rising and numbers[0] > numbers[1])

    def __str__(self) -> str:
        return f"{' or '.join(map(str, self.counts))} numbers" + ", the smaller first" * self.rising


SIDES, TWO, INTERVAL, CHANNELS = Numbers((1, 2)), Numbers((2,)), Numbers((2,), rising=True), Numbers((3,))
NOT_NEGATIVE, POSITIVE, COUNT = Range(0), Range(0, above=True), Range(1)
SHARE, POSITIVE_SHARE, DROPPED = Range(0, 1), Range(0, 1, above=True), Range(0, 1, below=True)
SIDE, WIDTH, DEGREE = Range(1, 2**14), Range(1, 2**16), Range(0, 64)
SEED, PROCESSES = Range(0, 2**32 - 1), Range(0, 1024)
Share = Annotated[float, SHARE]
PositiveShare = Annotated[float, POSITIVE_SHARE]
Dropped = Annotated[float, DROPPED]
NotNegative = Annotated[float, NOT_NEGATIVE]
Positive = Annotated[float, POSITIVE]
Count = Annotated[int, COUNT]
Width = Annotated[int, WIDTH]
Degree = Annotated[int, DEGREE]
# Of the numbers that `TrainingArguments` declares, and whose range it does not check.
_THEIRS = {
    Range(-1): "local_rank max_steps",
    NOT_NEGATIVE: "eval_delay eval_steps logging_steps neftune_noise_alpha warmup_steps",
    POSITIVE: "save_steps",
    COUNT: "dataloader_prefetch_factor ddp_bucket_cap_mb eval_accumulation_steps gradient_accumulation_steps "
    "torch_empty_cache_steps",
    Range(1, 2**31 - 1): "ddp_timeout",
    SHARE: "label_smoothing_factor",
    DROPPED: "adam_beta1 adam_beta2",
    SEED: "data_seed seed",
}
THEIR_RANGES = {name: limit for limit, names in _THEIRS.items() for name in names.split()}


def cores_to_use() -> int:
    """CPU cores of this process, which those of other processes of the same launch share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _setting(default: Any, help: str, **metadata: Any) -> Any:
    told = {"help": help, **metadata}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=told)
    return field(default=default, metadata=told)


_optional, _switch = functools.partial(_setting, None), functools.partial(_setting, False)


@dataclass
class ModelArguments:
    """Which model. Everything below `attn_implementation` overrides the preset; unset leaves what the preset says."""

    _argument_group_name = "model"

    model: str | None = _optional(
        "Architecture, trained from scratch: a preset of configuration/ (vit_tiny_patch16_224_karat, ...), or a folder "
        "with a config.json. With --karatize: the pre-trained model, a checkpoint folder or Hub name."
    )
    finetune: str | None = _optional(
        "Start from these weights: a checkpoint folder or Hub name. A ViT or DeiT gives its backbone to a KArAt "
        "--model; another --image_size resamples a ViT's positions and operator; another set of classes gets a new "
        "head."
    )
    karatize: Literal["residual", "replace"] | None = _optional(
        "Put KArAt heads into a pre-trained model (ViT, DeiT, DINOv2, BEiT, CLIP, SigLIP, Swin), which --model or "
        "--finetune names: residual (adds them to softmax, and starts as the model was; the default) or replace (in "
        "place of softmax, fitted to it on training images). In the last two blocks unless --karat_layers says which.",
        nargs="?",
        const="residual",
    )
    calibration_images: Count = _setting(64, "With --karatize replace: training images that operators are fitted on.")
    drop_distillation_token: bool = _switch("Start from a distilled DeiT without its distillation token and head.")
    teacher_attention: str | None = _optional(
        "Attend with the maps of this trained model, a checkpoint folder or Hub name: attention transfer to a softmax "
        "--model of the same blocks, heads and patches. Queries and keys are frozen, the rest is trained; whoever uses "
        "what comes out needs the teacher too."
    )
    attn_implementation: str | None = _optional(
        "How attention is computed: eager (the reference), karat_portable, or for softmax heads sdpa, ... Unset: the "
        "fastest that applies."
    )
    image_size: Annotated[list[int] | None, SIDE, SIDES] = _optional("Image side in pixels, or height and width.")
    patch_size: Annotated[list[int] | None, SIDE, SIDES] = _optional("Patch side in pixels, or height and width.")
    hidden_size: Width | None = _optional("Width of the model.")
    num_hidden_layers: Annotated[int | None, Range(1, 1024)] = _optional("Number of blocks.")
    num_attention_heads: Annotated[int | None, Range(1, 1024)] = _optional("Heads in each block.")
    intermediate_size: Annotated[int | None, Range(1, 2**18)] = _optional("Width of the MLPs.")
    hidden_dropout_prob: Dropped | None = _optional("Dropout after attention and MLP.")
    attention_probs_dropout_prob: Dropped | None = _optional("Dropout of attention weights; softmax heads only.")
    drop_path_rate: Dropped | None = _optional("Stochastic depth: rate of the last block; blocks before it less.")
    initializer_range: Positive | None = _optional("Standard deviation of the initial weights; not of the functions'.")
    basis_type: str | None = _optional("Basis of the learnable functions: fourier, spline, wavelet, rational.")
    wavelet_type: str | None = _optional("mexican_hat, morlet, dog, meyer or shannon.")
    grid_size: Annotated[int | None, Range(1, 1024)] = _optional("G: harmonics of Fourier, or the splines' intervals.")
    spline_order: Degree | None = _optional("Degree of the B-splines.")
    grid_range: Annotated[list[float] | None, Range(), INTERVAL] = _optional("Scores between which the grid lies.")
    rational_order: Annotated[list[int] | None, DEGREE, TWO] = _optional("Degrees of numerator and denominator.")
    base_fn: str | None = _optional("Base function: zero, or the name of an activation (silu, gelu, ...).")
    karat_rank: Annotated[int | None, Range(1, 2**14)] = _optional("r, the width between the operator's two steps.")
    karat_depth: Annotated[int | None, Range(1, 64)] = _optional("Steps of the operator; 1 is full rank.")
    modular_mode: str | None = _optional("phi1_w2, w1_phi2, or none for an operator whose every step is learnable.")
    sharing: str | None = _optional("blockwise (each block has its operator) or universal (all blocks share one).")
    num_karat_heads: Annotated[int | None, Range(0, 1024)] = _optional(
        "KArAt heads in each block, the others softmax. 0 is the paper's number: 1, 3, 6 for Tiny, Small, Base."
    )
    karat_layers: Annotated[list[int] | None, Range(-1024, 1023)] = _optional(
        "Blocks with KArAt heads (from 0; -1 is the last); unset: all, with --karatize the last two."
    )
    project_l1: bool | None = _optional("Project activated rows on the probability simplex.")
    train_basis: bool | None = _optional("false freezes the basis.")
    train_base: bool | None = _optional("false freezes the scale of the base function.")
    karat_init: str | None = _optional("scaled (keeps the variance) or normal (the paper's N(0, 1)).")

    @property
    def weights(self) -> str | None:
        """The checkpoint that a run starts from, if any: a folder or Hub name."""
        return self.finetune or (self.model if self.karatize else None)

    def given(self) -> dict[str, Any]:
        """The given fields of a model configuration, by name; `modular_mode` none is a configuration's `None`."""
        given = {key: value for key, value in vars(self).items() if key not in NOT_OF_THE_CONFIG and value is not None}
        return given | ({"modular_mode": None} if self.modular_mode == "none" else {})


# Fields of `ModelArguments` that are no fields of a model configuration.
NOT_OF_THE_CONFIG = (*itertools.takewhile(lambda name: name != "image_size", ModelArguments.__dataclass_fields__),)


@dataclass
class DataArguments:
    """Which images, and what is done to them."""

    _argument_group_name = "data"

    data_set: str | None = _optional(
        "A known data set: digits (embedded), CIFAR10, CIFAR100, IMNET, SVHN, Flowers102 or STL10; downloaded from the "
        "Hub unless --data_path says where it lies."
    )
    data_path: str | None = _optional(
        "Local data: a folder with train/CLASS/*.jpg and validation/CLASS/*.jpg (also val/ or test/), images beside a "
        "metadata.csv or .jsonl (file_name, label), parquet or arrow files named after their split, or a folder "
        "written by save_to_disk."
    )
    dataset_name: str | None = _optional("Any image classification data set of the Hub, by its name.")
    dataset_config_name: str | None = _optional("Its configuration, where it has several.")
    train_split: str | None = _optional("Split to train on; unset: train.")
    validation_split: str | None = _optional("Split to evaluate on; unset: validation, valid, val or test.")
    image_column: str | None = _optional("Column of the images; unset: the one that holds images.")
    label_column: str | None = _optional("Column of the labels; unset: the one that holds class labels.")
    validation_fraction: Share = _setting(0.1, "Part of the training split to hold out where there is no other split.")
    streaming: bool = _switch(
        "Read the images from the Hub, or from a local folder, one after the other while training: for "
        "data sets larger than the disk."
    )
    shuffle_buffer: Count = _setting(4096, "With streaming: undecoded images among which the next one is drawn.")
    max_train_samples: Count | None = _optional("Train on this many images, drawn with the seed (a stream's first).")
    max_eval_samples: Count | None = _optional("Evaluate on this many images, drawn with the seed (a stream's first).")
    check_images: Literal["auto", "all", "none"] = _setting(
        "auto",
        "Decode every image before training: all, none, or auto (up to 20,000; of larger sets each when first read).",
    )
    skip_bad_images: bool = _switch(
        "Leave out images that cannot be read, named and counted, after decoding every one."
    )
    image_mean: Annotated[list[float] | None, SHARE, CHANNELS] = _optional(
        "Mean of each channel, pixels from 0 to 1; unset: of the --finetune checkpoint, else ImageNet's."
    )
    image_std: Annotated[list[float] | None, POSITIVE, CHANNELS] = _optional("Standard deviations; unset as the mean.")
    eval_crop_ratio: PositiveShare | None = _optional(
        "Evaluation resizes the shorter side to image size / ratio, bicubic, and crops the centre; 1 keeps it whole. "
        "Unset: of the checkpoint, else 0.9."
    )
    train_crop_scale: Annotated[list[float], POSITIVE_SHARE, INTERVAL] = _setting(
        [0.08, 1.0], "Training crops a random part of this size, as a share of the image, and resizes it."
    )
    train_crop_ratio: Annotated[list[float], POSITIVE, INTERVAL] = _setting([3 / 4, 4 / 3], "Their aspect ratios.")
    train_interpolation: Literal["bicubic", "bilinear", "nearest"] = _setting("bicubic", "How crops are interpolated.")
    horizontal_flip: Share = _setting(0.5, "Probability of a horizontal flip in training.")
    color_jitter: NotNegative = _setting(0.4, "Random brightness, contrast and saturation; not beside auto_augment.")
    auto_augment: str | None = _optional(
        "RandAugment, AutoAugment or AugMix as timm's rand-m15-n2-mstd1.0-inc1; none: none."
    )
    random_erasing: Share = _setting(0.0, "Probability of erasing a part of a training image.")
    random_erasing_mode: Literal["const", "rand", "pixel"] = _setting(
        "pixel", "Erase with: const (the mean colour), rand (one random colour) or pixel (noise)."
    )
    random_erasing_count: Annotated[int, Range(1, 1024)] = _setting(1, "Erase up to this many parts.")
    mixup: NotNegative = _setting(0.0, "Alpha of mixup; 0: none.")
    cutmix: NotNegative = _setting(0.0, "Alpha of CutMix; 0: none.")
    cutmix_minmax: Annotated[list[float] | None, SHARE, INTERVAL] = _optional(
        "Smallest and largest side of CutMix's part, as shares of the image; in place of its alpha."
    )
    mixup_prob: Share = _setting(1.0, "Probability that a batch is mixed at all.")
    mixup_switch_prob: Share = _setting(0.5, "Where both are on: probability that a mixed batch has CutMix.")
    mixup_mode: Literal["batch", "pair", "elem"] = _setting("batch", "Mix alike in a batch, a pair or each image.")
    repeated_aug: bool = _switch("Three augmented copies of an image in a batch, of a third of the images per epoch.")

    augment_on: Literal["auto", "workers", "device"] = _setting(
        "auto",
        "Where training images are augmented: workers (processes on the CPU), device (the one that trains, "
        "a batch at a time; the workers only read, crop and resize, if they are needed at all), or auto (device on "
        "an NVIDIA GPU with Triton, if it knows the operations).",
    )
    resident_share: Share = _setting(
        0.25,
        "Where the device augments: training images are decoded once, and stay, if they fit into this "
        "share of its memory, or of the host's free memory; and so do those to evaluate on, in what is left of "
        "the share of its memory. 0: never.",
    )

    def __post_init__(self):
        if self.auto_augment in ("none", "None", ""):
            self.auto_augment = None


@dataclass
class RunArguments(TrainingArguments):
    """Transformers' `TrainingArguments` with the defaults of the paper's recipe, and what they lack for it."""

    _argument_group_name = "training (ours, and all of Transformers' TrainingArguments)"

    base_lr: NotNegative | None = _optional(
        f"Learning rate for {REFERENCE_BATCH} images a step: the rate that runs is base_lr * global batch / "
        f"{REFERENCE_BATCH}. 5e-4 unless learning_rate is given, which runs as it is."
    )
    scale_lr: bool = _setting(True, "Scale base_lr (and attn_lr beside it) with the batch.")
    learning_rate: NotNegative | None = _optional("Learning rate as it runs, in place of base_lr.")
    attn_lr: NotNegative | None = _optional(
        "Learning rate of the KArAt parameters; scaled with the batch exactly when base_lr is. Unset: as all others."
    )
    attn_weight_decay: NotNegative | None = _optional(
        "Weight decay of the KArAt parameters, of every one. Unset: weight_decay, as DeiT's code decays whatever is a "
        "matrix or more."
    )
    layer_decay: PositiveShare | None = _optional(
        "Each block learns at this times the rate of the block above it, the embeddings likewise below the first "
        "block, the last block at this times the head's; an operator that all blocks share goes with the last."
    )
    sched: str | None = _setting(
        "cosine",
        "Learning rate over the run, after the warm-up: cosine, linear, poly (to the power decay_rate) or "
        "tanh, down to min_lr; step (times decay_rate every decay_epochs) or multistep (at decay_milestones); or "
        "constant. `--lr_scheduler_type` takes Transformers' own instead.",
    )
    warmup_epochs: NotNegative | None = _setting(5.0, "Epochs in which the rate rises linearly from warmup_lr.")
    warmup_lr: NotNegative = _setting(1e-6, "Learning rate at the start of the warm-up.")
    min_lr: NotNegative = _setting(1e-5, "Lowest learning rate of cosine, linear, poly and tanh.")
    cooldown_epochs: NotNegative = _setting(0.0, "Epochs at min_lr at the end; num_train_epochs counts them.")
    decay_epochs: Positive = _setting(30.0, "Epochs between the drops of the step schedule.")
    decay_milestones: Annotated[list[float], NOT_NEGATIVE] = _setting([30.0, 60.0], "Epochs of the multistep's drops.")
    decay_rate: NotNegative = _setting(0.1, "Factor of each drop; the power of poly.")
    momentum: Dropped = _setting(0.9, "Momentum of SGD (Nesterov's) and RMSprop.")

    optim: str = _setting("adamw_torch_fused", "Optimiser: Transformers', or timm's as timm_NAME (timm_lamb, ...).")
    timm_optimizer: str | None = field(default=None, init=False)
    report_to: list[str] | None = _optional(
        "Trackers: tensorboard, wandb, or another of Transformers'; none: none. They need a run_name. Unset: wandb if "
        "it is installed, as in the official code, else tensorboard if that is."
    )
    run_name: str | None = _optional("Name of the run in the trackers; without it, nothing is reported.")
    run_id: str | None = _optional(
        "Goes on with the tracker's run of this id: of Weights & Biases, and the folder runs/ID of the output folder "
        "for TensorBoard. Unset: a new one; the same command in the same output_dir goes on with it."
    )

    model_ema: bool = _switch(
        "Keep an exponential moving average of the weights, evaluate it beside them (eval_ema_*), save it "
        "in every checkpoint, and end with the better of the two."
    )
    model_ema_decay: Share = _setting(0.99992, "Decay of the average at each step.")
    model_ema_device: str | None = _optional("Keep the average there, such as cpu; unset: beside the weights.")

    record_step: bool | None = _optional(
        "Record a whole training step (both passes, clipping, optimiser, average) as one CUDA graph, with its blocks "
        "compiled, so that the GPU does not wait for Python. Unset: wherever that can be; the log says which and why."
    )

    per_device_train_batch_size: Count = _setting(64, "Images per device and step.")
    per_device_eval_batch_size: Count | None = _optional(
        f"Images per device in evaluation; unset: as in training, and on a GPU {EVAL_BATCH} at least."
    )
    num_train_epochs: Positive = _setting(100.0, "Passes over the training images.")
    weight_decay: NotNegative = _setting(0.05, "Weight decay, of matrices only.")
    adam_epsilon: NotNegative = _setting(1e-6, "Epsilon of AdamW.")
    max_grad_norm: NotNegative = _setting(1.0, "Clip the gradient's norm at this; 0: never.")
    eval_strategy: Literal["no", "steps", "epoch"] = _setting("epoch", "When to evaluate: epoch, steps, no.")
    save_strategy: Literal["no", "steps", "epoch", "best"] = _setting("epoch", "When to save: epoch, steps, no, best.")
    logging_strategy: Literal["no", "steps", "epoch"] = _setting("epoch", "When to log the training loss.")
    save_total_limit: Annotated[int | None, NOT_NEGATIVE] = _setting(
        2, "Keep this many checkpoint-* folders of the run: the newest, and always the best (0: all)."
    )
    metric_for_best_model: str | None = _setting("accuracy", "The evaluation's metric by which a checkpoint is best.")
    do_train: bool = _setting(True, "false only evaluates the checkpoint to resume from.")
    resume_from_checkpoint: str | None = _optional(
        "Go on from this checkpoint-* folder, or from the last one of a run's folder, or of a repository of the Hub. "
        "The same command in the same output_dir resumes by itself."
    )
    push_to_hub: bool = _switch(
        "Push model, code, image processor, card, recipe and curves to the Hugging Face Hub, in the "
        "background of training and at its end. A push that fails does not stop the run, and the same command "
        "pushes what is missing."
    )
    hub_model_id: str | None = _optional("Repository to push to, USER/NAME or NAME; unset: the name of output_dir.")
    hub_strategy: str = _setting(
        "every_save",
        "What is pushed when: end (the finished run), every_save (also the model of each checkpoint), "
        "checkpoint (also the last checkpoint, as last-checkpoint, to go on from on another machine), "
        "all_checkpoints (every checkpoint).",
        choices=[strategy.value for strategy in HubStrategy],
    )
    hub_private_repo: bool | None = _optional("Make a private repository; true refuses one that is there and public.")
    hub_token: str | None = _optional(
        "Token to push with; unset: that of `hf auth login`, or of HF_TOKEN, which keep it out of the command line."
    )
    hub_revision: str | None = _optional("Branch to push to; it is made if it does not exist. Unset: main.")
    hub_always_push: bool = _switch("Push every save, also those that wait for one before; else only the newest waits.")
    hub_overwrite: bool = _switch("Push where somebody else wrote, too; the history keeps what is replaced.")

    dataloader_num_workers: Annotated[int | None, PROCESSES] = _optional(
        "Processes that read and augment images, for each process that trains; 0: none apart. Unset: one for each CPU "
        f"core but one, {MOST_WORKERS} at most."
    )
    dataloader_persistent_workers: bool | None = _optional("Keep data workers over epochs. Unset: if there are any.")
    cpu_threads: Annotated[int | None, Range(1, 1024)] = _optional(
        "Threads of PyTorch on the CPU; unset: PyTorch's choice. Tiny models gain nothing from a second one."
    )
    ddp_find_unused_parameters: bool | None = _setting(False, "Look for parameters without gradients.")
    remove_unused_columns: bool = _switch("Not used: no column is unused.")
    logging_nan_inf_filter: bool = _switch("Not used: a loss of NaN stops the run.")

    def __post_init__(self):
        if scaled := self.learning_rate is None:
            self.base_lr = 5e-4 if self.base_lr is None else self.base_lr
            self.learning_rate = self.base_lr
        if own_eval_batch := self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = max(1, min(cores_to_use() - 1, MOST_WORKERS))
        keep = self.dataloader_persistent_workers is not False
        self.dataloader_persistent_workers = keep and self.dataloader_num_workers > 0
        if self.save_total_limit == 0:
            self.save_total_limit = None
        if self.optim.startswith(official_flags.TIMM):
            self.timm_optimizer = official_flags.check_timm_optimizer(self.optim)
            self.optim = "adamw_torch"  # Transformers insists on a name of its own.
        self._set_trackers()
        # Before accelerate asks the backend. Launchers set one of these; MPI's, ones of their own.
        if self.ddp_backend is not None and not any("RANK" in name for name in os.environ):
            raise InputError("`ddp_backend` is of several processes: start them with `accelerate launch`.")
        super().__post_init__()
        if self.dataloader_multiprocessing_context is not None and self.dataloader_num_workers == 0:
            raise InputError("`dataloader_multiprocessing_context` is of data workers: `dataloader_num_workers` is 0.")
        if self.fsdp and self.world_size == 1:
            raise InputError("`fsdp` shards a model over several processes: start them with `accelerate launch`.")
        if (device := self.model_ema_device) is not None:
            with refusing(f"`model_ema_device` is {device!r}, expected a device that is here, as cpu", whole=False):
                torch.zeros(1, device=device)
        if self.torch_compile:
            self._try_compiling()
        if getattr(self, CHECKPOINTING) is not None:
            self._try_activation_checkpointing()
        if own_eval_batch and self.device.type == "cuda":
            self.per_device_eval_batch_size = max(EVAL_BATCH, self.per_device_eval_batch_size)
        if self.fp16 and self.device.type == "cpu":
            raise InputError("`fp16` trains on GPUs: on the CPU it would not be used at all. Give --bf16, or none.")
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # PyTorch warns at every epoch.
        if scaled:
            self.learning_rate = self.base_lr * self.rate_factor

    def _try_activation_checkpointing(self) -> None:
        given = getattr(self, CHECKPOINTING)
        with refusing(f"`{CHECKPOINTING}` is {given!r}, which cannot be used", ".", whole=False):
            every = given.get("every_n_layers", 1)
            if type(every) is not int or every < 1:
                raise ValueError("`every_n_layers` counts blocks, from 1")
            # All but Transformers' own are PyTorch's.
            options = {key: value for key, value in given.items() if key not in ("every_n_layers", "offload")}
            checkpoint(torch.nn.Identity(), torch.zeros(1), **{"use_reentrant": False, **options})

    def _try_compiling(self) -> None:
        """Something small, before work is lost: a backend may not exist, or lack its package or a compiler."""
        from torch._inductor import list_mode_options  # Slow to import.

        how = {"backend": self.torch_compile_backend, "mode": self.torch_compile_mode}
        given = ", ".join(f"`torch_compile_{key}` {value!r}" for key, value in how.items())
        hint = ". Choose others (inductor is the usual backend), or leave it out."
        with refusing(f"`torch_compile` with {given} does not work here", hint, whole=False):
            DynamoBackend(self.torch_compile_backend.upper())  # What accelerate knows.
            if how["mode"] is not None and how["mode"] not in (modes := list_mode_options()):
                raise ValueError(f"the modes are {', '.join(modes)}")
            torch.compile(lambda number: number + 1, **how)(torch.zeros(1, device=self.device))

    def _set_trackers(self) -> None:
        from transformers.integrations import integration_utils as theirs

        known, here = theirs.INTEGRATION_TO_CALLBACK, theirs.get_available_reporting_integrations()
        if self.report_to is None:
            # As in the official code Weights & Biases; its commands name a run and must run without it, too.
            self.report_to = [name for name in ("wandb", "tensorboard") if name in here][:1]
        asked = [name for name in self.report_to if name != "none"]
        for name in asked:
            if name not in (*known, "all"):
                hint = did_you_mean(name, known)
                raise InputError(f"`report_to` is {name!r}{hint}, expected one of {', '.join(known)}, all, none.")
        self.report_to = asked if asked and self.run_name is not None else ["none"]
        for name in self.report_to:
            if name not in ("none", "all", "flyte", *here):
                raise InputError(
                    f"`run_name` {self.run_name!r} is to be reported to {name}, which is not installed: pip install "
                    f"{name}. Or name another tracker with `report_to` (tensorboard, wandb), or leave out `run_name`, "
                    "without which nothing is reported."
                )

    @property
    def optimizer_name(self) -> str:
        """As `optim` names it."""
        ours = self.timm_optimizer and f"{official_flags.TIMM}{self.timm_optimizer}"
        return ours or str(getattr(self.optim, "value", self.optim))

    @property
    def global_batch_size(self) -> int:
        """Images in one step, over all devices and accumulated batches."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def rate_factor(self) -> float:
        """What `base_lr`, and `attn_lr` beside it, are multiplied by: they are given for `REFERENCE_BATCH` images."""
        return self.global_batch_size / REFERENCE_BATCH if self.base_lr is not None and self.scale_lr else 1.0

    @property
    def attn_learning_rate(self) -> float | None:
        """The rate that KArAt parameters learn at, as `learning_rate` is that of the others; `None`: at the same."""
        return None if self.attn_lr is None else self.attn_lr * self.rate_factor

    def describe_learning_rate(self) -> str:
        """One line that says which rates run, and why."""
        line = f"{self.learning_rate:.4g}"
        if self.base_lr is not None and self.scale_lr:
            line += f" (base_lr {self.base_lr:g} x batch {self.global_batch_size} / {REFERENCE_BATCH})"
        if self.attn_lr is not None:
            line += f", KArAt parameters {self.attn_learning_rate:.4g}"
        if self.layer_decay not in (None, 1.0):
            line += f", times {self.layer_decay:g} for each block further down"
        if self.sched is None:
            return f"{line}, schedule {self.lr_scheduler_type.value}"
        line += f", {self.sched}"
        if self.sched in FALLING:
            line += f" to {min(self.min_lr, self.learning_rate or 0.0):.4g}"
        line += f", {self.warmup_epochs:g} warm-up epochs" if self.warmup_epochs else ""
        return line + (f", {self.cooldown_epochs:g} at the end" if self.cooldown_epochs else "")


@dataclass
class Settings:
    """What a run was asked for."""

    model: ModelArguments
    data: DataArguments
    training: RunArguments
    record: dict[str, Any]  # All of them by name, as given, before anything is derived from them.
    recipe: Path | None = None
    reported: dict[str, float] = field(default_factory=dict)  # By the paper, in percent: `top1`, `top5`.


def default_record(*groups: type) -> dict[str, Any]:
    """The settings of a run that was given none; those of some of the dataclasses."""
    return {
        item.name: item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        for group in groups or (ModelArguments, DataArguments, RunArguments)
        for item in dataclasses.fields(group)
        if item.init
    }


def to_json(record: dict[str, Any]) -> dict[str, Any]:
    """The record with every value as JSON keeps it, without what must not be written to a file."""
    return json.loads(json.dumps({key: value for key, value in record.items() if key != "hub_token"}, default=str))
