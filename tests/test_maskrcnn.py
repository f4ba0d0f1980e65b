"""Mask R-CNN: anchors, box coding, which box is to find what, sampling, networks, losses, COCO's folders, the run.

    python -m pytest tests/test_maskrcnn.py
"""
import io
import itertools
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import data
import dense
import finetune
from conftest import ROOT, SHARED, needs_shared, on_processes
from data import BadRecord, UserError, open_data, train_batches
from dense import NEGATIVE, UNUSED, assign, decode_boxes, draw_boxes, encode_boxes, make_anchors
from model import PRESETS, MaskCLIP, VisionTransformer, save_checkpoint
from train import layer_decay_groups, load_state

torch.set_num_threads(1)
PEER = "torchvision is the peer for boxes: pip install -r requirements-dev.txt"
RNG = np.random.default_rng


def random_boxes(n: int, seed: int, size: float = 100) -> torch.Tensor:
    corner, extent = torch.rand(2, n, 2, generator=torch.Generator().manual_seed(seed)) * size
    return torch.cat((corner, corner + extent + 1), dim=1)


# ---- anchors and box coding ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rows, columns, stride, index, want", [
    (2, 3, 4, 1, (-16, -16, 16, 16)),                               # a square of 8 strides around the very corner
    (2, 3, 4, 4, (-12, -16, 20, 16)),                               # one cell to the right
    (2, 3, 4, 3 * 3 + 1, (-16, -12, 16, 20)),                       # one cell down: after a row of 3 x 3
    (2, 3, 4, 0, (-22.627417, -11.313708, 22.627417, 11.313708)),   # half as high as wide, of the same area
    (2, 3, 4, 2, (-11.313708, -22.627417, 11.313708, 22.627417)),   # twice as high
    (1, 1, 64, 1, (-256, -256, 256, 256)),                          # the coarsest: 512 pixels
])
def test_anchors_by_hand(rows, columns, stride, index, want):
    anchors = make_anchors(rows, columns, stride)
    assert anchors.shape == (rows * columns * 3, 4) and anchors[index].tolist() == pytest.approx(want)


def test_anchors_are_torchvisions():
    utils = pytest.importorskip("torchvision.models.detection.anchor_utils", reason=PEER)
    images = pytest.importorskip("torchvision.models.detection.image_list", reason=PEER)
    theirs = utils.AnchorGenerator(sizes=((64,), (128,)), aspect_ratios=((0.5, 1.0, 2.0),) * 2)
    maps = [torch.zeros(1, 1, 4, 6), torch.zeros(1, 1, 2, 3)]
    want = theirs(images.ImageList(torch.zeros(1, 3, 32, 48), [(32, 48)]), maps)[0]
    ours = torch.cat([make_anchors(4, 6, 8), make_anchors(2, 3, 16)])
    assert ours.shape == want.shape and (ours - want).abs().max() <= 0.5, "theirs are rounded to whole pixels"
    assert torch.equal(ours[1::3], want[1::3])                      # the squares, which are whole


@pytest.mark.parametrize("box, anchor, want", [
    ((0, 0, 10, 10), (0, 0, 10, 10), (0, 0, 0, 0)),
    ((5, 0, 15, 10), (0, 0, 10, 10), (0.5, 0, 0, 0)),                               # half its width to the right
    ((0, 0, 20, 10), (0, 0, 10, 10), (0.5, 0, math.log(2), 0)),                     # twice as wide
    ((2, 4, 4, 5), (0, 0, 4, 2), (0.25, 1.75, math.log(0.5), math.log(0.5))),
])
def test_box_coding_by_hand(box, anchor, want):
    box, anchor = torch.tensor([box], dtype=torch.float64), torch.tensor([anchor], dtype=torch.float64)
    assert encode_boxes(box, anchor)[0].tolist() == pytest.approx(want)
    scaled = encode_boxes(box, anchor, (0.1, 0.2))[0].tolist()
    assert scaled == pytest.approx([w / s for w, s in zip(want, (0.1, 0.1, 0.2, 0.2))])


def test_box_coding_there_and_back():
    boxes, anchors = random_boxes(200, 0), random_boxes(200, 1)
    for scale in ((1, 1), dense.BOX_SCALE):
        torch.testing.assert_close(decode_boxes(encode_boxes(boxes, anchors, scale), anchors, scale), boxes,
                                   atol=1e-3, rtol=1e-4)
    limited = decode_boxes(torch.tensor([[0.0, 0.0, 99.0, -99.0]]), torch.tensor([[0.0, 0.0, 16.0, 16.0]]))
    width, height = dense.center_and_size(limited)[1][0].tolist()
    assert width == pytest.approx(1000) and height == pytest.approx(16 * 16 / 1000)     # and no overflow


def test_box_coding_is_torchvisions():
    utils = pytest.importorskip("torchvision.models.detection._utils", reason=PEER)
    theirs, boxes, anchors = utils.BoxCoder((10, 10, 5, 5)), random_boxes(50, 2), random_boxes(50, 3)
    deltas = encode_boxes(boxes, anchors, dense.BOX_SCALE)
    torch.testing.assert_close(deltas, theirs.encode_single(boxes, anchors))
    deltas += torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(decode_boxes(deltas, anchors, dense.BOX_SCALE), theirs.decode_single(deltas, anchors))


def test_clipping():
    boxes = torch.tensor([[-5.0, 2, 10, 50], [-9, -9, -1, 5], [3, 3, 3, 8], [math.nan] * 4])
    clipped, is_left = dense.clip_boxes(boxes.expand(2, 4, 4), torch.tensor([[20, 30], [99, 99]]))
    assert clipped[:, 0].tolist() == [[0, 2, 10, 20], [0, 2, 10, 50]]
    assert is_left.tolist() == 2 * [[True, False, False, False]]


# ---- which box is to find what ---------------------------------------------------------------------------------------

def slow_assign(iou, positive, negative, low_quality):
    """The rule, box by box and object by object, as mmdetection's MaxIoUAssigner states it."""
    assigned = []
    for a in range(iou.shape[1]):
        overlaps = iou[:, a].tolist()
        best = max(overlaps, default=0)
        assigned.append(overlaps.index(best) if best >= positive else NEGATIVE if best < negative else UNUSED)
    for g in range(iou.shape[0]):
        best = max(iou[g].tolist())
        if best >= low_quality:
            assigned = [g if value == best else old for value, old in zip(iou[g].tolist(), assigned)]
    return assigned


@pytest.mark.parametrize("G, A, positive, negative, low_quality", [
    (0, 9, 0.7, 0.3, 0.3),              # an image without objects: nothing to find
    (1, 50, 0.7, 0.3, 0.3),             # the RPN's rule
    (7, 400, 0.7, 0.3, 0.3),
    (40, 300, 0.7, 0.3, 0.01),          # many objects that ask for the same anchors
    (7, 400, 0.5, 0.5, math.inf),       # the heads' rule: nothing in between
    (7, 400, 0.5, 0.5, 0.5),
])
def test_assign_against_a_loop(G, A, positive, negative, low_quality):
    noise = torch.rand(G, A, generator=torch.Generator().manual_seed(A), dtype=torch.float64)
    iou = (noise ** 2 * 20).round() / 20                                # many ties, and the thresholds themselves
    want = slow_assign(iou, positive, negative, low_quality)
    assert assign(iou, positive, negative, low_quality).tolist() == want
    filled_up = torch.stack([torch.cat([iou, torch.zeros(3, A)])] * 2)    # two images, with room for objects
    assert assign(filled_up, positive, negative, low_quality).tolist() == [want, want]


