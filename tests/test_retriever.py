"""The retriever: words, scores, exactness of the pruned search, bad input, killed builds, dense search, the server.

    pytest tests/test_retriever.py

Scores are compared with the plain formulas in float64 here, and with scikit-learn, bm25s and faiss in
test_retriever_interop.py.
"""

import collections
import json
import math
import random
import shutil
import struct
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import requests

import retriever
from common import InputError, serve_json
from common.passages import index_term, split_words
from retriever import RemoteIndex

SCRIPT = Path(retriever.__file__)


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
    retriever.build(path, tmp_path / name, kind, quiet=True, **settings)
    return retriever.load(tmp_path / name, device="cpu")


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


def test_long_words_are_cut_into_pieces():
    words = split_words("a" * 70 + " " + "a" * 71)
    assert [len(word) for word in words] == [32, 32, 6, 32, 32, 7]


def test_stemmer_and_stop_words(tmp_path):
    words = [b"films", b"ladies", b"glass", b"virus", b"is", b"film", b"days"]
    assert [index_term(word) for word in words] == [b"film", b"lady", b"glass", b"virus", b"", b"film", b"day"]
    index = build(tmp_path, ["the film", "a novel"])
    assert [hit.id for hit in index.search(["the films"])[0]] == ["p00000"]
    assert index.search(["the"]) == [[]]


# Scores


def terms_of(text):
    return [term for term in map(index_term, split_words(text)) if term]


def plain_scores(texts, query, kind, k1=1.5, b=0.9):
    """The formulas of the docstrings, one passage at a time, in float64. texts have no titles."""
    counts = [collections.Counter(terms_of(text)) for text in texts]
    df = collections.Counter(word for count in counts for word in count)
    n, mean = len(texts), sum(sum(count.values()) for count in counts) / len(texts)
    asked = {word: times for word, times in collections.Counter(terms_of(query)).items() if word in df}
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


def test_the_words_of_the_title_count_twice(tmp_path):
    titled = build(tmp_path, ['"Paris"\nThe city', '"Rome"\nParis is not it', "Paris alone"], "bm25", name="titled")
    spelled = build(tmp_path, ["Paris Paris The city", "Rome Rome Paris is not it", "Paris alone"], "bm25")
    for query in ("paris", "rome city"):
        assert [hit[:2] for hit in titled.search([query])[0]] == [hit[:2] for hit in spelled.search([query])[0]]


# Exactness


def exhaustive(index, query, k):
    """Every posting of every term, added up in the order of the terms, and all passages sorted."""
    totals = np.zeros(len(index), np.float32)
    terms, norm = index.parse(query)
    for term, repeats in terms.items():
        totals[index.docs[term.start : term.stop]] += index.values[term.start : term.stop] * np.float32(repeats)
    found = np.flatnonzero(totals)
    best = found[np.lexsort((index.rank[found], -totals[found]))][:k]
    return best.tolist(), (totals[best] / np.float32(norm)).tolist()


