"""Dense prediction: which patch features carry meaning, and what can be built on them.

    python dense.py zeroshot [CHECKPOINT]    segmentation without training: each patch against the names of the classes
    python dense.py words    [CHECKPOINT]    pictures of where the words of a caption are     (supplement, Figures 2, 3)
    python dense.py upernet  [CHECKPOINT]    segmentation, fine-tuned with UperNet            (supplement B)
    python dense.py maskrcnn [CHECKPOINT]    boxes and masks, fine-tuned with Mask R-CNN      (supplement B)

Zero-shot features are those of the value path (VisionTransformer.value_features): in the last block softmax attention
would mix all patches, so the identity takes its place, and a patch's feature stays its own.  UperNet takes the outputs
of four blocks as they are and trains everything.  With no options each command runs on the Shapes world.

Letters: B images, N patches, D width, E embedding, as everywhere; p the side of a patch, c channels of a map; of boxes
G objects of an image, A anchors, P proposals, R boxes of all images together, S sets of boxes; n is explained where it
stands.  Shapes say (classes, height, width) for an image at its full size and (classes, h, w) for one that was resized.
Labels count from 0, and are 255 for pixels that do not count.    Check:  python -m pytest tests/test_segmentation.py
"""
import itertools
import json
import math
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.ImageOps
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from data import (BadRecord, MEAN, Records, UserError, decode, eval_loader, fingerprint, has_area, look_at_labels,
                  normalize, only_shapes, open_data, open_image, progress, read_file, run, say, seed_of, sheet,
                  to_tensor, unpack_counts, write_json)
from eval_zeroshot import class_accuracy, confusion, find_templates
from finetune import LoopOptions, find_tower, fine_tune, recipe_for
from losses import gather, mean_over_processes, own_columns, world_size
from model import MaskCLIP, SyncBatchNorm, VisionTransformer, load_checkpoint, opt
from train import (CheckpointOptions, first_look, gather_objects, parse, report_bad, setup, show, tell_shared,
                   written_to)

IGNORED = 255
MEAN_COLOR = tuple(round(255 * mean) for mean in MEAN)                   # is 0 to the model
BILINEAR, NEAREST = PIL.Image.Resampling.BILINEAR, PIL.Image.Resampling.NEAREST


def send(x: Tensor, device) -> Tensor:
    """x on the device; the CPU goes on at once, without waiting for the copy or the device."""
    return x.to(device, non_blocking=True)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, c, h, w) -> (B, c, *size), bilinear."""
    return F.interpolate(maps, size, mode="bilinear")


# ---------------------------------------------------------------------------------------------------------------------
# Labels and mean IoU
# ---------------------------------------------------------------------------------------------------------------------

def labels_of(data, sample) -> np.ndarray:
    """(height, width) uint8; where 0 is no class, as of ADE20K, Pascal Context, Shapes, 0 -> 255, 1 -> 0, 2 -> 1 ..."""
    if not data.reduce_zero_label:
        return sample.label_map
    labels = sample.label_map - np.uint8(1)                         # wraps around: 0 -> 255, as wanted, and 255 -> 254
    labels[labels == 254] = IGNORED
    return labels


def confusion_matrix(truth: Tensor, predicted: Tensor, n_classes: int) -> Tensor:
    """Two label maps -> (classes, classes) counts of pixels, a row for each true class, a column a predicted one."""
    is_known = truth != IGNORED
    return confusion(predicted[is_known].long(), truth[is_known].long(), n_classes)


def best_class(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """scores (classes, h, w), resized -> (height, width), the class that has most; one by one, for memory"""
    best, label = scores.new_full(size, -math.inf), torch.zeros(size, dtype=torch.long, device=scores.device)
    for k, score in enumerate(scores):
        score = resize(score[None, None], size)[0, 0]                                       # (height, width)
        label[score > best] = k
        best = best.maximum(score)
    return label


def mean_iou(counts: Tensor) -> tuple[float, Tensor, float]:
    """(classes, classes) counts over a whole data set -> mIoU, (classes,) IoU of each class, accuracy over all pixels.

    IoU = both / (true + predicted - both); NaN for a class that is neither true nor predicted, and not in the mean.
    """
    both, true, predicted = counts.diag().double(), counts.sum(dim=1), counts.sum(dim=0)
    iou = both / (true + predicted - both)
    return iou.nanmean().item(), iou, (both.sum() / true.sum()).item()


# ---------------------------------------------------------------------------------------------------------------------
# From an image of any size to scores for each of its pixels
# ---------------------------------------------------------------------------------------------------------------------

def fitted_sides(width: int, height: int, short: float, long: float) -> tuple[int, int]:
    """(width, height), the shape kept, as large as a short side of at most `short` and a long one of `long` allow."""
    scale = min(short / min(width, height), long / max(width, height))
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))


def scaled_sides(width: int, height: int, size: float) -> tuple[int, int]:
    """The same for a short side of `size`, a long one of 4 times that at most: mmsegmentation's scale (2048, 512)."""
    # paper: 512 x 512, silent on what becomes of the shape; here: as mmsegmentation does
    return fitted_sides(width, height, size, 4 * size)


def starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride` pixels, the last one moved back to end at the border."""
    count = max(size - window + stride - 1, 0) // stride + 1
    return [min(i * stride, size - window) for i in range(count)]


def slide(image: Tensor, predict: Callable[[Tensor], Tensor], window: int, stride: int) -> Tensor:
    """image (3, height, width) -> scores (classes, height, width), averaged where windows overlap.

    predict   (1, 3, window, window) -> scores (1, classes, window, window)
    """
    height, width = image.shape[1:]
    image = F.pad(image, (0, max(0, window - width), 0, max(0, window - height)))      # with the mean color, which is 0
    total, count = None, torch.zeros(image.shape[1:], device=image.device)
    for y, x in itertools.product(starts(image.shape[1], window, stride), starts(image.shape[2], window, stride)):
        area = (..., slice(y, y + window), slice(x, x + window))
        scores = predict(image[area][None])[0].float()                              # (classes, window, window)
        if total is None:
            total = scores.new_zeros(len(scores), *image.shape[1:])
        total[area] += scores
        count[area] += 1
    return (total / count)[:, :height, :width]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

COLORS = np.random.default_rng(4).integers(256, size=(256, 3), dtype=np.uint8)    # of classes: the first differ most
COLORS[IGNORED] = 0


def draw_labels(image: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> list[tuple]:
    """image (h, w, 3), two label maps (height, width) -> (text, picture) of each, darker where no truth is known."""
    shade = np.where(truth == IGNORED, 3, 1).astype(np.uint8)[:, :, None]
    pictures = dict(image=image, truth=COLORS[truth], prediction=COLORS[predicted] // shade)
    return [(text, PIL.Image.fromarray(pixels)) for text, pixels in pictures.items()]


# ---------------------------------------------------------------------------------------------------------------------
# The test that zero-shot segmentation and UperNet share
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class EvalOptions(CheckpointOptions):
    """What all commands take that are tested on labels."""
    draw: int = opt(8, "how many test images are drawn into a picture in OUT, truth beside prediction")
    limit: int = opt(0, "how many images to test on, 0: all", "test")
    ignore_exif: bool = opt(False, "labels fit the pixels as stored, before EXIF turns them; asked where the sizes of "
                            "image and labels fit both ways", "data")


@dataclass
class SegmentationOptions(EvalOptions):
    data: str = opt("shapes:objects=2-4", "shapes, ade20k:DIR, pascal-context:DIR, coco-stuff:DIR or voc:DIR")
    test_size: int = opt(0, "short side of test images, pixels; 0: as the paper, in proportion to the input", "test")


def folder_for_pictures(options: CheckpointOptions, name: str) -> Path:
    """OUT or runs/NAME, made; UserError now where it cannot be written, and not when the pictures are there."""
    out = Path(options.out or f"runs/{name}")
    with written_to(out):
        tempfile.TemporaryFile(dir=out).close()
    return out


def open_labels(options: EvalOptions, split: str, task: str, size: int):
    data = open_data(options.data, split, task, size=size)
    data.ignore_exif = options.ignore_exif
    return data


def number_asked(data, options: EvalOptions) -> int:
    return min(options.limit or len(data), len(data))


@dataclass
class ResizeTransform:
    """A record of data -> images, uint8 (3, h, w), resized; labels (height, width), as they are."""
    data: object
    short: int
    long: int

    def __call__(self, sample, rng) -> dict:
        image = decode(sample.image)
        image = image.resize(fitted_sides(*image.size, self.short, self.long), BILINEAR)
        return dict(images=to_tensor(image), labels=labels_of(self.data, sample))


def each_test_image(data, transform, options: EvalOptions, runtime):
    """This process's share of the test images, the first --limit, in batches of one; bad ones are told and left out."""
    loader = eval_loader(data, transform, 1, runtime.rank, runtime.world, runtime.workers)
    count = len(range(runtime.rank, number_asked(data, options), runtime.world))
    for batch in progress(itertools.islice(loader, count), count, "images tested", runtime.is_main):
        report_bad(batch["bad"])
        if "images" in batch:
            yield batch


@torch.no_grad()
def evaluate(predict: Callable[[Tensor], Tensor], window: int, stride: int, sides: tuple[int, int], data,
             options: SegmentationOptions, runtime, out: Path, protocol: dict) -> dict:
    """Tests predict, as `slide` has it, on images resized to a short and a long side of `sides` at most, against all
    labels at their own size; prints, draws and writes:

    miou, accuracy, class_accuracy (its mean over classes), images, bad (records), iou [{index, class, iou: None for
    NaN}], as names may occur twice, and the protocol that these numbers depend on
    """
    names, n_images, drawn, started = list(data.classes), 0, [], time.monotonic()
    counts = torch.zeros(len(names), len(names), dtype=torch.long, device=runtime.device)
    for batch in each_test_image(data, ResizeTransform(data, *sides), options, runtime):
        with runtime.autocast():
            images = normalize(batch["images"].to(runtime.device))                               # (1, 3, h, w)
            scores = slide(images[0], predict, window, stride)                                   # (classes, h, w)
        truth = torch.from_numpy(batch["labels"][0]).to(runtime.device)                          # (height, width)
        predicted = best_class(scores, truth.shape)                                              # (height, width)
        counts += confusion_matrix(truth, predicted, len(names))
        n_images += 1
        if len(drawn) < options.draw:
            pixels = batch["images"][0].permute(1, 2, 0).numpy()
            drawn.append(draw_labels(pixels, truth.cpu().numpy(), predicted.cpu().numpy()))
    counts, n_images = map(sum, zip(*gather_objects((counts.cpu(), n_images), runtime)))
    if not counts.any():
        raise UserError(f"no pixel of {n_images} readable test images of {options.data} has a label")
    miou, iou, accuracy = mean_iou(counts)
    protocol = dict(data=options.data, resized_to="short {}, long {}".format(*sides), window=window, stride=stride,
                    **protocol, classes=f"{len(names)} ({fingerprint(names)})",
                    label_0="left out" if data.reduce_zero_label else names[0])
    results = dict(miou=miou, accuracy=accuracy, class_accuracy=class_accuracy(counts).nanmean().item(),
                   images=n_images, bad=number_asked(data, options) - n_images, protocol=protocol,
                   iou=[{"index": k, "class": name, "iou": None if math.isnan(value) else value}
                        for k, (name, value) in enumerate(zip(names, iou.tolist()))])
    if runtime.is_main:
        say("protocol  " + "   ".join(f"{key.replace('_', ' ')} {value}" for key, value in protocol.items()))
        say(f"mIoU {miou:.1%}   accuracy {accuracy:.1%}   class accuracy {results['class_accuracy']:.1%}   "
            f"({n_images} images, {results['bad']} bad, {time.monotonic() - started:.0f} s)")
        write_json(options.json, dict(results, task="segmentation"))
        out.mkdir(parents=True, exist_ok=True)
        if drawn:
            show("maps.png", out, sheet, drawn, 192)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Zero-shot segmentation: the class whose name is nearest to the patch
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class ZeroShotOptions(SegmentationOptions):
    templates: str = opt("auto", "sentences around a name: 85, 80, 7, a file, or one with {}; auto: 85 (paper), for "
                         "a model trained on shapes a {}", "test")
    path: str = opt("code", "a patch's feature: its value with the last block's residual and MLP, as DenseCLIP's code, "
                    "or the value alone, as its text says", "test", ("code", "plain"))


def patch_scores(model: MaskCLIP, texts: Tensor, path: str) -> Callable[[Tensor], Tensor]:
    """texts (classes, E), unit length -> function (n, 3, h, w) -> (n, classes, h, w), cosines of patches, upsampled."""
    def predict(images: Tensor) -> Tensor:
        h, w = images.shape[2:]
        patches = model.encode_patches(images, path)                                           # (n, N, E)
        with torch.autocast(images.device.type, enabled=False):      # ranked: rounded to bf16, many would tie
            cosine = patches.float() @ texts.float().T                                         # (n, N, classes)
        grid = h // model.config.patch_size, w // model.config.patch_size
        return resize(cosine.transpose(1, 2).unflatten(2, grid), (h, w))
    return predict


def zeroshot(argv=None):
    options = parse(ZeroShotOptions, __doc__, argv, positional=("checkpoint",), command="zeroshot")
    runtime, out = setup(options), folder_for_pictures(options, "zeroshot-segmentation")
    model, tokenizer, config = load_checkpoint(options.checkpoint, runtime.device)
    # paper: 512, for windows of 224 with stride 112, so that positions are never resized, and Pascal Context 480; here,
    # for Pascal Context, sides of 520 at most, because the config it follows, DenseCLIP's named 480x480, tests so; for
    # shapes, windows two thirds of the image's side, because objects are large in the picture
    window, spec = config.image_size, options.data
    short = options.test_size or (3 * window // 2 if only_shapes((spec,)) else 512 * window // 224)
    sides = short, 4 * short                                                                     # as scaled_sides
    if not options.test_size and spec.startswith("pascal-context"):
        sides = 520 * window // 224, 520 * window // 224
    templates = find_templates(model, options.templates, "85")
    data = open_labels(options, "val", "segmentation", short)
    look_at_labels(data, None, runtime.is_main)
    texts = model.encode_classes(progress(data.classes, len(data.classes), "classes embedded", runtime.is_main),
                                 templates, tokenizer)                                           # (classes, E)
    evaluate(patch_scores(model, texts, options.path), window, window // 2, sides, data, options, runtime, out,
             dict(checkpoint=options.checkpoint, method=config.method, path=options.path,
                  templates=f"{len(templates)} ({fingerprint(templates)})"))


# ---------------------------------------------------------------------------------------------------------------------
# Word-image maps: where the words of a caption are
# ---------------------------------------------------------------------------------------------------------------------

FUNCTION_WORDS = set("a an the and or plus of in on at to by with from for below under above left right top bottom "
                     "corner there is are its two three four five six photo picture image drawing background".split())


@dataclass
class WordOptions(CheckpointOptions):
    compare: str = opt("", "another checkpoint, whose maps stand beside")
    data: str = opt("shapes", "data set with captions, as train.py reads it")
    samples: int = opt(6, "how many records, drawn by --seed")
    image: str = opt("", "file of an image to take instead of records")
    caption: str = opt("", "its caption")
    words: str = opt("", "words or phrases to look for, with commas; empty: those of the caption that mean something")
    templates: str = opt("auto", "sentences around a word, as for zeroshot (paper silent)")
    path: str = opt("plain", "a patch's feature, as for zeroshot (paper silent)", choices=("code", "plain"))


def words_of(caption: str, unit: str = "word") -> list[str]:
    """The different words of a caption, in order, without those that stand for nothing one could point at.

    unit "phrase": words with none of those, and no comma, between them stay together: "small red circle".
    """
    def is_thing(word: str) -> bool:
        return word[0].isalnum() and word not in FUNCTION_WORDS
    words = re.findall(r"\w[\w'-]*|[^\w\s]", caption.lower())
    runs = [list(run) for are_things, run in itertools.groupby(words, is_thing) if are_things]
    found = [" ".join(run) for run in runs] if unit == "phrase" else itertools.chain(*runs)
    return list(dict.fromkeys(found))


@torch.no_grad()
def text_maps(model: MaskCLIP, image: PIL.Image.Image, texts: Tensor, path: str) -> np.ndarray:
    """RGB image, texts (classes, E) -> (classes, height, width) float32, cosine of text and patch, upsampled.

    # paper: shows such maps, silent on how they are made; here: scores of zero-shot segmentation, phrases for classes
    """
    window = model.config.image_size
    pixels = to_tensor(image.resize(scaled_sides(*image.size, window), BILINEAR))
    pixels = normalize(pixels[None].to(model.logit_scale.device))[0]                     # (3, h, w)
    maps = slide(pixels, patch_scores(model, texts, path), window, window // 2)
    return resize(maps[None], image.size[::-1])[0].cpu().numpy()


def pointing_game(model: MaskCLIP, tokenizer, world, count: int, templates: tuple[str, ...],
                  path: str) -> tuple[float, float]:
    """How often the highest point of a class's map lies on an object of that class (Zhang et al. 2018), over the
    classes in the first `count` scenes; and the share of the picture that such objects cover, which is chance."""
    texts, hits, shares = model.encode_classes(world.classes, templates, tokenizer), [], []
    for sample in map(world.read, progress(range(count), count, "scenes")):
        maps = text_maps(model, sample.image, texts, path)              # (classes, height, width)
        for label in np.unique(sample.label_map[sample.label_map > 0]):
            there = sample.label_map == label                                                        # (height, width)
            hits.append(there.flat[maps[label - 1].argmax()])
            shares.append(there.mean())
    return float(np.mean(hits)), float(np.mean(shares))


def overlay(image: PIL.Image.Image, values: np.ndarray, low: float, high: float) -> PIL.Image.Image:
    """values (height, width) from blue (low) by green to red (high), over the image in gray."""
    share = 255 * (values - low) / max(high - low, 1e-6)
    colors = PIL.ImageOps.colorize(PIL.Image.fromarray(share.astype(np.uint8)), "navy", "red", mid="limegreen")
    return PIL.Image.blend(image.convert("L").convert("RGB"), colors, 0.6)


def draw_words(image: PIL.Image.Image, caption: str, phrases: list[str], maps: np.ndarray, models: list[str]) -> list:
    """maps (models, phrases, height, width) -> (text, picture): the image below its caption, then each phrase, by each
    model.

    A phrase's colors go from its least to its greatest value over all models.
    """
    pictures = [(caption + "\n\n", image)]                                  # above the two lines of all others
    for j, phrase in enumerate(phrases):
        for values, name in zip(maps[:, j], models):
            pictures.append((f"{phrase}\n{name}", overlay(image, values, maps[:, j].min(), maps[:, j].max())))
    return pictures


def captioned_images(options: WordOptions, size: int) -> list[tuple[PIL.Image.Image, str]]:
    """(RGB image, caption) of the file, or of records drawn by the seed; bad ones are named and left out."""
    if options.caption and not options.image:
        raise UserError("--caption is of --image FILE: give both")
    if options.image:
        try:
            return [(decode(open_image(read_file(options.image))), options.caption)]
        except BadRecord as error:
            raise UserError(f"--image {options.image}: {error}") from None
    data = open_data(options.data, "val", "captions", size=size)
    records = Records(data, lambda sample, rng: dict(pair=(decode(sample.image), (*sample.captions, "")[0])))
    order, count = np.random.default_rng(options.seed).permutation(len(data)).tolist(), options.samples
    items = [records[(0, *order[k::count])] for k in range(min(count, len(data)))]     # the first of each that is good
    report_bad([bad for item in items for bad in item["bad"]])
    return [item["pair"] for item in items if "pair" in item]


def words(argv=None):
    options = parse(WordOptions, __doc__, argv, positional=("checkpoint",), command="words")
    runtime = setup(options)
    if not runtime.is_main:                                 # a few pictures are not worth sharing
        return
    out = folder_for_pictures(options, "words")
    paths = [path for path in (options.checkpoint, options.compare) if path]
    loaded = [load_checkpoint(path, runtime.device)[:2] for path in paths]              # model and tokenizer of each
    methods, model = [model.config.method for model, _ in loaded], loaded[0][0]
    names = paths if len(set(methods)) < len(methods) else methods
    templates = find_templates(model, options.templates, "85")
    # paper: words; here: of a model trained on shapes phrases, because it has read no form without its color
    unit = "phrase" if only_shapes(model.trained_on) else "word"
    asked = [phrase.strip() for phrase in options.words.split(",") if phrase.strip()]
    pictures, rows = captioned_images(options, model.config.image_size), []
    for image, caption in progress(pictures, len(pictures), "pictures"):
        phrases = asked or words_of(caption, unit)
        if not phrases:
            say(f"skipped: nothing to look for in the caption {caption!r}")
            continue
        maps = np.stack([text_maps(model, image, model.encode_classes(phrases, templates, tokenizer), options.path)
                         for model, tokenizer in loaded])                           # (models, phrases, height, width)
        rows.append(draw_words(image, caption, phrases, maps, names))
    if not rows:
        raise UserError("no picture with words to look for: give --words, or --image and --caption")
    show("words.png", out, sheet, rows, 160)
    pointing = {}
    if only_shapes((options.data,)) and not options.image:                     # where the truth is known
        for name, (model, tokenizer) in zip(names, loaded):
            world = open_data(options.data, "val", "segmentation", size=model.config.image_size)
            hit, chance = pointing_game(model, tokenizer, world, min(200, len(world)), templates, options.path)
            say(f"{name}: the highest point of a class's map lies on an object of that class {hit:.1%} of the time "
                f"(chance {chance:.1%})")
            pointing[name] = dict(hit=hit, chance=chance)
    write_json(options.json, dict(pointing, task="words"))


# ---------------------------------------------------------------------------------------------------------------------
# The pyramid: one scale of a ViT made four
# ---------------------------------------------------------------------------------------------------------------------

class Pyramid(nn.Module):
    """Outputs of four blocks of a ViT with patches of p pixels, at strides p/4, p/2, p, 2p (4, 8, 16, 32 for p = 16).

    # paper: blocks 4, 6, 8, 12, counted from 1; here: in a tower of another depth, those in proportion
    No norm follows them (as in BEiT and iBOT), so the tower's final one goes: DDP wants a gradient for each parameter.
    # paper: silent on positions; here: UperNet resizes them once and trains the result, as BEiT's line does, because
    # its crops are all of one size; Mask R-CNN resizes those of pre-training for each canvas
    """
    def __init__(self, visual: VisionTransformer):
        super().__init__()
        self.visual = visual
        self.visual.norm = nn.Identity()
        depth, D = len(visual.blocks), visual.cls_token.shape[-1]
        self.taps = [max(1, round(block * depth / 12)) for block in (4, 6, 8, 12)]
        self.up4 = nn.Sequential(nn.ConvTranspose2d(D, D, 2, stride=2), SyncBatchNorm(D), nn.GELU(),
                                 nn.ConvTranspose2d(D, D, 2, stride=2))
        self.up2 = nn.ConvTranspose2d(D, D, 2, stride=2)
        self.down2 = nn.MaxPool2d(2, stride=2)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, height, width), sides multiples of p -> four maps (B, D, ., .), the finest first"""
        grid = [side // self.visual.patch_size for side in images.shape[2:]]
        outputs = dict(zip(sorted(set(self.taps)), self.visual.block_outputs(images, self.taps)))    # (B, 1+N, D) each
        a, b, c, d = (outputs[tap][:, 1:].transpose(1, 2).unflatten(2, grid) for tap in self.taps)   # (B, D, *grid)
        return [self.up4(a), self.up2(b), c, self.down2(d)]


def add_coarser(maps: list[Tensor], enlarge: Callable) -> list[Tensor]:
    """Maps (B, c, ., .) of a pyramid, the finest first -> each with the sum of the coarser ones, enlarged, added."""
    sums = [maps[-1]]
    for x in maps[-2::-1]:
        sums.insert(0, x + enlarge(sums[0], x.shape[2:]))
    return sums


def initialize(layers: Iterable[nn.Module], init: Callable, **how):
    """Weights by init, biases 0."""
    for layer in layers:
        init(layer.weight, **how)
        nn.init.zeros_(layer.bias)


# ---------------------------------------------------------------------------------------------------------------------
# UperNet (Xiao et al. 2018) on the pyramid
# ---------------------------------------------------------------------------------------------------------------------

def conv_norm(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    # paper: silent on the start; here: mmcv's, because the supplement follows BEiT, which runs on it
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, SyncBatchNorm(outputs), nn.ReLU())


class ChannelDropout(nn.Dropout2d):
    """nn.Dropout2d whose draw is one for the images of all processes, of which ours are taken: (B, c, h, w)"""

    def forward(self, x: Tensor) -> Tensor:
        draw = super().forward(x.new_ones(world_size() * len(x), x.shape[1], 1, 1))
        return x * draw[own_columns(len(x), x.device)]


class UperNet(nn.Module):
    """Pyramid pooling of the coarsest map, a path from coarse to fine that adds the other three, and all four fused.

    # paper: silent on the head's width; here: 768, as in BEiT, iBOT and BootMAE, and not mmsegmentation's 512
    """
    def __init__(self, visual: VisionTransformer, n_classes: int, channels: int = 768, aux_channels: int = 256,
                 dropout: float = 0.1):
        super().__init__()
        D, c = visual.cls_token.shape[-1], channels
        self.pyramid = Pyramid(visual)
        self.pools = nn.ModuleList([nn.Sequential(nn.AdaptiveAvgPool2d(n), conv_norm(D, c, 1)) for n in (1, 2, 3, 6)])
        self.top = conv_norm(D + 4 * c, c, 3)
        self.lateral = nn.ModuleList([conv_norm(D, c, 1) for _ in range(3)])
        self.smooth = nn.ModuleList([conv_norm(c, c, 3) for _ in range(3)])
        self.fuse = conv_norm(4 * c, c, 3)
        self.classify = nn.Sequential(ChannelDropout(dropout), nn.Conv2d(c, n_classes, 1))
        self.auxiliary = nn.Sequential(conv_norm(D, aux_channels, 3), ChannelDropout(dropout),
                                       nn.Conv2d(aux_channels, n_classes, 1))
        initialize([self.classify[-1], self.auxiliary[-1]], nn.init.normal_, std=0.01)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, h, w) -> scores (B, classes, 4h/p, 4w/p); in training the auxiliary head's too, at h/p, w/p"""
        *fine, coarse = self.pyramid(images)
        pooled = [resize(pool(coarse), coarse.shape[2:]) for pool in self.pools]
        levels = [lateral(x) for lateral, x in zip(self.lateral, fine)]                          # (B, c, ., .) each
        levels = add_coarser([*levels, self.top(torch.cat([coarse, *pooled], dim=1))], resize)
        levels[:3] = [smooth(x) for smooth, x in zip(self.smooth, levels)]
        x = self.fuse(torch.cat([resize(x, levels[0].shape[2:]) for x in levels], dim=1))        # (B, c, 4h/p, 4w/p)
        with torch.autocast(x.device.type, enabled=False):           # ranked: rounded to bf16, many would tie
            scores = self.classify(x.float())
        return scores, self.auxiliary(fine[2]) if self.training else None

    def predict(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, classes, h, w)"""
        return resize(self(images)[0], images.shape[2:])


# ---------------------------------------------------------------------------------------------------------------------
# Training UperNet: options, augmentation, loss, and the command.  The loop is finetune.fine_tune
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class FineTuneOptions(LoopOptions):
    """The recipe; the defaults are UperNet's."""
    from_scratch: bool = opt(False, "random weights in place of the checkpoint's, as a control", "recipe")
    steps: int = opt(160_000, "length in steps (paper)", "recipe")
    batch_size: int = opt(16, "images a step, over all processes (paper)", "recipe")
    lr: float = opt(2e-4, "peak learning rate (paper)", "recipe")
    warmup_steps: int = opt(1500, "steps of linear warm-up, then linear decay to 0 (paper)", "recipe")
    weight_decay: float = opt(0.05, "AdamW weight decay of matrices (paper)", "recipe")
    layer_decay: float = opt(0.6, "learning rate of a block relative to the one above it (paper)", "recipe")
    drop_path: float = opt(0.1, "stochastic depth: how often the last block is skipped (paper)", "recipe")
    # paper: silent, and follows BEiT; here: none, because BEiT's configs and mmdetection's have none
    clip_grad: float = opt(0.0, "largest gradient norm, 0: no clipping (BEiT, mmdetection; BootMAE's UperNet: 3)",
                           "recipe")


@dataclass
class UperNetOptions(FineTuneOptions, SegmentationOptions):
    recipe: str = opt("auto", "the defaults of all other options: the paper's on ADE20K, or one for a CPU; auto: the "
                      "latter for shapes", "recipe", ("auto", "ade20k", "pocket"))
    crop: int = opt(512, "side of training crops and of test windows, pixels (paper)", "recipe")
    channels: int = opt(768, "width of the head (BEiT, iBOT, BootMAE; mmsegmentation 512; paper silent)", "recipe")
    aux_channels: int = opt(256, "width of the auxiliary head (mmsegmentation)", "recipe")
    test_size: int = opt(512, "short side of test images, and of training images before they are scaled by 0.5 to 2, "
                         "pixels (mmsegmentation)", "recipe")
    distort: bool = opt(True, "photometric distortion of training images (paper)", "recipe")


# paper: nothing so small; here: few steps at a higher rate; colors stay as they are, as they are half of the class.
# Forms are learned suddenly, after some five hundred steps in which the loss tells colors apart only
POCKET = dict(steps=1200, lr=3e-3, warmup_steps=50, clip_grad=3.0, crop=64, test_size=64, channels=48,
              aux_channels=32, distort=False)


def parse_recipe(paper: FineTuneOptions, pocket: dict, name: str, large: str, argv):
    """The command line over the recipe that it, or else the data, names: `large`, the paper's, or pocket."""
    recipe = recipe_for(first_look(type(paper), argv, "recipe", "data"), large)
    defaults = replace(paper, **pocket) if recipe == "pocket" else paper
    options = parse(type(paper), __doc__, argv, positional=("checkpoint",), defaults=defaults, own=large,
                    command=name)
    return replace(options, recipe=recipe, out=options.out or f"runs/{name}-{recipe}")


def parse_upernet(argv=None) -> UperNetOptions:
    return parse_recipe(UperNetOptions(), POCKET, "upernet", "ade20k", argv)


def linear_schedule(step: int, total: int, warmup: int) -> float:
    """Share of the peak rate at step 0 ... total-1: linear from 1 to 0, times a linear rise over `warmup` steps."""
    return (1 - step / total) * min(1.0, 1e-6 + step / max(warmup, 1))


def photometric_distortion(image: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
    """Brightness +-32, contrast and saturation x 0.5 to 1.5, hue +-18 of 180, each for half of the images (SSD)."""
    brightness, contrast, contrast_first, saturation, hue = rng.random(5) < 0.5
    gain = rng.uniform(0.5, 1.5) if contrast else 1
    if brightness:
        offset = rng.uniform(-32, 32)
        image = image.point(lambda value: value + offset)                           # rounded and clipped to 0 ... 255
    if contrast_first:
        image = image.point(lambda value: gain * value)
    if saturation or hue:
        factor = rng.uniform(0.5, 1.5) if saturation else 1
        turn = rng.integers(-18, 18) * 256 / 180 if hue else 0
        h, s, v = image.convert("HSV").split()
        h, s = h.point(lambda value: round(value + turn) % 256), s.point(lambda value: factor * value)
        image = PIL.Image.merge("HSV", (h, s, v)).convert("RGB")
    return image if contrast_first else image.point(lambda value: gain * value)


def on_canvas(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 (3, h, w) -> (3, height, width), the image in the upper left of the mean color."""
    canvas = torch.tensor(MEAN_COLOR, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
    canvas[:, :image.shape[1], :image.shape[2]] = image
    return canvas


@dataclass
class CropTransform:
    """A record, rescaled, cropped, flipped, distorted, padded -> images uint8 (3, crop, crop), labels (crop, crop)."""
    data: object
    size: int
    crop: int
    distort: bool

    def __call__(self, sample, rng: np.random.Generator) -> dict:
        image = decode(sample.image)
        sides = scaled_sides(*image.size, self.size * rng.uniform(0.5, 2))
        labels = np.array(PIL.Image.fromarray(labels_of(self.data, sample)).resize(sides, NEAREST))
        left, top = self.corner(labels, rng)
        labels = labels[top:top + self.crop, left:left + self.crop]
        h, w = labels.shape
        image = image.resize(sides, BILINEAR).crop((left, top, left + w, top + h))
        mirrored = rng.random() < 0.5
        if self.distort:
            image = photometric_distortion(image, rng)
        image, labels = to_tensor(image), torch.from_numpy(labels).long()
        if mirrored:
            image, labels = image.flip(-1), labels.flip(-1)
        labels = F.pad(labels, (0, self.crop - w, 0, self.crop - h), value=IGNORED)
        return dict(images=on_canvas(image, self.crop, self.crop), labels=labels)

    def corner(self, labels: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
        """Left and top of a random crop with several classes, none over 75% of what is labeled; ten redraws at most."""
        for _ in range(1 + 10):
            top, left = (int(rng.integers(max(side - self.crop, 0) + 1)) for side in labels.shape)
            some = labels[top:top + self.crop, left:left + self.crop]
            count = np.bincount(some.ravel(), minlength=256)[:IGNORED]
            if (count > 0).sum() > 1 and count.max() < 0.75 * count.sum():
                break
        return left, top


def pixel_cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """scores (B, classes, h, w), upsampled, against labels (B, height, width): the mean cross-entropy.

    # paper: silent on pixels without a label; here: they add 0 and count in the mean, as in BootMAE's mmsegmentation
    """
    total = F.cross_entropy(resize(scores.float(), labels.shape[1:]), labels, ignore_index=IGNORED, reduction="sum")
    return total / labels.numel()


def begin(options, kind: str, task: str, size: int) -> tuple:
    """What a run of fine-tuning needs before it has its network:

    runtime          which holds the folder OUT from now on
    train, test      the data, which hold something to learn and to measure
    start            where it begins: anew, or with an earlier OUT/last.pt
    config, visual   of the image tower, and the tower
    """
    runtime = setup(options)
    train, test = (open_labels(options, split, task, size) for split in ("train", "val"))
    look_at_labels(test, look_at_labels(train, None, runtime.is_main), runtime.is_main)
    if runtime.is_main:
        tell_shared(train, test)
    return runtime, train, test, *find_tower(options, kind, runtime)


@torch.no_grad()
def resize_positions(visual: VisionTransformer, side: int):
    """The positions become those of a square of `side` pixels, which are trained as such."""
    grid, is_trained = side // visual.patch_size, visual.pos_embed.requires_grad
    positions = torch.cat([visual.pos_embed[:, :1], visual.positions(grid, grid)], dim=1)              # (1, 1+N, D)
    visual.grid, visual.pos_embed = grid, nn.Parameter(positions, is_trained)


def upernet(argv=None):
    options = parse_upernet(argv)
    if options.batch_size < 2:
        raise UserError("--batch-size 1: batch normalization of the coarsest map's mean wants 2 images or more")
    runtime, data, test, start, config, visual = begin(options, "upernet", "segmentation", options.test_size)
    coarsest = 2 * config.patch_size
    if options.crop % coarsest:
        raise UserError(f"--crop {options.crop}: wanted a multiple of two of this network's patches of "
                        f"{config.patch_size} pixels, such as {-(-options.crop // coarsest) * coarsest}")
    resize_positions(visual, options.crop)
    net = UperNet(visual, len(data.classes), options.channels, options.aux_channels).to(runtime.device)

    def losses_of(net: nn.Module, batch: dict, step: int) -> dict[str, Tensor]:
        images, labels = (send(batch[name], runtime.device) for name in ("images", "labels"))
        scores, auxiliary = net(normalize(images))
        return dict(segmentation=pixel_cross_entropy(scores, labels),
                    auxiliary=0.4 * pixel_cross_entropy(auxiliary, labels))        # mmsegmentation's weight

    transform = CropTransform(data, options.test_size, options.crop, options.distort)
    fine_tune(net, losses_of, linear_schedule, data, transform, options, runtime, start,
              dict(kind="upernet", backbone=asdict(config), classes=list(data.classes)))
    stride = options.crop * 2 // 3                                  # 341 of 512, as in BEiT, iBOT and BootMAE
    evaluate(net.predict, options.crop, stride, (options.test_size, 4 * options.test_size), test, options, runtime,
             start.out, dict(checkpoint=options.checkpoint, from_scratch=options.from_scratch, steps=options.steps))


# ---------------------------------------------------------------------------------------------------------------------
# Boxes: IoU, non-maximum suppression, RoIAlign, masks pasted into boxes.  A box is x1, y1, x2, y2 in continuous pixels:
# x2 - x1 is its width, and the center of the first pixel is at 0.5.
# ---------------------------------------------------------------------------------------------------------------------

OUT = -math.inf                # the score of what fills up a set of boxes
NMS_BLOCK = 128                # boxes compared with all others at a time, and
ALIGNED_BOXES = 64             # boxes that roi_align pools at a time: these two bound the memory


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes a (..., n, 4) with b (..., m, 4) -> (..., n, m); 0 for boxes without area."""
    x1, y1, x2, y2 = a.movedim(-1, 0)[..., None]                                   # (..., n, 1) each
    u1, v1, u2, v2 = b.movedim(-1, 0).contiguous()[..., None, :]                   # (..., 1, m) each
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp(min=0)           # (..., n, m)
    height = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp(min=0)
    shared = width * height
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - shared
    return shared / union.clamp(min=torch.finfo(union.dtype).tiny)


def suppress(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression in S sets of boxes (S, n, 4) with scores (S, n) -> (S, n) bool, True for a box kept.

    Going down the scores of a set, of equals the first first, a box is kept unless its IoU with one kept before exceeds
    the threshold.  What fills up a set, with the score OUT, is not kept.  Which box would strike out which is found
    where the boxes are; the decisions, each of which needs those before, are made on the CPU.
    """
    is_open = scores > OUT
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :is_open.sum(dim=1).max()]
    best = boxes.take_along_dim(order[..., None], dim=1)                           # (S, most, 4)
    limit = torch.tensor(iou_threshold, dtype=boxes.dtype)
    if limit.item() > iou_threshold:                                               # as 0.3 in float32 exceeds 0.3
        limit = limit.nextafter(torch.zeros_like(limit))
    strikes = [box_iou(block, best) > limit.item() for block in best.split(NMS_BLOCK, dim=1)]
    strikes, is_kept = torch.cat(strikes, dim=1).cpu().numpy(), np.ones(order.shape, bool)
    for i in range(order.shape[1]):
        is_kept[:, i + 1:] &= ~(is_kept[:, i, None] & strikes[:, i, i + 1:])
    is_kept = send(torch.from_numpy(is_kept), boxes.device)
    return is_open & torch.zeros_like(is_open).scatter(1, order, is_kept)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression: indices of the boxes (n, 4) kept, by falling score (n,), of equals the first first."""
    kept = suppress(boxes[None], scores[None], iou_threshold)[0].nonzero()[:, 0]
    return kept[scores[kept].argsort(descending=True, stable=True)]


def bin_weights(low: Tensor, step: Tensor, length: Tensor, bins: int, sampling_ratio: int, largest: int) -> tuple:
    """One axis of RoIAlign: what each pixel adds to the mean of a bin's samples, and which pixels a bin reads.

    low, step, length   (R,) of each box: where it begins, in coordinates where the center of the first pixel is 0; the
                        side of a bin; the pixels of the map.  The largest step, rounded up, is `largest`
    -> weights and pixels, (R, bins, n) each
    """
    low, step, length = (x[:, None, None] for x in (low, step, length))
    samples = torch.full_like(step, sampling_ratio) if sampling_ratio else step.ceil()     # 0 in a box without length
    count = samples.clamp(min=1)
    bin = torch.arange(bins, device=low.device)[:, None]
    k = torch.arange(sampling_ratio or largest, device=low.device)
    at = low + (bin + (k + 0.5) / count) * step                                    # (R, bins, samples)
    is_read = (k < samples) & (at >= -1) & (at <= length)                          # a sample farther out is zero
    at = at.clamp(min=0).minimum(length - 1)
    pixel = at.amin(dim=-1, keepdim=True).floor() + torch.arange(largest + 2, device=low.device)   # (R, bins, n)
    near = (1 - (at[..., None] - pixel[..., None, :]).abs()).clamp(min=0)          # (R, bins, samples, n)
    return ((is_read / count)[..., None] * near).sum(dim=-2), pixel.minimum(length - 1).long()


def roi_align(features: Tensor | list[Tensor], boxes: Tensor, output_size: int | tuple[int, int],
              spatial_scale: float | Tensor, sampling_ratio: int = 0) -> Tensor:
    """Pool each box to a grid of bins, averaging bilinear samples (He et al. 2017, Mask R-CNN; half-pixel shift).

    features        (B, c, height, width), or a list of maps (c, ., .) of any sizes; the result (R, c, rows, columns)
                    has a gradient with respect to them
    boxes           (R, 5) index of the image, or of the map, x1, y1, x2, y2 in pixels of the image
    output_size     (rows, columns), or both as one number
    spatial_scale   size of the map over size of the image; or (R, 1)
    sampling_ratio  samples per bin and axis; 0 for one a pixel of the map, rounded up

    Bilinear sampling and the mean over a grid of samples are separable: a bin is sum_yx wy[y] wx[x] map[y, x].
    """
    rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    tables = [x.permute(1, 2, 0).flatten(0, 1) for x in features]                  # a row a pixel
    table, begin = torch.cat(tables).to(boxes.dtype), np.cumsum([0, *map(len, tables)])
    layout = torch.tensor([(x.shape[2], x.shape[1], first) for x, first in zip(features, begin)])
    width, height, first = send(layout, boxes.device)[boxes[:, 0].long()].T        # (R,) each, of the map of each box
    x1, y1, x2, y2 = (boxes[:, 1:].detach() * spatial_scale - 0.5).T
    x_step, y_step = (x2 - x1) / columns, (y2 - y1) / rows
    steps, order = x_step.abs().maximum(y_step.abs()).sort(descending=True)        # those alike read as many pixels
    pooled = [table[:0]]
    for r, largest in zip(order.split(ALIGNED_BOXES), steps[::ALIGNED_BOXES].tolist()):    # waits for a GPU once
        largest = max(math.ceil(largest), 1)
        x_weight, x = bin_weights(x1[r], x_step[r], width[r], columns, sampling_ratio, largest)        # (r, columns, n)
        y_weight, y = bin_weights(y1[r], y_step[r], height[r], rows, sampling_ratio, largest)          # (r, rows, n)
        weight = y_weight[:, :, None, :, None] * x_weight[:, None, :, None]        # (r, rows, columns, n, n)
        row = (first[r, None, None] + width[r, None, None] * y)[:, :, None, :, None]       # its begin in the table
        weight, pixel = (bags.flatten(3).flatten(0, 2) for bags in (weight, row + x[:, None, :, None]))
        pooled.append(F.embedding_bag(pixel, table, mode="sum", per_sample_weights=weight))    # (r * rows * columns, c)
    pooled = torch.cat(pooled).view(-1, rows, columns, table.shape[1]).permute(0, 3, 1, 2)
    return pooled[order.argsort()]


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Stretch probabilities (R, m, m) over their boxes (R, 4) in an image of `size` -> masks (R, height, width) bool.

    Bilinear: the box's edges are the outer edges of the mask's pixels, outside is 0, and a pixel is True where the
    value reaches the threshold.
    """
    def weights(low: Tensor, high: Tensor, pixels: int, cells: int) -> Tensor:
        """One axis: what each cell of a mask adds to a pixel, (R, pixels, cells)."""
        middle = torch.arange(pixels, device=boxes.device) + 0.5
        at = (middle - low[:, None]) / (high - low)[:, None] * cells - 0.5                     # (R, pixels)
        return (1 - (at[..., None] - torch.arange(cells, device=boxes.device)).abs()).clamp(min=0)
    x1, y1, x2, y2 = boxes.T
    rows, columns = weights(y1, y2, size[0], masks.shape[1]), weights(x1, x2, size[1], masks.shape[2])
    pasted = torch.zeros(len(masks), *size, dtype=torch.bool, device=boxes.device)
    for k, mask in enumerate(masks.to(boxes.dtype)):                                           # one by one, for memory
        pasted[k] = rows[k] @ mask @ columns[k].T >= threshold
    return pasted


# ---------------------------------------------------------------------------------------------------------------------
# COCO's masks.  Files hold a mask as RLE, the numbers of pixels outside and inside by turns, down the columns, first
# column first, in a list or packed into a string; or as polygons.
# ---------------------------------------------------------------------------------------------------------------------


def encode_rle(mask: np.ndarray) -> dict:
    """Mask (height, width), nonzero inside -> {"size": [height, width], "counts": bytes}: RLE as pycocotools packs it.

    From the fourth on, a count is stored less the count two before it.  Each number is cut into digits of five bits,
    lowest first, until the rest is only sign; bit 5 of a digit says that more follow, and adding 48 makes it text.
    """
    changes = np.flatnonzero(np.diff(mask.T.ravel() != 0, prepend=False))
    counts, text = np.diff(changes, prepend=0, append=mask.size).tolist(), bytearray()
    for k, number in enumerate(counts):
        if k > 2:
            number -= counts[k - 2]
        more = True
        while more:
            digit, number = number & 31, number >> 5
            more = number != (-1 if digit & 16 else 0)         # the top bit of the last digit is the sign
            text.append(digit + 32 * more + 48)
    return {"size": list(mask.shape), "counts": bytes(text)}


def decode_rle(rle: dict) -> np.ndarray:
    """RLE, its counts a list, str or bytes -> mask (height, width) uint8, 1 inside."""
    (height, width), counts = map(int, rle["size"]), rle["counts"]
    if isinstance(counts, (str, bytes)):
        counts = unpack_counts(counts.encode() if isinstance(counts, str) else counts)
    is_inside = np.arange(len(counts), dtype=np.uint8) % 2
    return np.repeat(is_inside, counts).reshape(width, height).T


def polygons_to_mask(polygons: list, height: int, width: int) -> np.ndarray:
    """Polygons [[x1, y1, x2, y2, ...], ...] of one object -> their union (height, width) uint8, as pycocotools has it.

    An outline is walked on a grid five times finer than the pixels.  Where it crosses the middle of a pixel column,
    inside and outside change places for all pixels from there on: the crossings, sorted, are the edges of an RLE.
    """
    union = np.zeros((height, width), dtype=np.uint8)
    for polygon in polygons:
        corners = (5 * np.reshape(polygon, (-1, 2)) + 0.5).astype(np.int64)        # toward zero, as a cast in C
        crossings = [crossed_columns(*ends, height, width) for ends in zip(corners, np.roll(corners, -1, axis=0))]
        counts = np.diff(np.sort(np.concatenate(crossings)), prepend=0, append=height * width)
        union |= decode_rle({"size": [height, width], "counts": counts})
    return union


def read_mask(mask: np.ndarray | list | dict, height: int, width: int) -> np.ndarray:
    """An object's mask, drawn or as COCO's files have it -> (height, width) bool."""
    if isinstance(mask, list):
        mask = polygons_to_mask(mask, height, width)
    return (decode_rle(mask) if isinstance(mask, dict) else mask) == 1


def crossed_columns(start: np.ndarray, end: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels, counted down the columns, above whose upper edge a side of a polygon crosses the column's middle.

    The side goes from start (x, y) to end, on the grid of five steps a pixel: along its longer axis, from the lower
    coordinate to the higher, a step at a time.  Of the steps only those near the middle of a column of the image are
    taken, as a corner may be far outside.
    """
    axis = int(abs(end - start)[1] > abs(end - start)[0])                          # the longer one
    if start[axis] > end[axis]:
        start, end = end, start
    slope = (end - start) / max(end[axis] - start[axis], 1)
    left, right = sorted((start[0], end[0]))
    middle = 5 * np.arange(max(0, (left + 2) // 5), min(width, (right + 2) // 5)) + 2.5     # of columns in between
    steps = np.floor((middle - start[0]) / slope[0])[:, None] + [-1, 0, 1]         # rounding may move it by a step
    steps = steps.reshape(-1, 1).astype(np.int64) + [0, 1]                         # (steps, 2) before and after each
    path = (start + slope * steps[:, :, None] + 0.5).astype(np.int64)              # (steps, 2, 2)
    path[:, :, axis] = start[axis] + steps
    x, y = path.transpose(2, 0, 1)                                                 # (steps, 2)
    column, part = np.divmod(x.min(axis=1), 5)
    row = ((y.min(axis=1) + 2) // 5).clip(0, height)
    return (column * height + row)[(x[:, 0] != x[:, 1]) & (part == 2)]


# ---------------------------------------------------------------------------------------------------------------------
# COCO's average precision
# ---------------------------------------------------------------------------------------------------------------------

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_POINTS = np.linspace(0, 1, 101)
AREAS = (0, 1e10), (0, 32 ** 2), (32 ** 2, 96 ** 2), (96 ** 2, 1e10)    # all, small, medium, large; both ends included
MAX_DETECTIONS = (1, 10, 100)                                                      # of each image and category
MISS, HIT, PASSED = 0, 1, 2                                                        # what becomes of a detection


def coco_average_precision(ground_truth: dict, detections: list[dict], iou_type: str = "bbox") -> dict[str, float]:
    """COCO's twelve numbers as pycocotools computes them, 0 to 1, or -1 where there is no object to measure them by.

    ground_truth  contents of an annotation file: {"images": [{id, height, width}], "categories": [{id}],
                  "annotations": [{image_id, category_id, area, bbox (x, y, width, height), segmentation, iscrowd}]}
    detections    contents of a result file: [{image_id, category_id, score, bbox or segmentation}]
    iou_type      what is compared, "bbox" or "segm"

    AP               precision, mean over 10 IoU thresholds, 101 recalls and the categories
    AP50 AP75        the same at one threshold
    APs APm APl      of objects with an area up to 32^2, up to 96^2, and above
    AR1 AR10 AR100   recall of the best 1, 10, 100 detections per image and category
    ARs ARm ARl      recall of 100, by area

    An object without "area" gets that of its box or mask.  As in pycocotools "iscrowd" counts and "ignore" does not,
    detections of unknown categories are passed over, and a detection that has a bbox is sized by it, even where masks
    are compared.  Unlike there, an annotation may have the id 0: ids of annotations are not read.
    ValueError for detections of unknown images, and for malformed boxes and masks.
    """
    if iou_type not in ("bbox", "segm"):
        raise ValueError(f"iou_type is {iou_type!r}, want 'bbox' or 'segm'")
    images = {image["id"]: image for image in ground_truth["images"]}
    unknown = {detection["image_id"] for detection in detections} - set(images)
    if unknown:
        raise ValueError(f"detections of {len(unknown)} images not in the ground truth, such as {unknown.pop()!r}")
    objects, found = by_category(ground_truth["annotations"]), by_category(detections)
    curves = []
    for category in sorted({category["id"] for category in ground_truth["categories"]}):
        here, there = objects[category], found[category]                           # {image: [records]}
        scenes = [Scene(here[i], there[i], images[i], iou_type) for i in sorted(images) if i in here or i in there]
        curves += [precision_and_recall(scenes, low, high) for low, high in AREAS]
    precision = np.array([curve for curve, _ in curves]).reshape(-1, 4, 10, 101)   # (categories, areas, IoUs, recalls)
    recall = np.array([values for _, values in curves]).reshape(-1, 4, 3, 10)      # (categories, areas, counts, IoUs)

    def mean(values: np.ndarray) -> float:
        known = values[~np.isnan(values)]
        return float(known.mean()) if known.size else -1.0

    results = dict(AP=precision[:, 0], AP50=precision[:, 0, 0], AP75=precision[:, 0, 5],
                   APs=precision[:, 1], APm=precision[:, 2], APl=precision[:, 3],
                   AR1=recall[:, 0, 0], AR10=recall[:, 0, 1], AR100=recall[:, 0, 2],
                   ARs=recall[:, 1, 2], ARm=recall[:, 2, 2], ARl=recall[:, 3, 2])
    return {name: mean(values) for name, values in results.items()}


def by_category(records: list[dict]) -> dict:
    """Records -> {category: {image: [records]}}, empty where there are none"""
    groups = defaultdict(lambda: defaultdict(list))
    for record in records:
        groups[record["category_id"]][record["image_id"]].append(record)
    return groups


class Scene:
    """The G objects of one category in one image beside what was found, n detections, best first.

    iou (n, G);  is_crowd (G,);  object_sizes (G,);  scores, sizes (n,)
    """
    def __init__(self, objects: list[dict], found: list[dict], image: dict, iou_type: str):
        found = sorted(found, key=lambda record: -record["score"])[:MAX_DETECTIONS[-1]]        # equals keep their order
        shapes, object_shapes = ([read_shape(record, image, iou_type) for record in some] for some in (found, objects))
        measure = box_areas if iou_type == "bbox" else mask_areas
        areas, object_areas, shared = measure(shapes, object_shapes)                           # (n,), (G,), (n, G)
        self.is_crowd = np.array([bool(record.get("iscrowd")) for record in objects], dtype=bool)
        union = areas[:, None] + np.where(self.is_crowd, 0, object_areas - shared)
        self.iou = shared / np.maximum(union, 1e-10)           # of a crowd any part will do
        self.scores = np.array([record["score"] for record in found], dtype=float)
        self.sizes = np.array([record["bbox"][2] * record["bbox"][3] if record.get("bbox") else area
                               for record, area in zip(found, areas)])
        self.object_sizes = np.array([record.get("area", area) for record, area in zip(objects, object_areas)])

    def passed_over(self, low: float, high: float) -> np.ndarray:
        """(G,) bool, True for objects that need not be found: crowds, and those of another size."""
        return self.is_crowd | (self.object_sizes < low) | (self.object_sizes > high)


def read_shape(record: dict, image: dict, iou_type: str) -> np.ndarray:
    """A record's box, x, y, width, height, or its mask, (height * width,) bool."""
    try:
        if iou_type == "bbox":
            x, y, width, height = map(float, record["bbox"])
            return np.array([x, y, width, height])
        size = image["height"], image["width"]
        mask = read_mask(record["segmentation"], *size)
        if mask.shape != size:
            raise ValueError(f"the mask is of size {list(mask.shape)}, the image {list(size)}")
        return mask.ravel(order="F")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"image {record['image_id']!r} has a record without a valid {iou_type}: {error}") from None


def box_areas(found: list[np.ndarray], objects: list[np.ndarray]) -> tuple:
    """n and G boxes -> their areas (n,), (G,), and those that they share (n, G)."""
    a, b = np.reshape(found, (-1, 1, 4)), np.reshape(objects, (-1, 4))
    low = np.maximum(a[..., :2], b[:, :2])
    high = np.minimum(a[..., :2] + a[..., 2:], b[:, :2] + b[:, 2:])
    return a[:, 0, 2] * a[:, 0, 3], b[:, 2] * b[:, 3], (high - low).clip(0).prod(axis=-1)


def mask_areas(found: list[np.ndarray], objects: list[np.ndarray]) -> tuple:
    """The same of masks."""
    shared = np.array([[np.count_nonzero(a & b) for b in objects] for a in found])
    areas, object_areas = (np.array([np.count_nonzero(mask) for mask in some]) for some in (found, objects))
    return areas, object_areas, shared.reshape(len(found), len(objects))


def match(scene: Scene, low: float, high: float) -> np.ndarray:
    """What becomes of each detection at each IoU threshold, (10, n).

    From the best down, each detection takes the free object that it overlaps most: one that counts if it can, of
    equals the later one.  What takes a crowd or an object of another size is passed over, neither hit nor miss; so is
    what takes nothing and is itself of another size.  A crowd can be taken again.
    """
    passed, of_other_size = scene.passed_over(low, high), (scene.sizes < low) | (scene.sizes > high)
    outcome = np.tile(np.where(of_other_size, PASSED, MISS), (len(IOU_THRESHOLDS), 1))
    for t, threshold in enumerate(IOU_THRESHOLDS):
        taken = set()
        for d, overlaps in enumerate(scene.iou.tolist()):
            free = [g for g, overlap in enumerate(overlaps) if overlap >= threshold and g not in taken]
            if free:
                best = max(free, key=lambda g: (not passed[g], overlaps[g], g))
                outcome[t, d] = PASSED if passed[best] else HIT
                if not scene.is_crowd[best]:
                    taken.add(best)
    return outcome


def precision_and_recall(scenes: list[Scene], low: float, high: float) -> tuple:
    """Of one category, for objects of an area from low to high: precision at the recall points (10, 101), and recall of
    the best 1, 10, 100 an image (3, 10).  NaN where there is nothing to find.

    The precision at a recall is the best one at that recall or above, and 0 where the recall is not reached.
    """
    n_objects = sum((~scene.passed_over(low, high)).sum() for scene in scenes)
    if n_objects == 0:
        return np.full((10, 101), np.nan), np.full((3, 10), np.nan)
    outcomes = [match(scene, low, high) for scene in scenes]                       # (10, n) each
    recall = [sum((outcome[:, :most] == HIT).sum(axis=1) for outcome in outcomes) / n_objects
              for most in MAX_DETECTIONS]
    order = np.argsort(-np.concatenate([scene.scores for scene in scenes]), kind="stable")
    outcome = np.concatenate(outcomes, axis=1)[:, order]                           # (10, n of all images)
    hits, misses = (outcome == HIT).cumsum(axis=1), (outcome == MISS).cumsum(axis=1)
    precision = np.pad(hits / np.maximum(hits + misses, 1), ((0, 0), (0, 1)))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    return [p[np.searchsorted(r, RECALL_POINTS)] for p, r in zip(precision, hits / n_objects)], recall


# ---------------------------------------------------------------------------------------------------------------------
# Mask R-CNN (He et al. 2017) on the pyramid, with the constants of mmdetection 2.x
#
#     images ─► Pyramid ─► FeaturePyramid ─► 5 maps ─► ProposalHead ─► propose ─► boxes that may hold something
#                                            4 of them ─► roi_align, 7 x 7 ─► BoxHead ─► class, better box
#                                                     ─► roi_align, 14 x 14 ─► MaskHead ─► mask, 28 x 28
# ---------------------------------------------------------------------------------------------------------------------

ANCHOR_SIDE = 8                         # of a square anchor, in strides
ANCHOR_RATIOS = (0.5, 1.0, 2.0)         # height over width
LARGEST_GROWTH = 1000 / 16              # how many times a box can become as large, or small, as its anchor
BOX_SCALE = (0.1, 0.2)                  # of the shift and the growth that the box head puts out
FINEST_SIDE = 14                        # boxes up to twice as large, in strides of the finest map, are read from there
BOX_BINS, MASK_BINS = 7, 14             # of roi_align, for the two heads
DRAWN_SIZE = 320                        # longer side of a picture of detections
NEGATIVE, UNUSED = -1, -2               # what `assign` says of boxes that are to find no object


# ---- anchors, box coding, which box is to find what -----------------------------------------------------------------

def make_anchors(rows: int, columns: int, stride: float, device=None) -> Tensor:
    """(rows * columns * 3, 4) boxes around the upper left corners of a map's cells: row by row, three ratios each."""
    ratio = send(torch.tensor(ANCHOR_RATIOS), device)
    half = ANCHOR_SIDE * stride / 2 * torch.stack([ratio ** -0.5, ratio ** 0.5], dim=1)              # (3, 2)
    y_x = stride * torch.cartesian_prod(*(torch.arange(n, device=device) for n in (rows, columns)))      # (cells, 2)
    return (y_x.flip(1).repeat(1, 2)[:, None] + torch.cat([-half, half], dim=1)).reshape(-1, 4)


def center_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 4) -> (..., 2) each"""
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def encode_boxes(boxes: Tensor, anchors: Tensor, scale: tuple = (1, 1)) -> Tensor:
    """What leads from anchors (..., 4) to boxes (..., 4): shift in sizes of the anchor, log of growth; over `scale`."""
    (center, size), (from_center, from_size) = center_and_size(boxes), center_and_size(anchors)
    shift, growth = (center - from_center) / from_size, (size / from_size).log()
    return torch.cat([shift / scale[0], growth / scale[1]], dim=-1)


def decode_boxes(deltas: Tensor, anchors: Tensor, scale: tuple = (1, 1)) -> Tensor:
    """The inverse of encode_boxes, with growth limited: deltas (..., 4), anchors (..., 4) -> boxes (..., 4)"""
    center, size = center_and_size(anchors)
    shift, growth = deltas.split(2, dim=-1)
    limit = math.log(LARGEST_GROWTH)
    center, half = center + scale[0] * shift * size, size * (scale[1] * growth).clamp(-limit, limit).exp() / 2
    return torch.cat([center - half, center + half], dim=-1)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> tuple:
    """Boxes (B, n, 4), cut at the border of images of `sizes` (B, 2) height, width, and (B, n) bool, True where
    something is left."""
    boxes = boxes.clamp(min=0).minimum(sizes.flip(1).repeat(1, 2)[:, None])
    return boxes, (center_and_size(boxes)[1] > 0).all(dim=-1)


def assign(iou: Tensor, positive: float, negative: float, low_quality: float = math.inf) -> Tensor:
    """Which object each of A boxes is to find: IoU (..., G, A) -> (..., A) index of the object, or NEGATIVE or UNUSED.

    A box is to find the object that it overlaps most if their IoU is at least `positive`, none if it is below
    `negative`, and is not used in between.  But an object whose best IoU is at least `low_quality` gets all boxes that
    reach this best, so that it does not go without.
    """
    iou = F.pad(iou, (0, 0, 0, 1))                                                         # an object without overlap
    best, owner = iou.max(dim=-2)                                                          # (..., A) each
    assigned = torch.where(best >= positive, owner, torch.where(best < negative, NEGATIVE, UNUSED))
    most = iou.amax(dim=-1, keepdim=True)                                                  # (..., G, 1)
    number = torch.arange(1, iou.shape[-2] + 1, device=iou.device)[:, None]
    last = (number * ((iou == most) & (most >= low_quality))).amax(dim=-2)                 # the last of those that ask
    return torch.where(last > 0, last - 1, assigned)


def draw_boxes(assigned: Tensor, generators: list, count: int, share: float) -> tuple:
    """What a head learns from: of each image's boxes, drawn at random, those with an object, at most a `share` of
    `count`, and NEGATIVE ones, the rest.

    assigned    (B, A), from `assign`;  generators  of each image, on the CPU
    -> image (R,) and index (R,), among its A, of the boxes drawn, first those with an object; owner (R+,) of these
    """
    # of torch.rand, unlike randperm, the first numbers do not depend on how many follow: on what fills up the batch
    noise = torch.stack([torch.rand(assigned.shape[1], generator=generator) for generator in generators])
    order = send(noise, assigned.device).argsort(dim=1)
    owner = assigned.gather(1, order)
    positive, negative = owner >= 0, owner == NEGATIVE
    positive &= positive.cumsum(dim=1) <= count * share
    negative &= negative.cumsum(dim=1) <= count - positive.sum(dim=1, keepdim=True)
    found, others = positive.nonzero(), negative.nonzero()                                 # (R+, 2), (R-, 2)
    image, place = torch.cat([found, others]).T
    return image, order[image, place], owner[image, place][:len(found)]


def roi_levels(boxes: Tensor, finest_side: float) -> Tensor:
    """(R, 4) -> (R,) the map to read each box from: 0 for sides under 2 * finest_side, one more for each doubling."""
    side = center_and_size(boxes)[1].prod(dim=1).sqrt()
    return (side / finest_side + 1e-6).log2().floor().clamp(0, 3).long()


def cut_masks(masks: list[Tensor], image: Tensor, owner: Tensor, boxes: Tensor) -> Tensor:
    """Of the masks (G, h, w) of each image the one of `owner` (R,) in `image` (R,), cut out by boxes (R, 4)
    -> (R, 28, 28), 1 inside"""
    maps = [boxes.new_zeros(1, 1, 1), *(mask[None] for some in masks for mask in some)]    # never none
    first = send(torch.tensor(np.cumsum([1, *map(len, masks)])), boxes.device)[image]
    rois = torch.cat([(first + owner)[:, None], boxes], dim=1)
    return (roi_align(maps, rois, 2 * MASK_BINS, 1.0)[:, 0] >= 0.5).float()


# ---- networks -------------------------------------------------------------------------------------------------------

class FeaturePyramid(nn.Module):
    """FPN (Lin et al. 2017): levels of the same width, each enriched by the coarser ones, and one coarser yet."""

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.lateral = nn.ModuleList([nn.Conv2d(inputs, channels, 1) for _ in range(4)])
        self.smooth = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in range(4)])
        initialize([*self.lateral, *self.smooth], nn.init.xavier_uniform_)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Four maps (B, D, ., .), each twice as fine as the next -> five maps (B, c, ., .)"""
        levels = add_coarser([lateral(x) for lateral, x in zip(self.lateral, maps)], F.interpolate)     # nearest
        levels = [smooth(x) for smooth, x in zip(self.smooth, levels)]
        return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]


class ProposalHead(nn.Module):
    """RPN (Ren et al. 2015): at each place of a map, for each of its three anchors: is there something, and where?"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.score = nn.Conv2d(channels, len(ANCHOR_RATIOS), 1)
        self.delta = nn.Conv2d(channels, 4 * len(ANCHOR_RATIOS), 1)
        initialize(self.children(), nn.init.normal_, std=0.01)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, c, rows, columns) -> scores (B, A), deltas (B, A, 4), in the order of make_anchors"""
        x = F.relu(self.conv(x))
        scores, deltas = (y.permute(0, 2, 3, 1).flatten(1).float() for y in (self.score(x), self.delta(x)))
        return scores, deltas.unflatten(1, (-1, 4))


class BoxHead(nn.Module):
    """Two layers; a score for each class and, last, for none; a better box for each class."""

    def __init__(self, channels: int, width: int, n_classes: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels * BOX_BINS ** 2, width), nn.Linear(width, width)
        self.score, self.delta = nn.Linear(width, n_classes + 1), nn.Linear(width, 4 * n_classes)
        initialize([self.fc1, self.fc2], nn.init.xavier_uniform_)
        initialize([self.score], nn.init.normal_, std=0.01)
        initialize([self.delta], nn.init.normal_, std=0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(R, c, 7, 7) -> scores (R, classes + 1), deltas (R, classes, 4)"""
        x = F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))
        return self.score(x).float(), self.delta(x).float().unflatten(1, (-1, 4))


class MaskHead(nn.Sequential):
    """Convolutions, doubled resolution, a mask for each class: (R, c, 14, 14) -> (R, classes, 28, 28)"""

    def __init__(self, channels: int, n_classes: int, depth: int):
        layers = [layer for _ in range(depth) for layer in (nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())]
        layers += [nn.ConvTranspose2d(channels, channels, 2, stride=2), nn.ReLU(), nn.Conv2d(channels, n_classes, 1)]
        super().__init__(*layers)
        initialize(layers[::2], nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self[-1].weight, std=0.01)      # mmdetection: as above, far too large if there are few classes


class MaskRCNN(nn.Module):
    """Finds objects: their boxes, classes and masks.  `options` are MaskRCNNOptions."""

    def __init__(self, visual: VisionTransformer, n_classes: int, options):
        super().__init__()
        p, self.options = visual.patch_size, options
        self.strides = [p / 4, p / 2, p, 2 * p, 4 * p]
        self.pyramid = Pyramid(visual)
        self.fpn = FeaturePyramid(visual.cls_token.shape[-1], options.channels)
        self.rpn = ProposalHead(options.channels)
        self.box_head = BoxHead(options.channels, options.head_width, n_classes)
        self.mask_head = MaskHead(options.channels, n_classes, options.mask_depth)

    def see(self, images: Tensor) -> tuple[list[Tensor], ...]:
        """(B, 3, height, width) -> of each level: map (B, c, ., .), scores (B, A), deltas (B, A, 4), anchors (A, 4)"""
        maps = self.fpn(self.pyramid(images))
        scores, deltas = zip(*map(self.rpn, maps))
        return maps, scores, deltas, [make_anchors(*x.shape[2:], s, x.device) for x, s in zip(maps, self.strides)]

    @torch.no_grad()
    def propose(self, scores: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], sizes: Tensor, before: int,
                keep: int) -> Tensor:
        """What the RPN says, by level -> for each image `keep` boxes (B, P, 4), the best first, at the end 0.

        The best `before` of each level are thinned out among themselves, so that none overlap by an IoU over 0.7.
        """
        best, boxes = [], []
        for score, delta, anchor in zip(scores, deltas, anchors):
            top, index = F.pad(score, (0, before), value=OUT).topk(before, dim=1)      # (B, before) each, filled up
            index = index % score.shape[1]
            best.append(top)
            boxes.append(decode_boxes(delta.take_along_dim(index[..., None], dim=1), anchor[index]))
        boxes, is_left = clip_boxes(torch.cat(boxes, dim=1), sizes)                        # (B, levels * before, 4)
        best = torch.cat(best, dim=1).where(is_left, OUT)
        is_kept = suppress(boxes.view(-1, before, 4), best.view(-1, before), 0.7).view_as(best)
        best, index = best.where(is_kept, OUT).topk(min(keep, best.shape[1]), dim=1)
        return boxes.take_along_dim(index[..., None], dim=1).where(best[..., None] > OUT, 0)

    def pool(self, maps: list[Tensor], image: Tensor | int, boxes: Tensor, bins: int) -> Tensor:
        """Maps (B, c, ., .), boxes (R, 4) of the image `image` (R,) -> (R, c, bins, bins), each read from the map that
        fits its size"""
        level = roi_levels(boxes, FINEST_SIDE * self.strides[0])
        rois = torch.cat([(len(maps[0]) * level + image)[:, None], boxes], dim=1)
        return roi_align([one for x in maps[:4] for one in x], rois, bins, 0.5 ** level[:, None] / self.strides[0])

    def forward(self, images: Tensor, sizes: Tensor, truth: dict) -> dict[str, Tensor]:
        """The five losses of a batch.

        images   (B, 3, height, width), padded to multiples of 2p;  sizes  (B, 2) height and width of what is in them
        truth    boxes (B, G, 4) and labels (B, G) of the objects of each image, filled up with 0; a list of the masks
                 (., h, w) bool of each image's, and of the generators of what is drawn in it

            rpn_score, rpn_box   something or nothing, and L1 of where: mean over the sampled anchors
            label, box           cross-entropy of the class, and L1 of the better box: mean over the sampled boxes
            mask                 cross-entropy of the true class's mask: mean over the pixels of boxes with an object
        """
        o, (maps, scores, deltas, anchors) = self.options, self.see(images)
        losses = proposal_losses(torch.cat(scores, dim=1), torch.cat(deltas, dim=1), torch.cat(anchors), truth,
                                 rounded_up(sizes, self.strides[3]), o.rpn_samples)
        proposals = self.propose(scores, deltas, anchors, sizes, 2 * o.proposals, o.proposals)
        image, boxes, owner = draw_rois(proposals, truth, o.roi_samples)                   # (R,), (R, 4), (R+,)
        scores, deltas = self.box_head(self.pool(maps, image, boxes, BOX_BINS))     # (R, classes + 1), (R, classes, 4)
        image, boxes, deltas = (x[:len(owner)] for x in (image, boxes, deltas))            # those with an object
        true_boxes, labels = (truth[name][image, owner] for name in ("boxes", "labels"))
        classes = F.pad(labels, (0, len(scores) - len(labels)), value=scores.shape[1] - 1)     # (R,), the last: nothing
        wanted = encode_boxes(true_boxes, boxes, BOX_SCALE)                                # (R+, 4)
        masks = of_class(self.mask_head(self.pool(maps, image, boxes, MASK_BINS)), labels)     # (R+, 28, 28)
        true_masks = cut_masks(truth["masks"], image, owner, boxes)
        return losses | dict(
            label=per_sample(F.cross_entropy(scores, classes, reduction="sum"), len(scores)),
            box=per_sample((of_class(deltas, labels) - wanted).abs().sum(), len(scores)),
            mask=per_sample(F.binary_cross_entropy_with_logits(masks, true_masks, reduction="sum"), masks.numel()))

    @torch.no_grad()
    def detect(self, image: Tensor, size: Tensor) -> dict:
        """An image (1, 3, height, width), (1, 2) what is in it -> at most 100 objects, the best first: boxes (R, 4),
        labels (R,), scores (R,), and masks (R, 28, 28), probabilities over the box."""
        o, (maps, *rpn) = self.options, self.see(image)
        boxes = self.propose(*rpn, size, o.proposals, o.proposals)[0]
        boxes = boxes[boxes.any(dim=1)]                                                    # (P, 4)
        scores, deltas = self.box_head(self.pool(maps, 0, boxes, BOX_BINS))
        assert scores.isfinite().all(), "the scores of the boxes are not finite"
        boxes, is_left = clip_boxes(decode_boxes(deltas, boxes[:, None], BOX_SCALE), size)             # (P, classes, 4)
        scores = scores.softmax(dim=1)[:, :-1]
        found = scores.where((scores > o.score_threshold) & is_left, OUT)                  # (P, classes)
        labels, place = suppress(boxes.transpose(0, 1), found.T, 0.5).nonzero(as_tuple=True)
        best = scores[place, labels].argsort(descending=True, stable=True)[:MAX_DETECTIONS[-1]]
        labels, place = labels[best], place[best]
        boxes, scores = boxes[place, labels], scores[place, labels]
        masks = of_class(self.mask_head(self.pool(maps, 0, boxes, MASK_BINS)), labels).sigmoid()
        return dict(boxes=boxes, labels=labels, scores=scores, masks=masks)


def of_class(masks: Tensor, labels: Tensor) -> Tensor:
    """(R, classes, ...), labels (R,) -> (R, ...)"""
    return masks[torch.arange(len(labels), device=labels.device), labels].float()


def per_sample(total: Tensor, count: int) -> Tensor:
    """A loss summed over `count` samples of this process -> its share of their mean over the samples of all."""
    return total / mean_over_processes(total.new_full((), count)).clamp(min=1)


def proposal_losses(scores: Tensor, deltas: Tensor, anchors: Tensor, truth: dict, areas: Tensor, count: int) -> dict:
    """The RPN's two losses: scores (B, A), deltas (B, A, 4) and anchors (A, 4), `count` of which are drawn an image.

    # paper: silent on padding; here: anchors centered beyond an image's own area (B, 2) take no part, as in
    # mmdetection, because what is learned from an image must not depend on the larger ones beside it
    """
    x, y = center_and_size(anchors)[0].round().T                                           # (A,) each
    inside = (x < areas[:, 1:]) & (y < areas[:, :1])                                       # (B, A)
    iou = box_iou(truth["boxes"], anchors) * inside[:, None]                               # (B, G, A)
    assigned = assign(iou, 0.7, 0.3, low_quality=0.3).where(inside, UNUSED)
    image, index, owner = draw_boxes(assigned, truth["generators"], count, 0.5)            # (R,), (R,), (R+,)
    scores, n = scores[image, index], len(owner)                                           # the first n have an object
    score_loss = F.softplus(-scores[:n]).sum() + F.softplus(scores[n:]).sum()              # -log p, -log(1 - p)
    image, index = image[:n], index[:n]
    wanted = encode_boxes(truth["boxes"][image, owner], anchors[index])
    box_loss = (deltas[image, index] - wanted).abs().sum()
    return dict(rpn_score=per_sample(score_loss, len(scores)), rpn_box=per_sample(box_loss, len(scores)))


def draw_rois(proposals: Tensor, truth: dict, count: int) -> tuple:
    """What the heads learn from: image (R,), boxes (R, 4), first those with an object, a quarter of `count` an image at
    most, and owner (R+,), their objects.  The true boxes (B, G, 4) join the proposals (B, P, 4), so that each object
    has a box that fits."""
    boxes = torch.cat([proposals, truth["boxes"]], dim=1)                                  # (B, P + G, 4)
    # mmdetection 2.x keeps low-quality matches here too: of no effect, as the best match of an object is its own box
    assigned = assign(box_iou(truth["boxes"], boxes), 0.5, 0.5).where(boxes.any(dim=2), UNUSED)
    image, index, owner = draw_boxes(assigned, truth["generators"], count, 0.25)
    return image, boxes[image, index], owner


# ---- options --------------------------------------------------------------------------------------------------------

@dataclass
class MaskRCNNOptions(FineTuneOptions, EvalOptions):
    data: str = opt("shapes:objects=2-4,val=500", "coco:DIR, or shapes, whose classes are the 8 forms of any color")
    score_threshold: float = opt(0.05, "least score of a detection (mmdetection)", "test")
    recipe: str = opt("auto", "the defaults of all other options: the paper's on COCO, or one for a CPU; auto: the "
                      "latter for shapes", "recipe", ("auto", "coco", "pocket"))
    epochs: float = opt(12.0, "passes over the data (paper)", "recipe")
    steps: int = opt(0, "length in steps instead of --epochs, 0: use --epochs", "recipe")
    lr: float = opt(1e-4, "peak learning rate; a tenth of it after 8 of 12 parts of the run, a hundredth after 11 "
                    "(paper)", "recipe")
    warmup_steps: int = opt(500, "steps of linear warm-up (mmdetection)", "recipe")
    layer_decay: float = opt(0.75, "learning rate of a block relative to the one above it (paper)", "recipe")
    short_side: int = opt(800, "images are resized until their short side is this, pixels (paper), or", "recipe")
    long_side: int = opt(1333, "until their long side is this (paper), whichever is first", "recipe")
    channels: int = opt(256, "channels of the FPN's maps and in the mask head (mmdetection)", "detector")
    head_width: int = opt(1024, "width of the box head (mmdetection)", "detector")
    mask_depth: int = opt(4, "convolutions of the mask head (mmdetection)", "detector")
    rpn_samples: int = opt(256, "anchors an image that the RPN learns from (mmdetection)", "detector")
    proposals: int = opt(1000, "boxes kept of an image; before suppression as many of each level, in training "
                         "twice as many (mmdetection 2.x)", "detector")
    roi_samples: int = opt(512, "boxes an image that the heads learn from (mmdetection)", "detector")


POCKET_DETECTOR = dict(
    epochs=0.16, batch_size=8, lr=1e-3, warmup_steps=50, short_side=128, long_side=213, channels=48, head_width=256,
    mask_depth=2, rpn_samples=64, proposals=100, roi_samples=32)


def parse_maskrcnn(argv=None) -> MaskRCNNOptions:
    return parse_recipe(MaskRCNNOptions(), POCKET_DETECTOR, "maskrcnn", "coco", argv)


def step_schedule(step: int, total: int, warmup: int) -> float:
    """Share of the peak rate at step 0 ... total-1: it rises from 0.001, and falls to a tenth at 8/12 and at 11/12."""
    falls = (12 * step >= 8 * total) + (12 * step >= 11 * total)
    return 0.1 ** falls * min(1.0, 0.001 + 0.999 * step / max(warmup, 1))


# ---- images and objects, for training and test ----------------------------------------------------------------------

@dataclass
class TrainObjects:
    """A record, resized, mirrored half of the time -> images uint8 (3, h, w), and of the objects that are trained on
    boxes (G, 4), labels (G,) and masks (G, h, w) bool: those with a pixel or more each way, no crowds.
    All are arrays, which data.collate leaves as lists."""
    short: int
    long: int

    def __call__(self, sample, rng: np.random.Generator) -> dict:
        image = decode(sample.image)
        width, height = image.size
        w, h = sides = fitted_sides(width, height, self.short, self.long)
        pixels = to_tensor(image.resize(sides, BILINEAR)).numpy()
        things = [thing for thing in sample.objects if not thing["crowd"] and has_area(thing["box"], width, height)]
        boxes = np.array([thing["box"] for thing in things], dtype=float).reshape(-1, 4)
        boxes = boxes.clip(0, [width, height] * 2) / ([width, height] * 2) * (sides * 2)
        masks = [PIL.Image.fromarray(read_mask(thing["mask"], height, width)) for thing in things]
        masks = np.array([mask.resize(sides, NEAREST) for mask in masks], dtype=bool).reshape(-1, h, w)
        if rng.random() < 0.5:
            pixels, masks = pixels[:, :, ::-1].copy(), masks[:, :, ::-1].copy()
            boxes[:, [0, 2]] = w - boxes[:, [2, 0]]
        return dict(images=pixels, boxes=boxes.astype(np.float32), masks=masks,
                    labels=np.array([thing["category"] for thing in things], dtype=np.int64))


@dataclass
class EvalObjects:
    """A record, resized -> images uint8 (3, h, w), full_size (height, width) before that, and truth, COCO's annotations
    of all objects of a known class, with category_id the class and without image_id."""
    short: int
    long: int
    label_of: list[int]         # of each category of the data, -1 if unknown

    def __call__(self, sample, rng) -> dict:
        image, truth = decode(sample.image), []
        for thing in sample.objects:
            (x1, y1, x2, y2), mask, label = thing["box"], thing["mask"], self.label_of[thing["category"]]
            if label >= 0:
                area = thing.get("area")
                if area is None:
                    area = float(read_mask(mask, image.height, image.width).sum())
                truth.append(dict(category_id=label, bbox=[x1, y1, x2 - x1, y2 - y1], iscrowd=int(thing["crowd"]),
                                  area=area, segmentation=encode_rle(mask) if isinstance(mask, np.ndarray) else mask))
        resized = image.resize(fitted_sides(*image.size, self.short, self.long), BILINEAR)
        return dict(images=to_tensor(resized).numpy(), full_size=image.size[::-1], truth=truth)


def rounded_up(sizes: Tensor, multiple: int) -> Tensor:
    return -(-sizes // multiple) * multiple


def as_input(images: list[np.ndarray], size: list[int], device) -> Tensor:
    """Images uint8 (3, h, w) of any sizes -> (B, 3, *size), normalized, each on a canvas."""
    canvases = torch.stack([on_canvas(torch.from_numpy(image), *size) for image in images])
    return normalize(send(canvases, device))


def losses_of(net: nn.Module, batch: dict, step: int, device, options: MaskRCNNOptions, multiple: int) -> dict:
    """The losses of a batch of TrainObjects' items.

    # paper: silent on the canvas; here: the largest sides of all processes' images, where mmdetection takes those of a
    # process's, because then any number of processes sees the same: attention reaches the padding too
    """
    truth = {name: send(pad_sequence([torch.from_numpy(x) for x in batch[name]], batch_first=True), device)
             for name in ("boxes", "labels")}
    truth["masks"] = [send(torch.from_numpy(masks), device) for masks in batch["masks"]]
    truth["generators"] = [torch.Generator().manual_seed(seed_of(options.seed, step, i))
                           for i in batch["index"].tolist()]
    sizes = send(torch.tensor([image.shape[1:] for image in batch["images"]]), device)
    largest = rounded_up(gather(sizes).amax(dim=0), multiple).tolist()
    return net(as_input(batch["images"], largest, device), sizes, truth)


# ---- test -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate_detector(net: MaskRCNN, names: list[str], data, options: MaskRCNNOptions, runtime, out: Path) -> dict:
    """Finds the objects of all test images of data, whose classes are known by `names`; prints, draws and writes:

    box, mask {AP, AP50, ...}: see coco_average_precision;  images, bad (records), classes: how many;  protocol
    OUT/detections.json   all that was found, as COCO's server takes it
    """
    label_of = [names.index(name) if name in names else -1 for name in data.classes]
    images, annotations, found, drawn, started = [], [], [], [], time.monotonic()
    transform = EvalObjects(options.short_side, options.long_side, label_of)
    for batch in each_test_image(data, transform, options, runtime):
        pixels, full_size, truth = (batch[key][0] for key in ("images", "full_size", "truth"))
        size = torch.tensor([pixels.shape[1:]])                                            # (1, 2)
        canvas = as_input([pixels], rounded_up(size[0], net.strides[3]).tolist(), runtime.device)
        with runtime.autocast():
            objects = net.detect(canvas, size.to(runtime.device))
        records, i = as_records(objects, pixels.shape[1:], full_size), batch["index"].item()
        for record in (*truth, *records):
            record["image_id"] = i
        images.append(dict(id=i, height=full_size[0], width=full_size[1]))
        annotations += truth
        found += records
        if len(drawn) < options.draw:
            image = PIL.Image.fromarray(pixels.transpose(1, 2, 0)).resize(full_size[::-1])
            drawn.append([("truth", draw_records(image, truth, names)), ("found", draw_records(image, records, names))])
    everyone = zip(*gather_objects((images, annotations, found), runtime))
    images, annotations, found = (sum(parts, []) for parts in everyone)
    if not images:
        raise UserError(f"none of the {len(data)} test images of {options.data} can be read")
    truth = dict(images=images, annotations=annotations, categories=[dict(id=k) for k in range(len(names))])
    masks = [{key: value for key, value in record.items() if key != "bbox"} for record in found]     # sized by the mask
    said = ("data", "checkpoint", "from_scratch", "steps", "short_side", "long_side", "score_threshold")
    results = dict(box=coco_average_precision(truth, found, "bbox"), mask=coco_average_precision(truth, masks, "segm"),
                   images=len(images), bad=number_asked(data, options) - len(images), classes=len(names),
                   protocol={key: getattr(options, key) for key in said})
    if runtime.is_main:
        for what in ("box", "mask"):
            say(f"{what:5}" + "  ".join(f"{key} {value:.1%}" if value >= 0 else f"{key} -"
                                        for key, value in results[what].items()))
        say(f"({len(images)} images, {results['bad']} bad, {time.monotonic() - started:.0f} s)")
        out.mkdir(parents=True, exist_ok=True)
        if drawn:
            show("detections.png", out, sheet, drawn, DRAWN_SIZE)
        (out / "detections.json").write_text(json.dumps(with_own_ids(found, data, label_of)))
        write_json(options.json, dict(results, task="detection"))
    return results


def with_own_ids(found: list[dict], data, label_of: list[int]) -> list[dict]:
    """Records by the ids that the data's own file has for images and categories; drawn scenes have places in a list."""
    images, categories = (getattr(data, name, range(count)) for name, count in (
        ("image_ids", len(data)), ("category_ids", len(data.classes))))
    own = {label: categories[k] for k, label in enumerate(label_of)}
    return [dict(record, image_id=images[record["image_id"]], category_id=own[record["category_id"]])
            for record in found if record["category_id"] in own]


def as_records(objects: dict, size: tuple[int, int], full_size: tuple[int, int]) -> list[dict]:
    """What MaskRCNN.detect found in an image resized to `size` (height, width) -> COCO's records without image_id, in
    the image of `full_size`."""
    (h, w), (height, width) = size, full_size
    boxes = objects["boxes"] * objects["boxes"].new_tensor([width / w, height / h] * 2)
    masks = paste_masks(objects["masks"], boxes, full_size).cpu().numpy()                  # (R, height, width)
    return [dict(category_id=label, score=score, bbox=[x1, y1, x2 - x1, y2 - y1],
                 segmentation=dict(size=full_size, counts=encode_rle(mask)["counts"].decode()))
            for (x1, y1, x2, y2), label, score, mask in zip(
                boxes.tolist(), objects["labels"].tolist(), objects["scores"].tolist(), masks)]


def draw_records(image: PIL.Image.Image, records: list[dict], names: list[str]) -> PIL.Image.Image:
    """The image, resized to DRAWN_SIZE, with mask, box, name and score of COCO's records that score 0.5 or more."""
    records = [record for record in records if record.get("score", 1) >= 0.5]
    pixels = np.array(image)
    for record in records:
        inside = read_mask(record["segmentation"], image.height, image.width)
        pixels[inside] = 0.4 * pixels[inside] + 0.6 * COLORS[record["category_id"] % IGNORED]
    picture = PIL.ImageOps.contain(PIL.Image.fromarray(pixels), (DRAWN_SIZE, DRAWN_SIZE))
    pen, font = PIL.ImageDraw.Draw(picture), PIL.ImageFont.load_default(13)
    for record in records:
        x, y, width, height = np.multiply(record["bbox"], picture.width / image.width)
        x1, y1, x2, y2 = np.clip([x, y, x + width, y + height], -9, DRAWN_SIZE + 9)        # Pillow walks all of an edge
        pen.rectangle((x1, y1, x2, y2), outline=tuple(COLORS[record["category_id"] % IGNORED]), width=2)
        text = names[record["category_id"]] + (f" {record['score']:.0%}" if "score" in record else "")
        pen.text((x1 + 4, y1 + 2), text, "white", font, stroke_width=2, stroke_fill="black")
    return picture


# ---- the command ----------------------------------------------------------------------------------------------------

def maskrcnn(argv=None):
    options = parse_maskrcnn(argv)
    runtime, data, test, start, config, visual = begin(options, "maskrcnn", "detection", options.short_side)
    names = data.classes
    options.steps = options.steps or max(1, round(options.epochs * (len(data) // options.batch_size)))
    net = MaskRCNN(visual, len(names), options).to(runtime.device)
    fine_tune(net, partial(losses_of, device=runtime.device, options=options, multiple=net.strides[3]), step_schedule,
              data, TrainObjects(options.short_side, options.long_side), options, runtime, start,
              dict(kind="maskrcnn", backbone=asdict(config), classes=names))
    evaluate_detector(net, names, test, options, runtime, start.out)


COMMANDS = dict(zeroshot=zeroshot, words=words, upernet=upernet, maskrcnn=maskrcnn)


def main(argv=None):
    """The first word of the command line says which; it has its own --help."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python dense.py {'|'.join(COMMANDS)} [CHECKPOINT] [options]\n\n{__doc__}")
    elif argv[0] not in COMMANDS:
        raise UserError(f"{argv[0]!r} is no command of dense.py: choose one of {', '.join(COMMANDS)}")
    else:
        COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    run(main)
