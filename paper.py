"""The paper's experiment, `make paper`: what it will cost on this machine, and the published formats made ours.

    python paper.py plan --student Qwen/Qwen2.5-0.5B-Instruct --passages wiki --to runs/paper \
        --out runs/paper/plan.json                                  # prints the costs, and asks
    python paper.py tasks runs/paper/download/Nardien/agent-distillation --out runs/paper/tasks
    python paper.py trajectories published.jsonl --out agent.train.jsonl
    python paper.py unpack wiki-18.jsonl.gz --out passages.jsonl

The stages themselves are the other scripts, with the paper's settings, in the Makefile under "The paper".
"""

import dataclasses
import os
import re
import shutil
import sys
import tarfile
import time
import zlib
from pathlib import Path

from common import (
    REQUIRED,
    InputError,
    option,
    parse_object,
    progress,
    read_jsonl,
    replace_file,
    run_command_line,
    write_json,
    write_jsonl,
)
from report import table
from sources import BENCHMARKS, DATA_FOLDER, FetchConfig, Table, download_source, gb, pinned_bytes
from tasks import Prompts

# ---------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class TasksConfig:
    folder: str = option(REQUIRED, "the authors' repository, as downloaded", positional=True)
    out: str = option(REQUIRED, "folder for test/TASK.jsonl and train/TASK.jsonl")


def make_tasks(config):
    """State the task, kind and domain of each of the authors' questions, which their files leave to the file's name."""
    for path, ((task, kind, domain), *_) in BENCHMARKS.items():
        source = Path(config.folder) / DATA_FOLDER / path
        try:
            examples = parse_object(source.read_bytes(), str(source))["examples"]
            about = {"task": task, "kind": kind, "domain": domain}
            rows = [{"id": str(e["id"]), **about, "question": e["question"], "answer": e["answer"]} for e in examples]
        except (OSError, KeyError, TypeError) as error:
            raise InputError(
                f'{source}: {{"examples": [{{"id", "question", "answer"}}]}} was expected: {error}'
            ) from None
        whole = [row for row in rows if row["answer"] not in (None, "")]  # four training questions have no answer
        split = path.split("/")[1]
        write_jsonl(Path(config.out) / split / f"{task}.jsonl", whole)
        without = f", {len(rows) - len(whole)} without an answer left out" if len(whole) < len(rows) else ""
        print(f"{split} {task}: {len(whole)} questions{without}")


@dataclasses.dataclass(kw_only=True)
class TrajectoriesConfig:
    rows: list[str] = option(REQUIRED, "JSONL files of the authors' rows, or folders of them", positional=True)
    out: str = option(REQUIRED, "training file to write")
    prompts: str = option(str(Prompts.default), "folder of prompts, which words the search results")


def convert_trajectories(config):
    """Make the authors' published rows conversations to train on, worded as students will be spoken to.

    Agent rows hold smolagents' log; those that the authors leave out, without a log or with a second system message,
    are left out here. CoT rows hold the messages and the response.
    """
    prompts, kept, dropped = Prompts(config.prompts), [], 0
    for path in row_files(config.rows):
        for number, row in read_jsonl(path):
            messages = read_published(row, f"{path}:{number}")
            if sum(message["role"] == "system" for message in messages) > 1 or len(messages) < 2:
                dropped += 1
                continue
            for message in messages:
                if message["role"] == "user":
                    message["content"] = word_results(message["content"], prompts)
            kept.append({"messages": messages})
    if not kept:
        raise InputError(f"{', '.join(config.rows)}: none of {dropped} rows holds a conversation")
    write_jsonl(config.out, kept)
    print(f"{config.out}: {len(kept)} conversations, {dropped} rows left out")


def row_files(paths):
    files = [f for path in map(Path, paths) for f in (sorted(path.rglob("*.jsonl")) if path.is_dir() else [path])]
    if not files:
        raise InputError(f"{', '.join(paths)}: no .jsonl file there")
    return files


