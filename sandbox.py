"""The code sandbox: runs Python that a language model wrote, in forked processes that the kernel contains.

    with Sandbox(tools={"web_search": search}, timeout=10.0, memory_mb=1024) as sandbox:
        observation = sandbox.run("x = 6 * 7\\nx")                    # variables persist between runs, as in a REPL
        observations = sandbox.run_candidates(["x + 1", "x / 0"])    # each from the same state, at the same time
        sandbox.commit(0)                                            # this candidate's state becomes the state

A state is a process, and a candidate is its fork. This file is the host, which trusts nothing that comes from inside
and waits for nothing beyond a deadline. common/inside.py is the inside.
"""

import dataclasses
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

from common import InputError, inside

STEP_BYTES = 64 << 20  # that one action can send to the host
CALLS = 8  # tool calls of one action that run at the same time
STARTS = 3  # attempts to start a sandbox
START_SECONDS = 60.0  # for each
LOST = "(The Python process of the earlier steps has ended; their variables are gone.)\n"
ENDED = (OSError, EOFError, ValueError)  # what a process that ends, hangs or sends nonsense raises in the host


@dataclasses.dataclass
class Observation:
    """What one action did."""

    stdout: str = ""  # what was printed, stderr included; cut in the middle to inside.TEXT_LIMIT characters
    result: str | None = None  # repr of the last expression; None if there is none, or if its value is None
    error: str | None = None  # one message
    error_kind: str | None = None  # None, "syntax", "runtime", "timeout", "memory" or "killed"
    is_final: bool = False  # final_answer was called
    final_answer: object = None  # its argument as JSON, as a person would write it
    seconds: float = 0.0

    def fail(self, kind, error):
        """Set the error. A final answer stands, whatever happens after it."""
        if not self.is_final:
            self.error, self.error_kind = error, kind


