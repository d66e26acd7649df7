"""The code sandbox: runs Python that a language model wrote, in forked processes that the kernel contains.

    with Sandbox(tools={"web_search": search}, timeout=10.0, memory_mb=1024) as sandbox:
        observation = sandbox.run("x = 6 * 7\\nx")                    # variables persist between runs, as in a REPL
        observations = sandbox.run_candidates(["x + 1", "x / 0"])    # each from the same state, at the same time
        sandbox.commit(0)                                            # this candidate's state becomes the state

A state is a process, and a candidate is its fork. This file is the host, which checks every message of these processes.
common/inside.py is what they run, and how they are contained.
"""

import dataclasses
import json
import keyword
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from contextlib import AbstractContextManager, suppress
from multiprocessing.connection import Connection

from common import InputError, inside

STARTS = 3  # attempts to start a sandbox
START_SECONDS = 60.0  # for the import of numpy and sympy
FORK_SECONDS = 5.0  # on a busy machine, and for a state of many GB; the time-out of the step is added
LOST = "(The Python process of the earlier steps has ended; their variables are gone.)\n"


@dataclasses.dataclass
class Observation:
    """What one action did."""

    stdout: str = ""  # what was printed, stderr included; cut in the middle to inside.TEXT_LIMIT characters
    result: str | None = None  # repr of the last expression; None if there is none, or if its value is None
    error: str | None = None  # one message; None after a final answer, whatever followed it
    error_kind: str | None = None  # None, "syntax", "runtime", "timeout", "memory" or "killed"
    is_final: bool = False  # final_answer was called
    final_answer: object = None  # its argument as JSON, as a person would write it
    seconds: float = 0.0


class _Process:
    """The host's handle on a process inside. Its own thread reads and writes the channel, without a time-out; the main
    thread waits for it with a deadline, and ends it with `kill`."""

    def __init__(self, group=None):
        self.socket, self.remote = socket.socketpair()
        self.channel = Connection(os.dup(self.socket.fileno()))
        in_memory = hasattr(os, "memfd_create")
        self.output = open(os.memfd_create("output"), "rb") if in_memory else tempfile.TemporaryFile()
        self.started = threading.Event()  # also set if it has failed to start
        self.group = group  # the process group of its sandbox
        self.pid = None
        self.call = None  # the thread of its last tool call
        self.final = []  # the final answer
        self.done = None  # result, error, kind of the error
        self.has_threads = False  # the code has left some running
        self.failure = None  # error and its kind, if the process cannot become the state
        self.seconds = 0.0

    def __del__(self):
        with suppress(AttributeError):  # there were not enough descriptors for all
            self.socket.close()
            self.output.close()

    def receive(self):
        """Returns the next message. Raises EOFError or OSError if the process has ended."""
        return inside.unpack(self.channel.recv_bytes(inside.MESSAGE_BYTES))

    def printed(self):
        return os.pread(self.output.fileno(), inside.OUTPUT_BYTES, 0).decode("utf-8", "replace")

    def fail(self, error, kind="killed"):
        self.failure = self.failure or (f"{error}; the state is as it was before", kind)
        self.kill()

    def kill(self):
        """End the process. If it is the first of a sandbox, it ends all others."""
        with suppress(OSError, OverflowError):
            # Only processes of this sandbox are in its group: a process that got the same PID later is not killed.
            if self.pid and self.pid != self.group == os.getpgid(self.pid):
                os.kill(self.pid, signal.SIGKILL)
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


_warm_lock = threading.Lock()
_warm = None  # a _Process with its subprocess.Popen; in a fork of the host, poll says that it has ended


