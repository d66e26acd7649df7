"""Search over passages: exact TF-IDF, BM25 and dense retrieval, from a thousand passages to all of Wikipedia.

    python retriever.py build passages.jsonl runs/index                   # BM25; if killed, run it again to continue
    python retriever.py build passages.jsonl runs/e5 --kind dense         # intfloat/e5-base-v2, the paper's retriever
    python retriever.py search runs/index "Who founded the company that makes the Walkman?"
    python retriever.py serve runs/index --port 8000                      # POST /retrieve, as in Search-R1

Passages are JSON lines {"id": "...", "contents": "\\"Title\\"\\ntext"}. The index reads them from their file.
From Python:

    retriever.build("passages.jsonl", "runs/index", kind="bm25")
    hits = retriever.load("runs/index").search(["a query", "another"], k=3)
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import re
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np

import common
from common import REQUIRED, InputError, option
from common.client import UNREADABLE, BadRequest, Connection
from common.passages import POSTING, STOP_WORDS, TERM, Hit, invert, parse_passage, query_terms, read_chunk


@dataclasses.dataclass(kw_only=True)
class BuildConfig:
    passages: str = option(REQUIRED, "passages: JSON lines with id and contents", positional=True)
    out: str = option(REQUIRED, "folder of the index", positional=True)
    kind: Literal["bm25", "tfidf", "dense"] = option("bm25", "how passages are scored")
    # BM25. These defaults have the best recall on 100 HotpotQA training questions (bench/retriever.py recall).
    k1: float = option(1.5, "BM25: how much repetitions of a word add", at_least=0, at_most=1000)
    b: float = option(0.9, "BM25: how much long passages are penalised", at_least=0, at_most=1)
    encoder: str = option("intfloat/e5-base-v2", "dense: an encoder of the E5 family; the default is the paper's")
    vectors: str | None = option(None, "dense: use the vectors of this FAISS flat index, in the order of the passages")
    quiet: bool = option(False, "no progress bar")


# The index folder. KEY is a hash of the options and the passages: a build with others does not continue these runs.
#
#   index.json        the options of the build, "format", "passages" (their path from this folder), their "bytes",
#                     "sha256" and "modified_ns", "data" (the folder's name), "files" of data {name: bytes};
#                     replaced when the new data is complete
#   data-KEY/         plain arrays:
#     offsets         int64 [passages + 1]: where a passage's line begins in the passages file, and the file's size
#     rank            uint32 [passages]: a passage's place in the order of ids, which breaks ties between scores
#     terms           S32 [terms], TF-IDF and BM25: sorted
#     starts          int64 [terms + 1]: the postings of term t are those from starts[t] to starts[t + 1]
#     postings        POSTINGs: the passages that have the term, in order, and its value in each
#     vectors         float32 [passages, dimensions], dense, unless the option "vectors" names a FAISS index
#   building-KEY/     while a build runs: for each finished chunk of passages a run (.npz and .postings)
FORMAT = 5  # an index of another format is refused
OWN_FILE = re.compile(r"offsets|rank|terms|starts|postings|vectors|run-\d+\.(npz|postings)|\..*\.partial")


def build(passages, out, kind="bm25", **settings):
    """Build an index of a passages file in the folder `out`. An existing index is replaced when the new one is done.

    settings: the fields of BuildConfig. If a build is killed, the same call continues with the chunks that are left.
    Raises InputError for bad settings, for bad passages with file and line, and if a file cannot be read or written.
    """
    config = BuildConfig(passages=str(passages), out=str(out), kind=kind, **settings)
    common.check_values(config)
    if kind not in KINDS:
        raise InputError(f"kind {kind!r}: must be one of {', '.join(KINDS)}")
    try:
        with common.Journal(Path(out, "build.lock")):  # refuses a second build in this folder at the same time
            _build(config, Path(passages), Path(out))
    except OSError as error:
        raise InputError(f"{error.filename or out}: {error.strerror or error}; the same command continues") from None


def _build(config, source, out):
    if config.kind != "bm25":
        common.refuse(config, ["k1", "b"], f"--kind {config.kind} does not use it")
    if config.kind != "dense":
        common.refuse(config, ["encoder", "vectors"], f"--kind {config.kind} does not use it")
    plan = {name: value for name, value in vars(config).items() if name not in ("out", "quiet")}
    plan |= {name: plan[name] and relative_path(plan[name], out) for name in ("passages", "vectors")}
    if Path(config.encoder).is_dir():
        plan["encoder"] = relative_path(config.encoder, out)
    plan |= {"format": FORMAT, "bytes": source.stat().st_size, "sha256": common.file_hash(source)}
    with contextlib.suppress(InputError):
        if read_manifest(out).items() >= plan.items():
            return print(f"{out}: already built")
    key = hashlib.sha256(repr(plan).encode()).hexdigest()[:8]
    work, data = out / f"building-{key}", out / f"data-{key}"
    shutil.rmtree(data, ignore_errors=True)
    if config.kind != "dense":
        columns_of, merge = invert, merge_postings
    else:
        columns_of = Encoder(config.encoder).columns if not config.vectors else lambda contents: {}
        merge = merge_vectors
    runs = write_runs(columns_of, source, work, config)
    merge(runs, data, config, merge_passages(runs, source, data))
    files = {path.name: path.stat().st_size for path in sorted(data.iterdir())}
    plan |= {"modified_ns": source.stat().st_mtime_ns, "data": data.name, "files": files}
    common.write_json(out / "index.json", plan)
    for folder in [*out.glob(f"building-{8 * '[0-9a-f]'}/"), *out.glob(f"data-{8 * '[0-9a-f]'}/")]:
        if folder != data and all(OWN_FILE.fullmatch(path.name) for path in folder.iterdir()):
            shutil.rmtree(folder)


def relative_path(path, folder):
    """Returns the path from a folder to a file, without symbolic links before the name: both can be moved together."""
    return os.path.relpath(Path(path).parent.resolve() / Path(path).name, Path(folder).resolve())


def read_manifest(folder):
    """Returns the content of index.json. Raises InputError if there is no complete index of this format."""
    path, command = folder / "index.json", f"build it: python retriever.py build PASSAGES {folder}"
    manifest = common.parse_object(path.read_bytes(), path) if path.exists() else {}
    if manifest.get("format") != FORMAT:
        raise InputError(f"{folder}: no index of format {FORMAT} here; {command}")
    for name, size in manifest["files"].items():
        file = folder / manifest["data"] / name
        if not file.is_file() or file.stat().st_size != size:
            raise InputError(f"{file} is missing or incomplete; {command} --kind {manifest['kind']}")
    return manifest


def save_array(path, array):
    with common.replace_file(path, "wb") as file:
        file.write(np.ascontiguousarray(array))


def write_runs(columns_of, source, work, config):
    """Write columns_of(contents) for each chunk of the passages that has no run. Returns the files of all runs."""
    runs, count = [], 0
    chunks = range(0, source.stat().st_size, CHUNK)
    for number, start in enumerate(common.progress(chunks, desc="reading", unit="chunk", quiet=config.quiet)):
        run = work / f"run-{number:06d}.npz"
        if not run.exists():
            offsets, ids, contents = read_chunk(source, start, start + CHUNK)
            columns = columns_of(contents)
            if "postings" in columns:  # in a file of their own, because they are read in parts
                postings = columns.pop("postings")
                postings["doc"] += count
                save_array(run.with_suffix(".postings"), postings)
            with common.replace_file(run, "wb") as file:
                np.savez(file, offsets=np.array(offsets, np.int64), ids=np.array(ids, "S"), **columns)
        runs.append(run)
        count += len(np.load(run)["ids"])
    return runs


def merge_passages(runs, source, data):
    """Write the offsets of all passages, and their ranks in the order of ids. Returns the number of passages."""
    offsets, ids = ([np.load(run)[name] for run in runs] for name in ("offsets", "ids"))
    if not sum(map(len, ids)):
        raise InputError(f"{source}: no passages in it")
    ids = np.concatenate(ids)
    order = np.argsort(ids, kind="stable")
    same = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])
    if same.size:
        raise InputError(f"{source}: the id {ids[order[same[0]]].decode()!r} occurs twice; ids must differ")
    save_array(data / "rank", np.argsort(order).astype(np.uint32))
    save_array(data / "offsets", np.concatenate([*offsets, [source.stat().st_size]]))
    return len(ids)


# TF-IDF and BM25. The score of a passage is the sum of repeats(n) x value(term, passage) over the terms of the query,
# where n is how often the query has the term. Stop words add to no length and to no norm.
#
# TF-IDF is scikit-learn's TfidfVectorizer(sublinear_tf=True): the cosine of vectors of (1 + ln n) idf. value has the
# idf of both vectors and the passage's norm in it; repeats is 1 + ln n.
# BM25 is that of Lucene 8 and bm25s' "lucene" (Kamphuis et al., "Which BM25 do you mean?", ECIR 2020); repeats is n.

CHUNK = 4 << 20  # bytes of passages that are inverted or embedded at once; sets the memory of a build
RANGE = 1 << 20  # postings that are merged at once


def term_idf(kind, df, count):
    """Returns the weight of a term that occurs in df of count passages."""
    return np.log((1 + count) / (1 + df)) + 1 if kind == "tfidf" else np.log(1 + (count - df + 0.5) / (df + 0.5))


def passage_factors(runs, terms, idf, config):
    """Returns BM25's k1 (1 - b + b length / mean length), or TF-IDF's norm, of each passage: float32 [passages]."""
    lengths = np.concatenate([np.load(run)["lengths"] for run in runs])
    if config.kind == "bm25":
        return (config.k1 * (1 - config.b + config.b * lengths / (lengths.mean() or 1))).astype(np.float32)
    idf = np.where(np.isin(terms, list(STOP_WORDS)), 0, idf)
    squares = np.zeros(len(lengths))
    for run in runs:
        [(places, postings)] = read_run(run, terms, [0, len(terms)])
        np.add.at(squares, postings["doc"], ((1 + np.log(postings["value"])) * idf[places]) ** 2)
    return np.sqrt(np.where(squares > 0, squares, 1)).astype(np.float32)


def read_run(file, terms, cuts):
    """Yield (places of the terms, POSTINGs) of a run, for each range of terms between two cuts."""
    with np.load(file) as run:
        places, counts = np.searchsorted(terms, run["terms"]).astype(np.uint32), run["counts"]
    taken = 0
    for low, high in itertools.pairwise(np.searchsorted(places, cuts)):
        found = np.repeat(places[low:high], counts[low:high])
        yield found, np.fromfile(file.with_suffix(".postings"), POSTING, len(found), offset=taken * POSTING.itemsize)
        taken += len(found)


def merge_postings(files, data, config, count):
    """Merge runs into the inverted index. Memory: the vocabulary, half a MiB for each run, and a range of postings."""
    df = Counter()
    for file in files:
        run = np.load(file)
        df.update(dict(zip(run["terms"].tolist(), run["counts"].tolist(), strict=True)))
    terms = np.array(sorted(df), TERM)
    df = np.array([df[term] for term in terms.tolist()], np.int64)
    starts = np.concatenate([[0], np.cumsum(df)])
    if not starts[-1]:
        raise InputError(f"{config.passages}: no passage has a word")
    idf = term_idf(config.kind, df, count).astype(np.float32)
    factors = passage_factors(files, terms, idf, config)
    size = max(RANGE, 4096 * len(files))  # opening a run takes as much time as merging 4,096 postings
    cuts = np.unique([*np.searchsorted(starts, np.arange(0, starts[-1], size)), len(terms)])
    ranges = zip(*(read_run(file, terms, cuts) for file in files), strict=True)
    with common.replace_file(data / "postings", "wb") as file:
        for parts in common.progress(ranges, desc="merging", total=len(cuts) - 1, quiet=config.quiet):
            places, postings = map(np.concatenate, zip(*parts, strict=True))
            order = np.argsort(places, kind="stable")  # stable: the passages of a term stay in order
            weights, postings = idf[places[order]], postings[order]
            tf, factor = postings["value"], factors[postings["doc"]]
            if config.kind == "tfidf":
                postings["value"] = (1 + np.log(tf)) * weights**2 / factor
            else:
                postings["value"] = weights * tf / (tf + factor)
            file.write(postings)
    save_array(data / "terms", terms)
    save_array(data / "starts", starts)


# Search


def is_url(where):
    return str(where).startswith(("http://", "https://"))


def check_index(where):
    """Raise InputError if the folder has no complete index. Returns a hash of its content, None for a server's URL."""
    if is_url(where):
        return None
    read_manifest(Path(where))
    return common.file_hash(Path(where) / "index.json")


