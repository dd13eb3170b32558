"""A stand-in for CUDA graphs on the CPU: records every operation of a step, and repeats them on the same tensors."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Operations that read a tensor's value, on CUDA at least.
WAITING = {aten._local_scalar_dense.default, aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.nonzero.default}


class Recorder(TorchDispatchMode):
    """Records what a CUDA graph does: kernels, and the addresses that they read and write. Numbers become constants."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in WAITING:
            raise RuntimeError(f"{function} waits for the device, so it cannot be recorded")
        results = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, results))
        return results

    def replay(self):
        for function, args, kwargs, results in self.operations:
            aliases = [result.alias_info for result in function._schema.returns]
            if any(alias is not None and not alias.is_write for alias in aliases):
                continue  # a view of a tensor that stays in place
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
    """Make optimization.GraphedStep record and replay on the CPU -> a list that grows by one entry per replay."""
    replays = []

    class Graph(Recorder):
        is_recorded = False

        def replay(self):
            replays.append(len(self.operations))
            self.is_recorded, is_first = True, not self.is_recorded
            if not is_first:  # unlike CUDA, recording computed the first one
                with torch.no_grad():
                    super().replay()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    return replays
