"""Batches in order, read by worker processes, and progress bars.

A wrapper around DataLoader: an unreadable sample or a killed worker raises an error instead of hanging, batches need no room
in /dev/shm, and when the disk stalls the log names the frame that is being waited for.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import runtime

log = logging.getLogger("loading")
KILLED = "a worker process that reads images was killed, most likely for lack of memory: lower --workers or --width"
PATIENCE = 120  # seconds without a batch after which the log names what is awaited


def stacked(samples):
    """Samples (tensors, or tuples of them) -> one batch of the same structure."""
    if isinstance(samples[0], (tuple, list)):
        return [stacked(parts) for parts in zip(*samples, strict=True)]
    return torch.stack(samples)


class _Lines:
    """A file for tqdm where stderr is no terminal: a line per update, without carriage returns."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self):
        pass


def progress(total, name, initial=0):
    """A progress bar of the first process; a line every half minute where stderr is no terminal."""
    file, seconds = (sys.stderr, 0.1) if sys.stderr.isatty() else (_Lines(), 30)
    limits = dict(mininterval=seconds, maxinterval=max(10, seconds))
    return tqdm(total=total, initial=initial, desc=str(name), disable=not runtime.is_first(), file=file, **limits)


class SampleNumbers:
    """Batch sampler: the sample numbers of this process for iterations `start` to `stop` - 1.

    Iteration i of n processes draws samples i * n * batch_size onwards; each process takes batch_size of them in turn.
    """

    def __init__(self, start, stop, batch_size, rank, processes):
        self.start, self.stop, self.batch_size, self.rank, self.processes = start, stop, batch_size, rank, processes

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        for i in range(self.start, self.stop):
            first = (i * self.processes + self.rank) * self.batch_size
            yield range(first, first + self.batch_size)


def batches(dataset, indices, workers, device=None, collate=stacked):
    """Yield collate([dataset[i] for i in batch]) on `device` for each batch of `indices`, a sequence of sequences.

    dataset.frame(i) is the data.Frame of sample i, which the log names if reading it takes long. Raises what reading a sample
    raised, as ValueError, OSError or MemoryError, and ChildProcessError if a worker was killed.
    """
    loader = DataLoader(
        _Batches(dataset, collate),
        batch_size=None,
        sampler=indices,
        num_workers=min(workers, len(indices)),
        collate_fn=_identity,
        pin_memory=device is not None and device.type == "cuda",
        worker_init_fn=runtime.serve_parent,
    )
    before = set(multiprocessing.active_children())
    iterator = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    awaited, is_over = {}, threading.Event()

    def notice(*_):
        """On SIGCHLD, raise if a worker died: its half-sent batch would never arrive. Not during a step."""
        if awaited and not all(worker.is_alive() for worker in workers):
            raise ChildProcessError(KILLED)

    if workers:
        signal.signal(signal.SIGCHLD, notice)
    # Not a daemon thread: one that wakes during interpreter shutdown aborts it. It ends with the loop or the main thread.
    threading.Thread(target=_watch, args=(dataset, awaited, workers, is_over)).start()
    try:
        for batch in indices:
            awaited |= {"batch": batch, "since": time.monotonic(), "due": time.monotonic() + PATIENCE}
            try:
                read = next(iterator)
            except RuntimeError as error:  # the loader's own; errors of samples arrive as batches
                raise ChildProcessError(KILLED) from error
            awaited.clear()
            if read.error:
                raise read.error
            yield read.tensors(device)
    finally:
        awaited.clear()
        is_over.set()


class _Batches(Dataset):
    """Item `batch`, a sequence of sample numbers, is the batch of these samples."""

    def __init__(self, dataset, collate):
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, batch):
        try:
            return _Batch(self.collate([self.dataset[i] for i in batch]))
        except Exception as error:
            return _Batch((), error)


class _Batch:
    """A batch, or an error, on its way from a worker process.

    A batch travels through a pipe as arrays: each tensor would need a file descriptor and room in /dev/shm, and containers
    have little of either. An error travels as text, because its traceback would keep the loader alive.
    """

    def __init__(self, parts, error=None):
        self.parts, self.error = _map(torch.Tensor, torch.Tensor.numpy, parts), None
        if error is not None:
            kind = next((kind for kind in (MemoryError, OSError, ValueError) if isinstance(error, kind)), None)
            self.error = kind(str(error)) if kind else RuntimeError("".join(traceback.format_exception(error)))

    def pin_memory(self):  # called by DataLoader, in a thread
        self.parts = _map(np.ndarray, lambda array: torch.from_numpy(array).pin_memory(), self.parts)
        return self

    def tensors(self, device):
        parts = _map(np.ndarray, torch.from_numpy, self.parts)
        return parts if device is None else _map(torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True), parts)


def _map(kind, function, part):
    """Nested lists and tuples with function(x) in place of each x of type `kind`."""
    if isinstance(part, (list, tuple)):
        return [_map(kind, function, inner) for inner in part]
    return function(part) if isinstance(part, kind) else part


def _identity(batch):
    return batch


def _watch(dataset, awaited, workers, is_over):
    """Log the frames waited for, every PATIENCE seconds. awaited: batch, start, next time to log; empty during a step."""
    while not is_over.wait(0.5) and threading.main_thread().is_alive():
        if awaited and not all(worker.is_alive() for worker in workers):  # it died during a step
            os.kill(os.getpid(), signal.SIGCHLD)
        now, late = time.monotonic(), awaited.copy()
        if late and now > late["due"]:
            awaited["due"] = now + PATIENCE
            datasets = getattr(dataset, "datasets", [dataset])  # of a StackDataset
            names = [str(part.frame(i).image) for i in late["batch"] for part in datasets]
            more = f" or one of {len(names) - 3} more" if names[3:] else ""
            log.error("nothing was read for %.0f s: waiting for %s%s", now - late["since"], ", ".join(names[:3]), more)
