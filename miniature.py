"""The door to `make reproduce`: an invented world, a scripted teacher behind a real server, students from scratch.

    python miniature.py world --out runs/miniature/world --seed 0
    python miniature.py teacher runs/miniature/world --then 'python agent_distill.py collect ... --url $TEACHER_URL'
    python miniature.py base --world runs/miniature/world --size M --out runs/miniature/base-M --seed 0

Nothing here is known to the rest of the code: it reads task files, talks to a server and loads models as it
would with real ones. What is invented is said: world.py makes the questions; the teacher is a script, not a model,
and its mistakes are drawn at stated rates; the base students have a few hand-made attention heads (see `base`).
"""

import dataclasses
import hashlib
import http.server
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Literal

import world
from client import cut_at_stop
from common import REQUIRED, InputError, keep_config, option, read_jsonl, run_command_line, write_json, write_jsonl
from tasks import Prompts

# ---------------------------------------------------------------------------------------------
# world
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class WorldConfig:
    out: str = option(REQUIRED, "folder to write")
    seed: int = option(0, "another seed is another world")
    train_questions: int = option(8000, "training questions; different questions teach more than further epochs")
    test_questions: int = option(50, "test questions a task")


def make_world(config):
    """Write passages, training and test questions, and the teacher's script, of one seed."""
    built = world.build(config.seed, config.train_questions, config.test_questions)
    out = Path(config.out)
    write_jsonl(out / "passages.jsonl", built.passages)
    write_jsonl(out / "train.jsonl", built.train)
    for task, rows in built.test.items():
        write_jsonl(out / "test" / f"{task}.jsonl", rows)
    write_jsonl(out / "plans.jsonl", built.plans)
    write_json(out / "run.json", dataclasses.asdict(config))
    tests = sum(map(len, built.test.values()))
    print(f"{out}: {len(built.passages)} passages, {len(built.train)} training and {tests} test questions")


# ---------------------------------------------------------------------------------------------
# The scripted teacher: what it says
# ---------------------------------------------------------------------------------------------

MODEL = "scripted-teacher"


@dataclasses.dataclass(kw_only=True)
class TeacherConfig:
    """Each rate is a chance that the script errs, as large models do; the first two are the prefix's room to help."""

    world: str = option(REQUIRED, "folder made by `world`", positional=True)
    port: int = option(0, "port on 127.0.0.1; 0 takes a free one")
    then: str | None = option(None, "serve while this shell command runs, with $TEACHER_URL set; exit with its status")
    wrong_plan: float = option(0.12, "the agent opens with a wrong plan, and follows it")
    wrong_plan_cot: float = option(0.03, "the same in a chain of thought; a first-thought prefix hands it to the agent")
    syntax_error: float = option(0.01, "the code of a step does not parse; mended in the next step")
    run_error: float = option(0.02, "the code of a step raises an error; mended in the next step")
    slip: float = option(0.01, "a wrong name in a query (mended in the next step) or a wrong digit in a number (not)")
    slip_cot: float = option(0.05, "a wrong value in a fact recalled, a wrong digit in a result computed in the head")
    seed: int = option(0, "part of every draw")
    quiet: bool = option(False, "do not print the address")


