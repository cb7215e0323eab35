# SPDX-License-Identifier: Apache-2.0
"""Settings of a run: what there is, how it is read, and how the official command line spells it."""
