"""Evaluate students: eight benchmarks, greedy or SC-action, with Hugging Face generate.

    python evaluate.py test/*.json --model runs/student --search runs/index --out runs/eval/agent-greedy
    python evaluate.py test/*.json --model runs/student --search runs/index --out runs/eval/agent-sc8 --sc 8
    python evaluate.py test/*.json --url http://127.0.0.1:8000/v1 --method cot --out runs/eval/served-cot
    torchrun --nproc-per-node 8 evaluate.py test/*.json ...      # each process answers a part of the questions
    python evaluate.py report runs/eval
    python evaluate.py compare runs/eval/agent-greedy runs/eval/agent-sc8
    python evaluate.py ask "Who founded the town where Ada Orr was born?" --model runs/student --search runs/index

Many episodes are open at once and advance in lockstep: one call of the student answers the turns of all of them, N
samples each; then their code runs in parallel, each in its own sandbox; finished episodes are replaced by the next
questions. The episode itself is agent_distill.agent_episode, the same generator that a teacher is driven through.

The same command continues an interrupted run. Greedy answers are then those of an uninterrupted run, up to rounding:
in bfloat16 the size of a batch can decide between two tokens that are almost equally likely. Sampled answers differ.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import gc
import hashlib
import itertools
import operator
import os
import random
import sys
from pathlib import Path
from typing import Literal

# Read when PyTorch is imported: idle threads stop spinning early. Spinning halves the speed beside a busy process.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
import transformers
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import agent_distill
import common
from agent_distill import STOP, Prompts, Running, TurnFailed, drive, task_key
from common import REQUIRED, InputError, grading, models, option, pictures, report, stable_seed
from common.client import JUDGE_SAMPLING, VERDICT, BadRequest, Client, Judge, Served, cut_at_stop, in_parallel

# ------------- The student


class GrowingLayer(DynamicLayer):
    """The keys and values of one layer, in buffers that are longer than needed.

    DynamicLayer copies itself for every new token, which takes half of SC-action's time on a CPU.
    """

    SPARE = 64  # tokens

    def update(self, keys, values, *args, **kwargs):
        start = self.get_seq_length()
        end = start + keys.shape[-2]
        if start == 0 or self.buffers[0].shape[-2] < end:
            self.buffers = [new.new_empty(*new.shape[:2], end + self.SPARE, new.shape[-1]) for new in (keys, values)]
            if start:
                self.buffers[0][..., :start, :], self.buffers[1][..., :start, :] = self.keys, self.values
        self.buffers[0][..., start:end, :], self.buffers[1][..., start:end, :] = keys, values
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)  # (rows, heads, tokens, size)
        self.is_initialized = True
        return self.keys, self.values

    def batch_select_indices(self, indices):
        end = self.get_seq_length()
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)


class SampleNucleus(transformers.LogitsProcessor):
    """Temperature and, with top_p < 1, nucleus sampling among the HEAD likeliest tokens. All scores but that of the
    drawn token become -inf, so generate is called with do_sample=False.

    transformers' own top-p sorts the whole vocabulary: 24 instead of 2 ms per token on a CPU with Qwen2.5's 151,936.
    """

    HEAD = 256

    def __init__(self, temperature, top_p):
        self.temperature = temperature
        self.top_p = top_p

    def __call__(self, input_ids, scores):
        head = min(self.HEAD, scores.shape[-1]) if self.top_p < 1 else scores.shape[-1]
        p, tokens = (scores / self.temperature).softmax(-1).topk(head)  # (rows, head)
        p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0)  # kept: the smallest set that holds top_p
        drawn = tokens.gather(-1, p.multinomial(1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0)


@dataclasses.dataclass
class Sample:
    """One text while it is written. ids: its tokens, at most `limit`, with the end-of-turn token.

    thinks: the text with which the prompt opens the thinking. ended: None, "end of turn", "stop string" or "limit".
    """

    limit: int
    thinks: str = ""
    ids: list = dataclasses.field(default_factory=list)
    text: str = ""
    ended: str | None = None


@dataclasses.dataclass
class Answer:
    """n candidate texts for one turn. completion_tokens: of all texts. truncated: texts cut at the token limit."""

    texts: list
    prompt_tokens: int
    completion_tokens: int
    truncated: int


class Student:
    """A Hugging Face model that answers the turns of many episodes, n candidates each.

    model, tokenizer: as from load_model. temperature: 0 is greedy; otherwise candidates are sampled, with top_p.
    batch: turns in one generate call; by default those of 64 samples on a CPU, and of 256 on a GPU. It is halved when
    memory runs out, and grows again by one turn with each call. on_tokens: called with the number of new tokens while
    they come.
    Raises InputError for a model whose answers would depend on the other rows of the batch.
    """

    def __init__(
        self, model, tokenizer, n=1, temperature=0.0, top_p=0.8, max_tokens=1024, batch=None, seed=0, on_tokens=None
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.n = n
        self.max_tokens = max_tokens
        self.seed = seed
        self.on_tokens = on_tokens or (lambda tokens: None)
        self.processors = [SampleNucleus(temperature, top_p)] if temperature > 0 else []
        # Tokens per generate call. After each, finished rows are removed from the batch: on a CPU, SC-action was 1.2
        # times as fast with 4 as with 16. On a GPU, where rows cost little, longer segments are faster.
        self.segment, samples = (4, 64) if model.device.type == "cpu" else (16, 256)
        self.ends = end_tokens(model, tokenizer)
        config = model.config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", None) or 10**9
        layers, ropes = transformers.DynamicCache(config=config).layers, models.rope_types(config)
        odd = {type(layer).__name__ for layer in layers} - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
        odd |= {f"{kind} rope" for kind in ropes if "dynamic" in kind}
        if odd:
            raise InputError(f"{', '.join(odd)} is not supported: serve the model and give its --url")
        self.layers = len(layers)
        self.one_by_one = "longrope" in ropes  # its factors depend on the longest sequence of the batch
        # The last call's prompts and their caches: an episode's next prompt begins with its last one, and is read from
        # there. A new episode's prompt begins as the first of all did: with the instructions, often with long examples.
        self.known = {}
        self.first = None
        self.keeps_caches = not self.one_by_one
        self.largest_batch = batch or max(1, samples // n)
        self.batch = self.largest_batch
        self.calls = 0  # of write

    def answer(self, turns, stop=()):
        """Returns an Answer for each turn, or None for a turn that is too long for the model's context.

        Raises InputError if a single turn does not fit the memory.
        """
        texts = [models.render(self.tokenizer, turn.messages, reply=True) + turn.opening for turn in turns]
        prompts = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        todo = sorted((i for i, ids in enumerate(prompts) if len(ids) < self.context), key=lambda i: len(prompts[i]))
        answers, read = [None] * len(turns), {}
        self.batch = min(self.largest_batch, self.batch + 1)
        while todo:
            chunk, groups = todo[: 1 if self.one_by_one else self.batch], None
            with contextlib.suppress(torch.OutOfMemoryError):
                groups = self.write([prompts[i] for i in chunk], stop, read)
            if groups is None:  # the failed attempt's tensors are freed only after the with block
                read = {}
                self.use_less_memory([prompts[i] for i in chunk])
                continue
            for i, samples in zip(chunk, groups, strict=True):
                counts = sum(len(s.ids) for s in samples), sum(s.ended == "limit" for s in samples)
                answers[i] = Answer([s.text for s in samples], len(prompts[i]), *counts)
            todo = todo[len(chunk) :]
        self.known = read
        return answers

    def use_less_memory(self, prompts):
        """Keep no caches and halve the batch, after these prompts did not fit; InputError if that is impossible."""
        if len(prompts) == 1 and not self.keeps_caches:
            tokens = f"{len(prompts[0]):,} + {self.max_tokens:,} tokens, {self.n} times"
            raise InputError(f"{tokens}, do not fit into the memory of {self.model.device}")
        self.keeps_caches = False
        self.known, self.first = {}, None
        self.batch = max(1, len(prompts) // 2)
        gc.collect()
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def write(self, prompts, stop=(), read=None):
        """Returns n Samples for each prompt, a list of at least two token ids. read: gets the prompts' caches."""
        longest, device = max(map(len, prompts)), self.model.device
        caches = [self._read(prompt[:-1]) for prompt in prompts]  # without the last tokens: generate begins there
        cache = self._join(caches)
        if read is not None and self.keeps_caches:
            read |= {tuple(prompt[:-1]): cache for prompt, cache in zip(prompts, caches, strict=True)}
        del caches
        samples, ids, mask = [], [], []
        for prompt in prompts:
            padding = longest - len(prompt)
            thinks = "<think>" if self.tokenizer.decode(prompt[-16:]).rstrip().endswith("<think>") else ""
            # The limit depends on the prompt alone, not on longer ones beside it.
            samples += [Sample(min(self.max_tokens, self.context - len(prompt)), thinks) for _ in range(self.n)]
            ids += [[min(self.ends)] * padding + prompt] * self.n
            mask += [[0] * padding + [1] * len(prompt)] * self.n
        ids, mask = torch.tensor(ids, device=device), torch.tensor(mask, device=device)  # (prompts * n, longest)
        self.calls += 1
        torch.manual_seed(stable_seed(self.seed, self.calls))  # a turn that is asked again gets other samples
        going = samples
        while going:
            segment = min(self.segment, *(sample.limit - len(sample.ids) for sample in going))
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=segment, do_sample=False,
                logits_processor=self.processors, return_dict_in_generate=True,
            )  # fmt: skip
            ids, cache = out.sequences, out.past_key_values  # with longrope, generate may return a new cache
            new = ids[:, mask.shape[1] :]
            mask = torch.cat([mask, torch.ones_like(new)], 1)
            for sample, tokens in zip(going, new.tolist(), strict=True):
                self._extend(sample, tokens, stop)
            self.on_tokens(new.numel())
            rows = [row for row, sample in enumerate(going) if not sample.ended]
            if 0 < len(rows) < len(going):
                kept = torch.tensor(rows, device=device)
                cache.batch_select_indices(kept)
                ids, mask = ids[kept], mask[kept]
            going = [going[row] for row in rows]
        return [samples[i : i + self.n] for i in range(0, len(samples), self.n)]

    def _read(self, prompt):
        """Returns the cache of a prompt. Other prompts cannot change it: it is read alone."""
        begun = ()
        for old in self.known:
            ends_alike = prompt[len(old) - 1 : len(old)] == [old[-1]]  # spares most of the comparisons below
            if ends_alike and len(old) > len(begun) and tuple(prompt[: len(old)]) == old:
                begun = old
        cache = self.known.pop(begun, None) or transformers.Cache(layers=[DynamicLayer() for _ in range(self.layers)])
        done = len(begun)
        if not begun and self.first:
            done = len([*itertools.takewhile(bool, map(operator.eq, self.first[0], prompt))])
            for layer, first in zip(cache.layers, self.first[1].layers, strict=True):
                layer.update(first.keys[..., :done, :], first.values[..., :done, :])
        if done < len(prompt):
            ids = torch.tensor([prompt[done:]], device=self.model.device)
            self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        if self.keeps_caches and not self.first:
            self.first = prompt, cache
        return cache

    def _join(self, caches):
        """Returns one cache with n rows for each of these, padded on the left."""
        longest = max(cache.get_seq_length() for cache in caches)
        joined = transformers.Cache(layers=[GrowingLayer() for _ in range(self.layers)])
        for number, layer in enumerate(joined.layers):
            sides = []
            for name in ("keys", "values"):  # of (1, heads, tokens, size)
                alone = [getattr(cache.layers[number], name) for cache in caches]
                rows = [pad(one, (0, 0, longest - one.shape[-2], 0)) for one in alone]
                sides.append(torch.cat(rows).repeat_interleave(self.n, 0))  # (prompts * n, heads, longest, size)
            layer.update(*sides)
        return joined

    def _extend(self, sample, tokens, stop):
        """Add new tokens to a sample, and check whether they end it."""
        end = next((i for i, token in enumerate(tokens) if token in self.ends), None)
        text = sample.thinks + self.tokenizer.decode(sample.ids + tokens[:end], skip_special_tokens=True)
        sample.ids += tokens if end is None else tokens[: end + 1]
        sample.text = cut_at_stop(text, stop)
        if sample.text != text:
            sample.ids = self.tokenizer(sample.text, add_special_tokens=False)["input_ids"]
            sample.ended = "stop string"
        elif end is not None:
            sample.ended = "end of turn"
        elif len(sample.ids) == sample.limit:
            sample.ended = "limit"


