"""The retriever: words, scores, exactness of the pruned search, crash safety, dense search, the server.

    pytest tests/test_retriever.py

Scores are compared with plain formulas in float64 here, and with scikit-learn, bm25s and faiss in
test_retriever_interop.py.
"""

import collections
import gzip
import http.client
import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import dense
import retriever
import sparse
from common import InputError
from words import WordTable, number_block, split_words, stem_word

SCRIPT = Path(retriever.__file__)
RAW = {"stem": False, "stop_words": False, "title_weight": 1, "quiet": True}


def write_passages(path, texts, ids=None):
    rows = [{"id": str(ids[i]) if ids else f"p{i:05d}", "contents": text} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def zipf_texts(count, vocabulary=2000, seed=0):
    """Passages of words whose frequencies fall as in text, from one in half the passages to one in all."""
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocabulary + 1)
    words = np.array([f"w{i}" for i in range(vocabulary)])
    lengths = generator.integers(3, 60, count)
    return [" ".join(generator.choice(words, length, p=weights / weights.sum())) for length in lengths]


def build(tmp_path, texts, kind="tfidf", ids=None, name="index", **settings):
    path = write_passages(tmp_path / f"{name}.jsonl", texts, ids)
    retriever.build(path, tmp_path / name, kind, **{**RAW, **settings})
    return retriever.load(tmp_path / name)


def data_files(folder):
    data = folder / json.loads((folder / "index.json").read_text())["data"]
    return {path.name: path.read_bytes() for path in sorted(data.iterdir())}


# Words


@pytest.mark.parametrize(
    "text, words",
    [
        ("The CAT, the cat's  hat!", "the cat the cat s hat"),
        ("Beyoncé BEYONCE\u0301 beyonce", "beyonce beyonce beyonce"),
        ("Straße ΣΊΣΥΦΟΣ Çelik ĐORĐE", "strasse σισυφοσ celik đorđe"),
        ("Москва – МОСКВА… “москва”", "москва москва москва"),
        ("İstanbul ﬁnance ½ x²", "istanbul finance 1 2 x2"),
        ("東京都 ひらがな 한국", "東 京 都 ひ ら か な " + unicodedata.normalize("NFKD", "한국")),
        ("snake_case a\u00a0b\u200bc 3.14", "snake case a b c 3 14"),
        ("हिन्दी", "हिनदी"),
        ("\ud800 lone", "lone"),
        ("", ""),
    ],
)
def test_words_of_any_script(text, words):
    assert [word.decode() for word in split_words(text)] == words.split()


def test_long_words_are_cut_not_merged():
    words = split_words("a" * 70 + " " + "a" * 71)
    assert [len(word) for word in words] == [32, 32, 6, 32, 32, 7]


