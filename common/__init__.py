"""What every script shares: command-line options, one-line errors, files that survive a crash, HTTP."""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import http.server
import inspect
import json
import operator
import os
import pkgutil
import re
import sys
import threading
import traceback
import typing
from pathlib import Path

from tqdm import tqdm


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what would be right."""

    exit_status = 2


# ------------- Options

# A script's configuration is a dataclass, and its command line is made from it: each default is written once, with its
# reason, and holds for the shell and for importers alike.

REQUIRED = dataclasses.MISSING  # an option without a default; such a dataclass is kw_only


def option(default, help, *, positional=False, changes_results=True, **limits):
    """Returns a dataclass field that is also a command-line option, or a positional argument.

    changes_results: False for an option that may differ when an interrupted run is continued, because it cannot change
    what the run writes; see keep_config. limits of a number: above, at_least, at_most.
    """
    metadata = {"help": help, "positional": positional, "changes_results": changes_results, "limits": limits}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def _add_option(parser, field):
    """Add one dataclass field to the parser. An option that is not given keeps the dataclass's default."""
    required = field.default is field.default_factory  # both are MISSING
    shown = "" if field.default in (None, REQUIRED) else f" (default: {field.default})"
    arguments = {"default": argparse.SUPPRESS, "help": (field.metadata["help"] + shown).replace("%", "%%")}
    annotation, parts = field.type, typing.get_args(field.type)
    if type(None) in parts:  # `float | None` is parsed as float
        annotation, parts = parts[0], typing.get_args(parts[0])
    if annotation is bool:
        arguments["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(annotation) is typing.Literal:
        arguments["choices"] = parts
    elif typing.get_origin(annotation) is list:
        arguments |= {"nargs": "+" if required else "*", "type": parts[0]}
    else:
        arguments["type"] = annotation
    if not field.metadata["positional"]:
        parser.add_argument("--" + field.name.replace("_", "-"), required=required, **arguments)
    else:
        parser.add_argument(field.name, **({} if required else {"nargs": "?"}) | arguments)


_LIMITS = {"above": operator.gt, "at_least": operator.ge, "at_most": operator.le}


def check_values(config):
    """Raises InputError for an empty text, and a number outside its option's limits, NaN and infinity included."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == "" or (isinstance(value, list) and "" in value):
            raise InputError(f"--{field.name.replace('_', '-')}: the text is empty")
        largest = sys.float_info.max if isinstance(value, float) else 2**63 - 1  # torch's seeds have 64 bits
        for name, limit in [*field.metadata["limits"].items(), ("at_least", -largest), ("at_most", largest)]:
            if isinstance(value, int | float) and not _LIMITS[name](value, limit):
                raise InputError(f"--{field.name.replace('_', '-')} {value}: must be {name.replace('_', ' ')} {limit}")


def refuse(config, names, reason):
    """Raises InputError if one of these options was given: `reason` says why it would be ignored."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in names and value != field.default:
            raise InputError(f"--{field.name.replace('_', '-')} {value}: {reason}")


def resolve(dotted, like=None, name="a function"):
    """Returns the function that MODULE.FUNCTION names, which must accept the arguments of the function `like`.

    name: of the option, for the message. Raises InputError in one line, also if the module itself fails.
    """
    try:
        function = pkgutil.resolve_name(dotted)
    except Exception as error:  # the module's own code may raise anything
        raise InputError(f"{name} {dotted}: {type(error).__name__}: {error}") from None
    if not inspect.isfunction(function):  # source_hash needs its file
        raise InputError(f"{name} {dotted}: not a function of a Python file")
    if like:
        parameters = inspect.signature(like).parameters
        keywords = [key for key, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
        positional = [key for key in parameters if key not in keywords]
        try:
            inspect.signature(function).bind(*positional, **dict.fromkeys(keywords))
        except TypeError as error:
            needed = ", ".join([*positional, *(f"{key}=" for key in keywords)])
            raise InputError(f"{name} {dotted}: {error}; it is called with ({needed})") from None
    return function


def source_hash(function):
    """Returns a hash of the file of a function's module, to refuse a restart with an edited function."""
    return file_hash(sys.modules[function.__module__].__file__)


def file_hash(path):
    """Returns the sha256 of a file, to refuse a restart with another content under its name."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_command_line(description, commands, default=None, argv=None):
    """Parse the command line, run the command, and exit with its status.

    description: the script's docstring. commands: {name: (Config dataclass, function(config))}; a function's docstring
    is its help, and it may return an exit status. default: the command that is meant when none is named.
    An InputError and an OSError (a file is missing, the disk is full) are one line and status 2, Ctrl-C is status 130.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if default and not {*argv[:1]} & {*commands, "-h", "--help"}:
        argv.insert(0, default)
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser(description=description, **style)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (config_class, function) in commands.items():
        doc = (function.__doc__ or "").strip()
        summary = doc.split("\n")[0] + (" (the default command)" if name == default else "")
        subparser = subparsers.add_parser(name, help=summary.replace("%", "%%"), description=doc, **style)
        for field in dataclasses.fields(config_class):
            _add_option(subparser, field)
    try:
        values = vars(parser.parse_args(argv))
        config_class, function = commands[values.pop("command")]
        config = config_class(**values)
        check_values(config)
        status = function(config) or 0
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # `... | head` closed our output, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = getattr(error, "exit_status", 2)
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # sys.exit would first wait for every thread that still waits for a server
    sys.exit(0)


def progress(iterable=None, *, done=0, quiet=False, **options):
    """Returns a tqdm bar, updated rarely where stderr is a log file. done: items that an earlier run finished."""
    options |= {"dynamic_ncols": True, "mininterval": 0.1 if sys.stderr.isatty() else 30}
    return tqdm(iterable, initial=done, disable=quiet, **options)


def stable_seed(*parts):
    """Returns a 31-bit seed from values. Unlike hash(), it is the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


# ------------- Files: JSON lines are appended whole; any other file is written aside and renamed


def read_text(path):
    """Returns the text of a file without its last newline."""
    try:
        return Path(path).read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start:,})") from None


def read_jsonl(path, fields=None, growing=False):
    """Yield (line number, object) for each non-empty line of a JSONL file. fields: see parse_object.

    growing: the file is one to which rows are appended; a last line that is not JSON is incomplete, and left out.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip() and not (growing and _is_torn(line)):
                yield number, parse_object(line, f"{path}:{number}", fields)


def _is_torn(line):
    """Returns whether a line has neither a line break nor an end: a kill left it, or it is being written."""
    if line.endswith(b"\n"):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def write_jsonl(path, rows):
    """Write a JSONL file that appears under its name only when it is complete."""
    with replace_file(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parse_object(line, where, fields=None):
    """Returns the JSON object in bytes or text. Raises InputError, with a message that starts with `where`.

    fields: {name: type} of what it must have; a name that ends in "?" may be missing. In the place of a type, a list of
    names: a list of objects with these fields.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON object was expected, not {type(row).__name__}")
    for field, kind in (fields or {}).items():
        name = field.removesuffix("?")
        if name not in row:
            right = name != field
        elif isinstance(kind, list):
            right = isinstance(row[name], list) and all(isinstance(x, dict) and x.keys() >= {*kind} for x in row[name])
        else:
            right = isinstance(row[name], kind)
        if not right:
            raise InputError(f"{where}: the field {name!r} is missing or wrong")
    return row


def load_tasks(paths, kind=None, limit=None):
    """Returns rows {"id", "task", "kind", "question", "answer", ...} of JSONL files or {"examples": [...]} files.

    kind: "fact" or "math" for files that do not state it. limit: only the first n of each file. An answer that is a
    list means that each of its elements is right: the first becomes "answer", the others "aliases"; a list of numbers
    or formulas (kind math) is one answer in several parts.
    Raises InputError for an empty file, and with file and row for a missing field or a repeated id.
    """
    tasks = {}
    for path in paths:
        if Path(path).suffix == ".json":
            rows = list(enumerate(parse_object(Path(path).read_bytes(), path, {"examples": []})["examples"], 1))
        else:
            rows = list(read_jsonl(path))
        if not rows:
            raise InputError(f"{path}: no tasks in it")
        for number, row in rows[:limit]:
            where = f"{path}:{number}"
            task = _read_task({"task": Path(path).stem, "kind": kind} | row, where)
            if tasks.setdefault((task["task"], task["id"]), task) is not task:
                raise InputError(f"{where}: task {task['task']} has id {task['id']!r} twice")
    return list(tasks.values())


def _read_task(row, where):
    row = json.loads(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))  # no half surrogate pairs
    answers, aliases = row.get("answer"), row.get("aliases") or []
    answers = answers if isinstance(answers, list) else [answers]
    aliases = aliases if isinstance(aliases, list) else [aliases]
    values = {"task": [row["task"]], "id": [row.get("id")], "question": [row.get("question")], "answer": answers}
    for field, given in values.items():
        kind = str if field in ("task", "question") else str | int | float
        if not given or not all(isinstance(value, kind) and str(value).strip() for value in given):
            raise InputError(f"{where}: the field {field!r} of a task is missing, empty or of a wrong type")
    if row["kind"] not in ("fact", "math"):
        raise InputError(f'{where}: the kind must be stated: "kind": "fact" or "math", or --kind')
    if row["kind"] == "math" and len(answers) > 1:
        return row | {"id": str(row["id"]), "aliases": aliases}
    return row | {"id": str(row["id"]), "answer": answers[0], "aliases": [*answers[1:], *aliases]}


@contextlib.contextmanager
def replace_file(path, mode="w"):
    """Open a file that appears under its name only when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    # Half of a surrogate pair, which a model may write, becomes a question mark.
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "replace"}
    try:
        with open(aside, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path, value):
    """Write one JSON value as a file that appears under its name only when it is complete."""
    with replace_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class Journal(contextlib.AbstractContextManager):
    """An append-only JSONL file that a kill, a full disk or a second process cannot corrupt. Threads may share it.

    Opening it locks the file, reads the finished rows (`rows`) and drops an incomplete last line. `append` writes one
    line with one system call, so a kill leaves at most one incomplete line.
    fields: what every row has; see parse_object. Raises InputError, and leaves the file as it is, if it holds anything
    else, or if another process has it open.
    """

    def __init__(self, path, fields=None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file = open(self.path, "ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path}: another process is writing this file; wait for it or end it") from None
        self.rows = [row for _, row in read_jsonl(self.path, fields, growing=True)]
        content = self.path.read_bytes()
        last = content.rpartition(b"\n")[2]
        if last and not _is_torn(last):
            self._file.write(b"\n")
        elif last and not last.startswith(b'{"'):
            raise InputError(f"{self.path}: not a file that this command wrote: name another")
        else:
            self._file.truncate(len(content) - len(last))

    def append(self, row):
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        with self._lock:
            length = self._file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[self._file.write(line) :]
            except OSError as error:  # the disk is full, perhaps after half of the line
                self._file.truncate(length)
                raise InputError(f"{self.path}: cannot write ({error.strerror}); earlier rows are intact") from None
            self.rows.append(row)

    def close(self, *exception):
        self._file.close()

    __exit__ = close


def keep_config(path, config, *, binding=True, notes=None, **facts):
    """Write the configuration, a dataclass, beside the results. A restart with another configuration is refused.

    Rows made under two configurations must not be mixed in one file. facts: further values that must stay as they are
    (hashes of prompts, the model behind a URL); options that say changes_results=False may differ. notes: a dict that
    is recorded only. binding: False as long as there are no results, so that a mistyped first command can be corrected.
    """
    path, settings = Path(path), json.loads(json.dumps(dataclasses.asdict(config) | facts))
    fields = dataclasses.fields(config)
    fixed = {field.name for field in fields if field.metadata["changes_results"]} | set(facts)
    if path.exists():
        old = parse_object(path.read_bytes(), path)
        if any(field.default is field.default_factory and field.name not in old for field in fields):  # a required one
            raise InputError(f"{path}: written by another command: name another --out")
        for name, value in settings.items():
            if binding and name in fixed and old.get(name, value) != value:
                made = f"made with {name.replace('_', '-')} {old[name]}, not {value}"
                raise InputError(f"{path}: these results were {made}: name another --out to keep both, or delete it")
    write_json(path, settings | (notes or {}))


# ------------- Prompts

SHOWN = {  # method: the prompts that its episodes show, besides the system prompt
    "agent": ["question", "observation", "error", "no_code", "search_result"],
    "cot": [],
    "cot-rag": ["cot_rag_question", "search_result"],
}
PLACEHOLDERS = {"question": ["question"], "observation": ["stdout"], "error": ["error"], "search_result": ["text"]}
PLACEHOLDERS |= {"cot_rag_question": ["passages", "question"], "judge": ["question", "answer", "prediction"]}


class Prompts:
    """Every text that a model is shown, one file each: `prompts.question` is prompts/question.txt."""

    default = Path(__file__).parent.parent / "prompts"

    def __init__(self, folder=default):
        self.folder = Path(folder)

    def __getattr__(self, name):
        text = read_text(self.folder / f"{name}.txt")
        setattr(self, name, text)
        return text

    def fill(self, name, **values):
        """Returns the prompt with its {placeholders} replaced, in one pass: braces inside a value stay as they are."""
        return re.sub(r"\{(\w+)\}", lambda m: str(values.get(m[1], m[0])), getattr(self, name))

    def system(self, name, tools, max_steps=5):
        """Returns a system prompt. {tools} becomes the descriptions of the tools, {calls} a list of their signatures.

        tools: names. Raises InputError for a tool that prompts/tools/NAME.txt does not describe.
        """
        described, calls = [], []
        for tool in (*tools, "final_answer"):
            path = self.folder / "tools" / f"{tool}.txt"
            text = read_text(path) if path.exists() else ""
            if not text.startswith(f"{tool}(") or ")" not in text:
                raise InputError(f"{path}: describes a tool of --tools, as {tool}(argument: type): what it does")
            described.append(f"- {text}")
            calls.append(re.sub(r":(\[[^\]]*\]|[^,)])*", "", text[: text.index(")") + 1]))  # without annotations
        return self.fill(name, tools="\n".join(described), calls=", ".join(calls), max_steps=max_steps)

    def check(self, *names):
        """Raise InputError if one of these texts is missing, or lacks a placeholder."""
        for name in names:
            path = self.folder / f"{name}.txt"
            if not path.is_file():
                raise InputError(f"--prompts {self.folder}: {path.name} is missing")
            for word in PLACEHOLDERS.get(name, ()):
                if f"{{{word}}}" not in getattr(self, name):
                    raise InputError(f"{path}: the placeholder {{{word}}} is missing")

    def sha256(self, method):
        """Returns a hash of the texts that a method shows, which are checked. Results of other texts are not mixed."""
        self.check(*SHOWN[method])
        texts = [getattr(self, name) for name in SHOWN[method]]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


# ------------- HTTP: one way to serve JSON; the clients are in common/client.py


def serve_json(answer, host="127.0.0.1", port=0):
    """Returns an HTTP server (not yet started) that answers every request with JSON.

    answer(method, path, body) -> (status, object); body is None for a GET. An InputError raised in it becomes status
    400, any other exception 500. Call .serve_forever(); .server_address has the port that was chosen for port 0.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self):
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                body = parse_object(data, "request") if self.command == "POST" else None
                status, value = answer(self.command, self.path, body)
            except InputError as error:
                status, value = 400, {"error": str(error)}
            except Exception as error:  # the client is told, and the server continues
                traceback.print_exc()
                status, value = 500, {"error": f"{type(error).__name__}: {error}"}
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the client has gone
                self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *arguments):
            pass

    try:
        server = http.server.ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise InputError(f"port {port} on {host}: {error.strerror}") from None
    server.socket.listen(128)  # Python's default makes many clients that connect at once wait
    return server