def end_tokens(model, tokenizer):
    """Returns the ids that end a turn. From then on, model.generate uses nothing else of the checkpoint's
    generation_config: its repetition_penalty, top_k, ... would change the answers.
    """
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    with contextlib.suppress(InputError):  # the token with which the template ends a reply, as training teaches it
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        [reply] = models.find_replies(tokenizer, chat)
        ends.add(tokenizer.convert_tokens_to_ids(reply.text[reply.start + len(reply.content) : reply.end].strip()))
    if not ends:
        raise InputError("neither the tokenizer nor the generation_config names a token that ends a turn")
    padding = min(ends) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.generation_config = transformers.GenerationConfig(eos_token_id=sorted(ends), pad_token_id=padding)
    return ends | {padding}


# ------------- Episodes in lockstep

TOO_LONG = "the conversation is longer than the model's context"


def run_lockstep(episodes, student, stop=(), workers=16):
    """Drive (key, generator) pairs to their ends. Yields (key, Episode, usage) as they finish.

    episodes is consumed lazily: student.batch of them are open at once. Their code runs in `workers` threads.
    """
    episodes, waiting = iter(episodes), {}  # key -> (Running, usage)
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        while True:
            new = list(itertools.islice(episodes, max(0, student.batch - len(waiting))))
            for (key, _), running in zip(new, pool.map(Running, [episode for _, episode in new]), strict=True):
                waiting[key] = running, collections.Counter()
            if not waiting:
                return
            opened, candidates = [running for running, _ in waiting.values()], []
            answers = student.answer([running.turn for running in opened], stop)
            for (_, usage), answer in zip(waiting.values(), answers, strict=True):
                if answer is None:
                    candidates.append(TurnFailed(TOO_LONG))
                else:
                    counts = dataclasses.asdict(answer)
                    candidates.append(counts.pop("texts"))
                    usage.update(counts)
            list(pool.map(Running.advance, opened, candidates))
            for key in [key for key, (running, _) in waiting.items() if running.turn is None]:
                running, usage = waiting.pop(key)
                yield key, running.result, usage
    finally:
        pool.shutdown(cancel_futures=True)
        for running, _ in waiting.values():
            running.episode.close()


