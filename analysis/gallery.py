# SPDX-License-Identifier: Apache-2.0
"""
The pictures of the README: trains a small KArAt-ViT and its softmax twin on scikit-learn's handwritten digits (real
images, no download; some minutes on two CPU cores; a second call finds them trained), and makes every figure of them.
With --model, the figures of a checkpoint of yours instead.

The figures with their numbers lie in --work, the PNGs and a page that shows them (README.md) in --output.
"""

import argparse
import importlib
import shlex
from dataclasses import dataclass
from pathlib import Path

from image_classification.arguments import DEFAULT_RECIPE
from image_classification.errors import InputError
from image_classification.main import main as train

from .checkpoints import load_checkpoint, run_folder
from .output import Output


# 8 x 8 patches, so that there is something to see, and every checkpoint, for the figures over the run.
RECIPE = "--image_size 16 --patch_size 2 --num_train_epochs 30 --save_total_limit 0".split()
SOFTMAX = (
    "--model vit_tiny_patch16_224 --hidden_size 64 --num_hidden_layers 4 --num_attention_heads 4 "
    "--intermediate_size 256"
).split()


@dataclass
class Picture:
    """
    One command of the gallery.

    Args:
        name: of the picture in the gallery.
        command: its words; `MODEL` and `COMPARE` stand for the checkpoints.
        file: the figure that is shown, with `LAST` for the number of the last block.
        caption: what it shows.
        runs: whether it needs the checkpoints to be runs.
    """

    name: str
    command: str
    file: str
    caption: str
    runs: bool = False


