"""A training run's state, and how it logs, stops and saves."""

import argparse
import glob
import os
import shutil
import signal
import sys
from contextlib import contextmanager, suppress
from functools import cached_property, partial

import torch
from tqdm import tqdm

from layers.cross_attention import cross_attention_similarities
from loss import LOSSES, ContrastiveLoss
from memory_bank import MemoryBank
from runtime import distributed
from runtime.errors import InputError
from runtime.files import check_held, replacing
from runtime.finite import BrokenModel, check_size
from training import checkpoint, run_record
from training.meters import LogCollector
from training.watch import GaveUp, StepFigures, Watch


def log(message):
    """Print a line to stderr, above the progress bar."""
    tqdm.write(message, file=sys.stderr)


def tensorboard(folder):
    """A TensorBoard logger: `.log_value(tag, value, step)`.

    On a full disk the run goes on without it, and its file stays readable.
    """
    # tensorboard_logger's protobuf files are too old for the faster implementations. It is imported
    # here alone, after this is set.
    os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
    from tensorboard_logger import Logger

    class LastingLogger(Logger):
        def _write_event(self, event):
            with suppress(OSError):
                # First the rest of an event that did not fit: anything between breaks the file.
                self._writer.flush()
                super()._write_event(event)

        def __del__(self):
            with suppress(OSError):
                super().__del__()

    return LastingLogger(folder, flush_secs=5)


class Stop:
    """Remembers that SIGTERM or SIGINT came; a second one acts at once."""

    def __init__(self):
        # `signal` is set once all processes know.
        self.came = self.signal = None

    def __call__(self, number, frame):
        # torchrun passes Ctrl-C on a second time, and kills its processes after half a minute.
        if self.came and distributed.launched():
            return
        if self.came:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.came = number
        if not distributed.launched():
            self.signal = number
        again = "" if distributed.launched() else "; once more stops at once"
        log(f"{signal.Signals(number).name}: saving after this step{again}")


@contextmanager
def stoppable():
    """Within this context, SIGTERM and SIGINT set `.signal` of the Stop that it yields."""
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Run:
    """What a run carries from step to step; its checkpoints hold all that a resumed run needs."""

    def __init__(self, opt, model, loaders, vocabulary, features=None):
        self.opt, self.model, self.vocabulary, self.features = opt, model, vocabulary, features
        self.train_loader, self.val_loader = loaders
        self.criterion = ContrastiveLoss(opt).to(model.device)
        check_loss(self.criterion)
        attention = partial(cross_attention_similarities, opt=opt)
        self.similarity = attention if opt.cross_attn else self.criterion.similarity
        self.warmup_criterion = ContrastiveLoss(
            argparse.Namespace(**{**vars(opt), "max_violation": False, "sum_violation": True})
        )
        self.parameters = [
            p for part in (model, self.criterion) for p in part.parameters() if p.requires_grad
        ]
        kind = (
            partial(torch.optim.AdamW, weight_decay=opt.weight_decay)
            if opt.weight_decay
            else torch.optim.Adam
        )
        self.optimizer = kind(
            self.parameters, lr=opt.learning_rate, fused=model.device.type in ("cpu", "cuda")
        )
        self.epoch, self.step_in_epoch, self.steps, self.best_rsum = 0, 0, 0, 0.0
        self.bank, self.meters, self.pending = None, LogCollector(), []
        self.watch = Watch(
            opt, log, getattr(getattr(self.train_loader, "dataset", None), "images", None)
        )
        self.path = os.path.join(opt.logger_name, "checkpoint.pth.tar")
        self.scalars = self.log = self.rsums = Nowhere()  # opened once everything else is checked
        self.held = None  # the lock of the run folder
        self.stop, self.shared = Stop(), distributed.launched() or opt.micro_batch

    @cached_property
    def data(self):
        """The training data's fingerprint."""
        return run_record.fingerprint(self.train_loader.dataset)

    def progress(self):
        """The run's place within its epoch, for a checkpoint."""
        return {
            "step_in_epoch": self.step_in_epoch,
            "bank": self.bank and list(self.bank),
            "meters": self.meters.state(),
            "watch": self.watch.state(),
        }

    def restore(self, content):
        """Continue from a checkpoint's content."""
        self.epoch, self.steps, self.best_rsum, progress = checkpoint.restore(
            content, self.opt.resume, self.model, self.optimizer, self.opt, log, self.criterion
        )
        if progress:
            self.step_in_epoch = progress["step_in_epoch"]
            self.bank = progress["bank"] and MemoryBank(
                *(x.to(self.model.device) for x in progress["bank"])
            )
            self.meters.restore(progress["meters"])
            self.watch.restore(progress["watch"])
        if self.step_in_epoch > len(self.train_loader):
            raise InputError(
                f"--resume {self.opt.resume}: it stands at step {self.step_in_epoch} of its epoch, "
                f"and the training data make {len(self.train_loader)}: give the data that it was "
                "trained on, or start another run with --init_from"
            )
        if content.get("train_fingerprint", self.data) != self.data:
            log("Warning: the training data are not those that this run was trained on so far")
        log(
            f"Resumed {self.opt.resume}: epoch {self.epoch}, step {self.step_in_epoch} of "
            f"{len(self.train_loader)}, {self.steps} steps in all, best rsum {self.best_rsum:.1f}"
        )


