"""The code sandbox: runs what a language model wrote, contained by the kernel and forked for every candidate.

    python sandbox.py               a small REPL on it
    python sandbox.py check         try each protection on this machine; exit status 0 only if all hold

    with Sandbox(tools={"web_search": search}, timeout=10.0, memory_mb=1024) as sandbox:
        observation = sandbox.run("x = 6 * 7\\nx")                    # state persists between runs, as in a REPL
        observations = sandbox.run_candidates(["x + 1", "x / 0"])    # each from the same state, at the same time
        sandbox.commit(0)                                            # this one's state becomes the state

    sandboxes = Sandboxes(tools=...)                                 # for many episodes: `with sandboxes() as sandbox`

How it works. A warm interpreter (numpy and sympy imported) is started once a host process, as a program of its own,
so that nothing of the host is in it. Every sandbox is a fork of it; every candidate is a fork of its sandbox's
current state, which waits. The chosen candidate goes on as the state, and its ancestor ends; in a sandbox that will be
used again the first of them waits on, so that the next episode starts from it. A candidate and the host talk over one
socket, in JSON; what the candidate sends is data, never code. interpreter.py is the inside.

What the code finds: the tools and final_answer as functions, given anew every step; an empty current folder, which
is also its temporary folder; the variables and files of the step before. Threads end with their step. Draws from
`random` and `numpy.random` without a seed are the same in every new sandbox, so that runs repeat. final_answer(x)
does not return and raises nothing: what is open then (a `with` block, a `finally`) stays open.

What is covered, on Linux 5.13 and later, as root or not (contain.py sets up each layer; `check` tries them):
  files       only the interpreter's own libraries can be read, and only a private folder written, which vanishes
              (Landlock; where namespaces are allowed also a file tree that holds nothing else, and a bound on the
              folder's size; elsewhere the host weighs the folder every 50 ms and kills)
  network     there is none: no sockets but unnamed pairs (seccomp; an empty network namespace)
  processes   no exec; no fork but the ones that the host asks for and lets through; at most THREADS threads a step;
              no signal, ptrace or memory access to any other process (seccomp with a gate in the host; Landlock)
  resources   wall clock, by SIGKILL from outside; memory (RLIMIT_AS: what a process can allocate on top of the warm
              interpreter; as it cannot fork, N candidates have N times that); CPU; open files; file size
  the host    an empty environment and no inherited descriptors; when the host dies, everything here dies
What is not covered: bugs of the kernel itself; timing and cache side channels; using the CPU up to the time-out;
stat() on any path where namespaces are not allowed (existence and size of files, not their contents); a pipe that a
step leaves open is the same pipe for all candidates of the next (memory that is shared for writing is refused, but
who maps a file for reading and calls mprotect by hand has some); a tool that is itself unsafe: tools run in the host,
with what arguments the code likes, in several threads at once; a tool that hangs is left behind in its thread. On
macOS, and with isolation="off": time-outs, rlimits and process groups only.
"""

import collections
import contextlib
import dataclasses
import math
import os
import select
import signal
import socket
import sys
import threading
import time
import warnings
from typing import Literal

import contain
from common import InputError, option, run_command_line
from processes import Candidate, Observation, Process, readable, reason, shared_memory, warm_interpreter
from wire import RAW_OUTPUT, cut, pack, parents, read_output, send

__all__ = ["Observation", "Sandbox", "Sandboxes"]
THREADS = 256  # that the candidates of one step may start
_warned = set()


