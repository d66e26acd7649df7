"""Search over passages: exact TF-IDF, BM25 and dense retrieval, from a thousand passages to all of Wikipedia.

    python retriever.py build passages.jsonl runs/index --kind bm25       # killed? the same command continues
    python retriever.py build passages.jsonl runs/e5 --kind dense         # intfloat/e5-base-v2, the paper's retriever
    python retriever.py search runs/index "Who founded the company that makes the Walkman?"
    python retriever.py serve runs/index --port 8000                      # POST /retrieve, as in Search-R1

Passages are JSON lines {"id": "...", "contents": "\\"Title\\"\\ntext"}. The index refers to their file by its path, and
reads passages from it by offset. From Python:

    retriever.build("passages.jsonl", "runs/index", kind="bm25")
    hits = retriever.load("runs/index").search(["a query", "another"], k=3)
"""

import dataclasses
import functools
import json
import math
import os
import queue
import shutil
import threading
from collections import Counter, namedtuple
from concurrent.futures import Future
from pathlib import Path
from typing import Literal

import numpy as np
import requests

import common
from common import REQUIRED, InputError, http_session, option
from common.passages import WORD_BYTES, index_term, invert, read_passages, split_words

Hit = namedtuple("Hit", "id score contents")
FORMAT = 3  # of the index folder; an index of another format is refused


@dataclasses.dataclass(kw_only=True)
class BuildConfig:
    passages: str = option(REQUIRED, "passages: JSON lines with id and contents", positional=True)
    out: str = option(REQUIRED, "folder of the index", positional=True)
    kind: Literal["tfidf", "bm25", "dense"] = option("tfidf", "how passages are scored")
    # BM25. These defaults have the best recall on 100 HotpotQA training questions (bench/retriever.py recall).
    k1: float = option(1.5, "BM25: how much repetitions of a word add")
    b: float = option(0.9, "BM25: how much long passages are penalised, 0 to 1")
    # Dense. The defaults are those of the paper's retriever: e5-base-v2 and its model card.
    encoder: str = option("intfloat/e5-base-v2", "dense: a Hugging Face encoder, name or folder")
    pooling: Literal["mean", "cls"] = option("mean", "dense: how token vectors become one vector")
    query_prefix: str = option("query: ", "dense: text put before a query")
    passage_prefix: str = option("passage: ", "dense: text put before a passage")
    dtype: Literal["float32", "float16"] = option("float32", "dense: number format of the stored vectors")
    vectors: str | None = option(None, "dense: use the vectors of this FAISS flat index, in the order of the passages")
    quiet: bool = option(False, "no progress bar")


# Building. Chunks of the passages file become runs, which a killed build keeps; the runs are merged into an index.
# An index is a folder with index.json, which names the data folder. It is replaced only when the new data is complete.


def build(passages, out, kind="tfidf", **settings):
    """Build an index of a passages file in the folder `out`. An existing index is replaced when the new one is done.

    settings: the fields of BuildConfig. If a build is killed, the same call continues with the chunks that are left.
    Raises InputError for bad settings, and for bad passages with file and line.
    """
    config = BuildConfig(passages=str(passages), out=str(out), kind=kind, **settings)
    source, out = Path(passages), Path(out)
    if kind not in ("tfidf", "bm25", "dense") or not 0 <= config.b <= 1 or config.k1 < 0:
        raise InputError("kind must be tfidf, bm25 or dense; b from 0 to 1; k1 at least 0")
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    plan = {name: value for name, value in vars(config).items() if name not in ("out", "quiet")}
    plan |= {"format": FORMAT, "bytes": source.stat().st_size, "modified_ns": source.stat().st_mtime_ns}
    # Paths are relative to the index folder, so that both can be moved together.
    plan |= {name: plan[name] and os.path.relpath(plan[name], out) for name in ("passages", "vectors")}
    work, dense = out / "building", kind == "dense"
    with common.Journal(out / "build.lock"):  # refuses a second build in this folder at the same time
        manifest = _read_json(out / "index.json")
        if manifest.items() >= plan.items():
            print(f"{out}: already built")
            return
        if _read_json(work / "plan.json") != plan:
            shutil.rmtree(work, ignore_errors=True)
            common.write_json(work / "plan.json", plan)
        shutil.rmtree(work / "data", ignore_errors=True)
        (work / "data").mkdir()
        with common.progress(desc="reading", total=source.stat().st_size, unit="B", quiet=config.quiet) as bar:
            if dense:
                encoder = None if config.vectors else Encoder(config.encoder, config.pooling)
                runs = write_runs(functools.partial(embed_chunk, encoder, config), source, work, DENSE_CHUNK, bar)
            else:
                runs = write_runs(invert_chunk, source, work, CHUNK, bar)
        merge_passages(runs, source, work / "data")
        (merge_vectors if dense else merge_postings)(runs, work / "data", config)
        data = f"data-{int(manifest.get('data', 'data-0')[5:]) + 1}"
        shutil.rmtree(out / data, ignore_errors=True)
        os.replace(work / "data", out / data)
        common.write_json(out / "index.json", {**plan, "data": data})
        for folder in {work, *out.glob("data-*")} - {out / data}:
            shutil.rmtree(folder)


