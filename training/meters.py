"""A run's meters: the latest value of each figure, and its mean so far."""


class AverageMeter:
    """The latest value, and the mean weighted by the counts given with `update`."""

    def __init__(self):
        self.reset()

    def reset(self):
        """Forget everything."""
        self.val = self.avg = self.sum = self.count = 0

    def update(self, val, n=0):
        """Add `val`, the mean of `n` items; with n = 0 it is shown, but not part of the mean."""
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count if self.count else val

    def __str__(self):
        return f"{self.val:.4f} ({self.avg:.4f})" if self.count else str(self.val)


class LogCollector:
    """Meters by name, printed on one line in the order of their first values."""

    def __init__(self):
        self.meters = {}

    def update(self, k, v, n=0):
        """Add the value `v` of the meter `k`; n as in `AverageMeter.update`."""
        self.meters.setdefault(k, AverageMeter()).update(v, n)

    def tb_log(self, tb_logger, prefix="", step=None):
        """Write each meter's latest value to tb_logger.

        tb_logger: tensorboard_logger, or anything with its `log_value(tag, value, step)`.
        """
        for name, meter in self.meters.items():
            tb_logger.log_value(prefix + name, meter.val, step=step)

    def state(self):
        """{name: the meter's values}, for a checkpoint."""
        return {name: vars(meter) for name, meter in self.meters.items()}

    def restore(self, state):
        """Continue from a `state()`."""
        for name, values in state.items():
            vars(self.meters.setdefault(name, AverageMeter())).update(values)

    def __str__(self):
        return "  ".join(f"{name} {meter}" for name, meter in self.meters.items())
