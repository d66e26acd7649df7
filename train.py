"""Fine-tune a student on a teacher's conversations: the loss of Eq. 2 (reasoning) and Eq. 4 (agent distillation).

    python train.py trajectories.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --out student        # the paper's settings
    python train.py show trajectories.jsonl --model Qwen/Qwen2.5-0.5B-Instruct                 # what is trained
    python train.py merge student --out student-merged                                         # adapter -> full model
    torchrun --nproc-per-node 8 train.py trajectories.jsonl --model ... --out ... [--parallel fsdp]

Both equations are one loss, -sum log p(token | everything before it) over the assistant's tokens. In Eq. 2 these are
the chain of thought and the answer; in Eq. 4 the thoughts and actions (r_t, a_t) of every step. Questions and
observations o_t are read by the student and never trained: they are the environment's words, not the teacher's.

Data are JSONL files (several may be given; .gz is read too) of rows
    {"messages": [{"role", "content"}, ...]}        conversations, the project's trajectories among them
    {"log_data": {"messages": [...]}}               the authors' published trajectories, converted on reading
    {"input_ids": [...], "loss_mask": [0, 1, ...]}  tokens; a 1 marks a token to be trained
A killed run continues from its last checkpoint when the same command is given again, bit for bit on a CPU.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

import lora
from common import (
    REQUIRED,
    InputError,
    Journal,
    keep_config,
    option,
    parse_object,
    progress,
    read_jsonl,
    replace_file,
    run_command_line,
    write_json,
)


@dataclasses.dataclass(kw_only=True)
class DataConfig:
    data: list[str] = option(REQUIRED, "JSONL files of conversations", positional=True)
    model: str = option(REQUIRED, "a Hugging Face name or folder, or an adapter's folder to continue from")
    system_prompt: str | None = option(
        None, "file whose text replaces every system message (the paper gives the student a shorter one)"
    )
    max_length: int = option(10240, "longest example in tokens (paper: 10,240 for agent data, 4,096 for CoT)")
    overlong: Literal["drop", "cut", "error"] = option(
        "drop", "a longer example is dropped, cut after its last whole assistant turn, or an error; it is counted"
    )


@dataclasses.dataclass(kw_only=True)
class Config(DataConfig):
    """Defaults are the paper's; where it is silent, Hugging Face's, which the authors' script leaves in force."""

    out: str = option(REQUIRED, "folder for the adapter or model")
    tuning: Literal["lora", "full"] = option("lora", "train low-rank adapters (paper) or all weights")
    rank: int = option(64, "LoRA: rank (paper)")
    alpha: float = option(128, "LoRA: alpha (paper)")
    dropout: float = option(0.05, "LoRA: dropout on the adapters' input (paper)")
    lr: float = option(2e-4, "learning rate (paper)")
    schedule: Literal["linear", "cosine", "constant"] = option("linear", "learning rate after warm-up (HF default)")
    warmup_steps: int = option(0, "steps of linear warm-up (HF default)")
    epochs: int = option(2, "passes over the data (paper)")
    batch_size: int = option(8, "conversations an optimiser step (paper)")
    batch_tokens: int | None = option(None, "tokens an optimiser step, at most, in place of --batch-size")
    micro_tokens: int | None = option(None, "tokens at once on one device (default: 16,384 on a GPU, 2,048 on a CPU)")
    beta2: float = option(0.999, "AdamW's second moment (HF default)")
    weight_decay: float = option(0.0, "AdamW's decay of the weight matrices (HF default)")
    clip: float = option(1.0, "largest gradient norm (HF default)")
    seed: int = option(42, "data order, adapter initialisation, dropout (the authors' value)")
    precision: Literal["auto", "bf16", "fp32"] = option(
        "auto", "bf16 autocast (paper), where the hardware has instructions for it, over float32 trained weights"
    )
    parallel: Literal["ddp", "fsdp"] = option("ddp", "under torchrun: a copy of the model each, or its shards")
    checkpointing: bool = option(False, "recompute activations in the backward pass: slower, much less memory")
    compile: bool = option(False, "torch.compile the layers")
    save_every: int = option(100, "steps between checkpoints to resume from")
    validation: list[str] = option([], "JSONL files whose loss is measured, never trained")
    val_every: int | None = option(None, "steps between validations (default: only at the end)")
    threads: int | None = option(None, "CPU threads (default: torch's choice)")
    quiet: bool = option(False, "no progress bar and no summary")


