"""Tokens/s and peak memory of train.py beside trl's SFTTrainer with peft: one model, the same trajectories.

    python bench/train.py                                    # CPU: 6 layers of 256 with Qwen2.5's vocabulary
    python bench/train.py --shape 0.5b --length 2500         # one GPU: Qwen2.5-0.5B's shape, random weights

Needs trl, peft and datasets (requirements-dev.txt). Every run is a process of its own, so that its peak memory is its
own. The systems take turns, and the first steps of each are left out. The last line is the ratio to trl's best.
"""

import dataclasses
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from common import option, run_command_line
from common.models import uses_bf16

# Qwen2.5's shapes, from its config.json files, and a small one: width, layers, heads, key-value heads, MLP width.
SHAPES = {"small": (256, 6, 4, 2, 1024), "0.5b": (896, 24, 14, 2, 4864), "1.5b": (1536, 28, 12, 2, 8960)}
BATCH = 8  # conversations per optimiser step
# How trl is run: sequences per forward pass, and whether they are padded or concatenated.
TRL_MODES = {
    "single": {"per_device_train_batch_size": 1},
    "padded": {"per_device_train_batch_size": 4},
    "padding-free": {"per_device_train_batch_size": 4, "padding_free": True},
}
# trl's markers enclose what train.py trains: the content and the end-of-turn token.
TEMPLATE = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}"
    "{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass(kw_only=True)
class Config:
    shape: Literal["small", "0.5b", "1.5b"] = option("small", "of the model")
    tuning: Literal["lora", "full"] = option("lora", "what is trained")
    dropout: float = option(0.05, "of LoRA")
    conversations: int = option(32, f"examples; {BATCH} per optimiser step")
    length: int = option(1329, "tokens per example, on average; they differ by up to a third")
    trained: float = option(0.26, "share of the tokens that are the assistant's")
    warmup: int = option(1, "steps that are left out at the start")
    rounds: int = option(1, "how often the systems take turns")
    trl: list[str] = option(["single"], f"trl's settings, of {', '.join(TRL_MODES)}; none: only train.py")
    precision: Literal["auto", "bf16", "fp32"] = option("auto", "of both")
    micro_tokens: int | None = option(None, "train.py's tokens per forward pass")
    threads: int = option(1, "CPU threads")