# ------------- Who answers: a model loaded here, or one behind a server

SC_TEMPERATURE = 0.4  # the paper's


@dataclasses.dataclass(kw_only=True)
class SolverConfig(agent_distill.EpisodeConfig):
    """Who answers and how: what `run` and `ask` have in common. Defaults are the paper's."""

    model: str | None = option(None, "Hugging Face name or folder, or an adapter; with --url, the server's name for it")
    url: str | None = option(None, "address of a served model, ending in /v1", changes_results=False)
    method: Literal["agent", "cot", "cot-rag"] = option("agent", "agent, chain of thought, or CoT with passages")
    sc: int = option(1, "candidates per step; 8: the paper's SC-action (cot: self-consistency)", above=0, at_most=100)
    temperature: float | None = option(None, "0 is greedy (default: 0; with --sc above 1, 0.4: paper)", at_least=0)
    top_p: float = option(0.8, "of sampled candidates (paper: 0.8)", above=0, at_most=1)
    system_prompt: str | None = option(None, "file (default: the prompt of the training)", changes_results=False)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...", changes_results=False)
    precision: Literal["auto", "bf16", "fp32"] = option("auto", "of weights; auto: bf16 where the hardware has it")
    batch: int | None = option(None, "episodes at once (default: see Student)", above=0, changes_results=False)
    concurrency: int = option(16, "sandboxes or requests to a server at once", above=0, changes_results=False)
    seed: int = option(0, "seeds the sampling")


