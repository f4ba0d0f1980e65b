"""The Shapes world: same bits everywhere, exact masks, true captions, no scene in two splits.

Run:  python -m pytest tests/test_shapes.py
"""
from collections import Counter
from dataclasses import replace
import hashlib
import math
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import data
from data import (COLORS, LONE_SHARE, LONE_SIZE, PATTERNS, SHAPES, ShapesWorld, Thing, UserError, coverage, draw_scene,
                  hash_names, open_data, visible_masks)


def digest(world: ShapesWorld, indices: range) -> str:
    h = hashlib.sha256()
    for i in indices:
        sample = world.read(i)
        h.update(sample.image.tobytes() + sample.captions[0].encode())
    return h.hexdigest()[:16]


# ---- determinism -----------------------------------------------------------------------------------------------------

DIGEST = "d756ab4627d5b1ff"


def test_same_bits_on_every_machine():
    assert digest(ShapesWorld(), range(40)) == DIGEST
    assert ShapesWorld(count=50).read(39) == ShapesWorld().read(39), "a scene depends on count or earlier reads"
    worlds = [ShapesWorld(), ShapesWorld(seed=1), ShapesWorld(split="val"), ShapesWorld(objects=(2, 3))]
    assert len({digest(world, range(5)) for world in worlds}) == len(worlds)
    assert len({world.name(i) for world in worlds[:3] for i in range(5)}) == 15


@pytest.mark.slow
def test_same_bits_in_another_process():
    code = "import test_shapes as t; print(t.digest(t.ShapesWorld(), range(40)))"
    path = os.pathsep.join(str(pathlib.Path(file).parent) for file in (data.__file__, __file__))
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)
    assert result.stdout.strip() == DIGEST, result.stderr


def test_image_size_changes_the_sampling_alone():
    small, large = ShapesWorld(size=48), ShapesWorld(size=192)
    for i in range(20):
        assert small.scene(i) == large.scene(i)
        reduced = np.asarray(large.read(i).image).reshape(48, 4, 48, 4, 3).mean(axis=(1, 3))
        assert np.abs(reduced - np.asarray(small.read(i).image)).mean() < 5, "the noise of the small one alone is 4"


# ---- drawing, against points in polygons and discs -------------------------------------------------------------------

def circle(x, y, cx, cy, r):
    return (x - cx) ** 2 + (y - cy) ** 2 <= r * r


def polygon(x, y, corners):
    """Even-odd rule: a ray to the right crosses the outline an odd number of times."""
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * (bx - ax) / (by - ay))
    return inside


def clock(radius, degrees):
    """The point at `degrees` clockwise from 12 o'clock."""
    return radius * math.sin(math.radians(degrees)), -radius * math.cos(math.radians(degrees))


INSIDE = {
    "circle": lambda x, y: circle(x, y, 0, 0, 1),
    "ring": lambda x, y: circle(x, y, 0, 0, 1) & ~circle(x, y, 0, 0, 0.5),
    "moon": lambda x, y: circle(x, y, 0.25, 0, 1) & ~circle(x, y, 0.75, 0, 0.8),
    "square": lambda x, y: polygon(x, y, [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]),
    "cross": lambda x, y: (polygon(x, y, [(-1, -0.34), (1, -0.34), (1, 0.34), (-1, 0.34)])
                           | polygon(x, y, [(-0.34, -1), (0.34, -1), (0.34, 1), (-0.34, 1)])),
    "triangle": lambda x, y: polygon(x, y - 0.1, [clock(1.16, 0), clock(1.16, 120), clock(1.16, 240)]),
    "star": lambda x, y: polygon(x, y, [clock(1.12 if k % 2 == 0 else 0.56, 36 * k) for k in range(10)]),
    "heart": lambda x, y: (circle(x, y, -0.46, -0.36, 0.5) | circle(x, y, 0.46, -0.36, 0.5) |
                           polygon(x, y, [(0, 1.0867), (0.86, -0.06), (0.46, -0.36), (-0.46, -0.36), (-0.86, -0.06)])),
}


