"""The client and the judge against servers that answer in every way that servers do.  `make test ROOM=client`"""

import collections
import copy
import json
import threading
import time
from types import SimpleNamespace

import pytest
from tokenizers.processors import TemplateProcessing

from agent_distill import Prompts
from common import InputError, Journal
from common.client import BadRequest, Client, Judge, Served, ServerError, in_parallel, read_verdict
from servers import completion, serve

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("common.client.BACKOFF", 0.01)


# ------------- Lost connections and refusals

PASSING = {
    "429": ("status", 429, {}, "slow down"),
    "429 retry-after": ("status", 429, {"Retry-After": "0.3"}, "slow down"),
    "500": ("status", 500, {}, "oops"),
    "503": ("status", 503, {"Retry-After": "when it is Friday"}, ""),
    "reset": ("reset",),
    "reset in body": ("reset in body",),
    "cut body": ("cut",),
    "invalid JSON": ("raw", b'{"choices": [{"message"'),
    "no choices": {"choices": []},
    "no message": {"choices": [{"message": "fine"}]},
    "content is a number": completion(5),
    "not gzip": ("status", 200, {"Content-Encoding": "gzip"}, "fine"),
    "usage is infinite": ("raw", b'{"choices": [{"text": "fine"}], "usage": {"prompt_tokens": 1e999}}'),
    "nested too deep": ("raw", b"[" * 100_000),
    "an error in a body": {"error": {"message": "upstream is busy", "code": 503}},
    "a choice that failed": completion("half", finish_reason="error"),
    "hang": ("hang", 2.0),
}


@pytest.mark.parametrize("fault", PASSING)
def test_passing_faults_are_retried(fault):
    with serve(lambda path, body, number: PASSING[fault] if number < 2 else completion("fine")) as (url, seen):
        start = time.monotonic()
        texts, usage = Client(url, timeout=0.4, retries=4).chat(HELLO)
        assert (texts, usage["retries"], usage["prompt_tokens"], len(seen)) == (["fine"], 2, 5, 3)
        assert 2 * ("retry-after" in fault) * 0.3 < time.monotonic() - start < 5


def test_retries_are_bounded_and_the_servers_words_are_shown():
    answers = {"500: broken for good": ("status", 500, {}, "broken for good"), "no credit": {"error": "no credit"}}
    for words, answer in answers.items():
        with serve(lambda *request, answer=answer: answer) as (url, seen):
            with pytest.raises(ServerError, match=f"{words}.*; gave up after 3 attempts"):
                Client(url, retries=2).chat(HELLO)
            assert len(seen) == 3
    with pytest.raises(ServerError, match="no answer: Failed to establish .*refused; gave up after 2 attempts"):
        Client(url, model="m", retries=1).chat(HELLO)


