"""The losses: pure functions of a batch's similarity matrix.

`similarities[i, j]` is S_ij, the similarity of image i and caption j of a batch of B pairs;
the pairs sit on the diagonal. HAL is Liu et al., AAAI 2020, section 3; the sum-margin and
max-margin losses are those of VSE++ (Faghri et al., BMVC 2018). Deviations from the released
code are listed in docs/deviations.md.
"""

from argparse import Namespace

import torch
from torch import nn

from device import to_device
from memory_bank import MemoryBank, global_weights


def cosine_sim(im, s):
    """(n, D) and (m, D) L2-normalised embeddings -> (n, m) cosine similarities."""
    return im @ s.t()


def order_sim(im, s):
    """(n, D) and (m, D) embeddings -> (n, m) order similarities -||max(0, s_j - im_i)||, never positive.

    Vendrov et al., ICLR 2016. Where nothing is violated the gradient is zero.
    """
    return -torch.linalg.vector_norm((s.unsqueeze(0) - im.unsqueeze(1)).clamp(min=0), dim=2)


SIMILARITIES = {"cosine": cosine_sim, "order": order_sim}


def margin_costs(similarities, margin):
    """Hinge costs of every wrong pair: [margin + S_ij - S_ii]+ and [margin + S_ij - S_jj]+, each (B, B).

    The first compares image i's captions, the second caption j's images; the diagonals are 0.
    """
    pairs = similarities.diagonal()
    own = torch.eye(len(similarities), dtype=torch.bool, device=similarities.device)
    caption_costs = (margin + similarities - pairs.unsqueeze(1)).clamp(min=0).masked_fill(own, 0)
    image_costs = (margin + similarities - pairs.unsqueeze(0)).clamp(min=0).masked_fill(own, 0)
    return caption_costs, image_costs


def sum_margin_loss(similarities, margin=0.2):
    """Sum over all wrong pairs of the hinge costs (a sum over the batch, not a mean)."""
    caption_costs, image_costs = margin_costs(similarities, margin)
    return caption_costs.sum() + image_costs.sum()


def max_margin_loss(similarities, margin=0.2):
    """VSE++: only each image's hardest caption and each caption's hardest image."""
    caption_costs, image_costs = margin_costs(similarities, margin)
    return caption_costs.amax(1).sum() + image_costs.amax(0).sum()


def hal_loss(similarities, alpha=30.0, epsilon=0.3, weights=None):
    """HAL: 1/B sum_i [ log(1 + sum_j E_ji)/a + log(1 + sum_j E_ij)/a - log(1 + relu(w_i S_ii)) ].

    E_ij = exp(a W_ij (S_ij - e)), with S_ii taken as 0. weights: (W (B, B), w (B,)) from
    `memory_bank.global_weights`; None is the local loss, W = w = 1.
    A pair with S_ii <= 0 has no positive gradient, as in the released code.
    """
    pair_weights, positive_weights = (1.0, 1.0) if weights is None else weights
    pairs = similarities.diagonal()
    own = torch.eye(len(similarities), dtype=torch.bool, device=similarities.device)
    # The diagonal is zeroed before exp, not left out: each sum keeps its exp(-a e), or 1 where W_ii = 0.
    exponents = alpha * pair_weights * (similarities.masked_fill(own, 0) - epsilon)
    hubness = (_log_one_plus_sum_exp(exponents, 0) + _log_one_plus_sum_exp(exponents, 1)) / alpha
    return (hubness - (1 + (positive_weights * pairs).relu()).log()).mean()


def _log_one_plus_sum_exp(exponents, dim):
    """log(1 + sum exp) that never overflows, and rounds like the plain formula where that does not either."""
    largest = exponents.detach().amax(dim, keepdim=True).clamp(min=0)
    shifted = (exponents - largest).exp().sum(dim)
    return (shifted + (-largest).exp().squeeze(dim)).log() + largest.squeeze(dim)


def loss_kind(opt):
    """Which loss the options name: "max", "sum" or "hal"; `max_violation` wins over `sum_violation`."""
    return "max" if opt.max_violation else "sum" if opt.sum_violation else "hal"


def _options(opt):
    """HAL's call: the options are at hand."""
    return opt


def _margin_options(margin=0, measure=False, max_violation=False):
    """VSE++'s call: the options of a margin loss."""
    return Namespace(margin=margin, measure=measure or "cosine", max_violation=max_violation,
                     sum_violation=not max_violation)


class ContrastiveLoss(nn.Module):
    """The loss that the options name, with the calls of the VSE++ family.

    `ContrastiveLoss(opt)`, HAL's: opt has measure, margin, max_violation, sum_violation, local_alpha, local_ep and,
    for the memory bank, global_alpha, global_beta, global_ep_nega, mb_k. (global_ep_posi cancels in the weights.)
    `ContrastiveLoss(margin=0, measure=False, max_violation=False)`, VSE++'s, by place or by name: the sum-margin or
    max-margin loss, never HAL; measure "order" or, also where it is False, "cosine".
    """

    def __init__(self, *arguments, **named):
        super().__init__()
        by_options = "opt" in named or arguments and not isinstance(arguments[0], (int, float))
        self.opt = (_options if by_options else _margin_options)(*arguments, **named)
        self.similarity = SIMILARITIES[self.opt.measure]

    def forward(self, im, s, mb_img=None, mb_cap=None, mb_ind=None, indices=None):
        """(B, D) image and caption embeddings -> the scalar loss.

        mb_img, mb_cap: (n, D) and mb_ind: (n,), the memory bank; indices: (B,) the batch's caption
        indices, whose bank entries are left out. Without a bank the local loss is taken.
        """
        return self.of_similarities(self.similarity(im, s), im, s, mb_img, mb_cap, mb_ind, indices)

    def of_similarities(self, similarities, im, s, mb_img=None, mb_cap=None, mb_ind=None, indices=None):
        """The same, where the similarities (B, B) of im and s are at hand."""
        opt, kind = self.opt, loss_kind(self.opt)
        if kind != "hal":
            return {"max": max_margin_loss, "sum": sum_margin_loss}[kind](similarities, opt.margin)
        weights = None
        if mb_img is not None and len(mb_img):
            mb_ind, indices = (to_device(torch.as_tensor(x), im.device) for x in (mb_ind, indices))
            bank = MemoryBank(mb_img, mb_cap, mb_ind)
            weights = global_weights(im, s, similarities, bank, indices, self.similarity, k=opt.mb_k,
                                     alpha=opt.global_alpha, beta=opt.global_beta, epsilon=opt.global_ep_nega)
        return hal_loss(similarities, opt.local_alpha, opt.local_ep, weights)
