"""The kernel's part of the sandbox: Landlock, seccomp, resource limits, and handles on processes.

The inside of sandbox.py calls these functions in this order, before it runs any foreign code:

    set_limits(...)                      memory, CPU time, open files, printed output
    drop_privileges()                    no capabilities, and none to gain by running a program
    restrict_files(readable)             Landlock: only these paths can be opened, and only for reading
    filter_system_calls()                seccomp: a list of allowed system calls; returns the gate's descriptor

Each raises OSError if the kernel, or the container around it, does not offer the protection. The host uses two
classes: `Gate` answers when seccomp has stopped a process that wants to start a process or a thread, and `Process` is
a handle on one process. sandbox.py imports this file without the package, so it imports nothing of the project.

Sources: the manual pages landlock(7), seccomp(2), seccomp_unotify(2), capset(2), unix(7), pidfd_open(2).
"""

import ctypes
import errno
import fcntl
import json
import os
import platform
import resource
import select
import signal
import socket
import struct
import tempfile
from contextlib import suppress
from multiprocessing.connection import Connection, wait

LINUX = os.uname().sysname == "Linux"
ARM = platform.machine() in ("aarch64", "arm64")
SUPPORTED = LINUX and platform.machine() in ("x86_64", "aarch64")
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result, name):
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{os.strerror(code)} ({name})")
    return result


def _syscall(name, *arguments):
    """Make a system call by its number. bytes are passed as pointers."""
    wide = [a if isinstance(a, bytes) or a is None else ctypes.c_long(a) for a in arguments]
    return _checked(_libc.syscall(ctypes.c_long(SYSTEM_CALLS[name]), *wide), name)


def _prctl(option, value):
    zero = ctypes.c_ulong(0)
    _checked(_libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero), "prctl")


