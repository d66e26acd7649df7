"""What `make paper` downloads: pinned sources, and the published formats converted to the project's own.

    python -m paper.data download benchmarks wiki-18 Qwen/Qwen2.5-0.5B-Instruct --to runs/paper
    python -m paper.data tasks runs/paper/download/benchmarks --out runs/paper/tasks
    python -m paper.data trajectories runs/paper/download/agent-trajectories --out agent.train.jsonl

A source that is named here goes to TO/download/NAME. A model on the Hub, by its name, goes to TO/hub, where
transformers finds it with HF_HUB_CACHE=TO/hub. $HF_TOKEN and $HF_ENDPOINT are those of huggingface_hub.
"""

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from agent_distill import Prompts
from common import (
    REQUIRED,
    InputError,
    http_session,
    option,
    parse_object,
    read_jsonl,
    read_text,
    replace_file,
    run_command_line,
    write_jsonl,
)
from common.client import ServerError
from common.report import TASKS

# ------------- Sources

# The authors' repository on GitHub: files under data_processor/, in the format of sha256sum. They are taken from the
# newest commit; the sha256 pins them.
BENCHMARKS = "https://raw.githubusercontent.com/Nardien/agent-distillation/main/data_processor"
BENCHMARK_SUMS = """
770b2740d2d5195f983dbeae3c770900edab776b5986b4cbff3194443a771b00  qa_dataset/test/hotpotqa_500_20250422.json
5034d0e66b38f5e54f20934cbb02ff1d38f0b292efe81da05b5ebdeafcb1bb07  qa_dataset/test/2wikimultihopqa_500_20250511.json
683634bcc958a79b144cffb815d4f56002dc22ed7358e11b897f9ff03ba69110  qa_dataset/test/musique_500_20250504.json
f6c5f3dd17521cf33a1d597d75525d65673687b3219ffe0339eae21b28d69be4  qa_dataset/test/bamboogle_125_20250507.json
32ae376ee63aee4a1e59ea167afebffa0031250b154d1805d13522c60c6069cb  math_dataset/test/math_500_20250414.json
970c69744216a75fe04eb86ff1adaf208df5191e2731c6ef0610bd2312266498  math_dataset/test/gsm_hard_500_20250507.json
445868439c6c88c8f3ac99c9aabae90606cac43ade63597936bec37a22d510c0  math_dataset/test/aime_90_20250504.json
dc105d5747a37031d1f981865dd5603d533488a435b8a2a0722fd167081912d1  math_dataset/test/olymath_200_20250511.json
35ae8108e8cb856813dc4aeb7de261b794ec2424ddb19c81449d1007a71f1fb8  qa_dataset/train/hotpotqa_1000_20250402.json
71240de787bb08c59b09bbb5fa4daa2cb536849da29dfdd25bf9e27c7eff344b  math_dataset/train/math_1000_20250414.json
af3aaef02faf2264aa32e30ca9b531b26ca7662f6be87a718ef3f5eb139e31ba  math_dataset/train/math_medium_1000_20250430.json
"""
BENCHMARK_FILES = {path: sha256 for sha256, path in map(str.split, BENCHMARK_SUMS.strip().splitlines())}


def task_of(path):
    """(split, task) of a benchmark file: qa_dataset/test/hotpotqa_500_20250422.json -> ("test", "hotpotqa")."""
    _, split, name = path.split("/")
    return split, name.rsplit("_", 2)[0].replace("olymath", "olymmath")


class Source(NamedTuple):
    """A repository on the Hugging Face Hub. revision: a commit, or None where it is not known: the newest is taken."""

    repository: str
    kind: str  # "model" | "dataset"
    revision: str | None = None


