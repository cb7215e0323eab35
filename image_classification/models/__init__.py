# SPDX-License-Identifier: Apache-2.0
"""Models: built from settings, loaded from checkpoints, taught by another's attention."""