def read_published(row, where):
    """The conversation in one published row, or [] if it holds none."""
    from chat import published_messages  # which imports torch

    try:
        if "response" in row:
            return [*row["messages"], {"role": "assistant", "content": row["response"]}]
        return published_messages(row["log_data"]["messages"]) if row["log_data"] else []
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{where}: log_data.messages, or messages and response, were expected") from None


# What the authors' search tool returns. Students are to be trained on what our tool will show them.
DOCUMENT = re.compile(r"===== Document (\d+), similarity: [-\d.]+ =====\n\"?(.*?)\"?\n")


def word_results(text, prompts):
    """Search results in the authors' wording -> ours (prompts/search_result.txt)."""
    text = re.sub(r"\n*Retrieved documents:\n+(?======)", "\n", text)
    return DOCUMENT.sub(lambda m: prompts.fill("search_result", rank=int(m[1]) + 1, title=m[2], text=""), text)


@dataclasses.dataclass(kw_only=True)
class UnpackConfig:
    archive: str = option(REQUIRED, "wiki-18.jsonl.gz, as published: a gzipped tar of one file", positional=True)
    out: str = option(REQUIRED, "passages to write")
    quiet: bool = option(False, "no progress bar")


def unpack(config):
    """Take the passages out of the published archive, which is a tar for all that its name says.

    Unzipped alone, its first line would begin with a tar header.
    """
    try:
        with tarfile.open(config.archive, "r|gz") as archive:
            member = archive.next()
            if member is None or not member.isfile():
                raise tarfile.ReadError("no file in it")
            with (
                replace_file(config.out, "wb") as file,
                progress(total=member.size, desc=Path(config.out).name, unit="B", quiet=config.quiet) as bar,
            ):
                bar.unit_scale = True
                source = archive.extractfile(member)
                while chunk := source.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
                if file.tell() != member.size:
                    raise tarfile.ReadError(f"it ends after {file.tell()} of {member.size} bytes")
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise InputError(f"{config.archive}: {error}; a gzipped tar of one file was expected") from None
    print(f"{config.out}: {gb(member.size)}")


# ---------------------------------------------------------------------------------------------
# Plan: what it will cost here
# ---------------------------------------------------------------------------------------------

# Conversations and replies, for the estimate alone. Lengths are assumptions until the data are there; in lockstep a
# batch is as slow as its longest reply, so that is what counts.
TRAINING = {"cot": (2000, 800), "agent": (2000, 2500), "prefix": (2000, 2500)}  # conversations, tokens in each
EPOCHS = 2
ROWS = {  # turns a question, tokens of a prompt that no earlier one had, tokens of a batch's longest reply, candidates
    "base.cot": (1, 150, 1024, 1),
    "base.agent": (4, 600, 1024, 1),
    "base.agent.sc8": (4, 600, 1024, 8),
    "cot.cot": (1, 150, 800, 1),
    "cot.cot-rag": (1, 700, 800, 1),
    "agent.greedy": (3, 600, 512, 1),
    "agent.sc8": (3, 600, 512, 8),
    "prefix.greedy": (3, 600, 512, 1),
    "prefix.sc8": (3, 600, 512, 8),
}
QUESTIONS = sum(int(re.search(r"_(\d+)_\d+\.json", path)[1]) for path in BENCHMARKS if "/test/" in path)
DOWNLOAD_RATE = 20e6  # bytes a second: assumed
# Wikipedia's passages: bytes of one, and how much smaller the archive is.
PASSAGE_BYTES, ARCHIVE_SHARE = 14_393_573_105 / 21_015_324, 5_123_307_260 / 14_393_573_105
# The sparse index, measured on two cores of a virtual server: 21,000,000 passages of 100 words, drawn from HotpotQA's
# sentences with two made-up words each (11.6 million terms), took 592 s and 876 bytes each, beside which the runs took
# 490 while it was built. Joining the passages took the most memory, 2.9 GiB.
INDEX_RATE, INDEX_BYTES, RUN_BYTES, JOIN_BYTES = 17_700, 876, 490, 125  # the rate: passages a second on one core


