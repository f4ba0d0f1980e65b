"""The supplement's tables at pocket scale, on the embedded world: the tables and pictures of docs/reproduction.md.

    python tests/reproduce.py                   which tables there are, what of each is done, and what the rest costs
    python tests/reproduce.py ladder lambda     fills tables; stop it anywhere, the same command goes on
    python tests/reproduce.py all --quick       one seed, eight steps a run, into runs/reproduce-quick: does it run?
                                                (a quarter of an hour on two cores)
    python tests/reproduce.py report            writes docs/reproduction.md and .png anew from the numbers there are
    python tests/reproduce.py full --yfcc "shards:yfcc15m/{00000..01499}.tar" --imagenet imagenet ...
                                                at full scale: the commands that fill supplement Tables 1 and 2 and are
                                                not done yet, and the tables of those that are; --run runs them

Every number is made by the commands a user has: train.py with a row's options, then an evaluation script.  Each is a
line of docs/reproduction.jsonl: run (the options of train.py), seed, evaluation, values, seconds, commit.  A network
stands in several tables and is trained once.  Seconds are of processor time, on one thread each, so that they mean the
same however many runs share the machine.  What another processor adds may be another run of the same seed: before, see
whether it repeats a number that is there, else fill a copy of the file from its beginning; and of a slower one add
"slower" to its lines, how many times as long a step of clip takes there, by which their seconds are divided.

The setting is the preset `pocket` itself, so that a row of a table is a command anyone can run.  Rows of one seed start
from the same weights in all that they share and see the same batches, so two methods are compared seed by seed: their
mean difference has a standard error of its own, smaller than that of either mean.

"equal seconds" are runs as long as those of `clip`: a method takes as many steps as the processor time of clip's pays
for, by the seconds a step that both took with equal steps, seed 0.
"""
import argparse
import functools
import itertools
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from conftest import ROOT

import train
from data import ShapesWorld, say
from model import PRESETS

CELLS, PAGE, PICTURE = (ROOT / "docs" / f"reproduction.{kind}" for kind in ("jsonl", "md", "png"))
FIGURE, RESULTS = ROOT / "docs" / "reproduction-words.png", ROOT / "docs" / "results.png"
PAIRS = 20_000
SEEDS, MANY = range(3), range(9)      # of most numbers, and of the ladder's
LATER = range(3, 9)                   # of its costly ones: the first three seeds' checkpoints were not kept
SCENES = f"runs/reproduce/labelled-{PAIRS // 2}"                # a folder, written before a run that wants it
TESTED = ["--eval-every", 0.5]        # epochs between the tests of a run that a curve is drawn of
QUICK_STEPS = 8


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high: 1, 2 or 5 times a power of ten apart, three to six of them."""
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    apart = max(power * m for m in (1, 2, 5) if power * m <= (high - low) / 3 * (1 + 1e-9))
    return [i * apart for i in range(math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9) + 1)]


def duration(seconds: float) -> str:
    """3725 -> '1:02:05'"""
    minutes, s = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}" if minutes >= 60 else f"{minutes}:{s:02}"


# ---------------------------------------------------------------------------------------------------------------------
# What is trained, and what is measured of it
# ---------------------------------------------------------------------------------------------------------------------

def setting(method: str, pairs: int = PAIRS, world: str = "", **changes) -> str:
    """A run: options of train.py; pairs, world: of the Shapes world, where they are not the preset's"""
    parts = [f"train={pairs}"] * (pairs != PAIRS) + [world] * bool(world)
    options = dict(method=method, **({"data": f"shapes:{','.join(parts)}"} if parts else {}), **changes)
    return shlex.join(part for name, value in options.items() for part in option(name, value))


