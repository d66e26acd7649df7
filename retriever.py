"""Search over passages: exact TF-IDF, BM25 and dense retrieval, from a thousand passages to all of Wikipedia.

    python retriever.py build passages.jsonl runs/index                   # BM25; killed? the same command continues
    python retriever.py build passages.jsonl runs/e5 --kind dense         # intfloat/e5-base-v2, the paper's retriever
    python retriever.py search runs/index "Who founded the company that makes the Walkman?"
    python retriever.py serve runs/index --port 8000                      # POST /retrieve, as in Search-R1

Passages are JSON lines {"id": "...", "contents": "\\"Title\\"\\ntext"}. The index refers to their file by its path, and
reads passages from it by offset. From Python:

    retriever.build("passages.jsonl", "runs/index", kind="bm25")
    hits = retriever.load("runs/index").search(["a query", "another"], k=3)

In this order below: the index folder, the weights of TF-IDF and BM25, the inverted index, search, dense vectors, the
server and its client. How a text becomes words is in common/passages.py.
"""

import dataclasses
import functools
import hashlib
import math
import os
import re
import shutil
import threading
import types
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import requests

import common
from common import REQUIRED, InputError, option
from common.passages import STOP_WORDS, WORD_BYTES, Hit, invert, parse_passage, query_terms, read_passages, valid_text


@dataclasses.dataclass(kw_only=True)
class BuildConfig:
    passages: str = option(REQUIRED, "passages: JSON lines with id and contents", positional=True)
    out: str = option(REQUIRED, "folder of the index", positional=True)
    kind: Literal["bm25", "tfidf", "dense"] = option("bm25", "how passages are scored")
    # BM25. These defaults have the best recall on 100 HotpotQA training questions (bench/retriever.py recall).
    k1: float = option(1.5, "BM25: how much repetitions of a word add", at_least=0, at_most=1000)
    b: float = option(0.9, "BM25: how much long passages are penalised", at_least=0, at_most=1)
    # Dense. The default is the paper's retriever.
    encoder: str = option("intfloat/e5-base-v2", "dense: an encoder of the E5 family, name or folder")
    vectors: str | None = option(None, "dense: use the vectors of this FAISS flat index, in the order of the passages")
    quiet: bool = option(False, "no progress bar")


# The index folder
#
#   index.json        the options of the build, "format", "passages" (their path from this folder), their "bytes",
#                     "sha256" and "modified_ns", "data" ("data-1"), "files" of data-1 {name: bytes}
#   data-1/           of every index:
#     offsets.npy     int64 [passages]: where a passage's line begins in the passages file
#     rank.npy        uint32 [passages]: a passage's place in the order of ids, which breaks ties between scores
#                     of TF-IDF and BM25, an inverted index:
#     terms.npy       S32 [terms]: sorted
#     starts.npy      int64 [terms + 1]: the postings of term t are those from starts[t] to starts[t + 1]
#     docs            uint32 [postings]: the passages that have the term, in order
#     values          float32 [postings]: the term's value in each of them, see passage_values
#                     dense, unless the option "vectors" names a FAISS index:
#     vectors         float32 [passages, dimensions]
#   building/         while a build runs: plan.json, and for each finished chunk of passages a run (.npz and .npy)
#
# The runs survive a killed build, and are merged into the index. index.json is replaced when the new data is complete.

FORMATS = {"bm25": 4, "tfidf": 4, "dense": 3}  # an index of another format is refused


def build(passages, out, kind="bm25", **settings):
    """Build an index of a passages file in the folder `out`. An existing index is replaced when the new one is done.

    settings: the fields of BuildConfig. If a build is killed, the same call continues with the chunks that are left.
    Raises InputError for bad settings, for bad passages with file and line, and if a file cannot be read or written.
    """
    config = BuildConfig(passages=str(passages), out=str(out), kind=kind, **settings)
    common.check_numbers(config)
    if kind not in FORMATS:
        raise InputError(f"kind {kind!r}: must be one of {', '.join(FORMATS)}")
    if not Path(passages).is_file():
        raise InputError(f"{passages}: no such file")
    try:
        with common.Journal(Path(out, "build.lock")):  # refuses a second build in this folder at the same time
            _build(config, Path(passages), Path(out))
    except OSError as error:
        raise InputError(f"{error.filename or out}: {error.strerror or error}; the same command continues") from None


