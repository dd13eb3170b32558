"""Checks on a GPU that the code is right and measures how fast it is, in under nine minutes.

    python tools/gpu_check.py --device cuda --out runs/gpu                # every part that fits into --seconds
    python tools/gpu_check.py --device cuda --out runs/gpu --parts D E    # some parts; other parts' results in OUT stay
    python tools/gpu_check.py --device cpu --tiny --out runs/try          # all of its logic without a GPU, about two minutes

Parts, in order of worth:
    A  the same weights on the CPU and on the device: outputs, losses, gradients; memory formats
    B  run_all.sh at a small scale, twice: the second run must skip everything
    C  stopped, killed and resumed runs against unbroken ones, also between CPU and device; two processes; NCCL
    D  translator steps    E  task model steps; last of all, both otherwise: without a graph, other layouts, torch.compile
    F  loading    G  two trainers end to end    H  stage 2    I  FID and scores

Results are written as they come: OUT/check.jsonl has one line per result, OUT/check.json all results, the targets, and the
hours that the paper's experiment would take. The exit status is 1 if a check of correctness FAILED. A measurement that could
not be taken, or that misses its target, does not change the status.

Every piece of work runs in a process forked from this one, under a time limit. This process has torch loaded, which saves
its children the import, and never touches CUDA, which does not survive a fork.
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Listener
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import StackDataset

import adapt_features
import data
import fid
import files
import loading
import models
import optimization
import runtime
import train_segmenter
import train_translator

ROOT = Path(runtime.__file__).resolve().parent
METHODS = ("fastcut_l5", "cyclegan", "cut", "fastcut")
FULL = dict(
    channels=64, encoder="efficientnet-b3", compared=128, compared_channels=32, crop=400, unet_crop=512,
    batch={"stage 3": 8, "stage 4": 4}, steps=30, warm_up=8, sizes=("1052x1914", "1024x2048"), width=1024, frames=16,
    workers=(4, 8, 15), loading_seconds=1.2, iterations=300, translated=200, fid_images=1600, compiler="inductor",
)  # fmt: skip
TINY = dict(
    channels=8, encoder="efficientnet-b0", compared=64, compared_channels=8, crop=32, unet_crop=64,
    batch={"stage 3": 2, "stage 4": 2}, steps=2, warm_up=1, sizes=("80x160", "80x160"), width=128, frames=4,
    workers=(1, 2), loading_seconds=0.2, iterations=12, translated=30, fid_images=24, compiler="aot_eager",
)  # fmt: skip
job = SimpleNamespace()  # what main() sets: sizes, device, folders, when the part must end; forked processes inherit it

# ---------------------------------------------------------------------------------------------------------------------
# Results


def record(part, what, value=None, unit="", limit=None, status=None, note="", **details):
    """Append a result to check.jsonl, rewrite check.json, print it. A result with a limit is a check; nan fails it."""
    if status is None:
        status = "measured" if limit is None else "ok" if value <= limit else "FAILED"
    value = str(value) if isinstance(value, float) and not np.isfinite(value) else value
    result = dict(part=part, what=what, value=value, unit=unit, limit=limit, status=status, note=note, **details)
    with open(job.out / "check.jsonl", "a") as file:
        file.write(json.dumps(result) + "\n")
    write_summary()
    print(row(result), flush=True)


def recorded():
    path = job.out / "check.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def write_summary():
    results = recorded()
    failed = [f"{r['part']} {r['what']}" for r in results if r["status"] == "FAILED"]
    summary = {"failed": failed, "targets": targets(results), "hours": hours(results), "results": results}
    files.write_json(job.out / "check.json", summary)
    return summary


def row(result):
    value, limit = result["value"], "" if result["limit"] is None else f"<= {result['limit']:.3g}"
    value = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    line = f"{result['part']:<2}{result['what']:<54}{value:>9} {result['unit']:<10}{limit:<9}{result['status']:<9}"
    return (line + result["note"])[:150]


@contextlib.contextmanager
def attempt(part, what, is_check=False):
    """Record an error raised inside the block, and go on after it."""
    try:
        yield
    except Exception as error:
        record(part, what, status="FAILED" if is_check else "error", note=one_line(error))


def one_line(error):
    name = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
    return (name + files.printable(str(error).strip()))[:400]


TARGETS = (  # for one H100 with 16 cores: name, target, and the result (part, name) that it is compared with
    ("FastCUT-L5, ms per step (paper 170)", "<=", 9, "D", "fastcut_l5 bf16, as it is"),
    ("CUT, ms per step (paper 321)", "<=", 17, "D", "cut bf16, as it is"),
    ("CycleGAN, ms per step (paper 426)", "<=", 24, "D", "cyclegan bf16, as it is"),
    ("FastCUT-L5 / CycleGAN (paper 0.40)", "<=", 0.40, "D", "fastcut_l5 / cyclegan"),
    ("U-Net-B3, ms per step of batch 8 at 512x512", "<=", 22, "E", "stage 3 bf16, as it is"),
    ("stage 1, waiting for data, % of the time", "<=", 10, "G", "stage 1, waiting for data"),
    ("stage 3, waiting for data, % of the time", "<=", 10, "G", "stage 3, waiting for data"),
    ("stage 2, frames of 1024x563 per second", ">=", 80, "H", "stage 2"),
    ("the whole experiment, hours", "<=", 11, "", "hours"),
)
EXPERIMENT = (  # the paper's: name, number of steps or frames, batch size, the result that times a step, the rate of samples
    ("stage 1, CycleGAN", 400_000, 1, ("D", "cyclegan bf16, as it is"), ("F", "stage 1, --cache")),
    ("stage 1, CUT", 400_000, 1, ("D", "cut bf16, as it is"), ("F", "stage 1, --cache")),
    ("stage 1, FastCUT-L5", 400_000, 1, ("D", "fastcut_l5 bf16, as it is"), ("F", "stage 1, --cache")),
    ("stage 3, five models, encoder frozen", 5 * 40_000, 8, ("E", "stage 3 bf16, encoder frozen"), ("F", "stage 3, --cache")),
    ("stage 3, five models, then", 5 * 80_000, 8, ("E", "stage 3 bf16, as it is"), ("F", "stage 3, --cache")),
    ("stage 4, CLADA and control", 2 * 20_000, 4, ("E", "stage 4 bf16, as it is"), ("F", "stage 4, --cache")),
    ("stage 2, three translators", 3 * 24_966, 0, None, ("H", "stage 2")),
    ("FID of source, three translations and target", 4 * 24_966 + 2_975, 0, None, ("I", "FID's features")),
    ("scores of seven models, at stage 2's rate", 7 * 500, 0, None, ("H", "stage 2")),
)


def measured(results):
    return {(r["part"], r["what"]): r["value"] for r in results if r["status"] == "measured"}


def hours(results):
    """Hours of the paper's experiment, part by part with the arithmetic; {"missing": name} if a measurement is missing."""
    values, lines = measured(results), {}
    try:
        for what, count, batch, source, rate in EXPERIMENT:
            if batch:
                step, read = values[source], 1000 * batch / values[rate]
                seconds, why = max(step, read) / 1000, f"x max({step:.2f} ms per step, {read:.2f} ms to read its batch)"
            else:
                seconds, why = 1 / values[rate], f"frames at {values[rate]:.1f} per second"
            lines[what] = {"hours": count * seconds / 3600, "arithmetic": f"{count:,} {why}"}
    except KeyError as error:
        return {"missing": " ".join(error.args[0])}
    return lines | {"total": {"hours": sum(line["hours"] for line in lines.values()), "arithmetic": "their sum"}}


