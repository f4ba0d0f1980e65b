"""The networks of MaskCLIP, from the patch to the teacher, in reading order.

    images (B,3,H,W) ──┬─ student ViT, all patches ─► image_proj ─► z_I (B,E)                            encode_image
                       ├─ student ViT, K visible patches ─► 1-layer decoder ─► h ─► codes (B,M,C)        predict_hidden
                       └─ EMA teacher ViT, all patches ─► h ─► soft codes (B,M,C), no gradient           Teacher
    tokens (B,L)    ───┬─ text transformer ─► end token ─► text_proj ─► z_T (B,E)                        encode_text
                       └─ text transformer, 20% masked ─► 4-layer text decoder ─► word logits (n,V)      predict_words

Config holds every number of a run, PRESETS the named ones, METHODS the rows of supplement Table 2.
SLIP, FILIP, DeCLIP and DeFILIP, which the paper compares with, stand together at the end; nothing before needs them.
Letters: B images, N patches, K visible and M hidden ones, D width, H heads, L tokens, V vocabulary, E embedding,
C codes.

    python model.py --preset vit-b16-yfcc15m --method maskclip     parameters, FLOPs and activation memory by branch
    python model.py CHECKPOINT --export timm FILE | open_clip DIR  our weights for others
    python model.py --import open_clip:DIR --out CHECKPOINT        public weights for our evaluation scripts
"""
import argparse
import copy
import gzip
import hashlib
import json
import math
import re
import zlib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losses
from data import MEAN, STD, BytePairTokenizer, UserError, at_least, one_line, read_json, say
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
    pos_embed: str = opt("learned", "position embedding: learned (timm, SLIP) or fixed sin-cos (MAE); paper silent",
                         "image tower", ("learned", "sincos"))
    dialect: str = opt("timm", "timm's image tower (SLIP; paper silent), or that of public CLIP weights: clip has a "
                       "norm before the blocks, openai besides its quick GELU in both towers", "image tower",
                       ("timm", "clip", "openai"))
    init: str = opt("mae", "initial weights: mae's; mimetic, which learns shapes in far fewer steps when they are few "
                    "(Trockman and Kolter 2023); timm:FILE, a public image tower; open_clip:DIR, both towers and the "
                    "vocabulary; paper silent", "image tower")
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
    target: str = opt("codes", "what the student predicts: the quantizer's codes, or normalized features (BootMAE)",
                      "self-distillation", ("codes", "features"))
    mask_ratio: float = opt(0.75, "share of patches hidden from the student (paper)", "self-distillation")
    decoder_depth: int = opt(1, "blocks of the image decoder (paper)", "self-distillation")
    n_codes: int = opt(8192, "codes C of the online quantizer (iBOT; paper silent)", "self-distillation")
    quantizer_hidden: int = opt(2048, "hidden width of the quantizer (iBOT; paper silent)", "self-distillation")
    quantizer_bottleneck: int = opt(256, "width in which codes are compared (iBOT; paper silent)", "self-distillation")
    temp_s: float = opt(0.1, "student temperature (iBOT; paper silent)", "self-distillation")
    temp_t: float = opt(0.04, "teacher temperature at the end of its warm-up (iBOT; paper silent)", "self-distillation")
    temp_t_start: float = opt(0.04, "teacher temperature at step 0 (ours: constant)", "self-distillation")
    temp_t_warmup: float = opt(0.0, "share of the run over which it rises (iBOT: 30 epochs)", "self-distillation")
    center_momentum: float = opt(0.9, "momentum of the centre of the teacher's logits (iBOT)", "self-distillation")
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
    # compared systems: weights, heads and views, at the end of model.py
    contrastive_weight: float = opt(1.0, "weight of the contrastive term (paper; DeCLIP 0.4)", "compared systems")
    simclr_weight: float = opt(1.0, "weight of SLIP's NT-Xent (SLIP)", "compared systems")
    token_weight: float = opt(1.0, "weight of FILIP's token-wise contrast (FILIP; DeFILIP 0.2)", "compared systems")
    simsiam_weight: float = opt(0.2, "weight of DeCLIP's SimSiam (DeCLIP)", "compared systems")
    neighbor_weight: float = opt(0.2, "weight of DeCLIP's contrast with nearest texts (DeCLIP)", "compared systems")
    slip_hidden: int = opt(4096, "hidden width of SLIP's projection head (SLIP)", "compared systems")
    simsiam_hidden: int = opt(1024, "width of DeCLIP's projector, twice that of its bottleneck (DeCLIP)",
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
    warmup_epochs: float = opt(1.0, "epochs of linear warm-up (paper)", "recipe")
    weight_decay: float = opt(0.1, "AdamW weight decay of matrices (paper); vectors, tokens, positions: none (ours)",
                              "recipe")
    beta2: float = opt(0.98, "AdamW beta2, beta1 is 0.9 (SLIP; paper silent)", "recipe")
    eps: float = opt(1e-8, "AdamW epsilon (SLIP; paper silent)", "recipe")
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
        PAPER, image_size=48, patch_size=8, width=128, depth=4, heads=4, pos_embed="sincos", init="mimetic",
        pool="max", text_width=128, text_depth=2, text_heads=4, context_length=32, vocab_size=768, embed_dim=128,
        n_codes=512, quantizer_hidden=256, quantizer_bottleneck=64, text_decoder_depth=1,
        slip_hidden=256, simsiam_hidden=256, token_dim=128, queue_size=1024, view_crop_min=0.5,
        epochs=5, batch_size=64, warmup_epochs=0.3, crop_min=1.0,
        # paper: 0.999 over 90,000 steps; here: less, because the teacher must be able to follow within two thousand
        momentum=0.99, momentum_end=0.999),
    "vit-b16-yfcc15m": PAPER,
    "vit-b32-yfcc15m": replace(PAPER, patch_size=32),
    # paper: silent on CC3M's schedule; here: SLIP's 40 epochs, because Table 1 compares with SLIP's rows
    "vit-b16-cc3m": replace(PAPER, epochs=40),
    # UniCL's contrast comes with the labels: --data shards:PAIRS --data folder:IMAGENET21K
    "vit-b16-icinw": replace(PAPER, epochs=32, batch_size=16384),
}

# what a compared system changes in a preset, from its own paper or code.  A pocket run keeps the recipe of its preset
BENCHMARK = dict(epochs=32, lr_start=1e-4, lr_end=0.0, warmup_epochs=0.67, contrastive_reduction="mean")
RECIPES = {
    # SLIP's README and main.py; all else is the paper's recipe too
    "slip": dict(lr=3e-3, weight_decay=0.1, contrastive_reduction="mean"),
    # DeCLIP's benchmark (github.com/Sense-GVT/DeCLIP, yfcc15m_vit_*/config.yaml): 128,000 steps, 2,500 to warm up
    "filip": dict(BENCHMARK, lr=5e-4, weight_decay=0.5),
    "declip": dict(BENCHMARK, lr=1e-3, weight_decay=0.1, view_crop_min=0.2, word_ratio=0.15, contrastive_weight=0.4,
                   mlm_weight=0.2),
}
RECIPES["defilip"] = dict(RECIPES["declip"], token_weight=0.2, token_top_k=16)


def preset_for(preset: str, method: str) -> Config:
    """The preset with the changes of the method's recipe."""
    changes = RECIPES.get(method, {})
    if preset == "pocket":
        group = {f.name: f.metadata["group"] for f in fields(Config)}
        changes = {name: value for name, value in changes.items() if group[name] != "recipe"}
    return replace(PRESETS[preset], method=method, **changes)


# supplement Table 2, row by row: what the masked branch predicts, whether the teacher is a running average or
# (momentum 0) the current weights, and whether words are masked too
METHODS = {
    "clip": dict(target=None, ema=False, mlm=False),
    "clip+mae": dict(target="pixels", ema=False, mlm=False),
    "clip+feature": dict(target="teacher", ema=False, mlm=False),
    "clip+ema": dict(target="teacher", ema=True, mlm=False),
    "maskclip": dict(target="teacher", ema=True, mlm=True),
    # compared systems, see the end of this file
    "slip": dict(target=None, ema=False, mlm=False),
    "filip": dict(target=None, ema=False, mlm=False),
    "declip": dict(target=None, ema=False, mlm=True),
    "defilip": dict(target=None, ema=False, mlm=True),
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
                first: int | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D).  is_word (B, N) bool: True where a place may be attended to.

        first: only so many tokens, the leftmost, attend, to all of them: (B, first, D).
        """
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)    # (B, H, N, D/H)
        allowed = None if is_word is None else is_word[:, None, None, :]                              # (B, 1, 1, N)
        x = F.scaled_dot_product_attention(q[:, :, :first], k, v, attn_mask=allowed, is_causal=causal)
        return self.proj(x.transpose(1, 2).flatten(2))                                                # (B, N, D)

    def value_path(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D): attention with the identity in place of softmax(QK), for dense features."""
        D = x.shape[-1]
        return self.proj(F.linear(x, self.qkv.weight[2 * D:], self.qkv.bias[2 * D:]))