def _build(config, source, out):
    plan = {name: value for name, value in vars(config).items() if name not in ("out", "quiet")}
    plan |= {name: plan[name] and relative_path(plan[name], out) for name in ("passages", "vectors")}
    plan |= {"format": FORMATS[config.kind], "bytes": source.stat().st_size, "sha256": hash_file(source)}
    modified = {"modified_ns": source.stat().st_mtime_ns}
    manifest = read_manifest(out)
    if manifest.items() >= modified.items():
        manifest.setdefault("sha256", plan["sha256"])  # the first dense indexes of format 3 have none
    if manifest.items() >= plan.items() and not incomplete_files(out, manifest):
        common.write_json(out / "index.json", manifest | modified)
        print(f"{out}: already built")
        return
    work, dense = out / "building", config.kind == "dense"
    if read_manifest(work, "plan.json") != plan:
        shutil.rmtree(work, ignore_errors=True)
        common.write_json(work / "plan.json", plan)
    shutil.rmtree(work / "data", ignore_errors=True)
    (work / "data").mkdir()
    columns_of = invert
    if dense:
        columns_of = functools.partial(embed, None if config.vectors else Encoder(config.encoder))
    with common.progress(desc="reading", total=plan["bytes"], unit="B", quiet=config.quiet) as bar:
        runs = write_runs(columns_of, source, work, DENSE_CHUNK if dense else CHUNK, bar)
    merge_passages(runs, source, work / "data")
    (merge_vectors if dense else merge_postings)(runs, work / "data", config)
    files = {path.name: path.stat().st_size for path in sorted((work / "data").iterdir())}
    data = "data-2" if manifest.get("data") == "data-1" else "data-1"
    shutil.rmtree(out / data, ignore_errors=True)
    os.replace(work / "data", out / data)
    common.write_json(out / "index.json", {**plan, **modified, "data": data, "files": files})
    for folder in {work, *out.glob("data-*")} - {out / data}:
        shutil.rmtree(folder)


def relative_path(path, folder):
    """Returns the path from a folder to a file, without symbolic links before the name: both can be moved together."""
    path = Path(path)
    return os.path.relpath(path.parent.resolve() / path.name, Path(folder).resolve())


def hash_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder, name="index.json"):
    path = folder / name
    return common.parse_object(path.read_bytes(), str(path)) if path.exists() else {}


def incomplete_files(folder, manifest):
    """Returns the names of data files that do not have the size that the manifest says."""
    sizes = {path: path.stat().st_size for path in folder.glob("data-*/*")}
    files = manifest.get("files", {}).items()
    return [name for name, size in files if sizes.get(folder / manifest["data"] / name) != size]


def save_array(path, array):
    """np.save that raises an error if the disk is full. For a real file, np.save ignores the errors of closing it."""
    with common.replace_file(path, "wb") as file:
        np.save(types.SimpleNamespace(write=file.write), array)


def write_runs(columns_of, path, work, size, bar):
    """Write columns_of(contents) for each chunk of `size` bytes that has no run. Returns the files of all runs."""
    runs = []
    for start in range(0, path.stat().st_size, size):
        runs.append(work / f"run-{start // size:06d}.npz")
        if not runs[-1].exists():
            offsets, ids, contents = read_passages(path, start, start + size)
            columns = columns_of(contents)
            if "postings" in columns:  # in a file of their own, because they are read in parts
                save_array(runs[-1].with_suffix(".npy"), columns.pop("postings"))
            with common.replace_file(runs[-1], "wb") as file:
                np.savez(file, offsets=np.array(offsets, np.int64), ids=np.array(ids or [], "S"), **columns)
        bar.update(size)
    return runs


