"""`make rehearse`: small stand-ins for everything that `make paper` downloads, in the places of the downloads.

    python -m paper.rehearse runs/rehearsal      # writes runs/rehearsal/world and runs/rehearsal/paper

The stand-ins have the published formats: the authors' benchmark files, their trajectories as smolagents logs them,
wiki-18's tar, a FAISS flat index in two parts, Qwen2 models (also as the encoder) and an adapter. The contents are the
miniature's world; the models and vectors are random, so the results mean nothing.
"""

import dataclasses
import itertools
import re
import struct
import tarfile
from pathlib import Path

import numpy as np

from agent_distill import CollectConfig, Prompts, drive, first_step, open_episode, open_tools
from common import REQUIRED, option, read_jsonl, replace_file, run_command_line, write_json, write_jsonl
from miniature import teacher, world
from paper import data


@dataclasses.dataclass(kw_only=True)
class Config:
    out: str = option(REQUIRED, "folder for the world and the stand-ins", positional=True)


def write(config):
    """Write the world and the stand-ins."""
    made, to = Path(config.out) / "world", Path(config.out) / "paper"
    world.write(world.Config(out=str(made), train_questions=60, test_questions=2))
    write_benchmarks(made, to / "download/benchmarks")
    write_trajectories(made, to / "download", Path(config.out) / "index")
    write_archive(made, to / "download/wiki-18")
    write_vectors(made, to / "download/e5-index")
    student = "Qwen/Qwen2.5-1.5B-Instruct"
    models = ["intfloat/e5-base-v2", "Qwen/Qwen2.5-0.5B-Instruct", student]
    for name in models:
        write_model(made, snapshot(name, to))
    write_adapter(snapshot(student, to), to / "download/authors-student", student)
    data_sets = [f"{kind}-trajectories" for kind in ("cot", "agent", "prefix")] + ["benchmarks", "wiki-18", "e5-index"]
    for name in [*data_sets, "authors-student", *models]:  # the marks that the Makefile leaves after a download
        mark = to / "download" / f"{name}.done"
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def snapshot(name, to):
    """The folder of a model in the cache of transformers, marked as the commit to take for this name."""
    folder = to / "hub" / f"models--{name.replace('/', '--')}"
    with replace_file(folder / "refs/main") as file:
        file.write("rehearsal")
    return folder / "snapshots/rehearsal"


def write_benchmarks(made, folder):
    """The authors' benchmark files, which state no kind; ids and answers have the types that theirs have."""
    train = [row for _, row in read_jsonl(made / "train.jsonl")]
    maths = [row for row in train if row["kind"] == "math"]
    facts = [row for row in train if row["kind"] == "fact"]
    training = {"hotpotqa": facts, "math": maths[::2], "math_medium": maths[1::2]}
    for path in data.BENCHMARK_FILES:
        (split, task), examples = data.task_of(path), []
        rows = training[task] if split == "train" else [row for _, row in read_jsonl(made / f"test/{task}.jsonl")]
        for number, row in enumerate(rows):
            answer = float(row["answer"]) if task == "gsm_hard" else row["answer"]
            identity = row["id"] if row["kind"] == "fact" else number
            examples.append({"id": identity, "question": row["question"], "answer": answer, "split": split})
        if split == "train" and path.startswith("math"):
            examples[-1]["answer"] = None  # as in four of theirs
        about = {"dataset_info": {"name": task, "fold": split, "total_examples": len(examples)}}
        write_json(folder / path, {"metadata": about, "examples": examples})


# ------------- Trajectories


def write_trajectories(made, downloads, index):
    """The scripted teacher's trajectories in the authors' formats: smolagents' log, and CoT with its response."""
    import retriever

    retriever.build(made / "passages.jsonl", index, "bm25", quiet=True)
    rows = {"cot": [], "agent": [{"question": "a row without a log", "log_data": None}], "prefix": []}
    for task, chats in chats_of(made, index):
        about = {"model_id": teacher.MODEL, "question": task["question"], "true_answer": task["answer"]}
        rows["cot"].append(about | {"messages": chats["cot"][:-1], "response": chats["cot"][-1]["content"]})
        for kind in ("agent", "prefix"):
            rows[kind].append(about | {"log_data": {"messages": smolagents_log(chats[kind])}})
    for kind, published in rows.items():
        write_jsonl(downloads / f"{kind}-trajectories" / "train.jsonl", published)


