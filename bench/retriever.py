"""The retriever beside its peers: recall, build speed, memory, query speed, the server's share.

    python bench/retriever.py recall --questions QUESTIONS --corpus CORPUS
    python bench/retriever.py speed --questions QUESTIONS --corpus CORPUS --passages 100000
    python bench/retriever.py dense --vectors 100000
    python bench/retriever.py serve --questions QUESTIONS --corpus CORPUS

It needs bm25s, numba, scikit-learn and faiss-cpu beside the project's packages; a peer that is not installed is left
out. QUESTIONS and CORPUS are files as HippoRAG publishes them (data/hotpotqa_train.json,
data/hotpotqa_train_corpus.json): HotpotQA's rows with supporting_facts, and {title: [sentences]}. `speed` makes
passages of 100 words from random sentences of the corpus. Every peer runs in a process of its own on one core; the
rounds of queries take turns, so that a busy machine slows all of them, and medians are printed.
"""

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # the libraries read these when they are imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

import retriever  # noqa: E402
from common import REQUIRED, option, run_command_line, serve_json  # noqa: E402

CUTS = (2, 3, 5, 10)


def read_questions(path):
    """Returns [(question, titles of its supporting passages)]."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    return [(row["question"], {title for title, _ in row["supporting_facts"]}) for row in rows]


def read_corpus(path):
    """Returns {title: sentences}."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


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


class Ours:
    needs, kind = (), "bm25"

    def build(self, path, folder):
        retriever.build(path, folder, self.kind, quiet=True)

    def load(self, folder):
        self.index = retriever.load(folder)

    def search(self, queries, k=3):
        return [docs for docs, _ in self.index.top(queries, k)]


class OursTfIdf(Ours):
    kind = "tfidf"


class Bm25s:
    """As in its README: English stop words, no stemmer, all texts in a list."""

    needs, backend = ("bm25s",), "numpy"

    def tokens(self, texts):
        import bm25s

        return bm25s.tokenize(texts, stopwords="en", show_progress=False)

    def build(self, path, folder):
        import bm25s

        with open(path, encoding="utf-8") as file:
            texts = [json.loads(line)["contents"] for line in file]
        index = bm25s.BM25(backend=self.backend)
        index.index(self.tokens(texts), show_progress=False)
        index.save(folder)

    def load(self, folder):
        import bm25s

        self.index = bm25s.BM25.load(folder)
        self.index.backend = self.backend
        if self.backend == "numba":
            self.index.activate_numba_scorer()

    def search(self, queries, k=3):
        return self.index.retrieve(self.tokens(queries), k=k, show_progress=False, n_threads=1).documents


class Bm25sNumba(Bm25s):
    needs, backend = ("bm25s", "numba"), "numba"


class ScikitLearn:
    needs = ("sklearn",)

    def build(self, path, folder):
        import joblib
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(sublinear_tf=True, dtype=np.float32)
        with open(path, encoding="utf-8") as file:
            vectors = vectorizer.fit_transform(json.loads(line)["contents"] for line in file)
        os.makedirs(folder, exist_ok=True)
        joblib.dump((vectorizer, vectors.T.tocsr()), Path(folder) / "index")

    def load(self, folder):
        import joblib

        self.vectorizer, self.vectors = joblib.load(Path(folder) / "index", mmap_mode="r")

    def search(self, queries, k=3):
        scores = self.vectorizer.transform(queries) @ self.vectors
        rows = [scores[number] for number in range(len(queries))]
        return [row.indices[np.argsort(-row.data, kind="stable")[:k]] for row in rows]


PEERS = {
    "ours, BM25": Ours,
    "ours, TF-IDF": OursTfIdf,
    "bm25s numpy": Bm25s,
    "bm25s numba": Bm25sNumba,
    "scikit-learn": ScikitLearn,
}


class Child:
    """A peer in a process of its own; call(method, ...) returns (result, seconds, peak memory in GiB)."""

    def __init__(self, name):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        context.Process(target=_serve_calls, args=(PEERS[name], theirs), daemon=True).start()

    def call(self, method, *arguments):
        self.pipe.send((method, arguments))
        result = self.pipe.recv()
        if isinstance(result, Exception):
            raise result
        return result


