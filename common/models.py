"""Devices, models, chat templates, and LoRA adapters in PEFT's file format.

device = choose_device("auto")
model, tokenizer = load_model("runs/student", device, torch.bfloat16)
text = render(tokenizer, messages, reply=True)
"""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Literal

import jinja2
import safetensors.torch
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
from common import REQUIRED, InputError, option

# ------------- Devices


def choose_device(name="auto"):
    """Returns the torch.device of this process, and sets PyTorch up for it. name: auto, cpu, cuda, cuda:1, ...

    A GPU is named with its number, because threads would otherwise use GPU 0. Each of torchrun's processes gets one.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # sizes differ: less fragmentation
    torch.backends.cuda.enable_cudnn_sdp(False)  # it prepares a plan for every new length, which is slower than a step
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: auto, cpu, cuda or cuda:1 was expected")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"--device {name}: there is no GPU that PyTorch can use")
        count = torch.cuda.device_count()
        index = int(os.environ.get("LOCAL_RANK", 0)) % count if device.index is None else device.index
        if index >= count:
            raise InputError(f"--device {name}: there are {count} GPUs")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def uses_bf16(precision, device):
    """Returns whether --precision means bf16. Without instructions for it, bf16 is slower than float32."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# ------------- Models and tokenizers, by Hugging Face name or folder


def from_pretrained(kind, name, **options):
    """kind.from_pretrained (kind: AutoTokenizer, ...), with one line instead of a traceback for a wrong name."""
    transformers.utils.logging.disable_progress_bar()
    folder = Path(name)  # a name on the hub may look like a path, but not like one in a folder that exists here
    is_path = folder.is_absolute() or name.startswith(".") or (folder.parent.name and folder.parent.is_dir())
    if is_path and not folder.is_dir():
        raise InputError(f"model {name}: no such folder")
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name}: {str(error).strip().splitlines()[0]}") from None


def load_tokenizer(path):
    """Returns the tokenizer of a model, or of an adapter: its own if it was saved with one, otherwise its base's."""
    own = (Path(path) / "tokenizer_config.json").is_file()
    return from_pretrained(AutoTokenizer, path if own else base_of(path))


def load_base(path, dtype, dropout=0.0):
    """Returns (model, name of its base). If path is an adapter, ours or PEFT's, it is put onto the base it names."""
    base = base_of(path)
    model = from_pretrained(AutoModelForCausalLM, base, dtype=dtype)
    if adapter_config(path):
        load_lora(model, path, dropout)
    return model, base


def load_model(path, device="cpu", dtype=torch.float32):
    """Returns (model in evaluation mode, tokenizer). Adapters are merged in float32; bf16 would lose small updates."""
    model, _ = load_base(path, dtype)
    if dtype == torch.float32:
        merge_lora(model, dtype)  # prompts are read 1.36 times as fast
    else:
        for _, layer in lora_layers(model):
            layer.to(dtype)
    return model.to(device).eval(), load_tokenizer(path)


def rope_types(config):
    """Returns the kinds of rotary position encoding of a model's configuration: default, longrope, dynamic, ..."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    parts = [parameters, *parameters.values()]  # some models have parameters for each kind of layer
    return {part.get("rope_type", "default") for part in parts if isinstance(part, dict)}


def training_record(path):
    """Returns what training.json says about a trained folder: {} if there is none, or no folder (a served model)."""
    file = Path(path) / "training.json" if path else None
    return common.parse_object(file.read_bytes(), str(file)) if file and file.is_file() else {}


@torch.no_grad()
def check_model(model):
    """Raise InputError if train.loss_of would not compute the model's own loss.

    The model's logits must be hidden W^T: a head may have a bias, a scale or a soft cap. And the states of an example
    must not change beside a longer one: a layer may mix rows or later tokens.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    if any("dynamic" in kind for kind in rope_types(model.config)):
        raise InputError(f"{name}: dynamic position scaling is not supported: a long example would change later ones")
    model.eval()
    words = model.config.get_text_config().vocab_size
    ids = torch.randint(words, (2, 40), generator=torch.Generator().manual_seed(0)).to(model.device)
    ids[0, 24:] = 0
    logits = model(ids[:1, :24], use_cache=False).logits.float()
    alone = model.get_decoder()(ids[:1, :24], use_cache=False).last_hidden_state
    beside = model.get_decoder()(ids, use_cache=False).last_hidden_state[:1, :24]
    model.train()
    exact = alone.dtype == torch.float32

    def differ(a, b, share):
        return not (a - b).square().mean().sqrt() <= share * a.std()  # `not <=`: NaN differs, too

    if differ(logits, nn.functional.linear(alone, head.weight).float(), 0.001 if exact else 0.02):
        raise InputError(f"{name}: the output head is not a plain linear layer, which is not supported")
    if differ(alone.float(), beside.float(), 0.001 if exact else 0.2):  # bf16 rounding adds up over the layers
        raise InputError(f"{name}: the states of an example differ beside a longer one, which is not supported")