def block_words(texts):
    """The words of each text as the build's vectorised splitter sees them."""
    tables = WordTable(1, bits=4), WordTable(4, bits=4)  # small, so that they grow
    numbers, owners = number_block(texts, tables)
    names = [t.words().T.copy().view(f"S{8 * t.columns}").ravel().tolist() for t in tables]
    words = [[] for _ in texts]
    for number, owner in zip(numbers.tolist(), owners.tolist(), strict=True):
        words[owner].append(names[number % 2][number // 2])
    return words


def test_block_splitter_equals_plain_splitter():
    generator = random.Random(0)
    alphabet = "aabbcdeABE019  .,-'_\n\té\u0301ÉßΣςİЖж東あ한½²ﬁ\u200b\u00a0\U0001d400\U0001f600ा"
    texts = ["".join(generator.choices(alphabet, k=generator.randrange(120))) for _ in range(2000)]
    texts += ["", " ", "x", "a" * 500, "é" * 200, "ab" * 17]
    assert block_words(texts) == [split_words(text) for text in texts]


def test_word_table_never_merges_words_whose_hashes_collide(monkeypatch):
    monkeypatch.setattr(WordTable, "_slots", lambda self, keys: np.full(keys.shape[1], 3, np.int64))
    words = [f"{a}{b}" for a in ("", "a", "quitelongword") for b in range(100)]
    got = block_words([" ".join(words), " ".join(reversed(words))])
    assert got == [[word.encode() for word in words], [word.encode() for word in reversed(words)]]


def test_stemmer_and_stop_words(tmp_path):
    assert [stem_word(w) for w in (b"films", b"ladies", b"glass", b"virus", b"is", b"film")] == [
        b"film",
        b"lady",
        b"glass",
        b"virus",
        b"is",
        b"film",
    ]
    index = build(tmp_path, ["the film", "a novel"], stem=True, stop_words=True)
    assert [hit.id for hit in index.search(["the films"])[0]] == ["p00000"]
    assert index.search(["the"]) == [[]]


# Scores


def plain_scores(texts, query, kind, k1=1.5, b=0.9):
    """The formulas of the docstrings, one passage at a time, in float64."""
    counts = [collections.Counter(split_words(text)) for text in texts]
    df = collections.Counter(word for count in counts for word in count)
    n, mean = len(texts), sum(sum(count.values()) for count in counts) / len(texts)
    asked = {word: times for word, times in collections.Counter(split_words(query)).items() if word in df}
    if kind == "bm25":
        idf = {w: math.log(1 + (n - df[w] + 0.5) / (df[w] + 0.5)) for w in df}
        return [
            sum(q * idf[w] * c[w] / (c[w] + k1 * (1 - b + b * sum(c.values()) / mean)) for w, q in asked.items())
            for c in counts
        ]
    idf = {w: math.log((1 + n) / (1 + df[w])) + 1 for w in df}

    def vector(count):
        raw = {w: (1 + math.log(times)) * idf[w] for w, times in count.items()}
        norm = math.sqrt(sum(x * x for x in raw.values())) or 1.0
        return {w: x / norm for w, x in raw.items()}

    q = vector(asked)
    return [sum(x * v.get(w, 0.0) for w, x in q.items()) for v in map(vector, counts)]


@pytest.mark.parametrize("kind", ["tfidf", "bm25"])
def test_scores_are_those_of_the_formulas(tmp_path, kind):
    texts = [*zipf_texts(300, 200), "w1 " * 300, "Ünïcode wörds w1", "..."]
    index = build(tmp_path, texts, kind)
    for query in ("w1 w2 w3", "w1 w1 w150", "unicode WORDS", "w7 w199 nosuchword", *zipf_texts(20, 200, seed=1)):
        expected = plain_scores(texts, query, kind)
        docs, scores = index.top([query], len(texts))[0]
        assert len(docs) == sum(score > 0 for score in expected)
        np.testing.assert_allclose(scores, [expected[doc] for doc in docs], rtol=1e-5)
        assert all(np.diff(scores) <= 0)


def test_title_weight_counts_the_first_line_again(tmp_path):
    texts = ['"Paris"\nThe city', '"Rome"\nParis is not it', "Paris alone"]
    weighted = build(tmp_path, texts, "bm25", title_weight=3, name="weighted")
    spelled = build(
        tmp_path, ['"Paris"\n"Paris"\n"Paris"\nThe city', '"Rome"\n' * 3 + "Paris is not it", texts[2]], "bm25"
    )
    for query in ("paris", "rome city"):
        assert [(h.id, h.score) for h in weighted.search([query])[0]] == [
            (h.id, h.score) for h in spelled.search([query])[0]
        ]


# Exactness


def exhaustive(engine, query, k):
    """Every posting of every term, added up in the order that the engine states, and all passages sorted."""
    totals = np.zeros(len(engine.rank), np.float32)
    query = engine.parse(query)
    for term, weight in zip(query.terms, query.weights, strict=True):
        own = slice(term.start, term.start + term.count)
        totals[engine.docs[own]] += engine.impacts[own] * np.float32(weight)
    found = np.flatnonzero(totals)
    best = found[np.lexsort((engine.rank[found], -totals[found]))][:k]
    return best.tolist(), totals[best].tolist()


def count_scored(engine, monkeypatch):
    """A list that grows by the number of passages that are scored exactly, call by call."""
    scored, scores = [], engine.scores
    monkeypatch.setattr(engine, "scores", lambda query, docs: scored.append(len(docs)) or scores(query, docs))
    return scored


@pytest.mark.parametrize("columns", [8, sparse.COLUMNS])
@pytest.mark.parametrize("kind", ["tfidf", "bm25"])
def test_search_equals_exhaustive_search(tmp_path, monkeypatch, kind, columns):
    monkeypatch.setattr(sparse, "COLUMNS", columns)  # a small corpus in rows and columns as a large one is
    texts = zipf_texts(4000)
    texts += texts[:400]  # many ties
    ids = random.Random(0).sample(range(10**6), len(texts))
    engine = build(tmp_path, texts, kind, ids=ids).engine
    scored = count_scored(engine, monkeypatch)
    few, best_of_few = [], engine._best_of_few
    monkeypatch.setattr(engine, "_best_of_few", lambda *a: few.append(best_of_few(*a)) or few[-1])
    generator = np.random.default_rng(1)
    matching = 0
    for number in range(2000):
        words = generator.integers(0, 2000 if number % 2 else 300, generator.integers(1, 15)) // generator.integers(
            1, 20
        )
        query = " ".join(f"w{word}" for word in words)
        for k in (1, 3, 20):
            docs, scores = engine.best(query, k)
            assert (docs.tolist(), scores.tolist()) == exhaustive(engine, query, k), query
        matching += len(exhaustive(engine, query, 10**6)[0])
    assert sum(scored) < 0.2 * 3 * matching  # it did prune
    assert 30 < sum(best is not None for best in few) < len(few) - 30  # both ways were taken
    for bounds in vars(engine.scratch).values():
        assert not bounds.padded.any()


@pytest.mark.parametrize("kind", ["tfidf", "bm25"])
def test_units_bound_the_scores_from_above(tmp_path, kind):
    """So must every byte, and no byte may exceed what its term is said to have at most: the sums would overflow."""
    engine = build(tmp_path, zipf_texts(3000), kind).engine
    counts = np.diff(engine.starts)
    assert np.array_equal(np.maximum.reduceat(engine.units, engine.starts[:-1]), engine.greatest)
    weights = np.repeat(engine.scoring.weight(counts), counts)
    assert (engine.units * engine.unit * (1 + 1e-6) >= weights * engine.impacts).all() and engine.units.min() > 0
    assert engine.greatest.max() <= 255 and len(engine.row_of) > 10
    for place, row in engine.row_of.items():
        own = slice(*engine.starts[place : place + 2])
        expected = np.zeros(len(engine.rank), np.uint8)
        expected[engine.docs[own]] = engine.units[own]
        assert counts[place] * sparse.COMMON >= len(engine.rank) and np.array_equal(engine.rows[row], expected)


@pytest.mark.parametrize("repeats", [1, 2, 200, 5000])
def test_long_queries_get_wider_sums(tmp_path, repeats):
    engine = build(tmp_path, zipf_texts(1000), "bm25").engine
    query = " ".join([f"w{number}" for number in range(60)] * repeats)
    docs, scores = engine.best(query, 5)
    assert (docs.tolist(), scores.tolist()) == exhaustive(engine, query, 5)
    assert [*vars(engine.scratch)] == [{1: "uint16", 2: "uint16", 200: "uint32", 5000: "uint32"}[repeats]]


def test_search_skips_the_commonest_word(tmp_path, monkeypatch):
    texts = [f"the common word {'rare' if i in (5, 4000) else ''} n{i}" for i in range(30_000)]
    engine = build(tmp_path, texts, "bm25").engine
    monkeypatch.setattr(sparse.Bounds, "add_row", lambda *_: pytest.fail("a row was added up"))
    scored = count_scored(engine, monkeypatch)
    assert engine.best("the rare common word", 2)[0].tolist() == [5, 4000]
    assert max(scored) == 2


def test_an_index_of_another_format_is_refused_and_built_again(tmp_path):
    index = build(tmp_path, ["a text", "another"], "bm25")
    expected = index.search(["text"])
    manifest = index.folder / "index.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {retriever.FORMAT}', '"format": 1'))
    with pytest.raises(InputError, match="format 1, but this program reads 2; build it again"):
        retriever.load(index.folder)
    assert build(tmp_path, ["a text", "another"], "bm25").search(["text"]) == expected


def test_ties_are_in_the_order_of_ids(tmp_path):
    ids = ["b", "a10", "a9", "é", "Z", "a1"]
    index = build(tmp_path, ["same text"] * 6, ids=ids)
    for k in range(1, 8):
        assert [hit.id for hit in index.search(["text"], k)[0]] == sorted(ids)[:k]


def test_threads_share_an_index(tmp_path):
    index = build(tmp_path, zipf_texts(2000), "bm25")
    queries = zipf_texts(40, seed=3)
    expected = index.search(queries)
    results = {}

    def work(number):
        results[number] = index.search(queries)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all(results[n] == expected for n in range(4))


# What people hand in


def test_hits_and_odd_queries(tmp_path):
    index = build(tmp_path, ['"Ångström"\nA unit\u2028of length', "other words", ""])
    assert index.search(["angstrom"]) == [
        [retriever.Hit("p00000", pytest.approx(0.4472, abs=1e-3), '"Ångström"\nA unit\u2028of length')]
    ]
    assert index.search([]) == []
    assert index.search(["", "   ", "unknown", "?!", "WORDS"], k=10)[:4] == [[], [], [], []]
    assert len(index.search(["a unit other"], k=1000)[0]) == 2
    assert len(index.search(["unit " * 5000])[0]) == 1
    for wrong in ({"queries": "unit"}, {"queries": ["unit"], "k": 0}, {"queries": ["unit"], "k": 1.5}):
        with pytest.raises(InputError):
            index.search(**wrong)


def test_one_passage(tmp_path):
    for kind in ("tfidf", "bm25"):
        index = build(tmp_path, ["one passage"], kind, name=kind)
        assert [hit.id for hit in index.search(["passage"])[0]] == ["p00000"]


@pytest.mark.parametrize("texts, hits", [(["...", "?"], 0), ([f"own{i}" for i in range(100)], 1), (["the", "a"], 0)])
def test_no_words_and_no_common_words(tmp_path, texts, hits):
    for kind in ("tfidf", "bm25"):
        index = build(tmp_path, texts, kind, name=kind, stop_words=True)
        assert [len(found) for found in index.search(["own7 the", "..."])] == [hits, 0]


def test_many_repeats_of_a_word(tmp_path):
    index = build(tmp_path, ["w " * 70_000, "w", "w w"], "bm25", b=0.0)
    assert [hit.id for hit in index.search(["w"])[0]] == ["p00000", "p00002", "p00001"]


@pytest.mark.parametrize(
    "lines, problem",
    [
        (b'{"id": "1", "contents": "x"}\n\n{"id": "2", "contents": \n', ":3: not JSON"),
        (b'{"id": "1", "contents": "x"}\n{"id": 2, "contents": "y"}\n', ":2: a passage is"),
        (b'{"id": "1", "text": "x"}\n', ":1: a passage is"),
        (b'["1", "x"]\n', ":1: a JSON object was expected"),
        (b'{"id": "1", "contents": "x"}\n{"id": "2", "contents": "\xff"}\n', ":2: not UTF-8"),
        (
            b'{"id": "1", "contents": "x"}\n{"id": "9", "contents": "y"}\n\n{"id": "1", "contents": "z"}\n',
            ":4: the id '1'",
        ),
        (b"", "no passages in it"),
        (b"\n\n", "no passages in it"),
    ],
)
def test_bad_passages_are_named_by_line(tmp_path, monkeypatch, lines, problem):
    monkeypatch.setattr(sparse, "CHUNK", 40)
    path = tmp_path / "bad.jsonl"
    path.write_bytes(lines)
    with pytest.raises(InputError) as error:
        retriever.build(path, tmp_path / "index", **RAW, workers=1)
    assert str(path) + (problem if problem.startswith(":") else ": " + problem) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "index" / "index.json").exists()


