"""The empty fork: another tool, another vote and another weighting of tokens. Copy this file and change what you like.

    make experiment NAME=template

Source: your idea. Replaced: what you replace. Result: what came out.
"""

import dataclasses
import shutil
from pathlib import Path

import agent_distill
from agent_distill import CODE_OPEN, FilterConfig, Prompts, filter_trajectories
from common import option, read_jsonl, run_command_line, write_jsonl
from experiments import Setting, compare, evaluate_student, train_student

HERE = __spec__.name  # experiments.NAME, also when this file is run by python -m


@dataclasses.dataclass(kw_only=True)
class Config(Setting):
    limit: int = option(2, "test questions of each file", above=0)


def tools():
    """Further tools: {name: function of JSON values}."""
    return {"word_count": lambda text: len(text.split())}


DESCRIPTIONS = {"word_count": "word_count(text: str): the number of words in a text."}  # what the models read


def choose(actions, observations, rng):
    """The vote: as in the paper, but among the candidates that do not end the episode, if there are any."""
    going_on = [i for i, o in enumerate(observations) if not (o.is_final or o.error_kind)]
    kept = going_on or range(len(observations))
    return kept[agent_distill.choose([actions[i] for i in kept], [observations[i] for i in kept], rng)]


def weigh(text, turn, row):
    """Returns the weights of tokens in the loss: those of code count twice."""
    return [(text.find(CODE_OPEN), len(text), 2.0)] if CODE_OPEN in text else 1.0


def run(config):
    """Train with the weights; evaluate as in the paper, and with the tool and the vote; compare."""
    prompts = Path(config.out, "prompts")
    shutil.copytree(Prompts.default, prompts, dirs_exist_ok=True)
    for name, text in DESCRIPTIONS.items():
        (prompts / "tools" / f"{name}.txt").write_text(text + "\n")
    data = f"{config.out}/train.jsonl"
    rows = [row | {"tools": [*row["tools"], *DESCRIPTIONS]} for path in config.data for _, row in read_jsonl(path)]
    write_jsonl(f"{config.out}/agent.jsonl", rows)  # the student's system prompt names the tool
    filter_trajectories(FilterConfig(trajectories=[f"{config.out}/agent.jsonl"], out=data, prompts=str(prompts)))
    student = train_student(config, "student", data, f"{HERE}.weigh")
    paper = evaluate_student(config, student, "paper", sc=4)
    forked = {"tools": f"{HERE}.tools", "choose": f"{HERE}.choose", "prompts": str(prompts)}
    compare(paper, evaluate_student(config, student, "fork", sc=4, **forked))


if __name__ == "__main__":
    run_command_line(__doc__, {"run": (Config, run)}, default="run")
