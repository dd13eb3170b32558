"""tools/gpu_check.py: its logic on the CPU, that it reports what is wrong; and what only a GPU can show (marker cuda)."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import graphs
import pytest
import torch
import torch.nn.functional as F
from commands import ROOT, run

import models
import optimization
import runtime
import train_translator
import training

sys.path.insert(0, str(ROOT / "tools"))
import gpu_check

CUDA = torch.device("cuda")


def check(out, *words, code=None):
    """The tiny run on the CPU; code: Python that is run in its place, once gpu_check is imported."""
    arguments = ["--device", "cpu", "--tiny", "--out", str(out), *words]
    text = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r})\nimport gpu_check, models, torch\n{code or ''}\n"
    result = run(sys.executable, "-c", f"{text}sys.exit(gpu_check.main({arguments!r}))")
    return result, json.loads((out / "check.json").read_text())


@pytest.fixture
def job(tmp_path, monkeypatch):
    """What main() sets before any part."""
    settings = dict(tiny=True, device="cpu", out=tmp_path, work=tmp_path, pid=os.getpid(), losses={})
    job = SimpleNamespace(**gpu_check.TINY, **settings, end=time.monotonic() + 60)
    monkeypatch.setattr(gpu_check, "job", job)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at these sizes threads wait for each other longer than they compute
    yield job
    torch.set_num_threads(threads)


# --- the tiny run


def test_parts_a_and_d_run_without_a_gpu(tmp_path):
    result, summary = check(tmp_path, "--parts", "A", "D")
    assert result.returncode == 0 and summary["failed"] == [], result.stdout + result.stderr
    rows = {f"{row['part']} {row['what']}": row for row in summary["results"]}
    for kind in ("cyclegan", "cut", "fastcut", "fastcut_l5", "stage 3", "stage 4"):
        for precision in ("float32", "bf16"):
            assert any(name.startswith(f"A {kind} {precision}") and row["status"] == "ok" for name, row in rows.items())
        assert rows[f"A {kind} TF32"]["status"] == "not on this device"
    assert rows["D fastcut_l5 bf16, as it is"]["value"] > 0 and rows["D cyclegan bf16, torch.compile"]["value"] > 0
    assert "channels_last" in rows["A memory formats (output/gradient) of fastcut_l5's G"]["note"]
    assert not any(row["status"] in ("error", "skipped") for row in rows.values())
    assert [json.loads(line) for line in (tmp_path / "check.jsonl").read_text().splitlines()] == summary["results"]
    assert result.stdout.count("D fastcut_l5 bf16, as it is") == 2  # as it came, and in the table


@pytest.mark.slow
def test_all_parts_run_without_a_gpu(tmp_path):
    result, summary = check(tmp_path)
    assert result.returncode == 0 and summary["failed"] == [], result.stdout + result.stderr
    assert {row["part"] for row in summary["results"]} == {"", *"ABCDEFGHI"}
    assert not any(row["status"] in ("error", "skipped") for row in summary["results"])
    assert summary["hours"]["total"]["hours"] > 0


def test_a_part_that_does_not_fit_is_left_out_and_others_results_stay(tmp_path):
    kept = dict(part="H", what="stage 2", value=80.0, unit="frames/s", limit=None, status="measured", note="")
    (tmp_path / "check.jsonl").write_text(json.dumps(kept) + "\n")
    result, summary = check(tmp_path, "--parts", "B", "--seconds", "30")
    assert result.returncode == 0 and [row["status"] for row in summary["results"]] == ["measured", "measured", "skipped"]
    assert summary["results"][0] == kept and "are left" in result.stdout


def test_a_device_that_is_not_there_is_one_line(tmp_path):
    result = run(sys.executable, ROOT / "tools" / "gpu_check.py", "--device", "cuda", "--out", tmp_path)
    assert result.returncode != 0 and result.stderr.count("\n") == 1 and "--device cuda" in result.stderr


def test_a_signal_leaves_no_process_behind(tmp_path):
    words = [sys.executable, ROOT / "tools" / "gpu_check.py", "--device", "cpu", "--tiny", "--out", tmp_path, "--parts", "C"]
    process = subprocess.Popen(words, env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("gpu_check*/*/resumed/log.csv")):  # trainers are at work
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143 and not list(tmp_path.glob("gpu_check*"))
    for path in os.scandir("/proc"):
        if path.name.isdigit():
            try:
                with open(f"/proc/{path.name}/cmdline") as file:
                    assert str(tmp_path) not in file.read()
            except OSError:
                pass


# --- wrong results are reported

FAULT = """
real = gpu_check.build
def build(kind, device, size, batch=1, dtype=torch.float32, **options):
    made = real(kind, device, size, batch, dtype, **options)
    if dtype == torch.float32:
        next(iter(made.networks.values())).head.weight.data[0, 0] *= 1.1
    return made
