"""`python sandbox.py check`: does each protection hold on this machine?"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import warnings

import contain
from sandbox import Sandbox

# What `check` tries in a sandbox: name; the layers it needs; what is true where it holds.
TRIES = """
reads nothing but libraries; Landlock; refused(open, SECRET), refused(open, '/etc/passwd'), refused(listdir, '/')
does not even see other files; namespaces, file; not exists(SECRET), not exists('/etc/passwd')
writes no file outside; Landlock; refused(open, SECRET, 'a'), refused(open, SECRET + 'x', 'w')
removes or cuts no file outside; Landlock; refused(os.truncate, SECRET, 0), refused(os.unlink, SECRET)
has a scratch folder of bounded size; ; too_much_is_refused()
sees no /proc of others; Landlock; refused(open, f'/proc/{HOST}/environ'), refused(os.readlink, f'/proc/{HOST}/exe')
has no network; seccomp; [refused(socket.socket, family) for family in (1, 2, 10, 16, 17)]
reaches no socket by its name; seccomp; refused(socket.socketpair, 1, 2)
starts no programs; Landlock, seccomp; refused(os.execv, sys.executable, ['x']), refused(subprocess.run, ['true'])
starts no processes; seccomp, gate; refused(os.fork), refused(os.setsid)
starts a bounded number of threads; seccomp, gate; refused(start_threads)
signals no other process; seccomp; [refused(os.kill, pid, 0) for pid in (HOST, os.getppid() or 1, 0, -1)]
traces no other process; seccomp; libc.ptrace(0x4206, HOST, 0, 0) < 0, refused(os.pidfd_open, HOST)
opens no doors into the kernel; seccomp; [not_permitted(call) for call in DOORS]
has bounded memory; ; refused(bytearray, 2**31), refused(mmap.mmap, -1, 2**31)
has bounded open files and processor time; ; refused(open_files), getrlimit(RLIMIT_CPU)[1] < 60
inherits nothing; ; not os.environ, [fd for fd in range(3, 99) if S_ISSOCK(mode(fd))] == [3]
"""
TRY = """
import ctypes, mmap, os, platform, socket, subprocess, sys, time
from os import listdir
from os.path import exists
from resource import RLIMIT_CPU, getrlimit
from stat import S_ISSOCK
from threading import Thread
libc = ctypes.CDLL(None, use_errno=True)
def refused(function, *arguments):
    try: function(*arguments)
    except (OSError, MemoryError, RuntimeError): return True
    return False
def mode(fd):
    try: return os.fstat(fd).st_mode
    except OSError: return 0
def too_much_is_refused():
    def write():
        for i in range(64):
            with open(f'{i}', 'wb') as file: file.write(bytes(1 << 20))
            time.sleep(0.02)
    return refused(write)
def start_threads():
    for _ in range(1000): Thread(target=time.sleep, args=(9,)).start()
def open_files():
    for _ in range(1000): os.dup(0)
# bpf, perf_event_open, keyctl, userfaultfd, io_uring_setup, unshare, mount
DOORS = (321, 298, 250, 323, 425, 272, 165) if platform.machine() == 'x86_64' else (280, 241, 219, 282, 425, 97, 40)
def not_permitted(call):
    return libc.syscall(call, 0, 0, 0, 0, 0) < 0 and ctypes.get_errno() == 1
def all_true(value):
    return all(map(all_true, value)) if isinstance(value, (tuple, list)) else bool(value)
"""


def check():
    """Try each protection on this machine. Exit status 0 only if all hold."""
    warnings.simplefilter("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as folder, Sandbox(timeout=20, scratch_mb=8) as sandbox:
        secret = os.path.join(folder, "secret")
        with open(secret, "w") as file:
            file.write("secret")
        sandbox.run(f"{TRY}\nSECRET, HOST = {secret!r}, {os.getpid()}")
        missing = {text.split()[0] for text in sandbox.missing}
        for line in TRIES.strip().splitlines():
            name, layers, code = line.split("; ", 2)
            [observation] = sandbox.run_candidates([f"final_answer(all_true([{code}]))"])  # each from the same state
            held = observation.final_answer is True or ("scratch" in name and observation.error_kind == "killed")
            rows.append((name, held, sorted(missing & set(layers.split(", ")))))
        intact = os.path.exists(secret) and os.path.getsize(secret) == len("secret")
        rows.append(("left the files outside as they were", intact, []))
    rows.append(("is stopped in time, and keeps its state", _try_time_out(), []))
    rows.append(("dies with its host", _try_host_death(), []))
    print("The code in the sandbox...")
    for name, held, absent in rows:
        print(f"  {name:45}{'held' if held else f'not available: no {absent[0]}' if absent else 'FAILED'}")
    return 0 if all(held for _, held, _ in rows) else 1


def _try_time_out():
    with Sandbox(timeout=0.5) as sandbox:
        sandbox.run("x = 1")
        started = time.monotonic()
        observation = sandbox.run("print('kept', flush=True)\nx = 2\nsum(range(10**12))")
        return (observation.stdout, time.monotonic() - started < 1, sandbox.run("x").result) == ("kept\n", True, "1")


def _try_host_death():
    """Kill a host whose sandbox is at work; all its processes are in the warm interpreter's session."""
    code = (
        "from sandbox import Sandbox; s = Sandbox(); print(s.warm.process.pid, flush=True); s.run('while True: pass')"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    host = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=os.path.dirname(os.path.abspath(__file__)))
    warm = int(host.stdout.readline())
    time.sleep(0.3)
    host.kill()
    host.wait()
    for _ in range(50):
        time.sleep(0.1)
        if warm not in map(_session, filter(str.isdigit, os.listdir("/proc") if contain.LINUX else [])):
            return True
    return False


def _session(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return int(file.read().rsplit(")", 1)[1].split()[3])
    return None