def merge_passages(runs, source, data):
    """Write the offsets of all passages, and their ranks in the order of ids."""
    offsets, ids = ([np.load(run)[name] for run in runs] for name in ("offsets", "ids"))
    if not sum(map(len, ids)):
        raise InputError(f"{source}: no passages in it")
    ids = np.concatenate(ids)
    order = np.argsort(ids, kind="stable")
    same = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])
    if same.size:
        raise InputError(f"{source}: the id {ids[order[same[0]]].decode()!r} occurs twice; ids must differ")
    save_array(data / "rank.npy", np.argsort(order).astype(np.uint32))
    save_array(data / "offsets.npy", np.concatenate(offsets))


# The weights. The score of a passage is the sum of repeats(n) x value(term, passage) over the terms of the query, where
# n is how often the query has the term: n for BM25, 1 + ln n for TF-IDF, which is then divided by the query's norm.


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


def passage_factors(runs, terms, idf, config):
    """Returns the factors of passage_values, float32 [passages]. Stop words add to no length and to no norm."""
    lengths = np.concatenate([run.lengths for run in runs])
    if config.kind == "bm25":
        factors = config.k1 * (1 - config.b + config.b * lengths / (lengths.mean() or 1))
    else:
        idf = np.where(np.isin(terms, list(STOP_WORDS)), 0, idf)
        squares = np.zeros(len(lengths))
        for run in runs:
            postings = np.load(run.postings)
            weights = (1 + np.log(postings["tf"])) * np.repeat(idf[run.places], run.counts)
            np.add.at(squares, postings["doc"] + run.first_doc, weights**2)
        factors = np.sqrt(np.where(squares > 0, squares, 1))
    return factors.astype(np.float32)


# The inverted index of TF-IDF and BM25

CHUNK = 4 << 20  # bytes of passages that are inverted at once; sets the memory of a build
RANGE = 1 << 20  # postings that are merged at once


class Run:
    """The inverted index of one chunk, of which merge_postings takes the postings term by term."""

    def __init__(self, file, terms, first_doc):
        columns = np.load(file)
        self.postings = file.with_suffix(".npy")
        self.places = np.searchsorted(terms, columns["terms"]).astype(np.uint32)  # of its terms among all terms
        self.counts = columns["counts"]
        self.lengths = columns["lengths"]
        self.first_doc = np.uint32(first_doc)
        self.taken = 0

    def take(self, first, last):
        """Returns (places, passage numbers, tf) of the postings of terms first to last - 1, which come next."""
        low, high = np.searchsorted(self.places, np.array([first, last], np.uint32))
        places = np.repeat(self.places[low:high], self.counts[low:high])
        # Copied, so that the file is mapped only now: mapped pages count as memory of the process.
        postings = np.load(self.postings, mmap_mode="r")[self.taken :][: len(places)].copy()
        self.taken += len(places)
        return places, postings["doc"] + self.first_doc, postings["tf"]