def use_one_core():
    """Restrict this process, with the threads that libraries start, to one core."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})


def _serve_calls(peer_class, pipe):
    use_one_core()
    peer = peer_class()
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:  # the bench has ended
            return
        try:
            started = time.perf_counter()
            if method == "search_each":
                result = [peer.search([query]) for query in arguments[0]]
            else:
                result = getattr(peer, method)(*arguments)
            seconds = time.perf_counter() - started
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            pipe.send((result if method == "search" else None, seconds, memory))
        except Exception as error:
            pipe.send(error)


def installed(names):
    """Yields the peers whose packages are installed."""
    for name in names:
        missing = [package for package in PEERS[name].needs if not importlib.util.find_spec(package)]
        if missing:
            print(f"{name}: left out, {' and '.join(missing)} not installed")
        else:
            yield name


@dataclasses.dataclass(kw_only=True)
class Recall:
    questions: str = option(REQUIRED, "questions, as HotpotQA's JSON")
    corpus: str = option(REQUIRED, "passages, {title: [sentences]}")
    encoder: str | None = option(None, "also dense retrieval with this encoder")


def recall(config):
    """Mean recall of supporting passages, for every peer."""
    questions, corpus = read_questions(config.questions), read_corpus(config.corpus)
    titles, asked = list(corpus), [question for question, _ in questions]

    def row(name, rankings):
        found = [[titles[number] for number in numbers] for numbers in rankings]
        shares = {k: [] for k in CUTS}
        for (_, gold), best in zip(questions, found, strict=True):
            for k in CUTS:
                shares[k].append(len(gold.intersection(best[:k])) / len(gold))
        print(f"| {name} |", " | ".join(f"{statistics.mean(shares[k]):.3f}" for k in CUTS), "|", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "passages.jsonl"
        write_passages(path, ((title, "".join(corpus[title])) for title in titles))
        print(f"{len(questions)} questions, {len(titles):,} passages\n")
        print("| recall | " + " | ".join(f"@{k}" for k in CUTS) + " |\n|---|" + "---|" * len(CUTS))
        for name in installed(PEERS):
            child = Child(name)
            child.call("build", path, f"{folder}/{name}")
            child.call("load", f"{folder}/{name}")
            row(name, child.call("search", asked, max(CUTS))[0])
        if config.encoder:
            retriever.build(path, f"{folder}/dense", "dense", encoder=config.encoder, quiet=True)
            best = retriever.load(f"{folder}/dense").top(asked, max(CUTS))
            row("ours, dense", [docs for docs, _ in best])


@dataclasses.dataclass(kw_only=True)
class Speed:
    corpus: str = option(REQUIRED, "passages to draw sentences from, {title: [sentences]}")
    questions: str = option(REQUIRED, "questions, as HotpotQA's JSON")
    passages: int = option(100_000, "how many synthetic passages")
    rounds: int = option(7, "rounds of queries")
    peers: list[str] = option(["ours, BM25", "bm25s numpy", "bm25s numba", "scikit-learn"], "which to run")
    work: str | None = option(None, "folder that keeps passages and indexes; what is there is not built again")


def speed(config):
    """Build speed and memory, load time, first query, queries per second."""
    queries = [question for question, _ in read_questions(config.questions)]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(config.work or temporary)
        work.mkdir(parents=True, exist_ok=True)
        path = work / f"passages-{config.passages}.jsonl"
        if not path.exists():
            write_passages(path, synthetic_passages(read_corpus(config.corpus), config.passages))
        print(f"{config.passages:,} passages, one core\n")
        print("| | build passages/s | peak GiB | load s | first query s | queries/s one | batch |")
        print("|---|---|---|---|---|---|---|")
        peers, rows = {}, {}
        for name in installed(config.peers):
            folder = f"{work}/{name}-{config.passages}"
            rows[name] = ["built before", ""]
            if not Path(folder).exists():
                _, seconds, memory = Child(name).call("build", path, folder)
                rows[name] = [f"{config.passages / seconds:,.0f}", f"{memory:.2f}"]
            peers[name] = Child(name)
            rows[name].append(f"{peers[name].call('load', folder)[1]:.3f}")
            rows[name].append(f"{peers[name].call('search', queries[:1])[1]:.4f}")
        seconds = {name: {"search_each": [], "search": []} for name in peers}
        for _ in range(config.rounds):
            for name, peer in peers.items():
                for method, times in seconds[name].items():
                    times.append(peer.call(method, queries)[1])
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
    import torch

    use_one_core()
    torch.set_num_threads(1)
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
        ways["plain NumPy"] = lambda batch: np.argpartition(-(batch @ vectors.T), 3, axis=1)[:, :3]
        if importlib.util.find_spec("faiss"):
            import faiss

            faiss.omp_set_num_threads(1)
            index = faiss.IndexFlatIP(config.dimensions)
            index.add(vectors)

            def search(batch, threshold):
                faiss.cvar.distance_compute_blas_threshold = threshold
                return index.search(batch, 3)

            shipped = faiss.cvar.distance_compute_blas_threshold
            ways["faiss as shipped"] = lambda batch: search(batch, shipped)
            ways["faiss, BLAS from 20 queries on"] = lambda batch: search(batch, 20)
        else:
            print("faiss: left out, not installed")
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


@dataclasses.dataclass(kw_only=True)
class Serve:
    corpus: str = option(REQUIRED, "passages to draw sentences from, {title: [sentences]}")
    questions: str = option(REQUIRED, "questions, as HotpotQA's JSON")
    passages: int = option(100_000, "how many synthetic passages")
    clients: int = option(16, "clients at the same time, for the second number")


def compare_server(config):
    """What the server adds to a query, and how many queries it answers to many clients."""
    queries = [question for question, _ in read_questions(config.questions)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "passages.jsonl"
        write_passages(path, synthetic_passages(read_corpus(config.corpus), config.passages))
        retriever.build(path, f"{folder}/index", "bm25", quiet=True)
        index = retriever.load(f"{folder}/index")
        server = serve_json(lambda *request: retriever.answer_request(index, *request))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        remote = retriever.load(f"http://127.0.0.1:{server.server_address[1]}")

        def ask_all(where, times):
            for query in queries:
                started = time.perf_counter()
                where.search([query])
                times.append(time.perf_counter() - started)

        direct, served = [], []
        for _ in range(5):
            ask_all(index, direct)
            ask_all(remote, served)
        print(f"median of a query: direct {1000 * statistics.median(direct):.2f} ms, ", end="")
        print(f"over HTTP {1000 * statistics.median(served):.2f} ms")
        threads = [threading.Thread(target=ask_all, args=(remote, [])) for _ in range(config.clients)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rate = config.clients * len(queries) / (time.perf_counter() - started)
        print(f"{config.clients} clients in this same process: {rate:,.0f} queries/s")
        server.shutdown()


if __name__ == "__main__":
    commands = {
        "recall": (Recall, recall),
        "speed": (Speed, speed),
        "dense": (Dense, compare_dense),
        "serve": (Serve, compare_server),
    }
    run_command_line(__doc__, commands)
