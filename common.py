"""What every script shares: options, errors, and files that a crash cannot harm.

    from common import InputError, Journal, option, run_command_line

This is the only module that all the others import; it imports none of them.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import gzip
import json
import os
import sys
import threading
import types
import typing
from pathlib import Path

from tqdm import tqdm


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what would be right."""

    exit_status = 2


# Options: a script's configuration is a dataclass, and its command line is made from it, so that
# a default is written once, with its reason, and holds for the shell and for importers alike.


REQUIRED = object()


def option(default, help, positional=False, **argparse_options):
    """A dataclass field that is also a command-line option (or a positional argument).

    default REQUIRED: the command line and the constructor must give it (such a dataclass is kw_only).
    """
    metadata = {"help": help, "positional": positional, "argparse": argparse_options}
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def _add_option(parser, field, annotation):
    """One argparse argument for one dataclass field; what is not given is left to the dataclass."""
    required = field.default is field.default_factory  # both MISSING
    default = field.default if field.default is not dataclasses.MISSING else None
    arguments = {"default": argparse.SUPPRESS, **field.metadata["argparse"]}
    arguments["help"] = field.metadata["help"].replace("%", "%%")
    if default is not None:
        arguments["help"] += f" (default: {default})".replace("%", "%%")
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):  # `float | None` parses as float
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if annotation is bool:
        arguments["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(annotation) is typing.Literal:
        arguments["choices"] = typing.get_args(annotation)
    elif typing.get_origin(annotation) is list:
        arguments = {"nargs": "+" if required else "*", "type": typing.get_args(annotation)[0], **arguments}
    else:
        arguments["type"] = annotation
    if field.metadata["positional"]:
        if not required:
            arguments.setdefault("nargs", "?")
        parser.add_argument(field.name, **arguments)
    else:
        parser.add_argument("--" + field.name.replace("_", "-"), required=required, **arguments)


def run_command_line(description, commands, default=None, argv=None):
    """Parse the command line, run the command and leave with its exit status.

    description: the script's docstring. commands: {name: (Config dataclass, function(config))}; a
    function's docstring is its help. default: the command meant when none is named. A function may
    return an exit status. InputError ends as one line on stderr and status 2, Ctrl-C as 130.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if default and (not argv or argv[0] not in commands) and argv[:1] not in (["-h"], ["--help"]):
        argv.insert(0, default)
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (config_class, function) in commands.items():
        doc = (function.__doc__ or "").strip()
        note = " (the default command)" if name == default else ""
        subparser = subparsers.add_parser(
            name,
            help=doc.split("\n")[0].replace("%", "%%") + note,
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        annotations = typing.get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            _add_option(subparser, field, annotations[field.name])
    try:
        values = vars(parser.parse_args(argv))
        config_class, function = commands[values.pop("command")]
        status = function(config_class(**values))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.exit_status
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # `... | head` closed our output: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)


def progress(iterable=None, *, total=None, done=0, desc="", unit="it", quiet=False):
    """A tqdm bar on stderr, slowed down where nobody watches (a log file). done: where a resumed run starts."""
    return tqdm(
        iterable,
        total=total,
        initial=done,
        desc=desc,
        unit=unit,
        disable=quiet,
        mininterval=0.1 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
    )


# Files: JSON lines are appended whole; any other file is written aside and renamed.


def read_jsonl(path):
    """Yield (line number, object) for each non-empty line of a JSONL file, plain or gzipped.

    Raises InputError with file and line for what is not a JSON object, and for a missing file.
    """
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, parse_object(line, f"{path}:{number}")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: not a whole gzip file: {error}") from None


def write_jsonl(path, rows):
    """Write a JSONL file that appears under its name only when it is complete."""
    with replace_file(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parse_object(line, where):
    """The JSON object in one line of bytes or text; InputError, starting with `where`, if it is none."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON object was expected, not {type(row).__name__}")
    return row


@contextlib.contextmanager
def replace_file(path, mode="w"):
    """Open a file that appears under its name only when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path, value):
    with replace_file(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


class Journal:
    """An append-only JSONL file that a kill, a full disk or a second process cannot corrupt.

    Opening it reads the finished rows (`self.rows`), drops a torn last line, and locks the file.
    append() writes one line with one system call, so a kill leaves whole lines and at most one
    torn one. Threads may share a journal. Raises InputError when another process has the file
    open or a whole line is not JSON.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._lock = threading.Lock()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise InputError(f"{self.path}: another process is writing this file; wait for it or end it") from None
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._file, whole)
        lines = content[:whole].splitlines()
        self.rows = [parse_object(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]

    def append(self, row):
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        with self._lock:
            length = os.fstat(self._file).st_size
            try:
                while line:
                    line = line[os.write(self._file, line) :]
            except OSError as error:  # a full disk took half a line: take it back, what is there stays whole
                os.ftruncate(self._file, length)
                raise InputError(f"{self.path}: cannot write ({error.strerror}); what is there is whole") from None
            self.rows.append(row)

    def close(self):
        os.close(self._file)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def keep_config(path, config, may_change=(), binding=True):
    """Write the configuration beside the result; on a restart, refuse another one.

    Rows made under two configurations must not meet in one file. may_change: options that do not
    alter results (how many at once, quiet, ...). binding: False while nothing has been made yet, so that a
    mistyped first command does not stand in the way of the right one.
    """
    path = Path(path)
    new = dataclasses.asdict(config)
    if binding and path.exists():
        old = parse_object(path.read_text(encoding="utf-8"), str(path))
        for name in new:
            if name not in may_change and name in old and old[name] != new[name]:
                raise InputError(
                    f"{path}: this was made with --{name.replace('_', '-')} {old[name]}, not {new[name]}: "
                    "name another --out to keep both, or delete it"
                )
    write_json(path, new)
