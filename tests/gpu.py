"""What only a GPU can say, in eight minutes: the same numbers as on the CPU, speed, memory, waits, whole runs.

    python tests/gpu.py --out DIR             on the GPU of this machine; DIR/gpu.json and DIR/gpu.md
    python tests/gpu.py --dry                 in miniature on the CPU: whether it runs
    python tests/gpu.py --only numbers waits  some parts

It needs requirements.txt alone; with open_clip and pytest (requirements-dev.txt) it times open_clip's model too.
Each part of PARTS runs in a process of its own and has a limit in seconds; what it has found when that is over counts,
and what stops it is a line of the table.  Files are written anew after each part, so an end too soon costs one part.
This is no test and pytest does not collect it.
"""
import argparse
import contextlib
import json
import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import dense
import model
import train
from model import METHODS, PRESETS, Config, preset_for

CPU, SIZE = torch.device("cpu"), 224


@dataclass
class Row:
    what: str
    value: str
    want: str = ""
    is_fine: bool | None = None         # None: nothing was wanted


@dataclass
class Setting:
    """What every part is told."""
    dry: bool
    folder: Path                        # for what parts write and hand on to later ones
    until: float                        # time.monotonic() at which the part is stopped

    @property
    def device(self) -> torch.device:
        return CPU if self.dry else torch.device("cuda", 0)

    @property
    def half(self) -> str:
        """The precision that --precision auto chooses on a GPU"""
        return "fp32" if self.dry else "bf16" if train.multiplies_bf16(self.device) else "fp16"

    def left(self) -> float:
        return self.until - time.monotonic()


# ---------------------------------------------------------------------------------------------------------------------
# What parts share
# ---------------------------------------------------------------------------------------------------------------------

class Training:
    """The step of train.train with a batch from memory."""

    def __init__(self, config: Config, device: torch.device, precision: str, compiled: bool = False):
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
        self.config, self.runtime = config, train.Runtime(0, 1, device, precision, 0)
        self.core = model.build(config, config.vocab_size - 1).train()
        self.core.to(device)
        has_teacher = METHODS[config.method]["predicts"] == "teacher"
        self.teacher = model.Teacher(self.core).to(device) if has_teacher else None
        self.net = torch.compile(self.core) if compiled else self.core
        self.optimizer = torch.optim.AdamW(train.param_groups(self.core, 0.1), lr=1e-5, fused=True)
        self.tokens = SimpleNamespace(sot=self.config.vocab_size - 2, eot=self.core.eot)

    def batch(self, B: int, seed: int = 0) -> dict[str, Tensor]:
        """Noise, and captions of full length, as the loader gives them"""
        c, generator = self.config, torch.Generator().manual_seed(seed)
        shape = B, 3, c.image_size, c.image_size
        batch = {name: torch.randint(256, shape, dtype=torch.uint8, generator=generator)
                 for name in ("images", "view1", "view2")}
        for name in ("tokens", "tokens2"):
            batch[name] = torch.randint(1, c.vocab_size - 2, (B, c.context_length), generator=generator)
            batch[name][:, 0], batch[name][:, -1] = c.vocab_size - 2, c.vocab_size - 1
        return batch if c.method in model.COMPARED else dict(images=batch["images"], tokens=batch["tokens"])

    def gradients(self, batch: dict, accumulate: int = 1, step: int = 0) -> tuple[dict, list]:
        """Forward and backward: the terms of the loss, and what the teacher said; gradients are in the weights"""
        batch = train.hide(batch, self.config, self.tokens, step, 0)
        parts = train.micro_batches(batch, accumulate, self.runtime.device)
        self.optimizer.zero_grad()
        if accumulate == 1:
            return train.backward(self.net, self.core, self.teacher, parts[0], self.runtime, step)
        return train.backward_in_parts(self.net, self.core, self.teacher, parts, self.runtime, step)

    def step(self, batch: dict, number: int = 0):
        terms, answers = self.gradients(batch, step=number)
        norm = train.clip_gradient(self.optimizer, self.config.clip_grad, self.runtime)
        torch.stack([*terms.values(), norm]).tolist()
        self.optimizer.step()
        self.core.after_update()
        if self.teacher:
            self.teacher.update(self.core, self.config.momentum)
            self.teacher.update_center(answers, self.config.center_momentum)