@torch.no_grad()
def mimetic_init(attn: Attention):
    """Attention that starts as trained attention looks: W_q^T W_k near the identity, so that like attends to like, and
    W_proj W_v near minus the identity (Trockman and Kolter 2023, "Mimetic initialization of self-attention layers").

    Each product is drawn as  a Z + b I,  Z of variance 1/D, and cut into its two factors by the singular values.
    """
    D, head = attn.proj.in_features, attn.proj.in_features // attn.heads
    q, k, v = attn.qkv.weight.split(D)                                          # (D, D) each, heads one below the other
    U, S, V = torch.linalg.svd(0.4 * torch.randn(D, D) / D ** 0.5 - 0.4 * torch.eye(D))
    attn.proj.weight.copy_(U * S.sqrt())
    v.copy_(S.sqrt()[:, None] * V)
    for rows in range(0, D, head):
        U, S, V = torch.linalg.svd(0.7 * torch.randn(D, D) / D ** 0.5 + 0.7 * torch.eye(D))
        q[rows:rows + head] = S[:head, None].sqrt() * U.T[:head]
        k[rows:rows + head] = S[:head, None].sqrt() * V[:head]


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

        The draw is one for the samples of all processes, of which ours are taken: their number does not matter.
        """
        if self.drop_path == 0 or not self.training:
            return x
        keep, B = 1 - self.drop_path, len(x)
        draw = torch.rand(losses.world_size() * B, 1, 1, device=x.device)
        draw = draw[losses.own_columns(B, x.device)]                                            # (B, 1, 1)
        return x * (draw < keep) / keep

    def forward(self, x: Tensor, causal: bool = False, is_word: Tensor | None = None,
                first: int | None = None) -> Tensor:
        """As Attention.forward"""
        x = x[:, :first] + self.skip_at_random(self.attn(self.norm1(x), causal, is_word, first))
        return x + self.skip_at_random(self.mlp(self.norm2(x)))


def init_linear(module: nn.Module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


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
        self._check_input_dim(x)
        axes = [0, *range(2, x.ndim)]
        count = torch.full((x.shape[1],), x.numel() / x.shape[1], device=x.device)
        own = torch.stack([count, fp32(x).mean(axes), fp32(x).var(axes, correction=0)])         # (3, C)
        count, mean, var = losses.gather(own[None]).unbind(dim=1)                               # (W, C) each
        n = count.sum(dim=0)                                                                    # (C,)
        joint_mean = (count * mean).sum(dim=0) / n
        joint_var = (count * (var + (mean - joint_mean) ** 2)).sum(dim=0) / n
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(joint_mean, self.momentum)
                self.running_var.lerp_(joint_var * n / (n - 1), self.momentum)

        def per_channel(v):
            return v.view(1, -1, *[1] * (x.ndim - 2))
        y = (x - per_channel(joint_mean)) * per_channel((joint_var + self.eps).rsqrt())
        return (y * per_channel(self.weight) + per_channel(self.bias) if self.affine else y).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Image tower
# ---------------------------------------------------------------------------------------------------------------------

def random_mask(batch: int, patches: int, ratio: float, generator: torch.Generator | None = None):
    """Which patches the student sees: a random subset of the same size for each image, no block shape.

    Returns keep (batch, K) the sorted indices of visible patches, and hidden (batch, patches) bool, True = hidden.
    K = floor(patches * (1 - ratio)), as MAE rounds it, and at least 1.
    """
    K = max(1, int(patches * (1 - ratio) + 1e-6))
    noise = torch.rand(batch, patches, generator=generator)
    keep = noise.argsort(dim=1)[:, :K].sort(dim=1).values                   # (batch, K)
    hidden = torch.ones(batch, patches, dtype=torch.bool).scatter_(1, keep, False)
    return keep, hidden


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
                 drop_path: float = 0.0, pos_embed: str = "learned", init: str = "mae", dialect: str = "timm"):
        super().__init__()
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid ** 2, width), requires_grad=pos_embed == "learned")
        self.patch_embed = PatchEmbed(patch_size, width)
        eps = 1e-6 if dialect == "timm" else 1e-5
        self.norm_pre = nn.Identity() if dialect == "timm" else nn.LayerNorm(width, eps=eps)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]   # deeper blocks are skipped more often
        self.blocks = nn.ModuleList([Block(width, heads, eps, rate, dialect == "openai") for rate in rates])
        self.norm = nn.LayerNorm(width, eps=eps)
        self.init_weights(pos_embed, init)

    def init_weights(self, pos_embed: str, init: str):
        # paper: silent; here: MAE's initialization, which depends neither on depth nor on width
        for module in self.modules():
            init_linear(module)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if pos_embed == "sincos":
            self.pos_embed.data[:, :1] = 0
            self.pos_embed.data[:, 1:] = sincos_positions(self.grid, self.pos_embed.shape[-1])
        if init == "mimetic":
            for block in self.blocks:
                mimetic_init(block.attn)

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

    def forward(self, images: Tensor, keep: Tensor | None = None, first: int | None = None) -> Tensor:
        """(B, 3, h, w) -> (B, 1+n, D) normalized tokens, class token first.

        keep (B, K): only these patches are computed, as the student of self-distillation sees them.
        first: the last block computes only so many tokens, for who reads no others: 1 for the class token.
        """
        x = self.embed(images, keep)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm(self.blocks[-1](x, first=first))

    def block_outputs(self, images: Tensor, taps: tuple[int, ...]) -> list[Tensor]:
        """The outputs (B, 1+N, D) of blocks `taps`, counted from 1, before the final norm, for dense heads."""
        x, out = self.embed(images), []
        for i, block in enumerate(self.blocks, start=1):
            x = block(x)
            if i in taps:
                out.append(x)
        return out

    def value_features(self, images: Tensor, path: str = "code") -> Tensor:
        """(B, 3, h, w) -> (B, N, D): patch features that keep their place, for zero-shot segmentation.

        The last block attends with the identity instead of softmax(QK): a patch's feature is its own value vector.
        path "code" keeps the block's residual and MLP, as the released DenseCLIP code does; "plain" is value and output
        projection alone, as its text says.
        """
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        value = last.attn.value_path(last.norm1(x))
        if path == "code":
            x = x + value
            value = x + last.mlp(last.norm2(x))
        return self.norm(value)[:, 1:]


def image_tower(c: Config, drop_path: float = 0.0, init: str = "mae") -> VisionTransformer:
    return VisionTransformer(c.image_size, c.patch_size, c.width, c.depth, c.heads, drop_path, c.pos_embed, init,
                             c.dialect)


# ---------------------------------------------------------------------------------------------------------------------
# Text tower
# ---------------------------------------------------------------------------------------------------------------------

def mask_words(tokens: Tensor, ratio: float, sot: int, eot: int, mask_id: int, noise: Tensor):
    """BERT's corruption of a share of each caption's words: 80% become the mask token, 10% another word, 10% stay.

    tokens (B, L), noise (B, L, 3) uniform in [0, 1): one draw to choose, one for the kind, one for the other word.
    Start, end and padding are never chosen; of a caption with words at least one is.  Other words have ids below sot.
    Returns corrupted (B, L) and chosen (B, L) bool.
    """
    noise = noise[:, :tokens.shape[1]]
    is_word = (tokens != sot) & before_end(tokens, eot)
    n_words = is_word.sum(dim=1, keepdim=True)                                                  # (B, 1)
    n_chosen = (n_words * ratio).round().clamp(min=1).minimum(n_words)
    rank = noise[..., 0].masked_fill(~is_word, 2.0).argsort(dim=1).argsort(dim=1)               # 0 for the lowest draw
    chosen = rank < n_chosen
    other_word = (noise[..., 2] * sot).long()
    corrupted = torch.where(noise[..., 1] < 0.8, mask_id, torch.where(noise[..., 1] < 0.9, other_word, tokens))
    return torch.where(chosen, corrupted, tokens), chosen


def before_end(tokens: Tensor, eot: int) -> Tensor:
    """(B, L) bool, True before the first end token."""
    return (tokens == eot).cumsum(dim=1) == 0


class TextTransformer(nn.Module):
    """CLIP's text tower: learned positions, causal attention, final norm.

    With masked_words it knows one word more, the mask token, which lives outside the vocabulary.
    """
    def __init__(self, vocab_size: int = 49408, context_length: int = 77, width: int = 512, depth: int = 12,
                 heads: int = 8, causal: bool = True, masked_words: bool = False, quick_gelu: bool = False):
        super().__init__()
        self.causal = causal
        self.mask_id = vocab_size                               # one past the last word, and never in a caption
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width)) if masked_words else None
        self.pos_embed = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList([Block(width, heads, eps=1e-5, quick_gelu=quick_gelu) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        init_text_blocks(self.blocks)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)

    def forward(self, tokens: Tensor, eot: int) -> Tensor:
        """(B, L) ids -> (B, L, D) normalized features; L may be any length up to the context length."""
        if self.mask_token is None:
            x = self.token_embedding(tokens)                                                    # (B, L, D)
        else:
            is_mask = tokens == self.mask_id
            x = self.token_embedding(tokens.masked_fill(is_mask, 0))                            # (B, L, D)
            x = torch.where(is_mask[..., None], self.mask_token.to(x.dtype), x)
        x = x + self.pos_embed[:tokens.shape[1]]
        is_word = None if self.causal else before_end(tokens, eot) | (tokens == eot)
        for block in self.blocks:
            x = block(x, causal=self.causal, is_word=is_word)
        return self.norm(x)


def init_text_blocks(blocks: nn.ModuleList):
    """CLIP's initialization: residual outputs shrink with depth."""
    for block in blocks:
        width = block.norm1.normalized_shape[0]
        nn.init.normal_(block.attn.qkv.weight, std=width ** -0.5)
        nn.init.normal_(block.attn.proj.weight, std=width ** -0.5 * (2 * len(blocks)) ** -0.5)
        nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.fc2.weight, std=width ** -0.5 * (2 * len(blocks)) ** -0.5)
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
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

    def forward(self, visible: Tensor, keep: Tensor, hidden_index: Tensor) -> Tensor:
        """visible (B, 1+K, D) student tokens, keep (B, K), hidden_index (B, M) -> (B, M, D), at hidden patches only."""
        B, K = keep.shape
        visible = self.embed(visible)
        pos = self.pos_embed.expand(B, -1, -1)                                                  # (B, N, D)
        seen = visible[:, 1:] + take(pos, keep)                                                 # (B, K, D)
        unseen = self.mask_token + take(pos, hidden_index)                                      # (B, M, D)
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
        return F.normalize(fp32(self.mlp(x)), dim=-1)

    def unit_codes(self) -> Tensor:
        """(C, bottleneck), unit length"""
        return F.normalize(fp32(self.codes), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, C) logits, each in [-1, 1]"""
        return self.bottleneck(x) @ self.unit_codes().T


class TextDecoder(nn.Module):
    """Bidirectional blocks on the text tower's output; word logits are products with the tower's word table (BERT).

    # paper: silent on attention and output matrix; here: bidirectional, because the tower is causal and a masked word
    # must see what follows it; tied, because an untied matrix alone would hold a third of the text tower's parameters
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

