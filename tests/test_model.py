"""The networks against timm and open_clip, against themselves computed another way, and against their definitions."""
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import losses
import model
from model import METHODS, PRESETS, MaskCLIP, Teacher, VisionTransformer, mask_words, random_mask

SOT, EOT = 766, 767
TOKENS = SimpleNamespace(sot=SOT, eot=EOT)        # what masking asks of a tokenizer
TINY = replace(PRESETS["pocket"], image_size=32, width=32, depth=2, heads=2, text_width=32, text_depth=2, text_heads=2,
               embed_dim=16, context_length=12, n_codes=32, quantizer_hidden=32, quantizer_bottleneck=16)


def tiny(method="maskclip", **changes):
    torch.manual_seed(0)
    return model.build(replace(TINY, method=method, **changes), EOT)


def captions(lengths, width=None):
    """(B, L) start, words, end, padding"""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.zeros(len(lengths), width or max(lengths) + 2, dtype=torch.long)
    for row, n in zip(tokens, lengths):
        row[0], row[1 + n] = SOT, EOT
        row[1:1 + n] = torch.randint(1, 700, (n,), generator=generator)
    return tokens


# ------------------------------------------------------------------------------------------------------ masks

@pytest.mark.parametrize("N, ratio, K", [
    (196, 0.75, 49),     # the paper: ViT-B/16 at 224 px
    (49, 0.75, 12),      # ViT-B/32: MAE rounds the visible count down
    (196, 0.00, 196),    # nothing hidden: the student sees what the teacher sees
    (10, 0.90, 1),       # 10 * (1 - 0.9) is 0.99... in floating point
    (4, 0.75, 1),        # the smallest grid that leaves a patch to see
    (2, 0.75, 1),        # a patch is always left
])
def test_random_mask(N, ratio, K):
    keep, hidden = random_mask(3, N, ratio)              # (3, K), (3, N - K)
    assert keep.shape == (3, K)
    assert torch.equal(torch.cat([keep, hidden], dim=1).sort(dim=1).values, torch.arange(N).expand(3, N))
    assert (keep.diff(dim=1) > 0).all() and (hidden.diff(dim=1) > 0).all(), "patches are not in order"


def test_random_mask_follows_its_generator_and_hides_every_patch_alike():
    whole = random_mask(4000, 8, 0.75, torch.Generator().manual_seed(7))
    own = random_mask(4000, 8, 0.75, torch.Generator().manual_seed(7), slice(100, 200))
    assert torch.equal(whole[0][100:200], own[0]) and torch.equal(whole[1][100:200], own[1])
    assert (whole[1].flatten().bincount() / 4000 - 0.75).abs().max() < 0.03 # 4 standard deviations


def test_mask_words_is_berts_corruption():
    tokens = captions([10] * 4000)
    noise = torch.rand(4000, 20, 3, generator=torch.Generator().manual_seed(0))
    corrupted, chosen = mask_words(tokens, 0.2, SOT, EOT, mask_id=768, noise=noise)
    assert chosen.sum(dim=1).tolist() == [2] * 4000                         # 20% of ten words
    assert not chosen[:, 0].any() and not chosen[:, 11].any(), "start or end was chosen"
    assert torch.equal(corrupted[~chosen], tokens[~chosen])
    became, was = corrupted[chosen], tokens[chosen]
    assert (became == 768).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (became == was).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert became[became != 768].max() < SOT


@pytest.mark.parametrize("words, chosen", [(1, 1), (2, 1), (3, 1), (10, 2), (0, 0)])   # of some words one at least
def test_mask_words_of_short_captions(words, chosen):
    tokens = captions([words], width=14)
    assert mask_words(tokens, 0.2, SOT, EOT, 768, torch.rand(1, 14, 3))[1].sum().item() == chosen


# ------------------------------------------------------------------------------------------------------ image tower

