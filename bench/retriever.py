"""The retriever beside its peers: recall, build speed, memory, query speed.

    python bench/retriever.py recall --questions QUESTIONS --corpus CORPUS
    python bench/retriever.py speed --questions QUESTIONS --corpus CORPUS --passages 100000
    python bench/retriever.py dense --vectors 100000

It needs bm25s, numba and faiss-cpu beside the project's packages. QUESTIONS and CORPUS are files as
HippoRAG publishes them (data/hotpotqa_train.json, data/hotpotqa_train_corpus.json): HotpotQA's rows with
supporting_facts, and {title: [sentences]}. `speed` makes passages of 100 words from random sentences of the corpus.
Every peer runs in a process of its own on one core; the rounds of queries take turns, so that a busy machine slows all
of them, and medians are printed.
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


def read_questions(path):
    """Returns [(question, titles of its supporting passages)]."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    return [(row["question"], {title for title, _ in row["supporting_facts"]}) for row in rows]


def write_passages(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        for number, (title, text) in enumerate(rows):
            row = {"id": str(number), "contents": f'"{title}"\n{text}'}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def synthetic_passages(corpus, count, seed=0):
    generator = random.Random(seed)
    titles = list(corpus)
    sentences = [words for texts in corpus.values() for text in texts if (words := text.split())]
    for _ in range(count):
        words = []
        while len(words) < 100:
            words += generator.choice(sentences)
        yield generator.choice(titles), " ".join(words[:100])


# The peers. Each has build(path, folder), load(folder), and search(queries, k) -> passage numbers for each query.


class Peer:
    def search_each(self, queries):
        for query in queries:
            self.search([query])


class Ours(Peer):
    kind = "bm25"

    def build(self, path, folder):
        retriever.build(path, folder, self.kind, quiet=True)

    def load(self, folder):
        self.index = retriever.load(folder)

    def search(self, queries, k=3):
        return [docs for docs, _ in self.index.top(queries, k)]


class OursTfIdf(Ours):
    kind = "tfidf"


class Bm25s(Peer):
    """As in its README: English stop words, no stemmer, all texts in a list; with numba, its fastest way."""

    def tokens(self, texts):
        import bm25s

        return bm25s.tokenize(texts, stopwords="en", show_progress=False)

    def build(self, path, folder):
        import bm25s

        with open(path, encoding="utf-8") as file:
            texts = [json.loads(line)["contents"] for line in file]
        index = bm25s.BM25(backend="numba")
        index.index(self.tokens(texts), show_progress=False)
        index.save(folder)

    def load(self, folder):
        import bm25s

        self.index = bm25s.BM25.load(folder)
        self.index.backend = "numba"
        self.index.activate_numba_scorer()

    def search(self, queries, k=3):
        return self.index.retrieve(self.tokens(queries), k=k, show_progress=False, n_threads=1).documents


PEERS = {"ours, BM25": Ours, "ours, TF-IDF": OursTfIdf, "bm25s": Bm25s}


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
    started = time.perf_counter()
    result = getattr(peer(name), method)(*arguments)
    seconds = time.perf_counter() - started
    return result, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclasses.dataclass(kw_only=True)
class Recall:
    questions: str = option(REQUIRED, "questions, as HotpotQA's JSON")
    corpus: str = option(REQUIRED, "passages, {title: [sentences]}")


def recall(config):
    """Mean recall of supporting passages, for every peer."""
    questions, corpus = read_questions(config.questions), json.loads(Path(config.corpus).read_text(encoding="utf-8"))
    titles = list(corpus)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "passages.jsonl")
        write_passages(path, ((title, "".join(corpus[title])) for title in titles))
        print(f"{len(questions)} questions, {len(titles):,} passages\n")
        print("| recall | " + " | ".join(f"@{k}" for k in CUTS) + " |\n|---|" + "---|" * len(CUTS))
        for name in PEERS:
            call = start(name)
            call("build", path, f"{folder}/{name}")
            call("load", f"{folder}/{name}")
            best = call("search", [question for question, _ in questions], max(CUTS))[0]
            shares = {k: [] for k in CUTS}
            for (_, gold), numbers in zip(questions, best, strict=True):
                for k in CUTS:
                    shares[k].append(len(gold.intersection(titles[number] for number in numbers[:k])) / len(gold))
            print(f"| {name} |", " | ".join(f"{statistics.mean(shares[k]):.3f}" for k in CUTS), "|", flush=True)