# Conversations: which tokens there are, and which of them are trained.

# Llama 3's template prints today's date unless it is told one: then today's model would not be tomorrow's.
TEMPLATE_OPTIONS = {"date_string": "26 Jul 2024"}
ROLES = {"tool-response": "user", "tool": "user"}


def render(tokenizer, messages, reply=False):
    """The conversation as the model reads it. reply: with the header of the assistant's next turn."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply, **TEMPLATE_OPTIONS)


def encode(tokenizer, messages):
    """(ids, mask), two lists of equal length: mask 1 where the token is the assistant's, 0 where it is context.

    The assistant's tokens are those that the student will have to produce: what follows the context that it is
    shown at inference, which is the conversation so far, rendered with the header of its next turn and tokenised
    whole, up to and including the end-of-turn token (without it the student would not learn to stop). Every such
    context is rendered and tokenised here too, and must be a prefix of the whole conversation, in text and in
    tokens; so the mask needs no template markers and cannot differ from inference. Tokenising prefixes is quadratic
    in the number of turns, which costs little (about thrice one tokenisation for five turns). Tokenising each turn
    on its own would be linear but could split the text at the seams as inference never sees it.

    Raises InputError if the template rewrites earlier turns (as templates that strip thinking do), if a token
    reaches across the start of a turn, if a turn has no end token, or if nothing is the assistant's.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise InputError("nothing to train on: no message has the role assistant")
    whole = render(tokenizer, messages)
    contexts = [render(tokenizer, messages[:i], reply=True) for i in turns]
    for i, context in zip(turns, contexts, strict=True):
        if not whole.startswith(context):
            raise InputError(
                f"messages[{i}]: the chat template shows the {i} messages before it differently once the conversation "
                "goes on, so training and inference would differ; use a template that keeps earlier turns unchanged"
            )
        if not whole[len(context) :].lstrip().startswith(messages[i]["content"].strip()):
            raise InputError(f"messages[{i}]: the chat template does not print this turn's content as it is")
    ids, *context_ids = tokenizer([whole, *contexts], add_special_tokens=False)["input_ids"]
    ends = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    mask = [0] * len(ids)
    for i, prefix in zip(turns, context_ids, strict=True):
        start = len(prefix)
        if ids[:start] != prefix:
            raise InputError(f"messages[{i}]: a token reaches across the start of this turn; strip leading whitespace")
        end = next((n for n in range(start, len(ids)) if ids[n] in ends), None)
        if end is None:
            raise InputError(f"messages[{i}]: the chat template ends the assistant's turn without a special token")
        if tokenizer.convert_ids_to_tokens(ids[end]) in messages[i]["content"]:
            raise InputError(f"messages[{i}]: the content contains the special token of a turn's end")
        mask[start : end + 1] = [1] * (end + 1 - start)
    return ids, mask


