"""The client against a server that misbehaves in every way that servers do."""

import collections
import copy
import time

import pytest
from tokenizers.processors import TemplateProcessing

import client as client_module
from agent_distill import Turn
from client import BadRequest, Client, ServerError, Speaker, cut_at_stop, in_parallel
from common import InputError
from servers import completion, serve
from tasks import Prompts

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(client_module, "BACKOFF", 0.01)
    monkeypatch.setattr(client_module, "DEAD_SECONDS", 0.2)


PASSING = {
    "429": ("status", 429, {}, "slow down"),
    "429 retry-after": ("status", 429, {"Retry-After": "0.3"}, "slow down"),
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
    "no usage": {"choices": [{"text": "fine"}], "usage": "much"},
    "nested too deep": ("raw", b"[" * 100_000),
    "null content": {"choices": [{"message": {"role": "assistant", "content": None}}]},
    "hang": ("hang", 2.0),
    "drip": ("drip", 0.1),
}


@pytest.mark.parametrize("fault", PASSING)
def test_passing_faults_are_retried(fault):
    with serve(lambda path, body, number: PASSING[fault] if number < 2 else completion("fine")) as (url, seen):
        asker = Client([url], timeout=0.4, retries=4)
        start = time.monotonic()
        reply = asker.chat(HELLO)
        assert (reply.texts, reply.usage["retries"], len(seen)) == (["fine"], 2, 3)
        assert reply.usage["prompt_tokens"] == 5 and reply.model == "served-name"
        if "retry-after" in fault:
            assert time.monotonic() - start > 0.6
        assert time.monotonic() - start < 3


def test_retries_are_bounded():
    with serve(lambda *request: ("status", 500, {}, "broken for good")) as (url, seen):
        with pytest.raises(ServerError, match="500: broken for good; gave up after 3 attempts"):
            Client([url], retries=2).chat(HELLO)
        assert len(seen) == 3