def _read_json(path):
    return common.parse_object(path.read_bytes(), str(path)) if path.exists() else {}


def write_runs(write_run, path, work, size, bar):
    """Call write_run(path, start, end, run) for each chunk of `size` bytes without a run. Returns the runs' files."""
    runs = []
    for start in range(0, path.stat().st_size, size):
        runs.append(work / f"run-{start // size:06d}.npz")
        if not runs[-1].exists():
            write_run(path, start, start + size, runs[-1])
        bar.update(size)
    return runs


def save_run(run, offsets, ids, **columns):
    """Write the columns of a run as a file that appears only when it is complete."""
    with common.replace_file(run, "wb") as file:
        np.savez(file, offsets=np.array(offsets, np.int64), ids=np.array(ids or [], "S"), **columns)


def merge_passages(runs, source, data):
    """Write the offsets of all passages, and their ranks in the order of ids, which breaks ties between scores."""
    offsets, ids = ([np.load(run)[name] for run in runs] for name in ("offsets", "ids"))
    if not sum(map(len, ids)):
        raise InputError(f"{source}: no passages in it")
    offsets, ids = np.concatenate(offsets), np.concatenate(ids)
    order = np.argsort(ids, kind="stable")
    same = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])
    if same.size:
        raise InputError(f"{source}: the id {ids[order[same[0]]].decode()!r} occurs twice; ids must differ")
    np.save(data / "rank.npy", np.argsort(order).astype(np.uint32))
    np.save(data / "offsets.npy", offsets)


# TF-IDF and BM25: an inverted index. The score of a passage is the sum of repeats(n) x value(term, passage) over the
# terms of the query, where n is how often the query has the term; for TF-IDF it is divided by the query's norm.

CHUNK = 4 << 20  # bytes of passages that are inverted at once; sets the memory of a build
RANGE = 1 << 20  # postings that are merged at once
TITLE_WEIGHT = 2  # a passage's first line is its title; its words count so many times (best recall on HotpotQA)


def invert_chunk(path, start, end, run):
    """Write the run of one chunk of the passages file: its terms in order, and their postings in order."""
    offsets, ids, contents = read_passages(path, start, end)
    titles = [text[: text.find("\n") + 1] for text in contents]
    columns = invert([title * (TITLE_WEIGHT - 1) + text for title, text in zip(titles, contents, strict=True)])
    np.save(run.with_suffix(".npy"), columns.pop("postings"))  # a file of its own, because it is read in parts
    save_run(run, offsets, ids, **columns)


def term_idf(kind, df, count):
    """Returns the weight of a term that occurs in df of count passages.

    TF-IDF: ln((1 + N) / (1 + df)) + 1, as scikit-learn's TfidfVectorizer. BM25: ln(1 + (N - df + 0.5) / (df + 0.5)), as
    Lucene 8 and bm25s' "lucene"; the variants are in Kamphuis et al., "Which BM25 do you mean?" (ECIR 2020).
    """
    return np.log((1 + count) / (1 + df)) + 1 if kind == "tfidf" else np.log(1 + (count - df + 0.5) / (df + 0.5))


def passage_values(kind, tf, idf, factor):
    """Returns the values of terms in passages where they occur tf times.

    TF-IDF: the cosine with (1 + ln tf) idf weights, scikit-learn's sublinear_tf=True; one idf is that of the query, and
    factor is the norm of the passage's vector. BM25: factor is k1 (1 - b + b length / mean length).
    """
    return (1 + np.log(tf)) * idf**2 / factor if kind == "tfidf" else idf * tf / (tf + factor)


