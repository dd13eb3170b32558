"""Shared by the stage scripts and independent of the method: command lines, errors, device, precision, processes."""

import argparse
import contextlib
import ctypes
import datetime
import errno
import io
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

import files

VERSION = "0.2.0"
log = logging.getLogger("runtime")
# How workers start. Python 3.14's default, a fork server, imports torch again for each and hides their death from SIGCHLD.
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # trainers finish the step and save; workers ignore them

# ---------------------------------------------------------------------------------------------------------------------
# Errors

# In messages of out-of-memory errors that are plain RuntimeErrors (CPU, CUDA libraries) or OSErrors (fork).
OUT_OF_MEMORY = ("allocate memory", "out of memory", "ALLOC_FAILED")
REMEDIES = {  # for OSErrors that name no file
    errno.ENOSPC: "/dev/shm is full: enlarge it (docker run --shm-size=1g) or give --workers 0",
    errno.EMFILE: "raise ulimit -n, or lower --workers",
    errno.EAGAIN: "raise ulimit -u, or lower --workers",
}


def run_script(main):
    """Call main(). Errors that a user can cause become one line on stderr and an exit status; no child process is left.

    Status 2: bad input, unreadable or unwritable files. 1: divergence, lack of memory, a lost process. 128 + n: signal n.
    CLADA_TRACEBACK=1 in the environment also shows where an error came from.
    """
    _survive_closed_streams()
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    if torchrun("RANK", 0) > 0:  # the first process speaks for all
        logging.disable(logging.WARNING)
        sys.stdout = open(os.devnull, "w")
    signal.signal(signal.SIGTERM, _interrupt)
    sys.unraisablehook = _after_destructor
    status, is_collective = 0, True
    try:
        main()
    except SystemExit as stop:  # raised in every process, so shut down as after a normal return
        status = stop.code
    except KeyboardInterrupt as stop:
        status, is_collective = stop.args[0] if stop.args else 130, False
    except Exception as error:
        (status, text), is_collective = _explain(error), False
        sys.unraisablehook = lambda _: None  # silence destructors of half-initialised objects
        if text is None or os.environ.get("CLADA_TRACEBACK"):
            traceback.print_exc()
        else:
            print(f"{Path(sys.argv[0]).name}: {files.printable(text)}", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on an exception would be a traceback
        for child in multiprocessing.active_children():  # workers ignore signals, and the exit would wait for them
            child.kill()
    if dist.is_initialized():
        if is_collective:  # after an error this could block; the others notice the exit
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)  # gloo's threads now and then abort a shutdown of the interpreter, even of a destroyed group
    if status:
        sys.exit(status)


def _explain(error):
    """(exit status, text) for an error that a user can cause, (1, None) for any other."""
    text = str(error).strip() or type(error).__name__
    first = text.partition("\n")[0]
    if is_out_of_memory(error):
        return 1, "not enough memory: lower --workers, --batch-size, --crop-size, --width or --base-channels"
    if isinstance(error, (FloatingPointError, ChildProcessError)):
        return 1, text
    if isinstance(error, OSError) and error.filename is None and error.errno in REMEDIES:
        return 2, f"{error.strerror}: {REMEDIES[error.errno]}"
    if isinstance(error, (ValueError, OSError)):
        return 2, text
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return 1, f"--compile: {first}; without it, training resumes from the last checkpoint"
    if isinstance(error, RuntimeError) and processes() > 1:
        cause = " ".join(dict.fromkeys((first, text.splitlines()[-1])))  # NCCL's own reason comes last
        return 1, f"another process of this run failed, see its message; if there is none, the cause is: {cause}"
    return 1, None


def is_out_of_memory(error):
    text = str(error).strip()
    said = text if isinstance(error, dist.DistBackendError) else text.partition("\n")[0]
    is_said = isinstance(error, (RuntimeError, OSError)) and any(words in said for words in OUT_OF_MEMORY)
    return is_said or isinstance(error, (MemoryError, torch.OutOfMemoryError))


class _LossyFile(io.FileIO):
    """A file descriptor that drops what cannot be written to it."""

    def write(self, content):
        try:
            return super().write(content) or len(content)  # None: a full non-blocking pipe
        except OSError:
            return len(content)


