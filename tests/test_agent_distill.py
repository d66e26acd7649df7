"""The method: parsing what models write, the episode with scripted candidates, prefix, filter, gain.

Code runs in the real sandbox; the model's side is a list of texts.
"""

import concurrent.futures
import functools
import gc
import json
import random
import sys
import time

import pytest

import agent_distill
from agent_distill import (
    CODE_CLOSE,
    CODE_OPEN,
    STOP,
    TurnFailed,
    agent_episode,
    cot_episode,
    first_step,
    parse_action,
)
from client import BadRequest
from common import InputError
from report import mcnemar
from sandbox import Sandbox
from tasks import Prompts
from trajectories import FilterConfig, GainConfig, drop_reason, filter_trajectories, prefix_gain

PROMPTS = Prompts()


# Parsing ------------------------------------------------------------------------------------------

SHAPES = {
    "plain": "Thought: add.\nCode:\n```py\nx = 1 + 1\nprint(x)\n```<end_code>",
    "the stop string taken away": "Thought: add.\nCode:\n```py\nx = 1 + 1\nprint(x)\n```",
    "python": "Thought: add.\nCode:\n```python\nx = 1 + 1\nprint(x)\n```<end_code>",
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
    "another language first": "Thought: add.\n```json\n[1]\n```\nCode:\n```py\nx = 1 + 1\nprint(x)\n```<end_code>",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_parse_shapes(shape):
    action = parse_action(SHAPES[shape])
    assert action.code == "x = 1 + 1\nprint(x)"
    assert action.thought.split("\n")[0] == "add."
    assert "Observation" not in action.text and "\r" not in action.text
    assert parse_action(action.text) == action  # what stays in the context reads the same again


def test_two_fences_are_one_action():
    action = parse_action("Thought: t\nCode:\n```py\na = 1\n```\nand then\n```py\nprint(a)\n```<end_code>")
    assert action.code == "a = 1\n\nprint(a)"
    assert action.thought == "t"


def test_backticks_inside_a_string_do_not_close_the_fence():
    code = 's = """\n```\nquoted\n```\n"""\nprint(s)'
    action = parse_action(f"Thought: t\nCode:\n```py\n{code}\n```<end_code>")
    assert action.code == code


@pytest.mark.parametrize("text", ["", "I do not know.", "Thought: it is Paris.", "Code:\n", "```py\n```", "yes"])
def test_nothing_to_run(text):
    assert parse_action(text).code is None


def test_code_with_a_syntax_error_is_still_an_action():
    assert parse_action("Thought: t\nCode:\n```py\nprint((1\n```<end_code>").code == "print((1"


def test_prompts_agree_with_the_parser():
    """One format: the examples in every agent prompt parse, and name the fence and stop string of the constants."""
    for name in ("agent_system", "agent_student_system"):
        text = getattr(PROMPTS, name)
        assert CODE_OPEN in text and CODE_CLOSE in text
    examples = PROMPTS.agent_system.split("Two examples of finished tasks.")[1].split("\nThought: ")[1:]
    assert len(examples) >= 4
    for example in examples:
        assert parse_action(example.split("Observation:")[0]).code
    assert any(CODE_CLOSE.endswith(stop) for stop in STOP)
    assert PROMPTS.observation.startswith(STOP[1]) and PROMPTS.error.startswith(STOP[1])


# The episode --------------------------------------------------------------------------------------


def step(code, thought="t"):
    return f"Thought: {thought}\nCode:\n```py\n{code}\n```<end_code>"


def play(script, **options):
    """Run an episode against a list of candidate lists; returns (Episode, turns)."""
    turns = []
    tools = {"web_search": lambda query: f"results for {query}"}
    episode = agent_episode(
        "Q?", PROMPTS, functools.partial(Sandbox, tools=tools, timeout=options.pop("timeout", 5.0)),
        system="S", rng=random.Random(0), **options,
    )  # fmt: skip
    try:
        turns.append(next(episode))
        for candidates in script:
            texts = candidates if isinstance(candidates, list) else [candidates]
            turns.append(episode.send([text.removeprefix(turns[-1].opening) for text in texts]))
    except StopIteration as finished:
        return finished.value, turns
    pytest.fail("the script ended before the episode")


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


def test_text_without_code_is_answered_with_the_format():
    episode, _ = play(["I think it is 4.", step("final_answer(4)")])
    assert PROMPTS.no_code in episode.messages[3]["content"]
    assert episode.steps[0]["error_kind"] == "no_code" and episode.prediction == 4


def test_step_limit():
    episode, turns = play([step("print(1)")] * 3, max_steps=3)
    assert (episode.stop, episode.prediction, len(episode.steps), len(turns)) == ("max_steps", None, 3, 3)


def test_first_thought_prefix_opens_the_first_thought_only():
    first = step("print(1)", "I need the river. First I look it up.")
    episode, turns = play([first, step("final_answer(1)")], first_thought="I need the river.")
    assert turns[0].opening == "Thought: I need the river." and turns[1].opening == ""
    assert episode.messages[2]["content"] == first
    assert episode.steps[0]["thought"] == "I need the river. First I look it up."


def test_a_turn_that_fails_ends_the_episode_as_an_error():
    def answer(turn):
        raise BadRequest("400: context length")

    episode = agent_distill.drive(agent_episode("Q?", PROMPTS, Sandbox, system="S"), answer)
    assert (episode.stop, episode.error, episode.prediction) == ("error", "400: context length", None)
    generator = cot_episode("Q?", PROMPTS, system="S")
    next(generator)
    with pytest.raises(StopIteration) as finished:
        generator.throw(TurnFailed("too long"))
    assert finished.value.value.stop == "error"


# SC-action ----------------------------------------------------------------------------------------


def test_majority_by_observation_not_by_text():
    """Two codes that print 4 in different words beat two equal codes... of which one observes something else."""
    candidates = [step("print(5)"), step("print(2 + 2)"), step("print(4)"), step("print('x')")]
    episode, _ = play([candidates, [step("final_answer(1)")] * 4])
    assert episode.steps[0]["chosen"] == 1 and episode.steps[0]["code"] == "print(2 + 2)"
    assert "\n4\n" in episode.messages[3]["content"]
    assert [c["code"] for c in episode.steps[0]["candidates"]][3] == "print('x')"


def test_ties_go_to_the_earliest():
    candidates = [step("print(1)"), step("print(2)"), step("print(2)"), step("print(1)")]
    episode, _ = play([candidates, [step("final_answer(0)")]])
    assert episode.steps[0]["chosen"] == 0


def test_failures_have_no_vote():
    candidates = [step("1 / 0"), step("1 / 0"), "no code", step("print((1"), step("print(7)")]
    episode, _ = play([candidates, [step("final_answer(0)")]])
    assert episode.steps[0]["chosen"] == 4


def test_if_all_fail_one_is_kept_and_its_error_seen():
    candidates = [step("a = 1\n1 / 0"), "nothing", step("print((1")]
    episode, _ = play([candidates, [step("final_answer(0)")]])
    kept = episode.steps[0]
    assert kept["error_kind"] in ("runtime", "no_code", "syntax")
    assert "Error:" in episode.messages[3]["content"]
    assert kept["code"] == kept["candidates"][kept["chosen"]]["code"]


def test_final_answers_vote_with_their_value():
    candidates = [
        step("final_answer(3)"),
        step("final_answer(2 + 2)"),
        step("x = 4\nfinal_answer(x)"),
        step("print(4)"),
    ]
    episode, _ = play([candidates])
    assert (episode.prediction, episode.steps[0]["chosen"]) == (4, 1)


def test_candidates_do_not_see_each_other_and_the_winner_is_not_run_again():
    calls = []
    tools = {"note": lambda text: calls.append(text) or text}
    episode = agent_episode("Q?", PROMPTS, functools.partial(Sandbox, tools=tools), system="S", rng=random.Random(0))
    next(episode)
    episode.send([step("n = 0\nnote('zero')")])
    episode.send([step("n += 1\nnote('a')\nprint(n)"), step("n += 1\nnote('b')\nprint(n)"), step("n += 5\nprint(n)")])
    with pytest.raises(StopIteration) as finished:
        episode.send([step("final_answer(n)")])
    assert finished.value.value.prediction == 1
    assert sorted(calls) == ["a", "b", "zero"]


def test_a_candidate_that_hangs_does_not_win():
    episode, _ = play([[step("while True: pass"), step("print(1)")], [step("final_answer(1)")]], timeout=0.5)
    assert episode.steps[0]["chosen"] == 1
    assert episode.steps[0]["candidates"][0]["error_kind"] == "timeout"


# Chain of thought ---------------------------------------------------------------------------------


def cot(texts, **options):
    episode = cot_episode("Q?", PROMPTS, system="S", **options)
    turn = next(episode)
    with pytest.raises(StopIteration) as finished:
        episode.send(texts)
    return finished.value.value, turn


def test_cot_is_one_turn():
    episode, turn = cot(["First.\n\nSo \\boxed{4}."])
    assert turn.messages[1]["content"] == "Q?"
    assert (episode.prediction, episode.stop, len(episode.messages)) == ("4", "final_answer", 3)
    assert cot(["I give up."])[0].stop == "max_steps"


def test_cot_with_retrieval_shows_the_passages():
    _, turn = cot(["\\boxed{1}"], search=lambda query: f"passage for {query}")
    assert turn.messages[1]["content"] == "passage for Q?\n\nQ?"


def test_self_consistency_takes_the_majority_answer():
    episode, _ = cot(["\\boxed{1}", "none", "a \\boxed{2}", "b \\boxed{2}"])
    assert episode.prediction == "2" and episode.messages[-1]["content"] == "a \\boxed{2}"


def test_first_step_is_the_text_to_the_first_blank_line():
    assert first_step("\nI need a\nand b.\n \nThen c.\n\nd") == "I need a\nand b."
    assert first_step("one\r\n\r\ntwo") == "one"
    assert first_step("only one") == "only one"


# Filter and gain ----------------------------------------------------------------------------------


def row(i, correct=True, stop="final_answer", errors=(None,), task="t", kind="fact", question=None):
    return {
        "id": str(i), "task": task, "kind": kind, "question": question or f"question {i}?", "answer": "a",
        "method": "agent", "messages": [{"role": "user", "content": "x"}],
        "steps": [{"error_kind": e} for e in errors], "correct": correct, "stop": stop, "sample": 0,
    }  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_filter_keeps_what_the_authors_keep(tmp_path, capsys):
    rows = [
        row(0), row(1, correct=False), row(2, stop="max_steps", correct=False), row(3, errors=("no_code", None)),
        row(4, errors=("syntax", None)), row(5, errors=("runtime", None)), row(6, stop="error", correct=False),
        row(7, question="Question 0 ?"), row(8, errors=("timeout", None)),
    ]  # fmt: skip
    filter_trajectories(FilterConfig(trajectories=[write(tmp_path / "a", rows)], out=str(tmp_path / "out.jsonl")))
    kept = [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert kept == ["0", "5", "8"]
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| task | asked | right | kept | wrong | no answer | parse error | error | duplicate |"
    assert table[-1] == "| all | 9 | 6 | 3 | 1 | 1 | 2 | 1 | 1 |"
    assert [drop_reason(r) for r in rows[1:4]] == ["wrong", "no answer", "parse error"]


def test_filter_balances_kinds(tmp_path):
    rows = [row(i) for i in range(9)] + [row(i, kind="math", task="m") for i in range(20, 24)]
    filter_trajectories(
        FilterConfig(trajectories=[write(tmp_path / "a", rows)], out=str(tmp_path / "out"), balance=True)
    )
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "out").read_text().splitlines()]
    assert kinds.count("fact") == kinds.count("math") == 4


