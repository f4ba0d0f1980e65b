"""Faults caused for real: processes killed, disks filled, data and weights from strangers; nothing lost, nothing run.

    python -m pytest tests/test_faults.py --all                   3 kills
    python -m pytest tests/test_faults.py -m soak -s              20 kills
"""
import contextlib
import functools
import gc
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import traceback
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import data
import dense
import model
import train
from conftest import ROOT, command, run_script
from data import BadRecord, EvalTransform, TrainTransform, UserError, open_data, train_loader
from model import METHODS, load_checkpoint, load_state, save_atomically
from test_formats import jpeg, make_coco, make_csv, make_karpathy, make_tar, pairs, special, with_header
from test_model import tiny
from test_train import ALONE, BARE, SMALL, metrics, trained, weights
from test_transforms import encoded, picture, png_that_claims

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
FEW = ["--batch-size", "12"]                                                # a step takes a twentieth of a second


def same_states(a: Path, b: Path, close: bool = False):
    """Model, teacher, optimizer and step of two checkpoints, to the bit or closely; the log too."""
    one, two = load_state(a / "last.pt"), load_state(b / "last.pt")
    one["optimizer"], two["optimizer"] = ({f"{i} {name}": value for i, part in state["optimizer"]["state"].items()
                                           for name, value in part.items()} for state in (one, two))
    for part in ("model", "teacher") + (() if close else ("optimizer",)):
        assert (one[part] or {}).keys() == (two[part] or {}).keys()
        for name, value in (one[part] or {}).items():
            if close:
                torch.testing.assert_close(two[part][name], value, atol=3e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")
            else:
                assert torch.equal(two[part][name], value), f"{part} {name}"
    assert (one["step"], one["bad_count"]) == (two["step"], two["bad_count"])
    skip = {"samples_per_second"} | ({"code_entropy", "patch_entropy", "codes_used"} if close else set())
    for x, y in zip(metrics(a), metrics(b), strict=True):
        for name in set(x) - skip:
            assert y[name] == (pytest.approx(x[name], rel=2e-5, abs=1e-6) if close else x[name]), name


# ------------------------------------------------------------------------------------------------------ kill anywhere

def parent_of(pid: int) -> int:
    """0 of a process that is gone or only waits to be buried."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        return 0 if state in "ZX" else int(parent)
    except OSError:
        return 0


def workers_of(pid: int) -> list[int]:
    """Processes started by torchrun."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and
            parent_of(int(entry.name)) == pid]


def wait(condition, seconds: float = 300.0, pause: float = 0.05):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "hangs"
        time.sleep(pause)


def lines(out: Path) -> int:
    return (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0


@pytest.fixture(scope="module")
def every_format(tmp_path_factory) -> list[str]:
    """--data of all kinds: shards, a table, COCO, Flickr30k, classes in folders, the drawn world; some records bad."""
    root = tmp_path_factory.mktemp("formats")

    def photo(seed: int) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        return encoded(PIL.Image.fromarray(pixels).resize((40, 30), PIL.Image.Resampling.BICUBIC), "JPEG")
    for shard in range(2):
        make_tar(root / f"{shard}.tar", [item for k in range(8) for item in (
            (f"{k}.jpg", photo(100 * shard + k) if k else b"404"), (f"{k}.txt", f"thing {k} of {shard}".encode()))])
    (root / "table").mkdir()
    make_csv(root / "table", "filepath,title\n" + "".join(f'{k}.jpg,"row {k}, no more"\n' for k in range(7)), images=0)
    for k in range(6):                                                      # the seventh is missing
        (root / "table" / f"{k}.jpg").write_bytes(photo(300 + k))
    for name in ("dog", "ice_cream"):
        (root / "classes" / name).mkdir(parents=True)
        for k in range(3):
            (root / "classes" / name / f"{k}.png").write_bytes(photo(400 + k))
    specs = [f"shards:{root}/{{0..1}}.tar", f"csv:{root}/table/table.csv", f"folder:{root}/classes",
             make_coco(root / "coco", "2017"), make_karpathy(root / "flickr", False), "shapes:train=20"]
    return [word for spec in specs for word in ("--data", spec)]


def soaked(every_format, steps: int) -> list:
    return [*BARE, "--batch-size", 12, *every_format, "--max-bad", 0.5, "--steps", steps, "--checkpoint-every", 0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, every_format):
    """The folder of a run that nobody disturbed, by its number of processes and steps."""
    known = {}

    def run(processes: int, steps: int) -> Path:
        if (processes, steps) not in known:
            known[processes, steps] = tmp_path_factory.mktemp("undisturbed")
            run_script(*soaked(every_format, steps), "--out", known[processes, steps], processes=processes, timeout=900)
        return known[processes, steps]
    return run


@linux
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.soak)])
def test_killed_anywhere_and_nothing_is_lost(kills, processes, every_format, undisturbed, tmp_path):
    """kill -9 of all processes, of torchrun alone, or of one worker: while it starts, trains or saves.

    Each step is saved, so that many kills fall into saving.  The same command follows at once each time.
    """
    rng, stride, out, seen = random.Random(100 * kills + processes), 8, tmp_path / "out", 0
    run, started, tally = soaked(every_format, stride * (kills + 1)), 5.0, []
    for kill in range(kills):
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen(command(*run, "--out", out, processes=processes), cwd=ROOT, stdout=log,
                                       stderr=log, env=dict(os.environ, OMP_NUM_THREADS="1"), start_new_session=True)
        begun = time.monotonic()
        if kill % 5 == 4:                                                   # while it starts
            until = begun + rng.random() * started
            wait(lambda: time.monotonic() > until or lines(out) >= stride * (kill + 1) - 2, 600)
        else:
            target = stride * kill + rng.randint(1, stride - 1)
            wait(lambda: lines(out) >= target or process.poll() is not None, 600)
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            started = time.monotonic() - begun if kill == 0 else started
            time.sleep(rng.random() * 0.1)
        workers = workers_of(process.pid)
        whom = ("all", "a worker", "torchrun")[rng.randrange(2 if kill % 5 == 4 else 3)] if workers else "torchrun"
        tally.append(whom)
        for pid in {"all": [process.pid, *workers], "torchrun": [process.pid]}.get(whom) or [rng.choice(workers)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert process.wait(120) != 0
        if (out / "last.pt").exists():
            step = load_state(out / "last.pt")["step"]                      # raises unless it is whole
            assert step >= seen, "steps were lost that had been saved"
            seen = step
        if whom != "torchrun":
            wait(lambda: not any(map(parent_of, workers)), 120)
    run_script(*run, "--out", out, processes=processes, timeout=900)
    same_states(undisturbed(processes, stride * (kills + 1)), out)
    assert sorted(path.name for path in out.iterdir() if path.suffix == ".tmp") == []
    print(f"\n{kills} kills, {processes} processes, {({who: tally.count(who) for who in set(tally)})}: nothing lost")


@linux
@pytest.mark.slow
def test_torchrun_goes_on_when_a_worker_dies(every_format, undisturbed, tmp_path):
    run, out = soaked(every_format, 32), tmp_path / "out"
    words = command(*run, "--out", out, processes=2)
    words[words.index("--master-port"):words.index("train.py")] = ["--standalone", "--max-restarts", "1"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=dict(os.environ, OMP_NUM_THREADS="1"))
    wait(lambda: lines(out) >= 5 or process.poll() is not None)
    os.kill(max(workers_of(process.pid)), signal.SIGKILL)
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0 and "going on from step" in said, said[-3000:]
    same_states(undisturbed(2, 32), out)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_every_process_saves_the_step(number, status, tmp_path):
    """As Slurm and Ctrl-C send it: loader processes get it too."""
    process = subprocess.Popen(command(*SMALL, "--workers", 2, "--steps", 5000, "--out", tmp_path), cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                               env=dict(os.environ, OMP_NUM_THREADS="1"))
    wait(lambda: lines(tmp_path) >= 3 or process.poll() is not None)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    step = load_state(tmp_path / "last.pt")["step"]
    assert process.returncode == status and "Traceback" not in err, err[-3000:]
    assert out.endswith(f"stopped after step {step}; the same command goes on from there\n") and step == lines(tmp_path)


class Stuck(data.ShapesWorld):
    """Data on a disk that no longer answers."""
    def read(self, i):
        time.sleep(600)


@linux
@pytest.mark.slow
def test_a_signal_ends_a_run_that_waits_for_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "open_pairs", lambda o, out: Stuck(count=200, size=32))
    monkeypatch.setattr(data, "learn_tokenizer", lambda *_: data.BytePairTokenizer([]))
    stop = train.StopSignal.__init__

    def signalled(self):
        stop(self)
        threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    monkeypatch.setattr(train.StopSignal, "__init__", signalled)
    with pytest.raises(SystemExit) as end:
        trained("--steps", 3, "--workers", 1, "--out", tmp_path)
    assert end.value.code == 143 and "stopped after step 0, waiting for data" in capsys.readouterr().out
    assert load_state(tmp_path / "last.pt")["step"] == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts a small disk")
