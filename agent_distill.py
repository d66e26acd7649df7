"""Agent distillation (Kang et al., arXiv 2505.17612): the method, and the teacher's side of it.

    URL=http://127.0.0.1:8000/v1
    python agent_distill.py collect train.jsonl --url $URL --out cot.jsonl --method cot
    python agent_distill.py collect train.jsonl --url $URL --out plain.jsonl --search index
    python agent_distill.py collect train.jsonl --url $URL --out agent.jsonl --search index --first-thought cot.jsonl
    python agent_distill.py filter agent.jsonl --out agent.train.jsonl
    python evaluate.py compare plain.jsonl agent.jsonl      # what the first-thought prefix brings to the teacher

Read `agent_episode` first: it is the paper's loop. An episode is a generator. It yields what a model is asked, and
receives candidate texts. The same episode runs with a teacher over HTTP (here) and with a student (evaluate.py).
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import pkgutil
import random
import re
import textwrap
import time
from pathlib import Path
from typing import Literal

import common
import retriever
from common import REQUIRED, InputError, grading, option, read_jsonl, read_text, stable_seed
from common.client import BadRequest, Client, Served, in_parallel
from common.report import table
from sandbox import Observation, Sandbox

# ------------- Prompts and tools: what an episode is given


class Prompts:
    """Every text that a model is shown, one file each: `prompts.question` is prompts/question.txt."""

    default = Path(__file__).parent / "prompts"

    def __init__(self, folder=default):
        self.folder = Path(folder)

    def __getattr__(self, name):
        text = read_text(self.folder / f"{name}.txt")
        setattr(self, name, text)
        return text

    def fill(self, name, **values):
        """The prompt with its {placeholders} replaced, in one pass: braces inside a value stay as they are."""
        return re.sub(r"\{(\w+)\}", lambda m: str(values.get(m[1], m[0])), getattr(self, name))

    def system(self, name, tools):
        """A system prompt. {tools} becomes the descriptions of the tools, {calls} a list of their signatures.

        tools: names. Each is described in prompts/tools/NAME.txt: a signature, a colon, and what the tool does.
        Raises InputError for a tool that is not described.
        """
        described = [read_text(self.folder / "tools" / f"{tool}.txt") for tool in (*tools, "final_answer")]
        calls = [re.sub(r":[^,)]*", "", text[: text.index(")") + 1]) for text in described]  # without annotations
        return self.fill(name, tools="\n".join(f"- {text}" for text in described), calls=", ".join(calls))

    @functools.cached_property
    def sha256(self):
        """One hash of all prompts of the folder. Results made with other prompts must not be mixed with these."""
        texts = {str(path.relative_to(self.folder)): read_text(path) for path in sorted(self.folder.rglob("*.txt"))}
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def open_tools(config, prompts, device=None):
    """The tools of an agent, {name: function}: web_search, and those of --tools.

    A tool takes and returns JSON values, runs in this process, and must be thread-safe. It is described in
    prompts/tools/NAME.txt. The model reads a tool's exception, except an InputError, which ends the run: an index that
    is out of memory, or a server that is gone, would change the results. device: where a dense index keeps its vectors.
    """
    tools = dict(named(config.tools, dict)())
    if config.search:
        index = retriever.load(config.search, device)

        def web_search(query):
            try:
                [hits] = index.search([str(query)], k=config.top_k)
            except (RuntimeError, OSError) as error:  # torch's out-of-memory error is a RuntimeError
                raise InputError(f"web_search failed: {type(error).__name__}: {error}") from None
            texts = []
            for rank, hit in enumerate(hits, 1):
                title, _, text = hit.contents.partition("\n")
                values = {"title": title.strip('"'), "text": text, "score": f"{hit.score:.2f}"}
                texts.append(prompts.fill("search_result", rank=rank, place=rank - 1, **values))
            return "\n\n".join(texts) or "No passages found."

        tools["web_search"] = web_search
    prompts.system("agent_system", tools)  # refuses a tool without a description
    return tools


# ------------- Actions: a thought and code (r_t, a_t), parsed from the text that a model wrote

# The action format of smolagents and of the authors' published trajectories. A test checks that prompts/ uses it.
CODE_OPEN = "```py"
CODE_CLOSE = "```<end_code>"
STOP = ["<end_code>", "\nObservation:"]


@dataclasses.dataclass
class Action:
    """text: what stays in the context. code: None if there is none to run. thinking: what a reasoning model thought
    before it answered, which nothing but the stored step keeps."""

    text: str
    thought: str
    code: str | None
    thinking: str = ""


_THINKING = re.compile(r"\s*+(?:<think>(.*?)(?:</think>|\Z)|((?:(?!<think>).)*?)</think>)\s*", re.S)


def split_thinking(text):
    """Returns (thinking, the rest) of a reply that begins with <think>...</think>.

    Some templates open the tag in the prompt, so it may be missing. A tag that never closes leaves an empty rest.
    """
    thinking, rest = [], text
    while match := _THINKING.match(rest):
        thinking.append((match[1] or match[2] or "").strip())
        rest = rest[match.end() :]
    return "\n\n".join(thinking), rest


_LABEL = r"^[ \t#*_]*+code[ \t*_]*+:[ \t*_]*+"  # "Code:", "code:", "**Code:**"
_CODE_LABEL = re.compile(_LABEL, re.M | re.I)
_FENCE = re.compile(
    rf"""
    (?P<label> {_LABEL} \s*+ | ^ )                         # "Code:" on the same line or above it
    (?: [ \t]*+ (?: [-*+] | \d++[.)] ) [ \t] )? [ \t]*+    # the fence may be an item of a list
    ```+ [ \t]*+
    (?: (?P<python> (?: i?py(?:thon)? [\d.]* | tool_code ) (?![\w+#.-]) [ \t]* ) | (?P<other> [\w+#.-]+ [ \t]* $ ) )?
    (?P<code> (?: \"{{3}}.*?\"{{3}} | '{{3}}.*?'{{3}}         # a string may contain a fence
              | \#[^\n`]* | [^`"'\#\n]+ | . )*? )
    (?P<close> ^[ \t]*```+(?!\w) | ```+[ \t]*$ | (?=^[ \t]*```\w) | \Z )
    """,
    re.M | re.S | re.I | re.X,
)
_CODE_END = re.compile(r"^[ \t]*```|```[ \t]*$|^Observation:", re.M)
_OBSERVATION = re.compile(r"^Observation:", re.M)
_STOP_BEGUN = re.compile(r"((?<=```)<\w*|<end_\w*|\nObserv\w*)\Z")  # a reply that ended inside a stop string
_THOUGHT = re.compile(r"^\s*Thought:[ \t]*")


def parse_action(text, opening=""):
    """Read the thinking, the thought and the code from `opening` and the text with which a model continued it.

    The code is what a reader would run: all fences marked as Python (py, Python, python3, tool_code), joined as in
    smolagents; without one, the first fence that names no language; without a fence, what follows `Code:` or stands in
    <code> tags, which is then given fences. A fence may be indented, on one line, or never closed. The text ends at
    <end_code>, or where the model starts to write an observation of its own outside the code.
    """
    thinking, rest = split_thinking(text)
    text = (opening + rest).replace("\r\n", "\n").split("<end_code>")[0].strip()
    text = _STOP_BEGUN.sub("", text).rstrip()
    if "```" not in text:
        text = re.sub(r"\n?<code>[ \t]*\n?", f"\n{CODE_OPEN}\n", text)
        text = re.sub(r"\n?</code>", "\n```", text).strip()
    fences = _python_fences(text)
    for own in _OBSERVATION.finditer(text):
        if not any(fence["close"] and fence.start() < own.start() < fence.end() for fence in fences):
            text = text[: own.start()].rstrip()
            fences = _python_fences(text)
            break
    label = _CODE_LABEL.search(text)
    # A lone unmarked fence some lines after `Code:` closes the code and does not open it.
    if label and not any(fence["python"] or fence["label"] or fence["close"] for fence in fences):
        code = textwrap.dedent(_CODE_END.split(text[label.end() :])[0]).strip("`\n")
        if code.strip():
            text = f"{text[: label.end()].rstrip()}\n{CODE_OPEN}\n{code}\n```"
            fences = _python_fences(text)
    codes = [textwrap.dedent(fence["code"]).strip("\n").rstrip() for fence in fences]
    thought = text[: fences[0].start()] if fences else text
    if text.endswith("```"):
        text += "<end_code>"  # generation stops before this string; the context shows it
    return Action(text, _THOUGHT.sub("", thought).strip(), "\n\n".join(filter(None, codes)) or None, thinking)


def _python_fences(text):
    """The fences that say they are Python, otherwise the one after `Code:`, otherwise the first without a language."""
    fences = [fence for fence in _FENCE.finditer(text) if not fence["other"]]
    marked = [fence for fence in fences if fence["python"]]
    return marked or [fence for fence in fences if fence["label"]][:1] or fences[:1]


# ------------- The episode


@dataclasses.dataclass
class Turn:
    """What an episode asks of a model: N continuations of `messages`."""

    messages: list
    opening: str = ""  # text with which the assistant's message begins; the candidates continue it


class TurnFailed(Exception):
    """The driver throws this into an episode when no model can answer the turn (the context is too long, ...)."""


@dataclasses.dataclass
class Episode:
    """A finished trajectory tau = ((r_1, a_1, o_1), ..., (r_T, a_T, o_T)), Eq. 3, and how it ended.

    messages: the conversation, ready for training. steps: one dict per step with thought, code, observation,
    error_kind, vote and, where several candidates were sampled, all of them. prediction: a JSON value or None.
    stop: "final_answer" | "max_steps" | "no_answer" (CoT) | "error".
    """

    messages: list
    steps: list
    prediction: object
    stop: str
    error: str | None = None


def votes_of(observations):
    """The vote of each candidate: equal numbers mean equal observations. None: it failed to parse or to run."""
    numbers, votes = {}, []
    for o in observations:
        # Candidates that end the episode agree if they give the same answer, others if they observe the same.
        observed = ("final", json.dumps(o.final_answer, sort_keys=True)) if o.is_final else (o.stdout, o.result)
        votes.append(None if o.error_kind else numbers.setdefault(observed, len(numbers)))
    return votes


def choose(actions, observations, rng):
    """The vote of self-consistent action generation: the index of the candidate to keep.

    The majority wins; a tie goes to the observation that was sampled first. If all candidates failed, one of them is
    kept at random, and the model sees its error. With one candidate (greedy) this is candidate 0.
    """
    votes = votes_of(observations)
    counts = collections.Counter(vote for vote in votes if vote is not None)
    if not counts:
        return rng.randrange(len(actions))
    return votes.index(counts.most_common(1)[0][0])  # of equal counts, the first


def agent_episode(question, prompts, open_sandbox, *, system, max_steps=5, first_thought="", rng=random, choose=choose):
    """The agent's loop: thought, code, observation, until final_answer or the step limit.

    first_thought: with the first-thought prefix (Eq. 5), the first step of the teacher's chain of thought. It opens
    the first thought, and the model continues it. choose: another vote, with the arguments of `choose`.
    """
    task = prompts.fill("question", question=question)
    messages, steps = [{"role": "system", "content": system}, {"role": "user", "content": task}], []
    with open_sandbox() as sandbox:
        for step in range(max_steps):
            opening = f"Thought: {first_thought}" if first_thought and step == 0 else ""
            try:
                candidates = yield Turn(messages, opening)
            except TurnFailed as failure:
                return Episode(messages, steps, None, "error", str(failure))
            actions = [parse_action(text, opening) for text in candidates]
            # Each distinct code runs once, all from the same state. The chosen candidate's state is kept.
            codes = list(dict.fromkeys(action.code for action in actions if action.code is not None))
            ran = dict(zip(codes, sandbox.run_candidates(codes), strict=True)) if codes else {}
            ran[None] = Observation(error=prompts.no_code, error_kind="no_code")
            observations = [ran[action.code] for action in actions]
            chosen = choose(actions, observations, rng)
            action, observation = actions[chosen], observations[chosen]
            if action.code is not None:
                sandbox.commit(codes.index(action.code))
            messages = [*messages, {"role": "assistant", "content": action.text}]
            steps.append(_step(actions, observations, chosen, prompts))
            if observation.is_final:
                return Episode(messages, steps, observation.final_answer, "final_answer")
            messages = [*messages, {"role": "user", "content": steps[-1]["observation"]}]
    return Episode(messages, steps, None, "max_steps")


def _step(actions, observations, chosen, prompts):
    """The step as it is stored: the chosen candidate, and all candidates if there were several."""
    candidates = []
    for action, observation, vote in zip(actions, observations, votes_of(observations), strict=True):
        candidates.append({
            "thought": action.thought,
            "code": action.code,
            "observation": observation_text(observation, prompts),
            "error_kind": observation.error_kind,
            "vote": vote,
        })  # fmt: skip
        if action.thinking:
            candidates[-1]["thinking"] = action.thinking
        if observation.is_final:
            candidates[-1]["final_answer"] = observation.final_answer
    several = {"candidates": candidates, "chosen": chosen} if len(actions) > 1 else {}
    return candidates[chosen] | several


def observation_text(observation, prompts):
    """The observation o_t as the model reads it."""
    name, stdout = "error" if observation.error_kind else "observation", observation.stdout.removesuffix("\n")
    return prompts.fill(name, stdout=stdout, error=observation.error, result=observation.result)


def cot_episode(question, prompts, *, system, search=None):
    """Chain of thought: one turn, no tools. search: for CoT + RAG, the passages for the question are shown with it.

    With several candidates (self-consistency), the majority of the answers wins.
    """
    if search is not None:
        question = prompts.fill("cot_rag_question", passages=search(question), question=question)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    try:
        candidates = yield Turn(messages)
    except TurnFailed as failure:
        return Episode(messages, [], None, "error", str(failure))
    thoughts = [split_thinking(text) for text in candidates]
    answers = [grading.cot_answer(text) for _, text in thoughts]
    counts = collections.Counter(answer for answer in answers if answer is not None)
    chosen = answers.index(counts.most_common(1)[0][0]) if counts else 0
    steps = []
    for (thinking, text), answer in zip(thoughts, answers, strict=True):
        steps.append({"thought": text.strip(), "answer": answer} | ({"thinking": thinking} if thinking else {}))
    step = steps[chosen] | {"code": None, "observation": None, "error_kind": None}
    if len(candidates) > 1:
        step |= {"candidates": steps, "chosen": chosen}
    messages = [*messages, {"role": "assistant", "content": step["thought"]}]
    return Episode(messages, [step], answers[chosen], "no_answer" if answers[chosen] is None else "final_answer")


def first_step(cot):
    """The first step of a chain of thought: the text up to the first blank line. It is the prefix of Eq. 5."""
    text = split_thinking(cot)[1].replace("\r\n", "\n").strip()
    return re.split(r"\n[ \t]*\n", text)[0].strip()


class Running:
    """An episode under way. turn: what it asks for now, None after its end. result: the Episode, None until then."""

    def __init__(self, episode):
        self.episode, self.turn, self.result = episode, None, None
        self.advance(None)

    def advance(self, candidates):
        """Send the candidates (a list of texts), or throw a TurnFailed, into the episode."""
        try:
            send = self.episode.throw if isinstance(candidates, TurnFailed) else self.episode.send
            self.turn = send(candidates)
        except StopIteration as end:
            self.turn, self.result = None, end.value


def drive(episode, answer):
    """Run one episode to its end. answer(turn) returns the candidates; a BadRequest ends the episode as an error."""
    running = Running(episode)
    while running.turn:
        try:
            candidates = answer(running.turn)
        except BadRequest as error:
            candidates = TurnFailed(str(error))
        running.advance(candidates)
    return running.result


@dataclasses.dataclass(kw_only=True)
class EpisodeConfig:
    """What teacher and student have in common. Defaults are the paper's where it names them."""

    search: str | None = option(None, "index folder or /retrieve URL behind web_search")
    top_k: int = option(3, "passages per search (paper: 3)", above=0)
    max_steps: int = option(5, "steps per episode (paper: 5)", above=0)
    max_tokens: int = option(1024, "new tokens per step (paper: 1,024)", above=0)
    timeout: float = option(10.0, "seconds for one code action", above=0)
    isolation: Literal["auto", "require", "off"] = option(
        "auto", "where the kernel cannot contain the code fully: warn (auto), refuse (require), or do not ask (off)"
    )
    tools: str | None = option(None, "MODULE.FUNCTION that returns further tools, {name: function}")
    episode: str | None = option(None, "another loop than agent_episode, as MODULE.FUNCTION")
    choose: str | None = option(None, "another vote over candidates, as MODULE.FUNCTION (default: the majority)")
    # The hash of the prompts' texts is compared, not their folder.
    prompts: str = option(str(Prompts.default), "folder of prompts", changes_results=False)
    api_key_env: str = option(
        "OPENAI_API_KEY", "environment variable that holds the server's key", changes_results=False
    )