def merge_postings(files, data, config):
    """Merge runs into the inverted index.

    Memory: the vocabulary, about half a MiB for each run, and one range of postings. The postings are written in order:
    a scatter into mapped files is shorter, but needs all of them in memory, and a full disk kills it without an error.
    """
    terms = set()
    for file in files:
        terms.update(np.load(file)["terms"].tolist())
    terms = np.array(sorted(terms), f"S{WORD_BYTES}")
    runs, count, df = [], 0, np.zeros(len(terms), np.int64)
    for file in files:
        runs.append(Run(file, terms, count))
        count += len(runs[-1].lengths)
        df[runs[-1].places] += runs[-1].counts
    starts = np.concatenate([[0], np.cumsum(df)])
    if not starts[-1]:
        raise InputError(f"{config.passages}: no passage has a word")
    idf = term_idf(config.kind, df, count).astype(np.float32)
    factors = passage_factors(runs, terms, idf, config)
    size = max(RANGE, 4096 * len(runs))  # opening a run takes as much time as merging 4,096 postings
    first = 0
    with (
        common.progress(desc="merging", total=int(starts[-1]), quiet=config.quiet) as bar,
        common.replace_file(data / "docs", "wb") as docs_file,
        common.replace_file(data / "values", "wb") as values_file,
    ):
        while first < len(terms):
            last = max(int(np.searchsorted(starts, starts[first] + size, side="right")) - 1, first + 1)
            places, docs, tfs = map(np.concatenate, zip(*(run.take(first, last) for run in runs), strict=True))
            order = np.argsort(places, kind="stable")  # stable: the passages of a term stay in order
            places, docs, tfs = places[order], docs[order], tfs[order].astype(np.float32)
            values = passage_values(config.kind, tfs, idf[places], factors[docs])
            docs_file.write(docs)
            values_file.write(values)
            bar.update(len(docs))
            first = last
    save_array(data / "terms.npy", terms)
    save_array(data / "starts.npy", starts)


# Search


def load(where, device=None):
    """Open an index: a folder, or the http(s) URL of a server.

    device: where a dense index keeps its encoder and vectors, "cpu" or "cuda:0"; by default the current GPU, if any.
    Raises InputError if there is no index, if it is of another format or incomplete, or if its passages have changed.
    """
    if str(where).startswith(("http://", "https://")):
        return RemoteIndex(str(where))
    folder, command = Path(where), f"python retriever.py build PASSAGES {where}"
    try:
        manifest = read_manifest(folder)
        kind, found = manifest.get("kind"), manifest.get("format")
        if not manifest:
            raise InputError(f"{where}: no index here; build it: {command}")
        if found != FORMATS.get(kind):
            needed = FORMATS.get(kind, "one of this program")
            raise InputError(f"{where}: index format {found}, not {needed}; build it: {command} --kind {kind}")
        for name in incomplete_files(folder, manifest):
            raise InputError(f"{where}: {name} is missing or incomplete; build it: {command} --kind {kind}")
        return DenseIndex(folder, manifest, device) if kind == "dense" else SparseIndex(folder, manifest)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{where}: the index is damaged ({reason}); delete it and build it: {command}") from None


class Index:
    """An open index folder. Threads may share it. A subclass has top(queries, k)."""

    def __init__(self, folder, manifest):
        path = Path(os.path.normpath(folder.resolve() / manifest["passages"]))
        same = path.is_file() and path.stat().st_size == manifest["bytes"]
        if same and path.stat().st_mtime_ns != manifest["modified_ns"]:  # copied, or edited?
            same = manifest.get("sha256") in (None, hash_file(path))
        if not same:
            raise InputError(f"{path}: missing, or changed since {folder} was built from it; build the index again")
        self.manifest = manifest
        self.data = folder / manifest["data"]
        self.file = open(path, "rb")
        self.rank = np.load(self.data / "rank.npy")
        self.offsets = np.load(self.data / "offsets.npy", mmap_mode="r")

    def __len__(self):
        return len(self.rank)

    def search(self, queries, k=3):
        """Returns at most k Hits for each query, best first, ties by id. A sparse hit has a word of the query."""
        if not isinstance(queries, list | tuple) or not all(isinstance(query, str) for query in queries):
            raise InputError("queries must be a list of texts")
        if type(k) is not int or k < 1:
            raise InputError(f"the number of passages must be a whole number of at least 1, not {k!r}")
        best = self.top(queries, min(k, len(self))) if queries else []
        return [[self._hit(*found) for found in zip(*one, strict=True)] for one in best]

    def _hit(self, doc, score):
        start, end = (*self.offsets[doc : doc + 2].tolist(), os.fstat(self.file.fileno()).st_size)[:2]
        try:
            id, contents = parse_passage(os.pread(self.file.fileno(), end - start, start).split(b"\n", 1)[0])
            return Hit(id, float(score), contents)
        except ValueError:
            raise InputError(f"{self.file.name}: changed since the index was built; build it again") from None


