"""The code sandbox: runs Python that a language model wrote, in forked processes that the kernel contains.

    with Sandbox(tools={"web_search": search}, timeout=10.0, memory_mb=1024) as sandbox:
        observation = sandbox.run("x = 6 * 7\\nx")                    # variables persist between runs, as in a REPL
        observations = sandbox.run_candidates(["x + 1", "x / 0"])    # each from the same state, at the same time
        sandbox.commit(0)                                            # this candidate's state becomes the state

A state is a process, and a candidate is its fork. The first half of this file runs in the host, the second half inside:

    host process (Sandbox)                        has a channel to each process below: JSON, nothing is unpickled
      warm interpreter (_warm_loop)               imports numpy and sympy, once per host process
        state (_State), one per sandbox           waits; forks itself once per candidate
          candidate (_State)                      runs one action; if it is committed, it becomes the state
        guard (_guard), one per sandbox           kills the sandbox's process group when the host is done or has ended

The code finds the tools and final_answer as functions, which are defined again at every step, and the variables of
earlier steps. Threads end with their step. `random` and `numpy.random` draw the same numbers in every new sandbox
unless they are seeded. final_answer(x) raises a SystemExit; if the code catches it, the answer still stands.

Covered, on Linux 5.13 and later, as root or not (common/contain.py sets up each protection):
  files       only the interpreter's libraries can be read; nothing can be written, created, renamed or removed
              (Landlock, seccomp)
  network     no sockets except unnamed pairs (seccomp)
  processes   no exec, no fork except those that the host asks for, at most THREADS threads per step; no signal, ptrace
              or memory access to any process (Landlock, seccomp with a gate in the host)
  resources   wall clock: SIGKILL from outside; memory: RLIMIT_AS per process, on top of the warm interpreter, so N
              candidates can have N times as much; rlimits for CPU time, open files and printed output
  the host    an empty environment, no inherited descriptors; no process outlives the host
Not covered: bugs of the kernel; side channels; CPU use up to the time-out; stat() on any path (it tells whether a file
exists, and its size); pipes that a step leaves open, which the candidates of the next step share; the tools, which run
in the host, perhaps in several threads, with whatever arguments the code passes. A tool that hangs is left behind in
its thread. If a container manager already uses seccomp's gate, the code can start processes, which end with the
sandbox. On macOS, on other processors and with isolation="off", only time-outs and rlimits hold, and programs that the
code starts may outlive it.
"""

import ast
import builtins
import dataclasses
import errno
import gc
import io
import json
import linecache
import math
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import types
import warnings
from contextlib import AbstractContextManager, suppress
from multiprocessing.connection import Connection, Pipe, wait

if __name__ == "__main__" and sys.argv[1:2] == ["inside"]:
    sys.path[0] += "/common"  # without the package itself, which imports more than the inside needs
    import contain
else:
    from common import InputError, contain

TEXT_LIMIT = 10_000  # characters kept of what is printed, of a result and of an error
OUTPUT_BYTES = 1 << 20  # bytes that a step can print; writing more raises OSError in the code
OPEN_FILES = 64  # descriptors that the code can have open
THREADS = 256  # threads that the candidates of one step can start together
CHANNEL = 3  # the descriptor of a process's channel to the host