def targets(results):
    """Each target with the measured value and whether it holds: None if nothing was measured, or only tiny sizes."""
    values, table = measured(results), []
    values["", "hours"] = hours(results).get("total", {}).get("hours")
    ours, theirs = (values.get(("D", f"{kind} bf16, as it is")) for kind in ("fastcut_l5", "cyclegan"))
    values["D", "fastcut_l5 / cyclegan"] = ours / theirs if ours and theirs else None
    for what, sign, target, *key in TARGETS:
        value = values.get(tuple(key))
        holds = None if value is None or job.tiny else value <= target if sign == "<=" else value >= target
        table.append({"what": what, "target": f"{sign} {target}", "measured": value, "holds": holds})
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Processes, each under a time limit

FORK = multiprocessing.get_context("fork")
groups = set()  # process groups to end before this process does


class Failed(Exception):
    """Work in another process went wrong; the message says how."""


def start(function, *args, log=os.devnull):
    """Start function(*args) in a process group of its own; its output goes to the file `log` unless that is None."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_work, args=(theirs, log, function, args))
    process.start()
    groups.add(process.pid)
    theirs.close()
    return process, ours


def _work(pipe, log, function, args):
    if os.getppid() == job.pid:
        os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if log:
        for descriptor in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    try:
        answer = function(*args), ""
    except Exception as error:
        if log:
            print(one_line(error), file=sys.stderr)
        pipe.send((None, one_line(error)))
        sys.exit(1)
    pipe.send(answer)


def finish(started, limit=600):
    """Wait for a started function -> (exit status or None if it was too slow, returned value, error or "")."""
    (process, pipe), value, error, end = started, None, "", time.monotonic() + min(limit, left())
    while True:
        is_over = process.exitcode is not None or time.monotonic() > end
        with contextlib.suppress(EOFError):
            if pipe.poll(0.02):
                value, error = pipe.recv()
                process.join(10)
                break
        if is_over:
            break
    status = process.exitcode
    process.kill()
    end_group(process.pid)
    process.join()
    return status, value, error


def end_group(group):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    groups.discard(group)


def left():
    """Seconds until the part must end."""
    return job.end - time.monotonic()


def isolated(function, *args, limit):
    """Return function(*args), run in another process, which may record results. Failed if it raises, dies or is too slow."""
    status, value, error = finish(start(function, *args, log=None), limit)
    if error or status != 0:
        raise Failed(error or ("it took too long" if status is None else f"its process ended with status {status}"))
    return value


def command(*words, limit, **environment):
    """Run a command. Failed, with the last line it printed, if it exits with an error or is too slow."""
    words, log = list(map(str, words)), job.work / f"log{time.monotonic_ns()}"
    status, _, _ = finish(start(os.execvpe, words[0], words, os.environ | environment, log=log), limit)
    if status != 0:
        raise Failed(f"{Path(words[1]).name}: {'it took too long' if status is None else f'status {status}'}: {last_line(log)}")


def last_line(log):
    return (log.read_text(errors="replace").splitlines() or ["it printed nothing"])[-1] if log.is_file() else "no output"


def run_file(path, words, stop=None, prepare=None):
    """Do in a forked process what `python path words` does. stop: (signal, n) sends the signal at the nth row of log.csv."""
    if stop:
        rows = itertools.count(1)

        def hook(event, args):
            if event == "os.rename" and os.fsdecode(args[1]).endswith("log.csv") and next(rows) == stop[1]:
                os.killpg(0, stop[0])

        sys.addaudithook(hook)
    if prepare:
        prepare()
    sys.argv = [str(path), *map(str, words)]
    runpy.run_path(str(path), run_name="__main__")


# ---------------------------------------------------------------------------------------------------------------------
# Data and networks


@functools.cache
def small_pair():
    """Two small labelled domains, as --source and --target for the scripts."""
    draw(job.work / "small", "72x144", 4, 3, 2)
    return ["--source", job.work / "small" / "source", "--target", job.work / "small" / "target"]


@functools.cache
def real_pair():
    """Folders of two domains with frame sizes of GTA5 and Cityscapes, about 1.1 bytes per pixel; drawn since the start."""
    _, folders, error = finish(job.drawing)
    if error or not folders:
        raise Failed(f"no frames: {error or 'drawing them took too long'}")
    return folders


def draw_real_pair():
    draw(job.work / "game", job.sizes[0], job.frames, 1, 1)
    draw(job.work / "street", job.sizes[1], 1, job.frames, 4)
    folders = job.work / "game" / "source", job.work / "street" / "target"
    add_grain([*folders[0].glob("images/*"), *folders[1].glob("leftImg8bit/*/*/*")])
    return folders


def draw(out, size, source, target, val):
    script = ROOT / "demo/make_demo_data.py"
    counts = ["--source-count", source, "--target-count", target, "--val-count", val]
    command(sys.executable, script, out, "--size", size, *counts, limit=60)


def add_grain(paths):
    """Add camera noise, which drawn frames lack and PNG cannot compress."""
    with FORK.Pool(len(os.sched_getaffinity(0))) as pool:
        pool.map(_add_grain, paths)


def _add_grain(path):
    image = np.asarray(Image.open(path))
    grain = np.random.default_rng(0).normal(0, 2.5, (*image.shape[:2], 1))
    Image.fromarray((image + grain).clip(0, 255).astype(np.uint8)).save(path)


def save_network(out, name, photos=()):
    """Save a random network as a finished run. With photos, a UNet is scaled so that it predicts many classes on them."""
    torch.manual_seed(0)
    network = models.UNet(encoder=job.encoder) if name == "UNet" else models.ResnetGenerator(base_channels=job.channels)
    if photos:
        batch = torch.stack([data.to_unit(data.load_at_width(photo, job.width)) for photo in photos])
        with torch.no_grad():
            for module in network.modules():
                module.momentum = 1.0  # BatchNorm's: the statistics of one batch
            network.train()(batch)
            network.head.weight.normal_(0, 5)
            network.head.bias.sub_(network.eval()(batch).mean((0, 2, 3)))
    out.mkdir()
    torch.save(models.network_state(network), out / "weights.pt")
    files.write_json(out / "args.json", {"width": job.width})


def build(kind, device, size, batch=1, dtype=torch.float32, layout=None, channels=None):
    """Networks, optimisers and inputs of a stage, with step(autocast, *inputs) -> (output or None, losses).

    Weights and inputs are drawn on the CPU from one seed, so they are the same for every device, precision and layout.
    """
    torch.manual_seed(0)
    if kind in METHODS:
        layout = layout or runtime.translator_layout(device)
        words = ["--source=.", "--target=.", "--out=.", "--method", kind]
        words += ["--base-channels", str(channels or job.channels)]
        make = train_translator.CycleTranslation if kind == "cyclegan" else train_translator.ContrastiveTranslation
        with mock.patch.object(runtime, "translator_layout", lambda _: layout):
            translation = make(train_translator.parse_args(words), device)
        parts = translation.state
    else:
        layout = layout or torch.channels_last
        parts = {"F": models.UNet(len(data.CLASSES), job.encoder).to(device, memory_format=layout).train()}
        parts["opt_F"] = optimization.adam(parts["F"].parameters(), lr=1e-4)
        parts["D"] = models.FeatureDiscriminator(parts["F"].feature_channels["decoder3"]).to(device)
        parts["opt_D"], gate = optimization.adam(parts["D"].parameters(), lr=1e-4), adapt_features.Gate(0.0, device)
    networks = {name: part.to(dtype) for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    optimizers = [part for part in parts.values() if isinstance(part, torch.optim.Optimizer)]
    images, labels = torch.rand(2, batch, 3, size, size), torch.randint(len(data.CLASSES), (batch, size, size)).to(device)
    x, y = ((2 * images - 1) if kind in METHODS else images).to(device, dtype).unbind()
    x, y = (each.contiguous(memory_format=layout) for each in (x, y))

    def step(autocast, x=x, y=y, labels=labels):
        if kind in METHODS:
            return translation.step(x, y, autocast)
        if kind == "stage 3":
            logits, loss = train_segmenter.training_step(parts["F"], parts["opt_F"], x, labels, autocast)
            return logits, {"task": loss}
        rest = parts["opt_F"], parts["opt_D"], gate, (x, labels, y), "decoder3", 0.1, autocast
        losses = adapt_features.training_step(parts["F"], parts["D"], *rest)
        return None, {name: losses[name] for name in ("task", "D")}

    return SimpleNamespace(step=step, networks=networks, optimizers=optimizers, inputs=(x, y, labels))


def patched(*replacements):
    """Within this, object.name is the replacement, for each (object, name, replacement)."""
    stack = contextlib.ExitStack()
    for replacement in replacements:
        stack.enter_context(mock.patch.object(*replacement))
    return stack


# ---------------------------------------------------------------------------------------------------------------------
# A: the same weights on the CPU and on the device


def part_a():
    isolated(compare_with_cpu, limit=120)


def compare_with_cpu():
    cpu, device = torch.device("cpu"), runtime.pick_device(job.device)
    for kind in (*METHODS, "stage 3", "stage 4"):
        with attempt("A", f"{kind}: comparison", is_check=True):
            exact, own = evaluate_step(kind, cpu, "float64"), evaluate_step(kind, cpu, "bf16")
            for precision in ("float32", "TF32", "bf16"):
                if precision == "TF32" and device.type == "cpu":
                    record("A", f"{kind} {precision}", status="not on this device")
                else:
                    judge(kind, precision, exact, own, evaluate_step(kind, device, precision))
    for kind, part in (("fastcut_l5", "G"), ("stage 3", "F")):
        with attempt("A", f"memory formats, {kind}"):
            record("A", f"memory formats (output/gradient) of {kind}'s {part}", note=memory_formats(kind, device, part))


def judge(kind, precision, exact, own, found):
    """Check relative distances from float64. exact, own, found: results in float64, of the CPU in bf16, and of the device.

    The limit is 1e-3 in float32. In bf16 it is twice the CPU's own distance for gradients, and for outputs and losses the
    larger of that and 5e-2: random U-Nets amplify rounding. TF32 has three more bits than bf16, and no CPU has it: its limits
    are half the CPU's own distance in bf16, and 1e-2.
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
    record("A", f"{kind} {precision}, the worst of {len(exact)}", worst[0], "of limit", 1.0, note=worst[1], distances=distances)