class Teacher:
    """Answers a chat from its messages alone, as any chat server does.

    It looks up the script for the question, reads its own plan out of its first thought (or out of the
    prefix that opens it) and what it knows out of the observations. In a chain of thought there are no
    observations: it knows the passages by heart, as a large model knows facts, and computes in its head.
    """

    def __init__(self, config):
        folder = Path(config.world)
        self.config = config
        self.plans = {row["question"]: row for _, row in read_jsonl(folder / "plans.jsonl")}
        self.facts = read_facts("\n\n".join(row["contents"] for _, row in read_jsonl(folder / "passages.jsonl")))
        self.names = sorted(self.facts)

    def reply(self, messages, opening="", salt=""):
        """The text that follows `opening`. salt: what tells one sample from another (seed and number)."""
        key = json.dumps([self.config.seed, salt, messages, opening])
        rng = random.Random(hashlib.sha256(key.encode()).digest())
        system = "".join(m["content"] for m in messages if m["role"] == "system")
        turns = [m for m in messages if m["role"] != "system"]
        asked = turns[0]["content"].strip()
        plan = self.plans.get(asked.removeprefix("New task:").strip())
        if plan is None:
            return (" " if opening else "") + "I am a script and have no plan for this."
        if "<end_code>" not in system:
            return self.chain_of_thought(plan, rng)
        thought, code = self.step(plan, turns[1:], opening, rng)
        return (thought if not opening else "") + f"\nCode:\n```py\n{code}\n```<end_code>"

    def draw_need(self, plan, rng, wrong_rate):
        """The plan in words: what is needed. A wrong one forgets the last hop, or errs in one place."""
        wrong = rng.random() < wrong_rate
        if plan["shape"] == "math":
            return plan["wrong"] if wrong else plan["need"]
        relations = plan["relations"]
        if wrong:
            others = [r for r in self.facts[plan["entities"][0]] if r != relations[0]]
            relations = relations[:-1] or [rng.choice(others)]
        return state(plan, *(world.possessive(entity, relations) for entity in plan["entities"]))

    def chain_of_thought(self, plan, rng):
        need = self.draw_need(plan, rng, self.config.wrong_plan_cot)
        if plan["shape"] == "math":
            answer = world.run_code(plan["code"] if need == plan["need"] else plan["wrong_code"])
            if rng.random() < self.config.slip_cot:
                answer = wrong_digit(answer, rng)
            formula = re.sub(r"[A-Za-z_]+", lambda m: str(plan["values"].get(m[0], m[0])), need)
            steps = [f"That is {formula}, so {answer}."]
        else:
            steps, values = [], []
            for entity, *relations in read_need(need):
                for relation in relations:
                    value = self.facts[entity][relation]
                    if rng.random() < self.config.slip_cot:
                        value = rng.choice([f[relation] for f in self.facts.values() if relation in f])
                    steps.append(f"{world.possessive(entity, [relation])} is {value}.")
                    entity = value
                values.append(entity)
            answer = conclude(plan, values)
        return "\n\n".join([f"I need {need}.", *steps, f"The answer is \\boxed{{{answer}}}."])

    def step(self, plan, history, opening, rng):
        """The next thought and code. history: the turns after the question, assistant's and user's in turn."""
        said = [m["content"] for m in history if m["role"] == "assistant"]
        seen = [m["content"] for m in history if m["role"] == "user"]
        failed = bool(seen) and "\nError:\n" in seen[-1]
        need = self.stated_need(plan, (said or [opening])[0]) or self.draw_need(plan, rng, self.config.wrong_plan)
        if plan["shape"] == "math":
            thought, code = f"I need {need}.", plan["code"] if need == plan["need"] else plan["wrong_code"]
            if rng.random() < self.config.slip:
                number = rng.choice(re.findall(r"\d+", code))
                code = code.replace(number, wrong_digit(number, rng), 1)
        else:
            thought, code = self.search_step(plan, need, seen, rng)
        if failed:
            thought = f"That failed. {thought}"
        else:
            code = self.break_code(code, rng)
        return "Thought: " + thought, code

    def stated_need(self, plan, thought):
        """The plan that a thought states, if it states one that this script can follow."""
        stated = re.search(r"I need (.+?)\.(?:\s|$)", thought)
        if stated is None or plan["shape"] == "math":
            return stated and stated[1]
        parts = read_need(stated[1])
        known = all(len(part) > 1 and part[0] in self.facts for part in parts)
        return stated[1] if known and len(parts) == len(plan["entities"]) else None

    def search_step(self, plan, need, seen, rng):
        """Follow the plan through what the searches have shown so far, and search for what is missing."""
        shown = read_facts("\n\n".join(seen))
        news, values, parts = "", [], read_need(need)
        for i, (entity, *relations) in enumerate(parts):
            while relations:
                value = shown.get(entity, {}).get(relations[0])
                if value is None:
                    rest = [world.possessive(*parts[j][:1], parts[j][1:]) for j in range(i + 1, len(parts))]
                    remaining = state(plan, *values, world.possessive(entity, relations), *rest)
                    return self.ask(entity, relations[0], f"{news}I need {remaining}.", len(seen), rng)
                news = f"{world.possessive(entity, relations[:1])} is {value}. "
                entity, relations = value, relations[1:]
            values.append(entity)
        # The comparison stands in the thought as it will in the code: a small student copies better than it infers.
        signs = {"lower": "the lower: {} < {}", "higher": "the higher: {} > {}", "same": 'the match: "{}" == "{}"'}
        thought = "That is the answer." if len(values) == 1 else f"I need {signs[plan['shape']].format(*values)}."
        return news + thought, f"final_answer({conclusion(plan, values)})"

    def ask(self, entity, relation, thought, searches, rng):
        if searches >= 4:  # the step limit is near, and some answer is better than none
            return thought, 'final_answer("unknown")'
        if rng.random() < self.config.slip:
            entity = rng.choice(self.names)
        return thought, f'print(web_search("{world.possessive(entity, [relation])}"))'

    def break_code(self, code, rng):
        """As it is, or with an error: an unclosed parenthesis, or a name that does not exist."""
        draw = rng.random()
        if draw < self.config.syntax_error:
            return code[:-1]
        if draw < self.config.syntax_error + self.config.run_error:
            return code.replace("print(", "show(").replace("final_answer(", "answer(")
        return code


