"""The systems that the paper compares with: each loss against its formula in loops, each model against its parts.

    python -m pytest tests/test_compared.py
"""
import json
import math
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import eval_zeroshot
import losses
import model
import train
from conftest import finish_script, on_processes, run_script, start_script
from model import COMPARED
from test_model import EOT, TOKENS, captions, tiny
from test_train import ALONE, metrics, trained


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape, seed=0):
    return F.normalize(normal(*shape, seed=seed), dim=-1)


# ------------------------------------------------------------------------------------------------------ losses
# Each: tensors of a joined batch, our loss, and its formula in loops.  Six pairs; of their captions, padded with rows
# of zeros, those of the second half have fewer tokens, as on another process.

LENGTHS = [2, 5, 3, 1, 3, 2]
LABELS = torch.tensor([7, -2, 7, -4, 7, -6])


def words():
    return unit(6, 5, 3, seed=4) * (torch.arange(5) < torch.tensor(LENGTHS)[:, None])[..., None]


def cross_entropy(scores: list, right: int):
    return torch.stack(scores).exp().sum().log() - scores[right]


def slow_simclr(a, b):
    total = 0.0
    for x, y in ((a, b), (b, a)):
        for i in range(6):
            scores = [x[i] @ y[j] / 0.1 for j in range(6)] + [x[i] @ x[j] / 0.1 for j in range(6) if j != i]
            total = total + cross_entropy(scores, i) / 12
    return total


def slow_simsiam(pa, pb, za, zb):
    za, zb = za.detach(), zb.detach()
    return -sum((p[i] / p[i].norm()) @ (z[i] / z[i].norm()) for p, z in ((pa, zb), (pb, za)) for i in range(6)) / 12


def slow_score(patches, words, text_queries):
    """One image, its patches (n, E), with one text, its words (l, E)."""
    queries, others = (words, patches) if text_queries else (patches, words)
    return torch.stack([torch.stack([q @ o for o in others]).max() for q in queries]).mean()


def slow_token(p, w, s, k=0):
    texts = [w[i, :n] for i, n in enumerate(LENGTHS)]
    images, few_texts, few_images = list(p), texts, list(p)
    if k:       # the columns keep k tokens: those with the largest sum of cosines with their own partner's
        sums = [[sum(x @ y for y in other) for x in one] for one, other in zip(texts, images)]
        few_texts = [t[torch.stack(v).argsort(descending=True)[:k]] for t, v in zip(texts, sums)]
        sums = [[sum(x @ y for y in other) for x in one] for one, other in zip(images, texts)]
        few_images = [i[torch.stack(v).argsort(descending=True)[:k]] for i, v in zip(images, sums)]
    return sum(cross_entropy([s * slow_score(images[i], few_texts[j], False) for j in range(6)], i) +
               cross_entropy([s * slow_score(few_images[j], texts[i], True) for j in range(6)], i)
               for i in range(6)) / 6


def slow_unicl(image, text, s):
    total = 0.0
    for x, y in ((image, text), (text, image)):
        for i in range(6):
            right = [k for k in range(6) if LABELS[k] == LABELS[i]]
            total = total + sum(cross_entropy([s * x[i] @ y[j] for j in range(6)], k) for k in right) / len(right) / 6
    return total


def scale():
    return torch.tensor(9.0, dtype=torch.float64)


LOSSES = {      # name: (tensors, ours(tensors, labels), loops(tensors))
    "simclr": ((unit(6, 4, seed=1), unit(6, 4, seed=2)), lambda x, y: losses.simclr_loss(*x), slow_simclr),
    "simsiam": (tuple(normal(6, 4, seed=i) for i in range(4)), lambda x, y: losses.simsiam_loss(*x), slow_simsiam),
    "token": ((unit(6, 4, 3, seed=3), words(), scale()), lambda x, y: sum(losses.token_contrastive_loss(*x)),
              slow_token),
    "token, top 2": ((unit(6, 4, 3, seed=3), words(), scale()),
                     lambda x, y: sum(losses.token_contrastive_loss(*x, top_k=2)), lambda *x: slow_token(*x, k=2)),
    "unicl": ((unit(6, 4, seed=1), unit(6, 4, seed=2), scale()),
              lambda x, y: sum(losses.unicl_loss(x[0], x[1], y, x[2])), slow_unicl),
}