def open_episode(config, question, prompts, tools, *, system, first_thought="", rng=random):
    """The episode of one question by config.method: "agent", "cot" or "cot-rag"."""
    if config.method != "agent":
        search = tools["web_search"] if config.method == "cot-rag" else None
        return cot_episode(question, prompts, system=system, search=search)
    open_sandbox = functools.partial(Sandbox, tools=tools, timeout=config.timeout, isolation=config.isolation)
    options = {"system": system, "max_steps": config.max_steps, "first_thought": first_thought, "rng": rng}
    episode, vote = named(config.episode, agent_episode), named(config.choose, choose)
    return episode(question, prompts, open_sandbox, choose=vote, **options)


def named(dotted, default):
    """The function that MODULE.FUNCTION names, or the default if nothing is named."""
    try:
        return pkgutil.resolve_name(dotted) if dotted else default
    except (ImportError, ValueError, AttributeError) as error:
        raise InputError(f"no function {dotted}: {error}") from None


def trajectory_row(task, method, episode, usage):
    """A finished episode as the row that is stored: the task, what happened, the cost, the grade and its reason."""
    fields = ("id", "task", "kind", "domain", "question", "answer", "aliases")
    row = {name: task[name] for name in fields if name in task}
    row |= {"method": method, **dataclasses.asdict(episode)}
    if episode.stop == "no_answer" and usage.get("truncated"):
        row["stop"] = "truncated"  # the reply was cut at --max-tokens before it gave an answer
    aliases = task.get("aliases", ())
    verdict = grading.grade(task["kind"], episode.prediction, task["answer"], aliases, task["question"])
    return row | {"correct": verdict.correct, "why": verdict.why, "usage": dict(usage)}


