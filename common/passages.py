"""Passages: reading their file; the words of a text in any script; the inverted index of a list of texts.

A word is a maximal run of letters and digits, case-folded, without accents, as UTF-8 bytes. A term is what a word is
indexed as: its singular, or nothing for a stop word. Imported by retriever.py.
"""

import functools
import json
import re
import unicodedata
from array import array

import numpy as np

from common import InputError


def read_passages(path, start, end):
    """Returns (offsets, ids, contents) of the passages whose lines begin in [start, end) of a file, in bytes.

    Raises InputError with file and line for a line that is not a passage.
    """
    offsets, ids, contents = [], [], []
    with open(path, "rb") as file:
        if start:  # the line that contains byte start - 1 belongs to the previous chunk
            file.seek(start - 1)
            start += len(file.readline()) - 1
        for line in file:
            if start >= end:
                break
            try:
                if line.strip():
                    row = json.loads(line.decode())
                    ids.append(row["id"].encode("utf-8", "surrogatepass"))
                    contents.append("" + row["contents"])  # raises TypeError unless it is text
                    offsets.append(start)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                file.seek(0)
                where = f"{path}:{file.read(start).count(10) + 1}"
                reason = f" ({error})" if isinstance(error, ValueError) else ""
                raise InputError(f'{where}: not a passage {{"id": "text", "contents": "text"}}{reason}') from None
            start += len(line)
    return offsets, ids, contents


WORD_BYTES = 32  # longer words are cut into pieces of this length, so that the vocabulary is an array of fixed width
STOP_WORDS = frozenset(
    b"a an and are as at be been but by did do does for from had has have he her him his how in into is it its of on "
    b"or s she that the their them there these they this those to was were what when where which who whom whose why "
    b"will with".split()
)
# ASCII letters become lower case, other ASCII characters spaces. Bytes from 128 on are kept: `fold` has replaced
# every non-ASCII character that is not a letter or digit.
SPLIT = bytes(byte if byte >= 128 else ord(chr(byte).lower()) if chr(byte).isalnum() else 32 for byte in range(256))
NON_ASCII = re.compile(r"[^\x00-\x7f]")


@functools.lru_cache(1 << 16)
def fold(character):
    """A non-ASCII character in compatibility form, case-folded, without accents; a space if it is not a letter."""
    category, normalize = unicodedata.category, unicodedata.normalize
    folded = [c for c in normalize("NFKD", normalize("NFKD", character).casefold()) if category(c) != "Mn"]
    kept = "".join(c if c.isalnum() or category(c) == "Mc" else " " for c in folded)
    # Chinese and Japanese are written without spaces: each of their characters is a word.
    return f" {kept} " if unicodedata.name(character, "").startswith(("CJK", "HIRAGANA", "KATAKANA")) else kept


def split_words(text):
    """Returns the words of a text, in order, as bytes."""
    if not text.isascii():
        text = NON_ASCII.sub(lambda match: fold(match[0]), text)
    words = text.encode().translate(SPLIT).split()
    if words and max(map(len, words)) > WORD_BYTES:
        words = [word[i : i + WORD_BYTES] for word in words for i in range(0, len(word), WORD_BYTES)]
    return words


def index_term(word):
    """Returns the term that a word is indexed as: its singular, or b"" for a stop word, which is not indexed.

    The S stemmer of Harman, "How effective is suffixing?" (JASIS 1991).
    """
    if word in STOP_WORDS:
        return b""
    if len(word) < 4 or not word.endswith(b"s") or word.endswith((b"us", b"ss")):
        return word
    if word.endswith(b"ies") and not word.endswith((b"eies", b"aies")):
        return word[:-3] + b"y"
    return word[:-1]


class TermNumbers(dict):
    """word -> number of its term, 0 for a stop word. Each distinct word is looked at once."""

    def __init__(self):
        self.terms = {b"": 0}

    def __missing__(self, word):
        number = self[word] = self.terms.setdefault(index_term(word), len(self.terms))
        return number


POSTING = np.dtype([("doc", np.uint32), ("tf", np.uint32)])  # a text's number; how often it has the term


def invert(texts):
    """Returns the inverted index of texts, as NumPy arrays.

    terms [terms]: in the order of their bytes; counts [terms]: in how many texts each term occurs; postings [sum of
    counts]: POSTINGs of the first term, the second, ..., each in the order of the texts; lengths [texts]: the number of
    words of each text, without stop words.
    """
    numbers, words, sizes = TermNumbers(), array("I"), []
    for text in texts:
        found = split_words(text)
        words.extend(map(numbers.__getitem__, found))
        sizes.append(len(found))
    terms = np.array(list(numbers.terms), f"S{WORD_BYTES}")
    order = np.argsort(terms)  # the first is b""
    place = np.empty(len(terms), np.uint64)
    place[order] = np.arange(len(terms), dtype=np.uint64)
    # One integer per word: the place of its term in the upper half, the number of its text in the lower half.
    docs = np.repeat(np.arange(len(texts), dtype=np.uint64), sizes)
    keys = place[np.frombuffer(words, np.uint32)] << np.uint64(32) | docs
    keys, tfs = np.unique(keys[keys >= 1 << 32], return_counts=True)
    postings = np.empty(len(keys), POSTING)
    postings["doc"], postings["tf"] = keys & np.uint64(0xFFFFFFFF), tfs
    counts = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(terms))[1:].astype(np.uint32)
    lengths = np.bincount(postings["doc"], tfs, len(texts))
    return {"terms": terms[order][1:], "counts": counts, "postings": postings, "lengths": lengths}
