"""Boxes of dense.py against loops written from the definitions, numbers worked out by hand, and torchvision.

    python -m pytest tests/test_boxes.py
"""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import dense
from dense import box_iou, nms, paste_masks, roi_align, suppress

torch.set_num_threads(1)
PEER = "torchvision is the peer for boxes: pip install -r requirements-dev.txt"


def random_boxes(n: int, seed: int, size: float = 100, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner, extent = torch.rand(2, n, 2, generator=generator, dtype=dtype) * size
    return torch.cat((corner, corner + extent), dim=1)


@pytest.mark.parametrize("a, b, want", [
    ((0, 0, 10, 10), (0, 0, 10, 10), 1),            # the same box
    ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),        # half of each: 50 of 150
    ((0, 0, 10, 10), (2, 2, 4, 7), 0.1),            # one inside the other
    ((0, 0, 10, 10), (10, 0, 20, 10), 0),           # they touch
    ((0, 0, 10, 10), (20, 20, 30, 30), 0),          # apart in x and in y: two negative sides are no overlap
    ((3, 3, 3, 3), (3, 3, 3, 3), 0),                # no area at all
])
def test_box_iou(a, b, want):
    got = box_iou(torch.tensor([a], dtype=torch.float64), torch.tensor([b, a], dtype=torch.float64))
    assert got.shape == (1, 2) and got[0, 0].item() == pytest.approx(want)


def test_box_iou_of_sets():
    a, b = random_boxes(12, 0).view(3, 4, 4), random_boxes(15, 1).view(3, 5, 4)
    assert torch.equal(box_iou(a, b), torch.stack([box_iou(*pair) for pair in zip(a, b)]))
    assert torch.equal(box_iou(a, b[0]), torch.stack([box_iou(some, b[0]) for some in a]))


