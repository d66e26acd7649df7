"""The inside of the sandbox: the processes that run a language model's code, and their containment.

    warm interpreter        one per host process: has imported numpy and sympy
      first process         one per sandbox: sets up limits, Landlock and seccomp; runs no foreign code
        candidate           runs one action; if the host keeps it, it is the state, and forks the next candidates

Each is a `Process`: it forks whenever the host asks, and the fork does what the request says. It ends when its channel
is closed; a first process then kills all others of its sandbox. Foreign code can change everything in its own process,
and the host, sandbox.py, believes nothing that it sends.

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
import mmap
import numbers
import os
import platform
import random
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
from collections.abc import Collection, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext

TEXT_LIMIT = 10_000  # characters kept of the output, a result, an error, or an answer that JSON cannot hold
OUTPUT_BYTES = 1 << 20  # bytes that a step can print
OPEN_FILES = 64  # descriptors that the code can have open
# Types of a tool's exception that the code sees; others become a RuntimeError.
ERRORS = (
    "ValueError",
    "TypeError",
    "RuntimeError",
    "KeyError",
    "IndexError",
    "OSError",
    "ConnectionError",
    "TimeoutError",
)
PATIENCE = 0.3  # seconds that a step waits for threads that its code started and did not join
SIGNALS = signal.valid_signals()
CHANNEL = 3  # the descriptor of a process's channel to the host

# ------------- Messages between host and inside: JSON, framed by multiprocessing.connection

MESSAGE_BYTES = 1 << 20
MESSAGE_VALUES = 100_000  # a parsed value takes up to a hundred bytes
MESSAGE_DEPTH = 100  # lists within lists
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def _integer(text):
    if len(text) > 4300:  # Python's own limit, which foreign code may lift
        raise ValueError("an integer of more than 4,300 digits")
    return int(text)


def _decode(data):
    return json.loads(data, parse_int=_integer)


def pack(message):
    """Returns a message's bytes; half a surrogate pair becomes "?". Raises TypeError or ValueError if JSON cannot hold
    it, or if `unpack` would refuse it."""
    data = _encode(message).encode("utf-8", "replace")
    unpack(data)
    return data


def unpack(data):
    """Returns the message. Its size is checked before it is parsed. Raises ValueError."""
    if len(data) > MESSAGE_BYTES or len(data) - len(data.translate(None, b"[{,")) > MESSAGE_VALUES:
        raise ValueError(f"more than {MESSAGE_BYTES >> 20} MiB or {MESSAGE_VALUES:,} values")
    message = _decode(data)
    if _depth(message) > MESSAGE_DEPTH:
        raise ValueError(f"nested more than {MESSAGE_DEPTH} deep")
    _encode(message).encode()  # no infinity, no half of a surrogate pair
    return message


def _depth(value):
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, items), default=0)


def cut(text, limit=TEXT_LIMIT):
    """Returns the text; if it is longer than `limit`, its two ends with a note between them."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters not shown ...]\n{text[-half:]}"


# ------------- System calls. Those that are not listed are denied: network sockets, programs, signals to others,
# ptrace, mount, bpf, io_uring, all new system calls, and those that create, change or remove a file.

