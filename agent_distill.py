"""Agent distillation (Kang et al., arXiv 2505.17612): the method, and the teacher's side of it.

    URL=http://127.0.0.1:8000/v1
    python agent_distill.py collect train.jsonl --url $URL --out cot.jsonl --method cot
    python agent_distill.py collect train.jsonl --url $URL --out plain.jsonl --search index
    python agent_distill.py collect train.jsonl --url $URL --out agent.jsonl --search index --first-thought
    python agent_distill.py filter agent.jsonl --out agent.train.jsonl
    python agent_distill.py prefix-gain plain.jsonl agent.jsonl

Read `agent_episode` first: it is the paper's loop. An episode is a generator. It yields what it
wants the model to say and receives candidates; who answers (a teacher over HTTP here, a student
under HF generate in evaluate.py) is no business of the loop.
"""

import ast
import collections
import dataclasses
import hashlib
import itertools
import json
import random
import re
import threading
import time
from typing import Literal

import grade
from client import BadRequest, Client, Speaker, in_parallel
from common import (
    REQUIRED,
    InputError,
    Journal,
    keep_config,
    option,
    progress,
    read_jsonl,
    run_command_line,
)
from sandbox import Sandboxes
from tasks import Prompts, load_tasks, open_search
from trajectories import FilterConfig, GainConfig, filter_trajectories, prefix_gain

# The action format, as in smolagents and in the authors' published trajectories. Prompts, stop
# strings and parser must agree; tests/test_agent_distill.py holds prompts/ to these constants.
CODE_OPEN = "```py"
CODE_CLOSE = "```<end_code>"
STOP = ["<end_code>", "Observation:"]

# ---------------------------------------------------------------------------------------------
# Actions: a thought and code (r_t, a_t), parsed from what the model wrote
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Action:
    """text: what stays in the context. code: None if there is none to run."""

    text: str
    thought: str
    code: str | None


_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[ \t]*$", re.MULTILINE)
_CLOSE = re.compile(r"```")
_THOUGHT = re.compile(r"^\s*Thought:[ \t]*")
_CODE_LABEL = re.compile(r"^[ \t]*Code:[ \t]*$", re.MULTILINE)


def parse_action(text):
    """Read thought and code out of model output in all the shapes that models produce.

    Accepted: fences marked py, python or nothing; several fences (joined, as smolagents does); a
    fence that never closes; no fence at all after a `Code:` line, if what follows is Python.
    """
    text = text.replace("\r\n", "\n")
    for stop in STOP:
        text = text.split(stop)[0]
    text = text.strip()
    blocks, start, first = [], 0, None
    while opening := _FENCE.search(text, start):
        code, start = _fenced_code(text, opening.end())
        if opening[1] in ("py", "python", ""):
            blocks.append(code)
            first = opening.start() if first is None else first
    label = _CODE_LABEL.search(text)
    if not blocks and label and _is_python(text[label.end() :]):
        blocks, first = [text[label.end() :].strip("\n")], label.start()
    code = "\n\n".join(block for block in blocks if block.strip()) or None
    if text.endswith("```"):
        text += "<end_code>"  # the stop string that generation took away
    before = text if code is None else text[: label.start() if label and label.start() < first else first]
    return Action(text, _THOUGHT.sub("", before).strip(), code)


def _fenced_code(text, start):
    """The code of the fence that opens at `start`, and where it ends.

    Backticks may stand in a string of the code: the fence ends at the first ``` up to which the
    code is Python; failing that, at the first one; failing that, the fence never closes.
    """
    ends = [match.start() for match in _CLOSE.finditer(text, start)]
    for end in ends:
        if _is_python(text[start:end]):
            return text[start:end].strip("\n"), end + 3
    if ends:
        return text[start : ends[0]].strip("\n"), ends[0] + 3
    return text[start:].strip("\n"), len(text)


