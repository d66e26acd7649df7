"""Where the paper's models, data and passages come from, and their download.

    python sources.py show                                              # what is pinned, and what is not yet
    python sources.py download benchmarks wiki-18 Qwen/Qwen2.5-0.5B-Instruct --to runs/paper

A download continues where it was cut off, and has its name only when its size and sha256 are right. It is done here
and not by huggingface_hub, because models, data sets and GitHub's files then obey one table of pins, a mirror needs
to serve no more than files, and all of it can be rehearsed offline (rehearsal.py).
"""

import dataclasses
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
import urllib.parse
from pathlib import Path

import requests
import urllib3

from client import BACKOFF, BACKOFF_MAX, ServerError
from common import (
    REQUIRED,
    InputError,
    option,
    parse_object,
    progress,
    replace_file,
    run_command_line,
    write_json,
)

HOSTS = {"hub": os.environ.get("HF_ENDPOINT", "https://huggingface.co"), "github": "https://raw.githubusercontent.com"}
FORMS = {  # the address of a file below its host
    "github": "github {repository}/{revision}/{path}",
    "models": "hub {repository}/resolve/{revision}/{path}",
    "datasets": "hub datasets/{repository}/resolve/{revision}/{path}",
}


@dataclasses.dataclass
class Source:
    """One repository, and what of it is wanted.

    revision: a commit; None is the newest at the first download, which the lock file then holds.
    files: {path: [bytes, sha256]}; None for what is not known here. whole: all files of a useful kind that the Hub
    lists at the revision, with their sizes and, for large ones, sha256; what `files` says must hold. joined: the
    files are the parts of one, which gets this name.
    """

    repository: str
    form: str
    about: str
    revision: str | None = None
    files: dict = dataclasses.field(default_factory=dict)
    whole: bool = False
    joined: str | None = None


BENCHMARKS = {  # file: (task, kind, domain), bytes and sha256 at the authors' repository
    "qa_dataset/test/hotpotqa_500_20250422.json": (
        ("hotpotqa", "fact", "in"), 185087, "770b2740d2d5195f983dbeae3c770900edab776b5986b4cbff3194443a771b00"),
    "qa_dataset/test/2wikimultihopqa_500_20250511.json": (
        ("2wikimultihopqa", "fact", "out"), 163165, "5034d0e66b38f5e54f20934cbb02ff1d38f0b292efe81da05b5ebdeafcb1bb07"),
    "qa_dataset/test/musique_500_20250504.json": (
        ("musique", "fact", "out"), 198364, "683634bcc958a79b144cffb815d4f56002dc22ed7358e11b897f9ff03ba69110"),
    "qa_dataset/test/bamboogle_125_20250507.json": (
        ("bamboogle", "fact", "out"), 40261, "f6c5f3dd17521cf33a1d597d75525d65673687b3219ffe0339eae21b28d69be4"),
    "math_dataset/test/math_500_20250414.json": (
        ("math", "math", "in"), 215468, "32ae376ee63aee4a1e59ea167afebffa0031250b154d1805d13522c60c6069cb"),
    "math_dataset/test/gsm_hard_500_20250507.json": (
        ("gsm_hard", "math", "out"), 209659, "970c69744216a75fe04eb86ff1adaf208df5191e2731c6ef0610bd2312266498"),
    "math_dataset/test/aime_90_20250504.json": (
        ("aime", "math", "out"), 559888, "445868439c6c88c8f3ac99c9aabae90606cac43ade63597936bec37a22d510c0"),
    "math_dataset/test/olymath_200_20250511.json": (
        ("olymmath", "math", "out"), 97032, "dc105d5747a37031d1f981865dd5603d533488a435b8a2a0722fd167081912d1"),
    "qa_dataset/train/hotpotqa_1000_20250402.json": (
        ("hotpotqa", "fact", "in"), 365975, "35ae8108e8cb856813dc4aeb7de261b794ec2424ddb19c81449d1007a71f1fb8"),
    "math_dataset/train/math_1000_20250414.json": (
        ("math", "math", "in"), 497339, "71240de787bb08c59b09bbb5fa4daa2cb536849da29dfdd25bf9e27c7eff344b"),
    "math_dataset/train/math_medium_1000_20250430.json": (
        ("math_medium", "math", "in"), 409925, "af3aaef02faf2264aa32e30ca9b531b26ca7662f6be87a718ef3f5eb139e31ba"),
}  # fmt: skip
DATA_FOLDER = "data_processor"  # of the authors' repository
TEACHER_DATA = "agent-distillation/Qwen2.5-32B-Instruct_"


