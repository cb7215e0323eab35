# SPDX-License-Identifier: Apache-2.0
"""
Fine-tuning with KArAt heads beside fine-tuning without:

    python -m benchmarks.backbones --device cuda --data_set CIFAR10 --data_path path/to/cifar10

trains a small backbone on 32x32 images, puts KArAt heads into its last two blocks with either start, and trains the
three models on for the same epochs, with the same batches. For each it tells how far the logits are from the untouched
model's before fine-tuning, and the accuracy on the evaluation images before and after it. Which images: by the settings
of the training script.
"""

import copy
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import DeiTForImageClassification, Dinov2ForImageClassification, SwinForImageClassification

from image_classification.data.images import decode
from image_classification.data.sources import load_data
from image_classification.flags import Parser
from image_classification.settings.parser import parse_settings
from modeling_karat_vit import karatize

from .common import Rows


SIZE = 32
LAYERS = [-2, -1]
RATE = 2e-4  # Of fine-tuning.
PLAIN = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "patch_size": 4}
BACKBONES: dict[str, tuple[Any, dict]] = {
    "dinov2": (Dinov2ForImageClassification, PLAIN),
    "deit": (DeiTForImageClassification, {**PLAIN, "intermediate_size": 768}),
    "swin": (
        SwinForImageClassification,
        {"embed_dim": 48, "depths": [2, 4], "num_heads": [3, 6], "window_size": 4, "patch_size": 2},
    ),
}
RESULTS = Path(__file__).parent / "results"


class FineTuning(Rows):
    """Rows of accuracies."""

    measured = (
        *("benchmark", "backbone", "sizes", "seed", "model", "training_images", "test_images", "epochs"),
        *("fine_tuning", "karat_rate", "logits_distance", "logits_relative", "before", "after", "gamma", "seconds"),
        *("command", "commit"),
    )


def tensors(rows, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, 32, 32), normalised to [-1, 1], and labels (N,), on the device."""
    images = [np.asarray(decode(item, "an image").resize((SIZE, SIZE))) for item in rows["image"]]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)
    return pixels / 127.5 - 1.0, torch.tensor(rows["label"], device=device)


def augmented(images: torch.Tensor) -> torch.Tensor:
    """A random shift of up to 4 pixels for the batch, and flips by image."""
    top, left = torch.randint(0, 9, (2,)).tolist()
    images = F.pad(images, (4, 4, 4, 4))[..., top : top + SIZE, left : left + SIZE]
    return torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5, images.flip(3), images)


def train(
    model, images, labels, epochs: int, rate: float, batch: int, seed: int, karat_rate: float | None = None
) -> None:
    """AdamW with a one-cycle schedule, KArAt's parameters at a rate of their own; a seed has the same batches."""
    torch.manual_seed(seed)
    model.train()
    named = model.karat_parameter_names() if karat_rate else set()
    groups: list[dict] = [{"params": [p for name, p in model.named_parameters() if name not in named], "lr": rate}]
    if named:
        groups.append({"params": [model.get_parameter(name) for name in named], "lr": karat_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    rates = [group["lr"] for group in groups]
    total = max(2, epochs * -(-len(images) // batch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=total)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(batch):
            chosen = chosen.to(images.device)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
                loss = F.cross_entropy(model(augmented(images[chosen])).logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def logits_of(model, images, batch: int) -> torch.Tensor:
    """Logits of all images, in fp32."""
    return torch.cat([model(part).logits.float() for part in images.split(batch)])


def compare(
    data,
    device: str,
    name: str,
    sizes: dict,
    epochs: int,
    fine_tuning: int,
    batch: int,
    seed: int,
    karat_rate: float = RATE,
):
    """
    Yield a row for each of three models, with `model`, `logits_distance` (mean absolute, from the untouched model's),
    `logits_relative` (the norm of that over the norm of the untouched model's), `before` and `after` (accuracies),
    `gamma` (the mean absolute one, afterwards).

    Args:
        data: an `ImageData`.
        name, sizes: of `BACKBONES`, and fields of its configuration other than those there.
        epochs, fine_tuning: of training the backbone, and of training each model on.
        karat_rate: learning rate of KArAt's parameters; that of all others is `RATE`.
    """
    (images, labels), (unseen, expected) = (tensors(rows, device) for rows in (data.train, data.validation))
    cls, small = BACKBONES[name]
    torch.manual_seed(seed)
    config = cls.config_class(**{**small, **sizes}, image_size=SIZE, num_labels=len(data.labels))
    backbone = cls(config).to(device)
    train(backbone, images, labels, epochs, 1e-3, batch, seed)
    untouched = logits_of(backbone, unseen, batch)
    models = {
        "softmax": lambda: copy.deepcopy(backbone),
        "residual": lambda: karatize(backbone, LAYERS),
        "replace": lambda: karatize(backbone, LAYERS, start="replace", images=images[:batch]),
    }
    for start, make in models.items():
        began = time.perf_counter()
        torch.manual_seed(seed)
        model = make()
        logits = logits_of(model, unseen, batch)
        train(model, images, labels, fine_tuning, RATE, batch, seed + 1, None if start == "softmax" else karat_rate)
        gammas = [parameter for name, parameter in model.named_parameters() if name.endswith("karat.gamma")]
        yield {
            "model": start,
            "logits_distance": float((logits - untouched).abs().mean()),
            "logits_relative": float((logits - untouched).norm() / untouched.norm()),
            "before": float((logits.argmax(1) == expected).float().mean()),
            "after": float((logits_of(model, unseen, batch).argmax(1) == expected).float().mean()),
            "training_images": len(images),
            "test_images": len(unseen),
            "gamma": float(torch.cat(gammas).detach().abs().mean()) if gammas else None,
            "seconds": time.perf_counter() - began,
        }


def main() -> None:
    parser = Parser(prog="python -m benchmarks.backbones", description=__doc__.partition("\n\n")[0].strip())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backbone", default="dinov2", choices=list(BACKBONES))
    parser.add_argument("--sizes", type=json.loads, default={}, help="as '{\"hidden_size\": 64}'")
    parser.add_argument("--epochs", type=int, default=60, help="of training the backbone")
    parser.add_argument("--fine-tuning", type=int, default=20, help="epochs of each model afterwards")
    parser.add_argument("--karat-rate", type=float, default=RATE, help="learning rate of KArAt's parameters")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, help="CSV to append to (default: results/DEVICE_backbones.csv)")
    args, words = parser.parse_known_args()
    settings = parse_settings([*words, *(["--use_cpu"] if args.device == "cpu" else [])])
    data = load_data(settings.data, settings.training.seed)
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS, capture_output=True, text=True)
    same = {
        "benchmark": "backbones",
        "backbone": args.backbone,
        "sizes": json.dumps(args.sizes),
        "epochs": args.epochs,
        "fine_tuning": args.fine_tuning,
        "karat_rate": args.karat_rate,
        "command": shlex.join(["python", "-m", "benchmarks.backbones", *sys.argv[1:]]),
        "commit": done.stdout.strip(),
    }
    how = (args.device, args.backbone, args.sizes, args.epochs, args.fine_tuning, args.batch)
    for seed in args.seeds:
        for row in compare(data, *how, seed, args.karat_rate):
            table = FineTuning(args.device)  # Written at once: the next takes as long.
            table.add(**same, seed=seed, **row)
            table.write(args.output or RESULTS / f"{args.device}_backbones.csv")


if __name__ == "__main__":
    main()
