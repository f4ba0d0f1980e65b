"""train.py --plan: its memory and FLOPs against those of a step, its table against sums by hand."""
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

import model
import train
from conftest import ROOT
from data import UserError
from model import PAPER, Cost, preset_for

SMALL = replace(PAPER, image_size=64, patch_size=8, width=192, depth=6, heads=6, text_width=128, text_depth=2,
                text_heads=4, context_length=32, vocab_size=2000, embed_dim=64, n_codes=512, quantizer_hidden=256,
                quantizer_bottleneck=64, text_decoder_depth=1)


@pytest.fixture
def planned(capsys, monkeypatch):
    """What the script says with --plan and these options."""
    def run(arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", "--plan", *arguments.split()])
        train.main()
        return capsys.readouterr().out
    return run


def number(words: str, out: str) -> float:
    return float(re.search(words + r" +([\d.,]+)", out)[1].replace(",", ""))


def known(config, bf16=False):
    """In place of model.costs: sums that a head can follow."""
    return [Cost("image tower", 80_000_000, 30e9, 90e9, 4e8), Cost("text tower", 20_000_000, 10e9, 30e9, 1e8),
            Cost("masked image", 10_000_000, 5e9, 15e9, 1e8), Cost("teacher", 0, 30e9, 30e9, 0.0),
            Cost("all", 110_000_000, 75e9, 165e9, 6e8)]


def test_plan_is_the_sum_it_says(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "costs", known)
    monkeypatch.chdir(tmp_path)
    run = "--preset vit-b16-yfcc15m --gpus 8 --gpu a100 --utilization 0.5"
    out = planned(run)
    assert list(tmp_path.iterdir()) == [], "nothing is trained"
    assert number("steps", out) == 25 * (15_000_000 // 4096)
    assert number("FLOPs", out) == pytest.approx(4096 * 165e9 / 1e15, abs=0.005)
    seconds = 4096 * 165e9 / (8 * 312e12 * 0.5)
    assert number("a step", out) == pytest.approx(seconds, abs=0.0005)
    assert number("time", out) == pytest.approx(25 * 3662 * seconds / 3600, abs=0.05)
    # weight, gradient and Adam's two averages in 4 bytes each, bf16's weight in 2; the teacher's weights in 4
    assert number("states", out) == pytest.approx((18 * 0.11 + 4 * 0.09), abs=0.05)
    assert number("activations of 512 pairs", out) == pytest.approx(512 * 0.6, abs=0.05)
    assert number("logits", out) == pytest.approx(12 * 49408 * 4096 / 1e9, abs=0.05)
    assert "does not fit a100: give --accumulate 8 or more --gpus or another --gpu" in out
    parts = planned(f"{run} --accumulate 8")
    assert "does not fit" not in parts and number("activations of 64 pairs", parts) == pytest.approx(38.4, abs=0.05)
    assert number("FLOPs", parts) == pytest.approx(4096 * (165e9 + 40e9) / 1e15, abs=0.005), "the towers twice"


@pytest.mark.slow
def test_plan_of_the_papers_run(planned):
    """Image tower 12 x 197 tokens: 35.1 GFLOPs whole, as timm's and DeiT's tables count ViT-B/16 (17.6 GMACs)."""
    image = 12 * 197 * (24 * 768 ** 2 + 4 * 197 * 768) + 196 * 2 * 768 * 768
    assert image == pytest.approx(2 * 17.57e9, rel=0.005)
    text = 12 * 77 * (24 * 512 ** 2 + 4 * 77 * 512)
    out = planned("--preset vit-b16-yfcc15m --method clip --pool mean")
    # attention's backward computes its scores again: a fifth product beside two of each of forward's two
    assert number("FLOPs", out) == pytest.approx(4096 * 3 * (image + text) / 1e15, rel=0.02)


def test_a_batch_that_cannot_be_shared_has_no_plan(planned):
    with pytest.raises(UserError, match="multiple of 7"):
        planned("--preset vit-b16-yfcc15m --gpus 7")


@pytest.mark.slow
def test_memory_has_states_of_student_and_teacher_and_activations_of_a_micro_batch():
    config = preset_for("pocket", "maskclip")
    net = model.build(config, 700)
    P, teacher = (sum(p.numel() for p in part.parameters()) for part in (net, model.Teacher(net)))
    rows = model.costs(config)
    whole, half = (train.step_memory(config, n, rows) for n in (128, 64))
    assert whole["activations"] == 2 * half["activations"] and whole["states"] == half["states"]
    assert whole["states"] == pytest.approx(16 * P + 4 * teacher, rel=0.05)
    assert train.step_memory(config, 1, rows, half=True)["states"] == whole["states"] + 2 * P
    halved = model.costs(config, bf16=True)[-1].kept / rows[-1].kept
    assert 0.5 < halved < 0.75, "what norms and sums keep stays in float32"


STEP = """
import json, sys, time
from dataclasses import asdict, replace
from pathlib import Path
sys.path[:0] = ["tests", "."]
import torch, model, train
from test_model import TOKENS, captions
torch.set_num_threads(1)

def memory(which):
    return 1024.0 * int(Path("/proc/self/status").read_text().split(which)[1].split()[0])

def steps(config, B, count):
    torch.manual_seed(0)
    net = model.build(config, 767)
    teacher = model.Teacher(net) if model.METHODS[config.method]["predicts"] == "teacher" else None
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
    runtime, size = train.Runtime(0, 1, torch.device("cpu"), False, 0), config.image_size
    batch = dict(images=torch.zeros(B, 3, size, size, dtype=torch.uint8), tokens=captions([30] * B))
    for number in range(2):
        started = time.process_time()
        parts = train.micro_batches(train.hide(batch, config, TOKENS, number, 0), count, runtime.device)
        optimizer.zero_grad()
        if count == 1:
            train.backward(net, net, teacher, parts[0], runtime)
        else:
            train.backward_in_parts(net, net, teacher, parts, runtime)
        optimizer.step()
    return time.process_time() - started

config, (B, count) = model.Config(**json.loads(sys.argv[1])), map(int, sys.argv[2:])
steps(replace(config, depth=1, text_depth=1), 2, 1)         # a process loads libraries when it first computes
before = memory("VmRSS:")
print(json.dumps(dict(seconds=steps(config, B, count), before=before, peak=memory("VmHWM:"))))
"""


def two_steps(config: model.Config, B: int, count: int = 1) -> dict[str, float]:
    """Two steps of `count` micro-batches in a process of their own: CPU seconds of the second, and bytes."""
    done = subprocess.run([sys.executable, "-c", STEP, json.dumps(asdict(config)), f"{B}", f"{count}"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("method", ["clip", "maskclip"])
def test_memory_is_that_of_a_step(method):
    """Within 25%: the allocator's slack, and what exists for the time of one operation, are in no sum."""
    config, B = replace(SMALL, method=method), 96
    need, got = train.step_memory(config, B, model.costs(config)), two_steps(config, B)
    assert got["peak"] - got["before"] == pytest.approx(sum(need.values()), rel=0.25), (need, got)


@pytest.mark.soak
@pytest.mark.slow
def test_time_and_memory_of_accumulation():
    """The table of docs/SPEED.md: a step of ViT-B/32 at batch 64 in 1, 2, 4 and 8 micro-batches."""
    config, B = preset_for("vit-b32-yfcc15m", "maskclip"), int(os.environ.get("BATCH", 64))
    table = {count: two_steps(config, B, count) for count in (1, 2, 4, 8)}
    print(f"\n| N of batch {B} | CPU seconds a step | GiB at its peak |\n|---|---|---|")
    for count, row in table.items():
        print(f"| {count} | {row['seconds']:.0f} | {row['peak'] / 2 ** 30:.1f} |")
    peaks = [row["peak"] for row in table.values()]
    assert peaks == sorted(peaks, reverse=True), "smaller parts take less memory"
    assert table[8]["seconds"] < 2.0 * table[1]["seconds"], "one more forward, not one more step"
