"""Every training loss, as a pure function of tensors, in the order the paper builds them up.

    L_I, L_T   contrastive_loss        image to text, text to image, over the pairs of all processes
    L_Dist     distillation_loss       the student's codes of hidden patches against the teacher's
    L_MLM      masked_language_loss    masked words of the caption, from the text tower alone
    L          L_I + L_T + lambda * L_Dist + beta * L_MLM     (Eq. 8, in model.MaskCLIP.total_loss)

    pixel_loss                         stands for L_Dist in supplement Table 2's row CLIP+MAE
    feature_loss                       stands for L_Dist with --target features

    simclr_loss                                  the compared systems:  SLIP
    filip_similarity, token_contrastive_loss                            FILIP, DeFILIP
    simsiam_loss                                                        DeCLIP, DeFILIP
    unicl_loss                                                          UniCL, for labeled data

Letters: B pairs on this process, W processes, N patches, M hidden patches, L tokens, V vocabulary, C codes, D width,
E embedding, n rows of whatever a loss is a mean over.
With several processes each loss is this process's share: the mean of the shares is the loss of the joined batch, and
the mean of their gradients, which DistributedDataParallel takes, is its gradient.

Check the formulas:  python -m pytest tests/test_losses.py
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, half precision, wide logits: what the losses stand on
# ---------------------------------------------------------------------------------------------------------------------

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


def fp32(x: Tensor) -> Tensor:
    """At least float32: softmax and sums lose too much in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


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
            shared_grad = [old.add_(new) for old, new in zip(shared_grad, grads)] if start else grads
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
    return SumInChunks.apply(fn, rows, x, other, *shared)


# ---------------------------------------------------------------------------------------------------------------------
# MaskCLIP's terms
# ---------------------------------------------------------------------------------------------------------------------

CONTRAST_LOGITS = 1 << 25       # logits that exist at once, 128 MiB; with fewer, adding up gradients takes time
LOGIT_ROWS = 4096               # rows of code or word logits that exist at once


