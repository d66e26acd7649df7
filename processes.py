"""The host's handles on what runs in the sandbox: the warm interpreter, a process, a candidate with its observation.

sandbox.py decides with them what runs when. A process is foreign as soon as it has run code: nothing that comes from
it is believed, and none of it makes the host wait longer than the time-out.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading

import contain
import interpreter
from wire import MESSAGE_LIMIT, receive, send


@dataclasses.dataclass
class Observation:
    """What came of one action."""

    stdout: str = ""  # what was printed (stderr too), cut in the middle where it is long
    result: str | None = None  # repr of the last expression; None where there is none, or it is None
    error: str | None = None  # one message
    error_kind: str | None = None  # None, "syntax", "runtime", "timeout", "memory" or "killed"
    is_final: bool = False  # final_answer was called
    final_answer: object = None  # its argument: a JSON value, or the text of anything else
    seconds: float = 0.0


class Warmth:
    """The host's handle on the warm interpreter."""

    def __init__(self, contained):
        self.lock = threading.Lock()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < 4096:  # 64 sandboxes with 8 candidates each need 1,700 descriptors
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard) if hard > 0 else 4096, hard))
        self.control, theirs = socket.socketpair()
        # Threads of a library would not survive a fork; a random hash seed would make sets print differently.
        names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
        environment = dict.fromkeys(names, "1") | {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"LC_ALL": "C.UTF-8", "GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}
        command = [sys.executable, "-s", os.path.abspath(interpreter.__file__), str(theirs.fileno())]
        self.process = subprocess.Popen(
            command,
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        theirs.close()
        own = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
        path = [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages", "lib-dynload")]
        send(self.control, {"contained": contained, "path": list(dict.fromkeys(own + path))})
        ready, _ = receive(self.control)
        if ready is None:
            raise RuntimeError(f"the warm interpreter did not start: {self.process.stderr.read().decode()[-2000:]}")
        self.missing = ready["missing"]


_warm = {}
os.register_at_fork(after_in_child=_warm.clear)  # a forked host must make its own
_warm_lock = threading.Lock()


def warm_interpreter(isolation):
    contained = isolation != "off"
    with _warm_lock:
        if contained not in _warm or _warm[contained].process.poll() is not None:
            _warm[contained] = Warmth(contained)
        return _warm[contained]


class Process:
    """The host's handle on one process of a sandbox: its channel, and a pidfd, which never means another process."""

    def __init__(self, channel, timeout, grouped):
        self.channel, self.grouped = channel, grouped
        self.pid = self.pidfd = None
        self.buffer, self.lock = bytearray(), threading.Lock()
        channel.settimeout(timeout)  # no process of ours, however hostile, makes us wait longer
        if contain.LINUX:
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    def receive(self, descriptors=0):
        """What has arrived as messages; None at the end of the channel, ValueError for what is no message.

        The kernel says who sent it, so nobody can pass for another. Descriptors sent along are dropped, but for
        those that the sandbox sends before any foreign code has run: the last items then.
        """
        room = socket.CMSG_SPACE(12) + (socket.CMSG_SPACE(4 * descriptors) if descriptors else 0)
        data, extra, _, _ = self.channel.recvmsg(1 << 16, room)
        if not data:
            return None
        self.buffer += data
        messages, received = [], []
        for _, kind, payload in extra:
            if kind == socket.SCM_RIGHTS:
                received = struct.unpack(f"={len(payload) // 4}i", payload)
            elif self.pid is None:
                self.pid = struct.unpack("=Iii", payload)[0]
                self.pidfd = os.pidfd_open(self.pid)
        while len(self.buffer) >= 4:
            length = int.from_bytes(self.buffer[:4], "big")
            if length > MESSAGE_LIMIT:
                raise ValueError("its message was too long")
            if len(self.buffer) < 4 + length:
                break
            messages.append(_parse(bytes(self.buffer[4 : 4 + length])))
            del self.buffer[: 4 + length]
        if self.pid is None and messages:  # macOS: we have to believe it
            self.pid = int(messages[0]["hello"])
        return [*messages, *received]

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.pidfd is not None:
                signal.pidfd_send_signal(self.pidfd, number)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.grouped and self.pid:
                os.killpg(self.pid, number)

    def send(self, message, descriptors=()):
        """False if it cannot be delivered."""
        with self.lock:
            try:
                send(self.channel, message, descriptors)
                return True
            except OSError:
                return False

    def alive(self):
        return self.channel.fileno() >= 0 and not (self.pidfd is not None and readable(self.pidfd, 0))

    def kill(self, wait=0.0):
        """End it, whatever it does. wait: seconds to wait until the kernel has."""
        if self.channel.fileno() < 0:
            return
        self.signal(signal.SIGKILL)
        if wait and self.pidfd is not None:
            readable(self.pidfd, wait)
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)  # a tool's answer on its way is given up
        with self.lock:
            self.channel.close()
            if self.pidfd is not None:
                os.close(self.pidfd)
                self.pidfd = None


def reason(status):
    if status is None:
        return ""
    return f" by {signal.Signals(-status).name}" if status < 0 else f" with exit status {status}"


def readable(descriptor, seconds):
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0, math.ceil(seconds * 1000))))


def _constant(text):
    raise ValueError(f"{text} is not JSON")


def _integer(digits):  # Python refuses to parse a longer one, which would take long
    return int(digits) if len(digits) <= 4000 else digits


_decoder = json.JSONDecoder(parse_int=_integer, parse_constant=_constant)


def _parse(data):
    """A message from a candidate: any bytes may come. ValueError if it is not an object in JSON."""
    try:
        message = _decoder.decode(data.decode())
        if b"\\ud" in data.lower():  # half a surrogate pair could not be written to a file later
            message = _decoder.decode(json.dumps(message, ensure_ascii=False).encode("utf-8", "replace").decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its message was not JSON ({type(error).__name__})") from None
    if not isinstance(message, dict):
        raise ValueError("its message was not an object")
    return message


def shared_memory(size):
    """A file in memory that cannot be resized: a shorter one could not be read safely."""
    if not contain.LINUX:
        with tempfile.TemporaryFile() as file:
            file.truncate(size)
            return os.dup(file.fileno())
    descriptor = os.memfd_create("output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return descriptor


class Candidate(Process):
    """One action on its way: its process, its output, and what has come of it so far."""

    def __init__(self, channel, timeout, grouped, output):
        super().__init__(channel, timeout, grouped)
        self.output, self.name = output, os.urandom(8).hex()
        self.observation = Observation()
        self.running, self.calling = True, False

    def finish(self, error=None, kind=None):
        self.running = False
        if not self.observation.is_final:
            self.observation.error, self.observation.error_kind = error, kind