class Sandbox:
    """Runs untrusted Python. State persists from run to run; see the module's docstring.

    tools: {name: function}, called in this process with JSON values, perhaps in several threads at once. timeout:
    seconds of wall clock a step. memory_mb: what a step's process may allocate. isolation: "auto" warns once where a
    protection is missing, "require" raises InputError then, "off" has time-outs and rlimits only. output_limit:
    characters kept of what is printed, and of a result. scratch_mb: the size of the folder the code may write to,
    together with the candidates' copies of it (copies that do not fit are not made: the candidates share it then).
    Threads may use different sandboxes at once, and share one by turns.
    """

    def __init__(self, tools=None, timeout=10.0, memory_mb=1024, isolation="auto", output_limit=10_000, scratch_mb=256,
                 reusable=False):  # fmt: skip
        if isolation not in ("auto", "require", "off"):
            raise ValueError(f'isolation is "auto", "require" or "off", not {isolation!r}')
        if not timeout > 0 or not math.isfinite(timeout) or memory_mb < 1 or output_limit < 2 or scratch_mb < 1:
            raise ValueError("timeout, memory_mb, output_limit and scratch_mb must be positive")
        self.tools, self.timeout, self.memory_mb = dict(tools or {}), float(timeout), int(memory_mb)
        for name, function in self.tools.items():
            if not (isinstance(name, str) and name.isidentifier() and callable(function)) or name == "final_answer":
                raise ValueError(f"tools maps names to functions; {name!r}: {function!r} does not fit")
        self.isolation, self.half, self.scratch_mb = isolation, output_limit // 2, int(scratch_mb)
        self.reusable = reusable
        self.lock, self.closed, self.owner = threading.RLock(), False, os.getpid()
        self.state, self.gate, self.folder, self.candidates, self.remove = None, None, None, [], []
        self.origin = None
        self._start()

    def _start(self):
        """Fork a new sandbox from the warm interpreter."""
        self.warm = warm_interpreter(self.isolation)
        ours, theirs = socket.socketpair()
        self.id, self.home = os.urandom(8).hex(), os.urandom(8).hex()
        self.name = self.home
        request = {"id": self.id, "name": self.name, "timeout": self.timeout, "memory_mb": self.memory_mb}
        request |= {"half": self.half, "limit": 2 * self.half, "scratch_mb": self.scratch_mb}
        request |= {"tools": {name: str(function.__doc__ or "") for name, function in self.tools.items()}}
        self.state = Process(ours, 60.0, grouped=True)  # before its first word: the kernel names who speaks then
        with self.warm.lock:
            send(self.warm.control, request, [theirs.fileno()])
        theirs.close()
        try:
            hello, *descriptors = self.state.receive(descriptors=2) or [{"failed": "its process ended"}]
        except TimeoutError:
            hello, descriptors = {"failed": "it said nothing for a minute"}, []
        if "failed" in hello:
            self._lose()
            raise RuntimeError(f"the sandbox did not start: {hello['failed']}")
        self.gate = contain.Gate(descriptors.pop(0)) if hello["gate"] else None
        self.folder = descriptors.pop(0) if hello["folder"] else None
        self.state.grouped = self.gate is None
        self.origin = self.state if self.reusable else None
        ours.settimeout(self.timeout)
        self._report(hello["missing"])

    def _report(self, missing):
        """Warn of what is missing, or refuse to go on."""
        self.missing = missing
        if self.isolation == "off":
            return
        if not contain.SUPPORTED:
            missing = ["everything but time-outs, rlimits and process groups: this is not Linux on x86-64 or arm64"]
        text = "the sandbox is not fully contained here; missing: " + ", ".join(missing)
        if missing and self.isolation == "require":
            self.close()
            raise InputError(text + " (see `python sandbox.py check`)")
        if missing and text not in _warned:
            _warned.add(text)
            warnings.warn(text + " (see `python sandbox.py check`)", RuntimeWarning, stacklevel=4)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __del__(self):
        if not getattr(self, "closed", True) and not sys.is_finalizing():
            self.close()

    def close(self):
        """End every process of this sandbox. Its files vanish."""
        if self.owner != os.getpid():  # a fork of the host: not its sandbox
            return
        with self.lock:
            self.closed = True
            self._lose()

    def reset(self):
        """Back to the state of a new sandbox, for other code; what ran before is ended, and its files go.

        With reusable=True this takes a fraction of the time that a new sandbox takes: the process from before the
        first step has waited. It removes what files it finds; if it cannot remove all, the next step starts a new one.
        """
        with self.lock:
            for process in {*self.candidates, self.state} - {self.origin, None}:
                process.kill(wait=1.0)  # until it is gone: it could write behind the cleaning
            self.candidates = []
            if self.origin is None or not self.origin.alive() or not self._clean():
                self._lose()
                return
            self.state, self.name, self.remove = self.origin, self.home, []

    def _clean(self):
        """Whether nothing but the origin's own folder is left."""
        self.origin.signal(signal.SIGCONT)
        if not self.origin.send({"clean": True}) or not readable(self.origin.channel, 1.0):
            return False
        try:
            answer = (self.origin.receive() or [{}])[0]
        except (OSError, ValueError):
            return False
        self.origin.signal(signal.SIGSTOP)
        return answer.get("clean") is True

    def _lose(self):
        for process in {*self.candidates, self.state, self.origin} - {None}:
            process.kill(wait=1.0)
        if self.gate:
            self.gate.close()
        if self.folder is not None:
            os.close(self.folder)
        if self.state:
            with self.warm.lock, contextlib.suppress(OSError):  # where it is gone, everything is
                send(self.warm.control, {"close": self.id})
        self.state, self.gate, self.folder, self.candidates, self.remove = None, None, None, [], []
        self.origin = None

    def run(self, code):
        """Run one action on the state, which it changes unless it times out or its process ends."""
        with self.lock:
            [observation] = self.run_candidates([code])
            self.commit(0)
            return observation

    def run_candidates(self, codes):
        """Run each on a copy of the state, all at the same time. The state stays as it is until one is committed.

        The same number of Observations, in the same order. Candidates not committed before the next run are dropped.
        """
        codes = list(codes)
        if not all(isinstance(code, str) for code in codes):
            raise TypeError("code must be text")
        if len(codes) > 100:
            raise ValueError(f"at most 100 candidates at once, not {len(codes)}")
        with self.lock:
            if self.closed or self.owner != os.getpid():
                raise RuntimeError("the sandbox is closed, or belongs to another process")
            if self.state is None or not self.state.alive():
                self._lose()
                self._start()
            self._drop(self.candidates)
            if codes:
                try:
                    self._run(codes)
                except BaseException:  # Ctrl-C: what is running must not go on
                    self._lose()
                    raise
            return [candidate.observation for candidate in self.candidates]

    def commit(self, index):
        """Make candidate `index` of the last run_candidates the state.

        One that timed out or died has no state: the one from before the step stays.
        """
        with self.lock:
            if self.closed or not self.candidates:
                raise RuntimeError("there are no candidates to commit: call run_candidates first")
            chosen = self.candidates[index]
            if chosen.channel.fileno() >= 0 and chosen.alive():
                self.candidates.remove(chosen)
                if self.state is not self.origin:
                    self.remove.append(self.name)
                    self.state.kill()
                self.state, self.name = chosen, chosen.name
            self._drop(self.candidates)

    def _drop(self, candidates):
        for candidate in candidates:
            candidate.kill()
            self.remove.append(candidate.name)
        self.candidates = []

    def _run(self, codes):
        started = time.monotonic()
        theirs = []
        for _ in codes:
            channel, other = socket.socketpair()
            output = shared_memory(8 + 8 * self.half + RAW_OUTPUT)
            self.candidates.append(Candidate(channel, self.timeout, self.gate is None, output))
            theirs += [other.detach(), os.dup(output)]
        request = {"codes": codes, "names": [c.name for c in self.candidates], "remove": self.remove}
        self.state.signal(signal.SIGCONT)
        sent = self.state.send(request, theirs)
        for descriptor in theirs:
            os.close(descriptor)
        self.remove = []
        if sent:
            self._listen(started)
        else:
            for candidate in self.candidates:
                candidate.finish(kind="killed")
        self._settle(started)

    def _listen(self, started):
        """Answer the candidates and the gate until all have finished or the time is up."""
        forkers, threads = parents(len(self.candidates)), THREADS
        waiting = {candidate.channel.fileno(): candidate for candidate in self.candidates}
        poll = select.poll()
        for descriptor in waiting:
            poll.register(descriptor, select.POLLIN)
        if self.gate:
            poll.register(self.gate, select.POLLIN)
        while waiting:
            left = started + self.timeout - time.monotonic()
            if any(candidate.pid is None for candidate in waiting.values()):
                left += 0.1  # not begun: a moment more, because the state is lost with an unknown process
            if left <= 0:
                return
            ready = poll.poll(math.ceil(1000 * (left if self.folder is None else min(left, 0.05))))
            if self.folder is not None:
                self._weigh(waiting.values())
            # The gate last: a candidate that asks to fork has said before who it is.
            for descriptor in sorted((descriptor for descriptor, _ in ready), key=lambda d: d not in waiting):
                candidate = waiting.get(descriptor)
                if candidate:
                    self._hear(candidate)
                    if not candidate.running:
                        candidate.observation.seconds = time.monotonic() - started
                        poll.unregister(descriptor)
                        del waiting[descriptor]
                elif question := self.gate.ask():
                    number, thread, call, arguments = question
                    if call != "clone":  # a signal
                        allow = contain.is_own_process(thread, arguments[0])
                    elif arguments[0] == contain.FORK:
                        known = {self.state.pid: None} | {c.pid: i for i, c in enumerate(self.candidates)}
                        who = known.get(thread, "nobody")
                        allow = who in forkers
                        if allow:
                            forkers.remove(who)
                    else:
                        allow = threads > 0
                        threads -= allow
                    self.gate.answer(number, allow)

    def _weigh(self, candidates):
        """Where there is no tmpfs to bound the scratch folder: stop a candidate that has written too much."""
        for candidate in candidates:
            used = 0
            with contextlib.suppress(OSError):
                for _, _, files, folder in os.fwalk(candidate.name, dir_fd=self.folder):
                    for file in files:
                        with contextlib.suppress(OSError):
                            used += max(4096, 512 * os.stat(file, dir_fd=folder, follow_symlinks=False).st_blocks)
            if used > self.scratch_mb << 20:
                candidate.signal(signal.SIGKILL)

    def _hear(self, candidate):
        try:
            messages = candidate.receive()
            if messages is None:
                candidate.finish(kind="killed")
                return
            others = [process.pid for process in (self.state, *self.candidates) if process is not candidate]
            if candidate.pid in others:
                raise ValueError("it spoke for another")
            for message in messages:
                self._heed(candidate, message)
        except OSError:  # it ended before it could be looked at
            candidate.finish(kind="killed")
        except ValueError as error:
            candidate.kill()
            candidate.finish(f"the process was stopped: {error}", "killed")

    def _heed(self, candidate, message):
        if not candidate.running:
            raise ValueError("it went on after its end")
        if "final" in message:
            candidate.observation.is_final, candidate.observation.final_answer = True, message["final"]
        elif "done" in message:
            outcome = message["done"] if isinstance(message["done"], dict) else {}
            result, error, kind = (outcome.get(key) for key in ("result", "error", "kind"))
            if not all(text is None or isinstance(text, str) for text in (result, error)):
                raise ValueError("its message was malformed")
            if error is not None and kind not in ("syntax", "runtime", "memory"):
                raise ValueError("its message was malformed")
            candidate.observation.result = result and self._cut(result)
            candidate.finish(error and self._cut(error), kind if error is not None else None)
            candidate.signal(signal.SIGSTOP)  # threads it left behind stand still
        elif "tool" in message:
            name, args, kwargs = (message.get(key) for key in ("tool", "args", "kwargs"))
            if candidate.calling or name not in self.tools or type(args) is not list or type(kwargs) is not dict:
                raise ValueError("its message was malformed")
            candidate.calling = True
            threading.Thread(target=self._call, args=(candidate, name, args, kwargs), daemon=True).start()
        elif "hello" not in message:
            raise ValueError("its message was malformed")

    def _cut(self, text):
        """Only for a candidate that did not cut it itself."""
        return text if len(text) < 2 * self.half + 100 else cut(text, 2 * self.half)

    def _call(self, candidate, name, args, kwargs):
        """A tool call, in a thread of its own: if it hangs, run() does not."""
        try:
            reply = {"value": self.tools[name](*args, **kwargs)}
            pack(reply)
        except BaseException as error:
            text = error.args[0] if len(error.args) == 1 and isinstance(error.args[0], str) else str(error)
            reply = {"error": type(error).__name__, "message": text or type(error).__name__}
        candidate.calling = False
        candidate.send(reply)

    def _settle(self, started):
        """Stop what is still running, and complete the observations."""
        # A process that never said who it is can only be ended together with all the others.
        lost = any(candidate.pid is None for candidate in self.candidates)
        after = "the state is lost: the next step starts with an empty one" if lost else "the state is as it was before"
        for index, candidate in enumerate(self.candidates):
            observation = candidate.observation
            if candidate.running:
                candidate.kill()
                text = f"TimeoutError: the code ran longer than {self.timeout:g} s and was stopped; {after}"
                candidate.finish(text, "timeout")
                observation.seconds = time.monotonic() - started
            elif observation.error_kind == "killed" and not observation.error:
                candidate.kill()
                status = None if lost else self._status(index)
                if status == -signal.SIGXCPU:
                    candidate.finish(f"TimeoutError: the code used up its processor time; {after}", "timeout")
                else:
                    candidate.finish(f"the Python process was ended{reason(status)}; {after}", "killed")
            observation.stdout = read_output(candidate.output, self.half)
            os.close(candidate.output)
        self.state.signal(signal.SIGSTOP)
        if lost:
            candidates = self.candidates
            self._lose()
            self.candidates = candidates

    def _status(self, index):
        """How a candidate ended, which its parent knows, if that is still there."""
        parent = parents(len(self.candidates))[index]
        process = self.state if parent is None else self.candidates[parent]
        if not process.alive():
            return None
        process.signal(signal.SIGCONT)
        try:
            if not process.send({"wait": index}) or not readable(process.channel, 0.2):
                return None
            status = (process.receive() or [{}])[0].get("status")
        except (OSError, ValueError):
            return None
        finally:
            if parent is not None:
                process.signal(signal.SIGSTOP)
        return status if isinstance(status, int) and -64 < status < 256 else None


