"""Is this answer right? Math equality, exact match and F1 for facts, and the paper's LLM judge.

    python grade.py '0.5' '\\frac{1}{2}' --kind math
    python grade.py 'The Beatles' 'Beatles' --kind fact
    python grade.py 'the Fab Four' 'The Beatles' --kind fact --question 'Who sang Help!?' \\
        --judge-url https://api.openai.com/v1

A wrong answer that is counted as right is worse than a right one that is missed: it inflates a
result, and when teacher trajectories are filtered it trains the student on errors. Every rule here
and in math_equal.py leans to that side, and every grade says why it was given.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import re
import string
import threading
from collections import Counter
from pathlib import Path
from typing import Literal

import math_equal
from client import BadRequest, Client
from common import REQUIRED, InputError, Journal, option, progress, run_command_line

JUDGE_PROMPT = Path(__file__).parent / "prompts" / "judge.txt"
JUDGE_ATTEMPTS = 3  # an unclear verdict is asked for again; after the third one there is no verdict
JUDGE_CHARACTERS = 2000  # the answer to a factual question is a phrase; what is longer is cut before it is judged


@dataclasses.dataclass
class Grade:
    """correct, and why in a short stable phrase; exact match and token F1 for facts (else None)."""

    correct: bool
    why: str
    exact: bool | None = None
    f1: float | None = None


def grade(kind, prediction, answer, aliases=(), question=None, judge=None):
    """Grade one answer.

    kind: "fact" or "math". prediction: what final_answer was given, as a JSON value, or the text of
    a CoT answer; None is no answer, and wrong. answer, aliases: the gold answers, text or numbers;
    aliases count for facts only. question: read by the judge, and by the math rules for number
    bases, ratios and percentages. judge: a Judge, asked about facts that do not match exactly.

    Raises InputError for another kind, and what Judge.verdict raises.
    """
    if kind not in ("fact", "math"):
        raise InputError(f"kind {kind!r}: a task is of kind 'fact' or 'math'")
    if answer is None or not str(answer).strip():
        return Grade(False, "no gold answer")  # three MATH training rows have none
    if kind == "fact":
        return _grade_fact(prediction, [answer, *aliases], question, judge)
    if prediction is None or (isinstance(prediction, str) and not prediction.strip()):
        return Grade(False, "no answer")
    return Grade(*math_equal.compare(prediction, answer, question))


def grade_many(rows, judge=None, workers=2, quiet=True):
    """Grade rows, dicts of grade()'s arguments by name (other fields are ignored); grades in the same order.

    workers: how many questions to the judge are open at once. All else runs right here: how much
    work a comparison can cause is bounded by construction (see math_equal.py).
    """
    names = ("kind", "prediction", "answer", "aliases", "question")

    def one(row):
        fields = {name: row[name] for name in names if row.get(name) is not None}
        return grade(**{"prediction": None, "answer": None, **fields}, judge=judge)

    if judge is None:
        return [one(row) for row in progress(rows, desc="grading", unit="answer", quiet=quiet)]
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        waiting = pool.map(one, rows)
        return list(progress(waiting, total=len(rows), desc="grading", unit="answer", quiet=quiet))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error nothing more is asked, or paid for


# Facts: exact match and token F1 as SQuAD's and HotpotQA's evaluation scripts define them.


def _grade_fact(prediction, golds, question, judge):
    try:
        text = fact_text(prediction)
    except (RecursionError, ValueError):  # lists within lists within lists; an integer too long to print
        return Grade(False, "unreadable", False, 0.0)
    if not text.strip():
        return Grade(False, "no answer", False, 0.0)
    golds = [fact_text(gold) for gold in golds]
    f1 = max(token_f1(text, gold) for gold in golds)
    normal = normalise_fact(text)
    for i, gold in enumerate(golds):
        if normal == normalise_fact(gold):
            return Grade(True, "alias" if i else "exact", True, f1)
    if judge is None:
        return Grade(False, "different", False, f1)
    verdict = judge.verdict(question, golds, text)
    return Grade(verdict == "correct", f"judge: {verdict or 'no verdict'}", False, f1)


def fact_text(value):
    """A JSON value as the text that a person would have written: True is yes, 1969.0 is 1969."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list):
        return ", ".join(map(fact_text, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def normalise_fact(text):
    """Lower case, no punctuation, no articles, single spaces (SQuAD 1.1)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(prediction, gold):
    """F1 of the bags of normalised tokens; yes, no and noanswer match whole or not at all (HotpotQA)."""
    prediction, gold = normalise_fact(prediction), normalise_fact(gold)
    if prediction != gold and {prediction, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    prediction, gold = prediction.split(), gold.split()
    common = sum((Counter(prediction) & Counter(gold)).values())
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(gold)
    return 2 * precision * recall / (precision + recall)


# Answers of chain-of-thought replies.


def extract_boxed(text):
    r"""The content of the last complete \boxed{...} or \fbox{...} (also `\boxed 5`), or None."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text))):
        rest = text[match.end() :]
        if not rest.startswith("{"):
            token = re.match(r"\\?[^\s$\\{}]+", rest)
            if token:
                return token[0].rstrip(".,;")
            continue
        depth = 0
        for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \{ and \} are characters of the answer
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0 and brace[0] == "}":
                return rest[1 : brace.start()].strip()
    return None


def cot_answer(text):
    """The boxed answer; else that of the last line which states it ("Final answer: ..."); else None."""
    boxed = extract_boxed(text)
    if boxed is not None:
        return boxed
    stated = re.findall(r"(?i)\b(?:final answer(?: is)?|(?:the|so the|thus the) answer is)\b\s*:?\**\s*(.+)", text)
    if not stated:
        return None
    return stated[-1].strip(" *.") or None


# The paper's judge of factual answers (gpt-4o-mini), over any OpenAI-compatible server.


VERDICT_SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"verdict": {"type": "string", "enum": ["correct", "incorrect"]}},
            "required": ["verdict"],
            "additionalProperties": False,
        },
    },
}


