"""Options, one-line errors, files that a crash cannot harm, tasks.  `make test ROOM=common`"""

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from common import InputError, Journal, http_session, keep_config, load_tasks, read_jsonl, replace_file, serve_json

ROOT = Path(__file__).parent.parent


def test_journal_drops_a_torn_line_and_names_a_broken_one(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": 3')
    with Journal(path) as journal:
        assert journal.rows == [{"a": 1}, {"a": 2}]
        journal.append({"a": "ü"})
    assert path.read_text(encoding="utf-8") == '{"a": 1}\n{"a": 2}\n{"a": "ü"}\n'
    path.write_text('{"a": 1}\nnot json\n{"a": 2}\n')
    with pytest.raises(InputError, match=r"j\.jsonl:2: not JSON"):
        Journal(path)


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
    with replace_file(path) as file:
        file.write("new")
    assert path.read_text() == "new"


def test_read_jsonl_names_the_file_and_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n[1]\n')
    rows = read_jsonl(tmp_path / "a.jsonl")
    assert [next(rows), next(rows)] == [(1, {"a": 1}), (3, {"a": 2})]
    with pytest.raises(InputError, match=r"a\.jsonl:4: a JSON object was expected, not list"):
        next(rows)
    with pytest.raises(InputError, match="nowhere: No such file"):
        list(read_jsonl(tmp_path / "nowhere"))


COMMAND = """
    from dataclasses import dataclass
    from typing import Literal
    from common import REQUIRED, InputError, option, run_command_line

    @dataclass(kw_only=True)
    class Config:
        data: list[str] = option(REQUIRED, "files, 100% of them", positional=True)
        rate: float = option(0.5, "a rate", above=0)
        limit: int | None = option(None, "a limit", above=0)
        kind: Literal["a", "b"] = option("a", "a kind")
        url: list[str] = option([], "servers")
        quiet: bool = option(False, "hush")

    def go(config):
        '''Go 100%.'''
        if config.limit == 13:
            raise InputError("--limit 13: an unlucky number")
        print(config)

    run_command_line("What it is.", {"go": (Config, go)}, default="go")
"""


@pytest.mark.parametrize(
    "arguments, status, shown",
    [
        ("x y --rate 2 --limit 3 --url u v", 0, "['x', 'y'], rate=2.0, limit=3, kind='a', url=['u', 'v']"),
        ("x --quiet", 0, "quiet=True"),
        ("go x --no-quiet", 0, "rate=0.5, limit=None"),
        ("--help", 0, "the default command"),
        ("go --help", 0, "a rate (default: 0.5)"),
        ("x --limit 13", 2, "error: --limit 13: an unlucky number"),
        ("x --rate 0", 2, "error: --rate 0.0: must be above 0"),
        ("x --rate nan", 2, "error: --rate nan: must be above 0"),
        ("x --limit -1", 2, "error: --limit -1: must be above 0"),
        ("x --lim 3", 2, "error: unrecognized arguments: --lim 3"),
        ("x --kind c", 2, "invalid choice: 'c'"),
        ("", 2, "error: the following arguments are required: data"),
    ],
)  # fmt: skip
def test_command_line(arguments, status, shown):
    command = [sys.executable, "-c", textwrap.dedent(COMMAND), *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, shown in done.stdout + done.stderr) == (status, True), done.stderr
    if status == 2:
        assert done.stderr.count("\n") == 1


def test_config_of_a_run_is_kept(tmp_path):
    path = tmp_path / "run.json"
    keep_config(path, {"seed": 0, "quiet": False})
    keep_config(path, {"seed": 0, "quiet": True}, may_change=["quiet"])
    assert json.loads(path.read_text()) == {"seed": 0, "quiet": True}
    with pytest.raises(InputError, match="made with seed 0, not 1"):
        keep_config(path, {"seed": 1, "quiet": True})
    keep_config(path, {"seed": 1}, binding=False)
    assert json.loads(path.read_text())["seed"] == 1


def test_serve_json_answers_every_request(capsys):
    def answer(method, path, body):
        if path == "/bad":
            raise InputError("the field x is missing")
        if path == "/broken":
            raise KeyError("x")
        return 200, {"method": method, "path": path, "body": body}

    server = serve_json(answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    with http_session(retries=0) as session:
        assert session.get(url + "/a").json() == {"method": "GET", "path": "/a", "body": None}
        for path, error in (("/bad", (400, "the field x is missing")), ("/broken", (500, "KeyError: 'x'"))):
            answered = session.post(url + path, json={})
            assert (answered.status_code, answered.json()["error"]) == error
        assert session.post(url + "/b", data="[1").status_code == 400
        assert session.post(url + "/b", json={"x": "é"}).json()["body"] == {"x": "é"}
    server.shutdown()
    server.server_close()
    assert "Traceback" in capsys.readouterr().err


def test_tasks_from_jsonl_and_from_published_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "question": "q", "answer": "a", "kind": "math"}\n')
    (tmp_path / "b.json").write_text(
        json.dumps({"examples": [{"id": i, "question": "q", "answer": "a"} for i in "xy"]})
    )
    rows = load_tasks([tmp_path / "a.jsonl", tmp_path / "b.json"], kind="fact", limit=1)
    assert [(row["task"], row["id"], row["kind"]) for row in rows] == [("a", "1", "math"), ("b", "x", "fact")]


BAD_TASKS = {
    "": "a.jsonl: no tasks in it",
    '{"id": 1, "question": "q", "kind": "fact"}': "a.jsonl:1: a task needs the field 'answer'",
    '{"id": 1, "question": "q", "answer": "a"}': "the kind must be stated",
    '{"id": 1, "question": "q", "answer": "a", "kind": "fact"}\n' * 2: "a.jsonl:2: task a has id '1' twice",
}


@pytest.mark.parametrize("text", BAD_TASKS)
def test_bad_tasks_are_refused_with_their_place(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InputError, match=BAD_TASKS[text]):
        load_tasks([tmp_path / "a.jsonl"])
