"""Parts F to I of gpu_check.py: loading, the trainers end to end, stage 2, FID and scores."""

import itertools
import sys
import time

import numpy as np
import torch
from gpu_harness import ROOT, attempt, command, isolated, job, real_pair, record
from torch.utils.data import StackDataset

import data
import fid
import files
import loading
import models
import runtime


def save_network(out, name, photos=()):
    """Save a random network as a finished run. With photos, a UNet is scaled so that it predicts many classes on them."""
    torch.manual_seed(0)
    network = models.UNet(encoder=job.encoder) if name == "UNet" else models.ResnetGenerator(base_channels=job.channels)
    if photos:
        batch = torch.stack([data.to_unit(data.load_at_width(photo, job.width)) for photo in photos])
        with torch.no_grad():
            for module in network.modules():
                module.momentum = 1.0  # BatchNorm takes the statistics of this batch
            network.train()(batch)
            network.head.weight.normal_(0, 5)
            network.head.bias.sub_(network.eval()(batch).mean((0, 2, 3)))
    out.mkdir()
    torch.save(models.network_state(network, job.width), out / "weights.pt")


# ---------------------------------------------------------------------------------------------------------------------
# F: loading


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
    for _ in range(2 * workers + job.frames // batch):  # until all workers run and the cache is full
        next(batches)
    started, count = time.monotonic(), 0
    while time.monotonic() < started + job.loading_seconds:
        next(batches)
        count += batch
    rate = count / (time.monotonic() - started)
    batches.close()
    return rate


# ---------------------------------------------------------------------------------------------------------------------
# G to I: whole scripts


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
            out, started = job.work / f"whole {stage}", time.monotonic()
            command(sys.executable, ROOT / script, *own, *common, "--out", out, limit=120)
            found = files.read_json(out / "summary.json")
            step, wait, peak = (found[key] for key in ("seconds_per_iteration", "wait_seconds", "peak_memory_mib"))
            note = f"{job.iterations} steps in {time.monotonic() - started:.0f} s, start included; {peak} MiB"
            record("G", f"{stage}, a step", 1e3 * step, "ms", note=note)
            record("G", f"{stage}, waiting for data", 100 * wait / (step + wait), "%", note=f"{1e3 * wait:.2f} ms per step")


def part_h():
    isolated(save_network, job.work / "translator", "ResnetGenerator", limit=30)
    frames, many = data.list_frames(real_pair()[0]), job.work / "many"
    for i in range(job.translated):  # links to a few files, which stay in memory, so that the disk does not limit the rate
        for folder, path in (("images", frames[i % len(frames)].image), ("labels", frames[i % len(frames)].label)):
            (many / folder).mkdir(parents=True, exist_ok=True)
            (many / folder / f"{i:05d}.png").symlink_to(path)
    words = ["--source", many, "--translator", job.work / "translator", "--cache", job.work / "kept", "--device", job.device]
    for what in ("stage 2, while the cache fills", "stage 2"):  # in run_all.sh, stages 1 and 3 have filled it
        started, out = time.monotonic(), job.work / ("translated" if what == "stage 2" else "translated at first")
        command(sys.executable, ROOT / "translate_dataset.py", *words, "--out", out, limit=90)
        times = sorted(path.stat().st_mtime_ns / 1e9 for path in (out / "images").glob("*.png"))[job.translated // 4 :]
        note = f"the last {len(times)} of {job.translated}; all, start included, in {time.monotonic() - started:.0f} s"
        record("H", what, (len(times) - 1) / (times[-1] - times[0]), "frames/s", note=note)


def part_i():
    frames, target = data.list_frames(real_pair()[0]), real_pair()[1]
    images = sorted((job.work / "translated" / "images").glob("*.png")) or [frame.image for frame in frames]
    images = (images * job.fid_images)[: job.fid_images]
    with attempt("I", "FID", is_check=True):
        rate, distance = isolated(fid_rate, images, limit=90)
        record("I", "FID's features", rate, "images/s", note=f"{len(images)} images, start of the workers included")
        record("I", "FID's features, CPU against device: off by", distance, limit=1e-3)
    with attempt("I", "scores", is_check=True):
        compare_scores(target)


def fid_rate(images):
    """(Images per second, relative difference of four images' mean features between the CPU and the device)."""
    device = runtime.pick_device(job.device)
    networks = [fid.inception("random").to(each) for each in ("cpu", device)]
    on_cpu, on_device = (fid.statistics(images[:4], network)[0] for network in networks)
    started = time.monotonic()
    fid.statistics(images, networks[1], workers=runtime.default_workers())
    return len(images) / (time.monotonic() - started), np.linalg.norm(on_cpu - on_device) / np.linalg.norm(on_cpu)


def compare_scores(target):
    """Record how far evaluate.py's scores on the CPU and on the device are apart, in percentage points."""
    val = data.list_frames(target, "val", labelled=False)
    isolated(save_network, job.work / "scored", "UNet", [frame.image for frame in val[:2]], limit=60)
    words, table = ["--segmenter", job.work / "scored", "--data", target, "--out"], job.work / "scores.csv"
    for device in dict.fromkeys(("cpu", job.device)):
        command(sys.executable, ROOT / "evaluate.py", *words, table, "--name", device, "--device", device, limit=90)
    one, *_, two = files.read_csv(table) * 2
    off = max(abs(float(one[k]) - float(two[k])) for k in one if k != "model" and one[k])
    note = f"{len(val)} frames; mIoU {one['mIoU']} on the CPU"
    record("I", "scores, CPU against device: points off", off, limit=0.05, note=note)
