"""The miniature: its world keeps its promises, its teacher speaks the protocol, its students are ordinary models.

pytest tests/test_miniature.py
"""

import json
import random
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import agent_distill
import miniature
import retriever
import scratch
import train
import world
from sandbox import Sandbox
from tasks import Prompts, load_tasks, open_search

ROOT = Path(miniature.__file__).parent
FLAWLESS = dict.fromkeys(("wrong_plan", "wrong_plan_cot", "syntax_error", "run_error", "slip", "slip_cot"), 0.0)


@pytest.fixture(scope="module")
def built():
    return world.build(0, train_questions=3000, test_questions=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("miniature") / "world"
    miniature.make_world(miniature.WorldConfig(out=str(path), train_questions=3000, test_questions=40))
    retriever.build(str(path / "passages.jsonl"), str(path / "index"))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return scratch.make_tokenizer(miniature.tokenizer_texts(folder, teacher(folder), Prompts()))


def teacher(folder, **rates):
    return miniature.Teacher(miniature.TeacherConfig(world=str(folder), **rates))


def chat(question, agent=True):
    prompts = Prompts()
    system = prompts.agent_system if agent else prompts.cot_system
    content = prompts.fill("question", question=question) if agent else question
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


# The world


def test_a_world_is_a_function_of_its_seed(built):
    again, other = world.build(0, 3000, 40), world.build(1, 3000, 40)
    for part in ("passages", "train", "test", "plans"):
        assert getattr(again, part) == getattr(built, part)
        assert getattr(other, part) != getattr(built, part)


def test_files_are_task_files_and_name_domain_and_kind(folder, built):
    paths = [str(folder / "train.jsonl"), *(str(folder / "test" / f"{task}.jsonl") for task in world.DOMAINS)]
    rows = load_tasks(paths)
    assert len(rows) == 3000 + 8 * 40
    assert all(set(row) == {"id", "task", "kind", "domain", "question", "answer"} for row in rows)
    assert {row["domain"] for row in rows if row["task"] == "hotpotqa"} == {"in"}
    assert {row["domain"] for row in rows if row["task"] == "bamboogle"} == {"out"}
    assert len({row["question"] for row in rows}) == len(rows)
    passages = [json.loads(line) for line in (folder / "passages.jsonl").read_text().splitlines()]
    assert passages == built.passages
    assert all(re.match(r'^"[^"\n]+"\n[^\n]+$', passage["contents"]) for passage in passages)


def plans_of(built, split):
    return [plan for plan in built.plans if plan["id"].startswith(split + "-")]


def test_training_never_meets_the_held_out_entities(built):
    held_out = built.world.held_out
    assert len(held_out) == 0.3 * len(built.world.facts)
    for split in ("train", "test"):
        for plan in plans_of(built, split):
            if plan["shape"] != "math":
                paths = [built.world.follow(entity, plan["relations"]) for entity in plan["entities"]]
                if split == "train":
                    assert held_out.isdisjoint(value for path in paths for value in path)
                else:
                    assert held_out.issuperset(path[0] for path in paths)


def test_numbers_from_100_on_are_in_training_or_in_test_questions(built):
    numbers = {
        split: {
            int(number)
            for plan in plans_of(built, split)
            if plan["shape"] == "math"
            for number in re.findall(r"\d+", plan["question"])
        }
        for split in ("train", "test")
    }
    assert len(numbers["train"]) > 1000 and len(numbers["test"]) > 200
    assert all(number < 100 for number in numbers["train"] & numbers["test"])


def test_out_of_domain_tasks_ask_what_training_never_shows(built):
    def kinds(split, task):
        """What is asked, without entities and numbers."""
        rows = [plan for plan in plans_of(built, split) if f"-{task}-" in plan["id"]]
        return {(p["shape"], *p.get("relations", [re.sub(r"\d+", "#", p["question"])])) for p in rows}

    trained = {tuple(p["relations"]) for p in plans_of(built, "train") if p["shape"] == "chain"}
    asked = {kind[1:] for kind in kinds("test", "bamboogle")}
    assert asked == world.BAMBOOGLE_PAIRS and asked.isdisjoint(trained)
    for task in ("musique", "aime", "olymmath"):
        assert kinds("test", task) and kinds("test", task).isdisjoint(kinds("train", task))
    compared = {split: {k for k in kinds(split, "2wikimultihopqa") if k[0] != "chain"} for split in ("train", "test")}
    unseen = {relation for _, relation in compared["test"]} - {relation for _, relation in compared["train"]}
    assert unseen == {"publication year", "setting"}
    digits = {
        split: {
            len(n) for p in plans_of(built, split) if "gsm_hard" in p["id"] for n in re.findall(r"\d+", p["question"])
        }
        for split in ("train", "test")
    }
    assert digits == {"train": {2, 3, 4, 5}, "test": {5}}


def test_every_question_is_answered_by_following_its_plan_through_the_passages(built):
    facts = miniature.read_facts("\n\n".join(row["contents"] for row in built.passages))
    assert facts == built.world.facts
    for plan in built.plans:
        if plan["shape"] == "math":
            assert world.run_code(plan["code"]) == plan["answer"] != world.run_code(plan["wrong_code"])
            continue
        values = []
        for entity in plan["entities"]:
            for relation in plan["relations"]:
                entity = facts[entity][relation]
            values.append(entity)
        assert miniature.conclude(plan, values) == plan["answer"]


def test_guessing_yes_or_the_first_name_is_no_better_than_chance(built):
    rows = [plan for plan in built.plans if plan["shape"] == "same"]
    assert 0.4 < sum(plan["answer"] == "yes" for plan in rows) / len(rows) < 0.6
    rows = [plan for plan in built.plans if plan["shape"] in ("lower", "higher")]
    assert 0.4 < sum(plan["answer"] == plan["entities"][0] for plan in rows) / len(rows) < 0.6


# The teacher's words


def test_a_flawless_teacher_solves_tasks_of_every_kind_with_real_search_and_code(folder, built):
    prompts, script = Prompts(), teacher(folder, **FLAWLESS)
    search = open_search(str(folder / "index"), prompts, 2)
    rows = [row for task in world.DOMAINS for row in built.test[task][:3]]
    for row in rows:
        episode = agent_distill.agent_episode(
            row["question"], prompts, lambda: Sandbox(tools={"web_search": search}), system=prompts.agent_system
        )
        done = agent_distill.drive(episode, lambda turn: [script.reply(turn.messages, turn.opening)])
        assert (str(done.prediction), done.stop) == (row["answer"], "final_answer"), row["question"]
        cot = script.reply(chat(row["question"], agent=False))
        assert cot.endswith(f"\\boxed{{{row['answer']}}}.") and "\n\n" in cot


def test_mistakes_come_at_the_stated_rates(folder, built):
    script = teacher(folder, wrong_plan=0.12, wrong_plan_cot=0.03, syntax_error=0.05, run_error=0.05)
    plans = {plan["question"]: plan for plan in built.plans}
    right, wrong = dict.fromkeys(("agent", "cot", "prefixed"), 0), dict.fromkeys(("syntax", "run"), 0)
    for row in built.train:
        need = script.draw_need(plans[row["question"]], random.Random(0), wrong_rate=0.0)
        cot = script.reply(chat(row["question"], agent=False))
        agent = script.reply(chat(row["question"]))
        right["cot"] += cot.startswith(f"I need {need}.\n\n")
        right["agent"] += agent.startswith(f"Thought: I need {need}.\n")
        prefixed = script.reply(chat(row["question"]), "Thought: " + agent_distill.first_step(cot))
        assert prefixed.startswith("\nCode:\n```py\n")
        code = agent_distill.parse_action(agent).code
        wrong["run"] += "show(" in code or re.search(r"(^|[^_])answer\(", code) is not None
        wrong["syntax"] += not agent_distill._is_python(code)
    n = len(built.train)
    for count, rate in ((right["agent"], 0.88), (right["cot"], 0.97), (wrong["syntax"], 0.05), (wrong["run"], 0.05)):
        assert abs(count / n - rate) < 4 * (rate * (1 - rate) / n) ** 0.5


def test_the_teacher_follows_the_plan_that_opens_its_first_thought(folder, built):
    script = teacher(folder, **FLAWLESS)
    plan = next(p for p in built.plans if p["shape"] == "chain" and len(p["relations"]) == 2)
    entity, relation = plan["entities"][0], plan["relations"][0]
    other = next(r for r in built.world.facts[entity] if r != relation)
    reply = script.reply(chat(plan["question"]), f"Thought: I need {entity}'s {other}.")
    assert reply == f'\nCode:\n```py\nprint(web_search("{entity}\'s {other}"))\n```<end_code>'


def test_an_error_is_mended_in_the_next_step(folder, built):
    script = teacher(folder, **{**FLAWLESS, "run_error": 1.0})
    messages = chat(next(p for p in built.plans if p["shape"] == "chain")["question"])
    first = script.reply(messages)
    assert "show(web_search(" in first
    messages += [{"role": "assistant", "content": first}]
    messages += [{"role": "user", "content": "Observation:\nExecution logs:\n\nError:\nNameError: name 'show'"}]
    assert "That failed. I need" in script.reply(messages) and "print(web_search(" in script.reply(messages)


# The teacher's server


@pytest.fixture(scope="module")
def url(folder):
    server = miniature.open_server(miniature.TeacherConfig(world=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def ask(url, question, **body):
    body = {"model": miniature.MODEL, "messages": chat(question), **body}
    return requests.post(f"{url}/chat/completions", json=body, timeout=10)


def test_the_server_speaks_chat_completions(url, built):
    assert requests.get(f"{url}/models", timeout=10).json()["data"][0]["id"] == miniature.MODEL
    question = built.train[0]["question"]
    answer = ask(url, question, n=3, temperature=0.7, seed=1, stop=["<end_code>"]).json()
    assert answer["object"] == "chat.completion" and [c["index"] for c in answer["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert all(text.startswith("Thought: ") and text.endswith("```") for text in texts)
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    short = ask(url, question, max_tokens=3).json()["choices"][0]
    assert short["finish_reason"] == "length" and short["message"]["content"] == "Thought: "


def test_greedy_repeats_itself_and_seeds_make_samples_differ(url, built):
    def contents(question, **body):
        return [c["message"]["content"] for c in ask(url, question, **body).json()["choices"]]

    questions = [row["question"] for row in built.train[:30]]
    greedy = [contents(q, temperature=0, seed=1) for q in questions]
    assert greedy == [contents(q, temperature=0, seed=2) for q in questions]
    first, again, other = ([contents(q, temperature=1, seed=seed, n=2) for q in questions] for seed in (1, 1, 2))
    assert first == again != other
    assert any(a != b for a, b in first)


def test_the_server_continues_a_message_and_only_writes_the_continuation(url, built):
    plan = next(p for p in built.plans if p["shape"] == "math")
    opened = [*chat(plan["question"]), {"role": "assistant", "content": f"Thought: I need {plan['need']}."}]
    fields = {"messages": opened, "continue_final_message": True}
    answer = ask(url, "", **fields, add_generation_prompt=False)
    assert answer.json()["choices"][0]["message"]["content"].startswith("\nCode:\n```py\n")
    assert ask(url, "", **fields).status_code == 400
    closed = chat(plan["question"])
    assert ask(url, "", messages=closed, continue_final_message=True, add_generation_prompt=False).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": [{"role": "wizard", "content": "hi"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"model": "another"},
        {"n": 0},
        {"n": "2"},
        {"temperature": 3},
        {"max_tokens": 0},
        {"stop": [1]},
        {"stream": True},
    ],
)
def test_bad_requests_are_refused(url, body):
    answer = ask(url, "What?", **body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_what_is_not_json_or_not_a_path_is_refused(url):
    assert requests.post(f"{url}/chat/completions", data="{", timeout=10).status_code == 400
    assert requests.post(f"{url}/chat/completions", data="[]", timeout=10).status_code == 400
    assert requests.post(f"{url}/nothing", json={}, timeout=10).status_code == 404
    assert requests.get(f"{url}/nothing", timeout=10).status_code == 404


def test_unknown_questions_get_an_honest_answer(url):
    assert "I am a script" in ask(url, "Who are you?").json()["choices"][0]["message"]["content"]


def run(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "miniature.py"), *arguments], capture_output=True, text=True)


def test_then_runs_a_command_beside_the_server_and_ends_with_its_status(folder):
    code = (
        "import os, urllib.request as u; u.urlopen(os.environ['TEACHER_URL'] + '/models').read(); raise SystemExit(7)"
    )
    done = run("teacher", str(folder), "--then", f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}")
    assert done.returncode == 7, done.stderr


def test_a_missing_world_is_one_clear_line(tmp_path):
    done = run("teacher", str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# The base students


def test_the_tokenizer_gives_a_name_the_same_tokens_everywhere_and_digits_their_own(tokenizer, built):
    name = built.world.entities["person"][0]
    ids = tokenizer(name)["input_ids"]
    for text in (f" {name}", f'"{name}"', f"({name})", f"\n{name}'s", f"is {name}."):
        found = tokenizer(text)["input_ids"]
        assert any(found[i : i + len(ids)] == ids for i in range(len(found))), text
    assert len(tokenizer("314159")["input_ids"]) == 6
    assert len(tokenizer) == scratch.VOCABULARY
    text = "Thought: I need Ada's seat.\nCode:\n```py\nfinal_answer(12 + 3)\n```<end_code> é\t"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_base_student_is_an_ordinary_model_and_follows_from_its_seed(folder, tokenizer, tmp_path):
    models = []
    for name in ("first", "second"):
        out = tmp_path / name
        config = miniature.BaseConfig(
            world=str(folder), out=str(out), size="S", documents=8, warmup_steps=2, warmups=1, seed=3, quiet=True
        )
        miniature.make_base(config)
        models.append(AutoModelForCausalLM.from_pretrained(out))
        loaded = AutoTokenizer.from_pretrained(out)
        for _, row in zip(range(50), (folder / "passages.jsonl").open(), strict=False):
            assert loaded(row)["input_ids"] == tokenizer(row)["input_ids"]
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert models[0].config.model_type == "qwen2" and models[0].config.tie_word_embeddings
    messages = [*chat("What?", agent=False), {"role": "assistant", "content": "I need \\boxed{1}."}]
    ids, mask = train.encode(loaded, messages)
    assert loaded.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "I need \\boxed{1}.<|im_end|>"
    prompt = loaded.apply_chat_template(messages[:2], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert models[0].generate(prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt.shape[1]


def test_the_hand_made_heads_look_at_their_distance(tokenizer):
    torch.manual_seed(0)
    model = scratch.new_model("M", tokenizer)
    model.set_attn_implementation("eager")
    ids = torch.randint(len(tokenizer), (1, 40))
    attention = model(ids, output_attentions=True).attentions[0][0]  # (heads, queries, keys)
    for head, distance in enumerate((1, 2, 3, 0)):
        diagonal = attention[head].diagonal(-distance)[4:]
        assert diagonal.mean() > 0.9


def test_copy_rows_train_only_the_repetition(tokenizer):
    for row in scratch.copy_rows(random.Random(0), tokenizer, 50):
        ids, mask = row["input_ids"], row["loss_mask"]
        half = len(ids) // 2
        assert ids[:half] == ids[half:] and sum(mask) == half - 1 and not any(mask[: half + 1])