def _student(name, revision, files):
    return Source(name, "models", "student", revision, files, whole=True)


SOURCES = {
    "benchmarks": Source(
        "Nardien/agent-distillation", "github", "8 test sets, 3 training sets",
        "main", {f"{DATA_FOLDER}/{path}": [size, sha256] for path, (_, size, sha256) in BENCHMARKS.items()},
    ),
    "agent-trajectories": Source(TEACHER_DATA + "agent_trajectories_2k", "datasets", "teacher's agent", whole=True),
    "prefix-trajectories": Source(
        TEACHER_DATA + "agent_trajectories_2k_prefix", "datasets", "teacher's agent, first-thought prefix", whole=True
    ),
    "cot-trajectories": Source(TEACHER_DATA + "cot_trajectories_2k", "datasets", "teacher's CoT", whole=True),
    "wiki-18": Source(
        "PeterJinGo/wiki-18-corpus", "datasets", "Wikipedia 2018, 21,015,324 passages (Search-R1)",
        "69c1c00ffe7c5554c68d8548355cb22e46aabc51",
        {"wiki-18.jsonl.gz": [5123307260, "7abd929223399cd63c52b499f289bf4f9039be1e9f8c43e1cb3938305b2317db"]},
    ),
    "e5-index": Source(
        "PeterJinGo/wiki-18-e5-index", "datasets", "e5-base-v2's vectors of them, FAISS flat (Search-R1)",
        "a4d31160a035f30764604f4827cd8f1d0315eb86",
        {
            "part_aa": [42949672960, "a8a6a246951da4bbc8771a223283ef61963882a32864d9044ec00abb90fc3023"],
            "part_ab": [21609402413, "b6d9bc943626fe7cb44de4c849e9379e7f272ab216c0552acbcf2390cc033c11"],
        },
        joined="e5_Flat.index",
    ),
    "intfloat/e5-base-v2": Source(
        "intfloat/e5-base-v2", "models", "encoder of queries", "f52bf8ec8c7124536f0efb74aca902b2995e5bcd",
        {"model.safetensors": [437955512, "d0d559c47d5f71b1d280b13b62a2657f3e3bc70c0786f9ab91a36545e6a8f693"]},
        whole=True,
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": _student(
        "Qwen/Qwen2.5-0.5B-Instruct", "7ae557604adf67be50417f59c2c2f167def9a775",
        {"model.safetensors": [988097824, "fdf756fa7fcbe7404d5c60e26bff1a0c8b8aa1f72ced49e7dd0210fe288fb7fe"]},
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": _student(
        "Qwen/Qwen2.5-1.5B-Instruct", "989aa7980e4cf806f80c7fef2b1adb7bc71aa306",
        {"model.safetensors": [3087467144, "dd924a11b4c220f385b51ffa522daea7c9f3d850e31b162bb5661df483c6d3ee"]},
    ),
    "Qwen/Qwen2.5-3B-Instruct": _student(
        "Qwen/Qwen2.5-3B-Instruct", "aa8e72537993ba99e69dfaafa59ed015b17504d1",
        {
            "model-00001-of-00002.safetensors": [
                3968658944, "67347b23fb4165b652eb6611f5e1f2a06dfcddba8e909df1b2b0b1857bee06c2"],
            "model-00002-of-00002.safetensors": [
                2203268048, "a40d941d0e7e0b966ad8b62bb6d6b7c88cce1299197b599d9d0a4ce59aabfc1d"],
        },
    ),
    "Qwen/Qwen2.5-7B-Instruct": _student("Qwen/Qwen2.5-7B-Instruct", "a09a35458c702b33eeacc393d103063234e8bc28", {}),
    "agent-distillation/agent_distilled_Qwen2.5-1.5B-Instruct": Source(
        "agent-distillation/agent_distilled_Qwen2.5-1.5B-Instruct", "models", "the authors' student", whole=True
    ),
}  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class TableConfig:
    sources: str | None = option(None, 'another table: JSON {"hosts": {...}, "sources": {name: {...}}}')


