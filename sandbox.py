"""The code sandbox: runs Python that a language model wrote, in forked processes that the kernel contains.

    with Sandbox(tools={"web_search": search}, timeout=10.0, memory_mb=1024) as sandbox:
        observation = sandbox.run("x = 6 * 7\\nx")                    # variables persist between runs, as in a REPL
        observations = sandbox.run_candidates(["x + 1", "x / 0"])    # each from the same state, at the same time
        sandbox.commit(0)                                            # this candidate's state becomes the state

A state is a process, and a candidate is its fork. This file is the host, which checks every message of these processes.
common/inside.py is what they run, and how they are contained.
"""

import dataclasses
import keyword
import os
import resource
import select
import selectors
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

STEP_BYTES = 64 << 20  # bytes that one action can send to the host
CALLS = 64  # tool calls of one action that run at the same time; common/inside.py allows honest code 8
STARTS = 3  # attempts to start a sandbox
START_SECONDS = 60.0  # for the import of numpy and sympy
FORK_SECONDS = 5.0  # on a busy machine, and for a state of many GB; the time-out of the step is added
LOST = "(The Python process of the earlier steps has ended; their variables are gone.)\n"


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
    """The host's handle on a process inside."""

    def __init__(self, group=None):
        self.channel, self.remote = socket.socketpair()
        in_memory = hasattr(os, "memfd_create")
        self.output = open(os.memfd_create("output"), "rb") if in_memory else tempfile.TemporaryFile()
        self.sending = threading.Lock()
        self.calls = threading.Semaphore(CALLS)
        self.buffer = bytearray()  # received, but not a whole message yet
        self.received = 0  # bytes in all
        self.group = group  # the process group of its sandbox
        self.pid = None
        self.status = "starting"  # then "running", then "waiting" (it can be the state) or "ended"
        self.deadline = 0.0  # of its start, then of its action
        self.missing = []  # protections that this machine does not offer
        self.threads = False  # the code has left some running
        self.observation = Observation()

    def __del__(self):
        with suppress(AttributeError):  # there were not enough descriptors for all
            for file in (self.channel, self.remote, self.output):
                file.close()

    def send(self, data):
        with self.sending:
            self.channel.sendall(data)

    def receive(self):
        """Read what has arrived. Yields the messages that are complete. Raises EOFError or OSError if the process has
        ended, and ValueError if it sent something else, or too much."""
        data = self.channel.recv(1 << 20, socket.MSG_DONTWAIT)
        self.buffer += data
        self.received += len(data)
        if not data:
            raise EOFError("the process has ended")
        while len(self.buffer) >= 4:
            end = 4 + int.from_bytes(self.buffer[:4], "big")
            if end > 4 + inside.MESSAGE_BYTES or self.received > STEP_BYTES:
                raise ValueError("too many bytes")
            if len(self.buffer) < end:
                return
            message = inside.unpack(bytes(self.buffer[4:end]))
            del self.buffer[:end]
            yield message

    def fork(self, process, message, deadline):
        """Make this process fork. The fork gets the other end of the channel of `process`, and does what the message
        says. Raises OSError."""
        data = inside.pack(message)
        with process.remote:
            if not self.sending.acquire(timeout=max(0.01, deadline - time.monotonic())):
                self.kill()  # it does not read a tool's reply
                raise TimeoutError("the parent does not read")
            try:
                self.channel.settimeout(max(0.01, deadline - time.monotonic()))
                sent = socket.send_fds(self.channel, [data], [process.remote.fileno(), process.output.fileno()])
                self.channel.sendall(data[sent:])
            except TimeoutError:
                self.kill()  # it may have read half of the message, and would read the next as the rest
                raise
            finally:
                self.channel.settimeout(None)
                self.sending.release()

    def has_ended(self):
        poll = select.poll()
        poll.register(self.channel, 0)
        return bool(poll.poll(0))  # POLLHUP. recv could wait while `fork` in another thread has set a time-out.

    def printed(self):
        return os.pread(self.output.fileno(), inside.OUTPUT_BYTES, 0).decode("utf-8", "replace")

    def stop(self, kind, reason):
        """End the process because of a failure."""
        self.observation.fail(kind, f"{reason}; the state is as it was before")
        self.status = "ended"
        self.kill()

    def kill(self):
        """End the process. If it is the first of a sandbox, it ends all others."""
        with suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            # Only processes of this sandbox are in its group: a process that got the same PID later is not killed.
            if self.pid and self.pid != self.group == os.getpgid(self.pid):
                os.kill(self.pid, signal.SIGKILL)


_warm_lock = threading.Lock()
_warm = None  # (_Process, subprocess.Popen, PID of the host): the warm interpreter; a fork of the host starts its own


