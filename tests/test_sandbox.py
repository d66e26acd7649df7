# ruff: noqa: E501
"""The sandbox against hostile and clumsy code. Each attack is judged by its effect, not by an exception's type.

    pytest tests/test_sandbox.py

Every attack here answers "through" where it gets through. The same attacks are run without containment first:
there they do get through, so that a test that cannot fail is noticed.
"""

import functools
import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

import sandbox_check
from sandbox import Observation, Sandbox, Sandboxes
from wire import parents

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the attacks are on Linux")


def children(pid):
    """Every descendant of a process, zombies too."""
    found, parents = [], {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    todo = [pid]
    while todo:
        found += (new := parents.get(todo.pop(), []))
        todo += new
    return found


def all_stand_still(pids):
    return all(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T" for pid in pids)


def eventually(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def shared():
    """One sandbox for tests that leave nothing behind."""
    with Sandbox(timeout=10, memory_mb=512) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox():
    with Sandbox(timeout=10, memory_mb=512) as sandbox:
        yield sandbox


def victims():
    """What there is to steal and to break: a secret, a victim process, sockets that listen."""
    # Open to everyone, parents too, so that only the sandbox can be what keeps an attack out.
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
    subprocess.run(["rm", "-rf", str(folder)], check=True)


@pytest.fixture(scope="module")
def world():
    yield from victims()


# Attacks. `through` is what an attack calls when it got what it wanted; constants come from `world`.

PREPARE = """
import ctypes, os, sys, time, signal, socket, subprocess, threading
libc = ctypes.CDLL(None, use_errno=True)
def through(proof=True):
    final_answer("through" if proof else "nothing")
def call(number, *arguments):
    return libc.syscall(ctypes.c_long(number), *[a if isinstance(a, bytes) or a is None else ctypes.c_long(a) for a in arguments])
"""

# name: code, or (code, "strong") where the attack fails without containment too, for want of rights or of a target
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
        # 0: /dev/null; 1, 2, 5: its output; 3: its channel; 4: its folder
        "through([fd for fd, _ in kinds] != [0, 1, 2, 3, 4, 5] or [fd for fd, mode in kinds if stat.S_ISSOCK(mode)] != [3])",
        "strong"),
}  # fmt: skip


def attack(sandbox, name, world):
    code = ATTACKS[name] if isinstance(ATTACKS[name], str) else ATTACKS[name][0]
    constants = "".join(f"{key} = {value!r}\n" for key, value in world.items())
    return sandbox.run(PREPARE + constants + code)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_fails(shared, world, name):
    if name == "descriptors":  # earlier attacks leave some open
        with Sandbox() as fresh:
            assert attack(fresh, name, world).final_answer == "nothing"
        return
    observation = attack(shared, name, world)
    assert observation.final_answer != "through", observation
    assert Path(world["SECRET"]).read_text() == "the answer is 42\n"
    assert Path(world["SECRET"]).stat().st_mode & 0o777 == 0o666
    assert sorted(path.name for path in Path(world["FOLDER"]).iterdir()) == ["answers.jsonl", "socket"]
    assert shared.run("6 * 7").result == "42"


@pytest.mark.filterwarnings("ignore")
def test_attacks_work_without_containment(tmp_path):
    """The attacks are real: with isolation="off", those that need no special rights get through."""
    script = tmp_path / "control.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, json
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import test_sandbox as tests
        from sandbox import Sandbox
        victims = tests.victims()
        world = next(victims)
        failed = []
        for name, attack in tests.ATTACKS.items():
            if isinstance(attack, str) and name not in ("execve_self", "chmod"):
                with Sandbox(timeout=10, isolation="off") as sandbox:
                    observation = tests.attack(sandbox, name, world)
                if observation.final_answer != "through":
                    failed.append([name, repr(observation)])
                if name in ("write_answers", "read_by_rename", "truncate_on_reading"):
                    open(world["SECRET"], "w").write("the answer is 42\\n")
        next(victims, None)
        print(json.dumps(failed))
    """)
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert json.loads(result.stdout or "null") == [], result.stderr


# Time-outs: back within 0.2 s of the limit (more is allowed for a busy machine), with output and state kept.

LOOPS = {
    "loop": "while True: pass",
    "sleep": "import time\ntime.sleep(60)",
    "c_loop": "sum(range(10**12))",
    "power": "10 ** 10 ** 9",
    "regex": "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
    "swallowed": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "signals_ignored": "import signal\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n  except (OSError, ValueError): pass\nwhile True: pass",
    "signals_blocked": "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
    "finally": "try:\n  while True: pass\nfinally:\n  while True: pass",
    "threads": "import threading\nfor _ in range(4): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\nwhile True: pass",
    "thread_left": "import threading, time\nt = threading.Thread(target=time.sleep, args=(60,))\nt.start()\nt.join()",
    "atexit": "import atexit, time\natexit.register(time.sleep, 60)\ntime.sleep(60)",
    "printing": "while True: print('x' * 1000)",
    "input_from_pipe": "import os\nr, w = os.pipe()\nos.read(r, 1)",
    "lock": "import threading\nl = threading.Lock()\nl.acquire()\nl.acquire()",
    "stopped": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "channel_flood": "import os\nwhile True: os.write(3, b'\\0\\0\\0\\x01' b'0')",
    "fork_and_setsid": "import os, time\ntry:\n  if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)\nexcept OSError: pass\ntime.sleep(60)",
    "sympy": "import sympy\nsympy.factorint(10**90 + 289)\nwhile True: pass",
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_time_out(name):
    with Sandbox(timeout=0.5) as sandbox:
        sandbox.run("kept = 41")
        before = set(children(os.getpid()))
        started = time.monotonic()
        observation = sandbox.run("print('before')\nkept = 0\n" + LOOPS[name])
        elapsed = time.monotonic() - started
        assert observation.stdout.startswith("before\n")
        assert observation.error_kind == ("killed" if name == "channel_flood" else "timeout")
        assert 0.5 <= elapsed < 1.0 or (name == "channel_flood" and elapsed < 1.0)
        assert sandbox.run("kept + 1").result == "42"
        assert eventually(lambda: len(set(children(os.getpid())) - before) <= 1)  # the new state


def test_a_candidates_time_out_leaves_the_others():
    with Sandbox(timeout=0.6) as sandbox:
        started = time.monotonic()
        slow, quick = sandbox.run_candidates(["print(1)\nwhile True: pass", "6 * 7"])
        assert 0.6 <= time.monotonic() - started < 1.1
        assert (slow.error_kind, slow.stdout, quick.result, quick.error) == ("timeout", "1\n", "42", None)


def test_a_state_that_ignores_its_host_is_given_up():
    """Code may take over the process that holds the state; the next step then fails in time, the one after works."""
    takeover = "import time\nfinal_answer.__self__.fork = lambda *_: time.sleep(60)\nx = 1"
    with Sandbox(timeout=0.5) as sandbox:
        sandbox.run(takeover)
        started = time.monotonic()
        assert sandbox.run("x").error_kind in ("timeout", "killed")
        assert time.monotonic() - started < 1.2
        assert sandbox.run("6 * 7").result == "42"


def test_threads_end_with_their_step(sandbox):
    """Also for the modules that count them: a fork that leaves them to themselves would wait for the dead."""
    sandbox.run("import threading, time\nthread = threading.Thread(target=time.sleep, args=(60,))\nthread.start()")
    assert sandbox.run("threading.active_count(), thread.is_alive()").result == "(1, False)"
    assert sandbox.run("thread.join()\n'joined'").result == "'joined'"
    assert sandbox.run("t = threading.Thread(target=print, args=(1,))\nt.start()\nt.join()").stdout == "1\n"


def test_threads_left_behind_do_not_run_between_steps(sandbox):
    sandbox.run("import threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)], daemon=True).start()")
    used = lambda: sum(map(int, Path(f"/proc/{sandbox.state.pid}/stat").read_text().split()[13:15]))  # noqa: E731
    time.sleep(0.1)
    before = used()
    time.sleep(0.5)
    assert used() - before <= 2  # hundredths of a second
    assert sandbox.run("6 * 7").result == "42"


# Resources.


def test_memory_is_bounded(sandbox):
    assert sandbox.run("x = 7\nbytearray(10**9)").error_kind == "memory"
    assert sandbox.run("x").result == "7"
    assert sandbox.run("import numpy\nnumpy.ones(10**9)").error_kind == "memory"
    assert sandbox.run("a = []\nwhile True: a.append('x' * 10**6)").error_kind == "memory"
    assert sandbox.run("a[-1][:1]").result == "'x'"  # an exception keeps what ran before it
    assert sandbox.run("del a").error is None
    assert sandbox.run("import mmap\nmmap.mmap(-1, 10**9, mmap.MAP_PRIVATE)").error_kind == "memory"
    assert sandbox.run("x = bytearray(3 * 10**8)\nlen(x)").result == "300000000"  # less than memory_mb is fine


def test_memory_of_all_candidates_together_is_bounded(sandbox):
    observations = sandbox.run_candidates(["x = bytearray(10**9)"] * 4)
    assert [observation.error_kind for observation in observations] == ["memory"] * 4


def test_scratch_folder_is_bounded():
    with Sandbox(scratch_mb=8, timeout=20) as sandbox:
        code = "n = 0\ntry:\n  for i in range(200):\n    n += open(f'f{i}', 'wb').write(bytes(10**6))\nexcept OSError as e: print(e)\nn"
        observation = sandbox.run(code)
        assert observation.error_kind == "killed" or int(observation.result) <= 9 * 10**6
        assert sandbox.run("open('big', 'wb').truncate(10**9)").error_kind in ("runtime", "killed")
        assert sandbox.run("6 * 7").result == "42"


def test_threads_and_open_files_are_bounded(sandbox):
    assert sandbox.run(
        "import threading, time\nfor _ in range(2000): threading.Thread(target=time.sleep, args=(9,)).start()"
    ).error
    assert sandbox.run("f = [open('/dev/null') for _ in range(1000)]").error
    assert sandbox.run("import os\np = [os.pipe() for _ in range(1000)]").error
    assert sandbox.run("6 * 7").result == "42"


def test_fork_bomb_is_none(sandbox):
    before = len(children(os.getpid()))
    sandbox.run("import os\nwhile True:\n  try: os.fork()\n  except OSError: break")
    assert len(children(os.getpid())) <= before + 1


def test_processor_time_is_bounded():
    """Threads that leave the interpreter lock burn several processors at once; the clock of them all counts."""
    with Sandbox(timeout=1) as sandbox:
        assert sandbox.run("import resource\nresource.getrlimit(resource.RLIMIT_CPU)").result == "(2, 2)"


def test_printing_costs_the_host_nothing(sandbox):
    gc.collect()
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096  # noqa: E731
    before = resident()
    observation = sandbox.run("for i in range(500): print('x' * 10**6)\nprint('end')")
    assert resident() - before < 20e6
    assert len(observation.stdout) < 10_100 and observation.stdout.endswith("end\n")
    assert f"{500 * (10**6 + 1) + 4 - 10_000:,} characters not shown" in observation.stdout


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 19, 20, 21, 27, 35, 1000])
def test_long_output_is_cut_in_the_middle(size):
    text = "".join(chr(97 + i % 26) for i in range(size))
    expected = text if size <= 20 else f"{text[:10]}\n[... {size - 20:,} characters not shown ...]\n{text[-10:]}"
    with Sandbox(output_limit=20) as sandbox:
        for pieces in (1, 3, 7, 1000):
            observation = sandbox.run(f"for i in range(0, {size}, {pieces}): print({text!r}[i:i+{pieces}], end='')")
            assert observation.stdout == expected
        assert sandbox.run(repr(text)).result == (
            repr(text) if size <= 18 else
            f"{repr(text)[:10]}\n[... {size + 2 - 20:,} characters not shown ...]\n{repr(text)[-10:]}")  # fmt: skip


# Misuse of the channel: nothing that the code sends is more than its own observation.

FORGERIES = {
    "garbage": "os.write(3, os.urandom(1000))",
    "huge": "os.write(3, b'\\xff' * 8)",
    "no_json": "send(b'hello')",
    "not_an_object": "send(b'[1]')",
    "deep": "send(b'[' * 100000)",
    "unknown": "send(b'{\"who\": 1}')",
    "nan": "send(b'{\"final\": NaN}')",
    "bad_outcome": "send(b'{\"done\": {\"result\": 5}}')",
    "bad_kind": "send(b'{\"done\": {\"error\": \"x\", \"kind\": \"none\"}}')",
    "unknown_tool": "send(b'{\"tool\": \"os.system\", \"args\": [], \"kwargs\": {}}')",
    "no_arguments": "send(b'{\"tool\": \"add\"}')",
    "two_calls": "for _ in range(3): send(b'{\"tool\": \"slow\", \"args\": [], \"kwargs\": {}}')",
    "close": "os.close(3)",
    "descriptors": "socket.send_fds(socket.socket(fileno=3), [b'\\0\\0\\0\\x02{}'], [0, 1, 2])",
    "output": "os.ftruncate(1, 0)",
    "huge_integer": "send(b'{\"final\": ' + b'9' * 100000 + b'}')",
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_message(name):
    code = "import os, socket, time\ndef send(data): os.write(3, len(data).to_bytes(4, 'big') + data)\n"
    calls = []
    tools = {"add": lambda a, b: calls.append((a, b)), "slow": lambda: time.sleep(0.2)}
    with Sandbox(tools=tools, timeout=2) as sandbox:
        sandbox.run("x = 42")
        descriptors = len(os.listdir("/proc/self/fd"))
        forged, honest = sandbox.run_candidates([code + FORGERIES[name] + "\ntime.sleep(0.3)", "x"])
        assert forged.error or name == "huge_integer"
        assert honest == Observation(result="42", seconds=honest.seconds)
        assert calls == []
        sandbox.commit(1)
        assert sandbox.run("x").result == "42"
        assert len(os.listdir("/proc/self/fd")) <= descriptors
    json.dumps(forged.final_answer)


def test_forging_an_observation_gains_only_that_observation(sandbox):
    forged = 'import os, time\nd = b\'{"done": {"result": "forged"}}\'\nos.write(3, len(d).to_bytes(4, \'big\') + d)\ntime.sleep(1)'
    first, second = sandbox.run_candidates([forged, "1 + 1"])
    assert (first.result, second.result) == ("forged", "2")


def test_half_a_surrogate_pair_can_be_written_to_a_file(sandbox):
    observation = sandbox.run("print('\\ud800')\nfinal_answer(['\\udfff'])")
    json.dumps(vars(observation), ensure_ascii=False).encode()
    assert observation.final_answer == ["?"]


def test_the_warm_interpreter_is_not_poisoned():
    poison = "import builtins, math, numpy, sympy, json, os\nbuiltins.sum = lambda x: 13\nmath.pi = 3\nsympy.pi = 3\nnumpy.ones = None"
    with Sandbox() as one:
        one.run(poison)
        assert one.run("import math\nmath.pi").result == "3"
        with Sandbox() as other:
            assert (
                other.run("import math, sympy, numpy\nsum([1, 1]), math.pi > 3, sympy.pi, numpy.ones(1)[0] == 1").result
                == "(2, True, pi, np.True_)"
            )


def test_sandboxes_do_not_see_each_other():
    with Sandbox() as one, Sandbox() as other:
        one.run("open('mine', 'w').write('secret')\nx = 1")
        found = (
            "import os\n[f for root, _, files in os.walk('/') for f in files if f == 'mine'], os.path.exists('mine')"
        )
        assert other.run(found).result == "([], False)"
        assert other.run("x").error_kind == "runtime"


# The state: as in a REPL.


def test_state_persists(sandbox):
    assert sandbox.run("import math\nx = [1]\ndef f(n): return n + len(x)") == Observation(
        seconds=pytest.approx(0, abs=9)
    )
    assert sandbox.run("x.append(2)\nf(40)").result == "42"
    assert sandbox.run("y = 1\n1 / 0\ny = 2").error_kind == "runtime"
    assert sandbox.run("y").result == "1"
    assert (
        sandbox.run("class A:\n  pass\na = A()\nimport pickle\npickle.loads(pickle.dumps(a)).__class__ is A").result
        == "True"
    )
    assert sandbox.run("if __name__ == '__main__': print('main')").stdout == "main\n"
    assert sandbox.run("from __future__ import annotations").error is None
    assert sandbox.run("import inspect\ninspect.getsource(f)").result == repr("def f(n): return n + len(x)")


@pytest.mark.parametrize(
    ("code", "result"),
    [("1 + 1", "2"), ("x = 1", None), ("None", None), ("'a'", "'a'"), ("x = 1\nx;", "1"), ("", None), ("# nothing", None),
     ("for i in range(3): i", None), ("print('a')", None), ("(lambda: 7)()", "7"), ("'''doc'''", "'doc'"),
     ("import sympy\nsympy.Rational(1, 2)", "1/2"), ("f'{1}'", "'1'"), ("len(str(2**100000))", "30103"),
     ("[i async for i in x]", None), ("True", "True")],
)  # fmt: skip
def test_result_is_the_repr_of_a_last_expression(shared, code, result):
    assert shared.run(code).result == result


@pytest.mark.parametrize(
    ("code", "kind", "parts"),
    [("x = (1,", "syntax", ["SyntaxError", "line 1", "x = (1,"]),
     ("x = 1\nfor i in range(3)\n  pass", "syntax", ["line 2", "for i in range(3)", "expected ':'"]),
     ("def f():\nreturn 1", "syntax", ["IndentationError", "line 2"]),
     ("x = 1\0", "syntax", ["null byte"]),
     ("return 1", "syntax", ["'return' outside function"]),
     ("(" * 1000, "syntax", ["too many nested"]),
     ("x = 1\n1 / 0", "runtime", ["ZeroDivisionError: division by zero", "line 3: 1 / 0"]),
     ("def f(n):\n  return 1 / n\nf(0)", "runtime", ["line 4: f(0)", "in f, line 3: return 1 / n"]),
     ("undefined", "runtime", ["NameError: name 'undefined' is not defined"]),
     ("import json\njson.loads('{')", "runtime", ["JSONDecodeError", "line 3"]),
     ("raise SystemExit(3)", "runtime", ["SystemExit: 3"]),
     ("exit()", "runtime", ["SystemExit"]),
     ("raise KeyboardInterrupt", "runtime", ["KeyboardInterrupt"]),
     ("input()", "runtime", ["EOFError"]),
     ("import no_such_module", "runtime", ["ModuleNotFoundError"]),
     ("def f(): f()\nf()", "runtime", ["RecursionError"]),
     ("class E(Exception):\n  def __str__(self): 1 / 0\nraise E", "runtime", ["E: <exception str() failed>"]),
     ("class R:\n  def __repr__(self): raise ValueError('no repr')\nR()", "runtime", ["ValueError: no repr"]),
     ("raise ValueError('x' * 10**6)", "runtime", ["characters not shown"]),
     ("exec('1 +')", "runtime", ["SyntaxError"]),
     ("import os\nos._exit(3)", "killed", ["exit status 3"]),
     ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "killed", ["SIGKILL"]),
     ("import ctypes\nctypes.string_at(1)", "killed", ["SIGSEGV"]),
     ("import os\nos.abort()", "killed", ["SIGABRT"]),
     ("x = 'a' * 10**12", "memory", ["MemoryError"])],
)  # fmt: skip
def test_errors(shared, code, kind, parts):
    shared.run("kept = 41")
    observation = shared.run("print('before')\n" + code if kind != "syntax" else code)
    assert observation.error_kind == kind
    assert all(part in observation.error for part in parts), observation.error
    assert observation.stdout == ("" if kind == "syntax" else "before\n")
    assert not observation.is_final and len(observation.error) < 10_200
    assert shared.run("kept + 1").result == "42"


def test_an_error_in_a_function_of_an_earlier_step_names_both_lines(sandbox):
    sandbox.run("def f(n):\n  return 1 / n")
    assert (
        sandbox.run("x = 0\nf(x)").error
        == "ZeroDivisionError: division by zero (line 2: f(x); in f, step 1, line 2: return 1 / n)"
    )


def test_everything_printed_is_kept(sandbox):
    observation = sandbox.run("import sys, os\nprint('a')\nprint('b', file=sys.stderr)\nsys.stdout.write('c\\n')\n"
                              "sys.stdout.buffer.write(b'd\\n')\nprint('é', end='')\nos.write(1, b'raw')")  # fmt: skip
    assert observation.stdout == "a\nb\nc\nd\néraw"
    sandbox.run("import sys\nold = sys.stdout\nsys.stdout = None")
    assert sandbox.run("print('x')\nprint('y', file=old)").stdout == "x\ny\n"
    assert "RuntimeWarning" in sandbox.run("import numpy\nnumpy.float64(1) / 0").stdout
    assert sandbox.run("n = 1\nprint(n is 1, '\\d')").stdout == "True \\d\n"  # what Python says of the text is not


@pytest.mark.parametrize(
    ("expression", "answer"),
    [("42", 42), ("'a'", "a"), ("None", None), ("True", True), ("0.5", 0.5), ("[1, {'a': [None]}]", [1, {"a": [None]}]),
     ("(1, 2)", "(1, 2)"), ("{1: 2}", "{1: 2}"), ("float('inf')", "inf"), ("[float('nan')]", "[nan]"), ("{1}", "{1}"),
     ("__import__('fractions').Fraction(1, 3)", "1/3"), ("__import__('numpy').int64(7)", "7"),
     ("__import__('numpy').float64(0.5)", "0.5"), ("__import__('sympy').sqrt(8)", "2*sqrt(2)"), ("10**30", 10**30),
     ("10**5000", "1" + "0" * 5000), ("__import__('numpy').array([1, 2])", "[1 2]"), ("b'x'", "b'x'"), ("''", "")],
)  # fmt: skip
def test_final_answer(shared, expression, answer):
    observation = shared.run(f"print('x')\nfinal_answer({expression})\nprint('y')")
    assert observation.is_final and observation.error is None and observation.stdout == "x\n"
    assert observation.final_answer == answer and type(observation.final_answer) is type(answer)


@pytest.mark.parametrize(
    "code",
    ["try:\n  final_answer(1)\nexcept Exception:\n  print('after')",
     "try:\n  final_answer(1)\nexcept:\n  print('after')\n  final_answer(2)",
     "try:\n  final_answer(1)\nfinally:\n  print('after')",
     "while True:\n  try:\n    final_answer(1)\n  except BaseException:\n    pass\n    print('after')",
     "def f():\n  try:\n    return final_answer(1)\n  except:\n    return 2\nx = f()\nprint('after')",
     "import contextlib\nwith contextlib.suppress(BaseException):\n  final_answer(1)\nprint('after')",
     "class A:\n  def __del__(self): final_answer(1)\na = A()\ndel a\nprint('after')",
     "list(map(final_answer, [1, 2]))\nprint('after')",
     "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor() as pool:\n"
     "  list(pool.map(final_answer, [1]))\nprint('after')",
     "import threading\nt = threading.Thread(target=final_answer, args=(1,))\nt.start()\nt.join()\nprint('after')",
     "final_answer(answer=1)\nprint('after')",
     "final_answer(1)\n1 / 0"],
)  # fmt: skip
def test_final_answer_ends_the_action_at_once(sandbox, code):
    observation = sandbox.run(code)
    assert (observation.final_answer, observation.error, observation.stdout) == (1, None, "") and observation.is_final
    assert observation.seconds < 5
    assert sandbox.run("final_answer = 5\n6 * 7").result == "42"
    assert sandbox.run("final_answer('again')").final_answer == "again"


def test_unseeded_draws_repeat_and_seeded_ones_continue():
    code = "import random, numpy\nrandom.random(), numpy.random.rand()"
    with Sandbox() as one, Sandbox() as other:
        assert one.run(code).result == other.run(code).result != one.run(code).result
        one.run("random.seed(7)")
        expected = random.Random(7)
        assert one.run("random.random()").result == repr(expected.random())
        assert one.run("random.random()").result == repr(expected.random())


# Files.


def test_files_persist_and_are_each_candidates_own(sandbox):
    sandbox.run(
        "import os\nopen('a.txt', 'w').write('1')\nos.mkdir('d')\npath = os.path.abspath('a.txt')\nhere = os.getcwd()"
    )
    first, second = sandbox.run_candidates([
        "open('a.txt', 'a').write('2')\nopen(path).read(), sorted(os.listdir(here))",
        "import time\ntime.sleep(0.2)\nopen('d/b.txt', 'w').close()\nopen(path).read(), sorted(os.listdir('.'))"])  # fmt: skip
    assert (first.result, second.result) == ("('12', ['a.txt', 'd'])", "('1', ['a.txt', 'd'])")
    sandbox.commit(0)
    assert (
        sandbox.run("open(path).read(), os.path.exists('d/b.txt'), os.getcwd() == here").result == "('12', False, True)"
    )
    assert sandbox.run("open('a.txt', 'w').write('x' * 9)\nos._exit(0)").error_kind == "killed"
    assert sandbox.run("open('a.txt').read()").result == "'12'"
    assert sandbox.run("import pathlib\np = pathlib.Path('a.txt').resolve()\nos.chdir('d')").error is None
    assert (
        sandbox.run("p.read_text(), os.path.basename(os.getcwd()), os.listdir('..')").result
        == "('12', 'd', ['a.txt', 'd'])"
    )


def test_open_files_go_on_in_the_copies(sandbox):
    sandbox.run("f = open('log', 'w+')\nf.write('0')\nf.flush()")
    sandbox.run_candidates([f"f.write('{i}')\nf.flush()" for i in (1, 2, 3)])
    sandbox.commit(1)
    assert sandbox.run("f.write('!')\nf.close()\nopen('log').read()").result == "'02!'"


def test_a_state_in_odd_shape_goes_on(sandbox):
    for code in (
        "import os, shutil\nos.mkdir('d')\nos.chdir('d')\nos.rmdir('../d')",
        "shutil.rmtree('/proc/self/cwd', ignore_errors=True)",
        "os.chdir('/')",
        "import signal\nsignal.alarm(1)",
        "os.umask(0o777)\nos.mkdir('closed')\nopen('closed2', 'w').close()",
        "f = [os.open('/dev/null', 0) for _ in range(99)]",
        "a = []\nwhile True: a.append(bytearray(10**6))",
        "import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return f(n + 1)\nf(0)",
        "import gc\ngc.disable()\ngc.set_threshold(1)",
        "sys.path[:] = []\nsys.modules.clear()",
        "import builtins\nbuiltins.print = builtins.repr = None",
        "globals().clear()",
    ):
        sandbox.run(code)
        assert sandbox.run("__import__('time').sleep(0)\n6 * 7").error_kind in (None, "memory", "runtime")
    assert sandbox.run("6 * 7").error_kind != "timeout"


def test_libraries_work(sandbox):
    code = """
        import asyncio, csv, decimal, hashlib, io, json, shutil, sqlite3, tempfile, zipfile
        from concurrent.futures import ThreadPoolExecutor
        import numpy as np, sympy as sp
        x = sp.symbols('x')
        with tempfile.TemporaryDirectory() as folder:
            open(folder + '/a', 'w').write('hi')
            shutil.copy2(folder + '/a', folder + '/b')
            with zipfile.ZipFile('z.zip', 'w') as z: z.write(folder + '/b', 'b')
        async def two(): await asyncio.sleep(0.01); return 2
        db = sqlite3.connect('x.db'); db.execute('create table t (a)'); db.execute('insert into t values (3)'); db.commit()
        with ThreadPoolExecutor(4) as pool: fourth = list(pool.map(lambda n: n * n, range(3)))[2]
        [sp.solve(x**2 - 1)[1], asyncio.run(two()), db.execute('select a from t').fetchone()[0], fourth, float(np.linalg.det(np.eye(2) * 2)) + 1]
    """
    assert sandbox.run(textwrap.dedent(code)).result == "[1, 2, 3, 4, 5.0]"


# Candidates.


def test_candidates_run_at_the_same_time(sandbox):
    started = time.monotonic()
    observations = sandbox.run_candidates(["import time\ntime.sleep(0.4)"] * 8)
    assert time.monotonic() - started < 2.0 and all(observation.error is None for observation in observations)


def test_commit(sandbox):
    sandbox.run("x = 0")
    assert sandbox.run_candidates([]) == []
    with pytest.raises(RuntimeError):
        sandbox.commit(0)
    sandbox.run_candidates(["x = 1", "x = 2"])
    assert sandbox.run("x").result == "0"  # not committed: dropped
    sandbox.run_candidates(["x = 1", "x = 2", "x = 3\n1 / 0", "x = 4\nimport os\nos._exit(0)"])
    sandbox.commit(2)
    with pytest.raises(RuntimeError):
        sandbox.commit(1)
    assert sandbox.run("x").result == "3"
    sandbox.run_candidates(["x = 5", "import os\nos._exit(0)"])
    with pytest.raises(IndexError):
        sandbox.commit(2)
    sandbox.commit(1)  # it has no state
    assert sandbox.run("x").result == "3"


@pytest.mark.parametrize("count", [1, 2, 4, 8, 13])
def test_every_candidate_starts_from_the_state_whoever_forked_it(sandbox, count):
    forked_by = parents(count)
    assert len(forked_by) == count and all(p is None or p < i for i, p in enumerate(forked_by))
    sandbox.run("x = [0]\nopen('f', 'w').write('0')")
    before = len(children(os.getpid()))
    for chosen in range(count):
        x, text = sandbox.run("x, open('f').read()").result, str(chosen)
        codes = [f"seen = repr((x, open('f').read()))\nx.append({i})\nopen('f', 'w').write('{i}')\nseen"
                 for i in range(count)]  # fmt: skip
        assert [observation.result for observation in sandbox.run_candidates(codes)] == [repr(x)] * count
        sandbox.commit(chosen)
        assert sandbox.run("x[-1], open('f').read()").result == f"({chosen}, '{text}')"
    assert eventually(lambda: len(children(os.getpid())) <= before)


def test_no_candidate_forks_for_itself(sandbox):
    """Some may fork, for the host, before their code runs: that permission must be used up by then."""
    code = "import os\ntry: os.fork()\nexcept OSError as error: print(error.errno)"
    for _ in range(5):
        assert [observation.stdout for observation in sandbox.run_candidates([code] * 8)] == ["1\n"] * 8


def test_how_a_candidate_ended_is_known_whoever_forked_it(sandbox):
    for ended in range(8):
        codes = ["import os\nos._exit(3)" if i == ended else "x = 1" for i in range(8)]
        observations = sandbox.run_candidates(codes)
        assert [i for i, observation in enumerate(observations) if observation.error] == [ended]
        assert "exit status 3" in observations[ended].error
        alive = [candidate.pid for i, candidate in enumerate(sandbox.candidates) if i != ended]
        assert eventually(functools.partial(all_stand_still, alive))  # also whoever was asked
    for observation in sandbox.run_candidates(["import os\nos._exit(3)"] * 8):  # also those who could tell
        assert observation.error_kind == "killed" and "ended" in observation.error
    assert sandbox.run("6 * 7").result == "42"


def test_what_a_library_keeps_for_itself_is_each_candidates_own(sandbox):
    code = "import ctypes\nm = ctypes.CDLL('libm.so.6')\nm.lgamma.argtypes = [ctypes.c_double]\n"
    sandbox.run(code + "sign = lambda: ctypes.c_int.in_dll(m, 'signgam').value")
    below, above = sandbox.run_candidates(["m.lgamma(-0.5)\nsign()", "m.lgamma(0.5)\nsign()"])
    assert (below.result, above.result) == ("-1", "1")
    sandbox.commit(0)
    assert sandbox.run("sign()").result == "-1"
    with Sandbox() as other:
        assert other.run("import ctypes\nctypes.c_int.in_dll(ctypes.CDLL('libm.so.6'), 'signgam').value").result == "0"


def test_no_memory_is_shared_between_candidates(sandbox):
    sandbox.run("import mmap, numpy\nnumpy.save('a.npy', numpy.zeros(4))\nf = open('a.npy', 'r+b')")
    sandbox.run("own = mmap.mmap(-1, 8, mmap.MAP_PRIVATE)")
    shared = ["mmap.mmap(-1, 8)", "mmap.mmap(f.fileno(), 0)", "numpy.load('a.npy', mmap_mode='r+')",
              "numpy.memmap('b', mode='w+', shape=4)"]  # fmt: skip
    assert all("PermissionError" in observation.error for observation in sandbox.run_candidates(shared))
    copies = ["mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)[0]", "numpy.load('a.npy', mmap_mode='c')[0]",
              "numpy.load('a.npy', mmap_mode='r')[0]", "own[:1] = b'x'\nown[0]"]  # fmt: skip
    assert [observation.result for observation in sandbox.run_candidates(copies)] == [
        "147",
        "np.float64(0.0)",
        "np.float64(0.0)",
        "120",
    ]
    assert sandbox.run("own[0]").result == "0"


def random_program(rng):
    lines = ["import random", "open('log', 'a').write('.')"]
    for _ in range(rng.randint(1, 4)):
        lines.append(rng.choice([
            "v['n'] = v.get('n', 0) + {0}", "l.append({0})", "print(l, v)", "print(random.random())", "l = l[-{0}:]",
            "print(open('log').read())", "1 / ({0} - 3)", "def g(): return {0}", "print(g())", "l[{0}]", "v = dict(v)",
            "random.seed({0})", "open('log', 'w').close()", "(sum(l), v, random.getrandbits(9))", "x =", "final_answer(l)",
        ]).format(rng.randint(0, 6)))  # fmt: skip
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(6))
def test_candidates_against_replay_in_fresh_sandboxes(seed):
    """What a fork gives is what running the whole history again in a new sandbox gives."""
    rng = random.Random(seed)
    history = ["l, v = [], {}\ndef g(): return 0"]

    def visible(observation):
        return {**vars(observation), "seconds": None}

    with Sandbox() as sandbox:
        sandbox.run(history[0])
        for _ in range(4):
            codes = [random_program(rng) for _ in range(4)]
            observations = sandbox.run_candidates(codes)
            for code, observation in zip(codes, observations, strict=True):
                with Sandbox() as fresh:
                    for earlier in history:
                        fresh.run(earlier)
                    assert visible(fresh.run(code)) == visible(observation)
            chosen = rng.randrange(4)
            sandbox.commit(chosen)
            history.append(codes[chosen])


# Tools.


def test_tools():
    def search(query, k=2):
        """Search it."""
        return {"hits": [query] * k}

    def fail(message):
        raise ValueError(message)

    with Sandbox(
        tools={"search": search, "fail": fail, "odd": lambda: object(), "quit": sys.exit}, timeout=5
    ) as sandbox:
        assert sandbox.run("search('é', k=3)").result == "{'hits': ['é', 'é', 'é']}"
        assert sandbox.run("try: fail('no luck')\nexcept ValueError as e: print(e)").stdout == "no luck\n"
        assert "no luck" in sandbox.run("fail('no luck')").error
        assert "not JSON serializable" in sandbox.run("search({1})").error
        assert "not JSON serializable" in sandbox.run("odd()").error
        assert sandbox.run("quit()").error_kind == "runtime"
        assert "missing 1 required" in sandbox.run("search()").error
        sandbox.run("search = 5")
        assert sandbox.run("search('a'), search.__doc__").result == "({'hits': ['a', 'a']}, 'Search it.')"
        many = "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(8) as p: r = list(p.map(search, 'abcdefgh'))\nlen(r)"
        assert sandbox.run(many).result == "8"
        assert len(sandbox.run("len(search('x' * 10**6, 3)['hits'][2])").result) == 7


def test_candidates_call_tools_at_the_same_time():
    barrier = threading.Barrier(4, timeout=5)
    with Sandbox(tools={"meet": lambda: barrier.wait() >= 0}) as sandbox:
        assert [o.result for o in sandbox.run_candidates(["meet()"] * 4)] == ["True"] * 4


def test_a_tool_that_hangs_counts_as_time():
    done = threading.Event()
    with Sandbox(tools={"hang": lambda: done.wait(30)}, timeout=0.5) as sandbox:
        started = time.monotonic()
        observation = sandbox.run("x = 1\nprint('before')\nhang()")
        assert 0.5 <= time.monotonic() - started < 1.0
        assert (observation.error_kind, observation.stdout) == ("timeout", "before\n")
        assert sandbox.run("6 * 7").result == "42"
    done.set()


# The host.


def test_many_sandboxes_in_many_threads():
    failures = []

    def work(number):
        with Sandbox(tools={"add": lambda a, b: a + b}) as sandbox:
            sandbox.run(f"x = {number}")
            for step in range(5):
                sandbox.run_candidates(["x += 100", "x = add(x, 1)"])
                sandbox.commit(1)
                if (result := sandbox.run("x").result) != str(number + step + 1):
                    failures.append((number, step, result))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == [] and not any(thread.is_alive() for thread in threads)


def test_steps_leave_nothing_behind():
    with Sandbox(timeout=0.3) as sandbox:
        sandbox.run("open('f', 'w').write('x')")
    eventually(lambda: len(children(os.getpid())) <= 2)
    before = len(children(os.getpid())), len(os.listdir("/proc/self/fd")), threading.active_count()
    with Sandbox(timeout=0.3) as sandbox:
        for i in range(100):
            sandbox.run_candidates([f"x = {i}\nopen('f', 'w').write('x')", "1 / 0"])
            sandbox.commit(0)
        sandbox.run("while True: pass")
        sandbox.run("import os\nos._exit(1)")
        sandbox.run_candidates(["1"] * 4)
        assert sandbox.run("import os\nx, os.listdir('.')").result == "(99, ['f'])"
    now = lambda: (len(children(os.getpid())), len(os.listdir("/proc/self/fd")), threading.active_count())  # noqa: E731
    assert eventually(lambda: now() == before), (before, now())


def test_everything_dies_with_the_host(tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport threading\nfrom sandbox import Sandbox\n"
        "one, two = Sandbox(), Sandbox(timeout=60)\n"
        "threading.Thread(target=two.run, args=('import time\\nwhile True: time.sleep(1)',)).start()\n"
        "import time; time.sleep(0.5); one.run_candidates(['1'] * 3); print('ready', flush=True); time.sleep(60)"
    )
    for number in (signal.SIGKILL, signal.SIGTERM):
        host = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert host.stdout.readline() == b"ready\n"
        descendants = children(host.pid)
        assert len(descendants) >= 7  # the warm interpreter, two states, three candidates and one at work
        host.send_signal(number)
        host.wait()
        assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in descendants))  # noqa: B023
        host.stdout.close()


def test_a_fork_of_the_host_harms_no_sandbox(sandbox):
    sandbox.run("x = 42")
    child = os.fork()
    if child == 0:
        sandbox.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert sandbox.run("x").result == "42"


def test_a_fork_of_the_host_makes_its_own():
    with Sandbox() as sandbox:
        sandbox.run("x = 42")
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            with Sandbox() as own:
                os.write(write, own.run("6 * 7").result.encode())
            os._exit(0)
        os.close(write)
        assert os.read(read, 10) == b"42"
        os.close(read)
        os.waitpid(child, 0)
        assert sandbox.run("x").result == "42"


def test_ctrl_c_stops_what_is_running():
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom sandbox import Sandbox\nwith Sandbox(timeout=60) as s:\n"
        "  s.run('1'); print('ready', flush=True)\n  try: s.run('while True: pass')\n"
        "  except KeyboardInterrupt: print(s.run('6 * 7').result, flush=True)"
    )
    host = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert host.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    host.send_signal(signal.SIGINT)
    assert host.communicate(timeout=10)[0] == b"42\n"


@pytest.mark.parametrize(
    "options",
    [{"timeout": 0}, {"timeout": float("inf")}, {"memory_mb": 0}, {"isolation": "maybe"}, {"tools": {"a b": print}},
     {"tools": {"final_answer": print}}, {"tools": {"x": 5}}, {"output_limit": 0}, {"scratch_mb": 0}],
)  # fmt: skip
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError):
        Sandbox(**options)


def test_wrong_use_is_refused(sandbox):
    with pytest.raises(TypeError):
        sandbox.run(5)
    with pytest.raises(ValueError):
        sandbox.run_candidates(["1"] * 101)
    with pytest.raises(RuntimeError):
        sandbox.commit(0)
    sandbox.close()
    sandbox.close()
    with pytest.raises(RuntimeError):
        sandbox.run("1")


def test_long_code(sandbox):
    assert sandbox.run("x = [" + "1," * 10**5 + "]\nlen(x)").result == "100000"


# The command line, and homes that offer less.

POORER_HOME = """
import contain, ctypes, os, struct, sys
program = [(0x20, 0, 0, 0)]
for number in {refused}:
    program += [(0x15, 0, 1, number), (0x06, 0, 0, 0x50001)]
program.append((0x06, 0, 0, 0x7FFF0000))
code = b"".join(struct.pack("=HBBI", *step) for step in program)
buffer = ctypes.create_string_buffer(code, len(code))
contain._prctl(38, 1)
contain._syscall("seccomp", 1, {flags}, struct.pack("=H6xQ", len(program), ctypes.addressof(buffer)))
"""
USE = """
import warnings
from common import InputError
from sandbox import Sandbox
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    one, two = Sandbox(timeout=1), Sandbox()
    print([str(warning.message).split("missing: ")[1].split()[0] for warning in caught])
try:
    Sandbox(isolation="require")
except InputError as error:
    print("refused")
one.run("x = 41")
print(one.run("import socket, os\\nos.listdir('/')").error_kind, one.run("socket.socket()").error_kind)
print(one.run("x = 0\\nwhile True: pass").error_kind, one.run("x + 1").result)
print(one.run_candidates(["open('f', 'w').write('1')", "os.path.exists('f')"])[1].result)
one.run("os.mkdir('d')\\nos.chdir('d')\\nopen('g', 'w').write('1')")
print(one.run("os.listdir('.'), os.listdir('..')").result)
"""
X86 = os.uname().machine == "x86_64"


@pytest.mark.skipif(not X86, reason="the numbers of the system calls below are x86-64's")
@pytest.mark.parametrize(
    ("refused", "flags", "missing"),
    [
        ([272, 165, 166, 155], 0, "namespaces"),  # unshare, mount...: a container with its usual filter
        ([], 8, "gate"),  # a container manager that has a gate of its own
    ],
)
def test_a_home_that_offers_less(refused, flags, missing):
    script = POORER_HOME.format(refused=refused, flags=flags) + USE
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    expected = f"['{missing}']\nrefused\nruntime runtime\ntimeout 42\nFalse\n(['g'], ['d'])\n"
    assert result.stdout == expected, result.stderr


def test_check_tries_everything():
    result = subprocess.run(
        [sys.executable, "sandbox.py", "check"], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    rows = result.stdout.splitlines()[1:]
    assert len(rows) == 20 and "FAILED" not in result.stdout, result.stdout + result.stderr
    assert (result.returncode == 0) == all(row.endswith("held") for row in rows)


def test_check_fails_without_containment(monkeypatch, capsys):

    class Uncontained(Sandbox):
        def __init__(self, **options):
            super().__init__(isolation="off", **options)

    monkeypatch.setattr(sandbox_check, "Sandbox", Uncontained)
    assert sandbox_check.check() == 1
    assert capsys.readouterr().out.count("FAILED") >= 8


def test_repl():
    typed = "x = 41\nfor i in range(2):\n  print(i)\n\nx + 1\n1 / 0\nfinal_answer([x])\n"
    result = subprocess.run(
        [sys.executable, "sandbox.py"], input=typed, capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    for expected in ("0\n1\n", "42\n", "ZeroDivisionError", "final answer: [41]"):
        assert expected in result.stdout
    result = subprocess.run(
        [sys.executable, "sandbox.py", "--timeout", "0"], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


# One sandbox for one episode after another.


def open_descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_a_reused_sandbox_is_as_good_as_new():
    """Neither variables, modules, files, random state nor what the code hid beside its folder outlive a reset."""
    sandboxes = Sandboxes(timeout=5)
    leave = """
import builtins, os, random, sys
x, builtins.y, sys.z = 1, 2, 3
drawn = random.random()
place = os.path.dirname(os.readlink('/proc/self/cwd'))
for path in ('own', place + '/beside'):
    with open(path, 'w') as file: file.write('left')
os.mkdir(place + '/folder'); os.mkdir(place + '/folder/inner')
drawn, place
"""
    look = """
import builtins, os, random, sys
found = [name for name in ('x', 'drawn') if name in globals()] + [n for n in 'yz' if hasattr(builtins, n) or hasattr(sys, n)]
place = os.path.dirname(os.readlink('/proc/self/cwd'))
found += [path for path in ('own', place + '/beside', place + '/folder') if os.path.lexists(path)]
found, random.random()
"""
    with sandboxes() as sandbox:
        first = sandbox.run(leave)
        sandbox.run("x += 1")
        assert first.error is None and sandbox.run("x").result == "2"
    for steps in (1, 3):
        with sandboxes() as again:
            assert again is sandbox
            drawn = first.result.split(",")[0].strip("(")
            assert again.run(look).result == f"([], {drawn})"
            for _ in range(steps):
                again.run("x = 5")
            assert again.run("x").result == "5"


def test_what_cannot_be_removed_is_not_found_by_the_next_episode():
    """A folder that can be entered but not listed survives its removal; the sandbox is not used again then."""
    sandboxes, place = Sandboxes(timeout=5), "os.path.dirname(os.readlink('/proc/self/cwd'))"
    with sandboxes() as sandbox:
        leave = (
            f"import os; place = {place}\nos.mkdir(place + '/shut', 0o300)\nopen(place + '/shut/known', 'w').write('x')"
        )
        assert sandbox.run(leave).error is None
    with sandboxes() as again:
        assert "FileNotFoundError" in again.run(f"import os; open({place} + '/shut/known').read()").error
        assert again.run("6 * 7").result == "42"


@pytest.mark.parametrize("end", ["while True: pass", "import os; os._exit(3)", "1 / 0"])
def test_a_reused_sandbox_survives_what_ended_an_episode(end):
    sandboxes = Sandboxes(timeout=0.4)
    for before in (0, 2):
        with sandboxes() as sandbox:
            for i in range(before):
                sandbox.run(f"x = {i}")
            assert sandbox.run(end).error_kind in ("timeout", "killed", "runtime")
            assert sandbox.run("x").result == ("1" if before else None)
        with sandboxes() as again:
            assert again is sandbox and again.run("'x' in globals()").result == "False"


def test_a_reused_sandbox_whose_origin_died_is_made_anew():
    sandboxes = Sandboxes(timeout=5)
    with sandboxes() as sandbox:
        sandbox.run("x = 1")
        sandbox.origin.kill(wait=1.0)
    with sandboxes() as again:
        assert again.run("x").error_kind == "runtime" and again.run("6 * 7").result == "42"


def test_no_candidate_of_a_reused_sandbox_can_list_the_others_folders():
    code = """
import os
place, seen = os.path.dirname(os.readlink('/proc/self/cwd')), []
for where in [place, '..', *range(64)]:
    try: names = os.listdir(where)
    except OSError: continue
    seen += names if not isinstance(where, int) or os.readlink(f'/proc/self/fd/{where}') == place else []
seen
"""
    with Sandboxes(timeout=5)() as sandbox:
        results = sandbox.run_candidates([code, code])
        assert [o.result for o in results] == ["[]", "[]"], results


def test_reuse_leaves_nothing_behind():
    sandboxes = Sandboxes(timeout=5)
    with sandboxes() as sandbox:
        sandbox.run("1")
        warm = sandbox.warm.process.pid
    ours = open_descriptors(os.getpid())
    processes = count_processes(warm)
    for i in range(60):
        with sandboxes() as again:
            again.run_candidates([f"x = {i}"] * 3)
            again.commit(1)
            again.run("open('file', 'w').write('x' * 100)")
    assert open_descriptors(os.getpid()) == ours
    deadline = time.monotonic() + 2
    # The last three candidates are zombies until their origin forks again.
    while count_processes(warm) > processes + 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert count_processes(warm) <= processes + 3
    sandbox.close()


def count_processes(session):
    return sum(sandbox_check._session(int(pid)) == session for pid in os.listdir("/proc") if pid.isdigit())


def test_after_an_exception_a_sandbox_is_not_used_again():
    sandboxes = Sandboxes(timeout=5)
    with pytest.raises(KeyError), sandboxes() as sandbox:
        raise KeyError
    assert sandbox.closed
    with sandboxes() as again:
        assert again is not sandbox and again.run("1").result == "1"


# Cheap forks (forks.py).


def test_new_objects_go_to_new_pages():
    code = """
import bisect, forks

def make():
    some = [slice(1), {}, set(), lambda: 0, *map(bytes, range(2, 480)), *map(float, range(99))]
    return some + [[1] * (n % 9) for n in range(99)] + [(n,) * (n % 20 + 1) for n in range(99)]

def old(objects):
    return sum(bisect.bisect(edges, id(item)) % 2 for item in objects)

kept = [item for _ in range(20) for item in make()]
del kept[::2]
edges = [edge for start, end, _ in forks._own_memory() for edge in (start, end)]
taken = forks.use_new_pages()
assert old(make()) < 10  # what forks.py itself has freed at last
del kept[::3]
assert old(make()) > 100
taken += forks.use_new_pages()
assert old(make()) < 10
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def huge_pages(pid):
    """kB of a process's memory on huge pages."""
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["AnonHugePages"].split()[0])


def test_what_steps_write_to_is_not_on_huge_pages(sandbox):
    """One page written to would take a fork 512 small pages to copy."""
    try:
        warm = max(map(huge_pages, children(sandbox.warm.process.pid)))
    except PermissionError:
        pytest.skip("only root may look into the sandbox's memory here")
    if warm < 8 << 10:
        pytest.skip("this kernel has no huge pages to give")
    for _ in range(20):
        sandbox.run("x = [1]\nprint(x)")
    assert huge_pages(sandbox.state.pid) > 0.5 * warm
