"""Conversations as training data: which tokens there are, and which of them are in the loss.

    python train.py show trajectories.jsonl --model Qwen/Qwen2.5-0.5B-Instruct

This file makes the mask of Eq. 2 and Eq. 4, and is the only place that does. Rows of three kinds are read:
    {"messages": [{"role", "content"}, ...]}        conversations, the project's trajectories among them
    {"log_data": {"messages": [...]}}               the authors' published trajectories, converted on reading
    {"input_ids": [...], "loss_mask": [0, 1, ...]}  tokens; a 1 marks a token to be trained
"""

import dataclasses
import hashlib
import itertools
import re
import sys
from pathlib import Path
from typing import Literal

import torch

import lora
from common import REQUIRED, InputError, option, progress, read_jsonl


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


# Llama 3's template prints today's date unless it is told one: then today's model would not be tomorrow's.
TEMPLATE_OPTIONS = {"date_string": "26 Jul 2024"}


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
                "goes on, so training would not be what inference is; use a template that shows a turn one way"
            )
        if not whole[len(context) :].lstrip().startswith(messages[i]["content"].strip()):
            raise InputError(
                f"messages[{i}]: the chat template does not print this turn's content as it is, as templates that "
                "strip the thinking of earlier turns do; use one that prints every turn whole"
            )
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
        if (token := tokenizer.convert_ids_to_tokens(ids[end])) in messages[i]["content"]:
            raise InputError(f"messages[{i}]: the content contains the special token {token}, which would end the turn")
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
        ids, mask, words = row["input_ids"], row.get("loss_mask"), len(tokenizer)
        if not isinstance(mask, list) or len(mask) != len(ids) or not set(mask) <= {0, 1}:
            raise InputError("loss_mask must be a list of 0 and 1, as long as input_ids")
        if not all(isinstance(id, int) and 0 <= id < words for id in ids):
            raise InputError(f"input_ids must be whole numbers below {words}, the size of the vocabulary")
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


def fingerprint(examples):
    """Tells a checkpoint made with these examples from one made with others."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.ids.numpy().tobytes() + example.trained.numpy().tobytes())
    return digest.hexdigest()


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


@dataclasses.dataclass(kw_only=True)
class ShowConfig(DataConfig):
    example: int = option(1, "which example to print, from 1")


def show(config):
    """Print an example with its trained tokens in green, the others dimmed, and the data's token counts."""
    tokenizer = lora.load_tokenizer(config.model)
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
