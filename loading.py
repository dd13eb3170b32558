"""Batches read ahead by worker processes. A damaged frame, a killed worker or a small /dev/shm ends in an error, never in a
hang, and the log names the frame that a stalled disk does not deliver.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import runtime

log = logging.getLogger("loading")
KILLED = "a process that reads images was killed, most likely for lack of memory: lower --workers or --width"
PATIENCE = 120  # seconds without a batch after which the log says what is waited for


def stacked(samples):
    """Samples (tensors, or tuples of them) -> one batch of the same structure."""
    if isinstance(samples[0], (tuple, list)):
        return [stacked(parts) for parts in zip(*samples, strict=True)]
    return torch.stack(samples)


def batches(dataset, indices, workers, device=None, collate=stacked):
    """Yield collate([dataset[i] for i in batch]) for each batch of `indices`, a sequence of sequences, on `device`.

    dataset.frame(i) is the data.Frame of sample i, which is named where reading one takes long. Raises what reading a
    sample raised, as ValueError, OSError or MemoryError; ChildProcessError where a reading process was killed.
    """
    loader = DataLoader(
        _Batches(dataset, collate),
        batch_size=None,
        sampler=indices,
        num_workers=min(workers, len(indices)),
        collate_fn=_as_it_is,
        pin_memory=device is not None and device.type == "cuda",
        worker_init_fn=runtime.serve_parent,
    )
    before = set(multiprocessing.active_children())
    iterator = iter(loader)
    readers = [child for child in multiprocessing.active_children() if child not in before]
    waiting, over = {}, threading.Event()

    def notice(*_):
        """Raise for a dead worker, whose half-sent batch would be waited for for ever; but never in the middle of a step."""
        if waiting and not all(reader.is_alive() for reader in readers):
            raise ChildProcessError(KILLED)

    if readers:
        signal.signal(signal.SIGCHLD, notice)
    # No daemon: one that wakes while the interpreter ends aborts it. It ends with the loop or with the main thread.
    threading.Thread(target=_watch, args=(dataset, waiting, readers, over)).start()
    try:
        for batch in indices:
            waiting |= {"batch": batch, "since": time.monotonic(), "due": time.monotonic() + PATIENCE}
            try:
                read = next(iterator)
            except RuntimeError as error:  # the loader's own: errors of samples come as batches
                raise ChildProcessError(KILLED) from error
            waiting.clear()
            if read.error:
                raise read.error
            yield read.tensors(device)
    finally:
        waiting.clear()
        over.set()


class _Batches(Dataset):
    """Item `batch` is the batch of the samples with these numbers."""

    def __init__(self, dataset, collate):
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, batch):
        try:
            return _Batch(self.collate([self.dataset[i] for i in batch]))
        except Exception as error:
            return _Batch((), error)


class _Batch:
    """A batch, or an error, on its way from a reading process.

    A batch travels as arrays, through a pipe: each tensor would need a file descriptor and room in /dev/shm, of which
    containers have little. An error travels as its text, without the frames that would keep a loader alive.
    """

    def __init__(self, parts, error=None):
        self.parts, self.error = _each(torch.Tensor, torch.Tensor.numpy, parts), None
        if error is not None:
            kind = next((kind for kind in (MemoryError, OSError, ValueError) if isinstance(error, kind)), None)
            self.error = kind(str(error)) if kind else RuntimeError("".join(traceback.format_exception(error)))

    def pin_memory(self):  # DataLoader calls it, in a thread
        self.parts = _each(np.ndarray, lambda array: torch.from_numpy(array).pin_memory(), self.parts)
        return self

    def tensors(self, device):
        parts = _each(np.ndarray, torch.from_numpy, self.parts)
        return parts if device is None else _each(torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True), parts)


def _each(kind, function, part):
    """Nested lists and tuples with function(x) in the place of each x of a kind."""
    if isinstance(part, (list, tuple)):
        return [_each(kind, function, inner) for inner in part]
    return function(part) if isinstance(part, kind) else part


def _as_it_is(batch):
    return batch


def _watch(dataset, waiting, readers, over):
    """Log what is waited for, every PATIENCE seconds. waiting: a batch, since when, and when to say so, or nothing."""
    while not over.wait(0.5) and threading.main_thread().is_alive():
        if waiting and not all(reader.is_alive() for reader in readers):  # it died while a step was under way
            os.kill(os.getpid(), signal.SIGCHLD)
        now, late = time.monotonic(), waiting.copy()
        if late and now > late["due"]:
            waiting["due"] = now + PATIENCE
            sets = getattr(dataset, "datasets", [dataset])  # a StackDataset's
            names = [str(part.frame(i).image) for i in late["batch"] for part in sets]
            more = f" or one of {len(names) - 3} more" if names[3:] else ""
            log.error("nothing was read for %.0f s: waiting for %s%s", now - late["since"], ", ".join(names[:3]), more)
