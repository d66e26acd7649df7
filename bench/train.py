"""Tokens/s and peak memory of train.py beside trl's SFTTrainer with peft: one model, the same trajectories.

    python bench/train.py                                    # CPU: 6 layers of 256 with Qwen2.5's vocabulary
    python bench/train.py --shape 0.5b --length 2500         # one GPU: Qwen2.5-0.5B's shape, random weights

Needs trl, peft and datasets (requirements-dev.txt). Every run is a process of its own, so that peaks are its own; the
systems take turns, and the first steps of each are left out as warm-up. The last lines are the ratios to trl's best.
"""

import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import tokenizers
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import devices
import train
from common import option, run_command_line
from lora import load_tokenizer

# Qwen2.5's shapes, by its config.json files, and a small one.
SHAPES = {
    "small": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 1024},
    "0.5b": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
             "intermediate_size": 4864},
    "1.5b": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
             "intermediate_size": 8960},
    "3b": {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
           "intermediate_size": 11008},
}  # fmt: skip
BATCH = 8  # conversations an optimiser step
# How trl may be fed: sequences at once, and whether they are padded, concatenated or packed.
TRL_MODES = {
    "single": {"per_device_train_batch_size": 1},
    "padded": {"per_device_train_batch_size": 4},
    "padding-free": {"per_device_train_batch_size": 4, "padding_free": True},
}
# trl's markers enclose what train.py trains: the content and the end-of-turn token.
TEMPLATE = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|> assistant ' }}"
    "{%- generation %}{{- m.content + ' <|im_end|>' }}{%- endgeneration %}{{- ' ' }}"
    "{%- else %}{{- '<|im_start|> ' + m.role + ' ' + m.content + ' <|im_end|> ' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|> assistant ' }}{%- endif %}"
)


@dataclasses.dataclass(kw_only=True)
class Config:
    shape: Literal["small", "0.5b", "1.5b", "3b"] = option("small", "of the model")
    vocabulary: int = option(151936, "the model's words: Qwen2.5's number")
    tuning: Literal["lora", "full"] = option("lora", "what is trained")
    conversations: int = option(32, f"examples; {BATCH} an optimiser step")
    length: int = option(1329, "tokens an example, on average; they differ by up to a third")
    trained: float = option(0.26, "share of the tokens that are the assistant's")
    warmup: int = option(1, "steps left out at the start")
    rounds: int = option(1, "how often the systems take turns")
    trl: list[str] = option(["single"], f"trl's settings, of {', '.join(TRL_MODES)}; none: only train.py")
    precision: Literal["auto", "bf16", "fp32"] = option("auto", "of both")
    checkpointing: bool = option(False, "both recompute activations")
    compile: bool = option(False, "train.py compiles the layers")
    micro_tokens: int | None = option(None, "train.py's tokens at once")
    threads: int = option(1, "CPU threads")


def make_setting(config, folder):
    """A random model of the shape, a tokenizer of whole words, and trajectories of four steps."""
    words = [f"w{i}" for i in range(2000)]
    vocabulary = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "system", "user", "assistant", *words]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<|endoftext|>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = SHAPES[config.shape] | {"tie_word_embeddings": True, "vocab_size": config.vocabulary, "rope_theta": 1e6}
    shape |= {"max_position_embeddings": 32768, "pad_token_id": 0, "eos_token_id": 2}
    Qwen2ForCausalLM(Qwen2Config(**shape)).to(torch.bfloat16).save_pretrained(folder)
    rng = random.Random(0)
    with open(folder / "data.jsonl", "w") as file:
        for _ in range(config.conversations):
            length = config.length * rng.uniform(0.67, 1.33)
            reply, other = int(length * config.trained / 4), int(length * (1 - config.trained) / 5)
            turns = [("system", other), ("user", other)]
            turns += [("assistant", reply), ("user", other)] * 3 + [("assistant", reply)]
            messages = [{"role": role, "content": " ".join(rng.choices(words, k=n - 3))} for role, n in turns]
            file.write(json.dumps({"messages": messages}) + "\n")


class Stopwatch:
    """The time at which each step begins, after what the GPU was given before is done."""

    def __init__(self):
        self.stamps = []

    def stamp(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())


