"""Questions an hour: evaluate.py beside the way of the authors' code, with one model, in one run.

    python bench/evaluate.py                                              # CPU: 6 layers of 256, random weights
    python bench/evaluate.py --shape 0.5b --questions 64 --batch 32       # a GPU: Qwen2.5-0.5B's shape, random weights
    python bench/evaluate.py --miniature runs/miniature/seed0 --questions 64 --max-tokens 150 --max-steps 5

The authors' way (a fork of smolagents): one question at a time; the N samples of a step by num_return_sequences; the
candidates' code run one after another in an interpreter inside this process, where all share one state, and the
winner's run once more. It is written anew here, around the same episode loop, prompts, search and limits, with
smolagents' LocalPythonExecutor (or `exec`, which is faster, where that is not installed). The random numbers differ,
and so do the texts. A student of random weights says nothing that parses: each of its steps takes all its tokens, and
no code runs. The two take turns; the ratio is that of the medians.
"""

import contextlib
import dataclasses
import functools
import io
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import retriever  # noqa: E402
import scratch  # noqa: E402
import world  # noqa: E402
from agent_distill import STOP, agent_episode  # noqa: E402
from bench.train import SHAPES, VOCABULARY  # noqa: E402
from chat import render  # noqa: E402
from client import cut_at_stop  # noqa: E402
from common import option, run_command_line, write_jsonl  # noqa: E402
from evaluate import run_lockstep  # noqa: E402
from lora import load_model  # noqa: E402
from sandbox import Observation, Sandboxes  # noqa: E402
from student import StopAtStrings, Student  # noqa: E402
from tasks import Prompts, load_tasks, open_search  # noqa: E402


@dataclasses.dataclass(kw_only=True)
class Config:
    shape: Literal["small", "0.5b", "1.5b", "3b"] = option("small", "of the student of random weights")
    miniature: str | None = option(None, "folder of a seed of `make reproduce`: its questions, index and student")
    size: str = option("M", "of the miniature's student")
    questions: int = option(8, "questions a round")
    one_by_one: int = option(2, "how many of them the authors' way is timed on: its rate does not depend on it")
    rounds: int = option(2, "how often the two take turns")
    sc: int = option(8, "samples a step")
    max_tokens: int = option(48, "new tokens a step")
    max_steps: int = option(2, "steps a question")
    batch: int = option(32, "questions at once in lockstep")
    threads: int = option(1, "CPU threads")