LOGIT_ROWS = 4096       # rows of code or word logits that exist at once


class MaskCLIP(nn.Module):
    """CLIP's two towers, and the branches that config.method trains beside them."""

    def __init__(self, config: Config, eot: int):
        super().__init__()
        c = self.config = config
        method = METHODS[c.method]
        self.eot = eot
        self.visual = image_tower(c, c.drop_path, c.init)
        self.text = TextTransformer(c.vocab_size, c.context_length, c.text_width, c.text_depth, c.text_heads, c.causal,
                                    masked_words=method["mlm"], quick_gelu=c.dialect == "openai")
        self.image_proj = nn.Linear(c.width, c.embed_dim, bias=False)
        self.text_proj = nn.Linear(c.text_width, c.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.image_proj.weight, std=c.width ** -0.5)
        nn.init.normal_(self.text_proj.weight, std=c.text_width ** -0.5)

        self.target = c.target if method["target"] == "teacher" else method["target"]
        if self.target:
            self.decoder = ImageDecoder(c.width, c.decoder_depth, c.heads, c.grid)
        if self.target == "codes":
            self.quantizer = Quantizer(c.width, c.quantizer_hidden, c.quantizer_bottleneck, c.n_codes)
        elif self.target:
            self.predict = nn.Linear(c.width, 3 * c.patch_size ** 2 if self.target == "pixels" else c.width)
            init_linear(self.predict)
        if method["mlm"]:
            self.text_decoder = TextDecoder(c.text_width, c.text_decoder_depth, c.text_heads, c.vocab_size)

    def pool_image(self, x: Tensor) -> Tensor:
        """(B, 1+N, D) tokens -> (B, D)"""
        return pool_tokens(x, self.config.pool)

    def image_features(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, D); where the class token is all that is read, the last block computes no other"""
        return self.pool_image(self.visual(images, first=1 if self.config.pool == "cls" else None))

    def pool_text(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(B, L, D), (B, L) -> (B, D) at the first end token.  By its id: the highest id may be another one."""
        return x[torch.arange(len(x), device=x.device), (tokens == self.eot).int().argmax(dim=1)]

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) normalized pixels -> (B, E), unit length"""
        return F.normalize(fp32(self.image_proj(self.image_features(images))), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) ids with start and end -> (B, E), unit length; computed up to the longest caption only"""
        tokens = tokens[:, :int(before_end(tokens, self.eot).sum(dim=1).max()) + 1]
        return self.embed_text(self.text(tokens, self.eot), tokens)

    def embed_text(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(B, L, D) text features -> (B, E), unit length"""
        return F.normalize(fp32(self.text_proj(self.pool_text(x, tokens))), dim=-1)

    @torch.no_grad()
    def encode_classes(self, names, templates, tokenizer) -> Tensor:
        """(classes, E) zero-shot classifier: each name in every template, embedded, averaged, unit length again.

        Several names of one class stand in one string, divided by tabs.
        """
        rows = []
        for name in names:
            prompts = [template.format(one) for one in name.split("\t") for template in templates]
            tokens = tokenizer(prompts, self.config.context_length)
            texts = self.encode_text(tokens.to(self.logit_scale.device))            # (prompts, E); FILIP's have words
            rows.append(texts.flatten(0, -2).mean(dim=0))                                           # (E,)
        return F.normalize(torch.stack(rows), dim=-1)

    def encode_patches(self, images: Tensor, path: str = "code") -> Tensor:
        """(B, 3, h, w) -> (B, N, E) unit-length patch embeddings in the joint space, by DenseCLIP's value path"""
        return F.normalize(fp32(self.image_proj(self.visual.value_features(images, path))), dim=-1)

    def forward(self, batch: dict[str, Tensor], target: dict | None = None) -> tuple[dict, dict]:
        """One pass of all branches, so that DistributedDataParallel sees one forward.

        batch   images (B,3,H,W), tokens (B,L); for the masked branch keep (B,K) and hidden (B,N);
                for the word branch corrupted (B,L), chosen (n,) places in B*L, word_count () (see masked_language_loss)
        target  what Teacher returned for the same images, for methods that have a teacher
        Returns features {"image": (B,E), "text": (B,E)}, to be contrasted over all micro-batches and processes by
        `contrast`, and the loss terms that need this micro-batch alone, each before its weight.
        """
        images, tokens, terms = batch["images"], batch["tokens"], {}
        image = self.encode_image(images)
        if self.target:
            name = dict(pixels="pixel", features="feature", codes="distillation")[self.target]
            terms[name] = self.predict_hidden(images, batch["keep"], batch["hidden"], target)
        if "corrupted" in batch:                                        # clean and masked captions in one pass
            text, masked = self.text(torch.cat([tokens, batch["corrupted"]]), self.eot).chunk(2)    # (B, L, D) each
            terms["mlm"] = self.predict_words(masked, tokens, batch["chosen"], batch["word_count"])
        else:
            text = self.text(tokens, self.eot)                                                      # (B, L, D)
        return dict(image=image, text=self.embed_text(text, tokens)), terms

    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The features of forward without the masked branches."""
        text = self.embed_text(self.text(batch["tokens"], self.eot), batch["tokens"])
        return dict(image=self.encode_image(batch["images"]), text=text)

    def contrast(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Features of this process's whole batch -> {"contrastive": L_I + L_T}, against those of all processes.

        Beside them may stand "labels" (B,) of labeled data: then pairs of one label are no negatives (UniCL).
        """
        image, text, scale = features["image"], features["text"], self.logit_scale.exp()
        if "labels" in features:
            return dict(contrastive=self.both_ways(*losses.unicl_loss(image, text, features["labels"], scale)))
        return dict(contrastive=self.both_ways(*losses.contrastive_loss(image, text, scale)))

    def both_ways(self, loss_i: Tensor, loss_t: Tensor) -> Tensor:
        return (loss_i + loss_t) / (2 if self.config.contrastive_reduction == "mean" else 1)

    def predict_hidden(self, images: Tensor, keep: Tensor, hidden: Tensor, target: dict | None) -> Tensor:
        """The masked branch: L_Dist, or the pixel or feature loss that stands in its place."""
        index = hidden_index(hidden, keep)                                                      # (B, M)
        x = self.decoder(self.visual(images, keep), keep, index)                                # (B, M, D)
        if self.target == "pixels":
            return losses.pixel_loss(self.predict(x), take(patchify(images, self.config.patch_size), index))
        if self.target == "features":
            return losses.feature_loss(self.predict(x), target["features"])

        def code_loss(student, teacher, codes):
            """Summed over rows: (rows, bottleneck) of student and teacher against their own (C, bottleneck) codes"""
            with torch.autocast(student.device.type, enabled=False):    # divided by 0.04, rounding to bf16 would show
                return len(student) * losses.distillation_loss(
                    student @ codes.T, teacher @ target["codes"].T, None, self.config.temp_s, target["temp"],
                    target["center"])
        student = self.quantizer.bottleneck(x).flatten(0, 1)                                    # (B*M, bottleneck)
        codes = self.quantizer.unit_codes()                                                     # (C, bottleneck)
        total = losses.sum_in_chunks(code_loss, LOGIT_ROWS, student, target["features"].flatten(0, 1), codes)
        return total / len(student)

    def predict_words(self, x: Tensor, tokens: Tensor, chosen: Tensor, word_count: Tensor) -> Tensor:
        """L_MLM from the masked captions' features (B, L, D), computed at the chosen places only."""
        x = self.text_decoder(x, before_end(tokens, self.eot) | (tokens == self.eot), chosen)   # (n, D)
        words = tokens.flatten()[chosen]                                                        # (n,)

        def word_loss(x, words, table, bias):
            return losses.masked_language_loss(F.linear(x, table, bias), words, normalizer=word_count)
        return losses.sum_in_chunks(word_loss, LOGIT_ROWS, x, words, self.text.token_embedding.weight,
                                    self.text_decoder.bias)


def hidden_index(hidden: Tensor, keep: Tensor) -> Tensor:
    """hidden (B, N) bool -> (B, M) sorted indices of hidden patches; M = N - K, known without looking at the values."""
    M = hidden.shape[1] - keep.shape[1]
    return hidden.int().argsort(dim=1, descending=True, stable=True)[:, :M]


class Teacher(nn.Module):
    """The running average of the student's image tower and quantizer, which says what hidden patches look like.

    momentum 0 makes it the current weights: the row "+ Feature prediction" of supplement Table 2, before "+ EMA model".
    """
    def __init__(self, model: MaskCLIP):
        super().__init__()
        self.visual = copy.deepcopy(model.visual)
        self.quantizer = copy.deepcopy(model.quantizer) if model.target == "codes" else None
        self.register_buffer("center", torch.zeros(model.config.n_codes))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor, keep: Tensor, hidden: Tensor, temp: float) -> dict[str, Tensor]:
        """(B, 3, H, W) -> features (B, M, bottleneck or D) at hidden patches, and what makes codes of them:
        codes (C, bottleneck), center (C,), temp."""
        x = take(self.visual(images)[:, 1:], hidden_index(hidden, keep))                        # (B, M, D)
        if self.quantizer is None:
            return dict(features=x)
        return dict(features=self.quantizer.bottleneck(x), codes=self.quantizer.unit_codes(), center=self.center,
                    temp=temp)

    @torch.no_grad()
    def update(self, model: MaskCLIP, momentum: float):
        """theta_bar <- m * theta_bar + (1 - m) * theta, after each optimizer step.  There are no buffers to copy."""
        pairs = [(self.visual, model.visual)] + ([(self.quantizer, model.quantizer)] if self.quantizer else [])
        for average, student in pairs:
            torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - momentum)

    @torch.no_grad()
    def update_center(self, target: dict[str, Tensor], momentum: float):
        """center <- m * center + (1 - m) * mean of the logits over hidden patches and processes.

        Logits are linear in the bottleneck, so their mean is the mean bottleneck's logits.
        """
        mean = losses.mean_over_processes(target["features"].flatten(0, 1).mean(dim=0))         # (bottleneck,)
        self.center.lerp_(target["codes"] @ mean, 1 - momentum)

    @torch.no_grad()
    def collapse_monitor(self, target: dict[str, Tensor]) -> dict[str, float]:
        """How the codes of (a part of) this batch are used.

        code_entropy   entropy of the mean distribution, nats: near 0 when all patches get the same code, ln C at most
        patch_entropy  mean entropy of single distributions, nats: near ln C when the teacher says nothing
        codes_used     share of the C codes that are some patch's most likely one
        """
        z = target["features"].flatten(0, 1)[:LOGIT_ROWS]
        q = losses.soft_codes(z @ target["codes"].T, target["temp"], target["center"])          # (rows, C)
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

