"""Prompts that begin alike: the same keys and values as computed from scratch, and no token computed twice."""

import random

import pytest
import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

import prefixes
from agent_distill import Turn
from common import InputError
from prefixes import Prefixes
from student import Student
from test_student import reference, turns


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                         initializer_range=0.5)  # fmt: skip
    model = Qwen2ForCausalLM(config).double().eval()
    model.computed = 0
    forward = model.forward

    def counting(input_ids, **options):
        model.computed += input_ids.numel()
        return forward(input_ids=input_ids, **options)

    model.forward = counting
    return model


@torch.inference_mode()
def from_scratch(model, prompt):
    cache = DynamicCache(config=model.config)
    Qwen2ForCausalLM.forward(model, torch.tensor([prompt[:-1]]), past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.inference_mode()
def check(model, kept, prompts):
    states = kept.prefill(model, prompts)
    for row, prompt in enumerate(prompts):
        if len(prompt) == 1:  # its only token is left to generate
            continue
        for ours, theirs in zip(states, from_scratch(model, prompt), strict=True):
            for x, y in zip(ours, theirs, strict=True):
                assert x.shape[2] == max(map(len, prompts)) - 1
                torch.testing.assert_close(x[row, :, x.shape[2] - len(prompt) + 1 :], y[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("limit", [0, 200_000, 1 << 30])
def test_states_are_those_of_a_prefill_from_scratch(model, limit):
    """Episodes of random lengths that begin with one of two system prompts, grow, end and make room for others."""
    rng, kept = random.Random(limit), Prefixes(limit)
    systems = [[rng.randrange(50) for _ in range(n)] for n in (20, 33)]
    episodes = []
    for _ in range(25):
        episodes = [e + [rng.randrange(50) for _ in range(rng.randint(1, 12))] for e in episodes if rng.random() < 0.7]
        while len(episodes) < 6:
            episodes.append(rng.choice(systems) + [rng.randrange(50) for _ in range(rng.randint(1, 9))])
        rng.shuffle(episodes)
        check(model, kept, episodes)
        sizes = [sum(x.nbytes for layer in states for x in layer) for _, states in kept.batches]
        assert sum(sizes[:-1]) <= limit


def test_only_what_is_new_is_computed(model):
    kept = Prefixes(0)
    first = [[1] * 70 + [2, 3], [1] * 70 + [4] * 5]
    check(model, kept, first)
    assert model.computed == 70 + 1 + 4  # the 70 once
    model.computed = 0
    check(model, kept, [first[0] + [5] * 10, first[1] + [6] * 12])  # each one's last token was not computed yet
    assert model.computed == 2 * 12
    model.computed = 0
    check(model, kept, [[1] * 70 + [7] * 4, first[1] + [6] * 12 + [8] * 20])  # another episode, with the same beginning
    assert model.computed == 3 + 20
    model.computed = 0
    check(model, kept, [first[1] + [6] * 12 + [8] * 20])  # the very same prompt
    assert model.computed == 0


@pytest.mark.parametrize("prompts", [[[1]], [[1, 2], [3]], [[3], [1, 2, 3], [1, 2]]])
def test_the_shortest_prompts(model, prompts):
    kept = Prefixes(1 << 20)
    if max(map(len, prompts)) > 1:
        check(model, kept, prompts)
        check(model, kept, [*prompts, [1, 2, 3, 4]])


def test_answers_are_those_of_a_student_without_memory(tiny_model, tiny_tokenizer):
    """Three steps of five conversations: what earlier steps left behind changes no answer."""

    def talk(forget):
        student = Student(tiny_model, tiny_tokenizer, n=3, temperature=1.0, top_p=0.9, max_tokens=12)
        chats, said = [[{"role": "user", "content": text}] for text in ("Hi", "a b c " * 9, "x", "Why?", "1 + 1")], []
        for step in range(3):
            if forget:
                student.prefixes.clear()
            answers = student.answer([Turn(chat) for chat in chats], [10 * step + i for i in range(5)])
            for chat, answer in zip(chats, answers, strict=True):
                said.append(answer.texts)
                chat += [{"role": "assistant", "content": answer.texts[0]}, {"role": "user", "content": "And then?"}]
        return said

    assert talk(forget=False) == talk(forget=True)


def test_out_of_memory_first_gives_up_what_was_kept(tiny_model, tiny_tokenizer, monkeypatch):
    student = Student(tiny_model, tiny_tokenizer, max_tokens=4)
    turn = Turn([{"role": "user", "content": "Hi"}])
    expected = student.answer([turn], [0])[0].texts
    compute, kept = prefixes._compute, []

    def scarce(*arguments):
        kept.append(len(student.prefixes.batches))
        if kept[-1]:
            raise torch.OutOfMemoryError
        return compute(*arguments)

    monkeypatch.setattr(prefixes, "_compute", scarce)
    assert student.answer([turn], [0])[0].texts == expected
    assert kept == [1, 0]


def test_what_never_fits_is_given_up(tiny_model, tiny_tokenizer, monkeypatch):
    student, calls = Student(tiny_model, tiny_tokenizer, max_tokens=4), []

    def generate(**options):  # after the prefill, which has kept the prompts
        calls.append(len(options["input_ids"]))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tiny_model, "generate", generate)
    with pytest.raises(InputError, match=r"\d+ tokens, 1 times, do not fit"):
        student.answer(turns(), range(5))
    assert calls == [5, 2, 1]


@pytest.mark.parametrize("n", [1, 3])
def test_windowed_attention_answers_without_a_memory(tiny_model, tiny_tokenizer, n):
    """Of a window nothing can be taken: such a model's prompts are computed whole."""
    config = Qwen2Config(**tiny_model.config.to_dict() | {"use_sliding_window": True, "sliding_window": 16,
                                                          "max_window_layers": 1, "layer_types": None})  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    student = Student(model, tiny_tokenizer, n=n, temperature=1e-6 if n > 1 else 0.0, max_tokens=12)
    for _ in range(2):
        answers = student.answer(turns(), range(5))
        expected = [reference(model, tiny_tokenizer, turn, 12) for turn in turns()]
        assert [answer.texts for answer in answers] == [[text] * n for text in expected]
    assert not student.prefixes.batches and "sliding_attention" in config.layer_types
