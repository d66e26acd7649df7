"""The sparse index: TF-IDF and BM25 from one inverted index on disk, in NumPy.

Building: chunks of the passages file become runs (small inverted indexes; processes share the work),
then the runs are merged. Memory is bounded by the chunk, the merged range and the vocabulary.
Search: exact best k, without reading the postings of common words where they cannot matter.
Imported by retriever.py; not run by itself.
"""

import collections
import concurrent.futures.process
import math
import multiprocessing
import os
import signal
import threading

import numpy as np

from common import InputError
from passages import read_chunk, save_run
from words import WORD, WordTable, blocks, index_term, number_block, split_words

CHUNK = 8 << 20  # bytes of the passages file that one process inverts at once: sets the memory of a build
COMMON = 16  # terms in one of so many passages are common: they also get a row of bytes, one a passage
LEVELS = 15  # of these bytes: few enough for the sums of most queries to stay within 255, enough to tell passages apart
RANGE = 1 << 21  # postings that are merged at once (or one term's, where it has more)
PIECE = 1 << 12  # of these, from each run: a read costs as much as so many

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


def term_ranges(starts, postings=RANGE):
    first = 0
    while first < len(starts) - 1:
        last = max(int(np.searchsorted(starts, starts[first] + postings, side="right")) - 1, first + 1)
        yield first, last
        first = last


def posting_ranges(run, names=("docs", "tfs")):
    """(first term, last, *columns) for about RANGE postings at a time."""
    starts = np.concatenate([[0], np.cumsum(run.counts, dtype=np.int64)])
    for first, last in term_ranges(starts):
        yield first, last, *(run.read(name, starts[first], starts[last]) for name in names)


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
        for first, last in term_ranges(starts, max(RANGE, PIECE * len(runs))):
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


# Scores. A passage's score is the sum, over the terms of the query, of repeats(n) x weight(term) x impact(term,
# passage), divided by the norm of the query; n is how often the query has the term.


class TfIdf:
    """Cosine of TF-IDF vectors with (1 + ln tf) idf and the smooth idf = ln((1 + N) / (1 + df)) + 1,
    as scikit-learn's TfidfVectorizer(sublinear_tf=True) has it."""

    def __init__(self, settings, count):
        self.count = count

    def idf(self, df):
        return np.log((1 + self.count) / (1 + df)) + 1

    def weight(self, df):
        return self.idf(df) ** 2  # one idf of the query's vector, one of the passage's

    def repeats(self, n):
        return 1 + math.log(n)

    def norm(self, repeats, weights):
        return math.sqrt(sum(n * n * weight for n, weight in zip(repeats, weights, strict=True)))

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

    def weight(self, df):
        return np.log(1 + (self.count - df + 0.5) / (df + 0.5))

    def repeats(self, n):
        return n

    def norm(self, repeats, weights):
        return 1.0

    def passage_factors(self, run):
        return self.k1 * (1 - self.b + self.b * run.lengths / max(run.lengths.mean(), 1e-30))

    def impacts(self, tfs, factors):
        return tfs / (tfs + factors)


SCORINGS = {"tfidf": TfIdf, "bm25": Bm25}


def write_impacts(data, settings):
    """What depends on the whole collection: every posting's impact, and the bytes that the search adds up.

    A byte is weight x impact in whole units, rounded up. The unit is the least with which a common term stays
    within LEVELS and any term within 255. Common terms also get a row of one byte a passage (0: no posting).
    """
    run = Run(data)
    scoring = SCORINGS[settings["kind"]](settings, len(run.lengths))
    factors = scoring.passage_factors(run).astype(np.float32)
    weights = scoring.weight(run.counts).astype(np.float32)
    greatest = np.empty(len(weights), np.float32)
    shape = run.columns["docs"].shape
    with column_file(data / "impacts.npy", np.float32, shape) as file:
        for first, last, docs, tfs in posting_ranges(run):
            impacts = scoring.impacts(tfs.astype(np.float32), factors[docs])
            starts = np.cumsum(run.counts[first:last], dtype=np.int64) - run.counts[first:last]
            greatest[first:last] = np.maximum.reduceat(impacts, starts)
            impacts.tofile(file)
    common = np.flatnonzero(run.counts * COMMON >= len(run.lengths))
    most = greatest * weights
    unit = max(most[common].max(initial=0) / LEVELS, most.max(initial=0) / 255, 1e-30)
    scale = weights / np.float32(unit)
    in_units = lambda impacts, scale: np.ceil(impacts * scale).clip(0, 255).astype(np.uint8)  # noqa: E731
    for name, column in {"common": common, "unit": unit, "greatest": in_units(greatest, scale)}.items():
        np.save(data / f"{name}.npy", column)
    run.columns["impacts"] = np.load(data / "impacts.npy", mmap_mode="r")
    with (
        column_file(data / "units.npy", np.uint8, shape) as units_file,
        column_file(data / "rows.npy", np.uint8, (len(common), len(run.lengths))) as rows_file,
    ):
        for first, last, docs, impacts in posting_ranges(run, ("docs", "impacts")):
            counts = run.counts[first:last]
            units = in_units(impacts, np.repeat(scale[first:last], counts))
            units.tofile(units_file)
            starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
            for place in common[np.searchsorted(common, first) : np.searchsorted(common, last)] - first:
                own = slice(*starts[place : place + 2])
                row = np.zeros(len(run.lengths), np.uint8)
                row[docs[own]] = units[own]
                row.tofile(rows_file)


