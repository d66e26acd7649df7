"""The scripted teacher of `make reproduce`, behind a server that speaks OpenAI's chat completions.

    python -m miniature.teacher runs/miniature/world --then 'python agent_distill.py collect ... --url $TEACHER_URL'

It is a script, not a model: it knows the plan of every question (plans.jsonl of miniature.world), and errs at the rates
stated in Config. It states what a page says only after the page was in an observation.
"""

import csv
import dataclasses
import functools
import hashlib
import json
import os
import random
import re
import subprocess
import threading
from pathlib import Path

from agent_distill import Prompts
from common import REQUIRED, InputError, option, read_jsonl, run_command_line, serve_json
from miniature.world import GOALS, OPPOSITE, need, title

MODEL = "scripted-teacher"


rate = functools.partial(option, at_least=0, at_most=1)


@dataclasses.dataclass(kw_only=True)
class Config:
    """Each rate is the probability of a mistake, as large models make them; the first two let the prefix help."""

    world: str = option(REQUIRED, "folder written by miniature.world", positional=True)
    port: int = option(0, "port on 127.0.0.1; 0 takes a free one", at_least=0, at_most=65535)
    then: str | None = option(None, "serve while this shell command runs, with $TEACHER_URL set; exit with its status")
    wrong_plan: float = rate(0.12, "the agent opens with a wrong plan, and follows it")
    wrong_plan_cot: float = rate(0.03, "the same in a chain of thought; as a prefix, it is the agent's plan, too")
    syntax_error: float = rate(0.01, "the code of a step does not parse; repaired in the next step")
    run_error: float = rate(0.02, "the code of a step raises an error; repaired in the next step")
    slip: float = rate(0.01, "a query names another page (repaired in the next step), or code has a wrong digit")
    slip_cot: float = rate(0.05, "a wrong value in a recalled fact, or a wrong digit in a number worked out")
    from_memory: float = rate(0.0, "a fact is answered without a search: rightly about real pages, else by a guess")
    seed: int = option(0, "part of every random draw")
    prompts: str = option(str(Prompts.default), "folder of the prompts that the agent is shown")


