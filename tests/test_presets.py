"""Every number of the presets and recipes at full scale against a table, row by row with where it comes from; and what
the ICinW preset does with labeled data.

"supp. B" is the supplement's section of experiment details, by its paragraph.  "silent" is what neither it nor, as far
as we know, the main text says: then comes who the number is from.  A number that is not in its table fails the test.
"""
import re
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

import data
import dense
import eval_linear
import finetune
import train
from conftest import ROOT
from model import PRESETS, Config, preset_for, random_mask
from train import cosine_schedule, parse, parse_train_options

PRETRAINING = [                     # preset vit-b16-yfcc15m: field, value, source
    ("image_size", 224, "supp. B, fine-tuning: a single 224 x 224 crop"),
    ("patch_size", 16, "supp. A: ViT-B/16 in previous experiments"),
    ("width", 768, "supp. A: ViT-B"), ("depth", 12, "supp. B, segmentation: the 12th block is the last of ViT-B"),
    ("heads", 12, "supp. A: ViT-B"),
    ("dialect", "timm", "silent: SLIP"), ("init", "mae", "silent: MAE"),
    ("pool", "cls", "silent: CLIP, SLIP"), ("drop_path", 0.0, "silent: none"),
    ("text_width", 512, "silent: CLIP, SLIP"), ("text_depth", 12, "silent: CLIP, SLIP"),
    ("text_heads", 8, "silent: CLIP, SLIP"), ("context_length", 77, "silent: CLIP, SLIP"),
    ("vocab_size", 49408, "silent: CLIP's merges"), ("causal", True, "silent: CLIP"),
    ("embed_dim", 512, "silent: SLIP"),
    ("target", "codes", "main text: soft codes"), ("mask_ratio", 0.75, "supp. B, pre-training: random, 75%"),
    ("decoder_depth", 1, "main text: one layer"),
    ("n_codes", 8192, "silent: iBOT"), ("quantizer_hidden", 2048, "silent: iBOT"),
    ("quantizer_bottleneck", 256, "silent: iBOT"), ("temp_s", 0.1, "silent: iBOT"), ("temp_t", 0.04, "silent: iBOT"),
    ("center_momentum", 0.9, "silent: iBOT"),
    ("momentum", 0.999, "supp. B, pre-training: EMA weight"),
    ("momentum_end", 0.9999, "supp. B, pre-training: increases linearly to"),
    ("word_ratio", 0.2, "main text, section 4.1: 20% of the words"),
    ("text_decoder_depth", 4, "main text: four layers"),
    ("distillation_weight", 0.05, "main text, lambda of Eq. 8"), ("mlm_weight", 0.05, "main text, beta of Eq. 8"),
    ("contrastive_reduction", "sum", "main text, Eq. 8 as written"),
    ("unicl", True, "supp. B, ICinW: we use the UniCL"),
    ("epochs", 25, "supp. B, pre-training"), ("batch_size", 4096, "supp. B, pre-training: for all the experiments"),
    ("lr", 1e-3, "supp. B, pre-training"), ("lr_end", 1e-5, "supp. B, pre-training: decay to"),
    ("lr_start", 1e-6, "silent: SLIP"), ("warmup_epochs", 1, "supp. B, pre-training: one epoch"),
    ("weight_decay", 0.1, "supp. B, pre-training"), ("beta2", 0.98, "silent: SLIP"), ("clip_grad", 0.0, "silent: SLIP"),
    ("crop_min", 0.5, "silent: SLIP"), ("flip", False, "silent: SLIP"),
]
CHANGES = {                         # of the other presets
    "vit-b16-yfcc15m": [],
    "vit-b32-yfcc15m": [("patch_size", 32, "supp. A, Table 1 left: ViT-B/32")],
    "vit-b16-cc3m": [],             # supp. A, Table 1 right: ViT-B/16, and supp. B's 25 epochs name no exception
    "vit-b16-icinw": [("epochs", 32, "supp. B, ICinW"), ("batch_size", 16384, "supp. B, ICinW")],
}
PLANNED = [                         # pairs that --plan counts, in millions
    ("vit-b32-yfcc15m", 15, "supp. B, pre-training: YFCC15M"), ("vit-b16-yfcc15m", 15, "the same"),
    ("vit-b16-cc3m", 3, "supp. A: CC3M"),
    ("vit-b16-icinw", 15 + 3 + 12 + 13, "supp. B, ICinW: YFCC15M, GCC3M + 12M, ImageNet-21K without ImageNet-1K"),
]
MASKCLIP_ALONE = {f.name for f in fields(Config) if f.metadata["group"] != "compared systems"} - {
    "method", "view_crop_min"}      # these and the compared systems' are test_compared.py's