def test_visible_patches_alone_equal_a_transformer_on_those_tokens():
    vit, images = VisionTransformer(32, 8, 32, 2, 2), torch.randn(3, 3, 32, 32)
    keep, _ = random_mask(3, 16, 0.75)
    x = vit.embed(images)                                                   # (3, 17, 32), all patches
    x = torch.cat([x[:, :1], model.take(x[:, 1:], keep)], dim=1)
    for block in vit.blocks:
        x = block(x)
    torch.testing.assert_close(vit(images, keep), vit.norm(x))


def test_hidden_patches_do_not_matter():
    vit, images = VisionTransformer(32, 8, 32, 2, 2), torch.randn(1, 3, 32, 32)
    keep = torch.tensor([[0, 5]])
    other = images.clone()
    other[:, :, 24:, 24:] = 9.0                                             # patch 15 is hidden
    torch.testing.assert_close(vit(images, keep), vit(other, keep))


def test_position_embedding_follows_the_image_size():
    vit = VisionTransformer(32, 8, 32, 2, 2)
    assert vit(torch.randn(1, 3, 48, 64)).shape == (1, 1 + 6 * 8, 32)
    vit.pos_embed.data[:, 1:] = torch.linspace(0, 1, 4)[None, :, None, None].expand(1, 4, 4, 32).reshape(1, 16, 32)
    rows = vit.positions(8, 4).reshape(8, 4, 32)[:, 0, 0]
    assert (rows.diff() > -1e-3).all() and torch.equal(vit.positions(4, 4), vit.pos_embed[:, 1:])
    with pytest.raises(ValueError, match="multiples of 8"):
        vit(torch.randn(1, 3, 30, 32))


def test_stochastic_depth_keeps_the_mean_and_spares_evaluation():
    torch.manual_seed(0)
    block, x = model.Block(8, 2, drop_path=0.25), torch.ones(20_000, 1, 8)
    out = block.skip_at_random(x)
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(block.eval().skip_at_random(x), x)


