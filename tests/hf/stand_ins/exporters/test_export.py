# SPDX-License-Identifier: Apache-2.0
"""
Stand-in for a module that the source distribution lacks.

Untested for it: Transformers' exporters (torch.export, ONNX, ExecuTorch) by their own tests;
tests/system/test_compile_and_export.py exports our models.
"""


class ExportTesterMixin:
    """Has no tests."""
