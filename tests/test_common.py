"""Options, one-line errors, files that a crash cannot harm, tasks.  `make test ROOM=common`"""

import dataclasses
import json
import os
import shlex
import sys
from typing import Literal

import pytest
import requests

import agent_distill
from common import (
    REQUIRED,
    InputError,
    Journal,
    keep_config,
    load_tasks,
    option,
    read_jsonl,
    read_text,
    replace_file,
    resolve,
    run_command_line,
    serve_json,
    source_hash,
    write_json,
)
from conftest import write_jsonl
from servers import background

JOURNALS = [  # what is there, and what of it is kept when a row is appended
    ('{"a": 1}\n{"a": 2}\n{"a": 3', '{"a": 1}\n{"a": 2}\n'),
    ('{"a": 1}\n{"a": 2}', '{"a": 1}\n{"a": 2}\n'),  # whole, but for the line break
    ("", ""),
]


@pytest.mark.parametrize("before, kept", JOURNALS)
def test_journal_drops_a_torn_line_and_writes_half_of_a_surrogate_pair(tmp_path, before, kept):
    path = tmp_path / "j.jsonl"
    path.write_text(before)
    with Journal(path, {"a": (int, str)}) as journal:
        assert journal.rows == [json.loads(line) for line in kept.splitlines()]
        journal.append({"a": "ü\ud83d"})
    assert path.read_text(encoding="utf-8") == kept + '{"a": "ü?"}\n'


FOREIGN = ['{"examples": []}', '{"a": 1}\n{"b": 2}\n', '{\n "a": 1\n}', "[1]", "notes", '{"a": "1"}\n']


@pytest.mark.parametrize("text", FOREIGN)
def test_journal_leaves_a_foreign_file_as_it_is(tmp_path, text):
    path = tmp_path / "j"
    path.write_text(text)
    with pytest.raises(InputError, match=r"^\S*j(:\d: |: not a file that this command wrote)"):
        Journal(path, {"a": int})
    assert path.read_text() == text


def test_two_processes_cannot_write_one_journal(tmp_path):
    """test_collect.py kills writers at random moments, and fills the disk."""
    with Journal(tmp_path / "j"), pytest.raises(InputError, match="another process"):
        Journal(tmp_path / "j")


