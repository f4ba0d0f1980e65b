"""The networks of MaskCLIP, from the patch to the teacher, in reading order.

    images (B,3,H,W) ──┬─ student ViT, all patches ─► image_proj ─► z_I (B,E)                            encode_image
                       ├─ student ViT, K visible patches ─► 1-layer decoder ─► h ─► codes (B,M,C)        predict_hidden
                       └─ EMA teacher ViT, all patches ─► h ─► soft codes (B,M,C), no gradient           Teacher
    tokens (B,L)    ───┬─ text transformer ─► end token ─► text_proj ─► z_T (B,E)                        encode_text
                       └─ text transformer, 20% masked ─► 4-layer text decoder ─► word logits (n,V)      predict_words

Config holds every number of a run, PRESETS the named ones, METHODS the rows of supplement Table 2.
SLIP, FILIP, DeCLIP and DeFILIP, which the paper compares with, stand together after the teacher; they and what follows
them, checkpoints, exchange of weights and costs, can wait.
Letters: B images, N patches, K visible and M hidden ones, D width, H heads, L tokens, V vocabulary, E embedding,
C codes.

    python model.py --preset vit-b16-yfcc15m --method maskclip     parameters, FLOPs and activation memory by branch
    python model.py CHECKPOINT --export timm FILE | open_clip DIR  our weights for others
    python model.py --import open_clip:DIR --out CHECKPOINT        public weights for our evaluation scripts
"""
import argparse
import contextlib
import copy
import gzip
import hashlib
import json
import math
import os
import re
import shlex
import sys
import weakref
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import losses
from data import (MEAN, STD, BytePairTokenizer, UserError, at_least, one_line, open_text, read_json, refusing, run,
                  say)
from losses import fp32, patchify


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: one dataclass, whose fields are also the options of train.py
# ---------------------------------------------------------------------------------------------------------------------

def opt(default, help: str, group: str = "run", choices=None):
    """A dataclass field that knows its help text, the group --help lists it under, and the values it may take."""
    return field(default=default, metadata=dict(help=help, group=group, choices=choices))


@dataclass
class Config:
    """A model and its training recipe.  Defaults are the paper's main run: ViT-B/16 on YFCC15M, batch 4096."""
    method: str = opt("maskclip", "what to train: clip, or a row of supplement Table 2 (clip+mae, clip+feature, "
                      "clip+ema, maskclip), or a compared system (slip, filip, declip, defilip)", "what")
    # image tower
    image_size: int = opt(224, "side of the square input, pixels (paper)", "image tower")
    patch_size: int = opt(16, "side of a patch, pixels (paper)", "image tower")
    width: int = opt(768, "width of the image tower (paper: ViT-B)", "image tower")
    depth: int = opt(12, "blocks of the image tower (paper: ViT-B)", "image tower")
    heads: int = opt(12, "attention heads of the image tower (paper: ViT-B)", "image tower")
    dialect: str = opt("timm", "timm's image tower (SLIP; paper silent), or that of public CLIP weights: clip has a "
                       "norm before the blocks, openai besides its quick GELU in both towers", "image tower",
                       ("timm", "clip", "openai"))
    init: str = opt("mae", "initial weights: mae's; timm:FILE, a public image tower; open_clip:DIR, both towers and "
                    "the vocabulary; CHECKPOINT, one of train.py's; paper silent", "image tower")
    pool: str = opt("cls", "what stands for the image: the class token, or the patches' mean, or their maximum in each "
                    "channel; paper silent", "image tower", ("cls", "mean", "max"))
    drop_path: float = opt(0.0, "stochastic depth of the image tower in pre-training (ours)", "image tower")
    # text tower
    text_width: int = opt(512, "width of the text tower (paper)", "text tower")
    text_depth: int = opt(12, "blocks of the text tower (paper)", "text tower")
    text_heads: int = opt(8, "attention heads of the text tower (paper)", "text tower")
    context_length: int = opt(77, "longest caption in tokens, start and end included (paper)", "text tower")
    vocab_size: int = opt(49408, "rows of the word table; raised to the tokenizer's size (paper: CLIP's)", "text tower")
    causal: bool = opt(True, "words see only words before them (CLIP; paper silent)", "text tower")
    embed_dim: int = opt(512, "width E of the joint embedding (SLIP; paper silent)", "text tower")
    # masked self-distillation
    target: str = opt("codes", "what the student predicts of the teacher's: the quantizer's codes, or normalized "
                      "features (BootMAE)", "self-distillation", ("codes", "features"))
    mask_ratio: float = opt(0.75, "share of patches hidden from the student (paper)", "self-distillation")
    decoder_depth: int = opt(1, "blocks of the image decoder (paper)", "self-distillation")
    n_codes: int = opt(8192, "codes C of the online quantizer (iBOT; paper silent)", "self-distillation")
    quantizer_hidden: int = opt(2048, "hidden width of the quantizer (iBOT; paper silent)", "self-distillation")
    quantizer_bottleneck: int = opt(256, "width in which codes are compared (iBOT; paper silent)", "self-distillation")
    temp_s: float = opt(0.1, "student temperature (iBOT; paper silent)", "self-distillation")
    temp_t: float = opt(0.04, "teacher temperature, constant (iBOT's at its start; paper silent)", "self-distillation")
    center_momentum: float = opt(0.9, "momentum of the center of the teacher's logits (iBOT)", "self-distillation")
    momentum: float = opt(0.999, "teacher momentum at step 0 (paper)", "self-distillation")
    momentum_end: float = opt(0.9999, "teacher momentum at the last step, linear to it (paper)", "self-distillation")
    # masked language modelling
    word_ratio: float = opt(0.2, "share of words masked (paper)", "masked language modelling")
    text_decoder_depth: int = opt(4, "blocks of the text decoder (paper)", "masked language modelling")
    # loss
    distillation_weight: float = opt(0.05, "lambda of Eq. 8 (paper); also the pixel and feature terms' weight", "loss")
    mlm_weight: float = opt(0.05, "beta of Eq. 8 (paper)", "loss")
    contrastive_reduction: str = opt("sum", "L_I + L_T as Eq. 8 writes it, or their mean as CLIP's code", "loss",
                                     ("sum", "mean"))
    unicl: bool = opt(True, "of data with classes: pairs of one class are positives (UniCL); else each is a pair of "
                      "its own (the paper's \"unified format\" may mean no more)", "loss")
    # compared systems: weights, heads and views, see SLIP, FILIP, DeCLIP below
    contrastive_weight: float = opt(0.4, "weight of DeCLIP's contrastive term (DeCLIP)", "compared systems")
    simclr_weight: float = opt(1.0, "weight of SLIP's NT-Xent (SLIP)", "compared systems")
    token_weight: float = opt(1.0, "weight of FILIP's token-wise contrast (FILIP; DeFILIP 0.2)", "compared systems")
    simsiam_weight: float = opt(0.2, "weight of DeCLIP's SimSiam (DeCLIP)", "compared systems")
    neighbor_weight: float = opt(0.2, "weight of DeCLIP's contrast with nearest texts (DeCLIP)", "compared systems")
    slip_hidden: int = opt(4096, "hidden width of SLIP's projection head (SLIP)", "compared systems")
    simsiam_hidden: int = opt(1024, "width of DeCLIP's projector; half of it hides in its predictor (DeCLIP)",
                              "compared systems")
    token_dim: int = opt(256, "width in which FILIP compares patches and words (FILIP)", "compared systems")
    token_top_k: int = opt(0, "tokens of the other side that FILIP compares with, 0: all (FILIP; benchmark 16)",
                           "compared systems")
    queue_size: int = opt(65536, "texts in DeCLIP's queue of neighbors (DeCLIP)", "compared systems")
    # recipe
    epochs: float = opt(25.0, "passes over the data (paper)", "recipe")
    batch_size: int = opt(4096, "pairs a step, over all processes and micro-batches (paper)", "recipe")
    lr: float = opt(1e-3, "peak learning rate (paper)", "recipe")
    lr_end: float = opt(1e-5, "learning rate at the last step, reached by half a cosine (paper)", "recipe")
    lr_start: float = opt(1e-6, "learning rate at step 0 of the warm-up (SLIP; paper silent)", "recipe")
    warmup_epochs: float = opt(1.0, "epochs of linear warm-up (paper), a fifth of the run at most (ours)", "recipe")
    weight_decay: float = opt(0.1, "AdamW weight decay of matrices (paper); vectors, class and mask token, positions: "
                              "none (ours)", "recipe")
    beta2: float = opt(0.98, "AdamW beta2, beta1 is 0.9 (SLIP; paper silent)", "recipe")
    clip_grad: float = opt(0.0, "largest gradient norm, 0: no clipping (paper silent, SLIP none)", "recipe")
    crop_min: float = opt(0.5, "smallest share of the image a random crop keeps, 1: whole image (SLIP)", "recipe")
    flip: bool = opt(False, "mirror half of the images (SLIP does not; captions know left from right)", "recipe")
    view_crop_min: float = opt(0.08, "crop_min of the augmented views of SLIP and DeCLIP (SLIP; DeCLIP 0.2)", "recipe")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


PAPER = Config()
PRESETS = {
    "pocket": replace(
        PAPER, image_size=48, patch_size=8, width=128, depth=4, heads=4,
        text_width=128, text_depth=2, text_heads=4, context_length=24, vocab_size=768, embed_dim=128,
        n_codes=512, quantizer_hidden=256, quantizer_bottleneck=64,
        slip_hidden=256, simsiam_hidden=256, token_dim=128, queue_size=1024, view_crop_min=0.5,
        epochs=6, batch_size=64, warmup_epochs=0.24,
        # paper: 0.999 over 90,000 steps; here: less, because the teacher must be able to follow within two thousand
        momentum=0.99, momentum_end=0.999),
    "vit-b16-yfcc15m": PAPER,
    "vit-b32-yfcc15m": replace(PAPER, patch_size=32),
    # the supplement's recipe, 25 epochs, names no other for CC3M; SLIP's rows of Table 1 are runs of 40: --epochs 40
    "vit-b16-cc3m": PAPER,
    # UniCL's contrast comes with the labels: --data shards:PAIRS --data folder:IMAGENET21K --exclude-classes IMAGENET1K
    "vit-b16-icinw": replace(PAPER, epochs=32, batch_size=16384),
}