def contrastive_loss(image_features: Tensor, text_features: Tensor,
                     logit_scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """L_I and L_T: cross-entropy of this process's B rows against the W*B columns of all processes.

        L_I = -1/B sum_i log( exp(s I_i.T_i) / sum_j exp(s I_i.T_j) ),    L_T the same with I and T exchanged

    image_features, text_features  (B, E), unit length.    logit_scale  s, the factor itself and not its logarithm.
    """
    B = len(image_features)
    scale = torch.as_tensor(logit_scale, dtype=image_features.dtype, device=image_features.device)

    def one_way(rows, partner, columns, scale):
        return F.cross_entropy(fp32((scale * rows) @ columns.T), partner, reduction="sum")     # logits (rows, W*B)

    def mean(rows, columns):
        at_once = max(1, CONTRAST_LOGITS // len(columns))
        return sum_in_chunks(one_way, at_once, rows, own_columns(B, rows.device), columns, scale) / B
    return mean(image_features, gather(text_features)), mean(text_features, gather(image_features))


def soft_codes(teacher: Tensor, temp_t: float, center: Tensor | float = 0.0) -> Tensor:
    """The teacher's logits (..., C), centered and sharpened, as a distribution over codes (..., C); no gradient."""
    return ((fp32(teacher.detach()) - center) / temp_t).softmax(dim=-1)


def distillation_loss(student: Tensor, teacher: Tensor, temp_s: float = 0.1, temp_t: float = 0.04,
                      center: Tensor | float = 0.0) -> Tensor:
    """L_Dist: cross-entropy between the code distributions of hidden patches, averaged over them.

        L_Dist = -1/n sum_(hidden i) sum_c  softmax((t_i - center) / temp_t)_c  log softmax(s_i / temp_s)_c

    student, teacher  (..., C) logits over the C codes at hidden patches; no gradient reaches the teacher
    center            (C,) running mean of the teacher's logits: keeps one code from winning everywhere
    """
    q = soft_codes(teacher, temp_t, center)                                                     # (..., C)
    return -(q * (fp32(student) / temp_s).log_softmax(dim=-1)).sum(dim=-1).mean()


def distillation_in_chunks(student: Tensor, codes: Tensor, teacher: Tensor, teacher_codes: Tensor, temp_s: float,
                           temp_t: float, center: Tensor) -> Tensor:
    """L_Dist as training computes it: logits are cosines of features with codes, of LOGIT_ROWS patches at a time.

        L_Dist = distillation_loss(student @ codes.T, teacher @ teacher_codes.T, temp_s, temp_t, center)

    student, teacher  (n, bottleneck) features of hidden patches, codes, teacher_codes (C, bottleneck); unit length
    """
    def sum_of(student, teacher, codes):
        with torch.autocast(student.device.type, enabled=False):    # divided by 0.04, rounding to bf16 would show
            s, t = student @ codes.T, teacher @ teacher_codes.T                                 # (rows, C)
            return len(s) * distillation_loss(s, t, temp_s, temp_t, center)
    return sum_in_chunks(sum_of, LOGIT_ROWS, student, teacher, codes) / len(student)


def patchify(images: Tensor, p: int) -> Tensor:
    """(B, 3, height, width) -> (B, N, 3*p*p): N = (height/p) * (width/p) patches, row by row."""
    B, _, height, width = images.shape
    x = images.reshape(B, 3, height // p, p, width // p, p)     # (B, 3, rows, p, cols, p)
    x = x.permute(0, 2, 4, 1, 3, 5)                             # (B, rows, cols, 3, p, p)
    return x.reshape(B, -1, 3 * p * p)                          # (B, N, 3*p*p)


def normalize_patches(patches: Tensor) -> Tensor:
    """(..., 3*p*p) -> the same, each patch with mean 0 and variance 1, as MAE predicts pixels."""
    mean, var = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


def pixel_loss(prediction: Tensor, patches: Tensor) -> Tensor:
    """MAE's loss: squared error to the normalized pixels of hidden patches, both (B, M, 3*p*p)."""
    return (fp32(prediction) - normalize_patches(patches)).square().mean()


def feature_loss(prediction: Tensor, teacher: Tensor) -> Tensor:
    """Squared error to the teacher's features of hidden patches, both sides layer-normalized without affine (BootMAE).

    prediction, teacher  (B, M, D); no gradient reaches the teacher
    """
    D = prediction.shape[-1:]
    return (F.layer_norm(fp32(prediction), D) - F.layer_norm(fp32(teacher.detach()), D)).square().mean()


def masked_language_loss(logits: Tensor, words: Tensor, normalizer: Tensor | None = None) -> Tensor:
    """L_MLM: cross-entropy of the original words at the chosen places, from the caption with those places corrupted.

        L_MLM = -1/n sum_(chosen l) log softmax(logits_l)[words_l]

    logits      (n, V) at the chosen places; words (n,) what stood there
    normalizer  n; default our own number of chosen words.  That number differs from process to process, so for the
                joined batch's mean every process divides by the mean of n over the processes
    """
    n = max(len(words), 1) if normalizer is None else normalizer.clamp(min=1)
    return F.cross_entropy(fp32(logits), words, reduction="sum") / n


def masked_language_in_chunks(x: Tensor, words: Tensor, table: Tensor, bias: Tensor, normalizer: Tensor) -> Tensor:
    """L_MLM as training computes it: masked_language_loss(x @ table.T + bias, words), of LOGIT_ROWS words at a time.

    x (n, D) features at the chosen places, table (V, D), bias (V,)
    """
    def sum_of(x, words, table, bias):
        with torch.autocast(x.device.type, enabled=False):          # its gradient is taken before any loss is scaled
            return masked_language_loss(F.linear(fp32(x), table, bias), words, normalizer)
    return sum_in_chunks(sum_of, LOGIT_ROWS, x, words, table, bias)


# ---------------------------------------------------------------------------------------------------------------------
# The compared systems
# ---------------------------------------------------------------------------------------------------------------------

def simclr_loss(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    """SLIP's NT-Xent: of all other views of all processes, which one shows the same image?

        l(a_i) = -log( exp(a_i.b_i / t) / (sum_j exp(a_i.b_j / t) + sum_(j != i) exp(a_i.a_j / t)) ),  mean of all 2B

    a, b  (B, E) two views of the same images, unit length
    """
    partner = own_columns(len(a), a.device)                                                    # (B,)
    all_a, all_b = gather(a), gather(b)                                                        # (W*B, E)

    def one_way(x, others, rivals):
        rivals = (x @ rivals.T).scatter(1, partner[:, None], -torch.inf)                       # (B, W*B), not itself
        return F.cross_entropy(fp32(torch.cat([x @ others.T, rivals], dim=1) / temperature), partner)
    return (one_way(a, all_b, all_a) + one_way(b, all_a, all_b)) / 2


def simsiam_loss(predicted_a: Tensor, predicted_b: Tensor, projected_a: Tensor, projected_b: Tensor) -> Tensor:
    """DeCLIP's image term: from one view predict the other's projection, which gets no gradient; all (B, E).

        -1/2 mean_i( cos(predicted_a, projected_b) + cos(predicted_b, projected_a) )
    """
    return -(F.cosine_similarity(predicted_a, projected_b.detach()).mean() +
             F.cosine_similarity(predicted_b, projected_a.detach()).mean()) / 2


TOKEN_SCORES = 1 << 24      # cosines of a patch with a word that exist at once, 64 MiB


def filip_similarity(image_tokens: Tensor, text_tokens: Tensor, is_word: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """FILIP's token-wise late interaction of I images with T texts: both (I, T).

        image to text    1/N sum_n max_(word l) p_n.w_l            each patch looks for its word
        text to image    1/n sum_(word l) max_n p_n.w_l            each of n words looks for its patch

    image_tokens (I, N, E), text_tokens (T, L, E), unit length; is_word (T, L) bool, default: rows that are not zero.
    The I x T x N x L cosines exist for a few images at a time, and are computed again for the gradient.
    """
    is_word = text_tokens.detach().any(dim=-1) if is_word is None else is_word
    words = text_tokens.flatten(0, 1)                                                          # (T*L, E)

    def scores(patches):                                                                       # (i, N, E)
        cosine = patches.flatten(0, 1) @ words.T                                               # (i*N, T*L)
        cosine = cosine.unflatten(0, patches.shape[:2]).unflatten(2, is_word.shape)            # (i, N, T, L)
        to_text = cosine.masked_fill(~is_word, -2.0).amax(dim=3).mean(dim=1)                   # (i, T)
        to_image = (cosine.amax(dim=1) * is_word).sum(dim=2)                                   # (i, T)
        return to_text, to_image / is_word.sum(dim=1).clamp(min=1)

    at_once = max(1, TOKEN_SCORES // max(1, image_tokens.shape[1] * len(words)))
    parts = [checkpoint(scores, patches, use_reentrant=False, preserve_rng_state=False)
             for patches in image_tokens.split(at_once)]
    to_text, to_image = zip(*parts)
    return torch.cat(to_text), torch.cat(to_image)


def similarity(images: Tensor, texts: Tensor, text_queries: bool = False) -> Tensor:
    """What ranks texts for an image, or with text_queries images for a text: (I, T).

    (I, E), (T, E) unit length: their cosines, either way.  (I, N, E), (T, L, E): FILIP's score of that direction.
    """
    return filip_similarity(images, texts)[int(text_queries)] if images.ndim == 3 else images @ texts.T


def top_tokens(image_tokens: Tensor, text_tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(B, N, E), (B, L, E) -> (B, k, E) each: the k tokens whose cosines with all of the partner's sum to the most."""
    cosine = image_tokens @ text_tokens.transpose(1, 2)                                        # (B, N, L)
    patches = cosine.sum(dim=2).topk(min(k, cosine.shape[1])).indices                          # (B, k)
    no_word = ~text_tokens.detach().any(dim=-1)                                                # (B, L)
    words = cosine.sum(dim=1).masked_fill(no_word, -torch.inf).topk(min(k, cosine.shape[2])).indices
    return (torch.take_along_dim(image_tokens, patches[..., None], dim=1),
            torch.take_along_dim(text_tokens, words[..., None], dim=1))


def token_contrastive_loss(image_tokens: Tensor, text_tokens: Tensor, logit_scale: Tensor | float,
                           top_k: int = 0) -> tuple[Tensor, Tensor]:
    """L_I and L_T as in contrastive_loss, from FILIP's similarity: this process's B rows against the W*B columns.

    image_tokens (B, N, E), text_tokens (B, L, E), unit length; a row of zeros is no word, and L may differ between
    processes.  top_k: only so many tokens of the columns are kept, as DeCLIP's benchmark does.
    """
    if world_size() > 1:
        longest = torch.tensor(text_tokens.shape[1], device=text_tokens.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        text_tokens = F.pad(text_tokens, (0, 0, 0, int(longest) - text_tokens.shape[1]))       # (B, longest L, E)
    patches, words = top_tokens(image_tokens, text_tokens, top_k) if top_k else (image_tokens, text_tokens)
    logits_i = logit_scale * filip_similarity(image_tokens, gather(words))[0]                  # (B, W*B)
    logits_t = logit_scale * filip_similarity(gather(patches), text_tokens)[1].T               # (B, W*B)
    partner = own_columns(len(image_tokens), image_tokens.device)                              # (B,)
    return F.cross_entropy(logits_i, partner), F.cross_entropy(logits_t, partner)


def unicl_loss(image_features: Tensor, text_features: Tensor, labels: Tensor,
               logit_scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """UniCL: contrastive_loss in which all pairs of one label are right, each with an equal share.

        L_I = -1/B sum_i 1/|P_i| sum_(k in P_i) log( exp(s I_i.T_k) / sum_j exp(s I_i.T_j) ),    P_i = {k: y_k = y_i}

    labels (B,), the rest as there; with all labels distinct it is that loss.
    """
    is_right = labels[:, None] == gather(labels)                                               # (B, W*B)

    def one_way(rows, columns):
        logp = fp32((logit_scale * rows) @ gather(columns).T).log_softmax(dim=1)               # (B, W*B)
        return -((logp * is_right).sum(dim=1) / is_right.sum(dim=1)).mean()
    return one_way(image_features, text_features), one_way(text_features, image_features)
