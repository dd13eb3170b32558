"""Frechet Inception Distance between two sets of images: how far translated frames are from target photos (table 1).

The distance is that of two Gaussians fitted to features of Inception v3 (Heusel et al. 2017, "GANs Trained by a Two
Time-Scale Update Rule", eq. 6). Published values hold for one network and one preprocessing: TensorFlow's Inception
of 2015, ported by https://github.com/mseitzer/pytorch-fid, fed with RGB resized to 299x299. Both are followed here, so
a value can stand beside other papers'; photographs that EXIF turns are turned first, which pytorch-fid does not do. This file
needs nothing else of the repository: copy it where you like.

    python fid.py translated/images cityscapes/leftImg8bit/train         # FID; fetches 95 MB of weights the first time
    python fid.py A B --weights pt_inception-2015-12-05-6726825d.pth     # the same weights from a file, offline
    python fid.py A B --weights random                                   # no weights at all; comparable to itself only
    python fid.py A --save a.npz && python fid.py a.npz B                # pytorch-fid's statistics files, both ways
    python fid.py A B --cache runs/fid --out results/fid.csv --name CUT  # keep statistics; add or replace a row
    python fid.py A B --check                                            # are weights and folders there?

Folders are searched recursively: name the folder of the images, not one that also holds labels. The value falls as the
number of images grows, so compare sets of similar size, and at 2048 dimensions some thousands of images.
"""

import argparse
import contextlib
import csv
import ctypes
import datetime
import errno
import fcntl
import hashlib
import io
import itertools
import os
import re
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from scipy.linalg import lapack, svdvals
from torch import nn
from torchvision.models import inception_v3
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

