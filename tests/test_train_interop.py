"""The training room against trl, peft and transformers' Trainer: the same tokens, losses, adapters and logits.

python -m pytest tests/test_train_interop.py        # where trl and peft are installed (requirements-dev.txt)
"""

import json
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from datasets import Dataset  # noqa: E402
from torch.utils.data import SequentialSampler  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

import chat  # noqa: E402
import devices  # noqa: E402
import lora  # noqa: E402
import train  # noqa: E402
from test_train import conversation, make_model, make_tokenizer, write_jsonl  # noqa: E402

# ChatML with trl's markers around the content and the end-of-turn token. (trl's own Qwen2.5 template also trains the
# newlines on both sides, of which the first belongs to the header and the second is never generated.)
MARKED = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}"
    "{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
STEPS, BATCH = 20, 4


class InOrderTrainer(SFTTrainer):
    """Takes the examples as they come, and keeps every step's loss unrounded."""

    def _get_train_sampler(self, *arguments):
        return SequentialSampler(self.train_dataset)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(model folder, data file, conversations, configuration for one pass of 20 steps)"""
    folder = tmp_path_factory.mktemp("interop")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = MARKED
    model = make_model(folder / "model", tokenizer, hidden_size=64)
    rng = random.Random(0)
    conversations = [conversation(rng, rng.randint(1, 4)) for _ in range(STEPS * BATCH)]
    data = write_jsonl(folder / "data.jsonl", [{"messages": messages} for messages in conversations])
    options = {"data": [data], "model": model, "batch_size": BATCH, "epochs": 1, "dropout": 0.0, "rank": 8, "alpha": 16}
    return conversations, options | {"lr": 1e-3, "precision": "fp32", "threads": 1, "quiet": True}


def trl_trainer(model, tokenizer, conversations, folder, lr):
    arguments = SFTConfig(
        output_dir=str(folder),
        assistant_only_loss=True,
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=lr,
        lr_scheduler_type="linear",
        max_length=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"messages": messages} for messages in conversations])
    return InOrderTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)


def in_our_order(conversations, options, out):
    config = train.Config(out=str(out), **options)
    examples, _ = chat.read_examples(config.data, AutoTokenizer.from_pretrained(config.model), config, quiet=True)
    return [conversations[i] for step in chat.plan_steps(examples, config) for i in step]


def our_losses(out):
    return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def test_token_ids_and_mask_are_those_trl_trains(setting, tmp_path):
    conversations, options = setting
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    model = AutoModelForCausalLM.from_pretrained(options["model"])
    trainer = trl_trainer(model, tokenizer, conversations, tmp_path / "trl", 1e-3)
    rows = list(trainer.train_dataset)
    assert len(rows) == len(conversations)
    for row, messages in zip(rows, conversations, strict=True):
        ids, mask = train.encode(tokenizer, messages)
        assert ids == row["input_ids"]
        labels = trainer.data_collator([row])["labels"][0].tolist()
        assert [id if trained else -100 for id, trained in zip(ids, mask, strict=True)] == labels


def test_full_fine_tuning_has_trls_losses(setting, tmp_path):
    conversations, options = setting
    train.fit(train.Config(out=str(tmp_path / "ours"), tuning="full", **options))
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32)
    ordered = in_our_order(conversations, options, tmp_path / "ours")
    trainer = trl_trainer(model, tokenizer, ordered, tmp_path / "trl", options["lr"])
    trainer.train()
    ours = our_losses(tmp_path / "ours")
    assert len(ours) == len(trainer.losses) == STEPS
    assert ours[0] - ours[-1] > 0.3  # it did learn
    assert max(abs(a - b) for a, b in zip(ours, trainer.losses, strict=True)) < 1e-4


def test_lora_has_trls_losses_and_peft_loads_the_result(setting, tmp_path):
    conversations, options = setting
    torch.manual_seed(3)
    start = train.Config(out=str(tmp_path / "unused"), **options)
    student, base = train.build_student(start, devices.Process(), bf16=False)
    lora.save(student.model, tmp_path / "start", base)  # both begin with the same adapter, which PEFT reads from us
    options = options | {"model": str(tmp_path / "start")}
    train.fit(train.Config(out=str(tmp_path / "ours"), **options))

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "start", is_trainable=True)
    ordered = in_our_order(conversations, options | {"model": base}, tmp_path / "ours")
    trainer = trl_trainer(model, tokenizer, ordered, tmp_path / "trl", options["lr"])
    trainer.train()
    ours = our_losses(tmp_path / "ours")
    assert len(ours) == len(trainer.losses) == STEPS
    assert ours[0] - ours[-1] > 0.1
    assert max(abs(a - b) for a, b in zip(ours, trainer.losses, strict=True)) < 1e-4

    ids = torch.arange(40)[None]
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    unmerged, _ = train.load_model(tmp_path / "ours", merge=False)
    torch.testing.assert_close(unmerged(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    merged, _ = train.load_model(tmp_path / "ours")
    torch.testing.assert_close(merged(ids).logits, theirs.merge_and_unload()(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "v_proj"]}])
def test_an_adapter_made_by_peft_loads_here(setting, tmp_path, options):
    base = setting[1]["model"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    config = peft.LoraConfig(**settings | options, init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours, tokenizer = train.load_model(tmp_path / "adapter", merge=False)
    assert tokenizer.chat_template == MARKED
    ids = torch.arange(40)[None]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    lora.save(ours, tmp_path / "again", base)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