# Search. Scores are bounded first, for every passage, by sums of whole units in bytes: postings are added to their
# passages, the rows of common terms as a whole. Then the passages with the greatest bounds are scored exactly, and
# any other whose bound reaches the k-th best of these scores.

LEADERS = 4  # times k: the passages that are scored first
COLUMNS = 1024  # at least: the bounds' maxima are taken over so many columns
FEW = 64  # when a query's postings are fewer than one in so many passages, those passages are looked at, not all
ROUNDING = 1 - 1e-5  # scores are float32

Term = collections.namedtuple("Term", "count start weight greatest row")
Query = collections.namedtuple("Query", "terms times weights norm")


class SparseIndex:
    """The postings of an index, mapped into memory. Threads may share it."""

    def __init__(self, data, settings):
        names = ("terms", "starts", "docs", "impacts", "units", "rows", "greatest", "rank")
        columns = (np.asarray(np.load(data / f"{name}.npy", mmap_mode="r")) for name in names)
        self.terms, self.starts, self.docs, self.impacts, self.units, self.rows, self.greatest, self.rank = columns
        self.row_of = {place: row for row, place in enumerate(np.load(data / "common.npy").tolist())}
        self.unit = float(np.load(data / "unit.npy"))
        self.settings = settings
        self.scoring = SCORINGS[settings["kind"]](settings, len(self.rank))
        self.known = {}  # words of earlier queries
        self.scratch = threading.local()

    def _term(self, word):
        """The Term of a word; None if no passage has it."""
        key = np.array(index_term(word, self.settings), self.terms.dtype)
        place = int(np.searchsorted(self.terms, key))
        if place == len(self.terms) or self.terms[place] != key:
            return None
        start, stop = self.starts[place : place + 2].tolist()
        weight = float(self.scoring.weight(stop - start))
        return Term(stop - start, start, weight, int(self.greatest[place]), self.row_of.get(place))

    def parse(self, query):
        """The Query of a text: its terms, the rarest first; for each the whole number of times that its bytes
        count, and its weight in the score; and the norm of the query."""
        numbers = {}
        for word in split_words(query):
            try:
                term = self.known[word]
            except KeyError:
                if len(self.known) > 1 << 20:
                    self.known = {}
                term = self.known[word] = self._term(word)
            if term:
                numbers[term] = numbers.get(term, 0) + 1
        terms = sorted(numbers)
        repeats = [self.scoring.repeats(numbers[term]) for term in terms]
        norm = self.scoring.norm(repeats, [term.weight for term in terms])
        weights = [n * term.weight / norm for n, term in zip(repeats, terms, strict=True)]
        return Query(terms, [math.ceil(n) for n in repeats], weights, norm)

    def top(self, queries, k):
        """[(passage numbers, scores)] of the k best passages for each query."""
        return [self.best(query, k) for query in queries]

    def best(self, query, k):
        """(passage numbers, scores) of the k best passages that share a term with the query, best first."""
        query = self.parse(query)
        if not query.terms:
            return np.empty(0, np.intp), np.empty(0, np.float32)
        bounds = self._bounds(query)
        try:
            common = []
            for term, times in zip(query.terms, query.times, strict=True):
                if term.row is None:
                    part = slice(term.start, term.start + term.count)
                    bounds.add_postings(self.docs[part], self.units[part], times)
                else:
                    common.append((self.rows[term.row], times, term.greatest * times))
            best = self._best_of_few(query, bounds, common, k)
            if best is None:
                for row, times, _ in common:
                    bounds.add_row(row, times)
                best = self._best_of_all(query, bounds, k)
        finally:
            bounds.clear()
        return best

    def _bounds(self, query):
        """The thread's Bounds in the least integers that hold the sums of this query."""
        most = sum(term.greatest * times for term, times in zip(query.terms, query.times, strict=True))
        kind = "uint8" if most < 1 << 8 else "uint16" if most < 1 << 16 else "uint32"
        if not hasattr(self.scratch, kind):
            setattr(self.scratch, kind, Bounds(len(self.rank), kind))
        return getattr(self.scratch, kind)

    def _best_of_all(self, query, bounds, k):
        maxima = bounds.maxima(LEADERS * k)
        least = _nth_greatest(maxima, LEADERS * k)
        docs = bounds.at_least(least, maxima)
        scores = self.scores(query, docs)
        floor = self._floor(query, scores, k)
        if floor < least:
            docs = bounds.at_least(floor, maxima)
            scores = self.scores(query, docs)
        return best_of(docs, scores, self.rank, k)

    def _best_of_few(self, query, bounds, common, k):
        """The k best, if few passages have a rarer term and common terms alone bring none among them; else None."""
        if not 0 < FEW * bounds.postings < len(self.rank):
            return None
        docs, units = bounds.touched()
        leaders = np.unique(docs.compress(units >= _nth_greatest(units, LEADERS * k)))
        floor = self._floor(query, self.scores(query, leaders), k)
        rest = sum(most for _, _, most in common)
        if rest >= floor:
            return None
        docs, units = _at_least(docs, units, floor - rest)
        for row, times, most in common:
            rest -= most
            units = units + row.take(docs).astype(np.int64) * times
            docs, units = _at_least(docs, units, floor - rest)
        docs = np.unique(docs)
        return best_of(docs, self.scores(query, docs), self.rank, k)

    def _floor(self, query, scores, k):
        """The units that a bound must reach to be of interest beside these scores; at least 1."""
        if len(scores) < k:
            return 1
        return max(1, math.ceil(float(np.partition(scores, -k)[-k]) * ROUNDING * query.norm / self.unit))

    def scores(self, query, docs):
        """The scores of passages, given by their numbers in order: float32 [docs]. The terms are added up in one
        order, so that a score does not depend on what else is scored."""
        wanted = docs.astype(np.uint32)
        at = [self.docs[term.start : term.start + term.count].searchsorted(wanted) for term in query.terms]
        starts = np.array([term.start for term in query.terms])[:, None]
        lasts = starts + np.array([term.count - 1 for term in query.terms])[:, None]
        at = np.minimum(np.array(at) + starts, lasts)
        parts = self.impacts.take(at) * np.array(query.weights, np.float32)[:, None]
        scores = np.zeros(len(docs), np.float32)
        for part in parts * (self.docs.take(at) == wanted):
            scores += part
        return scores


