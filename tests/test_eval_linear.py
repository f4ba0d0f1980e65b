"""Linear probing: LARS against plain loops, the head against scikit-learn, and the program from end to end.

    python -m pytest tests/test_eval_linear.py
"""
import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED, needs_shared, run_script
from test_eval_zeroshot import checkpoint, write_images                                             # noqa: F401

import eval_linear
from data import UserError
from eval_linear import LARS, Options, main, make_head, recipe, stored_batches, train_head


# ------------------------------------------------------------------------------------------------------ LARS

def plain_lars(w, grads, lr, momentum, weight_decay):
    """The rule number by number: w (list of rows, or list) after a step for each gradient of the same form."""
    is_matrix = isinstance(w[0], list)
    rows = [list(row) for row in w] if is_matrix else [list(w)]
    mu = [[0.0] * len(row) for row in rows]
    for grad in grads:
        g = [list(row) for row in grad] if is_matrix else [list(grad)]
        if is_matrix:
            g = [[a + weight_decay * b for a, b in zip(*pair)] for pair in zip(g, rows)]
            w_norm, g_norm = (math.sqrt(sum(a * a for row in x for a in row)) for x in (rows, g))
            trust = 0.001 * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
            g = [[a * trust for a in row] for row in g]
        mu = [[momentum * m + a for m, a in zip(*pair)] for pair in zip(mu, g)]
        rows = [[b - lr * m for b, m in zip(*pair)] for pair in zip(rows, mu)]
    return rows if is_matrix else rows[0]


