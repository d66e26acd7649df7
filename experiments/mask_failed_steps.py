"""Failed steps stay in the context and leave the loss: the student reads how a failure is repaired, but does not learn
to fail.

Source: step rejection fine-tuning (openreview RndJzeZV81), where a critic model says which steps are bad. Here the
Python interpreter says it: a step has failed if its code raised an error.

    make experiment NAME=mask_failed_steps

Replaced: the weights of tokens in the loss (`--weigh` of train.py). Baseline: the same trajectories with all steps in
the loss. The scripted teacher fails in 2 % of its steps, too few to see anything, so these trajectories are collected
from one that fails in 30 % (`--run-error 0.3`). With a real teacher, give its own trajectories.
Result (three seeds): 51.4 instead of 57.8 %, p = 0.023; nearly all of it on seed 0.
"""

from pathlib import Path

from agent_distill import FilterConfig, filter_trajectories
from common import read_jsonl, run_command_line
from experiments import Setting, compare, evaluate_student, train_student


def weigh_steps(text, turn, row):
    """0 for a step that failed, 1 for the others; see train.turn_weight."""
    return 0.0 if row["steps"][turn]["error_kind"] else 1.0


def run(config):
    """Train with and without failed steps in the loss, evaluate both, and compare."""
    data = str(Path(config.out, "train.jsonl"))
    filter_trajectories(FilterConfig(trajectories=config.data, out=data))
    steps = [step["error_kind"] for _, row in read_jsonl(data) for step in row["steps"]]
    print(f"{sum(map(bool, steps))} of {len(steps)} steps failed")
    students = {"all": train_student(config, "all", data)}
    students["masked"] = train_student(config, "masked", data, "experiments.mask_failed_steps.weigh_steps")
    compare(*(evaluate_student(config, student, name) for name, student in students.items()))


if __name__ == "__main__":
    run_command_line(__doc__, {"run": (Setting, run)}, default="run")
