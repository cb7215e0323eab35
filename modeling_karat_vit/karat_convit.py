# SPDX-License-Identifier: Apache-2.0
"""
timm's ConViT, as Transformers wraps timm's models, with KArAt heads. timm is needed to make one.

ConViT's first blocks have gated positional self-attention (GPSA), whose maps are `(1 - g) softmax(S) + g softmax(P)`:
S are the scores of queries and keys, P depends on positions alone, and g, the gate, is a number per head. KArAt takes
the place of the first softmax, or is added to it; gate and positions stay. The last blocks have plain attention (MHSA),
and only there a class token is among the tokens. (The paper puts KArAt into the plain blocks, its Appendix C.1.4.)

Shapes: B images, h heads, N tokens, d head size.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperForImageClassification, TimmWrapperModel

from .configuration_karat_vit import height_and_width
from .karat_backbones import Family, KArAtBackbone, register


try:
    from timm.models.convit import GPSA, MHSA
except ImportError:
    GPSA = MHSA = nn.Module  # type: ignore[misc, assignment]


class _Heads(nn.Module):
    """What both kinds of attention have in common: softmax as timm computes it, KArAt heads, and maps if wanted."""

    num_heads: int
    scale: float
    proj: nn.Linear
    maps: torch.Tensor | None = None  # Of the last images, where `wants_maps`.
    wants_maps = False

    @property
    def head_dim(self) -> int:
        return self.proj.in_features // self.num_heads

    def attend(self, query, key, value, gate=None, positions=None):
        """Output (B, N, h, d), and the maps (B, h, N, N) where they are wanted."""
        how = {"scaling": self.scale, "gate": gate, "positions": positions}
        if getattr(self, "karat", None) is None:
            return self.softmax_heads(query, key, value, None, **how)
        weight = None if gate is None else 1.0 - gate[: self.karat.heads]
        way = "eager" if self.wants_maps else None
        return self.karat(self, query, key, value, None, implementation=way, weight=weight, **how)

    def softmax_heads(self, query, key, value, attention_mask, scaling, gate=None, positions=None, **kwargs):
        """Softmax of the last heads, gated with the positions' if there are any: output (B, N, h, d) and maps."""
        maps = ((query @ key.transpose(-2, -1)) * scaling).softmax(dim=-1)
        if gate is not None:
            gate, positions = gate[-query.shape[1] :], positions[:, -query.shape[1] :]
            maps = (1.0 - gate) * maps + gate * positions
            maps = maps / maps.sum(dim=-1).unsqueeze(-1)
        maps = self.attn_drop(maps)
        return (maps @ value).transpose(1, 2), maps

    def project(self, output, maps):
        """The tokens (B, N, hidden)."""
        self.maps = maps if self.wants_maps else None
        return self.proj_drop(self.proj(output.flatten(2)))


class KArAtMHSA(_Heads, MHSA):
    """ConViT's plain attention with KArAt heads."""

    def forward(self, x):
        """
        Args:
            x: tokens (B, N, hidden).
        """
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.project(*self.attend(query, key, value))


