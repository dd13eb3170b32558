"""What the stage scripts share and the method does not need: command lines, errors, device, precision, processes."""

import argparse
import contextlib
import ctypes
import datetime
import errno
import io
import logging
import multiprocessing
import os
import signal
import socket
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import files

log = logging.getLogger("runtime")
PCI_DEVICES = Path("/sys/bus/pci/devices")

# ---------------------------------------------------------------------------------------------------------------------
# Command lines and errors


def run_script(main):
    """Call main(); what a user can cause becomes one line on stderr and an exit status, and no child process is left.

    2 for bad input and for files that cannot be read or written (ValueError, OSError); 1 for a run that diverged
    (FloatingPointError), for too little memory and for a lost process; 130 and 143 after SIGINT and SIGTERM.
    CLADA_TRACEBACK=1 in the environment shows where an error came from.
    """
    _outlast_readers()
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    if torchrun("RANK", 0) > 0:  # what all processes would say, the first one says
        logging.disable(logging.WARNING)
        sys.stdout = open(os.devnull, "w")
    signal.signal(signal.SIGTERM, _interrupt)
    status, together = 0, True
    try:
        main()
    except SystemExit as stop:  # raised in every process, so shut down as after a normal return
        status = stop.code
    except KeyboardInterrupt as stop:
        status, together = stop.args[0] if stop.args else 130, False
    except Exception as error:
        (status, text), together = _explained(error), False
        sys.unraisablehook = lambda _: None  # what is torn down half made has no more to say
        if text is None or os.environ.get("CLADA_TRACEBACK"):
            traceback.print_exc()
        else:
            print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    finally:
        _end_children()
    if together and dist.is_initialized():
        # Else gloo's threads abort the interpreter's end now and then. Alone it could block: others notice this exit.
        dist.destroy_process_group()
    if status:
        sys.exit(status)


def _explained(error):
    """(exit status, one line) for an error that a user can cause, (1, None) for any other."""
    text = files.printable(str(error).strip() or type(error).__name__)
    first = files.printable(str(error).strip().partition("\n")[0])
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in first for words in NO_MEMORY):
        return 1, "not enough memory: lower --batch-size, --crop-size, --width, --base-channels or --workers"
    if isinstance(error, (FloatingPointError, ChildProcessError)):
        return 1, text
    if isinstance(error, OSError) and error.filename is None and error.errno in OUT_OF:
        return 2, f"{error.strerror}: {OUT_OF[error.errno]}"
    if isinstance(error, (ValueError, OSError)):
        return 2, text
    if isinstance(error, RuntimeError) and processes() > 1:
        return 1, f"another process of this run stopped, and says why; if none does, this one did ({first})"
    return 1, None


# What torch says, in a plain RuntimeError, where a CPU or a CUDA library has no memory; and the system, where it cannot fork.
NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "Cannot allocate memory")
OUT_OF = {  # what the system lacks where no file is named
    errno.ENOSPC: "/dev/shm is full (docker run --shm-size=1g); or give --workers 0",
    errno.EROFS: "/dev/shm is read-only; give --workers 0",
    errno.EMFILE: "raise ulimit -n, or lower --workers",
    errno.EAGAIN: "raise ulimit -u, or lower --workers",
}


class _Outlasting(io.FileIO):
    """A file descriptor that drops what it cannot write."""

    def write(self, content):
        try:
            return super().write(content) or len(content)  # None: a pipe that is full and does not wait
        except OSError:
            return len(content)


def _outlast_readers():
    """Lose output for which nobody is left (a closed pipe, a full disk), and not the work that it reports."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started this process
            setattr(sys, name, open(os.devnull, "w"))
        elif stream is getattr(sys, f"__{name}__"):
            raw = io.BufferedWriter(_Outlasting(stream.fileno(), "w", closefd=False))
            # A file's name need not be UTF-8.
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True))


def _interrupt(number, frame):
    raise KeyboardInterrupt(128 + number)


def _end_children():
    """Kill the processes that read images: they leave signals to this one, and its exit would wait for them."""
    for child in multiprocessing.active_children():
        child.kill()


def torchrun(name, default):
    """A number that torchrun has set in the environment; the default where it did not start this process."""
    started = "TORCHELASTIC_RUN_ID" in os.environ and all(os.environ.get(n, "").isdecimal() for n in TORCHRUN)
    return int(os.environ[name]) if started else default


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


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
worker_count = number(int, 0, 512)  # processes: more would bring a machine down before it could say so
positive = number(float, sys.float_info.min, sys.float_info.max, "finite number above 0")
non_negative = number(float, 0, sys.float_info.max, "finite number from 0 up")
fraction = number(float, 0, 1)


def path(text):
    """A path; an empty one, which would be the working directory, is a variable that was not set."""
    if not text:
        raise argparse.ArgumentTypeError("empty, where a path is needed")
    return Path(text)


def real_path(text):
    return os.path.realpath(path(text))


def run_path(text):
    """A run directory; its weights.pt will do."""
    run = path(text)
    return run.parent if run.name == "weights.pt" else run


def height_width(text):
    """ "400" or "256x512" (height x width) -> (height, width)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor HxW, as 512 or 256x512")
    return (int(sides[0]), int(sides[-1]))


