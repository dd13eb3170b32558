"""What every trainer is written around: its run directory and the loop that fills it.

    run = Run(args)                                    # opens --out, resolves --device and --precision
    run.restore(generator=generator, ...)              # names all that a checkpoint holds, and loads it if there is one
    for iteration, batch in run.iterations(dataset):   # goes on where the last checkpoint was
        run.log(losses, lr=lr)
    run.finish(models.network_state(generator))        # weights.pt and summary.json

What iteration k computes depends on --seed and k alone: samples are numbered by iteration, and torch's generator is seeded
anew at each, so that no state of a generator needs saving.
"""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

import files
import loading
import optimization
import runtime

log = logging.getLogger("training")

# Arguments that may differ when a run is resumed, since they do not change what it computes. Where data and weights lie is
# among them: what they hold is compared.
FREE_ARGUMENTS = set("out device deterministic workers cache log_every save_every check restart exclude".split())
FREE_ARGUMENTS |= set("source target data split target_splits segmenter encoder_weights".split())
FREE_ARGUMENTS |= set("content_of_source content_of_target content_of_data".split())  # but once finished: see is_finished


def _quoted(value):
    """What a file holds, and may be anything, as a part of a message."""
    text = files.printable(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _described(key):
    """What an entry of args.json is to the user: a flag, or what was found behind one."""
    what, _, name = key.rpartition("_of_")
    return (f"{what} of --" if what else "--") + name.replace("_", "-")


class Run:
    """A run directory and the loop that fills it: checkpoint.pt, log.csv, args.json, samples/, summary.json, weights.pt."""

    def __init__(self, args):
        self.args, self.out = args, args.out
        self.device = runtime.pick_device(args.device, tf32=True, deterministic=args.deterministic)
        runtime.join_processes(self.device)
        args.processes = runtime.processes()
        self.checkpoint = self.out / "checkpoint.pt"
        if args.crop_size[1] > args.width:
            raise ValueError(f"--crop-size {args.crop_size[1]}: wider than the frames, which --width {args.width} makes")
        inputs = [getattr(args, name, None) for name in ("source", "target", "data", "segmenter")]
        files.check_out(self.out, *inputs)
        files.check_out(args.cache or os.devnull, *inputs, flag="--cache")
        if args.cache and args.cache.exists() and not args.cache.is_dir():
            raise ValueError(f"--cache {args.cache}: a file, where a folder is needed")
        self._read_stored()
        if args.precision == "auto":
            args.precision = self.stored.get("precision") or runtime.pick_precision("auto", self.device)
        self.compare_arguments()
        self.iteration = 0  # the number of steps done
        self.left_out = {}  # names of frames, and why
        self.rows, self.sums, self.steps_summed = [], {}, 0

    def _read_stored(self):
        self.args.script, path = Path(sys.argv[0]).name, self.out / "args.json"
        self.stored = files.read_json(path) if path.is_file() else {}
        if self.stored.get("script", self.args.script) != self.args.script:
            raise ValueError(f"{path}: holds a run of {_quoted(self.stored['script'])}; give another --out")
        if self.args.restart:
            self.stored = {}

    def compare_arguments(self, free=FREE_ARGUMENTS):
        """Raises ValueError if the run was begun with arguments, or with data, that would change what it computes."""
        self.arguments = json.loads(json.dumps(vars(self.args), default=str))
        changed = [
            f"{_described(key)} (was {_quoted(self.stored[key])}, is now {_quoted(value)})"
            for key, value in self.arguments.items()
            if key in self.stored and key not in free and self.stored[key] != value
        ]
        if changed:
            raise ValueError(
                f"{self.out}: begun with other arguments: {', '.join(changed)}; "
                "give another --out, or --restart to throw away what is there"
            )

    def is_finished(self, **frames):
        """Has the run finished on these data, {name: data.FrameList}? ValueError if it was started on others.

        An unfinished run may go on with files that have changed, since a damaged one may have been mended.
        """
        for name, listed in frames.items():
            setattr(self.args, f"frames_of_{name}", listed.fingerprint())
            setattr(self.args, f"content_of_{name}", listed.content())
            self.left_out |= listed.left_out
        self.compare_arguments()
        if self.args.restart or not (self.out / "weights.pt").is_file():
            for name in frames:
                if self.stored.get(f"content_of_{name}", now := self.arguments[f"content_of_{name}"]) != now:
                    log.warning("%s: files of --%s have changed since it was started", self.out, name)
            return False
        self.compare_arguments(free=FREE_ARGUMENTS - {f"content_of_{name}" for name in frames})
        print(f"{self.out}: finished")
        if runtime.is_first() and not self.args.check:
            with contextlib.suppress(OSError):  # of an archive
                files.write_json(self.out / "args.json", self.arguments)  # where the data lie now
        return True

    def restore(self, **state):
        """Name what a checkpoint holds (objects with state_dict and load_state_dict), and load it if there is one.

        From here on the run directory is this process's.
        """
        self.state = state
        if self.args.check:
            print(f"{self.args.script}: arguments and data are all right ({self.device}, {self.args.precision})")
            sys.exit()
        if runtime.is_first():
            self.lock = files.lock(self.out)
            self._read_stored()  # again: another process may have begun while this one looked at its data
            self.compare_arguments()
            if self.args.restart:
                self._clear()
            (self.out / "samples").mkdir(exist_ok=True)
            files.clear_parts(self.out)
            files.clear_parts(self.out / "samples")
        if self.args.cache:  # which each machine may have its own of
            self.args.cache.mkdir(parents=True, exist_ok=True)
            if os.access(self.args.cache, os.W_OK):
                files.clear_parts(self.args.cache)
            else:
                log.warning("--cache %s: cannot be written, so that nothing is kept there", self.args.cache)
        runtime.barrier()
        if self.checkpoint.is_file():
            self._load()
        if runtime.is_first():
            files.write_json(self.out / "args.json", self.arguments)
            if self.left_out:
                files.write_left_out(self.out, self.left_out)
            self._check_disk()
        found = (
            (key.removeprefix("frames_of_"), value) for key, value in self.arguments.items() if key.startswith("frames_of_")
        )
        frames = [f"{name}: {value.partition(',')[0]}" for name, value in found]
        place = f"resumes after {self.iteration} of" if self.iteration else "starts on"
        where = runtime.describe(self.device, self.args.precision)
        log.info("%s: %s; %s; %s %d steps", self.out, where, ", ".join(frames), place, self.args.iterations)

    def _check_disk(self):
        """ValueError if a checkpoint will not fit: each parameter, its two moments, and the file that it replaces."""
        size = sum(tensor.nbytes for _, tensor in _tensors({name: part.state_dict() for name, part in self.state.items()}, ""))
        needed = 2 * (size if self.iteration else 3 * size)
        free = shutil.disk_usage(self.out).free + (self.checkpoint.stat().st_size if self.checkpoint.is_file() else 0)
        if free < needed:
            raise ValueError(f"{self.out}: checkpoints need {needed:,} bytes of its disk, {free:,} are free")

    def _load(self):
        with open(self.checkpoint, "rb") as file:
            try:
                saved = torch.load(file, map_location=self.device, weights_only=True)
                if saved["begun"] != self._begun():
                    raise ValueError("begun with other arguments")
                for name, part in self.state.items():
                    of_process = isinstance(part, OfProcess)
                    loaded = saved["state"][name][runtime.rank()] if of_process else saved["state"][name]
                    if isinstance(part, torch.optim.Optimizer):
                        optimization.load_optimizer(part, loaded)
                    else:
                        part.load_state_dict(loaded)
                self.iteration, self.steps_summed = saved["iteration"], saved["steps_summed"]
                self.sums = {str(name): total.reshape(()) for name, total in saved["sums"][runtime.rank()].items()}
                if not (type(self.iteration) is type(self.steps_summed) is int and 0 <= self.iteration <= self.args.iterations):
                    raise ValueError("no number of iterations")
                rows = files.read_csv(self.out / "log.csv")
                self.rows = [row for row in rows if int(row["iteration"]) <= self.iteration]
                for row in self.rows:
                    float(row["seconds_per_iteration"]), float(row.get("wait_seconds") or 0), int(row["peak_memory_mib"] or 0)
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
        for name in ("weights.pt", "checkpoint.pt", "log.csv", "summary.json", "evaluation.json", "left_out.txt", "args.json"):
            (self.out / name).unlink(missing_ok=True)
        for sample in (self.out / "samples").glob("*.png"):
            sample.unlink()

    def iterations(self, dataset):
        """Yield (iteration, batch on the device) for the steps that are left; logs, saves, and stops on signals."""
        args = self.args
        indices = _Batches(self.iteration, args.iterations, args.batch_size, runtime.rank(), runtime.processes())
        batches = loading.batches(dataset, indices, args.workers, self.device)
        bar = tqdm(total=args.iterations, initial=self.iteration, desc=str(self.out), disable=not runtime.is_first())
        self.clock = StepClock(self.device)
        self.warm_up()
        self.is_waiting = True
        with _caught_signals(self) as signals, bar, self._saving_if_stopped(signals):
            for batch in batches:
                self.is_waiting = False
                torch.manual_seed(int(np.random.SeedSequence((args.seed, self.iteration)).generate_state(1)[0]))
                self.clock.enter("step")
                yield self.iteration, batch
                self.clock.enter("wait")
                self.iteration += 1
                self._count_warm_up()
                last = self.iteration == args.iterations
                if last or self.iteration % args.log_every == 0:
                    self._write_log()
                signalled = _agreed(signals)
                if last or self.iteration % args.save_every == 0 or signalled:
                    self.save()
                if signalled and not last:
                    sys.exit(128 + signalled)
                bar.update()
                self.is_waiting = True

    @contextlib.contextmanager
    def _saving_if_stopped(self, signals):
        try:
            yield
        except _Stopped:
            self.save()
            sys.exit(128 + signals[0])

    def warm_up(self):
        """The next steps are the first of their kind: on CUDA, their peak memory is not the run's."""
        self.warming_up = optimization.WARM_UP + 1 if self.device.type == "cuda" else 0  # and one step more, which is measured

    def _count_warm_up(self):
        if self.warming_up > 0:
            self.warming_up -= 1
            if self.warming_up == 1:
                torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def saves_next(self):
        """Is a checkpoint due after the step under way? Then a sample grid is, too."""
        due = (self.iteration + 1) % self.args.save_every == 0 or self.iteration + 1 == self.args.iterations
        return due and runtime.is_first()

    @property
    def samples(self):
        """How many samples all processes take in all iterations."""
        return self.args.iterations * self.args.batch_size * runtime.processes()

    def log(self, losses, **values):
        """Losses (scalar tensors) are averaged until the next row of log.csv, without waiting for the device; values
        (learning rates, counts) go there as they are."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach()
        self.steps_summed += 1
        self.values = values

    def _write_log(self):
        self.clock.enter("other")
        means = self._finite_means()
        seconds, wait = self.clock.read()
        peak = "" if self.warming_up else f"{peak_memory_mib(self.device):.0f}"
        self._finite_state()
        self.rows.append(
            {"iteration": self.iteration}
            | {name: f"{value:.6g}" for name, value in (means | self.values).items()}
            | {"seconds_per_iteration": f"{seconds:.5f}", "wait_seconds": f"{wait:.5f}", "peak_memory_mib": peak}
        )
        if runtime.is_first():
            files.write_csv(self.out / "log.csv", self.rows)
        self.sums, self.steps_summed = {}, 0
        self.clock.enter("wait")

    def _finite_means(self):
        if not self.sums:
            return {}
        totals = runtime.all_reduce_mean_(torch.stack([total.double() for total in self.sums.values()])).tolist()
        means = {name: total / self.steps_summed for name, total in zip(self.sums, totals, strict=True)}
        if bad := [name for name, mean in means.items() if not np.isfinite(mean)]:
            raise self._diverged("loss", bad)
        return means

    def _finite_state(self):
        state = {name: part.state_dict() for name, part in self.state.items()}
        bad = not_finite(state)
        if runtime.processes() > 1:  # what is of one process, BatchNorm's statistics say, need not be bad in all
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
        self.clock.enter("other")
        self._finite_means()
        state = self._finite_state()
        for name, part in self.state.items():
            if isinstance(part, OfProcess):
                state[name] = _gathered(state[name])
        content = {"begun": self._begun(), "iteration": self.iteration, "state": state}
        content |= {"sums": _gathered(self.sums), "steps_summed": self.steps_summed}
        if runtime.is_first():
            files.write_whole(self.checkpoint, torch_bytes(content))
        self.clock.enter("wait")

    def save_grid(self, *columns):
        """Images (B, 3, h, w) in [0, 1], a column each and a row a sample -> samples/ITERATION.png."""
        self.clock.enter("other")
        rows = torch.stack([c.detach().float().cpu().clamp(0, 1) for c in columns], dim=1).flatten(0, 1)
        grid = to_pil_image(make_grid(rows, nrow=len(columns)))
        files.write_whole(self.out / "samples" / f"{self.iteration + 1:07d}.png", files.png_bytes(grid))

    def finish(self, weights, **summary):
        """Write summary.json and, last, weights.pt: the sign that the run is finished."""
        if not runtime.is_first():
            return
        summary |= {"iterations": self.iteration}
        rows = [row for row in self.rows if row.get("wait_seconds")]  # older ones counted it as a part of the step
        for name in ("seconds_per_iteration", "wait_seconds"):
            times = [float(row[name]) for row in rows] or [0.0]
            summary[name] = statistics.median(times[1:] or times)  # the first interval warms up
        peaks = [int(row["peak_memory_mib"]) for row in self.rows if row["peak_memory_mib"]]
        summary |= {
            "peak_memory_mib": max(peaks, default=round(peak_memory_mib(self.device))),
            "precision": self.args.precision,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
        }
        files.write_json(self.out / "summary.json", summary)
        files.write_whole(self.out / "weights.pt", torch_bytes(weights))


class StepClock:
    """Times the phases of training: "step", the "wait" for the next batch, and "other" work, which is not reported.

    On CUDA by events, read with the log's rows, so that no step waits for the device. A wait is then the device's: next to
    nothing while it is behind the process that gives it work.
    """

    def __init__(self, device):
        self.is_cuda = device.type == "cuda"
        self.spans, self.phase = {"step": [], "wait": []}, "other"

    def enter(self, phase):
        """End the phase under way and begin another."""
        now = self._mark()
        if self.phase != "other":
            self.spans[self.phase].append((self.since, now))
        self.phase, self.since = phase, now

    def read(self):
        """Mean seconds of a step, and of waiting per step, since the last call; waits for the device."""
        if self.is_cuda:
            torch.cuda.synchronize()
        means = [sum(map(self._seconds, spans)) / max(1, len(self.spans["step"])) for spans in self.spans.values()]
        self.spans = {"step": [], "wait": []}
        return means

    def _mark(self):
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, span):
        begin, end = span
        return begin.elapsed_time(end) / 1e3 if self.is_cuda else end - begin


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
    """Names of the tensors in nested dicts and lists that hold nan or infinity; waits for the device once, or to name them."""
    named = [(key, tensor) for key, tensor in _tensors(state, name) if tensor.is_floating_point() and tensor.numel()]
    # The largest magnitude of all, in a few kernels: finite unless one of them is not, since a maximum does not overflow.
    if torch.nn.utils.get_total_norm([tensor for _, tensor in named], torch.inf).isfinite():
        return []
    return [key for key, tensor in named if not tensor.isfinite().all()]


def _tensors(part, name):
    if isinstance(part, torch.Tensor):
        yield name, part
    elif isinstance(part, (dict, list, tuple)):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


class OfProcess:
    """A part of a checkpoint that each process has its own of: put before a class that has state_dict."""


def _gathered(state):
    """The states of all processes, in their order; those of others on the CPU."""
    if runtime.processes() == 1:
        return [state]
    states = [None] * runtime.processes()
    dist.all_gather_object(states, bytes(torch_bytes(state)))  # tensors themselves would come back on the GPU they are from
    return [torch.load(io.BytesIO(state), map_location="cpu", weights_only=True) for state in states]


def _agreed(signals):
    """The number of a signal that came to any process, 0 for none: all stop after the same step."""
    number = torch.tensor(max(signals, default=0))
    if runtime.processes() > 1:
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


class _Stopped(BaseException):
    """A signal while a batch is waited for: between two steps, however long it takes."""


@contextlib.contextmanager
def _caught_signals(run):
    """A list that SIGTERM, SIGINT and SIGHUP append to, so that the step under way is finished and saved first.

    However often one comes: to a process group, torchrun and run_all.sh pass on what its members have had already. A process
    of many goes on to the next step, so that all stop after the same one.
    """
    caught, previous = [], {}

    def catch(number, frame):
        caught.append(number)
        if run.is_waiting and len(caught) == 1 and runtime.processes() == 1:
            raise _Stopped

    for sign in runtime.STOP_SIGNALS:
        if sign != signal.SIGHUP or signal.getsignal(sign) != signal.SIG_IGN:  # nohup's wish is respected
            previous[sign] = signal.signal(sign, catch)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def peak_memory_mib(device):
    """Most memory in use so far, in MiB: tensors on a GPU, the whole process (resident set) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # getrusage's ru_maxrss begins with the peak of the process that started this one.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
