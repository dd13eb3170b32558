"""Files that appear whole or not at all, folders that one process at a time may fill, and tables.

Every script writes by `write_whole`: a kill, a full disk or a lost connection leaves the old file or the new one. A folder
that is being filled is locked (`lock`), and whoever has the lock may clear away what killed writers left.
"""

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import itertools
import json
import logging
import os
import socket
import time
from pathlib import Path

log = logging.getLogger("files")
PART = ".part"  # ends the name of a file that is being written


def printable(text):
    """What a message quotes, of which a path or a damaged file may make anything, in printable characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def write_whole(path, content):
    """Write bytes such that the file appears whole or not at all: under another name, through to the disk, renamed.

    A full disk is an OSError that says how much was needed; what `path` held before is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                disk = os.statvfs(path.parent)
                free = disk.f_bavail * disk.f_frsize
                reason = f"{reason}: {len(content):,} bytes are needed, {free:,} are free on its disk"
                if error.errno == errno.EFBIG:
                    reason = f"{error.strerror}: {len(content):,} bytes are more than ulimit -f allows"
                elif disk.f_files and not disk.f_favail:
                    reason = f"{error.strerror}: its disk holds as many files as it can (no inodes are left)"
            raise OSError(error.errno, reason, str(path)) from error
        raise


def check_writable(folder):
    """Make a folder; OSError naming it if nothing can be written there. Before the work, not after it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / ".writable", bytes(65536))  # room for a table
    (folder / ".writable").unlink(missing_ok=True)


def write_left_out(folder, left_out):
    """{name: why} of frames that are not used -> left_out.txt, a line each."""
    lines = [f"{printable(name)}\t{why}\n" for name, why in left_out.items()]
    write_whole(folder / "left_out.txt", "".join(lines).encode())


def digest(path):
    """The sha256 of a file's content, in hexadecimal digits. ValueError if it is not a regular file."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: {'not a regular file' if Path(path).exists() else 'No such file'}")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def clear_parts(folder):
    """Remove what killed writers of `write_whole` left; call it where nobody else can be writing."""
    for leftover in Path(folder).glob(f".*{PART}"):
        leftover.unlink(missing_ok=True)


def lock(folder, wait=False):
    """Keep other processes out of a folder: the lock lasts until the file that is returned is closed or its process ends.

    It is the operating system's, so a dead process leaves none. Raises ValueError naming the process that has it, or, with
    `wait`, says so every minute until it has gone.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+")
    for second in itertools.count():
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                log.warning("%s: cannot be locked here (%s): let one process at a time write there", folder, error.strerror)
                break
            file.seek(0)
            holder = file.read().strip() or "another process"
            if not wait:
                raise ValueError(f"{folder}: {holder} is at work there") from error
        if second % 60 == 0:
            log.info("%s: waiting for %s", folder, holder)
        time.sleep(1)
    with contextlib.suppress(OSError):  # a courtesy, which a full disk may not have room for
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file


def png_bytes(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **options)
    return buffer.getbuffer()


def write_json(path, content):
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path, *keys):
    """A JSON file that holds an object, as a dict. ValueError if it is none or lacks one of `keys`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        raise ValueError(f"{path}: no JSON object" + (f" with {', '.join(keys)}" if keys else "") + ", which is needed")
    return content


def finished(out, name):
    """Path of a finished run's weights.pt; ValueError if the run is not there or not finished. name: its flag."""
    weights = Path(out) / "weights.pt"
    if not weights.is_file():
        raise ValueError(f"{name} {out}: no weights.pt there; is that run finished? The command that began it goes on with it")
    return weights


def write_csv(path, rows):
    """Rows (dicts) as a CSV file with the columns of all of them, in the order of their first appearance."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(column for row in rows for column in row)), restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def read_csv(path, *columns):
    """The rows of a CSV file as dicts of strings; none if there is no such file. ValueError if it lacks one of `columns`."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restval="")
            rows, found = list(reader), reader.fieldnames or []
    except FileNotFoundError:
        return []
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not CSV ({error})") from error
    if missing := [column for column in columns if column not in found]:
        raise ValueError(f"{path}: no column {', '.join(missing)}, which it should have")
    if any(None in row for row in rows):
        raise ValueError(f"{path}: a row has more cells than there are columns")
    return rows


def check_out(out, *folders, flag="--out"):
    """Raises ValueError if `out` is one of the folders, or inside of one, from which a stage only reads."""
    for folder in filter(None, folders):
        if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
            raise ValueError(f"{flag} {out}: lies inside {folder}, which is only read; give a folder elsewhere")