def option(name: str, value) -> list[str]:
    """mask_ratio, 0.5 -> --mask-ratio 0.5;  causal, False -> --no-causal"""
    flag = name.replace("_", "-")
    return [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", f"{value}"]


def method_of(run: str) -> str:
    return shlex.split(run)[1]


@functools.lru_cache(maxsize=None)
def steps_of(run: str) -> int:
    o = train.parse_train_options(shlex.split(run))
    sizes = [re.search(r"(?:train=|labelled-)(\d+)", spec) for spec in o.data]
    return train.length_of(o, sum(int(size[1]) if size else PAIRS for size in sizes))[1]


def probe(by: str, scenes: int, *rest: str) -> tuple[list, list, dict]:
    """An evaluation: linear probing where `by` says what a class is (data.CLASSES)."""
    return (["eval_linear.py", "--data", f"shapes:objects=1-1,train={scenes},by={by}", *rest], ["--epochs", "5"],
            dict(top1=lambda j: j["results"]["checkpoint"]["top1"]))


UNTOLD = ("texture", "fineness", "tilt")          # captions name the first in one case of four, the others never
# evaluation -> its command, what it takes instead with --quick, and value -> where that stands in the JSON it writes
EVALUATIONS = {
    "zeroshot": (["eval_zeroshot.py", "--templates", "a {}"], [], dict(
        top1=lambda j: j["results"][0]["top1"],
        i2t=lambda j: j["results"][1]["image_to_text"]["1"], t2i=lambda j: j["results"][1]["text_to_image"]["1"])),
    "linear": probe("kind", 1000),
    "finetune": (["finetune.py", "--data", "shapes:objects=1-1,train=1000", "--epochs", "40", "--warmup-epochs", "4",
                  "--batch-size", "64", "--lr", "3e-3"], ["--epochs", "1"], dict(top1=lambda j: j["top1"])),
    "patterned": (["eval_zeroshot.py", "--data", "shapes:patterns=0"], [],
                  dict(top1=lambda j: j["results"][0]["top1"])),
    "patterns": probe("pattern", 1000),
    "patches": probe("pattern", 1000, "--feature", "mean"),
    **{by: probe(by, 4000, "--feature", "mean") for by in UNTOLD},
    "words": (["dense.py", "words"], ["--samples", "1"], dict(hit=lambda j: next(iter(j.values()))["hit"])),
    "maps": (["dense.py", "zeroshot", "--limit", "256"], ["--limit", "16"], dict(miou=lambda j: j["miou"])),
    "upernet": (["dense.py", "upernet", "--data", "shapes:objects=2-4,by=shape", "--steps", "600", "--limit", "256"],
                ["--steps", "10", "--limit", "8"], dict(miou=lambda j: j["miou"])),
    "detector": (["dense.py", "maskrcnn", "--epochs", "0.06", "--limit", "200"], ["--epochs", "0.002", "--limit", "8"],
                 dict(box=lambda j: j["box"]["AP"], mask=lambda j: j["mask"]["AP"])),
}


@dataclass
class Row:
    name: str                                   # as in the paper
    run: str
    paper: dict = field(default_factory=dict)   # heading -> what the paper reports, None where it does not
    group: str = ""                             # rows of a group are a line in the picture
    only: tuple[str, ...] = ()                  # the evaluations it takes part in, none: all of the table's
    base: str = ""                              # the run that it is compared with, seed by seed


@dataclass
class Table:
    title: str
    columns: dict                               # heading -> (evaluation, value)
    rows: list[Row]
    seeds: dict = field(default_factory=dict)   # evaluation -> its seeds, where they are not SEEDS

    def seeds_of(self, evaluation: str, given: int = 0) -> range:
        """The seeds of an evaluation; of these as many as the command gives, if it gives a number"""
        return self.seeds.get(evaluation, SEEDS)[:given or None]

    def shown_of(self, evaluation: str, given: int = 0) -> range:
        """The seeds whose numbers are shown: all there are, as a run may stand in several tables, or so many"""
        return self.seeds_of(evaluation, given) if given else MANY


ZEROSHOT, LINEAR = {"0-shot": ("zeroshot", "top1")}, {"linear": ("linear", "top1")}
FINE = {"fine-tuned": ("finetune", "top1")}
RETRIEVAL = {"I2T R@1": ("zeroshot", "i2t"), "T2I R@1": ("zeroshot", "t2i")}
CHEAP = {**ZEROSHOT, **LINEAR, **RETRIEVAL}
DENSE = {"UperNet mIoU": ("upernet", "miou"), "box AP": ("detector", "box"), "mask AP": ("detector", "mask")}
WORDS = {"map mIoU": ("maps", "miou"), "pointing": ("words", "hit")}
LADDER = {"clip": "CLIP", "clip+mae": "+ MAE", "clip+feature": "+ feature target", "clip+ema": "+ EMA teacher",
          "maskclip": "+ MLM = MaskCLIP"}
SYSTEMS = {"clip": "CLIP", "slip": "SLIP", "filip": "FILIP", "declip": "DeCLIP", "defilip": "DeFILIP",
           "unicl": "UniCL", "maskclip": "MaskCLIP"}


def reported(columns: list[str], numbers: dict) -> dict[object, dict]:
    """row -> {heading: what the paper reports, None where it does not}"""
    return {row: dict(zip(columns, some)) for row, some in numbers.items()}


# supplement Table 1 and Table 2 (its first row and linear probing are the main text's and SLIP's)
TABLE_1 = {preset: reported([*ZEROSHOT, *LINEAR, *FINE], half) for preset, half in {
    "vit-b32-yfcc15m": {"clip": (26.1, 60.5, 74.3), "defilip": (36.4, None, None), "maskclip": (38.5, 69.1, 79.2)},
    "vit-b16-cc3m": {"clip": (17.1, 53.3, 78.5), "slip": (23.0, 65.4, 81.4), "maskclip": (24.4, 66.1, 82.5)}}.items()}
TABLE_2 = reported([*ZEROSHOT, *LINEAR, *FINE, *DENSE, *RETRIEVAL], {
    "clip": (37.6, 66.5, 80.5, None, None, None, 52.9, 32.8),
    "clip+mae": (42.1, None, 83.2, 49.1, 44.5, 40.4, 57.3, 41.1),
    "clip+feature": (42.6, None, 83.4, 49.9, 45.1, 40.6, 62.3, 41.4),
    "clip+ema": (42.8, None, 83.6, 50.4, 45.5, 40.9, 65.0, 41.6),
    "maskclip": (44.5, 73.7, 83.6, 50.5, 45.4, 40.9, 70.1, 45.6)})
# its text, of ViT-B/16 on YFCC15M; Flickr30K's retrieval
LAMBDA = reported([*ZEROSHOT, *LINEAR], {1: (38.5, 68.2), 0.1: (44.4, 73.5), 0.05: (44.5, 73.7), 0.01: (43.6, 73.0)})
BETA = reported([*ZEROSHOT, *RETRIEVAL], {1: (36.5, 51.7, 32.1), 0.1: (44.3, 69.2, 45.9), 0.05: (44.5, 70.1, 45.6),
                                          0.01: (43.2, 70.6, 45.6)})


def both_halves(method: str) -> dict:
    """Of Table 1, for a row that stands for both: {"0-shot": "26.1 / 17.1", ...} of what one half has a number of"""
    halves = [half.get(method, {}) for half in TABLE_1.values()]
    return {heading: " / ".join(f"{half.get(heading) or '-'}" for half in halves)
            for heading in halves[0] | halves[1] if any(half.get(heading) for half in halves)}


def tables(cells: dict) -> dict[str, Table]:
    """All of them.  Rows of equal seconds are there as soon as the seconds of equal steps are known."""
    def compared(names: dict, paper: dict) -> list[Row]:
        clip = system("clip")
        rows = [Row(names[m], system(m), paper.get(m, {}), "equal steps", base=clip * (m != "clip")) for m in names]
        base = cells.get((clip, 0, "train"))
        for m in names:
            own = cells.get((system(m), 0, "train"))
            if base and own and m != "clip":
                paid = round(steps_of(system(m)) * base["seconds"] / own["seconds"])
                rows.append(Row(names[m], f"{system(m)} --steps {paid}", {}, "equal seconds", ("zeroshot", "linear"),
                                clip))
        return rows

    def sweep(option: str, values: list, paper: dict, methods=("maskclip",)) -> list[Row]:
        """Rows of one option; with several methods each is compared with clip, else with the preset's value."""
        default = getattr(PRESETS["pocket"], option)

        def run(method, value):
            return setting(method, **({} if value == default else {option: value}))
        return [Row(f"{value}", run(m, value), paper.get(value, {}), m if len(methods) > 1 else "",
                    base="" if m == "clip" or value == default and len(methods) == 1 else
                    run("clip", value) if len(methods) > 1 else run(m, default))
                for m in methods for value in values]
    both, half = ("clip", "maskclip"), dict(steps=steps_of(setting("clip", epochs=3)))
    return {
        "ladder": Table("Supplement Table 2: what each part adds", {**ZEROSHOT, **LINEAR, **FINE, **DENSE, **RETRIEVAL},
                        [Row(LADDER[m], system(m), TABLE_2[m], base=system("clip") * (m != "clip")) for m in LADDER],
                        dict(zeroshot=MANY, linear=MANY, finetune=LATER, upernet=LATER, detector=LATER)),
        "systems": Table("Supplement Table 1: MaskCLIP and the systems it is compared with (the paper's numbers: "
                         "ViT-B/32 on YFCC15M / ViT-B/16 on CC3M)", {**ZEROSHOT, **LINEAR, **FINE, **RETRIEVAL},
                         compared(SYSTEMS, {m: both_halves(m) for m in SYSTEMS})),
        "lambda": Table("Weight of the distillation, lambda of Eq. 8", CHEAP,
                        sweep("distillation_weight", list(LAMBDA), LAMBDA)),
        "beta": Table("Weight of masked language modelling, beta of Eq. 8", CHEAP,
                      sweep("mlm_weight", list(BETA), BETA)),
        "length": Table(f"How often each of {PAIRS:,} pairs is seen", CHEAP,
                        sweep("epochs", [1.5, 3, 6, 12], {}, both)),
        "pairs": Table("How many pairs there are, in runs of half the length", CHEAP,
                       [Row(f"{n:,}", setting(m, n, **length), {}, m, base=setting("clip", n, **length) * (m != "clip"))
                        for m in both for n, length in ((1250, half), (5000, half), (PAIRS, dict(epochs=3)))]),
        "pool": Table("What stands for the image", CHEAP, sweep("pool", ["cls", "mean", "max"], {}, both)),
        "figure": Table("Supplement Figures 2 and 3: where words are found", WORDS,
                        [Row(LADDER[m], system(m), base=system("clip") * (m != "clip")) for m in LADDER],
                        dict(maps=MANY, words=MANY)),
        "momentum": Table("Momentum of the teacher, from the first step to the last", CHEAP,
                          [Row(name, averaged(m, *ends), {}, m, base=system(m) * (averaged(m, *ends) != system(m)))
                           for m in ("clip+ema", "maskclip") for name, ends in MOMENTA.items()]),
        "patterns": Table("How often captions name the patterns of objects",
                          {"0-shot": ("patterned", "top1"), "patterns, linear": ("patterns", "top1"),
                           "of the patches": ("patches", "top1")},
                          [Row(LADDER[m], setting(m, world=f"patterns={p}"), {}, name,
                               base=setting("clip", world=f"patterns={p}") * (m != "clip"))
                           for p, name in ((0, "never"), (0.1, "one in ten"), (1, "always"))
                           for m in ("clip", "clip+mae", "clip+ema", "maskclip")] +
                          [Row("+ MAE, lambda = 1", setting("clip+mae", world="patterns=0", distillation_weight=1), {},
                               "never", base=setting("clip", world="patterns=0")),
                           Row("not trained", setting("clip", world="patterns=0", steps=1, lr=0), {}, "never",
                               base=setting("clip", world="patterns=0"))]),
        "untold": Table("What captions seldom or never say: linear probes of the patches' mean",
                        {**ZEROSHOT, **{by: (by, "top1") for by in UNTOLD}},
                        [Row(LADDER[m], system(m), base=system("clip") * (m != "clip")) for m in LADDER] +
                        [Row(f"MaskCLIP, lambda = {weight}", setting("maskclip", distillation_weight=weight),
                             base=system("clip")) for weight in (0.1, 1)] +
                        [Row(f"{SYSTEMS[m]}, 12 epochs", setting(m, epochs=12),
                             base=setting("clip", epochs=12) * (m != "clip")) for m in both] +
                        [Row(f"{SYSTEMS[m]}, pooled by maximum", setting(m, pool="max"),
                             base=setting("clip", pool="max") * (m != "clip")) for m in both] +
                        [Row("MaskCLIP, beta = 1", setting("maskclip", mlm_weight=1), base=system("clip"))] +
                        [Row(SYSTEMS[m], system(m), base=system("clip"))
                         for m in ("slip", "filip", "declip", "defilip", "unicl")] +
                        [Row("SLIP, a tenth of its weight", setting("slip", simclr_weight=0.1), base=system("clip")),
                         Row("not trained", setting("clip", steps=1, lr=0), base=system("clip"))],
                        dict(zeroshot=MANY, **dict.fromkeys(UNTOLD, LATER))),
        "needs": Table("What the effect may need", CHEAP,
                       [Row(LADDER[m], setting(m, **changes), {}, name, base=setting("clip", **changes) * (m != "clip"))
                        for name, changes in NEEDS.items() for m in ("clip", "clip+ema", "maskclip")]),
    }


MOMENTA = {"0, the current weights": (0, 0), "0.9 to 0.99": (0.9, 0.99), "0.99 to 0.999, the preset's": (),
           "0.999 to 0.9999, the paper's": (0.999, 0.9999)}


def averaged(method: str, first: float | None = None, last: float = 0.0) -> str:
    """A run with another momentum of the teacher; without one clip+ema is clip+feature."""
    if first is None or (method, first) == ("clip+ema", 0):
        return system("clip+feature" if first == 0 else method)
    return setting(method, momentum=first, momentum_end=last)


# worlds and networks in which the masked branches might be worth more
NEEDS = {"as it is": {}, "half unsaid": dict(world="unsaid=0.5"), "patches of 6 px": dict(patch_size=6),
         "width 64": dict(width=64, heads=2), "mismatched": dict(world="mismatched=0.3")}


def system(method: str) -> str:
    """UniCL is CLIP whose data are half pairs, half labelled scenes of one object."""
    if method == "unicl":
        return setting("clip", pairs=PAIRS // 2) + f" --data folder:{SCENES}"
    return setting(method)


def write_labelled(folder: Path):
    """A folder a class, as UniCL wants its labels; whole or not there."""
    partial = folder.with_name(folder.name + ".tmp")
    world = ShapesWorld(split="train", count=PAIRS // 2, size=48, seed=1, objects=(1, 1))
    for i in range(len(world)):
        sample = world.read(i)
        path = partial / world.classes[sample.label] / f"{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sample.image.save(path)
    partial.rename(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Filling a table
# ---------------------------------------------------------------------------------------------------------------------

class Lab:
    """Runs what is not there yet and appends it to a file of cells."""

    def __init__(self, folder: Path, cells: Path, quick: bool, jobs: int, only: tuple[str, ...]):
        self.folder, self.path, self.quick, self.jobs, self.only = folder, cells, quick, jobs, only
        self.lock = threading.Lock()

    def call(self, *arguments) -> float:
        """Runs a script on one thread; seconds of processor time.  Its output is kept in a file."""
        log = self.folder / f"{threading.get_ident()}.log"
        with open(log, "w") as out:
            child = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=out,
                                     stderr=subprocess.STDOUT, env=dict(os.environ, OMP_NUM_THREADS="1"))
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{shlex.join(map(str, arguments))}\nended with {child.returncode}: "
                             f"{log.read_text()[-2000:]}")
        return usage.ru_utime + usage.ru_stime

    def record(self, **cell):
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True,
                                text=True).stdout
        with self.lock, open(self.path, "a") as file:
            file.write(json.dumps(dict(cell, commit=commit.strip() or "unknown")) + "\n")

    def train(self, run: str, seed: int, known: bool) -> Path:
        """The folder of a finished run: found, or trained from the start, so that its seconds are whole."""
        folder = self.folder / folder_name(run) / f"seed{seed}"
        if known and (folder / "last.pt").exists():
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        seconds = self.call("train.py", *shlex.split(run), *(["--steps", QUICK_STEPS] if self.quick else []),
                            *TESTED, "--seed", seed, "--device", "cpu", "--out", folder)
        if not known:
            log = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
            curve = [[line["step"] + 1, round(100 * line["zeroshot"], 2)] for line in log if "zeroshot" in line]
            self.record(run=run, seed=seed, evaluation="train", values=dict(curve=curve) if curve else {},
                        seconds=round(seconds, 1))
        return folder

    def evaluate(self, name: str, run: str, seed: int, folder: Path) -> dict:
        script, instead, values = EVALUATIONS[name]
        out, result = folder / name, folder / f"{name}.json"
        split = 2 if script[0] == "dense.py" else 1
        seconds = self.call(*script[:split], folder / "last.pt", *script[split:], *(instead if self.quick else []),
                            "--seed", seed, "--device", "cpu", "--out", out, "--json", result)
        shutil.rmtree(out, ignore_errors=True)
        found = json.loads(result.read_text())
        values = {value: round(100 * read(found), 2) for value, read in values.items()}
        self.record(run=run, seed=seed, evaluation=name, values=values, seconds=round(seconds, 1))
        return values

    def fill(self, names: list[str], seeds: int):
        """All cells of these tables, in two rounds where the second, of equal seconds, follows from the first."""
        while True:
            cells, missing = read_cells(self.path), {}          # a network -> its evaluations, each once
            every = tables(cells)
            for name in names:
                for key, evaluations in wanted(every[name], seeds, cells, self.only).items():
                    missing.setdefault(key, {}).update(dict.fromkeys(evaluations))
            if not missing:
                return
            if any(SCENES in run for run, _ in missing) and not (ROOT / SCENES).exists():
                write_labelled(ROOT / SCENES)                   # before two runs could want it at once
            started = time.monotonic()
            with ThreadPoolExecutor(self.jobs) as pool:
                def job(key):
                    run, seed = key
                    folder = self.train(run, seed, (run, seed, "train") in cells)
                    for evaluation in missing[key]:
                        values = self.evaluate(evaluation, run, seed, folder)
                        say(f"{run}, seed {seed}: " + ", ".join(f"{k} {v:.1f}" for k, v in values.items()))
                for i, _ in enumerate(pool.map(job, missing)):
                    spent = time.monotonic() - started
                    left = spent / (i + 1) * (len(missing) - i - 1)
                    say(f"{i + 1} of {len(missing)} networks, {duration(spent)} spent, {duration(left)} left")

    def figure(self):
        """The same words in the same pictures by MaskCLIP and by CLIP, seed 0."""
        cells = read_cells(self.path)
        ours, theirs = (self.train(setting(m), 0, (setting(m), 0, "train") in cells) for m in ("maskclip", "clip"))
        out = self.folder / "figure"
        self.call("dense.py", "words", ours / "last.pt", "--compare", theirs / "last.pt", "--out", out,
                  "--data", "shapes:objects=2-2", "--samples", 3)
        shutil.copy(out / "words.png", out / "quick.png" if self.quick else FIGURE)


def folder_name(run: str) -> str:
    return re.sub(r"[^a-z0-9.+=]+", "-", run.lower()).strip("-")


def read_cells(path: Path) -> dict:
    """(run, seed, evaluation) -> cell; its seconds are as of the first cells' processor"""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(line["run"], line["seed"], line["evaluation"]):
            dict(line, seconds=line["seconds"] / line.get("slower", 1)) for line in lines}