def best_of(docs, scores, rank, k):
    """Returns the k best of some passages and their scores, best first, ties in the order of rank."""
    if len(scores) > k:
        keep = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
        docs, scores = docs[keep], scores[keep]
    order = np.lexsort((rank[docs], -scores))[:k]
    return docs[order], scores[order]


class SparseIndex(Index):
    """TF-IDF or BM25. A query's scores are added up in float32, one term after another, in an array of all passages."""

    def __init__(self, folder, manifest):
        super().__init__(folder, manifest)
        # Plain arrays of the mapped files, because slices of an np.memmap are slow.
        self.terms = np.asarray(np.load(self.data / "terms.npy", mmap_mode="r"))
        self.starts = np.asarray(np.load(self.data / "starts.npy", mmap_mode="r"))
        self.docs = np.asarray(np.memmap(self.data / "docs", np.uint32, "r"))
        self.values = np.asarray(np.memmap(self.data / "values", np.float32, "r"))
        self.find = functools.lru_cache(1 << 16)(self._find)  # a search of the vocabulary takes 5 us
        self.scores = np.zeros(len(self), np.float32)
        self.lock = threading.Lock()

    def _find(self, term):
        """Returns the (start, stop) of a term's postings, or None if no passage has it."""
        key = np.array(term, self.terms.dtype)
        place = int(np.searchsorted(self.terms, key))
        found = place < len(self.terms) and self.terms[place] == key
        return tuple(self.starts[place : place + 2].tolist()) if found else None

    def top(self, queries, k):
        """Returns [(passage numbers, scores)] of the k best passages for each query."""
        with self.lock:
            return [self._best(query, k) for query in queries]

    def _best(self, query, k):
        """Returns (passage numbers, scores) of the k best passages of those with a word of the query."""
        squares = 0.0  # of the query's weights, for TF-IDF
        self.scores.fill(0)
        for (start, stop), repeats in Counter(filter(None, map(self.find, query_terms(query)))).items():
            if self.manifest["kind"] == "tfidf":
                repeats = 1 + math.log(repeats)
                squares += (repeats * term_idf("tfidf", stop - start, len(self))) ** 2
            values = self.values[start:stop] if repeats == 1 else self.values[start:stop] * np.float32(repeats)
            np.add.at(self.scores, self.docs[start:stop].astype(np.intp), values)
        docs = np.flatnonzero(self.scores >= max(self._floor(k), 1e-30))
        docs, scores = best_of(docs, self.scores[docs], self.rank, k)
        return docs, scores / np.float32(math.sqrt(squares) or 1)

    def _floor(self, k):
        """A lower bound of the k-th best score: the k-th greatest of the maxima of at least 16 k groups of passages."""
        groups = max(1024, 16 * k)
        rows = len(self) // groups
        maxima = self.scores[: rows * groups].reshape(rows, groups).max(0) if rows else self.scores
        return float(np.partition(maxima, -k)[-k]) if k <= len(maxima) else 0.0


# Dense retrieval: inner products with the vectors of a Hugging Face encoder, as in the paper. torch and transformers
# are imported only here: that takes seconds, and a sparse index does not need them.

DENSE_CHUNK = 1 << 20  # bytes of passages that are embedded between two saves
DENSE_BATCH = 64  # texts that are embedded at once
# E5 (its model card): the mean of the token vectors, and a prefix. An index that names others is refused.
QUERY_PREFIX, PASSAGE_PREFIX = "query: ", "passage: "
RECIPE = {"query_prefix": QUERY_PREFIX, "passage_prefix": PASSAGE_PREFIX, "pooling": "mean", "dtype": "float32"}


