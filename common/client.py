"""A client for OpenAI-compatible servers: the teacher, the judge and served students are all asked through it.

client = Client("http://127.0.0.1:8000/v1", model="Qwen/Qwen2.5-32B-Instruct")
texts, usage = client.chat([{"role": "user", "content": "2 + 2 = ?"}], max_tokens=8)
"""

import collections
import contextlib
import email.utils
import hashlib
import json
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import jinja2
import requests
import urllib3
from requests import exceptions

from common import InputError, read_jsonl

BACKOFF = 0.5  # seconds; the waits before the retries are 0, 1, 2, 4, ... up to 30 s
LOST = (requests.ConnectionError, requests.Timeout, exceptions.ChunkedEncodingError, exceptions.ContentDecodingError)
# What an answer raises that is not JSON, lacks a field, or has a field of another type.
UNREADABLE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)
HELLO = [{"role": "user", "content": "Say hello."}]


class ServerError(InputError):
    """The server gave no usable answer within the retries. The same command continues when it is back."""

    exit_status = 1


class BadRequest(InputError):
    """The server refused this request (400, 413, 422), as when the context is too long, or fails at it alone."""


class Connection:
    """JSON over HTTP with one retry policy. Threads may share it.

    url: what all paths are appended to. api_key_env: the environment variable with the key, which is sent as a bearer
    token and never shown. timeout: seconds for one request. retries: further attempts after lost connections, 408, 409,
    425, 429, 5xx and answers that cannot be read, with growing waits or those that Retry-After asks for.
    """

    def __init__(self, url, api_key_env="", timeout=600.0, retries=8):
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.retries = retries
        self.key = os.environ.get(api_key_env, "")
        self.no_key = "" if self.key else f" (${api_key_env} is not set)"
        self.reached = False  # whether the server has ever answered
        self.answers = 0  # to POSTs, with what was asked
        if not re.match(r"https?://[^/@]+(/|$)", url):
            raise InputError(f"{url.split('@')[-1]}: an address such as http://127.0.0.1:8000/v1 was expected")
        if not re.fullmatch("[!-~]*", self.key):
            raise InputError(f"${api_key_env}: the key has a space, a line break or a character beyond ASCII in it")
        self.session = requests.Session()
        self.session.mount(url.split(":")[0] + "://", requests.adapters.HTTPAdapter(pool_maxsize=64))
        self.session.headers["Content-Type"] = "application/json"
        # The environment's proxy is not asked for this machine, and ~/.netrc does not replace the key.
        self.session.trust_env = not re.match(r"\w+://(localhost|127\.[\d.]+|0\.0\.0\.0|\[::1\])([:/]|$)", url)
        self.session.auth = lambda request: request
        if self.key:
            self.session.headers["Authorization"] = f"Bearer {self.key}"

    def request(self, path, body=None, read=lambda answer: answer):
        """POST a body, or GET without one. Returns (read(the answer's JSON), number of retries).

        Raises ServerError when the retries are used up, BadRequest for a request that the server refuses, and
        InputError, at once, where no request can succeed (401, 402, 403, 404, ..., an address that does not exist).
        """
        url, options = self.url + path, {"timeout": (10.0, self.timeout), "allow_redirects": False}
        if body is not None:  # half of a surrogate pair, which no server can read, becomes a question mark
            options["data"] = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        before = self.answers
        for attempt in range(self.retries + 1):
            own_fault = False  # of this request: the server answers others
            wait = min(BACKOFF * 2**attempt, 30.0) if attempt else 0
            try:
                response = self.session.request("GET" if body is None else "POST", url, **options)
                self.reached, status = True, response.status_code
                text = response.content.decode("utf-8-sig", "replace")
                words = self._shown(response.headers.get("Location") or text)
                if 200 <= status < 300:
                    answer = json.loads(text)
                    status = _status_inside(answer) or status
                if 200 <= status < 300:
                    result = read(answer)
                    self.answers += body is not None
                    return result, attempt
                if status in (400, 413, 422) or (status in (403, 451) and self.answers):  # moderation
                    raise BadRequest(f"{status}: {words}")
                if status < 500 and status not in (408, 409, 425, 429):
                    raise InputError(f"{url} answered {status}{self.no_key * (status in (401, 403))}: {words}")
                own_fault = status == 500 and self.answers > before
                reason, wait = f"{status}: {words}", max(wait, _retry_after(response))
            except LOST as error:
                cause = getattr(error.args[0] if error.args else error, "reason", error)
                reason = f"no answer: {self._shown(str(cause).rpartition('): ')[2])}"
                if not self.reached and isinstance(cause, urllib3.exceptions.NameResolutionError):
                    raise InputError(f"{url}: {reason}") from None
            except (requests.RequestException, urllib3.exceptions.LocationValueError) as error:
                raise InputError(f"{url}: {self._shown(str(error))}") from None
            except UNREADABLE as error:
                reason = f"the answer is not in the expected format ({type(error).__name__}): {words}"
                own_fault = self.answers > 0
            if attempt < self.retries:
                time.sleep(wait)
        raise (BadRequest if own_fault else ServerError)(f"{url}: {reason}; gave up after {self.retries + 1} attempts")

    def _shown(self, words):
        """Returns the beginning of what a server said, in one line, without the key, which some servers repeat."""
        return " ".join((words.replace(self.key, "[key]") if self.key else words).split())[:300]