def _survive_closed_streams():
    """Drop output that cannot be written (closed pipe, full disk, names that are not UTF-8): it must not end a run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "w"))
        elif stream is getattr(sys, f"__{name}__"):
            raw = io.BufferedWriter(_LossyFile(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True))


def _interrupt(number, frame):
    raise KeyboardInterrupt(128 + number)


def _after_destructor(problem):  # if a signal came in one, Python would print the exception and go on
    if isinstance(problem.exc_value, KeyboardInterrupt):
        os._exit(problem.exc_value.args[0] if problem.exc_value.args else 130)
    sys.__unraisablehook__(problem)


# ---------------------------------------------------------------------------------------------------------------------
# Command lines


def number(kind, least, most, what=None):
    """An argparse type: an int or a float from `least` to `most`; `what` describes it in error messages."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:  # nan fails the comparison
            expected = what or f"{'an integer' if kind is int else 'a number'} from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return parse


positive_int, count, seed = number(int, 1, 2**31 - 1), number(int, 0, 2**31 - 1), number(int, 0, 2**63 - 1)
worker_count = number(int, 0, 512)  # more would bring the machine down before an error could be reported
positive = number(float, sys.float_info.min, sys.float_info.max, "a finite number above 0")
non_negative = number(float, 0, sys.float_info.max, "a finite number of at least 0")
fraction = number(float, 0, 1)


def path(text):
    """An argparse type. An empty path, which would be the working directory, comes from an unset shell variable."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a path")
    return Path(text)


def real_path(text):
    """An argparse type: the absolute path without links, so that args.json is valid in any working directory."""
    return os.path.realpath(path(text))


def height_width(text):
    """ "400" or "256x512" (height x width) -> (height, width)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor HxW, e.g. 512 or 256x512")
    return (int(sides[0]), int(sides[-1]))


def parser(docstring):
    """An argument parser whose help is the script's docstring and whose errors are one line."""
    made = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.error = lambda message: made.exit(2, f"{made.prog}: {files.printable(message)}\n")
    return made


def default_workers():
    """One process per core that this process may use, at most 16; under torchrun, divided among this machine's processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has no affinity
    return max(1, min(16, cores // torchrun("LOCAL_WORLD_SIZE", 1)))


def add_compute_arguments(parser, precision="auto"):
    """The arguments that all scripts which run a network on frames share. precision: the default."""
    add = parser.add_argument
    add("--exclude", type=real_path, metavar="FILE", help="names of frames to leave out, one per line")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto (default): a GPU if there is one")
    text = "bf16: autocast; fp32: float32, on CUDA with TF32 in trainers and stage 2; auto: bf16 where it is fast"
    add("--precision", choices=("auto", "fp32", "bf16"), default=precision, help=f"{text} (default {precision})")
    add("--deterministic", action="store_true", help="on CUDA: bitwise reproducible results, at some cost in speed")
    workers = "processes that load images (default: one per core, at most 16)"
    add("--workers", type=worker_count, default=default_workers(), help=workers)
    add("--seed", type=seed, default=0, help="random seed (default 0)")


# ---------------------------------------------------------------------------------------------------------------------
# Device and precision


def pick_device(name, tf32=False, deterministic=False):
    """--device -> torch.device, after a trial computation. "auto" is CUDA, or the CPU where CUDA cannot be used.

    tf32: let convolutions on CUDA round their inputs to TF32's 10-bit mantissa; matrix products stay in float32, because
    PatchNCE needs it. deterministic: use CUDA's deterministic algorithms, and do not choose cuDNN's by timing them.
    Raises ValueError for a device that is not there or does not compute.
    """
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32, False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums of products in float32
    torch.backends.cudnn.benchmark = not deterministic  # pays off, because crops have one size and frames a few
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
        torch.use_deterministic_algorithms(True)
    index, is_auto = torchrun("LOCAL_RANK", None), name == "auto"
    if is_auto:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and index is not None:  # under torchrun, one GPU per process
        name = f"cuda:{index}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: not supported; use auto, cpu, cuda, cuda:1, ...")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).add(1).item()  # a GPU may be listed and yet be busy, or too old for this torch
    except (RuntimeError, AssertionError) as error:
        reason, builds = str(error).splitlines()[0], "other builds: https://pytorch.org/get-started/previous-versions"
        reason += f" (torch {torch.__version__} sees {torch.cuda.device_count()} GPUs; {builds})"
        # A busy GPU is no reason to train on the CPU; a mix of GPUs and CPUs would wait forever.
        if not is_auto or index is not None or "out of memory" in reason or "busy" in reason:
            raise ValueError(f"--device {name}: {reason}") from error
        log.warning("--device auto: using the CPU, because the GPU cannot be used: %s", reason)
        device = torch.device("cpu")
    if device.index is not None:
        torch.cuda.set_device(device)  # default device for NCCL and for a bare `cuda`
    return device


def pick_precision(name, device, saved=None):
    """--precision -> "fp32" or "bf16", the same in all joined processes.

    auto is `saved`, the precision of a run that is resumed, or else bf16 where the first process's hardware has it and does not
    emulate it.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported()
    return all_gather(saved or ("bf16" if has_bf16 else "fp32"))[0]


