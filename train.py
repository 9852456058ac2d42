"""Train a visual-semantic embedding with HAL or a margin loss.

    python3 train.py                                  # the embedded sample data
    python3 train.py --data_name f30k_precomp --data_path data --batch_size 128 --learning_rate 0.001 \\
        --lr_update 8 --num_epochs 13 --local_alpha 60.00 --local_ep 0.7

HAL: Liu et al., "Improved Text-Image Matching by Mitigating Visual Semantic Hubs", AAAI 2020.
Flags and defaults are the released code's. Log lines go to stderr, rsum to stdout, scalars to
TensorBoard, checkpoints to --logger_name.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends quietly; run_script takes it back

import argparse
import glob
import hashlib
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property, partial

import torch
from tqdm import tqdm

import checkpoint
import distributed
import run_record
import sample_data
from cross_attention import AGGREGATIONS, NORMS, cross_attention_similarities
from data import get_loaders
from device import amp_in_words, choose_device, choose_products
from errors import ArgumentParser, InputError, check_choice, number, replacing, run_script
from evaluation import append, embed, metrics_of, similarity_source, split_loss
from features import features_of
from hubness import DEPTHS, hubness_both_ways
from loss import ContrastiveLoss, loss_kind
from memory_bank import MemoryBank, draw_batches
from meters import LogCollector
from model import ENC_TYPES, IMAGE_POOLINGS, TEXT_POOLINGS, cnn_types
from ranking import rank_shifted
from scan import build
from shares import gradients, own_draws, share_batch_norm, shared_bank, shared_batches
from vocab import MASK, READINGS, build_vocab, find_vocabulary, vocabulary_of, vocabulary_path, write_vocabulary
from watch import GaveUp, StepFigures, Watch, figures_of
from word_ids import seed_for

LOCAL_FLAGS = {"data_path", "vocab_path", "cache_dir", "workers", "features_on_device"}  # may differ between machines
BANK_DRAW = 1  # the bank's order of an epoch, beside training's 0
KEEP_DRAW = 2
VSE_EPOCHS, SCAN_EPOCHS = {"num_epochs": 15, "lr_update": 8}, {"num_epochs": 30, "lr_update": 15}  # released defaults


def parse_args(argv=None):
    """The script's flags; original names and defaults."""
    parser = ArgumentParser("Train a visual-semantic embedding with HAL or a margin loss.")
    add_data_flags(parser.add_argument_group("data"))
    add_model_flags(parser.add_argument_group("model"))
    add_attention_flags(parser.add_argument_group("cross attention over regions (SCAN), instead of VSE"))
    add_loss_flags(parser.add_argument_group("loss (HAL unless a margin loss is chosen)"))
    add_training_flags(parser.add_argument_group("training"))
    add_start_flags(parser.add_argument_group("start"))
    add_output_flags(parser.add_argument_group("output"))
    opt = parser.parse_args(argv)
    opt.cache_dir = opt.cache_dir or os.path.join(opt.data_path, ".cache")
    for name, default in (SCAN_EPOCHS if opt.cross_attn else VSE_EPOCHS).items():
        setattr(opt, name, default if getattr(opt, name) is None else getattr(opt, name))
    _check(opt)
    return opt


def add_data_flags(group):
    """The data set."""
    group.add_argument("--data_path", default="data", help="folder that holds the data sets")
    group.add_argument("--data_name", default="sample_precomp",
                       help="data set: *_precomp (features), coco, f8k, f30k, or any folder with dataset_<name>.json")
    group.add_argument("--vocab_path", default="./vocab/", help="folder of <data_name>_vocab.json or .pkl")
    group.add_argument("--cache_dir", help="folder for tokenized captions (default: <data_path>/.cache)")
    group.add_argument("--features_on_device", action=argparse.BooleanOptionalAction,
                       help="keep the features in GPU memory (default: where they fit in half of what is free)")
    group.add_argument("--caption_reading", choices=READINGS,
                       help="how captions become words (default: text, or as in the checkpoint that is started from)")
    group.add_argument("--use_restval", action="store_true", help="coco: train on the restval captions, too")
    group.add_argument("--skip_broken_images", action="store_true",
                       help="leave out raw images that cannot be decoded (checked at the start)")
    group.add_argument("--crop_size", default=224, type=number(int, 32),
                       help="pixels of the random training crop (raw images)")
    group.add_argument("--workers", default=10, type=number(int, 0), help="processes that decode raw images")


