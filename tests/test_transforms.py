"""Image transforms of data.py against torchvision, Pillow and pixels worked out by hand.

    python -m pytest tests/test_transforms.py
"""
import functools
import io
import math
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageFilter
import PIL.ImageOps
import pytest
import torch

import data
from data import BadRecord, EvalTransform, TrainTransform, UserError, crop_box, decode, open_image, resize_crop

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")        # pytest switches the filter of data.py off


def encoded(image: PIL.Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


@functools.lru_cache
def picture(width: int, height: int) -> PIL.Image.Image:
    """Waves of all directions and lengths; as in photographs, a wave twice as long is twice as strong."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    total = np.zeros((height, width, 3), np.float32)
    for length in (2.0 ** np.arange(1.5, 9, 0.5)).repeat(2):
        angle, phase = rng.uniform(0, 2 * math.pi, 2)
        wave = np.sin(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / length + phase)
        total += length * wave[:, :, None] * rng.uniform(0.5, 1, 3).astype(np.float32)
    total = 128 + total * 55 / total.std()
    return PIL.Image.fromarray(total.clip(0, 255).astype(np.uint8))


def agree(a: torch.Tensor, b: torch.Tensor, changed: float) -> bool:
    """A share `changed` of the values at most is off by one level; by two, when two roundings meet, one in 10,000."""
    assert a.shape == b.shape and a.dtype == b.dtype == torch.uint8
    off = (a.int() - b.int()).abs()
    return off.max() <= 2 and (off == 2).float().mean() < 1e-4 and (off == 1).float().mean() <= changed


# ---- decoding -------------------------------------------------------------------------------------------------------

RED, WHITE, PINK, GRAY = (255, 0, 0), (255, 255, 255), (255, 127, 127), (128, 128, 128)


def palette_image(**info) -> bytes:
    """8 x 8 pixels of palette entry 1, red; entry 0 is blue."""
    image = PIL.Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 255, 255, 0, 0])
    return encoded(image, **info)


def gray16(value: int, format: str) -> bytes:
    return encoded(PIL.Image.fromarray(np.full((8, 8), value, np.uint16)), format)


def animation(format: str, **options) -> bytes:
    frames = [PIL.Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize("data_, want", [
    (lambda: encoded(PIL.Image.new("RGB", (8, 8), RED)), RED),
    (lambda: encoded(PIL.Image.new("RGB", (8, 8), RED), transparency=RED), WHITE),           # one color is transparent
    (lambda: encoded(PIL.Image.new("RGB", (8, 8), RED), transparency=(0, 0, 9)), RED),       # another color is
    (lambda: encoded(PIL.Image.new("RGBA", (8, 8), RED + (255,))), RED),
    (lambda: encoded(PIL.Image.new("RGBA", (8, 8), RED + (0,))), WHITE),
    (lambda: encoded(PIL.Image.new("RGBA", (8, 8), RED + (128,))), PINK),
    (lambda: encoded(PIL.Image.new("RGBA", (8, 8), RED + (128,)), "WEBP", lossless=True), PINK),
    (lambda: encoded(PIL.Image.new("L", (8, 8), 128)), GRAY),
    (lambda: encoded(PIL.Image.new("L", (8, 8), 128), "JPEG"), GRAY),
    (lambda: encoded(PIL.Image.new("L", (8, 8), 128), transparency=128), WHITE),
    (lambda: encoded(PIL.Image.new("LA", (8, 8), (128, 255))), GRAY),
    (lambda: encoded(PIL.Image.new("LA", (8, 8), (0, 127))), GRAY),                          # black, half transparent
    (lambda: encoded(PIL.Image.new("1", (8, 8), 1)), WHITE),
    (lambda: encoded(PIL.Image.new("1", (8, 8), 1), "TIFF"), WHITE),
    (lambda: palette_image(), RED),
    (lambda: palette_image(transparency=1), WHITE),                                          # one entry is transparent
    (lambda: palette_image(transparency=0), RED),
    (lambda: palette_image(transparency=b"\x00\x80"), PINK),                                 # opacity per entry
    (lambda: gray16(0x8000, "PNG"), GRAY),
    (lambda: gray16(0xFFFF, "PNG"), WHITE),
    (lambda: gray16(0x80FF, "TIFF"), GRAY),
    (lambda: gray16(0x8000, "PPM"), GRAY),
    (lambda: encoded(PIL.Image.fromarray(np.full((8, 8), 0x80FF, np.int32)), "TIFF"), GRAY),
    (lambda: encoded(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), RED),
    (lambda: encoded(PIL.Image.new("CMYK", (8, 8), (0, 0, 0, 127)), "JPEG"), GRAY),          # stored inverted
    (lambda: encoded(PIL.Image.new("YCbCr", (8, 8), (128, 128, 128)), "JPEG"), GRAY),
    (lambda: animation("GIF"), RED),                                                         # the first frame
    (lambda: animation("WEBP", lossless=True), RED),
    (lambda: animation("PNG"), RED),
    (lambda: animation("TIFF"), RED),
])
def test_every_kind_of_image_becomes_rgb(data_, want):
    image = decode(open_image(data_()))
    assert image.mode == "RGB" and image.size == (8, 8)
    assert np.abs(np.asarray(image).astype(int) - want).max() <= 1


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(format):
    exif = PIL.Image.Exif()
    for orientation in range(10):                               # 1 to 8 are defined; 0 and 9 are left alone
        exif[0x0112] = orientation
        file = encoded(picture(96, 64), format, exif=exif)
        want = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(file)))
        assert data.upright_size(open_image(file)) == want.size
        image = decode(open_image(file))
        assert np.array_equal(image, want.convert("RGB"))
        assert np.array_equal(decode(image), image) and data.upright_size(image) == image.size, "it is turned once"
        for transform in (TrainTransform(32), EvalTransform(32), EvalTransform(32, 40), EvalTransform(32, squash=True)):
            got, of_upright = (transform(x, np.random.default_rng(0)) for x in (open_image(file), image))
            assert torch.equal(got, of_upright)
    file = encoded(picture(32, 32), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff garbage")
    assert decode(open_image(file)).size == (32, 32), "broken EXIF is no broken image"


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


JPEG, PNG = encoded(picture(64, 64), "JPEG"), encoded(picture(64, 64), "PNG")


@pytest.mark.parametrize("file, reason", [
    (b"", "not an image"),
    (b"<html>404</html>", "not an image"),                              # what a dead link often leaves behind
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    (JPEG[:2], "not an image"),
    (JPEG[:len(JPEG) // 2], "corrupt image"),
    (JPEG[:-200], "corrupt image"),
    (PNG[:len(PNG) // 2], "corrupt image"),
    (PNG[:200] + b"\xff" * 40 + PNG[240:], "corrupt image"),
    (encoded(picture(64, 64), "GIF")[:1000], "corrupt image"),
    (encoded(picture(64, 64), "WEBP")[:300], "corrupt image"),
    (encoded(PIL.Image.new("F", (8, 8)), "TIFF"), "corrupt image"),     # floating point: nobody says what is white
    (encoded(PIL.Image.new("RGB", (1, 1))), "image too small"),         # a counter on a web page
    (encoded(PIL.Image.new("RGB", (1, 300))), "image too small"),
    (png_that_claims(12_000, 12_000), "image too large"),
    (png_that_claims(60_000, 60_000), "image too large"),
    (png_that_claims(2 ** 31 - 1, 2 ** 31 - 1), "image too large"),
    (png_that_claims(0, 5), None),                                      # some reason
])
def test_bad_images_say_why_in_one_line(file, reason):
    with pytest.raises(BadRecord) as error:
        image = open_image(file)
        assert reason != "image too large", "said before it is decoded"
        decode(image)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 and " object at 0x" not in str(error.value)
    assert reason is None or str(error.value).split(":")[0] == reason


def test_any_damage_to_a_file_gives_an_image_or_a_bad_record():
    rng = np.random.default_rng(0)
    for k in range(300):
        file = bytearray((JPEG, PNG)[k % 2])
        for _ in range(rng.integers(1, 6)):
            file[rng.integers(2, len(file))] = rng.integers(256)
        try:
            assert decode(open_image(bytes(file))).mode == "RGB"
        except BadRecord:
            pass


# ---- crops ----------------------------------------------------------------------------------------------------------

class TorchDraws:
    """Draws from torch's global generator, as torchvision does, through numpy's names."""
    def __init__(self):
        self.uniforms = 0

    def uniform(self, low, high):
        self.uniforms += 1
        return torch.empty(1).uniform_(low, high).item()

    def integers(self, n):
        return torch.randint(0, n, (1,)).item()


@pytest.mark.parametrize("width, height, scale, ratio", [
    (640, 480, (0.5, 1.0), (3 / 4, 4 / 3)),
    (224, 224, (0.08, 1.0), (3 / 4, 4 / 3)),
    (5, 7, (0.01, 1.0), (3 / 4, 4 / 3)),          # crops of no pixels are drawn again
    (1000, 20, (0.5, 1.0), (3 / 4, 4 / 3)),       # too wide: never fits, the center is taken
    (20, 1000, (0.5, 1.0), (3 / 4, 4 / 3)),       # too high
    (64, 64, (1.0, 1.0), (3 / 4, 4 / 3)),         # fits only when the ratio is 1
    (300, 200, (1.0, 1.0), (0.2, 5.0)),
])
def test_crop_box_is_torchvisions(width, height, scale, ratio):
    transforms = pytest.importorskip("torchvision.transforms", reason="parity with torchvision needs it")
    image = torch.empty(3, height, width)
    for seed in range(50):
        torch.manual_seed(seed)
        top, left, h, w = transforms.RandomResizedCrop.get_params(image, scale, ratio)
        torch.manual_seed(seed)
        assert crop_box(width, height, scale, ratio, TorchDraws()) == (left, top, w, h)


@pytest.mark.parametrize("width, height", [(640, 480), (1000, 20), (20, 1000), (2, 2)])
def test_crop_box_single_shot_draws_once_and_cuts_to_fit(width, height):
    for seed in range(50):
        torch.manual_seed(seed)
        area = width * height * torch.empty(1).uniform_(0.08, 1).item()
        aspect = math.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3)).item())
        torch.manual_seed(seed)
        draws = TorchDraws()
        left, top, w, h = crop_box(width, height, (0.08, 1), (3 / 4, 4 / 3), draws, single_shot=True)
        assert draws.uniforms == 2 and 0 <= left <= left + w <= width and 0 <= top <= top + h <= height
        if min(width, height) > 2:
            assert (w, h) == (min(width, round((area * aspect) ** 0.5)), min(height, round((area / aspect) ** 0.5)))


@pytest.mark.parametrize("width, height, box, size", [
    (640, 480, (95, 40, 545, 440), 224),
    (300, 200, (0, 0, 300, 200), 224),            # all of it
    (400, 300, (10, 20, 234, 244), 224),          # of the wanted size: nothing is resized
    (100, 90, (3, 5, 60, 80), 224),               # enlarged
    (900, 30, (0, 0, 900, 30), 64),               # squashed
    (50, 50, (7, 9, 8, 10), 16),                  # one pixel
])
@pytest.mark.parametrize("torch_resize", [True, False])
@pytest.mark.parametrize("peer", ["Pillow", "torchvision"])
def test_resize_crop_is_crop_then_resize(width, height, box, size, torch_resize, peer, monkeypatch):
    monkeypatch.setattr(data, "TORCH_RESIZE", torch_resize)
    image = picture(width, height).copy()
    if peer == "Pillow":
        want = image.crop(box).resize((size, size), PIL.Image.Resampling.BICUBIC)
    else:
        functional = pytest.importorskip("torchvision.transforms.functional", reason="parity with torchvision needs it")
        left, top, right, bottom = box
        want = functional.resized_crop(image, top, left, bottom - top, right - left, [size, size],
                                       functional.InterpolationMode.BICUBIC)
    got = resize_crop(image, box, size)
    assert got.is_contiguous()
    same_size = box[2:] == (box[0] + size, box[1] + size)
    changed = 0.02 if torch_resize and not same_size else 0
    assert agree(got, torch.from_numpy(np.array(want)).permute(2, 0, 1), changed)
    image.paste("black", box)
    assert resize_crop(image, box, size).max() == 0, "nothing outside the box is seen"


@pytest.mark.parametrize("width, height, size, resize", [
    (640, 480, 224, 256),
    (480, 640, 224, 224),
    (333, 500, 224, 256),         # odd sides: where torchvision truncates and rounds shows
    (101, 99, 96, 97),
    (50, 40, 224, 224),           # enlarged
    (1500, 10, 32, 36),
])
def test_eval_transform_is_torchvisions(width, height, size, resize):
    transforms = pytest.importorskip("torchvision.transforms", reason="parity with torchvision needs it")
    bicubic = transforms.InterpolationMode.BICUBIC
    image = picture(width, height)
    crop, to_tensor = transforms.CenterCrop(size), transforms.PILToTensor()
    peer = transforms.Compose([transforms.Resize(resize, bicubic), crop, to_tensor])
    assert agree(EvalTransform(size, resize)(image), peer(image), changed=0.3)
    peer = transforms.Compose([transforms.Resize((size, size), bicubic), to_tensor])
    assert agree(EvalTransform(size, squash=True)(image), peer(image), changed=0)


def test_eval_transform_of_odd_sizes():
    image = PIL.Image.new("RGB", (50_000, 2), RED)                      # resized as a whole: 5.6 million x 224 pixels
    assert EvalTransform(224)(image).flatten(1).float().mean(1).tolist() == [255, 0, 0]
    with pytest.raises(UserError, match="224"):
        EvalTransform(224, 200)
    image = picture(64, 64)
    want = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(TrainTransform(64, scale=(1, 1))(image, np.random.default_rng(0)), want)
    assert torch.equal(EvalTransform(64)(image), want), "a fitting image is not changed"


def test_train_transform():
    image, transform = picture(300, 200), TrainTransform(64, flip=True)
    views = [transform(image, np.random.default_rng(seed)) for seed in range(100)]
    assert all(view.shape == (3, 64, 64) and view.dtype == torch.uint8 and view.is_contiguous() for view in views)
    assert torch.equal(views[7], transform(image, np.random.default_rng(7))), "the same generator, the same view"
    assert len({view.numpy().tobytes() for view in views}) == 100
    straight = TrainTransform(64)
    mirrored = [torch.equal(view, straight(image, np.random.default_rng(k)).flip(-1)) for k, view in enumerate(views)]
    assert 30 <= sum(mirrored) <= 70


# ---- SLIP's and DeCLIP's views --------------------------------------------------------------------------------------

DRAWS = 2000


def apart(a, b) -> float:
    """Kolmogorov and Smirnov's distance: the largest difference of two samples' shares below any value."""
    a, b = np.sort(a), np.sort(b)
    below = [np.searchsorted(x, np.concatenate([a, b]), side="right") / len(x) for x in (a, b)]
    return np.abs(below[0] - below[1]).max()


LIMIT = 1.95 * (2 / DRAWS) ** 0.5       # of the distance of two samples of one distribution: one in 1,000 is larger


def measures(view: torch.Tensor) -> dict[str, float]:
    """What tells of a view's steps: levels and contrast of jitter, hue and gray, sharpness of blur and the crop's size,
    sides of mirroring."""
    x = view.numpy() / 255.0
    red, green, blue = x.mean(axis=(1, 2))
    luma = x.mean(axis=0)
    return dict(red=red, green=green, blue=blue, **dict(zip(("red std", "green std", "blue std"), x.std(axis=(1, 2)))),
                hue=math.atan2(3 ** 0.5 * (green - blue), 2 * red - green - blue),
                gray=float(np.ptp(x, axis=0).max() < 0.01), color=np.ptp(x, axis=0).mean(),
                left=luma[:, :16].mean() - luma[:, 16:].mean(),
                top=luma[:16].mean() - luma[16:].mean(), sharp=np.abs(np.diff(luma)).mean() / luma.std())


def views_source() -> PIL.Image.Image:
    """Waves, orange where they are bright, brighter to the left and the top"""
    y, x = np.mgrid[:72, :96]
    pixels = np.asarray(picture(96, 72)) * 0.4 + (100 - 0.6 * x - 0.5 * y)[:, :, None]
    return PIL.Image.fromarray((pixels * (1.0, 0.7, 0.35)).clip(0, 255).astype(np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("crop_min", [0.08, 0.5])
def test_views_are_distributed_as_torchvisions(crop_min):
    """SLIP's own pipeline of torchvision's parts, whose parameters stand in its datasets.py and utils.py."""
    transforms = pytest.importorskip("torchvision.transforms", reason="parity with torchvision needs it")
    rng = np.random.default_rng(0)

    def blur(image):
        return image.filter(PIL.ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0) * 32 / 224))
    peer = transforms.Compose([
        transforms.RandomResizedCrop(32, (crop_min, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), transforms.RandomGrayscale(0.2),
        transforms.RandomApply([blur], 0.5), transforms.RandomHorizontalFlip(), transforms.PILToTensor()])
    image, ours = views_source(), data.ViewTransform(32, (crop_min, 1.0))
    torch.manual_seed(0)
    want = [measures(peer(image)) for _ in range(DRAWS)]
    got = [measures(ours(image, np.random.default_rng(i))) for i in range(DRAWS)]
    distance = {name: apart([m[name] for m in got], [m[name] for m in want]) for name in got[0]}
    assert max(distance.values()) < LIMIT, distance


@pytest.mark.slow
def test_views_draw_what_they_say(monkeypatch):
    """How often, in which order and by how much: what the steps are called with, in 2,000 views."""
    calls, sigmas, views = [], [], 0

    def spy(name):
        return lambda image, factor: calls.append((views, name, factor)) or image
    limits = {name: limits for name, (_, limits) in data.JITTER.items()}
    assert limits == dict(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4), hue=(-0.1, 0.1))
    monkeypatch.setattr(data, "JITTER", {name: (spy(name), span) for name, span in limits.items()})
    monkeypatch.setattr(data, "blur", lambda image, sigma: sigmas.append(sigma) or image)
    image, transform = picture(40, 30), data.ViewTransform(32, (0.08, 1.0))
    for views in range(DRAWS):
        transform(image, np.random.default_rng(views))
    even = (np.arange(10_000) + 0.5) / 10_000
    for name, (low, high) in limits.items():
        factors = [factor for _, called, factor in calls if called == name]
        assert len(factors) / DRAWS == pytest.approx(0.8, abs=0.03)
        assert apart(factors, low + even * (high - low)) < LIMIT, name
        place = [i % 4 for i, (_, called, _) in enumerate(calls) if called == name]
        assert np.bincount(place, minlength=4) / len(place) == pytest.approx([0.25] * 4, abs=0.04), name
    assert all(len({view for view, _, _ in calls[i:i + 4]}) == 1 for i in range(0, len(calls), 4)), "all four or none"
    assert len(sigmas) / DRAWS == pytest.approx(0.5, abs=0.04)
    assert apart(sigmas, (0.1 + even * 1.9) * 32 / 224) < LIMIT


def test_normalize():
    images = torch.randint(0, 256, (4, 3, 5, 7), dtype=torch.uint8)
    before = images.clone()
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (data.MEAN, data.STD))
    got = data.normalize(images)
    assert got.dtype == torch.float32 and torch.equal(images, before)
    torch.testing.assert_close(got.double(), (images.double() / 255 - mean) / std, atol=1e-6, rtol=0)