gpu_check.build, gpu_check.METHODS = build, ("fastcut_l5",)
"""


def test_a_wrong_weight_is_a_failed_check_and_status_1(tmp_path):
    result, summary = check(tmp_path, "--parts", "A", "--seconds", "80", code=FAULT)
    assert result.returncode == 1, result.stdout + result.stderr
    failed = [name for name in summary["failed"] if "float32" in name]
    assert [name.split(" float32")[0] for name in failed] == ["A fastcut_l5", "A stage 3", "A stage 4"]


def judged(job, kind, precision, found):
    cpu = torch.device("cpu")
    exact, own = (gpu_check.evaluate_step(kind, cpu, each) for each in ("float64", "bf16"))
    gpu_check.judge(kind, precision, exact, own, found)
    return gpu_check.recorded()[-1]["status"]


def test_a_gradient_that_is_wrong_at_the_border_alone_is_seen(job, monkeypatch):
    """Outputs are all right; a corner of the padding's gradient is not handed on."""
    right = models.ReflectPad2d.backward

    def wrong(ctx, gradient):
        gradient = gradient.clone()
        gradient[..., 0, 0] = 0
        return right(ctx, gradient)

    monkeypatch.setattr(models, "reflect_pad", gpu_check.strips)
    assert judged(job, "fastcut_l5", "float32", gpu_check.evaluate_step("fastcut_l5", torch.device("cpu"), "float32")) == "ok"
    with monkeypatch.context() as patch:
        patch.setattr(models.ReflectPad2d, "backward", staticmethod(wrong))
        found = gpu_check.evaluate_step("fastcut_l5", torch.device("cpu"), "float32")
    assert judged(job, "fastcut_l5", "float32", found) == "FAILED"


@pytest.mark.parametrize("bad", [float("nan"), 1.1])
@pytest.mark.parametrize("name", ["output", "loss nce_x", "gradients of D"])
def test_each_number_counts(job, bad, name):
    found = gpu_check.evaluate_step("cut", torch.device("cpu"), "bf16")
    found[name] = found[name] * bad
    assert judged(job, "cut", "bf16", found) == "FAILED"


# --- processes and arithmetic


def test_a_process_that_hangs_dies_or_fails_is_an_error_of_one_line(job):
    begun = time.monotonic()
    for function, words, said in (
        (time.sleep, [60], "too long"),
        (os._exit, [3], "status 3"),
        (signal.raise_signal, [signal.SIGKILL], "status -9"),
        (int, ["x\ny"], "ValueError: invalid literal"),
    ):
        with pytest.raises(gpu_check.Failed, match=said):
            gpu_check.isolated(function, *words, limit=0.5)
    assert gpu_check.isolated(max, 1, 2, limit=5) == 2
    with pytest.raises(gpu_check.Failed, match="status 4: nothing there"):
        gpu_check.command("sh", "-c", "echo begun; echo nothing there; exit 4", limit=5)
    assert time.monotonic() < begun + 10 and not gpu_check.groups


