# SPDX-License-Identifier: Apache-2.0
"""The input pipeline on the device: images in its memory, augmented there."""