def wanted(table: Table, seeds: int, cells: dict, only: tuple[str, ...] = ()) -> dict[tuple, list[str]]:
    """(run, seed) -> evaluations of it that are missing, of those in `only` if it names any; whole seeds come first."""
    missing = {}
    every = {evaluation: table.seeds_of(evaluation, seeds) for evaluation, _ in table.columns.values()}
    for seed, row in itertools.product(sorted({seed for some in every.values() for seed in some}), table.rows):
        names = [name for name in every if (row.run, seed, name) not in cells and seed in every[name]
                 and (not row.only or name in row.only) and (not only or name in only)]
        if names:
            missing[row.run, seed] = names
    return missing


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------

MARK = "<!-- what follows is written by tests/reproduce.py -->\n"
CLAIMED = re.compile("(<!-- claims, written by tests/reproduce.py -->\n).*?(<!-- end of claims -->\n)", re.DOTALL)
# mean / standard error of so many seeds at which a difference is not 0 with p < 0.05: Student's t, two-sided
T_95 = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}


def values_of(run: str, column: tuple[str, str], seeds, cells: dict) -> dict[int, float]:
    """seed -> value, of the seeds there are"""
    evaluation, value = column
    return {seed: cells[run, seed, evaluation]["values"][value] for seed in seeds if (run, seed, evaluation) in cells}


