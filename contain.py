"""The kernel's layers around the sandbox: namespaces, Landlock, seccomp and resource limits, through ctypes.

interpreter.py calls them in this order, before any foreign code runs:

    enter_namespaces()                 once, for the warm interpreter: processes, network and mounts of its own
    build_root(visible, ...)           once: a file tree that holds the interpreter's libraries and nothing else
    mount_scratch(folder, megabytes)   once a sandbox: a writable folder of bounded size that vanishes with it
    drop_privileges(user)              no root, no capabilities, nothing to gain by exec
    restrict_files(read, write, ...)   Landlock: which files may be opened, and how
    filter_system_calls()              seccomp: which system calls there are at all; returns the gate
    set_limits(...)                    memory, processor time, open files, file size

Each raises OSError where this kernel, or the container around us, does not offer it. Sources: the manual pages
landlock(7), seccomp(2), seccomp_unotify(2), namespaces(7), pivot_root(2), and the headers of Linux.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import resource
import struct
from pathlib import Path

LINUX = os.uname().sysname == "Linux"
ARM = platform.machine() in ("aarch64", "arm64")
SUPPORTED = LINUX and platform.machine() in ("x86_64", "aarch64")
libc = ctypes.CDLL(None, use_errno=True)


def check(result, name):
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def _syscall(name, *arguments):
    """A system call by its number; bytes pass as pointers."""
    number = SYSTEM_CALLS[name]
    wide = [a if isinstance(a, bytes | ctypes.Array) or a is None else ctypes.c_long(a) for a in arguments]
    return check(libc.syscall(ctypes.c_long(number), *wide), name)


def _prctl(option, value):
    zero = ctypes.c_ulong(0)
    check(libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero), "prctl")


def die_with_parent():
    _prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


def adopt_orphans():
    _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


# Namespaces: what is not there cannot be reached.

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 0x1000, 0x4000, 0x40000


def _mount(source, target, kind=None, flags=0, data=None):
    encode = lambda text: None if text is None else os.fsencode(text)  # noqa: E731
    result = libc.mount(encode(source), encode(target), encode(kind), ctypes.c_ulong(flags), encode(data))
    check(result, f"mount {target}")


def enter_namespaces():
    """Go on in a child that is process 1 of its own namespaces; the parent waits for it and ends with it.

    Root makes them as such; anyone else makes a user namespace first, in which it may.
    """
    uid, gid = os.geteuid(), os.getegid()
    spaces = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
    if uid or libc.unshare(spaces):
        check(libc.unshare(spaces | NEWUSER), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os._exit(0)
    die_with_parent()


def build_root(visible, scratch, links, descriptor):
    """Replace the file tree by one that holds the visible paths (read-only), /proc, and an empty scratch folder.

    Returns the first of `links` that is free; it is made to lead each process to its own file `descriptor`.
    """
    root = "/sys"  # any folder that is always there and holds nothing that must stay visible
    _mount(None, "/", flags=MS_REC | MS_PRIVATE)
    _mount("sandbox", root, "tmpfs", MS_NOSUID, "mode=755,size=1m")
    for entry in os.scandir("/"):
        if entry.is_symlink():  # /lib -> usr/lib
            os.symlink(os.readlink(entry.path), root + entry.path)
    for path in sorted(visible, key=len):
        if os.path.exists(root + path):
            continue  # inside a folder that is visible already
        if os.path.isdir(path):
            os.makedirs(root + path)
        else:
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.close(os.open(root + path, os.O_CREAT))
        _mount(path, root + path, flags=MS_BIND | MS_REC)
    os.mkdir(root + "/proc")
    try:  # a /proc of the new processes only
        _mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except OSError:  # a container that hides parts of its own /proc gets that one: Landlock closes it anyway
        _mount("/proc", root + "/proc", flags=MS_BIND | MS_REC)
    os.mkdir(root + scratch)
    link = next(link for link in links if not os.path.lexists(root + link))
    os.symlink(f"/proc/self/fd/{descriptor}", root + link)
    os.chdir(root)
    _syscall("pivot_root", b".", b".")
    check(libc.umount2(b".", 2), "umount2")  # MNT_DETACH
    os.chdir("/")
    readonly = struct.pack("=QQQQ", MS_RDONLY | MS_NOSUID, 0, 0, 0)
    _syscall("mount_setattr", -100, b"/", 0x8000, readonly, len(readonly))  # AT_FDCWD, AT_RECURSIVE
    return link


def mount_scratch(scratch, megabytes):
    """A tmpfs of bounded size in a mount namespace of this sandbox alone: it vanishes with its last process."""
    check(libc.unshare(NEWNS), "unshare")
    _mount("scratch", scratch, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, f"size={megabytes}m,nr_inodes=10k,mode=700")


def unprivileged_user(readable):
    """The user to become: nobody where we are root, unless nobody cannot read the interpreter's files."""
    user = os.geteuid()
    if user == 0:
        try:
            os.seteuid(65534)
        except OSError:  # a user namespace in which there is no one else
            return 0
        if all(os.access(path, os.R_OK | os.X_OK, effective_ids=True) for path in readable):
            user = 65534
        os.seteuid(0)
    return user


