"""Passages on disk: JSON lines {"id": "...", "contents": "\\"Title\\"\\ntext"}, read in chunks and by number.

Imported by sparse.py, dense.py and retriever.py; not run by itself.
"""

import bisect
import gzip
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np

from common import InputError, parse_object


def read_chunk(path, start, end):
    """(offsets, ids, contents) of the passages whose lines start in [start, end) of a file."""
    offsets, ids, contents = [], [], []
    with open(path, "rb") as file:
        if start:  # the line that holds byte start - 1 is the previous chunk's
            file.seek(start - 1)
            start += len(file.readline()) - 1
        for line in file:
            if start >= end:
                break
            if line.strip():
                try:
                    row = json.loads(line.decode())
                    identity, text = row["id"], row["contents"]
                    if not (isinstance(identity, str) and isinstance(text, str)):
                        raise TypeError
                except (ValueError, KeyError, TypeError):
                    raise InputError(_what_is_wrong(line, f"{path}:{line_number(path, start)}")) from None
                offsets.append(start)
                ids.append(identity.encode("utf-8", "surrogatepass"))
                contents.append(text)
            start += len(line)
    return offsets, ids, contents


def line_number(path, offset):
    """Of the line that starts at an offset; counted only when there is an error to report."""
    with open(path, "rb") as file:
        return 1 + sum(1 for line in iter(file.readline, b"") if file.tell() <= offset)


def _what_is_wrong(line, where):
    try:
        parse_object(line.decode(), where)
    except UnicodeDecodeError as error:
        return f"{where}: not UTF-8: {error.reason} at byte {error.start + 1} of the line"
    except InputError as error:
        return str(error)
    return f'{where}: a passage is {{"id": "...", "contents": "..."}}, both of them text'


def save_run(folder, columns):
    """Write arrays {name: array} as .npy files into a folder that appears only when it is complete."""
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name, column in columns.items():
        np.save(aside / f"{name}.npy", column)
    os.replace(aside, folder)


def join_passages(parts, files, folder, data):
    """Write offsets, ids and the order of ids (which breaks ties between scores) of all passages of an index.

    parts: folders with offsets and ids, each with the number of its file in files. Offsets run on
    over the files as if these were one. Raises InputError where an id occurs twice.
    """
    starts = np.cumsum([0] + [file["bytes"] for file in files]).astype(np.uint64)
    columns = {"offsets": [np.empty(0, np.uint64)], "ids": [np.empty(0, "S1")]}
    for part, number in parts:
        offsets, ids = (np.load(part / f"{name}.npy") for name in columns)
        columns["offsets"].append(offsets[: len(ids)] + starts[number])  # a whole index has one more: the end
        columns["ids"].append(ids)
    offsets = np.concatenate([*columns["offsets"], starts[-1:]])
    ids = np.concatenate(columns["ids"])
    if not len(ids):
        raise InputError(f"{Path(os.path.normpath(folder / files[0]['path']))}: no passages in it")
    order = np.argsort(ids, kind="stable")
    same = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])
    if same.size:
        passages = Passages(folder, files, offsets)
        first, second = (passages.where(order[same[0] + i]) for i in (0, 1))
        raise InputError(
            f"{second}: the id {ids[order[same[0]]].decode()!r} is already used at {first}; ids must differ"
        )
    rank = np.empty(len(ids), np.uint32)
    rank[order] = np.arange(len(ids), dtype=np.uint32)
    for name, column in {"offsets": offsets, "ids": ids, "rank": rank}.items():
        np.save(data / f"{name}.npy", column)
    return len(ids)


def fingerprint(path):
    """Size and a hash of 256 pieces spread over a file (all of it when it is under 1 MiB): a change shows."""
    size = os.stat(path).st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for piece in range(256):
            file.seek(size * piece // 256)
            digest.update(file.read(4096))
    return {"bytes": size, "sha256": digest.hexdigest()}


def plain_file(path, folder):
    """The passages file itself or, since passages are read by offset, its unzipped copy in the index folder."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix != ".gz":
        return path
    copy = folder / f"passages-{fingerprint(path)['sha256'][:12]}.jsonl"
    if not copy.exists():
        aside = copy.with_suffix(".partial")
        try:
            with gzip.open(path) as source, open(aside, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{path}: not a whole gzip file: {error}") from None
        os.replace(aside, copy)
    return copy


class Passages:
    """The passages of an index, read from their files by number. Threads may share it.

    Raises InputError when a file is gone or is not what the index was built from.
    """

    def __init__(self, folder, files, offsets):
        self.offsets, self.files, self.paths, self.starts = offsets, [], [], []
        start = 0
        for file in files:
            path = Path(os.path.normpath(folder / file["path"]))
            if not path.is_file():
                raise InputError(f"{path}: the passages of {folder} are gone; put them back or build the index again")
            if fingerprint(path) != {"bytes": file["bytes"], "sha256": file["sha256"]}:
                raise InputError(f"{path}: changed since {folder} was built from it; build the index again")
            self.files.append(open(path, "rb"))
            self.paths.append(path)
            self.starts.append(start)
            start += file["bytes"]

    def _place(self, number):
        start = int(self.offsets[number])
        which = bisect.bisect_right(self.starts, start) - 1
        return which, start - self.starts[which], int(self.offsets[number + 1]) - start

    def __getitem__(self, number):
        """(id, contents) of one passage."""
        which, start, length = self._place(number)
        line = os.pread(self.files[which].fileno(), length, start).split(b"\n", 1)[0]  # blank lines may follow it
        try:
            row = json.loads(line)
            return row["id"], row["contents"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.paths[which]}: changed since the index was built; build it again") from None

    def where(self, number):
        which, start, _ = self._place(number)
        return f"{self.paths[which]}:{line_number(self.paths[which], start)}"
