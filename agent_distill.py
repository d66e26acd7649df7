"""Agent distillation (Kang et al., arXiv 2505.17612): the method, and the teacher's side of it.

    URL=http://127.0.0.1:8000/v1
    python agent_distill.py collect train.jsonl --url $URL --out cot.jsonl --method cot
    python agent_distill.py collect train.jsonl --url $URL --out plain.jsonl --search index
    python agent_distill.py collect train.jsonl --url $URL --out agent.jsonl --search index --first-thought cot.jsonl
    python agent_distill.py filter agent.jsonl --out agent.train.jsonl
    python evaluate.py compare plain.jsonl agent.jsonl      # the teacher without and with the first-thought prefix

Read `agent_episode` first: it is the paper's loop. An episode is a generator. It yields what a model is asked, and
receives candidate texts. The same episode runs with a teacher over HTTP (here) and with a student (evaluate.py).
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import random
import re
import sys
import textwrap
import time
from operator import eq
from pathlib import Path
from typing import Literal

import common
import retriever
from common import REQUIRED, InputError, Prompts, grading, option, stable_seed
from common.client import BEGIN_THINKING, END_THINKING, BadRequest, Client, Served, in_parallel
from common.report import FIELDS, GRADED, KEY, table, transcripts
from sandbox import Observation, Sandbox

# ------------- What an episode is given: its options, checked, and its tools


def check_options(config, prompts, kinds=()):
    """Check what the options name, before anything is loaded. kinds: those of the tasks.

    Returns what results depend on besides the options, for common.keep_config: hashes of prompts and of source code.
    """
    tools = further_tools(config)
    if config.search and "web_search" in tools:
        raise InputError(f"--tools {config.tools} has a web_search of its own: leave out --search")
    needs_search = config.method == "cot-rag" or (config.method == "agent" and "fact" in kinds)
    if needs_search and not config.search and "web_search" not in tools:
        raise InputError(f"--method {config.method} needs passages: name an index or a /retrieve URL with --search")
    if config.method != "agent":
        only_agents = ("tools", "episode", "choose", "max_steps", "timeout", "isolation")
        common.refuse(config, only_agents, "only --method agent uses it")
    if config.method == "cot":
        common.refuse(config, ["search"], "--method cot does not search; cot-rag does")
    if not config.search:
        common.refuse(config, ["top_k"], "there is no --search")
    facts = {"prompts_sha256": prompts.sha256(config.method)}
    for name, like in (("tools", lambda: {}), ("episode", agent_episode), ("choose", choose)):
        if dotted := getattr(config, name):
            facts[f"{name}_sha256"] = common.source_hash(common.resolve(dotted, like, f"--{name}"))
    if config.search and (digest := retriever.check_index(config.search)):
        facts["index_sha256"] = digest
    if config.method == "agent":
        facts["tool_names"] = [*tools, *(["web_search"] if config.search else [])]
        prompts.system("agent_system", facts["tool_names"])  # refuses a tool without a description
    return facts


def further_tools(config):
    """Returns the tools of --tools, {name: function}."""
    function = common.resolve(config.tools, name="--tools") if config.tools else dict
    try:
        tools = function()
    except Exception as error:  # the function's own code may raise anything
        raise InputError(f"--tools {config.tools}: {type(error).__name__}: {error}") from None
    if not isinstance(tools, dict) or "final_answer" in tools or not all(map(callable, tools.values())):
        raise InputError(f"--tools {config.tools}: {{name: function}} was expected, not {tools!s:.80}")
    return tools


def open_tools(config, prompts, device=None):
    """Returns the tools of an agent, {name: function}: web_search, and those of --tools.

    A tool takes and returns JSON values, runs in this process, and must be thread-safe. The model reads its exception,
    except an InputError, which ends the run: if search fails, the run stops. device: where a dense index keeps its
    vectors.
    """
    tools = dict(further_tools(config))
    if config.search:
        index = retriever.load(config.search, device)

        def web_search(query):
            try:
                [hits] = index.search([str(query)], k=config.top_k)
            except (RuntimeError, OSError) as error:  # torch's out-of-memory error is a RuntimeError
                raise InputError(f"web_search failed: {type(error).__name__}: {error}") from None
            texts = []
            for rank, hit in enumerate(hits, 1):
                values = {"rank": rank, "place": rank - 1, "title": hit.title, "text": hit.text}
                texts.append(prompts.fill("search_result", **values, score=f"{hit.score:.2f}"))
            return "\n\n".join(texts) or "No passages found."

        tools["web_search"] = web_search
    return tools


# ------------- Actions: a thought and code (r_t, a_t), parsed from the text that a model wrote

# The action format of smolagents and of the authors' published trajectories. A test checks that prompts/ uses it.
CODE_OPEN = "```py"
CODE_CLOSE = "```<end_code>"
STOP = ["<end_code>", "\nObservation:"]


@dataclasses.dataclass
class Action:
    """text: what stays in the context. code: None if there is none to run. thinking: cut off, kept in the step only."""

    text: str
    thought: str
    code: str | None
    thinking: str = ""


_THINKING = re.compile(
    rf"\s*+(?:{BEGIN_THINKING}(.*?)(?:{END_THINKING}|\Z)|((?:(?!{BEGIN_THINKING}).)*?){END_THINKING})\s*", re.S | re.I
)


def split_thinking(text):
    """Returns (thinking, the rest) of a reply that begins with <think>...</think>, or what other models write for it.

    Some templates open the tag in the prompt, so it may be missing. A tag that never closes leaves an empty rest.
    """
    thinking = []
    while match := _THINKING.match(text):
        thinking.append((match[1] or match[2] or "").strip())
        text = text[match.end() :]
    return "\n\n".join(thinking), text


_LABEL = r"^[ \t#*_]*+code[ \t*_]*+:[ \t*_]*+"  # "Code:", "code:", "**Code:**"
_FENCE = re.compile(
    rf"""
    (?P<label> {_LABEL} \s*+ | ^ )                       # "Code:" on the same line or above it
    (?: [ \t]*+ (?: [-*+] | \d++[.)] ) [ \t] )? [ \t]*+  # the fence may be an item of a list
    ```+ [ \t]*+
    (?: (?P<python>
          (?: \{{\.? )? (?: i?py(?:thon)? [\d.]* | tool_code ) (?![\w+#.-])
          (?: [^\n`{{}}]* \}} )? (?: [ \t]+ (?: \w+=["'] | \{{ ) [^\n`]* $ )?  # {{.python}}, python title="a.py"
          [ \t]* )
      | (?P<other> [\w+#.-]+ [ \t]* $ ) )?
    (?P<code> (?: \"{{3}}.*?\"{{3}} | '{{3}}.*?'{{3}} | \#[^\n`]* | [^`"'\#\n]+ | . )*? )  # a string may hold a fence
    (?P<close> ^[ \t]*```+(?!\w) | ```+[ \t]*$ | (?=^[ \t]*```\w) | \Z )
    """,
    re.M | re.S | re.I | re.X,
)
_UNFENCED = re.compile(rf"{_LABEL}(?:\s*<code>)?|<code>", re.M | re.I)
_UNFENCED_END = re.compile(r"</code>|^[ \t]*```|```[ \t]*$", re.M | re.I)
_OBSERVATION = re.compile(  # after code, also in other spellings
    r"^[ \t#*_>]*+(?:(?P<exact>Observation(?::|[ \t]*$)|Execution logs:)"
    r"|(?i:observations?[ \t]*\d*[ \t*_]*(?::|$)|last output from code snippet:|<observation>))",
    re.M,
)
_STOP_BEGUN = re.compile(r"((?<=```)<\w*|<end_\w*|\nObserv\w*)\Z")  # a reply that ended inside a stop string
_THOUGHT = re.compile(r"^\s*Thought:[ \t]*")


def parse_action(text, opening=""):
    """Read the thinking, the thought and the code from `opening` and the text that continues it. Returns an Action.

    The code is what a reader would run: all fences marked as Python (py, Python, python3, tool_code), joined as in
    smolagents; without one, the first fence that names no language; without a fence, what follows `Code:` or is in
    <code> tags, which is then given a fence. A fence may be indented, on one line, or never closed. The text ends at
    <end_code>, or where the model starts to write an observation of its own outside the code.
    """
    thinking, rest = split_thinking(text)
    text = _STOP_BEGUN.sub("", (opening + rest).replace("\r\n", "\n").split("<end_code>")[0].strip()).rstrip()
    fences = _python_fences(text)
    for own in _OBSERVATION.finditer(text):
        inside = any(fence["close"] and fence.start() < own.start() < fence.end() for fence in fences)
        if not inside and (own["exact"] or (fences and fences[0].end() <= own.start())):
            text = text[: own.start()].rstrip()
            fences = _python_fences(text)
            break
    start = _UNFENCED.search(text)
    # A lone unmarked fence some lines after `Code:` closes the code and does not open it.
    if start and not any(fence["python"] or fence["label"] or fence["close"] for fence in fences):
        code = textwrap.dedent(_UNFENCED_END.split(text[start.end() :])[0]).strip("`\n")
        if code.strip():
            text = f"{text[: start.start()].rstrip()}\nCode:\n{CODE_OPEN}\n{code}\n```".lstrip()
            fences = _python_fences(text)
    codes = [textwrap.dedent(fence["code"]).strip("\n").rstrip() for fence in fences]
    thought = text[: fences[0].start()] if fences else text
    if text.endswith("```"):
        text += "<end_code>"  # generation stops before this string; the context shows it
    return Action(text, _THOUGHT.sub("", thought).strip(), "\n\n".join(filter(None, codes)) or None, thinking)


def _python_fences(text):
    """Returns the fences marked as Python, otherwise the one after `Code:`, otherwise the first without a language."""
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


def merge_equal(answers, same):
    """Returns the answers, each replaced by the first one that is the same, so that a vote can compare them."""
    merged = []
    for answer in answers:
        merged.append(next((other for other in merged if same(answer, other)), answer))
    return merged


def alike(observations, same):
    """Returns the observations as a vote compares them: of final answers that are the same, all are the first one."""
    answers = merge_equal([o.final_answer for o in observations], same)
    return [dataclasses.replace(o, final_answer=answer) for o, answer in zip(observations, answers, strict=True)]


def votes_of(observations):
    """Returns a number for each candidate: equal for equal observations, None if it failed to parse or to run."""
    numbers, votes = {}, []
    for o in observations:
        # Candidates that end the episode agree if they give the same answer, others if they observe the same.
        observed = ("final", json.dumps(o.final_answer, sort_keys=True)) if o.is_final else (o.stdout, o.result)
        votes.append(None if o.error_kind else numbers.setdefault(observed, len(numbers)))
    return votes


def choose(actions, observations, rng):
    """Returns the index of the candidate to keep: the vote of self-consistent action generation (SC-action).

    The majority wins; a tie goes to the observation that was sampled first. If all candidates failed, one of them is
    kept at random, and the model sees its error. With one candidate (greedy) this is candidate 0.
    """
    votes = votes_of(observations)
    counts = collections.Counter(vote for vote in votes if vote is not None)
    if not counts:
        return rng.randrange(len(actions))
    return votes.index(counts.most_common(1)[0][0])  # of equal counts, the first


def agent_episode(
    question, prompts, open_sandbox, *, system, max_steps=5, first_thought="", rng=random, choose=choose, same=eq
):
    """The agent's loop: thought, code, observation, until final_answer or the step limit.

    first_thought: with the first-thought prefix (Eq. 5), the first step of the teacher's chain of thought. It opens
    the first thought, and the model continues it. choose: another vote, with the arguments of `choose`. same(a, b):
    whether two final answers are one answer in the vote.
    """
    task = prompts.fill("question", question=question)
    messages, steps = [{"role": "system", "content": system}, {"role": "user", "content": task}], []
    with open_sandbox() as sandbox:
        for step in range(max_steps):
            opening = f"Thought: {first_thought.strip()}" if first_thought and step == 0 else ""
            try:
                candidates = yield Turn(messages, opening)
            except TurnFailed as failure:
                return Episode(messages, steps, None, "error", str(failure))
            actions = [parse_action(text, opening) for text in candidates]  # (r_t, a_t)
            codes = list(dict.fromkeys(action.code for action in actions if action.code is not None))
            observations = observe(sandbox, actions, codes, prompts)  # o_t
            compared = alike(observations, same)
            chosen = choose(actions, compared, rng)
            action, observation = actions[chosen], observations[chosen]
            if action.code is not None:
                sandbox.commit(codes.index(action.code))  # the chosen candidate's state is kept
            messages = [*messages, {"role": "assistant", "content": action.text}]
            steps.append(_step(actions, observations, chosen, choose, compared, prompts))
            if observation.is_final:
                return Episode(messages, steps, observation.final_answer, "final_answer")
            messages = [*messages, {"role": "user", "content": steps[-1]["observation"]}]
    return Episode(messages, steps, None, "max_steps")


def observe(sandbox, actions, codes, prompts):
    """Run each distinct code once, all from the same state. Returns an Observation for each action."""
    ran = dict(zip(codes, sandbox.run_candidates(codes), strict=True)) if codes else {}
    ran[None] = Observation(error=prompts.no_code, error_kind="no_code")
    return [ran[action.code] for action in actions]


def _step(actions, observations, chosen, voted_by, compared, prompts):
    """Returns the step as it is stored: the chosen candidate, and all candidates if there were several."""
    # Another vote than `choose` is stored as one vote, for the candidate that it chose.
    votes = votes_of(compared) if voted_by is choose else [0 if i == chosen else None for i in range(len(actions))]
    candidates = []
    for action, o, vote in zip(actions, observations, votes, strict=True):
        shown = {"stdout": o.stdout.removesuffix("\n"), "error": o.error, "result": o.result}
        candidate = {"thought": action.thought, "code": action.code}
        candidate["observation"] = prompts.fill("error" if o.error_kind else "observation", **shown)
        candidate |= {"error_kind": o.error_kind, "vote": vote}
        candidate |= {"thinking": action.thinking} if action.thinking else {}
        candidate |= {"final_answer": o.final_answer} if o.is_final else {}
        candidates.append(candidate)
    several = {"candidates": candidates, "chosen": chosen} if len(actions) > 1 else {}
    return candidates[chosen] | several


def cot_episode(question, prompts, *, system, search=None, same=eq):
    """Chain of thought: one turn, no tools. search: for CoT + RAG, the passages for the question are shown with it.

    With several candidates (self-consistency), the majority of the answers wins; same: as in agent_episode.
    """
    if search is not None:
        question = prompts.fill("cot_rag_question", passages=search(question), question=question)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    try:
        candidates = yield Turn(messages)
    except TurnFailed as failure:
        return Episode(messages, [], None, "error", str(failure))
    thoughts = [split_thinking(text) for text in candidates]
    answers = merge_equal([grading.cot_answer(text) for _, text in thoughts], same)
    counts = collections.Counter(answer for answer in answers if answer is not None)
    chosen = answers.index(counts.most_common(1)[0][0]) if counts else 0
    steps = []
    for (thinking, text), answer in zip(thoughts, answers, strict=True):
        steps.append({"thought": text.strip(), "answer": answer} | ({"thinking": thinking} if thinking else {}))
    several = {"candidates": steps, "chosen": chosen} if len(steps) > 1 else {}
    step = steps[chosen] | {"code": None, "observation": None, "error_kind": None} | several
    messages = [*messages, {"role": "assistant", "content": step["thought"]}]
    return Episode(messages, [step], answers[chosen], "no_answer" if answers[chosen] is None else "final_answer")


def first_step(cot):
    """Returns the first step of a chain of thought: the text up to the first blank line. It is the prefix of Eq. 5."""
    text = split_thinking(cot)[1].replace("\r\n", "\n").strip()
    return re.split(r"\n[ \t]*\n", text)[0].strip()


class Running:
    """An episode that has started. turn: the Turn that it waits for, None at its end. result: the Episode, then."""

    def __init__(self, episode):
        self.episode = episode
        self.turn = None
        self.result = None
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
    timeout: float = option(10.0, "seconds for one code action", at_least=0.001, at_most=1e6)
    isolation: Literal["auto", "require", "off"] = option(
        "auto", "if the kernel lacks a protection: warn (auto) or refuse (require); off: only time-outs and rlimits"
    )
    tools: str | None = option(None, "MODULE.FUNCTION that returns further tools, {name: function}")
    episode: str | None = option(None, "another loop than agent_episode, as MODULE.FUNCTION")
    choose: str | None = option(None, "another vote over candidates, as MODULE.FUNCTION (default: the majority)")
    # The hash of the prompts' texts is compared, not their folder.
    prompts: str = option(str(Prompts.default), "folder of prompts", changes_results=False)
    api_key_env: str = option("OPENAI_API_KEY", "environment variable with the server's key", changes_results=False)


def open_episode(config, question, prompts, tools, *, system, kind=None, first_thought="", rng=random):
    """Returns the episode of one question by config.method. kind: "fact" or "math"; how a vote compares answers."""
    same = functools.partial(grading.same, kind) if kind else eq
    if config.method != "agent":
        search = tools["web_search"] if config.method == "cot-rag" else None
        return cot_episode(question, prompts, system=system, search=search, same=same)
    open_sandbox = functools.partial(Sandbox, tools=tools, timeout=config.timeout, isolation=config.isolation)
    episode = common.resolve(config.episode, name="--episode") if config.episode else agent_episode
    vote = common.resolve(config.choose, name="--choose") if config.choose else choose
    options = {"system": system, "max_steps": config.max_steps, "first_thought": first_thought}
    return episode(question, prompts, open_sandbox, **options, rng=rng, choose=vote, same=same)


def task_key(row):
    """Returns a key that identifies a question in tasks and in rows, even if two files use the same ids."""
    return row["task"], row["id"], row["question"], json.dumps(row["answer"])


def trajectory_row(task, method, episode, usage):
    """Returns the row that is stored for a finished episode: task, steps, cost, grade and the grade's reason."""
    fields = ("id", "task", "kind", "domain", "question", "answer", "aliases")
    row = {name: task[name] for name in fields if name in task}
    row |= {"method": method, **dataclasses.asdict(episode)}
    if episode.stop == "no_answer" and usage.get("truncated"):
        row["stop"] = "truncated"  # the reply was cut at --max-tokens before it gave an answer
    gold = task["answer"], task.get("aliases") or (), task["question"]
    verdict = grading.grade(task["kind"], episode.prediction, *gold)
    return row | {"correct": verdict.correct, "why": verdict.why, "usage": dict(usage)}


# ------------- collect, filter


@dataclasses.dataclass(kw_only=True)
class CollectConfig(EpisodeConfig):
    tasks: list[str] = option(REQUIRED, 'JSONL or {"examples": [...]}', positional=True, changes_results=False)
    out: str = option(REQUIRED, "JSONL file to which trajectories are appended", changes_results=False)
    method: Literal["agent", "cot"] = option("agent", "agent (Eq. 3) or plain chain of thought (Eq. 2)")
    first_thought: str | None = option(None, "file of --method cot; its first steps open the first thoughts (Eq. 5)")
    url: str = option(REQUIRED, "the teacher's server, ending in /v1", changes_results=False)
    model: str | None = option(None, "the model's name at the server (default: the first one that it lists)")
    kind: Literal["fact", "math"] | None = option(None, "kind of the tasks, for files that do not state it")
    limit: int | None = option(None, "only the first n tasks of each file", above=0, changes_results=False)
    samples: int = option(1, "trajectories per question (paper: 1); more need a temperature", above=0)
    temperature: float = option(0.0, "0 is greedy", at_least=0)
    top_p: float = option(1.0, "nucleus sampling", above=0, at_most=1)
    prefix_tokenizer: str | None = option(
        None, "tokenizer of the teacher, for a server that does not continue a message: it is sent the chat as text"
    )
    chat_template_kwargs: str | None = option(None, """JSON for its template, such as '{"enable_thinking": false}'""")
    concurrency: int = option(16, "episodes at once", above=0, changes_results=False)
    seed: int = option(0, "seeds every request")
    quiet: bool = option(False, "no progress bar", changes_results=False)


def collect(config):
    """Ask a teacher for one trajectory per question, over HTTP, and append each to a file.

    The same command continues after an interruption: finished questions are not asked again, failed ones are.
    Returns exit status 1 if all ended in an error.
    """
    if config.samples > 1 and config.temperature == 0:
        raise InputError("--samples above 1 repeats the same greedy answer: give a --temperature")
    if config.first_thought and config.method != "agent":
        raise InputError("--first-thought opens the thoughts of an agent: --method agent")
    if not config.first_thought:
        common.refuse(config, ["prefix_tokenizer"], "there is no --first-thought")
    if config.temperature == 0:
        common.refuse(config, ["top_p"], "greedy answers do not use it; add --temperature")
    tasks = common.load_tasks(config.tasks, config.kind, config.limit)
    prompts = Prompts(config.prompts)
    facts = check_options(config, prompts, {task["kind"] for task in tasks})
    system = prompts.cot_system
    if config.method == "agent":
        system = prompts.system("agent_system", facts["tool_names"], config.max_steps)
    facts["system_prompt_sha256"] = hashlib.sha256(system.encode()).hexdigest()
    prefixes = first_thoughts(config.first_thought, tasks) if config.first_thought else {}
    items = {(*task_key(task), sample): (task, sample) for task in tasks for sample in range(config.samples)}
    with common.Journal(config.out, GRADED | {"sample": int, "usage": dict, "model": str}) as journal:
        # A question that ended in an error is asked again. Its last row counts; see report.transcripts.
        journal.rows = [row for row in journal.rows if row["stop"] != "error"]
        for row in journal.rows:
            if row.get("prefix", "") != prefixes.get(question_key(row["question"]), ""):
                raise InputError(f"{config.out}: task {row['task']}, id {row['id']} has another first thought there")
        done = {(*task_key(row), row["sample"]) for row in journal.rows}
        todo = [item for key, item in items.items() if key not in done]
        facts["model"] = config.model or (journal.rows[0]["model"] if done else None)
        common.keep_config(f"{config.out}.run.json", config, binding=bool(done), **facts)
        if todo:
            client = Client(config.url, config.model, config.api_key_env)
            facts["model"] = client.model  # refused if the server has another model now
            common.keep_config(f"{config.out}.run.json", config, binding=bool(done), **facts)
            ask = teacher(config, prompts, system, prefixes, client)
            before = len(items) - len(todo)
            with common.progress(total=len(items), done=before, desc=config.method, quiet=config.quiet) as bar:
                for row in in_parallel(ask, todo, config.concurrency):
                    journal.append(row)
                    bar.update()
                    bar.set_postfix_str(_summary(journal.rows), refresh=False)
        print(f"{config.out}: {len(journal.rows)} trajectories; {_summary(journal.rows)}")
        return int(all(row["stop"] == "error" for row in journal.rows))


def question_key(text):
    """Returns the question without differences in case and white space."""
    return " ".join(text.casefold().split())


def first_thoughts(path, tasks):
    """Returns {question_key: the first step of its chain of thought} (Eq. 5), from a file of `collect --method cot`.

    Prints for how many of the tasks there is none; the teacher begins their first thoughts itself.
    """
    prefixes = {}
    for row in sorted(read_trajectories(path), key=lambda row: row.get("sample", 0)):
        if row["method"] == "cot" and row["stop"] != "error":
            [reply] = row["messages"][-1:] or [{"content": ""}]
            prefixes.setdefault(question_key(row["question"]), first_step(reply["content"]))
    missing = sum(not prefixes.get(question_key(task["question"])) for task in tasks)
    if missing == len(tasks):
        raise InputError(f"--first-thought {path}: it has a chain of thought for none of the {missing} questions")
    if missing:
        print(f"note: {path} has no first thought for {missing} of {len(tasks)} questions", file=sys.stderr)
    return prefixes


def teacher(config, prompts, system, prefixes, client):
    """Returns a function that turns one (task, sample) into one trajectory row. Threads share it."""
    tools = open_tools(config, prompts) if config.method == "agent" else {}
    sampling = {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_tokens}
    sampling["stop"] = STOP if config.method == "agent" else None
    template = config.chat_template_kwargs and common.parse_object(
        config.chat_template_kwargs, "--chat-template-kwargs"
    )
    served = Served(client, config.prefix_tokenizer, template, **sampling)
    served.probe(opening=bool(prefixes))
    facts = {"model": client.model, "tools": list(tools), "prompts_sha256": prompts.sha256(config.method)}

    def ask(item):
        task, sample = item
        start, usage, turns = time.perf_counter(), collections.Counter(), itertools.count()

        def answer(turn):
            seed = stable_seed(config.seed, task["task"], task["id"], sample, next(turns))
            return served.answer(turn, usage, seed=seed)

        prefix = prefixes.get(question_key(task["question"]), "")
        options = {"system": system, "kind": task["kind"], "first_thought": prefix}
        episode = drive(open_episode(config, task["question"], prompts, tools, **options), answer)
        row = trajectory_row(task, config.method, episode, usage) | facts
        return row | {"sample": sample, "prefix": prefix, "seconds": round(time.perf_counter() - start, 3)}

    return ask


def _summary(rows):
    usage = sum((collections.Counter(row["usage"]) for row in rows), collections.Counter())
    right = sum(row["correct"] for row in rows) / max(len(rows), 1)
    text = f"{right:.1%} right, {usage['prompt_tokens']:,} + {usage['completion_tokens']:,} tokens"
    text += "".join(f", {usage[name]} {name}" for name in ("retries", "truncated") if usage[name])
    errors = collections.Counter(row["error"] for row in rows if row["stop"] == "error").most_common(1)
    return text + "".join(f", {sum(row['stop'] == 'error' for row in rows)} errors ({error})" for error, _ in errors)


@dataclasses.dataclass(kw_only=True)
class FilterConfig:
    trajectories: list[str] = option(REQUIRED, "files written by collect", positional=True)
    out: str = option(REQUIRED, "training file to write")
    per_question: int = option(1, "trajectories kept per question (paper: 1)", above=0)
    prompts: str = option(str(Prompts.default), "folder of prompts: the student's system prompt replaces the teacher's")


def drop_reason(row):
    """Returns why a trajectory is not used in training, or None. Run-time errors that were repaired are allowed."""
    if row["stop"] == "error":
        return "error"
    if row["stop"] != "final_answer":
        return "no answer"
    if not row["correct"]:
        return "wrong"
    if any(step["error_kind"] in ("no_code", "syntax") for step in row["steps"]):
        return "parse error"
    return None


def read_trajectories(path):
    """Returns the rows of a file that `collect` wrote. Raises InputError in one line for anything else."""
    parts = {"messages": ["role", "content"], "steps": ["error_kind"]}
    rows = transcripts(path, FIELDS | KEY | parts | {"method": str, "tools?": list})
    for row in rows:
        where = f"{path}: task {row['task']}, id {row['id']}"
        if row["method"] not in common.SHOWN:
            raise InputError(f"{where}: a method {row['method']!r} is not known")
        if row["method"] == "agent" and "tools" not in row:
            raise InputError(f'{where}: the tools are not stated: add a list, as "tools": ["web_search"]')
    return rows


def filter_trajectories(config):
    """Keep the trajectories with a right answer and without parse errors. Prints what was dropped and why.

    Each conversation gets the short system prompt that the student will be given (paper, Sec. 4).
    """
    if Path(config.out).exists():
        _, first = next(common.read_jsonl(config.out), (0, {}))
        if {"answer", "stop"} & first.keys():
            raise InputError(f"--out {config.out}: it holds trajectories or tasks, which would be lost: name another")
    prompts = Prompts(config.prompts)
    rows = [row for path in config.trajectories for row in read_trajectories(path)]
    # Rows are stored in the order in which they finished; training must not depend on that.
    rows.sort(key=lambda row: (row["task"], str(row["id"]), row.get("sample", 0)))
    kept, times, counts = [], collections.Counter(), collections.defaultdict(collections.Counter)
    for row in rows:
        question = question_key(row["question"])
        reason = drop_reason(row) or ("duplicate" if times[question] >= config.per_question else None)
        if not reason:
            times[question] += 1
            kept.append(_training_row(row, prompts))
        counts[row["task"]].update(["asked", reason or "kept", *(["right"] if row["correct"] else [])])
    if not kept:
        raise InputError(f"{', '.join(config.trajectories)}: none of {len(rows)} trajectories can be kept")
    common.write_jsonl(config.out, kept)
    columns = ["asked", "right", "kept", "wrong", "no answer", "parse error", "error", "duplicate"]
    others = sum(row.get("prompts_sha256") not in (None, prompts.sha256(row["method"])) for row in kept)
    if others:
        print(f"note: {others} of {len(kept)} were collected with other prompts than {prompts.folder}", file=sys.stderr)
    if len({tuple(row["tools"]) for row in kept if row["method"] == "agent"}) > 1:
        print("note: the trajectories were collected with different tools", file=sys.stderr)
    counts["all"] = sum(counts.values(), collections.Counter())
    print(table(["task", *columns], [[name, *(row[c] for c in columns)] for name, row in counts.items()]))


def _training_row(row, prompts):
    agent = row["method"] == "agent"
    system = prompts.system("agent_student_system", row["tools"]) if agent else prompts.cot_system
    messages = [{"role": "system", "content": system}, *(m for m in row["messages"] if m["role"] != "system")]
    names = ("id", "task", "kind", "question", "method", "tools", "prompts_sha256")
    fields = {name: row[name] for name in names if name in row}
    steps = [{"error_kind": step["error_kind"]} for step in row["steps"]]
    return fields | {"prefix": bool(row.get("prefix")), "messages": messages, "steps": steps}


if __name__ == "__main__":
    commands = {"collect": (CollectConfig, collect), "filter": (FilterConfig, filter_trajectories)}
    common.run_command_line(__doc__, commands)