@pytest.mark.parametrize("size, thing_size, angle", [
    (64, 0.5, 0.0),      # upright
    (48, 0.3, -17.0),    # turned, 14 pixels wide
    (120, 0.6, 9.0),     # large
])
@pytest.mark.parametrize("shape", SHAPES)
def test_masks_equal_a_supersampled_drawing(shape, size, thing_size, angle):
    thing = Thing(shape, "red", 0.53, 0.46, thing_size, angle, (200.0, 20.0, 20.0))
    ours = coverage(thing, size)
    fine = 8                                                     # samples per pixel and axis
    t = (np.arange(size * fine) + 0.5) / (size * fine)
    x, y = np.meshgrid((t - thing.cx) / (thing_size / 2), (t - thing.cy) / (thing_size / 2))
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    inside = INSIDE[shape](cos * x + sin * y, cos * y - sin * x)         # clockwise, as y points down
    want = inside.reshape(size, fine, size, fine).mean(axis=(1, 3))

    assert ours.sum() == pytest.approx(want.sum(), rel=0.02)
    assert np.abs(ours - want).max() < 0.45, "only at sharp corners may one pixel's share be far off"
    assert np.abs(ours - want).sum() < 0.04 * want.sum()
    scene = replace(ShapesWorld().scene(0), objects=[thing])
    [mask] = visible_masks(scene, size)
    assert (mask & (want >= 0.5)).sum() / (mask | (want >= 0.5)).sum() > 0.95


def test_colors_are_what_they_are_called():
    """The mean over an object's pixels is half as far from its own color as from any other, and off the background."""
    names, palette = list(COLORS), np.array(list(COLORS.values()))
    for i in range(128):
        scene = ShapesWorld(split="val", objects=(1, 1)).scene(i)
        image, [mask] = draw_scene(scene, 64), visible_masks(scene, 64)
        distance = np.linalg.norm(palette - image[mask].mean(axis=0), axis=1)
        nearest, second = np.argsort(distance)[:2]
        assert names[nearest] == scene.objects[0].color and distance[nearest] < distance[second] / 2
        assert np.linalg.norm(image[mask].mean(axis=0) - image[~mask].mean(axis=0)) > 60


# ---- samples ---------------------------------------------------------------------------------------------------------

def test_dense_samples():
    world = ShapesWorld(objects=(1, 4), dense=True)
    hidden_by_others = 0
    for i in range(100):
        scene, sample = world.scene(i), world.read(i)
        assert np.array_equal(sample.image, draw_scene(scene, world.size)) and sample.captions == (scene.caption,)
        assert sample.label == (data.KINDS.index(scene.objects[0].kind) if len(scene.objects) == 1 else -1)
        assert [world.classes[o["category"]] for o in sample.objects] == [f"{t.color} {t.shape}" for t in scene.objects]
        want = np.zeros((64, 64), dtype=int)
        for o, thing in zip(sample.objects, scene.objects):
            x1, y1, x2, y2 = o["box"]
            ys, xs = np.nonzero(o["mask"])
            assert (x1, y1, x2, y2) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) and not o["crowd"]
            assert not want[o["mask"]].any(), "two masks share a pixel"
            want[o["mask"]] = o["category"] + 1
            alone = visible_masks(replace(scene, objects=[thing]), 64)[0].sum()
            assert o["mask"].sum() >= 0.7 * alone, "placement should not hide much of an object"
            hidden_by_others += o["mask"].sum() < alone
        assert sample.label_map.dtype == np.uint8 and np.array_equal(sample.label_map, want)
    assert hidden_by_others > 0, "the sample has no overlap: it does not test who covers whom"


