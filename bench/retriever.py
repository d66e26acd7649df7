"""The retriever beside its peers: recall, build speed, memory, query speed.

    python bench/retriever.py recall --questions QUESTIONS --corpus CORPUS
    python bench/retriever.py speed --questions QUESTIONS --corpus CORPUS --passages 100000
    python bench/retriever.py dense --vectors 100000

It needs bm25s, numba and faiss-cpu beside the project's packages. QUESTIONS and CORPUS are files as HippoRAG publishes
them (data/hotpotqa_train.json, data/hotpotqa_train_corpus.json). `speed` makes passages of 100 words from random
sentences of the corpus; there, every peer runs in a process of its own on one core. Rounds of queries take turns, and
medians are printed.
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # the libraries read these when they are imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

import retriever  # noqa: E402
from common import REQUIRED, option, run_command_line  # noqa: E402

CUTS = (2, 3, 5, 10)
ROUNDS = 7


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_passages(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        for number, (title, text) in enumerate(rows):
            row = {"id": str(number), "contents": f'"{title}"\n{text}'}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def synthetic_passages(corpus, count):
    generator = random.Random(0)
    titles = list(corpus)
    sentences = [words for texts in corpus.values() for text in texts if (words := text.split())]
    for _ in range(count):
        words = []
        while len(words) < 100:
            words += generator.choice(sentences)
        yield generator.choice(titles), " ".join(words[:100])


class Peer:
    """build(path, folder), load(folder), and search(queries, k) -> passage numbers for each query."""

    def search_each(self, queries):
        for query in queries:
            self.search([query])


class Ours(Peer):
    def build(self, path, folder):
        retriever.build(path, folder, quiet=True)

    def load(self, folder):
        self.index = retriever.load(folder)

    def search(self, queries, k=3):
        return [docs for docs, _ in self.index.top(queries, k)]


class Bm25s(Peer):
    """As in its README: English stop words, no stemmer, all texts in a list; with numba, its fastest way."""

    def __init__(self):
        import bm25s

        self.package = bm25s
        self.tokenize = functools.partial(bm25s.tokenize, stopwords="en", show_progress=False)

    def build(self, path, folder):
        with open(path, encoding="utf-8") as file:
            texts = [json.loads(line)["contents"] for line in file]
        index = self.package.BM25(backend="numba")
        index.index(self.tokenize(texts), show_progress=False)
        index.save(folder)

    def load(self, folder):
        self.index = self.package.BM25.load(folder)
        self.index.backend = "numba"
        self.index.activate_numba_scorer()

    def search(self, queries, k=3):
        return self.index.retrieve(self.tokenize(queries), k=k, show_progress=False, n_threads=1).documents


PEERS = {"ours": Ours, "bm25s": Bm25s}


def start(name):
    """Returns call(method, ...) -> (result, seconds, peak memory in GiB) of a peer in a process of its own."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), use_one_core)
    return lambda method, *arguments: pool.submit(work, name, method, *arguments).result()


def use_one_core():
    """Restrict this process, with the threads that libraries start, to one core."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})


@functools.cache
def peer(name):
    return PEERS[name]()


def work(name, method, *arguments):
    call = getattr(peer(name), method)
    started = time.perf_counter()
    result = call(*arguments)
    return result, time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclasses.dataclass(kw_only=True)
class Recall:
    questions: str = option(REQUIRED, "questions, as HotpotQA's JSON")
    corpus: str = option(REQUIRED, "passages, {title: [sentences]}")


def recall(config):
    """Mean recall of supporting passages, for every peer."""
    rows, corpus = read_json(config.questions), read_json(config.corpus)
    titles = list(corpus)
    golds = [{title for title, _ in row["supporting_facts"]} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "passages.jsonl")
        write_passages(path, ((title, "".join(corpus[title])) for title in titles))
        print(f"{len(rows)} questions, {len(titles):,} passages\n")
        print("| recall | " + " | ".join(f"@{k}" for k in CUTS) + " |\n|---|" + "---|" * len(CUTS))
        for name in PEERS:
            peer(name).build(path, f"{folder}/{name}")
            peer(name).load(f"{folder}/{name}")
            found = peer(name).search([row["question"] for row in rows], max(CUTS))
            print(f"| {name} |", end="")
            for k in CUTS:
                pairs = zip(golds, found, strict=True)
                shares = [len(gold & {titles[number] for number in best[:k]}) / len(gold) for gold, best in pairs]
                print(f" {statistics.mean(shares):.3f} |", end="")
            print(flush=True)


@dataclasses.dataclass(kw_only=True)
class Speed(Recall):
    passages: int = option(100_000, "how many synthetic passages")


def speed(config):
    """Build speed and memory, and queries per second, asked one by one."""
    queries = [row["question"] for row in read_json(config.questions)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "passages.jsonl")
        write_passages(path, synthetic_passages(read_json(config.corpus), config.passages))
        peers, rows, seconds = {}, {}, {name: [] for name in PEERS}
        for name in seconds:
            _, built, memory = start(name)("build", path, f"{folder}/{name}")
            rows[name] = f"| {name} | {config.passages / built:,.0f} | {memory:.2f} |"
            peers[name] = start(name)
            peers[name]("load", f"{folder}/{name}")
            peers[name]("search_each", queries)  # not measured: numba compiles
        for _ in range(ROUNDS):
            for name, times in seconds.items():
                times.append(peers[name]("search_each", queries)[1])
        print(f"{config.passages:,} passages, one core\n\n| | build passages/s | peak GiB | queries/s |")
        print("|---|---|---|---|")
        for name, times in seconds.items():
            print(rows[name], f"{len(queries) / statistics.median(times):,.0f} |")


@dataclasses.dataclass(kw_only=True)
class Dense:
    vectors: int = option(100_000, "how many, of 384 dimensions")


def compare_dense(config):
    """Exact inner product search: queries per second at batch 1 and 64."""
    import faiss
    import torch

    use_one_core()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((config.vectors, 384), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = generator.standard_normal((64, 384), dtype=np.float32)
    rank = np.arange(config.vectors)
    index = faiss.IndexFlatIP(384)
    index.add(vectors)

    def search(threshold, batch):
        if threshold:
            faiss.cvar.distance_compute_blas_threshold = threshold
            index.search(batch, 3)
        else:
            retriever.search_vectors(torch.from_numpy(vectors), torch.from_numpy(batch), 3, rank)

    thresholds = {f"faiss, BLAS from {n} queries on": n for n in (20, faiss.cvar.distance_compute_blas_threshold)}
    seconds = {name: {1: [], 64: []} for name in ("ours", *thresholds)}
    for _ in range(ROUNDS):
        for name, sizes in seconds.items():
            for size, times in sizes.items():
                search(thresholds.get(name), queries[:size])  # not measured: the caches hold the vectors of another way
                started = time.perf_counter()
                search(thresholds.get(name), queries[:size])
                times.append((time.perf_counter() - started) / size)
    print(f"{config.vectors:,} vectors of 384, one core, queries per second\n")
    print("| | batch 1 | batch 64 |\n|---|---|---|")
    for name, sizes in seconds.items():
        print(f"| {name} |", " | ".join(f"{1 / statistics.median(times):,.1f}" for times in sizes.values()), "|")


if __name__ == "__main__":
    commands = {"recall": (Recall, recall), "speed": (Speed, speed), "dense": (Dense, compare_dense)}
    run_command_line(__doc__, commands)