def _status_inside(answer):
    """Returns the HTTP status of an error that a gateway such as OpenRouter reports in an answer of status 200."""
    with contextlib.suppress(TypeError, LookupError):
        code = answer["error"]["code"]
        return code if 400 <= code < 600 else None


def _retry_after(response):
    """Returns the seconds that the server asks to wait, as a number or as a date; at most 120."""
    value, seconds = response.headers.get("Retry-After", ""), 0.0
    with contextlib.suppress(ValueError, OverflowError):
        seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    with contextlib.suppress(ValueError):
        seconds = float(value)
    return min(max(0.0, seconds), 120.0)


class Client(Connection):
    """Asks one model of a server. url: ends in /v1. model: None takes the first one that the server lists.

    Other arguments: see Connection. Threads may share a client.
    """

    def __init__(self, url, model=None, api_key_env="OPENAI_API_KEY", timeout=600.0, retries=8):
        super().__init__(url, api_key_env, timeout, retries)
        self.model = model or self.request("/models", read=_first_model)[0]
        self.refused = set()  # names of fields; see probe

    def chat(self, messages, n=1, **fields):
        """n replies to a chat, or n continuations of a text: (texts, usage). Some servers ignore n and are asked again.

        fields: temperature, max_tokens, ...; those that are None are not sent. texts: thinking comes before the reply
        as <think>...</think>; the reply ends before the first stop string. usage: prompt_tokens, completion_tokens,
        retries, and truncated, the number of texts cut at the token limit.
        """
        path, question = "/chat/completions", "messages"
        if isinstance(messages, str):
            path, question = "/completions", "prompt"
        body = {"model": self.model, question: messages}
        body |= {name: value for name, value in fields.items() if value is not None}
        texts, usage, stop = [], collections.Counter(truncated=0), body.get("stop", ())
        while len(texts) < n:
            request, missing = dict(body), n - len(texts)
            if missing > 1:
                request["n"] = missing
            if "seed" in body:
                request["seed"] += len(texts)  # the same seed would repeat the first answer
            if "max_tokens" in self.refused:
                request["max_completion_tokens"] = body["max_tokens"]
            request = {name: value for name, value in request.items() if name not in self.refused}
            (choices, used), retries = self.request(path, request, _read_choices)
            usage.update(used, retries=retries)
            if "stop" in request and any(why == "stop" and _is_unfinished_thinking(text) for text, why in choices):
                self.refused.add("stop")  # the server stops inside the thinking, too; from now on texts are cut here
                continue
            for text, why in choices[:missing]:
                texts.append(cut_at_stop(text, stop))
                usage["truncated"] += why == "length" and texts[-1] == text
        return texts, usage

    def probe(self, question=HELLO, needed=(), max_tokens=16, **fields):
        """Ask a short question with the fields that will be sent. Those that the server refuses are not sent again.

        They are named in one line on stderr. Raises InputError if one of them is in `needed`, or if the server refuses
        even the question alone.
        """

        def refusal(fields):
            try:
                self.chat(question, **fields)
            except BadRequest as error:
                return error

        fields, asked, notes = {"max_tokens": max_tokens} | fields, {}, []
        if not refusal(fields):
            return
        for name, value in fields.items():  # one more at a time: some are refused only beside another
            asked[name] = value
            if error := refusal(asked):
                if name in needed:
                    raise InputError(f"{self.url} refuses {name} {value} ({error}): name another")
                self.refused.add(name)
                notes.append(f"{name} ({error})")
                if name == "max_tokens" and (error := refusal(asked)):  # now sent as max_completion_tokens
                    raise InputError(f"{self.url} refuses even a short request ({error})")
        print(f"note: {self.url} refuses {'; '.join(notes)}; it is asked without", file=sys.stderr)


def _first_model(answer):
    models = answer["data"] if isinstance(answer, dict) else answer  # some servers answer with the list alone
    return models[0]["id"]


