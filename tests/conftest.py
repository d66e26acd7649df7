"""What the tests share: a tiny random model with a tokenizer that is trained on the spot, and conversations."""

import contextlib
import gc
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may use the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the tests run on the CPU, also where there is a GPU

import pytest

# A shell starts background jobs with Ctrl-C ignored. The processes that the tests start would inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
# How Qwen2's tokenizer splits text. AutoTokenizer does the same for a Qwen2 model, whatever its tokenizer.json says.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Phi-4-mini's position encoding: its factors change for the whole batch where one sequence is longer than 128 tokens.
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0], "factor": 4.0}
LONGROPE |= {"rope_theta": 10000.0, "original_max_position_embeddings": 128}
LONGROPE = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}
WORDS = ["".join(random.Random(i).choices("abcdefghij", k=2 + i % 5)) for i in range(200)]


def make_tokenizer():
    """Returns a byte-level BPE tokenizer of 500 tokens with a ChatML template."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    texts = [" ".join(WORDS), "system user assistant Thought: Code: Observation: New task:\n\n" * 9, "ab\n\n\ncd" * 9]
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|eot_id|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def random_model(kind="Qwen2", seed=0, **options):
    """Returns a random model of two layers. kind: how the names of its classes in transformers begin."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config |= {"initializer_range": 0.2}  # wide: greedy text is not one repeated token
    config |= {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config |= {"tie_word_embeddings": False} | options
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    kinds = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    return getattr(transformers, f"{kind}ForCausalLM")(kinds(**config)).eval()


def make_model(folder, tokenizer, kind="Qwen2", **options):
    """Save a random model and its tokenizer. Returns the folder as text."""
    options = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id} | options
    random_model(kind, **{"vocab_size": len(tokenizer), "tie_word_embeddings": True} | options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def conversation(rng, turns=3, words=12):
    """Returns the messages of a random conversation in the form of an agent's trajectory."""
    text = lambda: " ".join(rng.choices(WORDS, k=rng.randint(3, words)))  # noqa: E731
    messages = [{"role": "system", "content": text()}, {"role": "user", "content": "New task:\n" + text()}]
    for turn in range(turns):
        code = "Thought: " + text() + "\nCode:\n```py\nprint(1)\n```<end_code>"
        messages.append({"role": "assistant", "content": code})
        if turn + 1 < turns:
            messages.append({"role": "user", "content": "Observation:\n" + text()})
    return messages


def chat(*contents):
    """Returns messages of these contents: the system's, then the user's and the assistant's in turns."""
    roles = ["system", *["user", "assistant"] * len(contents)]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def trained_runs(examples):
    """Returns [(the ids before it, the ids)] of every run of trained tokens in examples from train.encode."""
    runs = []
    for example in examples:
        ids, trained = example.ids.tolist(), [*(example.weights != 0).tolist(), False]
        starts = [n for n in range(1, len(ids)) if trained[n] and not trained[n - 1]]
        runs += [(ids[:start], ids[start : trained.index(False, start)]) for start in starts]
    return runs


def write_jsonl(path, rows):
    """Write rows, which may be text that is not JSON. Returns the path as text."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read_rows(path):
    """The rows of a file of whole lines."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def kill_when(ready, *command, how=signal.SIGKILL):
    """Run a Python command and kill it as soon as ready() is true. Returns (its exit status, stderr)."""
    command = [sys.executable, *command]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not ready():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(how)
        return process.wait(60), process.stderr.read()


@contextlib.contextmanager
def small_disk(size):
    """No file can grow beyond size bytes: a write fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_tokenizer):
    """The folder of a tiny random model with its tokenizer and chat template."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny", tiny_tokenizer)


@pytest.fixture
def reference_counting_alone(monkeypatch):
    """Nothing else frees tensors, as in the long stretches between two collections of the garbage collector."""
    gc.collect()
    monkeypatch.setattr(gc, "collect", lambda: None)
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """A folder with a small invented world, and its index."""
    import retriever
    from miniature import world

    folder = tmp_path_factory.mktemp("world")
    world.write(world.Config(out=str(folder / "world"), seed=5, train_questions=100, test_questions=2))
    retriever.build(folder / "world" / "passages.jsonl", folder / "index", quiet=True)
    return folder
