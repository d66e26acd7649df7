"""`make paper`: the pinned downloads, the published formats, the question before the download, and every stage.

    python -m pytest tests/test_paper.py

The formats are checked on the stand-ins of `make rehearse`; the last test runs `make rehearse` itself.
"""

import contextlib
import gzip
import hashlib
import http.server
import json
import os
import pty
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

from agent_distill import Prompts
from common import InputError, load_tasks, read_jsonl
from common.client import ServerError
from common.report import TASKS
from miniature import world
from paper import data, rehearse

ROOT = Path(__file__).parent.parent


# Downloads


@contextlib.contextmanager
def file_server(files):
    """Serve {path: bytes}, with the headers and the two API calls by which the Hub serves its repositories."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = urllib.parse.unquote(self.path.partition("?")[0])
            seen.append(path)
            if path.startswith("/api/"):
                return self.answer(*self.api(path.split("/")[2:]))
            self.answer(200 if path in files else 404, files.get(path, b""))

        do_HEAD = do_GET

        def api(self, parts):
            kind, owner, name, what, commit = parts[:5]
            top = f"/{'datasets/' if kind == 'datasets' else ''}{owner}/{name}/resolve/"
            paths = [path for path in files if path.startswith(top)]
            if not paths:
                return 404, b""
            newest = paths[0].removeprefix(top).split("/")[0]
            if what == "revision":
                return 200, json.dumps({"id": f"{owner}/{name}", "sha": newest, "siblings": []}).encode()
            rows = [{"type": "file", "path": path.removeprefix(f"{top}{commit}/"), "size": len(files[path]),
                     "oid": hashlib.sha1(files[path]).hexdigest()} for path in paths]  # fmt: skip
            return 200, json.dumps(rows).encode()

        def answer(self, status, content):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", self.path.partition("/resolve/")[2].split("/")[0])
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def download(endpoint, to, *names):
    """Run the command in a new process, because huggingface_hub reads its environment once."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "paper.data", "download", *names, "--to", str(to)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_repositories_are_downloaded_at_their_commits(tmp_path):
    student, commit, newest = "Qwen/Qwen2.5-0.5B-Instruct", "7ae557604adf67be50417f59c2c2f167def9a775", "b" * 40
    dataset = f"/datasets/{data.SOURCES['agent-trajectories'].repository}/resolve/{newest}/"
    files = {f"/{student}/resolve/{commit}/{name}": name.encode() for name in ("config.json", "model.safetensors")}
    files |= {f"/{student}/resolve/{commit}/photo.png": b"not wanted", dataset + "data/train.jsonl": b"{}\n"}
    files[f"/someone/model/resolve/{newest}/config.json"] = b"{}"
    with file_server(files) as (endpoint, seen):
        done = download(endpoint, tmp_path, student, "agent-trajectories", "someone/model")
        assert done.returncode == 0, done.stderr
        assert not any("photo" in path for path in seen)
    cached = data.model_folder(student, tmp_path)
    assert (cached / "refs/main").read_text() == commit  # where transformers looks for the name
    assert set(os.listdir(cached / "snapshots" / commit)) == {"config.json", "model.safetensors"}
    assert (tmp_path / "download/agent-trajectories/data/train.jsonl").read_bytes() == b"{}\n"
    assert (data.model_folder("someone/model", tmp_path) / "refs/main").read_text() == newest
    # A model without a pinned commit stays at the commit of its first download.
    with file_server({f"/someone/model/resolve/{'c' * 40}/config.json": b"new", **files}) as (endpoint, seen):
        assert download(endpoint, tmp_path, "someone/model").returncode == 0
        assert (data.model_folder("someone/model", tmp_path) / "refs/main").read_text() == newest


@pytest.mark.parametrize(
    "name, status, message", [("no-source", 2, "no-source: benchmarks, OWNER/MODEL, or"), ("a/b", 1, "a/b: ")]
)
def test_a_download_that_fails_says_so_in_one_line(tmp_path, name, status, message):
    with file_server({}) as (endpoint, _):
        done = download(endpoint, tmp_path, name)
    assert done.returncode == status and message in done.stderr and "Traceback" not in done.stderr


