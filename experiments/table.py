"""The table of experiments/README.md, from the experiments that have been run below a folder.

    python -m experiments.table runs/miniature-experiments

For each pair that an experiment compared (folders seed*/NAME/eval/*): the accuracy of the baseline and of the variant
on the same questions, over all seeds, and McNemar's exact test on the pairs. A fork needs no entry here.
"""

import collections
import dataclasses
import json
from pathlib import Path

import numpy as np

from common import REQUIRED, InputError, option, report, run_command_line


@dataclasses.dataclass(kw_only=True)
class Config:
    runs: str = option(REQUIRED, "folder of the experiments, with a folder for each seed", positional=True)


def outcomes(folders):
    """Returns {(seed, task, question): outcome} of the runs of one system."""
    return {(f.parents[2].name, o["task"], *o["question"]): o for f in folders for o in report.Run(f).outcomes}


def print_table(config):
    """Print one line per experiment and variant."""
    pairs, rows = collections.defaultdict(list), []
    for path in sorted(Path(config.runs).glob("*/*/eval/*/compared.json")):
        variant, baseline = path.parent, path.parents[1] / json.loads(path.read_text())["baseline"]
        pairs[path.parents[2].name, variant.name, baseline.name].append((baseline, variant))
    for (name, variant, baseline), folders in pairs.items():
        first, second = map(outcomes, zip(*folders, strict=True))
        shared = sorted(first.keys() & second.keys())
        sides = [[side[key]["correct"] for key in shared] for side in (first, second)]
        lost, won, p = report.mcnemar(*sides)
        accuracy = [f"{100 * np.mean(side):.1f}" for side in sides]
        tokens = [f"{np.mean([side[key]['figures']['tokens'] for key in shared]):.0f}" for side in (first, second)]
        about = f"{variant} against {baseline}", len({key[0] for key in shared}), len(shared)
        rows.append([name, *about, *accuracy, f"{lost} / {won}", f"{p:.2g}", " / ".join(tokens)])
    if not rows:
        raise InputError(f"{config.runs}: no experiment has been run: make experiment NAME=agree_early")
    columns = (
        "experiment,variant,seeds,questions,baseline %,variant %,only baseline / only variant,p,tokens per question"
    )
    print(report.table(columns.split(","), rows))


if __name__ == "__main__":
    run_command_line(__doc__, {"print": (Config, print_table)}, default="print")
