"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685), written out, in PEFT's file format.

    import lora

    lora.add(model, rank=64, alpha=128, dropout=0.05)      # wrap every linear layer but the head; freeze the rest
    lora.save(model, "adapter", base="Qwen/Qwen2.5-0.5B-Instruct")
    lora.load(model, "adapter")                            # continue from one, ours or PEFT's
    lora.fold(model)                                       # merge it into the weights, for inference
    model, tokenizer = lora.load_model("adapter")          # the last two, onto the base model it names

A frozen weight W (out, in) gets a trained correction of rank r: y = W x + (alpha / r) B A dropout(x), with
A (r, in) and B (out, r). B starts at zero, so that training starts from the base model's own outputs.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Literal

import torch
import transformers
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from common import REQUIRED, InputError, option, parse_object, replace_file, write_json

PREFIX = "base_model.model."  # PEFT names a tensor by its path inside PeftModel -> LoraModel -> the model
# What PEFT can put into an adapter that this file does not compute: absent or falsy, or it is refused.
UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "alora_invocation_tokens",
)


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained low-rank correction. (..., in) -> (..., out)"""

    def __init__(self, base, rank, alpha, dropout, scale=None):
        super().__init__()
        self.base, self.rank, self.alpha, self.dropout = base, rank, alpha, dropout
        self.scale = alpha / rank if scale is None else scale
        # float32 also where the base is bf16: updates of lr 2e-4 would vanish in bf16's 8 bits
        options = {"dtype": torch.float32, "device": base.weight.device}
        self.a = nn.Parameter(torch.empty(rank, base.in_features, **options))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, **options))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # the reference implementation's choice, and PEFT's

    def forward(self, x):
        low = nn.functional.linear(nn.functional.dropout(x, self.dropout, self.training), self.a.to(x.dtype))
        return self.base(x) + nn.functional.linear(low, self.b.to(x.dtype)) * self.scale


def layers(model):
    """[(name, LoraLinear)] in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear)]


