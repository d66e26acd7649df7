"""The retriever against scikit-learn (TF-IDF), bm25s (BM25), and faiss (search, flat index files).

pytest tests/test_retriever_interop.py        # in an environment that has these packages
"""

import numpy as np
import pytest

import retriever
from test_retriever import build, terms_of, zipf_texts

TEXTS = [*zipf_texts(1500, 1000), "w1 " * 300, "Zürich ŁÓDŹ Straße w1 films of the ladies", "..."]
QUERIES = [*zipf_texts(200, 1000, seed=1), "w1 w1 w2", "zurich", "the film lady", "no such words"]


def words_of(text):
    """The peers get the retriever's own terms, so that the scores are compared and not the splitting into words."""
    return [term.decode() for term in terms_of(text)]


def all_scores(index, query):
    """Scores of all passages, 0 where a passage is no hit."""
    scores = np.zeros(len(index))
    docs, found = index.top([query], len(index))[0]
    scores[docs] = found
    return scores


def test_tfidf_scores_are_scikit_learns(tmp_path):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    index = build(tmp_path, TEXTS, "tfidf")
    vectorizer = text.TfidfVectorizer(analyzer=words_of, sublinear_tf=True)
    vectors = vectorizer.fit_transform(TEXTS)
    expected = (vectorizer.transform(QUERIES) @ vectors.T).toarray()
    for query, row in zip(QUERIES, expected, strict=True):
        np.testing.assert_allclose(all_scores(index, query), row, atol=1e-5)


@pytest.mark.parametrize("k1, b", [(1.5, 0.75), (1.2, 0.0), (2.0, 1.0)])
def test_bm25_scores_are_those_of_bm25s(tmp_path, k1, b):
    bm25s = pytest.importorskip("bm25s")
    index = build(tmp_path, TEXTS, "bm25", k1=k1, b=b)
    peer = bm25s.BM25(method="lucene", k1=k1, b=b)
    peer.index([words_of(text) for text in TEXTS], show_progress=False)
    for query in QUERIES:
        known = [word for word in words_of(query) if word in peer.vocab_dict]
        expected = peer.get_scores(known) if known else np.zeros(len(TEXTS))
        np.testing.assert_allclose(all_scores(index, query), expected, rtol=1e-5, atol=1e-5)


def test_dense_search_and_flat_files_are_those_of_faiss(tmp_path):
    faiss, torch = pytest.importorskip("faiss"), pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((5000, 48)).astype(np.float32)
    queries = vectors[::50] + generator.standard_normal((100, 48)).astype(np.float32) * 0.1
    peer = faiss.index_factory(48, "Flat", faiss.METRIC_INNER_PRODUCT)
    peer.add(vectors)
    faiss.write_index(peer, str(tmp_path / "e5_Flat"))
    opened = retriever.open_flat_index(tmp_path / "e5_Flat", 5000)
    assert isinstance(opened, np.memmap) and np.array_equal(opened, vectors)
    found = retriever.search_vectors(torch.from_numpy(opened), torch.from_numpy(queries), 10, np.arange(5000))
    for scores, docs, (mine, mine_scores) in zip(*peer.search(queries, 10), found, strict=True):
        assert mine.tolist() == docs.tolist()
        np.testing.assert_allclose(mine_scores, scores, atol=1e-5)
    for other in (faiss.IndexFlatL2(48), faiss.index_factory(48, "HNSW8")):
        other.add(vectors[:100])
        faiss.write_index(other, str(tmp_path / "other"))
        with pytest.raises(retriever.InputError, match="no complete FAISS flat inner-product index of 100 vectors"):
            retriever.open_flat_index(tmp_path / "other", 100)
