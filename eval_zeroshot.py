"""Zero-shot evaluation: what a pre-trained model knows without any further training.

    classes     An image belongs to the class whose embedding is nearest to its own.  That of a class is the mean of
                its prompts' ("a photo of a {}." around each of its names), each of unit length, scaled to unit length.
                Top-1, top-5, mean over classes, accuracy of each class, the most confused pairs       
    retrieval   Which caption belongs to an image, and which image to a caption: the share of queries of which a right
                answer is among the k nearest, k = 1, 5, 10.  An image may have several captions       
    icinw       20 data sets for classification, each with its own prompts and metric; their mean      

    python eval_zeroshot.py                                       runs/pocket/last.pt, unseen scenes of the Shapes world
    python eval_zeroshot.py CHECKPOINT --data folder:IMAGENET --classes imagenet_classes.txt       the paper's protocol
    python eval_zeroshot.py CHECKPOINT --data coco:DIR --data flickr30k:DIR                       Karpathy's test images
    python eval_zeroshot.py CHECKPOINT --data icinw:DIR

Ties: a query is right at k if fewer than k wrong answers score as high as its best right one, so a model that embeds
all alike has recall 0; of classes with equal scores the first is taken.  Scores are exact (see `exact`): ties are ties
in any chunk and on any number of processes.
Letters: I images, T texts, E embedding, C classes, Q queries, M candidates.
"""
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import data as data_module
from data import BytePairTokenizer, EvalTransform, UserError
from losses import similarity
from model import MaskCLIP, opt
from train import RunOptions, Runtime, extract, gather, load_checkpoint, parse, run, setup


@dataclass
class Options(RunOptions):
    checkpoint: str = opt("runs/pocket/last.pt", "what train.py wrote", "what")
    task: str = opt("auto", "auto: classes and retrieval for shapes, classes for folder, icinw for icinw, else "
                    "retrieval", "what", ("auto", "classes", "retrieval", "icinw"))
    templates: str = opt("auto", "7, 80, 85, a file with a template a line, or one template as 'a photo of a {}.'; "
                         "auto: 'a {}' for shapes, its own for icinw, else 7 (paper)", "what")
    classes: str = opt("", "file with a class a line in the data's order, tabs between several names of one; empty: "
                       "the data's own names", "what")
    split: str = opt("", "part of the data; empty: val for classes, test for retrieval", "what")
    caption_prefix: str = opt("", "put before each caption in retrieval, as 'a photo of ' (paper silent)", "what")
    squash: bool = opt(False, "squeeze images to a square; else their centre is cut out (paper silent)", "what")
    batch_size: int = opt(256, "images or texts at a time, over all processes", "run")
    json: str = opt("", "file for the results as one JSON object", "run")


# ---------------------------------------------------------------------------------------------------------------------
# Texts and classes, on any number of processes
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def encode_texts(model: MaskCLIP, tokenizer: BytePairTokenizer, texts: Sequence[str], runtime: Runtime,
                 batch_size: int) -> Tensor:
    """(T, E), or of FILIP (T, L, E).  A text that comes several times is encoded once, so its copies tie."""
    distinct = sorted(set(texts), key=lambda text: (len(text), text))           # those of one length share a batch
    mine, rows = distinct[runtime.rank::runtime.world], []
    firsts = range(0, len(mine), batch_size)
    for first in data_module.progress(firsts, len(firsts), "batches of texts", runtime.is_main):
        tokens = tokenizer(mine[first:first + batch_size], model.config.context_length)
        with runtime.autocast():
            rows.append(model.encode_text(tokens.to(runtime.device)).cpu())
    table = {text: row for their, rows in gather((mine, rows), runtime)
             for text, row in zip(their, itertools.chain.from_iterable(rows))}
    return pad_sequence([table[text] for text in texts], batch_first=True).to(runtime.device)   # FILIP's L differ


