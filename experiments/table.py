"""The table of experiments/README.md, from the experiments that have been run below a folder.

    python -m experiments.table runs/miniature-experiments

For each experiment (folders seed*/NAME/eval/*): the accuracy of the baseline and of the variant on the same questions,
over all seeds, and McNemar's exact test on the pairs.
"""

import collections
import dataclasses
from pathlib import Path

import numpy as np

from common import REQUIRED, InputError, option, report, run_command_line

PAIRS = {  # experiment -> [(baseline, variant), ...], the names of their run folders
    "mask_failed_steps": [("all", "masked")],
    "choose_trajectory": [("first", "likeliest")],
    "always_search": [("all", "searched")],
    "agree_early": [("sc8", "early"), ("sc8", "majority of episodes")],
    "on_policy": [("sft", "on-policy")],
}


@dataclasses.dataclass(kw_only=True)
class Config:
    runs: str = option(REQUIRED, "folder of the experiments, with a folder for each seed", positional=True)


def outcomes(folders):
    """{(seed, task, question): outcome} of the runs of one system."""
    return {(f.parents[2].name, o["task"], *o["question"]): o for f in folders for o in report.Run(f).outcomes}


def print_table(config):
    """Print one line per experiment and variant."""
    found = collections.defaultdict(list)
    for path in sorted(Path(config.runs).glob("*/*/eval/*/transcripts.0.jsonl")):
        found[path.parents[2].name, path.parent.name].append(path.parent)
    rows = []
    for name, pairs in PAIRS.items():
        for baseline, variant in pairs:
            first, second = outcomes(found[name, baseline]), outcomes(found[name, variant])
            shared = sorted(first.keys() & second.keys())
            if not shared:
                continue
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