def test_replace_file_shows_all_or_nothing(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(RuntimeError), replace_file(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]
    write_json(path, "new\ud83d")
    assert path.read_text() == '"new?"\n'


def test_read_jsonl_names_the_file_and_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n[1')
    assert list(read_jsonl(tmp_path / "a.jsonl", growing=True)) == [(1, {"a": 1}), (3, {"a": 2})]
    with pytest.raises(InputError, match=r"a\.jsonl:4: not JSON"):
        list(read_jsonl(tmp_path / "a.jsonl"))
    (tmp_path / "latin").write_bytes("déjà".encode("latin-1"))
    with pytest.raises(InputError, match="latin: not UTF-8 text"):
        read_text(tmp_path / "latin")


@dataclasses.dataclass(kw_only=True)
class Config:
    data: list[str] = option(REQUIRED, "files, 100% of them", positional=True)
    rate: float = option(0.5, "a rate", above=0)
    limit: int | None = option(None, "a limit", above=0)
    share: float = option(0.5, "a share", at_least=0, at_most=1)
    seed: int = option(0, "a seed")
    kind: Literal["a", "b"] = option("a", "a kind")
    url: list[str] = option([], "servers")
    quiet: bool = option(False, "hush")


def go(config):
    """Go 100%."""
    if config.limit == 13:
        raise InputError("--limit 13: an unlucky number")
    print(config, open(config.data[0]).name)


@pytest.mark.parametrize(
    "arguments, status, shown",
    [
        (". --rate 2 --limit 3 --url u v", 0, "rate=2.0, limit=3, share=0.5, seed=0, kind='a', url=['u', 'v']"),
        (". --quiet", 0, "quiet=True"),
        ("go . --no-quiet", 0, "rate=0.5, limit=None"),
        ("--help", 0, "the default command"),
        ("go --help", 0, "a rate (default: 0.5)"),
        (". --limit 13", 2, "error: --limit 13: an unlucky number"),
        (". --url u ''", 2, "error: --url: the text is empty"),
        (". --rate nan", 2, "error: --rate nan: must be above 0"),
        (". --rate inf", 2, "error: --rate inf: must be at most"),
        (". --share 1.5", 2, "error: --share 1.5: must be at most 1"),
        (". --share -1", 2, "error: --share -1.0: must be at least 0"),
        ("nowhere", 2, "error: [Errno 2] No such file or directory: 'nowhere'"),
        (". --lim 3", 2, "error: unrecognized arguments: --lim 3"),
        (". --kind c", 2, "invalid choice: 'c'"),
        ("", 2, "error: the following arguments are required: data"),
    ],
)  # fmt: skip
def test_command_line(arguments, status, shown, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "_exit", sys.exit)  # the real exit: test_collect.py
    arguments = arguments.replace(". ", f"{__file__} ")
    with pytest.raises(SystemExit) as exit:
        run_command_line("What it is.", {"go": (Config, go)}, "go", shlex.split(arguments))
    out, err = capsys.readouterr()
    assert (exit.value.code, shown in out + err, err.count("\n")) == (status, True, status // 2)


@dataclasses.dataclass(kw_only=True)
class Settings:
    seed: int = option(0, "a seed")
    quiet: bool = option(False, "hush", changes_results=False)


def test_config_of_a_run_is_kept(tmp_path):
    path = tmp_path / "run.json"
    keep_config(path, Settings(), model="m", sizes=(1, 2))
    keep_config(path, Settings(quiet=True), model="m", sizes=(1, 2))
    assert json.loads(path.read_text()) == {"seed": 0, "quiet": True, "model": "m", "sizes": [1, 2]}
    with pytest.raises(InputError, match="made with seed 0, not 1"):
        keep_config(path, Settings(seed=1), model="m")
    with pytest.raises(InputError, match="made with model m, not n"):
        keep_config(path, Settings(), model="n")
    keep_config(path, Settings(seed=1), binding=False)
    assert json.loads(path.read_text())["seed"] == 1


def vote(actions, observations, rng):
    return 0


FUNCTIONS = {
    "nowhere.vote": "--choose nowhere.vote: ModuleNotFoundError",
    "math.vote": "--choose math.vote: AttributeError",
    "math.pi": "not a function of a Python file",
    "math.hypot": "not a function of a Python file",
    "shutil.disk_usage": r"it is called with \(actions, observations, rng\)",
}


def test_a_function_named_on_the_command_line_is_checked():
    for dotted, message in FUNCTIONS.items():
        with pytest.raises(InputError, match=message):
            resolve(dotted, vote, "--choose")
    assert resolve("agent_distill.choose", vote, "--choose") is agent_distill.choose
    assert source_hash(vote) == source_hash(test_serve_json_answers_every_request) != source_hash(resolve)


def test_serve_json_answers_every_request(capsys):
    def answer(method, path, body):
        if path == "/bad":
            raise InputError("the field x is missing")
        if path == "/broken":
            raise KeyError("x")
        return 200, {"method": method, "path": path, "body": body}

    with background(serve_json(answer)) as url, requests.Session() as session:
        assert session.get(url + "/a").json() == {"method": "GET", "path": "/a", "body": None}
        for path, error in (("/bad", (400, "the field x is missing")), ("/broken", (500, "KeyError: 'x'"))):
            answered = session.post(url + path, json={})
            assert (answered.status_code, answered.json()["error"]) == error
        assert session.post(url + "/b", data="[1").status_code == 400
        assert session.post(url + "/b", json={"x": "é"}).json()["body"] == {"x": "é"}
    assert "Traceback" in capsys.readouterr().err


def test_tasks_from_jsonl_and_from_published_files(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [TASK | {"kind": "math"}])
    write_jsonl(tmp_path / "b.json", [{"examples": [{"id": i, "question": "q", "answer": "a"} for i in "xy"]}])
    rows = load_tasks([tmp_path / "a.jsonl", tmp_path / "b.json"], kind="fact", limit=1)
    assert [(row["task"], row["id"], row["kind"]) for row in rows] == [("a", "1", "math"), ("b", "x", "fact")]


TASK = {"id": 1, "question": "q", "answer": "a", "kind": "fact"}
ANSWERS = [
    ({"answer": "a", "aliases": None}, ("a", [])),
    ({"answer": "a", "aliases": "Fab Four"}, ("a", ["Fab Four"])),
    ({"answer": ["a", "b"], "aliases": ["c"]}, ("a", ["b", "c"])),
    ({"answer": 7}, (7, [])),
    ({"answer": [1, -2], "kind": "math"}, ([1, -2], [])),
    ({"answer": "\ud83d"}, ("?", [])),
]


@pytest.mark.parametrize("fields, expected", ANSWERS)
def test_answers_and_aliases_of_a_task(tmp_path, fields, expected):
    [task] = load_tasks([write_jsonl(tmp_path / "a.jsonl", [TASK | fields])])
    assert (task["answer"], task["aliases"]) == expected


BAD_TASKS = [
    ([], "a.jsonl: no tasks in it"),
    ([TASK | {"answer": []}], "a.jsonl:1: the field 'answer'"),
    ([TASK | {"answer": {"value": 1}}], "a.jsonl:1: the field 'answer'"),
    ([TASK | {"question": " "}], "a.jsonl:1: the field 'question'"),
    ([TASK | {"task": ["t"]}], "a.jsonl:1: the field 'task'"),
    ([TASK | {"kind": None}], "a.jsonl:1: the kind must be stated"),
    ([{"question": "q"}], "a.jsonl:1: the field 'id'"),
    (["[" * 100_000], "a.jsonl:1: not JSON"),
    ([TASK, TASK], "a.jsonl:2: task a has id '1' twice"),
]


@pytest.mark.parametrize("rows, message", BAD_TASKS)
def test_bad_tasks_are_refused_with_their_place(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        load_tasks([write_jsonl(tmp_path / "a.jsonl", rows)])


def test_a_file_of_examples_that_is_none_is_one_line(tmp_path):
    for text, message in ((b'{"examples": [1]}', "'examples'"), (b"[]", "not list"), (b'{"a": "\xe9"}', "not JSON")):
        (tmp_path / "a.json").write_bytes(text)
        with pytest.raises(InputError, match=f"a.json: .*{message}"):
            load_tasks([tmp_path / "a.json"])
