"""Every training loss, as a pure function of tensors, in the order the paper builds them up.

    L_I, L_T   contrastive_loss        image to text, text to image, over the pairs of all processes
    L_Dist     distillation_loss       the student's codes of hidden patches against the teacher's
    L_MLM      masked_language_loss    masked words of the caption, from the text tower alone
    L          total_loss              L_I + L_T + lambda * L_Dist + beta * L_MLM                          (Eq. 8)

    pixel_loss, feature_loss           what takes the place of L_Dist in the first rows of supplement Table 2
    simclr_loss, filip_similarity, token_contrastive_loss, simsiam_loss, unicl_loss        the compared systems

Letters: B pairs on this process, W processes, N patches, M hidden patches, L tokens, V vocabulary, C codes,
E embedding.
With several processes each loss is this process's share: the mean of the shares over the processes (which is what
DistributedDataParallel makes of their gradients) is the loss of the joined batch, and so is its gradient.

Check the formulas:  python -m pytest tests/test_losses.py
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Gather(torch.autograd.Function):
    """(B, ...) on each of W processes -> (W*B, ...) on all, in rank order; backward sums what every process asks for.

    Without that sum each tower would be trained as the row of the similarity matrix and never as its column, and the
    loss would still fall.
    """
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)                                                 # (W*B, ...)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]               # (B, ...), the rows that are ours


def fp32(x: Tensor) -> Tensor:
    """At least float32: softmax and sums lose too much in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(x: Tensor) -> Tensor:
    """(B, ...) -> (W*B, ...), with gradient; x itself on one process."""
    return Gather.apply(x) if world_size() > 1 else x


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes, without gradient."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x / world_size()


def own_columns(B: int, device) -> Tensor:
    """(B,) column of each of our rows' true partner among the W*B gathered ones."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return rank * B + torch.arange(B, device=device)


def contrastive_loss(image_features: Tensor, text_features: Tensor,
                     logit_scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """L_I and L_T: cross-entropy of this process's B rows against the W*B columns of all processes.

        L_I = -1/B sum_i log( exp(s I_i.T_i) / sum_j exp(s I_i.T_j) ),    L_T the same with I and T exchanged

    image_features, text_features  (B, E), unit length.    logit_scale  s, the factor itself and not its logarithm.
    Memory is B x W*B, never (W*B) x (W*B).
    """
    target = own_columns(len(image_features), image_features.device)                           # (B,)
    logits_i = (logit_scale * image_features) @ gather(text_features).T                        # (B, W*B)
    logits_t = (logit_scale * text_features) @ gather(image_features).T                        # (B, W*B)
    return F.cross_entropy(fp32(logits_i), target), F.cross_entropy(fp32(logits_t), target)


def soft_codes(teacher: Tensor, temp_t: float, center: Tensor | float = 0.0) -> Tensor:
    """The teacher's logits (..., C), centered and sharpened, as a distribution over codes (..., C); no gradient."""
    return ((fp32(teacher.detach()) - center) / temp_t).softmax(dim=-1)


def distillation_loss(student: Tensor, teacher: Tensor, hidden: Tensor | None = None, temp_s: float = 0.1,
                      temp_t: float = 0.04, center: Tensor | float = 0.0) -> Tensor:
    """L_Dist: cross-entropy between code distributions, averaged over hidden patches.

        L_Dist = -1/M sum_(hidden n) sum_c  softmax((t_n - center) / temp_t)_c  log softmax(s_n / temp_s)_c

    student, teacher  (B, N, C) logits over the C codes; no gradient reaches the teacher
    hidden            (B, N) bool, True where the student saw nothing; None when all rows given are hidden ones
    center            (C,) running mean of the teacher's logits: keeps one code from winning everywhere
    """
    target = soft_codes(teacher, temp_t, center)                                               # (B, N, C)
    per_patch = -(target * (fp32(student) / temp_s).log_softmax(dim=-1)).sum(dim=-1)         # (B, N)
    return per_patch.mean() if hidden is None else per_patch[hidden].mean()


