"""Measure what each part of CLADA costs on this machine, compared with a plain implementation or with the usual package.

    python tools/benchmark.py                                   # everything, a quarter of an hour on two cores
    python tools/benchmark.py translators --size 400 --device cuda

Contenders are timed in turn (A B C, A B C, ...). A ratio is the median over the ratios of each turn, so that it stays right on
a machine that slows down for a while. tests/requirements.txt installs pytorch-fid, which the section fid needs.

The *textbook* step of a translator is float32 in the default memory layout, with torch's own instance norm and Adam; CUT and
its variants run the encoder over x (CUT: also over y) a second time for the positives. The textbook step of a task model is
float32 in the default layout with torch's own Adam. The section translators needs 13 GiB. On a CPU, set the MALLOC_ variables
of run_all.sh to measure as it runs: all contenders then keep the memory that they free.
"""

import functools
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["TQDM_DISABLE"] = "1"

import frames
import numpy as np
import scipy.linalg
import torch
from PIL import Image
from steps import METHODS, build, patched
from torch.utils.data import StackDataset

import data
import evaluate
import fid
import loading
import losses
import models
import optimization
import runtime
import train_translator

ROOT = Path(fid.__file__).resolve().parent
UNET_BATCH, UNET_SIZE = 8, (128, 256)


