"""Linear probing: how much of the classes a linear map finds in the frozen image tower.

    backbone   frozen, in evaluation mode; the feature of an image is what pre-training contrasted,
               the class token or the mean of the patches (FILIP's are contrasted one by one) after the final norm
    head       BatchNorm without scale and shift, then a linear layer
    training   cross-entropy; LARS with momentum 0.9 and no weight decay; 90 epochs; learning rate 6.4 at batch 16384,
               scaled with the batch (not under 100,000 records), from 0 in 10 epochs, then cosine to 0; random crops,
               one draw an image, and mirroring
    test       top-1; short side resized to 256/224 of the input side, center cut out
                                                                                    (supplement B; MAE)
    python eval_linear.py                                                  runs/pocket/last.pt, scenes of one object
    torchrun --nproc-per-node 8 eval_linear.py CHECKPOINT --data folder:IMAGENET --augment     the paper's protocol

Without --augment each image is read and encoded once.  The head is small, so every process trains it on the whole
batch: statistics and gradients are those of one process, on any number of them.
Letters: n records, B batch, D width, C classes.
"""
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data as data_module
from data import EvalTransform, TrainTransform, UserError, run, say, write_json
from losses import gather
from model import MaskCLIP, build, load_checkpoint, opt, pool_tokens
from train import (CheckpointOptions, ReadRecord, Runtime, cosine_schedule, extract, parse, report_bad, setup,
                   tell_shared)

FEW = 100_000       # fewer training records than this are trained on in smaller steps, see `recipe`
AT_ONCE = 256       # images that a process encodes at once


@dataclass
class Options(CheckpointOptions):
    feature: str = opt("auto", "the class token, or the mean or maximum of the patches, after the final norm; "
                       "auto: what pre-training contrasted (paper silent, MAE: cls)", "what",
                       ("auto", "cls", "mean", "max"))
    augment: bool = opt(False, "crop and mirror at random, so features are computed in each epoch (paper); else once",
                        "what")
    control: bool = opt(False, "probe an untrained network of the same shape too", "what")
    split: str = opt("val", "part of the data to test on", "what")
    epochs: int = opt(90, "passes over the training records (paper)", "recipe")
    batch_size: int = opt(0, "records a step, over all processes; 0: 16384 (paper), for fewer than 100,000 records an "
                          "eighth of them, 512 at most", "recipe")
    lr: float = opt(6.4, "peak learning rate at batch 16384, scaled with the batch (paper); for fewer than 100,000 "
                    "records that of any batch", "recipe")
    # paper: silent, and follows MAE; here: its share of the run, because a run of few epochs would only warm up
    warmup_epochs: float = opt(-1.0, "epochs of linear warm-up; -1: a ninth of all (MAE: 10 of 90)", "recipe")


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and head
# ---------------------------------------------------------------------------------------------------------------------

