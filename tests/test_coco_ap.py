"""COCO's masks and average precision in dense.py against numbers worked out by hand, and pycocotools.

    python -m pytest tests/test_coco_ap.py
"""
import contextlib
import copy
import io
import json
import tracemalloc

import numpy as np
import pytest
from conftest import SHARED, needs_shared

from dense import coco_average_precision, decode_rle, encode_rle, polygons_to_mask

PEER = "pycocotools is the peer for masks and AP: pip install -r requirements-dev.txt"
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


# ---- masks

@pytest.mark.parametrize("h, w, counts, text", [
    (2, 2, [4], b"4"),                      # nothing inside
    (2, 2, [0, 4], b"04"),                  # everything
    (2, 2, [0, 1, 3], b"013"),              # the first pixel
    (3, 2, [1, 2, 3], b"123"),              # the rest of the first column: pixels go down, not along
    (8, 5, [40], b"X1"),                    # 40 = 8 + 32 * 1: digit 8 with "more" is 8 + 32 + 48 = X, then 1
    (4, 4, [16], b"`0"),                    # 16 has the sign bit of a digit set, so a zero must follow
    (4, 3, [1, 5, 2, 3, 1], b"152NO"),      # from the fourth on differences: 3 - 5 = -2 is 30 + 48, 1 - 2 is 31 + 48
    (1000, 1000, [500000, 500000], b"PYX?PYX?"),   # 500000 is 0, 9, 8, 15 in digits of five bits
])
def test_rle_by_hand(h, w, counts, text):
    mask = np.repeat(np.arange(len(counts)) % 2, counts).reshape(w, h).T
    assert encode_rle(mask) == {"size": [h, w], "counts": text}
    for form in (counts, text, text.decode()):
        assert np.array_equal(decode_rle({"size": [h, w], "counts": form}), mask)
        assert np.array_equal(decode_rle({"size": [float(h), float(w)], "counts": form}), mask)


@pytest.mark.parametrize("mask", [
    {"size": [2, 2]},                                   # no counts
    {"size": [2], "counts": [4]},                       # one number for a size
    {"size": [2, 2], "counts": [1, 2]},                 # too few pixels
    {"size": [2, 2], "counts": "5"},                    # too many
    {"size": [2, 2], "counts": [5, -1]},                # a negative length
    {"size": [2, 2], "counts": "1X"},                   # more is said to follow
    {"size": [2, 2], "counts": ""},
    {"size": [2, 2], "counts": "1 3"},                  # a blank is no digit
    {"size": [2, 2], "counts": "1é"},
    [1, 2, 3, 4, 5, 6],                                 # one polygon, not a list of them
    [[1, 2, 3, 4, 5, 6, 7]],                            # half a point
    [["a", "b", "c", "d", "e", "f"]],
])
def test_malformed_masks(mask):
    truth, detections = world([], [(0, 7, BOX, 0.5)])
    truth["images"][0].update(height=2, width=2)
    with pytest.raises(ValueError, match="image 0 has a record without a valid segm") as error:
        coco_average_precision(truth, [{**detections[0], "segmentation": mask}], "segm")
    assert "\n" not in str(error.value)


def box_polygon(x, y, w, h):
    return [x, y, x + w, y, x + w, y + h, x, y + h]


@pytest.mark.parametrize("polygons, area", [
    ([box_polygon(2, 3, 5, 4)], 20),                                        # a rectangle on pixel borders
    ([box_polygon(2.4, 3.4, 5, 4)], 20),                                    # moved by less than half a pixel
    ([box_polygon(-5, -5, 8, 9)], 12),                                      # cut off by the image
    ([box_polygon(30, 3, 5, 4)], 0),                                        # outside
    ([box_polygon(0, 0, 20, 12)], 240),                                     # the whole image
    ([box_polygon(2, 3, 5, 4), box_polygon(4, 5, 5, 4)], 20 + 20 - 6),      # the overlap is inside, and counts once
    ([box_polygon(2, 3, 5, 4), box_polygon(10, 3, 5, 4)], 40),              # two parts
    ([[2, 3, 7, 3, 7, 7, 2, 7, 2, 3]], 20),                                 # closed: the first point again at the end
])
def test_polygon_area(polygons, area):
    assert polygons_to_mask(polygons, 12, 20).sum() == area


