"""The quick experiments: their weights, filters, votes and loss against values made by hand or computed otherwise, and
each of them once at a tiny size.

    make test ROOM=experiments
"""

import collections
import itertools
import random

import pytest
import torch

import experiments
import train
from agent_distill import CollectConfig, FilterConfig, Prompts, Running, collect, filter_trajectories
from common import InputError, models
from conftest import chat, make_model, random_model, read_rows, write_jsonl
from experiments import (
    Setting,
    agree_early,
    always_search,
    choose_trajectory,
    mask_failed_steps,
    on_policy,
    table,
    template,
)
from miniature import teacher
from sandbox import Observation, Sandbox
from servers import background

ACTION = "Thought: {}\nCode:\n```py\n{}\n```<end_code>"


def trained(tokenizer, messages, weigh, row=None):
    """[(text of neighbouring tokens of one weight, weight), ...] of the trained part of a conversation."""
    [example] = train.encode(tokenizer, messages, weigh, row)
    pairs = zip(example.ids.tolist(), example.weights.tolist(), strict=True)
    runs = [list(run) for _, run in itertools.groupby(pairs, lambda pair: pair[1])]
    return [(tokenizer.decode([token for token, _ in run]), run[0][1]) for run in runs if run[0][1]]


def two_steps():
    codes = ACTION.format("ab", "boom()"), ACTION.format("cd", "final_answer(1)")
    messages = chat("", "New task:\nabc", codes[0], "Observation:\nno", codes[1])[1:]
    return messages, {"steps": [{"error_kind": "runtime"}, {"error_kind": None}]}


def test_failed_steps_are_context(tiny_tokenizer):
    messages, row = two_steps()
    weigh = mask_failed_steps.weigh_steps
    assert trained(tiny_tokenizer, messages, weigh, row) == [(messages[-1]["content"] + "<|im_end|>", 1.0)]
    row["steps"][0]["error_kind"] = None
    both = [(message["content"] + "<|im_end|>", 1.0) for message in messages[1::2]]
    assert trained(tiny_tokenizer, messages, weigh, row) == both


def test_code_weighs_more_than_thoughts(tiny_tokenizer):
    messages, _ = two_steps()
    runs = trained(tiny_tokenizer, messages[:2], choose_trajectory.weigh_code)
    assert runs == [("Thought: ab\nCode:\n", 1.0), ("```py\nboom()\n```<end_code>", 2.0), ("<|im_end|>", 1.0)]
    messages[1]["content"] = "no code"
    assert trained(tiny_tokenizer, messages[:2], choose_trajectory.weigh_code) == [("no code<|im_end|>", 1.0)]