def sampling(config):
    """Returns the settings of generation: temperature (0 is greedy), max_tokens and, where it is sampled, top_p."""
    temperature = (SC_TEMPERATURE if config.sc > 1 else 0.0) if config.temperature is None else config.temperature
    nucleus = {"top_p": config.top_p} if temperature > 0 else {}
    return {"temperature": temperature, "max_tokens": config.max_tokens} | nucleus


def check(config, kinds=()):
    """Check the options, and what they name, before anything is loaded. kinds: those of the tasks.

    Returns (prompts, the system prompt, facts): what results depend on besides the options, for common.keep_config.
    """
    if not (config.model or config.url):
        raise InputError("no student: name a model with --model, or a server with --url")
    temperature = sampling(config)["temperature"]
    if config.sc > 1 and temperature == 0:
        raise InputError("--temperature 0 samples equal candidates: leave out --sc for greedy answers")
    if temperature == 0:
        common.refuse(config, ["top_p"], "greedy answers do not use it; add --temperature or --sc")
    if config.url:
        common.refuse(config, ["batch", "precision"], "not used with --url")
    else:
        common.refuse(config, ["api_key_env"], "there is no --url")
    if config.sc == 1:
        common.refuse(config, ["choose"], "one candidate leaves no choice; add --sc")
    prompts = Prompts(config.prompts)
    facts = agent_distill.check_options(config, prompts, kinds) | {"temperature": temperature}
    system = choose_system_prompt(config, prompts, facts.get("tool_names", []))
    facts["system_prompt_sha256"] = hashlib.sha256(system.encode()).hexdigest()
    for name in ("adapter_model.safetensors", "summary.json"):  # what training writes, so that a new one is noticed
        if config.model and (Path(config.model) / name).is_file():
            facts[f"{name}_sha256"] = common.file_hash(Path(config.model) / name)
    collected_with = models.training_record(config.model).get("prompts_sha256")
    if collected_with not in (None, facts["prompts_sha256"]) and config.method == "agent":
        print(f"note: {config.model} learned from trajectories with other prompts than --prompts has", file=sys.stderr)
    if not config.url:
        bf16 = models.uses_bf16(config.precision, models.choose_device(config.device))
        facts["precision"] = "bf16" if bf16 else "fp32"
    return prompts, system, facts