@pytest.mark.parametrize("far", [1e4, 1e7, 1e11])
@pytest.mark.parametrize("corners, inside", [
    ([(0, 0), (1, 0), (0, 1)], lambda x, y: x < 99),                        # all of the image
    ([(0, 0), (1, 1), (0, 1)], lambda x, y: x <= y),                        # what is below the diagonal
    ([(-1, -1), (1, -1), (1, 1)], lambda x, y: x > y),
    ([(0, 1), (1, 1), (1, 2)], lambda x, y: x < 0),                         # outside
])
def test_a_corner_far_outside_costs_no_memory(far, corners, inside):
    tracemalloc.start()
    mask = polygons_to_mask([[far * side for corner in corners for side in corner]], 40, 50)
    assert tracemalloc.get_traced_memory()[1] < 1e6, "bytes at most"
    tracemalloc.stop()
    y, x = np.indices(mask.shape)
    differ = (mask == 1) != inside(x, y)
    assert not differ[x != y].any(), "but for the pixels that the side itself cuts"


def test_rle_equals_pycocotools():
    peer = pytest.importorskip("pycocotools.mask", reason=PEER)
    rng = np.random.default_rng(0)
    for density in (0, 0.02, 0.5, 0.98, 1) * 10:
        blocks = rng.random(rng.integers(1, 40, 2)) < density
        mask = np.kron(blocks, np.ones(rng.integers(1, 30, 2))).astype(np.uint8)
        want = peer.encode(np.asfortranarray(mask))
        assert encode_rle(mask) == want
        assert np.array_equal(decode_rle(want), mask)


@pytest.mark.parametrize("kind", ["inside", "beyond", "whole", "half", "closed", "far"])
def test_polygons_equal_pycocotools(kind):
    peer = pytest.importorskip("pycocotools.mask", reason=PEER)
    rng = np.random.default_rng(1)
    for _ in range(150):
        h, w = (int(n) for n in rng.integers(1, 80, 2))
        polygons = []
        for _ in range(rng.integers(1, 4)):
            points = rng.random((rng.integers(3, 12), 2)) * (w, h)
            points = {"inside": points, "beyond": points * 2 - (w / 2, h / 2), "far": points * 30 - (w * 15, h * 15),
                      "whole": points.round(), "half": (points * 2).round() / 2,
                      "closed": np.concatenate((points, points[:1]))}[kind]
            polygons.append(points.ravel().tolist())
        assert encode_rle(polygons_to_mask(polygons, h, w)) == peer.merge(peer.frPyObjects(polygons, h, w))


@needs_shared
def test_real_polygons_and_their_ap():
    truth = json.loads((SHARED / "voc_mini" / "coco_annotations.json").read_text())
    size = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    found = []
    for a in truth["annotations"]:
        mask = polygons_to_mask(a["segmentation"], *size[a["image_id"]])
        parts = [np.array(polygon).reshape(-1, 2).T for polygon in a["segmentation"]]
        area = sum(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2 for x, y in parts)       # the shoelace formula
        assert mask.sum() == pytest.approx(area, rel=0.03)
        found.append({**a, "segmentation": encode_rle(mask), "score": 1.0})
    for iou_type in ("bbox", "segm"):
        assert coco_average_precision(truth, found, iou_type)["AP"] == pytest.approx(1)


# ---- average precision

def world(objects, found, n_images=1):
    """objects: (image, category, box[, more]), found: (image, category, box, score) -> ground truth, detections."""
    annotations = [{"id": i, "image_id": image, "category_id": category, "bbox": list(box), "iscrowd": 0,
                    "area": box[2] * box[3], **dict(*more)} for i, (image, category, box, *more) in enumerate(objects)]
    truth = {"images": [{"id": i, "height": 200, "width": 200} for i in range(n_images)],
             "categories": [{"id": 7}, {"id": 9}], "annotations": annotations}
    return truth, [dict(zip(("image_id", "category_id", "bbox", "score"), d)) for d in found]


BOX = (0, 0, 10, 10)
CROWD = {"iscrowd": 1}