def adopt_orphans():
    """Become the parent of descendants whose own parent ends."""
    if LINUX:
        _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def drop_privileges():
    """Give up all capabilities. Set-user-ID programs give none back."""
    _syscall("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS


# ------------- Landlock
# It does not cover stat, chmod, chown, utime and extended attributes. The seccomp filter denies all of these but stat.

READ_FILE, READ_DIR = 4, 8
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # ABI version -> number of file access rights; 16 from version 5


def restrict_files(readable):
    """Deny every file access except reading below the paths `readable`."""
    version = _syscall("landlock_create_ruleset", None, 0, 1)  # LANDLOCK_CREATE_RULESET_VERSION
    handled = (1 << RIGHTS.get(version, 16)) - 1
    attribute = struct.pack("=QQQ", handled, 3, 3)  # files; TCP bind and connect; abstract Unix sockets and signals
    attribute = attribute[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _syscall("landlock_create_ruleset", attribute, len(attribute), 0)
    for path in readable:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE
        rule = struct.pack("=Qi", rights, descriptor)
        _syscall("landlock_add_rule", ruleset, 1, rule, 0)  # 1: LANDLOCK_RULE_PATH_BENEATH
        os.close(descriptor)
    _syscall("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


# ------------- Resource limits

_soft = {}  # limits for foreign code, set while it runs. The hard limits are higher, so that errors can be reported.


def set_limits(memory, cpu_seconds, file_size, open_files):
    """Set hard limits. memory: bytes that can be allocated from now on. file_size: bytes of printed output."""
    with suppress(OSError), open("/proc/self/statm") as file:
        memory += int(file.read().split()[0]) * resource.getpagesize()  # RLIMIT_AS limits the whole address space
    _soft.update({resource.RLIMIT_AS: memory, resource.RLIMIT_NOFILE: open_files})
    hard = {resource.RLIMIT_AS: memory + (64 << 20), resource.RLIMIT_NOFILE: open_files + 64}
    hard |= {resource.RLIMIT_CPU: cpu_seconds, resource.RLIMIT_FSIZE: file_size}
    hard |= {resource.RLIMIT_CORE: 0, resource.RLIMIT_MEMLOCK: 0, resource.RLIMIT_MSGQUEUE: 0} if LINUX else {}
    for kind, value in hard.items():
        current = resource.getrlimit(kind)[1]
        value = value if current == resource.RLIM_INFINITY else min(value, current)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):
            if LINUX:  # macOS refuses a limit on the address space
                raise


def lower_limits(foreign):
    """Switch between the limits for foreign code (True) and the hard limits."""
    for kind, soft in _soft.items():
        hard = resource.getrlimit(kind)[1]
        with suppress(ValueError, OSError):  # the code may have lowered the hard limit
            resource.setrlimit(kind, (soft if foreign and soft < hard else hard, hard))


# ------------- Seccomp: what is not listed is denied
# Each call is listed with its numbers on x86-64 and arm64. Not listed: socket, connect, exec, kill, ptrace, mount, bpf,
# keyctl, io_uring, memfd_create, pidfd_*, process_vm_*, setsid, setpgid, shmget, userfaultfd, every new system call,
# and everything that creates, changes, renames or removes a file.

ALLOWED = """
read 0 63, write 1 64, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, mprotect 10 226, brk 12 214,
munmap 11 215, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, pread64 17 67, pwrite64 18 68,
readv 19 65, writev 20 66, access 21 -, pipe 22 -, select 23 -, sched_yield 24 124, mremap 25 216, mincore 27 232,
madvise 28 233, dup 32 23, dup2 33 -, pause 34 -, nanosleep 35 101, getitimer 36 102, alarm 37 -, setitimer 38 103,
getpid 39 172, sendto 44 206, recvfrom 45 207, sendmsg 46 211, recvmsg 47 212, shutdown 48 210, getsockname 51 204,
getpeername 52 205, getsockopt 55 209, exit 60 93, wait4 61 260, uname 63 160, getdents 78 -, getcwd 79 17, chdir 80 49,
fchdir 81 50, readlink 89 -, gettimeofday 96 169, getrlimit 97 163, getrusage 98 165, sysinfo 99 179, times 100 153,
getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177, getppid 110 173, getpgrp 111 -, getpgid 121 155,
getsid 124 156, getgroups 115 158, getresuid 118 148, getresgid 120 150, rt_sigpending 127 136, rt_sigtimedwait 128 137,
rt_sigsuspend 130 133, sigaltstack 131 132, statfs 137 43, fstatfs 138 44, sched_getparam 143 121,
sched_getscheduler 145 120, sched_getaffinity 204 123, arch_prctl 158 -, gettid 186 178, futex 202 98, time 201 -,
epoll_create 213 -, getdents64 217 61, set_tid_address 218 96, restart_syscall 219 128, fadvise64 221 223,
clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, exit_group 231 94, epoll_wait 232 -,
epoll_ctl 233 21, epoll_pwait 281 22, waitid 247 95, newfstatat 262 79, readlinkat 267 78, faccessat 269 48,
faccessat2 439 439, pselect6 270 72, ppoll 271 73, set_robust_list 273 99, get_robust_list 274 100,
timerfd_create 283 85, timerfd_settime 286 86, timerfd_gettime 287 87, eventfd2 290 19, epoll_create1 291 20,
dup3 292 24, pipe2 293 59, preadv 295 69, pwritev 296 70, preadv2 327 286, pwritev2 328 287, getcpu 309 168,
getrandom 318 278, membarrier 324 283, statx 332 291, rseq 334 293, close_range 436 436, epoll_pwait2 441 441
"""
# Allowed for some arguments only, or used here before the filter is installed.
CONDITIONAL = """
open 2 -, openat 257 56, mmap 9 222, clone 56 220, clone3 435 435, ioctl 16 29, fcntl 72 25, prctl 157 167,
prlimit64 302 261, socketpair 53 199, seccomp 317 277, capset 126 91,
landlock_create_ruleset 444 444, landlock_add_rule 445 445, landlock_restrict_self 446 446
"""


def _numbers(table):
    rows = (entry.split() for entry in table.split(","))
    return {row[0]: int(row[1 + ARM]) for row in rows if row[1 + ARM] != "-"}


SYSTEM_CALLS = _numbers(ALLOWED) | _numbers(CONDITIONAL)

THREAD = 0x10F00  # clone flags of a thread: CLONE_THREAD with SIGHAND, VM, FS and FILES
CHECKED = 0x7E03FF00  # the flags that a thread must have or must not have, those for namespaces included
FORK = 0x1200011  # clone flags of glibc's fork(): CLONE_CHILD_SETTID, CLONE_CHILD_CLEARTID, SIGCHLD
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
ALLOW, ASK, KILL, DENY = 0x7FFF0000, 0x7FC00000, 0x80000000, 0x50000 | errno.EPERM


def _filter(gate):
    """Returns the BPF program and its number of instructions. gate: whether clone asks the host or is allowed."""
    program = []

    def load(offset):
        return (0x20, 0, 0, offset)

    def argument(index):
        return load(16 + 8 * index)  # its lower 32 bits

    def verdict(value):
        return (0x06, 0, 0, value)

    def masked(mask):
        return (0x54, 0, 0, mask)

    def if_equal(value, action):
        return [(0x15, 0, 1, value), verdict(action)]

    def rule(name, *body, otherwise=DENY):
        """Instructions for one system call; `otherwise` is the verdict if none of them returned one."""
        if name in SYSTEM_CALLS:
            body = [*body, verdict(otherwise)]
            program.extend([(0x15, 0, len(body), SYSTEM_CALLS[name]), *body])

    def rule_argument(name, index, values):
        rule(name, argument(index), *(step for value in values for step in if_equal(value, ALLOW)))

    program += [load(4), (0x15, 1, 0, 0xC00000B7 if ARM else 0xC000003E), verdict(KILL)]  # the architecture
    program += [load(0)]  # the system call's number, which every rule compares
    for name in _numbers(ALLOWED):
        rule(name, otherwise=ALLOW)
    rule("open", argument(1), masked(WRITING), *if_equal(0, ALLOW))
    rule("openat", argument(2), masked(WRITING), *if_equal(0, ALLOW))
    # No MAP_SHARED: candidates would share what their state has mapped.
    rule("mmap", argument(3), masked(1), *if_equal(0, ALLOW))
    start = ASK if gate else ALLOW
    rule("clone", argument(0), *if_equal(FORK, start), masked(CHECKED), *if_equal(THREAD, start))
    # clone3 passes its flags in memory, where a filter cannot check them. The C library falls back to clone.
    rule("clone3", otherwise=0x50000 | errno.ENOSYS)
    rule_argument("ioctl", 1, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451])  # isatty, FIONREAD, FIONBIO, FIOCLEX...
    rule_argument("fcntl", 1, [0, 1, 2, 3, 4, 1030])  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
    rule_argument("prctl", 0, [15, 16, 0x53564D41])  # names of threads and of mappings
    rule_argument("prlimit64", 0, [0])  # the process's own limits
    # asyncio needs an unnamed pair of stream sockets. A pair of datagram sockets could send to any address.
    stream = [argument(1), masked(0xF), *if_equal(1, ALLOW)]
    rule("socketpair", argument(0), (0x15, 0, len(stream), 1), *stream)
    program.append(verdict(DENY))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program), len(program)