def published_messages(messages):
    """The authors' logged messages (smolagents 1.13) as a chat: their preprocessing, but for the system prompt.

    Content is a list of text parts; "tool-call" repeats the code of the assistant's message and goes; "tool-response"
    is the user's turn and loses its "Call id:" line; neighbours of one role (logs, then an error) become one turn;
    references in the question and what follows the last assistant turn go.
    """
    chat = []
    for message in messages:
        role, content = message["role"].removeprefix("MessageRole.").lower().replace("_", "-"), message["content"]
        if role == "tool-call":
            continue
        if isinstance(content, list):
            content = "\n".join(part["text"] for part in content)
        if role == "tool-response":
            role, content = "user", re.sub(r"^Call id: .*\n", "", content)
        if chat and chat[-1]["role"] == role:
            chat[-1]["content"] += "\n" + content
        else:
            chat.append({"role": role, "content": content})
    for message in [m for m in chat if m["role"] == "user"][:1]:
        message["content"] = re.sub(r"<reference>.*?</reference>", "", message["content"], flags=re.DOTALL)
    while chat and chat[-1]["role"] == "user":
        chat.pop()
    return chat


def encode_row(tokenizer, row, system_prompt=None):
    """(ids, mask) of one row of any kind; InputError, without the place, for what cannot be trained on."""
    if "input_ids" in row:
        ids, mask = row["input_ids"], row.get("loss_mask")
        if not isinstance(mask, list) or len(mask) != len(ids) or not set(mask) <= {0, 1}:
            raise InputError("loss_mask must be a list of 0 and 1, as long as input_ids")
        return ids, mask
    try:
        messages = row["messages"] if "messages" in row else published_messages(row["log_data"]["messages"])
        messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    except (KeyError, TypeError, AttributeError):
        raise InputError('expected {"messages": [{"role", "content"}, ...]}, log_data.messages or input_ids') from None
    if not all(isinstance(message["content"], str) for message in messages):
        raise InputError("the content of a message must be text")
    if system_prompt is not None:
        messages = [m for m in messages if m["role"] != "system"]
        messages.insert(0, {"role": "system", "content": system_prompt})
    return encode(tokenizer, messages)


@dataclasses.dataclass
class Example:
    ids: torch.Tensor  # (tokens,) int64
    trained: torch.Tensor  # (trained tokens,) int64: the places in ids of the tokens in the loss


def read_examples(paths, tokenizer, config, quiet=False):
    """All examples of the files, and what became of the rows: (list of Example, {"examples", "tokens", ...})."""
    system_prompt = None
    if config.system_prompt:
        try:
            system_prompt = Path(config.system_prompt).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise InputError(f"{config.system_prompt}: {error.strerror}") from None
    examples, dropped, cut = [], 0, 0
    for path in paths:
        for number, row in progress(read_jsonl(path), desc=f"reading {Path(path).name}", unit=" rows", quiet=quiet):
            try:
                ids, mask = encode_row(tokenizer, row, system_prompt)
                ids, mask = torch.tensor(ids), torch.tensor(mask)
                if len(ids) > config.max_length:
                    if config.overlong == "error":
                        raise InputError(f"{len(ids)} tokens, more than --max-length {config.max_length}")
                    # A turn is cut off whole: half a reply would teach the student to stop anywhere.
                    ends = (mask[: config.max_length] > mask[1 : config.max_length + 1]).nonzero()
                    if config.overlong == "drop" or len(ends) == 0:
                        dropped += 1
                        continue
                    cut += 1
                    ids, mask = ids[: ends[-1] + 1], mask[: ends[-1] + 1]
                trained = mask[1:].nonzero().flatten() + 1  # nothing comes before the first token to predict it from
                if len(trained) == 0:
                    raise InputError("nothing to train on: no token is marked")
            except InputError as error:
                raise InputError(f"{path}:{number}: {error}") from None
            examples.append(Example(ids, trained))
    if not examples:
        raise InputError(f"{', '.join(paths)}: no example is left to train on ({dropped} were too long)")
    lengths = [len(example.ids) for example in examples]
    counts = {
        "examples": len(examples),
        "tokens": sum(lengths),
        "trained_tokens": sum(len(example.trained) for example in examples),
        "longest": max(lengths),
        "overlong_dropped": dropped,
        "overlong_cut": cut,
    }
    return examples, counts