class Judge:
    """Asks an LLM whether an answer says what the gold answers say.

    url: a base that ends in /v1. model: the paper's gpt-4o-mini by default. api_key_env: the environment
    variable that holds the key. cache: a JSONL file of verdicts, so that nothing is paid twice.
    """

    def __init__(self, url, model="gpt-4o-mini", api_key_env="OPENAI_API_KEY", cache=None, prompt=JUDGE_PROMPT):
        self.client = Client([url], model, api_key_env, timeout=120.0)
        self.prompt = Path(prompt).read_text(encoding="utf-8")
        self.journal = Journal(cache) if cache else None
        self._verdicts = {row["key"]: row["verdict"] for row in self.journal.rows} if cache else {}
        self._lock = threading.Lock()
        self._structured = True  # until the server refuses response_format

    def verdict(self, question, golds, prediction):
        """ "correct", "incorrect", or None where no attempt brought a clear verdict (not cached).

        Raises client.ServerError when the server cannot be reached, and InputError for a key or
        model that it does not accept: a run should stop there and not count answers as wrong.
        """
        content = fill(
            self.prompt,
            question=question or "(not given)",
            answer=json.dumps(golds, ensure_ascii=False),
            prediction=json.dumps(prediction[:JUDGE_CHARACTERS], ensure_ascii=False),
        )
        key = hashlib.sha256(f"{self.client.model}\n{content}".encode()).hexdigest()
        for attempt in range(JUDGE_ATTEMPTS):
            if key in self._verdicts:
                return self._verdicts[key]
            reply = self._ask(content, seed=attempt)
            verdict = read_verdict(reply)
            if verdict:
                with self._lock:
                    if self.journal and key not in self._verdicts:
                        self.journal.append({"key": key, "verdict": verdict, "model": self.client.model})
                    self._verdicts[key] = verdict
        return self._verdicts.get(key)

    def _ask(self, content, seed):
        """One reply, or "" where the server refuses the request even in its plainest form."""
        messages = [{"role": "user", "content": content}]
        for structured in [True, False] if self._structured else [False]:
            extra = {"response_format": VERDICT_SCHEMA} if structured else None
            with contextlib.suppress(BadRequest):
                reply = self.client.chat(messages, temperature=0.0, max_tokens=64, seed=seed, extra=extra)
                self._structured = structured
                return reply.texts[0]
        return ""


def fill(template, **values):
    """Put values into {placeholders}, all at once: a placeholder inside a value stays text."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match[1]], template)


def read_verdict(reply):
    """The verdict in a reply that is the JSON object asked for, or that one word; else None."""
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", reply.strip())
    try:
        value = json.loads(text)
    except ValueError:
        value = {"verdict": text.rstrip(".").lower()}
    if isinstance(value, dict) and list(value) == ["verdict"] and value["verdict"] in ("correct", "incorrect"):
        return value["verdict"]
    return None


@dataclasses.dataclass(kw_only=True)
class Config:
    prediction: str = option(REQUIRED, "the answer to grade", positional=True)
    answer: str = option(REQUIRED, "the gold answer", positional=True)
    kind: Literal["fact", "math"] = option(REQUIRED, "what is asked for; never guessed")
    aliases: list[str] = option([], "further gold answers (facts)")
    question: str | None = option(None, "the question, for the judge and for the rules that read it")
    judge_url: str | None = option(None, "OpenAI-compatible server (ends in /v1) that judges facts; none: exact match")
    judge_model: str = option("gpt-4o-mini", "the judge (the paper's)")
    judge_key_env: str = option("OPENAI_API_KEY", "environment variable that holds the judge's key")
    judge_cache: str | None = option(None, "JSONL file that keeps the verdicts")


def main(config):
    """Grade one answer: print the verdict and why; the exit status is 0 if it is right, 1 if not."""
    judge = None
    if config.judge_url:
        judge = Judge(config.judge_url, config.judge_model, config.judge_key_env, config.judge_cache)
    result = grade(config.kind, config.prediction, config.answer, config.aliases, config.question, judge)
    scores = f", F1 {result.f1:.3f}" if result.f1 is not None else ""
    print(f"{'right' if result.correct else 'wrong'} ({result.why}{scores})")
    return 0 if result.correct else 1


if __name__ == "__main__":
    run_command_line(__doc__, {"answer": (Config, main)}, default="answer")
