"""`make paper`: the pinned downloads, the published formats, the question before the download, and every stage.

python -m pytest tests/test_paper.py      # the last test runs a part of `make rehearse`
"""

import contextlib
import functools
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agent_distill import Prompts
from common import InputError, load_tasks
from common.report import TASKS
from conftest import ROOT, chat
from miniature import world
from paper import data, rehearse
from servers import background


@contextlib.contextmanager
def file_server(files, folder):
    """Serve {path: bytes} with the headers of the Hub. Yields the address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self):
            self.send_header("ETag", hashlib.sha1(self.path.encode()).hexdigest())
            self.send_header("X-Repo-Commit", self.path.partition("/resolve/")[2].split("/")[0])
            super().end_headers()

    for path, content in files.items():
        (folder / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        (folder / path[1:]).write_bytes(content)
    with background(
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    ) as url:
        yield url


def repository(name, commit, files, kind="models"):
    """What the Hub serves of a repository, {path: bytes}: its files, and the two API calls that list them."""
    listed = [{"type": "file", "path": path, "size": len(files[path]), "oid": path} for path in files]
    about = json.dumps({"id": name, "sha": commit, "siblings": []}).encode()
    served = {f"/api/{kind}/{name}/revision/{revision}": about for revision in ("main", commit)}
    served[f"/api/{kind}/{name}/tree/{commit}"] = json.dumps(listed).encode()
    top = f"{'/datasets' if kind == 'datasets' else ''}/{name}/resolve/{commit}"
    return served | {f"{top}/{path}": content for path, content in files.items()}


def make(*arguments, **options):
    """make with this Python, outside of any make that runs these tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environment |= {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    command = ["make", "VENV=", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, **options)


def test_repositories_are_downloaded_at_their_commits(tmp_path):
    student, commit, newest = "Qwen/Qwen2.5-0.5B-Instruct", "7ae557604adf67be50417f59c2c2f167def9a775", "b" * 40
    contents = {"config.json": b"{}", "model.safetensors": b"weights", "photo.png": b"unwanted"}
    rows, published = {"a.jsonl": b"1", "b.parquet": b"2"}, "Qwen2.5-32B-Instruct_agent_trajectories_2k"
    files = repository(student, commit, contents)
    files |= repository(f"agent-distillation/{published}", newest, rows, "datasets")
    marks = [f"{tmp_path}/download/{name}.done" for name in (student, "agent-trajectories")]
    with file_server(files, tmp_path / "served") as endpoint:
        done = make("YES=1", f"PAPER={tmp_path}", f"HF_ENDPOINT={endpoint}", *marks)
    assert done.returncode == 0, done.stderr
    cached = tmp_path / "hub/models--Qwen--Qwen2.5-0.5B-Instruct"
    assert (cached / "refs/main").read_text() == commit  # where transformers looks for the name
    assert set(os.listdir(cached / "snapshots" / commit)) == {"config.json", "model.safetensors"}
    assert {name: (tmp_path / "download/agent-trajectories" / name).read_bytes() for name in rows} == rows


@pytest.mark.parametrize("name, served, why", [
    ("a/b", "no server", "error: a/b: .*refused"),
    ("benchmarks", "no server", "error: http://127.0.0.1:9: .*connect"),
    ("pooled", "no files", "error: http.*404"),
    ("pooled", "other files", "hotpotqa.json: FAILED"),
])  # fmt: skip
def test_a_download_that_fails_says_so_in_one_line(name, served, why, tmp_path):
    """The line of make itself, which says where it stopped, comes after ours."""
    sums, mark = ROOT / f"paper/{name}.sha256", f"{tmp_path}/download/{name}.done"
    files = [line.split()[1] for line in sums.read_text().splitlines()] if served == "other files" else []
    with file_server({f"/{path}": b"{}" for path in files}, tmp_path) as address:
        place = "http://127.0.0.1:9" if served == "no server" else address
        done = make("YES=1", f"PAPER={tmp_path}", f"HF_ENDPOINT={place}", f"URL_{name}={place}", mark)
    assert re.search(why, done.stdout if files else done.stderr.splitlines()[0])
    assert done.returncode == 2 and done.stderr.splitlines()[1].startswith("make: ***") and not Path(mark).exists()


# The question, and local data


@pytest.mark.parametrize("answer, status", [("n\n", 2), ("", 2), ("y\n", 0)])
def test_disk_and_memory_are_stated_before_the_question(answer, status, tmp_path):
    agreed = f"{tmp_path}/agreed/Qwen2.5-0.5B-Instruct.e5"
    made = make(f"PAPER={tmp_path}", "PASSAGES=e5", agreed, input=answer)
    assert made.returncode == status and Path(agreed).exists() == (status == 0)
    stated = ("70.1 GB to download, 150 GB of disk, 65 GB of RAM", "Qwen/Qwen2.5-0.5B-Instruct", "Continue? [y/N]")
    assert all(words in made.stdout for words in stated)
    assert ("YES=1" in made.stderr) == (status == 2)


def test_local_data_needs_no_download_and_must_be_there(tmp_path):
    needed = {"PASSAGES": "", "TRAJECTORIES": "/cot.jsonl", "QUESTIONS": "/*.jsonl", "STUDENT": "/config.json"}
    files = "PASSAGES TRAJECTORIES/cot.jsonl TRAJECTORIES/agent.parquet QUESTIONS/a.jsonl STUDENT/config.json"
    for file in files.split():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    paper = ["-n", "paper", f"PAPER={tmp_path}", *(f"{name}={tmp_path}/{name}" for name in needed)]
    made = make(*paper)
    assert made.returncode == 0 and "evaluate.py report" in made.stdout and "--limit" not in made.stdout
    assert not any(word in made.stdout for word in ("hf download", "curl", "Continue?"))
    made = make(*paper, "PASSAGES=http://127.0.0.1:9")  # a /retrieve server
    assert made.returncode == 0 and "--search http://127.0.0.1:9" in made.stdout and " build " not in made.stdout
    for name, file in needed.items():
        made = make(*paper, f"{name}={tmp_path}/nowhere")
        assert made.returncode == 2 and f"No rule to make target '{tmp_path}/nowhere{file}'" in made.stderr


# Formats


@pytest.mark.parametrize("pooled", [False, True])
def test_tasks_state_what_the_files_do_not(pooled, tmp_path):
    """HippoRAG's questions replace the authors' facts; no question is in training and test; each passage once."""
    stand_ins = tmp_path / "stand-ins"
    world.write(world.Config(out=str(stand_ins / "world"), train_questions=40, test_questions=2, seed=5))
    rehearse.write_questions(stand_ins / "world", stand_ins)
    file = stand_ins / "benchmarks" / data.BENCHMARK_FILES[-1]
    file.write_text(re.sub('"answer": "[^"]*"', '"answer": null', file.read_text(), count=1))  # as in four of theirs
    folders = {"folder": str(stand_ins / "benchmarks"), "pooled": str(stand_ins / "pooled") if pooled else None}
    data.make_tasks(data.TasksConfig(**folders, out=str(tmp_path)))
    tests, train = (load_tasks(sorted((tmp_path / split).glob("*.jsonl"))) for split in ("test", "train"))
    counts = {task: sum(row["task"] == task for row in train) for task in ("hotpotqa", "math", "math_medium")}
    assert counts["math_medium"] == counts["math"] - 1
    assert counts["hotpotqa"] == ((41 - counts["math"]) // 2 if pooled else 40 - counts["math"])
    assert not {row["question"] for row in tests} & {row["question"] for row in train}
    assert {row["task"] for row in tests} == set(TASKS) - ({"bamboogle"} if pooled else set())
    assert all((row["kind"], row["domain"]) == (TASKS[row["task"]].kind, TASKS[row["task"]].domain) for row in tests)
    assert [row["aliases"] for row in tests if row["aliases"]] == [["an alias"]] * 2 * pooled
    if pooled:
        passages, original = (rehearse.rows_of(f / "passages.jsonl") for f in (tmp_path, stand_ins / "world"))
        assert sorted(row["contents"] for row in passages) == sorted(row["contents"] for row in original)


def convert(source, out, **options):
    data.make_training_file(data.TrajectoriesConfig(source=str(source), out=str(out), **options))
    return rehearse.rows_of(out)


STEP = "Thought: ...\nCode:\n```py\n{}\n```<end_code>".format
FOUND = "Observation:\nExecution logs:\n[1] Ada Orr\nBorn in Oslo.\n[2] Oslo\nA city.\n"
CHATS = {
    "agent": ["prompt", "New task:\nWhere?", STEP("print(web_search('Ada'))"), FOUND, STEP("final_answer('Oslo')")],
    "cot": ["prompt", "Where?", "She was born in \\boxed{Oslo}."],
}
TASK = {"id": "1", "task": "hotpotqa", "kind": "fact", "question": "Where?", "answer": "Oslo"}
END = {"prediction": "Oslo", "stop": "final_answer", "correct": False, "tools": ["web_search"]}  # the grade is wrong


def collected_row(method):
    return TASK | END | {"method": method, "messages": chat(*CHATS[method]), "steps": [{"error_kind": None}]}


@pytest.mark.parametrize("method", ["cot", "agent"])
def test_trajectories_become_training_rows(method, tmp_path):
    """The authors' rows, with the log as an object or as text, and collect's, which are graded again, give the same."""
    row, prompts = collected_row(method), Prompts()
    system = prompts.cot_system if method == "cot" else prompts.system("agent_student_system", ["web_search"])
    expected = [{"role": "system", "content": system}, *row["messages"][1:]]
    published = rehearse.published_row(row)
    if method == "agent":
        words = ("===== Document 0, similarity:", "Call id: call_", "Retrieved documents:")
        assert all(each in json.dumps(published) for each in words)
        published["log_data"]["messages"][1]["content"][0]["text"] += " <reference>x</reference>\n\nIMPORTANT: ..."
        for message in published["log_data"]["messages"]:
            message["role"] = "MessageRole." + message["role"].upper().replace("-", "_")
    for number, form in enumerate((published, rehearse.published_row(row, log_as_text=True))):
        rehearse.write_rows([form], tmp_path / f"{number}/data/train")
        (made,) = convert(tmp_path / f"{number}", tmp_path / "out.jsonl", prefix=True)
        assert made == {"messages": expected, "method": method, "prefix": True}
    rehearse.write_rows([row], tmp_path / "collected")
    (made,) = convert(tmp_path / "collected.jsonl", tmp_path / "out.jsonl")
    assert made["messages"] == expected and not made["prefix"]


TWO_SYSTEMS = {"messages": [{"role": role, "content": []} for role in ("system", "user", "system", "assistant")]}
DROPPED, EXPECTED = r"\(1 rows dropped\)", "a.jsonl:1: a row of {} was expected".format


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", {"question": "", "log_data": "null"}, DROPPED),
    ("a.jsonl", {"question": "", "log_data": TWO_SYSTEMS}, DROPPED),
    ("a.jsonl", {"text": "x"}, EXPECTED("the authors")),
    ("a.jsonl", {"log_data": "{"}, EXPECTED("the authors")),
    ("a.jsonl", {"steps": []}, EXPECTED("collect")),
    ("a.parquet", {}, "a.parquet: parquet files need pyarrow: pip install pyarrow"),
])  # fmt: skip
def test_other_files_are_refused_in_one_line(name, content, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        convert(tmp_path / name, tmp_path / "out")


DATA_STAGES = "paper-data paper-passages paper-trajectories"


def test_every_stage_on_stand_ins(tmp_path):
    """One way of `make rehearse` is run from its stand-ins to a row of the table. Of the other ways, the stages before
    training run, and the remaining commands are shown."""
    given = f"REHEARSAL={tmp_path}"
    quick = "PAPER_TRAIN_OPTIONS=--precision fp32 --epochs 1"  # bf16 is slow on many CPUs
    for way, stages in {"e5": "paper-evaluate", "wiki": DATA_STAGES, "local": DATA_STAGES}.items():
        done = make("-j2", f"rehearse-{way}", given, f"STAGES={stages}", quick)
        assert done.returncode == 0, done.stderr[-3000:]
    (evaluated,) = tmp_path.glob("paper/results/*/*/model.json")
    assert json.loads(evaluated.read_text())["training"] == "distill"
    shown = make("-n", "rehearse", given)
    assert shown.returncode == 0 and not re.search("hf download|retriever.py build .*(e5|wiki|gz)", shown.stdout)
    rows = re.findall(r"/results/\S+/\S*?\b(base|cot|agent|prefix|1.5B)\.(\S+) ", shown.stdout)
    assert " ".join(f"{learned}.{row}" for learned, row in rows) == (
        "base.cot base.agent cot.cot cot.cot-rag agent.greedy agent.sc8 base.agent.sc8 prefix.greedy prefix.sc8 "
        "base.agent agent.sc8 1.5B.greedy 1.5B.sc8"  # pooled passages, local data, the authors' student
    )
    assert len(re.findall(" train.py ", shown.stdout)) == 3 and shown.stdout.count("evaluate.py report") == 4