def make_setting(config, folder):
    """Write a random model of the shape with a byte-level tokenizer, and trajectories of four steps."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size".split()
    shape = dict(zip(names, SHAPES[config.shape], strict=True)) | {"tie_word_embeddings": True, "vocab_size": 151936}
    shape |= {"max_position_embeddings": 32768, "pad_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**shape)).to(torch.bfloat16).save_pretrained(folder)
    rng = random.Random(0)
    with open(folder / "data.jsonl", "w") as file:
        for _ in range(config.conversations):
            length = config.length * rng.uniform(0.67, 1.33)
            reply, other = int(length * config.trained / 4), int(length * (1 - config.trained) / 5)
            turns = [("system", other), ("user", other)]
            turns += [("assistant", reply), ("user", other)] * 3 + [("assistant", reply)]
            # One letter is one token; the header of a turn takes the tokens of its role and four more.
            messages = [
                {"role": role, "content": "".join(rng.choices(LETTERS, k=max(1, n - len(role) - 4)))}
                for role, n in turns
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


class Stopwatch:
    """The time at which each step starts, after the GPU has finished what was queued before."""

    def __init__(self):
        self.stamps = []

    def stamp(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())


def run_ours(config, folder):
    """Returns (stamps, tokens of each step) of a real run of train.py."""
    watch, accumulate = Stopwatch(), train.Trainer.accumulate

    def timed(*arguments):
        watch.stamp()
        return accumulate(*arguments)

    train.Trainer.accumulate = timed
    names = ("tuning", "dropout", "precision", "micro_tokens")
    options = {name: getattr(config, name) for name in names} | {"batch_size": BATCH, "epochs": 1, "quiet": True}
    data, out = str(folder / "data.jsonl"), tempfile.mkdtemp(dir=folder)
    train.fit(train.Config(data=[data], model=str(folder), out=out, **options))
    watch.stamp()
    return watch.stamps, [json.loads(line)["tokens"] for line in open(Path(out) / "metrics.jsonl")]


def run_trl(config, folder, mode):
    """Returns (stamps, tokens of each step) of trl's SFTTrainer with peft's LoRA of the paper's settings."""
    import peft
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    watch, tokens = Stopwatch(), []
    device, _, _ = train.start()
    bf16 = uses_bf16(config.precision, device)
    arguments = SFTConfig(
        output_dir=str(folder / "trl"), assistant_only_loss=True, num_train_epochs=1, learning_rate=2e-4, bf16=bf16,
        max_length=None, use_cpu=device.type == "cpu", report_to="none", save_strategy="no", logging_strategy="no",
        optim="adamw_torch_fused", disable_tqdm=True, gradient_checkpointing=False,
        gradient_accumulation_steps=BATCH // TRL_MODES[mode]["per_device_train_batch_size"], **TRL_MODES[mode],
    )  # fmt: skip
    lora = {"r": 64, "lora_alpha": 128, "lora_dropout": config.dropout, "target_modules": "all-linear"}

    class Timed(TrainerCallback):
        def on_step_begin(self, *arguments, **options):
            watch.stamp()
            tokens.append(0)

    class Counting(SFTTrainer):
        def training_step(self, model, inputs, *rest):
            ids = inputs["input_ids"]
            tokens[-1] += int(inputs["attention_mask"].sum() if "attention_mask" in inputs else ids.numel())
            return super().training_step(model, inputs, *rest)

    dtype = torch.bfloat16 if bf16 and config.tuning == "lora" else torch.float32
    trainer = Counting(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(folder / "data.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=peft.LoraConfig(**lora, task_type="CAUSAL_LM") if config.tuning == "lora" else None,
        callbacks=[Timed()],
    )
    trainer.train()
    watch.stamp()
    return watch.stamps, tokens


def run_child(system, folder):
    """Run one system once, and print its numbers as JSON."""
    config = Config(**json.loads((Path(folder) / "bench.json").read_text()))
    run = run_ours if system == "train.py" else run_trl
    stamps, tokens = run(config, Path(folder), *([] if system == "train.py" else [system]))
    assert len(stamps) == len(tokens) + 1, (len(stamps), len(tokens))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory
    rate = sum(tokens[config.warmup :]) / (stamps[-1] - stamps[config.warmup])
    print(json.dumps({"rate": rate, "memory": memory, "tokens": sum(tokens)}))


def bench(config):
    """Run the systems in turns and print tokens/s, peak memory and the ratios."""
    systems, results = ["train.py", *config.trl], {}
    with tempfile.TemporaryDirectory() as folder:
        make_setting(config, Path(folder))
        (Path(folder) / "bench.json").write_text(json.dumps(dataclasses.asdict(config)))
        for system in systems * config.rounds:
            environment = os.environ | {"OMP_NUM_THREADS": str(config.threads), "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, __file__, "--child", system, folder]
            output = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
            results.setdefault(system, []).append(json.loads(output.splitlines()[-1]))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {config.threads} thread(s)"
    print(f"{config.shape}, {config.tuning}, {config.precision}, {name}")
    rate, memory = {}, {}
    for system, runs in results.items():
        memory[system] = max(run["memory"] for run in runs)
        rate[system] = max(run["rate"] for run in runs)  # other load slows a run down; nothing makes it faster
        label, gib, tokens = (
            system if system == "train.py" else f"trl {system}",
            memory[system] / 2**30,
            runs[0]["tokens"],
        )
        print(f"{label:>16} {rate[system]:10,.0f} tokens/s, {gib:.2f} GiB, {tokens:,} tokens, {len(runs)} run(s)")
    if config.trl:
        faster = rate["train.py"] / max(rate[system] for system in config.trl)
        smaller = memory["train.py"] / min(memory[system] for system in config.trl)
        print(f"train.py: {faster:.2f} times trl's best tokens/s, {smaller:.2f} times its least memory")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(*sys.argv[2:])
    else:
        run_command_line(__doc__, {"bench": (Config, bench)}, default="bench")