def test_benchmark_files_must_have_their_sha256(tmp_path, monkeypatch):
    content, path = b'{"examples": []}', "qa_dataset/test/x.json"
    monkeypatch.setattr(data, "BENCHMARK_FILES", {path: ("hotpotqa", hashlib.sha256(content).hexdigest())})
    with file_server({f"/{path}": content}) as (address, _):
        data.download_benchmarks(tmp_path, address)
        assert (tmp_path / path).read_bytes() == content
    (tmp_path / path).unlink()
    with file_server({f"/{path}": content + b" "}) as (address, _):
        with pytest.raises(InputError, match=r"x.json: sha256 \w+, but \w+ is pinned"):
            data.download_benchmarks(tmp_path, address)
    with file_server({}) as (address, _), pytest.raises(ServerError, match="404"):
        data.download_benchmarks(tmp_path, address)
    assert not (tmp_path / path).exists()


# The question


@pytest.mark.parametrize("answer, status", [("n\n", 2), ("\n", 2), ("y\n", 0)])
def test_disk_and_memory_are_stated_before_the_question(answer, status, tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "paper.data", "ask", "--student", "Qwen/Qwen2.5-0.5B-Instruct",
               "--passages", "e5", "--to", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs)
    os.write(ours, answer.encode())
    assert process.wait(60) == status
    printed = os.read(ours, 4096).decode()
    for words in ("70.1 GB of passages, 1.0 GB of Qwen", "150 GB for passages", "65 GB of RAM", "Continue? [y/N]"):
        assert words in printed


def test_without_a_terminal_yes_must_be_given(tmp_path, capsys):
    config = {"student": "some/model", "to": str(tmp_path)}
    with pytest.raises(InputError, match="YES=1"):
        data.ask(data.AskConfig(passages="wiki", **config))
    data.ask(data.AskConfig(passages="http://127.0.0.1:8000", yes=True, **config))
    assert capsys.readouterr().out.count("\n") == 6
    with pytest.raises(InputError, match=r"PASSAGES=wikki: wiki, e5, a file of passages or a server's URL"):
        data.ask(data.AskConfig(passages="wikki", yes=True, **config))


# Formats


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand-ins")
    made = folder / "world"
    world.write(world.Config(out=str(made), train_questions=40, test_questions=2, seed=5))
    rehearse.write_benchmarks(made, folder / "benchmarks")
    rehearse.write_trajectories(made, folder, folder / "index")
    rehearse.write_archive([row for _, row in read_jsonl(made / "passages.jsonl")], folder / "wiki-18")
    return folder


def test_tasks_state_what_the_files_do_not(stand_ins, tmp_path):
    data.make_tasks(data.TasksConfig(folder=str(stand_ins / "benchmarks"), out=str(tmp_path)))
    tests = load_tasks(sorted((tmp_path / "test").glob("*.jsonl")))
    original = {row["question"]: row for path in stand_ins.glob("world/test/*") for _, row in read_jsonl(path)}
    assert len(tests) == 16
    for row in tests:
        assert [row[f] for f in ("task", "kind", "domain")] == [
            original[row["question"]][f] for f in ("task", "kind", "domain")
        ]
    train = load_tasks(sorted((tmp_path / "train").glob("*.jsonl")))
    assert {row["task"] for row in train} == {"hotpotqa", "math", "math_medium"}
    assert len(train) == 38  # two of the 40 stand-ins have no answer


def test_the_benchmark_files_are_those_of_the_paper():
    tests = {task: path for path, (task, _) in data.BENCHMARK_FILES.items() if "/test/" in path}
    assert list(tests) == list(TASKS)
    assert all(f"_{TASKS[task].questions}_" in path for task, path in tests.items())
    assert sum(task.questions for task in TASKS.values()) == 2915


@pytest.mark.parametrize("kind", ["cot", "agent", "prefix"])
def test_published_trajectories_become_our_training_rows(kind, stand_ins, tmp_path):
    """The stand-ins are our own conversations in the published format: converted, they are the same again."""
    source, out = stand_ins / f"{kind}-trajectories", tmp_path / "train.jsonl"
    config = data.TrajectoriesConfig(folder=str(source), out=str(out), prefix=kind == "prefix")
    data.convert_trajectories(config)
    expected, prompts = [], Prompts()
    for _, chats in rehearse.chats_of(stand_ins / "world", stand_ins / "index"):
        system = prompts.cot_system if kind == "cot" else prompts.system("agent_student_system", ["web_search"])
        messages = [{"role": "system", "content": system}, *chats[kind][1:]]
        method = "cot" if kind == "cot" else "agent"
        expected.append({"messages": messages, "method": method, "prefix": kind == "prefix"})
    assert [row for _, row in read_jsonl(out)] == expected and len(expected) == 7
    if kind != "cot":
        published = (source / "train.jsonl").read_text()
        assert all(text in published for text in ("===== Document 0, similarity:", "Call id: call_", "Retrieved"))