@pytest.mark.parametrize("kind", ["tfidf", "bm25"])
def test_search_equals_exhaustive_search(tmp_path, monkeypatch, kind):
    texts = zipf_texts(4000)
    texts += texts[:400]  # many ties
    index = build(tmp_path, texts, kind, ids=random.Random(0).sample(range(10**6), len(texts)))
    added, add = [], np.add
    monkeypatch.setattr(
        retriever.np, "add", collections.namedtuple("Add", "at")(lambda *a: added.append(len(a[1])) or add.at(*a))
    )
    generator = np.random.default_rng(1)
    matching, long_query = 0, " ".join([f"w{number}" for number in range(60)] * 200)
    assert list(map(np.ndarray.tolist, index.top([long_query], 5)[0])) == list(exhaustive(index, long_query, 5))
    for number in range(700):
        words = generator.integers(0, 2000 if number % 2 else 300, generator.integers(1, 15))
        query = " ".join(f"w{word}" for word in words // generator.integers(1, 20))
        for k in (1, 3, 20):
            docs, scores = index.top([query], k)[0]
            assert (docs.tolist(), scores.tolist()) == exhaustive(index, query, k), query
        matching += 3 * sum(term.stop - term.start for term in index.parse(query)[0])
    assert sum(added) < 0.8 * matching  # many postings were not added: the search did prune


def test_common_words_are_not_added_up_beside_a_rare_one(tmp_path, monkeypatch):
    texts = [f"some common word {'rare' if i in (5, 4000) else ''} n{i}" for i in range(20_000)]
    index = build(tmp_path, texts, "bm25")
    add = np.add
    added = []
    monkeypatch.setattr(
        retriever.np, "add", collections.namedtuple("Add", "at")(lambda *a: added.append(len(a[1])) or add.at(*a))
    )
    docs, scores = index.top(["some rare common word"], 2)[0]
    assert (docs.tolist(), scores.tolist()) == exhaustive(index, "some rare common word", 2)
    assert docs.tolist() == [5, 4000] and added == [2]


def test_ties_are_in_the_order_of_ids(tmp_path):
    ids = ["b", "a10", "a9", "é", "Z", "a1"]
    index = build(tmp_path, ["same text"] * 6, ids=ids)
    for k in range(1, 8):
        assert [hit.id for hit in index.search(["text"], k)[0]] == sorted(ids)[:k]


def in_threads(count, function):
    """Returns the results of function(0), ..., function(count - 1), called at the same time."""
    results = [None] * count

    def work(number):
        results[number] = function(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_threads_share_an_index(tmp_path):
    index = build(tmp_path, zipf_texts(2000), "bm25")
    queries = zipf_texts(40, seed=3)
    expected = index.search(queries)
    assert in_threads(4, lambda _: index.search(queries)) == [expected] * 4


# Input


def test_hits_and_odd_queries(tmp_path):
    index = build(tmp_path, ['"Ångström"\nA unit\u2028of length', "other words", ""])
    (hits,) = index.search(["angstrom"])
    assert [(hit.id, hit.contents) for hit in hits] == [("p00000", '"Ångström"\nA unit\u2028of length')]
    assert index.search([]) == []
    assert index.search(["", "   ", "unknown", "?!"], k=10) == [[], [], [], []]
    assert len(index.search(["a unit other"], k=1000)[0]) == 2
    assert len(index.search(["unit " * 5000])[0]) == 1
    for wrong in (
        {"queries": "unit"},
        {"queries": [1]},
        {"queries": ["unit"], "k": 0},
        {"queries": ["unit"], "k": 1.5},
    ):
        with pytest.raises(InputError):
            index.search(**wrong)


@pytest.mark.parametrize("kind", ["tfidf", "bm25"])
def test_one_passage_many_repetitions_and_no_words(tmp_path, kind):
    assert [hit.id for hit in build(tmp_path, ["one passage"], kind, name="one").search(["passage"])[0]] == ["p00000"]
    index = build(tmp_path, ["w " * 70_000, "x w", "x x x w w y"], kind, name="many")
    assert index.search(["w"])[0][0].id == "p00000" and len(index.search(["w"])[0]) == 3
    with pytest.raises(InputError, match="no passage has a word that is indexed"):
        build(tmp_path, ["...", "the"], kind)


@pytest.mark.parametrize(
    "lines, problem",
    [
        (b'{"id": "1", "contents": "x"}\n\n{"id": "2", "contents": \n', ":3: not a passage"),
        (b'{"id": "1", "contents": "x"}\n{"id": 2, "contents": "y"}\n', ":2: not a passage"),
        (b'{"id": "1", "contents": ["x"]}\n', ":1: not a passage"),
        (b'{"id": "1", "text": "x"}\n', ":1: not a passage"),
        (b'["1", "x"]\n', ":1: not a passage"),
        (b'{"id": "1", "contents": "x"}\n{"id": "2", "contents": "\xff"}\n', ":2: not a passage"),
        (b'{"id": "1", "contents": "x"}\n\n{"id": "1", "contents": "z"}\n', ": the id '1' occurs twice"),
        (b"", ": no passages in it"),
        (b"\n\n", ": no passages in it"),
    ],
)
def test_bad_passages_are_refused_with_their_line(tmp_path, monkeypatch, lines, problem):
    monkeypatch.setattr(retriever, "CHUNK", 40)
    path = tmp_path / "bad.jsonl"
    path.write_bytes(lines)
    with pytest.raises(InputError) as error:
        retriever.build(path, tmp_path / "index", quiet=True)
    assert f"{path}{problem}" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "index" / "index.json").exists()


def test_bad_settings_and_missing_files(tmp_path):
    path = write_passages(tmp_path / "p.jsonl", ["x"])
    for wrong in ({"b": 1.5}, {"k1": -1}, {"kind": "bm52"}):
        with pytest.raises(InputError):
            retriever.build(path, tmp_path / "index", **{"kind": "bm25", **wrong})
    with pytest.raises(InputError, match="no such file"):
        retriever.build(tmp_path / "none.jsonl", tmp_path / "index")
    with pytest.raises(InputError, match="no index here"):
        retriever.load(tmp_path / "nowhere")


def test_folder_moves_with_its_passages_and_changes_are_noticed(tmp_path):
    (tmp_path / "a").mkdir()
    build(tmp_path / "a", ["first words", "second words"])
    shutil.move(tmp_path / "a", tmp_path / "b")
    index = retriever.load(tmp_path / "b" / "index")
    assert len(index.search(["words"])[0]) == 2
    path = tmp_path / "b" / "index.jsonl"
    content = path.read_text()
    path.write_text(content.replace("{", "[", 1))  # of the same length, but not the passage any more
    with pytest.raises(InputError, match="changed since"):
        retriever.load(tmp_path / "b" / "index").search(["first"])
    path.write_text(content + content)
    with pytest.raises(InputError, match="changed since"):
        retriever.load(tmp_path / "b" / "index")
    path.unlink()
    with pytest.raises(InputError, match="missing"):
        retriever.load(tmp_path / "b" / "index")


def test_an_index_of_another_format_is_refused_with_the_command_that_rebuilds_it(tmp_path):
    build(tmp_path, ["a text", "another"], "bm25")
    manifest = tmp_path / "index" / "index.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {retriever.FORMAT}', '"format": 2'))
    with pytest.raises(InputError, match=r"format 2, not 3; build it: .*build PASSAGES .*index --kind bm25"):
        retriever.load(tmp_path / "index")
    assert len(build(tmp_path, ["a text", "another"], "bm25").search(["text"])[0]) == 1


# Building: chunks, kills


def test_chunks_do_not_change_the_index(tmp_path, monkeypatch):
    build(tmp_path, zipf_texts(1500), "bm25", name="whole")
    monkeypatch.setattr(retriever, "CHUNK", 50_000)
    monkeypatch.setattr(retriever, "RANGE", 1000)
    out = tmp_path / "chunks"
    retriever.build(tmp_path / "whole.jsonl", out, "bm25", quiet=True)
    assert data_files(out) == data_files(tmp_path / "whole")
    assert sorted(path.name for path in out.iterdir()) == ["build.lock", "data-1", "index.json"]


BUILD_SLOWLY = """
import sys, time
sys.path.insert(0, sys.argv[1])
import retriever
retriever.CHUNK = 20_000
save_run = retriever.save_run
def slow(*arguments, **columns):
    save_run(*arguments, **columns)
    time.sleep(0.15)
retriever.save_run = slow
retriever.build(sys.argv[2], sys.argv[3], "bm25", quiet=True)
"""


def test_killed_build_continues_and_killed_rebuild_leaves_the_old_index(tmp_path, monkeypatch):
    first = write_passages(tmp_path / "first.jsonl", ["the old passage"])
    second = write_passages(tmp_path / "second.jsonl", zipf_texts(1500))
    monkeypatch.setattr(retriever, "CHUNK", 20_000)
    retriever.build(second, tmp_path / "whole", "bm25", quiet=True)
    out = tmp_path / "killed"
    retriever.build(first, out, quiet=True)
    process = subprocess.Popen([sys.executable, "-c", BUILD_SLOWLY, SCRIPT.parent, second, out])
    while len(list(out.glob("building/run-*.npz"))) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert [hit.contents for hit in retriever.load(out).search(["passage"])[0]] == ["the old passage"]
    kept = {path.name for path in out.glob("building/run-*.npz")}
    made, save_run = [], retriever.save_run
    monkeypatch.setattr(retriever, "save_run", lambda run, *a, **b: made.append(run.name) or save_run(run, *a, **b))
    retriever.build(second, out, "bm25", quiet=True)
    assert len(kept) >= 3 and made and not set(made) & kept
    assert data_files(out) == data_files(tmp_path / "whole")
    assert sorted(path.name for path in out.iterdir()) == ["build.lock", "data-2", "index.json"]


def test_unfinished_build_of_other_settings_is_discarded(tmp_path, monkeypatch):
    path = write_passages(tmp_path / "p.jsonl", zipf_texts(300))
    monkeypatch.setattr(retriever, "merge_postings", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        retriever.build(path, tmp_path / "index", quiet=True)
    monkeypatch.undo()
    write_passages(path, zipf_texts(300, seed=1))
    retriever.build(path, tmp_path / "index", quiet=True)
    retriever.build(path, tmp_path / "fresh", quiet=True)
    assert data_files(tmp_path / "index") == data_files(tmp_path / "fresh")


def test_two_builders_and_a_finished_index(tmp_path, capsys):
    path = write_passages(tmp_path / "p.jsonl", ["some words"])
    with (
        retriever.common.Journal(tmp_path / "index" / "build.lock"),
        pytest.raises(InputError, match="another process"),
    ):
        retriever.build(path, tmp_path / "index", quiet=True)
    retriever.build(path, tmp_path / "index", quiet=True)
    retriever.build(path, tmp_path / "index", quiet=True)
    assert "already built" in capsys.readouterr().out
    open_index = retriever.load(tmp_path / "index")
    retriever.build(path, tmp_path / "index", "bm25", quiet=True)  # replaces it; the open index still answers
    assert len(open_index.search(["words"])[0]) == 1
    assert retriever.load(tmp_path / "index").manifest["kind"] == "bm25"


# Dense


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT of random weights with a small WordPiece vocabulary."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"0123456789:w", *(f"##{c}" for c in "0123456789:w")]
    vocabulary += ["query", "passage", *(f"w{i}" for i in range(150))]
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
    """One text at a time, without padding, directly from transformers."""
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


@pytest.mark.parametrize("pooling, dtype", [("mean", "float32"), ("cls", "float16")])
def test_dense_search_equals_brute_force(tmp_path, encoder, pooling, dtype):
    texts = zipf_texts(80, 150)
    index = build(tmp_path, [*texts, texts[3]], "dense", encoder=encoder, pooling=pooling, dtype=dtype)
    vectors = reference_vectors(encoder, [f"passage: {text}" for text in texts], pooling)
    stored = index.vectors.numpy()
    assert stored.dtype == dtype
    np.testing.assert_allclose(stored[:80], vectors, atol=1e-3 if dtype == "float16" else 1e-5)
    queries = zipf_texts(9, 150, seed=4)
    exact = reference_vectors(encoder, [f"query: {query}" for query in queries], pooling) @ stored.T.astype(np.float64)
    for row, hits in zip(exact, index.search(queries, 5), strict=True):
        expected = np.lexsort((np.arange(81), -row.round(5)))[:5]
        assert [hit.id for hit in hits] == [f"p{doc:05d}" for doc in expected]
        np.testing.assert_allclose([hit.score for hit in hits], row[expected], atol=1e-5)
    assert len(index.search(["w1"], 500)[0]) == 81 and index.search([]) == []


@pytest.mark.parametrize("k", [1, 3, 50, 5000])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_vectors_are_searched_exactly(k, dtype):
    """Several blocks, the last one short, and many ties: small whole numbers have exact products."""
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    vectors = generator.integers(-3, 4, (9000, 6)).astype(dtype)
    queries = generator.integers(-3, 4, (70, 6)).astype(np.float32)
    rank = generator.permutation(9000)
    for batch in (queries[:1], queries):
        found = retriever.search_vectors(torch.from_numpy(vectors), torch.from_numpy(batch), k, rank)
        for query, (docs, scores) in zip(batch, found, strict=True):
            exact = vectors.astype(np.float64) @ query
            expected = np.lexsort((rank, -exact))[:k]
            assert docs.tolist() == expected.tolist() and scores.tolist() == exact[expected].tolist()


def flat_index_bytes(vectors, kind=b"IxFI", metric=0):
    count, dimensions = vectors.shape
    header = kind + struct.pack("<iqqqBi", dimensions, count, 1 << 20, 1 << 20, 1, metric)
    return header + struct.pack("<Q", vectors.size) + vectors.astype("<f4").tobytes()


def test_faiss_flat_index_is_opened_as_it_is(tmp_path, encoder):
    texts = zipf_texts(40, 150)
    own = build(tmp_path, texts, "dense", encoder=encoder, name="own")
    (tmp_path / "e5_Flat.index").write_bytes(flat_index_bytes(own.vectors.numpy()))
    index = build(tmp_path, texts, "dense", encoder=encoder, vectors=str(tmp_path / "e5_Flat.index"))
    queries = zipf_texts(5, 150, seed=2)
    for hits, same in zip(
        index.search(queries), own.search(queries), strict=True
    ):  # products may differ in the last bit
        assert [hit.id for hit in hits] == [hit.id for hit in same]
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


def test_dense_build_continues_with_the_chunks_that_are_left(tmp_path, monkeypatch, encoder):
    texts = zipf_texts(60, 150)
    monkeypatch.setattr(retriever, "DENSE_CHUNK", 2000)
    whole = build(tmp_path, texts, "dense", encoder=encoder, name="whole")
    calls, encode = [], retriever.Encoder.encode

    def failing(self, texts):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(retriever.Encoder, "encode", failing)
    settings = {"kind": "dense", "encoder": encoder, "quiet": True}
    with pytest.raises(KeyboardInterrupt):
        retriever.build(tmp_path / "whole.jsonl", tmp_path / "index", **settings)
    retriever.build(tmp_path / "whole.jsonl", tmp_path / "index", **settings)
    resumed = retriever.load(tmp_path / "index", "cpu")
    assert sum(calls) == len(texts) + calls[2]  # only the interrupted chunk was embedded again
    assert np.array_equal(resumed.vectors, whole.vectors)


def test_queries_of_many_threads_become_one_batch(tmp_path, monkeypatch, encoder):
    """The first query waits in the encoder until all others are waiting for the index."""
    index = build(tmp_path, zipf_texts(50, 150), "dense", encoder=encoder)
    ask = lambda n: [[hit.id for hit in hits] for hits in index.search([f"w{n}", f"w{n + 1}"], 1 + n % 2)]  # noqa: E731
    expected = [ask(n) for n in range(12)]
    sizes, encode = [], index.encoder.encode

    def waiting(texts):
        deadline = time.monotonic() + 20
        while not sizes and index.waiting.qsize() < 11 and time.monotonic() < deadline:
            time.sleep(0.01)
        sizes.append(len(texts))
        return encode(texts)

    monkeypatch.setattr(index.encoder, "encode", waiting)
    assert in_threads(12, ask) == expected and sizes == [2, 22]


def test_out_of_memory_is_raised_as_it_is(tmp_path, monkeypatch, encoder):
    import torch

    index = build(tmp_path, ["w1", "w2"], "dense", encoder=encoder)
    with monkeypatch.context() as patch:
        patch.setattr(index.encoder, "encode", lambda texts: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
        with pytest.raises(torch.OutOfMemoryError):
            index.search(["w1"])
    assert len(index.search(["w1"])[0]) == 2  # and the index can be used again


# The server


@pytest.fixture
def served(tmp_path):
    """(index, URL of its server)"""
    index = build(tmp_path, [f"passage number n{i} of all" for i in range(200)], "bm25")
    server = serve_json(lambda *request: retriever.answer_request(index, *request))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield index, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def ask(url, body):
    response = requests.post(f"{url}/retrieve", json=body, timeout=10)
    return response.status_code, response.json()


def test_search_r1_protocol(served):
    index, url = served
    document = {"id": "p00007", "contents": "passage number n7 of all"}
    score = index.search(["n7"])[0][0].score
    status, answer = ask(url, {"queries": ["n7", "nothing here"], "topk": 2, "return_scores": True})
    assert status == 200 and answer == {"result": [[{"document": document, "score": score}], []]}
    assert ask(url, {"queries": ["n7"]}) == (200, {"result": [[document]]})
    assert ask(url, {"queries": ["passage"], "topk": None})[1]["result"][0][2]["id"] == "p00002"
    assert ask(url, {"queries": []}) == (200, {"result": []})
    assert requests.get(f"{url}/health", timeout=10).json() == {"passages": 200, "kind": "bm25"}
    assert requests.get(f"{url}/elsewhere", timeout=10).status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"queries": "n7"},
        {"queries": [7]},
        {"queries": ["n7"], "topk": 0},
        {"queries": ["n7"], "topk": True},
        {"queries": ["n7"], "topk": "3"},
    ],
)
def test_bad_requests_are_answered_with_a_reason(served, body):
    status, answer = ask(served[1], body)
    assert status == 400 and "must be" in answer["error"]


