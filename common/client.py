"""A client for OpenAI-compatible servers: the teacher, the judge and served students are all asked through it.

client = Client("http://127.0.0.1:8000/v1", model="Qwen/Qwen2.5-32B-Instruct")
texts, usage = client.chat([{"role": "user", "content": "2 + 2 = ?"}], max_tokens=8)
"""

import collections
import contextlib
import email.utils
import hashlib
import ipaddress
import json
import os
import re
import sys
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor, as_completed

import requests
from urllib3.exceptions import NameResolutionError

import common
from common import InputError, read_jsonl

LOST = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
# What an answer raises that is not JSON, lacks a field, or has a field of another type.
UNREADABLE = (LookupError, TypeError, AttributeError, ValueError, RecursionError)


class ServerError(InputError):
    """The server gave no usable answer within the retries. The same command continues when it is back."""

    exit_status = 1


class BadRequest(InputError):
    """The server refused this very request (400, 413, 422), as when the context is too long."""


# ------------- One retry policy for all servers


class Server:
    """JSON over HTTP. Threads may share it.

    url: what all paths are appended to. api_key_env: the environment variable with the key, which is sent as a bearer
    token and never shown. timeout: seconds for one request. retries: further attempts after lost connections, 408, 409,
    429, 5xx and answers that cannot be read, with growing waits or those that Retry-After asks for.
    """

    def __init__(self, url, api_key_env="", timeout=600.0, retries=8):
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self.api_key_env, self.key = api_key_env, os.environ.get(api_key_env, "")
        self.reached = False  # whether the server has ever answered
        try:
            address = urllib.parse.urlsplit(url)
            usable = address.scheme in ("http", "https") and address.hostname and "@" not in address.netloc
            usable = usable and address.port != 0  # reading an impossible port raises a ValueError
        except ValueError:
            usable = False
        if not usable:
            raise InputError(f"--url {url}: an address such as http://127.0.0.1:8000/v1 was expected")
        if not re.fullmatch("[!-~]*", self.key):
            raise InputError(f"${api_key_env}: the key has a space, a line break or a character beyond ASCII in it")
        self.session = requests.Session()
        self.session.mount(f"{address.scheme}://", requests.adapters.HTTPAdapter(pool_maxsize=64))
        self.session.headers["Content-Type"] = "application/json"
        self.session.trust_env = not _is_loopback(address.hostname)  # else $http_proxy would be asked for 127.0.0.1
        self.session.auth = lambda request: request  # else ~/.netrc would replace the key
        if self.key:
            self.session.headers["Authorization"] = f"Bearer {self.key}"

    def request(self, path, body=None, read=lambda answer: answer):
        """POST a body, or GET without one. Returns (read(the answer's JSON), number of retries).

        Raises ServerError when the retries are used up, BadRequest for a request that the server refuses, and
        InputError, at once, where no request can succeed (401, 402, 403, 404, ..., an address that does not exist).
        """
        url, data = self.url + path, None
        if body is not None:  # half of a surrogate pair, which no server can read, becomes a question mark
            data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        for attempt in range(self.retries + 1):
            wait = min(common.BACKOFF * 2 ** min(attempt, 10), 30.0) if attempt else 0
            try:
                options = {"timeout": (10.0, self.timeout), "allow_redirects": False}
                response = self.session.request("GET" if body is None else "POST", url, data=data, **options)
            except LOST as error:
                cause = getattr(error.args[0] if error.args else error, "reason", error)
                reason = f"no answer ({self._one_line(str(cause).rpartition('): ')[2])})"
                if not self.reached and isinstance(cause, NameResolutionError):
                    raise InputError(f"{url}: {reason}") from None
            except (requests.RequestException, ValueError) as error:
                raise InputError(f"{url}: {self._one_line(str(error))}") from None
            else:
                self.reached = True
                status, words = _status(response), self._one_line(response.content.decode("utf-8", "replace"))
                if not (status < 300 or status in (408, 409, 425, 429) or status >= 500):
                    self._refuse(url, status, response.headers.get("Location") or words)
                try:
                    if status < 300:
                        return read(response.json()), attempt
                    reason, wait = f"{status}: {words}", max(wait, _retry_after(response))
                except UNREADABLE as error:
                    reason = f"the answer is not in the expected format ({type(error).__name__}): {words}"
            if attempt < self.retries:
                time.sleep(wait)
        raise ServerError(f"{url}: {reason}; gave up after {self.retries + 1} attempts")

    def _one_line(self, text):
        """The beginning of what a server said, without the key, which some servers repeat."""
        return " ".join((text.replace(self.key, "[key]") if self.key else text).split())[:300]

    def _refuse(self, url, status, words):
        if status in (400, 413, 422):
            raise BadRequest(f"{status}: {words}")
        key = f" (${self.api_key_env} is {'set' if self.key else 'not set'})" if self.api_key_env else ""
        raise InputError(f"{url} answered {status}{key}: {words}")


