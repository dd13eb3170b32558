"""What public bug reports of this trade are about, tried as a user meets it: in processes of their own, with default workers.

One section per kind of report: what hangs, what is silently wrong, what is lost, and what a message leaves out.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import served
import torch
from commands import ROOT, run, script, torchrun
from PIL import Image

import data
import files
import models

SMALL = ["--device", "cpu", "--width", 128, "--crop-size", 64]
NETWORK = ["--encoder", "efficientnet-b0", "--encoder-weights", "none"]
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(pair, tmp_path_factory):
    """A finished translator and segmenter, of a step each."""
    out = tmp_path_factory.mktemp("runs")
    for name, words in trainers(pair, out).items():
        if name != "adapt_features.py":
            result = script(name, *words, "--iterations", 1, "--workers", 0)
            assert result.returncode == 0, result.stderr
    return out


def trainers(pair, out):
    domains = ["--source", pair / "source", "--target", pair / "target"]
    return {
        "train_translator.py": [*domains, "--method", "cut", "--base-channels", 4, *SMALL, "--out", out / "translator"],
        "train_segmenter.py": ["--data", pair / "source", *NETWORK, "--batch-size", 2, *SMALL, "--out", out / "segmenter"],
        "adapt_features.py": [*domains, "--segmenter", out / "segmenter", "--batch-size", 2, *SMALL, "--out", out / "clada"],
    }


def commands(pair, runs, out):
    """Every script that reads frames, on a pair of domains."""
    given = {name: [*words, "--iterations", 40] for name, words in trainers(pair, out).items()}
    given["adapt_features.py"][5] = runs / "segmenter"
    given["translate_dataset.py"] = ["--source", pair / "source", "--translator", runs / "translator", "--out", out / "set"]
    given["evaluate.py"] = ["--segmenter", runs / "segmenter", "--data", pair / "source", "--out", out / "t.csv"]
    given["fid.py"] = [pair / "source" / "images", pair / "target" / "leftImg8bit", "--weights", "random", "--dims", 64]
    for name in ("translate_dataset.py", "evaluate.py", "fid.py"):
        given[name] += ["--device", "cpu"]
    return given


def last_line(result):
    return result.stderr.replace("\r", "\n").splitlines()[-1]


SCRIPTS = [
    "train_translator.py",
    "train_segmenter.py",
    "adapt_features.py",
    "translate_dataset.py",
    "evaluate.py",
    "fid.py",
]

# --- A. an error while other processes live


@pytest.fixture(scope="module")
def damaged(pair, tmp_path_factory):
    """A pair of domains of which one image is cut in half, its header whole."""
    out = tmp_path_factory.mktemp("damaged") / "d"
    shutil.copytree(pair, out)
    bad = out / "source" / "images" / "00002.png"
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    return out


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_damaged_frame_ends_every_script_within_seconds(damaged, runs, tmp_path, name):
    began = time.monotonic()
    result = script(name, *commands(damaged, runs, tmp_path)[name])
    assert result.returncode == 2 and "00002.png: " in last_line(result) and "truncated" in last_line(result)
    assert time.monotonic() - began < 60 and "Traceback" not in result.stderr


def test_a_half_translated_data_set_is_not_trained_on(damaged, pair, runs, tmp_path):
    """As in a list of commands that goes on after stage 2 has failed."""
    shutil.copytree(damaged, tmp_path / "d")
    translate = [commands(tmp_path / "d", runs, tmp_path)["translate_dataset.py"], "--batch-size", 1]
    translate = ["translate_dataset.py", *translate[0], *translate[1:]]
    train = ["train_segmenter.py", *trainers(pair, tmp_path)["train_segmenter.py"], "--data", tmp_path / "set", "--check"]
    assert script(*translate).returncode == 2 and len(list((tmp_path / "set" / "images").iterdir())) > 0
    result = script(*train)
    assert result.returncode == 2 and "translate_dataset.py has not finished it" in last_line(result)
    shutil.copy(pair / "source" / "images" / "00002.png", tmp_path / "d" / "source" / "images")
    assert script(*translate).returncode == 0 and script(*train).returncode == 0


def test_a_run_that_another_process_has_trained_meanwhile_is_refused(pair, tmp_path):
    driver = """
        import files, runtime, train_segmenter

        def late(folder, lock=files.lock):
            files.write_json(folder / "args.json", {"lr": 0.5})
            return lock(folder)

        files.lock = late
        runtime.run_script(train_segmenter.main)
    """
    (tmp_path / "driver.py").write_text(textwrap.dedent(driver))
    (tmp_path / "segmenter").mkdir()
    words = [*trainers(pair, tmp_path)["train_segmenter.py"], "--out", tmp_path / "segmenter", "--iterations", 1]
    result = run(sys.executable, tmp_path / "driver.py", *words, PYTHONPATH=str(ROOT))
    assert result.returncode == 2 and "another process has trained there" in last_line(result)
    assert json.loads((tmp_path / "segmenter" / "args.json").read_text()) == {"lr": 0.5}


def test_a_label_with_unknown_ids_ends_training_within_seconds(pair, runs, tmp_path):
    shutil.copytree(pair / "source", tmp_path / "d" / "source")
    bad = tmp_path / "d" / "source" / "labels" / "00003.png"
    Image.fromarray(np.full((72, 144), 200, np.uint8)).save(bad)
    result = script("train_segmenter.py", *trainers(tmp_path / "d", tmp_path)["train_segmenter.py"], "--iterations", 40)
    assert result.returncode == 2 and "00003.png: label ids [200]" in last_line(result)


@pytest.mark.parametrize("name", ["train_translator.py", "evaluate.py"])
def test_a_damaged_frame_ends_all_processes_of_a_run(damaged, runs, tmp_path, name):
    began = time.monotonic()
    result = torchrun(ROOT / name, *commands(damaged, runs, tmp_path)[name], OMP_NUM_THREADS="1")
    assert result.returncode == 1 and "truncated" in result.stderr and time.monotonic() - began < 90


def test_a_damaged_frame_ends_run_all(damaged, tmp_path):
    small = "--device cpu --width 128 --batch-size 1 --crop-size 64"
    settings = {"SOURCE": damaged / "source", "TARGET": damaged / "target", "OUT": tmp_path, "PYTHON": str(served.python())}
    settings |= {"METHODS": "cut", "FID_WEIGHTS": "random", "TRANSLATOR_ARGS": f"--base-channels 4 {small}"}
    settings |= {"SEGMENTER_ARGS": f"--encoder efficientnet-b0 --encoder-weights none {small}", "ADAPT_ARGS": small}
    result = run("bash", ROOT / "run_all.sh", **{name: str(value) for name, value in settings.items()})
    assert result.returncode == 2 and "00002.png: damaged image" in last_line(result)


@pytest.mark.parametrize("batch", [1, 64])
def test_a_reading_process_that_is_killed_is_said(pair, tmp_path, batch):
    """Also one that was writing a batch larger than its pipe holds, for whose end one would wait for ever; with CUDA, the
    loader's destructor would, which is simulated here. With forkserver, Python 3.14's default, the death would go unnoticed."""
    driver = """
        import multiprocessing, time, torch.utils.data.dataloader as loader, train_translator, runtime

        multiprocessing.set_start_method("forkserver")

        def wait(self):
            time.sleep(0 if loader._utils.python_exit_status else 1000)

        loader._MultiProcessingDataLoaderIter._shutdown_workers = wait
        runtime.run_script(train_translator.main)
    """
    (tmp_path / "driver.py").write_text(textwrap.dedent(driver))
    words = [*trainers(pair, tmp_path)["train_translator.py"], "--batch-size", batch, "--log-every", 1]
    command = [sys.executable, tmp_path / "driver.py", *words, "--iterations", 100_000, "--workers", 2]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, env=environment)
    children = []
    while not (tmp_path / "translator" / "log.csv").exists() and process.poll() is None:
        time.sleep(0.1)
    children = subprocess.run(
        ["pgrep", "-f", "-P", str(process.pid), "driver.py"], capture_output=True, text=True, check=True
    ).stdout.split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 1, stderr
    assert "a worker process that reads images was killed" in stderr.splitlines()[-1] and "--workers" in stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["train_translator.py", "fid.py"])
def test_a_script_that_is_killed_leaves_no_process(pair, runs, tmp_path, name):
    """Though its workers may be writing to it."""
    words = [100_000 if word == 40 else word for word in commands(pair, runs, tmp_path)[name]]
    process = subprocess.Popen([sys.executable, str(ROOT / name), *map(str, words)], stderr=subprocess.DEVNULL)
    children = []
    while not children and process.poll() is None:
        listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout.split()
        children = listed if len(listed) > 1 or name == "fid.py" else []
        time.sleep(0.02)
    time.sleep(0.5)
    process.kill()
    process.wait()
    time.sleep(1)
    assert not [child for child in children if Path(f"/proc/{child}/exe").exists()]


@pytest.mark.parametrize("name", ["evaluate.py", pytest.param("translate_dataset.py", marks=SLOW), "fid.py"])
def test_a_signal_ends_what_is_no_trainer_at_once(pair, runs, tmp_path, name):
    words = commands(pair, runs, tmp_path)[name]
    process = subprocess.Popen([sys.executable, str(ROOT / name), *map(str, words)], stderr=subprocess.PIPE, text=True)
    time.sleep(2.5)  # while it starts, or works, or is done
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode in (0, 143, -signal.SIGTERM) and "Traceback" not in stderr, stderr


# --- B. handing batches over


def namespace(*command, before):
    """A command in a namespace of its own, after another."""
    words = ["unshare", "-m", "-u", "bash", "-c", f'{before}; exec "$@"', "bash"]
    if subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces here")
    return run(*words, *command)


@pytest.mark.parametrize("name", [SCRIPTS[0], *(pytest.param(name, marks=SLOW) for name in SCRIPTS[1:5]), SCRIPTS[5]])
def test_a_small_dev_shm_suffices(pair, runs, tmp_path, name):
    words = commands(pair, runs, tmp_path)[name]
    words = [2 if word == 40 else word for word in words]
    small = "mount -t tmpfs -o size=64k shm /dev/shm"
    result = namespace(sys.executable, ROOT / name, *words, "--workers", 2, before=small)
    assert result.returncode == 0, result.stderr


def test_no_room_for_a_semaphore_is_said(pair, tmp_path):
    words = [*trainers(pair, tmp_path)["train_translator.py"], "--iterations", 9, "--workers", 3]
    full = "mount -t tmpfs -o size=16k shm /dev/shm"
    result = namespace(sys.executable, ROOT / "train_translator.py", *words, before=full)
    assert result.returncode == 2 and "/dev/shm is full" in last_line(result) and "--workers 0" in last_line(result)


def test_few_open_files_suffice_or_are_said(pair, runs, tmp_path):
    words = commands(pair, runs, tmp_path)["translate_dataset.py"] + ["--workers", 4]
    for limit, out in ((128, "a"), (18, "b")):
        command = ["bash", "-c", f'ulimit -n {limit}; exec "$@"', "bash", sys.executable, ROOT / "translate_dataset.py", *words]
        result = run(*command, "--out", tmp_path / out)
        assert result.returncode == (0 if limit == 128 else 2) and "Traceback" not in result.stderr, result.stderr
    assert "open files" in last_line(result)


# --- C. what is done already


def test_another_val_split_is_evaluated_anew(pair, runs, tmp_path):
    """A frame more, another label of one, other weights: each time the row is replaced."""
    shutil.copytree(runs / "segmenter", tmp_path / "run")
    shutil.copytree(pair / "target", tmp_path / "data")
    words = ["--segmenter", tmp_path / "run", "--data", tmp_path / "data", "--skip-done"]
    words += ["--device", "cpu"]
    photos, labels = (sorted((tmp_path / "data" / part / "val" / "demo").iterdir()) for part in ("leftImg8bit", "gtFine"))
    hidden = [path.rename(tmp_path / path.name) for path in (photos[1], labels[1])]

    def evaluated():
        result = script("evaluate.py", *words)
        assert result.returncode == 0, result.stderr
        return "already evaluated" not in result.stdout

    assert evaluated() and not evaluated()
    for path, home in zip(hidden, (photos[1].parent, labels[1].parent)):
        path.rename(home / path.name)
    assert evaluated() and not evaluated()
    ids = np.array(Image.open(labels[0]))
    Image.fromarray(np.where(ids == 7, 8, ids).astype(np.uint8)).save(labels[0])
    assert evaluated() and not evaluated()
    network = models.load_network(tmp_path / "run" / "weights.pt")
    network.head.bias.data[3] += 9
    torch.save(models.network_state(network, network.width), tmp_path / "run" / "weights.pt")
    assert evaluated() and not evaluated()
    (tmp_path / "data").rename(tmp_path / "moved")
    words[3] = tmp_path / "moved"
    assert not evaluated()


@pytest.mark.parametrize(
    "name", [pytest.param("train_translator.py", marks=SLOW), "train_segmenter.py", "translate_dataset.py"]
)
def test_a_finished_stage_is_not_done_for_other_data(pair, runs, tmp_path, name):
    shutil.copytree(pair, tmp_path / "d")
    words = [1 if word == 40 else word for word in commands(tmp_path / "d", runs, tmp_path)[name]]
    assert script(name, *words).returncode == 0
    again = script(name, *words)
    assert again.returncode == 0 and "finished" in again.stdout
    source = tmp_path / "d" / "source"
    if name == "train_translator.py":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (72, 144, 3), np.uint8)).save(source / "images" / "00001.png")
    else:
        ids = np.array(Image.open(source / "labels" / "00001.png"))
        Image.fromarray(np.where(ids == 7, 8, ids).astype(np.uint8)).save(source / "labels" / "00001.png")
    changed = script(name, *words)
    assert changed.returncode == 2 and "content" in last_line(changed)


# --- D. labels without classes


def test_evaluating_on_labels_that_are_all_void_is_refused(pair, runs, tmp_path):
    shutil.copytree(pair / "target", tmp_path / "d")
    for path in (tmp_path / "d" / "gtFine" / "val").rglob("*.png"):
        Image.fromarray(np.zeros((72, 144), np.uint8)).save(path)
    words = ["--segmenter", runs / "segmenter", "--data", tmp_path / "d", "--out", tmp_path / "t.csv", "--device", "cpu"]
    result = script("evaluate.py", *words)
    assert result.returncode == 2 and "void" in last_line(result) and not (tmp_path / "t.csv").exists()


# --- F. lists that match nothing


def test_one_list_excludes_in_every_script_and_says_what_matches_nothing(pair, runs, tmp_path):
    (tmp_path / "list").write_text("00001.png\ndemo_000000_000000_leftImg8bit.png\nnowhere\n")
    given = commands(pair, runs, tmp_path)
    for name in ("train_translator.py", "translate_dataset.py"):
        result = script(name, *[1 if word == 40 else word for word in given[name]], "--exclude", tmp_path / "list")
        assert result.returncode == 0 and "1 excluded: 00001" in result.stderr and "match no frame" in result.stderr
        assert "nowhere" in result.stderr
    assert (
        tmp_path / "translator" / "left_out.txt"
    ).read_text() == "--source 00001\texcluded\n--target demo_000000_000000\texcluded\n"
    assert not (tmp_path / "set" / "images" / "00001.png").exists()


# --- G. where a run's inputs lie


def test_data_and_runs_may_move(pair, tmp_path):
    """Half of every stage is done in one place, the other half in another."""
    shutil.copytree(pair, tmp_path / "one" / "data")
    here = tmp_path / "one"
    for name, words in trainers(here / "data", here).items():
        result = script(name, *words, "--iterations", 3, "--workers", 0, "--save-every", 1)
        assert result.returncode == 0, result.stderr
    for run_dir in ("translator", "clada"):
        (here / run_dir / "weights.pt").unlink()
    there = here.rename(tmp_path / "two")
    (there / "data").rename(there / "data2")
    for name, words in trainers(there / "data2", there).items():
        result = script(name, *words, "--iterations", 3, "--workers", 0)
        assert result.returncode == 0, result.stderr
        if name != "train_segmenter.py":
            assert "resuming after 3" in result.stderr
    assert json.loads((there / "segmenter" / "args.json").read_text())["data"] == str(there / "data2" / "source")


def test_weights_of_a_run_may_be_given_for_the_run(pair, runs, tmp_path):
    words = ["--source", pair / "source", "--out", tmp_path / "set", "--device", "cpu"]
    assert script("translate_dataset.py", *words, "--translator", runs / "translator" / "weights.pt").returncode == 0


# --- H. other ways to start


def test_run_all_starts_from_another_shell_and_from_a_spool_folder(tmp_path):
    result = run("sh", ROOT / "run_all.sh", "nonsense", PYTHON=served.python())
    assert result.returncode == 2 and "takes no argument but test" in result.stderr
    shutil.copy(ROOT / "run_all.sh", tmp_path / "slurm_script")
    command = f"cd {ROOT} && bash {tmp_path}/slurm_script nonsense"
    assert "takes no argument but test" in run("bash", "-c", command, PYTHON=served.python()).stderr
    lost = run("bash", "-c", f"cd {tmp_path} && bash slurm_script", PYTHON=served.python())
    assert lost.returncode == 2 and "run it from the repository" in lost.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["slurm_script"]


# --- I. what is computed and cannot be stored


def test_where_a_result_cannot_be_written_is_said_before_the_work(pair, runs, tmp_path):  # for fid.py: in test_fid.py
    words = commands(pair, runs, tmp_path)["evaluate.py"]
    words[words.index("--out") + 1] = "/proc/clada/t.csv"
    result = script("evaluate.py", *words)
    assert result.returncode == 2 and "/proc/clada" in last_line(result) and "%|" not in result.stderr


# --- J. a host name that does not resolve


def test_two_processes_meet_where_the_host_name_does_not_resolve(pair, tmp_path):
    script_words = " ".join(f'"{word}"' for word in trainers(pair, tmp_path)["train_translator.py"])
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2"
    command = f"OMP_NUM_THREADS=1 timeout 120 {launcher} {ROOT}/train_translator.py {script_words} --iterations 2"
    result = namespace("bash", "-c", command, before="hostname nowhere.invalid")
    assert result.returncode == 0, result.stderr
    assert "--local-addr 127.0.0.1" in (ROOT / "run_all.sh").read_text()


# --- L. nobody reads the output any more


def test_training_outlasts_the_reader_of_its_output(pair, tmp_path):
    words = " ".join(f'"{word}"' for word in trainers(pair, tmp_path)["train_translator.py"])
    command = f"{sys.executable} {ROOT}/train_translator.py {words} --iterations 60 --log-every 1"
    command += " 2>&1 | head -c 200 >/dev/null; echo ${PIPESTATUS[0]}"
    result = run("bash", "-c", command, TQDM_MININTERVAL="0.01")
    assert result.stdout == "0\n" and (tmp_path / "translator" / "weights.pt").exists()
    listed = run("bash", "-c", f"{sys.executable} {ROOT}/check_data.py '{pair / 'source'}' --check-data | head -c 1")
    assert "Errno" not in listed.stderr and "Traceback" not in listed.stderr


# --- M. what others left in the environment


@pytest.mark.parametrize("left", [{"RANK": "", "LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": ""}, {"WORLD_SIZE": "4", "RANK": "1"}])
@pytest.mark.parametrize("name", ["train_translator.py", "fid.py"])
def test_variables_that_another_launcher_left_are_ignored(pair, runs, tmp_path, left, name):
    words = [1 if word == 40 else word for word in commands(pair, runs, tmp_path)[name]]
    result = script(name, *words, **left)
    assert result.returncode == 0, result.stderr


# --- N. small ones


def test_no_inodes_are_said(tmp_path):
    before = f"mkdir -p {tmp_path}/d; mount -t tmpfs -o nr_inodes=3 few {tmp_path}/d; touch {tmp_path}/d/a {tmp_path}/d/b"
    code = f"import runtime, files; runtime.run_script(lambda: files.write_whole('{tmp_path}/d/c', b'x'))"
    result = namespace(sys.executable, "-c", code, before=f"{before}; cd {ROOT}")
    assert result.returncode == 2 and "no inodes" in last_line(result)


def test_ctrl_c_ends_check_data_in_silence(pair):
    command = [
        sys.executable,
        "-c",
        "import check_data, data, signal, runtime; data.list_frames = lambda *_: signal.raise_signal(signal.SIGINT);"
        "signal.signal(signal.SIGINT, signal.default_int_handler); runtime.run_script(check_data.main)",
    ]
    result = run(*command, pair / "source", PYTHONPATH=str(ROOT))
    assert result.returncode == 130 and not result.stderr


def test_words_of_a_stage_may_hold_spaces(pair, tmp_path):
    """The quotes of a shell keep them together."""
    settings = {
        "SOURCE": str(pair / "source"),
        "TARGET": str(pair / "target"),
        "OUT": str(tmp_path / "o"),
        "PYTHON": str(served.python()),
    }
    settings |= {"METHODS": "cut", "FID_WEIGHTS": "random", "TRANSLATOR_ARGS": "--target-splits 'no such split'"}
    assert "leftImg8bit/no such split: " in run("bash", ROOT / "run_all.sh", **settings).stderr
    result = run("bash", ROOT / "run_all.sh", **settings | {"TRANSLATOR_ARGS": "--target-splits 'no such split"})
    assert result.returncode == 2 and "quotes" in result.stderr


@pytest.mark.parametrize("flag", ["--out", "--source", "--cache"])
def test_an_empty_path_is_refused(pair, tmp_path, flag):
    words = [*trainers(pair, tmp_path)["train_translator.py"], flag, ""]
    result = script("train_translator.py", *words)
    assert result.returncode == 2 and f"argument {flag}: is empty" in result.stderr


def test_a_crop_that_is_no_size_is_said_in_the_users_terms(pair, tmp_path):
    result = script("train_translator.py", *trainers(pair, tmp_path)["train_translator.py"], "--crop-size", "abc")
    assert result.returncode == 2 and "'abc' is neither N nor HxW" in result.stderr


# --- waits


def test_a_stalled_disk_is_said_with_the_frame_that_is_waited_for(pair, tmp_path):
    code = f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        import data, loading, runtime, train_translator
        loading.PATIENCE = 0.5
        load = data.load_image
        data.load_image = lambda path: time.sleep(2 if "00001" in str(path) else 0) or load(path)
        data.load_at_width.__defaults__ = (data.load_image, None)
        sys.argv[0] = "train_translator.py"
        runtime.run_script(train_translator.main)
    """
    words = [*trainers(pair, tmp_path)["train_translator.py"], "--iterations", 4]
    result = run(sys.executable, "-c", textwrap.dedent(code), *words)
    assert result.returncode == 0 and "nothing was read for" in result.stderr and "00001.png" in result.stderr, result.stderr


