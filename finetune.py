"""End-to-end fine-tuning of the image tower for classification (supplement B), single-crop top-1.

    python finetune.py                                             runs/pocket/last.pt on the Shapes world, 64 classes
    python finetune.py --from-scratch --out runs/scratch           the control: the same without pre-training
    torchrun --nproc-per-node 8 finetune.py runs/yfcc/last.pt --recipe imagenet --data folder:imagenet --out runs/in1k
    python finetune.py --eval --out runs/in1k                      evaluates OUT/last.pt and trains nothing

    image ─► crop, flip, RandAugment, erasing ─► mixed with its neighbor in the batch (mixup or cutmix)
          ─► ViT, blocks skipped at random ─► mean of the last block's patches ─► LayerNorm ─► linear ─► logits

    recipe imagenet    epochs, warm-up, learning rates, layer decay, mean pooling    the supplement's
                       batch                                   paper silent: FT-CLIP's (same first author, same rate)
                       weight decay, stochastic depth, augmentation                  paper silent: MAE's
    recipe pocket      the same in miniature for the Shapes world, without the transforms that do not keep the class,
                       color and shape: RandAugment recolors, and a crop may miss the one object there is

Random choices follow from (seed, step), (seed, epoch, record) and the row in the global batch, never from the process.
So rows 2i and 2i+1 are each other's mixing partners, which no number of processes separates; as the records come in
random order, that is in law the same as timm's pairs of a batch and its reverse.
"""
import contextlib
import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ImageEnhance, ImageOps
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data import (BICUBIC, MEAN, STD, BadRecord, EvalTransform, TrainTransform, UserError, eval_loader, hash_names,
                  normalize, one_line, progress, to_tensor, train_loader)
from losses import mean_over_processes
from model import Config, VisionTransformer, image_tower, opt
from train import (Log, RunOptions, Runtime, StopSignal, check_bad, check_full, check_same_data, cosine_schedule,
                   find_resumable, first_look, layer_decay_groups, load_checkpoint, load_resumed, load_state,
                   open_mixed, parse, refuse_update, report_bad, run, save_atomically, setup, show_curves)


@dataclass
class Options(RunOptions):
    """Defaults are those of the recipe imagenet."""
    checkpoint: str = opt("runs/pocket/last.pt", "pre-trained model, from train.py", "what")
    recipe: str = opt("pocket", "the defaults of all other options", "what", ("pocket", "imagenet"))
    from_scratch: bool = opt(False, "random weights in place of the checkpoint's, as a control", "what")
    eval: bool = opt(False, "only evaluate OUT/last.pt, on the test split of its own data or of --data", "what")
    json: str = opt("", "file for the result as one JSON object", "run")
    resume: str = opt("auto", "auto: go on from OUT/last.pt if there; none: start over; or a checkpoint's path", "run")
    accumulate: int = opt(1, "micro-batches a step, to save memory", "run")
    checkpoint_every: float = opt(300.0, "seconds between checkpoints", "run")
    log_every: int = opt(20, "steps between lines of metrics.jsonl", "run")
    max_bad: float = opt(0.05, "stop when more than this share of the records read is bad", "run")
    epochs: float = opt(100.0, "passes over the data (paper: 100)", "recipe")
    warmup_epochs: float = opt(20.0, "epochs of linear warm-up from 0 (paper: 20)", "recipe")
    batch_size: int = opt(2048, "images a step, over all processes (paper silent; FT-CLIP: 2048)", "recipe")
    lr: float = opt(6e-4, "peak learning rate of the head (paper: 6e-4)", "recipe")
    lr_end: float = opt(1e-6, "its learning rate at the last step, reached by half a cosine (paper: 1e-6)", "recipe")
    layer_decay: float = opt(0.7, "learning rate of a block relative to the one above it (paper: 0.7)", "recipe")
    weight_decay: float = opt(0.05, "AdamW weight decay, see layer_decay_groups (paper silent; MAE: 0.05)", "recipe")
    clip_grad: float = opt(0.0, "largest gradient norm, 0: no clipping (paper silent; MAE: 0)", "recipe")
    drop_path: float = opt(0.1, "stochastic depth: share of samples that skip the last block (MAE: 0.1)", "recipe")
    crop_min: float = opt(0.08, "smallest share of the image a crop keeps, 1: whole image (MAE: 0.08)", "augmentation")
    flip: bool = opt(True, "mirror half of the images (MAE: yes)", "augmentation")
    randaugment: float = opt(9.0, "mean strength of RandAugment, 0 to 10, 0: off (MAE: 9)", "augmentation")
    erasing: float = opt(0.25, "share of images of which a rectangle is erased (MAE: 0.25)", "augmentation")
    mixup: float = opt(0.8, "alpha of mixup's Beta distribution, 0: off (MAE: 0.8)", "augmentation")
    cutmix: float = opt(1.0, "alpha of cutmix's Beta distribution, 0: off (MAE: 1.0)", "augmentation")
    smoothing: float = opt(0.1, "share of each label spread over all classes (MAE: 0.1)", "augmentation")
    crop_share: float = opt(0.875, "evaluation: side of the crop in short sides (MAE: 224/256)", "augmentation")


