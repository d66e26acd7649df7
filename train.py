"""Fine-tune a student on a teacher's conversations: the loss of Eq. 2 (reasoning) and Eq. 4 (agent distillation).

    python train.py trajectories.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --out student        # the paper's settings
    python train.py show trajectories.jsonl --model Qwen/Qwen2.5-0.5B-Instruct                 # what is trained
    python train.py merge student --out student-merged                                         # adapter -> full model
    torchrun --nproc-per-node 8 train.py trajectories.jsonl --model ... --out ... [--parallel fsdp]

Both equations are one loss, -sum log p(token | everything before it) over the assistant's tokens. In Eq. 2 these are
the chain of thought and the answer; in Eq. 4 the thoughts and actions (r_t, a_t) of every step. Questions and
observations o_t are read by the student and never trained: they are the environment's words, not the teacher's.

chat.py reads the rows and makes the mask, lora.py holds the adapters; the loss and the loop are here.
A killed run continues from its last checkpoint when the same command is given again, bit for bit on a CPU.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AttentionInterface, AutoModelForCausalLM

import lora
from chat import DataConfig, ShowConfig, encode, fingerprint, plan_steps, read_examples, render, show, split_step
from common import (
    REQUIRED,
    InputError,
    Journal,
    keep_config,
    option,
    parse_object,
    progress,
    replace_file,
    run_command_line,
    write_json,
)
from devices import Work, like, start_process, stop_process, uses_bf16, whole

MICRO_TOKENS = {"cuda": 16384, "cpu": 2048}  # at once, unless --micro-tokens says otherwise
load_model = lora.load_model
__all__ = ["Config", "encode", "fit", "load_model", "render"]


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
    micro_tokens: int | None = option(
        None, "tokens at once on one device (default: 16,384 on a GPU, 2,048 on a CPU); fewer where memory runs out"
    )
    beta2: float = option(0.999, "AdamW's second moment (HF default)")
    weight_decay: float = option(0.0, "AdamW's decay of the weight matrices (HF default)")
    clip: float = option(1.0, "largest gradient norm (HF default)")
    seed: int = option(42, "data order, adapter initialisation, dropout (the authors' value)")
    precision: Literal["auto", "bf16", "fp32"] = option(
        "auto", "bf16 autocast (paper), where the hardware has instructions for it, over float32 trained weights"
    )
    parallel: Literal["ddp", "fsdp"] = option("ddp", "under torchrun: a copy of the model each, or its shards")
    checkpointing: bool = option(
        False,
        "recompute activations in the backward pass, always: slower, much less memory (default: on one device, "
        "for the examples that do not fit into its memory otherwise)",
    )
    compile: bool = option(False, "torch.compile the layers")
    save_every: int = option(100, "steps between checkpoints to resume from")
    validation: list[str] = option([], "JSONL files whose loss is measured, never trained")
    val_every: int | None = option(None, "steps between validations (default: only at the end)")
    threads: int | None = option(None, "CPU threads (default: torch's choice)")
    quiet: bool = option(False, "no progress bar and no summary")


# The student: a model whose forward pass is the loss.


class PackedAttention:
    """Causal attention in which examples laid end to end do not see each other, without padding or a mask.

    All other layers work token by token, so they take the packed sequence as it is; here it is taken apart and
    each example attends to itself, with PyTorch's fused kernel. That is exact and needs no package.
    """

    lengths = None  # of the examples in the batch; None: the batch is one sequence

    @torch.compiler.disable  # the lengths differ in every batch: compiled, each would be a program of its own
    def __call__(self, module, query, key, value, attention_mask, scaling=None, **options):
        # query (1, heads, tokens, size); key and value may have fewer heads
        if any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
            raise InputError("this architecture's attention is not a plain softmax; it cannot be trained here")
        window, longest = options.get("sliding_window"), max(self.lengths)
        if window is not None and longest > window:
            raise InputError(f"an example of {longest} tokens is longer than the model's window of {window}")
        groups = key.shape[1] != query.shape[1]
        # On a CPU the kernel is faster in float32, in which RoPE returns query and key, than in bf16.
        cpu = value.device.type == "cpu"
        dtype = torch.float32 if cpu else value.dtype
        parts = [x.to(dtype).split(self.lengths, dim=2) for x in (query, key, value)]
        with torch.autocast("cpu", enabled=False) if cpu else contextlib.nullcontext():
            outputs = [
                nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=groups)
                for q, k, v in zip(*parts, strict=True)
            ]
        return torch.cat(outputs, dim=2).transpose(1, 2).to(value.dtype), None  # (1, tokens, heads, size)


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
        device, n = hidden.device.type, len(hidden)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            # Rows of zeros up to a multiple of 64 change no gradient (see Student.forward for their use).
            h, w = nn.functional.pad(hidden.to(dtype), (0, 0, 0, -n % 64)), weight.to(dtype)
            targets = nn.functional.pad(targets, (0, -n % 64))
            loss = torch.zeros((), device=hidden.device)
            grad_hidden = torch.empty_like(h) if with_gradients else None
            grad_weight = (
                torch.zeros_like(weight, dtype=torch.float32) if with_gradients and weight.requires_grad else None
            )
            size = max(1, HeadLoss.CHUNK // len(w) // 64) * 64
            for start in range(0, n, size):
                rows = slice(start, start + size)
                target = targets[rows, None]
                logits = (h[rows] @ w.T).float()  # (chunk, words)
                normaliser = logits.logsumexp(dim=1, keepdim=True)
                loss += (normaliser - logits.gather(1, target))[: n - start].sum()
                if with_gradients:
                    gradient = logits.sub_(normaliser).exp_()  # d loss / d logits = softmax - one-hot
                    gradient.scatter_(1, target, gradient.gather(1, target) - 1)
                    gradient = gradient.to(dtype)
                    torch.mm(gradient, w, out=grad_hidden[rows])
                    if grad_weight is not None:
                        grad_weight += gradient.T @ h[rows]
            grad_hidden = grad_hidden[:n].to(hidden.dtype) if with_gradients else None
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, None if grad_weight is None else grad_weight * grad_loss, None, None


class Student(nn.Module):
    """The model with its loss: forward(micro-batch) -> sum over the trained tokens of -log p(token | before it).

    checkpoint_from: tokens of a micro-batch from which on its activations are not kept, but computed again in the
    backward pass.
    """

    def __init__(self, model, checkpoint_from=math.inf):
        super().__init__()
        model.set_attn_implementation("packed")
        self.model, self.checkpoint_from, self.lengths = model, checkpoint_from, []
        self.check_head()

    @torch.no_grad()
    def check_head(self):
        """Refuse a model whose logits are not hidden W^T: a bias, a scale or a soft cap would be left out."""
        ids = torch.arange(8)[None]
        packed_attention.lengths = [8]
        training, head = self.model.training, self.model.get_output_embeddings()
        self.model.eval()
        logits = nn.functional.linear(self.model.get_decoder()(ids, use_cache=False).last_hidden_state, head.weight)
        if not torch.allclose(logits, self.model(ids, use_cache=False).logits, rtol=0.02, atol=0.02):
            raise InputError(f"{type(self.model).__name__} does more than a linear layer to make its logits")
        self.model.train(training)

    def checkpoint(self, wanted):
        if wanted != self.model.is_activation_checkpointing:
            self.model.activation_checkpointing_enable() if wanted else self.model.activation_checkpointing_disable()

    def forward(self, examples):
        device = self.model.device
        # An untrained filler makes the size of a batch a multiple of 128: oneDNN keeps a compiled kernel for every size
        # it meets (measured: 290 MiB after 25 steps of a tiny model), and GPUs multiply such matrices faster.
        self.lengths = [len(example.ids) for example in examples]
        filler = -sum(self.lengths) % 128 if examples else 128
        packed_attention.lengths = self.lengths + [filler] * (filler > 0)
        self.checkpoint(sum(self.lengths) >= self.checkpoint_from)
        ids = torch.cat([example.ids for example in examples] + [torch.zeros(filler, dtype=torch.int64)])  # (tokens,)
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


def build_student(config, process, bf16):
    """The student to train, on its device, and the name of its base model."""
    adapter = lora.is_adapter(config.model)
    if adapter and config.tuning == "full":
        raise InputError(f"{config.model} is an adapter: train it with --tuning lora, or merge it first")
    base = lora.read_config(config.model)["base_model_name_or_path"] if adapter else config.model
    # What is trained is float32; a frozen base may be bf16.
    dtype = torch.bfloat16 if bf16 and config.tuning == "lora" else torch.float32
    model = lora.from_pretrained(AutoModelForCausalLM, base, dtype=dtype)
    if adapter:
        lora.load(model, config.model, config.dropout)
    elif config.tuning == "lora":
        lora.add(model, config.rank, config.alpha, config.dropout)
    student = Student(model, checkpoint_from=0 if config.checkpointing else math.inf).train()
    if config.parallel == "ddp" or process.size == 1:  # FSDP takes each layer's shard to the device
        student.to(process.device)
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
    mesh = init_device_mesh(process.device.type, (process.size,))
    for layer in student.model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(student, mesh=mesh)


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


def accumulate_what_fits(call, student, batch, config, process, bf16, seed):
    """accumulate for the examples of one step, in micro-batches that fit into memory; dropout is drawn from seed.

    Where memory runs out, micro-batches become smaller, and examples that are too long alone are checkpointed:
    config.micro_tokens and student.checkpoint_from say so from then on. The gradients are the same. Several processes
    would have to agree, so there, and where nothing is left to try, it is an InputError.
    """
    trained_tokens = sum(len(example.trained) for example in batch)
    while True:
        torch.manual_seed(seed)
        micro_batches = split_step(batch, config.micro_tokens, process.size)[process.rank]
        try:
            return accumulate(call, micro_batches, trained_tokens, process, bf16)
        except torch.OutOfMemoryError:
            pass  # only from here on are the tensors of that attempt gone
        tokens, several = sum(student.lengths), len(student.lengths) > 1
        kept = tokens < student.checkpoint_from  # its activations
        if process.size == 1 and several:
            config.micro_tokens = tokens // 2
        elif process.size == 1 and kept and student.model.supports_gradient_checkpointing:
            student.checkpoint_from = tokens
        else:
            ways = [f"--micro-tokens {tokens // 2}"] * several + ["--checkpointing"] * kept
            advice = " or ".join(ways) or "--max-length, a smaller model or --parallel fsdp"
            raise InputError(f"{tokens:,} tokens at once do not fit into the device's memory; try {advice}")
        student.zero_grad()
        torch.cuda.empty_cache()


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


def save_checkpoint(path, step, student, optimizer, data, write):
    """All that the rest of the run depends on: the order of the data and the dropout follow from seed and step."""
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    moments = {name: {k: whole(v) for k, v in optimizer.state[p].items()} for name, p in named}
    weights = {name: whole(p) for name, p in named}
    if write:
        with replace_file(path, "wb") as file:
            torch.save({"step": step, "data": data, "weights": weights, "moments": moments}, file)


def load_checkpoint(path, student, optimizer, data):
    """The number of steps done: 0 if there is no checkpoint."""
    if not path.exists():
        return 0
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint["data"] != data:
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


class Log:
    """metrics.jsonl, a row a step. A row is written one step late, so that nothing waits for the device."""

    def __init__(self, path, done, write):
        self.journal, self.rows, self.waiting = None, [], []
        if write:
            if path.exists():  # rows of steps after the checkpoint will be made again
                with Journal(path) as journal:
                    self.rows = [row for row in journal.rows if row["step"] <= done]
                with replace_file(path) as file:
                    file.writelines(json.dumps(row) + "\n" for row in self.rows)
            self.journal = Journal(path)

    def close(self):
        if self.journal:
            self.journal.close()

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
            self.rows.append(row)
            if self.journal:
                self.journal.append(row)


def fit(config):
    """Fine-tune a model on conversations. Returns the summary that is also written to out/summary.json."""
    for name in (
        "rank",
        "lr",
        "epochs",
        "batch_size",
        "batch_tokens",
        "micro_tokens",
        "clip",
        "save_every",
        "val_every",
    ):
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be above 0")
    process = start_process(config)
    out, quiet = Path(config.out), config.quiet or not process.first
    may_change = ("save_every", "threads", "quiet")
    if (out / "run.json").exists() and process.first:
        keep_config(out / "run.json", config, may_change)
    if (out / "summary.json").exists():
        summary = parse_object((out / "summary.json").read_bytes(), f"{out}/summary.json")
        if not quiet:
            print(f"{out} is finished", file=sys.stderr)
        return summary
    given, config = config, dataclasses.replace(config)
    config.micro_tokens = config.micro_tokens or MICRO_TOKENS[process.device.type]
    bf16 = uses_bf16(config, process.device)

    tokenizer = lora.load_tokenizer(config.model)
    examples, counts = read_examples(config.data, tokenizer, config, quiet)
    validation = read_examples(config.validation, tokenizer, config, quiet)[0] if config.validation else []
    steps, data = plan_steps(examples, config), fingerprint(examples)

    torch.manual_seed(config.seed)  # the adapters' first weights
    student, base = build_student(config, process, bf16)
    call = distribute(student, config, process)
    optimizer = make_optimizer(student, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    checkpoint = out / "checkpoint" / "state.pt"
    done = load_checkpoint(checkpoint, student, optimizer, data)
    if process.first:  # only now that data and model are known to be good
        keep_config(out / "run.json", given, may_change)
    work = Work(student, process)
    with (
        contextlib.closing(Log(out / "metrics.jsonl", done, process.first)) as log,
        progress(total=len(steps), desc=f"training {out.name}", unit="step", quiet=quiet) as bar,
    ):
        bar.update(done)
        for step in range(done, len(steps)):
            batch = [examples[i] for i in steps[step]]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, len(steps), config)
            # Dropout is drawn from (seed, step, process), so that a resumed run draws what it would have drawn.
            seed = hash((config.seed, step, process.rank))
            loss = accumulate_what_fits(call, student, batch, config, process, bf16, seed)
            norm = nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            optimizer.zero_grad()

            work.add(batch)
            row = {"step": step + 1, "loss": loss, "gradient_norm": norm, "lr": learning_rate(step, len(steps), config)}
            row |= {
                "tokens": sum(len(example.ids) for example in batch),
                "trained_tokens": sum(len(example.trained) for example in batch),
            }
            if validation and (step + 1) in (len(steps), *range(0, len(steps), config.val_every or len(steps))):
                row["validation_loss"] = validation_loss(call, validation, config, process, bf16)
            log.add(row)
            if log.rows:
                bar.set_postfix_str(f"loss {log.rows[-1]['loss']:.4f} {work}", refresh=False)
            bar.update()
            if (step + 1) % config.save_every == 0 and step + 1 < len(steps):
                log.flush()
                save_checkpoint(checkpoint, step + 1, student, optimizer, data, process.first)
        log.flush()
    results = {
        "steps": len(steps),
        "loss": log.rows[-1]["loss"],
        "validation_loss": log.rows[-1].get("validation_loss"),
    }
    memory = {"micro_tokens": config.micro_tokens, "checkpointed_from": student.checkpoint_from}
    results |= {"precision": "bf16" if bf16 else "fp32"} | {k: v for k, v in memory.items() if v < math.inf}
    summary = counts | results | work.summary()
    save_model(student.model, tokenizer, config, base, process.first)
    if process.first:
        write_json(out / "summary.json", summary)  # from here on the folder counts as finished
        shutil.rmtree(out / "checkpoint", ignore_errors=True)
    return summary


def run_fit(config):
    """Fine-tune a model on conversations."""
    try:
        summary = fit(config)
    except torch.OutOfMemoryError:
        less = "--tuning lora or --parallel fsdp take less"
        raise InputError(f"the model and its optimiser do not fit into the device's memory; {less}") from None
    if not config.quiet and int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(summary, indent=2))
    stop_process()


def main(argv=None):
    commands = {"fit": (Config, run_fit), "show": (ShowConfig, show), "merge": (lora.MergeConfig, lora.merge_adapter)}
    run_command_line(__doc__, commands, default="fit", argv=argv)


if __name__ == "__main__":
    main()
