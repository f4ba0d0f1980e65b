"""Image transforms of data.py against torchvision, Pillow and pixels worked out by hand.

    python -m pytest tests/test_transforms.py
"""
import functools
import io
import itertools
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
    (lambda: encoded(PIL.Image.new("RGB", (8, 8), RED), icc_profile=bytes(2_000_000)), RED),  # more than Pillow reads
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
    tags = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(">HHI4s", 0x0128, 2, 2, b"2")   # a unit, as text
    exif = b"Exif\0\0" + struct.pack(">2sHIH", b"MM", 42, 8, 2) + tags + bytes(4)
    file = encoded(picture(96, 64), "JPEG", exif=exif)
    assert decode(open_image(file)).size == (64, 96), "one odd tag does not keep it from being turned"


def test_what_follows_a_photo_is_no_part_of_it():
    """Phones put a film behind it, whose bytes may look like the marks of a thousand scans."""
    assert decode(open_image(JPEG + b"\xff\xda\x12" * 1000)).size == (64, 64)


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
@pytest.mark.parametrize("peer", ["Pillow", "torchvision"])
def test_resize_crop_is_crop_then_resize(width, height, box, size, peer):
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
    assert agree(got, torch.from_numpy(np.array(want)).permute(2, 0, 1), changed=0 if same_size else 0.02)
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

    def blur(x):
        sigma = rng.uniform(0.1, 2.0) * 32 / 224
        return transforms.functional.gaussian_blur(x, 2 * math.ceil(4 * sigma) + 1, sigma)
    peer = transforms.Compose([
        transforms.RandomResizedCrop(32, (crop_min, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(), transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        transforms.RandomGrayscale(0.2),
        transforms.RandomApply([blur], 0.5), transforms.RandomHorizontalFlip()])
    image, ours = views_source(), data.ViewTransform(32, (crop_min, 1.0))
    torch.manual_seed(0)
    want = [measures((255 * peer(image)).round()) for _ in range(DRAWS)]
    views = [ours(image, np.random.default_rng(i), "x") for i in range(DRAWS)]
    got = [measures(data.change_colors(view["x"][None], view["x_steps"][None])[0]) for view in views]
    distance = {name: apart([m[name] for m in got], [m[name] for m in want]) for name in got[0]}
    assert max(distance.values()) < LIMIT, distance


CHANGES = "brightness", "contrast", "saturation", "hue", "blur"


def steps_of(*views: list[tuple[str, float]]) -> torch.Tensor:
    """For each view its (name, amount) steps -> (B, S, 2)"""
    most = max(map(len, views))
    return torch.tensor([[(CHANGES.index(name), amount) for name, amount in view] + [(-1, 0.0)] * (most - len(view))
                         for view in views])


def by_torchvision(functional, pixels: torch.Tensor, view: list[tuple[str, float]]) -> torch.Tensor:
    """One image after its steps, in float without rounding between them"""
    x = pixels[None] / 255
    for name, amount in view:
        x = (functional.gaussian_blur(x, 2 * math.ceil(4 * amount) + 1, amount) if name == "blur" else
             getattr(functional, f"adjust_{name}")(x, amount))
    return x[0] * 255


def test_colors_change_as_torchvisions_each_image_in_its_own_order():
    functional = pytest.importorskip("torchvision.transforms.functional", reason="parity with torchvision needs it")
    pixels = data.to_tensor(picture(72, 72))
    alone = [[(name, amount)] for name, amounts in dict(
        brightness=(0.0, 0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.0, 0.6, 1.4), hue=(-0.1, -0.5, 0.03, 0.1, 0.5),
    ).items() for amount in amounts]
    orders = [[(name, 1.4 if name != "hue" else 0.1) for name in order]
              for order in itertools.permutations(CHANGES[:4])]
    views = [*alone, *orders, [], [("hue", 0.05), ("saturation", 0.0)], [("contrast", 1.2), ("blur", 0.8)]]
    got = data.change_colors(pixels.expand(len(views), -1, -1, -1), steps_of(*views))
    assert got.dtype == torch.uint8
    for image, view in zip(got, views):
        off = (image - by_torchvision(functional, pixels, view))[:, 4:-4, 4:-4].abs()
        assert off.max() < 0.6, view                                # half a level, of rounding
    gray = functional.rgb_to_grayscale(pixels.float(), 3)
    assert (data.change_colors(pixels[None], steps_of([("saturation", 0.0)]))[0] - gray).abs().max() < 0.6


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0, 2.0])
def test_blur_is_torchvisions_inside_and_keeps_what_is_flat_to_the_border(sigma):
    functional = pytest.importorskip("torchvision.transforms.functional", reason="parity with torchvision needs it")
    pixels = data.to_tensor(picture(48, 48))
    blurred = data.change_colors(torch.stack([pixels, torch.full_like(pixels, 200)]),
                                 steps_of([("blur", sigma)], [("blur", sigma)]))
    off = (blurred[0] - by_torchvision(functional, pixels, [("blur", sigma)]))[:, 8:-8, 8:-8].abs()
    assert off.max() < 0.6 and (blurred[1] == 200).all()