def evaluate_step(kind, device, precision):
    """Output, losses and gradients of a step without weight updates -> {name: float64 tensor on the CPU}.

    Gradients are taken with smooth activations and a squared cycle loss. At the kinks of ReLU and of the absolute value,
    rounding alone changes a gradient by half a percent in float32 and by a third in bf16, which would hide errors.
    """
    runtime.pick_device(str(device), tf32=precision == "TF32")
    dtype = getattr(torch, precision, torch.float32)
    made = build(kind, device, job.compared, 1 if kind in METHODS else 2, dtype, channels=job.compared_channels)
    if "F" in made.networks:  # drop-connect draws other numbers on each device
        encoder = made.networks["F"].encoder
        encoder._global_params = encoder._global_params._replace(drop_connect_rate=0)
    smooth = [
        (F, "relu", lambda x, inplace=False: F.silu(x)),
        (F, "leaky_relu", lambda x, slope, inplace=False: slope * x + (1 - slope) * F.silu(x)),
        (train_translator, "l1", lambda a, b: (models.promoted(a) - models.promoted(b)).square().mean()),
        (optimization, "backward_and_step", lambda optimizer, loss: (optimizer.zero_grad(), loss.backward())),
    ]
    autocast = runtime.autocast(device, "bf16" if precision == "bf16" else "fp32")
    with patched((models, "sample_locations", given_locations)):
        with patched((optimization, "backward_and_step", lambda *_: None)):
            output, losses = made.step(autocast)
        with patched(*smooth):
            made.step(autocast)
    found = ({} if output is None else {"output": output}) | {f"loss {name}": loss for name, loss in losses.items()}
    for name, network in made.networks.items():
        if gradients := [p.grad.flatten() for p in network.parameters() if p.grad is not None]:
            found[f"gradients of {name}"] = torch.cat(gradients)
    return {name: tensor.detach().to("cpu", torch.float64) for name, tensor in found.items()}