def test_who_waits_for_a_lock_says_for_whom(tmp_path):
    held = files.lock(tmp_path)
    code = f"import logging, files; logging.basicConfig(level=20); files.lock({str(tmp_path)!r}, wait=True); print('got')"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    process = subprocess.Popen([sys.executable, "-c", code], **pipes)
    assert f"waiting for process {os.getpid()}" in process.stderr.readline()
    held.close()
    assert process.communicate(timeout=30)[0] == "got\n"


def test_what_a_script_decides_is_said_as_it_starts(pair, runs, tmp_path):
    expected = {
        "train_segmenter.py": "training for 1 steps",
        "translate_dataset.py": "4 frames, 0 already translated",
        "evaluate.py": "4 frames",
    }
    given = commands(pair, runs, tmp_path)
    for name, words in expected.items():
        result = script(name, *[1 if word == 40 else word for word in given[name]])
        (line,) = [line for line in result.stderr.splitlines() if ": CPU, " in line]
        assert words in line and ("fp32" in line or "bf16" in line)
    assert data.list_frames(pair / "source").left_out == {}


def test_a_signal_ends_training_that_waits_for_a_stalled_disk(pair, tmp_path):
    """Its readers are stopped, as in the middle of a read that never ends; a second signal changes nothing."""
    words = [*trainers(pair, tmp_path)["train_translator.py"], "--iterations", 100_000, "--workers", 2, "--save-every", 5]
    command = [sys.executable, ROOT / "train_translator.py", *words]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "translator" / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    for child in children:
        os.kill(int(child), signal.SIGSTOP)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "Traceback" not in stderr, stderr
    assert torch.load(tmp_path / "translator" / "checkpoint.pt", weights_only=True)["iteration"] > 5