@dataclasses.dataclass(kw_only=True)
class PlanConfig(FetchConfig):
    student: str = option(REQUIRED, "Hugging Face name or folder of the student")
    passages: str = option("wiki", "wiki (sparse index built here), e5 (published vectors), a JSONL file, or a URL")
    out: str = option(REQUIRED, "file for the plan, written when it is agreed to")
    gpus: int = option(1, "GPUs that will share the work")
    teacher: bool = option(False, "trajectories are generated and not downloaded: their hours are the teacher's")
    yes: bool = option(False, "do not ask")


def plan(config):
    """Measure a step of training and of generation here, print what everything will take, and ask.

    The student's weights are not needed: random ones of the same shape cost the same. Exit status 2 if disk or
    memory cannot do, or if nobody agrees.
    """
    to, sources = Path(config.to), Table(config.sources)
    to.mkdir(parents=True, exist_ok=True)
    folder, download = Path(config.student), 0
    if not folder.is_dir():  # configuration and tokenizer, some megabytes
        folder = download_source(config.student, sources, config, lambda path: not path.endswith(".safetensors"))
        download = pinned_bytes(config.student, config)
    options = {kind: passages_cost(kind, sources) for kind in ("wiki", "e5")}
    if config.passages not in options:
        options[config.passages] = passages_cost(config.passages, sources)
    machine = this_machine(to)
    print(f"This machine: {machine['cores']} cores, {gb(machine['memory'])} of memory free, "
          f"{gb(machine['disk'])} free in {to}, {machine['gpu'] or 'no GPU'}\n")  # fmt: skip
    rows = [
        [("-> " if kind == config.passages else "") + kind, *map(gb, (cost.download, cost.disk, cost.memory)),
         f"{cost.hours(machine):.1f}"]
        for kind, cost in options.items()
    ]  # fmt: skip
    print(table(["passages", "download", "disk", "memory", "hours"], rows) + "\n")
    chosen = options[config.passages]
    refuse_what_cannot_be(config, machine, chosen, download, used=folder_bytes(to))
    measured = measure(folder, machine)
    hours = {
        "download the student": download / DOWNLOAD_RATE / 3600,
        "download and index passages": chosen.hours(machine),
    }
    hours |= stage_hours(measured, config.gpus)
    print(describe(measured, hours, config, download))
    confirm(config)
    about = {"student": config.student, "passages": config.passages, "machine": machine}
    write_json(config.out, about | {"measured": measured, "hours": hours})


@dataclasses.dataclass
class PassagesCost:
    """What passages cost. download, disk and memory in bytes. gpu: the memory may be the GPU's."""

    download: float
    disk: float
    memory: float
    core_seconds: float
    gpu: bool = False

    def hours(self, machine):
        return (self.download / DOWNLOAD_RATE + self.core_seconds / machine["cores"]) / 3600


def passages_cost(kind, sources):
    """The cost of one kind of passages: wiki, e5, a file, or a server's URL, which costs nothing here."""
    if kind.startswith(("http://", "https://")):
        return PassagesCost(0, 0, 0, 0.0)
    if kind in ("wiki", "e5"):
        archive, vectors = (sum(pin[0] for pin in sources[name].files.values()) for name in ("wiki-18", "e5-index"))
        unpacked = archive / ARCHIVE_SHARE
        cost = index_cost(unpacked)
        cost.download, cost.disk = archive, cost.disk + archive + unpacked
        if kind == "e5":
            encoder = sources["intfloat/e5-base-v2"].files["model.safetensors"][0]
            cost.download += vectors + encoder
            cost.disk = cost.download + unpacked
            cost.memory, cost.gpu = max(cost.memory, vectors), True
        return cost
    path = Path(kind)
    if not path.is_file():
        raise InputError(f"PASSAGES={kind}: wiki, e5, a file of passages or a server's URL was expected")
    unpacked = path.stat().st_size / (ARCHIVE_SHARE if path.suffix == ".gz" else 1)
    cost = index_cost(unpacked)
    cost.disk += unpacked * (path.suffix == ".gz")
    return cost


