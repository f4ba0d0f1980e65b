"""Segmentation: labels and folders, mean IoU, windows, zero-shot scores, word maps, UperNet and its training.

    python -m pytest tests/test_segmentation.py
"""
import colorsys
import hashlib
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import dense
import finetune
from conftest import ROOT, SHARED, needs_shared, on_processes, run_script
from data import ADE20K, COCO_STUFF, COCO_STUFF_LABEL, PASCAL_CONTEXT, BadRecord, UserError, open_data
from model import PRESETS, MaskCLIP, SyncBatchNorm, VisionTransformer, save_checkpoint
from train import layer_decay_groups, load_state

RNG = np.random.default_rng
REDUCED = SimpleNamespace(reduce_zero_label=True)


# ---- class names -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("names, count, digest, some", [
    (ADE20K, 150, "ba644262c15afe51", {0: "wall", 12: "person", 43: "signboard", 149: "flag"}),
    (PASCAL_CONTEXT, 59, "9846fff601e81c6a", {0: "airplane", 36: "person", 54: "tv monitor", 58: "wood"}),
    (COCO_STUFF, 171, "62f74b67ef9c9eb9", {0: "person", 79: "toothbrush", 80: "banner", 159: "brick wall"}),
])
def test_class_names(names, count, digest, some):
    assert len(names) == len(set(names)) == count and all(names[i] == name for i, name in some.items())
    assert hashlib.sha256(",".join(names).encode()).hexdigest()[:16] == digest, "results of other names do not compare"


def test_order_of_classes_is_that_of_the_label_files():
    """Pascal Context's converter numbers the names of the original set, which are sorted, and two spelled otherwise."""
    original = [name.replace("airplane", "aeroplane").replace("tv monitor", "tvmonitor") for name in PASCAL_CONTEXT]
    assert original == sorted(original)
    # things and then stuff, each numbered as in COCO-Stuff's own list of 182, in which stuff is sorted
    things, stuff = COCO_STUFF_LABEL[:91], COCO_STUFF_LABEL[91:182]
    assert (things < 255).sum() == 80 and stuff.tolist() == list(range(80, 171))
    known = {0: "person", 43: "bottle", 89: "toothbrush", 91: "banner", 181: "wood"}
    assert {i: COCO_STUFF[COCO_STUFF_LABEL[i]] for i in known} == known
    assert COCO_STUFF_LABEL[[11, 90, 182, 255]].tolist() == [255] * 4


# ---- folders ---------------------------------------------------------------------------------------------------------

def build(kind: str, root, count: int = 5) -> list[np.ndarray]:
    """A folder in the real layout, with `count` images a split; returns what the label files of val hold."""
    images, labels, listing, values = {
        "ade20k": ("images/{}", "annotations/{}", None, 151),
        "coco-stuff": ("images/{}", "annotations/{}", None, 182),
        "pascal-context": ("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext/{}.txt", 60),
        "voc": ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation/{}.txt", 4),
    }[kind]
    rng, maps = RNG(0), []
    for split in ("train", "val"):
        ade20k = "training" if split == "train" else "validation"
        part = {"ade20k": ade20k, "coco-stuff": f"{split}2017"}.get(kind, split)
        for folder in (images, labels):
            (root / folder.format(part)).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            width, height = 40 + i, 30 - i
            label = rng.integers(0, values, (height, width)).astype(np.uint8)
            label[0, :3] = (0, values - 1, 255)
            image = PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            image.save(root / images.format(part) / f"{split}_{i}.jpg")
            picture = PIL.Image.fromarray(label)
            picture.putpalette(list(range(256)) * 3)                                   # VOC's files have a palette
            picture.save(root / labels.format(part) / f"{split}_{i}.png")
            maps += [label] if split == "val" else []
        if listing:
            (root / listing.format(part)).parent.mkdir(parents=True, exist_ok=True)
            (root / listing.format(part)).write_text("".join(f"{split}_{i}\n" for i in range(count)))
    if kind == "voc":
        (root / "class_names.txt").write_text("_background_\ncat\ndog\ntv/monitor\n")
    return maps


@pytest.mark.parametrize("kind, above, n_classes, reduced", [
    ("ade20k", "ADEChallengeData2016", 150, True),
    ("pascal-context", "VOC2010", 59, True),
    ("coco-stuff", "coco_stuff164k", 171, False),
    ("voc", "VOC2012", 4, False),
])
def test_real_layouts(kind, above, n_classes, reduced, tmp_path):
    maps = build(kind, tmp_path / above)
    for root in (tmp_path, tmp_path / above):                                   # the folder itself, or the one above
        val = open_data(f"{kind}:{root}", "val", "segmentation")
        assert len(val) == len(open_data(f"{kind}:{root}", "train", "segmentation")) == 5
        assert len(val.classes) == n_classes and val.reduce_zero_label == reduced
        for i, label in enumerate(maps):
            sample = val.read(i)
            assert "val_" in val.name(i) and sample.image.size == label.shape[::-1]
            assert sample.label_map.dtype == np.uint8
            want = COCO_STUFF_LABEL[label] if kind == "coco-stuff" else label
            assert np.array_equal(sample.label_map, want)
            classes = dense.labels_of(val, sample)
            assert classes[classes < 255].max() == n_classes - 1