def test_filter_refuses_what_is_no_trajectory_and_an_empty_result(tmp_path):
    with pytest.raises(InputError, match=r"a:1: not a trajectory: no 'id'"):
        filter_trajectories(FilterConfig(trajectories=[write(tmp_path / "a", [{"task": "t"}])], out="x"))
    with pytest.raises(InputError, match="none of 1"):
        filter_trajectories(FilterConfig(trajectories=[write(tmp_path / "a", [row(0, correct=False)])], out="x"))


def test_prefix_gain_is_paired(tmp_path, capsys):
    plain = write(tmp_path / "plain", [row(i, correct=i < 4) for i in range(10)])
    prefixed = write(tmp_path / "prefixed", [row(i, correct=i > 0) for i in range(9)])
    prefix_gain(GainConfig(plain=plain, prefixed=prefixed))
    assert "| all | 9 | 44.4 | 88.9 | +44.4 | 1 | 5 | 0.22 |" in capsys.readouterr().out


def test_mcnemar_against_the_binomial():
    assert mcnemar([1] * 10, [1] * 10) == (0, 0, 1.0)
    lost, won, p = mcnemar([1, 0, 0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1, 1, 1])
    assert (lost, won) == (1, 6) and p == pytest.approx(2 * (1 + 7) / 2**7)


def test_actions_parse_in_many_threads_at_once():
    """ast.parse fails in CPython 3.11 when a finalizer lets another thread parse in the middle of it."""

    class Cycle:
        def __init__(self):
            self.me = self

        def __del__(self):
            for _ in range(10):
                time.sleep(0)

    def parse_many(_):
        for _ in range(60):
            Cycle()
            assert parse_action(text).code

    text = "Thought: x\nCode:\n```py\n" + "a = [(1, 2), {3: 4}, f(x)[0].y if z else lambda q: q + 1]\n" * 20 + "```"
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(50)
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(parse_many, range(8)))
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
