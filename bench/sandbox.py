"""The sandbox's speed, its scaling, and what it leaves behind.

    python bench/sandbox.py own      # new sandboxes, steps, candidates, many at once, a long episode
    python bench/sandbox.py soak     # sandboxes opened and closed by threads beside a busy machine

The floors: 4 ms per step, 25 ms for 8 candidates, 15 ms for a new sandbox, code as fast as outside, 64 sandboxes in
1 GiB, a time-out that returns within 0.2 s. Printed are the median and the fastest tenth. For a comparison with another
version, run both in turns: on a busy machine only ratios say something.
"""

import contextlib
import dataclasses
import gc
import os
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import option, run_command_line
from sandbox import Sandbox

SETUP = "import numpy, sympy\nx = 1\n"
# A larger state; each candidate must have its own copy.
STATE = """import numpy, sympy
x = 1
table = {str(i): [i, i + 1] for i in range(10000)}
a, t = numpy.ones(100000), sympy.symbols("t")
roots = sympy.expand((t + 1) ** 20)
"""
PRIMES = "count = sum(all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(2, 200_000))"


@dataclasses.dataclass
class OwnConfig:
    steps: int = option(2_000, "steps of the long episode", above=0)
    sandboxes: int = option(64, "sandboxes at once", above=0)


@dataclasses.dataclass
class SoakConfig:
    steps: int = option(10_000, "steps in all", above=0)
    load: int = option(50, "other busy processes", at_least=0)
    sandboxes: int = option(64, "sandboxes open at once", above=0)
    threads: int = option(16, "threads that use them", above=0)


def timed(function, *arguments):
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def summary(seconds):
    """Returns the median and the fastest tenth as text, in milliseconds."""
    ordered = sorted(seconds)
    return f"{statistics.median(ordered) * 1e3:9.2f} ms   ({ordered[len(ordered) // 10] * 1e3:.2f})"


def descendants(pid):
    """Returns the PIDs of all processes below a process, zombies included."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
            parents.setdefault(int(parent), []).append(int(entry.name))
    found = [pid]
    for process in found:
        found += parents.get(process, [])
    return found[1:]


def left():
    """Returns the number of processes, descriptors and threads of this process, and its memory in MB."""
    gc.collect()
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return len(descendants(os.getpid())), len(os.listdir("/proc/self/fd")), threading.active_count(), memory


def proportional(pid):
    """Returns the MB of memory of a process (Pss): a page that n processes share counts as 1/n."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("Pss:"))
    return 0.0


def own(config):
    """How fast this sandbox is, how it scales, and what it leaves behind."""
    print(f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} cores")
    Sandbox().close()
    print(f"new sandbox, closed again    {summary([timed(lambda: Sandbox().close()) for _ in range(50)])}")

    with Sandbox(timeout=60) as sandbox:
        pairs = [(timed(exec, compile(PRIMES, "", "exec"), {}), timed(sandbox.run, PRIMES)) for _ in range(5)]
    print(f"primes below 200,000         {statistics.median(b / a for a, b in pairs):.2f} times CPython's")
    with Sandbox(timeout=1) as sandbox:
        print(f"time-out of 1 s              {summary([timed(sandbox.run, 'while True: pass') for _ in range(5)])}")

    time.sleep(0.5)  # until the processes of the sandboxes above have ended
    before = left()
    with Sandbox() as sandbox:
        sandbox.run(SETUP)
        steps = [timed(sandbox.run, "x += 1") for _ in range(config.steps)]
        used = proportional(sandbox.state.pid)
    half = (config.steps + 1) // 2
    print(f"steps, first half            {summary(steps[:half])}")
    print(f"steps, second half           {summary(steps[-half:])}")
    time.sleep(0.5)
    more = ", ".join(f"{b - a:+.0f}" for a, b in zip(before, left(), strict=True))
    print(f"after {config.steps:,} steps            {more} processes, descriptors, threads, MB; state: {used:.0f} MB")

    with Sandbox() as sandbox:
        sandbox.run(STATE)
        rounds = []
        for _ in range(60):
            rounds.append(timed(sandbox.run_candidates, ["x += 1"] * 8))
            sandbox.commit(0)
    print(f"8 candidates                 {summary(rounds)}")

    sandboxes = [Sandbox() for _ in range(config.sandboxes)]
    threads = [threading.Thread(target=sandbox.run, args=(SETUP,)) for sandbox in sandboxes]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    memory = sum(map(proportional, descendants(os.getpid())))
    print(f"{config.sandboxes} sandboxes at once         {memory:.0f} MB in all, a step of each {seconds * 1e3:.0f} ms")
    for sandbox in sandboxes:
        sandbox.close()


def soak(config):
    """Open sandboxes, run steps and close them in many threads; every state and every answer is checked."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(config.load)]
    faults, done, lock = [], [0], threading.Lock()

    def work(seed):
        rng = random.Random(seed)
        while done[0] < config.steps and not faults:
            try:
                with contextlib.ExitStack() as stack:
                    share = range(max(1, config.sandboxes // config.threads))
                    tools = {"add": lambda a, b: a + b}
                    opened = [stack.enter_context(Sandbox(tools, timeout=60)) for _ in share]
                    counts = [0] * len(opened)
                    for sandbox in opened:
                        sandbox.run("x = 0")
                    for _ in range(rng.randint(5, 25)):
                        i = rng.randrange(len(opened))
                        one(opened[i], rng)
                        counts[i] += 1
                        with lock:
                            done[0] += 1
                    results = [sandbox.run("x").result for sandbox in opened]
                    faults.extend([f"{results} is not {counts}"] if results != list(map(str, counts)) else [])
            except Exception as error:
                faults.append(repr(error))

    def one(sandbox, rng):
        kind = rng.choice(("step", "step", "tool", "candidates", "thread"))
        code = "x = add(x, 1)" if kind == "tool" else "x += 1"
        if kind == "thread":
            code = "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()\nx += 1"
        for observation in sandbox.run_candidates(["1 / 0", code, "x += 5"] if kind == "candidates" else [code]):
            if observation.error_kind not in (None, "runtime"):
                faults.append(repr(observation))
        sandbox.commit(1 if kind == "candidates" else 0)

    try:
        Sandbox().close()
        time.sleep(1)
        before = left()
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(config.threads)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(10)
            print(f"{time.perf_counter() - started:6.0f} s, {done[0]:6,} steps, {left()[3]:.0f} MB", flush=True)
        time.sleep(3)
        print(f"faults: {len(faults)} {faults[:3]}\nprocesses, descriptors, threads, MB: {before} -> {left()}")
    finally:
        for process in busy:
            process.kill()


if __name__ == "__main__":
    run_command_line(__doc__, {"own": (OwnConfig, own), "soak": (SoakConfig, soak)}, default="own")