@pytest.mark.parametrize("path", ["code", "plain"])
def test_value_features_are_attention_with_the_identity(path, monkeypatch):
    vit, images = VisionTransformer(32, 8, 32, 2, 2).eval(), torch.randn(2, 3, 32, 32)
    x = vit.blocks[0](vit.embed(images))
    last, D = vit.blocks[1], 32
    B, N, _ = x.shape
    v = last.attn.qkv(last.norm1(x)).reshape(B, N, 3, 2, D // 2)[:, :, 2].transpose(1, 2)       # (B, H, N, D/H)
    attended = (torch.eye(N) @ v).transpose(1, 2).reshape(B, N, D)
    want = last.attn.proj(attended)
    if path == "code":
        want = x + want
        want = want + last.mlp(last.norm2(want))
    torch.testing.assert_close(vit.value_features(images, path), vit.norm(want)[:, 1:])


def test_block_outputs_are_those_of_the_forward_pass():
    vit, images = VisionTransformer(32, 8, 32, 3, 2).eval(), torch.randn(2, 3, 32, 32)
    first, last = vit.block_outputs(images, (1, 3))
    torch.testing.assert_close(first, vit.blocks[0](vit.embed(images)))
    torch.testing.assert_close(vit.norm(last), vit(images))


def test_image_tower_is_timms():
    timm = pytest.importorskip("timm", reason="parity with timm's ViT-B/16 needs timm")
    torch.manual_seed(0)
    theirs = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
    torch.nn.init.normal_(theirs.cls_token)
    ours = VisionTransformer().eval()
    ours.load_state_dict(theirs.state_dict())                               # strict: same keys, same shapes
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.forward_features(images), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------ text tower

def test_text_is_the_same_trimmed_and_padded():
    net, short = tiny().eval(), captions([3, 6])
    padded = F.pad(short, (0, 12 - short.shape[1]))
    with torch.no_grad():
        torch.testing.assert_close(net.encode_text(short), net.encode_text(padded))
        x = net.text(padded, EOT)                                           # the full padded length, not trimmed
        torch.testing.assert_close(net.embed_text(x, padded), net.encode_text(short))


def test_bidirectional_text_ignores_padding_and_causal_text_ignores_the_future():
    net, tokens = tiny(causal=False).eval(), captions([3], width=10)
    other = tokens.clone()
    other[0, 6:] = 5                                                        # padding, changed
    with torch.no_grad():
        torch.testing.assert_close(net.text(tokens, EOT)[:, :5], net.text(other, EOT)[:, :5])
        causal, other = tiny().eval(), tokens.clone()
        other[0, 3] = 9
        torch.testing.assert_close(causal.text(tokens, EOT)[:, :3], causal.text(other, EOT)[:, :3])
        assert not torch.allclose(net.text(tokens, EOT)[:, 1], net.text(other, EOT)[:, 1])


def test_end_token_is_found_by_its_id_not_by_the_highest_one():
    net, tokens = tiny().eval(), captions([4])
    x = torch.randn(1, 6, 32)
    assert torch.equal(net.pool_text(x, tokens), x[:, 5])
    masked = tokens.clone()
    masked[0, 2] = net.text.mask_id                                         # a higher id than the end token's
    assert torch.equal(net.pool_text(x, masked), x[:, 5])


def test_mask_token_has_its_own_vector():
    net, masked = tiny().eval(), captions([4])
    masked[0, 2] = net.text.mask_id
    with torch.no_grad():
        before = net.text(masked, EOT)
        net.text.mask_token += 1
        assert not torch.allclose(before, net.text(masked, EOT))
        net.text.token_embedding.weight[0] += 1                             # word 0 stood in for it and must not matter
        net.text.mask_token -= 1
        torch.testing.assert_close(before, net.text(masked, EOT))


def test_parameters_of_the_clip_part_are_open_clips():
    open_clip = pytest.importorskip("open_clip", reason="counting ViT-B-16's parameters needs open_clip")
    theirs = open_clip.create_model("ViT-B-16")
    ours = MaskCLIP(replace(PRESETS["vit-b16-yfcc15m"], method="clip"), eot=49407)

    def count(module):
        return sum(p.numel() for p in module.parameters())
    # timm's dialect has a bias on the patch embedding, OpenAI's a norm before the blocks
    want = count(theirs) - count(theirs.visual.ln_pre) + 768
    assert count(ours) == want


# ------------------------------------------------------------------------------------------------------ whole model

def batch_for(net, B=6, words=None):
    """What train.hide makes of B pairs; captions of some words each, or of `words`."""
    generator, size = torch.Generator().manual_seed(0), net.config.image_size
    tokens = captions([words] * B if words else [3, 5, 8, 1, 2, 4][:B])
    batch = dict(images=torch.randn(B, 3, size, size, generator=generator), tokens=tokens)
    if METHODS[net.config.method]["predicts"]:
        batch["keep"], batch["hidden"] = random_mask(B, net.config.grid ** 2, 0.75, generator)
    if METHODS[net.config.method]["mlm"]:
        noise = torch.rand(B, 12, 3, generator=generator)
        batch["corrupted"], is_chosen = mask_words(tokens, 0.2, SOT, EOT, net.text.mask_id, noise)
        batch.update(chosen=is_chosen.flatten().nonzero().squeeze(1), word_count=is_chosen.sum().float())
    return batch


def answer_for(net, batch):
    """What the teacher says of the hidden patches, for methods that have one."""
    if METHODS[net.config.method]["predicts"] == "teacher":
        return Teacher(net)(batch["images"], batch["hidden"])


@pytest.mark.parametrize("method, target, names, in_log", [
    ("clip", "codes", set(), []), ("clip+mae", "codes", {"L_Dist"}, ["pixel"]),
    ("clip+feature", "codes", {"L_Dist"}, ["distillation"]), ("clip+ema", "features", {"L_Dist"}, ["feature"]),
    ("maskclip", "codes", {"L_Dist", "L_MLM"}, ["distillation", "mlm"]),
])
def test_every_method_trains_every_parameter_it_has(method, target, names, in_log):
    net = tiny(method, target=target)
    batch = batch_for(net)
    features, terms = net(batch, answer_for(net, batch))
    assert set(terms) == names
    terms |= net.contrast(features)
    assert list(net.named(terms)) == ["contrastive", *in_log]
    net.total_loss(**terms).backward()
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []


def test_total_loss_is_equation_8():
    net = tiny("maskclip", distillation_weight=0.05, mlm_weight=0.5)
    terms = {"L_I": 2.0, "L_T": 3.0, "L_Dist": 40.0, "L_MLM": 8.0}
    assert net.total_loss(**terms) == 2 + 3 + 0.05 * 40 + 0.5 * 8
    assert net.total_loss(L_I=2.0, L_T=3.0) == 5.0, "what a method lacks is 0"
    assert net.named(terms) == dict(contrastive=5.0, distillation=40.0, mlm=8.0), "the log has them without weights"
    with pytest.raises(TypeError):                              # a term without a weight is no term
        net.total_loss(L_I=2.0, pixel=1.0)


@pytest.mark.parametrize("reduction, share", [("sum", 1.0), ("mean", 0.5)])
def test_contrast_is_the_sum_or_the_mean(reduction, share):
    net = tiny("clip", contrastive_reduction=reduction)
    features = dict(image=torch.eye(3, 16), text=torch.ones(3, 16) / 4)
    want = losses.contrastive_loss(features["image"], features["text"], 1 / 0.07)
    got = net.contrast(features)
    torch.testing.assert_close((got["L_I"], got["L_T"]), tuple(share * x for x in want))


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_class_token_alone_is_that_of_all_tokens(drop_path):
    net = tiny("clip", pool="cls", drop_path=drop_path).double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(1)
    whole = net.visual(images)[:, 0]
    torch.manual_seed(1)
    alone = net.image_features(images)
    torch.testing.assert_close(alone, whole)
    direction = torch.randn_like(whole)
    parameters = list(net.visual.blocks.parameters())
    torch.testing.assert_close(torch.autograd.grad((alone * direction).sum(), parameters),
                               torch.autograd.grad((whole * direction).sum(), parameters))


def test_losses_start_where_theory_says():
    net, B = tiny("maskclip", n_codes=256, quantizer_bottleneck=256, image_size=64), 32
    batch = batch_for(net, B, words=6)
    net.logit_scale.data.fill_(0.0)                                         # scale 1: a flat softmax
    features, terms = net(batch, answer_for(net, batch))
    for term in net.contrast(features).values():
        assert term.item() == pytest.approx(math.log(B), abs=0.05)
    # unit vectors at random in d = 256 dimensions: cosines of variance 1/d add half of 1 / (d temp_s^2) to ln C
    assert terms["L_Dist"].item() == pytest.approx(math.log(256) + 0.5 / (256 * 0.1 ** 2), abs=0.15)
    assert terms["L_MLM"].item() == pytest.approx(math.log(768), abs=0.3)


def test_forward_equals_its_parts_computed_from_the_definitions():
    """One-pass text, hidden-only codes, chunked losses: the same numbers as the plain formulas on everything."""
    net = tiny("maskclip", temp_t=0.07).eval()
    teacher, batch = Teacher(net), batch_for(net)
    teacher.center.normal_(std=0.1)
    features, terms = net(batch, teacher(batch["images"], batch["hidden"]))
    torch.testing.assert_close(features, dict(image=net.encode_image(batch["images"]),
                                              text=net.encode_text(batch["tokens"])))
    torch.testing.assert_close(features, net.encode(batch))

    every_patch = teacher.quantizer(teacher.visual(batch["images"])[:, 1:])                     # (B, N, C)
    codes = torch.stack([patches[hidden] for patches, hidden in zip(every_patch, batch["hidden"])])
    decoded = net.decoder(net.visual(batch["images"], batch["keep"]), batch["keep"], batch["hidden"])
    want = losses.distillation_loss(net.quantizer(decoded), codes, net.config.temp_s, 0.07, teacher.center)
    torch.testing.assert_close(terms["L_Dist"], want)

    tokens = batch["tokens"]
    x = net.text(batch["corrupted"], EOT)
    is_word = model.before_end(tokens, EOT) | (tokens == EOT)
    x = net.text_decoder(x, is_word, torch.arange(tokens.numel()))                              # (B*L, D)
    logits = F.linear(x, net.text.token_embedding.weight, net.text_decoder.bias)
    want = losses.masked_language_loss(logits[batch["chosen"]], tokens.flatten()[batch["chosen"]])
    torch.testing.assert_close(terms["L_MLM"], want)


@pytest.mark.parametrize("method, target", [("clip+mae", "codes"), ("clip+ema", "features")])
def test_what_takes_the_place_of_the_codes_is_told_of_hidden_patches_alone(method, target):
    net = tiny(method, target=target).eval()
    batch, teacher = batch_for(net), Teacher(net)
    terms = net(batch, teacher(batch["images"], batch["hidden"]))[1]
    guess = net.predict(net.decoder(net.visual(batch["images"], batch["keep"]), batch["keep"], batch["hidden"]))
    truth = losses.patchify(batch["images"], 8) if method == "clip+mae" else teacher.visual(batch["images"])[:, 1:]
    truth = torch.stack([patches[hidden] for patches, hidden in zip(truth, batch["hidden"])])   # (B, M, .)
    want = (losses.pixel_loss if method == "clip+mae" else losses.feature_loss)(guess, truth)
    torch.testing.assert_close(terms["L_Dist"], want)


def test_decoder_output_is_in_the_place_of_its_patch():
    """Hidden patches stand behind the visible ones in the sequence; their position embedding says where they are."""
    decoder = model.ImageDecoder(32, 1, 2, 4).eval()
    visible, keep = torch.randn(1, 5, 32), torch.tensor([[1, 4, 6, 11]])
    hidden = torch.tensor([[n for n in range(16) if n not in keep[0]]])
    shuffled = hidden[:, torch.randperm(12)]
    a, b = decoder(visible, keep, hidden), decoder(visible, keep, shuffled)
    torch.testing.assert_close(a, b[:, shuffled[0].argsort()])


# ------------------------------------------------------------------------------------------------------ teacher

def test_teacher_is_the_running_average():
    net = tiny()
    teacher = Teacher(net)
    before = {name: p.clone() for name, p in teacher.visual.named_parameters()}
    for p in net.parameters():
        p.data += 1.0
    teacher.update(net, 0.9)
    for name, p in teacher.visual.named_parameters():
        torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * net.visual.get_parameter(name))
    teacher.update(net, 0.0)                                                # momentum 0: the current weights
    torch.testing.assert_close(teacher.quantizer.codes, net.quantizer.codes.data)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_center_is_the_running_mean_of_the_logits():
    net = tiny()
    teacher, batch = Teacher(net), batch_for(net)
    teacher.update_center([teacher(batch["images"], batch["hidden"])], 0.9)
    logits = teacher.quantizer(teacher.visual(batch["images"])[:, 1:])
    hidden = torch.cat([patches[own] for patches, own in zip(logits, batch["hidden"])])
    torch.testing.assert_close(teacher.center, 0.1 * hidden.mean(dim=0))


