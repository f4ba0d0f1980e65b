"""The run as a whole: schedules, any number of processes, accumulation, resume, checkpoints, and what users do wrong."""
import json
import os
import pickle
import shutil
import signal
import sys
import time
import types

import numpy as np
import PIL.Image
import pytest
import torch

import train
from conftest import SHARED, finish_script, needs_shared, run_script, start_script
from model import METHODS
from train import cosine_schedule, load_checkpoint, load_state, save_atomically

# a run of seconds: 24 pairs a step can be shared by 1, 2, 3 and 4 processes
SMALL = ["train.py", "--image-size", 32, "--width", 32, "--depth", 2, "--heads", 2, "--text-width", 32, "--text-depth", 2,
         "--text-heads", 2, "--embed-dim", 16, "--n-codes", 32, "--quantizer-hidden", 32, "--quantizer-bottleneck", 16,
         "--batch-size", 24, "--log-every", 1, "--data", "shapes:train=200", "--lr", 3e-3, "--drop-path", 0.2,
         "--workers", 0]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out):
    state = load_state(out / "last.pt")
    return {**state["model"], **{"teacher." + k: v for k, v in (state["teacher"] or {}).items()}}


# ------------------------------------------------------------------------------------------------------ pure functions

@pytest.mark.parametrize("step, want", [
    (0, 1e-6),                      # starts where the warm-up starts
    (5, 0.5 * (1e-6 + 1e-3)),       # half-way up
    (10, 1e-3),                     # the peak
    (55, 1e-5 + 0.5 * 9.9e-4),      # half-way down: the cosine's middle
    (100, 1e-5),                    # the last step
])
def test_cosine_schedule(step, want):
    assert cosine_schedule(step, 101, 10, 1e-3, 1e-5, 1e-6) == pytest.approx(want)


