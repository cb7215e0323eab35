# SPDX-License-Identifier: Apache-2.0
"""Vision Transformer with Kolmogorov-Arnold Attention (arXiv 2503.10632): what KArAt adds to Transformers' ViT."""

import copy
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_bidirectional_mask
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import (
    ViTAttention,
    ViTEmbeddings,
    ViTLayer,
    ViTPooler,
    ViTPreTrainedModel,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .basis import EdgeFunctions
from .configuration_karat_vit import STRUCTURAL_FIELDS, KArAtViTConfig, height_and_width
from .conversion import load_deit_state_dict
from .karat_operator import (
    KArAtOperator,
    eager_softmax_attention,
    freeze_untrained,
    fused_karat_attention,
    resample_tokens,
    why_not_fused,
)
from .portable import is_traced


logger = logging.get_logger(__name__)

# Names of `attn_implementation` that say how KArAt heads are computed; softmax heads beside them use SDPA.
KARAT_IMPLEMENTATIONS = ("karat_portable", "karat_triton")
AUTO_CLASSES = {
    "AutoConfig": "configuration_karat_vit.KArAtViTConfig",
    "AutoBackbone": "modeling_karat_vit.KArAtViTBackbone",
    "AutoModel": "modeling_karat_vit.KArAtViTModel",
    "AutoModelForImageClassification": "modeling_karat_vit.KArAtViTForImageClassification",
    "AutoModelForMaskedImageModeling": "modeling_karat_vit.KArAtViTForMaskedImageModeling",
}

# What `forward` takes beyond its named arguments: what this model reads, and what Transformers hands to any model.
# Transformers' Trainer sets `use_cache` in every configuration, from where every model is handed it.
FORWARD_KEYWORDS = {*TransformersKwargs.__annotations__, "output_attention_scores", "return_dict", "use_cache"}


def karat_attention_forward(module, query, key, value, attention_mask, **kwargs):
    """
    Attend by softmax with SDPA: that is what `attn_implementation="karat_*"` means to Transformers' attention modules,
    which hold no operator. KArAt heads never come here (see `KArAtViTAttention.forward`).
    """
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


for _name in KARAT_IMPLEMENTATIONS:
    ALL_ATTENTION_FUNCTIONS.register(_name, karat_attention_forward)
    # Without this, Transformers drops attention masks silently.
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])

# ViT's renamings, old layout to new. Classes outside Transformers would skip them, and lose the backbone.
register_checkpoint_conversion_mapping(
    KArAtViTConfig.model_type, get_checkpoint_conversion_mapping("ViTModel"), overwrite=True
)


@dataclass
class KArAtViTModelOutput(BaseModelOutputWithPooling):
    """`BaseModelOutputWithPooling`, and with `output_attention_scores` per block the scores, (B, heads, N, N)."""

    attention_scores: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class KArAtViTImageClassifierOutput(ImageClassifierOutput):
    """`ImageClassifierOutput`, and with `output_attention_scores` per block the scores, (B, heads, N, N)."""

    attention_scores: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class KArAtViTMaskedImageModelingOutput(MaskedImageModelingOutput):
    """`MaskedImageModelingOutput`, and with `output_attention_scores` per block the scores, (B, heads, N, N)."""

    attention_scores: tuple[torch.FloatTensor, ...] | None = None