def add_model_flags(group):
    """The model."""
    count = number(int, 1)
    group.add_argument("--word_dim", default=300, type=count, help="width of the word embedding")
    group.add_argument("--embed_size", default=1024, type=count, help="width of the joint embedding")
    group.add_argument("--num_layers", default=1, type=count, help="layers of the GRU")
    group.add_argument("--img_dim", type=count, help="width of the precomputed features (default: that of the file)")
    group.add_argument("--precomp_enc_type", default="basic", choices=[*ENC_TYPES, "weight_norm"],
                       help="features: one linear layer; mlp: VSE-infinity's, for regions; weight_norm: SCAN's")
    group.add_argument("--image_pooling", choices=IMAGE_POOLINGS,
                       help="how an image's regions become one vector (default: mean)")
    group.add_argument("--text_pooling", default="last", choices=TEXT_POOLINGS,
                       help="how a caption's words become one vector")
    group.add_argument("--bi_gru", action="store_true", help="a GRU in both directions, of which the mean is taken")
    group.add_argument("--cnn_type", default="vgg19", help="torchvision's VGG or ResNet for raw images")
    group.add_argument("--cnn_weights", default="imagenet", help="imagenet, none (random), or a state dict file")
    group.add_argument("--finetune", action="store_true", help="train the CNN, too")
    group.add_argument("--measure", default="cosine", choices=["cosine", "order"], help="similarity")
    group.add_argument("--use_abs", action="store_true", help="absolute value of the embeddings")
    group.add_argument("--no_imgnorm", action="store_true", help="do not normalise the image embeddings")
    group.add_argument("--no_txtnorm", action="store_true", help="do not normalise the caption embeddings")


def add_attention_flags(group):
    """SCAN, Lee et al., ECCV 2018."""
    group.add_argument("--cross_attn", choices=["t2i", "i2t"],
                       help="t2i: words attend to regions, i2t: regions to words (default: none, a VSE)")
    group.add_argument("--raw_feature_norm", default="clipped_l2norm", choices=NORMS,
                       help="how the raw similarities of words and regions are normalised, over all queries of a "
                       "context, before the softmax")
    group.add_argument("--agg_func", default="LogSumExp", choices=[*AGGREGATIONS],
                       help="how a pair's scores, one a word (t2i) or region (i2t), become one")
    group.add_argument("--lambda_lse", default=6.0, type=number(float, 0, low_allowed=False),
                       help="sharpness of LogSumExp")
    group.add_argument("--lambda_softmax", default=9.0, type=number(float, 0), help="sharpness of the attention")


def add_loss_flags(group):
    """The loss."""
    count, positive, share = number(int, 1), number(float, 0, low_allowed=False), number(float, 0)
    finite = number(float, -math.inf)
    group.add_argument("--margin", default=0.2, type=share, help="margin of the hinge losses")
    group.add_argument("--max_violation", action="store_true", help="max-margin (VSE++): the hardest negatives")
    group.add_argument("--sum_violation", action="store_true", help="sum-margin: all negatives")
    group.add_argument("--local_alpha", default=30.0, type=positive, help="HAL: scale a in exp(a (S_ij - e))")
    group.add_argument("--local_ep", default=0.3, type=finite, help="HAL: margin e in exp(a (S_ij - e))")
    group.add_argument("--memory_bank", action="store_true", help="HAL: global weights from a memory bank, from the "
                       "second epoch on")
    group.add_argument("--global_alpha", default=40.0, type=positive, help="bank: scale g of the positive weights w_i")
    group.add_argument("--global_beta", default=40.0, type=positive, help="bank: scale b of the pair weights W_ij")
    group.add_argument("--global_ep_posi", default=0.2, type=finite, help="bank: e+ of w_i (it cancels: no effect)")
    group.add_argument("--global_ep_nega", default=0.1, type=finite, help="bank: e- in exp(b P_ik - e-)")
    group.add_argument("--mb_k", default=250, type=count, help="bank: nearest neighbours that count")
    group.add_argument("--mb_rate", default=0.05, type=number(float, 0, 1, low_allowed=False),
                       help="bank: share of the training pairs it holds")


def add_training_flags(group):
    """How it is trained."""
    count, positive, share = number(int, 1), number(float, 0, low_allowed=False), number(float, 0)
    rate = number(float, 0, 1)
    group.add_argument("--num_epochs", type=number(int, 0), help="epochs in all (default: 15, with --cross_attn 30)")
    group.add_argument("--batch_size", default=128, type=count, help="pairs a step")
    group.add_argument("--micro_batch", type=count, help="pairs encoded at a time: a large batch's exact loss in the "
                       "memory of a small one, for one more pass through the encoders (default: the whole batch)")
    group.add_argument("--learning_rate", default=0.0002, type=positive, help="Adam's initial learning rate")
    group.add_argument("--weight_decay", default=0.0, type=share, help="AdamW's (0: Adam)")
    group.add_argument("--drop_regions", default=0.0, type=rate, help="share of regions left out of a training batch "
                                                                               "(SCAN attends to zeros in their place)")
    group.add_argument("--drop_words", default=0.0, type=rate,
                       help="share of words touched in training: half of them become <mask>, a tenth random, the rest "
                       "goes")
    group.add_argument("--lr_update", type=count,
                       help="divide the learning rate by 10 every so many epochs (default: 8, with --cross_attn 15)")
    group.add_argument("--grad_clip", default=2.0, type=share, help="largest gradient norm (0: no clipping)")
    group.add_argument("--lr_warmup_steps", default=0, type=number(int, 0),
                       help="steps over which the learning rate rises linearly to --learning_rate")
    group.add_argument("--warmup_epochs", default=0, type=number(int, 0), help="epochs trained with --warmup_loss")
    group.add_argument("--warmup_loss", default="sum", choices=["sum"], help="sum: the sum-margin loss")
    group.add_argument("--skip_bad_steps", default=0, type=number(int, 0),
                       help="steps in a row with a loss or gradient that is not finite that may pass without update")
    group.add_argument("--collapse_patience", default=50, type=count,
                       help="steps in a row that must look collapsed before --on_collapse acts")
    group.add_argument("--on_collapse", choices=["stop", "warn"],
                       help="what to do then (default: stop; with --max_violation, which may recover, warn)")


