# SPDX-License-Identifier: Apache-2.0
"""
Stand-in for a module that the source distribution lacks: what `PipelineTesterMixin` runs with each model and processor.
Untested for it: images from addresses, and the checks with models of the Hub that do not use the mixin.
"""

import unittest

from huggingface_hub import ImageClassificationOutputElement
from PIL import Image
from transformers import pipeline


class ImageClassificationPipelineTests(unittest.TestCase):
    def get_test_pipeline(
        self, model, tokenizer=None, image_processor=None, feature_extractor=None, processor=None, dtype="float32"
    ):
        classifier = pipeline(
            "image-classification",
            model=model,
            tokenizer=tokenizer,
            feature_extractor=feature_extractor,
            image_processor=image_processor,
            dtype=dtype,
            top_k=2,
        )
        picture = Image.radial_gradient("L")
        return classifier, [picture.convert(mode) for mode in ("RGB", "L", "LA", "P", "RGBA")]

    def run_pipeline_test(self, classifier, examples):
        self.check(classifier(examples[0]))
        many = classifier(examples, batch_size=2)
        self.assertEqual(len(many), len(examples))
        for output in many:
            self.check(output)
        (one,) = classifier([examples[0]], top_k=1)
        self.assertEqual(len(one), 1)

    def check(self, output):
        self.assertEqual(len(output), 2)
        names = set(ImageClassificationOutputElement.__dataclass_fields__)
        for element in output:
            self.assertEqual(set(element), names)
            self.assertIsInstance(element["score"], float)
            self.assertIsInstance(element["label"], str)
