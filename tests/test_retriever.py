"""The retriever: words, scores, ties, bad input, full disks and killed builds, dense search, the server.

    pytest tests/test_retriever.py

Scores are compared with the plain formulas in float64 here, and with scikit-learn, bm25s and faiss in
test_retriever_interop.py.
"""

import collections
import json
import math
import random
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests

import retriever
from common import InputError, serve_json
from common.passages import STOP_WORDS, index_term, split_words
from servers import serve

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


def build(tmp_path, texts, kind="bm25", ids=None, name="index", **settings):
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
        ("Straße ẞ ΣΊΣΥΦΟΣ Çelik ĐORĐE", "strasse ss σισυφοσ celik dorde"),
        ("Łódź ŁÓDŹ Ærø ØRESUND œuvre Þór Guðrún Ħal ısı ǽ", "lodz lodz aero oresund oeuvre thor gudrun hal isi ae"),
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


def test_singulars_are_indexed():
    words = [b"films", b"ladies", b"glass", b"virus", b"does", b"film", b"days"]
    assert [index_term(word) for word in words] == [b"film", b"lady", b"glass", b"virus", b"does", b"film", b"day"]


@pytest.mark.parametrize("kind", ["tfidf", "bm25"])
def test_stop_words_count_only_where_there_is_no_other_word(tmp_path, kind):
    """A name of stop words is found by its title, before texts that have the words more often."""
    common = "the people who were there and the one who was it, who knew the rest, as it is, it and it "
    texts = ['"The Who"\nAn English rock band.', '"It"\nA novel.', '"Crowds"\n' + common * 3, "Are they here?"]
    index = build(tmp_path, texts, kind)
    for query, first in {"The Who": 0, "who?": 0, "It": 1, "Crowds": 2, "they are": 3}.items():
        assert index.search([query])[0][0].id == f"p{first:05d}", query
    assert index.search(["the novel of it"]) == index.search(["novel"])
    assert index.search(["the unknownword"]) == [[]]


# Scores


def terms_of(text):
    return [index_term(word) for word in split_words(text) if word not in STOP_WORDS]


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


@pytest.mark.parametrize("kind", ["tfidf", "bm25"])
def test_the_best_of_many_ties(tmp_path, kind):
    """Search for k finds the same as sorting all scores, in an index with many equal passages."""
    texts = zipf_texts(4000)
    texts += texts[:400]
    index = build(tmp_path, texts, kind, ids=random.Random(0).sample(range(10**6), len(texts)))
    for query in ["w0 " * 9000, *zipf_texts(50, seed=1)]:
        docs, scores = index.top([query], len(texts))[0]
        order = np.lexsort((index.rank[docs], -scores))
        for k in (1, 3, 20, 500):
            best, values = index.top([query], k)[0]
            assert best.tolist() == docs[order[:k]].tolist() and values.tolist() == scores[order[:k]].tolist()


def test_ties_are_in_the_order_of_ids(tmp_path):
    ids = ["b", "a10", "a9", "é", "Z", "a1"]
    index = build(tmp_path, ["same text"] * 6, ids=ids)
    for k in range(1, 8):
        assert [hit.id for hit in index.search(["text"], k)[0]] == sorted(ids)[:k]


def in_threads(count, function):
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, range(count)))


def test_threads_share_an_index(tmp_path):
    index = build(tmp_path, zipf_texts(2000), "bm25")
    queries = zipf_texts(40, seed=3)
    expected = index.search(queries)
    assert in_threads(4, lambda _: index.search(queries)) == [expected] * 4


# Input


