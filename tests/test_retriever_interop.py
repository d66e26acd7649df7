"""The retriever against scikit-learn (TF-IDF), bm25s and rank_bm25 (BM25), and faiss (flat index files).

pytest tests/test_retriever_interop.py        # in an environment that has these packages
"""

import json

import numpy as np
import pytest

import dense
import retriever
from words import split_words

RAW = {"stem": False, "stop_words": False, "title_weight": 1, "quiet": True}


def zipf_texts(count, seed):
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, 1001)
    words = np.array([f"w{i}" for i in range(1000)])
    return [" ".join(generator.choice(words, n, p=weights / weights.sum())) for n in generator.integers(3, 80, count)]


TEXTS = [*zipf_texts(1500, 0), "w1 " * 300, "Zürich ŁÓDŹ Straße w1", "..."]
QUERIES = [*zipf_texts(200, 1), "w1 w1 w2", "zurich", "no such words"]


def words_of(text):
    return [word.decode() for word in split_words(text)]


@pytest.fixture
def passages(tmp_path):
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(json.dumps({"id": f"{i:05d}", "contents": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def all_scores(index, query):
    """Scores of all passages, 0 where a passage is no hit."""
    scores = np.zeros(len(index))
    docs, found = index.top([query], len(index))[0]
    scores[docs] = found
    return scores


def test_tfidf_scores_are_scikit_learns(tmp_path, passages):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    retriever.build(passages, tmp_path / "index", "tfidf", **RAW)
    index = retriever.load(tmp_path / "index")
    vectorizer = text.TfidfVectorizer(analyzer=words_of, sublinear_tf=True)
    vectors = vectorizer.fit_transform(TEXTS)
    expected = (vectorizer.transform(QUERIES) @ vectors.T).toarray()
    for query, row in zip(QUERIES, expected, strict=True):
        np.testing.assert_allclose(all_scores(index, query), row, atol=1e-5)


@pytest.mark.parametrize("k1, b", [(1.5, 0.75), (0.9, 0.4), (1.2, 0.0), (2.0, 1.0)])
def test_bm25_scores_are_those_of_bm25s(tmp_path, passages, k1, b):
    bm25s = pytest.importorskip("bm25s")
    retriever.build(passages, tmp_path / "index", "bm25", k1=k1, b=b, **RAW)
    index = retriever.load(tmp_path / "index")
    peer = bm25s.BM25(method="lucene", k1=k1, b=b)
    peer.index([words_of(text) for text in TEXTS], show_progress=False)
    for query in QUERIES:
        known = [word for word in words_of(query) if word in peer.vocab_dict]
        expected = peer.get_scores(known) if known else np.zeros(len(TEXTS))
        np.testing.assert_allclose(all_scores(index, query), expected, rtol=1e-5, atol=1e-5)


def test_bm25_ranks_as_rank_bm25_does(tmp_path, passages):
    """rank_bm25 has another idf, so a query of one word, where idf is a common factor, is what can be compared."""
    rank_bm25 = pytest.importorskip("rank_bm25")
    retriever.build(passages, tmp_path / "index", "bm25", k1=1.5, b=0.75, **RAW)
    index = retriever.load(tmp_path / "index")
    peer = rank_bm25.BM25Okapi([words_of(text) or [""] for text in TEXTS], k1=1.5, b=0.75)
    peer.avgdl = np.mean([len(words_of(text)) for text in TEXTS])  # without the "" of the empty passage
    for word in ("w20", "w300", "w999", "strasse"):
        expected, mine = np.array(peer.get_scores([word])), all_scores(index, word)
        np.testing.assert_allclose(mine / mine.max(), expected / expected.max(), rtol=1e-5, atol=1e-7)


@pytest.fixture
def vectors():
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((5000, 48)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, vectors[::50] + generator.standard_normal((100, 48)).astype(np.float32) * 0.1


@pytest.mark.parametrize("as_float16", [False, True])
def test_dense_search_equals_faiss(vectors, as_float16):
    faiss = pytest.importorskip("faiss")
    vectors, queries = vectors
    if as_float16:
        vectors = vectors.astype(np.float16)
    peer = faiss.IndexFlatIP(48)
    peer.add(vectors.astype(np.float32))
    scores, docs = peer.search(queries, 10)
    tops = dense.search_vectors(dense.CpuProducts(vectors), vectors, queries, 10, np.arange(5000))
    for expected_docs, expected_scores, (mine, mine_scores) in zip(docs, scores, tops, strict=True):
        assert mine.tolist() == expected_docs.tolist()
        np.testing.assert_allclose(mine_scores, expected_scores, atol=1e-5)


def test_faiss_files_are_opened(tmp_path, vectors):
    faiss = pytest.importorskip("faiss")
    vectors, _ = vectors
    for name, made in (
        ("e5_Flat", faiss.IndexFlatIP(48)),
        ("factory", faiss.index_factory(48, "Flat", faiss.METRIC_INNER_PRODUCT)),
    ):
        made.add(vectors)
        faiss.write_index(made, str(tmp_path / name))
        opened = dense.open_flat_index(tmp_path / name)
        assert isinstance(opened, np.memmap) and np.array_equal(opened, vectors)
    for other in (faiss.IndexFlatL2(48), faiss.index_factory(48, "HNSW8")):
        other.add(vectors[:100])
        faiss.write_index(other, str(tmp_path / "other"))
        with pytest.raises(retriever.InputError, match="not a FAISS flat inner-product index"):
            dense.open_flat_index(tmp_path / "other")
