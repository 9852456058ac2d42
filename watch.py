"""Watching a training run: figures of each step, and what they say when it has gone wrong.

HAL's positive term has no gradient where an image and its own caption are at a similarity of 0 or
less; a first overshoot can send all pairs there for good. Max-margin can sit at its trivial loss,
2 x batch x margin, where all embeddings are one. Both are seen in a few figures a step, which
stay on the device until a step is logged.
"""

import os
from typing import NamedTuple

import torch

from errors import InputError

COLLAPSED_SHARE = 0.95  # of a batch's pairs at a similarity of 0 or less
STUCK_WITHIN = 0.05  # relative: the loss of its trivial value, the mean pair's lead over the others of the margin


class GaveUp(InputError):
    """Training was stopped, since it would have come to nothing."""


class StepFigures(NamedTuple):
    """What is kept of a step."""

    loss: float
    finite: float  # 1 where loss and gradient are finite, else 0: the update was skipped
    positive_share: float  # of pairs with a similarity above 0
    positive_mean: float  # mean similarity of the pairs
    negative_mean: float  # mean similarity of everything else


@torch.no_grad()
def figures_of(loss, gradient_norm, similarities):
    """A step's StepFigures as one tensor (5,) on its device; similarities: (B, B), pairs on the diagonal."""
    pairs, batch = similarities.diagonal(), len(similarities)
    negatives = (similarities.sum() - pairs.sum()) / max(batch * (batch - 1), 1)
    finite = loss.isfinite() & gradient_norm.isfinite()
    return torch.stack([loss, finite.to(loss), (pairs > 0).to(loss).mean(), pairs.mean(), negatives])


class Watch:
    """Counts bad steps in a row as they are logged, and raises or warns when there are too many.

    opt: margin, skip_bad_steps, collapse_patience, on_collapse. log: takes a message.
    """

    def __init__(self, opt, log):
        self.opt, self.log = opt, log
        self.bad, self.collapsed, self.last_good, self.warned = 0, 0, None, False

    def state(self):
        """What a resumed run needs to go on counting."""
        return {"bad": self.bad, "collapsed": self.collapsed, "last_good": self.last_good, "warned": self.warned}

    def restore(self, state):
        """Take up `state()`."""
        for name in self.state():
            setattr(self, name, state[name])

    def see(self, step, lr, figures, batch, kind, checkpoint):
        """Take in one step's StepFigures; raises GaveUp where training should stop.

        batch: pairs in it; kind: the step's loss, as `loss.loss_kind` names it; checkpoint: the file to go back to.
        """
        if figures.finite:
            self.bad, self.last_good = 0, figures.loss
        else:
            self.bad += 1
            if self.bad > self.opt.skip_bad_steps:
                raise GaveUp(
                    f"step {step}: the loss or its gradient is not finite (learning rate {lr:g}, last good loss "
                    f"{self.last_good}); no weight was changed by it. "
                    + (f"Go back to {checkpoint} with" if os.path.exists(checkpoint) else "Start again with")
                    + " a lower --learning_rate, or let such steps pass with --skip_bad_steps")
            self.log(f"Step {step}: loss or gradient not finite, update skipped ({self.bad} in a row)")
            return
        self.collapsed = self.collapsed + 1 if self._looks_collapsed(figures, batch, kind) else 0
        if self.collapsed >= self.opt.collapse_patience and not self.warned:
            self._report(step, lr, figures, kind)

    def _looks_collapsed(self, figures, batch, kind):
        if kind == "max":
            trivial = 2 * batch * self.opt.margin
            gap = figures.positive_mean - figures.negative_mean
            return (0 < trivial and abs(figures.loss - trivial) <= STUCK_WITHIN * trivial
                    and abs(gap) <= STUCK_WITHIN * self.opt.margin)
        return kind == "hal" and figures.positive_share <= 1 - COLLAPSED_SHARE

    def _report(self, step, lr, figures, kind):
        cures = f"use --lr_warmup_steps 100, --warmup_epochs 1, or a --learning_rate below {lr:g}"
        if kind == "max":
            message = (f"step {step}: for {self.collapsed} steps max-margin has sat at its trivial loss of 2 x batch x "
                       f"margin ({figures.loss:.4g}), where all embeddings are one; it may leave it after some epochs, "
                       f"or {cures}")
        else:
            message = (f"step {step}: training has collapsed: for {self.collapsed} steps hardly any image has had a "
                       f"positive similarity with its own caption (mean {figures.positive_mean:.2f}), where HAL has no "
                       f"positive gradient and nothing is learned; {cures}")
        if self.opt.on_collapse == "stop" or (self.opt.on_collapse is None and kind == "hal"):
            raise GaveUp(message)
        self.warned = True
        self.log(f"Warning: {message}")
