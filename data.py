"""Pixels and words in: from files on disk, or from a drawn world, to batches of tensors.

    TrainTransform ...      images to uint8 tensors (3, size, size)
    BytePairTokenizer       captions to ids: CLIP's own vocabulary, or one learned from the captions
    ShapesWorld             scenes that are drawn from (seed, split, index): what every script uses with no options
    train_loader            batches that depend on (seed, step) only, whatever the number of processes and workers
    open_data(SPEC)         one of the data sets in the table FORMATS:

    shapes                  the Shapes world; shapes:train=20000,size=64 with options
    shards:A-{000..999}.tar tar files of images and captions: KEY.jpg with KEY.txt, or KEY.json that has "caption"
    csv:FILE                a table with a file and a caption in each line; lines of one file are one image
    folder:DIR              a folder of images for each class
    coco:DIR  flickr30k:DIR captions, Karpathy's splits, and for detection COCO's objects
    ade20k:DIR  pascal-context:DIR  coco-stuff:DIR  voc:DIR         a class for each pixel
    icinw:DIR               the 20 data sets of "Image Classification in the Wild"

    python data.py preview --data SPEC --out grid.png       a contact sheet of samples with captions
    python data.py check --data SPEC                        reads everything; counts and names bad records
    python data.py bpe --data SPEC --vocab-size N TEXT      learns merges, shows how TEXT is cut
"""
import argparse
import ast
import bisect
import contextlib
import csv
import functools
import gc
import gzip
import hashlib
import html
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import tarfile
import textwrap
import threading
import time
import traceback
import warnings
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from os.path import isdir, isfile, islink
from pathlib import Path
from typing import NamedTuple

import ftfy
import numpy as np
import PIL
import regex
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# Errors, and what is said on the terminal
# ---------------------------------------------------------------------------------------------------------------------

class UserError(Exception):
    """A mistake the user can mend, in one line: what was got, what was wanted, what to do.  Exit status 2."""


class BadRecord(Exception):
    """A record that cannot be used, as "reason" or "reason: particulars".  It is skipped, counted and named."""


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:200]


@contextlib.contextmanager
def reading(path):
    """What goes wrong while a user's file is read becomes a UserError that names it."""
    try:
        yield
    except (OSError, ValueError, RecursionError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or one_line(error)}") from None


@contextlib.contextmanager
def refusing(what, kind=BadRecord):
    """Whatever is raised over a record's bytes, and on hostile ones that is nearly everything, becomes a BadRecord;
    over a file that the user has named, a UserError, if it is not one already."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise kind(f"{what}: {one_line(error)}") from None


def printable(text: str) -> str:
    """A text from a stranger's file on one line of a terminal: no line ends, no control characters, no half pairs."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str, file=None):
    """print at once; where the output goes to a file on a full disk, that costs the line and not the run."""
    with contextlib.suppress(OSError):
        print(text, file=file or sys.stdout, flush=True)


def write_json(path, content):
    """What a script has found, as one JSON object, where --json names a file for it"""
    if path:
        Path(path).write_text(json.dumps(content, indent=1) + "\n")


def say_notes(data):
    """What a data set tells of what was left out and why, a line each."""
    for note in data.notes:
        say(printable(f"note: {note}"))


def progress(items: Iterable, total: int, what: str, speaks: bool = True) -> Iterator:
    """The items as they come, with a line on standard error where five seconds have passed since the last one."""
    started = spoke = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if speaks and now - spoke >= 5:
            left = (now - started) / max(done, 1) * (total - done)
            say(f"{what}: {done:,} of {total:,}, {left:,.0f} s left", sys.stderr)
            spoke = now
        yield item


def run(main: Callable):
    """Runs the main() of a script and ends the process with its exit status.

    0 when all is well; 2 for a user's mistake, told in one line; 130 when interrupted; 141 if nobody reads what is
    printed; 1 after any other exception, with its traceback.  An end that all processes meet closes the process group.
    After any other this process leaves at once: closing would wait for processes that are stuck in a collective, with
    NCCL for minutes.
    """
    with contextlib.suppress(AttributeError):               # a notebook's output takes anything
        sys.stdout.reconfigure(errors="backslashreplace")   # names from files may hold what a terminal cannot show
    status, met_alike = 0, True
    try:
        main()
    except SystemExit as stop:
        status = stop.code
    except UserError as error:
        say(f"error: {printable(str(error))}", sys.stderr)
        status = 2
    except BrokenPipeError:                                 # train.py --plan | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status, met_alike = 141, False
    except KeyboardInterrupt:
        say("interrupted", sys.stderr)
        status, met_alike = 130, False
    except Exception:
        traceback.print_exc()
        status, met_alike = 1, False
    if dist.is_initialized() and not met_alike:
        sys.stdout.flush()
        os._exit(status)
    gc.collect()            # a DistributedDataParallel that is freed after its group waits for gloo's threads, for ever
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# Image transforms: from the bytes of a file to a uint8 tensor (3, size, size)
#
#   open_image   reads the header and refuses what is no image, or too large to decode
#   decode       pixels, upright, in RGB, transparent parts on white
#   crop_box     where to crop at random; resize_crop: bicubic, torchvision's pixels to within one level
#   center_box   where to crop for evaluation
#   normalize    uint8 -> float32, on the device that holds the batch
#   ViewTransform, change_colors, edit_caption    what SLIP and DeCLIP make of a pair besides
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Sample:
    image: Image.Image                  # any mode; perhaps only its header is read so far, see `decode`
    captions: tuple[str, ...] = ()
    label: int = -1                         # class index, -1 unknown
    text_label: int = -1                    # class that the captions name, over all data sets: see name_classes
    label_map: np.ndarray | None = None     # (H, W) uint8 class of each pixel, 255 ignored
    objects: list[dict] | None = None       # {"box": [x1, y1, x2, y2], "category", "mask" for dense.read_mask, "crowd"}