def add_start_flags(group):
    """Where a run computes, and from what it starts."""
    count = number(int, 1)
    group.add_argument("--seed", default=0, type=number(int, 0, 2**63 - 1), help="decides weights, order and bank")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda[:n] or mps")
    group.add_argument("--amp", default="off", choices=["off", "bf16"],
                       help="bf16: the encoders' matrix products in bf16; on CUDA the GRU computes in float16")
    group.add_argument("--dist_timeout", default=distributed.TIMEOUT, type=count,
                       help="under torchrun, seconds after which a process that does not answer is given up")
    group.add_argument("--resume", default="", metavar="CHECKPOINT|auto",
                       help="continue this run where it stopped; auto: from the run folder's checkpoint.pth.tar, if "
                       "there is one")
    group.add_argument("--init_from", default="", metavar="CHECKPOINT", help="start from these weights (ours, or the "
                       "released code's); with --resume auto only where there is nothing to continue")
    group.add_argument("--reset_train", action="store_true", help="accepted as in the released code: no effect")


def add_output_flags(group):
    """What is written, and when."""
    count = number(int, 1)
    group.add_argument("--logger_name", default="runs/runX", help="run folder: checkpoints and TensorBoard")
    group.add_argument("--model_name", help="accepted as SCAN's: no effect, files go to --logger_name")
    group.add_argument("--log_step", default=10, type=count, help="steps between log lines")
    group.add_argument("--val_step", default=500, type=count, help="steps between validations")
    group.add_argument("--save_step", type=count, help="steps between checkpoints within an epoch (default: none)")
    group.add_argument("--keep", type=count, help="Epoch-<n> files that --save_all keeps (default: all)")
    group.add_argument("--save_all", action="store_true", help="keep Epoch-<n>-model.pth.tar of every epoch")
    group.add_argument("--record_val", action="store_true", help="append every epoch's rsum to rst_val_<run>")


def _check(opt):
    """Raise InputError for flags that do not go together."""
    hal = not (opt.max_violation or opt.sum_violation)
    if hal and opt.measure == "order":
        raise InputError("--measure order does not go with HAL, whose positive term can never act on a similarity that "
                         "is never positive: add --max_violation or --sum_violation")
    if opt.memory_bank and not hal:
        raise InputError("--memory_bank goes with HAL only: leave out --max_violation and --sum_violation, or the bank")
    useless = {"--measure order": opt.measure == "order", "--image_pooling": opt.image_pooling is not None,
               "--text_pooling": opt.text_pooling != "last", "--use_abs": opt.use_abs,
               "--precomp_enc_type mlp": opt.precomp_enc_type == "mlp"}
    if opt.cross_attn and any(useless.values()):
        raise InputError(f"{next(flag for flag in useless if useless[flag])} does not go with --cross_attn, which "
                         "compares regions with words one by one: leave one of them out")
    if opt.cross_attn and opt.memory_bank:
        raise InputError("--memory_bank does not go with --cross_attn: each image and caption of a step would attend "
                         "to the whole bank, which costs many times the step itself; leave one of them out")
    if opt.precomp_enc_type == "weight_norm" and not opt.cross_attn:
        raise InputError("--precomp_enc_type weight_norm is SCAN's: add --cross_attn, or choose basic or mlp")
    if opt.cnn_type != "vgg19":
        check_choice("cnn_type", opt.cnn_type, cnn_types())
    if opt.init_from and opt.resume not in ("", "auto"):
        raise InputError("--init_from and --resume both name a checkpoint to start from: leave one of them out, or say "
                         "--resume auto")
    if opt.precomp_enc_type == "mlp" and opt.embed_size < 2:
        raise InputError("--precomp_enc_type mlp has half as many hidden units as --embed_size: give 2 or more")
    if opt.keep and not opt.save_all:
        raise InputError("--keep does nothing without --save_all: add that, or leave it out")
    if opt.batch_size < distributed.size():
        raise InputError(f"--batch_size {opt.batch_size} for {distributed.size()} processes: it is the size of the one "
                         "batch that they share, so give at least as many pairs, or start fewer processes")


