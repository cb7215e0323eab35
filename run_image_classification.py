# SPDX-License-Identifier: Apache-2.0
"""Train and evaluate image classifiers with Kolmogorov-Arnold Attention; see `--help`."""

import sys


if __name__ == "__main__":
    # Not above: data workers that are not forked read this file, too, and need little of that.
    from image_classification.main import main

    sys.exit(main())