def test_connection_refused_ends_as_a_server_error():
    with serve(lambda *request: completion("fine")) as (url, _):
        pass
    with pytest.raises(ServerError, match="connection failed"):
        Client([url], model="m", retries=1).chat(HELLO)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_hopeless_statuses_stop_at_once_and_show_no_key(status, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-very-secret")
    with serve(lambda *request: ("status", status, {}, "bad key sk-very-secret")) as (url, seen):
        with pytest.raises(InputError) as caught:
            Client([url], api_key_env="TEACHER_KEY").chat(HELLO)
        assert seen[0][2]["Authorization"] == "Bearer sk-very-secret"
        assert len(seen) == 1 and str(status) in str(caught.value)
        assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_the_key_is_cut_out_of_what_a_server_says(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with serve(lambda *request: ("status", 400, {}, "no: sk-very-secret")) as (url, _):
        with pytest.raises(BadRequest, match=r"no: \[key\]"):
            Client([url]).chat(HELLO)


def test_a_bad_request_is_not_repeated():
    with serve(lambda *request: ("status", 400, {}, "context length exceeded")) as (url, seen):
        with pytest.raises(BadRequest, match="context length"):
            Client([url]).chat(HELLO)
        assert len(seen) == 1


def test_a_server_that_ignores_n_is_asked_n_times_with_other_seeds():
    with serve(lambda path, body, number: completion(f"seed {body['seed']}")) as (url, seen):
        reply = Client([url]).chat(HELLO, n=3, seed=7, temperature=0.5)
        assert reply.texts == ["seed 7", "seed 8", "seed 9"]
        assert reply.usage["requests"] == 3 and reply.usage["completion_tokens"] == 6


def test_half_a_surrogate_pair_and_a_truncated_text_are_answers():
    """Servers that cut a text by UTF-16 units leave such halves, which no file could take."""
    with serve(lambda *request: completion("cut \ud83d", finish_reason="length")) as (url, _):
        reply = Client([url]).chat(HELLO, n=2)
        assert reply.texts == ["cut ?", "cut ?"] and reply.usage["truncated"] == 2


def test_stop_strings_left_in_the_text_are_cut():
    with serve(lambda *request: completion("code ```<end_code> and Observation: made up")) as (url, _):
        assert Client([url]).chat(HELLO, stop=["<end_code>", "Observation:"]).texts == ["code ```"]
    assert cut_at_stop("abc", []) == "abc"


def test_a_refusal_is_an_answer_without_text():
    refusal = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
    with serve(lambda *request: {"choices": [{"message": refusal, "finish_reason": "stop"}]}) as (url, seen):
        assert Client([url]).chat(HELLO).texts == [""] and len(seen) == 1


def test_a_dead_endpoint_is_left_out_and_tried_again():
    alive = {"second": False}

    def second(*request):
        return completion("second") if alive["second"] else ("reset",)

    with serve(lambda *r: completion("first")) as (url1, seen1), serve(second) as (url2, seen2):
        asker = Client([url2, url1])
        assert [asker.chat(HELLO).texts[0] for _ in range(5)] == ["first"] * 5
        assert len(seen2) == 1  # asked once, then left alone
        alive["second"] = True
        time.sleep(0.25)
        asker.endpoints[1].busy = 1  # the other one is the less busy now
        assert asker.chat(HELLO).texts == ["second"]


def test_the_first_endpoint_may_be_dead_at_the_start():
    with serve(lambda *r: completion("first")) as (dead, _):
        pass
    with serve(lambda *r: completion("second")) as (url, _):
        assert Client([dead, url]).chat(HELLO).texts == ["second"]


def test_least_busy_first():
    with serve(lambda *r: completion("a")) as (url1, seen1), serve(lambda *r: completion("b")) as (url2, seen2):
        asker = Client([url1, url2])
        for endpoint, busy in zip(asker.endpoints, (3, 1), strict=True):
            endpoint.busy = busy
        assert asker.chat(HELLO).texts == ["b"] and not seen1


def test_a_server_that_restarts_in_the_middle():
    with serve(lambda *r: completion("before")) as (url, _):
        asker = Client([url], retries=10)
        assert asker.chat(HELLO).texts == ["before"]
    port = int(url.rsplit(":", 1)[1].split("/")[0])
    import threading

    answers = []
    thread = threading.Thread(target=lambda: answers.append(asker.chat(HELLO).texts[0]))
    thread.start()
    time.sleep(0.2)
    with serve(lambda *r: completion("after"), port=port):
        thread.join(20)
    assert answers == ["after"]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1"])
def test_an_address_that_is_none(url):
    with pytest.raises(InputError, match="--url"):
        Client([url])


def vllm(path, body, number):
    """Closes the assistant's turn and opens another unless told to continue, and counts tokens accordingly."""
    prompt = sum(len(m["content"]) for m in body["messages"])
    answer = completion("lo")
    answer["usage"]["prompt_tokens"] = prompt + (0 if body.get("continue_final_message") else 9)
    return answer


def test_the_probe_tells_a_server_that_continues_from_those_that_do_not():
    with serve(vllm) as (url, _):
        assert Speaker(Client([url]), Prompts()).find_mode() == "continue"
    with serve(lambda *request: completion("Hello!")) as (url, _):
        with pytest.raises(InputError, match="ignores continue_final_message.*--prefix-mode"):
            Speaker(Client([url]), Prompts()).find_mode()
    with serve(lambda path, body, n: ("status", 422, {}, "unknown field")) as (url, _):
        with pytest.raises(InputError, match="does not continue.*unknown field.*--prefix-mode"):
            Speaker(Client([url]), Prompts()).find_mode()


def sampler(path, body, number):
    """As `transformers serve`: one choice, and another one for another seed only if do_sample is said."""
    told = body.get("temperature") and "do_sample" in body.get("generation_config", "")
    return completion(f"seed {body['seed']}" if told else "greedy")


def test_the_probe_makes_a_server_sample(capsys):
    with serve(sampler) as (url, _):
        speaker = Speaker(Client([url]), Prompts(), temperature=0.5)
        speaker.probe()
        answers = speaker.answer(Turn(HELLO), collections.Counter(), n=2, seed=7)
        assert answers == ["seed 7", "seed 8"] and not capsys.readouterr().err
    with serve(lambda path, body, number: completion(f"number {number}")) as (url, seen):
        speaker = Speaker(Client([url]), Prompts(), temperature=0.5)
        speaker.probe()
        assert speaker.extra == {} and not any("generation_config" in body for _, body, _ in seen)
    with serve(lambda *request: completion("ever the same")) as (url, _):
        Speaker(Client([url]), Prompts(), temperature=0.5).probe()
        assert "may ignore the temperature" in capsys.readouterr().err


def test_a_server_that_refuses_everything_is_refused():
    with serve(lambda *request: ("status", 400, {}, "no such model: m")) as (url, seen):
        with pytest.raises(InputError, match="refuses even a short request .400: no such model: m"):
            Speaker(Client([url], model="m"), Prompts()).probe()
        assert len(seen) == 1


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
        speaker = Speaker(Client([url]), Prompts(), "completions", tokenizer)
        assert speaker.answer(Turn(HELLO, "Hel"), collections.Counter()) == ["lo"]
    ids = tokenizer(seen[0][1]["prompt"]).input_ids
    assert tokenizer.decode(ids) == ("<|endoftext|><|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nHel")


@pytest.mark.parametrize("name", ["nowhere", "no template"])
def test_a_tokenizer_that_cannot_render_is_one_line(tiny_tokenizer, tmp_path, name):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "no template")
    with serve(lambda *request: completion("hello")) as (url, _):
        with pytest.raises(InputError, match=r"^--tokenizer \S*(nowhere|no template): [^\n]*$"):
            Speaker(Client([url]), Prompts(), "completions", str(tmp_path / name)).probe(opening=True)


def test_in_parallel_gives_every_result_and_raises_the_first_error():
    assert sorted(in_parallel(lambda x: x * x, range(1, 50), 7)) == [x * x for x in range(1, 50)]
    assert list(in_parallel(lambda x: None, [None, 1, 2], 2)) == [None] * 3

    def fail(x):
        if x == 20:
            raise InputError("the twentieth")
        return x

    results = []
    with pytest.raises(InputError, match="twentieth"):
        for result in in_parallel(fail, range(1, 100_000), 4):
            results.append(result)
    assert len(results) < 50_000
