"""What the experiments share: students trained and evaluated with the settings of `make reproduce`, and a comparison.

    make experiment NAME=mask_failed_steps SEEDS="0 1 2"

Each experiment is one file that imports the five scripts and replaces one thing. It compares two students (or two ways
of decoding) on the same questions. template.py is the one to copy.
"""

import dataclasses
from pathlib import Path

import evaluate
import train
from common import REQUIRED, option, report


@dataclasses.dataclass(kw_only=True)
class Setting:
    """The data and the students of an experiment. The defaults are the miniature's."""

    tests: list[str] = option(REQUIRED, "test files")
    search: str = option(REQUIRED, "index folder or /retrieve URL behind web_search")
    model: str = option(REQUIRED, "the student before its training: a Hugging Face name or folder")
    out: str = option(REQUIRED, "folder for all that the experiment writes; the same command continues there")
    limit: int = option(15, "test questions of each file")
    max_tokens: int = option(192, "new tokens per step (paper: 1,024)")
    epochs: int = option(1, "passes over the data (paper: 2)")
    lr: float = option(1e-3, "learning rate (paper: 2e-4)")
    dropout: float = option(0.0, "of LoRA (paper: 0.05)")
    warmup_steps: int = option(5, "steps of linear warm-up")
    seed: int = option(0, "seeds training and sampling")
    quiet: bool = option(False, "no progress bar")


def train_student(setting, name, data, weigh=train.turn_weight, **settings):
    """Fine-tune setting.model on a file of filtered trajectories, unless that is done. Returns the student's folder."""
    names = ("model", "epochs", "lr", "dropout", "warmup_steps", "seed", "quiet")
    settings = {name: getattr(setting, name) for name in names} | settings
    config = train.Config(data=[str(data)], out=str(Path(setting.out, name)), **settings)
    train.fit(config, weigh)
    return config.out


def evaluate_student(setting, student, name, **options):
    """Answer the test questions as an agent, unless that is done. Returns the run folder."""
    options = {"tasks": setting.tests, "limit": setting.limit} | options
    names = ("search", "max_tokens", "seed", "quiet")
    options |= {name: getattr(setting, name) for name in names}
    config = evaluate.RunConfig(model=str(student), name=name, out=str(Path(setting.out, "eval", name)), **options)
    evaluate.run(config)
    return Path(config.out)


def compare(first, second):
    """Print two run folders beside each other: accuracy by task, paired (McNemar), and the figures of tool use."""
    runs = [report.Run(folder) for folder in (first, second)]
    names = [Path(folder).name for folder in (first, second)]
    sides = [{(o["task"], *o["question"]): o["correct"] for o in run.outcomes} for run in runs]
    print(report.paired_table(*sides, names))
    figures = [report.means(run.outcomes) for run in runs]
    rows = [[name, *(f"{value[name]:.2f}" for value in figures)] for name in figures[0]]
    print("\n" + report.table(["per question", *names], rows))
