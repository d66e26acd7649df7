"""Downloads from a real server that breaks off, lies, cannot resume, goes away; kills, full disks, wrong files."""

import contextlib
import hashlib
import http.server
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import dense
import rehearsal
import report
import sources
from common import InputError
from sources import BENCHMARKS, SOURCES, DownloadConfig, Table, download

ROOT = Path(__file__).parent.parent
CONTENT = random.Random(0).randbytes(3_000_000)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT at every path; server.fault(number, first byte asked for) names what goes wrong."""

    def do_GET(self):
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first, number = int(asked[1]) if asked else 0, len(self.server.seen)
        self.server.seen.append((self.path, first, dict(self.headers)))
        fault = self.server.fault(number, first)
        if isinstance(fault, int):
            return self.answer(fault, b"")
        if fault == "no range":
            return self.answer(200, CONTENT)
        if fault == "another file":
            return self.answer(200, b"<html>")
        content = CONTENT[first:]
        if fault == "damaged":
            content = bytes([content[0] ^ 1]) + content[1:]
        if asked and not content:
            return self.answer(416, b"", f"bytes */{len(CONTENT)}")
        span = f"bytes {first}-{len(CONTENT) - 1}/{len(CONTENT)}" if asked else None
        self.answer(206 if asked else 200, content, span, fault)

    def answer(self, status, content, span=None, fault=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()
        with contextlib.suppress(OSError):
            if fault == "cut":
                self.wfile.write(content[:700_000])
            elif fault == "drip":
                for start in range(0, len(content), 50_000):
                    self.wfile.write(content[start : start + 50_000])
                    time.sleep(0.02)
            else:
                self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve(fault=lambda number, first: None, port=0):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads, server.fault, server.seen = True, fault, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(sources, "BACKOFF", 0.01)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def write_table(tmp_path, server, files=None, **row):
    files = {"file.bin": [len(CONTENT), hashlib.sha256(CONTENT).hexdigest()]} if files is None else files
    row = {"repository": "a/b", "form": "datasets", "about": "", "revision": "r", "files": files} | row
    url = server if isinstance(server, str) else server.url
    table = {"hosts": {"hub": url, "github": url}, "sources": {"one": row}}
    (tmp_path / "sources.json").write_text(json.dumps(table))
    return str(tmp_path / "sources.json")


def fetch(tmp_path, server, retries=3, mirror=(), **table):
    path = write_table(tmp_path, server, **table)
    config = {"names": ["one"], "sources": path, "to": str(tmp_path), "retries": retries, "mirror": list(mirror)}
    download(DownloadConfig(**config, timeout=5.0, quiet=True))
    return tmp_path / "download" / "a" / "b" / "file.bin"


def files_of(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.name not in ("sources.json", ".sources.lock"))


# The table


def test_the_table_is_whole():
    tests = {task: kind for path, ((task, kind, _), *_) in BENCHMARKS.items() if "/test/" in path}
    assert tests == {task: kind for kind, tasks in report.TASKS.items() for task in tasks}
    assert len(BENCHMARKS) == 11
    for source in SOURCES.values():
        assert source.files or source.whole
        assert source.revision in (None, "main") or re.fullmatch(r"[0-9a-f]{40}", source.revision)
        assert all(size > 0 and re.fullmatch(r"[0-9a-f]{64}", sha256) for size, sha256 in source.files.values())
    header, dimensions = 45, 768  # the two parts are a flat index of Wikipedia's passages, to the byte
    parts = sum(size for size, _ in SOURCES["e5-index"].files.values())
    assert parts == header + 21_015_324 * dimensions * 4


def test_unknown_names_are_one_line():
    with pytest.raises(InputError, match="wikipedia: no such source; there are benchmarks, agent-trajectories"):
        Table()["wikipedia"]
    assert Table()["meta-llama/Llama-3.2-1B-Instruct"].form == "models"


# One file and its faults


def test_a_file_is_fetched_once_and_then_only_checked(tmp_path):
    with serve() as server:
        file = fetch(tmp_path, server)
        assert file.read_bytes() == CONTENT
        fetch(tmp_path, server)
        assert [path for path, _, _ in server.seen] == ["/datasets/a/b/resolve/r/file.bin"]
    assert files_of(tmp_path) == ["file.bin", "sources.lock.json"]


@pytest.mark.parametrize(
    "faults, firsts",
    [
        (["cut", "cut"], [0, 700_000, 1_400_000]),  # resumed from where it broke off
        ([503, 429, 500], [0, 0, 0, 0]),
        (["cut", "no range"], [0, 700_000]),  # begins again, in the same answer
        (["cut", 503, "cut"], [0, 700_000, 700_000, 1_400_000]),
    ],
)
def test_faults_that_pass(tmp_path, faults, firsts):
    with serve(lambda number, first: faults[number] if number < len(faults) else None) as server:
        assert fetch(tmp_path, server).read_bytes() == CONTENT
        assert [first for _, first, _ in server.seen] == firsts


@pytest.mark.parametrize(
    "fault, message, requests",
    [
        (404, r"file.bin answered 404", 1),
        (403, r"file.bin answered 403: \$HF_TOKEN must hold a token that may read it", 1),
        (503, r"file.bin: status 503; gave up after 4 attempts; what came is kept", 4),
        ("another file", r"file.bin: 6 bytes there, but 3,000,000 are expected", 1),
        ("damaged", r"file.bin: sha256 [0-9a-f]{64}, but [0-9a-f]{64} is expected; nothing of it is kept", 1),
    ],
)
def test_faults_that_do_not_pass_leave_no_file(tmp_path, fault, message, requests):
    with serve(lambda number, first: fault) as server:
        with pytest.raises(InputError, match=message) as caught:
            fetch(tmp_path, server)
        assert len(server.seen) == requests and "\n" not in str(caught.value)
        assert caught.value.exit_status == (1 if fault == 503 else 2)
        assert files_of(tmp_path) == [".file.bin.partial", "sources.lock.json"]
        assert (tmp_path / "download/a/b/.file.bin.partial").stat().st_size == 0
    with serve() as server:
        assert fetch(tmp_path, server).read_bytes() == CONTENT


def test_attempts_are_counted_only_without_progress(tmp_path):
    with serve(lambda number, first: "cut") as server:
        assert fetch(tmp_path, server, retries=1).read_bytes() == CONTENT
        assert len(server.seen) == 5  # 3 MB, at most 0.7 at a time


def test_a_mirror_is_asked_first_and_the_host_when_it_fails(tmp_path):
    with serve(lambda number, first: "damaged") as bad, serve() as good:
        assert fetch(tmp_path, good, mirror=[f"hub={bad.url}"]).read_bytes() == CONTENT
        assert len(bad.seen) == len(good.seen) == 1
        with pytest.raises(InputError, match=r"--mirror ftp=x: hub=https://... or github=https://... was expected"):
            fetch(tmp_path, good, mirror=["ftp=x"])


def test_the_token_goes_to_the_host_and_to_no_mirror(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serve(lambda number, first: 404) as mirror, serve() as host:
        fetch(tmp_path, host, mirror=[f"hub={mirror.url}"])
        assert "Authorization" not in mirror.seen[0][2]
        assert host.seen[0][2]["Authorization"] == "Bearer hf_secret"
    (tmp_path / "download/a/b/file.bin").unlink()
    with serve(lambda number, first: 403) as host, pytest.raises(InputError) as caught:
        fetch(tmp_path, host, mirror=[f"hub={host.url}.mirror.example", f"hub={host.url}/mirror"])
    assert ["Authorization" in headers for _, _, headers in host.seen] == [False, True]
    out = capsys.readouterr()
    assert "hf_secret" not in out.out + out.err + str(caught.value)


def test_a_server_that_is_unplugged_and_comes_back(tmp_path):
    with serve(lambda number, first: "cut") as server:
        port, path = server.server_port, write_table(tmp_path, server)

        def unplug():
            while not server.seen:
                time.sleep(0.001)
            server.shutdown()
            server.server_close()

        threading.Thread(target=unplug).start()
        with pytest.raises(InputError, match=r"ConnectionError|ended early"):
            config = DownloadConfig(names=["one"], sources=path, to=str(tmp_path), retries=1, timeout=5.0, quiet=True)
            download(config)
    came = (tmp_path / "download/a/b/.file.bin.partial").stat().st_size
    assert 0 < came < len(CONTENT)
    with serve(port=port) as server:
        download(config)
        assert [first for _, first, _ in server.seen] == [came]
    assert (tmp_path / "download/a/b/file.bin").read_bytes() == CONTENT


def download_command(table, folder):
    return [sys.executable, "sources.py", "download", "one", "--sources", table, "--to", str(folder), "--quiet"]


def test_killed_in_the_middle_again_and_again(tmp_path):
    """kill -9 at five moments: never a file under its name, each time it goes on from the last byte."""
    with serve(lambda number, first: "drip") as server:
        table = write_table(tmp_path, server)
        command = download_command(table, tmp_path)
        aside, sizes = tmp_path / "download/a/b/.file.bin.partial", [0]
        for _ in range(5):
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and not (aside.exists() and aside.stat().st_size > sizes[-1] + 200_000):
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
            sizes.append(aside.stat().st_size)
            assert "file.bin" not in files_of(tmp_path)
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        assert [first for _, first, _ in server.seen] == sizes
    assert (tmp_path / "download/a/b/file.bin").read_bytes() == CONTENT


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """A limit on the size of files makes the very error that a full disk makes, in the middle of a write."""
    with serve() as server:
        table = write_table(tmp_path, server)
        command = download_command(table, tmp_path)
        full = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_234_567, 1_234_567)),
        )  # fmt: skip
        assert full.returncode == 2 and full.stderr.count("\n") == 1
        assert re.search(
            r"\.file\.bin\.partial: File too large; what came is kept, the same command goes on", full.stderr
        )
        assert (tmp_path / "download/a/b/.file.bin.partial").stat().st_size == 1_234_567
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        assert [first for _, first, _ in server.seen] == [0, 1_234_567]
    assert (tmp_path / "download/a/b/file.bin").read_bytes() == CONTENT


def test_too_little_room_is_seen_beforehand(tmp_path):
    with serve() as server, pytest.raises(InputError, match=r"1,000,000,000.0 GB are to come, but only .* GB are free"):
        fetch(tmp_path, server, files={"file.bin": [10**18, None]})
    assert not server.seen


def test_two_downloads_of_one_file_do_not_meet(tmp_path):
    with serve(lambda number, first: "drip") as server:
        table = write_table(tmp_path, server)
        config = DownloadConfig(names=["one"], sources=table, to=str(tmp_path), quiet=True)
        thread = threading.Thread(target=download, args=[config])
        thread.start()
        while not server.seen:
            time.sleep(0.001)
        with pytest.raises(InputError, match="another process is downloading this file"):
            download(config)
        thread.join()
    assert (tmp_path / "download/a/b/file.bin").read_bytes() == CONTENT


def test_a_damaged_file_is_noticed_when_it_is_needed_again(tmp_path):
    with serve() as server:
        file = fetch(tmp_path, server)
        file.write_bytes(CONTENT[:-1] + b"?")
        with pytest.raises(InputError, match=r"file.bin: sha256 .* is expected; delete it to download it again"):
            fetch(tmp_path, server)
        file.write_bytes(CONTENT + b"?")
        with pytest.raises(InputError, match=r"file.bin: 3,000,001 bytes, but 3,000,000 are expected; delete it"):
            fetch(tmp_path, server)
        file.unlink()
        assert fetch(tmp_path, server).read_bytes() == CONTENT


# What is not pinned: recorded at the first download, checked afterwards


def test_what_is_not_known_is_recorded_and_then_holds(tmp_path):
    with serve(lambda number, first: "cut" if number == 0 else None) as server:
        file = fetch(tmp_path, server, files={"file.bin": [None, None]})
        assert file.read_bytes() == CONTENT
    lock = json.loads((tmp_path / "sources.lock.json").read_text())
    assert lock == {"one": {"revision": "r", "files": {"file.bin": [3_000_000, hashlib.sha256(CONTENT).hexdigest()]}}}
    file.unlink()
    with serve(lambda number, first: "damaged") as server, pytest.raises(InputError, match="sha256 .* is expected"):
        fetch(tmp_path, server, files={"file.bin": [None, None]})
    with serve() as server, pytest.raises(InputError, match="s is pinned, but the lock file or the Hub says r"):
        fetch(tmp_path, server, revision="s")


def test_a_whole_file_of_unknown_size_that_was_killed_before_its_renaming(tmp_path):
    aside = tmp_path / "download/a/b/.file.bin.partial"
    aside.parent.mkdir(parents=True)
    aside.write_bytes(CONTENT)
    with serve() as server:
        assert fetch(tmp_path, server, files={"file.bin": [None, None]}).read_bytes() == CONTENT
        assert [first for _, first, _ in server.seen] == [len(CONTENT)]


# The stand-ins: real formats, a Hub's listing


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand-ins")
    rehearsal.rehearse(rehearsal.RehearsalConfig(out=str(folder), then="true"))
    server = rehearsal.open_server(folder / "www")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    rehearsal.write_table(folder / "www", f"http://127.0.0.1:{server.server_port}", folder / "sources.json")
    yield folder
    server.shutdown()
    server.server_close()


def get(stand_ins, to, *names):
    download(DownloadConfig(names=list(names), sources=str(stand_ins / "sources.json"), to=str(to), quiet=True))


def test_parts_become_one_index(stand_ins, tmp_path):
    get(stand_ins, tmp_path, "e5-index", "wiki-18")
    folder = rehearsal.place(stand_ins / "www", SOURCES["e5-index"])
    index = tmp_path / "download/PeterJinGo/wiki-18-e5-index/e5_Flat.index"
    assert index.read_bytes() == (folder / "part_aa").read_bytes() + (folder / "part_ab").read_bytes()
    assert dense.open_flat_index(str(index)).shape == (1800, 32)
    assert files_of(index.parent) == ["e5_Flat.index"]
    aside = index.with_name(".e5_Flat.index.partial")
    for size in (1000, (folder / "part_aa").stat().st_size, index.stat().st_size - 7):  # cut in either part
        aside.write_bytes(index.read_bytes()[:size])
        index.unlink()
        get(stand_ins, tmp_path, "e5-index")
        assert dense.open_flat_index(str(index)).shape == (1800, 32)


def test_a_model_is_found_by_its_name_offline(stand_ins, tmp_path):
    """transformers and huggingface_hub take what lies there for their own cache."""
    name = "Qwen/Qwen2.5-0.5B-Instruct"
    get(stand_ins, tmp_path, name)
    code = f"import lora; model, tokenizer = lora.load_model({name!r}); print(type(model).__name__, len(tokenizer))"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("Qwen2ForCausalLM "), done.stderr
    lock = json.loads((tmp_path / "sources.lock.json").read_text())[name]
    assert lock["revision"] == SOURCES[name].revision and len(lock["files"]) == 6
    assert all(size and len(sha256) == 64 for size, sha256 in lock["files"].values())


def test_a_repository_that_lists_a_path_outside_or_nothing_of_use(stand_ins, tmp_path):
    folder = stand_ins / "www" / "evil" / "one" / "resolve" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"1")
    with pytest.raises(InputError, match=r"evil/one: no .json, .jsonl, .* there, only weights.bin"):
        get(stand_ins, tmp_path, "evil/one")
    with pytest.raises(InputError, match="answered 404"):
        get(stand_ins, tmp_path, "nobody/nothing")
    config = DownloadConfig(names=[], to=str(tmp_path), sources=str(stand_ins / "sources.json"), quiet=True)
    sources.Lock(tmp_path / "sources.lock.json").record("a/b", "0" * 40, {"../../../../x.json": [1, None]})
    with pytest.raises(InputError, match="would lie outside of"):
        sources.download_source("a/b", Table(config.sources), config)
