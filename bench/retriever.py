"""The retriever beside its peers: recall, build speed, memory, query speed, the server's share.

    python bench/retriever.py recall --questions QUESTIONS --corpus CORPUS
    python bench/retriever.py speed --questions QUESTIONS --corpus CORPUS --passages 100000
    python bench/retriever.py dense --vectors 100000
    python bench/retriever.py serve --questions QUESTIONS --corpus CORPUS

It needs bm25s, numba, PyStemmer, rank_bm25, scikit-learn and faiss-cpu beside the project's packages; what is
not installed is left out. QUESTIONS and CORPUS are files as HippoRAG publishes them (data/hotpotqa_train.json,
data/hotpotqa_train_corpus.json): HotpotQA's rows with supporting_facts, and {title: [sentences]}. Synthetic
passages are 100 words of sentences drawn from the corpus. Every peer runs in a process of its own on one core;
query rounds take turns, so that a busy machine slows all alike, and medians are printed.
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
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # read when the libraries are imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

import dense  # noqa: E402
import retriever  # noqa: E402
from common import REQUIRED, option, run_command_line  # noqa: E402

CUTS = (2, 3, 5, 10)


def read_questions(path):
    """[(question, titles of its supporting passages)]"""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    return [(row["question"], {title for title, _ in row["supporting_facts"]}) for row in rows]


def read_corpus(path):
    """{title: sentences}"""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_passages(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        for identity, title, text in rows:
            row = {"id": identity, "contents": f'"{title}"\n{text}'}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def synthetic_passages(corpus, count, seed=0):
    generator = random.Random(seed)
    titles = list(corpus)
    sentences = [words for texts in corpus.values() for text in texts if (words := text.split())]
    for number in range(count):
        words = []
        while len(words) < 100:
            words += generator.choice(sentences)
        yield str(number), generator.choice(titles), " ".join(words[:100])


# The peers. Each has build(path, folder), load(folder), and search(queries) -> passage numbers, three a query.


class Ours:
    needs, kind = (), "bm25"

    def build(self, path, folder):
        retriever.build(path, folder, self.kind, workers=1, quiet=True)

    def load(self, folder):
        self.index = retriever.load(folder)

    def search(self, queries, k=3):
        return [docs for docs, _ in self.index.top(queries, k)]


class OursTfIdf(Ours):
    kind = "tfidf"


class Bm25s:
    """As its README has it: English stop words, no stemmer, and the texts in a list."""

    needs, backend, stemmer = ("bm25s",), "numpy", None

    def tokens(self, texts):
        import bm25s

        return bm25s.tokenize(texts, stopwords="en", stemmer=self.stemmer, show_progress=False)

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


class Bm25sStemmer(Bm25s):
    needs = ("bm25s", "Stemmer")

    def __init__(self):
        import Stemmer

        self.stemmer = Stemmer.Stemmer("english")


class RankBm25:
    needs = ("rank_bm25",)

    def build(self, path, folder):
        import rank_bm25

        with open(path, encoding="utf-8") as file:
            self.index = rank_bm25.BM25Okapi([json.loads(line)["contents"].lower().split() for line in file])

    def load(self, folder):
        pass

    def search(self, queries, k=3):
        return [np.argsort(-self.index.get_scores(query.lower().split()), kind="stable")[:k] for query in queries]


class ScikitLearn:
    needs = ("sklearn",)

    def build(self, path, folder):
        import joblib
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.vectorizer = TfidfVectorizer(sublinear_tf=True, dtype=np.float32)
        with open(path, encoding="utf-8") as file:
            self.vectors = self.vectorizer.fit_transform(json.loads(line)["contents"] for line in file)
        os.makedirs(folder, exist_ok=True)
        joblib.dump((self.vectorizer, self.vectors.T.tocsr()), Path(folder) / "index")

    def load(self, folder):
        import joblib

        self.vectorizer, self.vectors = joblib.load(Path(folder) / "index", mmap_mode="r")

    def search(self, queries, k=3):
        scores = self.vectorizer.transform(queries) @ self.vectors
        found = []
        for row in range(len(queries)):
            row = scores[row]
            best = np.argsort(-row.data, kind="stable")[:k] if row.nnz < 1000 else np.argpartition(-row.data, k)[:k]
            found.append(row.indices[best])
        return found


PEERS = {
    "ours, BM25": Ours,
    "ours, TF-IDF": OursTfIdf,
    "bm25s numpy": Bm25s,
    "bm25s numba": Bm25sNumba,
    "bm25s stemmer": Bm25sStemmer,
    "rank_bm25": RankBm25,
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
    """Also for the threads that libraries start."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})


