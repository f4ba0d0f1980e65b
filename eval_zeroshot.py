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
in any chunk.  Processes share the images; texts and scores, which take little time, each has all of.
Letters: I images, T texts, E embedding, C classes, Q queries, M candidates.
"""
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import data as data_module
from data import FORMATS, BytePairTokenizer, EvalTransform, UserError, fingerprint, run, say, write_json
from losses import similarity
from model import MaskCLIP, load_checkpoint, opt
from train import CheckpointOptions, Runtime, extract, parse, setup


@dataclass
class Options(CheckpointOptions):
    task: str = opt("auto", "auto: all that the data can be used for", "what",
                    ("auto", "classes", "retrieval", "icinw"))
    templates: str = opt("auto", "7, 80, 85, a file with a template a line, or one template as 'a photo of a {}.'; "
                         "auto: the data's own, of icinw or DIR/templates.txt, else 'a {}' for a model that was "
                         "trained on shapes, else 7 (paper)", "what")
    classes: str = opt("", "file with a class a line in the data's order, tabs between several names of one; empty: "
                       "the data's own names", "what")
    metric: str = opt("accuracy", "how classification is scored; ROC AUC ranks images by the second of two classes",
                      "what",
                      ("accuracy", "mean per class", "ROC AUC", "mean of top-1 and top-5"))
    split: str = opt("", "part of the data; empty: val for classes, test for retrieval", "what")
    caption_prefix: str = opt("", "put before each caption in retrieval, as 'a photo of ' (paper silent)", "what")
    squash: bool = opt(False, "squeeze images to a square; else their center is cut out (paper silent)", "what")
    batch_size: int = opt(256, "images at a time over all processes, texts in each", "run")


# ---------------------------------------------------------------------------------------------------------------------
# Texts and classes
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def encode_texts(model: MaskCLIP, tokenizer: BytePairTokenizer, texts: Sequence[str], runtime: Runtime,
                 batch_size: int) -> Tensor:
    """(T, E), or of FILIP (T, L, E).  A text that comes several times is encoded once, so its copies tie."""
    distinct, embedded = sorted(dict.fromkeys(texts), key=len), {}          # those of one length share a batch
    starts = range(0, len(distinct), batch_size)
    for start in data_module.progress(starts, len(starts), "batches of texts", runtime.is_main):
        batch = distinct[start:start + batch_size]
        tokens = tokenizer(batch, model.config.context_length).to(runtime.device)                  # (B, L)
        with runtime.autocast():
            embedded.update(zip(batch, model.encode_text(tokens)))
    return pad_sequence([embedded[text] for text in texts], batch_first=True)                      # FILIP's L differ


def embed_classes(model: MaskCLIP, tokenizer: BytePairTokenizer, classes: Sequence[str], templates: Sequence[str],
                  runtime: Runtime, batch_size: int) -> Tensor | list[Tensor]:
    """(C, E) unit length.  Several names of a class, divided by tabs, are averaged together with the templates.

    FILIP's words have no mean: of such a model a list of C (prompts, L, E), whose similarities are averaged.
    """
    classes = data_module.progress(classes, len(classes), "classes embedded", runtime.is_main)
    if model.config.method != "filip":
        return model.encode_classes(classes, templates, tokenizer)
    prompts = ([template.format(name) for name in names.split("\t") for template in templates] for names in classes)
    return [encode_texts(model, tokenizer, some, runtime, batch_size) for some in prompts]


def find_templates(model: MaskCLIP, asked: str, usual: str = "7", root: str = "") -> tuple[str, ...]:
    """What --templates says; auto takes those in the data's folder root, else sentences such as the model has read:
    "a {}" of the Shapes world, the `usual` ones of photographs."""
    auto, own = "a {}" if data_module.only_shapes(model.trained_on) else usual, Path(root) / "templates.txt"
    if root and own.is_file():
        auto = str(own)
    return data_module.find_templates(auto if asked == "auto" else asked)


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


def class_scores(images: Tensor, classes: Tensor | list[Tensor]) -> Tensor:
    """(n, E), (C, E) -> (n, C) cosines; with what embed_classes gives for FILIP, the mean score of a class's prompts"""
    if isinstance(classes, list):
        return torch.stack([similarity(exact(images), exact(prompts)).mean(dim=1) for prompts in classes], dim=1)
    return similarity(exact(images), exact(classes))


