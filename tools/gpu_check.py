"""Check on a GPU that the code is right, and measure how fast it is, in under nine minutes.

    python tools/gpu_check.py --device cuda --out runs/gpu                # all parts that fit into --seconds
    python tools/gpu_check.py --device cuda --out runs/gpu --parts D E    # some parts; OUT keeps the other parts' results
    python tools/gpu_check.py --device cpu --tiny --out runs/try          # all of its logic without a GPU, two minutes

Parts, most important first:
    A  outputs, losses and gradients on the device against the CPU; memory formats
    B  run_all.sh at a small scale, twice: the second run must skip everything
    C  stopped, killed and resumed runs against unbroken ones, also between CPU and device; two processes; NCCL
    D  the translators' steps    E  the task model's steps    F  loading    G  two trainers end to end    H  stage 2
    I  FID and scores; last of all, variants of D and E: --compile, no graph, layouts

Results are written as they come: OUT/check.jsonl has one line per result; OUT/check.json has all results, the targets, and
the hours that the paper's experiment would take. The exit status is 1 if a check of correctness FAILED; measurements that
could not be taken or that miss their target do not count.

Work runs in forked processes under time limits. The parent has imported torch, which saves its children the import, but never
touches CUDA, because CUDA does not survive a fork.
"""

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import gpu_compare
import gpu_harness as harness
import gpu_runs
import gpu_scripts
import gpu_steps
import torch
from gpu_harness import job, record

import runtime

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
PARTS = (  # in this order: letter, title, expected seconds, function
    ("A", "the same weights on the CPU and on the device", 75, gpu_compare.part_a),
    ("B", "run_all.sh at a small scale, twice", 150, gpu_runs.part_b),
    ("C", "stopped and resumed runs, several processes", 75, gpu_runs.part_c),
    ("D", "the translators' steps", 40, gpu_steps.part_d),
    ("E", "the task model's steps", 80, gpu_steps.part_e),
    ("F", "loading", 50, gpu_scripts.part_f),
    ("G", "trainers end to end", 50, gpu_scripts.part_g),
    ("H", "stage 2", 30, gpu_scripts.part_h),
    ("I", "FID and scores", 40, gpu_scripts.part_i),
    ("D", "variants of the translators' steps", 90, gpu_steps.part_d_variants),
    ("E", "variants of the task model's steps", 60, gpu_steps.part_e_variants),
)


def describe():
    """The machine in one line: device, cores, versions."""
    device = runtime.pick_device(job.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    driver = Path("/proc/driver/nvidia/version")
    version = driver.read_text().splitlines()[0] if driver.is_file() and device.type == "cuda" else ""
    return f"{name}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, CUDA {torch.version.cuda} {version}"


def parse_args(words):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", required=True, help="cuda, cuda:1, ...; cpu to try this script")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for check.jsonl and check.json")
    letters = list(dict.fromkeys(letter for letter, *_ in PARTS))
    parser.add_argument("--parts", nargs="+", choices=letters, default=letters, help="(default: all)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU")
    help = "time for everything; parts that would not fit are skipped (default 540)"
    parser.add_argument("--seconds", type=float, default=540, help=help)
    return parser.parse_args(words)


def run_parts(args, end):
    """Run the chosen parts until `end`. A part that is expected to take longer than what is left is skipped."""
    record("", "machine", note=harness.isolated(describe, limit=60))
    if set("FGHI") & set(args.parts):
        job.drawing = harness.start(harness.draw_real_pair)
    for letter, what, seconds, function in PARTS:
        started = time.monotonic()
        if letter in args.parts and started + seconds > end:
            record(letter, what, status="skipped", note=f"takes about {seconds} s, {end - started:.0f} s are left")
        elif letter in args.parts:
            job.end = min(end, started + 2 * seconds)
            with harness.attempt(letter, what, is_check=letter in "ABC"):
                function()
            largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
            note = f"largest process so far: {largest:.1f} GiB of main memory"
            record(letter, f"{what}: all of it", time.monotonic() - started, "s", note=note)


def main(words=None):
    args = parse_args(words)
    end, sizes = time.monotonic() + args.seconds, TINY if args.tiny else FULL
    job.__dict__.update(sizes, tiny=args.tiny, device=args.device, out=args.out, pid=os.getpid(), end=end, losses={})
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also for the scripts that it runs
    if args.tiny:  # at tiny sizes threads wait for each other longer than they compute
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    kept = [result for result in harness.recorded() if result["part"] not in ("", *args.parts)]
    (args.out / "check.jsonl").write_text("".join(json.dumps(result) + "\n" for result in kept))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="gpu_check") as work:
        job.work = Path(work)
        try:
            run_parts(args, end)
        except harness.Failed as error:
            sys.exit(f"gpu_check.py: {error}")
        finally:
            for group in list(harness.groups):
                harness.end_group(group)
    return conclude()


def conclude():
    """Print the targets, the hours and the checks that failed -> exit status."""
    summary = harness.write_summary()
    print("\nTargets, for one H100 with 16 cores")
    for each in summary["targets"]:
        measured = "" if each["measured"] is None else f"{each['measured']:.4g}"
        holds = {True: "met", False: "missed", None: "not judged"}[each["holds"]]
        print(f"  {each['what']:<54} {measured:>8}  {each['target']:<9} {holds}")
    print("\nHours of the paper's experiment")
    for what, line in summary["hours"].items():
        print(f"  {what:<54} " + (f"{line['hours']:8.2f}  {line['arithmetic']}" if what != "missing" else line))
    print(f"\n{len(summary['failed'])} checks FAILED", *summary["failed"], sep="\n  ")
    return 1 if summary["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
