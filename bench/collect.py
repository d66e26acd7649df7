"""How fast and how robust `agent_distill.py collect` is, beside a server that costs nothing.

    python bench/collect.py rate        # 64 episodes at once against answers that take 50 ms
    python bench/collect.py kills       # SIGKILL at 50 random moments of one collection

`rate`: the server is a process of its own and answers each request from a script after a fixed delay, so that 64
episodes could make 64 / 0.05 s = 1,280 turns a second at best. Each agent episode searches 1,800 passages, computes,
and answers: three turns, three actions in a sandbox. Two more runs show what bounds the rate. Without a server: the
same episodes, driven from memory; the sandboxes cost processor time. Without sandboxes: `collect` with actions that
run in its own process; what is left is the client, the search and the server. Rates are taken at the server, from the
middle of the run. CPU is that of `collect` alone, its start included; memory that of its sandboxes, too, shared pages
divided.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import agent_distill  # noqa: E402
import miniature  # noqa: E402
import retriever  # noqa: E402
from agent_distill import agent_episode, cot_episode, drive  # noqa: E402
from client import in_parallel  # noqa: E402
from common import option, read_jsonl, run_command_line, write_jsonl  # noqa: E402
from sandbox import Observation, Sandboxes  # noqa: E402
from tasks import Prompts, open_search  # noqa: E402

TURNS = {"agent": 3, "cot": 1}


def script(messages):
    """What the scripted model says: search, compute, answer; or one line of thought where no code is asked for."""
    if "<end_code>" not in messages[0]["content"]:
        return "It is as it is.\n\nThe answer is \\boxed{42}."
    turn = sum(message["role"] == "assistant" for message in messages)
    question = messages[1]["content"].removeprefix("New task:").strip()
    code = [
        f"passages = web_search({json.dumps(question)})\nprint(passages)",
        "words = passages.split()\nprint(len(words), sum(map(len, words)))",
        "final_answer(words[0])",
    ][turn]
    return f"Thought: I need {question}\nCode:\n```py\n{code}\n```<end_code>"


class Scripted(asyncio.Protocol):
    """OpenAI's chat completions in as little processor time as Python needs. GET /times tells when it answered."""

    times = []  # noqa: RUF012

    def __init__(self, delay):
        self.delay, self.buffer = delay, b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if not found or len(body) < int(length[1] if length else 0):
            return
        self.buffer = b""
        if head.startswith(b"GET"):
            return self.answer({"times": self.times} if b"/times" in head else {"data": [{"id": "script"}]})
        asyncio.get_running_loop().call_later(self.delay, self.complete, body)

    def complete(self, body):
        self.times.append(time.monotonic())
        choice = {"index": 0, "message": {"role": "assistant", "content": script(json.loads(body)["messages"])}}
        self.answer({"model": "script", "choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    def answer(self, value):
        content = json.dumps(value).encode()
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content))


@dataclasses.dataclass
class ServeConfig:
    delay: float = option(0.05, "seconds until a request is answered")


def serve(config):
    """The scripted server, on a free port, which it prints."""

    async def run():
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Scripted(config.delay), "127.0.0.1", 0, backlog=1024)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(run())


class Uncontained:
    """Stands in for Sandboxes: runs the script's code right here, at no cost and with no protection."""

    def __init__(self, tools, **_):
        self.tools, self.state = tools, dict(tools)

    @contextlib.contextmanager
    def __call__(self):
        yield Uncontained(self.tools)

    def run_candidates(self, codes):
        return [self.run(code) for code in codes]

    def run(self, code):
        printed, final = [], []
        self.state |= {"print": lambda *values: printed.append(" ".join(map(str, values)) + "\n")}
        self.state |= {"final_answer": final.append}
        exec(code, self.state)
        return Observation("".join(printed), is_final=bool(final), final_answer=final[0] if final else None)

    def commit(self, index):
        pass


def uncontained(config):
    """`collect` without sandboxes."""
    agent_distill.Sandboxes = Uncontained
    agent_distill.collect(config)


@dataclasses.dataclass
class RateConfig:
    concurrency: int = option(64, "episodes at once")
    delay: float = option(0.05, "seconds until a request is answered")
    episodes: int = option(1500, "agent episodes a round; four times as many chains of thought")
    rounds: int = option(3, "rounds; the best is shown, because others may use this machine")