# what a compared system changes in a preset, from its own code, or of FILIP, DeCLIP, DeFILIP from DeCLIP's benchmark.
# A pocket run keeps the recipe of its preset
BENCHMARK = dict(epochs=32, lr_start=1e-4, lr_end=0.0, warmup_epochs=0.67, contrastive_reduction="mean")
RECIPES = {
    # SLIP's README and main.py; all else is the paper's recipe too
    "slip": dict(lr=3e-3, contrastive_reduction="mean"),
    # DeCLIP's benchmark (github.com/Sense-GVT/DeCLIP, yfcc15m_vit_*/config.yaml): 128,000 steps, 2,500 to warm up
    "filip": dict(BENCHMARK, lr=5e-4, weight_decay=0.5),
    "declip": dict(BENCHMARK, view_crop_min=0.2, word_ratio=0.15, mlm_weight=0.2),
}
RECIPES["defilip"] = dict(RECIPES["declip"], token_weight=0.2, token_top_k=16)


def preset_for(preset: str, method: str) -> Config:
    """The preset with the changes of the method's recipe."""
    changes = RECIPES.get(method, {})
    if preset == "pocket":
        group = {f.name: f.metadata["group"] for f in fields(Config)}
        changes = {name: value for name, value in changes.items() if group[name] != "recipe"}
    return replace(PRESETS[preset], method=method, **changes)


# supplement Table 2, row by row: what hidden patches are predicted as (None: there are none), whether the teacher is a
# running average or (momentum 0) the current weights, and whether words are masked too
CLIP = dict(predicts=None, ema=False, mlm=False)
METHODS = {
    "clip": CLIP,
    "clip+mae": dict(CLIP, predicts="pixels"),
    "clip+feature": dict(CLIP, predicts="teacher"),
    "clip+ema": dict(CLIP, predicts="teacher", ema=True),
    "maskclip": dict(CLIP, predicts="teacher", ema=True, mlm=True),
    # compared systems, see SLIP, FILIP, DeCLIP below
    "slip": CLIP,
    "filip": CLIP,
    "declip": dict(CLIP, mlm=True),
    "defilip": dict(CLIP, mlm=True),
}


# ---------------------------------------------------------------------------------------------------------------------
# Blocks, shared by both towers and both decoders
# ---------------------------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head self-attention with one matrix for query, key and value (timm's keys)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool = False, is_word: Tensor | None = None,
                leftmost: int | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D).  is_word (B, N) bool: True where a place may be attended to.

        leftmost: only so many tokens attend, to all of them: (B, leftmost, D).
        """
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)    # (B, H, N, D/H)
        allowed = None if is_word is None else is_word[:, None, None, :]                              # (B, 1, 1, N)
        x = F.scaled_dot_product_attention(q[:, :, :leftmost], k, v, attn_mask=allowed, is_causal=causal)
        return self.proj(x.transpose(1, 2).flatten(2))                                                # (B, N, D)


class MLP(nn.Module):
    """With quick_gelu, GELU as OpenAI's weights want it: x * sigmoid(1.702 x), up to 0.02 off."""

    def __init__(self, width: int, hidden: int, quick_gelu: bool = False):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.quick_gelu = quick_gelu

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * (1.702 * x).sigmoid() if self.quick_gelu else F.gelu(x))


class Block(nn.Module):
    """Pre-norm transformer block: normalize, attend, add; normalize, MLP, add.  Keys as timm's."""

    def __init__(self, width: int, heads: int, eps: float = 1e-6, drop_path: float = 0.0, quick_gelu: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, 4 * width, quick_gelu)
        self.drop_path = drop_path

    def skip_at_random(self, x: Tensor) -> Tensor:
        """Stochastic depth: in training, a residual branch is left out for a share of the samples, the rest scaled up.

        The draw is one for the samples of all processes, of which ours are taken, so it is the same on any number of
        them.
        """
        if self.drop_path == 0 or not self.training:
            return x
        keep, B = 1 - self.drop_path, len(x)
        draw = torch.rand(losses.world_size() * B, 1, 1, device=x.device)
        draw = draw[losses.own_columns(B, x.device)]                                            # (B, 1, 1)
        return x * (draw < keep) / keep

    def forward(self, x: Tensor, causal: bool = False, is_word: Tensor | None = None,
                leftmost: int | None = None) -> Tensor:
        """As Attention.forward"""
        x = x[:, :leftmost] + self.skip_at_random(self.attn(self.norm1(x), causal, is_word, leftmost))
        return x + self.skip_at_random(self.mlp(self.norm2(x)))