def test_surprise_is_the_weighted_mean_of_the_model_s_own_losses(tiny_model, tiny_tokenizer):
    messages, _ = two_steps()
    model, tokenizer = models.load_model(tiny_model)
    weigh = choose_trajectory.weigh_code
    [example] = train.encode(tokenizer, messages, weigh)
    with torch.inference_mode():
        logits = model(example.ids[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, example.ids[1:], reduction="none")
    expected = (example.weights[1:] @ losses / example.weights.sum()).item()
    assert choose_trajectory.surprise(model, tokenizer, {"messages": messages}) == pytest.approx(expected, 1e-5)


SEARCH, ANSWER = {"code": 'print(web_search("a"))', "error_kind": None}, {"code": "final_answer(1)", "error_kind": None}
FAILED, NO_CODE = SEARCH | {"error_kind": "syntax"}, {"code": None, "error_kind": "no_code"}


def test_a_trajectory_has_searched():
    for steps, searched in (([SEARCH, ANSWER], True), ([ANSWER], False), ([FAILED, ANSWER], False), ([NO_CODE], False)):
        assert always_search.has_searched({"kind": "fact", "steps": steps}) is searched
        assert always_search.has_searched({"kind": "math", "steps": steps})


@pytest.mark.parametrize(
    ("codes", "asked", "kept"),
    [
        (["print(1)", "print(2 - 1)"], 2, "1"),  # different code, the same observation
        (["print(1)", "print(2)", "print(2)", "print(3)"], 4, "2"),
        (["boom()", "boom()", "print(1)", "print(1)"], 4, "1"),  # errors do not agree
        (["print(1)", "boom()"] + 6 * ["boom()"], 8, "1"),
        ([f"print({i})" for i in range(8)], 8, "0"),
        (8 * ["boom()"], 8, "boom"),
    ],
)
def test_sampling_stops_when_two_observe_the_same(codes, asked, kept):
    place = lambda: Sandbox(isolation="off")  # noqa: E731
    running = Running(agree_early.episode("?", Prompts(), place, system="", max_steps=1, rng=random.Random(0)))
    waiting, turns = [ACTION.format("", code) for code in codes], []
    while running.turn:
        turns.append(running.turn)
        running.advance([waiting.pop(0), waiting.pop(0)])
    step = running.result.steps[0]
    assert len(step["candidates"]) == asked and not waiting and kept in step["observation"]
    assert len(turns) == asked // 2 and all(turn is turns[0] for turn in turns)


def test_the_majority_of_whole_episodes(tmp_path):
    answers = {"a": [1, 2, 2, None], "b": [None, None, None, None], "c": ["x", "y", "y", "x"]}
    rows = []
    for question, predictions in answers.items():
        for i, prediction in enumerate(predictions):
            row = {"task": "t", "id": f"{question}#{i}", "prediction": prediction, "usage": {"tokens": 5}}
            rows.append(row | {"stop": "max_steps" if prediction is None else "final_answer"})
    random.Random(0).shuffle(rows)
    for name in ("run", "out"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "run" / "transcripts.0.jsonl", rows)
    write_jsonl(tmp_path / "run" / "run.json", [{}])
    agree_early.vote_over_episodes(tmp_path / "run", tmp_path / "out")
    voted = {row["id"]: row for row in read_rows(tmp_path / "out" / "transcripts.0.jsonl")}
    assert {id: row["prediction"] for id, row in voted.items()} == {"a": 2, "b": None, "c": "x"}
    assert all(row["usage"] == {"tokens": 20} for row in voted.values())


# On-policy distillation ---------------------------------------------------------------------------


def test_turns_are_drawn_with_decreasing_probability():
    messages = [{"role": role, "content": ""} for role in ["system", "user"] + ["assistant", "user"] * 3]
    rng = random.Random(0)
    counts = collections.Counter(len(on_policy.draw_turn(messages, 0.6, rng)) for _ in range(10_000))
    shares = [counts[n] / 10_000 for n in (2, 4, 6)]
    assert shares == pytest.approx([1 / 1.96, 0.6 / 1.96, 0.36 / 1.96], abs=0.02) and len(counts) == 3


def test_reverse_kl_cuts_the_larger_vocabulary():
    student, other = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0))
    log_p, log_q = student[:, :9].log_softmax(-1), other[:, :9].log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(on_policy.reverse_kl(student, other[:, :9]), expected, atol=1e-6)
    assert torch.allclose(on_policy.reverse_kl(student[:, :9], other), expected, atol=1e-6)


@pytest.fixture(scope="module")
def two_models(tiny_tokenizer):
    return [random_model(seed=seed, eos_token_id=tiny_tokenizer.eos_token_id) for seed in (0, 1)]


def test_the_loss_touches_only_the_tokens_that_the_student_wrote(two_models):
    """The gradient at every logit, against a hand-written one: p (log p - log q - KL) where it wrote, 0 elsewhere."""
    model, other = two_models
    prompt, written = [5, 6, 7, 8], [9, 10, 11]
    kept = {}

    def keep(module, args, output):
        kept["logits"] = output
        output.retain_grad()

    hook = model.lm_head.register_forward_hook(keep)
    each = on_policy.divergence(model, other, prompt, written)
    each.sum().backward()
    hook.remove()
    gradient = kept["logits"].grad[0]  # of the last four positions: the end of the prompt, and what was written
    with torch.inference_mode():
        ids = torch.tensor([prompt + written])
        log_p, log_q = (m(ids).logits[0].log_softmax(-1) for m in two_models)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)
        expected = log_p.exp() * (log_p - log_q - kl)
    assert torch.allclose(gradient[:3], expected[3:6], atol=1e-6) and not gradient[3].any()
    assert torch.allclose(each, kl[3:6, 0], atol=1e-6)
    assert not any(p.grad is not None and p.grad.any() for p in other.parameters())


def test_turns_are_written_after_their_own_prompt_and_end_at_the_end_of_turn(two_models, tiny_tokenizer):
    config = on_policy.Config(tests=[], search="", model="", out="", data=[], teacher="", max_tokens=12)
    config.temperature = 1e-4  # greedy: nothing is left to chance
    prompts = [[5, 6, 7, 8, 9, 10], [7, 8]]
    together = on_policy.write_turns(two_models[0], tiny_tokenizer, prompts, config)
    assert together == [on_policy.write_turns(two_models[0], tiny_tokenizer, [prompt], config)[0] for prompt in prompts]
    end = tiny_tokenizer.eos_token_id
    assert all(end not in tokens[:-1] and (len(tokens) == 12 or tokens[-1] == end) for tokens in together)