def test_bad_settings_and_missing_files(tmp_path):
    path = write_passages(tmp_path / "p.jsonl", ["x"])
    for wrong in ({"b": 1.5}, {"k1": -1}, {"kind": "bm52"}, {"title_weight": 0}):
        with pytest.raises(InputError):
            retriever.build(path, tmp_path / "index", **{"kind": "bm25", **wrong})
    with pytest.raises(InputError, match="no such file"):
        retriever.build(tmp_path / "none.jsonl", tmp_path / "index")
    with pytest.raises(InputError, match="no index here"):
        retriever.load(tmp_path / "nowhere")


def test_gzipped_passages(tmp_path):
    texts = zipf_texts(200)
    plain = build(tmp_path, texts, name="plain")
    zipped = tmp_path / "p.jsonl.gz"
    zipped.write_bytes(gzip.compress((tmp_path / "plain.jsonl").read_bytes()))
    retriever.build(zipped, tmp_path / "zipped", **RAW)
    query = texts[:5]
    expected = plain.search(query)
    zipped_index = retriever.load(tmp_path / "zipped")
    assert zipped_index.search(query) == expected
    retriever.build(tmp_path / "plain.jsonl", tmp_path / "zipped", **RAW)
    assert not list((tmp_path / "zipped").glob("passages-*"))  # the copy goes with the index that needed it
    zipped.write_bytes(zipped.read_bytes()[:-500])
    with pytest.raises(InputError, match="not a whole gzip file"):
        retriever.build(zipped, tmp_path / "broken", **RAW)