class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling, as in MoCo v3 and MAE:

        matrices              g <- g + weight_decay * w;  g <- g * 0.001 * |w| / |g|   (unscaled if a norm is 0)
        biases and norms      g as it is, and no decay
        momentum buffer       mu <- momentum * mu + g
        step                  w <- w - lr * mu

    So a matrix moves by a share of its own norm, however large its gradient is.
    """
    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                g = w.grad
                if g is None:
                    continue
                if w.ndim > 1:
                    g = g + group["weight_decay"] * w
                    w_norm, g_norm = w.norm(), g.norm()
                    g = g * torch.where((w_norm > 0) & (g_norm > 0), 0.001 * w_norm / g_norm, 1.0)
                mu = self.state[w].setdefault("mu", torch.zeros_like(w))
                mu.mul_(group["momentum"]).add_(g)
                w.sub_(group["lr"] * mu)


def make_head(width: int, classes: int, seed: int) -> nn.Sequential:
    """(B, D) -> (B, C)"""
    torch.manual_seed(seed)
    head = nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), nn.Linear(width, classes))
    nn.init.trunc_normal_(head[1].weight, std=0.01)
    nn.init.zeros_(head[1].bias)
    return head


def recipe(options: Options, records: int) -> tuple[int, float]:
    """(batch size, peak learning rate).

    paper: 7,000 steps with a rate scaled with the batch; here: not scaled for few records, because LARS moves a matrix
    by a share of its norm in each step, and in some hundred steps the scaled rate would not take it far
    """
    few = records < FEW
    batch_size = options.batch_size or (max(2, min(512, records // 8)) if few else 16384)
    if batch_size < 2:
        raise UserError("--batch-size 1: the head's batch norm compares images, and wants 2 or more")
    if batch_size > records:
        raise UserError(f"{records} training records are fewer than a batch of {batch_size}: choose a --batch-size")
    return batch_size, options.lr * (1 if few else batch_size / 16384)


def train_head(head: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], steps: int, warmup: int, peak: float):
    """On batches of features (B, D) and labels (B,), -1 unknown, `steps` of them."""
    optimizer = LARS(head.parameters(), peak, momentum=0.9, weight_decay=0.0)
    head.train()
    for step, (features, label) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = cosine_schedule(step, steps, warmup, peak, 0.0)
        optimizer.zero_grad()
        F.cross_entropy(head(features), label, ignore_index=-1).backward()
        optimizer.step()
    head.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------

def stored_batches(features: Tensor, label: Tensor, batch_size: int, epochs: int, seed: int) -> Iterator:
    """Epoch by epoch in a new order; what does not fill a batch is left for another epoch."""
    for epoch in range(epochs):
        order = torch.from_numpy(data_module.epoch_order(len(label), seed, epoch)).to(label.device)
        for rows in order[:len(order) // batch_size * batch_size].split(batch_size):
            yield features[rows], label[rows]


@torch.no_grad()
def fresh_batches(data, size: int, encode: Callable, batch_size: int, steps: int, seed: int,
                  runtime: Runtime) -> Iterator:
    """Images cropped anew in each epoch (MAE's sampling); each process encodes its share of the batch."""
    transform, share = TrainTransform(size, (0.08, 1.0), flip=True, single_shot=True), runtime.share(batch_size)
    loader = data_module.train_loader(data, ReadRecord(transform), batch_size, seed, range(steps), runtime.rank,
                                      runtime.world, runtime.workers)
    for batch in loader:
        report_bad(batch["bad"])
        if len(batch.get("label", ())) < share:
            raise UserError(f"too many bad records to fill the batch; look at them with: python data.py check "
                            f"--data SPEC")
        features = []
        for images in batch["images"].split(AT_ONCE):
            with runtime.autocast():
                features.append(encode(data_module.normalize(images.to(runtime.device))).float())    # (rows, D)
        yield gather(torch.cat(features)), gather(batch["label"].to(runtime.device))


def labeled(data, transform: EvalTransform, encode: Callable, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Features (n, D) and labels (n,) of the records that can be read and have a class."""
    found = extract(data, transform, encode, runtime, AT_ONCE * runtime.world)
    label = found["label"].to(runtime.device)
    if (label < 0).all():
        raise UserError("no image of --data has a class")
    return found["features"][label >= 0], label[label >= 0]


def probe(model: MaskCLIP, o: Options, train_data, test_data, transform: EvalTransform, runtime: Runtime) -> dict:
    """Trains and tests a head.  Returns top1, of how many test images, and the protocol."""
    def encode(images: Tensor) -> Tensor:                                                           # -> (B, D)
        return pool_tokens(model.visual(images), o.feature)

    records = len(train_data)
    if not o.augment:
        features, label = labeled(train_data, transform, encode, runtime)
        records = len(label)
    batch_size, peak = recipe(o, records)
    per_epoch = records // batch_size
    steps = o.epochs * per_epoch
    warmup = int((o.epochs / 9 if o.warmup_epochs < 0 else o.warmup_epochs) * per_epoch)
    if o.augment:
        batches = fresh_batches(train_data, transform.size, encode, batch_size, steps, o.seed, runtime)
    else:
        batches = stored_batches(features, label, batch_size, o.epochs, o.seed)
    head = make_head(model.config.width, len(train_data.classes), o.seed).to(runtime.device)
    batches = data_module.progress(batches, steps, "steps of the linear head", runtime.is_main)
    train_head(head, batches, steps, warmup, peak)
    features, label = labeled(test_data, transform, encode, runtime)
    with torch.no_grad():
        right = (head(features).argmax(dim=1) == label).cpu()
    return dict(top1=right.double().mean().item(), images=len(label), feature=o.feature, augment=o.augment, steps=steps,
                warmup_steps=warmup, batch_size=batch_size, lr=peak)


def main(argv: Sequence[str] | None = None):
    o = parse(Options, __doc__, argv, positional=("checkpoint",))
    if len(o.data) > 1:
        raise UserError(f"linear probing takes one --data, got {len(o.data)}")
    runtime = setup(o)
    model, _, config = load_checkpoint(o.checkpoint, runtime.device)
    contrasted = "mean" if config.method == "filip" else config.pool
    o.feature = contrasted if o.feature == "auto" else o.feature
    spec, size = o.data[0], config.image_size
    resize = size * 256 // 224
    if data_module.kind_of(spec) == "shapes":
        spec = f"shapes:objects=1-1,train=4096,val=1024,{spec.partition(':')[2]}"
        resize = size           # scenes are drawn at the input's size, and their margin belongs to the picture
    train_data, test_data = (data_module.open_data(spec, split, "classes", size=size) for split in ("train", o.split))
    data_module.want_several(train_data, spec)
    networks = {"checkpoint": model}
    if o.control:
        torch.manual_seed(o.seed)
        networks["untrained"] = build(config, model.eot).to(runtime.device).eval()

    results = {}
    if runtime.is_main:
        say(f"{o.checkpoint}: linear probing of {config.method} on {o.data[0]}, {len(train_data):,} training records "
            f"of {len(train_data.classes)} classes")
        data_module.say_notes(train_data)
        data_module.say_notes(test_data)
        tell_shared(train_data, test_data)
    for name, network in networks.items():
        start = time.monotonic()
        r = results[name] = probe(network, o, train_data, test_data, EvalTransform(size, resize), runtime)
        if runtime.is_main:
            crops = "random crops in each epoch" if o.augment else "one crop an image, not the paper's --augment"
            say(f"  {name:10}   top-1 {r['top1']:.1%} of {r['images']:,} images   (feature {o.feature}, {crops}, "
                f"{r['steps']:,} steps of {r['batch_size']}, learning rate {r['lr']:g} after {r['warmup_steps']:,} of "
                f"them, {time.monotonic() - start:.0f} s)")
    if runtime.is_main:
        write_json(o.json, dict(vars(o), results=results))


if __name__ == "__main__":
    run(main)
