"""The dense index: passages as vectors of a Hugging Face encoder, searched exactly.

Vectors are memory-mapped and multiplied block by block: in torch on a GPU that has room for them, else in NumPy,
for many queries after a screen in bfloat16 where the processor is quick at that. The candidates' scores are then
computed again in float64, one by one, so that neither the device nor the batch nor the place of a passage changes
a result. A FAISS flat index file is opened as it is.
Imported by retriever.py; not run by itself.
"""

import functools
import os
import struct
import threading
import timeit
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from common import InputError
from passages import read_chunk, save_run

CHUNK = 1 << 20  # bytes of the passages file that are embedded between two saves
BLOCK = 2048  # vectors that are multiplied at once on the CPU: they or their scores stay in its cache
DOT_PRODUCTS = 8  # queries, up to which plain dot products are faster than a matrix product
GPU_BLOCK = 1 << 18
BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}  # of a batch, padding included
SLACK = 1e-5  # of float32 products, for vectors of length 1: well above their error, d x 6e-8 at worst


class Encoder:
    """A Hugging Face encoder: texts in, unit vectors out."""

    def __init__(self, settings):
        import torch  # only those who embed pay for these imports
        import transformers

        self.torch, self.settings = torch, settings
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        name = settings["encoder"]
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            self.model = transformers.AutoModel.from_pretrained(name, dtype=torch.float32).eval().to(self.device)
        except (OSError, ValueError) as error:
            raise InputError(f"{name}: no encoder could be loaded from there: {str(error).splitlines()[0]}") from None
        self.max_length = min(settings["max_length"], self.model.config.max_position_embeddings)

    def encode(self, texts, prefix):
        """Vectors [texts, dimensions] in float32. Texts of like length share a batch, so that little is padding."""
        ids = self.tokenizer([prefix + text for text in texts], truncation=True, max_length=self.max_length)[
            "input_ids"
        ]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        vectors = np.empty((len(ids), self.model.config.hidden_size), np.float32)
        while order:
            count = max(1, BATCH_TOKENS[self.device] // len(ids[order[-1]]))  # the longest go first
            batch, order = order[-count:], order[:-count]
            tokens = self.torch.full((len(batch), max(len(ids[i]) for i in batch)), self.tokenizer.pad_token_id or 0)
            mask = self.torch.zeros_like(tokens)
            for row, i in enumerate(batch):
                tokens[row, : len(ids[i])] = self.torch.tensor(ids[i])
                mask[row, : len(ids[i])] = 1
            vectors[batch] = self._pool(tokens.to(self.device), mask.to(self.device)).cpu().numpy()
        return vectors

    def _pool(self, tokens, mask):
        """Unit vectors [texts, dimensions] of token ids and their mask [texts, tokens]."""
        with self.torch.inference_mode():
            hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state  # [texts, tokens, dimensions]
            if self.settings["pooling"] == "cls":
                pooled = hidden[:, 0]
            else:
                pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            return self.torch.nn.functional.normalize(pooled, dim=-1)


def build_runs(path, folder, settings, workers, bar):
    """Embed a passages file, chunk by chunk; runs already there are kept. A ready-made index needs no embedding."""
    size = os.stat(path).st_size
    encoder = None
    runs = []
    bar.total = size
    for start in range(0, size, CHUNK):
        runs.append(folder / f"run-{start // CHUNK:06d}")
        if not runs[-1].exists():
            offsets, ids, texts = read_chunk(path, start, start + CHUNK)
            columns = {"offsets": np.array(offsets, np.uint64), "ids": np.array(ids or [], "S")}
            if not settings["vectors"]:
                encoder = encoder or Encoder(settings)
                columns["vectors"] = encoder.encode(texts, settings["passage_prefix"]).astype(settings["dtype"])
            save_run(runs[-1], columns)
        bar.update(min(CHUNK, size - start))
    return runs


def merge(folders, data, settings, bar):
    """Join the vectors of runs (or of an index and runs) in the folder `data`."""
    count = len(np.load(data / "rank.npy", mmap_mode="r"))
    if settings["vectors"]:
        vectors = open_flat_index(settings["vectors"])
        if len(vectors) != count:
            raise InputError(
                f"{settings['vectors']}: {len(vectors):,} vectors for {count:,} passages; one each is wanted"
            )
        return
    parts = [np.load(folder / "vectors.npy", mmap_mode="r") for folder in folders]
    joined = np.lib.format.open_memmap(data / "vectors.npy", "w+", settings["dtype"], (count, parts[0].shape[1]))
    bar.total, start = count, 0
    for part in parts:
        joined[start : start + len(part)] = part
        start += len(part)
        bar.update(len(part))
    joined.flush()


def open_flat_index(path):
    """The vectors of a FAISS flat inner-product index file, mapped: [vectors, dimensions] in float32.

    The format (faiss/impl/index_write.cpp): "IxFI"; int32 dimensions; int64 vectors; two int64 unused;
    uint8 trained; int32 metric, 0 for the inner product; uint64 number of floats; the floats. Little-endian.
    """
    header = struct.Struct("<4siqqqBiQ")
    try:
        with open(path, "rb") as file:
            start = file.read(header.size)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if len(start) < header.size or start[:4] != b"IxFI":
        raise InputError(f"{path}: not a FAISS flat inner-product index (it starts with {start[:4]!r}, not b'IxFI')")
    _, dimensions, count, _, _, _, metric, floats = header.unpack(start)
    if metric != 0 or floats != dimensions * count or os.stat(path).st_size < header.size + 4 * floats:
        raise InputError(f"{path}: a damaged FAISS index: {count} x {dimensions} vectors, but {floats} numbers")
    return np.memmap(path, np.dtype("<f4"), "r", header.size, (count, dimensions))


class DenseIndex:
    """The vectors of an index, mapped into memory. Threads may share it."""

    def __init__(self, data, settings):
        self.settings = settings
        own = not settings["vectors"]
        self.vectors = np.load(data / "vectors.npy", mmap_mode="r") if own else open_flat_index(settings["vectors"])
        self.rank = np.load(data / "rank.npy", mmap_mode="r")
        self.lock = threading.Lock()  # one batch at a time: each uses the whole machine

    @functools.cached_property
    def encoder(self):
        return Encoder(self.settings)

    @functools.cached_property
    def products(self):
        import torch

        if torch.cuda.is_available() and self.vectors.nbytes < 0.8 * torch.cuda.mem_get_info()[0]:
            return GpuProducts(self.vectors, "cuda")
        return CpuProducts(self.vectors)

    def top(self, queries, k):
        """[(passage numbers, scores)] of the k best passages for each query."""
        if not queries:
            return []
        with self.lock:
            vectors = self.encoder.encode(queries, self.settings["query_prefix"])
            mine, theirs = self.vectors.shape[1], vectors.shape[1]
            if mine != theirs:
                raise InputError(
                    f"{self.settings['encoder']}: vectors of {theirs} dimensions, but the index has {mine}"
                )
            return search_vectors(self.products, self.vectors, vectors, k, self.rank)


class CpuProducts:
    """Inner products of queries and blocks of vectors, on the CPU."""

    def __init__(self, vectors):
        self.vectors = np.asarray(vectors)  # a plain view of the mapped file: its slices cost less
        cores = len(os.sched_getaffinity(0))
        self.map = ThreadPoolExecutor(cores).map if cores > 1 else map
        self.lengths = {}  # of each block's longest vector

    def block(self, queries):
        return max(BLOCK, BLOCK * 32 // len(queries))

    def above(self, queries, start, stop, floors, k):
        """(query numbers, vector numbers, products) where the product is at least the query's floor.

        Where there is no floor yet (-inf), the block's own k-th greatest product makes one.
        """
        vectors = self.vectors[start:stop]
        if np.isneginf(floors[0]):
            products = self._products(queries, vectors)
            if k < stop - start:
                floors = np.partition(products[: max(BLOCK, k)], -k, axis=0)[-k] - SLACK
        elif len(queries) > DOT_PRODUCTS and self.bfloat16_pays:
            vector, query = self._screen(queries, vectors, start, floors)
            products = np.vecdot(vectors[vector].astype(np.float32, copy=False), queries[query])
            keep = products >= floors[query]
            return query[keep], vector[keep] + start, products[keep]
        else:
            products = self._products(queries, vectors)
        vector, query = np.divmod(np.flatnonzero(products >= floors), len(queries))
        return query, vector + start, products[vector, query]

    def _products(self, queries, vectors):
        """[vectors, queries]. A matrix product pays from some queries on; below, it reads memory at half the speed
        of plain dot products (measured with OpenBLAS), which have no threads of their own."""
        vectors = np.require(vectors, np.float32, "A")
        if len(queries) > DOT_PRODUCTS:
            return vectors @ queries.T
        pieces = [vectors[start : start + 4 * BLOCK] for start in range(0, len(vectors), 4 * BLOCK)]
        return np.concatenate([*self.map(lambda piece: np.vecdot(piece, queries[:, None]), pieces)], axis=1).T

    def _screen(self, queries, vectors, start, floors):
        """(vector numbers, query numbers) of all products that reach their floors, and of some more.

        Products of numbers rounded to bfloat16 tell: with q' and v' for what is rounded, and no number rounded by
        more than 2^-8 of itself, q.v - q'.v' = (q - q').v + q'.(v - v') <= (|q - q'| + 2^-8 |q'|) |v|. The product
        is rounded too; so is what it is compared with, and rounding keeps the order.
        """
        if (start, len(vectors)) not in self.lengths:
            numbers = np.require(vectors, np.float32, "A")
            self.lengths[start, len(vectors)] = np.sqrt(np.vecdot(numbers, numbers).max())
        rounded = _bfloat16(queries)
        lost = np.linalg.norm(queries - rounded.float().numpy(), axis=1)
        error = (lost + 2**-8 * rounded.float().norm(dim=1).numpy()) * self.lengths[start, len(vectors)]
        products = _bfloat16(vectors) @ rounded.T
        return np.divmod(np.flatnonzero((products >= _bfloat16(floors - error - SLACK)).numpy()), len(queries))

    @functools.cached_property
    def bfloat16_pays(self):
        """Whether this processor multiplies bfloat16 faster than float32, rounding included: tried on one block."""
        vectors = self.vectors[:BLOCK]
        queries = np.ones((64, vectors.shape[1]), np.float32)
        ways = (lambda: _bfloat16(vectors) @ _bfloat16(queries).T), (lambda: self._products(queries, vectors))
        bfloat16, float32 = (min(timeit.repeat(way, number=1, repeat=7)) for way in ways)
        return bfloat16 < float32


def _bfloat16(numbers):
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mapped file is read-only, and is not written
        return torch.from_numpy(numbers).bfloat16()


class GpuProducts:
    """The same in torch, with the vectors on a device."""

    def __init__(self, vectors, device):
        import torch

        self.torch, self.device = torch, device
        self.vectors = torch.empty(vectors.shape, dtype=getattr(torch, vectors.dtype.name), device=device)
        for start in range(0, len(vectors), GPU_BLOCK):
            self.vectors[start : start + GPU_BLOCK] = torch.from_numpy(vectors[start : start + GPU_BLOCK].copy())

    def block(self, queries):
        return GPU_BLOCK

    def above(self, queries, start, stop, floors, k):
        torch = self.torch
        products = torch.from_numpy(queries).to(self.device) @ self.vectors[start:stop].float().T  # [queries, block]
        floors = torch.from_numpy(floors).to(self.device)
        if k < stop - start:
            floors = torch.maximum(floors, products.topk(k).values[:, -1] - SLACK)
        query, vector = torch.nonzero(products >= floors[:, None], as_tuple=True)
        return query.cpu().numpy(), vector.cpu().numpy() + start, products[query, vector].cpu().numpy()


def search_vectors(products, vectors, queries, k, rank):
    """[(vector numbers, inner products)] of the k greatest for each query, ties in the order of rank.

    vectors: [vectors, dimensions]; queries: [queries, dimensions] in float32; rank: [vectors].
    """
    floors = np.full(len(queries), -np.inf, np.float32)  # lower bounds of each query's k-th greatest product
    found = [np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0, np.float32)]  # queries, vectors, products
    block = products.block(queries)
    for start in range(0, len(vectors), block):
        new = products.above(queries, start, min(start + block, len(vectors)), floors, k)
        if len(new[0]):
            found = [np.concatenate(pair) for pair in zip(found, new, strict=True)]
            order = np.lexsort((-found[2], found[0]))
            found = [column[order] for column in found]
            firsts = np.searchsorted(found[0], np.arange(len(queries) + 1))
            kth = firsts[:-1] + k - 1
            full = kth < firsts[1:]
            floors[full] = found[2][kth[full]] - SLACK
            keep = found[2] >= floors[found[0]]
            found = [column[keep] for column in found]
    tops = []
    for number, query in enumerate(queries):
        candidates = found[1][found[0] == number]
        exact = (vectors[candidates].astype(np.float64) * query.astype(np.float64)).sum(1)
        order = np.lexsort((rank[candidates], -exact))[:k]
        tops.append((candidates[order], exact[order].astype(np.float32)))
    return tops
