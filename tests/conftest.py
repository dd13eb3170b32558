"""Every test starts from one seed; hypothesis takes the same examples at every run and has no time limit on one."""

import os
import signal

# Set before torch is imported, and for the scripts that tests start: threads that wait for each other on a busy machine cost
# small networks a hundredfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from commands import SITECUSTOMIZE, script
from hypothesis import settings
from torch.utils.data._utils import signal_handling

# A time limit would make the tests fail on a busy machine.
settings.register_profile("tests", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("tests")


# Each process takes whole files. The first ones go to processes that have done nothing yet: the longest, and test_gpu_check.py,
# whose forks have aborted in a process that had run other tests before.
FIRST = "test_run_all.py", "test_bug_reports.py", "test_processes.py", "test_gpu_check.py"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in FIRST)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def child_handler():
    """loading.batches replaces the SIGCHLD handler that torch's DataLoader sets once per process; later tests need it."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)
    signal_handling._SIGCHLD_handler_set = before != signal.SIG_DFL


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A pair of domains, 144 pixels wide: what trains at a width of 128 resizes them."""
    out = tmp_path_factory.mktemp("pair of domains")  # with spaces in its name
    counts = ["--source-count", 4, "--target-count", 3, "--val-count", 2]
    made = script("demo/make_demo_data.py", out / "d", "--size", "72x144", *counts)
    assert made.returncode == 0, made.stderr
    return out / "d"


@pytest.fixture(scope="session")
def watched(tmp_path_factory):
    """An environment in which Python runs SITECUSTOMIZE."""
    folder = tmp_path_factory.mktemp("watch")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return {"PYTHONPATH": str(folder)}