def _cut(text, limit=TEXT_LIMIT):
    """Returns the text; if it is longer than `limit`, its two ends with a note between them."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters not shown ...]\n{text[-half:]}"


# ------------- The host's half: nothing that a process sends is trusted, and none can make it wait beyond the time-out


@dataclasses.dataclass
class Observation:
    """What one action did."""

    stdout: str = ""  # what was printed, stderr included; cut in the middle to TEXT_LIMIT characters
    result: str | None = None  # repr of the last expression; None if there is none, or if its value is None
    error: str | None = None  # one message
    error_kind: str | None = None  # None, "syntax", "runtime", "timeout", "memory" or "killed"
    is_final: bool = False  # final_answer was called
    final_answer: object = None  # its argument: a JSON value; anything else as its str()
    seconds: float = 0.0

    def fail(self, kind, error):
        """Set the error. A final answer stands, whatever happens after it."""
        if not self.is_final:
            self.error, self.error_kind = error, kind
        return self


class Sandbox(AbstractContextManager):
    """Runs untrusted Python; variables persist from run to run. The module's docstring lists what is covered.

    tools: {name: function}. Functions run in this process, perhaps in several threads at once, and take and return
    JSON values. The code sees their exceptions, except an InputError: run and run_candidates raise it in the host.
    timeout: seconds of wall clock per step. memory_mb: what a step's process can allocate.
    isolation: "auto" warns once if a protection is missing on this machine, "require" raises InputError instead,
    "off" has time-outs and rlimits only. Raises InputError for bad arguments.
    Threads can use different sandboxes at once; calls on one sandbox wait for each other.
    """

    def __init__(self, tools=None, timeout=10.0, memory_mb=1024, isolation="auto"):
        if isolation not in ("auto", "require", "off"):
            raise InputError(f'isolation is "auto", "require" or "off", not {isolation!r}')
        if not timeout > 0 or not math.isfinite(timeout) or not memory_mb >= 1:
            raise InputError(f"timeout and memory_mb must be positive, not {timeout!r} and {memory_mb!r}")
        for name, function in (tools or {}).items():
            if not (isinstance(name, str) and name.isidentifier() and callable(function)) or name == "final_answer":
                raise InputError(f"tools must map names to functions; {name!r}: {function!r} does not fit")
        self.tools, self.timeout, self.memory_mb = dict(tools or {}), float(timeout), int(memory_mb)
        self.isolation, self.lock, self.closed, self.candidates = isolation, threading.RLock(), False, []
        self._start()

    def _start(self):
        """Fork a new state from the warm interpreter."""
        self.state, self.gate = contain.Process(Observation()), None
        self.guard, theirs = Pipe()
        self.state.fork_from(_warm_interpreter().control, theirs.fileno(), self.state.remote.fileno())
        theirs.close()
        self.state.send({
            "tools": {name: str(function.__doc__ or "") for name, function in self.tools.items()},
            "timeout": self.timeout, "memory_mb": self.memory_mb, "contained": self.isolation != "off",
        })  # fmt: skip
        gate = self.state.hello(60, with_gate=True)
        if gate is not None:
            self.gate = contain.Gate(gate, self.state.pid)
            threading.Thread(target=self.gate.serve, daemon=True).start()
        missing = self.state.receive()["missing"]
        if missing and self.isolation != "off":
            text = "the sandbox is not fully contained here; missing: " + ", ".join(missing)
            if self.isolation == "require":
                self.close()
                raise InputError(text)
            warnings.warn(text, RuntimeWarning, stacklevel=1)  # Python shows it once: the place is always this line

    def close(self, *exception):
        """Kill every process of this sandbox."""
        with self.lock:
            self.closed = True
            self._lose_state()

    __exit__ = close

    def _lose_state(self):
        self._drop_candidates()
        if self.state:
            self.state.kill()
            with suppress(OSError):
                self.guard.send_bytes(b"end")  # the guard kills the whole process group
            self.guard.close()
        self.state = None

    def run(self, code):
        """Run one action on the state. The state changes unless the action times out or its process ends."""
        with self.lock:
            [observation] = self.run_candidates([code])
            self.commit(0)
            return observation

    def run_candidates(self, codes):
        """Run each code on a copy of the state, all at the same time. The state stays as it is until one is committed.

        Returns one Observation per code, in the same order. The next run drops candidates that were not committed.
        """
        codes = list(codes)
        if len(codes) > 100 or not all(isinstance(code, str) for code in codes):
            raise ValueError("codes must be strings, at most 100 at once")
        with self.lock:
            if self.closed:
                raise RuntimeError("the sandbox is closed")
            if self.state is None or not self.state.usable():
                self._lose_state()
                self._start()
            self._drop_candidates()
            try:
                return self._run(codes)
            except BaseException:  # Ctrl-C: stop what is running
                self._lose_state()
                raise

    def commit(self, index):
        """Make candidate `index` of the last run_candidates the state.

        A candidate that timed out or whose process ended has no state; the state from before the step stays.
        """
        with self.lock:
            if self.closed or not self.candidates:
                raise RuntimeError("there are no candidates to commit: call run_candidates first")
            chosen = self.candidates[index]
            if chosen.usable():
                self.candidates.remove(chosen)
                self.state.kill()
                self.state = chosen
            self._drop_candidates()

    def _drop_candidates(self):
        for candidate in self.candidates:
            candidate.kill()
        self.candidates = []

    def _run(self, codes):
        candidates = self.candidates = [contain.Process(Observation()) for _ in codes]
        if not self._fork(candidates):
            # A process that never said who it is can only be killed together with all others.
            self._lose_state()
            self.candidates = candidates
            text = "the process that holds the state did not answer; the next step starts with an empty state"
            return [candidate.observation.fail("killed", text) for candidate in candidates]
        started = time.monotonic()
        threads = [
            threading.Thread(target=self._listen, args=(candidate, candidate.observation, code, started), daemon=True)
            for candidate, code in zip(candidates, codes, strict=True)
        ]
        for thread in threads:
            thread.start()
        for candidate, thread in zip(candidates, threads, strict=True):
            thread.join(max(0.0, started + self.timeout - time.monotonic()))
            if thread.is_alive():  # it ends as soon as the process is killed, or when its tool call returns
                candidate.kill()
                text = f"TimeoutError: the code ran longer than {self.timeout:g} s and was stopped"
                # A copy, because the thread can still write to the old one.
                candidate.observation = dataclasses.replace(candidate.observation, seconds=time.monotonic() - started)
                candidate.observation.fail("timeout", f"{text}; the state is as it was before")
        self.state.signal(signal.SIGSTOP)  # stops threads that a step left behind, until the next step
        for candidate in candidates:
            if candidate.failure:
                raise candidate.failure
            candidate.observation.stdout = _cut(candidate.printed(OUTPUT_BYTES))
        return [candidate.observation for candidate in candidates]

    def _fork(self, candidates):
        """Have the state fork once per candidate. Returns False if it does not do so within the time-out."""
        if self.gate:
            self.gate.forker = self.state.pid
            self.gate.left = {"fork": len(candidates), "thread": THREADS}
        self.state.signal(signal.SIGCONT)
        try:
            for candidate in candidates:
                candidate.fork_from(self.state.channel, candidate.remote.fileno(), candidate.output)
            deadline = time.monotonic() + self.timeout + 0.1
            for candidate in candidates:
                candidate.hello(max(0.0, deadline - time.monotonic()))
        except (OSError, EOFError):
            return False
        finally:
            if self.gate:
                self.gate.left["fork"] = 0
        # A hostile state could answer instead of forking.
        return len({self.state.pid, *(candidate.pid for candidate in candidates)}) == 1 + len(candidates)

    def _listen(self, candidate, observation, code, started):
        """Run one candidate's action: send the code and answer tool calls until it is done. Runs in its own thread."""
        try:
            candidate.send({"code": code})
            while "done" not in (message := candidate.receive()):
                if "tool" in message:
                    candidate.send(self._call(message))
                elif "final" not in message:
                    raise ValueError("unknown message")
                elif not observation.is_final:  # the first answer stands
                    observation.is_final, observation.final_answer = True, message["final"]
            outcome = message["done"] if isinstance(message["done"], dict) else {}
            result, error, kind = (outcome.get(key) for key in ("result", "error", "kind"))
            known = error is None or kind in ("syntax", "runtime", "memory")
            if not (isinstance(result, str | None) and isinstance(error, str | None) and known):
                raise ValueError("malformed result")
            candidate.signal(signal.SIGSTOP)
            observation.result = result and _cut(result, 2 * TEXT_LIMIT)  # honest processes have cut it already
            if error is not None:
                observation.fail(kind, _cut(error, 2 * TEXT_LIMIT))
        except (OSError, EOFError):
            candidate.kill()
            observation.fail("killed", "the Python process ended before the code did; the state is as it was before")
        except ValueError as error:
            candidate.kill()
            observation.fail("killed", f"the process was stopped because of what it sent to the host: {error}")
        except InputError as error:
            candidate.kill()
            candidate.failure = error
        observation.seconds = time.monotonic() - started

    def _call(self, message):
        """Run a tool in this thread. Returns the reply. If the tool hangs, so does this thread, but not run()."""
        name, args, kwargs = (message.get(key) for key in ("tool", "args", "kwargs"))
        if not isinstance(name, str) or name not in self.tools or type(args) is not list or type(kwargs) is not dict:
            raise ValueError("malformed tool call")
        try:
            reply = {"value": self.tools[name](*args, **kwargs)}
            json.dumps(reply)
            return reply
        except InputError:
            raise
        except BaseException as error:
            text = error.args[0] if len(error.args) == 1 and isinstance(error.args[0], str) else str(error)
            return {"error": type(error).__name__, "message": text or type(error).__name__}


