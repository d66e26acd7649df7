"""The inside of the sandbox: the processes that run a language model's code, and their containment.

    warm interpreter        one per host process: has imported numpy and sympy
      first process         one per sandbox: sets up limits, Landlock and seccomp; runs no foreign code
        candidate           runs one action; if the host keeps it, it is the state, and forks the next candidates

Each is a `Process` that serves its channel. A message with two descriptors (a channel, and a file for the output) is a
request to fork: the fork does what the message says. A message without descriptors is a tool's reply. A process ends
when its channel is closed. The first processes also watch the host's process, because a fork of the host keeps the
channels open. Foreign code can change everything in its own process. sandbox.py, the host, runs this file.

Sources: the manual pages landlock(7), seccomp(2), capset(2), clone(2), prctl(2); linux/filter.h for the BPF program.
"""

import ast
import builtins
import ctypes
import errno
import gc
import io
import itertools
import json
import linecache
import math
import mimetypes
import numbers
import os
import platform
import random
import re
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import types
import warnings
import zoneinfo
from _thread import _count, start_new_thread
from collections.abc import Mapping, Sequence, Set, ValuesView
from contextlib import suppress
from decimal import Decimal
from queue import SimpleQueue

__builtins__ = dict(vars(builtins))  # a copy for this file: foreign code may replace builtins.open

TEXT_LIMIT = 10_000  # characters kept of the output, a result, an error, or an answer that JSON cannot hold
OUTPUT_BYTES = 1 << 20  # bytes that a step can print; writing more raises OSError in the code
OPEN_FILES = 64  # descriptors that the code can have open
CALLS = 8  # tool calls at the same time
# Types of a tool's exception that the code sees; others become a RuntimeError.
ERRORS = ("ValueError", "TypeError", "KeyError", "IndexError", "OSError", "ConnectionError", "TimeoutError")
PATIENCE = 0.3  # seconds that a step waits for threads that its code started and did not join
CHANNEL = 3  # the descriptor of a process's channel to the host

# ------------- Messages between host and inside: the length in four bytes, then a JSON object

MESSAGE_BYTES = 8 << 20
MESSAGE_VALUES = 100_000  # a parsed value takes up to a hundred bytes
MESSAGE_DEPTH = 100  # lists within lists
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def pack(message):
    """Returns a message's bytes; half a surrogate pair becomes "?". Raises TypeError or ValueError if JSON cannot hold
    it."""
    data = _encode(message).encode("utf-8", "replace")
    return len(data).to_bytes(4, "big") + data


def unpack(data):
    """Returns the JSON object in a message. Its size is checked before it is parsed. Raises ValueError."""
    bare = _STRING.sub(b"", data)
    brackets = re.sub(rb"[^][{}]", b"", bare)
    if len(data) > MESSAGE_BYTES or bare.count(b",") + len(brackets) > MESSAGE_VALUES:
        raise ValueError(f"more than {MESSAGE_BYTES >> 20} MiB or {MESSAGE_VALUES:,} values")
    if max(itertools.accumulate(1 if byte in b"[{" else -1 for byte in brackets), default=0) > MESSAGE_DEPTH:
        raise ValueError(f"nested more than {MESSAGE_DEPTH} deep")
    if re.search(rb"\d{4301}", bare):  # what int() refuses in the host
        raise ValueError("an integer of more than 4,300 digits")
    message = json.loads(data.decode())
    _encode(message).encode()  # no infinity, no half of a surrogate pair
    return message


def checked(message):
    """Returns a message's bytes, as `pack` does. Raises TypeError or ValueError also if the host would refuse it."""
    data = pack(message)
    unpack(data[4:])
    return data


