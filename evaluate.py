"""Evaluate students: eight benchmarks, greedy or SC-action, with plain Hugging Face generate.

    python evaluate.py data/test/*.json --model runs/student --search runs/index --out runs/eval/agent-greedy
    python evaluate.py data/test/*.json --model runs/student --search runs/index --out runs/eval/agent-sc8 --sc 8
    python evaluate.py data/test/*.json --url http://127.0.0.1:8000/v1 --method cot --out runs/eval/served-cot
    python evaluate.py report runs/eval
    python evaluate.py compare runs/eval/agent-greedy runs/eval/agent-sc8
    python evaluate.py ask --model runs/student --search runs/index "Who founded the town where Ada Orr was born?"

Many episodes are open at once and advance in lockstep: one generate call answers the turns of all
of them, times N samples; then their code runs at the same time, each in its own sandbox; finished
episodes make room for the next questions. The episode itself is agent_distill.agent_episode, the very same
generator that the teacher is driven through.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import os
import random
from pathlib import Path
from typing import Literal

import torch

import grade
import report
import train
from agent_distill import STOP, EpisodeConfig, TurnFailed, agent_episode, cot_episode, drive, stable_seed, trajectory
from client import Client, Speaker, in_parallel
from common import (
    REQUIRED,
    InputError,
    Journal,
    keep_config,
    option,
    progress,
    replace_file,
    run_command_line,
    write_json,
    write_jsonl,
)
from sandbox import Sandboxes
from student import Student
from tasks import Prompts, load_tasks, open_search


@dataclasses.dataclass
class _Open:
    """An episode under way: the turn it waits for, and what it has cost."""

    episode: object
    turn: object
    step: int = 0
    usage: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def run_lockstep(episodes, student, stop, workers=16):
    """Drive (key, generator) pairs to their ends; yields (key, Episode, usage) as they finish.

    episodes is consumed lazily: student.batch of them are open at once.
    """
    episodes = iter(episodes)
    waiting = {}  # key -> _Open
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                new = list(itertools.islice(episodes, student.batch - len(waiting)))
                turns = pool.map(next, [episode for _, episode in new])  # this opens their sandboxes
                waiting |= {key: _Open(episode, turn) for (key, episode), turn in zip(new, turns, strict=True)}
                if not waiting:
                    return
                keys, opened = list(waiting), list(waiting.values())
                seeds = [stable_seed(student.seed, *key, state.step) for key, state in waiting.items()]
                answers = student.answer([state.turn for state in opened], seeds, stop)
                for key, state, finished in zip(keys, opened, pool.map(_advance, opened, answers), strict=True):
                    if finished is not None:
                        del waiting[key]
                        yield key, finished, dict(state.usage)
        finally:
            for state in waiting.values():
                state.episode.close()


def _advance(state, answer):
    """Give the episode its candidates. Returns the Episode if that was its end."""
    try:
        if answer is None:
            state.turn = state.episode.throw(TurnFailed("the context is longer than the model takes"))
        else:
            state.usage.update(prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens)
            state.turn = state.episode.send(answer.texts)
        state.step += 1
    except StopIteration as finished:
        return finished.value


# ---------------------------------------------------------------------------------------------
# run
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class SpeakConfig(EpisodeConfig):
    """Who answers and how: what `run` and `ask` have in common. Defaults are the paper's."""

    model: str | None = option(
        None, "Hugging Face name or folder, or a LoRA adapter; with --url, the server's name for it"
    )
    url: list[str] = option([], "evaluate a served model instead; may be repeated", action="append", nargs=None)
    method: Literal["agent", "cot", "cot-rag"] = option(
        "agent", "agent, chain of thought, or CoT with retrieved passages"
    )
    training: Literal["none", "distill", "distill+prefix"] = option(
        "distill", "how the student was made: names the row, and 'none' means the teacher's long prompt with examples"
    )
    sc: int = option(1, "candidates a step; 1 is greedy; 8 is the paper's SC-action (for cot: self-consistency)")
    temperature: float = option(0.4, "of the candidates if there are several (paper: 0.4)")
    top_p: float = option(0.8, "of the candidates if there are several (paper: 0.8)")
    system_prompt: str | None = option(None, "file with another system prompt")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "auto: bfloat16 on a GPU, float32 on a CPU"
    )
    batch: int | None = option(None, "episodes at once; without it, 64 on a CPU, on a GPU what fits its free memory")
    concurrency: int = option(16, "episodes at once against a server; sandboxes at work at once")
    seed: int = option(0, "seeds the sampling of every step of every question")


@dataclasses.dataclass(kw_only=True)
class RunConfig(SpeakConfig):
    tasks: list[str] = option(REQUIRED, "task files: JSONL, or JSON with a list of examples", positional=True)
    out: str = option(REQUIRED, "run folder; the same command continues there after an interruption")
    name: str | None = option(None, "the student's name in tables (default: its folder)")
    kind: Literal["fact", "math"] | None = option(None, "kind of the tasks, for files that do not state it")
    domain: Literal["in", "out"] | None = option(None, "in- or out-of-domain, for files that do not state it")
    limit: int | None = option(None, "only the first n questions of each file")
    shard: str = option("0/1", "i/n: this process takes every n-th question (torchrun sets it)")
    judge_url: str | None = option(None, "LLM judge for factual answers (paper: gpt-4o-mini); without it, exact match")
    judge_model: str = option("gpt-4o-mini", "the judge's name at its server")
    quiet: bool = option(False, "no progress bar")


