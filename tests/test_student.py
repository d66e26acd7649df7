"""A student's answers: the same text whatever the batch, nothing after a stop string, honest sampling."""

import pytest
import torch

from agent_distill import Turn
from student import SampleByInverse, StopAtStrings, Student

CHATS = ["Hi", "What is 2 + 2, and why is that so?", "Name a river. " * 6, "x" * 40, "Thought: stop?"]


def turns(texts=CHATS, opening=""):
    return [Turn([{"role": "user", "content": text}], opening) for text in texts]


def reference(model, tokenizer, turn, new):
    """Greedy decoding in five lines, without cache, padding or generate."""
    ids = tokenizer(
        tokenizer.apply_chat_template(turn.messages, add_generation_prompt=True, tokenize=False) + turn.opening
    )["input_ids"]
    start = len(ids)
    for _ in range(new):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("opening", ["", "Thought: I"])
def test_batched_greedy_equals_token_by_token_decoding(tiny_model, tiny_tokenizer, opening):
    student = Student(tiny_model, tiny_tokenizer, max_tokens=24)
    batch = student.answer(turns(opening=opening), keys=range(5))
    expected = [reference(tiny_model, tiny_tokenizer, turn, 24) for turn in turns(opening=opening)]
    assert [answer.texts for answer in batch] == [[text] for text in expected]
    assert len(set(expected)) > 1


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_samples_depend_on_the_key_alone(tiny_model, tiny_tokenizer, batch):
    def sample(batch, order):
        student = Student(tiny_model, tiny_tokenizer, n=4, temperature=1.0, top_p=0.9, max_tokens=16, batch=batch)
        answers = student.answer([turns()[i] for i in order], [100 + i for i in order])
        return {i: answer.texts for i, answer in zip(order, answers, strict=True)}

    one_by_one = sample(1, [0, 1, 2, 3, 4])
    assert sample(batch, [3, 1, 4, 0, 2]) == one_by_one
    assert len({text for texts in one_by_one.values() for text in texts}) > 10


def test_shared_prefill_equals_a_prefill_for_each_sample(tiny_model, tiny_tokenizer):
    """With a vanishing temperature all n samples are the greedy answer, so the repeated cache must be right."""
    greedy = Student(tiny_model, tiny_tokenizer, max_tokens=20).answer(turns(), range(5))
    cold = Student(tiny_model, tiny_tokenizer, n=3, temperature=1e-6, top_p=1.0, max_tokens=20).answer(
        turns(), range(5)
    )
    assert [answer.texts for answer in cold] == [answer.texts * 3 for answer in greedy]


def test_nothing_after_a_stop_string(tiny_model, tiny_tokenizer):
    free = Student(tiny_model, tiny_tokenizer, max_tokens=40)
    texts = [answer.texts[0] for answer in free.answer(turns(), range(5))]
    stop = [texts[0][5:8], texts[2][10:14]]
    answers = free.answer(turns(), range(5), stop)
    for text, answer in zip(texts, answers, strict=True):
        ends = [text.find(s) for s in stop if s in text]
        assert answer.texts[0] == text[: min(ends, default=len(text))]
    assert answers[0].completion_tokens < 40


def test_stop_string_across_tokens_and_prompt(tiny_tokenizer):
    """The string is found when it falls over several tokens, and not when it lies in the prompt."""
    prompt = tiny_tokenizer("Observation: before ")["input_ids"]
    text = tiny_tokenizer("so Observation: x")["input_ids"]
    criteria = StopAtStrings(tiny_tokenizer, ["Observation:"], len(prompt))
    done = [bool(criteria(torch.tensor([prompt + text[: i + 1]]), None)) for i in range(len(text))]
    shown = [tiny_tokenizer.decode(text[: i + 1]) for i in range(len(text))]
    assert done == ["Observation:" in s for s in shown]
    assert done[-1] and not done[0]


@pytest.mark.parametrize("head", [256, 1])
def test_sampling_follows_the_nucleus_distribution(monkeypatch, head):
    """With a head of one of the two tokens that the nucleus holds, all are sorted."""
    monkeypatch.setattr(SampleByInverse, "HEAD", head)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    p = (logits / 0.7).softmax(0)
    kept = torch.tensor([p[:i].sum() < 0.9 for i in range(5)])
    expected = torch.where(kept, p, 0) / p[kept].sum()
    draws = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    chosen = SampleByInverse(draws, 3, 0.7, 0.9)(torch.zeros(20_000, 3), logits.expand(20_000, 5)).argmax(-1)
    counts = torch.bincount(chosen, minlength=5) / 20_000
    assert (counts - expected).abs().max() < 0.015  # four standard deviations of 20,000 draws
    assert counts[~kept].sum() == 0


def test_a_context_too_long_is_reported_not_cut(tiny_model, tiny_tokenizer):
    student = Student(tiny_model, tiny_tokenizer, max_tokens=8)
    answers = student.answer(turns(["short", "long " * 600]), [0, 1])
    assert answers[0] is not None and answers[1] is None


def test_out_of_memory_halves_the_batch_and_loses_nothing(tiny_model, tiny_tokenizer, monkeypatch):
    student = Student(tiny_model, tiny_tokenizer, max_tokens=8, batch=5)
    whole = student.answer(turns(), range(5))
    generate, sizes = student.model.generate, []

    def scarce(*args, input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("as a GPU would")
        return generate(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(student.model, "generate", scarce)
    assert student.answer(turns(), range(5)) == whole
    assert sizes[0] == 5 and max(sizes[1:]) <= 2