def init_linear(module: nn.Module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------------------------------
# Image tower
# ---------------------------------------------------------------------------------------------------------------------

def random_mask(batch: int, patches: int, ratio: float, generator: torch.Generator | None = None,
                rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Which patches the student sees: a random subset of the same size for each image, no block shape.

    Returns keep (batch, K), the indices of visible patches, and hidden (batch, M), those of the others, both sorted.
    K = floor(patches * (1 - ratio)), as MAE rounds it, and at least 1.
    rows: the images of the batch whose masks are wanted; what they are does not depend on it.
    """
    K = max(1, int(patches * (1 - ratio) + 1e-6))
    shuffled = torch.rand(batch, patches, generator=generator)[rows].argsort(dim=1)             # (rows, N)
    return shuffled[:, :K].sort(dim=1).values, shuffled[:, K:].sort(dim=1).values


def unit(x: Tensor) -> Tensor:
    """(..., D) -> (..., D) of length 1, in float32"""
    return F.normalize(fp32(x), dim=-1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """(B, N, D), (B, K) -> (B, K, D): rows `index` of each sample."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def sincos_positions(grid: int, width: int) -> Tensor:
    """(1, grid*grid, width) fixed 2-D sine-cosine position embedding: one half for the row, one for the column."""
    omega = 10000.0 ** -(torch.arange(width // 4) / (width / 4))                                # (width/4,)
    angle = torch.arange(grid)[:, None] * omega                                                 # (grid, width/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                                         # (grid, width/2)
    rows = axis[:, None].expand(grid, grid, -1)
    cols = axis[None, :].expand(grid, grid, -1)
    return torch.cat([rows, cols], dim=2).reshape(1, grid * grid, width)


def pool_tokens(x: Tensor, how: str) -> Tensor:
    """(B, 1+N, D) -> (B, D): the class token, or the mean or each channel's maximum over the patches."""
    if how == "cls":
        return x[:, 0]
    return x[:, 1:].mean(dim=1) if how == "mean" else x[:, 1:].amax(dim=1)


class PatchEmbed(nn.Module):
    """The linear map of a patch, kept as the convolution whose weights timm stores."""

    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, K, 3*p*p) -> (B, K, D)"""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """ViT in timm's dialect: its state-dict keys and arithmetic are those of vit_base_patch16_224 without a head.

    The dialects of public CLIP weights, clip and openai, have a norm before the blocks and another epsilon; openai has
    another GELU.
    """
    def __init__(self, image_size: int = 224, patch_size: int = 16, width: int = 768, depth: int = 12, heads: int = 12,
                 drop_path: float = 0.0, dialect: str = "timm"):
        super().__init__()
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid ** 2, width))
        self.patch_embed = PatchEmbed(patch_size, width)
        eps = 1e-6 if dialect == "timm" else 1e-5
        self.norm_pre = nn.Identity() if dialect == "timm" else nn.LayerNorm(width, eps=eps)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]   # deeper blocks are skipped more often
        self.blocks = nn.ModuleList([Block(width, heads, eps, rate, dialect == "openai") for rate in rates])
        self.norm = nn.LayerNorm(width, eps=eps)
        self.apply(init_linear)                     # paper: silent; here: MAE's initialization
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def positions(self, rows: int, cols: int) -> Tensor:
        """(1, rows*cols, D) position embedding of the patches, bicubically resized when the grid is another one."""
        pos = self.pos_embed[:, 1:]
        if (rows, cols) == (self.grid, self.grid):
            return pos
        pos = pos.reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2).float()              # (1, D, grid, grid)
        pos = F.interpolate(pos, (rows, cols), mode="bicubic", align_corners=False)
        return pos.flatten(2).transpose(1, 2)                                                   # (1, rows*cols, D)

    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, 3, h, w) -> (B, 1+n, D): class token and patches with their positions; n = K of `keep`, else all N."""
        B, _, height, width = images.shape
        p = self.patch_size
        if height % p or width % p:
            raise ValueError(f"image is {height}x{width} px but patches are {p} px: both sides must be multiples "
                             f"of {p}")
        x = patchify(images, p)                                                                 # (B, N, 3*p*p)
        pos = self.positions(height // p, width // p)                                           # (1, N, D)
        if keep is not None:
            x, pos = take(x, keep), take(pos.expand(B, -1, -1), keep)                           # (B, K, .)
        x = self.patch_embed(x) + pos
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1)                        # (B, 1, D)
        return self.norm_pre(torch.cat([cls.to(x.dtype), x], dim=1))

    def forward(self, images: Tensor, keep: Tensor | None = None, leftmost: int | None = None) -> Tensor:
        """(B, 3, h, w) -> (B, 1+n, D) normalized tokens, class token first.

        keep (B, K): only these patches are computed, as the student of self-distillation sees them.
        leftmost: the last block computes only so many tokens, for callers that read no others: 1 for the class token.
        """
        x = self.embed(images, keep)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm(self.blocks[-1](x, leftmost=leftmost))

    # ---- dense tasks only -------------------------------------------------------------------------------------------

    def block_outputs(self, images: Tensor, taps: tuple[int, ...]) -> list[Tensor]:
        """The outputs (B, 1+N, D) of blocks `taps`, counted from 1, before the final norm, for dense heads."""
        x, out = self.embed(images), []
        for i, block in enumerate(self.blocks, 1):
            x = block(x)
            if i in taps:
                out.append(x)
        return out

    def value_features(self, images: Tensor, path: str) -> Tensor:
        """(B, 3, h, w) -> (B, N, D): patch features that keep their place, for zero-shot segmentation.

        The last block attends with the identity instead of softmax(QK): a patch's feature is its own value vector.
        path "code" keeps the block's residual and MLP, as the released DenseCLIP code does; "plain" is value and output
        projection alone, as its text says.
        """
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        value = last.attn.proj(last.attn.qkv(last.norm1(x)).chunk(3, dim=2)[2])                 # (B, 1+N, D)
        if path == "code":
            x = x + value
            value = x + last.mlp(last.norm2(x))
        return self.norm(value)[:, 1:]


def image_tower(c: Config, drop_path: float = 0.0) -> VisionTransformer:
    return VisionTransformer(c.image_size, c.patch_size, c.width, c.depth, c.heads, drop_path, c.dialect)


# ---------------------------------------------------------------------------------------------------------------------
# Text tower
# ---------------------------------------------------------------------------------------------------------------------

def mask_words(tokens: Tensor, ratio: float, sot: int, eot: int, mask_id: int, noise: Tensor):
    """BERT's corruption of a share of each caption's words: 80% become the mask token, 10% another word, 10% stay.

    tokens (B, L), noise (B, L, 3) uniform in [0, 1): one draw to choose, one for the kind, one for the other word.
    Start, end and padding are never chosen; of a caption with words at least one is.  Other words have ids below sot.
    Returns corrupted (B, L) and is_chosen (B, L) bool.
    """
    noise = noise[:, :tokens.shape[1]]
    is_word = (tokens != sot) & before_end(tokens, eot)
    n_words = is_word.sum(dim=1, keepdim=True)                                                  # (B, 1)
    n_chosen = (n_words * ratio).round().clamp(min=1).minimum(n_words)
    rank = noise[..., 0].masked_fill(~is_word, 2.0).argsort(dim=1).argsort(dim=1)               # 0 for the lowest draw
    is_chosen = rank < n_chosen
    other_word = (noise[..., 2] * sot).long()
    corrupted = torch.where(noise[..., 1] < 0.8, mask_id, torch.where(noise[..., 1] < 0.9, other_word, tokens))
    return torch.where(is_chosen, corrupted, tokens), is_chosen


def before_end(tokens: Tensor, eot: int) -> Tensor:
    """(B, L) bool, True before the first end token."""
    return (tokens == eot).cumsum(dim=1) == 0


class TextTransformer(nn.Module):
    """CLIP's text tower: learned positions, causal attention, final norm.

    With masked_words it knows one word more, the mask token, which lives outside the vocabulary.
    """
    def __init__(self, vocab_size: int, context_length: int, width: int, depth: int, heads: int, causal: bool,
                 masked_words: bool, quick_gelu: bool):
        super().__init__()
        self.causal = causal
        self.mask_id = vocab_size                               # one past the last word, and never in a caption
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.pos_embed = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList([Block(width, heads, eps=1e-5, quick_gelu=quick_gelu) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        init_text_blocks(self.blocks)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width)) if masked_words else None     # last: see own_stream

    def forward(self, tokens: Tensor, eot: int) -> Tensor:
        """(B, L) ids -> (B, L, D) normalized features; L may be any length up to the context length."""
        is_mask = tokens == self.mask_id
        x = self.token_embedding(tokens.masked_fill(is_mask, 0))                                # (B, L, D)
        if self.mask_token is not None:
            x = torch.where(is_mask[..., None], self.mask_token.to(x.dtype), x)
        x = x + self.pos_embed[:tokens.shape[1]]
        is_word = None if self.causal else before_end(tokens, eot) | (tokens == eot)
        for block in self.blocks:
            x = block(x, causal=self.causal, is_word=is_word)
        return self.norm(x)


def init_text_blocks(blocks: nn.ModuleList):
    """CLIP's initialization: residual outputs shrink with depth."""
    for block in blocks:
        D = block.attn.qkv.in_features
        residual = D ** -0.5 * (2 * len(blocks)) ** -0.5
        for layer, std in ((block.attn.qkv, D ** -0.5), (block.attn.proj, residual),
                           (block.mlp.fc1, (2 * D) ** -0.5), (block.mlp.fc2, residual)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)


# ---------------------------------------------------------------------------------------------------------------------
# The two branches that hide something
# ---------------------------------------------------------------------------------------------------------------------

class ImageDecoder(nn.Module):
    """One transformer layer that fills in the hidden patches from the visible ones (MAE's layout, fixed positions).

    # paper: silent on its width; here: the encoder's, so that its output and the teacher's features can share one h
    """
    def __init__(self, width: int, depth: int, heads: int, grid: int):
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(grid, width), persistent=False)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, visible: Tensor, keep: Tensor, hidden: Tensor) -> Tensor:
        """visible (B, 1+K, D) student tokens, keep (B, K), hidden (B, M) indices -> (B, M, D), at hidden patches"""
        B, K = keep.shape
        visible = self.embed(visible)
        pos = self.pos_embed.expand(B, -1, -1)                                                  # (B, N, D)
        seen = visible[:, 1:] + take(pos, keep)                                                 # (B, K, D)
        unseen = self.mask_token + take(pos, hidden)                                            # (B, M, D)
        # attention knows no order, so hidden patches may stand behind the visible ones
        x = torch.cat([visible[:, :1], seen, unseen.to(seen.dtype)], dim=1)                     # (B, 1+N, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 1 + K:])


class Quantizer(nn.Module):
    """h, the online quantizer: a feature's cosine to each of C codes.

    # paper: says only "online quantizer"; here: iBOT's head, a 3-layer MLP to a unit-length bottleneck, and unit-length
    # codes
    """
    def __init__(self, width: int, hidden: int, bottleneck: int, n_codes: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        self.codes = nn.Parameter(torch.empty(n_codes, bottleneck))
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.codes)

    def bottleneck(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, bottleneck), unit length"""
        return unit(self.mlp(x))

    def unit_codes(self) -> Tensor:
        """(C, bottleneck), unit length"""
        return unit(self.codes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, C) logits, each in [-1, 1]"""
        return self.bottleneck(x) @ self.unit_codes().T


class TextDecoder(nn.Module):
    """Bidirectional blocks on the text tower's output; word logits are products with the tower's word table (BERT).

    # paper: silent on attention and output matrix; here: bidirectional, because the tower is causal and a masked word
    # must see what follows it; tied, because an untied matrix would be two fifths of the text tower more
    """
    def __init__(self, width: int, depth: int, heads: int, vocab_size: int):
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, heads, eps=1e-5) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        init_text_blocks(self.blocks)

    def forward(self, x: Tensor, is_word: Tensor, index: Tensor) -> Tensor:
        """x (B, L, D), is_word (B, L), index (n,) places in B*L -> (n, D) features of those places"""
        for block in self.blocks:
            x = block(x, is_word=is_word)
        return self.norm(x.flatten(0, 1)[index])


# ---------------------------------------------------------------------------------------------------------------------
# The model and its teacher
# ---------------------------------------------------------------------------------------------------------------------

def own_stream(name: str, make: Callable, *arguments, **more):
    """make(*arguments), with random numbers that follow from torch's seed and this name alone.

    Each part of a model is drawn from a stream of its own, so what two methods share starts alike in both.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((torch.initial_seed() + zlib.crc32(name.encode())) % 2 ** 63)
        return make(*arguments, **more)


def projection(width: int, embed_dim: int) -> nn.Linear:
    """From a tower's width to the joint embedding"""
    linear = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(linear.weight, std=width ** -0.5)
    return linear