# paper: nothing so small; here: warm-up over a tenth of the run, a higher rate for fewer steps, no mixing and no
# erasing, which guard against learning images by heart: here an image is seen four times
RECIPES = {
    "imagenet": replace(Options(), recipe="imagenet"),
    "pocket": replace(Options(), data=("shapes:objects=1-1",), epochs=4.0, warmup_epochs=0.4, batch_size=128, lr=1e-3,
                      crop_min=1.0, flip=False, randaugment=0.0, erasing=0.0, mixup=0.0, cutmix=0.0, crop_share=1.0),
}


def parse_options(argv=None) -> Options:
    """The command line over the recipe it names; when only evaluating, over the test set of the run it evaluates."""
    defaults = replace(RECIPES[first_look(Options, argv, "recipe").recipe], out="runs/finetune")
    options = parse(Options, __doc__, argv, positional=("checkpoint",), defaults=defaults)
    if options.eval:
        trained = load_finetuned(Path(options.out) / "last.pt")["config"]
        defaults = replace(options, data=trained["data"], crop_share=trained["crop_share"])
        options = parse(Options, __doc__, argv, positional=("checkpoint",), defaults=defaults)
    return options


# ---------------------------------------------------------------------------------------------------------------------
# RandAugment: "rand-m9-mstd0.5-inc1" in timm's words, which MAE uses
#
# Two operations, drawn with replacement, each applied with probability 1/2 and a strength of its own.  Operations work
# harder the higher the strength, those at the top excepted, which have none.
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
    "posterize": lambda image, m, sign: image.point(lambda v: v >> 4 + int(4 * m) << 4 + int(4 * m)),
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

def erase(pixels: Tensor, rng: np.random.Generator):
    """Random erasing, in place: a rectangle of uint8 (3, H, W) becomes noise, normal (0, 1) once it is normalized.

    Its area is 2% to a third of the image's, height / width log-uniform from 0.3 to 1 / 0.3; ten draws to fit it in.
    timm erases after normalization, we before it: the 3% of the noise beyond what a pixel can hold are cut.
    """
    height, width = pixels.shape[1:]
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 1 / 3)
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            noise = 255 * (rng.standard_normal((h, w, 3)) * STD + MEAN)
            noise = torch.from_numpy(noise.round().clip(0, 255).astype(np.uint8)).permute(2, 0, 1)       # (3, h, w)
            pixels[:, top:top + h, left:left + w] = noise
            return


@dataclass
class Augment:
    """A training image, any size and mode, as uint8 (3, size, size): crop, flip, RandAugment, erasing."""
    size: int
    options: Options

    def __call__(self, image: PIL.Image.Image, rng: np.random.Generator) -> Tensor:
        o = self.options
        pixels = TrainTransform(self.size, scale=(o.crop_min, 1.0), flip=o.flip)(image, rng)
        if o.randaugment:
            image = PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy())
            pixels = to_tensor(rand_augment(image, o.randaugment, rng))
        if rng.random() < o.erasing:
            erase(pixels, rng)
        return pixels


@dataclass
class Labeled:
    """A record -> {"images": uint8 (3, size, size), "labels": int}."""
    transform: Augment | EvalTransform

    def __call__(self, sample, rng: np.random.Generator) -> dict:
        if sample.label < 0:
            raise BadRecord("no class")
        return dict(images=self.transform(sample.image, rng), labels=sample.label)