def _warm_interpreter():
    """Returns the process that forks the first process of every sandbox. It has nothing of the host's memory."""
    global _warm
    with _warm_lock:
        if _warm and _warm.popen.poll() is None and not _warm.channel.poll():  # it is readable if it has ended
            return _warm
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # 64 sandboxes with 8 candidates each need 3,000
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
        # A library's threads would not survive a fork.
        environment = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment["PYTHONHASHSEED"] = "0"  # with random hashes, sets would print in another order each time
        environment["GLIBC_TUNABLES"] = "glibc.malloc.arena_max=1"  # an arena per thread would use up RLIMIT_AS
        for name in {"LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME"} & os.environ.keys():
            environment[name] = os.environ[name]  # some Pythons do not start without them
        packages = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
        process = _Process()
        with process.remote as remote:
            process.popen = subprocess.Popen(
                [sys.executable, "-sB", inside.__file__, str(remote.fileno()), *packages],
                env=environment,
                pass_fds=[remote.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=process.output,
                stderr=process.output,
                start_new_session=True,  # Ctrl-C in a terminal is the host's to handle
            )
        with suppress(OSError, EOFError):
            if process.channel.poll(START_SECONDS) and process.channel.recv_bytes():
                _warm = process
                return process
        process.popen.kill()
        raise OSError(process.printed().strip() or f"Python ended with status {process.popen.wait()}")


class Sandbox(AbstractContextManager):
    """Runs untrusted Python; variables persist from run to run, threads end with their step.

    tools: {name: function}. Functions run in this process and take and return JSON values; a step's calls run one
    after another, and the step ends when they have. The code sees their exceptions, except an InputError: run and
    run_candidates raise it in the host; if the step has timed out by then, the next call does. timeout: seconds of
    wall clock per step, once its process has started, which may take as long and FORK_SECONDS more. memory_mb: what
    a step's process can allocate. isolation: "auto" warns once if a protection is missing on this machine,
    "require" raises InputError instead, "off" has time-outs and rlimits only. Raises InputError for bad arguments,
    and if no process starts. Threads can use different sandboxes at once, but not the same.

    Covered, on Linux 5.13 and later, as root or not: the code reads nothing but libraries (of the system and of
    Python), time zones and MIME types, and writes no file; it has no network, starts no program, signals no other
    process and sees no other candidate; wall clock, memory, open files and printed output have limits; no process
    outlives the host and its forks.
    Not covered: bugs of the kernel, side channels, CPU use up to the time-out; what stat, access, readlink, getcwd
    and getpgid tell about files and processes; the number of threads; descriptors that a step leaves open, which
    the candidates of the next share (also those of an asyncio loop: use asyncio.run in each step); a program that
    finds the host's key in its own memory can fork, and end the processes of its sandbox, until that is closed; the
    tools, with any arguments the code passes. Code that is meant to do harm belongs in a container or a virtual
    machine. Unseeded draws of random, numpy.random and sympy repeat in every new sandbox, but not those of new
    generators (random.Random(), numpy.random.RandomState(), ...), nor of sympy.randMatrix.
    """

    def __init__(self, tools=None, timeout=10.0, memory_mb=1024, isolation="auto"):
        if isolation not in ("auto", "require", "off"):
            raise InputError(f'isolation is "auto", "require" or "off", not {isolation!r}')
        for name, value, least, most in (("timeout", timeout, 1e-3, 1e6), ("memory_mb", memory_mb, 1, 1e7)):
            if not isinstance(value, int | float) or not least <= value <= most:
                raise InputError(f"{name} is a number from {least:g} to {most:g}, not {value!r}")
        for name, function in (tools or {}).items():
            named = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
            if not named or name.startswith("__") or name == "final_answer" or not callable(function):
                raise InputError(f"tools must map names to functions; {name!r}: {function!r} does not fit")
        self.tools = dict(tools or {})
        self.timeout = float(timeout)
        self.memory_mb = int(memory_mb)
        self.isolation = isolation
        self.key = os.urandom(8)  # without it, the code cannot fork
        self.first = self.state = None
        self.candidates = []
        self.input_error = None  # of a tool, until the caller has seen it
        self.lost = False  # the variables of earlier steps are gone, and no observation has said so
        self.closed = False
        self._start()

    def _start(self):
        """Fork a first process from the warm interpreter. If that fails, try again."""
        settings = {"contained": self.isolation != "off", "timeout": self.timeout, "memory_mb": self.memory_mb}
        settings["key"] = int.from_bytes(self.key, "big")
        settings["tools"] = {name: str(function.__doc__ or "") for name, function in self.tools.items()}
        for attempt in range(1, STARTS + 1):
            try:
                [process] = self._fork(_warm_interpreter(), [{"settings": settings}])
                if not process.failure:
                    break
                raise OSError(process.printed().strip() or process.failure[0])
            except OSError as error:
                if attempt == STARTS:
                    raise InputError(f"the sandbox did not start: {str(error).splitlines()[-1]}") from None
        self.first = self.state = process
        if process.missing and self.isolation != "off":
            text = "the sandbox is not fully contained here; missing: " + ", ".join(process.missing)
            if self.isolation == "require":
                self.close()
                raise InputError(text)
            warnings.warn(text, RuntimeWarning, stacklevel=1)  # Python shows it once: the place is always this line

    def close(self, *exception):
        """Kill every process of this sandbox."""
        self.closed = True
        self._lose_state()

    __exit__ = close

    def _lose_state(self):
        for process in (*self.candidates, self.state, self.first):
            if process:
                process.kill()
        self.candidates = []
        self.first = self.state = None
        self.lost = True

    def run(self, code):
        """Run one action on the state. The state changes unless the action times out or its process ends."""
        [observation] = self.run_candidates([code])
        self.commit(0)
        return observation

    def run_candidates(self, codes):
        """Run each code on a copy of the state, all at the same time. The state stays as it is until one is committed.

        Returns one Observation per code, in the same order. The next run drops candidates that were not committed.
        """
        messages = [{"code": code} for code in codes]
        if len(messages) > 100 or not all(isinstance(message["code"], str) for message in messages):
            raise ValueError("codes must be strings, at most 100 at once")
        if self.closed:
            raise RuntimeError("the sandbox is closed")
        self._commit(None)
        try:
            for _ in range(2):
                if self.state is None:
                    self._start()
                self.candidates = candidates = self._fork(self.state, messages)
                if not messages or any(candidate.pid for candidate in candidates):
                    break
                self._lose_state()  # its process has ended, or does not fork
        except BaseException:  # Ctrl-C: stop what is running
            self._lose_state()
            raise
        if self.input_error:
            error, self.input_error = self.input_error, None
            raise error
        observations = [self._observation(candidate) for candidate in candidates]
        self.lost = self.lost and not messages
        return observations

    def _observation(self, process):
        """Returns what the process did. A final answer stands, whatever happened after it."""
        observation = Observation(LOST * self.lost + inside.cut(process.printed()), seconds=process.seconds)
        result, error, kind = process.done or (None, None, None)
        if process.failure:
            error, kind = process.failure
        if os.fstat(process.output.fileno()).st_size >= inside.OUTPUT_BYTES:
            kind = kind or "runtime"
            error = f"{error or 'OSError'}; a step can print {inside.OUTPUT_BYTES >> 10:,} KiB"
        if process.final:
            observation.is_final = True
            [observation.final_answer] = process.final
        elif error is not None:
            note = f"; a step can allocate {self.memory_mb:,} MB" if kind == "memory" else ""
            observation.error = inside.cut(str(error), 2 * inside.TEXT_LIMIT) + note
            observation.error_kind = str(kind)
        elif result is not None:
            observation.result = inside.cut(str(result), 2 * inside.TEXT_LIMIT)
        return observation

    def commit(self, index):
        """Make candidate `index` of the last run_candidates the state.

        A candidate that timed out or whose process ended has no state; the state from before the step stays.
        """
        if self.closed or not self.candidates:
            raise RuntimeError("there are no candidates to commit: call run_candidates first")
        self._commit(self.candidates[index])

    def _commit(self, chosen):
        """Make this candidate the state, if it can be, and kill the others."""
        if chosen and not chosen.failure:
            if chosen.has_threads:  # a fork does not have them
                [fork] = self._fork(chosen, [{}])
                chosen = chosen if fork.failure else fork
            self.candidates.append(self.state)
            self.state = chosen
        for process in self.candidates:
            if process not in (self.state, self.first):
                process.kill()
        self.candidates = []

    def _fork(self, parent, messages):
        """Make the parent fork once for each message. Returns the processes when each has done what its message says,
        or has been stopped: they have FORK_SECONDS and a time-out to start, then a time-out for the action."""
        processes = [_Process(self.first and self.first.group) for _ in messages]
        for process, message in zip(processes, messages, strict=True):
            process.thread = threading.Thread(target=self._follow, args=(parent, process, message), daemon=True)
            process.thread.start()
        seconds = FORK_SECONDS + self.timeout
        deadline = time.monotonic() + seconds
        for process in processes:
            if not process.started.wait(max(0.0, deadline - time.monotonic())):
                process.fail(f"no process for the code started within {seconds:g} s")
        deadline = time.monotonic() + self.timeout
        for process in processes:
            process.thread.join(max(0.0, deadline - time.monotonic()))
            if process.thread.is_alive() and not process.failure:
                process.seconds = self.timeout
                process.fail(f"TimeoutError: the code ran longer than {self.timeout:g} s and was stopped", "timeout")
        return processes

    def _follow(self, parent, process, message):
        """Make the parent fork, and handle what the fork sends until it has done what the message says."""
        try:
            with process.remote:
                socket.send_fds(parent.socket, [self.key], [process.remote.fileno(), process.output.fileno()])
            process.channel.send_bytes(json.dumps(message).encode())
            hello = process.receive()
            process.pid = int(hello["pid"])
            process.group = process.group or process.pid  # a first process, which runs no foreign code
            process.missing = hello["missing"]
            process.started.set()
            started = time.monotonic()
            while "code" in message and not process.done and not process.failure:
                sent = process.receive()
                if "tool" in sent:  # in another thread, so that a final answer is read while it runs
                    call = process, self.tools[sent["tool"]], [*sent["args"]], {**sent["kwargs"]}
                    if process.call:
                        process.call.join()
                    process.call = threading.Thread(target=self._call, args=call, daemon=True)
                    process.call.start()
                elif "final" in sent:
                    if process.final:
                        raise ValueError("a second final answer")
                    process.final = [sent["final"]]
                else:
                    result, error, kind, process.has_threads = sent["done"]
                    process.done = result, error, kind
            process.seconds = time.monotonic() - started
        except (EOFError, ConnectionError):
            process.fail("the Python process ended before the code did")
        except Exception as error:
            process.fail(f"what the process sent to the host is not valid: {type(error).__name__}: {error}")
        finally:
            process.started.set()

    def _call(self, process, function, args, kwargs):
        """Run a tool, and send its reply."""
        try:
            reply = inside.pack({"value": function(*args, **kwargs)})
        except InputError as error:
            self.input_error = error
            process.fail(error)
            return
        except BaseException as error:
            text = type(error).__name__
            with suppress(Exception):
                text = str(error.args[0] if len(error.args) == 1 else error) or text  # str(KeyError("a")) has quotes
            reply = inside.pack({"error": type(error).__name__, "message": inside.cut(text)})
        with suppress(OSError):  # the step has ended
            process.channel.send_bytes(reply)