def cut(text, limit=TEXT_LIMIT):
    """Returns the text; if it is longer than `limit`, its two ends with a note between them."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters not shown ...]\n{text[-half:]}"


# ------------- System calls. Those that are not listed are denied: network sockets, programs, signals to others,
# ptrace, mount, bpf, io_uring, all new system calls, and those that create, change or remove a file.

ALLOWED = [  # (purpose, numbers on x86-64, numbers on arm64)
    ("read and write what is open", "0 1 3 8 17-20 32 33 292 436", "23 24 57 62-68 436"),
    ("stat, list and enter folders", "4-6 21 79-81 89 137 138 217 262 267 269 332 439",
     "17 43 44 48-50 61 78-80 291 439"),
    ("memory", "10-12 25 27 28 324", "214-216 226 232 233 283"),
    ("pipes, pairs of sockets", "22 45 47 48 51 52 55 290 293", "19 59 204 205 207 209 210 212"),
    ("poll, select, epoll, timerfd", "7 23 232 233 270 271 281 283 286 291", "20-22 72 73 85 86"),
    ("threads, exit, wait", "24 60 61 158 186 202 204 218 231 247 273 309 334", "93-96 98 99 123 124 168 178 260 293"),
    ("signals to itself", "13-15 34 127 128 130 131 219", "128 132-137 139"),
    ("time and timers", "35-38 96 201 228-230", "101-103 113-115 169"),
    ("IDs, limits, uname, getrandom", "39 63 97-100 102 104 107 108 110 111 115 118 120 121 124 318",
     "148 150 153 155 156 158 160 163 165 172-177 179 278"),
]  # fmt: skip
NAMED = {  # allowed with some arguments (see CHECKS), or called here before the filter is set
    "open": (2, None), "openat": (257, 56), "mmap": (9, 222), "clone": (56, 220), "clone3": (435, 435),
    "ioctl": (16, 29), "fcntl": (72, 25), "prctl": (157, 167), "prlimit64": (302, 261), "socketpair": (53, 199),
    "sendto": (44, 206), "seccomp": (317, 277), "capset": (126, 91), "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446),
}  # fmt: skip
ARM = platform.machine() in ("aarch64", "arm64")
SUPPORTED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
NUMBERS = {name: numbers[ARM] for name, numbers in NAMED.items()}


def allowed(column):
    """Returns the numbers in a column of ALLOWED."""
    ends = [part.split("-") for row in ALLOWED for part in row[column].split()]
    return [number for first, *last in ends for number in range(int(first), int((last or [first])[0]) + 1)]


ALL_BITS = 0xFFFFFFFF
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# clone's flags: CLONE_THREAD with SIGHAND, VM, FS, FILES; the mask ignores flags such as SETTLS and CHILD_SETTID.
THREAD, THREAD_MASK = 0x10F00, 0x7E03FFFF
# (call, [(argument, mask, values)]): each of these arguments must, under its mask, be one of its values.
CHECKS = [
    ("open", [(1, WRITING, [0])]),
    ("openat", [(2, WRITING, [0])]),
    ("mmap", [(3, 1, [0])]),  # no MAP_SHARED: candidates would share the mapping
    ("clone", [(0, THREAD_MASK, [THREAD])]),
    ("ioctl", [(1, ALL_BITS, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451])]),  # isatty, sizes, FIONBIO, FIOCLEX
    ("fcntl", [(1, ALL_BITS, [0, 1, 2, 3, 4, 1030])]),  # duplicates, F_GETFD, F_SETFD, F_GETFL, F_SETFL
    ("prctl", [(0, ALL_BITS, [15, 16, 0x53564D41])]),  # names of threads and of mappings
    ("prlimit64", [(0, ALL_BITS, [0])]),  # the process's own limits
    # asyncio needs an unnamed pair of stream sockets. A pair of datagram sockets could send to any address.
    ("socketpair", [(0, ALL_BITS, [1]), (1, 0xF, [1])]),
    ("sendto", [(3, 1, [0])]),  # no MSG_OOB
]
# BPF: (operation, instructions to skip if true, if false, value). Offsets are those of struct seccomp_data.
LOAD, MASK, EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
CALL, ARCHITECTURE, ARGUMENTS = 0, 4, 16
ALLOW, KILL, DENY, NO_SUCH_CALL = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name, *arguments):
    """Make a system call by its number. bytes are passed as pointers."""
    wide = [a if isinstance(a, bytes) or a is None else ctypes.c_ulong(a) for a in arguments]
    result = _libc.syscall(ctypes.c_long(NUMBERS[name]), *wide)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())} ({name})")
    return result


def _rule(number, checks, verdict):
    """Returns the instructions that give the verdict on the call of this number if all checks hold."""
    body = [(RETURN, 0, 0, verdict)]
    for argument, mask, values in reversed(checks):
        last = len(values) - 1
        equals = [(EQUAL, last - i, 0 if i < last else len(body), value) for i, value in enumerate(values)]
        body = [(LOAD, 0, 0, int(ARGUMENTS + 8 * argument)), (MASK, 0, 0, mask), *equals, *body]
    return [(LOAD, 0, 0, CALL), (EQUAL, 0, len(body), number), *body] if number is not None else []


def restrict_calls(key):
    """Deny every system call that is not listed. clone may fork if its unused sixth argument is the key (64 bits)."""
    own = [(0, ALL_BITS, [signal.SIGCHLD]), (5, ALL_BITS, [key & ALL_BITS]), (5.5, ALL_BITS, [key >> 32])]
    program = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, 0xC00000B7 if ARM else 0xC000003E), (RETURN, 0, 0, KILL)]
    for number in allowed(1 + ARM):
        program += _rule(number, [], ALLOW)
    for call, checks in [*CHECKS, ("clone", own)]:
        program += _rule(NUMBERS[call], checks, ALLOW)
    # clone3 has its flags in memory, where a filter cannot check them. The C library falls back to clone.
    program += [*_rule(NUMBERS["clone3"], [], NO_SUCH_CALL), (RETURN, 0, 0, DENY)]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    _call("seccomp", 1, 0, struct.pack("=H6xQ", len(program), ctypes.addressof(buffer)))  # SECCOMP_SET_MODE_FILTER


def _fork(key):
    """Fork with the key that the filter asks for. Returns the PID, or 0 in the child.

    The child continues the parent's random numbers, which Python would seed again.
    """
    drawn = random.getstate()
    if SUPPORTED:
        ctypes.pythonapi.PyOS_BeforeFork()
        arguments = map(ctypes.c_ulong, (NUMBERS["clone"], signal.SIGCHLD, 0, 0, 0, 0, key))
        child = ctypes.PyDLL(None).syscall(*arguments)
        (ctypes.pythonapi.PyOS_AfterFork_Parent if child else ctypes.pythonapi.PyOS_AfterFork_Child)()
    else:
        child = os.fork()
    if child < 0:
        raise OSError("cannot fork: the machine has no memory or no process numbers left")
    if child == 0:
        random.setstate(drawn)
    return child


# ------------- Files and privileges


def restrict_files(readable):
    """Drop all privileges, and deny every file access except reading below the paths `readable`. stat stays allowed."""
    _call("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))
    _call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: set-user-ID programs give no privileges back
    _call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: other processes of this user cannot look into this one
    version = _call("landlock_create_ruleset", None, 0, 1)  # LANDLOCK_CREATE_RULESET_VERSION
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)  # rights to files: all that this version knows
    attribute = struct.pack("=QQQ", (1 << rights) - 1, 3, 3)  # also TCP; abstract Unix sockets and signals
    attribute = attribute[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _call("landlock_create_ruleset", attribute, len(attribute), 0)
    for path in readable:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", 12 if os.path.isdir(path) else 4, descriptor)  # 4: read files; 8: list folders
        _call("landlock_add_rule", ruleset, 1, rule, 0)  # 1: LANDLOCK_RULE_PATH_BENEATH
        os.close(descriptor)
    _call("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


# ------------- The processes


class _Output(io.FileIO):
    """Descriptor 1, unbuffered, so that a kill loses nothing."""

    def write(self, data):
        """Write all of it. FileIO would stop at the limit without an error."""
        left = memoryview(data).cast("B")
        while left:
            left = left[super().write(left) :]
        return len(data)


class Process:
    """The current process: the warm interpreter, after a fork a first process, after another a candidate."""

    def __init__(self, readable):
        self.readable = readable
        self.channel = socket.socket(fileno=CHANNEL)
        self.ends_group = True  # the warm interpreter and the first processes
        self.limits = {}  # kind: (limit of foreign code, what is added while its errors are reported)
        self.filter_key = None
        self.host = None  # becomes readable when the host has ended, even if a fork of it still has the channels
        with suppress(AttributeError, OSError):
            self.host = os.pidfd_open(os.getppid())
        self.step = 0
        self.numbers = itertools.count()  # of tool calls
        self.renew()
        self.main = sys.modules["__main__"] = types.ModuleType("__main__")
        self.given = {"__builtins__": builtins, "final_answer": self.final_answer}

    def renew(self):
        """Make new locks and queues: in a fork, the old ones may be held by a thread that only the parent has."""
        self.writing = threading.RLock()
        self.calls = threading.Semaphore(CALLS)
        self.reading = False  # a thread reads the channel; otherwise, the main thread does
        self.requests = SimpleQueue()  # of the host, from that thread
        self.forked = SimpleQueue()  # tells that thread that the main thread has forked
        self.replies = {}  # number of a tool call -> queue for its reply

    def serve(self):
        """Answer the host until it closes the channel."""
        try:
            while True:
                message, descriptors = self.requests.get() if self.reading else self.receive()
                given_up = select.select(descriptors[:1], [], [], 0)[0]  # the host has closed the other side
                child = not given_up and _fork(message.pop("key")) == 0
                if child:
                    os.dup2(descriptors[0], CHANNEL)
                    os.dup2(descriptors[1], 1)
                    os.dup2(descriptors[1], 2)
                for descriptor in descriptors:
                    if not child or descriptor > CHANNEL:  # it can be 1, if the code has closed that
                        os.close(descriptor)
                if child:
                    self.begin(message)
                elif self.reading:
                    self.forked.put(None)
        except EOFError:
            pass
        except BaseException:
            os.write(2, traceback.format_exc().encode("utf-8", "replace"))
        finally:
            if self.ends_group:
                os.killpg(0, signal.SIGKILL)
            os._exit(1)

    def receive(self):
        """Returns the host's next message and its descriptors. Raises EOFError if the channel is closed."""
        if self.host and self.host in select.select([CHANNEL, self.host], [], [])[0]:
            raise EOFError
        size, extra, _, _ = self.channel.recvmsg(4, socket.CMSG_SPACE(8))
        data = self.channel.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL) if len(size) == 4 else b""
        if not data:
            raise EOFError
        return json.loads(data), [number for *_, item in extra for number in struct.unpack("=2i", item)]

    def read(self):
        """Pass replies to the calls that wait, and requests to the main thread. Runs in a separate thread, because
        signal handlers of the code interrupt the main thread."""
        with suppress(EOFError):
            while True:
                message, descriptors = self.receive()
                if descriptors:
                    self.requests.put((message, descriptors))
                    self.forked.get()  # before that, no further message is received: the fork would have it, too
                else:
                    self.replies[message["reply"]].put(message)
        os._exit(1)

    def write(self, message):
        """Send what `pack` returned. No other thread and no signal handler can write in the middle of it."""
        with self.writing:
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                while message:
                    message = message[os.write(CHANNEL, message) :]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def begin(self, message):
        """In a fork: send the PID to the host, then run the action of its message, if there is one."""
        self.renew()
        self.ends_group = "tools" in message
        hello = {"pid": os.getpid()}
        if self.ends_group:
            os.setpgid(0, 0)
            self.given |= {name: self.make_tool(name, doc) for name, doc in message["tools"].items()}
            hello["missing"] = self.protect(**message)
        else:  # the first process has no filter, because it kills the others
            if self.host:
                os.close(self.host)
            if self.filter_key is not None:
                restrict_calls(self.filter_key)
            self.host = self.filter_key = None
        self.write(pack(hello))
        if "code" in message:
            self.write(pack({"done": self.run_action(message["code"])}))

    def protect(self, memory_mb, timeout, filter_key, contained, **_):
        """Set up every protection. Returns a list of what is missing."""
        self.memory_mb = memory_mb
        with suppress(OSError), open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()  # RLIMIT_AS limits the whole address space
            self.limits = {resource.RLIMIT_AS: (used + (memory_mb << 20), 64 << 20)}
        self.limits |= {resource.RLIMIT_NOFILE: (OPEN_FILES, 64), resource.RLIMIT_FSIZE: (OUTPUT_BYTES, 0)}
        self.limits |= {resource.RLIMIT_CPU: (math.ceil(timeout) + 1, 0), resource.RLIMIT_CORE: (0, 0)}
        self.set_limits(foreign=False)
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if the machine runs out of memory, this process ends before the host with its model
        if not SUPPORTED or not contained:
            return ["everything except time-outs and rlimits"]
        missing = []
        try:
            restrict_files(self.readable)
        except OSError as error:
            missing.append(f"Landlock ({error.strerror})")
        try:
            _call("seccomp", 2, 0, struct.pack("=I", ALLOW))  # SECCOMP_GET_ACTION_AVAIL
            self.filter_key = filter_key
        except OSError as error:
            missing.append(f"seccomp ({error.strerror})")
        return missing

    def set_limits(self, foreign):
        """Set the limits of foreign code, or slightly higher ones, with which its errors can be reported."""
        for kind, (limit, margin) in self.limits.items():
            with suppress(ValueError, OSError):  # the hard limit is lower already
                resource.setrlimit(kind, (limit if foreign else limit + margin, limit + margin))

    def run_action(self, code):
        """Run one action in this process. Returns its outcome."""
        process = os.getpid()
        self.step += 1
        self.final = False
        output = io.TextIOWrapper(_Output(1, "wb", closefd=False), "utf-8", "replace", "\n", write_through=True)
        sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = output
        sys.stdin = io.StringIO()
        vars(self.main).update(self.given)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self.set_limits(foreign=True)
        outcome = self.execute(code)
        with suppress(BaseException):  # of a signal handler
            deadline = time.monotonic() + PATIENCE
            for thread in threading.enumerate():
                if not thread.daemon and thread is not threading.current_thread():
                    thread.join(max(0.0, deadline - time.monotonic()))
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self.set_limits(foreign=False)
        if os.getpid() != process:  # without containment the code can fork, and this is its child
            os._exit(0)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no process here waits for its children
        return outcome | {"threads": _count() > self.reading}  # whether the code has left some running

    def execute(self, code):
        """Returns {"result"}, or {"error", "kind"}, or {} after a final answer."""
        filename = f"<step {self.step}>"
        lines = io.StringIO(code, None).readlines()  # splitlines() also splits at a form feed
        linecache.cache[filename] = (len(code), None, lines, filename)
        try:
            tree = ast.parse(code, filename)
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            body = compile(tree, filename, "exec", dont_inherit=True)
            last = last and compile(ast.Expression(last.value), filename, "eval", dont_inherit=True)
        except Exception as error:
            return {"error": _describe(error), "kind": "syntax"}
        try:
            exec(body, vars(self.main))
            value = eval(last, vars(self.main)) if last else None
            return {} if value is None or self.final else {"result": cut(repr(value))}
        except BaseException as error:
            self.set_limits(foreign=False)  # the code may have used up its memory
            if self.final:
                return {}
            number, note = getattr(error, "errno", None), ""
            if number == errno.EFBIG:
                note = f"; a step can print {OUTPUT_BYTES >> 10:,} KiB"
            if memory := isinstance(error, MemoryError) or number == errno.ENOMEM:
                note = f"; a step can allocate {self.memory_mb:,} MB"
            return {"error": _describe(error) + note, "kind": "memory" if memory else "runtime"}

    def final_answer(self, answer=None, *more):
        """End the action with this answer."""
        if more:
            raise TypeError(f"final_answer() takes 1 argument but {1 + len(more)} were given")
        try:
            message = checked({"final": _plain(answer, itertools.count())})
        except Exception:  # too deep, too large, or an object that cannot be read
            message = pack({"final": cut(str(answer))})
        with self.writing:
            if not self.final:
                self.write(message)  # at once, so that it counts even if the code catches SystemExit or is killed
            self.final = True
        raise SystemExit  # which ends a thread without a message

    def make_tool(self, name, doc):
        def tool(*args, **kwargs):
            number = next(self.numbers)
            replies = self.replies[number] = SimpleQueue()
            try:
                message = checked({"tool": name, "number": number, "args": args, "kwargs": kwargs})
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}() takes JSON values only: {error}") from None
            with self.calls:
                with self.writing:
                    if not self.reading:
                        start_new_thread(self.read, ())
                        self.reading = True
                    self.write(message)
                reply = replies.get()  # if a signal handler ends this, nobody waits for the reply
            if "error" not in reply:
                return reply["value"]
            kind, text = reply["error"], reply["message"]
            raise getattr(builtins, kind)(text) if kind in ERRORS else RuntimeError(f"{kind}: {text}")

        tool.__name__ = tool.__qualname__ = name
        tool.__doc__ = doc
        return tool


