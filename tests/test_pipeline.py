"""The whole pipeline at a tiny size: world, index, teacher over HTTP, collect, filter, train, evaluate, report.

    make test ROOM=pipeline

Nothing is replaced: real searches, really executed code, a student that is really trained (for one epoch).
"""

import functools
import json
import threading
from pathlib import Path

import pytest

import agent_distill
import evaluate
import retriever
import train
from agent_distill import EpisodeConfig, Prompts, open_tools
from common import InputError, load_tasks, read_jsonl, report, serve_json
from common.search_r1 import answer_request
from miniature import teacher as miniature_teacher
from miniature import world as miniature_world

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniature")
    config = miniature_world.Config(out=str(folder / "world"), seed=3, train_questions=48, test_questions=2)
    miniature_world.write(config)
    retriever.build(str(folder / "world" / "passages.jsonl"), str(folder / "index"))
    return folder


@pytest.fixture(scope="module")
def teacher(world):
    server = miniature_teacher.open_server(miniature_teacher.Config(world=str(world / "world")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def collect_config(world, url, out, **more):
    defaults = {"search": str(world / "index"), "top_k": 2, "concurrency": 8, "quiet": True}
    tasks = [str(world / "world" / "train.jsonl")]
    return agent_distill.CollectConfig(tasks=tasks, url=url, out=str(out), **{**defaults, **more})


@pytest.fixture(scope="module")
def trajectories(world, teacher):
    cots = str(world / "cot.jsonl")
    agent_distill.collect(collect_config(world, teacher, cots, method="cot"))
    agent_distill.collect(collect_config(world, teacher, world / "agent.jsonl", first_thought=cots))
    for name in ("cot", "agent"):
        out = str(world / f"{name}.train.jsonl")
        config = agent_distill.FilterConfig(trajectories=[str(world / f"{name}.jsonl")], out=out)
        agent_distill.filter_trajectories(config)
    return [row for _, row in read_jsonl(world / "agent.jsonl")]


@pytest.fixture(scope="module")
def student(world, trajectories, tiny_model):
    train.fit(
        train.Config(
            data=[str(world / "agent.train.jsonl")], model=str(tiny_model), out=str(world / "agent"),
            tuning="full", epochs=1, max_length=2048, quiet=True,
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
        assert row["prefix"] == agent_distill.first_step(cot)
        assert row["messages"][2]["content"].startswith(f"Thought: {row['prefix']}")
        assert row["messages"][2]["content"].count(row["prefix"]) == 1
        assert row["usage"]["completion_tokens"] > 0 and row["model"] == "scripted-teacher"
        roles = [m["role"] for m in row["messages"]]
        assert roles[:3] == ["system", "user", "assistant"] and "assistant" in roles[-2:]
    facts = [row for row in trajectories if row["kind"] == "fact" and row["correct"]]
    assert all("[1] " in row["steps"][0]["observation"] for row in facts if not row["steps"][0]["error_kind"])


def test_filter_keeps_only_the_right_ones(world, trajectories):
    kept = {row["id"] for _, row in read_jsonl(world / "agent.train.jsonl")}
    assert kept == {row["id"] for row in trajectories if not agent_distill.drop_reason(row)}


def test_collect_again_asks_nothing(world, trajectories, capsys):
    before = (world / "agent.jsonl").read_bytes()
    nobody = "http://127.0.0.1:9/v1"
    again = collect_config(world, nobody, world / "agent.jsonl", first_thought=str(world / "cot.jsonl"))
    agent_distill.collect(again)
    again.max_steps = 4
    with pytest.raises(InputError, match=r"agent.jsonl.run.json: these results were made with max-steps 5, not 4"):
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
    lines = [f"agent distill+prefix | {decoding}" for decoding in ("greedy", "sc3")]
    assert all(words in table for words in ("| S | ", *lines, "cot-rag distill+prefix | greedy", "Bamboogle"))
    assert (world / "eval" / "report.md").read_text() in table
    sampled = report.transcripts(world / "eval" / "sc")
    assert all(len(step["candidates"]) == 3 for row in sampled for step in row["steps"])


def test_web_search_reads_the_same_from_a_folder_and_from_a_server(world):
    index = retriever.load(str(world / "index"))
    server = serve_json(functools.partial(answer_request, index))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/retrieve"
    title = next(read_jsonl(world / "world" / "passages.jsonl"))[1]["contents"].split("\n")[0].strip('"')
    wheres = str(world / "index"), url
    folder, remote = (open_tools(EpisodeConfig(search=w, top_k=2), Prompts())["web_search"] for w in wheres)
    assert folder(title) == remote(title) and folder(title).startswith(f"[1] {title}\n")
    server.shutdown()
    server.server_close()


def test_regrade_changes_grades_and_nothing_else(world, student, capsys):
    evaluate.run(run_config(world, student, "eval/regrade"))
    journal = world / "eval" / "regrade" / "transcripts.0.jsonl"
    before = [row for _, row in read_jsonl(journal)]
    wrong = [{**row, "correct": not row["correct"], "why": "?"} for row in before]
    journal.write_text("".join(json.dumps(row) + "\n" for row in wrong))
    evaluate.regrade(evaluate.RegradeConfig(folder=str(journal.parent)))
    assert f"{len(before)} grades changed" in capsys.readouterr().out
    assert [row for _, row in read_jsonl(journal)] == before