# The template, and all of them at a tiny size -----------------------------------------------------


def test_the_template_s_vote_prefers_to_go_on():
    final, failed = Observation(is_final=True, final_answer="1"), Observation(error="no", error_kind="runtime")
    assert template.choose([0] * 3, [final, final, Observation("2")], random.Random(0)) == 2
    assert template.choose([0] * 3, [failed, failed, final], random.Random(0)) == 2


@pytest.fixture(scope="module")
def place(small_world, tmp_path_factory, tiny_tokenizer):
    """A world with its index, a tiny model, and trajectories of a teacher that makes many mistakes."""
    folder = tmp_path_factory.mktemp("experiments")
    for name in ("world", "index"):
        (folder / name).symlink_to(small_world / name)
    make_model(folder / "model", tiny_tokenizer, max_position_embeddings=2048)
    config = {"tasks": [str(folder / "world" / "train.jsonl")], "search": str(folder / "index"), "limit": 4}
    settings = teacher.Config(world=str(folder / "world"), run_error=0.4, from_memory=0.5)
    with background(teacher.open_server(settings)) as address:
        config |= {"url": f"{address}/v1", "samples": 2, "temperature": 1.0, "quiet": True}
        collect(CollectConfig(out=str(folder / "agent.jsonl"), **config))
    filtered = str(folder / "agent.train.jsonl")
    filter_trajectories(FilterConfig(trajectories=[str(folder / "agent.jsonl")], out=filtered))
    return folder


def arguments(place, name):
    tests = [str(place / "world" / "test" / f"{task}.jsonl") for task in ("musique", "math")]
    settings = {"tests": tests, "search": str(place / "index"), "model": str(place / "model"), "max_tokens": 4}
    settings |= {"precision": "fp32", "rank": 4, "epochs": 1, "limit": 1, "quiet": True}
    settings |= {"out": str(place / "runs" / "seed0" / name)}
    if name == "on_policy":
        trained = str(place / "agent.train.jsonl")
        return settings | {"data": [trained], "teacher": str(place / "model"), "sft": 2, "steps": 1, "turns": 2}
    return settings if name == "agree_early" else settings | {"data": [str(place / "agent.jsonl")]}


MODULES = [mask_failed_steps, choose_trajectory, always_search, agree_early, on_policy, template]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_an_experiment_runs_and_a_second_time_only_prints(place, module, capsys):
    name = module.__name__.rpartition(".")[2]
    config = getattr(module, "Config", Setting)(**arguments(place, name))
    module.run(config)
    first = capsys.readouterr().out.splitlines()
    assert any("p (McNemar)" in line for line in first) and any("searches" in line for line in first)
    files = {path: path.stat().st_mtime_ns for path in (place / "runs").rglob("metrics.jsonl")}
    module.run(config)
    assert capsys.readouterr().out.splitlines()[-8:] == first[-8:]
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())


def test_on_policy_distillation_continues_after_a_kill(place, monkeypatch):
    """Interrupted in its second step and started again, it ends with the weights of an uninterrupted run."""
    settings = arguments(place, "on_policy") | {"steps": 3, "dropout": 0.0}
    config = on_policy.Config(**settings | {"out": str(place / "kill")})
    sft = experiments.train_student(config, "sft", settings["data"][0])
    on_policy.distill(config, sft, place / "kill" / "whole")
    step = torch.optim.AdamW.step

    def stop(optimizer):
        if optimizer.param_groups[0]["lr"] < config.policy_lr:
            raise KeyboardInterrupt
        return step(optimizer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", stop)
        on_policy.distill(config, sft, place / "kill" / "cut")
    on_policy.distill(config, sft, place / "kill" / "cut")
    names = [place / "kill" / name / "adapter_model.safetensors" for name in ("whole", "cut")]
    assert names[0].read_bytes() == names[1].read_bytes() and not list((place / "kill").rglob("checkpoint.pt"))


def test_the_table_pools_the_seeds(place, capsys):
    table.print_table(table.Config(runs=str(place / "runs")))
    lines = capsys.readouterr().out.splitlines()
    named = collections.Counter(line.split("|")[1].strip() for line in lines[2:])
    names = {module.__name__.rpartition(".")[2] for module in MODULES}  # the template too: a fork gets its line
    assert named == collections.Counter(names) + collections.Counter(["agree_early"])
    with pytest.raises(InputError, match="no experiment has been run"):
        table.print_table(table.Config(runs=str(place / "world")))