def test_collapse_monitor_tells_the_two_kinds_of_collapse_apart():
    teacher, codes = Teacher(tiny()), torch.eye(16).repeat(2, 1)            # (32, 16)

    def monitor(features):
        return teacher.collapse_monitor(dict(codes=codes, center=torch.zeros(32), features=features), 0.04)
    same = monitor(torch.eye(16)[:1].expand(1, 64, 16))
    assert same["code_entropy"] == pytest.approx(math.log(2), abs=1e-3)     # one code and its twin
    spread = monitor(torch.eye(16)[None].repeat(1, 4, 1))
    assert spread["code_entropy"] == pytest.approx(math.log(32), abs=1e-3) and spread["codes_used"] == 0.5
    mute = monitor(torch.zeros(1, 64, 16))
    assert mute["patch_entropy"] == pytest.approx(math.log(32), abs=1e-4)


@pytest.mark.parametrize("step, want", [(0, 0.999), (50, 0.99945), (100, 0.9999)])     # the paper's, over 101 steps
def test_momentum_ramp(step, want):
    assert model.momentum_at(step, 101, 0.999, 0.9999) == pytest.approx(want)


@pytest.mark.parametrize("start, end, want", [(0.999, 0.9999, 0.36), (0.99, 0.999, 0.00003)])     # README's numbers
def test_what_a_pocket_run_leaves_of_the_teachers_start(start, end, want):
    left = math.prod(model.momentum_at(step, 1872, start, end) for step in range(1872))
    assert left == pytest.approx(want, rel=0.1)