@pytest.mark.slow
def test_a_small_shared_memory_is_told_in_one_line(tmp_path):
    """Docker's is of 64 MB."""
    line = shlex.join(map(str, command(*SMALL, "--workers", 1, "--batch-size", 200, "--steps", 3, "--out", tmp_path)))
    small = subprocess.run(["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size=256k none /dev/shm && exec {line}"],
                           cwd=ROOT, capture_output=True, text=True, timeout=100)
    if "Operation not permitted" in small.stderr:
        pytest.skip("no right to mount")
    last = small.stderr.splitlines()[-1]
    assert small.returncode == 2 and last.startswith("error: no room in /dev/shm"), small.stderr


@pytest.mark.slow
def test_compiling_without_a_compiler_is_told_in_one_line(tmp_path):
    run = subprocess.run(command(*SMALL, "--compile", "--steps", 1, "--out", tmp_path), cwd=ROOT, capture_output=True,
                         text=True, env=dict(os.environ, CXX="/nowhere/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path)))
    assert run.returncode == 2 and run.stderr.startswith("error: --compile finds no compiler") and (
        run.stderr.count("\n") == 1), run.stderr


def test_a_notebook_whose_output_cannot_be_configured(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit) as end:
        data.run(lambda: print("caf\udce9"))
    assert end.value.code == 0


@linux
@pytest.mark.slow
def test_a_full_disk_costs_no_step(tmp_path):
    """A limit on the size of files comes and goes while the run saves each step."""
    run = [*SMALL, "--steps", 60, "--checkpoint-every", 0]
    run_script(*run, "--out", tmp_path / "whole")
    out, told = tmp_path / "out", []
    process = subprocess.Popen(command(*run, "--out", out), cwd=ROOT, stdout=subprocess.DEVNULL, text=True,
                               stderr=subprocess.PIPE, env=dict(os.environ, OMP_NUM_THREADS="1"))
    wait(lambda: (out / "last.pt").exists() or process.poll() is not None)
    assert process.poll() is None, process.communicate()[1]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))     # no line of the log either
    while len(told) < 2:
        line = process.stderr.readline()
        assert line, "ended too early"
        told += ["was not saved" in line and "training goes on" in line] * ("last.pt" in line)
    left = load_state(out / "last.pt")["step"]                              # whole, and of before
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    error = process.communicate(timeout=600)[1]
    assert process.returncode == 0 and all(told) and "Traceback" not in error, error
    a, b = load_state(tmp_path / "whole" / "last.pt"), load_state(out / "last.pt")
    assert 0 < left < b["step"] == 60
    assert all(torch.equal(b["model"][name], value) for name, value in a["model"].items())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="wants the file that is always full")
def test_a_full_disk_under_the_redirected_output_costs_its_lines_alone(tmp_path):
    with open("/dev/full", "w") as full:
        subprocess.run(command(*SMALL, "--steps", 3, "--method", "clip", "--out", tmp_path), cwd=ROOT, stdout=full,
                       stderr=full, timeout=600)
    assert load_state(tmp_path / "last.pt")["step"] == 3 and (tmp_path / "curves.png").exists() and lines(tmp_path) == 3


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_small_disk_that_fills(tmp_path, capsys):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        path = tmp_path / "last.pt"
        assert save_atomically(path, dict(step=1, w=torch.zeros(20_000)))
        (tmp_path / "other").write_bytes(bytes(60_000))
        assert not save_atomically(path, dict(step=2, w=torch.zeros(20_000)))
        assert load_state(path)["step"] == 1 and sorted(os.listdir(tmp_path)) == ["last.pt", "other"]
        error = capsys.readouterr().err
        assert "was not saved" in error and "goes on" in error and error.count("\n") == 1
        with train.tell_if_full(tmp_path / "metrics.jsonl"):
            (tmp_path / "metrics.jsonl").write_bytes(bytes(200_000))
        assert "No space left on device" in capsys.readouterr().err
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "other").unlink()
        assert save_atomically(path, dict(step=3, w=torch.zeros(20_000))) and load_state(path)["step"] == 3
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@linux
def test_a_folder_is_held_by_one_run_until_its_process_ends(tmp_path):
    holds = ("import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
             "print(1, flush=True); time.sleep(999)")
    other = subprocess.Popen([sys.executable, "-c", holds, tmp_path / "lock"], stdout=subprocess.PIPE)
    other.stdout.readline()
    try:
        with pytest.raises(UserError, match="another run is writing to"):
            ALONE.claim(tmp_path, patience=0.3)
    finally:
        other.kill()
        other.wait()
    ALONE.claim(tmp_path, patience=10)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        ALONE.claim(tmp_path / "file" / "below")
    for command in ("zeroshot", "words"):                   # before the checkpoint is read
        with pytest.raises(UserError, match="cannot write to"):
            dense.main([command, "no.pt", "--out", str(tmp_path / "file" / "below")])