def seed_by_seed(row: Row, column: tuple[str, str], seeds, cells: dict) -> list[float]:
    """What a row has more than the row it is compared with, of the seeds that both have"""
    own, base = (values_of(run, column, seeds, cells) for run in (row.run, row.base))
    return [own[seed] - base[seed] for seed in own if seed in base]


def compared_with(rows: list[Row]) -> str:
    """What the rows of a table are compared with, in words"""
    return "CLIP" if any(row.base and method_of(row.base) == "clip" for row in rows) else "the default"


def measured(table: Table, seeds: int, cells: dict) -> tuple[list[Row], dict]:
    """The rows of which there is some number, and the columns in which rows can be compared"""
    there = {(row.run, heading) for row in table.rows for heading, column in table.columns.items()
             if values_of(row.run, column, table.shown_of(column[0], seeds), cells)}
    return ([row for row in table.rows if any(run == row.run for run, _ in there)],
            {heading: column for heading, column in table.columns.items()
             if sum(name == heading for _, name in there) > 1})


def spread(values: list[float], of_mean: bool = False, sign: str = "") -> str:
    """mean +- standard deviation, or +- standard error of the mean"""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / (len(values) ** 0.5 if of_mean else 1):.1f}"


def verdict(each: list[float], sign: int) -> str:
    """Whether differences agree with a claim that they are positive (sign 1) or negative (-1), and their number."""
    if len(each) < 2 or not sign:
        return f"{len(each)} seed{'s' * (len(each) > 1)}"
    mean, error = sign * statistics.mean(each), statistics.stdev(each) / len(each) ** 0.5
    if len(each) in T_95 and abs(mean) > T_95[len(each)] * error:
        how = "**agrees**" if mean > 0 else "**does not**"
    else:
        how = "level" if abs(mean) < error else "leans to it" if mean > 0 else "leans against"
    return f"{how}, {len(each)} seeds"


