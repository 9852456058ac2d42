"""Batch normalisation with one set of statistics for all processes of a run."""

import torch
from torch import nn

from runtime import distributed


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes, differentiable on each of them."""

    @staticmethod
    def forward(ctx, tensor):
        """Return the total, the same on every process."""
        total = tensor.clone()
        distributed.add_up([total])
        return total

    @staticmethod
    def backward(ctx, gradient):
        """Add up the gradients of all processes: the total went into the loss of each."""
        return _Sum.forward(ctx, gradient)


class _SharedBatchNorm:
    """Batch norm whose training statistics come from the rows of all processes.

    PyTorch's SyncBatchNorm does the same, but takes no CPU tensors.
    """

    def forward(self, rows):
        """Normalise (B, C) or (B, C, ...).

        B may be 0 on a process whose share of the batch is empty.
        """
        if not self.training:
            return super().forward(rows)
        exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
        axes = [axis for axis in range(rows.dim()) if axis != 1]
        shape = [1, -1] + [1] * (rows.dim() - 2)
        totals = _Sum.apply(
            torch.cat([exact.sum(axes), exact.new_full((1,), rows.numel() // rows.shape[1])])
        )
        count, mean = totals[-1], totals[:-1] / totals[-1]
        centred = exact - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)), self.momentum)
        slope = (variance + self.eps).rsqrt() * self.weight
        return (centred * slope.view(shape) + self.bias.view(shape)).to(rows.dtype)


def share_batch_norm(model):
    """Let all batch norms of the model use the rows of all processes in training.

    Does nothing in a run of one process.
    """
    for module in model.modules() if distributed.size() > 1 else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = type(
                f"Shared{type(module).__name__}", (_SharedBatchNorm, type(module)), {}
            )
