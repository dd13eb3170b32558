"""What the stage scripts share and the method does not need: command lines, device, precision, run directories, errors.

A trainer is written around one `Run`:

    run = Run(args)                                    # opens --out, resolves --device and --precision
    run.restore(generator=generator, ...)              # names all that a checkpoint holds, and loads it if there is one
    for iteration, batch in run.iterations(dataset):   # goes on where the last checkpoint was
        run.log(losses, lr=lr)
    run.finish(models.network_state(generator))        # weights.pt and summary.json

What iteration k computes depends on --seed and k alone: samples are numbered by iteration, and torch's generator is seeded
anew at each, so that no state of a generator needs saving.
"""

import argparse
import contextlib
import ctypes
import datetime
import hashlib
import io
import json
import logging
import os
import re
import signal
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

import files

# ---------------------------------------------------------------------------------------------------------------------
# Command lines and errors


def run_script(main):
    """Call main(); what a user can cause becomes one line on stderr and an exit status.

    2 for bad input and for files that cannot be read or written (ValueError, OSError), 1 for a run that diverged
    (FloatingPointError) or lacks memory. CLADA_TRACEBACK=1 in the environment shows where it came from.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    if int(os.environ.get("RANK", 0)) > 0:  # torchrun's: what all processes would say, the first one says
        logging.disable()
        sys.stdout = open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    stopped = None
    try:
        main()
    except SystemExit as stop:  # --check or a signal: of all processes, like a return
        stopped = stop.code
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        status, text = _explained(error)
        if status is None or os.environ.get("CLADA_TRACEBACK"):
            raise
        print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
        sys.exit(status)
    if dist.is_initialized():
        dist.destroy_process_group()  # else its threads abort the interpreter's end now and then
    if stopped:
        sys.exit(stopped)


def _explained(error):
    """(exit status, one line) for an error that a user can cause, (None, "") for any other."""
    text = str(error).strip() or type(error).__name__
    if text.startswith("Caught ") and " worker process " in text:
        # A DataLoader's worker sends its whole traceback as the message; the error itself comes last.
        text = text.rpartition(f"\n{type(error).__name__}: ")[2]
    line = files.one_line(text)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in text for words in NO_MEMORY):
        return 1, "not enough memory: lower --batch-size, --crop-size, --width, --base-channels or --workers"
    if isinstance(error, RuntimeError) and (text.startswith("DataLoader worker") or "shared memory" in text):
        return 1, "a process that reads images was killed, most likely for lack of memory: lower --workers or --width"
    if isinstance(error, RuntimeError) and dist.is_initialized() and any(words in text for words in NO_PEER):
        return 1, "another process of this run stopped; its message says why"
    if isinstance(error, FloatingPointError):
        return 1, line
    if isinstance(error, (ValueError, OSError)):
        return 2, line
    return None, ""


# What torch says when an allocation failed, or when it lost a process.
NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED", "Cannot allocate memory")
NO_PEER = ("Connection", "gloo", "NCCL", "Socket")


def number(kind, least, most, what=None):
    """An argparse type: an int or a float from `least` to `most`; `what` says in a message what that is."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:  # nan is not
            raise argparse.ArgumentTypeError(f"{text!r} is no {what or f'{kind.__name__} from {least} to {most}'}")
        return value

    return parse


positive_int, count, seed = number(int, 1, 2**31 - 1), number(int, 0, 2**31 - 1), number(int, 0, 2**63 - 1)
few = number(int, 0, 512)  # processes: more would bring a machine down before it could say so
positive = number(float, sys.float_info.min, sys.float_info.max, "finite number above 0")
non_negative = number(float, 0, sys.float_info.max, "finite number from 0 up")
share = number(float, 0, 1)


def real_path(text):
    """However a folder is spelt, it is the same when a run is resumed."""
    return os.path.realpath(text)


def height_width(text):
    """ "400" or "256x512" (height x width) -> (height, width)."""
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text} is neither N nor HxW")
    return (sides[0], sides[-1])


