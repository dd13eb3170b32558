"""Damages files of the kinds that come from outside and gives them to their readers, for as long as one lets it.

    python tests/fuzz.py pairs|checkpoints|statistics|tables [--seconds 600] [--seed 0] [--findings fuzz_findings]

    pairs        PNG and JPEG files in both layouts: data.list_frames, load_image, load_label_ids, load_label
    checkpoints  weights.pt: models.load_network; checkpoint.pt, log.csv, args.json: training.Run, its restore and finish
    statistics   .npz files of mu and sigma: fid.load_statistics
    tables       CSV and JSON: files.read_csv, files.read_json, fid.read_rows, evaluate.report without its figures

By hand, not by pytest; on Linux. A reader may succeed, or raise a ValueError or OSError whose message is one line and names
the file. All else is a finding: another exception, a crash, more than LIMIT seconds or MEMORY bytes, a file written that is
not its own. Each, told apart by its kind and by our line that raised it, becomes a folder with the
files as the reader found them and the traceback. The exit status is 1 if there are any.
"""

import argparse
import contextlib
import faulthandler
import fnmatch
import io
import json
import logging
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import torch
from PIL import Image, PngImagePlugin

import adapt_features
import data
import evaluate
import fid
import files
import models
import runtime
import train_translator
import training

ROOT = Path(data.__file__).resolve().parent
LIMIT, MEMORY = 20, 6 * 2**30  # seconds a case; bytes of address space above what the process has at its start
LONGEST = 2000  # characters of a message that is meant to be read


class Case(NamedTuple):
    parts: dict  # what the reader finds: path below its folder -> bytes
    fuzzed: str  # the one of them that is damaged
    read: callable  # called with the folder
    writes: tuple = ()  # patterns of what it may write there
    names: str = "\n"  # what its messages may name instead of a file


class TooSlow(BaseException):  # no Exception, since a reader may catch those
    pass


# ---------------------------------------------------------------------------------------------------------------------
# Valid files


def pairs():
    """Every kind of image and of label, in both layouts; the other one of the pair is a plain PNG."""

    def read(folder):
        for frame in data.list_frames(folder, labelled=False):
            data.load_image(frame.image)
        for frame in data.list_frames(folder):
            data.load_label_ids(frame.label)
            data.load_label(frame.label)

    rng = np.random.default_rng(0)
    pixels, ids = rng.integers(0, 256, (24, 32, 3), np.uint8), rng.integers(0, 34, (24, 32), np.uint8)
    rgb, grey, palette = Image.fromarray(pixels), Image.fromarray(ids), Image.fromarray(ids)
    palette.putpalette(pixels.tobytes()[:768])  # makes it one whose indices are the ids
    text, exif = PngImagePlugin.PngInfo(), Image.Exif()
    text.add_text("comment", "words " * 20, zip=True)
    text.add_itxt("title", "more words", zip=True)
    exif[274] = 6  # orientation
    rich = dict(icc_profile=bytes(200), exif=exif, dpi=(72, 72))

    photos = [saved(rgb.convert(mode), "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")]
    photos += [png(pixels, 2, interlaced=True), png(pixels.astype(">u2") * 257, 2)]
    photos += [saved(rgb, "PNG", pnginfo=text, **rich), saved(rgb, "PNG", save_all=True, append_images=[rgb])]
    photos += [saved(rgb.convert(mode), "JPEG", progressive=p) for mode in ("RGB", "L", "CMYK") for p in (False, True)]
    photos += [saved(rgb, "JPEG", comment="words", **rich), saved(rgb, "GIF")]  # the last under a wrong name
    labels = [saved(image, "PNG") for image in (grey, palette, grey.convert("1"))]
    labels += [saved(palette, "PNG", transparency=3, **rich), png(ids[..., None], 0, interlaced=True)]
    cases, sizes = [], "whose label has another size"  # of GTA5's pairs, which the log names
    for photo, label in (
        ("images/frame", "labels/frame.png"),
        ("leftImg8bit/train/city/frame_leftImg8bit", "gtFine/train/city/frame_gtFine_labelIds.png"),
    ):
        for content in photos:
            name = photo + (".jpg" if content.startswith(b"\xff\xd8") else ".png")
            cases.append(Case({name: content, label: labels[0]}, name, read, names=sizes))
        cases += [Case({f"{photo}.png": photos[0], label: content}, label, read, names=sizes) for content in labels]
    return cases