class MaskCLIP(nn.Module):
    """CLIP's two towers, and the branches that config.method trains beside them.

    predicts     what hidden patches are predicted as: "pixels", or of the teacher "codes" or "features", or None
    trained_on   the data sets (SPECs) it was pre-trained on, as far as load_checkpoint knows
    """
    log_names = {"codes": "distillation", "features": "feature", "pixels": "pixel"}     # L_Dist, by what is predicted

    def __init__(self, config: Config, eot: int):
        super().__init__()
        c = self.config = config
        method = METHODS[c.method]
        self.eot, self.trained_on = eot, ()
        self.predicts = c.target if method["predicts"] == "teacher" else method["predicts"]
        self.visual = own_stream("visual", image_tower, c, c.drop_path)
        self.text = own_stream("text", TextTransformer, c.vocab_size, c.context_length, c.text_width, c.text_depth,
                               c.text_heads, c.causal, masked_words=method["mlm"], quick_gelu=c.dialect == "openai")
        self.image_proj = own_stream("image_proj", projection, c.width, c.embed_dim)
        self.text_proj = own_stream("text_proj", projection, c.text_width, c.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if self.predicts:
            self.decoder = own_stream("decoder", ImageDecoder, c.width, c.decoder_depth, c.heads, c.grid)
        if self.predicts == "codes":
            self.quantizer = own_stream("quantizer", Quantizer, c.width, c.quantizer_hidden, c.quantizer_bottleneck,
                                        c.n_codes)
        elif self.predicts:
            self.predict = nn.Linear(c.width, 3 * c.patch_size ** 2 if self.predicts == "pixels" else c.width)
            own_stream("predict", init_linear, self.predict)
        if method["mlm"]:
            self.text_decoder = own_stream("text_decoder", TextDecoder, c.text_width, c.text_decoder_depth,
                                           c.text_heads, c.vocab_size)

    # ---- one step of training ---------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor], answer: dict | None = None) -> tuple[dict, dict]:
        """One pass of all branches, so that DistributedDataParallel sees one forward.

        batch   images (B,3,H,W), tokens (B,L); for the masked image branch keep (B,K) and hidden (B,M), indices;
                for the masked text branch corrupted (B,L), chosen (n,) places in B*L, word_count () (see predict_words)
        answer  what Teacher says of the hidden patches, for methods that have a teacher
        Returns the embeddings {"image": (B,E), "text": (B,E)}, to be contrasted over all micro-batches and processes by
        `contrast`, and the terms L_Dist, L_MLM of Eq. 8, those that the method has.
        """
        images, tokens, terms = batch["images"], batch["tokens"], {}
        image = self.encode_image(images)
        if self.predicts:
            terms["L_Dist"] = self.predict_hidden(images, batch["keep"], batch["hidden"], answer)
        if "corrupted" in batch:                                        # clean and masked captions in one pass
            text, masked = self.text(torch.cat([tokens, batch["corrupted"]]), self.eot).chunk(2)    # (B, L, D) each
            terms["L_MLM"] = self.predict_words(masked, tokens, batch["chosen"], batch["word_count"])
        else:
            text = self.text(tokens, self.eot)                                                      # (B, L, D)
        return dict(image=image, text=self.embed_text(text, tokens)), terms

    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The embeddings of forward without the masked branches."""
        text = self.embed_text(self.text(batch["tokens"], self.eot), batch["tokens"])
        return dict(image=self.encode_image(batch["images"]), text=text)

    def contrast(self, features: dict[str, Tensor], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Embeddings of this process's whole batch -> L_I and L_T of Eq. 8, against those of all processes.

        labels (B,) of labeled data: pairs of one label are each other's positives then (UniCL).
        """
        image, text, scale = features["image"], features["text"], self.logit_scale.exp()
        return self.both_ways(losses.contrastive_loss(image, text, scale) if labels is None else
                              losses.unicl_loss(image, text, labels, scale))

    def both_ways(self, pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """L_I and L_T, as Eq. 8 adds them; or halved, so that their sum is the mean that CLIP's code takes."""
        share = 1.0 if self.config.contrastive_reduction == "sum" else 0.5
        return dict(L_I=share * pair[0], L_T=share * pair[1])

    def total_loss(self, L_I: Tensor | float = 0.0, L_T: Tensor | float = 0.0, L_Dist: Tensor | float = 0.0,
                   L_MLM: Tensor | float = 0.0) -> Tensor:
        """Eq. 8.  A term that the method lacks is 0, one that the equation lacks an error."""
        lambda_, beta = self.config.distillation_weight, self.config.mlm_weight
        return L_I + L_T + lambda_ * L_Dist + beta * L_MLM

    def named(self, terms: dict[str, float]) -> dict[str, float]:
        """The terms before their weights, under the names they have in the log: contrastive is L_I + L_T."""
        pair = dict(contrastive=terms["L_I"] + terms["L_T"]) if "L_I" in terms else {}
        words = {"L_Dist": self.log_names.get(self.predicts), "L_MLM": "mlm"}
        return pair | {words.get(name, name): value for name, value in terms.items() if name not in ("L_I", "L_T")}

    def predict_hidden(self, images: Tensor, keep: Tensor, hidden: Tensor, answer: dict | None) -> Tensor:
        """The masked image branch: L_Dist, or the pixel or feature loss that stands in its place."""
        x = self.fill_in(images, keep, hidden)                                                  # (B, M, D)
        if self.predicts == "pixels":
            return losses.pixel_loss(self.predict(x), take(patchify(images, self.config.patch_size), hidden))
        if self.predicts == "features":
            return losses.feature_loss(self.predict(x), answer["features"])
        student, teacher = (y.flatten(0, 1) for y in (self.quantizer.bottleneck(x), answer["features"]))    # (B*M, .)
        return losses.distillation_in_chunks(student, self.quantizer.unit_codes(), teacher, answer["codes"],
                                             self.config.temp_s, self.config.temp_t, answer["center"])

    def fill_in(self, images: Tensor, keep: Tensor, hidden: Tensor) -> Tensor:
        """What the student makes of hidden patches from the visible ones: (B, M, D)"""
        return self.decoder(self.visual(images, keep), keep, hidden)

    def predict_words(self, x: Tensor, tokens: Tensor, chosen: Tensor, word_count: Tensor) -> Tensor:
        """L_MLM from the masked captions' features (B, L, D), computed at the chosen places only.

        word_count: what masked_language_loss divides by
        """
        x, words = self.word_features(x, tokens, chosen), tokens.flatten()[chosen]              # (n, D), (n,)
        return losses.masked_language_in_chunks(x, words, self.text.token_embedding.weight, self.text_decoder.bias,
                                                word_count)

    def word_features(self, x: Tensor, tokens: Tensor, chosen: Tensor) -> Tensor:
        """What the text decoder makes of (B, L, D) at the chosen places: (n, D)"""
        return self.text_decoder(x, before_end(tokens, self.eot) | (tokens == self.eot), chosen)

    @torch.no_grad()
    def after_update(self):
        """Once the optimizer has moved the weights: no logit scale leaves 0 ... ln 100."""
        self.logit_scale.clamp_(0, math.log(100))

    # ---- embeddings -------------------------------------------------------------------------------------------------

    def image_features(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, D); where the class token is all that is read, the last block computes no other"""
        pool = self.config.pool
        return pool_tokens(self.visual(images, leftmost=1 if pool == "cls" else None), pool)

    def pool_text(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(B, L, D), (B, L) -> (B, D) at the first end token.  By its id: the highest id may be another one."""
        return x[torch.arange(len(x), device=x.device), (tokens == self.eot).int().argmax(dim=1)]

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) normalized pixels -> (B, E), unit length"""
        return unit(self.image_proj(self.image_features(images)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) ids with start and end -> (B, E), unit length; computed up to the longest caption only"""
        tokens = tokens[:, :int(before_end(tokens, self.eot).sum(dim=1).max()) + 1]
        return self.embed_text(self.text(tokens, self.eot), tokens)

    def embed_text(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(B, L, D) text features -> (B, E), unit length"""
        return unit(self.text_proj(self.pool_text(x, tokens)))

    @torch.no_grad()
    def encode_classes(self, names, templates, tokenizer) -> Tensor:
        """(classes, E) zero-shot classifier: each name in every template, embedded, averaged, unit length again.

        Several names of one class stand in one string, divided by tabs.
        """
        means = []
        for name in names:
            prompts = [template.format(one) for one in name.split("\t") for template in templates]
            tokens = tokenizer(prompts, self.config.context_length)
            texts = self.encode_text(tokens.to(self.logit_scale.device))            # (prompts, E); FILIP's have words
            means.append(texts.flatten(0, -2).mean(dim=0))                                          # (E,)
        return F.normalize(torch.stack(means), dim=-1)

    def encode_patches(self, images: Tensor, path: str = "code") -> Tensor:
        """(B, 3, h, w) -> (B, N, E) unit-length patch embeddings in the joint space, by DenseCLIP's value path"""
        return unit(self.image_proj(self.visual.value_features(images, path)))


class Teacher(nn.Module):
    """The running average of the student's image tower and quantizer, which says what hidden patches look like.

    momentum 0 makes it the current weights: the row "+ Feature prediction" of supplement Table 2, before "+ EMA model".
    """
    def __init__(self, model: MaskCLIP):
        super().__init__()
        self.visual = copy.deepcopy(model.visual)
        self.quantizer = copy.deepcopy(model.quantizer) if model.predicts == "codes" else None
        self.register_buffer("center", torch.zeros(model.config.n_codes))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Its answer at hidden patches (B, M) of (B, 3, H, W): features (B, M, bottleneck), and what makes codes of
        them, codes (C, bottleneck) and center (C,); or features (B, M, D) alone."""
        x = take(self.visual(images)[:, 1:], hidden)                                            # (B, M, D)
        if self.quantizer is None:
            return dict(features=x)
        return dict(features=self.quantizer.bottleneck(x), codes=self.quantizer.unit_codes(),
                    center=self.center.clone())                 # which update_center will move

    @torch.no_grad()
    def update(self, model: MaskCLIP, momentum: float):
        """theta_bar <- m * theta_bar + (1 - m) * theta, after each optimizer step.  There are no buffers to copy."""
        student = [model.get_parameter(name) for name, _ in self.named_parameters()]
        torch._foreach_lerp_(list(self.parameters()), student, 1 - momentum)

    @torch.no_grad()
    def update_center(self, answers: list[dict[str, Tensor]], momentum: float):
        """center <- m * center + (1 - m) * mean of the logits over the step's hidden patches, of all processes.

        answers: one for each micro-batch.  Logits are linear in the bottleneck, so their mean is that of the mean.
        """
        if self.quantizer is not None:
            mean = torch.stack([answer["features"].flatten(0, 1).mean(dim=0) for answer in answers]).mean(dim=0)
            mean = losses.mean_over_processes(mean)                                             # (bottleneck,)
            self.center.lerp_(answers[0]["codes"] @ mean, 1 - momentum)

    @torch.no_grad()
    def collapse_monitor(self, answer: dict[str, Tensor], temp_t: float) -> dict[str, float]:
        """How the codes of (a part of) this batch are used; nothing where there are none.

        code_entropy   entropy of the mean distribution, nats: near 0 when all patches get the same code, ln C at most
        patch_entropy  mean entropy of single distributions, nats: near ln C when the teacher says nothing
        codes_used     share of the C codes that are some patch's most likely one
        """
        if self.quantizer is None:
            return {}
        z = answer["features"].flatten(0, 1)[:losses.LOGIT_ROWS]
        q = losses.soft_codes(z @ answer["codes"].T, temp_t, answer["center"])                  # (rows, C)
        return dict(code_entropy=entropy(q.mean(dim=0)).item(), patch_entropy=entropy(q).mean().item(),
                    codes_used=len(q.argmax(dim=1).unique()) / q.shape[1])


def entropy(q: Tensor) -> Tensor:
    """(..., C) distributions -> (...) nats"""
    return -(q * q.clamp(min=1e-12).log()).sum(dim=-1)


def momentum_at(step: int, total: int, start: float, end: float) -> float:
    """Teacher momentum: linear from start at step 0 to end at the last step."""
    return start + (end - start) * step / max(total - 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The compared systems: what each adds to CLIP.  Sizes and weights are their papers', see Config and RECIPES
#
# What stands in `contrast` and not in `forward` sees the whole batch of all processes, whatever the micro-batches: so
# does batch normalization.
# ---------------------------------------------------------------------------------------------------------------------

class SyncBatchNorm(nn.BatchNorm2d):
    """Batch normalization with the mean and variance of all processes, on any device, of (B, C) or (B, C, H, W).

    Keys are nn.BatchNorm2d's, and on one process it is one.  On several, whose B may differ, output and gradient are
    those of one process with the joined batch: what a loss asks of the common statistics goes back to every input.
    torch's own exists on GPUs only.
    """
    def _check_input_dim(self, x: Tensor):
        if x.ndim not in (2, 4):
            raise ValueError(f"wanted (B, C) or (B, C, H, W), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or losses.world_size() == 1:
            return super().forward(x)
        rows, axes = fp32(x).movedim(1, -1), list(range(x.ndim - 1))                           # (B, C) or (B, H, W, C)
        count = torch.full((x.shape[1],), x.numel() / x.shape[1], device=x.device)
        own = torch.stack([count, rows.mean(axes), rows.var(axes, correction=0)])               # (3, C)
        count, mean, var = losses.gather(own[None]).unbind(dim=1)                               # (W, C) each
        n = count.sum(dim=0)                                                                    # (C,)
        joint_mean = (count * mean).sum(dim=0) / n
        joint_var = (count * (var + (mean - joint_mean) ** 2)).sum(dim=0) / n
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(joint_mean, self.momentum)
                self.running_var.lerp_(joint_var * n / (n - 1), self.momentum)
        y = (rows - joint_mean) * (joint_var + self.eps).rsqrt() * self.weight + self.bias
        return y.movedim(-1, 1).to(x.dtype)


def mlp_head(*widths: int, norm_last: bool = False) -> nn.Sequential:
    """Linear layers with batch norm and ReLU after all but the last, which norm_last gives a batch norm.

    No bias before a norm, which would take it out again; no running statistics, as no evaluation uses the heads.
    """
    layers = []
    for i, o in zip(widths[:-2], widths[1:-1]):
        layers += [nn.Linear(i, o, bias=False), SyncBatchNorm(o, track_running_stats=False), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=not norm_last))
    if norm_last:
        layers.append(SyncBatchNorm(widths[-1], track_running_stats=False))
    return nn.Sequential(*layers)


class SLIP(MaskCLIP):
    """CLIP, and SimCLR's contrast of two augmented views of each image (Mu et al., ECCV 2022)."""

    def __init__(self, config: Config, eot: int):
        super().__init__(config, eot)
        self.head = own_stream("head", mlp_head, config.width, config.slip_hidden, config.slip_hidden, 256)

    def encode(self, batch):
        """batch holds view1, view2 (B,3,H,W) besides; so does what is returned, (B, D) each."""
        views = torch.stack([batch["images"], batch["view1"], batch["view2"]], dim=1).flatten(0, 1)     # (3B, 3, H, W)
        x = self.image_features(views)                                                          # (3B, D)
        return dict(image=unit(self.image_proj(x[::3])), view1=fp32(x[1::3]), view2=fp32(x[2::3]),
                    text=self.embed_text(self.text(batch["tokens"], self.eot), batch["tokens"]))

    def forward(self, batch, answer=None):
        return self.encode(batch), {}

    def contrast(self, features, labels=None):
        """Besides: simclr, of the two views' projections (B, 256)"""
        a, b = (unit(self.head(features[name])) for name in ("view1", "view2"))
        return dict(super().contrast(features, labels), simclr=losses.simclr_loss(a, b))

    def total_loss(self, simclr=0.0, **terms):
        return super().total_loss(**terms) + self.config.simclr_weight * simclr


class FILIP(MaskCLIP):
    """CLIP whose image and text are the unit vectors of all patches and words (Yao et al., ICLR 2022)."""

    def __init__(self, config: Config, eot: int):
        super().__init__(replace(config, embed_dim=config.token_dim), eot)

    def encode_image(self, images):
        """(B, 3, h, w) normalized pixels -> (B, N, E), unit length"""
        return unit(self.image_proj(self.visual(images)[:, 1:]))

    def embed_text(self, x, tokens):
        """(B, L, D) text features -> (B, L, E), unit length, zero where there is no word"""
        return unit(self.text_proj(x)) * between_ends(tokens, self.eot)

    def contrast(self, features, labels=None):
        return dict(token=token_contrast(self, features["image"], features["text"], self.logit_scale))

    def total_loss(self, token=0.0):
        return self.config.token_weight * token


def between_ends(tokens: Tensor, eot: int) -> Tensor:
    """(B, L) -> (B, L, 1) bool, True for words: after the start token, before the end token.

    # FILIP: all but padding; here: without start and end, which name nothing that a patch could look for
    """
    is_word = before_end(tokens, eot)
    is_word[:, 0] = False
    return is_word[..., None]


def token_contrast(net: MaskCLIP, patches: Tensor, words: Tensor, logit_scale: Tensor) -> Tensor:
    """FILIP's L_I + L_T of patches (B, N, E) and words (B, L, E)"""
    pair = losses.token_contrastive_loss(patches, words, logit_scale.exp(), net.config.token_top_k)
    return sum(net.both_ways(pair).values())


class DeCLIP(MaskCLIP):
    """CLIP of two views and two captions, with SimSiam, nearest texts and masked words (Li et al., ICLR 2022).

    # DeCLIP: batch norm and queue of each process by itself; here: of all, so that their number does not matter
    """
    def __init__(self, config: Config, eot: int):
        super().__init__(config, eot)
        E, S = config.embed_dim, config.simsiam_hidden
        self.text_decoder = None                                                # in its place:
        self.word_classifier = own_stream("word_classifier", nn.Linear, config.text_width, config.vocab_size)
        self.projector = own_stream("projector", mlp_head, E, S, S, S, norm_last=True)
        self.predictor = own_stream("predictor", mlp_head, S, S // 2, S)
        # until texts have filled it, the rest are random directions, which are rarely nearest
        self.register_buffer("queue", unit(own_stream("queue", torch.randn, config.queue_size, E)))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))

    def towers(self, batch) -> tuple[Tensor, Tensor, Tensor]:
        """batch holds view2 (B,3,H,W), tokens2 (B,L') besides, and images are a view too -> both views of an image side
        by side (2B, 1+N, D); the first caption, seen with masked words only (B, L, D); the second (B, L', D)"""
        views = torch.stack([batch["images"], batch["view2"]], dim=1).flatten(0, 1)             # (2B, 3, H, W)
        return self.visual(views), self.text(batch["corrupted"], self.eot), self.text(batch["tokens2"], self.eot)

    def encode(self, batch):
        return self.features(batch, *self.towers(batch))

    def forward(self, batch, answer=None):
        views, text1, text2 = self.towers(batch)
        logits = self.word_classifier(text1.flatten(0, 1)[batch["chosen"]])                     # (n, V)
        words = batch["tokens"].flatten()[batch["chosen"]]                                      # (n,)
        L_MLM = losses.masked_language_loss(logits, words, batch["word_count"])
        return self.features(batch, views, text1, text2), dict(L_MLM=L_MLM)

    def features(self, batch, views: Tensor, text1: Tensor, text2: Tensor) -> dict[str, Tensor]:
        """What the towers give -> image1, image2 (B, E) of any length, text1, text2 (B, E) of unit length"""
        image = fp32(self.image_proj(pool_tokens(views, self.config.pool)))                     # (2B, E)
        return dict(image1=image[::2], image2=image[1::2], text1=self.embed_text(text1, batch["tokens"]),
                    text2=self.embed_text(text2, batch["tokens2"]))

    def contrast(self, features, labels=None):
        """L_I, L_T of each view with each caption; neighbor: of each view with the texts nearest to the captions;
        simsiam: of the two views"""
        scale, texts = self.logit_scale.exp(), [features["text1"], features["text2"]]           # (B, E)
        images = [unit(features[name]) for name in ("image1", "image2")]                        # (B, E)
        z1, z2 = (self.projector(features[name]) for name in ("image1", "image2"))              # (B, S)
        simsiam = losses.simsiam_loss(self.predictor(z1), self.predictor(z2), z1, z2)
        self.newest = [text.detach() for text in texts]
        nearest = [self.queue[(text @ self.queue.T).argmax(dim=1)] for text in self.newest]     # (B, E)
        pairs = [losses.contrastive_loss(i, t, scale) for i in images for t in texts]
        L_I, L_T = (sum(side) / 4 for side in zip(*pairs))
        neighbor = [losses.contrastive_loss(i, t, scale)[0] for i in images for t in nearest]
        return dict(self.both_ways((L_I, L_T)), neighbor=sum(neighbor) / 4, simsiam=simsiam)

    def total_loss(self, L_I=0.0, L_T=0.0, L_MLM=0.0, neighbor=0.0, simsiam=0.0):
        c = self.config
        return (c.contrastive_weight * (L_I + L_T) + c.mlm_weight * L_MLM + c.neighbor_weight * neighbor
                + c.simsiam_weight * simsiam)

    @torch.no_grad()
    def after_update(self):
        """Besides: the batch's texts, of all processes, take the places of the oldest in the queue."""
        super().after_update()
        new = torch.cat([losses.gather(text) for text in self.newest])[-len(self.queue):]
        place = (self.oldest + torch.arange(len(new), device=new.device)) % len(self.queue)
        self.queue[place] = new
        self.oldest.copy_((self.oldest + len(new)) % len(self.queue))


class DeFILIP(DeCLIP):
    """DeCLIP, and FILIP's contrast between the tokens of both views and both captions (Cui et al., 2022).

    It is evaluated as DeCLIP is, by the two embeddings, which most of its loss trains.
    """
    def __init__(self, config: Config, eot: int):
        super().__init__(config, eot)
        self.patch_proj = own_stream("patch_proj", nn.Linear, config.width, config.token_dim, bias=False)
        self.word_proj = own_stream("word_proj", nn.Linear, config.text_width, config.token_dim, bias=False)
        self.token_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def features(self, batch, views, text1, text2):
        """DeCLIP's, and patches1, patches2 (B, N, E), words1 (B, L, E), words2 (B, L', E) as in FILIP"""
        patches = unit(self.patch_proj(views[:, 1:]))                                           # (2B, N, E)
        return dict(super().features(batch, views, text1, text2), patches1=patches[::2], patches2=patches[1::2],
                    words1=unit(self.word_proj(text1)) * between_ends(batch["tokens"], self.eot),
                    words2=unit(self.word_proj(text2)) * between_ends(batch["tokens2"], self.eot))

    def contrast(self, features, labels=None):
        token = [token_contrast(self, features[p], features[w], self.token_logit_scale)
                 for p in ("patches1", "patches2") for w in ("words1", "words2")]
        return dict(super().contrast(features), token=sum(token) / 4)

    def total_loss(self, token=0.0, **terms):
        return super().total_loss(**terms) + self.config.token_weight * token

    @torch.no_grad()
    def after_update(self):
        super().after_update()
        self.token_logit_scale.clamp_(0, math.log(100))


COMPARED = {"slip": SLIP, "filip": FILIP, "declip": DeCLIP, "defilip": DeFILIP}


def build(config: Config, eot: int) -> MaskCLIP:
    """The model that config.method names."""
    return COMPARED.get(config.method, MaskCLIP)(config, eot)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: where model, tokenizer and config meet
# ---------------------------------------------------------------------------------------------------------------------

def save_atomically(path: Path, state: dict) -> bool:
    """Writes state to path so that a whole file stands there at any moment.  A full disk is told, not raised: False."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return True
    except (OSError, RuntimeError) as error:        # torch reports a failed write as RuntimeError
        say(f"warning: {path} was not saved ({one_line(error)}); the one before it stays, and training goes "
            f"on", file=sys.stderr)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return False


def load_state(path: str | Path, kind: str | None = None) -> dict:
    """The dict that save_atomically wrote.  Never runs code from the file; rubbish is a UserError.

    kind: of which run it must be, "pretraining", "finetuning", "upernet" or "maskrcnn"; None: of any
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}" + "; make one with: torchrun train.py" * (kind == "pretraining"))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                  # of a damaged or hostile file, whatever stumbles over it
        raise UserError(f"{path} is not a whole checkpoint of this project ({type(error).__name__}): "
                        f"train again, or name another file") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint of this project")
    found = state.get("kind", "pretraining")
    if kind and found != kind:
        raise UserError(f"{path} holds a {found} run, wanted a {kind} run"
                        + (": what train.py wrote, as runs/pocket/last.pt" if kind == "pretraining" else ""))
    return state