def filter_system_calls():
    """Install the filter, which cannot be removed again. Returns the gate's descriptor.

    Returns None if another program (a container manager) already listens to this process's system calls; foreign code
    can start processes then.
    """
    for gate in (True, False):
        code, length = _filter(gate)
        buffer = ctypes.create_string_buffer(code, len(code))
        program = struct.pack("=H6xQ", length, ctypes.addressof(buffer))
        try:
            descriptor = _syscall("seccomp", 1, 8 if gate else 0, program)  # SET_MODE_FILTER, NEW_LISTENER
            return descriptor if gate else None
        except OSError as error:
            if not gate or error.errno not in (errno.EBUSY, errno.EINVAL):
                raise


class Gate:
    """The host's half of the gate: decides which process may fork, and how many threads may start.

    forker: the PID that may fork. left: how many forks and threads are still allowed, for all processes together.
    """

    def __init__(self, descriptor, forker):
        self.descriptor, self.forker, self.left = descriptor, forker, {"fork": 0, "thread": 0}

    def serve(self):
        """Answer until the last process of the sandbox has ended, then close the descriptor. Runs in a thread."""
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        while poll.poll()[0][1] & select.POLLIN:
            question = bytearray(80)  # struct seccomp_notif: id, pid, flags, seccomp_data(nr, arch, ip, args[6])
            with suppress(OSError):  # the process was killed while it waited
                fcntl.ioctl(self.descriptor, 0xC0502100, question)  # SECCOMP_IOCTL_NOTIF_RECV
                number, process = struct.unpack_from("=QI", question)
                flags = struct.unpack_from("=I", question, 32)[0]
                kind = "fork" if flags == FORK else "thread"
                allow = self.left[kind] > 0 and (kind == "thread" or process == self.forker)
                self.left[kind] -= allow
                # struct seccomp_notif_resp: id, val, error, flags (1: continue with the system call)
                answer = struct.pack("=QqiI", number, 0, 0 if allow else -errno.EPERM, int(allow))
                fcntl.ioctl(self.descriptor, 0xC0182101, bytearray(answer))  # SECCOMP_IOCTL_NOTIF_SEND
        os.close(self.descriptor)


