"""Frechet Inception Distance (FID) between two sets of images, such as translated frames and target photos (table 1).

It is the distance between two Gaussians fitted to Inception v3 features (Heusel et al. 2017, "GANs Trained by a Two Time-Scale
Update Rule", eq. 6). Weights and preprocessing are those of https://github.com/mseitzer/pytorch-fid, so values are comparable
with other papers'. One difference: photographs are first turned upright by their EXIF tag. Self-contained.

    python fid.py translated/images cityscapes/leftImg8bit/train         # FID; downloads 95 MB of weights the first time
    python fid.py A B --weights FILE                                     # the same weights from a file, offline; or `random`
    python fid.py A --save a.npz && python fid.py a.npz B                # statistics files, compatible with pytorch-fid
    python fid.py A B --cache runs/fid --out fid.json                    # cache the statistics; write {"FID": 12.3}

Folders are searched recursively: name the folder of the images, not one that also contains labels. The value falls as the
number of images grows, so compare sets of similar size, with several thousand images each at 2048 dimensions.
"""

import argparse
import contextlib
import ctypes
import hashlib
import io
import json
import os
import re
import secrets
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from scipy.linalg import lapack, svdvals
from torch import nn
from torchvision.models import inception_v3
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

# torch.hub compares the sha256 of the download with the last part of this name.
WEIGHTS_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # by default, Pillow refuses PNGs with a 1 MiB ICC profile
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")  # of the content: Pillow would run Ghostscript on PostScript
# EXIF orientation -> what turns the image upright. (ImageOps.exif_transpose fails if any other tag is damaged.)
UPRIGHT = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2))))
# Width of the features -> number of torchvision's layers that lead to them. The features are spatial means.
LAYERS = {64: 4, 192: 7, 768: 15, 2048: 18}


@contextlib.contextmanager
def without_tf32():
    """Compute convolutions on CUDA in float32. TF32, cuDNN's default, keeps only three digits of a feature."""
    cudnn = torch.backends.cudnn
    # torch raises an error when the older of its two settings is read after the newer one was changed.
    owner, name, value = (cudnn.conv, "fp32_precision", "ieee") if hasattr(cudnn, "conv") else (cudnn, "allow_tf32", False)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class InceptionFeatures(nn.Module):
    """FID's Inception v3 up to one of four depths: (B, 3, H, W) RGB in [0, 1] -> (B, dims) float32."""

    def __init__(self, inception, dims):
        super().__init__()
        self.blocks = nn.ModuleDict(list(inception.named_children())[: LAYERS[dims]])
        self.pool_branches = nn.ModuleDict()
        for name, block in self.blocks.items():  # the last branch of most blocks pools; forward() computes it instead
            if hasattr(block, "branch_pool"):
                self.pool_branches[name], block.branch_pool = block.branch_pool, nn.Identity()

    def forward(self, x):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = 2 * resize(x).to(memory_format=torch.channels_last) - 1  # a third faster than (B, C, H, W) on a CPU
        with torch.autocast(x.device.type, enabled=False), without_tf32():
            for name, block in self.blocks.items():
                if name not in self.pool_branches:
                    x = block(x)
                    continue
                # As in TensorFlow's network and pytorch-fid, averages ignore the padding, and the last block uses max pooling.
                average = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
                pooled = F.max_pool2d(x, 3, stride=1, padding=1) if name == "Mixed_7c" else average
                x = torch.cat([*block._forward(x)[:-1], self.pool_branches[name](pooled)], 1)
        return x.mean(dim=(2, 3))


def resize(x):
    """(B, 3, H, W) float -> (B, 3, 299, 299), bilinear without antialiasing as in pytorch-fid; antialiasing changes FID."""
    return x if x.shape[-2:] == (299, 299) else F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)


