"""Parts D and E of gpu_check.py: milliseconds per training step, as trained and in variants."""

import functools
import itertools
import re
import statistics
import time

import torch
import torch.nn.functional as F
from gpu_harness import Failed, attempt, isolated, job, record
from steps import METHODS, build, patched

import models
import optimization
import runtime

AS_TRAINED, NO_GRAPH = "bf16, as trained", "bf16, no graph"


def part_d():
    for kind in METHODS:
        time_steps("D", kind, [AS_TRAINED, full_precision()])


def part_d_variants():
    formats = ["bf16, F.pad", "bf16, default layout", "bf16, default layout, F.pad"]
    for kind in ("fastcut_l5", "cyclegan"):
        time_steps("D", kind, [NO_GRAPH, "bf16, twice the side", "bf16, batch 4", *formats])
    for kind in ("fastcut_l5", "cyclegan", "cut"):
        time_steps("D", kind, ["bf16, --compile"])


def part_e():
    time_steps("E", "stage 3", [AS_TRAINED, "bf16, encoder frozen"])
    time_steps("E", "stage 4", [AS_TRAINED])


def part_e_variants():
    for names in (["bf16, depthwise in default layout", "bf16, default layout"], ["bf16, twice the side"]):
        time_steps("E", "stage 3", names)
    for names in ([full_precision(), NO_GRAPH], ["bf16, --compile"]):
        time_steps("E", "stage 3", names)


def full_precision():
    return "float32, as trained" if job.device == "cpu" else "TF32, as trained"


def time_steps(part, kind, names):
    """Time variants of a step in one forked process, and keep the losses of the step as trained for the next call."""
    with attempt(part, f"{kind} {names[0]} and others"):
        job.losses[kind] = isolated(time_variants, part, kind, names, job.losses.get(kind), limit=150)


def time_variants(part, kind, names, expected):
    """Time variants of a step, and compare the losses of their first steps with those of the step as trained.

    expected: those losses by name, or None if they are not known yet. Returns them.
    """
    for name in names:
        with attempt(part, f"{kind} {name}"):
            losses, found = time_variant(part, kind, name)
            if name == AS_TRAINED:
                expected = losses
            elif expected and name.startswith("bf16") and not any(word in name for word in ("frozen", "twice", "batch")):
                off = max(abs(losses[key] - expected[key]) / abs(expected[key]) for key in expected)
                record(part, f"{kind} {name}: losses off by", off, limit=0.05, note="those of the first step")
            note = "; ".join(f"{value} {key}" for key, value in found.items() if key not in ("ms", "most_time"))
            record(part, f"{kind} {name}", found["ms"], "ms", note=note, **found)
    return expected


def time_variant(part, kind, name):
    """Time the variant that `name` describes -> (losses of its first step, what `timed` returns)."""
    device = runtime.pick_device(job.device, tf32=True)
    size, batch = (job.crop, 1) if kind in METHODS else (job.unet_crop, job.batch[kind])
    size, batch = size * (1 + ("twice the side" in name)), 4 if "batch 4" in name else batch  # for their memory
    layout = torch.contiguous_format if ", default layout" in name else None
    with patched(*replacements(name)):
        made = build(kind, device, size, batch, layout=layout, channels=job.channels, encoder=job.encoder)
        if "frozen" in name:
            made.networks["segmenter"].freeze_encoder()
        if "compile" in name:
            for network in made.networks.values():
                optimization.compile_network(network)
        step = functools.partial(made.step, runtime.autocast(device, "bf16" if name.startswith("bf16") else "fp32"))
        if "no graph" not in name:
            step = optimization.GraphedStep(step, device)
        started = time.monotonic()
        losses = {key: loss.item() for key, loss in step(*made.inputs)[1].items()}
        first = time.monotonic() - started
        found = timed(lambda: step(*made.inputs), device)
        if getattr(step, "graph", None):
            note = "losses and weight updates, from the same state"
            record(part, f"{kind} {name}: a replayed step off by", graph_error(made, step), limit=0.05, note=note)
        return losses, found | {"s for the first step": round(first, 1)}