def plan_steps(examples, config):
    """The examples of every optimiser step, as lists of their places: a function of the data and the seed alone."""
    steps = []
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(config.seed + epoch)
        step, tokens = [], 0
        for i in torch.randperm(len(examples), generator=generator).tolist():
            length = len(examples[i].ids)
            full = tokens + length > config.batch_tokens if config.batch_tokens else len(step) == config.batch_size
            if step and full:
                steps.append(step)
                step, tokens = [], 0
            step.append(i)
            tokens += length
        steps.append(step)
    return steps


def split_step(examples, micro_tokens, processes):
    """One step's examples as micro-batches of at most micro_tokens (or one example): a list for each process.

    All processes get equally many, since each pass is a collective under FSDP; an empty one fills up.
    """
    micro_batches = []
    for example in sorted(examples, key=lambda example: len(example.ids)):
        if micro_batches and sum(len(e.ids) for e in micro_batches[-1]) + len(example.ids) <= micro_tokens:
            micro_batches[-1].append(example)
        else:
            micro_batches.append([example])
    while len(micro_batches) % processes:
        micro_batches.append([])
    return [micro_batches[rank::processes] for rank in range(processes)]


# The student: a model whose forward pass is the loss.


class PackedAttention:
    """Causal attention in which examples laid end to end do not see each other, without padding or a mask.

    All other layers work token by token, so they take the packed sequence as it is; here it is taken apart and
    each example attends to itself, with PyTorch's fused kernel. That is exact and needs no package.
    """

    lengths = None  # of the examples in the batch; None: the batch is one sequence

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **options):
        # query (1, heads, tokens, size); key and value may have fewer heads
        if any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
            raise InputError("this architecture's attention is not a plain softmax; it cannot be trained here")
        window, longest = options.get("sliding_window"), max(self.lengths)
        if window is not None and longest > window:
            raise InputError(f"an example of {longest} tokens is longer than the model's window of {window}")
        groups = key.shape[1] != query.shape[1]
        query, key = query.to(value.dtype), key.to(value.dtype)
        outputs = [
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=groups)
            for q, k, v in zip(*(x.split(self.lengths, dim=2) for x in (query, key, value)), strict=True)
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2), None  # (1, tokens, heads, size)


packed_attention = PackedAttention()
AttentionInterface.register("packed", packed_attention)


