"""Fine-tune a student on a teacher's conversations: the losses of Eq. 2 (reasoning) and Eq. 4 (agent distillation).

    python train.py trajectories.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --out student     # the paper's settings
    python train.py show trajectories.jsonl --model Qwen/Qwen2.5-0.5B-Instruct              # which tokens are trained
    python train.py merge student --out student-merged                                      # adapter -> full model
    torchrun --nproc-per-node 8 train.py trajectories.jsonl --model ... --out ...           # one process per GPU

Both equations are one loss, -sum log p(token | all tokens before it) over the assistant's tokens. In Eq. 2 these tokens
are the chain of thought and the answer; in Eq. 4 they are the thought and the action (r_t, a_t) of every step. The
question and the observations o_t are context: the student reads them, and they are never in the loss.

A killed run continues from its last checkpoint when the same command is given again. On a CPU the result is equal, bit
for bit, to that of an uninterrupted run; on a GPU the backward pass of attention adds in no fixed order.
"""

import dataclasses
import gc
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

import jinja2
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.integrations import sdpa_attention

import common
from common import REQUIRED, InputError, option
from common.devices import choose_device, uses_bf16
from common.lora import (
    MergeConfig,
    adapter_config,
    add_lora,
    load_base,
    load_tokenizer,
    lora_layers,
    merge_adapter,
    save_lora,
)

# ------------- Settings: the paper's, and where it is silent those of Hugging Face's Trainer, which the authors used


@dataclasses.dataclass(kw_only=True)
class DataConfig:
    data: list[str] = option(REQUIRED, "JSONL files of conversations", positional=True)
    model: str = option(REQUIRED, "a Hugging Face name or folder, or an adapter's folder to continue from")
    system_prompt: str | None = option(None, "file with the text that replaces every system message")
    max_length: int = option(10240, "tokens; longer examples are dropped (paper: 10,240; for CoT 4,096)", above=0)


@dataclasses.dataclass(kw_only=True)
class Config(DataConfig):
    out: str = option(REQUIRED, "folder for the adapter or model")
    tuning: Literal["lora", "full"] = option("lora", "train low-rank adapters (paper) or all weights")
    rank: int = option(64, "LoRA: rank (paper)", above=0)
    alpha: float = option(128, "LoRA: alpha (paper)")
    dropout: float = option(0.05, "LoRA: dropout on the adapters' input (paper)")
    lr: float = option(2e-4, "learning rate (paper)", above=0)
    warmup_steps: int = option(0, "steps of linear warm-up; then the rate falls linearly to 0 (HF default)")
    epochs: int = option(2, "passes over the data (paper)", above=0)
    batch_size: int = option(8, "conversations per optimiser step (paper)", above=0)
    micro_tokens: int | None = option(None, "tokens per forward pass (default: 16,384; 2,048 on a CPU)", above=0)
    clip: float = option(1.0, "largest gradient norm (HF default)", above=0)
    seed: int = option(42, "data order, adapter initialisation, dropout (the authors' value)")
    precision: Literal["auto", "bf16", "fp32"] = option(
        "auto", "bf16 (paper) where the hardware has instructions for it; trained weights are always float32"
    )
    checkpointing: bool = option(False, "recompute all activations (default: only those that do not fit into memory)")
    save_every: int = option(100, "steps between checkpoints to resume from", above=0, changes_results=False)
    quiet: bool = option(False, "no progress bar and no summary", changes_results=False)


# ------------- A conversation's tokens, and which of them are trained

# Llama 3's template prints today's date by default: the same data would give different tokens on another day.
# The teacher's thoughts are part of its replies: the thinking mode of a template would be a second place for them.
TEMPLATE_OPTIONS = {"date_string": "26 Jul 2024", "enable_thinking": False}


@dataclasses.dataclass
class Example:
    ids: torch.Tensor  # (tokens,) int64
    weights: torch.Tensor  # (tokens,) float32: the token's weight in the loss, 0 for context
    number: int = 0  # its place in the data, from which its dropout is drawn