def draw_mixing(mixup: float, cutmix: float, height: int, width: int, rng: np.random.Generator):
    """How all rows of a batch are mixed: (lam, box), lam the share of a row's own image and label.

    One of mixup and cutmix, at even odds when both have an alpha.  lam is Beta(alpha, alpha).
    mixup    box is None
    cutmix   box (top, bottom, left, right): a share 1 - lam of the image, in its shape, centered anywhere and cut at
             the border; lam becomes the share that is really left
    """
    cut = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    alpha = cutmix if cut else mixup
    lam = rng.beta(alpha, alpha) if alpha > 0 else 1.0
    if not cut:
        return lam, None
    h, w = int(height * math.sqrt(1 - lam)), int(width * math.sqrt(1 - lam))
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(y - h // 2, 0), min(y + (h + 1) // 2, height)
    left, right = max(x - w // 2, 0), min(x + (w + 1) // 2, width)
    return 1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right)


def smooth(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B,) -> (B, classes): 1 - smoothing on the label, the rest spread evenly over all classes, the label too."""
    return (1 - smoothing) * F.one_hot(labels, classes).float() + smoothing / classes


def mix(images: Tensor, targets: Tensor, lam: float, box: tuple | None) -> tuple[Tensor, Tensor]:
    """images (B, 3, H, W) float, targets (B, classes), B even, as draw_mixing says -> the same shapes, mixed."""
    def partner(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)         # rows 1 0 3 2 5 4 ...

    if box is None:
        mixed = lam * images + (1 - lam) * partner(images)
    else:
        top, bottom, left, right = box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = partner(images)[:, :, top:bottom, left:right]
    return mixed, lam * targets + (1 - lam) * partner(targets)


# ---------------------------------------------------------------------------------------------------------------------
# Model and optimizer
# ---------------------------------------------------------------------------------------------------------------------

class Classifier(nn.Module):
    """The pre-trained tower, the mean of its last block's patches, a fresh norm and a linear layer (MAE's head)."""

    def __init__(self, config: Config, classes: int, drop_path: float):
        super().__init__()
        c = config
        self.visual = image_tower(c, drop_path)
        self.visual.norm = nn.Identity()             # a fresh one after the mean replaces it
        self.norm = nn.LayerNorm(c.width, eps=1e-6)
        self.head = nn.Linear(c.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def load_pretrained(self, visual: VisionTransformer):
        """All weights of the tower but its final norm."""
        self.visual.load_state_dict({k: v for k, v in visual.state_dict().items() if not k.startswith("norm.")})

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) normalized pixels -> (B, classes) logits"""
        x = self.visual(images)[:, 1:].mean(dim=1)                                              # (B, D)
        return self.head(self.norm(x))


def load_finetuned(path: Path) -> dict:
    """What `finetune` saved in OUT/last.pt."""
    if not path.is_file():
        raise UserError(f"no fine-tuned model at {path}; make one with: python finetune.py --out {path.parent}")
    state = load_state(path)
    if state.get("kind") != "finetuning":
        raise UserError(f"{path} was not written by finetune.py: give --out the folder of a fine-tuned model")
    return state