def claims(cells: dict) -> str:
    """What the paper's tables claim of a row less another, and what the same difference is here."""
    m, columns = system, {**ZEROSHOT, **LINEAR, **FINE, **DENSE, **RETRIEVAL, **WORDS}
    said = [("MaskCLIP less CLIP: more", m("maskclip"), m("clip"), 1),
            ("CLIP+MAE less CLIP: more", m("clip+mae"), m("clip"), 1),
            ("CLIP+feature less CLIP: more", m("clip+feature"), m("clip"), 1),
            ("CLIP+EMA less CLIP: more", m("clip+ema"), m("clip"), 1),
            ("features less pixels (+MAE): more", m("clip+feature"), m("clip+mae"), 1),
            ("EMA teacher less current weights: more", m("clip+ema"), m("clip+feature"), 1),
            ("masked words less none (+EMA): more", m("maskclip"), m("clip+ema"), 1)]
    for name, option in (("lambda", "distillation_weight"), ("beta", "mlm_weight")):
        said += [(f"{name} = {value} less 0.05: {how}", setting("maskclip", **{option: value}), m("maskclip"), sign)
                 for value, how, sign in ((1, "less", -1), (0.1, "about equal", 0), (0.01, "less", -1))]
    lines = ["| the paper: | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for claim, run, base, sign in said:
        row, texts = Row(claim, run, base=base), []
        for column in columns.values():
            each = seed_by_seed(row, column, MANY, cells)
            texts.append(f"{spread(each, True, '+')} {verdict(each, sign)}" if each else "")
        if any(texts):
            lines.append(f"| {claim} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def markdown(table: Table, seeds: int, cells: dict, steps: int = 0, full: bool = False) -> str:
    """mean +- standard deviation over the seeds, and beside it what the paper reports at its scale; then, of rows that
    are compared with another, the mean difference, seed by seed, +- its standard error, and each seed's.

    steps: how many every run took, 0: as many as its options say.  full: at full scale, all rows whether they have a
    number yet or not."""
    rows, columns = (table.rows, table.columns) if full else measured(table, seeds, cells)
    groups = len({row.group for row in rows}) > 1
    head = ["", *([""] if groups else []), *columns, *([] if full else ["steps", "seconds"])]
    rule, differences = "|---" * len(head) + "|", []
    lines = [f"## {table.title}", "", "| " + " | ".join(head) + " |", rule]
    if table.columns == WORDS and FIGURE.exists():
        lines[1:1] = ["", f"![words in pictures, by MaskCLIP and by CLIP]({FIGURE.name})"]
    for row in rows:
        paper, name = row.paper, [row.name, *([row.group] if groups else [])]
        texts, apart = [], []
        for heading, column in columns.items():
            shown, wanted = table.shown_of(column[0], seeds), len(table.seeds_of(column[0], seeds))
            own = values_of(row.run, column, shown, cells)
            text = spread([*own.values()])
            if own and len(own) != wanted:
                text += f" ({len(own)} of {wanted})" if len(own) < wanted else f" ({len(own)} seeds)"
            texts.append((text + (f" *{paper[heading]}*" if paper.get(heading) is not None else "")).strip())
            each = seed_by_seed(row, column, shown, cells)
            apart.append(spread(each, True, "+") + (f" ({', '.join(f'{x:+.1f}' for x in each)})" if each else ""))
        trained = [cell["seconds"] for (run, _, name_), cell in cells.items() if (run, name_) == (row.run, "train")]
        if not full:
            texts += [f"{steps or steps_of(row.run)}", f"{statistics.mean(trained):.0f}" if trained else ""]
        lines.append("| " + " | ".join([*name, *texts]) + " |")
        if any(apart):
            differences.append("| " + " | ".join([*name, *apart]) + " |")
    if re.search(r"\(\d+ (of \d+|seeds)\)", "".join(lines)):
        lines += ["", "Means are of different seeds where a number of them stands beside: compare rows by the "
                  "differences alone."]
    if differences:
        lines += ["", f"Less {compared_with(rows)}, seed by seed:", "",
                  "| " + " | ".join(head[:len(name) + len(columns)]) + " |",
                  "|---" * (len(name) + len(columns)) + "|", *differences]
    return "\n".join(lines) + "\n"


@dataclass
class Panel:
    """Axes in a picture: names along x, numbers along y; `at` is the upper left corner"""
    sheet: PIL.Image.Image
    at: tuple[int, int]
    title: str
    low: float
    high: float
    size: tuple[int, int] = (420, 250)

    def __post_init__(self):
        (left, top), (width, height) = self.at, self.size
        self.box = left + 50, top + 40, left + width - 15, top + height - 35
        self.pen, self.font = PIL.ImageDraw.Draw(self.sheet), PIL.ImageFont.load_default(12)
        x0, y0, x1, y1 = self.box
        self.pen.text((x0, y0 - 6), self.title, "black", self.font, anchor="ls")
        for tick in ticks(self.low, self.high):
            self.pen.line([x0, self.y(tick), x1, self.y(tick)], "#e4e4e4")
            self.pen.text((x0 - 5, self.y(tick)), f"{tick:.6g}", "#444444", self.font, anchor="rm")
        self.pen.rectangle(self.box, outline="#888888")

    def y(self, value: float) -> float:
        return self.box[3] - (self.box[3] - self.box[1]) * (value - self.low) / (self.high - self.low)

    def x(self, share: float, text: str = "", line: int = 0) -> float:
        """A place along x in 0..1, with a text below it"""
        place = self.box[0] + (self.box[2] - self.box[0]) * share
        self.pen.text((place, self.box[3] + 4 + 13 * line), text, "#444444", self.font, anchor="mt")
        return place

    def dots(self, x: float, values: list[float], color: str):
        """Each value in gray over their mean in color"""
        for value, radius, fill in [(statistics.mean(values), 5, color), *((value, 3, "#b8b8b8") for value in values)]:
            y = self.y(value)
            self.pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)

    def key(self, line: int, text: str, color: str):
        self.pen.text((self.box[2], self.box[1] - 6 - 14 * line), text, color, self.font, anchor="rs")


COLORS = ("#1f5fbf", "#c8501e")
SHOWN, PANELS = ("ladder", "lambda", "length", "pool"), ("0-shot", "box AP", "linear")


def draw(shown: list[Table], seeds: int, cells: dict) -> PIL.Image.Image:
    """A line of two panels a table, the first two of PANELS that it has: gray dots are the differences of its rows and
    what they are compared with, seed by seed, colored ones their means, joined where rows are a scale."""
    sheet = PIL.Image.new("RGB", (840, 275 * len(shown)), "white")
    for r, table in enumerate(shown):
        rows, columns = measured(table, seeds, cells)
        what = compared_with(rows)
        rows = [row for row in rows if row.base or what == "the default"]       # the default itself stands at 0
        PIL.ImageDraw.Draw(sheet).text((10, 275 * r + 4), table.title, "black", PIL.ImageFont.load_default(15))
        names, groups = list(dict.fromkeys(row.name for row in rows)), list(dict.fromkeys(row.group for row in rows))
        for c, heading in enumerate([heading for heading in PANELS if heading in columns][:2]):
            column = columns[heading]
            some = table.shown_of(column[0], seeds)
            points = [(row, seed_by_seed(row, column, some, cells) if row.base else [0.0]) for row in rows]
            every = [0.0, *(value for _, own in points for value in own)]
            margin = 0.1 * (max(every) - min(every)) + 0.5
            panel = Panel(sheet, (420 * c, 275 * r + 20), f"{heading} less that of {what}, points", min(every) - margin,
                          max(every) + margin)
            panel.pen.line([panel.box[0], panel.y(0), panel.box[2], panel.y(0)], "#888888")
            place = {name: panel.x((k + 0.5) / len(names), name.removeprefix("+ ").split(" = ")[-1],
                                   k % 2 if len(names) > 4 else 0) for k, name in enumerate(names)}
            for g, group in enumerate(groups):
                of_group = [(place[row.name], own) for row, own in points if own and row.group == group]
                if names[0].replace(".", "").isdigit():
                    panel.pen.line([(x, panel.y(statistics.mean(own))) for x, own in of_group], COLORS[g], 2)
                for x, own in of_group:
                    panel.dots(x, own, COLORS[g])
                panel.key(g, group, COLORS[g])
    return sheet


SEEN = {"not trained": setting("clip", steps=1, lr=0), "clip": setting("clip"), "maskclip": setting("maskclip"),
        "lambda = 1": setting("maskclip", distillation_weight=1), "slip": setting("slip")}


def draw_results(cells: dict) -> PIL.Image.Image | None:
    """Zero-shot accuracy against steps of clip and maskclip, mean and range over the seeds that both have; below it how
    well the background's texture is told; beside them words in pictures by both."""
    runs = {method: setting(method) for method in ("clip", "maskclip")}
    seeds = [seed for seed in range(100) if all((run, seed, "train") in cells and cells[run, seed, "train"]["values"]
                                                for run in runs.values())]
    if not seeds:
        return None
    curves = {method: [cells[run, seed, "train"]["values"]["curve"] for seed in seeds] for method, run in runs.items()}
    words = PIL.Image.open(FIGURE).convert("RGB") if FIGURE.exists() else PIL.Image.new("RGB", (1, 1), "white")
    height = 460
    words = words.resize((round(words.width * height / words.height), height), PIL.Image.Resampling.LANCZOS)
    sheet = PIL.Image.new("RGB", (520 + words.width, height), "white")
    sheet.paste(words, (520, 0))
    steps = [step for step, _ in curves["clip"][0]]
    high = max(value for some in curves.values() for curve in some for _, value in curve)
    panel = Panel(sheet, (0, 0), f"zero-shot accuracy, %, {len(seeds)} seeds", 0, 1.05 * high, (510, height - 200))
    for k, (method, some) in enumerate(curves.items()):
        at = [panel.x(step / steps[-1]) for step in steps]
        values = [[curve[i][1] for curve in some] for i in range(len(steps))]
        low, mean, top = ([panel.y(f(v)) for v in values] for f in (min, statistics.mean, max))
        shade = PIL.Image.new("L", sheet.size)
        PIL.ImageDraw.Draw(shade).polygon([*zip(at, low), *reversed([*zip(at, top)])], fill=50)
        sheet.paste(COLORS[k], mask=shade)
        panel.pen.line([*zip(at, mean)], COLORS[k], 3)
        panel.key(k, method, COLORS[k])
    for step in ticks(0, steps[-1]):
        panel.x(step / steps[-1], f"{step:.0f}")
    panel = Panel(sheet, (0, height - 200), "the background's texture, which captions seldom name: linear probe, %", 0,
                  110, (510, 200))
    for k, (name, run) in enumerate(SEEN.items()):
        x = panel.x((k + 0.5) / len(SEEN), name)
        if told := list(values_of(run, ("texture", "top1"), MANY, cells).values()):
            panel.dots(x, told, COLORS[0])
            panel.pen.text((x + 9, panel.y(statistics.mean(told))), f"{statistics.mean(told):.0f}", "black", panel.font,
                           anchor="lm")
    return sheet


def report(seeds: int, cells: dict):
    """The page's tables and its pictures; what stands above the mark in the page is left as it is.  A table is shown as
    soon as it has rows to compare and a number that none before it has."""
    shown, seen = {}, set()
    for name, table in tables(cells).items():
        rows, columns = measured(table, seeds, cells)
        numbers = {(row.run, column) for row in rows for column in columns.values()}
        if len({row.name for row in rows}) > 1 and not numbers <= seen:
            shown[name] = table
        seen |= numbers
    above = PAGE.read_text().split(MARK)[0] if PAGE.exists() else "# The paper on a laptop\n\n"
    above = CLAIMED.sub(lambda marks: f"{marks[1]}\n{claims(cells)}\n{marks[2]}", above)
    hours = sum(cell["seconds"] for cell in cells.values()) / 3600
    written = [f"All numbers below took {hours:.1f} hours of one core.\n",
               f"![differences from CLIP or the default, of each seed and their means]({PICTURE.name})\n",
               *(markdown(table, seeds, cells) for table in shown.values())]
    PAGE.write_text(above + MARK + "\n" + "\n".join(written))
    if drawn := [table for name, table in shown.items() if name in SHOWN]:
        draw(drawn, seeds, cells).save(PICTURE)
    if results := draw_results(cells):
        results.save(RESULTS)
    say(f"{PAGE.relative_to(ROOT)}, {PICTURE.relative_to(ROOT)}: {len(shown)} tables of {len(cells)} cells")


def overview(seeds: int, cells: dict):
    """What is there, and the hours of one core that the rest takes, by what the same things have cost so far."""
    cost = {}                                   # of an evaluation, and of a step of a method
    for (run, _, evaluation), cell in cells.items():
        name, count = (method_of(run), steps_of(run)) if evaluation == "train" else (evaluation, 1)
        seconds, times = cost.get(name, (0, 0))
        cost[name] = seconds + cell["seconds"], times + count
    cost = {name: seconds / times for name, (seconds, times) in cost.items()}
    for name, table in tables(cells).items():
        missing, all_cells = wanted(table, seeds, cells), wanted(table, seeds, {})
        seconds = sum(cost.get(e, 0) for names in missing.values() for e in names) + sum(
            cost.get(method_of(run), cost.get("maskclip", 0)) * steps_of(run) for run, seed in missing
            if (run, seed, "train") not in cells)
        total, left = sum(map(len, all_cells.values())), sum(map(len, missing.values()))
        unknown = {e for names in missing.values() for e in names} - cost.keys()    # never run yet
        hours = ">" * bool(unknown) + f"{seconds / 3600:.1f}"
        say(f"{name:14}{total - left:4} of {total:3} numbers   {hours:>5} hours "
            f"of one core left   {table.title.split(' (')[0]}")


# ---------------------------------------------------------------------------------------------------------------------
# Tables 1 and 2 at full scale
# ---------------------------------------------------------------------------------------------------------------------

# evaluation -> its command; {WORD} is an option of this script
FULL = {
    "zeroshot": "eval_zeroshot.py CHECKPOINT --data folder:{imagenet} --classes {classes}",
    "linear": "eval_linear.py CHECKPOINT --data folder:{imagenet} --augment",
    "finetune": "finetune.py CHECKPOINT --data folder:{imagenet}",
    "upernet": "dense.py upernet CHECKPOINT --data ade20k:{ade20k}",
    "detector": "dense.py maskrcnn CHECKPOINT --data coco:{coco}",
    "retrieval": "eval_zeroshot.py CHECKPOINT --data flickr30k:{flickr30k}",
    "maps": "dense.py zeroshot CHECKPOINT --data ade20k:{ade20k}",
}
FULL_VALUES = {name: EVALUATIONS[name][2] for name in ("linear", "finetune", "upernet", "detector", "maps")} | {
    "zeroshot": dict(top1=EVALUATIONS["zeroshot"][2]["top1"]),
    "retrieval": dict(i2t=lambda j: j["results"][0]["image_to_text"]["1"],
                      t2i=lambda j: j["results"][0]["text_to_image"]["1"])}
FULL_DATA = {"yfcc": "YFCC15M, a SPEC of train.py", "cc3m": "CC3M, a SPEC", "bpe": "CLIP's merges file",
             "imagenet": "folder of ImageNet-1K", "classes": "file with its class names",
             "flickr30k": "folder of Flickr30K", "ade20k": "folder of ADE20K", "coco": "folder of COCO"}
# where the paper's number is SLIP's, of another setting than the preset's (SLIP's README and its commands)
SETTINGS = {("vit-b16-cc3m", "clip"): " --epochs 40 --lr 5e-4 --weight-decay 0.5",
            ("vit-b16-cc3m", "slip"): " --epochs 40", ("vit-b16-yfcc15m", "clip"): " --lr 5e-4 --weight-decay 0.5"}


def full_tables() -> list[Table]:
    def row(name: str, preset: str, method: str, paper: dict) -> Row:
        run = f"--method {method} --preset {preset}{SETTINGS.get((preset, method), '')}"
        return Row(name, run, paper, preset)
    rows = [row(SYSTEMS[method], preset, method, paper) for preset, half in TABLE_1.items()
            for method, paper in half.items()]
    ladder = [row(LADDER[method], "vit-b16-yfcc15m", method, paper) for method, paper in TABLE_2.items()]
    retrieval = {heading: ("retrieval", value) for heading, (_, value) in RETRIEVAL.items()}
    once = dict.fromkeys(FULL, range(1))
    return [Table("Supplement Table 1 at full scale", {**ZEROSHOT, **LINEAR, **FINE}, rows, once),
            Table("Supplement Table 2 at full scale, and segmentation without training",
                  {**ZEROSHOT, **LINEAR, **FINE, **DENSE, **retrieval, "map mIoU": ("maps", "miou")}, ladder,
                  once)]


def full_commands(table: Table, row: Row, o) -> dict[str, tuple[Path, str, list[str]]]:
    """What fills the row's cells of which the paper has a number, or that it has not at all, in order:
    name -> the file that it leaves, its command, the options of this script that it wants and does not have."""
    out, commands = o.out / folder_name(row.run), {}
    names = ["train", *(name for heading, (name, _) in table.columns.items()
                        if row.paper.get(heading, True) is not None)]
    pairs = "cc3m" if "cc3m" in row.run else "yfcc"
    for name in dict.fromkeys(names):
        if name == "train":
            file, template = out / "curves.png", f"train.py {row.run} --data {{{pairs}}} --bpe {{bpe}}"
            more = f" --out {quoted(out)} {o.train}".rstrip()
        else:
            file, template = out / f"{name}.json", FULL[name]
            more = f" --out {quoted(out / name)} --json {quoted(file)}"
        given = {word: quoted(getattr(o, word)) for word in re.findall(r"{(\w+)}", template)}
        command = template.format(**given).replace("CHECKPOINT", quoted(out / "last.pt"))
        unknown = [f"--{word}" for word in given if getattr(o, word) == word.upper()]
        commands[name] = file, f"{o.launch} {command}{more}", unknown
    return commands


def quoted(value) -> str:
    return shlex.quote(str(value))


def full_cells(table: Table, o) -> dict:
    """What finished evaluations have written, as read_cells has it"""
    cells = {}
    for row in table.rows:
        for name, (file, *_) in full_commands(table, row, o).items():
            if name != "train" and (ROOT / file).exists():
                found = json.loads((ROOT / file).read_text())
                values = {value: 100 * read(found) for value, read in FULL_VALUES[name].items()}
                cells[row.run, 0, name] = dict(values=values)
    return cells


def full(o):
    """Prints, or runs, what is not there yet; then the tables."""
    for table in full_tables():
        for row in table.rows:
            say(f"\n# {table.title}: {row.name}, {row.group}")
            for name, (file, command, unknown) in full_commands(table, row, o).items():
                if (ROOT / file).exists() or o.only and name not in ("train", *o.only):
                    continue
                say(command + (f"    # wants {', '.join(unknown)}" if unknown else ""))
                if o.run and not unknown and subprocess.run(shlex.split(command), cwd=ROOT).returncode:
                    sys.exit(f"stopped: the command above failed; the same command as before goes on")
    for table in full_tables():
        say("\n" + markdown(table, 0, full_cells(table, o), full=True))


def main(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("tables", nargs="*", help=f"{', '.join(tables({}))}, all, or report, or full; none: an overview")
    cli.add_argument("--quick", action="store_true", help="one seed and 8 steps a run, into runs/reproduce-quick")
    cli.add_argument("--seeds", type=int, default=0,
                     help="at most so many of each number (default: three, of most of the ladder nine)")
    cli.add_argument("--only", nargs="+", default=(), choices=tuple({**EVALUATIONS, **FULL}),
                     help="these evaluations now, others later")
    cli.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: %(default)s)")
    large = cli.add_argument_group("full", "what `full` takes besides --only")
    for name, text in FULL_DATA.items():
        large.add_argument(f"--{name}", default=name.upper(), help=text)
    large.add_argument("--launch", default="torchrun --nproc-per-node 8",
                       help="stands before each script (default: %(default)s)")
    large.add_argument("--train", default="", help="further options of train.py, as '--accumulate 4 --precision fp16'")
    large.add_argument("--out", type=Path, default=Path("runs/full"), help="where runs are (default: %(default)s)")
    large.add_argument("--run", action="store_true", help="run what has its data, one command after the other")
    o = cli.parse_args(argv)
    if o.tables == ["full"]:
        return full(o)
    if unknown := set(o.tables) - {*tables({}), "all", "report"}:
        cli.error(f"no table {', '.join(unknown)}; there are {', '.join(tables({}))}, all, report")
    seeds = 1 if o.quick else o.seeds
    folder = ROOT / "runs" / ("reproduce-quick" if o.quick else "reproduce")
    path = folder / "cells.jsonl" if o.quick else CELLS
    if not o.tables:
        return overview(seeds, read_cells(path))
    folder.mkdir(parents=True, exist_ok=True)
    lab = Lab(folder, path, o.quick, o.jobs, o.only)
    names = list(tables({})) if "all" in o.tables else [name for name in o.tables if name != "report"]
    try:
        lab.fill(names, seeds)
        if "figure" in names:
            lab.figure()
    except KeyboardInterrupt:                                   # of the scripts too, and the pool has waited for them
        sys.exit(f"stopped; what is done stands in {path}, the same command goes on")
    if o.quick:
        cells = read_cells(path)
        for name in names:
            print(markdown(tables(cells)[name], seeds, cells, QUICK_STEPS))
    else:
        report(seeds, read_cells(path))


if __name__ == "__main__":
    main()