class Sandboxes:
    """Sandboxes for one episode after another: `with sandboxes() as sandbox`. Each is as good as new.

    options: as for Sandbox. There are as many as are in use at once; threads share them.
    """

    USES = 200  # then a new one is made: forking counts as processor time, which is limited

    def __init__(self, **options):
        self.options, self.free = options, collections.deque()

    @contextlib.contextmanager
    def __call__(self):
        try:
            sandbox, uses = self.free.pop()
        except IndexError:
            sandbox, uses = Sandbox(**self.options, reusable=True), 0
        try:
            yield sandbox
        except BaseException:
            sandbox.close()
            raise
        if uses < self.USES:
            sandbox.reset()
            self.free.append((sandbox, uses + 1))
        else:
            sandbox.close()


# The command line.


@dataclasses.dataclass
class ReplConfig:
    timeout: float = option(10.0, "seconds a step may take")
    memory_mb: int = option(1024, "MB that a step may allocate")
    isolation: Literal["auto", "require", "off"] = option("auto", "what to do where a protection is missing")


def repl(config):
    """Type code; an empty line runs it. The state persists."""
    try:
        sandbox = Sandbox(timeout=config.timeout, memory_mb=config.memory_mb, isolation=config.isolation)
    except ValueError as error:
        raise InputError(str(error)) from None
    with sandbox:
        while True:
            lines = []
            try:
                while line := input("... " if lines else ">>> "):
                    lines.append(line)
                    if len(lines) == 1 and not line.rstrip().endswith((":", "(", "[", "{", "\\", ",")):
                        break
            except EOFError:
                print()
                return
            observation = sandbox.run("\n".join(lines))
            print(observation.stdout, end="" if observation.stdout.endswith("\n") else "\n" * bool(observation.stdout))
            for text in (observation.result, observation.error):
                if text is not None:
                    print(text)
            if observation.is_final:
                print(f"final answer: {observation.final_answer!r}")


@dataclasses.dataclass
class CheckConfig:
    pass


def check(config):
    """Try each protection on this machine. Exit status 0 only if all hold."""
    import sandbox_check

    return sandbox_check.check()


if __name__ == "__main__":
    run_command_line(__doc__, {"repl": (ReplConfig, repl), "check": (CheckConfig, check)}, default="repl")