def test_every_object_gets_an_anchor():
    anchors = torch.cat([make_anchors(16 // 2 ** k, 16 // 2 ** k, 4 * 2 ** k) for k in range(4)])
    boxes = torch.tensor([[10.0, 10, 30, 40], [0, 0, 64, 64], [20, 20, 52, 30]])
    assigned = assign(dense.box_iou(boxes, anchors), 0.7, 0.3, low_quality=0.3)
    assert set(range(3)) <= set(assigned.tolist())


@pytest.mark.parametrize("positives, negatives, count, share, want", [
    (500, 9000, 256, 0.5, (128, 128)),      # the RPN's
    (3, 9000, 256, 0.5, (3, 253)),          # few objects: negatives make up for them
    (500, 10, 256, 0.5, (128, 10)),         # but not the other way around
    (0, 9000, 512, 0.25, (0, 512)),         # an image without objects
    (400, 9000, 512, 0.25, (128, 384)),     # the heads'
    (0, 0, 64, 0.5, (0, 0)),
])
def test_sampling(positives, negatives, count, share, want):
    assigned = torch.full((2, positives + negatives + 20), UNUSED)
    order = torch.randperm(assigned.shape[1], generator=torch.Generator().manual_seed(1))
    assigned[0, order[:positives]], assigned[0, order[positives:positives + negatives]] = 3, NEGATIVE
    assigned[1, 2], assigned[1, 3:5] = 1, NEGATIVE                      # an image beside it, of which all are drawn

    def draw():
        return draw_boxes(assigned, [torch.Generator().manual_seed(seed) for seed in (0, 1)], count, share)
    image, index, owner = draw()
    found, others = index[:len(owner)][image[:len(owner)] == 0], index[len(owner):][image[len(owner):] == 0]
    assert (len(found), len(others)) == want and sorted(index[image == 1].tolist()) == [2, 3, 4]
    assert owner.tolist() == [3] * len(found) + [1]
    assert (assigned[0, found] == 3).all() and (assigned[0, others] == NEGATIVE).all()
    assert len(set(found.tolist() + others.tolist())) == sum(want), "none twice"
    assert all(torch.equal(*pair) for pair in zip(draw(), (image, index, owner))), "a function of the seed"


def test_each_is_drawn_as_often():
    assigned, drawn = torch.tensor([[0] * 4 + [NEGATIVE] * 6 + [UNUSED]]), torch.zeros(11)
    for seed in range(2000):
        _, index, _ = draw_boxes(assigned, [torch.Generator().manual_seed(seed)], 5, 0.4)
        drawn[index] += 1 / 2000
    torch.testing.assert_close(drawn, torch.tensor([2 / 4] * 4 + [3 / 6] * 6 + [0.0]), atol=0.05, rtol=0)


def test_draw_rois_adds_the_true_boxes():
    true_boxes = torch.tensor([[[0.0, 0, 10, 10], [50, 50, 60, 70]], [[0, 0, 5, 5], [0, 0, 0, 0]]])
    proposals = torch.tensor([[[0.0, 0, 10, 6], [90, 0, 99, 9]], [[30, 30, 40, 40], [0, 0, 0, 0]]])
    truth = dict(boxes=true_boxes, generators=[None, None])
    image, boxes, owner = dense.draw_rois(proposals, truth, 100)
    found = sorted(zip(image.tolist(), owner.tolist(), boxes.tolist()))
    assert found == [(0, 0, [0, 0, 10, 6]), (0, 0, [0, 0, 10, 10]), (0, 1, [50, 50, 60, 70]), (1, 0, [0, 0, 5, 5])]
    assert list(zip(image.tolist(), boxes.tolist()))[4:] == [(0, [90, 0, 99, 9]), (1, [30, 30, 40, 40])]


@pytest.mark.parametrize("width, height, level", [
    (1, 1, 0), (10, 10, 0), (111, 111, 0),  # up to 112 pixels the finest map, stride 4
    (112, 112, 1), (223, 223, 1),
    (224, 224, 2), (112, 448, 2),           # the area decides
    (448, 448, 3), (1333, 800, 3),          # the coarsest of the four; never the fifth
])
def test_levels(width, height, level):
    assert dense.roi_levels(torch.tensor([[3.0, 5.0, 3.0 + width, 5.0 + height]]), 56).tolist() == [level]


def test_levels_are_torchvisions():
    poolers = pytest.importorskip("torchvision.ops.poolers", reason=PEER)
    boxes = random_boxes(500, 0, size=900)
    assert torch.equal(dense.roi_levels(boxes, 56), poolers.LevelMapper(2, 5)([boxes]))


def test_masks_of_squares_cut_out():
    masks = [torch.zeros(1, 64, 64, dtype=torch.bool), torch.zeros(2, 64, 56, dtype=torch.bool)]     # of two images
    masks[0][0, 10:38, 20:48] = True
    masks[1][1, 0:32] = True
    boxes = torch.tensor([[20.0, 10, 48, 38], [6, 10, 62, 38], [0, 0, 56, 64], [20, 10, 48, 38]])
    cut = dense.cut_masks(masks, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]), boxes)
    assert cut.shape == (4, 28, 28) and cut.unique().tolist() == [0, 1]
    assert cut[0].all(), "the box of the square: all of it"
    want = torch.zeros(28, 28)
    want[:, 7:21] = 1
    assert torch.equal(cut[1], want), "twice as wide: the middle half"
    want = torch.zeros(28, 28)
    want[:14] = 1
    assert torch.equal(cut[2], want), "the upper half"
    assert cut[3, :22].all() and not cut[3, 22:].any(), "rows 10 to 32 of 10 to 38"


# ---- networks --------------------------------------------------------------------------------------------------------

def small_options(**more) -> dense.MaskRCNNOptions:
    return replace(dense.parse_maskrcnn([]), **dict(dict(channels=16, head_width=64, mask_depth=4), **more))


def small_net(n_classes: int = 3, **more) -> dense.MaskRCNN:
    torch.manual_seed(0)
    return dense.MaskRCNN(VisionTransformer(32, 8, 32, 3, 2), n_classes, small_options(**more))


def truth_of(*images: list[tuple]) -> dict:
    """[(x1, y1, x2, y2, label), ...] of each image of 64 x 64 -> truth, with masks that fill the boxes."""
    masks = [torch.zeros(len(things), 64, 64, dtype=torch.bool) for things in images]
    for things, some in zip(images, masks):
        for mask, (x1, y1, x2, y2, _) in zip(some, things):
            mask[y1:y2, x1:x2] = True
    boxes = [torch.tensor([thing[:4] for thing in things], dtype=torch.float32).reshape(-1, 4) for things in images]
    labels = [torch.tensor([thing[4] for thing in things], dtype=torch.long) for things in images]
    return dict(boxes=pad_sequence(boxes, batch_first=True), labels=pad_sequence(labels, batch_first=True), masks=masks,
                generators=[None] * len(images))


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(64, 64), (48, 80)])         # 80 / 16 = 5 columns: the fifth map has 3
def test_shapes(height, width):
    net = small_net().eval()
    assert net.strides == [2, 4, 8, 16, 32]
    maps, scores, deltas, anchors = net.see(torch.randn(2, 3, height, width))
    for x, score, delta, anchor, stride in zip(maps, scores, deltas, anchors, net.strides):
        rows, columns = math.ceil(height / stride), math.ceil(width / stride)
        assert x.shape == (2, 16, rows, columns) and score.shape == (2, rows * columns * 3)
        assert delta.shape == (2, rows * columns * 3, 4) and anchor.shape == (rows * columns * 3, 4)
    assert net.mask_head(torch.randn(5, 16, 14, 14)).shape == (5, 3, 28, 28)


