# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Transformers, one of each class that `karatize` takes, with random weights."""

import json

import torch
from safetensors.torch import save_file
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
    T5Config,
    T5Model,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
    ViTConfig,
    VitDetBackbone,
    VitDetConfig,
    VitDetModel,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from modeling_karat_vit import KArAtViTConfig, KArAtViTModel, karatize


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 8}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
# Stage 0: 8x8 patches in shifted windows of 4x4. Stage 1: one window of 4x4.
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}
# Block 0: windows of 2x2 of 3x3 patches, padded. Block 1: all patches.
VITDET = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12, "patch_size": 4}
VITDET |= {"pretrain_image_size": 12, "window_size": 2, "window_block_indices": [0]}
# Block 0: GPSA, 4 tokens. Block 1: plain, with the class token.
CONVIT = {"architecture": "convit_tiny", "num_labels": 3, "model_args": {"img_size": 8, "patch_size": 4, "depth": 2}}
CONVIT["model_args"] |= {"embed_dim": 8, "num_heads": 2, "local_up_to_layer": 1}


def _clip():
    return CLIPConfig(text_config=CLIPTextConfig(**TEXT), vision_config=CLIPVisionConfig(**SIZES), num_labels=3)


def _siglip():
    return SiglipConfig(text_config=SiglipTextConfig(**TEXT), vision_config=SiglipVisionConfig(**SIZES), num_labels=3)


def _beit(**settings):
    return BeitConfig(**SIZES, num_labels=3, **settings)


MAKERS = {
    "vit": lambda: ViTModel(ViTConfig(**SIZES)),
    "vit_classifier": lambda: ViTForImageClassification(ViTConfig(**SIZES, num_labels=3)),
    "deit": lambda: DeiTModel(DeiTConfig(**SIZES)),
    "deit_classifier": lambda: DeiTForImageClassification(DeiTConfig(**SIZES, num_labels=3)),
    "deit_distilled": lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES, num_labels=3)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES)),
    "dinov2_classifier": lambda: Dinov2ForImageClassification(Dinov2Config(**SIZES, num_labels=3)),
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES)),
    "registers_classifier": lambda: Dinov2WithRegistersForImageClassification(
        Dinov2WithRegistersConfig(**SIZES, num_labels=3)
    ),
    "vit_mae": lambda: ViTMAEModel(ViTMAEConfig(**SIZES, mask_ratio=0.0)),
    "beit": lambda: BeitModel(_beit(use_absolute_position_embeddings=True)),
    "beit_bias": lambda: BeitForImageClassification(_beit(use_relative_position_bias=True)),
    "beit_shared_bias": lambda: BeitForImageClassification(_beit(use_shared_relative_position_bias=True)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES)),
    "clip_classifier": lambda: CLIPForImageClassification(_clip()),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES)),
    "siglip_classifier": lambda: SiglipForImageClassification(_siglip()),
    "swin": lambda: SwinModel(SwinConfig(**SWIN)),
    "swin_classifier": lambda: SwinForImageClassification(SwinConfig(**SWIN, num_labels=3)),
    "vitdet": lambda: VitDetModel(VitDetConfig(**VITDET)),
    "vitdet_backbone": lambda: VitDetBackbone(
        VitDetConfig(**VITDET, use_relative_position_embeddings=True, out_features=["stage2"])
    ),
    "convit": lambda: TimmWrapperModel(TimmWrapperConfig(**CONVIT)),
    "convit_classifier": lambda: TimmWrapperForImageClassification(TimmWrapperConfig(**CONVIT)),
}
OPERATOR = {"grid_size": 1, "karat_rank": 3}

LIMITS = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
LIMITED_T5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 8}
MAE = ViTMAEConfig(**LIMITS, image_size=8, patch_size=4)


def _timm(architecture: str):
    return lambda: TimmWrapperModel(TimmWrapperConfig(architecture=architecture))