def parser(description, commands):
    """An argument parser that shows the script's commands as they stand in its docstring, and mistakes in one line."""
    formatter = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=description, epilog=commands, formatter_class=formatter)

    def error(message):
        print(f"{made.prog}: {files.printable(message)}", file=sys.stderr)
        sys.exit(2)

    made.error = error
    return made


def add_device_arguments(parser):
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one (default)")
    parser.add_argument(
        "--workers",
        type=worker_count,
        default=default_workers(),
        help="processes that load images (default: one per core, 16 at most)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of all that is random (default 0)")


def default_workers():
    """One process per core that this process may use, 16 at most; under torchrun, divided by the processes of this machine."""
    return max(1, min(16, len(os.sched_getaffinity(0)) // torchrun("LOCAL_WORLD_SIZE", 1)))


def add_compute_arguments(parser):
    """What training and translating share: how they compute."""
    parser.add_argument(
        "--deterministic", action="store_true", help="on CUDA: the same command gives the same result to the bit, more slowly"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="bf16: bfloat16 autocast; fp32: float32, on CUDA with TF32 in convolutions; auto (default): bf16 on hardware "
        "that computes it, else fp32",
    )


def add_training_arguments(parser, iterations, batch_size, crop_size, lr):
    """The arguments that every trainer has; the defaults are the paper's."""
    parser.add_argument("--out", type=path, required=True, metavar="RUN", help="run directory; an unfinished one goes on")
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
    add_compute_arguments(parser)
    parser.add_argument(
        "--cache", type=path, metavar="DIR", help="keep frames resized to --width there, losslessly, to decode them faster"
    )
    parser.add_argument("--log-every", type=positive_int, default=100, metavar="N", help="a row of log.csv (default 100)")
    parser.add_argument(
        "--save-every", type=positive_int, default=5000, metavar="N", help="checkpoint and sample grid (default 5000)"
    )
    parser.add_argument("--exclude", metavar="FILE", help="names of frames to leave out, one per line")
    parser.add_argument("--check", action="store_true", help="stop before the first step: are arguments and data all right?")
    parser.add_argument("--restart", action="store_true", help="throw away what RUN holds and begin anew")
    add_device_arguments(parser)


def pick_device(name, tf32=False, deterministic=False):
    """--device -> torch.device, after a trial computation there. "auto" is CUDA, or the CPU where that cannot be used.

    tf32: let CUDA round what convolutions multiply to TF32's 10 bits; matrix products keep float32, which PatchNCE needs.
    deterministic: take CUDA's deterministic algorithms, and cuDNN's by rule instead of by timing them.
    Raises ValueError for a device that is not there or does not compute, with the reason and what to install.
    """
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32, False
    torch.backends.cudnn.benchmark = not deterministic  # pays since crops have one size, and whole frames few
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs for it
        torch.use_deterministic_algorithms(True)
    wanted, index = name, torchrun("LOCAL_RANK", None)
    if name in ("auto", "cuda"):  # under torchrun, one GPU for each process of a machine
        wanted = "cuda" if index is None else f"cuda:{index}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what it also raises
        if name == "auto" and not (torch.cuda.is_available() or _nvidia_gpu_present()):
            wanted = "cpu"
        device, problem = _try_device(wanted)
        for_all = index is None or not torch.cuda.is_available()  # some on GPUs and some on the CPU would wait for ever
    if problem and name == "auto" and for_all:
        log.warning("--device auto: the CPU, since the GPU cannot be used: %s", problem)
        device = torch.device("cpu")
    elif problem:
        raise ValueError(f"--device {wanted}: {problem}")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # the default for NCCL and for a bare "cuda"
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def _try_device(name):
    """(torch.device, "") if it adds one and one, else (None, what is wrong and what to do).

    Raises ValueError for a GPU that is only busy: no reason to train on the CPU.
    """
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdecimal() or name == kind):
        return None, "not supported; cpu, cuda, cuda:1, ... are"
    try:
        device = torch.device(name)
        if torch.ones(1, device=device).add(1).item() == 2:
            return device, ""
        reason = "it computes wrong results"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    if "out of memory" in reason or "busy" in reason:
        raise ValueError(f"--device {name}: other processes hold it ({reason})")
    if torch.version.cuda is None and torch.version.hip is None:
        return None, "this torch is built for CPUs alone: install one for CUDA, see https://pytorch.org/get-started/locally"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if int(index or 0) >= torch.cuda.device_count() > 0 or (visible is not None and torch.cuda.device_count() == 0):
        seen = f"; CUDA_VISIBLE_DEVICES is {visible!r}" if visible is not None else ""
        return None, f"there are {torch.cuda.device_count()} GPUs for this process{seen} ({reason})"
    cards = f" and a card among {' '.join(torch.cuda.get_arch_list())}" if torch.cuda.is_available() else ""
    needs = f"torch {torch.__version__} needs a driver for CUDA {torch.version.cuda}{cards}"
    return None, f"{reason} ({needs}; other builds: https://pytorch.org/get-started/previous-versions)"


def _nvidia_gpu_present():
    """Is an NVIDIA GPU on the PCI bus, and not hidden by CUDA_VISIBLE_DEVICES?"""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return False
    for folder in PCI_DEVICES.glob("*"):
        with contextlib.suppress(OSError):
            vendor, kind = ((folder / name).read_text() for name in ("vendor", "class"))
            if vendor.startswith("0x10de") and kind.startswith("0x03"):  # NVIDIA; a display or 3D controller
                return True
    return False


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
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        log.info("--precision auto: fp32, since %s does not compute bf16", torch.cuda.get_device_name(device))
        return "fp32"
    return "bf16" if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() else "fp32"


def describe(device, precision):
    """What computes, and in what, for the log."""
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads, {precision}"
    tf32 = " (TF32 in convolutions)" if precision == "fp32" and torch.backends.cudnn.allow_tf32 else ""
    return f"{torch.cuda.get_device_name(device)}, {precision}{tf32}"


def autocast(device, precision):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


# ---------------------------------------------------------------------------------------------------------------------
# Processes: under torchrun, each computes its part of every batch


def join_processes(device):
    """Under torchrun: meet the other processes."""
    if torchrun("WORLD_SIZE", 1) > 1 and not dist.is_initialized():
        shares = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if shares and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
            # Restarted processes find the addresses of their dead predecessors in it, and wait for them for half an hour.
            raise ValueError("--max-restarts: torchrun needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment for that")
        if shares:
            address = os.environ.get("MASTER_ADDR", ""), int(os.environ["MASTER_PORT"])
            try:
                socket.create_connection(address, timeout=60).close()
            except OSError as error:
                left = "if another one left its variables, unset TORCHELASTIC_RUN_ID"
                raise ValueError(f"torchrun is not at {address[0]}:{address[1]} ({error}); {left}") from error
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # in C++ a handler would have to wait
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))  # the slowest GPU may be hours behind
        signal.signal(signal.SIGTERM, _interrupt)


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def is_first():
    """The first process alone writes files."""
    return rank() == 0


def all_reduce_sum_(tensor):
    """The sum over all processes of a tensor, which is overwritten by it."""
    if processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean_(tensor):
    """The mean over all processes of a tensor, which is overwritten by it."""
    return all_reduce_sum_(tensor).div_(processes())


def shard(items):
    """This process's part of a list: every n-th item, so that parts are even and none depends on what is done already."""
    return items[rank() :: processes()]


def barrier():
    """Until all processes are here. On the CPU, which does not keep a GPU waiting."""
    all_reduce_sum_(torch.zeros(1))


# Signals after which a trainer finishes its step and saves, and which processes that read or draw images leave to it.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def serve_parent(*_):
    """For processes that read or draw images: leave signals, which reach a whole group, to the parent, and end with it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a parent that is killed cannot tell them
