"""`make rehearse`: small stand-ins for what `make paper` downloads, in the places of the downloads.

    python -m paper.rehearse runs/rehearsal
    python -m paper.rehearse runs/rehearsal --collected FOLDER    # trajectories of collect as the authors' data sets

The stand-ins have the published formats: the authors' benchmark files and trajectories, HippoRAG's questions and
passages, a FAISS flat index in two parts, Qwen2 models (also as the encoder). The contents are the miniature's world;
the models and vectors are random, so the results mean nothing.
"""

import dataclasses
import importlib.util
import json
import re
import shutil
import struct
from pathlib import Path

import numpy as np

from agent_distill import Prompts
from common import REQUIRED, option, read_jsonl, replace_file, run_command_line, write_json, write_jsonl
from miniature import world
from paper import data


@dataclasses.dataclass(kw_only=True)
class Config:
    out: str = option(REQUIRED, "folder for the world and the stand-ins", positional=True)
    collected: str | None = option(None, "folder with cot.jsonl, agent.jsonl and prefix.jsonl of collect")


def write(config):
    """Write the world and all stand-ins but the trajectories, or with --collected the trajectories."""
    made, paper = Path(config.out) / "world", Path(config.out) / "paper"
    if config.collected:
        return write_trajectories(Path(config.collected), paper / "download")
    world.write(world.Config(out=str(made), train_questions=30, test_questions=2))
    write_questions(made, paper / "download")
    write_vectors(made, paper / "download/e5-index")
    student, encoder = (
        paper / f"hub/models--{name}" for name in ("Qwen--Qwen2.5-0.5B-Instruct", "intfloat--e5-base-v2")
    )
    with replace_file(student / "refs/main") as file:
        file.write("rehearsal")  # the commit that transformers takes for this name
    write_model(made, student / "snapshots/rehearsal")
    shutil.copytree(student, encoder, dirs_exist_ok=True)


def rows_of(path):
    return [row for _, row in read_jsonl(path)]


def write_questions(made, downloads):
    """The authors' benchmark files, and HippoRAG's: each with a third of the passages, the first one in all."""
    train = rows_of(made / "train.jsonl")
    facts = [row for row in train if row["kind"] == "fact"]
    for path in data.BENCHMARK_FILES:
        split, task = data.task_of(path)
        rows = rows_of(made / f"test/{task}.jsonl") if split == "test" else train
        rows = [row for row in rows if (row["kind"] == "fact") == ("qa_" in path)]
        examples = [{name: row[name] for name in ("id", "question", "answer")} for row in rows]
        write_json(downloads / "benchmarks" / path, {"metadata": {}, "examples": examples})
    pool = []
    for passage in rows_of(made / "passages.jsonl"):
        title, text = passage["contents"].split("\n", 1)
        pool.append({"title": title.strip('"'), "text": text})
    for number, task in enumerate(data.POOLED_TASKS):
        questions = []
        for row in facts if task == "hotpotqa" else rows_of(made / f"test/{task}.jsonl"):
            own = {"id": row["id"], "answer_aliases": ["an alias"]} if task == "musique" else {"_id": row["id"]}
            questions.append(own | {"question": row["question"], "answer": row["answer"]})
        write_json(downloads / f"pooled/{task}.json", questions)
        write_json(downloads / f"pooled/{task}_corpus.json", [pool[0], *pool[number::3]])


def write_trajectories(collected, downloads):
    """Trajectories of collect as the authors' data sets: logs as text or object, JSONL or (with pyarrow) parquet."""
    for kind in ("cot", "agent", "prefix"):
        rows = [published_row(row, log_as_text=kind == "agent") for row in rows_of(collected / f"{kind}.jsonl")]
        write_rows(rows, downloads / f"{kind}-trajectories/train", parquet=kind != "agent")


def write_rows(rows, path, parquet=False):
    """Write a parquet file where it is asked for and pyarrow is installed, and a JSONL file otherwise."""
    if not parquet or not importlib.util.find_spec("pyarrow"):
        return write_jsonl(path.with_suffix(".jsonl"), rows)
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))


def published_row(row, log_as_text=False):
    """Returns a trajectory of collect as one of the authors' rows."""
    question, chat = {"question": row["question"]}, row["messages"]
    if row["method"] == "cot":
        return question | {"messages": chat[:-1], "response": chat[-1]["content"]}
    log = {"messages": smolagents_log(chat)}
    return question | {"log_data": json.dumps(log) if log_as_text else log}


def smolagents_log(chat):
    """Returns a conversation as smolagents logs it: text parts; its tool call and result follow each action."""
    log, document = [], '===== Document {}, similarity: 0.83 =====\n"{}"'.format
    for message in chat:
        role, text = message["role"], message["content"]
        if role == "user" and log[-1]["role"] == "tool-call":
            found = re.sub(r"^\[(\d+)\] (.*)$", lambda hit: document(int(hit[1]) - 1, hit[2]), text, flags=re.MULTILINE)
            found = found.replace("===== Document 0", "\nRetrieved documents:\n\n===== Document 0", 1)
            role, text = "tool-response", f"Call id: call_{len(log)}\n{found}"
        log.append({"role": role, "content": [{"type": "text", "text": text}]})
        if role == "assistant":
            log.append({"role": "tool-call", "content": [{"type": "text", "text": "Calling tools: ..."}]})
    return log


DIMENSIONS = 64  # of the models' hidden states, and so of the encoder's vectors


def write_vectors(made, folder):
    """A FAISS flat inner-product index (see retriever.open_flat_index), cut in two inside a vector."""
    count = len(rows_of(made / "passages.jsonl"))
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
    import transformers  # takes seconds

    texts = [path.read_text() for path in [made / "passages.jsonl", *Prompts.default.glob("*.txt")]]
    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(texts, 2000)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": DIMENSIONS, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "tie_word_embeddings": True}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, **ends)).save_pretrained(folder)


if __name__ == "__main__":
    run_command_line(__doc__, {"write": (Config, write)}, default="write")
