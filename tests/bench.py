"""Speed and memory beside the peers, measured side by side in one run; run it in the peers' environment.

    python tests/bench.py                                   all rows, twenty minutes on two cores
    python tests/bench.py step loader --rounds 9            some rows, more often
    python tests/bench.py --tiny --threads 1 --clock cpu    small sizes on a busy machine: whether it runs, not how fast

Contestants take turns, in each round in the opposite order to that before, on the same data, after a round that does
not count.  A ratio is the median of the rounds' ratios; beside it stand the lowest and highest.  Aims ">=" are speeds,
"<=" costs, and one that is missed is marked with "!".  --clock cpu counts processor time, which other programs do not
lengthen: right for one thread on a CPU.
This is no test and pytest does not collect it: times belong to the machine they are measured on.
"""
import argparse
import contextlib
import gc
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.distributed as dist
from torch import nn

from conftest import ROOT, SHARED, command
import data
import dense
import losses
import model
import train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = train.multiplies_bf16(DEVICE)
RUNTIME = train.Runtime(0, 1, DEVICE, "bf16" if BF16 else "fp32", 0)


@dataclass
class Row:
    what: str
    against: str
    aim: str                # ">= 1.15"
    ratio: float
    low: float
    high: float
    note: str = ""

    @property
    def reached(self) -> bool:
        sign, value = self.aim.split()
        return self.ratio >= float(value) if sign == ">=" else self.ratio <= float(value)


def row(what: str, against: str, aim: str, ratios: list[float], note: str = "") -> Row:
    return Row(what, against, aim, statistics.median(ratios), min(ratios), max(ratios), note)


def race(contestants: dict, o, rounds: int = 0) -> dict[str, list[float]]:
    """{name: prepare}, prepare(round) -> what is timed  ->  {name: seconds of each round}"""
    clock = dict(wall=time.perf_counter, cpu=time.process_time)[o.clock]
    seconds = {name: [] for name in contestants}
    for i in range(1 + (rounds or o.rounds)):                   # round 0 does not count
        for name in list(contestants)[::1 if i % 2 else -1]:
            run = contestants[name](i)
            synchronize()
            start = clock()
            run()
            synchronize()
            if i:
                seconds[name].append(clock() - start)
    return seconds


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def over(a: list[float], b: list[float], factor: float = 1.0) -> list[float]:
    return [factor * x / y for x, y in zip(a, b)]


