"""A client for OpenAI-compatible servers: the teacher, the judge and served students are all asked through it.

from common.client import Client
client = Client("http://127.0.0.1:8000/v1", model="Qwen/Qwen2.5-32B-Instruct")
reply = client.chat([{"role": "user", "content": "2 + 2 = ?"}], max_tokens=8)
reply.texts, reply.usage
"""

import dataclasses
import os
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import requests

from common import InputError, http_session

BACKOFF = 0.5  # seconds before the first retry after an unreadable answer; doubled for each further one


class ServerError(InputError):
    """The server gave no usable answer within the retries. The same command continues when it is back."""

    exit_status = 1


class BadRequest(Exception):
    """The server refused this very request (400, 413, 422), as when the context is too long."""


@dataclasses.dataclass
class Reply:
    """texts: n continuations, cut before the first stop string. model: the name that the server reports.

    usage: prompt_tokens, completion_tokens, retries, and truncated: the number of texts that reached the token limit.
    """

    texts: list
    usage: dict
    model: str


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
        self.url, self.api_key_env, self.timeout, self.retries = url.rstrip("/"), api_key_env, timeout, retries
        self.key = os.environ.get(api_key_env or "", "")
        self.session = http_session(retries)
        if self.key:
            self.session.headers["Authorization"] = f"Bearer {self.key}"
        self.model = model
        if model is None:
            try:
                self.model = self._request("GET", "/models", None, lambda body: body["data"][0]["id"])[0]
            except ServerError as error:
                raise ServerError(f"{error} (or name a --model)") from None

    def chat(self, messages, n=1, extra=None, **sampling):
        """n replies to a chat. sampling: temperature, top_p, max_tokens, stop, seed. extra: further body fields."""
        return self._ask("/chat/completions", {"messages": messages, **(extra or {})}, n, sampling)

    def complete(self, prompt, n=1, **sampling):
        """n continuations of a text."""
        return self._ask("/completions", {"prompt": prompt}, n, sampling)

    def _ask(self, path, body, n, sampling):
        """Collect n choices. Some servers ignore n: missing choices are asked for again."""
        body = {"model": self.model, **body, **{k: v for k, v in sampling.items() if v is not None}}
        usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "retries", "truncated"), 0)
        texts, model = [], self.model
        while len(texts) < n:
            request = body | ({"n": n - len(texts)} if n - len(texts) > 1 else {})
            if texts and "seed" in body:
                request["seed"] = body["seed"] + len(texts)  # the same seed would repeat the first answer
            (choices, used, model), retries = self._request("POST", path, request, _parse_choices)
            for text, truncated in choices[: n - len(texts)]:
                texts.append(cut_at_stop(text, body.get("stop") or []))
                usage["truncated"] += truncated
            for name in ("prompt_tokens", "completion_tokens"):
                usage[name] += used.get(name) or 0
            usage["retries"] += retries
        return Reply(texts, usage, model or self.model)

    def _request(self, method, path, body, parse):
        """(parse(the answer's JSON), retries). An answer that cannot be parsed is asked for again."""
        url, reason, retries = self.url + path, "", 0
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(BACKOFF * 2**attempt, 30.0))
            try:
                response = self.session.request(method, url, json=body, timeout=(10.0, self.timeout))
                retries += len(response.raw.retries.history)
                self._check_status(url, response)
                return parse(response.json()), attempt + retries
            except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError):
                reason = "the connection broke in the middle of the answer"
            except requests.exceptions.JSONDecodeError:
                reason = "the answer is not JSON"
            except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError):
                reason = "the answer does not have the expected fields"
            except requests.exceptions.RequestException as error:  # the session has used up its retries
                raise ServerError(f"{url}: {_reason(error)}; gave up after {self.retries + 1} attempts") from None
        raise ServerError(f"{url}: {reason}; gave up after {self.retries + 1} attempts")

    def _check_status(self, url, response):
        status = response.status_code
        if status == 200:
            return
        if status in (401, 403):  # the body is not shown: some servers repeat the key in it
            raise InputError(f"{url} answered {status}: the key in ${self.api_key_env} is missing or not accepted")
        detail = " ".join(response.text.split())[:300]
        if self.key:
            detail = detail.replace(self.key, "[key]")
        if status == 404:
            raise InputError(f"{url} answered 404: no such path, or no model named {self.model!r} there: {detail}")
        if status in (400, 413, 422):
            raise BadRequest(f"{status}: {detail}")
        raise ServerError(f"{url} answered {status}: {detail}; gave up after {self.retries + 1} attempts")


def _parse_choices(body):
    """([(text, whether it was cut at the token limit)], usage, model) of an answer; raises if fields are missing."""
    choices = []
    for choice in body["choices"]:
        message = choice if "text" in choice else choice["message"]  # /completions has no message
        text = "" if message.get("refusal") else message["text" if "text" in choice else "content"]
        text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be written to a file
        choices.append((text, choice.get("finish_reason") == "length"))
    if not choices:
        raise IndexError
    return choices, dict(body.get("usage") or {}), body.get("model")


def _reason(error):
    cause = getattr(error.args[0], "reason", None) if error.args else None
    return f"no answer ({type(cause or error).__name__})"


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
        if not turn.opening:
            reply = self.client.chat(turn.messages, **sampling)
        else:
            opened = [*turn.messages, {"role": "assistant", "content": turn.opening}]
            if self.mode == "continue":
                reply = self.client.chat(opened, extra=_CONTINUE, **sampling)
            else:
                reply = self.client.complete(self._render(opened), **sampling)
        usage.update(reply.usage)
        return reply.texts

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
        if opening and self.mode == "continue":
            self._probe_continuation()

    def _probe_continuation(self):
        other = "name --prefix-mode completions"
        try:
            continued = self.client.chat(_OPENED, extra=_CONTINUE, max_tokens=1).usage["prompt_tokens"]
        except BadRequest as error:
            raise InputError(f"the server does not continue a message ({error}): {other}") from None
        try:
            closed = self.client.chat(_OPENED, max_tokens=1).usage["prompt_tokens"]
        except BadRequest:  # it accepts a final assistant message only when told to continue it
            return
        if continued >= closed:
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
