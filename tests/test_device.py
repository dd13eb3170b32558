"""What a CPU can show of a run on a GPU: layouts, times, memory, the choice of device and precision, determinism.

Where CUDA itself would be asked, a stand-in answers; tests of the real one carry the marker cuda.
"""

import functools
import itertools
import os
import sys
import time

import pytest
import torch
from commands import ROOT, run, script, table
from torch.utils._python_dispatch import TorchDispatchMode

import adapt_features
import evaluate
import models
import optimization
import runtime
import train_segmenter
import train_translator
import training

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def flags():
    """torch's global switches as they were."""
    cudnn = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = cudnn
    torch.use_deterministic_algorithms(False)


def small_run(out, iterations, *words):
    """A run whose trainer a test writes itself."""
    words = [
        "--source",
        "s",
        "--target",
        "t",
        "--method",
        "cut",
        "--out",
        str(out),
        "--device",
        "cpu",
        "--workers",
        "0",
        *words,
    ]
    return training.Run(train_translator.parse_args([*words, "--iterations", str(iterations), "--save-every", "1"]))


# --- Adam's moments and the layout of weights


def adam_steps(out, layout, steps):
    """A convolution after so many of three steps of Adam in float64, the first ones resumed from `out`."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 4, 3, dtype=torch.float64).to(memory_format=layout)
    optimizer = optimization.adam(network.parameters(), lr=0.1)
    run = small_run(out, 3)
    run.restore(dict, network=network, optimizer=optimizer)
    for _, x in itertools.islice(run.iterations(torch.randn(3, 3, 8, 8, dtype=torch.float64)), steps - run.iteration):
        optimization.backward_and_step(optimizer, network(x).square().sum())
        run.log({})
    run.lock.close()
    return network


@pytest.mark.parametrize(("before", "after"), [LAYOUTS, LAYOUTS[::-1]])
def test_a_run_resumed_in_another_memory_layout_steps_as_if_unbroken(tmp_path, before, after):
    unbroken = adam_steps(tmp_path / "a", before, 3)
    adam_steps(tmp_path / "b", before, 2)  # whose second step is not saved: the generator is left in the middle of it
    resumed = adam_steps(tmp_path / "b", after, 3)
    assert resumed.weight.is_contiguous(memory_format=after)
    torch.testing.assert_close(resumed.weight, unbroken.weight, rtol=1e-12, atol=1e-12)


# --- time of a step, wait for data, peak memory


class Slow(torch.utils.data.Dataset):
    """Samples that take 40 ms each to read."""

    def __len__(self):
        return 100

    def __getitem__(self, k):
        time.sleep(0.04)
        return torch.zeros(3, 4, 4)


def slowly(images):
    """As on a slow disk."""
    time.sleep(0.1)
    return images[:, :3]


def test_a_step_and_the_wait_for_its_data_are_timed_apart(tmp_path):
    run = small_run(tmp_path, 8, "--log-every", "4")
    run.restore(dict)
    for _, x in run.iterations(Slow()):
        time.sleep(0.01)
        run.log({"loss": x.sum()}, grid=lambda: {"x": slowly(x)}, lr=1)  # noqa: B023
    run.finish()
    summary = training.files.read_json(tmp_path / "summary.json")
    for row in (*table(tmp_path / "log.csv"), summary):
        assert 0.01 <= float(row["seconds_per_iteration"]) < 0.035
        assert 0.03 <= float(row["wait_seconds"]) < 0.09  # the first wait, for processes to start, is not counted


REST = 100  # MiB that a network takes between steps


class Calls(list):
    """What the device was asked."""


@pytest.fixture
def cuda(monkeypatch):
    """A device called cuda that is the CPU: its clock is the number of marks and waits, its memory what the test says."""
    calls, peak = Calls(), {"MiB": REST}

    def step(memory):
        peak["MiB"] = max(peak["MiB"], memory)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")
            self.at = len(calls)

        def elapsed_time(self, later):
            assert "synchronize" in calls[later.at :], "read before the device was waited for"
            return 1000.0 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: peak.update(MiB=REST))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak["MiB"] * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Stand-in")
    batches = training.loading.batches
    monkeypatch.setattr(training.loading, "batches", lambda *args: batches(*args[:3]))
    calls.step = step
    return calls


def test_on_cuda_steps_are_timed_by_events_and_nothing_waits_for_the_device_but_a_row(tmp_path, cuda):
    run = small_run(tmp_path, 8, "--log-every", "4")
    run.device = torch.device("cuda")
    run.restore(dict)
    for _ in run.iterations([torch.zeros(1)] * 8):
        run.log({}, lr=1)
    calls = [call for call in cuda if call != "reset"]
    assert calls.count("synchronize") == 2 and calls[:8] == ["record"] * 8  # the beginning and the end of four steps


def test_an_error_of_cuda_while_a_batch_is_pinned_is_not_a_killed_worker(monkeypatch):
    def loader(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield

    monkeypatch.setattr(training.loading, "DataLoader", loader)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        next(training.loading.batches(None, [[0]], workers=1))


@pytest.mark.parametrize("again", [99, 4])
def test_peak_memory_leaves_out_the_first_steps(tmp_path, cuda, again, monkeypatch):
    """In which cuDNN tries algorithms: those of a process, and those after the encoder is unfrozen."""
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "processes", lambda: 2)  # without a graph
        steps = [optimization.GraphedStep(cuda.step, torch.device("cuda")) for _ in range(2)]
    run = small_run(tmp_path, 12, "--log-every", "4")
    run.device = torch.device("cuda")
    run.restore(dict)
    for iteration, _ in run.iterations([torch.zeros(1)] * 12):
        steps[iteration >= again](9000 if iteration in (0, again) else 1000)
        run.log({}, lr=1)
    run.finish()
    assert [row["peak_memory_mib"] for row in table(tmp_path / "log.csv")] == ["1000"] * 3
    assert training.files.read_json(tmp_path / "summary.json")["peak_memory_mib"] == 1000


# --- the device


def started_by_torchrun(monkeypatch, **values):
    variables = {"TORCHELASTIC_RUN_ID": "x", "RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2} | values
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_a_gpu_that_is_not_there_is_one_line_that_says_what_is_needed(pair, tmp_path):
    words = ["--source", pair / "source", "--target", pair / "target", "--method", "cut", "--out", tmp_path / "a"]
    result = script("train_translator.py", *words, "--device", "cuda")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "--device cuda: " in result.stderr and "sees 0 GPUs" in result.stderr
    result = script(
        "evaluate.py", "--segmenter", "x", "--data", pair / "target", "--device", "meta"
    )  # exists, computes nothing
    assert result.returncode == 2 and result.stderr.count("\n") == 1


@pytest.fixture
def broken_gpu(monkeypatch):
    """A GPU on which tensors can be made, but nothing can be computed, as where torch has no kernels for the card."""
    real = torch.device
    monkeypatch.setattr(runtime.torch, "device", lambda name: real("meta" if name.startswith("cuda") else name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_a_gpu_that_cannot_compute_is_refused_with_the_reason(broken_gpu, flags, caplog):
    with pytest.raises(ValueError, match=r"--device cuda: .* sees 2 GPUs; other builds: .*previous-versions") as error:
        runtime.pick_device("cuda")
    assert "\n" not in str(error.value)
    assert runtime.pick_device("auto").type == "cpu" and "using the CPU, because the GPU cannot be used" in caplog.text


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch, flags):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.pick_device("auto").type == "cpu"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nmore"),
        RuntimeError("CUDA error: out of memory\nmore"),
        RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore"),
    ],
)
def test_a_busy_gpu_is_no_reason_to_train_on_the_cpu(broken_gpu, flags, monkeypatch, error):
    monkeypatch.setattr(torch, "ones", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(ValueError, match=r"--device cuda: .*(out of memory|busy)") as message:
        runtime.pick_device("auto")
    assert "\n" not in str(message.value)


def test_each_process_of_many_takes_its_own_gpu(broken_gpu, flags, monkeypatch):
    started_by_torchrun(monkeypatch, LOCAL_RANK=1)
    with pytest.raises(ValueError, match="--device cuda:1: "):
        runtime.pick_device("auto")


@pytest.mark.parametrize(("cores", "processes", "expected"), [(2, None, 2), (64, None, 16), (64, "8", 8), (2, "4", 1)])
def test_one_worker_per_core_of_this_process(monkeypatch, cores, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if processes is not None:
        started_by_torchrun(monkeypatch, LOCAL_WORLD_SIZE=processes)
    assert train_translator.parse_args("--source s --target t --out o --method cut".split()).workers == expected


# --- precision


def test_training_rounds_to_tf32_and_evaluation_does_not(pair, tmp_path, monkeypatch, flags):
    seen = []
    monkeypatch.setattr(torch, "manual_seed", lambda _: seen.append(torch.backends.cudnn.allow_tf32) or sys.exit(0))
    for module, words in (
        (train_translator, ["--source", pair / "source", "--target", pair / "target", "--method", "cut"]),
        (train_segmenter, ["--data", pair / "source"]),
    ):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words), "--width=128", "--crop-size=64", "--out=nowhere"])
        with pytest.raises(SystemExit, match="0"):
            module.main()
    monkeypatch.setattr(models, "load_network", lambda *_: seen.append(torch.backends.cudnn.allow_tf32) or sys.exit(0))
    (tmp_path / "weights.pt").touch()
    monkeypatch.setattr(sys, "argv", ["evaluate", "--segmenter", str(tmp_path), "--data", str(pair / "target")])
    with pytest.raises(SystemExit, match="0"):
        evaluate.main()
    assert seen == [True, True, False]


def test_a_card_without_bf16_trains_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert runtime.pick_precision("auto", torch.device("cuda")) == "fp32"
    assert runtime.pick_precision("bf16", torch.device("cuda")) == "bf16"


# --- determinism

# Operations that torch.use_deterministic_algorithms(True) refuses on CUDA, of those that networks like these might call.
REFUSED = {
    "reflection_pad2d_backward",
    "replication_pad2d_backward",
    "upsample_bilinear2d_backward",
    "_adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward",
    "max_unpool2d",
    "grid_sampler_2d_backward",
    "cumsum",
    "histc",
    "kthvalue",
    "median",
}


class Operations(TorchDispatchMode):
    """Names of the operations called; nll_loss2d_forward is one that sums, which alone is refused."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name != "nll_loss2d_forward" or args[3] != 0:
            self.names.add(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Padding as on CUDA, where gradients are needed."""
    monkeypatch.setattr(
        models,
        "reflect_pad",
        lambda x, n: models.ReflectPad2d.apply(x, n) if x.requires_grad else models.F.pad(x, (n,) * 4, "reflect"),
    )


@pytest.mark.parametrize("method", ["cyclegan", "cut", "fastcut_l5", "antialias", "segmenter", "adaptation"])
def test_a_step_calls_nothing_that_is_not_deterministic_on_cuda(as_on_cuda, method):
    x, y = torch.rand(2, 1, 3, 64, 64)
    labels, autocast = torch.randint(19, (1, 64, 64)), torch.autocast("cpu", enabled=False)
    words = ["--source", "s", "--target", "t", "--out", "o", "--base-channels", "4", "--method"]
    if method in ("segmenter", "adaptation"):
        network = models.UNet(encoder="efficientnet-b0").to(memory_format=torch.channels_last).train()
        optimizer = optimization.adam(network.parameters(), lr=1e-3)
    if method == "adaptation":
        discriminator = models.FeatureDiscriminator(network.feature_channels["decoder3"])
        opt_D, gate = optimization.adam(discriminator.parameters(), lr=1e-3), adapt_features.Gate(0.0)
    elif method != "segmenter":
        words += ["fastcut_l5", "--antialias"] if method == "antialias" else [method]
        kind = train_translator.CycleTranslation if method == "cyclegan" else train_translator.ContrastiveTranslation
        translation = kind(train_translator.parse_args(words), torch.device("cpu"))
    with Operations() as called:
        if method == "segmenter":
            train_segmenter.training_step(network, optimizer, x, labels, autocast)
        elif method == "adaptation":
            batch = x, labels, y
            adapt_features.training_step(network, discriminator, optimizer, opt_D, gate, batch, "decoder3", 0.1, autocast)
        else:
            translation.step(x, y, autocast)
    assert {"convolution_backward", "_fused_adam_"} <= called.names
    assert not called.names & (REFUSED | {"nll_loss2d_forward"})


def test_one_flag_asks_for_determinism(pair, tmp_path, flags):
    device = runtime.pick_device("cpu", deterministic=True)
    assert device.type == "cpu" and torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    words = ["--data", pair / "source", "--encoder", "efficientnet-b0", "--encoder-weights", "none", "--iterations", 2]
    words += [
        "--width",
        128,
        "--crop-size",
        64,
        "--batch-size",
        2,
        "--device",
        "cpu",
        "--deterministic",
        "--out",
        tmp_path / "a",
    ]
    result = script("train_segmenter.py", *words)
    assert result.returncode == 0, result.stderr


# --- finite states


def test_a_finite_state_is_seen_in_a_few_kernels():
    state = {"a": {f"{i}": torch.ones(3) for i in range(200)}, "b": [torch.ones(2).double(), torch.ones(2).bfloat16()]}
    with CountedOperations() as called:
        assert optimization.not_finite(state) == []
    assert called.count < 30
    state["b"][1][0] = float("nan")
    assert optimization.not_finite(state) == ["b.1"]


class CountedOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def compiled(pair, out, *words, **environment):
    words = ["--method=fastcut_l5", "--out", out, "--width=128", "--crop-size=32", "--base-channels=4", "--compile", *words]
    domains = ["--source", pair / "source", "--target", pair / "target"]
    words += ["--iterations=2", "--device=cpu", "--precision=fp32"]
    return run(sys.executable, ROOT / "train_translator.py", *domains, *words, **environment)


def test_compile_goes_with_a_compiler_and_without_deterministic(pair, tmp_path):
    done = compiled(pair, tmp_path / "run", "--deterministic")
    assert done.returncode == 2 and "--compile cannot be combined with --deterministic" in done.stderr
    done = compiled(pair, tmp_path / "run", CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 1 and "train_translator.py: --compile: " in done.stderr and "Traceback" not in done.stderr


def test_compiled_networks_train_alike_and_save_the_same_files(pair, tmp_path, monkeypatch):
    """With torch.compile's tracing, but not its code generator, which takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    words = ["--method=cut", "--width=128", "--crop-size=32", "--base-channels=4", "--iterations=3", "--device=cpu"]
    words += ["--source", pair / "source", "--target", pair / "target", "--precision=fp32", "--workers=0"]
    for out, more in (("plain", []), ("compiled", ["--compile"])):
        monkeypatch.setattr(sys, "argv", ["train_translator.py", *map(str, words), "--out", str(tmp_path / out), *more])
        train_translator.main()
    plain, traced = (torch.load(tmp_path / out / "checkpoint.pt", weights_only=True)["state"] for out in ("plain", "compiled"))
    torch.testing.assert_close(plain["G"], traced["G"], rtol=1e-2, atol=1e-3)
    assert plain.keys() == traced.keys() and models.load_network(tmp_path / "compiled" / "weights.pt").width == 128
