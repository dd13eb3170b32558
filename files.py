"""Atomic writes, folder locks, JSON, CSV and pictures.

Every script writes with `write_whole`: after a kill, a full disk or a lost connection, a file holds its old or its new content.
A folder is locked while it is filled (`lock`); the process that holds the lock may remove what killed writers left.
"""

import collections
import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

log = logging.getLogger("files")
PART = ".part"  # suffix of files that are being written
COLUMN_WIDTH = 320  # pixels per picture in a figure


def printable(text):
    """Text for a one-line message: control characters and undecodable bytes are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def write_whole(path, content):
    """Write bytes to a file, atomically: to a temporary file, through to the disk, then rename.

    Raises OSError naming it; an older file then stays as it is.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        hint = f": {len(content):,} bytes are needed, or no inodes are left" if error.errno == errno.ENOSPC else ""
        raise OSError(error.errno, error.strerror + hint, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # after the rename there is none
            temporary.unlink()


def write_left_out(folder, left_out):
    """{name: reason} of frames that are not used -> left_out.txt, one per line."""
    lines = [f"{printable(name)}\t{reason}\n" for name, reason in left_out.items()]
    write_whole(folder / "left_out.txt", "".join(lines).encode())


def digest(path):
    """The sha256 of a file, in hexadecimal. Raises ValueError if it is not a regular file: a FIFO would block."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: {'not a file' if Path(path).exists() else 'No such file'}")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def clear_parts(folder, below=True):
    """Remove what killed writers left. Call it only where no other process can be writing."""
    for leftover in Path(folder).glob(f"{'**/' if below else ''}.*{PART}"):
        leftover.unlink(missing_ok=True)


def open_cache(folder):
    """Create the folder of --cache, if need be, and remove what killed writers left in it. Warns if it is not writable."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--cache {folder}: is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        clear_parts(folder, below=False)  # there may be runs of others below
    else:
        log.warning("--cache %s: not writable, so nothing is kept there", folder)


def lock(folder, wait=False):
    """Lock a folder against other processes until the returned file is closed or this process ends.

    The operating system holds the lock, so a dead process leaves none. Raises ValueError naming the process that holds it;
    with `wait`, says so and waits for that process instead.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            log.warning("%s: no locking on this file system (%s): let only one process write there", folder, error.strerror)
            return file
        file.seek(0)
        holder = file.read().strip() or "another process"
        if not wait:
            raise ValueError(f"{folder}: in use by {holder}") from error
        log.info("%s: waiting for %s", folder, holder)
        fcntl.lockf(file, fcntl.LOCK_EX)
    with contextlib.suppress(OSError):  # the name is a courtesy; a full disk may have no room for it
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file


@contextlib.contextmanager
def writers(threads):
    """Yield submit(function, *args), which calls the function in one of `threads` threads, e.g. to encode and write a PNG.

    At most four calls per thread wait, which bounds memory. An error in a call is raised by a later submit, or at the end.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending = collections.deque()

        def submit(function, *args):
            pending.append(pool.submit(function, *args))
            while len(pending) > 4 * threads:
                pending.popleft().result()

        yield submit
        for call in pending:
            call.result()


def image_bytes(image, format="PNG", **options):
    """A PIL image as the bytes of a PNG or JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getbuffer()


def write_figure(path, titles, rows, legend=None):
    """Write rows of images (3, H, W) uint8 under column titles as a PNG. legend: {name: (R, G, B)}, drawn below."""
    font, margin, line, entry = ImageFont.load_default(15), 4, 24, 120  # pixels
    rows = [[_thumbnail(image) for image in row] for row in rows]
    heights, legend = [max(image.height for image in row) for row in rows], legend or {}
    width = len(titles) * (COLUMN_WIDTH + margin) - margin
    per_line = width // entry
    figure = Image.new("RGB", (width, line + sum(heights) + margin * len(rows) + line * -(-len(legend) // per_line)), "white")
    draw = ImageDraw.Draw(figure)
    for column, title in enumerate(titles):
        draw.text((column * (COLUMN_WIDTH + margin) + COLUMN_WIDTH // 2, line // 2), title, "black", font, anchor="mm")
    y = line
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            figure.paste(image, (column * (COLUMN_WIDTH + margin), y))
        y += height + margin
    for i, (name, colour) in enumerate(legend.items()):
        left, top = i % per_line * entry, y + i // per_line * line
        draw.rectangle((left, top + 5, left + 14, top + 18), fill=colour)
        draw.text((left + 20, top + line // 2), name, "black", font, anchor="lm")
    write_whole(path, image_bytes(figure))


def _thumbnail(image):
    """(3, H, W) uint8 -> a PIL image, COLUMN_WIDTH pixels wide; pixels of smaller images are repeated."""
    image = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    resample = Image.Resampling.NEAREST if image.width < COLUMN_WIDTH else Image.Resampling.LANCZOS
    return image.resize((COLUMN_WIDTH, max(1, round(image.height * COLUMN_WIDTH / image.width))), resample)


def write_json(path, content):
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path, *keys):
    """The object in a JSON file, as a dict. Raises ValueError if the file holds none, or one without some of `keys`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        raise ValueError(f"{path}: not a JSON object" + (f" with {', '.join(keys)}" if keys else ""))
    return content


def read_settings(folder):
    """FOLDER/args.json, the settings with which the folder was started, as a dict; {} if there is none."""
    path = Path(folder) / "args.json"
    return read_json(path) if path.is_file() else {}


def check_settings(out, saved, settings, may_differ=()):
    """Raise ValueError naming the settings changed since the folder `out` was started; for those in `may_differ`, only warn."""
    changed = {
        key: f"{_described(key)} (was {saved.get(key)}, is now {value})"
        for key, value in settings.items()
        # A flag that a run of an older version does not know was off; other new settings had their default.
        if saved.get(key, False if value is True and saved else value) != value
    }
    for key in may_differ:
        if changed.pop(key, None):
            log.warning("%s: %s has changed since it was started", out, _described(key))
    if changed:
        remedy = "give another folder, or delete this one to start anew"
        raise ValueError(f"{out}: started with other arguments: {', '.join(changed.values())}; {remedy}")


def _described(key):
    """What an entry of args.json is: content_of_source -> "content of --source"."""
    if "_of_" in key:
        return key.replace("_of_", " of --").replace("_", "-")
    if key in ("processes", "script", "weights", "images", "labels"):  # not flags, or not everywhere
        return f"the {key}".replace("processes", "number of processes")
    return "--" + key.replace("_", "-")


def finished(run, flag):
    """The weights of `run`: RUN/weights.pt of a finished run, or `run` itself if it is such a file (--keep-every).

    Raises ValueError naming the flag if there are none.
    """
    weights = Path(run) if Path(run).suffix == ".pt" else Path(run) / "weights.pt"
    if not weights.is_file():
        raise ValueError(f"{flag} {run}: not a finished run (no {weights.name}); run its command again to resume it")
    return weights


def write_csv(path, rows):
    """Write rows (dicts) as CSV, with the columns of all rows in order of first appearance."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(column for row in rows for column in row)), restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def read_csv(path, *columns):
    """The rows of a CSV file as dicts of strings, [] if there is no such file. ValueError if one of `columns` is missing."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restval="")
            rows, found = list(reader), reader.fieldnames or []
    except FileNotFoundError:
        return []
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not CSV ({error})") from error
    if missing := [column for column in columns if column not in found]:
        raise ValueError(f"{path}: no column {', '.join(missing)}")
    return rows


def check_out(out, *folders, flag="--out"):
    """Raises ValueError if `out` is or lies inside a folder from which a script only reads, or is the folder of such a file."""
    real = Path(os.path.realpath(out))
    for path in map(os.path.realpath, filter(None, folders)):
        if real.is_relative_to(path) or (os.path.isfile(path) and real == Path(path).parent):
            where = "is the folder of" if os.path.isfile(path) else "lies inside"
            raise ValueError(f"{flag} {out}: {where} {path}, which is only read; give a folder elsewhere")
