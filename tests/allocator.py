"""An allocator that runs out, for the tests of what happens then. No GPU is needed."""

import math
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Allocator(TorchDispatchMode):
    """Counts the bytes of live tensors that are made while it is active, in blocks of 512 as PyTorch's allocator does.

    now, peak: bytes. Above `limit` it raises torch.OutOfMemoryError; failures: how often it did.
    """

    def __init__(self, limit=math.inf):
        super().__init__()
        self.limit = limit
        self.storages = {}
        self.now = 0
        self.peak = 0
        self.failures = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with self:  # under inference_mode, compound operations arrive whole
            result = function.decompose(*args, **(kwargs or {}))
        if result is NotImplemented:
            result = function(*args, **(kwargs or {}))
            if not function.is_view:  # a view, of a weight for example, allocates nothing
                for tensor in tree_iter(result):
                    if isinstance(tensor, torch.Tensor):
                        self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key, size = id(storage), -(-storage.nbytes() // 512) * 512
        if key in self.storages and self.storages[key]() is storage:
            return
        if self.now + size > self.limit:
            self.failures += 1
            raise torch.OutOfMemoryError(f"simulated: {self.now:,} bytes are in use, {size:,} more are asked for")
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed(reference):
            self.now -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, freed)