def test_patterns_are_drawn_and_named_as_often_as_asked():
    """A pattern changes pixels of its own object alone, and neither the scene nor, unnamed, its caption's truth."""
    plain, never, often = (ShapesWorld(count=400, objects=(1, 1), patterns=p) for p in (None, 0.0, 0.75))
    said = [any(name in often.scene(i).caption for name in PATTERNS) for i in range(400)]
    assert 0.68 < np.mean(said) < 0.82
    for i in range(40):
        thing, caption = often.scene(i).objects[0], often.scene(i).caption
        assert said[i] == (f"with {thing.pattern}" in caption)
        assert never.scene(i).objects[0] == thing and not any(name in never.scene(i).caption for name in PATTERNS)
        bare = replace(thing, pattern="", phases=())
        assert bare == plain.scene(i).objects[0]
        scene = often.scene(i)
        changed = (draw_scene(scene, 64) != draw_scene(replace(scene, objects=[bare]), 64)).any(axis=-1)
        inside = coverage(thing, 64) == 1
        assert 0.3 < changed[inside].mean() < 1 and not changed[coverage(thing, 64) == 0].any()
    assert {often.scene(i).objects[0].pattern for i in range(100)} == set(PATTERNS)


def test_stripes_run_as_their_name_says():
    """Along its stripes an object's color stays, across them it changes; y points down: rising ones have x + y equal"""
    thing = Thing("square", "red", 0.5, 0.5, 0.9, 0.0, (214.0, 36.0, 40.0), phases=(0.3, 0.6))
    scene = replace(ShapesWorld(objects=(1, 1)).scene(1), objects=[thing])
    for name, along in {"upright": (1, 0), "level": (0, 1), "rising": (-1, 1), "falling": (1, 1)}.items():
        image = draw_scene(replace(scene, objects=[replace(thing, pattern=f"{name} stripes")]), 64)[20:44, 20:44, 0]
        change = {step: np.abs(np.roll(image.astype(int), step, (0, 1)) - image)[2:-2, 2:-2].mean()
                  for step in ((1, 0), (0, 1), (-1, 1), (1, 1))}
        assert min(change, key=change.get) == along, (name, change)


@pytest.mark.parametrize("by, names, of", [
    ("kind", data.KINDS, lambda thing, scene: thing.color + " " + thing.shape),
    ("shape", SHAPES, lambda thing, scene: thing.shape),
    ("pattern", PATTERNS, lambda thing, scene: thing.pattern),
    ("texture", data.TEXTURES, lambda thing, scene: scene.texture),
    ("tilt", data.QUARTERS, lambda thing, scene: quarter(thing.angle, -20, 20)),
    ("fineness", data.QUARTERS, lambda thing, scene: quarter(scene.period, 0.14, 0.3)),
])
def test_what_a_class_is(by, names, of):
    """The same pictures whatever is asked of them (patterns are drawn where they are asked for), all classes in use."""
    world, plain = (open_data(f"shapes:val=200{end}", "val", "classes", size=32) for end in (f",by={by}", ""))
    assert world.classes == list(names)
    samples, scenes = zip(*((world.read(i), world.scene(i)) for i in range(len(world))))
    assert [world.classes[sample.label] for sample in samples] == [of(scene.objects[0], scene) for scene in scenes]
    assert {sample.label for sample in samples} == set(range(len(names)))
    assert (samples[3].image == plain.read(3).image) == (by != "pattern")


def quarter(value: float, low: float, high: float) -> str:
    return data.QUARTERS[sum(value >= low + (high - low) * share for share in (0.25, 0.5, 0.75))]


def test_with_shapes_a_class_is_of_any_color():
    forms, both = (ShapesWorld(objects=(1, 3), dense=True, by=by) for by in ("shape", "kind"))
    assert forms.classes == list(SHAPES) and len(both.classes) == 64
    for i in range(40):
        scene, sample, finer = forms.scene(i), forms.read(i), both.read(i)
        assert np.array_equal(sample.image, finer.image) and sample.captions == finer.captions
        assert [SHAPES[o["category"]] for o in sample.objects] == [thing.shape for thing in scene.objects]
        assert sample.label == (SHAPES.index(scene.objects[0].shape) if len(scene.objects) == 1 else -1)
        shape_of = [0, *(1 + SHAPES.index(name.split()[1]) for name in both.classes)]
        assert np.array_equal(sample.label_map, np.array(shape_of)[finer.label_map])