def slow_result(name):
    tensors = [x.clone().requires_grad_() for x in LOSSES[name][0]]
    loss = LOSSES[name][2](*tensors)
    grads = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
    return loss.detach(), [g for g in grads]


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_its_formula_with_its_gradient(name, monkeypatch):
    monkeypatch.setattr(losses, "TOKEN_SCORES", 50)             # FILIP's similarity in many chunks
    tensors = [x.clone().requires_grad_() for x in LOSSES[name][0]]
    loss = LOSSES[name][1](tensors, LABELS)
    loss.backward()
    want, grads = slow_result(name)
    torch.testing.assert_close(loss.detach(), want)
    for x, g in zip(tensors, grads):
        torch.testing.assert_close(torch.zeros_like(x) if x.grad is None else x.grad, g)


def losses_of_half(rank, world):
    """Loss and gradients of this process's half of the tensors of every loss."""
    rows, results = slice(3 * rank, 3 * rank + 3), {}
    for name, (tensors, ours, _) in LOSSES.items():
        mine = [x[rows].clone() if x.ndim else x.clone() for x in tensors]
        if name.startswith("token"):
            mine[1] = mine[1][:, :max(LENGTHS[rows])]                       # as each process pads its own captions
        mine = [x.requires_grad_() for x in mine]
        loss = ours(mine, LABELS[rows])
        loss.backward()
        results[name] = loss.detach(), [torch.zeros_like(x) if x.grad is None else x.grad for x in mine]
    return results


@pytest.mark.slow
def test_two_processes_make_the_same_loss_and_gradient(tmp_path):
    parts = on_processes(losses_of_half, 2, tmp_path)
    for name in LOSSES:
        want, grads = slow_result(name)
        torch.testing.assert_close((parts[0][name][0] + parts[1][name][0]) / 2, want)
        for a, b, g in zip(parts[0][name][1], parts[1][name][1], grads):
            if name.startswith("token") and g.shape == (6, 5, 3):
                b = F.pad(b, (0, 0, 0, 2))
            got = torch.cat([a, b]) / 2 if g.ndim else (a + b) / 2
            torch.testing.assert_close(got, g, msg=lambda m: f"{name}: {m}")


def test_unicl_with_distinct_labels_is_clips_loss():
    image, text = unit(6, 4, seed=1).requires_grad_(), unit(6, 4, seed=2).requires_grad_()
    clip = losses.contrastive_loss(image, text, 9.0)
    unicl = losses.unicl_loss(image, text, torch.arange(6).flip(0), 9.0)
    assert [x.item() for x in unicl] == pytest.approx([x.item() for x in clip], rel=1e-14)      # a sum's order
    for a, b in zip(torch.autograd.grad(sum(unicl), [image, text]), torch.autograd.grad(sum(clip), [image, text])):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_filip_similarity_takes_a_mask_and_gives_a_text_without_words_no_image():
    p, w = unit(2, 4, 3, seed=1), unit(3, 5, 3, seed=2)
    is_word = torch.arange(5) < torch.tensor([5, 2, 0])[:, None]
    to_text, to_image = losses.filip_similarity(p, w, is_word)
    for i in range(2):
        for t, n in enumerate([5, 2]):
            assert to_text[i, t].item() == pytest.approx(slow_score(p[i], w[t, :n], False).item())
            assert to_image[i, t].item() == pytest.approx(slow_score(p[i], w[t, :n], True).item())
    assert (to_text[:, 2] < -1).all() and (to_image[:, 2] == 0).all()
    masked = losses.filip_similarity(p, w * is_word[..., None])             # rows of zeros are no words
    torch.testing.assert_close(masked, (to_text, to_image))


