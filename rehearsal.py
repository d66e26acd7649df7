"""`make rehearse`: small stand-ins for everything that `make paper` downloads, behind a server of their own.

    python rehearsal.py runs/rehearsal/stand-ins --then 'make paper SOURCES=runs/rehearsal/stand-ins/sources.json ...'

They are in the real formats: the authors' benchmark files, their trajectories as logged, wiki-18's tar, a FAISS flat
index in two parts, an encoder of e5's kind, a Qwen2 student with random weights. What is in them is the miniature's
invented world. sources.json is the table of sources.py, with this server's address and the stand-ins' hashes.
"""

import dataclasses
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import struct
import subprocess
import tarfile
import threading
import urllib.parse
from pathlib import Path

import miniature
from common import REQUIRED, InputError, option, read_jsonl, replace_file, run_command_line, write_json, write_jsonl
from sources import BENCHMARKS, DATA_FOLDER, FORMS, SOURCES
from tasks import Prompts


@dataclasses.dataclass(kw_only=True)
class RehearsalConfig:
    out: str = option(REQUIRED, "folder for the stand-ins", positional=True)
    then: str | None = option(None, "serve while this shell command runs; exit with its status")
    port: int = option(0, "port on 127.0.0.1; 0 takes a free one")
    questions: int = option(2, "test questions a task")
    train_questions: int = option(60, "training questions")
    seed: int = option(0, "another seed is another world")


def rehearse(config):
    """Make the stand-ins, unless they are there, and serve them, for good or while a command runs."""
    out = Path(config.out)
    if not (out / "www").exists():
        shutil.rmtree(out / "making", ignore_errors=True)
        miniature.make_world(miniature.WorldConfig(
            out=str(out / "world"), seed=config.seed, train_questions=config.train_questions,
            test_questions=config.questions,
        ))  # fmt: skip
        make_stand_ins(out / "world", out / "making", config.seed)
        os.replace(out / "making", out / "www")
    server = open_server(out / "www", config.port)
    url = f"http://127.0.0.1:{server.server_port}"
    write_table(out / "www", url, out / "sources.json")
    print(f"stand-ins: {url}", flush=True)
    if config.then is None:
        return server.serve_forever()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        return subprocess.run(config.then, shell=True).returncode
    finally:
        server.shutdown()


# ---------------------------------------------------------------------------------------------
# The stand-ins. They lie where the address of the real one leads below its host.
# ---------------------------------------------------------------------------------------------


def commit(source):
    """The pinned commit; for a source without one, a commit of that form made up from its name."""
    return source.revision or hashlib.sha1(source.repository.encode()).hexdigest()


def place(www, source, path=""):
    form = FORMS[source.form].split()[1]
    return www / form.format(repository=source.repository, revision=commit(source), path=path)


def make_stand_ins(world, www, seed):
    passages = [row for _, row in read_jsonl(world / "passages.jsonl")]
    make_benchmarks(world, www)
    make_trajectories(world, www)
    make_passages(passages, www)
    make_index(passages, make_encoder(passages, www, seed), www)
    make_students(passages, world, www, seed)


def make_benchmarks(world, www):
    """The authors' files, which name the kind nowhere; numbers and ids are of the types that theirs have."""
    train = [row for _, row in read_jsonl(world / "train.jsonl")]
    maths = [row for row in train if row["kind"] == "math"]
    questions = {("train", "hotpotqa"): [row for row in train if row["kind"] == "fact"],
                 ("train", "math"): maths[::2], ("train", "math_medium"): maths[1::2]}  # fmt: skip
    for path, ((task, kind, _), *_) in BENCHMARKS.items():
        split = path.split("/")[1]
        rows = questions.get((split, task)) or [row for _, row in read_jsonl(world / split / f"{task}.jsonl")]
        examples = []
        for number, row in enumerate(rows):
            answer = float(row["answer"]) if task == "gsm_hard" else row["answer"]
            identity = row["id"] if kind == "fact" else number
            examples.append({"id": identity, "question": row["question"], "answer": answer, "split": split})
        if split == "train" and kind == "math":
            examples[-1]["answer"] = None  # as in four of theirs
        info = {"name": task, "fold": split, "total_examples": len(examples)}
        write_json(place(www, SOURCES["benchmarks"], f"{DATA_FOLDER}/{path}"),
                   {"metadata": {"dataset_info": info}, "examples": examples})  # fmt: skip


def make_trajectories(world, www):
    """What the scripted teacher says, as the authors log it: smolagents' messages, and CoT with its response."""
    teacher = miniature.Teacher(miniature.TeacherConfig(world=str(world)))
    agent, cot = [{"question": "one without a log", "log_data": None}], []
    for number, (_, task) in enumerate(read_jsonl(world / "train.jsonl")):
        if number % 6 == 0:
            chats = miniature.rehearse(teacher, task["question"], Prompts())
            about = {"model_id": miniature.MODEL, "question": task["question"], "true_answer": task["answer"]}
            agent.append({**about, "log_data": {"messages": log_messages(chats[0])}})
            cot.append({**about, "messages": chats[1][:-1], "response": chats[1][-1]["content"]})
    for name, rows in {
        "agent-trajectories": agent,
        "prefix-trajectories": agent[::-1],
        "cot-trajectories": cot,
    }.items():
        write_jsonl(place(www, SOURCES[name], "train.jsonl"), rows)


