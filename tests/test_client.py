"""The client against a server that misbehaves in every way that servers do.  `make test ROOM=client`"""

import collections
import copy
import threading
import time
from types import SimpleNamespace

import pytest
from tokenizers.processors import TemplateProcessing

import common
from common import InputError
from common.client import BadRequest, Client, Served, ServerError, in_parallel
from servers import completion, serve

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(common, "BACKOFF", 0.01)


PASSING = {
    "429": ("status", 429, {}, "slow down"),
    "429 retry-after": ("status", 429, {"Retry-After": "1"}, "slow down"),
    "500": ("status", 500, {}, "oops"),
    "502": ("status", 502, {}, "<html>bad gateway</html>"),
    "503": ("status", 503, {}, ""),
    "reset": ("reset",),
    "reset in body": ("reset in body",),
    "cut body": ("cut",),
    "invalid JSON": ("raw", b'{"choices": [{"message"'),
    "a list": ("raw", b"[]"),
    "no choices": {"choices": []},
    "null choices": {"choices": None},
    "no choice": {"choices": [None]},
    "no message": {"choices": [{"message": "fine"}]},
    "usage is text": {"choices": [{"text": "fine"}], "usage": "much"},
    "nested too deep": ("raw", b"[" * 100_000),
    "null content": {"choices": [{"message": {"role": "assistant", "content": None}}]},
    "hang": ("hang", 2.0),
}


@pytest.mark.parametrize("fault", PASSING)
def test_passing_faults_are_retried(fault):
    with serve(lambda path, body, number: PASSING[fault] if number < 2 else completion("fine")) as (url, seen):
        asker = Client(url, timeout=0.4, retries=4)
        start = time.monotonic()
        texts, usage = asker.chat(HELLO)
        assert (texts, usage["retries"], usage["prompt_tokens"], len(seen)) == (["fine"], 2, 5, 3)
        if "retry-after" in fault:
            assert time.monotonic() - start > 2
        assert time.monotonic() - start < 5