def test_later_objects_cover_earlier_ones_and_hidden_ones_are_dropped(monkeypatch):
    below = Thing("circle", "red", 0.5, 0.5, 0.2, 0.0, (214.0, 36.0, 40.0))
    above = Thing("square", "blue", 0.5, 0.5, 0.5, 0.0, (38.0, 76.0, 214.0))
    scene = replace(ShapesWorld().scene(0), objects=[below, above])
    assert np.linalg.norm(draw_scene(scene, 64)[32, 32] - np.array(above.rgb)) < 16
    monkeypatch.setattr(ShapesWorld, "scene", lambda self, i: scene)
    assert [o["category"] for o in ShapesWorld(dense=True).read(0).objects] == [data.KINDS.index(above.kind)]


# ---- splits and balance ----------------------------------------------------------------------------------------------

def layouts(world: ShapesWorld, n: int) -> list:
    return [tuple(sorted((t.color, t.shape, math.floor(t.cx * 16), math.floor(t.cy * 16), math.floor(t.size * 16))
                         for t in world.scene(i).objects)) for i in range(n)]


@pytest.mark.slow
def test_splits_share_no_layout():
    train = layouts(ShapesWorld(objects=(1, 1)), 5000) + layouts(ShapesWorld(seed=1), 1000)
    val = layouts(ShapesWorld(split="val", objects=(1, 1)), 2500) + layouts(ShapesWorld(split="val", seed=1), 500)
    assert len(set(train)) < len(train) - 100, "layouts that never repeat would be disjoint by luck"
    assert not set(train) & set(val)


@pytest.mark.parametrize("split", ["train", "val"])
def test_single_object_worlds_are_balanced(split):
    world = ShapesWorld(split=split, count=256, objects=(1, 1))
    scenes = [world.scene(i) for i in range(len(world))]
    assert [scene.objects[0].kind for scene in scenes] == [data.KINDS[i % 64] for i in range(256)]
    assert len(world.classes) == len(set(world.classes)) == 64


@pytest.mark.parametrize("objects, want", [
    ((1, 4), {1: LONE_SHARE, 2: 0.1, 3: 0.1, 4: 0.1}),
    ((1, 2), {1: LONE_SHARE, 2: 0.3}),
    ((2, 3), {2: 1 / 2, 3: 1 / 2}),          # LONE_SHARE has no say where one object is not allowed
    ((1, 1), {1: 1}),                        # nor where nothing else is
])
def test_number_and_sizes_of_objects(objects, want):
    scenes = [ShapesWorld(objects=objects).scene(i).objects for i in range(800)]
    seen = Counter(map(len, scenes))
    assert seen.keys() == want.keys()
    for n, p in want.items():
        assert abs(seen[n] / 800 - p) <= 4 * math.sqrt(p * (1 - p) / 800)
    for things in scenes:
        for t in things:
            assert t.size <= LONE_SIZE[1] * len(things) ** -0.4 and (len(things) > 1 or t.size >= LONE_SIZE[0])
            assert all(t.size / 2 <= c <= 1 - t.size / 2 for c in (t.cx, t.cy)) and abs(t.angle) <= 20


# ---- captions, read by a parser of their own -------------------------------------------------------------------------

NOUN = (r"\b(an?|two|three|four)(?: (big|large|small|tiny))?"
        r"(?: (red|orange|yellow|green|blue|purple|white|black))?"
        r" (circle|square|triangle|star|cross|ring|heart|moon|shape)(e?s)?\b"
        r"(?: (?:at|on|in) the ((?:top|bottom|left|right|center|middle)(?: left| right)?)(?: corner)?\b)?")
RELATION = r"(?: (to the left of|left of|to the right of|right of|above|below|under) )"
SENTENCE = re.compile(rf"(?:a photo of |a picture of |an image of |a drawing of |there (?:is|are) )?"
                      rf"{NOUN}(?:(?:, plus |, | and |{RELATION}){NOUN})*(?:(?:,| on a) (\w+) background)?")
