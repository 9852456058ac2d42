"""Watch a training run: a few figures of each step, and whether they show that it has failed.

HAL's positive term has no gradient for an image and its own caption at a similarity of 0 or less,
and an overshoot in the first steps can send all pairs there for good. Max-margin can sit at its
trivial loss, 2 x batch x margin, with all embeddings equal. Both show in a few figures of each
step, which stay on the device until a step is logged. Max-margin can also stay somewhat above its
trivial loss and learn nothing: then the recalls of a validation are those of chance.
"""

import math
import os
from typing import NamedTuple

import torch

from features.files import NEARLY_ALIKE, mean_cosine
from runtime.errors import InputError

COLLAPSED_SHARE = 0.95  # of a batch's pairs at a similarity of 0 or less
FIRST_STEPS = 200  # recalls may be those of chance so long, after any --lr_warmup_steps
CHANCE_IMAGES = 100  # a smaller dev split cannot show recalls clearly above chance
# How near max-margin is to being stuck: the loss to its trivial value, relative to it, and the mean
# similarity of pairs to that of the others, relative to the margin.
STUCK_WITHIN = 0.05


class GaveUp(InputError):
    """Training was stopped because it had failed."""


def chance_r10(n_images):
    """The R@10 (percent, either direction) that a model that knows nothing rarely exceeds.

    It finds an item among the first ten of n_images with probability 10 / n_images. Two standard
    deviations are added; an image's captions count as one draw, since they are alike.
    """
    chance = 10 / n_images
    return 100 * (chance + 2 * math.sqrt(chance * (1 - chance) / n_images))


class StepFigures(NamedTuple):
    """The figures that are kept of a step."""

    loss: float
    finite: float  # 1 if loss and gradient are finite, else 0: the update was skipped
    positive_share: float  # of pairs with a similarity above 0
    positive_mean: float  # mean similarity of the pairs
    negative_mean: float  # mean similarity of everything else


@torch.no_grad()
def figures_of(loss, gradient_norm, similarities):
    """A step's StepFigures as one tensor (5,) on its device.

    similarities: (B, B), the pairs on the diagonal.
    """
    pairs, batch = similarities.diagonal(), len(similarities)
    negatives = (similarities.sum() - pairs.sum()) / max(batch * (batch - 1), 1)
    finite = loss.isfinite() & gradient_norm.isfinite()
    return torch.stack(
        [loss, finite.to(loss), (pairs > 0).to(loss).mean(), pairs.mean(), negatives]
    )


class Watch:
    """Counts bad steps in a row as they are logged; raises or warns when there are too many.

    opt: needs margin, skip_bad_steps, collapse_patience, on_collapse and lr_warmup_steps.
    log: a function of a message.
    features: (n, ...) those that the run trains on, or None; they may explain a collapse.
    """

    def __init__(self, opt, log, features=None):
        self.opt, self.log, self.features = opt, log, features
        self.bad, self.collapsed, self.last_good, self.warned = 0, 0, None, False
        self.of_trivial = 0.0  # the last max-margin loss, as a multiple of the trivial one

    def state(self):
        """What a resumed run needs to go on counting."""
        return {
            "bad": self.bad,
            "collapsed": self.collapsed,
            "last_good": self.last_good,
            "warned": self.warned,
        }

    def restore(self, state):
        """Continue from a `state()`."""
        for name in self.state():
            setattr(self, name, state[name])

    def see(self, step, lr, figures, batch, collapse, checkpoint):
        """Look at one step's StepFigures; raises GaveUp if training should stop.

        batch: its number of pairs; collapse: how a collapsed run shows, see `loss.Loss`.
        checkpoint: the file to go back to.
        """
        if not figures.finite:
            self._see_bad(step, lr, checkpoint)
            return
        self.bad, self.last_good = 0, figures.loss
        trivial = 2 * batch * self.opt.margin if collapse == "trivial" else 0
        self.of_trivial = figures.loss / trivial if trivial else 0.0
        self.collapsed = (
            self.collapsed + 1 if self._looks_collapsed(figures, trivial, collapse) else 0
        )
        if self.collapsed < self.opt.collapse_patience or self.warned:
            return
        if collapse == "trivial":
            what = (
                f"for {self.collapsed} steps max-margin has sat at its trivial loss of "
                f"2 x batch x margin ({figures.loss:.4g}), where all embeddings are one"
            )
        else:
            what = (
                f"training has collapsed: for {self.collapsed} steps hardly any image has had a "
                f"positive similarity with its own caption (mean {figures.positive_mean:.2f}), "
                "where HAL has no positive gradient and nothing is learned"
            )
        self._report(step, lr, collapse, what)

    def _see_bad(self, step, lr, checkpoint):
        """Count a step whose loss or gradient is not finite; raises GaveUp after too many."""
        self.bad += 1
        if self.bad > self.opt.skip_bad_steps:
            there = os.path.exists(checkpoint)
            again = f"Go back to {checkpoint} with" if there else "Start again with"
            raise GaveUp(
                f"step {step}: the loss or its gradient is not finite (learning rate {lr:g}, last "
                f"good loss {self.last_good}); no weight was changed by it. {again} a lower "
                "--learning_rate, or let such steps pass with --skip_bad_steps"
            )
        self.log(f"Step {step}: loss or gradient not finite, update skipped ({self.bad} in a row)")

    def see_recalls(self, step, lr, r10, n_images, collapse):
        """Look at a validation's R@10 (image to text, text to image; percent) over n_images images.

        After the first steps, recalls must be above chance if max-margin is not below its trivial
        loss. Raises GaveUp if training should stop.
        """
        first = self.opt.lr_warmup_steps + FIRST_STEPS
        if (
            collapse == "trivial"
            and not self.warned
            and step >= first
            and n_images >= CHANCE_IMAGES
            and self.of_trivial >= 1 - STUCK_WITHIN
            and min(r10) <= chance_r10(n_images)
        ):
            self._report(
                step,
                lr,
                collapse,
                "dev recalls are no better than chance (R@10 image to text "
                f"{r10[0]:.1f}, text to image {r10[1]:.1f}, by chance {1000 / n_images:.1f}), and "
                f"max-margin is at {self.of_trivial:.2f} times its trivial loss of 2 x batch x "
                "margin",
            )

    def _looks_collapsed(self, figures, trivial, collapse):
        if collapse == "trivial":
            gap = figures.positive_mean - figures.negative_mean
            return (
                0 < trivial
                and abs(figures.loss - trivial) <= STUCK_WITHIN * trivial
                and abs(gap) <= STUCK_WITHIN * self.opt.margin
            )
        return collapse == "no positives" and figures.positive_share <= 1 - COLLAPSED_SHARE

    def _report(self, step, lr, collapse, what):
        hope = "it may leave it after some epochs, or " if collapse == "trivial" else ""
        cures = f"use --lr_warmup_steps 100, --warmup_epochs 1, or a --learning_rate below {lr:g}"
        if self.features is not None and (cosine := mean_cosine(self.features)) > NEARLY_ALIKE:
            hope = ""
            cures = (
                "the features are the reason, since their rows are nearly alike (mean cosine "
                f"{cosine:.4f}): make them again, and check the encoder's weights"
            )
        message = f"step {step}: {what}; {hope}{cures}"
        if self.opt.on_collapse == "stop" or (
            self.opt.on_collapse is None and collapse == "no positives"
        ):
            raise GaveUp(message)
        self.warned = True
        self.log(f"Warning: {message}")
