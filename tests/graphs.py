"""A stand-in for CUDA graphs on a CPU: it records every operation of a step and computes them again on the same tensors."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Operations that ask for a tensor's value, some of them in their CUDA version alone.
WAITING = {aten._local_scalar_dense.default, aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.nonzero.default}


class Recorder(TorchDispatchMode):
    """What a CUDA graph keeps: kernels and the addresses they read and write. Numbers stay as they were."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in WAITING:
            raise RuntimeError(f"{function} waits for the device, which cannot be recorded")
        results = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, results))
        return results

    def replay(self):
        for function, args, kwargs, results in self.operations:
            aliases = [result.alias_info for result in function._schema.returns]
            if any(alias is not None and not alias.is_write for alias in aliases):
                continue  # a view, which is where it was
            again = function(*args, **kwargs)
            if all(alias is None for alias in aliases):
                for kept, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                    if isinstance(kept, torch.Tensor):
                        kept.copy_(new)


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


def stand_in(monkeypatch):
    """Let optimization.GraphedStep record and replay on the CPU; returns a list that grows by one at each replay."""
    replays = []

    class Graph(Recorder):
        def replay(self):
            replays.append(len(self.operations))
            if len(replays) > 1:  # the first one was computed while it was recorded, as CUDA does not
                with torch.no_grad():
                    super().replay()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    return replays
