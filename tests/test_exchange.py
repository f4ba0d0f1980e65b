"""Weights to and from the real timm and open_clip: strictly, with the same features, embeddings, tokens and pixels."""
import gzip
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from torch import nn

import data
import model
from conftest import SHARED, needs_shared
from data import BytePairTokenizer, EvalTransform, UserError
from model import PAPER, PRESETS, MaskCLIP, load_checkpoint, load_state, save_checkpoint
from test_plan import known
from test_train import trained

CAPTIONS = ["a photo of a cat", "two dogs, a red ball & a café!", "", "word " * 200]
TINY = replace(PRESETS["pocket"], image_size=32, width=64, depth=2, heads=4, text_width=48, text_heads=4,
               vocab_size=600, context_length=16, embed_dim=24, n_codes=16, init="mae", pool="mean")


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="parity with timm needs timm")


@pytest.fixture
def open_clip():
    return pytest.importorskip("open_clip", reason="parity with open_clip needs open_clip")


def stirred(net: nn.Module, seed: int = 0) -> nn.Module:
    """With no parameter at a value that would hide its loss: zero biases, unit norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith(("bias", "norm.weight", "norm1.weight", "norm2.weight", "norm_pre.weight", "cls_token",
                              "embedding", "pos_embed")) or ".ln_" in name or name.startswith("ln_"):
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net.eval()


def saved(path, config, tokenizer) -> MaskCLIP:
    torch.manual_seed(0)
    net = stirred(MaskCLIP(config, tokenizer.eot))
    assert save_checkpoint(path, net, tokenizer, config)
    return net


def toy_vocabulary() -> BytePairTokenizer:
    return BytePairTokenizer.train(["a photo of a cat and of a dog, of two dogs and a red ball"] * 3, 540)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.fixture
def run_model(capsys):
    """model.py with these words, in this process; what it says."""
    def run(*words) -> str:
        model.main([*map(str, words)])
        return capsys.readouterr().out
    return run


def refused(text: str, *words):
    """model.py refuses these words, in one line that says so."""
    with pytest.raises(UserError, match=text) as told:
        model.main([*map(str, words)])
    assert "\n" not in str(told.value)


# ------------------------------------------------------------------------------------------------------------- timm

@pytest.mark.parametrize("changes, file", [
    (dict(), "vit.pth"), (dict(), "vit.safetensors"), (dict(dialect="clip"), "vit.pth"),
    (dict(patch_size=16, depth=3, method="clip"), "vit.pth")])
def test_to_timm(timm, run_model, tmp_path, changes, file):
    config = replace(TINY, **changes)
    ours = saved(tmp_path / "last.pt", config, toy_vocabulary())
    said = run_model(tmp_path / "last.pt", "--export", "timm", tmp_path / "to" / file)
    assert "img_size=32" in said and "num_heads=4" in said
    extra = dict(pre_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-5)) if config.dialect == "clip" else {}
    theirs = timm.models.VisionTransformer(img_size=32, patch_size=config.patch_size, embed_dim=64, depth=config.depth,
                                           num_heads=4, num_classes=0, **extra).eval()
    timm.models.load_checkpoint(theirs, str(tmp_path / "to" / file), strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        close(ours.visual(images), theirs.forward_features(images))


def test_weights_go_out_under_timms_names_which_are_ours(run_model, tmp_path):
    tower = saved(tmp_path / "last.pt", TINY, toy_vocabulary()).visual.state_dict()
    said = run_model(tmp_path / "last.pt", "--export", "timm", tmp_path / "vit.safetensors")
    assert said.startswith("timm: VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4")
    read = model.read_safetensors(tmp_path / "vit.safetensors")
    assert read.keys() == tower.keys() and all(torch.equal(read[name], tower[name]) for name in tower)


@pytest.mark.parametrize("kind, path", [("timm", "folder"), ("open_clip", "file"), ("timm", "file/vit.pth")])
def test_weights_that_cannot_be_written(tmp_path, kind, path):
    saved(tmp_path / "last.pt", replace(TINY, pool="cls"), toy_vocabulary())
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    refused(f"{path} cannot be written: ", tmp_path / "last.pt", "--export", kind, tmp_path / path)
    assert (tmp_path / "file").read_text() == "mine"


def test_safetensors_there_and_back(tmp_path):
    state = {"a": torch.randn(3, 4), "b.c": torch.randn(()), "d": torch.randn(2, 6).T}
    model.write_safetensors(state, tmp_path / "x.safetensors")
    read = model.read_safetensors(tmp_path / "x.safetensors")
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.slow
def test_vit_b16_to_timm(timm, run_model, tmp_path):
    ours = saved(tmp_path / "last.pt", replace(PAPER, method="clip", vocab_size=600), toy_vocabulary())
    run_model(tmp_path / "last.pt", "--export", "timm", tmp_path / "vit.pth")
    theirs = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(torch.load(tmp_path / "vit.pth", weights_only=True))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        close(ours.visual(images), theirs.forward_features(images))


@pytest.mark.parametrize("dialect", ["timm", "clip", "openai"])
def test_from_timm(timm, run_model, tmp_path, dialect):
    """With a classifier's head, in safetensors, and with pixels normalized another way, which config.json tells."""
    save_file = pytest.importorskip("safetensors.torch", reason="writing safetensors needs safetensors").save_file
    extra = dict(pre_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-5)) if dialect != "timm" else {}
    extra |= dict(act_layer="quick_gelu") if dialect == "openai" else {}
    about = dict(architecture="vit_base_patch16_clip_quickgelu_224") if dialect == "openai" else {}
    theirs = stirred(timm.models.VisionTransformer(img_size=48, patch_size=8, embed_dim=128, depth=4, num_heads=4,
                                                   num_classes=7, **extra))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(
        about, pretrained_cfg=dict(mean=[0.5] * 3, std=[0.4, 0.5, 0.6]))))
    out = tmp_path / "x.pt"
    said = run_model("--import", f"timm:{tmp_path}/model.safetensors", "--preset", "pocket", "--out", out)
    ours, _, config = load_checkpoint(out)
    assert config.dialect == dialect and ("GELU is assumed" in said) == (dialect == "clip")
    pixels = torch.randint(256, (2, 3, 48, 48), dtype=torch.uint8)
    their_pixels = (pixels / 255 - 0.5) / torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    with torch.no_grad():
        close(ours.visual(data.normalize(pixels)), theirs.forward_features(their_pixels))


