"""Where training runs: one process or torchrun's, its device, and what it makes of it.

A sharded tensor (FSDP2's DTensor) lies on all processes in parts; `whole` and `like` go between it and a plain one.
"""

import dataclasses
import gc
import os
import resource
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import distribute_tensor


@dataclasses.dataclass
class Process:
    """Where this process runs: alone, or as one of torchrun's."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self):
        return self.rank == 0


def start_process(config):
    """This process's place, among torchrun's or alone. Sets up PyTorch's threads, and repeatable results on a GPU."""
    if config.threads:
        torch.set_num_threads(config.threads)
    cuda = torch.cuda.is_available()
    if cuda:
        # The same seed gives the same weights on the GPU too: atomics in the backward kernels would not.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if "LOCAL_RANK" not in os.environ:
        return Process(device=torch.device("cuda" if cuda else "cpu"))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return Process(dist.get_rank(), dist.get_world_size(), device)


def stop_process():
    """Leave torchrun's group, when all processes are done."""
    if dist.is_initialized():
        dist.barrier()
        gc.collect()  # DDP and FSDP hold the group in reference cycles: if it outlived this, the exit could abort
        dist.destroy_process_group()


def uses_bf16(config, device):
    """Whether --precision means bf16 autocast on this device."""
    if config.precision != "auto":
        return config.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without these instructions bf16 is emulated, and slower than float32.
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and any(flag in cpu.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def whole(tensor):
    """A plain tensor on the CPU, also of one that is sharded over processes (then all of them must call this)."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu()


def like(value, parameter):
    """A whole tensor, placed on the parameter's device and sharded as the parameter is."""
    if hasattr(parameter, "device_mesh"):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)


# Dense bf16 peak in FLOP/s, from NVIDIA's data sheets, by a part of the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12}


def peak_memory(device):
    """Bytes: of the GPU's memory, or of this process's main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Work:
    """What a run has done since it (re)started: tokens/s, memory, and the share of the GPU's peak that was of use."""

    def __init__(self, student, process):
        self.process, self.started, self.tokens, self.flops = process, time.monotonic(), 0, 0.0
        self.model, self.head = student.model, student.model.get_output_embeddings().weight
        self.body = list({id(p): p for p in self.model.get_decoder().layers.parameters()}.values())
        self.token_flops = sum(map(self.parameter_flops, self.body))

    def parameter_flops(self, parameter):
        """Of one token: 2 forward, 2 backward, 2 more if it is trained. What is computed again does not count."""
        return parameter.numel() * (6 if parameter.requires_grad else 4)

    def add(self, examples):
        attention = 6 * self.model.config.num_hidden_layers * self.model.config.hidden_size  # causal: half of 12
        for example in examples:
            n = len(example.ids)
            self.tokens += n
            self.flops += n * (self.token_flops + attention * n) + len(example.trained) * self.parameter_flops(
                self.head
            )

    def summary(self):
        seconds, on_gpu = time.monotonic() - self.started, self.process.device.type == "cuda"
        device = torch.cuda.get_device_name(self.process.device) if on_gpu else "cpu"
        peak = next((peak for name, peak in PEAKS.items() if name in device), None)
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "device": device,
            "processes": self.process.size,
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "peak_memory_bytes": peak_memory(self.process.device),
            "share_of_peak": self.flops / seconds / peak / self.process.size if peak else None,
        }

    def __str__(self):
        rate, memory = self.tokens / (time.monotonic() - self.started), peak_memory(self.process.device)
        return f"{rate:,.0f} tokens/s {memory / 2**30:.2f} GiB"