class KArAtViTEmbeddings(ViTEmbeddings):
    """ViT's embeddings, with clear errors, and positions that interpolate for any grid and any patch shape."""

    def __init__(self, config: KArAtViTConfig, use_mask_token: bool = False):
        super().__init__(config, use_mask_token=use_mask_token)
        self.config = config

    def check_pixels(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> None:
        """Raise a `ValueError` for what is no batch of images of this model."""
        if not isinstance(pixel_values, torch.Tensor):
            raise ValueError(
                f"`pixel_values` is a {type(pixel_values).__name__}, expected a tensor: the image processor makes one "
                'with `return_tensors="pt"`.'
            )
        if pixel_values.dim() != 4:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}, expected (batch, channels, height, width)."
            )
        channels, height, width = pixel_values.shape[1:]
        if channels != self.config.num_channels:
            raise ValueError(
                f"The images have {channels} channels, and the model takes {self.config.num_channels}: convert them "
                'before the image processor, e.g. `image.convert("RGB")`.'
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` is {pixel_values.dtype}, expected floating point: pass raw images through the "
                "checkpoint's image processor, which rescales and normalises them."
            )
        own_height, own_width = self.patch_embeddings.image_size
        if not interpolate_pos_encoding and (height, width) != (own_height, own_width):
            raise ValueError(
                f"Input image size ({height}*{width}) doesn't match model ({own_height}*{own_width}). Resize the "
                "images, pass `interpolate_pos_encoding=True`, or change the model with `model.resize(...)`."
            )
        if 0 in self.config.patch_grid((height, width)):
            raise ValueError(
                f"The images of {height}*{width} pixels are smaller than a patch ({self.config.patch_size})."
            )
        # A check on another device would wait for it at every step.
        if pixel_values.device.type == "cpu" and not is_traced():
            # The sum is one pass; it may also be too large for its dtype.
            if not torch.isfinite(pixel_values.sum()) and not torch.isfinite(pixel_values).all():
                bad = (~torch.isfinite(pixel_values.flatten(1))).any(1).nonzero().flatten().tolist()
                raise ValueError(f"`pixel_values` has NaN or infinite values, in the images {bad} of the batch.")

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        grid, new_grid = self.config.patch_grid(), self.config.patch_grid((height, width))
        positions = self.position_embeddings.transpose(1, 2)
        return resample_tokens(positions, grid, new_grid).transpose(1, 2)


class KArAtViTAttention(ViTAttention):
    """
    Self-attention of one block. The first heads are KArAt, as many as the operator has, and the others softmax.

    The operator is the block's own, or is handed to `forward` where all blocks share one.
    """

    def __init__(self, config: KArAtViTConfig, layer_index: int):
        super().__init__(config)
        self.is_karat = config.is_karat_layer(layer_index)
        self.karat_heads = (config.num_karat_heads or config.num_attention_heads) if self.is_karat else 0
        self.operator = KArAtOperator(config) if self.is_karat and config.sharing == "blockwise" else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        masks: "AttentionMasks | None" = None,
        operator: KArAtOperator | None = None,
        implementation: str | None = None,
        grids: tuple | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Attend, each head in its way.

        Args:
            hidden_states: (B, N, hidden).
            masks: which keys may be seen.
            operator: the universal operator.
            implementation: how to attend; default `config._attn_implementation`.
            grids: patch grids (own, wanted) if the image is not of the model's size.

        Returns:
            Output (B, N, hidden); attention maps and scores (B, heads, N, N), or `None` where they are not formed.
        """
        implementation = implementation or self.config._attn_implementation
        masks = masks or NO_MASKS
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, self.num_attention_heads, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(hidden_shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        split = self.karat_heads
        parts = []
        if split:
            operator = operator if self.operator is None else self.operator
            assert operator is not None, "a universal operator is handed to each block"
            way = "eager" if masks.per_query else operator.way(implementation, query)
            keep = masks.of_heads(slice(0, split)).keep
            own = (query, key, value)
            if split < self.num_attention_heads:
                # Not slices, whose gradients would be padded with zeros and added up.
                sizes = (split, self.num_attention_heads - split)
                own, (query, key, value) = zip(*(x.split(sizes, dim=1) for x in own))
            output, maps, scores = operator(*own, self.scaling, way, keep, grids)
            if output.device != value.device:  # A universal operator may lie on another device than the block.
                output, maps, scores = (x if x is None else x.to(value.device) for x in (output, maps, scores))
            parts.append((output.transpose(1, 2), maps, scores))
        if split < self.num_attention_heads:
            parts.append(self.softmax_heads(query, key, value, masks.of_heads(slice(split, None)), implementation))
        if len(parts) == 1:
            ((output, maps, scores),) = parts
        else:
            outputs, maps, scores = zip(*parts)
            output, maps, scores = torch.cat(outputs, dim=2), _join(maps), _join(scores)
        return self.o_proj(output.flatten(2)), maps, scores

    def softmax_heads(self, query, key, value, masks: "AttentionMasks", implementation: str):
        """Attend by softmax the Transformers way: output (B, N, h, d), and with `eager` the maps and scores."""
        dropout = self.attention_dropout if self.training else 0.0
        if implementation == "eager":
            keep = masks.keep if masks.keep is None or masks.per_query else masks.keep[:, None, None, :]
            output, maps, scores = eager_softmax_attention(query, key, value, self.scaling, dropout, keep)
            return output.transpose(1, 2), maps, scores
        attend = ALL_ATTENTION_FUNCTIONS[_softmax_name(implementation)]
        output, _ = attend(
            self, query, key, value, masks.softmax, dropout=dropout, scaling=self.scaling, is_causal=False
        )
        return output, None, None


class KArAtViTLayer(ViTLayer):
    """ViT's block with KArAt heads and stochastic depth."""

    def __init__(self, config: KArAtViTConfig, layer_index: int):
        super().__init__(config)
        self.attention = KArAtViTAttention(config, layer_index)
        self.layer_index = layer_index
        # A tensor, so that torch.compile makes one code for equal blocks: a number would be part of it.
        rate = torch.empty(()) if config.drop_path_rate else None
        self.register_buffer("drop_path_rate", rate, persistent=False)
        self.reset_rate(config)

    @torch.no_grad()
    def reset_rate(self, config: KArAtViTConfig) -> None:
        """Set the rate of stochastic depth, which rises from 0 in the first block to the configured one in the last."""
        if self.drop_path_rate is not None:
            last = max(1, config.num_hidden_layers - 1)
            init.constant_(self.drop_path_rate, config.drop_path_rate * self.layer_index / last)

    def forward(self, hidden_states: torch.Tensor, masks=None, **kwargs) -> torch.Tensor:
        branch, *_ = self.attention(self.layernorm_before(hidden_states), masks, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.dropout(branch))
        branch = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.dropout(branch))

    def drop_path(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_path_rate is None:
            return branch
        return drop_path(branch, self.drop_path_rate)


def drop_path(branch: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """Stochastic depth (Huang et al. 2016): leave a branch (B, N, d) out for whole images, and scale up the others."""
    keep = 1.0 - rate.float()  # A model in half precision has it so, too.
    kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) < keep
    return branch * (kept / keep).to(branch.dtype)


if TYPE_CHECKING:  # What it is mixed into.
    from transformers import PreTrainedModel as _Mixed
else:
    _Mixed = object


class KArAtMixin(_Mixed):
    """What a pre-trained model class with KArAt heads has beyond Transformers', whatever its family."""

    auto_map: dict[str, str]
    # The modules that KArAt adds.
    karat_modules: type
    # The losses take no `num_items_in_batch`: Trainer has to divide by the accumulation steps itself.
    accepts_loss_kwargs = False

    def post_init(self):
        super().post_init()
        freeze_untrained(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """Load as Transformers does, which makes every float parameter trainable again."""
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        freeze_untrained(model)
        return (model, info) if output_loading_info else model

    def karat_parameter_names(self) -> set[str]:
        """Names of the parameters that KArAt adds to the model."""
        prefixes = tuple(f"{name}." for name, module in self.named_modules() if isinstance(module, self.karat_modules))
        return {name for name, _ in self.named_parameters() if name.startswith(prefixes)}

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """
        Save as Transformers does, with two differences: parameters keep their present names
        (`save_original_format=True` writes ViT's old ones, which Trainer cannot resume from), and `auto_map` names the
        auto class of every model of the family.
        """
        self.config.auto_map = dict(self.auto_map)
        return super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)


class KArAtViTPreTrainedModel(KArAtMixin, ViTPreTrainedModel):
    """Weights, initialisation and loading, as every Transformers model has them, and what KArAt needs beyond."""

    config: KArAtViTConfig
    config_class = KArAtViTConfig
    _no_split_modules = ["KArAtViTEmbeddings", "KArAtViTLayer", "KArAtOperator"]
    # The universal operator, which the blocks get as an argument, stays on its own device.
    _skip_keys_device_placement = ["operator"]
    _can_record_outputs = {
        "hidden_states": KArAtViTLayer,
        "attentions": KArAtViTAttention,
        "attention_scores": OutputRecorder(KArAtViTAttention, index=2),
    }
    auto_map, karat_modules = AUTO_CLASSES, KArAtOperator

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (KArAtOperator, EdgeFunctions)):
            module.reset_parameters()
        elif isinstance(module, KArAtViTLayer):
            module.reset_rate(self.config)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Resolve a name: `None` is the fastest way for KArAt heads, Transformers' names are about softmax heads."""
        if requested_attention is None:
            fused = torch.cuda.is_available() and why_not_fused(self.config, "cuda") is None
            return "karat_triton" if fused else "karat_portable"
        if requested_attention == "karat_triton" and fused_karat_attention is None:
            raise ValueError(
                "`attn_implementation='karat_triton'` needs Triton, which is not installed. Install it (`pip install "
                "triton`, on Linux), or use 'karat_portable'."
            )
        if requested_attention in KARAT_IMPLEMENTATIONS:
            return requested_attention
        if requested_attention.startswith("karat_"):
            raise ValueError(
                f"`attn_implementation={requested_attention!r}` does not exist here. KArAt heads are computed by "
                f"{', '.join(map(repr, KARAT_IMPLEMENTATIONS))} or 'eager', the reference."
            )
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        config=None,
        drop_distillation_token: bool = False,
        **kwargs,
    ):
        """
        Load a KArAt checkpoint, or take over the backbone of a ViT or DeiT checkpoint of Transformers; the KArAt
        parameters are then newly initialised. Arguments are those of `PreTrainedModel.from_pretrained`, and:

        Args:
            drop_distillation_token (`bool`, defaults to `False`):
                Load a distilled DeiT without its distillation token and head.

        Raises:
            ValueError: a keyword or `config` asks for another operator or size than a KArAt checkpoint has, or the
                checkpoint is a distilled DeiT and `drop_distillation_token` is not set.
        """
        source = {}
        if pretrained_model_name_or_path is not None:
            hub = {key: kwargs[key] for key in _HUB_KEYS if key in kwargs}
            source, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
            wanted = {key: kwargs[key] for key in STRUCTURAL_FIELDS if key in kwargs}
            if config is not None:
                asked = (
                    KArAtViTConfig.from_pretrained(config, **hub) if isinstance(config, (str, os.PathLike)) else config
                )
                _check_config_type(asked)
                wanted = {key: getattr(asked, key) for key in STRUCTURAL_FIELDS} | wanted
            _check_same_structure(pretrained_model_name_or_path, source, wanted)
        if source.get("model_type") == "deit":
            if not drop_distillation_token:
                raise ValueError(
                    f"{pretrained_model_name_or_path} is a distilled DeiT, whose sequence has one token more, for "
                    "distillation, than KArAt-ViT's. Pass `drop_distillation_token=True` to load the rest of it."
                )
            if config is None:
                fields = [key for key in kwargs if hasattr(KArAtViTConfig, key)]
                config = KArAtViTConfig.from_dict(source, **{key: kwargs.pop(key) for key in fields})
            kwargs["state_dict"] = load_deit_state_dict(pretrained_model_name_or_path, **hub)
            pretrained_model_name_or_path = None
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    @torch.no_grad()
    def resize(self, image_size: int | tuple[int, int] | list[int]):
        """
        Change the model's image size in place: position embeddings and operators are resampled along the token axis
        (`KArAtOperator.resample`). At the present size nothing changes.

        Args:
            image_size: pixels, or (height, width).

        Returns:
            The model.

        Raises:
            ValueError: no size, or smaller than a patch.
        """
        new = copy.deepcopy(self.config)
        new.image_size = image_size
        new.check()
        grid, new_grid = self.config.patch_grid(), new.patch_grid()
        for module in self.modules():
            if isinstance(module, KArAtViTEmbeddings):
                patches = module.patch_embeddings
                patches.image_size = module.image_size = height_and_width(new.image_size)
                patches.num_patches = new_grid[0] * new_grid[1]
            if grid == new_grid:
                continue  # The parameters stay the same objects, which an optimiser may hold.
            if isinstance(module, KArAtViTEmbeddings):
                positions = module.position_embeddings
                resized = resample_tokens(positions.mT, grid, new_grid).mT.contiguous()
                module.position_embeddings = nn.Parameter(resized, requires_grad=positions.requires_grad)
            elif isinstance(module, KArAtOperator):
                for name, parameter in list(module.named_parameters()):
                    resized = module.resample(name, parameter, grid, new_grid).contiguous()
                    owner, _, leaf = name.rpartition(".")
                    resized = type(parameter)(resized.detach(), requires_grad=parameter.requires_grad)
                    setattr(module.get_submodule(owner), leaf, resized)
                for step in module.edges:
                    step.out_features, step.in_features = step.scale_basis.shape[1:]
        self.config.image_size = new.image_size
        return self


