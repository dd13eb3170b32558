"""Batches in order, read by worker processes, and progress bars.

A wrapper around DataLoader: an unreadable sample or a killed worker raises an error instead of hanging, batches need no room
in /dev/shm, and when the disk stalls the log names the frame that is being waited for.
"""

import itertools
import logging
import multiprocessing
import operator
import signal
import sys
import time
import traceback
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import runtime

log = logging.getLogger("loading")
KILLED = "a worker process that reads images was killed, most likely for lack of memory: lower --workers or --width"
PATIENCE = 120  # seconds without a batch after which the log names what is awaited
_abandoned = []  # iterators of killed workers: their destructors might wait forever for a half-sent batch


def _start_worker(_):
    """Worker init. Tensors leave as arrays, by a pipe: torch's way needs file descriptors and /dev/shm, scarce in containers.

    It holds for torch.Tensor itself, not for subclasses.
    """
    runtime.serve_parent()
    ForkingPickler.register(torch.Tensor, lambda tensor: (torch.from_numpy, (tensor.numpy(),)))


def stacked(samples):
    """Samples (tensors, or tuples of them) -> one batch of the same structure."""
    if isinstance(samples[0], (tuple, list)):
        return [stacked(parts) for parts in zip(*samples, strict=True)]
    return torch.stack(samples)


def progress(total, name, initial=0):
    """A progress bar of the first process; a line every half minute, without carriage returns, where stderr is no terminal."""
    lines = SimpleNamespace(write=lambda text: text.strip() and print(text.strip(), file=sys.stderr), flush=lambda: None)
    file, seconds = (sys.stderr, 0.1) if sys.stderr.isatty() else (lines, 30)
    limits = dict(mininterval=seconds, maxinterval=max(10, seconds))
    return tqdm(total=total, initial=initial, desc=str(name), disable=not runtime.is_first(), file=file, **limits)


def batches(dataset, indices, workers, device="cpu", collate=stacked):
    """Yield collate([dataset[i] for i in batch]) on `device` for each batch of `indices`, an iterable of sequences.

    dataset.frame(i) is the data.Frame of sample i, which the log names if reading it takes long. Installs SIGCHLD and SIGALRM
    handlers. Raises ChildProcessError if a worker was killed, and an error in a sample as ValueError, OSError, MemoryError or,
    if it is none of these, RuntimeError.
    """
    upcoming, sampler = itertools.tee(indices)
    workers = min(workers, operator.length_hint(indices, workers))
    loader = DataLoader(
        _Batches(dataset, collate),
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        multiprocessing_context=runtime.CONTEXT if workers else None,
        pin_memory=torch.device(device).type == "cuda",
        worker_init_fn=_start_worker,
    )
    before = set(multiprocessing.active_children())
    iterator = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    awaited, since = (), 0.0  # the batch that is waited for, empty during a step

    def check_workers(*_):
        """Raise if a worker was killed, because its half-sent batch would never arrive; but not during a step."""
        if awaited and not all(worker.is_alive() for worker in workers):
            raise ChildProcessError(KILLED)

    if workers:
        signal.signal(signal.SIGCHLD, check_workers)
    signal.signal(signal.SIGALRM, lambda *_: _log_wait(dataset, awaited, time.monotonic() - since))
    for batch in upcoming:
        awaited, since = batch, time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)
        try:
            check_workers()
            read = next(iterator)
        except (ChildProcessError, RuntimeError) as error:  # errors in reading samples are returned
            if isinstance(error, RuntimeError) and not str(error).startswith(("DataLoader worker", "Pin memory thread")):
                raise  # CUDA's
            _abandoned.append(iterator)
            raise ChildProcessError(KILLED) from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            awaited = ()
        if isinstance(read, Exception):
            raise read
        yield _moved(read, device)


def _log_wait(dataset, batch, seconds):
    datasets = getattr(dataset, "datasets", [dataset])  # of a StackDataset
    names = [str(part.frame(i).image) for i in batch for part in datasets]
    more = f" or one of {len(names) - 3} more" if names[3:] else ""
    log.error("nothing was read for %.0f s: waiting for %s%s", seconds, ", ".join(names[:3]), more)


class Frames(Dataset):
    """Frames in order: item i is read(frames[i])."""

    def __init__(self, frames, read):
        self.frames, self.read = frames, read

    def frame(self, i):
        return self.frames[i]

    def __getitem__(self, i):
        return self.read(self.frames[i])


class _Batches(Dataset):
    """Item `batch`, a sequence of sample numbers, is the batch of these samples, or the error in reading one."""

    def __init__(self, dataset, collate):
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, batch):
        try:
            return self.collate([self.dataset[i] for i in batch])
        except Exception as error:  # returned without its traceback, which would keep the loader alive
            if runtime.is_out_of_memory(error):  # torch's is a plain RuntimeError
                return MemoryError(str(error))
            for kind in (MemoryError, OSError, ValueError):
                if isinstance(error, kind):
                    return kind(str(error))
            return RuntimeError("".join(traceback.format_exception(error)))


def _moved(part, device):
    """Nested lists and tuples, with their tensors on `device`."""
    if isinstance(part, (list, tuple)):
        return [_moved(inner, device) for inner in part]
    return part.to(device, non_blocking=True) if isinstance(part, torch.Tensor) else part
