"""Drop the factual trajectories that answer without a search: a lucky guess is a right answer, and teaches guessing.

Source: small models search too little and answer from a memory that they do not have (arXiv 2604.04651).

    make experiment NAME=always_search

Replaced: the filter. Baseline: all right trajectories, as in the paper. The scripted teacher always searches, so these
trajectories are collected from one that answers half of the factual questions from memory (`--from-memory 0.5`): it
knows the real pages, and guesses about the invented ones; half of its guesses at comparisons are right. With a real
teacher, give its own trajectories. Result (three seeds): 54.4 instead of 49.2 %, p = 0.07.
"""

from pathlib import Path

from agent_distill import FilterConfig, filter_trajectories
from common import read_jsonl, report, run_command_line, write_jsonl
from experiments import Setting, compare, evaluate_student, train_student


def has_searched(row):
    """Returns whether a search ran without an error in this trajectory. Mathematical questions need none."""
    steps = [step for step in row["steps"] if "web_search(" in (step["code"] or "")]
    return row["kind"] != "fact" or any(step["error_kind"] is None for step in steps)


def run(config):
    """Train on all right trajectories and on those with a search, evaluate both, and compare."""
    rows = [row for path in config.data for _, row in read_jsonl(path)]
    right = [row for row in rows if row["correct"] and row["kind"] == "fact"]
    print(f"{sum(not has_searched(row) for row in right)} of {len(right)} right factual trajectories have no search")
    write_jsonl(Path(config.out, "searched.jsonl"), filter(has_searched, rows))
    students = {}
    for name, trajectories in (("all", config.data), ("searched", [f"{config.out}/searched.jsonl"])):
        data = f"{config.out}/{name}.train.jsonl"
        filter_trajectories(FilterConfig(trajectories=trajectories, out=data))
        students[name] = train_student(config, name, data)
    folders = [evaluate_student(config, student, name) for name, student in students.items()]
    compare(*folders)
    for folder in folders:
        answered = [
            row for row in report.transcripts(folder) if row["kind"] == "fact" and row["stop"] == "final_answer"
        ]
        guesses = sum(not has_searched(row) for row in answered)
        print(f"{folder.name}: {guesses} of {len(answered)} factual answers without a search")


if __name__ == "__main__":
    run_command_line(__doc__, {"run": (Setting, run)}, default="run")