def given_locations(features, num_patches):
    return [given_location(f.shape[2] * f.shape[3], num_patches, f.device) for f in features]


@functools.cache  # a graph that is recorded cannot copy from the CPU
def given_location(size, num_patches, device):
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:num_patches].to(device)


def memory_formats(kind, device, part):
    """Memory formats of each block's output and of its gradient, e.g. "stem to head: channels_last/channels_last"."""
    made, seen = build(kind, device, job.compared, 1 if kind in METHODS else 2), {}

    def format_of(x):
        formats = {"channels_last": torch.channels_last, "default": torch.contiguous_format}
        return next((name for name, each in formats.items() if x.is_contiguous(memory_format=each)), "neither")

    def watch(name, module, inputs, output):
        seen.setdefault(name, [format_of(output), "none"])
        if output.requires_grad:
            output.register_hook(lambda gradient: seen[name].__setitem__(1, format_of(gradient)))

    for name, block in made.networks[part].named_modules():
        if name and name.rpartition(".")[0] in ("", "blocks", "encoder._blocks", "decoder"):
            block.register_forward_hook(functools.partial(watch, name))
    made.step(runtime.autocast(device, "bf16"))
    groups = [(key, [name for name, _ in group]) for key, group in itertools.groupby(seen.items(), lambda item: item[1])]
    return ", ".join(f"{names[0]} to {names[-1]}: {'/'.join(key)}" for key, names in groups)


# ---------------------------------------------------------------------------------------------------------------------
# B: everything at a small scale

CLIENT = """
import os, sys
from multiprocessing.connection import Client
if not sys.argv[1].endswith(".py"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with Client({address!r}) as server:
    server.send(sys.argv[1:])
    sys.exit(server.recv())
"""


def serve(address):
    """Run scripts for clients in forked processes, which saves each the 3 s that importing torch takes."""
    with Listener(address) as listener:
        while True:
            with listener.accept() as client:
                path, *words = client.recv()
                status, _, _ = finish(start(run_file, path, words, log=job.work / "all.log"))
                client.send(124 if status is None else status)


def part_b():
    out, address, log = job.work / "all", str(job.work / "server"), job.work / "all.log"
    (job.work / "client.py").write_text(CLIENT.format(python=sys.executable, address=address))
    python = job.work / "python"
    python.write_text(f"#!/bin/sh\nexec '{sys.executable}' -ES '{job.work / 'client.py'}' \"$@\"\n")
    python.chmod(0o755)
    small = f"--device {job.device} --width 128 --log-every 1 --workers 1"
    crops = f"--batch-size 2 --crop-size 64x128 {small}"
    settings = {
        "SOURCE": small_pair()[1], "TARGET": small_pair()[3], "OUT": out, "PYTHON": python, "CACHE": job.work / "resized",
        "SETTINGS": "paper", "METHODS": "fastcut_l5", "FID_WEIGHTS": "random", "ITERATIONS_SCALE": "0.000005",
        "SEED": 0, "NPROC": 1, "EXCLUDE": "", "TRANSLATOR_ARGS": f"--base-channels 8 --crop-size 64 {small}",
        "SEGMENTER_ARGS": f"--encoder efficientnet-b0 --encoder-weights none {crops}", "ADAPT_ARGS": crops,
    }  # fmt: skip
    settings = {name: str(value) for name, value in settings.items()}
    server, begun = start(serve, address, log=log), time.monotonic()
    try:
        command("bash", ROOT / "run_all.sh", limit=left(), **settings)
        results = [f"table{n}.csv" for n in (1, 2, 3)] + ["translations.png", "segmentations.png"]
        missing = [name for name in results if not (out / "results" / name).is_file()]
        before, between = written(out), time.monotonic()
        record("B", "run_all.sh: results missing", len(missing), limit=0, note=f"{between - begun:.0f} s {' '.join(missing)}")
        command("bash", ROOT / "run_all.sh", limit=left(), **settings)
        again = [str(path) for path, changed in before.items() if changed != written(out).get(path)]
        note = f"of {len(before)}; {time.monotonic() - between:.0f} s {' '.join(again[:3])}"
        record("B", "run_all.sh again: files written anew", len(again), limit=0, note=note)
    except Failed as error:
        raise Failed(f"{error}; {last_line(log)}") from None
    finally:
        end_group(server[0].pid)


def written(out):
    """Times at which the files were written that a finished stage must not write again."""
    kept = [path for path in out.rglob("*") if path.suffix in (".pt", ".png", ".npz") and path.parent.name != "results"]
    return {path.relative_to(out): path.stat().st_mtime_ns for path in kept}


# ---------------------------------------------------------------------------------------------------------------------
# C: stopped and resumed runs, several processes

TERM, KILL = (signal.SIGTERM, 3), (signal.SIGKILL, 3)  # sent at the third row of the log
MEASURED = ("seconds_per_iteration", "wait_seconds", "peak_memory_mib")
STATUS = {TERM: 143, KILL: -signal.SIGKILL, None: 0}


