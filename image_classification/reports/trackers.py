# SPDX-License-Identifier: Apache-2.0
"""TensorBoard and Weights & Biases: which run a training reports to, also where it goes on after a stop."""

import os
import uuid
from pathlib import Path

from transformers import Trainer
from transformers.integrations import TensorBoardCallback

from ..settings.arguments import RunArguments


WANDB_ID = "wandb_run_id.txt"


class _TensorBoard(TensorBoardCallback):
    """A folder for the run, and a resumed run replaces what was reported after the checkpoint that it goes on from."""

    def __init__(self, folder: Path):
        super().__init__()
        self.logging_dir = str(folder)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.tb_writer is None and state.global_step:
            from torch.utils.tensorboard import SummaryWriter

            self.tb_writer = SummaryWriter(log_dir=self.logging_dir, purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)


def choose_run(args: RunArguments, anew: bool = False) -> None:
    """
    Say to Weights & Biases which run is meant, before the Trainer starts it: `run_id`, else the one that this output
    folder has reported to (unless another run begins in it, `anew`), else a new one. The process that writes the folder
    calls this.
    """
    kept = Path(args.output_dir) / WANDB_ID
    if anew:
        kept.unlink(missing_ok=True)
    if "wandb" not in (args.report_to or []):
        return
    known = kept.read_text(encoding="utf-8").strip() if kept.is_file() else None
    chosen = args.run_id or known or uuid.uuid4().hex[:12]
    kept.write_text(chosen + "\n", encoding="utf-8")
    os.environ["WANDB_RUN_ID"] = chosen
    os.environ.setdefault("WANDB_RESUME", "allow")


def name_tensorboard_folder(trainer: Trainer) -> None:
    """TensorBoard's files go to `runs/` of the output folder, named by `run_id`, else by `run_name`."""
    if trainer.pop_callback(TensorBoardCallback) is not None:
        args: RunArguments = trainer.args
        name = str(args.run_id or args.run_name).replace(os.sep, "-")
        trainer.add_callback(_TensorBoard(Path(args.output_dir) / "runs" / name))