def inception(weights="published", dims=2048, seed=0):
    """FID's Inception v3 in eval mode on the CPU: (B, 3, H, W) RGB in [0, 1] -> (B, dims).

    weights: "published" (downloaded once into torch.hub's folder), "random" (drawn from `seed`; the global random state is
    unchanged), or a checkpoint file like pytorch-fid's. No code in a checkpoint is run.
    dims: 64, 192 (first, second max pool), 768 (before the auxiliary classifier) or 2048 (final average pool).
    Raises ValueError if dims is another number, the file is not such a checkpoint, or the download fails.
    """
    if dims not in LAYERS:
        raise ValueError(f"dims is {dims}, expected one of {', '.join(map(str, LAYERS))}")
    with torch.random.fork_rng(devices=[]):  # torchvision draws initial weights, which are overwritten below
        network = inception_v3(num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
    if weights == "random":
        # He et al. 2015: activations do not vanish over 48 ReLU layers. Uniform, because normal random numbers involve
        # logarithms and cosines, whose last bits differ between machines.
        generator = torch.Generator().manual_seed(seed)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu", generator=generator)
    else:
        try:
            if weights == "published":
                with contextlib.redirect_stdout(sys.stderr):  # torch.hub announces downloads, but stdout is for the distance
                    options = {"check_hash": True, "weights_only": True, "progress": sys.stderr.isatty()}
                    state = torch.hub.load_state_dict_from_url(WEIGHTS_URL, map_location="cpu", **options)
            else:
                state = torch.load(weights, map_location="cpu", weights_only=True)
            network.load_state_dict(state)
        except Exception as error:  # networks, disks and torch.load raise a dozen kinds
            reason = " ".join(str(error).split())[:160]
            source = f"{WEIGHTS_URL} into {torch.hub.get_dir()}" if weights == "published" else weights
            raise ValueError(f"cannot load {source}: {reason}; pass pytorch-fid's checkpoint as --weights FILE") from error
    return InceptionFeatures(network, dims).eval().requires_grad_(False).to(memory_format=torch.channels_last)


def find_images(folder, exclude=frozenset()):
    """Sorted paths of all images below a folder. Links are followed, but each real folder is visited once, so loops end.

    exclude: file names to leave out, with or without folders, suffix and Cityscapes' endings.
    Raises ValueError for fewer than two images or a path that is not a file, OSError for a folder that cannot be listed.
    """
    exclude = {frame_name(name) for name in exclude}
    images, folders, visited = [], [os.fspath(folder)], set()
    for parent in folders:  # which grows below
        if os.path.realpath(parent) in visited:
            continue
        visited.add(os.path.realpath(parent))
        for entry in sorted(os.scandir(parent), key=lambda entry: entry.name):
            if entry.name[0] == ".":  # .ipynb_checkpoints, .thumbnails; as in data.py
                continue
            if os.path.isdir(entry.path):  # entry.is_dir() would fail on a link to itself
                folders.append(entry.path)
            elif entry.name.lower().endswith(EXTENSIONS) and frame_name(entry.name) not in exclude:
                if not entry.is_file():  # opening a FIFO would block
                    raise ValueError(f"{entry.path}: not a regular file")
                images.append(entry.path)
    if len(images) < 2:
        raise ValueError(f"{folder}: {len(images)} images found, a covariance needs at least 2")
    return sorted(images)


def frame_name(name):
    """File name without folders, suffix and Cityscapes' ending: lists may name images or labels (as in data.py)."""
    stem, suffix = os.path.splitext(os.path.basename(name))
    return re.sub("(_leftImg8bit|_gtFine_labelIds)$", "", stem if suffix.lower() in EXTENSIONS else stem + suffix)


def read_batch(paths, width=None):
    """B image files -> (B, 3, 299, 299) float32 array in [0, 1], or the exception that reading one raised.

    Arrays pass through pipes: tensors would need /dev/shm. Exceptions are returned: tracebacks would keep workers alive.
    """
    arrays = []
    try:
        for path in paths:
            arrays.append(read_image(path, width))
        return np.stack(arrays)
    except MemoryError as error:
        return error.with_traceback(None)
    except Exception as error:  # Pillow's decoders raise many kinds
        return ValueError(f"{path}: not a readable image ({error})")


@contextlib.contextmanager
def open_image(path):
    """Open an image file and read its header. Raises ValueError for more than 8 bits per channel, and what Pillow raises."""
    with Image.open(path, formats=FORMATS) as image:
        if image.mode[0] in "IF":  # 16 or 32 bits per channel, which convert() would clip at 255
            raise ValueError(f"mode {image.mode} has more than 8 bits per channel")
        yield image


def read_image(path, width=None):
    """Image file -> (3, 299, 299) float32 array in [0, 1], turned upright by its EXIF tag, resized to `width` first."""
    orientation = None
    with open_image(path) as image:
        with contextlib.suppress(Exception):  # viewers ignore damaged EXIF
            orientation = image.getexif().get(0x112)
        image = image.convert("RGB")
        image = image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
        if width:  # antialiased, as data.py resizes frames
            image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.BILINEAR)
        return resize(to_tensor(image)[None])[0].numpy()


