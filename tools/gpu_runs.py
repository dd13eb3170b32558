"""Parts B and C of gpu_check.py: run_all.sh at a small scale; stopped and resumed runs; several processes."""

import functools
import os
import signal
import socket
import sys
import time
from multiprocessing.connection import Listener

import gpu_harness as harness
import torch
import torch.distributed as dist
from gpu_compare import given_locations
from gpu_harness import Failed, attempt, finish, isolated, job, record, start
from gpu_scripts import save_network
from gpu_steps import tensors_of
from steps import build, patched

import data
import files
import models
import optimization
import runtime

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
    """Run scripts for clients in forked processes, which saves each of them the 3 s that importing torch takes."""
    with Listener(address) as listener:
        while True:
            with listener.accept() as client:
                path, *words = client.recv()
                status, _, _ = finish(start(harness.run_file, path, words, log=job.work / "all.log"))
                client.send(124 if status is None else status)


def small_experiment(out):
    """The environment of run_all.sh: the paper's experiment, tiny, with PYTHON a client of `serve`. -> (variables, address)."""
    address, python = str(job.work / "server"), job.work / "python"
    (job.work / "client.py").write_text(CLIENT.format(python=sys.executable, address=address))
    python.write_text(f"#!/bin/sh\nexec '{sys.executable}' -ES '{job.work / 'client.py'}' \"$@\"\n")
    python.chmod(0o755)
    source, target = harness.small_pair()
    small = f"--device {job.device} --width 128 --log-every 1 --workers 1"
    crops = f"--batch-size 2 --crop-size 64x128 {small}"
    variables = {
        "SOURCE": source, "TARGET": target, "OUT": out, "PYTHON": python, "CACHE": job.work / "resized",
        "SETTINGS": "paper", "METHODS": "fastcut_l5", "FID_WEIGHTS": "random", "ITERATIONS_SCALE": "0.000005",
        "SEED": 0, "NPROC": 1, "EXCLUDE": "", "TRANSLATOR_ARGS": f"--base-channels 8 --crop-size 64 {small}",
        "SEGMENTER_ARGS": f"--encoder efficientnet-b0 --encoder-weights none {crops}", "ADAPT_ARGS": crops,
    }  # fmt: skip
    return {name: str(value) for name, value in variables.items()}, address


def part_b():
    out, log = job.work / "all", job.work / "all.log"
    variables, address = small_experiment(out)
    server, started = start(serve, address, log=log), time.monotonic()
    try:
        harness.command("bash", harness.ROOT / "run_all.sh", limit=harness.left(), **variables)
        results = [f"table{n}.csv" for n in (1, 2, 3)] + ["translations.png", "segmentations.png"]
        missing = [name for name in results if not (out / "results" / name).is_file()]
        before, between = written(out), time.monotonic()
        record("B", "run_all.sh: results missing", len(missing), limit=0, note=f"{between - started:.0f} s {' '.join(missing)}")
        harness.command("bash", harness.ROOT / "run_all.sh", limit=harness.left(), **variables)
        after = written(out)
        again = [str(path) for path, changed in before.items() if changed != after.get(path)]
        note = f"of {len(before)}; {time.monotonic() - between:.0f} s {' '.join(again[:3])}"
        record("B", "run_all.sh again: files written again", len(again), limit=0, note=note)
    except Failed as error:
        raise Failed(f"{error}; {harness.last_line(log)}") from None
    finally:
        harness.end_group(server[0].pid)


def written(out):
    """Modification times of the files that a second run must not write again."""
    kept = [path for path in out.rglob("*") if path.suffix in (".pt", ".png", ".npz") and path.parent.name != "results"]
    return {path.relative_to(out): path.stat().st_mtime_ns for path in kept}


# ---------------------------------------------------------------------------------------------------------------------
# C: stopped and resumed runs, several processes

TERM, KILL = (signal.SIGTERM, 3), (signal.SIGKILL, 3)  # sent at the third row of the log
MEASURED = ("seconds_per_iteration", "wait_seconds", "peak_memory_mib")
STATUS = {TERM: 143, KILL: -signal.SIGKILL, None: 0}
NCCL = "NCCL, a group of one: gradients off by"


def part_c():
    isolated(save_network, job.work / "segmenter", "UNet", limit=30)
    here, exact, fp32 = job.device, "--deterministic", ("--precision", "fp32")
    cases = (  # name, arguments, the device of each leg, tolerance of losses (docs/gpu.md); 0: all tensors must be equal
        ("cyclegan, --deterministic", (exact, "--precision", "bf16"), (here, here, here), 0),
        ("cut, --deterministic", (exact,), (here, here, here), 0),
        ("stage 3, --deterministic", (exact,), (here, here, here), 0),
        ("stage 4, --deterministic", (exact,), (here, here, here), 0),
        ("cut, fp32, from the CPU to the device", (exact, *fp32), ("cpu", here), 0.01),  # TF32
        ("cut, fp32, from the device to the CPU", (exact, *fp32), (here, "cpu"), 0.01),
    )
    problems = run_legs(cases)
    for name, _, devices, tolerance in cases:
        with attempt("C", name, is_check=True):
            if name in problems:
                raise Failed(problems[name])
            compare_resumed(name, len(devices), tolerance)
    with attempt("C", "two processes on one device", is_check=True):
        two_processes()
    if here == "cpu":
        record("C", NCCL, status="not on this device")
    else:
        with attempt("C", NCCL, is_check=True):
            record("C", NCCL, isolated(nccl_alone, limit=60), limit=1e-6)