def patchify(images: Tensor, p: int) -> Tensor:
    """(B, 3, height, width) -> (B, N, 3*p*p): N = (height/p) * (width/p) patches, row by row."""
    B, _, height, width = images.shape
    x = images.reshape(B, 3, height // p, p, width // p, p)     # (B, 3, rows, p, cols, p)
    x = x.permute(0, 2, 4, 1, 3, 5)                             # (B, rows, cols, 3, p, p)
    return x.reshape(B, -1, 3 * p * p)                          # (B, N, 3*p*p)


def pixel_loss(prediction: Tensor, patches: Tensor, hidden: Tensor | None = None) -> Tensor:
    """MAE's loss: squared error to the pixels of hidden patches, each patch normalized to mean 0 and variance 1.

    prediction, patches  (B, N, 3*p*p), patches as from `patchify`.    hidden  (B, N) bool, or None: all are hidden
    """
    mean, var = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    target = (patches - mean) / (var + 1e-6).sqrt()                                            # (B, N, 3*p*p)
    per_patch = (fp32(prediction) - target).square().mean(dim=-1)                            # (B, N)
    return per_patch.mean() if hidden is None else per_patch[hidden].mean()


def feature_loss(prediction: Tensor, teacher: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Squared error to the teacher's patch features, both sides layer-normalized without affine (as BootMAE).

    prediction, teacher  (B, N, D); no gradient reaches the teacher.    hidden  (B, N) bool, or None: all are hidden
    """
    D = prediction.shape[-1:]
    error = F.layer_norm(fp32(prediction), D) - F.layer_norm(fp32(teacher.detach()), D)
    per_patch = error.square().mean(dim=-1)                                                    # (B, N)
    return per_patch.mean() if hidden is None else per_patch[hidden].mean()


def masked_language_loss(logits: Tensor, tokens: Tensor, chosen: Tensor | None = None,
                         normalizer: Tensor | None = None) -> Tensor:
    """L_MLM: cross-entropy of the original words at the chosen places, from the caption with those places corrupted.

        L_MLM = -1/n sum_(chosen l) log softmax(logits_l)[tokens_l]

    logits      (B, L, V), with tokens (B, L) the clean ids and chosen (B, L) bool; or the chosen rows, (n, V) and (n,)
    normalizer  n; default our own number of chosen words.  That number differs from process to process, so for the
                joined batch's mean every process divides by the mean of n over the processes
    """
    if chosen is not None:
        logits, tokens = logits[chosen], tokens[chosen]                                        # (n, V), (n,)
    n = max(len(tokens), 1) if normalizer is None else normalizer.clamp(min=1)
    return F.cross_entropy(fp32(logits), tokens, reduction="sum") / n


def total_loss(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Eq. 8: the weighted sum of the named terms; a term without a weight of its own counts once."""
    return sum(weights.get(name, 1.0) * term for name, term in terms.items())


class SumInChunks(torch.autograd.Function):
    """See sum_in_chunks."""
    @staticmethod
    def forward(ctx, fn, rows, x, other, *shared):
        total, x_grad, shared_grad = 0.0, torch.empty_like(x), [torch.zeros_like(p) for p in shared]
        for start in range(0, len(x), rows):
            with torch.enable_grad():
                part = x[start:start + rows].detach().requires_grad_()
                leaves = [p.detach().requires_grad_() for p in shared]
                loss = fn(part, other[start:start + rows], *leaves)
            x_grad[start:start + rows], *grads = torch.autograd.grad(loss, [part, *leaves])
            for old, new in zip(shared_grad, grads):
                old += new
            total = total + loss.detach()
        ctx.save_for_backward(x_grad, *shared_grad)
        return total if len(x) else x.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        x_grad, *shared_grad = ctx.saved_tensors
        return None, None, grad * x_grad, None, *[grad * g for g in shared_grad]


def sum_in_chunks(fn, rows: int, x: Tensor, other: Tensor, *shared: Tensor) -> Tensor:
    """The sum of fn(x[chunk], other[chunk], *shared) over chunks of `rows` rows, with gradient to x and shared.

    Each chunk's gradient is taken as soon as its loss is known, so the wide logits inside fn exist for one chunk at a
    time, and none is computed twice.  `other` gets no gradient.
    """
    if torch.is_grad_enabled():
        return SumInChunks.apply(fn, rows, x, other, *shared)
    parts = [fn(x[i:i + rows], other[i:i + rows], *shared) for i in range(0, len(x), rows)]
    return sum(parts, x.new_zeros(()))
