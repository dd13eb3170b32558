"""Runs Python scripts in processes forked from one that has imported torch already, which saves each script 3 seconds.

`python()` is the path of an executable that takes a script and its arguments as `python` does. It starts nothing but a small
client; a server forks the script's process, which has the client's arguments, environment, folder and streams. The client
ends as the script does, and the script ends when the client is killed. `-m` and `-c` go to the real interpreter.
"""

import atexit
import contextlib
import ctypes
import functools
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import torch

CLIENT = """#!{python} -ES
import json, os, signal, socket, sys
if len(sys.argv) < 2 or not sys.argv[1].endswith(".py"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()], ensure_ascii=True).encode()
socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
server.sendall(request)
child = int.from_bytes(server.recv(4), "big")
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, _: os.kill(child, number))
status = int.from_bytes(server.recv(4), "big", signed=True)
if status < 0:
    if status != -signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@functools.cache
def python():
    """Path of the executable; the server is started by the first call and ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="served"))
    atexit.register(shutil.rmtree, folder)
    address, executable = str(folder / "socket"), folder / "python"
    executable.write_text(CLIENT.format(python=sys.executable, address=address))
    executable.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    words = [sys.executable, __file__, str(listener.fileno())]
    subprocess.Popen(words, pass_fds=[listener.fileno()], start_new_session=True)
    listener.close()
    return executable


def _serve(listener):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the tests
    sys.path.insert(1, str(Path(__file__).parent.parent))
    for name in ("efficientnet_pytorch", "scipy.linalg", "fid", "evaluate", "report", "train_translator", "adapt_features"):
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _attend(client)
        client.close()


def _attend(client):
    """Run the script that a client asks for in a process group of its own, and tell the client how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(client, 4, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += client.recv(65536)
    child = os.fork()
    if child == 0:
        client.close()
        _become(*json.loads(request), streams)
    for stream in streams:
        os.close(stream)
    client.sendall(child.to_bytes(4, "big"))
    exited = os.pidfd_open(child)
    ready, _, _ = select.select([exited, client], [], [])
    if exited not in ready:  # the client was killed
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        client.sendall(status.to_bytes(4, "big", signed=True))
    os._exit(0)


def _become(words, environment, folder, streams):
    """Be `python words` in an environment and a folder, with three streams."""
    os.setpgid(0, 0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ |= environment
    os.chdir(folder)
    paths = [path for path in environment.get("PYTHONPATH", "").split(":") if path]
    for path in paths:
        if os.path.isfile(hook := os.path.join(path, "sitecustomize.py")):  # which an interpreter would run at its start
            runpy.run_path(hook)
    sys.argv, sys.path[0:2] = words, [os.path.dirname(os.path.abspath(words[0])), *paths]
    if "OMP_NUM_THREADS" in environment:  # which is otherwise read as torch is imported
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    status = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        status = 1
        traceback.print_exc()
    # As at an interpreter's end, but for the second that it takes to free all modules.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
