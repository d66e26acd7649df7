"""LoRA adapters (Hu et al., arXiv 2106.09685) in PEFT's file format, and models with or without an adapter.

    model, tokenizer = load_model("runs/student", "cuda", torch.bfloat16)

A frozen weight W (out, in) gets a trained correction of rank r: y = W x + (alpha / r) B A dropout(x), with
A (r, in) and B (out, r). B starts at zero, so that training starts from the base model's own outputs.
"""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
from common import REQUIRED, InputError, option


class DropoutLinear(torch.autograd.Function):
    """dropout(x) A^T, which keeps only x for the backward pass: the mask is cheap enough to be computed again.

    PyTorch's dropout keeps a mask and a copy of x per layer, 43 % of the memory of a training step of Qwen2.5-0.5B, and
    draws the mask slowly on a CPU. Here an element is dropped if the product, modulo 2^16, of its token's random odd
    number and its feature's random number is among the lowest share p of all 16-bit numbers. The elements of one token
    are dropped independently of each other; those of different tokens almost so.
    """

    @staticmethod
    def forward(ctx, x, a, token_numbers, feature_numbers, p):
        # x (rows, tokens, in), a (r, in), token_numbers (rows, tokens, 1) and feature_numbers (in,) int16
        ctx.save_for_backward(x, a, token_numbers, feature_numbers)
        ctx.p, ctx.limit = p, round(2**16 * p) - 2**15
        return nn.functional.linear(torch.where(token_numbers * feature_numbers >= ctx.limit, x, 0), a) / (1 - p)

    @staticmethod
    def backward(ctx, grad):
        x, a, token_numbers, feature_numbers = ctx.saved_tensors
        kept, grad = token_numbers * feature_numbers >= ctx.limit, grad / (1 - ctx.p)  # (rows, tokens, in), (..., r)
        grad_a = grad.flatten(0, 1).T @ torch.where(kept, x, 0).flatten(0, 1)
        return torch.where(kept, grad @ a, 0), grad_a, None, None, None


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained low-rank correction. (rows, tokens, in) -> (rows, tokens, out)"""

    def __init__(self, base, rank, scale, dropout):
        super().__init__()
        self.base, self.scale, self.dropout, self.token_numbers = base, scale, dropout, None
        # float32 also where W is bf16: an update of 2e-4 would be lost in the 8 bits of a bf16 number
        options = {"dtype": torch.float32, "device": base.weight.device}
        self.a = nn.Parameter(torch.empty(rank, base.in_features, **options))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, **options))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # the reference implementation's choice, and PEFT's

    def forward(self, x):
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        if self.training and self.dropout:
            feature_numbers = torch.randint(-(2**15), 2**15, x.shape[-1:], dtype=torch.int16, device=x.device)
            low = DropoutLinear.apply(x, a, self.token_numbers, feature_numbers, self.dropout)
        else:
            low = nn.functional.linear(x, a)
        return self.base(x) + nn.functional.linear(low * self.scale, b)


def lora_layers(model):
    """Returns [(name, LoraLinear)] in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear)]


def add_lora(model, rank, alpha, dropout):
    """Wrap all linear layers but the output head (the paper's Section 4: "all linear layers"); freeze the rest."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            model.set_submodule(name, LoraLinear(module, rank, alpha / rank, dropout))


PREFIX = "base_model.model."  # PEFT names a tensor by its path inside PeftModel -> LoraModel -> the model


def adapter_config(folder):
    """Returns an adapter's configuration, {} if the folder holds none (or is a name); InputError if it is not LoRA."""
    path = Path(folder) / "adapter_config.json"
    config = common.parse_object(path.read_bytes(), str(path)) if path.is_file() else {}
    if config and (config.get("peft_type") != "LORA" or config.get("alpha_pattern")):
        raise InputError(f"{path}: only plain LoRA adapters (peft_type LORA, no alpha_pattern) are supported")
    return config


