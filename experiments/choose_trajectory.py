"""Of several right trajectories per question keep the one that the student finds likeliest, and let code weigh more.

Source: SmartAD (ACL Findings 2026): a trajectory that is close to what the student would write itself is easier to
learn; its code and its final answer matter more than the wording of its thoughts.

    make experiment NAME=choose_trajectory

Replaced: the filter (the paper keeps the first right trajectory), and the weights of tokens in the loss. Baseline: the
first right trajectory of the same samples, all tokens with weight 1. The scripted teacher's samples differ only in
their mistakes, so these are collected from one that makes more of them (`--run-error 0.2 --slip 0.2`), three per
question at temperature 1. With a real teacher, give its own: `collect --samples 3 --temperature 0.7`.
Result (three seeds): 68.6 instead of 73.3 %, p = 0.068: no help here.
"""

import functools
from pathlib import Path

import torch

import train
from agent_distill import CODE_OPEN, FilterConfig, filter_trajectories
from common import progress, read_jsonl, run_command_line, write_jsonl
from common.models import choose_device, load_model, uses_bf16
from experiments import Setting, compare, evaluate_student, train_student

CODE_WEIGHT = 2.0  # of a token of code or final answer; thoughts have weight 1


def weigh_code(text, turn, row):
    """Returns a higher weight for the code of an action; see train.turn_weight."""
    start = text.find(CODE_OPEN)
    return [(start, len(text), CODE_WEIGHT)] if start >= 0 else 1.0


@torch.no_grad()
def surprise(model, tokenizer, row):
    """Mean of -log p over the trajectory's trained tokens, weighted: how unlikely the student finds it."""
    examples = train.encode(tokenizer, row["messages"], weigh_code, row)
    total = sum(example.weights.sum().item() for example in examples)
    return sum(train.loss_of(model, [example]).item() for example in examples) / total


def by_question(rows):
    """Returns [[the rows of one question, in their order], ...]"""
    groups = {}
    for row in rows:
        groups.setdefault((row["task"], row["id"]), []).append(row)
    return list(groups.values())


def run(config):
    """Train on the first and on the likeliest right trajectories, evaluate both students, and compare."""
    out = Path(config.out)
    files = {name: out / f"{name}.train.jsonl" for name in ("right", "first", "likeliest")}
    filter_trajectories(FilterConfig(trajectories=config.data, out=str(files["right"]), per_question=1000))
    questions = by_question(row for _, row in read_jsonl(files["right"]))
    write_jsonl(files["first"], [rows[0] for rows in questions])
    if not files["likeliest"].exists():
        device = choose_device()
        dtype = torch.bfloat16 if uses_bf16("auto", device) else torch.float32
        model, tokenizer = load_model(config.model, device, dtype)
        bar = progress(questions, desc="score", unit="question", quiet=config.quiet)
        score = functools.partial(surprise, model, tokenizer)
        write_jsonl(files["likeliest"], [min(rows, key=score) for rows in bar])
    students = {
        "first": train_student(config, "first", files["first"]),
        "likeliest": train_student(config, "likeliest", files["likeliest"], "experiments.choose_trajectory.weigh_code"),
    }
    compare(*(evaluate_student(config, student, name) for name, student in students.items()))


if __name__ == "__main__":
    run_command_line(__doc__, {"run": (Setting, run)}, default="run")