def choose_system_prompt(config, prompts, tools):
    """Returns the text of --system-prompt, or of the training, or for an untrained model the long one with examples."""
    record = models.training_record(config.model)
    same = record.get("method") in (None, config.method.split("-")[0])  # None: the data did not state it
    trained, usual = record.get("system_prompt") if same else None, prompts.cot_system
    if config.method == "agent":
        usual = prompts.system("agent_student_system" if trained else "agent_system", tools, config.max_steps)
    text = common.read_text(config.system_prompt) if config.system_prompt else trained or usual
    if trained not in (None, text):
        print(f"note: {config.model} was trained with another system prompt: {trained!r}", file=sys.stderr)
    elif trained not in (None, usual):
        print(f"note: {config.model} keeps the system prompt of its training; --prompts has another", file=sys.stderr)
    if unnamed := [tool for tool in tools if f"{tool}(" not in text]:
        print(f"note: the system prompt does not name the tools {', '.join(unnamed)}", file=sys.stderr)
    return text


class Solver:
    """A student with its prompts and tools, ready to answer questions.

    prompts, system: as from check. client: of --url. on_tokens: see Student. about: what model.json says.
    """

    def __init__(self, config, prompts, system, client=None, on_tokens=None):
        self.config = config
        self.prompts = prompts
        self.system = system
        self.stop = STOP if config.method == "agent" else []
        device = models.choose_device(config.device)
        self.tools = agent_distill.open_tools(config, prompts, device)  # first, while there is free memory
        record = models.training_record(config.model)
        self.about = {"model": config.model, "parameters": None, "training": record.get("training") or "none"}
        if client:
            options = {"template_options": models.TEMPLATE_OPTIONS, "stop": self.stop or None}
            self.student = Served(client, **options, **sampling(config))
            self.student.probe(config.sc)
            self.about["model"] = client.model
        else:
            dtype = torch.bfloat16 if models.uses_bf16(config.precision, device) else torch.float32
            model, tokenizer = models.load_model(config.model, device, dtype)
            options = {"n": config.sc, "batch": config.batch, "seed": config.seed, "on_tokens": on_tokens}
            self.student = Student(model, tokenizer, **options, **sampling(config))
            adapters = sum(layer.a.numel() + layer.b.numel() for _, layer in models.lora_layers(model))
            self.about["parameters"] = model.num_parameters() - adapters

    def episode(self, question, kind=None, key=()):
        options = {"system": self.system, "kind": kind, "rng": random.Random(stable_seed(self.config.seed, *key))}
        return agent_distill.open_episode(self.config, question, self.prompts, self.tools, **options)

    def answer(self, episodes):
        """Drive (key, generator) pairs to their ends. Yields (key, Episode, usage) as they finish."""
        if isinstance(self.student, Student):
            return run_lockstep(episodes, self.student, self.stop, self.config.concurrency)
        return in_parallel(self._ask_server, episodes, self.config.concurrency)

    def candidates(self, turn, usage, seed=None):
        """Returns the texts of one turn alone. Raises BadRequest if no model can answer it."""
        if isinstance(self.student, Served):
            return self.student.answer(turn, usage, n=self.config.sc, seed=seed)
        [answer] = self.student.answer([turn], self.stop)
        if answer is None:
            raise BadRequest(TOO_LONG)
        return answer.texts

    def _ask_server(self, item):
        (key, episode), usage = item, collections.Counter()
        seeds = (stable_seed(self.config.seed, *key, step) for step in itertools.count())
        return key, drive(episode, lambda turn: self.candidates(turn, usage, next(seeds))), usage


