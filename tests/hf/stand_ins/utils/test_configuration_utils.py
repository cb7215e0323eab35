# SPDX-License-Identifier: Apache-2.0
"""
Stand-in for a module that the source distribution lacks: values other than the defaults for what every configuration
takes. Untested for it: nothing that a model without text has.
"""

config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}
