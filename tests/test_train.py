"""The run: schedules, a step in any number of parts and processes, going on, checkpoints, what users do wrong."""
import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import sys
import threading
import types
from functools import partial
from unittest import mock

import numpy as np
import PIL.Image
import pytest
import torch

import data
import train
from conftest import SHARED, needs_shared, on_processes
from model import METHODS, Teacher
from test_model import TOKENS, captions, tiny
from train import cosine_schedule, load_checkpoint, load_state, save_atomically

# a run of seconds: 24 pairs a step can be shared by 1, 2, 3 and 4 processes
SMALL = ["train.py", "--image-size", 32, "--width", 32, "--depth", 2, "--heads", 2, "--text-width", 32,
         "--text-depth", 2, "--text-heads", 2, "--embed-dim", 16, "--n-codes", 32, "--quantizer-hidden", 32,
         "--quantizer-bottleneck", 16, "--batch-size", 24, "--log-every", 1, "--data", "shapes:train=200",
         "--lr", 3e-3, "--drop-path", 0.2, "--workers", 0]
BARE = [word for word in map(str, SMALL) if word not in ("--data", "shapes:train=200")]
ALONE = train.Runtime(0, 1, torch.device("cpu"), False, 0)


def options_of(*arguments) -> train.TrainOptions:
    """SMALL's with changes; --data takes the place of SMALL's"""
    words = BARE if "--data" in arguments else SMALL
    return train.parse_train_options([str(word) for word in (*words[1:], *arguments)])


@contextlib.contextmanager
def signals_kept():
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def trained(*arguments):
    """A run here and now, without its last lines."""
    with signals_kept(), mock.patch.object(train, "finish"):
        train.train(options_of(*arguments))


def trained_until(step: int, *arguments):
    """The same, asked to stop while it does this step."""
    hide = train.hide

    def stopping(batch, c, tokenizer, now, *rest):
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return hide(batch, c, tokenizer, now, *rest)
    with mock.patch.object(train, "hide", stopping), pytest.raises(SystemExit) as end:
        trained(*arguments)
    assert end.value.code == 128 + signal.SIGTERM


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


def test_every_draw_depends_on_seed_and_step():
    """torch's generator on a CPU heeds 32 bits of its seed: that of a step must not be the step alone."""
    assert len({data.seed_of(seed, step) for seed in range(50) for step in range(50)}) == 2500
    assert all(0 <= data.seed_of(*numbers) < 2 ** 32 for numbers in [(0,), (2 ** 31, 10 ** 6, 1)])
    net = tiny()
    batch = dict(images=torch.zeros(8, 3, 32, 32, dtype=torch.uint8), tokens=captions([5] * 8, 12))
    drawn = [train.hide(batch, net.config, TOKENS, step, seed) for seed, step in ((0, 5), (0, 5), (1, 5), (0, 6))]
    for name in ("keep", "corrupted"):
        same = [torch.equal(drawn[0][name], other[name]) for other in drawn[1:]]
        assert same == [True, False, False], name


def test_weight_decay_spares_vectors_tokens_and_positions():
    net = tiny()
    spared = {name for name, p in net.named_parameters() if not train.decays(name, p)}
    assert {"logit_scale", "visual.cls_token", "visual.pos_embed", "text.pos_embed", "text.mask_token",
            "visual.norm.weight", "visual.blocks.0.attn.qkv.bias", "decoder.mask_token"} <= spared
    assert not spared & {"visual.patch_embed.proj.weight", "text.token_embedding.weight", "image_proj.weight"}
    groups = train.param_groups(net, 0.1)
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in net.parameters())


def test_an_echo_of_the_signal_does_not_stop_the_saving_but_asking_again_does(monkeypatch):
    with signals_kept():
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


# ------------------------------------------------------------------------------------------------------ log and curves