def test_hits_and_odd_queries(tmp_path):
    index = build(tmp_path, ['"Ångström"\nA unit\u2028of length', "other words", "", '""\nuntitled\ntwo lines'])
    (hits,) = index.search(["angstrom"])
    assert [(hit.id, hit.contents) for hit in hits] == [("p00000", '"Ångström"\nA unit\u2028of length')]
    assert (hits[0].title, hits[0].text) == ("Ångström", "A unit\u2028of length")
    for query, title, text in (("other", "", "other words"), ("untitled", "", "untitled\ntwo lines")):
        (hit,) = index.search([query])[0]
        assert (hit.title, hit.text) == (title, text)
    assert index.search([]) == []
    assert index.search(["", "   ", "unknown", "?!"], k=10) == [[], [], [], []]
    assert len(index.search(["a unit other"], k=10**12)[0]) == 2
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
    with pytest.raises(InputError, match="no passage has a word"):
        build(tmp_path, ["...", ""], kind)
    assert len(build(tmp_path, ["the", "of the"], kind, name="stop words").search(["the"])[0]) == 2


@pytest.mark.parametrize(
    "lines, problem",
    [
        (b'{"id": "1", "contents": "x"}\n\n{"id": "2", "contents": \n', ":3: not a passage"),
        (b'{"id": "1", "contents": "x"}\n{"id": 2, "contents": "y"}\n', ":2: not a passage"),
        (b'{"id": "1", "contents": ["x"]}\n', ":1: not a passage"),
        (b'{"id": "1", "text": "x"}\n', ":1: not a passage"),
        (b'["1", "x"]\n', ":1: not a passage"),
        (b"null\n", ":1: not a passage"),
        (b"[" * 100_000, ":1: not a passage"),
        (b'{"id": "1", "contents": "' + b"x" * (1 << 24), ":1: not a passage: longer than 16 MiB"),
        (b'{"id": "' + b"1" * 1000 + b'", "contents": "x"}\n', ":1: not a passage: an id of more than 256"),
        (b'\xef\xbb\xbf{"id": "1", "contents": "x"}\n', ":1: not a passage"),
        ('{"id": "1", "contents": "Zürich"}\n'.encode("latin-1"), ":1: not a passage"),
        ('{"id": "1", "contents": "x"}\n'.encode("utf-16"), ":1: not a passage"),
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


def test_bad_settings_and_paths(tmp_path):
    path = write_passages(tmp_path / "p.jsonl", ["x"])
    for wrong in ({"b": 1.5}, {"b": math.nan}, {"k1": -1}, {"k1": math.inf}, {"kind": "bm52"}):
        with pytest.raises(InputError):
            retriever.build(path, tmp_path / "index", **wrong)
    for passages, out, problem in (
        (tmp_path / "none.jsonl", tmp_path / "index", "no such file"),
        (tmp_path, tmp_path / "index", "no such file"),
        (path, path, f"{path}: File exists|{path}/build.lock: Not a directory"),
    ):
        with pytest.raises(InputError, match=problem):
            retriever.build(passages, out)
    for nowhere in (tmp_path / "nowhere", path):
        with pytest.raises(InputError, match="no index here; build it"):
            retriever.load(nowhere)


def test_halves_of_surrogate_pairs_become_question_marks(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"id": "1\\ud83d", "contents": "half \\udc00 pair"}\n')
    retriever.build(tmp_path / "p.jsonl", tmp_path / "index", quiet=True)
    hits = retriever.load(tmp_path / "index").search(["half \udfff"])[0]
    assert [(hit.id, hit.contents) for hit in hits] == [("1?", "half ? pair")]


def test_folder_moves_with_its_passages_and_changes_are_noticed(tmp_path):
    (tmp_path / "a").mkdir()
    build(tmp_path / "a", ["first words", "second words"])
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)  # with another modification time
    shutil.rmtree(tmp_path / "a")
    index = retriever.load(tmp_path / "b" / "index")
    assert len(index.search(["words"])[0]) == 2
    path = tmp_path / "b" / "index.jsonl"
    content = path.read_text()
    path.write_text(content.replace("{", "[", 1))
    with pytest.raises(InputError, match="changed since"):  # the open index finds no passage there any more
        index.search(["first"])
    for changed in (content.replace("first", "fifth"), content + content, None):  # the first is of the same size
        path.unlink() if changed is None else path.write_text(changed)
        with pytest.raises(InputError, match="missing, or changed since"):
            retriever.load(tmp_path / "b" / "index")


def test_symbolic_links(tmp_path):
    """Built through links, an index opens through them, through the real folders, and after both have moved."""
    (tmp_path / "disk" / "far" / "data").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "far" / "data")
    build(tmp_path / "link", ["some words"], name="index")
    (tmp_path / "disk" / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "elsewhere")
    retriever.build(tmp_path / "link" / "index.jsonl", tmp_path / "out", quiet=True)
    for folder in ("link/index", "disk/far/data/index", "out", "disk/elsewhere"):
        assert len(retriever.load(tmp_path / folder).search(["words"])[0]) == 1
    (tmp_path / "disk").rename(tmp_path / "moved")
    for folder in ("moved/far/data/index", "moved/elsewhere"):
        assert len(retriever.load(tmp_path / folder).search(["words"])[0]) == 1


