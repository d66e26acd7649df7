"""A client for OpenAI-compatible servers: the teacher, the judge and served students are all asked through it.

client = Client("http://127.0.0.1:8000/v1", model="Qwen/Qwen2.5-32B-Instruct")
texts, usage = client.chat([{"role": "user", "content": "2 + 2 = ?"}], max_tokens=8)
"""

import collections
import contextlib
import hashlib
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import requests

import common
from common import InputError, http_session, read_jsonl

# What a broken connection in the middle of an answer, text that is not JSON, and missing fields raise.
UNREADABLE = (requests.RequestException, LookupError, TypeError, AttributeError, ValueError, RecursionError)


class ServerError(InputError):
    """The server gave no usable answer within the retries. The same command continues when it is back."""

    exit_status = 1


class BadRequest(Exception):
    """The server refused this very request (400, 413, 422), as when the context is too long."""


class Client:
    """A client for `POST /v1/chat/completions` and `/v1/completions`. Threads may share it.

    url: a base that ends in /v1. model: None asks the server which model it has. api_key_env: the environment variable
    with the key, which is sent as a bearer token and never shown. timeout: seconds for one request. retries: further
    attempts after lost connections, 429, 5xx and unreadable answers.
    Raises ServerError when the retries are used up, BadRequest for a request that the server refuses, and InputError
    for 401, 403 and 404, where no request can succeed.
    """

    def __init__(self, url, model=None, api_key_env="OPENAI_API_KEY", timeout=600.0, retries=8):
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--url {url}: an address such as http://127.0.0.1:8000/v1 was expected")
        self.url, self.model, self.api_key_env = url.rstrip("/"), model, api_key_env
        self.timeout, self.retries, self.session = timeout, retries, http_session(retries)
        self.key = os.environ.get(api_key_env, "")
        if self.key:
            self.session.headers["Authorization"] = f"Bearer {self.key}"
        if model is None:
            try:
                self.model, _ = self._request("GET", "/models", None, lambda body: body["data"][0]["id"])
            except ServerError as error:
                raise ServerError(f"{error} (or name a --model)") from None

    def chat(self, messages, n=1, **fields):
        """n replies to a chat: (texts, usage). fields: temperature, max_tokens, ...; those that are None are not sent.

        texts end before the first stop string. usage: prompt_tokens, completion_tokens, retries, and truncated, the
        number of texts that reached the token limit.
        """
        return self._ask("/chat/completions", n, messages=messages, **fields)

    def complete(self, prompt, n=1, **fields):
        """n continuations of a text, as `chat`."""
        return self._ask("/completions", n, prompt=prompt, **fields)

    def _ask(self, path, n, **fields):
        """Collect n choices. Some servers ignore n: missing choices are asked for again."""
        body = {"model": self.model} | {name: value for name, value in fields.items() if value is not None}
        texts, usage = [], collections.Counter(truncated=0)
        while len(texts) < n:
            missing = n - len(texts)
            request = body | ({"n": missing} if missing > 1 else {})
            if "seed" in body:
                request["seed"] += len(texts)  # the same seed would repeat the first answer
            (choices, used), retries = self._request("POST", path, request, _parse_choices)
            for text, truncated in choices[:missing]:
                texts.append(cut_at_stop(text, body.get("stop", ())))
                usage["truncated"] += truncated
            usage.update(used, retries=retries)
        return texts, usage

    def _request(self, method, path, body, parse):
        """Returns (parse(the answer's JSON), retries). An answer that cannot be parsed is asked for again."""
        url, retries = self.url + path, 0
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(common.BACKOFF * 2**attempt, 30.0))
            try:
                response = self.session.request(method, url, json=body, timeout=(10.0, self.timeout))
                retries += len(response.raw.retries.history)
                if response.status_code == 200:
                    return parse(response.json()), attempt + retries
                reason = self._refusal(url, response)
                break
            except (requests.ConnectionError, requests.Timeout) as error:  # the session has used up its retries
                reason = f"no answer ({type(getattr(error.args[0], 'reason', error)).__name__})"
                break
            except UNREADABLE as error:
                reason = f"the answer is incomplete or not in the format of OpenAI ({type(error).__name__})"
        raise ServerError(f"{url}: {reason}; gave up after {self.retries + 1} attempts")

    def _refusal(self, url, response):
        """What the server answered with a status other than 200. Raises if the request cannot succeed."""
        status, detail = response.status_code, " ".join(response.text.split())[:300]
        if self.key:
            detail = detail.replace(self.key, "[key]")  # some servers repeat it
        if status in (400, 413, 422):
            raise BadRequest(f"{status}: {detail}")
        if status in (401, 403, 404):
            key = f"${self.api_key_env} is {'set' if self.key else 'not set'}"
            raise InputError(f"{url} answered {status} (model {self.model!r}, {key}): {detail}")
        return f"{status}: {detail}"