def mlp_head(*widths: int, norm_last: bool = False) -> nn.Sequential:
    """Linear layers with batch norm and ReLU after all but the last, which norm_last gives a batch norm.

    No bias before a norm, which would take it out again; no running statistics, as no evaluation uses the heads.
    """
    *hidden, last = zip(widths, widths[1:])
    layers = [layer for i, o in hidden for layer in (
        nn.Linear(i, o, bias=False), SyncBatchNorm(o, track_running_stats=False), nn.ReLU())]
    layers.append(nn.Linear(*last, bias=not norm_last))
    return nn.Sequential(*layers, *([SyncBatchNorm(last[1], track_running_stats=False)] if norm_last else []))


class SLIP(MaskCLIP):
    """CLIP, and SimCLR's contrast of two augmented views of each image (Mu et al., ECCV 2022)."""

    def __init__(self, config: Config, eot: int):
        super().__init__(config, eot)
        self.head = mlp_head(config.width, config.slip_hidden, config.slip_hidden, 256)

    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch holds view1, view2 (B,3,H,W) besides; so does what is returned, (B, D) each."""
        views = torch.stack([batch["images"], batch["view1"], batch["view2"]], dim=1).flatten(0, 1)     # (3B, 3, H, W)
        x = self.image_features(views)                                                          # (3B, D)
        return dict(image=F.normalize(fp32(self.image_proj(x[::3])), dim=-1), view1=fp32(x[1::3]),
                    view2=fp32(x[2::3]), text=self.embed_text(self.text(batch["tokens"], self.eot), batch["tokens"]))

    def forward(self, batch: dict[str, Tensor], target: None = None) -> tuple[dict, dict]:
        return self.encode(batch), {}

    def contrast(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b = (F.normalize(self.head(features[name]), dim=-1) for name in ("view1", "view2"))
        return dict(super().contrast(features), simclr=losses.simclr_loss(a, b))


class FILIP(MaskCLIP):
    """CLIP whose image and text are the unit vectors of all patches and words (Yao et al., ICLR 2022).

    Words are what stands between start and end token.
    # FILIP: all but padding; here: without start and end, which name nothing that a patch could look for
    """
    def __init__(self, config: Config, eot: int):
        super().__init__(replace(config, embed_dim=config.token_dim), eot)

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) normalized pixels -> (B, N, E), unit length"""
        return F.normalize(fp32(self.image_proj(self.visual(images)[:, 1:])), dim=-1)

    def embed_text(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(B, L, D) text features -> (B, L, E), unit length, zero where there is no word"""
        return F.normalize(fp32(self.text_proj(x)), dim=-1) * between_ends(tokens, self.eot)

    def contrast(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(token=self.both_ways(*losses.token_contrastive_loss(
            features["image"], features["text"], self.logit_scale.exp(), self.config.token_top_k)))


def between_ends(tokens: Tensor, eot: int) -> Tensor:
    """(B, L) -> (B, L, 1) bool, True for words: after the start token, before the end token"""
    is_word = before_end(tokens, eot)
    is_word[:, 0] = False
    return is_word[..., None]


class DeCLIP(MaskCLIP):
    """CLIP of two views and two captions, with SimSiam, nearest texts and masked words (Li et al., ICLR 2022).

    # DeCLIP: batch norm and queue of each process by itself; here: of all, so that their number does not matter
    """
    def __init__(self, config: Config, eot: int):
        super().__init__(config, eot)
        E, S = config.embed_dim, config.simsiam_hidden
        self.text_decoder = nn.Linear(config.text_width, config.vocab_size)     # in place of the paper's
        self.projector = mlp_head(E, S, S, S, norm_last=True)
        self.predictor = mlp_head(S, S // 2, S)
        # until texts have filled it, the rest are random directions, which are rarely nearest
        self.register_buffer("queue", F.normalize(torch.randn(config.queue_size, E), dim=-1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))

    def towers(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """batch holds view2 (B,3,H,W), tokens2 (B,L') besides, and images are a view too.  The first caption is seen
        with masked words only.  -> (2B, 1+N, D) with both views of an image side by side; (B, L, D), (B, L', D)"""
        views = torch.stack([batch["images"], batch["view2"]], dim=1).flatten(0, 1)             # (2B, 3, H, W)
        return self.visual(views), self.text(batch["corrupted"], self.eot), self.text(batch["tokens2"], self.eot)

    def features(self, batch: dict[str, Tensor], views: Tensor, text1: Tensor, text2: Tensor) -> dict[str, Tensor]:
        """What the towers returned -> image1, image2 (B, E) of any length, text1, text2 (B, E) of unit length"""
        image = fp32(self.image_proj(self.pool_image(views)))                                   # (2B, E)
        return dict(image1=image[::2], image2=image[1::2], text1=self.embed_text(text1, batch["tokens"]),
                    text2=self.embed_text(text2, batch["tokens2"]))

    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.features(batch, *self.towers(batch))

    def forward(self, batch: dict[str, Tensor], target: None = None) -> tuple[dict, dict]:
        views, text1, text2 = self.towers(batch)
        logits = self.text_decoder(text1.flatten(0, 1)[batch["chosen"]])                        # (n, V)
        words = batch["tokens"].flatten()[batch["chosen"]]                                      # (n,)
        mlm = losses.masked_language_loss(logits, words, normalizer=batch["word_count"])
        return self.features(batch, views, text1, text2), dict(mlm=mlm)

    def contrast(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        scale, texts = self.logit_scale.exp(), [features["text1"], features["text2"]]           # (B, E)
        images = [F.normalize(features[name], dim=-1) for name in ("image1", "image2")]         # (B, E)
        z1, z2 = (self.projector(features[name]) for name in ("image1", "image2"))              # (B, S)
        simsiam = losses.simsiam_loss(self.predictor(z1), self.predictor(z2), z1, z2)
        self.newest = [text.detach() for text in texts]
        nearest = [self.queue[(text @ self.queue.T).argmax(dim=1)] for text in self.newest]     # (B, E)
        contrastive = [self.both_ways(*losses.contrastive_loss(i, t, scale)) for i in images for t in texts]
        neighbor = [losses.contrastive_loss(i, t, scale)[0] for i in images for t in nearest]
        return dict(contrastive=sum(contrastive) / 4, neighbor=sum(neighbor) / 4, simsiam=simsiam)

    @torch.no_grad()
    def remember(self):
        """After an optimizer step: the batch's texts, of all processes, take the places of the oldest in the queue."""
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
        self.patch_proj = nn.Linear(config.width, config.token_dim, bias=False)
        self.word_proj = nn.Linear(config.text_width, config.token_dim, bias=False)
        self.token_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def features(self, batch: dict[str, Tensor], views: Tensor, text1: Tensor, text2: Tensor) -> dict[str, Tensor]:
        """DeCLIP's, and patches1, patches2 (B, N, E), words1 (B, L, E), words2 (B, L', E) as in FILIP"""
        patches = F.normalize(fp32(self.patch_proj(views[:, 1:])), dim=-1)                      # (2B, N, E)
        words1, words2 = (F.normalize(fp32(self.word_proj(x)), dim=-1) * between_ends(tokens, self.eot)
                          for x, tokens in ((text1, batch["tokens"]), (text2, batch["tokens2"])))
        return dict(super().features(batch, views, text1, text2), patches1=patches[::2], patches2=patches[1::2],
                    words1=words1, words2=words2)

    def contrast(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        token = [self.both_ways(*losses.token_contrastive_loss(
            features[p], features[w], self.token_logit_scale.exp(), self.config.token_top_k))
            for p in ("patches1", "patches2") for w in ("words1", "words2")]
        return dict(super().contrast(features), token=sum(token) / 4)


COMPARED = {"slip": SLIP, "filip": FILIP, "declip": DeCLIP, "defilip": DeFILIP}


def build(config: Config, eot: int) -> MaskCLIP:
    """The model that config.method names."""
    return COMPARED.get(config.method, MaskCLIP)(config, eot)


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


def bias_into_positions(state: dict[str, Tensor], tower: str = "") -> dict[str, Tensor]:
    """The state dict of an image tower whose patch embedding has no bias and that does the same."""
    state = dict(state)
    bias, pos = state.pop(tower + "patch_embed.proj.bias"), state[tower + "pos_embed"]
    return state | {tower + "pos_embed": torch.cat([pos[:, :1], pos[:, 1:] + bias], dim=1)}     # (1, 1+N, D)


def renormalize(state: dict[str, Tensor], mean, std, tower: str = "") -> dict[str, Tensor]:
    """A tower's state dict for pixels normalized with `mean` and `std` -> one for ours that does the same.

    Their (x - mean) / std is ours * (STD / std) + (MEAN - mean) / std: a factor for each channel of the patch
    embedding, and a sum for its bias.
    """
    weight = state[tower + "patch_embed.proj.weight"]                                           # (D, 3, p, p)
    bias = state.get(tower + "patch_embed.proj.bias", weight.new_zeros(len(weight)))            # (D,)
    ours, mean, std = weight.new_tensor([MEAN, STD]), weight.new_tensor(mean), weight.new_tensor(std)
    factor, shift = ours[1] / std, (ours[0] - mean) / std                                       # (3,) each
    return state | {tower + "patch_embed.proj.weight": weight * factor[:, None, None],
                    tower + "patch_embed.proj.bias": bias + weight.sum(dim=(2, 3)) @ shift}


def to_timm(model: MaskCLIP) -> dict[str, Tensor]:
    """What timm's VisionTransformer of this size loads; for our dialect clip that with pre_norm=True."""
    state = model.visual.state_dict()
    return state if model.config.dialect == "timm" else bias_into_positions(state)


def to_open_clip(model: MaskCLIP) -> dict[str, Tensor]:
    """What open_clip's CLIP loads when it is built with `open_clip_config`."""
    state = {name: value for name, value in model.state_dict().items() if name.startswith(BOTH_HAVE)}
    state.pop("text.mask_token", None)                      # no caption holds it
    state = bias_into_positions(state, "visual.")
    for name in ("image_proj.weight", "text_proj.weight"):
        state[name] = state[name].T.contiguous()            # theirs multiply from the right
    state["visual.cls_token"] = state["visual.cls_token"].flatten()
    state["visual.pos_embed"] = state["visual.pos_embed"][0]
    theirs = {}
    for name, value in state.items():
        for their, our in OPEN_CLIP_NAMES:
            name = name.replace(our, their)
        theirs[name] = value
    return theirs


def from_open_clip(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names and shapes -> ours."""
    state = {}
    for name, value in theirs.items():
        for their, our in OPEN_CLIP_NAMES:
            name = name.replace(their, our)
        state[name] = value
    for name in ("image_proj.weight", "text_proj.weight"):
        state[name] = state[name].T
    state["visual.cls_token"] = state["visual.cls_token"][None, None]
    state["visual.pos_embed"] = state["visual.pos_embed"][None]
    return state | {"logit_scale": state["logit_scale"].squeeze()}


def open_clip_config(c: Config) -> dict:
    """open_clip's model_cfg for our two towers."""
    vision = dict(image_size=c.image_size, layers=c.depth, width=c.width, head_width=c.width // c.heads,
                  patch_size=c.patch_size, pool_type=POOLS[c.pool])
    if c.dialect == "timm":
        vision |= dict(no_ln_pre=True, norm_kwargs=dict(eps=1e-6))
    text = dict(context_length=c.context_length, vocab_size=c.vocab_size, width=c.text_width, heads=c.text_heads,
                layers=c.text_depth)
    return dict(embed_dim=c.embed_dim, quick_gelu=c.dialect == "openai", vision_cfg=vision, text_cfg=text)


def config_from_open_clip(theirs: dict) -> Config:
    """The Config whose open_clip_config says the same; UserError names what has no counterpart here."""
    try:
        vision = dict(head_width=64, pool_type="tok") | theirs["vision_cfg"]
        text = dict(context_length=77, vocab_size=49408) | theirs["text_cfg"]
        c = replace(PAPER, method="clip", image_size=vision["image_size"], patch_size=vision["patch_size"],
                    width=vision["width"], depth=int(vision["layers"]), heads=vision["width"] // vision["head_width"],
                    pool="mean" if vision["pool_type"] == "avg" else "cls", text_width=text["width"],
                    text_depth=text["layers"], text_heads=text["heads"], context_length=text["context_length"],
                    vocab_size=text["vocab_size"], embed_dim=theirs["embed_dim"], dialect="timm" if
                    vision.get("no_ln_pre") else "openai" if theirs.get("quick_gelu") else "clip")
        ours = open_clip_config(c)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"open_clip's config is not that of a plain vision transformer with CLIP's text tower "
                        f"({type(error).__name__} {error})") from None
    free = {"vision_cfg", "text_cfg", "tokenizer_kwargs", "hf_tokenizer_name", "init_logit_scale"}
    mlp = dict(mlp_ratio=4)
    for part, said, want in (("vision_cfg", mlp | vision, mlp | ours["vision_cfg"]), ("model_cfg", theirs, ours),
                             ("text_cfg", mlp | text, mlp | ours["text_cfg"])):
        for key in (said.keys() | want.keys()) - free:
            if (said.get(key) or None) != (want.get(key) or None):
                raise UserError(f"open_clip's {part} has {key} = {said.get(key)}, for which our towers have no "
                                f"counterpart: wanted {want.get(key)}")
    return c


def load_public(model: MaskCLIP, state: dict[str, Tensor], towers: tuple[str, ...], path):
    """Loads what stands in a public file, under our names.  Strict for `towers`, but for the mask token, ours alone."""
    try:
        missing, unknown = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f"{path} is of another size: {' '.join(str(error).splitlines()[1].split())}") from None
    missing = [name for name in missing if name.startswith(towers) and name != "text.mask_token"]
    if missing or unknown:
        raise UserError(f"{path} does not fit a tower of dialect {model.config.dialect}: it lacks "
                        f"{', '.join(missing[:3]) or 'nothing'}, and has {', '.join(unknown[:3]) or 'nothing'} besides")


CLIP_MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"      # of tokenizer.state()
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")            # in OpenAI's files
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
OPENAI_PIXELS = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The file format of timm's and open_clip's hub: 8 bytes length of the header, the header in JSON, the numbers."""
    raw = bytearray(path.read_bytes())
    start, state = 8 + int.from_bytes(raw[:8], "little"), {}
    kinds = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64)
    taken = 0
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            taken += last - first
            if not 0 <= first <= last <= len(raw) - start or taken > len(raw) - start:      # many names for one place
                raise ValueError(f"{name} lies at {first} to {last} of {len(raw) - start} bytes")
            numbers = torch.frombuffer(raw[start + first:start + last], dtype=kinds[entry["dtype"]])
            state[name] = numbers.reshape(entry["shape"])
    return state


def write_safetensors(state: dict[str, Tensor], path: Path):
    """The same the other way; all numbers as float32."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in state.items():
        header[name] = dict(dtype="F32", shape=list(tensor.shape), data_offsets=[at, at + 4 * tensor.numel()])
        at += 4 * tensor.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in state.values():
            file.write(tensor.detach().float().cpu().contiguous().numpy().tobytes())


def read_weights(path: Path) -> dict[str, Tensor]:
    """float32 tensors by name, from a .safetensors or from what torch.save wrote, where they may lie a dict deeper."""
    if not path.is_file():
        raise UserError(f"no file {path}: wanted weights as timm or open_clip publish them")
    try:
        state = (read_safetensors(path) if path.suffix == ".safetensors" else
                 torch.load(path, map_location="cpu", weights_only=True))
        state = next((state[key] for key in ("state_dict", "model") if key in state), state)
        state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state.items()}    # DDP, compile
        return {name: value.float() for name, value in state.items() if name not in NOT_WEIGHTS}
    except Exception as error:                  # of a damaged or foreign file, whatever stumbles over it
        raise UserError(f"cannot read weights from {path}: {one_line(error)}") from None


def read_timm(path: str) -> tuple[str, dict[str, Tensor]]:
    """(dialect, weights under our names and for our pixels) of a timm image tower, without its head.

    How its pixels are normalized, and whether a tower of CLIP's kind has QuickGELU, says the config.json beside it, as
    timm's hub has it; else ImageNet's mean and deviation, and GELU, are assumed.
    """
    file = Path(path).expanduser()
    state = {f"visual.{name}": value for name, value in read_weights(file).items() if not name.startswith("head.")}
    if "visual.patch_embed.proj.weight" not in state:
        raise UserError(f"{path} holds no vision transformer of timm's: it has no patch_embed.proj.weight")
    about = read_json(file.with_name("config.json")) if file.with_name("config.json").is_file() else {}
    try:
        pixels = about.get("pretrained_cfg", {})
        if "mean" not in pixels:
            say(f"note: no config.json beside {path} says how its pixels are normalized: ImageNet's mean and deviation "
                f"are assumed, as most of timm's towers have them (augreg's and CLIP's have not)")
        dialect = ("timm" if "visual.norm_pre.weight" not in state else
                   "openai" if "quickgelu" in about.get("architecture", "") else "clip")
        if dialect == "clip" and "architecture" not in about:
            say(f"note: no config.json beside {path} names its architecture: GELU is assumed, not OpenAI's QuickGELU")
        return dialect, renormalize(state, pixels.get("mean", MEAN), pixels.get("std", STD), "visual.")
    except Exception as error:                  # of a damaged or foreign file, whatever stumbles over it
        raise UserError(f"cannot read weights from {path}: {one_line(error)}") from None


def read_open_clip(path: str) -> tuple[Config, dict[str, Tensor], dict]:
    """(Config, weights under our names and for our pixels, preprocess_cfg) of a folder as open_clip's hub has them:
    open_clip_config.json and one of OPEN_CLIP_FILES, or the file that `path` names."""
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    file = next((folder / name for name in OPEN_CLIP_FILES if (folder / name).is_file()), None)
    file = file if path.is_dir() else path
    if file is None:
        raise UserError(f"no weights in {path}: wanted {' or '.join(OPEN_CLIP_FILES)}")
    if not (folder / "open_clip_config.json").is_file():
        raise UserError(f"no open_clip_config.json beside {file}: write what open_clip.get_model_config(NAME) returns "
                        f"there, as JSON")
    about = read_json(folder / "open_clip_config.json")
    if not isinstance(about, dict):
        raise UserError(f"{folder}/open_clip_config.json should hold an object, not a {type(about).__name__}")
    config = config_from_open_clip(about.get("model_cfg", about))
    try:
        pixels = OPENAI_PIXELS | about.get("preprocess_cfg", {})
        state = from_open_clip(read_weights(file))
        return config, renormalize(state, pixels["mean"], pixels["std"], "visual."), pixels
    except KeyError as error:
        raise UserError(f"{file} holds no CLIP of open_clip's: it has no {error}") from None
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"cannot read weights from {file}: {one_line(error)}") from None


def read_merges(path: str) -> BytePairTokenizer:
    """The vocabulary beside open_clip weights, merges.txt.gz or merges.txt: a header, then a merge a line."""
    folder = Path(path).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    for file, opener in ((folder / "merges.txt.gz", gzip.open), (folder / "merges.txt", open)):
        if file.is_file():
            try:
                with opener(file, "rt", encoding="utf-8") as lines:
                    return BytePairTokenizer.from_state({"merges": lines.read(1 << 24).partition("\n")[2]})
            except (OSError, EOFError, ValueError, zlib.error) as error:
                raise UserError(f"cannot read merges from {file}: {one_line(error)}") from None
    raise UserError(f"no merges.txt beside the weights in {folder}: give CLIP's merges file with --bpe")


FREE_AT_START = {"init", "pos_embed", "pool", "drop_path"}      # in which a run may differ from the weights it takes


def initialize(model: MaskCLIP, spec: str):
    """The start of a run from public weights: timm:FILE, its image tower; open_clip:DIR, all but masked branches."""
    kind, _, path = spec.partition(":")
    if kind == "timm":
        (dialect, state), towers = read_timm(path), ("visual.",)
        theirs = replace(model.config, dialect=dialect)
    else:
        (theirs, state, _), towers = read_open_clip(path), BOTH_HAVE
    for f in fields(Config):
        said, ours = getattr(theirs, f.name), getattr(model.config, f.name)
        if f.metadata["group"].endswith("tower") and f.name not in FREE_AT_START and said != ours:
            raise UserError(f"{path} has {f.name} {said}, this run {ours}: give --{f.name.replace('_', '-')} {said}")
    load_public(model, state, towers, path)


def export(model: MaskCLIP, tokenizer: BytePairTokenizer, kind: str, path: Path):
    """Writes weights for timm (a file) or open_clip (a folder that `open_clip.create_model("local-dir:...")` takes)."""
    c = model.config
    if kind == "timm":
        path.parent.mkdir(parents=True, exist_ok=True)
        is_safetensors = path.suffix == ".safetensors"
        write_safetensors(to_timm(model), path) if is_safetensors else torch.save(to_timm(model), path)
        print(f"timm: VisionTransformer(img_size={c.image_size}, patch_size={c.patch_size}, embed_dim={c.width}, "
              f"depth={c.depth}, num_heads={c.heads}, num_classes=0"
              f"{'' if c.dialect == 'timm' else ', pre_norm=True, CLIP norms of eps 1e-5'}).load_state_dict("
              f"{'safetensors.torch.load_file' if is_safetensors else 'torch.load'}('{path}')); pixels normalized with mean {MEAN}, std {STD}")
        return
    if c.pool not in POOLS:
        raise UserError(f"open_clip has no image tower like this one: --pool {c.pool}; it has cls and mean")
    if not c.causal:
        raise UserError("open_clip has no text tower like this one: with --no-causal ours hides the padding")
    if c.method == "filip":
        raise UserError("open_clip has no model like this one: FILIP compares patches with words")
    path.mkdir(parents=True, exist_ok=True)
    described, merges = open_clip_config(c), tokenizer.state()["merges"]
    with gzip.open(path / "merges.txt.gz", "wt", encoding="utf-8") as file:
        file.write("#version: 0.2\n" + merges)
    note = ""
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
# python model.py: what a preset costs
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Cost:
    """One branch for one image-text pair: parameters, forward FLOPs, and numbers kept for the backward pass."""
    name: str
    parameters: int
    flops: float
    kept: float
    passes: int = 3         # a trained branch: a forward and a backward of twice its FLOPs; without gradient 1


def blocks_cost(depth: int, width: int, tokens: int) -> tuple[float, float]:
    """(FLOPs, numbers kept) of `depth` blocks on `tokens` tokens.

    FLOPs  2 * 12 D^2 for the matrices and 2 * 2 N D for attention, a token.
    kept   16 D a token: block input, norm, q, k, v, attention output, their sum, norm, MLP 4 D before and after GELU;
           and one number a head and token for attention, left out here.
    """
    return depth * tokens * (24 * width ** 2 + 4 * tokens * width), depth * tokens * 16.0 * width


def costs(config: Config, words: int | None = None) -> list[Cost]:
    """The branches that config.method trains, for captions of `words` tokens (default: the full context length)."""
    c, method, L = config, METHODS[config.method], words or config.context_length
    with torch.device("meta"):
        net = build(config, eot=c.vocab_size - 1)

    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())
    N, K = c.grid ** 2, max(1, int(c.grid ** 2 * (1 - c.mask_ratio) + 1e-6))
    M, patch = N - K, 2 * 3 * c.patch_size ** 2 * c.width
    whole, kept = blocks_cost(c.depth, c.width, N + 1)
    whole += N * patch
    flops = whole
    if c.pool == "cls" and c.method not in ("filip", "declip", "defilip"):      # see image_features
        flops -= N * (18 * c.width ** 2 + 4 * (N + 1) * c.width)
        kept -= N * 11.0 * c.width
    rows = [Cost("image tower", count(net.visual, net.image_proj), flops, kept)]
    text_flops, text_kept = blocks_cost(c.text_depth, c.text_width, L)
    rows.append(Cost("text tower", count(net.text, net.text_proj), text_flops, text_kept))
    if c.method in COMPARED:
        return rows + compared_costs(net, rows, L)
    if net.target:
        student, student_kept = blocks_cost(c.depth, c.width, K + 1)
        decoder, decoder_kept = blocks_cost(c.decoder_depth, c.width, N + 1)
        rows.append(Cost("masked student", 0, student + K * patch, student_kept))
        rows.append(Cost("image decoder", count(net.decoder), decoder + 2 * K * c.width ** 2, decoder_kept))
    if net.target == "codes":
        h = 2 * (c.width * c.quantizer_hidden + c.quantizer_hidden ** 2 +
                 (c.quantizer_hidden + c.n_codes) * c.quantizer_bottleneck)
        rows.append(Cost("quantizer", count(net.quantizer), M * h, M * 4.0 * c.quantizer_hidden))
        rows.append(Cost("teacher and its quantizer", 0, whole + M * h, 0, passes=1))
    elif net.target:
        rows.append(Cost("prediction", count(net.predict), 2.0 * M * net.predict.weight.numel(), 0))
    if net.target == "features":
        rows.append(Cost("teacher", 0, whole, 0, passes=1))
    if method["mlm"]:
        decoder, decoder_kept = blocks_cost(c.text_decoder_depth, c.text_width, L)
        chosen = max(1, round(c.word_ratio * (L - 2)))
        rows.append(Cost("masked text", 0, text_flops, text_kept))
        rows.append(Cost("text decoder", count(net.text_decoder),
                         decoder + 2 * chosen * c.text_width * c.vocab_size, decoder_kept))
    return rows


def compared_costs(net: MaskCLIP, towers: list[Cost], L: int) -> list[Cost]:
    """What a compared system adds to the two towers' one image and one caption."""
    c, N, rows = net.config, net.config.grid ** 2, []
    image, text = towers

    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    def head(name, module, times, width):                   # matrices; four numbers of each of three layers are kept
        rows.append(Cost(name, count(module), times * 2.0 * sum(p.numel() for p in module.parameters() if p.ndim == 2),
                         times * 12.0 * width))
    if c.method == "slip":
        rows.append(Cost("two more views", 0, 2 * image.flops, 2 * image.kept))
        head("SimCLR head", net.head, 2, c.slip_hidden)
    if isinstance(net, DeCLIP):
        chosen = max(1, round(c.word_ratio * (L - 2)))
        rows.append(Cost("second view", 0, image.flops, image.kept))
        rows.append(Cost("second caption", 0, text.flops, text.kept))
        rows.append(Cost("word classifier", count(net.text_decoder), 2.0 * chosen * net.text_decoder.weight.numel(),
                         chosen * c.vocab_size))
        head("SimSiam heads", nn.ModuleList([net.projector, net.predictor]), 2, c.simsiam_hidden)
        rows.append(Cost("nearest texts", 0, 2 * 2.0 * net.queue.numel(), 0, passes=1))
    if c.method in ("filip", "defilip"):
        views, combinations, own = 1, 1, 0
        if isinstance(net, DeFILIP):
            views, combinations, own = 2, 4, 1 + count(net.patch_proj, net.word_proj)
        project = views * 2 * c.token_dim * (N * c.width + L * c.text_width)
        # L_I compares all our patches with words of the batch, L_T all our words with patches; both once more backward
        words, patches = (min(c.token_top_k or x, x) for x in (L, N))
        compare = combinations * 2.0 * c.token_dim * c.batch_size * (N * words + L * patches)
        rows.append(Cost("tokens in the joint space", own, project, views * (N + L) * 3.0 * c.token_dim))
        rows.append(Cost(f"similarity, batch {c.batch_size}", 0, compare, 0, passes=4))
    return rows


def step_flops(config: Config, words: int | None = None) -> float:
    """Useful FLOPs of a pair in a training step: nothing is counted twice, optimizer and averages not at all."""
    return sum(r.passes * r.flops for r in costs(config, words))


def step_memory(config: Config, pairs: int, words: int | None = None, bf16: bool = False) -> dict[str, float]:
    """Bytes that a step needs on a device, by what they are for; `pairs` of a micro-batch are there at a time.

    states       4 bytes each of weight, gradient and Adam's two averages a parameter, and 4 a parameter of the teacher;
                 in bf16 autocast's 2 bytes a weight besides
    activations  what `costs` says is kept, 4 bytes a number.  In bf16 2.25: of a block's 16 D numbers a token its
                 input and the sum after attention stay in 4 bytes, the others take 2
    logits       of codes or words, LOGIT_ROWS rows at most: logits, their softmax, its gradient; and the gradient of
                 the table they come from twice, a chunk's and the sum
    """
    c, rows = config, {r.name: r for r in costs(config, words)}
    P = sum(r.parameters for r in rows.values())
    averaged = sum(rows[name].parameters for name in ("image tower", "quantizer") if name in rows)
    has_teacher = any(name.startswith("teacher") for name in rows)
    places = c.grid ** 2 - max(1, int(c.grid ** 2 * (1 - c.mask_ratio) + 1e-6))
    chosen = max(1, round(c.word_ratio * ((words or c.context_length) - 2)))
    codes = min(LOGIT_ROWS, pairs * places) * c.n_codes + 2 / 3 * c.n_codes * c.quantizer_bottleneck
    vocabulary = min(LOGIT_ROWS, pairs * chosen) * c.vocab_size + 2 / 3 * c.vocab_size * c.text_width
    logits = max(codes * ("quantizer" in rows), vocabulary * METHODS[c.method]["mlm"])
    return dict(states=P * (18 if bf16 else 16) + 4 * averaged * has_teacher,
                activations=pairs * sum(r.kept for r in rows.values()) * (2.25 if bf16 else 4), logits=12.0 * logits)


def step_traffic(config: Config, world: int) -> dict[str, float]:
    """Bytes that a process hands to others in a step, W = world of them, B pairs in all, E numbers an embedding.

    gradients  all-reduce of 4 bytes a parameter, done while the backward pass goes on
    features   both embeddings, all-gathered; and their gradients, all-reduced: B * E * 4 bytes of each, and each way
    A ring hands on (W - 1) / W of what is gathered, and twice that of what is reduced.
    """
    share = (world - 1) / world
    P, embeddings = sum(r.parameters for r in costs(config)), 2 * 4.0 * config.batch_size * config.embed_dim
    return dict(gradients=2 * share * 4 * P, features=share * embeddings + 2 * share * embeddings)


def describe(config: Config, words: int | None = None):
    """Prints what a pair costs, branch by branch."""
    print(f"{config.method}: {config.image_size} px, patches of {config.patch_size} px, "
          f"captions of {words or config.context_length} tokens; a pair costs")
    print(f"{'branch':28}{'parameters':>14}{'forward GFLOPs':>17}{'step GFLOPs':>14}{'kept, MB in fp32':>19}")
    rows = costs(config, words)
    for r in rows:
        print(f"{r.name:28}{r.parameters:>14,}{r.flops / 1e9:>17.3f}{r.passes * r.flops / 1e9:>14.3f}"
              f"{r.kept * 4 / 1e6:>19.1f}")
    print(f"{'all':28}{sum(r.parameters for r in rows) + 1:>14,}{sum(r.flops for r in rows) / 1e9:>17.3f}"
          f"{sum(r.passes * r.flops for r in rows) / 1e9:>14.3f}{sum(r.kept for r in rows) * 4 / 1e6:>19.1f}")
    clip = sum(r.passes * r.flops for r in rows[:2])
    print(f"a step's FLOPs are {sum(r.passes * r.flops for r in rows) / clip:.2f} times those of clip")


def main(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cost = cli.add_argument_group("cost of a preset, or of CHECKPOINT's model: what is printed with no other option")
    cost.add_argument("--preset", default="vit-b16-yfcc15m", choices=PRESETS, help="default: %(default)s; with "
                      "--import timm:FILE the size of the tower, and the text tower that stays untrained")
    cost.add_argument("--method", default="maskclip", choices=METHODS, help="default: %(default)s")
    cost.add_argument("--words", type=at_least(3), help="tokens a caption (default: the context length)")
    out = cli.add_argument_group("our weights for others")
    out.add_argument("checkpoint", nargs="?", help="what train.py wrote, as runs/pocket/last.pt")
    out.add_argument("--export", nargs=2, metavar=("timm|open_clip", "PATH"),
                     help="timm: the image tower's state dict, to the file PATH, a .pth or a .safetensors; open_clip: "
                          "config, weights and merges, to the folder PATH")
    into = cli.add_argument_group("public weights for us")
    into.add_argument("--import", dest="source", metavar="SPEC", help="timm:FILE, an image tower; open_clip:DIR, a "
                      "folder with open_clip_config.json, weights and merges.txt, as each repository on the hub has")
    into.add_argument("--out", metavar="FILE", help="the checkpoint to write, which all evaluation scripts read")
    into.add_argument("--bpe", help="CLIP's merges file, where there is no merges.txt beside the weights")
    o = cli.parse_args(argv)
    if not o.source and (o.out or o.bpe) or o.source and (o.export or o.checkpoint):
        raise UserError("--out and --bpe belong to --import, which takes neither a CHECKPOINT nor --export beside it")
    import train                                            # which builds on this file, and knows checkpoints
    if not o.export and not o.source:
        config = train.load_checkpoint(o.checkpoint)[2] if o.checkpoint else preset_for(o.preset, o.method)
        return describe(config, o.words)
    if o.export:
        if not o.checkpoint or o.export[0] not in ("timm", "open_clip"):
            raise UserError("to export: python model.py CHECKPOINT --export timm FILE, or --export open_clip DIR")
        model, tokenizer, _ = train.load_checkpoint(o.checkpoint)
        try:
            return export(model, tokenizer, o.export[0], Path(o.export[1]))
        except (OSError, RuntimeError) as error:                # torch.save's are RuntimeErrors
            raise UserError(f"cannot write {o.export[0]}'s weights to {o.export[1]}: {one_line(error)}") from None
    kind, _, path = o.source.partition(":")
    if not o.out or kind not in ("timm", "open_clip"):
        raise UserError("to import: python model.py --import timm:FILE --out CHECKPOINT, or --import open_clip:DIR")
    if kind == "timm":
        (dialect, state), towers = read_timm(path), ("visual.",)
        config, tokenizer = replace(PRESETS[o.preset], method="clip", dialect=dialect), BytePairTokenizer([])
        note = f"an image tower of preset {o.preset}, dialect {dialect}; its text tower is untrained"
    else:
        (config, state, pixels), towers = read_open_clip(path), BOTH_HAVE
        tokenizer = BytePairTokenizer.from_file(o.bpe) if o.bpe else read_merges(path)
        note = f"dialect {config.dialect}, {config.image_size} px, {tokenizer.vocab_size} tokens"
        if pixels.get("resize_mode", "shortest") != "shortest":
            note += f"; it was trained with images resized by {pixels['resize_mode']}: evaluate with --squash"
    model = MaskCLIP(config, tokenizer.eot)
    load_public(model, state, towers, path)
    try:
        Path(o.out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{o.out} cannot be written: {one_line(error)}") from None
    if not train.save_checkpoint(o.out, model, tokenizer, config):
        raise UserError(f"{o.out} could not be written")
    print(f"{o.out}: {note}.  Next: python eval_{'linear' if kind == 'timm' else 'zeroshot'}.py {o.out}")


if __name__ == "__main__":
    import train
    train.run(main)