# ------------- collect, filter


@dataclasses.dataclass(kw_only=True)
class CollectConfig(EpisodeConfig):
    tasks: list[str] = option(
        REQUIRED, "task files: JSONL, or JSON with a list of examples", positional=True, changes_results=False
    )
    out: str = option(
        REQUIRED,
        "trajectories are appended to this JSONL file; finished questions are not asked again",
        changes_results=False,
    )
    method: Literal["agent", "cot"] = option("agent", "agent (Eq. 3) or plain chain of thought (Eq. 2)")
    first_thought: str | None = option(None, "file of --method cot; its first steps open the first thoughts (Eq. 5)")
    url: str = option(REQUIRED, "the teacher's server, ending in /v1", changes_results=False)
    model: str | None = option(None, "the model's name at the server (default: the first one that it lists)")
    kind: Literal["fact", "math"] | None = option(None, "kind of the tasks, for files that do not state it")
    limit: int | None = option(None, "only the first n tasks of each file", above=0, changes_results=False)
    samples: int = option(1, "trajectories per question (paper: 1); more need a temperature", above=0)
    temperature: float = option(0.0, "0 is greedy")
    top_p: float = option(1.0, "nucleus sampling", above=0)
    prefix_mode: Literal["continue", "completions"] = option(
        "continue", "how the server continues a prefix: continue_final_message (vLLM), or the text of the whole chat"
    )
    tokenizer: str | None = option(None, "whose chat template --prefix-mode completions renders (default: --model)")
    concurrency: int = option(16, "episodes at once", above=0, changes_results=False)
    retries: int = option(8, "further attempts for a request that failed", changes_results=False)
    request_timeout: float = option(600.0, "seconds for one request", above=0, changes_results=False)
    seed: int = option(0, "seeds every request")
    quiet: bool = option(False, "no progress bar", changes_results=False)