def state(plan, *needs):
    """What is needed, in words: of one thing itself, of two their comparison. "only": the next answer is the last."""
    words = {"lower": "the lower of ", "higher": "the higher of ", "same": "the match of "}
    last = len(needs) == 1 and needs[0].count("'s ") == 1
    return words.get(plan["shape"], "only " if last else "") + " and ".join(needs)


def read_need(need):
    """ "the lower of Ada Malbek's birth year and ..." -> [["Ada Malbek", "birth year"], ...]"""
    return [part.split("'s ") for part in re.sub(r"^(only|the (lower|higher|match) of) ", "", need).split(" and ")]


def conclusion(plan, values):
    """The expression that answers: the one value found, or the comparison of two."""
    quoted = [v if v.isdigit() and plan["shape"] != "chain" else json.dumps(v) for v in values]
    if len(values) == 1:
        return quoted[0]
    if plan["shape"] == "same":
        return f'"yes" if {quoted[0]} == {quoted[1]} else "no"'
    sign = "<" if plan["shape"] == "lower" else ">"
    first, second = map(json.dumps, plan["entities"])
    return f"{first} if {quoted[0]} {sign} {quoted[1]} else {second}"


def conclude(plan, values):
    """The answer that follows from the value, or the two values, found."""
    return world.run_code(f"final_answer({conclusion(plan, values)})")


def read_facts(text):
    """{title: {relation: value}} out of passages, as stored or as the search tool prints them."""
    facts = {}
    for title, sentence in re.findall(r'^(?:\[\d+\] |")(.+?)"?\n(.+ whose .+)\.$', text, re.MULTILINE):
        pairs = (fact.split(" is ", 1) for fact in sentence.split(" whose ", 1)[1].split(", "))
        facts[title] = dict(pairs)
    return facts


def wrong_digit(number, rng):
    """The number with one digit replaced (never by itself, and never by a leading 0)."""
    i = rng.randrange(len(number))
    return number[:i] + rng.choice([d for d in "123456789" if d != number[i]]) + number[i + 1 :]


# ---------------------------------------------------------------------------------------------
# The scripted teacher: how it is served (OpenAI's chat completions, with vLLM's continue_final_message)
# ---------------------------------------------------------------------------------------------


class BadRequest(Exception):
    """A request that a server of this protocol refuses with status 400."""