# ------------- Chat templates

# Llama 3's template prints today's date by default: the same data would give different tokens on another day.
# The teacher's thoughts are part of its replies, so a template's own thinking mode would duplicate them.
TEMPLATE_OPTIONS = {"date_string": "26 Jul 2024", "enable_thinking": False}


def render(tokenizer, messages, reply=False):
    """Returns the conversation as text, as the model reads it. reply: with the header of the assistant's next turn."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply, **TEMPLATE_OPTIONS)
    except (jinja2.TemplateError, ValueError) as error:  # ValueError: the tokenizer has no template
        raise InputError(f"the chat template fails: {error}") from None


@dataclasses.dataclass
class Reply:
    """An assistant's message as the chat template prints it."""

    content: str
    prompt: str  # what the student reads before it: the earlier messages and the header of the reply
    text: str  # the conversation up to the reply, which starts with the prompt
    start: int  # where in the text the content starts; a template may print something before it
    end: int  # where in the text the reply ends, behind its end-of-turn token


class SpecialToken(InputError):
    """A reply contains a token, such as <|im_end|>, that would end the turn."""


def find_replies(tokenizer, messages):
    """Returns a Reply for every message of the assistant. Raises InputError if an exact mask is impossible."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    end_of_turn, replies = re.compile(rf"\s*({'|'.join(map(re.escape, special))})"), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        content = message["content"].strip()
        if any(token in content for token in special):
            raise SpecialToken(f"messages[{i}]: the content contains a special token, which would end the turn")
        prompt, text = render(tokenizer, messages[:i], reply=True), render(tokenizer, messages[: i + 1])
        if not text.startswith(prompt):
            raise InputError(f"messages[{i}]: the chat template shows the messages before this turn differently")
        start = text.find(content, len(prompt))
        end = end_of_turn.match(text, start + len(content))
        if not end:  # GLM's template: the mark that begins the next message ends the turn
            text = render(tokenizer, [*messages[: i + 1], {"role": "user", "content": "next"}])
            start = text.find(content, len(prompt))
            end = end_of_turn.match(text, start + len(content))
            text = text[: end.end()] if end else text
        if start < 0 or not end or any(token in text[len(prompt) : start] for token in special):
            fault = "does not print this turn as it is, with a special token at its end"
            raise InputError(f"messages[{i}]: the chat template {fault}")
        replies.append(Reply(content, prompt, text, start, end.end()))
    if not replies:
        raise InputError("nothing to train on: no message has the role assistant")
    return replies


# ------------- LoRA (Hu et al., arXiv 2106.09685), in PEFT's file format


class LoraLinear(nn.Module):
    """A frozen weight W with a trained correction: y = W x + (alpha / r) B A dropout(x). (..., in) -> (..., out)

    A is (r, in), B is (out, r). B starts at zero, so training starts from the base model's own outputs.
    """

    def __init__(self, base, rank, scale, dropout):
        super().__init__()
        self.base = base
        self.scale = scale  # alpha / r
        self.dropout = dropout
        # float32 also where W is bf16: an update of 2e-4 would be lost in the 8 bits of a bf16 number
        options = {"dtype": torch.float32, "device": base.weight.device}
        self.a = nn.Parameter(torch.empty(rank, base.in_features, **options))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, **options))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # the reference implementation's choice, and PEFT's

    def forward(self, x):
        low = nn.functional.linear(nn.functional.dropout(x, self.dropout, self.training), self.a.to(x.dtype))
        return self.base(x) + nn.functional.linear(low * self.scale, self.b.to(x.dtype))


def lora_layers(model):
    """Returns [(name, LoraLinear)] in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear)]


def add_lora(model, rank, alpha, dropout):
    """Wrap all linear layers but the output head (the paper's Section 4: "all linear layers"); freeze the rest."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            model.set_submodule(name, LoraLinear(module, rank, alpha / rank, dropout))
    if not lora_layers(model):
        raise InputError(f"{type(model).__name__} has no linear layers for LoRA: use --tuning full")


@torch.no_grad()
def merge_lora(model, dtype):
    """Make every LoraLinear a plain layer with the weight W + (alpha / r) B A, added in float32 and cast once."""
    for name, layer in lora_layers(model):
        weight = layer.base.weight.float() + layer.scale * (layer.b @ layer.a)
        layer.base.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        model.set_submodule(name, layer.base)


PREFIX = "base_model.model."  # PEFT names a tensor by its path inside PeftModel -> LoraModel -> the model


def adapter_config(folder):
    """Returns an adapter's configuration, {} if the folder holds none (or is a name); InputError if it is not LoRA."""
    path = Path(folder) / "adapter_config.json"
    config = common.parse_object(path.read_bytes(), str(path)) if path.is_file() else {}
    numbers = all(isinstance(config.get(name), int | float) for name in ("r", "lora_alpha"))
    plain = config.get("init_lora_weights") in (None, True, False, "gaussian")  # others also change the base
    plain &= not config.get("alpha_pattern") and not config.get("alora_invocation_tokens")
    if config and (config.get("peft_type") != "LORA" or not plain or not numbers):
        raise InputError(f"{path}: only plain LoRA adapters (peft_type LORA, r, one lora_alpha) are supported")
    return config