def share(is_right: Tensor) -> float:
    return is_right.double().mean().item()


def ranks(scores: Tensor, is_right: Tensor) -> Tensor:
    """(Q, M), (Q, M) bool -> (Q,) how many wrong candidates score at least as high as the best right one.

    Queries with no right candidate are left out.  nan counts against the query, wherever it stands.
    """
    best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)                      # (Q, 1)
    return (~(scores < best) & ~is_right).sum(dim=1)[is_right.any(dim=1)]


def recall(rank: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """(Q,) from `ranks` -> {k: share of queries that are right at k}"""
    return {k: share(rank < k) for k in ks}


def recall_at_k(similarity: Tensor, image_of_text: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, dict]:
    """Recall from a whole matrix: {"image_to_text": {k: share of images}, "text_to_image": {k: share of texts}}.

    similarity (I, T); image_of_text (T,) the number of each text's image.  A query is right at k if fewer than k wrong
    candidates score at least as high as its best right one.  Images without a text are candidates but no queries.
    """
    is_pair = torch.arange(len(similarity), device=similarity.device)[:, None] == image_of_text     # (I, T)
    return dict(image_to_text=recall(ranks(similarity, is_pair), ks),
                text_to_image=recall(ranks(similarity.T, is_pair.T), ks))


SCORES = 1 << 23        # scores that exist at once, 64 MiB; all those of 30K images and 150K texts are 34 GiB


def recall_in_chunks(images: Tensor, texts: Tensor, image_of_text: Tensor, ks: Sequence[int] = (1, 5, 10),
                     speaks: bool = False) -> dict[str, dict]:
    """recall_at_k(similarity(images, texts), ...), some queries at a time.

    images (I, E), texts (T, E), unit length, or FILIP's tokens (I, N, E), (T, L, E); image_of_text (T,)
    """
    images, texts = exact(images), exact(texts)
    image_of_text = image_of_text.to(images.device)
    number = torch.arange(len(images), device=images.device)                                        # (I,)

    def chunks(queries: int, candidates: int) -> Iterable[Tensor]:
        parts = torch.arange(queries, device=images.device).split(max(1, SCORES // candidates))
        return data_module.progress(parts, len(parts), "chunks of queries", speaks)

    of_images = [ranks(similarity(images[some], texts), number[some, None] == image_of_text)        # (some, T) each
                 for some in chunks(len(images), len(texts))]
    of_texts = [ranks(similarity(images, texts[some], text_queries=True).T, image_of_text[some, None] == number)
                for some in chunks(len(texts), len(images))]
    return dict(image_to_text=recall(torch.cat(of_images), ks), text_to_image=recall(torch.cat(of_texts), ks))


# ---------------------------------------------------------------------------------------------------------------------
# Metrics of classification
# ---------------------------------------------------------------------------------------------------------------------

def top_k(scores: Tensor, label: Tensor, k: int) -> float:
    """Share of the rows of (n, C) whose label (n,) is among the k highest scores; of equal ones the first is first."""
    label = label[:, None]
    own = scores.gather(1, label)                                                                   # (n, 1)
    number = torch.arange(scores.shape[1], device=scores.device)
    is_before = ~((scores < own) | (scores == own) & (number >= label))                             # nan is no hit
    return share(is_before.sum(dim=1) < k)


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
    passed = scores >= scores[:, None]                                  # (n thresholds, n)
    right = (passed & is_class).sum(dim=1)                              # (n,) true positives
    precision, total = right.double() / passed.sum(dim=1), is_class.sum()
    best = [precision[10 * right >= t * total].max() for t in range(11)]
    return torch.stack(best).mean().item() if total else torch.nan


def roc_auc(scores: Tensor, positive: Tensor) -> float:
    """Share of all (positive, negative) pairs in which the positive scores higher, equal ones counting half.

    scores (n,); positive (n,) bool.  nan if one of the two is missing.
    """
    above = scores[positive][:, None] - scores[~positive]               # (positives, negatives)
    return share((above.sign() + 1) / 2)


def suite_score(metric: str, cosines: Tensor, label: Tensor, is_class: Tensor | None = None) -> float:
    """By a metric of ICinW or of SLIP's suite.  cosines (n, C); label (n,), or for 11-point mAP is_class (n, C) bool"""
    scores = (100 * cosines).softmax(dim=1)             # over classes: this changes how images rank within a class
    if metric == "11-point mAP":
        each = [average_precision_11(*pair) for pair in zip(scores.T, is_class.T)]
        return torch.tensor(each, dtype=torch.float64).nanmean().item()
    if metric == "ROC AUC":
        return roc_auc(scores[:, 1], label == 1)
    if metric == "mean per class":
        return class_accuracy(confusion(cosines.argmax(dim=1), label, cosines.shape[1])).nanmean().item()
    if metric == "mean of top-1 and top-5":
        return (top_k(cosines, label, 1) + top_k(cosines, label, 5)) / 2
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
        kind, _, rest = spec.partition(":")
        if kind == "shapes":
            scenes = {"classes": "objects=1-1,val=1024", "retrieval": "objects=2-4,val=1000"}[task]
            spec = f"shapes:{scenes},{rest}"
        split = self.options.split or ("val" if task == "classes" else "test")
        cache = Path(self.options.out or Path(self.options.checkpoint).parent) / "index"
        data = data_module.open_data(spec, split, task, size=self.model.config.image_size, cache=cache)
        if self.runtime.is_main:
            data_module.say_notes(data)
        return data

    def images(self, data, squash: bool) -> dict:
        """What `extract` returns, with features (n, E)"""
        transform = EvalTransform(self.model.config.image_size, squash=squash)
        return extract(data, transform, self.model.encode_image, self.runtime, self.options.batch_size)

    def class_scores(self, data, classes: Sequence[str], templates: Sequence[str], squash: bool) -> tuple[Tensor, dict]:
        """(n, C) scores of the readable images, and what `extract` returned"""
        embedded = embed_classes(self.model, self.tokenizer, classes, templates, self.runtime, self.options.batch_size)
        found = self.images(data, squash)
        chunks = found["features"].split(1024)
        return torch.cat([class_scores(images, embedded) for images in chunks]).cpu(), found

    def say(self, line: str):
        if self.runtime.is_main:
            say(line)


def names_of_classes(job: Job, data, spec: str) -> list[str]:
    """Those of --classes, or the data's own.  UserError if they are no names, or not as many.

    A file whose lines begin with the names of the folders of the classes, with spaces for _ and capitals or not, may
    have them in any order; folders that are numbers, as n01440764, name no class themselves.  Else lines and classes
    are matched by position, and the first and last pair are told.
    """
    file = job.options.classes
    data_module.want_several(data, spec)
    if not file:
        data_module.want_names(data, spec)
        return data.classes
    lines, folders = data_module.read_lines(file, "class names"), getattr(data, "folders", data.classes)
    folders = [folder.replace("_", " ").casefold() for folder in folders]
    named = {line.partition("\t")[0].strip().replace("_", " ").casefold(): line for line in lines}
    if all(re.fullmatch(r"n?\d+", folder) for folder in folders):
        named |= data_module.by_folder(lines)
    if len(set(folders) & set(named)) == len(folders):
        return [named[folder] for folder in folders]
    if len(lines) != len(folders):
        raise UserError(f"{file} has {len(lines)} lines, {spec} {len(folders)} classes: want as many")
    job.say(f"classes of {spec} by their place in {file}: {folders[0]} is {lines[0]} ... {folders[-1]} is {lines[-1]}")
    return lines


def classify(job: Job, spec: str) -> dict:
    """Zero-shot classification: prints and returns

    images, classes, templates   how many of them            bad, unlabelled   records left out
    classes_hash, templates_hash   the same for the same names and templates, see data.fingerprint
    metric, score                what --metric asks for
    top1, top5, mean_per_class   shares of images; color, shape besides on the Shapes world
    per_class                    [{"index", "class", "images", "accuracy" (None without images)}, ...]
    confused                     [{"class", "taken_for", "images"}, ...], ten at most, the most frequent first
    """
    o, data = job.options, job.open(spec, "classes")
    classes = names_of_classes(job, data, spec)
    if o.metric == "ROC AUC" and len(classes) != 2:
        raise UserError(f"--metric 'ROC AUC' is of two classes, {spec} has {len(classes)}: choose another")
    templates = find_templates(job.model, o.templates, root=getattr(data, "root", ""))
    scores, found = job.class_scores(data, classes, templates, o.squash)
    known = found["label"] >= 0
    scores, label = scores[known], found["label"][known]
    if not len(label):
        raise UserError(f"no image of {spec} has a class: choose other data, or --task retrieval")
    if o.metric == "ROC AUC" and len(label.unique()) < 2:
        raise UserError(f"--metric 'ROC AUC' is of two classes, {spec} has images of one: choose another")
    guess, names = scores.argmax(dim=1), [name.split("\t")[0] for name in classes]
    counts = confusion(guess, label, len(classes))
    accuracy = class_accuracy(counts)
    pairs = zip(label.tolist(), guess.tolist())
    confused = Counter((right, wrong) for right, wrong in pairs if right != wrong).most_common(10)
    result = dict(
        data=spec, task="classes", images=len(label), classes=len(classes), templates=len(templates),
        classes_hash=fingerprint(classes), templates_hash=fingerprint(templates), bad=len(found["bad"]),
        unlabelled=(~known).sum().item(), metric=o.metric, score=suite_score(o.metric, scores, label),
        top1=top_k(scores, label, 1), top5=top_k(scores, label, 5), mean_per_class=accuracy.nanmean().item(),
        per_class=[{"index": i, "class": name, "images": n, "accuracy": hits if n else None}
                   for i, (name, n, hits) in enumerate(zip(names, counts.sum(dim=1).tolist(), accuracy.tolist()))],
        confused=[{"class": names[right], "taken_for": names[wrong], "images": n} for (right, wrong), n in confused])
    if data.classes == data_module.KINDS:
        n = len(data_module.SHAPES)
        result["color"] = share(guess // n == label // n)
        result["shape"] = share(guess % n == label % n)

    job.say(f"\n{spec}: zero-shot classification of {len(label):,} images, {len(classes)} classes "
            f"({result['classes_hash']}), {len(templates)} template{'s' * (len(templates) > 1)} "
            f"({result['templates_hash']}), score: {o.metric}{left_out(result)}")
    shown = ("score", "top1", "top5", "mean_per_class", "color", "shape")
    job.say("  " + "   ".join(f"{key.replace('_', ' ')} {result[key]:.1%}" for key in shown if key in result)
            + f"   chance {1 / len(classes):.1%}")
    job.say("  most confused: " + "; ".join(f"{c['class']} taken for {c['taken_for']}, {c['images']} times"
                                            for c in result["confused"][:5]))
    return result


def left_out(result: dict) -> str:
    reasons = {"bad": "that cannot be read", "unlabelled": "of no class", "copies": "copies of other images"}
    return "".join(f"; {result[key]} {reason} left out" for key, reason in reasons.items() if result.get(key))


def retrieve(job: Job, spec: str) -> dict:
    """Retrieval both ways: prints and returns images, texts, bad (counts) and what recall_at_k returns.

    Copies of an image are one image with the captions of all: no model could tell which of them is meant.
    """
    o, found = job.options, job.images(job.open(spec, "retrieval"), job.options.squash)
    texts = [o.caption_prefix + caption for captions in found["captions"] for caption in captions]
    if not texts:
        raise UserError(f"{spec} has no captions: retrieval wants {data_module.specs('retrieval')}")
    first = {}                                              # of I different images the place of the first
    for i, pixels in enumerate(found["pixels"]):
        first.setdefault(pixels, i)
    number = {pixels: i for i, pixels in enumerate(first)}
    image_of_text = torch.tensor([number[pixels] for pixels, captions in zip(found["pixels"], found["captions"])
                                  for _ in captions])                                               # (T,)
    images = found["features"][list(first.values())]                                               # (I, E)
    embedded = encode_texts(job.model, job.tokenizer, texts, job.runtime, o.batch_size)             # (T, E)
    recall = recall_in_chunks(images, embedded, image_of_text, speaks=job.runtime.is_main)
    result = dict(data=spec, task="retrieval", images=len(images), texts=len(texts), bad=len(found["bad"]),
                  copies=len(found["pixels"]) - len(images), **recall)
    job.say(f"\n{spec}: retrieval among {len(images):,} images and {len(texts):,} captions, {len(set(texts)):,} of "
            f"them distinct{left_out(result)}")
    for way, by_k in recall.items():
        job.say(f"  {way.replace('_', ' ')}   " + "   ".join(f"R@{k} {hits:6.1%}" for k, hits in by_k.items()))
    return result


def evaluate_suite(job: Job, spec: str) -> dict:
    """ICinW: prints and returns scores {name: {metric, score, images, classes, bad, notes}}, their mean, missing."""
    o, (tasks, missing) = job.options, data_module.open_data(spec, task="icinw")
    job.say(f"\n{spec}: {len(tasks)} of the {len(data_module.ICINW)} ICinW data sets")
    scores = {}
    for task in tasks:
        templates = task.templates if o.templates == "auto" else find_templates(job.model, o.templates)
        cosines, found = job.class_scores(task.data, task.data.classes, templates, o.squash or task.squash)
        is_class = None if task.is_class is None else torch.from_numpy(task.is_class)[found["index"]]
        score, notes = suite_score(task.metric, cosines, found["label"], is_class), task.notes
        if math.isnan(score):
            score, notes = None, [*notes, "no score: a class without images"]
        entry = scores[task.name] = dict(metric=task.metric, score=score, images=len(cosines), classes=cosines.shape[1],
                                         bad=len(found["bad"]), notes=notes)
        job.say(f"  {task.name:32} {task.metric:15} {percent(score)}   {'; '.join(notes)}{left_out(entry)}")
    known = [entry["score"] for entry in scores.values() if entry["score"] is not None]
    mean = sum(known) / len(known) if known else None
    job.say(f"  {f'mean of {len(known)}':48} {percent(mean)}")
    if missing:
        job.say(f"  missing, and not in the mean: {', '.join(missing)}")
    return dict(data=spec, task="icinw", scores=scores, mean=mean, missing=missing)


def percent(score: float | None) -> str:
    return "     -" if score is None else f"{score:6.1%}"


TASKS = {"classes": classify, "retrieval": retrieve, "icinw": evaluate_suite}


def tasks_of(spec: str, asked: str) -> list[str]:
    if asked != "auto":
        return [asked]
    return [task for task in TASKS if task in FORMATS[data_module.kind_of(spec)].tasks] or ["classes"]


def main(argv: Sequence[str] | None = None):
    o = parse(Options, __doc__, argv, positional=("checkpoint",))
    plan = [(spec, task) for spec in o.data for task in tasks_of(spec, o.task)]
    runtime = setup(o)
    model, tokenizer, config = load_checkpoint(o.checkpoint, runtime.device)
    job = Job(o, runtime, model, tokenizer)
    job.say(f"{o.checkpoint}: {config.method}; images are made {config.image_size} px, "
            + ("squeezed to a square" if o.squash else "the short side resized and the center cut out"))
    results = []
    for spec, task in plan:
        results.append(TASKS[task](job, spec))
        if runtime.is_main:
            write_json(o.json, dict(checkpoint=o.checkpoint, config=asdict(config), results=results))


if __name__ == "__main__":
    run(main)
