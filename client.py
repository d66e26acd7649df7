"""A client for OpenAI-compatible servers that expects servers to misbehave.

    from client import Client
    client = Client(["http://127.0.0.1:8000/v1"], model="Qwen/Qwen2.5-32B-Instruct")
    reply = client.chat([{"role": "user", "content": "2 + 2 = ?"}], max_tokens=8)
    reply.texts, reply.usage

It speaks `POST /v1/chat/completions` and `POST /v1/completions` as vLLM, `transformers serve` and
hosted APIs understand them. The teacher, the judge and served students are all asked through it.
"""

import dataclasses
import email.utils
import json
import os
import queue
import random
import sys
import threading
import time

import requests
import urllib3

from common import InputError

BACKOFF = 0.5  # seconds before the first retry; doubled for each further one, up to BACKOFF_MAX
BACKOFF_MAX = 30.0
RETRY_AFTER_MAX = 120.0  # a server that asks for more patience than this counts as out of service
DEAD_SECONDS = 5.0  # how long an endpoint that failed is left out while another one lives


class ServerError(InputError):
    """No usable answer within the retries. The same command continues when the server is back."""

    exit_status = 1


class BadRequest(Exception):
    """The server refused this very request (400, 413, 422), as when the context is too long."""


class _Retry(Exception):
    """One attempt failed in a way that may pass; `after` is the server's Retry-After in seconds."""

    def __init__(self, message, after=None):
        super().__init__(message)
        self.after = after


@dataclasses.dataclass
class Reply:
    """texts: n continuations, cut before the first stop string.

    usage: counts of tokens, requests, retries, and texts that ended at the token limit ("truncated").
    """

    texts: list
    usage: dict
    model: str


@dataclasses.dataclass
class _Endpoint:
    url: str
    busy: int = 0
    dead_until: float = 0.0