class Teacher:
    """Answers a chat from its messages alone, as any chat server does.

    Its own first thought, or the prefix that opens it, states the plan that it follows; the observations show which
    pages it has seen. A chain of thought has no observations: it recalls all facts and computes without code.
    """

    def __init__(self, config):
        self.config = config
        prompts = Prompts(config.prompts)
        self.failed = prompts.error.split("{stdout}")[-1].split("{error}")[0]  # marks a failed step
        self.before, self.after = (text.strip() for text in prompts.question.split("{question}"))
        self.plans = {row["question"]: row for _, row in read_jsonl(Path(config.world) / "plans.jsonl")}
        with open(Path(__file__).with_name("facts.csv"), encoding="utf-8") as file:
            self.real = {name for _, name, *_ in csv.reader(file)}  # the entities that a large model knows
        self.values = {}  # relation -> values, for wrong ones
        self.entities = set()
        for plan in self.plans.values():
            for entity, relation, value, _ in (hop for hops in plan.get("branches", []) for hop in hops):
                self.entities.add(entity)
                self.values.setdefault(relation, set()).add(value)

    def reply(self, messages, opening="", salt=""):
        """Returns the text that follows `opening`. salt: seed and number of a sample, so that samples differ."""
        key = json.dumps([self.config.seed, salt, messages, opening])
        rng = random.Random(hashlib.sha256(key.encode()).digest())
        turns = [message for message in messages if message["role"] != "system"]
        plan = self.plans.get(turns[0]["content"].strip().removeprefix(self.before).removesuffix(self.after).strip())
        if plan is None:
            return "I am a script and have no plan for this."
        if "<end_code>" not in messages[0]["content"]:
            return self.chain_of_thought(plan, rng)
        said = [m["content"] for m in turns[1:] if m["role"] == "assistant"]
        seen = [m["content"] for m in turns[1:] if m["role"] == "user"]
        plan = followed(plan, self.follows_wrong_plan(plan, (said or [opening])[0], rng))
        if plan["shape"] == "math":
            thought, code = self.compute(plan, rng)
        else:
            thought, code = self.look_up(plan, said, seen, rng)
        if seen and self.failed in seen[-1]:
            thought = f"That failed. {thought}"
        else:
            code = self.break_code(code, rng)
        return ("" if opening else f"Thought: {thought}") + f"\nCode:\n```py\n{code}\n```<end_code>"

    def follows_wrong_plan(self, plan, first_thought, rng):
        """Returns whether the agent follows the wrong plan: the one that its first thought states, else a draw."""
        for wrong, text in ((False, plan["need"]), (True, plan["wrong"])):
            if re.search(rf"I need {re.escape(str(text))}\.(\s|$)", first_thought):
                return wrong
        return plan["wrong"] is not None and rng.random() < self.config.wrong_plan

    def chain_of_thought(self, plan, rng):
        plan = followed(plan, plan["wrong"] is not None and rng.random() < self.config.wrong_plan_cot)
        slips = rng.random() < self.config.slip_cot
        if plan["shape"] == "math":
            *steps, last = plan["steps"]
            answer = wrong_digit(plan["result"], rng) if slips else plan["result"]
            steps.append(last.removesuffix(f"{plan['result']}.") + f"{answer}.")
        else:
            branches = plan["branches"]
            if slips:
                *others, [*hops, (entity, relation, value, statement)] = branches
                slip = rng.choice(sorted(self.values[relation]))
                branches = [*others, [*hops, [entity, relation, slip, statement.replace(value, slip)]]]
            steps = [statement for hops in branches for *_, statement in hops]
            answer = eval(conclude(plan["shape"], branches)[1])  # the teacher's own expression
        return "\n\n".join([f"I need {plan['need']}.", *steps, f"\\boxed{{{answer}}}"])

    def compute(self, plan, rng):
        """Returns (thought, code) of a math question: the whole plan as one piece of code."""
        code = plan["code"]
        if rng.random() < self.config.slip:
            number = rng.choice(re.findall(r"\d+", code))
            code = code.replace(number, wrong_digit(number, rng), 1)
        return f"I need {plan['need']}.", code

    def look_up(self, plan, said, seen, rng):
        """Returns (thought, code): search for the first page that has not been read; conclude when there is none."""
        news, found, shape, branches = "", "", plan["shape"], plan["branches"]
        if self.config.from_memory and not said and rng.random() < self.config.from_memory:
            return "I know this.", f"final_answer({json.dumps(self.guess(shape, branches, rng))})"
        for i, hops in enumerate(branches):
            for j, (entity, relation, _, statement) in enumerate(hops):
                if not any(f"] {title(entity)}\n" in text for text in seen):
                    rest = need([hops[j:], *branches[i + 1 :]], shape)
                    return self.search(entity, relation, f"{news}I need {rest}{found}.", said, rng)
                news = f"{statement} "
            found = f" ({hops[0][0]}: {hops[0][2]})"  # the second search must not forget what the first one found
        comparison, expression = conclude(shape, branches)
        why = f"I need {GOALS[shape].removeprefix(', and ')}: {comparison}." if comparison else "That is the answer."
        return news + why, f"final_answer({expression})"

    def guess(self, shape, branches, rng):
        """Returns an answer without a search."""
        if shape in ("same", "different"):
            return rng.choice(["yes", "no"])
        if shape != "chain":
            return rng.choice([hops[0][0] for hops in branches])
        _, relation, value, _ = branches[0][-1]
        return value if branches[0][0][0] in self.real else rng.choice(sorted(self.values[relation]))

    def search(self, entity, relation, thought, said, rng):
        """Returns the next search. A page that an earlier query did not find is searched for by its title alone."""
        code = 'print(web_search("{}"))'.format
        if len(said) >= 4:  # the step limit is near, and any answer is better than none
            return thought, 'final_answer("unknown")'
        query = f"{relation} of {entity}"
        if said and code(query) in said[-1]:
            return f"The page of {entity} is not there. {thought}", code(title(entity))
        if rng.random() < self.config.slip:
            query = f"{relation} of {rng.choice(sorted(self.entities))}"
        return thought, code(query)

    def break_code(self, code, rng):
        """Returns the code, sometimes with an error: an unclosed parenthesis, or a name that does not exist."""
        draw = rng.random()
        if draw < self.config.syntax_error:
            return code[:-1]
        if draw < self.config.syntax_error + self.config.run_error:
            return code.replace("print(", "show(").replace("final_answer(", "answer(")
        return code