class KArAtGPSA(_Heads, GPSA):
    """ConViT's gated positional attention with KArAt heads."""

    def forward(self, x):
        """
        Args:
            x: tokens (B, N, hidden).
        """
        if self.rel_indices.shape[1] != x.shape[1]:
            self.rel_indices = self.get_rel_indices(x.shape[1])
        query, key = self.qk(x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        value = self.v(x).unflatten(2, (self.num_heads, -1)).permute(0, 2, 1, 3)
        positions = self.pos_proj(self.rel_indices.expand(len(x), -1, -1, -1)).permute(0, 3, 1, 2).softmax(dim=-1)
        gate = torch.sigmoid(self.gating_param.view(-1, 1, 1))
        karat = getattr(self, "karat", None)
        if karat is None or karat.gamma is not None:
            return self.project(*self.attend(query, key, value, gate, positions))
        # KArAt's rows have any sum: nothing is normalised after the gate, as timm does with softmax, where it is 1.
        output, maps = self.attend(query, key, value)
        positional = gate * positions
        output = (1.0 - gate).transpose(0, 1) * output + (positional @ value).transpose(1, 2)
        return self.project(output, None if maps is None else (1.0 - gate) * maps + positional)


def _convit(config) -> None:
    if not config.architecture.startswith("convit_") or (config.model_args or {}).get("features_only"):
        hint = ""
        if config.architecture.startswith(("vit_", "deit_")):
            hint = " Plain ViTs convert to Transformers', with `convert_timm_state_dict`."
        raise ValueError(
            f"Of timm's models, KArAt heads go into ConViT (convit_tiny, convit_small, convit_base) without "
            f"`features_only`, and `architecture` is {config.architecture!r}.{hint}"
        )


def _prefix_tokens(model, index: int) -> int:
    return int(index >= model.timm_model.local_up_to_layer)


def _grid(model, image_size, index: int) -> tuple[int, int]:
    patches = model.timm_model.patch_embed
    if height_and_width(image_size) != tuple(patches.img_size):
        raise ValueError(
            f"`image_size` is {image_size}, and timm made this ConViT for {patches.img_size}: load or make it with "
            '`model_args={"img_size": ...}`.'
        )
    return patches.grid_size


@strict
class KArAtConViTConfig(TimmWrapperConfig):
    """
    `TimmWrapperConfig` of a ConViT, and `karat`. In a checkpoint of timm, `pretrained_cfg` says how images are
    processed, and AutoImageProcessor has to be told which class reads it.
    """

    model_type = "karat_convit"
    image_processor_type: str = "TimmWrapperImageProcessor"
    karat: dict | None = None

    def to_dict(self):
        """As `TimmWrapperConfig` has it, with the present names of the classes, not those that were once loaded."""
        return super().to_dict() | {"label_names": list(self.id2label.values())}


_CONVIT = Family(
    ("GPSA", "MHSA"),
    prefix_tokens=_prefix_tokens,
    grid=_grid,
    image_size=lambda model: list(model.timm_model.patch_embed.img_size),
    check=_convit,
    modules={"GPSA": KArAtGPSA, "MHSA": KArAtMHSA},
)


class _ConViT(KArAtBackbone):
    def _install(self):
        super()._install()
        # Their maps are wanted, too.
        for block in self.timm_model.blocks:
            block.attn.__class__ = KArAtGPSA if block.use_gpsa else KArAtMHSA

    def forward(self, pixel_values, output_attentions: bool | None = None, return_dict: bool | None = None, **kwargs):
        """
        Args:
            pixel_values: images (B, C, H, W).
            output_attentions: give the maps of all blocks, gates and positions included, for which KArAt heads are
                computed by `eager`; default: as `config` says.
            kwargs: as Transformers' wrapper of timm's models has them.
        """
        wanted = self.config.output_attentions if output_attentions is None else output_attentions
        attentions = [block.attn for block in self.timm_model.blocks]
        try:
            for attention in attentions:
                attention.wants_maps = bool(wanted)
            outputs = super().forward(pixel_values, output_attentions=False, return_dict=True, **kwargs)
            if wanted:
                outputs["attentions"] = tuple(attention.maps for attention in attentions)
        finally:
            for attention in attentions:
                attention.wants_maps, attention.maps = False, None
        return outputs if (self.config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()


class KArAtConViTModel(_ConViT, TimmWrapperModel):
    config_class, family, auto_name = KArAtConViTConfig, _CONVIT, "AutoModel"


class KArAtConViTForImageClassification(_ConViT, TimmWrapperForImageClassification):
    config_class, family, auto_name = KArAtConViTConfig, _CONVIT, "AutoModelForImageClassification"


MODELS = register(KArAtConViTModel, KArAtConViTForImageClassification)