class KArAtViTModel(KArAtViTPreTrainedModel):
    """
    The encoder, without a head.

    Args:
        config: the configuration.
        add_pooling_layer (`bool`, defaults to `True`): add ViT's pooler.
        use_mask_token (`bool`, defaults to `False`): add a mask token for masked image modelling.
    """

    def __init__(self, config: KArAtViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        _check_config_type(config)
        super().__init__(config)
        config.check()
        if config.attention_probs_dropout_prob > 0:
            logger.warning_once(
                f"`attention_probs_dropout_prob={config.attention_probs_dropout_prob}` acts on softmax heads only: "
                "KArAt rows are no probabilities, and are not dropped."
            )
        self.embeddings = KArAtViTEmbeddings(config, use_mask_token=use_mask_token)
        self.operator = KArAtOperator(config) if config.sharing == "universal" else None
        self.layers = nn.ModuleList(KArAtViTLayer(config, index) for index in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> KArAtViTModelOutput:
        """
        Encode images.

        Args:
            pixel_values: images (B, C, H, W), normalised by the image processor.
            bool_masked_pos: patches to replace by the mask token, (B, patches).
            interpolate_pos_encoding: take images of another size than the model's: position embeddings and operators
                are resampled for this call.
            attention_mask: keys that may be seen (True or 1), (B, N) with [CLS] first; or per query, (B, 1 or heads, N,
                N), boolean or additive (0 where visible). A mask per query is computed by `eager`.
            output_attentions, output_attention_scores, output_hidden_states: return the activated attention maps, the
                scores before the activation (this call then runs `eager`), the hidden states.
        """
        if pixel_values is None:
            raise ValueError("You have to specify `pixel_values`.")
        if bool_masked_pos is not None and self.embeddings.mask_token is None:
            raise ValueError("`bool_masked_pos` needs a model made with `use_mask_token=True`.")
        if not torch.compiler.is_compiling() and (unknown := sorted(set(kwargs) - FORWARD_KEYWORDS)):
            logger.warning_once(f"`forward` knows no {', '.join(map(repr, unknown))}: ignored.")
        self.embeddings.check_pixels(pixel_values, bool(interpolate_pos_encoding))
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states = self.embeddings(
            pixel_values, bool_masked_pos=bool_masked_pos, interpolate_pos_encoding=interpolate_pos_encoding
        )
        implementation = self._implementation_of_call(kwargs)
        masks = _attention_masks(attention_mask, hidden_states, self.config.num_attention_heads, implementation)
        grids = None
        if interpolate_pos_encoding:
            grids = (self.config.patch_grid(), self.config.patch_grid(pixel_values.shape[2:]))
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, masks, operator=self.operator, implementation=implementation, grids=grids
            )
        sequence_output = self.layernorm(hidden_states)
        pooled_output = self.pooler(sequence_output) if self.pooler is not None else None
        return KArAtViTModelOutput(last_hidden_state=sequence_output, pooler_output=pooled_output)

    def _implementation_of_call(self, kwargs) -> str:
        """The configured implementation, or `eager` for a call that asks for maps or scores."""
        implementation = self.config._attn_implementation
        names = ("output_attentions", "output_attention_scores")
        wanted = [name for name in names if kwargs.get(name, getattr(self.config, name, False))]
        if not wanted or implementation == "eager":
            return implementation
        if not torch.compiler.is_compiling():
            logger.warning_once(f"`{wanted[0]}=True`: {implementation!r} forms no maps, so such calls run 'eager'.")
        return "eager"


class KArAtViTForImageClassification(KArAtViTPreTrainedModel):
    """The encoder and a linear classifier on the final [CLS] state."""

    def __init__(self, config: KArAtViTConfig):
        _check_config_type(config)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = KArAtViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> KArAtViTImageClassifierOutput:
        """
        Classify images.

        Args:
            pixel_values, interpolate_pos_encoding, attention_mask: as in `KArAtViTModel`.
            labels: class indices (B,); soft targets (B, classes) with `problem_type="single_label_classification"`, as
                of mixup or a teacher; or targets of `"multi_label_classification"` (B, classes) or `"regression"`.

        Returns:
            Logits (B, classes), the loss if there are labels, and what `output_*` asks for.
        """
        outputs = self.vit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(outputs.last_hidden_state[:, 0])
        return KArAtViTImageClassifierOutput(
            loss=None if labels is None else self._loss(labels, logits),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            attention_scores=outputs.attention_scores,
        )

    def _loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Transformers' loss of the problem type; for soft targets of a single label their cross-entropy."""
        problem = self.config.problem_type
        if labels.is_floating_point() and self.config.num_labels > 1:
            if problem == "single_label_classification":
                if labels.shape != logits.shape:
                    raise ValueError(
                        f"`labels` are floats of shape {tuple(labels.shape)}: soft targets have that of the logits, "
                        f"{tuple(logits.shape)}; class indices are integers."
                    )
                return nn.functional.cross_entropy(logits, labels.to(logits))
            if problem is None and not torch.compiler.is_compiling():
                logger.warning_once(
                    "`labels` are floats and `config.problem_type` is unset: this is a multi-label loss, as in ViT. "
                    'Set `problem_type="single_label_classification"` for the cross-entropy of soft targets.'
                )
        return self.loss_function(labels, logits, self.config)


class KArAtViTForMaskedImageModeling(KArAtViTPreTrainedModel):
    """The encoder and a decoder that paints the masked patches: one linear map of each final state to its pixels."""

    def __init__(self, config: KArAtViTConfig):
        _check_config_type(config)
        super().__init__(config)
        self.vit = KArAtViTModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.encoder_stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> KArAtViTMaskedImageModelingOutput:
        """
        Reconstruct masked images.

        Args:
            pixel_values, interpolate_pos_encoding, attention_mask: as in `KArAtViTModel`.
            bool_masked_pos: patches that are masked, (B, patches); needs `encoder_stride` equal to `patch_size`.

        Returns:
            The reconstructed images (B, C, H, W), with `bool_masked_pos` the mean absolute error of the masked pixels
            as the loss, and what `output_*` asks for.
        """
        stride = self.config.encoder_stride
        if bool_masked_pos is not None and height_and_width(self.config.patch_size) != (stride, stride):
            raise ValueError(
                "`bool_masked_pos` needs `encoder_stride` equal to `patch_size`, or the reconstruction is not as large "
                f"as the image; they are {stride} and {self.config.patch_size}."
            )
        outputs = self.vit(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            return_dict=True,
            **kwargs,
        )
        assert pixel_values is not None, "the encoder refuses that"
        height, width = self.config.patch_grid(pixel_values.shape[2:])
        reconstruction = self.decoder(_as_map(outputs.last_hidden_state, height, width))
        loss = None
        if bool_masked_pos is not None:
            mask = bool_masked_pos.reshape(-1, 1, height, width).to(reconstruction.dtype)
            mask = mask.repeat_interleave(stride, 2).repeat_interleave(stride, 3)
            pixels = pixel_values[..., : height * stride, : width * stride].to(reconstruction.dtype)
            errors = nn.functional.l1_loss(reconstruction, pixels, reduction="none")
            loss = (errors * mask).sum() / (mask.sum() + 1e-5) / self.config.num_channels
        return KArAtViTMaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            attention_scores=outputs.attention_scores,
        )