def test_hours_of_the_experiment(job):
    values = {"D": {f"{kind} bf16, as it is": ms for kind, ms in (("fastcut_l5", 9.0), ("cut", 18.0), ("cyclegan", 27.0))}}
    values["E"] = {"stage 3 bf16, encoder frozen": 9.0, "stage 3 bf16, as it is": 18.0, "stage 4 bf16, as it is": 36.0}
    values["F"] = {"stage 1, --cache": 50.0, "stage 3, --cache": 1000.0, "stage 4, --cache": 1000.0}
    values |= {"H": {"stage 2": 24_966 / 3600}, "I": {"FID's features": (4 * 24_966 + 2_975) / 3600}}
    rows = [dict(part=p, what=w, value=v, status="measured") for p, part in values.items() for w, v in part.items()]
    hours = gpu_check.hours(rows)
    assert hours["stage 1, FastCUT-L5"]["hours"] == pytest.approx(400_000 * 0.020 / 3600)  # waits for data
    assert hours["stage 1, CycleGAN"]["hours"] == pytest.approx(3.0)
    assert hours["stage 3, five models, then"]["hours"] == pytest.approx(2.0)
    assert hours["total"]["hours"] == pytest.approx(2.2222 + 2.2222 + 3 + 0.5 + 2 + 0.4 + 3 + 1 + 0.1402, abs=1e-3)
    job.tiny = False
    held = {row["what"]: row["holds"] for row in gpu_check.targets(rows)}
    assert held["FastCUT-L5, ms per step (paper 170)"] is True and held["CUT, ms per step (paper 321)"] is False
    assert held["stage 1, waiting for data, % of the time"] is None and held["the whole experiment, hours"] is False
    assert gpu_check.hours(rows[1:]) == {"missing": "D fastcut_l5 bf16, as it is"}


# --- steps and what is measured of them


@pytest.mark.parametrize("kind", ["cyclegan", "stage 4"])
def test_a_replayed_step_is_held_to_the_step(job, monkeypatch, kind):
    graphs.stand_in(monkeypatch)
    made = gpu_check.build(kind, torch.device("cpu"), 64, 1 if kind == "cyclegan" else 2)
    step = optimization.GraphedStep(gpu_check.functools.partial(made.step, runtime.autocast(torch.device("cpu"), "fp32")), CUDA)
    for _ in range(optimization.WARM_UP + 1):
        step(*made.inputs)
    with pytest.raises(gpu_check.Failed, match="ignores the learning rate"):  # which is a number on the CPU
        gpu_check.graph_off(made, step)


def test_a_replayed_step_that_is_right_passes(job, monkeypatch):
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, **options: adam(parameters, torch.tensor(lr), **options))
    test_graph = graphs.stand_in(monkeypatch)
    made = gpu_check.build("fastcut_l5", torch.device("cpu"), 32)
    step = optimization.GraphedStep(gpu_check.functools.partial(made.step, runtime.autocast(torch.device("cpu"), "fp32")), CUDA)
    for _ in range(optimization.WARM_UP + 1):
        step(*made.inputs)
    assert 0 <= gpu_check.graph_off(made, step) < 1e-5 and len(test_graph) == 3


def test_variants_are_timed_and_held_to_the_step_as_it_is(job):
    gpu_check.time_variants("D", "cyclegan", ["bf16, as it is", "bf16, default layout"], None)
    rows = {row["what"]: row["status"] for row in gpu_check.recorded()}
    assert list(rows) == [
        "cyclegan bf16, as it is",
        "cyclegan bf16, default layout: losses off by",
        "cyclegan bf16, default layout",
    ]
    assert "FAILED" not in rows.values() and "error" not in rows.values()


def test_what_is_measured_on_cuda(job, monkeypatch):
    """Two kernels and a copy per step in 2 of 4 ms; marks of the profiler and what the CPU does are not counted."""
    clock = itertools.count(0, 4)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def elapsed_time(self, later):
            return later.at - self.at

    def event(name, device="CUDA", us=1000):
        span = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(name=name, device_type=getattr(torch.autograd.DeviceType, device), time_range=span)

    step = [event("gemm", us=1200), event("norm", us=600), event("Memcpy DtoD", us=200)]
    noise = [event("Optimizer.step#Adam.step"), event("aten::add", "CPU")]
    profile = gpu_check.contextlib.nullcontext(SimpleNamespace(events=lambda: 3 * step + noise))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    found = gpu_check.timed(lambda: None, CUDA)
    assert found == {
        "ms": 4,
        "kernels": 2,
        "of the time busy": 0.5,
        "MiB": 3,
        "s to start": 0,
        "ms to launch": 0,
        "most_time": found["most_time"],
    }
    assert found["most_time"] == {
        "gemm": pytest.approx((1, 1.2)),
        "norm": pytest.approx((1, 0.6)),
        "Memcpy DtoD": pytest.approx((1, 0.2)),
    }


