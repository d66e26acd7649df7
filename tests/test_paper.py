"""`make paper`: published formats made ours, the plan and its refusals, and the very stages on stand-ins."""

import gzip
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import miniature
import paper
import rehearsal
from chat import encode_row
from common import InputError, read_jsonl
from sources import BENCHMARKS
from tasks import Prompts, load_tasks

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    miniature.make_world(miniature.WorldConfig(out=str(folder / "world"), train_questions=40, test_questions=2, seed=5))
    rehearsal.make_benchmarks(folder / "world", folder / "www")
    rehearsal.make_trajectories(folder / "world", folder / "www")
    rehearsal.make_passages([row for _, row in read_jsonl(folder / "world/passages.jsonl")], folder / "www")
    return folder


def published(world, name, file=""):
    return rehearsal.place(world / "www", rehearsal.SOURCES[name], file)


# Formats


def test_tasks_state_what_the_files_do_not(world, tmp_path, capsys):
    paper.make_tasks(paper.TasksConfig(folder=str(published(world, "benchmarks")), out=str(tmp_path)))
    assert "train math_medium" in capsys.readouterr().out
    tests = load_tasks(sorted((tmp_path / "test").glob("*.jsonl")))
    original = {row["question"]: row for path in (world / "world/test").glob("*.jsonl") for _, row in read_jsonl(path)}
    assert len(tests) == 16
    for row in tests:
        for field in ("task", "kind", "domain"):
            assert row[field] == original[row["question"]][field]
    train = load_tasks(sorted((tmp_path / "train").glob("*.jsonl")))
    assert {row["task"] for row in train} == {"hotpotqa", "math", "math_medium"}
    answers = [e["answer"] for path in BENCHMARKS if "/train/" in path for e in examples(world, path)]
    assert answers.count(None) == 2 and len(train) == len(answers) - 2


def examples(world, path):
    return json.loads(published(world, "benchmarks", f"data_processor/{path}").read_text())["examples"]


def test_published_trajectories_become_what_our_agent_would_have_said(world, tmp_path):
    """The stand-ins are our own chats, written as smolagents logs them: read back, they are the same again."""
    for name, chat in (("agent-trajectories", 0), ("cot-trajectories", 1)):
        out = tmp_path / f"{name}.jsonl"
        paper.convert_trajectories(paper.TrajectoriesConfig(rows=[str(published(world, name))], out=str(out)))
        teacher = miniature.Teacher(miniature.TeacherConfig(world=str(world / "world")))
        questions = [row["question"] for _, row in read_jsonl(world / "world/train.jsonl")][::6]
        expected = [miniature.rehearse(teacher, question, Prompts())[chat] for question in questions]
        assert [row["messages"] for _, row in read_jsonl(out)] == expected
    texts = published(world, "agent-trajectories", "train.jsonl").read_text()
    assert "===== Document 0, similarity:" in texts and "Call id: call_" in texts and '"log_data": null' in texts


def test_converted_rows_train_as_published_ones_do(world, tmp_path, tiny_tokenizer):
    """The same tokens in the loss: conversion changes the words of observations, which are never trained."""
    out = tmp_path / "train.jsonl"
    files = [str(published(world, "agent-trajectories", "train.jsonl"))]
    paper.convert_trajectories(paper.TrajectoriesConfig(rows=files, out=str(out)))
    raw = [row for _, row in read_jsonl(files[0]) if row["log_data"]]
    for before, (_, after) in zip(raw, read_jsonl(out), strict=True):
        trained = [
            [token for token, mask in zip(*encode_row(tiny_tokenizer, row), strict=True) if mask]
            for row in (before, after)
        ]
        assert trained[0] == trained[1] and trained[0]


def test_rows_that_the_authors_leave_out_are_left_out(tmp_path, capsys):
    text = [{"type": "text", "text": "x"}]
    turns = [{"role": role, "content": text} for role in ("system", "user", "assistant")]
    rows = [
        {"log_data": None},
        {"log_data": {"messages": [turns[0], turns[1], turns[0], turns[2]]}},
        {"log_data": {"messages": turns}},
    ]
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = paper.TrajectoriesConfig(rows=[str(file.parent)], out=str(tmp_path / "train.jsonl"))
    paper.convert_trajectories(config)
    assert "1 conversations, 2 rows left out" in capsys.readouterr().out
    file.write_text('{"log_data": {}}\n')
    with pytest.raises(InputError, match=r"in: none of 1 rows holds a conversation"):
        paper.convert_trajectories(config)
    file.write_text('{"text": "x"}\n')
    with pytest.raises(InputError, match=r"rows.jsonl:1: log_data.messages, or messages and response, were expected"):
        paper.convert_trajectories(config)
    file.unlink()
    with pytest.raises(InputError, match="no .jsonl file there"):
        paper.convert_trajectories(config)