# ------------------------------------------------------------------------------------------------------ costs

@pytest.mark.parametrize("method, pool", [("maskclip", "mean"), *(
    pytest.param(method, pool, marks=pytest.mark.slow) for method, pool in
    [("maskclip", "cls"), *((method, "mean") for method in METHODS if method != "maskclip")])])
def test_costs_are_those_of_one_step(method, pool):
    """The branches, each by itself without numbers, against all at once with numbers: FLOPs and parameters."""
    net = tiny(method, image_size=64, width=64, text_width=64, depth=1, text_depth=1, pool=pool)    # cls: less to do
    batch = batch_for(net, 2, words=10)
    batch |= dict(view1=batch["images"], view2=batch["images"], tokens2=batch["tokens"])
    # the counter does not know the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        features, terms = net(batch, answer_for(net, batch))
        forward = counter.get_total_flops()
        sum(x.sum() for x in [*features.values(), *terms.values()]).backward()
    everything = model.costs(net.config, words=12)[-1]
    assert everything.flops == pytest.approx(forward / 2, rel=0.02)
    assert everything.step_flops == pytest.approx(counter.get_total_flops() / 2, rel=0.05)
    assert everything.parameters == pytest.approx(sum(p.numel() for p in net.parameters()), abs=1)  # DeFILIP's scale


