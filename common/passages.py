"""Passages: reading their file; the words of a text in any script; the inverted index of a list of passages.

A passage is a JSON line {"id": "...", "contents": "\\"Title\\"\\ntext"}. A word is a maximal run of letters and digits,
case-folded, without accents, as UTF-8 bytes. A term is what a word is indexed as: its singular.
"""

import functools
import json
import re
import unicodedata
from array import array
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from common import InputError

LINE_BYTES = 1 << 24  # a longer line is refused: such a file is no JSON lines
ID_LENGTH = 256  # ids are kept in an array of fixed width


def valid_text(text):
    """Returns the text with "?" for halves of surrogate pairs, which JSON can express and UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class Hit(NamedTuple):
    """A passage that a search found. title: its first line without quotation marks, "" if there is only one line."""

    id: str
    score: float
    contents: str

    title = property(lambda self: split_title(self.contents)[0])
    text = property(lambda self: split_title(self.contents)[1])


def split_title(contents):
    title, newline, text = contents.partition("\n")
    return (title.strip().strip('"'), text) if newline else ("", contents)


def parse_passage(line):
    """Returns (id, contents) of a line of a passages file, in bytes. Raises ValueError if it is not a passage."""
    if len(line) > LINE_BYTES:
        raise ValueError(f"longer than {LINE_BYTES >> 20} MiB")
    try:
        row = json.loads(line.decode())
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("id", "contents")):
        raise ValueError('not {"id": "text", "contents": "text"}')
    if len(row["id"]) > ID_LENGTH:
        raise ValueError(f"an id of more than {ID_LENGTH} characters")
    return valid_text(row["id"]), valid_text(row["contents"])


def read_passages(path, start, end):
    """Returns (offsets, ids, contents) of the passages whose lines begin in [start, end) of a file, in bytes.

    Raises InputError with file and line for a line that is not a passage.
    """
    offsets, ids, contents = [], [], []
    with open(path, "rb") as file:
        if start:  # the line that contains byte start - 1 belongs to the previous chunk
            file.seek(start - 1)
            start += len(file.readline()) - 1
        while start < end and (line := file.readline(LINE_BYTES + 1)):
            if line.strip():
                try:
                    id, text = parse_passage(line)
                except ValueError as error:
                    raise InputError(f"{path}:{line_number(path, start)}: not a passage: {error}") from None
                offsets.append(start)
                ids.append(id.encode())
                contents.append(text)
            start += len(line)
    return offsets, ids, contents


def line_number(path, position):
    """Returns the number of the line that begins at a position in bytes."""
    with open(path, "rb") as file:
        blocks = (file.read(min(1 << 20, position - start)) for start in range(0, position, 1 << 20))
        return 1 + sum(block.count(b"\n") for block in blocks)


WORD_BYTES = 32  # longer words are cut into pieces of this length, so that the vocabulary is an array of fixed width
# A query leaves these words out, unless it has no other: "The Who". They do not add to a passage's length.
STOP_WORDS = frozenset(
    b"a an and are as at be been but by did do does for from had has have he her him his how in into is it its of on "
    b"or s she that the their them there these they this those to was were what when where which who whom whose why "
    b"will with".split()
)
# ASCII letters become lower case, other ASCII characters spaces. Bytes from 128 on are kept: `fold` has replaced
# every non-ASCII character that is not a letter or digit.
SPLIT = bytes(byte if byte >= 128 else ord(chr(byte).lower()) if chr(byte).isalnum() else 32 for byte in range(256))
NON_ASCII = re.compile(r"[^\x00-\x7f]")
# Letters that Unicode does not decompose, by their names: "LATIN SMALL LETTER O WITH STROKE", "LATIN SMALL LETTER AE"
LATIN = re.compile(r"LATIN SMALL (?:LETTER|LIGATURE) (?:DOTLESS )?([A-Z]{1,2})(?: WITH .*)?")
OTHER_LATIN = {"ð": "d", "þ": "th", "ŋ": "ng", "ə": "e"}


@functools.lru_cache(1 << 16)
def fold(character):
    """A non-ASCII character in compatibility form, case-folded, without accents; a space if it is not a letter."""
    normalize, kept = unicodedata.normalize, []
    for part in normalize("NFKD", normalize("NFKD", character).casefold()):
        category, latin = unicodedata.category(part), LATIN.fullmatch(unicodedata.name(part, ""))
        if latin:
            kept.append(latin[1].lower())
        elif category != "Mn":
            kept.append(OTHER_LATIN.get(part, part) if part.isalnum() or category == "Mc" else " ")
    # Chinese and Japanese are written without spaces: each of their characters is a word.
    spaced = unicodedata.name(character, "").startswith(("CJK", "HIRAGANA", "KATAKANA"))
    return f" {''.join(kept)} " if spaced else "".join(kept)


def split_words(text):
    """Returns the words of a text, in order, as bytes."""
    if not text.isascii():
        text = NON_ASCII.sub(lambda match: fold(match[0]), text)
    words = text.encode().translate(SPLIT).split()
    if words and max(map(len, words)) > WORD_BYTES:
        words = [word[i : i + WORD_BYTES] for word in words for i in range(0, len(word), WORD_BYTES)]
    return words


def index_term(word):
    """Returns the term that a word is indexed as: its singular, by the S stemmer (Harman, "How effective is
    suffixing?", JASIS 1991)."""
    if word in STOP_WORDS or len(word) < 4 or not word.endswith(b"s") or word.endswith((b"us", b"ss")):
        return word
    if word.endswith(b"ies") and not word.endswith((b"eies", b"aies")):
        return word[:-3] + b"y"
    return word[:-1]


def query_terms(query):
    """Returns the terms of a query. Stop words are left out unless there are no other words."""
    words = split_words(query)
    return [index_term(word) for word in words if word not in STOP_WORDS] or list(map(index_term, words))


POSTING = np.dtype([("doc", np.uint32), ("tf", np.uint32)])  # a passage's number; how often it has the term
TITLE_WEIGHT = 2  # the words of a title count so many times (best recall on HotpotQA)
NAME_WEIGHT = 10  # so many times more, if they are stop words: in a title they are part of a name


def invert(passages):
    """Returns the inverted index of passages, as NumPy arrays.

    terms [terms]: in the order of their bytes; counts [terms]: in how many passages each term occurs; postings [sum of
    counts]: POSTINGs of the first term, the second, ..., each in the order of the passages; lengths [passages]: the
    number of words of each passage, without stop words.
    """
    numbers = defaultdict()  # of the distinct words, in the order in which they appear
    numbers.default_factory = numbers.__len__
    words, sizes = array("I"), []
    for contents in passages:
        title = split_words(split_title(contents)[0])
        names = [word for word in title if word in STOP_WORDS]
        found = split_words(contents) + title * (TITLE_WEIGHT - 1) + names * NAME_WEIGHT
        words.extend(map(numbers.__getitem__, found))
        sizes.append(len(found))
    terms, places = np.unique(np.array(list(map(index_term, numbers)), f"S{WORD_BYTES}"), return_inverse=True)
    # One integer per word: the place of its term in the upper half, the number of its passage in the lower half.
    docs = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
    keys = places.astype(np.uint64)[np.frombuffer(words, np.uint32)] << np.uint64(32) | docs
    keys, tfs = np.unique(keys, return_counts=True)
    postings = np.empty(len(keys), POSTING)
    postings["doc"] = keys & np.uint64(0xFFFFFFFF)
    postings["tf"] = tfs
    counts = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(terms)).astype(np.uint32)
    counted = np.repeat(~np.isin(terms, list(STOP_WORDS)), counts)  # [postings]
    lengths = np.bincount(postings["doc"][counted], tfs[counted], len(sizes))
    return {"terms": terms, "counts": counts, "postings": postings, "lengths": lengths}