ARM = platform.machine() in ("aarch64", "arm64")
SUPPORTED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
CLONE = 220 if ARM else 56
KILL = 129 if ARM else 62
ALL_BITS = 0xFFFFFFFF
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# clone's flags: CLONE_THREAD with SIGHAND, VM, FS, FILES; the mask ignores flags such as SETTLS and CHILD_SETTID.
THREAD, THREAD_MASK = 0x10F00, 0x7E03FFFF
# (purpose, numbers on x86-64, numbers on arm64, [(argument, mask, values)]): each of these arguments must, under its
# mask, be one of its values.
CALLS = [
    ("read and write what is open", "0 1 3 8 17-20 32 33 292 436", "23 24 57 62-68 436", []),
    ("stat, list and enter folders", "4-6 21 79-81 89 137 138 217 262 267 269 332 439",
     "17 43 44 48-50 61 78-80 291 439", []),
    ("memory", "10-12 25 27 28 324", "214-216 226 232 233 283", []),
    ("pipes, pairs of sockets", "22 44 45 47 48 51 52 55 290 293", "19 59 204-207 209 210 212", []),
    ("poll, select, epoll, timerfd", "7 23 232 233 270 271 281 283 286 291", "20-22 72 73 85 86", []),
    ("threads, exit, wait", "24 60 61 158 186 202 204 218 231 247 273 309 334",
     "93-96 98 99 123 124 168 178 260 293", []),
    ("signals to itself", "13-15 34 127 128 130 131 219", "128 132-137 139", []),
    ("time and timers", "35-38 96 201 228-230", "101-103 113-115 169", []),
    ("IDs, limits, uname, getrandom", "39 63 97-100 102 104 107 108 110 111 115 118 120 121 124 318",
     "148 150 153 155 156 158 160 163 165 172-177 179 278", []),
    ("open", "2", "", [(1, WRITING, [0])]),
    ("openat", "257", "56", [(2, WRITING, [0])]),
    ("mmap, but no MAP_SHARED: candidates would share the mapping", "9", "222", [(3, 1, [0])]),
    ("clone, for a thread", "56", "220", [(0, THREAD_MASK, [THREAD])]),
    ("ioctl: FIONBIO, FIOCLEX, FIONCLEX", "16", "29", [(1, ALL_BITS, [0x5421, 0x5450, 0x5451])]),
    ("fcntl: duplicates, flags", "72", "25", [(1, ALL_BITS, [0, 1, 2, 3, 4, 1030])]),
    ("prlimit64: its own limits", "302", "261", [(0, ALL_BITS, [0])]),
    # asyncio needs an unnamed pair of stream sockets. A pair of datagram sockets could send to any address.
    ("socketpair", "53", "199", [(0, ALL_BITS, [1]), (1, 0xF, [1])]),
]  # fmt: skip
# BPF: (operation, instructions to skip if true, if false, value). Offsets are those of struct seccomp_data.
LOAD, MASK, EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
CALL, ARCHITECTURE, ARGUMENTS = 0, 4, 16
ALLOW, END, DENY, NO_SUCH_CALL = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name, *arguments):
    """Call a function of the C library. bytes are passed as pointers."""
    wide = [a if isinstance(a, bytes) or a is None else ctypes.c_ulong(a) for a in arguments]
    result = getattr(_libc, name)(*wide)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def numbers_of(calls):
    """Returns the numbers in one entry of CALLS."""
    ends = [part.split("-") for part in calls.split()]
    return [number for first, *last in ends for number in range(int(first), int((last or [first])[0]) + 1)]


def _rule(number, checks, verdict):
    """Returns the instructions that give the verdict on the call of this number if all checks hold."""
    body = [(RETURN, 0, 0, verdict)]
    for argument, mask, values in reversed(checks):
        last = len(values) - 1
        equals = [(EQUAL, last - i, 0 if i < last else len(body), value) for i, value in enumerate(values)]
        body = [(LOAD, 0, 0, int(ARGUMENTS + 8 * argument)), (MASK, 0, 0, mask), *equals, *body]
    return [(LOAD, 0, 0, CALL), (EQUAL, 0, len(body), number), *body]