def test_weight_decay_spares_vectors_tokens_and_positions():
    from test_model import tiny
    net = tiny()
    spared = {name for name, p in net.named_parameters() if not train.decays(name, p)}
    assert {"logit_scale", "visual.cls_token", "visual.pos_embed", "text.pos_embed", "text.mask_token", "visual.norm.weight",
            "visual.blocks.0.attn.qkv.bias", "decoder.mask_token"} <= spared
    assert not spared & {"visual.patch_embed.proj.weight", "text.token_embedding.weight", "image_proj.weight"}
    groups = train.param_groups(net, 0.1)
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("seconds, want", [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05")])
def test_duration(seconds, want):
    assert train.duration(seconds) == want


def test_an_echo_of_the_signal_does_not_stop_the_saving_but_asking_again_does(monkeypatch):
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop, now = train.StopSignal(), [100.0]
        monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
        stop.note(signal.SIGTERM, None)
        now[0] += 1
        stop.note(signal.SIGTERM, None)
        assert stop.number == signal.SIGTERM
        now[0] += 10
        with pytest.raises(SystemExit) as stopped:
            stop.note(signal.SIGINT, None)
        assert stopped.value.code == 128 + signal.SIGINT
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------ log and curves

@pytest.mark.parametrize("low, high, want", [
    (0, 1560, [0, 500, 1000, 1500]), (-3, 5, [-2, 0, 2, 4]), (0.1, 0.13, [0.1, 0.11, 0.12, 0.13]),
    (7, 7.5, [7, 7.1, 7.2, 7.3, 7.4, 7.5]),
])
def test_ticks(low, high, want):
    assert train.ticks(low, high) == pytest.approx(want)


def test_curves_show_what_was_logged(tmp_path):
    """A falling line in the first panel, a rising one in the second; not a number, and constants, do no harm."""
    lines = [dict(step=i, epoch=0.1, falls=100.0 - i, rises=i ** 2, still=3.0, rare=float("nan") if i else 1.0,
                  samples_per_second=9.0) for i in range(100)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train.draw_curves(tmp_path / "m.jsonl", tmp_path / "c.png")
    pixels = np.asarray(PIL.Image.open(tmp_path / "c.png").convert("RGB")).astype(int)
    assert pixels.shape == (240, 1600, 3)
    blue = (pixels - [0x1f, 0x5f, 0xbf] == 0).all(axis=2)                               # (height, width)
    middle = [blue[:, x].nonzero()[0].mean() for x in (80, 220, 360, 480, 620, 760)]
    assert middle[0] < middle[1] < middle[2] and middle[3] > middle[4] > middle[5]
    assert middle[1] == pytest.approx((middle[0] + middle[2]) / 2, abs=10), "a straight line stays straight"
    assert middle[4] > (middle[3] + middle[5]) / 2 + 10, "a parabola does not"
    (tmp_path / "m.jsonl").write_text(json.dumps(lines[0]) + "\n")
    train.draw_curves(tmp_path / "m.jsonl", tmp_path / "one.png")


def test_tensorboard_gets_the_lines_where_it_is_installed(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            pass
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    train.Log(tmp_path, True, 10, 4, first_step=3).line(3, dict(lr=0.5))
    assert written[:2] == [(str(tmp_path / "tensorboard"), 3), ("step", 3, 3)] and ("lr", 0.5, 3) in written
    train.Log(tmp_path, False, 10, 4).line(0, dict(lr=0.5))
    assert len(written) == 4, "only the main process writes"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)                   # import raises ImportError
    train.Log(tmp_path, True, 10, 4).line(0, dict(lr=0.5))


@pytest.mark.parametrize("command", [
    ["eval_zeroshot.py"], ["eval_linear.py"], ["finetune.py"], ["dense.py", "zeroshot"], ["dense.py", "maskrcnn"],
    ["data.py", "check"],
], ids=" ".join)
def test_a_result_that_could_not_be_written_is_told_before_the_work(tmp_path, command):
    error = run_script(*command, "--json", tmp_path / "missing" / "x.json", check=2).stderr
    assert error.startswith("error: --json") and "a folder that exists" in error and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------------ exactness

def gradients(method, count, weights={"distillation": 0.05, "pixel": 0.05, "mlm": 0.05}):
    """The gradient of one step over `count` micro-batches, in float64, after its batch was prepared as in training."""
    from model import Teacher
    from test_model import tiny, SOT
    net = tiny(method, drop_path=0.0).double()
    teacher = Teacher(net) if METHODS[method]["target"] == "teacher" else None
    from test_model import captions
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
             for name in ("images", "view1", "view2")}
    batch.update(tokens=captions([3, 5, 8, 1, 2, 4, 7, 9]), tokens2=captions([3, 4, 8, 1, 2, 4, 7, 8]))
    options = train.TrainOptions(**{**train.asdict(net.config), "seed": 3})
    batch = train.hide(batch, net, SOT, 0, options, 0, 1)
    runtime = train.Runtime(0, 1, torch.device("cpu"), False, 0)
    parts = [{name: value.double() if value.is_floating_point() else value for name, value in part.items()}
             for part in train.micro_batches(batch, count, runtime.device)]
    terms, _ = train.backward(net, net, teacher, parts, weights, 0.04, runtime)
    return terms, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [2, 4, 8])
def test_accumulation_is_exact_contrast_included(method, count):
    terms, grads = gradients(method, 1)
    terms_n, grads_n = gradients(method, count)
    for name in terms:
        assert terms_n[name].item() == pytest.approx(terms[name].item(), rel=1e-10, abs=1e-12), name
    for name in grads:
        torch.testing.assert_close(grads_n[name], grads[name], atol=1e-11, rtol=1e-9, msg=lambda m: f"{name}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["clip", "maskclip", "slip", "defilip"])
def test_resumed_run_equals_undisturbed_run_to_the_bit(method, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = [*SMALL, "--method", method, "--steps", 40]
    undisturbed = start_script(*command, "--out", whole)
    interrupted = start_script(*command, "--out", parts)
    while not (parts / "metrics.jsonl").exists() or len(metrics(parts)) < 5:
        time.sleep(0.05)
    interrupted.send_signal(signal.SIGTERM)
    assert "goes on from there" in interrupted.communicate(timeout=60)[0] and interrupted.returncode == 143
    assert 5 <= load_state(parts / "last.pt")["step"] < 40
    run_script(*command, "--out", parts)
    finish_script(undisturbed)
    a, b = weights(whole), weights(parts)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert [m["loss"] for m in metrics(whole)] == [m["loss"] for m in metrics(parts)]


# ------------------------------------------------------------------------------------------------------ checkpoints

class Boom:
    def __reduce__(self):
        return os.system, ("touch boom",)


@pytest.mark.parametrize("content, remark", [
    (b"", "empty file"),
    (b"not a checkpoint", "text"),
    (pickle.dumps(Boom()), "pickle that runs a program"),
])
def test_rubbish_is_no_checkpoint(content, remark, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    with pytest.raises(train.UserError, match="not a whole checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "boom").exists(), "the pickle was run"


def test_truncated_and_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "last.pt"
    save_atomically(path, dict(model={"w": torch.zeros(1000)}))
    with pytest.raises(train.UserError, match="no pre-training checkpoint"):
        load_checkpoint(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(train.UserError, match="not a whole checkpoint"):
        load_checkpoint(path)
    with pytest.raises(train.UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "nothing.pt")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, capsys, monkeypatch):
    path = tmp_path / "last.pt"
    assert save_atomically(path, dict(step=1))

    def full(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    assert not save_atomically(path, dict(step=2))
    assert load_state(path)["step"] == 1 and os.listdir(tmp_path) == ["last.pt"]
    assert "No space left" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ as a user

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    done = run_script(*SMALL, "--steps", 3, "--out", out)
    return out, done


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(finished):
    out, done = finished
    assert "zero-shot accuracy on unseen scenes" in done.stdout and "left" in done.stdout
    config = json.loads((out / "config.json").read_text())
    assert config["method"] == "maskclip" and config["width"] == 32
    for line in metrics(out):
        assert {"step", "epoch", "loss", "lr", "samples_per_second", "contrastive", "distillation", "mlm", "momentum",
                "grad_norm", "logit_scale", "code_entropy"} <= set(line)
    assert [line["step"] for line in metrics(out)] == [0, 1, 2]
    net, tokenizer, loaded = load_checkpoint(out / "last.pt")
    assert net.encode_text(tokenizer(["a red circle"], 32)).norm().item() == pytest.approx(1.0, abs=1e-5)
    assert loaded.method == "maskclip" and not net.training


@pytest.mark.slow
@pytest.mark.parametrize("more, says", [
    (["--width", 64, "--steps", 3], "of a run with width = 32"),                 # another model in the same folder
    (["--steps", 5], "of a run with steps = 3"),                                 # another schedule
    (["--data", "shapes:train=300", "--steps", 3], "shapes:train=200"),             # other data
    (["--batch-size", 9999, "--steps", 3], "fewer than one batch"),
    (["--accumulate", 5, "--steps", 3], "does not divide"),
    (["--method", "clop"], "clip, clip+mae"),
    (["--patch-size", 7], "no multiple"),
    (["--heads", 3], "choose a divisor"),
    (["--data", "shards:/nowhere/{0..3}.tar"], "/nowhere/0.tar"),
    (["--data", "photos:x"], "shapes"),                                             # the kinds that there are
    (["--bpe", "/nowhere/merges.gz"], "/nowhere/merges.gz"),
    (["--steps", 0, "--epochs", 0.01], "--epochs 0.01 of 8 steps are not one"),
])
def test_a_mistake_is_a_user_error(more, says, finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "run")        # this process keeps the lock of the folder it runs in
    with pytest.raises(train.UserError) as error:
        train.train(train.parse_train_options([str(word) for word in (*SMALL[1:], "--out", out, *more)]))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("option, value, says", [
    ("--depth", "0", "from 1 up"), ("--patch-size", "0", "from 1 up"), ("--heads", "0", "from 1 up"),
    ("--image-size", "-8", "from 1 up"), ("--batch-size", "0", "from 1 up"), ("--seed", "-1", "from 0 to"),
    ("--lr", "nan", "from 0 up"), ("--lr", "inf", "from 0 up"), ("--lr", "-1e-3", "from 0 up"), ("--steps", "-5", "from 0 up"),
    ("--epochs", "0", "above 0"), ("--temp-s", "0", "above 0"), ("--mask-ratio", "1", "from 0 to 0.99"),
    ("--beta2", "1", "from 0 to"), ("--utilization", "1.5", "above 0 to 1"), ("--workers", "-2", "from -1 up"),
])
def test_a_number_that_cannot_be_is_refused(option, value, says):
    with pytest.raises(train.UserError, match=f"{option} must be a number {says}") as told:
        train.parse_train_options([f"{option}={value}"])
    assert "\n" not in str(told.value)


def test_a_long_step_is_not_silent(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    log, said = train.Log(tmp_path, True, 1000, 4), []
    for step in range(1000):
        now[0] += 3.0
        log.pulse(step) if (step + 1) % 100 else log.line(step, dict(lr=0.5))
        if capsys.readouterr().out:
            said.append(now[0])
    gaps = [b - a for a, b in zip([0.0, *said], said)]
    assert max(gaps[:5]) <= 9 and max(gaps) <= 63, "soon at first, later once a minute"
    assert len(said) < 100 and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 10
    log.pulse(999)
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_a_user_error_ends_in_one_line():
    done = run_script(*SMALL, "--heads", 3, check=2)
    assert done.stderr.splitlines() == ["error: width 32 cannot be cut into 3 attention heads: choose a divisor of 32"]


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(finished):
    before = (finished[0] / "last.pt").read_bytes()
    done = run_script(*SMALL, "--steps", 3, "--out", finished[0])
    assert "step 1/3" not in done.stdout and (finished[0] / "last.pt").read_bytes() == before


@pytest.mark.slow
@needs_shared
def test_real_pairs_train_with_clips_merges(tmp_path):
    out = tmp_path / "real"
    run_script(*SMALL, "--data", f"shards:{SHARED}/pairs/{{00000..00001}}.tar", "--bpe",
               SHARED / "bpe_simple_vocab_16e6.txt.gz", "--method", "clip", "--steps", 2, "--out", out)
    net, tokenizer, config = load_checkpoint(out / "last.pt")
    assert config.vocab_size == tokenizer.vocab_size == 49408
