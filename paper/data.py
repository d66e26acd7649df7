"""The formats of the authors' published data, converted to the project's own. `make paper` downloads it.

python -m paper.data tasks runs/paper/download/benchmarks --out runs/paper/tasks
python -m paper.data trajectories runs/paper/download/agent-trajectories --out agent.train.jsonl
"""

import dataclasses
import re
from pathlib import Path

from agent_distill import Prompts
from common import REQUIRED, InputError, option, parse_object, read_jsonl, read_text, run_command_line, write_jsonl
from common.report import TASKS

# The authors' benchmark files, as sha256sum lists them: their paths below data_processor/ in the authors' repository.
BENCHMARKS = Path(__file__).with_name("benchmarks.sha256")
BENCHMARK_FILES = [line.split()[1] for line in BENCHMARKS.read_text().splitlines()]


def task_of(path):
    """(split, task) of a benchmark file: qa_dataset/test/hotpotqa_500_20250422.json -> ("test", "hotpotqa")."""
    _, split, name = path.split("/")
    return split, name.rsplit("_", 2)[0].replace("olymath", "olymmath")


@dataclasses.dataclass(kw_only=True)
class TasksConfig:
    folder: str = option(REQUIRED, "the authors' benchmark files, as downloaded", positional=True)
    out: str = option(REQUIRED, "folder for test/TASK.jsonl and train/TASK.jsonl")


def make_tasks(config):
    """Write the authors' questions as task files. Their files state task, kind and domain only by their names."""
    for path in BENCHMARK_FILES:
        source, (split, task) = Path(config.folder) / path, task_of(path)
        known = TASKS[task.removesuffix("_medium")]  # math_medium: training questions of MATH, of medium difficulty
        about = {"task": task, "kind": known.kind, "domain": known.domain}
        examples = parse_object(read_text(source), source)["examples"]
        rows = [{"id": str(e["id"]), **about, "question": e["question"], "answer": e["answer"]} for e in examples]
        answered = [row for row in rows if row["answer"] not in (None, "")]  # four training questions have no answer
        write_jsonl(Path(config.out) / split / f"{task}.jsonl", answered)
        print(f"{split} {task}: {len(answered)} questions, {len(rows) - len(answered)} without an answer dropped")


@dataclasses.dataclass(kw_only=True)
class TrajectoriesConfig:
    folder: str = option(REQUIRED, "one of the authors' data sets, as downloaded: JSONL files", positional=True)
    out: str = option(REQUIRED, "training file to write")
    prefix: bool = option(False, "the rows were made with the first-thought prefix")


def convert_trajectories(config):
    """Write the authors' published rows as training rows {"messages", "method", "prefix"}.

    The rows get our system prompts, and search results in our wording: that is what the student will see. Agent rows
    without a log, or with a second system message, are dropped, as the authors do.
    """
    prompts, kept, dropped = Prompts(), [], 0
    systems = {"agent": prompts.system("agent_student_system", ["web_search"]), "cot": prompts.cot_system}
    for path in sorted(Path(config.folder).rglob("*.jsonl")):
        for number, row in read_jsonl(path):
            try:
                method, messages = published_messages(row)
            except (KeyError, TypeError, AttributeError):
                expected = "log_data.messages, or messages and response,"
                raise InputError(f"{path}:{number}: {expected} were expected") from None
            turns = [message for message in messages if message["role"] != "system"]
            if len(turns) < 2 or len(messages) - len(turns) > 1:
                dropped += 1
                continue
            for message in turns:
                if message["role"] == "user":
                    message["content"] = reword_search_results(message["content"], prompts)
            messages = [{"role": "system", "content": systems[method]}, *turns]
            kept.append({"messages": messages, "method": method, "prefix": config.prefix})
    if not kept:
        raise InputError(f"{config.folder}: no conversation in its .jsonl files ({dropped} rows dropped)")
    write_jsonl(config.out, kept)
    print(f"{config.out}: {len(kept)} conversations, {dropped} rows dropped")


def published_messages(row):
    """(method, messages) of one of the authors' rows; messages is [] for a row without a log.

    A CoT row has the messages and the response. An agent row has the log of smolagents 1.13: the content is a list of
    text parts; "tool-call" repeats the code of the assistant's message and is removed; "tool-response" is the user's
    turn and loses its line "Call id: ..."; neighbours of one role (logs, then an error) become one turn. References in
    the question, and what follows the last assistant's turn, are removed.
    """
    if "response" in row:
        return "cot", [*row["messages"], {"role": "assistant", "content": row["response"]}]
    chat = []
    for message in row["log_data"]["messages"] if row["log_data"] else []:
        role = message["role"].removeprefix("MessageRole.").lower().replace("_", "-")
        content = "\n".join(part["text"] for part in message["content"])
        if role == "tool-call":
            continue
        if role == "tool-response":
            role, content = "user", re.sub(r"^Call id: .*\n", "", content)
        if chat and chat[-1]["role"] == role:
            chat[-1]["content"] += "\n" + content
        else:
            chat.append({"role": role, "content": content})
    for question in chat[1:2]:
        question["content"] = re.sub(r"<reference>.*?</reference>", "", question["content"], flags=re.DOTALL)
    if chat and chat[-1]["role"] == "user":
        chat.pop()
    return "agent", chat


# What the authors' search tool returns: a line with the rank from 0, then the passage, whose first line is its title.
DOCUMENT = re.compile(r"===== Document (\d+), similarity: [-\d.]+ =====\n\"?(.*?)\"?\n")


def reword_search_results(text, prompts):
    """Search results in the authors' wording -> in ours (prompts/search_result.txt)."""
    text = re.sub(r"\n*Retrieved documents:\n+(?======)", "\n", text)
    return DOCUMENT.sub(lambda m: prompts.fill("search_result", rank=int(m[1]) + 1, title=m[2], text=""), text)


if __name__ == "__main__":
    commands = {
        "tasks": (TasksConfig, make_tasks),
        "trajectories": (TrajectoriesConfig, convert_trajectories),
    }
    run_command_line(__doc__, commands)
