"""What each part of CLADA costs on a machine, beside the same mathematics done plainly or by the package others use.

    python tools/benchmark.py                                   # everything, a quarter of an hour on two cores
    python tools/benchmark.py translators --size 400 --device cuda

Sections: translators, variants, memory, segmenters, translation, loading, scores, fid. What a row is compared with runs in
turn with it (A B C, A B C, ...), and a ratio is the median of the ratios within each turn, so that a machine that slows down
for a while does not fool it. By hand, not by pytest; tests/requirements.txt brings pytorch-fid.

The *textbook* step of a translator is float32 in the default memory layout, with torch's own instance norm and Adam as they
come, and, for CUT and its kin, a second pass of the encoder over x (CUT: and over y) for the positives. The textbook step of
a task model is float32 in the default layout with torch's own Adam; the network is the same. On a CPU both run in processes of
their own, in which nobody has told the C library to keep memory, as runtime.py and fid.py do; what else is compared (scipy,
pytorch-fid) has the good of that, too. The translators' section takes 13 GiB.
"""

import argparse
import contextlib
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

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from torch.utils.data import StackDataset

import adapt_features
import data
import evaluate
import fid
import loading
import models
import optimization
import runtime
import train_segmenter
import train_translator
import training

ROOT = Path(fid.__file__).resolve().parent
METHODS = ("cyclegan", "cut", "fastcut", "fastcut_l5")
UNET_BATCH, UNET_SIZE = 8, (128, 256)


class Elsewhere:
    """make(*args)() in another process, each time this is called."""

    def __init__(self, make, *args):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, make, args), daemon=True).start()
        theirs.close()  # so that the end of that process is seen here
        self.pipe.recv()

    def __call__(self):
        self.pipe.send(None)
        self.pipe.recv()


def _serve(pipe, make, args):
    function = make(*args)
    pipe.send(None)
    with contextlib.suppress(EOFError):  # until the one who asks is gone
        while True:
            pipe.recv()
            function()
            pipe.send(None)


def textbook(make, *args, device):
    """A textbook step: on a CPU in a process of its own, on a GPU, whose memory torch handles, here."""
    return Elsewhere(make, *args) if device.type == "cpu" else make(*args)


