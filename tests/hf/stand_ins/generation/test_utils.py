# SPDX-License-Identifier: Apache-2.0
"""Stand-in for a module that the source distribution lacks. Untested for it: nothing, image models do not generate."""


class GenerationTesterMixin:
    """Has no tests."""
