"""Devices and number formats on a GPU, without one: what would meet there on two devices, or in the wrong format.

    make test ROOM=devices

A fake CUDA tensor has a device, a shape and a format, but no contents. PyTorch refuses operations on fake tensors of
different devices.
"""

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from common import InputError
from common.models import choose_device, uses_bf16

CUDA = torch.device("cuda:0")


@pytest.fixture
def fake_cuda():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


# Which device


def test_a_gpu_is_named_with_its_number_and_made_current(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    names = ["auto", "cuda", "cuda:0", "cpu"]
    assert [str(choose_device(name)) for name in names] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    assert [str(device) for device in current] == ["cuda:1", "cuda:1", "cuda:0"]
    with pytest.raises(InputError, match="--device cuda:7: there are 2 GPUs"):
        choose_device("cuda:7")
    monkeypatch.delenv("LOCAL_RANK")
    assert str(choose_device()) == "cuda:0"


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert choose_device().type == "cpu"
    assert not torch.backends.cuda.cudnn_sdp_enabled(), "it plans for each new length, and gave wrong results on B200"
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    with pytest.raises(InputError, match="--device cuda:1: there is no GPU"):
        choose_device("cuda:1")


def test_bf16_is_not_emulated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not uses_bf16("auto", CUDA) and uses_bf16("bf16", CUDA)


# Training


def test_a_resumed_optimiser_has_its_state_on_the_gpu(fake_cuda, tmp_path):
    """Fused AdamW needs `step` on the parameter's device; a checkpoint is loaded onto the CPU."""
    trainer = train.Trainer.__new__(train.Trainer)
    parameter = torch.nn.Parameter(torch.zeros(4, 3, device=CUDA))
    trainer.parameters = []  # its weight is not loaded: PyTorch's CPU build cannot write to a fake CUDA tensor
    trainer.optimizer = torch.optim.AdamW([parameter], fused=True)
    state = {"step": torch.tensor(7.0), "exp_avg": torch.zeros(4, 3), "exp_avg_sq": torch.zeros(4, 3)}
    adamw = trainer.optimizer.state_dict() | {"state": {0: state}}
    path = tmp_path / "state.pt"
    path.touch()
    saved = {"step": 7, "data": "hash", "weights": [], "adamw": adamw}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **options: saved)
        assert trainer.load(path, "hash") == 7
    loaded = trainer.optimizer.state[parameter]
    assert {name: (value.device, value.dtype) for name, value in loaded.items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), (CUDA, torch.float32)
    )
    parameter.grad = torch.zeros(4, 3, device=CUDA)
    trainer.optimizer.step()