def make_student(config, prompts, folder):
    """A student of random weights, with questions and an index of a small world."""
    built = world.build(
        0, train_questions=200, test_questions=3 * config.questions, sizes=dict.fromkeys(world.SIZES, 100)
    )
    write_jsonl(folder / "passages.jsonl", built.passages)
    write_jsonl(folder / "test" / "hotpotqa.jsonl", built.test["hotpotqa"])
    retriever.build(str(folder / "passages.jsonl"), str(folder / "index"), quiet=True)
    texts = [prompts.agent_system, *(passage["contents"] for passage in built.passages)]
    tokenizer = scratch.make_tokenizer(texts)
    torch.manual_seed(0)
    shape = SHAPES[config.shape] | {
        "tie_word_embeddings": True,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32768,
    }
    # Large embeddings make it as sure of its words as a trained model: from 152,000 likely ones, sampling is slower.
    shape |= {"initializer_range": 0.2, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = Qwen2ForCausalLM(Qwen2Config(**shape))
    cuda = torch.cuda.is_available()
    model = model.to("cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)
    return model, tokenizer, [folder / "test" / "hotpotqa.jsonl"], folder / "index", prompts.agent_system


def load_student(config, prompts):
    """The miniature's student, its eight test sets and its index."""
    folder = Path(config.miniature)
    model, tokenizer = load_model(str(folder / config.size / "agent"), "cpu", torch.float32)
    return (
        model,
        tokenizer,
        sorted((folder / "world/test").glob("*.jsonl")),
        folder / "index",
        prompts.agent_student_system,
    )


class InProcess:
    """Where the authors' way runs code: one interpreter in this process, which the candidates share."""

    def __init__(self, tools):
        self.tools = tools | {"final_answer": self.final_answer}
        try:
            from smolagents.local_python_executor import LocalPythonExecutor
        except ImportError:
            self.executor, self.names = None, dict(self.tools)
        else:
            self.executor = LocalPythonExecutor(additional_authorized_imports=["math", "numpy", "sympy"])
            self.executor.send_tools(self.tools)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def final_answer(self, answer):
        self.final = [answer]
        return answer

    def run(self, code):
        self.final = None
        try:
            if self.executor:
                output = self.executor(code)
                printed, result = output.logs, output.output
            else:
                with contextlib.redirect_stdout(io.StringIO()) as stdout:
                    exec(code, self.names)
                printed, result = stdout.getvalue(), None
        except BaseException as error:
            return Observation(error=str(error), error_kind="runtime")
        if self.final is not None:
            return Observation(printed, is_final=True, final_answer=self.final[0])
        return Observation(printed, None if result is None else str(result))

    def run_candidates(self, codes):
        self.codes = codes
        return [self.run(code) for code in codes]

    def commit(self, index):
        self.run(self.codes[index])


def one_by_one(config, model, tokenizer, episodes):
    """The authors' way: each episode to its end, n samples by num_return_sequences. Returns the tokens written."""
    written = 0
    for _, episode in episodes:
        with contextlib.suppress(StopIteration):
            turn = next(episode)
            while True:
                prompt = render(tokenizer, turn.messages, reply=True) + turn.opening
                ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
                length = ids["input_ids"].shape[1]
                out = model.generate(
                    **ids, do_sample=True, temperature=0.4, top_p=0.8, top_k=0, num_return_sequences=config.sc,
                    max_new_tokens=config.max_tokens, pad_token_id=tokenizer.pad_token_id,
                    stopping_criteria=[StopAtStrings(tokenizer, STOP, length)],
                )[:, length:]  # fmt: skip
                written += int((out != tokenizer.pad_token_id).sum())
                texts = tokenizer.batch_decode(out, skip_special_tokens=True)
                turn = episode.send([cut_at_stop(text, STOP) for text in texts])
    return written


def lockstep(config, model, tokenizer, episodes):
    """evaluate.py's way. Returns the tokens written."""
    options = {"n": config.sc, "temperature": 0.4, "top_p": 0.8, "max_tokens": config.max_tokens}
    student = Student(model, tokenizer, batch=config.batch, **options)
    return sum(usage["completion_tokens"] for _, _, usage in run_lockstep(episodes, student, STOP))


def timed(way, config, setting, tasks, prompts):
    """(questions an hour, tokens a second) of one way on these tasks."""
    model, tokenizer, _, index, system = setting
    model.set_attn_implementation("sdpa")
    tools = {"web_search": open_search(index, prompts, k=1)}
    opener = Sandboxes(tools=tools) if way is lockstep else functools.partial(InProcess, tools)
    start = functools.partial(
        agent_episode, prompts=prompts, open_sandbox=opener, system=system, max_steps=config.max_steps
    )
    started = time.perf_counter()
    tokens = way(config, model, tokenizer, [((task["task"], task["id"]), start(task["question"])) for task in tasks])
    seconds = time.perf_counter() - started
    return 3600 * len(tasks) / seconds, tokens / seconds


def bench(config):
    """Run the two in turns and print questions an hour and tokens a second."""
    torch.set_num_threads(config.threads)
    prompts, rates = Prompts(), {one_by_one: [], lockstep: []}
    with tempfile.TemporaryDirectory() as folder:
        setting = load_student(config, prompts) if config.miniature else make_student(config, prompts, Path(folder))
        model, tokenizer, tests, *_ = setting
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        tasks = load_tasks(tests)
        random.Random(0).shuffle(tasks)
        for _ in range(config.rounds):
            few, many = tasks[: config.one_by_one], tasks[: config.questions]
            rates[one_by_one].append(timed(one_by_one, config, setting, few, prompts))
            rates[lockstep].append(timed(lockstep, config, setting, many, prompts))
            tasks = tasks[config.questions :] + many
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{config.miniature or config.shape}, {parameters:.2f}M parameters, {config.sc} samples a step, {model.device}"
    )
    medians = {way: [statistics.median(values) for values in zip(*rates[way], strict=True)] for way in rates}
    for way, label in ((one_by_one, "the authors' way"), (lockstep, "evaluate.py")):
        slowest, fastest = (f(rate for rate, _ in rates[way]) for f in (min, max))
        questions, tokens = medians[way]
        print(
            f"{label:>16} {questions:9,.0f} questions/hour ({slowest:,.0f} to {fastest:,.0f}) {tokens:9,.0f} tokens/s"
        )
    questions, tokens = (ours / theirs for ours, theirs in zip(medians[lockstep], medians[one_by_one], strict=True))
    print(f"evaluate.py: {questions:.1f} times the questions, {tokens:.1f} times the tokens")


if __name__ == "__main__":
    run_command_line(__doc__, {"bench": (Config, bench)}, default="bench")