def test_bad_label_maps(tmp_path):
    build("ade20k", tmp_path, count=6)
    val, folder = open_data(f"ade20k:{tmp_path}", "val", "segmentation"), tmp_path / "annotations/validation"
    (folder / "val_0.png").unlink()
    PIL.Image.new("L", (41, 28)).save(folder / "val_1.png")
    PIL.Image.new("RGB", (42, 28)).save(folder / "val_2.png")
    PIL.Image.new("L", (43, 27), 151).save(folder / "val_3.png")
    whole = (folder / "val_4.png").read_bytes()
    (folder / "val_4.png").write_bytes(whole[:len(whole) // 2])
    reasons = ["unreadable file", "another size", "mode RGB", "out of range: 151", "corrupt label map"]
    for i, reason in enumerate(reasons):
        with pytest.raises(BadRecord, match=reason):
            val.read(i)
    assert val.read(5).label_map.shape == (25, 45)
    (folder / "val_5.png").unlink()
    PIL.Image.new("L", (45, 25)).save(folder / "val_5.jpg")                     # its numbers are not those drawn
    with pytest.raises(BadRecord, match="JPEG of mode L"):
        open_data(f"ade20k:{tmp_path}", "val", "segmentation").read(5)


@pytest.mark.parametrize("extension", [".jpeg", ".JPG", ".png", ".webp", ".TIF"])
@pytest.mark.parametrize("kind", ["ade20k", "pascal-context", "coco-stuff", "voc"])
def test_images_of_any_extension(kind, extension, tmp_path):
    """With what macOS leaves beside them, and other files that are no images."""
    maps = build(kind, tmp_path)
    for path in list(tmp_path.rglob("*.jpg")):
        PIL.Image.open(path).save(path.with_suffix(extension))
        path.unlink()
        path.with_name(f"._{path.stem}{extension}").write_bytes(bytes(4096))
        path.with_name(f"{path.stem}.xml").write_text("no image")
    (tmp_path / "__MACOSX").mkdir()
    for path in list(tmp_path.rglob("val_*.png")) if extension != ".png" else []:
        path.rename(path.with_suffix(".PNG"))
    for split in ("train", "val"):
        found = open_data(f"{kind}:{tmp_path}", split, "segmentation")
        assert [found.name(i).rpartition("/")[2] for i in range(len(found))] == [
            f"{split}_{k}{extension}" for k in range(5)]
    for i, label in enumerate(maps):
        want = COCO_STUFF_LABEL[label] if kind == "coco-stuff" else label
        assert np.array_equal(found.read(i).label_map, want)


@pytest.mark.parametrize("line", [
    "val_{}", "val_{}.jpg",
    "/JPEGImages/val_{}.jpg /SegmentationClassAug/val_{}.png",                      # DeepLab's trainaug
    "JPEGImages/val_{}.jpg\tSegmentationClassAug/val_{}.png",
    "two words {}",
])
def test_lines_of_a_list(line, tmp_path):
    maps = build("voc", tmp_path)
    if "Aug" in line:
        (tmp_path / "SegmentationClass").rename(tmp_path / "SegmentationClassAug")
        (tmp_path / "SegmentationClass").mkdir()
    if "words" in line:
        for path in list(tmp_path.rglob("val_*.*")):
            path.rename(path.with_name(path.name.replace("val_", "two words ")))
    lines = "".join(line.replace("{}", str(k)) + "\n" for k in range(5))
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text(lines)
    val = open_data(f"voc:{tmp_path}", "val", "segmentation")
    assert [np.array_equal(val.read(i).label_map, label) for i, label in enumerate(maps)] == [True] * 5


@pytest.mark.parametrize("spec, split, complaint", [
    ("ade20k:{}/nowhere", "val", "images/validation"),          # nothing there: says what it looked for
    ("ade20k:{}", "test", "no split 'test'"),                   # its labels are secret
    ("voc:{}", "val", "JPEGImages"),                            # another format
])
def test_wrong_folders(spec, split, complaint, tmp_path):
    build("ade20k", tmp_path, count=1)
    with pytest.raises(UserError, match=complaint):
        open_data(spec.format(tmp_path), split, "segmentation")


@needs_shared
def test_real_folder():
    for split, count in (("train", 180), ("val", 60)):
        scenes = open_data(f"voc:{SHARED / 'seg_composites'}", split, "segmentation")
        assert len(scenes) == count and scenes.classes[:2] == ["background", "bird"]
        labels = set().union(*(np.unique(scenes.read(i).label_map).tolist() for i in range(0, count, 6)))
        assert labels <= {*range(12), 255} and len(labels) > 8


# ---- labels and mean IoU ---------------------------------------------------------------------------------------------

def test_label_0_may_be_no_class():
    sample = data.Sample(None, label_map=np.array([[0, 1, 2, 150, 253, 255]], dtype=np.uint8))
    assert dense.labels_of(REDUCED, sample).tolist() == [[255, 0, 1, 149, 252, 255]]
    assert dense.labels_of(SimpleNamespace(reduce_zero_label=False), sample) is sample.label_map
    assert sample.label_map[0, 0] == 0, "the argument was changed"


@pytest.mark.parametrize("limit, world, want", [(5, 2, 5), (1, 2, 1), (0, 3, 7), (4, 4, 4), (9, 2, 7)])
def test_exactly_as_many_images_as_asked(limit, world, want):
    class Numbers:
        def __len__(self):
            return 7

        def name(self, i):
            return f"record {i}"

        def read(self, i):
            return i

    seen = []
    for rank in range(world):
        runtime = SimpleNamespace(rank=rank, world=world, workers=0, is_main=rank == 0)
        options = dense.EvalOptions(limit=limit)
        seen += [batch["index"].item() for batch in
                 dense.each_test_image(Numbers(), lambda i, rng: dict(images=torch.zeros(1)), options, runtime)]
    assert sorted(seen) == list(range(want))


def test_mean_iou_by_hand():
    truth = torch.tensor([[0, 0, 0, 0, 1, 1, 255, 255]])
    guess = torch.tensor([[0, 0, 0, 1, 1, 2, 0, 1]])
    miou, iou, accuracy = dense.mean_iou(dense.confusion_matrix(truth, guess, 4))
    # class 0: 3 of 4 or 3;  class 1: 1 of 2 or 2 with 3 in the union;  class 2: only predicted;  class 3: nowhere
    assert iou[:3].tolist() == pytest.approx([3 / 4, 1 / 3, 0]) and iou[3].isnan()
    assert miou == pytest.approx((3 / 4 + 1 / 3 + 0) / 3) and accuracy == pytest.approx(4 / 6)


def test_the_best_class_is_the_argmax_of_all():
    scores = torch.randn(7, 6, 9).half().float()                                    # with ties
    want = dense.resize(scores[None], (31, 20))[0].argmax(dim=0)
    assert torch.equal(dense.best_class(scores, (31, 20)), want)
    assert torch.equal(dense.best_class(scores[:1], (31, 20)), torch.zeros(31, 20, dtype=torch.long))


def random_maps(C: int, images: int = 4):
    rng = RNG(C)
    truth = rng.integers(0, C - 1, (images, 13, 17)).astype(np.uint8)               # class C-1 is never true
    guess = np.where(rng.random(truth.shape) < 0.5, truth, rng.integers(0, C, truth.shape))
    truth[rng.random(truth.shape) < 0.2] = 255
    return truth, guess


@pytest.mark.parametrize("C", [2, 5, 150])
def test_mean_iou_is_a_brute_force_count(C):
    truth, guess = random_maps(C)
    confusion = sum(dense.confusion_matrix(torch.from_numpy(t), torch.from_numpy(g), C) for t, g in zip(truth, guess))
    miou, iou, accuracy = dense.mean_iou(confusion)
    pixels = [(t, g) for t, g in zip(truth.ravel().tolist(), guess.ravel().tolist()) if t != 255]
    want = []
    for c in range(C):
        union = sum(t == c or g == c for t, g in pixels)
        want.append(sum(t == c and g == c for t, g in pixels) / union if union else math.nan)
    assert iou.tolist() == pytest.approx(want, nan_ok=True) and miou == pytest.approx(np.nanmean(want))
    assert accuracy == pytest.approx(sum(t == g for t, g in pixels) / len(pixels))


@pytest.mark.slow
@pytest.mark.parametrize("C", [2, 5, 150])
def test_mean_iou_is_torchmetrics(C):
    classification = pytest.importorskip("torchmetrics.classification", reason="torchmetrics is not installed")
    truth, guess = map(torch.from_numpy, random_maps(C))
    metric = classification.MulticlassJaccardIndex(C, average="none", ignore_index=255)
    confusion = torch.zeros(C, C, dtype=torch.long)
    for t, g in zip(truth, guess):                                              # over the data set, not image by image
        metric.update(g[None], t[None].long())
        confusion += dense.confusion_matrix(t, g, C)
    _, iou, _ = dense.mean_iou(confusion)
    seen = ~iou.isnan()
    torch.testing.assert_close(iou[seen].float(), metric.compute()[seen])


# ---- sizes and windows -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("width, height, size, want", [
    (640, 480, 512, (683, 512)),                    # COCO
    (480, 640, 512, (512, 683)),
    (3000, 500, 512, (2048, 341)),                  # the long side is bounded: mmsegmentation's (2048, 512)
    (9, 9000, 64, (1, 256)),                        # never nothing
])
def test_scaled_sides(width, height, size, want):
    assert dense.scaled_sides(width, height, size) == want