# Setting up -------------------------------------------------------------------------------------

def log(message):
    """A line on stderr, past the progress bar."""
    tqdm.write(message, file=sys.stderr)


def load_start(opt):
    """(The checkpoint to start from, or None; what describes the data's features, or None).

    Its caption reading is taken over unless a flag forces one. A resumed run's features stay those that they were
    where nothing beside the data describes them any more.
    """
    content = None
    if opt.resume == "auto":
        content, opt.resume = checkpoint.newest(opt.logger_name, log)
        log(f"Resuming {opt.resume}" if opt.resume else
            f"No checkpoint in {opt.logger_name}: starting from {opt.init_from or 'scratch'}")
    path = opt.resume or opt.init_from
    if path and content is None:
        content = checkpoint.load(path)
    known = content and content.get("features")
    features = features_of(opt.data_path, opt.data_name, known, path)
    if opt.caption_reading is None:
        opt.caption_reading = checkpoint.caption_reading(content) if content else "text"
    if opt.caption_reading == "released":
        log("Captions are read as the released code reads them (--caption_reading released)")
    return content, features or (known if opt.resume else None)


def get_vocabulary(opt, start):
    """(The start checkpoint's words, else the vocabulary file's, else new ones; whether they are new)."""
    if start:
        start["opt"].vocab_path = opt.vocab_path
        vocabulary, is_new = checkpoint.vocabulary(start, opt.resume or opt.init_from), False
    else:
        vocabulary = find_vocabulary(opt.vocab_path, opt.data_name)
        is_new = vocabulary is None
        vocabulary = vocabulary or build_vocab(opt.data_path, opt.data_name)
        if opt.drop_words:
            vocabulary.add_word(MASK)
    opt.vocab_size = len(vocabulary)
    return vocabulary, is_new


def build_model(opt, start, device):
    """The model, with the start checkpoint's weights if any; a checkpoint spares the CNN's download."""
    if start:
        opt = type(opt)(**{**vars(opt), "cnn_weights": "none"})
    torch.manual_seed(opt.seed)
    model = build(opt)
    if opt.init_from and not opt.resume:
        for name in checkpoint.MODEL_OPTIONS:
            if getattr(opt, name) != getattr(start["opt"], name):
                raise InputError(f"--init_from {opt.init_from} has --{name} {getattr(start['opt'], name)}, this run "
                                 f"has {getattr(opt, name)}: give the same")
        checkpoint.load_weights(model, start, opt.init_from)
    return model.to(device)


def tensorboard(folder):
    """A TensorBoard logger: `.log_value(tag, value, step)`. The one place that imports tensorboard_logger.

    Where the disk is full, the run goes on without it; the file stays readable.
    """
    os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")  # its protobuf files are of an old make
    from tensorboard_logger import Logger

    class LastingLogger(Logger):
        def _write_event(self, event):
            with suppress(OSError):
                self._writer.flush()  # the rest of an event that did not fit: nothing may come between
                super()._write_event(event)

        def __del__(self):
            with suppress(OSError):
                super().__del__()
    return LastingLogger(folder, flush_secs=5)


class Stop:
    """Remembers that SIGTERM or SIGINT came; a second one acts at once."""

    def __init__(self):
        self.came = self.signal = None  # the latter, once all processes know

    def __call__(self, number, frame):
        if self.came and distributed.launched():  # torchrun sends Ctrl-C once more, and kills after half a minute
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
    """Within this, SIGTERM and SIGINT set `.signal` of the Stop it gives."""
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Training ---------------------------------------------------------------------------------------

