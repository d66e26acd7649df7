"""The training room: which tokens are trained, that the loss and its gradients are exact, and that a run survives.

python -m pytest tests/test_train.py
"""

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, get_scheduler

import chat
import devices
import lora
import train
from common import InputError

ROOT = Path(train.__file__).parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# Trims the content and prints a date, as Llama 3's does.
LLAMA = (
    "{{- 'Today: ' + (date_string if date_string is defined else strftime_now('%d %b %Y')) }}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{%- endif %}"
)
# Ends a finished conversation with one more token, as Phi-4-mini's does.
PHI = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- else %}{{- '<|endoftext|>' }}{%- endif %}"
)
# Shows only the last turn's content in full, as templates that strip earlier thinking do.
STRIPS = CHATML.replace("m.content +", "(m.content if loop.last or m.role != 'assistant' else m.content[:3]) +")
# Adds a reminder to the last message only.
REMINDS = CHATML.replace("m.content", "m.content + (' be brief' if loop.last else '')")
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = ["".join(random.Random(i).choices("abcdefghij", k=2 + i % 5)) for i in range(200)]


def make_tokenizer():
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [" ".join(WORDS), "system user assistant Thought: Code: Observation: New task:\n\n" * 9, "ab\n\n\ncd" * 9]
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|eot_id|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def make_model(folder, tokenizer, seed=0, **options):
    torch.manual_seed(seed)
    config = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config |= {"initializer_range": 0.2, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    model = Qwen2ForCausalLM(Qwen2Config(**config | options))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def conversation(rng, turns=3, words=12):
    text = lambda: " ".join(rng.choices(WORDS, k=rng.randint(3, words)))  # noqa: E731
    messages = [{"role": "system", "content": text()}, {"role": "user", "content": "New task:\n" + text()}]
    for turn in range(turns):
        code = "Thought: " + text() + "\nCode:\n```py\nprint(1)\n```<end_code>"
        messages.append({"role": "assistant", "content": code})
        if turn + 1 < turns:
            messages.append({"role": "user", "content": "Observation:\n" + text()})
    return messages


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory, tokenizer):
    return make_model(tmp_path_factory.mktemp("model") / "tiny", tokenizer)


@pytest.fixture(scope="session")
def data_path(tmp_path_factory):
    rng = random.Random(0)
    rows = [{"messages": conversation(rng, rng.randint(1, 4))} for _ in range(24)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows)


@pytest.fixture
def config(tmp_path, model_path, data_path):
    def make(**options):
        defaults = {"data": [data_path], "model": model_path, "out": str(tmp_path / "out"), "precision": "fp32"}
        defaults |= {"threads": 1, "quiet": True, "rank": 4, "alpha": 8, "lr": 1e-3}
        return train.Config(**defaults | options)

    return make


def make_student(config):
    config.micro_tokens = config.micro_tokens or 2048
    process = devices.Process()
    torch.manual_seed(config.seed)
    student, _ = train.build_student(config, process, bf16=False)
    tokenizer = lora.load_tokenizer(config.model)
    examples, _ = chat.read_examples(config.data, tokenizer, config, quiet=True)
    return student, examples


def gradients(student, examples, micro_tokens=2048, bf16=False):
    student.zero_grad()
    trained = sum(len(example.trained) for example in examples)
    micro_batches = chat.split_step(examples, micro_tokens, 1)[0]
    loss = train.accumulate(student, micro_batches, trained, devices.Process(), bf16)
    return loss.item(), {name: p.grad.clone() for name, p in student.named_parameters() if p.requires_grad}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# Which tokens are trained