# -------------------------------------------------------------------------------------------------------- open_clip

def compare(open_clip, folder, ours: MaskCLIP, tokenizer, image: Image.Image):
    """open_clip's model, tokenizer and transform from a folder, with ours: tokens, pixels, embeddings, scale."""
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    assert torch.equal(tokens, tokenizer(CAPTIONS, ours.config.context_length))
    pixels = transform(image)[None]
    our_pixels = EvalTransform(ours.config.image_size)(image)[None]
    with torch.no_grad():
        close(ours.encode_text(tokens), theirs.encode_text(tokens, normalize=True))
        close(ours.logit_scale, theirs.logit_scale)
        return theirs, pixels, our_pixels


def picture() -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(256, (9, 14, 3), dtype=torch.uint8, generator=generator).numpy()
    return Image.fromarray(small).resize((140, 90), Image.Resampling.BICUBIC)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    dict(),                                                         # mean pooling, its own vocabulary, masked words
    dict(pool="cls", method="clip"), dict(dialect="clip"), dict(dialect="openai", pool="cls"),
], ids=str)
def test_to_open_clip_and_back(open_clip, run_model, tmp_path, changes):
    tokenizer, folder = toy_vocabulary(), tmp_path / "to"
    ours = saved(tmp_path / "last.pt", replace(TINY, **changes), tokenizer)
    said = run_model(tmp_path / "last.pt", "--export", "open_clip", folder)
    assert "bpe_path" in said, "a vocabulary of its own lies at a path, which must be said"
    theirs, pixels, our_pixels = compare(open_clip, folder, ours, tokenizer, picture())
    close(data.normalize(our_pixels), pixels)
    with torch.no_grad():
        close(ours.encode_image(pixels), theirs.encode_image(pixels, normalize=True))

    run_model("--import", f"open_clip:{folder}", "--out", tmp_path / "back.pt")
    back, words, config = load_checkpoint(tmp_path / "back.pt")
    assert words.merges == tokenizer.merges and (config.pool, config.heads) == (ours.config.pool, 4)
    with torch.no_grad():
        close(back.encode_image(pixels), ours.encode_image(pixels))
        tokens = tokenizer(CAPTIONS, 16)
        close(back.encode_text(tokens), ours.encode_text(tokens))


