"""Zero-shot evaluation: metrics against scikit-learn, torchmetrics and brute force; the tasks against the model itself.

    python -m pytest tests/test_eval_zeroshot.py
"""
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, needs_shared, run_script

import data
import eval_zeroshot
from data import ICINW, TEMPLATES_7, TEMPLATES_80, TEMPLATES_85, BytePairTokenizer, ShapesWorld, UserError
from eval_zeroshot import (average_precision_11, class_accuracy, confusion, embed_classes, encode_texts, exact, main,
                           ranks, recall_at_k, recall_in_chunks, roc_auc, similarity, suite_score, top_k)
from model import PRESETS, MaskCLIP, save_checkpoint
from test_formats import make_tar
from train import Runtime, TrainOptions

ALONE = Runtime(rank=0, world=1, device=torch.device("cpu"), precision="fp32", workers=0)
TINY = replace(PRESETS["pocket"], method="clip", image_size=32, patch_size=16, width=32, depth=1, heads=2,
               text_width=32, text_depth=1, text_heads=2, embed_dim=16, context_length=24)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained model: its path, itself, and its tokenizer."""
    torch.manual_seed(0)
    world = ShapesWorld(count=200)
    tokenizer = BytePairTokenizer.train([world.scene(i).caption for i in range(200)], 640)
    model = MaskCLIP(replace(TINY, vocab_size=tokenizer.vocab_size), tokenizer.eot).eval()
    path = tmp_path_factory.mktemp("pretrained") / "last.pt"
    options = TrainOptions(**asdict(model.config), data=("shapes",))
    assert save_checkpoint(path, model, tokenizer, options)
    return path, model, tokenizer


def write_images(folder, count, seed=0):
    """`count` pictures of noise in a folder; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        PIL.Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(count)]


def evaluated(*arguments, tmp_path):
    """The JSON that the program writes."""
    main([*map(str, arguments), "--json", str(tmp_path / "results.json"), "--device", "cpu"])
    return json.loads((tmp_path / "results.json").read_text())["results"]


# ------------------------------------------------------------------------------------------------------ recall

def slow_recall(scores, image_of_text, ks):
    """By the sentence: right at k if fewer than k wrong candidates score at least as high as the best right one."""
    images, texts = scores.shape

    def share(right_of, score_of, candidates):
        rank = [sum(score_of(q, c) >= max(score_of(q, r) for r in right) for c in range(candidates) if c not in right)
                for q, right in right_of.items() if right]
        return {k: sum(r < k for r in rank) / len(rank) for k in ks}
    texts_of = {i: {t for t in range(texts) if image_of_text[t] == i} for i in range(images)}
    return dict(image_to_text=share(texts_of, lambda i, t: scores[i, t], texts),
                text_to_image=share({t: {image_of_text[t]} for t in range(texts)}, lambda t, i: scores[i, t], images))


@pytest.mark.parametrize("images, texts, levels", [
    (12, 12, 0),         # all scores differ
    (10, 50, 0),         # about five captions an image
    (10, 50, 4),         # many ties
    (6, 30, 1),          # nothing but ties
    (30, 12, 3),         # more images than captions: most images have none
    (1, 3, 0),           # one image: every caption finds it
])
def test_recall_is_what_the_definition_says(images, texts, levels):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        scores = rng.integers(0, levels, (images, texts)) / levels if levels else rng.random((images, texts))
        image_of_text = rng.integers(0, images, texts)
        got = recall_at_k(torch.from_numpy(scores), torch.from_numpy(image_of_text), (1, 3, 10))
        assert got == slow_recall(scores, image_of_text.tolist(), (1, 3, 10))


@pytest.mark.parametrize("row, right, rank", [
    ([0.8, 0.8, 0.1], [0], 1),               # a tie is a miss ...
    ([0.8, 0.9, 0.9], [1, 2], 0),            # ... but not of two right ones
    ([float("nan"), 0.5, 0.1], [0], 2),      # a broken score never wins ...
    ([0.5, float("nan"), 0.1], [0], 1),      # ... nor does it help others
])
def test_rank_of_the_best_right_candidate(row, right, rank):
    is_right = torch.isin(torch.arange(3), torch.tensor(right))
    assert ranks(torch.tensor([row]), is_right[None]).tolist() == [rank]