def test_rows_that_the_authors_drop_are_dropped(tmp_path, capsys):
    text = [{"type": "text", "text": "x"}]
    turns = [{"role": f"MessageRole.{role}", "content": text} for role in ("SYSTEM", "USER", "ASSISTANT")]
    rows = [{"log_data": None}, {"log_data": {"messages": [turns[0], turns[1], turns[0], turns[2]]}},
            {"log_data": {"messages": turns}}]  # fmt: skip
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.train"
    config = data.TrajectoriesConfig(folder=str(tmp_path), out=str(out))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data.convert_trajectories(config)
    assert "1 conversations, 2 rows dropped" in capsys.readouterr().out
    for content, message in (
        ('{"log_data": null}\n', r"no conversation in its .jsonl files \(1 rows dropped\)"),
        ('{"text": "x"}\n', r"rows.jsonl:1: log_data.messages, or messages and response, were expected"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            data.convert_trajectories(config)


def test_the_passages_are_in_a_tar(stand_ins, tmp_path):
    archive, out = stand_ins / "wiki-18/wiki-18.jsonl.gz", tmp_path / "passages.jsonl"
    assert gzip.decompress(archive.read_bytes())[:5] == b"data/"  # what gunzip alone would begin with
    data.unpack(data.UnpackConfig(archive=str(archive), out=str(out)))
    assert list(read_jsonl(out)) == list(read_jsonl(stand_ins / "world/passages.jsonl"))
    out.unlink()
    for content in (archive.read_bytes()[:5000], gzip.compress(b'{"id": "1"}\n'), b"not gzip", b""):
        (tmp_path / "broken.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"^[^\n]*broken.gz: [^\n]*; a gzipped tar of one file was expected$"):
            data.unpack(data.UnpackConfig(archive=str(tmp_path / "broken.gz"), out=str(out)))
        assert os.listdir(tmp_path) == ["broken.gz"]


# The stages, through the Makefile


def test_every_stage_on_stand_ins(tmp_path):
    """What `make rehearse` runs, with fewer rows of the table; the second time, nothing is left to do."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    make = ["make", "VENV=", f"PYTHON={sys.executable}", f"REHEARSAL={tmp_path}", "PAPER_ROWS=cot.cot-rag prefix.sc8",
            "AUTHORS_ROWS=greedy"]  # fmt: skip
    done = subprocess.run([*make, "rehearse"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    name, results = "Qwen2.5-0.5B-Instruct", tmp_path / "paper/results"
    trainings = {
        f"published.wiki/{name}.cot.cot-rag": "distill",
        f"published.wiki/{name}.prefix.sc8": "distill+prefix",
        f"published.e5/{name}.cot.cot-rag": "distill",
        "published.wiki/authors-1.5B.greedy": "distill",
    }
    found = {str(path.parent.relative_to(results)): path for path in results.rglob("model.json")}
    assert {run: json.loads(path.read_text())["training"] for run, path in found.items()} == trainings
    for words in ("| agent distill+prefix | sc8 |", "| cot-rag distill | greedy |"):
        assert words in done.stdout
    config = json.loads((tmp_path / f"paper/students/published/{name}/prefix/run.json").read_text())
    settings = {"rank": 64, "alpha": 128, "dropout": 0.05, "lr": 2e-4, "batch_size": 8, "epochs": 2,
                "precision": "bf16", "max_length": 10240, "tuning": "lora"}  # fmt: skip
    assert settings.items() <= config.items()
    for kind in ("cot", "agent", "prefix"):
        assert (tmp_path / f"paper/trajectories/teacher-wiki/{kind}.train.jsonl").stat().st_size
    again = [*make, f"PAPER={tmp_path}/paper", "paper-evaluate"]
    again = subprocess.run(again, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "Nothing to be done for 'paper-evaluate'" in again.stdout
