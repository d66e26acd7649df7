"""The retriever against scikit-learn (TF-IDF), bm25s and rank_bm25 (BM25), and faiss (flat index files).

pytest tests/test_retriever_interop.py        # in an environment that has these packages
"""

import json

import numpy as np
import pytest

import retriever
from common.passages import STOP_WORDS, index_term, split_words


def zipf_texts(count, seed):
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, 1001)
    words = np.array([f"w{i}" for i in range(1000)])
    return [" ".join(generator.choice(words, n, p=weights / weights.sum())) for n in generator.integers(3, 80, count)]


TEXTS = [*zipf_texts(1500, 0), "w1 " * 300, "Zürich ŁÓDŹ Straße w1 films of the ladies", "..."]
QUERIES = [*zipf_texts(200, 1), "w1 w1 w2", "zurich", "the film lady", "no such words"]


def terms_of(text):
    """The peers get the retriever's own terms, so that the scores are compared and not the splitting into words."""
    return [index_term(word).decode() for word in split_words(text) if word not in STOP_WORDS]


@pytest.fixture
def build(tmp_path):
    def build(kind, **settings):
        path = tmp_path / "passages.jsonl"
        rows = [{"id": f"{number:05d}", "contents": text} for number, text in enumerate(TEXTS)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        retriever.build(path, tmp_path / "index", kind, quiet=True, **settings)
        return retriever.load(tmp_path / "index")

    return build


def all_scores(index, query):
    """Scores of all passages, 0 where a passage is no hit."""
    scores = np.zeros(len(index))
    docs, found = index.top([query], len(index))[0]
    scores[docs] = found
    return scores


def test_tfidf_scores_are_scikit_learns(build):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    index = build("tfidf")
    vectorizer = text.TfidfVectorizer(analyzer=terms_of, sublinear_tf=True)
    vectors = vectorizer.fit_transform(TEXTS)
    expected = (vectorizer.transform(QUERIES) @ vectors.T).toarray()
    for query, row in zip(QUERIES, expected, strict=True):
        np.testing.assert_allclose(all_scores(index, query), row, atol=1e-5)


@pytest.mark.parametrize("k1, b", [(1.5, 0.75), (0.9, 0.4), (1.2, 0.0), (2.0, 1.0)])
def test_bm25_scores_are_those_of_bm25s(build, k1, b):
    bm25s = pytest.importorskip("bm25s")
    index = build("bm25", k1=k1, b=b)
    peer = bm25s.BM25(method="lucene", k1=k1, b=b)
    peer.index([terms_of(text) for text in TEXTS], show_progress=False)
    for query in QUERIES:
        known = [word for word in terms_of(query) if word in peer.vocab_dict]
        expected = peer.get_scores(known) if known else np.zeros(len(TEXTS))
        np.testing.assert_allclose(all_scores(index, query), expected, rtol=1e-5, atol=1e-5)


def test_bm25_ranks_as_rank_bm25_does(build):
    """rank_bm25 has another idf; in a query of one word idf is a common factor, so the scores are proportional."""
    rank_bm25 = pytest.importorskip("rank_bm25")
    index = build("bm25", k1=1.5, b=0.75)
    peer = rank_bm25.BM25Okapi([terms_of(text) or [""] for text in TEXTS], k1=1.5, b=0.75)
    peer.avgdl = np.mean([len(terms_of(text)) for text in TEXTS])  # without the "" of the empty passage
    for word in ("w20", "w300", "w999", "strasse"):
        expected, mine = np.array(peer.get_scores([word])), all_scores(index, word)
        np.testing.assert_allclose(mine / mine.max(), expected / expected.max(), rtol=1e-5, atol=1e-7)


@pytest.fixture
def vectors():
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((5000, 48)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, vectors[::50] + generator.standard_normal((100, 48)).astype(np.float32) * 0.1


def test_dense_search_equals_faiss(vectors):
    faiss, torch = pytest.importorskip("faiss"), pytest.importorskip("torch")
    vectors, queries = vectors
    peer = faiss.IndexFlatIP(48)
    peer.add(vectors)
    scores, docs = peer.search(queries, 10)
    found = retriever.search_vectors(torch.from_numpy(vectors), torch.from_numpy(queries), 10, np.arange(5000))
    for expected_docs, expected_scores, (mine, mine_scores) in zip(docs, scores, found, strict=True):
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
        opened = retriever.open_flat_index(tmp_path / name)
        assert isinstance(opened, np.memmap) and np.array_equal(opened, vectors)
    for other in (faiss.IndexFlatL2(48), faiss.index_factory(48, "HNSW8")):
        other.add(vectors[:100])
        faiss.write_index(other, str(tmp_path / "other"))
        with pytest.raises(retriever.InputError, match="not a complete FAISS flat inner-product index"):
            retriever.open_flat_index(tmp_path / "other")