def render(tokenizer, messages, reply=False):
    """Returns the conversation as text, as the model reads it. reply: with the header of the assistant's next turn."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply, **TEMPLATE_OPTIONS)
    except (jinja2.TemplateError, ValueError) as error:  # ValueError: the tokenizer has no template
        raise InputError(f"the chat template fails: {error}") from None


def turn_weight(text, turn, row):
    """The default weight of an assistant's tokens in the loss. To change it, pass another function to fit or show.

    text: an assistant's message; turn: its number, from 0, among the assistant's; row: the whole row of the data.
    Returns a weight for the message, or a list of (start, end, weight) for parts of the text; tokens that start
    elsewhere have weight 1. The end-of-turn token starts at len(text). Weight 0 makes a token context.
    """
    return 1.0


def encode(tokenizer, messages, weigh=turn_weight, row=None):
    """Returns the examples of a conversation: [(ids, weights)], lists of equal length; weights are 0 for context.

    Trained are the tokens that the student has to produce at inference: what follows the prompt of a turn (the messages
    before it, rendered with the header of the reply), up to and including the end-of-turn token, without which it would
    not learn to stop. If the rendered conversation starts with every turn's prompt and reply, it is one example. Some
    templates rewrite earlier turns (Qwen3's removes thinking): then every turn is an example with its own prompt.

    Raises InputError if no message is the assistant's, or if the template makes an exact mask impossible.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise InputError("nothing to train on: no message has the role assistant")
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    contents = [messages[i]["content"].strip() for i in turns]
    prompts = [render(tokenizer, messages[:i], reply=True) for i in turns]
    texts, starts = [render(tokenizer, messages[: i + 1]) for i in turns], []
    whole = True  # whether the conversation can be one example
    for i, content, prompt, text in zip(turns, contents, prompts, texts, strict=True):
        # A template may put something (group 1) before the content. The student has to produce that, too.
        pattern = rf"{re.escape(prompt)}(.*?){re.escape(content)}\s*({'|'.join(map(re.escape, special))})"
        match = re.match(pattern, text, re.DOTALL)
        if not match:
            fault = "does not print this turn as it is, with a special token at its end"
            fault = fault if text.startswith(prompt) else "shows the messages before this turn differently"
            raise InputError(f"messages[{i}]: the chat template {fault}")
        if any(token in match[1] + content for token in special):
            raise InputError(f"messages[{i}]: the content contains a special token, which would end the turn")
        starts.append(match.end(1))
        whole = whole and texts[-1].startswith(match[0])

    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    ids, places = tokenize(tokenizer, texts[-1])
    if whole and all(ids[: len(prompt)] == prompt for prompt in prompt_ids):
        sequences = [(ids, places, range(len(turns)))]
    else:  # the student reads the prompt as it is tokenized alone, and continues with tokens of its own
        replies = [tokenize(tokenizer, text, len(prompt)) for text, prompt in zip(texts, prompts, strict=True)]
        pairs = enumerate(zip(prompt_ids, replies, strict=True))
        sequences = [(prompt + reply[0], [0] * len(prompt) + reply[1], [turn]) for turn, (prompt, reply) in pairs]

    special_ids, examples = set(tokenizer.convert_tokens_to_ids(special)), []
    for ids, places, its_turns in sequences:
        weights = [0.0] * len(ids)
        for turn in its_turns:
            content, start = contents[turn], len(prompt_ids[turn])
            end = next(n for n in range(start, len(ids)) if ids[n] in special_ids)  # the end-of-turn token
            weight = weigh(content, turn, row or {})
            parts = weight if isinstance(weight, list) else [(-math.inf, math.inf, weight)]
            for n in range(start, end + 1):
                place = places[n] - starts[turn] if n < end else len(content)
                weights[n] = next((w for first, last, w in parts if first <= place < last), 1.0)
        if not all(isinstance(w, (int, float)) and 0 <= w < math.inf for w in weights):
            raise InputError("the weight of a token must be a number from 0 up")
        examples.append((ids, weights))
    return examples


def tokenize(tokenizer, text, start=0):
    """Returns (ids, places) of the text from a place on; places: where in the text each token starts."""
    encoding = tokenizer(text[start:], add_special_tokens=False, return_offsets_mapping=True)
    return encoding["input_ids"], [start + place for place, _ in encoding["offset_mapping"]]


def read_conversations(tokenizer, config, weigh=turn_weight, quiet=True):
    """Read the data: rows {"messages": [{"role", "content"}, ...], "method"?, "prefix"?, ...}.

    Returns (conversations, record, counts): a list of Example for each conversation, what training.json says of the
    data, and the numbers of examples and tokens. Raises InputError, with file and line, for a row that is not valid.
    """
    system_prompt = common.read_text(config.system_prompt) if config.system_prompt else None
    conversations, number, methods, prompts, prefix = [], itertools.count(), set(), set(), False
    counts = dict.fromkeys(("split_into_turns", "dropped_too_long", "dropped_zero_weight"), 0)
    for path in config.data:
        for line, row in common.progress(common.read_jsonl(path), desc=f"reading {path}", unit=" rows", quiet=quiet):
            try:
                messages = read_messages(row, system_prompt)
                encoded = encode(tokenizer, messages, weigh, row)
            except InputError as error:
                raise InputError(f"{path}:{line}: {error}") from None
            methods.add(row.get("method"))
            prompts.add(next((message["content"] for message in messages if message["role"] == "system"), None))
            prefix = prefix or bool(row.get("prefix"))
            counts["split_into_turns"] += len(encoded) > 1
            conversations.append([])
            for ids, weights in encoded:
                weights[0] = 0.0  # nothing comes before the first token from which it could be predicted
                if len(ids) > config.max_length or not any(weights):
                    counts["dropped_too_long" if len(ids) > config.max_length else "dropped_zero_weight"] += 1
                else:
                    conversations[-1].append(Example(torch.tensor(ids), torch.tensor(weights), next(number)))
    conversations = [examples for examples in conversations if examples]
    if not conversations:
        raise InputError(f"{', '.join(config.data)}: no example is left to train on ({counts})")
    examples = list(itertools.chain(*conversations))
    counts |= {"conversations": len(conversations), "examples": len(examples)}
    counts["tokens"] = sum(len(example.ids) for example in examples)
    counts["trained_tokens"] = sum(int(example.weights.count_nonzero()) for example in examples)
    record = {"method": methods.pop() if len(methods) == 1 else None}
    record["training"] = "distill+prefix" if prefix else "distill"
    record["system_prompt"] = prompts.pop() if len(prompts) == 1 else None
    return conversations, record, counts


def read_messages(row, system_prompt):
    """Returns the messages of a row, with the system prompt replaced if one is given."""
    try:
        messages = [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
        valid = all(isinstance(text, str) for message in messages for text in message.values())
    except (KeyError, TypeError):
        valid = False
    if not valid:
        raise InputError('{"messages": [{"role": text, "content": text}, ...]} was expected')
    if system_prompt is None:
        return messages
    return [{"role": "system", "content": system_prompt}, *(m for m in messages if m["role"] != "system")]


# ------------- The loss


# transformers hands grouped key-value heads to PyTorch's attention. Only for half precision on a GPU a fused kernel has
# them; in float32 a kernel that stores all scores would run, and on a CPU the backward pass is slower than with copies.
sdpa_attention.use_gqa_in_sdpa = lambda mask, key, value: mask is None and key.is_cuda and key.dtype != torch.float32


class HeadLoss(torch.autograd.Function):
    """-sum of weight * log softmax(hidden W^T)[target]. The gradients are computed in the forward pass, in chunks.

    With a vocabulary of 152,000 tokens the logits would be the largest tensor of all by far. Here a chunk's logits
    become its gradients in place, and are freed before the next chunk's are computed.
    """

    CHUNK = 2**26  # logits at once: 256 MiB in float32

    @staticmethod
    def forward(ctx, hidden, head, targets, weights):
        # hidden (n, size), head (vocabulary, size), targets (n,), weights (n,) -> ()
        w, loss, grad_hidden = head.to(hidden.dtype), torch.zeros((), device=hidden.device), torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        size = max(1, HeadLoss.CHUNK // len(head) // 64) * 64
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            target, weight = targets[rows, None], weights[rows, None]  # (chunk, 1)
            logits = (hidden[rows] @ w.T).float()  # (chunk, vocabulary)
            normaliser = logits.logsumexp(dim=1, keepdim=True)
            loss += (weight * (normaliser - logits.gather(1, target))).sum()
            gradient = logits.sub_(normaliser).exp_()  # d loss / d logits = weight * (softmax - one-hot)
            gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1))
            gradient = gradient.mul_(weight).to(hidden.dtype)
            torch.mm(gradient, w, out=grad_hidden[rows])
            if grad_head is not None:
                grad_head += gradient.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_head)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad_loss, None if grad_head is None else grad_head * grad_loss, None, None