def test_curves_show_what_was_logged(tmp_path):
    """A panel a number; not a number, and constants, do no harm.  A line and a parabola, left, middle and right."""
    lines = [dict(step=i, epoch=0.1, falls=100.0 - i, still=3.0, rare=float("nan") if i else 1.0,
                  samples_per_second=9.0) for i in range(100)]
    log = tmp_path / "m.jsonl"
    for some in (lines, lines[:1]):
        log.write_text("".join(json.dumps(line) + "\n" for line in some))
        width, height = train.draw_curves(log, columns=2).size
        assert width > 2 * 380 and height > 2 * 190, "three panels in two rows"

    def heights(values):
        pixels = np.asarray(train.draw_curve(list(enumerate(values, start=1)))).astype(int)
        blue = (pixels - [0x1f, 0x5f, 0xbf] == 0).all(axis=2)                           # (height, width)
        return [blue[:, x].nonzero()[0].mean() for x in (70, 190, 310)]
    left, middle, right = heights([100.0 - i for i in range(100)])
    assert left < middle < right and middle == pytest.approx((left + right) / 2, abs=6), "a line stays straight"
    left, middle, right = heights([i ** 2 for i in range(100)])
    assert left > middle > right and middle > (left + right) / 2 + 10, "a parabola does not"


def test_a_picture_that_fails_costs_one_line(tmp_path, capsys):
    train.show("x.png", tmp_path, lambda: PIL.Image.new("RGB", (8, 8)))
    assert (tmp_path / "x.png").exists() and capsys.readouterr().out == f"x: {tmp_path}/x.png\n"
    train.show("y.png", tmp_path, train.draw_curves, tmp_path / "missing.jsonl")
    error = capsys.readouterr().err
    assert error.startswith("warning: no y.png: ") and error.count("\n") == 1