def _read_choices(answer):
    """Returns ([(text, finish reason)], token counts). Raises one of UNREADABLE if fields are missing."""
    choices, usage = [], answer.get("usage") or {}
    for choice in answer["choices"]:
        why = choice.get("finish_reason")
        if why == "error" or choice.get("error"):  # a gateway reports that the server behind it failed
            raise ValueError
        if choice.get("text"):
            text = _plain(choice["text"])
        else:  # a content filter may leave out the message
            text = _reply(choice.get("message") or {} if why or "text" in choice else choice["message"])
        text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be written to a file
        choices.append((text, why))
    if not choices:
        raise LookupError
    return choices, {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}


def _reply(message):
    """Returns a message's thinking as <think>...</think>, then its text. Without a text, the tag is not closed."""
    text, thinking = _plain(message.get("content")), message.get("reasoning_content") or message.get("reasoning")
    if isinstance(thinking, str) and not _begins_thinking(text):
        text = f"<think>{thinking}</think>{text}" if text else f"<think>{thinking}"
    return text


def _plain(content):
    """Returns the text of a message's content: null, a string, or a list of parts."""
    if isinstance(content, list):
        return "".join(map(_plain, content))
    if isinstance(content, dict):
        return f"<think>{_plain(content['thinking'])}</think>" if "thinking" in content else _plain(content.get("text"))
    return (content or "") + ""  # a TypeError for anything else


# Around the thinking: <think>, <thought> (Gemini), [THINK] (Magistral), ◁think▷ (Kimi), channels (gpt-oss)
_NAMES = "(?:seed:)?(?:think(?:ing)?|thought|reasoning)"
BEGIN_THINKING = rf"(?:<{_NAMES}>|\[THINK\]|◁think▷|<\|channel\|>analysis<\|message\|>)"
_FINAL_CHANNEL = r"(?:<\|end\|>)?(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>"
END_THINKING = rf"(?:</{_NAMES}>|\[/THINK\]|◁/think▷|{_FINAL_CHANNEL})"


def _begins_thinking(text):
    return bool(re.match(rf"\s*{BEGIN_THINKING}", text, re.I))


def _is_unfinished_thinking(text):
    return _begins_thinking(text) and not re.search(END_THINKING, text, re.I)


def cut_at_stop(text, stop):
    """Returns the text before the first stop string after the thinking. Some servers keep it, or ignore `stop`."""
    thought = re.search(END_THINKING, text, re.I)
    begin = len(text) if _is_unfinished_thinking(text) else thought.end() if thought else 0
    ends = [text.find(string, begin) for string in stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


class Served:
    """A served model that answers turns.

    A server continues an opening by continue_final_message, as vLLM has it, or by itself, as llama.cpp does (probed).
    tokenizer: the model's, or its name, for a server that does neither: its template renders the chat here, which is
    sent to /v1/completions. template_options: further arguments of the template. sampling: temperature, ...
    """

    def __init__(self, client, tokenizer=None, template_options=None, **sampling):
        self.client = client
        self.tokenizer = tokenizer
        self.template_options = template_options
        self.sampling = _NO_DEFAULTS | sampling
        self.continuing = _CONTINUE

    def answer(self, turn, usage, n=1, seed=None):
        """n candidate texts for a turn. Token counts are added to the Counter `usage`."""
        fields = {"n": n, "seed": seed, "chat_template_kwargs": self.template_options}
        messages = turn.messages
        if turn.opening:
            messages = [*messages, {"role": "assistant", "content": turn.opening}]
            fields |= self.continuing
        if turn.opening and self.tokenizer:
            messages = self._render(messages)
            fields = {"n": n, "seed": seed}
        texts, used = self.client.chat(messages, **self.sampling, **fields)
        usage.update(used)
        return [text.removeprefix(turn.opening) for text in texts]  # llama.cpp repeats it

    def probe(self, n=1, opening=False):
        """Ask a short question first: what would fail in every episode is refused before the first one.

        n: candidates per turn. opening: whether turns will have an opening.
        """
        needed = [name for name in ("temperature", "top_p") if self.sampling.get(name) not in (None, 1)]
        fields = self.sampling | {"n": n, "seed": 0, "needed": needed}
        self.client.probe(chat_template_kwargs=self.template_options, **fields)
        if opening and self.tokenizer:
            self.client.probe(self._render(_OPENED), **fields)
        elif opening:
            self._probe_continuing()

    def _probe_continuing(self):
        """Find out how the server continues a message, by the length of its prompt.

        If it does not, it closes the assistant's turn and opens another, so that the prompt is longer than if
        the user had said the same words.
        """

        def count(messages, **fields):
            return self.client.chat(messages, max_tokens=1, **fields)[1]["prompt_tokens"]

        short, same = count(HELLO), count([{"role": "user", "content": "Say hello. Hello"}])
        refusal = "it ignores continue_final_message" if same else "it sends no token counts that would show it"
        for fields in (_CONTINUE, {}):
            try:
                if short < same >= count(_OPENED, **fields):
                    self.continuing = fields
                    return
            except BadRequest as error:
                refusal = error
        raise InputError(f"the server does not continue a message ({refusal}): give --prefix-tokenizer NAME")

    def _render(self, opened):
        """Returns a chat as text that ends with its last message, by the model's own template."""
        if isinstance(self.tokenizer, str):
            from common.models import load_tokenizer  # imports torch, which a teacher behind a server does not need

            self.tokenizer = load_tokenizer(self.tokenizer)
        options = {"continue_final_message": True, "tokenize": False} | (self.template_options or {})
        try:
            text = self.tokenizer.apply_chat_template(opened, **options)
        except (ValueError, jinja2.TemplateError) as error:  # it has no template, or one that changes the message
            raise InputError(f"--prefix-tokenizer {self.tokenizer.name_or_path}: {error}") from None
        # The server adds the beginning-of-text token again where the tokenizer does so itself.
        begins = self.tokenizer.bos_token and self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]
        return text.removeprefix(self.tokenizer.bos_token) if begins else text