def collect(config):
    """Ask a teacher for one trajectory per question, over HTTP, and append each to a file.

    The same command continues after an interruption: finished questions are not asked again.
    """
    if config.samples > 1 and config.temperature == 0:
        raise InputError("--samples above 1 repeats the same greedy answer: give a --temperature")
    tasks = common.load_tasks(config.tasks, config.kind, config.limit)
    if config.method == "agent" and not config.search and any(task["kind"] == "fact" for task in tasks):
        raise InputError("fact questions need web_search: name an index folder or a /retrieve URL with --search")
    prompts = Prompts(config.prompts)
    with common.Journal(config.out, fields=("task", "id")) as journal:
        path, binding = f"{config.out}.run.json", bool(journal.rows)
        common.keep_config(path, config, binding=binding, prompts_sha256=prompts.sha256)
        done = {(row["task"], row["id"], row["sample"]) for row in journal.rows}
        items = [(task, sample) for task in tasks for sample in range(config.samples)]
        todo = [item for item in items if (item[0]["task"], item[0]["id"], item[1]) not in done]
        if todo:
            ask = Collector(config, prompts)
            before = len(items) - len(todo)
            with common.progress(total=len(items), done=before, desc=config.method, quiet=config.quiet) as bar:
                for row in in_parallel(ask, todo, config.concurrency):
                    journal.append(row)
                    bar.update()
                    bar.set_postfix_str(_summary(journal.rows), refresh=False)
        print(f"{config.out}: {len(journal.rows)} trajectories; {_summary(journal.rows)}")