def merge_postings(runs, data, config):
    """Merge runs into the inverted index: for each term the passages that have it, in order, and its values there.

    Memory: the vocabulary, about half a MiB for each run, and one range of postings.
    """
    terms = set()
    for run in runs:
        terms.update(np.load(run)["terms"].tolist())
    terms = np.array(sorted(terms), f"S{WORD_BYTES}")
    places = [np.searchsorted(terms, np.load(run)["terms"]).astype(np.uint32) for run in runs]
    counts, lengths = ([np.load(run)[name] for run in runs] for name in ("counts", "lengths"))
    first_docs = np.cumsum([0, *map(len, lengths)])
    df = np.zeros(len(terms), np.int64)
    for place, count in zip(places, counts, strict=True):
        df[place] += count
    starts = np.concatenate([[0], np.cumsum(df)])
    if not starts[-1]:
        raise InputError(f"{config.passages}: no passage has a word that is indexed")
    idf = term_idf(config.kind, df, first_docs[-1]).astype(np.float32)
    lengths = np.concatenate(lengths)
    if config.kind == "bm25":
        factors = config.k1 * (1 - config.b + config.b * lengths / lengths.mean())
    else:  # the norms of the passages' vectors
        factors = np.zeros(len(lengths))
        for number, run in enumerate(runs):
            postings = np.load(run.with_suffix(".npy"))
            vectors = (1 + np.log(postings["tf"])) * np.repeat(idf[places[number]], counts[number])
            np.add.at(factors, postings["doc"] + first_docs[number], vectors**2)
        factors = np.sqrt(np.maximum(factors, 1e-30))
    factors = factors.astype(np.float32)
    greatest, first, read = np.zeros(len(terms), np.float32), 0, np.zeros(len(runs), np.int64)
    with (
        common.progress(desc="merging", total=int(starts[-1]), quiet=config.quiet) as bar,
        open(data / "docs", "wb") as docs_file,
        open(data / "values", "wb") as values_file,
    ):
        while first < len(terms):
            size = max(RANGE, 4096 * len(runs))  # opening a run takes as much time as merging 4,096 postings
            last = max(int(np.searchsorted(starts, starts[first] + size, side="right")) - 1, first + 1)
            parts = []
            for number, run in enumerate(runs):
                low, high = np.searchsorted(places[number], np.array([first, last], np.uint32))
                place = np.repeat(places[number][low:high], counts[number][low:high])
                # Copied, so that the file is mapped only now: mapped pages count as memory of the process.
                postings = np.load(run.with_suffix(".npy"), mmap_mode="r")[read[number] :][: len(place)].copy()
                parts.append((place, postings["doc"] + np.uint32(first_docs[number]), postings["tf"]))
                read[number] += len(place)
            place, docs, tfs = map(np.concatenate, zip(*parts, strict=True))
            order = np.argsort(place, kind="stable")  # stable: the passages of a term stay in order
            place, docs, tfs = place[order], docs[order], tfs[order].astype(np.float32)
            values = passage_values(config.kind, tfs, idf[place], factors[docs])
            greatest[first:last] = np.maximum.reduceat(values, starts[first:last] - starts[first])
            docs.tofile(docs_file)
            values.tofile(values_file)
            bar.update(len(docs))
            first = last
    for name, column in (("terms", terms), ("starts", starts), ("greatest", greatest)):
        np.save(data / f"{name}.npy", column)


