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
import csv
import json
import logging
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Command lines and errors


def run_script(main):
    """Call main(); what a user can cause (ValueError, OSError) becomes one line on stderr and exit status 2.

    CLADA_TRACEBACK=1 in the environment shows where it came from.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("CLADA_TRACEBACK"):
            raise
        # A DataLoader's worker sends its whole traceback as the message; the error itself is the last line.
        text = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        print(f"{Path(sys.argv[0]).name}: {text.removeprefix('ValueError: ')}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def positive_int(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def count(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def non_negative(text):
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number from 0 up")
    return value


def height_width(text):
    """ "400" or "256x512" (height x width) -> (height, width)."""
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text} is neither N nor HxW")
    return (sides[0], sides[-1])


def parser(description, commands):
    """An argument parser that shows the script's commands as they stand in its docstring."""
    return argparse.ArgumentParser(
        description=description, epilog=commands, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_device_arguments(parser):
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one (default)")
    parser.add_argument("--workers", type=count, default=4, help="processes that load images (default 4)")
    parser.add_argument("--seed", type=count, default=0, help="of all that is random (default 0)")


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
    parser.add_argument("--lr", type=non_negative, default=lr, help=f"Adam's learning rate (default {lr})")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the hardware has it"
    )
    parser.add_argument("--log-every", type=positive_int, default=100, metavar="N", help="a row of log.csv (default 100)")
    parser.add_argument(
        "--save-every", type=positive_int, default=5000, metavar="N", help="checkpoint and sample grid (default 5000)"
    )
    parser.add_argument("--check", action="store_true", help="stop before the first step: are arguments and data all right?")
    add_device_arguments(parser)


def pick_device(name):
    """--device -> torch.device, with the settings that make it fast. ValueError for one that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not to be had here ({str(error).splitlines()[0]})") from error
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # crops have one size
        torch.backends.cudnn.allow_tf32 = True  # convolutions alone: PatchNCE's products need float32's digits
    return device


def pick_precision(name, device):
    """--precision -> "fp32" or "bf16"; auto is bf16 only where the hardware computes it, not where it is emulated."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


def autocast(device, precision):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def adam(parameters, lr, betas=(0.9, 0.999)):
    """torch's Adam in one kernel a step instead of a dozen small ones a parameter; the CPU gains most."""
    return torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True)


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def whole_file(path):
    """A temporary path beside `path`, which takes its place, written through to the disk, only if all went well."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's are for the owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_torch(content, path):
    """torch.save, whole or not at all. By an open file: torch writes a path's name into the file, here a random one."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def write_json(path, content):
    with whole_file(path) as temporary:
        Path(temporary).write_text(json.dumps(content, indent=2) + "\n")


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


def finished(out, name):
    """Path of a finished run's weights.pt; ValueError if the run is not there or not finished. name: its flag."""
    weights = Path(out) / "weights.pt"
    if not weights.is_file():
        raise ValueError(f"{name} {out}: no weights.pt there; is that run finished? The command that began it goes on with it")
    return weights