def _parse_choices(body):
    """Returns ([(text, whether it was cut at the token limit)], token counts). Raises if fields are missing."""
    choices, usage = [], body.get("usage") or {}
    for choice in body["choices"]:
        message = choice if "text" in choice else choice["message"]  # /completions has no message
        text = "" if message.get("refusal") else message["text" if "text" in choice else "content"]
        text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be written to a file
        choices.append((text, choice.get("finish_reason") == "length"))
    if not choices:
        raise LookupError
    return choices, {name: usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")}


def cut_at_stop(text, stop):
    """The text before the first stop string. `transformers serve` leaves the string in, other servers remove it."""
    ends = [text.find(s) for s in stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


class Served:
    """A served model that answers turns.

    mode: how the server is made to continue an opening. "continue": continue_final_message, as vLLM has it (probed).
    "completions": the chat is rendered here with the tokenizer's template and sent to /v1/completions.
    """

    def __init__(self, client, mode="continue", tokenizer=None, **sampling):
        self.client, self.mode, self.tokenizer, self.sampling = client, mode, tokenizer, sampling

    def answer(self, turn, usage, n=1, seed=None):
        """n candidate texts for a turn. Token counts are added to the Counter `usage`."""
        sampling = self.sampling | {"n": n, "seed": seed}
        opened = [*turn.messages, {"role": "assistant", "content": turn.opening}]
        if not turn.opening:
            texts, used = self.client.chat(turn.messages, **sampling)
        elif self.mode == "continue":
            texts, used = self.client.chat(opened, **_CONTINUE, **sampling)
        else:
            texts, used = self.client.complete(self._render(opened), **sampling)
        usage.update(used)
        return texts

    def probe(self, opening=False):
        """Ask a short question first: what would fail in every episode is refused before the first one.

        opening: whether turns will have an opening. A server that does not know continue_final_message may ignore it,
        close the assistant's turn and open another. The prompt is then as long as without the field; that is compared.
        """
        try:
            self.client.chat(_HELLO, max_tokens=1)
            if opening and self.mode == "completions":
                self.client.complete(self._render(_OPENED), max_tokens=1)
        except BadRequest as error:
            raise InputError(f"the server refuses even a short request ({error})") from None
        if not opening or self.mode == "completions":
            return
        other = "name --prefix-mode completions"
        try:
            _, continued = self.client.chat(_OPENED, max_tokens=1, **_CONTINUE)
        except BadRequest as error:
            raise InputError(f"the server does not continue a message ({error}): {other}") from None
        with contextlib.suppress(BadRequest):  # some accept a final assistant message only when told to continue it
            _, closed = self.client.chat(_OPENED, max_tokens=1)
            if continued["prompt_tokens"] >= closed["prompt_tokens"]:
                raise InputError(f"the server ignores continue_final_message: {other}")

    def _render(self, opened):
        """A chat as text that ends with its last message, by the model's own template."""
        if isinstance(self.tokenizer, str):
            from transformers import AutoTokenizer  # takes seconds to import, and only this mode needs it

            try:
                self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
            except (OSError, ValueError) as error:
                raise InputError(f"--tokenizer {self.tokenizer}: {str(error).splitlines()[0]}") from None
        if not self.tokenizer.chat_template:
            raise InputError(f"--tokenizer {self.tokenizer.name_or_path}: it has no chat template")
        text = self.tokenizer.apply_chat_template(opened, continue_final_message=True, tokenize=False)
        # The server adds the beginning-of-text token again where the tokenizer does so itself.
        begins = self.tokenizer.bos_token and self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]
        return text.removeprefix(self.tokenizer.bos_token) if begins else text


_HELLO = [{"role": "user", "content": "Say hello."}]
_OPENED = [*_HELLO, {"role": "assistant", "content": "Hel"}]
_CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


def in_parallel(function, items, workers):
    """Yield function(item) for each item as it finishes. The first exception cancels the rest and is raised."""
    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(function, item) for item in items]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ------------- The paper's judge of factual answers (gpt-4o-mini), with a cache of verdicts


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
