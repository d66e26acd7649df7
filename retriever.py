"""Search over passages: exact TF-IDF, BM25 and dense retrieval, from a thousand passages to all of Wikipedia.

    python retriever.py build passages.jsonl indexes/wiki --kind bm25      # killed? the same command goes on
    python retriever.py build passages.jsonl indexes/e5 --kind dense      # intfloat/e5-base-v2
    python retriever.py add indexes/wiki more.jsonl
    python retriever.py search indexes/wiki "Who founded the company that makes the Walkman?"
    python retriever.py serve indexes/wiki --port 8000                     # POST /retrieve, as in Search-R1

Passages are JSON lines {"id": "...", "contents": "\\"Title\\"\\ntext"}, plain or gzipped. They stay where they are
(a gzipped file is unzipped into the index folder) and are read by offset. From Python:

    retriever.build("passages.jsonl", "indexes/wiki", kind="bm25")
    hits = retriever.load("indexes/wiki").search(["a query", "another"], k=3)
"""

import contextlib
import dataclasses
import json
import os
import queue
import shutil
import signal
import sys
import textwrap
import threading
from collections import namedtuple
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import numpy as np

import dense
import sparse
from common import REQUIRED, InputError, Journal, option, parse_object, progress, run_command_line, write_json
from passages import Passages, fingerprint, join_passages, plain_file
from sparse import best_of

FORMAT = 2  # of the index folder; folders of another format are refused

Hit = namedtuple("Hit", "id score contents")

KINDS = {  # the settings that decide what is in an index of each kind
    "tfidf": ("stem", "stop_words", "title_weight"),
    "bm25": ("stem", "stop_words", "title_weight", "k1", "b"),
    "dense": ("encoder", "pooling", "query_prefix", "passage_prefix", "max_length", "dtype", "vectors"),
}


@dataclasses.dataclass(kw_only=True)
class Build:
    passages: str = option(REQUIRED, "passages: JSON lines with id and contents, plain or .gz", positional=True)
    out: str = option(REQUIRED, "folder of the index", positional=True)
    kind: Literal["tfidf", "bm25", "dense"] = option("tfidf", "how passages are scored")
    # Sparse. The defaults are those of the best recall on 100 HotpotQA training questions (bench/retriever.py).
    stem: bool = option(True, "index plurals as singulars")
    stop_words: bool = option(True, "leave the commonest function words out")
    title_weight: int = option(2, "how many times the words of a passage's first line, its title, count")
    k1: float = option(1.5, "BM25: how much repeats of a word add")
    b: float = option(0.9, "BM25: how much long passages are held back, 0 to 1")
    workers: int = option(0, "processes that read passages; 0 means one a core")
    # Dense. The defaults are the paper's retriever: e5-base-v2, whose model card states the rest.
    encoder: str = option("intfloat/e5-base-v2", "dense: a Hugging Face encoder, name or folder")
    pooling: Literal["mean", "cls"] = option("mean", "dense: how token vectors become one")
    query_prefix: str = option("query: ", "dense: what opens a query")
    passage_prefix: str = option("passage: ", "dense: what opens a passage")
    max_length: int = option(512, "dense: tokens of a passage that the encoder reads")
    dtype: Literal["float32", "float16"] = option("float32", "dense: how vectors are stored")
    vectors: str | None = option(None, "dense: use the vectors of this FAISS flat index, in the order of the passages")
    quiet: bool = option(False, "no progress bar")


def build(passages, out, kind="tfidf", **settings):
    """Build an index of a passages file in the folder `out`; an index that is there is replaced when this one is done.

    settings: the fields of Build. Killed and called again, it goes on from the finished parts. Raises
    InputError for bad settings and for bad passages, by file and line.
    """
    build_index(Build(passages=str(passages), out=str(out), kind=kind, **settings))


def build_index(config):
    """Build an index of a passages file."""
    if not 0 <= config.b <= 1 or config.k1 < 0:
        raise InputError(f"BM25 wants k1 >= 0 and b from 0 to 1, not {config.k1} and {config.b}")
    if min(config.title_weight, config.max_length) < 1 or config.workers < 0:
        raise InputError("--title-weight and --max-length start at 1, --workers at 0")
    if config.kind not in KINDS:
        raise InputError(f"kind {config.kind!r}: one of {', '.join(KINDS)} was expected")
    settings = {"kind": config.kind} | {name: getattr(config, name) for name in KINDS[config.kind]}
    _make_index(Path(config.out), settings, Path(config.passages), config, previous=None)


