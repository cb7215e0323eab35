# SPDX-License-Identifier: Apache-2.0
"""The loss surface around trained weights: its planes, its points, how sharp it is, and figures of it."""