class Run:
    """What a run carries from step to step; all of it that matters is in its checkpoints."""

    def __init__(self, opt, model, loaders, vocabulary, features=None):
        self.opt, self.model, self.vocabulary, self.features = opt, model, vocabulary, features
        self.train_loader, self.val_loader = loaders
        self.criterion = ContrastiveLoss(opt)
        attention = partial(cross_attention_similarities, opt=opt)
        self.similarity = attention if opt.cross_attn else self.criterion.similarity
        self.warmup_criterion = ContrastiveLoss(
            argparse.Namespace(**{**vars(opt), "max_violation": False, "sum_violation": True}))
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        kind = partial(torch.optim.AdamW, weight_decay=opt.weight_decay) if opt.weight_decay else torch.optim.Adam
        self.optimizer = kind(self.parameters, lr=opt.learning_rate, fused=model.device.type in ("cpu", "cuda"))
        self.epoch, self.step_in_epoch, self.steps, self.best_rsum = 0, 0, 0, 0.0
        self.bank, self.meters, self.pending, self.watch = None, LogCollector(), [], Watch(opt, log)
        self.path = os.path.join(opt.logger_name, "checkpoint.pth.tar")
        self.scalars = self.log = Nowhere()  # opened when everything else has been found good
        self.stop, self.shared = Stop(), distributed.launched() or opt.micro_batch

    @cached_property
    def data(self):
        """What tells the training data from others."""
        return run_record.fingerprint(self.train_loader.dataset)

    def progress(self):
        """Where within the epoch the run is, for its checkpoint."""
        return {"step_in_epoch": self.step_in_epoch, "bank": self.bank and list(self.bank),
                "meters": self.meters.state(), "watch": self.watch.state()}

    def restore(self, content):
        """Take up a checkpoint's place in its run."""
        self.epoch, self.steps, self.best_rsum, progress = checkpoint.restore(
            content, self.opt.resume, self.model, self.optimizer, self.opt, log)
        if progress:
            self.step_in_epoch = progress["step_in_epoch"]
            self.bank = progress["bank"] and MemoryBank(*(x.to(self.model.device) for x in progress["bank"]))
            self.meters.restore(progress["meters"])
            self.watch.restore(progress["watch"])
        if self.step_in_epoch > len(self.train_loader):
            raise InputError(f"--resume {self.opt.resume}: it stands at step {self.step_in_epoch} of its epoch, and "
                             f"the training data make {len(self.train_loader)}: give the data that it was trained on, "
                             "or start another run with --init_from")
        if content.get("train_fingerprint", self.data) != self.data:
            log("Warning: the training data are not those that this run was trained on so far")
        log(f"Resumed {self.opt.resume}: epoch {self.epoch}, step {self.step_in_epoch} of "
            f"{len(self.train_loader)}, {self.steps} steps in all, best rsum {self.best_rsum:.1f}")


def epoch_criterion(run):
    """The loss of this epoch: the warm-up's in the first --warmup_epochs."""
    return run.warmup_criterion if run.epoch < run.opt.warmup_epochs else run.criterion


def adjust_learning_rate(run):
    """learning_rate * 0.1 ** (epoch // lr_update), and its linear rise over the first --lr_warmup_steps."""
    lr = run.opt.learning_rate * 0.1 ** (run.epoch // run.opt.lr_update)
    if run.steps < run.opt.lr_warmup_steps:
        lr *= (run.steps + 1) / run.opt.lr_warmup_steps
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    return lr


def draw_bank(run):
    """This epoch's memory bank: None without --memory_bank, in the first epoch and in warm-up epochs."""
    if not run.opt.memory_bank or run.epoch == 0 or epoch_criterion(run) is not run.criterion:
        return None
    generator = torch.Generator().manual_seed(seed_for(run.opt.seed, run.epoch, KEEP_DRAW))
    batches = draw_batches(run.train_loader.batches(BANK_DRAW), run.opt.mb_rate, generator)
    bank = shared_bank(run.model, run.train_loader, batches)
    log(f"Memory bank: {len(bank.indices)} pairs")
    return bank


def backward_scale(run, kind, batch):
    """By what a loss is multiplied in the backward pass: 1, but where the GRU computes in float16.

    There HAL, a mean over the batch, would have gradients too small for float16. Times the batch's size (a power of
    two, so that nothing is rounded) they are as large as those of the margin losses, which are sums.
    """
    half = run.opt.amp == "bf16" and run.model.device.type == "cuda"
    return 1 << (batch - 1).bit_length() if half and kind == "hal" else 1


def backward(loss, parameters, scale=1):
    """The parameters' gradients; `scale`: that of `backward_scale`."""
    if scale == 1:
        return loss.backward()
    (loss * scale).backward()
    for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
        gradient /= scale


def batches_of(run):
    """The rest of this epoch's batches, whole or as Shares."""
    batches = run.train_loader.batches()[run.step_in_epoch:]
    if run.shared:
        return shared_batches(run.train_loader, batches, run.opt.micro_batch, run.model.device)
    return run.train_loader.load(batches, augmented=True)


def whole_gradients(run, batch, criterion):
    """A batch's loss and similarities; leaves its gradients in the parameters."""
    images, captions, lengths, _, indices = batch
    embeddings = run.model.forward_emb(images, captions, lengths)
    similarities = run.similarity(*embeddings)
    loss = criterion.of_similarities(similarities, *embeddings[:2], *(run.bank or (None,) * 3), indices)
    run.optimizer.zero_grad()
    backward(loss, run.parameters, backward_scale(run, loss_kind(criterion.opt), len(indices)))
    return loss, similarities


def shared_gradients(run, share, criterion):
    """As `whole_gradients` of the same batch, of which this is one process's Share; what all say, too."""
    own_draws(run.opt.seed, run.steps)
    run.optimizer.zero_grad()
    dataset, crop = run.train_loader.dataset, run.opt.crop_size
    shape = dataset.images.shape[1:] if hasattr(dataset, "images") else (3, crop, crop)
    no_image = torch.empty(0, *shape, device=run.model.device, dtype=run.model.txt_enc.embed.weight.dtype)
    return gradients(run.model, share, criterion, run.similarity, run.bank,
                     backward_scale(run, loss_kind(criterion.opt), len(share.indices)), run.parameters, no_image,
                     run.stop.came or 0)


def train_step(run, batch, criterion):
    """One update, left out where loss or gradient is not finite; returns its StepFigures, still on their device."""
    loss, similarities, *flags = (shared_gradients if run.shared else whole_gradients)(run, batch, criterion)
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, run.opt.grad_clip or torch.inf)
    figures = figures_of(loss, norm, similarities)
    if run.optimizer.defaults["fused"]:
        run.optimizer.found_inf = (1 - figures[1]).float()  # 1 makes the fused step change nothing
        run.optimizer.step()
    elif figures[1]:
        run.optimizer.step()
    run.steps += 1
    run.step_in_epoch += 1
    if distributed.launched():
        run.stop.signal = distributed.agree(*flags, batch.error) or None
    return figures