class HeadLoss(torch.autograd.Function):
    """sum of -log softmax(hidden W^T)[target], with its gradients, a chunk of positions at a time.

    With 152,000 words the logits are the largest tensor of all by far: a chunk's logits become its gradients in
    place and are gone before the next chunk's are made.
    """

    CHUNK = 2**26  # logits at once: 256 MiB in float32

    @staticmethod
    def forward(ctx, hidden, weight, targets, with_gradients):
        # hidden (n, size), weight (words, size), targets (n,) -> ()
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = hidden.to(dtype or hidden.dtype), weight.to(dtype or weight.dtype)
            loss = torch.zeros((), device=hidden.device)
            grad_hidden = torch.empty_like(h) if with_gradients else None
            grad_weight = (
                torch.zeros_like(weight, dtype=torch.float32) if with_gradients and weight.requires_grad else None
            )
            size = max(1, HeadLoss.CHUNK // len(w))
            for start in range(0, len(h), size):
                rows = slice(start, start + size)
                target = targets[rows, None]
                logits = (h[rows] @ w.T).float()  # (chunk, words)
                normaliser = logits.logsumexp(dim=1, keepdim=True)
                loss += (normaliser - logits.gather(1, target)).sum()
                if with_gradients:
                    gradient = logits.sub_(normaliser).exp_()  # d loss / d logits = softmax - one-hot
                    gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=gradient.dtype))
                    gradient = gradient.to(h.dtype)
                    torch.mm(gradient, w, out=grad_hidden[rows])
                    if grad_weight is not None:
                        grad_weight += gradient.T @ h[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, None if grad_weight is None else grad_weight * grad_loss, None, None


class Student(nn.Module):
    """The model with its loss: forward(micro-batch) -> sum over the trained tokens of -log p(token | before it)."""

    def __init__(self, model):
        super().__init__()
        model.set_attn_implementation("packed")
        self.model = model

    def forward(self, examples):
        device = self.model.device
        packed_attention.lengths = [len(example.ids) for example in examples] or [1]
        ids = torch.cat([example.ids for example in examples] or [torch.zeros(1, dtype=torch.int64)])  # (tokens,)
        positions = torch.cat([torch.arange(length) for length in packed_attention.lengths])  # (tokens,)
        starts = torch.tensor([0, *packed_attention.lengths]).cumsum(0).tolist()
        trained = [start + example.trained for start, example in zip(starts, examples, strict=False)]
        trained = torch.cat(trained or [torch.zeros(0, dtype=torch.int64)])
        targets, trained = ids[trained].to(device), trained.to(device)
        body = self.model.get_decoder()
        hidden = body(
            input_ids=ids[None].to(device), position_ids=positions[None].to(device), use_cache=False
        ).last_hidden_state[0]  # (tokens, size)
        # The state at t predicts the token at t + 1. Only where that one is trained is the head computed.
        head = self.model.get_output_embeddings()
        return HeadLoss.apply(hidden[trained - 1], head.weight, targets, torch.is_grad_enabled())


# Models: read, and written so that transformers, PEFT and vLLM read them.


def from_pretrained(kind, name, **options):
    """AutoTokenizer or AutoModelForCausalLM, with one clear line instead of a traceback for a wrong name."""
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name}: {str(error).strip().splitlines()[0]}") from None


def is_adapter(path):
    return (Path(path) / "adapter_config.json").is_file()


def load_tokenizer(path):
    """The tokenizer of a model, or of an adapter: its own if it was saved with one, else its base's."""
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = lora.read_config(path)["base_model_name_or_path"]
    tokenizer = from_pretrained(AutoTokenizer, path)
    if not tokenizer.chat_template:
        tokenizer.chat_template = None
    return tokenizer


def load_model(path, device="cpu", dtype=torch.float32, merge=True):
    """(model in evaluation mode, tokenizer) of a Hugging Face name or folder, or of a LoRA adapter's folder.

    An adapter (ours or PEFT's) is put onto the base model that it names, and folded into the weights if merge.
    """
    base = lora.read_config(path)["base_model_name_or_path"] if is_adapter(path) else path
    tokenizer = load_tokenizer(path)
    model = from_pretrained(AutoModelForCausalLM, base, dtype=dtype)
    if is_adapter(path):
        lora.load(model, path)
        if merge:
            lora.merge(model)
    return model.to(device).eval(), tokenizer


def whole(tensor):
    """A plain tensor on the CPU, also of one that is sharded over processes (then all of them must call this)."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu()


def save_model(model, tokenizer, config, base, write):
    """The adapter or the model, with tokenizer and chat template. write: False on all processes but one."""
    if config.tuning == "lora":
        lora.save(model, config.out, base, write)
    else:
        tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
        state = {name: whole(tensor) for name, tensor in model.state_dict().items() if name not in tied}
        if write:
            model.save_pretrained(config.out, state_dict=state)
    if write:
        tokenizer.save_pretrained(config.out)


# Training


@dataclasses.dataclass
class Process:
    """Where this process runs: alone, or as one of torchrun's."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self):
        return self.rank == 0


def start_process(config):
    if config.threads:
        torch.set_num_threads(config.threads)
    cuda = torch.cuda.is_available()
    if cuda:
        # The same seed gives the same weights on the GPU too: atomics in the backward kernels would not.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if "LOCAL_RANK" not in os.environ:
        return Process(device=torch.device("cuda" if cuda else "cpu"))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return Process(dist.get_rank(), dist.get_world_size(), device)


