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

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

import agent_distill
import common
import train
from agent_distill import STOP, EpisodeConfig, Prompts, Running, TurnFailed, drive, open_episode, open_tools
from common import REQUIRED, InputError, grading, option, pictures, report, stable_seed
from common.client import Client, Served, cut_at_stop, in_parallel
from common.decoding import Layer, SampleNucleus, SharedPrompts
from common.devices import choose_device, uses_bf16
from common.judge import Judge
from common.lora import load_model, lora_layers, training_record

# ------------- The student


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
    batch: turns in one generate call; by default 64 on a CPU, and what fits the memory on a GPU. It is halved when
    memory runs out, and grows again later. on_tokens: called with the number of new tokens while they are generated.
    """

    def __init__(
        self, model, tokenizer, n=1, temperature=0.0, top_p=0.8, max_tokens=1024, batch=None, seed=0, on_tokens=None
    ):
        self.model, self.tokenizer, self.n, self.max_tokens = model, tokenizer, n, max_tokens
        self.seed, self.on_tokens, self.device = seed, on_tokens or (lambda tokens: None), model.device
        self.processors = [SampleNucleus(temperature, top_p)] if temperature > 0 else []
        # Tokens per generate call. After each, the rows that have ended leave the batch: on a CPU, SC-action was 1.2
        # times as fast with 4 as with 16. A GPU, where rows cost little, would rather set up fewer calls.
        self.segment = 4 if self.device.type == "cpu" else 16
        # What else a checkpoint's generation_config.json sets (repetition_penalty, top_k, ...) is not used.
        ends = model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.pad = min(ends) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.ends = ends | {self.pad}
        model.generation_config = transformers.GenerationConfig(eos_token_id=sorted(ends), pad_token_id=self.pad)
        model.set_attn_implementation("shared_prompt")
        config = model.config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", None) or 10**9
        for layer in transformers.DynamicCache(config=config).layers:
            if not isinstance(layer, transformers.cache_utils.DynamicLayer):
                raise InputError(f"{type(layer).__name__} is not supported: serve the model and give its --url")
            self.context = min(self.context, getattr(layer, "sliding_window", self.context))  # no mask for more
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.shape = (config.num_hidden_layers, 2, heads, size)  # the keys and values of one token
        self.slice = 2048 if self.device.type == "cpu" else 16384  # tokens of prompts in one forward pass
        self.batch = self.largest_batch = batch or self._batch_that_fits()
        self.calls = 0  # since the batch was changed
        self.drawn = 0  # generate calls so far

    def _batch_that_fits(self, prompt=4096):
        """How many turns with prompts of 4,096 tokens fit the free memory, at most 256."""
        if self.device.type == "cpu":
            return 64
        config, item = self.model.config.get_text_config(), self.model.dtype.itemsize
        token = item * torch.Size(self.shape).numel()
        logits = config.vocab_size * 24  # bytes: sampling makes float32 copies
        # The prompts twice, because SharedPrompts.keep copies those that still have samples.
        turn = 2 * prompt * token + self.n * (self.max_tokens * token + logits)
        reading = self.slice * (4 * config.intermediate_size + 12 * config.hidden_size) * item
        torch.cuda.empty_cache()
        free = 0.9 * torch.cuda.mem_get_info(self.device)[0] - reading
        return max(1, min(256, int(free / turn)))

    def answer(self, turns, stop=()):
        """Returns an Answer for each turn, or None for a turn that is too long for the model's context.

        Raises InputError if a single turn does not fit the memory.
        """
        texts = [train.render(self.tokenizer, turn.messages, reply=True) + turn.opening for turn in turns]
        prompts = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        todo = sorted((i for i, ids in enumerate(prompts) if len(ids) < self.context), key=lambda i: len(prompts[i]))
        answers, self.calls = [None] * len(turns), self.calls + 1
        if self.calls > 8:
            self.batch, self.calls = min(self.largest_batch, 2 * self.batch), 0
        while todo:
            chunk, got = todo[: self.batch], None
            with contextlib.suppress(torch.OutOfMemoryError):
                got = self._generate([prompts[i] for i in chunk], stop)
            if got is None:  # out of memory; the tensors of the attempt are freed only now
                if len(chunk) == 1:
                    tokens = f"{len(prompts[chunk[0]]):,} + {self.max_tokens:,} tokens, {self.n} times"
                    raise InputError(f"{tokens}, do not fit into the memory of {self.device}")
                self.batch, self.calls = len(chunk) // 2, 0
                gc.collect()
                torch.cuda.empty_cache()
                continue
            for i, answer in zip(chunk, got, strict=True):
                answers[i] = answer
            todo = todo[len(chunk) :]
        return answers

    @torch.inference_mode()
    def _read(self, prompts):
        """The keys and values of all tokens of prompts but the last: (layers, 2, prompts, heads, length, size).

        A prompt stands on the left of its row: its tokens see no padding under causal attention, and need no mask.
        Its last token is not read, because generate needs one to begin with.
        """
        layers, _, heads, size = self.shape
        length, options = max(map(len, prompts)) - 1, {"dtype": self.model.dtype, "device": self.device}
        states = torch.zeros(layers, 2, len(prompts), heads, length, size, **options)  # padding must not be NaN
        end = len(prompts)
        while end:  # rows first to end - 1 are read in one forward pass; neighbours are of similar length
            first = max(0, end - max(1, self.slice // len(prompts[end - 1])))
            ids = [torch.tensor(ids[:-1], dtype=torch.long) for ids in prompts[first:end]]
            ids = pad_sequence(ids, batch_first=True)  # (rows, tokens)
            if ids.shape[1]:
                cache = transformers.Cache([Layer(layer[:, first:end]) for layer in states])
                self.model(input_ids=ids.to(self.device), past_key_values=cache, logits_to_keep=1)
            end = first
        return states

    @torch.inference_mode()
    def _generate(self, prompts, stop):
        """Returns an Answer for each prompt. prompts: lists of token ids, short ones first."""
        n, states = self.n, self._read(prompts)
        ids = torch.full((len(prompts), states.shape[-2] + 1), self.pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # the padding is between the last two tokens
            ids[row, : len(prompt) - 1], ids[row, -1] = torch.tensor(prompt[:-1]), prompt[-1]
            mask[row, : len(prompt) - 1] = mask[row, -1] = 1
        cache = SharedPrompts(states, mask[:, :-1], n)
        ids, mask = (x.repeat_interleave(n, 0).to(self.device) for x in (ids, mask))  # (prompts * n, length + 1)
        # The limit of a row depends on its own prompt, not on longer ones beside it.
        limits = [min(self.max_tokens, self.context - len(prompt)) for prompt in prompts for _ in range(n)]
        written, texts, truncated = [[] for _ in limits], [""] * len(limits), [0] * len(limits)
        rows = list(range(len(limits)))  # the samples that have not ended
        self.drawn += 1
        torch.manual_seed(stable_seed(self.seed, self.drawn))  # a turn that is asked again gets other samples
        while rows:
            segment = min(self.segment, max(limits[r] - len(written[r]) for r in rows))
            cache.keep(rows, segment)
            options = {"max_new_tokens": segment, "logits_processor": self.processors, "do_sample": False}
            ids = self.model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **options)
            grown = ids[:, mask.shape[1] :].tolist()
            going = []
            for at, (r, tokens) in enumerate(zip(rows, grown, strict=True)):
                end = next((i for i, token in enumerate(tokens) if token in self.ends), None)
                written[r] = (written[r] + tokens[:end])[: limits[r]]
                text = self.tokenizer.decode(written[r], skip_special_tokens=True)
                texts[r] = cut_at_stop(text, stop)
                if len(texts[r]) < len(text):
                    written[r] = self.tokenizer(texts[r], add_special_tokens=False)["input_ids"]
                elif end is None and len(written[r]) < limits[r]:
                    going.append(at)
                else:
                    truncated[r] = int(end is None)
            self.on_tokens(sum(map(len, grown)))
            rows = [rows[at] for at in going]
            mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)[going]
            ids = ids[going]
        answers = []
        for i, prompt in enumerate(prompts):
            mine = slice(i * n, (i + 1) * n)
            answers.append(Answer(texts[mine], len(prompt), sum(map(len, written[mine])), sum(truncated[mine])))
        return answers


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
            self.student = Served(client, max_tokens=config.max_tokens, stop=self.stop or None, **sampling)
            self.student.probe()
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
        "prompts_sha256": speaker.prompts.sha256,
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