def parser(description, commands):
    """An argument parser that shows the script's commands as they stand in its docstring, and mistakes in one line."""
    formatter = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=description, epilog=commands, formatter_class=formatter)

    def error(message):
        print(f"{made.prog}: {files.one_line(message)}", file=sys.stderr)
        sys.exit(2)

    made.error = error
    return made


def add_device_arguments(parser):
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one (default)")
    parser.add_argument("--workers", type=few, default=4, help="processes that load images (default 4)")
    parser.add_argument("--seed", type=seed, default=0, help="of all that is random (default 0)")


def add_training_arguments(parser, iterations, batch_size, crop_size, lr):
    """The arguments that every trainer has; the defaults are the paper's."""
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run directory; an unfinished one goes on")
    parser.add_argument("--iterations", type=positive_int, default=iterations, help=f"training steps (default {iterations})")
    parser.add_argument("--batch-size", type=positive_int, default=batch_size, help=f"(default {batch_size})")
    parser.add_argument(
        "--crop-size",
        type=height_width,
        default=height_width(crop_size),
        metavar="N|HxW",
        help=f"(default {crop_size})",
    )
    parser.add_argument("--width", type=positive_int, default=1024, help="frames are resized to it first (default 1024)")
    parser.add_argument("--lr", type=positive, default=lr, help=f"Adam's learning rate (default {lr})")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the hardware has it"
    )
    parser.add_argument("--log-every", type=positive_int, default=100, metavar="N", help="a row of log.csv (default 100)")
    parser.add_argument(
        "--save-every", type=positive_int, default=5000, metavar="N", help="checkpoint and sample grid (default 5000)"
    )
    parser.add_argument("--exclude", metavar="FILE", help="names of frames to leave out, one a line")
    parser.add_argument("--check", action="store_true", help="stop before the first step: are arguments and data all right?")
    parser.add_argument("--restart", action="store_true", help="throw away what RUN holds and begin anew")
    add_device_arguments(parser)


def pick_device(name):
    """--device -> torch.device, with the settings that make it fast. ValueError for one that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun's: a GPU for each process of a node
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not to be had here ({str(error).splitlines()[0]})") from error
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # NCCL's, and of what names none
        torch.backends.cudnn.benchmark = True  # crops have one size, and whole frames few
        torch.backends.cudnn.allow_tf32 = True  # convolutions alone: PatchNCE's products need float32's digits
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def _keep_freed_memory():
    """Let glibc keep what is freed instead of giving it to the kernel and taking it back, cleared, for the next tensor.

    A step frees and takes the same sizes again and again; clearing costs more than a norm or an activation computes. The
    price: what a process once had stays its own until it ends.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing at the heap's end goes back


def translator_layout(device):
    """The memory format in which a translator's step is fastest: channels_last on GPUs and on CPUs with AVX-512.

    With AVX2 alone oneDNN takes twice as long for the weight gradient of a 3x3 convolution in channels_last.
    """
    slow = device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()
    return torch.contiguous_format if slow else torch.channels_last


def pick_precision(name, device):
    """--precision -> "fp32" or "bf16"; auto is bf16 only where the hardware computes it, not where it is emulated."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


def autocast(device, precision):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


# ---------------------------------------------------------------------------------------------------------------------
# Processes: under torchrun, each computes its part of every batch


def join_processes(device):
    """Under torchrun: meet the other processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        shares = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if shares and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
            # Restarted processes find the addresses of their dead predecessors in it, and wait for them for half an hour.
            raise ValueError("--max-restarts: torchrun needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment for that")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))  # the slowest GPU may be hours behind


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def is_first():
    """The first process alone writes files."""
    return rank() == 0


def summed(tensor):
    """The sum over all processes of a tensor, which is overwritten by it."""
    if processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def averaged(tensor):
    """The mean over all processes of a tensor, which is overwritten by it."""
    return summed(tensor).div_(processes())


def shard(items):
    """This process's part of a list: every n-th item, so that parts are even and none depends on what is done already."""
    return items[rank() :: processes()]


