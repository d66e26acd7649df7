"""The whole house at a tiny size: world, index, teacher over HTTP, collect, filter, train, evaluate, report.

Nothing is replaced: real searches, really executed code, a really trained (if hardly) student.
"""

import json
import threading
from pathlib import Path

import pytest

import agent_distill
import evaluate
import miniature
import report
import retriever
import train
import trajectories as trajectories_room
from common import InputError, read_jsonl
from tasks import Prompts, load_tasks, open_search

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniature")
    miniature.make_world(miniature.WorldConfig(out=str(folder / "world"), seed=3, train_questions=48, test_questions=2))
    retriever.build(str(folder / "world" / "passages.jsonl"), str(folder / "index"))
    return folder


@pytest.fixture(scope="module")
def teacher(world):
    server = miniature.open_server(miniature.TeacherConfig(world=str(world / "world")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def collect_config(world, url, out, **more):
    defaults = {"search": str(world / "index"), "top_k": 2, "concurrency": 8, "quiet": True}
    return agent_distill.CollectConfig(
        tasks=[str(world / "world" / "train.jsonl")], url=[url], out=str(out), **{**defaults, **more}
    )


@pytest.fixture(scope="module")
def trajectories(world, teacher):
    agent_distill.collect(collect_config(world, teacher, world / "cot.jsonl", method="cot"))
    agent_distill.collect(
        collect_config(world, teacher, world / "agent.jsonl", first_thought=True, cot=str(world / "cot.jsonl"))
    )
    for name in ("cot", "agent"):
        trajectories_room.filter_trajectories(
            trajectories_room.FilterConfig(
                trajectories=[str(world / f"{name}.jsonl")], out=str(world / f"{name}.train.jsonl")
            )
        )
    return [row for _, row in read_jsonl(world / "agent.jsonl")]


@pytest.fixture(scope="module")
def student(world, trajectories):
    base = miniature.BaseConfig(
        world=str(world / "world"), out=str(world / "base"), size="S", documents=8, warmup_steps=4, quiet=True
    )
    miniature.make_base(base)
    train.fit(
        train.Config(
            data=[str(world / "agent.train.jsonl")], model=str(world / "base"), out=str(world / "agent"),
            tuning="full", epochs=1, batch_tokens=2048, threads=1, quiet=True,
            system_prompt=str(ROOT / "prompts" / "agent_student_system.txt"),
        )
    )  # fmt: skip
    return world / "agent"


def test_collect_writes_whole_trajectories(world, trajectories):
    tasks = load_tasks([str(world / "world" / "train.jsonl")])
    assert {(row["task"], row["id"]) for row in trajectories} == {(row["task"], row["id"]) for row in tasks}
    assert sum(row["correct"] for row in trajectories) >= 40  # the script errs at a few per cent
    cots = {row["id"]: row for _, row in read_jsonl(world / "cot.jsonl")}
    for row in trajectories:
        cot = cots[row["id"]]["messages"][-1]["content"]
        assert row["cot"] == cot and row["prefix"] == agent_distill.first_step(cot)
        assert row["messages"][2]["content"].startswith(f"Thought: {row['prefix']}")
        assert row["messages"][2]["content"].count(row["prefix"]) == 1
        assert row["usage"]["requests"] == len(row["steps"]) and row["model"] == "scripted-teacher"
        roles = [m["role"] for m in row["messages"]]
        assert roles[:3] == ["system", "user", "assistant"] and "assistant" in roles[-2:]
    facts = [row for row in trajectories if row["kind"] == "fact" and row["correct"]]
    assert all("[1] " in row["steps"][0]["observation"] for row in facts if not row["steps"][0]["error_kind"])


def test_filter_keeps_only_the_right_ones(world, trajectories):
    kept = {row["id"] for _, row in read_jsonl(world / "agent.train.jsonl")}
    assert kept == {row["id"] for row in trajectories if not trajectories_room.drop_reason(row)}


def test_collect_again_asks_nothing(world, trajectories, capsys):
    before = (world / "agent.jsonl").read_bytes()
    nobody = "http://127.0.0.1:9/v1"
    again = collect_config(world, nobody, world / "agent.jsonl", first_thought=True, cot=str(world / "cot.jsonl"))
    agent_distill.collect(again)
    again.max_steps = 4
    with pytest.raises(InputError, match=r"agent.jsonl.run.json: this was made with --max-steps 5, not 4"):
        agent_distill.collect(again)
    assert (world / "agent.jsonl").read_bytes() == before


def strip_volatile(rows):
    """Rows in order of their question, without the wall clock and the retries."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    for row in rows:
        row["usage"] = {k: v for k, v in row["usage"].items() if k != "retries"}
    return sorted(rows, key=lambda row: (row["task"], row["id"]))


def run_config(world, student, out, **more):
    tests = sorted(str(path) for path in (world / "world" / "test").glob("*.jsonl"))
    defaults = {"search": str(world / "index"), "top_k": 2, "max_tokens": 40, "max_steps": 2, "name": "S"}
    return evaluate.RunConfig(tasks=tests, model=str(student), out=str(world / out), quiet=True, **defaults | more)


def test_evaluate_and_report(world, student, capsys):
    evaluate.run(run_config(world, student, "eval/agent"))
    evaluate.run(run_config(world, student, "eval/sc", sc=3))
    evaluate.run(run_config(world, student, "eval/rag", method="cot-rag"))
    evaluate.write_report(evaluate.ReportConfig(folder=str(world / "eval")))
    table = capsys.readouterr().out
    rows = json.loads((world / "eval" / "agent" / "results.json").read_text())
    assert len(rows) == 8 and {row["n"] for row in rows} == {2}
    assert {"model", "parameters", "method", "decoding", "task", "kind", "domain", "accuracy", "ci95"} <= set(rows[0])
    for words in ("| S | ", "agent distill | greedy", "agent distill | sc3", "cot-rag distill | greedy", "bamboogle"):
        assert words in table
    assert (world / "eval" / "report.md").read_text() in table
    sampled = report.transcripts(world / "eval" / "sc")
    assert all(len(step["candidates"]) == 3 for row in sampled for step in row["steps"])


def test_evaluation_continues_and_does_not_depend_on_the_batch(world, student):
    """Cut after some questions, and gone on with another batch size, it ends with the very same transcripts."""
    whole = run_config(world, student, "eval/whole", sc=2)
    evaluate.run(whole)
    cut = run_config(world, student, "eval/cut", sc=2, batch=5)
    evaluate.run(cut)
    journal = world / "eval" / "cut" / "transcripts.0.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:7]) + lines[7][:50])
    cut.batch = 3
    evaluate.run(cut)
    rows = [report.transcripts(world / "eval" / name) for name in ("whole", "cut")]
    assert strip_volatile(rows[0]) == strip_volatile(rows[1])


def test_shards_share_a_folder(world, student):
    for shard in ("0/2", "1/2"):
        evaluate.run(run_config(world, student, "eval/shards", shard=shard))
    evaluate.run(run_config(world, student, "eval/unsharded"))
    rows = [report.transcripts(world / "eval" / name) for name in ("shards", "unsharded")]
    assert len(report.transcript_files(world / "eval" / "shards")) == 2
    assert strip_volatile(rows[0]) == strip_volatile(rows[1])


def test_web_search_reads_the_same_from_a_folder_and_from_a_server(world):
    server = retriever.Server(retriever.load(str(world / "index")), "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/retrieve"
    title = next(read_jsonl(world / "world" / "passages.jsonl"))[1]["contents"].split("\n")[0].strip('"')
    folder, remote = (open_search(where, Prompts(), k=2) for where in (str(world / "index"), url))
    assert folder(title) == remote(title) and folder(title).startswith(f"[1] {title}\n")
    server.shutdown()
    server.server_close()


def test_a_served_model_is_evaluated_like_a_local_one(world, teacher):
    """The scripted teacher as a student over HTTP: it knows the plans of the test questions, too."""
    config = run_config(
        world, "scripted-teacher", "eval/served", url=[teacher], max_steps=5, max_tokens=400, training="none"
    )
    evaluate.run(config)
    rows = report.transcripts(world / "eval" / "served")
    assert len(rows) == 16 and sum(row["correct"] for row in rows) >= 10


def test_regrade_changes_grades_and_nothing_else(world, student, capsys):
    evaluate.run(run_config(world, student, "eval/regrade"))
    journal = world / "eval" / "regrade" / "transcripts.0.jsonl"
    before = [row for _, row in read_jsonl(journal)]
    wrong = [{**row, "correct": not row["correct"], "why": "?"} for row in before]
    journal.write_text("".join(json.dumps(row) + "\n" for row in wrong))
    evaluate.regrade(evaluate.RegradeConfig(folder=str(journal.parent)))
    assert f"{len(before)} grades changed" in capsys.readouterr().out
    assert [row for _, row in read_jsonl(journal)] == before


def test_ask_prints_the_steps(world, teacher, capsys):
    question = next(
        row["question"] for row in load_tasks([str(world / "world" / "train.jsonl")]) if row["kind"] == "math"
    )
    evaluate.ask(evaluate.AskConfig(question=question, url=[teacher], training="none"))
    shown = capsys.readouterr().out
    assert "Code:\n```py\n" in shown and "Answer: " in shown


@pytest.mark.parametrize(
    "change, message",
    [
        ({"search": None}, "needs passages"),
        ({"model": None}, "no student"),
        ({"shard": "2/2"}, "--shard 2/2"),
        ({"tasks": ["nowhere.jsonl"]}, "nowhere.jsonl: No such file"),
        ({"search": "nowhere"}, "nowhere"),
        ({"system_prompt": "nowhere.txt"}, "nowhere.txt: No such file"),
    ],
)
def test_bad_input_is_one_line(world, student, change, message):
    config = run_config(world, student, "eval/bad")
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match=message) as caught:
        evaluate.run(config)
    assert "\n" not in str(caught.value)
