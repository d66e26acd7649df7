"""Passages: reading their file; the words of a text in any script; the inverted index of a list of passages.

A passage is a JSON line {"id": "...", "contents": "\\"Title\\"\\ntext"}. A word is a maximal run of letters and digits,
case-folded, without accents, as UTF-8 bytes. A term is what a word is indexed as: its singular.
"""

import functools
import itertools
import json
import re
import unicodedata
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from common import InputError
from common.client import UNREADABLE


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
    """Returns (id, contents) of a line of a passages file, in bytes. Raises one of UNREADABLE if it is no passage."""
    row = json.loads(line.decode())
    # Halves of surrogate pairs, which JSON can express and UTF-8 cannot, become question marks.
    id, contents = (row[name].encode("utf-8", "replace").decode() for name in ("id", "contents"))
    if len(id) > 256:
        raise ValueError("an id of more than 256 characters")  # ids are kept in an array of fixed width
    return id, contents


def read_chunk(path, start, end):
    """Returns (offsets, ids, contents) of the passages whose lines begin in [start, end) of a file, in bytes.

    Raises InputError with file and line for a line that is not a passage.
    """
    rows = []
    with open(path, "rb") as file:
        if start:  # the line that contains byte start - 1 belongs to the previous chunk
            file.seek(start - 1)
            start += len(file.readline()) - 1
        while start < end and (line := file.readline(1 << 24)):  # a longer line is cut, and then it is not JSON
            if line.strip():
                try:
                    id, text = parse_passage(line)
                    rows.append((start, id.encode(), text))
                except UNREADABLE as error:
                    file.seek(0)
                    lines = sum(file.read(min(1 << 20, start - at)).count(b"\n") for at in range(0, start, 1 << 20))
                    raise InputError(f'{path}:{lines + 1}: not a passage {{"id", "contents"}}: {error!r:.99}') from None
            start += len(line)
    return [[row[column] for row in rows] for column in range(3)]


TERM = np.dtype("S32")  # longer words are the same if they begin with the same 32 bytes
# These words are left out of a query, unless it has no others ("The Who"). They do not add to a passage's length.
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
    """Returns a non-ASCII character in compatibility form, case-folded, without accents; a space for no letter."""
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
    return text.encode().translate(SPLIT).split()


def index_term(word):
    """Returns the term of a word: its singular, by the S stemmer (Harman, "How effective is suffixing?", 1991)."""
    if word in STOP_WORDS or len(word) < 4 or not word.endswith(b"s") or word.endswith((b"us", b"ss")):
        return word
    if word.endswith(b"ies") and not word.endswith((b"eies", b"aies")):
        return word[:-3] + b"y"
    return word[:-1]


def query_terms(query):
    """Returns the terms of a query. Stop words are left out unless there are no other words."""
    words = split_words(query)
    return [index_term(word)[: TERM.itemsize] for word in words if word not in STOP_WORDS] or words


POSTING = np.dtype([("doc", np.uint32), ("value", np.float32)])  # value: how often the passage has the term


def invert(passages):
    """Returns the inverted index of passages, as NumPy arrays.

    terms [terms]: sorted; counts [terms]: in how many passages each occurs; postings [sum of counts]: POSTINGs of the
    first term, the second, ..., each in the order of the passages; lengths [passages]: in words, without stop words.
    """
    numbers = defaultdict(itertools.count().__next__)  # of the distinct words
    words, sizes = [], []
    for contents in passages:
        title = split_words(split_title(contents)[0])
        names = [word for word in title if word in STOP_WORDS] * 10  # so that "The Who" finds the passage of this name
        found = split_words(contents) + title + names  # twice the title: the best recall on HotpotQA
        words += map(numbers.__getitem__, found)
        sizes.append(len(found))
    terms, places = np.unique(np.array(list(map(index_term, numbers)), TERM), return_inverse=True)
    # One integer per word: the place of its term in the upper half, the number of its passage in the lower half.
    docs = np.repeat(np.arange(len(sizes)), sizes)
    keys, tfs = np.unique(places[np.array(words, np.intp)] << 32 | docs, return_counts=True)
    postings = np.rec.fromarrays([keys & 0xFFFFFFFF, tfs], POSTING)
    counts = np.bincount(keys >> 32, minlength=len(terms)).astype(np.uint32)
    counted = np.repeat(~np.isin(terms, list(STOP_WORDS)), counts)  # [postings]
    lengths = np.bincount(postings["doc"][counted], tfs[counted], len(sizes))
    return {"terms": terms, "counts": counts, "postings": postings, "lengths": lengths}