# ------------------------------------------------------------------------------------------------------ processes

SEVERAL = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch, train

train.finish, hide = lambda *arguments: None, train.hide
# Adam divides by the root of the mean square: where a gradient is near 0, float32's last bit would decide
AdamW = torch.optim.AdamW
torch.optim.AdamW = lambda *arguments, **options: AdamW(*arguments, **options, eps=1e-3)

def main():
    for arguments, stop_at in json.loads(open(sys.argv[2]).read()):
        def stopping(batch, c, tokenizer, step, seed, rank, world):
            if step == stop_at and rank == 0:           # one process is told, all stop
                os.kill(os.getpid(), signal.SIGTERM)
            return hide(batch, c, tokenizer, step, seed, rank, world)
        train.hide = stopping
        try:
            train.train(train.parse_train_options(arguments))
        except SystemExit as end:
            assert end.code == 143

train.run(main)
"""


@pytest.mark.slow
def test_any_number_of_processes_trains_as_one(every_format, tmp_path):
    """All methods at one global batch on 1, 2, 3 and 4 processes, and three that go on from two on another number.

    Losses, gradient norms and weights agree as float32 sums in another order do.
    """
    (tmp_path / "several.py").write_text(SEVERAL)
    jobs = {name: [*SMALL[1:], *FEW, "--method", name, "--steps", 4] for name in METHODS}
    jobs["real"] = [*soaked(every_format, 6)[1:], "--drop-path", 0.1, "--method", "clip"]
    going_on = ["maskclip", "slip", "declip"]
    for processes in (2, 1, 3, 4):
        home = tmp_path / str(processes)
        todo = [([*map(str, job), "--out", str(home / name)], None) for name, job in jobs.items()]
        if processes == 2:
            todo += [([*map(str, jobs[name]), "--out", str(home / f"{name} stopped")], 1) for name in going_on]
        for name in going_on if processes > 2 else ():
            shutil.copytree(tmp_path / "2" / f"{name} stopped", home / f"{name} stopped")
            todo.append(([*map(str, jobs[name]), "--out", str(home / f"{name} stopped")], None))
        (tmp_path / "jobs.json").write_text(json.dumps(todo))
        run_script(tmp_path / "several.py", ROOT, tmp_path / "jobs.json", processes=processes, timeout=900)
        for name in going_on if processes == 2 else ():
            assert load_state(home / f"{name} stopped" / "last.pt")["step"] == 2
    for processes in (2, 3, 4):
        for name in jobs:
            same_states(tmp_path / "1" / name, tmp_path / str(processes) / name, close=True)
        for name in going_on if processes > 2 else ():
            same_states(tmp_path / "1" / name, tmp_path / str(processes) / f"{name} stopped", close=True)
    assert load_state(tmp_path / "4" / "real" / "last.pt")["bad_count"] > 0


def test_a_batch_that_processes_cannot_share_is_refused_in_one_line():
    with pytest.raises(UserError, match="--batch-size 12 cannot be shared by 5 processes: choose a multiple of 5"):
        train.Runtime(0, 5, torch.device("cpu"), False, 0).share(12)


def test_processes_that_see_different_files_are_told(monkeypatch):
    """As when --out lies on a disk of its own in each machine, and only the first has the checkpoint."""
    runtime = train.Runtime(0, 2, torch.device("cpu"), False, 0)
    monkeypatch.setattr(train, "gather_objects", lambda mine, runtime: [mine, dict(mine, step_to_go_on_from=0)])
    runtime.check_alike(step_to_go_on_from=0, data="x")
    with pytest.raises(UserError, match="processes differ in step to go on from: 500 here, 0 elsewhere; --out"):
        runtime.check_alike(step_to_go_on_from=500, data="x")


# ------------------------------------------------------------------------------------------------------ uneven data

class Index:
    """A record -> its place in the list alone, which Records adds."""
    def __call__(self, sample, rng) -> dict:
        return dict(text=sample.captions[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_uneven_shards_lose_nothing_and_repeat_nothing(workers, tmp_path):
    """Three shards of 1, 37 and no pairs, for 2 processes x 2 workers."""
    for shard, n in enumerate((1, 37, 0)):
        make_tar(tmp_path / f"{shard}.tar", pairs(n, first=100 * shard))
    shards = open_data(f"shards:{tmp_path}/{{0..2}}.tar")
    assert shards.notes == ["1 of 3 shards hold no pair"]
    epochs = [counted([train_loader(shards, Index(), 8, 0, range(4 * epoch, 4 * epoch + 4), rank, 2, workers)
                          for rank in range(2)]) for epoch in range(6)]
    for seen in epochs:
        assert sum(seen.values()) == 32 and max(seen.values()) == 1, "38 records make 4 batches of 8, none twice"
    assert len(set().union(*epochs)) == 38, "what an epoch leaves out is another six each time"


def counted(loaders) -> dict[str, int]:
    seen = {}
    for loader in loaders:
        for batch in loader:
            for text in batch["text"]:
                seen[text] = seen.get(text, 0) + 1
    return seen


class Dies:
    """Kills the process that reads the sixth picture."""
    def __call__(self, sample, rng) -> dict:
        if sample.captions[0] == "picture 5":
            os.kill(os.getpid(), signal.SIGKILL)
        return dict(text=sample.captions[0])


def test_a_loader_process_that_dies_is_told_in_one_line(tmp_path):
    shards = open_data(f"shards:{make_tar(tmp_path / 's.tar', pairs(20))}")
    with pytest.raises(UserError, match="a loader process died .*lower --workers") as error:
        list(train_loader(shards, Dies(), 4, 0, range(5), workers=2))
    assert "\n" not in str(error.value)
    del error                                                               # and with it the loader
    gc.collect()
    wait(lambda: not multiprocessing.active_children(), 60)                 # the other one does not stay behind


def test_data_without_one_good_record_ends_in_one_line(tmp_path, capsys):
    rows = "".join(f"{k}.jpg,x\n" for k in range(400))
    with pytest.raises(UserError, match="step 1: too many bad records to fill the batch"):
        trained("--data", make_csv(tmp_path, f"filepath,title\n0.jpg,\n{rows}", images=1), "--steps", 3,
                "--method", "declip", "--batch-size", 3, "--out", tmp_path / "out")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 * 21 and all(line.startswith("skipped ") and ".jpg: " in line for line in told)


def test_what_an_epoch_leaves_out_is_said(tmp_path, capsys):
    trained(*FEW, "--data", "shapes:train=31", "--steps", 1, "--out", tmp_path, "--method", "clip")
    assert "note: 7 records fill no batch and are left out of an epoch, others in each" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ hostile input

def scans(n: int) -> bytes:
    """A small progressive JPEG, its last scan n times."""
    file = encoded(picture(256, 256), "JPEG", progressive=True)
    at = file.rindex(b"\xff\xda")
    return file[:at] + (file[at:-2]) * n + file[-2:]


def chunked(*more: tuple[bytes, bytes]) -> bytes:
    """A PNG with further chunks after its header."""
    file = encoded(picture(16, 16))
    extra = b"".join(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
                     for kind, body in more)
    return file[:33] + extra + file[33:]


def animated(format: str) -> bytes:
    more = [picture(16, 16).rotate(90 * k) for k in range(9)]
    return encoded(picture(16, 16), format, save_all=True, append_images=more)


def turned(orientation: int) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(24, 16), "JPEG", exif=exif)


@functools.cache
def hostile_images() -> dict[str, tuple[bytes, bool | None]]:
    """name: (bytes, whether it must be read: None if either is right)"""
    files = {}
    for format in data.IMAGE_FORMATS:
        whole = encoded(picture(48, 40), format)
        files[f"whole.{format}"] = whole, True
        for share in (0.02, 0.3, 0.6):
            files[f"{share:.0%} of it.{format}"] = whole[:int(share * len(whole))], False
        files[f"bytes inverted.{format}"] = whole[:400] + bytes(255 - b for b in whole[400:500]) + whole[500:], None
        files[f"header inverted.{format}"] = whole[:4] + bytes(255 - b for b in whole[4:40]) + whole[40:], None
        files[f"twice.{format}"] = whole * 2, None
    gradient = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    palette = picture(16, 16).quantize(8)
    files |= {
        "png inside.jpg": (encoded(picture(16, 16)), True), "jpeg inside.png": (encoded(picture(16, 16), "JPEG"), True),
        "empty.jpg": (b"", False), "page.jpg": (b"<html>404</html>", False), "zeros.png": (bytes(5000), False),
        "drawing.jpg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", False),
        "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch ran) run", False),
        "document.jpg": (b"%PDF-1.4 1 0 obj", False), "archive.jpg": (b"PK\3\4" + bytes(99), False),
        "cmyk.jpg": (encoded(picture(16, 16).convert("CMYK"), "JPEG"), True),
        "cmyk.tif": (encoded(picture(16, 16).convert("CMYK"), "TIFF"), True),
        "lab.tif": (encoded(PIL.Image.new("LAB", (9, 9)), "TIFF"), None),
        "16 bits.png": (encoded(PIL.Image.fromarray(gradient)), True),
        "16 bits.tif": (encoded(PIL.Image.fromarray(gradient), "TIFF"), True),
        "32 bits.tif": (encoded(PIL.Image.fromarray(gradient.astype(np.int32)), "TIFF"), True),
        "float.tif": (encoded(PIL.Image.new("F", (9, 9), float("nan")), "TIFF"), False),
        "palette.png": (encoded(palette, transparency=3), True),
        "palette of bytes.png": (encoded(palette, transparency=bytes(8)), True),
        "one bit.png": (encoded(picture(16, 16).convert("1")), True),
        "gray and alpha.png": (encoded(picture(16, 16).convert("LA")), True),
        "animated.gif": (animated("GIF"), True), "animated.webp": (animated("WEBP"), True),
        "animated.png": (animated("PNG"), True), "pages.tif": (animated("TIFF"), True),
        **{f"turned {k}.jpg": (turned(k), True) for k in (0, 2, 3, 5, 6, 8, 9, 65535)},
        "broken exif.jpg": (encoded(picture(16, 16), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), True),
        "a pixel.gif": (encoded(PIL.Image.new("L", (1, 1)), "GIF"), False),
        "a line.png": (encoded(PIL.Image.new("L", (1, 9000))), False),
        "a strip.png": (encoded(PIL.Image.new("L", (2, 9000))), True),
        "bomb.png": (png_that_claims(50_000, 50_000), False), "claims.png": (png_that_claims(9_999, 9_999), False),
        "bomb.ppm": (b"P6 99999 99999 255\n", False), "claims.ppm": (b"P6 9999 9999 255\n", False),
        "bomb.gif": (b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",", False),
        "text bomb.png": (chunked((b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 9))), None),
        "profile bomb.png": (chunked((b"iCCP", b"a\0\0" + zlib.compress(bytes(200_000_000), 9))), None),
        "thousand scans.jpg": (scans(1000), False), "twenty scans.jpg": (scans(20), True),
        "circle of pages.tif": (encoded(picture(9, 9), "TIFF")[:4] + b"\x04\0\0\0" + bytes(99), False),
    }
    return files


CAPTIONS = {
    "control.txt": "a\0b\x1b[31m red \x07\x08 \x7f\x85".encode(), "long.txt": b"word " * 200_000,
    "one word.txt": b"x" * 1_000_000, "marks.txt": ("e" + "\u0301" * 100_000).encode(), "spaces.txt": b" \t\n\r ",
    "entities.txt": b"&amp;" * 100_000 + b"&#" + b"1" * 9999 + b";", "emoji.txt": ("\U0001f408" * 50_000).encode(),
    "tokens.txt": b"<start_of_text> <end_of_text> a cat <end_of_text>",
    "direction.txt": "\u202e txt.exe \u2066".encode(),
    "not utf-8.txt": b"caf\xe9", "utf-16.txt": "a cat".encode("utf-16"), "half pair.txt": b"\xed\xa0\xbd",
    "garbled.txt": ("Ã¢â‚¬â„¢" * 20_000).encode(), "mark.txt": b"\xef\xbb\xbf a cat",
    **{f"{k}.json": text.encode() for k, text in enumerate((
        '{"caption": "half a pair \\ud83d"}', '{"caption": 5}', '{"caption": ["a"]}', "[]", "null", '"a cat"', "{", "",
        "[" * 100_000, '{"caption": ' + "1" * 5000 + "}", "NaN", '{"caption": "a", "caption": ""}',
        '{"caption": "' + "x" * 1_000_000 + '"}'))},
}


def one_plain_line(error: Exception) -> bool:
    """What a terminal may show: printed as data.run and train.report_bad do."""
    line = data.printable(str(error))
    return line.isprintable() and len(line) < 1500 and " object at 0x" not in line


def growth(task) -> float:
    """GiB by which the peak memory of a forked process grows while it runs the task."""
    pid = os.fork()
    if not pid:
        try:
            Path("/proc/self/clear_refs").write_text("5")                   # forgets the peak until now
            before = int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])
            task()
            peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
            os._exit(min(254, (peak - before) * 64 // 2 ** 20))             # in 64ths of a GiB
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(255)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) < 255, f"failed with {status}, see above"
    return os.WEXITSTATUS(status) / 64


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory) -> tuple[Path, int]:
    """A shard, a table and a folder of hostile files, and how many of the images must be read."""
    root, files = tmp_path_factory.mktemp("hostile"), hostile_images()
    members = []
    for k, (name, (content, _)) in enumerate(files.items()):
        members += [(f"{k}.jpg", content), (f"{k}.txt", name.encode())]
        (root / "class\n\x1b[31m").mkdir(exist_ok=True)
        (root / "class\n\x1b[31m" / f"{k}{os.path.splitext(name)[1]}").write_bytes(content)
    for name, content in CAPTIONS.items():
        members += [(f"caption {name}.x".replace(".txt.x", ".txt").replace(".json.x", ".json"), content),
                    (f"caption {name.rpartition('.')[0]}.jpg", jpeg())]
    make_tar(root / "s.tar", [*members, ("../../out.jpg", jpeg()), ("../../out.txt", b"x"), ("/out.jpg", jpeg()),
                              special("link.jpg", tarfile.SYMTYPE, linkname="/etc/passwd")])
    (root / "table.csv").write_text("filepath,title\n" + "".join(
        f'"class\n\x1b[31m/{k}.JPEG","{name}\n"\n' for k, name in enumerate(files)) + "/etc/passwd,x\n../../x,x\n")
    return root, sum(wanted is True for _, wanted in files.values())


def test_hostile_images_are_read_or_refused():
    files, seconds = hostile_images(), time.process_time()
    assert len(files) >= 60
    rng = np.random.default_rng(0)
    for name, (content, wanted) in files.items():
        for transform in (TrainTransform(32), EvalTransform(32)):
            try:
                pixels = transform(data.open_image(content), rng)
                assert pixels.shape == (3, 32, 32) and wanted is not False, name
            except BadRecord as error:
                assert wanted is not True and one_plain_line(error), f"{name}: {error}"
    assert time.process_time() - seconds < 60


@linux
@pytest.mark.slow
@pytest.mark.parametrize("mode, format", [("RGBA", "PNG"), ("LA", "PNG"), ("I;16", "PNG"), ("P", "PNG"),
                                          ("CMYK", "TIFF"), ("I", "TIFF"), ("RGB", "WEBP")])
def test_the_largest_image_takes_less_than_two_gibibytes(mode, format):
    """All kinds of 100 million pixels, the most that is decoded: a file of a few kilobytes."""
    side = 9_990
    options = dict(transparency=0) if mode == "P" else dict(compression="tiff_deflate") if format == "TIFF" else {}
    options |= dict(lossless=True, quality=0, method=0) if format == "WEBP" else {}
    out = io.BytesIO()

    def make():
        PIL.Image.new(mode, (side, side)).save(out, format, **options)
    make()
    assert growth(lambda: TrainTransform(32)(data.open_image(out.getvalue()), np.random.default_rng(0))) < 2


@linux
def test_a_run_over_hostile_files_skips_counts_and_writes_nowhere_else(hostile_folder, tmp_path, capsys,
                                                                       monkeypatch):
    """Every format at once: each bad record is one line on the terminal, and the run ends well."""
    root, readable = hostile_folder
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    before = {path for folder in (root, tmp_path, root.parent) for path in folder.rglob("*")}
    run = ["--data", f"shards:{root}/s.tar", "--data", f"csv:{root}/table.csv", "--data", f"folder:{root}",
           "--max-bad", 1, "--method", "clip", "--steps", 20, "--out", tmp_path / "out"]
    assert growth(lambda: trained(*FEW, *run)) < 2
    written = {path for folder in (root, tmp_path, root.parent) for path in folder.rglob("*")} - before
    assert written and all(path.is_relative_to(tmp_path / "out") for path in written), written
    state = load_state(tmp_path / "out" / "last.pt")
    assert state["step"] == 20 and state["bad_count"] > 20
    assert os.listdir(tmp_path / "cwd") == []


def test_every_hostile_record_is_counted(hostile_folder, capsys):
    root, readable = hostile_folder
    folder, shards = open_data(f"folder:{root}"), open_data(f"shards:{root}/s.tar")
    tokenizer = data.BytePairTokenizer([])
    report = data.check(folder, tokenizer)
    assert report["records"] == len(hostile_images()) and readable <= report["records"] - report["bad"]
    report = data.check(shards, tokenizer)
    good = 0
    for i in range(len(shards)):
        with contextlib.suppress(BadRecord):
            sample = shards.read(i)
            assert tokenizer(list(sample.captions), 32).shape == (1, 32)
            data.decode(sample.image)
            good += 1
    assert report["bad"] == len(shards) - good > 20
    capsys.readouterr()
    train.report_bad([("a\nb\x1b[31m", "c\rd\ud800")])
    assert capsys.readouterr().err == "skipped a\\nb\\x1b[31m: c\\rd\\ud800\n"


def hostile_tars() -> dict[str, bytes]:
    def tar(*members, **options) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", **options) as file:
            for member in members:
                entry = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
                entry.size = entry.size if isinstance(member, tarfile.TarInfo) else len(member[1])
                file.addfile(entry, None if isinstance(member, tarfile.TarInfo) else io.BytesIO(member[1]))
        return out.getvalue()
    good, one = pairs(2), tar(*pairs(1), format=tarfile.USTAR_FORMAT)
    return {
        "absolute": tar(("/tmp/x.jpg", jpeg()), ("/tmp/x.txt", b"x"), *good),
        "upwards": tar(("../x.jpg", jpeg()), ("a/../../x.txt", b"x"), *good),
        "links": tar(special("x.jpg", tarfile.SYMTYPE, linkname="/etc/passwd"), *good),
        "hard link": tar(*good, special("x.txt", tarfile.LNKTYPE, linkname="../../etc/passwd")),
        "device": tar(special("x.jpg", tarfile.CHRTYPE, devmajor=1, devminor=5), *good),
        "pipe": tar(special("x.txt", tarfile.FIFOTYPE), *good),
        "sparse": tar(special("x.jpg", tarfile.GNUTYPE_SPARSE), *good),
        "long name": tar(("x" * 100_000 + ".jpg", jpeg()), *good, format=tarfile.GNU_FORMAT),
        "escape in name": tar(("\x1b[31m\n.jpg", b"404"), ("\x1b[31m\n.txt", b"x"), *good),
        "huge header": tar(special("x.jpg", tarfile.REGTYPE, pax_headers={"comment": "x" * 2_000_000}), *good,
                           format=tarfile.PAX_FORMAT),
        "size of digits": tar(special("x.jpg", tarfile.REGTYPE, pax_headers={"size": "9" * 5000}), *good,
                              format=tarfile.PAX_FORMAT),
        "2 ** 87 bytes": with_header(one, 0, size=(124, b"\x80" + b"\x7f" * 11)),
        "negative": with_header(one, 0, size=(124, b"\xff" * 12)),
        "extended header without end": with_header(one, 0, kind=(156, b"x")),
        "long name without end": with_header(one, 0, kind=(156, b"L"), size=(124, b"77777777777\0")),
        "packed": zlib.compress(one), "cut": one[:700], "empty": b"", "zeros": bytes(10_240), "text": b"404" * 999,
        "thousands of one name": tar(*good * 500), "no pair": tar(("a.jpg", jpeg()), ("b.txt", b"x")),
    }


@pytest.mark.parametrize("name", hostile_tars())
def test_hostile_tars_are_indexed_or_refused(name, tmp_path):
    (tmp_path / "s.tar").write_bytes(hostile_tars()[name])
    try:
        shards = open_data(f"shards:{tmp_path}/s.tar")
        for i in range(len(shards)):
            with contextlib.suppress(BadRecord):
                assert shards.read(i).captions[0].startswith("picture")
        assert all(len(data.printable(note)) < 1000 for note in shards.notes)
    except UserError as error:
        assert one_plain_line(error)
    assert os.listdir(tmp_path) == ["s.tar"], "nothing is extracted"


OF_OTHER_SHAPES = [[], {}, None, "text", 5, True, [[]], [None], {"images": 5}, {"images": {}}, {"images": [[]]},
                   {"images": [{}], "annotations": [], "categories": []}, {"annotations": [{}]},
                   {"images": [{"id": True, "file_name": "\ud800", "width": -1, "height": 1e400}]},
                   {"vision_cfg": [], "text_cfg": 5}, {"model_cfg": None}, {"pretrained_cfg": {"mean": 5, "std": "x"}}]


@pytest.mark.parametrize("text", [*map(json.dumps, OF_OTHER_SHAPES), "", "{", "[" * 100_000, "\xff", "1" * 5000, "\0"],
                         ids=lambda text: text[:30])
def test_json_of_another_shape_is_refused_in_one_line(text, tmp_path):
    content = text.encode("latin-1")
    (tmp_path / "annotations").mkdir()
    for name in ("annotations/captions_train2017.json", "annotations/instances_train2017.json", "dataset_coco.json",
                 "dataset_flickr30k.json", "open_clip_config.json", "config.json"):
        (tmp_path / name).write_bytes(content)
    torch.save({"patch_embed.proj.weight": torch.zeros(4, 3, 8, 8), "patch_embed.proj.bias": torch.zeros(4)},
               tmp_path / "open_clip_pytorch_model.bin")
    coco, flickr, timm = f"coco:{tmp_path}", f"flickr30k:{tmp_path}", tmp_path / "open_clip_pytorch_model.bin"
    for read in (lambda: open_data(coco), lambda: open_data(coco, task="retrieval"), lambda: open_data(flickr, "train"),
                 lambda: open_data(coco, "train", "detection"),
                 lambda: model.read_public(f"open_clip:{tmp_path}", model.PAPER)):
        with pytest.raises(UserError) as error:
            read()
        assert one_plain_line(error.value)
    with contextlib.suppress(UserError):                                # a config.json beside timm's may say nothing
        model.read_public(f"timm:{timm}", model.PAPER)


INSTANCES = {"images": [{"id": 1, "file_name": "1.jpg", "width": 64, "height": 64}],
             "categories": [{"id": 7, "name": "cat"}],
             "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 1, 30, 30], "area": 900,
                              "segmentation": [[1, 1, 30, 1, 30, 30]], "iscrowd": 0}]}


@pytest.mark.parametrize("part", INSTANCES)
@pytest.mark.parametrize("value", ["gone", None, "x", [], {}, -1, float("nan"), 10 ** 400, [[]], ["x"] * 6],
                         ids=lambda value: str(value)[:9])
def test_annotations_with_a_key_missing_or_mad(part, value, tmp_path):
    """Each key in turn: refused in one line that names the entry, or the key is one that nothing needs."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017" / "1.jpg").write_bytes(jpeg(size=(64, 64)))
    for key in [None, *INSTANCES[part][0]]:
        content = json.loads(json.dumps(INSTANCES))
        place, key = (content, part) if key is None else (content[part][0], key)
        place[key] = value
        if value == "gone":
            del place[key]
        (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
        try:
            objects = open_data(f"coco:{tmp_path}", "train", "detection")
            with contextlib.suppress(BadRecord):
                objects.read(0)
        except UserError as error:
            assert one_plain_line(error) and "instances_train2017.json" in str(error)


@pytest.mark.parametrize("content", [
    b"", b"\n", b"filepath,title\n", b'filepath,title\n0.jpg,"never closed' + b"x" * 5_000_000,
    b"filepath,title" + b"," * 5_000_000, b"x" * 9_000_000, bytes(100_000),
    b"filepath,title\n" + b'"' * 99_999 + b"\n", b'"filepath\n",title\n0.jpg,x\n', b"\xff\xfe\n", jpeg(),
], ids=range(11))
def test_hostile_tables_are_refused_in_one_line(content, tmp_path):
    with pytest.raises(UserError) as error:
        open_data(make_csv(tmp_path, content))
    assert data.printable(str(error.value)).isprintable()


# ------------------------------------------------------------------------------------------------------ hostile weights

class Boom:
    def __reduce__(self):
        return os.system, ("touch boom",)


@pytest.fixture(scope="module")
def whole_checkpoint(tmp_path_factory) -> Path:
    net = tiny("maskclip")
    path = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    tokenizer = data.BytePairTokenizer([("a", "a"), *[("a" * k, "a") for k in range(2, 255)]])
    net = model.build(model.replace(net.config, vocab_size=tokenizer.vocab_size), tokenizer.eot)
    options = train.TrainOptions(**asdict(net.config))
    model.save_checkpoint(path, net, tokenizer, options, step=5, total=9, data="x", bad_count=0, optimizer={},
                          teacher=None)
    load_checkpoint(path)
    return path


NEEDED = ("config", "model", "tokenizer", "mean")


def changed_states(state: dict) -> dict[str, dict]:
    """Whole files with hostile content."""
    def config(**changes):
        return dict(state, config={**state["config"], **changes})
    some = "visual.blocks.0.mlp.fc1.weight"
    return {
        "a list": [1, 2], "a tensor": torch.zeros(3), "empty": {},
        **{f"no {name}": {k: v for k, v in state.items() if k != name} for name in NEEDED},
        **{f"{name} of another kind": dict(state, **{name: 5}) for name in NEEDED},
        "a million wide": config(width=10 ** 6, heads=10), "a million deep": config(depth=10 ** 6),
        "words beyond memory": config(vocab_size=10 ** 12), "no heads": config(heads=0), "negative": config(width=-32),
        "width of text": config(width="wide"), "patches of none": config(patch_size=0),
        "unknown method": config(method="x"),
        "another method": config(method="slip"), "method of a list": config(method=["clip"]),
        "weights of another kind": dict(state, model={**state["model"], some: "x"}),
        "a weight of another shape": dict(state, model={**state["model"], some: torch.zeros(3)}),
        "a weight that claims terabytes": dict(state, model={**state["model"],
                                                             some: torch.zeros(1).expand(10 ** 6, 10 ** 6)}),
        "a weight more": dict(state, model={**state["model"], "x": torch.zeros(1)}),
        "merges of nothing": dict(state, tokenizer={"merges": "a b c\nq"}),
        "merges of a list": dict(state, tokenizer={"merges": []}),
        "other pixels": dict(state, mean=[0, 0, 0]),
    }


def test_hostile_checkpoints_are_refused_in_one_line(whole_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, path = whole_checkpoint.read_bytes(), tmp_path / "last.pt"
    files = {f"cut at {share:.0%}": whole[:int(len(whole) * share)] for share in (0, 0.01, 0.3, 0.7, 0.99, 0.999)}
    files |= {"program": pickle.dumps(Boom()), "zeros": bytes(9999), "text": b"404", "image": jpeg()}
    programs = {"program in a zip": dict(kind="pretraining", x=Boom()), "program in the old format": dict(x=Boom())}
    for name, content in {**changed_states(load_state(whole_checkpoint)), **programs}.items():
        out = io.BytesIO()
        torch.save(content, out, _use_new_zipfile_serialization="old" not in name)
        files[name] = out.getvalue()
    assert len(files) > 30

    def load_all():
        for name, content in files.items():
            path.write_bytes(content)
            with pytest.raises(UserError) as error:
                load_checkpoint(path)
                pytest.fail(f"{name} was taken")
            assert one_plain_line(error.value), f"{name}: {error.value}"
    if sys.platform == "linux":
        assert growth(load_all) < 1
    else:
        load_all()
    assert os.listdir(tmp_path) == ["last.pt"], "a program ran"


def test_a_checkpoint_with_flipped_bits_is_read_or_refused(whole_checkpoint, tmp_path):
    whole, rng, path = whole_checkpoint.read_bytes(), np.random.default_rng(0), tmp_path / "last.pt"
    places = [*rng.integers(0, len(whole), 10), *rng.integers(0, 3000, 15), *(len(whole) - rng.integers(1, 3000, 15))]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.integers(8)]) + whole[place + 1:])
        try:
            load_checkpoint(path)
        except UserError as error:
            assert one_plain_line(error), error