@pytest.mark.parametrize("size, window, stride, want", [
    (512, 224, 112, [0, 112, 224, 288]),            # the paper's: 4 x 4 windows, the last moved back
    (480, 224, 112, [0, 112, 224, 256]),
    (448, 224, 112, [0, 112, 224]),                 # divides
    (224, 224, 112, [0]),
    (225, 224, 112, [0, 1]),
    (512, 512, 341, [0]),                           # UperNet on a square
    (683, 512, 341, [0, 171]),
])
def test_starts(size, window, stride, want):
    assert dense.starts(size, window, stride) == want


@pytest.mark.parametrize("window, stride", [(8, 4), (8, 5), (7, 7), (16, 3)])
def test_windows_cover_every_pixel(window, stride):
    for size in range(window, 5 * window):
        covered = np.zeros(size, dtype=int)
        for start in dense.starts(size, window, stride):
            assert 0 <= start <= size - window
            covered[start:start + window] += 1
        assert covered.min() >= 1, f"{size} pixels"


@pytest.mark.parametrize("height, width", [(8, 8), (20, 29), (5, 30), (3, 3), (31, 8)])     # and less than a window
def test_slide_is_the_mean_over_windows(height, width):
    image = torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))
    weight = torch.rand(8, 8, generator=torch.Generator().manual_seed(1))                   # scores depend on the place

    def predict(windows):
        assert windows.shape == (1, 3, 8, 8)
        return torch.stack([windows.sum(dim=1) * weight, windows[:, 0]], dim=1)             # (n, 2, 8, 8)

    scores = dense.slide(image, predict, window=8, stride=5)
    assert scores.shape == (2, height, width)
    torch.testing.assert_close(scores[1], image[0])                                         # averages of equal values
    H, W = max(height, 8), max(width, 8)
    total, count = torch.zeros(H, W), torch.zeros(H, W)
    for y, x in itertools.product(dense.starts(H, 8, 5), dense.starts(W, 8, 5)):
        for i, j in itertools.product(range(8), range(8)):
            if y + i < height and x + j < width:
                total[y + i, x + j] += image[:, y + i, x + j].sum() * weight[i, j]
            count[y + i, x + j] += 1
    torch.testing.assert_close(scores[0], (total / count)[:height, :width])


# ---- zero-shot scores and word maps ----------------------------------------------------------------------------------

def tiny_model() -> tuple:
    torch.manual_seed(0)
    tokenizer = data.BytePairTokenizer.train(["a red circle", "a blue square"], 530)
    config = replace(PRESETS["pocket"], method="clip", image_size=32, patch_size=8, width=32, depth=3, heads=2,
                     text_width=32, text_depth=1, text_heads=2, embed_dim=16,
                     vocab_size=tokenizer.vocab_size)
    return MaskCLIP(config, tokenizer.eot).eval(), tokenizer, config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "last.pt"
    model, tokenizer, config = tiny_model()
    save_checkpoint(path, model, tokenizer, config)
    return path


@pytest.fixture(autouse=True)
def trained_on(monkeypatch):
    """Says in place of load_checkpoint what data a model was pre-trained with."""
    real, specs = dense.load_checkpoint, ["shapes"]

    def load(*arguments):
        model, *others = real(*arguments)
        model.trained_on = tuple(specs)
        return model, *others
    monkeypatch.setattr(dense, "load_checkpoint", load)
    return specs


@torch.no_grad()
@pytest.mark.parametrize("path", ["code", "plain"])
def test_value_path_is_attention_of_each_token_to_itself(path):
    model, _, config = tiny_model()
    images, tower = torch.randn(2, 3, 32, 48), model.visual
    x = tower.embed(images)
    for block in tower.blocks[:-1]:
        x = block(x)
    last, itself = tower.blocks[-1], torch.eye(x.shape[1], dtype=torch.bool)
    q, k, v = last.attn.qkv(last.norm1(x)).unflatten(2, (3, config.heads, -1)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=itself).transpose(1, 2).flatten(2)
    attended = last.attn.proj(attended)
    x = x + attended
    x = tower.norm(x + last.mlp(last.norm2(x)) if path == "code" else attended)[:, 1:]
    want = F.normalize(x @ model.image_proj.weight.T, dim=-1)
    torch.testing.assert_close(model.encode_patches(images, path), want)