def edit_manifest(folder, **changes):
    path = folder / "index.json"
    manifest = json.loads(path.read_text()) | changes
    removed = [name for name, value in changes.items() if value is None]
    path.write_text(json.dumps({name: value for name, value in manifest.items() if name not in removed}))


@pytest.mark.parametrize("changes, problem", [
    ({"format": 3}, "index format 3, not 4; build it: .*build PASSAGES .*index --kind bm25"),
    ({"format": 99}, "index format 99, not 4; build it"),
    ({"format": None}, "index format None"),
    ({"kind": "bm52"}, "index format 4, not one of this program"),
    ({"kind": []}, "damaged"),
    ({"data": None}, "damaged"),
    ({"data": "data-9"}, "missing or incomplete; build it"),
    ({"passages": 1}, "damaged"),
    ({"files": {"docs": 1}}, "docs is missing or incomplete"),
    (b"\x00\xff", "not JSON"),
])  # fmt: skip
def test_an_index_that_cannot_be_opened_is_one_line(tmp_path, changes, problem):
    build(tmp_path, ["a text", "another"])
    if isinstance(changes, bytes):
        (tmp_path / "index" / "index.json").write_bytes(changes)
    else:
        edit_manifest(tmp_path / "index", **changes)
    with pytest.raises(InputError, match=problem) as error:
        retriever.load(tmp_path / "index")
    assert "\n" not in str(error.value)