class Bounds:
    """Upper bounds of the scores of all passages, for one query after another. Not for two threads at once."""

    def __init__(self, count, kind):
        self.padded = np.zeros(count + count // COLUMNS + 1, kind)
        self.units = self.padded[:count]
        self.added, self.postings, self.rows = [], 0, False

    def add_postings(self, docs, units, times):
        docs = docs.astype(np.intp)
        units = units.astype(self.units.dtype, copy=False)
        self.added.append(docs)
        self.postings += len(docs)
        np.add.at(self.units, docs, units if times == 1 else units * self.units.dtype.type(times))

    def add_row(self, row, times):
        self.rows = True
        np.add(self.units, row if times == 1 else row * self.units.dtype.type(times), out=self.units)

    def touched(self):
        """(passages, bounds) for every posting that was added."""
        docs = np.concatenate([np.empty(0, np.intp), *self.added])
        return docs, self.units.take(docs)

    def maxima(self, n):
        """The greatest bounds of the columns, much more than n of them if there can be, when the bounds are written
        in rows, one passage after another."""
        rows = max(1, len(self.units) // max(COLUMNS, len(self.units) >> 9, 16 * n))
        columns = -(-len(self.units) // rows)
        return self.padded[: rows * columns].reshape(rows, columns).max(0)

    def at_least(self, least, maxima):
        """The passages whose bounds are at least `least`, in order."""
        columns = np.flatnonzero(maxima >= least)
        docs = (np.arange(0, len(self.units), len(maxima))[:, None] + columns).ravel()
        return docs.compress(self.padded.take(docs) >= least)

    def clear(self):
        if self.rows or FEW * self.postings >= len(self.units):
            self.units.fill(0)
        else:
            for docs in self.added:
                self.units[docs] = 0
        self.added, self.postings, self.rows = [], 0, False


def _nth_greatest(units, n):
    """The n-th greatest of some bounds; at least 1."""
    return max(1, int(np.sort(units, kind="stable")[-n])) if len(units) > n else 1  # stable: by radix, in one pass


def _at_least(docs, scores, least):
    keep = np.flatnonzero(scores >= least)
    return docs.take(keep), scores.take(keep)


def best_of(docs, scores, rank, k):
    """The k best of some passages and their scores, best first, ties in the order of ids."""
    if len(scores) > k:
        docs, scores = _at_least(docs, scores, np.partition(scores, -k)[-k])
    order = np.lexsort((rank[docs], -scores))[:k]
    return docs[order], scores[order]