IMAGENET = [                        # finetune.py, recipe imagenet
    ("epochs", 100, "supp. B, fine-tuning"), ("warmup_epochs", 20, "supp. B, fine-tuning"),
    ("lr", 6e-4, "supp. B, fine-tuning: warmed up to"), ("lr_end", 1e-6, "supp. B, fine-tuning: decay to"),
    ("layer_decay", 0.7, "supp. B, fine-tuning"), ("batch_size", 2048, "silent: FT-CLIP, same author and rate"),
    ("weight_decay", 0.05, "silent: MAE"), ("clip_grad", 0.0, "silent: MAE"), ("drop_path", 0.1, "silent: MAE"),
    ("crop_min", 0.08, "silent: MAE"), ("flip", True, "silent: MAE"), ("randaugment", 9, "silent: MAE"),
    ("erasing", 0.25, "silent: MAE"), ("mixup", 0.8, "silent: MAE"), ("cutmix", 1.0, "silent: MAE"),
    ("smoothing", 0.1, "silent: MAE"), ("crop_share", 224 / 256, "silent: MAE"),
]
PROBE = [                           # eval_linear.py
    ("epochs", 90, "supp. B, linear probing"), ("lr", 6.4, "supp. B, linear probing"),
    ("batch_size", 0, "supp. B, linear probing: 16384, by `recipe`"), ("warmup_epochs", -1.0, "silent: MAE, 10 of 90"),
]
ADE20K = [                          # dense.py upernet, recipe ade20k
    ("steps", 160_000, "supp. B, ADE20K"), ("batch_size", 16, "supp. B, ADE20K: 8 GPUs with 2 images"),
    ("lr", 2e-4, "supp. B, ADE20K"), ("warmup_steps", 1500, "supp. B, ADE20K"),
    ("weight_decay", 0.05, "supp. B, ADE20K"), ("layer_decay", 0.6, "supp. B, ADE20K"),
    ("drop_path", 0.1, "supp. B, ADE20K: stochastic depth"), ("clip_grad", 0.0, "silent: BEiT"),
    ("crop", 512, "supp. B, ADE20K: input size 512 x 512"), ("test_size", 512, "silent: mmsegmentation's (2048, 512)"),
    ("channels", 768, "silent: BEiT"), ("aux_channels", 256, "silent: mmsegmentation"),
    ("distort", True, "supp. B, ADE20K: photo-metric distortion"), ("limit", 0, "all test images"),
    ("from_scratch", False, "supp. B, ADE20K: the backbone is pre-trained"),
]
COCO = [                            # dense.py maskrcnn, recipe coco
    ("epochs", 12, "supp. B, COCO: 1x"), ("steps", 0, "as the epochs say"), ("batch_size", 16, "supp. B, COCO"),
    ("lr", 1e-4, "supp. B, COCO"), ("warmup_steps", 500, "silent: mmdetection"),
    ("weight_decay", 0.05, "supp. B, COCO"), ("layer_decay", 0.75, "supp. B, COCO"),
    ("drop_path", 0.1, "supp. B, COCO: stochastic depth"), ("clip_grad", 0.0, "silent: mmdetection"),
    ("short_side", 800, "supp. B, COCO"), ("long_side", 1333, "supp. B, COCO"),
    ("channels", 256, "silent: mmdetection"), ("head_width", 1024, "silent: mmdetection"),
    ("mask_depth", 4, "silent: mmdetection"), ("rpn_samples", 256, "silent: mmdetection"),
    ("proposals", 1000, "silent: mmdetection 2.x"), ("roi_samples", 512, "silent: mmdetection"),
    ("score_threshold", 0.05, "silent: mmdetection"), ("limit", 0, "all test images"),
    ("from_scratch", False, "supp. B, COCO: the backbone is pre-trained"),
]


def compared(options, table: list[tuple], names: set[str]):
    """All fields of these names have the table's values, and a row."""
    rows = {name: value for name, value, source in table}
    assert len(rows) == len(table) and all(source for *_, source in table)
    assert {name: getattr(options, name) for name in names} == pytest.approx(rows)


def in_groups(options, *groups: str) -> set[str]:
    return {f.name for f in fields(options) if f.metadata["group"] in groups} - {"recipe"}


