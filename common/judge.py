"""The paper's judge of factual answers (gpt-4o-mini), behind any OpenAI-compatible server, with a cache of verdicts."""

import contextlib
import hashlib
import json
import re

from common import InputError, read_jsonl
from common.client import BadRequest


class Judge:
    """Asks an LLM whether an answer says what one of the gold answers says.

    Called with (question, gold answers, prediction), as grading.grade does; returns True, False, or None if no attempt
    brought a clear verdict. journal: a Journal that keeps verdicts by the hash of model and prompt. The files `caches`
    are read too, so that nothing is asked twice. Threads may share a judge. Raises what Client.chat raises, but not
    BadRequest: that is no verdict.
    """

    ATTEMPTS, CHARACTERS = 3, 2000  # the answer to a factual question is a phrase: a longer one is cut

    def __init__(self, client, prompts, journal, caches=()):
        self.client, self.prompts, self.journal = client, prompts, journal
        rows = list(journal.rows)
        for path in caches:
            with contextlib.suppress(InputError):  # another process may be writing its last line
                rows.extend(row for _, row in read_jsonl(path))
        self.verdicts = {row["key"]: row["verdict"] for row in rows}

    def __call__(self, question, answers, prediction):
        answers, prediction = (json.dumps(x, ensure_ascii=False) for x in (answers, prediction[: self.CHARACTERS]))
        prompt = self.prompts.fill("judge", question=question or "(not given)", answer=answers, prediction=prediction)
        key = hashlib.sha256(f"{self.client.model}\n{prompt}".encode()).hexdigest()
        messages = [{"role": "user", "content": prompt}]
        for attempt in range(0 if key in self.verdicts else self.ATTEMPTS):
            with contextlib.suppress(BadRequest):
                texts, _ = self.client.chat(messages, temperature=0.0, max_tokens=64, seed=attempt)
                if verdict := read_verdict(texts[0]):
                    self.journal.append({"key": key, "verdict": verdict, "model": self.client.model})
                    self.verdicts[key] = verdict
                    break
        return self.verdicts[key] == "correct" if key in self.verdicts else None


def read_verdict(reply):
    """The verdict in a reply that is the JSON object asked for, or that one word; otherwise None."""
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", reply.strip())
    try:
        value = json.loads(text)
    except ValueError:
        value = {"verdict": text.rstrip(".").lower()}
    return next((verdict for verdict in ("correct", "incorrect") if value == {"verdict": verdict}), None)