def pick_caption(sample: Sample, rng: np.random.Generator) -> str:
    """One of the captions at random, as training sees an image that has several."""
    if not sample.captions:
        raise BadRecord("no caption")
    return sample.captions[rng.integers(len(sample.captions))]


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # of ImageNet's red, green and blue, in 0..1
Image.init()                 # no other formats: reading EPS would start a program.  Some builds of Pillow lack AVIF
IMAGE_FORMATS = [name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF") if name in Image.OPEN]
EXTENSIONS = {extension[1:] for extension, name in Image.registered_extensions().items() if name in IMAGE_FORMATS}
MAX_PIXELS = 100_000_000     # a file of a few kilobytes can claim gigabytes of pixels
MAX_SCANS = 100              # of a progressive JPEG, which has about ten: thousands in a small file decode for hours
SCAN = re.compile(rb"\xff\xda\0[\x06-\x0e][\0-\4]")       # how a scan begins: its length, how many components it has
MIN_SIDE = 2                 # a side of one pixel is a web page's spacer or counter, not a picture
BICUBIC = Image.Resampling.BICUBIC

if int(PIL.__version__.split(".")[0]) < 11:              # 10.0 would find every image corrupt, 10.4 turn no TIFF
    raise ImportError(f"Pillow {PIL.__version__} is too old, 11 is wanted: pip install -r requirements.txt")
Image.MAX_IMAGE_PIXELS = None                            # open_image has a limit of its own
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26                  # bytes of a text or color profile: sound ones exceed 1 MB
warnings.filterwarnings("ignore", module=r"PIL\.")       # Pillow's remarks on odd files; bad ones we report ourselves


def open_image(content: bytes) -> Image.Image:
    """The image in a file's bytes, not decoded yet.  BadRecord: no image, or sides we do not accept."""
    try:
        image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    except PIL.UnidentifiedImageError:
        raise BadRecord(f"not an image: {len(content)} bytes, none of {', '.join(IMAGE_FORMATS)}") from None
    except Exception as error:               # Pillow's readers raise nearly everything on hostile bytes
        raise BadRecord(f"corrupt image: {one_line(error)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadRecord(f"image too large: {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    if min(image.size) < MIN_SIDE:
        raise BadRecord(f"image too small: {image.width} x {image.height} pixels")
    if isinstance(image, JpegImageFile) and len(SCAN.findall(content)) > MAX_SCANS:     # whatever it calls itself
        raise BadRecord(f"corrupt image: more than {MAX_SCANS} scans, each of which would be decoded")
    return image


FLIP = Image.Transpose
TURNS = dict(enumerate((FLIP.FLIP_LEFT_RIGHT, FLIP.ROTATE_180, FLIP.FLIP_TOP_BOTTOM, FLIP.TRANSPOSE, FLIP.ROTATE_270,
                        FLIP.TRANSVERSE, FLIP.ROTATE_90), start=2))      # EXIF orientation -> what makes it upright


def orientation(image):
    """EXIF orientation, 1 (upright) if there is none or it cannot be read; Pillow itself turns a TIFF."""
    exif = Image.Exif()                  # not image.getexif(), which may decode, and hide that this failed
    try:
        exif.load(image.info.get("exif", b""))
        return exif.get(0x0112, 1)
    except Exception:                        # of a broken EXIF block, which need not mean a broken image
        return 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) after `decode`."""
    return image.size[::-1] if orientation(image) in (5, 6, 7, 8) else image.size


def decode(image: Image.Image) -> Image.Image:
    """Any image -> RGB, upright, its first frame, transparent parts on white.  BadRecord if the file is damaged."""
    with refusing("corrupt image"):
        image.load()
        if (turn := orientation(image)) in TURNS:        # not ImageOps.exif_transpose, which wants all of EXIF sound
            image = image.transpose(TURNS[turn])
            del image.info["exif"]                       # it is turned once
        return to_rgb(image)


def to_rgb(image):
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose black and white are not known")
    if image.mode.startswith("I"):           # 16-bit gray: the upper byte, as Pillow does for 16-bit color
        upper = np.asarray(image).clip(0, 65535) >> 8
        image = Image.fromarray(upper.astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")      # convert copies even when there is nothing to do


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def crop_box(width: int, height: int, scale: tuple, ratio: tuple, rng: np.random.Generator, single_shot: bool = False):
    """(left, top, width, height) of a random crop, by torchvision's rule: an area of `scale` times the image's, with
    width / height log-uniform in `ratio`; the largest central crop in `ratio` if ten draws do not fit.

    single_shot: MAE's rule for linear probing, of BYOL and TensorFlow: one draw, cut to fit the image.
    """
    for _ in range(1 if single_shot else 10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*map(math.log, ratio)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if single_shot:
            w, h = min(w, width), min(h, height)
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, w, h
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def resize_crop(image: Image.Image, box: tuple[int, int, int, int], size: int) -> Tensor:
    """The part (left, top, right, bottom) of an RGB image as uint8 tensor (3, size, size), bicubic with antialiasing.

    Cropped first and then resized, as torchvision does: Image.resize(box=) would mix in pixels from outside the box.
    torch takes a quarter of Pillow's time where the processor has AVX, elsewhere 1.4 times.
    """
    pixels = torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1)[None]         # (1, 3, h, w)
    return F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)[0].contiguous()


def center_box(width, height, size, resize):
    """(left, top, right, bottom), in the image's pixels, of the central size x size once the short side is `resize`.

    Resizing this part alone gives the pixels of torchvision's Resize and CenterCrop up to rounding (Pillow may do rows
    before columns then), and an image of 10000 x 2 pixels does no harm.
    """
    short = min(width, height)
    wide, high = int(resize * width / short), int(resize * height / short)      # sides after Resize, which truncates
    left, top = round((wide - size) / 2), round((high - size) / 2)
    x, y = width / wide, height / high
    return left * x, top * y, min((left + size) * x, width), min((top + size) * y, height)


@dataclass
class TrainTransform:
    """A random part of an image, by `crop_box`, as uint8 tensor (3, size, size); with `flip` half of them mirrored.

    Scale 0.5 to 1 and no flip are SLIP's, where the paper is silent.
    """
    size: int
    scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = False
    single_shot: bool = False

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        image = decode(image)
        left, top, w, h = crop_box(*image.size, self.scale, (3 / 4, 4 / 3), rng, self.single_shot)
        pixels = resize_crop(image, (left, top, left + w, top + h), self.size)
        return pixels.flip(-1) if self.flip and rng.random() < 0.5 else pixels


@dataclass
class EvalTransform:
    """The center of an image as uint8 tensor (3, size, size): its short side is made `resize` (default: size) first.

    squash: all of the image instead, whatever its shape; `resize` has no meaning then.
    """
    size: int
    resize: int | None = None
    squash: bool = False

    def __post_init__(self):
        self.resize = self.resize or self.size
        if self.resize < self.size and not self.squash:
            raise UserError(f"cannot cut {self.size} x {self.size} pixels from a short side of {self.resize}: "
                            f"resize to at least {self.size}")

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
        image = decode(image)
        box = None if self.squash else center_box(*image.size, self.size, self.resize)
        return to_tensor(image.resize((self.size, self.size), BICUBIC, box))


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32, mean 0 and deviation 1 per channel over ImageNet, on the device of the images."""
    images = images.float()
    for channel, (mean, std) in enumerate(zip(MEAN, STD)):      # numbers: a tensor would be copied to the device
        images[:, channel].sub_(255 * mean).div_(255 * std)
    return images


# ---- the compared systems: SLIP's and DeCLIP's views of an image, DeCLIP's second caption ---------------------------
#
# The loader crops and mirrors a view, and draws the steps that change it further.  The device that trains takes these
# for a batch at once: x (n, 3, H, W) in 0..255, amount (n, 1, 1, 1) -> (n, 3, H, W).

def gray(x: Tensor) -> Tensor:
    """(n, 3, H, W) -> (n, 1, H, W): how bright an eye finds it"""
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Every hue moved along the color circle by a share of it; the largest and smallest of a pixel's channels stay.

    The circle is 6 long: red is at 0, green at 2, blue at 4.  A channel has the largest value where the hue is within 1
    of its place, the smallest from 2 on.
    """
    largest, which = x.max(dim=1, keepdim=True)                                                 # (n, 1, H, W)
    chroma = largest - x.amin(dim=1, keepdim=True)
    lead = (x.roll(-1, 1) - x.roll(1, 1)).gather(1, which)      # of the channel after the largest over the one before
    hue = 2 * which + lead / chroma.clamp(min=1e-3) + 6 * turns
    place = torch.arange(0, 6, 2, device=x.device).view(3, 1, 1)
    way = ((hue - place + 3) % 6 - 3).abs()                     # the shorter way round, (n, 3, H, W)
    return largest - chroma * (way - 1).clamp(0, 1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Square images, weighted along each side by a Gaussian that ends with the image."""
    place = torch.arange(x.shape[-1], device=x.device)
    weights = torch.softmax(-(place - place[:, None]) ** 2 / (2 * sigma ** 2), dim=-1)          # (n, 1, H, H)
    return weights @ x @ weights.mT


CHANGES = [                                         # by torchvision's definitions
    lambda x, factor: x * factor,                                                               # 0 brightness
    lambda x, factor: torch.lerp(gray(x).mean(dim=(1, 2, 3), keepdim=True), x, factor),         # 1 contrast
    lambda x, factor: torch.lerp(gray(x), x, factor),                                           # 2 saturation
    shift_hue,                                                                                  # 3
    blur,                                                                                       # 4
]


@dataclass
class ViewTransform:
    """An RGB image much changed, the same thing still: MoCo v2's and SLIP's views.

    NAME         its crop, half of them mirrored, as uint8 tensor (3, size, size)
    NAME_steps   (6, 2): what `change_colors` shall make of it.  Each step is a place in CHANGES, or -1, and an amount:
                 of 80% the colors jittered, in random order; 20% gray; half blurred, by 0.1 to 2 pixels of 224
    """
    size: int
    scale: tuple[float, float]

    def __call__(self, image: Image.Image, rng: np.random.Generator, name: str) -> dict[str, Tensor]:
        pixels = TrainTransform(self.size, self.scale, flip=True)(image, rng)
        factors = [*rng.uniform(0.6, 1.4, 3), rng.uniform(-0.1, 0.1)]
        jitter = [(kind, factors[kind]) for kind in rng.permutation(4)]
        blurred = 4, rng.uniform(0.1, 2.0) * self.size / 224
        steps = torch.tensor([*jitter, (2, 0.0), blurred], dtype=torch.float32)                 # (6, 2)
        is_taken = np.repeat(rng.random(3) < (0.8, 0.2, 0.5), (4, 1, 1))
        steps[~is_taken] = -1
        return {name: pixels, f"{name}_steps": steps}


def change_colors(images: Tensor, steps: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) on any device, steps (B, 6, 2) on the CPU -> uint8: each image after its own steps in turn.

    Images whose next step is the same take it together; the CPU knows which, so a GPU is not waited for.
    """
    x = images.float()
    for step, (kind, change) in itertools.product(steps.unbind(dim=1), enumerate(CHANGES)):
        rows = (step[:, 0] == kind).nonzero().squeeze(1)                                        # (n,)
        amount = step[rows, 1].view(-1, 1, 1, 1).to(x.device, non_blocking=True)
        rows = rows.to(x.device, non_blocking=True)
        x[rows] = change(x[rows], amount).clamp(0, 255)
    return x.round().byte()


def edit_caption(caption: str, rng: np.random.Generator, synonyms: dict[str, list[str]]) -> str:
    """DeCLIP's second caption, an edit of EDA (Wei and Zou 2019): a word becomes a synonym, two change places, or each
    is left out with probability 0.1.

    # DeCLIP: synonyms of WordNet; here: of a file that the user gives, and none without, so that nothing is downloaded
    """
    words = caption.split()
    known = [i for i, word in enumerate(words) if word.lower() in synonyms]
    kind = rng.integers(3 if known else 2)
    if kind == 0:
        words = [word for word in words if rng.random() >= 0.1] or words
    elif kind == 1:
        i, j = rng.integers(len(words), size=2)
        words[i], words[j] = words[j], words[i]
    else:
        i = rng.choice(known)
        words[i] = str(rng.choice(synonyms[words[i].lower()]))
    return " ".join(words)


def read_synonyms(path: str) -> dict[str, list[str]]:
    """A file of lines such as "small, little, tiny" -> what each word may become; an empty path has no synonyms."""
    synonyms = defaultdict(list)
    for line in read_lines(path, "groups of synonyms") if path else ():
        group = list(filter(None, map(str.strip, line.split(","))))
        if len(group) < 2:
            raise UserError(f"{path}: wanted two words or more in a line, divided by commas, got {line[:60]!r}")
        for word in group:
            synonyms[word.lower()] += [other for other in group if other != word]
    return dict(synonyms)


# ---------------------------------------------------------------------------------------------------------------------
# Byte-pair tokenizer: CLIP's, id for id (open_clip's SimpleTokenizer with clean="lower")
#
#   caption    A  Dog&#39;s café!
#   clean      a dog's café!                          garbled text and HTML repaired, spaces collapsed, lower case
#   WORD       a | dog | 's | café | !
#   bytes      a</w> | d o g</w> | ' s</w> | c a f Ã ©</w> | !</w>      UTF-8, a printable character a byte, end marked
#   merges     a</w> | dog</w> | 's</w> | cafÃ©</w> | !</w>            neighbors joined, in the order learned
#
# Ids of every vocabulary: 256 bytes, 256 bytes at the end of a word, one symbol a merge, start token, end token.  A toy
# corpus uses few of the 512, but with all of them there is one layout, and no caption holds an unknown symbol.
# ---------------------------------------------------------------------------------------------------------------------

START, END, WORD_END = "<start_of_text>", "<end_of_text>", "</w>"
WORD = regex.compile(rf"{START}|{END}|'(?:s|t|re|ve|m|ll|d)|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE)
PLAIN = re.compile("[\t\n\f\r -%'-~‘’“”–—…]*")    # ASCII but "&" and control characters; typographer's punctuation
STRAIGHT = str.maketrans("‘’“”", "''\"\"")

# A byte that prints in Latin-1 is written as itself, the others as the characters from U+0100 on; ids keep that order.
PRINTS = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = PRINTS + sorted({*range(0x100)} - {*PRINTS})                           # id -> byte
ALPHABET = [chr(byte) for byte in PRINTS] + [chr(0x100 + i) for i in range(256 - len(PRINTS))]    # id -> character
ID_OF_BYTE = {byte: i for i, byte in enumerate(BYTES)}
BYTE_OF_CHAR = dict(zip(ALPHABET, BYTES))

CLIP_MERGES = 49152 - 256 - 2    # CLIP uses this many of the merges in its file

# Characters read of a caption, because the time of ftfy, and of joining the bytes of one word, grows with the square of
# the length of some hostile texts.  A symbol of CLIP's has at most 32, so these hold 77 tokens even of the longest
# words, unless most of them are white space or for ftfy to remove.
LONGEST = 2_500
CACHED_CHUNKS, CACHED_LENGTH = 1 << 17, 32    # bounds of the cache: entries, characters of an entry


def clean(text: str) -> str:
    """Repairs garbled text and HTML entities, collapses white space, lower-cases.

    PLAIN text skips ftfy, which would do no more than straighten its quotes: its other fixes need an "&" (HTML), a
    control character (terminal escapes), or letters beyond ASCII (wrong encodings, ligatures, widths), beside which
    alone the quotes and dashes of PLAIN look wrongly encoded.  Line ends stay white space.
    """
    if not PLAIN.fullmatch(text):
        text = unescape(unescape(ftfy.fix_text(text)))
    elif not text.isascii():
        text = text.translate(STRAIGHT)
    return " ".join(text.split()).lower()


def unescape(text):
    try:
        return html.unescape(text)
    except ValueError:            # "&#111...1;" with more digits than int() takes; open_clip fails here
        return text


def bytes_of(word):
    """Ids of a word's bytes, the last one marked as the end."""
    ids = [ID_OF_BYTE[byte] for byte in word.encode()]
    ids[-1] += len(BYTES)
    return ids


def join(ids, pair, new):
    """Puts `new` for each occurrence of the pair, from the left."""
    out = []
    for i in ids:
        if out and (out[-1], i) == pair:
            out[-1] = new
        else:
            out.append(i)
    return out


class BytePairTokenizer:
    """Captions to token ids and back.  Make one with from_file, train or from_state.

    merges          [(left, right), ...] symbols, in the order learned; merge i makes the symbol with id 512 + i
    vocab_size      512 + len(merges) + 2
    sot, eot, pad   ids of start and end token, the two highest, and of padding: 0, as in CLIP, which is "!" too
    """
    pad = 0

    def __init__(self, merges: list[tuple[str, str]]):
        self.merges, self.symbols = merges, ALPHABET + [char + WORD_END for char in ALPHABET]
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.pairs = {}                                  # (id of left, id of right) -> id of the two joined
        for number, merge in enumerate(merges, 1):
            pair, symbol = tuple(map(self.ids.get, merge)), "".join(merge)
            if len(pair) != 2 or None in pair or symbol in self.ids:
                raise UserError(f"merge {number} is {' '.join(merge)[:40]!r}, want two symbols known by then that make "
                                "a new one: is this a list of BPE merges?")
            self.pairs[pair] = self.ids[symbol] = len(self.symbols)
            self.symbols.append(symbol)
        self.sot, self.eot, self.vocab_size = len(self.symbols), len(self.symbols) + 1, len(self.symbols) + 2
        self.symbols += [START, END]
        self.ids |= {START: self.sot, END: self.eot}
        self.cache = {}                                  # what stands between two spaces -> its ids

    @classmethod
    def from_file(cls, path: str | Path) -> "BytePairTokenizer":
        """CLIP's vocabulary from its `bpe_simple_vocab_16e6.txt.gz`, packed or not: a header, then a merge a line."""
        try:
            with open_text(path) as file:
                lines = file.read().split("\n", CLIP_MERGES + 1)[1 : CLIP_MERGES + 1]
            if len(lines) < CLIP_MERGES:
                raise UserError(f"{len(lines)} lines after the header where {CLIP_MERGES} merges should be")
            return cls([tuple(line.split()) for line in lines])
        except (OSError, EOFError, ValueError, zlib.error, UserError) as error:
            raise UserError(f"{path}: want CLIP's bpe_simple_vocab_16e6.txt.gz, got {error}") from None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BytePairTokenizer":
        """Learns merges: time and again the most frequent pair of neighbors becomes a symbol, of equally frequent ones
        that with the lowest ids.  Stops at `vocab_size` symbols, or sooner, when no pair occurs twice."""
        if vocab_size < 514:
            raise UserError(f"vocab_size {vocab_size}: want 514 (all bytes, start and end token) or more")
        counts = Counter()
        for text in texts:
            counts.update(WORD.findall(clean(text[:LONGEST])))
        words = [(bytes_of(word), n) for word, n in counts.items() if word not in (START, END)]
        symbols, merges = cls([]).symbols[:-2], []
        frequency, words_of = Counter(), defaultdict(set)        # of a pair: in the captions; places in `words`

        def count(k, sign):
            ids, n = words[k]
            for pair in zip(ids, ids[1:]):
                frequency[pair] += sign * n
                words_of[pair].add(k)
        for k in range(len(words)):
            count(k, 1)
        while len(symbols) + 2 < vocab_size:
            most = max(frequency.values(), default=0)
            if most < 2:
                break
            best = min(pair for pair, n in frequency.items() if n == most)
            for k in words_of.pop(best):
                ids, n = words[k]
                count(k, -1)
                words[k] = join(ids, best, len(symbols)), n
                count(k, 1)
            merges.append((symbols[best[0]], symbols[best[1]]))
            symbols.append("".join(merges[-1]))
        return cls(merges)

    def state(self) -> dict[str, str]:
        """What a checkpoint stores: the merges, as in CLIP's file."""
        return {"merges": "\n".join(f"{left} {right}" for left, right in self.merges)}

    @classmethod
    def from_state(cls, state: dict[str, str]) -> "BytePairTokenizer":
        return cls([tuple(line.split()) for line in state["merges"].splitlines()])

    def encode(self, text: str) -> list[int]:
        """Ids of a text of any length, without start and end token."""
        ids = []
        for chunk in clean(text).split():
            ids += self.cache.get(chunk) or self.encode_chunk(chunk)
        return ids

    def encode_chunk(self, chunk):
        ids = []
        for word in WORD.findall(chunk):
            symbol = word if word in (START, END) else word + WORD_END
            if word.isascii() and symbol in self.ids:    # a symbol is what its own bytes merge into
                ids.append(self.ids[symbol])
            else:
                ids += self.merge(bytes_of(word))
        if len(chunk) <= CACHED_LENGTH and len(self.cache) < CACHED_CHUNKS:
            self.cache[chunk] = ids
        return ids

    def merge(self, ids):
        """Joins neighbors, always the pair learned first and all its occurrences from the left, until none is known."""
        while True:
            known = [(self.pairs[pair], pair) for pair in zip(ids, ids[1:]) if pair in self.pairs]
            if not known:
                return ids
            new, pair = min(known)
            ids = join(ids, pair, new)

    def decode(self, ids: Iterable[int]) -> str:
        """Text with a space after each word; start and end token are spelled out, an incomplete character is U+FFFD."""
        chars = "".join(self.symbols[i] for i in ids)
        return bytes(BYTE_OF_CHAR[char] for char in chars).decode(errors="replace").replace(WORD_END, " ")

    def length(self, text: str) -> int:
        """Tokens of a caption with start and end; a context_length below this cuts it."""
        return len(self.encode(text[:LONGEST])) + 2

    def __call__(self, texts: str | list[str], context_length: int = 77) -> Tensor:
        """B captions -> (B, context_length) int64: start token, caption, end token, padding.

        What is too long loses words, never the end token.  Only the first LONGEST characters of a caption are read.
        """
        if context_length < 2:
            raise UserError(f"context_length {context_length}: want 2 (start and end token) or more")
        texts = [texts] if isinstance(texts, str) else texts
        tokens = np.full((len(texts), context_length), self.pad, dtype=np.int64)
        for own_tokens, text in zip(tokens, texts):
            ids = [self.sot, *self.encode(text[:LONGEST])[: context_length - 2], self.eot]
            own_tokens[: len(ids)] = ids
        return torch.from_numpy(tokens)


def trim(tokens: Tensor, eot: int, multiple: int = 1) -> Tensor:
    """(B, L) -> (B, l): drops the padding that no caption of the batch needs, to save the text tower's time.

    l is where the longest caption ends, end token included, rounded up to a multiple, and at most L.
    """
    used = (tokens == eot).any(dim=0).nonzero()                # (columns with an end token, 1)
    longest = int(used[-1]) + 1 if len(used) else tokens.shape[1]
    return tokens[:, : -(-longest // multiple) * multiple]     # (B, l)


# ---------------------------------------------------------------------------------------------------------------------
# The Shapes world: scenes that follow from (seed, split, index), with captions, classes, masks and boxes
#
# The same bits everywhere.  Choices come from Python's generator, cheap to seed with text, which does not use hash().
# Images use + - * / sqrt and rounded sines only: numpy's other functions differ in the last bit between processors.
# Places and lengths are fractions of the image side; y points down.
# ---------------------------------------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
COLORS = {"red": (214, 36, 40), "orange": (238, 132, 24), "yellow": (238, 224, 50), "green": (42, 160, 62),
          "blue": (38, 76, 214), "purple": (142, 44, 176), "white": (237, 237, 237), "black": (18, 18, 18)}
KINDS = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
TEXTURES = ("plain", "striped", "checkered", "dotted", "cloudy")
OPENINGS = ("", "", "", "", "a photo of ", "a picture of ", "an image of ", "a drawing of ", "there {} ")
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
LONE_SIZE = (0.45, 0.8)     # smallest and largest size of a lone object; n are n ** -0.4 times as large, or less to fit
LONE_SHARE = 0.7            # of the scenes have one object, where one to several are allowed
PATTERNS = {"checks": ("checkered", 0), "dots": ("dotted", 0), "upright stripes": ("striped", 0),        # and angle
            "level stripes": ("striped", 90), "rising stripes": ("striped", 45), "falling stripes": ("striped", 135)}
PATTERN_PERIOD = 0.09
QUARTERS = ["first quarter", "second quarter", "third quarter", "last quarter"]              # of a range of numbers
CLASSES = dict(kind=KINDS, shape=SHAPES, pattern=PATTERNS, texture=TEXTURES, tilt=QUARTERS, fineness=QUARTERS)
SHAPES_OPTIONS = dict(train=int, val=int, size=int, seed=int, unsaid=float, mismatched=float, patterns=float,
                      by=lambda key: CLASSES[key] and key)                                   # else a KeyError
MAX_NOISE = 8        # colors keep this far from 0 and 255, so that noise is never clipped


@dataclass
class Thing:
    """One object.  `size` is two radii; upright shapes have angle 0, which grows clockwise, in degrees."""
    shape: str
    color: str
    cx: float
    cy: float
    size: float
    angle: float
    rgb: tuple[float, ...]
    pattern: str = ""
    phases: tuple = ()                                           # of the pattern, as a texture's

    @property
    def kind(self):
        return f"{self.color} {self.shape}"

    @property
    def tilt(self):
        return QUARTERS[int(self.angle + 20) // 10]


@dataclass
class Scene:
    """All that a picture of any size is drawn from.  Later objects cover earlier ones."""
    objects: list[Thing]
    texture: str
    tones: list[tuple[float, ...]]     # the two RGB colors of the texture
    period: float                      # of the texture, like its angle (degrees) and phases (periods)
    angle: float
    phases: tuple[float, float]
    noise_seed: int
    caption: str

    @property
    def fineness(self):
        return QUARTERS[int(25 * (self.period - 0.14))]


def shape_distance(shape, u, v):
    """Signed distance in radii of the points (u, v) from the edge of an upright shape, negative inside; v points down.

    Exact beside straight edges and arcs, too small near corners: enough for anti-aliasing.
    """
    def disc(cx, cy, radius):
        return np.sqrt((u - cx) ** 2 + (v - cy) ** 2) - radius
    x, y = np.abs(u), np.abs(v)                                  # the shapes are symmetric, the moon upside down only
    if shape == "circle":
        return disc(0, 0, 1)
    if shape == "ring":
        return np.abs(disc(0, 0, 0.75)) - 0.25
    if shape == "moon":                                          # a disc less another
        return np.maximum(disc(0.25, 0, 1), -disc(0.75, 0, 0.8))
    if shape == "square":
        return np.maximum(x, y) - 0.82
    if shape == "cross":
        return np.maximum(np.maximum(x, y) - 1, np.minimum(x, y) - 0.34)
    if shape == "triangle":
        return np.maximum(0.8660254 * x - 0.5 * (v - 0.1), v - 0.1) - 0.58
    if shape == "star":                                          # fold the five points onto half of one: 36 degrees
        y = -v
        for _ in range(2):
            beyond = np.maximum(0.809017 * x - 0.5877853 * y, 0)
            x, y = np.abs(x - 1.618034 * beyond), y + 1.1755705 * beyond
        return 0.8967 * x + 0.4426 * (y - 1.12)
    x, y = x - 0.46, v + 0.36                                    # heart: a lobe and the wedge that touches it
    wedge = np.maximum(np.maximum(0.8 * x + 0.6 * y - 0.5, -y), 0.6 * x - 0.8 * y)
    return np.minimum(np.sqrt(x * x + y * y) - 0.5, wedge)


def turn(degrees):
    """Cosine and sine, rounded so that all C libraries agree."""
    return round(math.cos(math.radians(degrees)), 6), round(math.sin(math.radians(degrees)), 6)


def coverage(thing, size):
    """(size, size): the share of each pixel that an object covers."""
    radius, cx, cy = thing.size / 2 * size, thing.cx * size, thing.cy * size               # pixels
    pixels = np.arange(size, dtype=np.float32)
    x = (pixels + (0.5 - cx)) / radius                                                     # pixel centers, in radii
    y = (pixels[:, None] + (0.5 - cy)) / radius
    cos, sin = turn(thing.angle)
    distance = radius * shape_distance(thing.shape, cos * x + sin * y, cos * y - sin * x)  # (size, size), pixels
    return (0.5 - distance).clip(0, 1)


def square_wave(t, step):
    """Anti-aliased 0, 1, 0, 1, ... of period 1 in t, of which a pixel spans `step`."""
    return ((np.abs(t - np.floor(t) - 0.5) - 0.25) / step + 0.5).clip(0, 1)


def texture_map(texture, angle, period, phases, size, rng):
    """(size, size) in 0..1: the share of the second tone in each pixel."""
    x = (np.arange(size, dtype=np.float32) + 0.5) / size
    y = x[:, None]
    if texture == "cloudy":                                      # a coarse random grid, smoothly enlarged
        cells = Image.frombytes("L", (7, 7), rng.randbytes(49))
        return np.asarray(cells.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    cos, sin = turn(angle)
    if texture == "plain":                                       # a faint gradient
        return 0.5 + 0.3 * (cos * (x - 0.5) + sin * (y - 0.5))
    step = 1 / (period * size)                                   # periods a pixel
    if texture == "striped":
        return square_wave((cos * x + sin * y) / period + phases[0], step)
    x, y = x / period + phases[0], y / period + phases[1]
    if texture == "checkered":
        x, y = square_wave(x, step), square_wave(y, step)
        return x + y - 2 * x * y
    x, y = x - np.floor(x) - 0.5, y - np.floor(y) - 0.5          # dotted
    return ((0.3 - np.sqrt(x * x + y * y)) / step + 0.5).clip(0, 1)


def draw_scene(scene: Scene, size: int) -> np.ndarray:
    """(size, size, 3) uint8: texture, objects in order, fine noise."""
    rng = random.Random(scene.noise_seed)
    dark, light = np.array(scene.tones, dtype=np.float32)[:, :, None, None]                # (3, 1, 1) each
    second = texture_map(scene.texture, scene.angle, scene.period, scene.phases, size, rng)
    canvas = dark + (light - dark) * second                                                # (3, size, size)
    for thing in scene.objects:
        rgb = np.array(thing.rgb, dtype=np.float32)[:, None, None]                         # (3, 1, 1)
        if thing.pattern:                                        # its second tone is nearer to gray
            second = texture_map(*PATTERNS[thing.pattern], PATTERN_PERIOD, thing.phases, size, rng)
            rgb = rgb + 0.7 * (128 - rgb) * second
        canvas += coverage(thing, size) * (rgb - canvas)
    canvas += np.frombuffer(rng.randbytes(size * size), dtype=np.int8).reshape(size, size) >> 4    # -8 .. 7
    return np.stack(canvas.astype(np.uint8), axis=-1)                                      # (size, size, 3)


def visible_masks(scene: Scene, size: int) -> list[np.ndarray]:
    """For each object (size, size) bool: the pixels that it covers by half or more, and no later object does."""
    masks = []
    for thing in scene.objects:
        covered = coverage(thing, size) >= 0.5
        masks = [earlier & ~covered for earlier in masks] + [covered]
    return masks


def size_words(thing):
    """Words that are true of an object's size; "" for a middling one."""
    if thing.size >= 0.5:
        return "big", "large"
    if thing.size <= 0.2:
        return "tiny", "small"
    return ("small",) if thing.size <= 0.36 else ("",)


def place_words(thing):
    """Phrases that are true of an object's place; none when it is near the border between two places."""
    def third(t, low, high):
        return low if t <= 0.38 else high if t >= 0.62 else "center" if 0.44 <= t <= 0.56 else ""
    across, down = third(thing.cx, "left", "right"), third(thing.cy, "top", "bottom")
    if not across or not down:
        return ()
    if across == down:
        return "in the center", "in the middle"
    if down == "center":
        return (f"on the {across}",)
    if across == "center":
        return (f"at the {down}",)
    return f"at the {down} {across}", f"in the {down} {across} corner"


def relation_words(a, b):
    """Phrases for where a is, seen from b; none unless one direction clearly outweighs the other."""
    dx, dy = a.cx - b.cx, a.cy - b.cy
    if abs(dx) >= max(0.18, 1.5 * abs(dy)):
        return ("to the left of", "left of") if dx < 0 else ("to the right of", "right of")
    if abs(dy) >= max(0.18, 1.5 * abs(dx)):
        return ("above",) if dy < 0 else ("below", "under")
    return ()


def listing(phrases):
    """a; a and b; a, b and c"""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def scene_caption(rng, things, texture, unsaid, patterns):
    """A true sentence about the scene.  Objects of one class share a phrase, "two red circles"."""
    def chance(p):
        return rng.random() < p

    def name(group):
        color, shape = group[0].color, group[0].shape
        if chance(unsaid):
            color, shape = ("", shape) if chance(0.5) else (color, "shape")
        if len(group) > 1:
            words = [COUNTS[len(group)], color, shape + ("es" if shape == "cross" else "s")]
        else:
            words = [rng.choice(size_words(group[0])) if chance(0.4) else "", color, shape]
            words = ["an" if "".join(words)[0] in "aeiou" else "a", *words]
            if group[0].pattern and chance(patterns):
                words.append(f"with {group[0].pattern}")
        return " ".join(filter(None, words))

    def placed(words, group):
        places = place_words(group[0]) if len(group) == 1 and chance(2 / len(groups)) else ()
        return f"{words} {rng.choice(places)}" if places else words

    groups = defaultdict(list)
    for thing in things:
        groups[thing.kind].append(thing)
    subject, *others = sorted(groups.values(), key=lambda group: rng.random())
    groups = [subject, *(group for group in others if not chance(unsaid))]
    names = [name(group) for group in groups]
    kind = rng.random()                                          # of sentence: relation, list, list with places
    relation = relation_words(subject[0], groups[1][0]) if [len(group) for group in groups[:2]] == [1, 1] else ()
    if kind < 0.45 and relation:
        also = all(relation_words(subject[0], thing) == relation for group in groups[2:] for thing in group)
        end = len(names) if also else 2
        text = f"{names[0]} {rng.choice(relation)} {listing(names[1:end])}"
        text += ", plus " + listing(names[end:]) if names[end:] else ""
    else:
        text = listing([placed(*pair) for pair in zip(names, groups)] if kind > 0.55 else names)
    text = rng.choice(OPENINGS).format("is" if len(subject) == 1 else "are") + text
    return text + rng.choice((" on a {} background", ", {} background")).format(texture) if chance(0.25) else text


def lay_out(rng, n, kind):
    """n objects inside the picture that hide at most about a quarter of each other, the first of `kind`."""
    things, scale = [], n ** -0.4
    while len(things) < n:
        if kind is None:                                         # now and then two alike
            kind = things[-1].kind if things and rng.random() < 0.1 else rng.choice(KINDS)
        color, shape = kind.split()
        size = rng.uniform(*LONE_SIZE) * scale
        cx, cy = rng.uniform(size / 2, 1 - size / 2), rng.uniform(size / 2, 1 - size / 2)

        def too_near(other):                                     # 0.8 of the sum of the radii; 1.1 of it for one color
            apart = (0.55 if other.color == color else 0.4) * (size + other.size)
            return (cx - other.cx) ** 2 + (cy - other.cy) ** 2 < apart * apart
        if any(map(too_near, things)):
            scale *= 0.98                                        # try elsewhere and smaller
        else:
            rgb = tuple(min(max(c + rng.uniform(-10, 10), MAX_NOISE), 255 - MAX_NOISE) for c in COLORS[color])
            things.append(Thing(shape, color, cx, cy, size, rng.uniform(-20, 20), rgb))
            kind = None
    return things


@dataclass(eq=False)
class ShapesWorld:
    """`count` scenes of colored shapes on textured backgrounds; scene i follows from (seed, split, i) alone.

    objects      fewest and most objects in a scene.  If one is allowed, LONE_SHARE of the scenes have one, and the
                 other numbers are equally likely.  With (1, 1), scene i is of class i % 64: exactly balanced
    unsaid       probability that the caption leaves out an object after the first, or an object's color or shape
    mismatched   probability that the caption is that of another scene, or a camera's name for a file
    dense        read() gives label_map and objects too
    patterns     each object has a pattern, which its phrase names with this probability; without the option it has
                 none, unless a class is a pattern
    by           what a class is, a key of CLASSES: kind (color and shape, 64), shape (8), pattern (6), or what captions
                 hardly say or never: the background's texture (5) and, in quarters of their range, an object's tilt and
                 the fineness of the texture

    A scene is held out, of any split but "train", if a hash of its layout (color and shape of its objects, their places
    and sizes in sixteenths of the side) is a multiple of 4.  So no layout is in both, whatever the seeds and options,
    while both have all classes: held out is where a thing is, how large, and beside which others.
    """
    split: str = "train"
    count: int = 20000
    size: int = 64
    seed: int = 0
    objects: tuple[int, int] = (1, 4)
    unsaid: float = 0.0
    mismatched: float = 0.0
    dense: bool = False
    patterns: float | None = None
    by: str = "kind"

    notes = ()
    reduce_zero_label = True            # label 0 of a label_map is no class

    def __post_init__(self):
        limits = dict(objects=(1, 6), count=(1, 10 ** 9), size=(16, 100_000), unsaid=(0, 1), mismatched=(0, 1),
                      patterns=(0, 1))
        for name, (least, largest) in limits.items():
            value = getattr(self, name) or 0
            values = np.ravel(value)
            if not least <= values[0] <= values[-1] <= largest:
                raise UserError(f"Shapes world: {name} is {value}, wanted numbers that rise from {least} to {largest}")
        if self.by == "pattern":
            self.patterns = self.patterns or 0
        self.classes = list(CLASSES[self.by])

    def __len__(self):
        return self.count

    def name(self, i):
        return f"shapes-{self.split}-{self.seed}-{i}"

    def scene(self, i):
        """The description of picture i, caption included."""
        rng = random.Random(f"shapes {self.seed} {self.split} {i}")
        fewest, most = self.objects
        lone = fewest == 1 and (most == 1 or rng.random() < LONE_SHARE)
        n = 1 if lone else rng.randint(max(fewest, 2), most)
        held_out = None
        while held_out != (self.split != "train"):
            things = lay_out(rng, n, KINDS[i % len(KINDS)] if most == 1 else None)
            cells = sorted((KINDS.index(t.kind), int(16 * t.cx), int(16 * t.cy), int(16 * t.size)) for t in things)
            held_out = hashlib.blake2b(bytes(sum(cells, ()))).digest()[0] % 4 == 0
        texture, gray, contrast = rng.choice(TEXTURES), rng.uniform(108, 142), rng.uniform(12, 22)
        for thing in things if self.patterns is not None else ():
            thing.pattern, thing.phases = rng.choice(list(PATTERNS)), (rng.random(), rng.random())
        tones = [tuple(tone + rng.uniform(-12, 12) for _ in range(3)) for tone in (gray - contrast, gray + contrast)]
        scene = Scene(things, texture, tones, period=rng.uniform(0.14, 0.3), angle=rng.uniform(0, 180),
                      phases=(rng.random(), rng.random()), noise_seed=rng.getrandbits(32),
                      caption=scene_caption(rng, things, texture, self.unsaid, self.patterns))
        if rng.random() < self.mismatched:
            other = scene_caption(rng, lay_out(rng, n, None), texture, self.unsaid, self.patterns)
            scene.caption = rng.choice((other, f"IMG_{rng.randrange(10000):04}.jpg"))
        return scene

    def read(self, i: int) -> Sample:
        scene = self.scene(i)
        sample = Sample(Image.fromarray(draw_scene(scene, self.size)), (scene.caption,))
        labels = [self.classes.index(getattr(scene if hasattr(scene, self.by) else thing, self.by))
                  for thing in scene.objects]
        if len(labels) == 1:
            sample.label = labels[0]
        if self.dense:
            sample.label_map, sample.objects = np.zeros((self.size, self.size), dtype=np.uint8), []
            for label, visible in zip(labels, visible_masks(scene, self.size)):
                sample.label_map[visible] = label + 1                                # 0 is the background
                ys, xs = visible.nonzero()
                if len(ys):
                    box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
                    sample.objects.append(dict(box=box, category=label, mask=visible, crowd=False))
        return sample


def shapes(text, split, task, size, **_):
    """The world as a data set, from what follows "shapes:" in a SPEC, such as "train=20000,objects=1-4", or "".

    Any split but "train" is held out; what a task asks for is the default.
    """
    options = dict(train=20000, val=1024, size=size or 64, by="shape" if task == "detection" else "kind")
    if task == "classes":
        options["objects"] = 1, 1
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        try:
            if key == "objects":
                low, high = value.split("-")
                options[key] = int(low), int(high)
            else:
                options[key] = SHAPES_OPTIONS[key](value)
        except (KeyError, ValueError):
            raise UserError(f"Shapes world: cannot read {item!r}; options look like train=20000, val=1024, size=64, "
                            f"seed=0, objects=1-4, unsaid=0.2, mismatched=0.3, patterns=0.5 (each from 0 to 1), "
                            f"by=shape (or {', '.join(CLASSES)})") from None
    counts = {name: options.pop(name) for name in ("train", "val")}
    split = "train" if split == "train" else "val"
    return ShapesWorld(split, counts[split], dense=task in ("segmentation", "detection"), **options)


# ---------------------------------------------------------------------------------------------------------------------
# Loading: from (seed, step) to a batch, the same whatever the number of processes and workers
#
# A data set has  len(),  name(i): a stable id,  read(i): a Sample, or BadRecord,  classes: list of names or None,  and
# notes: lines that tell what was left out and why.
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(eq=False)
class Records:
    """Reads, decodes and augments single records.  An item is asked for by (step, index, *spares).

    transform(sample, rng) makes a dict of arrays and strings; rng is seeded by (seed, step, index), so that an image
    is augmented alike in every process and after every resume.  A bad record is named in "bad" and a spare takes its
    place; without a spare left the item has no more than its step and its "bad" list.
    """
    data: object
    transform: Callable
    seed: int = 0

    def __getitem__(self, key):
        step, *candidates = key
        bad = []
        for index in candidates:
            try:
                rng = np.random.default_rng((self.seed, step, index))
                return dict(self.transform(self.data.read(index), rng), step=step, index=index, bad=bad)
            except BadRecord as error:
                bad.append((self.data.name(index), str(error)))
        return dict(step=step, bad=bad)


def collate(items: list[dict]) -> dict:
    """Items of Records -> one batch: tensors are stacked, numbers become a tensor, the rest lists; "bad" is joined."""
    batch = {"bad": [bad for item in items for bad in item["bad"]]}
    items = [item for item in items if "index" in item]
    for key in items[0] if items else ():
        values = [item[key] for item in items]
        if key != "bad":
            batch[key] = (torch.stack(values) if torch.is_tensor(values[0]) else
                          torch.tensor(values) if isinstance(values[0], (int, float)) else values)
    return batch


def seed_of(*numbers: int) -> int:
    """The seed that follows from several numbers, in 32 bits, as torch's generator on a CPU ignores all above."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """(n,) the order in which an epoch visits the records."""
    return np.random.default_rng((seed, epoch, n)).permutation(n)


def group(order: np.ndarray, groups: np.ndarray, batch_size: int, seed: tuple) -> np.ndarray:
    """The same records, so that all but the last of the batches cut from them hold records of one group (n,) each."""
    parts = [order[groups[order] == one] for one in np.unique(groups)]
    whole, rest = zip(*(np.split(part, [len(part) // batch_size * batch_size]) for part in parts))
    batches = np.concatenate(whole).reshape(-1, batch_size)
    return np.concatenate([np.random.default_rng(seed).permutation(batches).ravel(), *rest])


def train_batches(n: int, batch_size: int, seed: int, steps: range, rank: int, world: int,
                  groups: np.ndarray | None = None) -> Iterator[list[tuple]]:
    """For each step the keys of this process's share of the global batch; of records of one of the groups (n,), if any.

    An epoch is a permutation cut into n // batch_size global batches; process r takes the r-th slice of each, so every
    process has the same number of steps and no record comes twice in an epoch.  What comes half an epoch later stands
    in for a bad record, so a record may come again, in another batch.
    """
    per_epoch, share, stand_ins = n // batch_size, batch_size // world, np.r_[0, n // 2:n // 2 + 20]
    for epoch, steps_of_epoch in itertools.groupby(steps, lambda step: step // per_epoch):
        order = epoch_order(n, seed, epoch)
        if groups is not None:
            order = group(order, groups, batch_size, (seed, epoch))
        for step in steps_of_epoch:
            start = step % per_epoch * batch_size + rank * share
            places = np.arange(start, start + share)[:, None] + stand_ins                           # (share, 21)
            yield [(step, *indices) for indices in order.take(places, mode="wrap").tolist()]


class DataLoader(torch.utils.data.DataLoader):
    """torch's, for Records and the keys of their batches; it tells of a worker's death or want in one line."""
    def __init__(self, records, batches, workers, collate):
        super().__init__(records, batch_sampler=batches, num_workers=workers,
                         collate_fn=partial(share_tensors, collate) if workers else collate,
                         pin_memory=torch.cuda.is_available(), worker_init_fn=leave_signals_to_parent)

    def __iter__(self):
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if "shared memory" in str(error):
                raise UserError("no room in /dev/shm, through which loader processes hand over batches: enlarge it "
                                "(docker run --shm-size=8g), or give fewer --workers, or 0") from None
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(f"a loader process died ({one_line(error)}): with too little memory, lower --workers; the "
                            f"same command goes on from the last checkpoint") from None


def share_tensors(collate, items):
    """A batch in shared memory; left to itself torch puts it there in a thread, where want of room shows nowhere."""
    batch = collate(items)
    for value in batch.values() if isinstance(batch, dict) else ():
        if torch.is_tensor(value):
            value.share_memory_()
    return batch


def leave_signals_to_parent(worker):
    """SIGTERM from Slurm and Ctrl-C reach every process of a run; the loader's end when their parent says so."""
    def listen():
        while signal.sigwaitinfo(signals).si_pid != os.getppid():
            pass
        os._exit(0)
    signals = {signal.SIGTERM, signal.SIGINT}
    if hasattr(signal, "sigwaitinfo"):                          # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        threading.Thread(target=listen, daemon=True).start()


def train_loader(data, transform, batch_size: int, seed: int, steps: range, rank: int = 0, world: int = 1,
                 workers: int = 0, collate=collate):
    """An iterator over the batches of `steps`; batch_size is global, each batch holds this process's share of it."""
    batches = train_batches(len(data), batch_size, seed, steps, rank, world, getattr(data, "groups", None))
    return DataLoader(Records(data, transform, seed), batches, workers, collate)


def eval_loader(data, transform, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0, collate=collate):
    """Every record once and in order: process r reads records r, r + world, ...  Bad ones are left out and named."""
    keys = [(0, i) for i in range(rank, len(data), world)]
    batches = torch.utils.data.BatchSampler(keys, batch_size, drop_last=False)
    return DataLoader(Records(data, transform), batches, workers, collate)


# =====================================================================================================================
# Data sets on disk.  In memory are only names, captions and places in files, so that a list of 15 million records fits.
# =====================================================================================================================

MAX_FILE = 1 << 28           # bytes of one image or caption file
LONGEST_FIELD = 1 << 22      # characters of one csv field: more means a quote that was never closed
GZIP = b"\x1f\x8b"            # how a packed file begins


class Packed:
    """Many byte strings in one block, which forked workers share.  A list of str they would come to copy: reading an
    object changes its reference count, and so its page of memory."""

    def __init__(self, strings):
        blob, ends = bytearray(), array("q", [0])        # not a list of them, which takes several times the memory
        for string in strings:
            blob += string
            ends.append(len(blob))
        self.blob, self.ends = bytes(blob), np.array(ends)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        return self.blob[self.ends[i]:self.ends[i + 1]]


def usable_captions(texts: list[str]) -> tuple[str, ...]:
    """Those that can be used: one of several is enough.  BadRecord, of the last, if none can."""
    captions, problem = [], "no caption"
    for text in texts:
        text = text.removeprefix("\ufeff").strip()
        if re.search("[\ud800-\udfff]", text):       # a stray byte was kept as a surrogate; or half a pair from JSON
            problem = "caption is not UTF-8"
        elif not text:
            problem = "empty caption"
        else:
            captions.append(text)
    if not captions:
        raise BadRecord(problem)
    return tuple(captions)


def read_file(path: str) -> bytes:
    with refusing(f"unreadable file: {path!r}"):
        size = os.path.getsize(path)
        if size > MAX_FILE:
            raise ValueError(f"{size:,} bytes are too many")
        return Path(path).read_bytes()


def write_whole(path, content: bytes):
    """Writes a file that others read, and may write, at the same time: they find all of it or nothing."""
    temporary = Path(f"{path}.{os.getpid()}-{threading.get_ident()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)                # of a full disk


def read_lines(path: str | Path, what: str) -> list[str]:
    """The lines of a text file, without those that are empty."""
    with reading(f"the {what} in {path}"):
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise UserError(f"{path} should hold {what}, one a line, but is empty")
    return lines


def open_text(path):
    """A text file, whatever packs or encodes it; UserError for one that is no text."""
    file = open(path, "rb")
    if file.peek(2)[:2] == GZIP:
        file = gzip.GzipFile(fileobj=file)
    if file.peek(4)[:4] == b"PAR1":
        raise UserError(f"{path} is a parquet file: make it a table with pandas.read_parquet(...).to_csv('table.csv')")
    encoding = "utf-16" if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")


def read_json(path: str) -> dict:
    with reading(path), open(path, encoding="utf-8-sig") as file:
        return json.load(file)


def want(entry, key, kind, where):
    """entry[key] of JSON, which must be of this kind: int, str, list; object for anything, None if it is not there."""
    if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
        raise UserError(f"{where}: wanted an object with {key!r} of type {getattr(kind, '__name__', kind)}, got "
                        f"{json.dumps(entry)[:80]}")
    return entry.get(key)


def entries(content, key, path, **kinds):
    """For each object in the list content[key] of a JSON file: where it stands, and its values of these keys."""
    listed = want(content, key, list, path)
    for k, entry in enumerate(progress(listed, len(listed), f"{key} of {path} read")):
        where = f"{path}, {key}[{k}]"
        yield where, *(want(entry, name, kind, where) for name, kind in kinds.items())


def by_id(content, key, path, **kinds) -> dict:
    """The objects in the list content[key] by the first of these keys, their id: {id: values of the other keys}."""
    found = {}
    for where, i, *values in entries(content, key, path, **kinds):
        if i in found:
            raise UserError(f"{where}: {values[0]!r} has the id {i!r} of {found[i][0]!r}, as where two exports were "
                            f"joined: number those of the second anew, and in its annotations too")
        found[i] = values
    return found


def note_counts(counts):
    return [f"{count:,} {what}" for what, count in counts.items() if count]


# ---- shards: tar files of images and captions -----------------------------------------------------------------------

def expand_braces(pattern):
    """PATH-{00000..00999}.tar -> the names it stands for, as a shell has it."""
    found = re.fullmatch(r"([^{}*]*)\{(\d+)\.\.(\d+)\}([^{}*]*)", pattern)
    if found:
        before, low, high, after = found.groups()
        if int(low) <= int(high) < int(low) + 1_000_000:
            return [f"{before}{n:0{len(low)}}{after}" for n in range(int(low), int(high) + 1)]
    elif not re.search("[{}*]", pattern) and not isdir(pattern):
        return [pattern]
    raise UserError(f"cannot read shards:{pattern}: wanted the names of the tars with a range in braces, "
                    f"shards:PATH-{{00000..00999}}.tar, so that a missing one is noticed")


def tar_members(path):
    """The members of a tar, in order.  An exception tells where and why the walk ended too early."""
    total = os.path.getsize(path)
    with tarfile.open(path, "r:", encoding="utf-8") as tar:
        for member in tar:
            end = member.offset_data + member.size
            if member.size < 0 or end > total:
                raise ValueError(f"cut short: has {total:,} bytes, the member at {member.offset:,} ends at {end:,}")
            tar.members.clear()                          # which tarfile keeps, all of them, for random access
            yield member
        tar.fileobj.seek(tar.offset)                     # tarfile stops at a damaged header as at an end,
        rest = tar.fileobj.read(1 << 20)                 # where zeros stand, less than 1 MB, and nothing else
        if not 512 <= len(rest) < 1 << 20 or any(rest):
            raise ValueError(f"damaged or cut short at byte {tar.offset:,} of {total:,}, what follows is not read")


def index_tar(path):
    """Where the pairs of a tar are:

    keys     their names
    pairs    (n, 5) int64: whether the caption is in a .json; offset and size of the image; those of the caption
    counts   what was left out;  cut: why the walk ended too early, or ""
    """
    with reading(path), open(path, "rb") as file:
        if file.read(2) == GZIP:
            raise UserError(f"{path} is packed, but images are read from their places in a tar: gunzip {path}")
    members, counts, cut = {}, Counter(), ""             # members: name -> (kind, (offset, size))
    try:
        for member in tar_members(path):
            name = member.name.removeprefix("./")
            kind = "image" if is_image(name) else name.rpartition(".")[2].lower()
            if member.isdir():
                continue
            if not member.isreg() or member.issparse() or name.startswith("/") or ".." in name.split("/"):
                counts["links, devices, sparse files or paths that leave the folder, not read"] += 1
            elif is_hidden(name):
                counts["hidden files (.NAME, __MACOSX), not read"] += 1
            elif kind in ("image", "txt", "json"):
                counts["members repeat a name, the last one is read"] += name in members
                members[name] = kind, (member.offset_data, member.size)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:                           # tarfile raises nearly everything on hostile bytes
        cut = one_line(error)
    for key_of in (lambda name: name.rpartition(".")[0],                    # names are cut at the last dot, or if that
                   lambda name: re.match(r"(?s)(.*/)?[^./]*", name)[0]):    # makes no pair at the first: 17.image.jpg
        files = defaultdict(dict)                                           # key -> {kind: (offset, size)}
        for name, (kind, place) in members.items():
            files[key_of(name)][kind] = place
        if any("image" in kinds and len(kinds) > 1 for kinds in files.values()):
            break
    counts["files differ from another of their pair in the extension alone, the last one is read"] = (
        len(members) - sum(map(len, files.values())))
    keys, pairs = [], []
    for key, members in files.items():
        caption = members.get("txt") or members.get("json")
        if "image" in members and caption:
            keys.append(key)
            pairs.append(["txt" not in members, *members["image"], *caption])
        counts["images without a caption"] += not caption
        counts["captions without an image"] += "image" not in members
    return dict(keys=keys, pairs=np.array(pairs, dtype=np.int64).reshape(-1, 5), counts=counts, cut=cut)


def most_open_files() -> int:
    """As many as the system lets this process have open, from now on."""
    try:
        import resource
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        return most
    except (ImportError, ValueError, OSError):           # Windows, or a limit that may not be touched
        return 128


def load_index(path, cache):
    """index_tar(path), from the folder `cache` if it is there and the tar has its size and time of then."""
    if cache is None:
        return index_tar(path)
    path = os.path.abspath(path)
    status = os.stat(path)
    stamp = [3, path, status.st_size, status.st_mtime_ns]                                   # 3: version of the index
    file = Path(cache) / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.npz"
    with contextlib.suppress(Exception):                 # no such file, or one of the many ways of being damaged
        with np.load(file) as saved:
            index = json.loads(saved["index"].item())
            if index["stamp"] == stamp:
                return dict(index, pairs=saved["pairs"])
    index, out = dict(index_tar(path), stamp=stamp), io.BytesIO()
    np.savez(out, pairs=index["pairs"], index=json.dumps(dict(index, pairs=None)).encode())
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, out.getvalue())
    except OSError as error:
        index["counts"][f"indices were not stored in {cache} ({error.strerror})"] += 1
    return index


# Open tars of each process, read by offset: reads share no position, so threads and forked processes can share a file.
open_tar = functools.lru_cache(maxsize=most_open_files() // 2)(partial(open, mode="rb", buffering=0))


def read_member(path, offset, size):
    with refusing("unreadable shard"):
        if size > MAX_FILE:
            raise ValueError(f"{size:,} bytes are too many")
        content = os.pread(open_tar(path).fileno(), size, offset)
        if len(content) < size:
            raise ValueError(f"{path} ends before byte {offset + size:,}: it changed after it was indexed")
        return content


def json_captions(content) -> list[str]:
    with refusing("corrupt json"):
        record = json.loads(content)
    captions = record.get("caption") if isinstance(record, dict) else None
    captions = captions if isinstance(captions, list) else [captions]
    if not all(isinstance(caption, str) for caption in captions):
        raise BadRecord("no caption: neither a .txt nor a \"caption\" in the .json that is a text or a list of texts")
    return captions


class Shards:
    """Tar files as img2dataset and WebDataset write them.

        shards:PATH-{00000..00999}.tar       in PATH-00000.tar:  000000000.jpg    the image, or .jpeg .png .webp ...
                                                                 000000000.txt    its caption
                                                                 000000000.json   or its "caption", a text or a list of
                                                                                  several, if there is no .txt
                                                                 000000001.jpg    ...

    Names are cut at the last dot, or where that makes no pair at the first; the files of a pair need not stand
    together.  Of two members of one name the last one counts, as when tar extracts.  Each tar is walked once and its
    index kept in the folder `cache`, if one is given; images are read from their place in the tar, nothing is ever
    extracted.
    """
    classes = None

    def __init__(self, pattern, cache=None, **_):
        self.paths = expand_braces(pattern)
        missing = [path for path in self.paths if not isfile(path)]
        if missing:
            raise UserError(f"{len(missing)} of {len(self.paths)} shards are missing, the first is {missing[0]}")
        open_tar.cache_clear()                           # a tar may be another one since it was opened
        with ThreadPoolExecutor(8) as pool:              # threads, because on a network disk the time goes in waiting
            index = partial(load_index, cache=cache)
            if cache and dist.is_initialized():          # each process walks its part, and then all read what all found
                own = self.paths[dist.get_rank()::dist.get_world_size()]
                with contextlib.suppress(UserError):     # which all will meet below
                    list(progress(pool.map(index, own), len(own), "own shards indexed"))
                dist.barrier()
            indices = list(progress(pool.map(index, self.paths), len(self.paths), "shards indexed"))
        if cache:
            stamps = json.dumps([index["stamp"] for index in indices]).encode()
            self.hash_file = f"{cache}/{hashlib.sha256(stamps).hexdigest()[:32]}.names"
        self.keys = Packed(os.fsencode(key) for index in indices for key in index["keys"])
        self.pairs = np.concatenate([index["pairs"] for index in indices])                      # see index_tar
        self.shard = np.repeat(np.arange(len(indices)), [len(index["keys"]) for index in indices])
        counts = Counter()
        for index in indices:
            counts.update(index["counts"])
            counts[f"of {len(indices)} shards hold no pair"] += not index["keys"]
        cuts = [f"{path}: {index['cut']}" for path, index in zip(self.paths, indices) if index["cut"]]
        self.notes = note_counts(counts) + cuts[:10] + note_counts(
            {"more shards are damaged or cut short": len(cuts[10:])})
        if not len(self.keys):
            raise UserError(f"no image with a caption in {pattern}: {'; '.join(self.notes)}")

    def __len__(self):
        return len(self.keys)

    def name(self, i):
        stem = os.path.basename(self.paths[self.shard[i]]).removesuffix(".tar")
        return readable(f"{stem}/{os.fsdecode(self.keys[i])}")

    def read(self, i: int) -> Sample:
        path = self.paths[self.shard[i]]
        is_json, image, image_size, caption, caption_size = self.pairs[i].tolist()
        text = read_member(path, caption, caption_size)
        texts = json_captions(text) if is_json else [text.decode(errors="surrogateescape")]
        return Sample(open_image(read_member(path, image, image_size)), usable_captions(texts))


# ---- files with captions or a class ---------------------------------------------------------------------------------

class ImageFiles:
    """Images as files, with what is known of each: what csv, folder, coco, flickr30k and icinw come to.

    source     where the list comes from, for messages
    root       folder that the files are named from
    listed     (file, fields of its Sample: captions, label or objects; or label_map, its file) of each
    classes    what the labels mean
    counts     for notes: {"images left out": how many}
    """
    names_classes, text_label = False, -1                # see name_classes
    ignore_exif = False                                  # see as_annotated

    def __init__(self, source, root, listed, classes=None, counts={}):
        self.source, self.root, self.classes = source, root, classes
        self.records = Packed(json.dumps(record).encode() for record in listed)
        self.notes = note_counts(counts)
        if not len(self):
            raise UserError(f"{source} holds no images")
        probe = [self.path(i) for i in range(min(len(self), 100))]
        if not any(map(isfile, probe)):
            raise UserError(f"none of the first {len(probe)} images of {source} exists: looked for {probe[0]}")

    def __len__(self):
        return len(self.records)

    def path(self, i):
        return os.path.join(self.root, json.loads(self.records[i])[0])

    def name(self, i):
        return readable(json.loads(self.records[i])[0])

    def read(self, i: int) -> Sample:
        _, known = json.loads(self.records[i])
        if "captions" in known:
            known["captions"] = usable_captions(known["captions"])
        sample = Sample(open_image(read_file(self.path(i))), **known)
        if self.names_classes:
            names = self.classes[sample.label].split("\t")
            sample.captions = tuple(template.format(name) for template in TEMPLATES_80 for name in names)
            sample.text_label = self.text_label + sample.label
        return sample


def captioned(source, root, listed, counts={}):
    """ImageFiles of (file, captions): what is listed of one file is one image with several captions; images without
    captions are left out and counted; one whose captions are all empty is a bad record."""
    captions, rows = defaultdict(list), 0
    for rows, (file, more) in enumerate(listed, 1):
        captions[os.path.normpath(file)] += more
    kept = ((file, dict(captions=some)) for file, some in captions.items() if some)
    return ImageFiles(source, root, kept, counts={
        **counts, f"images of {source} have no caption": sum(not some for some in captions.values()),
        f"rows are of {len(captions):,} images: each is one record, with the captions of its rows":
            rows * (rows > len(captions))})


def csv_file(spec, **_):
    """A table of files and captions; its separator is the one that finds the columns in the first line.

        csv:FILE                              filepath,title                  paths are relative to FILE's folder
        csv:FILE,image=COLUMN,caption=COLUMN  a/0001.jpg,"A cat, asleep"      quotes around separators and line ends
                                              a/0001.jpg,A sleeping cat       another caption of the same image

    caption=COLUMN may come several times.  FILE may be packed by gzip, in UTF-16, or hold an object of JSON a line.
    """
    path, *options = re.split(",(image|caption)=", spec)
    columns = list(zip(options[::2], options[1::2]))             # ("image" or "caption", name of the column)
    image = dict(columns).get("image", "filepath")
    texts = [name for what, name in columns if what == "caption"] or ["title"]
    counts = Counter()
    return captioned(path, os.path.dirname(path), csv_rows(path, image, texts, counts), counts)


def csv_rows(path, image, texts, counts):
    """(file, captions) of each row of a table; what looks wrong is counted."""
    csv.field_size_limit(LONGEST_FIELD)
    with reading(path), open_text(path) as file:
        line, separator = file.readline(LONGEST_FIELD), ""
        if line.startswith("{"):
            names, rows = list(json.loads(line)), map(json.loads, filter(str.strip, itertools.chain([line], file)))
        else:
            for separator in ",\t;|":
                header = csv.reader([line], delimiter=separator, skipinitialspace=True)
                names = [name.strip() for name in next(header, [])]
                if image in names:
                    break
            rows = csv.DictReader(file, names, delimiter=separator, restval="", skipinitialspace=True)
        if not {image, *texts} <= set(names):
            wanted = " and ".join(map(repr, [image, *texts]))
            raise UserError(f"{path}: wanted columns {wanted} in the first line, got {line[:80]!r}: name yours with "
                            f"csv:FILE,image=COLUMN,caption=COLUMN")
        number = 0
        try:
            for number, row in enumerate(rows, 1):
                captions = []
                for value in map(row.get, texts):
                    captions += value if isinstance(value, list) else [value or ""]
                counts["captions go over several lines: look for stray quotes"] += "\n" in "".join(captions)
                counts[f"rows have too many fields: captions with a {separator!r} need quotes"] += None in row
                yield row[image].strip(), captions
        except (AttributeError, TypeError, KeyError):            # of JSON; a table has nothing but texts
            raise UserError(f"{path}, row {number}: wanted a text for {image!r} and texts for {texts}, got "
                            f"{str(row)[:80]}") from None
        except csv.Error as error:
            raise UserError(f"{path}: {error}; is there a quote that is never closed?") from None
        except ValueError as error:
            raise UserError(f"cannot read {path} after row {number}: {one_line(error)}") from None


# folders of splits, as train, Validation, test_set, seg_train
SPLIT = re.compile(r"(?:(?:images|seg)[ _-])?(train|val|test)(?:ing|id|idation)?(?:[ _-](?:set|images|data))?", re.I)


def is_hidden(path):
    """Whether a name in the path is nobody's data: .NAME, as ._0001.jpg of macOS, or __MACOSX."""
    return any(name.startswith(".") and name.strip("./") or name == "__MACOSX" for name in path.split("/"))


def is_image(path):
    return path.rpartition(".")[2].lower() in EXTENSIONS and not is_hidden(os.path.basename(path))


def folders_in(path):
    """The names of the folders in a folder, hidden ones left out; 2 is before 10."""
    with reading(path):
        folders = [entry.name for entry in os.scandir(path) if entry.is_dir()]
    return numbers_in_order(name for name in folders if not is_hidden(name))


def numbers_in_order(names):
    """Sorted, where numbers in the names count as numbers."""
    def key(name):
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name       # 1, 01
    return sorted(names, key=key)


def folder(root, split, **_):
    """One folder per class; labels follow the sorted names of the folders, over all splits.

        folder:DIR     DIR/train/CLASS/**/*.jpg     or DIR/CLASS/**/*.jpg, the same for every split.  Splits may be
                       DIR/val/CLASS/**/*.jpg       called training, valid, test_set and the like, in capitals too;
                                                    "test" stands in for a missing "val", and the other way round
                       DIR/classnames.txt           optional, lines "CLASS<TAB>name"; without it _ becomes a space
    """
    folders = folders_in(root)
    splits = {match[1].lower(): name for name in folders                            # in each a folder for each class
              if (match := SPLIT.fullmatch(name)) and folders_in(f"{root}/{name}")}
    other = {"val": "test", "test": "val"}.get(split)
    part = splits.get(split) or splits.get(other) or "."
    if splits and part == ".":
        raise UserError(f"{root} has no folder {split!r} with a folder for each class in it, only "
                        f"{', '.join(splits.values())}")
    counts, home, listed = Counter(), os.path.normpath(f"{root}/{part}"), []
    if splits:
        counts["folders beside those of the splits, not read"] = len(folders) - len(splits)
        folders = numbers_in_order({name for place in splits.values() for name in folders_in(f"{root}/{place}")})
    counts["images beside the folders of the classes, not read"] = sum(map(is_image, os.listdir(home)))
    for label, name in enumerate(folders):
        for where, below, names in os.walk(f"{home}/{name}"):
            below[:] = sorted(name for name in below if not is_hidden(name))        # os.walk goes on with these
            counts["links to folders inside classes, not followed"] += sum(islink(f"{where}/{name}") for name in below)
            if re.fullmatch(r"\d{5}", name) and any(file.endswith(".txt") for file in names):
                raise UserError(f"{where} holds pairs as img2dataset leaves them, no class: let it write "
                                f"--output_format webdataset, and give that as shards:")
            images = sorted(filter(is_image, names))
            counts["files that are no images by their names, or hidden, not read"] += len(names) - len(images)
            listed += [(f"{os.path.relpath(where, root)}/{file}", dict(label=label)) for file in images]
    empty = sorted({*range(len(folders))} - {known["label"] for _, known in listed})
    if listed and empty:
        counts[f"of {len(folders):,} classes have no image in {home}, as {readable(folders[empty[0]])}"] = len(empty)
    data = ImageFiles(f"{home}, sorted into a folder for each class as docs/DATA.md says,", root, listed,
                      class_names(root, folders), counts)
    data.folders = folders
    if part == splits.get(other):
        data.notes.append(f"{root} has no folder {split!r}: {part!r} stands in for it")
    return data


def class_names(root, folders):
    """The names of the classes by their folders, from classnames.txt if it is there."""
    path = f"{root}/classnames.txt"
    if not isfile(path):
        return [readable(folder).replace("_", " ") for folder in folders]
    names = by_folder(read_lines(path, "lines CLASS<TAB>name"))
    for folder in folders:
        if folder not in names:
            raise UserError(f"{path} has no line {folder}<TAB>name")
    return [names[folder] for folder in folders]


def by_folder(lines):
    """Lines FOLDER<TAB>name -> {folder: name}"""
    pairs = (line.partition("\t") for line in lines)
    return {folder.strip(): name.strip() for folder, _, name in pairs if name}


def readable(name):
    """The name of a file or folder as text; bytes that are not UTF-8 are those of Windows or of an old zip."""
    try:
        raw = os.fsencode(name)
        return raw.decode()
    except UnicodeEncodeError:                           # half a pair, from JSON
        return printable(name)
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def want_several(data, spec: str):
    """UserError if there is one class, as where DIR is one folder too high."""
    if data.classes and len(data.classes) == 1:
        raise UserError(f"{spec} has one class, {data.classes[0]}, and nothing to tell it from: wanted a folder for "
                        f"each, DIR/CLASS/*.jpg, or DIR/val/CLASS/*.jpg")


def want_names(data, spec: str):
    """UserError if the classes have WordNet's numbers for names, which no text tower has read."""
    if numbers := [name for name in data.classes if re.fullmatch(r"n\d{8}", name)]:
        raise UserError(f"the classes of {spec} are numbers of WordNet, such as {numbers[0]}: put their names into "
                        f"{data.root}/classnames.txt, lines CLASS<TAB>name (docs/DATA.md says where to find them)")


ID = int | str               # of an image: some tools take the file's name, or a hash of 64 bits
TEXT = str | None            # of a caption, which may be missing as in a table


class Absent(UserError):
    """The file that a task wants is not there: the data set may be for another task."""


def coco_file(root, what, split):
    """DIR/annotations/WHAT_SPLIT2017.json, or 2014: its path, the folder of its images, and its content."""
    for part in (f"{split}2017", f"{split}2014"):
        path = f"{root}/annotations/{what}_{part}.json"
        if isfile(path):
            return path, part, read_json(path)
    raise Absent(f"no {what} of the split {split!r} in {root}: wanted {root}/annotations/{what}_{split}2017.json "
                 f"(COCO has train and val)")


def coco_captions(root, split):
    """COCO's captions, about five an image.

        coco:DIR       DIR/annotations/captions_{train,val}2017.json      or 2014
                       DIR/{train,val}2017/*.jpg
    """
    path, part, content = coco_file(root, "captions", split)
    captions = {i: (file, []) for i, (file,) in by_id(content, "images", path, id=ID, file_name=str).items()}
    for where, i, caption in entries(content, "annotations", path, image_id=ID, caption=TEXT):
        if i not in captions:
            raise UserError(f"{where}: there is no image {i!r}")
        captions[i][1].append(caption or "")
    return captioned(path, f"{root}/{part}", captions.values())


def karpathy(path, images, split):
    """Karpathy's splits for retrieval, five captions an image or more; "train" has "restval" too.

        coco:DIR       DIR/dataset_coco.json          DIR/{train,val}2014/*.jpg        as the file's "filepath" says
        flickr30k:DIR  DIR/dataset_flickr30k.json     DIR/flickr30k-images/*.jpg

    The file: {"images": [{"filename", "filepath", "split": "test", "sentences": [{"raw": "A cat."}, ...]}, ...]}
    """
    if not isfile(path):
        raise Absent(f"cannot read {path}: there is no such file")
    listed, found = [], Counter()
    for where, part, sentences, below, file in entries(read_json(path), "images", path, split=str, sentences=list,
                                                       filepath=object, filename=str):
        found[part] += 1
        if part == split or (part, split) == ("restval", "train"):
            captions = [want(sentence, "raw", TEXT, where) or "" for sentence in sentences]
            listed.append((f"{below}/{file}" if below else file, captions))
    if not listed:
        raise UserError(f"{path} has no image of the split {split!r}, only {dict(found)}")
    return captioned(path, images, listed)


def coco(root, split, task, **_):
    """COCO's objects for detection; Karpathy's split for retrieval and to test on; else the captions."""
    if task == "detection":
        return CocoInstances(root, split)
    path = f"{root}/dataset_coco.json"
    if task == "retrieval" or split == "test" and isfile(path):
        return karpathy(path, root, split)
    return coco_captions(root, split)


def flickr30k(root, split, **_):
    return karpathy(f"{root}/dataset_flickr30k.json", f"{root}/flickr30k-images", split)


# ---- a class for each pixel -----------------------------------------------------------------------------------------

# COCO-Stuff's files hold category - 1 in 0..181; eleven of these do not occur, and the 171 others close up
COCO_STUFF_GAPS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
COCO_STUFF_LABEL = np.full(256, 255, dtype=np.uint8)
COCO_STUFF_LABEL[np.setdiff1d(np.arange(182), COCO_STUFF_GAPS)] = np.arange(171)


LOOKED_AT = 1000             # label maps that are read before a run; all, where these show less than two classes


def look_at_labels(data, known: list[str] | None = None, speaks: bool = True) -> list[str]:
    """Says in a line what the labels of a data set hold, and returns the names of the classes that occur.

    known   the classes that a network has learned: others that occur are named
    UserError if there is nothing to learn or to measure.  Of what is drawn nothing is said: it has all its classes.
    """
    if not hasattr(data, "tally"):
        return data.classes

    def some(names):
        return textwrap.shorten(", ".join(names), 80) or "none"
    counts, line, bad = data.tally(speaks)
    found = [name for name, count in zip(data.classes, counts) if count]
    strange = [name for name in found if name not in (known or found)]
    line += f", of {len(found)} of {len(data.classes)} classes ({some(found)})"
    if strange:
        line += f", not seen among those learned ({some(known)}): {some(strange)}"
    if bad:
        line += f"; {len(bad):,} cannot be used, the first is {bad[0]}"
    if len(found) - len(strange) < data.fewest_classes:
        raise UserError(f"{line}; this is too little to learn or to measure: {data.advice}")
    if speaks:
        say(printable(f"labels: {line}"))
    return found


def as_annotated(image, size, ignore_exif):
    """Settles whether annotations for an image of `size` (width, height) were drawn on it as `decode` turns it, or on
    the pixels as stored: then its EXIF orientation goes.  Where both sizes are the same, ignore_exif says so."""
    if image.format == "PNG":                        # whose EXIF may stand behind its pixels
        with refusing("corrupt image"):
            image.load()
    if upright_size(image) != size or ignore_exif and image.size == size:
        if image.size != size:
            raise BadRecord(f"image of another size: {image.size}, and {upright_size(image)} when turned as its EXIF "
                            f"says; the annotations are for {size}")
        image.info.pop("exif", None)


class LabelMaps(ImageFiles):
    """Images (.jpg) with a class for each pixel (.png of the same name), in the folders of the archives they come in.

        ade20k:DIR           DIR/images/{training,validation}/*.jpg       DIR/annotations/{training,validation}/*.png
        coco-stuff:DIR       DIR/images/{train,val}2017/*.jpg             DIR/annotations/{train,val}2017/*.png
        pascal-context:DIR   DIR/JPEGImages/*.jpg, those that             DIR/SegmentationClassContext/*.png
                             DIR/ImageSets/SegmentationContext/{train,val}.txt names
        voc:DIR              DIR/JPEGImages/*.jpg, those that             DIR/SegmentationClass/*.png
                             DIR/ImageSets/Segmentation/{train,val}.txt names
                             DIR/class_names.txt: a name a line, for labels 0, 1, ...

    DIR or the folder above it.  COCO-Stuff's labels are those of stuffthingmaps_trainval2017.zip; Pascal Context's
    those mmsegmentation makes from trainval_merged.json: 0 background, 1 to 59 the classes in alphabetical order.
    Images and label maps may end in anything that is_image takes.  A list may name both in a line, from DIR, as
    DeepLab's trainaug does: /JPEGImages/x.jpg /SegmentationClassAug/x.png

    above               the folder above
    images, maps        where the images and the label maps are
    parts               what the format calls train and val, for {} in the paths
    listing             file with the names of the images; without one it is all images
    classes             their names; without them of class_names.txt
    reduce_zero_label   label 0 belongs to no class: they start with label 1
    label_of            (256,) the label of each value in the files, where they differ
    """
    fewest_classes = 2
    advice = ("a label map holds the number of a class in each pixel, and 255 where there is none: a mask in black and "
              "white wants 1 in place of 255")

    def __init__(self, root, split, above, images, maps, parts=("train", "val"), listing="", classes=None,
                 reduce_zero_label=False, label_of=np.arange(256, dtype=np.uint8), **_):
        if split not in ("train", "val"):
            raise UserError(f"{root} has no split {split!r}; use train or val")
        root = f"{root}/{above}" if isdir(f"{root}/{above}") else root
        images, maps, source = (where.format(parts[split == "val"]) for where in (images, maps, listing or images))
        for path in (images, maps, source):
            if not os.path.exists(f"{root}/{path}"):
                raise UserError(f"{root}/{path} is not there: unpack the archive as it comes, and name the folder "
                                f"{above} or the one above it")
        pictures, labels = ({os.path.splitext(name)[0]: f"{folder}/{name}"
                             for name in sorted(os.listdir(f"{root}/{folder}")) if is_image(name)}
                            for folder in (images, maps))
        listed = []
        for line in read_lines(f"{root}/{source}", "names of images") if listing else pictures:
            pair = line.split()
            if len(pair) != 2 or not all(map(is_image, pair)):
                stem = os.path.splitext(line)[0] if is_image(line) else line
                pair = pictures.get(stem, f"{images}/{stem}.jpg"), labels.get(stem, f"{maps}/{stem}.png")
            image, label_map = (file.lstrip("/") for file in pair)
            listed.append((image, dict(label_map=label_map)))
        classes = classes or read_lines(f"{root}/class_names.txt", "names of classes")
        super().__init__(f"{root}/{source}", root, listed, [name.strip("_") for name in classes])
        self.label_of, self.reduce_zero_label = label_of, reduce_zero_label

    def read(self, i: int) -> Sample:
        sample = super().read(i)
        label = open_image(read_file(f"{self.root}/{sample.label_map}"))
        if label.mode not in ("L", "P") or label.format == "JPEG":              # which would change its numbers
            raise BadRecord(f"not a label map: {label.format} of mode {label.mode}, wanted a PNG of one byte a pixel")
        as_annotated(sample.image, label.size, self.ignore_exif)
        with refusing("corrupt label map"):
            sample.label_map = self.label_of[np.array(label)]                   # (H, W); of a palette image the indices
        largest = int(sample.label_map[sample.label_map < 255].max(initial=0))
        if largest >= len(self.classes) + self.reduce_zero_label:
            raise BadRecord(f"label out of range: {largest}, with {len(self.classes)} classes")
        return sample

    def tally(self, speaks: bool) -> tuple:
        """(classes,) how many pixels are of each, in LOOKED_AT label maps drawn at random; the same in words; and those
        that cannot be used."""
        counts, bad, order = np.zeros(256, dtype=int), [], epoch_order(len(self), 0, 0).tolist()
        for read, i in enumerate(progress(order, min(len(order), LOOKED_AT), "label maps read", speaks), 1):
            try:
                counts += np.bincount(self.read(i).label_map.ravel(), minlength=256)
            except BadRecord as error:
                bad.append(f"{self.name(i)}: {error}")
            known = counts[self.reduce_zero_label:][:len(self.classes)]
            if read >= LOOKED_AT and np.count_nonzero(known) >= self.fewest_classes:
                break
        share = known.sum() / max(counts.sum(), 1)
        return known, f"{self.source}: {share:.1%} of the pixels in {read:,} label maps have a class", bad


# ---- a box, a category and a mask for each object -------------------------------------------------------------------

MIN_TRAINED_SIDE = 32        # of images to train on, pixels (mmdetection)


class CocoInstances(ImageFiles):
    """COCO's objects, in the folders of its archives.

        coco:DIR       DIR/annotations/instances_{train,val}2017.json     or 2014
                       DIR/{train,val}2017/*.jpg

    classes are the categories by rising id, category_ids these ids (COCO's 80 are between 1 and 90), image_ids those of
    the images.  read(i) gives objects {"box": [x1, y1, x2, y2], "category": index into classes, "area": of the mask or
    None, "crowd": bool, "mask"}, with the mask as the file has it: polygons [[x1, y1, x2, y2, ...], ...], or RLE
    {"size": [h, w], "counts": list or str}.  As in mmdetection, images that are small or without objects are not
    trained on.  What is left out is counted in notes.  Objects that are malformed are left out too; what was wrong with
    each is in left_out, for look_at_labels.
    """
    fewest_classes = 1
    advice = "crowds and objects under a pixel do not count, and names of classes are compared letter by letter"

    def __init__(self, root, split):
        path, part, content = coco_file(root, "instances", split)
        categories, names = by_id(content, "categories", path, id=int, name=str), {}
        for i, (name,) in sorted(categories.items()):
            names[i] = f"{name} ({i})" if name in names.values() else name
        images = by_id(content, "images", path, id=ID, file_name=str, width=int | float, height=int | float)
        self.category_ids, self.left_out = list(names), []
        objects, self.usable = {i: [] for i in images}, [0] * len(names)        # of an image; how many of a category
        for where, i, category, box, area, mask, crowd in entries(
                content, "annotations", path, image_id=ID, category_id=int, bbox=object, area=object,
                segmentation=object, iscrowd=object):
            if i not in images:
                problem = f"{where}: there is no image {i!r}"
            elif category not in names:
                problem = f"{where}: there is no category {category}"
            else:
                file, *size = images[i]
                if isinstance(mask, list):          # a polygon of two corners has no area: the others count
                    mask = [points for points in mask if not (are_numbers(points) and len(points) == 4)]
                problem = problem_of_object(f"{where}, of image {file}", box, area, mask, *size)
            if problem:
                self.left_out.append(problem)
                continue
            x, y, w, h = box
            box = x, y, x + w, y + h
            category = bisect.bisect_left(self.category_ids, category)
            self.usable[category] += not crowd and has_area(box, *size)
            objects[i].append(dict(box=box, category=category, area=area, mask=mask, crowd=bool(crowd)))
        kept = [i for i in images if split != "train" or objects[i] and min(images[i][1:]) >= MIN_TRAINED_SIDE]
        if images and not kept:
            raise UserError(f"{path} holds no image that can be trained on, of {len(images)}; "
                            f"{' '.join(self.left_out[:1])}")
        super().__init__(path, root, ((f"{part}/{images[i][0]}", dict(objects=objects[i])) for i in kept),
                         list(names.values()), {
            f"images of {path} left out: no object, or a side under {MIN_TRAINED_SIDE} pixels": len(images) - len(kept),
            f"categories of {path} have the name of another, and their id beside it":
                sum(names[i] != name for i, (name,) in categories.items())})
        self.image_ids = np.array(kept, dtype=object)                                   # (n,), as the file has them
        self.sizes = np.array([images[i][1:] for i in kept])                            # (n, 2)
        # as in mmdetection batches are of wide images or of high ones, which share a canvas with little padding
        self.groups = self.sizes[:, 0] > self.sizes[:, 1]                               # (n,)

    def read(self, i: int) -> Sample:
        sample = super().read(i)
        as_annotated(sample.image, tuple(self.sizes[i].tolist()), self.ignore_exif)
        return sample

    def tally(self, speaks: bool) -> tuple:
        """(classes,) how many objects are of each, crowds and those under a pixel not counted; the same in words; and
        those that cannot be used."""
        return self.usable, f"{self.source}: {sum(self.usable):,} objects can be learned or found", self.left_out


def has_area(box: tuple, width: int, height: int) -> bool:
    """Whether a box (x1, y1, x2, y2) has a pixel or more each way inside an image of width x height."""
    x1, y1, x2, y2 = box
    return min(x2, width) - max(x1, 0) >= 1 and min(y2, height) - max(y1, 0) >= 1


def problem_of_object(where, box, area, mask, width, height) -> str:
    """What is malformed of an object of an image of width x height: its box, area or mask; "" if all are well."""
    is_mask = is_rle(mask, height, width) if isinstance(mask, dict) else (
        isinstance(mask, list) and mask != [] and all(
            are_numbers(points) and len(points) >= 6 and len(points) % 2 == 0 for points in mask))
    for wanted, value, is_right in (
            ("a bbox [x, y, width, height]", box, are_numbers(box) and len(box) == 4 and min(box[2:]) >= 0),
            ("an area, a number of pixels, or none", area, area is None or are_numbers([area])),
            (f"a segmentation of polygons [[x1, y1, x2, y2, x3, y3, ...], ...] or an RLE of size [{height}, {width}]",
             mask, is_mask)):
        if not is_right:
            return f"{where}: wanted {wanted}, got {json.dumps(value)[:80]}"
    return ""


def is_rle(mask: dict, height, width) -> bool:
    """Whether a mask's runs of pixels make up an image of height x width."""
    counts = mask.get("counts")
    try:
        counts = unpack_counts(counts.encode()) if isinstance(counts, str) else counts
    except ValueError:
        return False
    return mask.get("size") == [height, width] and (
        are_numbers(counts) and min(counts) >= 0 and sum(map(int, counts)) == width * height)


def unpack_counts(text: bytes) -> list[int]:
    """Undoes what dense.encode_rle does to the counts."""
    if not re.fullmatch(b"[0-o]*[0-O]", text):                 # digits 0 to 63; one under 32 is the last of its number
        raise ValueError(f"the string {text[:20]!r} is cut off or no RLE")
    counts, number, shift = [], 0, 0
    for code in text:
        digit = code - ord("0")
        number += (digit & 31) << shift
        shift += 5
        if digit < 32:
            number -= (digit & 16) << (shift - 4)              # 16 as sign is -16, in place of +16
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number, shift = 0, 0
    return counts


def are_numbers(values):
    """Whether this is a list of finite numbers, not empty."""
    return isinstance(values, list) and values != [] and all(
        type(value) in (int, float) and abs(value) < 1e12 for value in values)


# ---- the suite of "Image Classification in the Wild": 20 data sets below one folder ---------------------------------
#
#   icinw:DIR      DIR/classification/FOLDER, or DIR/FOLDER, as the ELEVATER toolkit has them; FOLDER and LIST from the
#                  table below
#                      LIST               test.txt: lines "val.zip@3/17.png 3", the class counted from 0, or "3,7";
#                                         test.json: COCO's images, annotations and categories
#                      labels.txt         or labelmap.txt, beside a test.txt: the name of a class a line
#                      val/3/17.png       or 3/17.png: val.zip unpacked
#                  DIR/prompts.py         the toolkit's names of classes and templates; read, never run

ICINW = {  # name in the ELEVATER toolkit: folder, list, classes, test images, metric
    "caltech-101": ("caltech_101_20211007", "test.txt", 102, 6084, "mean per class"),
    "cifar-10": ("cifar_10_20211007", "test.txt", 10, 10000, "accuracy"),
    "cifar-100": ("cifar100_20200721", "test_images.txt", 100, 10000, "accuracy"),
    "country211": ("country211_20210924", "test.txt", 211, 21100, "accuracy"),
    "dtd": ("dtd_20211007", "test.txt", 47, 1880, "accuracy"),
    "eurosat_clip": ("eurosat_clip_20210930", "test.txt", 10, 5000, "accuracy"),
    "fer-2013": ("fer_2013_20211008", "test.txt", 7, 3589, "accuracy"),
    "fgvc-aircraft-2013b-variants102": ("fgvc_aircraft_2013b_variants102_20211007", "test.txt", 100, 3333,
                                        "mean per class"),
    "food-101": ("food_101_20211007", "test.txt", 101, 25250, "accuracy"),
    "gtsrb": ("gtsrb_20210923", "test.txt", 43, 12630, "accuracy"),
    "hateful-memes": ("hateful_memes_20211014", "test_meta.json", 2, 500, "ROC AUC"),       # of the second class
    "kitti-distance": ("kitti_distance_20210923", "test_meta.json", 4, 711, "accuracy"),
    "mnist": ("mnist_20211008", "test.txt", 10, 10000, "accuracy"),
    "oxford-flower-102": ("oxford_flower_102_20211007", "test.txt", 102, 6149, "mean per class"),
    "oxford-iiit-pets": ("oxford_iiit_pets_20211007", "test.txt", 37, 3669, "mean per class"),
    "patch-camelyon": ("patch_camelyon_20211007", "test.txt", 2, 32768, "accuracy"),
    "rendered-sst2": ("rendered_sst2_20210924", "test.txt", 2, 1821, "accuracy"),
    "resisc45_clip": ("resisc45_clip_20210924", "test.json", 45, 25200, "accuracy"),
    "stanford-cars": ("stanford_cars_20211007", "test.txt", 196, 8041, "accuracy"),
    "voc-2007-classification": ("voc2007_20211007", "test_ic.txt", 20, 4952, "11-point mAP"),
}


@dataclass
class IcinwTask:
    """One data set of the suite.

    data        images with classes, as folder:DIR
    templates   its own prompts
    metric      accuracy, mean per class, 11-point mAP or ROC AUC
    is_class    (n, classes) bool, True where an image is of a class: of several, in the set that has 11-point mAP
    squash      the whole image squeezed to a square instead of its center
    notes       what differs from the published test set
    """
    name: str
    data: ImageFiles
    templates: tuple[str, ...]
    metric: str
    is_class: np.ndarray
    squash: bool
    notes: list[str]


def icinw(root: str, **_) -> tuple[list[IcinwTask], list[str]]:
    """The suite's data sets that are there, and the names of the others."""
    names, templates = toolkit_prompts(f"{root}/prompts.py")
    tasks, missing = [], []
    for name, (published, *_) in ICINW.items():
        home = next(filter(isdir, (f"{root}/classification/{published}", f"{root}/{published}")), None)
        if home:
            tasks.append(icinw_task(name, home, names.get(name), templates.get(name)))
        else:
            missing.append(name)
    if not tasks:
        raise UserError(f"{root} has no data set of the ICinW suite: wanted folders as the ELEVATER toolkit has them, "
                        f"such as classification/{ICINW['caltech-101'][0]}")
    return tasks, missing


def icinw_task(name, home, names, templates):
    """names, templates: the toolkit's, where there are any"""
    _, listing, classes, images, metric = ICINW[name]
    data, is_class = toolkit_list(home, f"{home}/{listing}")
    notes = data.notes
    if names and len(names) != len(data.classes):
        raise UserError(f"prompts.py names {len(names)} classes of {name}, {home} has {len(data.classes)}")
    if names and templates:
        notes.append(f"names by place: {data.classes[0]} is {names[0]} ... {data.classes[-1]} is {names[-1]}")
        data.classes = names
    else:
        templates = TEMPLATES_80
        notes.append("without the toolkit's prompts.py: names as in the data, OpenAI's 80 templates")
    for what, count, wanted in ("images", len(data), images), ("classes", len(data.classes), classes):
        if count != wanted:
            notes.append(f"{count:,} {what}, the published test set has {wanted:,}")
    # the nearest car may stand at the margin: the toolkit, too, does not cut out the center of these images
    return IcinwTask(name, data, templates, metric, is_class, squash=name == "kitti-distance", notes=notes)


def toolkit_prompts(path):
    """class_map and template_map of the toolkit's prompts.py, {data set: list}; both empty if there is no such file."""
    if not isfile(path):
        return {}, {}
    values, substitute = {}, ast.NodeTransformer()       # values: of the names in the file
    substitute.visit_Name = lambda node: ast.Constant(values[node.id])
    with refusing(f"{path} is not the toolkit's vision_benchmark/datasets/prompts.py", UserError):
        for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):      # of what is no plain list
                values[node.targets[0].id] = ast.literal_eval(substitute.visit(node.value))
        # of several names of a class the toolkit (evaluation/feature.py) takes the first
        names = {name: [one if isinstance(one, str) else one[0] for one in classes]
                 for name, classes in values["class_map"].items()}
        templates = values["template_map"]
        return names, {name: checked_templates(templates[name]) for name in ICINW if name in templates}


def toolkit_list(home, path):
    """ImageFiles of a list, labeled with the first class of each; and is_class (n, classes) bool."""
    classes, listed = (json_list if path.endswith(".json") else text_list)(home, path)
    for file, labels in listed:
        if max(labels, default=0) >= len(classes):
            raise UserError(f"{path}: {file} is of class {max(labels)}, with {len(classes)} classes")
    kept = [(unpacked(home, file), labels) for file, labels in listed if labels]
    data = ImageFiles(path, home, ((file, dict(label=labels[0])) for file, labels in kept), classes,
                      counts={"images without a class": len(listed) - len(kept)})
    return data, np.array([np.isin(np.arange(len(classes)), labels) for _, labels in kept])


def text_list(home, path):
    """Names of the classes, and (file, its classes) for each line of a test.txt."""
    names = f"{home}/labels.txt"
    names, listed = read_lines(names if isfile(names) else f"{home}/labelmap.txt", "names of classes"), []
    for line in read_lines(path, "lines FILE CLASS"):
        file, _, labels = line.rpartition(" ")
        if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", labels):
            raise UserError(f"{path}: wanted FILE CLASS or FILE CLASS,CLASS..., got {line[:60]!r}")
        listed.append((file, [int(label) for label in labels.split(",")]))
    return names, listed


def json_list(home, path):
    """The same of a test.json."""
    content, labels = read_json(path), defaultdict(list)
    names = dict(sorted((i, name) for _, i, name in entries(content, "categories", path, id=int, name=str)))
    for _, i, category in entries(content, "annotations", path, image_id=int, category_id=int):
        labels[i].append([*names, category].index(category))             # an unknown one is out of range
    images = entries(content, "images", path, id=int, zip_file=object, file_name=str)
    return list(names.values()), [(f"{archive}@{file}" if archive else file, labels[i])
                                  for _, i, archive, file in images]


def unpacked(home, file):
    """val.zip@3/17.png -> val/3/17.png or 3/17.png, whichever is there."""
    archive, _, member = file.rpartition(".zip@")
    if not archive:
        return file
    for place in (f"{archive}/{member}", member):
        if isfile(f"{home}/{place}"):
            return place
    if isfile(f"{home}/{archive}.zip"):
        raise UserError(f"{home}/{archive}.zip holds {member}: unpack it, "
                        f"cd {home} && unzip -q {archive}.zip -d {archive}")
    return member


# ---------------------------------------------------------------------------------------------------------------------
# Prompts: the sentences that stand around a class name, and class names
# ---------------------------------------------------------------------------------------------------------------------

def split_templates(text):
    return tuple(" ".join(text.split()).split(" | "))


# the paper's seven for zero-shot ImageNet, OpenAI's 80, and for segmentation five more
TEMPLATES_7 = split_templates("""
    itap of a {}. | a bad photo of the {}. | a origami {}. | a photo of the large {}. | a {} in a video game. |
    art of the {}. | a photo of the small {}.""")
TEMPLATES_80 = split_templates("""
    a bad photo of a {}. | a photo of many {}. | a sculpture of a {}. | a photo of the hard to see {}. |
    a low resolution photo of the {}. | a rendering of a {}. | graffiti of a {}. | a bad photo of the {}. |
    a cropped photo of the {}. | a tattoo of a {}. | the embroidered {}. | a photo of a hard to see {}. |
    a bright photo of a {}. | a photo of a clean {}. | a photo of a dirty {}. | a dark photo of the {}. |
    a drawing of a {}. | a photo of my {}. | the plastic {}. | a photo of the cool {}. | a close-up photo of a {}. |
    a black and white photo of the {}. | a painting of the {}. | a painting of a {}. |
    a pixelated photo of the {}. | a sculpture of the {}. | a bright photo of the {}. | a cropped photo of a {}. |
    a plastic {}. | a photo of the dirty {}. | a jpeg corrupted photo of a {}. | a blurry photo of the {}. |
    a photo of the {}. | a good photo of the {}. | a rendering of the {}. | a {} in a video game. |
    a photo of one {}. | a doodle of a {}. | a close-up photo of the {}. | a photo of a {}. | the origami {}. |
    the {} in a video game. | a sketch of a {}. | a doodle of the {}. | a origami {}. |
    a low resolution photo of a {}. | the toy {}. | a rendition of the {}. | a photo of the clean {}. |
    a photo of a large {}. | a rendition of a {}. | a photo of a nice {}. | a photo of a weird {}. |
    a blurry photo of a {}. | a cartoon {}. | art of a {}. | a sketch of the {}. | a embroidered {}. |
    a pixelated photo of a {}. | itap of the {}. | a jpeg corrupted photo of the {}. | a good photo of a {}. |
    a plushie {}. | a photo of the nice {}. | a photo of the small {}. | a photo of the weird {}. |
    the cartoon {}. | art of the {}. | a drawing of the {}. | a photo of the large {}. |
    a black and white photo of a {}. | the plushie {}. | a dark photo of a {}. | itap of a {}. |
    graffiti of the {}. | a toy {}. | itap of my {}. | a photo of a cool {}. | a photo of a small {}. |
    a tattoo of the {}.""")
TEMPLATES_85 = TEMPLATES_80 + split_templates("""
    there is a {} in the scene. | there is the {} in the scene. | this is a {} in the scene. |
    this is the {} in the scene. | this is one {} in the scene.""")


def find_templates(text: str) -> tuple[str, ...]:
    """What --templates says: 7, 80, 85, a file with a template a line, or one template such as "a photo of a {}."."""
    known = {"7": TEMPLATES_7, "80": TEMPLATES_80, "85": TEMPLATES_85}
    if text in known:
        return known[text]
    return checked_templates((text,) if "{" in text else read_lines(text, "templates"))


def checked_templates(templates):
    for template in templates:
        if template.count("{}") != 1 or template.count("{") + template.count("}") != 2:
            raise UserError(f"template {template!r} must have one {{}}, where the class name goes, and no other brace")
    return tuple(templates)


# Class names in the order of the labels, in the words of DenseCLIP's protocol (github.com/chongzhou96/MaskCLIP,
# tools/maskclip_utils/prompt_engineering.py).  Others, such as "wall-brick" or "tvmonitor", move the result by points.
ADE20K = (
    "wall,building,sky,floor,tree,ceiling,road,bed,windowpane,grass,cabinet,sidewalk,person,earth,door,table,"
    "mountain,plant,curtain,chair,car,water,painting,sofa,shelf,house,sea,mirror,rug,field,armchair,seat,fence,desk,"
    "rock,wardrobe,lamp,bathtub,railing,cushion,base,box,column,signboard,chest of drawers,counter,sand,sink,"
    "skyscraper,fireplace,refrigerator,grandstand,path,stairs,runway,case,pool table,pillow,screen door,stairway,"
    "river,bridge,bookcase,blind,coffee table,toilet,flower,book,hill,bench,countertop,stove,palm,kitchen island,"
    "computer,swivel chair,boat,bar,arcade machine,hovel,bus,towel,light,truck,tower,chandelier,awning,streetlight,"
    "booth,television receiver,airplane,dirt track,apparel,pole,land,bannister,escalator,ottoman,bottle,buffet,"
    "poster,stage,van,ship,fountain,conveyer belt,canopy,washer,plaything,swimming pool,stool,barrel,basket,"
    "waterfall,tent,bag,minibike,cradle,oven,ball,food,step,tank,trade name,microwave,pot,animal,bicycle,lake,"
    "dishwasher,screen,blanket,sculpture,hood,sconce,vase,traffic light,tray,ashcan,fan,pier,crt screen,plate,"
    "monitor,bulletin board,shower,radiator,glass,clock,flag").split(",")
PASCAL_CONTEXT = (
    "airplane,bag,bed,bedclothes,bench,bicycle,bird,boat,book,bottle,building,bus,cabinet,car,cat,ceiling,chair,"
    "cloth,computer,cow,cup,curtain,dog,door,fence,floor,flower,food,grass,ground,horse,keyboard,light,motorbike,"
    "mountain,mouse,person,plate,platform,potted plant,road,rock,sheep,shelves,sidewalk,sign,sky,snow,sofa,table,"
    "track,train,tree,truck,tv monitor,wall,water,window,wood").split(",")
COCO_STUFF = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,"
    "wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,"
    "chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,"
    "toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush,banner,blanket,branch,"
    "bridge,building,bush,cabinet,cage,cardboard,carpet,ceiling,tile ceiling,cloth,clothes,clouds,counter,cupboard,"
    "curtain,desk,dirt,door,fence,marble floor,floor,stone floor,tile floor,wood floor,flower,fog,food,fruit,"
    "furniture,grass,gravel,ground,hill,house,leaves,light,mat,metal,mirror,moss,mountain,mud,napkin,net,paper,"
    "pavement,pillow,plant,plastic,platform,playingfield,railing,railroad,river,road,rock,roof,rug,salad,sand,sea,"
    "shelf,sky,skyscraper,snow,solid,stairs,stone,straw,structural,table,tent,textile,towel,tree,vegetable,"
    "brick wall,concrete wall,wall,panel wall,stone wall,tile wall,wood wall,water,waterdrops,blind window,window,"
    "wood").split(",")


def fingerprint(words: Iterable[str]) -> str:
    """Eight digits that tell one list of class names or templates from another."""
    return hashlib.sha256("\n".join(words).encode(errors="surrogatepass")).hexdigest()[:8]


# ---------------------------------------------------------------------------------------------------------------------
# All data sets: one line of FORMATS each, and how several become one
# ---------------------------------------------------------------------------------------------------------------------

class Format(NamedTuple):
    """A kind of data set: how its SPEC is written; for which tasks it is there, the one that shows most of it first;
    and the function of what follows KIND: in a SPEC, with split, task, size and cache as open_data has them."""
    spec: str
    tasks: tuple[str, ...]
    open: Callable


FORMATS = {
    "shapes": Format("shapes", ("captions", "retrieval", "classes", "segmentation", "detection"), shapes),
    "shards": Format("shards:PATH-{00000..00999}.tar", ("captions", "retrieval"), Shards),
    "csv": Format("csv:FILE", ("captions", "retrieval"), csv_file),
    "folder": Format("folder:DIR", ("captions", "classes"), folder),
    "coco": Format("coco:DIR", ("captions", "retrieval", "detection"), coco),
    "flickr30k": Format("flickr30k:DIR", ("captions", "retrieval"), flickr30k),
    "ade20k": Format("ade20k:DIR", ("segmentation",), partial(
        LabelMaps, above="ADEChallengeData2016", parts=("training", "validation"), images="images/{}",
        maps="annotations/{}", classes=ADE20K, reduce_zero_label=True)),
    "pascal-context": Format("pascal-context:DIR", ("segmentation",), partial(
        LabelMaps, above="VOC2010", images="JPEGImages", maps="SegmentationClassContext",
        listing="ImageSets/SegmentationContext/{}.txt", classes=PASCAL_CONTEXT, reduce_zero_label=True)),
    "coco-stuff": Format("coco-stuff:DIR", ("segmentation",), partial(
        LabelMaps, above="coco_stuff164k", images="images/{}2017", maps="annotations/{}2017",
        classes=COCO_STUFF, label_of=COCO_STUFF_LABEL)),
    "voc": Format("voc:DIR", ("segmentation",), partial(
        LabelMaps, above="VOC2012", images="JPEGImages", maps="SegmentationClass",
        listing="ImageSets/Segmentation/{}.txt")),
    "icinw": Format("icinw:DIR", ("icinw",), icinw),
}


def specs(task: str | None = None) -> str:
    """ "shapes, shards:PATH-{00000..00999}.tar, ...": what can be opened for a task, or at all."""
    return ", ".join(format.spec for format in FORMATS.values() if task in (None, *format.tasks))


def kind_of(spec: str) -> str:
    """The name in FORMATS of what `spec` names."""
    kind = spec.partition(":")[0]
    if kind not in FORMATS:
        raise UserError(f"cannot open {spec!r}: wanted {specs()}")
    return kind


def only_shapes(specs: tuple[str, ...]) -> bool:
    """Whether there are data sets and all are the Shapes world: a model of these reads few words, and of no photo."""
    return bool(specs) and all(spec.partition(":")[0] == "shapes" for spec in specs)


def same_but_moved(specs: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Whether SPECs differ in nothing but the paths of files and folders."""
    def rest(spec: str) -> str:                          # csv:FILE,image=COLUMN -> csv,image=COLUMN
        return spec if only_shapes((spec,)) else re.sub(":.*?(,(image|caption)=|$)", r"\1", spec, count=1)
    return [rest(str(spec)) for spec in specs or ()] == list(map(rest, others))


def open_data(spec: str, split: str | None = None, task: str = "captions", size: int | None = None,
              cache: str | Path | None = None):
    """The data set that `spec` names, of a format that has the task.

    split   "train", "val" or "test", where the data has splits; default "test" for retrieval, else "train"
    size    side in pixels of images that are drawn, if spec does not say
    cache   folder for the indices of shards
    """
    format = FORMATS[kind_of(spec)]
    if task not in format.tasks:
        raise UserError(f"cannot open {spec!r} for {task}: wanted {specs(task)}")
    split = split or ("test" if task == "retrieval" else "train")
    rest = os.path.expanduser(spec.partition(":")[2])
    return format.open(rest, split=split, task=task, size=size, cache=cache)


def open_for_reading(spec, split, task=None):
    """What `spec` names, for the task or the first that it can be opened for: a list, as icinw: is many."""
    for task in [task] if task else FORMATS[kind_of(spec)].tasks:
        try:
            data = open_data(spec, split, task)
            return [one.data for one in data[0]] if task == "icinw" else [data]
        except Absent as error:
            problem = error
    raise problem


class Mixed:
    """Several data sets one after the other: an epoch sees each record once, so they mix in proportion to size."""

    def __init__(self, parts: list):
        self.parts, self.ends = parts, list(itertools.accumulate(map(len, parts)))
        self.classes = parts[0].classes if all(part.classes == parts[0].classes for part in parts) else None
        self.notes = [note for part in parts for note in part.notes]
        self.names_classes = any(getattr(part, "names_classes", False) for part in parts)

    def __len__(self):
        return self.ends[-1]

    def place(self, i):
        k = bisect.bisect_right(self.ends, i)
        return self.parts[k], i - self.ends[k] + len(self.parts[k])

    def name(self, i):
        part, k = self.place(i)
        return part.name(k)

    def read(self, i: int) -> Sample:
        part, k = self.place(i)
        return part.read(k)


def name_classes(parts: list, excluded=()) -> list:
    """Has folders of classes among the data sets read as pairs, for UniCL.

    The captions of an image are its class's name in each of 80 templates, and its text_label is its class over all data
    sets; those with one list of classes share its labels.  excluded: names of folders whose images are left out.
    """
    first = {}                                           # list of classes -> text_label of the first of them
    for data in parts:
        if isinstance(data, ImageFiles) and data.classes:
            want_names(data, f"folder:{data.root}")
            data.names_classes = True
            data.text_label = first.setdefault(tuple(data.classes), sum(map(len, first)))
            if excluded:
                leave_out(data, set(excluded))
    if excluded and not first:
        raise UserError("--exclude-classes leaves out folders of folder:DIR, and --data names none")
    return parts


def leave_out(data, folders):
    """Takes the images in folders of these names out of the data, and notes how many that were."""
    found, kept = set(), []
    for i in range(len(data)):
        own = folders.intersection(data.name(i).split("/"))
        found |= own
        if not own:
            kept.append(data.records[i])
    if not found:
        raise UserError(f"{data.root} has none of the {len(folders)} folders to leave out, such as {min(folders)}")
    data.notes += [f"{len(data) - len(kept):,} images left out: {data.root} has {len(found)} of the {len(folders)} "
                   f"folders to leave out"]
    data.records = Packed(kept)


def hash_names(data) -> str:
    """sha256 of the names of all records, in order: the same list of names, whatever pixels and captions they have.
    That of shards is kept beside their indices."""
    kept, digest = getattr(data, "hash_file", None), hashlib.sha256()
    if kept and isfile(kept) and os.path.getsize(kept) == 2 * digest.digest_size:       # a power cut leaves it empty
        return Path(kept).read_text()
    for i in progress(range(len(data)), len(data), "names hashed"):
        digest.update(f"{data.name(i)}\n".encode())
    if kept:
        with contextlib.suppress(OSError):
            write_whole(kept, digest.hexdigest().encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Looking at data: `python data.py preview` draws a contact sheet, `python data.py check` reads everything
# ---------------------------------------------------------------------------------------------------------------------

CELL = 224       # side of a picture in the contact sheet, pixels


def sheet(rows: list[list[tuple[str, Image.Image]]], width: int, height: int | None = None) -> Image.Image:
    """Rows of (text, picture): each picture, made as large as fits width x height (default: a square), below the lines
    of its text."""
    height, gap, line = height or width, 6, 18
    head = line * max(text.count("\n") + 1 for row in rows for text, _ in row)
    across, down = width + gap, head + height + gap
    page = Image.new("RGB", (across * max(map(len, rows)), down * len(rows)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for i, row in enumerate(rows):
        for j, (text, picture) in enumerate(row):
            x, y = j * across, i * down + head
            pen.multiline_text((x, y - 3), text, "black", font, anchor="ld")
            page.paste(ImageOps.contain(picture, (width, height), Image.Resampling.NEAREST), (x, y))
    return page


def preview(data, out: str):
    """Writes a contact sheet of 24 records drawn at random: pictures below their caption or class, or why it is bad."""
    rng, cards = np.random.default_rng(0), []
    for i in rng.choice(len(data), min(24, len(data)), replace=False).tolist():
        try:
            sample = data.read(i)
            picture = decode(sample.image)
            picture.thumbnail((CELL, CELL), BICUBIC)
            text = (pick_caption(sample, rng) if sample.captions else
                    data.classes[sample.label] if data.classes and sample.label >= 0 else data.name(i))
        except BadRecord as error:
            picture = Image.new("RGB", (CELL, CELL), "lightgray")
            text = f"BAD {data.name(i)}: {error}"
        cards.append(("\n".join(textwrap.wrap(text, CELL // 8)[:4]), picture))
    sheet([cards[k:k + 6] for k in range(0, len(cards), 6)], CELL).save(out)
    say(f"wrote {out}: {len(cards)} of {len(data)} records")


def inspect(sample, rng, tokenizer):
    """What `check` wants to know of a record, after a full read: tokens of the captions, with start and end token."""
    decode(sample.image)
    return dict(tokens=list(map(tokenizer.length, sample.captions)))


def check(data, tokenizer: BytePairTokenizer, context_length: int = 77, workers: int = 0) -> dict:
    """Reads and decodes every record, prints a report and returns it:

    records, bad: how many;  reasons: {reason: count};  captions: how many
    tokens: [fewest, median, most] of a caption;  truncated: captions over `context_length` tokens
    classes: how many, 0 if there are none;  sample_hash: see hash_names;  notes: the data set's own
    bad_records: [(name, reason)] of the first 20
    """
    tokens, bad = [], []
    loader = eval_loader(data, partial(inspect, tokenizer=tokenizer), 64, workers=workers, collate=list)
    for item in progress(itertools.chain.from_iterable(loader), len(data), "records checked"):
        bad += item["bad"]
        tokens += item.get("tokens", ())
    report = dict(records=len(data), bad=len(bad), reasons=dict(Counter(reason.split(":")[0] for _, reason in bad)),
                  captions=len(tokens), tokens=np.quantile(tokens or [0], (0, 0.5, 1)).tolist(),
                  truncated=sum(n > context_length for n in tokens), classes=len(data.classes or ()),
                  sample_hash=hash_names(data))
    for key, value in report.items():
        say(f"{key}: {value}")
    for name, reason in bad[:20]:
        say(printable(f"bad record {name}: {reason}"))
    say_notes(data)
    return dict(report, bad_records=bad[:20], notes=[*data.notes])


def at_least(least: int) -> Callable[[str], int]:
    """A type for argparse: whole numbers from `least`."""
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,9}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"wanted a whole number from {least}, not {text!r}")
        return int(text)
    return parse


def check_folder_of(option: str, path: str):
    """For a file that will be written when the work is done: UserError now if there is no folder for it."""
    folder = os.path.dirname(os.path.abspath(path))
    if path and (isdir(path) or not isdir(folder) or not os.access(folder, os.W_OK)):
        raise UserError(f"{option} {path} cannot be written: wanted a file's name in a folder that exists")


def main(argv: list[str] | None = None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                  allow_abbrev=False)
    cli.add_argument("command", choices=("preview", "check", "bpe"))
    cli.add_argument("text", nargs="*", help="bpe: texts to cut (default: a few captions)")
    cli.add_argument("--data", action="append", metavar="SPEC", help=f"{specs()}; may be repeated (default: shapes)")
    cli.add_argument("--split", default="train", help="train (default), val or test, where the data has splits")
    cli.add_argument("--task", choices=FORMATS["shapes"].tasks, help="what the data are opened for, where they serve "
                     "several (default: the first that they have)")
    cli.add_argument("--out", default="grid.png", help="preview: the picture to write (default: grid.png)")
    cli.add_argument("--bpe", help="check, bpe: CLIP's merges file (default: learn merges from the captions)")
    cli.add_argument("--vocab-size", type=at_least(514), default=1024,
                     help="check, bpe: entries to learn where no --bpe is given (default: 1024)")
    cli.add_argument("--context-length", type=at_least(2), default=77,
                     help="check: tokens; longer captions count as truncated (default: 77)")
    cli.add_argument("--workers", type=at_least(0), default=0, help="check: loader processes (default: 0)")
    cli.add_argument("--json", default="", help="check: file for the report as one JSON object")
    o = cli.parse_intermixed_args(argv)
    check_folder_of("--json", o.json)
    if o.command == "preview":
        check_folder_of("--out", o.out)
        if not is_image(o.out):
            raise UserError(f"--out {o.out} is no picture's name: end it in .png or .jpg")
    data = Mixed([part for spec in o.data or ["shapes"] for part in open_for_reading(spec, o.split, o.task)])
    if o.command == "preview":
        return preview(data, o.out)
    tokenizer = BytePairTokenizer.from_file(o.bpe) if o.bpe else learn_tokenizer(data, o.vocab_size)
    if o.command == "check":
        write_json(o.json, check(data, tokenizer, o.context_length, o.workers))
        for part in data.parts:                 # as training does before its first step
            look_at_labels(part)
        return
    print(f"{tokenizer.vocab_size} entries, {len(tokenizer.merges)} of them merges")
    for text in o.text or first_captions(data, 5):
        ids = tokenizer.encode(text)
        print(f"{text!r}: {len(ids)} tokens  " + " | ".join(tokenizer.decode([i]).strip() for i in ids))


def first_captions(data, records: int) -> list[str]:
    """All captions of the first so many records; bad ones are passed over."""
    captions = []
    count = min(len(data), records)
    for i in progress(range(count), count, "captions read"):
        with contextlib.suppress(BadRecord):
            captions += data.read(i).captions
    return captions


def learn_tokenizer(data, vocab_size: int) -> BytePairTokenizer:
    """Merges learned from the captions of the first five thousand records."""
    return BytePairTokenizer.train(first_captions(data, 5_000), vocab_size)


if __name__ == "__main__":
    run(main)