@pytest.mark.parametrize("objects, found, AP", [
    ([(0, 7, BOX)], [(0, 7, BOX, 0.5)], 1),                                        # found
    ([(0, 7, BOX)], [], 0),                                                        # not found
    ([], [(0, 7, BOX, 0.5)], -1),                                                  # nothing to find
    ([(0, 7, BOX, CROWD)], [(0, 7, BOX, 0.5)], -1),                                # nothing that counts
    ([(0, 7, BOX)], [(0, 9, BOX, 0.5)], 0),                                        # the wrong category
    ([(0, 7, BOX)], [(1, 7, BOX, 0.5)], 0),                                        # the wrong image
    ([(0, 7, BOX)], [(0, 7, BOX, 0.5), (0, 5, BOX, 0.9)], 1),                      # unknown categories are passed over
    ([(0, 7, BOX)], [(0, 7, BOX, 0.5), (1, 7, BOX, 0.9)], 0.5),                    # a better miss halves the precision
    ([(0, 7, BOX)], [(0, 7, BOX, 0.5), (1, 7, BOX, 0.4)], 1),                      # a worse one costs nothing
    ([(0, 7, BOX)], [(0, 7, BOX, 0.5), (1, 7, BOX, 0.5)], 1),                      # of equals the lower image is first
    ([(0, 7, BOX)], [(0, 7, BOX, 0.5), (0, 7, BOX, 0.9)], 1),                      # the second find of an object misses
    ([(0, 7, BOX), (1, 7, BOX)], [(0, 7, BOX, 0.5)], 51 / 101),                    # recalls 0, 0.01, ... 0.5 of 101
    ([(0, 7, BOX), (0, 9, BOX)], [(0, 7, BOX, 0.5)], 0.5),                         # the mean over two categories
    ([(0, 7, BOX)], [(0, 7, (0, 0, 6.2, 10), 0.5)], 0.3),                          # IoU 0.62 passes at 0.5, 0.55, 0.6
    ([(0, 7, BOX), (0, 7, (50, 50, 90, 90), CROWD)],
     [(0, 7, BOX, 0.5), (0, 7, (60, 60, 9, 9), 0.8), (0, 7, (70, 70, 9, 9), 0.9)], 1),     # a crowd takes in several
    ([(0, 7, BOX), (0, 7, (0, 0, 10, 9), CROWD)], [(0, 7, (0, 0, 10, 8), 0.5)], 0.7),      # objects go before crowds
    ([(0, 7, BOX, {"ignore": 1})], [(0, 7, BOX, 0.5)], 1),                         # "ignore" is not read
    ([(0, 7, BOX), (3, 7, BOX), (0, 5, BOX)], [(0, 7, BOX, 0.5)], 1),              # unknown image, category
])
def test_ap_by_hand(objects, found, AP):
    for iou_type in ("bbox", "segm"):
        truth, detections = world(objects, found, n_images=2)
        for record in truth["annotations"] + detections if iou_type == "segm" else []:
            record["segmentation"] = [box_polygon(*(10 * v for v in record.pop("bbox")))]
        for image in truth["images"] if iou_type == "segm" else []:
            image.update(height=2000, width=2000)                   # ten times larger, so that 6.2 is on a pixel border
        result = coco_average_precision(truth, detections, iou_type)
        assert tuple(sorted(result)) == tuple(sorted(NAMES))
        assert result["AP"] == pytest.approx(AP), iou_type


def test_ap_and_recall_by_area_and_count():
    boxes = [(0, 0, 32, 32), (50, 0, 33, 32), (0, 100, 97, 96)]        # 32^2 is both small and medium; medium; large
    truth, detections = world([(0, 7, b) for b in boxes], [(0, 7, b, 0.9 - 0.1 * i) for i, b in enumerate(boxes)])
    result = coco_average_precision(truth, detections)
    assert {name: round(result[name], 6) for name in NAMES} == {**dict.fromkeys(NAMES, 1), "AR1": 0.333333}
    del truth["annotations"][2], detections[0]
    result = coco_average_precision(truth, detections)
    assert (result["APs"], result["ARs"], result["APl"], result["ARl"]) == (0, 0, -1, -1)
    assert result["ARm"] == 0.5 and result["AR1"] == 0.5               # the large miss comes last


def test_a_mask_with_an_empty_box_is_sized_by_itself():
    truth, detections = world([(0, 7, (0, 0, 40, 40))], [(0, 7, [], 0.5)])
    for record in (truth["annotations"][0], detections[0]):
        record["segmentation"] = [box_polygon(0, 0, 40, 40)]
    result = coco_average_precision(truth, detections, "segm")
    assert (result["AP"], result["APm"], result["APs"]) == (1, 1, -1)