def test_a_failed_search_is_reported_and_the_server_continues(served, monkeypatch):
    index, url = served
    with monkeypatch.context() as patch:
        patch.setattr(index, "top", lambda queries, k: 1 / 0)
        assert ask(url, {"queries": ["n7"]}) == (500, {"error": "ZeroDivisionError: division by zero"})
    assert ask(url, {"queries": ["n7"]})[0] == 200


def test_remote_index_gives_the_same_hits(served):
    index, url = served
    remote = retriever.load(url)
    queries = ["n7", "passage", "nothing"]
    assert remote.search(queries, 2) == index.search(queries, 2)
    assert in_threads(8, lambda n: remote.search([f"n{n}"])) == [index.search([f"n{n}"]) for n in range(8)]
    with pytest.raises(InputError, match="status 400: the number of passages"):
        remote.search(["n7"], 0)
    with pytest.raises(InputError, match="no answer"):
        RemoteIndex("http://127.0.0.1:9/retrieve", retries=0).search(["n7"])


def test_remote_index_retries_while_the_server_is_down(tmp_path):
    """The server starts only after the first attempts were refused, and then fails twice."""
    index = build(tmp_path, ["some words"], "bm25")
    probe = serve_json(lambda *request: (200, {}))
    port = probe.server_address[1]
    probe.server_close()  # from here on, connections to this port are refused
    requests_seen = []

    def answer(*request):
        requests_seen.append(request)
        return (503, {"error": "starting"}) if len(requests_seen) < 3 else retriever.answer_request(index, *request)

    servers = []

    def start():
        servers.append(serve_json(answer, port=port))
        servers[0].serve_forever(0.05)

    timer = threading.Timer(0.3, start)
    timer.start()
    remote = retriever.load(f"http://127.0.0.1:{port}")
    for adapter in remote.session.adapters.values():  # more and shorter pauses than in use
        adapter.max_retries.total = 8
        adapter.max_retries.backoff_factor, adapter.max_retries.backoff_jitter = 0.1, 0
    assert remote.search(["words"]) == index.search(["words"])
    assert len(requests_seen) == 3
    servers[0].shutdown()
    servers[0].server_close()


