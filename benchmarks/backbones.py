# SPDX-License-Identifier: Apache-2.0
"""
Fine-tuning with KArAt heads beside fine-tuning without:

    python -m benchmarks.backbones --data-path path/to/cifar10 --device cuda

trains a small DINOv2 on 32x32 images, puts KArAt heads into its last two blocks with either start, and trains the three
models on for the same epochs, with the same batches. It prints, for each, how far the logits are from the untouched
model's before fine-tuning, and the accuracy before and after it.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2ForImageClassification

from image_classification.data.images import decode
from image_classification.data.sources import load_data
from image_classification.flags import Parser
from modeling_karat_vit import karatize

from .rivals import settings_of


SIZE = 32
LAYERS = [-2, -1]


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


def train(model, images, labels, epochs: int, rate: float, batch: int, seed: int) -> None:
    """AdamW with a cosine schedule; the same seed gives the same batches."""
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    per_epoch = -(-len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(2, epochs * per_epoch))
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


def compare(data, device: str, epochs: int, fine_tuning: int, batch: int, seed: int, **sizes) -> list[dict]:
    """
    Rows with `model`, `logits_distance` (mean absolute, from the untouched model), `before` and `after` (accuracies).

    Args:
        data: an `ImageData`.
        epochs, fine_tuning: of training the backbone, and of training each model on.
        sizes: fields of `Dinov2Config` other than the default's.
    """
    (images, labels), (unseen, expected) = (tensors(rows, device) for rows in (data.train, data.validation))
    small = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "patch_size": 4, **sizes}
    torch.manual_seed(seed)
    config = Dinov2Config(**small, image_size=SIZE, num_labels=len(data.labels))
    backbone = Dinov2ForImageClassification(config).to(device)
    train(backbone, images, labels, epochs, 1e-3, batch, seed)
    untouched = logits_of(backbone, unseen, batch)
    models = {
        "residual": karatize(backbone, LAYERS),
        "replace": karatize(backbone, LAYERS, start="replace", images=images[:batch]),
        "softmax": backbone,  # Last, because it is trained on itself.
    }
    rows = []
    for name, model in models.items():
        logits = logits_of(model, unseen, batch)
        train(model, images, labels, fine_tuning, 2e-4, batch, seed + 1)
        rows.append(
            {
                "model": name,
                "logits_distance": float((logits - untouched).abs().mean()),
                "before": float((logits.argmax(1) == expected).float().mean()),
                "after": float((logits_of(model, unseen, batch).argmax(1) == expected).float().mean()),
            }
        )
    return rows


def main() -> None:
    parser = Parser(prog="python -m benchmarks.backbones", description=__doc__.partition("\n\n")[0].strip())
    parser.add_argument(
        "--data-path", type=Path, required=True, help="folder with CIFAR-10, as the training script has it"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=60, help="of training the backbone")
    parser.add_argument("--fine-tuning", type=int, default=20, help="epochs of each model afterwards")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = load_data(settings_of(args.data_path, args.device).data, args.seed)
    print(f"{'model':10} {'logits':>8} {'before':>8} {'after':>8}")
    for row in compare(data, args.device, args.epochs, args.fine_tuning, args.batch, args.seed):
        print(f"{row['model']:10} {row['logits_distance']:8.4f} {row['before']:8.4f} {row['after']:8.4f}")


if __name__ == "__main__":
    main()