class Largest(TorchDispatchMode):
    """The most numbers that any tensor of any operation has."""
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers] + [x.numel() for x in tree_leaves(out) if torch.is_tensor(x)])
        return out


def test_memory_of_the_token_similarity_is_bounded_backward_too(monkeypatch):
    monkeypatch.setattr(losses, "TOKEN_SCORES", 2000)
    p, w = unit(12, 9, 4, seed=1).requires_grad_(), unit(12, 7, 4, seed=2).requires_grad_()     # 9072 cosines
    kept = 0

    def note(x):
        nonlocal kept
        kept = max(kept, x.numel())
        return x
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        sum(losses.token_contrastive_loss(p, w, 9.0)).backward()
    assert 500 < largest.numbers <= 2000, "the cosines exist all at once"
    assert kept <= 12 * 9 * 4, "the cosines are kept for the backward pass"


# ------------------------------------------------------------------------------------------------------ models

def raw_batch(B=6):
    generator = torch.Generator().manual_seed(0)
    pixels = {name: torch.randint(256, (B, 3, 32, 32), dtype=torch.uint8, generator=generator)
              for name in ("images", "view1", "view2")}
    return dict(pixels, tokens=captions([3, 5, 8, 1, 2, 4][:B]), tokens2=captions([2, 5, 7, 1, 2, 4][:B]))


def prepared(net, count=1, **more):
    return train.micro_batches(train.hide(dict(raw_batch(), **more), net.config, TOKENS, 0, 3), count, ALONE.device)


@pytest.mark.parametrize("method", COMPARED)
def test_every_parameter_is_trained_and_both_passes_agree(method):
    net = tiny(method, drop_path=0.5)                           # both passes skip the same blocks
    (batch,) = prepared(net)
    torch.manual_seed(0)
    features, terms = net(batch)
    torch.manual_seed(0)
    torch.testing.assert_close(features, net.encode(batch))
    net.total_loss(**terms, **net.contrast(features)).backward()
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("method, terms, want, in_log", [
    ("slip", dict(L_I=1.0, L_T=2.0, simclr=10.0), 3 + 2 * 10, ["contrastive", "simclr"]),
    ("filip", dict(token=10.0), 3 * 10, ["token"]),
    ("declip", dict(L_I=1.0, L_T=2.0, L_MLM=10.0, neighbor=100.0, simsiam=1000.0),
     5 * 3 + 7 * 10 + 11 * 100 + 13 * 1000, ["contrastive", "mlm", "neighbor", "simsiam"]),
    ("defilip", dict(L_I=1.0, L_T=2.0, L_MLM=10.0, neighbor=100.0, simsiam=1000.0, token=10_000.0),
     5 * 3 + 7 * 10 + 11 * 100 + 13 * 1000 + 3 * 10_000, ["contrastive", "mlm", "neighbor", "simsiam", "token"]),
])
def test_total_loss_is_the_weighted_sum(method, terms, want, in_log):
    net = tiny(method, simclr_weight=2.0, token_weight=3.0, contrastive_weight=5.0, mlm_weight=7.0,
               neighbor_weight=11.0, simsiam_weight=13.0)
    assert net.total_loss(**terms) == want and list(net.named(terms)) == in_log
    assert net.total_loss() == 0
    with pytest.raises(TypeError):                              # a term without a weight is no term
        net.total_loss(**terms, pixel=1.0)


def test_slip_is_clip_and_the_contrast_of_its_views():
    net, (batch,) = tiny("slip", contrastive_reduction="mean"), prepared(tiny("slip"))
    terms = net.contrast(net(batch)[0])
    clip = losses.contrastive_loss(net.encode_image(batch["images"]), net.encode_text(batch["tokens"]), 1 / 0.07)
    torch.testing.assert_close((terms["L_I"], terms["L_T"]), tuple(x / 2 for x in clip))
    a, b = (batch_normed(net.head, net.visual(batch[view])[:, 0]) for view in ("view1", "view2"))
    torch.testing.assert_close(terms["simclr"], losses.simclr_loss(F.normalize(a, dim=1), F.normalize(b, dim=1)))