def classifier_of(state: dict) -> Classifier:
    """The model in a state of load_finetuned, by the config that lies with it.  Strict: every weight must be there."""
    try:
        model = Classifier(Config(**state["backbone"]), len(state["classes"]), state["config"]["drop_path"])
        model.load_state_dict(state["model"])
        return model
    except Exception as error:                  # of a damaged or hostile file, whatever stumbles over it
        raise UserError(f"a fine-tuned model does not fit its own config: {one_line(error)}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and training
# ---------------------------------------------------------------------------------------------------------------------

def open_classes(options: Options, split: str, size: int, classes: list[str] | None = None):
    """The labeled data; `classes`, if given, are those they must have."""
    data = open_mixed(options.data, split, "classes", size, Path(options.out) / "index")
    if data.classes is None or classes and data.classes != classes:
        raise UserError(f"the {split} data of {', '.join(options.data)} have other classes, or several lists of them: "
                        f"all data sets and splits must share one list")
    return data


@torch.no_grad()
def evaluate(model: Classifier, data, options: Options, runtime: Runtime) -> dict:
    """Single-crop accuracy; each image is counted once, whatever the number of processes.

    Returns top1, top5 in 0..1; images, the number counted; bad, the number that could not be read.
    """
    size = model.visual.grid * model.visual.patch_size
    transform = Labeled(EvalTransform(size, round(size / options.crop_share)))
    loader = eval_loader(data, transform, -(-options.batch_size // (runtime.world * options.accumulate)), runtime.rank,
                         runtime.world, runtime.workers)
    counts = torch.zeros(4, dtype=torch.long, device=runtime.device)
    model.eval()
    for batch in progress(loader, len(loader), "batches of images tested", runtime.is_main):
        counts[3] += report_bad(batch["bad"])
        if "labels" in batch:
            images, labels = (batch[name].to(runtime.device, non_blocking=True) for name in ("images", "labels"))
            with runtime.autocast():
                logits = model(normalize(images))                                               # (B, classes)
            right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]             # (B, 5)
            counts[:3] += torch.stack([right[:, 0].sum(), right.sum(), labels.new_tensor(len(labels))])
    if runtime.world > 1:
        dist.all_reduce(counts)
    top1, top5, images, bad = counts.tolist()
    if not images:
        raise UserError(f"none of the {len(data)} test records of {', '.join(options.data)} can be read")
    return dict(top1=top1 / images, top5=top5 / images, images=images, bad=bad)


def finetune(options: Options, runtime: Runtime) -> tuple[Classifier, object]:
    """Trains, leaves OUT/last.pt, returns the model and its test data."""
    stop = StopSignal()
    share, out = runtime.share(options.batch_size), Path(options.out)
    if share % (2 * options.accumulate):
        raise UserError(f"--batch-size {options.batch_size} is {share} images a process, which are mixed in pairs: "
                        f"choose a multiple of {2 * options.accumulate * runtime.world}")
    runtime.claim(out)
    state = find_resumable(options, out, "finetuning")
    if state:
        core, config = classifier_of(state), Config(**state["backbone"])
    else:
        pretrained, _, config = load_checkpoint(options.checkpoint)
    data = open_classes(options, "train", config.image_size)
    test = open_classes(options, "val", config.image_size, data.classes)
    if len(data) < options.batch_size:
        raise UserError(f"{len(data)} records do not fill one batch: choose a --batch-size below {options.batch_size}")
    identity = hash_names(data)
    if state:
        check_same_data(state, identity, out)
    else:
        core = Classifier(config, len(data.classes), options.drop_path)
        if not options.from_scratch:
            core.load_pretrained(pretrained.visual)
    steps_per_epoch = len(data) // options.batch_size
    total, warmup = int(options.epochs * steps_per_epoch), int(options.warmup_epochs * steps_per_epoch)
    if not total:
        raise UserError(f"--epochs {options.epochs:g} of {steps_per_epoch} steps are not one: give more")

    core.to(runtime.device)
    groups = layer_decay_groups(core, options.lr, options.weight_decay, options.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    first, bad_count = 0, 0
    if state:
        load_resumed(optimizer.load_state_dict, state["optimizer"], out)
        first, bad_count = state["step"], state["bad_count"]
    runtime.check_alike(step_to_go_on_from=first, hash_of_the_data=identity)
    model = core
    if runtime.world > 1:
        model = DistributedDataParallel(core, broadcast_buffers=False, gradient_as_bucket_view=True)
    loader = train_loader(data, Labeled(Augment(config.image_size, options)), options.batch_size, options.seed,
                          range(first, total), runtime.rank, runtime.world, runtime.workers)
    log = Log(out, runtime.is_main, total, options.batch_size, first)
    if runtime.is_main:
        announce(options, core, data, test, total, first, runtime)

    def save(step: int) -> bool:
        return not runtime.is_main or save_atomically(out / "last.pt", dict(
            kind="finetuning", config=asdict(options), backbone=asdict(config), classes=data.classes, data=identity,
            step=step, bad_count=bad_count, model=core.state_dict(), optimizer=optimizer.state_dict(),
            mean=list(MEAN), std=list(STD), torch=str(torch.__version__)))

    saved, skipped = time.monotonic(), 0
    core.train()
    for step, batch in enumerate(loader, start=first):
        lr = cosine_schedule(step, total, warmup, options.lr, options.lr_end)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        bad = report_bad(batch["bad"])
        check_full(batch, share, step)

        images, labels = (batch[name].to(runtime.device, non_blocking=True) for name in ("images", "labels"))
        rng = np.random.default_rng((options.seed, step))
        lam, box = draw_mixing(options.mixup, options.cutmix, *images.shape[2:], rng)
        images, targets = mix(normalize(images), smooth(labels, len(data.classes), options.smoothing), lam, box)

        optimizer.zero_grad()
        loss = torch.zeros((), device=runtime.device)
        parts = list(zip(images.chunk(options.accumulate), targets.chunk(options.accumulate)))
        for i, (part, target) in enumerate(parts):
            last = i == len(parts) - 1
            torch.manual_seed((options.seed << 32) + step * options.accumulate + i)     # says which blocks are skipped
            with contextlib.nullcontext() if last or model is core else model.no_sync():
                with runtime.autocast():
                    logits = model(part)                                                        # (B, classes)
                part_loss = F.cross_entropy(logits.float(), target) / len(parts)
                part_loss.backward()
            loss += part_loss.detach()
        norm = nn.utils.clip_grad_norm_(core.parameters(), options.clip_grad or math.inf)

        # one meeting a step: the mean loss, whether some process was asked to stop, the bad records of all
        mean, stopping, bad = mean_over_processes(torch.stack(
            [loss, *loss.new_tensor([float(stop.is_set), float(bad)])])).tolist()
        bad_count += round(bad * runtime.world)
        check_bad(bad_count, (step + 1) * options.batch_size, options.max_bad)
        if math.isfinite(mean) and math.isfinite(norm.item()):
            skipped = 0
            optimizer.step()
        else:
            skipped += 1
            refuse_update(dict(loss=mean), norm.item(), step, skipped, out)
        if (step + 1) % options.log_every == 0 or step + 1 == total:
            log.line(step, dict(epoch=(step + 1) / steps_per_epoch, loss=mean, lr=lr, grad_norm=norm.item()))
        else:
            log.pulse(step)
        if stopping:
            if not skipped and save(step + 1) and runtime.is_main:
                print(f"stopped after step {step + 1}; the same command goes on from there", flush=True)
            sys.exit(128 + (stop.number or signal.SIGTERM))
        if time.monotonic() - saved > options.checkpoint_every and step + 1 < total and not skipped:
            save(step + 1)
            saved = time.monotonic()

    if first < total and not save(total):
        raise UserError(f"the finished model could not be saved in {out}: free some space and run the command again")
    if runtime.is_main:
        show_curves(out)
    return core, test


def announce(o: Options, model: Classifier, data, test, total: int, first: int, runtime: Runtime):
    parameters = sum(p.numel() for p in model.parameters())
    print(f"fine-tuning {'random weights' if o.from_scratch else o.checkpoint} with recipe {o.recipe}: "
          f"{parameters / 1e6:.1f} M parameters, {len(data.classes)} classes, {len(data)} images, {total} steps of "
          f"{o.batch_size}; {runtime.world} x {runtime.device.type}, {'bf16' if runtime.bf16 else 'fp32'}", flush=True)
    for note in getattr(data, "notes", ()):
        print(f"note: {note}", flush=True)
    if data.name(0) == test.name(0):
        print("note: these data have no test split: accuracy will be that on the training images", flush=True)
    if first:
        print(f"going on from step {first} of {o.out}/last.pt", flush=True)


def main(argv=None):
    options = parse_options(argv)
    runtime = setup(options)
    if options.eval:
        state = load_finetuned(Path(options.out) / "last.pt")
        model = classifier_of(state).to(runtime.device)
        test = open_classes(options, "val", Config(**state["backbone"]).image_size, state["classes"])
    else:
        model, test = finetune(options, runtime)
    result = evaluate(model, test, options, runtime)
    if runtime.is_main:
        print(f"fine-tuned, single crop: top-1 {result['top1']:.2%}  top-5 {result['top5']:.2%}  "
              f"({result['images']} images, {result['bad']} bad records left out)", flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(dict(result, task="finetune", data=options.data)) + "\n")


if __name__ == "__main__":
    run(main)