class Table:
    """The sources by name, and the hosts they are at. A name that is not in the table is a model on the Hub."""

    def __init__(self, path=None):
        self.hosts, self.rows = HOSTS, SOURCES
        if path:
            try:
                given = parse_object(Path(path).read_bytes(), path)
                self.hosts = given["hosts"]
                self.rows = {name: Source(**row) for name, row in given["sources"].items()}
            except (OSError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{path}: not a table of sources: {error}") from None

    def __getitem__(self, name):
        if name not in self.rows and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            names = ", ".join(name for name in self.rows if "/" not in name)
            raise InputError(f"{name}: no such source; there are {names}, and models by name, such as Qwen/Qwen2.5-7B")
        return self.rows.get(name) or Source(name, "models", "not in the table", whole=True)


def show(config):
    """Print the table of sources; what is not pinned is recorded at its first download and checked from then on."""
    for name, source in Table(config.sources).rows.items():
        print(f"{name}: {source.about}\n  {source.form} {source.repository} at {source.revision or '(newest)'}")
        for path, (size, sha256) in source.files.items():
            print(f"  {size:>14,}  {sha256}  {path}")
        if source.whole:
            print("  " + ("and " if source.files else "") + "what the Hub lists there, recorded at the first download")


# ---------------------------------------------------------------------------------------------
# Downloads
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class FetchConfig(TableConfig):
    to: str = option(REQUIRED, "folder for download/, hub/ (models, as transformers' cache has them) and the lock file")
    mirror: list[str] = option([], "hub=URL or github=URL, tried before the host itself; may be repeated",
                               action="append", nargs=None)  # fmt: skip
    retries: int = option(8, "further attempts at one address without a byte of progress")
    timeout: float = option(60.0, "seconds without a byte that end an attempt")
    quiet: bool = option(False, "no progress bar")


@dataclasses.dataclass(kw_only=True)
class DownloadConfig(FetchConfig):
    names: list[str] = option(REQUIRED, "sources (see `show`), or models on the Hub by name", positional=True)


def download(config):
    """Download sources: resumed after a cut, checked by size and sha256, under their names only when they are right."""
    table = Table(config.sources)
    for name in config.names:
        if not Path(name).is_dir():
            print(f"{name}: {download_source(name, table, config)}")


USEFUL = (".json", ".jsonl", ".safetensors", ".txt", ".model", ".jinja")  # of a whole repository


def download_source(name, table, config, wanted=lambda path: True):
    """Bring the wanted files of a source that are not there yet; returns their folder."""
    source, lock = table[name], Lock(Path(config.to) / "sources.lock.json")
    fetcher = Fetcher(FORMS[source.form].split()[0], table, config)
    revision, files = pinned_files(name, source, lock.read().get(name), fetcher)
    lock.record(name, revision, files)
    form, folder = FORMS[source.form].split()[1], source_folder(source, revision, Path(config.to))
    parts = {}
    for path, pin in files.items():
        if not (folder / path).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{name}: a file named {path!r} would lie outside of {folder}")
        if wanted(path):
            address = form.format(repository=source.repository, revision=revision, path=urllib.parse.quote(path))
            parts[path] = Part(address, *pin)
    for path, group in {source.joined: parts.values()}.items() if source.joined else ((p, [parts[p]]) for p in parts):
        if (folder / path).exists():
            check_file(folder / path, group)
        else:
            fetcher.fetch(folder / path, group)
        lock.record(name, revision, {path: [part.bytes, part.sha256] for path, part in parts.items() if part.sha256})
    if source.form == "models":  # the commit that transformers takes for this name
        with replace_file(folder.parent.parent / "refs" / "main") as file:
            file.write(revision)
    return folder


def pinned_bytes(name, config):
    """Bytes of all files of a source that the lock file knows."""
    files = Lock(Path(config.to) / "sources.lock.json").read()[name]["files"]
    return sum(size or 0 for size, _ in files.values())


def source_folder(source, revision, to):
    if source.form == "models":
        return to / "hub" / f"models--{source.repository.replace('/', '--')}" / "snapshots" / revision
    return to / "download" / source.repository


class Lock:
    """The lock file: {name: {"revision": ..., "files": {path: [bytes, sha256]}}}, as the first download found them."""

    def __init__(self, path):
        self.path = path

    def read(self):
        return parse_object(self.path.read_bytes(), str(self.path)) if self.path.exists() else {}

    def record(self, name, revision, files):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name(".sources.lock"), "w") as guard:  # against another download
            fcntl.flock(guard, fcntl.LOCK_EX)
            rows = self.read()
            row = rows.setdefault(name, {"revision": revision, "files": {}})
            if row["files"] | files != row["files"]:
                row["files"] |= files
                write_json(self.path, rows)