def part_c():
    isolated(save_network, job.work / "segmenter", "UNet", limit=30)
    here, exact, fp32 = job.device, "--deterministic", ("--precision", "fp32")
    cases = (  # name, arguments, the device of each leg, how far losses may be off (docs/gpu.md); 0: all tensors are equal
        ("cyclegan, --deterministic", (exact, "--precision", "bf16"), (here, here, here), 0),
        ("cut, --deterministic", (exact,), (here, here, here), 0),
        ("stage 3, --deterministic", (exact,), (here, here, here), 0),
        ("stage 4, --deterministic", (exact,), (here, here, here), 0),
        ("cut, fp32, from the CPU to the device", (exact, *fp32), ("cpu", here), 0.001),
        ("cut, fp32, from the device to the CPU", (exact, *fp32), (here, "cpu"), 0.001),
    )
    problems, draws = {}, functools.partial(setattr, models, "sample_locations", given_locations)
    for leg in range(3):  # all at once
        begun = []
        for name, words, devices, _ in cases:
            out = job.work / name
            prepare = draws if len(set(devices)) > 1 else None  # which each device would draw from its own generator
            if leg == 0:
                begun.append((name, None, train(name, out / "unbroken", devices[0], words, prepare=prepare)))
            if leg < len(devices):
                stop = None if leg + 1 == len(devices) else (TERM, KILL)[leg]
                begun.append((name, stop, train(name, out / "resumed", devices[leg], words, stop, prepare)))
        for name, stop, started in begun:
            if (status := finish(started, 90)[0]) != STATUS[stop]:
                problems[name] = f"leg {leg + 1} ended with status {status}: {last_line(job.work / name / 'log')}"
    for name, _, devices, tolerance in cases:
        with attempt("C", name, is_check=True):
            if name in problems:
                raise Failed(problems[name])
            outs = [job.work / name / run for run in ("unbroken", "resumed")]
            last = 3 + len(devices)  # rows 4, 5 and with three legs 6 are the first ones after a stop
            off, off_at_all, what = log_difference(outs, 4, last), log_difference(outs, 1, 10), f"losses of steps 4 to {last}"
            if tolerance == 0:
                off, what = isolated(tensors_that_differ, outs, limit=30), "tensors that differ"
            record("C", f"{name}: resumed", off, limit=tolerance, note=f"{what}; all losses off by {off_at_all:.1e} at most")
    with attempt("C", "two processes on one device", is_check=True):
        two_processes()
    what = "NCCL, a group of one: gradients off by"
    if here == "cpu":
        record("C", what, status="not on this device")
    else:
        with attempt("C", what, is_check=True):
            record("C", what, isolated(nccl_alone, limit=60), limit=1e-6)


def train(name, out, device, words, stop=None, prepare=None):
    """Start ten steps of the trainer whose stage or method `name` begins with; it saves after every fourth."""
    kind, small = name.partition(",")[0], small_pair()
    if kind == "stage 3":
        script, own = "train_segmenter.py", ["--data", small[1], "--encoder", "efficientnet-b0", "--encoder-weights", "none"]
    elif kind == "stage 4":
        script, own = "adapt_features.py", [*small, "--segmenter", job.work / "segmenter", "--gate", 0]
    else:
        script, own = "train_translator.py", [*small, "--method", kind, "--base-channels", 8]
    own += ["--out", out, "--device", device, "--width", 128, "--crop-size", 64, "--batch-size", 2, "--workers", 1]
    own += ["--iterations", 10, "--log-every", 1, "--save-every", 4]
    out.parent.mkdir(exist_ok=True)
    torch.set_num_threads(1)  # in the processes that start from here: many run at once
    return start(run_file, ROOT / script, [*own, *words], stop, prepare, log=out.parent / "log")


def log_difference(outs, first, last):
    """Largest relative difference of a loss between two logs, from row `first` to row `last`."""
    one, two = (files.read_csv(out / "log.csv")[first - 1 : last] for out in outs)
    losses = one[0].keys() - {"iteration", "lr", *MEASURED, "D_accuracy", "gate_open"}
    return max(abs(float(a[k]) - float(b[k])) / max(abs(float(a[k])), 1e-12) for a, b in zip(one, two) for k in losses)


def tensors_of(part):
    if isinstance(part, torch.Tensor):
        return [part]
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ()
    return [tensor for each in inner for tensor in tensors_of(each)]


def tensors_that_differ(outs):
    """How many tensors of two runs' last checkpoints are not bitwise equal."""
    one, two = (tensors_of(torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)) for out in outs)
    return sum(not torch.equal(a, b) for a, b in zip(one, two, strict=True))


def two_processes():
    """Two processes on one device, over gloo, must have the losses of one process with twice the batch for ten steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for kind, lr in (("cut", 1e-4), ("stage 3", 1e-2)):  # so large that losses tell whether gradients are averaged
        words = ["--precision", "fp32", "--lr", lr]
        outs = [job.work / f"{count} {kind}" / "run" for count in ("one", "two")]
        begun = [(outs[0], train(kind, outs[0], job.device, words, prepare=plain_mathematics))]
        for rank in (0, 1):
            prepare = functools.partial(join_over_gloo, rank, port)
            begun.append((outs[1], train(kind, outs[1], job.device, [*words, "--batch-size", 1], prepare=prepare)))
        for out, started in begun:
            if (status := finish(started, 90)[0]) != 0:
                raise Failed(f"{kind}: status {status}: {last_line(out.parent / 'log')}")
        note = "gloo, DDP" + ", synchronised BatchNorm" * (kind == "stage 3" and job.device != "cpu") + "; float64"
        record("C", f"two processes, {kind}: losses off by", log_difference(outs, 1, 10), limit=1e-5, note=note)
    if job.device == "cpu":
        record("C", "synchronised BatchNorm", status="not on this device")


def plain_mathematics():
    """Make two processes equal to one: float64, SGD, no drop-connect, no void pixels, and on a CPU fixed BatchNorm."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    data.to_unit, data.to_signed = lambda images: images.double() / 255, lambda images: images.double() / 127.5 - 1
    data.TRAIN_IDS[data.TRAIN_IDS == data.VOID] = 0
    optimization.adam = lambda parameters, lr, betas=None: torch.optim.SGD(parameters, lr)
    optimization.GraphedStep = lambda step, device: step  # which would keep SGD's rate as it was

    def mode(self, mode=True):
        torch.nn.Module.train(self, mode)
        self.encoder._global_params = self.encoder._global_params._replace(drop_connect_rate=0)
        for module in self.modules() if job.device == "cpu" else ():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return self

    models.UNet.train = mode


def join_over_gloo(rank, port):
    """Become one of two processes as started by torchrun, but with gloo: NCCL refuses two processes on one card."""
    plain_mathematics()
    numbers = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "check"}
    join = dist.init_process_group
    dist.init_process_group = lambda backend, **options: join("gloo", **options)