def test_exactly_the_assistants_tokens_and_its_turn_end_are_trained(tokenizer):
    messages = [
        {"role": "system", "content": "ab"},
        {"role": "user", "content": "cd"},
        {"role": "assistant", "content": "Thought: ef"},
        {"role": "user", "content": "Observation:\ngh"},
        {"role": "assistant", "content": "ij"},
    ]
    ids, mask = train.encode(tokenizer, messages)
    token = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    context = token("<|im_start|>system\nab<|im_end|>\n<|im_start|>user\ncd<|im_end|>\n<|im_start|>assistant\n")
    first = token("Thought: ef<|im_end|>")
    observation = token("\n<|im_start|>user\nObservation:\ngh<|im_end|>\n<|im_start|>assistant\n")
    second = token("ij<|im_end|>")
    assert ids == context + first + observation + second + token("\n")
    expected = [0] * len(context) + [1] * len(first) + [0] * len(observation) + [1] * len(second) + [0]
    assert mask == expected


@pytest.mark.parametrize("template", [CHATML, LLAMA, PHI])
def test_training_sees_what_inference_sees(tokenizer, template, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    rng = random.Random(1)
    for _ in range(50):
        messages = conversation(rng, 4)
        if template == LLAMA:
            messages[2]["content"] += " \n"  # trimmed by the template
        ids, mask = train.encode(tokenizer, messages)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        starts = [n for n in range(len(ids)) if mask[n] and not mask[n - 1]]
        assert len(starts) == len(turns)
        for turn, start in zip(turns, starts, strict=True):
            context = tokenizer.apply_chat_template(
                messages[:turn], add_generation_prompt=True, return_dict=False, **chat.TEMPLATE_OPTIONS
            )
            assert ids[:start] == context
            end = next(n for n in range(start, len(ids)) if not mask[n]) if 0 in mask[start:] else len(ids)
            reply = tokenizer.decode(ids[start:end])
            assert reply == messages[turn]["content"].strip() + ("<|eot_id|>" if template == LLAMA else "<|im_end|>")


@pytest.mark.parametrize(
    "template, content, reason",
    [
        (STRIPS, "abcdef", "as it is"),
        (REMINDS, "ab", "differently"),
        (CHATML, "\n\nab", "reaches across"),
        (CHATML, "ab<|im_end|>cd", "special token"),
        (CHATML.replace("'<|im_end|>'", "' #'"), "ab", "without a special token"),
        (CHATML.replace("m.content", "m.content | upper"), "ab", "as it is"),
    ],
)
def test_what_cannot_be_masked_exactly_is_refused(tokenizer, monkeypatch, template, content, reason):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    messages = [{"role": "user", "content": "cd"}, {"role": "assistant", "content": content}] * 2
    with pytest.raises(InputError, match=reason):
        train.encode(tokenizer, messages)


def test_published_rows_become_the_projects_conversations():
    part = lambda role, *texts: {"role": role, "content": [{"type": "text", "text": t} for t in texts]}  # noqa: E731
    logged = [
        part("system", "Long prompt."),
        part("user", "New task:\nWho?<reference>hidden\nanswer</reference>"),
        part("assistant", "Thought: a\nCode:\n```py\nx\n```<end_code>"),
        part("MessageRole.TOOL_CALL", "Calling tools:\n[{'id': 'call_1'}]"),
        part("tool-response", "Call id: call_1\nObservation:\nExecution logs:\nhits"),
        part("MessageRole.TOOL_RESPONSE", "Call id: call_1\nError:\nbad"),
        part("assistant", "Thought: b"),
        part("tool-call", "Calling tools:\n[]"),
        part("tool-response", "Call id: call_2\nObservation:\nLast output"),
    ]
    assert chat.published_messages(logged) == [
        {"role": "system", "content": "Long prompt."},
        {"role": "user", "content": "New task:\nWho?"},
        {"role": "assistant", "content": "Thought: a\nCode:\n```py\nx\n```<end_code>"},
        {"role": "user", "content": "Observation:\nExecution logs:\nhits\nError:\nbad"},
        {"role": "assistant", "content": "Thought: b"},
    ]


def test_the_system_prompt_is_replaced(tokenizer):
    messages = conversation(random.Random(2))
    ids, _ = chat.encode_row(tokenizer, {"messages": messages}, "short words")
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nshort words<|im_end|>")
    assert messages[0]["content"] not in text
    assert tokenizer.decode(chat.encode_row(tokenizer, {"messages": messages[1:]}, "short words")[0]) == text


USER, ASSISTANT = {"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}


@pytest.mark.parametrize(
    "row, reason",
    [
        ("{not json", "not JSON"),
        ("[1]", "JSON object"),
        ({"text": "ab"}, "expected"),
        ({"messages": "ab"}, "expected"),
        ({"messages": [{"role": "user"}]}, "expected"),
        ({"log_data": None}, "expected"),
        ({"messages": [USER]}, "nothing to train on"),
        ({"messages": []}, "nothing to train on"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "text"),
        ({"input_ids": [1, 2], "loss_mask": [0]}, "as long as"),
        ({"input_ids": [1, 2]}, "loss_mask"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "0 and 1"),
        ({"input_ids": [1, 2], "loss_mask": [1, 0]}, "nothing to train on"),
        ({"input_ids": [1, 999], "loss_mask": [0, 1]}, "vocabulary"),
        ({"input_ids": [1, "a"], "loss_mask": [0, 1]}, "whole numbers"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tokenizer, tmp_path, config, row, reason):
    path = write_jsonl(tmp_path / "bad.jsonl", [{"messages": [USER, ASSISTANT]}, row])
    with pytest.raises(InputError, match=rf"bad\.jsonl:2: .*{reason}"):
        chat.read_examples([path], tokenizer, config())


def test_overlong_examples_are_dropped_cut_or_refused_and_counted(tokenizer, tmp_path, config):
    rng = random.Random(3)
    long, short = conversation(rng, 4, words=4), conversation(rng, 1, words=3)
    path = write_jsonl(tmp_path / "long.jsonl", [{"messages": long}, {"messages": short}])
    ids, mask = train.encode(tokenizer, long)
    limit = len(ids) - 5  # inside the last turn

    examples, counts = chat.read_examples([path], tokenizer, config(max_length=limit))
    assert (len(examples), counts["overlong_dropped"], counts["overlong_cut"]) == (1, 1, 0)

    examples, counts = chat.read_examples([path], tokenizer, config(max_length=limit, overlong="cut"))
    assert (len(examples), counts["overlong_dropped"], counts["overlong_cut"]) == (2, 0, 1)
    kept = examples[0].ids.tolist()
    assert kept == ids[: len(kept)] and tokenizer.convert_ids_to_tokens(kept[-1]) == "<|im_end|>"
    assert examples[0].trained.tolist() == [n for n in range(len(kept)) if mask[n]]
    whole_turns = sum(mask[n] and not mask[n - 1] for n in range(len(kept)))
    assert whole_turns == 3

    with pytest.raises(InputError, match=r"long\.jsonl:1: .*--max-length"):
        chat.read_examples([path], tokenizer, config(max_length=limit, overlong="error"))
    with pytest.raises(InputError, match="no example is left"):
        chat.read_examples([path], tokenizer, config(max_length=3))


def test_every_example_is_planned_once_an_epoch(tokenizer, config):
    examples, _ = chat.read_examples(config().data, tokenizer, config())
    for options in ({"batch_size": 5}, {"batch_tokens": 400}):
        steps = chat.plan_steps(examples, config(epochs=3, **options))
        order = [i for step in steps for i in step]
        epochs = [order[n : n + 24] for n in (0, 24, 48)]
        assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]
        assert steps == chat.plan_steps(examples, config(epochs=3, **options))
        assert steps != chat.plan_steps(examples, config(epochs=3, seed=1, **options))
    for step in chat.plan_steps(examples, config(batch_tokens=400)):
        assert sum(len(examples[i].ids) for i in step) <= 400


# The loss


@pytest.mark.parametrize("chunk", [1, 64 * 7, 2**26])
def test_the_chunked_loss_has_autograds_gradients(monkeypatch, chunk):
    monkeypatch.setattr(train.HeadLoss, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(150, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(7, (150,), generator=generator)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    loss = train.HeadLoss.apply(hidden, weight, targets, True)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    wanted = torch.autograd.grad(expected * 3, [hidden, weight])
    got = torch.autograd.grad(loss * 3, [hidden, weight])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_loss_is_transformers_own(config):
    student, examples = make_student(config(tuning="full"))
    reference = AutoModelForCausalLM.from_pretrained(config().model, dtype=torch.float32)
    total, tokens = 0.0, 0
    for example in examples[:6]:
        labels = torch.full_like(example.ids, -100)
        labels[example.trained] = example.ids[example.trained]
        with torch.no_grad():
            loss = reference(input_ids=example.ids[None], labels=labels[None]).loss
        total += loss.item() * len(example.trained)
        tokens += len(example.trained)
    loss, _ = gradients(student, examples[:6])
    assert loss == pytest.approx(total / tokens, abs=1e-5)


def test_packed_examples_do_not_see_each_other(config):
    student, examples = make_student(config())
    student.eval()
    with torch.no_grad():
        alone = [student([example]).item() for example in examples[:5]]
        assert student(examples[:5]).item() == pytest.approx(sum(alone), rel=1e-6)
        changed = chat.Example(examples[0].ids.roll(1), examples[0].trained)
        beside = student([changed, examples[1]]).item() - student([changed]).item()
    assert beside == pytest.approx(alone[1], rel=1e-5)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_micro_batches_give_the_gradients_of_one_batch(config, tuning):
    student, examples = make_student(config(tuning=tuning, dropout=0.0))
    loss, whole = gradients(student, examples[:8], micro_tokens=100000)
    for micro_tokens in (1, 150):
        other_loss, parts = gradients(student, examples[:8], micro_tokens=micro_tokens)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert largest_difference(whole, parts) < 1e-6


def test_an_observation_has_no_gradient_of_its_own(config):
    student, examples = make_student(config(tuning="full"))
    example = examples[0]
    first = chat.Example(example.ids, example.trained[:1])
    cut = chat.Example(example.ids[: example.trained[0] + 1], example.trained[:1])
    assert largest_difference(gradients(student, [first])[1], gradients(student, [cut])[1]) < 1e-5


def test_checkpointing_changes_no_gradient(config):
    student, examples = make_student(config(dropout=0.1))
    other, _ = make_student(config(dropout=0.1, checkpointing=True))
    torch.manual_seed(5)
    _, plain = gradients(student, examples[:4])
    torch.manual_seed(5)
    _, recomputed = gradients(other, examples[:4])
    assert other.model.is_activation_checkpointing and not student.model.is_activation_checkpointing
    assert largest_difference(plain, recomputed) < 1e-6


class Memory:
    """Room for so many tokens, and for four times as many if they are checkpointed: stands in for a GPU's."""

    def __init__(self, monkeypatch, tokens):
        self.tokens, self.attempts, self.forward = tokens, [], train.Student.forward
        monkeypatch.setattr(train.Student, "forward", lambda student, examples: self.call(student, examples))

    def call(self, student, examples):
        loss = self.forward(student, examples)
        checkpointed = student.model.is_activation_checkpointing
        self.attempts.append((sum(student.lengths), len(examples), checkpointed))
        if sum(student.lengths) > self.tokens * (4 if checkpointed else 1):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss


def test_a_step_that_does_not_fit_is_cut_until_it_does(config, tmp_path, monkeypatch):
    options = {"dropout": 0.0, "epochs": 1, "micro_tokens": 4096}
    whole = train.fit(config(out=str(tmp_path / "whole"), **options))
    _, examples = make_student(config())
    longest = max(len(example.ids) for example in examples)
    memory = Memory(monkeypatch, longest - 10)
    cut = train.fit(config(out=str(tmp_path / "cut"), **options))
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut")]
    assert largest_difference(*weights) < 1e-5
    assert whole["micro_tokens"] == 4096 and "checkpointed_from" not in whole
    assert cut["micro_tokens"] < longest - 10 < cut["checkpointed_from"] <= longest
    # What fitted was not checkpointed, and what did not fit was tried once.
    failed = [attempt for attempt in memory.attempts if attempt[0] > memory.tokens and not attempt[2]]
    assert len(failed) == len(set(failed)) <= 8
    assert all(attempt[0] > memory.tokens and attempt[1] == 1 for attempt in memory.attempts if attempt[2])


@pytest.mark.parametrize(
    "processes, tokens, options, advice",
    [
        (1, 10, {}, "try --max-length, a smaller model or --parallel fsdp"),
        (1, 10, {"checkpointing": True}, "try --max-length"),
        (2, 150, {}, r"try --micro-tokens \d+ or --checkpointing"),
        (2, 10, {"checkpointing": True, "micro_tokens": 1}, "try --max-length"),
    ],
)
def test_what_never_fits_is_refused_with_advice(config, monkeypatch, processes, tokens, options, advice):
    given = config(**options)
    student, examples = make_student(given)
    Memory(monkeypatch, tokens)
    with pytest.raises(InputError, match="tokens at once do not fit into the device's memory; " + advice):
        process = devices.Process(size=processes)
        train.accumulate_what_fits(student, student, examples[:8], given, process, bf16=False, seed=0)


def test_bf16_is_close_to_float32(config):
    student, examples = make_student(config(tuning="full"))
    loss, exact = gradients(student, examples[:8])
    rounded_loss, rounded = gradients(student, examples[:8], bf16=True)
    assert rounded_loss == pytest.approx(loss, rel=2e-2)
    assert all(gradient.dtype == torch.float32 for gradient in rounded.values())
    flat = lambda grads: torch.cat([g.flatten() for g in grads.values()])  # noqa: E731
    assert torch.cosine_similarity(flat(exact), flat(rounded), dim=0) > 0.99


def test_a_model_with_more_than_a_linear_head_is_refused(tmp_path, tokenizer):
    model, _ = train.load_model(make_model(tmp_path / "model", tokenizer))
    model.lm_head.register_forward_hook(lambda module, inputs, output: 5 * torch.tanh(output / 5) + 1)
    with pytest.raises(InputError, match="more than a linear layer"):
        train.Student(model)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_schedules_are_transformers(config, schedule):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2e-4)
    reference = get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=17)
    for step in range(17):
        rate = train.learning_rate(step, 17, config(schedule=schedule, lr=2e-4))
        assert rate == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()
    warm = [train.learning_rate(step, 17, config(schedule=schedule, warmup_steps=4, lr=1.0)) for step in range(5)]
    assert warm == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


# Adapters


def test_lora_starts_as_its_base_and_wraps_all_linear_layers_but_the_head(config):
    student, _ = make_student(config())
    wrapped = [name.rpartition(".")[2] for name, _ in lora.layers(student.model)]
    assert sorted(wrapped) == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"] * 2)
    assert {name.rpartition(".")[2] for name, p in student.named_parameters() if p.requires_grad} == {"a", "b"}
    base, _ = train.load_model(config().model)
    ids = torch.arange(20)[None]
    student.eval()
    train.packed_attention.lengths = [20]
    assert torch.equal(student.model(ids).logits, base(ids).logits) or torch.allclose(
        student.model(ids).logits, base(ids).logits, atol=1e-5
    )


def test_a_tokenizer_of_ones_own_splits_text_as_its_file_says(tmp_path):
    """AutoTokenizer gives a Qwen2 model Qwen2's splitting, whatever tokenizer.json holds."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0, "ab": 1, "c7": 2}, "<|endoftext|>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    own = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    path = make_model(tmp_path / "model", own)
    assert lora.load_tokenizer(path)("ab c7 ab")["input_ids"] == [1, 2, 1]
    assert lora.load_tokenizer(path).eos_token == "<|endoftext|>"


def test_an_adapter_is_saved_loaded_merged_and_continued(config, tmp_path):
    summary = train.fit(config(epochs=1))
    out = Path(config().out)
    names = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert names | {"run.json", "metrics.jsonl", "summary.json"} <= {path.name for path in out.iterdir()}
    assert not (out / "checkpoint").exists()
    ids = torch.arange(30)[None]
    merged, _ = train.load_model(out)
    unmerged, _ = train.load_model(out, merge=False)
    base, _ = train.load_model(config().model)
    assert not lora.layers(merged) and lora.layers(unmerged)
    torch.testing.assert_close(merged(ids).logits, unmerged(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged(ids).logits, base(ids).logits, atol=1e-3)

    lora.merge_adapter(lora.MergeConfig(adapter=str(out), out=str(tmp_path / "merged"), dtype="float32"))
    again, _ = train.load_model(tmp_path / "merged")
    assert torch.equal(again(ids).logits, merged(ids).logits)

    more = config(model=str(out), out=str(tmp_path / "more"), epochs=1)
    continued, examples = make_student(more)
    assert torch.equal(continued.model.get_submodule("model.layers.0.mlp.up_proj").a, first_weight(out))
    assert train.fit(more)["loss"] < summary["loss"]
    adapter_config = json.loads((tmp_path / "more" / "adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == config().model
    with pytest.raises(InputError, match="is an adapter"):
        train.fit(config(model=str(out), tuning="full", out=str(tmp_path / "full")))


def first_weight(folder):
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    return weights["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(config, tmp_path, change, reason):
    student, _ = make_student(config())
    lora.save(student.model, tmp_path / "adapter", config().model)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=reason):
        train.load_model(tmp_path / "adapter")


def test_another_models_adapter_is_refused(config, tmp_path, tokenizer):
    student, _ = make_student(config())
    lora.save(student.model, tmp_path / "adapter", make_model(tmp_path / "wide", tokenizer, hidden_size=64))
    with pytest.raises(InputError, match="does not fit"):
        train.load_model(tmp_path / "adapter")
    lora.save(student.model, tmp_path / "adapter", make_model(tmp_path / "low", tokenizer, num_hidden_layers=1))
    with pytest.raises(InputError, match=r"no layer model\.layers\.1"):
        train.load_model(tmp_path / "adapter")


# Whole runs


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_it_overfits_one_batch(config, tmp_path, tokenizer, tuning):
    model = make_model(tmp_path / "wide", tokenizer, hidden_size=64)  # 32 are too few under a frozen random head
    rng = random.Random(5)
    path = write_jsonl(tmp_path / "few.jsonl", [{"messages": conversation(rng, 2)} for _ in range(4)])
    options = {"data": [path], "model": model, "tuning": tuning, "batch_size": 4, "epochs": 150, "lr": 1e-2}
    options |= {"rank": 32, "alpha": 64}
    options |= {"dropout": 0.0, "schedule": "cosine", "validation": [path], "val_every": 50}
    summary = train.fit(config(**options))
    assert summary["loss"] < 0.1
    rows = [json.loads(line) for line in (Path(config().out) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation_loss" in row] == [50, 100, 150]
    assert rows[-1]["validation_loss"] == pytest.approx(summary["loss"], abs=0.02)
    model, tokenizer = train.load_model(config().out)
    prompt = chat.render(tokenizer, conversation(random.Random(5), 2)[:2], reply=True)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    written = model.generate(**ids, max_new_tokens=80, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    reply = tokenizer.decode(written[0, ids["input_ids"].shape[1] :])
    assert reply == conversation(random.Random(5), 2)[2]["content"] + "<|im_end|>"


def test_pretokenised_rows_train_from_scratch(config, tmp_path):
    rows = [{"input_ids": [5, 6, 7, 8] * 4, "loss_mask": [0] * 4 + [1] * 12} for _ in range(8)]
    path = write_jsonl(tmp_path / "copies.jsonl", rows)
    summary = train.fit(config(data=[path], tuning="full", epochs=60, lr=1e-2, batch_tokens=128))
    assert (summary["tokens"], summary["trained_tokens"]) == (128, 96)
    assert summary["steps"] == 60 and summary["loss"] < 0.1
    assert train.load_model(config().out)[0].config.tie_word_embeddings


def test_a_finished_folder_is_kept_and_another_configuration_refused(config):
    first = train.fit(config(epochs=1))
    weights = Path(config().out) / "adapter_model.safetensors"
    stamp = weights.stat().st_mtime_ns
    assert train.fit(config(epochs=1, quiet=False)) == first
    assert weights.stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match=r"--lr 0\.001, not 0\.1"):
        train.fit(config(epochs=1, lr=0.1))


def test_a_checkpoint_of_other_data_is_refused(config, tmp_path):
    rows = [{"messages": conversation(random.Random(i))} for i in range(3)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    student, examples = make_student(config(data=[path]))
    optimizer = train.make_optimizer(student, config())
    gradients(student, examples)
    optimizer.step()
    checkpoint = Path(config().out) / "checkpoint" / "state.pt"
    train.save_checkpoint(checkpoint, 1, student, optimizer, chat.fingerprint(examples), True)
    write_jsonl(tmp_path / "rows.jsonl", rows[:2])
    with pytest.raises(InputError, match="other data"):
        train.fit(config(data=[path]))


def command(config, *options):
    arguments = [*config.data, "--model", config.model, "--out", config.out, "--precision", "fp32", "--threads", "1"]
    arguments += ["--rank", "4", "--lr", "1e-3", "--batch-size", "2", "--epochs", "3", "--save-every", "2", "--quiet"]
    return [str(ROOT / "train.py"), *arguments, *options]


def run_here(config, *options):
    with pytest.raises(SystemExit) as stop:
        train.main(command(config, *options)[1:])
    assert not stop.value.code


def metrics(folder):
    return (Path(folder) / "metrics.jsonl").read_text()


def test_killed_at_random_moments_it_ends_bit_for_bit_the_same(config, tmp_path):
    straight, killed = config(out=str(tmp_path / "straight")), config(out=str(tmp_path / "killed"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run_here(straight)
    rng, kills = random.Random(7), 0
    while kills < 3:
        process = subprocess.Popen([sys.executable, *command(killed)], env=environment)
        path, before = Path(killed.out) / "metrics.jsonl", 0
        target = 5 + 9 * kills + rng.randint(0, 6)  # of the 36 steps
        while process.poll() is None and before < target:
            before = path.read_bytes().count(b"\n") if path.exists() else 0
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert not (Path(killed.out) / "summary.json").exists()
    assert (Path(killed.out) / "checkpoint" / "state.pt").exists()
    subprocess.run([sys.executable, *command(killed)], check=True, env=environment)
    assert metrics(killed.out) == metrics(straight.out)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (Path(killed.out) / name).read_bytes() == (Path(straight.out) / name).read_bytes()
    assert not (Path(killed.out) / "checkpoint").exists()


PROCESSES = """
import sys
import torch
from test_train import step_gradients
import devices
import train

options, out = eval(sys.argv[1]), sys.argv[2]
results = {}
for tuning in ("lora", "full"):
    for parallel in ("ddp", "fsdp"):
        config = train.Config(**options, tuning=tuning, parallel=parallel)
        process = devices.start_process(config)
        results[tuning, parallel] = step_gradients(config, process)
if process.first:
    torch.save(results, out)
devices.stop_process()
"""


def step_gradients(config, process):
    """(loss, gradient norm, gradients) of one step on 7 examples, on however many processes there are."""
    torch.manual_seed(config.seed)
    student, _ = train.build_student(config, process, bf16=False)
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora.layers(student.model):  # B = 0 would leave A without a gradient
        layer.b.data = torch.randn(layer.b.shape, generator=generator) * 0.1
    call = train.distribute(student, config, process)
    examples, _ = chat.read_examples(config.data, lora.load_tokenizer(config.model), config, quiet=True)
    micro_batches = chat.split_step(examples[:7], config.micro_tokens, process.size)[process.rank]
    trained = sum(len(example.trained) for example in examples[:7])
    loss = train.accumulate(call, micro_batches, trained, process, bf16=False)
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1e9)
    gradients = {name: devices.whole(p.grad) for name, p in student.named_parameters() if p.requires_grad}
    return loss.item(), devices.whole(norm).item(), gradients


def test_two_processes_give_the_gradients_of_one(config, tmp_path):
    script, out = tmp_path / "processes.py", tmp_path / "gradients.pt"
    script.write_text(PROCESSES)
    options = vars(config(dropout=0.0, micro_tokens=300))
    del options["tuning"], options["parallel"]
    torchrun("2", str(script), repr(options), str(out), check=True)
    results = torch.load(out)
    assert len(results) == 4
    for (tuning, parallel), (loss, norm, gradients) in results.items():
        expected = step_gradients(train.Config(**options, tuning=tuning), devices.Process())
        assert loss == pytest.approx(expected[0], rel=1e-6), (tuning, parallel)
        assert norm == pytest.approx(expected[1], rel=1e-5), (tuning, parallel)
        assert largest_difference(gradients, expected[2]) < 1e-6, (tuning, parallel)


def torchrun(processes, *arguments, check=False):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes]
    command += ["--master-port", str(free_port()), *arguments]
    return subprocess.run(command, check=True, env=environment) if check else subprocess.Popen(command, env=environment)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_sharded_run_is_saved_once_and_resumes(config, tmp_path):
    """FSDP on two processes, killed after its checkpoint, continued: what one process would have made."""
    straight = config(out=str(tmp_path / "one"))
    no_dropout = ["--dropout", "0", "--epochs", "1", "--validation", config().data[0]]
    run_here(straight, *no_dropout)
    sharded = config(out=str(tmp_path / "two"))
    arguments = ["2", *command(sharded, *no_dropout, "--parallel", "fsdp")]
    process = torchrun(*arguments)
    checkpoint = Path(sharded.out) / "checkpoint" / "state.pt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)  # torchrun ends its processes
    process.wait()
    assert not (Path(sharded.out) / "summary.json").exists()
    torchrun(*arguments, check=True)
    one, two = (json.loads((Path(c.out) / "summary.json").read_text()) for c in (straight, sharded))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], abs=1e-3)
    ids = torch.arange(30)[None]
    logits = [train.load_model(c.out)[0](ids).logits for c in (straight, sharded)]
    torch.testing.assert_close(*logits, rtol=1e-2, atol=1e-2)


# The command line


def run(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], capture_output=True, text=True)


def test_show_prints_trained_tokens_apart_and_counts(config, tokenizer):
    result = run("show", *config().data, "--model", config().model, "--example", "2")
    assert result.returncode == 0, result.stderr
    messages = [json.loads(line) for line in Path(config().data[0]).read_text().splitlines()][1]["messages"]
    trained = [part.split("⟧")[0] for part in result.stdout.split("⟦")[1:]]
    assert trained == [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    _, counts = chat.read_examples(config().data, tokenizer, config())
    assert f"trained tokens {counts['trained_tokens']:,}" in result.stdout


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["missing.jsonl", "--model", "MODEL"], "missing.jsonl: No such file"),
        (["DATA", "--model", "no/such/model/here"], "model no/such/model/here"),
        (["DATA", "--model", "MODEL", "--system-prompt", "missing.txt"], "missing.txt: No such file"),
        (["DATA", "--model", "MODEL", "--lrr", "1"], "--lrr"),
        (["DATA", "--model", "MODEL", "--tuning", "prefix"], "prefix"),
        (["DATA", "--model", "MODEL", "--batch-size", "0"], "batch-size"),
    ],
)
def test_a_wrong_command_gets_one_line_and_status_2(config, tmp_path, capsys, arguments, reason):
    names = {"DATA": config().data[0], "MODEL": config().model}
    arguments = [names.get(argument, argument) for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        train.main([*arguments, "--out", str(tmp_path / "out"), "--quiet"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert reason in message and len(message.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_diverging_run_stops_with_the_step(config):
    with pytest.raises(InputError, match=r"loss is (nan|inf) at step"):
        train.fit(config(tuning="full", lr=1e30, clip=math.inf, epochs=4))
