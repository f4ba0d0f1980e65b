"""End-to-end fine-tuning of the image tower for classification (supplement B), single-crop top-1.

    python finetune.py                                             runs/pocket/last.pt on the Shapes world, 64 classes
    python finetune.py --from-scratch --out runs/scratch           the control: the same without pre-training
    torchrun --nproc-per-node 8 finetune.py runs/yfcc/last.pt --data folder:imagenet --out runs/in1k
    python finetune.py --eval --out runs/in1k                      evaluates OUT/last.pt and trains nothing

    image ─► crop, flip, RandAugment, erasing ─► mixed with its neighbor in the batch (mixup or cutmix)
          ─► ViT, blocks skipped at random ─► mean of the last block's patches ─► LayerNorm ─► linear ─► logits

    recipe imagenet    epochs, warm-up, learning rates, layer decay, mean pooling    the supplement's
                       batch                                   paper silent: FT-CLIP's (same first author, same rate)
                       weight decay, stochastic depth, augmentation                  paper silent: MAE's
    recipe pocket      the same in miniature for the Shapes world, without the transforms that do not keep the class,
                       color and shape: RandAugment recolors, and a crop may miss the one object there is

In reading order:  options; the network; the loop, which dense.py shares; the test; the command;
augmentation.
Random choices follow from the seed, the epoch, the step, the record and its row in the global batch, never from the
process.  So rows 2i and 2i+1 are each other's mixing partners, which no number of processes separates; as the records
come in random order, these pairs are as random as timm's of a batch and its reverse.
"""
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from PIL import ImageEnhance, ImageOps
from torch import Tensor, nn

import data as data_module
from data import BICUBIC, MEAN, BadRecord, UserError, crop_box, normalize, run, say, seed_of, to_tensor, write_json
from model import Config, VisionTransformer, image_tower, load_checkpoint, load_state, opt
from train import (CheckpointOptions, Guard, Log, Runtime, Start, StopSignal, clip_gradient, cosine_schedule,
                   draw_curves, extract, find_resumable, first_look, layer_decay_groups, open_mixed, parse,
                   set_learning_rate, setup, show, tell_shared, wrap)


# ---------------------------------------------------------------------------------------------------------------------
# Options and recipes
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class LoopOptions:
    """What `fine_tune` takes, whatever the task."""
    resume: str = opt("auto", "auto: go on from OUT/last.pt if there; none: start over; or a checkpoint's path", "run")
    checkpoint_every: float = opt(300.0, "seconds between checkpoints", "run")
    log_every: int = opt(20, "steps between lines of metrics.jsonl", "run")
    max_bad: float = opt(0.05, "stop when more than this share of the records read is bad", "run")


@dataclass
class Options(LoopOptions, CheckpointOptions):
    """Defaults are those of the recipe imagenet."""
    recipe: str = opt("auto", "the defaults of all other options: the paper's on ImageNet, or one for a CPU; auto: the "
                      "latter for shapes", "what", ("auto", "pocket", "imagenet"))
    from_scratch: bool = opt(False, "random weights in place of the checkpoint's, as a control", "what")
    eval: bool = opt(False, "only evaluate OUT/last.pt, on the test split of its own data or of --data", "what")
    accumulate: int = opt(1, "micro-batches a step, to save memory", "run")
    epochs: float = opt(100.0, "passes over the data (paper: 100)", "recipe")
    warmup_epochs: float = opt(20.0, "epochs of linear warm-up from 0 (paper: 20), a fifth of the run at most (ours)",
                               "recipe")
    batch_size: int = opt(2048, "images a step, over all processes (paper silent; FT-CLIP: 2048)", "recipe")
    lr: float = opt(6e-4, "peak learning rate of the head (paper: 6e-4)", "recipe")
    lr_end: float = opt(1e-6, "its learning rate at the last step, reached by half a cosine (paper: 1e-6)", "recipe")
    layer_decay: float = opt(0.7, "learning rate of a block relative to the one above it (paper: 0.7)", "recipe")
    weight_decay: float = opt(0.05, "AdamW weight decay, see layer_decay_groups (paper silent; MAE: 0.05)", "recipe")
    clip_grad: float = opt(0.0, "largest gradient norm, 0: no clipping (paper silent; MAE: 0)", "recipe")
    drop_path: float = opt(0.1, "stochastic depth: share of samples that skip the last block (MAE: 0.1)", "recipe")
    crop_min: float = opt(0.08, "smallest share of the image a crop keeps, 1: all that fits between 3:4 and 4:3 (MAE: "
                          "0.08)", "augmentation")
    flip: bool = opt(True, "mirror half of the images (MAE: yes)", "augmentation")
    randaugment: float = opt(9.0, "mean strength of RandAugment, 0 to 10, 0: off (MAE: 9)", "augmentation")
    erasing: float = opt(0.25, "share of images of which a rectangle is erased (MAE: 0.25)", "augmentation")
    mixup: float = opt(0.8, "alpha of mixup's Beta distribution, 0: off (MAE: 0.8)", "augmentation")
    cutmix: float = opt(1.0, "alpha of cutmix's Beta distribution, 0: off (MAE: 1.0)", "augmentation")
    smoothing: float = opt(0.1, "share of each label spread over all classes (MAE: 0.1)", "augmentation")
    crop_share: float = opt(0.875, "evaluation: side of the crop as a share of the short side (MAE: 224/256)",
                            "augmentation")