def doubled(net):
    """net in float64, and a batch of six pairs for it"""
    (batch,) = prepared(net)
    return net.double(), {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


def gradients(net, loss):
    """Of every parameter, zeros where there is none"""
    grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, materialize_grads=True)
    return {name: g for (name, _), g in zip(net.named_parameters(), grads)}


def test_a_step_of_slip_is_that_of_its_own_definitions():
    """Loss and all gradients, pair by pair in loops, from what SLIP's models.py and losses.py say."""
    net, batch = doubled(tiny("slip", contrastive_reduction="mean"))
    loss = net.total_loss(**net.contrast(net(batch)[0]))

    def cosine(x, y):
        return x @ y / (x.norm() * y.norm())
    h = {name: [net.visual(picture[None])[0, 0] for picture in batch[name]] for name in ("images", "view1", "view2")}
    image = [net.image_proj.weight @ x for x in h["images"]]
    text = [net.text_proj.weight @ net.text(row[None], EOT)[0, row.tolist().index(EOT)] for row in batch["tokens"]]
    want, s = 0.0, net.logit_scale.exp()
    for x, y in ((image, text), (text, image)):                 # CLIPLoss: the mean of both directions
        for i in range(6):
            want = want + cross_entropy([s * cosine(x[i], y[j]) for j in range(6)], i) / 12
    a, b = (batch_normed(net.head, torch.stack(h[view])) for view in ("view1", "view2"))    # each view by itself
    for x, y in ((a, b), (b, a)):                               # SIMCLRLoss: the other view among 11
        for i in range(6):
            scores = [cosine(x[i], y[j]) / 0.1 for j in range(6)]
            scores += [cosine(x[i], x[j]) / 0.1 for j in range(6) if j != i]
            want = want + cross_entropy(scores, i) / 12
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(net, loss), gradients(net, want), rtol=1e-9, atol=1e-12)


def test_slip_without_its_contrast_is_clip():
    """The same crops and captions; the same gradients but for the order of sums, as a batch of 3B rounds otherwise."""
    world = data.ShapesWorld(count=4, size=32)
    clip, slip = (train.PairTransform(train.parse_train_options(["--method", method]), world)
                  for method in ("clip", "slip"))
    for i in range(4):
        a, b = (pair(world.read(i), np.random.default_rng(i)) for pair in (clip, slip))
        assert torch.equal(a["images"], b["images"]) and a["captions"] == b["captions"]
    (clip, batch), (slip, with_views) = doubled(tiny("clip")), doubled(tiny("slip", simclr_weight=0.0))
    want, got = (gradients(net, net.total_loss(**net.contrast(net(x)[0])))
                 for net, x in ((clip, batch), (slip, with_views)))
    assert all(not g.any() for name, g in got.items() if name.startswith("head."))
    torch.testing.assert_close({name: got[name] for name in want}, want, rtol=1e-9, atol=1e-12)


def batch_normed(head, x):
    """A head by hand: linear layers, norms of the batch's own mean and variance, ReLU."""
    for layer in head:
        if isinstance(layer, torch.nn.Linear):
            x = x @ layer.weight.T + (0 if layer.bias is None else layer.bias)
        elif isinstance(layer, torch.nn.ReLU):
            x = x.clamp(min=0)
        else:
            x = (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + layer.eps).sqrt() * layer.weight + layer.bias
    return x


