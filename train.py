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

import contextlib
import dataclasses
import gc
import hashlib
import itertools
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Literal

# Read when PyTorch is imported: idle threads stop spinning early. Spinning halves the speed beside a busy process.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import common
from common import REQUIRED, InputError, models, option

# ------------- Settings: the paper's, and where it is silent those of Hugging Face's Trainer, which the authors used


@dataclasses.dataclass(kw_only=True)
class DataConfig:
    data: list[str] = option(REQUIRED, "JSONL files of conversations", positional=True)
    model: str = option(REQUIRED, "a Hugging Face name or folder, or an adapter's folder to continue from")
    system_prompt: str | None = option(None, "file with the text that replaces every system message")
    max_length: int = option(10240, "tokens; longer examples are dropped (paper: 10,240; for CoT 4,096)", above=0)
    weigh: str | None = option(
        None, "MODULE.FUNCTION that weighs tokens in the loss (default: train.turn_weight, all 1)"
    )


@dataclasses.dataclass(kw_only=True)
class Config(DataConfig):
    out: str = option(REQUIRED, "folder for the adapter or model")
    validation: list[str] = option([], "held-out JSONL files; their loss is reported per epoch", changes_results=False)
    tuning: Literal["lora", "full"] = option("lora", "train low-rank adapters (paper) or all weights")
    rank: int = option(64, "LoRA: rank (paper)", above=0)
    alpha: float = option(128, "LoRA: alpha (paper)", above=0)
    dropout: float = option(0.05, "LoRA: dropout on the adapters' input (paper)", at_least=0, at_most=0.99)
    lr: float = option(2e-4, "learning rate (paper)", above=0)
    warmup_steps: int = option(0, "steps of linear warm-up; then the rate falls linearly to 0 (HF default)", at_least=0)
    epochs: int = option(2, "passes over the data (paper)", above=0)
    batch_size: int = option(8, "conversations per optimiser step (paper)", above=0)
    clip: float = option(1.0, "largest gradient norm (HF default)", above=0)
    seed: int = option(42, "data order, adapter initialisation, dropout (the authors' value)")
    precision: Literal["auto", "bf16", "fp32"] = option(
        "auto", "bf16 (paper) where the hardware has instructions for it; trained weights are always float32"
    )
    # These two change results by rounding only (and which elements dropout drops), so a restart may change them.
    micro_tokens: int | None = option(
        None, "tokens per forward pass (default: 16,384; 2,048 on a CPU)", above=0, changes_results=False
    )
    checkpointing: bool = option(False, "recompute activations: slower, in less memory", changes_results=False)
    save_every: int = option(50, "steps between checkpoints to resume from", above=0, changes_results=False)
    quiet: bool = option(False, "no progress bar and no summary", changes_results=False)


# ------------- A conversation's tokens, and which of them are trained


@dataclasses.dataclass
class Example:
    ids: torch.Tensor  # (tokens,) int64
    weights: torch.Tensor  # (tokens,) float32: the token's weight in the loss, 0 for context


def example_of(ids, weights):
    """Returns the Example of two lists of equal length."""
    weights[0] = 0.0  # nothing comes before the first token from which it could be predicted
    return Example(torch.tensor(ids), torch.tensor(weights, dtype=torch.float32))


def turn_weight(text, turn, row):
    """The default weight of an assistant's tokens in the loss. --weigh MODULE.FUNCTION names another function.

    text: an assistant's message; turn: its number, from 0, among the assistant's; row: the whole row of the data.
    Returns a weight for the message, or a list of (start, end, weight) for parts of the text; of parts that overlap,
    the first counts, and tokens that start outside all parts have weight 1. The end-of-turn token starts at len(text):
    a part that ends there leaves it at weight 1. Weight 0 makes a token context.
    """
    return 1.0


