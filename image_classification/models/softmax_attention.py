# SPDX-License-Identifier: Apache-2.0
"""
`attn_implementation="sdpa_unmasked"`: Transformers' "sdpa" without a mask where there is nothing to mask.

Transformers 5.17 makes a mask of (B, 1, N, N), all True, under `torch.compile` and while a CUDA graph is recorded
(later versions under export only). With any mask PyTorch takes its memory-efficient kernel in place of flash attention,
and softmax's training step takes 1.7 times as long. Importing this module registers the name.
"""

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


UNMASKED = "sdpa_unmasked"


def unmasked(*, attention_mask=None, allow_is_bidirectional_skip=False, local_size=None, **options):
    """No mask where every query sees every key, also while tracing; else what "sdpa" makes of the same arguments."""
    if attention_mask is None and allow_is_bidirectional_skip and local_size is None:
        return None
    options |= {"allow_is_bidirectional_skip": allow_is_bidirectional_skip, "local_size": local_size}
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](attention_mask=attention_mask, **options)


ALL_ATTENTION_FUNCTIONS.register(UNMASKED, ALL_ATTENTION_FUNCTIONS["sdpa"])
ALL_MASK_ATTENTION_FUNCTIONS.register(UNMASKED, unmasked)