def embed_classes(model: MaskCLIP, tokenizer: BytePairTokenizer, classes: Sequence[str], templates: Sequence[str],
                  runtime: Runtime, batch_size: int) -> Tensor | list[Tensor]:
    """(C, E) unit length.  Several names of a class, divided by tabs, are averaged together with the templates.

    FILIP's words have no mean: of such a model a list of C (prompts, L, E), whose similarities are averaged.
    """
    prompts = [[template.format(name) for name in names.split("\t") for template in templates] for names in classes]
    embedded = encode_texts(model, tokenizer, [*itertools.chain(*prompts)], runtime, batch_size)   # (all prompts, E)
    each = embedded.split([*map(len, prompts)])
    return [*each] if embedded.ndim == 3 else F.normalize(torch.stack([rows.mean(dim=0) for rows in each]), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Scores, ranks and recall
# ---------------------------------------------------------------------------------------------------------------------

def exact(features: Tensor) -> Tensor:
    """Unit-length features as float64 multiples of 2**-24, which moves them no more than float32's own rounding.

    Products of two such numbers are multiples of 2**-48 and no partial sum of a dot product reaches 2: float64 holds
    all of these, nothing is rounded, and the sum is the same in whatever order it is taken.
    FILIP's tokens (n, tokens, E) are multiples of 2**-20, so that float64 holds a sum over 4096 of their cosines too.
    """
    features = features.cpu() if features.device.type == "mps" else features    # Apple's GPUs have no float64
    steps = 2 ** (20 if features.ndim == 3 else 24)
    return (features.double() * steps).round() / steps


def ranks(scores: Tensor, is_right: Tensor) -> Tensor:
    """(Q, M), (Q, M) bool -> (Q,) how many wrong candidates score at least as high as the best right one.

    Queries with no right candidate are left out.  nan counts against the query, wherever it stands.
    """
    best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)                      # (Q, 1)
    return (~(scores < best) & ~is_right).sum(dim=1)[is_right.any(dim=1)]


def hits(rank: Tensor, ks: Sequence[int]) -> Tensor:
    """(Q,) -> (1 + len(ks),) how many queries there are, and how many are right at each k"""
    return torch.stack([torch.ones_like(rank).sum(), *((rank < k).sum() for k in ks)])


def shares(counts: Tensor, ks: Sequence[int]) -> dict[int, float]:
    queries, *right = counts.tolist()
    return {k: n / queries for k, n in zip(ks, right)}


def recall_at_k(similarity: Tensor, image_of_text: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, dict]:
    """Recall from a whole matrix: {"image_to_text": {k: share of images}, "text_to_image": {k: share of texts}}.

    similarity (I, T); image_of_text (T,) the number of each text's image.  A query is right at k if fewer than k wrong
    candidates score at least as high as its best right one.  Images without a text are candidates but no queries.
    """
    is_pair = torch.arange(len(similarity), device=similarity.device)[:, None] == image_of_text     # (I, T)
    return dict(image_to_text=shares(hits(ranks(similarity, is_pair), ks), ks),
                text_to_image=shares(hits(ranks(similarity.T, is_pair.T), ks), ks))


SCORES = 1 << 23        # scores that exist at once, 64 MiB; all those of 30K images and 150K texts are 34 GiB


