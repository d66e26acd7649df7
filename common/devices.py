"""Where a model runs: the device of this process, and whether it computes in bf16.

device = choose_device("auto")
"""

import os

import torch

from common import InputError


def choose_device(name="auto"):
    """Returns the torch.device of this process. name: auto, cpu, cuda, cuda:1, ...

    A GPU is named with its number, because threads would otherwise use GPU 0. Each of torchrun's processes gets one.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # sizes differ: less fragmentation
    torch.backends.cuda.enable_cudnn_sdp(False)  # it prepares a plan for every new length, which is slower than a step
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise InputError(f"--device {name}: there is no GPU that PyTorch can use")
        if name == "cuda":
            name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
        torch.cuda.set_device(name)
    return torch.device(name)


def uses_bf16(precision, device):
    """Returns whether --precision means bf16. Without instructions for it, bf16 is slower than float32."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