def saved(image, kind, **options):
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def png(samples, colour, interlaced=False):
    """(H, W, C) samples of 8 or 16 bits -> a PNG file of a kind that Pillow does not write."""
    adam7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    passes = adam7 if interlaced else [(0, 0, 1, 1)]
    rows = b"".join(b"\0" + row.tobytes() for x, y, dx, dy in passes for row in samples[y::dy, x::dx])
    header = struct.pack(">IIBBBBB", *samples.shape[1::-1], 8 * samples.itemsize, colour, 0, 0, interlaced)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    body = b"".join(struct.pack(">I4s", len(content), kind) + content + bytes(4) for kind, content in chunks.items())
    return with_checksums(b"\x89PNG\r\n\x1a\n" + body)


def begun(folder):
    """train_translator.py's Run of a folder, and very small parts of every kind that checkpoints hold."""
    words = "--source /source --target /target --method cyclegan --device cpu --workers 0 --iterations 3 --log-every 1 --out"
    run = training.Run(train_translator.parse_args([*words.split(), str(folder)]))
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = runtime.adam(network.parameters(), 0.1)
    return run, dict(G=network, opt_G=optimizer, pool_y=train_translator.ImagePool(2), gate=adapt_features.Gate(0.6))


def trained():
    """The files of a run, as the trainers' own code leaves them."""
    with tempfile.TemporaryDirectory() as folder:
        run, state = begun(Path(folder))
        run.restore(**state)
        for _, batch in run.iterations(torch.rand(3, 3)):
            loss = state["G"](torch.cat([batch, -batch])).square().mean()
            runtime.update(state["opt_G"], loss)
            state["pool_y"].exchange(torch.rand(1, 3, 4, 4))
            state["gate"].opens(torch.tensor(0.7))
            run.log({"G_gan": loss, "D": loss}, lr=0.1)
        run.finish(models.network_state(models.ResnetGenerator(base_channels=2, n_blocks=5)), method="cut")
        return contents(Path(folder))


def checkpoints():
    def resume(folder):
        run, state = begun(folder)
        run.restore(**state)
        if run.rows:
            run.finish({})  # reads what is left of log.csv

    run = trained()
    unfinished = {name: run[name] for name in ("checkpoint.pt", "log.csv", "args.json")}
    writes = (".lock", "args.json", "summary.json", "weights.pt")
    cases = [Case({"weights.pt": run["weights.pt"]}, "weights.pt", lambda folder: models.load_network(folder / "weights.pt"))]
    return cases * 2 + [Case(unfinished, name, resume, writes, "--restart") for name in ("checkpoint.pt", *unfinished)]


def statistics():
    samples = np.random.default_rng(0).normal(size=(50, 8))
    arrays = [dict(mu=samples.mean(0).astype(t), sigma=np.cov(samples.T).astype(t)) for t in (float, np.float32, int)]
    arrays += [dict(mu=np.ones(1), sigma=np.ones((1, 1))), dict(mu=np.ones(8), sigma=np.asfortranarray(arrays[0]["sigma"]))]
    found = [zipped(content, save) for content in arrays for save in (np.savez, np.savez_compressed)]
    return [Case({"a.npz": content}, "a.npz", lambda folder: fid.load_statistics(folder / "a.npz")) for content in found]


def zipped(arrays, save=np.savez):
    save(buffer := io.BytesIO(), **arrays)
    return buffer.getvalue()