@pytest.mark.parametrize("method", ["declip", "defilip"])
def test_declip_is_the_sum_of_its_parts(method):
    net, (batch,) = tiny(method, contrastive_reduction="mean", token_top_k=0), prepared(tiny(method))
    features, terms = net(batch)
    terms.update(net.contrast(features))
    views = [net.visual(batch[name]) for name in ("images", "view2")]
    z = [net.image_proj(x[:, 0]) for x in views]
    images = [F.normalize(x, dim=1) for x in z]
    texts = [net.encode_text(batch["corrupted"]), net.encode_text(batch["tokens2"])]
    scale = net.logit_scale.exp()
    torch.testing.assert_close(terms["L_I"] + terms["L_T"], sum(
        sum(losses.contrastive_loss(i, t, scale)) / 2 for i in images for t in texts) / 4)
    nearest = [torch.stack([max(net.queue, key=lambda q: (q @ x).item()) for x in t]) for t in texts]
    torch.testing.assert_close(terms["neighbor"], sum(
        F.cross_entropy(scale * i @ t.T, torch.arange(6)) for i in images for t in nearest) / 4)
    z = [batch_normed(net.projector, x) for x in z]
    p = [batch_normed(net.predictor, x) for x in z]
    torch.testing.assert_close(terms["simsiam"], losses.simsiam_loss(*p, *z))
    masked = net.text(batch["corrupted"], EOT).flatten(0, 1)[batch["chosen"]]
    right = batch["tokens"].flatten()[batch["chosen"]]
    torch.testing.assert_close(terms["L_MLM"], F.cross_entropy(net.word_classifier(masked), right))
    if method == "defilip":
        patches = [F.normalize(net.patch_proj(x[:, 1:]), dim=-1) for x in views]
        words = [F.normalize(net.word_proj(net.text(batch[name], EOT)), dim=-1) * is_word(batch[name])[..., None]
                 for name in ("corrupted", "tokens2")]
        torch.testing.assert_close(terms["token"], sum(sum(losses.token_contrastive_loss(
            p, w, net.token_logit_scale.exp())) / 2 for p in patches for w in words) / 4)


def is_word(tokens):
    """Between the start and the end token, by looking for them."""
    rows = [row.tolist() for row in tokens]
    return torch.tensor([[0 < i < row.index(EOT) for i in range(len(row))] for row in rows])


def test_filips_tokens_are_patches_and_words():
    net, tokens = tiny("filip").eval(), captions([3, 6])
    text = net.encode_text(tokens)
    assert torch.equal(text.any(dim=-1), is_word(tokens))
    assert text[is_word(tokens)].norm(dim=-1).sub(1).abs().max() < 1e-5
    assert net.encode_image(torch.randn(2, 3, 32, 32)).shape == (2, 16, net.config.token_dim)


def test_queue_is_first_in_first_out():
    net = tiny("declip", queue_size=7)
    texts, before = unit(9, 16).float(), net.queue.clone()
    for start, want in ((0, [0, 1, 2, 3]), (4, [7, 1, 2, 3, 4, 5, 6])):     # the second batch goes round the corner
        net.newest = [texts[start:start + 2], texts[start + 2:start + 4]]
        net.after_update()
        torch.testing.assert_close(net.queue, torch.cat([texts[want], before[len(want):]]))
    assert net.oldest == 1
    net.newest = [texts]                                                    # more than there is room for: the last
    net.after_update()
    assert torch.equal(net.queue.sort(dim=0).values, texts[2:].sort(dim=0).values)


# ------------------------------------------------------------------------------------------------------ recipes

@pytest.mark.parametrize("arguments, want", [
    ("--preset vit-b16-yfcc15m --method slip", dict(lr=3e-3, weight_decay=0.1, epochs=25, view_crop_min=0.08)),
    ("--preset vit-b32-yfcc15m --method filip", dict(lr=5e-4, weight_decay=0.5, epochs=32, token_weight=1.0)),
    ("--preset vit-b32-yfcc15m --method declip", dict(contrastive_weight=0.4, mlm_weight=0.2, word_ratio=0.15)),
    ("--preset vit-b32-yfcc15m --method defilip", dict(lr=1e-3, token_weight=0.2, simsiam_weight=0.2, token_top_k=16)),
    ("--preset vit-b16-yfcc15m --method slip --lr 1", dict(lr=1, weight_decay=0.1)),        # what is said goes first
    ("--method filip", dict(lr=1e-3, weight_decay=0.1, epochs=6, contrastive_reduction="mean")),     # pocket
    ("--preset vit-b16-yfcc15m", dict(lr=1e-3, mlm_weight=0.05, contrastive_reduction="sum")),  # the paper's own
])
def test_recipes(arguments, want):
    options = train.parse_train_options(arguments.split())
    assert {name: getattr(options, name) for name in want} == want


