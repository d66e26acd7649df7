"""What `collect` writes, also under faults of every kind, kills, Ctrl-C, a full disk.  `make test ROOM=collect`

The teacher is the miniature's script behind a server that misbehaves as told; searches and sandboxes are real.
"""

import collections
import contextlib
import dataclasses
import json
import random
import shutil
import signal
import threading
import time

import pytest

import agent_distill
import retriever
from common import InputError, load_tasks, report, stable_seed
from conftest import kill_when, read_rows, small_disk, write_jsonl
from miniature import teacher as miniature_teacher
from retriever import answer_request
from servers import serve
from test_client import PASSING


@pytest.fixture(scope="module")
def world(small_world, tmp_path_factory):
    """A folder with world and index, and the script that teaches it."""
    folder = tmp_path_factory.mktemp("collect")
    for name in ("world", "index"):
        (folder / name).symlink_to(small_world / name)
    return folder, miniature_teacher.Teacher(miniature_teacher.Config(world=str(folder / "world")))


@pytest.fixture
def quiet(world):
    """(address, requests seen) of a teacher without faults."""
    with serve(lambda path, body, number: teach(world[1], body)) as server:
        yield server


def question_of(body):
    """What a request is about; None for the client's probes."""
    question = body["messages"][1]["content"] if body["messages"][0]["role"] == "system" else None
    return question and question.removeprefix("New task:").strip()


def asked(seen):
    """The questions of requests."""
    return {question_of(body) for _, body, _ in seen} - {None}


def miniature(teacher, body):
    return miniature_teacher.complete(teacher, {**body, "model": miniature_teacher.MODEL})


def teach(teacher, body):
    """A quiet server's answer. One question in 20 is too long for it, one in 20 it answers at length."""
    draw = stable_seed("length", question_of(body)) % 20
    if draw == 0 and question_of(body):
        return "status", 400, {}, "This model's maximum context length is 4096 tokens."
    answer = miniature(teacher, body)
    answer["choices"][0]["finish_reason"] = "length" if draw == 1 else "stop"
    return answer


def config_of(folder, url, out, **more):
    options = {"concurrency": 8, "quiet": True}
    options |= {"search": str(folder / "index"), "top_k": 2} if more.get("method") != "cot" else {}
    options["tasks"] = [str(folder / "world" / "train.jsonl")]
    return agent_distill.CollectConfig(url=url, out=str(out), **options | more)


def collect(folder, url, out, **more):
    """Returns the exit status."""
    return agent_distill.collect(config_of(folder, url, out, **more))


def strip_volatile(rows):
    """Rows in order of their question, without the wall clock and the retries."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    for row in rows:
        row["usage"] = {k: v for k, v in row["usage"].items() if k != "retries"}
    return sorted(rows, key=lambda row: (row["task"], row["id"]))


def test_collect_writes_whole_trajectories(world):
    """With the first-thought prefix, each opens with the first step of its question's chain of thought."""
    folder, teacher = world
    cots, out = folder / "plain.cot.jsonl", folder / "prefix.jsonl"
    with serve(lambda path, body, number: miniature_teacher.complete(teacher, body)) as (url, _):
        options = {"model": miniature_teacher.MODEL, "limit": 20}
        collect(folder, url, cots, method="cot", **options)
        collect(folder, url, out, first_thought=str(cots), **options)
    rows, cots = report.transcripts(out), {row["id"]: row for row in report.transcripts(cots)}
    tasks = load_tasks([str(folder / "world" / "train.jsonl")], limit=20)
    assert {(row["task"], row["id"]) for row in rows} == {(row["task"], row["id"]) for row in tasks}
    assert sum(row["correct"] for row in rows) >= 15  # the script errs at a few per cent
    for row in rows:
        assert row["prefix"] == agent_distill.first_step(cots[row["id"]]["messages"][-1]["content"])
        assert row["messages"][2]["content"].startswith(f"Thought: {row['prefix']}")
        assert row["messages"][2]["content"].count(row["prefix"]) == 1
        assert row["usage"]["completion_tokens"] > 0 and row["model"] == "scripted-teacher"
        roles = [m["role"] for m in row["messages"]]
        assert roles[:3] == ["system", "user", "assistant"] and "assistant" in roles[-2:]
    facts = [row for row in rows if row["kind"] == "fact" and row["correct"]]
    assert all("[1] " in row["steps"][0]["observation"] for row in facts if not row["steps"][0]["error_kind"])


