# SPDX-License-Identifier: Apache-2.0
"""Train and evaluate image classifiers with Kolmogorov-Arnold Attention; see `--help`."""

import sys

from image_classification.main import main


if __name__ == "__main__":
    sys.exit(main())