def nccl_alone():
    """How far the gradients of a step through DistributedDataParallel, in a group of one, are from those without it."""
    device, gradients = runtime.pick_device(job.device, deterministic=True), []
    meet = f"file://{job.work}/meet"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=meet, rank=0, world_size=1)  # as runtime.py does
    for count in (1, 2):  # optimization.backward_and_step uses DDP if there is more than one process
        made = build("stage 3", device, 64, 2)
        with patched((runtime, "processes", lambda count=count: count)):
            torch.manual_seed(0)
            made.step(runtime.autocast(device, "fp32"))
        gradients.append(torch.cat([p.grad.flatten() for p in made.networks["F"].parameters()]))
    dist.destroy_process_group()
    return ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()


# ---------------------------------------------------------------------------------------------------------------------
# D and E: steps


AS_IT_IS, NO_GRAPH = "bf16, as it is", "bf16, no graph"


def part_d():
    for kind in METHODS:
        time_steps("D", kind, [AS_IT_IS, full_precision()])


def part_d_otherwise():
    others = [NO_GRAPH, "bf16, padding gathered", "bf16, no bias before norms", "bf16, padding gathered, no bias before norms"]
    formats = ["bf16, F.pad", "bf16, default layout", "bf16, default layout, F.pad"]
    for names in (others, formats, ["bf16, torch.compile", "bf16, torch.compile, no graph"]):
        for kind in METHODS[:2]:
            time_steps("D", kind, names)


def part_e():
    time_steps("E", "stage 3", [AS_IT_IS, "bf16, encoder frozen"])
    time_steps("E", "stage 4", [AS_IT_IS])


def part_e_otherwise():
    time_steps("E", "stage 3", [full_precision(), NO_GRAPH, "bf16, depthwise in default layout", "bf16, default layout"])
    time_steps("E", "stage 3", ["bf16, torch.compile"])


def full_precision():
    return "float32, as it is" if job.device == "cpu" else "TF32, as it is"


def time_steps(part, kind, names):
    """Time variants of a step in a process of their own."""
    with attempt(part, f"{kind} {names[0]} and others"):
        job.losses[kind] = isolated(time_variants, part, kind, names, job.losses.get(kind), limit=120)


def time_variants(part, kind, names, expected):
    """Time variants of a step and compare the losses of their first steps with `expected`, those of the step as it is."""
    for name in names:
        with attempt(part, f"{kind} {name}"):
            losses, found = time_variant(part, kind, name)
            if name == AS_IT_IS:
                expected = losses
            elif expected and name.startswith("bf16") and "frozen" not in name:
                off = max(abs(losses[key] - expected[key]) / abs(expected[key]) for key in expected)
                record(part, f"{kind} {name}: losses off by", off, limit=0.05, note="those of the first step")
            note = "; ".join(f"{value} {key}" for key, value in found.items() if key not in ("ms", "most_time"))
            record(part, f"{kind} {name}", found["ms"], "ms", note=note, **found)
    return expected


def time_variant(part, kind, name):
    """Time the variant that `name` describes -> (losses of its first step, what `timed` returns)."""
    device = runtime.pick_device(job.device, tf32=True)
    size, batch = (job.crop, 1) if kind in METHODS else (job.unet_crop, job.batch[kind])
    patches = [(models, "reflect_pad", plain_pad)] * ("F.pad" in name) + [(models, "reflect_pad", strips)] * ("compile" in name)
    patches += [(models, "reflect_pad", GatheredPad.apply)] * ("gathered" in name)
    patches += [(models.DepthwiseConv2d, "forward", in_default_layout(models.DepthwiseConv2d.forward))] * ("depthwise" in name)
    with patched(*patches):
        made = build(kind, device, size, batch, layout=torch.contiguous_format if ", default layout" in name else None)
        if "frozen" in name:
            made.networks["F"].freeze_encoder()
        if "compile" in name:
            compile_networks(made)
        if "no bias" in name:  # which instance norm takes away again
            for module in [module for network in made.networks.values() for module in network.modules()]:
                for conv in (module.block[0], module.block[3]) if isinstance(module, models.ResnetBlock) else ():
                    conv.bias = None
        autocast = runtime.autocast(device, "bf16" if name.startswith("bf16") else "fp32")
        step = functools.partial(made.step, autocast)
        if "no graph" not in name:
            step = optimization.GraphedStep(step, device)
        losses = {key: loss.item() for key, loss in step(*made.inputs)[1].items()}
        found = timed(lambda: step(*made.inputs), device)
        if getattr(step, "graph", None):
            note = "losses and changes of weights, from one state"
            record(part, f"{kind} {name}: a replayed step off by", graph_off(made, step), limit=0.05, note=note)
        return losses, found


def timed(step, device):
    """Median ms of a step, seconds of the first ones; on CUDA also kernels of a step, their share of the time, peak memory."""
    is_cuda, begun = device.type == "cuda", time.monotonic()
    for k in range(job.warm_up):
        if is_cuda and k == optimization.WARM_UP - 1:  # one step has been taken before; a graph is recorded in the next one
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        step()
    if is_cuda:
        torch.cuda.synchronize()
    start, marks, host = round(time.monotonic() - begun, 1), [], []
    for n in range(job.steps + 1):
        marks.append(torch.cuda.Event(enable_timing=True) if is_cuda else time.perf_counter())
        if is_cuda:
            marks[-1].record()
        if n < job.steps:
            host.append(-time.perf_counter())
            step()
            host[-1] += time.perf_counter()
    if not is_cuda:
        return {"ms": statistics.median(1e3 * (b - a) for a, b in itertools.pairwise(marks)), "s to start": start}
    torch.cuda.synchronize()
    ms = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    peak = round(torch.cuda.max_memory_allocated() / 2**20)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    ran = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and "#" not in e.name]
    busy = sum(e.time_range.elapsed_us() for e in ran) / 3e3 / ms
    kernels = round(sum(not e.name.startswith("Mem") for e in ran) / 3)
    times = {}  # by name: how often in a step, and ms together
    for event in ran:
        count, total = times.get(event.name[:120], (0, 0.0))
        times[event.name[:120]] = count + 1 / 3, total + event.time_range.elapsed_us() / 3e3
    most = dict(sorted(times.items(), key=lambda item: -item[1][1])[:40])
    found = {"ms": ms, "kernels": kernels, "of the time busy": round(busy, 2), "MiB": peak, "s to start": start}
    return found | {"ms to launch": round(1e3 * min(host), 2), "most_time": most}


def plain_pad(x, n):
    return F.pad(x, (n,) * 4, "reflect")


def strips(x, n):
    """models.reflect_pad as on CUDA, for any device."""
    return models.ReflectPad2d.apply(x, n) if torch.is_grad_enabled() and x.requires_grad else plain_pad(x, n)