def chats_of(made, index):
    """Yields (task, {"cot" | "agent" | "prefix": messages}) for every sixth training question."""
    prompts, script = Prompts(), teacher.Teacher(teacher.Config(world=str(made)))
    config = CollectConfig(tasks=[], out="", url="", search=str(index))
    tools = open_tools(config, prompts)
    for _, task in itertools.islice(read_jsonl(made / "train.jsonl"), 0, None, 6):

        def chat(method, system, first_thought="", question=task["question"]):
            how = dataclasses.replace(config, method=method)
            episode = open_episode(how, question, prompts, tools, system=system, first_thought=first_thought)
            return drive(episode, lambda turn: [script.reply(turn.messages, turn.opening)]).messages

        cot, system = chat("cot", prompts.cot_system), prompts.system("agent_system", tools)
        agent, prefix = chat("agent", system), chat("agent", system, first_step(cot[-1]["content"]))
        yield task, {"cot": cot, "agent": agent, "prefix": prefix}


def smolagents_log(chat):
    """A conversation as smolagents logs it: text parts; each action is followed by its tool call and the result."""
    log, document = [], '===== Document {}, similarity: 0.83 =====\n"{}"'.format
    for message in chat:
        role, text = message["role"], message["content"]
        if role == "user" and log[-1]["role"] == "tool-call":
            found = re.sub(r"^\[(\d+)\] (.*)$", lambda hit: document(int(hit[1]) - 1, hit[2]), text, flags=re.MULTILINE)
            found = found.replace("===== Document 0", "\nRetrieved documents:\n\n===== Document 0", 1)
            role, text = "tool-response", f"Call id: call_{len(log)}\n{found}"
        log.append({"role": role, "content": [{"type": "text", "text": text}]})
        if role == "assistant":
            call = {"id": f"call_{len(log)}", "type": "function", "function": {"name": "python_interpreter"}}
            log.append({"role": "tool-call", "content": [{"type": "text", "text": f"Calling tools:\n[{call}]"}]})
    return log


# ------------- Passages, vectors and models

DIMENSIONS = 64  # of the models' hidden states, and so of the encoder's vectors


def write_archive(made, folder):
    """wiki-18.jsonl.gz: a gzipped tar of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "wiki-18.jsonl.gz", "w:gz") as archive:
        archive.add(made / "passages.jsonl", "data/indexes/wiki_dump.jsonl")


def write_vectors(made, folder):
    """A FAISS flat inner-product index (see retriever.open_flat_index), cut in two inside a vector."""
    count = sum(1 for _ in read_jsonl(made / "passages.jsonl"))
    header = struct.pack("<4siqqqBiQ", b"IxFI", DIMENSIONS, count, 1 << 20, 1 << 20, 1, 0, count * DIMENSIONS)
    content = header + np.random.default_rng(0).standard_normal((count, DIMENSIONS), "<f4").tobytes()
    half = len(content) // 2 + 5
    for name, part in {"part_aa": content[:half], "part_ab": content[half:]}.items():
        with replace_file(folder / name, "wb") as file:
            file.write(part)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_model(made, folder):
    """A small Qwen2 model, and a Qwen2 tokenizer trained on the passages and prompts."""
    import torch
    import transformers

    texts = [path.read_text() for path in [made / "passages.jsonl", *Prompts.default.glob("*.txt")]]
    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(texts, 2000)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": DIMENSIONS, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, **sizes, **ends
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)


def write_adapter(student, folder, base):
    """An adapter for the student, in PEFT's format. base: the name by which it refers to the student."""
    from common import models  # imports torch and transformers, which takes seconds

    model, _ = models.load_model(str(student))
    models.add_lora(model, rank=64, alpha=128, dropout=0.05)
    models.save_lora(model, folder, base)


if __name__ == "__main__":
    run_command_line(__doc__, {"write": (Config, write)}, default="write")
