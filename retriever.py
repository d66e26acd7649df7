"""Search over passages: exact TF-IDF and BM25 from one inverted index on disk, in NumPy.

    python retriever.py build passages.jsonl indexes/wiki --kind bm25
    python retriever.py search indexes/wiki "Who founded the company that makes the Walkman?"

Passages are JSON lines {"id": "...", "contents": "\\"Title\\"\\ntext"}, plain or gzipped.
"""

import bisect
import dataclasses
import functools
import gzip
import hashlib
import json
import os
import re
import shutil
import threading
import unicodedata
from collections import namedtuple
from pathlib import Path
from typing import Literal

import numpy as np

from common import REQUIRED, InputError, Journal, option, parse_object, progress, run_command_line, write_json

FORMAT = 1  # of the index folder; another number is refused
CHUNK = 8 << 20  # bytes of the passages file that one worker holds at once: the build's memory
BLOCK = 1 << 20  # bytes that are split at once: small enough for the processor's cache
WORD = 32  # bytes; a longer run of letters is cut into words of this length, so that none is merged with another

Hit = namedtuple("Hit", "id score contents")


@dataclasses.dataclass(kw_only=True)
class Build:
    passages: str = option(REQUIRED, "JSON lines with id and contents, plain or .gz", positional=True)
    out: str = option(REQUIRED, "folder of the index", positional=True)
    kind: Literal["tfidf", "bm25"] = option("tfidf", "how passages are scored")
    stem: bool = option(True, "light stemming (plural, -ed, -ing)")
    stop_words: bool = option(True, "leave out the commonest function words")
    k1: float = option(1.2, "BM25: how soon repeats of a word stop counting")
    b: float = option(0.75, "BM25: how much long passages are held back, 0 to 1")
    workers: int = option(0, "processes; 0 means one a core")
    quiet: bool = option(False, "no progress bar")


# Words. A word is a run of letters and digits of any script, case-folded, without accents.

# One table does case and splitting for ASCII; bytes from 128 up are parts of letters once `fold` has seen them.
SPLIT = bytes(byte if byte >= 128 else ord(chr(byte).lower()) if chr(byte).isalnum() else 32 for byte in range(256))
NON_ASCII = re.compile(r"[^\x00-\x7f]")
STOP_WORDS = frozenset(
    b"a an and are as at be been but by did do does for from had has have he her his how in into is it its of on or "
    b"s she that the their there these they this those to was were what when where which who whom whose why will with".split()
)


@functools.lru_cache(1 << 16)
def fold_character(match):
    """One non-ASCII character: compatibility form, case-folded, accents dropped; what is no letter becomes a space."""
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", match).casefold())
    kept = "".join(
        c if c.isalnum() or unicodedata.category(c) == "Mc" else "" if unicodedata.category(c) == "Mn" else " "
        for c in folded
    )
    # Chinese and Japanese put no spaces between words: there each character is a word.
    apart = unicodedata.name(match, "").startswith(("CJK", "HIRAGANA", "KATAKANA"))
    return f" {kept} " if apart else kept


def fold(text):
    """Text as UTF-8 in which every byte from 128 up belongs to a letter."""
    return NON_ASCII.sub(lambda match: fold_character(match[0]), text).encode()


def split_words(text):
    """The words of a text, in order, as bytes. The build splits blocks of text faster, into the same words."""
    words = fold(text).translate(SPLIT).split()
    return [word[start : start + WORD] for word in words for start in range(0, len(word), WORD)]


def stem_word(word):
    """Harman's S stemmer ("How effective is suffixing?", 1991): plural forms only."""
    if len(word) < 4 or word[-1:] != b"s" or word.endswith((b"us", b"ss")):
        return word
    if word.endswith(b"ies") and not word.endswith((b"eies", b"aies")):
        return word[:-3] + b"y"
    return word[:-1]


def term(word, stem, stop_words):
    """What a word is indexed as; b"" when it is not indexed."""
    if stop_words and word in STOP_WORDS:
        return b""
    return stem_word(word) if stem else word