def _warm_interpreter():
    """Returns the process that forks the first process of every sandbox. It has nothing of the host's memory."""
    global _warm
    with _warm_lock:
        if _warm and _warm[2] == os.getpid():
            if not _warm[0].has_ended():
                return _warm[0]
            _warm[1].kill()
            _warm[1].wait()  # otherwise a zombie would be left
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # 64 sandboxes with 8 candidates each need 3,000
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
        # A library's threads would not survive a fork. With random hashes, sets would print in another order each time.
        environment = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment |= {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C.UTF-8"}
        environment["GLIBC_TUNABLES"] = "glibc.malloc.arena_max=1"  # an arena per thread would use up RLIMIT_AS
        for name in {"LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME"} & os.environ.keys():
            environment[name] = os.environ[name]  # some Pythons do not start without them
        packages = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
        process = _Process()
        with process.remote as channel:
            started = subprocess.Popen(
                [sys.executable, "-s", inside.__file__, str(channel.fileno()), *packages],
                env=environment,
                pass_fds=[channel.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=process.output,
                stderr=process.output,
                start_new_session=True,  # Ctrl-C in a terminal is the host's to handle
            )
        process.channel.settimeout(START_SECONDS)
        try:
            next(process.receive())
        except (OSError, EOFError, ValueError) as error:
            started.kill()
            started.wait()
            raise OSError(process.printed().strip() or error) from None
        process.channel.settimeout(None)
        _warm = process, started, os.getpid()
        return process


class Sandbox(AbstractContextManager):
    """Runs untrusted Python; variables persist from run to run, threads end with their step.

    tools: {name: function}. Functions run in this process, perhaps in several threads at once, and take and return
    JSON values. The code sees their exceptions, except an InputError: run and run_candidates raise it in the host; if
    the step has timed out by then, the next call does. timeout: seconds of wall clock per step, once its process has
    started, which may take FORK_SECONDS more. memory_mb: what a step's process can allocate. isolation: "auto" warns
    once if a protection is missing on this machine, "require" raises InputError instead, "off" has time-outs and
    rlimits only. Raises InputError for bad arguments, and if no process starts. Threads can use different sandboxes at
    once; calls on one sandbox wait for each other.

    Covered, on Linux 5.13 and later, as root or not: the code reads nothing but Python's libraries, time zones and MIME
    types, and writes no file; it has no network, starts no program, signals no process and sees no other candidate;
    wall clock, CPU time, memory, open files and printed output have limits; no process outlives the host.
    Not covered: bugs of the kernel, side channels, CPU use up to the time-out; what stat, access, readlink, getcwd and
    getpgid tell about files and processes; the number of threads; descriptors that a step leaves open, which the
    candidates of the next share (also those of an asyncio loop: use asyncio.run in each step); a program that finds the
    host's key in its own memory can fork, until the sandbox is closed; the tools, with any arguments the code passes.
    Code that is meant to do harm belongs in a container or a virtual machine. Unseeded draws of random, numpy.random
    and sympy repeat in every new sandbox, but not those of a new random.Random(), nor of sympy.randMatrix.
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
        settings = {"filter_key": self.key, "key": 0, "contained": self.isolation != "off", "timeout": self.timeout}
        settings["memory_mb"] = self.memory_mb
        settings["tools"] = {name: str(function.__doc__ or "") for name, function in self.tools.items()}
        for _ in range(STARTS):
            try:
                [process] = self._fork(_warm_interpreter(), [settings])
            except OSError as error:
                reason = str(error)
                continue
            if process.status == "waiting":
                break
            reason = process.printed().strip() or process.observation.error
        else:
            raise InputError(f"the sandbox did not start: {reason.splitlines()[-1]}")
        self.first = self.state = process
        if process.missing and self.isolation != "off":
            text = "the sandbox is not fully contained here; missing: " + ", ".join(process.missing)
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
        for process in (*self.candidates, self.state, self.first):
            if process:
                process.kill()
        self.candidates = []
        self.first = self.state = None
        self.lost = True

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
            self._raise_failure()
            self._commit(None)
            if self.state is None or self.state.has_ended():
                self._lose_state()
                self._start()
            try:
                self.candidates = self._fork(self.state, [{"key": self.key, "code": code} for code in codes])
            except BaseException:  # Ctrl-C: stop what is running
                self._lose_state()
                raise
            self._raise_failure()
            observations = [candidate.observation for candidate in self.candidates]
            for candidate in self.candidates:
                candidate.observation.stdout = LOST * self.lost + inside.cut(candidate.printed())
            self.lost = self.lost and not codes
            if codes and not any(candidate.pid for candidate in self.candidates):
                for observation in observations:
                    observation.error = "the process that holds the state did not fork; the variables are gone"
                self.state.kill()  # the next step starts a new one
            return observations

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
            self._commit(self.candidates[index])

    def _commit(self, chosen):
        """Make this candidate the state, if it can be, and kill the others."""
        if chosen and chosen.status == "waiting":
            if chosen.threads:  # a fork does not have them
                [fork] = self._fork(chosen, [{"key": self.key}])
                chosen = fork if fork.status == "waiting" else chosen
            self.candidates.append(self.state)
            self.state = chosen
        for process in self.candidates:
            if process not in (self.state, self.first):
                process.kill()
        self.candidates = []

    def _fork(self, parent, messages):
        """Make the parent fork once for each message. Returns the processes when each has finished, or has been
        stopped: it has FORK_SECONDS and a time-out to start, and from then on a time-out for the action."""
        seconds = FORK_SECONDS + self.timeout
        deadline = time.monotonic() + seconds
        processes = [_Process(self.first and self.first.group) for _ in messages]
        with selectors.DefaultSelector() as selector:
            for process, message in zip(processes, messages, strict=True):
                process.deadline = deadline
                try:
                    parent.fork(process, message, deadline)
                    selector.register(process.channel, selectors.EVENT_READ, (process, "code" in message))
                except OSError as error:
                    process.stop("killed", f"no process for the code started: {error}")
            while running := [key.data[0] for key in selector.get_map().values()]:
                left = min(process.deadline for process in running) - time.monotonic()
                for key, _ in selector.select(max(0.0, left)):
                    self._serve(*key.data)
                for process in running:
                    late = time.monotonic() >= process.deadline
                    if late and process.status == "starting":
                        process.stop("killed", f"no process for the code started within {seconds:g} s")
                    elif late and process.status == "running":
                        text = f"TimeoutError: the code ran longer than {self.timeout:g} s and was stopped"
                        process.stop("timeout", text)
                        process.observation.seconds = self.timeout
                    if process.status in ("waiting", "ended"):
                        selector.unregister(process.channel)
        return processes

    def _serve(self, process, runs_code):
        """Read and handle what a process has sent."""
        observation = process.observation
        try:
            for message in process.receive():
                if process.status == "starting":
                    process.pid = int(message["pid"])
                    if self.state and process.pid in (self.first.pid, self.state.pid):
                        raise ValueError("the PID of another process")
                    process.group = process.group or process.pid  # a first process, which runs no foreign code
                    process.missing = message.get("missing")
                    process.status = "running" if runs_code else "waiting"
                    process.deadline = time.monotonic() + self.timeout
                elif "tool" in message:
                    self._start_call(process, **message)
                elif "final" in message:
                    if observation.is_final:
                        raise ValueError("a second final answer")
                    observation.final_answer = message["final"]
                    observation.is_final = True
                else:
                    outcome = {"result": None, "error": None, **message["done"]}
                    if outcome["error"] is not None:
                        observation.fail(str(outcome["kind"]), inside.cut(str(outcome["error"]), 2 * inside.TEXT_LIMIT))
                    elif outcome["result"] is not None:
                        observation.result = inside.cut(str(outcome["result"]), 2 * inside.TEXT_LIMIT)
                    observation.seconds = time.monotonic() - process.deadline + self.timeout
                    process.threads = outcome["threads"]
                    process.status = "waiting"
                if process.status == "waiting":
                    return
        except (OSError, EOFError):
            process.stop("killed", "the Python process ended before the code did")
        except Exception as error:
            text = f"the process was stopped because of what it sent to the host: {type(error).__name__}: {error}"
            process.stop("killed", text)

    def _start_call(self, process, tool, number, args, kwargs):
        """Run a tool in a thread, for which nothing waits. Raises an exception if the call is not valid."""
        function, args, kwargs = self.tools[tool], [*args], {**kwargs}
        if not process.calls.acquire(blocking=False):
            raise ValueError("too many calls at the same time")

        def call():
            try:
                process.send(self._call(function, number, args, kwargs))
            except InputError as error:
                self.failures.append(error)
                process.kill()
            except OSError:
                pass  # the step has ended
            finally:
                process.calls.release()

        threading.Thread(target=call, daemon=True).start()

    def _call(self, function, number, args, kwargs):
        """Returns a tool's reply, packed."""
        try:
            return inside.checked({"reply": number, "value": function(*args, **kwargs)})
        except InputError:
            raise
        except BaseException as error:
            text = type(error).__name__
            with suppress(Exception):
                text = error.args[0] if len(error.args) == 1 and isinstance(error.args[0], str) else str(error) or text
            return inside.pack({"reply": number, "error": type(error).__name__, "message": inside.cut(text)})