def row(what, *cells):
    print(f"  {what:<58}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


def title(text, *columns):
    print(f"\n{text}")
    row("", *columns)


def compare(contenders, ratios, repeats, device, unit="ms"):
    """Time {name: function} in turn, `repeats` times after one turn to warm up, and print one row for each -> {name: median s}.

    ratios: {name: names that it is compared with}.
    """
    times = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, function in contenders.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    factor = {"ms": 1e3, "s": 1}[unit]
    for name, taken in times.items():
        low, middle, high = (factor * f(taken) for f in (min, statistics.median, max))
        digits = 0 if low > 99 else 2
        row(name, f"{middle:.{digits}f}", f"{low:.{digits}f} to {high:.{digits}f}")
        for other in ratios.get(name, ()):
            ratio = statistics.median(a / b for a, b in zip(taken, times[other], strict=True))
            row(f"    of {other}", f"x {ratio:.3f}")
    return {name: statistics.median(taken) for name, taken in times.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Training steps


def training_step(kind, precision, device, size, batch=1, words=()):
    """A function that takes one step of `kind`, as in steps.build. precision: fp32, bf16 or textbook."""
    if precision != "textbook":
        made = build(kind, device, size, batch, words=words)
    else:
        with patched((train_translator, "adam", torch.optim.Adam), (optimization, "adam", torch.optim.Adam)):
            made = build(kind, device, size, batch, layout=torch.contiguous_format)
        for module in [module for network in made.networks.values() for module in network.modules()]:
            if isinstance(module, models.InstanceNorm2d):
                module.__class__ = torch.nn.InstanceNorm2d
        if kind in train_translator.VARIANTS:
            return lambda: textbook_step(*made.inputs[:2], *train_translator.VARIANTS[kind], **made.parts)
    return functools.partial(made.step, runtime.autocast(device, precision))


def textbook_step(x, y, lambda_x, lambda_y, num_patches, G, D, H, opt_G, opt_D):
    """Equation 4, each term computed from the images."""
    fake = G(x)
    opt_D.zero_grad()
    losses.discriminator_loss(D(y), D(fake.detach())).backward()
    opt_D.step()
    D.requires_grad_(False)
    loss = losses.gan_loss(D(fake), True)
    for weight, real in ((lambda_x, x), (lambda_y, y)):
        if weight > 0:
            translated = fake if real is x else G(real)
            features = G.encode(real)
            locations = models.sample_locations(features, num_patches)
            positives, queries = H(features, locations), H(G.encode(translated), locations)
            loss = loss + weight * sum(map(losses.patch_nce_loss, queries, positives)) / len(queries)
    opt_G.zero_grad()
    loss.backward()
    opt_G.step()
    D.requires_grad_(True)


def translators(args, device):
    title(f"Translator steps, {args.size}x{args.size}, batch 1, 64 channels", "median, ms", "range")
    contenders, ratios = {}, {}
    for method in METHODS:
        for precision in ("textbook", *args.precisions):
            contenders[f"{method} {precision}"] = training_step(method, precision, device, args.size)
        for precision in args.precisions:
            others = [f"{method} textbook"] + [f"cyclegan {precision}"] * (method != "cyclegan")
            ratios[f"{method} {precision}"] = others
    compare(contenders, ratios, args.repeats, device)


def variants(args, device):
    title(f"Steps of FastCUT-L5 with other terms, {args.size}x{args.size}, batch 1, 64 channels", "median, ms", "range")
    precision = args.precisions[-1]
    plain = f"fastcut_l5 {precision}"
    contenders = {plain: training_step("fastcut_l5", precision, device, args.size)}
    for words in ("--num-patches 256", "--lambda-y 1", "--gan-loss vanilla"):
        contenders[words] = training_step("fastcut_l5", precision, device, args.size, words=words.split())
    compare(contenders, {words: [plain] for words in list(contenders)[1:]}, args.repeats, device)


def peak_memory(method, precision, device, size):
    """Peak memory of training steps in MiB, less what the process had before. Must run in a new process."""
    before = optimization.peak_memory_mib(runtime.pick_device(str(device), tf32=True))
    train_translator.POOL_SIZE = 2  # full at once; 50 images would take 38 MiB per pool at 256x256
    step = training_step(method, precision, device, size)
    for turn in range(2):
        for _ in range(optimization.WARM_UP):
            step()
        if turn == 0 and device.type == "cuda":  # the first steps use more: cuDNN tries algorithms, with workspaces
            torch.cuda.reset_peak_memory_stats(device)
    return optimization.peak_memory_mib(device) - (0 if device.type == "cuda" else before)


def memory(args, device):
    title(f"Peak memory of a translator's training, {args.size}x{args.size}, batch 1", "MiB", "of cyclegan's")
    for precision in args.precisions:
        peaks = {}
        for method in METHODS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks[method] = pool.apply(peak_memory, (method, precision, device, args.size))
        for method, peak in peaks.items():
            row(f"{method} {precision}", f"{peak:.0f}", f"x {peak / peaks['cyclegan']:.3f}")


def segmenters(args, device):
    height, width = UNET_SIZE
    title(f"Task model steps, U-Net over EfficientNet-B3, batch {UNET_BATCH} at {height}x{width}", "median, ms", "range")
    for kind in ("stage 3", "stage 4"):
        precisions = ("textbook", *args.precisions)
        contenders = {f"{kind} {p}": training_step(kind, p, device, UNET_SIZE, UNET_BATCH) for p in precisions}
        compare(contenders, {f"{kind} {p}": [f"{kind} textbook"] for p in args.precisions}, args.repeats, device)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def draw(out, size, source, target):
    """Draw a pair of domains with camera noise -> (source folder, target folder)."""
    folders = frames.draw(out, size, source, target)
    frames.add_grain(*folders)
    return folders


def generator_alone(generator, source, skip, device, precision):
    """A function that translates all frames of a data set but the first `skip`, held in memory at width 1024."""
    images = [data.load_at_width(frame.image, 1024) for frame in data.list_frames(source)[skip:]]
    images = [data.to_signed(image)[None].to(device, memory_format=torch.channels_last) for image in images]
    generator.to(device, memory_format=torch.channels_last).eval()

    @torch.inference_mode()
    def translate():
        for image in images:
            with runtime.autocast(device, precision):
                generator(image)

    return translate


def translation(args, device, few=2, many=18):
    precision = args.precisions[-1]
    title(f"Stage 2, frames of 1914x1052 at width 1024, 64 channels, {precision}, 2 turns", "median, s", "range")
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        sources = {n: draw(work / str(n), "1052x1914", n, 1)[0] for n in (few, many)}
        generator, outs = models.ResnetGenerator(), itertools.count()
        (work / "run").mkdir()
        torch.save(models.network_state(generator, 1024), work / "run/weights.pt")

        def stage_2(source):
            command = [sys.executable, ROOT / "translate_dataset.py", "--source", source, "--translator", work / "run"]
            command += ["--out", work / f"out{next(outs)}", "--workers", "2", "--device", str(device), "--precision", precision]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)

        names = {n: f"translate_dataset.py, {n} frames" for n in sources}
        alone = f"the generator alone, {many - few} frames in memory"
        contenders = {alone: generator_alone(generator, sources[many], few, device, precision)}
        contenders |= {names[n]: functools.partial(stage_2, source) for n, source in sources.items()}
        times = compare(contenders, {}, 2, device, "s")
        ratio = (times[names[many]] - times[names[few]]) / times[alone]
        row(f"{many - few} more frames, compared with the generator alone", f"x {ratio:.3f}")


def loading_rate(datasets, workers, repeats):
    """Median samples per second of one or two `data.Crops`, read together."""
    dataset = datasets[0] if len(datasets) == 1 else StackDataset(*datasets)
    rates = []
    for _ in range(repeats):
        batches = loading.batches(dataset, [[i] for i in range(len(dataset))], workers)
        for _ in range(8 * workers):  # until all workers run and every frame is in the cache
            next(batches)
        start = time.perf_counter()
        count = sum(1 for _ in batches)
        rates.append(count / (time.perf_counter() - start))
    return statistics.median(rates)


def loader(args, device):
    title("Samples of frames of 1914x1052 and 2048x1024, at width 1024, plain and from --cache", "samples/s", "per worker")
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        source, _ = draw(work / "game", "1052x1914", 8, 1)
        _, target = draw(work / "street", "1024x2048", 1, 8)
        source, target = data.list_frames(source), data.list_frames(target, labelled=False)
        (work / "cache").mkdir()
        stages = {  # (frames, crop size, labelled) of each data set
            "stage 1, both domains": ((source, 400, False), (target, 400, False)),
            "stage 3, source and label": ((source, 512, True),),
            "stage 4, source and label, target": ((source, 512, True), (target, 512, False)),
        }
        counts = dict.fromkeys((1, len(os.sched_getaffinity(0))))
        for cache, workers, name in itertools.product((None, work / "cache"), counts, stages):
            datasets = [
                data.Crops(listed, 1024, (size, size), 48 * workers, 0, stream, is_labelled, cache)
                for stream, (listed, size, is_labelled) in enumerate(stages[name])
            ]
            rate = loading_rate(datasets, workers, args.repeats)
            name = f"{name}, {workers} worker{'s' * (workers > 1)}{', --cache' * bool(cache)}"
            row(name, f"{rate:.1f}", f"{rate / workers:.1f}")


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def plain_confusion(prediction, label):
    counted = label != 255
    return np.bincount(19 * label[counted].astype(np.int64) + prediction[counted], minlength=361).reshape(19, 19)


def scores(args, device):
    title(f"Confusion matrix of a prediction of 2048x1024, {4 * args.repeats} turns", "median, ms", "range")
    label = torch.randint(19, (1024, 2048), dtype=torch.uint8)
    label[:128] = 255
    prediction = torch.randint(19, (1024, 2048))
    arrays = prediction.numpy(), label.numpy()
    on_device = prediction.to(device), label.to(device)
    contenders = {"numpy.bincount": lambda: plain_confusion(*arrays)}
    contenders["evaluate.confusion_matrix"] = lambda: evaluate.confusion_matrix(*on_device)
    compare(contenders, {"evaluate.confusion_matrix": ["numpy.bincount"]}, 4 * args.repeats, device)


def distance_of_gaussians(args, device):
    title("Frechet distance at 2048 dimensions, 2 turns", "median, s", "range")
    rng, gaussians, values = np.random.default_rng(0), [], {}
    for _ in range(2):
        x = rng.standard_normal((6000, 2048)) * np.linspace(0.1, 1, 2048)
        gaussians += [x.mean(0), np.cov(x, rowvar=False)]

    def plain():
        mu1, sigma1, mu2, sigma2 = gaussians
        root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
        values["plain"] = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)

    def ours():
        values["ours"] = fid.frechet_distance(*gaussians)

    contenders = {"scipy.linalg.sqrtm": plain, "fid.frechet_distance": ours}
    compare(contenders, {"fid.frechet_distance": ["scipy.linalg.sqrtm"]}, 2, device, "s")
    row("the two values", f"{values['plain']:.10g}", f"{values['ours']:.10g}")