# Build, step 1: each chunk of the passages file becomes a run, an inverted index of its own.


class WordTable:
    """Numbers for words, by open addressing in NumPy. Keys are the words' own bytes in `columns` integers of
    8 bytes, and are compared whole: the hash only says where to look first, so it cannot merge two words."""

    def __init__(self, columns, bits=16):
        self.count = 0
        self.columns = columns
        self._allocate(bits)

    def _allocate(self, bits):
        self.bits = bits
        self.keys = np.zeros((self.columns, 1 << bits), np.uint64)
        self.numbers = np.full(1 << bits, -1, np.int32)
        self.claims = np.zeros(1 << bits, np.int64)

    def _slots(self, keys):
        mixed = keys[0] * np.uint64(0x9E3779B97F4A7C15)
        for key in keys[1:]:
            mixed = (mixed ^ (mixed >> np.uint64(29)) ^ key) * np.uint64(0x9E3779B97F4A7C15)
        return (mixed >> np.uint64(64 - self.bits)).astype(np.int64)

    def number(self, keys):
        """Number every key [columns, n]; a new word gets the next number."""
        slots = self._slots(keys)
        numbers = self.numbers[slots]
        pending = np.flatnonzero(self._differ(slots, keys) | (numbers < 0))
        while pending.size:
            slot = slots[pending]
            free = self.numbers[slot] < 0
            new = pending[free]
            self.claims[slots[new]] = new  # where several words want one slot, the last to claim it has it
            new = new[self.claims[slots[new]] == new]
            self.keys[:, slots[new]] = keys[:, new]
            self.numbers[slots[new]] = np.arange(self.count, self.count + len(new), dtype=np.int32)
            self.count += len(new)
            found = ~self._differ(slot, keys[:, pending])
            numbers[pending[found]] = self.numbers[slot[found]]
            pending = pending[~found]
            if 2 * self.count > len(self.numbers):
                self._grow()
                slots[pending] = self._slots(keys[:, pending])
            else:
                slots[pending] = (slots[pending] + 1) & (len(self.numbers) - 1)
        return numbers

    def _differ(self, slots, keys):
        differ = self.keys[0][slots] != keys[0]
        for column, key in zip(self.keys[1:], keys[1:], strict=True):
            differ |= column[slots] != key
        return differ

    def _grow(self):
        words, count = self.words(), self.count
        self._allocate(self.bits + 1)
        self.count = 0
        # Re-entering one word at a time would be slow; all at once renumbers them, so the numbers are put back.
        renumbered = self.number(words)
        back = np.empty(count, np.int32)
        back[renumbered] = np.arange(count, dtype=np.int32)
        used = self.numbers >= 0
        self.numbers[used] = back[self.numbers[used]]

    def words(self):
        """All words' keys [columns, count], by number."""
        used = np.flatnonzero(self.numbers >= 0)
        return self.keys[:, used[np.argsort(self.numbers[used])]]


MASKS = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # keeps the first n bytes of 8


def word_spans(block):
    """Starts and lengths of the words in a block of bytes that begins and ends with spaces."""
    letters = np.frombuffer(block, np.uint8) != 32
    edges = np.flatnonzero(letters[1:] != letters[:-1]) + 1
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    if lengths.size and lengths.max() > WORD:
        pieces = (lengths + WORD - 1) // WORD
        within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = np.repeat(starts, pieces) + WORD * within
        lengths = np.minimum(np.repeat(lengths, pieces) - WORD * within, WORD)
    return starts, lengths


