"""What one GPU does, beside a bound that is calculated from two rates of the card. Run this on a GPU:

    python bench/gpu.py                 # training, generation, SC-action at the shapes of Qwen2.5 0.5B and 3B

Weights are random, so nothing is downloaded. The two rates are measured here: the product of two large matrices, and a
copy. The bound is a step of nothing but products (training), or of nothing but reads (generation).
"""

import dataclasses
import gc
import importlib.metadata
import math
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import train
from agent_distill import Turn
from bench import evaluate as questions_per_hour
from common import InputError, models, option, run_command_line
from common.models import choose_device, uses_bf16
from common.report import table

# Qwen2.5's shapes, from its config.json files: width, layers, heads, key-value heads, MLP width, vocabulary, tied head
SHAPES = {
    "small": (64, 2, 4, 2, 128, 512, True),
    "0.5b": (896, 24, 14, 2, 4864, 151936, True),
    "1.5b": (1536, 28, 12, 2, 8960, 151936, True),
    "3b": (2048, 36, 16, 2, 11008, 151936, True),
    "7b": (3584, 28, 28, 4, 18944, 152064, False),
}
GIB = 2**30
TRAINED = 0.26  # share of a trajectory's tokens that are the assistant's


def make_model(shape, device, dtype=torch.bfloat16):
    """Returns a Qwen2 model of random weights. Large embeddings make it as sure of its words as a trained model is."""
    if shape not in SHAPES:
        raise InputError(f"--shapes {shape}: choose from {', '.join(SHAPES)}")
    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"
    options = dict(zip([*names.split(), "tie_word_embeddings"], SHAPES[shape], strict=True))
    config = Qwen2Config(**options, max_position_embeddings=32768, initializer_range=0.2, eos_token_id=2)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_trainer(shape, device, **options):
    """Returns a train.Trainer of a random model with the paper's LoRA."""
    dtype = torch.bfloat16 if uses_bf16("auto", device) else torch.float32
    config = train.Config(data=[], model="random weights", out="", precision="fp32", **options)
    with mock.patch.object(models, "load_base", lambda *_: (make_model(shape, device, dtype), "random weights")):
        return train.Trainer(config, device)


def make_examples(count, tokens):
    weights = (torch.arange(tokens) >= round((1 - TRAINED) * tokens)).float()
    return [train.Example(torch.randint(3, 259, (tokens,)), weights) for _ in range(count)]


class Letters:
    """A tokenizer in which every letter is a token. It prints nothing."""

    eos_token_id, pad_token_id = 2, 0

    def apply_chat_template(self, messages, **options):
        return "".join(message["content"] for message in messages)

    def __call__(self, text, **options):
        return {"input_ids": list(text.encode())}

    def decode(self, ids, **options):
        return ""


@dataclasses.dataclass(kw_only=True)
class Config:
    shapes: list[str] = option(["0.5b", "3b"], f"of {', '.join(SHAPES)}")
    tokens: int = option(2500, "tokens per training example; 8 examples per step")
    prompt: int = option(2000, "tokens per prompt")
    new: int = option(128, "new tokens per answer")
    turns: int = option(64, "turns answered at once")


def seconds(function, device, rounds=3):
    """Returns the seconds of one call, the mean over rounds, after a call that is not counted."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    function()
    wait()
    started = time.perf_counter()
    for _ in range(rounds):
        function()
    wait()
    return (time.perf_counter() - started) / rounds


def card_rates(device, dtype):
    """Returns (operations per second of a large matrix product, bytes per second of a copy, read and written)."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / seconds(lambda: a @ a, device), 2 * a.nbytes / seconds(a.clone, device)


def peak_of(device, function):
    """Returns (what function returns, the peak of allocated bytes); no peak is known on a CPU."""
    if device.type != "cuda":
        return function(), math.nan
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return function(), torch.cuda.max_memory_allocated(device)


def measure_training(config, shape, device, operations):
    """Returns the row of a table: tokens/s, its bound, and the peak of memory."""

    def run():
        trainer = make_trainer(shape, device, micro_tokens=16384)
        examples = make_examples(8, config.tokens)
        step = lambda: (trainer.accumulate(examples, 0), trainer.optimizer.step())  # noqa: E731
        return trainer.model.num_parameters(), 8 * config.tokens / seconds(step, device)

    (parameters, rate), peak = peak_of(device, run)
    # Forward, and the gradient of the activations: 4 operations per weight and token, as LoRA's base is frozen. The
    # head is computed for trained tokens only. Attention's share is below a tenth at this length, and left out.
    width, _, _, _, _, words, tied = SHAPES[shape]
    weights = parameters - words * width * (2 - tied) + TRAINED * words * width
    return ["training", shape, rate, operations / (4 * weights), peak / GIB]


def measure_generation(config, shape, device, n, bandwidth):
    def run():
        dtype = torch.bfloat16 if uses_bf16("auto", device) else torch.float32
        options = {"n": n, "temperature": 0.4 * (n > 1), "max_tokens": config.new}
        student = evaluate.Student(make_model(shape, device, dtype), Letters(), **options)
        count, tokens = min(config.turns, student.batch), 0
        turns = [Turn([{"role": "user", "content": f"{i:04}" + "x" * (config.prompt - 4)}]) for i in range(count)]

        def answer():
            nonlocal tokens
            tokens = sum(answer.completion_tokens for answer in student.answer(turns))

        taken = seconds(answer, device, rounds=1)
        return tokens / taken, student, count, sum(p.nbytes for p in student.model.parameters())

    (rate, student, count, weights), peak = peak_of(device, run)
    _, layers, heads, groups, *_ = SHAPES[shape]
    token = 4 * layers * groups * SHAPES[shape][0] // heads  # bytes of its keys and values, in bf16
    reads = weights + count * token * (config.prompt + n * config.new / 2)  # for one token of every sample
    label = f"generation, N = {n}, {count} turns"
    return [label, shape, rate, count * n * bandwidth / reads, peak / GIB]


def measure(config):
    """Print versions, the card's rates, and a table of what is measured beside its bound."""
    device = choose_device()
    dtype = torch.bfloat16 if uses_bf16("auto", device) else torch.float32
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    size = f"{torch.cuda.get_device_properties(device).total_memory / GIB:.1f} GiB" if cuda else ""
    print(f"{', '.join(versions)}, CUDA {torch.version.cuda}, {name} {size}, {dtype}")
    operations, bandwidth = card_rates(device, dtype)
    print(f"matrix product {operations / 1e12:,.1f} Top/s, copy {bandwidth / 1e9:,.0f} GB/s\n")
    rows = []
    for shape in config.shapes:
        rows.append(measure_training(config, shape, device, operations))
        gc.collect()
        for n in (1, 8):
            rows.append(measure_generation(config, shape, device, n, bandwidth))
            gc.collect()
    head = ["", "shape", "tokens/s", "bound, calculated", "share of it", "peak GiB"]
    text = [[a, b, f"{r:,.0f}", f"{c:,.0f}", f"{r / c:.0%}", f"{p:.1f}"] for a, b, r, c, p in rows]
    print(table(head, text).replace("nan", "-"))
    print("\nSC-action beside the authors' way, as bench/evaluate.py measures it:\n")
    shape = "0.5b" if cuda else "small"
    questions_per_hour.bench(questions_per_hour.Config(shape=shape, precision="auto", questions=config.turns))


if __name__ == "__main__":
    run_command_line(__doc__, {"measure": (Config, measure)}, default="measure")