def train_epoch(run, stop):
    """The rest of an epoch's batches; validates every `val_step` steps, saves every `save_step` and when stopped."""
    criterion, steps = epoch_criterion(run), len(run.train_loader)
    batches, end = batches_of(run), time.time()
    for batch in tqdm(batches, f"Epoch {run.epoch}", steps, initial=run.step_in_epoch, leave=False, disable=None):
        run.model.train_start()
        data_time, lr = time.time() - end, adjust_learning_rate(run)
        figures = train_step(run, batch, criterion)
        size, seconds = len(batch[-1]), time.time() - end  # both kinds of batch end with all indices
        run.pending.append((run.steps, run.step_in_epoch - 1, lr, figures, size, seconds, data_time))
        end = time.time()
        logged = run.steps % run.opt.log_step == 0
        if logged or run.step_in_epoch == steps:
            record(run, loss_kind(criterion.opt))
        if logged:
            log(f"Epoch: [{run.epoch}][{run.step_in_epoch - 1}/{steps}]  {run.meters}")
        if run.step_in_epoch == steps:
            return
        if run.steps % run.opt.val_step == 0:
            show(*validate(run))
        if stop.signal or run.opt.save_step and run.steps % run.opt.save_step == 0:
            record(run, loss_kind(criterion.opt))
            save(run, must_succeed=bool(stop.signal))
        if stop.signal:
            return
        end = time.time()


def record(run, kind):
    """Meters, TensorBoard, log.jsonl and the watch take in the steps since the last record.

    The one place that reads figures from the device, and so waits for it.
    """
    pending, run.pending = run.pending, []
    if not pending:
        return
    rows = torch.stack([figures for _, _, _, figures, *_ in pending]).tolist()
    for row, (step, i, lr, _, size, batch_time, data_time) in zip(rows, pending):
        figures = StepFigures(*row)
        own = [("Loss", figures.loss, size)] * bool(figures.finite)  # a step that is left out has no part in the mean
        for name, value, n in [("Eit", step, 0), ("lr", lr, 0), *own, ("Time", batch_time, 1), ("Data", data_time, 1)]:
            run.meters.update(name, value, n)
        scalars = {"epoch": run.epoch, "step": i, "batch_time": batch_time, "data_time": data_time, "Eit": step,
                   "lr": lr, "Loss": figures.loss, "positive_share": figures.positive_share,
                   "positive_similarity": figures.positive_mean, "negative_similarity": figures.negative_mean}
        for tag, value in scalars.items():
            run.scalars.log_value(tag, value, step)
        if step % run.opt.log_step == 0:
            mean = run.meters.meters["Loss"].avg if "Loss" in run.meters.meters else None
            run.log.write(kind="step", step=step, epoch=run.epoch, lr=lr, mean_loss=mean,
                          **{name: value if figures.finite else None for name, value in figures._asdict().items()})
        run.watch.see(step, lr, figures, size, kind, run.path)


