"""The code sandbox beside its peers: round trips, candidates, time-outs, attacks; and its own scaling.

    python bench/sandbox.py peers        # needs smolagents, jupyter_client and ipykernel, and bwrap, where there
    python bench/sandbox.py own          # new sandboxes, long episodes, 64 at once, what 10,000 steps leave behind

What is not installed is left out with a line. Each peer is used as an agent would use it: code in, what it printed
out. A fresh subprocess and bubblewrap have no state, so what came before is run again (replay). Rounds of the peers
take turns, so that a busy machine slows all alike; medians are printed, with the fastest tenth beside them. The
attacks are those of tests/test_sandbox.py; smolagents refuses their imports, which does not make it a boundary: its
documentation says that it is none, and attacks that need no import are known.
"""

import contextlib
import dataclasses
import io
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common import option, run_command_line  # noqa: E402
from sandbox import Sandbox  # noqa: E402

SETUP = "import numpy, sympy\nx = 1\n"
# For the candidates: a state with something in it, all of which each of them must have for itself.
STATE = (
    SETUP
    + """table = {str(i): [i, i + 1] for i in range(10000)}
a, t = numpy.ones(100000), sympy.symbols("t")
roots = sympy.expand((t + 1) ** 20)
"""
)
PRIMES = """
found = []
for n in range(2, 200000):
    d = 2
    while d * d <= n:
        if n % d == 0:
            break
        d += 1
    else:
        found.append(n)
found = len(found)
"""


class Ours:
    name = "this sandbox"

    def __init__(self, timeout=60):
        self.sandbox = Sandbox(timeout=timeout)

    def run(self, code):
        observation = self.sandbox.run(code)
        return observation.stdout + str(observation.final_answer or "")

    def candidates(self, codes):
        self.sandbox.run_candidates(codes)
        self.sandbox.commit(0)

    def close(self):
        self.sandbox.close()


class Replay:
    """A fresh process a step; the history is run again before it."""

    name, command = "fresh subprocess", []

    def __init__(self, timeout=60):
        self.timeout, self.history = timeout, ""

    def run(self, code, keep=True):
        program = self.history + f"def final_answer(x): print(x); raise SystemExit\n{code}"
        with contextlib.suppress(subprocess.TimeoutExpired):
            command = [*self.command, sys.executable, "-c", program]
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.timeout)
            self.history += code * keep * (code in (SETUP, STATE))
            return done.stdout
        return ""

    def candidates(self, codes):
        for code in codes:
            self.run(code, keep=False)

    def close(self):
        pass


class Bubblewrap(Replay):
    name = "bubblewrap + subprocess"

    def __init__(self, timeout=60):
        super().__init__(timeout)
        if not shutil.which("bwrap"):
            raise ImportError("bwrap is not installed")
        folders = {"/usr", "/lib", "/lib64", "/bin", sys.prefix, sys.base_prefix}
        binds = [part for folder in sorted(folders) if os.path.exists(folder) for part in ("--ro-bind", folder, folder)]
        self.command = ["bwrap", "--unshare-all", "--die-with-parent", "--clearenv", "--proc", "/proc", "--dev", "/dev",
                        "--tmpfs", "/tmp", *binds]  # fmt: skip


class Jupyter(Replay):
    name = "jupyter kernel"

    def __init__(self, timeout=60):
        from jupyter_client.manager import start_new_kernel

        self.timeout = timeout
        self.manager, self.client = start_new_kernel(stderr=subprocess.DEVNULL)
        self.run("def final_answer(x): print(x); raise SystemExit")

    def run(self, code):
        printed = []

        def hear(message):
            printed.append(message["content"].get("text", ""))

        try:
            self.client.execute_interactive(code, timeout=self.timeout, output_hook=hear)
        except (TimeoutError, RuntimeError):  # it hangs, or is dead
            with contextlib.suppress(Exception):
                self.manager.interrupt_kernel()
                self.client.get_shell_msg(timeout=10)
        return "".join(printed)

    def candidates(self, codes):
        for code in codes:
            kernel = Jupyter()
            kernel.run(STATE)
            kernel.run(code)
            kernel.close()

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


class Smolagents:
    name = "smolagents LocalPythonExecutor"

    def __init__(self, timeout=60):
        from smolagents.local_python_executor import LocalPythonExecutor

        self.executor = LocalPythonExecutor(["numpy", "sympy", "time"], timeout_seconds=timeout)
        self.executor.send_tools({"final_answer": lambda x: x})

    def run(self, code):
        try:
            result = self.executor(code)
        except Exception as error:
            return f"error: {str(error)[:200]}"
        return result.logs + str(result.output)

    def candidates(self, codes):
        import copy

        state = self.executor.state
        for code in codes:
            # Modules cannot be copied; everything else is.
            modules = {id(value): value for value in state.values() if type(value).__name__ == "module"}
            self.executor.state = copy.deepcopy(state, modules)
            self.run(code)
        self.executor.state = state

    def close(self):
        pass


@dataclasses.dataclass
class PeersConfig:
    rounds: int = option(5, "rounds of everything; the peers take turns")
    steps: int = option(50, "steps a round")


@dataclasses.dataclass
class OwnConfig:
    steps: int = option(10_000, "steps of the long episode")
    sandboxes: int = option(64, "sandboxes at once")


def timed(function, *arguments):
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def summary(seconds):
    """Median and fastest tenth, in milliseconds."""
    ordered = sorted(seconds)
    return f"{statistics.median(ordered) * 1e3:9.2f} ms   ({ordered[len(ordered) // 10] * 1e3:.2f})"