class Collector:
    """Turns one (task, sample) into one trajectory row. Threads share it."""

    def __init__(self, config, prompts):
        self.config, self.prompts, self.tools = config, prompts, open_tools(config, prompts)
        self.system = prompts.cot_system if config.method == "cot" else prompts.system("agent_system", self.tools)
        self.prefixes = {}  # without one, the teacher opens its first thought itself
        for _, row in read_jsonl(config.first_thought) if config.first_thought else ():
            if row["stop"] != "error":
                self.prefixes[row["task"], row["id"]] = first_step(row["messages"][-1]["content"])
        client = Client(config.url, config.model, config.api_key_env, config.request_timeout, config.retries)
        sampling = {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_tokens}
        sampling["stop"] = STOP if config.method == "agent" else None
        self.teacher = Served(client, config.prefix_mode, config.tokenizer or client.model, **sampling)
        self.teacher.probe(opening=bool(config.first_thought))

    def __call__(self, item):
        task, sample = item
        start, usage, turns = time.perf_counter(), collections.Counter(), itertools.count()

        def answer(turn):
            seed = stable_seed(self.config.seed, task["task"], task["id"], sample, next(turns))
            return self.teacher.answer(turn, usage, seed=seed)

        prefix = self.prefixes.get((task["task"], task["id"]), "")
        options = {"system": self.system, "first_thought": prefix}
        episode = open_episode(self.config, task["question"], self.prompts, self.tools, **options)
        row = trajectory_row(task, self.config.method, drive(episode, answer), usage)
        row |= {"sample": sample, "model": self.teacher.client.model, "prefix": prefix, "tools": list(self.tools)}
        return row | {"seconds": round(time.perf_counter() - start, 3)}