class Index:
    """An open index folder. Threads may share it. A subclass has top(queries, k)."""

    def __init__(self, folder, manifest):
        self.manifest, self.data = manifest, Path(folder, manifest["data"])
        path = Path(os.path.normpath(Path(folder, manifest["passages"])))
        if not path.is_file() or path.stat().st_size != manifest["bytes"]:
            raise InputError(f"{path}: missing, or changed since {folder} was built from it; build the index again")
        self.file, self.rank = open(path, "rb"), np.load(self.data / "rank.npy")
        self.offsets = np.load(self.data / "offsets.npy", mmap_mode="r")

    def __len__(self):
        return len(self.rank)

    def search(self, queries, k=3):
        """Returns at most k Hits for each query, best first, ties by id. A sparse hit has a word of the query."""
        if not isinstance(queries, list | tuple) or not all(isinstance(query, str) for query in queries):
            raise InputError("queries must be a list of texts")
        if type(k) is not int or k < 1:
            raise InputError(f"the number of passages must be a whole number of at least 1, not {k!r}")
        best = self.top(queries, k) if queries else []
        return [[self._hit(*found) for found in zip(*one, strict=True)] for one in best]

    def _hit(self, doc, score):
        start, end = (*self.offsets[doc : doc + 2].tolist(), os.fstat(self.file.fileno()).st_size)[:2]
        try:
            row = json.loads(os.pread(self.file.fileno(), end - start, start).split(b"\n", 1)[0])
            return Hit(row["id"], float(score), row["contents"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.file.name}: changed since the index was built; build it again") from None


def best_of(docs, scores, rank, k):
    """Returns the k best of some passages and their scores, best first, ties in the order of rank."""
    if len(scores) > k:
        keep = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
        docs, scores = docs[keep], scores[keep]
    order = np.lexsort((rank[docs], -scores))[:k]
    return docs[order], scores[order]


Term = namedtuple("Term", "greatest start stop idf")  # greatest of its values; start, stop: its slice of the postings


class SparseIndex(Index):
    """TF-IDF or BM25. A query's scores are added up in float32, one term after another, in an array of all passages."""

    def __init__(self, folder, manifest):
        super().__init__(folder, manifest)
        columns = (np.load(self.data / f"{name}.npy", mmap_mode="r") for name in ("terms", "starts", "greatest"))
        self.terms, self.starts, self.greatest = map(np.asarray, columns)
        # Plain arrays of the mapped files, because slices of an np.memmap are slow.
        self.docs = np.asarray(np.memmap(self.data / "docs", np.uint32, "r"))
        self.values = np.asarray(np.memmap(self.data / "values", np.float32, "r"))
        self.find = functools.lru_cache(1 << 16)(self._find)
        self.scores, self.lock = np.zeros(len(self), np.float32), threading.Lock()

    def _find(self, word):
        """Returns the Term of a word, or None if no passage has it."""
        key = np.array(index_term(word), self.terms.dtype)
        place = int(np.searchsorted(self.terms, key))
        if place == len(self.terms) or self.terms[place] != key:
            return None
        start, stop = self.starts[place : place + 2].tolist()
        idf = float(term_idf(self.manifest["kind"], stop - start, len(self)))
        return Term(float(self.greatest[place]), start, stop, idf)

    def parse(self, query):
        """Returns ({Term: its repeats(n)}, norm of the query), the terms with the greatest values first."""
        counts = Counter(filter(None, map(self.find, split_words(query))))
        terms = {term: counts[term] for term in sorted(counts, reverse=True)}
        if self.manifest["kind"] == "bm25":
            return terms, 1.0
        terms = {term: 1 + math.log(n) for term, n in terms.items()}
        return terms, math.sqrt(sum((repeats * term.idf) ** 2 for term, repeats in terms.items())) or 1.0

    def top(self, queries, k):
        """Returns [(passage numbers, scores)] of the k best passages for each query."""
        with self.lock:
            return [self._best(*self.parse(query), k) for query in queries]

    def _best(self, terms, norm, k):
        """Returns (passage numbers, scores) of the k best passages, exactly.

        MaxScore (Turtle and Flood, "Query evaluation", 1995). The terms with the greatest values come first. As soon as
        the remaining terms together cannot bring a new passage among the k best, their long lists of postings are not
        added up any more: they are only searched for the passages that can still be among the best.
        """
        self.scores.fill(0)
        rest = sum(repeats * term.greatest for term, repeats in terms.items())  # bounds what remaining terms can add
        rest *= 1 + 1e-7 * (10 + len(terms))  # because sums in float32 are rounded
        remaining = list(terms.items())
        while remaining:
            term, repeats = remaining[0]
            length = term.stop - term.start
            if 8 * length > len(self):  # before a shorter list, these passes over all passages cost more than they save
                floor = self._floor(k)
                if rest < floor:
                    docs = np.flatnonzero(self.scores >= floor - rest)
                    if 16 * len(docs) < length:
                        break
            values = self.values[term.start : term.stop] * np.float32(repeats)
            np.add.at(self.scores, self.docs[term.start : term.stop].astype(np.intp), values)
            rest -= repeats * term.greatest
            del remaining[0]
        else:
            docs = np.flatnonzero(self.scores >= max(self._floor(k), 1e-30))
        scores = self.scores[docs]
        for term, repeats in remaining:
            if len(docs) > 64 + k:
                keep = np.flatnonzero(scores >= np.partition(scores, -k)[-k] - rest)
                docs, scores = docs[keep], scores[keep]
            listed = self.docs[term.start : term.stop]
            at = np.minimum(listed.searchsorted(docs.astype(np.uint32)), len(listed) - 1)
            scores += (listed[at] == docs) * (self.values[term.start : term.stop][at] * np.float32(repeats))
            rest -= repeats * term.greatest
        docs, scores = best_of(docs, scores, self.rank, k)
        return docs, scores / np.float32(norm)

    def _floor(self, k):
        """A lower bound of the k-th best score: the k-th greatest of the maxima of at least 16 k groups of passages."""
        groups = max(1024, 16 * k)
        rows = len(self) // groups
        maxima = self.scores[: rows * groups].reshape(rows, groups).max(0) if rows else self.scores
        return float(np.partition(maxima, -k)[-k]) if k <= len(maxima) else 0.0


# Dense retrieval: inner products with the vectors of a Hugging Face encoder, as in the paper. torch and transformers
# are imported only here: that takes seconds, and a sparse index does not need them.

DENSE_CHUNK = 1 << 20  # bytes of passages that are embedded between two saves
BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}  # tokens of a batch, with padding