@pytest.mark.parametrize("change, says", [
    (dict(config=5), "no pretraining checkpoint"), (dict(model=None), "no pretraining checkpoint"),
    (dict(step="5"), "no pretraining checkpoint"), (dict(data=7), "no pretraining checkpoint"),
    (dict(kind="finetuning"), "no pretraining checkpoint"), (dict(tokenizer=5), "another vocabulary"),
    (dict(model={}), "does not fit"), (dict(optimizer={}), "does not fit"), (dict(teacher=None), "does not fit"),
    (dict(data="0" * 64), "other data"), (None, "with method = maskclip"),
])
def test_a_run_does_not_go_on_from_what_is_not_its_own(change, says, started, tmp_path):
    shutil.copytree(started, tmp_path / "out")
    if change:
        save_atomically(tmp_path / "out" / "last.pt", {**load_state(started / "last.pt"), **change})
    before = (tmp_path / "out" / "last.pt").read_bytes()
    with pytest.raises(UserError, match=says) as error:
        trained(*FEW, "--data", "shapes:train=24", "--steps", 2, "--out", tmp_path / "out", "--method",
                   "maskclip" if change else "declip")
    assert one_plain_line(error.value) and (tmp_path / "out" / "last.pt").read_bytes() == before


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("started")
    trained(*FEW, "--data", "shapes:train=24", "--steps", 2, "--out", out)
    return out