_OPENED = [*HELLO, {"role": "assistant", "content": "Hello"}]
_CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
# Without these, vLLM uses the checkpoint's generation_config.json, and llama.cpp top_k 40 and min_p 0.05.
_NO_DEFAULTS = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


def in_parallel(function, items, workers):
    """Yield function(item) for each item as it finishes.

    After an exception no further item is started. The running ones finish and are yielded; then it is raised.
    """
    pool, errors = ThreadPoolExecutor(workers), []

    def run(item):
        try:
            return [] if errors else [function(item)]
        except Exception as error:
            errors.append(error)
            return []

    try:
        for future in as_completed([pool.submit(run, item) for item in items]):
            yield from future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if errors:
        raise errors[0]


VERDICT = {"key": str, "verdict": str}  # the fields of a row of judge*.jsonl
JUDGE_SAMPLING = {"temperature": 0.0, "max_tokens": 1024, "seed": 0}  # some judges think first


class Judge:
    """Asks an LLM whether an answer means the same as one of the gold answers.

    Called with (question, gold answers, prediction), as grading.grade does; returns True, False, or None if the reply
    has no clear verdict. journal: a Journal judge*.jsonl, which keeps verdicts by the hash of model and prompt; those
    of all such files in its folder are read, so that nothing is asked twice. Threads may share a judge.
    Raises what Client.probe and Client.chat raise, except BadRequest for a single answer, which then has no verdict.
    """

    CHARACTERS = 2000  # of an answer; the answer to a factual question is a phrase, so a longer one is cut

    def __init__(self, client, prompts, journal):
        self.client = client
        self.prompts = prompts
        self.journal = journal
        self.lock = threading.Lock()
        self.probed = False
        self.verdicts = {}
        for path in journal.path.parent.glob("judge*.jsonl"):
            self.verdicts |= {row["key"]: row["verdict"] for _, row in read_jsonl(path, VERDICT, growing=True)}

    def __call__(self, question, answers, prediction):
        answers, prediction = (json.dumps(x, ensure_ascii=False) for x in (answers, prediction[: self.CHARACTERS]))
        prompt = self.prompts.fill("judge", question=question or "(not given)", answer=answers, prediction=prediction)
        key = hashlib.sha256(f"{self.client.model}\n{prompt}".encode("utf-8", "replace")).hexdigest()
        if key not in self.verdicts:
            with self.lock:
                if not self.probed:
                    self.client.probe(**JUDGE_SAMPLING)
                self.probed = True
            verdict = None
            with contextlib.suppress(BadRequest):
                [text], _ = self.client.chat([{"role": "user", "content": prompt}], **JUDGE_SAMPLING)
                verdict = read_verdict(text)
            if verdict:
                self.journal.append({"key": key, "verdict": verdict, "model": self.client.model})
            self.verdicts[key] = verdict
        return self.verdicts[key] and self.verdicts[key] == "correct"


def read_verdict(reply):
    """Returns the verdict in a reply's JSON, or of a line of one word; None if there is none, or two differ."""
    text = "" if _is_unfinished_thinking(reply) else re.split(END_THINKING, reply, flags=re.I)[-1].lower()
    verdicts = set(re.findall(r"""["']verdict["']\s*:\s*["'](correct|incorrect)["']""", text))
    line = r"(?m)^[^\w\[\n]*(?:(?:final )?verdict[^\w\[\n]+)?(correct|incorrect)[^\w\[\n?]*$"
    verdicts |= set(re.findall(line, text))
    return verdicts.pop() if len(verdicts) == 1 else None