def wait():
    """Until all processes are here. On the CPU, which does not keep a GPU waiting."""
    summed(torch.zeros(1))


def synchronised(network, device):
    """A network whose BatchNorm, in training, takes its statistics from the batches of all processes; on CUDA alone (torch)."""
    if processes() > 1 and device.type == "cuda":
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network


def adam(parameters, lr, betas=(0.9, 0.999)):
    """torch's Adam, in one kernel a step instead of a dozen small ones a parameter (`fused`); the CPU gains most."""
    return torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True)


def update(optimizer, loss):
    """One step of an optimiser down the gradient of its loss, which is averaged over all processes as it is computed."""
    if processes() > 1:
        loss = _averaging(optimizer)(loss)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _averaging(optimizer):
    """DistributedDataParallel around an optimiser's parameters and a module that passes a loss on.

    Not around the networks: a step of CUT runs one network several times, calls more than its forward(), and takes
    gradients through a discriminator that are not the discriminator's. Made anew when parameters are frozen or thawed.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    held = [id(p) for p in trained]
    if getattr(optimizer, "held", None) != held:
        passes = torch.nn.Identity()
        passes.held = torch.nn.ParameterList(trained)
        optimizer.held, optimizer.averaging = held, DistributedDataParallel(passes, init_sync=False)
    return optimizer.averaging


# ---------------------------------------------------------------------------------------------------------------------
# Training runs

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Arguments that may differ when a run is resumed: they do not change what it computes. What --exclude leaves is compared.
FREE_ARGUMENTS = {"out", "device", "workers", "log_every", "save_every", "check", "restart", "exclude"}


def _quoted(value):
    """What a file holds, and may be anything, as a part of a message."""
    text = files.one_line(value)
    return text if len(text) <= 200 else text[:200] + "..."


class Run:
    """A run directory and the loop that fills it: checkpoint.pt, log.csv, args.json, samples/, summary.json, weights.pt."""

    def __init__(self, args):
        self.args, self.out = args, args.out
        self.device = pick_device(args.device)
        join_processes(self.device)
        args.processes = processes()
        self.checkpoint = self.out / "checkpoint.pt"
        if args.crop_size[1] > args.width:
            raise ValueError(f"--crop-size {args.crop_size[1]}: wider than the frames, which --width {args.width} makes")
        files.check_out(self.out, *(getattr(args, name, None) for name in ("source", "target", "data", "segmenter")))
        self._read_stored()
        if args.precision == "auto":
            args.precision = self.stored.get("precision") or pick_precision("auto", self.device)
        self.compare_arguments()
        self.iteration = 0  # the number of steps done
        self.is_finished = (self.out / "weights.pt").is_file() and not args.restart
        self.rows, self.sums, self.steps_summed = [], {}, 0

    def _read_stored(self):
        self.args.script, path = Path(sys.argv[0]).name, self.out / "args.json"
        self.stored = files.read_json(path) if path.is_file() else {}
        if self.stored.get("script", self.args.script) != self.args.script:
            raise ValueError(f"{path}: holds a run of {_quoted(self.stored['script'])}; give another --out")
        if self.args.restart:
            self.stored = {}

    def compare_arguments(self):
        """Raises ValueError if the run was begun with arguments, or with data, that would change what it computes."""
        self.arguments = json.loads(json.dumps(vars(self.args), default=str))
        changed = [
            f"--{key.replace('_', '-')} (was {_quoted(self.stored[key])}, is now {_quoted(value)})"
            for key, value in self.arguments.items()
            if key in self.stored and key not in FREE_ARGUMENTS and self.stored[key] != value
        ]
        if changed:
            raise ValueError(
                f"{self.out}: begun with other arguments: {', '.join(changed)}; "
                "give another --out, or --restart to throw away what is there"
            )

    def restore(self, frames=None, **state):
        """Name what a checkpoint holds (objects with state_dict and load_state_dict), and load it if there is one.

        frames: {name of a data set: its frames}; a run does not go on with others. From here on the run directory is
        this process's.
        """
        self.state = state
        for name, listed in (frames or {}).items():
            setattr(self.args, f"{name}_frames", fingerprint(listed))
        self.compare_arguments()
        if self.args.check:
            print(f"{self.args.script}: arguments and data are all right ({self.device}, {self.args.precision})")
            sys.exit()
        if is_first():
            self.lock = files.lock(self.out)
            self._read_stored()  # again: another process may have begun while this one looked at its data
            self.compare_arguments()
            if self.args.restart:
                self._clear()
            (self.out / "samples").mkdir(exist_ok=True)
            files.clear_parts(self.out)
            files.clear_parts(self.out / "samples")
        wait()
        if self.checkpoint.is_file():
            self._load()
        if is_first():
            files.write_json(self.out / "args.json", self.arguments)

    def _load(self):
        with open(self.checkpoint, "rb") as file:
            try:
                saved = torch.load(file, map_location=self.device, weights_only=True)
                if saved["begun"] != self._begun():
                    raise ValueError("begun with other arguments")
                for name, part in self.state.items():
                    of_process = isinstance(part, OfProcess)
                    part.load_state_dict(saved["state"][name][rank()] if of_process else saved["state"][name])
                    if isinstance(part, torch.optim.Optimizer):
                        _check_moments(part)
                self.iteration, self.steps_summed = saved["iteration"], saved["steps_summed"]
                self.sums = {str(name): total.reshape(()) for name, total in saved["sums"][rank()].items()}
                if not (type(self.iteration) is type(self.steps_summed) is int and 0 <= self.iteration <= self.args.iterations):
                    raise ValueError("no number of iterations")
                rows = files.read_csv(self.out / "log.csv")
                self.rows = [row for row in rows if int(row["iteration"]) <= self.iteration]
                for row in self.rows:
                    float(row["seconds_per_iteration"]), int(row["peak_memory_mib"])
            except Exception as error:  # a damaged file raises whatever its bytes happen to mean
                raise ValueError(
                    f"{self.checkpoint}: not a checkpoint of this run, or log.csv beside it is damaged "
                    f"({type(error).__name__}); --restart begins anew"
                ) from error

    def _begun(self):
        """What tells runs of equal networks apart; no paths, since checkpoints of two folders are to be equal."""
        names = ("script", "method", "seed", "iterations", "processes", "precision")
        return {name: self.arguments.get(name) for name in names}

    def _clear(self):
        for name in ("weights.pt", "checkpoint.pt", "log.csv", "summary.json", "evaluation.json", "args.json"):
            (self.out / name).unlink(missing_ok=True)
        for sample in (self.out / "samples").glob("*.png"):
            sample.unlink()

    def iterations(self, dataset):
        """Yield (iteration, batch on the device) for the steps that are left; logs, saves, and stops on signals."""
        args, cuda = self.args, self.device.type == "cuda"
        batches = _Batches(self.iteration, args.iterations, args.batch_size, rank(), processes())
        loader = DataLoader(
            dataset, batch_sampler=batches, num_workers=args.workers, pin_memory=cuda, worker_init_fn=ignore_interrupts
        )
        bar = tqdm(total=args.iterations, initial=self.iteration, desc=str(self.out), disable=not is_first())
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        self.interval_start, self.steps_timed = time.perf_counter(), 0  # a resumed interval is timed from here on
        with _caught_signals() as signals, bar:
            for batch in loader:
                torch.manual_seed(int(np.random.SeedSequence((args.seed, self.iteration)).generate_state(1)[0]))
                yield self.iteration, _to_device(batch, self.device)
                self.iteration += 1
                self.steps_timed += 1
                last = self.iteration == args.iterations
                if last or self.iteration % args.log_every == 0:
                    self._write_log()
                signalled = _agreed(signals)
                if last or self.iteration % args.save_every == 0 or signalled:
                    self.save()
                if signalled and not last:
                    sys.exit(128 + signalled)
                bar.update()

    @property
    def saves_next(self):
        """Is a checkpoint due after the step under way? Then a sample grid is, too."""
        due = (self.iteration + 1) % self.args.save_every == 0 or self.iteration + 1 == self.args.iterations
        return due and is_first()

    @property
    def samples(self):
        """How many samples all processes take in all iterations."""
        return self.args.iterations * self.args.batch_size * processes()

    def log(self, losses, **values):
        """Losses (scalar tensors) are averaged until the next row of log.csv, without waiting for the device; values
        (learning rates, counts) go there as they are."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach()
        self.steps_summed += 1
        self.values = values

    def _write_log(self):
        means = self._finite_means()  # waits for the device, so that the time below is that of finished steps
        seconds = (time.perf_counter() - self.interval_start) / self.steps_timed
        self._finite_state()
        self.rows.append(
            {"iteration": self.iteration}
            | {name: f"{value:.6g}" for name, value in (means | self.values).items()}
            | {"seconds_per_iteration": f"{seconds:.4f}", "peak_memory_mib": f"{peak_memory_mib(self.device):.0f}"}
        )
        if is_first():
            files.write_csv(self.out / "log.csv", self.rows)
        self.sums, self.steps_summed, self.steps_timed, self.interval_start = {}, 0, 0, time.perf_counter()

    def _finite_means(self):
        if not self.sums:
            return {}
        totals = averaged(torch.stack([total.double() for total in self.sums.values()])).tolist()
        means = {name: total / self.steps_summed for name, total in zip(self.sums, totals, strict=True)}
        if bad := [name for name, mean in means.items() if not np.isfinite(mean)]:
            raise self._diverged("loss", bad)
        return means

    def _finite_state(self):
        state = {name: part.state_dict() for name, part in self.state.items()}
        bad = not_finite(state)
        if processes() > 1:  # what is of one process, BatchNorm's statistics say, need not be bad in all
            bad = list(dict.fromkeys(name for names in _gathered(bad) for name in names))
        if bad:
            raise self._diverged("state", bad)
        return state

    def _diverged(self, kind, names):
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        return FloatingPointError(
            f"{self.out}: diverged before iteration {self.iteration}: {kind} {shown} not finite; "
            "the last checkpoint is kept, a lower --lr (with --restart) may help"
        )

    def save(self):
        """Write checkpoint.pt; a state that is not finite, or whose losses are not, is never saved."""
        start = time.perf_counter()
        self._finite_means()
        state = self._finite_state()
        for name, part in self.state.items():
            if isinstance(part, OfProcess):
                state[name] = _gathered(state[name])
        content = {"begun": self._begun(), "iteration": self.iteration, "state": state}
        content |= {"sums": _gathered(self.sums), "steps_summed": self.steps_summed}
        if is_first():
            files.write_whole(self.checkpoint, torch_bytes(content))
        self.interval_start += time.perf_counter() - start  # saving is no part of a step

    def save_grid(self, *columns):
        """Images (B, 3, h, w) in [0, 1], a column each and a row a sample -> samples/ITERATION.png."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        rows = torch.stack([c.detach().float().cpu().clamp(0, 1) for c in columns], dim=1).flatten(0, 1)
        grid = to_pil_image(make_grid(rows, nrow=len(columns)))
        files.write_whole(self.out / "samples" / f"{self.iteration + 1:07d}.png", files.png_bytes(grid))
        self.interval_start += time.perf_counter() - start

    def finish(self, weights, **summary):
        """Write summary.json and, last, weights.pt: the sign that the run is finished."""
        if not is_first():
            return
        times = [float(row["seconds_per_iteration"]) for row in self.rows] or [0.0]
        summary |= {
            "iterations": self.iteration,
            "seconds_per_iteration": statistics.median(times[1:] or times),  # the first interval warms up
            "peak_memory_mib": max((int(row["peak_memory_mib"]) for row in self.rows), default=0),
            "precision": self.args.precision,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
        }
        files.write_json(self.out / "summary.json", summary)
        files.write_whole(self.out / "weights.pt", torch_bytes(weights))


def fingerprint(frames):
    """How many frames there are, and a hash of their names: does a run go on with the data that it was begun with?"""
    names = "\0".join(frame.name for frame in frames).encode(errors="surrogateescape")
    return f"{len(frames)} frames, {hashlib.sha256(names).hexdigest()[:12]}"


def trained_width(run):
    """The width of the frames that a run was trained on, from its args.json."""
    width = files.read_json(run / "args.json", "width")["width"]
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"{run / 'args.json'}: width is {width!r}, where a whole number from 1 up is needed")
    return width


def torch_bytes(content):
    """What torch.save writes, as bytes, and the same bytes for the same content.

    A file that torch writes itself holds its path's name; and pickle writes an object that it has seen by reference, so
    that equal strings must be one object: those of a resumed run were read from a file, one by one.
    """
    buffer = io.BytesIO()
    torch.save(_plain(content), buffer)
    return buffer.getbuffer()


def _plain(part):
    if isinstance(part, dict):
        return {_plain(key): _plain(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return type(part)(_plain(value) for value in part)
    return sys.intern(part) if isinstance(part, str) else part


def not_finite(state, name=""):
    """Names of the tensors in nested dicts and lists that hold nan or infinity; waits for the device once."""
    named = [(key, tensor) for key, tensor in _tensors(state, name) if tensor.is_floating_point() and tensor.numel()]
    if not named:
        return []
    extremes = torch.stack([value.double() for _, tensor in named for value in torch.aminmax(tensor.detach())])
    return [key for (key, _), good in zip(named, extremes.isfinite().view(-1, 2).all(1).tolist(), strict=True) if not good]


def _tensors(part, name):
    if isinstance(part, torch.Tensor):
        yield name, part
    elif isinstance(part, (dict, list, tuple)):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


class OfProcess:
    """A part of a checkpoint that each process has its own of: put before a class that has state_dict."""


def _check_moments(optimizer):
    """ValueError unless Adam's moments have their parameters' shapes, which load_state_dict does not look at."""
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            if moment.shape != (() if name == "step" else parameter.shape):
                raise ValueError(f"{name} has another shape than its parameter")


def _gathered(state):
    """The states of all processes, in their order; those of others on the CPU."""
    if processes() == 1:
        return [state]
    states = [None] * processes()
    dist.all_gather_object(states, bytes(torch_bytes(state)))  # tensors themselves would come back on the GPU they are from
    return [torch.load(io.BytesIO(state), map_location="cpu", weights_only=True) for state in states]


def _agreed(signals):
    """The number of a signal that came to any process, 0 for none: all stop after the same step."""
    number = torch.tensor(max(signals, default=0))
    if processes() > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)  # on the CPU: a GPU goes on computing
    return int(number)


class _Batches:
    """Sample numbers of the iterations from `start` on: iteration i of n processes has those from i * n * batch_size on.

    Of these each process takes batch_size, in the order of the processes.
    """

    def __init__(self, start, stop, batch_size, rank, processes):
        self.start, self.stop, self.batch_size, self.rank, self.processes = start, stop, batch_size, rank, processes

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        for i in range(self.start, self.stop):
            first = (i * self.processes + self.rank) * self.batch_size
            yield range(first, first + self.batch_size)


@contextlib.contextmanager
def _caught_signals():
    """A list that SIGTERM, SIGINT and SIGHUP append to, so that the step under way is finished and saved first.

    However often one comes: to a process group, torchrun and run_all.sh pass on what its members have had already.
    """
    caught, previous = [], {}
    for sign in STOP_SIGNALS:
        if sign != signal.SIGHUP or signal.getsignal(sign) != signal.SIG_IGN:  # nohup's wish is respected
            previous[sign] = signal.signal(sign, lambda sign, frame: caught.append(sign))
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_interrupts(*_):
    """For processes that read or draw images: a signal to the group reaches them too, and it is the parent's to act."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _to_device(batch, device):
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    return [_to_device(part, device) for part in batch]


def peak_memory_mib(device):
    """Most memory in use so far, in MiB: tensors on a GPU, the whole process (resident set) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # getrusage's ru_maxrss begins with the peak of the process that started this one.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
