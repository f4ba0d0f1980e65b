"""Pre-training from top to bottom; and below a line, what all scripts share.

    torchrun train.py                                       preset pocket on the embedded Shapes world: minutes on a CPU
    torchrun train.py --preset vit-b16-yfcc15m --batch-size 64 --data "shards:yfcc/{00000..01499}.tar" --bpe MERGES
    torchrun --nnodes 4 --nproc-per-node 8 ... train.py --preset vit-b16-yfcc15m --data ... --bpe ...   the paper's run

In reading order:  options; schedules; what a step hides; one step; the run; from records to a batch.
Every random choice is a function of (seed, step) and of the row in the global batch, never of the process, so a run can
be stopped anywhere and go on, on another number of processes too.  (Blocks that --drop-path skips are drawn for each
micro-batch: with it, --accumulate makes another run.)
"""
import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shlex
import signal
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from os.path import isfile
from pathlib import Path

PARENT = os.getppid()           # asked before the imports below, which take seconds: see StopSignal

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn     # before init_process_group: its functions keep the group of their import as a default
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

import data as data_module
from data import BytePairTokenizer, UserError, run, say, seed_of
from losses import LOGIT_ROWS, mean_over_processes, patchify, similarity
from model import (METHODS, PRESETS, Config, Cost, MaskCLIP, SyncBatchNorm, Teacher, build, checkpoint, costs,
                   initialize, load_checkpoint, load_state, mask_words, momentum_at, opt, preset_for, random_mask,
                   read_merges, save_atomically, save_checkpoint, take)


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class RunOptions:
    """What every script takes."""
    data: tuple = opt(("shapes",), f"data set; of several training takes a mixture, zero-shot evaluation one "
                      f"after the other: {data_module.specs()} (docs/DATA.md)", "run")
    out: str = opt("", "folder for everything that is written but --json; empty: one below runs/, for the indices of "
                   "shards in zero-shot evaluation that of the checkpoint", "run")
    seed: int = opt(0, "seed of every random choice", "run")
    device: str = opt("auto", "where to compute", "run", ("auto", "cpu", "cuda", "mps"))
    precision: str = opt("auto", "of matrix products; auto: bf16 where the hardware multiplies it, else fp16 on a GPU "
                         "(in training with a scaled loss), else fp32 (IEEE's; tf32 is its fast approximation on GPUs)",
                         "run", ("auto", "fp32", "tf32", "bf16", "fp16"))
    workers: int = opt(-1, "loaders of each process, -1: none on CPU, on GPU its share of the cores but one", "run")


@dataclass
class CheckpointOptions(RunOptions):
    """What the others take, which begin with a pre-trained model."""
    checkpoint: str = opt("runs/pocket/last.pt", "pre-trained model, as train.py writes it", "what")
    json: str = opt("", "file for the results as one JSON object", "run")


@dataclass
class TrainOptions(RunOptions, Config):
    """RunOptions, the fields of model.Config, and what a pre-training run needs besides."""
    preset: str = opt("pocket", "model and recipe that the other options change", "what", tuple(PRESETS))
    exclude_classes: str = opt("", "file with a folder's name a line, as ImageNet-1K's: images of folder: data "
                               "that lie in these are left out", "run")
    bpe: str = opt("", "CLIP's merges file; empty: the vocabulary of --init's weights (a checkpoint of ours keeps its "
                   "own), or else vocab_size entries learned from the captions", "run")
    synonyms: str = opt("", "DeCLIP's second caption: file with a group of words a line, divided by commas", "run")
    steps: int = opt(0, "length in steps instead of --epochs, 0: use --epochs", "run")
    resume: str = opt("auto", "auto: go on from OUT/last.pt if there; none: start over; or a checkpoint's path", "run")
    accumulate: int = opt(1, "micro-batches a step; gradients are those of the whole batch, contrast included", "run")
    checkpoint_every: float = opt(300.0, "seconds between checkpoints", "run")
    log_every: int = opt(20, "steps between lines of metrics.jsonl", "run")
    compile: bool = opt(False, "torch.compile the model: faster after minutes of compiling, worth it on GPUs", "run")
    max_bad: float = opt(0.05, "stop when more than this share of the records read is bad", "run")
    eval_every: float = opt(0.0, "epochs between tests of zero-shot accuracy, which is logged; 0: none", "run")
    eval_data: str = opt("shapes", f"labeled data of these tests: {data_module.specs('classes')}", "run")
    keep_best: bool = opt(False, "keep the checkpoint of the best of these tests as OUT/best.pt", "run")
    keep_every: float = opt(0.0, "epochs between checkpoints that are kept as OUT/step-N.pt, 0: none", "run")
    plan: bool = opt(False, "train nothing: print what the run would cost on --gpus", "plan")
    gpus: int = opt(8, "devices to plan for", "plan")
    gpu: str = opt("h100", "what devices", "plan", ("h200", "h100", "a100", "a100-40gb", "l40s", "4090", "v100"))
    pairs: int = opt(15_000_000, "pairs of the data to plan for (YFCC15M's)", "plan")
    # public logs of ViT-B/16 on A100: LAION's 390 pairs a second and GPU, which is 0.15 by our count; NeMo about 0.2
    utilization: float = opt(0.2, "share of the peak that is reached, as measured on an H200 without --compile", "plan")


def parse_train_options(argv=None) -> TrainOptions:
    """The command line over the preset and the method it names."""
    chosen = first_look(TrainOptions, argv, "preset", "method")
    if chosen.method not in METHODS:
        raise UserError(f"--method {chosen.method} is unknown; choose one of {', '.join(METHODS)}")
    defaults = TrainOptions(**asdict(preset_for(chosen.preset, chosen.method)), preset=chosen.preset)
    # icinw: YFCC15M, CC3M, CC12M, and ImageNet-21K's 14.2 M images less the 1.3 M of ImageNet-1K's classes
    defaults.pairs = {"pocket": 20_000, "vit-b16-cc3m": 3_000_000,
                      "vit-b16-icinw": 43_000_000}.get(chosen.preset, defaults.pairs)
    o = parse(TrainOptions, __doc__, argv, defaults=defaults, own="vit-b16-yfcc15m")
    o.out = o.out or f"runs/{o.preset}"
    if o.init != "mae" and not o.init.startswith(("timm:", "open_clip:")) and not isfile(o.init):
        raise UserError(f"--init {o.init} is unknown; choose mae, timm:FILE, open_clip:DIR or a checkpoint")
    if o.image_size % o.patch_size:
        raise UserError(f"--image-size {o.image_size} is no multiple of --patch-size {o.patch_size}")
    for width, heads in ((o.width, o.heads), (o.text_width, o.text_heads)):
        if width % heads:
            raise UserError(f"width {width} cannot be cut into {heads} attention heads: choose a divisor of {width}")
    hidden = random_mask(1, o.grid ** 2, o.mask_ratio, torch.Generator())[1]
    if METHODS[o.method]["predicts"] and (o.width % 4 or not hidden.numel()):
        raise UserError(f"{o.method} wants a --width that 4 divides (got {o.width}) and a --mask-ratio that hides one "
                        f"of {o.grid ** 2} patches or more (got {o.mask_ratio})")
    if o.keep_best and not o.eval_every:
        raise UserError("--keep-best keeps the best of the tests: say with --eval-every how often to test")
    if o.compile and o.accumulate > 1 and o.drop_path:
        raise UserError("--compile and --accumulate would skip other blocks in the second pass than in the first: "
                        "leave one out, or --drop-path")
    return o


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: functions of the step alone.  That of the teacher's momentum is model.momentum_at
# ---------------------------------------------------------------------------------------------------------------------