RUN_MAY_CHANGE = ("out", "quiet", "batch", "concurrency", "shard", "limit", "tasks", "url", "api_key_env", "device")


def run(config):
    """Answer every question of the task files, grade the answers, write transcripts and results.json."""
    shard, shards = _shard(config.shard)
    tasks = load_tasks(config.tasks, config.kind, config.limit)
    for task in tasks:
        task.setdefault("domain", config.domain or "out")
    out = Path(config.out)
    if torch.cuda.is_available():  # under torchrun, each process has a GPU of its own; "cuda" is this one from here on
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    prompts, search = _prompts_and_search(config, tasks)
    with Journal(out / f"transcripts.{shard}.jsonl") as journal:
        done = {(row["task"], row["id"]) for row in report.transcripts(out)}
        keep_config(out / "run.json", config, RUN_MAY_CHANGE, binding=bool(done))
        todo = {(task["task"], task["id"]): task for task in tasks[shard::shards]}
        todo = {key: task for key, task in todo.items() if key not in done}
        if todo:
            _run_episodes(config, todo, prompts, search, journal)
    print(f"{out}: {report.summarise(out)}")


def _run_episodes(config, todo, prompts, search, journal):
    judge = _open_judge(config, Path(config.out) / f"judge.{_shard(config.shard)[0]}.jsonl")
    answerer = ServedStudent(config, prompts) if config.url else LocalStudent(config)
    write_json(Path(config.out) / "model.json", answerer.about)
    start = functools.partial(
        start_episode, config, prompts, _system(config, prompts), search, open_sandboxes(config, search)
    )
    right = 0
    with progress(total=len(todo), desc=Path(config.out).name, unit="question", quiet=config.quiet) as bar:
        episodes = ((key, start(task["question"], key)) for key, task in todo.items())
        for done, (key, episode, usage) in enumerate(answerer(episodes), 1):
            row = trajectory(todo[key], config.method, episode, judge)
            journal.append({**row, "usage": usage})
            right += row["correct"]
            bar.update()
            bar.set_postfix_str(f"{right / done:.1%} right", refresh=False)


def _open_judge(config, cache):
    if not config.judge_url:
        return None
    return grade.Judge(config.judge_url, config.judge_model, config.api_key_env, cache)


def open_sandboxes(config, search):
    return Sandboxes(tools={"web_search": search} if search else {}, timeout=config.timeout)


def start_episode(config, prompts, system, search, sandboxes, question, key=()):
    """The generator for one question, by the configured method."""
    if config.method != "agent":
        rag = search if config.method == "cot-rag" else None
        return cot_episode(question, prompts, system=system, search=rag)
    rng = random.Random(stable_seed(config.seed, *key))
    return agent_episode(question, prompts, sandboxes, system=system, max_steps=config.max_steps, rng=rng)


def _system(config, prompts):
    if config.system_prompt:
        try:
            return Path(config.system_prompt).read_text(encoding="utf-8").removesuffix("\n")
        except OSError as error:
            raise InputError(f"{config.system_prompt}: {error.strerror}") from None
    if config.method != "agent":
        return prompts.cot_system
    return prompts.agent_system if config.training == "none" else prompts.agent_student_system


def _prompts_and_search(config, tasks=()):
    prompts = Prompts(config.prompts)
    if config.search:
        return prompts, open_search(config.search, prompts, config.top_k)
    if config.method == "cot-rag" or (config.method == "agent" and any(task["kind"] == "fact" for task in tasks)):
        raise InputError(
            f"--method {config.method} needs passages: name an index folder or a /retrieve URL with --search"
        )
    return prompts, None


class LocalStudent:
    """Answers episodes in lockstep with a model loaded here."""

    def __init__(self, config):
        if not config.model:
            raise InputError("no student: name a model with --model, or a server with --url")
        device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32"
        model, tokenizer = train.load_model(config.model, device, getattr(torch, dtype))
        sampling = {"temperature": config.temperature, "top_p": config.top_p} if config.sc > 1 else {}
        self.student = Student(
            model,
            tokenizer,
            n=config.sc,
            max_tokens=config.max_tokens,
            batch=config.batch,
            seed=config.seed,
            **sampling,
        )
        self.config = config
        self.about = {"model": config.model, "parameters": sum(p.numel() for p in model.parameters())}

    def __call__(self, episodes):
        stop = STOP if self.config.method == "agent" else ()
        return run_lockstep(episodes, self.student, stop, self.config.concurrency)