class Encoder:
    """A Hugging Face encoder on a device: texts in, vectors of length 1 out."""

    def __init__(self, name, device=None):
        import torch
        import transformers

        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:  # in another thread, the current GPU would be GPU 0
            device = torch.device("cuda", torch.cuda.current_device())
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            self.model = transformers.AutoModel.from_pretrained(name, dtype=torch.float32).eval()
            self.dimensions = self.model.config.hidden_size
            self.max_length = min(512, self.model.config.max_position_embeddings)
        except Exception as error:  # whatever is wrong with its files
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{name}: no encoder could be loaded: {reason}") from None
        self.model.to(device)
        self.torch = torch
        self.device = device

    def encode(self, texts):
        """Returns the vectors of texts: float32 [texts, dimensions], on the encoder's device."""
        texts = [valid_text(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of similar length need little padding
        vectors = self.torch.empty((len(texts), self.dimensions), device=self.device)
        how = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        for start in range(0, len(order), DENSE_BATCH):
            batch = order[start : start + DENSE_BATCH]
            tokens = self.tokenizer([texts[i] for i in batch], **how).to(self.device)
            with self.torch.inference_mode():
                hidden = self.model(**tokens).last_hidden_state  # [batch, tokens, dimensions]
                mask = tokens["attention_mask"][:, :, None]  # [batch, tokens, 1]
                mean = (hidden * mask).sum(1) / mask.sum(1)  # [batch, dimensions]
                vectors[batch] = self.torch.nn.functional.normalize(mean, dim=-1)
        return vectors


def embed(encoder, contents):
    """Returns the columns of a run: the vectors of its passages, unless encoder is None."""
    if not contents or not encoder:
        return {}
    return {"vectors": encoder.encode([PASSAGE_PREFIX + text for text in contents]).cpu().numpy()}


def merge_vectors(runs, data, config):
    """Write the vectors of all runs into one file [passages, dimensions], or check those of a FAISS index."""
    if config.vectors:
        if len(open_flat_index(config.vectors)) != len(np.load(data / "rank.npy")):
            raise InputError(f"{config.vectors}: it does not have one vector for each passage")
        return
    with common.replace_file(data / "vectors", "wb") as file:
        for run in common.progress(runs, desc="merging", quiet=config.quiet):
            file.write(np.load(run).get("vectors", b""))


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
    """Vectors and their encoder. The vectors are copied to the GPU if they fit, otherwise read from the mapped file.

    A mapped file is in memory once for all processes of a machine. With several GPUs (torchrun), each process copies
    the vectors to its own: for Wikipedia's 65 GB, run `retriever.py serve` once and give its URL to all of them.
    """

    def __init__(self, folder, manifest, device=None):
        super().__init__(folder, manifest)
        for name, value in RECIPE.items():
            if manifest.get(name, value) != value:
                raise InputError(f"{folder}: built with {name} {manifest[name]!r}, not {value!r}; build it again")
        if manifest["vectors"]:
            vectors = open_flat_index(os.path.normpath(folder.resolve() / manifest["vectors"]))
        else:
            vectors = np.memmap(self.data / "vectors", np.float32, "c").reshape(len(self), -1)
        self.encoder = Encoder(manifest["encoder"], device)
        if vectors.shape != (len(self), self.encoder.dimensions):
            described = f"{vectors.shape[0]} vectors of {vectors.shape[1]} dimensions"
            raise InputError(f"{folder}: {described}, but {len(self)} of {self.encoder.dimensions} are needed")
        torch, device = self.encoder.torch, self.encoder.device
        self.vectors = torch.from_numpy(np.asarray(vectors))  # [passages, dimensions]
        if device.type == "cuda" and vectors.nbytes < 0.8 * torch.cuda.mem_get_info(device)[0]:
            self.vectors = self.vectors.to(device)
        self.lock = threading.Lock()

    def top(self, queries, k):
        """Returns [(passage numbers, scores)] of the k best passages for each query.

        A GPU's torch.OutOfMemoryError is raised unchanged, so that the caller can free memory.
        """
        with self.lock:  # several threads at once would need as many times the memory
            vectors = self.encoder.encode([QUERY_PREFIX + query for query in queries])
            return search_vectors(self.vectors, vectors.to(self.vectors.device), k, self.rank)


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
        part = vectors[start : start + block]
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


# The server and its client: Search-R1's /retrieve protocol (search_r1/search/retrieval_server.py). POST /retrieve
# {"queries": [...], "topk": 3, "return_scores": true} is answered with {"result": [[{"document": {"id", "contents"},
# "score"}, ...], ...]}, without scores with {"result": [[{"id", "contents"}, ...], ...]}.


def answer_request(index, method, path, body):
    """Answer POST /retrieve from an open index. Returns (HTTP status, JSON value)."""
    if (method, path.rstrip("/")) != ("POST", "/retrieve"):
        return 404, {"error": "POST /retrieve"}
    found = index.search(body.get("queries"), 3 if body.get("topk") is None else body["topk"])
    hits = [[{"document": {"id": id, "contents": text}, "score": score} for id, score, text in one] for one in found]
    return 200, {"result": hits if body.get("return_scores") else [[hit["document"] for hit in one] for one in hits]}


class RemoteIndex:
    """An index behind `retriever.py serve`, or any other server with Search-R1's /retrieve. Threads may share it."""

    def __init__(self, url, retries=3):  # about 3 seconds: within the time-out of one code action
        self.url = url.rstrip("/").removesuffix("/retrieve") + "/retrieve"
        self.session = common.http_session(retries)
        # The environment's proxy is not asked for this machine.
        self.session.trust_env = not re.match(r"\w+://(localhost|127\.[\d.]+|0\.0\.0\.0|\[::1\])([:/]|$)", url)

    def search(self, queries, k=3):
        """As Index.search. Raises InputError in one line if the server is gone or answers anything else."""
        body = {"queries": queries, "topk": k, "return_scores": True}
        try:
            response = self.session.post(self.url, json=body, timeout=(10, 300))
        except requests.RequestException as error:
            reason = str(error).rpartition(": ")[2].strip("')\"")  # the innermost of several nested errors
            raise InputError(f"{self.url}: no answer: {reason}; start it: python retriever.py serve INDEX") from None
        try:
            answer = response.json()
            if response.status_code != 200:
                raise ValueError(f"status {response.status_code}: {answer.get('error')}")
            if len(answer["result"]) != len(queries):
                raise ValueError(f"{len(answer['result'])} results for {len(queries)} queries")
            found = [[(hit["document"], float(hit["score"])) for hit in hits] for hits in answer["result"]]
            return [[Hit(str(row["id"]), score, valid_text(row["contents"])) for row, score in one] for one in found]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:500]
            raise InputError(f"{self.url}: no answer in the format of Search-R1's /retrieve: {reason}") from None


def run_build(config):
    """Build an index of a passages file."""
    build(**vars(config))


@dataclasses.dataclass(kw_only=True)
class SearchConfig:
    index: str = option(REQUIRED, "folder of an index, or the URL of a server", positional=True)
    query: str = option(REQUIRED, "what to look for", positional=True)
    k: int = option(3, "how many passages", at_least=1)  # as in the paper


def run_search(config):
    """Print the best passages for a query."""
    hits = load(config.index).search([config.query], config.k)[0]
    for place, hit in enumerate(hits, 1):
        print(f"{place}. {hit.title}   ({hit.id}, {hit.score:.4f})\n   {hit.text}\n")
    if not hits:
        print("no passage has a word of this query")


@dataclasses.dataclass(kw_only=True)
class ServeConfig:
    index: str = option(REQUIRED, "folder of an index", positional=True)
    host: str = option("127.0.0.1", "address to listen on; the default is this machine only")
    port: int = option(8000, "port to listen on; 0 chooses a free one", at_least=0, at_most=65535)


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