def slow_nms(boxes, scores, threshold):
    kept, iou = [], box_iou(boxes, boxes).tolist()
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):          # sorted() keeps the order of equals
        if not any(iou[k][i] > threshold for k in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("n, threshold, block", [
    (0, 0.5, 64),       # no boxes
    (1, 0.5, 64),
    (64, 0.5, 64),      # just one block
    (150, 0.3, 64),     # the third block is not full
    (150, 0.7, 7),      # many small blocks
    (150, 0.0, 64),     # the least overlap strikes out
    (150, 1.0, 64),     # nothing does
])
def test_nms_against_a_loop(n, threshold, block, monkeypatch):
    monkeypatch.setattr(dense, "NMS_BLOCK", block)
    boxes = random_boxes(3 * n, seed=n, dtype=torch.float64).view(3, n, 4)
    scores = (torch.rand(3, n, generator=torch.Generator().manual_seed(1)) * 20).round()                 # many ties
    wanted = [slow_nms(some, score.tolist(), threshold) for some, score in zip(boxes, scores)]
    assert nms(boxes[0], scores[0], threshold).tolist() == wanted[0]
    assert [kept.nonzero()[:, 0].tolist() for kept in suppress(boxes, scores, threshold)] == list(map(sorted, wanted))


def test_what_fills_up_a_set_neither_is_kept_nor_strikes_out():
    boxes, scores = random_boxes(100, seed=5).view(2, 50, 4), torch.rand(2, 50)
    scores[0, ::2] = scores[1, 1:] = -math.inf
    kept = suppress(boxes, scores, 0.3)
    assert kept[1].tolist() == [True] + 49 * [False] and not kept[0, ::2].any()
    assert torch.equal(kept[0, 1::2], suppress(boxes[:1, 1::2], scores[:1, 1::2], 0.3)[0])
    assert not suppress(boxes, torch.full_like(scores, -math.inf), 0.3).any()


@pytest.mark.parametrize("width, threshold, dtype, kept", [
    (5, 0.5, torch.float32, [0, 1]),        # an IoU of exactly the threshold does not exceed it
    (3, 0.3, torch.float32, [0]),           # but 30/100 in float32 lies above 0.3,
    (7, 0.7, torch.float32, [0, 1]),        # 70/100 below 0.7,
    (3, 0.3, torch.float64, [0, 1]),        # and in float64 both are the same number
    (0, 0.0, torch.float32, [0, 1]),        # a box without area is covered by none
])
def test_nms_at_the_threshold(width, threshold, dtype, kept):
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, width, 10]], dtype=dtype)
    assert nms(boxes, torch.tensor([0.9, 0.8]), threshold).tolist() == kept


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("kind", ["random", "clusters", "integers"])       # integers: IoUs that equal the threshold
def test_nms_equals_torchvision(kind, threshold):
    ops = pytest.importorskip("torchvision.ops", reason=PEER)
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(10_000 if kind == "random" else 2_000, seed=2)
    if kind == "clusters":
        boxes = boxes[:40].repeat(50, 1) + torch.randn(2000, 4, generator=generator)
    if kind == "integers":
        boxes = (boxes / 10).round()
    scores = (torch.rand(len(boxes), generator=generator) * 500).round() / 500
    assert torch.equal(nms(boxes, scores, threshold), ops.nms(boxes, scores, threshold))
    groups, sets = torch.arange(5).repeat_interleave(len(boxes) // 5), (5, -1)
    got = suppress(boxes.view(*sets, 4), scores.view(sets), threshold).flatten().nonzero()[:, 0]
    assert torch.equal(got, ops.batched_nms(boxes, scores, groups, threshold).sort().values)


ROIS = [       # image, x1, y1, x2, y2 on images of 96 x 80, whose maps have stride 8
    (0, 10, 12, 50.5, 60.2),        # an ordinary box
    (1, 0, 0, 96, 80),              # the whole image
    (1, 8, 16, 24, 32),             # on pixel borders of the map
    (0, -30, -20, 20, 30),          # partly outside
    (0, 80, 60, 130, 140),          # partly outside, at the far side
    (1, 500, 500, 600, 600),        # wholly outside
    (0, -12, 4, -4, 12),            # one map pixel outside: samples at just -1, which still read the border
    (0, 40, 40, 40, 40),            # a point
    (1, 40, 10, 40, 70),            # no width
    (0, 50, 60, 20, 30),            # negative size
    (1, 33, 21, 33.5, 21.5),        # smaller than a pixel of the map
]


def slow_roi_align(features, box, out, scale, ratio):
    """One box, one sample at a time, from the definition."""
    _, _, H, W = features.shape
    x1, y1, x2, y2 = (v * scale - 0.5 for v in box[1:])
    ny, nx = (ratio or max(math.ceil((high - low) / n), 0) for low, high, n in ((y1, y2, out[0]), (x1, x2, out[1])))
    pooled = torch.zeros(features.shape[1], *out, dtype=features.dtype)
    for i, j, k, l in itertools.product(range(out[0]), range(out[1]), range(ny), range(nx)):
        y = y1 + (i + (k + 0.5) / ny) * (y2 - y1) / out[0]
        x = x1 + (j + (l + 0.5) / nx) * (x2 - x1) / out[1]
        if -1 <= y <= H and -1 <= x <= W:
            y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)
            for v, u in itertools.product((int(y), int(y) + 1), (int(x), int(x) + 1)):
                if v < H and u < W:
                    weight = (1 - abs(y - v)) * (1 - abs(x - u))
                    pooled[:, i, j] += features[int(box[0]), :, v, u] * weight / (ny * nx)
    return pooled


