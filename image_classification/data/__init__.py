# SPDX-License-Identifier: Apache-2.0
"""Images and labels: where they come from, how they are decoded, transformed and drawn."""