# paper: nothing so small; here: warm-up over a tenth of the run, a higher rate for fewer steps, no mixing and no
# erasing, which guard against learning images by heart: here an image is seen four times
RECIPES = {
    "imagenet": Options(),
    "pocket": replace(Options(), data=("shapes:objects=1-1",), epochs=4.0, warmup_epochs=0.4, batch_size=128, lr=1e-3,
                      crop_min=1.0, flip=False, randaugment=0.0, erasing=0.0, mixup=0.0,
                      cutmix=0.0, crop_share=1.0),
}


def recipe_for(asked, paper: str) -> str:
    """What --recipe says; auto: pocket if --data, given or by default, is shapes, else the `paper`'s."""
    shapes = "".join(asked.data).startswith("shapes")
    return asked.recipe if asked.recipe != "auto" else "pocket" if shapes else paper


def parse_options(argv=None) -> Options:
    """The command line over the recipe for it; when only evaluating, over the test set of the run it evaluates."""
    asked = first_look(Options, argv, "recipe", "data", "eval", "out")
    recipe = recipe_for(asked, "imagenet")
    defaults = replace(RECIPES[recipe], out="runs/finetune")
    if asked.eval:
        trained = load_finetuned(asked.out or defaults.out)["config"]
        defaults = replace(defaults, **{name: trained[name] for name in ("checkpoint", "data", "crop_share")})
    options = parse(Options, __doc__, argv, positional=("checkpoint",), defaults=defaults, own="imagenet")
    if options.eval and options.checkpoint != trained["checkpoint"]:
        raise UserError(f"--eval tests OUT/last.pt, not {options.checkpoint}: name its folder with --out")
    return replace(options, recipe=recipe)


def load_finetuned(out: str) -> dict:
    """What fine_tune saved in OUT/last.pt."""
    path = Path(out) / "last.pt"
    if not path.is_file():
        raise UserError(f"no fine-tuned model at {path}; make one with: python finetune.py --out {out}")
    return load_state(path, "finetuning")


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------

