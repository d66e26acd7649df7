"""What the experiments share: students trained and evaluated with the settings of `make reproduce`, and a comparison.

    make experiment NAME=mask_failed_steps SEEDS="0 1 2"

Each experiment is one file that imports the five scripts and replaces one thing. It compares two students (or two ways
of decoding) on the same questions. template.py is the one to copy.
"""

import dataclasses
from pathlib import Path

import evaluate
import train
from common import REQUIRED, load_tasks, option, report, write_json
from retriever import check_index


@dataclasses.dataclass(kw_only=True)
class Setting(train.Config):
    """train.py's options, and what is evaluated. data: the trajectories that the experiment starts from."""

    out: str = option(REQUIRED, "folder for all that the experiment writes; the same command continues there")
    tests: list[str] = option(REQUIRED, "test files")
    search: str = option(REQUIRED, "index folder or /retrieve URL behind web_search")
    top_k: int = option(3, "passages per search (paper: 3)", above=0)
    limit: int = option(15, "test questions of each file", above=0)
    max_tokens: int = option(1024, "new tokens per step (paper: 1,024)", above=0)


def train_student(setting, name, data, weigh=None):
    """Fine-tune setting.model on a file of filtered trajectories, unless that is done. Returns the student's folder.

    weigh: MODULE.FUNCTION, as train.py's --weigh.
    """
    load_tasks(setting.tests)  # a wrong file or index is refused before the training
    check_index(setting.search)
    options = {field.name: getattr(setting, field.name) for field in dataclasses.fields(train.Config)}
    config = train.Config(**options | {"data": [str(data)], "out": str(Path(setting.out, name)), "weigh": weigh})
    train.fit(config)
    return config.out


def evaluate_student(setting, student, name, **options):
    """Answer the test questions as an agent, unless that is done. Returns the run folder."""
    options = {"tasks": setting.tests, "limit": setting.limit} | options
    names = ("search", "top_k", "max_tokens", "seed", "quiet")
    options |= {name: getattr(setting, name) for name in names}
    config = evaluate.RunConfig(model=str(student), name=name, out=str(Path(setting.out, "eval", name)), **options)
    evaluate.run(config)
    return Path(config.out)


def compare(first, second):
    """Print a baseline's and a variant's run folder side by side: accuracy by task, paired (McNemar), and tool use.

    The pair is noted in the variant's folder, where experiments.table finds it.
    """
    print(report.compare(first, second))
    names = [Path(folder).name for folder in (first, second)]
    figures = [report.means(report.Run(folder).outcomes) for folder in (first, second)]
    rows = [[name, *(f"{value[name]:.2f}" for value in figures)] for name in figures[0]]
    print("\n" + report.table(["per question", *names], rows))
    write_json(Path(second, "compared.json"), {"baseline": names[0]})