def _is_loopback(host):
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    return host == "localhost" or host.endswith(".localhost")


def _status(response):
    """The HTTP status. Some gateways answer 200 and put an error, with its status, into the body."""
    if response.status_code == 200:
        with contextlib.suppress(*UNREADABLE):
            return int(response.json()["error"]["code"])
    return response.status_code


def _retry_after(response):
    """The seconds that the server asks to wait, as a number or as a date; at most 120."""
    value, seconds = response.headers.get("Retry-After", ""), 0.0
    with contextlib.suppress(ValueError, OverflowError):
        seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    with contextlib.suppress(ValueError):
        seconds = float(value)
    return min(max(0.0, seconds), 120.0)


# ------------- OpenAI's chat completions


class Client(Server):
    """A client for `POST /v1/chat/completions` and `/v1/completions`. Threads may share it.

    url: a base that ends in /v1. model: None asks the server which model it has. Other arguments: see Server.
    """

    def __init__(self, url, model=None, api_key_env="OPENAI_API_KEY", timeout=600.0, retries=8):
        super().__init__(url, api_key_env, timeout, retries)
        self.model, self.without = model, collections.defaultdict(set)  # path -> fields that the server refuses
        if model is None:
            try:
                self.model, _ = self.request("/models", read=lambda answer: answer["data"][0]["id"])
            except InputError as error:
                raise type(error)(f"{error} (or name a --model)") from None

    def chat(self, messages, n=1, **fields):
        """n replies to a chat: (texts, usage). fields: temperature, max_tokens, ...; those that are None are not sent.

        texts end before the first stop string; thinking stands before the reply as <think>...</think>. usage:
        prompt_tokens, completion_tokens, retries, and truncated, the number of texts that reached the token limit.
        """
        return self._ask("/chat/completions", n, messages=messages, **fields)

    def complete(self, prompt, n=1, **fields):
        """n continuations of a text, as `chat`."""
        return self._ask("/completions", n, prompt=prompt, **fields)

    def probe(self, path="/chat/completions", needed=(), max_tokens=16, **fields):
        """Ask a short question with the fields that will be sent, and find those that the server refuses.

        They are named in one line on stderr, and not sent again. Raises InputError for a field in `needed`, and for a
        server that refuses even the bare question.
        """
        question = {"messages": _HELLO} if "chat" in path else {"prompt": "Hello"}
        kept, todo, together, notes = question, {"max_tokens": max_tokens} | fields, True, []
        while todo:  # all fields together; if that is refused, one by one until one is refused; again without it
            name = next(iter(todo))
            try:
                self._ask(path, **kept, **(todo if together else {name: todo[name]}))
                if together:
                    break
                kept[name] = todo.pop(name)
            except BadRequest as error:
                if not together:
                    if name in self.without[path]:
                        raise InputError(f"{self.url} refuses even a short request ({error})") from None
                    if name in needed:
                        given = f"{name} {todo[name]}"
                        raise InputError(f"{self.url} refuses {given} ({error}): name another --{name}") from None
                    self.without[path].add(name)
                    notes.append(f"{name}, {_WITHOUT.get(name, 'so its own default applies')} ({error})")
                    if name != "max_tokens":
                        del todo[name]
                together = not together
        if notes:
            print(f"note: {self.url}{path} refuses {'; '.join(notes)}", file=sys.stderr)

    def _ask(self, path, n=1, **fields):
        """Collect n choices. Some servers ignore n: missing choices are asked for again."""
        body = {"model": self.model} | {name: value for name, value in fields.items() if value is not None}
        texts, usage, without, stop = [], collections.Counter(truncated=0), self.without[path], body.get("stop", ())
        while len(texts) < n:
            missing = n - len(texts)
            request = body | ({"n": missing} if missing > 1 else {})
            if "seed" in body:
                request["seed"] += len(texts)  # the same seed would repeat the first answer
            if "max_tokens" in without:
                request["max_completion_tokens"] = body["max_tokens"]
            request = {name: value for name, value in request.items() if name not in without}
            (choices, used), retries = self.request(path, request, _read_choices)
            usage.update(used, retries=retries)
            if "stop" in request and any(why == "stop" and _thinks_on(text) for text, why in choices):
                without.add("stop")  # the server stops inside the thinking, too; from now on texts are cut here
                continue
            for text, why in choices[:missing]:
                cut = cut_at_stop(text, stop)
                usage["truncated"] += why in ("length", "max_tokens") and cut == text
                texts.append(cut_partial_stop(cut, stop))
        return texts, usage