def recall_in_chunks(images: Tensor, texts: Tensor, image_of_text: Tensor, ks: Sequence[int] = (1, 5, 10),
                     runtime: Runtime | None = None) -> dict[str, dict]:
    """recall_at_k(similarity(images, texts), ...), a few rows or columns at a time, which processes share.

    images (I, E), texts (T, E), unit length, or FILIP's tokens (I, N, E), (T, L, E); image_of_text (T,)
    """
    images, texts = exact(images), exact(texts)
    image_of_text = image_of_text.to(images.device)
    number = torch.arange(len(images), device=images.device)                                        # (I,)

    def image_ranks(some):      # numbers of images
        return ranks(similarity(images[some], texts), number[some, None] == image_of_text)

    def text_ranks(some):       # numbers of texts
        return ranks(similarity(images, texts[some], text_queries=True).T, (number[:, None] == image_of_text[some]).T)

    recall, (rank, world) = {}, (runtime.rank, runtime.world) if runtime else (0, 1)
    for way, queries, candidates, chunk_ranks in (("image_to_text", len(images), len(texts), image_ranks),
                                                  ("text_to_image", len(texts), len(images), text_ranks)):
        chunks = torch.arange(queries, device=images.device).split(max(1, SCORES // candidates))[rank::world]
        counts = torch.zeros(1 + len(ks), dtype=torch.long, device=images.device)
        for some in data_module.progress(chunks, len(chunks), f"chunks, {way}", rank == 0):
            counts += hits(chunk_ranks(some), ks)
        if world > 1:
            counts = counts.to(runtime.device)
            dist.all_reduce(counts)
        recall[way] = shares(counts, ks)
    return recall


# ---------------------------------------------------------------------------------------------------------------------
# Metrics of classification
# ---------------------------------------------------------------------------------------------------------------------

def top_k(scores: Tensor, label: Tensor, k: int) -> float:
    """Share of the rows of (n, C) whose label (n,) is among the k highest scores; of equal ones the first is first."""
    label = label[:, None]
    own = scores.gather(1, label)                                                                   # (n, 1)
    is_before = (scores > own) | (scores == own) & (torch.arange(scores.shape[1], device=scores.device) < label)
    return (is_before.sum(dim=1) < k).double().mean().item()


def confusion(guess: Tensor, label: Tensor, classes: int) -> Tensor:
    """(n,), (n,) -> (C, C) counts: row label, column guess"""
    return torch.bincount(label * classes + guess, minlength=classes ** 2).reshape(classes, classes)


def class_accuracy(counts: Tensor) -> Tensor:
    """(C, C) from `confusion` -> (C,) accuracy of each class, nan for a class without images"""
    return counts.diag() / counts.sum(dim=1).double()


def average_precision_11(scores: Tensor, is_class: Tensor) -> float:
    """VOC2007's: the mean, over recalls 0, 0.1 ... 1, of the best precision at that recall or a higher one.

    scores (n,); is_class (n,) bool.  Equal scores pass a threshold together.  nan if no image is of the class.
    # suite's toolkit: precision 1 at recall 0, whatever the scores; here: the best that is reached, as VOC defines it
    """
    scores, order = scores.sort(descending=True)
    is_last = torch.cat([scores[1:] != scores[:-1], torch.ones_like(is_class[:1])])                # of its equals
    right = is_class[order].cumsum(dim=0)                                                           # true positives
    precision = (right / torch.arange(1, len(scores) + 1, device=scores.device).double())[is_last]
    right, total = right[is_last], right[-1]
    best = [precision[10 * right >= t * total].max() for t in range(11)]
    return torch.stack(best).mean().item() if total else torch.nan


def roc_auc(scores: Tensor, positive: Tensor) -> float:
    """Share of all (positive, negative) pairs in which the positive scores higher, equal ones counting half.

    scores (n,); positive (n,) bool.  nan if one of the two is missing.
    """
    negatives = scores[~positive].sort().values
    below = torch.searchsorted(negatives, scores[positive], right=False)
    not_above = torch.searchsorted(negatives, scores[positive], right=True)
    return ((below + not_above).double().mean() / (2 * len(negatives))).item() if len(negatives) else torch.nan


def suite_score(metric: str, cosines: Tensor, label: Tensor, is_class: Tensor | None = None) -> float:
    """By a metric of the ICinW suite.  cosines (n, C); label (n,), or for 11-point mAP is_class (n, C) bool"""
    scores = (100 * cosines).softmax(dim=1)             # over classes: this changes how images rank within a class
    if metric == "11-point mAP":
        each = [average_precision_11(*pair) for pair in zip(scores.T, is_class.T)]
        return torch.tensor(each, dtype=torch.float64).nanmean().item()
    if metric == "ROC AUC":
        return roc_auc(scores[:, 1], label == 1)
    if metric == "mean per class":
        return class_accuracy(confusion(cosines.argmax(dim=1), label, cosines.shape[1])).nanmean().item()
    return top_k(cosines, label, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The three tasks
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Job:
    """What is evaluated, how and where."""
    options: Options
    runtime: Runtime
    model: MaskCLIP
    tokenizer: BytePairTokenizer

    def open(self, spec: str, task: str):
        """The data set; of the Shapes world, scenes with one object for classes, with several for retrieval."""
        if spec.partition(":")[0] == "shapes":
            scenes = {"classes": "objects=1-1,val=1024", "retrieval": "objects=2-4,val=1000"}[task]
            spec = f"shapes:{scenes},{spec.partition(':')[2]}"
        split = self.options.split or {"classes": "val", "retrieval": "test"}[task]
        cache = Path(self.options.out or Path(self.options.checkpoint).parent) / "index"
        return data_module.open_data(spec, split, task, size=self.model.config.image_size, cache=cache)

    def images(self, data, squash: bool) -> dict:
        """What `extract` returns, with features (n, E)"""
        transform = EvalTransform(self.model.config.image_size, squash=squash)
        return extract(data, transform, self.model.encode_image, self.runtime, self.options.batch_size)

    def texts(self, texts: Sequence[str]) -> Tensor:
        return encode_texts(self.model, self.tokenizer, texts, self.runtime, self.options.batch_size)

    def class_scores(self, data, classes: Sequence[str], templates: Sequence[str], squash: bool) -> tuple[Tensor, dict]:
        """(n, C) cosines of the readable images, or FILIP's scores, and what `extract` returned"""
        embedded = embed_classes(self.model, self.tokenizer, classes, templates, self.runtime, self.options.batch_size)
        found = self.images(data, squash)
        if isinstance(embedded, list):
            chunks = map(exact, found["features"].split(1024))
            scores = torch.cat([torch.stack([similarity(images, exact(prompts)).mean(dim=1) for prompts in embedded],
                                            dim=1) for images in chunks])
        else:
            scores = similarity(exact(found["features"]), exact(embedded))
        return scores.cpu(), found

    def say(self, line: str):
        if self.runtime.is_main:
            print(line, flush=True)


def classify(job: Job, spec: str) -> dict:
    """Zero-shot classification: prints and returns

    images, classes, templates   how many of them            bad, unlabelled   records left out
    classes_hash, templates_hash   the same for the same names and templates, see data.fingerprint
    top1, top5, mean_per_class   shares of images; color, shape besides on the Shapes world
    per_class                    [{"class", "images", "accuracy" (None without images)}, ...]
    confused                     [{"class", "taken_for", "images"}, ...], ten at most, the most frequent first
    """
    o, data = job.options, job.open(spec, "classes")
    if not o.classes:
        data_module.want_names(data, spec)
    classes = data_module.read_lines(o.classes, "class names") if o.classes else data.classes
    if len(data.classes) == 1:
        raise UserError(f"{spec} has one class, {data.classes[0]}, and nothing to tell it from: wanted a folder for "
                        f"each, DIR/CLASS/*.jpg, or DIR/val/CLASS/*.jpg")
    if len(classes) != len(data.classes):
        raise UserError(f"{o.classes} has {len(classes)} lines, {spec} {len(data.classes)} classes: want as many")
    auto = "a {}" if spec.startswith("shapes") else "7"
    templates = data_module.find_templates(auto if o.templates == "auto" else o.templates)
    cosines, found = job.class_scores(data, classes, templates, o.squash)
    known = found["label"] >= 0
    cosines, label = cosines[known], found["label"][known]
    if not len(label):
        raise UserError(f"no image of {spec} has a class: choose other data, or --task retrieval")
    guess, names = cosines.argmax(dim=1), [name.split("\t")[0] for name in classes]
    counts = confusion(guess, label, len(classes))
    accuracy = class_accuracy(counts)
    wrong, pair = (counts - counts.diag().diag()).flatten().sort(descending=True, stable=True)
    result = dict(
        data=spec, task="classes", images=len(label), classes=len(classes), templates=len(templates),
        classes_hash=data_module.fingerprint(classes), templates_hash=data_module.fingerprint(templates),
        bad=len(found["bad"]), unlabelled=(~known).sum().item(),
        top1=top_k(cosines, label, 1), top5=top_k(cosines, label, 5), mean_per_class=accuracy.nanmean().item(),
        per_class=[{"class": name, "images": n, "accuracy": share if n else None}
                   for name, n, share in zip(names, counts.sum(dim=1).tolist(), accuracy.tolist())],
        confused=[{"class": names[i // len(names)], "taken_for": names[i % len(names)], "images": n}
                  for i, n in zip(pair[:10].tolist(), wrong[:10].tolist()) if n])
    if data.classes == data_module.ShapesWorld.classes:
        n = len(data_module.SHAPES)
        result["color"] = (guess // n == label // n).double().mean().item()
        result["shape"] = (guess % n == label % n).double().mean().item()

    job.say(f"\n{spec}: zero-shot classification of {len(label):,} images, {len(classes)} classes "
            f"({result['classes_hash']}), {len(templates)} template{'s' * (len(templates) > 1)} "
            f"({result['templates_hash']}){left_out(result)}")
    job.say("  " + "   ".join(f"{key.replace('_', ' ')} {result[key]:.1%}" for key in (
        "top1", "top5", "mean_per_class", "color", "shape") if key in result) + f"   chance {1 / len(classes):.1%}")
    worst = sorted((c for c in result["per_class"] if c["images"]), key=lambda c: c["accuracy"])[:12]
    job.say("  least accurate: " + ", ".join(f"{c['class']} {c['accuracy']:.0%}" for c in worst))
    job.say("  most confused: " + "; ".join(f"{c['class']} taken for {c['taken_for']}, {c['images']} times"
                                            for c in result["confused"][:5]))
    return result


def left_out(result: dict) -> str:
    reasons = {"bad": "that cannot be read", "unlabelled": "of no class"}
    return "".join(f"; {result[key]} {reason} left out" for key, reason in reasons.items() if result.get(key))


def retrieve(job: Job, spec: str) -> dict:
    """Retrieval both ways: prints and returns images, texts, bad (counts) and what recall_at_k returns."""
    found = job.images(job.open(spec, "retrieval"), job.options.squash)
    texts = [job.options.caption_prefix + caption for captions in found["captions"] for caption in captions]
    if not texts:
        raise UserError(f"{spec} has no captions: for retrieval give shapes, shards:, csv:, coco: or flickr30k:")
    counts = torch.tensor([len(captions) for captions in found["captions"]])                        # (I,)
    image_of_text = torch.arange(len(counts)).repeat_interleave(counts)                             # (T,)
    recall = recall_in_chunks(found["features"], job.texts(texts), image_of_text, runtime=job.runtime)
    result = dict(data=spec, task="retrieval", images=len(counts), texts=len(texts), bad=len(found["bad"]), **recall)
    job.say(f"\n{spec}: retrieval among {len(counts):,} images and {len(texts):,} captions, {len(set(texts)):,} of "
            f"them distinct{left_out(result)}")
    for way, by_k in recall.items():
        job.say(f"  {way.replace('_', ' ')}   " + "   ".join(f"R@{k} {share:6.1%}" for k, share in by_k.items()))
    return result


def evaluate_suite(job: Job, spec: str) -> dict:
    """ICinW: prints and returns scores {name: {metric, score, images, classes, bad, notes}}, their mean, missing."""
    o, (tasks, missing) = job.options, data_module.icinw(spec.partition(":")[2])
    job.say(f"\n{spec}: {len(tasks)} of the {len(data_module.ICINW)} ICinW data sets")
    scores = {}
    for task in tasks:
        templates = task.templates if o.templates == "auto" else data_module.find_templates(o.templates)
        cosines, found = job.class_scores(task.data, task.data.classes, templates, o.squash or task.squash)
        is_class = None if task.is_class is None else torch.from_numpy(task.is_class)[found["index"]]
        score = suite_score(task.metric, cosines, found["label"], is_class)
        there_is = math.isfinite(score)                         # nan: of some class there is no image
        entry = scores[task.name] = dict(
            metric=task.metric, score=score if there_is else None, images=len(cosines), classes=cosines.shape[1],
            bad=len(found["bad"]), notes=task.notes + ["a class without images"] * (not there_is))
        job.say(f"  {task.name:32} {task.metric:15} {f'{score:6.1%}' if there_is else '     -'}   "
                f"{'; '.join(entry['notes'])}{left_out(entry)}")
    known = [entry["score"] for entry in scores.values() if entry["score"] is not None]
    mean = sum(known) / len(known) if known else None
    job.say(f"  {f'mean of {len(known)}':48} {f'{mean:6.1%}' if known else '     -'}")
    if missing:
        job.say(f"  missing, and not in the mean: {', '.join(missing)}")
    return dict(data=spec, task="icinw", scores=scores, mean=mean, missing=missing)


TASKS = {"classes": classify, "retrieval": retrieve, "icinw": evaluate_suite}
AUTO = {"shapes": ("classes", "retrieval"), "folder": ("classes",), "icinw": ("icinw",)}


def main(argv: Sequence[str] | None = None):
    options = parse(Options, __doc__, argv, positional=("checkpoint",))
    plan = [(spec, task) for spec in options.data for task in (
        (options.task,) if options.task != "auto" else AUTO.get(spec.partition(":")[0], ("retrieval",)))]
    for spec, task in plan:
        if (task == "icinw") != spec.startswith("icinw:"):
            raise UserError(f"--task {task} does not go with --data {spec}: icinw:DIR is a task of its own")
    runtime = setup(options)
    model, tokenizer, config = load_checkpoint(options.checkpoint, runtime.device)
    job = Job(options, runtime, model, tokenizer)
    job.say(f"{options.checkpoint}: {config.method}; images are made {config.image_size} px, "
            + ("squeezed to a square" if options.squash else "the short side resized and the centre cut out"))
    results = [TASKS[task](job, spec) for spec, task in plan]
    if options.json and runtime.is_main:
        Path(options.json).write_text(json.dumps(dict(checkpoint=options.checkpoint, config=asdict(config),
                                                      results=results), indent=1) + "\n")


if __name__ == "__main__":
    run(main)
