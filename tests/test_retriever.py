"""The retriever: words, scores, ties, bad input, full disks and killed builds, dense search, the server.

    pytest tests/test_retriever.py

Scores are compared with the plain formulas in float64 here, and with scikit-learn, bm25s and faiss in
test_retriever_interop.py.
"""

import collections
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests

import retriever
from common import InputError
from common.passages import STOP_WORDS, index_term, split_words
from conftest import small_disk, write_jsonl
from servers import serve

SCRIPT = Path(retriever.__file__)


def write_passages(path, texts, ids=None):
    ids = ids or [f"p{i:05d}" for i in range(len(texts))]
    return Path(write_jsonl(path, [{"id": id, "contents": text} for id, text in zip(ids, texts, strict=True)]))


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


@pytest.mark.parametrize("text, words", [
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
])  # fmt: skip
def test_words_of_any_script(text, words):
    assert [word.decode() for word in split_words(text)] == words.split()


def test_long_words_and_singulars(tmp_path):
    index = build(tmp_path, ["a" * 70, "ä" * 71, "a"])
    assert [[hit.id for hit in hits] for hits in index.search(["a" * 71, "a" * 30])] == [["p00000", "p00001"], []]
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
    assert len(build(tmp_path, ["the", "of the"], kind, name="no other").search(["the"])[0]) == 2


# Scores


def terms_of(text):
    return [index_term(word) for word in split_words(text) if word not in STOP_WORDS]


def plain_scores(texts, queries, kind, k1=1.5, b=0.9):
    """The formulas of the docstrings in float64: [queries, passages]. texts have no titles."""
    words = sorted({word for text in texts for word in terms_of(text)})
    counters = [[collections.Counter(terms_of(text)) for text in group] for group in (queries, texts)]
    asked, tf = (np.array([[counter[word] for word in words] for counter in group], float) for group in counters)
    df, length = (tf > 0).sum(0), tf.sum(1, keepdims=True)
    if kind == "bm25":
        idf = np.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
        return asked @ (idf * tf / (tf + k1 * (1 - b + b * length / length.mean()))).T
    idf = np.log((1 + len(texts)) / (1 + df)) + 1
    weights = [(n > 0) * (1 + np.log(np.maximum(n, 1))) * idf for n in (asked, tf)]
    vectors = [weight / np.maximum(np.linalg.norm(weight, axis=1, keepdims=True), 1e-9) for weight in weights]
    return vectors[0] @ vectors[1].T


@pytest.mark.parametrize("kind", ["tfidf", "bm25"])
def test_scores_are_those_of_the_formulas(tmp_path, kind):
    texts = [*zipf_texts(300, 200), "w1 " * 300, "Ünïcode wörds w1", "..."]
    queries = ["w1 w2 w3", "w1 w1 w150", "unicode WORDS", "w7 w199 nosuchword", *zipf_texts(20, 200, seed=1)]
    found = build(tmp_path, texts, kind).top(queries, len(texts))
    for expected, (docs, scores) in zip(plain_scores(texts, queries, kind), found, strict=True):
        assert len(docs) == sum(expected > 0) and all(np.diff(scores) <= 0)
        np.testing.assert_allclose(scores, expected[docs], rtol=1e-5)


def test_the_words_of_the_title_count_twice(tmp_path):
    titled = build(tmp_path, ['"Paris"\nThe city', '"Rome"\nParis is not it', "Paris alone"], "bm25", name="titled")
    spelled = build(tmp_path, ["Paris Paris The city", "Rome Rome Paris is not it", "Paris alone"], "bm25")
    for query in ("paris", "rome city"):
        assert [hit[:2] for hit in titled.search([query])[0]] == [hit[:2] for hit in spelled.search([query])[0]]


@pytest.mark.parametrize("kind", ["tfidf", "bm25"])
def test_the_best_of_many_ties(tmp_path, kind):
    """Search for k finds the same as sorting all scores, in an index with many equal passages; ties by id."""
    texts = zipf_texts(4000)
    texts += texts[:400]
    ids = [str(number) for number in random.Random(0).sample(range(10**6), len(texts))]
    index = build(tmp_path, texts, kind, ids=ids)
    for query in ["w0 " * 9000, *zipf_texts(50, seed=1)]:
        docs, scores = index.top([query], len(texts))[0]
        order = np.lexsort((np.array(ids)[docs], -scores))
        for k in (1, 3, 20, 500):
            best, values = index.top([query], k)[0]
            assert best.tolist() == docs[order[:k]].tolist() and values.tolist() == scores[order[:k]].tolist()