def end_with_parent(*_):
    """Worker init: let the kernel kill this process when its parent dies, even while it is writing to it."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not Linux
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


def statistics(images, network, batch_size=32, workers=0, cache=None, name="images", width=None):
    """Mean (D,) and covariance (D, D; divided by n - 1) of a network's features over a set of images, float64.

    images: a folder or a list of paths. network: (B, 3, 299, 299) in [0, 1] -> (B, D), used on its own device.
    workers: number of reading processes. cache: a folder for results, which are reused while the weights and the path,
    size and modification time of every file stay the same. name: name of a list of paths in messages. width: see read_image.
    Raises ValueError for fewer than two images, for an unreadable one, and if features are not finite.
    """
    if isinstance(images, (str, os.PathLike)):
        name, images = images, find_images(images)
    paths = [os.fspath(path) for path in images]
    if len(paths) < 2:
        raise ValueError(f"{name}: {len(paths)} images, a covariance needs at least 2")
    cached = cache and Path(cache) / f"{fingerprint(paths, network, width)}.npz"
    if cached and cached.exists():
        with contextlib.suppress(ValueError):  # damaged: computed again
            return load_statistics(cached)
    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    options = {"num_workers": min(workers, len(batches)), "worker_init_fn": end_with_parent}
    if workers and sys.platform == "linux":
        options["multiprocessing_context"] = "fork"  # Python 3.14's default would import torch again in each process
    loader = torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=partial(read_batch, width=width), **options)
    features, device = [], next(network.parameters()).device
    with torch.inference_mode(), tqdm(total=len(paths), desc=str(name), unit="image", disable=None) as progress:
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            features.append(network(torch.from_numpy(batch).to(device)).cpu().numpy())
            progress.update(len(batch))
    features = np.concatenate(features).astype(np.float64)  # 400 MB for 25,000 images at 2048 dimensions
    mu, sigma = features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))
    check_statistics(mu, sigma, name)
    if cached:
        try:
            save_statistics(cached, mu, sigma)
        except OSError as error:
            print(f"{cached}: statistics not cached ({error.strerror})", file=sys.stderr)
    return mu, sigma


def fingerprint(paths, network, width):
    """Hash of what determines a set's statistics: the weights, the width, each file's path, size and modification time."""
    digest = hashlib.sha256(f"fid.py 2 {width}".encode())  # increase the 2 when preprocessing changes
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.cpu().contiguous().numpy().tobytes())
    for path in paths:
        info = os.stat(path)
        digest.update(f"\n{os.path.abspath(path)} {info.st_size} {info.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def check_statistics(mu, sigma, name):
    """Raises ValueError unless mu is (D,), sigma is (D, D), and both are finite."""
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{name}: expected finite mu (D,) and sigma (D, D); their shapes are {mu.shape} and {sigma.shape}")


def load_statistics(path):
    """mu (D,) and sigma (D, D) from an .npz file, ours or pytorch-fid's. Raises ValueError for other files."""
    try:
        with np.load(path) as file:
            mu, sigma = file["mu"], file["sigma"]
    except Exception as error:  # numpy and zipfile raise many kinds for other files
        problem = "not statistics" if os.path.exists(path) else "no such file or folder"
        raise ValueError(f"{path}: {problem}; expected an .npz with mu (D,) and sigma (D, D)") from error
    check_statistics(mu, sigma, path)
    return mu, sigma


