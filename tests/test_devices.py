"""Devices and number formats on a GPU, without one: what would meet there on two devices, or in the wrong format.

    make test ROOM=devices

A fake CUDA tensor has a device, a shape and a format, but no contents. PyTorch refuses operations on fake tensors of
different devices. Without its CUDA part it cannot index them or run autograd, so those tests use the meta device, with
a check of every operation's devices.
"""

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import train
from bench.gpu import META, Letters, make_model, simulated_gpu
from common import InputError
from common.decoding import SampleNucleus, SharedPrompts
from common.models import choose_device, uses_bf16
from evaluate import Student

CUDA = torch.device("cuda:0")


class Operations(TorchDispatchMode):
    """Records what every operation returns, and refuses tensors of two devices (but for copies and CPU indices)."""

    MAY_MIX = ("aten::_to_copy", "aten::copy_", "aten::index", "aten::index_put_", "aten::_index_put_impl_")

    def __init__(self):
        super().__init__()
        self.results = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.name().split(".")[0], kwargs or {}
        with self:  # under inference_mode, compound operations arrive whole
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device for x in tensors if x.ndim}  # a CPU scalar may meet any tensor
        assert len(devices) < 2 or name in self.MAY_MIX, f"{name}: tensors on {devices}"
        result = function(*args, **kwargs)
        self.results += [(name, x) for x in tree_iter(result) if isinstance(x, torch.Tensor)]
        return result


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


# Decoding


@pytest.mark.parametrize("n", [1, 8])
def test_decoding_mixes_no_devices_and_computes_in_the_model_s_format(n, monkeypatch):
    with simulated_gpu(limit=10**9), torch.inference_mode(), Operations() as operations:
        student = Student(make_model("small", META), Letters(), n=n, temperature=0.4 * (n > 1), max_tokens=32)
        states = student._read([[3] * 40, [3] * 50])
        cache = SharedPrompts(states, torch.ones(2, 49), n)
        cache.keep(list(range(2 * n)), 16)
        ids = torch.zeros(2 * n, 1, dtype=torch.int64, device=META)
        del operations.results[:]
        scores = student.model(input_ids=ids, past_key_values=cache).logits[:, -1]
        weights = [x for name, x in operations.results if name == "aten::_softmax"]
        cache.keep(list(range(2 * n - 1)), 16)  # one sample has ended
        student.model(input_ids=ids[1:], past_key_values=cache)
        assert student.processors == [] if n == 1 else SampleNucleus(0.4, 0.8)(ids, scores).device == META
    assert 1 <= student.batch <= 256
    assert {x.dtype for x in (states, scores, cache.bias)} == {torch.bfloat16}
    assert len(weights) == 2 and {x.dtype for x in weights} == {torch.bfloat16}, "no float32 copy of attention weights"
    large = {name for name, x in operations.results if x.dtype == torch.float32 and x.shape[-1:] == (50,)}
    assert not large, large
