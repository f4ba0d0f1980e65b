"""train.py --plan: its memory and traffic against what a step is seen to take, its table against sums by hand."""
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

import model
import train
from conftest import ROOT, run_script
from data import UserError
from model import PAPER, PRESETS, preset_for

SMALL = replace(PAPER, image_size=64, patch_size=8, width=192, depth=6, heads=6, text_width=128, text_depth=2,
                text_heads=4, context_length=32, vocab_size=2000, embed_dim=64, n_codes=512, quantizer_hidden=256,
                quantizer_bottleneck=64, text_decoder_depth=1, batch_size=32)


def planned(capsys, arguments: str) -> str:
    train.plan(train.parse_train_options(arguments.split()))
    return capsys.readouterr().out


def test_plan_of_the_papers_run(capsys):
    """Image tower 12 x 197 tokens: 35.1 GFLOPs whole, as timm's and DeiT's tables count ViT-B/16 (17.6 GMACs)."""
    out = planned(capsys, "--preset vit-b16-yfcc15m --method clip --pool mean --gpus 32 --gpu a100 --utilization 0.5")
    image = 12 * 197 * (24 * 768 ** 2 + 4 * 197 * 768) + 196 * 2 * 768 * 768
    assert image == pytest.approx(2 * 17.57e9, rel=0.005)
    text = 12 * 77 * (24 * 512 ** 2 + 4 * 77 * 512)
    step = 4096 * 3 * (image + text)
    assert float(re.search(r"FLOPs +([\d.]+) P", out)[1]) == pytest.approx(step / 1e15, abs=0.006)
    seconds = step / (32 * 312e12 * 0.5)
    assert float(re.search(r"a step +([\d.]+) s", out)[1]) == pytest.approx(seconds, abs=0.002)     # with the features
    steps = int(re.search(r"steps +([\d,]+)", out)[1].replace(",", ""))
    assert steps == 25 * (15_000_000 // 4096)
    assert float(re.search(r"time +([\d.]+) hours", out)[1]) == pytest.approx(steps * seconds / 3600, rel=0.05)


def test_plan_says_what_does_not_fit_and_what_cannot_be_shared(capsys):
    assert "does not fit 4090: give --accumulate 2" in planned(
        capsys, "--preset vit-b16-yfcc15m --gpus 8 --gpu 4090")
    once = planned(capsys, "--preset vit-b16-yfcc15m --gpus 8 --gpu 4090 --accumulate 8")
    assert "does not fit" not in once
    with pytest.raises(UserError, match="multiple of 7"):
        planned(capsys, "--preset vit-b16-yfcc15m --gpus 7")


def test_plan_from_the_command_line_trains_nothing(tmp_path):
    out = run_script("train.py", "--plan", "--gpus", 2, "--out", tmp_path / "run").stdout
    assert "GPU hours" in out and not (tmp_path / "run").exists()


COUNT_TRAFFIC = """
import json, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
sys.path[:0] = ["tests", "."]
from test_plan import SMALL
import bench
W = 4
dist.init_process_group("fake", rank=0, world_size=W, store=FakeStore())
net = bench.Ours(SMALL, bench.data.BytePairTokenizer([]))
net.net = DistributedDataParallel(net.core, broadcast_buffers=False, gradient_as_bucket_view=True)
gathered, reduced = [], []
def hook(state, bucket):
    reduced.append(bucket.buffer().nbytes)
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
net.net.register_comm_hook(None, hook)
all_gather, all_reduce = dist.all_gather, dist.all_reduce
dist.all_gather = lambda parts, x: (gathered.append(len(parts) * x.nbytes), all_gather(parts, x))
dist.all_reduce = lambda x, **k: (reduced.append(x.nbytes), all_reduce(x, **k))
net.step(torch.zeros(SMALL.batch_size // W, 3, 64, 64, dtype=torch.uint8), ["a red star"] * (SMALL.batch_size // W))
print(json.dumps([sum(gathered), sum(reduced)]))
"""


def python(code: str):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_traffic_is_what_a_step_gathers_and_reduces():
    """One of four processes of which the other three are pretended; a ring's share of each collective is the formula's."""
    gathered, reduced = python(COUNT_TRAFFIC)
    assert gathered == 2 * 4 * SMALL.batch_size * SMALL.embed_dim                      # two embeddings
    want = model.step_traffic(SMALL, 4)
    assert 3 / 4 * gathered + 2 * 3 / 4 * reduced == pytest.approx(sum(want.values()), rel=0.002)


@pytest.mark.parametrize("method", ["clip", "maskclip"])
def test_memory_is_that_of_a_step(method):
    """Within 25%: the allocator's slack, and what exists for the time of one operation, are in no formula."""
    got = python(f"""
import json, sys
sys.path[:0] = ["tests", "."]
from dataclasses import replace
from test_plan import SMALL
import bench, torch
torch.set_num_threads(1)
config, B = replace(SMALL, method="{method}"), 96
images, captions = torch.zeros(B, 3, 64, 64, dtype=torch.uint8), ["a small red star left of a blue ring"] * B
print(json.dumps(bench.step_peak(config, bench.data.BytePairTokenizer([]), images, captions)))
""")
    assert got["peak"] == pytest.approx(got["formula"], rel=0.25), got


def test_activations_halve_with_the_micro_batch_and_bf16_saves_as_said():
    whole, half = (model.step_memory(PRESETS["vit-b16-yfcc15m"], n) for n in (128, 64))
    assert whole["activations"] == 2 * half["activations"] and whole["states"] == half["states"]
    bf16 = model.step_memory(PRESETS["vit-b16-yfcc15m"], 128, bf16=True)
    # a block keeps its input and the sum after attention in 4 bytes; 14 D more in 2
    assert bf16["activations"] / whole["activations"] == (2 * 4 + 14 * 2) / (16 * 4)


def test_states_are_sixteen_bytes_a_parameter_and_four_of_the_teacher():
    config = preset_for("pocket", "maskclip")
    net = model.build(config, 700)
    P = sum(p.numel() for p in net.parameters())
    teacher = sum(p.numel() for p in model.Teacher(net).parameters()) + net.image_proj.weight.numel()
    assert model.step_memory(config, 1)["states"] == pytest.approx(16 * P + 4 * teacher, rel=1e-3)