# ------------------------------------------------------------------------------------------------------ views, captions

def photo():
    y, x = np.mgrid[:60, :80]
    pixels = np.stack([x * 3, y * 4, 128 + 100 * np.sin(x / 5) * np.cos(y / 7)], axis=-1)
    pixels += np.random.default_rng(0).normal(0, 8, pixels.shape)
    return PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_edited_captions():
    rng, caption = np.random.default_rng(0), "one two three four five six"
    edits = [data.edit_caption(caption, rng, {}).split() for _ in range(2000)]
    deleted = [e for e in edits if len(e) < 6]
    swapped = [e for e in edits if len(e) == 6 and " ".join(e) != caption]
    assert all(set(e) < set(caption.split()) for e in deleted)
    assert all(sum(a != b for a, b in zip(e, caption.split())) == 2 for e in swapped)
    assert all(sorted(e) == sorted(caption.split()) for e in swapped)
    assert len(deleted) / 2000 == pytest.approx(0.5 * (1 - 0.9 ** 6), abs=0.04)
    assert len(swapped) / 2000 == pytest.approx(0.5 * 5 / 6, abs=0.04)
    synonyms = {"two": ["both", "couple"]}
    edits = [data.edit_caption(caption, rng, synonyms) for _ in range(900)]
    for other in synonyms["two"]:
        assert edits.count(caption.replace("two", other)) / 900 == pytest.approx(1 / 6, abs=0.05)
    assert data.edit_caption("alone", rng, {}) == "alone"       # never empty


def test_synonyms_are_read_from_a_file(tmp_path):
    (tmp_path / "words.txt").write_text("small, little, tiny\n\nBig, large\n")
    synonyms = data.read_synonyms(str(tmp_path / "words.txt"))
    assert synonyms["little"] == ["small", "tiny"] and synonyms["big"] == ["large"] and synonyms["large"] == ["Big"]
    (tmp_path / "words.txt").write_text("small\n")
    with pytest.raises(data.UserError, match="two words"):
        data.read_synonyms(str(tmp_path / "words.txt"))


# ------------------------------------------------------------------------------------------------------ UniCL's data

