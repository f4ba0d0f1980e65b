"""Each loss against a number worked out by hand or a slow loop written from its formula."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("B, scale", [
    (2, 1.0),       # two pairs, flat softmax
    (4, 14.3),      # the scale at the start of training
    (8, 100.0),     # the largest scale allowed
])
def test_contrastive_loss_of_perfect_pairs(B, scale):
    z = torch.eye(B, dtype=torch.float64)                   # each pair alike, all pairs at right angles
    want = math.log1p((B - 1) * math.exp(-scale))           # -log( e^s / (e^s + (B-1) e^0) )
    for loss in losses.contrastive_loss(z, z, scale):
        assert loss.item() == pytest.approx(want, rel=1e-5, abs=1e-12)


def test_contrastive_loss_against_a_loop():
    image, text, s = unit(5, 7, seed=1), unit(5, 7, seed=2), 3.0
    loss_i = loss_t = 0.0
    for i in range(5):
        e_i = [math.exp(s * float(image[i] @ text[j])) for j in range(5)]
        e_t = [math.exp(s * float(text[i] @ image[j])) for j in range(5)]
        loss_i, loss_t = loss_i - math.log(e_i[i] / sum(e_i)) / 5, loss_t - math.log(e_t[i] / sum(e_t)) / 5
    got_i, got_t = losses.contrastive_loss(image, text, s)
    assert (got_i.item(), got_t.item()) == (pytest.approx(loss_i, rel=1e-5), pytest.approx(loss_t, rel=1e-5))


@pytest.mark.parametrize("at_once", [1, 21, 49])             # numbers: one row of logits at a time, three, all seven
def test_contrastive_loss_in_chunks_is_that_of_all_logits(monkeypatch, at_once):
    inputs = [unit(7, 4, seed=1), unit(7, 4, seed=2), torch.tensor(9.0, dtype=torch.float64)]
    image, text, s = (x.requires_grad_() for x in inputs)
    logits, target = s * image @ text.T, torch.arange(7)
    want = 2 * F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)          # told apart by the factor
    monkeypatch.setattr(losses, "CONTRAST_LOGITS", at_once)
    loss_i, loss_t = losses.contrastive_loss(image, text, s)
    got = 2 * loss_i + loss_t
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))


def test_distillation_loss_against_a_loop():
    n, C, temp_s, temp_t = 5, 4, 0.1, 0.04
    student, teacher, center = unit(n, C, seed=3), unit(n, C, seed=4), unit(C, seed=5)
    total = 0.0
    for i in range(n):
        t = [math.exp(float(teacher[i, c] - center[c]) / temp_t) for c in range(C)]
        s = [math.exp(float(student[i, c]) / temp_s) for c in range(C)]
        total -= sum(t[c] / sum(t) * math.log(s[c] / sum(s)) for c in range(C)) / n
    got = losses.distillation_loss(student, teacher, temp_s, temp_t, center)
    assert got.item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 100])                # of seven: one at a time, uneven, all at once
def test_distillation_in_chunks_is_the_loss_of_all_logits(monkeypatch, rows):
    inputs = student, codes = unit(7, 4, seed=1).requires_grad_(), unit(5, 4, seed=2).requires_grad_()
    teacher, teacher_codes, center = unit(7, 4, seed=3), unit(5, 4, seed=4), unit(5, seed=5)
    want = losses.distillation_loss(student @ codes.T, teacher @ teacher_codes.T, 0.1, 0.04, center)
    monkeypatch.setattr(losses, "LOGIT_ROWS", rows)
    got = losses.distillation_in_chunks(student, codes, teacher, teacher_codes, 0.1, 0.04, center)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(2 * got, inputs), torch.autograd.grad(2 * want, inputs))


def test_distillation_loss_knows_its_bounds():
    teacher = 10.0 * torch.eye(4).repeat(2, 1, 1)                                       # (2, 4, 4), one sharp code each
    flat = losses.distillation_loss(torch.zeros(2, 4, 4), teacher)
    assert flat.item() == pytest.approx(math.log(4), rel=1e-5)                          # a student that says nothing
    assert losses.distillation_loss(teacher, teacher).item() < 1e-3                     # a student that is right


def test_no_gradient_reaches_the_teacher():
    student, teacher = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True)
    losses.distillation_loss(student, teacher).backward()
    losses.feature_loss(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None


def test_masked_language_loss_is_the_mean_over_its_words():
    logits, words = torch.randn(3, 7), torch.tensor([2, 0, 6])
    summed = -sum(logits[i].log_softmax(0)[word].item() for i, word in enumerate(words))
    assert losses.masked_language_loss(logits, words).item() == pytest.approx(summed / 3, rel=1e-5)
    of_all = losses.masked_language_loss(logits, words, torch.tensor(2.5))              # 3 here, 2 on another process
    assert of_all.item() == pytest.approx(summed / 2.5, rel=1e-5)
    for normalizer in (None, torch.tensor(0.0)):      # no 0/0 in a batch without words
        assert losses.masked_language_loss(logits[:0], words[:0], normalizer).item() == 0.0


def test_pixel_and_feature_loss_against_numpy():
    prediction, patches = torch.randn(2, 3, 12), torch.rand(2, 3, 12)

    def normalized(x, ddof, eps):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, ddof=ddof, keepdims=True) + eps)
    p, x = prediction.numpy(), patches.numpy()
    want = ((p - normalized(x, 1, 1e-6)) ** 2).mean()
    assert losses.pixel_loss(prediction, patches).item() == pytest.approx(float(want), rel=1e-5)
    want = ((normalized(p, 0, 1e-5) - normalized(x, 0, 1e-5)) ** 2).mean()
    assert losses.feature_loss(prediction, patches).item() == pytest.approx(float(want), rel=1e-5)


def test_patchify_puts_pixels_where_the_convolution_expects_them():
    images, conv = torch.randn(2, 3, 8, 12), torch.nn.Conv2d(3, 5, 4, stride=4)
    want = conv(images).flatten(2).transpose(1, 2)                                      # (2, 6, 5), row by row
    got = F.linear(losses.patchify(images, 4), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rows", [1, 3, 7, 100])        # chunks of one, uneven, exact, all at once
def test_sum_in_chunks_is_the_sum_with_its_gradient(rows):
    x, other = torch.randn(7, 4, requires_grad=True), torch.randint(5, (7,))
    table = torch.randn(5, 4, requires_grad=True)

    def fn(x, y, table):
        return F.cross_entropy(x @ table.T, y, reduction="sum")
    want = fn(x, other, table)
    want_grads = torch.autograd.grad(2 * want, [x, table])
    got = losses.sum_in_chunks(fn, rows, x, other, table)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(2 * got, [x, table]), want_grads):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(losses.sum_in_chunks(fn, rows, x, other, table), want)


def test_sum_in_chunks_of_nothing_is_zero_with_zero_gradient():
    x, table = torch.zeros(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = losses.sum_in_chunks(lambda x, y, t: (x @ t.T).sum(), 3, x, torch.zeros(0).long(), table)
    loss.backward()
    assert loss.item() == 0 and table.grad.abs().sum() == 0