# ------------- What is sent to the host: results, errors, final answers


def _describe(error):
    """Returns the error's type and text, the first and the last line of the code that led to it, and what caused it."""
    text, frames, places = type(error).__name__, [], []
    with suppress(Exception):  # an error that the code made itself can have odd arguments
        if isinstance(error, SyntaxError) and error.lineno:
            text += f": {error.msg} (line {error.lineno}: {str(error.text or '').strip()})"
        else:
            text = "".join(traceback.format_exception_only(type(error), error)).strip()
            frames = [x for x in traceback.extract_tb(error.__traceback__) if x.filename.startswith("<step ")]
    for frame in frames[:1] + frames[1:][-1:]:
        name = "" if frame.name == "<module>" else f"in {frame.name}, "
        step = "" if frame.filename == frames[0].filename else f"{frame.filename[1:-1]}, "  # of an earlier step
        places.append(f"{name}{step}line {frame.lineno}: {frame.line}")
    text += f" ({'; '.join(places)})" if places else ""
    if error.__cause__:
        text += f", caused by {_describe(error.__cause__)}"
    return cut(text)


def _plain(value, count):
    """Returns the value as JSON, as a person would write it: numbers as numbers; fractions, complex numbers, intervals
    and formulas as text; tuples, sets and arrays as lists; the solution {x: 3} as "x = 3". count: of values so far."""
    if next(count) > MESSAGE_VALUES:
        raise ValueError("too many values")
    if isinstance(value, numpy.ndarray):
        value = list(value) if value.ndim else value.item()
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, numpy.bool_ | sympy.logic.boolalg.BooleanAtom):
        return bool(value)
    if isinstance(value, numbers.Rational):  # integers are rational
        return int(value) if value.denominator == 1 else str(value)
    if isinstance(value, numbers.Real | Decimal):
        number = float(value) if isinstance(value, float) else float(str(value))  # 0.1 for float32's 0.1
        return number if math.isfinite(number) else str(number)
    if isinstance(value, numbers.Complex):
        return str(complex(value)).strip("()").replace("j", "i")  # graders read i
    if isinstance(value, sympy.Interval | sympy.Union | sympy.core.relational.Relational):
        return sympy.latex(value).replace(r"\left", "").replace(r"\right", "")
    if isinstance(value, sympy.MatrixBase):
        value = value.tolist()
    if isinstance(value, Set | sympy.FiniteSet):
        value = sorted(value, key=str)
        with suppress(TypeError):  # symbols, for example, have no order
            value.sort()
    if isinstance(value, Mapping):
        items = {str(key): _plain(item, count) for key, item in value.items()}
        solution = items and all(isinstance(key, sympy.Symbol) for key in value)
        return ", ".join(f"{key} = {item}" for key, item in items.items()) if solution else items
    if isinstance(value, Sequence | ValuesView | sympy.Tuple) and not isinstance(value, bytes | bytearray | memoryview):
        items = [_plain(item, count) for item in value]
        solution = len(items) == 1 and isinstance(value[0], Mapping) and isinstance(items[0], str)
        return items[0] if solution else items
    return str(value)


