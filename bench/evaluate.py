"""Questions per hour: evaluate.py beside the way of the authors' code, with one model, in one run.

    python bench/evaluate.py                                            # 6 layers of 256, random weights
    python bench/evaluate.py --model runs/miniature/SmolLM2-135M-Instruct    # a real model, as in `make reproduce`
    python bench/evaluate.py count                                      # kernels and waits for the device per token

The authors' way (a fork of smolagents): one question at a time; the N samples of a step by num_return_sequences; the
code of the candidates runs one after the other in an interpreter in this process, where all share one state, and the
winner's code once more. It is written anew here, around the same episode, prompts, search and limits, with smolagents'
LocalPythonExecutor (or `exec`, which is faster, where that is not installed). The random numbers differ, and so do the
texts. A model of random weights writes no code: each of its steps takes all its tokens. The two take turns, and the
ratio is that of the medians.
"""

import contextlib
import dataclasses
import functools
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import tokenizers
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import retriever
from agent_distill import STOP, EpisodeConfig, Prompts, Running, Turn, agent_episode, open_tools
from common import load_tasks, option, run_command_line
from common.client import cut_at_stop
from common.models import load_model, render, uses_bf16
from evaluate import Student, run_lockstep
from miniature import world
from sandbox import Observation, Sandbox

SHAPES = {  # hidden size, layers, heads, key-value heads, intermediate size
    "small": (256, 6, 4, 2, 1024),
    "0.5b": (896, 24, 14, 2, 4864),
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclasses.dataclass(kw_only=True)
class Config:
    model: str | None = option(None, "folder of a model (default: random weights)")
    shape: Literal["small", "0.5b"] = option("small", "of the model of random weights")
    precision: Literal["auto", "bf16", "fp32"] = option("fp32", "of the weights")
    questions: int = option(16, "questions per round")
    one_by_one: int = option(2, "how many of them the authors' way is timed on: its rate does not depend on it")
    rounds: int = option(2, "how often the two take turns")
    sc: int = option(8, "samples per step")
    max_tokens: int = option(48, "new tokens per step")
    max_steps: int = option(2, "steps per question")
    threads: int = option(2, "CPU threads")


def make_model(config, folder):
    """Returns (model, tokenizer): the one of --model, or one of random weights with a tokenizer for the world."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if uses_bf16(config.precision, device) else torch.float32
    if config.model:
        return load_model(config.model, device, dtype)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=8192, special_tokens=special, show_progress=False)
    bpe.train([str(folder / "world" / "passages.jsonl")], trainer)
    options = {"eos_token": special[2], "pad_token": special[0], "chat_template": TEMPLATE}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **options)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    shape = dict(zip(names, SHAPES[config.shape], strict=True)) | {"tie_word_embeddings": True, "vocab_size": 151936}
    # Large embeddings make it as sure of its words as a trained model is.
    shape |= {"max_position_embeddings": 32768, "initializer_range": 0.2, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape)).to(device, dtype).eval()
    return model, tokenizer


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
    model.set_attn_implementation("sdpa")
    written = 0
    for _, episode in episodes:
        running = Running(episode)
        while running.turn:
            prompt = render(tokenizer, running.turn.messages, reply=True)
            ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
            length = ids["input_ids"].shape[1]
            out = model.generate(
                **ids, do_sample=True, temperature=0.4, top_p=0.8, top_k=0, num_return_sequences=config.sc,
                max_new_tokens=config.max_tokens, stop_strings=STOP, tokenizer=tokenizer,
                pad_token_id=tokenizer.pad_token_id,
            )[:, length:]  # fmt: skip
            texts = [cut_at_stop(text, STOP) for text in tokenizer.batch_decode(out, skip_special_tokens=True)]
            written += int((out != tokenizer.pad_token_id).sum())
            running.advance(texts)
    return written


def lockstep(config, model, tokenizer, episodes):
    """The way of evaluate.py. Returns the tokens written."""
    student = Student(model, tokenizer, n=config.sc, temperature=0.4, max_tokens=config.max_tokens)
    return sum(usage["completion_tokens"] for _, _, usage in run_lockstep(episodes, student, STOP))


def bench(config):
    """Run the two in turns, and print questions per hour and tokens per second."""
    torch.set_num_threads(config.threads)
    prompts, rates = Prompts(), {one_by_one: [], lockstep: []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            world.write(world.Config(out=str(folder / "world"), test_questions=config.questions))
            retriever.build(str(folder / "world" / "passages.jsonl"), str(folder / "index"), kind="bm25", quiet=True)
        model, tokenizer = make_model(config, folder)
        tasks = load_tasks([str(folder / "world" / "test" / "hotpotqa.jsonl")])
        tools = open_tools(EpisodeConfig(search=str(folder / "index")), prompts)
        system = prompts.system("agent_student_system", tools)
        for _ in range(config.rounds):
            for way, count in ((one_by_one, config.one_by_one), (lockstep, config.questions)):
                place = functools.partial(InProcess if way is one_by_one else Sandbox, tools)
                options = {"system": system, "max_steps": config.max_steps}
                episodes = [(t["id"], agent_episode(t["question"], prompts, place, **options)) for t in tasks[:count]]
                started = time.perf_counter()
                tokens = way(config, model, tokenizer, episodes)
                seconds = time.perf_counter() - started
                rates[way].append((3600 * count / seconds, tokens / seconds))
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{config.model or config.shape}: {size:.1f} M parameters, {model.dtype}, {model.device}, {config.sc} samples"
    )
    medians = {way: [statistics.median(values) for values in zip(*rates[way], strict=True)] for way in rates}
    for way, label in ((one_by_one, "the authors' way"), (lockstep, "evaluate.py")):
        print(f"{label:>16} {medians[way][0]:9,.0f} questions per hour {medians[way][1]:9,.0f} tokens per second")
    questions, tokens = (ours / theirs for ours, theirs in zip(medians[lockstep], medians[one_by_one], strict=True))
    print(f"evaluate.py: {questions:.1f} times the questions, {tokens:.1f} times the tokens")


class Counter(TorchDispatchMode):
    """Counts operations that launch a kernel on a GPU, and those for whose result the host waits."""

    WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")
    kernels = waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        wait = function.name().split(".")[0] in self.WAITS
        self.waits += wait
        self.kernels += not (function.is_view or wait or "empty" in function.name())
        return function(*args, **(kwargs or {}))


def count(config):
    """Print kernels and waits per generated token, greedy and with the samples of --sc."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        world.write(world.Config(out=f"{folder}/world", train_questions=2, test_questions=2))
        model, tokenizer = make_model(config, Path(folder))
    turns = [Turn([{"role": "user", "content": f"Question {i}"}]) for i in range(4)]
    for n in (1, config.sc):
        counters = []
        for tokens in (16, 48):  # the difference leaves out what happens once
            with Counter() as counter:
                Student(model, tokenizer, n=n, temperature=0.4 * (n > 1), max_tokens=tokens).answer(turns)
            counters.append(counter)
        kernels, waits = ((getattr(counters[1], x) - getattr(counters[0], x)) / 32 for x in ("kernels", "waits"))
        layers = model.config.num_hidden_layers
        print(f"{n} samples: {kernels:.0f} kernels per token ({kernels / layers:.0f} per layer), {waits:.2f} waits")


if __name__ == "__main__":
    run_command_line(__doc__, {"bench": (Config, bench), "count": (Config, count)}, default="bench")