def restrict_calls(key):
    """Deny every system call that is not listed. With the key (64 bits) in the sixth argument, which they do not use,
    clone may fork, and kill may end all processes of the sandbox."""
    program = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, 0xC00000B7 if ARM else 0xC000003E), (RETURN, 0, 0, END)]
    for _, *calls, checks in CALLS:
        for number in numbers_of(calls[ARM]):
            program += _rule(number, checks, ALLOW)
    keyed = [(5, ALL_BITS, [key & ALL_BITS]), (5.5, ALL_BITS, [key >> 32])]
    program += _rule(CLONE, [(0, ALL_BITS, [signal.SIGCHLD]), *keyed], ALLOW)
    program += _rule(KILL, [(0, ALL_BITS, [0]), (1, ALL_BITS, [signal.SIGKILL]), *keyed], ALLOW)
    # clone3 (435) has its flags in memory, where a filter cannot check them. The C library falls back to clone.
    program += [*_rule(435, [], NO_SUCH_CALL), (RETURN, 0, 0, DENY)]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filters = struct.pack("=H6xQ", len(program), ctypes.addressof(buffer))
    _call("prctl", 22, 2, filters, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _keyed_call(number, first, second, key):
    return ctypes.PyDLL(None).syscall(*map(ctypes.c_ulong, (number, first, second, 0, 0, 0, key)))


def _fork(key):
    """Fork with the key that the filter asks for. Returns 0 in the child.

    The child continues the parent's random numbers, which Python would seed again.
    """
    drawn = random.getstate()
    if SUPPORTED:
        ctypes.pythonapi.PyOS_BeforeFork()
        child = _keyed_call(CLONE, signal.SIGCHLD, 0, key)
        (ctypes.pythonapi.PyOS_AfterFork_Parent if child else ctypes.pythonapi.PyOS_AfterFork_Child)()
    else:
        child = os.fork()
    if child == 0:
        random.setstate(drawn)
    return child


def restrict_files(readable):
    """Drop all privileges, and deny every file access except reading below the paths `readable`. stat stays allowed."""
    _call("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))
    _call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: set-user-ID programs give no privileges back
    _call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: other processes of this user cannot look into this one
    # The first version's rights to files; the filter of system calls denies what later versions add.
    ruleset = _call("syscall", 444, struct.pack("=Q", (1 << 13) - 1), 8, 0)  # landlock_create_ruleset
    for path in readable:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", 12 if os.path.isdir(path) else 4, descriptor)  # 4: read files; 8: list folders
        _call("syscall", 445, ruleset, 1, rule, 0)  # landlock_add_rule: LANDLOCK_RULE_PATH_BENEATH
        os.close(descriptor)
    _call("syscall", 446, ruleset, 0)  # landlock_restrict_self
    os.close(ruleset)


# ------------- The processes


class Process:
    """The current process: the warm interpreter, after a fork a first process, after another a candidate."""

    def __init__(self, readable):
        self.readable = readable
        self.socket = socket.socket(fileno=CHANNEL)
        self.channel = Connection(CHANNEL)
        self.key = None  # a first process has it, and ends the others with it
        self.limits = {}  # kind: (limit of foreign code, what is added while its errors are reported)
        self.step = 0
        # Foreign code has its own builtins: what it replaces there, Python's library and this file still have.
        own = sys.modules["builtins"] = types.ModuleType("builtins")
        vars(own).update(vars(builtins))
        self.main = sys.modules["__main__"] = types.ModuleType("__main__")
        self.given = {"__builtins__": own, "final_answer": self.final_answer}

    def serve(self):
        """Answer the host until it closes the channel."""
        try:
            while True:
                key, extra, _, _ = self.socket.recvmsg(8, socket.CMSG_SPACE(8))
                if not key:
                    break
                descriptors = struct.unpack("=2i", extra[0][2])  # of the fork's channel and output
                given_up = select.poll()
                given_up.register(descriptors[0], 0)  # the host has closed the other side
                child = not given_up.poll(0) and _fork(int.from_bytes(key, "big")) == 0
                if child:
                    self.key = None
                    os.dup2(descriptors[0], CHANNEL)
                    os.dup2(descriptors[1], 1)
                    os.dup2(descriptors[1], 2)
                for descriptor in descriptors:
                    if not child or descriptor > CHANNEL:  # it can be 1, if the code has closed that
                        os.close(descriptor)
                if child:
                    self.begin(**_decode(self.channel.recv_bytes()))  # the parent does not see the code
        except BaseException:
            os.write(2, traceback.format_exc().encode("utf-8", "replace"))
        finally:
            if self.key and SUPPORTED:
                _keyed_call(KILL, 0, signal.SIGKILL, self.key)
            elif self.key:
                os.killpg(0, signal.SIGKILL)
            os._exit(1)

    def begin(self, code=None, settings=None):
        """In a fork: set up the protection of a new sandbox, or run an action, or only be the next state."""
        # New locks: a thread of the parent, which the fork does not have, may hold the old ones.
        self.calling = threading.Lock()  # from a tool call to its reply
        self.writing = threading.RLock()
        missing = self.protect(**settings) if settings else []
        self.write(pack({"pid": os.getpid(), "missing": missing}))
        if code is not None:
            self.write(pack({"done": self.run_action(code)}))

    def protect(self, key, tools, memory_mb, timeout, contained):
        """Set up every protection. Returns a list of what is missing."""
        self.key = key
        self.timeout = timeout
        os.setpgid(0, 0)
        self.given |= {name: self.make_tool(name, doc) for name, doc in tools.items()}
        with suppress(OSError), open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()  # RLIMIT_AS limits the whole address space
            self.limits = {resource.RLIMIT_AS: (used + (memory_mb << 20), 64 << 20)}
        self.limits |= {resource.RLIMIT_NOFILE: (OPEN_FILES, 64), resource.RLIMIT_FSIZE: (OUTPUT_BYTES, 0)}
        self.limits[resource.RLIMIT_CORE] = 0, 0
        self.set_limits(foreign=False)
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if the machine runs out of memory, this process ends before the host with its model
        if not SUPPORTED or not contained:
            return ["everything except time-outs and rlimits"]
        missing = []
        for name, restrict, argument in ("Landlock", restrict_files, self.readable), ("seccomp", restrict_calls, key):
            try:
                restrict(argument)
            except OSError as error:
                missing.append(f"{name} ({error.strerror})")
        return missing

    def set_limits(self, foreign):
        """Set the limits of foreign code, or slightly higher ones, with which its errors can be reported."""
        for kind, (limit, margin) in self.limits.items():
            with suppress(ValueError, OSError):  # the hard limit is lower already
                resource.setrlimit(kind, (limit if foreign else limit + margin, limit + margin))

    def run_action(self, code):
        """Run one action in this process. Returns its result, error, kind of error, and whether threads are left."""
        process, began = os.getpid(), time.monotonic()
        self.step += 1
        # Unbuffered, so that a kill loses nothing.
        output = io.TextIOWrapper(io.FileIO(1, "wb", closefd=False), "utf-8", "replace", "\n", write_through=True)
        sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = output
        sys.stdin = io.StringIO()
        vars(self.main).update(self.given)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # without containment, the code may wait for its children
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        outcome = self.execute(code)
        sys.settrace(None)
        sys.setprofile(None)
        with suppress(BaseException):  # of a signal handler
            signal.setitimer(signal.ITIMER_REAL, 0)  # its alarm must not reach a thread that is left
            self.wait_for_threads(began + self.timeout - PATIENCE)
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        sys.stdout = sys.stderr = output  # an object of the code's may close the descriptor when it is replaced
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self.calling.acquire()  # a call that a thread has begun ends first, and no other begins
        self.set_limits(foreign=False)
        if os.getpid() != process:  # without containment the code can fork, and this is its child
            os._exit(0)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        return [*outcome, len(sys._current_frames()) > 1]

    def wait_for_threads(self, end):
        """Wait PATIENCE for threads that the code did not join, and longer while one of them calls a tool."""
        threads = [thread for thread in threading.enumerate() if not thread.daemon]
        threads.remove(threading.current_thread())
        deadline = time.monotonic() + PATIENCE
        while any(map(threading.Thread.is_alive, threads)) and time.monotonic() < min(deadline, end):
            if self.calling.locked():
                deadline = time.monotonic() + PATIENCE
            time.sleep(0.001)

    def execute(self, code):
        """Returns the result as text, the error, and its kind; each can be None."""
        filename = f"<step {self.step}>"
        lines = io.StringIO(code, None).readlines()  # splitlines() also splits at a form feed
        linecache.cache[filename] = (len(code), None, lines, filename)
        try:
            tree = ast.parse(code, filename)
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            body = compile(tree, filename, "exec", dont_inherit=True)
            last = last and compile(ast.Expression(last.value), filename, "eval", dont_inherit=True)
        except Exception as error:
            return None, _describe(error), "syntax"
        # Address space, without memory; freed where an error is handled, because the code may have used up all.
        self.reserve = mmap.mmap(-1, 4 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.set_limits(foreign=True)
        try:
            exec(body, vars(self.main))
            value = eval(last, vars(self.main)) if last else None
            return None if value is None else cut(repr(value)), None, None
        except BaseException as error:
            self.reserve.close()
            self.set_limits(foreign=False)
            if isinstance(error, SystemExit) and isinstance(error.code, int | None) and not error.code:
                return None, None, None  # sys.exit(0), and a final answer
            memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
            return None, _describe(error), "memory" if memory else "runtime"

    def write(self, message):
        with self.writing:
            self.channel.send_bytes(message)

    def exchange(self, message):
        """Send a tool call. Returns the reply."""
        with self.calling:
            self.set_limits(foreign=False)  # half a reply would be taken for the next
            try:
                self.write(message)
                return _decode(self.channel.recv_bytes())
            finally:
                self.set_limits(foreign=True)

    def final_answer(self, answer=None, *more):
        """End the action with this answer."""
        if more:
            raise TypeError(f"final_answer() takes 1 argument but {1 + len(more)} were given")
        if isinstance(answer, types.MethodType) and answer.__self__ is self:  # after `final_answer = 42`
            raise TypeError("final_answer() was given itself: its name cannot be used for a variable")
        try:
            message = pack({"final": _plain(answer, itertools.count())})
        except Exception:  # too deep, too large, or an object that cannot be read
            message = pack({"final": cut(str(answer))})
        self.write(message)  # at once, so that it counts even if the code catches SystemExit or is killed
        raise SystemExit  # which ends a thread without a message

    def make_tool(self, name, doc):
        def tool(*args, **kwargs):
            try:
                message = pack({"tool": name, "args": args, "kwargs": kwargs})
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}() takes JSON values only: {error}") from None
            # In another thread, which a signal handler of the code cannot interrupt; nor can it the thread's start.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            try:
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
                self.set_limits(foreign=False)  # for the thread's stack; exchange sets them back
                future = ThreadPoolExecutor(1).submit(self.exchange, message)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            reply = future.result()
            if "error" not in reply:
                return reply["value"]
            kind, text = reply["error"], reply["message"]
            raise getattr(builtins, kind)(text) if kind in ERRORS else RuntimeError(f"{kind}: {text}")

        tool.__name__ = tool.__qualname__ = name
        tool.__doc__ = doc
        return tool


# ------------- What is sent to the host: errors and final answers


def _describe(error):
    """Returns the error's type and text, the first and the last line of the code that led to it, and what caused it."""
    text, frames, places = type(error).__name__, [], []
    with suppress(Exception):  # an error that the code made itself can have odd arguments
        if isinstance(error, SyntaxError) and error.lineno:
            line = error.text or linecache.getline(str(error.filename), error.lineno)
            text += f": {error.msg} (line {error.lineno}: {str(line).strip()})"
        else:
            text = "".join(traceback.format_exception_only(error)).strip()
        for frame, number in traceback.walk_tb(error.__traceback__):  # there may be a million
            if frame.f_code.co_filename.startswith("<step "):
                frames = [*frames[:1], (frame.f_code.co_name, frame.f_code.co_filename, number)]
        for name, filename, number in frames:
            name = "" if name == "<module>" else f"in {name}, "
            step = "" if filename == frames[0][1] else f"{filename[1:-1]}, "  # of an earlier step
            places.append(f"{name}{step}line {number}: {linecache.getline(filename, number).strip()[:200]}")
        text += f" ({'; '.join(places)})" if places else ""
        if isinstance(error, BaseExceptionGroup):
            text += "; ".join(["", *map(_describe, error.exceptions[:3])])
        text += f", caused by {_describe(error.__cause__)}" if error.__cause__ else ""
    return cut(text)


def _plain(value, count):
    """Returns the value as JSON: numbers as numbers; tuples, sets and arrays as lists; fractions, decimals, complex
    numbers and SymPy's formulas as text. count: of the values so far."""
    if next(count) > MESSAGE_VALUES:
        raise ValueError("too many values")
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, numbers.Rational):  # integers are rational
        return int(value) if value.denominator == 1 else str(value)
    if isinstance(value, numbers.Real):
        number = float(str(value))  # 0.1 for float32's 0.1
        if abs(number) >= 2**53 and not isinstance(value, float) and number < math.inf and not value - int(value):
            return int(value)  # of mpmath and SymPy, which may have more digits
        return number if math.isfinite(number) else str(number)
    if type(value).__name__ in ("BooleanTrue", "BooleanFalse"):  # SymPy's
        return bool(value)
    value = value.A if type(value).__name__ == "matrix" else value  # NumPy's, whose rows are matrices again
    if hasattr(value, "tolist"):  # of NumPy and SymPy
        value = list(value) if getattr(value, "ndim", 0) else value.tolist()
        return _plain(value, count)
    if isinstance(value, Mapping) or (hasattr(value, "items") and hasattr(value, "keys")):  # SymPy's Dict
        return {str(key): _plain(item, count) for key, item in value.items()}
    if isinstance(value, Set):  # equal sets are the same answer
        value = sorted(value, key=str)
        with suppress(TypeError):
            value.sort()
    if isinstance(value, Collection | Iterator) and type(value).__name__ not in ("bytes", "bytearray", "EmptySet"):
        return [_plain(item, count) for item in value]
    value = value.as_expr() if hasattr(value, "as_expr") else value  # of a SymPy polynomial
    return str(value).removesuffix(", 0:00:00")  # days


# ------------- The warm interpreter

_submit = ThreadPoolExecutor.submit


def submit(pool, /, *args, **kwargs):
    """ThreadPoolExecutor.submit, also for a pool of an earlier step, whose threads a fork does not have."""
    if not any(thread.is_alive() for thread in pool._threads):
        pool._threads.clear()
        pool._idle_semaphore = threading.Semaphore(0)
    return _submit(pool, *args, **kwargs)


def main(descriptor, packages):
    """Import what all sandboxes share, then serve the host. packages: folders to import from."""
    os.dup2(descriptor, CHANNEL)
    os.closerange(CHANNEL + 1, 1 << 16)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no process here waits for its children
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a first process must outlive the others
    if SUPPORTED:
        _call("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become children of this process
    paths = [path for path in sys.path[1:] if path.startswith((sys.prefix, sys.base_prefix))]
    sys.path[:] = dict.fromkeys(paths + packages)
    import numpy
    import sympy

    warnings.simplefilter("ignore", SyntaxWarning)  # such as a wrong escape in a string of the model's code
    warnings.filterwarnings("ignore", ".*multi-threaded.*", DeprecationWarning)  # Python 3.12, at a fork
    ThreadPoolExecutor.submit = submit
    BaseContext.Lock = lambda self: threading.Lock()  # for ThreadPool: a lock between processes needs a file
    for generator in (random, numpy.random, sympy.core.random):
        generator.seed(0)
    make = numpy.random.default_rng
    numpy.random.default_rng = lambda seed=None: make(numpy.random.randint(1 << 31) if seed is None else seed)
    sys.set_int_max_str_digits(0)
    threading.stack_size(4 << 20)  # a fork keeps the address space of its parent's thread stacks
    os.environ.clear()
    sys.argv = [""]
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_prefix}/lib", *sys.path]
    others = [*zoneinfo.TZPATH, "/etc/localtime", *mimetypes.knownfiles, "/dev/null", "/dev/urandom"]
    process = Process([path for path in libraries + others if os.path.exists(path)])
    gc.freeze()  # a garbage collection in a fork would copy every page of memory
    process.channel.send_bytes(b"ready")
    process.serve()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