@pytest.mark.parametrize("shape, lr, momentum, weight_decay, what", [
    ((4, 5), 6.4, 0.9, 0.0, "the paper's probe"),
    ((4, 5), 0.3, 0.9, 1e-2, "decay comes before the scaling, so it changes |g|"),
    ((5,), 0.3, 0.9, 1e-2, "a bias is neither scaled nor decayed"),
    ((3, 2), 0.1, 0.0, 0.0, "no momentum"),
    ((3, 2), 0.1, 0.9, 0.0, "zero weights: not scaled"),
    ((3, 2), 0.1, 0.9, 0.0, "zero gradient: the buffer moves on"),
])
def test_lars_equals_plain_loops(shape, lr, momentum, weight_decay, what):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator, dtype=torch.float64) * ("zero weights" not in what)
    grads = torch.randn(7, *shape, generator=generator, dtype=torch.float64)
    if "zero gradient" in what:
        grads[1] = grads[4] = 0
    p = torch.nn.Parameter(w.clone())
    optimizer = LARS([p], lr, momentum, weight_decay)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        assert torch.equal(p.grad, g), "a gradient may be looked at after the step"
    want = plain_lars(w.tolist(), grads.tolist(), lr, momentum, weight_decay)
    torch.testing.assert_close(p.detach(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-6)


def test_lars_state_survives_a_checkpoint_and_idle_parameters():
    w, idle = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = LARS([w, idle], lr=0.1, momentum=0.9, weight_decay=0.0)
    w.grad = torch.ones(2, 2)
    optimizer.step()
    twin = torch.nn.Parameter(w.detach().clone())
    other = LARS([twin, torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9, weight_decay=0.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin.grad = w.grad.clone()
    optimizer.step(), other.step()
    assert torch.equal(twin, w) and torch.equal(idle, torch.ones(2))


# ------------------------------------------------------------------------------------------------------ recipe and head

@pytest.mark.parametrize("records, given, batch_size, lr", [
    (1_281_167, {}, 16384, 6.4),                         # the paper
    (1_281_167, {"batch_size": 4096}, 4096, 1.6),        # scaled with the batch: 0.1 for each 256
    (4096, {}, 512, 6.4),                                # few records
    (78, {}, 9, 6.4),                                    # very few
    (4096, {"batch_size": 64, "lr": 2.0}, 64, 2.0),
])
def test_recipe(records, given, batch_size, lr):
    assert recipe(Options(**given), records) == (batch_size, pytest.approx(lr))


def test_defaults_are_the_papers():
    assert (Options.epochs, Options.feature, Options.lr) == (90, "auto", 6.4)


def test_head_normalizes_over_the_batch_and_has_no_scale_of_its_own():
    head = make_head(6, 3, seed=0)
    assert [name for name, _ in head.named_parameters()] == ["1.weight", "1.bias"]
    assert not head[1].bias.any() and 0.002 < head[1].weight.std() < 0.02
    x = 5 + 3 * torch.randn(64, 6)
    want = (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-6).sqrt() @ head[1].weight.T
    torch.testing.assert_close(head(x), want)


def test_stored_batches_see_each_record_once_an_epoch_and_none_twice():
    label = torch.arange(23)
    batches = [y.tolist() for _, y in stored_batches(label[:, None].float(), label, 5, epochs=3, seed=1)]
    assert [len(y) for y in batches] == [5] * 12
    epochs = [sum(batches[i:i + 4], []) for i in (0, 4, 8)]
    assert all(len(set(epoch)) == 20 for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]


def test_head_finds_what_logistic_regression_finds():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is a peer for tests only")
    rng = np.random.default_rng(0)
    centers, label = rng.normal(size=(5, 8)), rng.integers(0, 5, 1200)
    x = (3 + centers[label] + 0.9 * rng.normal(size=(1200, 8))).astype(np.float32)
    peer = linear_model.LogisticRegression(max_iter=500).fit(x[:800], label[:800]).score(x[800:], label[800:])
    features, y = torch.from_numpy(x), torch.from_numpy(label)
    head = make_head(8, 5, seed=0)
    train_head(head, stored_batches(features[:800], y[:800], 100, 90, seed=0), 720, 0, 6.4)
    with torch.no_grad():
        ours = (head(features[800:]).argmax(dim=1) == y[800:]).double().mean().item()
    assert peer > 0.6 and ours == pytest.approx(peer, abs=0.03)


def test_unknown_labels_teach_nothing():
    x, y = torch.randn(8, 4), torch.tensor([0, 1, 2, 0, 1, 2, -1, -1])
    head, fresh = (make_head(4, 3, seed=0) for _ in range(2))
    train_head(head, iter([(x, y)]), 1, 0, 1.0)
    fresh.zero_grad()
    F.cross_entropy(fresh(x)[:6], y[:6]).backward()
    torch.testing.assert_close(head[1].bias, -fresh[1].bias.grad)


# ------------------------------------------------------------------------------------------------------ the program

def probed(*arguments, tmp_path):
    main([*map(str, arguments), "--json", str(tmp_path / "results.json"), "--device", "cpu"])
    return json.loads((tmp_path / "results.json").read_text())["results"]


def test_frozen_backbone_and_control(checkpoint, tmp_path, monkeypatch):              # noqa: F811
    seen, probe = [], eval_linear.probe

    def spy(model, *rest):
        before = {name: p.clone() for name, p in model.state_dict().items()}
        result = probe(model, *rest)
        same = all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
        seen.append(same and not model.training)
        return result
    monkeypatch.setattr(eval_linear, "probe", spy)
    results = probed(checkpoint[0], "--data", "shapes:train=256,val=64", "--control", "--epochs", 4, tmp_path=tmp_path)
    assert seen == [True, True], "a backbone changed, or is not in evaluation mode"
    assert results["checkpoint"].keys() == results["untrained"].keys()
    assert results["checkpoint"]["images"] == 64 and results["checkpoint"]["steps"] == 4 * 8


@pytest.mark.parametrize("options, warmup_steps, said", [
    ([], 2, "one crop an image, not the paper's --augment, 18 steps of 32, learning rate 6.4 after 2 of them"),
    (["--augment"], 2, "random crops in each epoch, 18 steps of 32"),           # MAE's 10 of 90 epochs, in proportion
    (["--feature", "mean", "--warmup-epochs", 0], 0, "(feature mean, one crop"),
    (["--augment", "--warmup-epochs", 1], 2, "learning rate 6.4 after 2 of them"),
])
def test_ways_to_probe(options, warmup_steps, said, checkpoint, tmp_path, capsys):    # noqa: F811
    r = probed(checkpoint[0], "--data", "shapes:train=64,val=32", "--epochs", 9, "--batch-size", 32, *options,
               tmp_path=tmp_path)["checkpoint"]
    assert (r["steps"], r["warmup_steps"], r["augment"]) == (9 * 2, warmup_steps, "--augment" in options)
    assert 0 <= r["top1"] <= 1 and said in capsys.readouterr().out


@pytest.mark.slow
def test_colors_are_learned_from_a_folder(checkpoint, tmp_path):                      # noqa: F811
    """Dark and bright noise: even an untrained tower separates these.  One image is broken, and left out."""
    import PIL.Image
    for split, count in (("train", 24), ("val", 8)):
        for name, level in (("dark", 0), ("bright", 128)):
            write_images(tmp_path / "zoo" / split / name, count, seed=level)
            for path in (tmp_path / "zoo" / split / name).iterdir():
                pixels = np.asarray(PIL.Image.open(path)) // 2 + level
                PIL.Image.fromarray(pixels.astype(np.uint8)).save(path)
    (tmp_path / "zoo" / "train" / "dark" / "3.png").write_bytes(b"no image")
    for options in ([], ["--augment"]):
        results = probed(checkpoint[0], "--data", f"folder:{tmp_path / 'zoo'}", *options, "--epochs", 20,
                         tmp_path=tmp_path)
        assert results["checkpoint"]["top1"] == 1 and results["checkpoint"]["images"] == 16


@pytest.mark.parametrize("arguments, words", [
    (["nowhere.pt"], ["no checkpoint at nowhere.pt"]),
    (["CHECKPOINT", "--data", "shapes", "--data", "shapes"], ["one --data", "2"]),
    (["CHECKPOINT", "--data", "shapes:train=64", "--batch-size", "128"], ["64 training records", "128"]),
    (["CHECKPOINT", "--data", "shapes:train=64,objects=2-3"], ["no image", "class"]),
    (["CHECKPOINT", "--data", "folder:nowhere"], ["nowhere"]),
])
def test_mistakes_are_told_in_one_line(arguments, words, checkpoint):                 # noqa: F811
    with pytest.raises(UserError) as error:
        main([str(checkpoint[0]) if word == "CHECKPOINT" else word for word in arguments])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--augment"]])
def test_two_processes_give_the_numbers_of_one(options, checkpoint, tmp_path):        # noqa: F811
    for processes in (0, 2):
        run_script("eval_linear.py", checkpoint[0], "--data", "shapes:train=129,val=65", "--epochs", 5, "--batch-size",
                   32, "--device", "cpu", *options, "--json", tmp_path / f"{processes}.json", processes=processes)
    one, two = (json.loads((tmp_path / f"{processes}.json").read_text())["results"] for processes in (0, 2))
    assert one == two


@pytest.mark.slow
@needs_shared
def test_real_digits(checkpoint, tmp_path):                                           # noqa: F811
    results = probed(checkpoint[0], "--data", f"folder:{SHARED}/imagefolder_digits", tmp_path=tmp_path)
    assert results["checkpoint"]["images"] == 200 and results["checkpoint"]["top1"] > 0.2        # chance is 0.1