@pytest.mark.parametrize("images, texts, scores_at_once", [
    (20, 100, 1 << 23),      # all in one chunk
    (20, 100, 700),          # seven images a chunk, 35 texts
    (23, 7, 1),              # a row a chunk
])
def test_chunks_give_the_recall_of_the_whole_matrix(images, texts, scores_at_once, monkeypatch):
    monkeypatch.setattr(eval_zeroshot, "SCORES", scores_at_once)
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(images, 8, generator=generator), dim=1)
    image_of_text = torch.arange(texts) % images
    y = F.normalize(x[image_of_text] + 0.5 * torch.randn(texts, 8, generator=generator), dim=1)
    x, y = x[torch.arange(images) % 11], y[torch.arange(texts) % 41]           # some images, some captions are equal
    assert recall_in_chunks(x, y, image_of_text) == recall_at_k(similarity(exact(x), exact(y)), image_of_text)


def test_exact_scores_do_not_depend_on_the_order_of_additions():
    for width in (1, 3, 512, 4096):
        x, y = (F.normalize(torch.randn(5, width, generator=torch.Generator().manual_seed(s)), dim=1) for s in (0, 1))
        a, b = exact(x), exact(y)
        order = torch.randperm(width)
        assert torch.equal(a @ b.T, a[:, order] @ b[:, order].T)
        assert torch.equal(a @ b.T, (a[:, None] * b).flip(2).sum(dim=2))
        assert torch.equal(a.float().double(), a) and (a - x).abs().max() <= 2 ** -25


# ------------------------------------------------------------------------------------------------------ classification

@pytest.mark.parametrize("n, classes, levels, present", [
    (200, 10, 0, 10),        # all scores differ
    (200, 10, 3, 10),        # many ties
    (300, 12, 5, 7),         # classes 7 ... 11 have no image
    (50, 3, 1, 3),           # all scores equal: the first class is taken
])
def test_metrics_equal_sklearn_and_torchmetrics(n, classes, levels, present):
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is a peer for tests only")
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification", reason="a peer for tests only")
    rng = np.random.default_rng(n + levels)
    scores = rng.integers(0, levels, (n, classes)) / levels if levels else rng.random((n, classes))
    label = rng.integers(0, present, n)
    s, y = torch.from_numpy(scores), torch.from_numpy(label)
    guess = s.argmax(dim=1)
    assert top_k(s, y, 1) == pytest.approx(sklearn.accuracy_score(label, guess))
    for k in range(1, classes):          # scikit-learn takes the last of equals, so the classes are given in reverse
        want = sklearn.top_k_accuracy_score(classes - 1 - label, scores[:, ::-1], k=k, labels=np.arange(classes))
        assert top_k(s, y, k) == pytest.approx(want)
        if not levels:                   # torchmetrics takes any of equals
            want = torchmetrics.multiclass_accuracy(s, y, classes, average="micro", top_k=k)
            assert top_k(s, y, k) == pytest.approx(want.item())
    matrix = confusion(guess, y, classes)
    assert (matrix.numpy() == sklearn.confusion_matrix(label, guess, labels=np.arange(classes))).all()
    assert torch.equal(matrix, torchmetrics.multiclass_confusion_matrix(guess, y, classes))
    with pytest.warns() if set(guess.tolist()) - set(label) else np.errstate():
        assert class_accuracy(matrix).nanmean() == pytest.approx(sklearn.balanced_accuracy_score(label, guess))
    assert class_accuracy(matrix).isnan().tolist() == [c not in label for c in range(classes)]


@pytest.mark.parametrize("n, levels, share", [
    (100, 0, 0.5),       # all scores differ
    (100, 4, 0.5),       # many ties
    (200, 30, 0.05),     # few positives
    (40, 1, 0.5),        # all scores equal
    (3, 2, 0.7),         # hardly any records
])
def test_roc_auc_and_average_precision_equal_sklearn(n, levels, share):
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is a peer for tests only")
    for seed in range(10):
        rng = np.random.default_rng(seed)
        scores = torch.from_numpy(rng.integers(0, levels, n) / levels if levels else rng.random(n))
        positive = torch.from_numpy(rng.random(n) < share)
        if 0 < positive.sum() < n:
            assert roc_auc(scores, positive) == pytest.approx(sklearn.roc_auc_score(positive, scores))
            precision, recall, _ = sklearn.precision_recall_curve(positive, scores)    # the last point has no threshold
            best = [precision[:-1][recall[:-1] >= k / 10 - 1e-9].max() for k in range(11)]
            assert average_precision_11(scores, positive) == pytest.approx(np.mean(best))