def uses_bf16(config, device):
    if config.precision != "auto":
        return config.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without these instructions bf16 is emulated, and slower than float32.
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and any(flag in cpu.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def build_student(config, process, bf16):
    """The student to train, on its device, and the name of its base model."""
    adapter = is_adapter(config.model)
    if adapter and config.tuning == "full":
        raise InputError(f"{config.model} is an adapter: train it with --tuning lora, or merge it first")
    base = lora.read_config(config.model)["base_model_name_or_path"] if adapter else config.model
    # What is trained is float32; a frozen base may be bf16.
    dtype = torch.bfloat16 if bf16 and config.tuning == "lora" else torch.float32
    model = from_pretrained(AutoModelForCausalLM, base, dtype=dtype)
    if adapter:
        lora.load(model, config.model, config.dropout)
    elif config.tuning == "lora":
        lora.add(model, config.rank, config.alpha, config.dropout)
    model.config.use_cache = False
    if config.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    student = Student(model).to(process.device).train()
    if config.compile:
        for layer in model.get_decoder().layers:
            layer.compile(dynamic=True)
    return student, base


def distribute(student, config, process):
    """The student as every process calls it: itself, under DDP, or sharded by FSDP2 (in place)."""
    if process.size == 1:
        return student
    if config.parallel == "ddp":
        return nn.parallel.DistributedDataParallel(student)
    from torch.distributed.fsdp import fully_shard

    for layer in student.model.get_decoder().layers:
        fully_shard(layer)
    return fully_shard(student)


def accumulate(student, micro_batches, trained_tokens, process, bf16):
    """Add up the gradients of one optimiser step; returns its loss, per trained token, a tensor on the device.

    micro_batches: this process's. trained_tokens: of the whole step, on all processes. Every token weighs the same,
    so how a step is cut into micro-batches and processes does not change its gradients.
    """
    loss = torch.zeros((), device=process.device)
    for i, micro_batch in enumerate(micro_batches):
        wait = i + 1 < len(micro_batches) and hasattr(student, "no_sync")  # DDP averages once, at the end
        with student.no_sync() if wait else contextlib.nullcontext():
            with torch.autocast(process.device.type, torch.bfloat16, enabled=bf16):
                part = student(micro_batch) / trained_tokens
            (part * process.size).backward()  # DDP and FSDP average over processes; the sum is wanted
        loss += part.detach()
    if process.size > 1:
        dist.all_reduce(loss)
    return loss


@torch.no_grad()
def validation_loss(student, examples, config, process, bf16):
    """Mean of -log p over the trained tokens of the validation examples."""
    student.eval()
    loss = torch.zeros((), device=process.device)
    for micro_batch in split_step(examples, config.micro_tokens, process.size)[process.rank]:
        with torch.autocast(process.device.type, torch.bfloat16, enabled=bf16):
            loss += student(micro_batch)
    if process.size > 1:
        dist.all_reduce(loss)
    student.train()
    return loss.item() / sum(len(example.trained) for example in examples)


def learning_rate(step, steps, config):
    """The rate of step 0 ... steps - 1: linear warm-up, then as --schedule says, towards 0 after the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.lr * factor[config.schedule]


def make_optimizer(student, config):
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [  # biases and norms are not decayed, as in HF's Trainer
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)


def save_checkpoint(path, step, student, optimizer, fingerprint, write):
    """All that the rest of the run depends on: the order of the data and the dropout follow from seed and step."""
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    moments = {name: {k: whole(v) for k, v in optimizer.state[p].items()} for name, p in named}
    weights = {name: whole(p) for name, p in named}
    if write:
        with replace_file(path, "wb") as file:
            torch.save({"step": step, "data": fingerprint, "weights": weights, "moments": moments}, file)


def load_checkpoint(path, student, optimizer, fingerprint):
    """The number of steps done: 0 if there is no checkpoint."""
    if not path.exists():
        return 0
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint["data"] != fingerprint:
        raise InputError(f"{path} was made with other data: name another --out, or delete {path.parent}")
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.copy_(like(checkpoint["weights"][name], parameter))
            moments = checkpoint["moments"][name]
            optimizer.state[parameter] = {
                key: value if key == "step" else like(value, parameter) for key, value in moments.items()
            }
    return checkpoint["step"]


def like(value, parameter):
    """A whole tensor, placed on the parameter's device and sharded as the parameter is."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)


def peak_memory(device):
    """Bytes: of the GPU's memory, or of this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Log:
    """metrics.jsonl, a row a step. A row is written one step late, so that nothing waits for the device."""

    def __init__(self, path, done, write):
        self.journal, self.rows, self.waiting, self.text = None, [], [], ""
        if write:
            if path.exists():  # rows of steps after the checkpoint will be made again
                with Journal(path) as journal:
                    self.rows = [row for row in journal.rows if row["step"] <= done]
                with replace_file(path) as file:
                    file.writelines(json.dumps(row) + "\n" for row in self.rows)
            self.journal = Journal(path)

    def add(self, row):
        self.waiting.append(row)
        self.flush(keep=1)

    def flush(self, keep=0):
        while len(self.waiting) > keep:
            row = self.waiting.pop(0)
            norm = row["gradient_norm"]
            row["gradient_norm"] = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
            row["loss"] = row["loss"].item()
            if not math.isfinite(row["loss"]):
                raise InputError(f"the loss is {row['loss']} at step {row['step']}; a lower --lr may help")
            self.text = f"loss {row['loss']:.4f}"
            self.rows.append(row)
            if self.journal:
                self.journal.append(row)


def data_fingerprint(examples):
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.ids.numpy().tobytes() + example.trained.numpy().tobytes())
    return digest.hexdigest()


def fit(config):
    """Fine-tune a model on conversations (the default command)."""
    process = start_process(config)
    out, quiet = Path(config.out), config.quiet or not process.first
    if process.first:
        keep_config(out / "run.json", config, may_change=("save_every", "threads", "quiet"))
    if (out / "summary.json").exists():
        summary = parse_object((out / "summary.json").read_bytes(), f"{out}/summary.json")
        if not quiet:
            print(f"{out} is finished: loss {summary['loss']:.4f}", file=sys.stderr)
        return summary
    config = dataclasses.replace(config)
    config.micro_tokens = config.micro_tokens or (16384 if process.device.type == "cuda" else 2048)
    bf16 = uses_bf16(config, process.device)

    tokenizer = load_tokenizer(config.model)
    examples, counts = read_examples(config.data, tokenizer, config, quiet)
    validation = read_examples(config.validation, tokenizer, config, quiet)[0] if config.validation else []
    steps = plan_steps(examples, config)
    fingerprint = data_fingerprint(examples)

    torch.manual_seed(config.seed)  # the adapters' first weights
    student, base = build_student(config, process, bf16)
    call = distribute(student, config, process)
    optimizer = make_optimizer(student, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    checkpoint = out / "checkpoint" / "state.pt"
    done = load_checkpoint(checkpoint, student, optimizer, fingerprint)

    log = Log(out / "metrics.jsonl", done, process.first)
    started, tokens_here = time.monotonic(), 0
    with progress(total=len(steps), desc=f"training {out.name}", unit="step", quiet=quiet) as bar:
        bar.update(done)
        for step in range(done, len(steps)):
            batch = [examples[i] for i in steps[step]]
            trained = sum(len(example.trained) for example in batch)
            # Dropout is drawn from (seed, step, process), so that a resumed run draws what it would have drawn.
            torch.manual_seed(hash((config.seed, step, process.rank)))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, len(steps), config)
            micro_batches = split_step(batch, config.micro_tokens, process.size)[process.rank]
            loss = accumulate(call, micro_batches, trained, process, bf16)
            norm = nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            optimizer.zero_grad()

            tokens = sum(len(example.ids) for example in batch)
            tokens_here += tokens
            row = {"step": step + 1, "lr": optimizer.param_groups[0]["lr"], "tokens": tokens, "trained_tokens": trained}
            row.update(loss=loss, gradient_norm=norm)
            if validation and (step + 1) in (len(steps), *range(0, len(steps), config.val_every or len(steps))):
                row["validation_loss"] = validation_loss(call, validation, config, process, bf16)
            log.add(row)
            rate = tokens_here / (time.monotonic() - started)
            bar.set_postfix_str(f"{log.text} {rate:,.0f} tokens/s {peak_memory(process.device) / 2**30:.2f} GiB", False)
            bar.update()
            if (step + 1) % config.save_every == 0 and step + 1 < len(steps):
                log.flush()
                save_checkpoint(checkpoint, step + 1, student, optimizer, fingerprint, process.first)
    log.flush()
    seconds = time.monotonic() - started
    save_model(student.model, tokenizer, config, base, process.first)
    summary = {
        **counts,
        "steps": len(steps),
        "loss": log.rows[-1]["loss"],
        "validation_loss": log.rows[-1].get("validation_loss"),
        "precision": "bf16" if bf16 else "fp32",
        "processes": process.size,
        "device": torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else "cpu",
        "parameters": sum(p.numel() for p in student.parameters()),
        "trained_parameters": sum(p.numel() for p in parameters),
        "seconds": seconds,
        "tokens_per_second": tokens_here / seconds,
        "peak_memory_bytes": peak_memory(process.device),
    }
    if process.first:
        write_json(out / "summary.json", summary)
        shutil.rmtree(out / "checkpoint", ignore_errors=True)
    return summary


def run_fit(config):
    """Fine-tune a model on conversations."""
    summary = fit(config)
    if not config.quiet and int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(summary, indent=2))
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclasses.dataclass(kw_only=True)
class ShowConfig(DataConfig):
    example: int = option(1, "which example to print, from 1")


def show(config):
    """Print an example with its trained tokens in green, the others dimmed, and the data's token counts."""
    tokenizer = load_tokenizer(config.model)
    examples, counts = read_examples(config.data, tokenizer, config)
    if not 1 <= config.example <= len(examples):
        raise InputError(f"--example {config.example}: there are {len(examples)}")
    example = examples[config.example - 1]
    trained = set(example.trained.tolist())
    trained_style, other_style, end = ("\033[1;32m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("⟦", "", "")
    runs = itertools.groupby(range(len(example.ids)), key=trained.__contains__)
    for is_trained, places in runs:
        text = tokenizer.decode(example.ids[list(places)], clean_up_tokenization_spaces=False)
        close = end or ("⟧" if is_trained else "")
        print((trained_style if is_trained else other_style) + text + close, end="")
    print()
    for name, value in counts.items():
        print(f"{name.replace('_', ' '):>17} {value:,}")
    print(f"{'trained share':>17} {counts['trained_tokens'] / counts['tokens']:.1%}")


@dataclasses.dataclass(kw_only=True)
class MergeConfig:
    adapter: str = option(REQUIRED, "an adapter's folder", positional=True)
    out: str = option(REQUIRED, "folder for the merged model")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "of the saved weights")


def merge(config):
    """Fold an adapter into its base model and save the full model."""
    if not is_adapter(config.adapter):
        raise InputError(f"{config.adapter}: no adapter_config.json; an adapter's folder is expected")
    model, tokenizer = load_model(config.adapter, dtype=getattr(torch, config.dtype))
    model.save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)


def main():
    commands = {"fit": (Config, run_fit), "show": (ShowConfig, show), "merge": (MergeConfig, merge)}
    run_command_line(__doc__, commands, default="fit")


if __name__ == "__main__":
    main()
