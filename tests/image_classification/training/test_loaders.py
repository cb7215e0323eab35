# SPDX-License-Identifier: Apache-2.0
"""Data loaders of a run."""

import random

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset, default_collate

from image_classification.settings.arguments import RunArguments
from image_classification.training.loaders import Loaders


class Drawn(Dataset):
    """What a data set without generators of its own draws in a worker."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)


def test_data_workers_draw_by_the_seed_of_the_run(tmp_path):
    def drawn(seed):
        args = RunArguments(output_dir=str(tmp_path), use_cpu=True, seed=seed, dataloader_num_workers=2)
        loaders = Loaders(Accelerator(cpu=True), args)
        numbers = torch.cat([*loaders.make(Drawn(), 1, default_collate, training=True)])
        loaders.end_workers()
        return numbers

    first = drawn(1)
    assert torch.equal(first, drawn(1)) and not torch.isin(first, drawn(2)).any()
    assert len(first.unique()) == first.numel()  # Each worker its own.
