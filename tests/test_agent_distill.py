"""The method: parsing a model's text, the episode with scripted candidates, prefix, filter.

    make test ROOM=agent_distill

Code runs in the real sandbox; the model's side is a list of texts.
"""

import functools
import json
import random
import re
import shutil
import statistics
import time

import pytest
import torch

import agent_distill
import retriever
from agent_distill import EpisodeConfig, Prompts, Running, agent_episode, first_step, open_tools, parse_action
from common import SHOWN, InputError
from common.client import BadRequest
from conftest import read_rows, write_jsonl
from sandbox import Sandbox

PROMPTS = Prompts()


# Parsing ------------------------------------------------------------------------------------------

SHAPES = {
    "plain": "Thought: add.\nCode:\n```py\nx = 1 + 1\nprint(x)\n```<end_code>",
    "no language": "Thought: add.\nCode:\n```\nx = 1 + 1\nprint(x)\n```<end_code>",
    "spaces": "  Thought:  add.  \nCode: \n``` py \nx = 1 + 1\nprint(x)\n```<end_code>\n",
    "Windows lines": "Thought: add.\r\nCode:\r\n```py\r\nx = 1 + 1\r\nprint(x)\r\n```<end_code>\r\n",
    "no thought label": "add.\nCode:\n```py\nx = 1 + 1\nprint(x)\n```<end_code>",
    "no code label": "Thought: add.\n```py\nx = 1 + 1\nprint(x)\n```<end_code>",
    "unclosed fence": "Thought: add.\nCode:\n```py\nx = 1 + 1\nprint(x)\n",
    "closed on the last line of code": "Thought: add.\nCode:\n```py\nx = 1 + 1\nprint(x)```<end_code>",
    "no fence": "Thought: add.\nCode:\nx = 1 + 1\nprint(x)\n<end_code>",
    "prose after": "Thought: add.\nCode:\n```py\nx = 1 + 1\nprint(x)\n```\nThis prints the sum.",
    "made-up observation": "Thought: add.\nCode:\n```py\nx = 1 + 1\nprint(x)\n```\nObservation: 3\nThought: so 3",
    "label and fence on one line": "Thought: add.\nCode: ```py\nx = 1 + 1\nprint(x)\n```<end_code>",
    "another language first": "Thought: add.\n```json\n[1]\n```\nCode:\n```py\nx = 1 + 1\nprint(x)\n```<end_code>",
    "Python": "Thought: add.\nCode:\n```Python\nx = 1 + 1\nprint(x)\n```<end_code>",
    "python3": "Thought: add.\nCode:\n```python3\nx = 1 + 1\nprint(x)\n```<end_code>",
    "tool_code": "Thought: add.\nCode:\n```tool_code\nx = 1 + 1\nprint(x)\n```<end_code>",
    "{python}": "Thought: add.\nCode:\n```{python}\nx = 1 + 1\nprint(x)\n```<end_code>",
    "{.python #first}": "add.\n``` {.python #first}\nx = 1 + 1\nprint(x)\n```<end_code>",
    "attributes in braces": "add.\nCode:\n```python {cmd=true .big}\nx = 1 + 1\nprint(x)\n```<end_code>",
    "attributes": "add.\nCode:\n```python title=\"sum.py\" n='1'\nx = 1 + 1\nprint(x)\n```<end_code>",
    "four backticks": "Thought: add.\nCode:\n````py\nx = 1 + 1\nprint(x)\n````",
    "code on the line of the fence": "Thought: add.\nCode:\n```py x = 1 + 1\nprint(x)\n```",
    "labels in bold": "Thought: add.\n**Code:**\n```py\nx = 1 + 1\nprint(x)\n```<end_code>",
    "closed but not opened": "Thought: add.\nCode:\nx = 1 + 1\nprint(x)\n```<end_code>",
    "closed but not opened, and prose": "add.\nCode:\nx = 1 + 1\nprint(x)\n```\nThis prints\nObservation: 3",
    "never closed, made-up observation": "add.\nCode:\n```py\nx = 1 + 1\nprint(x)\nObservation: 3",
    "indented": "add.\n1. Code:\n   ```py\n   x = 1 + 1\n   print(x)\n   ```",
    "output after it": "add.\n```py\nx = 1 + 1\nprint(x)\n```\nOutput:\n```\n2\n```<end_code>",
    "output after unmarked code": "add.\n```\nx = 1 + 1\nprint(x)\n```\nOutput:\n```\n2\n```",
    "form of the answer first": "add.\n```\nx: number\n```\nCode:\n```\nx = 1 + 1\nprint(x)\n```",
    "words before an unmarked fence": "add.\nCode:\nLike this:\n```\nx = 1 + 1\nprint(x)\n```",
    "<code>": "Thought: add.\n<code>\nx = 1 + 1\nprint(x)\n</code>",
    "label and <code>": "Thought: add.\nCode:\n<code>\nx = 1 + 1\nprint(x)\n</code>",
    "<code> that never closes": "Thought: add.\n<code>\nx = 1 + 1\nprint(x)",
    "<code> around a fence": "Thought: add.\n<code>\n```py\nx = 1 + 1\nprint(x)\n```\n</code>",
    "thinking": "<think>\nI try\n```py\nfinal_answer(1)\n```\n</think>\n\nadd.\n```py\nx = 1 + 1\nprint(x)\n```",
    "thinking, in full": "<thinking>\n```py\n7\n```\n</thinking>\nadd.\n```py\nx = 1 + 1\nprint(x)\n```",
    "thinking of Gemini": "<thought>\n```py\n7\n```\n</thought>\nadd.\n```py\nx = 1 + 1\nprint(x)\n```",
    "thinking of Magistral": "[THINK]```py\n7\n```[/THINK]add.\n```py\nx = 1 + 1\nprint(x)\n```",
    "thinking of gpt-oss": "<|channel|>analysis<|message|>```py\n7\n```<|end|><|start|>assistant<|channel|>final"
    "<|message|>add.\n```py\nx = 1 + 1\nprint(x)\n```",
    "made-up observation in bold": "add.\n```py\nx = 1 + 1\nprint(x)\n```\n**Observation:** 2\n```py\n7\n```",
    **{
        f"made-up {words}": f"add.\n```py\nx = 1 + 1\nprint(x)\n```\n{words}\n```py\n7\n```"
        for words in ("**Observation**: 2", "observations:\n2", "Observation 1: 2", "<observation>2</observation>")
    },
    "made-up logs": "add.\n```py\nx = 1 + 1\nprint(x)\n```\nExecution logs:\n2\n```py\n7\n```",
    "thinking opened in the prompt": "try:\n```py\n7\n```\n</think>\nadd.\n```py\nx = 1 + 1\nprint(x)\n```",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_parse_shapes(shape):
    action = parse_action(SHAPES[shape])
    assert action.code == "x = 1 + 1\nprint(x)"
    assert action.thought.split("\n")[0] == "add."
    assert "Observation" not in action.text and "\r" not in action.text and "</think" not in action.text
    assert bool(action.thinking) == shape.startswith("thinking")
    again = parse_action(action.text)  # what stays in the context reads the same again
    assert (again.text, again.thought, again.code) == (action.text, action.thought, action.code)


TEXTS = {
    "": None, "I do not know.": None, "Thought: it is Paris.": None, "Code:\n": None, "```py\n```": None, "yes": None,
    "Thought: t\nCode:\n```py\nprint((1\n```<end_code>": "print((1",  # a syntax error is for the sandbox to find
    "Thought: t\nCode:\n```py\na = 1\n```\nand then\n```py\nprint(a)\n```<end_code>": "a = 1\n\nprint(a)",
    "```py\na = 1\n```py\nprint(a)\n```": "a = 1\n\nprint(a)",
    "Code: print(1)": "print(1)", "Code: `print(1)`": "print(1)", "code: ```py print(1)```<end_code>": "print(1)",
    "```print(1)```": "print(1)", "```py {1, 2}```": "{1, 2}", "```py x='a'```": "x='a'",
    "t <code>print(1)</code>": "print(1)",
    "```py\nt = '''\n```\na\n```\n'''\nprint(t)\n```<end_code>": "t = '''\n```\na\n```\n'''\nprint(t)",
    '```py\nt = """\n    ```py\n"""\n```\nThat is """.': 't = """\n    ```py\n"""',
    '```py\n# as """ here\nprint(1)\n```\nThat is """.': '# as """ here\nprint(1)',
    '```py\nprint("""\nObservation: 3\n""")\n```\nObservation: made up\n```py\nprint(5)\n```':
        'print("""\nObservation: 3\n""")',
    "<think>it is\n```py\nfinal_answer(3)\n```": None,  # thinking that never ended: no answer
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_code_of_other_texts(text):
    assert parse_action(text).code == TEXTS[text]


def test_a_reply_that_ends_inside_a_stop_string_loses_it():
    whole = step("print(1)").removesuffix("<end_code>")
    for n in range(1, len("<end_code>")):
        assert parse_action(whole + "<end_code>"[:n]).text == step("print(1)")
    for n in range(len("\nObserv"), len("\nObservation:")):
        assert parse_action(whole + "\nObservation:"[:n]).text == step("print(1)")


@pytest.mark.parametrize(
    "text", ["'''" * 9999, "- " * 99999, "Code:" + " " * 99999 + "y", "<think>" * 9999, "```" * 9999]
)
def test_long_nonsense_is_read_in_no_time(text):
    started = time.monotonic()
    parse_action(f"```py\n{text}")
    parse_action(text)
    assert time.monotonic() - started < 5  # a bound: seconds would mean steps that grow with the square of the length


def test_prompts_agree_with_the_parser():
    """One format: the examples in every agent prompt parse, and name the fence and stop string of the constants."""
    for name in ("agent_system", "agent_student_system"):
        text = getattr(PROMPTS, name)
        assert agent_distill.CODE_OPEN in text and agent_distill.CODE_CLOSE in text
    examples = PROMPTS.agent_system.split("Two examples of finished tasks.")[1].split("\nThought: ")[1:]
    assert len(examples) >= 4
    for example in examples:
        assert parse_action(example.split("\nObservation:")[0]).code
    end, observation = agent_distill.STOP
    assert agent_distill.CODE_CLOSE.endswith(end)
    assert all(text.startswith(observation.strip()) for text in (PROMPTS.observation, PROMPTS.error))


def test_every_tool_is_described_to_teacher_and_student(tmp_path):
    """The tools come from one function, and each needs a text in prompts/tools."""
    (tmp_path / "p.jsonl").write_text('{"id": "1", "contents": "\\"Ems\\"\\nA river."}\n')
    retriever.build(str(tmp_path / "p.jsonl"), str(tmp_path / "index"), quiet=True)
    tools = open_tools(EpisodeConfig(search=str(tmp_path / "index")), PROMPTS)
    assert "Ems" in tools["web_search"]("river Ems")
    teacher, student = (PROMPTS.system(name, tools) for name in ("agent_system", "agent_student_system"))
    for name in (*tools, "final_answer"):
        assert f"- {name}(" in teacher and f"{name}(" in student
    assert "web_search(query), final_answer(answer)" in student and "{" not in student
    shutil.copytree(Prompts.default, tmp_path / "prompts")
    (tmp_path / "prompts" / "tools" / "count.txt").write_text("count(words: dict[str, int], n: int = 3) -> str: counts")
    student = Prompts(tmp_path / "prompts").system("agent_student_system", ["count"])
    assert "Tools: count(words, n), final_answer(answer)." in student
    for text in ("runs a program", "shell(", "other(x): runs"):
        (tmp_path / "prompts" / "tools" / "shell.txt").write_text(text)
        with pytest.raises(InputError, match="tools/shell.txt: describes a tool of --tools"):
            Prompts(tmp_path / "prompts").system("agent_system", ["shell"])
    assert "in steps, 3 at the most" in PROMPTS.system("agent_system", [], max_steps=3)


def test_a_search_that_fails_is_not_for_the_model_to_read(monkeypatch):
    """It ends the run, as the memory of a GPU does that an index cannot get. (test_collect.py: a server's failure)"""

    class Broken:
        def search(self, queries, k):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(retriever, "load", lambda *arguments: Broken())
    with pytest.raises(InputError, match="web_search failed: OutOfMemoryError"):
        open_tools(EpisodeConfig(search="index"), PROMPTS)["web_search"]("x")


def test_the_hash_covers_the_prompts_that_are_used(tmp_path):
    shutil.copytree(Prompts.default, tmp_path / "prompts")
    for name, methods in (("judge", []), ("error", ["agent"]), ("search_result", ["agent", "cot-rag"])):
        before = {method: Prompts(tmp_path / "prompts").sha256(method) for method in SHOWN}
        with open(tmp_path / "prompts" / f"{name}.txt", "a") as file:
            file.write("More text")
        after = Prompts(tmp_path / "prompts")
        assert [method for method in before if before[method] != after.sha256(method)] == methods
    (tmp_path / "prompts" / "question.txt").write_text("{qestion}")
    with pytest.raises(InputError, match=r"question.txt: the placeholder \{question\} is missing"):
        Prompts(tmp_path / "prompts").sha256("agent")
    with pytest.raises(InputError, match="--prompts nowhere: judge.txt is missing"):
        Prompts("nowhere").check("judge")


def two(actions, observations):
    return 0


def shell():
    return {"shell": print}


def own_search():
    return {"web_search": str}


def broken():
    return {}["a"]


WRONG_OPTIONS = {  # each is refused in one line before anything is loaded
    "--search": {"kinds": {"fact"}},
    "--choose nothing.here: ModuleNotFoundError": {"choose": "nothing.here"},
    "--choose test_agent_distill.two: too many positional": {"choose": "test_agent_distill.two"},
    "--episode test_agent_distill.two: ": {"episode": "test_agent_distill.two"},
    "--tools test_agent_distill.two: TypeError: two() missing": {"tools": "test_agent_distill.two"},
    "has a web_search of its own: leave out --search": {"tools": "test_agent_distill.own_search", "search": "index"},
    "--tools test_agent_distill.broken: KeyError: 'a'": {"tools": "test_agent_distill.broken"},
    "nowhere: no index of format": {"search": "nowhere"},
    "--tools platform.node: {name: function} was expected": {"tools": "platform.node"},
    "tools/shell.txt: describes a tool of --tools": {"tools": "test_agent_distill.shell"},
    "only --method agent uses it": {"method": "cot", "choose": "test_agent_distill.last_candidate"},
    "--timeout 3.0: only --method agent uses it": {"method": "cot", "timeout": 3.0},
    "--method cot does not search": {"method": "cot", "search": "index"},
}


@pytest.mark.parametrize("message", WRONG_OPTIONS)
def test_wrong_options(message):
    options = {"tasks": [], "out": "", "url": "", **WRONG_OPTIONS[message]}
    kinds = options.pop("kinds", ())
    with pytest.raises(InputError, match=re.escape(message)):
        agent_distill.check_options(agent_distill.CollectConfig(**options), PROMPTS, kinds)


# The episode --------------------------------------------------------------------------------------


def step(code, thought="t"):
    return f"Thought: {thought}\nCode:\n```py\n{code}\n```<end_code>"


TOOLS = {"web_search": lambda query: f"results for {query}"}


def play(script, tools=TOOLS, timeout=5.0, **options):
    """Run an episode against a list of candidate lists; returns (Episode, turns)."""
    turns, place = [], functools.partial(Sandbox, tools=tools, timeout=timeout)
    episode = agent_episode("Q?", PROMPTS, place, system="S", rng=random.Random(0), **options)
    running = Running(episode)
    for candidates in script:
        turns.append(running.turn)
        texts = candidates if isinstance(candidates, list) else [candidates]
        running.advance([text.removeprefix(running.turn.opening) for text in texts])
    assert running.turn is None, "the script ended before the episode"
    return running.result, turns


def test_an_episode_reads_as_a_chat():
    episode, turns = play([step('print(web_search("river"))\n1 + 1'), step("final_answer('Ems')")])
    assert [m["role"] for m in episode.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert episode.messages[0]["content"] == "S" and episode.messages[1]["content"] == "New task:\nQ?"
    assert episode.messages[2]["content"] == step('print(web_search("river"))\n1 + 1')
    expected = "Observation:\nExecution logs:\nresults for river\nLast output from code snippet:\n2"
    assert episode.messages[3]["content"] == expected
    assert (episode.prediction, episode.stop) == ("Ems", "final_answer")
    assert turns[1].messages == episode.messages[:4]
    assert len(turns[0].messages) == 2  # a turn, once yielded, is not changed any more


def test_state_lives_through_the_episode_and_errors_are_observed():
    episode, _ = play([step("x = 20\nprint('before')\n1 / 0"), step("final_answer(x + 2)")])
    observation = episode.messages[3]["content"]
    assert observation.startswith("Observation:\nExecution logs:\nbefore\nError:\n")
    assert "ZeroDivisionError" in observation
    assert episode.prediction == 22 and episode.steps[0]["error_kind"] == "runtime"


def test_text_without_code_is_answered_with_the_format_and_counts_as_a_step():
    episode, turns = play(["I think it is 4.", step("4")], max_steps=2)
    assert PROMPTS.no_code in episode.messages[3]["content"] and episode.steps[0]["error_kind"] == "no_code"
    assert (episode.stop, episode.prediction, len(episode.steps), len(turns)) == ("max_steps", None, 2, 2)


def test_first_thought_prefix_opens_the_first_thought_only():
    first = step("print(1)", "I need the river. First I look it up.")
    episode, turns = play([first, step("final_answer(1)")], first_thought="I need the river.")
    assert turns[0].opening == "Thought: I need the river." and turns[1].opening == ""
    assert episode.messages[2]["content"] == first
    assert episode.steps[0]["thought"] == "I need the river. First I look it up."


def test_a_turn_that_fails_ends_the_episode_as_an_error():
    def answer(turn):
        raise BadRequest("400: context length")

    agent = agent_episode("Q?", PROMPTS, Sandbox, system="S")
    for started in (agent, agent_distill.cot_episode("Q?", PROMPTS, system="S")):
        episode = agent_distill.drive(started, answer)
        assert (episode.stop, episode.error, episode.prediction) == ("error", "400: context length", None)


def test_thinking_is_kept_in_the_step_and_nowhere_else():
    thinking = "<think>\nOr\n```py\nfinal_answer(1)\n```?\n</think>\n\n"
    episode, turns = play(
        [[thinking + step("print(7)")] * 2, thinking + step("final_answer(2)")], first_thought="I need it. \n"
    )
    assert turns[0].opening == "Thought: I need it." and episode.prediction == 2
    assert "think>" not in json.dumps(episode.messages) and episode.messages[2]["content"].startswith(turns[0].opening)
    assert [s["thinking"] for s in (*episode.steps, *episode.steps[0]["candidates"])] == [thinking.strip()[8:-9]] * 4
    for text, answer in ((thinking + "So\n\n\\boxed{3}", "3"), ("<think>so \\boxed{3}", None)):
        episode, _ = cot([text])
        assert episode.prediction == answer and "think" not in json.dumps(episode.messages)
        assert episode.steps[0]["thinking"]


# SC-action ----------------------------------------------------------------------------------------


VOTES = {  # the candidates' codes (None: a text without code), and their votes; the first of the majority is kept
    "the majority by observation, not by text": (["print(5)", "print(2 + 2)", "print(4)", "print('x')"], [0, 1, 1, 2]),
    "a tie goes to the earliest": (["print(1)", "print(2)", "print(2)", "print(1)"], [0, 1, 1, 0]),
    "failures have no vote": (["1 / 0", "1 / 0", None, "print((1", "print(7)"], [None, None, None, None, 0]),
    "final answers by value": (["final_answer(3)", "final_answer(2 + 2)", "a = 4\nfinal_answer(a)"], [0, 1, 1]),
    "a candidate that hangs": (["while True: pass", "print(1)"], [None, 0]),
}


@pytest.mark.parametrize("case", VOTES)
def test_the_vote(case):
    codes, votes = VOTES[case]
    chosen = votes.index(statistics.mode(vote for vote in votes if vote is not None))
    episode, _ = play([[step(code) if code else "words" for code in codes]], max_steps=1, timeout=1.0)
    kept = episode.steps[0]
    assert kept["chosen"] == chosen and kept["code"] == codes[chosen]
    assert [candidate["code"] for candidate in kept["candidates"]] == codes
    assert [candidate["vote"] for candidate in kept["candidates"]] == votes
    assert episode.messages[2]["content"] == step(codes[chosen])


def test_if_all_fail_one_is_kept_and_its_error_seen():
    candidates = [step("a = 1\n1 / 0"), "nothing", step("print((1")]
    episode, _ = play([candidates, [step("final_answer(0)")]])
    kept = episode.steps[0]
    assert kept["error_kind"] in ("runtime", "no_code", "syntax")
    assert "Error:" in episode.messages[3]["content"]
    assert kept["code"] == kept["candidates"][kept["chosen"]]["code"]


def last_candidate(actions, observations, rng):
    return len(actions) - 1


def test_another_vote_is_an_option_and_stored_as_it_was_cast():
    config = EpisodeConfig(choose="test_agent_distill.last_candidate")
    config.method = "agent"
    running = Running(agent_distill.open_episode(config, "Q?", PROMPTS, {}, system="S"))
    running.advance([step("print(1)"), step("print(1)"), step("final_answer(2)")])
    assert running.result.prediction == 2 and running.result.steps[0]["chosen"] == 2
    candidates = running.result.steps[0]["candidates"]
    assert [(c["vote"], c.get("final_answer")) for c in candidates] == [(None, None), (None, None), (0, 2)]


SAME = {  # kind, method, candidates' answers, the elected one
    ("math", "agent", (5, "4", 4.0, 5, 4), "4"),
    ("math", "cot", ("5", "\\frac12", "0.5", "5", "1/2", ""), "\\frac12"),
    ("fact", "agent", ("Lyon", "the Paris", "Paris", "Lyon", "Paris."), "the Paris"),
    (None, "agent", ("Lyon", "the Paris", "Paris", "Lyon", "Paris."), "Lyon"),
}


@pytest.mark.parametrize("kind, method, answers, elected", SAME)
def test_equal_answers_are_one_vote(kind, method, answers, elected):
    config = EpisodeConfig()
    config.method = method
    running = Running(agent_distill.open_episode(config, "Q?", PROMPTS, {}, system="S", kind=kind))
    texts = {"agent": [step(f"final_answer({a!r})") for a in answers], "cot": [rf"\boxed{{{a}}}" for a in answers]}
    running.advance(texts[method])
    assert running.result.prediction == elected and elected in running.result.messages[-1]["content"]


def test_the_winner_s_state_is_kept_and_its_code_is_not_run_again():
    calls = []
    tools = {"note": lambda text: calls.append(text) or text}
    counting = [step(f"n += {i}\nnote('{c}')\nprint(n)") for i, c in ((1, "a"), (1, "b"), (5, "c"))]
    episode, _ = play([step("n = 0\nnote('zero')"), counting, step("final_answer(n)")], tools=tools)
    assert episode.prediction == 1 and sorted(calls) == ["a", "b", "c", "zero"]


# Chain of thought ---------------------------------------------------------------------------------


def cot(texts, **options):
    running = Running(agent_distill.cot_episode("Q?", PROMPTS, system="S", **options))
    turn = running.turn
    running.advance(texts)
    return running.result, turn


def test_cot_is_one_turn():
    episode, turn = cot(["First.\n\nSo \\boxed{4}."])
    assert turn.messages[1]["content"] == "Q?"
    assert (episode.prediction, episode.stop, len(episode.messages)) == ("4", "final_answer", 3)
    _, turn = cot(["\\boxed{1}"], search=lambda query: f"passage for {query}")
    assert turn.messages[1]["content"] == "passage for Q?\n\nQ?"


def test_a_reply_that_was_cut_is_told_from_one_without_an_answer():
    task = {"id": "1", "task": "t", "kind": "math", "question": "Q?", "answer": "4"}
    episode, _ = cot(["I give"])
    for truncated, stop in ((1, "truncated"), (0, "no_answer")):
        assert agent_distill.trajectory_row(task, "cot", episode, {"truncated": truncated})["stop"] == stop


def test_first_step_is_the_text_to_the_first_blank_line():
    assert first_step("\nI need a\nand b.\n \nThen c.\n\nd") == "I need a\nand b."
    assert first_step("one\r\n\r\ntwo") == first_step("<think>\nOkay.\n\nSo\n</think>\n\none\n\ntwo") == "one"
    assert first_step("only one") == "only one"


# Filter -------------------------------------------------------------------------------------------


def row(i, correct=True, stop="final_answer", errors=(None,), question=None):
    return {
        "id": str(i), "task": "t", "kind": "fact", "question": question or f"question {i}?", "answer": "a",
        "method": "agent", "tools": [], "messages": [{"role": "user", "content": "x"}],
        "steps": [{"error_kind": e} for e in errors], "correct": correct, "stop": stop,
    }  # fmt: skip


def filtered(folder, rows):
    config = agent_distill.FilterConfig(trajectories=[write_jsonl(folder / "a", rows)], out=str(folder / "out"))
    agent_distill.filter_trajectories(config)
    return read_rows(folder / "out")


def test_filter_keeps_what_the_authors_keep(tmp_path, capsys):
    """Duplicates are told by the very question, case and white space aside, not by its words in another order."""
    rows = [
        row(0, question="What is 3 - 2?"), row(1, correct=False), row(2, stop="max_steps", correct=False),
        row(3, errors=("no_code", None)), row(4, errors=("syntax", None)), row(5, errors=("runtime", None)),
        row(6, stop="error", correct=False), row(7, question=" what is  3 - 2?"), row(8, errors=("timeout", None)),
        row(9, question="What is 2 - 3?"),
    ]  # fmt: skip
    assert [kept["id"] for kept in filtered(tmp_path, rows)] == ["0", "5", "8", "9"]
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| task | asked | right | kept | wrong | no answer | parse error | error | duplicate |"
    assert table[-1] == "| all | 10 | 7 | 4 | 1 | 1 | 2 | 1 | 1 |"


def test_training_rows_carry_the_students_prompt_and_what_a_weighting_needs(tmp_path):
    rows = [row(0) | {"tools": ["web_search"], "prefix": "I need"}, row(1, errors=("runtime", None))]
    first, second = filtered(tmp_path, rows)
    assert (first["tools"], second["tools"]) == (["web_search"], [])  # what evaluation compares with its own
    system = {"role": "system", "content": PROMPTS.system("agent_student_system", ["web_search"])}
    assert first["messages"] == [system, {"role": "user", "content": "x"}]
    assert (first["method"], first["prefix"], second["prefix"]) == ("agent", True, False)
    assert second["steps"] == [{"error_kind": "runtime"}, {"error_kind": None}]


def test_filter_says_where_prompts_or_tools_differ(tmp_path, capsys):
    old, new = {"prompts_sha256": "old"}, {"prompts_sha256": PROMPTS.sha256("agent")}
    rows = [row(0) | old, row(1) | new, row(2), row(3) | {"tools": ["web_search"]}]
    hashes = [kept.get("prompts_sha256") for kept in filtered(tmp_path, rows)]
    assert hashes == ["old", new["prompts_sha256"], None, None]
    notes = capsys.readouterr().err
    assert notes.startswith("note: 1 of 4 were collected with other prompts than") and "different tools" in notes
    filtered(tmp_path, [row(1) | new, row(2)])
    assert not capsys.readouterr().err


NOT_TRAJECTORIES = {
    "the field 'id' is missing": {name: value for name, value in row(0).items() if name != "id"},
    "the field 'question' is .*wrong": row(0) | {"question": None},
    "a method 'react'": row(0) | {"method": "react"},
    "the tools are not stated": {name: value for name, value in row(0).items() if name != "tools"},
    "the field 'messages' is .* wrong": row(0) | {"messages": [{"content": "x"}]},
    "the field 'steps' is .*wrong": row(0) | {"steps": [{}]},
    "none of 1": row(0, correct=False),
}


@pytest.mark.parametrize("message", NOT_TRAJECTORIES)
def test_filter_refuses_what_is_no_trajectory(tmp_path, message):
    with pytest.raises(InputError, match=message):
        filtered(tmp_path, [NOT_TRAJECTORIES[message]])


def test_filter_leaves_its_input_as_it_is(tmp_path):
    write_jsonl(tmp_path / "out", [row(0), row(1, correct=False)])
    before = (tmp_path / "out").read_text()
    with pytest.raises(InputError, match="trajectories or tasks, which would be lost"):
        config = agent_distill.FilterConfig(trajectories=[f"{tmp_path}/./out"], out=str(tmp_path / "out"))
        agent_distill.filter_trajectories(config)
    assert (tmp_path / "out").read_text() == before