class _Process:
    """The host's handle on a process inside: its channel, the file that it prints into, and its PID.

    send and receive raise TimeoutError after the deadline, OSError or EOFError if the process has ended, and ValueError
    for a message that is none or too large. Descriptors are closed when no thread uses them.
    """

    def __init__(self, group=None):
        self.channel, self.remote = socket.socketpair()
        in_memory = hasattr(os, "memfd_create")
        self.output = open(os.memfd_create("output"), "rb") if in_memory else tempfile.TemporaryFile()
        self.sending = threading.Lock()
        self.received = 0  # bytes
        self.group = group
        self.pid = None

    def __del__(self):
        with suppress(AttributeError):  # there were not enough descriptors
            self.channel.close()
            self.remote.close()
            self.output.close()

    def send(self, message, deadline):
        with self.sending:
            self._wait_until(deadline)
            self.channel.sendall(inside.pack(message))

    def fork_from(self, parent, message, deadline):
        """Have the parent fork into this process, which does what the message says."""
        with parent.sending, self.remote:
            parent._wait_until(deadline)
            data = inside.pack(message)
            sent = socket.send_fds(parent.channel, [data], [self.remote.fileno(), self.output.fileno()])
            parent._wait_until(deadline)
            parent.channel.sendall(data[sent:])

    def receive(self, deadline):
        size = int.from_bytes(self._read(4, deadline), "big")
        self.received += size
        if size > inside.MESSAGE_BYTES or self.received > STEP_BYTES:
            raise ValueError("too many bytes")
        return inside.unpack(self._read(size, deadline))

    def _read(self, size, deadline):
        data = bytearray()
        while len(data) < size:
            self._wait_until(deadline)
            data += (chunk := self.channel.recv(min(size - len(data), 1 << 16)))
            if not chunk:
                raise EOFError("the process has ended")
        return bytes(data)

    def _wait_until(self, deadline):
        """Let the next operation on the channel take until the deadline."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer in time")
        self.channel.settimeout(left)

    def has_ended(self):
        with self.sending:
            self.channel.settimeout(0)
            try:
                return not self.channel.recv(1, socket.MSG_PEEK)
            except OSError as error:
                return not isinstance(error, BlockingIOError)

    def admit(self, deadline, others):
        """Receive the PID that a fork says it has. others: {pid: process}."""
        pid = self.receive(deadline).get("pid")
        if type(pid) is not int or os.getpgid(pid) != self.group or others.setdefault(pid, self) is not self:
            raise ValueError("not its own PID")
        self.pid = pid

    def printed(self):
        return os.pread(self.output.fileno(), inside.OUTPUT_BYTES, 0).decode("utf-8", "replace")

    def kill(self):
        """End the process. If it is the first of a sandbox, it ends all others."""
        with suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)  # also ends the waiting of threads
        with suppress(OSError):
            # In this group there is no process of anybody else, even if the PID is used again.
            if self.pid and self.pid != self.group == os.getpgid(self.pid):
                os.kill(self.pid, signal.SIGKILL)


class _Candidate(_Process):
    """A process that runs one action."""

    def __init__(self, group):
        super().__init__(group)
        self.observation = Observation()
        self.calls = threading.Semaphore(CALLS)
        self.done = False  # its action has ended, and it can become the state
        self.threads = False  # the code has left some running


_warm_lock = threading.Lock()
_warm = None  # (_Process, subprocess.Popen, PID of the host): the warm interpreter; a fork of the host starts its own


def _warm_interpreter():
    """Returns the process that forks the first process of every sandbox. It has nothing of the host's memory."""
    global _warm
    with _warm_lock:
        if _warm and _warm[1].poll() is None and _warm[2] == os.getpid() and not _warm[0].has_ended():
            return _warm[0]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # 64 sandboxes with 8 candidates each need 2,000
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
        # A library's threads would not survive a fork. With random hashes, sets would print in another order each time.
        environment = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment |= {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C.UTF-8"}
        environment["GLIBC_TUNABLES"] = "glibc.malloc.arena_max=1"  # an arena per thread would use up RLIMIT_AS
        needed = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")  # some Pythons do not start without them
        environment |= {name: os.environ[name] for name in needed if name in os.environ}
        packages = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
        process = _Process()
        with process.remote:
            popen = subprocess.Popen(
                [
                    sys.executable,
                    "-s",
                    inside.__file__,
                    str(process.remote.fileno()),
                    *packages,
                ],
                env=environment,
                pass_fds=[process.remote.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=process.output,
                stderr=process.output,
                start_new_session=True,  # Ctrl-C in a terminal is the host's to handle
            )
        try:
            process.receive(time.monotonic() + START_SECONDS)
        except ENDED as error:
            popen.kill()
            raise EOFError(process.printed().strip()[-2000:] or str(error)) from None
        _warm = process, popen, os.getpid()
        return process


class Sandbox(AbstractContextManager):
    """Runs untrusted Python; variables persist from run to run.

    tools: {name: function}. Functions run in this process, perhaps in several threads at once, and take and return
    JSON values. The code sees their exceptions, except an InputError: run and run_candidates raise it in the host; if
    the step has timed out by then, the next call does. timeout: seconds of wall clock per step. memory_mb: what a
    step's process can allocate. isolation: "auto" warns once if a protection is missing on this machine, "require"
    raises InputError instead, "off" has time-outs and rlimits only. Raises InputError for bad arguments, and if no
    process starts. Threads can use different sandboxes at once; calls on one sandbox wait for each other.
    """

    def __init__(self, tools=None, timeout=10.0, memory_mb=1024, isolation="auto"):
        if isolation not in ("auto", "require", "off"):
            raise InputError(f'isolation is "auto", "require" or "off", not {isolation!r}')
        if not 0 < timeout <= 1e6 or not 1 <= memory_mb <= 1e7:
            raise InputError(f"timeout goes up to 1e6 s, memory_mb to 1e7, not {timeout!r} and {memory_mb!r}")
        for name, function in (tools or {}).items():
            named = isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
            if not named or name.startswith("__") or name == "final_answer" or not callable(function):
                raise InputError(f"tools must map names to functions; {name!r}: {function!r} does not fit")
        self.tools = dict(tools or {})
        self.timeout = float(timeout)
        self.memory_mb = int(memory_mb)
        self.isolation = isolation
        self.lock = threading.RLock()
        self.first = self.state = None
        self.candidates = []
        self.failures = []  # InputErrors of tools, until the caller has seen one
        self.lost = False  # the variables of earlier steps are gone, and no observation has said so
        self.closed = False
        self._start()

    def _start(self):
        """Fork a first process from the warm interpreter. If that fails, try again."""
        self.key = int.from_bytes(os.urandom(8), "big")
        message = {"key": 0, "filter_key": self.key, "contained": self.isolation != "off", "timeout": self.timeout}
        message["tools"] = {name: str(function.__doc__ or "") for name, function in self.tools.items()}
        for attempt in range(1, STARTS + 1):
            process = _Process()
            deadline = time.monotonic() + START_SECONDS
            try:
                process.fork_from(_warm_interpreter(), message | {"memory_mb": self.memory_mb}, deadline)
                hello = process.receive(deadline)
                break
            except ENDED as error:
                process.kill()
                if attempt == STARTS:
                    reason = (process.printed() or str(error)).strip().splitlines()[-1:]
                    raise InputError(f"the sandbox did not start: {''.join(reason)}") from None
        self.first = self.state = process
        process.pid = process.group = hello["pid"]
        if hello["missing"] and self.isolation != "off":
            text = "the sandbox is not fully contained here; missing: " + ", ".join(hello["missing"])
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
            self.first.kill()
            self.lost = True
        self.first = self.state = None

    def _drop_candidates(self):
        for candidate in self.candidates:
            candidate.kill()
        self.candidates = []

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
            self._drop_candidates()
            self._raise_failure()
            if self.state is None or self.state.has_ended():
                self._lose_state()
                self._start()
            try:
                self._run(codes)
            except BaseException:  # Ctrl-C: stop what is running
                self._lose_state()
                raise
            self._raise_failure()
            return [candidate.observation for candidate in self.candidates]

    def _raise_failure(self):
        failures, self.failures = self.failures, []
        if failures:
            raise failures[0]

    def commit(self, index):
        """Make candidate `index` of the last run_candidates the state.

        A candidate that timed out or whose process ended has no state; the state from before the step stays.
        """
        with self.lock:
            if self.closed or not self.candidates:
                raise RuntimeError("there are no candidates to commit: call run_candidates first")
            chosen = self.candidates[index]
            if chosen.done:
                self.candidates.remove(chosen)
                if self.state is not self.first:
                    self.state.kill()
                self.state = self._without_threads(chosen) if chosen.threads else chosen
            self._drop_candidates()

    def _without_threads(self, candidate):
        """Returns a fork of the candidate, or the candidate itself if it does not fork: threads are not in a fork."""
        fork = _Process(candidate.group)
        deadline = time.monotonic() + self.timeout
        try:
            fork.fork_from(candidate, {"key": self.key}, deadline)
            fork.admit(deadline, {candidate.pid: candidate, self.first.pid: self.first})
        except ENDED:
            candidate, fork = fork, candidate
        candidate.kill()
        return fork

    def _run(self, codes):
        started = time.monotonic()
        self.candidates = [_Candidate(self.first.group) for _ in codes]
        others = {process.pid: process for process in (self.first, self.state)}
        threads = []
        for candidate, code in zip(self.candidates, codes, strict=True):
            with suppress(OSError):  # the other side of the candidate's channel is then closed
                candidate.fork_from(self.state, {"key": self.key, "code": code}, started + self.timeout)
            threads.append(threading.Thread(target=self._follow, args=(candidate, others, started), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join()
        for candidate in self.candidates:
            lost = LOST if self.lost else ""
            candidate.observation.stdout = lost + inside.cut(candidate.printed())
        if codes:
            self.lost = False
            if not any(candidate.pid for candidate in self.candidates):
                self._give_up()

    def _give_up(self):
        """The state did not fork. Kill it, and start from an empty state at the next step."""
        candidates = self.candidates
        self._lose_state()
        self.candidates = candidates
        for candidate in candidates:
            text = f"the process that holds the state did not fork within {self.timeout:g} s; the variables are gone"
            candidate.observation.fail("killed", text)

    def _follow(self, candidate, others, started):
        """Answer a candidate's tool calls until its action is done. Runs in its own thread, until the time-out."""
        deadline = started + self.timeout
        observation = candidate.observation
        stays = "the state is as it was before"
        try:
            candidate.admit(deadline, others)
            while "done" not in (message := candidate.receive(deadline)):
                if "tool" in message:
                    self._start_call(candidate, deadline, message)
                elif "final" not in message or observation.is_final:
                    raise ValueError("unknown message")
                else:
                    observation.is_final = True
                    observation.final_answer = message["final"]
            self._note(candidate, **message["done"])
        except TimeoutError:
            text = "the code ran longer than" if candidate.pid else "no process for the code started within"
            observation.fail("timeout", f"TimeoutError: {text} {self.timeout:g} s and was stopped; {stays}")
        except (OSError, EOFError):
            observation.fail("killed", f"the Python process ended before the code did; {stays}")
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            observation.fail("killed", f"the process was stopped because of what it sent to the host: {text}; {stays}")
        if not candidate.done:
            candidate.kill()
        observation.seconds = time.monotonic() - started

    def _note(self, candidate, result=None, error=None, kind=None, threads=False):
        """Note how an action ended. Raises TypeError or ValueError if this cannot be."""
        if error is not None and kind not in ("syntax", "runtime", "memory"):
            raise ValueError("unknown kind of error")
        candidate.observation.result = result and inside.cut(
            result + "", 2 * inside.TEXT_LIMIT
        )  # cut before, if honest
        if error is not None:
            candidate.observation.fail(kind, inside.cut(error + "", 2 * inside.TEXT_LIMIT))
        candidate.threads = bool(threads)
        candidate.done = True

    def _start_call(self, candidate, deadline, message):
        """Run a tool in a thread, which is left behind if it hangs. Raises TypeError, KeyError or TimeoutError."""
        function, number = self.tools[message["tool"]], message["number"] + 0
        args, kwargs = [*message["args"]], {**message["kwargs"]}

        def call():
            try:
                reply = self._call(function, args, kwargs)
                candidate.send(reply | {"reply": number}, deadline)
            except InputError as error:
                self.failures.append(error)
                candidate.kill()
            except OSError:
                pass  # the step has ended
            finally:
                candidate.calls.release()

        if not candidate.calls.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TimeoutError
        threading.Thread(target=call, daemon=True).start()

    def _call(self, function, args, kwargs):
        """Returns a tool's reply."""
        try:
            reply = {"value": function(*args, **kwargs)}
            inside.pack(reply)
            return reply
        except InputError:
            raise
        except BaseException as error:
            text = type(error).__name__
            with suppress(Exception):
                text = error.args[0] if len(error.args) == 1 and isinstance(error.args[0], str) else str(error) or text
            return {"error": type(error).__name__, "message": inside.cut(text)}