_parsing = threading.Lock()  # ast counts its depth for all threads together, and fails when they meet (CPython 3.11)


def _is_python(code):
    try:
        with _parsing:
            return bool(ast.parse(code.strip("\n")).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


# ---------------------------------------------------------------------------------------------
# The episode
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Turn:
    """What an episode asks of a model: N continuations of `messages`, begun with `opening`.

    opening: text the assistant's message starts with; the candidates continue it.
    """

    messages: list
    opening: str = ""


class TurnFailed(Exception):
    """Thrown into an episode by its driver: this turn cannot be answered (context too long, ...)."""


@dataclasses.dataclass
class Episode:
    """A finished trajectory tau = ((r_1, a_1, o_1), ..., (r_T, a_T, o_T)), Eq. 3, and how it ended.

    messages: chat ready for training. steps: a dict a step with thought, code, observation, error_kind
    and, where several candidates were sampled, all of them with the vote. prediction: JSON value or None.
    stop: "final_answer" | "max_steps" | "error".
    """

    messages: list
    steps: list
    prediction: object
    stop: str
    error: str | None = None


def agent_episode(question, prompts, open_sandbox, *, system, max_steps=5, first_thought="", rng=None):
    """The agent's loop: thought, code, observation, until final_answer or the step limit.

    first_thought: with the first-thought prefix (Eq. 5), the first step of the teacher's
    chain of thought; it opens the first thought, and the model continues it.
    rng: random.Random for SC-action's last resort.
    """
    messages = _chat(system, prompts.fill("question", question=question))
    steps = []
    with open_sandbox() as sandbox:
        for step in range(max_steps):
            opening = f"Thought: {first_thought}" if first_thought and step == 0 else ""
            try:
                candidates = yield Turn(messages, opening)
            except TurnFailed as failure:
                return Episode(messages, steps, None, "error", str(failure))
            actions = [parse_action(opening + text) for text in candidates]
            chosen, observations = choose(actions, sandbox, rng)
            action, observation = actions[chosen], observations[chosen]
            messages = [*messages, {"role": "assistant", "content": action.text}]
            steps.append(_record(actions, observations, chosen, prompts))
            if observation is not None and observation.is_final:
                return Episode(messages, steps, observation.final_answer, "final_answer")
            messages = [*messages, {"role": "user", "content": steps[-1]["observation"]}]
    return Episode(messages, steps, None, "max_steps")


def choose(actions, sandbox, rng):
    """Self-consistent action generation: run all candidates, take the majority by observation.

    Candidates that fail to parse or to run have no vote; ties go to the earliest. If all fail, one
    of them is kept at random and the model sees its error. One candidate (greedy) is the same
    with N = 1. Each distinct code is run once, from the same state, and never again: the winner's
    state is committed. Returns the chosen index and the observations (None where there was no code).
    """
    codes = list(dict.fromkeys(action.code for action in actions if action.code is not None))
    ran = dict(zip(codes, sandbox.run_candidates(codes), strict=True)) if codes else {}
    observations = [ran.get(action.code) for action in actions]
    votes = collections.Counter(_vote(o) for o in observations if o is not None and o.error_kind is None)
    if votes:
        winner = max(votes, key=votes.get)  # of equals, the one sampled first
        chosen = next(i for i, o in enumerate(observations) if o and o.error_kind is None and _vote(o) == winner)
    else:
        chosen = (rng or random).randrange(len(actions)) if len(actions) > 1 else 0
    if observations[chosen] is not None:
        sandbox.commit(codes.index(actions[chosen].code))
    return chosen, observations


def _vote(observation):
    """What candidates agree or disagree on: the answer if it is final, else everything observed."""
    if observation.is_final:
        return "final", json.dumps(observation.final_answer, sort_keys=True)
    return "observed", observation.stdout, observation.result


def _record(actions, observations, chosen, prompts):
    """The step as it is stored: the action taken, and the candidates if there was a choice."""
    step = _candidate(actions[chosen], observations[chosen], prompts)
    if len(actions) > 1:
        step["candidates"] = [_candidate(a, o, prompts) for a, o in zip(actions, observations, strict=True)]
        step["chosen"] = chosen
    return step


def _candidate(action, observation, prompts):
    kind = "no_code" if observation is None else observation.error_kind
    text = observation_text(observation, prompts)
    return {"thought": action.thought, "code": action.code, "observation": text, "error_kind": kind}


def observation_text(observation, prompts):
    """The observation o_t as the model reads it. None: there was no code to run."""
    if observation is None:
        return prompts.fill("error", stdout="", error=prompts.no_code)
    stdout = observation.stdout.removesuffix("\n")
    if observation.error is not None:
        return prompts.fill("error", stdout=stdout, error=observation.error)
    return prompts.fill("observation", stdout=stdout, result=observation.result)


def cot_episode(question, prompts, *, system, search=None):
    """Chain of thought: one turn, no tools. search: for CoT + RAG, passages for the question itself.

    With several candidates (self-consistency), the majority of the answers wins.
    """
    content = question
    if search is not None:
        content = prompts.fill("cot_rag_question", passages=search(question), question=question)
    messages = _chat(system, content)
    try:
        candidates = yield Turn(messages)
    except TurnFailed as failure:
        return Episode(messages, [], None, "error", str(failure))
    answers = [grade.cot_answer(text) for text in candidates]
    votes = collections.Counter(answer for answer in answers if answer is not None)
    chosen = answers.index(max(votes, key=votes.get)) if votes else 0
    step = {"thought": candidates[chosen], "code": None, "observation": None, "error_kind": None}
    if len(candidates) > 1:
        step["candidates"] = [{"thought": text, "answer": a} for text, a in zip(candidates, answers, strict=True)]
        step["chosen"] = chosen
    messages = [*messages, {"role": "assistant", "content": candidates[chosen].strip()}]
    stop = "max_steps" if answers[chosen] is None else "final_answer"
    return Episode(messages, [step], answers[chosen], stop)


def first_step(cot):
    """The first step of a chain of thought: the text up to the first blank line (Eq. 5's prefix)."""
    return re.split(r"\n[ \t]*\n", cot.strip().replace("\r\n", "\n"))[0].strip()


def _chat(system, user):
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


# ---------------------------------------------------------------------------------------------
# The teacher over HTTP
# ---------------------------------------------------------------------------------------------


def drive(episode, answer):
    """Run one episode to its end. answer(turn): its candidates; a BadRequest ends the episode as an error."""
    try:
        turn = next(episode)
        while True:
            try:
                candidates = answer(turn)
            except BadRequest as error:
                turn = episode.throw(TurnFailed(str(error)))
            else:
                turn = episode.send(candidates)
    except StopIteration as finished:
        return finished.value


def stable_seed(*parts):
    """A 31-bit seed from values, the same in every process (hash() is not)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


# ---------------------------------------------------------------------------------------------
# collect
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class EpisodeConfig:
    """What teacher and student have in common. Defaults are the paper's where it names them."""

    search: str | None = option(None, "index folder or /retrieve URL behind web_search")
    top_k: int = option(3, "passages a search (paper: 3)")
    max_steps: int = option(5, "steps an episode (paper: 5)")
    max_tokens: int = option(1024, "new tokens a step (paper: 1,024)")
    timeout: float = option(10.0, "seconds for one code action")
    prompts: str = option(str(Prompts.default), "folder of prompts")
    api_key_env: str = option("OPENAI_API_KEY", "environment variable that holds the key")


@dataclasses.dataclass(kw_only=True)
class CollectConfig(EpisodeConfig):
    tasks: list[str] = option(REQUIRED, "task files: JSONL, or JSON with a list of examples", positional=True)
    out: str = option(REQUIRED, "trajectories are appended to this JSONL file; what is there is not asked again")
    method: Literal["agent", "cot"] = option("agent", "agent (Eq. 3) or plain chain of thought (Eq. 2)")
    first_thought: bool = option(False, "open the first thought with the first step of a CoT (Eq. 5)")
    cot: str | None = option(None, "earlier `collect --method cot` file with those CoTs; without it they are asked for")
    url: list[str] = option(REQUIRED, "server, ending in /v1; may be repeated", action="append", nargs=None)
    model: str | None = option(None, "model name for the server; without it, the first one it lists")
    kind: Literal["fact", "math"] | None = option(None, "kind of the tasks, for files that do not state it")
    limit: int | None = option(None, "only the first n tasks of each file")
    samples: int = option(1, "trajectories a question (paper: 1); more need a temperature")
    temperature: float = option(0.0, "0 is greedy")
    top_p: float = option(1.0, "nucleus sampling")
    prefix_mode: Literal["auto", "continue", "completions", "instruct"] = option(
        "auto", "how the server continues a prefix; auto: probe for continue_final_message, as vLLM has it"
    )
    tokenizer: str | None = option(None, "whose chat template --prefix-mode completions renders (default: --model)")
    concurrency: int = option(16, "episodes at once")
    retries: int = option(8, "further attempts for a request that failed in a way that may pass")
    request_timeout: float = option(600.0, "seconds for one request")
    price_in: float = option(0.0, "price of a million prompt tokens")
    price_out: float = option(0.0, "price of a million completion tokens")
    budget: float | None = option(None, "stop, cleanly, when this much is spent")
    seed: int = option(0, "seeds every request")
    quiet: bool = option(False, "no progress bar")


def collect(config):
    """Ask a teacher for one trajectory a question, over HTTP, and append each to a file.

    The same command continues after any interruption: finished questions are not asked again.
    """
    if config.samples > 1 and config.temperature == 0:
        raise InputError("--samples above 1 repeats the same greedy answer: give a --temperature")
    tasks = load_tasks(config.tasks, config.kind, config.limit)
    if config.method == "agent" and not config.search and any(task["kind"] == "fact" for task in tasks):
        raise InputError("fact questions need web_search: name an index folder or a /retrieve URL with --search")
    with Journal(config.out) as journal:
        keep_config(f"{config.out}.run.json", config, COLLECT_MAY_CHANGE, binding=bool(journal.rows))
        done = {(row["task"], row["id"], row["sample"]) for row in journal.rows}
        items = [(task, sample) for task in tasks for sample in range(config.samples)]
        todo = [item for item in items if (item[0]["task"], item[0]["id"], item[1]) not in done]
        spent = Spending(config, journal.rows)
        if todo:
            ask = Collector(config)
            affordable = itertools.takewhile(lambda _: not spent.all(), todo)
            title = f"collect {config.method}"
            with progress(total=len(items), done=len(items) - len(todo), desc=title, quiet=config.quiet) as bar:
                for row in in_parallel(ask, affordable, config.concurrency):
                    journal.append(row)
                    spent.add(row)
                    bar.update()
                    bar.set_postfix_str(spent.summary(), refresh=False)
        print(f"{config.out}: {spent.rows} trajectories; {spent.summary()}")
        if spent.all():
            raise InputError(f"the budget of {config.budget:g} is spent; a larger --budget continues from here")


COLLECT_MAY_CHANGE = ("url", "concurrency", "retries", "request_timeout", "budget", "limit", "quiet", "out", "tasks",
                      "price_in", "price_out", "api_key_env")  # fmt: skip


class Collector:
    """Turns one (task, sample) into one trajectory row; threads share it."""

    def __init__(self, config):
        self.config, self.prompts = config, Prompts(config.prompts)
        self.search = open_search(config.search, self.prompts, config.top_k) if config.search else None
        tools = {"web_search": self.search} if self.search else {}
        self.sandboxes = Sandboxes(tools=tools, timeout=config.timeout)
        self.cots = {(row["task"], row["id"]): row for _, row in read_jsonl(config.cot)} if config.cot else {}
        client = Client(config.url, config.model, config.api_key_env, config.request_timeout, config.retries)
        self.speaker = Speaker(
            client, self.prompts, config.prefix_mode, config.tokenizer or client.model,
            temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens,
        )  # fmt: skip
        self.speaker.probe(opening=config.first_thought)

    def __call__(self, item):
        task, sample = item
        start, usage, turns = time.perf_counter(), collections.Counter(), itertools.count()

        def answer(turn):
            seed = stable_seed(self.config.seed, task["task"], task["id"], sample, next(turns))
            stop = STOP if self.config.method == "agent" else None
            return self.speaker.answer(turn, usage, seed=seed, stop=stop)

        cot = self._cot(task, answer) if self.config.first_thought else None
        prefix = first_step(cot) if cot else None
        if self.config.method == "cot":
            episode = cot_episode(task["question"], self.prompts, system=self.prompts.cot_system)
        else:
            episode = agent_episode(
                task["question"],
                self.prompts,
                self.sandboxes,
                system=self.prompts.agent_system,
                max_steps=self.config.max_steps,
                first_thought=prefix,
            )
        row = trajectory(task, self.config.method, drive(episode, answer))
        row |= {"sample": sample, "model": self.speaker.served, "prefix": prefix, "cot": cot}
        return row | {"usage": dict(usage), "seconds": round(time.perf_counter() - start, 3)}

    def _cot(self, task, answer):
        """The chain of thought whose first step becomes the prefix: from the --cot file, or asked for now."""
        row = self.cots.get((task["task"], task["id"]))
        if row is None:
            episode = cot_episode(task["question"], self.prompts, system=self.prompts.cot_system)
            row = {"messages": drive(episode, answer).messages}
        last = row["messages"][-1]
        return last["content"] if last["role"] == "assistant" else None


def trajectory(task, method, episode, judge=None):
    """A finished episode as the row that is stored: the task, what happened, and the grade with its reason."""
    kept = {
        name: task[name] for name in ("id", "task", "kind", "domain", "question", "answer", "aliases") if name in task
    }
    verdict = grade.grade(
        task["kind"], episode.prediction, task["answer"], task.get("aliases", ()), task["question"], judge
    )
    return {**kept, "method": method, **dataclasses.asdict(episode), "correct": verdict.correct, "why": verdict.why}


class Spending:
    """Running totals of a collection: right answers, tokens, retries, cost."""

    def __init__(self, config, rows):
        self.config, self.rows, self.right, self.usage = config, 0, 0, collections.Counter()
        for row in rows:
            self.add(row)

    def add(self, row):
        self.rows += 1
        self.right += row["correct"]
        self.usage.update(row["usage"])

    def cost(self):
        prices = self.config.price_in, self.config.price_out
        return (self.usage["prompt_tokens"] * prices[0] + self.usage["completion_tokens"] * prices[1]) / 1e6

    def all(self):
        return self.config.budget is not None and self.cost() >= self.config.budget

    def summary(self):
        tokens = f"{self.usage['prompt_tokens']:,} + {self.usage['completion_tokens']:,} tokens"
        cost = f", cost {self.cost():.2f}" if self.cost() else ""
        trouble = "".join(f", {self.usage[name]} {name}" for name in ("retries", "truncated") if self.usage[name])
        return f"{self.right / max(self.rows, 1):.1%} right, {tokens}{cost}{trouble}"


if __name__ == "__main__":
    run_command_line(
        __doc__,
        {
            "collect": (CollectConfig, collect),
            "filter": (FilterConfig, filter_trajectories),
            "prefix-gain": (GainConfig, prefix_gain),
        },
    )
