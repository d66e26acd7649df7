"""Training beside trl, peft and transformers' Trainer: the same tokens, losses, adapters and logits.

python -m pytest tests/test_train_interop.py        # where trl and peft are installed (requirements-dev.txt)
"""

import random
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from datasets import Dataset  # noqa: E402
from torch.utils.data import SequentialSampler  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

import train  # noqa: E402
from common import models  # noqa: E402
from conftest import conversation, make_model, make_tokenizer, read_rows, trained_runs, write_jsonl  # noqa: E402

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
    """Takes the examples in their order, and keeps every step's loss unrounded."""

    def _get_train_sampler(self, *arguments):
        return SequentialSampler(self.train_dataset)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(conversations, options of a run of 20 steps)"""
    folder = tmp_path_factory.mktemp("interop")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = MARKED
    model = make_model(folder / "model", tokenizer, hidden_size=64)
    rng = random.Random(0)
    conversations = [conversation(rng, rng.randint(1, 4)) for _ in range(STEPS * BATCH)]
    data = write_jsonl(folder / "data.jsonl", [{"messages": messages} for messages in conversations])
    options = {"data": [data], "model": model, "batch_size": BATCH, "epochs": 1, "lr": 1e-3, "precision": "fp32"}
    return conversations, options | {"quiet": True}


def trl_trainer(model, tokenizer, conversations, folder, lr):
    arguments = SFTConfig(
        output_dir=str(folder), assistant_only_loss=True, per_device_train_batch_size=BATCH, num_train_epochs=1,
        learning_rate=lr, lr_scheduler_type="linear", max_length=None, use_cpu=True, bf16=False, disable_tqdm=True,
        gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1,
    )  # fmt: skip
    rows = Dataset.from_list([{"messages": messages} for messages in conversations])
    return InOrderTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)


def assert_same_logits(one, other):
    """The logits of two models differ by no more than rounding: 1e-5 of the largest."""
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = other(ids).logits
        assert (one(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def compare_losses(model, conversations, options, folder):
    """Train the model, which is the same, here and with trl, on the same conversations in the same order."""
    train.fit(train.Config(out=str(folder / "ours"), **options))
    config = train.Config(out=str(folder / "ours"), **options)
    tokenizer = models.load_tokenizer(config.model)
    steps = train.plan_steps([[messages] for messages in conversations], config)
    ordered = [messages for step in steps for messages in step]
    trainer = trl_trainer(model, tokenizer, ordered, folder / "trl", options["lr"])
    trainer.train()
    ours = [row["loss"] for row in read_rows(folder / "ours" / "metrics.jsonl")]
    assert len(ours) == len(trainer.losses) == STEPS
    assert ours[0] - ours[-1] > 0.1  # the model does learn
    assert max(abs(a - b) for a, b in zip(ours, trainer.losses, strict=True)) < 1e-4


TEMPLATES = {  # trl's copies of published templates, and whether they rewrite earlier turns
    "qwen2_5": False, "llama3_2": False, "phi3": False, "qwen3_instruct_2507": False, "qwen3": True,
    "qwen3_5_think": True, "qwen3_5_nothink": True, "qwen3_6": True, "qwen3_8": True,
}  # fmt: skip


@pytest.mark.parametrize("thinking", [True, False, None])
@pytest.mark.parametrize("name", TEMPLATES)
def test_published_templates_are_trained_as_the_model_is_prompted(name, thinking, monkeypatch):
    file = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = file.read_text()
    tokenizer.bos_token = "<|endoftext|>"
    special = ["<|assistant|>", "<|start_header_id|>", "<|end_header_id|>", "<|end|>", "<|im_start|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    options = {"date_string": "26 Jul 2024"} | ({} if thinking is None else {"enable_thinking": thinking})
    monkeypatch.setattr(models, "TEMPLATE_OPTIONS", options)
    messages = conversation(random.Random(0), 3)
    examples = train.encode(tokenizer, messages)
    if not TEMPLATES[name]:
        assert len(examples) == 1
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i, (before, ids) in zip(turns, trained_runs(examples), strict=True):
        prompt = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, tokenize=False, **options)
        assert before == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        reply = tokenizer.decode(ids)
        whole = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False, **options)
        assert whole.startswith(prompt + reply)  # what the template makes of this turn, up to its end
        end = tokenizer.convert_ids_to_tokens(ids[-1])
        assert end in ("<|im_end|>", "<|eot_id|>", "<|end|>")
        thought = reply.removesuffix(end).rstrip().removesuffix(messages[i]["content"])
        assert thought.replace("<think>", "").replace("</think>", "").strip() == ""


def test_full_fine_tuning_has_trls_losses(setting, tmp_path):
    conversations, options = setting
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32)
    compare_losses(model, conversations, options | {"tuning": "full"}, tmp_path)


def test_lora_has_trls_losses_and_peft_loads_the_result(setting, tmp_path):
    conversations, options = setting
    options = options | {"dropout": 0.0, "rank": 8, "alpha": 16}
    trainer = train.Trainer(train.Config(out="", **options), torch.device("cpu"))
    models.save_lora(trainer.model, tmp_path / "start", trainer.base)  # both begin with the same adapter
    model = AutoModelForCausalLM.from_pretrained(trainer.base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "start", is_trainable=True)
    compare_losses(model, conversations, options | {"model": str(tmp_path / "start")}, tmp_path)

    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    ours, _ = models.load_base(tmp_path / "ours", torch.float32)
    assert_same_logits(ours, theirs)
    merge = {"adapter": str(tmp_path / "ours"), "out": str(tmp_path / "merged"), "dtype": "float32"}
    models.merge_adapter(models.MergeConfig(**merge))
    merged, _ = models.load_model(tmp_path / "merged")
    assert_same_logits(merged, theirs.merge_and_unload())


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "v_proj"]}])
def test_an_adapter_made_by_peft_loads_here(setting, tmp_path, options):
    base = setting[1]["model"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    theirs = peft.get_peft_model(model, peft.LoraConfig(**settings | options, init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours, _ = models.load_base(tmp_path / "adapter", torch.float32)
    assert models.load_tokenizer(tmp_path / "adapter").chat_template == MARKED
    assert_same_logits(ours, theirs)
    models.save_lora(ours, tmp_path / "again", base)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    assert_same_logits(again, theirs)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_of_peft_that_is_more_than_lora_is_refused(setting, tmp_path, options):
    model = AutoModelForCausalLM.from_pretrained(setting[1]["model"], dtype=torch.float32)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    peft.get_peft_model(model, peft.LoraConfig(**settings | options)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(train.InputError, match="not a LoRA weight|plain LoRA"):
        models.load_model(tmp_path / "adapter")