def pinned_files(name, source, known, fetcher):
    """(commit, {path: [bytes, sha256]}): what the lock file or else the Hub says, and the table's pins must agree."""
    revision, files = source.revision, {}
    if known:
        revision, files = known["revision"], known["files"]
    elif source.whole:
        revision, files = list_repository(source, fetcher)
    if source.revision not in (None, revision):
        raise InputError(f"{name}: {source.revision} is pinned, but the lock file or the Hub says {revision}")
    files = {path: list(pin) for path, pin in files.items()}
    for path, pin in source.files.items():
        found = files.setdefault(path, [None, None])
        for i, what in enumerate(("bytes", "sha256")):
            if None not in (pin[i], found[i]) and pin[i] != found[i]:
                raise InputError(
                    f"{name}: {path}: {what} {pin[i]} is pinned, but the lock file or the Hub says {found[i]}"
                )
            found[i] = found[i] if pin[i] is None else pin[i]
    return revision, files


def list_repository(source, fetcher):
    """(commit, {path: [bytes, sha256 or None]}) of the useful files of a Hub repository, from the Hub's API."""
    address = f"api/{source.form}/{source.repository}/revision/{source.revision or 'main'}?blobs=true"
    with tempfile.TemporaryFile(buffering=0) as file:
        fetcher.fetch_part(file, 0, Part(address, None, None))
        file.seek(0)
        answer = parse_object(file.read(), address)
    try:
        names = {
            row["rfilename"]: [row.get("size"), (row.get("lfs") or {}).get("sha256")] for row in answer["siblings"]
        }
        files = {name: pin for name, pin in names.items() if name.endswith(USEFUL)}
        revision = answer["sha"]
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{address}: not a listing as the Hub gives it") from None
    if not files:
        raise InputError(f"{source.repository}: no {', '.join(USEFUL)} there, only {', '.join(names) or 'nothing'}")
    return revision, files


@dataclasses.dataclass
class Part:
    """A file to be fetched, or a part of one. bytes and sha256 are None until they are known."""

    address: str
    bytes: int | None
    sha256: str | None


def check_file(path, parts):
    """Compare a file that is there with what it should be; fills in what was not known."""
    with open(path, "rb") as file:
        for part in parts:
            part.bytes = path.stat().st_size if part.bytes is None else part.bytes
            sha256 = hash_bytes(file, part.bytes)
            if part.sha256 not in (None, sha256):
                raise InputError(
                    f"{path}: sha256 {sha256}, but {part.sha256} is expected; delete it to download it again"
                )
            part.sha256 = sha256
        if file.tell() != path.stat().st_size:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes, but {file.tell():,} are expected; delete it")