def features_of_images(args, device, images=64):
    import pytorch_fid.fid_score
    import pytorch_fid.inception

    title(f"Features of {images} PNGs of 512x256, 2048 dimensions, float32", "median, s", "range")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False  # as in fid.py
    with tempfile.TemporaryDirectory() as work:
        rng, paths, found = np.random.default_rng(0), [Path(work) / f"{i:03d}.png" for i in range(images)], {}
        for path in paths:
            small = Image.fromarray(rng.integers(0, 256, (16, 32, 3), dtype=np.uint8))
            small.resize((512, 256), Image.Resampling.BICUBIC).save(path)
        weights = fid.inception_v3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
        torch.save(weights, Path(work) / "weights.pth")
        with patched((pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: weights)):
            theirs = pytorch_fid.inception.InceptionV3([3]).to(device)
        own = fid.inception(Path(work) / "weights.pth").to(device)

        def pytorch_fids():
            found["theirs"] = pytorch_fid.fid_score.calculate_activation_statistics(paths, theirs, 32, 2048, device, 1)

        def ours():
            found["ours"] = fid.statistics(paths, own, 32, 1)

        contenders = {"pytorch-fid": pytorch_fids, "fid.statistics": ours}
        compare(contenders, {"fid.statistics": ["pytorch-fid"]}, args.repeats, device, "s")
        a, b = (found[name][0] for name in ("ours", "theirs"))
        row("largest difference of a mean, relative to the largest mean", f"{np.abs(a - b).max() / np.abs(b).max():.1e}")


def frechet(args, device):
    distance_of_gaussians(args, device)
    features_of_images(args, device)


SECTIONS = {
    "translators": translators,
    "variants": variants,
    "memory": memory,
    "segmenters": segmenters,
    "translation": translation,
    "loading": loader,
    "scores": scores,
    "fid": frechet,
}


def main():
    parser = runtime.parser(__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--size", type=int, default=256, help="side of the translators' images (default 256)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default 5)")
    help = "(default: fp32, and bf16 where the hardware computes it)"
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), help=help)
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}; choose from {', '.join(SECTIONS)}")
    device = runtime.pick_device(args.device, tf32=True)
    if args.precisions is None:
        args.precisions = list(dict.fromkeys(("fp32", runtime.pick_precision("auto", device))))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    where += f", {torch.backends.cpu.get_cpu_capability()}"
    print(f"torch {torch.__version__}, {device} ({where}); precisions: {', '.join(args.precisions)}; ", end="")
    print(f"{args.repeats} turns unless a title says otherwise")
    for name in args.sections or SECTIONS:
        SECTIONS[name](args, device)


if __name__ == "__main__":
    main()