def test_a_server_full_of_faults_gives_the_same_file(world, quiet, monkeypatch):
    """Each request fails 0 to 3 times, in ways drawn from its content. Nothing is lost, there or asked twice."""
    monkeypatch.setattr("common.client.BACKOFF", 0.01)
    folder, teacher = world
    calm, stormy, lock = folder / "calm.jsonl", folder / "stormy.jsonl", threading.Lock()
    attempts, answered, seen_faults = (collections.Counter() for _ in range(3))
    quick = [name for name in PASSING if name not in ("hang", "429 retry-after")]

    def faulty(path, body, number):
        key = json.dumps([path, body], sort_keys=True)
        rng = random.Random(key)
        faults = [rng.choice(quick) for _ in range(rng.choice([0, 0, 1, 2, 3]) if question_of(body) else 0)]
        answer = teach(teacher, body)
        with lock:
            attempts[key] += 1
            fault = faults[attempts[key] - 1] if attempts[key] <= len(faults) else None
            (seen_faults if fault else answered)[fault or key] += 1
        return PASSING[fault] if fault else answer

    collect(folder, quiet[0], calm, method="cot")
    with serve(faulty) as (url, seen):
        collect(folder, url, stormy, method="cot", concurrency=16)
    rows = report.transcripts(stormy)
    assert strip_volatile(rows) == strip_volatile(report.transcripts(calm))
    assert set(answered.values()) == {1} and len(seen) == sum(attempts.values())
    assert sum(row["usage"].get("retries", 0) for row in rows) > len(seen) // 4
    assert set(seen_faults) == set(quick)


def test_killed_and_interrupted_it_ends_with_the_same_file(world):
    """A kill, a Ctrl-C, and then the end. What was finished is not asked again, what was under way is."""
    folder, teacher = world
    out, calm, cot = folder / "killed.jsonl", folder / "undisturbed.jsonl", folder / "cot.jsonl"
    options, starts = {"first_thought": str(cot), "limit": 20}, []

    def behave(path, body, number):
        time.sleep(0.03)
        return teach(teacher, body)

    def command():
        parts = ["agent_distill.py", "collect", str(folder / "world" / "train.jsonl"), "--url", url, "--top-k", "2"]
        parts += ["--search", str(folder / "index"), "--concurrency", "4", "--out", str(out), "--quiet"]
        return [*parts, "--first-thought", str(cot), "--limit", "20"]

    with serve(behave) as (url, seen):
        collect(folder, url, cot, method="cot", limit=20)
        before = len(seen)
        collect(folder, url, calm, **options)
        undisturbed = len(seen) - before
        for kill in (signal.SIGKILL, signal.SIGINT, None):
            lines = out.read_text().split("\n")[:-1] if out.exists() else []  # the last line may be torn
            finished = {row["question"] for row in map(json.loads, lines) if row["stop"] != "error"}
            starts.append(len(seen))
            if kill:
                status, stderr = kill_when(lambda: len(seen) > starts[-1] + 20, *command(), how=kill)
                assert kill == signal.SIGKILL or status == 130
                assert kill == signal.SIGKILL or stderr.endswith("the same command continues from here\n")
            else:
                collect(folder, url, out, **options)
            time.sleep(0.05)  # what it had sent is read by now
            assert not finished & asked(seen[starts[-1] :])
        assert finished and len(seen) - starts[0] > undisturbed
    rows = report.transcripts(out)
    assert len(rows) == 20 and strip_volatile(rows) == strip_volatile(report.transcripts(calm))