def loss_of(model, examples, seed=0):
    """-sum of weight * log p(token | all tokens before it) over the trained tokens: Eq. 2 and Eq. 4.

    Examples are padded on the right: in a causal model nothing passes from a later token to an earlier one, so padding
    needs no mask. (Packed into one row, examples would leak through recurrent and convolutional layers.) Dropout is
    drawn from the seed and the number of each example, so it does not depend on how a step is cut into micro-batches.
    """
    device = model.device
    ids = pad_sequence([example.ids for example in examples], batch_first=True)
    weights = pad_sequence([example.weights for example in examples], batch_first=True)
    # oneDNN caches a compiled kernel for every size: multiples of 32 and 64 keep the number of sizes small.
    ids = nn.functional.pad(ids, (0, -ids.shape[1] % 32)).to(device)  # (rows, tokens)
    row, token = weights.nonzero(as_tuple=True)  # of the trained tokens
    filler = -len(row) % 64  # trained tokens of weight 0
    row, token = (nn.functional.pad(x, (0, filler), value=1 if x is token else 0).to(device) for x in (row, token))
    weights = nn.functional.pad(weights[weights != 0], (0, filler)).to(device)

    torch.manual_seed(seed)
    generators = [torch.Generator().manual_seed(common.stable_seed(seed, example.number)) for example in examples]
    numbers = [torch.randint(2**15, (ids.shape[1], 1), generator=generator) for generator in generators]
    numbers = (2 * torch.stack(numbers) + 1).to(torch.int16).to(device)  # (rows, tokens, 1), odd
    for _, layer in lora_layers(model):
        layer.token_numbers = numbers
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (rows, tokens, size)
    # The state at t predicts the token at t + 1. The head is computed only where that token is trained.
    hidden = hidden[row, token - 1]  # (trained, size)
    if torch.is_autocast_enabled(device.type):
        hidden = hidden.to(torch.get_autocast_dtype(device.type))
    return HeadLoss.apply(hidden, model.get_output_embeddings().weight, ids[row, token], weights)