# ------------- The host's handle on a process

MESSAGE_LIMIT = 8 << 20  # bytes of one message: code, a tool's arguments, a final answer


def open_socket(connection):
    """Returns a socket object for what a Connection cannot do: descriptors, credentials, shutdown."""
    return socket.socket(fileno=os.dup(connection.fileno()))


class Process:
    """The host's handle on a process of a sandbox: the channel to it, its PID and its output file.

    Descriptors are closed when the last thread drops its reference, so that no thread uses a closed one.
    """

    def __init__(self, observation):
        self.pid = self.pidfd = self.output = None
        ours, self.remote = socket.socketpair()
        if LINUX:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # before the first message: the sender's PID
        self.channel, self.observation, self.killed = Connection(ours.detach()), observation, False
        self.failure = None  # an InputError of a tool, which ends the run
        # An unnamed file for descriptors 1 and 2 of the process: a kill loses nothing that was printed.
        self.output = os.memfd_create("output") if LINUX else os.dup(tempfile.TemporaryFile().fileno())

    def __del__(self):
        for descriptor in (self.output, self.pidfd):
            if descriptor is not None:
                os.close(descriptor)

    def fork_from(self, parent, *descriptors):
        """Ask the process behind `parent` to fork, with two descriptors for the child."""
        with open_socket(parent) as channel, self.remote:
            socket.send_fds(channel, [b"f"], descriptors)

    def hello(self, seconds, with_gate=False):
        """Wait for the process's first message. Its PID comes from the kernel. Returns the gate's descriptor, or None.

        Raises TimeoutError, and EOFError or OSError if the process has ended.
        """
        if not wait([self.channel], seconds):
            raise TimeoutError("a process of the sandbox did not start")
        with open_socket(self.channel) as channel:
            room = socket.CMSG_SPACE(12) + (socket.CMSG_SPACE(4) if with_gate else 0)
            data, extra, _, _ = channel.recvmsg(4, room)
        if len(data) < 4:
            raise EOFError("a process of the sandbox ended while it started")
        gate, self.pid = None, struct.unpack("=i", data)[0]  # as the process itself says, for macOS
        for _, kind, payload in extra:
            if kind == socket.SCM_RIGHTS:
                gate = struct.unpack("=i", payload)[0]
            else:
                self.pid = struct.unpack("=Iii", payload)[0]
        if LINUX:
            self.pidfd = os.pidfd_open(self.pid)
        return gate

    def send(self, message):
        self.channel.send_bytes(json.dumps(message).encode())

    def receive(self):
        """Returns the next message, a dict. Raises ValueError if it is not a JSON object.

        Raises EOFError or OSError if the process has ended, or if the message is too long.
        """
        data = self.channel.recv_bytes(MESSAGE_LIMIT)
        try:
            # Twice, to refuse infinities and to replace lone surrogates, which could not be written to a file later.
            text = json.dumps(json.loads(data.decode()), ensure_ascii=False, allow_nan=False)
            message = json.loads(text.encode("utf-8", "replace"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON ({type(error).__name__})") from None
        if not isinstance(message, dict):
            raise ValueError("not a JSON object")
        return message

    def printed(self, limit):
        """Returns what the process has written to its descriptors 1 and 2, up to `limit` bytes."""
        return os.pread(self.output, limit, 0).decode("utf-8", "replace")

    def signal(self, number):
        with suppress(ProcessLookupError):
            if self.pidfd is not None:  # unlike a PID, it never refers to another process
                signal.pidfd_send_signal(self.pidfd, number)
            elif self.pid is not None:
                os.kill(self.pid, number)

    def kill(self):
        self.killed = True
        self.signal(signal.SIGKILL)
        with suppress(OSError), open_socket(self.channel) as channel:
            channel.shutdown(socket.SHUT_RDWR)  # a thread that reads or writes stops, whoever holds the other end

    def usable(self):
        return not self.killed and not (self.pidfd is not None and wait([self.pidfd], 0))