def child(*arguments, o, processes: int = 0) -> dict:
    """What this file prints as its last line when it runs by itself with --child."""
    options = ["--threads", o.threads, "--rounds", o.rounds, *(["--tiny"] if o.tiny else [])]
    done = subprocess.run(command(ROOT / "tests/bench.py", *options, "--child", *arguments, processes=processes),
                          capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS=str(o.threads)))
    if done.returncode:
        sys.exit(f"{arguments}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# What takes part
# ---------------------------------------------------------------------------------------------------------------------

class Pairs:
    """Images (B, 3, size, size) uint8 and captions of real pairs, or of the embedded world where there are none."""

    def __init__(self, size: int):
        tars = sorted((SHARED / "pairs").glob("*.tar"))
        self.data = (data.Shards(f"{SHARED}/pairs/{{{tars[0].stem}..{tars[-1].stem}}}.tar") if tars else
                     data.ShapesWorld(split="train", count=4096, size=size))
        self.crop = data.TrainTransform(size)

    def batch(self, number: int, B: int) -> tuple[torch.Tensor, list[str]]:
        rng = np.random.default_rng(number)
        samples = [self.data.read(int(i)) for i in rng.choice(len(self.data), B, replace=False)]
        return torch.stack([self.crop(s.image, rng) for s in samples]), [s.captions[0] for s in samples]

    def captions(self) -> list[str]:
        return sorted({self.data.read(i).captions[0] for i in range(len(self.data))})


def clip_tokenizer() -> data.BytePairTokenizer:
    import open_clip
    return data.BytePairTokenizer.from_file(open_clip.tokenizer.default_bpe())


class Ours:
    """One step as in train.train, from pixels and captions on."""

    def __init__(self, config: model.Config, tokenizer: data.BytePairTokenizer, compile: bool = False):
        torch.manual_seed(0)
        self.options = o = train.TrainOptions(**asdict(config), compile=compile)
        self.core = model.build(o, tokenizer.eot).to(DEVICE).train()
        self.net = torch.compile(self.core) if compile else self.core
        self.tokenizer = tokenizer
        has_teacher = model.METHODS[o.method]["predicts"] == "teacher"
        self.teacher = model.Teacher(self.core).to(DEVICE) if has_teacher else None
        self.optimizer = torch.optim.AdamW(train.param_groups(self.core, o.weight_decay), lr=1e-5,
                                           betas=(0.9, o.beta2), fused=True)
        self.runtime = replace(RUNTIME, rank=dist.get_rank(), world=dist.get_world_size()) if dist.is_initialized() \
            else RUNTIME

    def step(self, images: torch.Tensor, captions: list[str], number: int = 0):
        o, runtime = self.options, self.runtime
        batch = dict(images=images, tokens=self.tokens(captions))
        batch = train.hide(batch, o, self.tokenizer, number, o.seed, runtime.rank, runtime.world)
        batch = train.micro_batches(batch, 1, DEVICE)[0]
        self.optimizer.zero_grad()
        terms, answers = train.backward(self.net, self.core, self.teacher, batch, runtime)
        norm = train.clip_gradient(self.optimizer, o.clip_grad, runtime)
        losses.mean_over_processes(torch.stack([*terms.values(), norm])).tolist()
        self.optimizer.step()
        self.core.after_update()
        if self.teacher:
            self.teacher.update(self.core, o.momentum)
            self.teacher.update_center(answers, o.center_momentum)

    def tokens(self, captions: list[str]) -> torch.Tensor:
        """(B, L), as long as the longest caption"""
        ids = self.tokenizer(captions, self.options.context_length)
        return data.trim(ids, self.tokenizer.eot, 8 if self.options.compile else 1)

    def flops(self, captions: list[str]) -> float:
        """Useful ones, with captions as long as the longest of the batch"""
        return len(captions) * model.costs(self.options, self.tokens(captions).shape[1])[-1].step_flops


class OpenClip:
    """One step as in open_clip's training: its model, tokenizer, loss, and AdamW as it makes it."""

    def __init__(self, c: model.Config):
        import open_clip
        torch.manual_seed(0)
        self.model = open_clip.CLIP(
            c.embed_dim,
            open_clip.CLIPVisionCfg(layers=c.depth, width=c.width, patch_size=c.patch_size, image_size=c.image_size),
            open_clip.CLIPTextCfg(context_length=c.context_length, vocab_size=c.vocab_size, width=c.text_width,
                                  heads=c.text_heads, layers=c.text_depth)).to(DEVICE).train()
        self.tokenizer, self.loss = open_clip.SimpleTokenizer(), open_clip.ClipLoss()
        vectors = [p for name, p in self.model.named_parameters()
                   if p.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))]
        known = {id(p) for p in vectors}
        self.optimizer = torch.optim.AdamW(
            [dict(params=vectors, weight_decay=0.0),
             dict(params=[p for p in self.model.parameters() if id(p) not in known], weight_decay=0.2)],
            lr=1e-5, betas=(0.9, 0.98), eps=1e-6)

    def step(self, images: torch.Tensor, captions: list[str]):
        images, tokens = images.to(DEVICE), self.tokenizer(captions).to(DEVICE)
        self.optimizer.zero_grad()
        with RUNTIME.autocast():
            image, text, scale = self.model(images, tokens)[:3]
            total = self.loss(image, text, scale)
        total.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, np.log(100))


class Peak:
    """The fastest of a few matrix products: what this machine multiplies, in FLOPs a second."""

    def __init__(self, tiny: bool):
        self.n = 8192 if DEVICE.type == "cuda" else 512 if tiny else 2048
        kind = torch.bfloat16 if BF16 else torch.float32
        self.a, self.b = torch.randn(2, self.n, self.n, device=DEVICE, dtype=kind)

    def products(self):
        for _ in range(4):
            self.a @ self.b

    def rates(self, seconds: list[float]) -> list[float]:
        return [4 * 2 * self.n ** 3 / s for s in seconds]


