"""Published data in the project's own formats. `make paper` downloads it and checks its sha256 where that is known.

python -m paper.data tasks runs/paper/download/benchmarks --out runs/paper/tasks
python -m paper.data trajectories runs/paper/download/agent-trajectories --out agent.train.jsonl
"""

import dataclasses
import json
import re
from pathlib import Path

from agent_distill import FilterConfig, Prompts, filter_trajectories
from common import REQUIRED, InputError, grading, option, read_jsonl, read_text, run_command_line, write_jsonl
from common.report import TASKS

# The authors' benchmark files, as sha256sum lists them: their paths below data_processor/ in the authors' repository.
BENCHMARK_FILES = [line.split()[1] for line in Path(__file__).with_name("benchmarks.sha256").read_text().splitlines()]
# HippoRAG's tasks: 1,000 questions in TASK.json, and the paragraphs that they list, pooled, in TASK_corpus.json.
POOLED_TASKS = ("hotpotqa", "2wikimultihopqa", "musique")


# ------------- Tasks


@dataclasses.dataclass(kw_only=True)
class TasksConfig:
    folder: str = option(REQUIRED, "the authors' benchmark files, as downloaded", positional=True)
    pooled: str | None = option(None, "folder of HippoRAG's files: their questions replace the authors' factual ones")
    out: str = option(REQUIRED, "folder for test/TASK.jsonl, train/TASK.jsonl and, with --pooled, passages.jsonl")


def make_tasks(config):
    """Write the authors' questions, or the pooled and the authors' mathematical ones, as task files."""
    for path in BENCHMARK_FILES:
        split, task = task_of(path)
        if not (config.pooled and path.startswith("qa_dataset")):
            write_tasks(config.out, split, task, json.loads(read_text(Path(config.folder) / path))["examples"])
    contents = {}  # as an ordered set
    for task in POOLED_TASKS if config.pooled else ():
        questions = json.loads(read_text(Path(config.pooled) / f"{task}.json"))
        if task == "hotpotqa":  # a teacher of one's own needs training questions whose paragraphs are among the pooled
            half = len(questions) // 2
            write_tasks(config.out, "train", task, questions[half:])
            questions = questions[:half]
        write_tasks(config.out, "test", task, questions)
        paragraphs = json.loads(read_text(Path(config.pooled) / f"{task}_corpus.json"))
        contents |= dict.fromkeys(f'"{paragraph["title"]}"\n{paragraph["text"]}' for paragraph in paragraphs)
    if contents:
        rows = [{"id": str(number), "contents": content} for number, content in enumerate(contents)]
        write_jsonl(Path(config.out) / "passages.jsonl", rows)


def task_of(path):
    """Returns (split, task) of a benchmark file: qa_dataset/test/hotpotqa_500_20250422.json -> ("test", "hotpotqa")."""
    _, split, name = path.split("/")
    return split, name.rsplit("_", 2)[0].replace("olymath", "olymmath")


def write_tasks(out, split, task, examples):
    """Write one task file. The published files state task, kind and domain only by their names."""
    known = TASKS[task.removesuffix("_medium")]  # math_medium: training questions of MATH, of medium difficulty
    about, rows = {"task": task, "kind": known.kind, "domain": known.domain}, []
    for e in examples:
        if e["answer"] not in (None, ""):  # four training questions have no answer
            row = {"id": str(e["_id"] if "_id" in e else e["id"]), **about, "question": e["question"]}
            rows.append(row | {"answer": e["answer"], "aliases": e.get("answer_aliases", [])})
    write_jsonl(Path(out) / split / f"{task}.jsonl", rows)
    print(f"{split} {task}: {len(rows)} questions, {len(examples) - len(rows)} without an answer dropped")


# ------------- Trajectories


@dataclasses.dataclass(kw_only=True)
class TrajectoriesConfig:
    source: str = option(REQUIRED, "a file of collect, or the authors' data set: a file or a folder", positional=True)
    out: str = option(REQUIRED, "training file to write")
    prefix: bool = option(False, "the authors' rows were made with the first-thought prefix")