def encode(tokenizer, messages, weigh=turn_weight, row=None):
    """Returns the examples of a conversation, a list of Example.

    Trained are the tokens that the student has to produce at inference: what follows the prompt of a turn (the messages
    before it, rendered with the header of the reply), up to and including the end-of-turn token, without which it would
    not learn to stop. If the rendered conversation starts with every turn's prompt and reply, it is one example. Some
    templates rewrite earlier turns (Qwen3's removes thinking): then every turn is an example with its own prompt.

    Raises InputError if no message is the assistant's, or if the template makes an exact mask impossible.
    """
    replies = models.find_replies(tokenizer, messages)
    parts = [weighted_parts(weigh(reply.content, turn, row or {})) for turn, reply in enumerate(replies)]
    prompts = tokenizer([reply.prompt for reply in replies], add_special_tokens=False)["input_ids"]
    text = replies[-1].text
    ids, places = tokenize(tokenizer, text)
    whole = all(text.startswith(reply.text[: reply.end]) for reply in replies)
    if whole and all(ids[: len(prompt)] == prompt for prompt in prompts):
        weights = [sum(weight_at(place, *pair) for pair in zip(replies, parts, strict=True)) for place in places]
        return [example_of(ids, weights)]
    examples = []
    for reply, its_parts, prompt in zip(replies, parts, prompts, strict=True):
        # The student reads the prompt as it is tokenized alone, and continues with tokens of its own.
        ids, places = tokenize(tokenizer, reply.text, len(reply.prompt))
        weights = [weight_at(place, reply, its_parts) for place in places]
        examples.append(example_of(prompt + ids, [0.0] * len(prompt) + weights))
    return examples


def weighted_parts(weight):
    """What a weighing function returned, as a list of (start, end, weight). Raises InputError if it is not valid."""
    parts = weight if isinstance(weight, list) else [(-math.inf, math.inf, weight)]
    try:
        valid = all(0 <= w < math.inf and -math.inf <= start <= end for start, end, w in parts)
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise InputError(
            f"the weight of a message is {weight!r}: a number from 0 up, or a list of (start, end, number)"
        )
    return parts


def weight_at(place, reply, parts):
    """Returns the weight of the token that starts at a place of the reply's text: 0 outside the reply."""
    if not len(reply.prompt) <= place < reply.end:
        return 0.0
    place -= reply.start
    if place > len(reply.content):  # a template may print a line break before the end-of-turn token
        place = len(reply.content)
    return next((weight for start, end, weight in parts if start <= place < end), 1.0)


def tokenize(tokenizer, text, start=0):
    """Returns (ids, places) of the text from a place on; places: where in the text each token starts."""
    encoding = tokenizer(text[start:], add_special_tokens=False, return_offsets_mapping=True)
    return encoding["input_ids"], [start + place for place, _ in encoding["offset_mapping"]]


def weighing(config):
    """Returns the function that --weigh names, or the default."""
    return common.resolve(config.weigh, turn_weight, "--weigh") if config.weigh else turn_weight


def read_conversations(tokenizer, config, weigh=turn_weight, quiet=True):
    """Read the data: rows {"messages": [{"role", "content"}, ...], "method"?, "prefix"?, ...}.

    weigh: as turn_weight. Returns (conversations, record, counts): a list of Example for each conversation, what
    training.json says of the data, and the numbers of examples and tokens.
    Raises InputError, with file and line, for a row that is not valid.
    """
    system_prompt = common.read_text(config.system_prompt) if config.system_prompt else None
    conversations, prefix = [], False
    seen = {name: set() for name in ("method", "system_prompt", "prompts_sha256", "tools")}
    counts = {f"dropped_{reason}": 0 for reason in ("too_long", "zero_weight", "special_token")}
    counts["split_into_turns"] = 0
    for path in config.data:
        for line, row in common.progress(common.read_jsonl(path), desc=f"reading {path}", unit=" rows", quiet=quiet):
            try:
                if row.get("correct") is False:
                    raise InputError("a wrong answer: use the file that agent_distill.py filter writes")
                messages = read_messages(row, system_prompt)
                encoded = encode(tokenizer, messages, weigh, row)
            except models.SpecialToken:
                counts["dropped_special_token"] += 1
                continue
            except InputError as error:
                raise InputError(f"{path}:{line}: {error}") from None
            prefix = prefix or bool(row.get("prefix"))
            row |= {"system_prompt": next((m["content"] for m in messages if m["role"] == "system"), None)}
            for name, values in seen.items():
                values.add(json.dumps(row.get(name)))
            counts["split_into_turns"] += len(encoded) > 1
            examples = []
            for example in encoded:
                if len(example.ids) > config.max_length:
                    counts["dropped_too_long"] += 1
                elif not example.weights.any():
                    counts["dropped_zero_weight"] += 1
                else:
                    examples.append(example)
            if examples:
                conversations.append(examples)
    if not conversations:
        raise InputError(f"{', '.join(config.data)}: no example is left to train on ({counts})")
    examples = list(itertools.chain(*conversations))
    counts |= {"conversations": len(conversations), "examples": len(examples)}
    counts["tokens"] = sum(len(example.ids) for example in examples)
    counts["trained_tokens"] = sum(int(example.weights.count_nonzero()) for example in examples)
    # What all rows agree in; evaluate.py says where its own prompts and tools differ.
    record = {name: json.loads(values.pop()) if len(values) == 1 else None for name, values in seen.items()}
    record["training"] = "distill+prefix" if prefix else "distill"
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
    # Half of a surrogate pair, which tokenizers do not take, becomes a question mark.
    messages = json.loads(json.dumps(messages, ensure_ascii=False).encode("utf-8", "replace"))
    if system_prompt is None:
        return messages
    return [{"role": "system", "content": system_prompt}, *(m for m in messages if m["role"] != "system")]