def vit_b16(o, method: str) -> model.Config:
    config = model.preset_for("vit-b16-yfcc15m", method)
    return replace(config, depth=1, text_depth=1, text_decoder_depth=1) if o.tiny else config


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------

def step(o) -> list[Row]:
    """CLIP's step against open_clip's and the machine's peak; MaskCLIP's against CLIP's."""
    B = 2 if o.tiny else 256 if DEVICE.type == "cuda" else 16
    tokenizer, pairs, peak = clip_tokenizer(), Pairs(224), Peak(o.tiny)
    clip, theirs = Ours(vit_b16(o, "clip"), tokenizer), OpenClip(vit_b16(o, "clip"))

    def ours(net):
        def prepare(i):
            images, captions = pairs.batch(i, B)
            return lambda: net.step(images, captions, i)
        return prepare

    def open_clip(i):
        images, captions = pairs.batch(i, B)
        images = data.normalize(images)                             # theirs come normalized from the loader
        return lambda: theirs.step(images, captions)
    took = race(dict(ours=ours(clip), open_clip=open_clip, peak=lambda i: peak.products), o)
    captions = [pairs.batch(i, B)[1] for i in range(o.rounds)]
    longest = [clip.tokens(c).shape[1] for c in captions]
    reached = over([clip.flops(c) for c in captions], took["ours"])
    note = f"batch {B}, longest captions of {min(longest)} to {max(longest)} tokens"
    rows = [row("CLIP step, ViT-B/16", "open_clip", ">= 1.15", over(took["open_clip"], took["ours"]), note),
            row("CLIP step, useful FLOPs", "matrix peak", ">= 0.80", over(reached, peak.rates(took["peak"])),
                f"peak {statistics.median(peak.rates(took['peak'])) / 1e9:.1f} GFLOP/s")]
    del theirs
    mask = Ours(vit_b16(o, "maskclip"), tokenizer)
    took = race(dict(clip=ours(clip), maskclip=ours(mask)), o)
    flops = [mask.flops(c) / clip.flops(c) for c in captions]
    rows.append(row("MaskCLIP step / CLIP step", "their FLOPs", "<= 1.05",
                    [t / f for t, f in zip(over(took["maskclip"], took["clip"]), flops)],
                    f"FLOPs {statistics.median(flops):.2f} times, time "
                    f"{statistics.median(over(took['maskclip'], took['clip'])):.2f} times"))
    return rows


def memory(o) -> list[Row]:
    """Peak of two steps, over what the process had before its model was built."""
    got = {method: child("memory", method, o=o) for method in ("clip", "maskclip")}
    ratio = got["maskclip"]["peak"] / got["clip"]["peak"]
    kept = got["maskclip"]["kept"] / got["clip"]["kept"]
    return [row("memory of MaskCLIP / CLIP step", "1", "<= 1.35", [ratio],
                f"{got['maskclip']['peak'] / 1e9:.2f} and {got['clip']['peak'] / 1e9:.2f} GB; activations kept, "
                f"by python model.py: {kept:.2f} times")] + [
        row(f"memory of a {method} step", "formula", "<= 1.35", [one["peak"] / one["formula"]],
            f"states, activations and logits: {one['formula'] / 1e9:.2f} GB") for method, one in got.items()]


def memory_child(o, method: str) -> dict:
    return step_peak(vit_b16(o, method), clip_tokenizer(), *Pairs(224).batch(0, 2 if o.tiny else 16))


def step_peak(config: model.Config, tokenizer, images, captions: list[str]) -> dict[str, float]:
    """Bytes: the peak of two steps over what was there before, what train.step_memory says, activations kept."""
    # a process loads libraries when it first computes
    Ours(replace(config, depth=1, text_depth=1, text_decoder_depth=1), tokenizer).step(images[:2], captions[:2])
    before = memory_now()
    net = Ours(config, tokenizer)
    for number in range(2):
        net.step(images, captions, number)
    words = net.tokens(captions).shape[1]
    need = train.step_memory(config, len(captions), model.costs(config, words, BF16), BF16)
    return dict(peak=peak_bytes() - before, formula=sum(need.values()), kept=need["activations"])


