"""Words of a text: one plain definition, and a fast splitter of whole blocks that finds the same words.

A word is a run of letters and digits of any script, case-folded and without accents. The fast splitter
works on bytes in NumPy and numbers the words with a hash table that compares whole words.
Imported by sparse.py; not run by itself.
"""

import functools
import re
import unicodedata

import numpy as np

WORD = 32  # bytes; a longer run of letters is cut into words of this length, so that none is lost or merged
BLOCK = 1 << 20  # characters that are split at once: few enough for the processor's cache

# One table does case and splitting for ASCII; bytes from 128 up are parts of letters once `fold` has seen them.
SPLIT = bytes(byte if byte >= 128 else ord(chr(byte).lower()) if chr(byte).isalnum() else 32 for byte in range(256))
NON_ASCII = re.compile(r"[^\x00-\x7f]")
STOP_WORDS = frozenset(
    b"a an and are as at be been but by did do does for from had has have he her him his how in into is it its of on "
    b"or s she that the their them there these they this those to was were what when where which who whom whose why "
    b"will with".split()
)


@functools.lru_cache(1 << 16)
def fold_character(character):
    """A non-ASCII character: compatibility form, case-folded, without accents; a space for what is no letter."""
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
    kept = "".join(
        c if c.isalnum() or unicodedata.category(c) == "Mc" else "" if unicodedata.category(c) == "Mn" else " "
        for c in folded
    )
    # Chinese and Japanese put no spaces between words: there each character is a word.
    apart = unicodedata.name(character, "").startswith(("CJK", "HIRAGANA", "KATAKANA"))
    return f" {kept} " if apart else kept


def fold(text):
    """Text as UTF-8 in which every byte from 128 up belongs to a letter."""
    return NON_ASCII.sub(lambda match: fold_character(match[0]), text).encode()


def split_words(text):
    """The words of a text, in order, as bytes. The build splits blocks of text faster, into the same words."""
    words = fold(text).translate(SPLIT).split()
    return [word[start : start + WORD] for word in words for start in range(0, len(word), WORD)]


def stem_word(word):
    """Plural to singular: the S stemmer of Harman, "How effective is suffixing?" (JASIS 1991)."""
    if len(word) < 4 or not word.endswith(b"s") or word.endswith((b"us", b"ss")):
        return word
    if word.endswith(b"ies") and not word.endswith((b"eies", b"aies")):
        return word[:-3] + b"y"
    return word[:-1]


def index_term(word, settings):
    """What a word is indexed as; b"" when it is not indexed."""
    if settings["stop_words"] and word in STOP_WORDS:
        return b""
    return stem_word(word) if settings["stem"] else word


# The fast splitter


class WordTable:
    """Numbers for words: a hash table with open addressing in NumPy.

    A key is a word's own bytes, in `columns` integers of 8 bytes. Keys are compared whole: the hash
    only says where to look first, so it cannot merge two words.
    """

    def __init__(self, columns, bits=16):
        self.count = 0
        self.columns = columns
        self._allocate(bits)

    def _allocate(self, bits):
        self.bits = bits
        self.keys = np.zeros((self.columns, 1 << bits), np.uint64)
        self.numbers = np.full(1 << bits, -1, np.int32)
        self.claims = np.zeros(1 << bits, np.int64)

    def _slots(self, keys):
        mixed = keys[0] * np.uint64(0x9E3779B97F4A7C15)
        for key in keys[1:]:
            mixed = (mixed ^ (mixed >> np.uint64(29)) ^ key) * np.uint64(0x9E3779B97F4A7C15)
        return (mixed >> np.uint64(64 - self.bits)).astype(np.int64)

    def number(self, keys):
        """Number every key [columns, n]; a new word gets the next number."""
        slots = self._slots(keys)
        numbers = self.numbers[slots]
        pending = np.flatnonzero(self._differ(slots, keys) | (numbers < 0))
        while pending.size:
            slot = slots[pending]
            free = self.numbers[slot] < 0
            new = pending[free]
            self.claims[slots[new]] = new  # where several words want one slot, the last to claim it has it
            new = new[self.claims[slots[new]] == new]
            self.keys[:, slots[new]] = keys[:, new]
            self.numbers[slots[new]] = np.arange(self.count, self.count + len(new), dtype=np.int32)
            self.count += len(new)
            found = ~self._differ(slot, keys[:, pending])
            numbers[pending[found]] = self.numbers[slot[found]]
            pending = pending[~found]
            if 2 * self.count > len(self.numbers):
                self._grow()
                slots[pending] = self._slots(keys[:, pending])
            else:
                slots[pending] = (slots[pending] + 1) & (len(self.numbers) - 1)
        return numbers

    def _differ(self, slots, keys):
        differ = self.keys[0][slots] != keys[0]
        for column, key in zip(self.keys[1:], keys[1:], strict=True):
            differ |= column[slots] != key
        return differ

    def _grow(self):
        words, count = self.words(), self.count
        self._allocate(self.bits + 1)
        self.count = 0
        renumbered = self.number(words)  # entered all at once they get other numbers; these are put back
        back = np.empty(count, np.int32)
        back[renumbered] = np.arange(count, dtype=np.int32)
        used = self.numbers >= 0
        self.numbers[used] = back[self.numbers[used]]

    def words(self):
        """All words' keys [columns, count], by number."""
        used = np.flatnonzero(self.numbers >= 0)
        return self.keys[:, used[np.argsort(self.numbers[used])]]


MASKS = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # keeps the first n bytes of 8


def word_spans(block):
    """Starts and lengths of the words in a block of bytes that begins and ends with spaces."""
    letters = np.frombuffer(block, np.uint8) != 32
    edges = np.flatnonzero(letters[1:] != letters[:-1]) + 1
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    if lengths.size and lengths.max() > WORD:
        pieces = (lengths + WORD - 1) // WORD
        within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = np.repeat(starts, pieces) + WORD * within
        lengths = np.minimum(np.repeat(lengths, pieces) - WORD * within, WORD)
    return starts, lengths


def number_block(texts, tables):
    """Number the words of texts: (word numbers, index into texts), both [words]. tables: short and long words."""
    folded = [text.encode() if text.isascii() else fold(text) for text in texts]
    block = (b" " + b" ".join(folded) + b" " * (WORD + 8)).translate(SPLIT)
    starts, lengths = word_spans(block)
    eights = np.ndarray(len(block) - 7, "<u8", buffer=block, strides=(1,))  # the 8 bytes from every position on
    numbers = np.empty(len(starts), np.uint32)
    is_long = lengths > 8
    for table, chosen in ((tables[0], np.flatnonzero(~is_long)), (tables[1], np.flatnonzero(is_long))):
        start, length = starts[chosen], lengths[chosen]
        keys = np.empty((table.columns, len(chosen)), np.uint64)
        for column in range(table.columns):
            keys[column] = eights[start + 8 * column] & MASKS[np.clip(length - 8 * column, 0, 8)]
        numbers[chosen] = 2 * table.number(keys) + (table is tables[1])
    ends = np.cumsum([len(text) + 1 for text in folded])
    words_in = np.diff(np.searchsorted(starts, ends), prepend=0)
    return numbers, np.repeat(np.arange(len(texts), dtype=np.uint32), words_in)


def blocks(texts):
    """Cut a list of texts into (first, last) of about BLOCK characters."""
    first, size = 0, 0
    for last, text in enumerate(texts, 1):
        size += len(text)
        if size >= BLOCK or last == len(texts):
            yield first, last
            first, size = last, 0
