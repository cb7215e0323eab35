# SPDX-License-Identifier: Apache-2.0
"""
Runs many variants of training and keeps what came out: `python -m results.screen ARMS.yaml --data FOLDER`.

Each arm is a command of run_image_classification.py, several of which share a GPU. A run that was stopped goes on when
the same command is given again; an arm whose row is in the table is left out. Choices are made on training images that
are held out: `--held-out FOLDER` makes a folder of CIFAR-10's parquet files, the last 5,000 of whose training images
are the validation split. The test images are for the final figure of a choice that is made.

ARMS.yaml: `recipe`, a path from the project's folder; `flags`, of all arms; and `arms`, further flags by name, before
which a recipe of its own may stand. Under `seeds` a list; each arm is then run with each. What each run wrote after its
evaluations is kept in `logs`, beside the table.
"""

import csv
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import yaml

from image_classification.flags import Parser


ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "results" / "runs.csv"
FIELDS = (
    *("screen", "arm", "seed", "recipe", "flags", "epochs", "judged_on"),
    *("best", "last", "average_last", "train_loss", "images_per_second", "peak_gib", "minutes", "card", "on_card"),
    *("commit", "torch", "transformers", "date"),
)
HELD_OUT = 5000


def hold_out(source: Path, target: Path) -> None:
    """Make a folder of `train.parquet` and `validation.parquet` out of the training images of another."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(source / "train.parquet")
    target.mkdir(parents=True, exist_ok=True)
    split = len(table) - HELD_OUT
    parquet.write_table(table.slice(0, split), target / "train.parquet")
    parquet.write_table(table.slice(split), target / "validation.parquet")


def read_arms(path: Path) -> list[dict]:
    """Every run of a file of arms: name, seed, recipe and flags."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    common, runs = shlex.split(content.get("flags") or ""), []
    for seed in content.get("seeds", [42]):
        for name, words in content["arms"].items():
            own = shlex.split(words or "")
            recipe = own.pop(0) if own and own[0].endswith(".yaml") else content["recipe"]
            runs.append({"screen": path.stem, "arm": name, "seed": seed, "recipe": recipe, "flags": [*common, *own]})
    return runs


def name_of(run: dict) -> str:
    """What a run or its row is called, SCREEN/ARM-SEED, which is its folder, too."""
    return f"{run['screen']}/{run['arm']}-{run['seed']}"


def log_of(run: dict) -> str:
    """The name of the file in `logs` of a run or its row."""
    return f"{name_of(run).replace('/', '-')}.json"


def row_of(folder: Path) -> dict:
    """
    A row of the table, from what a finished run wrote. `best` is the best evaluation of the raw weights, `last` their
    last one, `average_last` the last one of the average; in percent.
    """
    figures = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    raw = [100 * row["eval_accuracy"] for row in history]
    average = [100 * row["eval_ema_accuracy"] for row in history if "eval_ema_accuracy" in row]
    return {
        "epochs": history[-1]["epoch"],
        "best": max(raw),
        "last": raw[-1],
        "average_last": average[-1] if average else "",
        "train_loss": history[-1].get("train_loss", ""),
        "images_per_second": figures.get("train_images_per_second", ""),
        "peak_gib": figures.get("train_peak_memory_gib", ""),
        "minutes": figures["train_runtime"] / 60,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the arms of a file. Returns the number of those that failed."""
    parser = Parser(prog="python -m results.screen", description=__doc__.split("\n")[1])
    parser.add_argument("arms", type=Path, nargs="?", help="YAML file of arms")
    parser.add_argument("--data", type=Path, required=True, help="folder of parquet files, as --data_path takes it")
    parser.add_argument("--held-out", type=Path, help="make this folder from the training images of --data, and end")
    parser.add_argument("--judged-on", default="held out", help="what the validation split is (default: held out)")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs", help="where the runs' folders are")
    parser.add_argument("--table", type=Path, default=TABLE, help="CSV to append to")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--per-gpu", type=int, default=3, help="runs that share a GPU (default: 3)")
    args = parser.parse_args(argv)
    if args.held_out is not None:
        hold_out(args.data, args.held_out)
        return 0
    if args.arms is None:
        parser.error("which file of arms? Or --held-out, to make a folder.")
    import torch
    import transformers

    facts = {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "on_card": args.per_gpu,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        or os.environ.get("KARAT_COMMIT", ""),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "judged_on": args.judged_on,
    }
    done = set()
    if args.table.exists():
        with args.table.open(encoding="utf-8") as file:
            done = {name_of(row) for row in csv.DictReader(file)}
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    lock, failed = threading.Lock(), []
    for run in read_arms(args.arms):
        if name_of(run) not in done:
            waiting.put(run)

    def work(gpu: str) -> None:
        while True:
            try:
                run = waiting.get_nowait()
            except queue.Empty:
                return
            name = name_of(run)
            folder = args.output / name
            command = [sys.executable, str(ROOT / "run_image_classification.py"), str(ROOT / run["recipe"])]
            command += [*run["flags"], "--data_path", str(args.data), "--seed", str(run["seed"]), "--disable_tqdm"]
            command += ["--output_dir", str(folder)]
            folder.parent.mkdir(parents=True, exist_ok=True)
            with (folder.parent / f"{folder.name}.log").open("a") as log:
                environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
                status: int | str = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
            with lock:
                try:
                    row = {} if status else run | {"flags": shlex.join(run["flags"])} | row_of(folder) | facts
                    if row:
                        logs = args.table.parent / "logs"
                        logs.mkdir(exist_ok=True)
                        shutil.copy(folder / "history.json", logs / log_of(run))
                except (OSError, LookupError) as error:  # A run without evaluations has no figures.
                    status = f"{type(error).__name__}: {error}"
                if status:
                    failed.append(name)
                    print(f"{name}: failed ({status}), see {folder}.log", flush=True)
                    continue
                new = not args.table.exists()
                with args.table.open("a", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                    if new:
                        writer.writeheader()
                    row["date"] = time.strftime("%Y-%m-%d")
                    writer.writerow({key: f"{x:.5g}" if isinstance(x, float) else x for key, x in row.items()})
                print(
                    f"{name}: best {row['best']:.2f}, last {row['last']:.2f} % ({row['minutes']:.1f} min)", flush=True
                )

    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(args.gpus)))).split(",")[: args.gpus]
    workers = [threading.Thread(target=work, args=(gpu,)) for gpu in visible * args.per_gpu]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
