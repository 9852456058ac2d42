"""The losses: pure functions of a batch's similarity matrix, and the table for --loss.

`similarities[i, j]` is S_ij, the similarity of image i and caption j in a batch of B pairs, and the
pairs sit on the diagonal. HAL is Liu et al., AAAI 2020, section 3. The sum-margin and max-margin
losses are those of VSE++ (Faghri et al., BMVC 2018), InfoNCE is CLIP's (Radford et al., 2021).
Deviations from the released code are listed in docs/deviations.md.

This file and memory_bank.py need nothing but PyTorch, so both can be copied into other projects:

    criterion = HAL(alpha=30, epsilon=0.7)
    loss = criterion(image_embeddings, caption_embeddings)      # L2-normalised, (B, D) each
"""

import importlib
import math
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from memory_bank import MemoryBank, global_weights, numbers_on


def cosine_sim(im, s):
    """Cosine similarities (n, m) of L2-normalised embeddings (n, D) and (m, D)."""
    return im @ s.t()


def order_sim(im, s):
    """Order similarities (n, m) of embeddings (n, D) and (m, D): -||max(0, s_j - im_i)||.

    Vendrov et al., ICLR 2016. It is never positive; a pair that violates nothing has gradient 0.
    """
    return -torch.linalg.vector_norm((s.unsqueeze(0) - im.unsqueeze(1)).clamp(min=0), dim=2)


SIMILARITIES = {"cosine": cosine_sim, "order": order_sim}

# Margin losses ----------------------------------------------------------------------------------


def margin_costs(similarities, margin):
    """Hinge costs of all wrong pairs: [margin + S_ij - S_ii]+ and [margin + S_ij - S_jj]+.

    Both are (B, B), with 0 on the diagonal. The first compares image i's captions, the second
    caption j's images.
    """
    pairs = similarities.diagonal()
    own = torch.eye(len(similarities), dtype=torch.bool, device=similarities.device)
    caption_costs = (margin + similarities - pairs.unsqueeze(1)).clamp(min=0).masked_fill(own, 0)
    image_costs = (margin + similarities - pairs.unsqueeze(0)).clamp(min=0).masked_fill(own, 0)
    return caption_costs, image_costs


def sum_margin_loss(similarities, margin=0.2):
    """The sum-margin loss: all hinge costs of the batch, summed (not averaged)."""
    caption_costs, image_costs = margin_costs(similarities, margin)
    return caption_costs.sum() + image_costs.sum()


def max_margin_loss(similarities, margin=0.2):
    """The max-margin loss of VSE++: the hardest caption's and the hardest image's costs, summed."""
    caption_costs, image_costs = margin_costs(similarities, margin)
    return caption_costs.amax(1).sum() + image_costs.amax(0).sum()


# HAL --------------------------------------------------------------------------------------------