def safetensors(header, numbers: bytes = bytes(64), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + numbers


def entry(first: int, last: int, shape=(4,), dtype: str = "F32") -> dict:
    return dict(dtype=dtype, shape=list(shape), data_offsets=[first, last])


@pytest.mark.parametrize("content", [
    b"", b"1234567", struct.pack("<Q", 2 ** 63), safetensors({}, length=2 ** 64 - 1), safetensors(b"[" * 100_000),
    safetensors([]), safetensors(5), safetensors({"a": 5}), safetensors({"a": {}}),
    safetensors({"a": entry(10 ** 18, 9)}), safetensors({"a": entry(-10 ** 9, 0)}), safetensors({"a": entry(52, 68)}),
    safetensors({"a": entry(0, 16, dtype="F4")}), safetensors({"a": entry(0, 16, shape=(10 ** 9, 10 ** 9))}),
    safetensors({"a": entry(0, 16, shape="x")}), safetensors({"a": entry("0", 16)}),
    safetensors({"a": entry(0, 68, (17,))}),
    safetensors({f"{k}": entry(0, 10 ** 6, (250_000,)) for k in range(10_000)}, bytes(10 ** 6)),     # 10 GB of 1 MB
    bytes(999),
], ids=range(19))
def test_hostile_safetensors_are_refused_in_one_line(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="cannot read weights") as error:
        model.read_weights(tmp_path / "x.safetensors")
    assert one_plain_line(error.value)


# ------------------------------------------------------------------------------------------------------ bad numbers

def test_one_loss_that_is_not_finite_is_named_and_skipped(tmp_path, monkeypatch, capsys):
    snapshots, micro_batches = [], train.micro_batches

    def poisoned(batch, count, device):
        parts = micro_batches(batch, count, device)
        snapshots.append([p.detach().clone() for net in nets for p in net.parameters()])
        if len(snapshots) == 3:
            parts[0]["word_count"] = torch.tensor(float("nan"))
        return parts
    nets, Teacher = [], train.Teacher

    def kept_teacher(core):
        nets[:] = [core, Teacher(core)]
        return nets[1]
    monkeypatch.setattr(train, "Teacher", kept_teacher)
    monkeypatch.setattr(train, "micro_batches", poisoned)
    trained(*FEW, "--steps", 5, "--out", tmp_path)
    assert capsys.readouterr().err.count("warning: step 3: L_MLM is not finite; update skipped\n") == 1
    same = [all(map(torch.equal, a, b)) for a, b in zip(snapshots, snapshots[1:])]
    assert same == [False, False, True, False], "only the third update, the teacher's too, was skipped"
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_weights_that_blow_up_never_reach_the_checkpoint(tmp_path, monkeypatch, capsys):
    """A rate of 1e30 from the sixth step on, each step saved: the checkpoint is of before, and can go on."""
    schedule = train.cosine_schedule
    run = ("--steps", 20, "--checkpoint-every", 0, "--clip-grad", 0, "--out", tmp_path)
    monkeypatch.setattr(train, "cosine_schedule", lambda step, *rest: 1e30 if step >= 5 else schedule(step, *rest))
    with pytest.raises(UserError) as error:
        trained(*FEW, *run)
    assert "was not finite for 10 steps in a row, up to step 16" in str(error.value)
    assert f"the last good checkpoint is {tmp_path}/last.pt" in str(error.value)
    assert capsys.readouterr().err.count("update skipped") == 10
    assert load_state(tmp_path / "last.pt")["step"] == 5
    assert max(value.abs().max() for value in weights(tmp_path).values() if value.is_floating_point()) < 100
    monkeypatch.setattr(train, "cosine_schedule", schedule)
    trained(*FEW, *run)
    assert load_state(tmp_path / "last.pt")["step"] == 20 and lines(tmp_path) == 20


def test_bfloat16_follows_float32(tmp_path):
    """Four steps on CPU: each loss within 2%, the last embeddings within 5 degrees or so."""
    for precision in ("fp32", "bf16"):
        trained(*FEW, "--precision", precision, "--lr", 1e-4, "--steps", 4, "--drop-path", 0,
                "--out", tmp_path / precision)
    for exact, rough in zip(metrics(tmp_path / "fp32"), metrics(tmp_path / "bf16"), strict=True):
        for name in ("loss", "contrastive", "distillation", "mlm"):
            assert rough[name] == pytest.approx(exact[name], rel=0.02), (exact["step"], name)
    generator = torch.Generator().manual_seed(0)
    images = data.normalize(torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8, generator=generator))
    nets = [load_checkpoint(tmp_path / precision / "last.pt")[0] for precision in ("fp32", "bf16")]
    with torch.no_grad():
        a, b = (net.encode_image(images) for net in nets)
    assert (a * b).sum(dim=1).min() > 0.995