def milliseconds(run, s: Setting, warm: int = 3, rounds: int = 10) -> float:
    """The median of some rounds of run(number)"""
    took = []
    for number in range((1 if s.dry else warm) + (1 if s.dry else rounds)):
        wait_for_device(s)
        started = time.perf_counter()
        run(number)
        wait_for_device(s)
        took.append(1000 * (time.perf_counter() - started))
    return statistics.median(took[1 if s.dry else warm:])


def wait_for_device(s: Setting):
    if s.device.type == "cuda":
        torch.cuda.synchronize()


def vit_b16(s: Setting, method: str) -> Config:
    """The paper's model; when dry one block of each, at a small size"""
    config = preset_for("vit-b16-yfcc15m", method)
    return replace(config, image_size=32, width=96, text_width=64, depth=1, text_depth=1, text_decoder_depth=1,
                   context_length=16, n_codes=64, vocab_size=600) if s.dry else config


def matrix_peak(s: Setting) -> float:
    """FLOPs a second of a large matrix product, which is what a step is measured by"""
    n = 256 if s.dry else 8192
    a, b = torch.randn(2, n, n, device=s.device, dtype=torch.float32 if s.dry else torch.bfloat16)
    return 2 * n ** 3 / milliseconds(lambda number: a @ b, s) * 1000


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double().cpu() - want.double().cpu()).norm() / want.double().cpu().norm().clamp(min=1e-12)).item()


def at_most(what: str, value: float, limit: float) -> Row:
    return Row(what, f"{value:.1e}", f"<= {limit:g}", value <= limit)


def command(*arguments, s: Setting, **more) -> subprocess.CompletedProcess:
    """A script of the project as a user runs it; its last lines where it fails"""
    words = [sys.executable, *map(str, arguments), "--device", s.device.type]
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, timeout=max(1, s.left()), **more)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]}: exit {done.returncode}: {done.stderr.strip()[-400:]}")
    return done


def logged(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def write_shards(s: Setting) -> str:
    """Two tars of scenes of the Shapes world, enlarged to JPEGs of a photograph's size -> their --data"""
    spec = f"shards:{s.folder}/{{00000..00001}}.tar"
    world, count = data.ShapesWorld(split="train", count=512, size=96), 40 if s.dry else 2000
    scenes = []
    for i in range(16 if s.dry else 256):
        sample, content = world.read(i), BytesIO()
        sample.image.convert("RGB").resize((340, 256), PIL.Image.BICUBIC).save(content, "JPEG", quality=90)
        scenes.append((content.getvalue(), sample.captions[0].encode()))
    for tar in range(2):
        with tarfile.open(s.folder / f"{tar:05}.tar", "w") as file:
            for i in range(count):
                for ending, content in zip(("jpg", "txt"), scenes[(7 * i + tar) % len(scenes)]):
                    header = tarfile.TarInfo(f"{tar * count + i:09}.{ending}")
                    header.size = len(content)
                    file.addfile(header, BytesIO(content))
    return spec


# ---------------------------------------------------------------------------------------------------------------------
# The parts
# ---------------------------------------------------------------------------------------------------------------------

def machine(s: Setting) -> Iterator[Row]:
    """torch, the device, the cores"""
    yield Row("torch", torch.__version__ + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ""))
    yield Row("cores", str(len(os.sched_getaffinity(0))))
    if not s.dry:
        memory = torch.cuda.get_device_properties(0).total_memory
        yield Row("device", f"{torch.cuda.get_device_name(0)}, {memory / 1e9:.0f} GB, {s.half}")
    yield Row("matrix peak", f"{matrix_peak(s) / 1e12:.3g} TFLOP/s")


# share by which losses and gradients may differ from the CPU's.  Of half precision the losses that look for a best
# partner among many, or that stand near 0, as SimSiam's, differ more
ALLOWED = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 0.1, "fp16": 0.05}
HARD = {"slip", "filip", "declip", "defilip"}