def number_block(texts, tables):
    """Number the words of texts: (word numbers, index into texts), both [words]. tables: short and long words."""
    folded = [text.encode() if text.isascii() else fold(text) for text in texts]
    block = (b" " + b" ".join(folded) + b" " * (WORD + 8)).translate(SPLIT)
    starts, lengths = word_spans(block)
    eights = np.ndarray(len(block) - 7, "<u8", buffer=block, strides=(1,))  # the 8 bytes from every position on
    numbers = np.empty(len(starts), np.uint32)
    is_long = lengths > 8
    for table, chosen in ((tables[0], np.flatnonzero(~is_long)), (tables[1], np.flatnonzero(is_long))):
        start, length = starts[chosen], lengths[chosen]
        keys = np.empty((table.columns, len(chosen)), np.uint64)
        for column in range(table.columns):
            keys[column] = eights[start + 8 * column] & MASKS[np.clip(length - 8 * column, 0, 8)]
        numbers[chosen] = 2 * table.number(keys) + (table is tables[1])
    ends = np.cumsum([len(text) + 1 for text in folded])
    words_in = np.diff(np.searchsorted(starts, ends), prepend=0)
    return numbers, np.repeat(np.arange(len(texts), dtype=np.uint32), words_in)


def read_chunk(path, start, end):
    """(offsets, ids, contents) of the passages whose lines start in [start, end) of a file."""
    offsets, ids, contents = [], [], []
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        while (offset := file.tell()) < end and (line := file.readline()):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                identity, text = row["id"], row["contents"]
                if not (isinstance(identity, str) and isinstance(text, str)):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise InputError(_line_error(path, offset, line)) from None
            offsets.append(offset)
            ids.append(identity)
            contents.append(text)
    return offsets, ids, contents


def _line_error(path, offset, line):
    with open(path, "rb") as file:
        number = 1 + sum(1 for _ in iter(file.readline, b"") if file.tell() <= offset)
    where = f"{path}:{number}"
    parse_object(line, where)
    return f'{where}: a passage is {{"id": "...", "contents": "..."}}, both text'