def test_suite_metrics():
    """One case for each metric, worked out by hand."""
    cosines = torch.tensor([[0.3, 0.1], [0.2, 0.4], [0.32, 0.1]], dtype=torch.float64)     # guesses 0, 1, 0
    label = torch.tensor([0, 0, 1])
    assert suite_score("accuracy", cosines, label) == pytest.approx(1 / 3)
    assert suite_score("mean per class", cosines, label) == pytest.approx((1 / 2 + 0) / 2)
    assert suite_score("mean of top-1 and top-5", cosines, label) == pytest.approx((1 / 3 + 1) / 2)
    assert suite_score("ROC AUC", cosines, label) == 0                    # the one positive scores lowest
    # class 0: ranked 2, 0, 1, the first and the last are of it: precision 1 up to recall 0.5, then 2/3; class 1 has no
    # image
    is_class = torch.tensor([[False, False], [True, False], [True, False]])
    assert suite_score("11-point mAP", cosines, label, is_class) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


# ------------------------------------------------------------------------------------------------------ prompts

@needs_shared
def test_templates_are_openai_s():
    for templates, file in ((TEMPLATES_7, "templates_7.txt"), (TEMPLATES_80, "templates_80.txt")):
        assert list(templates) == (SHARED / file).read_text().splitlines()


def test_numbers_of_templates():
    assert (len(TEMPLATES_7), len(TEMPLATES_80), len(set(TEMPLATES_85))) == (7, 80, 85)
    assert set(TEMPLATES_7) < set(TEMPLATES_80) and TEMPLATES_85[:80] == TEMPLATES_80
    assert all(template.count("{}") == 1 for template in TEMPLATES_85)


@pytest.mark.parametrize("trained_on, asked, count", [
    ((), "auto", 7),                             # public weights: the paper's
    (("shards:a.tar", "shapes"), "auto", 7),
    (("shapes:train=9", "shapes"), "auto", 1),   # captions that never speak of a photo
    (("shapes",), "80", 80),
])
def test_templates_suit_what_the_model_has_read(trained_on, asked, count):
    assert len(eval_zeroshot.find_templates(SimpleNamespace(trained_on=trained_on), asked)) == count


def test_tasks_of_a_format():
    for spec, tasks in {"shapes": ["classes", "retrieval"], "folder:x": ["classes"], "icinw:x": ["icinw"],
                        "coco:x": ["retrieval"]}.items():
        assert eval_zeroshot.tasks_of(spec, "auto") == tasks


def test_class_embedding_averages_names_and_templates_together(checkpoint):
    _, model, tokenizer = checkpoint
    templates = ("a {}", "a photo of a {}")
    got = embed_classes(model, tokenizer, ["red moon", "blue star\tazure star"], templates, ALONE, batch_size=3)
    filled = (["a red moon", "a photo of a red moon"],
              ["a blue star", "a photo of a blue star", "a azure star", "a photo of a azure star"])
    for row, prompts in zip(got, filled):
        with torch.no_grad():
            each = torch.cat([model.encode_text(tokenizer([prompt], 24)) for prompt in prompts])
        torch.testing.assert_close(row, F.normalize(each.mean(dim=0), dim=0))


def test_copies_of_a_text_get_the_same_bits(checkpoint):
    texts = ["a red moon", "a blue star at the top", "a red moon", "a cross"]
    embedded = encode_texts(*checkpoint[1:], texts, ALONE, batch_size=2)
    assert torch.equal(embedded[0], embedded[2]) and len(embedded.unique(dim=0)) == 3
    for text, row in zip(texts, embedded):
        torch.testing.assert_close(row, encode_texts(*checkpoint[1:], [text], ALONE, batch_size=2)[0])


# ------------------------------------------------------------------------------------------------------ the program

