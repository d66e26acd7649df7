"""What one GPU does, beside what was calculated for it without one. Run this on a GPU, and paste back what it prints:

    python bench/gpu.py                 # training, generation, SC-action at the shapes of Qwen2.5 0.5B and 3B
    python bench/gpu.py calculate       # needs no GPU: the memory of training and evaluation, 0.5B to 7B

Weights are random, so nothing is downloaded. `calculate` runs the code of train.py and evaluate.py on PyTorch's meta
device, whose tensors have a size and no contents, and counts the bytes of live tensors. A real GPU needs about 1 GiB
more: its context, cuBLAS, and what its allocator cannot use. Speed is calculated from two rates of the card that are
measured here: the product of two large matrices, and a copy. It is a bound: nothing but products, or nothing but reads.
"""

import contextlib
import dataclasses
import gc
import importlib.metadata
import itertools
import math
import sys
import time
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, Cache, Qwen2Config
from transformers.cache_utils import DynamicLayer
from transformers.integrations import sdpa_attention

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
GIB, META = 2**30, torch.device("meta")
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
    dtype = torch.bfloat16 if device.type == "meta" or uses_bf16("auto", device) else torch.float32
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


# ------------- A GPU that is simulated


class Allocator(TorchDispatchMode):
    """Counts the bytes of live tensors that are made while it is active, in blocks of 512 as PyTorch's allocator does.

    now, peak: bytes. Above `limit` it raises torch.OutOfMemoryError; failures: how often it did.
    """

    def __init__(self, limit=math.inf):
        super().__init__()
        self.limit, self.storages, self.now, self.peak, self.failures = limit, {}, 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with self:  # under inference_mode, compound operations arrive whole
            result = function.decompose(*args, **(kwargs or {}))
        if result is NotImplemented:
            result = function(*args, **(kwargs or {}))
            if not function.is_view:  # a view, of a weight for example, allocates nothing
                for tensor in tree_iter(result):
                    if isinstance(tensor, torch.Tensor):
                        self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key, size = id(storage), -(-storage.nbytes() // 512) * 512
        if key in self.storages and self.storages[key]() is storage:
            return
        if self.now + size > self.limit:
            self.failures += 1
            raise torch.OutOfMemoryError(f"simulated: {self.now:,} bytes are in use, {size:,} more are asked for")
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed(reference):
            self.now -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, freed)


class FlashAttention(torch.autograd.Function):
    """Allocates what PyTorch's flash attention allocates, and computes nothing."""

    @staticmethod
    def forward(ctx, query, key, value):  # (rows, heads, tokens, size), with fewer heads of key and value
        assert query.device == key.device == value.device and query.dtype == key.dtype == value.dtype
        out = query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _, normaliser = ctx.saved_tensors
        grad = grad.contiguous()
        _sums = torch.empty_like(normaliser), query.new_empty(query.shape, dtype=torch.float32)
        gradients = [torch.empty_like(query)]
        for x in (key, value):  # the kernel writes a gradient for each query head; they are added up afterwards
            each = x.new_empty(*x.shape[:2], query.shape[1] // x.shape[1], *x.shape[2:])
            gradients.append(each.sum(2))
        return tuple(gradients)


def attention(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False, dropout_p=0.0):
    if attn_mask is not None:  # the kernel that takes a mask adds it as a bias of the query's type
        attn_mask.to(query.dtype)
    return FlashAttention.apply(query, key, value)


@contextlib.contextmanager
def simulated_gpu(limit=math.inf):
    """On the meta device, train.py and evaluate.py allocate what they would on a GPU. Yields the Allocator."""
    item = torch.Tensor.item
    with (
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
        mock.patch.object(sdpa_attention, "use_gqa_in_sdpa", lambda mask, key, value: mask is None),
        mock.patch.object(models, "check_model", lambda model: model.train()),  # it compares values
        mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda places: None),  # so does this
        mock.patch.object(torch.Tensor, "item", lambda x: 0.0 if x.is_meta else item(x)),
        mock.patch.object(torch, "is_autocast_enabled", lambda kind: False),  # autocast refuses meta tensors; with
        mock.patch.object(torch, "autocast", lambda *_, **options: contextlib.nullcontext()),  # LoRA it is not used
        mock.patch("torch.optim.adam._device_dtype_check_for_fused", lambda *_, **options: None),
        mock.patch.object(torch.cuda, "empty_cache", lambda: None),
        mock.patch.object(torch.cuda, "mem_get_info", lambda _: (allocator.limit - allocator.now, allocator.limit)),
        Allocator(limit) as allocator,
    ):
        yield allocator


def training_memory(shape, count, tokens, limit=math.inf, **options):
    """An optimiser step of `count` examples on a simulated GPU. Returns (peak in bytes, the Trainer)."""
    with simulated_gpu(limit) as gpu:
        trainer = make_trainer(shape, META, **{"micro_tokens": 16384} | options)
        trainer.update(1e-4, 1.0)  # allocates AdamW's moments
        trainer.accumulate(make_examples(count, tokens), 0)
        trainer.update(1e-4, 1.0)
        return gpu.peak, trainer