def numbers(s: Setting) -> Iterator[Row]:
    """Losses and gradients of every method's step against the CPU's in fp32"""
    for method in ("clip", "maskclip", "defilip") if s.dry else METHODS:
        config = replace(preset_for("pocket", method), depth=2, drop_path=0.0)
        reference = Training(config, CPU, "fp32")
        batch, weights = reference.batch(16), reference.core.state_dict()
        terms, _ = reference.gradients(batch)
        wanted = {name: p.grad for name, p in reference.core.named_parameters() if p.grad is not None}
        for precision, accumulate in (("fp32", 1), ("tf32", 1), ("bf16", 1), ("fp16", 1), ("fp32", 2)):
            if s.dry and precision in ("tf32", "fp16"):
                continue
            other = Training(config, s.device, precision)
            other.core.load_state_dict(weights)
            got, _ = other.gradients(batch, accumulate)
            scale = other.runtime.scaler.get_scale()                                            # 1 but for fp16
            grads = {name: p.grad / scale for name, p in other.core.named_parameters() if p.grad is not None}
            by_loss = max(abs(got[name].item() - x.item()) / max(abs(x.item()), 0.1) for name, x in terms.items())
            by_gradient = relative(*(torch.cat([x[name].flatten().cpu() for name in wanted]) for x in (grads, wanted)))
            limit = ALLOWED[precision] * (3 if method in HARD and precision in ("bf16", "fp16", "tf32") else 1)
            yield at_most(f"{method} {precision}" + " accumulate 2" * (accumulate > 1) + ": loss", by_loss, limit)
            yield at_most(f"{method} {precision}" + " accumulate 2" * (accumulate > 1) + ": gradient", by_gradient,
                          limit)


def operators(s: Setting) -> Iterator[Row]:
    """RoIAlign, NMS, pasted masks and the scores of zero-shot segmentation against the CPU's"""
    torch.set_float32_matmul_precision("high")
    generator = torch.Generator().manual_seed(0)
    corner, side = 500 * torch.rand(512, 2, generator=generator), 20 + 200 * torch.rand(512, 2, generator=generator)
    boxes, scores = torch.cat([corner, corner + side], dim=1), torch.rand(512, generator=generator)
    scores = (scores * 50).round()                                                               # with ties
    features = torch.randn(2, 8, 45, 45, generator=generator)
    rois = torch.cat([torch.arange(512)[:, None] % 2, boxes], dim=1)

    def align(device: torch.device) -> tuple[Tensor, Tensor]:
        x = features.to(device).requires_grad_()
        pooled = dense.roi_align(x, rois.to(device), 7, 1 / 16)
        pooled.sin().sum().backward()
        return pooled.detach(), x.grad
    for name, got, want in zip(("", ", gradient"), align(s.device), align(CPU)):
        yield at_most(f"RoIAlign{name}", relative(got, want), 1e-4)
    kept = [dense.nms(boxes.to(device), scores.to(device), 0.5).cpu() for device in (s.device, CPU)]
    yield Row("NMS of 512 boxes with ties", f"{len(kept[0])} kept", "as on the CPU", torch.equal(*kept))
    kept = [dense.suppress(boxes.view(4, 128, 4).to(device), scores.view(4, 128).to(device), 0.5).cpu()
            for device in (s.device, CPU)]
    yield Row("NMS in 4 sets of 128", f"{kept[0].sum()} kept", "as on the CPU", torch.equal(*kept))
    masks = torch.rand(9, 28, 28, generator=generator)
    pasted = [dense.paste_masks(masks.to(device), boxes[:9].to(device), (480, 640)).cpu() for device in (s.device, CPU)]
    yield at_most("pasted masks: share of pixels that differ", (pasted[0] != pasted[1]).double().mean().item(), 1e-4)

    core = Training(preset_for("pocket", "clip"), CPU, "fp32").core.eval()
    images, texts = torch.randn(4, 3, 48, 48, generator=generator), torch.randn(150, 128, generator=generator)
    texts = F.normalize(texts, dim=-1)
    with torch.no_grad():
        want = dense.patch_scores(core, texts, "code")(images)                                  # (4, 150, 48, 48)
        core, images, texts = core.to(s.device), images.to(s.device), texts.to(s.device)
        with train.Runtime(0, 1, s.device, s.half, 0).autocast():
            got = dense.patch_scores(core, texts, "code")(images)
    top = got.topk(2, dim=1).values
    yield Row("segmentation scores", str(got.dtype).removeprefix("torch."), "float32", got.dtype == torch.float32)
    yield at_most("segmentation: share of pixels of which two classes tie",
                  (top[:, 0] == top[:, 1]).double().mean().item(), 1e-3)
    yield Row("segmentation: share of pixels of another class than in fp32 on the CPU",
              f"{(got.argmax(1).cpu() != want.argmax(1)).double().mean().item():.1%}")