def epoch_criterion(run):
    """This epoch's loss: the sum-margin loss in the first --warmup_epochs."""
    return run.warmup_criterion if run.epoch < run.opt.warmup_epochs else run.criterion


def check_loss(criterion):
    """Raise InputError if a user's loss returns no scalar, or has no finite gradient."""
    if criterion.kind in LOSSES:
        return
    similarities = torch.eye(
        4, device=next(iter(criterion.parameters()), torch.empty(0)).device
    ).requires_grad_()
    try:
        value = criterion.function(similarities)
        (slope,) = torch.autograd.grad(value, similarities)
    except Exception as error:  # a user's function may raise anything
        raise InputError(
            f"--loss {criterion.kind}: called with a (4, 4) matrix of similarities, it gives no "
            f"scalar with a gradient ({type(error).__name__}: {error})"
        ) from error
    if not slope.isfinite().all():
        raise InputError(
            f"--loss {criterion.kind}: called with a (4, 4) matrix of similarities, its gradient "
            "is not finite"
        )


def record(run, collapse):
    """Pass the steps since the last call to the meters, TensorBoard, log.jsonl and the watch.

    Only here are figures read from the device, which means waiting for it.
    """
    pending, run.pending = run.pending, []
    if not pending:
        return
    rows = torch.stack([figures for _, _, _, figures, *_ in pending]).tolist()
    for row, (step, i, lr, _, size, batch_time, data_time) in zip(rows, pending):
        figures = StepFigures(*row)
        run.meters.update("Eit", step)
        run.meters.update("lr", lr)
        if figures.finite:  # a skipped step does not enter the mean
            run.meters.update("Loss", figures.loss, size)
        run.meters.update("Time", batch_time, 1)
        run.meters.update("Data", data_time, 1)
        scalars = {
            "epoch": run.epoch,
            "step": i,
            "batch_time": batch_time,
            "data_time": data_time,
            "Eit": step,
            "lr": lr,
            "Loss": figures.loss,
            "positive_share": figures.positive_share,
            "positive_similarity": figures.positive_mean,
            "negative_similarity": figures.negative_mean,
        }
        for tag, value in scalars.items():
            run.scalars.log_value(tag, value, step)
        if step % run.opt.log_step == 0:
            mean = run.meters.meters["Loss"].avg if "Loss" in run.meters.meters else None
            named = figures._asdict() if figures.finite else dict.fromkeys(StepFigures._fields)
            run.log.write(kind="step", step=step, epoch=run.epoch, lr=lr, mean_loss=mean, **named)
        run.watch.see(step, lr, figures, size, collapse, run.path)