# The hub checks the file against the start of its sha256, which is the last part of its name.
WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_FILE}"
INPUT_SIZE = (299, 299)
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # else a PNG whose ICC profile has 1 MiB is refused
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")  # of the content: Pillow would hand PostScript to an interpreter
# What data passes before features of each width are read, under torchvision's names; the features are spatial means.
STAGES = {
    64: ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1"),
    192: ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"),
    768: ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    2048: ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
}
# TensorFlow's averages leave the padding out, torchvision's count it; its last block takes the maximum (pytorch-fid).
AVERAGE = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
MAXIMUM = nn.MaxPool2d(3, stride=1, padding=1)
POOLS = {f"Mixed_{name}": AVERAGE for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b")} | {"Mixed_7c": MAXIMUM}


class PoolPatch(nn.Module):
    """One of torchvision's Inception blocks with another pooling in its pool branch, which is the last one.

    The block still pools in its own way and the result is dropped: cheaper to read than three blocks written out again.
    """

    def __init__(self, block, pool):
        super().__init__()
        self.pool, self.branch_pool, self.block = pool, block.branch_pool, block
        block.branch_pool = nn.Identity()

    def forward(self, x):
        *branches, _ = self.block._forward(x)
        return torch.cat([*branches, self.branch_pool(self.pool(x))], 1)


class InceptionFeatures(nn.Module):
    """FID's Inception v3 up to one of its four depths: (B, 3, H, W) RGB in [0, 1] -> (B, dims) float32."""

    def __init__(self, inception, dims):
        super().__init__()
        depths = [depth for depth in STAGES if depth <= dims]
        self.blocks = nn.Sequential()
        for name in (name for depth in depths for name in STAGES[depth]):
            block = getattr(inception, name)
            self.blocks.append(PoolPatch(block, POOLS[name]) if name in POOLS else block)

    def forward(self, x):
        x = resize(x).to(memory_format=torch.channels_last)  # a third faster than (B, C, H, W) on a CPU
        # TF32 would keep three digits of a feature; cuDNN uses it unless told otherwise.
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            return self.blocks(2 * x - 1).mean(dim=(2, 3))


def resize(x):
    """(B, 3, H, W) float -> (B, 3, 299, 299) as pytorch-fid does: bilinear without antialiasing, or values differ."""
    return x if x.shape[-2:] == INPUT_SIZE else F.interpolate(x, INPUT_SIZE, mode="bilinear", align_corners=False)


def inception(weights="published", dims=2048, seed=0):
    """FID's Inception v3 in eval mode on the CPU, mapping (B, 3, H, W) RGB in [0, 1] to (B, dims).

    weights: "published" (downloaded once, into torch.hub's folder), "random" (drawn from `seed`, the same everywhere,
    the caller's random state untouched) or a file like pytorch-fid's: torchvision's names, 1008 classes.
    dims: 64, 192 (first, second max pool), 768 (before the auxiliary classifier) or 2048 (final average pool).
    Raises ValueError if dims is another number, the file is no such checkpoint, or the download fails.
    """
    if dims not in STAGES:
        raise ValueError(f"dims is {dims}, expected one of {', '.join(map(str, STAGES))}")
    with torch.random.fork_rng(devices=[]):  # torchvision's layers draw initial weights that are overwritten below
        network = inception_v3(num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
    if weights == "random":
        # He et al. 2015, which keeps a ReLU network's activations from vanishing over 48 layers. Uniform, for unlike
        # normal numbers those pass through no logarithm and no cosine, whose last bits differ between machines.
        generator = torch.Generator().manual_seed(seed)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu", generator=generator)
    else:
        state = download_weights() if weights == "published" else read_weights(weights)
        try:
            network.load_state_dict(state)
        except (RuntimeError, AttributeError, TypeError) as error:
            reason = f"torchvision's names, 1008 classes: {str(error).splitlines()[-1].strip()[:160]}"
            raise ValueError(f"weights {weights}: do not fit FID's Inception v3 ({reason})") from error
    features = InceptionFeatures(network.eval(), dims).eval().requires_grad_(False)
    return features.to(memory_format=torch.channels_last)


def download_weights():
    """pytorch-fid's state dict, from torch.hub's folder or its address. Raises ValueError if it cannot be had."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
    try:
        if path.parts[0] == "~":
            raise OSError("there is no home folder for them: set TORCH_HOME")
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, str(path), progress=sys.stderr.isatty())
    except Exception as error:  # no network, no disk: the way out is the same
        message = "cannot be loaded; get the file elsewhere and pass --weights FILE"
        raise ValueError(f"{WEIGHTS_URL}: {message} ({' '.join(str(error).split())[:160]})") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(path.stem.rpartition("-")[2]):
        raise ValueError(
            f"{path}: its sha256 begins with {digest[:8]}, not as its name says; remove it, or pass --weights FILE"
        )
    return read_weights(path)


def read_weights(path):
    """What torch.load finds in a file, running no code from it. Raises ValueError if that is nothing."""
    if not os.path.isfile(path):
        raise ValueError(f"weights {path}: no such file; expected published, random or a file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds for a file that is something else
        raise ValueError(f"weights {path}: not a checkpoint that torch.load(weights_only=True) reads") from error


def find_images(folder, exclude=frozenset()):
    """Paths of all images below a folder, sorted. Links are followed, each real folder once, so that loops end.

    exclude: names of files to leave out, as `bare` takes them. Raises ValueError if there are fewer than two images, OSError
    for a folder that cannot be listed.
    """

    def refuse(error):
        raise error

    images, seen, exclude = [], set(), {bare(name) for name in exclude}
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        folders.sort()
        if os.path.realpath(parent) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        for name in files:
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".") and bare(name) not in exclude:
                images.append(os.path.join(parent, name))
    for path in images:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a FIFO would be to wait for ever
            raise ValueError(f"{path}: not a regular file, nor a link to one")
    if len(images) < 2:
        raise ValueError(f"{folder}: {len(images)} images found, a covariance needs at least 2")
    return sorted(images)


def bare(name):
    """A file's name without folders, suffix and Cityscapes' endings: as lists of names to exclude may have it, and data.py."""
    name = os.path.basename(name)
    stem, suffix = os.path.splitext(name)
    name = stem if suffix.lower() in EXTENSIONS else name
    return name.removesuffix("_leftImg8bit").removesuffix("_gtFine_labelIds")


class ImageFiles(torch.utils.data.Dataset):
    """Indices of B files -> float32 array (B, 3, 299, 299) in [0, 1]; a line that says what is wrong; None for lack of memory.

    Each is resized here, in the worker, so that a folder may mix sizes, and turned as EXIF says, which pytorch-fid does not.
    Arrays pass through a pipe; tensors would need room in /dev/shm, of which containers have little. An error passes as
    text: raised there, it would arrive with frames that keep the workers alive.
    """

    def __init__(self, paths):
        self.paths = paths

    def __getitem__(self, batch):
        try:
            return np.stack([self.read(self.paths[i]) for i in batch])
        except ValueError as error:
            return str(error)
        except MemoryError:
            return None

    def read(self, path):
        try:
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                    raise ValueError(f"more than PIL.Image.MAX_IMAGE_PIXELS, {Image.MAX_IMAGE_PIXELS}")
                if image.mode[0] in "IF":  # 16 or 32 bits a channel: Pillow would clip these at 255 and say nothing
                    raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
                rgb = to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
        except MemoryError:  # which says nothing of the file
            raise
        except Exception as error:  # Pillow's decoders raise many kinds
            raise ValueError(f"{path}: not an image that can be read ({error})") from error
        return resize(rgb[None])[0].numpy()


def end_with_parent(*_):
    """In a reading process: have the kernel end it with its parent, which may be killed while it writes to it."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def statistics(images, network, batch_size=32, workers=0, cache=None, name="images"):
    """Mean (D,) and covariance (D, D; divided by n - 1) of a network's features, float64.

    images: a folder, or paths; network: (B, 3, 299, 299) in [0, 1] -> (B, D), used on its own device; cache: a folder
    where results are kept, found again only for the same weights and the same files (path, size, time of change);
    name: of the images in messages, where they are paths.
    Where torch.distributed is initialised, each process takes its part of the images and all return the same.
    Raises ValueError for fewer than two images, for one that cannot be read, and if features are not finite.
    """
    if isinstance(images, (str, os.PathLike)):
        name, images = images, find_images(images)
    paths = [os.fspath(path) for path in images]
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} images given, a covariance needs at least 2")
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    cached = cache and Path(cache) / f"{fingerprint(paths, network)}.npz"
    if gather(bool(cached and cached.exists()))[0]:  # as the first process sees it
        return load_statistics(cached)
    # Whole batches are dealt out, so that one process has the same batches as many, and the same features to the bit.
    batches = [range(start, min(start + batch_size, len(paths))) for start in range(0, len(paths), batch_size)]
    own = batches[rank::processes]
    device = next(network.parameters()).device
    options = {
        "num_workers": min(workers, len(own)),
        "timeout": 1800 if workers and own else 0,
        "collate_fn": lambda batch: batch,
    }
    options["worker_init_fn"] = end_with_parent
    loader = torch.utils.data.DataLoader(ImageFiles(paths), batch_size=None, sampler=own, **options)
    features = {}
    with torch.inference_mode(), tqdm(total=len(paths), desc=str(name), unit="image", disable=rank > 0 or None) as progress:
        for indices, batch in zip(own, loader, strict=True):
            if batch is None:
                raise MemoryError
            if isinstance(batch, str):
                raise ValueError(batch)
            features[indices.start] = network(torch.from_numpy(batch).to(device)).cpu().numpy()
            progress.update(min(len(batch) * processes, len(paths) - progress.n))
    features = {start: part for parts in gather(features) for start, part in parts.items()}
    # 400 MB for 25,000 images at 2048: no running sums needed
    features = np.concatenate([features[batch.start] for batch in batches]).astype(np.float64)
    mu, sigma = features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))
    check_statistics(mu, sigma, name)
    if cached and rank == 0:
        try:
            with locked(cached.parent):
                for leftover in cached.parent.glob(".*.part"):  # of a process that was killed as it wrote
                    leftover.unlink()
                save_statistics(cached, mu, sigma)
        except OSError as error:
            print(f"{cached}: not kept for the next time ({error.strerror})", file=sys.stderr)
    return mu, sigma


