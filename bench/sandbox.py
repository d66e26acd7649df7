"""The sandbox's speed, its scaling, and what it leaves behind.

    python bench/sandbox.py own      # new sandboxes, steps, candidates, many at once, a long episode
    python bench/sandbox.py soak     # sandboxes opened and closed by threads beside a busy machine

The floors: 4 ms per step, 25 ms for 8 candidates, 15 ms for a new sandbox, code as fast as outside, 64 sandboxes in
1 GiB, a time-out that returns within 0.2 s. Printed are the median and the fastest tenth.
"""

import contextlib
import dataclasses
import gc
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import option, run_command_line
from sandbox import Sandbox

# Each candidate must have its own copy of the state.
STATE = """import numpy, sympy
x = 1
table = {str(i): [i, i + 1] for i in range(10000)}
roots = sympy.expand((sympy.symbols("t") + 1) ** 20)
"""
THREAD = "threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\nx += 1"
PRIMES = "count = sum(all(n % d for d in range(2, int(n**0.5) + 1)) for n in range(2, 200_000))"


@dataclasses.dataclass
class OwnConfig:
    steps: int = option(2_000, "steps of the long episode", above=1)


@dataclasses.dataclass
class SoakConfig:
    steps: int = option(10_000, "steps in all", above=0)
    load: int = option(50, "other busy processes", at_least=0)


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
        return int(Path(f"/proc/{pid}/smaps_rollup").read_text().split("\nPss:")[1].split()[0]) / 1e3
    return 0.0


def own(config):
    """How fast this sandbox is, how it scales, and what it leaves behind."""
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
        sandbox.run(STATE)
        steps = [timed(sandbox.run, "x += 1") for _ in range(config.steps)]
        rounds = [timed(sandbox.run_candidates, ["x += 1"] * 8) for _ in range(60)]
    for name, half in ("first", steps[: config.steps // 2]), ("second", steps[config.steps // 2 :]):
        print(f"a step, {name:6} half          {summary(half)}")
    print(f"8 candidates                 {summary(rounds)}")
    time.sleep(0.5)
    more = ", ".join(f"{b - a:+.0f}" for a, b in zip(before, left(), strict=True))
    print(f"after {config.steps:,} steps            {more} processes, descriptors, threads, MB")

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(64) as pool:
        sandboxes = [stack.enter_context(Sandbox()) for _ in range(64)]
        seconds = timed(list, pool.map(lambda sandbox: sandbox.run("import numpy, sympy\nx = 1"), sandboxes))
        memory = sum(map(proportional, descendants(os.getpid())))
        print(f"64 sandboxes at once         {memory:.0f} MB in all, a step of each {seconds * 1e3:.0f} ms")


def soak(config):
    """Open 64 sandboxes in 16 threads, run steps and close them, again and again; every state is checked."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(config.load)]
    faults = []  # the values of x in four sandboxes that are not what they should be, or an exception
    done = [0] * 16

    def work(seed):
        rng = random.Random(seed)
        while sum(done) < config.steps and not faults:
            with contextlib.ExitStack() as stack:
                opened = [stack.enter_context(Sandbox({"add": lambda a, b: a + b}, timeout=60)) for _ in range(4)]
                counts = [1] * 4
                for sandbox in opened:
                    sandbox.run("import threading, time\nx = 1")
                for i in rng.choices(range(4), k=20):
                    codes = rng.choice((["x += 1"], ["x = add(x, 1)"], ["x += 1", "x += 5", "1 / 0"], [THREAD]))
                    opened[i].run_candidates(codes)
                    opened[i].commit(0)
                    counts[i] += 1
                    done[seed] += 1
                results = [int(sandbox.run("x").result) for sandbox in opened]
                faults.extend([results] if results != counts else [])

    try:
        Sandbox().close()
        time.sleep(1)
        before = left()
        with ThreadPoolExecutor(16) as pool:
            working = [pool.submit(work, seed) for seed in range(16)]
        faults.extend(repr(future.exception()) for future in working if future.exception())
        time.sleep(3)
        print(f"faults: {len(faults)} {faults[:3]}\nprocesses, descriptors, threads, MB: {before} -> {left()}")
    finally:
        for process in busy:
            process.kill()


if __name__ == "__main__":
    run_command_line(__doc__, {"own": (OwnConfig, own), "soak": (SoakConfig, soak)}, default="own")