# What raises, as docs/karatize.md has it: models, and what the message names.
UNSUPPORTED = {
    "grouped-query attention": [
        (lambda: LlamaModel(LlamaConfig(**LIMITS, num_key_value_heads=1, vocab_size=8)), "grouped-query")
    ],
    "encoder-decoders, cross attention": [
        (lambda: T5Model(T5Config(**LIMITED_T5)), "cross attention"),
        (lambda: BertModel(BertConfig(**LIMITS, vocab_size=8, is_decoder=True, add_cross_attention=True)), "cross"),
    ],
    "causal attention, CLIP's text tower, language models": [
        (lambda: LlamaModel(LlamaConfig(**LIMITS, vocab_size=8)), "causal"),
        (lambda: CLIPTextModel(CLIPTextConfig(**LIMITS, vocab_size=8)), "input_ids"),
    ],
    "ViT-MAE's pre-training, `mask_ratio` above 0": [
        (lambda: ViTMAEForPreTraining(MAE), "hides"),
        (lambda: ViTMAEModel(MAE), "mask_ratio"),
    ],
    "KArAt models": [
        (lambda: karatize(make("vit"), **OPERATOR), "already"),
        (lambda: KArAtViTModel(KArAtViTConfig(**SIZES)), "already"),
    ],
    "timm's other models": [
        (_timm("resnet18"), "resnet18"),
        (_timm("vit_tiny_patch16_224"), "convert_timm_state_dict"),
    ],
    "every other class": [(lambda: BertModel(BertConfig(**LIMITS, vocab_size=8)), "no adapter")],
}


def make(name: str):
    """A model with random weights, biases, position embeddings and class tokens, in eval mode."""
    torch.manual_seed(0)
    model = MAKERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def save_as_timm(model, folder, **config) -> None:
    """A ConViT as timm's repositories on the Hub hold it: timm's configuration and names of weights."""
    folder.mkdir()
    images = {"input_size": [3, 8, 8], "interpolation": "bilinear", "crop_pct": 0.8}
    images |= {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.4, 0.5], "num_classes": 3}
    written = {**CONVIT, "num_classes": 3, "label_names": ["ant", "bee", "cow"], "pretrained_cfg": images, **config}
    del written["num_labels"]
    (folder / "config.json").write_text(json.dumps(written))
    save_file(model.timm_model.state_dict(), folder / "model.safetensors", {"format": "pt"})


def images_for(model, count: int = 2):
    """Images of the model's size, (count, 3, H, W)."""
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", 8)
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def attentions_of(model, images) -> list[torch.Tensor]:
    """Maps of all blocks; of an untouched model of timm, which gives none, by timm's own functions."""
    if not type(model).__name__.startswith("TimmWrapper"):
        return list(model(pixel_values=images, output_attentions=True).attentions)
    modules, tokens = [block.attn for block in model.timm_model.blocks], {}
    hooks = [m.register_forward_pre_hook(lambda m, args: tokens.update({m: args[0]})) for m in modules]
    model(images)
    for hook in hooks:
        hook.remove()
    return [_map_of_timm(module, tokens[module]) for module in modules]


def _map_of_timm(module, tokens):
    if hasattr(module, "get_attention"):
        return module.get_attention(tokens)
    query, key, _ = module.qkv(tokens).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (query @ key.mT * module.scale).softmax(-1)


def features(model, images, **kwargs):
    """Logits, the last feature map, or the last hidden state."""
    if "MAE" in type(model).__name__:
        patches = (images.shape[-1] // model.config.patch_size) ** 2
        kwargs["noise"] = torch.arange(patches).expand(len(images), -1)
    outputs = model(pixel_values=images, **kwargs)
    for name in ("logits", "feature_maps", "last_hidden_state"):
        if hasattr(outputs, name):
            return outputs.feature_maps[-1] if name == "feature_maps" else outputs[name]
    raise AssertionError(f"no features in {list(outputs)}")