class Encoder:
    """A Hugging Face encoder on a device: texts in, vectors of length 1 out."""

    def __init__(self, name, pooling, device=None):
        import torch
        import transformers

        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:  # in another thread, the current GPU would be GPU 0
            device = torch.device("cuda", torch.cuda.current_device())
        self.torch, self.pooling, self.device = torch, pooling, device
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            self.model = transformers.AutoModel.from_pretrained(name, dtype=torch.float32).eval().to(device)
        except (OSError, ValueError) as error:
            raise InputError(f"{name}: no encoder could be loaded: {str(error).splitlines()[0]}") from None
        config = self.model.config
        self.dimensions, self.max_length = config.hidden_size, min(512, config.max_position_embeddings)

    def encode(self, texts):
        """Returns the vectors of texts: float32 [texts, dimensions], on the encoder's device."""
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # texts of similar length need little padding
        vectors = self.torch.empty((len(ids), self.dimensions), device=self.device)
        while order:
            count = max(1, BATCH_TOKENS[self.device.type] // len(ids[order[-1]]))  # the longest come first
            batch, order = order[-count:], order[:-count]
            tokens = self.tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt").to(self.device)
            with self.torch.inference_mode():
                hidden = self.model(**tokens).last_hidden_state  # [batch, tokens, dimensions]
                mask = tokens["attention_mask"][:, :, None]  # [batch, tokens, 1]
                pooled = hidden[:, 0] if self.pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
                vectors[batch] = self.torch.nn.functional.normalize(pooled, dim=-1)
        return vectors


def embed_chunk(encoder, config, path, start, end, run):
    """Write the run of one chunk of the passages file, with its vectors unless encoder is None."""
    offsets, ids, contents = read_passages(path, start, end)
    columns = {}
    if contents and encoder:
        vectors = encoder.encode([config.passage_prefix + text for text in contents])
        columns["vectors"] = vectors.cpu().numpy().astype(config.dtype)
    save_run(run, offsets, ids, **columns)


def merge_vectors(runs, data, config):
    """Write the vectors of all runs into one file [passages, dimensions], or check those of a FAISS index."""
    if config.vectors:
        if len(open_flat_index(config.vectors)) != len(np.load(data / "rank.npy")):
            raise InputError(f"{config.vectors}: it does not have one vector for each passage")
        return
    with open(data / "vectors", "wb") as file:
        for run in common.progress(runs, desc="merging", quiet=config.quiet):
            np.load(run).get("vectors", np.empty(0)).tofile(file)


def open_flat_index(path):
    """Returns the vectors of a FAISS flat inner-product index, mapped into memory: float32 [vectors, dimensions].

    Its header (faiss/impl/index_write.cpp): "IxFI", dimensions, number of vectors, two unused numbers, trained, metric
    (0 is the inner product), number of floats.
    """
    try:
        header = np.fromfile(path, np.dtype("S4, <i4, <i8, 2<i8, u1, <i4, <u8"), 1)
        kind, dimensions, count, _, _, metric, floats = header[0].tolist()
        if kind != b"IxFI" or metric != 0 or floats != count * dimensions:
            raise ValueError(f"it starts with {kind!r}, metric {metric}")
        # Copy-on-write ("c"), because torch warns about read-only arrays.
        return np.memmap(path, "<f4", "c", header.nbytes, (count, dimensions))
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path}: not a complete FAISS flat inner-product index: {error}") from None