def followed(plan, wrong):
    """Returns the plan, or the wrong one under the names of the right one. A wrong chain forgets its last hop."""
    if not wrong:
        return plan
    if plan["shape"] == "math":
        return {"shape": "math", "need": plan["wrong"]} | {n: plan[f"wrong_{n}"] for n in ("code", "steps", "result")}
    branches = [plan["branches"][0][:-1]] if plan["shape"] == "chain" else plan["branches"]
    return {"shape": OPPOSITE[plan["shape"]], "need": plan["wrong"], "branches": branches}


SIGNS = {"lower": "<", "higher": ">", "same": "==", "different": "!="}


def conclude(shape, branches):
    """Returns (comparison of the two values, or None for a single one; the answer), both as Python expressions."""
    values = [hops[-1][2] for hops in branches]
    if shape == "chain":
        return None, json.dumps(values[0])
    if shape in ("same", "different"):
        choices, (left, right) = ("yes", "no"), map(json.dumps, values)
    else:
        choices, (left, right) = [hops[0][0] for hops in branches], values
    comparison = f"{left} {SIGNS[shape]} {right}"
    return comparison, f"{json.dumps(choices[0])} if {comparison} else {json.dumps(choices[1])}"


def wrong_digit(number, rng):
    """Returns the number with one digit replaced by another one that is not 0."""
    i = rng.randrange(len(number))
    return number[:i] + rng.choice([d for d in "123456789" if d != number[i]]) + number[i + 1 :]


# ------------- The server: OpenAI's chat completions, with vLLM's continue_final_message

TOKEN = re.compile(r"\w+|[^\w\s]|\s+")  # a script has no tokenizer; words, signs and spaces are its tokens


def complete(teacher, body):
    """Returns the answer to one /v1/chat/completions request. InputError for mistakes that our client could make."""
    messages, opening = body["messages"], ""
    if body.get("model") != MODEL:
        raise InputError(f"model: {MODEL!r} is served here, not {body.get('model')!r}")
    if body.get("continue_final_message"):
        if body.get("add_generation_prompt", True):
            raise InputError("continue_final_message: needs add_generation_prompt false")
        *messages, last = messages
        opening = last["content"]
    greedy = body.get("temperature") == 0
    stop, max_tokens = body.get("stop") or [], body.get("max_tokens") or 4096
    choices, completion_tokens = [], 0
    for index in range(body.get("n") or 1):
        text = teacher.reply(messages, opening, "greedy" if greedy else [body.get("seed"), index])
        for string in [stop] if isinstance(stop, str) else stop:
            text = text.split(string)[0]
        tokens = TOKEN.findall(text)
        reason, tokens = ("length" if len(tokens) > max_tokens else "stop"), tokens[:max_tokens]
        completion_tokens += len(tokens)
        message = {"role": "assistant", "content": "".join(tokens)}
        choices.append({"index": index, "message": message, "finish_reason": reason})
    prompt_tokens = sum(len(TOKEN.findall(message["content"])) for message in messages)
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return {"model": MODEL, "choices": choices, "usage": usage}


def open_server(config):
    """Returns a server of the scripted teacher, not yet started: see common.serve_json."""
    teacher = Teacher(config)

    def answer(method, path, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": MODEL}]}
        if path == "/v1/chat/completions":
            return 200, complete(teacher, body)
        return 404, {"error": f"no such path: {path}"}

    return serve_json(answer, port=config.port)


def serve(config):
    """Serve the scripted teacher on 127.0.0.1, until interrupted or while a command runs."""
    server = open_server(config)
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    if config.then is None:
        print(f"{MODEL}: {url}", flush=True)
        return server.serve_forever()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return subprocess.run(config.then, shell=True, env=os.environ | {"TEACHER_URL": url}).returncode


if __name__ == "__main__":
    run_command_line(__doc__, {"serve": (Config, serve)}, default="serve")
