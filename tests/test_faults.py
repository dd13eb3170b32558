"""What a run survives: stops after any step, kills while files are written, full disks, a second process, divergence.

Several processes under torchrun are in test_processes.py.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import efficientnet_pytorch
import pytest
import served
import torch
from commands import ROOT, assert_same_outputs, run, script, table
from efficientnet_pytorch import EfficientNet

import adapt_features
import files
import models
import optimization
import runtime
import train_segmenter
import train_translator
import training
import translate_dataset

SMALL = ["--device", "cpu", "--width", 128, "--crop-size", 64]


def stage(kind, pair, segmenter=None):
    """The module and the arguments of a tiny run of a trainer."""
    domains = ["--source", pair / "source", "--target", pair / "target"]
    if kind == "segmenter":
        words = ["--data", pair / "source", "--encoder", "efficientnet-b0", "--encoder-weights", "none"]
        return train_segmenter, [*words, "--freeze-iterations", 2, "--batch-size", 2, *SMALL]
    if kind == "adaptation":
        words = ["--segmenter", segmenter, "--gate", 0, "--head-start", 2, "--batch-size", 2]
        return adapt_features, [*domains, *words, *SMALL]
    method = ["fastcut_l5", "--colour-transfer"] if kind == "colours" else [kind]
    return train_translator, [*domains, "--method", *method, "--base-channels", 4, *SMALL]


def call(monkeypatch, module, words, stop_after=None, signals=("SIGTERM",)):
    """A script's main() in this process, where torch is imported already -> exit status; signals come in a chosen step."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
    log, steps = training.Run.log, []

    def counted(self, *args, **values):
        steps.append(1)
        if len(steps) == stop_after:
            for sign in signals:
                os.kill(os.getpid(), signal.Signals[sign])
        log(self, *args, **values)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "log", counted)
        try:
            runtime.run_script(module.main)
        except SystemExit as end:
            return end.code or 0
    return 0