FILES = ["*.json", "*.jsonl", "*.gz", "*.safetensors", "*.txt", "*.model", "*.jinja", "part_*"]
_TEACHER = "agent-distillation/Qwen2.5-32B-Instruct_"  # trajectories of the paper's teacher
SOURCES = {
    "cot-trajectories": Source(_TEACHER + "cot_trajectories_2k", "dataset"),
    "agent-trajectories": Source(_TEACHER + "agent_trajectories_2k", "dataset"),
    "prefix-trajectories": Source(_TEACHER + "agent_trajectories_2k_prefix", "dataset"),
    "authors-student": Source("agent-distillation/agent_distilled_Qwen2.5-1.5B-Instruct", "model"),
    # Wikipedia 2018 in 21,015,324 passages of 100 words, and e5-base-v2's vectors of them; published with Search-R1.
    "wiki-18": Source("PeterJinGo/wiki-18-corpus", "dataset", "69c1c00ffe7c5554c68d8548355cb22e46aabc51"),
    "e5-index": Source("PeterJinGo/wiki-18-e5-index", "dataset", "a4d31160a035f30764604f4827cd8f1d0315eb86"),
}
MODELS = [  # pinned models; any other model on the Hub can be named too
    Source("intfloat/e5-base-v2", "model", "f52bf8ec8c7124536f0efb74aca902b2995e5bcd"),
    Source("Qwen/Qwen2.5-0.5B-Instruct", "model", "7ae557604adf67be50417f59c2c2f167def9a775"),
    Source("Qwen/Qwen2.5-1.5B-Instruct", "model", "989aa7980e4cf806f80c7fef2b1adb7bc71aa306"),
    Source("Qwen/Qwen2.5-3B-Instruct", "model", "aa8e72537993ba99e69dfaafa59ed015b17504d1"),
    Source("Qwen/Qwen2.5-7B-Instruct", "model", "a09a35458c702b33eeacc393d103063234e8bc28"),
]
SOURCES |= {source.repository: source for source in MODELS}


def model_folder(repository, to):
    """The folder of a model in the cache that transformers reads."""
    return Path(to) / "hub" / f"models--{repository.replace('/', '--')}"


# ------------- Download


@dataclasses.dataclass(kw_only=True)
class DownloadConfig:
    names: list[str] = option(REQUIRED, "benchmarks, a source of paper/data.py, or a model on the Hub", positional=True)
    to: str = option(REQUIRED, "folder that gets download/ and hub/")


def download(config):
    """Download sources at their pinned versions. The same command continues after an interruption."""
    for name in config.names:
        if name == "benchmarks":
            folder = download_benchmarks(Path(config.to) / "download" / name)
        else:
            folder = download_repository(name, config.to)
        print(f"{name}: {folder}")


def download_benchmarks(folder, address=BENCHMARKS):
    """Download the authors' benchmark files; InputError for one whose sha256 is not the pinned one."""
    session = http_session()
    for path, sha256 in BENCHMARK_FILES.items():
        url = f"{address}/{path}"
        try:
            response = session.get(url, timeout=60)
            response.raise_for_status()
        except OSError as error:  # all errors of requests
            raise ServerError(f"{url}: {error}") from None
        found = hashlib.sha256(response.content).hexdigest()
        if found != sha256:
            raise InputError(f"{url}: sha256 {found}, but {sha256} is pinned: the authors changed this file")
        with replace_file(folder / path, "wb") as file:
            file.write(response.content)
    return folder


def download_repository(name, to):
    """Download a repository on the Hub at its pinned commit, or else at the newest one."""
    import huggingface_hub  # its settings are read from the environment when it is imported

    source = SOURCES.get(name) or Source(name, "model")
    cached = name == source.repository
    where = {"cache_dir": Path(to) / "hub"} if cached else {"local_dir": Path(to) / "download" / name}
    try:
        folder = huggingface_hub.snapshot_download(
            source.repository, repo_type=source.kind, revision=source.revision, allow_patterns=FILES, **where
        )
    except Exception as error:  # the Hub's own errors, and those of the HTTP library that it uses
        reason = str(error).strip() or type(error).__name__
        raise ServerError(f"{source.repository}: {reason.splitlines()[0]}") from None
    if cached:  # refs/main names the commit that transformers takes for this name
        with replace_file(model_folder(name, to) / "refs/main") as file:
            file.write(Path(folder).name)
    return folder


# ------------- Formats


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
        "download": (DownloadConfig, download),
        "tasks": (TasksConfig, make_tasks),
        "trajectories": (TrajectoriesConfig, convert_trajectories),
    }
    run_command_line(__doc__, commands)