IS_TRUE = {"left": lambda x, y: x < 0.4, "right": lambda x, y: x > 0.6, "top": lambda x, y: y < 0.4,
           "bottom": lambda x, y: y > 0.6, "center": lambda x, y: abs(x - 0.5) + abs(y - 0.5) < 0.15}
IS_TRUE["middle"] = IS_TRUE["center"]


def phrases(text):
    """[(number, size word, color, shape, place words)]"""
    number = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
    found = [match.groups() for match in re.finditer(NOUN, text)]
    for article, size, color, shape, suffix, _ in found:
        assert suffix == (None if number[article] == 1 else "es" if shape == "cross" else "s"), text
        assert (article == "an") == (size is None and color == "orange" and suffix is None), text
    return [(number[article], size, color, shape, place) for article, size, color, shape, _, place in found]


def test_captions_are_true_and_complete(monkeypatch):
    monkeypatch.setattr(data, "LONE_SHARE", 0.25)
    world, used = ShapesWorld(), Counter()
    for i in range(2500):
        scene = world.scene(i)
        text = scene.caption
        match = SENTENCE.fullmatch(text)
        assert match, f"not a sentence of the grammar: {text}"
        names = Counter((t.color, t.shape) for t in scene.objects)
        body = re.sub(r"^(a photo of|a picture of|an image of|a drawing of) ", "", text)
        assert not text.startswith("there ") or text.startswith("there is ") == (phrases(body)[0][0] == 1), text
        assert names == Counter({(color, shape): n for n, _, color, shape, _ in phrases(body)}), text

        def named(phrase):
            return [t for t in scene.objects if (t.color, t.shape) == (phrase[2], phrase[3])]

        for phrase in phrases(body):
            _, size, _, _, place = phrase
            if size:
                [t] = named(phrase)
                assert t.size > 0.45 if size in ("big", "large") else t.size < (0.25 if size == "tiny" else 0.4), text
            for word in (place or "").split():
                [t] = named(phrase)
                assert IS_TRUE[word](t.cx, t.cy), text
            used.update(filter(None, (size, place)))
        relation = re.search(RELATION, body)
        if relation:
            direction = {"to the left of": (-1, 0), "left of": (-1, 0), "to the right of": (1, 0), "right of": (1, 0),
                         "above": (0, -1), "below": (0, 1), "under": (0, 1)}[relation[1]]
            [subject] = phrases(body[:relation.start()])
            [a] = named(subject)
            for phrase in phrases(body[relation.end():].split(", plus")[0]):
                for b in named(phrase):
                    d = (a.cx - b.cx, a.cy - b.cy)
                    along, aside = (d[0] * direction[0], d[1]) if direction[0] else (d[1] * direction[1], d[0])
                    assert along > 0.15 and along > 1.4 * abs(aside), text
            used[relation[1]] += 1
        if match[match.re.groups]:
            assert match[match.re.groups] == scene.texture
            used[scene.texture] += 1
    want = {*data.TEXTURES, *IS_TRUE, "top left", "bottom right", "big", "large", "small", "tiny",
            "to the left of", "left of", "to the right of", "right of", "above", "below", "under"}
    assert all(used[word] >= 5 for word in want), f"hardly used: {[word for word in want if used[word] < 5]}"


def test_captions_vary():
    world = ShapesWorld(objects=(1, 1))
    assert len({world.scene(64 * k).caption for k in range(60)}) > 15, "one class has many sentences"
    words = [len(ShapesWorld().scene(i).caption.split()) for i in range(500)]
    assert min(words) >= 3 and np.mean(words) < 15