def load(where, device=None):
    """Open an index: a folder, or the http(s) URL of a server.

    device: where a dense index keeps its encoder and vectors; by default a GPU, if there is one.
    Raises InputError if there is no index, if it is of another format or incomplete, or if its passages have changed.
    """
    if is_url(where):
        return RemoteIndex(str(where))
    manifest = read_manifest(Path(where))
    return KINDS[manifest["kind"]](Path(where), manifest, device)


class Index:
    """An open index folder. Threads may share it. A subclass has top(queries, k)."""

    def __init__(self, folder, manifest):
        path = Path(os.path.normpath(folder.resolve() / manifest["passages"]))
        same = path.is_file() and path.stat().st_size == manifest["bytes"]
        if same and path.stat().st_mtime_ns != manifest["modified_ns"]:  # copied, or edited?
            same = manifest["sha256"] == common.file_hash(path)
        if not same:
            raise InputError(f"{path}: missing, or changed since {folder} was built from it; build the index again")
        self.folder = folder
        self.manifest = manifest
        self.file = open(path, "rb")
        self.offsets = self.array("offsets", np.int64)
        self.rank = self.array("rank", np.uint32)
        self.lock = threading.Lock()  # several searches at once would need as many times the memory

    def array(self, name, dtype, mode="r"):
        """Returns the array in a file of the index, mapped into memory. Slices of a np.memmap itself are slow."""
        return np.asarray(np.memmap(self.folder / self.manifest["data"] / name, dtype, mode))

    def __len__(self):
        return len(self.rank)

    def search(self, queries, k=3):
        """Returns at most k Hits for each query, best first, ties by id. A sparse hit has a word of the query."""
        if not isinstance(queries, list | tuple) or not all(isinstance(query, str) for query in queries):
            raise InputError("queries must be a list of texts")
        if type(k) is not int or k < 1:
            raise InputError(f"the number of passages must be a whole number of at least 1, not {k!r}")
        with self.lock:
            best = self.top(queries, min(k, len(self))) if queries else []
        return [[self._hit(*found) for found in zip(*one, strict=True)] for one in best]

    def _hit(self, doc, score):
        start, end = self.offsets[doc : doc + 2].tolist()
        try:
            id, contents = parse_passage(os.pread(self.file.fileno(), end - start, start).split(b"\n", 1)[0])
        except UNREADABLE:
            raise InputError(f"{self.file.name}: changed since the index was built; build it again") from None
        return Hit(id, float(score), contents)