def describe(device, precision):
    """Device and precision, for the log."""
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads, {precision}"
    tf32 = " (TF32 in convolutions)" if precision == "fp32" and torch.backends.cudnn.allow_tf32 else ""
    return f"{torch.cuda.get_device_name(device)}, {precision}{tf32}"


def autocast(device, precision):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


# ---------------------------------------------------------------------------------------------------------------------
# Processes: under torchrun, each computes its share of every batch


# A launcher may leave some of these to processes that it did not start, but not all.
TORCHRUN = {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def torchrun(name, default):
    """A number that torchrun has set in the environment; the default if torchrun did not start this process."""
    return int(os.environ[name]) if TORCHRUN <= os.environ.keys() else default


def join_processes(device):
    """Under torchrun, join the other processes."""
    if torchrun("WORLD_SIZE", 1) == 1 or dist.is_initialized():
        return
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
            # Restarted processes would find their dead predecessors' addresses in the store, and wait half an hour for them.
            raise ValueError("--max-restarts: torchrun needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment for that")
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(address, timeout=60).close()
        except OSError as error:
            remedy = "if its variables are left over from another launcher, unset TORCHELASTIC_RUN_ID"
            raise ValueError(f"torchrun does not answer at {address[0]}:{address[1]} ({error}); {remedy}") from error
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "cpu:gloo"
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Python handlers would not run while C++ waits
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))  # the slowest GPU may be hours behind
    signal.signal(signal.SIGTERM, _interrupt)
    on_gpus = all_reduce_sum_(torch.tensor(int(device.type == "cuda"))).item()
    if 0 < on_gpus < processes():  # they would wait for each other in different back ends
        raise ValueError(f"--device: {on_gpus} of {processes()} processes found a GPU; give --device cuda to see why, or cpu")


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def is_first():
    """True in the first process, which alone prints and writes whatever is not divided among processes."""
    return rank() == 0


def all_reduce_sum_(tensor):
    """Replace a tensor by its sum over all processes, and return it."""
    if processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean_(tensor):
    """Replace a tensor by its mean over all processes, and return it."""
    return all_reduce_sum_(tensor).div_(processes())


def all_gather(state, only_first=False):
    """The states of all processes (nested tensors and plain data), in order; those of other processes on the CPU.

    only_first: return them in the first process alone, and None in the others.
    """
    if processes() == 1:
        return [state]
    buffer, states = io.BytesIO(), [None] * processes() if is_first() or not only_first else None
    torch.save(state, buffer)  # as bytes: tensors would come back on their senders' GPUs
    if only_first:
        dist.gather_object(buffer.getvalue(), states)
    else:
        dist.all_gather_object(states, buffer.getvalue())
    return states and [torch.load(io.BytesIO(state), map_location="cpu", weights_only=True) for state in states]


def barrier():
    """Wait until all processes are here. On the CPU, so that no GPU is kept waiting."""
    all_reduce_sum_(torch.zeros(1))


def serve_parent(*_):
    """Worker init: ignore stop signals, which reach the whole process group; die with the parent."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not Linux
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