# ------------- The warm interpreter


def _readable():
    """Returns the paths that foreign code can read: Python's libraries, time zones, MIME types."""
    paths = {*sys.path, *zoneinfo.TZPATH, *mimetypes.knownfiles, f"{sys.base_prefix}/lib"}
    paths |= {"/etc/localtime", "/dev/null", "/dev/urandom"}
    with suppress(OSError), open("/proc/self/maps") as maps:
        loaded = {line.split(maxsplit=5)[5].strip() for line in maps if ".so" in line}
        # Python's standard library loads others later, from the folder of the C library.
        paths |= loaded | {os.path.dirname(path) for path in loaded if os.path.basename(path).startswith("libc.")}
    return sorted(path for path in paths if os.path.exists(path))


def main(descriptor, packages):
    """Import what all sandboxes share, then serve the host. packages: folders to import from."""
    global numpy, sympy
    os.dup2(descriptor, CHANNEL)
    os.closerange(CHANNEL + 1, 1 << 16)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a first process must outlive the others
    if SUPPORTED:
        _call("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become children of this process
    paths = [path for path in sys.path[1:] if path.startswith((sys.prefix, sys.base_prefix))]
    sys.path[:] = dict.fromkeys(paths + packages)
    import numpy
    import sympy

    warnings.simplefilter("ignore", SyntaxWarning)  # such as a wrong escape in a string of the model's code
    warnings.filterwarnings("ignore", ".*multi-threaded.*", DeprecationWarning)  # Python 3.12, at a fork
    for generator in (random, numpy.random, sympy.core.random):
        generator.seed(0)
    make = numpy.random.default_rng
    numpy.random.default_rng = lambda seed=None: make(numpy.random.randint(1 << 31) if seed is None else seed)
    sys.set_int_max_str_digits(0)
    threading.stack_size(4 << 20)  # a fork keeps the address space of its parent's thread stacks
    os.environ.clear()
    sys.argv = [""]
    process = Process(_readable())
    gc.freeze()  # a garbage collection in a fork would copy every page of memory
    process.write(pack({"pid": os.getpid()}))
    process.serve()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