class Classifier(nn.Module):
    """The pre-trained tower, the mean of its last block's patches, a fresh norm and a linear layer (MAE's head)."""

    def __init__(self, visual: VisionTransformer, classes: int):
        super().__init__()
        self.visual, D = visual, visual.cls_token.shape[-1]
        self.visual.norm = nn.Identity()             # a fresh one after the mean replaces it
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.head = nn.Linear(D, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) normalized pixels -> (B, classes) logits"""
        x = self.visual(images)[:, 1:].mean(dim=1)                                              # (B, D)
        with torch.autocast(x.device.type, enabled=False):      # logits are ranked: rounded to bf16, many would tie
            return self.head(self.norm(x.float()))


# ---------------------------------------------------------------------------------------------------------------------
# The loop, for all that is fine-tuned: here classification, in dense.py segmentation and detection
# ---------------------------------------------------------------------------------------------------------------------

def find_tower(options, kind: str, runtime: Runtime) -> tuple[Start, Config, VisionTransformer]:
    """Where the run begins, whose folder OUT it holds from now on, and its image tower: of the checkpoint, but for
    weights that --from-scratch does not want or that OUT/last.pt has further trained."""
    runtime.claim(Path(options.out))
    start = find_resumable(options, Path(options.out), kind)
    if start.state:
        config = Config(**start.state["backbone"])
    else:
        model, _, config = load_checkpoint(options.checkpoint)
    visual = image_tower(config, options.drop_path)
    if not (start.state or options.from_scratch):
        visual.load_state_dict(model.visual.state_dict())
    return start, config, visual


def fine_tune(net: nn.Module, losses_of: Callable, schedule: Callable, data, transform, options, runtime: Runtime,
              start: Start, more: dict, accumulate: int = 1):
    """Trains all of net with AdamW and layer-wise decay, as train.py trains: writes OUT/metrics.jsonl and OUT/last.pt.

    losses_of   (model, batch, step) -> {name: loss} of this process's batch or micro-batch, as the loader gave it; the
                sum is minimized.  Random numbers are seeded alike on all processes, for stochastic depth, which draws
                for the samples of all; for what each process draws by itself losses_of has a generator of its own
    schedule    (step, total, warmup) -> share of the peak learning rate
    options     steps, warmup_steps, batch_size, lr, layer_decay, weight_decay, clip_grad, seed, and of the run
                checkpoint_every, log_every, max_bad
    start       what to go on from: see find_resumable
    more        what else OUT/last.pt holds, with "kind"
    """
    o = options
    if len(data) < o.batch_size:
        raise UserError(f"{len(data)} records are fewer than a batch of {o.batch_size}: choose a smaller --batch-size")
    if not o.steps:
        raise UserError("what is asked for is not one step: give more of it, --epochs or --steps")
    optimizer = torch.optim.AdamW(layer_decay_groups(net, o.lr, o.weight_decay, o.layer_decay), fused=True)
    start.use(data)
    start.load(net, "model")
    start.load(optimizer, "optimizer")
    runtime.check_alike(step_to_go_on_from=start.step, hash_of_the_data=start.data)
    model = wrap(net, runtime)

    def state(step: int, bad_count: int) -> dict:
        return dict(more, config=asdict(o), data=start.data, step=step, total=o.steps, bad_count=bad_count,
                    model=net.state_dict(), optimizer=optimizer.state_dict())

    loader = data_module.train_loader(data, transform, o.batch_size, o.seed, range(start.step, o.steps), runtime.rank,
                                      runtime.world, runtime.workers)
    log = Log(start.out, runtime.is_main, o.steps, o.batch_size, start.step)
    guard = Guard(o, runtime, StopSignal(), o.steps, start, state)
    if runtime.is_main:
        millions = sum(p.numel() for p in net.parameters()) / 1e6
        say(f"{more['kind']}, recipe {o.recipe}, from {'random weights' if o.from_scratch else o.checkpoint}: "
            f"{millions:.1f} M parameters, {len(data.classes)} classes, {len(data)} images, {o.steps} steps of "
            f"{o.batch_size}; {runtime}")
        data_module.say_notes(data)
        start.announce(o.steps)
    net.train()
    for step, batch in guard.batches(loader):
        lr = o.lr * schedule(step, o.steps, o.warmup_steps)
        set_learning_rate(optimizer, lr)
        optimizer.zero_grad()
        terms = backward(model, losses_of, batch, step, o.seed, runtime, accumulate)
        norm = clip_gradient(optimizer, o.clip_grad, runtime)
        if guard.accepts(step, terms, norm):
            optimizer.step()
        if log.is_due(step, o.log_every):
            epoch, loss = (step + 1) / (len(data) // o.batch_size), sum(guard.terms.values())
            log.line(step, dict(epoch=epoch, loss=loss, lr=lr) | guard.terms | dict(grad_norm=guard.norm))
        guard.end(step)
    guard.finish()
    if runtime.is_main:
        show("curves.png", start.out, draw_curves, start.out / "metrics.jsonl")
    net.eval()


def backward(model: nn.Module, losses_of: Callable, batch: dict, step: int, seed: int, runtime: Runtime,
             accumulate: int = 1) -> dict[str, Tensor]:
    """Forward and backward of a batch in `accumulate` equal parts.  Returns the losses, each the mean of its parts'."""
    rows, terms = len(batch["images"]) // accumulate, {}
    for i in range(accumulate):
        part = {name: values[i * rows:(i + 1) * rows] for name, values in batch.items()}
        torch.manual_seed(seed_of(seed, step, i))                   # which says what blocks stochastic depth skips
        with runtime.autocast():
            losses = losses_of(model, part, step)
        runtime.scaler.scale(sum(losses.values()) / accumulate).backward()
        terms = {name: terms.get(name, 0.0) + loss.detach() / accumulate for name, loss in losses.items()}
    return terms