# ------------- run, regrade


@dataclasses.dataclass(kw_only=True)
class JudgeConfig:
    judge_url: str | None = option(None, "LLM judge of facts (default: exact match alone)", changes_results=False)
    judge_model: str = option("gpt-4o-mini", "its name at the server (paper: gpt-4o-mini)", changes_results=False)
    judge_key_env: str = option("OPENAI_API_KEY", "environment variable with the judge's key", changes_results=False)
    prompts: str = option(str(Prompts.default), "folder of prompts", changes_results=False)


@dataclasses.dataclass(kw_only=True)
class RunConfig(JudgeConfig, SolverConfig):
    tasks: list[str] = option(REQUIRED, 'JSONL or {"examples": [...]}', positional=True, changes_results=False)
    out: str = option(REQUIRED, "run folder; the same command continues there", changes_results=False)
    name: str | None = option(None, "the student's name in tables (default: --model)", changes_results=False)
    kind: Literal["fact", "math"] | None = option(None, "kind of the tasks, for files that do not state it")
    limit: int | None = option(None, "only the first n questions of each file", above=0, changes_results=False)
    quiet: bool = option(False, "no progress bar", changes_results=False)


def run(config):
    """Answer every question of the task files, grade the answers, write transcripts and results.json.

    Questions that ended in an error are asked again by the next run, but not those that are too long for the model.
    Returns exit status 1 if all ended in an error.
    """
    if not (config.name or "").isprintable():
        raise InputError(f"--name {config.name!r}: one line of text was expected")
    rank = int(os.environ.get("RANK", 0))  # torchrun sets it
    size = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
    tasks, out = common.load_tasks(config.tasks, config.kind, config.limit), Path(config.out)
    for task in tasks:
        task.setdefault("domain", report.TASKS[task["task"]].domain if task["task"] in report.TASKS else "out")
    prompts, system, facts = check(config, {task["kind"] for task in tasks})
    check_judge(config)
    mine = {task_key(task): task for task in tasks[rank::size]}
    with common.Journal(out / f"transcripts.{rank}.jsonl", report.GRADED) as journal:
        rows = [row for path in report.transcript_files(out) for row in report.transcripts(path, report.GRADED)]
        done = {task_key(row) for row in rows if row["stop"] != "error" or row.get("error") == TOO_LONG}
        todo = {key: task for key, task in mine.items() if key not in done}
        client = Client(config.url, config.model, config.api_key_env) if config.url and todo else None
        if config.url and not config.model:
            about = out / "model.json"
            known = common.parse_object(about.read_bytes(), about).get("model") if about.exists() else None
            facts["model"] = client.model if client else known
        notes = {"questions": collections.Counter(task["task"] for task in tasks)}
        common.keep_config(out / "run.json", config, binding=bool(done), notes=notes, **facts)
        if todo and config.judge_url:  # fails before the generation if the judge does not answer
            Client(config.judge_url, config.judge_model, config.judge_key_env).probe(**JUDGE_SAMPLING)
        if todo:
            _answer_all(config, (prompts, system, client), todo, len(mine), journal)
    current = {(task["task"], task["id"]): task for task in tasks}
    with open_judge(config, out, rank) as judge:  # asked at the end, so that the generation does not wait
        for path in report.transcript_files(out):
            if int(path.name.split(".")[1]) % size == rank:  # also files of an earlier run with more processes
                regrade_file(path, judge, config.quiet, current)
    return summarise(out)