def cosine_schedule(step: int, total: int, warmup: int, peak: float, final: float, start: float = 0.0) -> float:
    """Learning rate of step 0 ... total-1: linear from start to peak in `warmup` steps, then half a cosine to final."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    t = (step - warmup) / max(total - 1 - warmup, 1)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * min(t, 1.0)))


# ---------------------------------------------------------------------------------------------------------------------
# What a step hides
# ---------------------------------------------------------------------------------------------------------------------

def hide(batch: dict, c: Config, tokenizer: BytePairTokenizer, step: int, seed: int, rank: int = 0,
         world: int = 1) -> dict:
    """The batch with what its masked branches need: keep and hidden patches, corrupted words; see MaskCLIP.forward.
    Pairs of no class get one each.

    Draws are those of the global batch, of which this process takes its own rows.  The loader calls this where it
    joins a batch (PairCollate), so that a device need not wait for it.
    """
    B, batch = len(batch["images"]), dict(batch)
    generator = torch.Generator().manual_seed(seed_of(seed, step))
    own = slice(rank * B, rank * B + B)
    if METHODS[c.method]["predicts"]:
        batch["keep"], batch["hidden"] = random_mask(world * B, c.grid ** 2, c.mask_ratio, generator, own)
    if METHODS[c.method]["mlm"]:
        noise = torch.rand(world * B, c.context_length, 3, generator=generator)[own]
        batch["corrupted"], batch["is_chosen"] = mask_words(
            batch["tokens"], c.word_ratio, tokenizer.sot, tokenizer.eot, c.vocab_size, noise)
    if "labels" in batch:       # UniCL: a pair that names no class is one of its own
        alone = -1 - torch.arange(rank * B, rank * B + B)
        batch["labels"] = torch.where(batch["labels"] < 0, alone, batch["labels"])
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# One step.  `core` is the network, `model` the same as it is called: compiled, or wrapped for several processes
# ---------------------------------------------------------------------------------------------------------------------

def backward(model: nn.Module, core: MaskCLIP, teacher: Teacher | None, batch: dict, runtime: "Runtime",
             seed: int = 0) -> tuple[dict, list]:
    """Forward and backward of a batch.  Returns the terms of the loss and, in a list of one, the teacher's answer."""
    torch.manual_seed(seed)                                         # which says what blocks stochastic depth skips
    with runtime.autocast():
        answer = teacher(batch["images"], batch["hidden"]) if teacher else None
        features, terms = model(batch, answer)                      # L_Dist, L_MLM
    terms |= core.contrast(features, batch.get("labels"))           # L_I, L_T
    loss = core.total_loss(**terms)                                 # Eq. 8
    runtime.scaler.scale(loss).backward()                           # fp16 alone needs a scale, see Runtime
    return {name: term.detach() for name, term in terms.items()}, [answer]


def backward_in_parts(model: nn.Module, core: MaskCLIP, teacher: Teacher | None, parts: list[dict],
                      runtime: "Runtime", seed: int = 0) -> tuple[dict, list]:
    """The same loss and gradients from micro-batches, at the memory of one but for the pixels of all.

    L_I and L_T contrast the whole batch, so

    1. the towers embed each part without gradient;
    2. from all embeddings come L_I and L_T, and what they ask of each embedding: their gradient;
    3. each part goes forward again, with gradient and all branches; its loss is L_Dist, L_MLM, and its embeddings times
       what is asked of them, whose gradient is by the chain rule that of L_I and L_T.  With the last part the contrast
       is taken again, the other parts' embeddings standing as constants, so that what belongs to it alone, as the logit
       scale, has its gradient too.

    The two towers are computed twice; the masked branches and the teacher are not.
    """
    labels = torch.cat([part["labels"] for part in parts]) if "labels" in parts[0] else None
    with torch.no_grad(), runtime.autocast():
        embedded = []
        for i, part in enumerate(parts):
            torch.manual_seed(seed + i)
            embedded.append(core.encode(part))
    whole = {name: torch.cat([features[name] for features in embedded]).requires_grad_() for name in embedded[0]}
    loss = core.total_loss(**core.contrast(whole, labels))
    asked = dict(zip(whole, torch.autograd.grad(loss, list(whole.values()))))

    terms, answers = {}, []
    for i, part in enumerate(parts):
        is_last = i == len(parts) - 1
        with contextlib.nullcontext() if is_last or runtime.world == 1 else model.no_sync():
            torch.manual_seed(seed + i)
            with runtime.autocast():
                answer = teacher(part["images"], part["hidden"]) if teacher else None
                features, own = model(part, answer)
            loss = core.total_loss(**own) / len(parts)
            if is_last:
                features = {name: torch.cat([whole[name].detach()[:-len(x)], x]) for name, x in features.items()}
                contrast = core.contrast(features, labels)
                loss = loss + core.total_loss(**contrast)
            else:
                rows = slice(i * len(part["images"]), (i + 1) * len(part["images"]))
                loss = loss + sum((x * asked[name][rows]).sum() for name, x in features.items())
            runtime.scaler.scale(loss).backward()
        for name, term in own.items():
            terms[name] = terms.get(name, 0.0) + term.detach() / len(parts)
        answers.append(answer)
    return terms | {name: term.detach() for name, term in contrast.items()}, answers


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------

def train(o: TrainOptions):
    """Everything a run needs, then step after step."""
    runtime, out = setup(o), Path(o.out)
    if o.compile:
        check_compiler(runtime.device)
    if runtime.share(o.batch_size) % o.accumulate:
        raise UserError(f"--accumulate {o.accumulate} does not divide the {runtime.share(o.batch_size)} pairs of a "
                        f"process")
    runtime.claim(out)
    data = open_pairs(o, out)
    tokenizer = make_tokenizer(o, data)
    steps_per_epoch, total, warmup = length_of(o, len(data))

    core = build(o, tokenizer.eot)
    if o.batch_size < 2 and any(isinstance(x, SyncBatchNorm) for x in core.modules()):
        raise UserError(f"--batch-size {o.batch_size}: the batch norms of {o.method} want 2 pairs or more")
    start = find_resumable(o, out)
    start.use(data, vocabulary=tokenizer.state())
    if start.state is None and o.init != "mae":
        initialize(core, o.init)
    start.load(core, "model")
    core.to(runtime.device)
    teacher = Teacher(core).to(runtime.device) if METHODS[o.method]["predicts"] == "teacher" else None
    optimizer = torch.optim.AdamW(param_groups(core, o.weight_decay), lr=o.lr, betas=(0.9, o.beta2), fused=True)
    start.load(teacher, "teacher")
    start.load(optimizer, "optimizer")
    runtime.check_alike(step_to_go_on_from=start.step, hash_of_the_data=start.data, vocabulary=tokenizer.vocab_size)
    model = wrap(torch.compile(core) if o.compile else core, runtime)
    if o.compile:
        core.encode = torch.compile(core.encode)                    # the first pass of backward_in_parts
        if teacher:
            teacher.compile()

    tests = Tests(o, steps_per_epoch, start)

    def state(step: int, bad_count: int) -> dict:
        return checkpoint(core, tokenizer, o, step=step, total=total, data=start.data, bad_count=bad_count,
                          best=tests.best, optimizer=optimizer.state_dict(),
                          teacher=teacher.state_dict() if teacher else None)

    loader = data_module.train_loader(data, PairTransform(o, data), o.batch_size, o.seed, range(start.step, total),
                                      runtime.rank, runtime.world, runtime.workers,
                                      PairCollate(o, tokenizer, runtime.rank, runtime.world))
    log = Log(out, runtime.is_main, total, o.batch_size, start.step)
    if runtime.is_main:
        announce(o, data, core, tokenizer, total, start, runtime)
    guard = Guard(o, runtime, StopSignal(), total, start, state)
    core.train()
    for step, batch in guard.batches(loader):
        lr = cosine_schedule(step, total, warmup, o.lr, o.lr_end, o.lr_start)
        momentum = momentum_at(step, total, o.momentum, o.momentum_end) if METHODS[o.method]["ema"] else 0.0
        set_learning_rate(optimizer, lr)
        parts = micro_batches(batch, o.accumulate, runtime.device)
        seed = seed_of(o.seed, step, 1)
        optimizer.zero_grad()
        if o.accumulate == 1:
            terms, answers = backward(model, core, teacher, parts[0], runtime, seed)
        else:
            terms, answers = backward_in_parts(model, core, teacher, parts, runtime, seed)
        norm = clip_gradient(optimizer, o.clip_grad, runtime)
        if guard.accepts(step, terms, norm):
            optimizer.step()
            core.after_update()                                     # clamp the logit scale; DeCLIP's queue
            if teacher:
                teacher.update(core, momentum)
                teacher.update_center(answers, o.center_momentum)
        tested = tests.after(step, core, tokenizer, guard)
        if log.is_due(step, o.log_every) or tested:
            collapse = teacher.collapse_monitor(answers[0], o.temp_t) if teacher else {}
            log.line(step, dict(epoch=(step + 1) / steps_per_epoch, loss=core.total_loss(**guard.terms), lr=lr,
                                **core.named(guard.terms), momentum=momentum, grad_norm=guard.norm,
                                logit_scale=core.logit_scale.exp().item(), **collapse, **tested))
        guard.end(step)
    guard.finish()
    if runtime.is_main:
        finish(o, core, teacher, tokenizer, runtime, guard.bad_count, data)


