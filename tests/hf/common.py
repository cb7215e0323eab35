# SPDX-License-Identifier: Apache-2.0
"""
Transformers' own common tests, with a tiny model of every family and ViT beside them as a control.

`make test-hf` runs this file; pytest does not collect it by its name, because tests/hf/fetch.py has to have fetched the
tests before. What the source distribution lacks is in stand_ins/, where each file says what it leaves untested.
"""

import contextlib
import importlib
import json
import re
import sys
import tempfile
import types
import unittest
from pathlib import Path
from unittest import mock

import torch
import transformers
from transformers import (
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTImageProcessorPil,
    ViTModel,
)
from transformers.models.auto import modeling_auto

from modeling_karat_vit import (
    KArAtViTBackbone,
    KArAtViTConfig,
    KArAtViTForImageClassification,
    KArAtViTForMaskedImageModeling,
    KArAtViTModel,
    KArAtViTPreTrainedModel,
)


FETCHED = Path(sys.prefix) / "transformers-tests" / transformers.__version__
STAND_INS = Path(__file__).with_name("stand_ins")
PACKAGE = "transformers_tests"
MODELS = tempfile.TemporaryDirectory(prefix="karat-vit-tiny-models-")  # Gone with the process.

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 12,
    "patch_size": 4,
    "encoder_stride": 4,
    "num_labels": 3,
}
# Every basis, every variant of the operator, every kind of sharing and placement once.
FAMILIES = {
    "Fourier": {},
    "Spline": {"basis_type": "spline", "modular_mode": "w1_phi2", "sharing": "universal"},
    "Wavelet": {"basis_type": "wavelet", "modular_mode": None, "karat_depth": 3},
    "Rational": {"basis_type": "rational", "project_l1": True, "num_karat_heads": 1, "karat_layers": [1]},
    "FullRank": {"modular_mode": None, "karat_depth": 1, "base_fn": "silu"},
}


def import_transformers_tests() -> tuple:
    """The modules of the common tests for models, configurations, backbones and pipelines."""
    if not FETCHED.is_dir():
        raise FileNotFoundError(f"{FETCHED} is missing: `make test-hf` fetches Transformers' tests and runs this file.")
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(FETCHED), str(STAND_INS)]
    sys.modules[PACKAGE] = package
    # Up to 5.17 the pipelines' mixin imports the tests of every task.
    pipelines = importlib.import_module(f"{PACKAGE}.pipelines")
    source = (FETCHED / "test_pipeline_mixin.py").read_text()
    for name, cls in re.findall(r"^from \.pipelines\.(\w+) import (\w+)", source, re.MULTILINE):
        if not (STAND_INS / "pipelines" / f"{name}.py").exists():
            module = types.ModuleType(f"{pipelines.__name__}.{name}")
            setattr(module, cls, None)
            sys.modules[module.__name__] = module
    with (
        # They would load the source beside them once more, in place of what is installed.
        mock.patch.object(transformers.utils, "direct_transformers_import", lambda path: transformers),
        mock.patch.dict("os.environ", TRANSFORMERS_TINY_MODEL_PATH=MODELS.name),
    ):
        names = ("test_modeling_common", "test_configuration_common", "test_backbone_common", "test_pipeline_mixin")
        return tuple(importlib.import_module(f"{PACKAGE}.{name}") for name in names)


def write_summary() -> None:
    """The list of tiny models on the Hub that the pipelines' mixin reads; here they lie in a folder."""
    summary = {"tokenizer_classes": [], "processor_classes": ["ViTImageProcessorPil"]}
    classes = (KArAtViTForImageClassification, KArAtViTModel, ViTForImageClassification, ViTModel)
    path = Path(MODELS.name) / "reports" / "tiny_model_summary.json"
    path.parent.mkdir()
    path.write_text(json.dumps({cls.__name__: summary for cls in classes}))


# Some tests write every parameter into a message that nobody reads.
torch.set_printoptions(threshold=0, edgeitems=1)
write_summary()
modeling_tests, configuration_tests, backbone_tests, pipeline_tests = import_transformers_tests()
# The mixins look up in these lists which classes take which labels.
modeling_auto.MODEL_MAPPING_NAMES["karat_vit"] = "KArAtViTModel"
modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES["karat_vit"] = "KArAtViTBackbone"
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["karat_vit"] = "KArAtViTForImageClassification"
modeling_auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES["karat_vit"] = "KArAtViTForMaskedImageModeling"
for _task in pipeline_tests.pipeline_test_mapping.values():
    if isinstance(_task["test"], str):
        _task["test"] = _task["test"].replace("tests.", f"{PACKAGE}.", 1)