def summarise(folder):
    """Write results.json and print a line about the run. Returns the exit status: 1 if all ended in an error."""
    line, all_failed = report.summarise(folder)
    print(f"{folder}: {line}")
    return int(all_failed)


def _answer_all(config, parts, todo, total, journal):
    counts = collections.Counter()
    with common.progress(total=total, done=total - len(todo), desc=Path(config.out).name, quiet=config.quiet) as bar:

        def show(questions=0, **new):
            counts.update(new)
            bar.set_postfix_str(", ".join(f"{count:,} {name}" for name, count in counts.items()), refresh=False)
            bar.miniters = 0  # redraw when it is time to, also without a new question
            bar.update(questions)

        solver = Solver(config, *parts, on_tokens=lambda tokens: show(tokens=tokens))
        common.write_json(Path(config.out) / "model.json", solver.about)
        episodes = ((key, solver.episode(task["question"], task["kind"], key[:2])) for key, task in todo.items())
        for key, episode, usage in solver.answer(episodes):
            journal.append(agent_distill.trajectory_row(todo[key], config.method, episode, usage))
            show(questions=1, right=journal.rows[-1]["correct"], steps=len(episode.steps))


def check_judge(config):
    """Raises InputError for options of a judge that is not asked, and for a prompt that it cannot be asked with."""
    if config.judge_url:
        Prompts(config.prompts).check("judge")
    else:
        common.refuse(config, ["judge_model", "judge_key_env"], "there is no --judge-url")


@contextlib.contextmanager
def open_judge(config, folder, rank=0):
    """Yields the judge of --judge-url, with its verdicts in the run folder; None without a URL."""
    if not config.judge_url:
        yield None
        return
    client = Client(config.judge_url, config.judge_model, config.judge_key_env, timeout=120.0)
    with common.Journal(Path(folder) / f"judge.{rank}.jsonl", VERDICT) as journal:
        yield Judge(client, Prompts(config.prompts), journal)