def hal_loss(similarities, alpha=30.0, epsilon=0.3, weights=None, same=None, positives=None):
    """HAL: 1/B sum_i [ log(1 + sum_j E_ji)/a + log(1 + sum_j E_ij)/a - log(1 + relu(w_i S_ii)) ].

    E_ij = exp(a W_ij (S_ij - e)), with S_ii taken as 0. A pair with S_ii <= 0 has no positive
    gradient, as in the released code.

    similarities: (B, B) cosines, not logits: with a learned scale, divide it out. Half precision is
        computed in float32.
    alpha, epsilon: a, the sharpness, and e, the similarity above which a negative counts.
    weights: (W (B, B), w (B,)) of `memory_bank.global_weights`; None is the local loss, W = w = 1.
    same: (B, B) bool, True for an image and another of its captions: such pairs are then no
        negatives. None counts them as negatives, as the released code does.
    positives: (m,) the column of each row's own pair, for similarities (m, n) of m of the batch's n
        rows; weights and same are then those of these rows. The result is these rows' share of the
        loss in one direction: the shares of images and of captions (whose W is transposed), summed
        over all processes, are the loss of the whole batch.
    """
    similarities = _at_least_float32(similarities)
    own, pairs = _own_pairs(similarities, positives)
    if same is not None and same.shape != own.shape:
        raise ValueError(
            f"hal_loss: same= is {tuple(same.shape)}, the similarities are {tuple(own.shape)}: it "
            "says for each of them whether image and caption belong together"
        )
    pair_weights, positive_weights = (1.0, 1.0) if weights is None else weights
    # As in the released code, the diagonal is zeroed before exp, not left out: it adds exp(-a e) to
    # each sum, or 1 with the bank's weights (W_ii = 0). Leaving it out would change the loss.
    exponents = alpha * pair_weights * (similarities.masked_fill(own, 0) - epsilon)
    if same is not None:  # -inf, for these do drop out of the sums
        exponents = exponents.masked_fill(same & ~own, -torch.inf)
    positive = (1 + (positive_weights * pairs).relu()).log()
    if positives is not None:
        # Each direction carries half of the positive term, so that both together have it once.
        return (_log_one_plus_sum_exp(exponents, 1) / alpha - positive / 2).sum() / own.shape[1]
    hubness = (_log_one_plus_sum_exp(exponents, 0) + _log_one_plus_sum_exp(exponents, 1)) / alpha
    return (hubness - positive).mean()


def _own_pairs(similarities, positives):
    """(own (m, n) bool, pairs (m,)): which entry of a row is its own pair, and its similarity."""
    rows, columns = similarities.shape
    if positives is not None:
        positives = numbers_on(similarities.device, positives)
        own = positives.unsqueeze(1) == torch.arange(columns, device=similarities.device)
        return own, similarities.gather(1, positives.unsqueeze(1)).squeeze(1)
    if rows != columns:
        raise ValueError(
            f"hal_loss: the similarities are {rows} x {columns}, not square, so the pairs are not "
            "on the diagonal: name each row's own column with positives="
        )
    own = torch.eye(rows, dtype=torch.bool, device=similarities.device)
    return own, similarities.diagonal()


def _log_one_plus_sum_exp(exponents, dim):
    """log(1 + sum exp(x)) over `dim`, without overflow (in float32, exp(89) would be infinite)."""
    # Clamped at 0, the shift is none while no exponent is positive, so that results round like the
    # plain formula's. Detached, it leaves the gradient as it is.
    largest = exponents.detach().amax(dim, keepdim=True).clamp(min=0)
    shifted = (exponents - largest).exp().sum(dim)
    return (shifted + (-largest).exp().squeeze(dim)).log() + largest.squeeze(dim)