def test_folder_moves_with_its_passages_and_changes_are_noticed(tmp_path):
    (tmp_path / "a").mkdir()
    build(tmp_path / "a", ["first words", "second words"])
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert len(retriever.load(tmp_path / "b" / "index").search(["words"])[0]) == 2
    path = tmp_path / "b" / "index.jsonl"
    path.write_text(path.read_text().replace("first", "fierc"))
    with pytest.raises(InputError, match="changed since"):
        retriever.load(tmp_path / "b" / "index")
    path.unlink()
    with pytest.raises(InputError, match="are gone"):
        retriever.load(tmp_path / "b" / "index")


# Building: chunks, processes, kills, additions


def test_chunks_and_processes_do_not_change_the_index(tmp_path, monkeypatch):
    texts = zipf_texts(1500)
    monkeypatch.setattr(sparse, "RANGE", 1000)
    whole = build(tmp_path, texts, "bm25", name="whole").folder
    monkeypatch.setattr(sparse, "CHUNK", 50_000)
    path = tmp_path / "whole.jsonl"
    for name, workers in (("one", 1), ("two", 2)):
        retriever.build(path, tmp_path / name, "bm25", **RAW, workers=workers)
        assert data_files(tmp_path / name) == data_files(whole)
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["build.jsonl", "data-1", "index.json"]


BUILD_SLOWLY = """
import sys, time
sys.path.insert(0, sys.argv[1])
import retriever, sparse
sparse.CHUNK = 20_000
build_run = sparse.build_run
def slow(*arguments):
    build_run(*arguments)
    time.sleep(0.15)
sparse.build_run = slow
retriever.build(sys.argv[2], sys.argv[3], "bm25", workers=1, quiet=True)
"""