class Client:
    """Asks one or several equal endpoints; threads share one client.

    urls: bases that end in /v1. model: the name to ask for; None asks the server which model it has.
    api_key_env: environment variable with the key, sent as a bearer token and shown nowhere.
    timeout: seconds for one whole request, its body included. retries: further attempts after the
    first, for everything that may pass (429, 5xx, lost connections, time-outs, broken bodies).

    Raises ServerError when the retries are used up, BadRequest for what the server will never
    take, and InputError for 401, 403 and 404, where no request can succeed.
    """

    def __init__(self, urls, model=None, api_key_env="OPENAI_API_KEY", timeout=600.0, retries=8):
        if not urls:
            raise InputError("no server: name one with --url http://HOST:PORT/v1")
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise InputError(f"--url {url}: an address such as http://127.0.0.1:8000/v1 was expected")
        self.endpoints = [_Endpoint(url.rstrip("/")) for url in urls]
        self.key = os.environ.get(api_key_env or "", "")
        self.api_key_env = api_key_env
        self.timeout = timeout
        self.retries = retries
        self._one_choice = False  # this server answers n > 1 with one choice
        self._lock = threading.Lock()
        self._local = threading.local()
        self.model = model or self._first_model()

    def chat(self, messages, n=1, extra=None, **sampling):
        """n replies to a chat. sampling: temperature, top_p, max_tokens, stop, seed. extra: further body fields."""
        return self._ask("/chat/completions", {"messages": messages, **(extra or {})}, n, sampling)

    def complete(self, prompt, n=1, extra=None, **sampling):
        """n continuations of a text."""
        return self._ask("/completions", {"prompt": prompt, **(extra or {})}, n, sampling)

    def _ask(self, path, body, n, sampling):
        """Collect n choices. Some servers ignore n: what is missing is asked for again, one at a time."""
        body = {"model": self.model, **body, **{k: v for k, v in sampling.items() if v is not None}}
        names = ("prompt_tokens", "completion_tokens", "requests", "retries", "truncated")
        reply = Reply([], dict.fromkeys(names, 0), self.model)
        while len(reply.texts) < n:
            missing = 1 if self._one_choice else n - len(reply.texts)
            request = {**body, "n": missing} if missing > 1 else dict(body)
            if reply.texts and request.get("seed") is not None:
                request["seed"] += len(reply.texts)  # or every further answer would be the first one again
            answer, retries = self._post_with_retries(path, request)
            for choice in answer["choices"][:missing]:
                text = _text(choice).encode("utf-8", "replace").decode()  # no file takes half a surrogate pair
                reply.texts.append(cut_at_stop(text, body.get("stop") or []))
                reply.usage["truncated"] += choice.get("finish_reason") == "length"
            self._one_choice |= len(answer["choices"]) < missing
            usage = answer.get("usage") or {}
            for name in ("prompt_tokens", "completion_tokens"):
                reply.usage[name] += usage.get(name) or 0
            reply.usage["requests"] += 1
            reply.usage["retries"] += retries
            reply.model = answer.get("model") or self.model
        return reply

    def _post_with_retries(self, path, body):
        for attempt in range(self.retries + 1):
            endpoint = self._take_endpoint()
            try:
                answer = self._request("POST", endpoint.url + path, body)
                endpoint.dead_until = 0.0
                return answer, attempt
            except _Retry as error:
                endpoint.dead_until = time.monotonic() + DEAD_SECONDS
                if attempt == self.retries:
                    raise ServerError(f"{endpoint.url}: {error}; gave up after {attempt + 1} attempts") from None
                self._wait(attempt, error.after)
            finally:
                with self._lock:
                    endpoint.busy -= 1

    def _take_endpoint(self):
        """The least busy endpoint that is not known to be down; if all are, the one due first."""
        with self._lock:
            now = time.monotonic()
            endpoint = min(self.endpoints, key=lambda e: (max(e.dead_until - now, 0.0), e.busy))
            endpoint.busy += 1
            return endpoint

    def _wait(self, attempt, after):
        alive = any(endpoint.dead_until <= time.monotonic() for endpoint in self.endpoints)
        if alive and after is None:
            return  # another endpoint can be asked at once
        backoff = min(BACKOFF * 2**attempt, BACKOFF_MAX) * random.uniform(0.5, 1.0)
        time.sleep(max(backoff, after or 0.0))

    def _request(self, method, url, body=None):
        """One attempt. Returns the parsed body; see the class for what is raised."""
        session, prepared, settings = self._prepare(method, url)
        request = prepared.copy()
        if body is not None:
            request.prepare_body(None, None, json=body)
        deadline = time.monotonic() + self.timeout
        try:
            with session.send(request, timeout=(10.0, self.timeout), **settings) as response:
                content = b""
                # Read as it comes: requests' own time-out starts anew with every byte that trickles in.
                while chunk := response.raw.read1(65536, decode_content=True):
                    content += chunk
                    if time.monotonic() > deadline:
                        raise _Retry(f"no complete answer within {self.timeout:g} s")
        except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError):
            raise _Retry(f"no answer within {self.timeout:g} s") from None
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _Retry(f"connection failed ({type(error).__name__})") from None
        self._check_status(url, response, content)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            raise _Retry("the answer is not JSON") from None
        if method == "POST":
            _check_choices(answer)
        return answer

    def _prepare(self, method, url):
        """This thread's session, the request but for its body, and its proxies and certificates.

        Made once for each thread and URL: requests takes longer to find them out than to send the request.
        """
        made = self._local.__dict__
        if "session" not in made:
            made["session"] = requests.Session()
            if self.key:
                made["session"].headers["Authorization"] = f"Bearer {self.key}"
        session = made["session"]
        if url not in made:
            request = session.prepare_request(requests.Request(method, url))
            made[url] = request, session.merge_environment_settings(request.url, {}, True, None, None)
        return session, *made[url]

    def _check_status(self, url, response, content):
        status = response.status_code
        if status == 200:
            return
        if status in (401, 403):  # the body is not shown: some servers echo the key in it
            raise InputError(f"{url} answered {status}: the key in ${self.api_key_env} is missing or not accepted")
        detail = " ".join(content.decode("utf-8", "replace").split())[:300]
        if self.key:
            detail = detail.replace(self.key, "[key]")
        if status == 404:
            raise InputError(f"{url} answered 404: no such path, or no model named {self.model!r} there: {detail}")
        if status in (400, 413, 422):
            raise BadRequest(f"{status}: {detail}")
        after = _retry_after(response.headers.get("Retry-After"))
        if after is not None and after > RETRY_AFTER_MAX:
            raise ServerError(f"{url} answered {status} and asks to wait {after:.0f} s")
        raise _Retry(f"status {status}: {detail}", after)

    def _first_model(self):
        self.model = None
        for attempt in range(self.retries + 1):
            url = self.endpoints[attempt % len(self.endpoints)].url
            try:
                listed = self._request("GET", url + "/models")
                return listed["data"][0]["id"]
            except _Retry as error:
                reason = str(error)
                if attempt < self.retries:
                    self._wait(attempt, error.after or BACKOFF)
            except (KeyError, IndexError, TypeError):
                raise InputError(f"{url}/models lists no model: name one with --model") from None
        raise ServerError(f"{url}/models: {reason}; gave up after {self.retries + 1} attempts (or name a --model)")


