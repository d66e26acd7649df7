"""Evaluation: the student's answers and its memory, lockstep, and the commands run, regrade, compare, ask.

    make test ROOM=evaluate

The student is a tiny random model, which never writes code that runs; where code matters, texts are scripted, or the
scripted teacher of the miniature is asked over HTTP as a served student. Sandboxes and searches are real. Memory is
that of tests/allocator.py, which counts the bytes of live tensors and raises torch.OutOfMemoryError above a limit.
"""

import functools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import evaluate
from agent_distill import Prompts, Turn, agent_episode
from allocator import Allocator
from common import InputError, check_values, load_tasks, models, report
from conftest import LONGROPE, kill_when, make_model, random_model, read_rows, write_jsonl
from evaluate import Answer, Student, run_lockstep
from miniature import teacher
from sandbox import Sandbox
from servers import background, completion, serve

CHATS = ["Hi", "What is 2 + 2, and why is that so?", "Name a river. " * 6, "x" * 40, "Thought: stop?"]


@pytest.fixture
def model(tiny_model):
    return models.load_model(tiny_model)


def turns(texts=CHATS, opening=""):
    return [Turn([{"role": "system", "content": "Be brief."}, {"role": "user", "content": t}], opening) for t in texts]


def texts(answers):
    return [answer.texts for answer in answers]


def ids_of(tokenizer, turn):
    text = models.render(tokenizer, turn.messages, reply=True) + turn.opening
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# The student's answers ----------------------------------------------------------------------------

MIXED = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
KINDS = {
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {}),
    "Llama": ("Llama", {}),
    "SmolLM2": ("Llama", {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "Phi-4-mini across its switch": ("Phi3", LONGROPE),
    "Mistral across its window": ("Mistral", {"sliding_window": 64}),
    "Gemma-3 across its window": ("Gemma3", MIXED | {"query_pre_attn_scalar": 8}),
    "Gemma-2, which caps its scores": ("Gemma2", MIXED),
}
ENDS = list(range(20))  # many, so that rows end


def model_of(kind, **options):
    name, more = KINDS.get(kind, (kind, {}))
    return random_model(name, **more | options)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_greedy_answers_equal_plain_generate_one_by_one(kind, tiny_tokenizer):
    """Beside prompts of other lengths, while rows leave the batch; some cross the switch or the window as they grow."""
    model, make = model_of(kind), torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, 500, (length,), generator=make).tolist() for length in (9, 60, 110, 127, 128, 129, 300)]
    expected = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=ENDS)
        expected.append(ids[0, len(prompt) :].tolist())
    assert len(set(map(len, expected))) > 1, "rows leave the batch at different times"
    assert sum(map(len, map(set, expected))) > 2 * len(prompts), "a text of one token shows nothing"
    model.generation_config.eos_token_id = ENDS
    for n in (1, 3):
        student = Student(model, tiny_tokenizer, n=n, max_tokens=24)
        batches = [[prompt] for prompt in prompts] if student.one_by_one else [prompts]
        written = [[sample.ids for sample in samples] for batch in batches for samples in student.write(batch)]
        assert written == [[ids] * n for ids in expected]
    assert student.one_by_one == ("switch" in kind)


def test_longrope_is_answered_one_by_one(tiny_tokenizer):
    asked = turns(["Hi", "Why? " * 60])
    student = Student(model_of("Phi-4-mini across its switch"), tiny_tokenizer, n=2, temperature=1e-6, max_tokens=20)
    assert student.answer(asked) == [student.answer([turn])[0] for turn in asked]


def test_bf16_answers_equal_plain_generate(tiny_tokenizer):
    """Large scores, as Qwen2.5-7B has: rounding them to 8 bits would give other texts."""
    model, prompt = model_of("Qwen2", initializer_range=1.0).bfloat16(), list(range(4, 200))
    with torch.no_grad():
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)[0, len(prompt) :].tolist()
    [[sample]] = Student(model, tiny_tokenizer, max_tokens=40).write([prompt])
    assert sample.ids == expected and len(set(expected)) > 10