@torch.no_grad()
def check_model(model):
    """Raise InputError if loss_of would not compute the model's own loss.

    The logits of an example alone, as the model itself computes them, must equal hidden W^T of the same example beside
    a longer one. They differ if the head has a bias, a scale or a soft cap, or if a layer mixes rows or later tokens.
    """
    model.eval()
    words, head = model.config.get_text_config().vocab_size, model.get_output_embeddings().weight
    ids = torch.randint(words, (2, 40), generator=torch.Generator().manual_seed(0)).to(model.device)
    ids[0, 24:] = 0
    alone = model(ids[:1, :24], use_cache=False).logits.float()
    hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state[:1, :24]
    difference = (nn.functional.linear(hidden, head).float() - alone).square().mean().sqrt()
    if not difference <= (0.01 if head.dtype == torch.float32 else 0.1) * alone.std():
        name = type(model).__name__
        raise InputError(f"{name}: the logits of an example differ beside a longer one, or the head is not linear")
    model.train()


# ------------- The loop


def plan_steps(conversations, config):
    """Returns the examples of every optimiser step: batch_size conversations, in an order drawn from the seed."""
    steps = []
    for epoch in range(config.epochs):
        order = torch.randperm(len(conversations), generator=torch.Generator().manual_seed(config.seed + epoch))
        for step in order.split(config.batch_size):
            steps.append([example for i in step.tolist() for example in conversations[i]])
    return steps