class GatheredPad(torch.autograd.Function):
    """Reflection padding for channels_last as one gather, and its gradient as one gather with sums: 3 kernels instead of 16."""

    @staticmethod
    def forward(ctx, x, n):
        B, C, H, W = ctx.shape = x.shape
        ctx.n = n
        shown, _, _ = mirrored(B, H, W, n, x.device)
        pixels = x.permute(0, 2, 3, 1).reshape(-1, C)
        return pixels.index_select(0, shown).view(B, H + 2 * n, W + 2 * n, C).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, gradient):
        B, C, H, W = ctx.shape
        _, places, starts = mirrored(B, H, W, ctx.n, gradient.device)
        pixels = gradient.permute(0, 2, 3, 1).reshape(-1, C)
        return F.embedding_bag(places, pixels, starts, mode="sum").view(B, H, W, C).permute(0, 3, 1, 2), None


@functools.cache
def mirrored(B, H, W, n, device):
    """The pixel that each padded pixel shows; for each pixel the places where it is shown, in one list, and their starts."""
    numbers = torch.arange(B * H * W, dtype=torch.float64).view(B, 1, H, W)
    shown = F.pad(numbers, (n,) * 4, "reflect").flatten().long()
    counts = shown.bincount(minlength=B * H * W)
    return [each.to(device) for each in (shown, shown.argsort(stable=True), counts.cumsum(0) - counts)]


def in_default_layout(forward):
    return lambda self, x: forward(self, x.contiguous()).contiguous(memory_format=torch.channels_last)


def compile_networks(made):
    for network in made.networks.values():
        for name in ("encode", "decode") if isinstance(network, models.ResnetGenerator) else ("forward",):
            setattr(network, name, torch.compile(getattr(network, name), backend=job.compiler, dynamic=False))


def graph_off(made, graphed):
    """How far a replayed step is from the step itself, taken from the same state: its losses, and the weights' changes."""
    weights = [p.detach() for network in made.networks.values() for p in network.parameters()]
    moments = [optimizer.state_dict()["state"] for optimizer in made.optimizers]
    state = tensors_of([*(network.state_dict() for network in made.networks.values()), *moments])
    before, results = [tensor.clone() for tensor in state], []
    for step, rate in ((graphed, 0.0), (graphed, 1e-4), (graphed.step, 1e-4)):
        for optimizer in made.optimizers:
            optimization.set_learning_rate(optimizer, rate)
        old = [weight.clone() for weight in weights]
        torch.manual_seed(0)
        losses = torch.stack([loss.detach().float() for loss in step(*made.inputs)[1].values()])
        change = torch.cat([(weight - was).flatten() for weight, was in zip(weights, old)])
        results.append((losses, change))
        for tensor, was in zip(state, before):
            tensor.copy_(was)
    (_, frozen), replayed, eager = results
    if frozen.abs().max() > 0:
        raise Failed("the graph ignores the learning rate: at rate 0, weights change")
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(replayed, eager))


# ---------------------------------------------------------------------------------------------------------------------
# F to I: data, and whole scripts


def part_f():
    (job.work / "resized").mkdir(exist_ok=True)
    isolated(loading_rates, [data.list_frames(folder) for folder in real_pair()], limit=120)


def loading_rates(frames):
    for cache, stage in itertools.product((None, job.work / "resized"), ("stage 1", "stage 3", "stage 4")):
        what = f"{stage}, {'--cache' if cache else 'plain'}"
        with attempt("F", what):
            rates = {workers: loading_rate(stage, frames, workers, cache) for workers in job.workers}
            note = "; ".join(f"{rate:.0f} with {workers} workers" for workers, rate in rates.items())
            record("F", what, rates[job.workers[-1]], "samples/s", note=note)


