# SPDX-License-Identifier: Apache-2.0
"""
Makes the tables and figures of docs/results.md anew from results/runs.csv: `python -m results.page`.

A table stands between `<!-- results: NAME -->` and `<!-- end of results -->`. Rows that were judged on the test images
are finals, with mean and 90 % interval where there are several seeds; all others are screens.
"""

import csv
import re
import shlex
import statistics
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import yaml
from scipy.stats import t, ttest_ind

from analysis import style

from .figures import figures, groups
from .screen import ROOT, TABLE


PAGE = ROOT / "docs" / "results.md"
TEST = "test images"


def mean(rows: list[dict], name: str) -> str:
    """The mean of a column, with its 90 % interval over seeds."""
    values = [float(row[name]) for row in rows if row[name]]
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else ""
    half = t.ppf(0.95, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.2f} ± {half:.2f}"


def over(runs: list[dict], baseline: list[dict]) -> str:
    """The difference of the means of two arms' last evaluations, with its 90 % interval where both have seeds."""
    ours, theirs = ([float(row["last"]) for row in rows] for rows in (runs, baseline))
    difference = f"{statistics.fmean(ours) - statistics.fmean(theirs):+.2f}"
    if min(len(ours), len(theirs)) < 2:
        return difference
    low, high = ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.9)
    return f"{difference} ({low:+.2f} to {high:+.2f})"


def finals(rows: list[dict]) -> list[str]:
    """
    Lines of the table of finals: what the paper reports beside what was measured. An epoch is chosen by the test images
    only where the paper's script does so.
    """
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["judged_on"] == TEST:
            found.setdefault((row["screen"], row["arm"], row["recipe"], row["epochs"]), []).append(row)
    lines = ["| final | arm | epochs | seeds | paper | best | last | averaged | over softmax | images/s | minutes |"]
    lines.append("|" + " --- |" * 11)
    for (screen, arm, recipe, epochs), runs in found.items():
        reported = yaml.safe_load((ROOT / recipe).read_text(encoding="utf-8")).get("reported", {}).get("top1", "")
        # The paper's figure is of its recipe alone.
        cells = [f"`{screen}`", f"`{arm}`", epochs, str(len(runs)), str(reported) if screen == "fidelity" else ""]
        cells += [mean(runs, "best") if screen.startswith("fidelity") else ""]
        cells += [mean(runs, name) for name in ("last", "average_last")]
        softmax = [run for of, each in found.items() if of[:2] == (screen, "softmax") for run in each]
        cells.append(over(runs, softmax) if softmax and arm != "softmax" else "")
        rate, minutes = (
            statistics.fmean(float(run[name]) for run in runs) for name in ("images_per_second", "minutes")
        )
        lines.append(f"| {' | '.join([*cells, f'{rate:,.0f}', f'{minutes:.1f}'])} |")
    return lines


def screens(rows: list[dict]) -> list[str]:
    """What each file of arms says of itself, and lines of a table of its runs: the flags in which they differ."""
    lines = []
    for screen, arms in groups([row for row in rows if row["judged_on"] != TEST]).items():
        runs = [run for of_arm in arms.values() for run in of_arm]
        said = re.findall(r"^# (.*)", (ROOT / "results" / "arms" / f"{screen}.yaml").read_text(encoding="utf-8"), re.M)
        flags = [shlex.split(row["flags"]) for row in runs]
        common = len([*takewhile(lambda words: len(set(words)) == 1, zip(*flags))])
        lines += ["", f"`{screen}`: {' '.join(said[1:])}", ""]
        lines += ["| arm | its flags | seed | epochs | last | averaged | images/s |", "|" + " --- |" * 7]
        for row, words in zip(runs, flags):
            figures = [mean([row], name) for name in ("last", "average_last")]
            own = f"`{shlex.join(words[common:])}`" if words[common:] else ""
            cells = [f"`{row['arm']}`", own, row["seed"], row["epochs"], *figures]
            lines.append(f"| {' | '.join(cells)} | {float(row['images_per_second']):,.0f} |")
    return [*lines, ""]


Tables = dict[str, Callable[[list[dict]], list[str]]]
TABLES: Tables = {"finals": finals, "screens": screens}


def read(table: Path = TABLE) -> list[dict]:
    """The rows of the CSV."""
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def regenerate(text: str, rows: list[dict], tables: Tables = TABLES) -> str:
    """The text of a page, with its tables made anew from the rows of the CSV."""

    def fill(found: re.Match) -> str:
        return "\n".join([found[1], *tables[found[2]](rows), found[3]])

    return re.sub(r"(<!-- results: (\w+) -->)\n.*?(<!-- end of results -->)", fill, text, flags=re.DOTALL)


def main() -> None:
    """Write the page and its figures."""
    rows = read()
    PAGE.write_text(regenerate(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    with style.context():
        for name, figure in figures(rows, TABLE.parent / "logs", TEST).items():
            figure.savefig(PAGE.parent / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
