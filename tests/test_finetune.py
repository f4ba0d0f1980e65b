"""Fine-tuning: every augmentation against its definition or timm's, layer decay, resuming, several processes.

    python -m pytest tests/test_finetune.py
"""
import copy
import json
import math
import os
import random
import signal

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_script
from torch import nn

import finetune
from data import MEAN, BadRecord, BytePairTokenizer, Sample, UserError, normalize
from finetune import Classifier, draw_mixing, erase, layer_decay_groups, mix, parse_options, rand_augment, smooth
from model import Config, MaskCLIP, VisionTransformer, image_tower, save_checkpoint
from train import Runtime, load_state

TINY = Config(method="clip", image_size=32, patch_size=16, width=16, depth=2, heads=2, text_width=16, text_depth=1,
              text_heads=2, context_length=8, vocab_size=514, embed_dim=8)
ALONE = Runtime(rank=0, world=1, device=torch.device("cpu"), precision="fp32", workers=0)
SHAPES = "shapes:objects=1-1,size=32,train=64,val=7"


def picture(seed: int = 0, width: int = 24, height: int = 20) -> PIL.Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.BICUBIC)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained pre-training checkpoint."""
    torch.manual_seed(0)
    tokenizer = BytePairTokenizer([])
    path = tmp_path_factory.mktemp("pretrained") / "last.pt"
    assert save_checkpoint(path, MaskCLIP(TINY, tokenizer.eot), tokenizer, TINY, step=0)
    return path


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


# ---- recipe ---------------------------------------------------------------------------------------------------------

def test_recipe_of_the_paper():
    options = parse_options(["--data", "folder:x"])
    want = dict(epochs=100, warmup_epochs=20, lr=6e-4, lr_end=1e-6, layer_decay=0.7,        # supplement B
                batch_size=2048,                                                            # FT-CLIP
                weight_decay=0.05, drop_path=0.1, mixup=0.8, cutmix=1.0, randaugment=9,     # MAE
                erasing=0.25, smoothing=0.1, crop_min=0.08, flip=True, crop_share=224 / 256)
    assert {name: getattr(options, name) for name in want} == want
    changed = parse_options(["--recipe", "imagenet", "--lr", "1e-3", "--data", "folder:x"])
    assert changed == finetune.replace(options, lr=1e-3), "a flag outranks the recipe"


@pytest.mark.parametrize("argv, recipe", [
    ([], "pocket"), (["--data", "shapes:train=64"], "pocket"), (["--data", "folder:x"], "imagenet"),
    (["--recipe", "imagenet"], "imagenet"), (["--data", "folder:x", "--recipe", "pocket"], "pocket"),
])
def test_recipe_follows_the_data_unless_named(argv, recipe):
    options = parse_options(argv)
    assert options.recipe == recipe and options.epochs == finetune.RECIPES[recipe].epochs


# ---- layer decay ----------------------------------------------------------------------------------------------------

def by_name(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    """name -> (multiplier, weight decay), each parameter in exactly one group"""
    names = {id(p): name for name, p in model.named_parameters()}
    table = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(table) == sum(len(group["params"]) for group in groups)
    return table


@pytest.mark.parametrize("depth, layer_decay", [
    (12, 0.7),      # the paper
    (4, 0.65),      # MAE's factor
    (1, 1.0),       # no decay
])
def test_layer_decay_equals_timm(depth, layer_decay):
    timm = pytest.importorskip("timm", reason="parity with timm needs timm")
    from timm.optim import param_groups_layer_decay
    theirs = timm.models.VisionTransformer(img_size=32, patch_size=16, embed_dim=16, depth=depth, num_heads=2,
                                           num_classes=3, global_pool="avg")
    want = by_name(theirs, param_groups_layer_decay(theirs, 0.05, theirs.no_weight_decay(), layer_decay=layer_decay))
    ours = Classifier(image_tower(Config(image_size=32, patch_size=16, width=16, depth=depth, heads=2), 0.1), 3)
    got = by_name(ours, layer_decay_groups(ours, 6e-4, 0.05, layer_decay))
    rename = {"norm": "fc_norm", "head": "head"}
    got = {name.removeprefix("visual.") if name.startswith("visual.") else
           f"{rename[name.split('.')[0]]}.{name.split('.')[1]}": value for name, value in got.items()}
    assert got.keys() == want.keys()
    for name in want:
        assert got[name] == pytest.approx(want[name]), name


class Detector(nn.Module):
    """A tower inside something larger, one of whose other parts has `blocks` too."""

    def __init__(self):
        super().__init__()
        self.backbone = VisionTransformer(32, 16, 16, 2, 2)
        self.pyramid = nn.ModuleDict({"blocks": nn.ModuleList([nn.Conv2d(16, 16, 1)])})


def test_layer_decay_inside_a_larger_module():
    model = Detector()
    groups = layer_decay_groups(model, 2e-4, 0.05, 0.5)
    table = by_name(model, groups)
    for name, scale, decay in [
        ("backbone.cls_token", 0.125, 0.0),                    # 0.5 ** (N + 1), N = 2 blocks
        ("backbone.pos_embed", 0.125, 0.0),
        ("backbone.patch_embed.proj.weight", 0.125, 0.05),
        ("backbone.patch_embed.proj.bias", 0.125, 0.0),
        ("backbone.blocks.0.attn.qkv.weight", 0.25, 0.05),
        ("backbone.blocks.1.norm1.weight", 0.5, 0.0),
        ("backbone.norm.weight", 1.0, 0.0),                    # the final norm goes with the heads
        ("pyramid.blocks.0.weight", 1.0, 0.05),                # "blocks", but not of the tower
    ]:
        assert table[name] == (scale, decay), name
    assert all(group["lr"] == pytest.approx(2e-4 * group["lr_scale"]) for group in groups)
    with pytest.raises(ValueError):
        layer_decay_groups(nn.Linear(2, 2), 1.0, 0.05, 0.7)


def test_layer_decay_leaves_out_what_is_frozen():
    model = VisionTransformer(32, 16, 16, 2, 2)
    model.blocks[1].requires_grad_(False)
    model.pos_embed.requires_grad_(False)
    table = by_name(model, layer_decay_groups(model, 1.0, 0.05, 0.5))
    assert "pos_embed" not in table and "blocks.1.norm1.weight" not in table
    assert table["blocks.0.norm1.weight"] == (0.25, 0.0), "frozen blocks still count as layers"


# ---- RandAugment ----------------------------------------------------------------------------------------------------

TIMM = dict(auto_contrast="AutoContrast", equalize="Equalize", invert="Invert", rotate="Rotate",
            posterize="PosterizeIncreasing", solarize="SolarizeIncreasing", solarize_add="SolarizeAdd",
            color="ColorIncreasing", contrast="ContrastIncreasing", brightness="BrightnessIncreasing",
            sharpness="SharpnessIncreasing", shear_x="ShearX", shear_y="ShearY", translate_x="TranslateXRel",
            translate_y="TranslateYRel")


@pytest.mark.parametrize("name", finetune.OPERATIONS)
def test_operation_equals_timm(name, monkeypatch):
    augment = pytest.importorskip("timm.data.auto_augment", reason="parity with timm needs timm")
    hparams = dict(img_mean=tuple(round(255 * m) for m in MEAN), interpolation=PIL.Image.BICUBIC)
    for magnitude in (0, 0.4, 3, 8.7, 9, 10)[:5 if name == "posterize" else 6]:    # Pillow's keeps one bit at least
        for sign in (1, -1):
            monkeypatch.setattr(random, "random", lambda: 0.25 if sign > 0 else 0.75)
            theirs = augment.AugmentOp(TIMM[name], prob=1.0, magnitude=magnitude, hparams=hparams)(picture())
            ours = finetune.OPERATIONS[name](picture(), magnitude / 10, sign)
            assert np.array_equal(theirs, ours), (magnitude, sign)


def test_operations_are_timms_increasing_set():
    augment = pytest.importorskip("timm.data.auto_augment", reason="parity with timm needs timm")
    assert sorted(TIMM[name] for name in finetune.OPERATIONS) == sorted(augment._RAND_INCREASING_TRANSFORMS)


@pytest.mark.parametrize("name, m, sign, definition", [
    ("auto_contrast", 0.9, 1, lambda x: (x - x.min((0, 1))) * 255 / np.ptp(x, axis=(0, 1))),    # each channel to 0..255
    ("invert", 0.9, 1, lambda x: 255 - x),
    ("posterize", 0.5, 1, lambda x: x // 64 * 64),                     # 4 - 2 bits stay
    ("posterize", 1.0, 1, lambda x: 0 * x),                            # no bit stays, where timm's keeps one
    ("solarize", 0.5, 1, lambda x: np.where(x < 128, x, 255 - x)),
    ("solarize_add", 0.5, 1, lambda x: np.where(x < 128, np.minimum(x + 55, 255), x)),
    ("brightness", 1.0, -1, lambda x: 0.1 * x),                        # towards black by 0.9 m
    ("rotate", 0.0, 1, lambda x: x),
    ("shear_x", 0.0, 1, lambda x: x),
])
def test_operation_by_its_definition(name, m, sign, definition):
    x = np.asarray(picture()).astype(float)
    got = np.asarray(finetune.OPERATIONS[name](picture(), m, sign)).astype(float)
    assert np.abs(got - definition(x).clip(0, 255)).max() <= 1, "more than a level off"


def test_rand_augment_draws_two_operations_half_of_them_applied(monkeypatch):
    seen = []
    for name in finetune.OPERATIONS:
        monkeypatch.setitem(finetune.OPERATIONS, name,
                            lambda image, m, sign, name=name: seen.append((name, m, sign)) or image)
    rng, image = np.random.default_rng(0), picture()
    for _ in range(6000):
        rand_augment(image, 9, rng)
    names, strengths, signs = zip(*seen)
    assert len(seen) == pytest.approx(6000, abs=4 * math.sqrt(6000 * 2 / 4))      # of 12,000 half, four deviations
    counts = [names.count(name) for name in finetune.OPERATIONS]
    assert max(np.abs(np.array(counts) - len(seen) / 15)) < 4.5 * math.sqrt(len(seen) / 15)
    assert abs(np.mean(signs)) < 4 / math.sqrt(len(seen))
    # normal (0.9, 0.05), cut at 1, which is two deviations up: mean 0.9 - 0.05 * (pdf(2) - 2 * (1 - cdf(2)))
    assert np.mean(strengths) == pytest.approx(0.9 - 0.05 * 0.00849, abs=4 * 0.05 / math.sqrt(len(seen)))
    assert np.mean(np.array(strengths) == 1) == pytest.approx(0.0228, abs=0.008)


# ---- erasing, mixing, smoothing -------------------------------------------------------------------------------------

def test_erase():
    """A quarter of the images loses a box: 2% to a third of the area, to 3 1/3 times as wide as high; normal noise."""
    rng, augment = np.random.default_rng(0), finetune.Augment(60, finetune.Options(erasing=0.25, randaugment=0.0))
    boxes = torch.stack([augment(Sample(picture(), label=0), rng)["erased"] for _ in range(1600)])
    left, top, w, h = boxes.T
    is_erased = w > 0
    assert 0.22 < is_erased.double().mean() < 0.28 and not boxes[~is_erased].any()
    assert (left + w <= 60).all() and (top + h <= 60).all()
    area, aspect = (w * h / 3600)[is_erased], (w / h)[is_erased].log()
    assert 0.018 < area.min() < 0.03 and 0.3 < area.max() < 0.34 and aspect.abs().max() < math.log(1 / 0.27)
    images = torch.full((1600, 3, 60, 60), 7.0)
    erase(images, boxes, torch.arange(1600))
    want = torch.stack([torch.nn.functional.pad(torch.ones(h, w), (l, 60 - l - w, t, 60 - t - h))
                        for l, t, w, h in boxes.tolist()])
    assert torch.equal(images != 7, want[:, None].bool().expand(-1, 3, -1, -1)), "the box, and nothing outside"
    noise = images[images != 7]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    again = torch.full((4, 3, 60, 60), 7.0)
    some = is_erased.nonzero()[:4, 0]
    erase(again, boxes[some], some)
    assert torch.equal(again, images[some]), "whatever else is in the batch"


@pytest.mark.parametrize("erasing, flip, magnitude", [(0.0, False, 0.0), (1.0, False, 0.0), (0.25, True, 9.0)])
def test_augment_follows_from_the_generator(erasing, flip, magnitude):
    options = finetune.Options(erasing=erasing, flip=flip, randaugment=magnitude, crop_min=0.5)
    augment = finetune.Augment(16, options)
    one, same, other = (augment(Sample(picture(), label=3), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one["images"].shape == (3, 16, 16) and one["images"].dtype == torch.uint8 and one["labels"] == 3
    assert torch.equal(one["images"], same["images"]) and not torch.equal(one["images"], other["images"])
    assert torch.equal(one["erased"], same["erased"]) and one["erased"].any() == (erasing == 1)
    with pytest.raises(BadRecord, match="no class"):
        augment(Sample(picture()), np.random.default_rng(0))


@pytest.mark.parametrize("mixup, cutmix, share_cut, variance", [
    (0.8, 1.0, 0.5, None),               # MAE: either at even odds
    (0.8, 0.0, 0.0, 1 / (4 * 2.6)),      # Beta(a, a) has variance 1 / (4 (2 a + 1))
    (1.0, 0.0, 0.0, 1 / 12),             # uniform
    (0.0, 1.0, 1.0, None),
])
def test_draw_mixing(mixup, cutmix, share_cut, variance):
    draws = [draw_mixing(mixup, cutmix, 30, 40, np.random.default_rng((5, i))) for i in range(3000)]
    is_cut = [own.min() == 0 for own in draws]
    assert np.mean(is_cut) == pytest.approx(share_cut, abs=0.04)
    assert all(set(np.unique(own)) <= {0, 1} if cut else np.ptp(own) == 0 for cut, own in zip(is_cut, draws))
    if variance is not None:
        lams = [own.mean() for own in draws]
        assert np.mean(lams) == pytest.approx(0.5, abs=0.03)
        assert np.var(lams) == pytest.approx(variance, abs=0.006)


def test_cutmix_box_equals_timm(monkeypatch):
    timm_mixup = pytest.importorskip("timm.data.mixup", reason="parity with timm needs timm")

    class Scripted:
        """A generator that gives lam and the center (y, x)."""
        def __init__(self, lam, y, x):
            self.lam, self.center = lam, [y, x]

        def beta(self, a, b):
            return self.lam

        def integers(self, high):
            return self.center.pop(0)

    for lam, y, x in [(0.5, 15, 20), (0.1, 0, 39), (0.93, 29, 0), (0.999, 7, 7), (0.0, 3, 3)]:
        center = [y, x]
        monkeypatch.setattr(np.random, "randint", lambda *a, size=None: center.pop(0))
        (top, bottom, left, right), want = timm_mixup.cutmix_bbox_and_lam((3, 30, 40), lam)
        box = np.ones((30, 40))
        box[top:bottom, left:right] = 0
        own = draw_mixing(0.0, 1.0, 30, 40, Scripted(lam, y, x))
        assert np.array_equal(own, box) and own.mean() == pytest.approx(want)


@pytest.mark.parametrize("lam, box", [
    (0.3, None),
    (1.0, None),             # off
    (0.75, (0, 4, 2, 4)),    # a quarter of 4 x 8 pixels
])
def test_mix(lam, box):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 3, 4, 8, generator=generator), torch.arange(8) % 5
    own = np.full((4, 8), lam)
    if box:
        own[:] = 1
        own[box[0]:box[1], box[2]:box[3]] = 0
    mixed, soft = mix(images, smooth(labels, 5, 0.1), own)
    for i in range(8):
        j = i + 1 if i % 2 == 0 else i - 1
        if box is None:
            want = lam * images[i] + (1 - lam) * images[j]
        else:
            want = images[i].clone()
            want[:, box[0]:box[1], box[2]:box[3]] = images[j][:, box[0]:box[1], box[2]:box[3]]
        assert torch.allclose(mixed[i], want)
        logits = torch.randn(5, generator=generator)
        loss = lam * F.cross_entropy(logits, labels[i], label_smoothing=0.1) + (
            (1 - lam) * F.cross_entropy(logits, labels[j], label_smoothing=0.1))
        assert F.cross_entropy(logits, soft[i]).item() == pytest.approx(loss.item(), rel=1e-5)
    parts = [mix(x, y, own)[0] for x, y in zip(images.chunk(4), smooth(labels, 5, 0.1).chunk(4))]
    assert torch.equal(torch.cat(parts), mixed), "four processes mix as one"


# ---- model ----------------------------------------------------------------------------------------------------------

def test_classifier_pools_the_last_block_without_the_class_token():
    torch.manual_seed(0)
    pretrained = VisionTransformer(32, 16, 16, 2, 2)
    model = Classifier(copy.deepcopy(pretrained), 5).eval()
    images = torch.randn(3, 3, 32, 32)
    assert F.cross_entropy(model(images), torch.arange(3)).item() == pytest.approx(math.log(5), abs=1e-3), "even odds"
    nn.init.normal_(model.head.weight)
    x = pretrained.block_outputs(images, (2,))[0][:, 1:].mean(dim=1)
    assert torch.allclose(model(images), model.head(F.layer_norm(x, (16,), eps=1e-6)), atol=1e-5)
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters()), "a parameter without gradient would stop DDP"


# ---- runs -----------------------------------------------------------------------------------------------------------

def arguments(checkpoint, out, *more) -> list[str]:
    return [str(checkpoint), "--data", SHAPES, "--out", str(out), "--epochs", "2", "--warmup-epochs", "1",
            "--batch-size", "16", "--log-every", "1", "--device", "cpu", "--precision", "fp32", *more]


def test_an_evaluation_takes_no_other_checkpoint(checkpoint, tmp_path):
    finetune.main(arguments(checkpoint, tmp_path))
    with pytest.raises(UserError, match="--eval tests OUT/last.pt, not .*: name its folder with --out"):
        finetune.main([str(tmp_path / "last.pt"), "--eval", "--out", str(tmp_path)])


def test_a_short_run_leaves_its_warm_up(checkpoint, tmp_path):
    finetune.main(arguments(checkpoint, tmp_path, "--epochs", "2", "--warmup-epochs", "20", "--log-every", "1"))
    rates = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(rates) == rates[len(rates) // 5] and rates[-1] < max(rates) / 10


def losses(out) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_stopped_run_goes_on_to_the_bit(checkpoint, tmp_path, monkeypatch):
    finetune.main(arguments(checkpoint, tmp_path / "whole"))
    steps = []

    def stop_in_step_4(*args):
        steps.append(args)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return smooth(*args)
    monkeypatch.setattr(finetune, "smooth", stop_in_step_4)
    again = arguments(checkpoint, tmp_path / "parts")
    with pytest.raises(SystemExit) as stopped:
        finetune.main(again)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert load_state(tmp_path / "parts" / "last.pt")["step"] == 4
    checkpoint_gone = ["none.pt", *again[1:]]
    monkeypatch.setattr(finetune, "load_checkpoint", None)                        # the pre-trained file is not needed
    finetune.main(again)
    assert len(steps) == 8
    whole, parts = (load_state(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    for name in whole["model"]:
        assert torch.equal(whole["model"][name], parts["model"][name]), name
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert (tmp_path / "parts" / "curves.png").is_file()
    with pytest.raises(UserError, match="is of a run with checkpoint = .*choose another --out"):
        finetune.main(checkpoint_gone)


@pytest.mark.slow
def test_micro_batches_give_the_gradient_of_the_whole(checkpoint, tmp_path):
    for count in ("1", "2"):
        finetune.main(arguments(checkpoint, tmp_path / count, "--drop-path", "0", "--accumulate", count))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-5)


def test_odd_batches_where_nothing_is_mixed(checkpoint, tmp_path):
    finetune.main(arguments(checkpoint, tmp_path, "--batch-size", "21", "--epochs", "0.34"))
    assert len(losses(tmp_path)) == 1


def test_from_scratch_and_pretrained_differ_in_weights_only(checkpoint, tmp_path, monkeypatch):
    starts = []
    monkeypatch.setattr(finetune, "layer_decay_groups",
                        lambda model, *rest: starts.append(model.visual.blocks[0].mlp.fc1.weight.clone())
                        or layer_decay_groups(model, *rest))
    finetune.main(arguments(checkpoint, tmp_path / "a", "--epochs", "0.25"))
    finetune.main(arguments(checkpoint, tmp_path / "b", "--epochs", "0.25", "--from-scratch"))
    pretrained = load_state(checkpoint)["model"]["visual.blocks.0.mlp.fc1.weight"]
    assert torch.equal(starts[0], pretrained) and not torch.equal(starts[1], pretrained)


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--drop-path", "0.5"), ("--drop-path", "0", "--accumulate", "2")])
def test_two_processes_give_the_numbers_of_one(checkpoint, tmp_path, more):
    """Training with every random choice there is, and evaluation of 7 images, which 2 does not divide."""
    every = ("--randaugment", "9", "--flip", "--crop-min", "0.5", "--erasing", "0.5", "--mixup", "0.8", "--cutmix", "1",
             "--lr", "0.01", *more)
    for processes in (0, 2):
        out = tmp_path / str(processes)
        run_script("finetune.py", *arguments(checkpoint, out, *every, "--json", f"{out}.json"), processes=processes)
    assert losses(tmp_path / "0") == pytest.approx(losses(tmp_path / "2"), rel=2e-4)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("0.json", "2.json"))
    assert (one.pop("out"), two.pop("out")) == (str(tmp_path / "0"), str(tmp_path / "2"))
    assert one == two and one["images"] == 7 and one["bad"] == 0


class Few:
    """Seven records, of which one is bad."""
    classes = ["a", "b", "c"]

    def __len__(self):
        return 7

    def name(self, i):
        return f"record {i}"

    def read(self, i):
        if i == 4:
            raise BadRecord("corrupt image")
        return Sample(picture(i, 32, 32), label=i % 3)


def test_evaluation_leaves_out_what_cannot_be_read():
    model = Classifier(image_tower(TINY), 3).eval()
    result = finetune.evaluate(model, Few(), finetune.Options(batch_size=4, crop_share=1.0), ALONE)
    assert (result["images"], result["bad"], result["top5"]) == (6, 1, 1.0)


def test_evaluation_is_the_accuracy(checkpoint, tmp_path, capsys):
    finetune.main(arguments(checkpoint, tmp_path, "--epochs", "0.25", "--json", str(tmp_path / "first.json")))
    finetune.main(["--eval", "--out", str(tmp_path), "--json", str(tmp_path / "again.json"), "--device", "cpu"])
    first, again = (json.loads((tmp_path / name).read_text()) for name in ("first.json", "again.json"))
    assert first == again
    model, world = finetune.load_model(parse_options(arguments("", tmp_path)), ALONE)
    samples = [world.read(i) for i in range(len(world))]
    images = torch.stack([torch.from_numpy(np.array(sample.image)).permute(2, 0, 1) for sample in samples])
    ranking = model(normalize(images)).argsort(dim=1, descending=True).tolist()
    assert first["top1"] == pytest.approx(np.mean([s.label == row[0] for s, row in zip(samples, ranking)]))
    assert first["top5"] == pytest.approx(np.mean([s.label in row[:5] for s, row in zip(samples, ranking)]))


@pytest.mark.parametrize("more, words", [
    (["--batch-size", "15", "--mixup", "0.8"], "mixed in pairs"),      # an odd row would have no partner
    (["--batch-size", "128"], "64 records are fewer than a batch of 128"),
    (["--drop-path", "1.5"], "--drop-path must be a number from 0 to 0.99, not 1.5"),
    (["--data", "shapes:wrong=1"], "cannot read 'wrong=1'"),
    (["--eval"], "no fine-tuned model at"),
])
def test_mistakes_are_told_in_one_line(checkpoint, tmp_path, more, words):
    with pytest.raises(UserError, match=words) as error:
        finetune.main(arguments(checkpoint, tmp_path, *more))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("more, words", [
    (["--lr", "1"], "is of a run with lr = 0.001"),
    (["--from-scratch"], "is of a run with from_scratch = False"),
    (["--eval", "--data", f"folder:{ROOT / 'tests'}"], "holds no images"),
])
def test_another_run_is_never_overwritten(checkpoint, tmp_path_factory, more, words):
    out = tmp_path_factory.getbasetemp() / "refusal"
    if not out.exists():
        finetune.main(arguments(checkpoint, out, "--epochs", "0.25"))
    with pytest.raises(UserError, match=words):
        finetune.main([*arguments(checkpoint, out, "--epochs", "0.25"), *more])


def test_a_pretraining_checkpoint_is_no_fine_tuned_model(checkpoint):
    with pytest.raises(UserError, match="holds a pretraining run, wanted a finetuning run"):
        finetune.main(["--eval", "--out", str(checkpoint.parent)])
