"""What all parts of gpu_check.py share: results, the targets and hours derived from them, and processes with a time limit."""

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import frames
import numpy as np

import files
import runtime

ROOT = Path(runtime.__file__).resolve().parent
# Set by gpu_check.main and inherited by forked processes: sizes, device, folders, and `end`, when the current part must stop.
job = SimpleNamespace()

# ---------------------------------------------------------------------------------------------------------------------
# Results


def record(part, what, value=None, unit="", limit=None, status=None, note="", **details):
    """Append a result to check.jsonl, rewrite check.json and print it. A result with a limit is a check; nan fails it."""
    if status is None:
        status = "measured" if limit is None else "ok" if value <= limit else "FAILED"
    value = str(value) if isinstance(value, float) and not np.isfinite(value) else value
    result = dict(part=part, what=what, value=value, unit=unit, limit=limit, status=status, note=note, **details)
    with open(job.out / "check.jsonl", "a") as file:
        file.write(json.dumps(result) + "\n")
    write_summary()
    print(row(result), flush=True)


def recorded():
    """All results so far, as dicts."""
    path = job.out / "check.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def write_summary():
    """Write check.json -> its content: names of failed checks, targets, hours and all results."""
    results = recorded()
    failed = [f"{r['part']} {r['what']}" for r in results if r["status"] == "FAILED"]
    summary = {"failed": failed, "targets": targets(results), "hours": hours(results), "results": results}
    files.write_json(job.out / "check.json", summary)
    return summary


def row(result):
    """A result as one line of text."""
    value, limit = result["value"], "" if result["limit"] is None else f"<= {result['limit']:.3g}"
    value = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    line = f"{result['part']:<2}{result['what']:<54}{value:>9} {result['unit']:<10}{limit:<9}{result['status']:<9}"
    return (line + result["note"])[:150]


@contextlib.contextmanager
def attempt(part, what, is_check=False):
    """Record an error raised in the block as a result, and continue after the block."""
    try:
        yield
    except Exception as error:
        record(part, what, status="FAILED" if is_check else "error", note=one_line(error))


def one_line(error):
    name = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
    return (name + files.printable(str(error).strip()))[:400]


# ---------------------------------------------------------------------------------------------------------------------
# Targets, and the hours of the paper's experiment

TARGETS = (  # for one H100 with 16 cores: name, sign and bound, the result (part, name) that is compared with it
    ("FastCUT-L5, ms per step (paper 170)", "<=", 9, "D", "fastcut_l5 bf16, as trained"),
    ("CUT, ms per step (paper 321)", "<=", 17, "D", "cut bf16, as trained"),
    ("CycleGAN, ms per step (paper 426)", "<=", 24, "D", "cyclegan bf16, as trained"),
    ("FastCUT-L5 / CycleGAN (paper 0.40)", "<=", 0.40, "D", "fastcut_l5 / cyclegan"),
    ("U-Net-B3, ms per step of batch 8 at 512x512", "<=", 22, "E", "stage 3 bf16, as trained"),
    ("stage 1, waiting for data, % of the time", "<=", 10, "G", "stage 1, waiting for data"),
    ("stage 3, waiting for data, % of the time", "<=", 10, "G", "stage 3, waiting for data"),
    ("stage 2, frames of 1024x563 per second", ">=", 80, "H", "stage 2"),
    ("the whole experiment, hours", "<=", 11, "", "hours"),
)
EXPERIMENT = (  # name, number of steps or frames, batch size, the result that times a step, the result that counts samples
    ("stage 1, CycleGAN", 400_000, 1, ("D", "cyclegan bf16, as trained"), ("F", "stage 1, --cache")),
    ("stage 1, CUT", 400_000, 1, ("D", "cut bf16, as trained"), ("F", "stage 1, --cache")),
    ("stage 1, FastCUT-L5", 400_000, 1, ("D", "fastcut_l5 bf16, as trained"), ("F", "stage 1, --cache")),
    ("stage 3, five models, encoder frozen", 5 * 40_000, 8, ("E", "stage 3 bf16, encoder frozen"), ("F", "stage 3, --cache")),
    ("stage 3, five models, then", 5 * 80_000, 8, ("E", "stage 3 bf16, as trained"), ("F", "stage 3, --cache")),
    ("stage 4, CLADA and controls", 3 * 20_000, 4, ("E", "stage 4 bf16, as trained"), ("F", "stage 4, --cache")),
    ("stage 2, three translators", 3 * 24_966, 0, None, ("H", "stage 2")),
    ("FID of source, the same resized, three translations and target", 5 * 24_966 + 2_975, 0, None, ("I", "FID's features")),
    ("scores of eight models, at stage 2's rate", 8 * 500, 0, None, ("H", "stage 2")),
)


def measured(results):
    return {(r["part"], r["what"]): r["value"] for r in results if r["status"] == "measured"}