def build_run(path, start, end, settings, run):
    """Invert the passages of one chunk and write the run, a folder that appears when it is complete."""
    offsets, ids, contents = read_chunk(path, start, end)
    tables = WordTable(1), WordTable(WORD // 8)
    numbers, passages = [], []
    first = 0
    while first < len(contents):
        last, size = first, 0
        while last < len(contents) and size < BLOCK:
            size += len(contents[last])
            last += 1
        number, passage = number_block(contents[first:last], tables)
        numbers.append(number)
        passages.append(passage + np.uint32(first))
        first = last
    numbers = np.concatenate(numbers) if numbers else np.empty(0, np.uint32)
    passages = np.concatenate(passages) if passages else np.empty(0, np.uint32)

    # What each word is indexed as, and its rank in the order of bytes: the order that all runs share.
    words = [table.words().T.copy().view(f"S{8 * table.columns}").ravel().tolist() for table in tables]
    rank = np.zeros(2 * max(map(len, words)), np.uint32)
    indexed = [term(word, settings["stem"], settings["stop_words"]) for word in words[0] + words[1]]
    terms, ranks = np.unique(np.array([b"", *indexed], f"S{WORD}"), return_inverse=True)  # terms[0] is b""
    rank[0 : 2 * len(words[0]) : 2] = ranks[1 : 1 + len(words[0])]
    rank[1 : 2 * len(words[1]) : 2] = ranks[1 + len(words[0]) :]

    keys = rank[numbers].astype(np.uint64) << np.uint64(32) | passages
    keys.sort()
    keys = keys[np.searchsorted(keys, np.uint64(1 << 32)) :]  # rank 0: not indexed
    firsts = np.flatnonzero(np.diff(keys, prepend=np.uint64(0)))
    postings = keys[firsts]
    counts = np.bincount((postings >> np.uint64(32)).astype(np.int64), minlength=len(terms))[1:]

    aside = run.with_name(f"{run.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    columns = {
        "terms": terms[1:],
        "counts": counts.astype(np.int64),
        "docs": (postings & np.uint64(0xFFFFFFFF)).astype(np.uint32),
        "tfs": np.diff(firsts, append=len(keys)).astype(np.uint32),
        "lengths": np.bincount((keys & np.uint64(0xFFFFFFFF)).astype(np.int64), minlength=len(ids)).astype(np.uint32),
        "offsets": np.array(offsets, np.uint64),
        "ids": np.array([i.encode("utf-8", "surrogatepass") for i in ids], "S") if ids else np.empty(0, "S1"),
    }
    for name, column in columns.items():
        np.save(aside / name, column)
    os.replace(aside, run)
    return {"passages": len(ids), "postings": len(postings), "words": len(keys)}


# Build, step 2: the runs are merged, a range of terms at a time, so that memory stays bounded.

RANGE = 4 << 20  # postings that are merged at once (one term's, where it has more)


class Run:
    """The columns of one run, or of a whole index (which is a run too when passages are added to it)."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.terms, self.counts, self.lengths, self.offsets, self.ids = (
            np.load(self.folder / f"{name}.npy", mmap_mode="r")
            for name in ("terms", "counts", "lengths", "offsets", "ids")
        )
        self.columns = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("docs", "tfs")}

    def read(self, name, start, stop):
        """A slice of the postings, read rather than mapped, so that it leaves memory when it is done with."""
        column = self.columns[name]
        return np.fromfile(column.filename, column.dtype, stop - start, offset=column.offset + start * column.itemsize)


def merge_terms(runs):
    """All runs' terms, in order. Unions grow by doubling, so that none is copied often."""
    terms, waiting, size = np.empty(0, f"S{WORD}"), [], 0
    for number, run in enumerate(runs, 1):
        waiting.append(np.asarray(run.terms))
        size += len(run.terms)
        if size > max(len(terms), 1 << 20) or number == len(runs):
            terms, waiting, size = np.unique(np.concatenate([terms, *waiting])), [], 0
    return terms


def merge_runs(runs, data, quiet):
    """Write the merged terms and postings into the folder `data`; returns counts [terms]."""
    terms = merge_terms(runs)
    np.save(data / "terms.npy", terms)
    counts = np.zeros(len(terms), np.int64)
    for run in runs:
        run.places = np.searchsorted(terms, np.asarray(run.terms)).astype(np.uint32)  # of its terms among all terms
        counts[run.places] += run.counts
        run.starts = np.concatenate([[0], np.cumsum(run.counts)])
    del terms
    np.save(data / "counts.npy", counts)
    starts = np.concatenate([[0], np.cumsum(counts)])
    np.save(data / "starts.npy", starts)
    bases = np.cumsum([0] + [len(run.lengths) for run in runs])
    largest = max((run.columns["tfs"].max(initial=0) for run in runs), default=0)
    types = {"docs": np.dtype(np.uint32), "tfs": np.min_scalar_type(int(largest))}
    next_free = starts[:-1].copy()
    with open(data / "docs.npy", "wb") as docs_file, open(data / "tfs.npy", "wb") as tfs_file:
        for file, kind in ((docs_file, types["docs"]), (tfs_file, types["tfs"])):
            header = {"descr": kind.str, "fortran_order": False, "shape": (int(starts[-1]),)}
            np.lib.format.write_array_header_1_0(file, header)
        bar = progress(total=int(starts[-1]), desc="merging", unit="posting", quiet=quiet)
        first = 0
        while first < len(counts):
            last = max(int(np.searchsorted(starts, starts[first] + RANGE, side="right")) - 1, first + 1)
            docs = np.empty(starts[last] - starts[first], types["docs"])
            tfs = np.empty(len(docs), types["tfs"])
            for run, base in zip(runs, bases, strict=False):
                low, high = np.searchsorted(run.places, (first, last))
                start, stop = run.starts[low], run.starts[high]
                places, numbers = run.places[low:high], run.counts[low:high]
                to = np.repeat(next_free[places] - run.starts[low:high] - starts[first], numbers) + np.arange(
                    start, stop
                )
                docs[to] = run.read("docs", start, stop) + np.uint32(base)
                tfs[to] = run.read("tfs", start, stop)
                next_free[places] += numbers
            docs.tofile(docs_file)
            tfs.tofile(tfs_file)
            bar.update(len(docs))
            first = last
        bar.close()
    return counts


def merge_passages(runs, file_bases, end, data):
    """Write where each passage lies, its length in words, and its place in the order of ids (which breaks ties)."""
    offsets = [
        np.asarray(run.offsets[: len(run.lengths)]) + np.uint64(base)
        for run, base in zip(runs, file_bases, strict=True)
    ]
    np.save(data / "offsets.npy", np.concatenate([*offsets, np.array([end], np.uint64)]))
    np.save(data / "lengths.npy", np.concatenate([run.lengths for run in runs]))
    ids = np.concatenate([run.ids for run in runs])
    np.save(data / "ids.npy", ids)
    order = np.argsort(ids, kind="stable")
    same = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])
    if same.size:
        first, second = order[same[0]], order[same[0] + 1]
        raise InputError(
            f"passages {first + 1} and {second + 1} have the same id {ids[first].decode()!r}; ids must differ"
        )
    rank = np.empty(len(ids), np.uint32)
    rank[order] = np.arange(len(ids), dtype=np.uint32)
    np.save(data / "rank.npy", rank)