def memory_now() -> float:
    if DEVICE.type == "cuda":
        return torch.cuda.memory_allocated()
    return 1024.0 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


def peak_bytes() -> float:
    """Of this process so far; not getrusage's, which begins with that of the process that started this one."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024.0 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def contrast_setup(o):
    """One of 16 processes: (image, text (B, E), scale) that are its own, with gradient; others (15 B, E)"""
    W, B, E = 16, 32 if o.tiny else 2048, 512
    generator = torch.Generator().manual_seed(0)
    image, text, others = (nn.functional.normalize(torch.randn(n, E, generator=generator), dim=-1).to(DEVICE)
                           for n in (B, B, (W - 1) * B))
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(50.0, device=DEVICE).requires_grad_(), others, W


@contextlib.contextmanager
def as_if_gathered(others: torch.Tensor):
    """Ours and theirs get our rows, with gradient, and then the others' from their gathers."""
    import open_clip.loss
    ours, theirs = losses.gather, open_clip.loss.gather_features
    losses.gather = lambda x: torch.cat([x, others])
    open_clip.loss.gather_features = lambda image, text, **_: (torch.cat([image, others]), torch.cat([text, others]))
    yield
    losses.gather, open_clip.loss.gather_features = ours, theirs


def contrast_of(name: str, W: int):
    """(image, text, scale) -> L_I + L_T"""
    import open_clip
    if name == "ours":
        return lambda image, text, scale: sum(losses.contrastive_loss(image, text, scale))
    theirs = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=0, world_size=W)
    return lambda image, text, scale: 2 * theirs(image, text, scale)


def contrast(o) -> list[Row]:
    """The contrastive loss of one of 16 processes, 32,768 pairs in all, forward and backward."""
    image, text, scale, others, W = contrast_setup(o)

    def run(name):
        loss = contrast_of(name, W)
        return lambda i: lambda: torch.autograd.grad(loss(image, text, scale), (image, text, scale))
    with as_if_gathered(others):
        took = race(dict(ours=run("ours"), open_clip=run("open_clip")), o, 1 if o.tiny else 3)
        grads = run("ours")(0)()
    with as_if_gathered(others.double()):
        loss = contrast_of("open_clip", W)(image.double(), text.double(), scale.double())
        exact = torch.autograd.grad(loss, (image, text, scale))
    off = max(((a - b).norm() / b.norm()).item() for a, b in zip(grads, exact))
    peaks = {name: child("contrast", name, o=o)["peak"] for name in took}
    pairs = W * len(image)
    return [row(f"contrast, {pairs:,} pairs", "open_clip", ">= 1.0", over(took["open_clip"], took["ours"]),
                "local loss, one of 16 processes"),
            row("  its memory", "open_clip", "<= 1.0", [peaks["ours"] / peaks["open_clip"]],
                f"{peaks['ours'] / 1e6:.0f} MB and {peaks['open_clip'] / 1e6:.0f} MB"),
            row("  its gradient, relative error", "open_clip in float64", "<= 1e-4", [off])]


def contrast_child(o, name: str) -> dict:
    image, text, scale, others, W = contrast_setup(o)
    with as_if_gathered(others):
        loss, before = contrast_of(name, W), memory_now()
        torch.autograd.grad(loss(image, text, scale), (image, text, scale))
    return dict(peak=peak_bytes() - before)