# ---------------------------------------------------------------------------------------------------------------------
# Classification: the run, and its test
# ---------------------------------------------------------------------------------------------------------------------

def open_classes(o: Options, split: str, size: int, classes: list[str] | None = None):
    """The labeled data; `classes`, if given, are those they must have."""
    data = open_mixed(o.data, split, "classes", size, Path(o.out) / "index")
    data_module.want_several(data, ", ".join(o.data))
    if data.classes is None or classes and data.classes != classes:
        raise UserError(f"the {split} data of {', '.join(o.data)} have other classes, or several lists of them: "
                        f"all data sets and splits must share one list")
    return data


def finetune(o: Options, runtime: Runtime) -> tuple[Classifier, object]:
    """Trains, leaves OUT/last.pt, returns the model and its test data."""
    mixes = bool(o.mixup or o.cutmix)
    multiple = (1 + mixes) * o.accumulate * runtime.world
    if o.batch_size % multiple:
        raise UserError(f"--batch-size {o.batch_size}: it is divided among processes and micro-batches"
                        f"{', whose images are mixed in pairs' * mixes}: choose a multiple of {multiple}")
    start, config, visual = find_tower(o, "finetuning", runtime)
    data = open_classes(o, "train", config.image_size)
    test = open_classes(o, "val", config.image_size, data.classes)
    model = Classifier(visual, len(data.classes)).to(runtime.device)
    per_epoch = len(data) // o.batch_size
    o.steps = int(o.epochs * per_epoch)
    o.warmup_steps = min(int(o.warmup_epochs * per_epoch), o.steps // 5)    # a short run shall leave it
    if runtime.is_main:
        tell_shared(data, test)

    def losses_of(model: nn.Module, batch: dict, step: int) -> dict[str, Tensor]:
        images, labels = (batch[name].to(runtime.device, non_blocking=True) for name in ("images", "labels"))
        images, labels = normalize(images), smooth(labels, len(data.classes), o.smoothing)
        erase(images, batch["erased"], batch["index"], o.seed, step)
        if mixes:
            own = draw_mixing(o.mixup, o.cutmix, *images.shape[2:], np.random.default_rng((o.seed, step)))
            images, labels = mix(images, labels, own)
        return dict(loss=F.cross_entropy(model(images), labels))

    schedule = partial(cosine_schedule, peak=1.0, final=o.lr_end / (o.lr or 1.0))
    fine_tune(model, losses_of, schedule, data, Augment(config.image_size, o), o, runtime, start,
              dict(kind="finetuning", backbone=asdict(config), classes=data.classes), accumulate=o.accumulate)
    return model, test


def load_model(o: Options, runtime: Runtime) -> tuple[Classifier, object]:
    """The model that a run left in OUT/last.pt, and the test data that o names."""
    state = load_finetuned(o.out)
    config = Config(**state["backbone"])
    model = Classifier(image_tower(config), len(state["classes"]))
    Start(Path(o.out), state).load(model, "model")
    return model.to(runtime.device).eval(), open_classes(o, "val", config.image_size, state["classes"])


def evaluate(model: Classifier, data, o: Options, runtime: Runtime) -> dict:
    """Single-crop accuracy: top1, top5 in 0..1; images, how many; bad, those unreadable or without a class."""
    def guesses(images: Tensor) -> Tensor:                                                      # -> (B, 5) classes
        return model(images).topk(min(5, len(data.classes))).indices

    size = model.visual.grid * model.visual.patch_size
    transform = data_module.EvalTransform(size, round(size / o.crop_share))
    found = extract(data, transform, guesses, runtime, o.batch_size // o.accumulate)
    label = found["label"]                                                                      # (n,)
    right = (found["features"].cpu() == label[:, None])[label >= 0].double()                    # (images, 5)
    if not len(right):
        raise UserError(f"no test record of {', '.join(o.data)} has a class")
    return dict(top1=right[:, 0].mean().item(), top5=right.sum(dim=1).mean().item(), images=len(right),
                bad=len(data) - len(right))


def main(argv=None):
    o = parse_options(argv)
    runtime = setup(o)
    model, test = load_model(o, runtime) if o.eval else finetune(o, runtime)
    if runtime.is_main:
        data_module.say_notes(test)
    result = evaluate(model, test, o, runtime)
    if runtime.is_main:
        say(f"fine-tuned, single crop: top-1 {result['top1']:.2%}  top-5 {result['top5']:.2%}  "
            f"({result['images']} images, {result['bad']} bad records left out)")
        write_json(o.json, dict(result, task="finetune", data=o.data, out=o.out))


# ---------------------------------------------------------------------------------------------------------------------
# RandAugment: "rand-m9-mstd0.5-inc1" in timm's words, which MAE uses
#
# Two operations, drawn with replacement, each applied with probability 1/2 and a strength of its own.  Operations work
# harder the higher the strength, but for the first three, which have none.
# ---------------------------------------------------------------------------------------------------------------------

FILL = tuple(round(255 * mean) for mean in MEAN)             # where a moved image leaves nothing: the mean color


def warp(image: PIL.Image.Image, *matrix: float) -> PIL.Image.Image:
    """Output pixel (x, y) from (a x + b y + c, d x + e y + f) of the image; matrix is a ... f."""
    return image.transform(image.size, PIL.Image.Transform.AFFINE, matrix, resample=BICUBIC, fillcolor=FILL)


def blend(m: float, sign: int) -> float:
    """Share of the image when blended with its gray, flat, black or blurred version; above 1 away from that."""
    return max(0.1, 1 + sign * 0.9 * m)


# name: (image, strength m in 0..1, sign +1 or -1 at random) -> image
OPERATIONS = {
    "auto_contrast": lambda image, m, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, m, sign: ImageOps.equalize(image),
    "invert": lambda image, m, sign: ImageOps.invert(image),
    "rotate": lambda image, m, sign: image.rotate(sign * 30 * m, resample=BICUBIC, fillcolor=FILL),
    "posterize": lambda image, m, sign: image.point(lambda v: v >> (4 + int(4 * m)) << (4 + int(4 * m))),
    "solarize": lambda image, m, sign: ImageOps.solarize(image, 256 - int(256 * m)),
    "solarize_add": lambda image, m, sign: image.point(lambda v: min(255, v + int(110 * m)) if v < 128 else v),
    "color": lambda image, m, sign: ImageEnhance.Color(image).enhance(blend(m, sign)),
    "contrast": lambda image, m, sign: ImageEnhance.Contrast(image).enhance(blend(m, sign)),
    "brightness": lambda image, m, sign: ImageEnhance.Brightness(image).enhance(blend(m, sign)),
    "sharpness": lambda image, m, sign: ImageEnhance.Sharpness(image).enhance(blend(m, sign)),
    "shear_x": lambda image, m, sign: warp(image, 1, sign * 0.3 * m, 0, 0, 1, 0),
    "shear_y": lambda image, m, sign: warp(image, 1, 0, 0, sign * 0.3 * m, 1, 0),
    "translate_x": lambda image, m, sign: warp(image, 1, 0, sign * 0.45 * m * image.width, 0, 1, 0),
    "translate_y": lambda image, m, sign: warp(image, 1, 0, 0, 0, 1, sign * 0.45 * m * image.height),
}


def rand_augment(image: PIL.Image.Image, magnitude: float, rng: np.random.Generator) -> PIL.Image.Image:
    """RGB image -> RGB image of the same size; magnitude 0 to 10."""
    for name in rng.choice(list(OPERATIONS), size=2):
        m, sign = min(max(rng.normal(magnitude, 0.5) / 10, 0.0), 1.0), 1 if rng.random() < 0.5 else -1
        if rng.random() < 0.5:
            image = OPERATIONS[name](image, m, sign)
    return image


# ---------------------------------------------------------------------------------------------------------------------
# Erasing, mixing, smoothing
# ---------------------------------------------------------------------------------------------------------------------

def erase(images: Tensor, boxes: Tensor, records: Tensor, *seed: int):
    """Random erasing, in place: in each image (3, H, W) of normalized pixels its box, (left, top, width, height),
    becomes noise, normal (0, 1), that follows from seed and record; a box of width 0 is none.

    boxes (B, 4), records (B,): on the CPU
    """
    generator = torch.Generator(images.device)
    for image, (left, top, w, h), record in zip(images, boxes.tolist(), records.tolist()):
        if w:
            generator.manual_seed(seed_of(*seed, record))
            noise = torch.randn(3, h, w, generator=generator, device=images.device)
            image[:, top:top + h, left:left + w] = noise


@dataclass
class Augment:
    """A record -> images uint8 (3, size, size), cropped, mirrored, RandAugmented; labels, its class; erased, the box
    that the device shall erase: 2% to a third of the image's area, its shape log-uniform between 0.3 and 1 / 0.3."""
    size: int
    options: Options

    def __call__(self, sample, rng: np.random.Generator) -> dict:
        if sample.label < 0:
            raise BadRecord("no class")
        o = self.options
        pixels = data_module.TrainTransform(self.size, scale=(o.crop_min, 1.0), flip=o.flip)(sample.image, rng)
        if o.randaugment:
            image = PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy())
            pixels = to_tensor(rand_augment(image, o.randaugment, rng))
        is_erased = rng.random() < o.erasing
        box = crop_box(self.size, self.size, (0.02, 1 / 3), (0.3, 1 / 0.3), rng) if is_erased else (0, 0, 0, 0)
        return dict(images=pixels, labels=sample.label, erased=torch.tensor(box))


def draw_mixing(mixup: float, cutmix: float, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """How all images of a batch are mixed: (height, width), the share of an image's own pixel; the rest is its
    partner's, and the mean of all is the share of its own label.

    One of mixup and cutmix, at even odds if both alphas are above 0; one of them must be.  lam is Beta(alpha, alpha).
    mixup    lam everywhere
    cutmix   0 in a box, 1 around it; the box is 1 - lam of the image, in its shape, centered anywhere and cut at the
             border
    """
    cut = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    alpha = cutmix if cut else mixup
    lam = rng.beta(alpha, alpha)
    if not cut:
        return np.full((height, width), lam)

    def along(side: int) -> slice:
        length, center = int(side * math.sqrt(1 - lam)), int(rng.integers(side))
        return slice(max(center - length // 2, 0), center + (length + 1) // 2)
    own = np.ones((height, width))
    own[along(height), along(width)] = 0
    return own


def smooth(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B,) -> (B, classes): 1 - smoothing on the label, the rest spread evenly over all classes, the label too."""
    return (1 - smoothing) * F.one_hot(labels, classes).float() + smoothing / classes


def mix(images: Tensor, labels: Tensor, own: np.ndarray) -> tuple[Tensor, Tensor]:
    """images (B, 3, H, W) float, labels (B, classes), B even, own (H, W) from draw_mixing -> images, labels, mixed."""
    def mixed(x: Tensor, own: Tensor | float) -> Tensor:
        partner = x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)         # rows 1 0 3 2 5 4 ...
        return own * x + (1 - own) * partner
    return mixed(images, torch.from_numpy(own).float().to(images.device)), mixed(labels, own.mean().item())


if __name__ == "__main__":
    run(main)