def test_compiled_networks_take_the_same_step_with_the_padding_of_cuda(job, monkeypatch):
    """And torch.compile can trace models.ReflectPad2d."""
    monkeypatch.setattr(models, "reflect_pad", gpu_check.strips)
    cpu, losses = torch.device("cpu"), []
    for is_compiled in (False, True):
        made = gpu_check.build("fastcut_l5", cpu, 32)
        if is_compiled:
            gpu_check.compile_networks(made)
        found = made.step(runtime.autocast(cpu, "fp32"))[1]
        losses.append(torch.stack([loss.detach() for loss in found.values()]))
    torch.testing.assert_close(*losses)


# --- on a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_padding_on_cuda_is_torchs_in_the_format_of_its_input(layout):
    x = torch.randn(2, 5, 9, 7, dtype=torch.float64, device="cuda").to(memory_format=layout).requires_grad_()
    theirs = x.detach().clone().requires_grad_()
    for n in (1, 3):
        out, expected = models.reflect_pad(x, n), F.pad(theirs, (n,) * 4, "reflect")
        assert torch.equal(out, expected) and out.is_contiguous(memory_format=layout)
        weight = torch.randn_like(out)
        (gradient,), (expected,) = torch.autograd.grad(out, x, weight), torch.autograd.grad(expected, theirs, weight)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)
        assert gradient.is_contiguous(memory_format=layout)


TWICE = """
import torch
gpu_check.job.__dict__.update(gpu_check.TINY)
device = gpu_check.runtime.pick_device("cuda", tf32=True, deterministic=True)
for kind in ("cut", "cyclegan", "stage 3", "stage 4"):
    found = []
    for _ in range(2):
        made = gpu_check.build(kind, device, 64, 2)
        for k in range(3):
            torch.manual_seed(k)
            made.step(gpu_check.runtime.autocast(device, "bf16"))
        found.append(gpu_check.tensors_of([network.state_dict() for network in made.networks.values()]))
    assert all(map(torch.equal, *found)), kind
sys.exit()
"""


@pytest.mark.cuda
def test_deterministic_steps_are_the_same_twice(tmp_path):
    text = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r})\nimport gpu_check\n{TWICE}"
    result = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.cuda
def test_a_run_begun_on_the_cpu_steps_on_cuda_as_if_unbroken(tmp_path):
    """Adam's moments come from contiguous weights, and go to weights in channels_last."""

    def three_steps(out, devices):
        for steps, device in enumerate(devices, 2):
            words = f"--source s --target t --method cut --out {out} --device {device} --workers 0 --precision fp32"
            words += " --iterations 3 --save-every 1"
            run = training.Run(train_translator.parse_args(words.split()))
            torch.manual_seed(0)
            network = torch.nn.Conv2d(3, 4, 3, dtype=torch.float64)
            network.to(run.device, memory_format=torch.channels_last if device == "cuda" else torch.contiguous_format)
            optimizer = optimization.adam(network.parameters(), lr=0.1)
            run.restore(network=network, optimizer=optimizer)
            for iteration, x in run.iterations(torch.randn(3, 3, 8, 8, dtype=torch.float64)):
                optimization.backward_and_step(optimizer, network(x).square().sum())
                run.log({})
                if iteration + 1 == steps and steps < 3:
                    break
            run.lock.close()
        return network.weight.detach().cpu()

    unbroken, resumed = three_steps(tmp_path / "a", ["cpu", "cpu"]), three_steps(tmp_path / "b", ["cpu", "cuda"])
    torch.testing.assert_close(resumed, unbroken, rtol=1e-9, atol=1e-9)
