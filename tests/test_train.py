"""Training: which tokens are trained, that the loss and its gradients are exact, and that a run survives.

python -m pytest tests/test_train.py
"""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_scheduler

import train
from allocator import Allocator
from common import InputError, Journal, models
from conftest import (
    CHATML,
    LONGROPE,
    ROOT,
    chat,
    conversation,
    kill_when,
    make_model,
    read_rows,
    trained_runs,
    write_jsonl,
)
from servers import free_port

CPU = torch.device("cpu")
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
# Prints an empty thinking part before the last reply only, as Qwen3's does.
THINKS = CHATML.replace(
    "m.content +", "('<think></think>' if loop.last and m.role == 'assistant' else '') + m.content +"
)

# Starts a reply with a newline, which makes one token with the newline at the end of the prompt.
GLUES = CHATML.replace("m.content +", "('\n' if m.role == 'assistant' else '') + m.content +")
# The mark that begins the next message ends a turn, as GLM-4's does: nothing follows the last reply.
GLM = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content }}{%- endfor %}"
    + CHATML.split("endfor %}")[1]
)
ADDS = {STRIPS: "", THINKS: "<think></think>", GLUES: "\n"}  # what the templates that need an example per turn add


@pytest.fixture(scope="session")
def data_path(tmp_path_factory):
    rng = random.Random(0)
    rows = [{"messages": conversation(rng, rng.randint(1, 4))} for _ in range(24)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows)


@pytest.fixture
def config(tmp_path, tiny_model, data_path):
    def make(**options):
        defaults = {"data": [data_path], "model": tiny_model, "out": str(tmp_path / "out"), "precision": "fp32"}
        defaults |= {"quiet": True, "lr": 1e-3}
        if options.get("tuning") != "full":
            defaults |= {"rank": 4, "alpha": 8}
        return train.Config(**defaults | options)

    return make


def read_examples(config):
    conversations, _, _ = train.read_conversations(models.load_tokenizer(config.model), config)
    return [example for examples in conversations for example in examples]


def half(text, turn, row):
    return 0.5


def make_trainer(config):
    """Returns (Trainer, examples); the adapters' B is random, because with B = 0 the gradient of A would be 0."""
    trainer = train.Trainer(config, CPU)
    generator = torch.Generator().manual_seed(1)
    for _, layer in models.lora_layers(trainer.model):
        layer.b.data = torch.randn(layer.b.shape, generator=generator) * 0.1
    return trainer, read_examples(config)


def gradients(trainer, examples, seed=0):
    loss = trainer.accumulate(examples, seed)
    return loss, trainer.gradient.clone()


def difference(a, b):
    return (a - b).abs().max().item()


# Which tokens are trained


def test_exactly_the_assistants_tokens_and_its_end_of_turn_are_trained(tiny_tokenizer):
    messages = chat("ab", "cd", "Thought: ef", "Observation:\ngh", "ij")
    [example] = train.encode(tiny_tokenizer, messages)
    token = lambda text: tiny_tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    context = token("<|im_start|>system\nab<|im_end|>\n<|im_start|>user\ncd<|im_end|>\n<|im_start|>assistant\n")
    first = token("Thought: ef<|im_end|>")
    observation = token("\n<|im_start|>user\nObservation:\ngh<|im_end|>\n<|im_start|>assistant\n")
    second = token("ij<|im_end|>")
    assert example.ids.tolist() == context + first + observation + second + token("\n")
    expected = [0] * len(context) + [1] * len(first) + [0] * len(observation) + [1] * len(second) + [0]
    assert example.weights.tolist() == expected


@pytest.mark.parametrize("template", [CHATML, LLAMA, PHI, STRIPS, THINKS, GLUES, GLM])
def test_training_sees_what_inference_sees(tiny_tokenizer, template, monkeypatch):
    """The tokens before a reply are those of the prompt at inference, also if a template rewrites earlier turns."""
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    rng = random.Random(1)
    for _ in range(20):
        messages = conversation(rng, 4)
        if template == LLAMA:
            messages[2]["content"] += " \n"  # trimmed by the template
        examples = train.encode(tiny_tokenizer, messages)
        assert len(examples) == (4 if template in ADDS else 1)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        for turn, (prompt, reply) in zip(turns, trained_runs(examples), strict=True):
            assert prompt == tiny_tokenizer.apply_chat_template(
                messages[:turn], add_generation_prompt=True, return_dict=False, **models.TEMPLATE_OPTIONS
            )
            end = {LLAMA: "<|eot_id|>", GLM: "<|im_start|>"}.get(template, "<|im_end|>")
            expected = messages[turn]["content"].strip() + end
            assert tiny_tokenizer.decode(reply) == ADDS.get(template, "") + expected


