# SPDX-License-Identifier: Apache-2.0
"""Tiny classifiers and their checkpoint folders, for tests of what is around the model."""

import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from modeling_karat_vit import KArAtViTConfig, KArAtViTForImageClassification


SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "image_size": 8,
    "patch_size": 4,
}


def make_model(kind: str = "karat", labels=None, seed: int = 0, **fields):
    """A KArAt or a softmax classifier of 8 x 8 images, with classes of these names; `fields` go over its sizes."""
    torch.manual_seed(seed)
    fields = {**SIZES, **fields}
    if labels is not None:
        fields |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if kind == "softmax":
        return ViTForImageClassification(ViTConfig(**fields))
    return KArAtViTForImageClassification(KArAtViTConfig(**fields))


@torch.no_grad()
def with_scores(model):
    """Queries and keys large enough for scores of about 1, so that maps of different models differ."""
    for layer in model.vit.layers:
        for projection in (layer.attention.q_proj, layer.attention.k_proj):
            projection.weight.normal_(std=0.3)
    return model


def save_checkpoint(model, folder, **processor) -> str:
    """A folder with the model and an image processor of its size."""
    side = model.config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    model.save_pretrained(folder, save_original_format=False)
    ViTImageProcessorPil(size={"height": height, "width": width}, **processor).save_pretrained(folder)
    return str(folder)