@pytest.mark.parametrize("status", [301, 400, 401, 402, 403, 404, 405, 413, 422])
def test_what_cannot_succeed_is_not_repeated_and_shows_no_key(status, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-very-secret")
    headers = {"Location": "https://elsewhere/v1"} if status == 301 else {}
    with serve(lambda *request: ("status", status, headers, "no: sk-very-secret")) as (url, seen):
        expected = r"https://elsewhere/v1" if status == 301 else r"no: \[key\]"
        with pytest.raises(InputError, match=rf"{status}: {expected}$") as caught:
            Client(url, api_key_env="TEACHER_KEY").chat(HELLO)
        assert isinstance(caught.value, BadRequest) == (status in (400, 413, 422))
        assert len(seen) == 1 and seen[0][2]["Authorization"] == "Bearer sk-very-secret"


ADDRESSES = ["localhost:8000", "ftp://x/v1", "http://", "http://me:word@x/v1", "http://x:99999/v1", "http://[::1/v1"]
ADDRESSES += ["http://two words/v1", f"http://{'x' * 70}/v1", "http://nowhere.invalid/v1"]


@pytest.mark.parametrize("url", ADDRESSES)
def test_an_address_that_is_none_is_refused_at_once(url):
    with pytest.raises(InputError, match="^[^\n]*$") as caught:
        Client(url, "m").chat(HELLO)
    assert not isinstance(caught.value, ServerError) and "word@" not in str(caught.value)


def test_a_key_that_no_header_can_carry(monkeypatch):
    for key in ("sk-secret\n", "sk secret", "sk-schlüssel"):
        monkeypatch.setenv("TEACHER_KEY", key)
        with pytest.raises(InputError, match=r"\$TEACHER_KEY") as caught:
            Client("http://127.0.0.1:9/v1", "m", "TEACHER_KEY")
        assert "sk-s" not in str(caught.value) and "sk s" not in str(caught.value)


def test_neither_the_proxy_nor_netrc_is_used_for_loopback(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("default login someone password else\n")
    for name, value in {"http_proxy": "http://127.0.0.1:9", "NETRC": str(tmp_path / "netrc"), "KEY": "sk-1"}.items():
        monkeypatch.setenv(name, value)
    with serve(lambda *request: completion("direct")) as (url, seen):
        for host in ("127.0.0.1", "localhost"):
            assert Client(url.replace("127.0.0.1", host), "m", "KEY", retries=0).chat(HELLO)[0] == ["direct"]
            assert seen[-1][2]["Authorization"] == "Bearer sk-1"


def test_a_request_that_the_server_always_fails_at_ends_alone():
    """A content filter that answers without choices would otherwise end the run, each time at the same question."""

    def behave(path, body, number):
        return {"choices": []} if body["messages"][-1]["content"] == "bad" else completion("fine")

    with serve(behave) as (url, _):
        client, bad = Client(url, "m", retries=1), [{"role": "user", "content": "bad"}]
        with pytest.raises(ServerError, match="not in the expected format"):
            client.chat(bad)
        assert client.chat(HELLO)[0] == ["fine"]
        with pytest.raises(BadRequest, match="not in the expected format"):
            client.chat(bad)


def test_an_internal_error_of_one_request_alone_ends_with_it(monkeypatch):
    """Some servers answer 500 where their template fails. While this request is repeated, others are answered."""

    def behave(path, body, number):
        return ("status", 500, {}, "oops") if body["messages"][-1]["content"] == "bad" else completion("fine")

    with serve(behave) as (url, _):
        client, bad = Client(url, "m", retries=2), [{"role": "user", "content": "bad"}]
        monkeypatch.setattr("common.client.time.sleep", lambda seconds: client.chat(HELLO))
        with pytest.raises(BadRequest, match="500: oops; gave up after 3 attempts"):
            client.chat(bad)
        monkeypatch.setattr("common.client.time.sleep", lambda seconds: None)
        with pytest.raises(ServerError, match="500: oops; gave up after 3 attempts"):
            client.chat(bad)


def test_models_may_be_a_bare_list():
    with serve(lambda *request: completion("fine"), model=[{"id": "first"}, {"id": "second"}]) as (url, _):
        assert Client(url).model == "first"


# ------------- What replies look like


def reply(content, finish_reason="stop", **more):
    return {"choices": [{"message": {"role": "assistant", "content": content, **more}, "finish_reason": finish_reason}]}


STOP = ["<end_code>", "\nObservation:"]
REPLIES = {  # name: (answer, text, truncated)
    # Servers that cut a text by UTF-16 units leave such halves, which no file could take.
    "half a surrogate pair": (reply("cut \ud83d", "length"), "cut ?", 1),
    "a stop string left in": (reply("code ```<end_code> and more"), "code ```", 0),
    "a stop string before the limit": (reply("code ```<end_code> and mo", "length"), "code ```", 0),
    "a stop string in the thinking": (reply("<think><end_code></think>x<end_code>"), "<think><end_code></think>x", 0),
    "a refusal": (reply(None, refusal="I cannot help with that."), "", 0),
    "null at the limit": (reply(None, "length"), "", 1),
    "null with tool calls": (reply(None, "tool_calls", tool_calls=[{"id": "1"}]), "", 0),
    "null by a filter": (reply(None, "content_filter"), "", 0),
    "no content": ({"choices": [{"message": {"role": "assistant"}}]}, "", 0),
    "no message, by a filter": ({"choices": [{"finish_reason": "content_filter", "message": None}]}, "", 0),
    "an empty text beside the message": ({"choices": [{"text": "", **reply("5")["choices"][0]}]}, "5", 0),
    "parts": (reply([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}, "!"]), "one two!", 0),
    "a part that thinks": (
        reply([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "5"}]),
        "<think>hm</think>5", 0,
    ),
    "reasoning_content": (reply("\n\n5", reasoning_content="hm"), "<think>hm</think>\n\n5", 0),
    "reasoning": (reply("5", reasoning="hm"), "<think>hm</think>5", 0),
    "both ways": (reply("<think>hm</think>5", reasoning_content="hm"), "<think>hm</think>5", 0),
    "thinking up to the limit": (reply(None, "length", reasoning_content="hm"), "<think>hm", 1),
    "thinking that the template opened": (reply("hm\n</think>\n5"), "hm\n</think>\n5", 0),
    "in Latin-1": (("raw", b'{"choices": [{"text": "caf\xe9"}]}'), "caf\ufffd", 0),
    "status 201": (("status", 201, {}, '{"choices": [{"text": "made"}]}'), "made", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", REPLIES)
def test_replies_that_need_care(name):
    answer, text, truncated = REPLIES[name]
    with serve(lambda *request: answer) as (url, seen):
        texts, usage = Client(url).chat(HELLO, stop=STOP)
        assert (texts, usage["truncated"], usage["prompt_tokens"], len(seen)) == ([text], truncated, 0, 1)


@pytest.mark.parametrize("status, code, words", [(200, 400, "too long"), (403, 403, "flagged")])
def test_one_question_that_is_refused_is_no_reason_to_end(status, code, words):
    """An error inside an answer of status 200 (OpenRouter), and moderation, after the first success."""
    refusal = "status", status, {}, json.dumps({"error": {"code": code, "message": words}})
    with serve(lambda path, body, number: completion("fine") if number == 0 else refusal) as (url, seen):
        client = Client(url)
        assert client.chat(HELLO)[0] == ["fine"]
        with pytest.raises(BadRequest, match=f"{code}: .*{words}"):
            client.chat(HELLO)
        assert len(seen) == 2


@pytest.mark.parametrize("stopped", [reply("<think>say ```"), reply(None, reasoning_content="say ```")])
def test_a_server_that_stops_inside_the_thinking_is_asked_without_stop_strings(stopped):
    full = reply("<think>say ```<end_code> or not?</think>5 ```<end_code> and more")
    with serve(lambda path, body, number: stopped if "stop" in body else full) as (url, seen):
        client = Client(url)
        for _ in range(2):
            assert client.chat(HELLO, stop=STOP)[0] == ["<think>say ```<end_code> or not?</think>5 ```"]
        assert ["stop" in body for _, body, _ in seen] == [True, False, False]


def test_a_server_that_ignores_n_is_asked_n_times_with_other_seeds():
    """Half of a surrogate pair is sent as a question mark."""

    def behave(path, body, number):
        return completion(f"{body['messages'][0]['content']} {body['seed']}")

    with serve(behave) as (url, seen):
        texts, usage = Client(url).chat([{"role": "user", "content": "caf\udce9 é"}], n=3, seed=7, temperature=0.5)
        assert texts == ["caf? é 7", "caf? é 8", "caf? é 9"]
        assert len(seen) == 3 and usage["completion_tokens"] == 6


# ------------- Probes


def refusing(*names, status=400):
    """A server that refuses fields by their names, with the word `unwelcome`."""

    def behave(path, body, number):
        bad = [name for name in names if name in body and (name != "top_p" or body["temperature"] == 0)]
        return ("status", status, {}, f"unwelcome: {bad[0]}") if bad else completion("fine")

    return behave


FIELDS = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 64, "stop": STOP}
REFUSED = [
    ([], 422), (["seed"], 422), (["max_tokens"], 400),
    (["seed", "stop", "n", "max_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "chat_template_kwargs"], 400),
]  # fmt: skip


@pytest.mark.parametrize("names, status", REFUSED)
def test_the_probe_finds_the_fields_that_a_server_refuses_and_does_without(names, status, capsys):
    with serve(refusing(*names, status=status)) as (url, seen):
        served = Served(Client(url), template_options={"enable_thinking": False}, **FIELDS)
        served.probe(n=3)
        note = capsys.readouterr().err
        assert all(f"{name} ({status}: unwelcome: {name})" in note for name in names)
        assert note.count("\n") == bool(names)
        seen.clear()
        assert served.answer(SimpleNamespace(messages=HELLO, opening=""), collections.Counter(), 3, 7) == ["fine"] * 3
    sent = {"n": 3, "seed": 7, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    sent |= {**FIELDS, "chat_template_kwargs": {"enable_thinking": False}}
    sent = {name: value for name, value in sent.items() if name not in names}
    if "max_tokens" in names:
        sent["max_completion_tokens"] = 64
    assert {name: seen[0][1][name] for name in seen[0][1].keys() - {"model", "messages"}} == sent


def test_what_would_change_the_answers_is_not_left_out():
    with serve(refusing("temperature")) as (url, _):
        with pytest.raises(InputError, match="temperature 0.0 .400: unwelcome: temperature.: name another"):
            Served(Client(url), **FIELDS).probe()
        Served(Client(url), **FIELDS | {"temperature": 1.0}).probe()  # what such a server does anyway
    with serve(lambda *request: ("status", 400, {}, "no such model: m")) as (url, _):
        with pytest.raises(InputError, match="refuses even a short request .400: no such model: m"):
            Served(Client(url, model="m"), **FIELDS).probe()


def continuing(flag=True, closing=9, repeats=False, usage=True, strict=False):
    """A server's prompt grows by the tokens of `closing` unless it continues the last message, as `flag` (if it
    minds the field at all) or by itself (closing=0). repeats: its reply begins with the message that it continues."""

    def behave(path, body, number):
        last = body["messages"][-1]
        if strict and "continue_final_message" in body:
            return ("status", 422, {}, "unknown field")
        answer = completion(" 5" if not (repeats and last["role"] == "assistant") else last["content"] + " 5")
        extra = 0 if flag and body.get("continue_final_message") else closing
        extra *= last["role"] == "assistant"
        answer["usage"]["prompt_tokens"] = sum(len(m["content"].split()) for m in body["messages"]) + extra
        return answer if usage else {"choices": answer["choices"]}

    return behave


def test_the_probe_tells_a_server_that_continues_from_those_that_do_not():
    turn = SimpleNamespace(messages=HELLO, opening="Thought: I need")
    by_itself = {"flag": False, "closing": 0}
    for options in ({}, by_itself, by_itself | {"repeats": True}, by_itself | {"strict": True}):
        with serve(continuing(**options)) as (url, seen):
            served = Served(Client(url))
            served.probe(opening=True)
            assert served.answer(turn, collections.Counter()) == [" 5"]
            assert seen[-1][1]["messages"][-1]["content"] == "Thought: I need"
            assert ("continue_final_message" in seen[-1][1]) != ("strict" in options)
    refused = {"ignores continue_final_message": {"flag": False}, "422: unknown field": {"strict": True}}
    for words, options in (refused | {"sends no token counts": {"usage": False}}).items():
        with serve(continuing(**options)) as (url, _):
            with pytest.raises(InputError, match=f"{words}.*: give --prefix-tokenizer"):
                Served(Client(url)).probe(opening=True)


# ------------- Chats that are rendered here


@pytest.mark.parametrize("own_bos", [False, True])
def test_a_rendered_chat_begins_once(tiny_tokenizer, own_bos):
    """The template writes <bos>; where the server's tokenizer does so too, the text is sent without."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}{{ date_string }}" + tokenizer.chat_template
    if own_bos:
        ids = [("<|endoftext|>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", None, ids)
    with serve(lambda *request: {"choices": [{"text": "lo"}]}) as (url, seen):
        served = Served(Client(url), tokenizer, {"date_string": "today"})
        assert served.answer(SimpleNamespace(messages=HELLO, opening="Hel"), collections.Counter()) == ["lo"]
    ids = tokenizer(seen[0][1]["prompt"]).input_ids
    assert tokenizer.decode(ids) == ("<|endoftext|>today<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nHel")
    assert "chat_template_kwargs" not in seen[0][1]


def test_a_tokenizer_that_cannot_render_is_one_line(tiny_tokenizer, tmp_path):
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    with serve(lambda *request: completion("hello")) as (url, _):
        names = {"^--prefix-tokenizer .*template": bare, "^model .*no such folder": str(tmp_path / "no")}
        for message, tokenizer in names.items():
            with pytest.raises(InputError, match=f"{message}[^\n]*$"):
                Served(Client(url), tokenizer).probe(opening=True)


# ------------- Many at once


def test_in_parallel_gives_every_result_and_raises_the_first_error_after_those_under_way():
    assert sorted(in_parallel(lambda x: x * x, range(1, 50), 7)) == [x * x for x in range(1, 50)]
    together, results = threading.Barrier(4), []

    def work(x):
        if 20 <= x < 24:
            together.wait(10)
            time.sleep(0.5 if x > 20 else 0)
        return 1 // (20 - x) if x == 20 else x

    with pytest.raises(ZeroDivisionError):
        for result in in_parallel(work, range(4_000), 4):
            results.append(result)
    assert sorted(results) == [*range(20), 21, 22, 23]


# ------------- The judge

VERDICTS = {
    "correct": [
        '{"verdict": "correct"}', "Correct.", "Correct", "**correct**", "\"correct\"", "Verdict: **Correct**",
        '{"verdict":"correct","reason":"the same {name},\n\tin lines"}', '{"reason": "a {b}", "verdict": "Correct"}',
        'Both name her.\n```json\n{"verdict": "correct"}\n```\nI hope this helps.', "{'verdict': 'correct'}",
        "Final verdict: correct",
        "**Correct**\n\nBoth texts name the same town.", "The gold answer is Oslo.\nVerdict: correct",
        '<think>{"verdict": "incorrect"}? No.</think>\n{"verdict": "correct"}', "<thinking>?</thinking> Correct.",
    ],
    "incorrect": ['```json\n{"verdict": "incorrect"}\n```', "incorrect", '{"verdict": "INCORRECT", "sure": 1}'],
    None: [
        "", "not correct", '{"verdict": "maybe"}', '["correct"]', '{"verdict": ["correct"]}', '{"verdict": null}',
        "The answer is incorrect", '<think>{"verdict": "correct"}', '{"verdict": "correct or incorrect"}',
        'It says {"verdict": "correct"}, but: {"verdict": "incorrect"}', "correct or incorrect", "correct\nincorrect",
        "Is it\ncorrect?\nNo.",
        "Correct answer: Oslo. The prediction is incorrect.",
    ],
}  # fmt: skip


@pytest.mark.parametrize("verdict", VERDICTS)
def test_verdicts_are_read_strictly(verdict):
    assert {text: read_verdict(text) for text in VERDICTS[verdict]} == dict.fromkeys(VERDICTS[verdict], verdict)


def test_the_judge_is_probed_first_and_asked_once(tmp_path):
    def behave(path, body, number):
        text = body["messages"][0]["content"]
        if "temperature" in body:  # as reasoning models do
            return ("status", 400, {}, "temperature")
        if "too long" in text:
            return ("status", 400, {}, "too long")
        return completion("I cannot say." if "Oslo" in text else '{"verdict": "correct"}')

    with Journal(tmp_path / "judge.0.jsonl") as journal, Journal(tmp_path / "judge.1.jsonl") as other:
        with serve(behave) as (url, seen):
            judge = Judge(Client(url), Prompts(), journal)
            asked = [("Where?", ["Rome"], text) for text in ("Roma", "Roma", "Oslo", "Oslo", "too long")]
            assert [judge(*question) for question in asked] == [True, True, None, None, None]
            assert sum("Say hello" not in str(body) for _, body, _ in seen) == 3
            seen.clear()
            assert Judge(Client(url), Prompts(), other)(*asked[0]) and not seen  # the verdict of another process
            assert [row["verdict"] for row in journal.rows] == ["correct"] and not other.rows
        with serve(lambda *request: ("status", 400, {}, "closed")) as (url, _):
            with pytest.raises(InputError, match="refuses even a short request .400: closed"):
                Judge(Client(url), Prompts(), other)("Where?", ["Rome"], "Bergen")