def test_a_long_step_is_not_silent(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    log, said = train.Log(tmp_path, True, 1000, 4), []
    for step in range(1000):
        now[0] += 3.0
        if log.is_due(step, 100):
            log.line(step, dict(lr=0.5))
        if capsys.readouterr().out:
            said.append(now[0])
    gaps = [b - a for a, b in zip([0.0, *said], said)]
    assert max(gaps[:5]) <= 9 and max(gaps) <= 63, "soon at first, later once a minute"
    assert len(said) < 100 and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 10
    assert log.is_due(999, 7), "the last step has a line"


# ------------------------------------------------------------------------------------------------------ one step

def one_step(method: str, count: int, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    """Terms, gradients and center after a step of 8 pairs, prepared as in training, over `count` micro-batches on each
    of `world` processes, in float64."""
    net, runtime = tiny(method).double(), train.Runtime(rank, world, torch.device("cpu"), False, 0)
    teacher = Teacher(net).double() if METHODS[method]["predicts"] == "teacher" else None
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
             for name in ("images", "view1", "view2")}
    batch.update(tokens=captions([3, 5, 8, 1, 2, 4, 7, 9]), tokens2=captions([3, 4, 8, 1, 2, 4, 7, 8]))
    batch = {name: value.chunk(world)[rank] for name, value in batch.items()}
    parts = [{name: value.double() if value.is_floating_point() else value for name, value in part.items()} for part in
             train.micro_batches(train.hide(batch, net.config, TOKENS, 0, 3, rank, world), count, runtime.device)]
    model = train.wrap(net, runtime)
    if count == 1:
        terms, answers = train.backward(model, net, teacher, parts[0], runtime)
    else:
        terms, answers = train.backward_in_parts(model, net, teacher, parts, runtime)
    if teacher:
        teacher.update_center(answers, 0.9)
    gradients = {f"gradient of {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {**terms, **gradients, **({"center": teacher.center} if teacher else {})}


def assert_same(got: dict, want: dict):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-11, rtol=1e-9, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_accumulation_is_exact_contrast_and_center_included(method, count):
    want = one_step(method, 1)
    assert METHODS[method]["predicts"] != "teacher" or want["center"].abs().max() > 1e-3
    assert_same(one_step(method, count), want)


def as_one_of_several(out, rank, world) -> dict:
    """Some steps, and then the whole script as torchrun starts it."""
    steps = {f"{method}, {count}": one_step(method, count, rank, world)
             for method in ("maskclip", "declip") for count in (1, 2)}
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{world}", LOCAL_WORLD_SIZE=f"{world}")
    said, sys.argv = io.StringIO(), [*map(str, [*SMALL, "--steps", 3, "--out", out])]
    with contextlib.redirect_stdout(said):
        train.main()
    return dict(steps=steps, said=said.getvalue())


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder of the run, and what each process returned."""
    out = tmp_path_factory.mktemp("run")
    return out, on_processes(partial(as_one_of_several, out), 2, tmp_path_factory.mktemp("meeting"))


def test_two_processes_make_the_step_of_one(two_processes):
    """Gradients, which DistributedDataParallel has averaged, and center of the joined batch; terms are shares of it."""
    one, other = (process["steps"] for process in two_processes[1])
    for name in one:
        got = {key: (value + other[name][key]) / 2 if key in ("L_I", "L_T", "L_Dist", "L_MLM", "neighbor", "simsiam")
               else value for key, value in one[name].items()}
        assert_same(got, one_step(name.partition(",")[0], 1))


def test_blocks_that_are_skipped_depend_on_seed_and_step(tmp_path, monkeypatch):
    net, backward, seeds = tiny("clip", drop_path=0.5), train.backward, []
    batch = dict(images=torch.zeros(8, 3, 32, 32, dtype=torch.uint8), tokens=captions([3] * 8))
    batch = train.micro_batches(train.hide(batch, net.config, TOKENS, 0, 3), 1, ALONE.device)[0]
    first, again, other = (backward(net, net, None, batch, ALONE, seed)[0]["L_I"] for seed in (5, 5, 6))
    assert first == again != other

    def noting(*arguments):
        seeds.append(arguments[-1])
        return backward(*arguments)
    monkeypatch.setattr(train, "backward", noting)
    for seed in (0, 1):
        trained("--method", "clip", "--steps", 2, "--seed", seed, "--out", tmp_path / str(seed))
    assert len(set(seeds)) == 4, "two steps each of two seeds"


# ------------------------------------------------------------------------------------------------------ going on

@pytest.mark.parametrize("method, more", [
    ("maskclip", []), pytest.param("maskclip", ["--accumulate", 2], marks=pytest.mark.slow), ("declip", []),
    *(pytest.param(method, [], marks=pytest.mark.slow) for method in METHODS if method not in ("maskclip", "declip"))])
def test_resumed_run_equals_undisturbed_run_to_the_bit(method, more, tmp_path, capsys):
    run = ["--method", method, *more, "--steps", 6]
    trained(*run, "--out", tmp_path / "whole")
    trained_until(2, *run, "--out", tmp_path / "parts")
    assert load_state(tmp_path / "parts" / "last.pt")["step"] == 3
    assert "stopped after step 3; the same command goes on from there" in capsys.readouterr().out
    trained(*run, "--out", tmp_path / "parts")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert [m["loss"] for m in metrics(tmp_path / "whole")] == [m["loss"] for m in metrics(tmp_path / "parts")]


def test_the_best_is_kept_over_a_stop_and_no_weights_whose_loss_is_nan(tmp_path):
    """Accuracies .9 .8 .7, a stop, .3 .2 .1: best.pt stays that of the first test."""
    right, label = iter((9, 8, 7, 3, 2, 1)), torch.arange(10)

    def guess(*_):
        return torch.where(label < next(right), label, -1), label
    run = ["--method", "clip", "--steps", 6, "--eval-every", 0.01, "--keep-best", "--keep-every", 0.01,
           "--out", tmp_path]
    with mock.patch.object(train, "guess_classes", guess):
        trained_until(2, *run)
        trained(*run)
    assert load_state(tmp_path / "best.pt")["step"] == 1 and load_state(tmp_path / "last.pt")["best"] == 0.9
    assert [load_state(tmp_path / f"step-{n}.pt")["step"] for n in range(1, 7)] == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.glob("*.tmp"))
    refused = mock.patch.object(train.Guard, "accepts", lambda self, *_: setattr(self, "refused", 1))
    with refused, mock.patch.object(train.Guard, "end", lambda *_: None), contextlib.suppress(AttributeError):
        trained("--method", "clip", "--steps", 2, "--keep-every", 0.01, "--log-every", 9, "--out", tmp_path / "nan")
    assert not list((tmp_path / "nan").glob("step-*"))
    tests = train.Tests(options_of(*run), 1, types.SimpleNamespace(state=None))
    with mock.patch.object(train, "guess_classes", lambda *_: (label, label)):
        assert tests.after(0, None, None, types.SimpleNamespace(refused=1, runtime=ALONE)) == {"zeroshot": 1.0}
    assert tests.best == 0, "what is not saved is not the best"


def test_a_run_from_a_named_checkpoint_says_how_to_go_on(tmp_path, capsys):
    trained("--method", "clip", "--steps", 2, "--out", tmp_path / "a")
    run = ["--method", "clip", "--steps", 6, "--out", tmp_path / "b", "--resume", tmp_path / "a" / "last.pt"]
    trained_until(3, *run)
    said = capsys.readouterr().out
    assert f"going on from step 2 of {tmp_path}/a/last.pt" in said
    assert "stopped after step 4; the same command goes on from there" in said
    trained(*run)
    assert f"going on from step 4 of {tmp_path}/b/last.pt" in capsys.readouterr().out


def test_lines_that_a_full_disk_spoiled_are_passed_over(tmp_path):
    run = ["--method", "clip", "--out", tmp_path]
    trained(*run, "--steps", 2)
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 3, "lr": 4.1{"step": 9, "lr": 1.0}\n\xff\xfe\n')
    trained(*run, "--steps", 4)
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1, 2, 3]
    log.write_bytes(log.read_bytes() + b'{"step"')
    assert train.draw_curves(log).size[0] > 0


def test_a_run_whose_first_weights_have_moved_goes_on(tmp_path):
    trained("--method", "clip", "--steps", 1, "--out", tmp_path / "a")
    run = ["--method", "clip", "--steps", 6, "--out", tmp_path / "b", "--init"]
    trained_until(2, *run, tmp_path / "a" / "last.pt")
    (tmp_path / "a").rename(tmp_path / "c")
    trained(*run, tmp_path / "c" / "last.pt")
    assert load_state(tmp_path / "b" / "last.pt")["step"] == 6
    shutil.copy(tmp_path / "b" / "last.pt", tmp_path / "c" / "other.pt")
    with pytest.raises(train.UserError, match="is of a run with init"):
        trained(*run, tmp_path / "c" / "other.pt")


def test_a_start_from_a_checkpoint_keeps_its_words_and_all_that_both_have(tmp_path, capsys):
    """FILIP's embedding has another size than the option says; a word's row in the table is its number."""
    (tmp_path / "merges").write_text("#version\n" + "\n".join(f"{a} {b}" for a in "xyz" for b in "qwv"))
    run = ["--method", "filip", "--token-dim", 8, "--steps", 1, "--out"]
    trained(*run, tmp_path / "a")
    trained(*run, tmp_path / "b", "--lr", 0, "--lr-start", 0, "--lr-end", 0, "--init", tmp_path / "a" / "last.pt",
            "--bpe", tmp_path / "merges")
    assert "fresh: none" in capsys.readouterr().out
    old, new = (load_checkpoint(tmp_path / name / "last.pt") for name in "ab")
    assert old[1].encode("a red circle") == new[1].encode("a red circle") and len(old[1].merges) != 9
    assert all(torch.equal(x, new[0].state_dict()[name]) for name, x in old[0].state_dict().items())
    with pytest.raises(train.UserError, match="has embed_dim 8, this run 4: give --token-dim 8"):
        trained(*run, tmp_path / "c", "--init", tmp_path / "a" / "last.pt", "--token-dim", 4)


def test_batch_norms_of_heads_see_the_whole_batch_of_micro_batches_of_one(tmp_path):
    run = ["--method", "slip", "--steps", 1, "--batch-size", 4, "--drop-path", 0, "--out"]
    trained(*run, tmp_path / "whole")
    trained(*run, tmp_path / "parts", "--accumulate", 4)
    a, b = (metrics(tmp_path / name)[0] for name in ("whole", "parts"))
    assert all(b[name] == pytest.approx(a[name], rel=1e-4) for name in ("loss", "contrastive", "grad_norm"))
    with pytest.raises(train.UserError, match="want 2 pairs or more"):
        trained("--method", "slip", "--steps", 1, "--batch-size", 1, "--out", tmp_path / "one")


def test_home_is_found_at_first_look_too():
    """As bash leaves it in --out=~/runs"""
    asked = train.first_look(train.TrainOptions, ["--out=~/runs", "--method", "clip"], "out", "method", "preset")
    assert vars(asked) == dict(out=os.path.expanduser("~/runs"), method="clip", preset="pocket")


def test_after_training_a_signal_ends_the_program_at_once(tmp_path):
    with signals_kept(), mock.patch.object(train, "finish", lambda *_: os.kill(os.getpid(), signal.SIGINT)):
        with pytest.raises(KeyboardInterrupt):
            train.train(options_of("--method", "clip", "--steps", 1, "--out", tmp_path))
    assert signal.alarm(0) == 0


def test_the_scale_of_fp16_goes_on(tmp_path):
    run = ["--method", "clip", "--steps", 6, "--precision", "fp16"]
    make = partial(torch.amp.GradScaler, growth_interval=2)
    with mock.patch.object(torch.amp, "GradScaler", make):
        trained(*run, "--out", tmp_path / "whole")
        trained_until(2, *run, "--out", tmp_path / "parts")
        trained(*run, "--out", tmp_path / "parts")
    a, b = (load_state(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert a["scaler"] == b["scaler"] and a["scaler"]["scale"] != 2.0 ** 14
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


@pytest.mark.slow
def test_compiled_parts_are_the_whole(tmp_path):
    for name, more in (("whole", []), ("parts", ["--compile", "--accumulate", 2])):
        trained("--method", "clip", "--drop-path", 0, "--steps", 2, "--out", tmp_path / name, *more)
    want, got = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("whole", "parts"))
    assert got == pytest.approx(want, rel=1e-4)


# ------------------------------------------------------------------------------------------------------ checkpoints

def test_what_is_no_checkpoint_is_told(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(train.UserError, match="no checkpoint at .*; make one with: torchrun train.py"):
        load_checkpoint(path)
    save_atomically(path, dict(model={"w": torch.zeros(1000)}))
    with pytest.raises(train.UserError, match="does not fit its own config"):
        load_checkpoint(path)
    save_atomically(path, dict(kind="upernet", model={"w": torch.zeros(1000)}))
    with pytest.raises(train.UserError, match="holds a upernet run, wanted a pretraining run: what train.py wrote"):
        load_checkpoint(path)
    assert load_state(path, "upernet")["kind"] == "upernet"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(train.UserError, match="not a whole checkpoint"):
        load_checkpoint(path)


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

def test_a_run_leaves_what_it_promises(two_processes):
    out, (main, other) = two_processes
    assert "zero-shot accuracy on unseen scenes" in main["said"] and "left" in main["said"]
    assert main["said"].splitlines()[-1].startswith(f"next:  python eval_zeroshot.py {out}/last.pt")
    assert other["said"] == "", "one process speaks"
    names = {path.name for path in out.iterdir()}
    assert names >= {"last.pt", "config.json", "metrics.jsonl", "curves.png", "step.png"}, "pictures are drawn alone"
    config = json.loads((out / "config.json").read_text())
    assert config["method"] == "maskclip" and config["width"] == 32
    for line in metrics(out):
        assert {"step", "epoch", "loss", "lr", "samples_per_second", "contrastive", "distillation", "mlm", "momentum",
                "grad_norm", "logit_scale", "code_entropy"} <= set(line)
        assert line["loss"] == pytest.approx(
            line["contrastive"] + 0.05 * line["distillation"] + 0.05 * line["mlm"], rel=1e-5), "Eq. 8"
    assert [line["step"] for line in metrics(out)] == [0, 1, 2]
    net, tokenizer, loaded = load_checkpoint(out / "last.pt")
    assert net.encode_text(tokenizer(["a red circle"], 32)).norm().item() == pytest.approx(1.0, abs=1e-5)
    assert loaded.method == "maskclip" and not net.training and net.trained_on == ("shapes:train=200",)


def test_a_finished_run_goes_on_longer_elsewhere_and_as_the_start_of_another(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    world = data.ShapesWorld(count=32, size=32)
    for i in range(len(world)):
        world.read(i).image.save(tmp_path / "a" / f"{i}.png")
    (tmp_path / "a" / "t.csv").write_text(
        "filepath,title\n" + "".join(f'{i}.png,"{world.scene(i).caption}"\n' for i in range(32)))

    def run(folder, *more):
        capsys.readouterr()
        trained("--data", f"csv:{tmp_path}/{folder}/t.csv", "--batch-size", 8, "--method", "clip", *more)
        return capsys.readouterr().out
    out = tmp_path / "out"
    run("a", "--epochs", 1, "--out", out)
    (tmp_path / "a").rename(tmp_path / "b")                             # the data are the same, in another place
    said = run("b", "--epochs", 2, "--out", out)
    assert "going on from step 4" in said and "was to have 4 steps, this one has 8" in said
    assert [line["step"] for line in metrics(out)][-1] == 7
    said = run("b", "--epochs", 2, "--out", tmp_path / "whole", "--resume", out / "last.pt")
    assert load_state(tmp_path / "whole" / "last.pt")["step"] == 8, "with nothing left to do it is saved all the same"
    with pytest.raises(train.UserError, match="last.pt has done 8 steps, more than the 4 asked for"):
        run("b", "--epochs", 1, "--out", out)
    assert load_state(out / "last.pt")["step"] == 8
    with pytest.raises(train.UserError, match=f"--init {out}/last.pt to begin with its weights"):
        run("b", "--lr", 1, "--out", out)
    said = run("b", "--epochs", 1, "--lr", 0, "--lr-end", 0, "--lr-start", 0, "--init", out / "last.pt", "--method",
               "maskclip", "--out", tmp_path / "next")
    assert "fresh: decoder, quantizer, text, text_decoder" in said
    old, new = weights(out), weights(tmp_path / "next")
    assert all(torch.equal(new[name], value) for name, value in old.items() if name != "logit_scale")


@pytest.mark.parametrize("more, says", [
    (["--width", 64, "--steps", 3], "of a run with width = 32"),                 # another model in the same folder
    (["--lr", 5, "--steps", 3], "of a run with lr = "),                          # another schedule
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
    (["--init", "nothing:x"], "timm:FILE"),
    (["--compile", "--accumulate", 2], "leave one out, or --drop-path"),
    (["--mask-ratio", 0], "--mask-ratio that hides one of 16 patches or more (got 0.0)"),
    (["--width", 18, "--heads", 3], "--width that 4 divides (got 18)"),
    (["--keep-best"], "say with --eval-every how often to test"),
])
def test_a_mistake_is_a_user_error(more, says, two_processes, tmp_path):
    out = shutil.copytree(two_processes[0], tmp_path / "run")   # this process keeps the lock of the folder it runs in
    with pytest.raises(train.UserError) as error:
        trained(*more, "--out", out)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_finished_run_is_not_trained_again(two_processes, tmp_path, capsys):
    out = shutil.copytree(two_processes[0], tmp_path / "run")
    trained("--steps", 3, "--out", out)
    assert "step 1/3" not in capsys.readouterr().out
    assert (two_processes[0] / "last.pt").read_bytes() == (out / "last.pt").read_bytes()


@pytest.mark.parametrize("option, value, says", [
    ("--depth", "0", "from 1 up"), ("--patch-size", "0", "from 1 up"), ("--heads", "0", "from 1 up"),
    ("--image-size", "-8", "from 1 up"), ("--batch-size", "0", "from 1 up"), ("--seed", "-1", "from 0 to"),
    ("--lr-end", "nan", "from 0 up"), ("--lr-end", "inf", "from 0 up"), ("--lr-end", "-1e-3", "from 0 up"),
    ("--steps", "-5", "from 0 up"), ("--epochs", "0", "above 0"),
    ("--temp-s", "0", "above 0"), ("--mask-ratio", "1", "from 0 to 0.99"), ("--beta2", "1", "from 0 to"),
    ("--utilization", "1.5", "above 0 to 1"),
    ("--workers", "-2", "from -1 up"),
])
def test_a_number_that_cannot_be_is_refused(option, value, says):
    with pytest.raises(train.UserError, match=f"{option} must be a number {says}") as told:
        train.parse_train_options([f"{option}={value}"])
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("arguments, says", [
    (["--heads", "5"], "width 128 cannot be cut into 5 attention heads: choose a divisor of 128"),
    (["--lr", "fast"], "argument --lr: invalid float value: 'fast'; see --help"),
    (["--gpu", "abacus"], "argument --gpu: invalid choice: 'abacus'"),
    (["--presett", "pocket"], "unrecognized arguments: --presett pocket; see --help"),
    (["--preset", "huge"], "argument --preset: invalid choice: 'huge'"),
    (["--lr"], "argument --lr: expected one argument; see --help"),
])
def test_a_wrong_command_line_ends_in_one_line_and_status_2(arguments, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as end:
        train.run(train.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(f"error: {says}") and error.count("\n") == 1


@pytest.mark.parametrize("command", [
    "eval_zeroshot", "eval_linear", "finetune", "dense zeroshot", "dense maskrcnn", "data check"])
def test_a_result_that_could_not_be_written_is_told_before_the_work(tmp_path, command, monkeypatch):
    module, *task = command.split()
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *task, "--json", str(tmp_path / "missing" / "x.json")])
    with pytest.raises(train.UserError, match="^--json .*a folder that exists"):
        importlib.import_module(module).main()


@needs_shared
def test_real_pairs_train_with_clips_merges(tmp_path):
    trained("--data", f"shards:{SHARED}/pairs/{{00000..00001}}.tar", "--bpe", SHARED / "bpe_simple_vocab_16e6.txt.gz",
            "--method", "clip", "--steps", 2, "--out", tmp_path)
    net, tokenizer, config = load_checkpoint(tmp_path / "last.pt")
    assert config.vocab_size == tokenizer.vocab_size == 49408


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """What reaches the disk is of the step it was asked at, however late; the last one is waited for."""
    net, saved, may_write = torch.nn.Linear(2, 2), [], threading.Event()

    def slow(path, state):
        assert may_write.wait(10)
        saved.append((state["step"], state["model"]["weight"].clone()))
        return True
    monkeypatch.setattr(train, "save_atomically", slow)
    guard = train.Guard(None, ALONE, None, 3, train.Start(tmp_path, None),
                        lambda step, bad: dict(step=step, model=net.state_dict()))
    before = net.weight.detach().clone()
    assert guard.write(1, wait=False) and not saved
    with torch.no_grad():
        net.weight.add_(1)
    may_write.set()
    assert guard.write(2) and [step for step, _ in saved] == [1, 2]
    assert torch.equal(saved[0][1], before) and torch.equal(saved[1][1], before + 1)