def regrade_file(path, judge, quiet=False, current=None):
    """Grade the rows of a transcript file again. Returns pairs of the old row and the new one.

    current: {(task, id): task} of a run, whose kinds and aliases count. Rows that answer another question than these
    are dropped, and without a judge, the grades of an earlier judge are kept.
    """
    current = current or {}

    def task_of(row):
        return current.get((row["task"], row["id"]), row)

    def grade(row):
        row = row | {name: task_of(row)[name] for name in ("kind", "aliases") if name in task_of(row)}
        if current and not judge and str(row.get("why")).startswith("judge"):
            return row
        answer = row["answer"], row.get("aliases") or (), row["question"]
        verdict = grading.grade(row["kind"], row["prediction"], *answer, judge)
        return row | {"correct": verdict.correct, "why": verdict.why}

    with common.Journal(path) as journal, concurrent.futures.ThreadPoolExecutor(8 if judge else 1) as pool:
        rows = report.transcripts(path, report.GRADED)
        old = [row for row in rows if task_key(task_of(row)) == task_key(row)]
        if len(old) < len(rows):
            print(f"note: {len(rows) - len(old)} rows of {path} answer other questions: left out", file=sys.stderr)
        new = list(common.progress(pool.map(grade, old), total=len(old), desc="grade", unit="answer", quiet=quiet))
        if new != journal.rows:
            common.write_jsonl(path, new)  # the lock is held until the file is replaced
    return list(zip(old, new, strict=True))


@dataclasses.dataclass(kw_only=True)
class RegradeConfig(JudgeConfig):
    folder: str = option(REQUIRED, "run folder", positional=True)


def regrade(config):
    """Grade the saved transcripts of a run again, without generating anything. Without a judge: by exact match."""
    check_judge(config)
    if not report.transcript_files(config.folder):
        raise InputError(f"{config.folder}: no transcripts in it")
    with open_judge(config, config.folder) as judge:
        pairs = [pair for path in report.transcript_files(config.folder) for pair in regrade_file(path, judge)]
    changed = sum(old["correct"] != new["correct"] for old, new in pairs)
    print(f"{changed} grades changed")
    return summarise(config.folder)


# ------------- report, compare, ask


@dataclasses.dataclass(kw_only=True)
class ReportConfig:
    folder: str = option(REQUIRED, "folder with run folders in it", positional=True)


def write_report(config):
    """Print the tables of all runs below a folder, and write report.md, report.html and the pictures there."""
    text = report.markdown(config.folder)
    files = {"report.md": text, "report.html": report.html(config.folder)} | pictures.pictures(config.folder)
    for name, content in files.items():
        with common.replace_file(Path(config.folder) / name) as file:
            file.write(content)
    print(text)


@dataclasses.dataclass(kw_only=True)
class CompareConfig:
    first: str = option(REQUIRED, "a run folder, or a file of trajectories", positional=True)
    second: str = option(REQUIRED, "another, on the same questions", positional=True)


def compare(config):
    """Compare two runs question by question: what only one of them got right, and McNemar's test of the difference."""
    print(report.compare(config.first, config.second))


@dataclasses.dataclass(kw_only=True)
class AskConfig(SolverConfig):
    question: str | None = option(None, "the question (default: questions are read from the terminal)", positional=True)


def ask(config):
    """Ask a student one question and print the steps as they come."""
    prompts, system, _ = check(config)
    client = Client(config.url, config.model, config.api_key_env) if config.url else None
    solver = Solver(config, prompts, system, client)
    questions = [config.question] if config.question else iter(lambda: input("question: ").strip(), "")
    with contextlib.suppress(EOFError):
        for question in questions:
            _ask_one(solver, question)


def _ask_one(solver, question):
    printed = 2  # the system prompt and the question are not shown

    def show(messages):
        nonlocal printed
        for message in messages[printed:]:
            print(message["content"], end="\n\n", flush=True)
        printed = len(messages)

    def answer(turn):
        show(turn.messages)
        return solver.candidates(turn, collections.Counter())

    episode = drive(solver.episode(question), answer)
    show(episode.messages)
    print(f"Answer: {episode.prediction!r} ({episode.error or episode.stop})")


if __name__ == "__main__":
    commands = {"run": (RunConfig, run), "regrade": (RegradeConfig, regrade), "report": (ReportConfig, write_report)}
    commands |= {"compare": (CompareConfig, compare), "ask": (AskConfig, ask)}
    common.run_command_line(__doc__, commands, default="run")