def complete(teacher, body):
    """The answer to one /v1/chat/completions body, or BadRequest."""
    messages, opening = checked_messages(body)
    n = checked(body, "n", int, 1, 1, 128)
    temperature = checked(body, "temperature", (int, float), 1.0, 0, 2)
    checked(body, "top_p", (int, float), 1.0, 0, 1)
    seed = checked(body, "seed", int, 0, -(2**63), 2**64)
    max_tokens = checked(body, "max_completion_tokens", int, checked(body, "max_tokens", int, 4096, 1, 2**31), 1, 2**31)
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
        raise BadRequest("stop: a string or a list of strings was expected")
    if body.get("stream"):
        raise BadRequest("stream: this server does not stream")
    choices, completion_tokens = [], 0
    for index in range(n):
        text = teacher.reply(messages, opening, [seed, index] if temperature > 0 else "greedy")
        text, reason, count = cut(text, stop, max_tokens)
        completion_tokens += count
        message = {"role": "assistant", "content": text}
        choices.append({"index": index, "message": message, "logprobs": None, "finish_reason": reason})
    prompt = (
        "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"
    )
    prompt_tokens = len(TOKEN.findall(prompt + opening))
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    digest = hashlib.sha256(json.dumps([body, choices]).encode()).hexdigest()[:24]
    return {
        "id": f"chatcmpl-{digest}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": choices,
        "usage": usage | {"total_tokens": prompt_tokens + completion_tokens},
    }


TOKEN = re.compile(r"<\|\w+\|>|\w+|[^\w\s]|\s+")  # a script has no tokenizer; words and signs are its tokens


def checked(body, name, kind, default, low, high):
    value = default if body.get(name) is None else body[name]
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
        raise BadRequest(f"{name}: a number from {low} to {high} was expected, not {value!r}")
    return value


def checked_messages(body):
    """(closed messages with plain text, opening of the message to continue)."""
    if body.get("model") != MODEL:
        raise BadRequest(f"model: {MODEL!r} is served here, not {body.get('model')!r}")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages: a list with at least one message was expected")
    plain = []
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
        if not isinstance(content, str) or message.get("role") not in ("system", "user", "assistant"):
            raise BadRequest(f"messages[{i}]: a role (system, user, assistant) and a text were expected")
        plain.append({"role": message["role"], "content": content})
    if not any(m["role"] == "user" for m in plain):
        raise BadRequest("messages: a user's message was expected")
    if not body.get("continue_final_message"):
        return plain, ""
    if body.get("add_generation_prompt", True):
        raise BadRequest("continue_final_message needs add_generation_prompt to be false")
    if plain[-1]["role"] != "assistant":
        raise BadRequest("continue_final_message: the last message must be the assistant's")
    return plain[:-1], plain[-1]["content"]