class KArAtViTBackbone(BackboneMixin, KArAtViTModel):
    """Encoder as a backbone: the states after the stages that `config.out_features` names, as feature maps."""

    def __init__(self, config: KArAtViTConfig):
        super().__init__(config, add_pooling_layer=False)
        self.num_features = [config.hidden_size] * len(self.stage_names)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = True,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        """
        Encode images as feature maps.

        Args:
            pixel_values, attention_mask: as in `KArAtViTModel`.
            interpolate_pos_encoding: take images of any size.

        Returns:
            Per stage of `config.out_features` a feature map (B, hidden, patches along height, along width), or (B, N,
            hidden) with `reshape_hidden_states=False`; and what `output_*` asks for.
        """
        outputs = KArAtViTModel.forward(
            self,
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            return_dict=True,
            **kwargs,
        )
        maps = [outputs.hidden_states[self.stage_names.index(name)] for name in self.out_features]
        if self.config.apply_layernorm:
            maps = [self.layernorm(states) for states in maps]
        if self.config.reshape_hidden_states:
            grid = self.config.patch_grid(tuple(pixel_values.shape[2:]))
            maps = [_as_map(states, *grid) for states in maps]
        return BackboneOutput(
            feature_maps=tuple(maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def _as_map(states: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The states of the patches (B, N, hidden), [CLS] first, as a map (B, hidden, height, width)."""
    return states[:, 1:].mT.reshape(states.shape[0], -1, height, width)


@dataclass
class AttentionMasks:
    """
    Masks of one call.

    Args:
        keep: boolean, keys that KArAt heads see, (B, N), or per query (B, 1 or heads, N, N).
        softmax: the same as softmax heads take it; `None` with `eager`, which reads `keep`.
    """

    keep: torch.Tensor | None = None
    softmax: torch.Tensor | None = None

    @property
    def per_query(self) -> bool:
        return self.keep is not None and self.keep.dim() == 4

    def of_heads(self, heads: slice) -> "AttentionMasks":
        """Take the part of a mask per head that these heads see."""
        if self.keep is None or self.keep.dim() != 4 or self.keep.shape[1] == 1:
            return self
        return AttentionMasks(self.keep[:, heads], None if self.softmax is None else self.softmax[:, heads])

    def to(self, *args, **kwargs) -> "AttentionMasks":
        """Copy the masks to another device: accelerate hands them from block to block where a model is spread."""
        moved = (x if x is None else x.to(*args, **kwargs) for x in (self.keep, self.softmax))
        return AttentionMasks(*moved)


NO_MASKS = AttentionMasks()


def _attention_masks(attention_mask, hidden_states, heads: int, implementation: str) -> AttentionMasks | None:
    if attention_mask is None:
        return None
    batch, tokens = hidden_states.shape[:2]
    shape = tuple(attention_mask.shape)
    per_query = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2] in (1, tokens)
    if shape != (batch, tokens) and not (per_query and shape[3] == tokens):
        raise ValueError(
            f"`attention_mask` has shape {shape}, expected (batch, tokens) = ({batch}, {tokens}), with [CLS] first, or "
            f"({batch}, 1 or {heads} heads, {tokens}, {tokens})."
        )
    if attention_mask.dim() == 2:
        keep = attention_mask.to(device=hidden_states.device, dtype=torch.bool)
    elif attention_mask.is_floating_point():
        keep = attention_mask > torch.finfo(attention_mask.dtype).min / 2
    else:
        keep = attention_mask.bool()
    if keep.shape[1:3] == (1, 1):
        keep = keep[:, 0, 0].expand(batch, tokens)
    if implementation == "eager":
        return AttentionMasks(keep)
    name = _softmax_name(implementation)
    if keep.dim() == 4:
        if not torch.compiler.is_compiling():
            logger.warning_once("A mask per query cannot be factored: KArAt heads run 'eager' under it.")
        if name.startswith(("flash", "flex")):
            raise ValueError(f"A mask per query needs `attn_implementation='sdpa'` or 'eager', not {name!r}.")
        lowest = torch.finfo(hidden_states.dtype).min
        softmax = torch.zeros_like(keep, dtype=hidden_states.dtype).masked_fill(~keep, lowest)
    elif name == "sdpa" and torch._C._are_functorch_transforms_active():
        softmax = keep[:, None, None, :]  # Transformers would ask whether all are visible.
    else:
        # The implementation of this call, which may not be the configured one.
        config = SimpleNamespace(_attn_implementation=name)
        softmax = create_bidirectional_mask(config=config, inputs_embeds=hidden_states, attention_mask=keep)
    return AttentionMasks(keep, softmax)


def _softmax_name(implementation: str) -> str:
    return "sdpa" if implementation in KARAT_IMPLEMENTATIONS else implementation


def _join(parts):
    """Maps of KArAt and softmax heads side by side; `None` unless every part has one."""
    return None if any(part is None for part in parts) else torch.cat(parts, dim=1)


_HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def _check_config_type(config) -> None:
    if getattr(config, "model_type", None) != KArAtViTConfig.model_type:
        raise ValueError(
            f"The model needs a KArAtViTConfig, not a {type(config).__name__}. "
            "`KArAtViTConfig.from_dict(config.to_dict())` takes over a ViTConfig."
        )


def _check_same_structure(name, source: dict, wanted: dict) -> None:
    """A checkpoint cannot be loaded as another model than it was saved as."""
    if not wanted:
        return
    if source.get("model_type") != KArAtViTConfig.model_type:
        # A foreign backbone has no operator yet, so any may be asked for.
        wanted = {key: value for key, value in wanted.items() if key in source}
    stored = KArAtViTConfig.from_dict({**source})
    asked = KArAtViTConfig.from_dict({**source, **wanted})
    for key in wanted:
        have, want = getattr(stored, key), getattr(asked, key)
        sizes = key in ("image_size", "patch_size")
        same = height_and_width(have) == height_and_width(want) if sizes else have == want
        if not same:
            advice = (
                "Load it as it is, then call `model.resize(...)`."
                if key == "image_size"
                else "Load it as it is, or build a new model from a configuration of your own and train that."
            )
            raise ValueError(
                f"The checkpoint {name} has `{key}={have!r}`, and `{key}={want!r}` was asked for. {advice}"
            )


KArAtViTModel.register_for_auto_class("AutoModel")
KArAtViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
KArAtViTForMaskedImageModeling.register_for_auto_class("AutoModelForMaskedImageModeling")
KArAtViTBackbone.register_for_auto_class("AutoBackbone")

__all__ = [
    "KArAtViTBackbone",
    "KArAtViTForImageClassification",
    "KArAtViTForMaskedImageModeling",
    "KArAtViTModel",
    "KArAtViTPreTrainedModel",
]
