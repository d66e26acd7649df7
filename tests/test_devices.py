"""Devices and number formats, without a GPU.  `make test ROOM=devices`"""

import os

import pytest
import torch

from common import InputError
from common.models import choose_device, uses_bf16

CUDA = torch.device("cuda:0")


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
