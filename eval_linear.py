"""Linear probing: how much of the classes a linear map finds in the frozen image tower.

    backbone   frozen, in evaluation mode; the feature of an image is what pre-training contrasted,
               the class token or the mean of the patches after the final norm
    head       BatchNorm without scale and shift, then a linear layer
    training   cross-entropy; LARS with momentum 0.9 and no weight decay; 90 epochs; learning rate 6.4 at batch 16384,
               scaled with the batch (not under 100,000 records), cosine to 0; random crops, one draw an image, and
               mirroring
    test       top-1; short side resized to 256/224 of the input side, centre cut out
                                                                                    (supplement B; MAE)
    python eval_linear.py                                                  runs/pocket/last.pt, scenes of one object
    torchrun --nproc-per-node 8 eval_linear.py CHECKPOINT --data folder:IMAGENET --augment     the paper's protocol

Without --augment each image is read and encoded once.  The head is small, so every process trains it on the whole
batch: statistics and gradients are those of one process, on any number of them.
Letters: n records, B batch, D width, C classes.
"""
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import data as data_module
from data import EvalTransform, TrainTransform, UserError
from model import MaskCLIP, build, opt, pool_tokens
from train import (ReadRecord, RunOptions, Runtime, cosine_schedule, extract, load_checkpoint, parse, report_bad, run,
                   setup)

FEW = 100_000       # fewer training records than this are trained on in smaller steps, see `recipe`


@dataclass
class Options(RunOptions):
    checkpoint: str = opt("runs/pocket/last.pt", "what train.py wrote", "what")
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
    warmup_epochs: float = opt(0.0, "epochs of linear warm-up (paper silent, MAE: 10)", "recipe")
    json: str = opt("", "file for the results as one JSON object", "run")


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
                if "mu" not in self.state[w]:
                    self.state[w]["mu"] = torch.zeros_like(w)
                mu = self.state[w]["mu"].mul_(group["momentum"]).add_(g)
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


def gather_rows(x: Tensor, runtime: Runtime) -> Tensor:
    """(B, ...) of as many rows on each of W processes -> (W*B, ...) on all"""
    if runtime.world == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(runtime.world)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


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
            raise UserError(f"ten records in a row cannot be read, the last was {': '.join(batch['bad'][-1])}")
        with runtime.autocast():
            features = encode(data_module.normalize(batch["images"].to(runtime.device))).float()
        yield gather_rows(features, runtime), gather_rows(batch["label"].to(runtime.device), runtime)


def probe(model: MaskCLIP, options: Options, train_data, test_data, transform: EvalTransform, runtime: Runtime) -> dict:
    """Trains and tests a head.  Returns top1, and of the test images how many there are."""
    def encode(images):                                                                             # -> (B, D)
        tokens = model.visual(images)                                                               # (B, 1+N, D)
        return pool_tokens(tokens, options.feature)

    def labelled(data):
        found = extract(data, transform, encode, runtime, 256 * runtime.world)
        known = found["label"] >= 0
        if not known.any():
            raise UserError(f"no image of {', '.join(options.data)} has a class")
        return found["features"][known.to(runtime.device)], found["label"][known].to(runtime.device)

    if options.augment:
        batch_size, peak = recipe(options, len(train_data))
        per_epoch = len(train_data) // batch_size
        batches = fresh_batches(train_data, transform.size, encode, batch_size, options.epochs * per_epoch,
                                options.seed, runtime)
    else:
        features, label = labelled(train_data)
        batch_size, peak = recipe(options, len(label))
        per_epoch = len(label) // batch_size
        batches = stored_batches(features, label, batch_size, options.epochs, options.seed)
    steps = options.epochs * per_epoch
    head = make_head(model.config.width, len(train_data.classes), options.seed).to(runtime.device)
    batches = data_module.progress(batches, steps, "steps of the linear head", runtime.is_main)
    train_head(head, batches, steps, int(options.warmup_epochs * per_epoch), peak)
    features, label = labelled(test_data)
    with torch.no_grad():
        right = head(features).argmax(dim=1) == label
    return dict(top1=right.double().mean().item(), images=len(label), batch_size=batch_size, lr=peak, steps=steps)


def main(argv: Sequence[str] | None = None):
    options = parse(Options, __doc__, argv, positional=("checkpoint",))
    if len(options.data) > 1:
        raise UserError(f"linear probing takes one --data, got {len(options.data)}")
    runtime = setup(options)
    model, _, config = load_checkpoint(options.checkpoint, runtime.device)
    options.feature = config.pool if options.feature == "auto" else options.feature
    spec, size = options.data[0], config.image_size
    is_shapes = spec.partition(":")[0] == "shapes"
    if is_shapes:
        spec = f"shapes:objects=1-1,train=4096,val=1024,{spec.partition(':')[2]}"
    train_data, test_data = (data_module.open_data(spec, split, "classes", size=size)
                             for split in ("train", options.split))
    # scenes are drawn at the input's size, and what is at their margin belongs to the picture
    transform = EvalTransform(size, resize=size if is_shapes else size * 256 // 224)
    networks = {"checkpoint": model}
    if options.control:
        torch.manual_seed(options.seed)
        networks["untrained"] = build(config, model.eot).to(runtime.device).eval()

    results = {}
    if runtime.is_main:
        print(f"{options.checkpoint}: linear probing of {config.method} on {options.data[0]}, {len(train_data):,} "
              f"training records of {len(train_data.classes)} classes, feature {options.feature}", flush=True)
    for name, network in networks.items():
        start = time.monotonic()
        results[name] = probe(network, options, train_data, test_data, transform, runtime)
        if runtime.is_main:
            r = results[name]
            print(f"  {name:10}   top-1 {r['top1']:.1%} of {r['images']:,} images   ({r['steps']:,} steps of "
                  f"{r['batch_size']}, learning rate {r['lr']:g}, {time.monotonic() - start:.0f} s)", flush=True)
    if options.json and runtime.is_main:
        Path(options.json).write_text(json.dumps(dict(vars(options), results=results), indent=1) + "\n")


if __name__ == "__main__":
    run(main)