def cut(text, stop, max_tokens):
    """(text up to the first stop string or the token limit, finish reason, tokens)."""
    text = cut_at_stop(text, stop)
    tokens = TOKEN.findall(text)
    if len(tokens) > max_tokens:
        return "".join(tokens[:max_tokens]), "length", max_tokens
    return text, "stop", len(tokens)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive: a collection sends thousands of requests
    disable_nagle_algorithm = True

    def do_GET(self):
        if self.path != "/v1/models":
            return self.answer(404, error("no such path"))
        self.answer(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "miniature"}]})

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/v1/chat/completions":
            return self.answer(404, error("no such path"))
        try:
            body = json.loads(content)
            if not isinstance(body, dict):
                raise BadRequest("a JSON object was expected")
            self.answer(200, complete(self.server.teacher, body))
        except ValueError:
            self.answer(400, error("the body is not JSON"))
        except BadRequest as refusal:
            self.answer(400, error(str(refusal)))

    def answer(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def error(message):
    return {"error": {"message": message, "type": "invalid_request_error", "code": None}}


def open_server(config):
    """A server of the scripted teacher, listening; `serve_forever` answers."""
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", config.port), Handler)
    except OSError as failure:
        raise InputError(f"--port {config.port}: {failure.strerror}; 0 takes a free port") from None
    server.daemon_threads = True
    server.teacher = Teacher(config)
    return server


def teach(config):
    """Serve the scripted teacher on 127.0.0.1, for good or while a command runs."""
    server = open_server(config)
    url = f"http://127.0.0.1:{server.server_port}/v1"
    if not config.quiet:
        print(f"{MODEL}: {url}", flush=True)
    if config.then is None:
        return server.serve_forever()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        return subprocess.run(config.then, shell=True, env=os.environ | {"TEACHER_URL": url}).returncode
    finally:
        server.shutdown()


# ---------------------------------------------------------------------------------------------
# Base students, from scratch
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class BaseConfig:
    world: str = option(REQUIRED, "folder made by `world`")
    out: str = option(REQUIRED, "folder for the model")
    size: Literal["S", "M", "L"] = option("M", "0.33, 0.59 or 1.33 million parameters besides the embeddings")
    seed: int = option(0, "initial weights and documents")
    documents: int = option(5000, "pretraining documents of 256 tokens")
    warmup_steps: int = option(200, "steps of the copy warm-up, of 60 rows")
    warmups: int = option(4, "most times that the warm-up is repeated, as long as it has not led to copying")
    prompts: str = option(str(Prompts.default), "folder of prompts, which the tokenizer is fitted to")
    quiet: bool = option(False, "no progress bar")


def make_base(config):
    """Make a base student from scratch and save it as an ordinary Hugging Face folder.

    It can copy and read a little and knows a few passages by heart; tasks and tools are left to fine-tuning.
    """
    keep_config(Path(config.out) / "base.json", config, may_change=("quiet",))
    work = Path(config.out + ".work")  # both trainings continue from their checkpoints after an interruption
    if (Path(config.out) / "summary.json").exists():
        return shutil.rmtree(work, ignore_errors=True)
    import torch  # seconds to import, and the other commands do not need them

    import scratch
    import train

    torch.manual_seed(config.seed)
    rng = random.Random(f"base {config.seed} {config.size}")
    teacher = Teacher(TeacherConfig(world=config.world))
    tokenizer = scratch.make_tokenizer(tokenizer_texts(Path(config.world), teacher, Prompts(config.prompts)))
    scratch.new_model(config.size, tokenizer).save_pretrained(work / "new")
    tokenizer.save_pretrained(work / "new")
    options = {"tuning": "full", "schedule": "cosine", "warmup_steps": 30, "beta2": 0.98, "weight_decay": 0.05,
               "epochs": 1, "seed": config.seed, "threads": 1, "quiet": config.quiet}  # fmt: skip
    start = work / "new"
    for attempt in range(config.warmups):  # when copying forms is a matter of luck; then the loss falls from 5 to 0.1
        data, out = work / f"copies-{attempt}.jsonl", work / f"copier-{attempt}"
        write_jsonl(data, scratch.copy_rows(rng, tokenizer, 60 * config.warmup_steps))
        summary = train.fit(
            train.Config(data=[str(data)], model=str(start), out=str(out), lr=5e-3, batch_size=60, **options)
        )
        start = out
        if summary["loss"] < 1.0:
            break
    data = work / "documents.jsonl"
    write_jsonl(data, scratch.document_rows(rng, tokenizer, teacher.facts, config.documents))
    train.fit(train.Config(data=[str(data)], model=str(start), out=config.out, lr=3e-3, batch_size=8, **options))
    shutil.rmtree(work)


def tokenizer_texts(folder, teacher, prompts):
    """The world's passages and training chats as they will be rendered: students of one world share a tokenizer."""
    passages = [row["contents"] for _, row in read_jsonl(folder / "passages.jsonl")]
    tasks = [row for _, row in itertools.islice(read_jsonl(folder / "train.jsonl"), 1000)]
    chats = [chat for task in tasks for chat in rehearse(teacher, task["question"], prompts)]
    return passages + ["\n".join(message["content"] for message in chat) for chat in chats]


def rehearse(teacher, question, prompts):
    """The two chats, agent and CoT, that the script gives for a question, with one passage shown per search."""
    chats = []
    for system, content in ((prompts.agent_student_system, prompts.fill("question", question=question)),
                            (prompts.cot_system, question)):  # fmt: skip
        chat = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        for _ in range(5):
            reply = teacher.reply(chat)
            chat.append({"role": "assistant", "content": reply})
            query = re.search(r"web_search\(\"(.+)'s .+\"\)", reply)
            if query is None:
                break
            facts = teacher.facts[query[1]]
            hit = prompts.fill("search_result", rank=1, title=query[1], text=world.sentence(query[1], facts))
            chat.append({"role": "user", "content": prompts.fill("observation", stdout=hit, result=None)})
        chats.append(chat)
    return chats


if __name__ == "__main__":
    run_command_line(
        __doc__,
        {"world": (WorldConfig, make_world), "teacher": (TeacherConfig, teach), "base": (BaseConfig, make_base)},
    )