def hours(results):
    """Hours of the paper's experiment by part, with the arithmetic; {"missing": name} if a measurement is missing."""
    values, lines = measured(results), {}
    try:
        for what, count, batch, source, rate in EXPERIMENT:
            if batch:
                step, read = values[source], 1000 * batch / values[rate]
                seconds, why = max(step, read) / 1000, f"x max({step:.2f} ms per step, {read:.2f} ms to read its batch)"
            else:
                seconds, why = 1 / values[rate], f"frames at {values[rate]:.1f} per second"
            lines[what] = {"hours": count * seconds / 3600, "arithmetic": f"{count:,} {why}"}
    except KeyError as error:
        return {"missing": " ".join(error.args[0])}
    return lines | {"total": {"hours": sum(line["hours"] for line in lines.values()), "arithmetic": "their sum"}}


def targets(results):
    """Each target, its measured value, and whether it holds: None if it was not measured, or only at --tiny sizes."""
    values, table = measured(results), []
    values["", "hours"] = hours(results).get("total", {}).get("hours")
    ours, theirs = (values.get(("D", f"{kind} bf16, as trained")) for kind in ("fastcut_l5", "cyclegan"))
    values["D", "fastcut_l5 / cyclegan"] = ours / theirs if ours and theirs else None
    for what, sign, target, *key in TARGETS:
        value = values.get(tuple(key))
        holds = None if value is None or job.tiny else value <= target if sign == "<=" else value >= target
        table.append({"what": what, "target": f"{sign} {target}", "measured": value, "holds": holds})
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Processes, each under a time limit

FORK = multiprocessing.get_context("fork")
groups = set()  # process groups to kill before this process ends


class Failed(Exception):
    """Work in another process went wrong; the message says how."""


def start(function, *args, log=os.devnull):
    """Start function(*args) in its own process group. Its output is appended to the file `log`; None: to this process's."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_work, args=(theirs, log, function, args))
    process.start()
    groups.add(process.pid)
    theirs.close()
    return process, ours


def _work(pipe, log, function, args):
    if os.getppid() == job.pid:
        os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if log:
        for descriptor in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    try:
        answer = function(*args), ""
    except Exception as error:
        if log:
            print(one_line(error), file=sys.stderr)
        pipe.send((None, one_line(error)))
        sys.exit(1)
    pipe.send(answer)


def finish(started, limit=600):
    """Wait for a started function -> (exit status, or None if it was too slow; its value; its error or "")."""
    (process, pipe), value, error, end = started, None, "", time.monotonic() + min(limit, left())
    while True:
        is_over = process.exitcode is not None or time.monotonic() > end
        with contextlib.suppress(EOFError):
            if pipe.poll(0.02):
                value, error = pipe.recv()
                process.join(10)
                break
        if is_over:
            break
    status = process.exitcode
    process.kill()
    end_group(process.pid)
    process.join()
    return status, value, error


def end_group(group):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    groups.discard(group)


def left():
    """Seconds until the current part must stop."""
    return job.end - time.monotonic()


def isolated(function, *args, limit):
    """Run function(*args) in a forked process and return its value. Failed if it raises, dies or exceeds `limit` seconds."""
    return value_of(start(function, *args, log=None), limit)


def value_of(started, limit):
    """The value of a started function. Failed if it raises, dies or exceeds `limit` seconds."""
    status, value, error = finish(started, limit)
    if error or status != 0:
        raise Failed(error or ("it took too long" if status is None else f"its process ended with status {status}"))
    return value


def command(*words, limit, **environment):
    """Run a command. Failed, with the last line that it printed, if it exits with an error or exceeds `limit` seconds."""
    words, log = list(map(str, words)), job.work / f"log{time.monotonic_ns()}"
    status, _, _ = finish(start(os.execvpe, words[0], words, os.environ | environment, log=log), limit)
    if status != 0:
        raise Failed(f"{Path(words[1]).name}: {'it took too long' if status is None else f'status {status}'}: {last_line(log)}")


def last_line(log):
    return (log.read_text(errors="replace").splitlines() or ["it printed nothing"])[-1] if log.is_file() else "no output"


def run_file(path, words, stop=None, prepare=None):
    """Do what `python path words` does, in this process, which must be a forked one.

    stop: (signal, n) sends the signal to this process's group when log.csv gets its nth row. prepare: called first.
    """
    if stop:
        rows = itertools.count(1)

        def hook(event, args):
            if event == "os.rename" and os.fsdecode(args[1]).endswith("log.csv") and next(rows) == stop[1]:
                os.killpg(0, stop[0])

        sys.addaudithook(hook)
    if prepare:
        prepare()
    sys.argv = [str(path), *map(str, words)]
    runpy.run_path(str(path), run_name="__main__")


# ---------------------------------------------------------------------------------------------------------------------
# Frames


@functools.cache
def small_pair():
    """(source, target): folders of two small labelled domains."""
    return frames.draw(job.work / "small", "72x144", 4, 3, 2)


@functools.cache
def real_pair():
    """(source, target): folders of two domains with the frame sizes of GTA5 and Cityscapes; drawn in the background."""
    _, folders, error = finish(job.drawing)
    if error or not folders:
        raise Failed(f"no frames: {error or 'drawing them took too long'}")
    return folders


def draw_real_pair():
    source, _ = frames.draw(job.work / "game", job.sizes[0], job.frames, 1, 1)
    _, target = frames.draw(job.work / "street", job.sizes[1], 1, job.frames, 4)
    frames.add_grain(source, target)
    return source, target
