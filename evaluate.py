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
import os
import random
import sys
from pathlib import Path
from typing import Literal

# Read when PyTorch is imported: its idle threads sleep early, so that a busy neighbour does not halve the speed.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
import transformers
from torch.nn.functional import pad

import agent_distill
import common
from agent_distill import STOP, EpisodeConfig, Prompts, Running, TurnFailed, drive, open_episode, open_tools
from common import REQUIRED, InputError, grading, option, pictures, report, stable_seed
from common.client import Client, Judge, Served, cut_at_stop, in_parallel
from common.models import (
    TEMPLATE_OPTIONS,
    choose_device,
    load_model,
    lora_layers,
    render,
    training_record,
    uses_bf16,
)

# ------------- The student


class GrowingLayer(transformers.cache_utils.DynamicLayer):
    """The keys and values of one layer, with room for SPARE more tokens.

    DynamicLayer copies itself for every new token; on a CPU, that takes half of the time of SC-action.
    """

    SPARE = 64  # tokens

    def __init__(self):
        super().__init__()
        self.room = {}  # "keys", "values" -> (rows, heads, tokens and spare room, size)

    def update(self, keys, values, *args, **kwargs):
        start = self.get_seq_length()
        end = start + keys.shape[-2]
        for name, new in (("keys", keys), ("values", values)):
            if start == 0 or self.room[name].shape[-2] < end:
                self.room[name] = new.new_empty(*new.shape[:2], end + self.SPARE, new.shape[-1])
                if start:
                    self.room[name][..., :start, :] = getattr(self, name)
            self.room[name][..., start:end, :] = new
            setattr(self, name, self.room[name][..., :end, :])
        self.is_initialized = True
        return self.keys, self.values

    def batch_select_indices(self, indices):
        length = self.get_seq_length()
        self.room = {name: room[indices] for name, room in self.room.items()}
        self.keys, self.values = (self.room[name][..., :length, :] for name in ("keys", "values"))