def open_pairs(o: TrainOptions, out: Path):
    """The data sets as one, with captions; UserError if they do not suit the options."""
    excluded = o.exclude_classes and data_module.read_lines(o.exclude_classes, "folders to leave out")
    data = open_mixed(o.data, "train", "captions", o.image_size, out / "index", excluded)
    if len(data) < o.batch_size:
        raise UserError(f"{len(data)} records are fewer than one batch of {o.batch_size}: choose a smaller "
                        f"--batch-size")
    if getattr(data, "names_classes", False) and o.unicl and o.method in ("filip", "declip", "defilip"):
        raise UserError(f"--method {o.method} contrasts pairs and cannot use the labels of folder: data; choose "
                        f"another method, or --no-unicl")
    return data


def length_of(o: TrainOptions, records: int) -> tuple[int, int, int]:
    """(steps an epoch, steps in all, steps of warm-up)"""
    per_epoch = records // o.batch_size
    total = o.steps or int(o.epochs * per_epoch)
    if not total:
        raise UserError(f"--epochs {o.epochs:g} of {per_epoch} steps are not one: give more, or --steps")
    return per_epoch, total, min(int(o.warmup_epochs * per_epoch), total // 5)


def make_tokenizer(o: TrainOptions, data) -> BytePairTokenizer:
    """That of the checkpoint the run starts from, whose word table has its order; CLIP's merges from --bpe or beside
    open_clip's weights; or as many as vocab_size allows, learned from the captions of the first records."""
    kind, _, path = o.init.partition(":")
    if isfile(o.init):
        tokenizer = load_checkpoint(o.init)[1]
    elif o.bpe:
        tokenizer = BytePairTokenizer.from_file(o.bpe)
    elif kind == "open_clip":
        tokenizer = read_merges(path)
    else:
        return data_module.learn_tokenizer(data, o.vocab_size)
    o.vocab_size = max(o.vocab_size, tokenizer.vocab_size)
    return tokenizer


def announce(o: TrainOptions, data, core: MaskCLIP, tokenizer, total: int, start: "Start", runtime: "Runtime"):
    """What is trained, on the screen and in OUT/config.json."""
    with tell_if_full(start.out / "config.json"):
        described = dict(asdict(o), records=len(data), data_hash=start.data)
        data_module.write_whole(start.out / "config.json", json.dumps(described, indent=1).encode())
    parameters = sum(p.numel() for p in core.parameters())
    say(f"{o.method} with preset {o.preset}: {parameters / 1e6:.1f} M parameters, {len(data)} records, "
        f"{total} steps of {o.batch_size}, {tokenizer.vocab_size} tokens; {runtime}")
    data_module.say_notes(data)
    if len(data) % o.batch_size:
        say(f"note: {len(data) % o.batch_size} records fill no batch and are left out of an epoch, others in each")
    if not o.bpe and tokenizer.vocab_size < 49408 <= o.vocab_size:
        say("note: the vocabulary was learned from the captions: for CLIP's, give its merges file with --bpe")
    start.announce(total)


def finish(o: TrainOptions, core: MaskCLIP, teacher, tokenizer: BytePairTokenizer, runtime: "Runtime", bad_count: int,
           data):
    """Pictures of the run, its accuracy where that is cheap, and what to do next."""
    say(f"done: {o.out}/last.pt" + (f", {bad_count} bad records skipped" if bad_count else ""))
    core.eval()
    show("curves.png", o.out, draw_curves, Path(o.out) / "metrics.jsonl")
    if core.predicts:
        records = data_module.Records(data, PairTransform(o, data), o.seed)
        show("step.png", o.out, draw_step, core, teacher, tokenizer, records, o)
    if data_module.only_shapes(o.data):
        count = 1024 if o.image_size < 100 else 128         # a large tower needs a second an image on a CPU
        world = data_module.ShapesWorld(split="val", count=count, size=o.image_size, objects=(1, 1))
        alone = dataclasses.replace(runtime, rank=0, world=1)           # the other processes are gone
        guess, label = guess_classes(core, tokenizer, alone, world)
        n = len(data_module.SHAPES)
        hits = guess == label, guess // n == label // n, guess % n == label % n
        right = [hit.double().mean().item() for hit in hits]
        say("zero-shot accuracy on unseen scenes, 64 classes: {:.1%}  (color {:.1%}, shape {:.1%}; chance 1.6%)".format(
            *right))

    def command(script: str, *tasks: str) -> str:
        kinds = {spec: data_module.kind_of(spec) for spec in o.data}
        fit = [spec for spec, kind in kinds.items() if set(tasks) & set(data_module.FORMATS[kind].tasks)]
        named = f" --data {shlex.quote(fit[0])}" if fit and kinds[fit[0]] != "shapes" else ""
        return f"python {script} {shlex.quote(f'{o.out}/last.pt')}{named}"
    say(f"next:  {command('eval_zeroshot.py', 'classes', 'retrieval')}   |   {command('dense.py words', 'retrieval')}")


@torch.no_grad()
def guess_classes(core: MaskCLIP, tokenizer: BytePairTokenizer, runtime: "Runtime", data) -> tuple[Tensor, Tensor]:
    """(n,) the class whose name is nearest to each image, in the one template "a {}"; and (n,) the true one"""
    core.eval()
    found = extract(data, data_module.EvalTransform(core.config.image_size), core.encode_image, runtime, 256)
    names = [name.split("\t")[0] for name in data.classes]
    prompts = tokenizer([f"a {name}" for name in names], core.config.context_length)                   # (classes, L)
    texts = core.encode_text(prompts.to(runtime.device)).float()                                        # (classes, E)
    core.train()
    known = found["label"] >= 0
    return similarity(found["features"], texts).argmax(dim=1).cpu()[known], found["label"][known]


class Tests:
    """Zero-shot accuracy during training, and the checkpoints that are kept; both every so many epochs."""

    def __init__(self, o: TrainOptions, steps_per_epoch: int, start: "Start"):
        self.o, self.best = o, (start.state or {}).get("best", 0.0)
        self.every, self.keep_every = (x and max(1, round(x * steps_per_epoch)) for x in (o.eval_every, o.keep_every))
        if self.every:
            self.data = data_module.open_data(o.eval_data, "val", "classes", size=o.image_size)
            data_module.want_names(self.data, o.eval_data)

    def after(self, step: int, core: MaskCLIP, tokenizer: BytePairTokenizer, guard: "Guard") -> dict[str, float]:
        """What the log says of this step besides"""
        found, kept = {}, []
        if self.keep_every and (step + 1) % self.keep_every == 0:
            kept.append(f"step-{step + 1}.pt")
        if self.every and (step + 1) % self.every == 0:
            guess, label = guess_classes(core, tokenizer, guard.runtime, self.data)
            found["zeroshot"] = (guess == label).double().mean().item()
            if found["zeroshot"] > self.best and not guard.refused:
                self.best = found["zeroshot"]
                kept += ["best.pt"] * self.o.keep_best
        if guard.runtime.is_main and not guard.refused:
            for name in kept:
                save_atomically(guard.last.with_name(name), guard.checkpoint(step + 1))
        return found


# ---------------------------------------------------------------------------------------------------------------------
# From records to a batch
# ---------------------------------------------------------------------------------------------------------------------

class PairTransform:
    """A record -> {"images": uint8 (3, H, W), "captions": str}, with a caption drawn at random from several; for data
    with classes its label besides, and for SLIP and DeCLIP their views and second caption."""

    def __init__(self, o: TrainOptions, data):
        self.image = data_module.TrainTransform(o.image_size, scale=(o.crop_min, 1.0), flip=o.flip)
        self.view = data_module.ViewTransform(o.image_size, scale=(o.view_crop_min, 1.0))
        self.method, self.is_labeled = o.method, o.unicl and getattr(data, "names_classes", False)
        self.synonyms = data_module.read_synonyms(o.synonyms)

    def __call__(self, sample, rng) -> dict:
        image = data_module.decode(sample.image)
        if self.method in ("declip", "defilip"):
            caption = data_module.pick_caption(sample, rng)
            pair = dict(captions=caption, captions2=data_module.edit_caption(caption, rng, self.synonyms))
            return pair | self.view(image, rng, "images") | self.view(image, rng, "view2")
        pair = dict(images=self.image(image, rng), captions=data_module.pick_caption(sample, rng))
        if self.is_labeled:
            pair["labels"] = sample.text_label
        if self.method == "slip":                           # drawn last: all else is what clip sees
            pair |= self.view(image, rng, "view1") | self.view(image, rng, "view2")
        return pair


class PairCollate:
    """Joins the records of a step, tokenizes their captions, up to the longest one, and hides what the step hides."""

    def __init__(self, o: TrainOptions, tokenizer: BytePairTokenizer, rank: int = 0, world: int = 1):
        self.o, self.tokenizer, self.rank, self.world = o, tokenizer, rank, world

    def __call__(self, items: list[dict]) -> dict:
        batch, o = data_module.collate(items), self.o
        if "images" not in batch:                           # not one record, nor a stand-in, could be read
            return batch
        for captions, tokens in (("captions", "tokens"), ("captions2", "tokens2")):
            if captions in batch:
                ids = self.tokenizer(batch.pop(captions), o.context_length)
                batch[tokens] = data_module.trim(ids, self.tokenizer.eot, 8 if o.compile else 1)        # (B, L)
        step = batch.pop("step")[0].item()
        return hide(batch, o, self.tokenizer, step, o.seed, self.rank, self.world)


def micro_batches(batch: dict, count: int, device: torch.device) -> list[dict]:
    """The batch cut into `count` equal parts on the device."""
    tensors = {name: value.chunk(count) for name, value in batch.items() if torch.is_tensor(value)}
    parts = [to_device({name: values[i] for name, values in tensors.items()}, device) for i in range(count)]
    if "chosen" in parts[0]:
        # L_MLM is the mean over all masked words: each part's sum is divided by the mean count of parts and processes
        words = torch.full((), sum(len(part["chosen"]) for part in parts) / count, device=device)
        words = mean_over_processes(words)
        parts = [dict(part, word_count=words) for part in parts]
    return parts


def to_device(part: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """On the device: views with colors changed, pixels normalized, the places of chosen words in place of a mask."""
    if "is_chosen" in part:
        part["chosen"] = part.pop("is_chosen").flatten().nonzero().squeeze(1)     # here it costs no GPU sync
    for name in [name for name in part if f"{name}_steps" in part]:
        images = part[name].to(device, non_blocking=True)
        part[name] = data_module.change_colors(images, part.pop(f"{name}_steps"))
    part = {name: value.to(device, non_blocking=True) for name, value in part.items()}
    return {name: data_module.normalize(value) if value.dtype == torch.uint8 else value
            for name, value in part.items()}


# =====================================================================================================================
# What all scripts share
# =====================================================================================================================

# ---- the command line -----------------------------------------------------------------------------------------------

# fields in which a resumed run may differ from the earlier one: they change neither the data nor what is computed, only
# where, in which parts, how exactly and how long
FREE_TO_CHANGE = {"epochs", "steps", "out", "device", "precision", "workers", "resume", "accumulate",
                  "checkpoint_every", "log_every", "compile", "max_bad", "bpe", "exclude_classes", "json", "eval",
                  "draw", "limit", "score_threshold", "plan", "gpus", "gpu", "pairs", "utilization", "eval_every",
                  "eval_data", "keep_best", "keep_every"}

class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message + "; see --help")


METAVARS = {int: "N", float: "X", str: "TEXT"}

# Numbers are finite and not negative; the least and most of those that want more, by the option's name in any script.
# What stands as a default is fine too: there 0 may mean "as the paper".
LIMITS = dict(
    dict.fromkeys(("batch_size", "accumulate", "log_every", "gpus", "image_size", "patch_size", "width", "depth",
                   "heads", "text_width", "text_depth", "text_heads", "context_length", "vocab_size", "embed_dim",
                   "n_codes", "quantizer_hidden", "quantizer_bottleneck", "slip_hidden", "simsiam_hidden", "token_dim",
                   "queue_size", "channels", "aux_channels", "head_width", "crop", "short_side", "long_side", "samples",
                   "test_size", "decoder_depth", "rpn_samples", "roi_samples", "proposals"), (1, math.inf)),
    **dict.fromkeys(("word_ratio", "center_momentum", "momentum", "momentum_end", "max_bad", "erasing", "smoothing",
                     "layer_decay", "score_threshold"), (0, 1)),
    **dict.fromkeys(("mask_ratio", "drop_path"), (0, 0.99)),
    **dict.fromkeys(("crop_min", "view_crop_min"), (0.01, 1)),
    workers=(-1, math.inf), seed=(0, 2 ** 31 - 1), beta2=(0, 0.99999), randaugment=(0, 10), crop_share=(0.1, 1),
    utilization=(0, 1))
ABOVE_0 = {"epochs", "temp_s", "temp_t", "utilization"}


def check_number(name: str, value: float):
    least, most = LIMITS.get(name, (0, math.inf))
    if not (math.isfinite(value) and least <= value <= most) or name in ABOVE_0 and not value:
        raise UserError(f"--{name.replace('_', '-')} must be a number {'above' if name in ABOVE_0 else 'from'} {least}"
                        + (f" to {most}" if most < math.inf else " up" * (name not in ABOVE_0)) + f", not {value}")


def parse(cls, doc: str, argv=None, positional: tuple[str, ...] = (), defaults=None, own: str = "", command: str = ""):
    """The command line as an instance of dataclass cls: one --flag a field, --help with the field's group and text.

    positional fields may stand without a flag, after the command if the script has several.  `defaults` (an instance)
    replaces the class's own defaults, which --help shows too if `own` says what they are called.
    """
    usage = " ".join(["%(prog)s", *command.split(), *(f"[{name.upper()}]" for name in positional), "[options]"])
    cli = Parser(usage=usage, description=doc, allow_abbrev=False,
                 formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {"what": cli.add_argument_group("what")}
    for f in fields(cls):
        default = getattr(defaults, f.name) if defaults else f.default
        name = f.metadata["group"]
        group = groups.setdefault(name, cli.add_argument_group(name))
        help = f.metadata["help"].replace("%", "%%")
        if f.name in positional:
            group.add_argument(f.name, nargs="?", default=default, help=f"{help} (default: {default or 'none'})")
            continue
        kind = (dict(action=argparse.BooleanOptionalAction) if f.type is bool else
                dict(action="append", metavar="SPEC") if f.type is tuple or f.name == "data" else
                dict(type=f.type, choices=f.metadata["choices"],
                     metavar=None if f.metadata["choices"] else METAVARS[f.type]))
        shown, usual = (", ".join(x) if f.type is tuple else "none" if x == "" else x for x in (default, f.default))
        shown = f"{shown}; {own}: {usual}" if own and default != f.default else shown
        group.add_argument("--" + f.name.replace("_", "-"), default=None, help=f"{help} (default: {shown})", **kind)
    given = vars(cli.parse_args(argv))
    values = {f.name: getattr(defaults, f.name) if defaults else f.default for f in fields(cls)}
    values.update({name: os.path.expanduser(value) if isinstance(value, str) else
                   tuple(value) if isinstance(value, list) else value
                   for name, value in given.items() if value is not None})
    for f in fields(cls):
        if f.type is str and isinstance(values[f.name], tuple):             # --data, where it is one
            values[f.name], *others = values[f.name]
            if others:
                raise UserError(f"--{f.name} is given {1 + len(others)} times, wanted one")
        if f.type in (int, float) and values[f.name] != f.default:
            check_number(f.name, values[f.name])
    return cls(**values)


def first_look(cls, argv, *names: str) -> argparse.Namespace:
    """What the command line says of these fields of cls: they decide what the defaults of the others are."""
    cli = Parser(add_help=False, allow_abbrev=False)
    for f in fields(cls):
        if f.name in names:
            kind = {"action": "store_true"} if f.type is bool else {"choices": f.metadata["choices"],
                                                                    "type": os.path.expanduser}
            cli.add_argument("--" + f.name, default=f.default, **kind)
    return cli.parse_known_args(argv)[0]


# ---- processes, devices, precision ----------------------------------------------------------------------------------

@dataclass
class Runtime:
    """This process among all, and where it computes."""
    rank: int
    world: int
    device: torch.device
    precision: str
    workers: int

    def __post_init__(self):
        """fp16 has few small numbers: the loss is scaled up, and the scale halved when a gradient overflows."""
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0 ** 14, enabled=self.precision == "fp16")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __str__(self) -> str:
        return f"{self.world} x {self.device.type}, {self.precision}"

    def autocast(self):
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, half) if half else contextlib.nullcontext()

    def share(self, batch_size: int) -> int:
        """This process's rows of a global batch."""
        if batch_size % self.world:
            raise UserError(f"--batch-size {batch_size} cannot be shared by {self.world} processes: "
                            f"choose a multiple of {self.world}")
        return batch_size // self.world

    def claim(self, out: Path, patience: float = 60.0):
        """Makes the folder, and holds it against a second run until this process ends, however it ends.

        The workers of a torchrun that was killed need a moment to notice, so a new run waits for them.
        """
        if self.is_main:
            with written_to(out):
                self.lock = open(out / "lock", "w")         # stays open: the lock goes with the process
            started = time.monotonic()
            while is_locked(self.lock):
                if time.monotonic() - started > patience:
                    raise UserError(f"another run is writing to {out}: wait for its end, or choose another --out")
                time.sleep(0.2)
        if self.world > 1:
            dist.barrier()                                  # nobody reads last.pt before the old run is gone

    def check_alike(self, **mine):
        """All processes must begin with the same; the first thing that differs is named."""
        for other in gather_objects(mine, self):
            for name in mine:
                if mine[name] != other[name]:
                    raise UserError(f"processes differ in {name.replace('_', ' ')}: {mine[name]} here, {other[name]} "
                                    f"elsewhere; --out and --data must be on a disk that all machines share")