def _check_choices(answer):
    """A body without at least one text is a fault of the server, not an answer."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices:
        raise _Retry("the answer has no choices")
    try:
        whole = isinstance(answer.get("usage") or {}, dict) and all(
            isinstance(_text(choice), str) for choice in choices
        )
    except (AttributeError, TypeError):
        whole = False
    if not whole:
        raise _Retry("the answer has no text")


def _text(choice):
    """What a choice says: /chat/completions keeps it in a message, /completions does not. A refusal says nothing."""
    if "text" in choice:
        return choice["text"]
    message = choice.get("message") or {}
    return "" if message.get("refusal") else message.get("content")


def _retry_after(value):
    """Seconds in a Retry-After header: a number or an HTTP date (RFC 9110, 10.2.3); None if there is none."""
    if not value:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None


def cut_at_stop(text, stop):
    """The text before the first stop string: `transformers serve` leaves it in, others take it out."""
    ends = [text.find(s) for s in stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


class Speaker:
    """A served model that answers turns.

    mode: how it is made to continue an opening; "auto" until probe() has found out. tokenizer: its name, or itself,
    for the mode "completions". served: the model's name as the server last reported it.
    """

    def __init__(self, client, prompts, mode="auto", tokenizer=None, **sampling):
        self.client, self.prompts, self.sampling = client, prompts, sampling
        self.mode, self.tokenizer = mode, tokenizer
        self.extra, self.served = {}, client.model

    def answer(self, turn, usage, n=1, **sampling):
        """n candidates for a turn; token counts are added to the Counter `usage`."""
        sampling = {**self.sampling, **sampling, "n": n, "extra": self.extra}
        opened = [*turn.messages, {"role": "assistant", "content": turn.opening}]
        if not turn.opening:
            reply = self.client.chat(turn.messages, **sampling)
        elif self.mode == "continue":
            reply = self.client.chat(opened, **sampling | {"extra": self.extra | _CONTINUE})
        elif self.mode == "completions":
            reply = self.client.complete(self._render(opened), **sampling)
        else:  # "instruct": the model is asked to repeat the opening; what it repeats is cut off again
            *before, last = turn.messages
            instruction = self.prompts.fill("continue_instruction", prefix=turn.opening)
            content = f"{last['content']}\n\n{instruction}"
            reply = self.client.chat([*before, {**last, "content": content}], **sampling)
            reply.texts = [text.lstrip().removeprefix(turn.opening) for text in reply.texts]
        usage.update(reply.usage)
        self.served = reply.model
        return reply.texts

    def probe(self, opening=False):
        """Ask a little before much is asked: what would fail in every episode is refused before the first.

        opening: whether turns will have one to continue.
        """
        try:
            self.served = self.client.chat(_HELLO, max_tokens=1).model
            if opening and self.mode == "completions":
                self.client.complete(self._render(_OPENED), max_tokens=1)
        except BadRequest as error:
            raise InputError(f"the server refuses even a short request ({error})") from None
        if opening and self.mode == "auto":
            self.mode = self.find_mode()
        if self.sampling.get("temperature"):
            self.extra = self.find_sampling()

    def find_mode(self):
        """Whether this server really continues an assistant message, as vLLM does.

        A server that does not know the two fields may refuse them (422) or, worse, ignore them,
        close the assistant's turn and open another. The prompt is then as long as without the fields,
        and that is what the probe compares: no model, however small, can mislead it.
        """
        try:
            continued = self.client.chat(_OPENED, extra=_CONTINUE, max_tokens=1).usage["prompt_tokens"]
        except BadRequest as error:
            raise InputError(f"the server does not continue a message ({error}): {_OTHER_MODES}") from None
        try:
            closed = self.client.chat(_OPENED, max_tokens=1).usage["prompt_tokens"]
        except BadRequest:  # it insists on a user turn at the end, unless told to continue
            return "continue"
        if continued >= closed:
            raise InputError(f"the server ignores continue_final_message: {_OTHER_MODES}")
        return "continue"

    def find_sampling(self):
        """The fields, besides the temperature, that this server needs to sample; {} for most.

        `transformers serve` stays greedy unless the model's own generation_config, or a field of the request, says
        do_sample. One that says the same three times at temperature 1 is told so; if it goes on, the user is.
        """
        for extra in ({}, {"generation_config": json.dumps({"do_sample": True})}):
            try:
                reply = self.client.chat(_HELLO, n=3, seed=0, temperature=1.0, max_tokens=32, extra=extra)
            except BadRequest:
                break
            if len(set(reply.texts)) > 1:
                return extra
        print("warning: the server says the same whatever the seed: it may ignore the temperature", file=sys.stderr)
        return {}

    def _render(self, opened):
        """A chat as the text that its last message ends in, by the model's own template."""
        if isinstance(self.tokenizer, str):
            from transformers import AutoTokenizer  # seconds to import, and only this mode needs it

            try:
                self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
            except (OSError, ValueError) as error:
                reason = str(error).split("\n")[0]
                raise InputError(f"--tokenizer {self.tokenizer}: cannot be loaded: {reason}") from None
        tokenizer = self.tokenizer
        if not tokenizer.chat_template:
            raise InputError(f"--tokenizer {tokenizer.name_or_path}: it has no chat template")
        text = tokenizer.apply_chat_template(opened, continue_final_message=True, tokenize=False)
        # Where the tokenizer itself begins a text with <bos>, the server's will do so again.
        own = tokenizer.bos_token and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        return text.removeprefix(tokenizer.bos_token) if own else text


_HELLO = [{"role": "user", "content": "Say hello."}]
_OPENED = [*_HELLO, {"role": "assistant", "content": "Hel"}]
_CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
_OTHER_MODES = (
    "name --prefix-mode completions (the chat is rendered here and sent to /v1/completions) "
    "or --prefix-mode instruct (the model is told how to begin)"
)


def in_parallel(function, items, workers):
    """Yield function(item) for each item as it finishes. The first exception stops the rest and is raised.

    Daemon threads and no executor: Ctrl-C leaves at once instead of waiting for answers in flight.
    """
    items, lock, results, stopped = iter(items), threading.Lock(), queue.Queue(), threading.Event()
    end = object()  # of the items, and of a thread

    def work():
        try:
            while not stopped.is_set():
                with lock:
                    item = next(items, end)
                if item is end:
                    break
                results.put((function(item), None))
            results.put((end, None))
        except BaseException as error:
            results.put((None, error))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        while threads:
            result, error = results.get()
            if error is not None:
                raise error
            if result is end:
                threads.pop()
            else:
                yield result
    finally:
        stopped.set()