def counted(model, lengths):
    """Returns the model's forward that also notes how many tokens it reads."""
    forward = model.forward

    @functools.wraps(forward)  # generate reads the signature
    def count(*arguments, **options):
        lengths.append(options["input_ids"].shape[1])
        return forward(*arguments, **options)

    return count


@pytest.mark.parametrize("kind", ["Qwen2", "Gemma-3 across its window", "Phi-4-mini across its switch"])
def test_what_an_episode_has_read_is_not_read_again(kind, tiny_tokenizer, monkeypatch):
    """Two conversations that grow, the second of which ends: the answers are those of a student that reads all."""
    model, lengths = model_of(kind, max_position_embeddings=1024), []
    student, count = Student(model, tiny_tokenizer, n=3, max_tokens=12), counted(model, lengths)
    chats = [turn.messages for turn in turns(["Name a river. " * 9, "What is 2 + 2? " * 12])]
    for step in range(4):
        asked = [Turn(chat) for chat in chats[: 2 - step // 2]]
        expected = Student(model, tiny_tokenizer, n=3, max_tokens=12).answer(asked)
        with monkeypatch.context() as patch:
            patch.setattr(model, "forward", count)
            assert student.answer(asked) == expected
        for chat, answer in zip(chats, expected, strict=False):
            chat += [{"role": "assistant", "content": answer.texts[0]}, {"role": "user", "content": f"Why {step}?"}]
    whole = max(lengths) if student.one_by_one else 200
    assert sum(length > 60 for length in lengths) == (6 if student.one_by_one else 2) and max(lengths) <= whole


@pytest.mark.parametrize("kind", ["Qwen2", "Gemma-3 across its window"])
def test_instructions_that_all_prompts_begin_with_are_read_once(kind, tiny_tokenizer, monkeypatch):
    model, lengths = model_of(kind, max_position_embeddings=1024), []
    asked = [Turn([{"role": "system", "content": "Be brief. " * 40}, turn.messages[1]]) for turn in turns()]
    expected = [Student(model, tiny_tokenizer, max_tokens=12).answer([turn])[0] for turn in asked]
    student = Student(model, tiny_tokenizer, max_tokens=12)
    monkeypatch.setattr(model, "forward", counted(model, lengths))
    assert student.answer(asked[:3]) + student.answer(asked[3:]) == expected
    assert sum(length > 150 for length in lengths) == 1


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic rope"),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "LinearAttention"),
    ],
)
def test_a_model_that_depends_on_its_batch_is_refused(kind, options, message, tiny_tokenizer):
    with pytest.raises(InputError, match=f"{message}.* not supported: serve the model"):
        Student(model_of(kind, **options), tiny_tokenizer)


def test_sampling_is_seeded_and_follows_temperature_and_top_p(model):
    def sample(seed=0, **options):
        student = Student(*model, n=4, **{"temperature": 1.0, "top_p": 1.0, "max_tokens": 20, "seed": seed} | options)
        return texts(student.answer(turns()))

    assert sample() == sample() != sample(seed=1)
    assert len({text for four in sample() for text in four}) > 15
    greedy = texts(Student(*model, max_tokens=20).answer(turns()))
    assert sample(top_p=1e-9) == sample(temperature=0) == [text * 4 for text in greedy]


