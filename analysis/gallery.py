# SPDX-License-Identifier: Apache-2.0
"""
The pictures of the documentation: trains a KArAt-ViT and its softmax twin under one recipe, and makes every figure of
them. A second call finds them trained.

  --data-set digits     a small model on scikit-learn's handwritten digits, which need no download: some minutes on two
                        CPU cores
  --data-set CIFAR10    ViT-Tiny at 224x224 on CIFAR-10, from the Hub or from --data-path: for a GPU

With --model and --compare, the figures of checkpoints of yours instead. The figures with their numbers lie in --work,
the PNGs and a page that shows them (README.md) in --output.
"""

import argparse
import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from image_classification.errors import InputError
from image_classification.main import main as train
from image_classification.models.building import describe_model
from image_classification.paths import CONFIGURATION
from image_classification.reports.curves import history

from . import style
from .__main__ import analyse
from .compare import accuracy
from .models import Checkpoint, load_checkpoint, read_state, run_folder
from .output import Output


# Data sets with a recipe for both models, configuration/gallery/NAME_karat.yaml and NAME_softmax.yaml.
DATA_SETS = {"digits": "digits", "CIFAR10": "cifar10"}
# How many images and points are worth waiting for on a CPU: ViT-Tiny costs a hundred times the digits' models.
FAITHFULNESS = {"digits": "--num-images 100 --batch-size 50", "cifar10": "--num-images 40 --steps 10"}
LANDSCAPE = {
    "digits": "--grid 25 --num-images 128 --batch-size 64",
    "cifar10": "--grid 13 --num-images 32 --batch-size 32 --no-hessian",
}


