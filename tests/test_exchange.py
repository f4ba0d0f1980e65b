"""Weights to and from the real timm and open_clip: strictly, with the same features, embeddings, tokens and pixels."""
import gzip
import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from torch import nn

import data
import model
from conftest import SHARED, needs_shared, run_script
from data import BytePairTokenizer, EvalTransform, UserError
from model import PAPER, PRESETS, MaskCLIP, save_checkpoint
from train import load_checkpoint, load_state

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


def run_model(capsys, *arguments) -> str:
    """What model.py prints, in this process."""
    capsys.readouterr()
    model.main([str(word) for word in arguments])
    return capsys.readouterr().out


def toy_vocabulary() -> BytePairTokenizer:
    return BytePairTokenizer.train(["a photo of a cat and of a dog, of two dogs and a red ball"] * 3, 540)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------- timm

@pytest.mark.parametrize("changes", [dict(), dict(dialect="clip"), dict(dialect="openai"),
                                     dict(patch_size=16, depth=3, method="clip")])
def test_to_timm(timm, tmp_path, changes, capsys):
    config = replace(TINY, **changes)
    ours = saved(tmp_path / "last.pt", config, toy_vocabulary())
    said = run_model(capsys, tmp_path / "last.pt", "--export", "timm", tmp_path / "to" / "vit.pth")
    assert "img_size=32" in said and "num_heads=4" in said
    printed = re.search(r"num_classes=0(.*)\)\.load_state_dict", said)[1]                 # as it is to be typed
    extra = eval(f"dict({printed.removeprefix(', ')})", dict(partial=partial, LayerNorm=nn.LayerNorm))
    theirs = timm.models.VisionTransformer(img_size=32, patch_size=config.patch_size, embed_dim=64, depth=config.depth,
                                           num_heads=4, num_classes=0, **extra).eval()
    timm.models.load_checkpoint(theirs, str(tmp_path / "to" / "vit.pth"), strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        close(ours.visual(images), theirs.forward_features(images))


@pytest.mark.parametrize("kind, path, says", [
    ("timm", "folder", "folder cannot be written"), ("open_clip", "file", "file cannot be written"),
    ("timm", "file/vit.pth", "cannot be written"), ("timm", "vit.safetensors", "ends in .pth"),
    ("onnx", "x", "cannot export for onnx")])
def test_weights_that_cannot_be_written(tmp_path, kind, path, says):
    saved(tmp_path / "last.pt", replace(TINY, pool="cls"), toy_vocabulary())
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=says) as told:
        model.main([str(tmp_path / "last.pt"), "--export", kind, str(tmp_path / path)])
    assert "\n" not in str(told.value) and (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_vit_b16_to_timm(timm, tmp_path, capsys):
    ours = saved(tmp_path / "last.pt", replace(PAPER, method="clip", vocab_size=600), toy_vocabulary())
    run_model(capsys, tmp_path / "last.pt", "--export", "timm", tmp_path / "vit.pth")
    theirs = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
    theirs.load_state_dict(torch.load(tmp_path / "vit.pth", weights_only=True))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        close(ours.visual(images), theirs.forward_features(images))


@pytest.mark.parametrize("dialect", ["timm", "clip", "openai"])
def test_from_timm(timm, tmp_path, dialect, capsys):
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
    said = run_model(capsys, "--import", f"timm:{tmp_path}/model.safetensors", "--preset", "pocket", "--out", out)
    ours, _, config = load_checkpoint(out)
    assert config.dialect == dialect and ("GELU is assumed" in said) == (dialect == "clip")
    pixels = torch.randint(256, (2, 3, 48, 48), dtype=torch.uint8)
    their_pixels = (pixels / 255 - 0.5) / torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    with torch.no_grad():
        close(ours.visual(data.normalize(pixels)), theirs.forward_features(their_pixels))


def test_from_towers_inside_other_networks(tmp_path, capsys):
    """SLIP's checkpoints hold the text tower besides, MAE's the decoder, MoCo v3's two towers and heads."""
    vocabulary = toy_vocabulary()
    net = saved(tmp_path / "ours.pt", replace(PRESETS["pocket"], method="clip", vocab_size=vocabulary.vocab_size),
                vocabulary)
    tower = net.visual.state_dict()
    for mark, more in (("module.visual.", ["module.transformer.x", "module.image_mlp.0.weight"]),
                       ("", ["mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight", "head.weight"]),
                       ("module.base_encoder.", ["module.momentum_encoder.patch_embed.proj.weight",
                                                 "module.base_encoder.head.0.weight"])):
        state = {mark + name: value for name, value in tower.items()} | {name: torch.zeros(3) for name in more}
        torch.save(dict(state_dict=state), tmp_path / "theirs.pth")
        run_model(capsys, "--import", f"timm:{tmp_path}/theirs.pth", "--preset", "pocket", "--out", tmp_path / "x.pt")
        got = load_checkpoint(tmp_path / "x.pt")[0].visual.state_dict()
        assert all(torch.equal(got[name], value) for name, value in tower.items() if "patch_embed" not in name)


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
def test_to_open_clip_and_back(open_clip, tmp_path, changes):
    tokenizer, folder = toy_vocabulary(), tmp_path / "to"
    ours = saved(tmp_path / "last.pt", replace(TINY, **changes), tokenizer)
    said = run_script("model.py", tmp_path / "last.pt", "--export", "open_clip", folder).stdout
    assert "bpe_path" in said, "a vocabulary of its own lies at a path, which must be said"
    theirs, pixels, our_pixels = compare(open_clip, folder, ours, tokenizer, picture())
    close(data.normalize(our_pixels), pixels)
    with torch.no_grad():
        close(ours.encode_image(pixels), theirs.encode_image(pixels, normalize=True))

    run_script("model.py", "--import", f"open_clip:{folder}", "--out", tmp_path / "back.pt")
    back, words, config = load_checkpoint(tmp_path / "back.pt")
    assert words.merges == tokenizer.merges and (config.pool, config.heads) == (ours.config.pool, 4)
    with torch.no_grad():
        close(back.encode_image(pixels), ours.encode_image(pixels))
        tokens = tokenizer(CAPTIONS, 16)
        close(back.encode_text(tokens), ours.encode_text(tokens))


@needs_shared
@pytest.mark.slow
def test_vit_b16_to_open_clip(open_clip, tmp_path, capsys):
    """With CLIP's vocabulary, which open_clip has itself, and a photograph."""
    tokenizer = BytePairTokenizer.from_file(SHARED / "bpe_simple_vocab_16e6.txt.gz")
    ours = saved(tmp_path / "last.pt", replace(PAPER, method="clip"), tokenizer)
    run_model(capsys, tmp_path / "last.pt", "--export", "open_clip", tmp_path / "to")
    assert "tokenizer_kwargs" not in (tmp_path / "to" / "open_clip_config.json").read_text()
    photo = Image.open(next((SHARED / "photos").rglob("*.jpg")))
    theirs, pixels, our_pixels = compare(open_clip, tmp_path / "to", ours, tokenizer, photo)
    # a level of 255 is a fifty-eighth of the deviation: JPEGs that we decode at reduced size are off by some
    assert (data.normalize(our_pixels) - pixels).abs().mean() < 1 / 58
    with torch.no_grad():
        close(ours.encode_image(pixels), theirs.encode_image(pixels, normalize=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-16-quickgelu"])
def test_from_open_clip(open_clip, tmp_path, name, capsys):
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
    run_model(capsys, "--import", f"open_clip:{tmp_path}", "--out", tmp_path / "x.pt")
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
                                           (dict(pool="max"), "--pool max"), (dict(method="filip"), "FILIP")])
def test_what_open_clip_lacks_is_not_exported(tmp_path, change, named):
    saved(tmp_path / "last.pt", replace(TINY, **change), toy_vocabulary())
    with pytest.raises(UserError, match=named):
        model.main([str(tmp_path / "last.pt"), "--export", "open_clip", str(tmp_path / "to")])
    assert not (tmp_path / "to").exists()


# ------------------------------------------------------------------------------------------------------ start of a run

SMALL = ["train.py", "--image-size", 32, "--patch-size", 16, "--width", 32, "--depth", 2, "--heads", 2,
         "--text-width", 32, "--text-heads", 2, "--embed-dim", 16, "--n-codes", 16, "--quantizer-hidden", 16,
         "--quantizer-bottleneck", 8, "--vocab-size", 600, "--pool", "cls", "--batch-size", 8,
         "--data", "shapes:train=64", "--lr", 0, "--lr-start", 0, "--lr-end", 0, "--weight-decay", 0]


@pytest.mark.slow
def test_a_run_starts_from_public_weights_and_goes_on_without_reading_them_again(tmp_path):
    """At learning rate 0 the first step leaves the towers, and so the teacher, at what was read."""
    config = replace(TINY, patch_size=16, width=32, heads=2, text_width=32, text_heads=2, embed_dim=16, method="clip",
                     pool="cls")
    tokenizer = toy_vocabulary()
    public = saved(tmp_path / "public.pt", config, tokenizer)
    state, run = public.state_dict(), [*SMALL, "--context-length", 16, "--out", tmp_path / "run"]
    model.export(public, tokenizer, "timm", tmp_path / "vit.pth")
    model.export(public, tokenizer, "open_clip", tmp_path / "public")

    run_script(*run, "--steps", 1, "--init", f"timm:{tmp_path}/vit.pth")
    trained = load_state(tmp_path / "run" / "last.pt")
    for name, value in public.visual.state_dict().items():
        torch.testing.assert_close(trained["model"]["visual." + name], value)
        torch.testing.assert_close(trained["teacher"]["visual." + name], value)
    assert not torch.allclose(trained["model"]["text.pos_embed"], state["text.pos_embed"])
    (tmp_path / "vit.pth").unlink()
    again = run_script(*run, "--steps", 1, "--init", f"timm:{tmp_path}/vit.pth")
    assert "going on from step 1" in again.stdout
    error = run_script(*run, "--steps", 1, check=2).stderr
    assert "init = timm:" in error, "another start is another run"

    run[-1] = tmp_path / "both"
    run_script(*run, "--steps", 1, "--init", f"open_clip:{tmp_path}/public")
    trained = load_state(tmp_path / "both" / "last.pt")
    assert trained["tokenizer"] == tokenizer.state(), "the vocabulary comes with the weights"
    for name in ("text.token_embedding.weight", "text.blocks.1.mlp.fc2.bias", "image_proj.weight", "text_proj.weight"):
        torch.testing.assert_close(trained["model"][name], state[name])
    run[-1] = tmp_path / "third"
    error = run_script(*run[:-4], "--out", tmp_path / "third", "--init", f"open_clip:{tmp_path}/public", check=2).stderr
    assert "give --context-length 16" in error


@pytest.mark.parametrize("content, init, says", [
    (None, "timm:{}", "no file"),
    (b"rubbish", "timm:{}", "cannot read weights"),
    ({"x": torch.zeros(2)}, "timm:{}", "patch_embed"),
    (None, "open_clip:{}", "open_clip_config.json"),
    (None, "nothing:{}", "wanted timm:FILE or open_clip:DIR"),
])
def test_a_start_that_cannot_be(tmp_path, content, init, says):
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with pytest.raises(UserError, match=says) as told:
        model.initialize(MaskCLIP(TINY, 5), init.format(path))
    assert "\n" not in str(told.value)


def test_weights_that_do_not_fit_are_named(tmp_path):
    public = saved(tmp_path / "public.pt", TINY, toy_vocabulary()).visual.state_dict()
    net = MaskCLIP(TINY, 5)
    visual = {f"visual.{name}": value for name, value in public.items()}
    lacking = {name: value for name, value in visual.items() if name != "visual.norm.bias"}
    for state, says in ((lacking, "Missing .*visual.norm.bias"),
                        (visual | {"visual.norm_pre.weight": torch.zeros(64)}, "Unexpected .*visual.norm_pre.weight"),
                        (visual | {"visual.norm.bias": torch.zeros(65)}, "size mismatch .*visual.norm.bias")):
        with pytest.raises(UserError, match=says) as told:
            model.load_public(net, state, "timm:F")
        assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="Missing .*text.pos_embed"):
        model.load_public(net, visual | dict(logit_scale=net.logit_scale), "open_clip:F")
    model.load_public(net, visual, "timm:F")
    assert torch.equal(net.visual.norm.bias, public["norm.bias"])


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
    plain, config = model.read_public(f"open_clip:{tmp_path / 'to'}", PAPER)
    assert config.dialect == "openai" and plain.keys() == {
        name for name in ours.state_dict() if name.startswith(model.BOTH_HAVE)}
    file = tmp_path / "to" / "open_clip_pytorch_model.bin"
    state = {f"module._orig_mod.{name}": value for name, value in torch.load(file, weights_only=True).items()}
    torch.save(state | {name: torch.tensor(32) for name in ("input_resolution", "context_length", "vocab_size")}, file)
    read = model.read_public(f"open_clip:{file}", PAPER)[0]
    assert read.keys() == plain.keys() and all(torch.equal(read[name], plain[name]) for name in plain)
    (tmp_path / "to" / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match="no open_clip_config.json beside .*open_clip.get_model_config"):
        model.read_public(f"open_clip:{file}", PAPER)


