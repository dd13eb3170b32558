"""Parts of a training step: Adam, learning rates, gradient averaging, CUDA graphs, memory format, nan checks, timing."""

import itertools
import re
import resource
import time
import warnings
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import runtime

WARM_UP = 3  # steps before a CUDA graph is recorded; cuDNN tries its algorithms in them, with large workspaces
# torch warns when such an optimizer steps outside a graph, which warm-up does on purpose.
warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")


def adam(parameters, lr, betas=(0.9, 0.999)):
    """torch's fused Adam: one kernel per step instead of a dozen per parameter.

    On a GPU the learning rate is a tensor: a CUDA graph would keep a number as it was when the graph was recorded.
    """
    parameters = list(parameters)
    device = parameters[0].device
    if device.type == "cuda":
        rate = torch.tensor(lr, dtype=torch.float32, device=device)
        return torch.optim.Adam(parameters, lr=rate, betas=betas, fused=True, capturable=True)
    return torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True)


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def constant_then_linear(iteration, iterations, base):
    """Schedule of stages 1 and 4 (Zhu et al. 2017): `base` for half, then linearly down, to 0 after the last step."""
    return base * min(1.0, (iterations - iteration) / (iterations - iterations // 2))


def backward_and_step(optimizer, loss):
    """Backpropagate the loss and step the optimizer, with gradients averaged over all processes."""
    if runtime.processes() > 1:
        loss = _averaging(optimizer)(loss)
    optimizer.zero_grad(set_to_none=runtime.processes() == 1)
    loss.backward()
    optimizer.step()


def _averaging(optimizer):
    """DistributedDataParallel around an optimizer's parameters, with a forward pass that returns the loss unchanged.

    It does not wrap the networks, because a step of CUT runs a network several times, calls methods other than forward(),
    and sends gradients through a discriminator without training it. It is rebuilt when parameters are frozen or unfrozen.
    Gradients are views of DDP's buckets in the layout of their parameters, so they are never copied.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    ids = [id(p) for p in trained]
    if getattr(optimizer, "averaged_ids", None) != ids:
        optimizer.zero_grad()
        for p in trained:
            p.grad = torch.zeros_like(p)
        identity = torch.nn.Identity()
        identity.trained = torch.nn.ParameterList(trained)
        optimizer.averaging = DistributedDataParallel(identity, init_sync=False, gradient_as_bucket_view=True)
        optimizer.averaged_ids = ids
    return optimizer.averaging


def synchronise_batchnorm(network, device):
    """On CUDA with several processes, let BatchNorm take its training statistics from all processes' batches."""
    if runtime.processes() > 1 and device.type == "cuda":  # torch has it for CUDA only
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network


def load_optimizer(optimizer, state):
    """Load Adam's moments but keep the optimizer's own settings: those saved on a GPU do not fit a CPU, and vice versa.

    The moments are copied into the memory format of their parameters. load_state_dict keeps the format in which they were
    saved; if that differs (CPU and GPU, AVX2 and AVX-512), the fused Adam pairs them with the wrong weights, or fails.
    """
    optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, moments in optimizer.state.items():
        for name in moments.keys() - {"step"}:
            moments[name] = torch.empty_like(parameter).copy_(moments[name])


class GraphedStep:
    """A training step that one GPU replays as a CUDA graph.

    At batch 1 a step is a thousand kernels or more of a few microseconds each, and Python launches them several times more
    slowly than the GPU runs them. After WARM_UP calls the kernels are recorded once; further calls replay them.

    step: takes tensors, always of the same shapes, and returns tensors, alone or in tuples and dicts. Whatever changes from
    call to call must be a tensor that stays in place (the learning rate, too), because numbers are recorded as constants.
    The next call overwrites the results. On a CPU, and with several processes, calls go straight to `step`. CUDA's peak
    memory is reset after WARM_UP calls, in which cuDNN tries its algorithms.
    """

    def __init__(self, step, device):
        self.step, self.device, self.calls, self.graph = step, device, 0, None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and runtime.processes() == 1 else None

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls == WARM_UP + 1 and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if self.stream is None:
            return self.step(*inputs)
        if self.calls <= WARM_UP:  # on the stream on which the graph will be recorded, as CUDA graphs require
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                results = self.step(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return results
        if self.graph is None:
            self.inputs, self.graph = [each.clone() for each in inputs], torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.results = self.step(*self.inputs)
        for kept, new in zip(self.inputs, inputs, strict=True):
            kept.copy_(new)
        self.graph.replay()
        return self.results


def compile_network(network):
    """Compile a network's forward pass, or both halves of a translator's, in place; state_dict stays as it is."""
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # models.reflected_indices
    for name in ("encode", "decode") if hasattr(network, "decode") else ("forward",):
        setattr(network, name, torch.compile(getattr(network, name), dynamic=False))


def translator_layout(device):
    """The memory format in which translators train fastest: channels_last on GPUs and on CPUs with AVX-512.

    With AVX2 alone, oneDNN needs twice as long for the weight gradient of a 3x3 convolution in channels_last. All processes
    take the same format, because DDP adds up gradients as they lie in memory.
    """
    is_slow = device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()
    return torch.contiguous_format if any(runtime.all_gather(is_slow)) else torch.channels_last


class StepClock:
    """Times the phases of training: "step", the "wait" for the next batch, and "other", which is not reported.

    On CUDA, events are recorded, and read only when a row is logged, so that no step waits for the device. "wait" is then the
    time the device idles for a batch: close to zero as long as the host is ahead of it.
    """

    def __init__(self, device):
        self.is_cuda, self.starts = device.type == "cuda", []  # (phase, its start)

    def enter(self, phase):
        """End the current phase and start another."""
        if self.is_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.starts.append((phase, now))

    def read(self):
        """Mean seconds per step, and of waiting per step, since the last call; waits for the device."""
        if self.is_cuda:
            torch.cuda.synchronize()
        seconds = {"step": 0.0, "wait": 0.0, "other": 0.0}
        for (phase, start), (_, end) in itertools.pairwise(self.starts):
            seconds[phase] += start.elapsed_time(end) / 1e3 if self.is_cuda else end - start
        steps = max(1, sum(phase == "step" for phase, _ in self.starts))
        self.starts = self.starts[-1:]
        return seconds["step"] / steps, seconds["wait"] / steps


def peak_memory_mib(device):
    """Peak memory so far in MiB: of tensors on a GPU, of the whole process (resident set) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # getrusage's ru_maxrss starts with the parent's peak
    if not status.is_file():  # macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10


def not_finite(state, name=""):
    """Names of the tensors in nested dicts and lists that hold nan or infinity. Waits for the device once."""
    named = [(key, tensor) for key, tensor in _tensors(state, name) if tensor.is_floating_point() and tensor.numel()]
    # The largest magnitude of all takes a few kernels, and is finite unless one tensor is not: a maximum cannot overflow.
    if torch.nn.utils.get_total_norm([tensor for _, tensor in named], torch.inf).isfinite():
        return []
    return [key for key, tensor in named if not tensor.isfinite().all()]


def _tensors(part, name):
    if isinstance(part, torch.Tensor):
        yield name, part
    elif isinstance(part, (dict, list, tuple)):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