@dataclasses.dataclass(kw_only=True)
class Add:
    index: str = option(REQUIRED, "folder of an index", positional=True)
    passages: str = option(REQUIRED, "more passages: JSON lines with id and contents, plain or .gz", positional=True)
    workers: int = option(0, "processes that read passages; 0 means one a core")
    quiet: bool = option(False, "no progress bar")


def add(index, passages, **options):
    """Add the passages of another file to an index; the result is that of a build over both files."""
    add_passages(Add(index=str(index), passages=str(passages), **options))


def add_passages(config):
    """Add passages to an index, without reading those that it has again."""
    previous = read_manifest(config.index)
    settings = {name: previous[name] for name in ("kind", *KINDS[previous["kind"]])}
    _make_index(Path(config.index), settings, Path(config.passages), config, previous)


def read_manifest(folder):
    path = Path(folder) / "index.json"
    if not path.exists():
        raise InputError(f"{folder}: no index here (no index.json); make one: retriever.py build PASSAGES {folder}")
    manifest = parse_object(path.read_bytes(), str(path))
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path}: format {manifest.get('format')}, but this program reads {FORMAT}; build it again")
    return manifest


def _make_index(out, settings, passages, config, previous):
    """Build an index, or extend the previous one: a folder data-N, which index.json names when it is complete."""
    out.mkdir(parents=True, exist_ok=True)
    manifest = out / "index.json"
    with Journal(out / "build.jsonl") as history:  # what was built here; while it is open no one else builds here
        path = plain_file(passages, out)
        file = {"path": os.path.relpath(path, out), **fingerprint(path)}
        if previous and file in previous["files"]:
            raise InputError(f"{passages}: already in {out}")
        if previous and previous != read_manifest(out):
            raise InputError(f"{out}: was changed by another process just now; add to it again")
        plan = {"format": FORMAT, **settings, "files": [*previous["files"], file] if previous else [file]}
        if _is_built(out, plan):
            print(f"{out}: already built", file=sys.stderr)
        else:
            if not history.rows or history.rows[-1] != plan:
                shutil.rmtree(out / "building", ignore_errors=True)
                history.append(plan)
            data, count = _make_data(out, path, plan, config, previous)
            name = f"data-{len(history.rows)}"
            shutil.rmtree(out / name, ignore_errors=True)
            os.replace(data, out / name)
            write_json(manifest, {**plan, "passages": count, "data": name})
        _clean(out, read_manifest(out))


def _is_built(out, plan):
    try:
        return read_manifest(out).items() >= plan.items()
    except InputError:  # none, or one that this program cannot read: it is built anew
        return False


def _make_data(out, path, plan, config, previous):
    """Runs of the passages file in out/building, kept if a build is killed, and from these the index's columns."""
    work, files = out / "building", plan["files"]
    data = work / "data"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    engine = dense if plan["kind"] == "dense" else sparse
    with progress(desc="reading", unit="B", quiet=config.quiet) as bar:
        bar.unit_scale = True
        runs = engine.build_runs(path, work, plan, config.workers, bar)
    parts = [(run, len(files) - 1) for run in runs]
    if previous:
        parts.insert(0, (out / previous["data"], 0))
    count = join_passages(parts, files, out, data)
    with progress(desc="merging", quiet=config.quiet) as bar:
        bar.unit_scale = True
        engine.merge([part for part, _ in parts], data, plan, bar)
    return data, count


def _clean(out, manifest):
    """Remove what earlier builds left behind."""
    for folder in [out / "building", *out.glob("data-*")]:
        if folder.name != manifest["data"]:
            shutil.rmtree(folder, ignore_errors=True)
    for copy in out.glob("passages-*"):  # unzipped
        if copy.name not in {file["path"] for file in manifest["files"]}:
            copy.unlink()


# Search