# Input


def test_hits_and_odd_queries(tmp_path):
    texts = ['"Ångström"\nA unit\u2028of length', "other words", "", '""\nuntitled\ntwo lines', "half \udc00 pair"]
    index = build(tmp_path, texts, ids=["1", "2", "3", "4", "5\ud83d"])
    expected = {
        "angstrom": ("1", "Ångström", "A unit\u2028of length"),
        "other": ("2", "", "other words"),
        "untitled": ("4", "", "untitled\ntwo lines"),
        "half \udfff": ("5?", "", "half ? pair"),
        "unit " * 5000: ("1", "Ångström", "A unit\u2028of length"),
    }
    for [hit], found in zip(index.search(list(expected), k=10**12), expected.values(), strict=True):
        assert (hit.id, hit.title, hit.text) == found
    assert index.search([]) == [] and index.search(["", "   ", "unknown", "?!"]) == [[], [], [], []]
    for queries, k in (("unit", 3), ([1], 3), (["unit"], 0), (["unit"], 1.5)):
        with pytest.raises(InputError, match="must be a"):
            index.search(queries, k)


@pytest.mark.parametrize("lines, problem", [
    (b'{"id": "1", "contents": "x"}\n\n{"id": "2", "contents": \n', ":3: not a passage"),
    (b'{"id": "1", "contents": "x"}\n{"id": 2, "contents": "y"}\n', ":2: not a passage"),
    (b"[" * 100_000, ":1: not a passage"),
    (b'{"id": "' + b"1" * 1000 + b'", "contents": "x"}\n', "an id of more than 256"),
    (b'{"id": "1", "contents": "x"}\n{"id": "2", "contents": "\xff"}\n', ":2: not a passage"),
    (b'{"id": "1", "contents": "x"}\n\n{"id": "1", "contents": "z"}\n', ": the id '1' occurs twice"),
    (b"\n\n", ": no passages in it"),
    (b'{"id": "1", "contents": "..."}\n', ": no passage has a word"),
])  # fmt: skip
def test_bad_passages_are_refused_with_their_line(tmp_path, monkeypatch, lines, problem):
    monkeypatch.setattr(retriever, "CHUNK", 40)
    path = tmp_path / "bad.jsonl"
    path.write_bytes(lines)
    with pytest.raises(InputError) as error:
        retriever.build(path, tmp_path / "index", quiet=True)
    assert str(path) in str(error.value) and problem in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "index" / "index.json").exists()


def test_bad_settings_and_paths(tmp_path):
    path = write_passages(tmp_path / "p.jsonl", ["x"])
    for wrong in ({"b": math.nan}, {"k1": -1}, {"kind": "bm52"}):
        with pytest.raises(InputError, match="must be"):
            retriever.build(path, tmp_path / "index", **wrong)
    for ignored in ({"kind": "bm25", "vectors": "x"}, {"kind": "tfidf", "k1": 3.0}, {"kind": "dense", "b": 0.5}):
        with pytest.raises(InputError, match=f"--{list(ignored)[1]} .*: --kind {ignored['kind']} does not use it"):
            retriever.build(path, tmp_path / "index", **ignored)
    with pytest.raises(InputError, match="none.jsonl: No such file"):
        retriever.build(tmp_path / "none.jsonl", tmp_path / "index")
    with pytest.raises(InputError, match=f"{path}: File exists|{path}/build.lock: Not a directory"):
        retriever.build(path, path)
    for name in ("data-raw", "data-20250612"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.txt").touch()
    retriever.build(path, tmp_path, quiet=True)
    assert (tmp_path / "data-raw" / "own.txt").is_file() and (tmp_path / "data-20250612" / "own.txt").is_file()


def test_an_index_moves_with_its_passages_and_changes_are_noticed(tmp_path):
    """Built through symbolic links, it opens through them, through the real folders, and after both have moved."""
    (tmp_path / "disk" / "far" / "data").mkdir(parents=True)
    (tmp_path / "disk" / "index").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "far" / "data")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "index")
    path = write_passages(tmp_path / "link" / "p.jsonl", ["first words", "second words"])
    retriever.build(path, tmp_path / "out", quiet=True)
    shutil.copytree(tmp_path / "disk", tmp_path / "copy", copy_function=shutil.copyfile)  # modified at another time
    for folder in ("out", "disk/index", "copy/index"):
        index = retriever.load(tmp_path / folder)
        assert len(index.search(["words"])[0]) == 2
    path = tmp_path / "copy" / "far" / "data" / "p.jsonl"
    content = path.read_text()
    path.write_text(content.replace("{", "[", 1))
    with pytest.raises(InputError, match="changed since"):  # the open index finds no passage there any more
        index.search(["first"])
    for changed in (content.replace("first", "fifth"), content + content, None):  # the first is of the same size
        path.unlink() if changed is None else path.write_text(changed)
        with pytest.raises(InputError, match="missing, or changed since"):
            retriever.load(tmp_path / "copy" / "index")