@contextlib.contextmanager
def written_to(out: Path):
    """Makes the folder; UserError where it cannot be, or where what the caller tries to write there cannot."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None


def is_locked(file) -> bool:
    """Whether another process holds this file; if not, we do from now on."""
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except (ImportError, OSError):                          # Windows, or a disk without locks
        pass
    return False


def gather_objects(mine: object, runtime: Runtime) -> list:
    """Each process's object, in rank order, on all of them."""
    everyone = [mine] * runtime.world
    if runtime.world > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


def setup(options: RunOptions) -> Runtime:
    """Reads what torchrun set, joins the process group, chooses device and precision, seeds."""
    data_module.check_folder_of("--json", getattr(options, "json", ""))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    kind = options.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available() or kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {kind}: this machine or this build of torch has none; use --device auto")
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if kind == "cpu" and local_world > 1:
        torch.set_num_threads(max(1, cores // local_world))
    workers = options.workers
    if workers < 0:
        workers = max(1, cores // local_world - 1) if kind == "cuda" else 0
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo", store=store_of_this_attempt(world, local_world), rank=rank,
            world_size=world, device_id=device if kind == "cuda" else None,
            timeout=timedelta(hours=3))                     # the first indexing of many shards takes one process long
    torch.manual_seed(options.seed)
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(device) else "fp16" if kind == "cuda" else "fp32"
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    return Runtime(rank, world, device, precision, workers)


def store_of_this_attempt(world: int, local_world: int) -> dist.Store | None:
    """Where workers find each other, or None: as torch does it.

    torchrun keeps the addresses that workers left, so after --max-restarts new ones may call dead ones (PyTorch issue
    135712).  On one machine each attempt has names of its own; on several, attempts are not counted alike: there set
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or world != local_world:
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=False)
    return dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 matrix units; elsewhere bfloat16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    try:
        return device.type == "cpu" and "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def check_compiler(device: torch.device):
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:              # of another kind for each thing that may be missing
        raise UserError(f"--compile finds no compiler that works, C++ for CPUs, Triton and C for GPUs: leave it out "
                        f"({data_module.one_line(error)})") from None


def wrap(core: nn.Module, runtime: Runtime) -> nn.Module:
    """core as it is called in training: on several processes its gradients are averaged during backward."""
    if runtime.world == 1:
        return core
    warnings.filterwarnings("ignore", "`broadcast_buffers` is")     # by 2.13; older ones know no other name
    return DistributedDataParallel(core, broadcast_buffers=False, gradient_as_bucket_view=True)


# ---- the optimizer --------------------------------------------------------------------------------------------------

def decays(name: str, parameter: Tensor) -> bool:
    """Matrices decay; biases, norms, class and mask token, positions and the logit scale do not."""
    return parameter.ndim >= 2 and not any(word in name for word in ("cls_token", "mask_token", "pos_embed"))


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [dict(params=[p for name, p in trained if decays(name, p)], weight_decay=weight_decay),
            dict(params=[p for name, p in trained if not decays(name, p)], weight_decay=0.0)]


def layer_decay_groups(model: nn.Module, lr: float, weight_decay: float, layer_decay: float) -> list[dict]:
    """Optimizer groups for a module that holds one vision transformer: the lower a layer, the slower it learns (BEiT).

    The transformer is what has the parameter cls_token: the module itself, or its part "visual.", "backbone." ...
        layer 0        class token, positions, patch embedding, norm before blocks   lr * layer_decay ** (N + 1)
        layer i + 1    block i of its N blocks                                       lr * layer_decay ** (N - i)
        layer N + 1    everything else, inside or outside: norms, pyramids, heads    lr
    Matrices have weight_decay, vectors, class token and positions none.  Frozen parameters are left out.
    Groups {"params", "lr", "lr_scale", "weight_decay"}: a schedule sets group["lr"] = lr_now * group["lr_scale"].
    """
    names = [name for name, _ in model.named_parameters()]
    tower, = (name.removesuffix("cls_token") for name in names if name.endswith("cls_token"))      # "visual."
    stem = tuple(tower + part for part in ("cls_token", "pos_embed", "patch_embed.", "norm_pre."))
    last, groups = 1 + len(model.get_submodule(tower + "blocks")), {}                               # N + 1
    for name, parameter in model.named_parameters():
        if name.startswith(stem):
            layer = 0
        elif name.startswith(tower + "blocks."):
            layer = 1 + int(name.removeprefix(tower).split(".")[1])
        else:
            layer = last
        scale, decay = layer_decay ** (last - layer), decays(name, parameter)
        new = dict(params=[], lr=lr * scale, lr_scale=scale, weight_decay=weight_decay * decay)
        if parameter.requires_grad:
            groups.setdefault((layer, decay), new)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float):
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def clip_gradient(optimizer: torch.optim.Optimizer, limit: float, runtime: "Runtime") -> Tensor:
    """Takes the loss's scale out of all gradients; returns their norm, and scales them down to `limit`, if not 0."""
    runtime.scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    runtime.scaler.update()
    return norm


# ---- going on, and keeping a run safe -------------------------------------------------------------------------------

class Start:
    """Where a run begins: at step 0, or with the state that an interrupted run left."""

    def __init__(self, out: Path, state: dict | None, path: Path | None = None):
        self.out, self.state, self.path = out, state, path or out / "last.pt"
        self.step, self.bad_count = (state["step"], state["bad_count"]) if state else (0, 0)

    def use(self, data, vocabulary: dict | None = None):
        """A run goes on only with the records and the vocabulary it began with."""
        self.data = data_module.hash_names(data)
        if self.state and self.state["data"] != self.data:
            raise UserError(f"{self.out} holds a run on other data (sample hash {self.state['data'][:12]}, now "
                            f"{self.data[:12]}): choose another --out")
        if self.state and self.state.get("tokenizer") != vocabulary:
            raise UserError(f"{self.out} holds a run with another vocabulary: give the same --bpe, or choose another "
                            f"--out")

    def load(self, part, name: str):
        """Loads what the state has under this name into a network or optimizer; at step 0 nothing."""
        if self.state and part is not None:
            try:
                part.load_state_dict(self.state[name])
            except Exception as error:              # of a damaged or hostile file, whatever stumbles over it
                raise UserError(f"{self.path} does not fit its own config: "
                                f"{data_module.one_line(error)}") from None

    def announce(self, total: int):
        if self.step:
            say(f"going on from step {self.step} of {self.path}")
            if self.state["total"] != total:
                say(f"note: that run was to have {self.state['total']} steps, this one has {total}: learning rate and "
                    f"momentum are from here on those of the new length")


def is_the_same_file(theirs: str, ours: str) -> bool:
    """Whether ours may be the checkpoint that was at `theirs`: there it is, or has been."""
    return theirs.endswith(".pt") and (not isfile(theirs) or isfile(ours) and os.path.samefile(theirs, ours))


def find_resumable(options, out: Path, kind: str = "pretraining") -> Start:
    """What to go on from: of OUT/last.pt and --resume what is further.  Another run in OUT is never overwritten."""
    paths = [out / "last.pt"] if (out / "last.pt").exists() else []
    paths += [Path(options.resume)] if options.resume not in ("auto", "none") else []
    start = Start(out, None)
    parts = dict(step=int, total=int, bad_count=int, config=dict, model=dict, optimizer=dict, data=str)
    for path in paths:
        state = load_state(path)
        if state.get("kind") != kind or not all(isinstance(state.get(name), parts[name]) for name in parts):
            raise UserError(f"{path} is no {kind} checkpoint: choose another --out or --resume")
        for name, value in asdict(options).items():
            theirs = state["config"].get(name)
            is_same = theirs == value or (
                data_module.same_but_moved(theirs, value) if name == "data" else
                name in ("init", "checkpoint") and is_the_same_file(theirs, value))
            if name not in FREE_TO_CHANGE and not is_same:
                raise UserError(f"{path} is of a run with {name} = {theirs}, this one has {value}: choose another "
                                f"--out or --resume" + f", and --init {path} to begin with its weights" *
                                hasattr(options, "init"))
        if options.resume != "none" and (not start.state or state["step"] > start.step):
            start = Start(out, state, path)
    return start


class StopSignal:
    """SIGTERM or SIGINT: the current step is finished and saved, then the program ends with 128 + signal.

    So does a program that waits for a batch, if none comes within five seconds: see Guard.batches.
    A worker whose torchrun was killed stops in the same way: else it would train on beside the run that follows.
    """
    def __init__(self):
        self.number, self.waiting = 0, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame):
        if not self.number:
            self.number, self.since = number, time.monotonic()
            if hasattr(signal, "SIGALRM"):              # not on Windows
                signal.signal(signal.SIGALRM, self.leave_if_waiting)
                signal.alarm(5)
        elif time.monotonic() - self.since > 5:         # not torchrun's echo of a signal that Slurm sent to us too
            sys.exit(128 + number)                      # asked twice: at once

    def leave_if_waiting(self, number, frame):
        if self.waiting:
            sys.exit(128 + self.number)

    @property
    def is_set(self) -> bool:
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT and not self.number:
            self.note(signal.SIGTERM, None)
        return self.number > 0


def stop_listening():
    """What comes after training ends at once when asked to."""
    if hasattr(signal, "SIGALRM"):
        signal.alarm(0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Guard:
    """What keeps a training safe: bad records, values that are not finite, checkpoints, the wish to stop.

    options    max_bad, checkpoint_every, batch_size
    state      (step, bad records so far) -> the checkpoint of a run that has done `step` steps
    """
    def __init__(self, options, runtime: Runtime, stop: StopSignal, total: int, start: Start, state: Callable):
        if start.step > total:
            raise UserError(f"{start.path} has done {start.step} steps, more than the {total} asked for: give as many "
                            f"or more, or choose another --out")
        if start.state and start.state.get("scaler"):
            start.load(runtime.scaler, "scaler")
        self.o, self.runtime, self.stop, self.total, self.start = options, runtime, stop, total, start
        self.state, self.last, self.thread = state, start.out / "last.pt", ThreadPoolExecutor(1)
        self.bad_count, self.refused, self.saved_at, self.written = start.bad_count, 0, time.monotonic(), None

    def save_and_tell(self, step: int, why: str = ""):
        if self.write(step) and self.runtime.is_main:
            same = "the same command" + " with --resume auto" * (self.o.resume == "none")
            say(f"stopped after step {step}{why}; {same} goes on from there")

    def checkpoint(self, step: int) -> dict:
        return dict(self.state(step, self.bad_count), scaler=self.runtime.scaler.state_dict())

    def write(self, step: int, wait: bool = True) -> bool:
        """Whether OUT/last.pt was written.  Without waiting a thread writes, from a copy, and training goes on."""
        self.saved_at = time.monotonic()
        if not self.runtime.is_main:
            return True
        if self.written:
            self.written.result()
        checkpoint = self.checkpoint(step)
        if not wait:
            checkpoint = tree_map_only(Tensor, lambda x: x.to("cpu", copy=True), checkpoint)
        self.written = self.thread.submit(save_atomically, self.last, checkpoint)
        return self.written.result() if wait else True

    def batches(self, loader):
        """(step, batch) of each step to do."""
        batches = iter(loader)
        for step in range(self.start.step, self.total):
            try:
                self.stop.waiting = True
                batch = next(batches)
            except SystemExit:                              # asked to stop, and no batch came
                self.save_and_tell(step, ", waiting for data")
                raise
            self.stop.waiting = False
            yield step, self.readable(batch, step)

    def readable(self, batch: dict, step: int) -> dict:
        """The batch; records that could not be read, for which others stand in, are named."""
        self.bad = report_bad(batch.pop("bad"))
        if len(batch.get("images", ())) < self.runtime.share(self.o.batch_size):
            raise UserError(f"step {step + 1}: too many bad records to fill the batch; look at them with: "
                            f"python data.py check --data SPEC")
        return batch

    def accepts(self, step: int, terms: dict[str, Tensor], norm: Tensor) -> bool:
        """Whether all terms of the loss and the gradient's norm are finite, on all processes, so that the weights may
        be updated.  If so and if it is time, the weights that this step began with are saved before.

        This is a step's one exchange whose result the host reads, and so the one place where it waits for the device.
        """
        told = dict(terms, norm=norm, stopping=norm.new_full((), self.stop.is_set), bad=norm.new_full((), self.bad))
        stacked = torch.stack([x.float() for x in told.values()])
        means = dict(zip(told, mean_over_processes(stacked).tolist()))
        self.norm, self.stopping, self.bad_mean = (means.pop(name) for name in ("norm", "stopping", "bad"))
        self.terms = means
        wrong = [name for name, value in means.items() if not math.isfinite(value)]
        wrong = wrong or [f"gradient (norm {self.norm})"] * (not math.isfinite(self.norm))
        if not wrong:
            self.refused = 0
            if time.monotonic() - self.saved_at > self.o.checkpoint_every and step > self.start.step:
                self.write(step, wait=False)
            return True
        self.refused += 1
        say(f"warning: step {step + 1}: {', '.join(wrong)} is not finite; update skipped", file=sys.stderr)
        if self.refused == 10:
            good = f"the last good checkpoint is {self.last}" if self.last.exists() else "no checkpoint yet"
            raise UserError(f"{', '.join(wrong)} was not finite for 10 steps in a row, up to step {step + 1}; {good}: "
                            f"try --precision fp32, a lower --lr or --clip-grad 1")
        return False

    def end(self, step: int):
        """Counts bad records, and stops the run if they are too many or if it was asked to."""
        self.bad_count += round(self.bad_mean * self.runtime.world)
        read = (step + 1) * self.o.batch_size + self.bad_count          # each bad one has a stand-in
        if self.bad_count > self.o.max_bad * max(read, 100):
            raise UserError(f"{self.bad_count} of {read} records read so far are bad, more than --max-bad "
                            f"{self.o.max_bad}: look at them with: python data.py check --data SPEC")
        if self.stopping:
            if not self.refused:
                self.save_and_tell(step + 1)
            stop_listening()
            sys.exit(128 + (self.stop.number or signal.SIGTERM))

    def finish(self):
        has_more = self.start.step < self.total or not self.last.exists()       # else resumed with no step to go
        if has_more and not self.write(self.total):
            raise UserError(f"the finished model could not be saved to {self.last}: free some space and run the "
                            f"command again")
        stop_listening()
        if self.stop.number:
            sys.exit(128 + self.stop.number)


def report_bad(bad: list[tuple[str, str]]) -> int:
    for name, reason in bad:
        say(f"skipped {data_module.printable(f'{name}: {reason}')}", file=sys.stderr)
    return len(bad)


# ---- the log, and pictures ------------------------------------------------------------------------------------------

@contextlib.contextmanager
def tell_if_full(path: Path):
    """A disk that is full costs lines of a log, not the run."""
    try:
        yield
    except OSError as error:
        say(f"warning: {path} could not be written ({error.strerror}); training goes on", file=sys.stderr)


def read_log(path: Path) -> list[dict]:
    """The lines of metrics.jsonl; one that a full disk or a power cut has spoiled is passed over."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


class Log:
    """metrics.jsonl, one object a line, and the progress line with rate and time left; by the main process only."""
    unspoken = {"step", "epoch", "lr", "momentum", "logit_scale", "grad_norm", "patch_entropy", "codes_used"}

    def __init__(self, out: Path, is_main: bool, total: int, samples_per_step: int, start: int = 0):
        self.path, self.is_main, self.total, self.samples = out / "metrics.jsonl", is_main, total, samples_per_step
        self.line_time, self.line_step = time.monotonic(), start
        self.started = self.said_time = self.line_time
        if is_main:
            # lines beyond the checkpoint we go on from will be written again
            kept = [json.dumps(line) + "\n" for line in read_log(self.path) if line["step"] < start]
            with tell_if_full(self.path):
                data_module.write_whole(self.path, "".join(kept).encode())

    def is_due(self, step: int, every: int) -> bool:
        """Whether `step` gets a line.  If not, a short one is said after five silent seconds, later after a minute."""
        if (step + 1) % every == 0 or step + 1 == self.total:
            return True
        now = time.monotonic()
        if self.is_main and now - self.said_time > min(60, max(5, (now - self.started) / 20)):
            say(f"step {step + 1}/{self.total}  {self.rate(step)[1]}")
            self.said_time = now
        return False

    def line(self, step: int, values: dict[str, float]):
        """After `step` (counted from 0) is done."""
        rate, rest = self.rate(step)
        self.line_time, self.line_step = time.monotonic(), step + 1
        if not self.is_main:
            return
        spoken = "  ".join(f"{name} {value:.3f}" for name, value in values.items() if name not in self.unspoken)
        values = dict(step=step, **values, samples_per_second=rate)
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        with tell_if_full(self.path), open(self.path, "a") as file:
            file.write(json.dumps(rounded) + "\n")
        say(f"step {step + 1}/{self.total}  {spoken}  lr {values['lr']:.2e}  {rest}")
        self.said_time = time.monotonic()

    def rate(self, step: int) -> tuple[float, str]:
        """Samples a second since the last line, and in words with the time left."""
        rate = (step + 1 - self.line_step) * self.samples / max(time.monotonic() - self.line_time, 1e-9)
        left = (self.total - step - 1) * self.samples / rate
        return rate, f"{rate:.{int(rate < 10)}f}/s  {timedelta(seconds=round(left))} left"


def show(name: str, out: str | Path, draw, *arguments):
    """Writes OUT/name, the picture that draw(*arguments) gives; one that fails is not worth a finished run."""
    try:
        draw(*arguments).save(Path(out) / name)
        say(f"{name.partition('.')[0]}: {out}/{name}")
    except Exception as error:
        say(f"warning: no {name}: {data_module.one_line(error)}", file=sys.stderr)


def draw_curves(log: Path, columns: int = 4) -> PIL.Image.Image:
    """metrics.jsonl as a picture: a panel for each number against the step, gray as logged, blue its running mean over
    a twentieth of the run."""
    lines, panels = read_log(log), []
    for name in {name: 0 for line in lines for name in line}:
        points = [(line["step"] + 1, line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]
        if points and name not in ("step", "epoch", "samples_per_second"):
            panels.append((f"{name}, steps to {points[-1][0]}", draw_curve(points)))
    return data_module.sheet([panels[i:i + columns] for i in range(0, len(panels), columns)], 380, 190)


def draw_curve(points: list[tuple[int, float]], width: int = 380, height: int = 190) -> PIL.Image.Image:
    """A panel: (step, value) points, their running mean, and the least, greatest and last value."""
    values, half = [value for _, value in points], len(points) // 40
    around = [values[max(0, i - half):i + half + 1] for i in range(len(values))]
    means = [sum(some) / len(some) for some in around]
    low, high = min(values), max(values)

    def place(step: int, value: float) -> tuple[float, float]:
        share = (value - low) / (high - low) if high > low else 0.5
        return 60 + (width - 120) * step / points[-1][0], (height - 20) - (height - 40) * share
    panel = PIL.Image.new("RGB", (width, height), "white")
    pen, font = PIL.ImageDraw.Draw(panel), PIL.ImageFont.load_default(12)
    pen.rectangle([60, 20, width - 60, height - 20], outline="#bbbbbb")
    pen.line([place(*point) for point in points], "#b8b8b8")
    pen.line([place(step, mean) for (step, _), mean in zip(points, means)], "#1f5fbf", 2)
    for y, value in ((height - 20, low), (20, high)):
        pen.text((55, y), f"{value:.4g}", "#444444", font, anchor="rm")
    pen.text((width - 55, place(points[-1][0], means[-1])[1]), f"{means[-1]:.4g}", "#1f5fbf", font, anchor="lm")
    return panel


@torch.no_grad()
def draw_step(core: MaskCLIP, teacher: Teacher | None, tokenizer: BytePairTokenizer, records, o: TrainOptions,
              count: int = 4) -> PIL.Image.Image:
    """What the masked branches do with a few pairs: the image; what the student sees of it; at hidden patches the
    teacher's codes and the student's guess, a color a code, or the pixels guessed; the caption, and the words guessed.

    records: data.Records, whose items are those of a training batch
    """
    items = [records[0, i, i + count] for i in range(count)]
    batch = PairCollate(o, tokenizer)(items)
    part = to_device({name: x for name, x in batch.items() if torch.is_tensor(x)}, core.logit_scale.device)
    patches, hidden = patchify(batch["images"].float(), o.patch_size), batch["hidden"]          # (B, N, 3*p*p), (B, M)

    def fill(background: Tensor, values: Tensor) -> Tensor:
        """background with values (B, M, 3*p*p) at hidden patches"""
        return background.scatter(1, hidden[..., None].expand_as(values), values)
    columns = {"image": patches, "seen by the student": fill(patches, torch.full_like(take(patches, hidden), 128.0))}
    x = core.fill_in(part["images"], part["keep"], part["hidden"])                              # (B, M, D)
    if core.predicts == "pixels":
        true = take(patches, hidden)
        pixels = core.predict(x).cpu() * true.std(dim=-1, keepdim=True) + true.mean(dim=-1, keepdim=True)
        columns["guessed"] = fill(patches, pixels)
    if core.predicts == "codes":
        answer, colors = teacher(part["images"], part["hidden"]), 255 * torch.rand(o.n_codes, 3)
        for name, logits in (("teacher's codes", answer["features"] @ answer["codes"].T - answer["center"]),
                             ("student's guess", core.quantizer(x))):
            code = logits.argmax(dim=-1).cpu()                                                  # (B, M)
            columns[name] = fill(patches / 4, colors[code].repeat_interleave(o.patch_size ** 2, dim=-1))
    rows, shape = [], (core.config.grid, core.config.grid, 3, o.patch_size, o.patch_size)
    for i, caption in enumerate(guessed_words(core, part, tokenizer)):
        row = [(name, x[i].clamp(0, 255).byte().view(shape).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2))
               for name, x in columns.items()]                                                  # (H, W, 3)
        row[0] = f"{textwrap.fill(caption, 18 * len(columns))}\nimage", row[0][1]
        rows.append([(text, PIL.Image.fromarray(pixels.numpy())) for text, pixels in row])
    return data_module.sheet(rows, 144)


def guessed_words(core: MaskCLIP, part: dict, tokenizer: BytePairTokenizer) -> list[str]:
    """The captions of a batch; for each masked word, what is guessed in its place: a red [circle: square]"""
    words = [[tokenizer.decode([i]).strip() for i in row] for row in part["tokens"].tolist()]
    if METHODS[core.config.method]["mlm"]:
        x = core.word_features(core.text(part["corrupted"], core.eot), part["tokens"], part["chosen"])       # (n, D)
        known = tokenizer.vocab_size                                # the table may have more rows
        logits = F.linear(x, core.text.token_embedding.weight, core.text_decoder.bias)[:, :known]
        guess = logits.argmax(dim=-1).tolist()
        for place, i in zip(part["chosen"].tolist(), guess):
            row, column = divmod(place, part["tokens"].shape[1])
            words[row][column] = f"[{words[row][column]}: {tokenizer.decode([i]).strip()}]"
    end = tokenizer.decode([core.eot])
    return [" ".join(row[1:row.index(end)]) for row in words]


# ---- data sets, and features of a whole one -------------------------------------------------------------------------

def open_mixed(specs: tuple[str, ...], split: str, task: str, size: int, cache: Path | None = None, excluded=()):
    parts = [data_module.open_data(spec, split, task, size=size, cache=cache) for spec in specs]
    parts = data_module.name_classes(parts, excluded) if task == "captions" else parts
    return parts[0] if len(parts) == 1 else data_module.Mixed(parts)


class ReadRecord:
    """A record -> its image, its class, its captions, and what tells copies of an image: made in the loader, where
    there are processes to spare."""

    def __init__(self, image):
        self.image = image              # transform(PIL image, rng) -> uint8 (3, H, W)

    def __call__(self, sample, rng) -> dict:
        image = self.image(sample.image, rng)
        return dict(images=image, label=sample.label, captions=sample.captions,
                    pixels=hashlib.sha256(image.numpy()).hexdigest())


@torch.no_grad()
def extract(data, transform, encode, runtime: Runtime, batch_size: int) -> dict:
    """encode(images) of each readable record, once and in order; all processes get the same dict:

    features (n, D)   index (n,) of the record   label (n,), -1 unknown   captions (n tuples)   bad [(name, reason)]
    pixels (n texts), equal for images that are copies of each other as the network sees them
    """
    loader = data_module.eval_loader(data, ReadRecord(transform), max(1, batch_size // runtime.world),
                                     runtime.rank, runtime.world, runtime.workers)
    rows, bad = [], []
    for batch in data_module.progress(loader, len(loader), "batches of images", runtime.is_main):
        bad += batch["bad"]
        if "index" in batch:
            with runtime.autocast():
                x = encode(data_module.normalize(batch["images"].to(runtime.device)))              # (B, D)
            rows += zip(batch["index"].tolist(), x.float().cpu().numpy(), batch["label"].tolist(), batch["captions"],
                        batch["pixels"])
    rows, bad = (sum(parts, []) for parts in zip(*gather_objects((rows, bad), runtime)))
    if runtime.is_main:
        report_bad(bad)
    if not rows:
        raise UserError(f"none of the {len(data)} records can be read; {bad[0][0]}: {bad[0][1]}")
    index, features, label, captions, pixels = zip(*sorted(rows, key=lambda row: row[0]))
    return dict(features=torch.from_numpy(np.stack(features)).to(runtime.device), index=torch.tensor(index),
                label=torch.tensor(label), captions=captions, pixels=pixels, bad=bad)


def tell_shared(train_data, test_data):
    """A line where images are tested on that were trained on, as of folders without splits."""
    train_names = {train_data.name(i) for i in range(len(train_data))}
    shared = sum(test_data.name(i) in train_names for i in range(len(test_data)))
    if shared:
        say(f"note: {shared:,} of the {len(test_data):,} test images are training images too: accuracy on these tells "
            f"nothing; give data with a split for tests")


# ---------------------------------------------------------------------------------------------------------------------
# python train.py --plan: what a run would cost
# ---------------------------------------------------------------------------------------------------------------------

# dense bf16 TFLOP/s and GB of memory; a V100 multiplies no bfloat16: its TFLOP/s are of fp16
GPUS = {"h200": (989, 141), "h100": (989, 80), "a100": (312, 80), "a100-40gb": (312, 40), "l40s": (362, 48),
        "4090": (165, 24), "v100": (125, 32)}
# images a second and core that the loader makes of JPEGs of 256 px (AMD EPYC, AVX2), with the crops of the views, whose
# colors the device changes
LOADED, VIEWED = 770, {"slip": 390, "declip": 500, "defilip": 500}


def step_memory(c: Config, pairs: int, rows: list[Cost], half: bool = False) -> dict[str, float]:
    """Bytes that a step needs on a device with `pairs` of a micro-batch at a time, by what they are for.

    states       4 bytes each of weight, gradient and Adam's two averages a parameter, and of the teacher's; in bf16
                 or fp16 (half) autocast's 2 bytes a weight besides
    activations  what model.costs (rows) says is kept from forward to backward; the pixels of other micro-batches,
                 0.6 MB an image of 224 px, are not counted
    logits       of codes or words, LOGIT_ROWS at once: logits, their softmax, its gradient
    """
    by_name, width = {row.name: row.parameters for row in rows}, c.vocab_size * METHODS[c.method]["mlm"]
    states = by_name["all"] * (18 if half else 16)
    if "teacher" in by_name:
        states += 4 * (by_name["image tower"] + by_name["masked image"])
        width = max(width, c.n_codes)
    logits = 12.0 * width * min(LOGIT_ROWS, pairs * c.grid ** 2)
    return dict(states=states, activations=pairs * rows[-1].kept, logits=logits)


def plan(o: TrainOptions):
    """FLOPs, memory and time of the run, each with the formula it comes from."""
    tflops, memory = GPUS[o.gpu]
    if o.batch_size % (o.gpus * o.accumulate):
        raise UserError(f"--batch-size {o.batch_size} cannot be shared by --gpus {o.gpus} times --accumulate "
                        f"{o.accumulate}: choose a multiple of {o.gpus * o.accumulate}")
    own = o.batch_size // (o.gpus * o.accumulate)
    steps = o.steps or int(o.epochs * (o.pairs // o.batch_size))
    rows = costs(o, bf16=True)                                              # fp16 takes as much
    again = (rows[-1].flops - sum(row.flops for row in rows[2:-1])) * (o.accumulate > 1)    # the towers once more
    flops = o.batch_size * (rows[-1].step_flops + again)
    seconds = flops / (o.gpus * tflops * 1e12 * o.utilization)
    gb = {name: value / 1e9 for name, value in step_memory(o, own, rows, half=True).items()}
    print(f"plan: {o.method}, preset {o.preset}, {o.gpus} x {o.gpu} in {'fp16' if o.gpu == 'v100' else 'bf16'}, "
          f"as if every caption had {o.context_length} tokens")
    print(f"steps          {steps:,}" + ("" if o.steps else
          f" = {o.epochs:g} epochs x {o.pairs:,} pairs / batch of {o.batch_size:,}"))
    print(f"FLOPs          {flops / 1e15:.2f} P a step = {o.batch_size:,} pairs x {flops / o.batch_size / 1e9:.1f} G "
          f"(python model.py: forward and backward); {steps * flops / 1e18:.1f} E in all")
    print(f"memory         {sum(gb.values()):.1f} of {memory} GB a device = states {gb['states']:.1f} + activations of "
          f"{own} pairs {gb['activations']:.1f} + logits {gb['logits']:.1f}")
    print(f"a step         {seconds:.3f} s = FLOPs / ({o.gpus} x {tflops:g} T x utilization {o.utilization:g})")
    needed, made = o.batch_size / seconds / o.gpus, VIEWED.get(o.method, LOADED)
    print(f"loader         {needed:,.0f} images a second for each GPU: cores {math.ceil(needed / made)}, at {made} "
          f"images of 256 px a second and core")
    print(f"time           {steps * seconds / 3600:.1f} hours, {steps * seconds / 3600 * o.gpus:.0f} GPU hours")
    room = 0.9 * memory - gb["states"] - gb["logits"]                       # for activations
    if gb["activations"] > room:
        parts = o.accumulate * 2 ** math.ceil(math.log2(gb["activations"] / max(room, 1e-9)))
        fewer = f"--accumulate {parts} or " * (parts <= o.batch_size // o.gpus)
        print(f"note: this does not fit {o.gpu}: give {fewer}more --gpus or another --gpu")


def main():
    options = parse_train_options()
    plan(options) if options.plan else train(options)


if __name__ == "__main__":
    run(main)