def steps(s: Setting, compiled: bool = False) -> Iterator[Row]:
    """Time and memory of clip's and maskclip's step of ViT-B/16 at 128 pairs, beside open_clip's"""
    B, peak = 4 if s.dry else 128, matrix_peak(s)
    for method in ("clip", "maskclip"):
        config = vit_b16(s, method)
        if not s.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        training, started = Training(config, s.device, s.half, compiled and not s.dry), time.perf_counter()
        took = milliseconds(partial(training.step, training.batch(B)), s)
        rate = B * model.costs(config)[-1].step_flops / took * 1000
        name = f"{method}, {B} pairs, {s.half}" + ", compiled" * compiled
        yield Row(f"{name}: step", f"{took:.1f} ms, {B / took * 1000:.0f} pairs/s")
        yield Row(f"{name}: useful FLOPs", f"{rate / 1e12:.3g} TFLOP/s, {rate / peak:.2f} of the matrix peak")
        if compiled:
            yield Row(f"{name}: until it was measured", f"{time.perf_counter() - started:.0f} s")
        elif not s.dry:
            planned = train.step_memory(config, B, model.costs(config, bf16=s.half == "bf16"), s.half == "bf16")
            ratio = torch.cuda.max_memory_allocated() / sum(planned.values())
            yield Row(f"{name}: memory", f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB, {ratio:.2f} of --plan's",
                      "0.75 to 1.25", 0.75 <= ratio <= 1.25)
        del training
    yield from open_clip_step(s, B, compiled)