def _at_least_float32(tensor):
    """Half precision as float32: in float16 most of HAL's gradients would round to 0."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class HAL(nn.Module):
    """`hal_loss` as a module, for use with any model; it has no parameters.

    alpha: the sharpness; epsilon: the similarity above which a negative counts.
    """

    def __init__(self, alpha=30.0, epsilon=0.3):
        super().__init__()
        self.alpha, self.epsilon = alpha, epsilon

    def forward(self, im, s=None, ids=None, weights=None):
        """The loss of embeddings im and s, or of similarities im (B, B) alone: a mean over pairs.

        im, s: (B, D), L2-normalised.
        ids: (B,) the pairs' image numbers, a tensor, list or tuple; pairs of one image are then no
            negatives of each other.
        weights: as for `hal_loss`.
        """
        if s is not None:
            # Autocast would make this product in half precision, and alpha multiplies its error.
            with torch.autocast(im.device.type, enabled=False):
                im = cosine_sim(_at_least_float32(im), _at_least_float32(s))
        same = None
        if ids is not None:
            ids = numbers_on(im.device, ids)
            same = ids.unsqueeze(1) == ids.unsqueeze(0)
        return hal_loss(im, self.alpha, self.epsilon, weights, same)

    def max_violation_on(self):
        """Does nothing: for code that switches to the hardest negative after its first epochs.

        HAL weights all negatives from the start, the hardest most.
        """

    def max_violation_off(self):
        """Does nothing, as `max_violation_on`."""

    def extra_repr(self):
        """The two numbers, for `print(module)`."""
        return f"alpha={self.alpha}, epsilon={self.epsilon}"


# InfoNCE ----------------------------------------------------------------------------------------


class InfoNCE(nn.Module):
    """CLIP's loss: the mean cross entropy of both directions over similarities / temperature.

    temperature: its initial value. What is learned is the logarithm of its inverse, and the
        temperature stays at 0.01 or more (Radford et al., 2021, section 2.5).
    The worked example of a loss that has weights.
    """

    LARGEST_SCALE = 100.0  # 1 / temperature; above, CLIP's authors saw training become unstable

    def __init__(self, temperature=0.07):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self, similarities):
        """The scalar loss of similarities (B, B)."""
        # As a logarithm the scale stays positive, and a step changes it by a factor.
        scale = self.log_scale.exp().clamp(max=self.LARGEST_SCALE)
        logits = _at_least_float32(similarities) * scale
        # The cross entropies of rows and columns; PyTorch's own would copy the transpose.
        both = (logits.logsumexp(0) + logits.logsumexp(1)) / 2
        return (both - logits.diagonal()).mean()


class HALWithInfoNCE(nn.Module):
    """`hal_loss` plus `InfoNCE`, of the same similarities."""

    def __init__(self, alpha=30.0, epsilon=0.3, temperature=0.07):
        super().__init__()
        self.alpha, self.epsilon, self.infonce = alpha, epsilon, InfoNCE(temperature)

    def forward(self, similarities):
        """The scalar loss of similarities (B, B)."""
        return hal_loss(similarities, self.alpha, self.epsilon) + self.infonce(similarities)


# The table --------------------------------------------------------------------------------------


class Flag(NamedTuple):
    """A number that a loss takes from the command line; low: the smallest value allowed."""

    name: str
    default: float
    help: str
    low: float = 0.0
    low_allowed: bool = True


class Loss(NamedTuple):
    """What train.py needs to know about a loss: a new one takes one entry of `LOSSES`.

    make: options -> a function or nn.Module of similarities (B, B) that returns a scalar. Its
        parameters, if any, are trained and saved with the model's.
    title: for the log, a format string of the options.
    flags: its numbers, each a flag of train.py.
    is_mean: True for a mean over the batch, whose gradients are scaled up where they would be too
        small for float16.
    collapse: how a collapsed run shows: "no positives" (no pair's similarity is above 0), "trivial"
        (the loss stays at 2 x batch x margin), or None (training does not watch for it).
    takes_weights: True if it also takes the memory bank's weights.
    """

    make: Callable[[Any], Callable]
    title: str
    flags: tuple = ()
    is_mean: bool = False
    collapse: str | None = None
    takes_weights: bool = False


MARGIN = Flag("margin", 0.2, "margin of the hinge losses")
ALPHA = Flag("local_alpha", 30.0, "HAL: sharpness a in exp(a (S_ij - e))", low_allowed=False)
EPSILON = Flag("local_ep", 0.3, "HAL: margin e in exp(a (S_ij - e))", low=-math.inf)
TEMPERATURE = Flag("temperature", 0.07, "InfoNCE: initial temperature", low_allowed=False)

LOSSES = {
    "hal": Loss(
        lambda opt: partial(hal_loss, alpha=opt.local_alpha, epsilon=opt.local_ep),
        "HAL (alpha {local_alpha:g}, epsilon {local_ep:g})",
        flags=(ALPHA, EPSILON),
        is_mean=True,
        collapse="no positives",
        takes_weights=True,
    ),
    "max": Loss(
        lambda opt: partial(max_margin_loss, margin=opt.margin),
        "max-margin ({margin:g})",
        flags=(MARGIN,),
        collapse="trivial",
    ),
    "sum": Loss(
        lambda opt: partial(sum_margin_loss, margin=opt.margin),
        "sum-margin ({margin:g})",
        flags=(MARGIN,),
    ),
    "infonce": Loss(
        lambda opt: InfoNCE(opt.temperature),
        "InfoNCE (temperature {temperature:g} at first)",
        flags=(TEMPERATURE,),
        is_mean=True,
    ),
    "hal+infonce": Loss(
        lambda opt: HALWithInfoNCE(opt.local_alpha, opt.local_ep, opt.temperature),
        "HAL (alpha {local_alpha:g}, epsilon {local_ep:g}) plus InfoNCE",
        flags=(ALPHA, EPSILON, TEMPERATURE),
        is_mean=True,
        collapse="no positives",
    ),
}


def loss_kind(opt):
    """The name of the loss that the options choose.

    The order is that of the released code: max_violation, then sum_violation, then loss, then HAL.
    """
    if getattr(opt, "max_violation", False):
        return "max"
    if getattr(opt, "sum_violation", False):
        return "sum"
    return getattr(opt, "loss", None) or "hal"


def find_loss(kind):
    """The Loss with a name in `LOSSES`, or one from a user's file, given as "module:name".

    The latter is a function of similarities (B, B), or an nn.Module class that takes no arguments.
    Raises ValueError for an unknown name and for a module that fails to import.
    """
    if kind in LOSSES:
        return LOSSES[kind]
    module, colon, name = kind.partition(":")
    if not (module and colon and name):
        raise ValueError(
            f"there is no loss {kind!r}: choose {', '.join(LOSSES)}, or module:function"
        )
    if "" not in sys.path:
        sys.path.append("")  # the current folder, last, so that it hides none of the scripts' files
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module may raise anything
        raise ValueError(
            f"the loss {kind} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    return Loss(lambda opt: found() if isinstance(found, type) else found, kind)


class ContrastiveLoss(nn.Module):
    """The loss that the options or arguments name, called as HAL's code or its relatives do.

    `ContrastiveLoss(opt)`, as in HAL's: opt has the names that `loss_kind` reads, the numbers of
    that loss and, for the memory bank, global_alpha, global_beta, global_ep_nega and mb_k.
    (global_ep_posi cancels in the weights.) measure is "cosine" unless opt has "order".
    `ContrastiveLoss(margin=0, measure=False, max_violation=False)`, as in VSE++'s, or without
    measure, as in SGRAF's: the sum-margin or max-margin loss, never HAL.
    `ContrastiveLoss(opt, margin=0, max_violation=False)`, as in SCAN's and VSE-infinity's: the
    same, with the other options from opt. A lone opt is HAL's call.
    All by place or by name. False as measure means cosine.

    max_violation, margin, l_alpha, l_ep (HAL's alpha and epsilon) and sim (the similarity) can be
    read and set.
    """

    def __init__(self, *arguments, **named):
        super().__init__()
        by_options = "opt" in named or arguments and not isinstance(arguments[0], (int, float))
        lone = len(arguments) + len(named) == 1
        options = _margin_options if not by_options else _options if lone else _scan_options
        self._follow(options(*arguments, **named))
        self.similarity = SIMILARITIES[getattr(self.opt, "measure", "cosine")]

    def _follow(self, opt, **changes):
        """Make the loss that these options name."""
        self.opt = Namespace(**{**vars(opt), **changes}) if changes else opt
        self.kind = loss_kind(self.opt)
        self.entry = find_loss(self.kind)
        try:
            self.function = self.entry.make(self.opt)
        except AttributeError as error:
            raise ValueError(
                f"ContrastiveLoss: the options name the loss {self.kind}, but lack its numbers "
                f"({error}): add them, or give margin= and max_violation= as well"
            ) from error

    sim = property(
        lambda self: self.similarity,
        lambda self, similarity: setattr(self, "similarity", similarity),
    )
    margin, l_alpha, l_ep = (
        property(
            lambda self, name=name: getattr(self.opt, name, None),
            lambda self, value, name=name: self._follow(self.opt, **{name: value}),
        )
        for name in ("margin", "local_alpha", "local_ep")
    )

    @property
    def max_violation(self):
        """Whether the loss is max-margin. Setting it to False changes no other loss but that."""
        return self.kind == "max"

    @max_violation.setter
    def max_violation(self, hardest):
        if bool(hardest) != self.max_violation:
            self._follow(self.opt, max_violation=bool(hardest), sum_violation=not hardest)

    def max_violation_on(self):
        """Count the hardest negatives alone, as VSE-infinity's call does; no effect on HAL."""
        self.max_violation = self.kind in ("sum", "max")

    def max_violation_off(self):
        """Count all negatives, as VSE-infinity's call does; no effect on HAL."""
        self.max_violation = False

    def forward(self, im, s=None, mb_img=None, mb_cap=None, mb_ind=None, indices=None):
        """The scalar loss of image and caption embeddings (B, D) each.

        im: without s, the similarities (B, B), as in SGRAF's call.
        mb_img, mb_cap, mb_ind: the memory bank, (n, D), (n, D) and (n,), or lists of these by
            batch; without it, the loss is HAL's local one.
        indices: (B,) the batch's caption indices, whose bank entries are left out.
        """
        if s is None:
            return self.of_similarities(im)
        return self.of_similarities(self.similarity(im, s), im, s, mb_img, mb_cap, mb_ind, indices)

    def of_similarities(
        self, similarities, im=None, s=None, mb_img=None, mb_cap=None, mb_ind=None, indices=None
    ):
        """As `forward`, with the similarities (B, B) of im and s already computed."""
        if not self.entry.takes_weights or mb_img is None or not len(mb_img):
            return self.function(similarities)
        mb_img, mb_cap = (_joined(part, im.device) for part in (mb_img, mb_cap))
        mb_ind, indices = (
            None if numbers is None else _joined(numbers, im.device).flatten()
            for numbers in (mb_ind, indices)
        )
        if mb_ind is not None and not len(mb_img) == len(mb_cap) == len(mb_ind):
            raise ValueError(
                f"ContrastiveLoss: the memory bank has {len(mb_img)} images, {len(mb_cap)} "
                f"captions and {len(mb_ind)} indices: give as many of each, in the order mb_img, "
                "mb_cap, mb_ind, and then the batch's indices"
            )
        opt, bank = self.opt, MemoryBank(mb_img, mb_cap, mb_ind)
        weights = global_weights(
            im, s, similarities, bank, indices, self.similarity,
            k=opt.mb_k, alpha=opt.global_alpha, beta=opt.global_beta, epsilon=opt.global_ep_nega,
        )  # fmt: skip
        return self.function(similarities, weights=weights)


def _joined(parts, device):
    """One tensor on the device, of a tensor, an array, numbers, or a list of these by batch."""
    if isinstance(parts, (list, tuple)) and getattr(parts[0], "ndim", hasattr(parts[0], "__len__")):
        parts = torch.cat([torch.as_tensor(part) for part in parts])
    return torch.as_tensor(parts).to(device, non_blocking=True)


def _options(opt):
    """HAL's call: the options are at hand."""
    return opt


def _margin_options(margin=0, measure=False, max_violation=False):
    """VSE++'s call, or SGRAF's without measure: the options of a margin loss."""
    return _scan_options(Namespace(), margin, max_violation or measure is True, measure)


def _scan_options(opt, margin=0, max_violation=False, measure=None):
    """SCAN's and VSE-infinity's call: the options of a margin loss, and all others of opt."""
    measure = getattr(opt, "measure", "cosine") if measure is None else measure
    return Namespace(
        **{
            **vars(opt),
            "margin": margin,
            "measure": measure if isinstance(measure, str) else "cosine",
            "max_violation": bool(max_violation),
            "sum_violation": not max_violation,
        }
    )