def test_killed_build_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path = write_passages(tmp_path / "p.jsonl", zipf_texts(1500))
    monkeypatch.setattr(sparse, "CHUNK", 20_000)
    retriever.build(path, tmp_path / "whole", "bm25", workers=1, quiet=True)
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", BUILD_SLOWLY, SCRIPT.parent, path, out])
    while len(list(out.glob("building/run-??????"))) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    with pytest.raises(InputError, match="no index here"):
        retriever.load(out)
    kept = {p.name: p.stat().st_ino for p in out.glob("building/run-??????")}
    made, build_run = [], sparse.build_run
    monkeypatch.setattr(sparse, "build_run", lambda *job: made.append(job[-1].name) or build_run(*job))
    retriever.build(path, out, "bm25", workers=1, quiet=True)
    assert len(kept) >= 3 and not set(made) & set(kept)
    assert data_files(out) == data_files(tmp_path / "whole")


def test_workers_end_with_a_killed_build(tmp_path):
    path = write_passages(tmp_path / "p.jsonl", zipf_texts(4000))
    code = "import sys; sys.path.insert(0, sys.argv[1]); import retriever, sparse; sparse.CHUNK = 2000\n"
    code += "retriever.build(sys.argv[2], sys.argv[3], workers=2, quiet=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, SCRIPT.parent, path, tmp_path / "index"], start_new_session=True
    )
    while len(list(tmp_path.glob("index/building/run-*"))) < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while True:
        try:
            os.killpg(process.pid, 0)  # the build's process group is there while one of its workers is
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "workers go on after their parent was killed"
        time.sleep(0.05)


