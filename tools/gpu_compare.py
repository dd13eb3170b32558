"""Part A of gpu_check.py: the same weights give the same outputs, losses and gradients on the CPU and on the device."""

import functools
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from gpu_harness import attempt, isolated, job, record, start, value_of
from steps import METHODS, build, patched

import adapt_features
import losses
import models
import runtime
import train_segmenter
import train_translator


def part_a():
    """Compare each kind of step in a process of its own; they run side by side."""
    running = {kind: start(compare_with_cpu, kind, log=None) for kind in (*METHODS, "stage 3", "stage 4")}
    for kind, process in running.items():
        with attempt("A", f"{kind}: comparison", is_check=True):
            for precision, used, note, distances in value_of(process, limit=120):
                record("A", f"{kind} {precision}, the worst", used, "of limit", 1.0, note=note, distances=distances)
            if job.device == "cpu":
                record("A", f"{kind} TF32", status="not on this device")
    for kind, network in (("fastcut_l5", "G"), ("stage 3", "segmenter")):
        with attempt("A", f"memory formats, {kind}"):
            what = f"memory formats (output/gradient), {kind}, {network}"
            record("A", what, note=isolated(memory_formats, kind, network, limit=60))


def compare_with_cpu(kind):
    """-> for each precision of the device: its name, and what `judge` returns."""
    torch.set_num_threads(max(1, torch.get_num_threads() // 6))
    cpu, device = torch.device("cpu"), runtime.pick_device(job.device)
    exact, own = evaluate_step(kind, cpu, "float64"), evaluate_step(kind, cpu, "bf16")
    precisions = ("float32", "bf16") if device.type == "cpu" else ("float32", "TF32", "bf16")
    return [(each, *judge(each, exact, own, evaluate_step(kind, device, each))) for each in precisions]


def judge(precision, exact, own, found):
    """Judge relative distances from float64. exact, own, found: results in float64, of the CPU in bf16, and of the device.

    Returns (largest distance as a part of its limit, that distance in words, all distances and limits by name).

    The limit is 1e-3 in float32. In bf16 it is twice the CPU's own distance for gradients, and the larger of that and 5e-2 for
    outputs and losses, because random U-Nets amplify rounding. TF32 has three more bits than bf16, and CPUs do not have it: its
    limits are half of the CPU's own distance in bf16, and 1e-2.
    """
    tolerance, share = {"float32": (1e-3, 0), "TF32": (1e-2, 0.5), "bf16": (5e-2, 2)}[precision]
    worst, distances = (-1.0, ""), {}
    for name, reference in exact.items():
        distance, own_distance = (((a[name] - reference).norm() / reference.norm()).item() for a in (found, own))
        is_gradient = name.startswith("gradients") and share
        limit = share * own_distance if is_gradient else max(tolerance, share * own_distance)
        used = distance / limit if np.isfinite(distance) else float("inf")
        worst = max(worst, (used, f"{name} {distance:.1e} of {limit:.1e}"))
        distances[name] = {"distance": distance, "limit": limit}
    return *worst, distances


def evaluate_step(kind, device, precision):
    """Output, losses and gradients of a step without weight updates -> {name: float64 tensor on the CPU}.

    Gradients are taken with smooth activations and a squared cycle loss: at the kinks of ReLU and of the absolute value,
    rounding alone changes a gradient by half a percent in float32 and by a third in bf16, which would hide errors.
    """
    runtime.pick_device(str(device), tf32=precision == "TF32")
    dtype = getattr(torch, precision, torch.float32)
    options = dict(batch=1 if kind in METHODS else 2, dtype=dtype, channels=job.compared_channels, encoder=job.encoder)
    made = build(kind, device, job.compared, **options)
    if "segmenter" in made.networks:  # drop-connect draws different numbers on each device
        encoder = made.networks["segmenter"].encoder
        encoder._global_params = encoder._global_params._replace(drop_connect_rate=0)
    smooth = [
        (F, "relu", lambda x, inplace=False: F.silu(x)),
        (F, "leaky_relu", lambda x, slope, inplace=False: slope * x + (1 - slope) * F.silu(x)),
        (train_translator, "l1_loss", squared_loss),
        *instead_of_updates(lambda optimizer, loss: (optimizer.zero_grad(), loss.backward())),
    ]
    autocast = runtime.autocast(device, "bf16" if precision == "bf16" else "fp32")
    with patched((models, "sample_locations", given_locations)):
        with patched(*instead_of_updates(lambda optimizer, loss: None)):
            output, step_losses = made.step(autocast)
        with patched(*smooth):
            made.step(autocast)
    found = ({} if output is None else {"output": output}) | {f"loss {name}": loss for name, loss in step_losses.items()}
    for name, network in made.networks.items():
        if gradients := [p.grad.flatten() for p in network.parameters() if p.grad is not None]:
            found[f"gradients of {name}"] = torch.cat(gradients)
    return {name: tensor.detach().to("cpu", torch.float64) for name, tensor in found.items()}


def instead_of_updates(function):
    """Replacements of backward_and_step in every trainer by function(optimizer, loss)."""
    return [(trainer, "backward_and_step", function) for trainer in (train_translator, train_segmenter, adapt_features)]


def squared_loss(a, b):
    return (losses.at_least_float32(a) - losses.at_least_float32(b)).square().mean()


def given_locations(features, num_patches):
    """models.sample_locations with the same locations on every device."""
    return [given_location(f.shape[2] * f.shape[3], num_patches, f.device) for f in features]


@functools.cache  # a graph cannot record a copy from the CPU
def given_location(size, num_patches, device):
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:num_patches].to(device)


def memory_formats(kind, network):
    """Memory formats of each block's output and of its gradient, e.g. "stem to head: channels_last/channels_last"."""
    device, batch = runtime.pick_device(job.device), 1 if kind in METHODS else 2
    made, seen = build(kind, device, job.compared, batch, channels=job.channels, encoder=job.encoder), {}

    def format_of(x):
        formats = {"channels_last": torch.channels_last, "default": torch.contiguous_format}
        return next((name for name, each in formats.items() if x.is_contiguous(memory_format=each)), "neither")

    def watch(name, module, inputs, output):
        seen.setdefault(name, [format_of(output), "none"])
        if output.requires_grad:
            output.register_hook(lambda gradient: seen[name].__setitem__(1, format_of(gradient)))

    for name, block in made.networks[network].named_modules():
        if name and name.rpartition(".")[0] in ("", "blocks", "encoder._blocks", "decoder"):
            block.register_forward_hook(functools.partial(watch, name))
    made.step(runtime.autocast(device, "bf16"))
    groups = [(key, [name for name, _ in group]) for key, group in itertools.groupby(seen.items(), lambda item: item[1])]
    return ", ".join(f"{names[0]} to {names[-1]}: {'/'.join(key)}" for key, names in groups)
