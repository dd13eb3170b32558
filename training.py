"""Shared by all trainers: the run directory and the training loop.

    run = Run(args)                                    # resolves --device and --precision, reads what --out holds
    if run.is_finished(source=frames): ...             # compares arguments and data with those of the run
    run.restore(weights, generator=generator, ...)     # names the parts of a checkpoint, and loads it if there is one
    for iteration, batch in run.iterations(dataset):   # resumes after the last checkpoint
        run.log(losses, lr=lr)
    run.finish()                                       # writes summary.json and weights.pt, which weights() returns

What iteration k computes depends only on --seed and k: samples are numbered by iteration, and torch's generator is seeded
at every iteration. No generator state needs saving.
"""

import contextlib
import io
import json
import logging
import signal
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

import files
import loading
import optimization
import runtime

log = logging.getLogger("training")

# Arguments that may differ when a run is resumed, because they do not change what it computes. Paths of data and weights
# may differ because their content is compared.
FREE_ARGUMENTS = "version out device deterministic compile workers cache log_every save_every keep_every check exclude".split()
PATHS = ["source", "target", "data", "segmenter"]
FREE_ARGUMENTS += [*PATHS, "split", "target_splits", "encoder_weights"]


def add_domain_arguments(parser, source, target):
    """--source, --target and --target-splits of stages 1 and 4; source, target: their help."""
    folder = dict(type=runtime.real_path, required=True, metavar="DIR")
    parser.add_argument("--source", **folder, help=source)
    parser.add_argument("--target", **folder, help=target)
    parser.add_argument("--target-splits", default="train", help="Cityscapes splits, e.g. train,train_extra (default train)")


def add_arguments(parser, iterations, batch_size, crop_size, lr):
    """The arguments that all trainers share."""
    add, size, integer = parser.add_argument, runtime.height_width, runtime.positive_int
    add("--out", type=runtime.path, required=True, metavar="RUN", help="run directory; an unfinished run is resumed")
    add("--iterations", type=integer, default=iterations, help=f"training steps (default {iterations})")
    add("--batch-size", type=integer, default=batch_size, help=f"images per process, and per domain (default {batch_size})")
    add("--crop-size", type=size, default=size(crop_size), metavar="N|HxW", help=f"random crops (default {crop_size})")
    add("--width", type=integer, default=1024, help="resize frames to this width first (default 1024)")
    add("--lr", type=runtime.positive, default=lr, help=f"Adam's learning rate (default {lr})")
    runtime.add_compute_arguments(parser)
    add("--compile", action="store_true", help="torch.compile the networks: faster on a GPU, after minutes of compiling")
    add("--cache", type=runtime.path, metavar="DIR", help="keep resized frames there as PNG, which decode faster")
    add("--log-every", type=integer, default=100, metavar="N", help="steps per row of log.csv (default 100)")
    add("--save-every", type=integer, default=5000, metavar="N", help="steps per checkpoint and sample grid (default 5000)")
    add("--keep-every", type=integer, metavar="N", help="also keep the network at multiples of N, as weights_0100000.pt")
    add("--check", action="store_true", help="check arguments and data, and stop before training")


