# SPDX-License-Identifier: Apache-2.0
"""
The pictures of the documentation: trains a KArAt-ViT and its softmax twin under one recipe, and makes every figure of
them. A second call finds them trained.

  --data-set digits     a small model on scikit-learn's handwritten digits, which need no download: some minutes on two
                        CPU cores
  --data-set CIFAR10    ViT-Tiny at 224x224 on CIFAR-10, from the Hub or from --data-path: for a GPU

With --model and --compare, the figures of checkpoints of yours instead, of images of their data set, which --data-path
finds again where the runs are from another machine. The figures with their numbers lie in --work, the PNGs and a page
that shows them (README.md) in --output.
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
from .landscape.command import ENOUGH, moments_until
from .models import Checkpoint, load_checkpoint, load_start, read_state, run_folder
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
        needs: what of the runs it needs, see `at_hand`. Of pictures of one name the first that has it is taken.
    """

    name: str
    command: str
    file: str
    caption: str
    needs: str = ""


PICTURES = (
    Picture(
        "functions",
        "functions --model MODEL --before start --edge 1 5",
        "functions_blockLAST",
        "The learned functions of the last block before and after training: mean and spread over all edges, the five "
        "strongest edges and one more, over the scores that occur (grey).",
        needs="start",
    ),
    Picture(
        "functions",
        "functions --model MODEL --edge 1 5",
        "functions_blockLAST",
        "The learned functions of the last block: mean and spread over all edges, the five strongest edges and one "
        "more, over the scores that occur (grey).",
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
        needs="checkpoints",
    ),
    Picture(
        "curves",
        "curves --model MODEL COMPARE --names KArAt softmax",
        "curves",
        "Loss and accuracy of both runs, under the same recipe.",
        needs="run",
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
        needs="paths",
    ),
    Picture(
        "landscape",
        "landscape --model MODEL --compare COMPARE LANDSCAPE --log",
        "landscape",
        "The held-out loss over two random directions from the trained weights (star), normalised filter by filter. "
        "The epsilon-sharpness is the highest rise within the dashed square.",
        needs="run",
    ),
    Picture(
        "landscape_3d",
        "landscape --model MODEL --compare COMPARE LANDSCAPE --log",
        "landscape_3d",
        "The same surfaces in three dimensions.",
        needs="run",
    ),
)

ALL = {picture.needs for picture in PICTURES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-set",
        choices=DATA_SETS,
        default="digits",
        help="train on this, by configuration/gallery/*.yaml (default: digits)",
    )
    parser.add_argument(
        "--data-path",
        metavar="DIR",
        help="where the data set lies, as run_image_classification.py takes it (for --model: as run.json says)",
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
    name = DATA_SETS[args.data_set]
    work = Path(args.work or f"outputs/gallery/{name}")
    pictures = pictures_of(name, ALL if args.model is None else at_hand(args.model, args.compare))
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
        if words[0] in ("functions", "attention", "spectrum", "faithfulness", "landscape"):
            words += ["--images", *args.images] if args.images else []
            words += ["--data-set", args.data_path] if args.model and args.data_path else []
        words += ["--output", str(figures)] + (["--overwrite"] if args.overwrite else [])
        print(f"python -m analysis {shlex.join(words)}")
        analyse(words[0], words[1:])
    for picture in pictures:
        output.copy(figures / f"{picture.file.replace('LAST', last)}.png", f"{picture.name}.png")
    output.text("README.md", page(pictures, [describe_checkpoint(checkpoint) for checkpoint in checkpoints], args.note))
    output.report()
    left_out = {picture.name for picture in PICTURES} - {picture.name for picture in pictures}
    if left_out:
        print(f"Left out, since the runs did not keep what they need: {', '.join(sorted(left_out))}.")


def at_hand(model: str, compare: str) -> set[str]:
    """
    List what pictures may need of two checkpoints beside their weights: `"run"`, that both are of runs; and where they
    are, the `"start"` of the first, its `"checkpoints"`, and `"paths"`, that both kept as many as a landscape draws.
    """
    found = {""}
    if None not in (run_folder(model), run_folder(compare)):
        found.add("run")
        kept = [sum(moment.folder is not None for moment in moments_until(source)) for source in (model, compare)]
        try:
            load_start(model)
            found |= {"start"} | ({"checkpoints"} if kept[0] else set()) | ({"paths"} if min(kept) >= ENOUGH else set())
        except InputError as error:
            print(f"Without its start: {error}")
    return found


def pictures_of(name: str, has: set[str]) -> list[Picture]:
    """
    List the pictures that can be made, with what is worth waiting for with a data set.

    Args:
        name: of the data set, in recipes.
        has: of what pictures need.
    """
    scale = {"FAITHFULNESS": FAITHFULNESS[name], "LANDSCAPE": LANDSCAPE[name]}
    chosen: dict[str, Picture] = {}
    for picture in PICTURES:
        if picture.needs in has:
            command = " ".join(scale.get(word, word) for word in picture.command.split())
            chosen.setdefault(picture.name, dataclasses.replace(picture, command=command))
    return list(chosen.values())


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
