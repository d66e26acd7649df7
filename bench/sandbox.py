"""The sandbox beside its peers, and its own scaling.

    python bench/sandbox.py own      # new sandboxes, steps, candidates, many at once, what a long episode leaves behind
    python bench/sandbox.py peers    # beside smolagents, a fresh subprocess per step and a jupyter kernel

`peers` needs smolagents, jupyter_client and ipykernel; a peer that is not installed is left out with a line. Each peer
is used as an agent would use it: code in, printed text out. A fresh subprocess has no state, so the code that set up
the state runs again before each step. The peers take turns in every round, so that a busy machine slows all alike.
Printed are medians, the fastest tenth, and the ratio to this sandbox. The attacks are those of tests/test_sandbox.py.
smolagents' executor refuses most of their imports, but its documentation says that it is not a security boundary.
"""

import contextlib
import dataclasses
import io
import os
import platform
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
# A larger state for the candidates; each of them must have its own copy of it.
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
    """A fresh process per step, which first runs the history again."""

    name = "fresh subprocess"

    def __init__(self, timeout=60):
        self.timeout, self.history = timeout, ""

    def run(self, code, keep=True):
        program = self.history + f"def final_answer(x): print(x); raise SystemExit\n{code}"
        with contextlib.suppress(subprocess.TimeoutExpired):
            command = [sys.executable, "-c", program]
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.timeout)
            self.history += code * keep * (code in (SETUP, STATE))
            return done.stdout
        return ""

    def candidates(self, codes):
        for code in codes:
            self.run(code, keep=False)

    def close(self):
        pass


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
        except (TimeoutError, RuntimeError):  # it hangs, or it has ended
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
    rounds: int = option(5, "rounds; the peers take turns in each")
    steps: int = option(50, "steps per round")


@dataclasses.dataclass
class OwnConfig:
    steps: int = option(2_000, "steps of the long episode")
    sandboxes: int = option(64, "sandboxes at once")


def timed(function, *arguments):
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def summary(seconds):
    """Returns the median and the fastest tenth as text, in milliseconds."""
    ordered = sorted(seconds)
    return f"{statistics.median(ordered) * 1e3:9.2f} ms   ({ordered[len(ordered) // 10] * 1e3:.2f})"


def peers(config):
    """This sandbox and each installed peer, side by side."""
    print(f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} cores")
    available = []
    for peer in (Ours, Smolagents, Replay, Jupyter):
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
            plain = peer() if peer is Replay else one
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
    for what, ours in rows[Ours].items():
        print(f"\n{what}")
        for peer in available:
            value = rows[peer][what]
            ratio = "" if isinstance(value, str) else f"   {statistics.median(value) / statistics.median(ours):8.1f}x"
            print(f"  {peer.name:32}{value if ratio == '' else summary(value)}{ratio}")


def _limit(peer, code):
    one = peer(timeout=2)
    seconds = timed(one.run, code)
    one.close()
    return seconds


def _attacks(peer):
    """Counts the attacks that get through, of those that need no special rights."""
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
    """How this sandbox scales, and what it leaves behind."""
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

    time.sleep(0.5)  # until the processes of the sandboxes above have ended
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
          f"host memory {after[2] - before[2]:+.1f} MB; the last state: {used:.0f} MB")  # fmt: skip

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
    """Returns the MB of memory of a process (Pss): a page that n processes share counts as 1/n."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("Pss:"))
    return 0.0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        os.chdir(folder)  # attacks that get through a peer leave files here
        run_command_line(__doc__, {"peers": (PeersConfig, peers), "own": (OwnConfig, own)})