PICTURES = (
    Picture(
        "functions",
        "functions --model MODEL --before start --edge 1 5",
        "functions_blockLAST",
        "The learned functions of the last block before and after training: mean and spread over all edges, the five "
        "strongest edges and one more, over the scores that occur (grey).",
        runs=True,
    ),
    Picture(
        "attention",
        "attention --model MODEL --compare COMPARE --num-images 4 --seed 1",
        "attention_summary",
        "What [CLS] sees in the last block, KArAt beside softmax: the dominant head, the patches that hold 60 % of "
        "what it is positive about, the head that is strongest at each patch, and attention rollout over all blocks.",
    ),
    Picture(
        "heads",
        "attention --model MODEL --compare COMPARE --num-images 4 --seed 1",
        "attention_heads_0",
        "Every head of the last block, the scores (before) and the activated map (after): red is positive, blue "
        "negative. KArAt's maps are signed, softmax's are not.",
    ),
    Picture(
        "spectrum",
        "spectrum --model MODEL --compare COMPARE",
        "spectrum_blockLAST",
        "Singular values of the attention matrices before and after the activation, mean and range over heads and "
        "images: KArAt's rank ends at r. Right: the effective rank of every block.",
    ),
    Picture(
        "faithfulness",
        "faithfulness --model MODEL --compare COMPARE --num-images 100 --batch-size 50",
        "faithfulness",
        "What the maps are worth: the probability of the predicted class while patches vanish, the map's strongest "
        "first, and while they appear in the blurred image; bands are 95 % intervals of the mean over the images. A "
        "map is good where it is well below (deletion) or above (insertion) the random one.",
    ),
    Picture(
        "landscape",
        "landscape --model MODEL --compare COMPARE --grid 31 --num-images 128 --log",
        "landscape",
        "The held-out loss over the two principal directions of each run, with its path from the start to the trained "
        "weights (star). The epsilon-sharpness is the highest rise within the dashed square.",
        runs=True,
    ),
    Picture(
        "landscape_3d",
        "landscape --model MODEL --compare COMPARE --grid 31 --num-images 128 --log",
        "landscape_3d",
        "The same surfaces in three dimensions.",
        runs=True,
    ),
    Picture(
        "weights",
        "weights --model MODEL",
        "weights",
        "Distributions of the weights over the run: the higher harmonics, which start small, grow most.",
        runs=True,
    ),
    Picture(
        "curves",
        "curves --model MODEL COMPARE --names KArAt softmax",
        "curves",
        "Loss and accuracy of both runs, under the same recipe.",
        runs=True,
    ),
    Picture(
        "compare",
        "compare --model MODEL COMPARE --names KArAt softmax",
        "compare",
        "The two models side by side. FLOPs are the paper's count, MACs and operations PyTorch's; memory and speed "
        "were measured on the machine that made the picture.",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR_OR_REPO", help="a KArAt checkpoint (default: trained on digits)")
    parser.add_argument("--compare", metavar="DIR_OR_REPO", help="its softmax counterpart; goes with --model")
    parser.add_argument("--images", nargs="+", metavar="PATH", help="images for checkpoints that are no runs")
    parser.add_argument(
        "--work",
        default="outputs/gallery",
        metavar="DIR",
        help="folder for the trained models and for the figures with their numbers (default: outputs/gallery)",
    )
    parser.add_argument(
        "--output", default="docs/gallery", metavar="DIR", help="folder for the pictures (default: docs/gallery)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace pictures and figures that are there already")


def run(args: argparse.Namespace) -> None:
    if (args.model is None) != (args.compare is None):
        raise InputError("`--model` and `--compare` go together: the gallery shows a KArAt model beside a softmax one.")
    are_runs = args.model is None or None not in (run_folder(args.model), run_folder(args.compare))
    pictures = [picture for picture in PICTURES if are_runs or not picture.runs]
    output = Output(args.output, [*(f"{picture.name}.png" for picture in pictures), "README.md"], args.overwrite)
    figures = Path(args.work) / "figures"
    if figures.exists() and not args.overwrite:
        raise InputError(f"{figures} is there already. Choose another folder with --work, or give --overwrite.")
    model, compare = (args.model, args.compare) if args.model else train_digits(Path(args.work))
    last = str(load_checkpoint(model).blocks - 1)
    load_checkpoint(compare, "--compare")
    for command in dict.fromkeys(picture.command for picture in pictures):
        words = [{"MODEL": model, "COMPARE": compare}.get(word, word) for word in command.split()]
        if args.images and words[0] in ("functions", "attention", "spectrum", "faithfulness"):
            words += ["--images", *args.images]
        words += ["--output", str(figures)] + (["--overwrite"] if args.overwrite else [])
        print(f"python -m analysis {shlex.join(words)}")
        module = importlib.import_module(f".{words[0]}", __package__)
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        module.run(parser.parse_args(words[1:]))
    for picture in pictures:
        output.copy(figures / f"{picture.file.replace('LAST', last)}.png", f"{picture.name}.png")
    output.text("README.md", page(pictures))
    output.report()
    left_out = [picture.name for picture in PICTURES if picture not in pictures]
    if left_out:
        print(f"Left out, since they need folders of runs: {', '.join(left_out)}.")


def train_digits(work: Path) -> tuple[str, str]:
    """Train the KArAt model and its softmax twin under one recipe, or find them trained. Returns their folders."""
    folders = []
    for name, flags in (("karat", []), ("softmax", SOFTMAX)):
        folder = str(work / name)
        if train([str(DEFAULT_RECIPE), *flags, *RECIPE, "--output_dir", folder]) != 0:
            raise InputError(f"The training of {folder} failed: see above.")
        folders.append(folder)
    return tuple(folders)


def page(pictures: list[Picture]) -> str:
    """The page that shows the pictures, in Markdown."""
    parts = [
        "<!-- SPDX-License-Identifier: Apache-2.0. Made by `python -m analysis gallery`. -->",
        "# Gallery",
        "Made by `make gallery`. Each picture for checkpoints of yours: the command beneath it.",
    ]
    for picture in pictures:
        command = f"python -m analysis {picture.command}"
        parts += [f"![{picture.name}]({picture.name}.png)", picture.caption, f"```bash\n{command}\n```"]
    return "\n\n".join(parts) + "\n"