class DenseIndex(Index):
    """Vectors and their encoder. The vectors are copied to the GPU if they fit, otherwise read from the mapped file."""

    def __init__(self, folder, manifest, device=None):
        super().__init__(folder, manifest)
        self.encoder = Encoder(manifest["encoder"], manifest["pooling"], device)
        torch, device = self.encoder.torch, self.encoder.device
        if manifest["vectors"]:
            vectors = open_flat_index(os.path.normpath(Path(folder, manifest["vectors"])))
        else:
            vectors = np.memmap(self.data / "vectors", manifest["dtype"], "c").reshape(len(self), -1)
        if vectors.shape[1] != self.encoder.dimensions:
            raise InputError(f"{folder}: {vectors.shape[1]} dimensions, but the encoder has {self.encoder.dimensions}")
        self.vectors = torch.from_numpy(np.asarray(vectors))  # [passages, dimensions]
        if device.type == "cuda" and vectors.nbytes < 0.8 * torch.cuda.mem_get_info(device)[0]:
            self.vectors = self.vectors.to(device)
        self.waiting, self.lock = queue.SimpleQueue(), threading.Lock()

    def top(self, queries, k):
        """Returns [(passage numbers, scores)] of the k best passages for each query.

        Queries that threads ask at the same moment become one batch: all vectors are read once for all of them.
        A GPU's torch.OutOfMemoryError is raised unchanged in every thread, so that the caller can free memory.
        """
        future = Future()
        self.waiting.put((queries, k, future))
        with self.lock:
            if not future.done():  # otherwise another thread answered while this one waited for the lock
                jobs = [self.waiting.get() for _ in range(self.waiting.qsize())]
                try:
                    texts = [query for queries, _, _ in jobs for query in queries]
                    vectors = self.encoder.encode([self.manifest["query_prefix"] + text for text in texts])
                    most = max(k for _, k, _ in jobs)
                    best = iter(search_vectors(self.vectors, vectors.to(self.vectors.device), most, self.rank))
                    for queries, k, waiting in jobs:
                        waiting.set_result([tuple(column[:k] for column in next(best)) for _ in queries])
                except BaseException as error:
                    for _, _, waiting in jobs:
                        waiting.set_exception(error)
        return future.result()


def search_vectors(vectors, queries, k, rank):
    """Returns [(vector numbers, inner products)] of the k greatest inner products of each query, ties by rank.

    vectors: [vectors, dimensions]; queries: float32 [queries, dimensions]; both on one device. rank: [vectors], NumPy.
    """
    import torch

    # The products of a block take 2 MiB, so that they stay in a CPU's cache; on a GPU they take 64 MiB.
    block = max(2048, 32 * k, (1 << 24 if vectors.is_cuda else 1 << 19) // len(queries))
    floor = torch.full((len(queries), 1), -torch.inf, device=vectors.device)  # a lower bound of the k-th greatest
    found = []
    for start in range(0, len(vectors), block):
        part = vectors[start : start + block].float()
        if vectors.is_cuda:
            products = queries @ part.T  # [queries, block]
        else:  # NumPy's matrix product was up to twice as fast as torch's for one query
            products = torch.from_numpy(queries.numpy() @ part.numpy().T)
        padding = -len(part) % 32
        products = torch.nn.functional.pad(products, (0, padding), value=-torch.inf) if padding else products
        products = products.view(len(queries), 32, -1)  # [queries, 32, groups]
        maxima = products.amax(1)  # [queries, groups]; only groups that reach the floor are looked at
        if maxima.shape[1] >= k:
            floor = torch.maximum(floor, maxima.topk(k, dim=1).values[:, -1:])
        query, group = torch.nonzero(maxima >= floor, as_tuple=True)
        products = products[query, :, group]  # [pairs of query and group, 32]
        pair, row = torch.nonzero((products >= floor[query]) & (products > -torch.inf), as_tuple=True)
        columns = query[pair], start + row * maxima.shape[1] + group[pair], products[pair, row]
        found.append([column.cpu().numpy() for column in columns])
    query, vector, product = map(np.concatenate, zip(*found, strict=True))
    order = np.argsort(query, kind="stable")
    parts = np.split(order, np.searchsorted(query[order], np.arange(1, len(queries))))  # one for each query
    return [best_of(vector[own], product[own], rank, k) for own in parts]


# Search-R1's /retrieve protocol (search_r1/search/retrieval_server.py), for the server and for the client.
# POST /retrieve {"queries": [...], "topk": 3, "return_scores": true} is answered with {"result": [[{"document": {"id",
# "contents"}, "score"}, ...], ...]}, without scores with {"result": [[{"id", "contents"}, ...], ...]}.


def answer_request(index, method, path, body):
    """Answer POST /retrieve and GET /health from an open index. Returns (HTTP status, JSON value)."""
    if (method, path) == ("GET", "/health"):
        return 200, {"passages": len(index), "kind": index.manifest["kind"]}
    if (method, path.rstrip("/")) != ("POST", "/retrieve"):
        return 404, {"error": "POST /retrieve, or GET /health"}
    found = index.search(body.get("queries"), 3 if body.get("topk") is None else body["topk"])
    hits = [[{"document": {"id": id, "contents": text}, "score": score} for id, score, text in one] for one in found]
    return 200, {"result": hits if body.get("return_scores") else [[hit["document"] for hit in one] for one in hits]}


class RemoteIndex:
    """An index behind `retriever.py serve`, or any other server with Search-R1's /retrieve. Threads may share it."""

    def __init__(self, url, retries=3):  # about 3 seconds: within the time-out of one code action
        self.url = url.rstrip("/").removesuffix("/retrieve") + "/retrieve"
        self.session = http_session(retries)

    def search(self, queries, k=3):
        body = {"queries": queries, "topk": k, "return_scores": True}
        try:
            response = self.session.post(self.url, json=body, timeout=(10, 300))
            answer = response.json()
            if response.status_code != 200:
                raise ValueError(f"status {response.status_code}: {answer.get('error')}")
            return [
                [Hit(str(hit["document"]["id"]), hit["score"], hit["document"]["contents"]) for hit in hits]
                for hits in answer["result"]
            ]
        except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.url}: no answer in the format of Search-R1's /retrieve: {error}") from None