@pytest.fixture
def zoo(tmp_path):
    for folder, classes in (("zoo", "cat dog"), ("birds", "owl"), ("zoo2", "cat dog")):
        for name in classes.split():
            home = tmp_path / folder / name
            home.mkdir(parents=True)
            for i in range(3):
                pixels = np.random.default_rng(i).integers(256, size=(32, 32, 3), dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(home / f"{i}.png")
    return tmp_path


def test_folders_become_pairs_with_labels_of_their_own(zoo):
    specs = ["shapes:train=4,objects=1-1", *(f"folder:{zoo / name}" for name in ("zoo", "birds", "zoo2"))]
    mixed = train.open_mixed(specs, "train", "captions", 32)
    assert mixed.names_classes and not train.open_mixed(specs[:1] * 2, "train", "captions", 32).names_classes
    samples = [mixed.read(i) for i in range(len(mixed))]
    assert [s.text_label for s in samples] == [-1] * 4 + [0] * 3 + [1] * 3 + [2] * 3 + [0] * 3 + [1] * 3
    assert samples[7].captions == tuple(t.format("dog") for t in data.TEMPLATES_80)
    transform = train.PairTransform(train.TrainOptions(image_size=32), mixed)
    drawn = {transform(samples[7], np.random.default_rng(i))["captions"] for i in range(50)}
    assert 20 < len(drawn) and all("dog" in caption for caption in drawn)


def test_pairs_are_classes_of_their_own_on_every_process():
    net, labels = tiny("clip"), torch.tensor([-1, 4, -1, 4])
    halves = [dict(images=torch.zeros(2, 3, 32, 32), labels=half) for half in labels.split(2)]
    batches = [train.hide(half, net.config, TOKENS, 0, 0, rank, 2) for rank, half in enumerate(halves)]
    joined = torch.cat([batch["labels"] for batch in batches])
    assert joined[1] == joined[3] == 4 and len(joined.unique()) == 3 and (joined[[0, 2]] < 0).all()


@pytest.mark.parametrize("method", ["maskclip", "slip"])
@pytest.mark.parametrize("count", [1, 3])
def test_labels_reach_the_contrast_whatever_the_micro_batches(method, count):
    net, parts = tiny(method), prepared(tiny(method), count, labels=LABELS)
    teacher = model.Teacher(net) if method == "maskclip" else None
    terms, _ = (train.backward(net, net, teacher, parts[0], ALONE) if count == 1 else
                train.backward_in_parts(net, net, teacher, parts, ALONE))
    image, text = net.encode_image(data.normalize(raw_batch()["images"])), net.encode_text(raw_batch()["tokens"])
    for name, want, other in zip(("L_I", "L_T"), losses.unicl_loss(image, text, LABELS, net.logit_scale.exp()),
                                 losses.contrastive_loss(image, text, net.logit_scale.exp())):
        torch.testing.assert_close(terms[name], want.detach())
        assert not torch.allclose(terms[name], other)


def test_labeled_folders_train_beside_pairs(zoo, capsys):
    arguments = "--data", "shapes:train=200", "--data", f"folder:{zoo / 'zoo'}", "--steps", 2, "--out", zoo / "run"
    trained(*arguments, "--method", "clip")
    assert len(metrics(zoo / "run")) == 2
    with pytest.raises(data.UserError, match="choose another method"):
        trained(*arguments, "--method", "filip")


# ------------------------------------------------------------------------------------------------------ runs

def test_queue_holds_the_texts_of_good_steps_only(tmp_path, capsys):
    trained("--method", "declip", "--steps", 4, "--lr", 1e30, "--lr-end", 1e30, "--lr-start", 1e-3, "--queue-size", 500,
            "--epochs", 1, "--out", tmp_path)
    state = train.load_state(tmp_path / "last.pt")["model"]
    skipped = capsys.readouterr().err.count("update skipped")
    assert skipped in (1, 2, 3) and state["oldest"] == (4 - skipped) * 2 * 24 and state["queue"].isfinite().all()


@pytest.fixture(scope="module", params=COMPARED)
def finished(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    trained("--method", request.param, "--steps", 2, "--out", out)
    return request.param, out


def test_checkpoints_load_and_evaluate(finished, tmp_path):
    method, out = finished
    net, tokenizer, config = train.load_checkpoint(out / "last.pt")
    assert type(net) is COMPARED[method] and config.method == method
    eval_zeroshot.main([str(out / "last.pt"), "--data", "shapes:val=70", "--json", str(tmp_path / "r.json")])
    classes, retrieval = json.loads((tmp_path / "r.json").read_text())["results"]
    world = data.ShapesWorld(split="val", count=70, size=32, objects=(1, 1))
    images = data.normalize(torch.stack([data.to_tensor(world.read(i).image) for i in range(70)]))
    with torch.no_grad():
        image = net.encode_image(images)
        texts = [net.encode_text(tokenizer([f"a {name}"], 32))[0] for name in world.classes]
    if method == "filip":
        score = torch.stack([(image @ t[t.any(dim=1)].T).amax(dim=2).mean(dim=1) for t in texts], dim=1)
    else:
        score = image @ torch.stack(texts).T
    right = (score.argmax(dim=1) == torch.arange(70) % 64).double().mean().item()
    assert classes["top1"] == pytest.approx(right, abs=1 / 70 + 1e-9)       # of two classes as good as equal, another
    assert retrieval["images"] == 70


def test_filips_scores_are_exact_in_any_chunk_and_averaged_over_prompts(monkeypatch):
    net, tokenizer = tiny("filip").eval(), data.BytePairTokenizer([])
    images, texts = unit(9, 16, 8, seed=1).float(), unit(20, 6, 8, seed=2).float()
    texts[10:] = texts[:10]                                                 # ties
    image_of_text = torch.arange(20) % 9
    whole = [losses.similarity(eval_zeroshot.exact(images), eval_zeroshot.exact(texts), way) for way in (False, True)]
    want = dict(image_to_text=eval_zeroshot.recall_at_k(whole[0], image_of_text)["image_to_text"],
                text_to_image=eval_zeroshot.recall_at_k(whole[1], image_of_text)["text_to_image"])
    assert torch.equal(whole[0][:, 10:], whole[0][:, :10]) and not torch.allclose(*whole)
    for scores, tokens in ((7, 1 << 24), (40, 300), (1 << 23, 97)):
        monkeypatch.setattr(eval_zeroshot, "SCORES", scores)
        monkeypatch.setattr(losses, "TOKEN_SCORES", tokens)
        assert eval_zeroshot.recall_in_chunks(images, texts, image_of_text) == want
        again = losses.similarity(eval_zeroshot.exact(images), eval_zeroshot.exact(texts))
        assert torch.equal(again, whole[0])
    p, w = eval_zeroshot.exact(unit(30, 500, 8).abs().float()), eval_zeroshot.exact(unit(1, 9, 8, seed=1).abs().float())
    best = (p @ w[0].T).amax(dim=2)                                         # (30, 500), all near 1
    assert losses.similarity(p, w)[:, 0].tolist() == [math.fsum(row) / 500 for row in best.tolist()]    # not rounded
    net = model.build(replace(net.config, vocab_size=tokenizer.vocab_size, context_length=24), tokenizer.eot)
    prompts = eval_zeroshot.embed_classes(net, tokenizer, ["ox", "cow\tcalf"], ("a {}", "the {}"), ALONE, 3)
    assert [len(p) for p in prompts] == [2, 4]
    dense = net.encode_classes(["ox", "cow\tcalf"], ("a {}", "the {}"), tokenizer)           # for patches, in dense.py
    torch.testing.assert_close(dense, torch.stack([F.normalize(p.sum(dim=(0, 1)), dim=0) for p in prompts]))


@pytest.mark.slow
@pytest.mark.parametrize("method", COMPARED)
def test_one_step_at_full_scale(method, tmp_path):
    for k in range(4):
        photo().save(tmp_path / f"{k}.png")
    (tmp_path / "pairs.csv").write_text("filepath,title\n" + "".join(f"{k}.png,a picture of waves\n" for k in range(4)))
    out = run_script("train.py", "--preset", "vit-b32-yfcc15m", "--method", method, "--batch-size", 4, "--steps", 1,
                     "--data", f"csv:{tmp_path / 'pairs.csv'}", "--log-every", 1, "--out", tmp_path / "run").stdout
    assert "step 1/1" in out and math.isfinite(metrics(tmp_path / "run")[0]["grad_norm"])
    (tmp_path / "run" / "last.pt").unlink()                     # gigabytes


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of a short run of each, all at once"""
    folders = {method: tmp_path_factory.mktemp(method) for method in COMPARED}
    running = [start_script("train.py", "--method", method, "--steps", 100, "--batch-size", 32, "--image-size", 32,
                            "--out", folder) for method, folder in folders.items()]
    for process in running:
        finish_script(process, timeout=900)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("method", COMPARED)
def test_learns_at_pocket_scale(method, learned):
    net, tokenizer, _ = train.load_checkpoint(learned[method] / "last.pt")
    guess, label = train.guess_classes(net, tokenizer, ALONE, data.ShapesWorld("val", 1024, 32, objects=(1, 1)))
    color, both = (hit.double().mean().item() for hit in (guess // 8 == label // 8, guess == label))
    assert color > 0.3 and both > 0.04, (color, both)                           # chance: 0.125, 0.016