@pytest.mark.slow
def test_float16_follows_float32_and_an_overflow_halves_the_scale(tmp_path, capsys):
    """On CPU: losses of the first step within 2%.  As long as gradients overflow the update is skipped and the scale
    halved, until they fit: then their norm is float32's, and the run goes on."""
    for precision in ("fp32", "fp16"):
        trained(*FEW, "--precision", precision, "--lr", 1e-6, "--steps", 12, "--drop-path", 0,
                "--out", tmp_path / precision)
    exact, rough = (metrics(tmp_path / precision) for precision in ("fp32", "fp16"))
    for name in ("loss", "contrastive", "distillation", "mlm"):
        assert rough[0][name] == pytest.approx(exact[0][name], rel=0.02), name
    assert capsys.readouterr().err.count("update skipped") < 10
    assert rough[-1]["grad_norm"] == pytest.approx(exact[-1]["grad_norm"], rel=0.15), "the scale is taken out again"
    runtime, weight = train.Runtime(0, 1, torch.device("cpu"), "fp16", 0), torch.nn.Parameter(torch.ones(2))
    optimizer, scale = torch.optim.AdamW([weight], lr=0.1), runtime.scaler.get_scale()
    runtime.scaler.scale(weight.sum() * torch.inf).backward()
    assert not train.clip_gradient(optimizer, 0.0, runtime).isfinite() and runtime.scaler.get_scale() == scale / 2


# ------------------------------------------------------------------------------------------------------ determinism

@pytest.mark.parametrize("method", ["maskclip", "declip"])
def test_batches_do_not_depend_on_the_number_of_loader_processes(method, every_format):
    specs = tuple(word for word in every_format if word != "--data")
    options = train.TrainOptions(method=method, image_size=32, context_length=32, data=specs)
    mixed = train.open_mixed(specs, "train", "captions", 32)
    collate = train.PairCollate(options, data.BytePairTokenizer([]))
    transform = train.PairTransform(options, mixed)
    batches = [list(train_loader(mixed, transform, 12, 5, range(6), workers=n, collate=collate)) for n in (0, 1, 2)]
    for several in zip(*batches, strict=True):
        for other in several[1:]:
            assert other.keys() == several[0].keys() and other["bad"] == several[0]["bad"]
            assert all(torch.equal(value, other[name]) for name, value in several[0].items() if torch.is_tensor(value))
