"""Under torchrun: many processes compute what one does with as large a batch, and leave the same files."""

import json
import shutil
import sys
import textwrap

import pytest
import served
import torch
from commands import MEASURED, ROOT, assert_same_outputs, run, script, table, torchrun

import models
import runtime

SMALL = ["--device", "cpu", "--width", 128, "--crop-size", 64, "--workers", 0]
KINDS = ("cut", "fastcut", "fastcut_l5", "cyclegan", "segmenter", "adaptation")

# Trainers one after the other in one process, in float64 by plain descent: float32 rounds gradients to a hundredth where a
# norm divides by next to nothing, and Adam makes full steps of gradients that are rounding alone, as those of biases before
# a norm are. BatchNorm and drop-connect see a process's own images (torch synchronises BatchNorm on CUDA alone), and void
# pixels do not weigh the same in every batch: these are off.
DRIVER = """
import importlib, json, sys
import torch
import data, models, optimization, runtime

torch.set_default_dtype(torch.float64)
data.to_unit, data.to_signed = lambda images: images.double() / 255, lambda images: images.double() / 127.5 - 1
optimization.adam = lambda parameters, lr, betas=None: torch.optim.SGD(parameters, lr)
data.TRAIN_IDS[data.TRAIN_IDS == data.VOID] = 0

def train(self, mode=True):
    torch.nn.Module.train(self, mode)
    self.encoder._global_params = self.encoder._global_params._replace(drop_connect_rate=0)
    for module in self.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return self

models.UNet.train = train

def main():
    for name, words in json.loads(sys.argv[1]):
        sys.argv = [f"{name}.py", *words]
        importlib.import_module(name).main()
        runtime.barrier()

runtime.run_script(main)
"""

# torchrun's own setting for many processes; convolutions on more threads sum in another order.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def trainer(kind, pair, out, *words):
    """The script's name and the arguments of a tiny run."""
    domains = ["--source", pair / "source", "--target", pair / "target"]
    if kind == "segmenter":
        name, own = "train_segmenter", ["--data", pair / "source", "--encoder", "efficientnet-b0", "--encoder-weights", "none"]
    elif kind == "adaptation":
        name, own = "adapt_features", [*domains, "--segmenter", out / "segmenter", "--gate", 0]
    else:
        name, own = "train_translator", [*domains, "--method", kind, "--base-channels", 4]
    return name, [*map(str, [*own, *SMALL, *words, "--out", out / kind])]