def best_of(docs, scores, rank, k):
    """Returns the k best of some passages and their scores, best first, ties in the order of rank."""
    order = np.lexsort((rank[docs], -scores))[:k]
    return docs[order], scores[order]


class SparseIndex(Index):
    """TF-IDF or BM25. A query's scores are added up in float32, one term after another, in an array of all passages."""

    def __init__(self, folder, manifest, device=None):
        super().__init__(folder, manifest)
        self.terms = self.array("terms", TERM)
        self.starts = self.array("starts", np.int64)
        self.postings = self.array("postings", POSTING)
        self.scores = np.zeros((len(self) // 1024 + 1, 1024), np.float32)

    def top(self, queries, k):
        """Returns [(passage numbers, scores)] of the k best passages for each query, of those with a word of it."""
        return [self._best(Counter(query_terms(query)), k) for query in queries]

    def _best(self, repeats, k):
        terms = np.array(list(repeats), TERM)
        weights = np.array(list(repeats.values()), np.float32)
        # An unknown term has an empty range of postings.
        starts, stops = (self.starts[np.searchsorted(self.terms, terms, side)] for side in ("left", "right"))
        norm = 1
        if self.manifest["kind"] == "tfidf":
            weights = 1 + np.log(weights)
            norm = np.linalg.norm((stops > starts) * weights * term_idf("tfidf", stops - starts, len(self))) or 1
        self.scores.fill(0)
        scores = self.scores.reshape(-1)
        for start, stop, weight in zip(starts.tolist(), stops.tolist(), weights, strict=True):
            postings = self.postings[start:stop]
            values = postings["value"] if weight == 1 else postings["value"] * weight
            np.add.at(scores, postings["doc"].astype(np.intp), values)
        # The k-th greatest of the maxima of 1024 groups of passages is a lower bound of the k-th best score.
        floor = np.partition(self.scores.max(0), -k)[-k] if k <= 1024 else 0
        docs = np.flatnonzero(scores >= max(floor, 1e-30))
        docs, scores = best_of(docs, scores[docs], self.rank, k)
        return docs, scores / np.float32(norm)


# Dense retrieval, as in the paper. torch and transformers, which take seconds to import, are imported only here.


class Encoder:
    """A Hugging Face encoder on a device: texts in, vectors of length 1 out.

    As E5 needs it (its model card): the mean of the token vectors, and "query: " or "passage: " before the text.
    """

    def __init__(self, name, device=None):
        import torch
        import transformers

        from common import models

        self.torch = torch
        self.device = models.choose_device(device or "auto")
        self.tokenizer = models.from_pretrained(transformers.AutoTokenizer, name)
        self.model = models.from_pretrained(transformers.AutoModel, name, dtype=torch.float32).to(self.device)

    def encode(self, texts):
        """Returns the vectors of texts: float32 [texts, dimensions], on the encoder's device."""
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # no halves of surrogate pairs
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of similar length need little padding
        vectors = self.torch.empty((len(texts), self.model.config.hidden_size), device=self.device)
        length = min(512, self.model.config.max_position_embeddings)
        how = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
        for start in range(0, len(order), 64):
            batch = order[start : start + 64]
            tokens = self.tokenizer([texts[i] for i in batch], **how).to(self.device)
            with self.torch.inference_mode():
                hidden = self.model(**tokens).last_hidden_state  # [batch, tokens, dimensions]
                mask = tokens["attention_mask"][:, :, None]  # [batch, tokens, 1]
                mean = (hidden * mask).sum(1) / mask.sum(1)  # [batch, dimensions]
                vectors[batch] = self.torch.nn.functional.normalize(mean, dim=-1)
        return vectors

    def columns(self, contents):
        """Returns the columns of a run: the vectors of its passages."""
        return {"vectors": self.encode([f"passage: {text}" for text in contents]).cpu().numpy()}


def merge_vectors(runs, data, config, count):
    """Write the vectors of all runs into one file [passages, dimensions], or check those of a FAISS index."""
    if config.vectors:
        return open_flat_index(config.vectors, count)
    with common.replace_file(data / "vectors", "wb") as file:
        for run in common.progress(runs, desc="merging", quiet=config.quiet):
            file.write(np.load(run)["vectors"])


def open_flat_index(path, expected):
    """Returns the vectors of a FAISS flat inner-product index, mapped into memory: float32 [expected, dimensions].

    Its header (faiss/impl/index_write.cpp): "IxFI", dimensions, number of vectors, two unused numbers, trained, metric
    (0 is the inner product), number of floats.
    """
    try:
        header = np.fromfile(path, np.dtype("S4, <i4, <i8, 2<i8, u1, <i4, <u8"), 1)
        kind, dimensions, count, _, _, metric, floats = header[0].tolist()
        if kind != b"IxFI" or metric != 0 or floats != count * dimensions or count != expected:
            raise ValueError(f"it starts with {header[0]}")
        # Copy-on-write ("c"), because torch warns about read-only arrays.
        return np.memmap(path, "<f4", "c", header.nbytes, (count, dimensions))
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path}: no complete FAISS flat inner-product index of {expected} vectors: {error}") from None


class DenseIndex(Index):
    """Vectors and their encoder. The vectors are copied to the GPU if they fit, otherwise read from the mapped file.

    Under torchrun, each process copies them to its own GPU: for Wikipedia's 65 GB, run `retriever.py serve` once.
    """

    def __init__(self, folder, manifest, device=None):
        super().__init__(folder, manifest)
        if manifest["vectors"]:
            vectors = open_flat_index(os.path.normpath(folder.resolve() / manifest["vectors"]), len(self))
        else:
            vectors = self.array("vectors", np.float32, "c").reshape(len(self), -1)  # "c": see open_flat_index
        local = os.path.normpath(folder.resolve() / manifest["encoder"])
        self.encoder = Encoder(local if os.path.isdir(local) else manifest["encoder"], device)
        size = self.encoder.model.config.hidden_size
        if vectors.shape[1] != size:
            raise InputError(f"{folder}: vectors of {vectors.shape[1]} dimensions, but the encoder has {size}")
        torch, device = self.encoder.torch, self.encoder.device
        self.vectors = torch.from_numpy(vectors)  # [passages, dimensions]
        if device.type == "cuda" and vectors.nbytes < 0.8 * torch.cuda.mem_get_info(device)[0]:
            self.vectors = self.vectors.to(device)

    def top(self, queries, k):
        """Returns [(passage numbers, scores)] of the k best passages for each query."""
        vectors = self.encoder.encode([f"query: {query}" for query in queries])
        return search_vectors(self.vectors, vectors.to(self.vectors.device), k, self.rank)


def search_vectors(vectors, queries, k, rank):
    """Returns [(vector numbers, inner products)] of the k greatest inner products of each query, ties by rank.

    vectors: [vectors, dimensions]; queries: float32 [queries, dimensions]; both on one device. rank: [vectors], NumPy.
    """
    import torch

    # The products of a block take 2 MiB, so that they stay in a CPU's cache; on a GPU they take 64 MiB.
    block = max(2048, 32 * k, (1 << 24 if vectors.is_cuda else 1 << 19) // len(queries))
    floor = torch.full((len(queries), 1), -torch.inf, device=vectors.device)  # a lower bound of the k-th greatest
    found = []  # [(query number, vector number, product)], tensors
    for start in range(0, len(vectors), block):
        part = vectors[start : start + block]
        if vectors.is_cuda:
            products = queries @ part.T  # [queries, block]
        else:  # NumPy's matrix product was up to twice as fast as torch's for one query
            products = torch.from_numpy(queries.numpy() @ part.numpy().T)
        groups = len(part) // 32  # the last vectors, fewer than 32, are in no group
        if groups >= k:
            maxima = products[:, : 32 * groups].view(len(queries), 32, groups).amax(1)  # [queries, groups]
            floor = torch.maximum(floor, maxima.topk(k).values[:, -1:])
        query, column = torch.nonzero(products >= floor, as_tuple=True)
        found.append((query, start + column, products[query, column]))
    query, vector, product = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    return [best_of(vector[query == i], product[query == i], rank, k) for i in range(len(queries))]


KINDS = {"bm25": SparseIndex, "tfidf": SparseIndex, "dense": DenseIndex}

# The server and its client: Search-R1's protocol (search_r1/search/retrieval_server.py).
# POST /retrieve {"queries": [...], "topk": 3, "return_scores": true} is answered with
# {"result": [[{"document": {"id", "contents"}, "score"}, ...], ...]}, without scores with the documents alone.


def answer_request(index, method, path, body):
    """Answer POST /retrieve from an open index. Returns (HTTP status, JSON value)."""
    if (method, path.rstrip("/")) != ("POST", "/retrieve"):
        return 404, {"error": "POST /retrieve"}
    found = index.search(body.get("queries"), 3 if body.get("topk") is None else body["topk"])
    hits = [[{"document": {"id": id, "contents": text}, "score": score} for id, score, text in one] for one in found]
    return 200, {"result": hits if body.get("return_scores") else [[hit["document"] for hit in one] for one in hits]}


class RemoteIndex(Connection):
    """An index behind `retriever.py serve`, or any other server with Search-R1's /retrieve. Threads may share it."""

    def __init__(self, url):  # 4 attempts take about 3 seconds: within the time-out of one code action
        super().__init__(url.rstrip("/").removesuffix("/retrieve"), timeout=300, retries=3)

    def search(self, queries, k=3):
        """As Index.search. Raises what Connection.request raises if the server is gone or answers anything else."""

        def read(answer):
            found = [[(hit["document"], float(hit["score"])) for hit in hits] for hits in answer["result"]]
            hits = [[Hit(str(row["id"]), score, "" + row["contents"]) for row, score in one] for one in found]
            return [one for _, one in zip(queries, hits, strict=True)]

        try:
            return self.request("/retrieve", {"queries": queries, "topk": k, "return_scores": True}, read)[0]
        except BadRequest as error:  # callers expect a BadRequest only from the model's server
            raise InputError(f"{self.url}: {error}") from None


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
    server = common.serve_json(lambda *request: answer_request(index, *request), config.host, config.port)
    print(f"{len(index):,} passages at http://{config.host}:{server.server_address[1]}/retrieve", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    commands = {
        "build": (BuildConfig, run_build),
        "search": (SearchConfig, run_search),
        "serve": (ServeConfig, run_serve),
    }
    common.run_command_line(__doc__, commands)