def edit_manifest(folder, **changes):
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_damaged_index_is_refused_in_one_line_and_the_same_build_repairs_it(tmp_path):
    index = build(tmp_path, zipf_texts(300))
    folder, expected = tmp_path / "index", index.search(["w1 w2"])
    data = folder / index.manifest["data"]
    missing = "is missing or incomplete; build it: .*PASSAGES .*index --kind bm25"
    no_index = "no index of format 5 here"
    damages = [(lambda path=path: os.truncate(path, 1), f"{path.name} {missing}") for path in data.iterdir()]
    damages += [
        (lambda: shutil.rmtree(data), missing),
        (lambda: edit_manifest(folder, format=4), no_index),
        (lambda: (folder / "index.json").write_bytes(b"\x00\xff"), "not JSON"),
        (lambda: (folder / "index.json").unlink(), no_index),
    ]
    for damage, problem in damages:
        damage()
        with pytest.raises(InputError, match=problem) as error:
            retriever.load(folder)
        assert "\n" not in str(error.value)
        assert build(tmp_path, zipf_texts(300)).search(["w1 w2"]) == expected


def test_a_full_disk_is_an_error_and_the_same_build_continues(tmp_path):
    """Each limit cuts the end of one of the files of the index."""
    build(tmp_path, zipf_texts(2000), name="whole")
    expected = data_files(tmp_path / "whole")
    for size in sorted(map(len, expected.values())):
        with (
            small_disk(size - 1),
            pytest.raises(InputError, match="^[^\n]*File too large; the same command continues$"),
        ):
            retriever.build(tmp_path / "whole.jsonl", tmp_path / "index", quiet=True)
        assert not (tmp_path / "index" / "index.json").exists()
    retriever.build(tmp_path / "whole.jsonl", tmp_path / "index", quiet=True)
    assert data_files(tmp_path / "index") == expected


# Building: chunks, kills


BUILD_AND_DIE = """
import os, sys
sys.path.insert(0, sys.argv[1])
import retriever
retriever.CHUNK = 20_000
read = retriever.read_chunk
retriever.read_chunk = lambda path, start, end: os.kill(os.getpid(), 9) if start == 60_000 else read(path, start, end)
retriever.build(sys.argv[2], sys.argv[3], quiet=True)
"""


@pytest.mark.parametrize("continued", [True, False])
def test_a_killed_build_keeps_the_old_index_and_continues_with_the_same_passages_only(tmp_path, monkeypatch, continued):
    whole = write_passages(tmp_path / "whole.jsonl", zipf_texts(1500))
    other = write_passages(tmp_path / "other.jsonl", zipf_texts(1500, seed=1))
    source, out = whole if continued else other, tmp_path / "killed"
    retriever.build(source, tmp_path / "at once", quiet=True)  # in one chunk and one range
    monkeypatch.setattr(retriever, "CHUNK", 20_000)
    monkeypatch.setattr(retriever, "RANGE", 1000)
    build(tmp_path, ["the old passage"], name="killed")
    assert subprocess.run([sys.executable, "-c", BUILD_AND_DIE, SCRIPT.parent, whole, out]).returncode == -9
    assert [hit.contents for hit in retriever.load(out).search(["passage"])[0]] == ["the old passage"]
    made, read = [], retriever.read_chunk
    monkeypatch.setattr(retriever, "read_chunk", lambda *chunk: made.append(chunk[1]) or read(*chunk))
    retriever.build(source, out, quiet=True)
    assert made == list(range(60_000 if continued else 0, source.stat().st_size, 20_000))
    assert data_files(out) == data_files(tmp_path / "at once")
    assert sorted(path.name.partition("-")[0] for path in out.iterdir()) == ["build.lock", "data", "index.json"]