def test_the_cost_of_a_checkpoint_is_that_of_its_own_model(tmp_path, capsys):
    config = replace(TINY, method="clip")
    saved(tmp_path / "last.pt", config, toy_vocabulary())
    said = run_model(capsys, tmp_path / "last.pt")
    model.describe(config)
    assert said == capsys.readouterr().out and said.startswith("clip: 32 px")


@pytest.mark.parametrize("line, says", [
    ("none.pt", "no checkpoint at none.pt"),
    *((line, "wanted python model.py") for line in (
        "--out x.pt", "--bpe x", "--import timm:b", "x.pt --import timm:b --out c", "x.pt --out c", "--export timm a",
        "x.pt --export timm a --import timm:b --out c")),
    ("--import timm:vit.pth --preset pocket --out file/x.pt", "file/x.pt cannot be written")])
def test_command_lines_that_make_no_sense(line, says, tmp_path, monkeypatch):
    saved(tmp_path / "last.pt", PRESETS["pocket"], toy_vocabulary())
    monkeypatch.chdir(tmp_path)
    model.main(["last.pt", "--export", "timm", "vit.pth"])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=says):
        model.main(line.split())


def test_safetensors_are_read_as_their_library_reads_them(tmp_path):
    library = pytest.importorskip("safetensors.torch", reason="safetensors is the reference")
    tensors = dict(a=torch.randn(3, 4), b=torch.randn(5).half(), c=torch.tensor(2.5), d=torch.randn(2, 1, 2).bfloat16(),
                   e=torch.arange(3))
    library.save_file(tensors, tmp_path / "x.safetensors", metadata=dict(format="pt"))
    ours, theirs = model.read_safetensors(tmp_path / "x.safetensors"), library.load_file(tmp_path / "x.safetensors")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_are_float32_without_the_marks_of_wrappers(suffix, tmp_path):
    """However the file packs them: half precision in a DistributedDataParallel of what torch.compile made."""
    path, weight = tmp_path / f"x.{suffix}", torch.randn(3, 4).half()
    if suffix == "pth":
        torch.save({"state_dict": {"module._orig_mod.weight": weight}}, path)
    else:
        header = json.dumps({"module._orig_mod.weight": dict(dtype="F16", shape=[3, 4], data_offsets=[0, 24])}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + weight.numpy().tobytes())
    state = model.read_weights(path)
    assert list(state) == ["weight"] and state["weight"].dtype == torch.float32
    assert torch.equal(state["weight"], weight.float())