def load(where, device=None):
    """Open an index: a folder, or the http(s) URL of a server.

    device: where a dense index keeps its encoder and vectors, "cpu" or "cuda:0"; by default the current GPU, if any.
    Raises InputError if there is no index, or one of another format, or if its passages have changed.
    """
    if str(where).startswith(("http://", "https://")):
        return RemoteIndex(str(where))
    manifest = _read_json(Path(where, "index.json"))
    if manifest.get("format") != FORMAT:
        problem = f"index format {manifest['format']}, not {FORMAT}" if manifest else "no index here"
        command = f"python retriever.py build PASSAGES {where} --kind {manifest.get('kind', 'bm25')}"
        raise InputError(f"{where}: {problem}; build it: {command}")
    return DenseIndex(where, manifest, device) if manifest["kind"] == "dense" else SparseIndex(where, manifest)


def run_build(config):
    """Build an index of a passages file."""
    build(**vars(config))


@dataclasses.dataclass(kw_only=True)
class SearchConfig:
    index: str = option(REQUIRED, "folder of an index, or the URL of a server", positional=True)
    query: str = option(REQUIRED, "what to look for", positional=True)
    k: int = option(3, "how many passages", above=0)  # as in the paper


def run_search(config):
    """Print the best passages for a query."""
    hits = load(config.index).search([config.query], config.k)[0]
    for place, hit in enumerate(hits, 1):
        title, _, text = hit.contents.partition("\n")
        print(f"{place}. {title}   ({hit.id}, {hit.score:.4f})\n   {text}\n")
    if not hits:
        print("no passage has a word of this query")


@dataclasses.dataclass(kw_only=True)
class ServeConfig:
    index: str = option(REQUIRED, "folder of an index", positional=True)
    host: str = option("127.0.0.1", "address to listen on; the default is this machine only")
    port: int = option(8000, "port to listen on; 0 chooses a free one")


def run_serve(config):
    """Serve an index over HTTP, with Search-R1's /retrieve protocol."""
    index = load(config.index)
    server = common.serve_json(functools.partial(answer_request, index), config.host, config.port)
    print(f"{len(index):,} passages at http://{config.host}:{server.server_address[1]}/retrieve", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    commands = {
        "build": (BuildConfig, run_build),
        "search": (SearchConfig, run_search),
        "serve": (ServeConfig, run_serve),
    }
    common.run_command_line(__doc__, commands)