def run_legs(cases):
    """Train each case unbroken, and in legs that SIGTERM, then SIGKILL, end -> {name: problem}. Cases run side by side."""
    problems, same_draws = {}, functools.partial(setattr, models, "sample_locations", given_locations)
    for leg in range(3):
        running = []
        for name, words, devices, _ in cases:
            out = job.work / name
            prepare = same_draws if len(set(devices)) > 1 else None  # devices draw different random numbers
            if leg == 0:
                running.append((name, None, train(name, out / "unbroken", devices[0], words, prepare=prepare)))
            if leg < len(devices):
                stop = None if leg + 1 == len(devices) else (TERM, KILL)[leg]
                running.append((name, stop, train(name, out / "resumed", devices[leg], words, stop, prepare)))
        for name, stop, process in running:
            if (status := finish(process, 90)[0]) != STATUS[stop]:
                problems[name] = f"leg {leg + 1} ended with status {status}: {harness.last_line(job.work / name / 'log')}"
    return problems


def compare_resumed(name, legs, tolerance):
    """Record how far a resumed run is from the unbroken one."""
    outs = [job.work / name / run for run in ("unbroken", "resumed")]
    last = 3 + legs  # rows 4, 5 and, with three legs, 6 are the first ones after a stop
    off, off_at_all, what = log_difference(outs, 4, last), log_difference(outs, 1, 10), f"losses of steps 4 to {last}"
    if tolerance == 0:
        off, what = isolated(tensors_that_differ, outs, limit=30), "tensors that differ"
    record("C", f"{name}: resumed", off, limit=tolerance, note=f"{what}; all losses off by {off_at_all:.1e} at most")


def train(name, out, device, words, stop=None, prepare=None):
    """Start ten steps of the trainer whose stage or method `name` starts with; a checkpoint is saved after every fourth."""
    kind, (source, target) = name.partition(",")[0], harness.small_pair()
    pair = ["--source", source, "--target", target]
    if kind == "stage 3":
        script, own = "train_segmenter.py", ["--data", source, "--encoder", "efficientnet-b0", "--encoder-weights", "none"]
    elif kind == "stage 4":
        script, own = "adapt_features.py", [*pair, "--segmenter", job.work / "segmenter", "--gate", 0, "--head-start", 5]
    else:
        script, own = "train_translator.py", [*pair, "--method", kind, "--base-channels", 8]
    own += ["--out", out, "--device", device, "--width", 128, "--crop-size", 64, "--batch-size", 2, "--workers", 1]
    own += ["--iterations", 10, "--log-every", 1, "--save-every", 4]
    out.parent.mkdir(exist_ok=True)
    torch.set_num_threads(1)  # inherited by the processes started here, many of which run at once
    return start(harness.run_file, harness.ROOT / script, [*own, *words], stop, prepare, log=out.parent / "log")


def log_difference(outs, first, last):
    """Largest relative difference of a loss between two runs' log.csv, from row `first` to row `last`."""
    one, two = (files.read_csv(out / "log.csv")[first - 1 : last] for out in outs)
    losses = one[0].keys() - {"iteration", "lr", *MEASURED, "D_accuracy", "gate_open"}
    return max(abs(float(a[k]) - float(b[k])) / max(abs(float(a[k])), 1e-12) for a, b in zip(one, two) for k in losses)


def tensors_that_differ(outs):
    """How many tensors of two runs' last checkpoints are not bitwise equal."""
    one, two = (tensors_of(torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)) for out in outs)
    return sum(not torch.equal(a, b) for a, b in zip(one, two, strict=True))


def two_processes():
    """For ten steps, two processes on one device (over gloo) must have the losses of one process with twice the batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for kind, lr in (("cut", 1e-4), ("stage 3", 1e-2)):  # large enough for losses to tell whether gradients are averaged
        words = ["--precision", "fp32", "--lr", lr]
        outs = [job.work / f"{count} {kind}" / "run" for count in ("one", "two")]
        running = [(outs[0], train(kind, outs[0], job.device, words, prepare=plain_mathematics))]
        for rank in (0, 1):
            prepare = functools.partial(join_over_gloo, rank, port)
            running.append((outs[1], train(kind, outs[1], job.device, [*words, "--batch-size", 1], prepare=prepare)))
        for out, process in running:
            if (status := finish(process, 90)[0]) != 0:
                raise Failed(f"{kind}: status {status}: {harness.last_line(out.parent / 'log')}")
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
    optimization.GraphedStep = lambda step, device: step  # a graph would ignore changes of SGD's learning rate

    def mode(self, mode=True):
        torch.nn.Module.train(self, mode)
        self.encoder._global_params = self.encoder._global_params._replace(drop_connect_rate=0)
        for module in self.modules() if job.device == "cpu" else ():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return self

    models.UNet.train = mode


def join_over_gloo(rank, port):
    """Become one of two processes as torchrun starts them, but with gloo: NCCL refuses two processes on one card."""
    plain_mathematics()
    numbers = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "check"}
    join = dist.init_process_group
    dist.init_process_group = lambda backend, **options: join("gloo", **options)


def nccl_alone():
    """Relative difference of a step's gradients through DistributedDataParallel, in a group of one, from those without it."""
    device, gradients = runtime.pick_device(job.device, deterministic=True), []
    meet = f"file://{job.work}/meet"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=meet, rank=0, world_size=1)  # as runtime.py does
    for count in (1, 2):  # optimization.backward_and_step uses DDP if there is more than one process
        made = build("stage 3", device, 64, 2, encoder=job.encoder)
        with patched((runtime, "processes", lambda count=count: count)):
            torch.manual_seed(0)
            made.step(runtime.autocast(device, "fp32"))
        gradients.append(torch.cat([p.grad.flatten() for p in made.networks["segmenter"].parameters()]))
    dist.destroy_process_group()
    return ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