def test_incomplete_files_are_refused_and_the_same_build_repairs_them(tmp_path):
    index = build(tmp_path, zipf_texts(300))
    expected = index.search(["w1 w2"])
    for name, content in data_files(tmp_path / "index").items():
        path = tmp_path / "index" / index.manifest["data"] / name
        for damaged in (content[:-1], content[: len(content) // 2], b"", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(InputError, match=f"{name} is missing or incomplete; build it"):
                retriever.load(tmp_path / "index")
        index = build(tmp_path, zipf_texts(300))
        assert index.search(["w1 w2"]) == expected
    shutil.rmtree(index.data)
    assert build(tmp_path, zipf_texts(300)).search(["w1 w2"]) == expected


def test_a_full_disk_is_an_error_and_the_same_build_continues(tmp_path):
    """A limit on the size of files stands for the disk. Each limit cuts the end of one of the files of the index."""
    build(tmp_path, zipf_texts(2000), name="whole")
    sizes = {len(content) for content in data_files(tmp_path / "whole").values()}
    sizes |= {path.stat().st_size for path in (tmp_path / "whole").glob("*/*")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in sorted(sizes)[1:]:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
            with pytest.raises(InputError, match="File too large; the same command continues") as error:
                retriever.build(tmp_path / "whole.jsonl", tmp_path / "index", quiet=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(error.value) and not (tmp_path / "index" / "index.json").exists()
    retriever.build(tmp_path / "whole.jsonl", tmp_path / "index", quiet=True)
    assert data_files(tmp_path / "index") == data_files(tmp_path / "whole")


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
read_passages = retriever.read_passages
def slow(*arguments):
    time.sleep(0.15)
    return read_passages(*arguments)
retriever.read_passages = slow
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
    made, read = [], retriever.read_passages
    monkeypatch.setattr(retriever, "read_passages", lambda *chunk: made.append(chunk[1]) or read(*chunk))
    retriever.build(second, out, "bm25", quiet=True)
    assert len(kept) >= 3 and made == list(range(20_000 * len(kept), second.stat().st_size, 20_000))
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


def reference_vectors(encoder, texts):
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
        vector = hidden.mean(0)
        vectors.append((vector / vector.norm()).numpy())
    return np.array(vectors)


def test_dense_search_equals_brute_force(tmp_path, encoder):
    texts = zipf_texts(80, 150)
    index = build(tmp_path, [*texts, texts[3]], "dense", encoder=encoder)
    vectors = reference_vectors(encoder, [f"passage: {text}" for text in texts])
    stored = index.vectors.numpy()
    np.testing.assert_allclose(stored[:80], vectors, atol=1e-5)
    queries = zipf_texts(9, 150, seed=4)
    exact = reference_vectors(encoder, [f"query: {query}" for query in queries]) @ stored.T.astype(np.float64)
    for row, hits in zip(exact, index.search(queries, 5), strict=True):
        expected = np.lexsort((np.arange(81), -row.round(5)))[:5]
        assert [hit.id for hit in hits] == [f"p{doc:05d}" for doc in expected]
        np.testing.assert_allclose([hit.score for hit in hits], row[expected], atol=1e-5)
    assert len(index.search(["w1 \ud800"], 500)[0]) == 81 and index.search([]) == []


@pytest.mark.parametrize("k", [1, 3, 50, 5000])
def test_vectors_are_searched_exactly(k):
    """Several blocks, the last one short, and many ties: small whole numbers have exact products."""
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    vectors = generator.integers(-3, 4, (9000, 6)).astype(np.float32)
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


def test_dense_indexes_of_the_previous_edition_open(tmp_path, encoder, capsys):
    index = build(tmp_path, ["w1 w2", "w3"], "dense", encoder=encoder)
    expected, folder = index.search(["w1"]), tmp_path / "index"
    older = {"pooling": "mean", "dtype": "float32", "query_prefix": "query: ", "passage_prefix": "passage: "}
    edit_manifest(folder, sha256=None, files=None, **older)
    assert retriever.load(folder, "cpu").search(["w1"]) == expected
    build(tmp_path, ["w1 w2", "w3"], "dense", encoder=encoder)  # writes the passages file anew: embeds again
    edit_manifest(folder, sha256=None, files=None, **older)
    retriever.build(tmp_path / "index.jsonl", folder, "dense", encoder=encoder, quiet=True)
    assert "already built" in capsys.readouterr().out
    for changes in ({"dtype": "float16"}, {"pooling": "cls"}, {"query_prefix": ""}):
        edit_manifest(folder, **older | changes)
        with pytest.raises(InputError, match=f"built with {next(iter(changes))} .*build it again"):
            retriever.load(folder, "cpu")
    (tmp_path / "empty").mkdir()
    edit_manifest(folder, encoder=str(tmp_path / "empty"), **older)
    with pytest.raises(InputError, match="no encoder could be loaded"):
        retriever.load(folder, "cpu")


def test_threads_share_a_dense_index(tmp_path, encoder):
    index = build(tmp_path, zipf_texts(50, 150), "dense", encoder=encoder)
    ask = lambda n: [[hit.id for hit in hits] for hits in index.search([f"w{n}", f"w{n + 1}"], 1 + n % 2)]  # noqa: E731
    assert in_threads(8, ask) == [ask(n) for n in range(8)]


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
    assert requests.get(f"{url}/elsewhere", timeout=10).status_code == 404


@pytest.mark.parametrize("topk", [0, True, "3", 1.5])
def test_bad_requests_are_answered_with_a_reason(served, topk):
    for body in ({}, {"queries": "n7"}, {"queries": [7]}, {"queries": ["n7"], "topk": topk}):
        status, answer = ask(served[1], body)
        assert status == 400 and "must be" in answer["error"]


def test_a_failed_search_is_reported_and_the_server_continues(served, monkeypatch):
    index, url = served
    with monkeypatch.context() as patch:
        patch.setattr(index, "top", lambda queries, k: 1 / 0)
        assert ask(url, {"queries": ["n7"]}) == (500, {"error": "ZeroDivisionError: division by zero"})
    assert ask(url, {"queries": ["n7"]})[0] == 200


def test_remote_index_gives_the_same_hits(served, monkeypatch):
    index, url = served
    remote = retriever.load(url)
    queries = ["n7", "passage", "nothing"]
    assert remote.search(queries, 2) == index.search(queries, 2)
    assert in_threads(8, lambda n: remote.search([f"n{n}"])) == [index.search([f"n{n}"]) for n in range(8)]
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there
    monkeypatch.delenv("no_proxy", raising=False)
    for local in (url, url.replace("127.0.0.1", "localhost"), f"{url}/retrieve/"):
        assert retriever.load(local).search(queries, 2) == index.search(queries, 2)
    with pytest.raises(InputError, match="status 400: the number of passages"):
        remote.search(["n7"], 0)


DOCUMENT = {"id": "1", "contents": "text"}


@pytest.mark.parametrize("answer", [
    [],
    {"results": []},
    {"result": None},
    {"result": []},
    {"result": [[DOCUMENT]]},
    {"result": [[{"document": DOCUMENT, "score": None}]]},
    {"result": [[{"document": DOCUMENT | {"contents": ["text"]}, "score": 1}]]},
    {"result": [[{"document": {"contents": "text"}, "score": 1}]]},
    {"result": [[None]]},
])  # fmt: skip
def test_answers_of_another_form_are_one_line(answer):
    with serve(lambda *request: answer) as (url, _), pytest.raises(InputError, match="no answer in the format"):
        retriever.load(url).search(["a query"])


def test_what_is_no_json_and_a_server_that_is_gone(tmp_path):
    for raw in (b"<html>\nlogin\n</html>", b"[" * 100_000, b""):
        with serve(lambda *request, raw=raw: ("raw", raw)) as (url, _), pytest.raises(InputError, match="no answer"):
            retriever.load(url).search(["a query"])
    gone = run("search", url, "a query")  # the server has ended
    assert gone.returncode == 2 and gone.stderr.count("\n") == 1
    assert gone.stderr.startswith(f"error: {url}/retrieve: no answer: [Errno 111] Connection refused; start it")


# The command line


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_command_line(tmp_path):
    path = write_passages(tmp_path / "p.jsonl", ['"Oslo"\nOslo is the capital of Norway.', "no title"])
    assert run("build", path, tmp_path / "index", "--quiet").returncode == 0  # BM25 is the default
    found = run("search", tmp_path / "index", "capital of Norway", "--k", 2)
    assert found.stdout.startswith("1. Oslo   (p00000, ") and "   Oslo is the capital of Norway.\n" in found.stdout
    assert run("search", tmp_path / "index", "zzz").stdout == "no passage has a word of this query\n"
    path.write_text("{}\n")
    bad = [("search", tmp_path / "nowhere", "x"), ("build", path, tmp_path / "other", "--quiet"), ("build", path)]
    bad += [("search", tmp_path / "index", "x", "--k", k) for k in (0, -3, "three")]
    bad += [("serve", tmp_path / "index", "--port", 99999), ("search", tmp_path / "index", "x")]  # changed passages
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