@pytest.mark.parametrize("preset", CHANGES)
def test_a_preset_is_the_supplements(preset):
    changes = {name: row for row in CHANGES[preset] for name in row[:1]}
    compared(preset_for(preset, "maskclip"), [changes.get(row[0], row) for row in PRETRAINING], MASKCLIP_ALONE)
    assert set(PRESETS) == {"pocket", *CHANGES}


@pytest.mark.parametrize("preset, millions, source", PLANNED)
def test_a_plan_counts_the_data_of_the_preset(preset, millions, source):
    assert parse_train_options(["--preset", preset]).pairs == millions * 1_000_000, source


@pytest.mark.parametrize("options, table, groups", [
    (finetune.parse_options(["--data", "folder:imagenet"]), IMAGENET, ("recipe", "augmentation")),
    (parse(eval_linear.Options, "", ["--data", "folder:imagenet"], ("checkpoint",)), PROBE, ("recipe",)),
    (dense.parse_upernet(["--data", "ade20k:DIR"]), ADE20K, ("recipe", "test")),
    (dense.parse_maskrcnn(["--data", "coco:DIR"]), COCO, ("recipe", "test", "detector")),
], ids=["imagenet", "linear probe", "ade20k", "coco"])
def test_a_recipe_is_the_supplements(options, table, groups):
    compared(options, table, in_groups(options, *groups))


def test_the_probe_on_imagenet():
    options = eval_linear.Options()
    assert eval_linear.recipe(options, 1_281_167) == (16384, 6.4), "supp. B, linear probing"
    head = eval_linear.make_head(768, 1000, 0)
    assert not head[0].affine and head[0].eps == 1e-6, "supp. B: a norm without learnable parameters; MAE's eps"
    assert head[1].weight.detach().std() == pytest.approx(0.01, rel=0.05), "silent: MAE"


@pytest.mark.parametrize("value, wanted, source", [
    (lambda: random_mask(1, 196, 0.75)[1].shape[1], 147, "supp. B, pre-training: 75% of 14 x 14 patches"),
    (lambda: random_mask(1, 49, 0.75)[0].shape[1], 12, "MAE's rounding, of 7 x 7 patches"),
    (lambda: cosine_schedule(99, 100, 10, 1e-3, 1e-5, 1e-6), 1e-5, "supp. B: a cosine to 1e-5 at the last step"),
    (lambda: [round(dense.step_schedule(12 * i, 144, 0), 9) for i in (7, 8, 10, 11)], [1, 0.1, 0.1, 0.01],
     "supp. B, COCO: a tenth at the 8th and at the 11th epoch"),
    (lambda: dense.linear_schedule(0, 160_000, 1500) < 1e-3, True, "BEiT's warm-up starts near 0"),
    (lambda: dense.linear_schedule(80_750, 160_000, 1500), 0.5, "supp. B, ADE20K: linear decay"),
    (lambda: dense.Pyramid(SimpleViT(12)).taps, [4, 6, 8, 12], "supp. B, ADE20K: blocks 4, 6, 8, 12"),
    (lambda: [len(t) for t in (data.TEMPLATES_7, data.TEMPLATES_85)], [7, 85], "supp. B: 7 prompts, and 85"),
    (lambda: dense.scaled_sides(640, 480, 512), (683, 512), "supp. B, segmentation: 512 x 512, the ratio kept"),
])
def test_numbers_in_the_code(value, wanted, source):
    assert value() == pytest.approx(wanted, rel=0.01), source


class SimpleViT(torch.nn.Module):
    """As much of a tower as Pyramid asks for"""
    def __init__(self, depth):
        super().__init__()
        self.blocks = [SimpleNamespace() for _ in range(depth)]
        self.cls_token = torch.zeros(1, 1, 8)


# ---- the ICinW preset's labeled data --------------------------------------------------------------------------------