@pytest.mark.parametrize("seed", [0, 3])
def test_all_methods_of_a_seed_start_alike_in_what_they_share(seed):
    """Bit for bit; another seed starts elsewhere, and parts that are alike in shape do not start alike in numbers."""
    starts = {}
    for method in METHODS:
        torch.manual_seed(seed)
        torch.rand(len(starts))                                     # what was drawn before does not matter
        starts[method] = model.build(replace(TINY, method=method, embed_dim=TINY.token_dim), EOT).state_dict()
    shared = [name for name in starts["clip"] if name.startswith(("visual.", "text.", "image_proj", "text_proj"))]
    assert len(shared) > 50
    for one in METHODS:
        for other in METHODS:
            both = starts[one].keys() & starts[other].keys()
            assert set(shared) <= both
            assert all(torch.equal(starts[one][name], starts[other][name]) for name in both), (one, other)
    torch.manual_seed(seed + 1)
    fresh = model.build(replace(TINY, embed_dim=TINY.token_dim), EOT).state_dict()
    random = [name for name in shared if starts["clip"][name].ndim > 1]
    assert not any(torch.equal(starts["clip"][name], fresh[name]) for name in random)
    assert not torch.equal(fresh["visual.blocks.0.attn.qkv.weight"], fresh["visual.blocks.1.attn.qkv.weight"])