def test_colors_change_image_by_image_whatever_the_batch():
    """Also black, white, gray, one pixel that is red: nothing divides by zero."""
    flat = torch.tensor([0, 255, 77], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 16, 16)
    red = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    red[0, 0, 0, 0] = 255
    images = torch.cat([flat, red, torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8)])
    transform = data.ViewTransform(16, (1.0, 1.0))
    steps = torch.stack([transform(picture(16, 16), np.random.default_rng(i), "x")["x_steps"] for i in range(16)])
    before, whole = images.clone(), data.change_colors(images, steps)
    assert torch.equal(images, before)
    for i in range(16):
        assert torch.equal(data.change_colors(images[i:i + 1], steps[i:i + 1])[0], whole[i])
    turned = data.change_colors(images[:4], steps_of(*[[("hue", 1 / 3)]] * 4))
    assert torch.equal(turned[:3], flat) and turned[3, :, 0, 0].tolist() == [0, 255, 0]


def test_a_view_is_a_mirrored_crop_and_steps_as_often_as_they_say():
    image, transform, n = picture(60, 45), data.ViewTransform(32, (0.08, 1.0)), 3000
    views = [transform(image, np.random.default_rng(i), "view1") for i in range(n)]
    same, plain = transform(image, np.random.default_rng(7), "x"), TrainTransform(32, (0.08, 1.0), flip=True)
    assert all(torch.equal(same[f"x{key}"], views[7][f"view1{key}"]) for key in ("", "_steps"))
    assert all(torch.equal(view["view1"], plain(image, np.random.default_rng(i))) for i, view in enumerate(views[:9]))
    kinds, amounts = torch.stack([view["view1_steps"] for view in views]).unbind(dim=-1)            # (n, 6) each
    jittered, gray, blurred = kinds[:, 0] >= 0, kinds[:, 4] >= 0, kinds[:, 5] >= 0
    for share, want in ((jittered, 0.8), (gray, 0.2), (blurred, 0.5), (jittered & gray & blurred, 0.08)):
        assert share.float().mean().item() == pytest.approx(want, abs=0.03)
    orders = [tuple(row) for row in kinds[jittered, :4].tolist()]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert sum(counts) == len(orders) and min(counts) > 60 and max(counts) < 140                    # 100 expected
    for kind, low, high in ((0, 0.6, 1.4), (1, 0.6, 1.4), (2, 0.6, 1.4), (3, -0.1, 0.1)):
        drawn = amounts[:, :4][kinds[:, :4] == kind].sort().values
        even = low + (torch.arange(len(drawn)) + 0.5) / len(drawn) * (high - low)
        assert low <= drawn[0] and drawn[-1] <= high and (drawn - even).abs().max() < 0.05 * (high - low)
    assert set(kinds[:, 4].tolist()) == {-1, 2} and (amounts[gray, 4] == 0).all()
    sigma = amounts[blurred, 5] * 224 / 32
    assert set(kinds[:, 5].tolist()) == {-1, 4} and 0.1 <= sigma.min() < 0.12 and 1.98 < sigma.max() <= 2.0001
    assert sigma.mean().item() == pytest.approx(1.05, abs=0.05)


def test_normalize():
    images = torch.randint(0, 256, (4, 3, 5, 7), dtype=torch.uint8)
    before = images.clone()
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (data.MEAN, data.STD))
    got = data.normalize(images)
    assert got.dtype == torch.float32 and torch.equal(images, before)
    torch.testing.assert_close(got.double(), (images.double() / 255 - mean) / std, atol=1e-6, rtol=0)
