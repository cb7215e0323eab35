# SPDX-License-Identifier: Apache-2.0
"""Train and evaluate image classifiers with Kolmogorov-Arnold Attention; see `--help`."""

import gc
import sys

from image_classification.errors import run_command


def main() -> int:
    # Libraries make half a million objects that stay: to look through them again and again takes seconds.
    gc.disable()
    from image_classification.main import main

    gc.freeze()
    gc.enable()
    try:
        return main()
    finally:
        gc.unfreeze()  # Or extension modules take it for a leak, and say so.


if __name__ == "__main__":
    sys.exit(run_command("run_image_classification.py", main, debug="--debug" in sys.argv))