def log_messages(chat):
    """A chat -> smolagents' log of it: text parts, each action followed by its tool call and what came back."""
    log = []
    for message in chat:
        role, text = message["role"], message["content"]
        if role == "user" and log[-1]["role"] == "tool-call":
            found = re.sub(r"^\[(\d+)\] (.*)$", _document, text, flags=re.MULTILINE)
            found = found.replace("===== Document 0", "\nRetrieved documents:\n\n===== Document 0", 1)
            role, text = "tool-response", f"Call id: call_{len(log)}\n{found}"
        log.append({"role": role, "content": [{"type": "text", "text": text}]})
        if role == "assistant":
            call = {"id": f"call_{len(log)}", "type": "function", "function": {"name": "python_interpreter"}}
            log.append({"role": "tool-call", "content": [{"type": "text", "text": f"Calling tools:\n[{call}]"}]})
    return log


def _document(found):
    return f'===== Document {int(found[1]) - 1}, similarity: 0.83 =====\n"{found[2]}"'


def make_passages(passages, www):
    """wiki-18.jsonl.gz: a gzipped tar with one file deep in its folders."""
    content = "".join(json.dumps(row) + "\n" for row in passages).encode()
    with replace_file(place(www, SOURCES["wiki-18"], "wiki-18.jsonl.gz"), "wb") as file:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            member = tarfile.TarInfo("data/indexes/wiki_dump.jsonl")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def make_encoder(passages, www, seed):
    """A BERT of random weights; its vocabulary is the words of the passages."""
    import torch
    import transformers

    words = sorted({word.lower() for row in passages for word in re.findall(r"\w+|[^\w\s]", row["contents"])})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "query", "passage", *words]
    folder = place(www, SOURCES["intfloat/e5-base-v2"])
    tokens = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    transformers.BertTokenizerFast(vocab=tokens, model_max_length=512).save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(tokens), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        initializer_range=0.2,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def make_index(passages, encoder, www):
    """A FAISS flat inner-product index (see dense.open_flat_index), cut in two within a vector."""
    import dense
    import retriever

    build = retriever.Build(passages="", out="", encoder=str(encoder))
    settings = {name: getattr(build, name) for name in retriever.KINDS["dense"]}
    vectors = dense.Encoder(settings).encode([row["contents"] for row in passages], build.passage_prefix)
    count, dimensions = vectors.shape
    header = struct.pack("<4siqqqBiQ", b"IxFI", dimensions, count, 1 << 20, 1 << 20, 1, 0, count * dimensions)
    content = header + vectors.astype("<f4").tobytes()
    for name, part in {
        "part_aa": content[: len(content) // 2 + 5],
        "part_ab": content[len(content) // 2 + 5 :],
    }.items():
        with replace_file(place(www, SOURCES["e5-index"], name), "wb") as file:
            file.write(part)


def make_students(passages, world, www, seed):
    """Qwen2 models of random weights with a Qwen2 tokenizer, under the names of two students; an adapter for one."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import lora
    import scratch

    questions = [row["question"] for _, row in read_jsonl(world / "train.jsonl")]
    prompts = [path.read_text(encoding="utf-8") for path in Prompts.default.glob("*.txt")]
    tokenizer = scratch.make_tokenizer([row["contents"] for row in passages] + questions + prompts)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    sizes = ("0.5B", "1.5B")
    for size in sizes:
        folder = place(www, SOURCES[f"Qwen/Qwen2.5-{size}-Instruct"])
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    adapter = SOURCES["agent-distillation/agent_distilled_Qwen2.5-1.5B-Instruct"]
    lora.add(model, rank=64, alpha=128, dropout=0.05)
    lora.save(model, place(www, adapter), base=f"Qwen/Qwen2.5-{sizes[-1]}-Instruct")


def write_table(www, url, path):
    """The table of sources.py with the stand-ins' address, sizes and hashes; what is not pinned there is not here."""
    rows = {}
    for name, source in SOURCES.items():
        files = {file: place(www, source, file) for file in source.files}
        pins = {file: [p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()] for file, p in files.items()
                if p.exists()}  # fmt: skip
        rows[name] = dataclasses.asdict(dataclasses.replace(source, files=pins))
    write_json(path, {"hosts": {"hub": url, "github": url}, "sources": rows})


# ---------------------------------------------------------------------------------------------
# The server: files, whole or from a byte on, and the Hub's listing of a repository
# ---------------------------------------------------------------------------------------------

LISTING = re.compile(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)/revision/([\w.-]+)")


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        listing, file = LISTING.fullmatch(path), (self.server.www / path.lstrip("/")).resolve()
        if listing:
            return self.list_repository(*listing.groups())
        if not file.is_relative_to(self.server.www) or not file.is_file():
            return self.send(404, b"")
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        content, first = file.read_bytes(), int(asked[1]) if asked else 0
        if not asked:
            return self.send(200, content)
        if first >= len(content):
            return self.send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        self.send(206, content[first:], {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"})

    def list_repository(self, form, repository, revision):
        """As the Hub answers with ?blobs=true: large files are in LFS, and those have a sha256."""
        top = self.server.www / ("datasets" if form == "datasets" else "") / repository / "resolve"
        commits = [folder for folder in top.glob("*") if revision in ("main", folder.name)]
        if not commits:
            return self.send(404, b"")
        siblings = []
        for path in sorted(path for path in commits[0].rglob("*") if path.is_file()):
            row = {"rfilename": str(path.relative_to(commits[0])), "size": path.stat().st_size}
            if path.suffix == ".safetensors":
                row["lfs"] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": row["size"]}
            siblings.append(row)
        self.send(200, json.dumps({"id": repository, "sha": commits[0].name, "siblings": siblings}).encode())

    def send(self, status, content, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def open_server(www, port=0):
    """A server of a folder of stand-ins, listening; `serve_forever` answers."""
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as failure:
        raise InputError(f"--port {port}: {failure.strerror}; 0 takes a free port") from None
    server.daemon_threads, server.www = True, Path(www).resolve()
    return server


if __name__ == "__main__":
    run_command_line(__doc__, {"serve": (RehearsalConfig, rehearse)}, default="serve")