@pytest.fixture(scope="module")
def segmenter(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "segmenter"
    with pytest.MonkeyPatch.context() as patch:
        module, words = stage("segmenter", pair)
        assert call(patch, module, [*words, "--iterations", 1, "--workers", 0, "--out", out]) == 0
    return out


# --- exact resuming


@pytest.mark.parametrize(
    ("kind", "workers", "precision"),
    [(kind, 0, "fp32") for kind in ("cut", "fastcut", "fastcut_l5", "cyclegan", "segmenter", "adaptation")]
    + [
        ("colours", 2, "fp32"),
        ("cut", 2, "fp32"),
        ("segmenter", 2, "bf16"),
        ("cyclegan", 0, "bf16"),
        ("adaptation", 0, "bf16"),
    ],
)
def test_a_run_stopped_after_every_step_ends_as_one_never_stopped(
    pair, segmenter, tmp_path, monkeypatch, kind, workers, precision
):
    monkeypatch.setattr(train_translator, "POOL_SIZE", 2)  # so that CycleGAN's pool gives older images back
    module, words = stage(kind, pair, segmenter)
    words += ["--iterations", 6, "--log-every", 2, "--save-every", 4, "--precision", precision]
    assert call(monkeypatch, module, [*words, "--workers", 0, "--out", tmp_path / "a"]) == 0
    stops = 0
    while (status := call(monkeypatch, module, [*words, "--workers", workers, "--out", tmp_path / "b"], stop_after=1)) == 143:
        stops += 1
    assert (status, stops) == (0, 5)  # the sixth step is the last: it finishes
    assert_same_outputs(tmp_path / "a", tmp_path / "b")
    assert not list(tmp_path.rglob(".*.part"))


def test_a_segmenter_resumes_without_the_weights_that_its_encoder_started_from(pair, tmp_path, monkeypatch):
    weights = tmp_path / "b0.pth"
    torch.save(EfficientNet.from_name("efficientnet-b0").state_dict(), weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    weights = weights.rename(tmp_path / f"b0-{digest}.pth")
    monkeypatch.setitem(efficientnet_pytorch.utils.url_map, "efficientnet-b0", weights.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    module, words = stage("segmenter", pair)
    words[words.index("none")] = "imagenet"
    words += ["--iterations", 2, "--workers", 0]
    assert call(monkeypatch, module, [*words, "--out", tmp_path / "a"]) == 0
    assert call(monkeypatch, module, [*words, "--out", tmp_path / "b"], stop_after=1) == 143
    weights.unlink()
    shutil.rmtree(tmp_path / "home")
    assert call(monkeypatch, module, [*words, "--out", tmp_path / "c"]) == 2
    assert call(monkeypatch, module, [*words, "--out", tmp_path / "b"]) == 0
    assert_same_outputs(tmp_path / "a", tmp_path / "b")


def test_a_run_that_does_not_know_a_flag_was_started_without_it(pair, tmp_path, monkeypatch, capsys):
    module, words = stage("fastcut_l5", pair)
    words += ["--iterations", 1, "--workers", 0, "--out", tmp_path]
    assert call(monkeypatch, module, words) == 0
    saved = files.read_json(tmp_path / "args.json")
    assert saved.pop("colour_transfer") is False  # as in runs of version 0.1
    files.write_json(tmp_path / "args.json", saved)
    assert call(monkeypatch, module, words) == 0
    assert call(monkeypatch, module, [*words, "--colour-transfer"]) == 2
    assert "--colour-transfer (was None, is now True)" in capsys.readouterr().err


# D_feat's rate alone does not fall.
@pytest.mark.parametrize(
    ("kind", "falling", "constant"),
    [
        ("cut", ["opt_G", "opt_D"], []),
        ("segmenter", ["optimizer"], []),
        ("adaptation", ["opt_segmenter"], ["opt_discriminator"]),
    ],
)
def test_each_steps_learning_rate_is_the_optimisers_and_the_logs(
    pair, segmenter, tmp_path, monkeypatch, kind, falling, constant
):
    module, words = stage(kind, pair, segmenter)
    words += ["--iterations", 4, "--log-every", 1, "--workers", 0, "--lr", 1e-4, "--out", tmp_path]
    words += ["--head-start", 0] if kind == "adaptation" else []
    rate = train_segmenter.learning_rate if kind == "segmenter" else optimization.constant_then_linear
    for done in range(1, 5):
        call(monkeypatch, module, words, stop_after=1)
        expected = [rate(i, 4, 1e-4) for i in range(done)]
        assert [float(row["lr"]) for row in table(tmp_path / "log.csv")] == pytest.approx(expected)
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]
        rates = {name: [group["lr"] for group in state[name]["param_groups"]] for name in falling + constant}
        assert rates == dict.fromkeys(falling, expected[-1:]) | dict.fromkeys(constant, [1e-4])
    assert expected[-1] < 1e-4


under_nohup = pytest.mark.skipif(
    signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, reason="nohup: SIGHUP is ignored on purpose"
)


@pytest.mark.parametrize(
    ("sign", "status"), [("SIGTERM", 143), ("SIGINT", 130), pytest.param("SIGHUP", 129, marks=under_nohup)]
)
def test_a_signal_finishes_the_step_and_saves(pair, tmp_path, watched, sign, status):
    module, words = stage("cut", pair)
    words = [*words, "--iterations", 50, "--log-every", 1, "--workers", 2, "--out", tmp_path / "a"]
    stopped = script("train_translator.py", *words, **watched, KILL_AT=f"{sign} log.csv 3")  # to the workers as well
    assert stopped.returncode == status and "Traceback" not in stopped.stderr, stopped.stderr
    assert torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["iteration"] == 3


def test_a_second_signal_does_not_cut_the_first_ones_work_short(pair, tmp_path, monkeypatch):
    """A process group has it once from the shell, and once more from run_all.sh or torchrun, which pass it on."""
    module, words = stage("cut", pair)
    words += ["--iterations", 5, "--workers", 0, "--out", tmp_path / "a"]
    write_whole = files.write_whole

    def interrupted(path, content):
        if path.name == "checkpoint.pt":
            os.kill(os.getpid(), signal.SIGTERM)
        write_whole(path, content)

    monkeypatch.setattr(files, "write_whole", interrupted)
    assert call(monkeypatch, module, words, stop_after=2, signals=("SIGTERM", "SIGTERM")) == 143
    assert torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["iteration"] == 2


def test_the_encoder_is_frozen_for_as_long_as_the_flag_says(pair, segmenter, tmp_path, monkeypatch):
    module, words = stage("segmenter", pair)
    words += ["--workers", 0, "--out"]
    assert call(monkeypatch, module, [*words, tmp_path / "a", "--iterations", 2]) == 0  # as long as --freeze-iterations
    assert call(monkeypatch, module, [*words, tmp_path / "b", "--iterations", 3]) == 0
    torch.manual_seed(0)  # --seed
    fresh = models.UNet(encoder="efficientnet-b0").encoder.state_dict()
    for out, same in (("a", True), ("b", False)):
        trained = models.load_network(tmp_path / out / "weights.pt").encoder.state_dict()
        assert all(torch.equal(trained[name], fresh[name]) for name in fresh) == same


# --- kills


def test_a_run_survives_kills_while_it_writes(pair, tmp_path, watched):
    _, words = stage("cyclegan", pair)
    words += ["--iterations", 6, "--log-every", 1, "--save-every", 2, "--workers", 0]
    assert script("train_translator.py", *words, "--out", tmp_path / "a").returncode == 0
    words += ["--out", tmp_path / "b"]
    for kill, status in (("SIGKILL checkpoint.pt 2", -9), ("SIGTERM log.csv 1", 143), ("SIGINT 0000004.png 1", 130)):
        assert script("train_translator.py", *words, **watched, KILL_AT=kill).returncode == status
    assert script("train_translator.py", *words, **watched, KILL_AT="SIGKILL weights.pt 1").returncode == -9
    assert list((tmp_path / "b").glob(".weights.pt.*.part"))
    assert script("train_translator.py", *words).returncode == 0
    assert_same_outputs(tmp_path / "a", tmp_path / "b")


def test_run_all_passes_a_signal_on(pair, tmp_path):
    settings = {"SOURCE": str(pair / "source"), "TARGET": str(pair / "target"), "OUT": str(tmp_path / "out")}
    settings |= {"PYTHON": str(served.python()), "METHODS": "cut", "FID_WEIGHTS": "random", "CUDA_VISIBLE_DEVICES": ""}
    small = "--batch-size 2 --crop-size 64 --width 128 --workers 0 --log-every 1"
    settings |= {"TRANSLATOR_ARGS": f"--base-channels 4 {small}", "ADAPT_ARGS": small}
    settings |= {"SEGMENTER_ARGS": f"--encoder efficientnet-b0 --encoder-weights none {small}"}
    command = ["bash", str(ROOT / "run_all.sh")]
    process = subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "segmenters" / "source_only" / "log.csv"
    while process.poll() is None and not log.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # to the shell alone
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 143, stderr
    saved = torch.load(log.with_name("checkpoint.pt"), weights_only=True)
    assert saved["iteration"] >= 1  # the trainer had the signal, and saved; its paper's 120,000 steps are far
    files.lock(log.parent).close()  # and is gone


# --- a full disk, a folder that cannot be written, no memory


def limited(kibibytes, name, *words):
    """A script that may write no file larger than that, as on a disk that is full."""
    return run("bash", "-c", f'ulimit -f {kibibytes}; exec "$@"', "bash", sys.executable, ROOT / name, *words)


def messages(stderr):
    """Lines but for progress bars and what a script says as it starts."""
    lines = stderr.replace("\r", "\n").splitlines()
    return [line for line in lines if line and not any(words in line for words in ("%|", "it/s", ": CPU, "))]


def assert_one_line(result, *said, status=2):
    """The last line says it, and there is nothing after the progress bars but that line."""
    lines = messages(result.stderr)
    assert result.returncode == status and len(lines) == 1, result.stderr
    assert all(word in lines[0] for word in said), lines[0]


def test_a_full_disk_costs_no_work(pair, tmp_path):
    _, words = stage("cut", pair)
    words += ["--iterations", 6, "--save-every", 1, "--workers", 0]
    assert script("train_translator.py", *words, "--out", tmp_path / "a").returncode == 0
    stopped = [*words, "--out", tmp_path / "b"]
    full = limited(64, "train_translator.py", *stopped)
    needed = (tmp_path / "a" / "checkpoint.pt").stat().st_size
    assert_one_line(full, "checkpoint.pt", "File too large")
    assert needed > 2**20 and not list((tmp_path / "b").glob("*checkpoint*"))
    assert script("train_translator.py", *stopped).returncode == 0
    assert_same_outputs(tmp_path / "a", tmp_path / "b")


def test_a_disk_that_fills_up_keeps_the_last_checkpoint_and_all_frames(pair, tmp_path, monkeypatch):
    module, words = stage("cut", pair)
    words += ["--iterations", 4, "--save-every", 1, "--workers", 0, "--out", tmp_path / "run"]
    assert call(monkeypatch, module, words, stop_after=2) == 143
    assert limited(64, "train_translator.py", *words).returncode == 2
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["iteration"] == 2
    assert call(monkeypatch, module, words) == 0

    words = ["--source", pair / "source", "--translator", tmp_path / "run", "--workers", 0, "--device", "cpu"]
    for name in "ab":
        assert call(monkeypatch, translate_dataset, [*words, "--out", tmp_path / name]) == 0
    lost = sorted((tmp_path / "b" / "images").iterdir())[2]
    lost.unlink()
    full = limited(4, "translate_dataset.py", *words, "--out", tmp_path / "b")
    assert_one_line(full, lost.stem, "File too large")
    assert call(monkeypatch, translate_dataset, [*words, "--out", tmp_path / "b"]) == 0
    assert_same_outputs(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("left", ["weights.pt", "checkpoint.pt"])
def test_a_run_that_does_not_say_how_it_was_made_is_refused(pair, segmenter, tmp_path, monkeypatch, capsys, left):
    """Nor is a foreign weights.pt taken for a finished run."""
    (tmp_path / "run").mkdir()
    shutil.copy(segmenter / left, tmp_path / "run")
    module, words = stage("segmenter", pair)
    assert call(monkeypatch, module, [*words, "--iterations", 3, "--workers", 0, "--out", tmp_path / "run"]) == 2
    assert f"run: holds {left}, but no args.json" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [left]


def test_what_another_run_is_writing_below_the_cache_is_left_alone(tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    writing, killed = tmp_path / "runs" / "a" / f".checkpoint.pt.1{files.PART}", tmp_path / "runs" / f".x.png.1{files.PART}"
    for path in (writing, killed):
        path.touch()
    files.open_cache(tmp_path / "runs")
    assert writing.exists() and not killed.exists()


def test_a_run_without_its_log_can_be_finished(pair, segmenter, tmp_path, monkeypatch):
    shutil.copytree(segmenter, tmp_path / "run")
    for name in ("log.csv", "weights.pt"):
        (tmp_path / "run" / name).unlink()
    module, words = stage("segmenter", pair)
    assert call(monkeypatch, module, [*words, "--iterations", 1, "--workers", 0, "--out", tmp_path / "run"]) == 0
    assert (tmp_path / "run" / "weights.pt").read_bytes() == (segmenter / "weights.pt").read_bytes()


def test_what_cannot_be_written_is_named(pair, monkeypatch, capsys):
    module, words = stage("cut", pair)
    assert call(monkeypatch, module, [*words, "--out", "/proc/clada"]) == 2  # not even root can
    assert "/proc/clada" in capsys.readouterr().err


def test_too_little_memory_is_said_with_the_flags_that_reduce_it(pair, tmp_path, monkeypatch, capsys):
    module, words = stage("cut", pair)
    words[words.index("--base-channels") + 1] = 100_000
    assert call(monkeypatch, module, [*words, "--out", tmp_path / "a"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--batch-size" in err and "--base-channels" in err
    assert not (tmp_path / "a").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    files.write_whole(tmp_path / "x", b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"x'") as error:
        files.write_whole(tmp_path / "x", b"newer")
    assert "5 bytes are needed" in str(error.value)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


# --- two at once


def test_the_second_process_refuses_and_names_the_first(pair, tmp_path, monkeypatch, capsys):
    module, words = stage("cut", pair)
    words += ["--iterations", 1, "--workers", 0, "--out", tmp_path / "a"]
    code = f"import files, time; held = files.lock({str(tmp_path / 'a')!r}); print('held', flush=True); time.sleep(600)"
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    assert call(monkeypatch, module, words) == 2
    assert f"process {first.pid} on " in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "a").iterdir()] == [".lock"]
    first.kill()
    first.wait()
    assert call(monkeypatch, module, words) == 0  # a dead process's lock is none


# --- other arguments


@pytest.fixture
def started(pair, tmp_path, monkeypatch):
    """A translator's run, stopped after its first step."""
    module, words = stage("cut", pair)
    words += ["--iterations", 3, "--precision", "fp32", "--workers", 0, "--out", tmp_path / "run"]
    assert call(monkeypatch, module, words, stop_after=1) == 143
    return words


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--iterations", 4),
        ("--precision", "bf16"),
        ("--seed", 1),
        ("--lr", 1e-3),
        ("--batch-size", 2),
        ("--crop-size", "48x64"),
        ("--method", "fastcut"),
        ("--num-patches", 7),
        ("--base-channels", 5),
        ("--gan-loss", "vanilla"),
    ],
)
def test_arguments_that_change_the_result_are_refused(started, monkeypatch, capsys, flag, value):
    assert call(monkeypatch, train_translator, [*started, flag, value]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert f"{flag} (was " in err and "is now" in err and "delete this one" in err


def test_all_changed_arguments_are_listed(started, monkeypatch, capsys):
    assert call(monkeypatch, train_translator, [*started, "--lr", 1, "--seed", 5]) == 2
    err = capsys.readouterr().err
    assert "--lr (was 0.0002, is now 1.0), --seed (was 0, is now 5)" in err


def test_arguments_that_do_not_matter_may_change(started, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    started[started.index("--source") + 1] = os.path.relpath(started[started.index("--source") + 1])  # spelt in another way
    words = [*started, "--workers", 1, "--log-every", 1, "--save-every", 1, "--device", "auto", "--cache", tmp_path / "kept"]
    assert call(monkeypatch, train_translator, words) == 0
    assert list((tmp_path / "kept").glob("*.png"))


def test_other_data_are_refused(started, pair, monkeypatch, capsys, tmp_path):
    (tmp_path / "names").write_text("00001\n")
    assert call(monkeypatch, train_translator, [*started, "--exclude", tmp_path / "names"]) == 2
    assert "frames of --source (was 4 frames, " in capsys.readouterr().err


def test_a_repaired_file_does_not_end_an_unfinished_run(pair, tmp_path, monkeypatch, caplog):
    shutil.copytree(pair / "source", tmp_path / "s")
    module, words = stage("cut", pair)
    words[words.index("--source") + 1] = tmp_path / "s"
    words += ["--iterations", 2, "--workers", 0, "--out", tmp_path / "run"]
    assert call(monkeypatch, module, words, stop_after=1) == 143
    with open(tmp_path / "s" / "images" / "00001.png", "ab") as file:
        file.write(b"more")
    assert call(monkeypatch, module, words) == 0
    assert "content of --source has changed" in caplog.text and "--target" not in caplog.text


def test_a_run_of_another_stage_is_refused(started, pair, monkeypatch, capsys, tmp_path):
    module, words = stage("segmenter", pair)
    assert call(monkeypatch, module, [*words, "--out", tmp_path / "run"]) == 2
    assert "the script (was train_translator.py, is now train_segmenter.py)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    ["cut short", "no checkpoint", "another network", "another stage", "log", "iteration", "moments"],
)
def test_a_checkpoint_that_does_not_fit_is_named(started, segmenter, monkeypatch, capsys, tmp_path, damage):
    path = tmp_path / "run" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "no checkpoint":
        path.write_text("text")
    elif damage == "another network":
        saved["state"]["G"] = models.ResnetGenerator(base_channels=5).state_dict()
        torch.save(saved, path)
    elif damage == "another stage":
        path.write_bytes((segmenter / "checkpoint.pt").read_bytes())
    elif damage == "log":
        (tmp_path / "run" / "log.csv").write_text("iteration,G\nmany,0\n")
    else:
        if damage == "moments":
            saved["state"]["opt_G"]["state"][0]["exp_avg"] = torch.zeros(3)
        else:
            saved["iteration"] = "x"
        torch.save(saved, path)
    before = path.read_bytes()
    assert call(monkeypatch, train_translator, started) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "checkpoint.pt: not a checkpoint of this run" in err and "delete" in err
    assert path.read_bytes() == before


@pytest.fixture
def translator(pair, tmp_path, monkeypatch):
    module, words = stage("cut", pair)
    assert call(monkeypatch, module, [*words, "--iterations", 1, "--workers", 0, "--out", tmp_path / "translator"]) == 0
    return ["--translator", tmp_path / "translator", "--workers", 0, "--device", "cpu"]


def test_translation_does_not_touch_a_folder_that_is_not_its_own(pair, translator, tmp_path, monkeypatch, capsys):
    shutil.copytree(pair / "source", tmp_path / "mine")
    words = ["--source", pair / "source", *translator, "--out", tmp_path / "mine"]
    assert call(monkeypatch, translate_dataset, words) == 2
    assert "holds files that are not from this script" in capsys.readouterr().err
    assert len(list((tmp_path / "mine").rglob("*.png"))) == 8


def test_a_translators_weights_that_do_not_fit_leave_nothing(pair, segmenter, tmp_path, monkeypatch, capsys):
    words = ["--source", pair / "source", "--translator", segmenter, "--device", "cpu", "--out", tmp_path / "t"]
    assert call(monkeypatch, translate_dataset, words) == 2
    assert "holds a UNet; a ResnetGenerator is needed" in capsys.readouterr().err and not (tmp_path / "t").exists()


def test_a_lost_label_is_made_again_and_names_lead_nowhere(pair, translator, tmp_path, monkeypatch):
    """Frames with quotes, spaces, newlines and letters of all kinds in their names; what is missing is made again."""
    names = ['it\'s; $(rm -rf x) "q"', "a\nb", "Größe 東", "..x"]
    for part in ("images", "labels"):
        (tmp_path / "s" / part).mkdir(parents=True)
        for name, path in zip(names, sorted((pair / "source" / part).iterdir())):
            shutil.copy(path, tmp_path / "s" / part / f"{name}.png")
    words = ["--source", tmp_path / "s", *translator, "--out", tmp_path / "t"]
    assert call(monkeypatch, translate_dataset, words) == 0
    shutil.copytree(tmp_path / "t", tmp_path / "whole")
    translated = [name for name in names if not name.startswith(".")]  # hidden files are no frames
    assert sorted(p.stem for p in (tmp_path / "t" / "labels").iterdir()) == sorted(translated)
    (tmp_path / "t" / "labels" / f"{names[0]}.png").unlink()
    assert call(monkeypatch, translate_dataset, words) == 0
    assert_same_outputs(tmp_path / "whole", tmp_path / "t")


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_unreadable_on_the_way_keep_the_last_checkpoint(pair, tmp_path, monkeypatch, capsys, workers):
    shutil.copytree(pair / "source", tmp_path / "s")
    module, words = stage("cut", pair)
    words[words.index("--source") + 1] = tmp_path / "s"
    words += ["--iterations", 12, "--save-every", 1, "--workers", workers, "--out", tmp_path / "run"]
    assert call(monkeypatch, module, words, stop_after=1) == 143
    bad = tmp_path / "s" / "images" / "00002.png"
    bad.write_bytes(bad.read_bytes()[:3000])  # its header is whole
    assert call(monkeypatch, module, words) == 2
    err = messages(capsys.readouterr().err)
    assert len(err) == 1 and f"{bad}: damaged image" in err[0]
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["iteration"] >= 1


# --- divergence


def test_a_diverged_run_stops_and_is_not_saved(pair, tmp_path, monkeypatch, capsys):
    module, words = stage("cut", pair)
    words += ["--iterations", 8, "--save-every", 1, "--lr", 1e30, "--workers", 0, "--out", tmp_path / "a"]
    assert call(monkeypatch, module, words) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert "diverged before iteration" in err and "not finite" in err and "--lr" in err
    if (tmp_path / "a" / "checkpoint.pt").exists():
        saved = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)
        assert optimization.not_finite(saved["state"]) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["parameter", "optimizer"])
def test_a_state_that_is_not_finite_is_never_saved(pair, tmp_path, monkeypatch, capsys, bad, part):
    """Though the losses are: one weight, or one of Adam's moments."""
    module, words = stage("cut", pair)
    words += ["--iterations", 4, "--save-every", 1, "--workers", 0, "--out", tmp_path / "a"]
    step = train_translator.ContrastiveTranslation.step

    def poisoned(self, *batch):
        result = step(self, *batch)
        if self.opt_D.state[self.D.layers[0].weight]["step"] == 3:
            tensor = self.H.heads[4][2].weight if part == "parameter" else self.opt_D.state[self.D.layers[0].bias]["exp_avg"]
            tensor.data.view(-1)[-1] = bad
        return result

    monkeypatch.setattr(train_translator.ContrastiveTranslation, "step", poisoned)
    assert call(monkeypatch, module, words) == 1
    name = "H.heads.4.2.weight" if part == "parameter" else "opt_D.state.1.exp_avg"
    assert f"{name} not finite" in capsys.readouterr().err.splitlines()[-1]
    assert torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["iteration"] == 2


def test_not_finite_names_the_tensors():
    state = {"a": {"w": torch.ones(3), "n": torch.tensor([2**60]), "empty": torch.zeros(0)}, "b": [torch.tensor(1e38).half()]}
    assert optimization.not_finite(state) == ["b.0"]  # half precision ends at 65,504
    state["a"]["w"][1] = float("nan")
    assert optimization.not_finite(state) == ["a.w", "b.0"]
    assert optimization.not_finite({"a": torch.tensor([3e38, -3e38]), "b": 5, "c": "nan"}) == []


# --- flags


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--iterations", "0"),
        ("--iterations", str(10**20)),
        ("--iterations", "1.5"),
        ("--batch-size", "-1"),
        ("--crop-size", "0"),
        ("--crop-size", "64x"),
        ("--crop-size", "64x200"),  # wider than --width 128
        ("--width", "0"),
        ("--lr", "nan"),
        ("--lr", "0"),
        ("--lr", "-1"),
        ("--lr", "inf"),
        ("--workers", "-1"),
        ("--workers", "100000"),
        ("--seed", "-1"),
        ("--seed", str(2**64)),
        ("--save-every", "0"),
        ("--log-every", "0"),
        ("--base-channels", "0"),
        ("--num-patches", "0"),
        ("--lambda-x", "-1"),
        ("--precision", "fp8"),
        ("--device", "abacus"),
        ("--target-splits", "nowhere"),
        ("--exclude", "/nowhere"),
    ],
)
def test_nonsense_in_a_flag_is_refused_by_its_name(pair, tmp_path, monkeypatch, capsys, flag, value):
    module, words = stage("cut", pair)
    assert call(monkeypatch, module, [*words, "--out", tmp_path / "a", flag, value]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and (flag in err or value in err) and not (tmp_path / "a").exists()


@pytest.mark.parametrize("inside", ["", "runs/a"])
def test_nothing_is_written_into_a_data_set(pair, tmp_path, monkeypatch, capsys, inside):
    module, words = stage("cut", pair)
    before = sorted(pair.rglob("*"))
    assert call(monkeypatch, module, [*words, "--out", pair / "target" / inside]) == 2
    assert "which is only read" in capsys.readouterr().err and sorted(pair.rglob("*")) == before
    assert call(monkeypatch, module, [*words, "--out", tmp_path / "a", "--cache", pair / "target" / inside]) == 2
    assert "--cache" in capsys.readouterr().err and sorted(pair.rglob("*")) == before
    assert call(monkeypatch, module, [*words, "--out", tmp_path / "a", "--cache", __file__]) == 2
    assert capsys.readouterr().err.endswith(f"--cache {__file__}: is a file; give a folder\n")


# --- by hand: minutes


STAGES = ("demo", "cut", "cyclegan", "segmenter", "adaptation", "translate", "run_all")


@pytest.mark.slow
@pytest.mark.parametrize("kind", STAGES)
def test_twenty_kills_at_random_moments(pair, segmenter, tmp_path, kind):
    """Each stage in a process group of its own, which is killed and started again until it is done; then the next round."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    many = ["--iterations", 60, "--log-every", 1, "--save-every", 1, "--workers", 1]
    if kind == "demo":
        command = [ROOT / "demo/make_demo_data.py", "--seed", 3, "--source-count", 120, "--target-count", 80, "--val-count", 40]
    elif kind == "translate":
        module, words = stage("cut", pair)
        words = [*words, "--iterations", 1, "--workers", 0, "--width", 1400, "--out", tmp_path / "translator"]
        assert script("train_translator.py", *words).returncode == 0
        command = [ROOT / "translate_dataset.py", "--source", pair / "source", "--translator", tmp_path / "translator"]
    elif kind == "run_all":
        small = "--batch-size 2 --crop-size 64 --width 128 --workers 0 --log-every 1 --save-every 1"
        environment |= {"SOURCE": str(pair / "source"), "TARGET": str(pair / "target"), "PYTHON": sys.executable}
        environment |= {"METHODS": "fastcut_l5", "FID_WEIGHTS": "random", "ITERATIONS_SCALE": "0.00001"}
        environment |= {"TRANSLATOR_ARGS": f"--base-channels 4 {small}", "ADAPT_ARGS": small}
        environment |= {"SEGMENTER_ARGS": f"--encoder efficientnet-b0 --encoder-weights none {small}"}
        command = [ROOT / "run_all.sh"]
    else:
        module, words = stage(kind, pair, segmenter)
        command = [f"{module.__file__}", *words, *many]
    command = ["bash" if kind == "run_all" else sys.executable, *map(str, command)]

    def started(out):
        words = {"demo": [str(out)], "run_all": []}.get(kind, ["--out", str(out)])
        here = environment | ({"OUT": str(out)} if kind == "run_all" else {})
        return subprocess.Popen(
            [*command, *words], env=here, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    began, whole = time.monotonic(), started(tmp_path / "whole")
    stderr = whole.communicate()[1]
    assert whole.returncode == 0, stderr
    chance, kills, rounds = random.Random(0), 0, 0
    # Seconds: least, most, likeliest. What is started again must first pass what is done: run_all.sh starts two dozen scripts.
    moments = (10, 1.4 * (time.monotonic() - began), 10) if kind == "run_all" else (4, 12, 8)
    while kills < 20:
        out, rounds = tmp_path / f"round{rounds}", rounds + 1
        while True:
            process = started(out)
            try:
                stderr = process.communicate(timeout=chance.triangular(*moments))[1]
                assert process.returncode == 0, stderr
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
                process.communicate()
                kills += 1
        assert_same_outputs(tmp_path / "whole", out)
        assert not list(out.rglob(".*.part"))
    print(f"{kind}: {kills} kills in {rounds} rounds survived")


@pytest.mark.slow
def test_two_thousand_steps_grow_nothing_but_the_log(pair, tmp_path):
    _, words = stage("cyclegan", pair)
    words += ["--iterations", 2000, "--log-every", 10, "--save-every", 200, "--workers", 1, "--out", tmp_path / "a"]
    command = [sys.executable, str(ROOT / "train_translator.py"), *map(str, words)]
    process, seen = subprocess.Popen(command, stderr=subprocess.DEVNULL), []
    while process.poll() is None:
        rows = (tmp_path / "a" / "log.csv").read_text().count("\n") if (tmp_path / "a" / "log.csv").exists() else 0
        status = open(f"/proc/{process.pid}/status").read()
        if rows > 40 and "VmRSS" in status:  # 400 steps: CycleGAN's pool is full
            memory = int(status.split("VmRSS:")[1].split()[0])
            seen.append((memory, len(os.listdir(f"/proc/{process.pid}/fd")), sorted(os.listdir(tmp_path / "a"))))
        time.sleep(0.5)
    assert process.returncode == 0 and len(seen) > 10
    memory, handles, names = zip(*seen[:-1])
    print(f"resident set {min(memory) / 1024:.0f} to {max(memory) / 1024:.0f} MiB, {min(handles)} to {max(handles)} open files")
    names = [{name for name in listed if not name.endswith(".part")} for listed in names]
    assert all(listed - {"summary.json", "weights.pt"} == names[0] for listed in names), names[-1]  # which the end leaves
    assert max(memory) < 1.05 * memory[0] and max(handles) <= handles[0] + 4  # a file being written
