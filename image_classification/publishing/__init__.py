# SPDX-License-Identifier: Apache-2.0
"""Pushing a run to the Hugging Face Hub while it trains."""