def gather(part):
    """What each process has, in a list in their order."""
    parts = [part]
    if dist.is_initialized():
        parts *= dist.get_world_size()
        dist.all_gather_object(parts, part)
    return parts


def fingerprint(paths, network):
    """What decides a set's statistics, hashed: the weights, and each file's path, size and time of change."""
    digest = hashlib.sha256(b"fid.py 1")  # count up when preprocessing changes, and older caches are left alone
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.cpu().contiguous().numpy().tobytes())
    for path in paths:
        now = os.stat(path)
        digest.update(f"\n{os.path.abspath(path)} {now.st_size} {now.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def check_statistics(mu, sigma, name):
    """Raises ValueError unless mu is (D,), sigma (D, D), and both are finite real numbers."""
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size) or mu.size == 0:
        raise ValueError(f"{name}: mu is {mu.shape} and sigma {sigma.shape}, expected (D,) and (D, D)")
    if not all(array.dtype.kind in "fiu" and np.isfinite(array).all() for array in (mu, sigma)):
        raise ValueError(f"{name}: mu or sigma holds values that are not finite real numbers")


def load_statistics(path):
    """mu (D,) and sigma (D, D) from an .npz as pytorch-fid writes it. Raises ValueError for anything else."""
    try:
        with np.load(path) as file:
            if sum(member.file_size for member in file.zip.infolist()) > 2**30:  # 2048 dimensions are 32 MiB
                raise ValueError("too large")
            mu, sigma = file["mu"], file["sigma"]
    except Exception as error:  # numpy and zipfile raise many kinds for a file that is something else
        raise ValueError(f"{path}: not statistics, expected an .npz with mu (D,) and sigma (D, D)") from error
    if not (isinstance(mu, np.ndarray) and isinstance(sigma, np.ndarray)):  # a member without numpy's header comes as bytes
        raise ValueError(f"{path}: not statistics, expected an .npz with mu (D,) and sigma (D, D)")
    check_statistics(mu, sigma, path)
    return mu, sigma