def _serve_calls(peer_class, pipe):
    use_one_core()
    peer = None
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:  # the bench has ended
            return
        try:
            peer = peer or peer_class()
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
    """Those peers whose packages are there."""
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
    encoder: str | None = option(None, "also dense and hybrid retrieval with this encoder")
    encoder_prefix: bool = option(False, 'the encoder wants e5\'s "query: " and "passage: "')


def recall(config):
    """Mean recall of supporting passages, for every peer."""
    questions, corpus = read_questions(config.questions), read_corpus(config.corpus)
    titles, asked = list(corpus), [question for question, _ in questions]

    def row(name, rankings):
        found = [[titles[number] for number in numbers] for numbers in rankings]
        means = [
            statistics.mean(
                len(gold.intersection(best[:k])) / len(gold) for (_, gold), best in zip(questions, found, strict=True)
            )
            for k in CUTS
        ]
        print(f"| {name} |", " | ".join(f"{mean:.3f}" for mean in means), "|", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "passages.jsonl"
        write_passages(path, ((str(i), title, "".join(corpus[title])) for i, title in enumerate(titles)))
        print(f"{len(questions)} questions, {len(titles):,} passages\n")
        print("| recall | " + " | ".join(f"@{k}" for k in CUTS) + " |\n|---|" + "---|" * len(CUTS))
        for name in [*installed(PEERS)]:
            child = Child(name)
            child.call("build", path, f"{folder}/{name}")
            child.call("load", f"{folder}/{name}")
            row(name, child.call("search", asked, max(CUTS))[0])
        if config.encoder:
            prefixes = {} if config.encoder_prefix else {"query_prefix": "", "passage_prefix": ""}
            retriever.build(path, f"{folder}/dense", "dense", encoder=config.encoder, quiet=True, **prefixes)
            indexes = {
                "ours, dense": retriever.load(f"{folder}/dense"),
                "ours, BM25 + dense": retriever.load(f"{folder}/ours, BM25", f"{folder}/dense"),
            }
            for name, index in indexes.items():
                row(name, [docs for docs, _ in index.top(asked, max(CUTS))])


@dataclasses.dataclass(kw_only=True)
class Speed:
    corpus: str = option(REQUIRED, "passages to draw sentences from, {title: [sentences]}")
    questions: str = option(REQUIRED, "questions, as HotpotQA's JSON")
    passages: int = option(100_000, "how many synthetic passages")
    rounds: int = option(7, "rounds of queries")
    peers: list[str] = option(["ours, BM25", "bm25s numpy", "bm25s numba", "scikit-learn"], "which to run")
    work: str | None = option(None, "folder to keep passages and indexes in; what is there is not built again")


def speed(config):
    """Build speed and memory, load time, first query, queries a second."""
    queries = [question for question, _ in read_questions(config.questions)]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(config.work or temporary)
        path = work / f"passages-{config.passages}.jsonl"
        if not path.exists():
            write_passages(path, synthetic_passages(read_corpus(config.corpus), config.passages))
        print(f"{config.passages:,} passages, one core\n")
        print("| | build passages/s | peak GiB | load s | first query s | queries/s one | batch |")
        print("|---|---|---|---|---|---|---|")
        open_peers, rows = {}, {}
        for name in [*installed(config.peers)]:
            folder = f"{work}/{name}-{config.passages}"
            rows[name] = ["built before", ""]
            if not Path(folder).exists():
                builder = Child(name)
                _, seconds, memory = builder.call("build", path, folder)
                rows[name] = [f"{config.passages / seconds:,.0f}", f"{memory:.2f}"]
            peer = open_peers[name] = Child(name)
            rows[name].append(f"{peer.call('load', folder)[1]:.3f}")
            rows[name].append(f"{peer.call('search', queries[:1])[1]:.4f}")
        seconds = {name: ([], []) for name in open_peers}
        for _ in range(config.rounds):
            for name, peer in open_peers.items():
                seconds[name][0].append(peer.call("search_each", queries)[1])
                seconds[name][1].append(peer.call("search", queries)[1])
        for name, both in seconds.items():
            rates = [f"{len(queries) / statistics.median(times):,.0f}" for times in both]
            print(f"| {name} |", " | ".join(rows[name] + rates), "|")


@dataclasses.dataclass(kw_only=True)
class Dense:
    vectors: int = option(100_000, "how many")
    dimensions: int = option(384, "of each")
    rounds: int = option(7, "rounds of queries")


def compare_dense(config):
    """Exact inner product search: queries a second at batch 1 and 64."""
    use_one_core()
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        vectors = generator.standard_normal((config.vectors, config.dimensions), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        np.save(f"{folder}/vectors.npy", vectors)
        mapped = np.load(f"{folder}/vectors.npy", mmap_mode="r")
        queries = generator.standard_normal((64, config.dimensions), dtype=np.float32)
        rank = np.arange(config.vectors)
        products = dense.CpuProducts(mapped)

        def plain(batch):
            scores = batch @ vectors.T
            return np.argpartition(-scores, 3, axis=1)[:, :3]

        ways = {"ours": lambda batch: dense.search_vectors(products, mapped, batch, 3, rank), "plain NumPy": plain}
        try:
            import faiss

            faiss.omp_set_num_threads(1)
            index = faiss.IndexFlatIP(config.dimensions)
            index.add(vectors)

            def search(batch, threshold):
                faiss.cvar.distance_compute_blas_threshold = threshold
                return index.search(batch, 3)

            ways["faiss as shipped"] = lambda batch, shipped=faiss.cvar.distance_compute_blas_threshold: search(
                batch, shipped
            )
            ways["faiss, BLAS from 20 on"] = lambda batch: search(batch, 20)
        except ImportError as error:
            print(f"faiss: left out: {error}")
        seconds = {name: ([], []) for name in ways}
        for _ in range(config.rounds + 1):
            for name, way in ways.items():
                for size, times in zip((1, 64), seconds[name], strict=True):
                    started = time.perf_counter()
                    way(queries[:size])
                    times.append((time.perf_counter() - started) / size)
        print(f"{config.vectors:,} vectors of {config.dimensions}, one core, queries/s\n")
        print("| | batch 1 | batch 64 |\n|---|---|---|")
        for name, both in seconds.items():
            print(f"| {name} |", " | ".join(f"{1 / statistics.median(times[1:]):,.1f}" for times in both), "|")


@dataclasses.dataclass(kw_only=True)
class Serve:
    corpus: str = option(REQUIRED, "passages to draw sentences from, {title: [sentences]}")
    questions: str = option(REQUIRED, "questions, as HotpotQA's JSON")
    passages: int = option(100_000, "how many synthetic passages")
    clients: int = option(16, "at once, for the second number")


def compare_server(config):
    """What the server adds to a query, and how many it answers to many clients."""
    import http.client
    import threading

    queries = [question for question, _ in read_questions(config.questions)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "passages.jsonl"
        write_passages(path, synthetic_passages(read_corpus(config.corpus), config.passages))
        retriever.build(path, f"{folder}/index", "bm25", quiet=True)
        index = retriever.load(f"{folder}/index")
        server = retriever.Server(index)
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def ask_all(times):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
            for query in queries:
                started = time.perf_counter()
                connection.request("POST", "/retrieve", json.dumps({"queries": [query], "return_scores": True}))
                connection.getresponse().read()
                times.append(time.perf_counter() - started)

        direct, served = [], []
        for _ in range(5):
            for query in queries:
                started = time.perf_counter()
                index.search([query])
                direct.append(time.perf_counter() - started)
            ask_all(served)
        print(f"median of a query: direct {1000 * statistics.median(direct):.2f} ms, ", end="")
        print(f"over HTTP {1000 * statistics.median(served):.2f} ms")
        threads = [threading.Thread(target=ask_all, args=([],)) for _ in range(config.clients)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rate = config.clients * len(queries) / (time.perf_counter() - started)
        print(f"{config.clients} clients in this same process: {rate:,.0f} queries/s")
        server.shutdown()
        server.finish()


if __name__ == "__main__":
    commands = {
        "recall": (Recall, recall),
        "speed": (Speed, speed),
        "dense": (Dense, compare_dense),
        "serve": (Serve, compare_server),
    }
    run_command_line(__doc__, commands)