def drop_privileges(user):
    """Become this user, lose every capability, and gain nothing by running setuid programs."""
    if user != os.geteuid():
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _syscall("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS


# Resource limits.


def address_space():
    """Bytes of address space this process has now."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


_foreign = {}  # kind: the limit for foreign code; ours is higher, as we must work when it has used up its own


def set_limits(memory, cpu_seconds, file_size, open_files, processes=None):
    """Bytes, seconds, bytes, descriptors. Memory is address space: what is limited is what can be asked for.

    processes: where there is no gate, a rough bound on what this user may have, in and outside of the sandbox.
    """
    _foreign.update({resource.RLIMIT_AS: memory, resource.RLIMIT_NOFILE: open_files})
    ours = {resource.RLIMIT_AS: memory + (64 << 20), resource.RLIMIT_NOFILE: open_files + 256}
    ours |= {resource.RLIMIT_CPU: cpu_seconds, resource.RLIMIT_FSIZE: file_size}
    ours |= {resource.RLIMIT_CORE: 0, resource.RLIMIT_MEMLOCK: 0}
    if processes:
        ours[resource.RLIMIT_NPROC] = processes
    for kind, value in ours.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):
            if LINUX:  # macOS refuses a limit on address space
                raise


def hold_limits(foreign):
    """Switch between the limits for foreign code and ours."""
    for kind, soft in _foreign.items():
        hard = resource.getrlimit(kind)[1]
        try:
            resource.setrlimit(kind, (soft if foreign and soft < hard else hard, hard))
        except (ValueError, OSError):  # it is lower already
            pass


# Landlock: opening, making, removing and renaming files is denied but beneath the folders named here. It does not
# cover stat, chmod, chown, utime and extended attributes; the seccomp filter does the last four.

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, MAKE_SYM, REFER, TRUNCATE = 16, 32, 128, 256, 4096, 8192, 16384


def landlock_version():
    """The kernel's Landlock ABI; OSError where there is none."""
    return _syscall("landlock_create_ruleset", None, 0, 1)


def restrict_files(read, write, devices):
    """Allow reading beneath `read`, everything ordinary beneath `write`, and reading and writing `devices`."""
    version = landlock_version()
    handled = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    attribute = struct.pack("=QQQ", handled, 3, 3)  # TCP bind and connect; abstract unix sockets and signals
    attribute = attribute[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _syscall("landlock_create_ruleset", attribute, len(attribute), 0)
    writing = WRITE_FILE | READ_FILE | READ_DIR | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM
    rules = [(path, READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE) for path in read]
    rules += [(path, writing | REFER | TRUNCATE) for path in write]
    rules += [(path, WRITE_FILE | READ_FILE | TRUNCATE) for path in devices]
    for path, rights in rules:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights & handled, folder)
        _syscall("landlock_add_rule", ruleset, 1, rule, 0)
        os.close(folder)
    _syscall("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


# Seccomp: a list of what is allowed, so that what the kernel learns tomorrow is forbidden already. Each entry is a
# name and its numbers on x86-64 and on arm64. It has no socket, connect, exec, ptrace, mount, bpf, keyctl, io_uring,
# memfd_create, pidfd_*, process_vm_*, setsid, shmget, userfaultfd...

ALLOWED = """
read 0 63, write 1 64, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62,
mprotect 10 226, brk 12 214, munmap 11 215, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, pipe 22 -, select 23 -, sched_yield 24 124,
mremap 25 216, msync 26 227, mincore 27 232, madvise 28 233, dup 32 23, dup2 33 -, pause 34 -, nanosleep 35 101,
getitimer 36 102, alarm 37 -, setitimer 38 103, getpid 39 172, sendfile 40 71, sendto 44 206, recvfrom 45 207,
sendmsg 46 211, recvmsg 47 212, shutdown 48 210, getsockname 51 204, getpeername 52 205, setsockopt 54 208,
getsockopt 55 209, exit 60 93, wait4 61 260, uname 63 160, flock 73 32, fsync 74 82, fdatasync 75 83, ftruncate 77 46,
getdents 78 -, getcwd 79 17, chdir 80 49, fchdir 81 50, rename 82 -, mkdir 83 -, rmdir 84 -, creat 85 -, link 86 -,
unlink 87 -, symlink 88 -, readlink 89 -, umask 95 166, gettimeofday 96 169, getrlimit 97 163, getrusage 98 165,
sysinfo 99 179, times 100 153, getuid 102 174, getgid 104 176, geteuid 107 175, getegid 108 177, getppid 110 173,
getpgrp 111 -, getpgid 121 155, getsid 124 156, getgroups 115 158, getresuid 118 148, getresgid 120 150,
rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, statfs 137 43,
fstatfs 138 44, sched_getparam 143 121, sched_getscheduler 145 120, sched_getaffinity 204 123, arch_prctl 158 -,
sync_file_range 277 84, gettid 186 178, futex 202 98, time 201 -, epoll_create 213 -, getdents64 217 61,
set_tid_address 218 96, restart_syscall 219 128, fadvise64 221 223, timer_create 222 107, timer_settime 223 110,
timer_gettime 224 108, timer_getoverrun 225 109, timer_delete 226 111, clock_gettime 228 113, clock_getres 229 114,
clock_nanosleep 230 115, exit_group 231 94, epoll_wait 232 -, epoll_ctl 233 21, epoll_pwait 281 22, waitid 247 95,
mkdirat 258 34, newfstatat 262 79, unlinkat 263 35, renameat 264 38, renameat2 316 276, linkat 265 37,
symlinkat 266 36, readlinkat 267 78, faccessat 269 48, faccessat2 439 439, pselect6 270 72, ppoll 271 73,
set_robust_list 273 99, get_robust_list 274 100, fallocate 285 47, timerfd_create 283 85, timerfd_settime 286 86,
timerfd_gettime 287 87, eventfd2 290 19, epoll_create1 291 20, dup3 292 24, pipe2 293 59, preadv 295 69, pwritev 296 70,
preadv2 327 286, pwritev2 328 287, getcpu 309 168, getrandom 318 278, membarrier 324 283, copy_file_range 326 285,
statx 332 291, rseq 334 293, close_range 436 436, epoll_pwait2 441 441
"""
# These answer "done" and do nothing: shutil and zipfile call them in passing, but they reach any file by its path.
IGNORED = """
chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54,
utime 132 -, utimes 235 -, utimensat 280 88, futimesat 261 -
"""
# These answer "not supported by this file system", which every caller is prepared for.
UNSUPPORTED = """
setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, getxattr 191 8, lgetxattr 192 9, fgetxattr 193 10,
listxattr 194 11, llistxattr 195 12, flistxattr 196 13
"""
# These depend on an argument, or are used here before the filter is in place.
OTHERS = """
open 2 -, openat 257 56, mmap 9 222,
clone 56 220, clone3 435 435, kill 62 129, tgkill 234 131, ioctl 16 29, fcntl 72 25, prctl 157 167, prlimit64 302 261,
socketpair 53 199, setpgid 109 154, seccomp 317 277, capset 126 91, pivot_root 155 41, mount_setattr 442 442,
landlock_create_ruleset 444 444, landlock_add_rule 445 445, landlock_restrict_self 446 446
"""


def _numbers(table):
    rows = (entry.split() for entry in table.split(","))
    return {row[0]: int(row[1 + ARM]) for row in rows if row[1 + ARM] != "-"}


SYSTEM_CALLS = _numbers(ALLOWED) | _numbers(IGNORED) | _numbers(UNSUPPORTED) | _numbers(OTHERS)
NAMES = {number: name for name, number in SYSTEM_CALLS.items()}

THREAD = 0x10F00  # CLONE_THREAD and what must go with it: SIGHAND, VM, FS, FILES
FORK = 0x1200011  # what glibc's fork() passes: CLONE_CHILD_SETTID, CLONE_CHILD_CLEARTID, SIGCHLD
ALLOW, ASK, KILL, REFUSE = 0x7FFF0000, 0x7FC00000, 0x80000000, 0x50000


def _filter(gate):
    """The BPF program: load the call's number, compare it with each entry, return the verdict beside it."""
    load = lambda offset: (0x20, 0, 0, offset)  # noqa: E731
    argument = lambda index: load(16 + 8 * index)  # the low half of it # noqa: E731
    verdict = lambda value: (0x06, 0, 0, value)  # noqa: E731
    skip_unless_equal = lambda value, skip: (0x15, 0, skip, value)  # noqa: E731
    program = [load(4), (0x15, 1, 0, 0xC00000B7 if ARM else 0xC000003E), verdict(KILL), load(0)]

    def when(name, *body):
        if name in SYSTEM_CALLS:
            program.extend([skip_unless_equal(SYSTEM_CALLS[name], len(body)), *body])

    def when_argument(name, index, values, value_if=ALLOW, value_else=REFUSE | errno.EPERM):
        tests = [step for value in values for step in (skip_unless_equal(value, 1), verdict(value_if))]
        when(name, argument(index), *tests, verdict(value_else))

    # Memory that a fork would share, for writing: only what is printed goes to such, by descriptor 1.
    alone = [(0x54, 0, 0, 1), skip_unless_equal(0, 1), verdict(ALLOW)]  # not MAP_SHARED
    read_only = [argument(2), (0x54, 0, 0, 2), skip_unless_equal(0, 1), verdict(ALLOW)]  # not PROT_WRITE
    printed = [argument(4), skip_unless_equal(1, 1), verdict(ALLOW)]
    when("mmap", argument(3), *alone, *read_only, *printed, verdict(REFUSE | errno.EPERM))
    for name in _numbers(ALLOWED):
        when(name, verdict(ALLOW))
    for name in _numbers(IGNORED):
        when(name, verdict(REFUSE | 0))
    for name in _numbers(UNSUPPORTED):
        when(name, verdict(REFUSE | errno.EOPNOTSUPP))
    # Cutting a file that is opened for reading only: Landlock sees it from Linux 6.2 on.
    cut = [(0x54, 0, 0, 0x203), skip_unless_equal(0x200, 1), verdict(REFUSE | errno.EPERM), verdict(ALLOW)]
    when("open", argument(1), *cut)
    when("openat", argument(2), *cut)
    # New threads and processes pass the gate; namespaces and anything else are refused. clone3 hides its flags in
    # memory: the C library falls back to clone.
    ask = ASK if gate else ALLOW
    thread = [(0x54, 0, 0, 0x7E03FF00), skip_unless_equal(THREAD, 1), verdict(ask), verdict(REFUSE | errno.EPERM)]
    when("clone", argument(0), skip_unless_equal(FORK, 1), verdict(ask), *thread)
    when("clone3", verdict(REFUSE | errno.ENOSYS))
    for name in ("kill", "tgkill"):
        when(name, verdict(ASK if gate else REFUSE | errno.EPERM))
    # isatty, the size of a terminal, FIONREAD, FIONBIO, and closing on exec
    when_argument("ioctl", 1, [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451])
    when_argument("fcntl", 1, [8, 10, 15, 1024, 1026], REFUSE | errno.EPERM, ALLOW)  # no signals from files, no leases
    when_argument("prctl", 0, [15, 16, 0x53564D41])  # names of threads and of mappings
    when_argument("prlimit64", 0, [0])  # one's own
    # An unnamed pair of streams (asyncio needs one). A pair of datagram sockets could still send to any address.
    stream = [(0x54, 0, 0, 0xF), skip_unless_equal(1, 1), verdict(ALLOW), verdict(REFUSE | errno.EPERM)]
    when("socketpair", argument(0), (0x15, 1, 0, 1), verdict(REFUSE | errno.EPERM), argument(1), *stream)
    if not gate:  # candidates are told apart by process groups then
        when_argument("setpgid", 0, [0])
    program.append(verdict(REFUSE | errno.EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program), len(program)


def filter_system_calls():
    """Install the filter for good. Returns the descriptor of the gate, or None where another one is in our way.

    The gate asks a process outside, the host, before a process or thread starts and before a signal is sent.
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
    raise AssertionError("unreachable")


class Gate:
    """The host's side of the gate: one question at a time, with the system call's arguments, which cannot change."""

    def __init__(self, descriptor):
        self.descriptor = descriptor
        with contextlib.suppress(OSError):  # Linux 6.6: whoever asks wakes us in its place, as we then do it
            fcntl.ioctl(descriptor, 0x40082104, 1)  # SECCOMP_IOCTL_NOTIF_SET_FLAGS, ..._SYNC_WAKE_UP

    def fileno(self):
        return self.descriptor

    def ask(self):
        """The waiting question: (its id, the asking thread as this process knows it, name, arguments), or None."""
        question = bytearray(80)
        try:
            fcntl.ioctl(self.descriptor, 0xC0502100, question)  # SECCOMP_IOCTL_NOTIF_RECV
        except OSError:  # it was killed while it waited
            return None
        number, thread, _, call = struct.unpack_from("=QIIi", question)
        return number, thread, NAMES[call], struct.unpack_from("=6Q", question, 32)

    def answer(self, number, allow):
        reply = struct.pack("=QqiI", number, 0, 0 if allow else -errno.EPERM, 1 if allow else 0)
        try:
            fcntl.ioctl(self.descriptor, 0xC0182101, bytearray(reply))  # SECCOMP_IOCTL_NOTIF_SEND
        except OSError:
            pass

    def close(self):
        os.close(self.descriptor)


def is_own_process(thread, process):
    """Is `process`, a number in the asker's namespace, the process that `thread`, a number in ours, belongs to?"""
    try:
        status = Path(f"/proc/{thread}/status").read_text()
    except OSError:
        return False
    line = next((line for line in status.splitlines() if line.startswith("NStgid:")), "NStgid: 0")
    return int(line.split()[-1]) == process