def _summary(rows):
    usage = sum((collections.Counter(row["usage"]) for row in rows), collections.Counter())
    trouble = "".join(f", {usage[name]} {name}" for name in ("retries", "truncated") if usage[name])
    right = sum(row["correct"] for row in rows) / max(len(rows), 1)
    return f"{right:.1%} right, {usage['prompt_tokens']:,} + {usage['completion_tokens']:,} tokens{trouble}"


@dataclasses.dataclass(kw_only=True)
class FilterConfig:
    trajectories: list[str] = option(REQUIRED, "files written by collect", positional=True)
    out: str = option(REQUIRED, "training file to write")
    per_question: int = option(1, "trajectories kept per question (paper: 1)", above=0)
    prompts: str = option(str(Prompts.default), "folder of prompts: the student's system prompt replaces the teacher's")


def drop_reason(row):
    """Why a trajectory is not learned from, or None. Run-time errors that the teacher then repaired are kept."""
    if row["stop"] == "error":
        return "error"
    if row["stop"] != "final_answer":
        return "no answer"
    if not row["correct"]:
        return "wrong"
    if any(step["error_kind"] in ("no_code", "syntax") for step in row["steps"]):
        return "parse error"
    return None


def check_trajectory(row, where):
    """Raises InputError, in one line that starts with `where`, unless the row is one that `collect` could write."""
    for field in ("id", "task", "kind", "question", "messages", "steps", "correct", "stop", "method"):
        if field not in row:
            raise InputError(f"{where}: not a trajectory: the field {field!r} is missing")
    for field, parts in (("messages", {"role", "content"}), ("steps", {"error_kind"})):
        objects = row[field] if isinstance(row[field], list) else [row[field]]
        if not all(isinstance(part, dict) and parts <= part.keys() for part in objects):
            raise InputError(f"{where}: not a trajectory: {field} must be a list of objects with {sorted(parts)}")
    if row["method"] == "agent" and not isinstance(row.get("tools"), list):
        example = '"tools": ["web_search"]'
        raise InputError(f"{where}: the tools that the agent had are not stated: add a list of names, as {example}")