def test_ap_without_areas_takes_those_of_boxes_and_masks():
    truth, detections = world([(0, 7, (0, 0, 40, 40))], [(0, 7, (0, 0, 40, 40), 0.5)])
    truth["annotations"][0].pop("area")
    assert coco_average_precision(truth, detections)["APm"] == 1
    truth["annotations"][0]["segmentation"] = [[0, 0, 40, 0, 0, 40]]   # a triangle of about 800 pixels
    detections[0]["segmentation"] = encode_rle(polygons_to_mask([[0, 0, 40, 0, 0, 40]], 200, 200))
    result = coco_average_precision(truth, detections, "segm")
    assert result["APs"] == 1 and result["APm"] == -1


@pytest.mark.parametrize("change, iou_type, message", [
    (dict(image_id=5), "bbox", "images not in the ground truth, such as 5"),
    (dict(bbox=[1, 2, 3]), "bbox", "image 0 .* valid bbox"),
    (dict(bbox=None), "bbox", "image 0 .* valid bbox"),
    (dict(), "segm", "image 0 .* valid segm"),                         # no segmentation
    (dict(segmentation={"size": [9, 9], "counts": [81]}), "segm", r"\[9, 9\]"),
    (dict(segmentation={"size": [200, 200], "counts": [81]}), "segm", "size 81"),
    (dict(), "keypoints", "'bbox' or 'segm'"),
])
def test_unusable_detections(change, iou_type, message):
    truth, detections = world([], [(0, 7, BOX, 0.5)])
    with pytest.raises(ValueError, match=message):
        coco_average_precision(truth, [{**detections[0], **change}], iou_type)


def random_world(seed, iou_type, found_per_object):
    """Objects of all sizes, crowds, images without anything; detections near them, many of equal score."""
    rng = np.random.default_rng(seed)
    objects, found = [], []
    for _ in range(30):
        image, category = int(rng.integers(5)), int(rng.choice([7, 7, 9, 5]))
        extent = np.exp(rng.uniform(1.5, 5, 2))
        box = np.concatenate((rng.random(2) * (200 - extent), extent)).round(1)
        crowd, area = int(rng.random() < 0.15), float(extent.prod() * rng.random())
        objects.append((image, category, box.tolist(), {"id": len(objects) + 1, "iscrowd": crowd, "area": area}))
        for _ in range(rng.integers(found_per_object)):
            near = box + rng.normal(0, 0.1, 4) * rng.integers(3) * np.tile(extent, 2)
            near = np.concatenate((near[:2], near[2:].clip(1))).round(1)
            category = category if rng.random() < 0.9 else 9
            found.append((image, category, near.tolist(), round(rng.random(), 1 if seed % 2 else 3)))
    truth, detections = world(objects, found, n_images=8)
    if iou_type == "segm":
        for record in truth["annotations"] + detections:
            x, y, w, h = record["bbox"]
            record["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h * 0.6], [x, y, x + w / 3, y, x, y + h]]
            if "score" in record or record["iscrowd"]:
                mask = polygons_to_mask(record["segmentation"], 200, 200)
                record["segmentation"] = encode_rle(mask)
            if "score" not in record and record["iscrowd"]:            # crowds are uncompressed in COCO's files
                edges = np.flatnonzero(np.diff(mask.T.ravel(), prepend=0))
                record["segmentation"]["counts"] = np.diff(edges, prepend=0, append=mask.size).tolist()
        for detection in detections if seed % 3 else []:
            detection.pop("bbox")                                      # where it stays, it gives the size
    rng.shuffle(truth["images"]), rng.shuffle(detections)
    return truth, detections


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed, found_per_object", [(0, 4), (1, 4), (2, 12), (3, 12), (4, 120), (5, 120)])
def test_ap_equals_pycocotools(seed, found_per_object, iou_type):
    cocoeval = pytest.importorskip("pycocotools.cocoeval", reason=PEER)
    from pycocotools.coco import COCO
    truth, detections = random_world(seed, iou_type, found_per_object)
    got = coco_average_precision(copy.deepcopy(truth), copy.deepcopy(detections), iou_type)
    with contextlib.redirect_stdout(io.StringIO()):
        peer = COCO()
        peer.dataset = truth
        peer.createIndex()
        peer = cocoeval.COCOeval(peer, peer.loadRes(detections), iou_type)
        peer.evaluate(), peer.accumulate(), peer.summarize()
    assert [got[name] for name in NAMES] == pytest.approx(peer.stats.tolist(), abs=1e-9)
