# SPDX-License-Identifier: Apache-2.0
"""Train and evaluate image classifiers with Kolmogorov-Arnold Attention; see `--help`."""

import sys

from image_classification.errors import run_command


def main() -> int:
    from image_classification.main import main

    return main()


if __name__ == "__main__":
    sys.exit(run_command("run_image_classification.py", main, debug="--debug" in sys.argv))
