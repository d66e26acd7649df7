"""`transformers serve` with an agent distilled into SmolLM2-135M-Instruct: as a served student, and as a teacher.

    make test-real        # with test_student_real.py; it needs the packages of requirements-dev.txt

That server answers 422 to continue_final_message, and leaves the stop string in the text.
"""

import os
import socket
import subprocess
import sys
import time

import pytest
import requests

import agent_distill
from common import InputError, models
from common.client import ServerError

pytest_plugins = ["smollm2"]


@pytest.fixture(scope="module")
def merged(lesson, agent):
    """The folder of the agent as a full model in float32."""
    models.merge_adapter(models.MergeConfig(adapter=str(agent), out=str(lesson.folder / "merged"), dtype="float32"))
    return lesson.folder / "merged"


@pytest.fixture(scope="module")
def url(merged, tmp_path_factory):
    """The merged agent under `transformers serve`, in a process of its own."""
    folder = tmp_path_factory.mktemp("serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(merged), "--device", "cpu"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HOME": str(folder)}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while not listening(port):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
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


def test_a_served_agent_is_evaluated_to_the_transcripts_of_the_local_one(lesson, merged, url, answered):
    served = lesson.answer(merged, "served", url=url, limit=6, concurrency=2)
    assert [row["messages"] for row in served] == [row["messages"] for row in answered[:6]]
    assert [row["correct"] for row in served] == [row["correct"] for row in answered[:6]]


def ask(lesson, url, out, **options):
    """Trajectories of the served agent as a teacher: two questions about facts, and two about numbers."""
    return lesson.collect(url, out, [lesson.tests["hotpotqa"], lesson.tests["math"]], limit=2, max_steps=3, **options)


def test_as_a_teacher_it_continues_the_prefix_through_completions(lesson, merged, url, continuation):
    """Each message is what plain generate, with the same weights, writes after the messages before it."""
    options = {"model": str(merged), "first_thought": str(lesson.folder / "cot.jsonl")}
    rows = ask(lesson, url, "prefix", prefix_mode="completions", **options)
    prefixes = {row["id"]: agent_distill.first_step(row["messages"][-1]["content"]) for row in lesson.rows("cot")}
    model, tokenizer = models.load_model(merged)
    for row in rows:
        assert row["prefix"] == prefixes[row["id"]] and row["error"] is None
        for i, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                opening = f"Thought: {row['prefix']}" if i == 2 else ""
                text = opening + continuation(model, tokenizer, row["messages"][:i], opening)
                assert message["content"] == agent_distill.parse_action(text).text
                assert message["content"].startswith(opening)
    assert len(rows) == 4 and any(row["correct"] for row in rows)
    assert any("web_search" in (step["code"] or "") for row in rows for step in row["steps"])


def test_without_that_mode_the_prefix_is_refused_before_any_question(lesson, merged, url):
    with pytest.raises(InputError, match=r"does not continue a message \(422.*--prefix-mode completions") as error:
        ask(lesson, url, "refused", model=str(merged), first_thought=str(lesson.folder / "cot.jsonl"))
    assert "\n" not in str(error.value) and not lesson.rows("refused")


def test_a_wrong_or_missing_name_is_one_line_before_any_question(lesson, url):
    with pytest.raises(InputError, match="400") as error:
        ask(lesson, url, "nobody", model="nobody")
    assert "\n" not in str(error.value) and not lesson.rows("nobody")
    with pytest.raises(ServerError, match="name a --model"):  # this server cannot list a model that is a folder
        ask(lesson, url, "unnamed", retries=0)