def checkpoint(model: MaskCLIP, tokenizer: BytePairTokenizer, options, **more) -> dict:
    """Everything needed to resume and to evaluate with no other file; `more` holds optimizer, step, teacher ..."""
    return dict(kind="pretraining", config=asdict(options), model=model.state_dict(), tokenizer=tokenizer.state(),
                mean=MEAN, std=STD, torch=str(torch.__version__), **more)


def save_checkpoint(path: str | Path, model: MaskCLIP, tokenizer: BytePairTokenizer, options, **more) -> bool:
    return save_atomically(Path(path), checkpoint(model, tokenizer, options, **more))


def load_checkpoint(path: str | Path, device="cpu") -> tuple[MaskCLIP, BytePairTokenizer, Config]:
    """(model in eval mode, tokenizer, config) from OUT/last.pt of train.py.  Strict: every weight must be there."""
    state = load_state(path, "pretraining")
    try:
        known = {f.name for f in fields(Config)}
        config = Config(**{name: value for name, value in state["config"].items() if name in known})
        tokenizer = BytePairTokenizer.from_state(state["tokenizer"])
        check_sizes(config, tokenizer.eot, state["model"], Path(path).stat().st_size)
        model = build(config, tokenizer.eot)
        model.load_state_dict(state["model"])
        model.trained_on = tuple(map(str, state["config"].get("data", ())))
        pixels = tuple(state["mean"]), tuple(state["std"])
        damaged = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    except Exception as error:
        raise UserError(f"{path} does not fit its own config: {one_line(error)}") from None
    if pixels != (MEAN, STD):
        raise UserError(f"{path} was trained with pixel normalization {pixels}; this version uses {MEAN}, {STD}")
    if damaged:
        raise UserError(f"{path}: not all of {damaged[0]} is finite: such a model knows nothing, train again")
    return model.to(device).eval(), tokenizer, model.config