# Scores. A passage's score is the sum over query terms of weight(term) x impact(term, passage).


class TfIdf:
    """Cosine of TF-IDF vectors with sublinear counts, (1 + ln tf) idf, and the smooth idf = ln((1+N)/(1+df)) + 1:
    scikit-learn's TfidfVectorizer(sublinear_tf=True)."""

    def __init__(self, settings, lengths):
        self.count = len(lengths)

    def idf(self, df):
        return np.log((1 + self.count) / (1 + df)) + 1

    def query_weights(self, dfs, repeats):
        idf = self.idf(dfs)
        weights = (1 + np.log(repeats)) * idf
        return weights * idf / np.sqrt((weights**2).sum())

    def factors(self, lengths, postings):
        """What a passage's length does to its scores: here 1 / the norm of its vector."""
        squares = np.zeros(len(lengths))
        for docs, tfs, df in postings:
            np.add.at(squares, docs.astype(np.intp), ((1 + np.log(tfs)) * self.idf(df)) ** 2)
        return 1 / np.sqrt(np.maximum(squares, 1e-30))

    @staticmethod
    def impact(tfs, factors):
        return (1 + np.log(tfs)) * factors


class Bm25:
    """BM25 as in Lucene 8 and later: idf = ln(1 + (N-df+0.5)/(df+0.5)), impact tf / (tf + k1 (1-b + b length/mean))
    (Kamphuis et al. 2020, "Which BM25 do you mean?"); bm25s calls it "lucene"."""

    def __init__(self, settings, lengths):
        self.count, self.k1, self.b = len(lengths), settings["k1"], settings["b"]

    def idf(self, df):
        return np.log(1 + (self.count - df + 0.5) / (df + 0.5))

    def query_weights(self, dfs, repeats):
        return self.idf(dfs) * repeats

    def factors(self, lengths, postings):
        return self.k1 * (1 - self.b + self.b * lengths / max(lengths.mean(), 1e-9))

    @staticmethod
    def impact(tfs, factors):
        return tfs / (tfs + factors)


SCORINGS = {"tfidf": TfIdf, "bm25": Bm25}


def write_statistics(data, settings):
    """The passages' length factors and every term's greatest impact: what search needs, and what additions change."""
    run = Run(data)
    starts = np.load(data / "starts.npy")
    scoring = SCORINGS[settings["kind"]](settings, run.lengths)

    def ranges():
        first = 0
        while first < len(run.counts):
            last = max(int(np.searchsorted(starts, starts[first] + RANGE, side="right")) - 1, first + 1)
            yield first, last, *(run.read(name, starts[first], starts[last]) for name in ("docs", "tfs"))
            first = last

    postings = ((docs, tfs, np.repeat(run.counts[a:b], run.counts[a:b])) for a, b, docs, tfs in ranges())
    factors = scoring.factors(np.asarray(run.lengths), postings).astype(np.float32)
    bounds = np.empty(len(run.counts), np.float32)
    for first, last, docs, tfs in ranges():
        impacts = scoring.impact(tfs.astype(np.float32), factors[docs])
        bounds[first:last] = np.maximum.reduceat(impacts, starts[first:last] - starts[first])
    np.save(data / "factors.npy", factors)
    np.save(data / "bounds.npy", bounds)


