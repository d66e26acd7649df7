"""`make paper`: the pinned downloads, the published formats, the question before the download, and every stage.

    python -m pytest tests/test_paper.py

The formats are checked on the stand-ins of `make rehearse`; the last test runs `make rehearse` itself.
"""

import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

from agent_distill import Prompts
from common import InputError, load_tasks, read_jsonl
from common.report import TASKS
from miniature import world
from paper import data, rehearse

ROOT = Path(__file__).parent.parent


# Downloads


@contextlib.contextmanager
def file_server(files):
    """Serve {path: bytes} with the headers of the Hub. Yields the address and the list of paths that were asked for."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = urllib.parse.unquote(self.path.partition("?")[0])
            seen.append(path)
            content = files.get(path, b"")
            self.send_response(200 if path in files else 404)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", path.partition("/resolve/")[2].split("/")[0])
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()


def repository(name, commit, files, kind="models"):
    """What the Hub serves of a repository, {path: bytes}: its files, and the two API calls that list them."""
    top = f"/{'datasets/' if kind == 'datasets' else ''}{name}/resolve/{commit}"
    listed = [{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
              for path, content in files.items()]  # fmt: skip
    about = json.dumps({"id": name, "sha": commit, "siblings": []}).encode()
    served = {f"/api/{kind}/{name}/revision/{revision}": about for revision in ("main", commit)}
    served[f"/api/{kind}/{name}/tree/{commit}"] = json.dumps(listed).encode()
    return served | {f"{top}/{path}": content for path, content in files.items()}


def download(to, *targets, **variables):
    """Run make for marks below download/, as `make paper` does, after the question is answered."""
    settings = {"YES": "1", "VENV": "", "PYTHON": sys.executable, "PAPER": to} | variables
    command = [
        "make",
        *(f"{name}={value}" for name, value in settings.items()),
        *(f"{to}/download/{t}" for t in targets),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "0"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_repositories_are_downloaded_at_their_commits(tmp_path):
    student, commit, newest = "Qwen/Qwen2.5-0.5B-Instruct", "7ae557604adf67be50417f59c2c2f167def9a775", "b" * 40
    contents = {"config.json": b"{}", "model.safetensors": b"weights", "photo.png": b"unwanted"}
    files = repository(student, commit, contents)
    dataset = "agent-distillation/Qwen2.5-32B-Instruct_agent_trajectories_2k"
    files |= repository(dataset, newest, {"data/train.jsonl": b"{}\n"}, "datasets")
    with file_server(files) as (endpoint, seen):
        done = download(tmp_path, f"{student}.done", "agent-trajectories.done", HF_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stderr
    assert not any("photo" in path for path in seen)
    cached = tmp_path / "hub" / "models--Qwen--Qwen2.5-0.5B-Instruct"
    assert (cached / "refs/main").read_text() == commit  # where transformers looks for the name
    assert set(os.listdir(cached / "snapshots" / commit)) == {"config.json", "model.safetensors"}
    assert (tmp_path / "download/agent-trajectories/data/train.jsonl").read_bytes() == b"{}\n"


def test_a_download_that_fails_is_not_marked_as_done(tmp_path):
    with file_server({}) as (endpoint, _):
        done = download(tmp_path, "a/b.done", HF_ENDPOINT=endpoint)
    assert done.returncode == 2 and "a/b" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "download/a/b.done").exists()


def test_benchmark_files_must_have_their_sha256(tmp_path):
    """Files with other contents are refused, and so are files that are not there."""
    with file_server({f"/{path}": b'{"examples": []}' for path in data.BENCHMARK_FILES}) as (address, seen):
        done = download(tmp_path, "benchmarks.done", QUESTIONS_URL=address)
    assert seen == [f"/{path}" for path in data.BENCHMARK_FILES]
    assert done.returncode == 2 and f"{data.BENCHMARK_FILES[0]}: FAILED" in done.stdout
    with file_server({}) as (address, _):
        done = download(tmp_path, "benchmarks.done", QUESTIONS_URL=address)
    assert done.returncode == 2 and "404" in done.stderr
    assert not (tmp_path / "download/benchmarks.done").exists()


# The question


@pytest.mark.parametrize("answer, status", [("n\n", 2), ("", 2), ("y\n", 0)])
def test_disk_and_memory_are_stated_before_the_question(answer, status, tmp_path):
    agreed = f"{tmp_path}/agreed/Qwen2.5-0.5B-Instruct.e5"
    command = ["make", "PYTHON=python3", "VENV=", f"PAPER={tmp_path}", "PASSAGES=e5", agreed]
    made = subprocess.run(command, cwd=ROOT, input=answer, capture_output=True, text=True)
    assert made.returncode == status and Path(agreed).exists() == (status == 0)
    for words in ("70.1 GB to download, 150 GB of disk, 65 GB of RAM", "Qwen/Qwen2.5-0.5B-Instruct", "Continue? [y/N]"):
        assert words in made.stdout
    assert ("YES=1" in made.stderr) == (status == 2)


def test_passages_that_are_nowhere_are_refused(tmp_path):
    command = ["make", "VENV=", f"PAPER={tmp_path}", "PASSAGES=wikki", "YES=1", "paper-passages"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 2 and "No rule to make target 'wikki'" in made.stderr


# Formats


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand-ins")
    made = folder / "world"
    world.write(world.Config(out=str(made), train_questions=40, test_questions=2, seed=5))
    rehearse.write_benchmarks(made, folder / "benchmarks")
    rehearse.write_trajectories(made, folder, folder / "index")
    return folder


def test_tasks_state_what_the_files_do_not(stand_ins, tmp_path):
    data.make_tasks(data.TasksConfig(folder=str(stand_ins / "benchmarks"), out=str(tmp_path)))
    tests = load_tasks(sorted((tmp_path / "test").glob("*.jsonl")))
    original = {row["question"]: row for path in stand_ins.glob("world/test/*") for _, row in read_jsonl(path)}
    assert len(tests) == 16
    for row in tests:
        assert all(row[field] == original[row["question"]][field] for field in ("task", "kind", "domain"))
    train = load_tasks(sorted((tmp_path / "train").glob("*.jsonl")))
    assert {row["task"] for row in train} == {"hotpotqa", "math", "math_medium"}
    assert len(train) == 38  # two of the 40 stand-ins have no answer


def test_the_benchmark_files_are_those_of_the_paper():
    tests = {data.task_of(path)[1]: path for path in data.BENCHMARK_FILES if "/test/" in path}
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


# The stages, through the Makefile


def test_every_stage_on_stand_ins(tmp_path):
    """What `make rehearse` runs, with fewer rows of the table; the second time, nothing is left to do."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environment |= {"OMP_NUM_THREADS": "1"}
    make = ["make", "VENV=", f"PYTHON={sys.executable}", f"REHEARSAL={tmp_path}", "PAPER_ROWS=prefix.sc8",
            "AUTHORS_ROWS=greedy"]  # fmt: skip
    done = subprocess.run(
        [*make, "-j2", "rehearse"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    name, results = "Qwen2.5-0.5B-Instruct", tmp_path / "paper/results"
    trainings = {
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