@dataclass
class Picture:
    """
    A picture of the gallery and the command that makes it.

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
        "faithfulness --model MODEL --compare COMPARE FAITHFULNESS",
        "faithfulness",
        "What the maps are worth: the probability of the predicted class while patches vanish, the map's strongest "
        "first, and while they appear in the blurred image; bands are 95 % intervals of the mean over the images. A "
        "map is good where it is well below (deletion) or above (insertion) the random one.",
    ),
    Picture(
        "weights",
        "weights --model MODEL",
        "weights",
        "Distributions of the weights over the run: all, the coefficients of each harmonic, and the projector.",
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
    Picture(
        "landscape",
        "landscape --model MODEL --compare COMPARE LANDSCAPE --log",
        "landscape",
        "The held-out loss over the two principal directions of each run, with its path from the start to the trained "
        "weights (star). The epsilon-sharpness is the highest rise within the dashed square.",
        runs=True,
    ),
    Picture(
        "landscape_3d",
        "landscape --model MODEL --compare COMPARE LANDSCAPE --log",
        "landscape_3d",
        "The same surfaces in three dimensions.",
        runs=True,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-set",
        choices=DATA_SETS,
        default="digits",
        help="train on this, by configuration/gallery/*.yaml (default: digits)",
    )
    parser.add_argument(
        "--data-path", metavar="DIR", help="where the data set lies, as run_image_classification.py takes it"
    )
    parser.add_argument("--model", metavar="DIR_OR_REPO", help="a KArAt checkpoint, in place of one trained here")
    parser.add_argument("--compare", metavar="DIR_OR_REPO", help="its softmax counterpart; goes with --model")
    parser.add_argument("--images", nargs="+", metavar="PATH", help="images for checkpoints that are no runs")
    parser.add_argument("--note", metavar="TEXT", help="a sentence for the page, such as which images these are")
    parser.add_argument(
        "--work",
        metavar="DIR",
        help="folder for the trained models and for the figures with their numbers (default: outputs/gallery/DATA)",
    )
    parser.add_argument("--output", metavar="DIR", help="folder for the pictures (default: docs/gallery/DATA)")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures and figures that are there already")


def run(args: argparse.Namespace) -> None:
    if (args.model is None) != (args.compare is None):
        raise InputError("`--model` and `--compare` go together: the gallery shows a KArAt model beside a softmax one.")
    if args.model is not None and args.data_path is not None:
        raise InputError("`--data-path` is for training, and --model is trained: leave one of them out.")
    name = DATA_SETS[args.data_set]
    work = Path(args.work or f"outputs/gallery/{name}")
    are_runs = args.model is None or None not in (run_folder(args.model), run_folder(args.compare))
    pictures = [picture for picture in pictures_of(name) if are_runs or not picture.runs]
    files = [*(f"{picture.name}.png" for picture in pictures), "README.md"]
    output = Output(args.output or f"docs/gallery/{name}", files, args.overwrite)
    figures = work / "figures"
    if figures.exists() and not args.overwrite:
        raise InputError(f"{figures} is there already. Choose another folder with --work, or give --overwrite.")
    model, compare = (args.model, args.compare) if args.model else train_both(name, work, args.data_path)
    checkpoints = [load_checkpoint(model), load_checkpoint(compare, "--compare")]
    last = str(checkpoints[0].blocks - 1)
    for command in dict.fromkeys(picture.command for picture in pictures):
        words = [{"MODEL": model, "COMPARE": compare}.get(word, word) for word in command.split()]
        if args.images and words[0] in ("functions", "attention", "spectrum", "faithfulness"):
            words += ["--images", *args.images]
        words += ["--output", str(figures)] + (["--overwrite"] if args.overwrite else [])
        print(f"python -m analysis {shlex.join(words)}")
        analyse(words[0], words[1:])
    for picture in pictures:
        output.copy(figures / f"{picture.file.replace('LAST', last)}.png", f"{picture.name}.png")
    output.text("README.md", page(pictures, [describe_checkpoint(checkpoint) for checkpoint in checkpoints], args.note))
    output.report()
    left_out = [picture.name for picture in PICTURES if picture.runs and not are_runs]
    if left_out:
        print(f"Left out, since they need folders of runs: {', '.join(left_out)}.")


def pictures_of(name: str) -> list[Picture]:
    """List `PICTURES` with what is worth waiting for with a data set, by its name in recipes."""
    scale = {"FAITHFULNESS": FAITHFULNESS[name], "LANDSCAPE": LANDSCAPE[name]}
    return [
        dataclasses.replace(picture, command=" ".join(scale.get(word, word) for word in picture.command.split()))
        for picture in PICTURES
    ]


def train_both(name: str, work: Path, data_path: str | None = None) -> tuple[str, str]:
    """Train the KArAt model and its softmax twin under one recipe, or find them trained. Returns their folders."""
    folders = str(work / "karat"), str(work / "softmax")
    for kind, folder in zip(("karat", "softmax"), folders):
        words = [str(CONFIGURATION / "gallery" / f"{name}_{kind}.yaml"), "--output_dir", folder]
        words += ["--data_path", data_path] if data_path else []
        words += ["--bf16"] if torch.cuda.is_available() else []
        if train(words) != 0:
            raise InputError(f"The training of {folder} failed: see above.")
    return folders


def describe_checkpoint(checkpoint: Checkpoint) -> str:
    """Describe a model in one line: what it is, and for that of a run how it was trained and how good it is."""
    text = f"{style.KIND_NAMES[checkpoint.kind]}: {describe_model(checkpoint.model)}"
    if checkpoint.run is not None:
        settings, finished = checkpoint.run["settings"], checkpoint.run.get("finished") or {}
        data = settings["data_set"] or settings["dataset_name"] or Path(settings["data_path"]).name
        epochs = f"{settings['num_train_epochs']:g} epochs of {data}"
        if finished:
            right, images = accuracy(checkpoint.source).get("accuracy"), f"{finished['eval_images']:,} "
        else:  # stopped, perhaps in the middle of an epoch
            state = read_state(Path(checkpoint.source))
            epochs = f"{state['epoch']:.1f} of {epochs}"
            right, images = history(state["log_history"])[-1]["eval_accuracy"], ""
        text += f"; {epochs}" + ("" if right is None else f", {100 * right:.1f} % of {images}held-out images right")
    return f"{text}."


def page(pictures: list[Picture], described: list[str], note: str | None = None) -> str:
    """Write the page that shows the pictures, in Markdown."""
    parts = [
        "<!-- SPDX-License-Identifier: Apache-2.0. Made by `python -m analysis gallery`. -->",
        "# Gallery",
        "The figures of two models, trained alike but for their attention:",
        "\n".join(f"* {line}" for line in described),
        *([note] if note else []),
        "For checkpoints of yours, each by the command beneath it.",
    ]
    for picture in pictures:
        command = f"python -m analysis {picture.command}"
        parts += [f"![{picture.name}]({picture.name}.png)", picture.caption, f"```bash\n{command}\n```"]
    return "\n\n".join(parts) + "\n"