def test_retries_are_bounded():
    with serve(lambda *request: ("status", 500, {}, "broken for good")) as (url, seen):
        with pytest.raises(ServerError, match="500: broken for good; gave up after 3 attempts"):
            Client(url, retries=2).chat(HELLO)
        assert len(seen) == 3
    with pytest.raises(ServerError, match="no answer .NewConnectionError.; gave up after 2 attempts"):
        Client(url, model="m", retries=1).chat(HELLO)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_hopeless_requests_are_not_repeated_and_show_no_key(status, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-very-secret")
    with serve(lambda *request: ("status", status, {}, "no: sk-very-secret")) as (url, seen):
        expected = InputError if status in (401, 403, 404) else BadRequest
        with pytest.raises(expected, match=rf"{status}[^\n]*: no: \[key\]$"):
            Client(url, api_key_env="TEACHER_KEY").chat(HELLO)
        assert len(seen) == 1 and seen[0][2]["Authorization"] == "Bearer sk-very-secret"


def test_a_server_that_ignores_n_is_asked_n_times_with_other_seeds():
    with serve(lambda path, body, number: completion(f"seed {body['seed']}")) as (url, seen):
        texts, usage = Client(url).chat(HELLO, n=3, seed=7, temperature=0.5)
        assert texts == ["seed 7", "seed 8", "seed 9"]
        assert len(seen) == 3 and usage["completion_tokens"] == 6


REFUSAL = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
ANSWERS = {
    # Servers that cut a text by UTF-16 units leave such halves, which no file could take.
    "half a surrogate pair": (completion("cut \ud83d", finish_reason="length"), "cut ?", 1),
    "stop strings": (completion("code ```<end_code> and Observation: made up"), "code ```", 0),
    "a refusal": ({"choices": [{"message": REFUSAL, "finish_reason": "stop"}]}, "", 0),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_need_care(name):
    answer, text, truncated = ANSWERS[name]
    with serve(lambda *request: answer) as (url, seen):
        texts, usage = Client(url).chat(HELLO, stop=["<end_code>", "Observation:"])
        assert (texts, usage["truncated"], len(seen)) == ([text], truncated, 1)


def test_a_server_that_restarts_in_the_middle(monkeypatch):
    monkeypatch.setattr(common, "BACKOFF", 0.1)
    with serve(lambda *r: completion("before")) as (url, _):
        asker = Client(url, retries=10)
        assert asker.chat(HELLO)[0] == ["before"]
    asker.session.close()  # a thread of the old server would still answer on an open connection
    answers = []
    thread = threading.Thread(target=lambda: answers.extend(asker.chat(HELLO)[0]))
    thread.start()
    time.sleep(0.2)
    with serve(lambda *r: completion("after"), port=int(url.split(":")[2].split("/")[0])):
        thread.join(20)
    assert answers == ["after"]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1"])
def test_an_address_that_is_none(url):
    with pytest.raises(InputError, match="--url"):
        Client(url)


def vllm(path, body, number):
    """Closes the assistant's turn and opens another unless told to continue, and counts tokens accordingly."""
    prompt = sum(len(m["content"]) for m in body["messages"])
    answer = completion("lo")
    answer["usage"]["prompt_tokens"] = prompt + (0 if body.get("continue_final_message") else 9)
    return answer


def strict(path, body, number):
    """Refuses a field that it does not know."""
    return ("status", 422, {}, "unknown field") if "continue_final_message" in body else completion("Hello!")


def test_the_probe_tells_a_server_that_continues_from_those_that_do_not():
    with serve(vllm) as (url, _):
        assert Served(Client(url)).probe(opening=True) is None
    with serve(lambda *request: completion("Hello!")) as (url, _):
        with pytest.raises(InputError, match="ignores continue_final_message.*--prefix-mode"):
            Served(Client(url)).probe(opening=True)
    with serve(strict) as (url, _):
        with pytest.raises(InputError, match="does not continue.*unknown field.*--prefix-mode"):
            Served(Client(url)).probe(opening=True)
    with serve(lambda *request: ("status", 400, {}, "no such model: m")) as (url, _):
        with pytest.raises(InputError, match="refuses even a short request .400: no such model: m"):
            Served(Client(url, model="m")).probe()


@pytest.mark.parametrize("own_bos", [False, True])
def test_a_rendered_chat_begins_once(tiny_tokenizer, own_bos):
    """The template writes <bos>; where the server's tokenizer does so too, the text is sent without."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    if own_bos:
        ids = [("<|endoftext|>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", None, ids)
    with serve(lambda *request: {"choices": [{"text": "lo"}]}) as (url, seen):
        served = Served(Client(url), "completions", tokenizer)
        assert served.answer(SimpleNamespace(messages=HELLO, opening="Hel"), collections.Counter()) == ["lo"]
    ids = tokenizer(seen[0][1]["prompt"]).input_ids
    assert tokenizer.decode(ids) == ("<|endoftext|><|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nHel")


@pytest.mark.parametrize("name", ["nowhere", "no template"])
def test_a_tokenizer_that_cannot_render_is_one_line(tiny_tokenizer, tmp_path, name):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "no template")
    with serve(lambda *request: completion("hello")) as (url, _):
        with pytest.raises(InputError, match=r"^--tokenizer \S*(nowhere|no template): [^\n]*$"):
            Served(Client(url), "completions", str(tmp_path / name)).probe(opening=True)


def test_in_parallel_gives_every_result_and_raises_the_first_error():
    assert sorted(in_parallel(lambda x: x * x, range(1, 50), 7)) == [x * x for x in range(1, 50)]

    def fail(x):
        time.sleep(0.001)
        return 1 // (20 - x)

    results = in_parallel(fail, range(4_000), 4)
    with pytest.raises(ZeroDivisionError):
        list(zip(results, range(2_000), strict=False))
