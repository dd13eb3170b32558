"""tools/gpu_check.py: its logic on the CPU; that it reports what is wrong; and what only a GPU can show (marker cuda)."""

import contextlib
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import gpu_check
import gpu_compare
import gpu_harness
import gpu_steps
import graphs
import pytest
import steps
import torch
import torch.nn.functional as F
from commands import ROOT

import models
import optimization
import runtime
import train_translator
import training

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = dict(channels=8, encoder="efficientnet-b0")


@pytest.fixture
def job(tmp_path, monkeypatch):
    """What main() sets before it runs any part."""
    settings = dict(tiny=True, device="cpu", out=tmp_path, work=tmp_path, pid=os.getpid(), losses={})
    for name, value in (gpu_check.TINY | settings | {"end": time.monotonic() + 60}).items():
        monkeypatch.setattr(gpu_harness.job, name, value, raising=False)
    return gpu_harness.job


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Run the command at tiny sizes within this process -> (exit status, content of check.json)."""
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "" if name.startswith("CUDA") else "1")
    handler = signal.getsignal(signal.SIGTERM)

    def call(*words, device="cpu"):
        status = gpu_check.main(["--device", device, "--tiny", "--out", str(tmp_path), *words])
        return status, json.loads((tmp_path / "check.json").read_text())

    yield call
    signal.signal(signal.SIGTERM, handler)
    vars(gpu_harness.job).clear()


# --- The tiny run


def test_parts_a_and_d_run_without_a_gpu(check, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu_check, "PARTS", [part for part in gpu_check.PARTS if "variants" not in part[1]])  # slow
    status, summary = check("--parts", "A", "D")
    assert status == 0 and summary["failed"] == []
    rows = {f"{row['part']} {row['what']}": row for row in summary["results"]}
    for kind in ("cyclegan", "cut", "fastcut", "fastcut_l5", "stage 3", "stage 4"):
        for precision in ("float32", "bf16"):
            assert any(name.startswith(f"A {kind} {precision}") and row["status"] == "ok" for name, row in rows.items())
        assert rows[f"A {kind} TF32"]["status"] == "not on this device"
    assert rows["D fastcut_l5 bf16, as trained"]["value"] > 0 and rows["D cyclegan float32, as trained"]["value"] > 0
    assert "channels_last" in rows["A memory formats (output/gradient), fastcut_l5, G"]["note"]
    assert not any(row["status"] in ("error", "skipped") for row in rows.values())
    assert [json.loads(line) for line in (tmp_path / "check.jsonl").read_text().splitlines()] == summary["results"]
    assert "D fastcut_l5 bf16, as trained" in capfd.readouterr().out


@pytest.mark.slow
def test_all_parts_run_without_a_gpu(tmp_path):
    # In a process of its own: torch.compile aborts now and then in forks of a process that has imported pytest.
    words = [sys.executable, ROOT / "tools" / "gpu_check.py", "--device", "cpu", "--tiny", "--out", tmp_path]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    summary = json.loads((tmp_path / "check.json").read_text())
    assert result.returncode == 0 and summary["failed"] == [], result.stdout + result.stderr
    assert {row["part"] for row in summary["results"]} == {"", *"ABCDEFGHI"}
    assert not any(row["status"] in ("error", "skipped") for row in summary["results"])
    assert summary["hours"]["total"]["hours"] > 0


def test_a_part_that_does_not_fit_is_skipped_and_other_parts_results_stay(check, tmp_path, capfd):
    kept = dict(part="H", what="stage 2", value=80.0, unit="frames/s", limit=None, status="measured", note="")
    (tmp_path / "check.jsonl").write_text(json.dumps(kept) + "\n")
    status, summary = check("--parts", "B", "--seconds", "30")
    assert status == 0 and [row["status"] for row in summary["results"]] == ["measured", "measured", "skipped"]
    assert summary["results"][0] == kept and "s are left" in capfd.readouterr().out


def test_a_missing_device_is_reported_in_one_line(check):
    with pytest.raises(SystemExit) as stop:
        check(device="cuda:99")
    assert "--device cuda:99" in stop.value.code and "\n" not in stop.value.code


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
            with contextlib.suppress(OSError), open(f"/proc/{path.name}/cmdline") as file:
                assert str(tmp_path) not in file.read()


# --- Wrong results are reported


def test_a_wrong_weight_is_a_failed_check_and_status_1(job, monkeypatch):
    def build(kind, device, size, batch=1, dtype=torch.float32, **options):
        made = steps.build(kind, device, size, batch, dtype, **options)
        if dtype == torch.float32:
            next(iter(made.networks.values())).head.weight.data[0, 0] *= 1.1
        return made

    monkeypatch.setattr(gpu_compare, "build", build)
    monkeypatch.setattr(gpu_compare, "METHODS", ("fastcut_l5",))
    gpu_compare.part_a()
    failed = [row["what"] for row in gpu_harness.recorded() if row["status"] == "FAILED" and "float32" in row["what"]]
    assert [what.split(" float32")[0] for what in failed] == ["fastcut_l5", "stage 3", "stage 4"]
    assert gpu_check.conclude() == 1


evaluated = functools.cache(lambda kind, precision: gpu_compare.evaluate_step(kind, CPU, precision))


def is_within_limits(kind, precision, found):
    """Does `found` pass a comparison with the same step in float64?"""
    return gpu_compare.judge(precision, evaluated(kind, "float64"), evaluated(kind, "bf16"), found)[0] <= 1


def test_a_gradient_that_is_wrong_at_the_border_alone_is_seen(job, monkeypatch):
    """All outputs are right; the padding drops the gradient of one corner."""
    right = models.ReflectPad2d.backward

    def wrong(ctx, gradient):
        gradient = gradient.clone()
        gradient[..., 0, 0] = 0
        return right(ctx, gradient)

    assert is_within_limits("fastcut_l5", "float32", evaluated("fastcut_l5", "float32"))
    monkeypatch.setattr(models, "reflect_pad", models.ReflectPad2d.apply)
    assert is_within_limits("fastcut_l5", "float32", gpu_compare.evaluate_step("fastcut_l5", CPU, "float32"))
    monkeypatch.setattr(models.ReflectPad2d, "backward", staticmethod(wrong))
    assert not is_within_limits("fastcut_l5", "float32", gpu_compare.evaluate_step("fastcut_l5", CPU, "float32"))


@pytest.mark.parametrize("bad", [float("nan"), 1.1])
@pytest.mark.parametrize("name", ["output", "loss nce_x", "gradients of D"])
def test_each_number_counts(job, bad, name):
    found = evaluated("cut", "bf16")
    assert not is_within_limits("cut", "bf16", found | {name: found[name] * bad})


# --- Processes and arithmetic


def test_a_process_that_hangs_dies_or_fails_is_an_error_of_one_line(job):
    started = time.monotonic()
    for function, words, message in (
        (time.sleep, [60], "too long"),
        (os._exit, [3], "status 3"),
        (signal.raise_signal, [signal.SIGKILL], "status -9"),
        (int, ["x\ny"], "ValueError: invalid literal"),
    ):
        with pytest.raises(gpu_harness.Failed, match=message):
            gpu_harness.isolated(function, *words, limit=0.5)
    assert gpu_harness.isolated(max, 1, 2, limit=5) == 2
    with pytest.raises(gpu_harness.Failed, match="status 4: nothing there"):
        gpu_harness.command("sh", "-c", "echo started; echo nothing there; exit 4", limit=5)
    assert time.monotonic() < started + 10 and not gpu_harness.groups


def test_hours_of_the_experiment(job):
    values = {"D": {f"{kind} bf16, as trained": ms for kind, ms in (("fastcut_l5", 9.0), ("cut", 18.0), ("cyclegan", 27.0))}}
    values["E"] = {"stage 3 bf16, encoder frozen": 9.0, "stage 3 bf16, as trained": 18.0, "stage 4 bf16, as trained": 36.0}
    values["F"] = {"stage 1, --cache": 50.0, "stage 3, --cache": 1000.0, "stage 4, --cache": 1000.0}
    values |= {"H": {"stage 2": 24_966 / 3600}, "I": {"FID's features": (5 * 24_966 + 2_975) / 3600}}
    rows = [dict(part=p, what=w, value=v, status="measured") for p, part in values.items() for w, v in part.items()]
    hours = gpu_harness.hours(rows)
    assert hours["stage 1, FastCUT-L5"]["hours"] == pytest.approx(400_000 * 0.020 / 3600)  # waits for data
    assert hours["stage 1, CycleGAN"]["hours"] == pytest.approx(3.0)
    assert hours["stage 3, five models, then"]["hours"] == pytest.approx(2.0)
    assert hours["total"]["hours"] == pytest.approx(2.2222 + 2.2222 + 3 + 0.5 + 2 + 0.6 + 3 + 1 + 0.1602, abs=1e-3)
    job.tiny = False
    holds = {row["what"]: row["holds"] for row in gpu_harness.targets(rows)}
    assert holds["FastCUT-L5, ms per step (paper 170)"] is True and holds["CUT, ms per step (paper 321)"] is False
    assert holds["stage 1, waiting for data, % of the time"] is None and holds["the whole experiment, hours"] is False
    assert gpu_harness.hours(rows[1:]) == {"missing": "D fastcut_l5 bf16, as trained"}


# --- Steps and what is measured of them


def replayed(kind, size, batch):
    """A step after its graph was recorded, with what it was built from."""
    made = steps.build(kind, CPU, size, batch, **SIZES)
    step = optimization.GraphedStep(functools.partial(made.step, runtime.autocast(CPU, "fp32")), CUDA)
    for _ in range(optimization.WARM_UP + 1):
        step(*made.inputs)
    return made, step


def test_a_graph_that_ignores_the_learning_rate_is_seen(job, monkeypatch):
    graphs.stand_in(monkeypatch)
    with pytest.raises(gpu_harness.Failed, match="ignores the learning rate"):  # which is a number on the CPU
        gpu_steps.graph_error(*replayed("stage 4", 64, 2))


def test_a_replayed_step_that_is_right_passes(job, monkeypatch):
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, **options: adam(parameters, torch.tensor(lr), **options))
    replays = graphs.stand_in(monkeypatch)
    assert 0 <= gpu_steps.graph_error(*replayed("fastcut_l5", 32, 1)) < 1e-5 and len(replays) == 3


def test_variants_are_timed_and_compared_with_the_step_as_trained(job):
    names = ["bf16, as trained", "bf16, default layout", "bf16, F.pad"]
    gpu_steps.time_variants("D", "cyclegan", names, None)
    results = gpu_harness.recorded()
    compared = [[f"cyclegan {name}: losses off by", f"cyclegan {name}"] for name in names[1:]]
    assert [row["what"] for row in results] == [f"cyclegan {names[0]}", *itertools.chain(*compared)]
    assert {row["status"] for row in results} == {"ok", "measured"}


def test_what_is_measured_on_cuda(job, monkeypatch):
    """Two kernels and a copy take 2 of 4 ms; the profiler's annotations and the CPU's operations do not count."""
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
    profile = contextlib.nullcontext(SimpleNamespace(events=lambda: 3 * step + noise))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    found = gpu_steps.timed(lambda: None, CUDA)
    times = {"gemm": (1, 1.2), "norm": (1, 0.6), "Memcpy DtoD": (1, 0.2)}
    assert found.pop("most_time") == {name: pytest.approx(each) for name, each in times.items()}
    expected = {"ms": 4, "kernels": 2, "of the time busy": 0.5, "MiB": 3, "s to start": 0, "ms to launch": 0}
    assert found == expected


def test_compiled_networks_take_the_same_step_with_the_padding_of_cuda(job, monkeypatch):
    """torch.compile can trace models.ReflectPad2d."""
    monkeypatch.setattr(models, "reflect_pad", models.ReflectPad2d.apply)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    losses = []
    for is_compiled in (False, True):
        made = steps.build("fastcut_l5", CPU, 32, **SIZES)
        if is_compiled:
            for network in made.networks.values():
                optimization.compile_network(network)
        losses.append(torch.stack([loss.detach() for loss in made.step(runtime.autocast(CPU, "fp32"))[1].values()]))
    torch.testing.assert_close(*losses)


# --- On a GPU


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
import sys
sys.path.insert(0, {tools!r})
import gpu_steps, runtime, steps, torch
device = runtime.pick_device("cuda", tf32=True, deterministic=True)
for kind in ("cut", "cyclegan", "stage 3", "stage 4"):
    found = []
    for _ in range(2):
        made = steps.build(kind, device, 64, 2, channels=8, encoder="efficientnet-b0")
        for k in range(3):
            torch.manual_seed(k)
            made.step(runtime.autocast(device, "bf16"))
        found.append(gpu_steps.tensors_of([network.state_dict() for network in made.networks.values()]))
    assert all(map(torch.equal, *found)), kind
"""