class Index:
    """An open index. search() may be called from several threads."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        data = self.folder / self.manifest["data"]
        self.rank = np.load(data / "rank.npy", mmap_mode="r")
        self.passages = Passages(self.folder, self.manifest["files"], np.load(data / "offsets.npy", mmap_mode="r"))
        engine = dense.DenseIndex if self.manifest["kind"] == "dense" else sparse.SparseIndex
        self.engine = engine(data, self.manifest)

    def __len__(self):
        return len(self.rank)

    def top(self, queries, k):
        """[(passage numbers, scores)] of the k best passages for each query, best first, ties by id."""
        if isinstance(queries, str) or not all(isinstance(query, str) for query in queries):
            raise InputError("search wants a list of queries, each of them text")
        if not isinstance(k, int) or k < 1:
            raise InputError(f"search wants a whole number k from 1 up, not {k!r}")
        return self.engine.top(queries, k)

    def search(self, queries, k=3):
        """A list of Hits for each query, best first, ties by id; a passage without a word of the query is no hit."""
        return [[self._hit(*found) for found in zip(*top, strict=True)] for top in self.top(queries, k)]

    def _hit(self, number, score):
        identity, contents = self.passages[number]
        return Hit(identity, float(score), contents)


class Hybrid(Index):
    """Two indexes of the same passages, fused by reciprocal rank: the sum of 1 / (60 + rank) over each one's best
    100 (Cormack et al., "Reciprocal rank fusion outperforms Condorcet", SIGIR 2009)."""

    def __init__(self, folders):
        self.indexes = [Index(folder) for folder in folders]
        first = self.indexes[0]
        for other in self.indexes[1:]:
            if [file["sha256"] for file in other.manifest["files"]] != [f["sha256"] for f in first.manifest["files"]]:
                raise InputError(f"{first.folder} and {other.folder} are indexes of different passages")
        self.manifest = {**first.manifest, "kind": "+".join(index.manifest["kind"] for index in self.indexes)}
        self.rank, self.passages = first.rank, first.passages

    def top(self, queries, k):
        fused = []
        for tops in zip(*(index.top(queries, max(k, 100)) for index in self.indexes), strict=True):
            shares = np.concatenate([1 / (61 + np.arange(len(docs))) for docs, _ in tops])
            docs, places = np.unique(np.concatenate([docs for docs, _ in tops]), return_inverse=True)
            fused.append(best_of(docs, np.bincount(places, shares, len(docs)), self.rank, k))
        return fused


class RemoteIndex:
    """An index behind `retriever.py serve`, or any other server of Search-R1's /retrieve."""

    def __init__(self, url):
        import requests  # only this class needs it

        self.url = url.rstrip("/").removesuffix("/retrieve") + "/retrieve"
        self.new_session, self.local = requests.Session, threading.local()  # a connection kept open for each thread
        self.errors = (requests.RequestException, ValueError, KeyError, TypeError)

    def search(self, queries, k=3):
        body = {"queries": list(queries), "topk": k, "return_scores": True}
        try:
            if not hasattr(self.local, "session"):
                self.local.session = self.new_session()
            response = self.local.session.post(self.url, json=body, timeout=60)
            answer = response.json()
            if response.status_code != 200:
                raise ValueError(answer.get("error", response.status_code))
            return [
                [Hit(str(hit["document"]["id"]), hit["score"], hit["document"]["contents"]) for hit in hits]
                for hits in answer["result"]
            ]
        except self.errors as error:
            raise InputError(f"{self.url}: no answer as Search-R1's /retrieve gives it: {error}") from None


def load(out, hybrid=None):
    """Open an index: a folder, or the URL of a server. hybrid: the folder of a second index to fuse it with."""
    if str(out).startswith(("http://", "https://")):
        return RemoteIndex(str(out))
    return Hybrid([out, hybrid]) if hybrid else Index(out)


@dataclasses.dataclass(kw_only=True)
class Search:
    index: str = option(REQUIRED, "folder of an index, or the URL of a server", positional=True)
    query: str = option(REQUIRED, "what to look for", positional=True)
    k: int = option(3, "how many passages")  # the paper's number
    hybrid: str | None = option(None, "folder of a second index, to be fused by reciprocal rank")


def search(config):
    """Print the best passages for a query."""
    hits = load(config.index, config.hybrid).search([config.query], config.k)[0]
    for place, hit in enumerate(hits, 1):
        title, newline, text = hit.contents.partition("\n")
        print(f"{place}. {title}   ({hit.id}, {hit.score:.4f})")
        if newline:
            print(textwrap.fill(text, 100, initial_indent="   ", subsequent_indent="   "))
        print()
    if not hits:
        print("no passage has a word of this query")


# Serve


class Batcher:
    """Answers the queries of many clients, those that wait at the same moment as one batch."""

    def __init__(self, index):
        self.index, self.waiting = index, queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def search(self, queries, k):
        answer = Future()
        self.waiting.put((queries, k, answer))
        return answer.result()

    def _work(self):
        while True:
            batch = [self.waiting.get()]
            while not self.waiting.empty() and sum(len(queries) for queries, _, _ in batch) < 512:
                batch.append(self.waiting.get())
            for k in sorted({k for _, k, _ in batch}):
                jobs = [(queries, answer) for queries, its_k, answer in batch if its_k == k]
                try:
                    hits = iter(self.index.search([query for queries, _ in jobs for query in queries], k))
                    for queries, answer in jobs:
                        answer.set_result([next(hits) for _ in queries])
                except Exception as error:  # the clients are told; the server lives on
                    for _, answer in jobs:
                        answer.set_exception(error)