def make_training_file(config):
    """Write training rows {"messages", "method", "prefix", ...} from a file of collect, or from the authors' data set.

    Rows of collect are graded again, because grading may have improved since, and filtered. The authors' rows get our
    system prompts, and our wording of questions and search results: that is what the student will see.
    """
    prompts, rows, made = Prompts(), list(read_rows(Path(config.source))), []
    collected = bool(rows) and "steps" in rows[0][1]
    for where, row in rows:
        try:
            made.append(graded_again(row) if collected else training_row(row, prompts, config.prefix))
        except (KeyError, TypeError, AttributeError, ValueError):
            raise InputError(f"{where}: a row of {'collect' if collected else 'the authors'} was expected") from None
    kept = [row for row in made if row]
    if not kept:
        raise InputError(f"{config.source}: no conversation in it ({len(rows)} rows dropped)")
    if collected:
        graded = Path(config.out).with_name(f"graded.{Path(config.out).name}")
        write_jsonl(graded, kept)
        filter_trajectories(FilterConfig(trajectories=[str(graded)], out=config.out))
    else:
        write_jsonl(config.out, kept)
        print(f"{config.out}: {len(kept)} conversations, {len(rows) - len(kept)} rows dropped")


def read_rows(source):
    """Yields (file and row number, row) for the rows of a JSONL or parquet file, or of all of them in a folder."""
    paths = sorted(source.rglob("*.jsonl")) + sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    for path in paths:
        if path.suffix == ".parquet":
            try:
                from pyarrow import parquet  # `make paper` installs it where there are such files

                rows = enumerate(parquet.read_table(path).to_pylist(), 1)
            except ImportError:
                raise InputError(f"{path}: parquet files need pyarrow: pip install pyarrow") from None
            except (OSError, ValueError) as error:  # what pyarrow raises for other files
                raise InputError(f"{path}: {str(error).splitlines()[0]}") from None
        else:
            rows = read_jsonl(path)
        for number, row in rows:
            yield f"{path}:{number}", row


def graded_again(row):
    """Returns a row of collect with the present code's grade."""
    aliases = row.get("aliases") or ()
    verdict = grading.grade(row["kind"], row["prediction"], row["answer"], aliases, row["question"])
    return row | {"correct": verdict.correct, "why": verdict.why}


def training_row(row, prompts, prefix):
    """Returns one of the authors' rows as a training row.

    None for a row without a log or with two system messages: the authors drop such rows, too.
    """
    method, messages = published_messages(row, prompts)
    turns = [message for message in messages if message["role"] != "system"]
    if len(turns) < 2 or len(messages) - len(turns) > 1:
        return None
    system = prompts.cot_system if method == "cot" else prompts.system("agent_student_system", ["web_search"])
    return {"messages": [{"role": "system", "content": system}, *turns], "method": method, "prefix": prefix}


def published_messages(row, prompts):
    """Returns (method, messages) of one of the authors' rows; messages is [] for a row without a log.

    A CoT row has the messages and the response. An agent row has the log of smolagents 1.13: an object or, on the hub,
    its JSON text. Contents are lists of text parts; "tool-call" repeats the code of the assistant's message;
    "tool-response" is the user's turn; neighbours of one role (logs, then an error) become one turn.
    """
    if "response" in row:
        return "cot", [*row["messages"], {"role": "assistant", "content": row["response"]}]
    log, chat = row["log_data"], []
    if isinstance(log, str):
        log = json.loads(log or "null")
    for message in log["messages"] if log else []:
        role = message["role"].removeprefix("MessageRole.").lower().replace("_", "-")
        content = "\n".join(part["text"] for part in message["content"])
        if role == "tool-call":
            continue
        if role == "tool-response":
            role, content = "user", reword_search_results(content, prompts)
        if chat and chat[-1]["role"] == role:
            chat[-1]["content"] += "\n" + content
        else:
            chat.append({"role": role, "content": content})
    for question in chat[1:2]:  # without the references and instructions that the authors append
        question["content"] = prompts.fill("question", question=row["question"])
    if chat and chat[-1]["role"] == "user":
        chat.pop()
    return "agent", chat


# What the authors' search tool returns: a line with the rank from 0, then the passage, whose first line is its title.
DOCUMENT = re.compile(r"===== Document (\d+), similarity: [-\d.]+ =====\n\"?(.*?)\"?\n")


def reword_search_results(text, prompts):
    """Search results in the authors' wording -> in ours (prompts/search_result.txt)."""
    text = re.sub(r"\n*Retrieved documents:\n+(?======)", "\n", re.sub(r"^Call id: .*\n", "", text))
    return DOCUMENT.sub(lambda m: prompts.fill("search_result", rank=int(m[1]) + 1, title=m[2], text=""), text)


if __name__ == "__main__":
    commands = {"tasks": (TasksConfig, make_tasks), "trajectories": (TrajectoriesConfig, make_training_file)}
    run_command_line(__doc__, commands)
