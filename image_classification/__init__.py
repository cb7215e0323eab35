# SPDX-License-Identifier: Apache-2.0
"""What `run_image_classification.py` is made of: settings, data, models, training, runs, reports."""