@pytest.mark.parametrize("unsaid, fewest, most", [
    (0.0, 1.0, 1.0),     # everything is said
    (0.3, 0.75, 0.85),   # 1/3 + 2/3 * 0.7, were no two of a class
    (1.0, 0.3, 0.45),    # the first group alone, of three objects, some of a class
])
def test_unsaid(unsaid, fewest, most):
    world, said, shown, attributes = ShapesWorld(objects=(3, 3), unsaid=unsaid), 0, 0, []
    for i in range(400):
        scene = world.scene(i)
        body = re.sub(r"^(a photo of|a picture of|an image of|a drawing of) ", "", scene.caption)
        for n, _, color, shape, _ in phrases(body):
            said += n
            attributes.append((color is not None) + (shape != "shape"))
            assert any(color in (None, t.color) and shape in ("shape", t.shape) for t in scene.objects), scene.caption
        shown += 3
    assert fewest <= said / shown <= most
    assert abs(np.mean(attributes) - (2 - unsaid)) < 0.1 and min(attributes) >= 1


def test_mismatched():
    """The share asked for, half of it file names; the pictures and the captions of all others are as without it."""
    plain, noisy = ShapesWorld(objects=(1, 1)), ShapesWorld(objects=(1, 1), mismatched=0.3)
    assert digest(plain, range(5)) != digest(ShapesWorld(objects=(1, 1), mismatched=1), range(5))
    told, files = 0, 0
    for i in range(1000):
        right, scene = plain.scene(i), noisy.scene(i)
        assert vars(scene.objects[0]) == vars(right.objects[0])
        told += scene.caption != right.caption
        files += bool(re.fullmatch(r"IMG_\d{4}\.jpg", scene.caption))
    assert 250 < told < 350 and 0.4 < files / told < 0.6
    assert plain.read(7).image == ShapesWorld(objects=(1, 1), mismatched=1).read(7).image


# ---- options ---------------------------------------------------------------------------------------------------------

def test_options():
    """What follows "shapes:" in a SPEC, and what a task asks for where it says nothing."""
    world = open_data("shapes:val=9,seed=3,objects=1-1,unsaid=.25,by=shape,size=48", "val", "retrieval", size=32)
    assert vars(world) == vars(ShapesWorld("val", 9, 48, 3, (1, 1), 0.25, by="shape")) and world.classes == list(SHAPES)
    plain, held_out = open_data("shapes:train=30", size=32), open_data("shapes", "val")
    assert (len(plain), len(held_out)) == (30, 1024) and held_out.split == "val"
    sample = plain.read(0)
    assert sample.label_map is None and sample.objects is None and sample.image.size == (32, 32)
    assert hash_names(open_data("shapes:val=9", "test")) == hash_names(open_data("shapes:val=9", "val"))
    for task, objects, dense, classes in (("captions", (1, 4), False, 64), ("classes", (1, 1), False, 64),
                                          ("segmentation", (1, 4), True, 64), ("detection", (1, 4), True, 8)):
        world = open_data("shapes", "train", task)
        assert (world.objects, world.dense, len(world.classes)) == (objects, dense, classes)


@pytest.mark.parametrize("text, told", [
    ("sise=64", ["sise", "size", "train", "unsaid"]),     # an unknown key: what there is
    ("size", ["size"]),                                   # no value
    ("size=big", ["size=big", "size=64"]),                # not a number: what it looks like
    ("size=8", ["size", "8", "from 16"]),
    ("train=-1", ["count", "-1"]),
    ("objects=4", ["objects=4", "objects=1-4"]),
    ("objects=3-2", ["objects", "(3, 2)"]),
    ("objects=0-2", ["objects", "(0, 2)"]),
    ("unsaid=1.5", ["unsaid", "1.5", "from 0 to 1"]),
    ("unsaid=nan", ["unsaid", "nan"]),
    ("mismatched=-1", ["mismatched", "-1"]),
    ("patterns=2", ["patterns", "2"]),
    ("by=form", ["by=form", "by=shape", "fineness"]),     # no key of CLASSES
])
def test_bad_options(text, told):
    with pytest.raises(UserError) as error:
        open_data(f"shapes:{text}")
    assert all(name in str(error.value) for name in told) and "\n" not in str(error.value)