def graph_error(made, graphed):
    """Relative difference between a replayed step and the step itself, from the same state, in losses and weight updates.

    Failed if the graph ignores the learning rate.
    """
    weights = [p.detach() for network in made.networks.values() for p in network.parameters()]
    moments = [optimizer.state_dict()["state"] for optimizer in made.optimizers]
    state = tensors_of([*(network.state_dict() for network in made.networks.values()), *moments])
    saved, results = [tensor.clone() for tensor in state], []
    for step, rate in ((graphed, 0.0), (graphed, 1e-4), (graphed.step, 1e-4)):
        for optimizer in made.optimizers:
            optimization.set_learning_rate(optimizer, rate)
        before = [weight.clone() for weight in weights]
        torch.manual_seed(0)
        losses = torch.stack([loss.detach().float() for loss in step(*made.inputs)[1].values()])
        update = torch.cat([(new - old).flatten() for new, old in zip(weights, before)])
        results.append((losses, update))
        for tensor, kept in zip(state, saved):
            tensor.copy_(kept)
    (_, frozen), replayed, eager = results
    if frozen.abs().max() > 0:
        raise Failed("the graph ignores the learning rate: at rate 0, weights change")
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(replayed, eager))


def tensors_of(part):
    """All tensors in nested dicts and lists."""
    if isinstance(part, torch.Tensor):
        return [part]
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ()
    return [tensor for each in inner for tensor in tensors_of(each)]


# ---------------------------------------------------------------------------------------------------------------------
# Clocks


def timed(step, device):
    """Time a step -> {"ms": median, "s to start": duration of the first steps}; on CUDA also what `profiled` returns."""
    is_cuda, started = device.type == "cuda", time.monotonic()
    for k in range(job.warm_up):
        if is_cuda and k == optimization.WARM_UP - 1:  # one step was taken before; the next one records the graph
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        step()
    if is_cuda:
        torch.cuda.synchronize()
    start, marks, launch = round(time.monotonic() - started, 1), [], []
    for n in range(job.steps + 1):
        marks.append(torch.cuda.Event(enable_timing=True) if is_cuda else time.perf_counter())
        if is_cuda:
            marks[-1].record()
        if n < job.steps:
            launch.append(-time.perf_counter())
            step()
            launch[-1] += time.perf_counter()
    if not is_cuda:
        return {"ms": statistics.median(1e3 * (b - a) for a, b in itertools.pairwise(marks)), "s to start": start}
    torch.cuda.synchronize()
    ms = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    peak = round(torch.cuda.max_memory_allocated() / 2**20)
    found = {"ms": ms, "MiB": peak, "s to start": start, "ms to launch": round(1e3 * min(launch), 2)}
    return found | profiled(step, ms)


def profiled(step, ms, steps=3):
    """Kernels of a step, the fraction of `ms` in which the GPU runs them, and {name: (calls, ms) per step} of the longest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    is_mark = re.compile("(Optimizer|ProfilerStep)[^ ]*#").match  # not a kernel, though listed with them
    ran = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and not is_mark(e.name)]
    times = {}
    for event in ran:
        calls, total = times.get(event.name[:120], (0, 0.0))
        times[event.name[:120]] = calls + 1 / steps, total + event.time_range.elapsed_us() / 1e3 / steps
    kernels = round(sum(not event.name.startswith("Mem") for event in ran) / steps)
    busy = round(sum(total for _, total in times.values()) / ms, 2)
    most = dict(sorted(times.items(), key=lambda item: -item[1][1])[:40])
    return {"kernels": kernels, "of the time busy": busy, "most_time": most}


# ---------------------------------------------------------------------------------------------------------------------
# Variants


def replacements(name):
    """What the variant `name` replaces, as (object, attribute name, replacement)."""
    found = [(models, "reflect_pad", plain_pad)] if "F.pad" in name else []
    if "compile" in name:
        found.append((torch, "compile", functools.partial(torch.compile, backend=job.compiler)))
    if "depthwise" in name:
        found.append((models.DepthwiseConv2d, "_conv_forward", convolve_in_default_layout))
    return found


def plain_pad(x, n):
    return F.pad(x, (n,) * 4, "reflect")


def convolve_in_default_layout(self, x, weight, bias):
    weight = weight.squeeze(1).unsqueeze(1)  # with the default layout's strides; else the weight still asks for channels_last
    y = torch.nn.Conv2d._conv_forward(self, x.contiguous(), weight, bias)
    return y.contiguous(memory_format=torch.channels_last)