def save_statistics(path, mu, sigma):
    """Writes mu (D,) and sigma (D, D) as an .npz that this file and pytorch-fid read."""
    buffer = io.BytesIO()
    np.savez(buffer, mu=mu, sigma=sigma)
    write_whole(path, buffer.getvalue())


def write_whole(path, content):
    """Bytes -> a file that appears whole or not at all. OSError says how much was needed where a disk is full."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        reason = f"{error.strerror}: {len(content):,} bytes are needed, {free:,} are free on its disk"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder):
    """One process at a time: the others wait. The lock is the operating system's and ends with its process.

    Where the file system has no locks, nobody waits.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".lock", "a") as lock:
        for second in itertools.count():
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    break
            if second % 60 == 0:
                print(f"{folder}: waiting for another process there", file=sys.stderr)
            time.sleep(1)
        yield


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet (2-Wasserstein) distance of two Gaussians: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), >= 0.

    mu: (D,), sigma: (D, D), symmetric and positive semi-definite, of any rank (Dowson and Landau 1982). With S = L L^T
    the eigenvalues of S1 S2 are the squared singular values of L1^T L2, so the trace of the root is those values' sum:
    real always, and without the digits that roots of eigenvalues near zero lose. Raises ValueError for anything else.
    """
    mu1, sigma1, mu2, sigma2 = map(np.asarray, (mu1, sigma1, mu2, sigma2))
    check_statistics(mu1, sigma1, "first set")
    check_statistics(mu2, sigma2, "second set")
    if mu1.shape != mu2.shape:
        raise ValueError(f"first set has {mu1.size} dimensions, second set {mu2.size}: take the same --dims for both")
    mu1, sigma1, mu2, sigma2 = (array.astype(np.float64) for array in (mu1, sigma1, mu2, sigma2))
    root1, root2 = covariance_factor(sigma1, "first set"), covariance_factor(sigma2, "second set")
    trace_of_root = svdvals(root1.T @ root2).sum()  # (rank 1, rank 2): small for few images
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(float(distance), 0.0)  # rounding may leave -1e-16 of the traces


def covariance_factor(sigma, name):
    """L (D, rank) with L L^T = sigma (D, D). Raises ValueError if sigma is not symmetric positive semi-definite."""
    # Cholesky with pivots: rank is short when images are fewer than dimensions. It stops at D * eps * largest variance.
    factor, pivots, rank, _ = lapack.dpstrf(sigma, lower=1)
    root = np.empty((len(sigma), rank))
    root[pivots - 1] = np.tril(factor)[:, :rank]
    # L L^T against sigma through a few random signs: the product itself would take a tenth of the distance's time.
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (len(sigma), 16))
    if np.abs(root @ (root.T @ signs) - sigma @ signs).max() > 1e-6 * np.abs(sigma).max():
        raise ValueError(f"{name}: sigma is no covariance, it is not symmetric or has a negative eigenvalue")
    return root


def column_name(weights, dims):
    """What the distance may be called: FID is only what the real weights give at 2048 dimensions."""
    return ("frechet_random_inception" if weights == "random" else "FID") + ("" if dims == 2048 else f"_{dims}")


def read_rows(path, column):
    """Columns and rows of a CSV, or new ones if it does not exist. Raises ValueError if it lacks `column`."""
    if not Path(path).exists():
        return ["model", column], []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        try:
            rows, columns = list(reader), reader.fieldnames or []
        except csv.Error as error:
            raise ValueError(f"{path}: not CSV ({error})") from error
    if "model" not in columns or column not in columns or any(None in row for row in rows):
        raise ValueError(f"{path}: its columns are {ascii(','.join(columns)[:80])}, not model,{column}: choose another --out")
    return columns, rows


def write_row(path, model, column, distance):
    """Adds the model's row to a CSV with the columns model and `column`, or replaces its distance there."""
    with locked(Path(path).parent):  # another model's row may be on its way into the same table
        columns, rows = read_rows(path, column)
        if not any(row["model"] == model for row in rows):
            rows.append({"model": model})
        rows = [row | {column: f"{distance:.6g}"} if row["model"] == model else row for row in rows]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(path, text.getvalue().encode())