_HELLO = [{"role": "user", "content": "Say hello."}]
_WITHOUT = {
    "max_tokens": "so max_completion_tokens is sent",
    "stop": "so texts are cut here",
    "n": "so candidates are asked for one at a time",
    "seed": "so sampled replies cannot be repeated",
}


def _read_choices(answer):
    """Returns ([(text, finish reason)], token counts). Raises one of UNREADABLE if fields are missing."""
    choices, usage = [], answer.get("usage") or {}
    for choice in answer["choices"]:
        why = choice.get("finish_reason")
        if why == "error":  # a gateway lost its own server in the middle
            raise ValueError
        text = _plain(choice["text"]) if "text" in choice else _reply(choice["message"])
        if "</think>" in text and "<think>" not in text:
            text = "<think>" + text  # the chat template of DeepSeek-R1 opens the thinking itself
        # Half of a surrogate pair cannot be written to a file.
        choices.append((text.encode("utf-8", "replace").decode(), why))
    if not choices:
        raise LookupError
    return choices, {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}


def _reply(message):
    """The text of a message, after its thinking as <think>...</think>, which never closes if no text follows."""
    text, thinking = _plain(message.get("content")), message.get("reasoning_content") or message.get("reasoning")
    if isinstance(thinking, str) and not text.lstrip().startswith("<think>"):
        return f"<think>{thinking}</think>{text}" if text else f"<think>{thinking}"
    return text


def _plain(content):
    """The text of a message's content: null, a string, or a list of parts."""
    if isinstance(content, list):
        return "".join(map(_plain, content))
    if isinstance(content, dict):
        return f"<think>{_plain(content['thinking'])}</think>" if "thinking" in content else _plain(content.get("text"))
    return (content or "") + ""  # a TypeError for anything else


def _thinks_on(text):
    """Whether a text is thinking that has not ended."""
    return text.lstrip().startswith("<think>") and "</think>" not in text


def cut_at_stop(text, stop):
    """The text before the first stop string after the thinking. Some servers leave the string in, or ignore `stop`."""
    begin = len(text) if _thinks_on(text) else text.find("</think>") + 1
    ends = [text.find(string, begin) for string in stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def cut_partial_stop(text, stop):
    """The text without the beginning of a stop string at its end, where the token limit cut it."""
    parts = (string[:length] for string in stop for length in range(len(string) - 1, 0, -1))
    return text.removesuffix(next(filter(text.endswith, parts), ""))


# ------------- A served model that answers an episode's turns


class Served:
    """A served model that answers turns.

    mode: how the server is made to continue an opening. "continue": by continue_final_message, as vLLM has it, or by
    itself, as llama.cpp does (probed). "completions": the chat is rendered here with the tokenizer's template and sent
    to /v1/completions. template_options: further arguments of the chat template. sampling: temperature, max_tokens, ...
    """

    def __init__(self, client, mode="continue", tokenizer=None, template_options=None, **sampling):
        self.client, self.mode, self.tokenizer = client, mode, tokenizer
        self.template_options, self.continuing = template_options or {}, _CONTINUE
        self.sampling = _NO_DEFAULTS | sampling  # for /completions
        self.chat_fields = self.sampling | {"chat_template_kwargs": template_options}

    def answer(self, turn, usage, n=1, seed=None):
        """n candidate texts for a turn. Token counts are added to the Counter `usage`."""
        opening, drawn = turn.opening.rstrip(), {"n": n, "seed": seed}  # models rarely continue after white space
        opened = [*turn.messages, {"role": "assistant", "content": opening}]
        if not opening:
            texts, used = self.client.chat(turn.messages, **self.chat_fields, **drawn)
        elif self.mode == "continue":
            texts, used = self.client.chat(opened, **self.continuing, **self.chat_fields, **drawn)
        else:
            texts, used = self.client.complete(self._render(opened), **self.sampling, **drawn)
        usage.update(used)
        texts = [text.removeprefix(opening) for text in texts]  # llama.cpp repeats it
        return texts if opening == turn.opening else [text.lstrip() for text in texts]

    def probe(self, n=1, opening=False):
        """Ask a short question first: what would fail in every episode is refused before the first one.

        n: candidates per turn. opening: whether turns will have an opening.
        """
        needed = [name for name in ("temperature", "top_p") if self.sampling.get(name) not in (None, 1)]
        self.client.probe(needed=needed, **self.chat_fields, seed=0, n=n)
        if opening and self.mode == "completions":
            self._render(_OPENED)
            self.client.probe("/completions", needed=needed, **self.sampling, seed=0, n=n)
        elif opening:
            self._probe_continuing()

    def _probe_continuing(self):
        """Find out how the server continues a message, by the length of its prompt.

        A server that does not would close the assistant's turn and open another: the prompt would be longer than if
        the user had said the same words.
        """
        other, refusal = "name --prefix-mode completions", "it ignores continue_final_message"
        [said] = _HELLO
        counts = [self._count(messages) for messages in (_HELLO, [said | {"content": f"{said['content']} Hello"}])]
        if not counts[1]:
            raise InputError(f"the server sends no token counts, which tell whether it continues a message: {other}")
        for fields in (_CONTINUE, {}):
            try:
                if self._count(_OPENED, **fields) <= counts[1] and counts[0] < counts[1]:
                    self.continuing = fields
                    return
            except BadRequest as error:
                refusal = refusal if fields == {} else str(error)
        raise InputError(f"the server does not continue a message ({refusal}): {other}")

    def _count(self, messages, **fields):
        return self.client.chat(messages, max_tokens=1, **fields)[1]["prompt_tokens"]

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
        options = self.template_options | {"continue_final_message": True, "tokenize": False}
        text = self.tokenizer.apply_chat_template(opened, **options)
        # The server adds the beginning-of-text token again where the tokenizer does so itself.
        begins = self.tokenizer.bos_token and self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]
        return text.removeprefix(self.tokenizer.bos_token) if begins else text