def index_cost(unpacked):
    """What a sparse index takes. unpacked: bytes of passages that are about as long as Wikipedia's."""
    count = unpacked / PASSAGE_BYTES
    return PassagesCost(0, (INDEX_BYTES + RUN_BYTES) * count, 5e8 + JOIN_BYTES * count, count / INDEX_RATE)


def this_machine(folder):
    import torch

    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory": available_memory(),
        "disk": shutil.disk_usage(folder).free,
        "gpu": f"{torch.cuda.device_count()} x {gpu.name}, {gb(gpu.total_memory)} each" if gpu else None,
        "gpu_memory": gpu.total_memory if gpu else 0,
    }


def available_memory():
    """Bytes of main memory that a new process can have, files in the cache counted as free."""
    line = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)
    return 1024 * int(line[1])


def folder_bytes(folder):
    """What an earlier run has brought or built here already."""
    names = ("download", "hub", "index")
    files = [folder / "passages.jsonl", *(path for name in names for path in (folder / name).rglob("*"))]
    return sum(path.stat().st_size for path in files if path.is_file())


def refuse_what_cannot_be(config, machine, chosen, download, used):
    """InputError where disk or memory is too small for certain. used: bytes that an earlier run left here."""
    need = chosen.disk + download - used
    if need > machine["disk"]:
        raise InputError(f"PASSAGES={config.passages}: {gb(need)} of disk are needed in {config.to}, "
                         f"{gb(machine['disk'])} are free; name another PAPER= folder, or other passages")  # fmt: skip
    room = max(machine["memory"], 0.8 * machine["gpu_memory"] if chosen.gpu else 0)  # as dense.py decides
    if chosen.memory > room:
        raise InputError(f"PASSAGES={config.passages}: {gb(chosen.memory)} of memory are needed, here are {gb(room)}; "
                         "PASSAGES=wiki needs less, and a server's URL nothing")  # fmt: skip