def peers(config):
    """Ours and each peer that is installed, side by side."""
    print(f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} cores")
    available = []
    for peer in (Ours, Smolagents, Replay, Jupyter, Bubblewrap):
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                peer().close()
            available.append(peer)
        except ImportError as error:
            print(f"left out: {peer.name} ({error})")
    rows = {peer: {} for peer in available}
    for round_number in range(config.rounds):
        for peer in available:
            row = rows[peer]
            started = time.perf_counter()
            one = peer()
            one.run(SETUP)
            row.setdefault("ready with numpy and sympy", []).append(time.perf_counter() - started)
            steps = config.steps if peer in (Ours, Smolagents, Jupyter) else 5
            plain = peer() if peer in (Replay, Bubblewrap) else one
            row.setdefault("step", []).extend(timed(plain.run, "y = 1\ny += 1\nprint(y)") for _ in range(steps))
            one.run(STATE)
            repeats = 3 if peer in (Ours, Smolagents) else 1
            row.setdefault("8 candidates", []).extend(timed(one.candidates, ["x += 1"] * 8) for _ in range(repeats))
            if round_number == 0:
                row["primes below 200,000"] = [timed(one.run, PRIMES)]
                row["endless loop, 2 s limit"] = [_limit(peer, "while True: pass")]
                row["sleep, 2 s limit"] = [_limit(peer, "import time\ntime.sleep(6)")]
                row["attacks through"] = _attacks(peer)
            one.close()
    for what in rows[Ours]:
        print(f"\n{what}")
        for peer in available:
            value = rows[peer][what]
            print(f"  {peer.name:32}{summary(value) if isinstance(value, list) else value}")


def _limit(peer, code):
    one = peer(timeout=2)
    seconds = timed(one.run, code)
    one.close()
    return seconds


def _attacks(peer):
    """Of the attacks that need no special rights, those that got through."""
    import test_sandbox

    attacks = [name for name, attack in test_sandbox.ATTACKS.items() if isinstance(attack, str)]
    victims, through = test_sandbox.victims(), 0
    world = next(victims)
    for name in attacks:
        one = peer(timeout=5)
        constants = "".join(f"{key} = {value!r}\n" for key, value in world.items())
        through += "through" in one.run(test_sandbox.PREPARE + constants + test_sandbox.ATTACKS[name]).split()
        one.close()
        Path(world["SECRET"]).write_text("the answer is 42\n")
    with contextlib.suppress(AssertionError):
        next(victims, None)
    return f"{through} of {len(attacks)}"


def own(config):
    """What the peers are not asked: how it scales, and what it leaves behind."""
    import test_sandbox

    print(f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} cores")
    Sandbox().close()
    news = []
    for _ in range(50):
        started = time.perf_counter()
        sandbox = Sandbox()
        news.append(time.perf_counter() - started)
        sandbox.close()
    print(f"new sandbox                  {summary(news)}")

    plain = min(timed(exec, compile(PRIMES, "", "exec"), {}) for _ in range(3))
    with Sandbox(timeout=60) as sandbox:
        inside = min(timed(sandbox.run, PRIMES) for _ in range(3))
    print(f"primes below 200,000         {inside / plain:.2f} times CPython's {plain:.2f} s")

    before = len(test_sandbox.children(os.getpid())), len(os.listdir("/proc/self/fd")), _resident()
    with Sandbox() as sandbox:
        sandbox.run(SETUP)
        steps = [timed(sandbox.run, "x += 1") for _ in range(config.steps)]
        used = _proportional(sandbox.state.pid)
    for start in (10, config.steps // 10, config.steps - 500):
        print(f"steps from {start:<18}{summary(steps[start : start + 500])}")
    time.sleep(0.5)
    after = len(test_sandbox.children(os.getpid())), len(os.listdir("/proc/self/fd")), _resident()
    print(f"after {config.steps:,} steps  processes {after[0] - before[0]:+d}, descriptors {after[1] - before[1]:+d}, "
          f"host memory {after[2] - before[2]:+.1f} MB; the last state's share: {used:.0f} MB")  # fmt: skip

    for name, state in (("numpy and sympy", SETUP), ("these, lists, arrays", STATE)):
        with Sandbox() as sandbox:
            sandbox.run(state)
            rounds = []
            for _ in range(60):
                rounds.append(timed(sandbox.run_candidates, ["x += 1"] * 8))
                sandbox.commit(0)
        print(f"8 candidates from a state of {name + ':':<22}{summary(rounds)}")

    sandboxes = [Sandbox() for _ in range(config.sandboxes)]
    threads = [threading.Thread(target=sandbox.run, args=(SETUP,)) for sandbox in sandboxes]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    memory = sum(_proportional(pid) for pid in test_sandbox.children(os.getpid()))
    print(f"{config.sandboxes} sandboxes at once         {memory:.0f} MB in all, a step of each {seconds * 1e3:.0f} ms")
    for sandbox in sandboxes:
        sandbox.close()


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _proportional(pid):
    """MB of memory, shared pages divided among those who share them."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("Pss:"))
    return 0.0


if __name__ == "__main__":
    os.chdir(tempfile.mkdtemp(prefix="bench-"))  # attacks on the peers leave files
    run_command_line(__doc__, {"peers": (PeersConfig, peers), "own": (OwnConfig, own)})