_OPENED = [*_HELLO, {"role": "assistant", "content": "Hello"}]
_CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
# Else vLLM uses what the checkpoint's generation_config.json says, and llama.cpp top_k 40 and min_p 0.05.
_NO_DEFAULTS = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


def in_parallel(function, items, workers):
    """Yield function(item) for each item as it finishes.

    After the first exception no further item is begun; those under way are finished and yielded, and it is raised.
    """
    errors = []

    def run(item):
        if errors:
            return []
        try:
            return [function(item)]
        except Exception as error:
            errors.append(error)
            return []

    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(run, item) for item in items]):
            yield from future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if errors:
        raise errors[0]


# ------------- The paper's judge of factual answers (gpt-4o-mini), with a cache of verdicts


class Judge:
    """Asks an LLM whether an answer says what one of the gold answers says.

    Called with (question, gold answers, prediction), as grading.grade does; returns True, False, or None if no attempt
    brought a clear verdict: `undecided` has a key for each such answer. journal: a Journal that keeps verdicts by the
    hash of model and prompt. The files `caches` are read too: nothing is asked twice. Threads may share a judge.
    Raises what Client.probe and Client.chat raise, but not BadRequest for a single answer: that is no verdict.
    """

    ATTEMPTS, CHARACTERS = 3, 2000  # the answer to a factual question is a phrase: a longer one is cut
    MAX_TOKENS = 1024  # some judges think first

    def __init__(self, client, prompts, journal, caches=()):
        self.client, self.prompts, self.journal, self.undecided = client, prompts, journal, set()
        rows = list(journal.rows)
        for path in caches:
            with contextlib.suppress(InputError):  # another process may be writing its last line
                rows.extend(row for _, row in read_jsonl(path))
        self.verdicts = {row["key"]: row["verdict"] for row in rows}
        client.probe(temperature=0.0, max_tokens=self.MAX_TOKENS, seed=0)

    def __call__(self, question, answers, prediction):
        answers, prediction = (json.dumps(x, ensure_ascii=False) for x in (answers, prediction[: self.CHARACTERS]))
        prompt = self.prompts.fill("judge", question=question or "(not given)", answer=answers, prediction=prediction)
        key = hashlib.sha256(f"{self.client.model}\n{prompt}".encode("utf-8", "replace")).hexdigest()
        if key not in self.verdicts and key not in self.undecided:
            if verdict := self._ask([{"role": "user", "content": prompt}]):
                self.journal.append({"key": key, "verdict": verdict, "model": self.client.model})
                self.verdicts[key] = verdict
            else:
                self.undecided.add(key)
        return self.verdicts[key] == "correct" if key in self.verdicts else None

    def _ask(self, messages):
        with contextlib.suppress(BadRequest):
            for attempt in range(self.ATTEMPTS):
                [text], _ = self.client.chat(messages, temperature=0.0, max_tokens=self.MAX_TOKENS, seed=attempt)
                if verdict := read_verdict(text):
                    return verdict
        return None


def read_verdict(reply):
    """The verdict in a reply: that of the JSON object asked for, whatever stands around it, or the one word alone.

    None for a reply without a verdict, or with two different ones.
    """
    text = "" if _thinks_on(reply) else reply.rpartition("</think>")[2].lower()
    verdicts, decoder, at = [], json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
            verdicts.append(value.get("verdict"))
        except (ValueError, RecursionError):
            end = at + 1
        at = text.find("{", end)
    if word := re.fullmatch(r"[^\w\[]*(?:verdict[^\w\[]+)?(correct|incorrect)[^\w\[]*", text):
        verdicts.append(word[1])
    return next((verdict for verdict in ("correct", "incorrect") if set(map(str, verdicts)) == {verdict}), None)