def test_unfinished_build_of_other_settings_is_not_mixed_in(tmp_path, monkeypatch):
    path = write_passages(tmp_path / "p.jsonl", zipf_texts(500))
    monkeypatch.setattr(sparse, "CHUNK", 20_000)
    monkeypatch.setattr(sparse, "merge", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        retriever.build(path, tmp_path / "index", **{**RAW, "stem": True}, workers=1)
    monkeypatch.undo()
    retriever.build(path, tmp_path / "index", **RAW)
    retriever.build(path, tmp_path / "fresh", **RAW)
    assert data_files(tmp_path / "index") == data_files(tmp_path / "fresh")


def test_two_builders_and_a_finished_index(tmp_path, capsys):
    path = write_passages(tmp_path / "p.jsonl", ["some words"])
    (tmp_path / "index").mkdir()
    with retriever.Journal(tmp_path / "index" / "build.jsonl"), pytest.raises(InputError, match="another process"):
        retriever.build(path, tmp_path / "index", **RAW)
    retriever.build(path, tmp_path / "index", **RAW)
    made = (tmp_path / "index" / "index.json").stat().st_mtime_ns
    retriever.build(path, tmp_path / "index", **RAW)
    assert "already built" in capsys.readouterr().err
    assert (tmp_path / "index" / "index.json").stat().st_mtime_ns == made
    (tmp_path / "index" / "building").mkdir()  # as a kill between the last two steps leaves it
    retriever.build(path, tmp_path / "index", **RAW)
    assert not (tmp_path / "index" / "building").exists()
    open_index = retriever.load(tmp_path / "index")
    retriever.build(path, tmp_path / "index", "bm25", **RAW)  # replaced while it is open: the old one still answers
    assert len(open_index.search(["words"])[0]) == 1
    assert retriever.load(tmp_path / "index").manifest["kind"] == "bm25"


@pytest.mark.parametrize("kind", ["tfidf", "bm25"])
def test_additions_equal_a_build_of_everything(tmp_path, monkeypatch, kind):
    texts = [*zipf_texts(900), "w1 " * 400]
    whole = build(tmp_path, texts, kind, name="whole")
    grown = build(tmp_path, texts[:600], kind, name="grown")
    read, build_run = [], sparse.build_run
    monkeypatch.setattr(sparse, "build_run", lambda *job: read.append(job[0].name) or build_run(*job))
    for number, part in enumerate((texts[600:700], texts[700:])):
        first = 600 if not number else 700
        more = write_passages(tmp_path / f"more{number}.jsonl", part, [f"p{first + i:05d}" for i in range(len(part))])
        retriever.add(tmp_path / "grown", more, quiet=True, workers=1)
    assert read == ["more0.jsonl", "more1.jsonl"]  # the first file is not read again
    assert len(grown) == 600
    grown = retriever.load(tmp_path / "grown")
    assert len(grown) == 901
    queries = zipf_texts(100, seed=5)
    assert grown.search(queries, 5) == whole.search(queries, 5)
    with pytest.raises(InputError, match="already in"):
        retriever.add(tmp_path / "grown", tmp_path / "more0.jsonl", quiet=True)
    again = write_passages(tmp_path / "again.jsonl", ["new"], ["p00003"])
    with pytest.raises(InputError, match=r"again.jsonl:1: the id 'p00003' is already used at .*grown.jsonl:4"):
        retriever.add(tmp_path / "grown", again, quiet=True)
    assert len(retriever.load(tmp_path / "grown")) == 901


# Dense


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT of random weights with a small WordPiece vocabulary."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"0123456789:w", *(f"##{c}" for c in "0123456789:w")]
    vocabulary += ["query", "passage", *(f"w{i}" for i in range(150))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizerFast(vocab={token: i for i, token in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def reference_vectors(encoder, texts, pooling="mean"):
    """One text at a time, no padding, straight from transformers."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    model = transformers.AutoModel.from_pretrained(encoder).eval()
    vectors = []
    for text in texts:
        with torch.no_grad():
            tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=64)
            hidden = model(**tokens).last_hidden_state[0]
        vector = hidden[0] if pooling == "cls" else hidden.mean(0)
        vectors.append((vector / vector.norm()).numpy())
    return np.array(vectors)


@pytest.mark.parametrize("pooling, dtype", [("mean", "float32"), ("cls", "float32"), ("mean", "float16")])
def test_dense_search_equals_brute_force(tmp_path, monkeypatch, encoder, pooling, dtype):
    monkeypatch.setattr(dense, "BLOCK", 7)
    texts = zipf_texts(80, 150)
    index = build(tmp_path, [*texts, texts[3]], "dense", encoder=encoder, pooling=pooling, dtype=dtype)
    vectors = reference_vectors(encoder, [f"passage: {text}" for text in texts], pooling)
    stored = index.engine.vectors
    assert stored.dtype == dtype
    np.testing.assert_allclose(stored[:80], vectors, atol=1e-3 if dtype == "float16" else 1e-5)
    queries = zipf_texts(9, 150, seed=4)
    exact = reference_vectors(encoder, [f"query: {query}" for query in queries], pooling) @ stored.T.astype(np.float64)
    for row, hits in zip(exact, index.search(queries, 5), strict=True):
        expected = np.lexsort((np.arange(81), -row.round(5)))[:5]
        assert [hit.id for hit in hits] == [f"p{doc:05d}" for doc in expected]
        np.testing.assert_allclose([hit.score for hit in hits], row[expected], atol=1e-5)
    assert len(index.search(["w1"], 500)[0]) == 81
    hits = index.search([texts[3]], 81)[0]
    twins = [hit for hit in hits if hit.contents == texts[3]]
    assert [hit.id for hit in twins] == ["p00003", "p00080"] and twins[0].score == twins[1].score


@pytest.mark.parametrize("k", [1, 3, 50, 5000])
def test_products_do_not_depend_on_device_batch_or_place(k, monkeypatch):
    monkeypatch.setattr(dense, "BLOCK", 200)  # so that there are several blocks, and several pieces of each
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((3000, 24)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[generator.integers(0, 3000, 900)] = vectors[17]  # many ties
    near = generator.integers(0, 3000, 300)  # and many that float32 products cannot tell apart
    vectors[near] = vectors[17] + generator.standard_normal((300, 24)).astype(np.float32) * 1e-7
    rank = generator.permutation(3000)
    places = [17, 5, 2900, 1, *generator.integers(0, 3000, 8)]
    queries = vectors[places] + generator.standard_normal((12, 24)).astype(np.float32) * 0.1
    in_torch = dense.GpuProducts(vectors, "cpu")
    in_torch.block = lambda queries: 333
    in_float32, screened = dense.CpuProducts(vectors), dense.CpuProducts(vectors)
    in_float32.bfloat16_pays, screened.bfloat16_pays = False, True
    assert len(queries) > dense.DOT_PRODUCTS  # so that these are matrix products:
    together = [dense.search_vectors(ours, vectors, queries, k, rank) for ours in (in_float32, screened, in_torch)]
    alone = [dense.search_vectors(in_float32, vectors, queries[i : i + 1], k, rank)[0] for i in range(12)]
    for query, *tops in zip(queries, *together, alone, strict=True):
        exact = (vectors.astype(np.float64) * query.astype(np.float64)).sum(1)
        expected = np.lexsort((rank, -exact))[:k]
        for docs, scores in tops:
            assert docs.tolist() == expected.tolist()
            assert scores.tolist() == exact[expected].astype(np.float32).tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_screen_in_bfloat16_misses_nothing(dtype, monkeypatch):
    """Numbers a little below and above the middle of two bfloat16 numbers: every product is as far off as can be."""
    monkeypatch.setattr(dense, "BLOCK", 50)
    generator = np.random.default_rng(0)
    numbers = (1 + generator.choice([0.75, 1.25], (2000, 32)) * 2**-8) * generator.choice([-1, 1], (2000, 32))
    numbers *= 2.0 ** generator.integers(-4, 1, (2000, 1))  # of several lengths
    vectors = numbers.astype(dtype)
    queries = vectors[generator.integers(0, 2000, 20)].astype(np.float32)
    screened = dense.CpuProducts(vectors)
    screened.bfloat16_pays = True
    exact = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    for row, (docs, _) in zip(exact, dense.search_vectors(screened, vectors, queries, 5, np.arange(2000)), strict=True):
        assert docs.tolist() == np.lexsort((np.arange(2000), -row))[:5].tolist()


def flat_index_bytes(vectors, kind=b"IxFI", metric=0):
    count, dimensions = vectors.shape
    header = kind + struct.pack("<iqqqBi", dimensions, count, 1 << 20, 1 << 20, 1, metric)
    return header + struct.pack("<Q", vectors.size) + vectors.astype("<f4").tobytes()


def test_faiss_flat_index_is_opened_as_it_is(tmp_path, encoder):
    texts = zipf_texts(40, 150)
    own = build(tmp_path, texts, "dense", encoder=encoder, name="own")
    (tmp_path / "e5_Flat.index").write_bytes(flat_index_bytes(np.array(own.engine.vectors)))
    index = build(tmp_path, texts, "dense", encoder=encoder, vectors=str(tmp_path / "e5_Flat.index"))
    assert isinstance(index.engine.vectors, np.memmap)
    queries = zipf_texts(5, 150, seed=2)
    assert index.search(queries) == own.search(queries)
    wrong = {
        "fewer": flat_index_bytes(np.zeros((39, 32))),
        "l2": flat_index_bytes(np.zeros((40, 32)), b"IxF2", 1),
        "cut": flat_index_bytes(np.zeros((40, 32)))[:-4],
        "short": b"IxFI",
    }
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            build(tmp_path, texts, "dense", encoder=encoder, vectors=str(tmp_path / name), name="wrong")


def test_dense_build_resumes_and_grows(tmp_path, monkeypatch, encoder):
    texts = zipf_texts(60, 150)
    monkeypatch.setattr(dense, "CHUNK", 2000)
    whole = build(tmp_path, texts, "dense", encoder=encoder, name="whole")
    calls, encode = [], dense.Encoder.encode

    def failing(self, texts, prefix):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, texts, prefix)

    monkeypatch.setattr(dense.Encoder, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, texts, "dense", encoder=encoder)
    resumed = build(tmp_path, texts, "dense", encoder=encoder)
    assert sum(calls) == len(texts) + calls[2]  # only the interrupted block was embedded again
    assert np.array_equal(resumed.engine.vectors, whole.engine.vectors)
    more = write_passages(tmp_path / "more.jsonl", ["w1 w2"], ["new"])
    retriever.add(tmp_path / "index", more, quiet=True)
    assert calls[-1] == 1
    assert "new" in [hit.id for hit in retriever.load(tmp_path / "index").search(["w1 w2"], 61)[0]]


def test_no_encoder_there(tmp_path):
    with pytest.raises(InputError, match="no encoder could be loaded"):
        build(tmp_path, ["x"], "dense", encoder=str(tmp_path / "nothing"))


def test_hybrid_is_reciprocal_rank_fusion(tmp_path, encoder):
    texts = zipf_texts(50, 150)
    words = build(tmp_path, texts, "bm25", name="words")
    retriever.build(tmp_path / "words.jsonl", tmp_path / "vectors", "dense", encoder=encoder, quiet=True)
    vectors = retriever.load(tmp_path / "vectors")
    hybrid = retriever.load(tmp_path / "words", hybrid=tmp_path / "vectors")
    for query in texts[:5]:
        expected = collections.Counter()
        for index in (words, vectors):
            for place, hit in enumerate(index.search([query], 100)[0], 1):
                expected[hit.id] += 1 / (60 + place)
        hits = hybrid.search([query], 10)[0]
        assert [hit.id for hit in hits] == sorted(expected, key=lambda i: (-round(expected[i], 12), i))[:10]
        assert [hit.score for hit in hits] == pytest.approx([expected[hit.id] for hit in hits])
    build(tmp_path, texts[:-1], name="others")
    with pytest.raises(InputError, match="different passages"):
        retriever.load(tmp_path / "others", hybrid=tmp_path / "vectors")


# The server


@pytest.fixture
def server(tmp_path):
    index = build(tmp_path, [f"passage number n{i} of all" for i in range(200)], "bm25")
    server = retriever.Server(index)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    server.finish()
    thread.join()


def ask(connection, body, path="/retrieve", method="POST"):
    connection.request(method, path, body if isinstance(body, bytes | None) else json.dumps(body).encode())
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_search_r1_protocol_over_one_connection(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    status, answer = ask(connection, {"queries": ["n7", "nothing here"], "topk": 2, "return_scores": True})
    assert status == 200
    document = {"id": "p00007", "contents": "passage number n7 of all"}
    assert answer == {
        "result": [[{"document": document, "score": pytest.approx(server.index.search(["n7"])[0][0].score)}], []]
    }
    socket = connection.sock
    assert ask(connection, {"queries": ["n7"]}) == (200, {"result": [[document]]})
    assert (
        ask(connection, {"queries": ["passage"], "topk": None, "return_scores": False})[1]["result"][0][2]["id"]
        == "p00002"
    )
    assert ask(connection, {"queries": []}) == (200, {"result": []})
    assert ask(connection, None, "/health", "GET") == (200, {"passages": 200, "kind": "bm25"})
    assert connection.sock is socket  # kept open


@pytest.mark.parametrize(
    "body, reason",
    [
        (b"{not json", "not JSON"),
        (b"[]", "a JSON object was expected"),
        (b"\xff\xfe", "not JSON"),
        ({}, '"queries" must be a list of strings'),
        ({"queries": "n7"}, '"queries" must be a list of strings'),
        ({"queries": [7]}, '"queries" must be a list of strings'),
        ({"queries": ["n7"], "topk": 0}, '"topk" must be a whole number'),
        ({"queries": ["n7"], "topk": True}, '"topk" must be a whole number'),
        ({"queries": ["n7"], "topk": "3"}, '"topk" must be a whole number'),
        ({"queries": ["n7"], "return_scores": "yes"}, '"return_scores" must be true or false'),
    ],
)
def test_bad_requests_are_answered_with_a_reason(server, body, reason):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    status, answer = ask(connection, body)
    assert status == 400 and reason in answer["error"]
    assert ask(connection, {"queries": ["n7"]})[0] == 200  # and the connection lives on


def test_other_paths_and_sizes(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    assert ask(connection, {"queries": []}, "/elsewhere")[0] == 404
    assert ask(connection, None, "/elsewhere", "GET")[0] == 404
    connection.putrequest("POST", "/retrieve")
    connection.putheader("Content-Length", str(1 << 40))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    connection.putrequest("POST", "/retrieve")
    connection.endheaders()
    assert connection.getresponse().status == 411


def test_clients_at_once_share_batches_and_get_their_own_answers(server):
    sizes, search = [], server.index.search
    gate = threading.Event()

    def watched(queries, k):
        gate.wait(20)
        sizes.append(len(queries))
        return search(queries, k)

    server.index.search = watched
    answers = {}

    def client(number):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        answers[number] = ask(connection, {"queries": [f"n{number}", f"n{number + 1}"], "topk": 1 + number % 2})

    threads = [threading.Thread(target=client, args=(n,)) for n in range(40)]
    [t.start() for t in threads]
    while server.at_work < 40:
        time.sleep(0.01)
    gate.set()
    [t.join() for t in threads]
    assert sum(sizes) == 80 and len(sizes) < 20  # most of the 40 requests came while the first was held up
    for number, (status, answer) in answers.items():
        assert status == 200
        assert [hits[0]["id"] for hits in answer["result"]] == [f"p{number:05d}", f"p{number + 1:05d}"]


def test_failure_of_a_search_is_a_500_and_not_the_end(server, monkeypatch, capsys):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    monkeypatch.setattr(server.index, "top", lambda queries, k: 1 / 0)
    assert ask(connection, {"queries": ["n7"]}) == (500, {"error": "ZeroDivisionError: division by zero"})
    monkeypatch.undo()
    assert ask(connection, {"queries": ["n7"]})[0] == 200


def test_remote_index(server):
    remote = retriever.load(f"http://127.0.0.1:{server.server_port}")
    assert remote.search(["n7", "passage", "nothing"], 2) == server.index.search(["n7", "passage", "nothing"], 2)
    with pytest.raises(InputError, match="no answer"):
        remote.search(["n7"], 0)
    with pytest.raises(InputError, match="no answer"):
        retriever.load("http://127.0.0.1:9/retrieve").search(["n7"])


# The command line


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_command_line(tmp_path):
    path = write_passages(tmp_path / "p.jsonl", ['"Oslo"\nOslo is the capital of Norway.', "no title"])
    assert run("build", path, tmp_path / "index", "--kind", "bm25", "--quiet").returncode == 0
    more = write_passages(tmp_path / "more.jsonl", ['"Bergen"\nBergen is in Norway.'], ["x"])
    assert run("add", tmp_path / "index", more, "--quiet").returncode == 0
    found = run("search", tmp_path / "index", "capital of Norway", "--k", 2)
    assert found.stdout.startswith('1. "Oslo"   (p00000, ') and "   Oslo is the capital of Norway.\n" in found.stdout
    assert '2. "Bergen"   (x, ' in found.stdout
    assert run("search", tmp_path / "index", "zzz").stdout == "no passage has a word of this query\n"
    failed = run("search", tmp_path / "nowhere", "x")
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    path.write_text("{}\n")
    failed = run("build", path, tmp_path / "other", "--quiet")
    assert failed.returncode == 2 and f"{path}:1" in failed.stderr and failed.stderr.count("\n") == 1


def test_serve_ends_cleanly(tmp_path):
    build(tmp_path, ["some words"])
    command = [sys.executable, str(SCRIPT), "serve", str(tmp_path / "index"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line.startswith("1 passages at http://127.0.0.1:")
    port = int(line.split(":")[-1].split("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    assert ask(connection, {"queries": ["words"]})[0] == 200
    taken = run("serve", tmp_path / "index", "--port", port)
    assert taken.returncode == 2 and "name another --port" in taken.stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert process.stderr.read() == ""