def loading_rate(stage, frames, workers, cache):
    """Samples per second of a stage, loaded as its trainer loads them."""
    size, batch, is_labelled = job.crop if stage == "stage 1" else job.unet_crop, job.batch.get(stage, 1), stage != "stage 1"
    shared = job.width, (size, size), 10**6, 0
    source = data.Crops(frames[0], *shared, stream=0, labelled=is_labelled, cache=cache)
    target = data.Crops(frames[1], *shared, stream=1, cache=cache)
    indices = [range(i, i + batch) for i in range(0, 40_000, batch)]
    dataset = source if stage == "stage 3" else StackDataset(source, target)
    batches = loading.batches(dataset, indices, workers, runtime.pick_device(job.device))
    for _ in range(2 * workers + job.frames // batch):  # the processes have started, and the cache is full
        next(batches)
    begun, count = time.monotonic(), 0
    while time.monotonic() < begun + job.loading_seconds:
        next(batches)
        count += batch
    rate = count / (time.monotonic() - begun)
    batches.close()
    return rate


def part_g():
    source, target = real_pair()
    one = ["train_translator.py", "--source", source, "--target", target, "--method", "fastcut_l5"]
    one += ["--base-channels", job.channels, "--crop-size", job.crop]
    three = ["train_segmenter.py", "--data", source, "--encoder", job.encoder, "--encoder-weights", "none"]
    three += ["--freeze-iterations", job.iterations // 3, "--crop-size", job.unet_crop, "--batch-size", job.batch["stage 3"]]
    common = ["--iterations", job.iterations, "--log-every", job.iterations // 12, "--device", job.device]
    common += ["--width", job.width, "--cache", job.work / "resized"]
    for stage, (script, *own) in (("stage 1", one), ("stage 3", three)):
        with attempt("G", stage):
            out, begun = job.work / f"whole {stage}", time.monotonic()
            command(sys.executable, ROOT / script, *own, *common, "--out", out, limit=120)
            found = files.read_json(out / "summary.json")
            step, wait = found["seconds_per_iteration"], found["wait_seconds"]
            note = f"{job.iterations} steps in {time.monotonic() - begun:.0f} s, start included; {found['peak_memory_mib']} MiB"
            record("G", f"{stage}, a step", 1e3 * step, "ms", note=note)
            record("G", f"{stage}, waiting for data", 100 * wait / (step + wait), "%", note=f"{1e3 * wait:.2f} ms per step")


def part_h():
    isolated(save_network, job.work / "translator", "ResnetGenerator", limit=30)
    frames, many, out = data.list_frames(real_pair()[0]), job.work / "many", job.work / "translated"
    for i in range(job.translated):  # links to few files, which stay in memory: no disk limits the rate
        for folder, path in (("images", frames[i % len(frames)].image), ("labels", frames[i % len(frames)].label)):
            (many / folder).mkdir(parents=True, exist_ok=True)
            (many / folder / f"{i:05d}.png").symlink_to(path)
    begun, words = time.monotonic(), ["--source", many, "--translator", job.work / "translator", "--out", out]
    command(sys.executable, ROOT / "translate_dataset.py", *words, "--device", job.device, limit=90)
    times = sorted(path.stat().st_mtime_ns / 1e9 for path in (out / "images").glob("*.png"))[job.translated // 4 :]
    note = f"the last {len(times)} of {job.translated}; all, start included, in {time.monotonic() - begun:.0f} s"
    record("H", "stage 2", (len(times) - 1) / (times[-1] - times[0]), "frames/s", note=note)


def part_i():
    frames, target = data.list_frames(real_pair()[0]), real_pair()[1]
    images = sorted((job.work / "translated" / "images").glob("*.png")) or [frame.image for frame in frames]
    images = (images * job.fid_images)[: job.fid_images]
    with attempt("I", "FID", is_check=True):
        rate, distance = isolated(fid_rate, images, limit=90)
        record("I", "FID's features", rate, "images/s", note=f"{len(images)} images, start of the reading included")
        record("I", "FID's features, CPU against device: off by", distance, limit=1e-3)
    with attempt("I", "scores", is_check=True):
        val = data.list_frames(target, "val", labelled=False)
        isolated(save_network, job.work / "scored", "UNet", [frame.image for frame in val[:2]], limit=60)
        words, table = ["--segmenter", job.work / "scored", "--data", target, "--out"], job.work / "scores.csv"
        for device in dict.fromkeys(("cpu", job.device)):
            command(sys.executable, ROOT / "evaluate.py", *words, table, "--name", device, "--device", device, limit=90)
        one, *_, two = files.read_csv(table) * 2
        off = max(abs(float(one[k]) - float(two[k])) for k in one if k != "model" and one[k])
        note = f"{len(val)} frames; mIoU {one['mIoU']} on the CPU"
        record("I", "scores, CPU against device: points off", off, limit=0.05, note=note)


def fid_rate(images):
    """(Images per second, relative difference of four images' mean features between the CPU and the device)."""
    device = runtime.pick_device(job.device)
    networks = [fid.inception("random").to(each) for each in ("cpu", device)]
    few, workers = images[:4], runtime.default_workers()
    on_cpu, on_device = (fid.statistics(few, network)[0] for network in networks)
    begun = time.monotonic()
    fid.statistics(images, networks[1], workers=workers)
    return len(images) / (time.monotonic() - begun), np.linalg.norm(on_cpu - on_device) / np.linalg.norm(on_cpu)


# ---------------------------------------------------------------------------------------------------------------------

PARTS = (  # in order of worth: letter, title, seconds that it is expected to take on an H100, function
    ("A", "the same weights on the CPU and on the device", 40, part_a),
    ("B", "run_all.sh at a small scale, twice", 150, part_b),
    ("C", "stopped and resumed, several processes", 60, part_c),
    ("D", "steps of the translators", 40, part_d),
    ("E", "steps of the task model", 50, part_e),
    ("F", "loading", 50, part_f),
    ("G", "trainers end to end", 50, part_g),
    ("H", "stage 2", 20, part_h),
    ("I", "FID and scores", 40, part_i),
    ("D", "steps of the translators otherwise", 60, part_d_otherwise),
    ("E", "steps of the task model otherwise", 60, part_e_otherwise),
)


def describe():
    device = runtime.pick_device(job.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    driver = Path("/proc/driver/nvidia/version")
    version = driver.read_text().splitlines()[0] if driver.is_file() and device.type == "cuda" else ""
    return f"{name}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, CUDA {torch.version.cuda} {version}"


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", required=True, help="cuda, cuda:1, ...; or cpu, to try this script")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for check.jsonl and check.json")
    letters = list(dict.fromkeys(letter for letter, *_ in PARTS))
    parser.add_argument("--parts", nargs="+", choices=letters, default=letters, help="(default: all)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU")
    parser.add_argument(
        "--seconds", type=float, default=540, help="time for everything; a part that would not fit is skipped (540)"
    )
    args = parser.parse_args(words)
    end, sizes = time.monotonic() + args.seconds, TINY if args.tiny else FULL
    job.__dict__.update(sizes, tiny=args.tiny, device=args.device, out=args.out, pid=os.getpid(), end=end, losses={})
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also for scripts that choose their device
    if args.tiny:  # at tiny sizes threads wait for each other longer than they compute
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    kept = [result for result in recorded() if result["part"] not in ("", *args.parts)]
    (args.out / "check.jsonl").write_text("".join(json.dumps(result) + "\n" for result in kept))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="gpu_check") as work:
        job.work = Path(work)
        try:
            record("", "machine", note=isolated(describe, limit=60))
            if set("FGHI") & set(args.parts):
                job.drawing = start(draw_real_pair)
            for letter, what, seconds, function in PARTS:
                begun = time.monotonic()
                if letter in args.parts and begun + seconds > end:
                    note = f"takes about {seconds} s, {end - begun:.0f} are left"
                    record(letter, what, status="skipped", note=note)
                elif letter in args.parts:
                    job.end = min(end, begun + 2 * seconds)
                    with attempt(letter, what, is_check=letter in "ABC"):
                        function()
                    record(letter, f"{what}: all of it", time.monotonic() - begun, "s")
        except Failed as error:
            sys.exit(f"gpu_check.py: {error}")
        finally:
            for group in list(groups):
                end_group(group)
    return conclude()


def conclude():
    """Print all results -> exit status."""
    summary = write_summary()
    print("\nAll results" + "\n".join(["", *map(row, summary["results"])]))
    print("\nTargets, for one H100 with 16 cores")
    for each in summary["targets"]:
        measured = "" if each["measured"] is None else f"{each['measured']:.4g}"
        holds = {True: "holds", False: "missed", None: "not judged"}[each["holds"]]
        print(f"  {each['what']:<54} {measured:>8}  {each['target']:<9} {holds}")
    print("\nHours of the paper's experiment")
    for what, line in summary["hours"].items():
        print(f"  {what:<54} " + (f"{line['hours']:8.2f}  {line['arithmetic']}" if what != "missing" else line))
    print(f"\n{len(summary['failed'])} checks FAILED", *summary["failed"], sep="\n  ")
    return 1 if summary["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
