"""The client against a real `transformers serve`: collect and evaluate, beside plain generate with the same weights.

python -m pytest tests/test_teacher_interop.py        # where transformers[serving] is installed (requirements-dev.txt)

That server answers 422 to continue_final_message, gives one choice whatever n is, leaves the stop string in the text,
and samples only if a generation_config says so. Its model here is a student of the miniature, trained for half a
minute: it knows the format of an action and little else.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package)

import report  # noqa: E402
import torch  # noqa: E402
import trajectories  # noqa: E402
from client import Client, Speaker  # noqa: E402
from tasks import Prompts  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import agent_distill  # noqa: E402
import miniature  # noqa: E402
import retriever  # noqa: E402
import train  # noqa: E402
from common import read_jsonl, write_jsonl  # noqa: E402

ROOT = Path(__file__).parent.parent
MAX_TOKENS = 120


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with world, index, prompts short enough for a small student, a student, and questions to ask it."""
    folder = tmp_path_factory.mktemp("interop")
    shutil.copytree(ROOT / "prompts", folder / "prompts")
    shutil.copy(folder / "prompts" / "agent_student_system.txt", folder / "prompts" / "agent_system.txt")
    miniature.make_world(
        miniature.WorldConfig(out=str(folder / "world"), seed=3, train_questions=150, test_questions=2)
    )
    retriever.build(str(folder / "world" / "passages.jsonl"), str(folder / "index"), quiet=True)
    server = miniature.open_server(miniature.TeacherConfig(world=str(folder / "world")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for method in ("cot", "agent"):
        collect(folder, f"http://127.0.0.1:{server.server_port}/v1", "scripted-teacher", f"teacher.{method}",
                "--method", method, tasks=folder / "world" / "train.jsonl", check=True)  # fmt: skip
    server.shutdown()
    server.server_close()
    train_student(folder)
    rows = [row for _, row in read_jsonl(folder / "world" / "train.jsonl")]
    write_jsonl(
        folder / "tasks.jsonl", [row for kind in ("fact", "math") for row in [r for r in rows if r["kind"] == kind][:4]]
    )
    return folder


def train_student(folder):
    data = []
    for method in ("agent", "cot"):
        data.append(str(folder / f"{method}.train.jsonl"))
        trajectories.filter_trajectories(
            trajectories.FilterConfig(trajectories=[str(folder / f"teacher.{method}.jsonl")], out=data[-1])
        )
    base = {"documents": 8, "warmup_steps": 4, "quiet": True}
    miniature.make_base(miniature.BaseConfig(world=str(folder / "world"), out=str(folder / "base"), size="S", **base))
    train.fit(
        train.Config(
            data=data, model=str(folder / "base"), out=str(folder / "student"), tuning="full", epochs=3, lr=3e-3,
            batch_tokens=2048, threads=1, quiet=True,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def url(place):
    """The student under `transformers serve`, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(place / "student")]
    environment = os.environ | {"HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(place / "serve.log", "wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not listening(port):
            assert process.poll() is None and time.monotonic() < deadline, (place / "serve.log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def listening(port):
    try:
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok
    except requests.ConnectionError:
        return False


def collect(folder, url, model, out, *options, tasks=None, check=False):
    """The command line, on the tasks and prompts of the folder."""
    command = [
        sys.executable, "agent_distill.py", "collect", str(tasks or folder / "tasks.jsonl"), "--url", url,
        "--search", str(folder / "index"), "--top-k", "1", "--prompts", str(folder / "prompts"),
        "--max-tokens", str(MAX_TOKENS), "--concurrency", "4", "--out", str(folder / f"{out}.jsonl"), "--quiet",
    ]  # fmt: skip
    command += ["--model", str(model)] if model else []
    return subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=check)


def rows_of(folder, name):
    return [row for _, row in read_jsonl(folder / f"{name}.jsonl")]


@pytest.fixture(scope="module")
def generate(place):
    """A function: the greedy continuation of a text, by the same weights under plain generate."""
    tokenizer = AutoTokenizer.from_pretrained(place / "student")
    model = AutoModelForCausalLM.from_pretrained(place / "student", dtype=torch.float32).eval()

    def continuation(messages, opening="", stop=agent_distill.STOP):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + opening
        ids = tokenizer(text, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=MAX_TOKENS, do_sample=False, stop_strings=stop, tokenizer=tokenizer)
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    return continuation


def test_chains_of_thought_are_those_of_generate(place, url, generate):
    done = collect(place, url, place / "student", "cot", "--method", "cot")
    assert done.returncode == 0, done.stderr
    rows = rows_of(place, "cot")
    assert len(rows) == 8 and not any(row["usage"].get("retries") for row in rows)
    for row in rows:
        *before, last = row["messages"]
        assert last["content"] == generate(before, stop=None).strip()
        assert row["model"].startswith(str(place / "student")) and row["usage"]["completion_tokens"] > 1


def check_actions(rows, generate):
    """Every message of every trajectory is what plain generate continues the ones before it with."""
    for row in rows:
        assert row["stop"] in ("final_answer", "max_steps") and row["error"] is None
        for i, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                opening = f"Thought: {row['prefix']}" if row["prefix"] and i == 2 else ""
                text = opening + generate(row["messages"][:i], opening)
                assert message["content"] == agent_distill.parse_action(text).text
                assert message["content"].count("<end_code>") <= 1
    assert sum(step["code"] is not None for row in rows for step in row["steps"]) >= len(rows)
    assert any(step["error_kind"] is None for row in rows for step in row["steps"])


def test_agent_trajectories_are_those_of_generate(place, url, generate):
    done = collect(place, url, place / "student", "plain")
    assert done.returncode == 0, done.stderr
    check_actions(rows_of(place, "plain"), generate)


def test_the_prefix_is_refused_where_it_is_not_continued_and_continued_through_completions(place, url, generate):
    prefix = ("--first-thought", "--cot", str(place / "teacher.cot.jsonl"))
    done = collect(place, url, place / "student", "prefix", *prefix)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "does not continue a message (422" in done.stderr and "--prefix-mode completions" in done.stderr
    assert not rows_of(place, "prefix")
    done = collect(place, url, place / "student", "prefix", *prefix, "--prefix-mode", "completions")
    assert done.returncode == 0, done.stderr
    rows = rows_of(place, "prefix")
    cots = {row["id"]: row["messages"][-1]["content"] for row in rows_of(place, "teacher.cot")}
    for row in rows:
        assert row["prefix"] == agent_distill.first_step(cots[row["id"]])
        assert row["messages"][2]["content"].startswith(f"Thought: {row['prefix']}")
    check_actions(rows, generate)


def test_a_server_that_needs_to_be_told_to_sample_is_told(place, url):
    client = Client([url], model=str(place / "student"))
    question = [{"role": "user", "content": "Say hello."}]
    sampling = {"n": 4, "seed": 5, "temperature": 1.0, "max_tokens": 24}
    assert len(set(client.chat(question, **sampling).texts)) == 1  # it was asked four times, and ignored all of it
    speaker = Speaker(client, Prompts(), temperature=1.0)
    speaker.probe()
    reply = client.chat(question, extra=speaker.extra, **sampling)
    assert len(set(reply.texts)) > 1 and reply.usage["requests"] == 4


def test_samples_of_one_question_differ_and_end(place, url):
    options = ("--samples", "4", "--temperature", "1.0", "--limit", "3")
    assert collect(place, url, place / "student", "samples", *options).returncode == 0
    rows = rows_of(place, "samples")
    assert len({json.dumps(row["messages"]) for row in rows}) > 3
    assert any(row["stop"] == "final_answer" for row in rows)


def evaluate(place, out, *options):
    command = [
        sys.executable, "evaluate.py", "run", str(place / "tasks.jsonl"), "--model", str(place / "student"),
        "--search", str(place / "index"), "--top-k", "1", "--max-tokens", str(MAX_TOKENS), "--out", str(place / out),
        "--name", "S", "--quiet",
    ]  # fmt: skip
    subprocess.run([*command, *options], cwd=ROOT, check=True, capture_output=True)
    return sorted(report.transcripts(place / out), key=lambda row: (row["task"], row["id"]))


def test_a_served_student_is_evaluated_to_the_same_transcripts_as_a_local_one(place, url):
    local, served = evaluate(place, "local", "--batch", "1"), evaluate(place, "served", "--url", url)
    assert [row["messages"] for row in served] == [row["messages"] for row in local]
    assert [row["correct"] for row in served] == [row["correct"] for row in local]


def test_a_served_student_votes(place, url):
    rows = evaluate(place, "sc", "--url", url, "--sc", "4", "--temperature", "1.0", "--limit", "3")
    steps = [step for row in rows for step in row["steps"]]
    assert all(len(step["candidates"]) == 4 for step in steps)
    assert any(len({candidate["code"] for candidate in step["candidates"]}) > 1 for step in steps)


def test_a_wrong_name_is_one_line_before_any_question_is_lost(place, url):
    done = collect(place, url, "nobody", "nobody")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "400" in done.stderr
    assert not rows_of(place, "nobody")


def test_a_server_that_cannot_list_its_models_needs_the_name(place, url):
    done = collect(place, url, None, "unnamed", "--retries", "0")
    assert done.returncode == 1 and "name a --model" in done.stderr and done.stderr.count("\n") == 1