# The index folder: index.json names the data folder in use, and is replaced last, in one step.


def fingerprint(path):
    """Size and a hash of 256 pieces spread over a file (the whole of a small one): enough to notice a change."""
    size = os.stat(path).st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for piece in range(256):
            file.seek(size * piece // 256)
            digest.update(file.read(4096))
    return {"bytes": size, "sha256": digest.hexdigest()}


def build(passages, out, kind="tfidf", **settings):
    """Build an index over a passages file; the same call continues where a killed one stopped.

    settings: the fields of Build. Raises InputError for bad settings and for bad passages, by line.
    """
    build_index(Build(passages=str(passages), out=str(out), kind=kind, **settings))


def plain_passages(path, out):
    """The passages file itself, or its unzipped copy in the index folder: passages are read by offset."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix != ".gz":
        return path
    copy = out / f"passages-{fingerprint(path)['sha256'][:12]}.jsonl"
    if not copy.exists():
        aside = copy.with_suffix(".partial")
        try:
            with gzip.open(path) as source, open(aside, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except (EOFError, OSError) as error:
            aside.unlink(missing_ok=True)
            raise InputError(f"{path}: not a whole gzip file: {error}") from None
        os.replace(aside, copy)
    return copy


def build_index(config):
    """Build an index over a passages file."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    path = plain_passages(Path(config.passages), out)
    settings = {name: getattr(config, name) for name in ("kind", "stem", "stop_words", "k1", "b")}
    file = {"path": os.path.relpath(path, out), **fingerprint(path)}
    work = out / "building"
    with Journal(out / "build.jsonl") as history:  # also keeps a second builder out
        plan = {"settings": settings, "file": file}
        if not history.rows or history.rows[-1] != plan:
            shutil.rmtree(work, ignore_errors=True)
            history.append(plan)
        work.mkdir(exist_ok=True)
        runs = []
        for number, start in enumerate(range(0, file["bytes"], CHUNK)):
            runs.append(work / f"run-{number:06d}")
            if not runs[-1].exists():
                build_run(path, start, start + CHUNK, settings, runs[-1])
        data = work / "data"
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir()
        opened = [Run(run) for run in runs]
        if not sum(len(run.lengths) for run in opened):
            raise InputError(f"{config.passages}: no passages in it")
        merge_runs(opened, data, config.quiet)
        merge_passages(opened, [0] * len(opened), file["bytes"], data)
        write_statistics(data, settings)
        name = f"data-{len(history.rows)}"
        shutil.rmtree(out / name, ignore_errors=True)
        os.replace(data, out / name)
        count = len(np.load(out / name / "lengths.npy", mmap_mode="r"))
        write_json(out / "index.json", {"format": FORMAT, **settings, "passages": count, "files": [file], "data": name})
        shutil.rmtree(work)


# Search


def load(out):
    """Open an index folder."""
    out = Path(out)
    manifest = out / "index.json"
    if not manifest.exists():
        raise InputError(f"{out}: no index here (no index.json); make one with: retriever.py build PASSAGES {out}")
    settings = parse_object(manifest.read_bytes(), str(manifest))
    if settings.get("format") != FORMAT:
        raise InputError(
            f"{manifest}: format {settings.get('format')}, but this program reads {FORMAT}; build it again"
        )
    return SparseIndex(out, settings)


class Passages:
    """The passages of an index, read from their files by offset."""

    def __init__(self, folder, files, offsets):
        self.offsets, self.files, self.bases = offsets, [], []
        base = 0
        for file in files:
            path = Path(os.path.normpath(folder / file["path"]))
            if not path.is_file():
                raise InputError(f"{path}: the passages of {folder} are gone; put them back or build the index again")
            if {**file, **fingerprint(path)} != file:
                raise InputError(f"{path}: changed since {folder} was built from it; build the index again")
            self.files.append(open(path, "rb"))
            self.bases.append(base)
            base += file["bytes"]

    def __getitem__(self, number):
        start, end = int(self.offsets[number]), int(self.offsets[number + 1])
        which = bisect.bisect_right(self.bases, start) - 1
        row = json.loads(os.pread(self.files[which].fileno(), end - start, start - self.bases[which]))
        return row["id"], row["contents"]


class SparseIndex:
    def __init__(self, folder, settings):
        data = folder / settings["data"]
        names = ("terms", "starts", "docs", "tfs", "factors", "bounds", "rank", "offsets", "lengths")
        column = {name: np.asarray(np.load(data / f"{name}.npy", mmap_mode="r")) for name in names}
        self.terms, self.starts, self.docs, self.tfs = (column[name] for name in ("terms", "starts", "docs", "tfs"))
        self.factors, self.bounds, self.rank = (column[name] for name in ("factors", "bounds", "rank"))
        self.settings = settings
        self.scoring = SCORINGS[settings["kind"]](settings, column["lengths"])
        self.passages = Passages(folder, settings["files"], column["offsets"])
        self._known = {}  # word -> number of its term, or None

    def __len__(self):
        return len(self.rank)

    def _query(self, query):
        """Terms of a query: [(start, stop, weight)], in the order of the index."""
        repeats = {}
        for word in split_words(query):
            if word not in self._known:
                key = np.array(term(word, self.settings["stem"], self.settings["stop_words"]), f"S{WORD}")
                place = int(np.searchsorted(self.terms, key))
                self._known[word] = place if place < len(self.terms) and self.terms[place] == key else None
            place = self._known[word]
            if place is not None:
                repeats[place] = repeats.get(place, 0) + 1
        places = sorted(repeats)
        starts, stops = self.starts[places], self.starts[[place + 1 for place in places]]
        weights = self.scoring.query_weights(stops - starts, np.array([repeats[place] for place in places]))
        return list(zip(starts.tolist(), stops.tolist(), weights.tolist(), strict=True)) if places else []

    def rank_exhaustive(self, query, k):
        """(passage numbers, scores) of the k best, by scoring every posting of every term."""
        scores = np.zeros(len(self))
        for start, stop, weight in self._query(query):
            docs = self.docs[start:stop]
            scores[docs] += weight * self.scoring.impact(self.tfs[start:stop].astype(np.float32), self.factors[docs])
        found = np.flatnonzero(scores)
        best = found[np.lexsort((self.rank[found], -scores[found]))][:k]
        return best, scores[best]

    def search(self, queries, k=3):
        """The k best passages for each query: a list of lists of Hit, best first, ties by id."""
        if isinstance(queries, str):
            raise TypeError("queries is a list of strings, not one string")
        results = []
        for query in queries:
            best, scores = self.rank_exhaustive(query, k)
            texts = [self.passages[number] for number in best]
            results.append([Hit(i, float(s), t) for (i, t), s in zip(texts, scores, strict=True)])
        return results


@dataclasses.dataclass(kw_only=True)
class Search:
    index: str = option(REQUIRED, "folder of an index", positional=True)
    query: str = option(REQUIRED, "what to look for", positional=True)
    k: int = option(3, "how many passages")


def search(config):
    """Print the best passages for a query."""
    for place, hit in enumerate(load(config.index).search([config.query], config.k)[0], 1):
        print(f"{place}. {hit.score:.3f}  {hit.id}\n{hit.contents}\n")


if __name__ == "__main__":
    run_command_line(__doc__, {"build": (Build, build_index), "search": (Search, search)})