def test_two_processes_are_one_with_twice_the_batch(pair, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    for name, batch, processes in (("one", 2, 1), ("two", 1, 2)):
        words = ("--iterations", 6, "--batch-size", batch, "--log-every", 3, "--precision", "fp32", "--lr", 1e-5)
        frozen = ("--freeze-iterations", 2)
        todo = [trainer(kind, pair, tmp_path / name, *words, *(frozen * (kind == "segmenter"))) for kind in KINDS]
        words = [tmp_path / "driver.py", json.dumps(todo)]
        result = torchrun(*words, nproc=processes, python=sys.executable, PYTHONPATH=str(ROOT), **ONE_THREAD)
        assert result.returncode == 0, result.stderr
        assert "Grad strides do not match" not in result.stderr
    for kind in KINDS:
        one, two = (torch.load(tmp_path / name / kind / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
        assert one["iteration"] == two["iteration"] == 6
        for part, state in one["state"].items():
            if not part.startswith(("opt", "pool", "gate")):
                for key, expected in state.items():
                    difference = (two["state"][part][key] - expected).abs().max()
                    assert difference <= 1e-12, (kind, part, key, difference)
        logs = [table(tmp_path / name / kind / "log.csv") for name in ("one", "two")]
        for a, b in zip(*logs, strict=True):
            for column in a.keys() - MEASURED:
                assert float(a[column]) == pytest.approx(float(b[column]), rel=2e-6), (kind, column)


@pytest.mark.parametrize("last", ["return", "sys.exit()"])
def test_processes_end_without_the_interpreters_shutdown(tmp_path, last):
    """Gloo's threads abort it now and then, which would be a failed run; here it always aborts."""
    text = f"""
        import atexit, os, sys, torch, runtime

        def main():
            runtime.join_processes(torch.device("cpu"))
            runtime.barrier()
            print("two processes" if runtime.processes() == 2 else "one", flush=False)
            {last}

        atexit.register(os.abort)
        runtime.run_script(main)
    """
    (tmp_path / "driver.py").write_text(textwrap.dedent(text))
    result = torchrun(tmp_path / "driver.py", PYTHONPATH=str(ROOT))
    assert result.returncode == 0 and result.stdout == "two processes\n", result.stderr


def test_processes_agree_on_device_and_precision(tmp_path):
    """As on two machines of which one has a GPU, and fast bf16 (not the first)."""
    text = """
        import torch, torch.distributed as dist, runtime

        join = dist.init_process_group
        dist.init_process_group = lambda backend, **options: join(backend.replace("nccl", "gloo"), **options)
        torch.cpu._is_avx512_bf16_supported = lambda: runtime.rank() == 1

        def main():
            try:
                runtime.join_processes(torch.device("cuda" if runtime.torchrun("RANK", 0) else "cpu"))
            finally:
                assert runtime.pick_precision("auto", torch.device("cpu")) == "fp32"

        runtime.run_script(main)
    """
    (tmp_path / "driver.py").write_text(textwrap.dedent(text))
    result = torchrun(tmp_path / "driver.py", PYTHONPATH=str(ROOT))
    assert result.returncode != 0 and "--device: 1 of 2 processes found a GPU; give --device cuda" in result.stderr
    assert "AssertionError" not in result.stderr


@pytest.mark.parametrize("differs", ["out", "data"])
def test_processes_without_a_common_file_system_are_refused(pair, tmp_path, differs):
    """As on two machines that each have their own disk: one would resume, the other start anew, or read other frames."""
    text = f"""
        import os, shutil, sys, runtime, train_segmenter
        from pathlib import Path

        def main():
            rank = os.environ["RANK"]
            sys.argv = [word.replace("RANK", rank if {differs + "RANK"!r} in word else "0") for word in sys.argv]
            for leg in range(2 if {differs!r} == "out" else 1):
                train_segmenter.main()
                if rank == "0":
                    Path(sys.argv[-1], "weights.pt").unlink()
                runtime.barrier()

        runtime.run_script(main)
    """
    (tmp_path / "driver.py").write_text(textwrap.dedent(text))
    for rank in (0, 1):
        shutil.copytree(pair / "source", tmp_path / f"data{rank}")
    shutil.copy(pair / "source" / "images" / "00001.png", tmp_path / "data1" / "images" / "00000.png")
    words = ["--data", tmp_path / "dataRANK", "--encoder", "efficientnet-b0", "--encoder-weights", "none", *SMALL]
    words += ["--iterations", 2, "--batch-size", 1, "--out", tmp_path / "outRANK"]
    result = torchrun(tmp_path / "driver.py", *words, PYTHONPATH=str(ROOT), **ONE_THREAD)
    assert result.returncode != 0 and "must be on a shared file system" in result.stderr, result.stderr
    assert (tmp_path / "out0" / "checkpoint.pt").exists() == (differs == "out")


def test_an_error_of_nccl_comes_with_its_reason(tmp_path):
    text = """
        import sys, torch.distributed as dist, runtime

        def main():
            reason = "Cuda failure 2 'out of memory'" if sys.argv[1] == "memory" else "Duplicate GPU detected"
            raise dist.DistBackendError(f"NCCL error in: x.cpp:77, unhandled cuda error\\nLast error:\\n{reason}")

        runtime.processes = lambda: 2
        runtime.run_script(main)
    """
    (tmp_path / "driver.py").write_text(textwrap.dedent(text))
    for word, expected in (("memory", "not enough memory: lower"), ("other", "unhandled cuda error Duplicate GPU detected")):
        result = run(served.python(), tmp_path / "driver.py", word, PYTHONPATH=str(ROOT))
        assert result.returncode == 1 and expected in result.stderr, result.stderr


def test_gradients_are_exchanged_in_their_parameters_layout(tmp_path):
    """Where a side has length 1 a gradient's strides may be others, of which DistributedDataParallel warns, copying each."""
    text = """
        import torch, optimization, runtime

        def main():
            runtime.join_processes(torch.device("cpu"))
            weight = torch.nn.Parameter(torch.zeros(4, 8, 1, 1).to(memory_format=torch.channels_last))
            optimizer = optimization.adam([weight], lr=0.1)
            for step in range(3):
                optimization.backward_and_step(optimizer, (weight * torch.full((4, 8, 1, 1), 1.0 + runtime.rank())).sum())
                assert torch.equal(weight.grad, torch.full_like(weight, 1.5)) and weight.grad.stride() == weight.stride()

        runtime.run_script(main)
    """
    (tmp_path / "driver.py").write_text(textwrap.dedent(text))
    result = torchrun(tmp_path / "driver.py", PYTHONPATH=str(ROOT))
    assert result.returncode == 0 and "strides" not in result.stderr, result.stderr


@pytest.fixture(scope="module")
def trained(pair, tmp_path_factory):
    """A translator and a segmenter after a step, whose networks are then made lively: large weights."""
    out = tmp_path_factory.mktemp("trained")
    for kind in ("cut", "segmenter"):
        name, words = trainer(kind, pair, out, "--iterations", 1)
        result = script(f"{name}.py", *words)
        assert result.returncode == 0, result.stderr
        network = models.load_network(out / kind / "weights.pt")
        for p in network.head.parameters():
            torch.nn.init.normal_(p)
        torch.save(models.network_state(network, network.width), out / kind / "weights.pt")
    return out


def test_stage_2_in_two_processes_or_with_a_cache_writes_the_same_bytes(pair, trained, tmp_path):
    words = ["--source", pair / "source", "--translator", trained / "cut", "--workers", 0, "--device", "cpu", "--out"]
    # The precision that auto does not pick here: a run that is resumed keeps it.
    other = ["--precision", {"bf16": "fp32", "fp32": "bf16"}[runtime.pick_precision("auto", torch.device("cpu"))]]
    one = script("translate_dataset.py", *words, tmp_path / "one", *other, **ONE_THREAD)
    assert one.returncode == 0, one.stderr
    (tmp_path / "two").mkdir()
    for part in ("images", "labels", "args.json"):  # half of it done by one process, as if it had been stopped
        copy = shutil.copy if part.endswith("json") else shutil.copytree
        copy(tmp_path / "one" / part, tmp_path / "two" / part)
    for lost in sorted((tmp_path / "two" / "images").iterdir())[1:]:
        lost.unlink()
    result = torchrun(ROOT / "translate_dataset.py", *words, tmp_path / "two")
    assert result.returncode == 0, result.stderr
    assert len(assert_same_outputs(tmp_path / "one", tmp_path / "two")) == 1 + 2 * 4
    for out in ("three", "four"):  # a cache of resized frames is filled, then read
        again = script("translate_dataset.py", *words, tmp_path / out, *other, "--cache", tmp_path / "cache", **ONE_THREAD)
        assert again.returncode == 0 and len(list((tmp_path / "cache").iterdir())) == 2 * 4, again.stderr
        assert_same_outputs(tmp_path / "one", tmp_path / out)
    (tmp_path / "file").touch()
    for start in (script, lambda name, *rest: torchrun(ROOT / name, *rest)):
        refused = start("translate_dataset.py", *words, tmp_path / "five", "--cache", tmp_path / "file")
        assert refused.returncode != 0 and f"--cache {tmp_path / 'file'}: is a file; give a folder" in refused.stderr


def test_predictions_in_two_processes_are_the_same(pair, trained, tmp_path):
    words = ["--segmenter", trained / "segmenter", "--images", pair / "source" / "images", "--device", "cpu", "--out"]
    assert script("predict.py", *words, tmp_path / "one", **ONE_THREAD).returncode == 0
    assert torchrun(ROOT / "predict.py", *words, tmp_path / "two").returncode == 0
    assert len(assert_same_outputs(tmp_path / "one", tmp_path / "two")) == 1 + 4
    result = torchrun(ROOT / "predict.py", *words[:3], pair / "target", *words[4:], tmp_path / "two")
    assert result.returncode == 1 and "started with other arguments" in result.stderr


def test_scores_in_two_processes_are_the_same(pair, trained, tmp_path):
    words = ["--segmenter", trained / "segmenter", "--data", pair / "source", "--workers", 0, "--device", "cpu", "--name", "A"]
    outs = [["--out", tmp_path / name / "t.csv", "--save-predictions", tmp_path / name / "p"] for name in ("one", "two")]
    assert script("evaluate.py", *words, *outs[0], **ONE_THREAD).returncode == 0
    result = torchrun(ROOT / "evaluate.py", *words, *outs[1])
    assert result.returncode == 0 and result.stdout.count("A: mIoU") == 1, result.stderr
    assert torchrun(ROOT / "evaluate.py", *words, "--skip-done").returncode == 0
    assert torchrun(ROOT / "evaluate.py", *words, "--skip-done").stdout.count("A: already evaluated") == 1
    assert len(assert_same_outputs(tmp_path / "one", tmp_path / "two")) == 1 + 5


@pytest.mark.parametrize("kind", ["cyclegan", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "cyclegan")])
def test_a_process_that_dies_ends_the_run_and_torchrun_resumes_it(pair, trained, tmp_path, watched, kind):
    """Each process has an image pool of its own. The first one is killed as it saves: what it saved before is intact."""
    if kind == "adaptation":
        for name in "ab":
            shutil.copytree(trained / "segmenter", tmp_path / name / "segmenter")
    runs = [trainer(kind, pair, tmp_path / name, "--iterations", 8, "--log-every", 3, "--save-every", 2) for name in "ab"]
    (name, whole), (_, killed) = runs
    assert torchrun(ROOT / f"{name}.py", *whole).returncode == 0
    kill = {"KILL_AT": "SIGKILL checkpoint.pt 2", **watched}
    dead = torchrun(ROOT / f"{name}.py", *killed, **kill)
    assert dead.returncode != 0 and "SIGKILL" in dead.stderr
    assert torch.load(tmp_path / "b" / kind / "checkpoint.pt", weights_only=True)["iteration"] == 2
    alone = script(f"{name}.py", *killed)
    assert alone.returncode == 2 and "the number of processes (was 2, is now 1)" in alone.stderr
    refused = torchrun(ROOT / f"{name}.py", *killed, restarts=3)
    assert refused.returncode != 0 and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in refused.stderr
    kill |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    resumed = torchrun(ROOT / f"{name}.py", *killed, restarts=3, **kill)  # dies at 6 and at 8
    assert resumed.returncode == 0, resumed.stderr
    assert_same_outputs(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_run_all_in_two_processes(pair, tmp_path):
    small = "--batch-size 1 --crop-size 64 --width 128 --workers 0 --log-every 1 --device cpu"
    settings = {"SOURCE": str(pair / "source"), "TARGET": str(pair / "target"), "OUT": str(tmp_path), "PYTHON": sys.executable}
    settings |= {"NPROC": "2", "FID_WEIGHTS": "random", "ITERATIONS_SCALE": "0.00001", "ADAPT_ARGS": small}
    settings |= {"TRANSLATOR_ARGS": f"--base-channels 4 {small}", "METHODS": "cut fastcut_l5"}
    settings |= {"SEGMENTER_ARGS": f"--encoder efficientnet-b0 --encoder-weights none {small}"}
    result = run("bash", ROOT / "run_all.sh", **settings)
    assert result.returncode == 0, result.stderr
    assert len(table(tmp_path / "results" / "table2.csv")) == 6
    assert all(json.loads(path.read_text())["processes"] == 2 for path in tmp_path.glob("*ers/*/args.json"))


def test_what_a_launcher_has_left_in_the_environment_does_not_join_processes(tmp_path):
    result = script("check_data.py", tmp_path / "gone", TORCHELASTIC_RUN_ID="none", RANK="1")
    assert (result.returncode, result.stderr) == (2, f"check_data.py: {tmp_path}/gone: no such folder\n")