def split_step(examples, micro_tokens):
    """Returns micro-batches of examples of similar length: at most micro_tokens with padding, or one example."""
    micro_batches = []
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        longest = len(micro_batches[-1][0].ids) if micro_batches else math.inf
        # Shorter examples start a new micro-batch: their padding would cost more than the larger batch saves.
        if len(example.ids) >= 0.75 * longest and (len(micro_batches[-1]) + 1) * longest <= micro_tokens:
            micro_batches[-1].append(example)
        else:
            micro_batches.append([example])
    return micro_batches


def learning_rate(step, steps, config):
    """Returns the rate of step 0 ... steps - 1: linear warm-up, then linearly to 0 after the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    return config.lr * (steps - step) / (steps - config.warmup_steps)


class Trainer:
    """A model, the gradients and the optimiser of its trained weights; rank, size: of torchrun's processes."""

    def __init__(self, config, device, rank=0, size=1):
        adapter, full = bool(adapter_config(config.model)), config.tuning == "full"
        if adapter and full:
            raise InputError(f"{config.model} is an adapter: train it with --tuning lora, or merge it first")
        self.device, self.rank, self.size = device, rank, size
        self.bf16 = uses_bf16(config.precision, device)
        # Trained weights are float32; full tuning computes with them in bf16 by autocast. Frozen weights are bf16.
        self.autocast = self.bf16 and full
        dtype = torch.bfloat16 if self.bf16 and not full else torch.float32
        self.model, self.base = load_base(config.model, dtype, config.dropout)
        check_model(self.model.to(device))
        if not adapter and not full:
            torch.manual_seed(config.seed)  # the first weights of the adapters
            add_lora(self.model, config.rank, config.alpha, config.dropout)
        self.micro_tokens = config.micro_tokens or (16384 if device.type == "cuda" else 2048)
        self.checkpoint_from = 0 if config.checkpointing else math.inf  # tokens per forward pass
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        # All gradients are views of one tensor, which one all_reduce adds up over the processes.
        sizes = [p.numel() for p in self.parameters]
        self.gradient = torch.zeros(sum(sizes), device=device)
        for parameter, part in zip(self.parameters, self.gradient.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=0.0, fused=True)

    def accumulate(self, examples, seed):
        """Set the gradients to those of one step. Returns its loss, the mean of -log p over the trained tokens.

        The mean is weighted, over the sum of the weights: weight 0 is the same as context. How a step is cut into
        micro-batches and processes changes only the rounding, with dropout too. Where memory runs out, micro-batches
        become smaller, and the activations of an example that does not fit alone are recomputed, from then on.
        """
        total = sum(example.weights.sum() for example in examples).item()
        todo = None
        while todo is None or todo:
            if todo is None:  # start, or start again
                self.gradient.zero_()
                loss, todo = 0.0, split_step(examples[self.rank :: self.size], self.micro_tokens)
            try:
                loss += self.backward(todo[-1], seed, total)
                todo.pop()
            except torch.OutOfMemoryError:
                failed, todo = todo[-1], None
            if todo is None:  # only after the except block the tensors of the failed attempt are free
                self.use_less_memory(failed)
        if self.size > 1:
            dist.all_reduce(self.gradient)
            loss = torch.as_tensor(loss, dtype=torch.float64, device=self.device)
            dist.all_reduce(loss)
        return float(loss)

    def backward(self, micro_batch, seed, total):
        """Add one micro-batch's gradients. Returns its part of the loss."""
        recompute = len(micro_batch) * len(micro_batch[0].ids) >= self.checkpoint_from
        if recompute != self.model.is_activation_checkpointing:
            on, off = self.model.activation_checkpointing_enable, self.model.activation_checkpointing_disable
            on() if recompute else off()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = loss_of(self.model, micro_batch, seed) / total
        loss.backward()
        return loss.item()

    def use_less_memory(self, failed):
        """Prepare the next attempt after a micro-batch that did not fit; InputError if nothing is left to try."""
        tokens = len(failed) * len(failed[0].ids)
        if len(failed) > 1:
            self.micro_tokens = tokens // 2
        elif tokens < self.checkpoint_from and self.model.supports_gradient_checkpointing:
            self.checkpoint_from = tokens
        else:
            raise InputError(f"an example of {tokens:,} tokens does not fit into memory; try a lower --max-length")
        gc.collect()
        torch.cuda.empty_cache()

    def update(self, rate, clip):
        """Clip the gradients and take an optimiser step. Returns the norm of the gradients before clipping."""
        norm = self.gradient.norm()
        self.gradient.mul_((clip / (norm + 1e-6)).clamp(max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return norm.item()

    def save(self, path, step, data):
        """Write a checkpoint. The order of the data and the dropout follow from the seed and the step."""
        state = {"step": step, "data": data, "weights": self.parameters, "adamw": self.optimizer.state_dict()}
        with common.replace_file(path, "wb") as file:
            torch.save(state, file)

    @torch.no_grad()
    def load(self, path, data):
        """Continue from a checkpoint. Returns the number of steps done: 0 if there is no checkpoint."""
        if not path.exists():
            return 0
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["data"] != data:
            raise InputError(f"{path} was made with other data: name another --out, or delete {path.parent}")
        for parameter, weight in zip(self.parameters, state["weights"], strict=True):
            parameter.copy_(weight)
        self.optimizer.load_state_dict(state["adamw"])  # moves every tensor, `step` too, to its parameter's device
        return state["step"]


def start():
    """Set up PyTorch and, under torchrun, the process group. Returns (device, rank, number of processes)."""
    device = choose_device()
    if "LOCAL_RANK" not in os.environ:
        return device, 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), dist.get_world_size()


def fit(config, weigh=turn_weight):
    """Fine-tune a model on conversations. Returns the summary, which is also written to out/summary.json.

    weigh: see turn_weight. The folder gets the adapter in PEFT's format or the model, the tokenizer, training.json for
    evaluation, run.json (the settings), metrics.jsonl (one row per step) and summary.json, written last.
    """
    common.check_numbers(config)  # forks call fit without the command line
    if not 0 <= config.dropout < 1:
        raise InputError(f"--dropout {config.dropout}: must be from 0 to below 1")
    device, rank, size = start()
    out, quiet, checkpoint = Path(config.out), config.quiet or rank > 0, Path(config.out) / "checkpoint" / "state.pt"
    if rank == 0:
        started = (out / "metrics.jsonl").exists()
        common.keep_config(out / "run.json", config, binding=started, weigh=weigh.__name__)
    if (out / "summary.json").exists():
        print(f"{out} is finished", file=sys.stderr)
        return common.parse_object((out / "summary.json").read_bytes(), f"{out}/summary.json")

    tokenizer = load_tokenizer(config.model)
    conversations, record, counts = read_conversations(tokenizer, config, weigh, quiet)
    steps, data = plan_steps(conversations, config), hashlib.sha256()
    for example in itertools.chain(*conversations):
        data.update(example.ids.numpy().tobytes() + example.weights.numpy().tobytes())
    trainer = Trainer(config, device, rank, size)
    done = trainer.load(checkpoint, data.hexdigest())
    if rank == 0:
        with common.Journal(out / "metrics.jsonl") as metrics:
            rows = [row for row in metrics.rows if row["step"] <= done]  # later steps are done again
        common.write_jsonl(out / "metrics.jsonl", rows)
        metrics = common.Journal(out / "metrics.jsonl")
    tokens, loss, started = 0, None, time.monotonic()
    with common.progress(total=len(steps), done=done, desc=f"training {out.name}", unit="step", quiet=quiet) as bar:
        for step in range(done, len(steps)):
            loss = trainer.accumulate(steps[step], common.stable_seed(config.seed, step))
            if not math.isfinite(loss):
                raise InputError(f"the loss is {loss} at step {step + 1}; a lower --lr may help")
            rate = learning_rate(step, len(steps), config)
            row = {"step": step + 1, "loss": loss, "lr": rate, "gradient_norm": trainer.update(rate, config.clip)}
            row["tokens"] = sum(len(example.ids) for example in steps[step])
            tokens += row["tokens"]
            speed = tokens / (time.monotonic() - started)
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens:,} tokens, {speed:,.0f} tokens/s")
            bar.update()
            if rank == 0:
                metrics.append(row)
                if (step + 1) % config.save_every == 0 and step + 1 < len(steps):
                    trainer.save(checkpoint, step + 1, data.hexdigest())
    seconds, gpu = time.monotonic() - started, device.type == "cuda"
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    summary = counts | {"steps": len(steps), "loss": loss, "trained_parameters": len(trainer.gradient)}
    summary |= {"precision": "bf16" if trainer.bf16 else "fp32", "micro_tokens": trainer.micro_tokens}
    summary["checkpointed_from"] = trainer.checkpoint_from if trainer.checkpoint_from < math.inf else None
    summary |= {"device": torch.cuda.get_device_name(device) if gpu else "cpu", "processes": size}
    summary |= {"seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds, 1)}
    summary["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device) if gpu else memory
    if rank == 0:
        metrics.close()
        save_lora(trainer.model, out, trainer.base) if config.tuning == "lora" else trainer.model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        common.write_json(out / "training.json", record | {"base": trainer.base})
        common.write_json(out / "summary.json", summary)  # from here on the folder counts as finished
        shutil.rmtree(out / "checkpoint", ignore_errors=True)
    return summary


def run_fit(config, weigh=turn_weight):
    """Fine-tune a model on conversations."""
    try:
        summary = fit(config, weigh)
    except torch.OutOfMemoryError:
        raise InputError("the model and its optimiser do not fit into memory; --tuning lora takes less") from None
    if not config.quiet and int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(summary, indent=2))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# ------------- show


@dataclasses.dataclass(kw_only=True)
class ShowConfig(DataConfig):
    example: int = option(1, "which conversation to print, from 1")


def show(config, weigh=turn_weight):
    """Print a conversation with its trained tokens in green, the others dimmed, and the data's token counts."""
    tokenizer = load_tokenizer(config.model)
    conversations, record, counts = read_conversations(tokenizer, config, weigh)
    if not 1 <= config.example <= len(conversations):
        raise InputError(f"--example {config.example}: there are {len(conversations)}")
    trained, other, end = ("\033[1;32m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("⟦", "", "")
    for example in conversations[config.example - 1]:
        weights = example.weights.tolist()
        for weight, places in itertools.groupby(range(len(weights)), key=weights.__getitem__):
            text = tokenizer.decode(example.ids[list(places)], clean_up_tokenization_spaces=False)
            label = f"{weight:g}|" if weight not in (0, 1) else ""
            print(f"{trained}{label}{text}{end or '⟧'}" if weight else other + text + end, end="")
        print("\n" + "-" * 80)
    way = "the chat template rewrites earlier turns, so every turn is an example with its own prompt"
    print(way if counts["split_into_turns"] else "every conversation is one example, in which all turns are trained")
    for name, value in (counts | record).items():
        print(f"{name.replace('_', ' '):>20} {f'{value:,}' if isinstance(value, int) else value}")
    print(f"{'trained share':>20} {counts['trained_tokens'] / counts['tokens']:.1%}")


def main(argv=None):
    commands = {"fit": (Config, run_fit), "show": (ShowConfig, show), "merge": (MergeConfig, merge_adapter)}
    common.run_command_line(__doc__, commands, default="fit", argv=argv)


if __name__ == "__main__":
    main()