def row(what, *cells):
    print(f"  {what:<58}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


def title(text, *columns):
    print(f"\n{text}")
    row("", *columns)


def compare(contenders, ratios, repeats, device, unit="ms"):
    """Time {name: function} in turn, `repeats` times after one turn to warm up, and print a row for each.

    ratios: {name: the names that it is compared with}.
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


def translator(method, device, plain=False, words=()):
    """A translator's training, as train_translator.py makes it or plainly."""
    args = train_translator.parse_args(["--source", "", "--target", "", "--out", "", "--method", method, *words])
    kind = train_translator.CycleTranslation if method == "cyclegan" else train_translator.ContrastiveTranslation
    translation = kind(args, device)
    if plain:
        for name, part in translation.state.items():
            if isinstance(part, torch.nn.Module):
                make_plain(part)
            elif isinstance(part, torch.optim.Optimizer):
                parameters = [p for group in part.param_groups for p in group["params"]]
                setattr(translation, name, torch.optim.Adam(parameters, lr=args.lr, betas=train_translator.BETAS))
    return translation


def make_plain(network):
    network.to(memory_format=torch.contiguous_format)
    for module in network.modules():
        if isinstance(module, models.InstanceNorm2d):
            module.__class__ = torch.nn.InstanceNorm2d


def textbook_step(t, x, y):
    """Equation 4 of CUT and its kin, each term from the images anew."""
    gan, nce = train_translator.gan_loss, train_translator.patch_nce_loss
    fake = t.G(x)
    t.opt_D.zero_grad()
    ((gan(t.D(y), True) + gan(t.D(fake.detach()), False)) / 2).backward()
    t.opt_D.step()
    t.D.requires_grad_(False)
    loss = gan(t.D(fake), True)
    for weight, real in ((t.args.lambda_x, x), (t.args.lambda_y, y)):
        if weight > 0:
            translated = fake if real is x else t.G(real)
            features = t.G.encode(real)
            locations = models.sample_locations(features, t.args.num_patches)
            positives, queries = t.H(features, locations), t.H(t.G.encode(translated), locations)
            loss = loss + weight * sum(map(nce, queries, positives)) / len(queries)
    t.opt_G.zero_grad()
    loss.backward()
    t.opt_G.step()
    t.D.requires_grad_(True)


def translator_step(method, precision, device, size, words=()):
    """A function that takes one step: precision is fp32, bf16 or textbook; words: more of train_translator.py's."""
    plain = precision == "textbook"
    translation = translator(method, device, plain, words)
    layout = torch.contiguous_format if plain else runtime.translator_layout(device)
    x, y = ((torch.rand(1, 3, size, size, device=device) * 2 - 1).contiguous(memory_format=layout) for _ in range(2))
    if plain and method != "cyclegan":
        return lambda: textbook_step(translation, x, y)
    return lambda: translation.step(x, y, runtime.autocast(device, precision))


def translators(args, device):
    title(f"Translator steps, {args.size}x{args.size}, batch 1, 64 channels", "median, ms", "range")
    contenders, ratios = {}, {}
    for method in METHODS:
        contenders[f"{method} textbook"] = textbook(translator_step, method, "textbook", device, args.size, device=device)
        for precision in args.precisions:
            name = f"{method} {precision}"
            contenders[name] = translator_step(method, precision, device, args.size)
            ratios[name] = [f"{method} textbook"]
            if method != "cyclegan":
                ratios[name].append(f"cyclegan {precision}")
    compare(contenders, ratios, args.repeats, device)


def variants(args, device):
    title(f"Steps of FastCUT-L5 with other terms, {args.size}x{args.size}, batch 1, 64 channels", "median, ms", "range")
    precision = args.precisions[-1]
    plain = f"fastcut_l5 {precision}"
    contenders = {plain: translator_step("fastcut_l5", precision, device, args.size)}
    for words in ("--num-patches 256", "--lambda-y 1", "--gan-loss vanilla"):
        contenders[words] = translator_step("fastcut_l5", precision, device, args.size, words.split())
    compare(contenders, {words: [plain] for words in list(contenders)[1:]}, args.repeats, device)


def peak_memory(method, precision, device, size):
    """MiB that a few steps of a method take at most, beyond what the process had before; for a process of its own."""
    before = training.peak_memory_mib(runtime.pick_device(str(device), tf32=True))
    train_translator.POOL_SIZE = 2  # full at once; 50 images are 38 MiB a pool at 256x256
    step = translator_step(method, precision, device, size)
    for turn in range(2):  # cuDNN tries algorithms in the first one, with workspaces that no later step needs
        for _ in range(optimization.WARM_UP):
            step()
        if turn == 0 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
    return training.peak_memory_mib(device) - (0 if device.type == "cuda" else before)


def memory(args, device):
    title(f"Peak memory of a translator's training, {args.size}x{args.size}, batch 1", "MiB", "of cyclegan's")
    for precision in args.precisions:
        peaks = {}
        for method in METHODS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks[method] = pool.apply(peak_memory, (method, precision, device, args.size))
            row(f"{method} {precision}", f"{peaks[method]:.0f}", f"x {peaks[method] / peaks['cyclegan']:.3f}")


def segmenter_step(precision, device, adapts=False):
    """One step of stage 3, or of stage 4, as a function; precision is fp32, bf16 or textbook."""
    plain = precision == "textbook"
    layout = torch.contiguous_format if plain else torch.channels_last
    F = models.UNet().to(device, memory_format=layout).train()
    opt_F = torch.optim.Adam(F.parameters(), lr=2e-4) if plain else optimization.adam(F.parameters(), lr=2e-4)
    x, y = (torch.rand(UNET_BATCH, 3, *UNET_SIZE, device=device).contiguous(memory_format=layout) for _ in range(2))
    labels = torch.randint(19, (UNET_BATCH, *UNET_SIZE), device=device)
    if not adapts:
        return lambda: train_segmenter.training_step(F, opt_F, x, labels, runtime.autocast(device, precision))
    D = models.FeatureDiscriminator(F.feature_channels["decoder3"]).to(device)
    opt_D = torch.optim.Adam(D.parameters(), lr=1e-4) if plain else optimization.adam(D.parameters(), lr=1e-4)
    gate = adapt_features.Gate(0.0, device)
    rest = (opt_F, opt_D, gate, (x, labels, y), "decoder3", 0.1, runtime.autocast(device, precision))
    return lambda: adapt_features.training_step(F, D, *rest)


def segmenters(args, device):
    height, width = UNET_SIZE
    title(f"Task model steps, U-Net over EfficientNet-B3, batch {UNET_BATCH} at {height}x{width}", "median, ms", "range")
    for name, adapts in (("stage 3", False), ("stage 4", True)):
        contenders = {f"{name} textbook": textbook(segmenter_step, "textbook", device, adapts, device=device)}
        contenders |= {f"{name} {p}": segmenter_step(p, device, adapts) for p in args.precisions}
        ratios = {f"{name} {p}": [f"{name} textbook"] for p in args.precisions}
        compare(contenders, ratios, args.repeats, device)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def draw(out, size, source, target):
    """A pair of drawn domains; their folders."""
    words = ["--size", size, "--source-count", source, "--target-count", target, "--val-count", 1]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run([sys.executable, ROOT / "demo/make_demo_data.py", out, *map(str, words)], check=True, **quiet)
    rng = np.random.default_rng(0)
    for path in (*out.glob("source/images/*"), *out.glob("target/leftImg8bit/*/*/*")):  # noise: about a byte per pixel as PNG
        grain = rng.normal(0, 2.5, data.image_size(path)[::-1])[..., None]
        Image.fromarray((np.asarray(Image.open(path)) + grain).clip(0, 255).astype(np.uint8)).save(path)
    return out / "source", out / "target"


def translation(args, device, few=2, frames=18):
    title(f"Stage 2, frames of 1914x1052 at width 1024, 64 channels, {args.precisions[-1]}, 2 turns", "median, s", "range")
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        sources = {n: draw(work / str(n), "1052x1914", n, 1)[0] for n in (few, frames)}
        (work / "run").mkdir()
        generator = models.ResnetGenerator()
        torch.save(models.network_state(generator), work / "run" / "weights.pt")
        (work / "run" / "args.json").write_text('{"width": 1024}')
        precision = args.precisions[-1]
        generator.to(device, memory_format=torch.channels_last).eval()
        images = [data.resize_to_width(data.load_image(frame.image), 1024) for frame in data.list_frames(sources[frames])]
        images = [data.to_signed(image)[None].to(device, memory_format=torch.channels_last) for image in images]

        @torch.inference_mode()
        def bare():
            for image in images[few:]:
                with runtime.autocast(device, precision):
                    generator(image)

        def stage_2(source):
            words = ["--source", source, "--translator", work / "run", "--out", work / "out", "--restart", "--workers", 2]
            words += ["--device", device, "--precision", precision]
            subprocess.run(
                [sys.executable, ROOT / "translate_dataset.py", *map(str, words)], check=True, stderr=subprocess.DEVNULL
            )

        names = {n: f"translate_dataset.py, {n} frames" for n in sources}
        alone = f"the generator alone, {frames - few} frames in memory"
        contenders = {alone: bare} | {names[n]: functools.partial(stage_2, source) for n, source in sources.items()}
        times = compare(contenders, {}, 2, device, "s")
        ratio = (times[names[frames]] - times[names[few]]) / times[alone]
        row(f"what {frames - few} frames more take, of the generator alone", f"x {ratio:.3f}")


def loader(args, device):
    title("Samples of frames of 1914x1052 and 2048x1024, at width 1024, plain and from --cache", "samples/s", "a worker")
    with tempfile.TemporaryDirectory() as work:
        source, _ = draw(Path(work) / "game", "1052x1914", 8, 1)
        _, target = draw(Path(work) / "street", "1024x2048", 1, 8)
        source, target, kept = data.list_frames(source), data.list_frames(target), Path(work) / "kept"
        kept.mkdir()
        for cache, workers in itertools.product((None, kept), dict.fromkeys((1, len(os.sched_getaffinity(0))))):

            def crops(frames, size, stream, labelled):
                return data.Crops(frames, 1024, (size, size), 48 * workers, 0, stream, labelled, cache)  # noqa: B023

            stages = {
                "stage 1, both domains": StackDataset(crops(source, 400, 0, False), crops(target, 400, 1, False)),
                "stage 3, source and label": crops(source, 512, 0, True),
                "stage 4, source and label, target": StackDataset(crops(source, 512, 0, True), crops(target, 512, 1, False)),
            }
            for name, dataset in stages.items():
                rates = []
                for _ in range(args.repeats):
                    batches = loading.batches(dataset, [[i] for i in range(len(dataset))], workers)
                    for _ in range(8 * workers):  # processes are up, and every frame is kept
                        next(batches)
                    start = time.perf_counter()
                    left = sum(1 for _ in batches)
                    rates.append(left / (time.perf_counter() - start))
                rate = statistics.median(rates)
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
    here = prediction.to(device), label.to(device)
    contenders = {"numpy.bincount": lambda: plain_confusion(*arrays)}
    contenders["evaluate.confusion_matrix"] = lambda: evaluate.confusion_matrix(*here)
    compare(contenders, {"evaluate.confusion_matrix": ["numpy.bincount"]}, 4 * args.repeats, device)


def fid_section(args, device):
    import pytorch_fid.fid_score
    import pytorch_fid.inception

    title("Frechet distance at 2048 dimensions, 2 turns", "median, s", "range")
    rng = np.random.default_rng(0)
    gaussians = []
    for _ in range(2):
        x = rng.standard_normal((6000, 2048)) * np.linspace(0.1, 1, 2048)
        gaussians += [x.mean(0), np.cov(x, rowvar=False)]
    values = {}

    def plain():
        mu1, sigma1, mu2, sigma2 = gaussians
        root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
        values["plain"] = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)

    def ours():
        values["ours"] = fid.frechet_distance(*gaussians)

    compare(
        {"scipy.linalg.sqrtm": plain, "fid.frechet_distance": ours},
        {"fid.frechet_distance": ["scipy.linalg.sqrtm"]},
        2,
        device,
        "s",
    )
    row("the two values", f"{values['plain']:.10g}", f"{values['ours']:.10g}")

    images = 64
    title(f"Features of {images} PNGs of 512x256, 2048 dimensions, float32", "median, s", "range")
    with tempfile.TemporaryDirectory() as work:
        for i in range(images):
            small = Image.fromarray(rng.integers(0, 256, (16, 32, 3), dtype=np.uint8))
            small.resize((512, 256), Image.Resampling.BICUBIC).save(Path(work) / f"{i:03d}.png")
        paths = sorted(Path(work).glob("*.png"))
        weights = fid.inception_v3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
        torch.save(weights, Path(work) / "weights.pth")
        pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: weights
        theirs = pytorch_fid.inception.InceptionV3([3]).to(device)
        own = fid.inception(Path(work) / "weights.pth").to(device)
        found = {}

        torch.backends.cudnn.allow_tf32 = False  # as fid.py has it
        torch.backends.cudnn.benchmark = False

        def pytorch_fids():
            found["theirs"] = pytorch_fid.fid_score.calculate_activation_statistics(paths, theirs, 32, 2048, device, 1)

        def ours_of_files():
            found["ours"] = fid.statistics(paths, own, 32, 1)

        compare(
            {"pytorch-fid": pytorch_fids, "fid.statistics": ours_of_files},
            {"fid.statistics": ["pytorch-fid"]},
            args.repeats,
            device,
            "s",
        )
        a, b = (found[name][0] for name in ("ours", "theirs"))
        row("largest difference of a mean, of the largest mean", f"{np.abs(a - b).max() / np.abs(b).max():.1e}")


SECTIONS = {
    "translators": translators,
    "variants": variants,
    "memory": memory,
    "segmenters": segmenters,
    "translation": translation,
    "loading": loader,
    "scores": scores,
    "fid": fid_section,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="(default: all)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--size", type=int, default=256, help="of the translators' images (256)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (5)")
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), help="(default: fp32, and bf16 where it is computed)"
    )
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}: {', '.join(SECTIONS)}")
    device = runtime.pick_device(args.device, tf32=True)
    if args.precisions is None:
        args.precisions = list(dict.fromkeys(("fp32", runtime.pick_precision("auto", device))))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    where += f", {torch.backends.cpu.get_cpu_capability()}"
    print(f"torch {torch.__version__}, {device} ({where}); precisions: {', '.join(args.precisions)}; ", end="")
    print(f"{args.repeats} turns, where a title says no other number")
    for name in args.sections or SECTIONS:
        SECTIONS[name](args, device)


if __name__ == "__main__":
    main()