def write_csv(path, rows):
    """Rows (dicts) as a CSV file with the columns of all of them, in the order of their first appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path):
    """The rows of a CSV file as dicts of strings; none if there is no such file."""
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


# ---------------------------------------------------------------------------------------------------------------------
# Training runs

# Arguments that may differ when a run is resumed: they do not change what it computes.
FREE_ARGUMENTS = {"out", "device", "workers", "log_every", "save_every", "check"}


class Run:
    """A run directory and the loop that fills it: checkpoint.pt, log.csv, args.json, samples/, summary.json, weights.pt."""

    def __init__(self, args):
        self.args, self.out = args, args.out
        self.device = pick_device(args.device)
        self.checkpoint = self.out / "checkpoint.pt"
        stored = read_json(self.out / "args.json") if (self.out / "args.json").is_file() else {}
        if args.precision == "auto":
            args.precision = stored.get("precision") or pick_precision("auto", self.device)
        self.arguments = json.loads(json.dumps(vars(args), default=str))
        changed = [
            f"--{key.replace('_', '-')} (was {stored[key]}, is {value})"
            for key, value in self.arguments.items()
            if key in stored and key not in FREE_ARGUMENTS and stored[key] != value
        ]
        if changed:
            raise ValueError(f"{self.out}: begun with other arguments: {', '.join(changed)}; give another --out or remove it")
        self.iteration = 0  # the number of steps done
        self.is_finished = (self.out / "weights.pt").is_file()
        self.rows, self.sums, self.steps_summed = [], {}, 0

    def restore(self, **state):
        """Name what a checkpoint holds (objects with state_dict and load_state_dict), and load it if there is one."""
        self.state = state
        if self.args.check:
            print(f"{Path(sys.argv[0]).name}: arguments and data are all right ({self.device}, {self.args.precision})")
            sys.exit()
        if self.checkpoint.is_file():
            try:
                saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
                for name, part in state.items():
                    part.load_state_dict(saved["state"][name])
                self.iteration, self.sums, self.steps_summed = saved["iteration"], saved["sums"], saved["steps_summed"]
            except OSError:
                raise
            except Exception as error:
                raise ValueError(f"{self.checkpoint}: not a checkpoint of this run ({type(error).__name__})") from error
        self.rows = [row for row in read_csv(self.out / "log.csv") if int(row["iteration"]) <= self.iteration]
        (self.out / "samples").mkdir(parents=True, exist_ok=True)
        for leftover in self.out.glob(".checkpoint.????????.pt"):  # whole_file's, of a killed run
            leftover.unlink()
        write_json(self.out / "args.json", self.arguments)

    def iterations(self, dataset):
        """Yield (iteration, batch on the device) for the steps that are left; logs, saves, and stops on signals."""
        args, cuda = self.args, self.device.type == "cuda"
        batches = _Batches(self.iteration, args.iterations, args.batch_size)
        loader = DataLoader(
            dataset, batch_sampler=batches, num_workers=args.workers, pin_memory=cuda, worker_init_fn=_ignore_interrupts
        )
        bar = tqdm(total=args.iterations, initial=self.iteration, desc=str(self.out))
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
                if last or self.iteration % args.save_every == 0 or signals:
                    self.save()
                if signals and not last:
                    sys.exit(128 + signals[0])
                bar.update()

    @property
    def saves_next(self):
        """Is a checkpoint due after the step under way? Then a sample grid is, too."""
        return (self.iteration + 1) % self.args.save_every == 0 or self.iteration + 1 == self.args.iterations

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
        self.rows.append(
            {"iteration": self.iteration}
            | {name: f"{value:.6g}" for name, value in (means | self.values).items()}
            | {"seconds_per_iteration": f"{seconds:.4f}", "peak_memory_mib": f"{peak_memory_mib(self.device):.0f}"}
        )
        write_csv(self.out / "log.csv", self.rows)
        self.sums, self.steps_summed, self.steps_timed, self.interval_start = {}, 0, 0, time.perf_counter()

    def _finite_means(self):
        means = {name: float(total) / self.steps_summed for name, total in self.sums.items()}
        if bad := [name for name, mean in means.items() if not np.isfinite(mean)]:
            raise FloatingPointError(
                f"{self.out}: diverged before iteration {self.iteration}: {', '.join(bad)} not finite; "
                "the last checkpoint is kept, a lower --lr may help"
            )
        return means

    def save(self):
        """Write checkpoint.pt; a state whose losses are not finite is never saved."""
        self._finite_means()
        start = time.perf_counter()
        state = {name: part.state_dict() for name, part in self.state.items()}
        save_torch(
            {"iteration": self.iteration, "state": state, "sums": self.sums, "steps_summed": self.steps_summed},
            self.checkpoint,
        )
        self.interval_start += time.perf_counter() - start  # saving is no part of a step

    def save_grid(self, *columns):
        """Images (B, 3, h, w) in [0, 1], a column each and a row a sample -> samples/ITERATION.png."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        rows = torch.stack([c.detach().float().cpu().clamp(0, 1) for c in columns], dim=1).flatten(0, 1)
        with whole_file(self.out / "samples" / f"{self.iteration + 1:07d}.png") as temporary:
            save_image(make_grid(rows, nrow=len(columns)), temporary)
        self.interval_start += time.perf_counter() - start

    def finish(self, weights, **summary):
        """Write summary.json and, last, weights.pt: the sign that the run is finished."""
        times = [float(row["seconds_per_iteration"]) for row in self.rows]
        summary |= {
            "iterations": self.iteration,
            "seconds_per_iteration": statistics.median(times[1:] or times),  # the first interval warms up
            "peak_memory_mib": max(int(row["peak_memory_mib"]) for row in self.rows),
            "precision": self.args.precision,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
        }
        write_json(self.out / "summary.json", summary)
        save_torch(weights, self.out / "weights.pt")


class _Batches:
    """Sample numbers of the iterations from `start` on: iteration i has those from i * batch_size on."""

    def __init__(self, start, stop, batch_size):
        self.start, self.stop, self.batch_size = start, stop, batch_size

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        for i in range(self.start, self.stop):
            yield range(i * self.batch_size, (i + 1) * self.batch_size)


@contextlib.contextmanager
def _caught_signals():
    """A list that SIGTERM and SIGINT append to, so that the step under way is finished and saved first."""
    caught, previous = [], {}
    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ignore_interrupts(worker):
    """A signal to the process group reaches the workers too, which the trainer needs until it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _to_device(batch, device):
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    return [_to_device(part, device) for part in batch]


def peak_memory_mib(device):
    """Most memory in use so far, in MiB: tensors on a GPU, the whole process (resident set) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