class ServedStudent:
    """Answers episodes over HTTP, each in a thread of its own."""

    def __init__(self, config, prompts):
        client = Client(config.url, config.model, config.api_key_env)
        sampling = {"temperature": config.temperature, "top_p": config.top_p} if config.sc > 1 else {"temperature": 0.0}
        stop = STOP if config.method == "agent" else None
        self.speaker = Speaker(client, prompts, max_tokens=config.max_tokens, stop=stop, **sampling)
        self.speaker.probe()
        self.config = config
        self.about = {"model": client.model, "parameters": None}

    def __call__(self, episodes):
        return in_parallel(self._one, episodes, self.config.concurrency)

    def _one(self, item):
        key, episode = item
        usage, steps = collections.Counter(), itertools.count()

        def answer(turn):
            seed = stable_seed(self.config.seed, *key, next(steps))
            return self.speaker.answer(turn, usage, n=self.config.sc, seed=seed)

        return key, drive(episode, answer), dict(usage)


def _shard(text):
    """(i, n) of --shard i/n; under torchrun, its rank and world size."""
    if "WORLD_SIZE" in os.environ and text == "0/1":
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    shard, _, shards = text.partition("/")
    if not (shard.isdigit() and shards.isdigit() and int(shard) < int(shards)):
        raise InputError(f"--shard {text}: i/n with 0 <= i < n was expected, as in 0/2 and 1/2")
    return int(shard), int(shards)


# ---------------------------------------------------------------------------------------------
# regrade, report, ask
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class RegradeConfig:
    folder: str = option(REQUIRED, "run folder", positional=True)
    judge_url: str | None = option(None, "LLM judge for factual answers; without it, exact match")
    judge_model: str = option("gpt-4o-mini", "the judge's name at its server")
    api_key_env: str = option("OPENAI_API_KEY", "environment variable that holds the judge's key")


def regrade(config):
    """Grade the saved transcripts of a run again, without generating anything."""
    out, changed = Path(config.folder), 0
    judge = _open_judge(config, out / "judge.0.jsonl")
    for path in report.transcript_files(out):
        with Journal(path) as journal:  # holds the lock while the file is replaced
            verdicts = grade.grade_many(journal.rows, judge)
            for row, verdict in zip(journal.rows, verdicts, strict=True):
                changed += row["correct"] != verdict.correct
                row["correct"], row["why"] = verdict.correct, verdict.why
            write_jsonl(path, journal.rows)
    print(f"{out}: {changed} grades changed; {report.summarise(out)}")


@dataclasses.dataclass(kw_only=True)
class ReportConfig:
    folder: str = option(REQUIRED, "folder with run folders in it", positional=True)
    episodes: int = option(10, "episodes of each task and run that the page can show")


def write_report(config):
    """Make the tables of all runs below a folder, print them, and write report.md and report.html there.

    report.html is one self-contained page: tables, charts, and a browser of episodes.
    """
    text = report.markdown(config.folder)
    for name, content in (("report.md", text), ("report.html", report.html(config.folder, config.episodes))):
        with replace_file(Path(config.folder) / name) as file:
            file.write(content)
    print(text)


@dataclasses.dataclass(kw_only=True)
class CompareConfig:
    first: str = option(REQUIRED, "run folder", positional=True)
    second: str = option(REQUIRED, "another, on the same questions", positional=True)


def compare(config):
    """Two runs question by question: what only one of them got right, and whether that can be chance (McNemar)."""
    sides = []
    for folder in (config.first, config.second):
        sides.append({(row["task"], row["id"]): row["correct"] for row in report.transcripts(folder)})
        if not sides[-1]:
            raise InputError(f"{folder}: no run folder with transcripts in it")
    names = [Path(folder).resolve().name for folder in (config.first, config.second)]
    print(report.paired_table(*sides, names if names[0] != names[1] else ("first", "second")))


@dataclasses.dataclass(kw_only=True)
class AskConfig(SpeakConfig):
    question: str | None = option(None, "the question; without one, a prompt to ask many", positional=True)


def ask(config):
    """Ask a student one question and print the steps as they come."""
    prompts, search = _prompts_and_search(config)
    system = _system(config, prompts)
    answerer = ServedStudent(config, prompts) if config.url else LocalStudent(config)
    sandboxes = open_sandboxes(config, search)
    questions = [config.question] if config.question else iter(lambda: input("question: ").strip(), "")
    with contextlib.suppress(EOFError):
        for question in questions:
            episode = _printing(start_episode(config, prompts, system, search, sandboxes, question))
            for _, finished, _ in answerer([(("ask", question), episode)]):
                print(f"Answer: {finished.prediction!r} ({finished.error or finished.stop})")


def _printing(episode):
    """The same episode, with each step printed as it passes."""
    shown = 2  # system prompt and question
    try:
        turn = next(episode)
        while True:
            candidates = yield turn
            turn = episode.send(candidates)
            for message in turn.messages[shown:]:
                print(message["content"], end="\n\n", flush=True)
            shown = len(turn.messages)
    except StopIteration as finished:
        for message in finished.value.messages[shown:]:
            print(message["content"], end="\n\n")
        return finished.value


if __name__ == "__main__":
    run_command_line(
        __doc__,
        {
            "run": (RunConfig, run),
            "report": (ReportConfig, write_report),
            "regrade": (RegradeConfig, regrade),
            "compare": (CompareConfig, compare),
            "ask": (AskConfig, ask),
        },
        default="run",
    )