# ------------- The loss

LOGITS = 2**26  # in memory at once: 256 MiB in float32. With 152,000 words, all logits would be the largest tensor


def loss_of(model, examples):
    """-sum of weight * log p(token | all tokens before it) over the trained tokens: Eq. 2 and Eq. 4.

    Examples are padded on the right: in a causal model nothing passes from a later token to an earlier one, so padding
    needs no mask. (Packed into one row, examples would leak through recurrent and convolutional layers.)
    """
    ids = pad_sequence([example.ids for example in examples], batch_first=True).to(model.device)  # (rows, tokens)
    weights = pad_sequence([example.weights for example in examples], batch_first=True)
    row, token = weights.nonzero(as_tuple=True)  # of the trained tokens
    row, token, weights = (x.to(model.device) for x in (row, token, weights[row, token]))  # (trained,) each
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (rows, tokens, size)
    # The state at t predicts the token at t + 1. The head is computed only where that token is trained.
    hidden = hidden[row, token - 1]  # (trained, size)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    head = model.get_output_embeddings().weight.to(hidden.dtype)  # (words, size)
    chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=max(1, LOGITS // len(head)), chunking_method=None)
    losses = nn.functional.linear_cross_entropy(hidden, head, ids[row, token], reduction="none", options=chunks)
    return (losses.float() * weights).sum()


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
        full = config.tuning == "full"
        self.device = device
        self.rank = rank
        self.size = size
        self.bf16 = models.uses_bf16(config.precision, device)
        # Trained weights are float32; full tuning computes with them in bf16 by autocast. Frozen weights are bf16.
        self.autocast = self.bf16 and full
        dtype = torch.bfloat16 if self.bf16 and not full else torch.float32
        self.model, self.base = models.load_base(config.model, dtype, config.dropout)
        models.check_model(self.model.to(device))
        if not full and not models.adapter_config(config.model):
            torch.manual_seed(config.seed)  # the first weights of the adapters
            models.add_lora(self.model, config.rank, config.alpha, config.dropout)
        self.micro_tokens = config.micro_tokens or (16384 if device.type == "cuda" else 2048)
        if "longrope" in models.rope_types(self.model.config):
            self.micro_tokens = 1  # transformers scales all examples of a batch for the longest: each goes alone
        if config.checkpointing:
            self.model.activation_checkpointing_enable()
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
        micro-batches and processes changes the rounding, and which elements dropout drops.
        """
        total = sum(example.weights.sum() for example in examples).item()
        own = examples[self.rank :: self.size]  # none for some processes where a step has few examples
        while True:
            self.gradient.zero_()
            torch.manual_seed(common.stable_seed(seed, self.rank))
            loss, failed = self.attempt(split_step(own, self.micro_tokens), total)
            if failed is None:
                break
            self.use_less_memory(failed)
        if self.size > 1:
            dist.all_reduce(self.gradient)
            loss = torch.as_tensor(loss, dtype=torch.float64, device=self.device)
            dist.all_reduce(loss)
        return float(loss)

    def attempt(self, micro_batches, total):
        """Add the gradients of the micro-batches. Returns (their share of the loss, the one that did not fit or None).

        The failed attempt's tensors are freed when this function returns.
        """
        loss = 0.0
        for micro_batch in micro_batches:
            try:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                    part = loss_of(self.model, micro_batch) / total
                if self.model.training:
                    part.backward()
                loss += part.item()
            except torch.OutOfMemoryError:
                return loss, micro_batch
        return loss, None

    def use_less_memory(self, failed):
        """Use less memory from now on, after a micro-batch that did not fit; InputError if that is impossible."""
        tokens = len(failed) * len(failed[0].ids)
        if len(failed) > 1:
            self.micro_tokens = tokens // 2
        elif self.model.supports_gradient_checkpointing and not self.model.is_activation_checkpointing:
            self.model.activation_checkpointing_enable()
        else:
            raise InputError(f"an example of {tokens:,} tokens does not fit into memory; try a lower --max-length")
        gc.collect()
        torch.cuda.empty_cache()

    def validate(self, examples):
        """Returns the loss of examples, as accumulate does, without dropout."""
        self.model.eval()
        with torch.no_grad():
            loss = self.accumulate(examples, seed=0)
        self.model.train()
        return loss

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
    device = models.choose_device()
    if "LOCAL_RANK" not in os.environ:
        return device, 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        dist.all_reduce(torch.zeros(1, device=device))  # NCCL allocates its memory now, before the model does
    return device, dist.get_rank(), dist.get_world_size()


def check_config(config):
    """Raise InputError for options that contradict each other or would be ignored."""
    common.check_values(config)  # forks call fit without the command line
    adapter = models.adapter_config(config.model)
    if adapter and config.tuning == "full":
        raise InputError(f"{config.model} is an adapter: train it with --tuning lora, or merge it first")
    if adapter and (config.rank, config.alpha) != (adapter["r"], adapter["lora_alpha"]):
        kept = f"--rank {adapter['r']} --alpha {adapter['lora_alpha']:g}"
        raise InputError(f"{config.model} is an adapter, which keeps its rank and alpha: give {kept}")
    if adapter.get("rank_pattern"):
        raise InputError(f"{config.model} has layers of different ranks (rank_pattern), which cannot be continued")
    if config.tuning == "full":
        common.refuse(config, ("rank", "alpha", "dropout"), "it has no effect with --tuning full")
    models.check_out(config.out, config.model)


def fit(config):
    """Fine-tune a model on conversations. Returns the summary, which is also written to out/summary.json.

    The folder gets the adapter in PEFT's format or the model, the tokenizer, training.json for evaluation, run.json
    (the settings), metrics.jsonl (one row per step) and summary.json, written last.
    """
    check_config(config)
    device, rank, size = start()
    if rank > 0:
        return _fit(config, device, rank, size)
    with common.Journal(Path(config.out) / "train.lock"):  # refuses a second training in this folder at the same time
        return _fit(config, device, rank, size)


def _fit(config, device, rank, size):
    out, quiet, weigh = Path(config.out), config.quiet or rank > 0, weighing(config)
    if rank == 0:
        facts = {"computed_in": "bf16" if models.uses_bf16(config.precision, device) else "fp32"}
        facts["data_sha256"] = [common.file_hash(path) for path in config.data]
        if config.system_prompt:
            facts["system_prompt_sha256"] = common.file_hash(config.system_prompt)
        if config.weigh:
            facts["weigh_sha256"] = common.source_hash(weigh)
        metrics = out / "metrics.jsonl"
        common.keep_config(out / "run.json", config, binding=metrics.exists() and metrics.stat().st_size > 0, **facts)
    if (out / "summary.json").exists():
        print(f"{out} is finished", file=sys.stderr)
        return common.parse_object((out / "summary.json").read_bytes(), f"{out}/summary.json")

    tokenizer = models.load_tokenizer(config.model)
    conversations, record, counts = read_conversations(tokenizer, config, weigh, quiet)
    held_out = []
    if config.validation:
        validation = dataclasses.replace(config, data=config.validation)
        held_out, _, _ = read_conversations(tokenizer, validation, weigh, quiet)
    trainer = Trainer(config, device, rank, size)
    summary = counts | run_steps(config, trainer, conversations, list(itertools.chain(*held_out)))
    if rank == 0:
        if config.tuning == "lora":
            models.save_lora(trainer.model, out, trainer.base)
        else:
            trainer.model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        common.write_json(out / "training.json", record | {"base": trainer.base})
        common.write_json(out / "summary.json", summary)  # from here on the folder counts as finished
        (out / "checkpoint" / "state.pt").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it is not there, or holds other files
            (out / "checkpoint").rmdir()
    return summary


def run_steps(config, trainer, conversations, held_out):
    """The training loop. Writes a row of metrics.jsonl per step; returns what summary.json says of the training."""
    out, main, quiet = Path(config.out), trainer.rank == 0, config.quiet or trainer.rank > 0
    steps, data, checkpoint = plan_steps(conversations, config), hashlib.sha256(), out / "checkpoint" / "state.pt"
    for example in itertools.chain(*conversations):
        data.update(example.ids.numpy().tobytes() + example.weights.numpy().tobytes())
    done = trainer.load(checkpoint, data.hexdigest())
    if main:
        with common.Journal(out / "metrics.jsonl", fields={"step": int, "loss": float}) as metrics:
            rows = [row for row in metrics.rows if row["step"] <= done]  # later steps are done again
        common.write_jsonl(out / "metrics.jsonl", rows)
        metrics = common.Journal(out / "metrics.jsonl", fields={"step": int, "loss": float})
    tokens, loss, began = 0, None, time.monotonic()
    with common.progress(total=len(steps), done=done, desc=f"training {out.name}", unit="step", quiet=quiet) as bar:
        for step in range(done, len(steps)):
            loss = trainer.accumulate(steps[step], common.stable_seed(config.seed, step))
            norm = trainer.gradient.norm().item()
            if not math.isfinite(loss + norm):
                raise InputError(f"step {step + 1}: loss {loss}, gradient norm {norm}; a lower --lr may help")
            rate = learning_rate(step, len(steps), config)
            trainer.gradient.mul_(min(1.0, config.clip / (norm + 1e-6)))
            trainer.optimizer.param_groups[0]["lr"] = rate
            trainer.optimizer.step()
            row = {"step": step + 1, "loss": loss, "lr": rate, "gradient_norm": norm}
            row["tokens"] = sum(len(example.ids) for example in steps[step])
            tokens += row["tokens"]
            if held_out and (step + 1) * config.epochs % len(steps) == 0:  # the end of an epoch
                row["validation_loss"] = trainer.validate(held_out)
                bar.write(f"validation loss {row['validation_loss']:.4f} after step {step + 1}", file=sys.stderr)
            speed = tokens / (time.monotonic() - began)
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens:,} tokens, {speed:,.0f} tokens/s")
            bar.update()
            saves = (step + 1) % config.save_every == 0 or step + 1 == len(steps)
            if saves and not all(weights.isfinite().all() for weights in trainer.parameters):
                raise InputError(f"step {step + 1}: the weights are no longer finite; a lower --lr may help")
            if main:
                metrics.append(row)
                if saves and step + 1 < len(steps):
                    trainer.save(checkpoint, step + 1, data.hexdigest())
    seconds, gpu = time.monotonic() - began, trainer.device.type == "cuda"
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if main:
        metrics.close()
    return {
        "steps": len(steps),
        "loss": loss,
        "trained_parameters": len(trainer.gradient),
        "micro_tokens": trainer.micro_tokens,
        "checkpointing": trainer.model.is_activation_checkpointing,
        "device": torch.cuda.get_device_name(trainer.device) if gpu else "cpu",
        "processes": trainer.size,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(trainer.device) if gpu else memory,
    }


def run_fit(config):
    """Fine-tune a model on conversations."""
    try:
        summary = fit(config)
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
    example: int = option(1, "which conversation to print, from 1", above=0)


def show(config):
    """Print a conversation with its trained tokens in green, the others dimmed, and the data's token counts."""
    tokenizer = models.load_tokenizer(config.model)
    conversations, record, counts = read_conversations(tokenizer, config, weighing(config))
    if config.example > len(conversations):
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
    merge = models.MergeConfig, models.merge_adapter
    commands = {"fit": (Config, run_fit), "show": (ShowConfig, show), "merge": merge}
    common.run_command_line(__doc__, commands, default="fit", argv=argv)


if __name__ == "__main__":
    main()