@torch.no_grad()
def test_anchors_are_in_the_order_of_the_head():
    """A head that answers with where it looks: the score of an anchor is its own column, row and ratio."""
    head = dense.ProposalHead(2)
    head.conv.weight.zero_()
    head.conv.weight[0, 0, 1, 1] = head.conv.weight[1, 1, 1, 1] = 1
    head.score.weight.copy_(torch.tensor([[1.0, 100.0]]).expand(3, 2)[:, :, None, None])
    head.score.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    center, size = dense.center_and_size(make_anchors(4, 5, 8))
    ratio = ((size[:, 1] / size[:, 0]).log2() + 2) / 10                 # 0.1, 0.2, 0.3
    want = center[:, 0] / 8 + 100 * center[:, 1] / 8 + ratio
    torch.testing.assert_close(head(torch.stack([x, y])[None])[0][0], want)


@torch.no_grad()
def test_feature_pyramid_is_torchvisions():
    ops = pytest.importorskip("torchvision.ops", reason=PEER)
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
    ours, theirs = dense.FeaturePyramid(6, 4), ops.FeaturePyramidNetwork([6] * 4, 4, LastLevelMaxPool())
    names = {"lateral": "inner_blocks", "smooth": "layer_blocks"}
    theirs.load_state_dict({f"{names[part]}.{i}.0.{kind}": value for name, value in ours.state_dict().items()
                            for part, i, kind in [name.split(".")]})
    maps = [torch.randn(2, 6, 16 // 2 ** k, 24 // 2 ** k) for k in range(4)]
    for a, b in zip(ours(maps), theirs(dict(enumerate(maps))).values(), strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_boxes_are_read_from_their_level_in_order():
    net, maps = small_net(), [torch.full((2, 1, 64 // s, 64 // s), float(s)) for s in (2, 4, 8, 16, 32)]
    maps = [x + 100 * torch.arange(2.0)[:, None, None, None] for x in maps]                 # and from their image
    large, small = [0.0, 0.0, 60.0, 60.0], [0.0, 0.0, 9.0, 9.0]
    pooled = net.pool(maps, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([large, small, small, large, small]), 7)
    want = torch.tensor([4.0, 2, 102, 104, 102])
    torch.testing.assert_close(pooled, want[:, None, None, None].expand(5, 1, 7, 7))


def test_proposals():
    """Against the definition: per level the best, decoded, clipped, thinned at 0.7; of all levels the best."""
    net, generator = small_net(), torch.Generator().manual_seed(0)
    anchors = [make_anchors(8, 8, 8), make_anchors(4, 4, 16)]
    scores = [torch.randn(2, len(a), generator=generator) for a in anchors]
    deltas = [0.3 * torch.randn(2, len(a), 4, generator=generator) for a in anchors]
    sizes = [(64, 64), (40, 50)]
    for image, proposals in enumerate(net.propose(scores, deltas, anchors, torch.tensor(sizes), before=60, keep=99)):
        (H, W), kept = map(float, sizes[image]), []
        for score, delta, anchor in zip(scores, deltas, anchors):
            candidates = []
            for i in score[image].argsort(descending=True)[:60].tolist():
                x1, y1, x2, y2 = decode_boxes(delta[image, i], anchor[i]).tolist()
                box = [min(max(x1, 0), W), min(max(y1, 0), H), min(max(x2, 0), W), min(max(y2, 0), H)]
                if box[2] > box[0] and box[3] > box[1]:
                    others = torch.tensor([other for _, other in candidates]).reshape(-1, 4)
                    if not (dense.box_iou(torch.tensor([box]), others) > 0.7).any():
                        candidates.append((score[image, i].item(), box))
            kept += candidates
        want = torch.tensor([box for _, box in sorted(kept, reverse=True)])
        torch.testing.assert_close(proposals, F.pad(want, (0, 0, 0, 99 - len(want))))
    fewer = net.propose(scores, deltas, anchors, torch.tensor(sizes), before=60, keep=25)
    assert torch.equal(fewer[1], proposals[:25]) and fewer[1].any(dim=1).all()


# ---- losses ----------------------------------------------------------------------------------------------------------

def test_proposal_losses_by_a_loop():
    anchors, generator = make_anchors(4, 4, 4), torch.Generator().manual_seed(0)
    truth = truth_of([(0, 0, 30, 30, 0), (5, 5, 20, 14, 1)], [])
    scores, deltas = torch.randn(2, 48, generator=generator), torch.randn(2, 48, 4, generator=generator)
    areas = torch.tensor([(64, 64)] * 2)
    losses = dense.proposal_losses(scores, deltas, anchors, truth, areas, count=1000)           # all are drawn
    score_loss, box_loss, n = 0.0, 0.0, 0
    for b, true_boxes in enumerate((truth["boxes"][0], truth["boxes"][1, :0])):
        for a, owner in enumerate(slow_assign(dense.box_iou(true_boxes, anchors), 0.7, 0.3, 0.3)):
            if owner != UNUSED:
                p = scores[b, a].sigmoid().item()
                score_loss -= math.log(p if owner >= 0 else 1 - p)
                n += 1
            if owner >= 0:
                box_loss += (deltas[b, a] - encode_boxes(true_boxes[owner], anchors[a])).abs().sum().item()
    assert losses["rpn_score"].item() == pytest.approx(score_loss / n)
    assert losses["rpn_box"].item() == pytest.approx(box_loss / n)


@pytest.mark.parametrize("patch_size", [8, 14, 16])
def test_padding_takes_no_part_in_the_proposals(patch_size):
    """Whatever the canvas, and whatever the network says of the rest of it: an image's own anchors count, all drawn."""
    generator, multiple, losses = torch.Generator().manual_seed(0), 2 * patch_size, []
    whole, area = 4 * multiple, (2 * multiple, 3 * multiple)
    truth = truth_of([(0, 0, 30, 30, 0), (5, 5, 20, 14, 1)])
    numbers = {stride: torch.randn(whole, whole, 5, generator=generator) for stride in (patch_size / 4, patch_size)}
    for height, width in (area, (whole, area[1]), (whole, whole)):
        anchors, scores, deltas = [], [], []
        for stride, (*delta, score) in zip(numbers, (x.movedim(2, 0) for x in numbers.values())):
            rows, columns = int(height / stride), int(width / stride)
            anchors.append(make_anchors(rows, columns, stride))
            scores.append(score[:rows, :columns, None].expand(-1, -1, 3).flatten())
            deltas.append(torch.stack(delta, dim=2)[:rows, :columns, None].expand(-1, -1, 3, -1).flatten(0, 2))
        found = dense.proposal_losses(torch.cat(scores)[None], torch.cat(deltas)[None], torch.cat(anchors), truth,
                                      torch.tensor([area]), count=99_999)
        losses.append(torch.stack([found["rpn_score"], found["rpn_box"]]))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_levels_and_anchors_of_patches_of_14_pixels():
    net = dense.MaskRCNN(VisionTransformer(56, 14, 16, 3, 2), 3, small_options()).eval()
    maps, _, _, anchors = net.see(torch.zeros(1, 3, 56, 84))
    assert net.strides == [3.5, 7, 14, 28, 56]
    assert [tuple(x.shape[2:]) for x in maps] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    last = dense.center_and_size(anchors[0])[0][-1]
    torch.testing.assert_close(last, torch.tensor([84 - 3.5, 56 - 3.5]))            # the lower right cell's corner


@pytest.mark.parametrize("n_classes", [3, 80])
def test_losses_at_the_start(n_classes):
    """Nothing is known: a coin for something or nothing and for each pixel of a mask, C + 1 faces for the class."""
    net = small_net(n_classes).train()
    truth = truth_of([(8, 8, 40, 40, 0)], [(20, 10, 50, 60, 2)])
    losses = net(torch.randn(2, 3, 64, 64), torch.tensor([(64, 64)] * 2), truth)
    want = dict(rpn_score=math.log(2), label=math.log(n_classes + 1), mask=math.log(2))
    for name, value in want.items():
        assert losses[name].item() == pytest.approx(value, rel=0.15), name
    assert set(losses) == {*want, "rpn_box", "box"} and all(0 < loss.item() < 10 for loss in losses.values())


@pytest.mark.parametrize("truth", [
    truth_of([], []),                                             # no objects at all
    truth_of([(8, 8, 40, 40, 0)], []),                            # in one image none
    truth_of([(8, 8, 9, 9, 0)], [(0, 0, 1, 1, 1), (63, 63, 64, 64, 2)]),      # one pixel each
    truth_of([(0, 0, 64, 64, 0)] * 3, [(0, 0, 64, 1, 1)]),        # the whole image three times; a line
    truth_of([(x, y, x + 4, y + 4, 1) for x in range(0, 60, 4) for y in range(0, 60, 4)], []),         # 225 objects
])
@pytest.mark.parametrize("bf16", [False, True])
def test_hostile_truth(truth, bf16):
    net = small_net(roi_samples=16).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = net(torch.randn(2, 3, 64, 64), torch.tensor([(64, 64), (50, 64)]), truth)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in net.named_parameters():                  # DDP waits for all of them
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@torch.no_grad()
def test_nothing_found():
    net = small_net(score_threshold=1.0).eval()
    found = net.detect(torch.randn(1, 3, 64, 64), torch.tensor([(50, 64)]))
    assert {key: tuple(value.shape) for key, value in found.items()} == dict(
        boxes=(0, 4), labels=(0,), scores=(0,), masks=(0, 28, 28))
    assert dense.as_records(found, (64, 64), (128, 128)) == []


@pytest.mark.slow
def test_overfits_two_images():
    """A detector that sees only two images must come to find just what is in them."""
    images = torch.zeros(2, 3, 64, 64)
    things = [(6, 8, 30, 34, 0), (34, 20, 60, 60, 1)], [(10, 30, 50, 56, 2)]
    for image, some in zip(images, things):
        for x1, y1, x2, y2, label in some:
            image[label, y1:y2, x1:x2] = 2
    net, truth, sizes = small_net(drop_path=0.0).train(), truth_of(*things), torch.tensor([(64, 64)] * 2)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 3e-3 * dense.step_schedule(step, 150, 5)
        optimizer.zero_grad()
        sum(net(images, sizes, truth).values()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
    net.eval()
    for k, some in enumerate(things):
        found, n = net.detect(images[k:k + 1], sizes[k:k + 1]), len(some)
        assert sorted(found["labels"][:len(some)].tolist()) == [thing[4] for thing in some] and found["scores"][0] > 0.6
        for label, box, mask in zip(*(truth[key][k][:n] for key in ("labels", "boxes", "masks"))):
            i = (found["labels"] == label).nonzero()[0, 0]                      # the best of this class
            assert dense.box_iou(found["boxes"][i][None], box[None]).item() > 0.7
            pasted = dense.paste_masks(found["masks"][i][None], found["boxes"][i][None], (64, 64))[0]
            assert (pasted & mask).sum() > 0.7 * (pasted | mask).sum()


def joined_batch(rank: int, world: int):
    """Losses and gradient of a batch of four on `world` processes: images of different shapes, two of them empty."""
    net = small_net(drop_path=0.0).train()
    things = [(6, 8, 30, 34, 0), (34, 20, 60, 60, 1)], [(10, 30, 38, 56, 2)], [], []
    sizes, rng = [(64, 64), (60, 40), (40, 90), (50, 50)], RNG(1)
    images = [rng.integers(0, 256, (3, *size), dtype=np.uint8) for size in sizes]
    boxes, labels, masks = ([x[:len(some)].numpy() for x, some in zip(truth_of(*things)[key], things)]
                            for key in ("boxes", "labels", "masks"))
    masks = [np.pad(mask, ((0, 0), (0, 0), (0, 30)))[:, :h, :w] for mask, (h, w) in zip(masks, sizes)]
    rows = slice(4 // world * rank, 4 // world * (rank + 1))
    batch = dict(images=images[rows], boxes=boxes[rows], labels=labels[rows], masks=masks[rows],
                 index=torch.arange(4)[rows])
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    losses = dense.losses_of(model, batch, 7, "cpu", net.options, net.strides[3])
    sum(losses.values()).backward()
    means = {name: dense.mean_over_processes(loss) for name, loss in losses.items()}
    return means | {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.slow
def test_two_processes_are_one_with_the_joined_batch(tmp_path):
    one, two = joined_batch(0, 1), on_processes(joined_batch, 2, tmp_path)[0]
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-3, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("step, total, warmup, want", [
    (0, 1200, 500, 0.001),                  # mmdetection's warm-up
    (250, 1200, 500, 0.5005),
    (500, 1200, 500, 1),
    (799, 1200, 500, 1),                    # the end of epoch 8 of 12
    (800, 1200, 500, 0.1),
    (1099, 1200, 500, 0.1),                 # the end of epoch 11
    (1100, 1200, 500, 0.01),
    (0, 12, 0, 0.001),
])
def test_step_schedule(step, total, warmup, want):
    assert dense.step_schedule(step, total, warmup) == pytest.approx(want)


# ---- images and objects ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("width, height, want", [
    (640, 480, (1067, 800)),                # COCO
    (480, 640, (800, 1067)),
    (640, 300, (1333, 625)),                # the long side decides
    (1333, 800, (1333, 800)),
    (3000, 10, (1333, 4)),
    (90000, 10, (1333, 1)),                 # never nothing
])
def test_fitted_sides(width, height, want):
    assert dense.fitted_sides(width, height, 800, 1333) == want


def gray_sample(*boxes, crowd=(), size=(60, 40)) -> data.Sample:
    """An image of `size` (width, height) with a bright rectangle for each box, 40 gray levels for each category."""
    pixels, objects = np.zeros((*size[::-1], 3), dtype=np.uint8), []
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        mask = np.zeros(size[::-1], dtype=bool)
        mask[max(y1, 0):max(y2, 0), max(x1, 0):max(x2, 0)] = True
        pixels[mask] = 40 * (k + 1)
        objects.append(dict(box=(x1, y1, x2, y2), category=k, mask=mask, crowd=k in crowd))
    return data.Sample(PIL.Image.fromarray(pixels), objects=objects)


def test_boxes_and_masks_stay_with_their_pixels():
    transform, mirrored = dense.TrainObjects(80, 120), 0
    for seed in range(20):
        item = transform(gray_sample((5, 5, 25, 20), (30, 10, 40, 36)), RNG(seed))
        assert item["images"].shape == (3, 80, 120) and item["labels"].tolist() == [0, 1]
        assert item["boxes"].dtype == np.float32 and item["masks"].dtype == bool
        for label, box, mask in zip(item["labels"], item["boxes"], item["masks"]):
            bright = np.abs(item["images"][0] - 40.0 * (label + 1)) < 10
            assert (bright & mask).sum() > 0.85 * mask.sum(), "all but the blurred edge"
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        mirrored += item["boxes"][0, 0] == 120 - 50
    assert 4 < mirrored < 16


@pytest.mark.parametrize("boxes, crowd, want", [
    ([(5, 5, 25, 20)] * 3, (), [0, 1, 2]),
    ([(5, 5, 25, 20)] * 3, (1,), [0, 2]),                           # crowds are not trained on
    ([(5, 5, 25, 5), (9, 9, 9, 9), (70, 5, 80, 9)], (), []),        # no area, or none inside the image
    ([(5, 5, 6, 6), (59, 39, 60, 40), (-9, -9, 1, 1)], (), [0, 1, 2]),      # one pixel is enough
])
def test_what_is_trained_on(boxes, crowd, want):
    item = dense.TrainObjects(80, 120)(gray_sample(*boxes, crowd=crowd), RNG(0))
    assert item["labels"].tolist() == want and len(item["boxes"]) == len(item["masks"]) == len(want)
    assert (item["boxes"][:, 2:] > item["boxes"][:, :2]).all() and item["masks"].any(axis=(1, 2)).all()
    assert (item["boxes"] >= 0).all() and (item["boxes"] <= [120, 80, 120, 80]).all()


def test_images_share_a_canvas():
    images = [np.full((3, h, w), k, dtype=np.uint8) for k, (h, w) in enumerate([(20, 33), (31, 16)])]
    assert dense.rounded_up(torch.tensor([(31, 33), (32, 1)]), 16).tolist() == [[32, 48], [32, 16]]
    canvas = dense.as_input(images, [32, 48], "cpu")
    torch.testing.assert_close(canvas[1, :, :31, :16], data.normalize(torch.from_numpy(images[1])[None])[0])
    assert canvas.shape == (2, 3, 32, 48) and canvas[1, :, :, 16:].abs().max() < 0.02, "padding is about 0 to the model"


def test_shapes_are_classes_whatever_the_color():
    world = open_data("shapes:objects=2-4,train=8", "train", "detection", size=128)
    assert world.classes == list(data.SHAPES)
    assert [world.classes[thing["category"]] for thing in world.read(0).objects] == [
        thing.shape for thing in world.scene(0).objects]
    assert world.read(0).image.size == (128, 128) and all("mask" in thing for thing in world.read(0).objects)


# ---- COCO's folders --------------------------------------------------------------------------------------------------

CATEGORIES = [dict(id=7, name="train"), dict(id=1, name="person"), dict(id=90, name="toothbrush")]


def coco_folder(root, change=None, images: int = 6):
    """Train and val as COCO has them: images of two sizes; polygons, RLE of both kinds, crowds, an empty image."""
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir(parents=True, exist_ok=True)
        content = dict(info={}, images=[], annotations=[], categories=[dict(category) for category in CATEGORIES])
        for k in range(images):
            width, height = (60, 40) if k % 2 else (40, 50)
            i, name = 1000 + 7 * k, f"{k:012}.jpg"
            pixels = np.full((height, width, 3), 90, dtype=np.uint8)
            things = [] if k == 3 else [(4, 6, 24, 30, 1), (26, 10, 38, 38, 7)]
            for x1, y1, x2, y2, category in things:
                pixels[y1:y2, x1:x2] = (200, 40, 40) if category == 1 else (40, 40, 200)
                polygon = [x1, y1, x2, y1, x2, y2, x1, y2]
                mask = np.zeros((height, width), dtype=np.uint8)
                mask[y1:y2, x1:x2] = 1
                rle = dense.encode_rle(mask)
                counts = np.diff(np.flatnonzero(np.diff(mask.T.ravel(), prepend=0)), prepend=0).tolist()
                counts.append(width * height - sum(counts))
                segmentation = ([polygon], dict(size=[height, width], counts=rle["counts"].decode()),
                                dict(size=[height, width], counts=counts))[k % 3]
                content["annotations"].append(dict(
                    id=len(content["annotations"]), image_id=i, category_id=category, bbox=[x1, y1, x2 - x1, y2 - y1],
                    area=(x2 - x1) * (y2 - y1), segmentation=segmentation, iscrowd=int(k == 5 and category == 7)))
            PIL.Image.fromarray(pixels).save(root / f"{split}2017" / name, quality=95)
            content["images"].append(dict(id=i, file_name=name, width=width, height=height))
        if change and split == "train":
            change(content)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def test_coco_folder(tmp_path):
    coco_folder(tmp_path)
    train, val = (open_data(f"coco:{tmp_path}", split, "detection") for split in ("train", "val"))
    assert train.classes == ["person", "train", "toothbrush"] and train.category_ids == [1, 7, 90]
    assert len(val) == 6 and len(train) == 5 and not val.notes
    assert train.notes[0].startswith("1 images") and "left out" in train.notes[0]
    assert val.image_ids.tolist() == [1000 + 7 * k for k in range(6)] and val.name(2) == "val2017/000000000002.jpg"
    for k in range(6):
        sample = val.read(k)
        assert [thing["crowd"] for thing in sample.objects] == ([] if k == 3 else [False, k == 5])
        for thing in sample.objects:
            mask = dense.read_mask(thing["mask"], *sample.image.size[::-1])
            x1, y1, x2, y2 = thing["box"]
            assert mask.sum() == thing["area"] == mask[y1:y2, x1:x2].sum() and thing["category"] in (0, 1)
            thing["area"] = 0                                       # is believed, as pycocotools does
            red = np.asarray(data.decode(sample.image))[..., 0] > 150
            assert red[mask].mean() > 0.95 or thing["category"] == 1
        item = dense.EvalObjects(64, 64, [0, 1, 2])(sample, None)
        assert [record["area"] for record in item["truth"]] == [0] * len(sample.objects)


def test_oddities_are_counted_and_left_out(tmp_path, capsys):
    def change(content):
        content["annotations"][0]["category_id"] = 55                           # not among the categories
        content["annotations"][2]["bbox"] = [3, 3, 0, 5]                        # no width
        content["annotations"][3].update(bbox=[5, 5, 0.5, 5], area=None)
        content["annotations"][5]["segmentation"] = None
        content["images"].append(dict(id=5, file_name="small.jpg", width=31, height=90))
        content["annotations"].append(dict(content["annotations"][1], image_id=5, segmentation=[[1, 1, 9, 1, 9, 9]]))
    coco_folder(tmp_path, change)
    train = open_data(f"coco:{tmp_path}", "train", "detection")
    assert len(train) == 5 and [note[:8] for note in train.notes] == ["2 images"]
    assert [len(train.read(k).objects) for k in range(3)] == [1, 2, 1]
    assert data.look_at_labels(train) == ["person", "train"]
    said = capsys.readouterr().out
    assert "labels: " in said and ": 6 objects can be learned" in said and "2 of 3 classes (person, train)" in said
    assert "2 cannot be used, the first is " in said and "annotations[0]: there is no category 55" in said
    PIL.Image.new("RGB", (41, 50)).save(tmp_path / "train2017" / f"{0:012}.jpg")
    with pytest.raises(BadRecord, match="another size"):
        train.read(0)


def put(*path_and_value):
    """A change of the annotation file's content: content[a][b]... = value."""
    *path, last, value = path_and_value

    def change(content):
        for key in path:
            content = content[key]
        content[last] = value
    return change


@pytest.mark.parametrize("change, complaint", [
    (put("annotations", {}), "'annotations' of type list"),
    (put("images", 2, 3), r"images\[2\]: wanted an object with 'id'"),
    (put("images", 2, "id", 1.5), r"images\[2\].*'id' of type int \| str"),
    (put("images", 2, "id", []), r"images\[2\].*'id' of type int \| str"),
    (put("images", 2, "file_name", None), r"images\[2\].*'file_name' of type str"),
    (put("images", 1, "width", "60"), r"images\[1\].*'width' of type int \| float"),
    (put("categories", 1, "name", 5), r"categories\[1\].*'name'"),
    (put("annotations", 4, "person"), r"annotations\[4\]: wanted an object"),
    (put("annotations", 4, "category_id", "person"), r"annotations\[4\].*'category_id' of type int"),
    (put("annotations", []), "no image that can be trained on, of 6"),
    (put("annotations", [dict(image_id=1000, category_id=1)]), "no image .* of 6; .*annotations.0.*wanted a bbox"),
    (put("images", 3, "id", 1000), r"images\[3\]: '0+3.jpg' has the id 1000 of '0+0.jpg', as where two exports"),
    (put("categories", 2, "id", 7), r"categories\[2\]: 'toothbrush' has the id 7 of 'train'"),
])
def test_another_kind_of_file_is_refused(change, complaint, tmp_path):
    coco_folder(tmp_path, change)
    with pytest.raises(UserError, match=complaint) as told:
        open_data(f"coco:{tmp_path}", "train", "detection")
    assert "instances_train2017.json" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("key, value, complaint", [
    ("image_id", 3, ": there is no image 3"),
    ("image_id", "1014", ": there is no image '1014'"),
    ("category_id", 2, ": there is no category 2"),
    ("bbox", [1, 2, 3], ", of image 0+2.jpg: wanted a bbox"),
    ("bbox", None, ".*wanted a bbox"),
    ("bbox", [20, 20, -9, 9], ".*wanted a bbox"),
    ("bbox", [1, 2, 3, math.nan], ".*wanted a bbox"),
    ("bbox", [1, 2, 3, True], ".*wanted a bbox"),
    ("area", "5", ".*wanted an area"),
    ("segmentation", [], r".*polygons .* or an RLE of size \[50, 40\]"),             # a box alone, as CVAT exports it
    ("segmentation", [1, 2, 3, 4, 5, 6], ".*polygons"),
    ("segmentation", [[1, 2, 3, 4]], ".*polygons"),
    ("segmentation", [[1, 2, 3, 4, 5, 6, 7]], ".*polygons"),
    ("segmentation", [[1, 2, 3, 4, 5, "6"]], ".*polygons"),
    ("segmentation", None, ".*RLE"),
    ("segmentation", dict(size=[40, 50], counts=[2000]), ".*RLE of size"),
    ("segmentation", dict(size=[50, 40], counts=[1999]), ".*RLE of size"),
    ("segmentation", dict(size=[50, 40], counts=[1000.5, 999.5]), ".*RLE of size"),
    ("segmentation", dict(size=[50, 40], counts=[2001, -1]), ".*RLE of size"),
    ("segmentation", dict(size=[50, 40], counts=7), ".*RLE of size"),
    ("segmentation", dict(size=[50, 40], counts="b'`n1'"), ".*RLE of size"),            # str() of bytes
    ("segmentation", dict(size=[50, 40], counts="\ud800"), ".*RLE of size"),
    ("segmentation", dict(size=[50, 40], counts="1X"), ".*RLE of size"),
])
def test_one_bad_object_of_many_is_left_out(key, value, complaint, tmp_path):
    """In training and in test alike, when the file is opened."""
    coco_folder(tmp_path, put("annotations", 4, key, value))
    shutil.copy(tmp_path / "annotations/instances_train2017.json", tmp_path / "annotations/instances_val2017.json")
    for split in ("train", "val"):
        objects = open_data(f"coco:{tmp_path}", split, "detection")
        (problem,) = objects.left_out
        assert re.match(r".*instances_(train|val)2017.json, annotations\[4\]" + complaint, problem)
        assert sum(len(objects.read(k).objects) for k in range(len(objects))) == 9
        assert data.look_at_labels(objects) == ["person", "train"]


HASHES = (0x1a2b3c4d5e6f7081, 0xf0e1d2c3b4a59687, 0xf0e1d2c3b4a59688)        # the last two are one number as float64


@pytest.mark.parametrize("new", [HASHES, ("a", "b", "c"), ("1", "01", "1.0"), (0, -1, 2 ** 70)])
def test_ids_stay_what_they_are(new, tmp_path):
    def change(content):
        ids = dict(zip((1000, 1007, 1014), new))
        for entry, key in [(image, "id") for image in content["images"]] + [
                (thing, "image_id") for thing in content["annotations"]]:
            entry[key] = ids.get(entry[key], entry[key])
        for image in content["images"]:
            image["width"] = float(image["width"])
    coco_folder(tmp_path, change)
    train = open_data(f"coco:{tmp_path}", "train", "detection")
    assert train.image_ids.tolist() == [*new, 1028, 1035] and type(train.image_ids[0]) is type(new[0])
    assert [len(train.read(k).objects) for k in range(5)] == [2] * 5 and not train.left_out


def test_categories_of_one_name_stay_two(tmp_path):
    coco_folder(tmp_path, put("categories", 0, "name", "person"))
    train = open_data(f"coco:{tmp_path}", "train", "detection")
    assert train.classes == ["person", "person (7)", "toothbrush"] and "1 categories" in train.notes[-1]
    assert [thing["category"] for thing in train.read(0).objects] == [0, 1]


@pytest.mark.parametrize("orientation, stored, drawn_on, right", [
    (6, (60, 40), "stored", True),
    (6, (60, 40), "upright", True),
    (5, (60, 40), "stored", True),
    (8, (40, 60), "upright", True),
    (3, (60, 40), "upright", True),
    (1, (60, 40), "stored", True),
    (6, (48, 48), "upright", True),
    (6, (48, 48), "stored", False),                 # the sizes do not tell: they count as drawn upright, if not told
    (3, (60, 40), "stored", False),
    (6, (48, 48), "stored, and told", True),
    (3, (60, 40), "stored, and told", True),
    (6, (60, 40), "stored, and told", True),
    (6, (60, 40), "upright, and told", True),       # the sizes tell otherwise
])
def test_exif_and_the_pixels_that_annotations_were_drawn_on(orientation, stored, drawn_on, right, tmp_path):
    """COCO's objects and label maps: sizes say whether the picture is to be turned."""
    pixels = np.full((*stored[::-1], 3), 90, dtype=np.uint8)
    pixels[4:14, 6:26] = (250, 0, 0)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    for folder in ("annotations", "val2017", "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("val2017", "JPEGImages"):
        PIL.Image.fromarray(pixels).save(tmp_path / folder / "a.jpg", exif=exif, quality=95)
    image = PIL.Image.open(tmp_path / "val2017/a.jpg")
    seen = np.asarray(image if "stored" in drawn_on else PIL.ImageOps.exif_transpose(image))
    label = (seen[..., 0] > 170).astype(np.uint8)
    height, width = label.shape
    rle = dense.encode_rle(label)
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(dict(
        images=[dict(id=1, file_name="a.jpg", width=width, height=height)], categories=[dict(id=1, name="red")],
        annotations=[dict(image_id=1, category_id=1, bbox=[0, 0, 9, 9], area=200,
                          segmentation=dict(rle, counts=rle["counts"].decode()))])))
    PIL.Image.fromarray(label).save(tmp_path / "SegmentationClass/a.png")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\n")
    (tmp_path / "class_names.txt").write_text("other\nred\n")
    objects, maps = (dense.open_labels(dense.EvalOptions(data=f"{kind}:{tmp_path}", ignore_exif="told" in drawn_on),
                                       "val", task, 0).read(0)
                     for kind, task in (("coco", "detection"), ("voc", "segmentation")))
    for sample, mask in ((objects, dense.read_mask(objects.objects[0]["mask"], height, width)),
                         (maps, maps.label_map == 1)):
        red = np.asarray(data.decode(sample.image))[..., 0] > 170
        assert (red.shape == mask.shape and (red == mask).mean() > 0.98) == right
    PIL.Image.new("L", (41, 41)).save(tmp_path / "SegmentationClass/a.png")
    with pytest.raises(BadRecord, match="another size: .* EXIF .* the annotations are for .41, 41."):
        open_data(f"voc:{tmp_path}", "val", "segmentation").read(0)


def test_exif_behind_the_pixels_of_a_png(tmp_path):
    """Known to Pillow once they are read: the label map was drawn on them as stored."""
    pixels = np.zeros((20, 40), dtype=np.uint8)
    pixels[:, :10] = 255
    content, exif = io.BytesIO(), PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.fromarray(pixels).save(content, "PNG")
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    end = content.getvalue().rindex(b"IEND") - 4
    (tmp_path / "JPEGImages/a.png").write_bytes(content.getvalue()[:end] + chunk + content.getvalue()[end:])
    PIL.Image.fromarray((pixels > 0).astype(np.uint8)).save(tmp_path / "SegmentationClass/a.png")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\n")
    (tmp_path / "class_names.txt").write_text("black\nwhite\n")
    assert data.decode(data.open_image((tmp_path / "JPEGImages/a.png").read_bytes())).size == (20, 40), "it is there"
    sample = open_data(f"voc:{tmp_path}", "val", "segmentation").read(0)
    assert ((np.asarray(data.decode(sample.image))[..., 0] > 0) == sample.label_map).all()


def test_other_mistakes_of_a_folder(tmp_path):
    with pytest.raises(data.Absent, match="wanted .*instances_val2017.json"):
        open_data(f"coco:{tmp_path}", "val", "detection")
    coco_folder(tmp_path)
    path = tmp_path / "annotations/instances_val2017.json"
    path.write_text(path.read_text()[:500])
    with pytest.raises(UserError, match="cannot read"):
        open_data(f"coco:{tmp_path}", "val", "detection")


def of_all(part, key, value):
    """A change of the annotation file's content: value for each entry of a part."""
    def change(content):
        for entry in content[part]:
            entry[key] = value
    return change


def renamed(*names):
    def change(content):
        for category, name in zip(content["categories"], names):
            category["name"] = name
    return change


@pytest.mark.parametrize("split, change, complaint", [
    ("train", of_all("annotations", "iscrowd", 1), "train2017.json: 0 objects .* 0 of 3 classes .none.; .* too little"),
    ("train", of_all("annotations", "bbox", [3, 3, 0.5, 0.5]), "train2017.json: 0 objects"),
    ("val", of_all("annotations", "iscrowd", 1), "val2017.json: 0 objects"),
    ("val", of_all("annotations", "segmentation", []), r"val2017.json: 0 objects .*; 10 cannot .*annotations\[0\]"),
    ("val", renamed("Train", "Person"), r"val2017.json: .* learned \(person, train\): Person, Train"),
    ("val", renamed("person", "Train"), None),                          # one of two is enough, and the other is named
    ("val", "gone", "wanted .*instances_val2017.json"),
    ("val", put("images", 1, "id", 1000), "has the id 1000"),
])
def test_what_cannot_be_learned_or_measured_is_told_before_the_first_step(checkpoint, tmp_path, capsys, split, change,
                                                                          complaint):
    coco_folder(tmp_path, split == "train" and change)
    path = tmp_path / "annotations/instances_val2017.json"
    if change == "gone":
        path.unlink()
    elif split == "val":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    arguments = [checkpoint, "--data", f"coco:{tmp_path}", "--recipe", "pocket", *SMALL, "--steps", "1", "--out",
                 str(tmp_path / "out")]
    if complaint is None:
        dense.maskrcnn(arguments)
        assert "learned (person, train): Train" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=complaint):
            dense.maskrcnn(arguments)
        assert not (tmp_path / "out/metrics.jsonl").exists()


@needs_shared
def test_real_photographs(tmp_path):
    """labelme's three photographs with polygons: areas as annotated, boxes around the masks."""
    source = SHARED / "voc_mini"
    shutil.copytree(source / "JPEGImages", tmp_path / "val2017/JPEGImages")
    (tmp_path / "annotations").mkdir()
    shutil.copy(source / "coco_annotations.json", tmp_path / "annotations/instances_val2017.json")
    photos = open_data(f"coco:{tmp_path}", "val", "detection")
    assert len(photos) == 3 and photos.classes[15] == "person" and photos.category_ids[15] == 15
    for k in range(3):
        sample = photos.read(k)
        assert len(sample.objects) > 0
        for thing in sample.objects:
            mask = dense.read_mask(thing["mask"], *sample.image.size[::-1])
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            assert mask.sum() == pytest.approx(thing["area"], rel=0.1, abs=60)      # labelme counts the outline too
            around = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert np.abs(np.subtract(around, thing["box"])).max() <= 3


# ---- the run ---------------------------------------------------------------------------------------------------------

class Oracle:
    """Stands for a perfect detector of a COCO folder's images: knows them, and answers in the resized image."""
    strides = [2, 4, 8, 16, 32]

    def __init__(self, photos, label_of):
        self.photos, self.label_of, self.next = photos, label_of, itertools.count()

    def detect(self, images, sizes):
        sample, (h, w) = self.photos.read(next(self.next)), sizes[0].tolist()
        W, H = sample.image.size
        assert images.shape[2] % 16 == images.shape[3] % 16 == 0
        things = [thing for thing in sample.objects if not thing["crowd"]]
        boxes = torch.tensor([thing["box"] for thing in things], dtype=torch.float32).reshape(-1, 4)
        masks = torch.stack([torch.from_numpy(dense.read_mask(thing["mask"], H, W)) for thing in things]
                            ) if things else torch.zeros(0, H, W)
        owner = torch.arange(len(things))
        return dict(boxes=boxes * torch.tensor([w / W, h / H] * 2), scores=torch.linspace(0.9, 0.8, len(things)),
                     labels=torch.tensor([self.label_of[t["category"]] for t in things], dtype=torch.long),
                     masks=dense.cut_masks([masks], 0 * owner, owner, boxes))


@pytest.mark.parametrize("names, unknown", [
    (["person", "train", "toothbrush"], False),
    (["train", "person"], False),           # a model with other classes: matched by name
    (["train", "boat"], True),              # people are unknown to it
])
def test_a_perfect_detector_scores_one(names, unknown, tmp_path):
    coco_folder(tmp_path)
    options = small_options(data=f"coco:{tmp_path}", draw=2, short_side=96, long_side=128,
                            json=str(tmp_path / "r.json"), device="cpu")
    photos = open_data(options.data, "val", "detection")
    label_of = [names.index(name) if name in names else -1 for name in photos.classes]
    if unknown:                                                                 # the oracle must not know them either
        read = photos.read
        photos.read = lambda i: (lambda s: replace(s, objects=[t for t in s.objects if t["category"] == 1]))(read(i))
    results = dense.evaluate_detector(Oracle(photos, label_of), names, photos, options, dense.setup(options),
                                      tmp_path / "out")
    assert results["box"]["AP"] == pytest.approx(1) and results["mask"]["AP75"] == pytest.approx(1)
    assert results["images"] == 6 and json.loads((tmp_path / "r.json").read_text())["box"] == results["box"]
    assert PIL.Image.open(tmp_path / "out/detections.png").size[1] == 2 * (320 + 18 + 6)


def test_drawing():
    image = PIL.Image.new("RGB", (60, 40), "gray")
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:30, 5:25] = True
    record = dict(category_id=1, bbox=[5, 10, 20, 20], segmentation=dense.encode_rle(mask), score=0.7)
    plain, drawn, faint = (dense.draw_records(image, records, ["cat", "dog"])
                           for records in ([], [record], [dict(record, score=0.4)]))
    far, near = (dense.draw_records(image, [dict(record, bbox=[5, 10, side, side])], ["cat", "dog"])
                 for side in (4e9, 100))
    assert far.tobytes() == near.tobytes(), "a box far beyond the image, drawn in no time"
    assert plain.size == drawn.size == (320, 213), "enlarged"
    assert plain.tobytes() == faint.tobytes()
    changed = (np.asarray(plain) != np.asarray(drawn)).any(axis=2)
    assert changed[55:158, 28:132].mean() > 0.99 and not changed[180:].any() and not changed[:, 200:].any()
    assert dense.sheet([[("one", plain), ("two\nlines", plain)], [("", plain)]], 100).size == (2 * 106, 2 * 142)


def tiny_checkpoint(path):
    torch.manual_seed(0)
    tokenizer = data.BytePairTokenizer.train(["a red circle", "a blue square"], 530)
    config = replace(PRESETS["pocket"], method="clip", image_size=32, patch_size=8, width=32, depth=3, heads=2,
                     text_width=32, text_depth=1, text_heads=2, embed_dim=16, vocab_size=tokenizer.vocab_size)
    save_checkpoint(path, MaskCLIP(config, tokenizer.eot), tokenizer, config)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("run") / "last.pt")


SMALL = ["--short-side", "64", "--long-side", "64", "--batch-size", "2", "--channels", "8",
         "--warmup-steps", "1", "--log-every", "1", "--workers", "0", "--device", "cpu"]
WORLD = ["--data", "shapes:objects=1-2,train=20,val=3", *SMALL]


def stopped_after(steps: int, arguments: list[str]):
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
            dense.maskrcnn(arguments)
        assert ended.value.code == 143
    finally:
        finetune.StopSignal = real


def test_resumed_run_is_the_same_to_the_bit(checkpoint, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = [checkpoint, *WORLD, "--steps", "5", "--draw", "2"]
    dense.maskrcnn([*run, "--out", str(whole), "--json", f"{whole}.json"])
    stopped_after(2, [*run, "--out", str(parts)])
    assert load_state(parts / "last.pt")["step"] == 2
    dense.maskrcnn([*run, "--out", str(parts)])
    a, b = (load_state(out / "last.pt")["model"] for out in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)
    logs = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (whole, parts)]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]] and len(logs[0]) == 5
    assert (parts / "curves.png").is_file()
    assert {"rpn_score", "rpn_box", "label", "box", "mask", "lr", "grad_norm"} <= logs[0][0].keys()
    result = json.loads((tmp_path / "whole.json").read_text())
    assert result["images"] == 3 and result["classes"] == 8 and result["protocol"]["steps"] == 5
    assert set(result["box"]) == set(result["mask"]) >= {"AP", "AP50", "AR100"}
    assert PIL.Image.open(whole / "detections.png").size == (2 * 326, 2 * 344)

    dense.maskrcnn([*run, "--out", str(whole), "--json", str(tmp_path / "again.json")])
    assert json.loads((tmp_path / "again.json").read_text()) == result, "a finished run is only tested again"
    with pytest.raises(UserError, match="another"):                             # and another run does not overwrite it
        dense.maskrcnn([checkpoint, *WORLD, "--steps", "8", "--lr", "9", "--out", str(parts)])


def test_coco_run_with_hostile_images(checkpoint, tmp_path):
    """Two epochs over a folder with a crowd only, one pixel, no area and an unknown category."""
    def change(content):
        content["annotations"][0]["category_id"] = 55
        content["annotations"][1].update(iscrowd=1)                             # all that is left of image 0
        content["annotations"][2].update(bbox=[3, 3, 1, 1], area=1, segmentation=[[3, 3, 4, 3, 4, 4, 3, 4]])
        content["annotations"][3]["bbox"] = [3, 3, 0, 5]
    coco_folder(tmp_path / "coco", change)
    out = tmp_path / "out"
    dense.maskrcnn([checkpoint, "--data", f"coco:{tmp_path}/coco", "--recipe", "pocket", *SMALL, "--epochs", "2",
                    "--limit", "4", "--from-scratch", "--out", str(out), "--json", f"{out}.json"])
    state, result = load_state(out / "last.pt"), json.loads((tmp_path / "out.json").read_text())
    assert state["step"] == 2 * (5 // 2) and state["classes"] == ["person", "train", "toothbrush"]
    assert result["images"] == 4 and result["protocol"]["from_scratch"]
    assert all(value.isfinite().all() for value in state["model"].values())


def test_defaults_are_the_papers_on_coco_and_small_on_shapes():
    coco, pocket = dense.parse_maskrcnn(["--data", "coco:x"]), dense.parse_maskrcnn([])
    assert (coco.epochs, coco.batch_size, coco.lr, coco.weight_decay, coco.layer_decay, coco.drop_path) == (
        12, 16, 1e-4, 0.05, 0.75, 0.1)                                          # PAPER.md: supplement B
    assert (coco.short_side, coco.long_side, coco.warmup_steps, coco.clip_grad) == (800, 1333, 500, 0)
    assert (coco.channels, coco.rpn_samples, coco.roi_samples, coco.proposals) == (256, 256, 512, 1000)
    assert (pocket.short_side, pocket.recipe, pocket.out) == (128, "pocket", "runs/maskrcnn-pocket")
    assert dense.parse_maskrcnn(["--data", "coco:x", "--recipe", "pocket"]).channels == pocket.channels


@pytest.mark.parametrize("arguments, complaint", [
    (["nowhere.pt"], "no checkpoint at nowhere.pt"),
    (["CHECKPOINT", "--data", "folder:x"], "cannot open 'folder:x' for detection"),
    (["CHECKPOINT", "--data", "coco:DIR/nothing"], "wanted DIR/nothing/annotations/instances_train2017.json"),
    (["CHECKPOINT", "--data", "shapes:train=3"], "3 records are fewer than a batch"),
])
def test_mistakes_are_told_in_a_line(checkpoint, tmp_path, arguments, complaint):
    arguments = [word.replace("CHECKPOINT", checkpoint).replace("DIR", str(tmp_path)) for word in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=complaint.replace("DIR", str(tmp_path))) as told:
        dense.maskrcnn(arguments)
    assert "\n" not in str(told.value)


def test_backbone_learns_slower_the_lower_it_is():
    net = small_net()
    rates = {id(p): group["lr"] for group in layer_decay_groups(net, 1.0, 0.05, 0.75) for p in group["params"]}
    want = {"pyramid.visual.patch_embed.proj.weight": 0.75 ** 4, "pyramid.visual.blocks.2.mlp.fc1.weight": 0.75,
            "pyramid.up2.weight": 1.0, "rpn.conv.weight": 1.0, "mask_head.0.bias": 1.0}
    parameters = dict(net.named_parameters())
    assert len(rates) == len(parameters)
    for name, rate in want.items():
        assert rates[id(parameters[name])] == pytest.approx(rate), name


@pytest.mark.slow
@pytest.mark.soak
def test_a_step_at_full_size_and_its_memory():
    """ViT-B/16, an image of 800 x 1333: forward, backward and update, in a process whose peak is printed."""
    code = """
import resource, time, torch, dense
from model import VisionTransformer
from train import layer_decay_groups
torch.manual_seed(0)
options = dense.parse_maskrcnn(["--data", "coco:x"])
net = dense.MaskRCNN(VisionTransformer(), 80, options).train()
optimizer = torch.optim.AdamW(layer_decay_groups(net, 1e-4, 0.05, 0.75))
boxes = 600 * torch.rand(20, 4)
boxes[:, 2:] = boxes[:, :2] + 150
masks = torch.zeros(20, 800, 1333, dtype=torch.bool)
masks[:, 100:400, 100:400] = True
started = time.time()
truth = dict(boxes=boxes[None], labels=torch.arange(20)[None], masks=[masks], generators=[None])
losses = net(torch.randn(1, 3, 800, 1344), torch.tensor([(800, 1333)]), truth)
sum(losses.values()).backward()
optimizer.step()
assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
print(losses["label"].item(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, time.time() - started)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    label, peak, seconds = map(float, done.stdout.split())
    print(f"peak memory {peak:.1f} GiB, {seconds:.0f} s")
    assert abs(label - math.log(81)) < 1 and peak < 24                          # nothing is known yet


def test_batches_are_of_wide_or_of_high_images():
    """But for the one that takes what both leave over; alike on any number of processes, no record twice an epoch."""
    n, B, wide = 103, 8, np.random.default_rng(0).random(103) < 0.3
    steps = range(2 * (n // B))
    whole = list(train_batches(n, B, 5, steps, 0, 1, wide))
    halves = [list(train_batches(n, B, 5, steps, rank, 2, wide)) for rank in (0, 1)]
    mixed = []
    for epoch in (0, 1):
        batches = whole[epoch * (n // B):(epoch + 1) * (n // B)]
        records = [index for batch in batches for _, index, *_ in batch]
        assert len(set(records)) == len(records) == n // B * B
        mixed.append(sum(len({wide[index] for _, index, *_ in batch}) > 1 for batch in batches))
    assert max(mixed) <= 1 and whole[:n // B] != whole[n // B:]
    assert [a + b for a, b in zip(*halves)] == whole