def test_two_builders_and_a_finished_index(tmp_path, capsys):
    with retriever.common.Journal(tmp_path / "index" / "build.lock"):
        with pytest.raises(InputError, match="another process"):
            build(tmp_path, ["some words"])
    index = build(tmp_path, ["some words"])
    assert not capsys.readouterr().out
    build(tmp_path, ["some words"])
    assert "already built" in capsys.readouterr().out
    assert build(tmp_path, ["some words"], "tfidf").manifest["kind"] == "tfidf"
    assert len(index.search(["words"])[0]) == 1  # the replaced index, still open


# Dense


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT of random weights with a small WordPiece vocabulary."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"0123456789:w", *(f"##{c}" for c in "0123456789:w")]
    vocabulary += ["query", "passage", *(f"w{i}" for i in range(150))]
    transformers.BertTokenizerFast(vocab={token: i for i, token in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"vocab_size": len(vocabulary), "max_position_embeddings": 64, "initializer_range": 0.2}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    return str(folder)


def test_dense_search_equals_brute_force(tmp_path, encoder):
    """The vectors are those of one text at a time, without padding."""
    import torch

    texts = zipf_texts(80, 150)
    index = build(tmp_path, [*texts, texts[3]], "dense", encoder=encoder)

    def embed(text):
        tokens = index.encoder.tokenizer(text, return_tensors="pt", truncation=True, max_length=64)
        with torch.no_grad():
            vector = index.encoder.model(**tokens).last_hidden_state[0].mean(0)
        return (vector / vector.norm()).numpy()

    stored = index.vectors.numpy()
    np.testing.assert_allclose(stored[:80], [embed(f"passage: {text}") for text in texts], atol=1e-5)
    queries = zipf_texts(9, 150, seed=4)
    exact = np.array([embed(f"query: {query}") for query in queries], np.float64) @ stored.T
    for row, hits in zip(exact, index.search(queries, 5), strict=True):
        expected = np.lexsort((np.arange(81), -row.round(5)))[:5]
        assert [hit.id for hit in hits] == [f"p{doc:05d}" for doc in expected]
        np.testing.assert_allclose([hit.score for hit in hits], row[expected], atol=1e-5)
    assert len(index.search(["w1 \ud800"], 500)[0]) == 81 and index.search([]) == []


@pytest.mark.parametrize("k", [1, 3, 50, 5000])
def test_vectors_are_searched_exactly(k):
    """Several blocks, the last one short, and many ties: small whole numbers have exact products."""
    import torch

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
    texts, path = zipf_texts(40, 150), tmp_path / "e5_Flat.index"
    own = build(tmp_path, texts, "dense", encoder=encoder, name="own")
    path.write_bytes(flat_index_bytes(own.vectors.numpy()))
    index = build(tmp_path, texts, "dense", encoder=encoder, vectors=str(path))
    queries = zipf_texts(5, 150, seed=2)
    found = [[[hit.id for hit in hits] for hits in each.search(queries)] for each in (index, own)]
    assert found[0] == found[1]  # but scores may differ in the last bit
    wrong = "e5_Flat.index: no complete FAISS flat inner-product index of 40 vectors"
    for content, problem in (
        (flat_index_bytes(np.zeros((39, 32))), wrong),
        (flat_index_bytes(np.zeros((40, 32)), b"IxF2", metric=1), wrong),
        (flat_index_bytes(np.zeros((40, 32)))[:-4], wrong),
        (b"IxFI", wrong),
        (flat_index_bytes(np.zeros((40, 8))), "vectors of 8 dimensions, but the encoder has 32"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=problem):
            build(tmp_path, texts, "dense", encoder=encoder, vectors=str(path), name="wrong")
    edit_manifest(tmp_path / "own", encoder=str(tmp_path / "own"))  # not the folder of an encoder
    with pytest.raises(InputError, match="model .*own: "):
        retriever.load(tmp_path / "own", "cpu")


def test_threads_share_an_index_and_its_encoder(tmp_path, encoder):
    index = build(tmp_path, zipf_texts(200, 150), "dense", encoder=encoder)
    ask = lambda n: [[hit.id for hit in hits] for hits in index.search([f"w{n}", f"w{n + 1}"], 1 + n % 2)]  # noqa: E731
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [ask(n) for n in range(8)]


# The server and the command line


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(the folder of an index, the URL of its server)"""
    folder = tmp_path_factory.mktemp("served")
    path = write_passages(
        folder / "p.jsonl", ['"Oslo"\nThe capital n0', *(f"passage number n{i} of all" for i in range(1, 9))]
    )
    assert run("build", path, folder / "index", "--quiet").returncode == 0  # BM25 is the default
    command = [sys.executable, SCRIPT, "serve", folder / "index", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        line = server.stdout.readline()
        assert line.startswith("9 passages at http://127.0.0.1:")
        yield folder / "index", line.split()[-1]
        server.terminate()


def test_the_command_line_finds_passages(served):
    found = run("search", served[0], "capital of Norway", "--k", 2)
    assert found.stdout.startswith("1. Oslo   (p00000, ") and "   The capital n0\n" in found.stdout
    assert run("search", served[0], "zzz").stdout == "no passage has a word of this query\n"
    failed = run("serve", served[0], "--port", served[1].split(":")[-1].split("/")[0])
    assert failed.returncode == 2 and re.fullmatch("error: port .* Address already in use\n", failed.stderr)


def test_search_r1_protocol_and_its_client(served):
    def ask(body):
        response = requests.post(served[1], json=body, timeout=10)
        return response.status_code, response.json()

    document = {"id": "p00007", "contents": "passage number n7 of all"}
    score = retriever.load(served[0]).search(["n7"])[0][0].score
    answer = {"result": [[{"document": document, "score": score}], []]}
    assert ask({"queries": ["n7", "nothing here"], "topk": 2, "return_scores": True}) == (200, answer)
    assert ask({"queries": ["n7"]}) == (200, {"result": [[document]]})
    assert ask({"queries": ["passage"], "topk": None})[1]["result"][0][2]["id"] == "p00003"
    assert ask({"queries": []}) == (200, {"result": []})
    assert requests.get(served[1].replace("retrieve", "elsewhere"), timeout=10).status_code == 404
    bodies = [{"queries": ["n7"], "topk": topk} for topk in (0, True, "3", 1.5)]
    for body in ({}, {"queries": "n7"}, {"queries": [7]}, *bodies):
        status, answer = ask(body)
        assert status == 400 and "must be" in answer["error"]
    queries = ["n7", "passage", "nothing"]
    for url in (served[1], served[1].replace("retrieve", "")):
        assert retriever.load(url).search(queries, 2) == retriever.load(served[0]).search(queries, 2)
    with pytest.raises(InputError, match="http.*: 400: .*the number of passages"):
        retriever.load(served[1]).search(["n7"], 0)


DOCUMENT = {"id": "1", "contents": "text"}


@pytest.mark.parametrize("answer", [
    ("raw", b"<html>\nlogin\n</html>"),
    [],
    {"result": []},
    {"result": [[{"document": DOCUMENT | {"contents": ["text"]}, "score": 1}]]},
    {"result": [[{"document": {"contents": "text"}, "score": 1}]]},
])  # fmt: skip
def test_answers_of_another_form_are_one_line(answer, monkeypatch):
    monkeypatch.setattr("common.client.BACKOFF", 0)
    with serve(lambda *request: answer) as (url, _), pytest.raises(InputError, match="not in the expected format"):
        retriever.load(url).search(["a query"])
    with pytest.raises(InputError, match="gave up after 4 attempts"):
        retriever.load(url).search(["a query"])  # the server has ended