def test_closed_streams_cost_no_work(pair, runs, tmp_path):
    words = " ".join(f'"{word}"' for word in trainers(pair, tmp_path)["train_translator.py"])
    command = f"{sys.executable} {ROOT}/train_translator.py {words} --iterations 2 <&- >&- 2>&-"
    assert run("bash", "-c", command).returncode == 0 and (tmp_path / "translator" / "weights.pt").exists()


def test_runs_of_older_versions_are_resumed(pair, runs, tmp_path):
    """Whose args.json have other entries for the data: what cannot be compared is not."""
    shutil.copytree(runs / "translator", tmp_path / "translator")
    held = json.loads((tmp_path / "translator" / "args.json").read_text())
    held = {key: value for key, value in held.items() if "_of_" not in key} | {"source_frames": "4 frames, 0123456789ab"}
    (tmp_path / "translator" / "args.json").write_text(json.dumps(held))
    words = [*trainers(pair, tmp_path)["train_translator.py"], "--iterations", 1]
    result = script("train_translator.py", *words)
    assert result.returncode == 0 and "finished" in result.stdout, result.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_drawing_process_that_is_killed_is_said_and_a_stop_is_silent(tmp_path, number):
    command = [sys.executable, ROOT / "demo/make_demo_data.py", tmp_path / "d", "--size", "512x1024", "--source-count", 400]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.rglob("*.png")) and process.poll() is None:
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[0]) if number == signal.SIGKILL else process.pid, number)
    stderr = process.communicate(timeout=60)[1]
    if number == signal.SIGKILL:
        assert process.returncode == 1 and "a process that draws frames was killed" in stderr.splitlines()[-1], stderr
    else:
        assert process.returncode == 128 + number and stderr == "", stderr