def tables():
    evaluate.translations_figure = evaluate.segmentations_figure = lambda out, path: None
    run = trained()
    with tempfile.TemporaryDirectory() as folder:
        out, rng = Path(folder), np.random.default_rng(0)
        confusions = {name: torch.from_numpy(rng.integers(1, 99, (19, 19))) for name in evaluate.MODELS}
        for confusion in confusions.values():
            confusion[17:] = 0  # two classes that do not occur
        rows = [evaluate.table_row(name, evaluate.scores(confusion)) for name, confusion in confusions.items()]
        files.write_csv(out / "table2.csv", rows)
        for name in ("Source", "CycleGAN", "CUT"):
            fid.write_row(out / "distances.csv", name, "FID", 12.5)
        run |= contents(out)
    results = {f"results/{name}": run[name] for name in ("table2.csv", "distances.csv")}
    results |= dict.fromkeys([f"translators/{name}/summary.json" for name in ("cyclegan", "cut")], run["summary.json"])
    alone = [("distances.csv", lambda path: fid.read_rows(path, "FID"))]
    alone += [(name, files.read_csv) for name in ("table2.csv", "distances.csv", "log.csv")]
    alone += [(name, files.read_json) for name in ("args.json", "summary.json")]
    cases = [Case({name: run[name]}, name, lambda folder, name=name, read=read: read(folder / name)) for name, read in alone]
    return cases + [Case(results, name, evaluate.report, ("results/table[123].csv", "results/.lock")) for name in results]


TARGETS = {"pairs": pairs, "checkpoints": checkpoints, "statistics": statistics, "tables": tables}

# ---------------------------------------------------------------------------------------------------------------------
# Damage