@pytest.mark.parametrize("out, ratio", [((3, 2), 0), ((3, 2), 2), ((1, 1), 0), ((1, 1), 3)])
def test_roi_align_against_a_loop(out, ratio, monkeypatch):
    monkeypatch.setattr(dense, "ALIGNED_BOXES", 4)
    features = torch.randn(2, 3, 10, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = roi_align(features, torch.tensor(ROIS, dtype=torch.float64), out, 1 / 8, ratio)
    want = torch.stack([slow_roi_align(features, box, out, 1 / 8, ratio) for box in ROIS])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_roi_align_of_a_ramp_reads_the_centers_of_its_bins():
    x = torch.arange(20.0).expand(1, 1, 20, 20)                            # the value of a pixel is its column
    got = roi_align(x, torch.tensor([[0, 16.0, 16.0, 112.0, 48.0]]), (2, 4), 1 / 8)
    want = torch.tensor([3.5, 6.5, 9.5, 12.5]) - 0.5                       # columns 2 to 14, less half a pixel
    torch.testing.assert_close(got[0, 0], want.expand(2, 4))


def test_roi_align_of_maps_of_different_sizes():
    maps = [torch.randn(3, *size, generator=torch.Generator().manual_seed(0)) for size in ((10, 12), (5, 6), (1, 3))]
    boxes = torch.tensor(ROIS)
    boxes[:, 0] = torch.arange(len(boxes)) % 3
    scale = torch.tensor([1 / 8, 1 / 16, 1 / 32])[boxes[:, 0].long(), None]
    want = torch.cat([roi_align(maps[int(box[0])][None], torch.cat([torch.zeros(1), box[1:]])[None], 4, one.item())
                      for box, one in zip(boxes, scale)])
    torch.testing.assert_close(roi_align(maps, boxes, 4, scale), want)


def test_roi_align_gradient_is_that_of_finite_differences():
    features = torch.randn(2, 1, 5, 6, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor(ROIS, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f: roi_align(f, boxes, 2, 1 / 16), features)


def test_roi_align_of_no_boxes_has_a_gradient_of_zero():
    features = torch.randn(2, 3, 10, 12, requires_grad=True)
    pooled = roi_align(features, torch.zeros(0, 5), 7, 1 / 8)
    pooled.sum().backward()
    assert pooled.shape == (0, 3, 7, 7) and features.grad.count_nonzero() == 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("out", [7, (14, 14), (3, 5)])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_equals_torchvision(ratio, out, dtype, tolerance):
    ops = pytest.importorskip("torchvision.ops", reason=PEER)
    boxes = torch.cat((torch.arange(100)[:, None] % 2, random_boxes(100, seed=3, size=96, dtype=dtype) - 20), dim=1)
    boxes = torch.cat((boxes, torch.tensor(ROIS, dtype=dtype)))
    mine, peer = (torch.randn(2, 8, 10, 12, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
                  for _ in range(2))
    got, want = roi_align(mine, boxes, out, 1 / 8, ratio), ops.roi_align(peer, boxes, out, 1 / 8, ratio, aligned=True)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    weight = torch.randn(want.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    got.backward(weight), want.backward(weight)
    torch.testing.assert_close(mine.grad, peer.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_paste_masks_equals_grid_sample(threshold):
    masks, boxes, (H, W) = torch.rand(20, 28, 28), random_boxes(20, seed=4, size=60) - 10, (48, 64)
    x1, y1, x2, y2 = boxes.T[:, :, None]
    x = (torch.arange(W) + 0.5 - x1) / (x2 - x1) * 2 - 1                   # (20, W) in the box, from -1 to 1
    y = (torch.arange(H) + 0.5 - y1) / (y2 - y1) * 2 - 1
    grid = torch.stack((x[:, None].expand(-1, H, -1), y[:, :, None].expand(-1, -1, W)), dim=3)
    value = F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]
    got = paste_masks(masks, boxes, (H, W), threshold)
    assert got.shape == (20, H, W) and got.dtype == torch.bool and got.any()
    assert ((got == (value >= threshold)) | ((value - threshold).abs() < 1e-5)).all()


@pytest.mark.parametrize("box, area", [
    ((2, 3, 12, 8), 50),            # on pixel borders: just the box
    ((2.4, 3, 12.4, 8), 50),        # a pixel belongs to the box if its center does
    ((-5, -5, 3, 4), 12),           # cut off by the image
    ((100, 3, 120, 8), 0),          # outside
    ((5, 5, 5, 9), 0),              # no width
    ((5.5, 5, 5.5, 9), 0),          # no width, on the center of a pixel
])
def test_paste_a_full_mask(box, area):
    assert paste_masks(torch.ones(1, 7, 7), torch.tensor([box], dtype=torch.float64), (20, 30)).sum() == area