def rate(config):
    """Turns a second and memory, for chains of thought and for agent episodes."""
    print(f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} cores")
    ideal = config.concurrency / config.delay
    print(f"{config.concurrency} at once, answers after {config.delay * 1e3:.0f} ms: at most {ideal:,.0f} turns/s\n")
    print("| | turns/s | of the ideal | without a server | without sandboxes | own CPU ms a turn | peak MB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        questions = make_world(Path(folder))
        for method, turns in TURNS.items():
            tasks = [
                {"id": i, "kind": "fact", "question": next(questions), "answer": "x"}
                for i in range(config.episodes if method == "agent" else 4 * config.episodes)
            ]
            write_jsonl(f"{folder}/{method}.jsonl", tasks)
            alone, free, rounds = [], [], []
            for number in range(config.rounds):  # by turns, so that whoever else is at work slows all
                alone.append(without_server(config, method, folder, tasks))
                free.append(collect(config, method, folder, f"free{number}", [__file__, "uncontained"])[0])
                rounds.append(collect(config, method, folder, number))
            reached, milliseconds, memory = max(rounds)
            print(f"| {method}, {turns} turns | {reached:,.0f} | {reached / ideal:.0%} | {max(alone):,.0f} "
                  f"| {max(free):,.0f} | {milliseconds:.2f} | {memory:.0f} |", flush=True)  # fmt: skip


def make_world(folder):
    """Passages and an index; returns an endless stream of questions about them."""
    with contextlib.redirect_stdout(sys.stderr):
        miniature.make_world(miniature.WorldConfig(out=f"{folder}/world", train_questions=500))
    retriever.build(f"{folder}/world/passages.jsonl", f"{folder}/index", quiet=True)
    rows = [row for _, row in read_jsonl(f"{folder}/world/train.jsonl")]
    return itertools.cycle(row["question"] for row in rows if row["kind"] == "fact")


def without_server(config, method, folder, tasks):
    """Turns a second of the same episodes when the script answers in this process, at once."""
    prompts = Prompts()
    sandboxes = Sandboxes(tools={"web_search": open_search(f"{folder}/index", prompts)})

    def run(task):
        if method == "cot":
            episode = cot_episode(task["question"], prompts, system=prompts.cot_system)
        else:
            episode = agent_episode(task["question"], prompts, sandboxes, system=prompts.agent_system)
        return drive(episode, lambda turn: [script(turn.messages)])

    list(in_parallel(run, tasks[: config.concurrency], config.concurrency))  # warm
    started = time.perf_counter()
    for _ in in_parallel(run, tasks, config.concurrency):
        pass
    return len(tasks) * TURNS[method] / (time.perf_counter() - started)


def collect(config, method, folder, number, program=(str(ROOT / "agent_distill.py"), "collect")):
    """(turns/s, its own CPU milliseconds a turn, peak MB with its sandboxes) of one `collect` run."""
    command = [sys.executable, __file__, "serve", "--delay", str(config.delay)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        command = [
            sys.executable, *program, f"{folder}/{method}.jsonl", "--method", method,
            "--url", f"{url}/v1", "--search", f"{folder}/index", "--concurrency", str(config.concurrency),
            "--out", f"{folder}/{method}.{number}.out.jsonl",
        ]  # fmt: skip
        before = os.times()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            memory = [0.0]
            while process.poll() is None:
                time.sleep(1.0)
                memory.append(proportional(process.pid))
        used = os.times()
        times = json.load(urllib.request.urlopen(f"{url}/times"))["times"]
        server.terminate()
    assert process.returncode == 0, process.returncode
    first, last = len(times) // 5, len(times) * 4 // 5
    seconds = sum(used[2:4]) - sum(before[2:4])
    return (last - first) / (times[last] - times[first]), 1e3 * seconds / len(times), max(memory)


def proportional(pid):
    """MB of memory of a process and all its descendants, shared pages divided among those who share them."""
    total, waiting = 0, [pid]
    while waiting:
        pid = waiting.pop()
        with contextlib.suppress(OSError):
            total += int(re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1])
            for thread in os.listdir(f"/proc/{pid}/task"):
                waiting += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return total / 1e3


@dataclasses.dataclass
class KillsConfig:
    kills: int = option(50, "how many")
    questions: int = option(200, "questions of the collection; with too few it ends before the last kill")
    seed: int = option(0, "the moments")


def kills(config):
    """Kill one collection at random moments, and compare what it ends with. A difference is an AssertionError."""
    import test_collect

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        teacher = test_collect.make_world(Path(folder), config.questions)
        counts = test_collect.killed_again_and_again(Path(folder), teacher, config.kills, config.questions, config.seed)
    print(f"{counts['kills']} kills, {counts['early kills']} of them before a start had asked anything: the same "
          f"{counts['rows']} trajectories as undisturbed; {counts['requests']:,} requests instead of "
          f"{counts['quiet requests']:,}, {counts['asked again']} about questions that were finished")  # fmt: skip


if __name__ == "__main__":
    commands = {"rate": (RateConfig, rate), "kills": (KillsConfig, kills)}
    commands |= {"serve": (ServeConfig, serve), "uncontained": (agent_distill.CollectConfig, uncontained)}
    run_command_line(__doc__, commands, default="rate")
