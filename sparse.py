"""The sparse index: TF-IDF and BM25 from one inverted index on disk, in NumPy.

Building: chunks of the passages file become runs (small inverted indexes; processes share the work),
then the runs are merged. Memory is bounded by the chunk, the merged range and the vocabulary.
Search: exact best k, without reading the postings of common words where they cannot matter.
Imported by retriever.py; not run by itself.
"""

import collections
import concurrent.futures.process
import multiprocessing
import os
import signal
import threading

import numpy as np

from common import InputError
from passages import read_chunk, save_run
from words import WORD, WordTable, blocks, index_term, number_block, split_words

CHUNK = 8 << 20  # bytes of the passages file that one process inverts at once: sets the memory of a build
COMMON = 32  # terms in one of so many passages also get a row of bytes, where a passage is found at once
RANGE = 1 << 21  # postings that are merged at once (or one term's, where it has more)

# Build, step 1: each chunk of the passages file becomes a run, an inverted index of its own.


def invert(texts, settings):
    """The inverted index of some texts: terms in the order of their bytes, and their postings in order."""
    tables = WordTable(1), WordTable(WORD // 8)
    numbers, passages = [np.empty(0, np.uint32)], [np.empty(0, np.uint32)]
    for first, last in blocks(texts):
        number, passage = number_block(texts[first:last], tables)
        numbers.append(number)
        passages.append(passage + np.uint32(first))
    numbers, passages = np.concatenate(numbers), np.concatenate(passages)

    words = [table.words().T.copy().view(f"S{8 * table.columns}").ravel().tolist() for table in tables]
    indexed = [b""] + [index_term(word, settings) for word in words[0] + words[1]]
    terms, ranks = np.unique(np.array(indexed, f"S{WORD}"), return_inverse=True)  # terms[0] is b"": not indexed
    rank = np.zeros(2 * max(map(len, words)) + 2, np.uint64)
    rank[0 : 2 * len(words[0]) : 2] = ranks[1 : 1 + len(words[0])]
    rank[1 : 2 * len(words[1]) : 2] = ranks[1 + len(words[0]) :]

    keys = rank[numbers] << np.uint64(32) | passages  # (term, passage), to be sorted and counted
    del numbers, passages
    keys.sort()
    keys = keys[np.searchsorted(keys, np.uint64(1 << 32)) :]
    firsts = np.flatnonzero(np.diff(keys, prepend=np.uint64(0)))
    tfs = np.diff(firsts, append=len(keys))
    low = np.uint64(0xFFFFFFFF)
    return {
        "terms": terms[1:],
        "counts": np.bincount((keys[firsts] >> np.uint64(32)).astype(np.int64), minlength=len(terms))[1:],
        "docs": (keys[firsts] & low).astype(np.uint32),
        "tfs": tfs.astype(np.min_scalar_type(tfs.max(initial=1))),
        "lengths": np.bincount((keys & low).astype(np.int64), minlength=len(texts)).astype(np.uint32),
    }


def weigh_title(text, times):
    """Repeat a passage's first line, which is its title, so that its words count `times` times."""
    title, newline, _ = text.partition("\n")
    return (title + newline) * (times - 1) + text if newline else text


def build_run(path, start, end, settings, folder):
    """Invert one chunk of the passages file into a run. Returns its number of passages."""
    offsets, ids, texts = read_chunk(path, start, end)
    if settings["title_weight"] != 1:
        texts = [weigh_title(text, settings["title_weight"]) for text in texts]
    columns = invert(texts, settings)
    save_run(folder, {**columns, "offsets": np.array(offsets, np.uint64), "ids": np.array(ids or [], "S")})
    return len(ids)


def _start_worker():
    """A worker must not outlive a killed parent, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def build_runs(path, folder, settings, workers, bar):
    """Invert a passages file, chunk by chunk, in processes of their own; runs already there are kept."""
    size = os.stat(path).st_size
    runs = [folder / f"run-{number:06d}" for number in range(-(-size // CHUNK))]
    jobs = [
        (path, number * CHUNK, (number + 1) * CHUNK, settings, run)
        for number, run in enumerate(runs)
        if not run.exists()
    ]
    bar.total = size
    bar.update((len(runs) - len(jobs)) * CHUNK)
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    if workers <= 1:
        for job in jobs:
            build_run(*job)
            bar.update(CHUNK)
        return runs
    context = multiprocessing.get_context("spawn")  # a fork would copy whatever threads the caller has
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker) as pool:
        futures = [pool.submit(build_run, *job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                bar.update(CHUNK)
        except concurrent.futures.process.BrokenProcessPool:
            raise InputError(
                "a process that read passages was killed, by lack of memory? try fewer --workers"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return runs


# Build, step 2: the runs are merged, a range of terms at a time.


class Run:
    """The postings of a run; or of an index, when passages are added to it: the same columns."""

    def __init__(self, folder):
        self.folder = folder
        self.counts = np.load(folder / "counts.npy").astype(np.uint32)
        self.lengths = np.load(folder / "lengths.npy")
        self.columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("docs", "tfs")}

    def terms(self):
        return np.load(self.folder / "terms.npy")

    def read(self, name, start, stop):
        """Postings start to stop; read, not mapped, so that they leave the memory when they are done with."""
        column = self.columns[name]
        return np.fromfile(column.filename, column.dtype, stop - start, offset=column.offset + start * column.itemsize)


def term_ranges(starts):
    first = 0
    while first < len(starts) - 1:
        last = max(int(np.searchsorted(starts, starts[first] + RANGE, side="right")) - 1, first + 1)
        yield first, last
        first = last


def posting_ranges(run):
    """(first term, last, docs, tfs) for about RANGE postings at a time."""
    starts = np.concatenate([[0], np.cumsum(run.counts, dtype=np.int64)])
    for first, last in term_ranges(starts):
        yield first, last, *(run.read(name, starts[first], starts[last]) for name in ("docs", "tfs"))


def merge_terms(runs):
    """All runs' terms, in order. The union waits until as many have come as it has, so that few copies are made."""
    terms, waiting, size = np.empty(0, f"S{WORD}"), [], 0
    for number, run in enumerate(runs, 1):
        waiting.append(run.terms())
        size += len(waiting[-1])
        if size > max(len(terms), 1 << 18) or number == len(runs):
            terms, waiting, size = np.unique(np.concatenate([terms, *waiting])), [], 0
    return terms


def merge(folders, data, settings, bar):
    """Merge runs (or an index and runs) into the index in the folder `data`."""
    merge_postings(folders, data, bar)
    write_impacts(data, settings)


def merge_postings(folders, data, bar):
    """Merge runs, in the order of their passages, into the columns of an index in the folder `data`."""
    runs = [Run(folder) for folder in folders]
    terms = merge_terms(runs)
    counts = np.zeros(len(terms), np.int64)
    for run in runs:
        run.places = np.searchsorted(terms, run.terms()).astype(np.uint32)  # of its terms among all terms
        run.position = 0  # of the next posting to be merged
        counts[run.places] += run.counts
    starts = np.concatenate([[0], np.cumsum(counts)])
    for name, column in {"terms": terms, "counts": counts, "starts": starts}.items():
        np.save(data / f"{name}.npy", column)
    del terms
    np.save(data / "lengths.npy", np.concatenate([run.lengths for run in runs]))
    tfs_type = np.result_type(*(run.columns["tfs"] for run in runs))
    bar.total = int(starts[-1])
    with (
        column_file(data / "docs.npy", np.uint32, starts[-1:]) as docs_file,
        column_file(data / "tfs.npy", tfs_type, starts[-1:]) as tfs_file,
    ):
        for first, last in term_ranges(starts):
            free = starts[first:last] - starts[first]  # where each term's next postings go
            docs = np.empty(starts[last] - starts[first], np.uint32)
            tfs = np.empty(len(docs), tfs_type)
            base = 0
            for run in runs:
                low, high = np.searchsorted(run.places, np.array([first, last], np.uint32))
                numbers = run.counts[low:high].astype(np.int64)
                start, stop = run.position, run.position + int(numbers.sum())
                if start < stop:
                    places = run.places[low:high] - np.uint32(first)
                    to = np.repeat(free[places] - np.cumsum(numbers) + numbers, numbers) + np.arange(stop - start)
                    docs[to] = run.read("docs", start, stop) + np.uint32(base)
                    tfs[to] = run.read("tfs", start, stop)
                    free[places] += numbers
                run.position = stop
                base += len(run.lengths)
            docs.tofile(docs_file)
            tfs.tofile(tfs_file)
            bar.update(len(docs))


def column_file(path, kind, shape):
    """A .npy file open for its values, which come in pieces."""
    file = open(path, "wb")
    header = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": tuple(map(int, shape))}
    np.lib.format.write_array_header_1_0(file, header)
    return file


# Scores. A passage's score is the sum, over the terms of the query, of weight(term) x impact(term, passage).


class TfIdf:
    """Cosine of TF-IDF vectors with (1 + ln tf) idf and the smooth idf = ln((1 + N) / (1 + df)) + 1,
    as scikit-learn's TfidfVectorizer(sublinear_tf=True) has it."""

    def __init__(self, settings, count):
        self.count = count

    def idf(self, df):
        return np.log((1 + self.count) / (1 + df)) + 1

    def query_weights(self, dfs, repeats):
        weights = (1 + np.log(repeats)) * self.idf(dfs)
        return weights / np.sqrt(weights @ weights) * self.idf(dfs)

    def passage_factors(self, run):
        """1 / the norm of each passage's vector."""
        squares = np.zeros(len(run.lengths))
        for first, last, docs, tfs in posting_ranges(run):
            idf = np.repeat(self.idf(run.counts[first:last]), run.counts[first:last])
            np.add.at(squares, docs.astype(np.intp), ((1 + np.log(tfs, dtype=np.float64)) * idf) ** 2)
        return 1 / np.sqrt(np.maximum(squares, 1e-30))

    def impacts(self, tfs, factors):
        return (1 + np.log(tfs)) * factors


class Bm25:
    """BM25 as in Lucene 8 and later: idf = ln(1 + (N - df + 0.5) / (df + 0.5)) and impact
    tf / (tf + k1 (1 - b + b length / mean length)); bm25s calls it "lucene".
    The variants: Kamphuis et al., "Which BM25 do you mean?" (ECIR 2020)."""

    def __init__(self, settings, count):
        self.count, self.k1, self.b = count, settings["k1"], settings["b"]

    def idf(self, df):
        return np.log(1 + (self.count - df + 0.5) / (df + 0.5))

    def query_weights(self, dfs, repeats):
        return self.idf(dfs) * repeats

    def passage_factors(self, run):
        return self.k1 * (1 - self.b + self.b * run.lengths / max(run.lengths.mean(), 1e-30))

    def impacts(self, tfs, factors):
        return tfs / (tfs + factors)


SCORINGS = {"tfidf": TfIdf, "bm25": Bm25}


def write_impacts(data, settings):
    """What depends on the whole collection: every posting's impact, every term's greatest, and for common terms
    a row of one byte a passage with the impact in 255ths of the greatest, rounded up (0: no posting)."""
    run = Run(data)
    scoring = SCORINGS[settings["kind"]](settings, len(run.lengths))
    factors = scoring.passage_factors(run).astype(np.float32)
    greatest = np.empty(len(run.counts), np.float32)
    common = np.flatnonzero(run.counts * COMMON >= len(run.lengths))
    np.save(data / "common.npy", common)
    with (
        column_file(data / "impacts.npy", np.float32, run.columns["docs"].shape) as impacts_file,
        column_file(data / "coarse.npy", np.uint8, (len(common), len(run.lengths))) as coarse_file,
    ):
        for first, last, docs, tfs in posting_ranges(run):
            impacts = scoring.impacts(tfs.astype(np.float32), factors[docs])
            starts = np.concatenate([[0], np.cumsum(run.counts[first:last], dtype=np.int64)])
            greatest[first:last] = np.maximum.reduceat(impacts, starts[:-1])
            impacts.tofile(impacts_file)
            for place in common[np.searchsorted(common, first) : np.searchsorted(common, last)]:
                own = slice(*starts[place - first : place - first + 2])
                row = np.zeros(len(run.lengths), np.uint8)
                row[docs[own]] = np.minimum(np.ceil(impacts[own] * (255 / greatest[place])), 255)
                row.tofile(coarse_file)
    np.save(data / "greatest.npy", greatest)


# Search: MaxScore (Turtle and Flood, "Query evaluation", 1995) with whole postings lists as NumPy arrays.

LOOK_UP = 32  # postings that can be added up in the time of one binary search (measured)
WORTHWHILE = 50_000  # postings that take as long to add up as a better floor takes to find (measured)
LEADERS = 8  # times k: the passages whose scores make the floor
Term = collections.namedtuple("Term", "most start stop weight row")


class SparseIndex:
    """The postings of an index, mapped into memory. Threads may share it."""

    def __init__(self, data, settings):
        names = ("terms", "starts", "docs", "impacts", "greatest", "coarse", "rank")
        columns = (np.asarray(np.load(data / f"{name}.npy", mmap_mode="r")) for name in names)
        self.terms, self.starts, self.docs, self.impacts, self.greatest, self.coarse, self.rank = columns
        self.rows = {place: row for row, place in enumerate(np.load(data / "common.npy").tolist())}
        self.settings = settings
        self.scoring = SCORINGS[settings["kind"]](settings, len(self.rank))
        self.known = {}  # words of earlier queries
        self.scratch = threading.local()

    def _term(self, word):
        """(greatest impact, first posting, end, row of bytes or None) of a word's term; None if there is none."""
        key = np.array(index_term(word, self.settings), self.terms.dtype)
        place = int(np.searchsorted(self.terms, key))
        if place == len(self.terms) or self.terms[place] != key:
            return None
        row = self.coarse[self.rows[place]] if place in self.rows else None
        return float(self.greatest[place]), int(self.starts[place]), int(self.starts[place + 1]), row

    def query_terms(self, query):
        """The Terms of a query, the one that can add most to a score first."""
        repeats, found = {}, {}
        for word in split_words(query):
            try:
                term = self.known[word]
            except KeyError:
                if len(self.known) > 1 << 20:
                    self.known = {}
                term = self.known[word] = self._term(word)
            if term:
                repeats[term[1]] = repeats.get(term[1], 0) + 1
                found[term[1]] = term
        if not repeats:
            return []
        dfs = np.array([stop - start for _, start, stop, _ in found.values()])
        weights = self.scoring.query_weights(dfs, np.array([*repeats.values()])).tolist()
        terms = [
            Term(weight * greatest, start, stop, weight, row)
            for weight, (greatest, start, stop, row) in zip(weights, found.values(), strict=True)
        ]
        return sorted(terms, key=lambda term: (-term.most, term.start))

    def top(self, queries, k):
        """[(passage numbers, scores)] of the k best passages for each query."""
        return [self.best(query, k) for query in queries]

    def best(self, query, k):
        """(passage numbers, scores) of the k best passages that share a term with the query, best first."""
        totals = self._totals()
        touched = []  # the passages that have a total: an array for every term that was added up
        try:
            docs, scores = self._candidates(self.query_terms(query), totals, touched, k)
        finally:
            if _are_few(touched, totals):
                for found in touched:
                    totals[found] = 0
            else:
                totals.fill(0)
        return best_of(docs, scores, self.rank, k)

    def _candidates(self, terms, totals, touched, k):
        """(passage numbers, scores): all that can be among the k best, and few more.

        Terms are added up in one fixed order, so that a score does not depend on what was skipped.
        """
        most = [0.0]  # most[i]: what terms i and after can add to a score at most
        for term in reversed(terms):
            most.insert(0, most[0] + term.most)
        slack = 1 - 1e-5 - 2e-7 * len(terms)  # scores are float32
        floor = 0.0  # a lower bound of the k-th best score
        leaders, looked_at = set(), 0
        for i, term in enumerate(terms):
            if most[i] >= floor and touched and term.stop - term.start > WORTHWHILE:
                for found in touched[looked_at:]:
                    leaders.update(found.take(_greatest(totals.take(found), LEADERS * k)).tolist())
                looked_at = len(touched)
                floor = max(floor, slack * self._kth_total(leaders, terms[i:], k))
            if most[i] < floor:  # a passage without any of the terms so far cannot be among the best
                break
            touched.append(self._add_up(term, totals))
        else:
            i = len(terms)
        docs = self._reached(totals, touched, floor - most[i], k)
        docs, scores = self._sift(docs, totals.take(docs), terms[i:], floor)
        for j, term in enumerate(terms[i:], i):
            if len(docs) * LOOK_UP > term.stop - term.start:
                totals[docs] = scores
                touched.append(self._add_up(term, totals))
                scores = totals.take(docs)
            else:
                scores = scores + self._look_up(docs, term)
            if len(docs) > k:
                floor = max(floor, slack * float(np.partition(scores, -k)[-k]))
                docs, scores = _at_least(docs, scores, floor - most[j + 1])
        return docs, scores

    def _totals(self):
        """Scores so far, by passage; zero between queries. One array a thread."""
        if not hasattr(self.scratch, "totals"):
            self.scratch.totals = np.zeros(len(self.rank), np.float32)
            self.scratch.slots = np.empty(len(self.rank), np.int32)
        return self.scratch.totals

    def _reached(self, totals, touched, least, k):
        """The touched passages whose totals are at least `least`; where that is nothing, at least the k best."""
        least = max(least, np.finfo(np.float32).tiny)
        if _are_few(touched, totals):
            docs = np.concatenate([np.empty(0, np.intp), *touched])
            docs = docs.take(np.flatnonzero(totals.take(docs) >= least))
            slots, numbers = self.scratch.slots, np.arange(len(docs), dtype=np.int32)
            slots[docs] = numbers  # of a passage that is there twice, one number stays
            return docs.take(np.flatnonzero(slots.take(docs) == numbers))
        rows = len(totals) // 64
        if least < 1e-30 and rows > k:  # the k-th best of the columns' greatest is no better than the k-th best of all
            least = max(least, np.partition(totals[: rows * 64].reshape(64, rows).max(0), -k)[-k])
        return np.flatnonzero(totals >= least)

    def _add_up(self, term, totals):
        """Add a term to the totals of all its passages; returns these."""
        found = self.docs[term.start : term.stop].astype(np.intp)
        np.add.at(totals, found, self.impacts[term.start : term.stop] * np.float32(term.weight))
        return found

    def _look_up(self, docs, term):
        """What a term adds to the scores of some passages, found by binary search."""
        postings = self.docs[term.start : term.stop]
        at = postings.searchsorted(docs.astype(np.uint32))
        np.minimum(at, len(postings) - 1, out=at)
        return (postings.take(at) == docs) * (self.impacts[term.start : term.stop].take(at) * np.float32(term.weight))

    def _sift(self, docs, scores, terms, floor):
        """Drop passages that cannot reach the floor, by the bytes of the common terms."""
        rest = sum(term.most for term in terms)
        docs, scores = _at_least(docs, scores, floor - rest)
        upper = scores
        for term in terms:
            if term.row is not None and len(docs) > LOOK_UP:
                rest -= term.most
                upper = upper + term.row.take(docs) * np.float32(term.most / 255)
                keep = np.flatnonzero(upper >= floor - rest)
                docs, scores, upper = docs.take(keep), scores.take(keep), upper.take(keep)
        return docs, scores

    def _kth_total(self, docs, terms, k):
        """A lower bound of the k-th best score: the k-th best of some passages, with all their terms."""
        if len(docs) < k:
            return 0.0
        docs = np.fromiter(docs, np.intp, len(docs))
        scores = self._totals().take(docs)
        chosen = _greatest(scores, LEADERS * k)
        docs, scores = docs.take(chosen), scores.take(chosen)
        for term in terms:
            if term.row is None:
                scores = scores + self._look_up(docs, term)
            else:  # the bytes are rounded up: one less is a lower bound
                scores = scores + (np.maximum(term.row.take(docs), 1) - 1.0) * np.float32(term.most / 255)
        return float(np.partition(scores, -k)[-k])


def _are_few(touched, totals):
    """Whether it is faster to go through the touched passages than through all."""
    return 6 * sum(map(len, touched)) < len(totals)


def _greatest(scores, n):
    """Where the n greatest scores are, in any order."""
    return scores.argpartition(-n)[-n:] if len(scores) > n else np.arange(len(scores))


def _at_least(docs, scores, least):
    keep = np.flatnonzero(scores >= least)
    return docs.take(keep), scores.take(keep)


def best_of(docs, scores, rank, k):
    """The k best of some passages and their scores, best first, ties in the order of ids."""
    if len(scores) > k:
        docs, scores = _at_least(docs, scores, np.partition(scores, -k)[-k])
    order = np.lexsort((rank[docs], -scores))[:k]
    return docs[order], scores[order]