def evaluation_memory(shape, n, limit, prompts=(320, 970, 1620, 2270, 2920), new=1024):
    """Steps of growing prompts on a simulated GPU. Returns (batch, weights, [(reading, decoding)]).

    In bytes: the weights, and the peaks of each step while prompts are read and while the last tokens are written.
    """
    with simulated_gpu(limit) as gpu, torch.inference_mode():
        peaks = []
        student = evaluate.Student(make_model(shape, META), Letters(), n=n, temperature=0.4 * (n > 1), max_tokens=new)
        weights, gpu.limit = gpu.now, math.inf
        for length in prompts:
            gpu.peak = gpu.now
            caches = [student._read([3] * length)]
            for _ in range(student.batch - 1):  # the others only allocate what the first did
                caches.append(Cache(layers=[DynamicLayer() for _ in caches[0].layers]))
                for layer, read in zip(caches[-1].layers, caches[0].layers, strict=True):
                    layer.update(torch.empty_like(read.keys), torch.empty_like(read.values))
            cache = student._join(caches)
            reading, gpu.peak = gpu.peak, gpu.now
            for layer in cache.layers:
                rows, heads, _, size = layer.keys.shape
                written = layer.keys.new_empty(()).expand(rows, heads, new - 2, size)  # allocates one element
                layer.update(written, written)
            ids = torch.zeros(rows, 1, dtype=torch.int64, device=META)
            mask = torch.ones(rows, 1, 1, length + new - 2, dtype=torch.bool, device=META)
            scores = student.model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[:, -1].float()
            for sample in student.processors:
                sample(ids, scores)
            peaks.append((reading, gpu.peak))
            del cache, scores
        return student.batch, weights, peaks


# ------------- calculate


@dataclasses.dataclass(kw_only=True)
class CalculateConfig:
    shapes: list[str] = option(["0.5b", "1.5b", "3b", "7b"], f"of {', '.join(SHAPES)}")
    cards: list[int] = option([24, 80], "GB of the GPUs")


def calculate(config):
    """Print the peak memory of LoRA training, and the batches that evaluation chooses with their peaks, in GiB."""
    rows = []
    for shape in config.shapes:
        for tokens in (2500, 10240):
            peaks = [training_memory(shape, 1, tokens, checkpointing=on)[0] / GIB for on in (False, True)]
            rows.append([shape, f"{tokens:,}", *(f"{peak:.1f}" for peak in peaks)])
    print("\nTraining, calculated: peak in GiB; LoRA of rank 64, bf16, one example per forward pass\n")
    print(table(["student", "tokens", "without checkpointing", "with"], rows))
    rows = []
    for shape in config.shapes:
        for card, n in itertools.product(config.cards, (1, 8)):
            batch, weights, peaks = evaluation_memory(shape, n, (card - 1) * GIB, (1300, 2250, 3200, 4096))
            peaks = " ".join(f"{max(pair) / GIB:.1f}" for pair in peaks)
            rows.append([shape, f"{card} GB", n, batch, f"{weights / GIB:.1f}", peaks])
    print(
        "\nEvaluation: the batch that is chosen, and the peak in GiB at prompts of 1,300 to 4,096 tokens, calculated\n"
    )
    print(table(["student", "GPU", "N", "batch", "weights", "peak of each step"], rows))


# ------------- measure


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
    """Returns the row of a table: tokens/s and memory, measured and calculated."""

    def run():
        trainer = make_trainer(shape, device, micro_tokens=16384)
        examples = make_examples(8, config.tokens)
        step = lambda: (trainer.accumulate(examples, 0), trainer.update(1e-4, 1.0))  # noqa: E731
        return trainer.model.num_parameters(), 8 * config.tokens / seconds(step, device)

    (parameters, rate), peak = peak_of(device, run)
    # Forward, and the gradient of the activations: 4 operations per weight and token, as LoRA's base is frozen. The
    # head is computed for trained tokens only. Attention's share is below a tenth at this length, and left out.
    width, _, _, _, _, words, tied = SHAPES[shape]
    weights = parameters - words * width * (2 - tied) + TRAINED * words * width
    card = torch.cuda.get_device_properties(device).total_memory - GIB if device.type == "cuda" else math.inf
    memory = training_memory(shape, 8, config.tokens, limit=card)[0]
    return ["training", shape, rate, operations / (4 * weights), peak / GIB, memory / GIB]


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
    token = evaluate.bytes_per_token(student.model)
    reads = weights + count * token * (config.prompt + n * config.new / 2)  # for one token of every sample
    label = f"generation, N = {n}, {count} turns"
    return [label, shape, rate, count * n * bandwidth / reads, peak / GIB, math.nan]


def measure(config):
    """Print versions, the card's rates, and a table of what is measured beside what is calculated."""
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
    head = ["", "shape", "tokens/s", "bound, calculated", "share of it", "peak GiB", "calculated"]
    text = [[a, b, f"{r:,.0f}", f"{c:,.0f}", f"{r / c:.0%}", f"{p:.1f}", f"{m:.1f}"] for a, b, r, c, p, m in rows]
    print(table(head, text).replace("nan", "-"))
    print("\nSC-action beside the authors' way, as bench/evaluate.py measures it:\n")
    shape = "0.5b" if cuda else "small"
    questions_per_hour.bench(questions_per_hour.Config(shape=shape, precision="auto", questions=config.turns))


if __name__ == "__main__":
    run_command_line(
        __doc__, {"measure": (Config, measure), "calculate": (CalculateConfig, calculate)}, default="measure"
    )
