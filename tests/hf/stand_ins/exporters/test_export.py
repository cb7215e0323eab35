# SPDX-License-Identifier: Apache-2.0
"""
Stand-in for a module that the source distribution lacks.

Untested for it: Transformers' exporters (torch.export, ONNX, ExecuTorch) by their own tests;
tests/modeling_karat_vit/test_export.py exports our models.
"""


class ExportTesterMixin:
    """Has no tests."""