@pytest.mark.parametrize("temperature, top_p", [(0.7, 0.6), (50.0, 1.0)])
def test_first_tokens_follow_the_nucleus_distribution(model, temperature, top_p):
    """2,000 samples of one token against the renormalised probabilities of the nucleus."""
    student = Student(*model, n=2000, temperature=temperature, top_p=top_p, max_tokens=1)
    prompt = ids_of(model[1], *turns(["Hi"]))
    drawn = [sample.ids[0] for sample in student.write([prompt])[0]]
    p, order = (model[0](torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1).sort(descending=True)
    size = min(len(p), int((p.cumsum(0) < top_p).sum()) + 1)
    expected = dict(zip(order[:size].tolist(), (p[:size] / p[:size].sum()).tolist(), strict=True))
    assert set(drawn) <= expected.keys()
    for token, probability in expected.items():
        assert drawn.count(token) / 2000 == pytest.approx(probability, abs=0.05), token
    if top_p == 1:
        assert len(set(drawn)) > 400, "the whole vocabulary of 500 is sampled"


@pytest.mark.parametrize("n", [1, 3])
def test_a_checkpoint_s_generation_config_has_no_influence(model, n):
    options = {"n": n, "max_tokens": 20, "temperature": 0.9 * (n > 1)}
    expected = texts(Student(*model, **options).answer(turns()))
    model[0].generation_config = transformers.GenerationConfig(
        eos_token_id=model[1].eos_token_id, do_sample=True, temperature=9.0, top_k=1, repetition_penalty=50.0,
        max_length=3, min_new_tokens=19, no_repeat_ngram_size=1, suppress_tokens=list(range(100)), num_beams=4,
    )  # fmt: skip
    assert texts(Student(*model, **options).answer(turns())) == expected


def test_a_long_neighbour_near_the_context_limit_shortens_nobody_else(model):
    student = Student(*model, max_tokens=40)
    long = "Name a river. "
    while len(ids_of(model[1], *turns([long]))) < 490:
        long += "Why? "
    left = student.context - len(ids_of(model[1], *turns([long])))
    alone = student.answer(turns(["Hi"]))
    beside, cut = student.answer(turns(["Hi", long]))
    assert [beside] == alone
    assert cut.completion_tokens == left and cut.truncated == 1
    student.ends |= {student.write([ids_of(model[1], *turns([long]))])[0][0].ids[left - 1]}
    [ended] = student.answer(turns([long]))
    assert ended.truncated == 0, "the last token that fits ends the turn"
    assert student.answer(turns(["Hi", long + "Why? " * 20]))[1] is None


def test_the_token_that_training_teaches_as_the_end_ends_a_turn(model):
    """Base models of Qwen2.5 have another end-of-text token than the one with which their template ends a reply."""
    network, tokenizer = model
    tokenizer.eos_token = "<|endoftext|>"
    network.generation_config.eos_token_id = tokenizer.eos_token_id
    taught = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert taught != tokenizer.eos_token_id and taught in Student(network, tokenizer).ends


def test_nothing_after_a_stop_string_and_truncation_is_told(model):
    student = Student(*model, max_tokens=40)
    free = student.answer(turns())
    assert {(answer.truncated, answer.completion_tokens == 40) for answer in free} <= {(1, True), (0, False)}
    stop = [free[0].texts[0][5:8], free[2].texts[0][10:14], CHATS[1]]  # the last one stands in a prompt: no matter
    for before, answer in zip(free, student.answer(turns(), stop), strict=True):
        ends = [before.texts[0].find(s) for s in stop if s in before.texts[0]]
        assert answer.texts[0] == before.texts[0][: min(ends, default=None)]
        assert answer.truncated == (0 if ends else before.truncated)
        assert answer.completion_tokens < before.completion_tokens or not ends
    asked = turns(opening="<think>")  # as the template of DeepSeek-R1 ends: the model never closes it
    for plain, answer in zip(student.answer(asked), student.answer(asked, ["e", " ", "a"]), strict=True):
        assert answer == plain and plain.texts[0].startswith("<think>")


# Memory -------------------------------------------------------------------------------------------

BYTES = 2048  # transformers keeps some numbers in tensors


@pytest.fixture
def large(tiny_tokenizer):
    """A tiny model with a longer context than that of the other tests, and its tokenizer."""
    return random_model(max_position_embeddings=4096, eos_token_id=tiny_tokenizer.eos_token_id), tiny_tokenizer


def answer_questions(student, questions, watch=lambda: None):
    """Real episodes in lockstep. Returns {question: (stop, all its messages)}; watch is called before each step."""
    answer = student.answer
    student.answer = lambda *turns: watch() or answer(*turns)
    prompts, place = Prompts(), functools.partial(Sandbox, isolation="off")
    episode = functools.partial(agent_episode, prompts=prompts, open_sandbox=place, system="Be brief.", max_steps=2)
    episodes = ((i, episode(f"Question {i}: {'why ' * (i % 7)}")) for i in range(questions))
    ended = run_lockstep(episodes, student, ["<end_code>"], workers=2)
    return {key: (result.stop, result.messages) for key, result, _ in ended}


def make_student(model):
    """With a vanishing temperature all samples are the greedy text, which no batch and no seed changes."""
    return Student(*model, n=3, temperature=1e-6, max_tokens=5, batch=8)


def test_the_batch_follows_the_memory_and_every_episode_ends_as_without_a_limit(large):
    """Less and less memory, until one or two turns fit; then another process frees its own."""
    with Allocator() as unlimited:
        expected = answer_questions(make_student(large), 20)
    assert len(expected) == 20 == len({str(messages) for _, messages in expected.values()})
    with Allocator(0.8 * unlimited.peak) as allocator:
        student, sizes = make_student(large), []

        def watch():
            sizes.append(student.batch)
            allocator.limit = math.inf if min(sizes) <= 2 else max(0.25 * unlimited.peak, 0.6 * allocator.limit)

        assert answer_questions(student, 20, watch) == expected
    assert allocator.failures >= 2 and sizes[0] == student.batch == 8 and min(sizes) <= 2, sizes


@pytest.mark.usefixtures("reference_counting_alone")
def test_keys_and_values_are_freed(large, monkeypatch):
    """At each step, and when what did not fit is tried again."""
    with Allocator() as allocator:
        student, kept = make_student(large), []

        def watch():
            caches = {id(cache): cache for cache in [*student.known.values(), *(student.first or ())[1:]]}
            layers = [layer for cache in caches.values() for layer in cache.layers]
            blocks = sum(math.ceil(side.nbytes / 512) for layer in layers for side in (layer.keys, layer.values))
            kept.append(allocator.now - 512 * blocks)

        monkeypatch.setattr(torch.cuda, "empty_cache", watch)
        answer_questions(student, 9, watch)
        allocator.limit = 0.7 * allocator.peak
        answer_questions(student, 8)
    assert allocator.peak > 100 * BYTES and allocator.failures and max(kept) <= BYTES, "a cycle keeps tensors alive"


def test_a_turn_that_never_fits_ends_the_run_in_one_line(large):
    with Allocator(30_000), pytest.raises(InputError, match="5 tokens, 3 times, do not fit into the memory of cpu"):
        answer_questions(make_student(large), 1)


# Lockstep -----------------------------------------------------------------------------------------


class Script:
    """Answers turns as a Student does, by a function of the turn. Its batch shrinks, as after running out of memory."""

    def __init__(self, reply, batch=8):
        self.reply, self.batch, self.open = reply, batch, []

    def answer(self, turns, stop):
        self.open.append(len(turns))
        self.batch = 3
        return [None if self.reply(t) is None else Answer([self.reply(t)], 10, 5, 0) for t in turns]


def code(text):
    return f"Thought: go.\nCode:\n```py\n{text}\n```"


def test_lockstep_survives_a_halved_batch_and_ends_each_episode_at_its_own_step():
    def reply(turn):
        number = int(turn.messages[1]["content"].split()[-1])
        steps = len(turn.messages) // 2
        if number == 7:
            return None
        return code(f"final_answer({number} * 10)" if steps > number % 3 else "print(1)")

    prompts, student = Prompts(), Script(reply)
    episodes = ((i, agent_episode(f"Number {i}", prompts, Sandbox, system="S")) for i in range(12))
    ended = {key: (episode, usage) for key, episode, usage in run_lockstep(episodes, student)}
    assert max(student.open) == 8 and student.open[-1] <= 3 and len(ended) == 12
    for i, (episode, usage) in ended.items():
        if i == 7:
            assert episode.stop == "error" and "longer than the model's context" in episode.error
        else:
            assert episode.prediction == 10 * i and usage["completion_tokens"] == 5 * (i % 3 + 1)


# Commands -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory, small_world, tiny_tokenizer):
    """A world with its index, a student that was trained as an agent, as far as its record says, and a base."""
    folder = tmp_path_factory.mktemp("evaluation")
    for name in ("world", "index"):
        (folder / name).symlink_to(small_world / name)
    make_model(folder / "base", tiny_tokenizer, max_position_embeddings=4096)
    shutil.copytree(folder / "base", folder / "student")
    record = {"method": "agent", "training": "distill+prefix", "system_prompt": "The prompt of the training."}
    (folder / "student" / "training.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def url(place):
    """The scripted teacher as a served student: it knows the plans of the test questions too."""
    with background(teacher.open_server(teacher.Config(world=str(place / "world")))) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def whole(place):
    """The rows of an uninterrupted run of one process."""
    evaluate.run(run_config(place, "whole"))
    return rows_of(place, "whole")


def run_config(place, out, **more):
    tests = sorted(str(path) for path in (place / "world" / "test").glob("*.jsonl"))
    method = more.get("method", "agent")
    defaults = {"max_tokens": 20, "precision": "fp32", "quiet": True}
    defaults |= {"search": str(place / "index")} if method != "cot" else {}
    defaults |= {"max_steps": 2} if method == "agent" else {}
    defaults |= {"tasks": tests, "model": str(place / "student"), "out": str(place / out)}
    return evaluate.RunConfig(**defaults | ({"precision": "auto"} if "url" in more else {}) | more)


def rows_of(place, out):
    return sorted(report.transcripts(place / out), key=lambda row: (row["task"], row["id"]))


def test_run_and_report(place, capsys):
    evaluate.run(run_config(place, "runs/agent"))
    evaluate.run(run_config(place, "runs/sc", sc=3))
    evaluate.run(run_config(place, "runs/rag", method="cot-rag", model=str(place / "base"), precision="auto"))
    evaluate.write_report(evaluate.ReportConfig(folder=str(place / "runs")))
    shown = capsys.readouterr().out
    results = json.loads((place / "runs" / "agent" / "results.json").read_text())
    assert len(results) == 8 and {row["n"] for row in results} == {2}
    assert (place / "runs" / "report.md").read_text() in shown and (place / "runs" / "bars.svg").exists()
    assert "Bamboogle" in shown and "<html" in (place / "runs" / "report.html").read_text()
    assert all(len(step["candidates"]) == 3 for row in rows_of(place, "runs/sc") for step in row["steps"])
    rag = rows_of(place, "runs/rag")
    assert all(row["kind"] == "math" or row["messages"][1]["content"].startswith("[1] ") for row in rag)
    stops = {(row["stop"], row["usage"]["truncated"], row["usage"]["completion_tokens"] == 20) for row in rag}
    assert ("truncated", 1, True) in stops and stops <= {("truncated", 1, True), ("no_answer", 0, False)}
    assert json.loads((place / "runs" / "rag" / "run.json").read_text())["precision"] in ("fp32", "bf16")


def test_the_system_prompt_is_the_one_of_the_training(place, whole, capsys):
    def system(**more):
        return evaluate.check(run_config(place, "unused", **more))[1]

    (place / "other.txt").write_text("Another.\n")
    assert system() == whole[0]["messages"][0]["content"] == "The prompt of the training."
    shown = capsys.readouterr().err
    assert "keeps the system prompt of its training; --prompts has another" in shown
    assert "the system prompt does not name the tools web_search" in shown
    assert system(model=str(place / "base")) == Prompts().system("agent_system", ["web_search"], 2)
    assert system(method="cot", search=None) == Prompts().cot_system
    assert "note" not in capsys.readouterr().err
    assert system(system_prompt=str(place / "other.txt")) == "Another."
    assert "trained with another system prompt: 'The prompt of the training.'" in capsys.readouterr().err


def test_killed_and_started_again_it_ends_as_an_uninterrupted_run(place, whole, monkeypatch):
    """kill -9 after the first questions, an incomplete last line, another batch: the same greedy answers."""
    config = run_config(place, "killed", batch=3)
    options = ["--search", config.search, "--max-tokens", "20", "--max-steps", "2", "--precision", "fp32"]
    command = ["evaluate.py", *config.tasks, "--model", config.model, "--out", config.out, *options, "--batch", "3"]
    journal = place / "killed" / "transcripts.0.jsonl"
    kill_when(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 1, *command)
    assert 2 <= len(rows_of(place, "killed")) < 16
    with open(journal, "a") as file:
        file.write('{"id": "incompl')
    evaluate.run(config)
    assert rows_of(place, "killed") == whole
    monkeypatch.setattr(evaluate, "Solver", None)  # when nothing is left to answer, nothing is loaded
    assert evaluate.run(config) == 0


def test_torchrun_s_processes_share_a_folder(place, whole, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        evaluate.run(run_config(place, "shards"))
    files = report.transcript_files(place / "shards")
    assert [len(read_rows(path)) for path in files] == [8, 8]
    assert "16 questions, 8 tasks" in capsys.readouterr().out
    monkeypatch.undo()
    assert rows_of(place, "shards") == whole
    write_jsonl(files[1], [row | {"correct": True, "why": "?"} for row in read_rows(files[1])])
    evaluate.run(run_config(place, "shards"))  # one process now, which grades the other's rows, too
    assert rows_of(place, "shards") == whole


def test_results_made_with_other_settings_are_not_mixed(place):
    evaluate.run(run_config(place, "guarded", limit=1))
    evaluate.run(run_config(place, "guarded", limit=1, batch=2))
    for name, value, made in (("max_steps", 3, "max-steps 2"), ("precision", "bf16", "precision fp32")):
        with pytest.raises(InputError, match=f"made with {made}, not {value}"):
            evaluate.run(run_config(place, "guarded", **{name: value}))


def test_another_question_an_error_and_another_model_are_no_finished_rows(tmp_path, capsys):
    """Questions are known by their text and answer, not by file name and id alone."""
    refused = {"wrong": ("status", 400, {}, "too long")}

    def behave(path, body, number):
        return refused.get(last_word(body)) or completion(f"The answer is {last_word(body)}.")

    def last_word(body):
        return body["messages"][-1]["content"].split()[-1]

    def run(questions, model=None, kind="math", aliases=()):
        """Returns (exit status, the questions asked)."""
        rows = [{"id": i, "question": q, "answer": a, "kind": kind} for i, (q, a) in enumerate(questions)]
        rows[0]["aliases"] = aliases
        tasks, asked = write_jsonl(tmp_path / "math.jsonl", rows), len(seen)
        config = {"tasks": [tasks], "url": base, "model": model, "method": "cot", "out": str(tmp_path / "run")}
        status = evaluate.run(evaluate.RunConfig(**config, quiet=True, max_tokens=20))
        return status, sorted(last_word(body) for _, body, _ in seen[asked + 1 :])  # the first one is the probe's

    with serve(behave) as (base, seen):
        assert run([("wrong", "1")]) == (1, ["wrong"])
        assert "1 errors, most often: 400: too long" in capsys.readouterr().out
        assert run([("1", "1"), ("wrong", "2")]) == (0, ["1", "wrong"])
        refused.clear()
        assert run([("1", "1"), ("wrong", "2")]) == (0, ["wrong"])
        assert run([("1", "1"), ("wrong", "2")]) == (0, [])
        assert run([("1", "3"), ("4", "4")]) == (0, ["1", "4"])
        rows = [(row["question"], row["correct"]) for row in read_rows(tmp_path / "run" / "transcripts.0.jsonl")]
        assert sorted(rows) == [("1", False), ("4", True)]
        assert run([("1", "3"), ("4", "4")], kind="fact", aliases=["1"]) == (0, [])
        assert all(row["correct"] for row in read_rows(tmp_path / "run" / "transcripts.0.jsonl")), "graded as today"
        with pytest.raises(InputError, match="made with model served-name, not another"):
            run([("5", "5")], model="another")
        (tmp_path / "run" / "model.json").write_text("{}")
        with pytest.raises(InputError, match="made with model served-name, not None"):
            run([("1", "3"), ("4", "4")])


def test_a_served_student_is_evaluated_like_a_local_one(place, url, capsys):
    config = run_config(place, "served/agent", url=url, model=None, max_steps=5, max_tokens=400)
    evaluate.run(config)
    rows = rows_of(place, "served/agent")
    assert len(rows) == 16 and sum(row["correct"] for row in rows) >= 10
    assert json.loads((place / "served" / "agent" / "model.json").read_text())["model"] == teacher.MODEL
    evaluate.run(run_config(place, "served/cot", url=url, model=None, method="cot", max_tokens=400))
    capsys.readouterr()
    evaluate.compare(evaluate.CompareConfig(first=str(place / "served/agent"), second=str(place / "served/cot")))
    assert "McNemar" in capsys.readouterr().out


def test_compare_pairs_equal_questions_only(tmp_path, capsys):
    """What the first-thought prefix brings to the teacher: nine shared questions, one lost, five won."""
    row = {"task": "math", "kind": "math", "steps": [], "stop": "final_answer", "messages": []}

    def write(name, count, right, world=0):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        rows = [row | {"id": str(i), "question": f"{world}/{i}", "correct": i in right} for i in range(count)]
        write_jsonl(tmp_path / name, rows)
        with open(tmp_path / name, "a") as file:
            file.write('{"id": "incompl')

    def compare(first, second):
        evaluate.compare(evaluate.CompareConfig(first=str(tmp_path / first), second=str(tmp_path / second)))
        return capsys.readouterr().out

    write("plain.jsonl", 10, range(4))
    write("prefix.jsonl", 9, range(1, 9))
    write("a/run.jsonl", 3, [0])
    write("b/run.jsonl", 3, [1])
    write("other.jsonl", 9, [], world=1)
    head, _, *rows = compare("plain.jsonl", "prefix.jsonl").strip().splitlines()
    # Of six questions that one of them got right, five are the prefix's: p = 2 (1 + 6) / 2^6.
    assert rows == [f"| {task} | 9 | 44.4 | 88.9 | +44.4 | 1 | 5 | 0.22 |" for task in ("math", "all")]
    assert "| n | plain.jsonl | prefix.jsonl | gain | only plain.jsonl | only prefix.jsonl | p (McNemar) |" in head
    assert "a/run.jsonl" in (shown := compare("a/run.jsonl", "b/run.jsonl")) and "b/run.jsonl" in shown
    with pytest.raises(InputError, match="no question in common"):
        compare("plain.jsonl", "other.jsonl")
    write_jsonl(tmp_path / "tasks.jsonl", [{"task": "math", "id": "1"}])
    with pytest.raises(InputError, match="tasks.jsonl:1: .*'question' is missing"):
        compare("tasks.jsonl", "plain.jsonl")


def test_ask_prints_the_steps(place, url, capsys):
    question = next(
        row["question"] for row in load_tasks([str(place / "world" / "train.jsonl")]) if row["kind"] == "math"
    )
    evaluate.ask(evaluate.AskConfig(question=question, url=url))
    shown = capsys.readouterr().out
    assert shown.startswith("Thought: ") and "Code:\n```py\n" in shown and "Answer: " in shown
    evaluate.ask(evaluate.AskConfig(question="x " * 5000, model=str(place / "student"), max_tokens=4))
    assert "longer than the model's context" in capsys.readouterr().out


def test_the_judge_is_asked_once_over_all_processes_and_its_grades_stay(place, monkeypatch, capsys):
    """Verdicts are kept per process, and regrade reads all of them. Another prompt is another question."""

    def behave(path, body, number):
        knows = body["messages"][0]["content"].startswith("You check answers")
        return completion('{"verdict": "correct"}' if knows else "I cannot say.")

    monkeypatch.setenv("STUDENT_KEY", "student's")
    monkeypatch.setenv("JUDGE_KEY", "judge's")
    fact = [path for path in run_config(place, "").tasks if report.TASKS[Path(path).stem].kind == "fact"]
    student = serve(lambda path, body, number: completion("The answer is an island."))
    with serve(behave) as (judge_url, seen), student as (student_url, asked_student):
        options = {"tasks": fact, "method": "cot", "model": None, "url": student_url, "api_key_env": "STUDENT_KEY"}
        judge = {"judge_url": judge_url, "judge_key_env": "JUDGE_KEY"}
        monkeypatch.setenv("WORLD_SIZE", "2")
        for rank in (0, 1):
            monkeypatch.setenv("RANK", str(rank))
            evaluate.run(run_config(place, "judged", **options, **judge))
        monkeypatch.delenv("WORLD_SIZE")
        monkeypatch.delenv("RANK")
        for requests, key in ((asked_student, "student's"), (seen, "judge's")):
            assert {headers["Authorization"] for _, _, headers in requests} == {f"Bearer {key}"}
        rows = rows_of(place, "judged")
        assert {row["why"] for row in rows} == {"judge: correct"} and all(row["correct"] for row in rows)
        evaluate.run(run_config(place, "judged", **options))
        assert rows_of(place, "judged") == rows, "a run again without the judge keeps its grades"
        asked = {body["messages"][0]["content"] for _, body, _ in seen}
        assert len(list((place / "judged").glob("judge.*.jsonl"))) == 2
        again = evaluate.RegradeConfig(folder=str(place / "judged"), **judge)
        evaluate.regrade(again)
        assert {body["messages"][0]["content"] for _, body, _ in seen} == asked
        assert "0 grades changed" in capsys.readouterr().out
        again.prompts = str(place / "judge-prompts")
        shutil.copytree(Prompts.default, again.prompts)
        (place / "judge-prompts" / "judge.txt").write_text("Another judge. {question} {answer} {prediction}")
        evaluate.regrade(again)  # another prompt: asked anew
    shown = capsys.readouterr()
    assert f"{len(rows)} grades changed" in shown.out and f"{len(rows)} answers without a verdict" in shown.out
    assert {row["why"] for row in rows_of(place, "judged")} == {"judge: no verdict"}
    evaluate.regrade(evaluate.RegradeConfig(folder=str(place / "judged")))
    assert {row["why"] for row in rows_of(place, "judged")} <= {"different", "exact", "alias", "no answer"}
    for row, before in zip(rows_of(place, "judged"), rows, strict=True):
        assert row | {"correct": 0, "why": 0} == before | {"correct": 0, "why": 0}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"search": None}, "needs passages"),
        ({"model": None}, "no student"),
        ({"tasks": ["nowhere.jsonl"]}, "No such file .*nowhere.jsonl"),
        ({"system_prompt": "nowhere.txt"}, "No such file .*nowhere.txt"),
        ({"device": "cuda:1"}, "--device cuda:1: there is no GPU"),
        ({"name": "two\nlines"}, "--name 'two.*one line"),
        ({"choose": "shutil.disk_usage"}, "--choose shutil.disk_usage: one candidate leaves no choice"),
        ({"api_key_env": "KEY"}, "--api-key-env KEY: there is no --url"),
        ({"device": "meta"}, "--device meta: auto, cpu, cuda or cuda:1 was expected"),
        ({"sc": 8, "choose": "shutil.disk_usage"}, r"--choose shutil.disk_usage: .* called with \(actions, obs"),
        ({"judge_model": "m"}, "--judge-model m: there is no --judge-url"),
        ({"method": "cot", "top_k": 2}, "--top-k 2: there is no --search"),
        ({"sc": 8, "temperature": 0.0}, "--temperature 0 samples equal candidates"),
        ({"top_p": 0.7}, "--top-p 0.7: greedy answers do not use it"),
        ({"url": "http://127.0.0.1:9", "batch": 4}, "--batch 4: not used with --url"),
    ],
)
def test_bad_options_are_refused_in_one_line_before_anything_is_loaded(place, change, message):
    with pytest.raises((InputError, OSError), match=message) as caught:
        evaluate.run(run_config(place, "bad", **change))
    assert "\n" not in str(caught.value) and not (place / "bad").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": -1.0}, "--temperature .*: must be"),
        ({"top_p": 1.5}, "--top-p .*: must be"),
        ({"sc": 0}, "--sc .*: must be"),
        ({"search": "nowhere"}, "nowhere"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_numbers_outside_their_limits_and_what_cannot_be_loaded_are_one_line(place, change, message):
    with pytest.raises(InputError, match=message) as caught:
        check_values(config := run_config(place, "missing", **change))
        evaluate.run(config)
    assert "\n" not in str(caught.value)