@pytest.mark.parametrize(
    "template, content, reason",
    [
        (REMINDS, "ab", "differently"),
        (CHATML, "ab<|im_end|>cd", "special token"),
        (CHATML.replace("'<|im_end|>'", "' #'"), "ab", "special token at its end"),
        (CHATML.replace("m.content", "m.content | upper"), "ab", "does not print this turn as it is"),
        (CHATML + "{{ raise_exception('only one turn') }}", "ab", "only one turn"),
        (None, "ab", "chat template"),
    ],
)
def test_what_cannot_be_masked_exactly_is_refused(tiny_tokenizer, monkeypatch, template, content, reason):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    messages = chat("", "cd", content)[1:] * 2
    with pytest.raises(InputError, match=reason):
        train.encode(tiny_tokenizer, messages)


def test_tokens_are_weighed_by_message_or_by_part(tiny_tokenizer):
    messages = conversation(random.Random(4), 3)
    row = {"messages": messages, "steps": [{"error_kind": None}, {"error_kind": "runtime"}, {"error_kind": None}]}

    def weigh(text, turn, row):
        if row["steps"][turn]["error_kind"]:
            return 0.5
        return [(0, text.index("Code:"), 2), (len(text), len(text) + 1, 3.0)]  # the thought, and the end of the turn

    [plain] = train.encode(tiny_tokenizer, messages)
    [weighed] = train.encode(tiny_tokenizer, messages, weigh, row)
    assert torch.equal(weighed.ids, plain.ids) and torch.equal(weighed.weights != 0, plain.weights != 0)
    text = lambda weight: tiny_tokenizer.decode(weighed.ids[weighed.weights == weight])  # noqa: E731
    assert text(0.5) == messages[4]["content"] + "<|im_end|>"
    assert text(3.0) == "<|im_end|>" * 2
    assert text(2) == "".join(messages[i]["content"].split("Code:")[0] for i in (2, 6))

    for bad in (-1, math.nan, math.inf, None, (0, 5, 1.0), [(0, 5)], [(0, 5, -1)], [(5, 0, 1.0)], [("a", "b", 1)], "2"):
        with pytest.raises(InputError, match="the weight of a message is .*: a number from 0 up"):
            train.encode(tiny_tokenizer, messages, lambda text, turn, row, bad=bad: bad)


# Reading the data