def test_errors_are_counted_and_asked_again(world, quiet, capsys):
    """A server that refuses a parameter, then one that is too small for some questions, then a good one."""
    folder, teacher = world
    out, options = folder / "errors.jsonl", {"limit": 24, "max_tokens": 512}
    refused = "status", 422, {}, "seed: extra fields not permitted"
    with serve(lambda path, body, number: refused if question_of(body) else teach(teacher, body)) as (url, _):
        assert collect(folder, url, out, limit=24) == 1
        assert "24 errors (422: seed: extra fields not permitted)" in capsys.readouterr().out
    assert collect(folder, quiet[0], out, **options) == 0  # nothing was answered with other options
    rows = report.transcripts(out)
    errors = {row["question"] for row in rows if row["stop"] == "error"}
    assert f" {len(errors)} errors (400: This model's maximum" in capsys.readouterr().out and 0 < len(errors) < 12
    with serve(lambda path, body, number: miniature(teacher, body)) as (url, seen):
        assert collect(folder, url, out, **options) == 0
        assert asked(seen) == errors and "error" not in capsys.readouterr().out.split(";")[1]
        assert collect(folder, url, out, **options) == 0  # nothing is asked, and the old errors do not count
        assert "error" not in capsys.readouterr().out.split(";")[1]
    after = report.transcripts(out)
    assert [row for row in after if row["question"] not in errors] == [row for row in rows if row["stop"] != "error"]
    assert len(after) == 24 and all(row["stop"] != "error" for row in after)


DAMAGES = {"steps": [1], "sample": [1], "usage": 3, "stop": None, "correct": "yes", "model": 5}


def test_a_damaged_row_is_one_line(world, quiet, tmp_path):
    folder, out = world[0], tmp_path / "out.jsonl"
    collect(folder, quiet[0], out, method="cot", limit=1)
    [row] = read_rows(out)
    for field, value in DAMAGES.items():
        write_jsonl(out, [row, row | {field: value}])
        with pytest.raises(InputError, match=rf"^\S*out.jsonl:2: the field '{field}' is missing or wrong$"):
            collect(folder, quiet[0], out, method="cot", limit=1)


def test_what_was_asked_decides_what_is_finished(world, quiet):
    """Another gold answer or another world under the same ids is asked; another model is refused."""
    folder, (url, seen) = world[0], quiet
    out, tasks = folder / "same" / "out.jsonl", folder / "same" / "train.jsonl"
    rows = report.transcripts(folder / "world" / "train.jsonl")[:6]
    (folder / "same").mkdir()
    options = {"method": "cot", "tasks": [str(tasks)]}
    for changes, count in (({}, 6), ({}, 0), ({"answer": "7"}, 1), ({"question": "Who?"}, 1)):
        write_jsonl(tasks, [rows[0] | changes, *rows[1:]])
        seen.clear()
        collect(folder, url, out, **options)
        assert len(asked(seen)) == count
    with pytest.raises(InputError, match="made with model served-name, not other"):
        collect(folder, url, out, **options, model="other")
    collect(folder, "http://127.0.0.1:9/v1", out, **options)  # all is there: no server is asked
    write_jsonl(tasks, [rows[0] | {"id": "new"}])
    with serve(lambda path, body, number: miniature(world[1], body), model="changed") as (other, _):
        with pytest.raises(InputError, match="made with model served-name, not changed"):
            collect(folder, other, out, **options)


def test_first_thoughts_go_by_the_question(world, capsys):
    """The same questions under another task name and other ids have their prefixes; those without one are counted."""
    folder, teacher = world
    cots, renamed, new = folder / "some.cot.jsonl", folder / "renamed.jsonl", folder / "new.jsonl"
    rows = [row | {"id": f"other-{row['id']}"} for row in report.transcripts(folder / "world" / "train.jsonl")[:5]]
    write_jsonl(renamed, rows)
    write_jsonl(new, [{"id": "1", "kind": "math", "question": "1 + 1 = ?", "answer": "2"}])
    with serve(lambda path, body, number: miniature(teacher, body)) as (url, _):
        collect(folder, url, cots, method="cot", limit=3)
        options = {"first_thought": str(cots)}
        collect(folder, url, folder / "renamed.out.jsonl", tasks=[str(renamed)], **options)
        assert "note: " in (error := capsys.readouterr().err) and "no first thought for 2 of 5 questions" in error
        with pytest.raises(InputError, match="a chain of thought for none of the 1 questions"):
            collect(folder, url, folder / "new.out.jsonl", tasks=[str(new)], **options)
    prefixes = {row["id"]: row["prefix"] for row in report.transcripts(folder / "renamed.out.jsonl")}
    assert [bool(prefixes[row["id"]]) for row in rows] == [True] * 3 + [False] * 2