@torch.no_grad()
def test_patch_scores_are_cosines_at_the_patches():
    model, tokenizer, config = tiny_model()
    texts = model.encode_classes(["red circle", "blue square", "moon"], ("a {}", "the {}"), tokenizer)
    images, p = torch.randn(2, 3, 32, 48), config.patch_size
    scores = dense.patch_scores(model, texts, "code")(images)
    assert scores.shape == (2, 3, 32, 48)
    patches = model.encode_patches(images, "code")                                          # (2, 4 * 6, E), row by row
    for b, c, row, column in itertools.product(range(2), range(3), range(4), range(6)):
        # bilinear: the four pixels around a patch's center average to its value, up to its neighbors' share of 1/16
        center = scores[b, c, row * p + 3:row * p + 5, column * p + 3:column * p + 5].mean().item()
        assert center == pytest.approx((patches[b, 6 * row + column] @ texts[c]).item(), abs=0.15)
    inner = scores[:, :, p // 2:-p // 2, p // 2:-p // 2]
    cosine = (patches @ texts.T).transpose(1, 2).unflatten(2, (4, 6))
    assert inner.max() <= cosine.max() and inner.min() >= cosine.min()


@torch.no_grad()
def test_cosines_are_float32_whatever_the_precision():
    """Rounded to bf16, one in ten pixels ties; products are exact, and so are the maps and points that follow."""
    model, tokenizer, _ = tiny_model()
    texts, images = F.normalize(torch.randn(9, 16), dim=-1), torch.randn(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        patches = model.encode_patches(images, "code")
        scores = dense.patch_scores(model, texts, "code")(images)
        maps = dense.text_maps(model, PIL.Image.new("RGB", (32, 32), "red"), texts.bfloat16(), "code")
    want = (patches.float() @ texts.T).transpose(1, 2).unflatten(2, (4, 4))
    assert scores.dtype == torch.float32 and maps.dtype == np.float32
    torch.testing.assert_close(scores, dense.resize(want, (32, 32)), atol=1e-6, rtol=1e-5)


class ColorModel:
    """Stands for a perfect model: a patch's embedding is its color, a text's the color that it names."""
    config, logit_scale = SimpleNamespace(image_size=32, patch_size=8), torch.zeros(())

    def embed(self, rgb):
        return F.normalize(torch.as_tensor(rgb, dtype=torch.float32) / 255 - 0.5, dim=-1)

    def encode_patches(self, images, path):
        mean, std = torch.tensor(data.MEAN)[:, None, None], torch.tensor(data.STD)[:, None, None]
        pixels = F.avg_pool2d((images * std + mean) * 255, 8)                               # (B, 3, rows, columns)
        return self.embed(pixels.flatten(2).transpose(1, 2))

    def encode_classes(self, names, templates, tokenizer):
        return self.embed([data.COLORS[name.split()[0]] for name in names])


def test_zero_shot_with_a_perfect_model(tmp_path):
    """Blocks of color, in the folder of VOC, at a size that windows do not divide: each pixel well inside is right."""
    colors, rng = ["red", "green", "blue", "yellow", "green"], RNG(0)            # the last is nowhere
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for i, (rows, columns) in enumerate([(3, 5), (4, 3), (2, 6)]):
        blocks = rng.integers(0, 4, (rows, columns)).astype(np.uint8)
        label = blocks.repeat(24, axis=0).repeat(24, axis=1)
        pixels = np.array([data.COLORS[color] for color in colors], dtype=np.uint8)[label]
        PIL.Image.fromarray(pixels).save(tmp_path / f"JPEGImages/{i}.jpg", quality=95)
        PIL.Image.fromarray(label).save(tmp_path / f"SegmentationClass/{i}.png")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("0\n1\n2\n")
    (tmp_path / "class_names.txt").write_text("\n".join(colors))
    model, options = ColorModel(), dense.ZeroShotOptions(data=f"voc:{tmp_path}", test_size=116)
    predict = dense.patch_scores(model, model.encode_classes(colors, (), None), "code")
    runtime, val = dense.setup(replace(options, device="cpu")), open_data(options.data, "val", "segmentation")
    results = dense.evaluate(predict, 32, 16, (116, 464), val, options, runtime, tmp_path / "out", {})
    assert results["images"] == 3 and results["miou"] > 0.93 and results["accuracy"] > 0.96
    assert [(entry["index"], entry["class"]) for entry in results["iou"]] == list(enumerate(colors)), "of one name too"
    assert [entry["iou"] is None for entry in results["iou"]] == [False] * 4 + [True]
    assert PIL.Image.open(tmp_path / "out/maps.png").size == (3 * 198, 3 * 216)


def test_word_map_lights_up_where_the_word_is():
    world = open_data("shapes:objects=2-3,size=96", "val", "segmentation")
    for i in range(6):
        sample = world.read(i)
        colors = [world.classes[thing["category"]].split()[0] for thing in sample.objects]
        for color, thing in zip(colors, sample.objects):
            if colors.count(color) == 1 and color not in ("white", "black", "orange"):
                model = ColorModel()
                model.config = SimpleNamespace(image_size=64, patch_size=8)
                maps = dense.text_maps(model, sample.image, model.encode_classes([color], (), None), "code")
                assert maps.shape == (1, 96, 96) and maps.dtype == np.float32
                assert maps[0][thing["mask"]].mean() > maps[0][~thing["mask"]].mean() + 0.3, (i, color)
                picture = np.asarray(dense.overlay(sample.image, maps[0], maps.min(), maps.max())).astype(int)
                red_over_blue = (picture[:, :, 0] - picture[:, :, 2])
                assert red_over_blue[thing["mask"]].mean() > red_over_blue[~thing["mask"]].mean()


def test_pointing_game(monkeypatch):
    """Maps of the truth always hit, their opposites never; a model that sees colors hits far above chance."""
    world = data.ShapesWorld("val", size=96, objects=(2, 3), dense=True)
    labels = iter([world.read(i).label_map for i in range(20)] * 2)
    covered = [(world.read(i).label_map == label).mean() for i in range(20)
               for label in np.unique(world.read(i).label_map)[1:]]
    hit, share = dense.pointing_game(ColorModel(), None, world, 20, ("{}",), "plain")
    assert hit > 3 * share and share == pytest.approx(np.mean(covered))
    for sign in (1, -1):
        monkeypatch.setattr(dense, "text_maps", lambda *_: sign * (next(labels) == np.arange(1, 65)[:, None, None]))
        assert dense.pointing_game(ColorModel(), None, world, 20, ("{}",), "plain")[0] == max(sign, 0)


def test_words_of_a_caption():
    caption = "A photo of a small red circle to the left of two blue squares, plus a red star."
    assert dense.words_of(caption) == ["small", "red", "circle", "blue", "squares", "star"]
    assert dense.words_of(caption, "phrase") == ["small red circle", "blue squares", "red star"]
    assert dense.words_of("Golden retriever, tongue out: a dog's day at the beach!", "phrase") == [
        "golden retriever", "tongue out", "dog's day", "beach"]


@pytest.fixture
def drawn_words(monkeypatch) -> list[tuple]:
    """The phrases of each picture that dense.words draws, and their maps."""
    real, drawn = dense.draw_words, []

    def draw_words(image, caption, phrases, maps, names):
        drawn.append((phrases, maps))
        return real(image, caption, phrases, maps, names)
    monkeypatch.setattr(dense, "draw_words", draw_words)
    return drawn


@pytest.mark.parametrize("more, n_models, phrases", [
    (["--words", "red circle, moon"], 1, ["red circle", "moon"]),
    (["--compare", "same"], 2, None),
])
def test_words_command(checkpoint, tmp_path, drawn_words, more, n_models, phrases):
    more = [str(checkpoint) if word == "same" else word for word in more]
    dense.main(["words", str(checkpoint), "--samples", "2", "--out", str(tmp_path), *more])
    assert len(drawn_words) == 2
    for found, maps in drawn_words:
        assert maps.shape == (n_models, len(found), 32, 32) and (phrases is None or found == phrases)
    assert PIL.Image.open(tmp_path / "words.png").size[1] == 2 * (160 + 6 + 18 * 3)


def test_one_caption_without_words_costs_one_picture(checkpoint, tmp_path, drawn_words, capsys):
    for name in ("a", "b"):
        PIL.Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    (tmp_path / "t.csv").write_text("filepath,title\na.png,???\nb.png,a red circle\n")
    dense.main(["words", str(checkpoint), "--data", f"csv:{tmp_path}/t.csv", "--out", str(tmp_path / "out")])
    assert len(drawn_words) == 1 and "skipped: nothing to look for in the caption '???'" in capsys.readouterr().out


@pytest.mark.parametrize("specs, template, words", [
    (["shapes", "shapes:size=48"], "a {}", ["small red circle"]),          # as its captions have them
    (["shapes", "csv:pairs.csv"], "85", ["small", "red", "circle"]),
    ([], "85", ["small", "red", "circle"]),                                # weights from elsewhere
])
def test_a_model_is_asked_in_words_it_has_read(checkpoint, trained_on, tmp_path, drawn_words, specs, template, words):
    trained_on[:] = specs
    model = dense.load_checkpoint(checkpoint)[0]
    assert dense.find_templates(model, "auto", "85") == data.find_templates(template)
    assert dense.find_templates(model, "7", "85") == data.TEMPLATES_7
    photo = tmp_path / "photo.png"
    PIL.Image.new("RGB", (40, 30), "red").save(photo)
    dense.main(["words", str(checkpoint), "--image", str(photo), "--caption", "A small red circle.", "--out",
                str(tmp_path)])
    (found, maps), = drawn_words
    assert maps.shape == (1, len(words), 30, 40) and found == words


def test_zeroshot_command(checkpoint, tmp_path):
    dense.main(["zeroshot", str(checkpoint), "--data", "shapes:objects=2-4,val=5", "--out", str(tmp_path), "--draw",
                "2", "--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["images"] == 5 and 0 <= result["miou"] <= 1 and len(result["iou"]) == 64
    assert result["protocol"]["window"] == 32 and result["protocol"]["stride"] == 16
    assert result["protocol"]["resized_to"] == "short 48, long 192" and (tmp_path / "maps.png").is_file()


@pytest.mark.parametrize("kind, more, short, long, n_classes, templates", [
    ("ade20k", [], 512 * 32 // 224, 4 * 73, 150, 85),
    ("pascal-context", [], 520 * 32 // 224, 74, 59, 85),               # as large as a square of 520 holds
    ("pascal-context", ["--test-size", "68"], 68, 4 * 68, 59, 85),
    ("coco-stuff", ["--templates", "a photo of a {}."], 512 * 32 // 224, 4 * 73, 171, 1),
    ("voc", ["--templates", "7"], 512 * 32 // 224, 4 * 73, 4, 7),
])
def test_protocol_of_each_data_set(checkpoint, trained_on, tmp_path, monkeypatch, kind, more, short, long, n_classes,
                                   templates):
    """The paper's 512, DenseCLIP's 520 and 85 for windows of 224, here in proportion to a window of 32."""
    trained_on.append("shards:pairs.tar")
    build(kind, tmp_path)
    sizes, real = [], dense.slide
    monkeypatch.setattr(dense, "slide", lambda image, *how: sizes.append(image.shape[1:]) or real(image, *how))
    dense.main(["zeroshot", str(checkpoint), "--data", f"{kind}:{tmp_path}", "--limit", "2", "--draw", "0", "--json",
                str(tmp_path / "r.json"), *more])
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["protocol"]["resized_to"] == f"short {short}, long {long}"
    assert sizes[0] == (min(short, round(long * 30 / 40)), min(long, round(short * 40 / 30)))       # of 40 x 30 pixels
    assert result["protocol"]["templates"].startswith(f"{templates} (") and result["protocol"]["path"] == "code"
    assert len(result["iou"]) == n_classes and result["images"] == 2


@pytest.mark.parametrize("split, values, complaint", [
    ("train", {0: 0, 1: 255, 2: 255, 3: 255}, r"train.txt: .* 1 of 4 classes \(background\); .* wants 1 in place"),
    ("train", {0: 255, 1: 2, 2: 2, 3: 2}, r"1 of 4 classes \(dog\)"),
    ("train", {0: 255, 1: 255, 2: 255, 3: 255}, r"0.0% of the pixels in 3 label maps .* 0 of 4 classes \(none\)"),
    ("train", {0: 0, 1: 4, 2: 77, 3: 128}, "3 cannot be used, the first is .*label out of range: 128"),
    ("train", "1", "3 cannot be used, the first is .* mode 1"),         # black and white, with one bit a pixel
    ("val", {0: 0, 1: 255, 2: 255, 3: 255}, r"val.txt: .* 1 of 4 classes"),
    ("val", "gone", "val.txt is not there"),
    ("val", {1: 0, 2: 0}, None),                                        # two classes of four are enough
    ("train", {3: 0}, None),                                            # what is in val alone is named
])
@pytest.mark.parametrize("command", ["upernet", "zeroshot"])
def test_labels_that_say_nothing_are_refused_before_the_first_step(checkpoint, tmp_path, capsys, command, split, values,
                                                                   complaint):
    """values: what the label files of the split hold in place of 0, 1, 2, 3."""
    build("voc", tmp_path, count=3)
    listing = tmp_path / f"ImageSets/Segmentation/{split}.txt"
    for path in tmp_path.glob(f"SegmentationClass/{split}_*.png"):
        label = np.array(PIL.Image.open(path))
        new = np.vectorize(lambda value: values.get(value, value), otypes=[np.uint8])(label) if values not in (
            "1", "gone") else label
        PIL.Image.fromarray(new).convert("1" if values == "1" else "L").save(path)
    if values == "gone":
        listing.unlink()
    arguments = [command, str(checkpoint), "--data", f"voc:{tmp_path}", "--out", str(tmp_path / "out"), "--json",
                 str(tmp_path / "r.json"), "--draw", "0", "--test-size", "32"]
    if command == "upernet":
        arguments += [*SMALL[2:], "--recipe", "pocket", "--steps", "1", "--batch-size", "2"]
    if complaint is None or command == "zeroshot" and split == "train":
        dense.main(arguments)
        said = capsys.readouterr().out
        assert "val.txt: " in said and "label maps have a class, of" in said
        assert ("not seen among those learned (background, cat, dog): tv/monitor" in said) == (
            values == {3: 0} and command == "upernet")
    else:
        with pytest.raises(UserError, match=complaint) as told:
            dense.main(arguments)
        assert "\n" not in str(told.value) and not (tmp_path / "r.json").exists()
        assert not (tmp_path / "out/metrics.jsonl").exists()


def test_a_rare_class_among_many_label_maps(tmp_path, monkeypatch):
    """Some maps are looked at, and all before labels are refused."""
    monkeypatch.setattr(data, "LOOKED_AT", 3)
    build("voc", tmp_path, count=12)
    paths = sorted(tmp_path.glob("SegmentationClass/train_*.png"))
    train = open_data(f"voc:{tmp_path}", "train", "segmentation")
    counts, said, _ = train.tally(False)
    assert "in 3 label maps" in said and (counts > 0).all()
    for path in paths:
        PIL.Image.new("L", PIL.Image.open(path).size, 0).save(path)
    last = paths[data.epoch_order(12, 0, 0)[-1]]
    PIL.Image.new("L", PIL.Image.open(last).size, 1).save(last)
    assert data.look_at_labels(train) == ["background", "cat"]
    PIL.Image.new("L", PIL.Image.open(last).size, 0).save(last)
    with pytest.raises(UserError, match="in 12 label maps .* 1 of 4 classes"):
        data.look_at_labels(train)


@pytest.mark.parametrize("arguments, complaint", [
    (["paint"], "choose one of zeroshot, words, upernet"),
    (["zeroshot", "nowhere.pt"], "no checkpoint at nowhere.pt"),
    (["zeroshot", "CHECKPOINT", "--data", "folder:DIR/images"], "cannot open .* for segmentation"),
    (["zeroshot", "CHECKPOINT", "--templates", "a photo of {a}"], "one {}"),
    (["words", "CHECKPOINT", "--image", "nowhere.jpg", "--caption", "a cat"], "nowhere.jpg"),
    (["words", "CHECKPOINT", "--image", "DIR/images/val2017/val_0.jpg"], "no picture with words to look for"),
    (["words", "CHECKPOINT", "--caption", "a cat"], "--caption is of --image"),
    (["zeroshot", "CHECKPOINT", "--data", "shapes", "--data", "voc:DIR"], "--data is given 2 times, wanted one"),
    (["upernet", "CHECKPOINT", "--test-size", "0", "--out", "OUT"], "--test-size must be a number from 1"),
    (["upernet", "CHECKPOINT", "--data", "coco-stuff:DIR", "--out", "OUT"], "5 records are fewer than a batch of 16"),
    (["upernet", "CHECKPOINT", "--batch-size", "1", "--out", "OUT"], "--batch-size 1: .* wants 2 images or more"),
    (["upernet", "CHECKPOINT", "--out", "OUT", "--crop", "60"], "--crop 60: .* of 8 pixels, such as 64"),
    (["upernet", "CHECKPOINT", "--out", "OUT", "--crop", "24"], "--crop 24: .* of two .* of 8 pixels, such as 32"),
    (["upernet", "CHECKPOINT", "--out", "OUT", "--crop", "8"], "--crop 8: .* such as 16"),         # a patch
])
def test_mistakes_are_told_in_a_line(checkpoint, tmp_path, arguments, complaint):
    build("coco-stuff", tmp_path)
    for word, value in (("CHECKPOINT", checkpoint), ("DIR", tmp_path), ("OUT", tmp_path / "out")):
        arguments = [argument.replace(word, str(value)) for argument in arguments]
    if "upernet" in arguments:
        arguments += ["--channels", "8", *(["--crop", "64"] if "--crop" not in arguments else [])]
    with pytest.raises(UserError, match=complaint) as told:
        dense.main(arguments)
    assert "\n" not in str(told.value)


# ---- batch normalization over processes ------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5, 7)])
@pytest.mark.parametrize("affine", [True, False])
def test_sync_batch_norm_on_one_process_is_batch_norm(shape, affine):
    ours = SyncBatchNorm(4, affine=affine)
    theirs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(4, affine=affine)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for training in (True, True, False):
        x = torch.randn(shape) * 3 + 1
        assert torch.equal(ours.train(training)(x), theirs.train(training)(x))
    with pytest.raises(ValueError, match="wanted"):
        ours(torch.randn(2, 4, 5))


def joined_batches(rank: int, world: int) -> dict:
    """On each of `world` processes: batch norm of its own rows, and UperNet's gradient."""
    torch.manual_seed(0)
    results = {}
    for name, x in (("flat", torch.randn(12, 4)), ("maps", torch.randn(12, 4, 3, 5))):
        layer, bounds = SyncBatchNorm(4), ([0, 4, 12] if world == 2 else [0, 12])            # 4 and 8 rows
        nn.init.normal_(layer.weight)
        x, target = (x * 2 + 3).requires_grad_(), torch.randn_like(x)
        rows = slice(bounds[rank], bounds[rank + 1])
        (layer(x[rows]) * target[rows]).sum().backward()                                # the joined loss is their sum
        for tensor in (x.grad, layer.weight.grad, layer.bias.grad) if world > 1 else ():
            torch.distributed.all_reduce(tensor)
        results[name] = [x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]
    net = dense.UperNet(VisionTransformer(32, 8, 16, 3, 2), 5, channels=8, aux_channels=4)
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(0, 5, (4, 32, 32))
    labels[:1, 4:] = 255
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    rows = slice(4 // world * rank, 4 // world * (rank + 1))
    loss = sum(dense.pixel_cross_entropy(scores, labels[rows]) for scores in model(images[rows]))
    loss.backward()
    results["net"] = [p.grad for p in net.parameters()] + [b for b in net.buffers() if b.is_floating_point()]
    return results


@pytest.mark.slow
def test_two_processes_are_one_with_the_joined_batch(tmp_path):
    one, two = joined_batches(0, 1), on_processes(joined_batches, 2, tmp_path)[0]
    for name in one:
        for a, b in zip(one[name], two[name], strict=True):
            torch.testing.assert_close(b, a, atol=2e-6, rtol=2e-4, msg=lambda m: f"{name}: {m}")


# ---- UperNet ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("depth, taps", [
    (12, [4, 6, 8, 12]),            # the paper's
    (24, [8, 12, 16, 24]),
    (6, [2, 3, 4, 6]),
    (4, [1, 2, 3, 4]),
    (2, [1, 1, 1, 2]),              # one output serves several scales
])
def test_pyramid(depth, taps):
    visual = VisionTransformer(32, 8, 16, depth, 2)
    pyramid = dense.Pyramid(visual).eval()
    assert pyramid.taps == taps
    images = torch.randn(2, 3, 32, 48)
    maps = pyramid(images)
    assert [tuple(x.shape) for x in maps] == [(2, 16, 16, 24), (2, 16, 8, 12), (2, 16, 4, 6), (2, 16, 2, 3)]
    x, outputs = visual.embed(images), []
    for block in visual.blocks:
        x = block(x)
        outputs.append(x)
    torch.testing.assert_close(maps[2][1, :, 2, 5], outputs[taps[2] - 1][1, 1 + 2 * 6 + 5])    # row 2, column 5
    cells = outputs[-1][:, 1:].reshape(2, 2, 2, 3, 2, 16).amax(dim=(2, 4))                       # 2 x 2 patches each
    torch.testing.assert_close(maps[3], cells.permute(0, 3, 1, 2))


@pytest.mark.parametrize("is_trained", [True, False])
def test_positions_are_resized_once(is_trained):
    visual, images = VisionTransformer(32, 8, 16, 3, 2), torch.randn(1, 3, 48, 48)
    visual.pos_embed.requires_grad_(is_trained)
    want = visual(images)
    dense.resize_positions(visual, 48)
    assert visual.pos_embed.shape == (1, 1 + 6 * 6, 16) and visual.grid == 6
    assert visual.pos_embed.requires_grad == is_trained == ("pos_embed" in dict(
        (name, p) for name, p in visual.named_parameters() if p.requires_grad))
    torch.testing.assert_close(visual(images), want)
    assert torch.equal(visual.positions(6, 6), visual.pos_embed[:, 1:]), "no resizing is left to do"


def test_convolutions_start_as_mmcvs():
    """Kaiming's normal numbers by fan-out: after ReLU the gradient keeps its size.  Scores start near 0."""
    torch.manual_seed(0)
    net = dense.UperNet(VisionTransformer(32, 8, 64, 3, 2), 5, channels=48, aux_channels=32)
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d) and "patch_embed" not in name:
            outputs, _, k, _ = layer.weight.shape
            want = 0.01 if outputs == 5 else math.sqrt(2 / (outputs * k * k))
            assert layer.weight.std().item() == pytest.approx(want, rel=0.15), name


def independent_count(D: int, C: int, n_classes: int, aux: int = 256) -> dict[str, int]:
    """Parameters by part, from the description of BEiT's UperNet: a transposed convolution has a bias, one that is
    normalized has none, but a scale and a shift for each output."""
    def conv(inputs, outputs, kernel):
        return inputs * outputs * kernel ** 2 + 2 * outputs
    transposed = D * D * 2 * 2 + D
    block = 2 * 2 * D + (3 * D * D + 3 * D) + (D * D + D) + (4 * D * D + 4 * D) + (4 * D * D + D)
    return dict(visual=12 * block + D + 197 * D + (3 * 16 * 16 * D + D), up4=2 * transposed + 2 * D, up2=transposed,
                down2=0, pools=4 * conv(D, C, 1), top=conv(D + 4 * C, C, 3), lateral=3 * conv(D, C, 1),
                smooth=3 * conv(C, C, 3), fuse=conv(4 * C, C, 3), classify=C * n_classes + n_classes,
                auxiliary=conv(D, aux, 3) + aux * n_classes + n_classes)


@pytest.mark.parametrize("channels, total", [(768, 162_650_924), (512, 127_020_332)])
def test_parameters_of_vit_b(channels, total):
    with torch.device("meta"):                                          # shapes without numbers
        net = dense.UperNet(VisionTransformer(), 150, channels)
    parts = {name: sum(p.numel() for p in part.parameters())
             for name, part in [*net.named_children(), *net.pyramid.named_children()] if name != "pyramid"}
    assert parts == independent_count(768, channels, 150) and sum(parts.values()) == total
    net = dense.UperNet(VisionTransformer(64, 16, 16, 2, 2), 150, 8, 4)
    scores, auxiliary = net(torch.zeros(2, 3, 128, 64))
    assert scores.shape == (2, 150, 32, 16) and auxiliary.shape == (2, 150, 8, 4)


def test_scores_are_ranked_as_float32():
    """Rounded to bf16 some of 150 classes tie for the first place in one pixel of fifty."""
    net = dense.UperNet(VisionTransformer(32, 8, 16, 2, 2), 150, channels=16, aux_channels=4).eval()
    nn.init.normal_(net.classify[-1].weight)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = net(torch.randn(4, 3, 32, 32))[0].topk(2, dim=1).values.unbind(1)
    assert first.dtype == torch.float32 and (first == second).float().mean() < 1e-3


@pytest.mark.slow
@pytest.mark.soak
def test_a_step_at_full_size_and_its_memory():
    """ViT-B/16, 512 px, two images: forward, backward and update, in a process of its own, whose peak is printed."""
    code = """
import resource, torch, dense
from model import VisionTransformer
from train import layer_decay_groups
net = dense.UperNet(VisionTransformer(), 150)
optimizer = torch.optim.AdamW(layer_decay_groups(net, 2e-4, 0.05, 0.6))
scores, auxiliary = net(torch.randn(2, 3, 512, 512))
labels = torch.randint(0, 150, (2, 512, 512))
loss = dense.pixel_cross_entropy(scores, labels) + 0.4 * dense.pixel_cross_entropy(auxiliary, labels)
loss.backward()
optimizer.step()
assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
print(f"loss {loss:.3f}, peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.1f} GiB")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    loss = float(done.stdout.split()[1].rstrip(","))
    assert loss == pytest.approx(1.4 * math.log(150), rel=0.1)          # nothing is known at the start


# ---- augmentation and loss -------------------------------------------------------------------------------------------

def scene(height: int = 40, width: int = 60) -> data.Sample:
    """Six classes in blocks whose color says the class: red = 40 * (label + 1)."""
    label_map = np.arange(6, dtype=np.uint8).reshape(2, 3).repeat(height // 2, axis=0).repeat(width // 3, axis=1)
    pixels = np.stack([40 * (label_map + 1)] * 3, axis=-1).astype(np.uint8)
    return data.Sample(PIL.Image.fromarray(pixels), label_map=label_map + np.uint8(1))


def test_labels_stay_with_their_pixels():
    transform, flipped, padded = dense.CropTransform(REDUCED, 40, 32, distort=False), 0, 0
    for seed in range(60):
        item = transform(scene(), RNG(seed))
        images, labels = item["images"], item["labels"]
        assert images.shape == (3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
        known = labels != 255
        right = (images[0].float() / 40 - 1).round()[known] == labels[known]
        assert right.float().mean() > 0.85, "only pixels at the edges of blocks may differ"
        assert (images[:, ~known] == torch.tensor([124, 116, 104])[:, None]).all(), "padding is the mean color"
        row = labels[0][known[0]].unique_consecutive().tolist()
        flipped += row == sorted(row, reverse=True) and len(row) > 1
        padded += bool((~known).any())
    assert 15 < flipped < 45 and padded > 4


def test_same_generator_same_item():
    transform = dense.CropTransform(REDUCED, 40, 32, distort=True)
    first, second, other = (transform(scene(), RNG(seed)) for seed in (1, 1, 2))
    assert torch.equal(first["images"], second["images"]) and torch.equal(first["labels"], second["labels"])
    assert not torch.equal(first["images"], other["images"])


def test_no_class_fills_a_crop():
    labels = np.zeros((64, 64), dtype=np.uint8)
    labels[:28, :28] = 1                                                # most crops of 32 show class 0 alone
    transform, good = dense.CropTransform(None, 64, 32, False), 0
    for seed in range(50):
        left, top = transform.corner(labels, RNG(seed))
        assert 0 <= left <= 32 and 0 <= top <= 32
        good += (labels[top:top + 32, left:left + 32] == 0).mean() < 0.75
    anywhere = np.mean([(labels[t:t + 32, l:l + 32] == 0).mean() < 0.75 for t in range(33) for l in range(33)])
    assert anywhere < 0.3 and good / 50 > 0.8                           # 1 - 0.7 ** 11
    labels[:] = 255                                                     # nothing labeled: any crop, after ten redraws
    assert all(0 <= at <= 32 for at in transform.corner(labels, RNG(0)))


def test_photometric_distortion_changes_within_its_bounds():
    rng = RNG(3)
    pixels = rng.integers(60, 190, (8, 8, 3), dtype=np.uint8)
    image, seen = PIL.Image.fromarray(pixels), set()
    for seed in range(150):
        out = np.asarray(dense.photometric_distortion(image, RNG(seed)))
        assert out.shape == pixels.shape
        seen.add(out.tobytes())
    assert len(seen) > 100 and pixels.tobytes() in seen, "distinct, and 1 of 16 stays as it is"


@pytest.mark.parametrize("which, expected", [
    ("brightness", lambda rgb, draw: [v + draw for v in rgb]),
    ("contrast", lambda rgb, draw: [v * draw for v in rgb]),
    ("saturation", lambda rgb, draw: in_hsv(rgb, lambda h, s, v: (h, min(1, s * draw), v))),
    ("hue", lambda rgb, draw: in_hsv(rgb, lambda h, s, v: ((h + draw / 180) % 1, s, v))),
])
def test_each_distortion_by_its_formula(which, expected):
    """Against colorsys, whose hue is not rounded to 256 steps: to within a few levels."""
    order = ("brightness", "contrast", "contrast_first", "saturation", "hue")
    low, high = dict(brightness=(-32, 32), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=(-18, 18))[which]

    class Draws:                                                        # chooses one distortion and a strength
        def random(self, n):
            return np.array([0.0 if name == which else 1.0 for name in order])

        def uniform(self, a, b):
            return 0.8 * b if (a, b) == (low, high) else a

        def integers(self, a, b):
            assert (a, b) == (-18, 18)
            return 11

    draw = 11 if which == "hue" else 0.8 * high
    pixels = RNG(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    out = np.asarray(dense.photometric_distortion(PIL.Image.fromarray(pixels), Draws())).astype(float)
    want = np.array([[expected(rgb.astype(float), draw) for rgb in row] for row in pixels]).clip(0, 255)
    assert np.abs(out - want).max() <= (1 if which in ("brightness", "contrast") else 8)


def in_hsv(rgb, change):
    return [255 * v for v in colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*(v / 255 for v in rgb))))]


@pytest.mark.parametrize("step, want", [
    (0, 1e-6),                      # mmsegmentation's warm-up ratio
    (750, 0.5 * (1 - 750 / 160_000)),
    (1500, 1 - 1500 / 160_000),     # the decay began at step 0
    (80_000, 0.5),
    (159_999, 1 / 160_000),
])
def test_linear_schedule(step, want):
    assert dense.linear_schedule(step, 160_000, 1500) == pytest.approx(want, rel=1e-3)


def test_pixel_cross_entropy_by_a_loop():
    scores, labels = torch.randn(2, 3, 6, 6), torch.randint(0, 3, (2, 6, 6))
    labels.view(-1)[:10] = 255
    want = 0.0
    for b, y, x in itertools.product(range(2), range(6), range(6)):
        if labels[b, y, x] != 255:
            want -= scores[b, :, y, x].log_softmax(dim=0)[labels[b, y, x]].item()
    assert dense.pixel_cross_entropy(scores, labels).item() == pytest.approx(want / labels.numel(), rel=1e-5)
    nothing = dense.pixel_cross_entropy(scores.requires_grad_(), torch.full_like(labels, 255))
    nothing.backward()
    assert nothing.item() == 0 and (scores.grad == 0).all()


# ---- the run ---------------------------------------------------------------------------------------------------------

SMALL = ["--data", "shapes:objects=2-3,train=40,val=4", "--crop", "32", "--test-size", "48", "--batch-size", "4",
         "--channels", "8", "--warmup-steps", "2", "--log-every", "1", "--workers", "0"]


def test_resumed_upernet_is_the_same_to_the_bit(checkpoint, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    dense.main(["upernet", str(checkpoint), *SMALL, "--steps", "8", "--out", str(whole), "--json", f"{whole}.json"])
    result = json.loads((tmp_path / "whole.json").read_text())
    assert result["images"] == 4 and (whole / "maps.png").is_file() and (whole / "curves.png").is_file()
    assert result["protocol"]["label_0"] == "left out"
    parts.mkdir()
    state = stopped_after(3, checkpoint, parts)
    assert state["step"] == 3 and state["kind"] == "upernet"
    dense.main(["upernet", str(checkpoint), *SMALL, "--steps", "8", "--out", str(parts)])
    a, b = (load_state(out / "last.pt")["model"] for out in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)
    logs = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (whole, parts)]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]] and len(logs[0]) == 8
    assert {"step", "epoch", "loss", "lr", "segmentation", "auxiliary", "samples_per_second"} <= logs[0][0].keys()
    with pytest.raises(UserError, match="another"):                     # and another run does not overwrite it
        dense.main(["upernet", str(checkpoint), *SMALL, "--steps", "8", "--lr", "9", "--out", str(parts)])


def stopped_after(steps: int, checkpoint, out) -> dict:
    """Leaves a run that was asked to stop, and did."""
    class Stop:
        number, asked, waiting = 15, 0, False

        @property
        def is_set(self):
            Stop.asked += 1
            return Stop.asked >= steps

    real, finetune.StopSignal = finetune.StopSignal, Stop
    try:
        with pytest.raises(SystemExit) as ended:
            dense.main(["upernet", str(checkpoint), *SMALL, "--steps", "8", "--out", str(out)])
        assert ended.value.code == 143
    finally:
        finetune.StopSignal = real
    return load_state(out / "last.pt")


@pytest.mark.parametrize("argv, recipe, clip_grad", [
    (["--data", "ade20k:x"], "ade20k", 0), ([], "pocket", 3), (["--data", "voc:x", "--clip-grad", "3"], "ade20k", 3)])
def test_clipping_is_an_option(argv, recipe, clip_grad):
    options = dense.parse_upernet(argv)
    assert (options.recipe, options.clip_grad) == (recipe, clip_grad)


@pytest.mark.slow
def test_upernet_learns_on_two_processes(checkpoint, tmp_path):
    few = ["--data", "shapes:objects=2-3,by=shape,train=4,val=4", *SMALL[2:]]           # learned by heart
    run_script("dense.py", "upernet", checkpoint, *few, "--steps", 80, "--lr", 3e-3, "--out", tmp_path,
               "--json", tmp_path / "r.json", processes=2)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10]), losses
    assert json.loads((tmp_path / "r.json").read_text())["images"] == 4


def test_backbone_learns_slower_the_lower_it_is(checkpoint):
    model, _, _ = tiny_model()
    net = dense.UperNet(model.visual, 5, channels=8, aux_channels=4)
    rates = {id(p): group["lr"] for group in layer_decay_groups(net, 1.0, 0.05, 0.6) for p in group["params"]}
    want = {"pyramid.visual.pos_embed": 0.6 ** 4, "pyramid.visual.blocks.0.mlp.fc1.weight": 0.6 ** 3,
            "pyramid.visual.blocks.2.norm1.weight": 0.6, "pyramid.up4.0.weight": 1.0, "classify.1.weight": 1.0}
    parameters = dict(net.named_parameters())
    assert len(rates) == len(parameters)
    for name, rate in want.items():
        assert rates[id(parameters[name])] == pytest.approx(rate), name