def save_statistics(path, mu, sigma):
    """Write mu (D,) and sigma (D, D) as an .npz file that pytorch-fid can read, too. Raises OSError naming the file."""
    buffer = io.BytesIO()
    np.savez(buffer, mu=mu, sigma=sigma)
    write_whole(path, buffer.getbuffer())


def write_whole(path, content):
    """Write bytes to a temporary file, then rename it: `path` holds the old or the new content, never a part of it."""
    temporary = Path(path).with_name(f".{Path(path).name}.{secrets.token_hex(4)}.part")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # after the rename there is none
            temporary.unlink()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet (2-Wasserstein) distance of two Gaussians: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), >= 0.

    mu: (D,); sigma: (D, D), symmetric positive semi-definite, of any rank; raises ValueError otherwise. With S = L L^T, the
    eigenvalues of S1 S2 are the squared singular values of L1^T L2, so the trace of the root is the sum of these singular
    values: always real, and exact where square roots of eigenvalues near zero lose digits. (Dowson and Landau 1982)
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(array, dtype=np.float64) for array in (mu1, sigma1, mu2, sigma2))
    check_statistics(mu1, sigma1, "first set")
    check_statistics(mu2, sigma2, "second set")
    if mu1.shape != mu2.shape:
        raise ValueError(f"first set has {mu1.size} dimensions, second set {mu2.size}: use the same --dims for both")
    root1, root2 = covariance_factor(sigma1, "first set"), covariance_factor(sigma2, "second set")
    trace_of_root = svdvals(root1.T @ root2).sum()  # (rank 1, rank 2): small for few images
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(float(distance), 0.0)  # rounding errors can make it slightly negative


def covariance_factor(sigma, name):
    """L (D, rank) with L L^T = sigma (D, D). Raises ValueError if sigma is not symmetric positive semi-definite."""
    # Pivoted Cholesky, since sigma is rank-deficient with fewer images than dimensions. Tolerance: D * eps * largest variance.
    factor, pivots, rank, _ = lapack.dpstrf(sigma, lower=1)
    root = np.empty((len(sigma), rank))
    root[pivots - 1] = np.tril(factor)[:, :rank]
    # Compare L L^T with sigma on a few random sign vectors: the full product would take a tenth of the distance's time.
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (len(sigma), 16))
    if np.abs(root @ (root.T @ signs) - sigma @ signs).max() > 1e-6 * np.abs(sigma).max():
        values, vectors = np.linalg.eigh(sigma)  # a covariance computed in float32 may have eigenvalues just below 0
        if np.abs(sigma - sigma.T).max() > 1e-6 * np.abs(sigma).max() or values[0] < -1e-6 * values[-1]:
            raise ValueError(f"{name}: sigma is not a covariance: it is asymmetric or has a negative eigenvalue")
        root = vectors * np.sqrt(values.clip(min=0))
    return root


def fail(message, status=2):
    """Exit with one line on stderr; status 2 for bad input, 1 for too little memory or a dead reading process."""
    sys.unraisablehook = lambda _: None  # no further output from half-initialised objects
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)  # a path may contain newlines
    print(f"fid.py: {line}", file=sys.stderr)
    sys.exit(status)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # one line, without the usage
    parser.add_argument("inputs", nargs="*", metavar="SET", help="A and B: each a folder of images or a statistics file (.npz)")
    parser.add_argument("--weights", default="published", help="published (default), random, or a checkpoint file")
    parser.add_argument("--dims", type=int, default=2048, choices=list(LAYERS), help="width of the features (default: 2048)")
    parser.add_argument("--out", metavar="FILE.json", help="write the distance to this file")
    parser.add_argument("--save", metavar="FILE.npz", help="write the statistics of A to this file")
    parser.add_argument("--cache", metavar="DIR", help="keep the statistics of folders here and reuse them (default: off)")
    parser.add_argument("--exclude", metavar="FILE", help="text file with names of images to leave out, one per line")
    parser.add_argument("--check", action="store_true", help="check weights, inputs and outputs, then stop")
    parser.add_argument("--width", type=int, help="resize the images of A to this width first, as stage 2 resizes frames")
    parser.add_argument("--batch-size", type=int, default=32, help="images per batch (default: 32)")
    workers = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    parser.add_argument("--workers", type=int, default=workers, help="reading processes (default: one per core, up to 16)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if available)")
    args = parser.parse_args()
    if os.environ.get("TORCHELASTIC_RUN_ID") and os.environ.get("WORLD_SIZE", "1") != "1":
        fail("runs in one process: start it without torchrun")
    if len(args.inputs) != 2 and not args.check and (len(args.inputs) != 1 or args.out or not args.save):
        fail("A and B are required: two folders of images or .npz statistics (A alone with --save FILE.npz, without --out)")
    if min(args.batch_size, 1 if args.width is None else args.width) < 1 or not 0 <= args.workers <= 512:
        fail("--batch-size and --width must be at least 1, --workers from 0 to 512")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=args.device).add(1).item()  # a GPU may be listed and yet not work
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device}: cannot be used: {str(error).splitlines()[0]}")
    return args