def load_lora(model, folder, dropout):
    """Put an adapter, ours or PEFT's, onto its base model and freeze the rest; InputError if it is not plain LoRA."""
    config, path = adapter_config(folder), Path(folder) / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(path) if path.is_file() else {}
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
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "bias": "none"}
    config |= {"r": rank, "lora_alpha": layer.scale * rank, "lora_dropout": layer.dropout}  # PEFT's scale: alpha / r
    config |= {"target_modules": sorted(names), "inference_mode": True}
    with common.replace_file(Path(folder) / "adapter_model.safetensors", "wb") as file:
        file.write(safetensors.torch.save(weights, metadata={"format": "pt"}))
    common.write_json(Path(folder) / "adapter_config.json", config)


# ------------- Models, by Hugging Face name or folder, with or without an adapter


def from_pretrained(kind, name, **options):
    """AutoTokenizer or AutoModelForCausalLM, with one clear line instead of a traceback for a wrong name."""
    transformers.utils.logging.disable_progress_bar()
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name}: {str(error).strip().splitlines()[0]}") from None


def load_tokenizer(path):
    """Returns the tokenizer of a model, or of an adapter: its own if it was saved with one, otherwise its base's."""
    own = (Path(path) / "tokenizer_config.json").is_file()
    return from_pretrained(AutoTokenizer, path if own else adapter_config(path).get("base_model_name_or_path", path))


def load_base(path, dtype, dropout=0.0):
    """Returns (model, name of its base). If path is an adapter, ours or PEFT's, it is put onto the base it names."""
    base = adapter_config(path).get("base_model_name_or_path", str(path))
    model = from_pretrained(AutoModelForCausalLM, base, dtype=dtype)
    if adapter_config(path):
        load_lora(model, path, dropout)
    return model, base


def load_model(path, device="cpu", dtype=torch.float32):
    """Returns (model in evaluation mode, tokenizer). Adapters are left unmerged: bf16 weights would round them away."""
    model, _ = load_base(path, dtype)
    for _, layer in lora_layers(model):
        layer.to(dtype)
    return model.to(device).eval(), load_tokenizer(path)


def training_record(path):
    """Returns what training.json says about a trained folder: {} if there is none."""
    file = Path(path) / "training.json"
    return common.parse_object(file.read_bytes(), str(file)) if file.is_file() else {}


@dataclasses.dataclass(kw_only=True)
class MergeConfig:
    adapter: str = option(REQUIRED, "an adapter's folder", positional=True)
    out: str = option(REQUIRED, "folder for the merged model")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "of the saved weights")


@torch.no_grad()
def merge_adapter(config):
    """Fold an adapter into its base model, save the full model, and print how much of the update its weights keep.

    W + (alpha / r) B A is computed in float32 and cast once. A bf16 number has 8 bits: where the update is small beside
    the weight, as after a short training, most of it is lost. float32 keeps all of it.
    """
    if not adapter_config(config.adapter):
        raise InputError(f"{config.adapter}: no adapter_config.json; an adapter's folder is expected")
    model, _ = load_base(config.adapter, "auto")
    dtype, kept, squares = getattr(torch, config.dtype), 0.0, 1e-30
    for name, layer in lora_layers(model):
        weight, update = layer.base.weight.float(), layer.scale * (layer.b @ layer.a)
        layer.base.weight = nn.Parameter((weight + update).to(dtype))
        kept += ((layer.base.weight.float() - weight.to(dtype).float()) * update).sum().item()
        squares += update.square().sum().item()
        model.set_submodule(name, layer.base)
    model.to(dtype).save_pretrained(config.out)
    load_tokenizer(config.adapter).save_pretrained(config.out)
    common.write_json(Path(config.out) / "training.json", training_record(config.adapter))
    print(f"{config.out}: the {config.dtype} weights keep {kept / squares:.1%} of the adapter's update")