LENGTHS = (0, 1, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
ODD = (None, True, 0, -1, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x", "nan", "\n", [], [[1]], {})
WORDS = r"x nan -inf 1e999 -1 0 1.5 null true NaN [] {} \ \ud800 , ,,, ; ' " " model iteration Oracle CLADA".split() + [""]
WORDS += [*'"\0\n\r\t \x1c\x1b\u2028\ufeff\ud800', "9" * 400, "9" * 5000, "y" * 200_000, "[" * 100_000, '{"a":' * 20_000]


def damaged(content, rng):
    """Bytes -> the same after one edit or a few; most are near the ends, where headers are."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        size = len(content)
        start = min(size, rng.choice((rng.randrange(size + 1), rng.randrange(64), max(0, size - rng.randrange(128)))))
        stop = min(size, start + rng.choice((1, 1, 2, 4, 16, 256)))
        old, junk = content[start:stop], rng.randbytes(rng.choice((1, 4, 300)))
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in old[:1]) + old[1:]
        length = struct.pack(rng.choice(("<I", ">I")), rng.choice(LENGTHS)) + old[4:]
        filled = [bytes(len(old)), b"\xff" * len(old), rng.randbytes(len(old))]
        content[start:stop] = rng.choice((flipped, flipped, length, length, *filled, b"", old * 2, junk + old))
        if rng.random() < 0.1:
            del content[start:]
    return bytes(content)


def with_checksums(content):
    """A PNG file with the checksums that its chunks ought to have."""
    content, start = bytearray(content), 8
    while start + 12 <= len(content):
        end = start + 8 + struct.unpack_from(">I", content, start)[0]
        if end + 4 > len(content):
            break
        struct.pack_into(">I", content, end, zlib.crc32(content[start + 4 : end]))
        start = end + 4
    return bytes(content)


def damaged_inside(content, rng):
    """A zip file -> one with right checksums and a damaged member, which of a checkpoint is most often the pickle."""
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer := io.BytesIO(), "w") as new:
        pickles = [name for name in old.namelist() if name.endswith(".pkl")]
        chosen = rng.choice(pickles if pickles and rng.random() < 0.7 else old.namelist())
        for info in old.infolist():
            member = old.read(info)
            new.writestr(info, damaged(member, rng) if info.filename == chosen else member)
    return buffer.getvalue()


def retyped(value, rng):
    """Nested dicts and lists -> the same with one part left out, or in its place one that does not belong there."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(ODD) if rng.random() < 0.7 or not isinstance(value, torch.Tensor) else torch.zeros(2)
    changed, key = value.copy(), rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if rng.random() < 0.2:
        del changed[key]
    else:
        changed[key] = retyped(value[key], rng)
    return changed


def rewritten(content, rng, ending):
    """A file of other content as json, torch and numpy would write it."""
    if ending == ".json":
        return json.dumps(retyped(json.loads(content), rng)).encode()
    if ending == ".pt":
        torch.save(retyped(torch.load(io.BytesIO(content), weights_only=True), rng), buffer := io.BytesIO())
        return buffer.getvalue()
    with np.load(io.BytesIO(content)) as file:
        changed = retyped(dict(file), rng)
    return zipped({k: np.asarray(v) for k, v in changed.items()} if isinstance(changed, dict) else {"mu": np.asarray(changed)})


def reworded(content, rng):
    """A CSV or JSON file -> one with other words, lines or columns, or of another encoding."""
    text = content.decode()
    for _ in range(rng.choice((1, 1, 2, 4))):
        lines, parts = text.splitlines(keepends=True) or [""], re.split(r'([,\n:"{}\[\]])', text)
        i, j, word = rng.randrange(len(lines)), rng.randrange(len(parts)), rng.choice(WORDS)
        k = rng.randrange(lines[0].count(",") + 1)
        texts = (
            "".join([*parts[:j], word, *parts[j + 1 :]]),
            "".join([*parts[:j], word, *parts[j:]]),
            "".join(parts[:j] + parts[j + 1 :]),
            text.replace(parts[j], word, 3),
            "".join(lines[:i] + lines[i + 1 :]),
            "".join(lines[: i + 1] + lines[i:]),
            "\n".join(",".join(row[:k] + row[k + 1 :]) for row in (line.rstrip("\n").split(",") for line in lines)),
        )
        text = rng.choice(texts)[:1_000_000]
    return text.encode(rng.choice(("utf-8", "utf-8", "utf-8", "utf-8", "utf-16")), "surrogatepass")


def mutated(content, rng, ending):
    """The bytes of a valid file -> those of a damaged one, in one of the ways that its kind allows."""
    ways = [damaged]
    if ending == ".png":
        ways += [lambda content, rng: with_checksums(damaged(content, rng))] * 2
    if ending in (".csv", ".json"):
        ways += [reworded] * 3
    if ending in (".pt", ".npz"):
        ways += [damaged_inside] * 2
    if ending in (".pt", ".npz", ".json"):
        ways += [lambda content, rng: rewritten(content, rng, ending)]
    return rng.choice(ways)(content, rng)


# ---------------------------------------------------------------------------------------------------------------------
# Reading

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime")
allowed, effects = [], []  # where the reader may write (empty: none is running); what it did elsewhere, and our line


def watch(event, arguments):
    """Audit hook: notes what a reader changes outside of its folder."""
    opens = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    if allowed and (opens or event in CHANGES):
        for path in arguments[: 1 if opens else 2]:
            name = os.path.realpath(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else allowed[0]
            if not f"{name}/".startswith(tuple(allowed)):
                effects.append((f"{event} {name}", our_line(traceback.extract_stack())))


def our_line(frames):
    """FILE:LINE of the innermost of these stack frames that is of this repository, tests apart."""
    return next((f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames) if Path(f.filename).parent == ROOT), "?")


def contents(folder):
    """{path below the folder: bytes} of the files there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def place(parts, folder):
    """The contrary: a folder of these files alone."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def too_slow(number, frame):
    raise TooSlow(f"more than {LIMIT} seconds")


def complaint(error, case, folder):
    """What is wrong with an exception of a reader, or None."""
    kind, text = type(error).__name__, str(error)
    if not isinstance(error, (ValueError, OSError)):
        return kind
    if len(text.splitlines()) != 1 or len(text) > LONGEST:
        return f"{kind} not of one line"
    names = [case.names, *(Path(name).stem for name in case.parts)]
    return None if str(folder) in text and any(name in text for name in names) else f"{kind} that names no file"


def execute(case, folder, crash_file):
    """Let the reader have the files -> None if all is well, or what is wrong, the line, and an explanation."""
    place(case.parts, folder)
    error = None
    effects.clear()
    allowed.extend((f"{folder}/", os.devnull))
    faulthandler.dump_traceback_later(2 * LIMIT, exit=True, file=crash_file)  # for code that lets no signal through
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
            case.read(folder)
    except KeyboardInterrupt:
        raise
    except BaseException as caught:
        error = caught
    signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.cancel_dump_traceback_later()
    allowed.clear()
    if error and (wrong := complaint(error, case, folder)):
        frames = traceback.extract_tb(error.__traceback__)
        frames = frames[::-1] if isinstance(error, TooSlow) else frames  # whose innermost line is a matter of chance
        return wrong, our_line(frames), "".join(traceback.format_exception(error))
    if effects:
        return effects[0][0].split()[0], effects[0][1], "\n".join(map(str, effects))
    after = contents(folder)
    changed = [name for name in case.parts.keys() | after.keys() if case.parts.get(name) != after.get(name)]
    strange = [name for name in changed if not any(fnmatch.fnmatch(name, pattern) for pattern in case.writes)] + os.listdir()
    return ("a changed file", strange[0], f"{strange}") if strange else None


def fuzz(cases, args, work, end, executions):
    """What a child process does: each case as it is, then damaged ones until time is up or one kills the process."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, too_slow)
    os.chdir(work / "elsewhere")
    sys.dont_write_bytecode = True  # a late import would count as a file written
    sys.addaudithook(watch)
    rng, untouched = random.Random(f"{args.seed} {executions.value}"), [] if executions.value else cases[::-1]
    with open(work / "crash.txt", "w") as crash_file:
        faulthandler.enable(crash_file)
        while time.time() < end:
            case = untouched.pop() if untouched else rng.choice(cases)
            if executions.value >= len(cases):
                content = mutated(case.parts[case.fuzzed], rng, Path(case.fuzzed).suffix)
                case = case._replace(parts=case.parts | {case.fuzzed: content})
            (work / "fuzzed.txt").write_text(case.fuzzed)
            executions.value += 1
            if finding := execute(case, work / "case", crash_file):
                keep(*finding, case.fuzzed, case.parts, args, work)


def keep(wrong, line, explanation, fuzzed, parts, args, work):
    """Save and print a finding unless it is known."""
    key = re.sub(r"[^\w.:-]+", "_", f"{args.target}-{wrong}-{line}")
    if key in (work / "known.txt").read_text().split():
        return
    with open(work / "known.txt", "a") as file:
        print(key, file=file)
    folder = args.findings / key.replace(":", "-")
    place(parts, folder / "files")
    text = f"{wrong} at {line}, fuzzed: {fuzzed}\n{explanation}"
    (folder / "traceback.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
    last = (explanation.strip().splitlines() or [""])[-1]
    print(f"{wrong} at {line}, fuzzed: {fuzzed}\n    {last[:300]!a}\n    {folder}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=600, help="how long (600)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (0)")
    parser.add_argument("--findings", type=Path, default="fuzz_findings", help="folder for what is found (./fuzz_findings)")
    args = parser.parse_args()
    args.findings = args.findings.resolve()
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    executions, cases, start = context.Value("L", 0), TARGETS[args.target](), time.time()
    with tempfile.TemporaryDirectory(prefix="fuzz ") as work:
        work = Path(work).resolve()
        (work / "elsewhere").mkdir()
        (work / "known.txt").touch()
        while time.time() < start + args.seconds:
            done = executions.value
            child = context.Process(target=fuzz, args=(cases, args, work, start + args.seconds, executions))
            child.start()
            child.join()
            if child.exitcode == 0:
                break
            if executions.value == done:
                sys.exit(f"{parser.prog}: the fuzzing process itself fails")
            crash = (work / "crash.txt").read_text(errors="replace")
            ended = signal.Signals(-child.exitcode).name if child.exitcode < 0 else f"exit status {child.exitcode}"
            stack = re.findall(rf'File "{re.escape(str(ROOT))}/([^/"]+)", line (\d+)', crash)  # the innermost first
            line = ":".join(stack[0]) if stack else "?"
            wrong = "TooSlow for a signal" if crash.startswith("Timeout") else ended
            keep(wrong, line, crash, (work / "fuzzed.txt").read_text(), contents(work / "case"), args, work)
        count = len((work / "known.txt").read_text().split())
    rate = executions.value / (time.time() - start)
    print(f"{args.target}: {executions.value} executions, {rate:.0f} a second, {count} distinct findings")
    sys.exit(1 if count else 0)


if __name__ == "__main__":
    main()