def validate(run):
    """Recalls on the dev split, written to log.jsonl and TensorBoard; returns rsum and the lines to print."""
    started = time.time()
    check_weights(run.model)
    images, captions = embed(run.model, run.val_loader)
    image_of = run.val_loader.dataset.image_of
    loss = split_loss(images, captions, run.criterion, run.opt.batch_size, run.bank, image_of)
    (rankings,) = rank_shifted(similarity_source(run.opt, images, captions), top=max(DEPTHS), image_of=image_of)
    metrics, hubs = metrics_of(rankings), hubness_both_ways(rankings)
    lines = [f"Dev: Loss {loss:.4f}  Time {time.time() - started:.3f}"]
    for title, recall in (("Image to text", metrics.i2t), ("Text to image", metrics.t2i)):
        lines.append(f"{title}: " + ", ".join(f"{value:.1f}" for value in recall))
    lines.append("N_10: " + ", ".join(
        f"{side} skewness {hubs[side][10].skewness:.2f}, anti-hubs {hubs[side][10].anti_hubs:.1%}"
        for side in ("i2t", "t2i")))
    scalars = {**metrics.i2t._asdict(), **{f"{name}i": value for name, value in metrics.t2i._asdict().items()},
               "rsum": metrics.rsum,
               **{f"{side}_n10_{name}": getattr(hubs[side][10], name) for side in ("i2t", "t2i")
                  for name in ("skewness", "anti_hubs")}}
    for name, value in scalars.items():
        run.scalars.log_value(name, value, run.steps)
    run.log.write(kind="validation", step=run.steps, epoch=run.epoch, loss=loss, **scalars)
    return metrics.rsum, lines


def show(rsum, lines):
    """A validation's lines on stderr, its rsum on stdout."""
    log("\n".join(lines))
    tqdm.write(f"rsum: {rsum:.1f}", file=sys.stdout)
    sys.stdout.flush()


# Saving -----------------------------------------------------------------------------------------

def save(run, must_succeed):
    """Write checkpoint.pth.tar; where it can't be and `must_succeed` is not set, say so and go on. True if written."""
    written = distributed.is_first() and _save(run, must_succeed, run.path)
    distributed.sync()
    return written


def _save(run, must_succeed, path):
    try:
        run.log.sync()
        checkpoint.save(path, checkpoint.content_of(run.model, run.optimizer, run.opt, run.vocabulary, run.epoch,
                                                    run.steps, run.best_rsum, run.progress(), run.features, run.data))
        return True
    except InputError as error:
        if must_succeed:
            raise
        log(f"Warning: {error}. Training goes on; the next save may succeed")
        return False


def bring_best(run):
    """See that a resumed run that goes on in another folder finds its best model there."""
    best, before = (os.path.join(folder, "model_best.pth.tar") for folder in (
        run.opt.logger_name, os.path.dirname(run.opt.resume)))
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
        run.best_rsum = 0.0  # that model is not there: the next one is the best that there is


def end_epoch(run, rsum):
    """Write the best checkpoint, what --save_all and --record_val ask for, and the finished epoch's.

    checkpoint.pth.tar is the last one: whoever goes on from it finds the others written, however the run was killed.
    """
    best, before = rsum > run.best_rsum or run.epoch == 0, run.best_rsum
    run.best_rsum = max(rsum, before)
    run.epoch, run.step_in_epoch, run.bank, run.meters = run.epoch + 1, 0, None, LogCollector()
    folder, last = run.opt.logger_name, run.epoch >= run.opt.num_epochs
    if distributed.is_first():
        if best and not _save(run, last, os.path.join(folder, "model_best.pth.tar")):
            run.best_rsum = before
        if run.opt.save_all:
            _save(run, last, os.path.join(folder, f"Epoch-{run.epoch}-model.pth.tar"))
    save(run, must_succeed=last)
    if not distributed.is_first():
        return
    try:
        if run.opt.record_val:
            name = folder.removeprefix("./").removeprefix("runs/").strip("/").replace("/", "_")
            append(os.path.join(folder, f"rst_val_{name}"), f"Epoch: {run.epoch - 1} ; rsum: {rsum:.1f}\n")
    except InputError as error:
        if last:
            raise
        log(f"Warning: {error}. Training goes on")
    if run.opt.save_all and run.opt.keep:
        written = glob.glob(os.path.join(glob.escape(folder), "Epoch-*-model.pth.tar"))
        for path in sorted(written, key=checkpoint.written)[:-run.opt.keep]:  # an older run's go first
            os.unlink(path)


# ------------------------------------------------------------------------------------------------

def main(argv=None):
    """Train as the flags say, on this process or on all that torchrun has started."""
    with distributed.session():
        opt = parse_args(argv)
        distributed.wait_at_most(opt.dist_timeout)
        check_flags(opt)
        carry_out(opt)


def check_flags(opt):
    """Raise InputError where processes were given different flags, but for where things lie on their machines."""
    distributed.check_alike({f"--{name}": digest(repr(value)) for name, value in sorted(vars(opt).items())
                             if name not in LOCAL_FLAGS})


def check_data(loaders, vocabulary):
    """Raise InputError where processes have read different data, or number words differently."""
    if distributed.launched():
        distributed.check_alike({"training data": digest(run_record.fingerprint(loaders[0].dataset)),
                                 "dev data": digest(run_record.fingerprint(loaders[1].dataset)),
                                 "vocabulary": digest("\n".join(vocabulary.words))})