def check_sizes(config: Config, eot: int, weights: dict[str, Tensor], file_size: int):
    """An error if the config asks for other weights than there are, before memory is taken for what it asks."""
    if sum(value.numel() * value.element_size() for value in weights.values()) > file_size:
        raise ValueError("the weights claim to be larger than the file")
    if config.depth + config.text_depth > len(weights):
        raise ValueError(f"{config.depth} and {config.text_depth} blocks, but only {len(weights)} weights")
    if config.width % config.heads or config.text_width % config.text_heads:
        raise ValueError("its heads do not divide its width")
    with torch.device("meta"):                                              # tensors that have shapes but no numbers
        build(config, eot).load_state_dict(weights, assign=True)


# ---------------------------------------------------------------------------------------------------------------------
# Exchange of weights with timm and open_clip
#
# Theirs and ours differ in three things that can be made up for exactly:
#   names       OPEN_CLIP_NAMES; timm's are our image tower's
#   patch bias  which open_clip and timm's CLIP towers lack: on the way out it moves into the positions of the patches
#   pixels      normalized with another mean and deviation: on the way in the patch embedding takes the difference
# What cannot be made up for is refused.
# ---------------------------------------------------------------------------------------------------------------------

OPEN_CLIP_NAMES = (     # theirs, ours; each is replaced wherever it stands in a name, in this order
    ("visual.class_embedding", "visual.cls_token"), ("visual.positional_embedding", "visual.pos_embed"),
    ("visual.conv1.", "visual.patch_embed.proj."), ("visual.ln_pre.", "visual.norm_pre."),
    ("visual.transformer.resblocks.", "visual.blocks."), ("visual.ln_post.", "visual.norm."),
    ("visual.proj", "image_proj.weight"), ("token_embedding.", "text.token_embedding."),
    ("positional_embedding", "text.pos_embed"), ("transformer.resblocks.", "text.blocks."), ("ln_final.", "text.norm."),
    ("text_projection", "text_proj.weight"), (".ln_1.", ".norm1."), (".ln_2.", ".norm2."),
    (".attn.in_proj_", ".attn.qkv."), (".attn.out_proj.", ".attn.proj."), (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."))
POOLS = {"cls": "tok", "mean": "avg"}                       # ours -> open_clip's
BOTH_HAVE = ("visual.", "text.", "image_proj.", "text_proj.", "logit_scale")
TRANSPOSED = ("image_proj.weight", "text_proj.weight")      # theirs multiply from the right
CLIP_MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"      # of tokenizer.state()
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")            # in OpenAI's files
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
OPENAI_PIXELS = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
FREE_AT_START = {"init", "pool", "drop_path"}      # in which a run may differ from the weights it takes


# ---- arithmetic ------------------------------------------------------------------------------------------------------

def bias_into_positions(state: dict[str, Tensor], tower: str = "") -> dict[str, Tensor]:
    """The state dict of an image tower whose patch embedding has no bias and that does the same."""
    state = dict(state)
    bias, pos = state.pop(tower + "patch_embed.proj.bias"), state[tower + "pos_embed"]
    return state | {tower + "pos_embed": torch.cat([pos[:, :1], pos[:, 1:] + bias], dim=1)}     # (1, 1+N, D)


def renormalize(state: dict[str, Tensor], mean, std) -> dict[str, Tensor]:
    """A state dict for pixels normalized with `mean` and `std` -> one for ours that does the same.

    Their (x - mean) / std is ours * (STD / std) + (MEAN - mean) / std: a factor for each channel of the patch
    embedding, and a sum for its bias.
    """
    weight = state["visual.patch_embed.proj.weight"]                                            # (D, 3, p, p)
    bias = state.get("visual.patch_embed.proj.bias", weight.new_zeros(len(weight)))             # (D,)
    ours, mean, std = weight.new_tensor([MEAN, STD]), weight.new_tensor(mean), weight.new_tensor(std)
    factor, shift = ours[1] / std, (ours[0] - mean) / std                                       # (3,) each
    return state | {"visual.patch_embed.proj.weight": weight * factor[:, None, None],
                    "visual.patch_embed.proj.bias": bias + weight.sum(dim=(2, 3)) @ shift}


def to_open_clip(model: MaskCLIP) -> dict[str, Tensor]:
    """What open_clip's CLIP loads when it is built with `open_clip_config`."""
    state = {name: value for name, value in model.state_dict().items() if name.startswith(BOTH_HAVE)}
    state.pop("text.mask_token", None)                      # no caption holds it
    state = bias_into_positions(state, "visual.")
    for name in TRANSPOSED:
        state[name] = state[name].T.contiguous()
    state["visual.cls_token"] = state["visual.cls_token"].flatten()
    state["visual.pos_embed"] = state["visual.pos_embed"][0]
    return rename(state, [(ours, theirs) for theirs, ours in OPEN_CLIP_NAMES])


def from_open_clip(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names and shapes -> ours."""
    state = rename(theirs, OPEN_CLIP_NAMES)
    for name in TRANSPOSED:
        state[name] = state[name].T
    state["visual.cls_token"] = state["visual.cls_token"][None, None]
    state["visual.pos_embed"] = state["visual.pos_embed"][None]
    return state | {"logit_scale": state["logit_scale"].squeeze()}


def rename(state: dict[str, Tensor], pairs) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        for old, new in pairs:
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


def open_clip_config(c: Config) -> dict:
    """open_clip's model_cfg for our two towers."""
    vision = dict(image_size=c.image_size, layers=c.depth, width=c.width, head_width=c.width // c.heads,
                  patch_size=c.patch_size, pool_type=POOLS[c.pool])
    if c.dialect == "timm":
        vision |= dict(no_ln_pre=True, norm_kwargs=dict(eps=1e-6))
    text = dict(context_length=c.context_length, vocab_size=c.vocab_size, width=c.text_width, heads=c.text_heads,
                layers=c.text_depth)
    return dict(embed_dim=c.embed_dim, quick_gelu=c.dialect == "openai", vision_cfg=vision, text_cfg=text)


def with_defaults(model_cfg: dict) -> dict:
    """open_clip's model_cfg, what it leaves out filled in: the whole, vision_cfg and text_cfg."""
    vision = dict(head_width=64, pool_type="tok", mlp_ratio=4) | model_cfg["vision_cfg"]
    text = dict(context_length=77, vocab_size=49408, mlp_ratio=4) | model_cfg["text_cfg"]
    return dict(model_cfg, vision_cfg=vision, text_cfg=text)


def config_from_open_clip(model_cfg: dict) -> Config:
    """The Config whose open_clip_config says the same; UserError names what has no counterpart here."""
    with refusing("open_clip's config is not that of a plain vision transformer with CLIP's text tower", UserError):
        theirs = with_defaults(model_cfg)
        vision, text = theirs["vision_cfg"], theirs["text_cfg"]
        dialect = "timm" if vision.get("no_ln_pre") else "openai" if theirs.get("quick_gelu") else "clip"
        c = replace(PAPER, method="clip", dialect=dialect, image_size=vision["image_size"],
                    patch_size=vision["patch_size"], width=vision["width"], depth=int(vision["layers"]),
                    heads=vision["width"] // vision["head_width"],
                    pool="mean" if vision["pool_type"] == "avg" else "cls",
                    text_width=text["width"], text_depth=text["layers"], text_heads=text["heads"],
                    context_length=text["context_length"], vocab_size=text["vocab_size"], embed_dim=theirs["embed_dim"])
        ours = with_defaults(open_clip_config(c))
    free = {"vision_cfg", "text_cfg", "tokenizer_kwargs", "hf_tokenizer_name", "init_logit_scale"}
    for said, want in ((vision, ours["vision_cfg"]), (text, ours["text_cfg"]), (theirs, ours)):
        for key in (said.keys() | want.keys()) - free:
            if (said.get(key) or None) != (want.get(key) or None):
                raise UserError(f"open_clip's config has {key} = {said.get(key)}, for which our towers have no "
                                f"counterpart: wanted {want.get(key)}")
    return c


# ---- files -----------------------------------------------------------------------------------------------------------

DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The file format of timm's and open_clip's hub: 8 bytes length of the header, the header in JSON, the numbers."""
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    if sum(last - first for first, last in (entry["data_offsets"] for entry in header.values())) != len(raw) - start:
        raise ValueError("the header tells of more or fewer numbers than there are")
    state = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        numbers = torch.frombuffer(raw[start + first:start + last], dtype=DTYPES[entry["dtype"]])
        state[name] = numbers.reshape(entry["shape"])
    return state


# of other people's checkpoints, which hold options and scores besides weights; they can do nothing but be there
HARMLESS = [argparse.Namespace, np.dtype, np.float64(0).__reduce__()[0], *(type(np.dtype(kind)) for kind in "fdliqb")]


def read_weights(path: Path) -> dict[str, Tensor]:
    """float32 tensors by name, from a .safetensors or what torch.save wrote, where they may lie some dicts deeper."""
    if not path.is_file():
        raise UserError(f"no file {path}: wanted weights as timm or open_clip publish them")
    with refusing(f"cannot read weights from {path}", UserError):
        if zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
            raise UserError(f"{path} is a TorchScript program, as OpenAI's: torch.save(torch.jit.load({str(path)!r}, "
                            f"'cpu').state_dict(), FILE) makes weights of it")
        with torch.serialization.safe_globals(HARMLESS):
            state = (read_safetensors(path) if path.suffix == ".safetensors" else
                     torch.load(path, map_location="cpu", weights_only=True))
        for key in ("teacher", "state_dict", "model"):      # of DINO and iBOT the teacher is the better one
            state = state.get(key, state)
        # wrappers leave their marks before names: DistributedDataParallel, torch.compile, DINO's heads
        state = {re.sub(r"^(module\.|_orig_mod\.|backbone\.)+", "", name): value for name, value in state.items()}
        return {name: value.float() for name, value in state.items()}


def read_public(spec: str, config: Config) -> tuple[dict[str, Tensor], Config]:
    """timm:FILE or open_clip:DIR -> weights under our names, for our pixels, and the Config of their towers.

    config: says of a timm tower what its file does not, as how many heads it has.
    """
    kind, _, path = spec.partition(":")
    path = Path(path).expanduser()
    with refusing(f"cannot read weights from {path}", UserError):
        if kind == "timm":
            return read_timm(path, config)
        if kind == "open_clip":
            return read_open_clip(path)
    raise UserError(f"{spec!r} names no public weights: wanted timm:FILE or open_clip:DIR")


def read_timm(path: Path, config: Config) -> tuple[dict[str, Tensor], Config]:
    """A timm image tower, without its head.

    How its pixels are normalized, and whether a tower of CLIP's kind has QuickGELU, says the config.json beside it, as
    timm's hub has it; else ImageNet's mean and deviation, and GELU, are assumed.
    """
    weights, marks = read_weights(path), ("patch_embed.proj.weight", "pos_embed")
    stems = [name.removesuffix(marks[0]) for name in weights if name.endswith(marks[0])]        # SLIP's: "visual."
    if not stems or stems[0] + marks[1] not in weights:
        raise UserError(f"{path} holds no vision transformer of timm's: it has no {' or no '.join(marks)}")
    state = {"visual." + name.removeprefix(stems[0]): value for name, value in weights.items()
             if name.startswith(stems[0]) and not re.match("head|decoder|mask_token", name.removeprefix(stems[0]))}
    about = read_json(path.with_name("config.json")) if path.with_name("config.json").is_file() else {}
    pixels = about.get("pretrained_cfg", {})
    if "mean" not in pixels:
        say(f"note: no config.json beside {path} says how its pixels are normalized: ImageNet's mean and deviation "
            f"are assumed, as most of timm's towers have them (augreg's and CLIP's have not)")
    dialect = ("timm" if "visual.norm_pre.weight" not in state else
               "openai" if "quickgelu" in about.get("architecture", "") else "clip")
    if dialect == "clip" and "architecture" not in about:
        say(f"note: no config.json beside {path} names its architecture: GELU is assumed, not OpenAI's QuickGELU")
    (width, _, p, _), places = state["visual.patch_embed.proj.weight"].shape, state["visual.pos_embed"].shape[1]
    depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("visual.blocks."))
    heads = config.heads
    if width != config.width:
        heads = max(1, width // 64)
        say(f"note: {heads} attention heads are assumed, {width // heads} wide, as in ViTs: no weight tells")
    state = renormalize(state, pixels.get("mean", MEAN), pixels.get("std", STD))
    return state, replace(config, dialect=dialect, width=width, depth=depth, heads=heads, patch_size=p,
                          image_size=p * math.isqrt(places))


def read_open_clip(path: Path) -> tuple[dict[str, Tensor], Config]:
    """A folder as open_clip's hub has them: open_clip_config.json and one of OPEN_CLIP_FILES; or that file."""
    files = [path / name for name in OPEN_CLIP_FILES if (path / name).is_file()] if path.is_dir() else [path]
    if not files:
        raise UserError(f"no weights in {path}: wanted {' or '.join(OPEN_CLIP_FILES)}")
    about_path = files[0].with_name("open_clip_config.json")
    if not about_path.is_file():
        raise UserError(f"no {about_path.name} beside {files[0]}: write what open_clip.get_model_config(NAME) returns "
                        f"there, as JSON")
    about = read_json(about_path)
    config = config_from_open_clip(about.get("model_cfg", about))
    pixels = OPENAI_PIXELS | about.get("preprocess_cfg", {})
    if pixels.get("resize_mode", "shortest") != "shortest":
        say(f"note: its images were resized by {pixels['resize_mode']} in training: evaluate with --squash")
    state = read_weights(files[0])
    told = [state.pop(name, None) for name in NOT_WEIGHTS]
    if told[0] is not None and config.dialect == "clip":
        say(f"note: {files[0].name} is OpenAI's own, made with QuickGELU, which {about_path.name} does not say: used")
        config = replace(config, dialect="openai")
    return renormalize(from_open_clip(state), pixels["mean"], pixels["std"]), config


def read_merges(path: str) -> BytePairTokenizer:
    """The vocabulary beside open_clip weights, merges.txt.gz or merges.txt: a header, then a merge a line."""
    folder = Path(path).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    for file in (folder / "merges.txt.gz", folder / "merges.txt"):
        if file.is_file():
            with refusing(f"cannot read {file}", UserError), open_text(file) as lines:
                return BytePairTokenizer.from_state({"merges": lines.read(1 << 24).partition("\n")[2]})
    raise UserError(f"no merges.txt beside the weights in {folder}: give CLIP's merges file with --bpe")


# ---- in and out ------------------------------------------------------------------------------------------------------

def load_public(model: MaskCLIP, state: dict[str, Tensor], spec: str):
    """Strict, but for what public weights do not have: the mask token, and all but the image tower in timm's."""
    has = ("visual.",) if spec.startswith("timm:") else BOTH_HAVE
    ours = {name: value for name, value in model.state_dict().items()
            if not name.startswith(has) or name == "text.mask_token"}
    try:
        model.load_state_dict(ours | state)
    except RuntimeError as error:
        raise UserError(f"{spec} does not fit a tower of dialect {model.config.dialect}: {one_line(error)}") from None


def initialize(model: MaskCLIP, spec: str):
    """The start of a run from other weights: timm:FILE, its image tower; open_clip:DIR, all but masked branches; or a
    checkpoint of train.py, of any method, all that both have."""
    is_ours = Path(spec).is_file()
    if is_ours:
        other, _, theirs = load_checkpoint(spec)
    else:
        state, theirs = read_public(spec, model.config)
    for f in fields(Config):
        said, ours = getattr(theirs, f.name), getattr(model.config, f.name)
        if f.metadata["group"].endswith("tower") and f.name not in FREE_AT_START and said != ours:
            name = "token_dim" if (f.name, model.config.method) == ("embed_dim", "filip") else f.name
            raise UserError(f"{spec} has {f.name} {said}, this run {ours}: give --{name.replace('_', '-')} {said}")
    if not is_ours:
        return load_public(model, state, spec)
    ours, state = model.state_dict(), other.state_dict()
    both = {name: x for name, x in state.items() if name in ours and ours[name].shape == x.shape}
    model.load_state_dict(ours | both)
    fresh = sorted({name.split(".")[0] for name in ours.keys() - both.keys()})
    say(f"weights of {spec}; fresh: {', '.join(fresh) or 'none'}")


def import_public(spec: str, preset: str, bpe: str | None, out: Path):
    """Public weights -> a checkpoint that all evaluation scripts read."""
    state, config = read_public(spec, replace(PRESETS[preset], method="clip"))
    if spec.startswith("timm:"):
        tokenizer, next_step = BytePairTokenizer([]), "eval_linear.py"
        note = f"an image tower of preset {preset}, dialect {config.dialect}; its text tower is untrained"
    else:
        tokenizer = BytePairTokenizer.from_file(bpe) if bpe else read_merges(spec.partition(":")[2])
        next_step = "eval_zeroshot.py"
        note = f"dialect {config.dialect}, {config.image_size} px, {tokenizer.vocab_size} tokens"
    model = MaskCLIP(config, tokenizer.eot)
    load_public(model, state, spec)
    with refusing(f"{out} cannot be written", UserError):
        out.parent.mkdir(parents=True, exist_ok=True)
    if not save_checkpoint(out, model, tokenizer, config):
        raise UserError(f"{out} could not be written")
    print(f"{out}: {note}.  Next: python {next_step} {shlex.quote(str(out))}")


def export(model: MaskCLIP, tokenizer: BytePairTokenizer, kind: str, path: Path):
    """Writes weights for timm (a file) or open_clip (a folder that `open_clip.create_model("local-dir:...")` takes)."""
    with refusing(f"{path} cannot be written", UserError):
        if kind == "timm":
            return export_timm(model, path)
        if kind == "open_clip":
            return export_open_clip(model, tokenizer, path)
    raise UserError(f"cannot export for {kind}: wanted --export timm FILE, or --export open_clip DIR")


def export_timm(model: MaskCLIP, path: Path):
    """What timm's VisionTransformer of this size loads; for our dialect clip that with pre_norm=True."""
    c, state, more = model.config, model.visual.state_dict(), ""
    if path.suffix == ".safetensors":
        raise UserError(f"{path} would be a torch file: wanted --export timm with a name that ends in .pth")
    if c.dialect != "timm":
        state, more = bias_into_positions(state), ", pre_norm=True, norm_layer=partial(LayerNorm, eps=1e-5)"
        more += ", act_layer='quick_gelu'" * (c.dialect == "openai")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    print(f"timm: VisionTransformer(img_size={c.image_size}, patch_size={c.patch_size}, embed_dim={c.width}, "
          f"depth={c.depth}, num_heads={c.heads}, num_classes=0{more}).load_state_dict(torch.load('{path}')); pixels "
          f"normalized with mean {MEAN}, std {STD}")


def export_open_clip(model: MaskCLIP, tokenizer: BytePairTokenizer, path: Path):
    c = model.config
    for lacks, ours in ((c.pool not in POOLS, f"--pool {c.pool}; it has cls and mean"),
                        (not c.causal, "with --no-causal ours hides the padding"),
                        (c.method == "filip", "FILIP compares patches with words")):
        if lacks:
            raise UserError(f"open_clip has no model like this one: {ours}")
    path.mkdir(parents=True, exist_ok=True)
    described, merges, note = open_clip_config(c), tokenizer.state()["merges"], ""
    with gzip.open(path / "merges.txt.gz", "wt", encoding="utf-8") as file:
        file.write("#version: 0.2\n" + merges)
    if hashlib.sha256(merges.encode()).hexdigest() != CLIP_MERGES_SHA256:
        # open_clip looks for a relative path in the working directory, so this one is absolute
        described["text_cfg"]["tokenizer_kwargs"] = dict(bpe_path=str((path / "merges.txt.gz").resolve()))
        note = "; the vocabulary is its own: if you move the folder, get_tokenizer(..., bpe_path=) must say where"
    pixels = dict(size=c.image_size, mean=MEAN, std=STD, interpolation="bicubic", resize_mode="shortest")
    about = json.dumps(dict(model_cfg=described, preprocess_cfg=pixels), indent=1)
    (path / "open_clip_config.json").write_text(about + "\n")
    torch.save(to_open_clip(model), path / "open_clip_pytorch_model.bin")
    print(f"open_clip: create_model_and_transforms('local-dir:{path}'), get_tokenizer('local-dir:{path}'){note}")


# ---------------------------------------------------------------------------------------------------------------------
# What a step costs, measured branch by branch with tensors that have shapes but no numbers
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Cost:
    """One branch for one image-text pair."""
    name: str
    parameters: int         # its own: those of the towers are counted with the towers
    flops: float            # of its forward pass
    step_flops: float       # of forward and backward
    kept: float             # bytes kept from forward to backward


def costs(config: Config, words: int | None = None, bf16: bool = False) -> list[Cost]:
    """The branches that config.method trains, for captions of `words` tokens (default: the full context length), and
    last all of a step at once: nothing is counted twice, optimizer and averages not at all.

    The contrast is left out: it is one product of embeddings with those of the batch.
    """
    c, L, method = replace(config, drop_path=0.0), words or config.context_length, METHODS[config.method]
    B = 1024                                # so many that what is kept once, whatever the batch, does not count
    keep, hidden = random_mask(B, c.grid ** 2, c.mask_ratio)
    with torch.device("meta"):
        net = build(c, eot=c.vocab_size - 1)
        teacher = Teacher(net) if method["predicts"] == "teacher" else None
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        net.to_empty(device="cpu")
        images, tokens = torch.zeros(B, 3, c.image_size, c.image_size), torch.zeros(B, L, dtype=torch.long)
        chosen = torch.zeros(B * max(1, round(c.word_ratio * (L - 2))), dtype=torch.long)
        batch = dict(images=images, view1=images, view2=images, keep=keep, hidden=hidden, tokens=tokens, tokens2=tokens,
                     chosen=chosen, word_count=torch.ones(()))
        if method["mlm"]:
            batch["corrupted"] = tokens
        if teacher:
            teacher.to_empty(device="cpu")

        def answer():
            return teacher(images, hidden) if teacher else None

        def cost(name: str, forward: Callable, *parts: nn.Module) -> Cost:
            parameters = sum(p.numel() for part in parts for p in part.parameters())
            return Cost(name, parameters, *(x / B for x in measure(forward, net)))
        rows = [cost("image tower", lambda: net.encode_image(images), net.visual, net.image_proj),
                cost("text tower", lambda: net.embed_text(net.text(tokens, net.eot), tokens), net.text, net.text_proj)]
        if teacher:
            rows.append(cost("teacher", answer))
        if net.predicts:
            said = answer()
            rows.append(cost("masked image", lambda: net.predict_hidden(images, keep, hidden, said), net.decoder,
                             net.quantizer if net.predicts == "codes" else net.predict))
        if method["mlm"] and c.method not in COMPARED:
            rows.append(cost("masked text", lambda: net.predict_words(
                net.text(tokens, net.eot), tokens, chosen, batch["word_count"]), net.text_decoder))
        return [*rows, cost("all", lambda: net(batch, answer()), net)]


# torch counts those of its other attention kernels by itself; query, key and value come last of those with a shape
ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *rest, **more: sdpa_backward_flop_count(grad, q, k, v)}


def measure(forward: Callable, net: nn.Module) -> tuple[float, float, float]:
    """FLOPs of forward(), FLOPs with its backward, and bytes that it keeps for that, net's parameters aside."""
    seen = []                                       # a weak reference to each tensor that a backward pass may want

    def note(x: Tensor) -> Tensor:
        seen.append(weakref.ref(x))
        return x
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            results = [x for x in tree_leaves(forward()) if x.requires_grad]
        flops = counter.get_total_flops()
        weights = {p.untyped_storage()._cdata for p in net.parameters()}
        alive = [x.untyped_storage() for ref in seen if (x := ref()) is not None]
        kept = {storage._cdata: storage.nbytes() for storage in alive if storage._cdata not in weights}
        if results:
            sum(x.sum() for x in results).backward()
        return flops, counter.get_total_flops(), sum(kept.values())


def describe(config: Config, words: int | None = None):
    """Prints what a pair costs, branch by branch."""
    if words and words > config.context_length:
        raise UserError(f"--words {words}: a caption has {config.context_length} tokens at most")
    print(f"{config.method}: {config.image_size} px, patches of {config.patch_size} px, "
          f"captions of {words or config.context_length} tokens; a pair costs")
    print(f"{'branch':28}{'parameters':>14}{'forward GFLOPs':>17}{'step GFLOPs':>14}{'kept, MB in fp32':>19}")
    rows = costs(config, words)
    for row in rows:
        print(f"{row.name:28}{row.parameters:>14,}{row.flops / 1e9:>17.3f}{row.step_flops / 1e9:>14.3f}"
              f"{row.kept / 1e6:>19.1f}")
    clip = rows[0].step_flops + rows[1].step_flops
    print(f"a step's FLOPs are {rows[-1].step_flops / clip:.2f} times those of clip")


def main(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                  allow_abbrev=False)
    cost = cli.add_argument_group("cost of a preset, or of CHECKPOINT's model: what is printed with no other option")
    cost.add_argument("--preset", default="vit-b16-yfcc15m", choices=PRESETS, help="default: %(default)s; with "
                      "--import timm:FILE the size of the tower, and the text tower that stays untrained")
    cost.add_argument("--method", default="maskclip", choices=METHODS, help="default: %(default)s")
    cost.add_argument("--words", type=at_least(3), help="tokens a caption (default: the context length)")
    out = cli.add_argument_group("our weights for others")
    out.add_argument("checkpoint", nargs="?", help="what train.py wrote, as runs/pocket/last.pt")
    out.add_argument("--export", nargs=2, metavar=("timm|open_clip", "PATH"),
                     help="timm: the image tower's state dict, to the file PATH, a .pth; open_clip: config, "
                          "weights and merges, to the folder PATH")
    into = cli.add_argument_group("public weights for us")
    into.add_argument("--import", dest="source", metavar="SPEC", help="timm:FILE, an image tower; open_clip:DIR, a "
                      "folder with open_clip_config.json, weights and merges.txt, as each repository on the hub has")
    into.add_argument("--out", metavar="FILE", help="the checkpoint to write, which all evaluation scripts read")
    into.add_argument("--bpe", help="CLIP's merges file, where there is no merges.txt beside the weights")
    o = cli.parse_args(argv)
    if o.source and o.out and not o.checkpoint and not o.export:
        return import_public(o.source, o.preset, o.bpe, Path(o.out))
    if o.source or o.out or o.bpe or o.export and not o.checkpoint:
        raise UserError("wanted python model.py CHECKPOINT --export timm FILE|open_clip DIR, or python model.py "
                        "--import timm:FILE|open_clip:DIR --out CHECKPOINT [--bpe MERGES]")
    if not o.checkpoint:
        return describe(preset_for(o.preset, o.method), o.words)
    model, tokenizer, config = load_checkpoint(o.checkpoint)
    if o.export:
        return export(model, tokenizer, o.export[0], Path(o.export[1]))
    describe(config, o.words)


if __name__ == "__main__":
    run(main)