class Run:
    """A run directory (checkpoint.pt, log.csv, args.json, samples/, summary.json, weights.pt) and the loop that fills it."""

    def __init__(self, args):
        self.args, self.out = args, args.out
        self.device = runtime.pick_device(args.device, tf32=True, deterministic=args.deterministic)
        runtime.join_processes(self.device)
        args.processes, args.script, args.version = runtime.processes(), Path(sys.argv[0]).name, runtime.VERSION
        self.checkpoint = self.out / "checkpoint.pt"
        self.sample_count = args.iterations * args.batch_size * args.processes  # of the whole run
        if args.compile and args.deterministic:
            raise ValueError("--compile cannot be combined with --deterministic: compiled kernels are chosen by timing them")
        inputs = [getattr(args, name, None) for name in PATHS]
        files.check_out(self.out, *inputs)
        if args.cache:
            files.check_out(args.cache, *inputs, flag="--cache")
        self.saved = files.read_settings(self.out)
        if not self.saved and (made := [name for name in ("weights.pt", "checkpoint.pt") if (self.out / name).is_file()]):
            raise ValueError(f"{self.out}: holds {made[0]}, but no args.json that says how it was made; give another --out")
        args.precision = runtime.pick_precision(args.precision, self.device, self.saved.get("precision"))
        self._compare_arguments()
        self.iteration, self.frames = 0, {}  # steps done; the data, {name: data.FrameList}
        self.rows, self.sums, self.steps_summed = [], {}, 0

    def _compare_arguments(self, may_differ=()):
        """Raise ValueError if the run was started with arguments or data that would change what it computes."""
        self.arguments = json.loads(json.dumps(vars(self.args), default=str))
        self.settings = {key: value for key, value in self.arguments.items() if key not in FREE_ARGUMENTS}
        files.check_settings(self.out, self.saved, self.settings, may_differ)

    def is_finished(self, **frames):
        """True if the run has finished on these data, {name: data.FrameList}. ValueError if it was started on other data.

        In an unfinished run, changed file content only gives a warning: a damaged file may have been repaired.
        """
        self.frames = frames
        for name, listed in frames.items():
            setattr(self.args, f"frames_of_{name}", listed.fingerprint())
            setattr(self.args, f"content_of_{name}", listed.content())
        is_finished = runtime.all_gather((self.out / "weights.pt").is_file())[0]  # for all processes the same
        self._compare_arguments(may_differ=() if is_finished else [f"content_of_{name}" for name in frames])
        if is_finished:
            print(f"{self.out}: finished")
            current = self.saved | {key: self.arguments[key] for key in PATHS if key in self.arguments}
            if current != self.saved and runtime.is_first() and not self.args.check:
                with contextlib.suppress(OSError):  # a read-only archive
                    files.write_json(self.out / "args.json", current)  # report.py looks there for the data, which have moved
        return is_finished

    def end_check(self):
        """With --check, report that no problem was found, and exit."""
        if self.args.check:
            print(f"{self.args.script}: arguments and data are OK ({self.device}, {self.args.precision})")
            sys.exit()

    def restore(self, weights, **state):
        """Name the parts of a checkpoint (objects with state_dict and load_state_dict), and load it if there is one.

        weights: a function that returns the content of weights.pt, for --keep-every and `finish`. From here on the run
        directory belongs to this process.
        """
        self.state, self.weights = state, weights
        if runtime.is_first():
            self.lock = files.lock(self.out)
            if files.read_settings(self.out) != self.saved:
                raise ValueError(f"{self.out}: another process has trained there since this one started; run the command again")
            (self.out / "samples").mkdir(exist_ok=True)
            files.clear_parts(self.out, below=False)
            files.clear_parts(self.out / "samples")
        if self.args.cache:  # each machine may have its own
            files.open_cache(self.args.cache)
        runtime.barrier()
        if self.checkpoint.is_file():
            self._load()
        if any(each != [self.iteration, self.settings] for each in runtime.all_gather([self.iteration, self.settings])):
            raise ValueError(f"{self.out}: processes find different checkpoints or data; --out must be on a shared file system")
        if self.args.compile:
            for part in state.values():
                if isinstance(part, torch.nn.Module):
                    optimization.compile_network(part)
        if runtime.is_first():
            files.write_json(self.out / "args.json", self.arguments)
            left_out = {f"--{name} {frame}": why for name, used in self.frames.items() for frame, why in used.left_out.items()}
            if left_out:
                files.write_left_out(self.out, left_out)
        frames = ", ".join(f"{name}: {len(used)} frames" for name, used in self.frames.items())
        position = f"resuming after {self.iteration} of" if self.iteration else "training for"
        where = runtime.describe(self.device, self.args.precision)
        log.info("%s: %s; %s; %s %d steps", self.out, where, frames, position, self.args.iterations)

    def _load(self):
        with open(self.checkpoint, "rb") as file:
            try:
                saved = torch.load(file, map_location=self.device, weights_only=True)
                for name, part in self.state.items():
                    state = saved["state"][name][runtime.rank()] if isinstance(part, PerProcess) else saved["state"][name]
                    if isinstance(part, torch.optim.Optimizer):
                        optimization.load_optimizer(part, state)
                    else:
                        part.load_state_dict(state)
                self.iteration, self.steps_summed = int(saved["iteration"]), int(saved["steps_summed"])
                self.sums = saved["sums"][runtime.rank()]
                self.rows = [row for row in files.read_csv(self.out / "log.csv") if int(row["iteration"]) <= self.iteration]
            except Exception as error:  # a damaged file can raise anything
                if runtime.is_out_of_memory(error):
                    raise
                problem = f"not a checkpoint of this run, or log.csv in the same folder is damaged ({type(error).__name__})"
                raise ValueError(f"{self.checkpoint}: {problem}; delete {self.out} to start anew") from error

    def iterations(self, dataset):
        """Yield (iteration, batch on the device) for the remaining steps; log, save, and stop on signals."""
        args, size = self.args, self.args.batch_size
        stride = runtime.processes() * size  # samples per iteration: the next `size` for each process in turn
        firsts = range(self.iteration * stride + runtime.rank() * size, self.sample_count, stride)
        indices = (range(first, first + size) for first in firsts)
        batches = loading.batches(dataset, indices, args.workers, self.device)
        self.bar = loading.progress(args.iterations, self.out, self.iteration)
        self.clock = optimization.StepClock(self.device)
        self.is_waiting = False
        with _caught_signals(self) as signals, self.bar:
            try:
                self.is_waiting = True
                for batch in batches:
                    self.is_waiting = False
                    torch.manual_seed(int(np.random.SeedSequence((args.seed, self.iteration)).generate_state(1)[0]))
                    self.clock.enter("step")
                    yield self.iteration, batch
                    self._after_step(signals)
                    self.bar.update()
                    self.is_waiting = self.iteration < args.iterations
            except SystemExit:  # after a signal
                self.save()
                raise

    def _after_step(self, signals):
        """Log and save if due, and stop if any process has received a signal."""
        self.clock.enter("wait")
        self.iteration += 1
        is_last = self.iteration == self.args.iterations
        if is_last or self.iteration % self.args.log_every == 0:
            self._write_log()
        # Summed, so that all processes stop after the same step; on the CPU, while the GPU keeps computing.
        is_stopped = int(runtime.all_reduce_sum_(torch.tensor(len(signals)))) > 0
        if self.args.keep_every and self.iteration % self.args.keep_every == 0:
            self._finite_state()
            if runtime.is_first():
                files.write_whole(self.out / f"weights_{self.iteration:07d}.pt", torch_bytes(self.weights()))
        if is_stopped and not is_last:
            sys.exit(128 + (signals or runtime.STOP_SIGNALS)[0])  # `iterations` saves
        if is_last or self.iteration % self.args.save_every == 0:
            self.save()

    def log(self, losses, grid=None, **values):
        """Log a step.

        losses: {name: scalar tensor}, averaged until the next row of log.csv without waiting for the device. values: numbers
        that go into the row as they are, e.g. lr. grid: a function that returns {title: images (B, 3, h, w) in [0, 1]}; at
        every checkpoint they become samples/ITERATION.png, one column per title and one row per sample, eight at most.
        """
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach()
        self.steps_summed += 1
        self.values = values
        done = self.iteration + 1
        if grid and runtime.is_first() and (done % self.args.save_every == 0 or done == self.args.iterations):
            self.clock.enter("other")
            columns = {
                title: (255 * image.detach().float().cpu().clamp(0, 1)).round().byte() for title, image in grid().items()
            }
            rows = list(zip(*columns.values(), strict=True))[:8]
            files.write_figure(self.out / "samples" / f"{done:07d}.png", list(columns), rows)

    def _write_log(self):
        self.clock.enter("other")
        self._finite_state()
        totals = {name: runtime.all_reduce_mean_(total.double()).item() for name, total in self.sums.items()}
        means = {name: total / self.steps_summed for name, total in totals.items()}
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in means.items()}, refresh=False)
        seconds, wait = self.clock.read()
        peak = f"{optimization.peak_memory_mib(self.device):.0f}"
        row = {name: f"{value:.6g}" for name, value in (means | self.values).items()}
        cost = {"seconds_per_iteration": f"{seconds:.5f}", "wait_seconds": f"{wait:.5f}", "peak_memory_mib": peak}
        self.rows.append({"iteration": self.iteration} | row | cost)
        if runtime.is_first():
            files.write_csv(self.out / "log.csv", self.rows)
        self.sums, self.steps_summed = {}, 0
        self.clock.enter("wait")

    def _finite_state(self):
        """The states of all parts. FloatingPointError in every process if one of them or a loss is not finite in any."""
        state = {name: part.state_dict() for name, part in self.state.items()}
        bad = runtime.all_gather(optimization.not_finite(state | {"loss": self.sums}))
        if names := list(dict.fromkeys(name for each in bad for name in each)):
            listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
            problem = f"diverged before iteration {self.iteration}: {listed} not finite; the last checkpoint is kept"
            raise FloatingPointError(f"{self.out}: {problem}. Try a lower --lr, in another --out or after deleting this one")
        return state

    def save(self):
        """Write checkpoint.pt, unless the state or the losses are not finite."""
        self.clock.enter("other")
        state = self._finite_state()
        for name, part in self.state.items():
            if isinstance(part, PerProcess):
                state[name] = runtime.all_gather(state[name], only_first=True)
        sums = runtime.all_gather(self.sums, only_first=True)
        content = {"iteration": self.iteration, "state": state, "sums": sums, "steps_summed": self.steps_summed}
        if runtime.is_first():
            files.write_whole(self.checkpoint, torch_bytes(content))
        self.clock.enter("wait")

    def finish(self, **summary):
        """Write summary.json and, last, weights.pt, which marks the run as finished."""
        if not runtime.is_first():
            return
        for name in ("seconds_per_iteration", "wait_seconds"):
            times = [float(row[name]) for row in self.rows if row.get(name)]  # log.csv may have been deleted
            summary[name] = statistics.median(times[1:] or times or [0.0])  # without the first interval, which warms up
        summary |= {
            "version": runtime.VERSION,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "iterations": self.iteration,
            "peak_memory_mib": max((int(row["peak_memory_mib"]) for row in self.rows), default=0),
            "precision": self.args.precision,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
        }
        files.write_json(self.out / "summary.json", summary)
        files.write_whole(self.out / "weights.pt", torch_bytes(self.weights()))


class PerProcess:
    """Marks checkpoint parts whose state differs between processes."""


def torch_bytes(content):
    """Serialise with torch.save. (Saving to a path would put the file's name into its content.)"""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


@contextlib.contextmanager
def _caught_signals(run):
    """Yield a list to which SIGTERM, SIGINT and SIGHUP are appended, so that the current step is finished and saved first.

    While waiting for a batch, which may take arbitrarily long, the first one raises SystemExit, unless there are several
    processes, which must all stop after the same step. More may follow: torchrun and run_all.sh forward what their process
    group has already received.
    """
    caught = []

    def catch(number, frame):
        caught.append(number)
        if run.is_waiting and len(caught) == 1 and runtime.processes() == 1:
            sys.exit(128 + number)

    with contextlib.ExitStack() as stack:
        for number in runtime.STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                stack.callback(signal.signal, number, signal.signal(number, catch))
        yield caught