def read_exclude(path, folders):
    """Names in a text file, one per line; # starts a comment. Reports names that match no image in the folders."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        names = {frame_name(re.sub(r"(^|\s)#.*", "", line).strip()) for line in file} - {""}
    present = {frame_name(image) for folder in folders for image in find_images(folder)}
    if unmatched := sorted(names - present):
        print(f"{path}: {len(unmatched)} of {len(names)} names match no image: {unmatched[0]} ...", file=sys.stderr)
    return names


def run(args):
    for path in filter(None, (args.out, args.save)):  # an unwritable folder fails now, not after the work
        if os.path.isdir(path):
            raise ValueError(f"{path}: is a folder; give a file")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=Path(path).parent).close()
    exclude = read_exclude(args.exclude, filter(os.path.isdir, args.inputs)) if args.exclude else frozenset()
    inputs = [find_images(path, exclude) if os.path.isdir(path) else load_statistics(path) for path in args.inputs]
    found = [f"{path}: {len(data)} images" for path, data in zip(args.inputs, inputs) if isinstance(data, list)]
    for path, data in zip(args.inputs, inputs):
        if isinstance(data, tuple) and data[0].size != args.dims:
            raise ValueError(f"{path}: statistics have {data[0].size} dimensions, but --dims is {args.dims}")
    for path in (image for data in inputs if args.check and isinstance(data, list) for image in data):
        try:
            with open_image(path):
                pass
        except Exception as error:
            raise ValueError(f"{path}: not a readable image ({error}); leave it out with --exclude") from error
    if args.check or found:
        network = inception(args.weights, args.dims).to(args.device)
    # Only the published weights at 2048 dimensions give what the literature calls FID.
    name = ("frechet_random_inception" if args.weights == "random" else "FID") + ("" if args.dims == 2048 else f"_{args.dims}")
    if args.check:
        print("; ".join([f"OK: {name}, weights {args.weights}", *found]))
        return
    print("; ".join([f"fid.py: {args.device}, float32", *found]), file=sys.stderr)
    for k, path in enumerate(args.inputs):
        if isinstance(inputs[k], list):
            width = args.width if k == 0 else None
            inputs[k] = statistics(inputs[k], network, args.batch_size, args.workers, args.cache, path, width)
    if len(inputs) == 2:
        distance = f"{frechet_distance(*inputs[0], *inputs[1]):.6g}"
        with contextlib.suppress(OSError):  # a closed pipe must not lose the files below
            print(name, distance, flush=True)
    if args.out:
        write_whole(args.out, json.dumps({name: float(distance)}).encode() + b"\n")
    if args.save:
        save_statistics(args.save, *inputs[0])


def main():
    args = parse_arguments()
    smaller = f"lower --batch-size ({args.batch_size}) or --workers ({args.workers})"
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as error:
        fail(str(error).strip() or repr(error))
    except (MemoryError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in reason:
            fail(f"not enough memory on {args.device}: {smaller}", status=1)
        if "DataLoader worker" in reason:
            fail(f"a process that reads images died, perhaps for lack of memory ({reason}): {smaller}", status=1)
        raise


if __name__ == "__main__":
    main()
