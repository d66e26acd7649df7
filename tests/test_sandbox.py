# ruff: noqa: E501
"""The sandbox against hostile and clumsy code: python -m pytest tests/test_sandbox.py

Each attack answers "through" if it gets what it wanted; the tests judge this effect, not the type of an exception.
test_attack_works_without_containment runs the same attacks with isolation="off", where they must get through.
Bounds of time are wide enough for a busy machine; bench/sandbox.py measures.
"""

import contextlib
import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import sandbox as module
from bench.sandbox import descendants
from common import InputError
from common.grading import grade
from sandbox import Observation, Sandbox

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the attacks are written for Linux")


def in_group(group):
    """Returns the PIDs of a sandbox's processes: its first, its state and candidates."""
    found = []
    for pid in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            found += [pid] if os.getpgid(pid) == group else []
    return found


def eventually(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def opened():
    with Sandbox(timeout=10, memory_mb=512) as sandbox:
        yield sandbox


sandbox = pytest.fixture(opened)
shared = pytest.fixture(opened, scope="module")  # for tests that change no state


@pytest.fixture(scope="module")
def world():
    """Set up targets: a file with a secret, a process to attack, listening sockets. Yields their names."""
    # Everyone may read and write here, so that only the sandbox can stop an attack.
    folder = Path(tempfile.mkdtemp(prefix="victim-", dir="/var/tmp"))
    folder.chmod(0o777)
    secret = folder / "answers.jsonl"
    secret.write_text("the answer is 42\n")
    secret.chmod(0o666)
    victim = subprocess.Popen([sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)"],
                              stdout=subprocess.PIPE, env={"KEY": "s3cret"})  # fmt: skip
    victim.stdout.readline()
    listeners = [socket.socket(socket.AF_INET), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    listeners[0].bind(("127.0.0.1", 0))
    listeners[1].bind(str(folder / "socket"))
    listeners[2].bind(b"\0victim-" + str(os.getpid()).encode())
    datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    datagrams.bind(b"\0datagrams-" + str(os.getpid()).encode())
    (folder / "socket").chmod(0o777)
    for listener in listeners:
        listener.listen()
    os.environ["SANDBOX_TEST_KEY"] = "s3cret"
    yield {
        "FOLDER": str(folder), "SECRET": str(secret), "VICTIM": victim.pid, "PORT": listeners[0].getsockname()[1],
        "HOST": os.getpid(), "PROJECT": str(ROOT), "PYTHON": sys.executable,
    }  # fmt: skip
    assert victim.poll() is None, "the victim was killed"
    victim.kill()
    victim.wait()
    for listener in (*listeners, datagrams):
        listener.close()
    shutil.rmtree(folder)


# Attacks. An attack calls through() if it got what it wanted. The constants in capitals come from `world`.

PREPARE = """
import ctypes, os, sys, time, signal, socket, subprocess, threading
libc = ctypes.CDLL(None, use_errno=True)
def through(proof=True):
    final_answer("through" if proof else "nothing")
def call(number, *arguments):
    return libc.syscall(ctypes.c_long(number), *[a if isinstance(a, bytes) or a is None else ctypes.c_long(a) for a in arguments])
"""

# name: code, or (code, "strong") if the attack fails without containment too, for lack of rights or of a target
ATTACKS = {
    # files: reading
    "read_passwd": "through('root' in open('/etc/passwd').read())",
    "read_shadow": ("through(open('/etc/shadow').read())", "strong"),
    "read_answers": "through('42' in open(SECRET).read())",
    "read_project": "through(open(PROJECT + '/sandbox.py').read())",
    "read_home": ("through(os.listdir(os.path.expanduser('~root')) or os.listdir('/home'))", "strong"),
    "list_root": "through(os.listdir('/'))",
    "list_tmp": "through(any('victim-' in name for name in os.listdir('/var/tmp')))",
    "read_by_syscall": "fd = libc.open(SECRET.encode(), 0)\nthrough(fd >= 0 and os.read(fd, 9))",
    "read_by_symlink": "os.symlink(SECRET, 'link')\nthrough('42' in open('link').read())",
    "read_by_hardlink": "os.link(SECRET, 'link')\nthrough('42' in open('link').read())",
    "read_by_openat": "fd = os.open('/', os.O_PATH)\nthrough(os.open(SECRET[1:], 0, dir_fd=fd))",
    "read_by_dots": "through(open('../' * 20 + SECRET[1:]).read())",
    "read_by_mmap": "import mmap\nthrough(mmap.mmap(os.open(SECRET, 0), 0, prot=1)[:3])",
    "read_by_rename": "os.rename(SECRET, 'mine')\nthrough(open('mine').read())",
    "read_by_import": "sys.path.insert(0, PROJECT)\nimport common\nthrough()",
    "read_by_linecache": "import linecache\nthrough(linecache.getline(SECRET, 1))",
    "read_proc_environ": ("through(b's3cret' in open(f'/proc/{VICTIM}/environ', 'rb').read())"),
    "read_proc_mem": ("through(open(f'/proc/{VICTIM}/mem', 'rb'))"),
    "read_proc_cwd": "through(os.listdir(f'/proc/{VICTIM}/cwd'))",
    "read_proc_root": "through(open(f'/proc/{VICTIM}/root' + SECRET).read())",
    "read_proc_link": "through(os.readlink(f'/proc/{VICTIM}/exe'))",
    "read_proc_parent": "through(open(f'/proc/{os.getppid()}/cmdline').read())",
    "read_proc_self": "through(open('/proc/self/maps').read() and open('/proc/self/mountinfo').read())",
    "list_proc": "through(str(VICTIM) in os.listdir('/proc'))",
    "read_sys": "through(os.listdir('/sys/class'))",
    "read_disk": ("through(os.open('/dev/vda', 0) >= 0 or os.open('/dev/sda', 0))", "strong"),
    "read_kmsg": ("through(os.open('/dev/kmsg', 0))", "strong"),
    "open_by_handle": (
        "handle = ctypes.create_string_buffer((8).to_bytes(4, 'little') + bytes(132))\n"
        "through(call(304, os.open('/', os.O_PATH), handle.raw, 0) >= 0)", "strong"),
    # files: writing
    "write_answers": "open(SECRET, 'a').write('x')\nthrough()",
    "write_beside": "open(FOLDER + '/new', 'w').write('x')\nthrough()",
    "write_tmp": "open('/var/tmp/sandbox-was-here', 'w').close()\nos.unlink('/var/tmp/sandbox-was-here')\nthrough()",
    "write_shm": "open('/dev/shm/sandbox-was-here', 'w').close()\nos.unlink('/dev/shm/sandbox-was-here')\nthrough()",
    "write_library": (
        "path = os.path.dirname(os.__file__) + '/site_was_here.py'\n"
        "open(path, 'w').close()\nos.unlink(path)\nthrough()", "strong"),
    "truncate": "through(libc.truncate(SECRET.encode(), 17) == 0)",
    "truncate_on_reading": "os.close(os.open(SECRET, os.O_RDONLY | os.O_TRUNC))\nthrough()",
    "chmod": "os.chmod(SECRET, 0o646)\nthrough(open(SECRET))",
    "unlink": "open(FOLDER + '/a', 'w')\nos.unlink(FOLDER + '/a')\nthrough()",
    "mkdir": "os.mkdir(FOLDER + '/folder')\nthrough()",
    "symlink_out": "os.symlink('/', FOLDER + '/root-link')\nthrough()",
    "xattr": ("os.setxattr(SECRET, 'user.x', b'1')\nthrough()", "strong"),
    "mknod": ("os.mknod('disk', 0o60600, os.makedev(254, 0))\nthrough()", "strong"),
    "mount": ("through(libc.mount(b'none', b'/', b'tmpfs', 0, None) == 0)", "strong"),
    "chroot": ("os.mkdir('x')\nos.chroot('x')\nthrough()", "strong"),
    # network
    "tcp": "s = socket.socket()\ns.connect(('127.0.0.1', PORT))\nthrough()",
    "tcp6": "socket.socket(socket.AF_INET6)\nthrough()",
    "udp": "through(socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9)))",
    "listen": "s = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\nthrough()",
    "raw_socket": ("socket.socket(socket.AF_PACKET, socket.SOCK_RAW)\nthrough()", "strong"),
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\nthrough()",
    "vsock": ("socket.socket(socket.AF_VSOCK)\nthrough()", "strong"),
    "unix_path": "s = socket.socket(socket.AF_UNIX)\ns.connect(FOLDER + '/socket')\nthrough()",
    "unix_abstract": "s = socket.socket(socket.AF_UNIX)\ns.connect(b'\\0victim-%d' % HOST)\nthrough()",
    "unix_datagram_pair": (
        "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "through(a.sendto(b'x', b'\\0datagrams-%d' % HOST))"),
    "unix_seqpacket_pair": "socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\nthrough()",
    "resolve": ("through(socket.getaddrinfo('localhost', 80, proto=6) and socket.create_connection(('localhost', PORT)))",
                "strong"),
    "http": "import urllib.request\ntry: urllib.request.urlopen(f'http://127.0.0.1:{PORT}', timeout=0.2)\nexcept TimeoutError: through()",
    "io_uring": ("through(call(425, 4, bytes(120)) >= 0)", "strong"),
    # processes
    "exec": "subprocess.run([PYTHON, '-c', ''], check=True)\nthrough()",
    "system": "through(os.system('true') == 0)",
    "execve_self": "os.execv(PYTHON, [PYTHON, '-c', 'raise SystemExit(7)'])",
    "spawn": "through(os.posix_spawn('/bin/true', ['true'], {}))",
    "memfd_exec": "through(os.memfd_create('x') >= 0)",
    "fork": "through(os.fork() >= 0)",
    "vfork": "through(call(58) >= 0)",
    "multiprocessing": "import multiprocessing\np = multiprocessing.get_context('fork').Process(target=int)\np.start()\np.join()\nthrough(p.exitcode == 0)",
    "clone_parent": "through(call(56, 0x8011, 0, 0, 0, 0) >= 0)",
    "clone_namespace": "through(call(56, 0x10000011, 0, 0, 0, 0) >= 0)",
    "clone3": "through(call(435, bytes(32) + (17).to_bytes(8, 'little') + bytes(24), 64) >= 0)",
    "unshare": ("through(libc.unshare(0x10000000) == 0)", "strong"),
    "setns": ("through(libc.setns(os.open('/proc/self/ns/net', 0), 0) == 0)", "strong"),
    "setsid": "through(libc.setsid() >= 0 or libc.setpgid(0, 0) >= 0)",
    # other processes
    "signal_zero": "os.kill(VICTIM, 0)\nthrough()",
    "signal_host": "os.kill(HOST, 0)\nthrough()",
    "signal_parent": "os.kill(os.getppid() or 1, 0)\nthrough()",
    "signal_group": "os.kill(0, signal.SIGCONT)\nthrough()",
    "signal_everyone": ("os.kill(-1, 0)\nthrough()", "strong"),
    "signal_queue": "through(call(129, VICTIM, 0, bytes(8) + b'\\xff' * 4 + bytes(116)) == 0)",
    "signal_thread": "through(call(200, VICTIM, 0) == 0)",
    "signal_owner": "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, VICTIM)\nthrough()",
    "pidfd": "os.pidfd_open(VICTIM)\nthrough()",
    "ptrace": ("through(libc.ptrace(0x4206, VICTIM, 0, 0) == 0)", "strong"),
    "process_vm_readv": ("through(call(310, VICTIM, bytes(16), 1, bytes(16), 1, 0) >= 0)", "strong"),
    "prlimit": "import resource\nresource.prlimit(VICTIM, resource.RLIMIT_NOFILE)\nthrough()",
    "renice": "os.setpriority(os.PRIO_PROCESS, VICTIM, 1)\nthrough()",
    "affinity": "os.sched_setaffinity(VICTIM, {0})\nthrough()",
    "kcmp": ("through(call(312, VICTIM, VICTIM, 2, 0, 0) >= 0)", "strong"),
    "shared_memory": "through(libc.shmget(1234, 4096, 0o1666) >= 0)",
    "semaphore": "from multiprocessing import shared_memory\nshared_memory.SharedMemory('was_here', True, 9).unlink()\nthrough()",
    "message_queue": "through(libc.msgget(1234, 0o1666) >= 0)",
    # the kernel
    "bpf": ("through(call(321, 0, bytes(64), 64) >= 0)", "strong"),
    "perf": ("through(call(298, bytes(128), 0, -1, -1, 0) >= 0)", "strong"),
    "keyctl": ("through(call(250, 0, -3, 1) >= 0)", "strong"),
    "userfaultfd": ("through(call(323, 0) >= 0)", "strong"),
    "personality": "through(libc.personality(0x40000) >= 0)",
    "setuid": ("os.setuid(0)\nthrough()", "strong"),
    "seccomp_again": ("through(libc.prctl(22, 1, 0, 0, 0) == 0)", "strong"),
    "undumpable": "through(libc.prctl(4, 1, 0, 0, 0) == 0)",
    "terminal": ("import fcntl\nfcntl.ioctl(os.open('/dev/tty', 0), 0x5412, b'x')\nthrough()", "strong"),
    "reboot": ("through(libc.reboot(0) == 0)", "strong"),
    "sethostname": ("socket.sethostname(socket.gethostname())\nthrough()", "strong"),
    "clock": ("time.clock_settime(time.CLOCK_REALTIME, time.time())\nthrough()", "strong"),
    # what is inherited
    "environment": ("through(len(os.environ))", "strong"),
    "environment_by_libc": ("libc.getenv.restype = ctypes.c_char_p\nthrough(libc.getenv(b'PATH') or libc.getenv(b'SANDBOX_TEST_KEY'))", "strong"),
    "descriptors": (
        "import stat\nkinds = []\nfor fd in range(256):\n  try: kinds.append((fd, os.fstat(fd).st_mode))\n"
        "  except OSError: pass\n"
        # 0: /dev/null; 1 and 2: the output; 3: the channel
        "through([fd for fd, _ in kinds] != [0, 1, 2, 3] or [fd for fd, mode in kinds if stat.S_ISSOCK(mode)] != [3])",
        "strong"),
}  # fmt: skip


def attack(sandbox, name, world):
    code = ATTACKS[name] if isinstance(ATTACKS[name], str) else ATTACKS[name][0]
    constants = "".join(f"{key} = {value!r}\n" for key, value in world.items())
    return sandbox.run(PREPARE + constants + code)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_fails(shared, world, name):
    if name == "descriptors":  # earlier attacks leave descriptors open
        with Sandbox() as fresh:
            assert attack(fresh, name, world).final_answer == "nothing"
        return
    observation = attack(shared, name, world)
    assert observation.final_answer != "through", observation
    assert Path(world["SECRET"]).read_text() == "the answer is 42\n"
    assert Path(world["SECRET"]).stat().st_mode & 0o777 == 0o666
    assert sorted(path.name for path in Path(world["FOLDER"]).iterdir()) == ["answers.jsonl", "socket"]
    assert shared.run("6 * 7").result == "42"


WEAK = [name for name, code in ATTACKS.items() if isinstance(code, str) and name not in ("execve_self", "chmod")]


@pytest.mark.parametrize("name", WEAK)
def test_attack_works_without_containment(world, tmp_path, name):
    """Without it, every attack that needs no special rights gets through. So each test above can fail."""
    with Sandbox(isolation="off") as sandbox:
        sandbox.run(f"import os\nos.chdir({str(tmp_path)!r})")
        assert attack(sandbox, name, world).final_answer == "through"
    for path in Path(world["FOLDER"]).iterdir():
        if path.name != "socket":
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    Path(world["SECRET"]).write_text("the answer is 42\n")
    Path(world["SECRET"]).chmod(0o666)


# Time-outs. run() returns within 0.2 s of the limit (later here, on a busy machine) and keeps output and state.

LOOPS = {
    "loop": "while True: pass",
    "swallowed": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "signals_ignored": "import signal\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n  except (OSError, ValueError): pass\nwhile True: pass",
    "stopped": "import os, signal\ntry: os.kill(os.getpid(), signal.SIGSTOP)\nexcept OSError: pass\nwhile True: pass",
    "tool": "hang()",
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_time_out(name):
    done = threading.Event()
    with Sandbox({"hang": lambda: done.wait(30)}, timeout=20) as sandbox:
        sandbox.run("kept = 41")
        sandbox.timeout = 1
        started = time.monotonic()
        observation = sandbox.run("print('before')\nkept = 0\n" + LOOPS[name])
        elapsed = time.monotonic() - started
        assert observation.stdout.startswith("before\n")
        assert observation.error_kind == "timeout" and 1 <= elapsed < 4
        sandbox.timeout = 20
        assert sandbox.run("kept + 1").result == "42"
        assert eventually(lambda: len(in_group(sandbox.first.group)) == 2)  # the first process and the state
    done.set()


SEND = "import os, socket, time\ndef send(data): os.write(3, len(data).to_bytes(4, 'big') + data)\n"
# Code can change everything in the process that holds the state, here the function that forks it.
TAKEOVERS = {
    "does_not_fork": "time.sleep(60)",
    "child_is_silent": "old(key) or time.sleep(60)",
    "parent_ends": "os._exit(0)",
    "raises": "1 / 0",
    "urgent_byte": "(socket.socket(fileno=sys._getframe(1).f_locals['descriptors'][0]).send(b'x', socket.MSG_OOB), time.sleep(60))",
}

TAKE_OVER = """import os, socket, sys, time
x = 1
inside = final_answer.__func__.__globals__
old = inside['_fork']
inside['_fork'] = lambda key: {}"""


def test_a_fork_that_takes_long_is_not_the_fault_of_the_code():
    """The clock of a step starts when its process does."""
    with Sandbox() as sandbox:
        sandbox.run(
            TAKE_OVER.format("time.sleep(1.5) or setattr(os, 'getpid', lambda: 10**30) or old(key)")
        )  # a false PID
        sandbox.timeout = 1
        assert sandbox.run("x").result == "1"
        started = time.monotonic()
        assert sandbox.run("while True: pass").error_kind == "timeout"
        assert 2.5 <= time.monotonic() - started < 6.5


@pytest.mark.parametrize("name", TAKEOVERS)
def test_a_state_that_does_not_fork_as_asked_is_given_up(name, monkeypatch):
    """The next step fails in time, nothing of the old state survives, and the step after that works and says so."""
    with Sandbox(timeout=2) as sandbox:
        group = sandbox.first.group
        assert sandbox.run(TAKE_OVER.format(TAKEOVERS[name])).error is None
        monkeypatch.setattr(module, "FORK_SECONDS", 0.5)
        started = time.monotonic()
        for after in sandbox.run_candidates(["'x' in globals()" + " " * 500_000] * 2):  # more than a socket takes
            assert after.result == "False" and "variables are gone" in after.stdout
        assert time.monotonic() - started < 10
        assert sandbox.run("1").stdout == ""
        assert eventually(lambda: not in_group(group))


@pytest.mark.parametrize("kill", [lambda s: os.killpg(s.first.group, 9), lambda s: os.kill(s.state.pid, 9)])
def test_a_state_that_is_killed_between_steps_is_reported(kill, sandbox):
    sandbox.run("x = 1")
    kill(sandbox)
    observation = sandbox.run("x")
    assert "variables are gone" in observation.stdout and "NameError" in observation.error
    assert sandbox.run("1").stdout == ""


def test_processes_that_end_at_once_are_an_observation(sandbox, monkeypatch):
    """As when the machine has no memory left: the state is killed, and so is the process that replaces it."""
    start = sandbox._start

    def start_and_die():
        start()
        os.kill(sandbox.first.pid, 9)
        assert eventually(sandbox.first.channel.poll)

    sandbox.run("x = 1")
    os.kill(sandbox.state.pid, 9)
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "_start", start_and_die)
        assert [o.error_kind for o in sandbox.run_candidates(["x", "1"])] == ["killed", "killed"]
    assert sandbox.run("1").result == "1"


def test_states_survive_the_warm_interpreter(sandbox):
    """It is replaced, and leaves no zombie."""
    sandbox.run("x = 41")
    pid = module._warm.popen.pid
    module._warm.popen.kill()
    with Sandbox() as other:
        assert (sandbox.run("x + 1").result, other.run("1").result) == ("42", "1")
    assert not Path(f"/proc/{pid}").exists()


def test_many_forks_of_a_large_state_do_not_lose_it():
    with Sandbox(timeout=30, memory_mb=2000) as sandbox:
        sandbox.run("x = bytearray(600_000_000)")
        sandbox.timeout = 0.5
        sandbox.run_candidates(["1"] * 100)
        sandbox.timeout = 30
        assert sandbox.run("len(x)").result == "600000000"


def test_threads_left_behind_end_with_their_step(sandbox):
    sandbox.run("import threading, time\nthread = threading.Thread(target=time.sleep, args=(60,))\nthread.start()")
    assert sandbox.run("threading.active_count(), thread.is_alive()").result == "(1, False)"
    assert sandbox.run("thread.join()\n'joined'").result == "'joined'"
    sandbox.run("threading.Thread(target=lambda: [0 for _ in iter(int, 1)], daemon=True).start()")
    used = lambda: sum(map(int, Path(f"/proc/{sandbox.state.pid}/stat").read_text().split()[13:15]))  # noqa: E731
    before = used()
    time.sleep(0.5)
    assert used() - before <= 2  # hundredths of a second


def test_memory_is_bounded(sandbox):
    assert sandbox.run("x = 7\nbytearray(10**9)").error_kind == "memory"
    assert sandbox.run("x").result == "7"
    for small in ("n", "[1]", "str(n)"):
        assert sandbox.run(f"d = []\nn = 0\nwhile True: d.append({small}); n += 1").error_kind == "memory"
        assert sandbox.run("del d").error is None
    assert sandbox.run("a = []\nwhile True: a.append('x' * 10**6)").error_kind == "memory"
    assert sandbox.run("a[-1][:1]").result == "'x'"  # an exception keeps what ran before it
    assert sandbox.run("del a").error is None
    assert sandbox.run("x = bytearray(3 * 10**8)\nlen(x)").result == "300000000"  # less than memory_mb is fine
    for process in (sandbox.first, sandbox.state):  # the first to go if the machine runs out of memory
        assert Path(f"/proc/{process.pid}/oom_score_adj").read_text() == "1000\n"


def test_threads_and_files_are_bounded():
    with Sandbox(timeout=20) as sandbox:
        sleepers = "import threading, time\nfor _ in range({}): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
        one, other = sandbox.run_candidates([sleepers.format(100), sleepers.format(100) + "\ntime.sleep(1)"])
        assert (one.error, other.error) == (None, None)  # they do not share a limit
        assert sandbox.run("f = [open('/dev/null') for _ in range(1000)]").error
        assert "can't start new thread" in sandbox.run(sleepers.format(5000)).error
        assert sandbox.run("6 * 7").result == "42"


CLONES = [0, 17, 0x1200011, 0x100011, 0x4111, 0x8011, 0x911, 0x10F00 | 0x8000, 0x20011, 0x4000011, 0x10000011, 0x20000011,
          0x40000011, 1 << 32 | 17]  # fmt: skip


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the number of clone is that of x86-64")
def test_clone_starts_no_process(sandbox):
    code = f"{PREPARE}\nfor flags in {CLONES}:\n  for rest in (0, 1, 2**63):\n    if call(56, flags, 0, 0, 0, 0, rest) >= 0: through()"
    assert sandbox.run(code) == Observation(seconds=pytest.approx(0, abs=10))


def test_printed_output_is_bounded(sandbox):
    """The host's memory does not grow with what is printed."""
    before = resident()
    for code in ("for i in range(500): print('x' * 10**6)\nprint('end')", "print('x' * 2_000_000 + 'END', end='')"):
        observation = sandbox.run(code)
        assert observation.error_kind == "runtime" and "a step can print 1,024 KiB" in observation.error
        short = f"{'x' * 5000}\n[... {2**20 - 10_000:,} characters not shown ...]\n{'x' * 5000}"
        assert observation.stdout.replace("\n", "x") == short.replace("\n", "x")
    assert "PermissionError" in sandbox.run("import os\nos.ftruncate(1, 10**12)").error
    assert resident() - before < 20e6


def test_final_answers_that_are_too_large_cost_the_host_no_memory():
    before = resident()
    with Sandbox(timeout=60) as sandbox:
        for observation in sandbox.run_candidates(["final_answer([{}] * 2_000_000)"] * 2):
            assert type(observation.final_answer) is str and len(observation.final_answer) < 101_000
        raw = "import os\nd = b'{\"final\": [' + b'{},' * 300_000 + b'{}]}'\nwhile True: os.write(3, len(d).to_bytes(4, 'big') + d)"
        assert "values" in sandbox.run(raw).error
        assert resident() - before < 60e6


# Messages that the code sends itself. They can change its own observation, and nothing else.

FORGERIES = {
    "huge": "os.write(3, b'\\xff' * 8)",
    "not_an_object": "send(b'[1]')",
    "deep_final": "send(b'{\"final\":' + b'[' * 600 + b']' * 600 + b'}')",
    "flood": "while True: send(b'0')",
    "infinity": "send(b'{\"final\": 1e999}')",
    "unknown_tool": "send(b'{\"tool\": \"os.system\", \"args\": [], \"kwargs\": {}}')",
    "in_flight": "a, b = socket.socketpair()\nfor _ in range(9): socket.send_fds(a, [b'x'], [0] * 200)",
    "trickle": "os.write(3, b'\\0\\0\\xff\\0')\nwhile True: os.write(3, b' '); time.sleep(0.01)",
    "urgent": "socket.socket(fileno=3).send(b'x', socket.MSG_OOB)",
    "not_reading": "for _ in range(9): send(b'{\"tool\": \"large\", \"args\": [], \"kwargs\": {}}')\ntime.sleep(60)",
    "many_calls": "for i in range(2000): send(b'{\"tool\": \"slow\", \"args\": [], \"kwargs\": {}}')\ntime.sleep(60)",
    "escaped_surrogate": "send(rb'{\"final\": \"\\ud800\"}')",
    "huge_integer": "send(b'{\"final\": ' + b'9' * 100000 + b'}')",
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_message(name):
    calls = []
    add, slow, large = lambda a, b: calls.append((a, b)), lambda: time.sleep(0.2), lambda: "x" * 900_000
    tools = {"add": add, "slow": slow, "large": large}
    with Sandbox(tools=tools, timeout=20) as sandbox:
        sandbox.run("x = 42")
        sandbox.timeout = 3
        count = lambda: len(os.listdir("/proc/self/fd")) + threading.active_count()  # noqa: E731
        before = count()
        started = time.monotonic()
        forged, honest = sandbox.run_candidates([SEND + FORGERIES[name] + "\ntime.sleep(0.3)", "x"])
        assert time.monotonic() - started < 20
        assert forged.error
        assert honest == Observation(result="42", seconds=honest.seconds)
        assert calls == []
        sandbox.timeout = 20
        sandbox.commit(1)
        assert sandbox.run("x").result == "42"
        del forged, honest
        assert eventually(lambda: count() <= before)  # no descriptor and no thread is left


def test_candidates_do_not_see_each_other(sandbox):
    """Neither another candidate's output, nor memory that both could write."""
    look = "import os, time\ntime.sleep(0.3)\nfor pid in range(os.getpid() - 9, os.getpid() + 9):\n  if pid != os.getpid():\n    try: print(open(f'/proc/{pid}/fd/1').read())\n    except OSError: pass"
    assert sandbox.run_candidates(["print('se' + 'cret')\nimport time\ntime.sleep(1)", look])[1].stdout == ""
    shared = ["mmap.mmap(-1, 8)", "print(8 * 'x')\nmmap.mmap(1, 8)", "os.memfd_create('x')"]
    shared = [f"import mmap, os\n{code}" for code in shared]
    assert all("PermissionError" in observation.error for observation in sandbox.run_candidates(shared))


SCAN = """import ctypes, os, re
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
r, w = os.pipe()
def readable(page): return libc.write(w, ctypes.c_void_p(page), 1) == 1 and bool(os.read(r, 1))
found, objects = 0, id([]) & ~4095
low = high = libc.malloc(100) & ~4095
while readable(low): low -= 4096
while readable(high): high += 4096
pages = [*range(low + 4096, high, 4096), *range(objects - (16 << 20), objects + (16 << 20), 4096)]
sum(bool(re.search(b'SI[B]LING', ctypes.string_at(page, 4096))) for page in pages if readable(page))"""


def test_candidates_do_not_have_each_other_s_code(sandbox):
    """Neither that of other candidates, nor that of earlier ones, which the state has never read."""
    code = "import time\n" + "x = 'SIBLING'\n" * 1000
    assert sandbox.run(code + SCAN).result != "0"
    with Sandbox() as other:
        assert [other.run_candidates([code, SCAN + "\n"])[1].result for _ in range(2)] == ["0", "0"]


def test_a_step_that_ends_in_time_is_not_late_because_of_its_threads():
    with Sandbox(timeout=1) as sandbox:
        code = "from concurrent.futures import ThreadPoolExecutor\nimport time\npool = ThreadPoolExecutor(2)"
        assert sandbox.run(code + "\nlist(pool.map(abs, [1]))\ntime.sleep(0.8)\nx = 5").error is None
        assert sandbox.run("x").result == "5"


def test_sandboxes_do_not_see_each_other(sandbox):
    sandbox.run("import math, numpy\nmath.pi = 3\nnumpy.ones = None\nx = 1")
    with Sandbox() as other:
        assert other.run("import math, numpy\nmath.pi > 3, numpy.ones(1)[0] == 1").result == "(True, np.True_)"
        assert other.run("x").error_kind == "runtime"
        assert other.run(f"import os\nos.kill({sandbox.state.pid}, 9)").error and sandbox.run("x").result == "1"


# The state, as in a REPL.


def slow(x):
    time.sleep(0.5)
    return x


def unprintable():
    raise type("Unprintable", (Exception,), {"__str__": None})(1, 2)


TOOLS = {"calc": lambda *values: list(values), "slow": slow, "unprintable": unprintable,
         "size": len, "text": lambda: "x" * 900_000, "full": lambda: [0] * 10**15}  # fmt: skip
POOL = "from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(4)\n"
ALARM = "import signal\ndef handler(*_): {}\nsignal.signal(signal.SIGALRM, handler)\nsignal.setitimer(signal.ITIMER_REAL, 0.2)\n"
# name: the steps, and what the last observation has: its result; or a part of its output (">"), of its error ("!")
PROGRAMS = {
    "pickle": (["class A: pass", "import pickle\npickle.loads(pickle.dumps(A())).__class__ is A"], "True"),
    "source": (["def f(n): return n", "import inspect\ninspect.getsource(f)"], "'def f(n): return n'"),
    "both_lines": (["def f(n):\n  return 1 / n", "x = 0\nf(x)"],
                   "!division by zero (line 2: f(x); in f, step 1, line 2: return 1 / n)"),
    "cause": (["try: {}['a']\nexcept KeyError as e: raise ValueError('b') from e"], "!caused by KeyError: 'a' (line 1: try"),
    "parts_of_a_group": (["raise ExceptionGroup('a', [ValueError('b')])"], "!; ValueError: b"),
    "odd_error": (["class E(Exception):\n  def __getattr__(self, name): return self.data[name]\nraise E('b')"], "!"),
    "deep_recursion": (["import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return f(n + 1)\nf(0)"], "!Error"),
    "success": (["import sys\nprint('a')\nsys.exit(0)"], ">a\n"),
    "form_feed": (["x = 'a\x0cb'\n1 / 0"], "!(line 2: 1 / 0)"),
    "own_syntax_error": (["raise SyntaxError('x', ('f', 1, 2, 3))"], "!SyntaxError: x"),
    "old_stdout": (["import sys\nold = sys.stdout\nsys.stdout = None", "print('x')\nprint('y', file=old)"], ">x\ny\n"),
    "wrapped_stdout": (["import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\nprint('x')"], ">x\n"),
    "opened_stdout": (["import os, sys\nsys.stdout = os.fdopen(1, 'w')", "print('x')"], ">x\n"),
    "trace": (["import sys\nsys.settrace(lambda *event: print(event))", "5"], "5"),
    "builtins_replaced": (["import builtins\nfor name in ('open', 'len', 'isinstance', 'getattr', 'type', 'str', 'max', '__import__'): setattr(builtins, name, None)", "print(len)"], ">None\n"),
    "sockets_replaced": (["import socket, json\nsocket.socket = json.dumps = None", "calc(1)"], "[1]"),
    "large_result": (["x = 'a' * 600_000_000\nx", "len(x)"], "600000000"),
    # threads, pools, timers and signal handlers
    "thread_in_a_call": (["import threading\nthreading.Thread(target=lambda: slow(1)).start()\nx = 5", "x"], "5"),
    "print_after_a_call": (["import threading\nthreading.Thread(target=lambda: print(slow(1))).start()"], ">1\n"),
    "thread_pool": (["from multiprocessing.pool import ThreadPool\nThreadPool(2).map(abs, [-1, -2])"], "[1, 2]"),
    "pool_of_an_earlier_step": ([POOL + "list(pool.map(abs, [-1, -2]))", "list(pool.map(abs, [-3]))"], "[3]"),
    "pool_in_a_call": ([POOL + "f = pool.submit(slow, 1)\nx = 5", "x"], "5"),
    "large_call_at_the_end": (["import threading\nthreading.Thread(target=size, args=('x' * 900_000,)).start()\nx = 5", "x"], "5"),
    "long_integer": (["sum(map(int, str(2**20000))), len(calc(str(10**5000))[0])"], "(26995, 5001)"),
    "alarm_after_its_step": (["import concurrent.futures, signal, time\ndef late(*a): raise TimeoutError\nsignal.signal(signal.SIGALRM, late)\npool = concurrent.futures.ThreadPoolExecutor(1)\nf = pool.submit(time.sleep, 2)\nsignal.setitimer(signal.ITIMER_REAL, 0.6)\nx = 5", "import time\ntime.sleep(0.7)\nx"], "5"),
    "timer": (["import threading\nthreading.Timer(0.1, globals().clear).start()\nthreading.Timer(60, print).start()\nx = 5", "x = x if 'x' in globals() else 5\nx"], "5"),
    "interrupted_call": ([ALARM.format("raise TimeoutError") + "try: slow('slow')\nexcept TimeoutError: pass\ncalc(1), calc(2)"], "([1], [2])"),
    "call_in_a_handler": ([ALARM.format("print(calc(1))") + "slow(2)"], ">[1]\n"),
    "alarm_left": (["import signal\nx = 5\nsignal.setitimer(signal.ITIMER_REAL, 0.05)", "import time\ntime.sleep(0.2)\nx"], "5"),
    # tools
    "nan": (["calc(float('nan'))"], "!calc() takes JSON values only"),
    "huge_integer": (["calc(10**5000)"], "!calc() takes JSON values only"),
    "deep": (["x = []\nfor _ in range(200): x = [x]\ncalc(x)"], "!nested more than 100 deep"),
    "unprintable_error": (["unprintable()"], "!RuntimeError: Unprintable"),
    "tool_out_of_memory": (["full()"], "!RuntimeError: MemoryError"),
    "no_memory_for_the_reply": (["""held = []
try:
    while True: held.append(bytearray(b'y' * 2**20))
except MemoryError: pass
try: text()
except MemoryError: pass
held.clear()""", "calc(1), len(text())"], "([1], 900000)"),
    "itself": (["final_answer = 42", "final_answer(final_answer)"], "!was given itself"),
    "two_answers": (["final_answer(1, 2)"], "!takes 1 argument but 2 were given"),
    # files that Python's own library reads
    "time_zone": (["from zoneinfo import ZoneInfo\nimport datetime\nstr(datetime.datetime(2020, 1, 1, tzinfo=ZoneInfo('America/New_York')).utcoffset())"], "'-1 day, 19:00:00'"),
    "mime": (["import mimetypes\nmimetypes.guess_type('a.txt')[0]"], "'text/plain'"),
    "libraries": (["""import asyncio, hashlib, io, sqlite3, statistics, zipfile, numpy as np, sympy as sp
x = sp.symbols('x')
with zipfile.ZipFile(io.BytesIO(), 'w') as z: z.writestr('a', 'b')
async def two(): await asyncio.sleep(0.01); return await asyncio.to_thread(lambda: 2)
db = sqlite3.connect(':memory:'); db.execute('create table t (a)'); db.execute('insert into t values (3)')
[sp.solve(x**2 - 1)[1], asyncio.run(two()), db.execute('select a from t').fetchone()[0], float(np.linalg.det(np.eye(2) * 2))]"""], "[1, 2, 3, 4.0]"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name):
    steps, expected = PROGRAMS[name]
    with Sandbox(tools=TOOLS, timeout=30) as sandbox:
        last = [sandbox.run(step) for step in steps][-1]
    if expected[0] == ">":
        assert last.error is None and expected[1:] in last.stdout, last
    elif expected[0] == "!":
        assert last.error_kind == "runtime" and expected[1:] in last.error, last
    else:
        assert (last.result, last.stdout) == (expected, ""), last


@pytest.mark.parametrize(
    ("code", "kind", "parts"),
    [("x = 1\nreturn x", "syntax", ["line 2: return x"]),
     ("x = 1\nfor i in range(3)\n  pass", "syntax", ["line 2", "for i in range(3)", "expected ':'"]),
     ("x = 1\n1 / 0", "runtime", ["ZeroDivisionError: division by zero", "line 3: 1 / 0"]),
     ("raise SystemExit(3)", "runtime", ["SystemExit: 3"]),
     ("class E(Exception):\n  def __str__(self): 1 / 0\nraise E", "runtime", ["E: <exception str() failed>"]),
     ("raise ValueError('x' * 10**6)", "runtime", ["characters not shown"]),
     ("import os\nos._exit(3)", "killed", ["process ended"]),
     ("import ctypes\nctypes.string_at(1)", "killed", ["process ended"]),
     ("x = 'a' * 10**12", "memory", ["MemoryError", "512 MB"])],
)  # fmt: skip
def test_errors(shared, code, kind, parts):
    shared.run("kept = 41")
    observation = shared.run("print('before')\n" + code if kind != "syntax" else code)
    assert observation.error_kind == kind
    assert all(part in observation.error for part in parts), observation.error
    assert observation.stdout == ("" if kind == "syntax" else "before\n")
    assert not observation.is_final and len(observation.error) < 10_200
    assert shared.run("kept + 1").result == "42"


def test_everything_printed_is_kept(sandbox):
    results = [sandbox.run(code).result for code in ("x = 1", "None", "x;", "", "for i in [3]: i")]
    assert results == [None, None, "1", None, None]
    observation = sandbox.run("import sys, os\nprint('a')\nprint('b', file=sys.stderr)\nsys.stdout.write('c\\n')\n"
                              "sys.stdout.buffer.write(b'd\\n')\nprint('é', end='')\nos.write(1, b'raw')")  # fmt: skip
    assert observation.stdout == "a\nb\nc\nd\néraw"
    observation = sandbox.run("print('\\ud800')\nfinal_answer(['\\udfff'])")  # half a surrogate pair
    json.dumps(vars(observation), ensure_ascii=False).encode()
    assert observation.final_answer == ["?"]


# What is given to final_answer, what the host receives, and a gold answer that it equals
ANSWERS = [
    ("42", 42, "42"), ("'a'", "a", None), ("None", None, None), ("True", True, None), ("0.5", 0.5, "0.5"), ("''", "", None),
    ("[1, {'a': [None]}]", [1, {"a": [None]}], None), ("10**30", 10**30, None), ("10**4000", 10**4000, None), ("10**5000", "1" + "0" * 5000, None),
    ("range(10**9)", "range(0, 1000000000)", None), ("{8, 0}", [0, 8], None), ("sp.S.EmptySet", "EmptySet", r"\emptyset"),
    ("np.array([0.1], dtype=np.float32)", [0.1], "0.1"),
    ("(1, 2)", [1, 2], "(1, 2)"), ("{1: 2}", {"1": 2}, None), ("float('inf')", "inf", None), ("b'x'", "b'x'", None),
    ("{3, 1}", [1, 3], r"\{1, 3\}"), ("{1, 'a'}", [1, "a"], None), ("range(3)", [0, 1, 2], "0, 1, 2"), ("3 + 2j", "(3+2j)", "3+2i"),
    ("Fraction(1, 3)", "1/3", r"\frac{1}{3}"), ("Fraction(4, 2)", 2, "2"), ("[Fraction(1, 2)]", ["1/2"], "0.5"), ("Decimal('0.1')", "0.1", "0.1"),
    ("np.int64(7)", 7, "7"), ("np.float64(0.5)", 0.5, "0.5"), ("np.float32(0.1)", 0.1, "0.1"), ("np.bool_(True)", True, None),
    ("[np.int64(1), np.int64(2)]", [1, 2], "1, 2"), ("(np.float64(3.0), 2)", [3.0, 2], "(3, 2)"), ("{'mean': np.mean([1, 2])}", {"mean": 1.5}, None),
    ("np.array([3., -2.])", [3.0, -2.0], r"\begin{pmatrix} 3 \\ -2 \end{pmatrix}"), ("np.array(3)", 3, "3"),
    ("np.array([[16, -2], [0, 4]])", [[16, -2], [0, 4]], r"\begin{pmatrix} 16 & -2 \\ 0 & 4 \end{pmatrix}"),
    ("sp.sqrt(8)", "2*sqrt(2)", r"2\sqrt{2}"), ("sp.Rational(1, 2)", "1/2", "0.5"), ("sp.Integer(3)", 3, "3"), ("sp.Float(0.5)", 0.5, "0.5"),
    ("sp.Interval(-2, 7)", "Interval(-2, 7)", "[-2, 7]"),
    ("sp.FiniteSet(2, 1)", [1, 2], r"\{1, 2\}"), ("sp.Matrix([[1], [x]])", [[1], ["x"]], r"\begin{pmatrix} 1 \\ x \end{pmatrix}"),
    ("[{x: 3}]", [{"x": 3}], "3"), ("[{x: 1}, {x: 2}]", [{"x": 1}, {"x": 2}], "1, 2"), ("sp.Eq(x, 3)", "Eq(x, 3)", "x = 3"),
    ("[float('nan')]", ["nan"], None), ("map(str, [1])", ["1"], None), ("collections.namedtuple('Pair', 'A B')(1, 2)", [1, 2], None), ("sp.Integer(3) > 2", True, None), ("sp.Dict({x: 3})", {"x": 3}, None),
    ("np.matrix([[1, 2]])", [[1, 2]], "(1, 2)"), ("sp.Poly(x**2 - 1, x)", "x**2 - 1", "x^2-1"), ("datetime.timedelta(28)", "28 days", "28"),
    ("sp.N(sp.factorial(25), 30)", 15511210043330985984000000, "15511210043330985984000000"), ("sp.N(0.5, 30)", 0.5, "0.5"),
    ("'x' * 10**7", "x" * 5000 + "\n[... 9,990,000 characters not shown ...]\n" + "x" * 5000, None),
]  # fmt: skip


@pytest.mark.parametrize(("expression", "answer", "gold"), ANSWERS)
def test_final_answer(shared, expression, answer, gold):
    imports = "import collections, datetime, numpy as np, sympy as sp\nfrom fractions import Fraction\nfrom decimal import Decimal\nx = sp.Symbol('x')"
    observation = shared.run(f"{imports}\nprint('x')\nfinal_answer({expression})\nprint('y')")
    assert observation.is_final and observation.error is None and observation.stdout == "x\n"
    assert observation.final_answer == answer and type(observation.final_answer) is type(answer)
    assert gold is None or grade("math", answer, gold).correct


@pytest.mark.parametrize(
    ("code", "printed"),
    [("final_answer(answer=1)\nprint('after')", ""),
     ("try:\n  final_answer(1)\nexcept:\n  final_answer(2)", ""),
     ("try:\n  final_answer(1)\nfinally:\n  1 / 0", ""),
     ("while True:\n  try: final_answer(1)\n  except BaseException: pass", ""),
     ("import contextlib, os\nwith contextlib.suppress(BaseException): final_answer(1)\nos._exit(1)", ""),
     ("class A:\n  def __del__(self): final_answer(1)\na = A()\ndel a", "Exception ignored"),
     ("import threading\nthreading.Thread(target=final_answer, args=(1,)).start()", ""),
     (ALARM.format("final_answer(1)") + "hang()", "")],
)  # fmt: skip
def test_a_final_answer_ends_the_action_and_stands(code, printed):
    done = threading.Event()
    with Sandbox(tools={"hang": lambda: done.wait(30)}, timeout=2) as sandbox:
        observation = sandbox.run(code)
        assert observation.is_final and (observation.final_answer, observation.error) == (1, None)
        assert observation.stdout.startswith(printed) and bool(printed) == bool(observation.stdout)
        assert sandbox.run("final_answer = 5\n6 * 7").result == "42"
        assert sandbox.run("final_answer('again')").final_answer == "again"
    done.set()


def test_unseeded_draws_repeat_and_seeded_ones_continue():
    code = "import random, numpy, sympy\nrandom.random(), numpy.random.rand(), numpy.random.default_rng().random(), sympy.randprime(1, 10**9)"
    with Sandbox() as one, Sandbox() as other:
        assert one.run(code).result == other.run(code).result != one.run(code).result
        one.run("random.seed(7)")
        expected = random.Random(7)
        assert one.run("random.random()").result == repr(expected.random())
        assert one.run("random.random()").result == repr(expected.random())


def test_a_state_in_odd_shape_still_runs_steps(sandbox):
    for code in (
        "import os, sys\nf = [os.open('/dev/null', 0) for _ in range(99)]",
        "os.close(0), os.close(1), os.close(2)",
        "a = []\nwhile True: a.append(bytearray(10**6))",
        "sys.path[:] = []\nsys.modules.clear()",
        "globals().clear()",
    ):
        sandbox.run(code)
        assert sandbox.run("__import__('time').sleep(0)\n6 * 7").error_kind in (None, "memory", "runtime")


def test_commit(sandbox):
    sandbox.run("x = 0")
    assert sandbox.run_candidates([]) == []
    sandbox.run_candidates(["x = 1", "x = 2", "x = 3\n1 / 0", "x = 4\nimport os\nos._exit(0)"])
    sandbox.commit(2)
    with pytest.raises(RuntimeError):
        sandbox.commit(1)
    sandbox.run_candidates(["x = 5", "import os\nos._exit(0)"])
    sandbox.commit(1)  # it has no state
    assert sandbox.run("x").result == "3"


def test_tools():
    def search(query, k=2):
        """Search it."""
        return {"hits": [query] * k}

    def fail(message):
        raise ValueError(message)

    barrier = threading.Barrier(4, timeout=20)
    tools = {"search": search, "fail": fail, "odd": object, "quit": sys.exit, "meet": lambda: barrier.wait() >= 0}
    with Sandbox(tools=tools, timeout=30) as sandbox:
        assert sandbox.run("search('é', k=3)").result == "{'hits': ['é', 'é', 'é']}"
        assert sandbox.run("try: fail('no luck')\nexcept ValueError as e: print(e)").stdout == "no luck\n"
        assert "not JSON serializable" in sandbox.run("odd()").error
        assert "SystemExit" in sandbox.run("quit()").error
        sandbox.run("search = 5")
        assert sandbox.run("search('a'), search.__doc__").result == "({'hits': ['a', 'a']}, 'Search it.')"
        assert sandbox.run(POOL + "len(list(pool.map(search, 'abcdefgh')))").result == "8"
        for _ in range(5):  # from a state whose step has called a tool, too
            assert [o.result for o in sandbox.run_candidates(["meet()"] * 4)] == ["True"] * 4  # at the same time
            sandbox.commit(0)


@pytest.mark.parametrize("seconds", [0, 0.8])
def test_an_input_error_of_a_tool_ends_the_run(seconds):
    """The model cannot know that a server is gone: its observation would be the fault of the machine."""

    def search(query):
        time.sleep(seconds)
        raise InputError("the server is gone")

    with Sandbox(tools={"search": search}, timeout=0.6) as sandbox:
        sandbox.run("x = 1")
        with pytest.raises(InputError, match="the server is gone"):
            for _ in range(9):  # the step has timed out before the error
                sandbox.run_candidates(["try: search(1)\nexcept BaseException: pass", "2"])


# The host.


def test_many_sandboxes_in_many_threads_leave_nothing_behind():
    """Neither processes nor descriptors nor threads."""
    Sandbox().close()  # starts the warm interpreter
    time.sleep(0.5)
    now = lambda: (len(os.listdir("/proc/self/fd")), threading.active_count(), len(descendants(os.getpid())))  # noqa: E731
    before, failures, warm = now(), [], module._warm

    def work(number):
        with Sandbox(tools={"add": lambda a, b: a + b}, timeout=30) as sandbox:
            sandbox.run(f"x = {number}")
            for step in range(5):
                sandbox.run_candidates(["x += 100", "x = add(x, 1)", "import os\nos._exit(1)"])
                sandbox.commit(1)
                if (result := sandbox.run("x").result) != str(number + step + 1):
                    failures.append((number, step, result))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == [] and warm is module._warm
    assert eventually(lambda: all(a <= b for a, b in zip(now(), before, strict=True))), (before, now())


def test_everything_dies_with_the_host():
    script = (
        "import os, threading, time\nfrom sandbox import Sandbox\none, two = Sandbox(), Sandbox(timeout=60)\n"
        "threading.Thread(target=two.run, args=('import time\\nwhile True: time.sleep(1)',)).start()\n"
        "one.run('1')\none.run_candidates(['1'] * 3); time.sleep(1)\n"
        "print(1, flush=True)\ntime.sleep(60)"
    )
    host = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT)
    host.stdout.readline()
    below = descendants(host.pid)  # the warm interpreter, two first processes, a state, three candidates, one that runs
    assert len(below) >= 8
    host.kill()
    host.communicate()
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))


def test_a_fork_of_the_host_makes_its_own_sandboxes():
    """Its sandboxes start from a warm interpreter of its own."""
    with Sandbox() as sandbox:
        sandbox.run("x = 42")
        child = os.fork()
        if child == 0:
            with Sandbox() as own:
                os._exit(own.run("6 * 7").result != "42")
        assert os.waitpid(child, 0)[1] == 0
        assert sandbox.run("x").result == "42"


def test_ctrl_c_stops_what_is_running():
    script = (
        "from sandbox import Sandbox\nwith Sandbox(timeout=60) as s:\n"
        "  s.run('1'); print('ready', flush=True)\n  try: s.run('while True: pass')\n"
        "  except KeyboardInterrupt: print(s.run('6 * 7').result, flush=True)"
    )
    host = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT)
    assert host.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    host.send_signal(signal.SIGINT)
    assert host.communicate(timeout=30)[0] == b"42\n"


@pytest.mark.parametrize("times", [2, 3])
def test_a_start_that_fails_is_tried_again(monkeypatch, tmp_path, times):
    """Two failures go unnoticed; after the third, the message has what the inside printed."""
    broken = tmp_path / "broken.py"
    broken.write_text("raise ImportError('no numpy on this machine')")
    paths = iter([str(broken)] * times + [module.inside.__file__])

    class Inside:
        def __getattr__(self, name):
            return next(paths) if name == "__file__" else getattr(inside, name)

    inside = module.inside
    monkeypatch.setattr(module, "_warm", None)
    monkeypatch.setattr(module, "inside", Inside())
    if times == 2:
        with Sandbox() as sandbox:
            assert sandbox.run("6 * 7").result == "42"
    else:
        with pytest.raises(InputError, match="did not start: ImportError: no numpy on this machine"):
            Sandbox()


def test_wrong_options_and_wrong_use_are_refused(sandbox):
    names = [{"tools": {name: print}} for name in ("a b", "final_answer", "class", "__name__")]
    for options in (*({"timeout": t} for t in (0, 3e6, float("inf"), float("nan"), "5")), {"memory_mb": 0},
                    {"memory_mb": 10**14}, {"isolation": "maybe"}, {"tools": {"x": 5}}, *names):  # fmt: skip
        with pytest.raises(InputError):
            Sandbox(**options)
    for codes in ([5], ["1"] * 101):
        with pytest.raises(ValueError):
            sandbox.run_candidates(codes)
    sandbox.close()
    with pytest.raises(RuntimeError):
        sandbox.run("1")


# Machines that offer less: a container whose filter denies Landlock, or seccomp.

POORER_MACHINE = """
import ctypes, struct, warnings
from common import inside
from common.inside import LOAD, RETURN, ALLOW, DENY, _rule
program = [*_rule(*{refused}, DENY), (RETURN, 0, 0, ALLOW)]
code = b"".join(struct.pack("=HBBI", *step) for step in program)
buffer = ctypes.create_string_buffer(code, len(code))
inside._call("prctl", 38, 1, 0, 0, 0)
inside._call("prctl", 22, 2, struct.pack("=H6xQ", len(program), ctypes.addressof(buffer)), 0, 0)
from sandbox import InputError, Sandbox
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("default")
    one, two = Sandbox(timeout=2), Sandbox()
print(*[str(warning.message).split("missing: ")[1] for warning in caught])
try: Sandbox(isolation="require")
except InputError as error: print("refused")
one.run("x = 41")
print(one.run("open('f', 'w')").error_kind, one.run("import socket\\nsocket.socket()").error_kind)
print(one.run("x = 0\\nwhile True: pass").error_kind, one.run("x + 1").result)
"""


@pytest.mark.parametrize(
    ("refused", "missing", "kinds"),
    [((444, []), "Landlock (Operation not permitted)", "runtime runtime"),
     ((157 if os.uname().machine == "x86_64" else 167, [(0, 0xFFFFFFFF, [22])]), "seccomp (Operation not permitted)", "runtime None")],
)  # fmt: skip
def test_a_machine_that_offers_less(tmp_path, refused, missing, kinds):
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})" + POORER_MACHINE.format(refused=refused)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.stdout == f"{missing}\nrefused\n{kinds}\ntimeout 42\n", result.stderr


# socket, connect, sendmsg, bind, execve, kill, tkill, tgkill, ptrace, setsid, setpgid, unlinkat, renameat, linkat, symlinkat,
# truncate, ftruncate, mount, bpf, io_uring_setup, memfd_create, pidfd_open, openat2
FORBIDDEN = {
    1: {41, 42, 46, 49, 59, 62, 200, 234, 101, 112, 109, 263, 264, 265, 266, 76, 77, 165, 321, 425, 319, 434, 437},
    2: {198, 203, 211, 200, 221, 129, 130, 131, 117, 157, 154, 35, 38, 37, 36, 45, 46, 40, 280, 425, 279, 434, 437},
}


@pytest.mark.parametrize("column", FORBIDDEN)
def test_the_tables_of_system_calls(column):
    """Each number once, and none that harms, also for arm64, where the attacks do not run."""
    found = [n for row in module.inside.CALLS for n in module.inside.numbers_of(row[column])]
    assert len(found) == len(set(found)) > 90 and not FORBIDDEN[column] & set(found)