def filter_trajectories(config):
    """Keep the trajectories with a right answer and without parse errors. Prints what was dropped and why.

    Each conversation gets the short system prompt that the student will be given (paper, Sec. 4).
    """
    prompts, rows = Prompts(config.prompts), []
    for path in config.trajectories:
        for number, row in read_jsonl(path):
            check_trajectory(row, f"{path}:{number}")
            rows.append(row)
    # Rows are stored in the order in which they finished; training must not depend on that.
    rows.sort(key=lambda row: (row["task"], str(row["id"]), row.get("sample", 0)))
    kept, times, counts = [], collections.Counter(), collections.defaultdict(collections.Counter)
    for row in rows:
        question = " ".join(row["question"].casefold().split())
        reason = drop_reason(row) or ("duplicate" if times[question] >= config.per_question else None)
        if not reason:
            times[question] += 1
            kept.append(_training_row(row, prompts))
        counts[row["task"]].update(["asked", reason or "kept", *(["right"] if row["correct"] else [])])
    if not kept:
        raise InputError(f"{', '.join(config.trajectories)}: none of {len(rows)} trajectories can be kept")
    common.write_jsonl(config.out, kept)
    columns = ["asked", "right", "kept", "wrong", "no answer", "parse error", "error", "duplicate"]
    counts["all"] = sum(counts.values(), collections.Counter())
    print(table(["task", *columns], [[name, *(row[c] for c in columns)] for name, row in counts.items()]))


def _training_row(row, prompts):
    agent = row["method"] == "agent"
    system = prompts.system("agent_student_system", row["tools"]) if agent else prompts.cot_system
    messages = [{"role": "system", "content": system}, *(m for m in row["messages"] if m["role"] != "system")]
    fields = {name: row[name] for name in ("id", "task", "kind", "question", "method")}
    steps = [{"error_kind": step["error_kind"]} for step in row["steps"]]
    return fields | {"prefix": bool(row.get("prefix")), "messages": messages, "steps": steps}


if __name__ == "__main__":
    commands = {"collect": (CollectConfig, collect), "filter": (FilterConfig, filter_trajectories)}
    common.run_command_line(__doc__, commands)
