"""Evaluation: the student's answers, its cache and its memory, lockstep, and the commands run, regrade, compare, ask.

    make test ROOM=evaluate

The student is a tiny random model, which never writes code that runs; where code matters, texts are scripted, or the
scripted teacher of the miniature is asked over HTTP as a served student. Sandboxes and searches are real.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers

import agent_distill
import evaluate
import retriever
from agent_distill import Prompts, Turn, agent_episode
from common import InputError, load_tasks, report
from common.client import read_verdict
from common.models import load_model, render
from conftest import make_model, write_jsonl
from evaluate import Answer, Student, run_lockstep
from miniature import teacher, world
from sandbox import Sandbox
from servers import completion, serve

ROOT = Path(__file__).parent.parent
CHATS = ["Hi", "What is 2 + 2, and why is that so?", "Name a river. " * 6, "x" * 40, "Thought: stop?"]


@pytest.fixture
def model(tiny_model):
    return load_model(tiny_model)


def turns(texts=CHATS, opening=""):
    return [Turn([{"role": "system", "content": "Be brief."}, {"role": "user", "content": t}], opening) for t in texts]


def texts(answers):
    return [answer.texts for answer in answers]


def following(turn, text, reply="And then?"):
    return Turn([*turn.messages, {"role": "assistant", "content": text}, {"role": "user", "content": reply}])


@torch.inference_mode()
def reference(model, tokenizer, turn, new):
    """Greedy decoding in a few lines, without cache, padding or generate."""
    ids = tokenizer(render(tokenizer, turn.messages, reply=True) + turn.opening, add_special_tokens=False)
    ids = ids["input_ids"]
    start = len(ids)
    model.set_attn_implementation("eager")
    while len(ids) < start + new and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


# The student's answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_greedy_answers_equal_token_by_token_decoding_over_several_steps(tiny_model, model, n):
    """With a vanishing temperature all samples are greedy. From step to step the prompts grow by different lengths."""
    other, tokenizer = load_model(tiny_model)
    student = Student(*model, n=n, temperature=1e-6, top_p=1.0, max_tokens=40)
    asked = turns(opening="Thought: I")
    for step in range(3):
        answers = student.answer(asked)
        expected = [reference(other, tokenizer, turn, 40) for turn in asked]
        assert texts(answers) == [[text] * n for text in expected]
        assert len(set(expected)) == len(asked)
        asked = [
            following(turn, text[:9], "So? " * i) for i, (turn, text) in enumerate(zip(asked, expected, strict=True))
        ]
        asked = [*asked[1:], *turns([f"A new one {step}"])]


def test_sampling_is_seeded_and_follows_temperature_and_top_p(model):
    def sample(seed=0, **options):
        student = Student(*model, n=4, **{"temperature": 1.0, "top_p": 1.0, "max_tokens": 20, "seed": seed} | options)
        return texts(student.answer(turns()))

    assert sample() == sample() != sample(seed=1)
    assert len({text for four in sample() for text in four}) > 15
    greedy = texts(Student(*model, max_tokens=20).answer(turns()))
    assert sample(top_p=1e-9) == sample(temperature=0) == [text * 4 for text in greedy]


def test_first_tokens_follow_the_nucleus_distribution(model):
    """2,000 samples of one token against the renormalised probabilities of the nucleus."""
    student = Student(*model, n=2000, temperature=0.7, top_p=0.6, max_tokens=1)
    drawn, tokenizer = student.answer(turns(["Hi"]))[0].texts, model[1]
    ids = tokenizer(render(tokenizer, turns(["Hi"])[0].messages, reply=True), return_tensors="pt")["input_ids"]
    model[0].set_attn_implementation("eager")
    p, order = (model[0](ids).logits[0, -1] / 0.7).softmax(-1).sort(descending=True)
    size = int((p.cumsum(0) < 0.6).sum()) + 1
    expected = dict.fromkeys(set(drawn), 0.0)
    for probability, token in zip((p[:size] / p[:size].sum()).tolist(), order[:size].tolist(), strict=True):
        text = tokenizer.decode([token], skip_special_tokens=True)
        expected[text] = expected.get(text, 0.0) + probability
    for text, probability in expected.items():
        assert drawn.count(text) / 2000 == pytest.approx(probability, abs=0.05), text


def test_a_checkpoint_s_generation_config_has_no_influence(model):
    expected = texts(Student(*model, max_tokens=20).answer(turns()))
    model[0].generation_config = transformers.GenerationConfig(
        eos_token_id=model[1].eos_token_id, do_sample=True, temperature=9.0, top_k=1, repetition_penalty=50.0,
        max_length=3, min_new_tokens=19, no_repeat_ngram_size=1, suppress_tokens=list(range(100)), num_beams=4,
    )  # fmt: skip
    assert texts(Student(*model, max_tokens=20).answer(turns())) == expected


def test_a_long_neighbour_near_the_context_limit_shortens_nobody_else(model):
    student = Student(*model, max_tokens=40)
    long, size = "Name a river. ", 0
    while size < 490:
        long += "Why? "
        size = len(model[1](render(model[1], turns([long])[0].messages, reply=True))["input_ids"])
    alone = student.answer(turns(["Hi"]))
    beside, cut = student.answer(turns(["Hi", long]))
    assert [beside] == alone
    assert 0 < len(model[1](cut.texts[0])["input_ids"]) <= student.context - size + 1 and cut.truncated == 1
    assert student.answer(turns(["Hi", long + "Why? " * 20])) == [beside, None]


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


# The cache, and other architectures ---------------------------------------------------------------


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize("kind", ["Llama", "Phi3", "Qwen3", "Mistral"])
def test_other_architectures_answer_as_plain_generate_does(kind, tiny_tokenizer):
    torch.manual_seed(0)
    options = SMALL | {"vocab_size": len(tiny_tokenizer), "sliding_window": 400}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**options)).eval()
    expected = [reference(model, tiny_tokenizer, turn, 24) for turn in turns()]
    model.generation_config.eos_token_id = tiny_tokenizer.eos_token_id
    student = Student(model, tiny_tokenizer, n=2, temperature=0, max_tokens=24)
    assert texts(student.answer(turns())) == [[text] * 2 for text in expected]
    if kind in ("Phi3", "Mistral"):
        assert student.context == 400 and student.answer(turns(["a b c d " * 200])) == [None]


def test_attention_that_is_no_plain_softmax_is_refused(tiny_tokenizer):
    config = transformers.Gemma2Config(**SMALL | {"vocab_size": len(tiny_tokenizer), "head_dim": 8})
    student = Student(transformers.Gemma2ForCausalLM(config).eval(), tiny_tokenizer, max_tokens=4)
    with pytest.raises(InputError, match="not a plain softmax"):
        student.answer(turns())


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


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ConnectionError("gone")])
def test_a_search_that_fails_through_no_fault_of_the_student_ends_the_run(error, monkeypatch):
    class Broken:
        def search(self, queries, k):
            raise error

    monkeypatch.setattr(retriever, "load", lambda *arguments: Broken())
    config = evaluate.AskConfig(search="index", method="agent")
    opener = functools.partial(Sandbox, tools=agent_distill.open_tools(config, Prompts()) | {"pick": ["a"].__getitem__})
    for call, ends in (("pick(5)", False), ("web_search('x')", True)):
        episode = agent_episode("Q", Prompts(), opener, system="S", max_steps=1)
        run = run_lockstep([(1, episode)], Script(lambda turn, call=call: code(call)))
        if ends:
            with pytest.raises(InputError, match=f"web_search failed: {type(error).__name__}"):
                list(run)
        else:
            assert "IndexError" in next(run)[1].steps[0]["observation"], "another error is the student's to read"


# Commands -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    """A small world with its index, a student that was trained as an agent, as far as its record says, and a base."""
    folder = tmp_path_factory.mktemp("evaluation")
    world.write(world.Config(out=str(folder / "world"), seed=3, train_questions=8, test_questions=2))
    retriever.build(str(folder / "world" / "passages.jsonl"), str(folder / "index"), kind="bm25", quiet=True)
    make_model(folder / "base", tiny_tokenizer, max_position_embeddings=4096)
    shutil.copytree(folder / "base", folder / "student")
    record = {"method": "agent", "training": "distill+prefix", "system_prompt": "The prompt of the training."}
    (folder / "student" / "training.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def url(place):
    """The scripted teacher as a served student: it knows the plans of the test questions too."""
    server = teacher.open_server(teacher.Config(world=str(place / "world")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def run_config(place, out, **more):
    tests = sorted(str(path) for path in (place / "world" / "test").glob("*.jsonl"))
    defaults = {"search": str(place / "index"), "max_tokens": 20, "max_steps": 2, "precision": "fp32", "quiet": True}
    defaults |= {"tasks": tests, "model": str(place / "student"), "out": str(place / out), "isolation": "auto"}
    return evaluate.RunConfig(**defaults | more)


def rows_of(place, out):
    return sorted(report.transcripts(place / out), key=lambda row: (row["task"], row["id"]))


def test_run_and_report(place, capsys):
    evaluate.run(run_config(place, "runs/agent"))
    evaluate.run(run_config(place, "runs/sc", sc=3))
    evaluate.run(run_config(place, "runs/rag", method="cot-rag", model=str(place / "base")))
    evaluate.write_report(evaluate.ReportConfig(folder=str(place / "runs")))
    shown = capsys.readouterr().out
    results = json.loads((place / "runs" / "agent" / "results.json").read_text())
    assert len(results) == 8 and {row["n"] for row in results} == {2}
    for words in ("student", "agent distilled + prefix + SC-action", "CoT + RAG prompting", "Bamboogle"):
        assert words in shown
    assert (place / "runs" / "report.md").read_text() in shown and (place / "runs" / "bars.svg").exists()
    assert "<html" in (place / "runs" / "report.html").read_text()
    assert all(len(step["candidates"]) == 3 for row in rows_of(place, "runs/sc") for step in row["steps"])
    rag = rows_of(place, "runs/rag")
    assert all(row["kind"] == "math" or row["messages"][1]["content"].startswith("[1] ") for row in rag)
    stops = {(row["stop"], row["usage"]["truncated"], row["usage"]["completion_tokens"] == 20) for row in rag}
    assert ("truncated", 1, True) in stops and stops <= {("truncated", 1, True), ("no_answer", 0, False)}


def test_the_system_prompt_is_the_one_of_the_training(place, capsys):
    def system(out, **more):
        evaluate.run(run_config(place, f"prompt/{out}", limit=1, **more))
        return rows_of(place, f"prompt/{out}")[0]["messages"][0]["content"]

    other = place / "other.txt"
    other.write_text("Another.\n")
    assert system("trained") == "The prompt of the training."
    assert system("base", model=str(place / "base")) == Prompts().system("agent_system", ["web_search"])
    assert system("cot", method="cot") == Prompts().cot_system
    assert "another system prompt" not in capsys.readouterr().err
    assert system("file", system_prompt=str(other)) == "Another."
    assert "trained with another system prompt: 'The prompt of the training.'" in capsys.readouterr().err


def test_killed_and_started_again_it_ends_as_an_uninterrupted_run(place):
    """kill -9 after the first questions, an incomplete last line, another batch: the same greedy answers."""
    evaluate.run(run_config(place, "whole", max_tokens=60))
    config = run_config(place, "killed", max_tokens=60, batch=3)
    options = ["--search", config.search, "--max-tokens", "60", "--max-steps", "2", "--precision", "fp32"]
    command = [sys.executable, "evaluate.py", *config.tasks, "--model", config.model, "--out", config.out, *options]
    process = subprocess.Popen([*command, "--batch", "3"], cwd=ROOT, stderr=subprocess.DEVNULL)
    journal = place / "killed" / "transcripts.0.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 2 <= len(rows_of(place, "killed")) < 16
    with open(journal, "a") as file:
        file.write('{"id": "incompl')
    evaluate.run(config)
    assert rows_of(place, "killed") == rows_of(place, "whole")


def test_torchrun_s_processes_share_a_folder(place, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        evaluate.run(run_config(place, "shards", max_tokens=60))
    assert [sum(1 for _ in open(path)) for path in report.transcript_files(place / "shards")] == [8, 8]
    assert "16 questions, 8 tasks" in capsys.readouterr().out
    monkeypatch.undo()
    evaluate.run(run_config(place, "unsharded", max_tokens=60))
    assert rows_of(place, "shards") == rows_of(place, "unsharded")


def test_results_made_with_other_settings_are_not_mixed(place, tmp_path):
    evaluate.run(run_config(place, "guarded", limit=1))
    with pytest.raises(InputError, match="made with max-steps 2, not 3"):
        evaluate.run(run_config(place, "guarded", max_steps=3))
    shutil.copytree(Prompts.default, tmp_path / "prompts")
    evaluate.run(run_config(place, "guarded", limit=1, prompts=str(tmp_path / "prompts"), batch=2))
    (tmp_path / "prompts" / "no_code.txt").write_text("Other words.")
    with pytest.raises(InputError, match="made with prompts-sha256"):
        evaluate.run(run_config(place, "guarded", limit=1, prompts=str(tmp_path / "prompts")))


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


def test_compare_pairs_the_questions_of_trajectories_too(tmp_path, capsys):
    """What the first-thought prefix brings to the teacher: nine shared questions, one lost, five won."""
    for name, count, right in (("plain.jsonl", 10, range(4)), ("prefix.jsonl", 9, range(1, 9))):
        write_jsonl(tmp_path / name, [{"task": "math", "id": i, "correct": i in right} for i in range(count)])
    evaluate.compare(evaluate.CompareConfig(first=f"{tmp_path}/plain.jsonl", second=f"{tmp_path}/prefix.jsonl"))
    assert "| all | 9 | 44.4 | 88.9 | +44.4 | 1 | 5 | 0.22 |" in capsys.readouterr().out
    tasks = write_jsonl(tmp_path / "tasks.jsonl", [{"task": "math", "id": 1}])
    with pytest.raises(InputError, match="tasks.jsonl: not trajectories: the field 'correct' is missing"):
        evaluate.compare(evaluate.CompareConfig(first=tasks, second=tasks))


def test_ask_prints_the_steps(place, url, capsys):
    question = next(
        row["question"] for row in load_tasks([str(place / "world" / "train.jsonl")]) if row["kind"] == "math"
    )
    evaluate.ask(evaluate.AskConfig(question=question, url=url))
    shown = capsys.readouterr().out
    assert shown.startswith("Thought: ") and "Code:\n```py\n" in shown and "Answer: " in shown
    evaluate.ask(evaluate.AskConfig(question="x " * 5000, model=str(place / "student"), max_tokens=4))
    assert "longer than the model's context" in capsys.readouterr().out


def test_the_judge_is_asked_once_over_all_processes(place, monkeypatch, capsys):
    """Verdicts are kept per process, and regrade reads all of them. Another prompt is another question."""

    def behave(path, body, number):
        knows = body["messages"][0]["content"].startswith("You check answers")
        return completion('{"verdict": "correct"}' if knows else "I cannot say.")

    fact = [path for path in run_config(place, "").tasks if report.TASKS[Path(path).stem].kind == "fact"]
    student = serve(lambda path, body, number: completion("The answer is an island."))
    with serve(behave) as (judge_url, seen), student as (student_url, _):
        monkeypatch.setenv("WORLD_SIZE", "2")
        for rank in (0, 1):
            monkeypatch.setenv("RANK", str(rank))
            options = {"tasks": fact, "method": "cot", "model": None, "url": student_url, "judge_url": judge_url}
            evaluate.run(run_config(place, "judged", **options))
        monkeypatch.undo()
        rows = rows_of(place, "judged")
        assert {row["why"] for row in rows} == {"judge: correct"} and all(row["correct"] for row in rows)
        asked = len(seen)
        assert asked == len({body["messages"][0]["content"] for _, body, _ in seen})
        assert len(list((place / "judged").glob("judge.*.jsonl"))) == 2
        again = evaluate.RegradeConfig(folder=str(place / "judged"), judge_url=judge_url)
        evaluate.regrade(again)
        assert len(seen) == asked and "0 grades changed" in capsys.readouterr().out
        prompts = place / "judge-prompts"
        shutil.copytree(Prompts.default, prompts)
        (prompts / "judge.txt").write_text("Another judge. {question} {answer} {prediction}")
        again.prompts = str(prompts)
        evaluate.regrade(again)  # another prompt: asked anew, three times each, as there is no verdict
        assert len(seen) == asked + 3 * len({(row["question"], str(row["prediction"])) for row in rows})
    assert f"{len(rows)} grades changed" in capsys.readouterr().out
    assert {row["why"] for row in rows_of(place, "judged")} == {"judge: no verdict"}
    evaluate.regrade(evaluate.RegradeConfig(folder=str(place / "judged")))
    assert {row["why"] for row in rows_of(place, "judged")} <= {"different", "exact", "alias", "no answer"}
    for row, before in zip(rows_of(place, "judged"), rows, strict=True):
        assert row | {"correct": 0, "why": 0} == before | {"correct": 0, "why": 0}


@pytest.mark.parametrize("reply, verdict", [
    ('{"verdict": "correct"}', "correct"), ('```json\n{"verdict": "incorrect"}\n```', "incorrect"),
    ("Correct.", "correct"),
    ("not correct", None), ('{"verdict": "correct", "sure": 1}', None), ('{"verdict": "maybe"}', None), ("", None),
    ('["correct"]', None), ("The answer is incorrect", None), ('{"verdict": ["correct"]}', None),
])  # fmt: skip
def test_verdicts_are_read_strictly(reply, verdict):
    assert read_verdict(reply) == verdict


@pytest.mark.parametrize(
    "change, message",
    [
        ({"search": None}, "needs passages"),
        ({"model": None}, "no student"),
        ({"tasks": ["nowhere.jsonl"]}, "nowhere.jsonl: No such file"),
        ({"search": "nowhere"}, "nowhere"),
        ({"system_prompt": "nowhere.txt"}, "nowhere.txt: No such file"),
        ({"device": "cuda:1"}, "--device cuda:1: there is no GPU"),
        ({"choose": "nowhere.vote"}, "no function nowhere.vote: No module"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input_is_one_line(place, change, message):
    with pytest.raises(InputError, match=message) as caught:
        evaluate.run(run_config(place, "bad", **change))
    assert "\n" not in str(caught.value)