class SampleNucleus(transformers.LogitsProcessor):
    """Temperature and nucleus (top-p) sampling among the HEAD likeliest tokens. All scores but that of the drawn token
    become -inf, so generate is called with do_sample=False.

    transformers' top-p sorts the whole vocabulary for every token: 24 instead of 2 ms per sample and token on a CPU
    with Qwen2.5's 151,936 tokens. For a model that is unsure of its words, whose HEAD likeliest tokens hold less than
    top_p, this is top-k sampling.
    """

    HEAD = 256

    def __init__(self, temperature, top_p):
        self.temperature = temperature
        self.top_p = top_p

    def __call__(self, input_ids, scores):
        p, tokens = (scores / self.temperature).softmax(-1).topk(min(self.HEAD, scores.shape[-1]))  # (rows, HEAD)
        p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0)  # kept: the smallest set that holds top_p
        drawn = tokens.gather(-1, p.multinomial(1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0)


@dataclasses.dataclass
class Answer:
    """n candidate texts for one turn. completion_tokens: of all texts. truncated: texts cut at the token limit."""

    texts: list
    prompt_tokens: int
    completion_tokens: int
    truncated: int


@dataclasses.dataclass
class Sample:
    """One text while it is written.

    limit: of its tokens. ids: its tokens so far, with the end-of-turn token; up to a stop string if one ended it.
    ended: None, "end of turn", "stop string" or "limit".
    """

    limit: int
    ids: list = dataclasses.field(default_factory=list)
    text: str = ""
    ended: str | None = None


class BatchSize:
    """How many turns are answered at once: half as many when memory runs out, and twice as many some calls later."""

    PATIENCE = 8  # calls

    def __init__(self, largest):
        self.largest = largest
        self.now = largest
        self.calls = 0

    def shrink(self, tried):
        self.now = tried // 2
        self.calls = 0

    def grow(self):
        self.calls += 1
        if self.calls > self.PATIENCE:
            self.now = min(self.largest, 2 * self.now)
            self.calls = 0


def end_tokens(model, tokenizer):
    """Returns the ids that end a turn, and makes generate use nothing else of the checkpoint's generation_config.json.

    Its repetition_penalty, top_k, ... would change what is sampled, and greedy answers too.
    """
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    pad = min(ends) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.generation_config = transformers.GenerationConfig(eos_token_id=sorted(ends), pad_token_id=pad)
    return ends


class Student:
    """A Hugging Face model that answers the turns of many episodes, n candidates each.

    model, tokenizer: as from load_model. temperature: 0 is greedy; otherwise candidates are sampled, with top_p.
    largest_batch: turns in one generate call; by default what fits. It is halved when memory runs out, and grows again
    later. on_tokens: called with the number of new tokens while they are generated.
    Raises InputError for a model that cannot be asked in batches.
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
        self.ends = end_tokens(model, tokenizer)
        self.pad = model.generation_config.pad_token_id
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
        # Tokens per generate call. After each, the rows that have ended leave the batch: on a CPU, SC-action was 1.2
        # times as fast with 4 as with 16. On a GPU, where rows cost little, longer segments are faster.
        self.segment = 4 if model.device.type == "cpu" else 16
        self.layers, self.one_by_one = check_architecture(model.config.get_text_config())
        self.size = BatchSize(batch or batch_that_fits(model, n, max_tokens))
        self.drawn = 0  # generations so far

    @property
    def batch(self):
        return self.size.now

    def answer(self, turns, stop=()):
        """Returns an Answer for each turn, or None for a turn that is too long for the model's context.

        Raises InputError if a single turn does not fit the memory.
        """
        texts = [render(self.tokenizer, turn.messages, reply=True) + turn.opening for turn in turns]
        prompts = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        todo = sorted((i for i, ids in enumerate(prompts) if len(ids) < self.context), key=lambda i: len(prompts[i]))
        answers = [None] * len(turns)
        self.size.grow()
        while todo:
            chunk = todo[: 1 if self.one_by_one else self.batch]
            groups = None
            with contextlib.suppress(torch.OutOfMemoryError):
                groups = self.write([prompts[i] for i in chunk], stop)
            if groups is None:  # out of memory; the tensors of the attempt are freed only now
                if len(chunk) == 1:
                    tokens = f"{len(prompts[chunk[0]]):,} + {self.max_tokens:,} tokens, {self.n} times"
                    raise InputError(f"{tokens}, do not fit into the memory of {self.model.device}")
                self.size.shrink(len(chunk))
                gc.collect()
                torch.cuda.empty_cache()
                continue
            for i, samples in zip(chunk, groups, strict=True):
                written = sum(len(sample.ids) for sample in samples)
                truncated = sum(sample.ended == "limit" for sample in samples)
                answers[i] = Answer([sample.text for sample in samples], len(prompts[i]), written, truncated)
            todo = todo[len(chunk) :]
        return answers

    def _read(self, prompt):
        """Returns the cache of a prompt without its last token. It is read alone: nothing depends on its neighbours."""
        cache = transformers.Cache(layers=[transformers.cache_utils.DynamicLayer() for _ in range(self.layers)])
        ids = torch.tensor([prompt[:-1]], device=self.model.device)
        self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        return cache

    def _join(self, caches):
        """Returns one cache with n rows for each of these, padded on the left. The given ones are emptied."""
        longest = max(cache.get_seq_length() for cache in caches)
        joined = transformers.Cache(layers=[GrowingLayer() for _ in range(self.layers)])
        for layer in joined.layers:
            alone = [cache.layers.pop(0) for cache in caches]
            sides = []
            for name in ("keys", "values"):
                rows = [getattr(one, name) for one in alone]  # (1, heads, tokens, size) each
                rows = [pad(row, (0, 0, longest - row.shape[-2], 0)) for row in rows]
                sides.append(torch.cat(rows).repeat_interleave(self.n, 0))  # (prompts * n, heads, longest, size)
            layer.update(*sides)
        return joined

    @torch.inference_mode()
    def write(self, prompts, stop=()):
        """Returns n Samples for each prompt. prompts: lists of at least two token ids."""
        cache = self._join([self._read(prompt) for prompt in prompts])  # generate begins with the last tokens
        longest, device = max(map(len, prompts)), self.model.device
        samples, ids, mask = [], [], []
        for prompt in prompts:
            padding = longest - len(prompt)
            # The limit depends on the prompt alone, not on longer ones beside it.
            samples += [Sample(min(self.max_tokens, self.context - len(prompt))) for _ in range(self.n)]
            ids += [[self.pad] * padding + prompt] * self.n
            mask += [[0] * padding + [1] * len(prompt)] * self.n
        ids, mask = torch.tensor(ids, device=device), torch.tensor(mask, device=device)  # (prompts * n, longest)
        self.drawn += 1
        torch.manual_seed(stable_seed(self.seed, self.drawn))  # a turn that is asked again gets other samples
        going = samples
        while going:
            segment = min(self.segment, *(sample.limit - len(sample.ids) for sample in going))
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=segment, do_sample=False,
                logits_processor=self.processors, return_dict_in_generate=True,
            )  # fmt: skip
            ids, cache = out.sequences, out.past_key_values  # another cache where longrope has changed its factors
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

    def _extend(self, sample, tokens, stop):
        """Add the new tokens to a sample, and see whether they end it."""
        end = next((i for i, token in enumerate(tokens) if token in self.ends), None)
        text = self.tokenizer.decode(sample.ids + tokens[:end], skip_special_tokens=True)
        sample.ids += tokens if end is None else tokens[: end + 1]
        sample.text = cut_at_stop(text, stop)
        if sample.text != text:
            sample.ids = self.tokenizer(sample.text, add_special_tokens=False)["input_ids"]
            sample.ended = "stop string"
        elif end is not None:
            sample.ended = "end of turn"
        elif len(sample.ids) == sample.limit:
            sample.ended = "limit"


def check_architecture(config):
    """Returns (layers, whether prompts must be answered one by one). config: of the text model.

    Raises InputError for a model whose answers would depend on the other rows of its batch.
    """
    layers = transformers.DynamicCache(config=config).layers
    cached = (transformers.cache_utils.DynamicLayer, transformers.cache_utils.DynamicSlidingWindowLayer)
    rope = getattr(config, "rope_parameters", None) or {}  # of the model, or {type of layer: rope parameters}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    odd = {type(layer).__name__ for layer in layers if type(layer) not in cached}
    odd |= {f"rope type {kind}" for kind in kinds if kind and "dynamic" in kind}
    if odd:
        raise InputError(f"{', '.join(sorted(odd))}: not supported; serve the model and give its --url")
    return len(layers), "longrope" in kinds  # longrope's factors depend on the longest sequence of a batch


def bytes_per_token(model):
    """Returns the bytes of the keys and values of one token."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize


def batch_that_fits(model, n, max_tokens, prompt=4096):
    """Returns how many turns with prompts of 4,096 tokens fit the memory, at most 256; on a CPU, 64 samples."""
    if model.device.type == "cpu":
        return max(1, 64 // n)
    logits = 24 * model.config.get_text_config().vocab_size  # bytes: sampling makes float32 copies
    torch.cuda.empty_cache()
    free = 0.9 * torch.cuda.mem_get_info(model.device)[0]
    return max(1, min(256, int(free / (n * ((prompt + max_tokens) * bytes_per_token(model) + logits)))))


# ------------- Episodes in lockstep


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
                    candidates.append(TurnFailed("the conversation is longer than the model's context"))
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


@dataclasses.dataclass(kw_only=True)
class SpeakConfig(EpisodeConfig):
    """Who answers and how: what `run` and `ask` have in common. Defaults are the paper's."""

    model: str | None = option(None, "Hugging Face name or folder, or an adapter; with --url, the server's name for it")
    url: str | None = option(
        None, "evaluate a served model: an OpenAI-compatible server's address, ending in /v1", changes_results=False
    )
    method: Literal["agent", "cot", "cot-rag"] = option("agent", "agent, chain of thought, or CoT with passages")
    sc: int = option(1, "candidates per step; 1: greedy; 8: the paper's SC-action (cot: self-consistency)", above=0)
    sample: bool = option(False, "sample a single candidate, too (default: greedy, as in the paper)")
    temperature: float = option(0.4, "of sampled candidates (paper: 0.4)")
    top_p: float = option(0.8, "of sampled candidates (paper: 0.8)", above=0)
    system_prompt: str | None = option(
        None, "file with a system prompt (default: that of the student's training)", changes_results=False
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...", changes_results=False)
    precision: Literal["auto", "bf16", "fp32"] = option("auto", "of weights; auto: bf16 where the hardware has it")
    batch: int | None = option(
        None, "episodes at once (default: 64 on a CPU; what fits on a GPU)", above=0, changes_results=False
    )
    concurrency: int = option(
        16, "sandboxes that run at once; against a server, episodes at once", above=0, changes_results=False
    )
    seed: int = option(0, "seeds the sampling")


class Speaker:
    """What run and ask share: prompts, tools, the system prompt, and a student that answers episodes.

    kinds: of the tasks. system: the system prompt's text. about: what model.json says.
    """

    def __init__(self, config, kinds=()):
        self.config, self.prompts, device = config, Prompts(config.prompts), choose_device(config.device)
        if not (config.model or config.url):
            raise InputError("no student: name a model with --model, or a server with --url")
        if not config.search and (config.method == "cot-rag" or (config.method == "agent" and "fact" in kinds)):
            raise InputError(f"--method {config.method} needs passages: name an index or a /retrieve URL with --search")
        self.tools = open_tools(config, self.prompts, device)  # before the student takes the memory
        record = training_record(config.model) if config.model else {}
        self.system, self.device = self._system_prompt(record), device
        self.about = {"model": config.model, "parameters": None, "training": record.get("training") or "none"}

    def _system_prompt(self, record):
        """The text of --system-prompt, or of the training, or for an untrained model the long one with examples."""
        config, prompts, same = self.config, self.prompts, record.get("method") == self.config.method.split("-")[0]
        trained = record.get("system_prompt") if same else None
        if config.system_prompt:
            text = common.read_text(config.system_prompt)
            if trained not in (None, text):
                print(f"note: {config.model} was trained with another system prompt: {trained!r}", file=sys.stderr)
            return text
        if trained is None and config.method == "agent":
            return prompts.system("agent_student_system" if same else "agent_system", self.tools)
        return prompts.cot_system if trained is None else trained

    def load(self, on_tokens=None):
        """Load the student, or connect to its server. on_tokens: see Student."""
        config, self.stop = self.config, STOP if self.config.method == "agent" else []
        sampled = config.sc > 1 or config.sample
        sampling = {"temperature": config.temperature, "top_p": config.top_p} if sampled else {"temperature": 0.0}
        if config.url:
            client = Client(config.url, config.model, config.api_key_env)
            sampling |= {"max_tokens": config.max_tokens, "stop": self.stop or None}
            self.student = Served(client, template_options=TEMPLATE_OPTIONS, **sampling)
            self.student.probe(config.sc)
            self.about["model"] = client.model
        else:
            dtype = torch.bfloat16 if uses_bf16(config.precision, self.device) else torch.float32
            model, tokenizer = load_model(config.model, self.device, dtype)
            sampling |= {"n": config.sc, "max_tokens": config.max_tokens, "batch": config.batch, "seed": config.seed}
            self.student = Student(model, tokenizer, on_tokens=on_tokens, **sampling)
            adapters = {id(p) for _, layer in lora_layers(model) for p in (layer.a, layer.b)}
            self.about["parameters"] = sum(p.numel() for p in model.parameters() if id(p) not in adapters)

    def episode(self, question, key=()):
        options = {"system": self.system, "rng": random.Random(stable_seed(self.config.seed, *key))}
        return open_episode(self.config, question, self.prompts, self.tools, **options)

    def answer(self, episodes):
        """Drive (key, generator) pairs to their ends. Yields (key, Episode, usage) as they finish."""
        if isinstance(self.student, Student):
            return run_lockstep(episodes, self.student, self.stop, self.config.concurrency)
        return in_parallel(self._ask_server, episodes, self.config.concurrency)

    def _ask_server(self, item):
        (key, episode), usage, steps = item, collections.Counter(), itertools.count()

        def answer(turn):
            seed = stable_seed(self.config.seed, *key, next(steps))
            return self.student.answer(turn, usage, n=self.config.sc, seed=seed)

        return key, drive(episode, answer), usage


# ------------- run, regrade


@dataclasses.dataclass(kw_only=True)
class JudgeConfig:
    judge_url: str | None = option(
        None, "LLM judge of factual answers (default: exact match alone)", changes_results=False
    )
    judge_model: str = option(
        "gpt-4o-mini", "the judge's name at its server (paper: gpt-4o-mini)", changes_results=False
    )
    api_key_env: str = option(
        "OPENAI_API_KEY", "environment variable that holds the servers' key", changes_results=False
    )
    prompts: str = option(str(Prompts.default), "folder of prompts", changes_results=False)


@dataclasses.dataclass(kw_only=True)
class RunConfig(JudgeConfig, SpeakConfig):
    tasks: list[str] = option(
        REQUIRED, "task files: JSONL, or JSON with a list of examples", positional=True, changes_results=False
    )
    out: str = option(
        REQUIRED, "run folder; the same command continues there after an interruption", changes_results=False
    )
    name: str | None = option(None, "the student's name in tables (default: --model)", changes_results=False)
    kind: Literal["fact", "math"] | None = option(None, "kind of the tasks, for files that do not state it")
    limit: int | None = option(None, "only the first n questions of each file", above=0, changes_results=False)
    quiet: bool = option(False, "no progress bar", changes_results=False)


def run(config):
    """Answer every question of the task files, grade the answers, write transcripts and results.json."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
    tasks, out = common.load_tasks(config.tasks, config.kind, config.limit), Path(config.out)
    for task in tasks:
        task.setdefault("domain", report.TASKS[task["task"]].domain if task["task"] in report.TASKS else "out")
    speaker = Speaker(config, {task["kind"] for task in tasks})
    notes = {"questions": collections.Counter(task["task"] for task in tasks)}
    facts = {
        "prompts_sha256": speaker.prompts.sha256(config.method),
        "system_prompt_sha256": hashlib.sha256(speaker.system.encode()).hexdigest(),
    }
    path, mine = out / f"transcripts.{rank}.jsonl", {(task["task"], task["id"]): task for task in tasks[rank::size]}
    with common.Journal(path) as journal:
        done = {(row["task"], row["id"]) for row in report.transcripts(out)}
        common.keep_config(out / "run.json", config, binding=bool(done), notes=notes, **facts)
        todo = {key: task for key, task in mine.items() if key not in done}
        if todo:
            _answer_all(speaker, todo, len(mine), journal)
    with open_judge(config, out, rank) as judge:  # asked at the end: it must not hold up the generation
        regrade_file(path, judge, config.quiet)
    print(f"{out}: {report.summarise(out)}")


def _answer_all(speaker, todo, total, journal):
    config, counts = speaker.config, collections.Counter()
    with common.progress(total=total, done=total - len(todo), desc=Path(config.out).name, quiet=config.quiet) as bar:

        def show(questions=0, **new):
            counts.update(new, questions=questions)
            names = ("right", "steps", "tokens")
            bar.set_postfix_str(", ".join(f"{counts[name]:,} {name}" for name in names), refresh=False)
            bar.miniters = 0  # redraw when it is time to, also without a new question
            bar.update(questions)

        speaker.load(on_tokens=lambda tokens: show(tokens=tokens))
        common.write_json(Path(config.out) / "model.json", speaker.about)
        episodes = ((key, speaker.episode(task["question"], key)) for key, task in todo.items())
        for key, episode, usage in speaker.answer(episodes):
            journal.append(agent_distill.trajectory_row(todo[key], config.method, episode, usage))
            show(questions=1, right=journal.rows[-1]["correct"], steps=len(episode.steps))


@contextlib.contextmanager
def open_judge(config, folder, rank=0):
    """The judge of --judge-url, with its verdicts in the run folder; None without one."""
    if not config.judge_url:
        yield None
        return
    client = Client(config.judge_url, config.judge_model, config.api_key_env, timeout=120.0)
    caches = sorted(Path(folder).glob("judge.*.jsonl"))
    with common.Journal(Path(folder) / f"judge.{rank}.jsonl") as journal:
        yield Judge(client, Prompts(config.prompts), journal, caches)


def regrade_file(path, judge, quiet=False):
    """Grade the rows of a transcript file again. Returns how many grades changed."""

    def grade(row):
        answer = row["answer"], row.get("aliases", ()), row["question"]
        verdict = grading.grade(row["kind"], row["prediction"], *answer, judge)
        return row | {"correct": verdict.correct, "why": verdict.why}

    with common.Journal(path) as journal, concurrent.futures.ThreadPoolExecutor(8 if judge else 1) as pool:
        old = journal.rows
        new = list(common.progress(pool.map(grade, old), total=len(old), desc="grade", unit="answer", quiet=quiet))
        if new != old:
            common.write_jsonl(path, new)  # the lock is held until the file is replaced
    return sum(a["correct"] != b["correct"] for a, b in zip(old, new, strict=True))


@dataclasses.dataclass(kw_only=True)
class RegradeConfig(JudgeConfig):
    folder: str = option(REQUIRED, "run folder", positional=True)


def regrade(config):
    """Grade the saved transcripts of a run again, without generating anything."""
    with open_judge(config, config.folder) as judge:
        changed = sum(regrade_file(path, judge) for path in report.transcript_files(config.folder))
    print(f"{config.folder}: {changed} grades changed; {report.summarise(config.folder)}")


# ------------- report, compare, ask


@dataclasses.dataclass(kw_only=True)
class ReportConfig:
    folder: str = option(REQUIRED, "folder with run folders in it", positional=True)
    episodes: int = option(10, "episodes of each task and run that the page can show")


def write_report(config):
    """Print the tables of all runs below a folder, and write report.md, report.html and the pictures there."""
    text = report.markdown(config.folder)
    files = {"report.md": text, "report.html": report.html(config.folder, config.episodes)}
    for name, content in (files | pictures.pictures(config.folder)).items():
        with common.replace_file(Path(config.folder) / name) as file:
            file.write(content)
    print(text)


@dataclasses.dataclass(kw_only=True)
class CompareConfig:
    first: str = option(REQUIRED, "a run folder, or a file of trajectories", positional=True)
    second: str = option(REQUIRED, "another, on the same questions", positional=True)


def compare(config):
    """Two runs question by question: what only one of them got right, and McNemar's test of the difference."""
    sides = []
    for path in (config.first, config.second):
        rows = [row for _, row in common.read_jsonl(path)] if Path(path).is_file() else report.transcripts(path)
        try:
            sides.append({(row["task"], row["id"], row.get("sample", 0)): row["correct"] for row in rows})
        except KeyError as error:
            raise InputError(f"{path}: not trajectories: the field {error} is missing") from None
        if not rows:
            raise InputError(f"{path}: neither a run folder with transcripts in it nor a file of trajectories")
    print(report.paired_table(*sides, (Path(config.first).name, Path(config.second).name)))


@dataclasses.dataclass(kw_only=True)
class AskConfig(SpeakConfig):
    question: str | None = option(None, "the question (default: questions are read from the terminal)", positional=True)


def ask(config):
    """Ask a student one question and print the steps as they come."""
    speaker = Speaker(config)
    speaker.load()
    questions = [config.question] if config.question else iter(lambda: input("question: ").strip(), "")
    with contextlib.suppress(EOFError):
        for question in questions:
            for _, episode, _ in speaker.answer([(("ask", question), _print_steps(speaker.episode(question)))]):
                print(f"Answer: {episode.prediction!r} ({episode.error or episode.stop})")


def _print_steps(episode):
    """The same episode; its messages are printed as they come, but for the system prompt and the question."""
    running, shown = Running(episode), 2
    while True:
        messages = (running.turn or running.result).messages
        for message in messages[shown:]:
            print(message["content"], end="\n\n", flush=True)
        shown = len(messages)
        if running.turn is None:
            return running.result
        try:
            candidates = yield running.turn
        except TurnFailed as failure:
            candidates = failure
        running.advance(candidates)


if __name__ == "__main__":
    commands = {"run": (RunConfig, run), "regrade": (RegradeConfig, regrade), "report": (ReportConfig, write_report)}
    commands |= {"compare": (CompareConfig, compare), "ask": (AskConfig, ask)}
    common.run_command_line(__doc__, commands, default="run")