def _replace(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def add(model, rank, alpha, dropout):
    """Wrap all linear layers but the output head (the paper's Section 4: "all linear layers"); freeze the rest."""
    head = model.get_output_embeddings()
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            _replace(model, name, LoraLinear(module, rank, alpha, dropout))


def load(model, folder, dropout=None):
    """Wrap the layers for which the adapter has weights, and freeze the rest. Returns the adapter's configuration.

    dropout None: the adapter's own. Raises InputError for what is not a plain LoRA adapter of this model.
    """
    folder = Path(folder)
    config = read_config(folder)
    weights_file = folder / "adapter_model.safetensors"
    if not weights_file.is_file():
        raise InputError(f"{weights_file}: not found; an adapter folder holds adapter_model.safetensors")
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(weights_file).items()}
    model.requires_grad_(False)
    for name in sorted({name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")}):
        a, b = weights.pop(name + ".lora_A.weight"), weights.pop(name + ".lora_B.weight", None)
        try:
            base = model.get_submodule(name)
        except AttributeError:
            raise InputError(
                f"{weights_file}: the model has no layer {name}; is this another model's adapter?"
            ) from None
        if b is None or (b.shape[0], a.shape[1]) != tuple(base.weight.shape):
            raise InputError(f"{weights_file}: {name} does not fit the model's {tuple(base.weight.shape)} weight")
        rank, alpha = a.shape[0], config["lora_alpha"]
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        layer = LoraLinear(base, rank, alpha, config.get("lora_dropout", 0.0) if dropout is None else dropout, scale)
        with torch.no_grad():
            layer.a.copy_(a)
            layer.b.copy_(b)
        _replace(model, name, layer)
    if weights:
        raise InputError(f"{weights_file}: {next(iter(weights))} is not a LoRA weight of a linear layer")
    return config


def read_config(folder):
    """The adapter's configuration; InputError if it asks for more than plain LoRA."""
    path = Path(folder) / "adapter_config.json"
    config = parse_object(path.read_bytes(), str(path))
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type {config.get('peft_type')}; only LORA adapters are read")
    unsupported = [name for name in UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        raise InputError(f"{path}: {', '.join(unsupported)} is not supported; only plain LoRA is")
    return config


def save(model, folder, base, write=True):
    """Write adapter_model.safetensors and adapter_config.json as PEFT does.

    base: the base model's name or folder. write: False on all processes but one; the tensors of a sharded
    model are gathered by all of them.
    """
    weights, config = {}, None
    for name, layer in layers(model):
        for letter, tensor in (("A", layer.a), ("B", layer.b)):
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            weights[f"{PREFIX}{name}.lora_{letter}.weight"] = whole.detach().cpu().contiguous()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base),
            "r": layer.rank,
            "lora_alpha": layer.scale * layer.rank,  # so that PEFT's alpha / r is our scale, rsLoRA or not
            "lora_dropout": layer.dropout,
            "target_modules": sorted({name.rpartition(".")[2] for name, _ in layers(model)}),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
    if write:
        with replace_file(Path(folder) / "adapter_model.safetensors", "wb") as file:
            file.write(to_safetensors(weights, metadata={"format": "pt"}))
        write_json(Path(folder) / "adapter_config.json", config)


@torch.no_grad()
def fold(model):
    """Fold every adapter into its layer, W + (alpha / r) B A (computed in float32), and unwrap it."""
    for name, layer in layers(model):
        weight = layer.base.weight
        weight.copy_(weight.float() + layer.scale * (layer.b.float() @ layer.a.float()))
        _replace(model, name, layer.base)


# Models, read by name or folder, with or without an adapter.


def from_pretrained(kind, name, **options):
    """AutoTokenizer or AutoModelForCausalLM, with one clear line instead of a traceback for a wrong name."""
    transformers.utils.logging.disable_progress_bar()
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name}: {str(error).strip().splitlines()[0]}") from None


def is_adapter(path):
    return (Path(path) / "adapter_config.json").is_file()


def load_tokenizer(path):
    """The tokenizer of a model, or of an adapter: its own if it was saved with one, else its base's.

    Transformers 5 splits text as the model's type usually does, whatever a folder's tokenizer.json says. Where the
    two differ, as for a tokenizer of one's own under a Qwen2 model, the file is taken at its word.
    """
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = read_config(path)["base_model_name_or_path"]
    tokenizer, file = from_pretrained(AutoTokenizer, path), Path(path) / "tokenizer.json"
    if file.is_file():
        loaded = json.loads(tokenizer.backend_tokenizer.to_str())
        written = json.loads(file.read_text(encoding="utf-8"))
        if any(loaded[part] != written[part] for part in ("normalizer", "pre_tokenizer", "decoder")):
            return from_pretrained(PreTrainedTokenizerFast, path)
    return tokenizer


def load_model(path, device="cpu", dtype=torch.float32, merge=True):
    """(model in evaluation mode, tokenizer) of a Hugging Face name or folder, or of a LoRA adapter's folder.

    An adapter (ours or PEFT's) is put onto the base model that it names, and folded into the weights if merge.
    """
    base = read_config(path)["base_model_name_or_path"] if is_adapter(path) else path
    tokenizer = load_tokenizer(path)
    model = from_pretrained(AutoModelForCausalLM, base, dtype=dtype)
    if is_adapter(path):
        load(model, path)
        if merge:
            fold(model)
    try:
        return model.to(device).eval(), tokenizer
    except torch.OutOfMemoryError:
        raise InputError(f"model {path} does not fit into the memory of {device}") from None


@dataclasses.dataclass(kw_only=True)
class MergeConfig:
    adapter: str = option(REQUIRED, "an adapter's folder", positional=True)
    out: str = option(REQUIRED, "folder for the merged model")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "of the saved weights")


def merge_adapter(config):
    """Fold an adapter into its base model and save the full model."""
    if not is_adapter(config.adapter):
        raise InputError(f"{config.adapter}: no adapter_config.json; an adapter's folder is expected")
    model, tokenizer = load_model(config.adapter, dtype=getattr(torch, config.dtype))
    model.save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)