# The command line


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_command_line(tmp_path):
    path = write_passages(tmp_path / "p.jsonl", ['"Oslo"\nOslo is the capital of Norway.', "no title"])
    assert run("build", path, tmp_path / "index", "--kind", "bm25", "--quiet").returncode == 0
    found = run("search", tmp_path / "index", "capital of Norway", "--k", 2)
    assert found.stdout.startswith('1. "Oslo"   (p00000, ') and "   Oslo is the capital of Norway.\n" in found.stdout
    assert run("search", tmp_path / "index", "zzz").stdout == "no passage has a word of this query\n"
    path.write_text("{}\n")
    bad = [("search", tmp_path / "nowhere", "x"), ("build", path, tmp_path / "other", "--quiet"), ("build", path)]
    for arguments in bad:
        failed = run(*arguments)
        assert failed.returncode == 2 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1


def test_serve(tmp_path):
    index = build(tmp_path, ["some words"])
    command = [sys.executable, str(SCRIPT), "serve", str(tmp_path / "index"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line.startswith("1 passages at http://127.0.0.1:")
    url = line.split()[-1]
    assert retriever.load(url).search(["words"]) == index.search(["words"])
    taken = run("serve", tmp_path / "index", "--port", url.split(":")[-1].split("/")[0])
    assert taken.returncode == 2 and taken.stderr.count("\n") == 1 and "Address already in use" in taken.stderr
    process.terminate()
    process.wait(10)