class Handler(BaseHTTPRequestHandler):
    """POST /retrieve {"queries": [...], "topk": 3, "return_scores": true}: Search-R1's protocol
    (search_r1/search/retrieval_server.py). Errors are {"error": "..."} with status 400, 404, 411, 413 or 500."""

    protocol_version = "HTTP/1.1"  # keeps connections open
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body leave in one piece
    timeout = 300  # seconds until an idle connection is closed

    def do_GET(self):
        if self.path == "/health":
            return self._answer(200, {"passages": len(self.server.index), "kind": self.server.index.manifest["kind"]})
        self._answer(404, {"error": "POST /retrieve, or GET /health"})

    def do_POST(self):
        with self.server.busy():
            self._answer(*self._retrieve())

    def _retrieve(self):
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > 16 << 20:
            self.close_connection = True  # the body is not read
            return (
                (413, {"error": "at most 16 MiB"}) if length.isdecimal() else (411, {"error": "Content-Length wanted"})
            )
        body = self.rfile.read(int(length))
        if self.path.rstrip("/") != "/retrieve":
            return 404, {"error": "POST /retrieve, or GET /health"}
        try:
            queries, k, with_scores = parse_request(body)
        except InputError as error:
            return 400, {"error": str(error)}
        try:
            hits = self.server.batcher.search(queries, k)
        except Exception as error:
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
            return 500, {"error": f"{type(error).__name__}: {error}"}
        if with_scores:
            return 200, {"result": [[{"document": document(hit), "score": hit.score} for hit in one] for one in hits]}
        return 200, {"result": [[document(hit) for hit in one] for one in hits]}

    def _answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def document(hit):
    return {"id": hit.id, "contents": hit.contents}


def parse_request(body):
    """(queries, topk, return_scores) of a request's body; InputError says what is wrong with it."""
    row = parse_object(body, "body")
    queries, k, with_scores = row.get("queries"), row.get("topk"), row.get("return_scores", False)
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise InputError('"queries" must be a list of strings')
    k = 3 if k is None else k
    if type(k) is not int or not 1 <= k <= 1000:
        raise InputError('"topk" must be a whole number from 1 to 1000')
    if not isinstance(with_scores, bool):
        raise InputError('"return_scores" must be true or false')
    return queries, k, with_scores


class Server(ThreadingHTTPServer):
    """Serves an index; serve_forever() until shutdown()."""

    daemon_threads = True  # idle connections do not hold up the end; requests at work do (finish)
    request_queue_size = 256

    def __init__(self, index, host="127.0.0.1", port=0):
        self.index, self.batcher = index, Batcher(index)
        self.at_work, self.changed = 0, threading.Condition()
        super().__init__((host, port), Handler)

    @contextlib.contextmanager
    def busy(self):
        with self.changed:
            self.at_work += 1
        try:
            yield
        finally:
            with self.changed:
                self.at_work -= 1
                self.changed.notify_all()

    def finish(self, seconds=10):
        """Stop listening and wait for the requests at work."""
        self.server_close()
        with self.changed:
            self.changed.wait_for(lambda: not self.at_work, seconds)


@dataclasses.dataclass(kw_only=True)
class Serve:
    index: str = option(REQUIRED, "folder of an index", positional=True)
    host: str = option("127.0.0.1", "address to listen on; the default is this machine only")
    port: int = option(8000, "port to listen on; 0 finds a free one")
    hybrid: str | None = option(None, "folder of a second index, to be fused by reciprocal rank")


def serve(config):
    """Serve an index over HTTP, with Search-R1's /retrieve protocol."""
    index = Hybrid([config.index, config.hybrid]) if config.hybrid else Index(config.index)
    try:
        server = Server(index, config.host, config.port)
    except OSError as error:
        raise InputError(f"{config.host}:{config.port}: {error.strerror}; name another --port") from None
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"{len(index):,} passages at http://{config.host}:{server.server_port}/retrieve", flush=True)
    server.serve_forever(poll_interval=0.1)
    server.finish()


if __name__ == "__main__":
    commands = {
        "build": (Build, build_index),
        "add": (Add, add_passages),
        "search": (Search, search),
        "serve": (Serve, serve),
    }
    run_command_line(__doc__, commands)