@needs_shared
@pytest.mark.slow
def test_vit_b16_to_open_clip(open_clip, run_model, tmp_path):
    """With CLIP's vocabulary, which open_clip has itself, and a photograph."""
    tokenizer = BytePairTokenizer.from_file(SHARED / "bpe_simple_vocab_16e6.txt.gz")
    ours = saved(tmp_path / "last.pt", replace(PAPER, method="clip"), tokenizer)
    run_model(tmp_path / "last.pt", "--export", "open_clip", tmp_path / "to")
    assert "tokenizer_kwargs" not in (tmp_path / "to" / "open_clip_config.json").read_text()
    photo = Image.open(next((SHARED / "photos").rglob("*.jpg")))
    theirs, pixels, our_pixels = compare(open_clip, tmp_path / "to", ours, tokenizer, photo)
    # a level of 255 is a fifty-eighth of the deviation: JPEGs that we decode at reduced size are off by some
    assert (data.normalize(our_pixels) - pixels).abs().mean() < 1 / 58
    with torch.no_grad():
        close(ours.encode_image(pixels), theirs.encode_image(pixels, normalize=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-16-quickgelu"])
def test_from_open_clip(open_clip, run_model, tmp_path, name):
    """A public model, as the hub publishes it: its own pixels, a norm before the blocks, perhaps quick GELU."""
    torch.manual_seed(0)
    theirs, _, transform = open_clip.create_model_and_transforms(name)
    stirred(theirs)
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    pixels = dict(mean=transform.transforms[-1].mean, std=transform.transforms[-1].std)
    about = dict(model_cfg=open_clip.get_model_config(name), preprocess_cfg=pixels)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    lines = gzip.open(open_clip.tokenizer.default_bpe(), "rt", encoding="utf-8").read().split("\n")
    merges = ["#version: 0.2", *lines[1:49152 - 256 - 2 + 1], ""]           # as on the hub
    (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    run_model("--import", f"open_clip:{tmp_path}", "--out", tmp_path / "x.pt")
    ours, tokenizer, config = load_checkpoint(tmp_path / "x.pt")
    assert config.dialect == ("openai" if "quick" in name else "clip")
    tokens = open_clip.get_tokenizer(name)(CAPTIONS)
    assert torch.equal(tokenizer(CAPTIONS), tokens)
    big = picture().resize((300, 260))
    with torch.no_grad():
        close(ours.encode_text(tokens), theirs.encode_text(tokens, normalize=True))
        mine = ours.encode_image(data.normalize(EvalTransform(224)(big)[None]))
        close(mine, theirs.encode_image(transform(big)[None], normalize=True))


@pytest.mark.parametrize("change, named", [
    (dict(vision_cfg=dict(ls_init_value=1e-5)), "ls_init_value"),
    (dict(vision_cfg=dict(timm_model_name="vit_base_patch16_224")), "timm_model_name"),
    (dict(vision_cfg=dict(no_ln_pre=True)), "norm_kwargs"),                 # epsilon 1e-5 without a norm before
    (dict(vision_cfg=dict(layers=[3, 4, 6, 3])), "TypeError"),
    (dict(text_cfg=dict(no_causal_mask=True)), "no_causal_mask"),
    (dict(custom_text=True), "custom_text"),
    (dict(text_cfg=None), "TypeError"),
])
def test_what_has_no_counterpart_is_refused_by_name(change, named):
    theirs = model.open_clip_config(replace(PAPER, dialect="clip"))
    assert model.config_from_open_clip(theirs) == replace(PAPER, method="clip", dialect="clip")
    for key, value in change.items():
        theirs[key] = theirs[key] | value if isinstance(value, dict) else value
    with pytest.raises(UserError, match=named):
        model.config_from_open_clip(theirs)


@pytest.mark.parametrize("change, named", [(dict(causal=False, pool="mean"), "--no-causal"),
                                           (dict(pool="max"), "--pool max"),
                                           (dict(method="filip", pool="cls"), "FILIP compares patches with words")])
def test_what_open_clip_lacks_is_not_exported(tmp_path, change, named):
    config, tokenizer = replace(TINY, **change), toy_vocabulary()
    assert save_checkpoint(tmp_path / "last.pt", model.build(config, tokenizer.eot), tokenizer, config)
    refused(named, tmp_path / "last.pt", "--export", "open_clip", tmp_path / "to")


# ------------------------------------------------------------------------------------------------------ start of a run

STILL = ["--pool", "cls", "--vocab-size", 600, "--drop-path", 0, "--lr", 1e-12, "--lr-start", 0,
         "--lr-end", 0, "--weight-decay", 0, "--steps", 1]


@pytest.fixture
def public(tmp_path):
    """Weights as timm and open_clip publish them, and the network and vocabulary they are of."""
    config = replace(TINY, width=32, heads=2, text_width=32, text_heads=2, embed_dim=16, method="clip", pool="cls")
    tokenizer = toy_vocabulary()
    net = saved(tmp_path / "public.pt", config, tokenizer)
    model.export(net, tokenizer, "timm", tmp_path / "vit.pth")
    model.export(net, tokenizer, "open_clip", tmp_path / "public")
    return net, tokenizer


def test_a_run_starts_from_timms_tower_and_goes_on_without_reading_it_again(public, tmp_path, capsys):
    """At next to no learning rate the first step leaves the tower, and so the teacher, at what was read."""
    net, run = public[0], [*STILL, "--out", tmp_path / "run"]
    trained(*run, "--init", f"timm:{tmp_path}/vit.pth")
    state = load_state(tmp_path / "run" / "last.pt")
    for name, value in net.visual.state_dict().items():
        torch.testing.assert_close(state["model"]["visual." + name], value)
        torch.testing.assert_close(state["teacher"]["visual." + name], value)
    assert not torch.allclose(state["model"]["text.pos_embed"][:16], net.text.pos_embed)
    (tmp_path / "vit.pth").unlink()
    trained(*run, "--init", f"timm:{tmp_path}/vit.pth")
    assert "going on from step 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="init = timm:"):                    # another start is another run
        trained(*run)


def test_a_run_starts_from_both_towers_of_open_clip(public, tmp_path):
    net, tokenizer = public
    run = [*STILL, "--init", f"open_clip:{tmp_path}/public"]
    trained(*run, "--context-length", 16, "--out", tmp_path / "both")
    state = load_state(tmp_path / "both" / "last.pt")
    assert state["tokenizer"] == tokenizer.state(), "the vocabulary comes with the weights"
    for name in ("text.token_embedding.weight", "text.blocks.1.mlp.fc2.bias", "image_proj.weight", "text_proj.weight"):
        torch.testing.assert_close(state["model"][name], net.state_dict()[name])
    with pytest.raises(UserError, match="give --context-length 16"):
        trained(*run, "--out", tmp_path / "third")


@pytest.mark.parametrize("content, init, want", [
    (None, "timm:{}", "no file"),
    (b"rubbish", "timm:{}", "cannot read weights"),
    ({"x": torch.zeros(2)}, "timm:{}", "patch_embed"),
    (None, "open_clip:{}", "open_clip_config.json"),
])
def test_a_start_that_cannot_be(tmp_path, content, init, want):
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    merges = ["--bpe", SHARED / "bpe_simple_vocab_16e6.txt.gz"] if "open_clip" in init and SHARED.is_dir() else []
    with pytest.raises(UserError, match=f"{want}|no merges.txt beside") as told:
        trained(*STILL, "--out", tmp_path / "run", "--init", init.format(path), *merges)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("change, says", [
    ({"visual.norm.bias": None}, "lacks visual.norm.bias"),
    ({"visual.norm_pre.weight": torch.zeros(64)}, "visual.norm_pre.weight"),
    ({"visual.norm.bias": torch.zeros(65)}, "another size.*visual.norm.bias"),
])
def test_weights_that_do_not_fit_are_named(change, says):
    net = MaskCLIP(TINY, 5)
    state = {f"visual.{name}": value for name, value in net.visual.state_dict().items()} | change
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(UserError, match=says):
        model.load_public(net, model.Public(state, ("visual.",), None, "timm"), "F")


def test_another_dialect_is_named_with_its_cure(tmp_path):
    saved(tmp_path / "clip.pt", replace(TINY, dialect="clip"), toy_vocabulary())
    model.main([f"{tmp_path}/clip.pt", "--export", "timm", f"{tmp_path}/vit.pth"])
    with pytest.raises(UserError, match="has dialect clip, this run timm: give --dialect clip"):
        model.initialize(MaskCLIP(TINY, 5), f"timm:{tmp_path}/vit.pth")


def test_what_openai_torch_compile_and_ddp_add_to_weights(tmp_path):
    """Numbers that are no weights; prefixes of names."""
    tokenizer = toy_vocabulary()
    ours = saved(tmp_path / "x.pt", replace(TINY, dialect="openai", pool="cls", method="clip"), tokenizer)
    model.export(ours, tokenizer, "open_clip", tmp_path / "to")
    plain, file = model.read_open_clip(tmp_path / "to").state, tmp_path / "to" / "open_clip_pytorch_model.bin"
    state = {f"module._orig_mod.{name}": value for name, value in torch.load(file, weights_only=True).items()}
    torch.save(state | {name: torch.tensor(32) for name in ("input_resolution", "context_length", "vocab_size")}, file)
    read = model.read_open_clip(tmp_path / "to").state
    assert read.keys() == plain.keys() and all(torch.equal(read[name], plain[name]) for name in plain)
    (tmp_path / "to" / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match="no open_clip_config.json beside .*open_clip.get_model_config"):
        model.read_open_clip(file)


def test_the_cost_of_a_checkpoint_is_that_of_its_own_model(run_model, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "costs", known)
    saved(tmp_path / "last.pt", replace(TINY, method="clip"), toy_vocabulary())
    said = run_model(tmp_path / "last.pt", "--words", 9)
    assert said.startswith("clip: 32 px, patches of 8 px, captions of 9 tokens; a pair costs")
    assert said.endswith("a step's FLOPs are 1.38 times those of clip\n")


IMPORT, EXPORT = "to import: python model.py --import", "to export: python model.py CHECKPOINT"


@pytest.mark.parametrize("line, says", [
    ("none.pt", "no checkpoint at none.pt"), ("--out x.pt", IMPORT), ("--bpe x", IMPORT), ("--import timm:b", IMPORT),
    ("x.pt --export timm a --import timm:b", IMPORT), ("x.pt --import timm:b --out y.pt", IMPORT),
    ("--export timm a", EXPORT), ("last.pt --export keras a", "wanted --export timm FILE"),
    ("--import keras:b --out y.pt", "wanted timm:FILE or open_clip:DIR"),
    ("--import timm:vit.pth --preset pocket --out file/x.pt", "file/x.pt cannot be written")])
def test_command_lines_that_make_no_sense(line, says, tmp_path, monkeypatch):
    net = saved(tmp_path / "last.pt", PRESETS["pocket"], toy_vocabulary())
    monkeypatch.chdir(tmp_path)
    torch.save(model.to_timm(net), "vit.pth")
    (tmp_path / "file").write_text("mine")
    refused(says, *line.split())


def test_safetensors_are_read_as_their_library_reads_them(tmp_path):
    library = pytest.importorskip("safetensors.torch", reason="safetensors is the reference")
    tensors = dict(a=torch.randn(3, 4), b=torch.randn(5).half(), c=torch.tensor(2.5), d=torch.randn(2, 1, 2).bfloat16(),
                   e=torch.arange(3))
    library.save_file(tensors, tmp_path / "x.safetensors", metadata=dict(format="pt"))
    ours, theirs = model.read_safetensors(tmp_path / "x.safetensors"), library.load_file(tmp_path / "x.safetensors")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