@pytest.fixture
def world(tmp_path):
    """Three classes as ImageNet-21K has them, of which the second is ImageNet-1K's, two images each."""
    for name in ("n01", "n02", "n03"):
        (tmp_path / "in21k" / name / "more").mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).integers(256, size=(32, 32, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "in21k" / name / ("more" if i else "") / f"{i}.png")
    (tmp_path / "in21k" / "classnames.txt").write_text("n01\tcat\nn02\tdog\nn03\towl\n")
    (tmp_path / "in1k.txt").write_text("n02\nn09\n")
    return tmp_path


def options_for(world, *more):
    return parse_train_options(["--data", "shapes:train=8", "--data", f"folder:{world}/in21k", "--batch-size", "8",
                                "--method", "clip", "--out", f"{world}/run", *more])


def test_folders_are_left_out(world):
    whole = train.open_pairs(options_for(world), world)
    kept = train.open_pairs(options_for(world, "--exclude-classes", f"{world}/in1k.txt"), world)
    assert (len(whole), len(kept)) == (14, 12)
    assert [kept.name(i) for i in range(8, 12)] == ["n01/0.png", "n01/more/1.png", "n03/0.png", "n03/more/1.png"]
    assert [kept.read(i).text_label for i in range(8, 12)] == [0, 0, 2, 2] and "owl" in kept.read(10).captions[0]
    assert [note for note in kept.notes if "left out" in note] == [
        f"2 images left out: {world}/in21k has 1 of the 2 folders to leave out"]
    assert not any("left out" in note for note in whole.notes)


@pytest.mark.parametrize("lines, told", [
    ("n09\n", "has none of the 1 folders to leave out, such as n09"), ("\n", "folders to leave out, one a line"),
])
def test_a_list_without_effect_is_told(world, lines, told):
    (world / "in1k.txt").write_text(lines)
    with pytest.raises(data.UserError, match=told):
        train.open_pairs(options_for(world, "--exclude-classes", f"{world}/in1k.txt"), world)


def test_a_list_without_folders_is_told(world):
    pairs = parse_train_options(["--data", "shapes:train=8", "--exclude-classes", f"{world}/in1k.txt"])
    with pytest.raises(data.UserError, match="--exclude-classes leaves out folders of folder:DIR"):
        train.open_pairs(pairs, world)


def test_labels_stay_out_of_the_contrast_without_unicl(world):
    rng = np.random.default_rng(0)
    for more, labeled in (((), True), (("--no-unicl",), False)):
        options = options_for(world, *more)
        mixed = train.open_pairs(options, world)
        record = train.PairTransform(options, mixed)(mixed.read(9), rng)
        assert ("labels" in record) == labeled and "cat" in record["captions"]
    with pytest.raises(data.UserError, match="--no-unicl"):
        train.open_pairs(replace(options_for(world), method="filip"), world)
    assert len(train.open_pairs(replace(options_for(world), method="filip", unicl=False), world)) == 14


# ---- YFCC15M's captions: the step that docs/DATA.md describes -------------------------------------------------------

@pytest.fixture
def step(tmp_path, monkeypatch):
    """The page's program, in a folder with the image of one photograph"""
    block, = re.findall(r"```python\n(# yfcc15m.py.*?)```", (ROOT / "docs" / "DATA.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images" / "abc" / "def").mkdir(parents=True)
    (tmp_path / "images" / "abc" / "def" / "abcdef0.jpg").touch()
    return block


@pytest.mark.parametrize("text, wanted", [
    ("A+red%20kite%2C+flying", "A red kite, flying"), ("IMG_0520", "IMG_0520"), ("", ""),
    ("see+%3Ca+href%3D%22http%3A//x.org%22%3Emy+page%3C/a%3E", "see my page"),
    ("%3Cb%3Ebold%3C/b%3E+and+%3Ci%3Eslanted%3C/i%3E", "bold and slanted"),
    ("more+at+http%3A//x.org/a%3Fb+or+www.y.org", "more at  or "),
])
def test_captions_of_yfcc15m_are_cleaned_as_slip_does(step, text, wanted):
    program = dict(__name__="yfcc15m")
    exec(step, program)
    assert program["clean"](text) == wanted


def test_captions_of_yfcc15m_are_of_the_chosen_lines_with_an_image(step, tmp_path):
    def line(number, name):
        return "\t".join([number, "1", name, *"34567", "A+kite", "by+the+sea", *"abcde", "page", "address", *"fghijkl"])
    lines = line("0", "abcdef0"), line("1", "abcdef0"), line("2", "absent")
    (tmp_path / "yfcc100m_dataset.txt").write_text("".join(text + "\n" for text in lines))
    (tmp_path / "yfcc100m_subset_data.tsv").write_text("1\t1\tabcdef0\n2\t1\tabsent\n")
    exec(step, dict(__name__="__main__"))
    assert (tmp_path / "yfcc15m.jsonl").read_text() == (
        '{"filepath": "images/abc/def/abcdef0.jpg", "url": "address", "caption": ["A kite", "by the sea"]}\n')
