# SPDX-License-Identifier: Apache-2.0
"""Command `python -m analysis WHAT ...`: finds the module of that name, reads its flags and runs it."""

import argparse
import importlib
import sys

from image_classification.errors import did_you_mean, run_command
from image_classification.flags import Parser


# A module each, or a package with a module `command`, whose docstring is the command's description.
COMMANDS = {
    "functions": "the learned functions phi_pq, over the scores that really occur",
    "attention": "attention maps, signed, of any block, head and query; regions, dominant head, rollout",
    "spectrum": "singular values of the attention matrices before and after the activation; effective rank",
    "landscape": "the loss surface around the trained weights, with the path of training; sharpness",
    "weights": "distributions of the weights over the checkpoints of a run",
    "curves": "loss and accuracy of several runs together",
    "compare": "a table of models: parameters, FLOPs, memory, speed, accuracy",
    "faithfulness": "what the maps are worth: deletion, insertion, pointing game and IoU, beside random maps",
    "demo": "a page in the browser: guesses, attention and learned functions of any image that you drop in",
    "gallery": "all of them for a KArAt model and its softmax twin, which it trains: the documentation's pictures",
}

_USAGE = """\
usage: python -m analysis WHAT [flags]

See what attention learned, for any KArAt-ViT or softmax ViT checkpoint: a figure as PNG and SVG, and its numbers as
CSV or NPZ.

{commands}

`python -m analysis WHAT --help` lists the flags. For example:
  python -m analysis functions --model outputs/digits --before start
  python -m analysis attention --model outputs/mine --compare outputs/softmax --images photo.jpg
"""


def main(argv: list[str] | None = None) -> int:
    """
    Run the command that the words name.

    Args:
        argv: the words after `python -m analysis`; default the process's.

    Returns:
        The exit status: 0, or 2 where the input cannot be used, 1 after a failure that nobody foresaw, 130 after
        Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<12} {text}" for name, text in COMMANDS.items()]
        print(_USAGE.format(commands="\n".join(lines)), end="")
        return 0
    what, *flags = argv
    if what not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"python -m analysis: error: no {what!r} here{did_you_mean(what, COMMANDS)}: {known}", file=sys.stderr)
        return 2
    return run_command(f"python -m analysis {what}", lambda: analyse(what, flags), debug="--debug" in flags)


def analyse(what: str, flags: list[str]) -> None:
    """Run a command with its flags."""
    # Only this one, and only now: `--help` need not wait for PyTorch.
    module = importlib.import_module(f".{what}", "analysis")
    if hasattr(module, "__path__"):
        module = importlib.import_module(".command", module.__name__)
    parser = Parser(
        prog=f"python -m analysis {what}",
        description=(module.__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    module.run(parser.parse_args(flags))


if __name__ == "__main__":
    sys.exit(main())