USER, ASSISTANT = {"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}


@pytest.mark.parametrize(
    "row, reason",
    [
        ("{not json", "not JSON"),
        ({"text": "ab"}, "expected"),
        ({"messages": "ab"}, "expected"),
        ({"messages": [{"role": "user"}]}, "expected"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "expected"),
        ({"messages": [{"role": ["assistant"], "content": "ab"}]}, "expected"),
        ({"messages": [USER]}, "nothing to train on"),
        ({"messages": []}, "nothing to train on"),
        ({"messages": [USER, ASSISTANT], "correct": False}, "a wrong answer"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tiny_tokenizer, tmp_path, config, row, reason):
    path = write_jsonl(tmp_path / "bad.jsonl", [{"messages": [USER, ASSISTANT]}, row])
    with pytest.raises(InputError, match=rf"bad\.jsonl:2: .*{reason}"):
        train.read_conversations(tiny_tokenizer, config(data=[path]))


def test_half_a_surrogate_pair_is_a_question_mark():
    row = {"messages": [{"role": "user", "content": "a\ud83d"}]}
    assert train.read_messages(row, None) == [{"role": "user", "content": "a?"}]


def test_what_is_dropped_is_counted(tiny_tokenizer, tmp_path, config, monkeypatch):
    rng = random.Random(3)
    rows = [{"messages": conversation(rng, 4)}, {"messages": conversation(rng, 1, words=3)}]
    rows.append({"messages": conversation(rng, 1, words=3), "no": "weight"})
    rows.append({"messages": [USER, {"role": "assistant", "content": "an <|im_end|> inside"}]})
    weigh = lambda text, turn, row: 0 if "no" in row else 1  # noqa: E731
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    conversations, _, counts = train.read_conversations(tiny_tokenizer, config(data=[path], max_length=150), weigh)
    assert [len(examples) for examples in conversations] == [1]
    assert (counts["dropped_too_long"], counts["dropped_zero_weight"], counts["split_into_turns"]) == (1, 1, 0)
    assert counts["dropped_special_token"] == 1
    with pytest.raises(InputError, match="no example is left"):
        train.read_conversations(tiny_tokenizer, config(data=[path], max_length=3))
    # Of a conversation that is split into turns, the turns that fit are kept.
    monkeypatch.setattr(tiny_tokenizer, "chat_template", STRIPS)
    conversations, _, counts = train.read_conversations(tiny_tokenizer, config(data=[path], max_length=150), weigh)
    assert 1 <= len(conversations[0]) < 4 and counts["split_into_turns"] == 1
    assert counts["dropped_too_long"] == 4 - len(conversations[0])


def test_training_json_says_how_the_student_was_trained(tiny_tokenizer, tmp_path, config):
    first, second = (conversation(random.Random(seed), 1)[1:] for seed in (2, 3))
    system = {"role": "system", "content": "short words"}
    rows = [
        {"messages": [system, *messages], "method": "agent", "tools": ["web_search"]} for messages in (first, second)
    ]
    rows[0]["prompts_sha256"] = "ab"
    rows[1] |= {"prompts_sha256": "cd", "prefix": True}

    def record(rows, **options):
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        return train.read_conversations(tiny_tokenizer, config(data=[path], **options))[1]

    expected = {"method": "agent", "training": "distill+prefix", "system_prompt": "short words"}
    expected |= {"tools": ["web_search"], "prompts_sha256": None}
    assert record(rows) == expected
    assert record(rows[:1]) == expected | {"training": "distill", "prompts_sha256": "ab"}
    assert record([rows[0], rows[1] | {"method": "cot"}])["method"] is None
    assert record([rows[0], {"messages": second}]) == dict.fromkeys(expected) | {"training": "distill"}

    (tmp_path / "system.txt").write_text("be brief\n")
    options = {"system_prompt": str(tmp_path / "system.txt")}
    assert record([rows[0], {"messages": second}], **options)["system_prompt"] == "be brief"
    for example in read_examples(config(data=[str(tmp_path / "rows.jsonl")], **options)):
        assert tiny_tokenizer.decode(example.ids).startswith("<|im_start|>system\nbe brief<|im_end|>")


def test_every_conversation_is_planned_once_an_epoch(config):
    conversations = [[example] for example in read_examples(config())]
    steps = train.plan_steps(conversations, config(epochs=3, batch_size=5))
    assert [len(step) for step in steps] == [5, 5, 5, 5, 4] * 3
    places = {id(examples[0]): n for n, examples in enumerate(conversations)}
    order = [places[id(example)] for step in steps for example in step]
    epochs = [order[n : n + 24] for n in (0, 24, 48)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    numbers = lambda steps: [[places[id(example)] for example in step] for step in steps]  # noqa: E731
    assert numbers(steps) == numbers(train.plan_steps(conversations, config(epochs=3, batch_size=5)))
    assert numbers(steps) != numbers(train.plan_steps(conversations, config(epochs=3, batch_size=5, seed=1)))
    for micro_tokens in (1, 300, 10**6):
        micro_batches = train.split_step(steps[0], micro_tokens)
        assert sorted(places[id(e)] for m in micro_batches for e in m) == sorted(numbers(steps)[0])
        for micro_batch in micro_batches:
            assert len(micro_batch) == 1 or len(micro_batch) * max(len(e.ids) for e in micro_batch) <= micro_tokens


# The loss


@pytest.mark.parametrize("logits", [1, 500 * 7, 2**26])
def test_the_loss_in_chunks_has_autograds_gradients(config, monkeypatch, logits):
    """The head is trained too, so that both gradients of the loss are compared."""
    monkeypatch.setattr(train, "LOGITS", logits)
    trainer, examples = make_trainer(config(tuning="full"))
    example = train.Example(examples[0].ids, examples[0].weights * torch.rand(len(examples[0].ids)))
    losses = torch.nn.functional.cross_entropy(
        trainer.model(example.ids[None]).logits[0, :-1], example.ids[1:], reduction="none"
    )
    expected = (losses * example.weights[1:]).sum() / example.weights.sum()
    wanted = torch.autograd.grad(expected, trainer.parameters)
    for scale in (1, 2):  # the mean is over the sum of the weights
        loss, gradient = gradients(trainer, [train.Example(example.ids, example.weights * scale)])
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert difference(gradient, torch.cat([g.flatten() for g in wanted])) < 1e-6


# Gated DeltaNet (Qwen3.5) carries state along a row: examples must not share one.
RECURRENT = {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8}
RECURRENT |= {"linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}


def test_the_loss_is_transformers_own(config, tmp_path, tiny_tokenizer):
    """Examples of several lengths, padded into one batch, have the losses of each one alone."""
    losses = set()
    for kind, options in (("Qwen2", {}), ("Qwen2", WINDOW), ("Qwen3_5", RECURRENT)):
        model = make_model(tmp_path / "model", tiny_tokenizer, kind, **options)
        trainer = train.Trainer(config(model=model, dropout=0.0), CPU)  # B = 0: the adapter changes nothing yet
        assert len(models.lora_layers(trainer.model)) > 8
        examples = max(train.split_step(read_examples(config()), 2048), key=len)
        assert len(examples) > 3 and len({len(example.ids) for example in examples}) > 1
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        total, tokens = 0.0, 0
        for example in examples:
            trained = example.weights > 0
            labels = torch.where(trained, example.ids, -100)
            with torch.no_grad():
                loss = reference(input_ids=example.ids[None], labels=labels[None]).loss
            total += loss.item() * trained.sum().item()
            tokens += trained.sum().item()
        loss, _ = gradients(trainer, examples)
        assert loss == pytest.approx(total / tokens, rel=1e-5)
        losses.add(round(loss, 2))
    assert len(losses) == 3, "the window matters here"


def test_dropout_follows_from_the_seed_also_where_activations_are_recomputed(config):
    trainer, examples = make_trainer(config(dropout=0.3))
    first, again, other = (gradients(trainer, examples[:4], seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and difference(first, other) > 1e-3
    checkpointed, _ = make_trainer(config(dropout=0.3, checkpointing=True))
    assert difference(first, gradients(checkpointed, examples[:4])[1]) < 1e-6
    assert checkpointed.model.is_activation_checkpointing and not trainer.model.is_activation_checkpointing


def test_bf16_is_close_to_float32(config):
    for tuning in ("lora", "full"):
        trainer, examples = make_trainer(config(tuning=tuning))
        loss, exact = gradients(trainer, examples[:4])
        trainer, _ = make_trainer(config(tuning=tuning, precision="bf16"))
        rounded_loss, rounded = gradients(trainer, examples[:4])
        assert rounded_loss == pytest.approx(loss, rel=2e-2)
        assert rounded.dtype == torch.float32
        assert torch.cosine_similarity(exact, rounded, dim=0) > 0.99


# Models that cannot be trained this way, and one whose examples must go alone


def leak(model):
    """Let one row of a batch see the others, as a layer with state would if examples were packed."""
    body = model.get_decoder()
    body.layers[0].register_forward_hook(lambda module, inputs, output: output + output.mean(dim=(0, 1)))


def soft_cap(model):
    model.lm_head.register_forward_hook(lambda module, inputs, output: 5 * torch.tanh(output / 5))


@pytest.mark.parametrize("change", [leak, soft_cap])
def test_a_model_whose_loss_would_be_wrong_is_refused(config, change):
    model, _ = models.load_model(config().model)
    models.check_model(model)
    change(model)
    with pytest.raises(InputError, match="differ|not a plain linear"):
        models.check_model(model)


def test_where_a_longer_example_changes_the_positions_each_goes_alone(config, tmp_path, tiny_tokenizer):
    """Phi-4-mini and Phi-3.5 (longrope): the loss of a short example beside a long one is its loss alone."""
    rng = random.Random(0)
    rows = [{"messages": conversation(rng, 1, words=4)}, {"messages": conversation(rng, 3)}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    model = make_model(tmp_path / "model", tiny_tokenizer, "Phi3", **LONGROPE)
    trainer, examples = make_trainer(config(model=model, data=[path], dropout=0.0, micro_tokens=10_000))
    assert len(examples[0].ids) < 128 < len(examples[1].ids)
    weights = [example.weights.sum().item() for example in examples]
    alone = [gradients(trainer, [example])[0] for example in examples]
    expected = sum(loss * weight for loss, weight in zip(alone, weights, strict=True)) / sum(weights)
    assert gradients(trainer, examples)[0] == pytest.approx(expected, rel=1e-6)
    together = train.loss_of(trainer.model, examples).item() / sum(weights)
    assert together != pytest.approx(expected, rel=1e-4), "the positions matter here"


def test_positions_that_depend_on_earlier_examples_are_refused(config, tmp_path, tiny_tokenizer):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = make_model(tmp_path / "model", tiny_tokenizer, rope_parameters=rope)
    with pytest.raises(InputError, match="dynamic position scaling is not supported"):
        train.Trainer(config(model=model), CPU)


# Devices, of which there are none here


def test_a_gpu_is_named_with_its_number_and_made_current(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    names = ["auto", "cuda", "cuda:0", "cpu"]
    assert [str(models.choose_device(name)) for name in names] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    assert [str(device) for device in current] == ["cuda:1", "cuda:1", "cuda:0"]
    with pytest.raises(InputError, match="--device cuda:7: there are 2 GPUs"):
        models.choose_device("cuda:7")
    monkeypatch.delenv("LOCAL_RANK")
    assert str(models.choose_device()) == "cuda:0"


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert models.choose_device().type == "cpu"
    assert not torch.backends.cuda.cudnn_sdp_enabled(), "it plans for each new length, and gave wrong results on B200"
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    with pytest.raises(InputError, match="--device cuda:1: there is no GPU"):
        models.choose_device("cuda:1")


def test_bf16_is_not_emulated(monkeypatch):
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not models.uses_bf16("auto", gpu) and models.uses_bf16("bf16", gpu)


# Memory: tests/allocator.py counts the bytes of live tensors and raises torch.OutOfMemoryError above a limit


@pytest.mark.usefixtures("reference_counting_alone")
def test_with_less_memory_the_step_is_the_same_and_what_did_not_fit_is_freed(
    config, tmp_path, tiny_tokenizer, monkeypatch
):
    model = make_model(tmp_path / "model", tiny_tokenizer, num_hidden_layers=4, intermediate_size=192)
    settings = config(model=model, dropout=0.0, micro_tokens=4096)
    trainer, examples = make_trainer(settings)
    with Allocator() as unlimited:
        loss, gradient = gradients(trainer, examples[:12])
    cuts = []
    for share in (0.5, 0.12):
        (trainer, _), alive = make_trainer(settings), []
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(allocator.now))  # noqa: B023
        with Allocator(share * unlimited.peak) as allocator:
            other_loss, other = gradients(trainer, examples[:12])
        assert other_loss == pytest.approx(loss, rel=1e-6) and difference(gradient, other) < 1e-6
        assert alive and max(alive) <= trainer.gradient.nbytes + 1024  # the gradient counts as soon as it is zeroed
        cuts.append((trainer.micro_tokens, trainer.model.is_activation_checkpointing))
    assert cuts[1][0] <= cuts[0][0] < 4096
    assert cuts[1][1], "the least memory is enough only if activations are recomputed"
    with Allocator(100_000), pytest.raises(InputError, match="does not fit into memory; try a lower --max-length"):
        trainer.accumulate(examples, seed=0)


# Adapters


@pytest.fixture
def adapter(config, tmp_path):
    """The folder of an adapter that is not trained yet."""
    models.save_lora(train.Trainer(config(), CPU).model, tmp_path / "adapter", config().model)
    return tmp_path / "adapter"


def test_lora_wraps_all_linear_layers_but_the_head(config):
    model = train.Trainer(config(), CPU).model
    wrapped = [name.rpartition(".")[2] for name, _ in models.lora_layers(model)]
    assert sorted(wrapped) == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"] * 2)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"a", "b"}


def test_an_adapter_is_saved_loaded_merged_and_continued(config, tmp_path):
    summary = train.fit(config(epochs=1))
    out = Path(config().out)
    names = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"}
    names |= {"run.json", "metrics.jsonl", "summary.json", "training.json", "train.lock"}
    assert {path.name for path in out.iterdir()} == names | {"tokenizer_config.json"}
    record = models.training_record(out)
    unstated = dict.fromkeys(("method", "system_prompt", "prompts_sha256", "tools"))
    assert record == unstated | {"training": "distill", "base": config().model}
    saved = json.loads((out / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(Path(config().model).resolve())
    assert models.training_record(config().model) == {}
    ids = torch.arange(30)[None]
    unmerged, _ = models.load_base(out, torch.float32)
    unmerged.eval()
    base, _ = models.load_model(config().model)
    assert difference(unmerged(ids).logits, base(ids).logits) > 1e-3
    half, _ = models.load_model(out, dtype=torch.bfloat16)
    assert models.lora_layers(half) and half(ids).logits.dtype == torch.bfloat16

    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        models.merge_adapter(models.MergeConfig(adapter=str(out), out=str(folder), dtype=dtype))
        assert models.training_record(folder) == record
    merged, _ = models.load_model(tmp_path / "float32")
    torch.testing.assert_close(merged(ids).logits, unmerged(ids).logits, rtol=1e-4, atol=1e-4)
    loaded, _ = models.load_model(out)
    assert not models.lora_layers(loaded) and not loaded.training
    assert torch.equal(merged(ids).logits, loaded(ids).logits)
    rounded, _ = models.load_model(tmp_path / "bfloat16")
    expected = merged.model.layers[0].mlp.up_proj.weight.to(torch.bfloat16).float()
    assert torch.equal(rounded.model.layers[0].mlp.up_proj.weight, expected)  # cast once

    more = config(model=str(out), out=str(tmp_path / "more"), epochs=1)
    first = load_file(out / "adapter_model.safetensors")["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]
    assert torch.equal(train.Trainer(more, CPU).model.get_submodule("model.layers.0.mlp.up_proj").a, first)
    assert train.fit(more)["loss"] < summary["loss"]
    adapter_config = json.loads((tmp_path / "more" / "adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == config().model
    for lost in (str(out), config().model):
        with pytest.raises(InputError, match="the model in it would be lost"):
            models.merge_adapter(models.MergeConfig(adapter=str(out), out=lost))


def test_an_adapter_finds_its_base_from_any_folder(config, tmp_path, tiny_tokenizer, monkeypatch):
    make_model(tmp_path / "base", tiny_tokenizer)
    monkeypatch.chdir(tmp_path)
    trainer = train.Trainer(config(model="base"), CPU)
    models.save_lora(trainer.model, tmp_path / "adapter", trainer.base)
    monkeypatch.chdir("/")
    assert models.lora_layers(models.load_base(tmp_path / "adapter", torch.float32)[0])
    path = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"base_model_name_or_path": "../base"}))  # relative to the adapter
    assert models.lora_layers(models.load_base(tmp_path / "adapter", torch.float32)[0])
    path.write_text(json.dumps(written | {"base_model_name_or_path": str(tmp_path / "moved")}))
    with pytest.raises(InputError, match=r"the base model .*moved is gone: correct base_model_name_or_path"):
        models.load_model(tmp_path / "adapter")


@pytest.mark.parametrize(
    "change, base, reason",
    [
        ({"peft_type": "LOHA"}, {}, "only plain LoRA"),
        ({"alpha_pattern": {"q_proj": 3}}, {}, "only plain LoRA"),
        ({"lora_alpha": None}, {}, "only plain LoRA"),
        ({"r": None}, {}, "only plain LoRA"),
        ({"init_lora_weights": "pissa"}, {}, "only plain LoRA"),
        ({}, {"hidden_size": 64}, "does not fit"),
        ({}, {"num_hidden_layers": 1}, "does not fit"),
    ],
)
def test_an_adapter_of_another_kind_or_model_is_refused(adapter, tmp_path, tiny_tokenizer, change, base, reason):
    change = change or {"base_model_name_or_path": make_model(tmp_path / "base", tiny_tokenizer, **base)}
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=reason):
        models.load_model(adapter)


# Whole runs


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_it_overfits_one_batch(config, tmp_path, tiny_tokenizer, tuning):
    model = make_model(tmp_path / "wide", tiny_tokenizer, hidden_size=64)  # 32 are too few under a frozen random head
    rng = random.Random(5)
    path = write_jsonl(tmp_path / "few.jsonl", [{"messages": conversation(rng, 2)} for _ in range(4)])
    options = {"data": [path], "model": model, "tuning": tuning, "batch_size": 4, "epochs": 50, "lr": 2e-2}
    options |= {"rank": 32, "alpha": 64, "dropout": 0.0} if tuning == "lora" else {}
    summary = train.fit(config(**options))
    assert summary["loss"] < 0.1
    model, tokenizer = models.load_model(config().out)
    messages = conversation(random.Random(5), 2)
    prompt = models.render(tokenizer, messages[:2], reply=True)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    written = model.generate(**ids, max_new_tokens=80, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    assert tokenizer.decode(written[0, ids["input_ids"].shape[1] :]) == messages[2]["content"] + "<|im_end|>"


def test_the_learning_rate_is_that_of_transformers(config):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    reference = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=17)
    for step in range(17):
        assert train.learning_rate(step, 17, config(lr=2e-4)) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()
    # transformers begins its warm-up with a step of rate 0; here no step is wasted.
    rates = [train.learning_rate(step, 8, config(warmup_steps=4, lr=1.0)) for step in range(8)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_a_finished_folder_is_kept_and_another_configuration_refused(config):
    first = train.fit(config(epochs=1))
    weights = Path(config().out) / "adapter_model.safetensors"
    stamp = weights.stat().st_mtime_ns
    assert train.fit(config(epochs=1, quiet=False)) == first
    assert weights.stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match=r"lr 0\.001, not 0\.1"):
        train.fit(config(epochs=1, lr=0.1))
    with pytest.raises(InputError, match="weigh"):
        train.fit(config(epochs=1, weigh="test_train.half"))


def test_a_restart_may_use_less_memory_but_not_other_data(config, tmp_path):
    """After running out of memory the same command is given again with --checkpointing or --micro-tokens."""
    rows = [{"messages": conversation(random.Random(0), 1)}] * 3
    options = {"data": [write_jsonl(tmp_path / "data", rows)], "epochs": 1, "batch_size": 1, "save_every": 1}
    step = torch.optim.AdamW.step

    def interrupt(optimizer):
        if (Path(config().out) / "checkpoint").exists():
            raise KeyboardInterrupt
        step(optimizer)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", interrupt)
        train.fit(config(**options))
    write_jsonl(tmp_path / "data", rows[:2])
    with pytest.raises(InputError, match="made with data-sha256"):
        train.fit(config(**options))
    write_jsonl(tmp_path / "data", rows)
    summary = train.fit(config(**options, checkpointing=True, micro_tokens=100))
    assert summary["checkpointing"] and summary["micro_tokens"] == 100
    assert [row["step"] for row in read_rows(Path(config().out) / "metrics.jsonl")] == [1, 2, 3]


def test_no_folder_of_another_command_or_model_is_trained_in(config, tiny_tokenizer, tmp_path):
    make_model(tmp_path / "other", tiny_tokenizer)
    before = (tmp_path / "other" / "config.json").read_bytes()
    with pytest.raises(InputError, match="the model in it would be lost"):
        train.fit(config(out=str(tmp_path / "other"), tuning="full"))
    assert (tmp_path / "other" / "config.json").read_bytes() == before
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"tasks": [], "out": "run", "method": "cot"}')
    with pytest.raises(InputError, match="run.json: written by another command"):
        train.fit(config(out=str(tmp_path / "run")))
    with Journal(tmp_path / "busy" / "train.lock"), pytest.raises(InputError, match="another process"):
        train.fit(config(out=str(tmp_path / "busy")))
    assert not (tmp_path / "busy" / "run.json").exists()


def test_a_file_beside_the_checkpoints_is_kept(config):
    folder = Path(config().out) / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "own.txt").touch()
    train.fit(config(epochs=1, save_every=1))
    assert [path.name for path in folder.iterdir()] == ["own.txt"]


def test_an_infinite_gradient_is_not_stored(config):
    """With a finite loss: the weights must not become NaN, in a checkpoint that every restart would load."""

    def infinite(trainer, examples, seed):
        trainer.gradient.fill_(math.inf)
        return 1.0

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="step 1: loss 1.0, gradient norm inf"):
        patch.setattr(train.Trainer, "accumulate", infinite)
        train.fit(config(save_every=1, epochs=1))
    assert not (Path(config().out) / "checkpoint").exists()
    assert math.isfinite(train.fit(config(save_every=1, epochs=1))["loss"])


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"lr": 1e39, "save_every": 1}, "step 1: the weights are no longer finite"),
        ({"tuning": "full", "lr": 1e30, "clip": 1e18}, r"step 2: loss \S+, gradient norm"),
    ],
)
def test_a_diverging_run_stops_with_the_step_and_stores_nothing(config, options, reason):
    with pytest.raises(InputError, match=reason):
        train.fit(config(**options))
    assert not (Path(config().out) / "checkpoint").exists()


def test_the_loss_of_held_out_rows_is_reported_once_per_epoch(config, data_path):
    summary = train.fit(config(validation=[data_path], epochs=2, dropout=0.2))
    rows = read_rows(Path(config().out) / "metrics.jsonl")
    values = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert list(values) == [summary["steps"] // 2, summary["steps"]]
    model, _ = models.load_model(config().out)
    examples = read_examples(config())
    with torch.no_grad():
        total = sum(train.loss_of(model, [example]).item() for example in examples)
    assert values[summary["steps"]] == pytest.approx(total / sum(e.weights.sum().item() for e in examples), rel=1e-5)


def command(config, *options):
    arguments = [*config.data, "--model", config.model, "--out", config.out, "--precision", "fp32"]
    arguments += ["--rank", "4", "--lr", "1e-3", "--batch-size", "2", "--epochs", "2", "--save-every", "2", "--quiet"]
    return [str(ROOT / "train.py"), *arguments, *options]


def run_here(config, *options):
    with pytest.raises(SystemExit) as stop:
        train.main(command(config, *options)[1:])
    assert not stop.value.code


def test_killed_and_started_again_it_ends_bit_for_bit_the_same(config, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_here(config(out=str(straight)))
    rows = killed / "metrics.jsonl"  # of 24 steps
    kill_when(lambda: rows.exists() and rows.read_bytes().count(b"\n") > 10, *command(config(out=str(killed))))
    assert not (killed / "summary.json").exists() and (killed / "checkpoint" / "state.pt").exists()
    run_here(config(out=str(killed)))
    for name in ("metrics.jsonl", "adapter_model.safetensors", "adapter_config.json"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()
    assert not (killed / "checkpoint").exists()


def test_two_processes_train_as_one(config, tmp_path, monkeypatch):
    """As torchrun starts them: the losses and gradient norms of all steps, and the same weights. The last step has one
    example, so one process has none."""
    one, two = config(out=str(tmp_path / "one")), config(out=str(tmp_path / "two"))
    options = ["--epochs", "1", "--batch-size", "23", "--dropout", "0"]
    run_here(one, *options)
    for name, value in {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    other = os.environ | {"RANK": "1", "LOCAL_RANK": "1"}
    with subprocess.Popen([sys.executable, *command(two, *options)], env=other) as process:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("LOCAL_RANK", "0")
        run_here(two, *options)
    assert process.returncode == 0
    for a, b in zip(*(read_rows(Path(folder.out) / "metrics.jsonl") for folder in (one, two)), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["tokens"] == a["tokens"]
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-4)
    assert json.loads((Path(two.out) / "summary.json").read_text())["processes"] == 2
    weights = [load_file(Path(folder.out) / "adapter_model.safetensors") for folder in (one, two)]
    assert max(difference(weights[0][name], weights[1][name]) for name in weights[0]) < 1e-3


# The command line


def test_show_prints_trained_tokens_apart_and_counts(config, tiny_tokenizer, capsys, tmp_path):
    show = train.ShowConfig(data=config().data, model=config().model, example=2)
    train.show(show)
    output = capsys.readouterr().out
    messages = read_rows(config().data[0])[1]["messages"]
    replies = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert [part.split("⟧")[0] for part in output.split("⟦")[1:]] == replies
    _, _, counts = train.read_conversations(tiny_tokenizer, config())
    assert f"trained tokens {counts['trained_tokens']:,}" in output
    assert "every conversation is one example" in output
    show.weigh = "test_train.half"
    train.show(show)
    assert [part.split("⟧")[0] for part in capsys.readouterr().out.split("⟦")[1:]] == ["0.5|" + r for r in replies]


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"data": ["missing.jsonl"]}, "No such file or directory: 'missing.jsonl'"),
        ({"model": "no/such/model/here"}, "model no/such/model/here"),
        ({"model": "/no/such/folder"}, "model /no/such/folder: no such folder"),
        ({"system_prompt": "missing.txt"}, "No such file or directory: 'missing.txt'"),
        ({"micro_tokens": 0}, "--micro-tokens 0: must be above 0"),
        ({"tuning": "full", "dropout": 0.1}, "--dropout 0.1: it has no effect"),
        ({"model": "adapter", "tuning": "full"}, "is an adapter: train it"),
        ({"model": "adapter", "rank": 8}, "give --rank 4 --alpha 8"),
        ({"model": "adapter", "alpha": 9}, "give --rank 4 --alpha 8"),
        ({"model": "adapter", "out": "adapter"}, "the model in it would be lost"),
        ({"model": "adapter", "out": "base"}, "the model in it would be lost"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(config, adapter, monkeypatch, options, reason):
    (adapter.parent / "base").symlink_to(config().model)
    monkeypatch.chdir(adapter.parent)
    with pytest.raises((InputError, OSError), match=f"^[^\n]*{reason}[^\n]*$"):
        train.fit(config(**options))
    assert not (adapter.parent / "out" / "metrics.jsonl").exists()