def open_clip_step(s: Setting, B: int, compiled: bool) -> Iterator[Row]:
    try:
        import open_clip
    except ImportError:
        yield Row("open_clip", "not installed")
        return
    c = vit_b16(s, "clip")
    net = open_clip.CLIP(c.embed_dim, open_clip.CLIPVisionCfg(layers=c.depth, width=c.width, patch_size=c.patch_size,
                                                             image_size=c.image_size, head_width=c.width // c.heads),
                         open_clip.CLIPTextCfg(context_length=c.context_length, vocab_size=c.vocab_size,
                                               width=c.text_width, heads=c.text_heads, layers=c.text_depth))
    net, loss = net.to(s.device).train(), open_clip.ClipLoss()
    run = torch.compile(net) if compiled and not s.dry else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    images = torch.randn(B, 3, c.image_size, c.image_size)
    tokens = torch.randint(1, c.vocab_size, (B, c.context_length))
    runtime = train.Runtime(0, 1, s.device, s.half, 0)

    def step(number: int):
        optimizer.zero_grad()
        with runtime.autocast():
            total = loss(*run(images.to(s.device), tokens.to(s.device))[:3])
        total.backward()
        optimizer.step()
    took = milliseconds(step, s)
    yield Row(f"open_clip's CLIP, {B} pairs, {s.half}" + ", compiled" * compiled + ": step",
              f"{took:.1f} ms, {B / took * 1000:.0f} pairs/s")


def pretraining(s: Setting, out: str, *more) -> train.TrainOptions:
    """A run of the pocket preset for use in this process"""
    words = ["--out", s.folder / out, "--device", s.device.type, "--workers", 0, "--steps", 6, "--log-every", 99,
             "--batch-size", 16, "--data", "shapes:train=200", *more]
    return train.parse_train_options([str(word) for word in words])


def waits(s: Setting) -> Iterator[Row]:
    """Where the host waits for the device in a step of the real loops, as torch tells of it, by line"""
    for method, most in (("maskclip", 1), ("defilip", 1)):
        with mock.patch.object(train, "finish"):
            yield from waits_of(partial(train.train, pretraining(s, f"waits-{method}", "--method", method)), s,
                                method, most)
    checkpoint = s.folder / "waits-maskclip" / "last.pt"
    for name, most in (("upernet", 1), ("maskrcnn", 12)):
        words = [name, checkpoint, "--data", "shapes:objects=2-4,train=16,val=2", "--steps", 6, "--batch-size", 2,
                 "--log-every", 99, "--device", s.device.type, "--workers", 0, "--out", s.folder / f"waits-{name}"]
        yield from waits_of(partial(dense.main, [str(word) for word in words]), s, name, most)


def waits_of(run, s: Setting, name: str, most: int) -> Iterator[Row]:
    """Steps 3 and 4 of a run of six, which are warm and not logged"""
    found, readable, counted = Counter(), train.Guard.readable, (2, 3)

    def note(message, category, filename, lineno, *rest):
        frame = sys._getframe()
        while frame and Path(frame.f_code.co_filename).parent != ROOT:
            frame = frame.f_back
        if frame and "called a synchronizing" in str(message):         # not the note on what this mode is
            found[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"] += 1

    def marked(guard, batch, step):
        if not s.dry:
            torch.cuda.set_sync_debug_mode("warn" if step in counted else "default")
        return readable(guard, batch, step)
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("always")
        warnings.showwarning = note
        with mock.patch.object(train.Guard, "readable", marked):
            run()
    each = sum(found.values()) / len(counted)
    yield Row(f"{name}: waits of a step", f"{each:g}", f"<= {most}", each <= most)
    for line, count in found.most_common(12):
        yield Row(f"{name}: at {line}", f"{count / len(counted):g}")


def fine_tuning(s: Setting) -> Iterator[Row]:
    """Steps of Mask R-CNN and UperNet at the paper's size, two images each"""
    config, rng = vit_b16(s, "clip"), np.random.default_rng(0)
    config = replace(config, image_size=64, patch_size=16) if s.dry else config
    sides = (128, 192) if s.dry else (800, 1344)
    options = dense.MaskRCNNOptions(**(dense.POCKET_DETECTOR if s.dry else {}))
    detector = dense.MaskRCNN(model.image_tower(config), 80, options)
    items = []
    for _ in range(2):
        corner, extent = (rng.uniform(*span, (7, 2)) * sides[::-1] for span in ((0.1, 0.7), (0.05, 0.3)))
        boxes, masks = np.concatenate([corner, corner + extent], axis=1).astype(np.float32), np.zeros((7, *sides), bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int)):
            mask[y1:y2, x1:x2] = True
        items.append((boxes, rng.integers(0, 80, 7), masks))
    batch = dict(zip(("boxes", "labels", "masks"), map(list, zip(*items))), index=torch.arange(2),
                 images=list(rng.integers(256, size=(2, 3, *sides), dtype=np.uint8)))

    def detector_losses(net) -> dict[str, Tensor]:
        return dense.losses_of(net, batch, 0, s.device, options, detector.strides[3])
    took = milliseconds(step_of(detector, detector_losses, s), s, rounds=5)
    yield Row(f"Mask R-CNN: step of 2 images of {sides[0]}x{sides[1]}", f"{took:.0f} ms")

    side = 64 if s.dry else 512
    segmenter = dense.UperNet(model.image_tower(config), 150, *((48, 32) if s.dry else ()))
    images, labels = torch.randn(2, 3, side, side).to(s.device), torch.randint(150, (2, side, side)).to(s.device)

    def losses(net) -> dict[str, Tensor]:
        scores, auxiliary = net(images)
        return dict(scores=dense.pixel_cross_entropy(scores, labels),
                    auxiliary=dense.pixel_cross_entropy(auxiliary, labels))
    took = milliseconds(step_of(segmenter, losses, s), s, rounds=5)
    yield Row(f"UperNet: step of 2 crops of {side}", f"{took:.0f} ms")


def step_of(net: torch.nn.Module, losses, s: Setting):
    """A step of fine-tuning net by {name: loss}"""
    net, runtime = net.to(s.device).train(), train.Runtime(0, 1, s.device, s.half, 0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step(number: int):
        optimizer.zero_grad()
        with runtime.autocast():
            terms = losses(net)
        sum(terms.values()).backward()
        optimizer.step()
    return step


def loader(s: Setting) -> Iterator[Row]:
    """Images a second of the loader alone, on shards, with 1, 8 and 16 workers"""
    shards = data.open_data(write_shards(s), "train", "captions", size=SIZE, cache=s.folder / "index")
    o = train.parse_train_options(["--preset", "vit-b16-yfcc15m"])
    tokenizer, B = data.learn_tokenizer(shards, 600), 8 if s.dry else 128
    for workers in (1,) if s.dry else (1, 8, 16):
        count = 6 if s.dry else 8 + 8 * workers
        batches = data.train_loader(shards, train.PairTransform(o, shards), B, 0, range(count), workers=workers,
                                    collate=train.PairCollate(o, tokenizer))
        warm, started, images = 2 if s.dry else 2 * workers + 2, None, 0
        for i, batch in enumerate(batches):
            if i == warm:
                started = time.perf_counter()
            images += len(batch["images"]) * (i > warm)
        yield Row(f"loader alone, {workers} workers", f"{images / (time.perf_counter() - started):.0f} images/s")


def end_to_end(s: Setting) -> Iterator[Row]:
    """train.py as a user runs it, on the loader's shards: pairs a second, beside the step's own of part steps"""
    spec, out = f"shards:{s.folder}/{{00000..00001}}.tar", s.folder / "run"
    if not (s.folder / "00001.tar").exists():
        write_shards(s)
    size = ["--preset", "pocket", "--batch-size", 16, "--steps", 4, "--log-every", 2] if s.dry else \
        ["--preset", "vit-b16-yfcc15m", "--batch-size", 128, "--steps", 80, "--log-every", 20]
    command("train.py", "--data", spec, "--out", out, *size, s=s)
    rates = [line["samples_per_second"] for line in logged(out)]
    yield Row("train.py on shards", f"{rates[-1]:.0f} pairs/s, at first {rates[0]:.0f}")


def pocket(s: Setting) -> Iterator[Row]:
    """A shortened pocket run to its end, with a SIGTERM in the middle; then the command it recommends"""
    out, started = s.folder / "pocket", time.monotonic()
    size = ["--steps", 6, "--batch-size", 16, "--log-every", 1] if s.dry else ["--log-every", 50, "--steps", 600]
    words = [sys.executable, "train.py", *map(str, size), "--device", s.device.type, "--out", str(out)]
    first = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and s.left() > 0 and not ((out / "metrics.jsonl").exists() and logged(out)):
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    status = first.wait(timeout=max(1, s.left()))
    yield Row("exit after SIGTERM", str(status), "143, or 0: it had ended", status in (143, 0))
    done = command("train.py", *size, "--out", out, s=s)
    resumed = "going on from step" in done.stdout
    yield Row("the same command goes on", "yes" if resumed else "no", "yes", resumed or status == 0)
    yield Row("pocket, both parts", f"{time.monotonic() - started:.0f} s, loss {logged(out)[-1]['loss']:.3f}")
    command("eval_zeroshot.py", out / "last.pt", "--json", out / "zeroshot.json", s=s)
    top1 = json.loads((out / "zeroshot.json").read_text())["results"][0]["top1"]
    yield Row("pocket: zero-shot top-1", f"{top1:.1%}", "" if s.dry else ">= 10%", None if s.dry else top1 >= 0.1)


def effect(s: Setting) -> Iterator[Row]:
    """clip and maskclip from one start for equal steps, with what time is left: ViT-S/8 on 96 px scenes"""
    size = ["--image-size", 96, "--patch-size", 8, "--width", 384, "--depth", 12, "--heads", 6, "--text-width", 256,
            "--text-depth", 6, "--text-heads", 4, "--batch-size", 256, "--data", "shapes:train=200000"]
    tests, epochs = "shapes:objects=1-1,train=2000", 90
    if s.dry:
        size, count = ["--batch-size", 16, "--data", "shapes:train=400"], 4
        tests, epochs = "shapes:train=64,val=32", 2
    if not s.dry:
        probe = s.folder / "probe"
        command("train.py", *size, "--method", "maskclip", "--steps", 60, "--log-every", 30, "--out", probe, s=s)
        seconds = 256 / logged(probe)[-1]["samples_per_second"]
        count = max(60, int((s.left() - 60) / 2 / seconds * 0.85))         # clip's step is shorter: a reserve
    for method in ("clip", "maskclip"):
        out, started = s.folder / f"effect-{method}", time.monotonic()
        command("train.py", *size, "--method", method, "--steps", count, "--log-every", 50, "--out", out, s=s)
        took = time.monotonic() - started
        for script, more in (("eval_zeroshot.py", ["--task", "classes"]), ("eval_linear.py", ["--epochs", epochs])):
            command(script, out / "last.pt", "--data", tests, "--json", out / f"{script}.json", *more, s=s)
        zeroshot, linear = (json.loads((out / f"{script}.json").read_text())["results"]
                            for script in ("eval_zeroshot.py", "eval_linear.py"))
        yield Row(f"{method}: {count} steps, {took:.0f} s",
                  f"zero-shot {zeroshot[0]['top1']:.1%}, linear {linear['checkpoint']['top1']:.1%}")


# name: (function, seconds at most); the most important first
PARTS = {
    "machine": (machine, 30),
    "numbers": (numbers, 60),
    "operators": (operators, 20),
    "steps": (steps, 60),
    "waits": (waits, 40),
    "fine-tuning": (fine_tuning, 40),
    "loader": (loader, 50),
    "end to end": (end_to_end, 60),
    "pocket": (pocket, 120),
    "compiled": (partial(steps, compiled=True), 180),
    "effect": (effect, math.inf),
}


# ---------------------------------------------------------------------------------------------------------------------
# Parts in processes of their own
# ---------------------------------------------------------------------------------------------------------------------

def work(name: str, s: Setting, pipe):
    """One part, in a process group that can be ended with all it has started"""
    os.setsid()
    torch.set_num_threads(1 if s.dry else torch.get_num_threads())
    try:
        for row in PARTS[name][0](s):
            pipe.send(row)
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        pipe.send(Row("stopped", f"{type(error).__name__}: {lines[-1][:300]}", "no error", False))
    pipe.close()


def run_part(name: str, dry: bool, folder: Path, seconds: float) -> list[Row]:
    """The rows of a part, those before its time was over"""
    context = multiprocessing.get_context("fork")               # torch is there already; this process uses no device
    ours, theirs = context.Pipe(duplex=False)
    started = time.monotonic()
    process = context.Process(target=work, args=(name, Setting(dry, folder, started + seconds), theirs))
    process.start()
    theirs.close()
    rows = []
    try:
        while ours.poll(max(0.0, started + seconds - time.monotonic())):
            rows.append(ours.recv())
        rows.append(Row("stopped", f"its {seconds:.0f} s were over", "an end", False))
    except EOFError:                                            # its end
        process.join(timeout=5)
        if process.exitcode:
            rows.append(Row("stopped", f"exit {process.exitcode}", "exit 0", False))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    rows.append(Row("seconds", f"{time.monotonic() - started:.0f}"))
    return rows


def table(found: dict[str, list[Row]]) -> str:
    marks = {None: "", True: "yes", False: "**no**"}
    lines = ["| part | what | value | wanted | so |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {row.what} | {row.value} | {row.want} | {marks[row.is_fine]} |".replace("\n", " ")
              for name, rows in found.items() for row in rows]
    return "\n".join(lines) + "\n"


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--dry", action="store_true", help="in miniature on the CPU")
    cli.add_argument("--seconds", type=float, default=480, help="for all parts together")
    cli.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md; default: none")
    cli.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="these parts")
    o, end = cli.parse_args(), time.monotonic()
    end += o.seconds
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in o.only:
            seconds = min(PARTS[name][1], end - time.monotonic())
            found[name] = run_part(name, o.dry, Path(folder), seconds) if seconds > 5 else [
                Row("left out", "no time", "some", False)]
            lines = table({name: found[name]}).splitlines()
            print("\n".join(lines[2 if len(found) > 1 else 0:]), flush=True)
            if o.out:
                o.out.mkdir(parents=True, exist_ok=True)
                (o.out / "gpu.md").write_text(table(found))
                (o.out / "gpu.json").write_text(json.dumps(
                    {name: [asdict(row) for row in rows] for name, rows in found.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