def save(run, must_succeed):
    """Write checkpoint.pth.tar; returns whether it was written.

    If it cannot be, `must_succeed` decides between InputError and a warning. If the weights are too
    large, raises GaveUp and leaves the last checkpoint alone.
    """
    with giving_up(run):
        check_size(run.model)
    written = distributed.is_first() and _save(run, must_succeed, run.path)
    distributed.sync()
    return written


def _save(run, must_succeed, path):
    check_held(run.held)
    try:
        late = [lines for lines in (run.log, run.rsums) if not lines.sync()]
        # A run resumed from this checkpoint would never write those lines.
        if late and not must_succeed:
            raise InputError(
                f"{path} could not be written ({late[0].failure}), nor could lines of "
                f"{late[0].path}: free some space"
            )
        checkpoint.save(
            path,
            checkpoint.content_of(
                run.model,
                run.optimizer,
                run.opt,
                run.vocabulary,
                run.epoch,
                run.steps,
                run.best_rsum,
                run.progress(),
                run.features,
                run.data,
                run.criterion,
            ),
        )
        for lines in late:
            log(
                f"Warning: {lines.path} lacks its last lines, which could not be written "
                f"({lines.failure})"
            )
        return True
    except InputError as error:
        if must_succeed:
            raise
        log(f"Warning: {error}. Training goes on; the next save may succeed")
        return False


def bring_best(run):
    """Copy the best model so far to the run folder, if the run is resumed from another one."""
    best, before = (
        os.path.join(folder, "model_best.pth.tar")
        for folder in (run.opt.logger_name, os.path.dirname(run.opt.resume))
    )
    if os.path.exists(best):
        return
    try:
        is_its = checkpoint.load(before)["best_rsum"] == run.best_rsum
    except (InputError, KeyError):
        is_its = False
    if is_its:
        with open(before, "rb") as source, replacing(best) as target:
            shutil.copyfileobj(source, target)
        log(f"Copied the best model so far, {before}, to {best}")
    else:
        run.best_rsum = 0.0  # that model is lost, so the next one is the best there is


def end_epoch(run, rsum):
    """Finish an epoch: write the rsum, the best checkpoint, --save_all's and checkpoint.pth.tar.

    checkpoint.pth.tar is written last, so a run resumed from it finds the other files complete.
    """
    best, before = rsum > run.best_rsum or run.epoch == 0, run.best_rsum
    run.best_rsum = max(rsum, before)
    run.epoch, run.step_in_epoch, run.bank, run.meters = run.epoch + 1, 0, None, LogCollector()
    folder, last = run.opt.logger_name, run.epoch >= run.opt.num_epochs
    if distributed.is_first():
        run.rsums.add(f"Epoch: {run.epoch - 1} ; rsum: {rsum:.1f}\n")
        if best and not _save(run, last, os.path.join(folder, "model_best.pth.tar")):
            run.best_rsum = before
        if run.opt.save_all:
            _save(run, last, os.path.join(folder, f"Epoch-{run.epoch}-model.pth.tar"))
    save(run, must_succeed=last)
    if not distributed.is_first():
        return
    if run.opt.save_all and run.opt.keep:
        written = glob.glob(os.path.join(glob.escape(folder), "Epoch-*-model.pth.tar"))
        # By time, not by number: an older run's files go first.
        for path in sorted(written, key=checkpoint.written)[: -run.opt.keep]:
            os.unlink(path)


@contextmanager
def giving_up(run):
    """Within this context, a BrokenModel becomes a GaveUp, which ends training."""
    try:
        yield
    except BrokenModel as error:
        raise GaveUp(
            f"step {run.steps}, learning rate {run.optimizer.param_groups[0]['lr']:g}: {error}"
        ) from error


class Nowhere:
    """Stands for TensorBoard and log.jsonl in processes that write none."""

    log_value = write = add = staticmethod(lambda *_, **__: None)
    sync = staticmethod(lambda: True)