def test_shapes_world(checkpoint, tmp_path):
    path, model, tokenizer = checkpoint
    classes, retrieval = evaluated(path, "--data", "shapes:val=96", tmp_path=tmp_path)
    world = ShapesWorld(split="val", count=96, size=32, objects=(1, 1))
    images = data.normalize(torch.stack([data.to_tensor(world.read(i).image) for i in range(96)]))
    with torch.no_grad():
        guess = (model.encode_image(images) @ model.encode_classes(world.classes, ("a {}",), tokenizer).T).argmax(dim=1)
    label = torch.arange(96) % 64
    assert classes["top1"] == pytest.approx((guess == label).double().mean().item())
    assert classes["color"] == pytest.approx((guess // 8 == label // 8).double().mean().item())
    assert classes["shape"] == pytest.approx((guess % 8 == label % 8).double().mean().item())
    assert [c["images"] for c in classes["per_class"]] == [2] * 32 + [1] * 32
    assert sum(c["accuracy"] * c["images"] for c in classes["per_class"]) / 96 == pytest.approx(classes["top1"])
    assert classes["confused"][0]["images"] >= classes["confused"][-1]["images"] > 0
    assert (retrieval["images"], retrieval["texts"]) == (96, 96)
    assert set(retrieval["image_to_text"]) == set(retrieval["text_to_image"]) == {"1", "5", "10"}


def test_folder_with_own_names_and_a_corrupt_image(checkpoint, tmp_path, capsys):
    for i, name in enumerate(("cat", "dog", "owl")):
        write_images(tmp_path / "zoo" / "val" / name, 3, seed=i)
    (tmp_path / "zoo" / "train" / "yak").mkdir(parents=True)                        # a class without test images
    (tmp_path / "zoo" / "val" / "owl" / "1.png").write_bytes(b"no image")
    (tmp_path / "names.txt").write_text("cat\ndog\thound\nowl\n\nyak\n")
    arguments = checkpoint[0], "--data", f"folder:{tmp_path / 'zoo'}", "--templates", "a {}"
    result, = evaluated(*arguments, "--classes", tmp_path / "names.txt", tmp_path=tmp_path)
    assert (result["images"], result["bad"], result["classes"], result["templates"]) == (8, 1, 4, 1)
    assert [c["images"] for c in result["per_class"]] == [3, 3, 2, 0] and result["per_class"][3]["accuracy"] is None
    shown = capsys.readouterr()
    assert "owl/1.png" in shown.err and "1 that cannot be read left out" in shown.out
    (tmp_path / "zoo" / "templates.txt").write_text("a photo of a {}.\na {}, an animal.\n")
    scores = {metric: evaluated(*arguments[:3], "--metric", metric, tmp_path=tmp_path)[0]
              for metric in ("accuracy", "mean per class", "mean of top-1 and top-5")}
    assert {result["templates"] for result in scores.values()} == {2}, "the data's own"
    for metric, value in (("accuracy", lambda r: r["top1"]), ("mean per class", lambda r: r["mean_per_class"]),
                          ("mean of top-1 and top-5", lambda r: (r["top1"] + r["top5"]) / 2)):
        assert scores[metric]["score"] == pytest.approx(value(scores[metric])) and scores[metric]["metric"] == metric
    assert "score: mean per class" in capsys.readouterr().out


@pytest.mark.parametrize("folders, lines, names, said", [
    (range(12), range(100, 112), [str(100 + i) for i in range(12)], "0 is 100 ... 11 is 111"),      # 2 before 10
    (range(12), [f"{i}\tname {i}" for i in reversed(range(12))], [f"name {i}" for i in range(12)], ""),
    (["n02", "n01"], ["n02\towl", "n01\tcat", "n03\tdog"], ["cat", "owl"], ""),
    (["owl", "cat"], ["owl\teagle owl", "cat"], ["cat", "owl\teagle owl"], ""),                     # more names of one
    (["1", "10", "2"], ["1", "10", "2"], ["1", "2", "10"], ""),                                     # as text sorts them
    (["x", "y"], ["cat", "dog"], ["cat", "dog"], "x is cat ... y is dog"),
    (["apple_pie", "Beagle"], ["beagle", "Apple pie"], ["beagle", "Apple pie"], ""),                # as folders say it
])
def test_names_belong_to_their_folders(folders, lines, names, said, checkpoint, tmp_path, capsys):
    for i, folder in enumerate(folders):
        write_images(tmp_path / "zoo" / str(folder), 1, seed=i)
    (tmp_path / "names.txt").write_text("\n".join(map(str, lines)))
    result, = evaluated(checkpoint[0], "--data", f"folder:{tmp_path / 'zoo'}", "--classes", tmp_path / "names.txt",
                        tmp_path=tmp_path)
    assert [(c["index"], c["class"]) for c in result["per_class"]] == [
        (i, name.split("\t")[0]) for i, name in enumerate(names)]
    assert result["classes_hash"] == data.fingerprint(names) and (said in capsys.readouterr().out)


def test_two_classes_of_one_name_stay_two(checkpoint, tmp_path):
    for i, folder in enumerate(("n1", "n2", "n3")):                                 # as ImageNet's two cranes
        write_images(tmp_path / "zoo" / folder, 2, seed=i)
    (tmp_path / "zoo" / "classnames.txt").write_text("n1\tcrane\nn2\tcrane\nn3\tdog\n")
    result, = evaluated(checkpoint[0], "--data", f"folder:{tmp_path / 'zoo'}", tmp_path=tmp_path)
    assert [(c["index"], c["class"], c["images"]) for c in result["per_class"]] == [
        (0, "crane", 2), (1, "crane", 2), (2, "dog", 2)]
    wrong = 6 - round(6 * result["top1"])
    assert sum(c["images"] for c in result["confused"]) == wrong


@pytest.mark.parametrize("spec", ["csv:{}/rows.csv", "csv:{}/copies.csv", "shards:{}/s.tar"])
def test_copies_of_an_image_are_one_image(spec, checkpoint, tmp_path, capsys):
    """Rows of one file; files that are copies; a shard with a copy for each caption: recall is that of images."""
    write_images(tmp_path, 3)
    texts = [["a red moon", "a moon"], ["a cross"], ["a blue star", "a star", "stars"]]
    (tmp_path / "rows.csv").write_text("filepath,title\n" + "".join(
        f"{i}.png,{text}\n" for i, some in enumerate(texts) for text in some))
    rows, members = [], []
    for i, some in enumerate(texts):
        for k, text in enumerate(some):
            content = (tmp_path / f"{i}.png").read_bytes()
            (tmp_path / f"{i}-{k}.png").write_bytes(content)
            rows.append(f"{i}-{k}.png,{text}\n")
            members += [(f"{i}-{k}.png", content), (f"{i}-{k}.txt", text.encode())]
    (tmp_path / "copies.csv").write_text("filepath,title\n" + "".join(rows))
    make_tar(tmp_path / "s.tar", members)
    result, = evaluated(checkpoint[0], "--data", spec.format(tmp_path), "--task", "retrieval", tmp_path=tmp_path)
    assert (result["images"], result["texts"], result["copies"]) == (3, 6, 0 if "rows" in spec else 3)
    assert result["image_to_text"]["5"] == result["text_to_image"]["5"] == 1.0


def karpathy(name, root):
    """Two test images, with three captions and one, and an image of another split."""
    folder = root / {"coco": "val2014", "flickr30k": "flickr30k-images"}[name]
    write_images(folder, 3)
    where = {"filepath": "val2014"} if name == "coco" else {}
    records = (0, "test", ["a red moon", "a moon", "a moon"]), (1, "train", ["a cross"]), (2, "test", ["a blue star"])
    images = [dict(where, filename=f"{i}.png", split=split, sentences=[{"raw": text} for text in texts])
              for i, split, texts in records]
    (root / f"dataset_{name}.json").write_text(json.dumps({"images": images}))
    return f"{name}:{root}"


@pytest.mark.parametrize("name", ["coco", "flickr30k"])
def test_karpathy_test_images(name, checkpoint, tmp_path):
    path, model, tokenizer = checkpoint
    result, = evaluated(path, "--data", karpathy(name, tmp_path), "--squash", tmp_path=tmp_path)
    assert (result["images"], result["texts"]) == (2, 4)
    transform = data.EvalTransform(32, squash=True)
    images = torch.stack([transform(PIL.Image.open(next(tmp_path.rglob(f"{i}.png")))) for i in (0, 2)])
    with torch.no_grad():
        x, y = model.encode_image(data.normalize(images)), model.encode_text(
            tokenizer(["a red moon", "a moon", "a moon", "a blue star"], 24))
    want = slow_recall((x @ y.T).numpy(), [0, 0, 0, 1], (1, 5, 10))
    assert {way: {int(k): v for k, v in result[way].items()} for way in want} == want


def make_suite(root):
    """Four of the 20 data sets, unpacked, as the ELEVATER toolkit lists them: lines of text, and COCO's JSON."""
    pets, voc, signs, memes = (root / "classification" / ICINW[name][0] for name in (
        "oxford-iiit-pets", "voc-2007-classification", "gtsrb", "hateful-memes"))
    files = [f"{c}/{file}" for c in range(3) for file in write_images(pets / "val" / f"{c}", 4 - c, seed=10 * c)]
    (pets / "test.txt").write_text("".join(f"val.zip@{file} {file[0]}\n" for file in files))
    (pets / "labels.txt").write_text("Abyssinian\nBengal\nPug\n")
    files = write_images(voc / "test", 6)
    (voc / "test" / "1.png").write_bytes(b"no image")
    rows = zip(files, ["0", "0", "0,1", "1", "0", "1"])
    (voc / "test_ic.txt").write_text("".join(f"test.zip@test/{file} {row}\n" for file, row in rows))
    (voc / "labels.txt").write_text("bus\ncar\n")
    files = write_images(signs, 4)
    (signs / "test.txt").write_text("".join(f"final_test.zip@{file} {k // 2}\n" for k, file in enumerate(files)))
    (signs / "labelmap.txt").write_text("stop\nyield\n")
    files = [dict(file_name=f"img.zip@img/{file}") for file in write_images(memes / "img" / "img", 5)]
    files[0] = dict(zip_file="img.zip", file_name="img/0.png")
    (memes / "test_meta.json").write_text(json.dumps(dict(
        categories=[dict(id=2, name="hateful"), dict(id=1, name="not")],
        images=[dict(id=10 + k, **file) for k, file in enumerate(files)],
        annotations=[dict(id=k, image_id=10 + k, category_id=1 + (k > 1)) for k in range(4)])))         # one has none
    (root / "prompts.py").write_text('''"""Prompts"""
import os
os.remove(__file__)
own = os.remove(__file__)
pets_classes = ["Abyssinian", "Bengal", ["pug", "pug dog"]]
pets_templates = ["a photo of a {}, a type of pet.", 'the {}.']
class_map = {"oxford-iiit-pets": pets_classes, "voc-2007-classification": ["bus", "car"], "stl10": []}
template_map = {"oxford-iiit-pets": pets_templates, "voc-2007-classification": ["a {}."], "stl10": ["{} {}"]}
''')


def test_suite(checkpoint, tmp_path, capsys):
    path, model, tokenizer = checkpoint
    make_suite(tmp_path)
    result, = evaluated(path, "--data", f"icinw:{tmp_path}", tmp_path=tmp_path)
    assert (tmp_path / "prompts.py").exists(), "read, never run"
    scores = result["scores"]
    assert {name: (entry["images"], entry["classes"], entry["bad"]) for name, entry in scores.items()} == {
        "gtsrb": (4, 2, 0), "hateful-memes": (4, 2, 0), "oxford-iiit-pets": (9, 3, 0),
        "voc-2007-classification": (5, 2, 1)}
    assert set(scores) | set(result["missing"]) == set(ICINW)
    assert result["mean"] == pytest.approx(np.mean([entry["score"] for entry in scores.values()]))
    assert "missing, and not in the mean: caltech-101, cifar-10" in capsys.readouterr().out
    notes = scores["hateful-memes"]["notes"]
    assert "1 images without a class" in notes and "4 images, the published test set has 500" in notes
    assert [name for name in scores if not any("prompts.py" in note for note in scores[name]["notes"])] == [
        "oxford-iiit-pets", "voc-2007-classification"]

    tasks = {task.name: task for task in data.icinw(str(tmp_path))[0]}
    signs, memes, pets, voc = tasks.values()
    assert [task.data.classes for task in tasks.values()] == [                      # of several names the first
        ["stop", "yield"], ["not", "hateful"], ["Abyssinian", "Bengal", "pug"], ["bus", "car"]]
    assert pets.templates == ("a photo of a {}, a type of pet.", "the {}.") and voc.templates == ("a {}.",)
    assert signs.templates == memes.templates == TEMPLATES_80
    labels = {"gtsrb": [0, 0, 1, 1], "hateful-memes": [0, 0, 1, 1], "oxford-iiit-pets": [0] * 4 + [1] * 3 + [2] * 2}
    assert voc.is_class.tolist() == [[True, False]] * 2 + [[True, True], [False, True], [True, False], [False, True]]
    for name, task in tasks.items():
        good = [i for i in range(len(task.data)) if (name, i) != ("voc-2007-classification", 1)]
        images = torch.stack([data.EvalTransform(32)(task.data.read(i).image) for i in good])
        embedded = embed_classes(model, tokenizer, task.data.classes, task.templates, ALONE, 8)
        with torch.no_grad():
            cosines = (model.encode_image(data.normalize(images)) @ embedded.T).double()
        label, is_class = torch.tensor(labels.get(name, [])), torch.from_numpy(task.is_class[good])
        assert scores[name]["score"] == pytest.approx(suite_score(ICINW[name][-1], cosines, label, is_class)), name


@pytest.mark.parametrize("file, content, told", [
    ("classification/gtsrb_20210923/test.txt", "final_test.zip@0.png stop\n", "got 'final_test.zip@0.png stop'"),
    ("classification/gtsrb_20210923/test.txt", "final_test.zip@0.png 2\n", "of class 2, with 2 classes"),
    ("classification/gtsrb_20210923/test.txt", "other.zip@9.png 1\n", "none of the first 1 images"),
    ("classification/hateful_memes_20211014/test_meta.json", "[]", "'categories'"),
    ("prompts.py", "class_map = {'gtsrb': ['stop']}\ntemplate_map = {'gtsrb': ['a {}']}\n", "names 1 classes of gtsrb"),
    ("prompts.py", "class_map = {'gtsrb': unknown}\ntemplate_map = {}\n", "is not the toolkit's"),
    ("prompts.py", "class_map = {'gtsrb': [1, 2]}\ntemplate_map = {}\n", "is not the toolkit's"),
    ("prompts.py", "class_map = {}\ntemplate_map = {'gtsrb': ['no braces']}\n", "'no braces' must have one {}"),
    ("prompts.py", "class_map = (\n", "is not the toolkit's"),
])
def test_a_wrong_file_of_the_suite_is_named(tmp_path, file, content, told):
    make_suite(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=re.escape(told)) as error:
        data.icinw(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_model_of_broken_weights_is_refused(checkpoint, tmp_path):
    """... and scores that are not numbers hit nothing."""
    assert top_k(torch.tensor([[torch.nan] * 3, [0.2, 0.1, 0.2]]), torch.tensor([0, 0]), 1) == 0.5
    state = torch.load(checkpoint[0], weights_only=True)
    state["model"]["visual.norm.bias"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(UserError, match="visual.norm.bias is finite"):
        main([str(tmp_path / "nan.pt")])


def test_wordnet_numbers_are_no_names(checkpoint, tmp_path):
    path, *_ = checkpoint
    for one in ("n01440764", "n01443537"):
        write_images(tmp_path / "in1k" / "val" / one, 2)
    spec = f"folder:{tmp_path / 'in1k'}"
    with pytest.raises(UserError, match="numbers of WordNet, such as n01440764"):
        main([str(path), "--data", spec])
    with pytest.raises(UserError, match="numbers of WordNet"):
        data.name_classes([data.open_data(spec, "val")])
    write_images(tmp_path / "kaggle" / "ILSVRC", 2)                                                 # its root
    with pytest.raises(UserError, match="has one class, ILSVRC, and nothing to tell it from"):
        main([str(path), "--data", f"folder:{tmp_path / 'kaggle'}"])
    lemmas = "n01440764\ttench\tTinca tinca\nn01443537\tgoldfish\nn09999999\tnowhere\n"       # more than there are
    (tmp_path / "in1k" / "classnames.txt").write_text(lemmas)
    result, = evaluated(path, "--data", spec, tmp_path=tmp_path)
    assert [entry["class"] for entry in result["per_class"]] == ["tench", "goldfish"]
    named, = data.name_classes([data.open_data(spec, "val")])
    assert {"a photo of a tench.", "a photo of a Tinca tinca."} < set(named.read(0).captions)


def test_table_of_the_suite():
    assert len(ICINW) == 20 and sum(images for _, _, _, images, _ in ICINW.values()) == 192677
    assert {metric for *_, metric in ICINW.values()} == {"accuracy", "mean per class", "ROC AUC", "11-point mAP"}


@pytest.mark.parametrize("arguments, words", [
    (["nowhere.pt"], ["no checkpoint at nowhere.pt"]),
    (["CHECKPOINT", "--data", "folder:nowhere"], ["nowhere"]),
    (["CHECKPOINT", "--data", "icinw:nowhere"], ["nowhere", "caltech_101_20211007"]),
    (["CHECKPOINT", "--data", "shapes", "--task", "icinw"], ["cannot open 'shapes' for icinw", "icinw:DIR"]),
    (["CHECKPOINT", "--data", "shapes:objects=2-3,val=16", "--task", "classes"], ["no image", "class"]),
    (["CHECKPOINT", "--templates", "9"], ["cannot read", "templates", "9"]),
    (["CHECKPOINT", "--templates", "a {} or {}"], ["one {}", "a {} or {}"]),
    (["CHECKPOINT", "--metric", "ROC AUC", "--data", "shapes:val=64", "--task", "classes"], ["two classes", "64"]),
    (["CHECKPOINT", "--classes", "CHECKPOINT"], ["class names", "utf-8"]),
    (["CHECKPOINT", "--classes", __file__], ["64 classes"]),
])
def test_mistakes_are_told_in_one_line(arguments, words, checkpoint):
    with pytest.raises(UserError) as error:
        main([str(checkpoint[0]) if word == "CHECKPOINT" else word for word in arguments])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(checkpoint, tmp_path):
    make_suite(tmp_path / "wild")
    specs = "shapes:val=67", karpathy("coco", tmp_path), f"icinw:{tmp_path / 'wild'}"       # 67: shares differ in size
    for processes in (0, 2):
        run_script("eval_zeroshot.py", checkpoint[0], *(word for spec in specs for word in ("--data", spec)),
                   "--batch-size", 16, "--device", "cpu", "--json", tmp_path / f"{processes}.json", processes=processes)
    one, two = ((tmp_path / f"{processes}.json").read_text() for processes in (0, 2))
    assert one == two


LAST_THREADS = """
import importlib, os, sys
sys.path.insert(0, sys.argv.pop(1))
script, status = sys.argv.pop(1), int(sys.argv.pop(1))
import train
def stopped(*_):
    raise SystemExit(status)
train.Guard.finish = stopped                    # as a signal stops it: with the frames of train() on the way out
try:
    train.run(importlib.import_module(script).main)
except SystemExit as end:
    assert end.code == status, end.code
names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
assert not [name for name in names if "gloo" in name], names
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="asks Linux for the names of threads")
@pytest.mark.parametrize("script, status, arguments", [
    ("eval_zeroshot", 0, ["CHECKPOINT", "--data", "shapes:val=20"]),
    ("train", 143, ["--steps", 2, "--batch-size", 8, "--data", "shapes:train=64", "--out", "OUT"]),
])
def test_no_thread_outlives_the_process_group(checkpoint, tmp_path, script, status, arguments):
    """A gloo thread that frees a tensor while Python ends aborts the process, rarely: so none may be left by then."""
    (tmp_path / "script.py").write_text(LAST_THREADS)
    arguments = [dict(CHECKPOINT=checkpoint[0], OUT=tmp_path / "run").get(word, word) for word in arguments]
    run_script(tmp_path / "script.py", ROOT, script, status, *arguments, "--device", "cpu", processes=2)


@pytest.mark.slow
@needs_shared
def test_real_pairs_and_photographs(checkpoint, tmp_path):
    shards = f"shards:{SHARED}/pairs/00002.tar"
    result, = evaluated(checkpoint[0], "--data", shards, "--out", tmp_path, tmp_path=tmp_path)
    assert result["images"] == result["texts"] == 855 and result["bad"] == 0
    result, = evaluated(checkpoint[0], "--data", f"folder:{SHARED}/imagefolder_photos", tmp_path=tmp_path)
    assert result["classes"] == 11 and result["templates"] == 1 and result["images"] == sum(
        1 for _ in (SHARED / "imagefolder_photos" / "val").glob("*/*.jpg"))