def test_the_passages_are_in_a_tar(world, tmp_path):
    archive, out = published(world, "wiki-18", "wiki-18.jsonl.gz"), tmp_path / "passages.jsonl"
    assert gzip.decompress(archive.read_bytes())[:5] == b"data/"  # what unzipping alone would begin with
    paper.unpack(paper.UnpackConfig(archive=str(archive), out=str(out), quiet=True))
    assert list(read_jsonl(out)) == list(read_jsonl(world / "world/passages.jsonl"))
    out.unlink()
    for content in (archive.read_bytes()[:-20_000], gzip.compress(b'{"id": "1"}\n'), b"not gzip", b""):
        (tmp_path / "broken.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"broken.gz: .*; a gzipped tar of one file was expected") as caught:
            paper.unpack(paper.UnpackConfig(archive=str(tmp_path / "broken.gz"), out=str(out), quiet=True))
        assert "\n" not in str(caught.value) and os.listdir(tmp_path) == ["broken.gz"]


# The plan


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Configuration and tokenizer of a small Qwen2, without weights: the plan makes random ones."""
    folder = tmp_path_factory.mktemp("student")
    (folder / "world").mkdir()
    (folder / "world/train.jsonl").write_text('{"question": "Who?"}\n')
    rehearsal.make_students([{"contents": '"A"\nb c'}], folder / "world", folder / "www", 0)
    model = rehearsal.place(folder / "www", rehearsal.SOURCES["Qwen/Qwen2.5-0.5B-Instruct"])
    (model / "model.safetensors").unlink()
    return str(model)


def plan_config(student, tmp_path, **more):
    defaults = {"student": student, "to": str(tmp_path), "out": str(tmp_path / "plan.json"), "quiet": True}
    return paper.PlanConfig(**defaults | more)


def test_plan_tells_all_three_and_measures(student, tmp_path, capsys):
    passages = tmp_path / "own.jsonl"
    passages.write_text('{"id": "1", "contents": "x"}\n')
    paper.plan(plan_config(student, tmp_path, passages=str(passages), yes=True))
    out = capsys.readouterr().out
    assert re.search(r"\| wiki \| 5.1 GB \| 48.2 GB \| 3.1 GB \|", out)
    assert re.search(r"\| e5 \| 70.1 GB \| 84.5 GB \| 64.6 GB \|", out)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "| 5.1 GB | 48.2 GB | 3.1 GB |" in readme and "| 70.1 GB | 84.5 GB | 64.6 GB, of RAM" in readme
    assert f"| -> {passages} | 0.0 MB |" in out
    hours = dict(re.findall(r"^\| ((?:train|evaluate|download) [^|]+?) \| ([\d.]+) \|$", out, re.M))
    assert len(hours) == 2 + len(paper.TRAINING) + len(paper.ROWS)
    plan = json.loads((tmp_path / "plan.json").read_text())
    measured = plan["measured"]
    steps = measured["step_seconds"]
    assert measured["training_tokens_per_second"] > 0 and all(steps[n] > 0 for n in ("1", "8"))
    training = 2 * 2000 * 2500 / measured["training_tokens_per_second"] / 3600
    assert plan["hours"]["train agent"] == pytest.approx(training)
    rows = paper.ROWS["agent.sc8"]
    turns = 2915 * rows[0]
    seconds = turns * rows[1] / measured["prefill_tokens_per_second"]
    seconds += turns * rows[2] * steps["8"] / measured["batch"]["8"]
    assert plan["hours"]["evaluate agent.sc8"] == pytest.approx(seconds / 3600)


def machine(**more):
    return {"cores": 1, "memory": 2e10, "disk": 1e12, "gpu": None, "gpu_memory": 0} | more


@pytest.mark.parametrize(
    "passages, here, message",
    [
        ("wiki", machine(disk=4e10), r"PASSAGES=wiki: 48.2 GB of disk are needed in there, 40.0 GB are free"),
        ("wiki", machine(memory=2e9), r"PASSAGES=wiki: 3.1 GB of memory are needed, here are 2.0 GB"),
        ("e5", machine(), r"PASSAGES=e5: 64.6 GB of memory are needed, here are 20.0 GB; PASSAGES=wiki needs less"),
        ("e5", machine(gpu_memory=80e9), r"PASSAGES=e5: 64.6 GB of memory are needed, here are 64.0 GB"),
        ("e5", machine(gpu_memory=140e9), None),
        ("e5", machine(memory=7e10), None),
        ("http://127.0.0.1:8000", machine(disk=1e6, memory=1e6), None),
    ],
)
def test_plan_refuses_what_cannot_be(passages, here, message):
    config = paper.PlanConfig(student="s", to="there", out="", passages=passages)
    cost = paper.passages_cost(passages, paper.Table())
    if message is None:
        return paper.refuse_what_cannot_be(config, here, cost, 0, used=0)
    with pytest.raises(InputError, match=message):
        paper.refuse_what_cannot_be(config, here, cost, 0, used=0)
    if "disk" in message:  # what an earlier run has brought is not needed again
        paper.refuse_what_cannot_be(config, here, cost, 0, used=2e10)


def test_plan_refuses_a_student_that_does_not_fit(student):
    with pytest.raises(InputError, match=r"a student of 0.0B parameters needs .* MB, here are 0.0 MB"):
        paper.measure(student, machine(memory=1e3))


@pytest.mark.parametrize("answer, status", [("n\n", 2), ("\n", 2), ("y\n", 0)])
def test_plan_asks_on_a_terminal(answer, status):
    ours, theirs = pty.openpty()
    code = "import paper; paper.run_command_line('', {'x': (paper.PlanConfig, paper.confirm)})"
    command = [sys.executable, "-c", code, "x", "--student", "s", "--to", "t", "--out", "o"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs)
    os.write(ours, answer.encode())
    assert process.wait(60) == status
    assert b"Go on? [y/N]" in os.read(ours, 4096)


def test_plan_without_a_terminal_wants_yes(student, tmp_path):
    with pytest.raises(InputError, match=r"nobody is here to agree: YES=1"):
        paper.confirm(plan_config(student, tmp_path))
    assert not (tmp_path / "plan.json").exists()


# The stages, through the Makefile


def test_the_stages_on_stand_ins(tmp_path):
    """What `make rehearse` runs, with fewer rows: downloads, training, evaluation; a second time, nothing."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    make = ["make", "VENV=", f"PYTHON={sys.executable}", f"REHEARSAL={tmp_path}", "PAPER_ROWS=cot.cot-rag prefix.sc8",
            "AUTHORS_ROWS=greedy"]  # fmt: skip
    done = subprocess.run([*make, "rehearse"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    results = sorted(path.parent.name for path in tmp_path.rglob("results.json"))
    student = "Qwen2.5-0.5B-Instruct"
    assert results == sorted([f"{student}.cot.cot-rag", f"{student}.prefix.sc8", f"{student}.agent.greedy",
                              "authors-1.5B.greedy"])  # fmt: skip
    for words in ("| agent distill+prefix | sc8 |", "| cot-rag distill | greedy |", "The paper's averages"):
        assert words in done.stdout
    config = json.loads((tmp_path / "paper/students/published" / student / "prefix/run.json").read_text())
    paper_settings = {"rank": 64, "alpha": 128, "dropout": 0.05, "lr": 2e-4, "batch_size": 8, "epochs": 2,
                      "precision": "bf16", "max_length": 10240, "tuning": "lora"}  # fmt: skip
    assert paper_settings.items() <= config.items()
    for kind in ("cot", "agent", "prefix"):
        assert (tmp_path / f"paper/trajectories/teacher-wiki/{kind}.train.jsonl").stat().st_size
    sources = [f"PAPER={tmp_path}/paper", f"SOURCES={tmp_path}/stand-ins/sources.json"]
    again = subprocess.run(
        [*make, *sources, "paper-evaluate"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert "Nothing to be done for 'paper-evaluate'" in again.stdout