def measure(folder, machine):
    """Seconds of a training step and of a generation step at the student's shape, on this device.

    On a CPU, which is no place for the real thing, the batch is small, so that the plan takes no hours itself.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import devices
    import lora

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    config, tokenizer = lora.from_pretrained(AutoConfig, str(folder)), lora.load_tokenizer(str(folder))
    dtype = torch.bfloat16 if cuda else torch.float32
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config, dtype=dtype).parameters())
    need, room = 2 * weights * dtype.itemsize, machine["gpu_memory"] or machine["memory"]
    if need > room:
        raise InputError(
            f"{folder}: a student of {weights / 1e9:.1f}B parameters needs {gb(need)}, here are {gb(room)}"
        )
    try:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
        measured = {"parameters": weights, "prefill_tokens_per_second": 0.0, "batch": {}, "step_seconds": {}}
        for samples in (1, 8):
            measure_generation(model, tokenizer, samples, cuda, measured)
        measured["training_tokens_per_second"] = measure_training(model, device)
    except torch.OutOfMemoryError:
        raise InputError(f"a training step of this student does not fit in {machine['gpu']}") from None
    return measured | {"peak_memory": devices.peak_memory(device)}


def measure_generation(model, tokenizer, samples, cuda, measured):
    """Times student.Student on prompts of one length: with one new token, then with some more."""
    from agent_distill import Turn
    from student import Student

    sampling = {"temperature": 0.4, "top_p": 0.8} if samples > 1 else {}
    student = Student(model, tokenizer, n=samples, batch=None if cuda else 2, max_tokens=1, **sampling)
    text = "a " * (1500 if cuda else 64)
    turns = [Turn([{"role": "user", "content": f"{i} {text}"}]) for i in range(student.batch)]
    keys = list(range(len(turns)))
    student.answer(turns[:1], [0])  # warm-up
    seconds = {}
    for tokens in (1, 17 if cuda else 5):
        student.prefixes.clear()  # each prompt is computed whole
        student.max_tokens, start = tokens, time.perf_counter()
        answers = student.answer(turns, keys)
        seconds[tokens] = time.perf_counter() - start
    (_, first), (tokens, last) = seconds.items()
    measured["batch"][samples] = student.batch
    measured["step_seconds"][samples] = max(last - first, 1e-6) / (tokens - 1)
    if samples == 1:
        measured["prefill_tokens_per_second"] = sum(answer.prompt_tokens for answer in answers) / first


def measure_training(model, device):
    """Tokens a second of train.py's step with the paper's adapter; the first step is warm-up."""
    import torch

    import devices
    import lora
    import train
    from chat import Example

    config = train.Config(data=[], model="", out="", micro_tokens=train.MICRO_TOKENS[device.type])
    process, bf16 = devices.Process(device=device), devices.uses_bf16(config, device)
    model.cpu()
    lora.add(model, config.rank, config.alpha, config.dropout)
    student = train.Student(model).train().to(device)
    optimizer = train.make_optimizer(student, config)
    length, count = (2048, 8) if device.type == "cuda" else (256, 1)
    ids = torch.randint(0, model.config.vocab_size, (length,))
    trained = torch.arange(3 * length // 4, length)  # about a quarter of a trajectory is the assistant's
    batch, steps = [Example(ids, trained)] * count, 3
    for step in range(steps):
        if step == 1:
            start = time.perf_counter()
        train.accumulate_what_fits(student, student, batch, config, process, bf16, seed=step)
        optimizer.step()
        optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (steps - 1) * length * count / (time.perf_counter() - start)


def stage_hours(measured, gpus):
    """Hours of each training and each row of the table, from the measured steps and the counts above."""
    hours = {}
    for name, (conversations, tokens) in TRAINING.items():
        hours[f"train {name}"] = EPOCHS * conversations * tokens / measured["training_tokens_per_second"]
    for name, (turns, prompt, new, samples) in ROWS.items():
        reading = prompt / measured["prefill_tokens_per_second"]
        writing = new * measured["step_seconds"][samples] / measured["batch"][samples]
        hours[f"evaluate {name}"] = QUESTIONS * turns * (reading + writing)
    return {name: seconds / 3600 / gpus for name, seconds in hours.items()}


def describe(measured, hours, config, download):
    """The estimate for people, with what it rests on."""
    step = ", ".join(f"{1000 * s:.0f} ms at {measured['batch'][n]} x {n}" for n, s in measured["step_seconds"].items())
    lines = [
        table(["stage", "hours"], [[name, f"{value:.1f}"] for name, value in hours.items()]),
        f"\nTogether {sum(hours.values()):.1f} hours, of which every part continues where it was cut off.\n",
        f"Measured here, {measured['parameters'] / 1e6:,.1f} million random parameters in the student's shape: "
        f"training {measured['training_tokens_per_second']:,.0f} tokens/s, reading "
        f"{measured['prefill_tokens_per_second']:,.0f} tokens/s, a new token {step}; peak "
        f"{gb(measured['peak_memory'])}.",
        f"Assumed: {gb(DOWNLOAD_RATE)}/s of download ({gb(download)} for the student), lengths as in paper.py; "
        "searches and code are not counted.",
    ]
    if config.teacher:
        lines.append("The teacher's hours are its server's, and come on top.")
    return "\n".join(lines)


def confirm(config):
    if config.yes:
        return
    if not sys.stdin.isatty():
        raise InputError("nobody is here to agree: YES=1 (or --yes) goes on without asking")
    if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise InputError("not agreed; nothing was started")


if __name__ == "__main__":
    run_command_line(
        __doc__,
        {
            "plan": (PlanConfig, plan),
            "tasks": (TasksConfig, make_tasks),
            "trajectories": (TrajectoriesConfig, convert_trajectories),
            "unpack": (UnpackConfig, unpack),
        },
    )