def loader(o) -> list[Row]:
    """JPEGs of 500 px in a shard, as YFCC15M's, to normalized random crops of 224 px and tokens; one process."""
    import open_clip
    import webdataset
    from torchvision import transforms as T
    n, B, pairs = 32 if o.tiny else 512, 16, Pairs(500)
    tokenizer, theirs = clip_tokenizer(), open_clip.SimpleTokenizer()
    photos = sorted((SHARED / "imagefolder_photos").rglob("*.jpg"))
    captions = pairs.captions()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/00000.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(n):
                image = (PIL.Image.open(photos[i % len(photos)]) if photos else
                         data.ShapesWorld(split="train", count=n, size=500).read(i).image).convert("RGB")
                width, height = (round(side * 500 / max(image.size)) for side in image.size)
                jpeg = io.BytesIO()
                image.resize((width, height)).save(jpeg, "JPEG", quality=90)
                for extension, content in ("jpg", jpeg.getvalue()), ("txt", captions[i % len(captions)].encode()):
                    member = tarfile.TarInfo(f"{i:09}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        options = train.TrainOptions(**asdict(model.PAPER))
        transform, collate = train.PairTransform(options, data.Shards(path)), train.PairCollate(options, tokenizer)
        crop = T.Compose([T.RandomResizedCrop(224, scale=(0.5, 1.0), interpolation=T.InterpolationMode.BICUBIC),
                          T.ToTensor(), T.Normalize(data.MEAN, data.STD)])

        def ours(i):
            batches = data.train_loader(data.Shards(path), transform, B, i + 1, range(n // B), collate=collate)
            return lambda: [data.normalize(batch["images"]) for batch in batches]

        def web(i):
            pipeline = webdataset.WebDataset(path, shardshuffle=False).decode("pilrgb").to_tuple("jpg", "txt")
            batches = pipeline.map_tuple(crop, lambda text: theirs(text)[0]).batched(B)
            return lambda: [images for images, _ in batches]
        one = torch.get_num_threads()
        torch.set_num_threads(1)
        took = race(dict(ours=ours, webdataset=web), o)
        torch.set_num_threads(one)
    return [row("loader, JPEGs of 500 px", "webdataset + torchvision", ">= 1.3", over(took["webdataset"], took["ours"]),
                f"{n / statistics.median(took['ours']):.0f} images a second and core; "
                f"{'photographs' if photos else 'drawn scenes'}")]


def tokens(o) -> list[Row]:
    """Distinct captions, each seen once, with nothing cached before."""
    import open_clip
    captions = Pairs(224).captions()[::8 if o.tiny else 1]

    def ours(i):
        tokenizer = clip_tokenizer()
        return lambda: tokenizer(captions)

    def theirs(i):
        tokenizer = open_clip.SimpleTokenizer()
        return lambda: tokenizer(captions)
    took = race(dict(ours=ours, open_clip=theirs), o)
    return [row("tokenizer, distinct captions", "open_clip", ">= 5", over(took["open_clip"], took["ours"]),
                f"{len(captions) / statistics.median(took['ours']):,.0f} a second")]


def pocket_step(compile: bool = False):
    """(Ours of the preset, its images, captions): 64 scenes"""
    world = data.ShapesWorld(count=64, size=48)
    samples = [world.read(i) for i in range(64)]
    tokenizer = data.BytePairTokenizer.train((s.captions[0] for s in samples), 768)
    images = torch.stack([data.to_tensor(s.image.convert("RGB")) for s in samples])
    return Ours(model.PRESETS["pocket"], tokenizer, compile), images, [s.captions[0] for s in samples]


def pocket(o) -> list[Row]:
    """The step of the default run, after its loader."""
    (net, images, captions), peak = pocket_step(), Peak(o.tiny)
    many = 1 if o.tiny else 10

    def steps(i):
        return lambda: [net.step(images, captions, many * i + k) for k in range(many)]
    took = race(dict(step=steps, peak=lambda i: peak.products), o)
    reached = [many * net.flops(captions) / s for s in took["step"]]
    return [row("pocket's step, useful FLOPs", "matrix peak", ">= 0.60", over(reached, peak.rates(took["peak"])),
                f"{1000 * statistics.median(took['step']) / many:.0f} ms a step of 64")]


def compiled(o) -> list[Row]:
    """The step of the default run under torch.compile."""
    (net, images, captions), (faster, *_) = pocket_step(), pocket_step(compile=True)
    started = time.perf_counter()
    for number in range(2):
        faster.step(images, captions, number)
    minutes = (time.perf_counter() - started) / 60
    took = race(dict(eager=lambda i: lambda: net.step(images, captions, i),
                     compiled=lambda i: lambda: faster.step(images, captions, i)), o)
    return [row("pocket's step, --compile", "without", ">= 1", over(took["eager"], took["compiled"]),
                f"after {minutes:.1f} minutes of compiling")]


def zeroshot(o) -> list[Row]:
    """Image embeddings of ViT-B/16."""
    B, pairs, config = (2 if o.tiny else 512 if DEVICE.type == "cuda" else 32), Pairs(224), vit_b16(o, "clip")
    ours, theirs = model.build(config, 49407).to(DEVICE).eval(), OpenClip(config).model.eval()

    def run(encode):
        images = data.normalize(pairs.batch(0, B)[0]).to(DEVICE)

        def once():
            with torch.no_grad(), RUNTIME.autocast():
                encode(images)
        return lambda i: once
    took = race(dict(ours=run(ours.encode_image), open_clip=run(lambda x: theirs.encode_image(x, normalize=True))), o)
    return [row("zero-shot, images a second", "open_clip", ">= 1.1", over(took["open_clip"], took["ours"]),
                f"batch {B}, {B / statistics.median(took['ours']):.1f} a second")]


def boxes(o) -> list[Row]:
    """RoIAlign and NMS as a detector's evaluation asks for them, and the average precision of COCO's size."""
    import torchvision
    generator = torch.Generator().manual_seed(0)
    R = 50 if o.tiny else 1000
    corner, side = torch.rand(R, 2, generator=generator) * 600, torch.rand(R, 2, generator=generator) * 300 + 8
    rois = torch.cat([torch.zeros(R, 1), corner, corner + side], dim=1).to(DEVICE)
    features = torch.randn(1, 256, 64, 64, generator=generator).to(DEVICE)
    took = race(dict(
        ours=lambda i: lambda: dense.roi_align(features, rois, 7, 1 / 16, 2),
        peer=lambda i: lambda: torchvision.ops.roi_align(features, rois, 7, 1 / 16, 2, aligned=True)), o)
    rows = [row(f"RoIAlign, {R} boxes, 256 channels", "torchvision", ">= 0.5", over(took["peer"], took["ours"]))]
    n = 400 if o.tiny else 4000
    corner, side = torch.rand(n, 2, generator=generator) * 600, torch.rand(n, 2, generator=generator) * 200 + 8
    one, scores = torch.cat([corner, corner + side], dim=1).to(DEVICE), torch.rand(n, generator=generator).to(DEVICE)
    took = race(dict(ours=lambda i: lambda: dense.nms(one, scores, 0.7),
                     peer=lambda i: lambda: torchvision.ops.nms(one, scores, 0.7)), o)
    rows.append(row(f"NMS, {n} boxes", "torchvision", ">= 0.5", over(took["peer"], took["ours"])))

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    truth, found = detections(100 if o.tiny else 5000, 720 if o.tiny else 36_000)

    def theirs():
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = truth
            coco.createIndex()
            peer = COCOeval(coco, coco.loadRes([dict(record) for record in found]), "bbox")
            peer.evaluate(), peer.accumulate(), peer.summarize()
    took = race(dict(ours=lambda i: lambda: dense.coco_average_precision(truth, found),
                     peer=lambda i: theirs), o, min(o.rounds, 3))
    return rows + [row(f"COCO AP, {len(truth['images']):,} images, {len(truth['annotations']):,} boxes", "pycocotools",
                       ">= 1.0", over(took["peer"], took["ours"]), f"{statistics.median(took['ours']):.1f} s")]


def detections(n_images: int, n_boxes: int) -> tuple[dict, list[dict]]:
    """Boxes of 80 classes, and for each a detection off by some pixels and one that is wrong."""
    rng = np.random.default_rng(0)
    image, category = rng.integers(n_images, size=n_boxes) + 1, rng.integers(80, size=n_boxes) + 1
    box = np.concatenate([rng.uniform(0, 400, (n_boxes, 2)), rng.uniform(8, 200, (n_boxes, 2))], axis=1)
    truth = [dict(id=k + 1, image_id=int(image[k]), category_id=int(category[k]), bbox=box[k].tolist(), iscrowd=0,
                  area=float(box[k, 2] * box[k, 3])) for k in range(n_boxes)]
    near = np.abs(box + rng.normal(0, 8, box.shape)) + 1
    wrong = rng.permutation(box)
    found = [dict(image_id=int(image[k]), category_id=int(category[k]), bbox=b[k].tolist(), score=float(rng.random()))
             for b in (near, wrong) for k in range(n_boxes)]
    return dict(images=[dict(id=i + 1, width=640, height=640) for i in range(n_images)], annotations=truth,
                categories=[dict(id=i + 1) for i in range(80)], info={}), found


def scaling(o) -> list[Row]:
    """Pocket's step with its batch on each of two processes of one thread, against one process."""
    o = argparse.Namespace(**dict(vars(o), threads=1))
    one, two = [], []
    for _ in range(min(o.rounds, 3)):
        one.append(child("scaling", o=o, processes=1)["seconds"])
        two.append(child("scaling", o=o, processes=2)["seconds"])
    return [row("two processes on two cores", "twice one", ">= 0.90", over(one, two),
                f"{1000 * statistics.median(two):.0f} ms a step of 2 x 64")]


def scaling_child(o) -> dict:
    dist.init_process_group("gloo")
    net, images, captions = pocket_step()
    if dist.get_world_size() > 1:
        net.net = nn.parallel.DistributedDataParallel(net.core, broadcast_buffers=False, gradient_as_bucket_view=True)
    seconds = []
    for number in range(3 if o.tiny else 30):
        start = time.perf_counter()
        net.step(images, captions, number)
        seconds.append(time.perf_counter() - start)
    result = dict(seconds=statistics.median(seconds[1:])) if dist.get_rank() == 0 else {}
    del net
    gc.collect()                                                # before the group: see train.run
    dist.destroy_process_group()
    return result


ROWS = dict(step=step, memory=memory, contrast=contrast, loader=loader, tokenizer=tokens, pocket=pocket,
            compile=compiled, zeroshot=zeroshot, boxes=boxes, scaling=scaling)
CHILDREN = dict(memory=memory_child, contrast=contrast_child, scaling=scaling_child)


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("rows", nargs="*", help=f"which, default all: {', '.join(ROWS)}")
    cli.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process (default: %(default)s)")
    cli.add_argument("--rounds", type=int, default=5, help="turns of each contestant (default: %(default)s)")
    cli.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="default: %(default)s")
    cli.add_argument("--tiny", action="store_true", help="one block a tower and few samples: does it run?")
    cli.add_argument("--json", help="file for the rows")
    cli.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    o = cli.parse_args()
    if unknown := set(o.rows) - set(ROWS):
        cli.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    torch.set_num_threads(o.threads)
    if o.child:
        result = CHILDREN[o.child[0]](o, *o.child[1:])
        if result:
            print(json.dumps(result))
        return
    print(f"{platform.machine()}, {DEVICE.type}, {'bf16' if BF16 else 'fp32'}, {o.threads} threads of "
          f"{os.cpu_count()} cores, torch {torch.__version__}, {o.rounds} rounds, {o.clock} time"
          f"{', TINY: ratios mean nothing' if o.tiny else ''}")
    print(f"{'what':36}{'against':26}{'ratio':>8}{'lowest':>9}{'highest':>9}   {'aim':9}")
    found = []
    for name in o.rows or ROWS:
        for r in ROWS[name](o):
            found.append(dict(asdict(r), row=name, reached=r.reached))
            print(f"{r.what:36}{r.against:26}{r.ratio:8.3g}{r.low:9.3g}{r.high:9.3g}   {r.aim:9}"
                  f"{'  ' if r.reached else '! '}{r.note}", flush=True)
    if o.json:
        Path(o.json).write_text(json.dumps(dict(options=vars(o), torch=str(torch.__version__), rows=found), indent=1))


if __name__ == "__main__":
    main()
