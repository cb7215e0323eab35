# SPDX-License-Identifier: Apache-2.0
"""One dialect of flags for every command: `--batch-size` and `--batch_size` are the same."""

import argparse
import sys


class Parser(argparse.ArgumentParser):
    """A parser whose flags are declared with `-` and may be written with `_`, but never cut short."""

    def __init__(self, **how):
        super().__init__(**{"allow_abbrev": False, **how})

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(_with_dashes, words[:end]), *words[end:]], namespace)


def _with_dashes(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word