def test_samples_differ_and_each_is_asked_once(world, quiet):
    folder, out = world[0], world[0] / "samples.jsonl"
    config = config_of(folder, quiet[0], out, method="cot", limit=12, samples=5, temperature=0.7)
    agent_distill.collect(config)
    for change, message in (({"temperature": 0.0}, "give a --temperature"), ({"top_p": 0.5}, "with top-p 1.0, not")):
        with pytest.raises(InputError, match=message):
            agent_distill.collect(dataclasses.replace(config, **change))
    rows = report.transcripts(out)
    assert len(read_rows(out)) == len(rows) == 60
    assert len({json.dumps([row["id"], row["messages"]]) for row in rows}) > 12


def test_changed_code_and_prompts_do_not_continue_a_run(world, quiet, tmp_path, monkeypatch):
    """Only the prompts that are used count."""
    folder = world[0]
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_vote.py").write_text("def vote(actions, observations, rng):\n    return 0\n")
    shutil.copytree(agent_distill.Prompts.default, tmp_path / "prompts")
    options = {"limit": 2, "choose": "my_vote.vote", "prompts": str(tmp_path / "prompts")}
    url = quiet[0]
    collect(folder, url, tmp_path / "out.jsonl", **options)
    changes = {"judge.txt": None, "observation.txt": "prompts-sha256", "agent_system.txt": "system-prompt"}
    for name, message in changes.items():
        text = (tmp_path / "prompts" / name).read_text()
        (tmp_path / "prompts" / name).write_text(text + "changed")
        with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
            collect(folder, url, tmp_path / "out.jsonl", **options)
        (tmp_path / "prompts" / name).write_text(text)
    (tmp_path / "my_vote.py").write_text("def vote(actions, observations, rng):\n    return -1\n")
    with pytest.raises(InputError, match="made with choose-sha256"):
        collect(folder, url, tmp_path / "out.jsonl", **options)


def test_a_search_that_fails_ends_the_run_and_the_same_command_continues(world, quiet, monkeypatch):
    """What the teacher would read about a broken index must not become training data."""
    monkeypatch.setattr("common.client.BACKOFF", 0.01)
    folder = world[0]
    out, index, broken = folder / "no-search.jsonl", retriever.load(str(folder / "index")), [True]

    def search(path, body, number):
        answer = answer_request(index, "POST", "/retrieve", body)[1]
        return ("status", 500, {}, '{"error": "the index is on fire"}') if broken else answer

    with serve(search) as (address, _):
        config = config_of(folder, quiet[0], out, limit=9, search=address.removesuffix("/v1") + "/retrieve")
        with pytest.raises(InputError, match="the index is on fire"):
            agent_distill.collect(config)
        broken.clear()
        agent_distill.collect(config)
    rows = report.transcripts(out)
    assert len(rows) == 9 and "on fire" not in json.dumps(rows) and "[1] " in json.dumps(rows)


def test_a_full_disk_is_one_line_and_the_same_command_continues(world, quiet):
    folder, out = world[0], world[0] / "full.jsonl"
    with small_disk(16_384), pytest.raises(InputError, match=r"^\S*full.jsonl: cannot write .File too large[^\n]*$"):
        collect(folder, quiet[0], out, method="cot", limit=60)
    rows = read_rows(out)  # the half line is gone
    collect(folder, quiet[0], out, method="cot", limit=60)
    assert len(report.transcripts(out)) == 60 and read_rows(out)[: len(rows)] == rows != []
