# SPDX-License-Identifier: Apache-2.0
"""
Small training runs for the tests of several processes: the same images and the same steps, whatever the layout.

The processes are forks of the tests' own, since to start others takes far longer than the training.
"""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from image_classification.models import transfer
from image_classification.settings.arguments import RunArguments
from image_classification.training.metrics import ComputeMetrics, preprocess
from image_classification.training.trainer import ImageClassificationTrainer
from tests import models as tiny


BATCH = 4  # Images in a step (or in one of its accumulated parts), over all processes.


@dataclass
class Run:
    """
    Args:
        name: of its folder.
        model: fields of a `KArAtViTConfig`, or `None` for softmax.
        images: three steps an epoch; not a multiple of the batch, so that the last step has fewer.
        settings: of the training.
        soft: labels are probabilities.
        fed: with the attention maps of a KArAt teacher.
    """

    name: str
    model: dict | None
    images: int
    settings: dict
    soft: bool = False
    fed: bool = False

    @property
    def middle(self) -> int:
        """The step before the last, whose checkpoint another layout goes on from."""
        return 3 if "gradient_accumulation_steps" in self.settings else 5


RUNS = [
    # The last step has two images: with two processes, the second has none of its own.
    Run("blockwise", {"base_fn": "zero"}, 10, {"model_ema": True, "model_ema_decay": 0.9}),
    Run("universal", {"sharing": "universal", "base_fn": "silu"}, 11, {"attn_lr": 0.05}),
    Run("frozen", {"train_basis": False, "train_base": False, "num_karat_heads": 1, "karat_layers": [1]}, 9, {}, True),
    Run("fed", None, 10, {"model_ema": True, "model_ema_decay": 0.9, "gradient_checkpointing": True}, fed=True),
    Run("softmax", None, 11, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "label_smoothing_factor": 0.1}),
]


def make_model(run: Run):
    if run.fed:
        teacher = tiny.make_model(num_labels=6, qkv_bias=False)
        student = tiny.make_model("softmax", num_labels=6)
        transfer.feed(student, transfer.AttentionTeacher(teacher), "teacher")
        return student
    return tiny.make_model("softmax" if run.model is None else "karat", num_labels=6, **(run.model or {}))


def make_rows(count: int, soft: bool, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, 8, 8, generator=generator)
    labels = torch.randint(6, (count,), generator=generator)
    if soft:
        labels = torch.randn(count, 6, generator=generator).softmax(-1)
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels)]


class Record(TrainerCallback):
    """The gradients and the learning rate of every step, and its loss."""

    def __init__(self):
        self.gradients, self.rates = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        found = {name: whole(parameter.grad) for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.gradients.append(found)
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def make_trainer(run: Run, folder: Path, record: Record, processes: int) -> ImageClassificationTrainer:
    settings = {"learning_rate": 0.1, "warmup_epochs": 0.5, "num_train_epochs": 2, "logging_steps": 1}
    args = RunArguments(
        output_dir=str(folder),
        use_cpu=True,
        disable_tqdm=True,
        seed=7,
        eval_strategy="epoch",
        save_strategy="steps",
        logging_strategy="steps",
        save_steps=run.middle,
        save_total_limit=0,
        dataloader_num_workers=0,
        per_device_train_batch_size=BATCH // processes,
        per_device_eval_batch_size=BATCH // processes,
        **{**settings, **run.settings},
    )
    return ImageClassificationTrainer(
        model=make_model(run),
        args=args,
        train_dataset=make_rows(run.images, run.soft, seed=1),
        eval_dataset=make_rows(11, False, seed=2),
        compute_metrics=ComputeMetrics(6),
        preprocess_logits_for_metrics=preprocess,
        callbacks=[record],
    )


def train(run: Run, folder: Path, processes: int, checkpoint: Path | None = None) -> None:
    """Train, and write what came out to `result.pt`."""
    record = Record()
    trainer = make_trainer(run, folder, record, processes)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights = {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()}
    moments = trainer.checkpointer.collect([])[1]["state"]
    result = {
        "step": trainer.state.global_step,
        "gradients": record.gradients,
        "rates": record.rates,
        "weights": weights,
        "optimizer": moments,
        "average": trainer.average.whole(trainer.bare_model) if trainer.average else {},
        "log": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        torch.save(result, folder / "result.pt")


def train_all(own: Path, others: Path | None, processes: int) -> None:
    """Every run from the beginning, and from a checkpoint of another layout in the middle of the second epoch."""
    for run in RUNS:
        if others is None:
            train(run, own / run.name, processes)
        else:
            folder = others / run.name / f"checkpoint-{run.middle}"
            train(run, own / f"{run.name}-resumed", processes, folder)


def in_two_forks(function: Callable[[], int]) -> list[int]:
    """Call it in two forks of this process, as the processes of a launch on the CPU; what they return."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    forks = []
    for rank in ("0", "1"):
        forks.append(os.fork())
        if forks[-1] == 0:
            status = 99
            try:
                os.environ.update(together | {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"})
                status = function()
            finally:
                os._exit(status)
    return [os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) for fork in forks]


def launched_by(config: Path) -> None:
    """Set the environment of a process that `accelerate launch` starts by this file, without mixed precision."""
    args = launch_command_parser().parse_args(["--config_file", str(config), "--main_process_port", "0", "script.py"])
    args.mixed_precision = "no"
    os.environ.update(prepare_multi_gpu_env(_validate_launch_command(args)[0]))
    torch.set_num_threads(1)
    if "ACCELERATE_USE_FSDP" in os.environ:
        shard_on_the_cpu()


def shard_on_the_cpu() -> None:
    """Let accelerate use FSDP2 over gloo: it does so on accelerators only, PyTorch also on the CPU."""
    original = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp


def train_in_two(config: Path, own: Path, others: Path) -> None:
    """Every run in two processes; and on from the checkpoints in `others`, which one process wrote."""

    def train_all_twice() -> int:
        launched_by(config)
        train_all(own, None, 2)
        train_all(own, others, 2)
        torch.distributed.destroy_process_group()
        return 0

    assert in_two_forks(train_all_twice) == [0, 0]