class TinyModels:
    """What the mixins ask for configurations and inputs."""

    batch_size = 2
    image_size, patch_size = TINY["image_size"], TINY["patch_size"]
    num_hidden_layers, num_attention_heads = TINY["num_hidden_layers"], TINY["num_attention_heads"]
    hidden_size = TINY["hidden_size"]
    seq_length = (image_size // patch_size) ** 2 + 1
    mask_length, num_masks = seq_length - 1, 4
    is_training = True

    def __init__(self, config_class, fields: dict):
        self.config_class, self.fields = config_class, fields

    def get_config(self):
        return self.config_class(**TINY, **self.fields)

    def prepare_config_and_inputs_for_common(self):
        pixels = modeling_tests.floats_tensor([self.batch_size, 3, self.image_size, self.image_size])
        return self.get_config(), {"pixel_values": pixels}


class CommonTests(modeling_tests.ModelTesterMixin, pipeline_tests.PipelineTesterMixin):
    """The common tests for image models; every case below is a test class of its own."""

    test_resize_embeddings = False  # There are no token embeddings.
    config_class = ViTConfig
    fields: dict = {}
    all_model_classes = (ViTModel, ViTForImageClassification, ViTForMaskedImageModeling)
    pipeline_model_mapping = {"image-classification": ViTForImageClassification, "image-feature-extraction": ViTModel}

    def setUp(self):
        self.model_tester = TinyModels(self.config_class, self.fields)
        self.config_tester = configuration_tests.ConfigTester(
            self, config_class=self.config_class, has_text_modality=False, **TINY_OF_CONFIGURATIONS, **self.fields
        )

    def subTest(self, *args, **kwargs):
        # One for each parameter: to report them takes pytest most of the time. The first that fails fails the test.
        return contextlib.nullcontext()

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self):
        # As in ViT's own tests: patches are embedded by a convolution, not by an `nn.Embedding`.
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), torch.nn.Module)
            self.assertIsNone(model.get_output_embeddings())

    def run_pipeline_test(self, task, repo_name, model_architecture, **kwargs):
        name = type(self).__name__
        name = f"{name}-{model_architecture.__name__}"
        folder = Path(MODELS.name) / model_architecture.config_class.model_type / name
        if not folder.exists():
            model_architecture(self.model_tester.get_config()).save_pretrained(folder)
            size = {"height": self.model_tester.image_size, "width": self.model_tester.image_size}
            ViTImageProcessorPil(size=size, do_convert_rgb=True).save_pretrained(folder)
        super().run_pipeline_test(task, name, model_architecture, **kwargs)


# The other pipelines are not for these models.
for _name in dir(pipeline_tests.PipelineTesterMixin):
    ours = _name.startswith(("test_pipeline_image_classification", "test_pipeline_image_feature_extraction"))
    if _name.startswith("test_pipeline_") and not ours:
        setattr(CommonTests, _name, None)


class KArAtTests(CommonTests):
    config_class = KArAtViTConfig
    all_model_classes = (
        KArAtViTModel,
        KArAtViTForImageClassification,
        KArAtViTForMaskedImageModeling,
        KArAtViTBackbone,
    )
    pipeline_model_mapping = {
        "image-classification": KArAtViTForImageClassification,
        "image-feature-extraction": KArAtViTModel,
    }

    def test_sdpa_can_dispatch_non_composite_models(self):
        # The test takes "sdpa" for the default; ours is the fastest way for KArAt heads (test_modeling.py).
        choose = KArAtViTPreTrainedModel.get_correct_attn_implementation

        def sdpa_by_default(model, requested, *args, **kwargs):
            return choose(model, requested or "sdpa", *args, **kwargs)

        with mock.patch.object(KArAtViTPreTrainedModel, "get_correct_attn_implementation", sdpa_by_default):
            super().test_sdpa_can_dispatch_non_composite_models()

    def test_reverse_loading_mapping(self):
        # The test takes the old names for what `save_pretrained` writes; ours writes the present ones, with which
        # Trainer can resume (test_checkpoints.py), and the old ones on demand.
        with mock.patch.object(KArAtViTPreTrainedModel, "save_pretrained", PreTrainedModel.save_pretrained):
            super().test_reverse_loading_mapping()


TINY_OF_CONFIGURATIONS = {name: value for name, value in TINY.items() if name != "num_labels"}


class TestViT(CommonTests, unittest.TestCase):
    """The control."""


class TestBackbone(backbone_tests.BackboneTesterMixin, unittest.TestCase):
    config_class = KArAtViTConfig
    all_model_classes = (KArAtViTBackbone,)

    def setUp(self):
        self.model_tester = TinyModels(KArAtViTConfig, {"out_features": ["stem", "stage2"]})


for _name, _fields in FAMILIES.items():
    globals()[f"Test{_name}"] = type(f"Test{_name}", (KArAtTests, unittest.TestCase), {"fields": _fields})