def hash_bytes(file, size):
    """sha256 of the next `size` bytes."""
    digest = hashlib.sha256()
    while size and (chunk := file.read(min(size, 1 << 20))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


class Unusable(Exception):
    """This address cannot give the file; `error` is the class to raise when no other address can either."""

    def __init__(self, message, error=InputError):
        super().__init__(message)
        self.error = error


class Fetcher:
    """Fetches files from a host or, before it, its mirrors."""

    def __init__(self, host, table, config):
        mirrors = [mirror.partition("=")[::2] for mirror in config.mirror]
        for kind, url in mirrors:
            if kind not in table.hosts or not url.startswith(("http://", "https://")):
                raise InputError(f"--mirror {kind}={url}: hub=https://... or github=https://... was expected")
        self.bases = [url.rstrip("/") for kind, url in [*mirrors, *table.hosts.items()] if kind == host]
        self.token = os.environ.get("HF_TOKEN") if host == "hub" else None
        self.config = config

    def fetch(self, target, parts):
        """Fetch the parts of a file, one after the other, into a file aside; it is renamed when all of them are right.

        The file aside outlives a kill, and the next call goes on from its end.
        """
        aside = target.with_name(f".{target.name}.partial")
        aside.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "r+b" if aside.exists() else "w+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{target}: another process is downloading this file; wait for it or end it") from None
            total = sum(part.bytes or 0 for part in parts)
            missing, free = total - os.fstat(file.fileno()).st_size, shutil.disk_usage(aside.parent).free
            if missing > free:
                raise InputError(f"{target}: {gb(missing)} are to come, but only {gb(free)} are free on that disk")
            with progress(total=total or None, desc=target.name, unit="B", quiet=self.config.quiet) as bar:
                bar.unit_scale, start = True, 0
                for part in parts:
                    self.fetch_part(file, start, part, bar)
                    start += part.bytes
            file.truncate(start)
            os.fsync(file.fileno())
        os.replace(aside, target)

    def fetch_part(self, file, start, part, bar=None):
        """Fetch one part to its place in the file, from the first address that gives it whole and right."""
        failures = []
        for base in self.bases:
            url, host = f"{base}/{part.address}", base == self.bases[-1]
            try:
                self.fill(file, start, part, url, host, bar)
                size = size_of(file) - start if part.bytes is None else part.bytes
                file.seek(start)
                sha256 = hash_bytes(file, size)
                if part.sha256 not in (None, sha256):
                    file.truncate(start)
                    raise Unusable(f"{url}: sha256 {sha256}, but {part.sha256} is expected; nothing of it is kept")
                part.bytes, part.sha256 = size, sha256
                return
            except Unusable as failure:
                failures.append(failure)
        raise failures[-1].error("; ".join(map(str, failures)))

    def fill(self, file, start, part, url, host, bar):
        """Append to the file until it holds the part. Attempts that bring nothing are counted; others are not."""
        attempt = 0
        while part.bytes is None or size_of(file) < start + part.bytes:
            before = size_of(file)
            try:
                self.request(file, start, part, url, host, bar)
                return
            except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
                reason = str(error) if isinstance(error, requests.HTTPError) else type(error).__name__
            attempt = attempt + 1 if size_of(file) <= before else 1
            if attempt > self.config.retries:
                raise Unusable(f"{url}: {reason}; gave up after {attempt} attempts; what came is kept", ServerError)
            time.sleep(min(BACKOFF * 2 ** (attempt - 1), BACKOFF_MAX))

    def request(self, file, start, part, url, host, bar):
        """One attempt to append what is missing; returns when the part is whole.

        Raises Unusable for what no further attempt would change, and requests' errors for what may pass.
        """
        have = size_of(file) - start
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        if self.token and host:  # never to a mirror; and when the host leads elsewhere, requests drops it
            headers["Authorization"] = f"Bearer {self.token}"
        with requests.get(url, headers=headers, stream=True, timeout=(10.0, self.config.timeout)) as response:
            first, total = offered(response)
            if response.status_code == 416 and total == have and part.bytes is None:
                return  # it was all there
            if response.status_code in (401, 403):
                raise Unusable(f"{url} answered {response.status_code}: $HF_TOKEN must hold a token that may read it")
            if response.status_code == 429 or response.status_code >= 500:
                raise requests.HTTPError(f"status {response.status_code}")
            if response.status_code not in (200, 206) or first not in (0, have):
                file.truncate(start)
                raise Unusable(f"{url} answered {response.status_code}" + f" with {total} bytes" * (total is not None))
            if None not in (part.bytes, total) and total != part.bytes:
                raise Unusable(f"{url}: {total:,} bytes there, but {part.bytes:,} are expected")
            file.truncate(start + first)  # a server that ignores Range begins again
            self.append(file, response, bar)
        if total is not None and size_of(file) - start < total:
            raise requests.ConnectionError("the connection ended early")

    def append(self, file, response, bar):
        try:
            file.seek(0, os.SEEK_END)
            while chunk := response.raw.read1(1 << 18):  # what has come; a whole buffer would be lost with the line
                rest = memoryview(chunk)
                while rest:
                    rest = rest[file.write(rest) :]
                if bar is not None:
                    bar.update(size_of(file) - bar.n)
        except OSError as error:
            raise InputError(f"{file.name}: {error.strerror}; what came is kept, the same command goes on") from None


def size_of(file):
    return os.fstat(file.fileno()).st_size


def offered(response):
    """(first byte, size of the whole file or None) that an answer announces."""
    announced = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
    if announced:
        return int(announced[1] or 0), int(announced[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length and response.status_code == 200 else None


def gb(size):
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    run_command_line(__doc__, {"show": (TableConfig, show), "download": (DownloadConfig, download)})
