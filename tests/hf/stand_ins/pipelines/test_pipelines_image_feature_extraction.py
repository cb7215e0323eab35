# SPDX-License-Identifier: Apache-2.0
"""
Stand-in for a module that the source distribution lacks: what `PipelineTesterMixin` runs with each model and processor.
Untested for it: images from addresses, and the checks with models of the Hub that do not use the mixin.
"""

import unittest

from PIL import Image
from transformers import pipeline


class ImageFeatureExtractionPipelineTests(unittest.TestCase):
    def get_test_pipeline(
        self, model, tokenizer=None, image_processor=None, feature_extractor=None, processor=None, dtype="float32"
    ):
        extractor = pipeline(
            "image-feature-extraction",
            model=model,
            tokenizer=tokenizer,
            feature_extractor=feature_extractor,
            image_processor=image_processor,
            dtype=dtype,
        )
        picture = Image.radial_gradient("L")
        return extractor, [picture.convert("RGB"), picture.convert("RGBA")]

    def run_pipeline_test(self, extractor, examples):
        config = extractor.model.config
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        for states in (extractor(examples[0]), *extractor(examples, batch_size=2)):
            self.assertEqual([len(states), len(states[0])], [1, tokens])