def check_weights(model):
    """Raise RunBroken where the processes' weights are not the same to the bit."""
    if distributed.launched():
        total = torch.stack([value.flatten().view(torch.int32).sum(dtype=torch.int64)
                             for value in model.state_dict().values()])
        totals = distributed.gather(total.unsqueeze(0), [1] * distributed.size())
        if (totals != totals[0]).any():
            raise distributed.RunBroken("the processes' weights have come apart: are the machines of one kind? Go on "
                                        "from the last checkpoint with --resume auto")


def digest(text):
    """A number that tells texts apart: 63 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


class Nowhere:
    """In place of TensorBoard and log.jsonl where none are written."""

    log_value = write = sync = staticmethod(lambda *_, **__: None)


def set_up(opt, device):
    """(The run, whether its vocabulary is new, its Products): from data and, if any, the checkpoint to start from."""
    if opt.data_name in sample_data.WRITERS:
        distributed.machine_by_machine(lambda: sample_data.draw(opt.data_path))
    (start, features), opt.resume, opt.caption_reading = distributed.from_first(
        lambda: (load_start(opt), opt.resume, opt.caption_reading), checkpoint.ADMITTED)
    products = choose_products(device, start and opt.resume and start.get("float32_products"), opt.amp, opt.batch_size,
                               opt.embed_size)
    vocabulary, is_new = get_vocabulary(opt, start)
    loaders = distributed.machine_by_machine(lambda: get_loaders(
        opt.data_name, vocabulary, opt.crop_size, opt.batch_size, min(opt.workers, os.cpu_count()), opt))
    check_data(loaders, vocabulary)
    for loader in loaders:
        loader.dataset.place(device, opt.features_on_device)
    run = Run(opt, build_model(opt, start, device), loaders, vocabulary, features)
    share_batch_norm(run.model)
    if opt.resume:
        run.restore(start)
    return run, is_new, products


def write_new(vocabulary, opt):
    """Write a vocabulary that training has built, now that the data it was built from has been found good."""
    path = vocabulary_path(opt.vocab_path, opt.data_name)
    write_vocabulary(vocabulary_of([word for word in vocabulary.words if word != MASK]), path)
    log(f"There was no vocabulary: built {path} with {len(vocabulary)} words")


def carry_out(opt):
    """Train as the options say."""
    device = choose_device(opt.device)
    last, resuming = os.path.join(opt.logger_name, "checkpoint.pth.tar"), opt.resume == "auto"
    written = checkpoint.written(last)
    run, is_new, products = set_up(opt, device)
    if not distributed.is_first():
        with stoppable() as stop:
            train(run, stop)
        return
    if is_new:
        write_new(run.vocabulary, opt)
    held = run_record.lock(opt.logger_name)
    if resuming and checkpoint.written(last) != written:
        raise InputError(f"--resume auto: another run has written {last} in the meantime: start again")
    if opt.resume:
        bring_best(run)
    if opt.memory_bank and opt.num_epochs <= max(1, opt.warmup_epochs):
        log("Warning: the memory bank comes with the second epoch, after any --warmup_epochs: this run ends before, "
            "and trains without it")
    log(f"Device: {device}, float32 products: {products}, amp: {amp_in_words(opt.amp, device, products)}")
    run.scalars, run.log = tensorboard(opt.logger_name), run_record.Log(opt.logger_name, run.steps)
    note = run_record.Record(opt.logger_name, opt, device, run.train_loader.dataset, run.steps)
    outcome, why = "failed", {}
    try:
        with stoppable() as stop:
            train(run, stop)
        outcome = signal.Signals(stop.signal).name if stop.signal else "finished"
    except GaveUp as error:
        outcome, why = "gave up", {"why": str(error)}
        raise
    finally:
        with suppress(InputError) if outcome in ("failed", "gave up") else nullcontext():  # whose own error says more
            note.end(outcome=outcome, epochs=run.epoch, steps=run.steps, best_rsum=run.best_rsum, **why)
        held.close()
    if stop.signal:
        log(f"Stopped. Go on with: --resume {run.path}")
        if not distributed.launched():  # which starts processes again that end with anything but 0
            sys.exit(128 + stop.signal)


def train(run, stop):
    """Epoch after epoch, until the last or a signal."""
    run.stop = stop
    distributed.sync()  # the first process has opened its files
    while run.epoch < run.opt.num_epochs and not stop.signal:
        run.train_loader.epoch = run.epoch
        if run.step_in_epoch == 0:
            run.bank = draw_bank(run)
        train_epoch(run, stop)
        if run.step_in_epoch == len(run.train_loader):
            rsum, lines = validate(run)
            try:
                end_epoch(run, rsum)  # first the files, so that nothing is lost where it cannot be printed
            finally:
                show(rsum, lines)
            stop.signal = distributed.sync(flag=stop.came or 0) or stop.signal


if __name__ == "__main__":
    run_script(main, outlasts_reader=True)