def run_ours(config, folder):
    """(stamps, tokens of each step) of a real run of train.py."""
    watch, accumulate = Stopwatch(), train.accumulate

    def timed(*arguments):
        watch.stamp()
        return accumulate(*arguments)

    train.accumulate = timed
    options = {name: getattr(config, name) for name in ("tuning", "precision", "checkpointing", "compile", "threads")}
    data, out = str(folder / "data.jsonl"), tempfile.mkdtemp(dir=folder)
    options |= {"micro_tokens": config.micro_tokens, "batch_size": BATCH, "epochs": 1, "quiet": True}
    train.fit(train.Config(data=[data], model=str(folder), out=out, **options))
    watch.stamp()
    return watch.stamps, [json.loads(line)["tokens"] for line in open(Path(out) / "metrics.jsonl")]


def run_trl(config, folder, mode):
    """(stamps, tokens of each step) of trl's SFTTrainer with peft's LoRA of the paper's settings."""
    import peft
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    watch, process = Stopwatch(), devices.Process(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_num_threads(config.threads)
    bf16 = devices.uses_bf16(config, process.device)
    dtype = torch.bfloat16 if bf16 and config.tuning == "lora" else torch.float32
    options = TRL_MODES[mode] | {"bf16": bf16, "gradient_checkpointing": config.checkpointing}
    options["gradient_accumulation_steps"] = BATCH // options["per_device_train_batch_size"]
    arguments = SFTConfig(
        output_dir=str(folder / "trl"), assistant_only_loss=True, num_train_epochs=1, learning_rate=2e-4,
        max_length=None, use_cpu=process.device.type == "cpu", report_to="none", save_strategy="no",
        logging_strategy="no", optim="adamw_torch_fused", disable_tqdm=True, **options,
    )  # fmt: skip
    lora = peft.LoraConfig(r=64, lora_alpha=128, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    tokens = []

    class Timed(TrainerCallback):
        def on_step_begin(self, *arguments, **options):
            watch.stamp()
            tokens.append(0)

    class Counting(SFTTrainer):
        def training_step(self, model, inputs, *rest):
            ids = inputs["input_ids"]
            real = inputs["attention_mask"].sum() if "attention_mask" in inputs else ids.numel()
            tokens[-1] += int(real)
            return super().training_step(model, inputs, *rest)

    trainer = Counting(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(folder / "data.jsonl"), split="train"),
        processing_class=load_tokenizer(folder),
        peft_config=lora if config.tuning == "lora" else None,
        callbacks=[Timed()],
    )
    trainer.train()
    watch.stamp()
    return watch.stamps, tokens


def run_child(system, folder):
    """One system, once; prints its numbers as JSON."""
    folder = Path(folder)
    config = Config(**json.loads((folder / "bench.json").read_text()))
    stamps, tokens = run_ours(config, folder) if system == "train.py" else run_trl(config, folder, system)
    assert len(stamps) == len(tokens) + 1, (len(stamps), len(tokens))
    seconds = stamps[-1] - stamps[config.warmup]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory = devices.peak_memory(device)
    print(json.dumps({"rate": sum(tokens[config.warmup :]) / seconds, "memory": memory, "tokens": sum(tokens)}))


def bench(config):
    """Run the systems in turns and print tokens/s, peak memory and the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_setting(config, folder)
        (folder / "bench.json").write_text(json.dumps(dataclasses.asdict(config)))
        systems, results = ["train.py", *config.trl], {}
        for _ in range(config.rounds):
            for system in systems:
                environment = os.environ | {"OMP_NUM_THREADS": str(config.threads), "HF_HUB_OFFLINE": "1"}
                command = [sys.executable, __file__, "--child", system, str(folder)]
                output = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
                results.setdefault(system, []).append(json.loads(output.splitlines()[-1]))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {config.threads} thread(s)"
    tokens = results["train.py"][0]["tokens"]
    print(f"{config.shape}, {config.vocabulary:,} words, {config.tuning} {config.precision}, {tokens:,} tokens; {name}")
    rate, memory = {}, {}
    for system in systems:
        rates, memory[system] = [run["rate"] for run in results[system]], max(run["memory"] for run in results[system])
        rate[system] = max(rates)  # a busy machine slows a run down, and nothing speeds it up
        label = system if system == "train.py" else f"trl {system}"
        spread = f"(runs {min(rates):,.0f} to {max(rates):,.0f})"
        print(f"{label:>16} {rate[system]:12,.0f} tokens/s {spread} {memory[system] / 2**30:.2f} GiB")
    if config.trl:
        faster = rate["train.py"] / max(rate[system] for system in config.trl)
        smaller = memory["train.py"] / min(memory[system] for system in config.trl)
        print(f"train.py: {faster:.2f} times trl's best tokens/s, {smaller:.2f} times its least memory")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(*sys.argv[2:])
    else:
        run_command_line(__doc__, {"bench": (Config, bench)}, default="bench")