@pytest.mark.cuda
def test_deterministic_steps_are_the_same_twice():
    text = TWICE.format(tools=str(ROOT / "tools"))
    result = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.cuda
def test_a_run_started_on_the_cpu_resumes_on_cuda(tmp_path):
    """Adam's moments, saved for contiguous weights, are loaded for weights in channels_last."""

    def three_steps(out, devices):
        for last, device in enumerate(devices, 2):
            words = f"--source s --target t --method cut --out {out} --device {device} --workers 0 --precision fp32"
            words += " --iterations 3 --save-every 1"
            run = training.Run(train_translator.parse_args(words.split()))
            torch.manual_seed(0)
            network = torch.nn.Conv2d(3, 4, 3, dtype=torch.float64)
            network.to(run.device, memory_format=torch.channels_last if device == "cuda" else torch.contiguous_format)
            optimizer = optimization.adam(network.parameters(), lr=0.1)
            run.restore(dict, network=network, optimizer=optimizer)
            for iteration, x in run.iterations(torch.randn(3, 3, 8, 8, dtype=torch.float64)):
                optimization.backward_and_step(optimizer, network(x).square().sum())
                run.log({})
                if iteration + 1 == last and last < 3:
                    break
            run.lock.close()
        return network.weight.detach().cpu()

    unbroken, resumed = three_steps(tmp_path / "a", ["cpu", "cpu"]), three_steps(tmp_path / "b", ["cpu", "cuda"])
    torch.testing.assert_close(resumed, unbroken, rtol=1e-9, atol=1e-9)