@dataclasses.dataclass(kw_only=True)
class Speed(Recall):
    passages: int = option(100_000, "how many synthetic passages")
    rounds: int = option(7, "rounds of queries")


def speed(config):
    """Build speed and memory, and queries per second, one by one and all at once."""
    queries = [question for question, _ in read_questions(config.questions)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "passages.jsonl")
        write_passages(
            path, synthetic_passages(json.loads(Path(config.corpus).read_text(encoding="utf-8")), config.passages)
        )
        peers, rows, seconds = {}, {}, {}
        for name in ("ours, BM25", "bm25s"):
            _, built, memory = start(name)("build", path, f"{folder}/{name}")
            rows[name] = [f"{config.passages / built:,.0f}", f"{memory:.2f}"]
            peers[name] = start(name)
            peers[name]("load", f"{folder}/{name}")
            peers[name]("search", queries)  # not measured: numba compiles
            seconds[name] = {"search_each": [], "search": []}
        for _ in range(config.rounds):
            for name, methods in seconds.items():
                for method, times in methods.items():
                    times.append(peers[name](method, queries)[1])
        print(f"{config.passages:,} passages, one core\n\n| | build passages/s | peak GiB | queries/s one | batch |")
        print("|---|---|---|---|---|")
        for name, methods in seconds.items():
            rates = [f"{len(queries) / statistics.median(times):,.0f}" for times in methods.values()]
            print(f"| {name} |", " | ".join(rows[name] + rates), "|")


@dataclasses.dataclass(kw_only=True)
class Dense:
    vectors: int = option(100_000, "how many")
    dimensions: int = option(384, "of each")
    rounds: int = option(7, "rounds of queries")


def compare_dense(config):
    """Exact inner product search: queries per second at batch 1 and 64."""
    import faiss
    import torch

    use_one_core()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        vectors = generator.standard_normal((config.vectors, config.dimensions), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors.tofile(f"{folder}/vectors")
        mapped = np.memmap(f"{folder}/vectors", np.float32, "c", 0, vectors.shape)  # as an open index has them
        mapped = torch.from_numpy(np.asarray(mapped))
        queries = generator.standard_normal((64, config.dimensions), dtype=np.float32)
        rank = np.arange(config.vectors)
        ways = {"ours": lambda batch: retriever.search_vectors(mapped, torch.from_numpy(batch), 3, rank)}
        index = faiss.IndexFlatIP(config.dimensions)
        index.add(vectors)

        def search(batch, threshold):
            faiss.cvar.distance_compute_blas_threshold = threshold
            return index.search(batch, 3)

        shipped = faiss.cvar.distance_compute_blas_threshold
        ways["faiss as shipped"] = lambda batch: search(batch, shipped)
        ways["faiss, BLAS from 20 queries on"] = lambda batch: search(batch, 20)
        seconds = {name: {1: [], 64: []} for name in ways}
        for _ in range(config.rounds):
            for name, way in ways.items():
                for size, times in seconds[name].items():
                    way(queries[:size])  # not measured: the previous way left other vectors in the caches
                    started = time.perf_counter()
                    way(queries[:size])
                    times.append((time.perf_counter() - started) / size)
        print(f"{config.vectors:,} vectors of {config.dimensions}, one core, queries per second\n")
        print("| | batch 1 | batch 64 |\n|---|---|---|")
        for name, sizes in seconds.items():
            print(f"| {name} |", " | ".join(f"{1 / statistics.median(times):,.1f}" for times in sizes.values()), "|")


if __name__ == "__main__":
    commands = {"recall": (Recall, recall), "speed": (Speed, speed), "dense": (Dense, compare_dense)}
    run_command_line(__doc__, commands)