def fail(message, status=2):
    """Ends the program with one line on stderr: status 2 for bad input, 1 for lack of memory or a lost process."""
    sys.unraisablehook = lambda _: None  # what is torn down half made has no more to say
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)  # a path may hold anything
    print(f"fid.py: {line}", file=sys.stderr)
    sys.exit(status)


def torchrun(name, default):
    """A number that torchrun has set in the environment; the default where it did not start this process."""
    return int(os.environ[name]) if {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", name} <= os.environ.keys() else default


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # argparse would print its usage as well
    parser.add_argument("A", nargs="?", help="folder of images, or statistics (.npz)")
    parser.add_argument("B", nargs="?", help="the same, to compare with; may be left out with --save or --check")
    parser.add_argument("--weights", default="published", help="published (default), random, or a file")
    parser.add_argument("--dims", type=int, default=2048, choices=list(STAGES), help="width of the features (2048)")
    parser.add_argument("--out", help="CSV in which the row --name gets the distance")
    parser.add_argument("--name", help="model that --out's row is for")
    parser.add_argument("--save", help="write A's statistics to this .npz")
    parser.add_argument("--cache", help="folder where statistics of folders are kept and found again (none)")
    parser.add_argument("--exclude", metavar="FILE", help="names of images to leave out, one a line")
    parser.add_argument("--check", action="store_true", help="look for weights and inputs, say so, compute nothing")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time (32)")
    cores = len(os.sched_getaffinity(0)) // torchrun("LOCAL_WORLD_SIZE", 1)
    workers = max(1, min(16, cores))
    parser.add_argument("--workers", type=int, default=workers, help="reading processes (one per core, 16 at most)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (cuda if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of --weights random (0)")
    args = parser.parse_args()
    if not args.check and (args.A is None or (args.B is None and not args.save)):
        fail("A and B are needed: two folders of images or .npz statistics (A alone with --save FILE.npz)")
    if (args.out is None) != (args.name is None) or (args.out is not None and args.B is None and not args.check):
        fail("--out FILE.csv and --name MODEL go together, with A and B")
    if args.save and not args.save.endswith(".npz"):
        fail(f"--save {args.save}: the name must end in .npz")
    if args.batch_size < 1 or not 0 <= args.workers <= 512 or not 0 <= args.seed < 2**63:
        fail("--batch-size must be at least 1, --workers from 0 to 512, --seed between 0 and 2^63 - 1")
    is_default = args.device is None
    if is_default:  # under torchrun each process of a node has a GPU of its own
        args.device = f"cuda:{torchrun('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=args.device).add(1).item()  # a device may exist and not compute
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = f"--device {args.device}: cannot be used here: {str(error).splitlines()[0]}"
        if not is_default:
            fail(reason)
        print(f"fid.py: {reason}; using the CPU", file=sys.stderr)
        args.device = "cpu"
    return args


def open_input(path, dims, exclude):
    """(mu, sigma) of an .npz, or the list of a folder's images; ValueError if it is neither or does not fit."""
    if os.path.isdir(path):
        return find_images(path, exclude)
    if not os.path.isfile(path) or not path.lower().endswith(".npz"):
        state = "not one" if os.path.exists(path) else "not there"
        raise ValueError(f"{path}: {state}, expected a folder of images or an .npz of statistics")
    mu, sigma = load_statistics(path)
    if mu.size != dims:
        raise ValueError(f"{path}: statistics of {mu.size} dimensions, but --dims is {dims}")
    return mu, sigma


def keep_freed_memory():
    """Let glibc keep what one batch frees for the next, which it would fetch from the kernel, cleared. As in runtime.py."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD


def run(args):
    if args.device == "cpu":
        keep_freed_memory()
    column = column_name(args.weights, args.dims)
    if args.out is not None:  # before hours of work, not after
        read_rows(args.out, column)
    for folder in {Path(path).parent for path in (args.out, args.save) if path}:
        write_whole(folder / ".writable", b"")
        (folder / ".writable").unlink(missing_ok=True)
    paths = [path for path in (args.A, args.B) if path is not None]
    exclude = set()
    if args.exclude:
        with open(args.exclude, encoding="utf-8-sig", errors="surrogateescape") as file:
            exclude = {bare(re.sub(r"(^|\s)#.*", "", line).strip()) for line in file} - {""}
        if not exclude:
            raise ValueError(f"{args.exclude}: no name in it, where names of images are needed, one per line")
        there = {bare(image) for path in paths if os.path.isdir(path) for image in find_images(path)}
        if unmatched := sorted(exclude - there):
            print(
                f"{args.exclude}: {len(unmatched)} of {len(exclude)} names match no image: {unmatched[0]} ...", file=sys.stderr
            )
    inputs = [open_input(path, args.dims, exclude) for path in paths]
    if args.check or any(isinstance(data, list) for data in inputs):
        network = inception(args.weights, args.dims, args.seed).to(args.device)
    rank, processes = torchrun("RANK", 0), torchrun("WORLD_SIZE", 1)
    if rank == 0 and not args.check:
        found = [f"{path}: {len(data)} images" for path, data in zip(paths, inputs, strict=True) if isinstance(data, list)]
        print("; ".join([f"fid.py: {args.device}, float32", *found]), file=sys.stderr)
    if args.check and rank == 0:
        found = [f"{len(data)} images" if isinstance(data, list) else "statistics" for data in inputs]
        found = [f"{path}: {what}" for path, what in zip(paths, found, strict=True)]
        print("; ".join([f"all is well: weights {args.weights}, column {column}", *found]))
    if args.check:
        return
    if processes > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))  # the slowest may be hours behind
    for k, path in enumerate(paths):
        if isinstance(inputs[k], list):
            inputs[k] = statistics(inputs[k], network, args.batch_size, args.workers, args.cache, name=path)
    if processes > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    if len(inputs) == 2:
        distance = frechet_distance(*inputs[0], *inputs[1])
        with contextlib.suppress(OSError):  # nobody is left to read it; what follows is kept all the same
            print(f"{column} {distance:.6g}", flush=True)
    if args.save:
        save_statistics(args.save, *inputs[0])
    if len(inputs) == 2:
        if args.out is not None:
            write_row(args.out, args.name, column, distance)


def main():
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this process
            setattr(sys, name, open(os.devnull, "w"))
    args = parse_arguments()
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except (torch.OutOfMemoryError, MemoryError):
        fail(f"--batch-size {args.batch_size}: not enough memory on {args.device}, choose a smaller one", status=1)
    except (OSError, ValueError) as error:
        text = str(error).strip() or repr(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EMFILE) and error.filename is None:
            text = f"{error.strerror}: /dev/shm or ulimit -n is too small for {args.workers} workers; try --workers 0"
        fail(text)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if dist.is_initialized():
            fail(f"another process of this run stopped, and says why; if none does, this one did ({reason})", status=1)
        if not any(words in reason for words in ("allocate memory", "DataLoader")):
            raise
        fail(
            f"{reason}: choose a smaller --batch-size than {args.batch_size}, or fewer --workers than {args.workers}", status=1
        )


if __name__ == "__main__":
    main()