class _Warm:
    """The host's handle on the warm interpreter."""

    def __init__(self):
        self.owner = os.getpid()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # 64 sandboxes with 8 candidates each need 2,000
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
        self.control, theirs = Pipe()
        # A library's threads would not survive a fork. With random hashes, sets would print in another order each time.
        environment = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment |= {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C.UTF-8"}
        environment["GLIBC_TUNABLES"] = "glibc.malloc.arena_max=1"  # an arena per thread would use up RLIMIT_AS
        self.process = subprocess.Popen(
            [sys.executable, "-s", os.path.abspath(__file__), "inside", str(theirs.fileno())],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is the host's to handle
        )
        theirs.close()
        packages = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
        try:
            self.control.send_bytes(json.dumps(packages).encode())
            self.control.recv_bytes(100)
        except (OSError, EOFError):
            lines = self.process.stderr.read().decode("utf-8", "replace").strip()
            raise RuntimeError(f"the sandbox's interpreter did not start: {lines[-2000:]}") from None


_warm_lock = threading.Lock()
_warm = None  # one per host process; a fork of the host starts its own


def _warm_interpreter():
    global _warm
    with _warm_lock:
        if _warm is None or _warm.owner != os.getpid() or _warm.process.poll() is not None:
            _warm = _Warm()
        return _warm


# ------------- The inside, started as `python -s sandbox.py inside FD`: foreign code can change all of its own process


def _warm_loop(descriptor):
    """Import numpy and sympy, then fork a state and its guard for each sandbox, until the host has ended."""
    control = Connection(descriptor)
    host = [os.pidfd_open(os.getppid())] if contain.LINUX else []
    packages = json.loads(control.recv_bytes())
    prefixes = (sys.prefix, sys.base_prefix)
    sys.path[:] = list(dict.fromkeys([path for path in sys.path[1:] if path.startswith(prefixes)] + packages))
    libraries = _prepare()
    contain.adopt_orphans()
    control.send_bytes(b"ready")
    os.dup2(0, 2)  # /dev/null; until here, stderr was a pipe to the host
    with suppress(EOFError):
        while wait([control, *host]) == [control]:
            guard, channel = _receive_descriptors(control)
            if (state := _fork()) == 0:
                try:
                    _State(channel, libraries).serve()
                finally:
                    os._exit(1)
            os.close(channel)
            with suppress(OSError):  # whichever of the two processes runs first makes the group
                os.setpgid(state, state)
            if _fork() == 0:
                _guard(guard, host, group=state)
            os.close(guard)
    os._exit(0)


def _prepare():
    """Import what all sandboxes share. Returns the paths that foreign code can read."""
    import numpy
    import sympy  # noqa: F401

    warnings.simplefilter("ignore", SyntaxWarning)  # such as a wrong escape in a string of the model's code
    warnings.filterwarnings("ignore", ".*multi-threaded.*", DeprecationWarning)  # Python 3.12, at a fork
    random.seed(0)
    numpy.random.seed(0)
    sys.set_int_max_str_digits(0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no process here waits for its children
    folders = set(sys.path)
    if contain.LINUX:  # and the folders of the shared libraries that are loaded
        with open("/proc/self/maps") as maps:
            folders |= {os.path.dirname(line.split(maxsplit=5)[5].strip()) for line in maps if ".so" in line}
    os.environ.clear()
    sys.argv = [""]
    sys.modules.pop("contain")
    sys.modules["__main__"] = types.ModuleType("__main__")
    gc.freeze()  # a garbage collection in a fork would copy every page of memory
    return [path for path in (*sorted(folders), "/dev/null", "/dev/urandom") if os.path.exists(path)]


def _receive_descriptors(connection):
    """Wait for a request to fork. Returns its two descriptors. Raises EOFError if the other side has ended."""
    with contain.open_socket(connection) as channel:
        _, descriptors, _, _ = socket.recv_fds(channel, 1, 2)
    if len(descriptors) != 2:
        raise EOFError
    return descriptors


def _fork():
    """os.fork(), but the child continues the parent's random numbers; Python would seed `random` again."""
    drawn = random.getstate()
    child = os.fork()
    if child == 0:
        random.setstate(drawn)
    return child


def _guard(guard, host, group):
    """Join a sandbox's process group, and kill the group when the host says so or has ended."""
    try:
        os.setpgid(0, group)  # OSError: all of its processes have ended already
        wait([guard, *host])
        os.killpg(0, signal.SIGKILL)
    finally:
        os._exit(0)


class FinalAnswer(SystemExit):
    """Raised by final_answer to end the action. Python ignores a SystemExit that ends a thread."""


class _State:
    """A process that holds a sandbox's state: it waits, and forks itself for every candidate."""

    def __init__(self, channel, libraries):
        os.setpgid(0, 0)
        os.dup2(channel, CHANNEL)
        os.closerange(CHANNEL + 1, 1 << 16)
        self.channel = Connection(CHANNEL)
        self.settings = json.loads(self.channel.recv_bytes())
        self.step, self.final, self.lock, self.main = 0, False, None, sys.modules["__main__"]
        self.given = {"final_answer": self.final_answer}
        self.given |= {name: self.make_tool(name, doc) for name, doc in self.settings["tools"].items()}
        gate, missing = self.protect(libraries)
        with contain.open_socket(self.channel) as channel:
            socket.send_fds(channel, [struct.pack("=i", os.getpid())], [] if gate is None else [gate])
        os.closerange(CHANNEL + 1, 1 << 16)  # the gate
        self.send({"missing": missing})

    def protect(self, libraries):
        """Set up every protection. Returns the gate's descriptor (or None) and a list of what is missing."""
        cpu_seconds, memory = math.ceil(self.settings["timeout"]) + 1, self.settings["memory_mb"] << 20
        contain.set_limits(memory, cpu_seconds, OUTPUT_BYTES, OPEN_FILES)
        if not contain.SUPPORTED or not self.settings["contained"]:
            return None, ["everything except time-outs and rlimits"]
        gate, missing = None, []
        try:
            contain.drop_privileges()
            contain.restrict_files(libraries)
        except OSError as error:
            missing.append(f"Landlock ({error.strerror})")
        try:
            gate = contain.filter_system_calls()
            missing += ["the gate of seccomp"] if gate is None else []
        except OSError as error:
            missing.append(f"seccomp ({error.strerror})")
        return gate, missing

    def serve(self):
        """Wait for the host's requests. Each is answered by a fork, which runs one action and then waits itself."""
        while True:
            channel, output = _receive_descriptors(self.channel)
            child = _fork()
            if child == 0:
                os.dup2(channel, CHANNEL)
                os.dup2(output, 1)
                os.dup2(output, 2)
            for descriptor in (channel, output):
                if child or descriptor > CHANNEL:  # it can be 1, if the code has closed that
                    os.close(descriptor)
            if child == 0:
                with contain.open_socket(self.channel) as own:
                    own.sendall(struct.pack("=i", os.getpid()))
                self.run_action(json.loads(self.channel.recv_bytes())["code"])

    def run_action(self, code):
        process, self.step, self.final, self.lock = os.getpid(), self.step + 1, False, threading.Lock()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # Unbuffered, so that a kill loses nothing.
        output = io.TextIOWrapper(open(1, "wb", 0, closefd=False), "utf-8", "replace", "\n", write_through=True)
        sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = output
        sys.stdin = io.StringIO()
        vars(self.main).update(self.given)
        contain.lower_limits(True)
        outcome = self.execute(code)
        contain.lower_limits(False)
        if os.getpid() != process:  # without containment the code can fork, and this is its child
            os._exit(0)
        signal.alarm(0)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        self.send({"done": outcome})

    def execute(self, code):
        """Returns {"result"}, or {"error", "kind"}, or {} after a final answer."""
        filename = f"<step {self.step}>"
        linecache.cache[filename] = (len(code), None, code.splitlines(True), filename)
        try:
            tree = ast.parse(code, filename)
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            body = compile(tree, filename, "exec", dont_inherit=True)
            last = last and compile(ast.Expression(last.value), filename, "eval", dont_inherit=True)
        except Exception as error:
            return {"error": _cut(_describe(error)), "kind": "syntax"}
        try:
            exec(body, vars(self.main))
            value = eval(last, vars(self.main)) if last else None
            return {"result": None if value is None else _cut(repr(value))}
        except BaseException as error:
            contain.lower_limits(False)  # the code may have used up its memory
            if self.final:
                return {}
            number, note = getattr(error, "errno", None), ""
            if number == errno.EFBIG:
                note = f"; a step can print {OUTPUT_BYTES >> 10:,} KiB"
            if memory := isinstance(error, MemoryError) or number == errno.ENOMEM:
                note = f"; a step can allocate {self.settings['memory_mb']:,} MB"
            return {"error": _cut(_describe(error)) + note, "kind": "memory" if memory else "runtime"}

    def send(self, message):
        data = json.dumps(message).encode()
        if len(data) > contain.MESSAGE_LIMIT:
            raise ValueError(f"too long: {len(data):,} bytes, at most {contain.MESSAGE_LIMIT:,} can be sent")
        self.channel.send_bytes(data)

    def final_answer(self, answer=None):
        """End the action with this answer: a JSON value, or anything else as its text."""
        with self.lock:
            # Sent now, so that it stands even if the code catches the exception or is killed.
            self.send({"final": _as_json(answer)})
        self.final = True
        raise FinalAnswer

    def make_tool(self, name, doc):
        def tool(*args, **kwargs):
            try:
                with self.lock:
                    self.send({"tool": name, "args": args, "kwargs": kwargs})
                    reply = json.loads(self.channel.recv_bytes())
            except TypeError as error:
                raise TypeError(f"{name}() takes JSON values only: {error}") from None
            if "error" not in reply:
                return reply["value"]
            kind = getattr(builtins, reply["error"], None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, UnicodeError):
                kind = RuntimeError
            raise kind(reply["message"])

        tool.__name__, tool.__qualname__, tool.__doc__ = name, name, doc
        return tool


def _as_json(value):
    """Returns the value if JSON preserves it; otherwise (a tuple, an infinity, a numpy number, ...) its text."""
    try:
        text = json.dumps(value, allow_nan=False)
        # The host's JSON parser refuses integers of more than 4,300 digits.
        preserved = json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 4300 else digits) == value
    except (TypeError, ValueError, RecursionError):
        preserved = False
    return value if preserved is True else _cut(str(value), 100_000)


def _describe(error):
    """Returns the error's type and text, with the first and the last line of the code that led to it."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{type(error).__name__}: {error.msg} (line {error.lineno}: {(error.text or '').strip()})"
    text = "".join(traceback.format_exception_only(type(error), error)).strip()
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith("<step ")]
    places = []
    for frame in frames[:1] + frames[1:][-1:]:
        place = f"line {frame.lineno}: {frame.line}"
        if frame.filename != frames[0].filename:  # a function that an earlier step defined
            place = f"{frame.filename[1:-1]}, {place}"
        places.append(place if frame.name == "<module>" else f"in {frame.name}, {place}")
    return f"{text} ({'; '.join(places)})" if places else text


if __name__ == "__main__":
    if sys.argv[1:2] != ["inside"]:
        sys.exit(__doc__)
    _warm_loop(int(sys.argv[2]))