def base_of(path):
    """Returns the base model that an adapter names, which may be relative to the adapter; for a model, its own name."""
    config = adapter_config(path)
    if not config:
        return str(path)
    base = config.get("base_model_name_or_path") or "(none)"
    if not Path(base).is_dir() and (Path(path) / base).is_dir():
        return str((Path(path) / base).resolve())
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise InputError(
            f"{path}: the base model {base} is gone: correct base_model_name_or_path in adapter_config.json"
        )
    return base


def check_out(out, path):
    """Raise InputError if the folder `out` is that of a model or adapter that is read, or of the adapter's base.

    Nor may it hold a model without run.json, which common.keep_config writes: another program's.
    """
    reads = Path(out).resolve() in (Path(path).resolve(), Path(base_of(path)).resolve())
    holds = any((Path(out) / name).exists() for name in ("config.json", "adapter_config.json"))
    if reads or (holds and not (Path(out) / "run.json").exists()):
        raise InputError(f"--out {out}: the model in it would be lost: name another folder")


def load_lora(model, folder, dropout):
    """Put an adapter, ours or PEFT's, onto its base model and freeze the rest; InputError if it is not plain LoRA."""
    config, path = adapter_config(folder), Path(folder) / "adapter_model.safetensors"
    try:
        weights = safetensors.torch.load_file(path) if path.is_file() else {}
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: {error}") from None
    if not weights:
        raise InputError(f"{path}: not found, or empty")
    model.requires_grad_(False)
    for name in [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]:
        a, b = weights.pop(name + ".lora_A.weight"), weights.pop(name + ".lora_B.weight")
        base = dict(model.named_modules()).get(name.removeprefix(PREFIX))
        if not isinstance(base, nn.Linear) or (len(b), a.shape[1]) != tuple(base.weight.shape):
            raise InputError(f"{path}: {name} does not fit the model; is this another model's adapter?")
        scale = config["lora_alpha"] / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
        layer = LoraLinear(base, len(a), scale, dropout)
        layer.load_state_dict({"a": a, "b": b}, strict=False)
        model.set_submodule(name.removeprefix(PREFIX), layer)
    if weights:
        raise InputError(f"{path}: {next(iter(weights))} is not a LoRA weight of a linear layer")


def save_lora(model, folder, base):
    """Write adapter_model.safetensors and adapter_config.json as PEFT does. base: the base model's name or folder."""
    weights, names = {}, set()
    for name, layer in lora_layers(model):
        names.add(name.rpartition(".")[2])
        weights[f"{PREFIX}{name}.lora_A.weight"] = layer.a.detach().cpu()
        weights[f"{PREFIX}{name}.lora_B.weight"] = layer.b.detach().cpu()
    rank = len(layer.a)
    # An absolute path, so that our loader, PEFT and vLLM find the base model from any folder.
    base = str(Path(base).resolve()) if Path(base).is_dir() else base
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none"}
    config |= {"r": rank, "lora_alpha": layer.scale * rank, "lora_dropout": layer.dropout}  # PEFT's scale: alpha / r
    config |= {"target_modules": sorted(names), "inference_mode": True}
    with common.replace_file(Path(folder) / "adapter_model.safetensors", "wb") as file:
        file.write(safetensors.torch.save(weights, metadata={"format": "pt"}))
    common.write_json(Path(folder) / "adapter_config.json", config)


@dataclasses.dataclass(kw_only=True)
class MergeConfig:
    adapter: str = option(REQUIRED, "an adapter's folder", positional=True)
    out: str = option(REQUIRED, "folder for the merged model", changes_results=False)
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "of the saved weights")


def merge_adapter(config):
    """Fold an adapter into its base model, and save the full model.

    A bfloat16 number has 8 bits: where the update is small beside the weight, as after a short training, most of it is
    lost. float32 keeps all of it.
    """
    if not adapter_config(config.adapter):
        raise InputError(f"{config.adapter}: no adapter_config.json; an adapter's folder is expected")
    check_out(config.out, config.adapter)
    common.keep_config(Path(config.out) / "run.json", config)
    model, _ = load_base(config.adapter, "auto")
    dtype = getattr(torch, config.dtype)
    merge_lora(model, dtype)
    model.to(dtype).save_pretrained(config.out)
    load_tokenizer(config.adapter).save_pretrained(config.out)
    common.write_json(Path(config.out) / "training.json", training_record(config.adapter))
