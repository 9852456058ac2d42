"""Train a visual-semantic embedding with HAL or a margin loss.

    python3 train.py                                  # the embedded sample data
    python3 train.py --data_name f30k_precomp --data_path data --batch_size 128 --learning_rate 0.001 \\
        --lr_update 8 --num_epochs 13 --local_alpha 60.00 --local_ep 0.7

HAL: Liu et al., "Improved Text-Image Matching by Mitigating Visual Semantic Hubs", AAAI 2020.
Flags and defaults are the released code's. Log lines go to stderr, rsum to stdout, scalars to
TensorBoard, checkpoints to --logger_name.
"""

import argparse
import os
import sys
import time

import torch
from tqdm import tqdm

import checkpoint
import sample_data
from data import get_loaders, seed_for
from device import choose_device, choose_matmul_precision
from errors import ArgumentParser, InputError, number, run_script
from evaluation import LogCollector, embed, metrics_of, split_loss
from loss import ContrastiveLoss
from memory_bank import build_bank, draw_batches
from model import VSE, cnn_types
from vocab import READINGS, build_vocab, find_vocabulary, vocabulary_path, write_vocabulary

BANK_DRAW = 1  # the bank's order of an epoch, beside training's 0
KEEP_DRAW = 2


def parse_args(argv=None):
    """The script's flags; original names and defaults."""
    parser = ArgumentParser("Train a visual-semantic embedding with HAL or a margin loss.")
    count, positive, share = number(int, 1), number(float, 0, low_allowed=False), number(float, 0)

    data = parser.add_argument_group("data")
    data.add_argument("--data_path", default="data", help="folder that holds the data sets")
    data.add_argument("--data_name", default="sample_precomp",
                      help="data set: *_precomp (features), coco, f8k, f30k, or any folder with dataset_<name>.json")
    data.add_argument("--vocab_path", default="./vocab/", help="folder of <data_name>_vocab.json or .pkl")
    data.add_argument("--cache_dir", help="folder for tokenized captions (default: <data_path>/.cache)")
    data.add_argument("--features_on_device", action=argparse.BooleanOptionalAction,
                      help="keep the features in GPU memory (default: where they fit in half of what is free)")
    data.add_argument("--caption_reading", choices=READINGS,
                      help="how captions become words (default: text, or as in the checkpoint that is started from)")
    data.add_argument("--use_restval", action="store_true", help="coco: train on the restval captions, too")
    data.add_argument("--crop_size", default=224, type=count, help="pixels of the random training crop (raw images)")
    data.add_argument("--workers", default=10, type=number(int, 0), help="processes that decode raw images")

    model = parser.add_argument_group("model")
    model.add_argument("--word_dim", default=300, type=count, help="width of the word embedding")
    model.add_argument("--embed_size", default=1024, type=count, help="width of the joint embedding")
    model.add_argument("--num_layers", default=1, type=count, help="layers of the GRU")
    model.add_argument("--img_dim", type=count, help="width of the precomputed features (default: that of the file)")
    model.add_argument("--cnn_type", default="vgg19", help="torchvision's VGG or ResNet for raw images")
    model.add_argument("--cnn_weights", default="imagenet", help="imagenet, none (random), or a state dict file")
    model.add_argument("--finetune", action="store_true", help="train the CNN, too")
    model.add_argument("--measure", default="cosine", choices=["cosine", "order"], help="similarity")
    model.add_argument("--use_abs", action="store_true", help="absolute value of the embeddings")
    model.add_argument("--no_imgnorm", action="store_true", help="do not normalise the image embeddings")

    loss = parser.add_argument_group("loss (HAL unless a margin loss is chosen)")
    loss.add_argument("--margin", default=0.2, type=share, help="margin of the hinge losses")
    loss.add_argument("--max_violation", action="store_true", help="max-margin (VSE++): the hardest negatives")
    loss.add_argument("--sum_violation", action="store_true", help="sum-margin: all negatives")
    loss.add_argument("--local_alpha", default=30.0, type=positive, help="HAL: scale a in exp(a (S_ij - e))")
    loss.add_argument("--local_ep", default=0.3, type=float, help="HAL: margin e in exp(a (S_ij - e))")
    loss.add_argument("--memory_bank", action="store_true", help="HAL: global weights from a memory bank, from the "
                                                                 "second epoch on")
    loss.add_argument("--global_alpha", default=40.0, type=share, help="bank: scale g of the positive weights w_i")
    loss.add_argument("--global_beta", default=40.0, type=share, help="bank: scale b of the pair weights W_ij")
    loss.add_argument("--global_ep_posi", default=0.2, type=float, help="bank: e+ of w_i (it cancels: no effect)")
    loss.add_argument("--global_ep_nega", default=0.1, type=float, help="bank: e- in exp(b P_ik - e-)")
    loss.add_argument("--mb_k", default=250, type=count, help="bank: nearest neighbours that count")
    loss.add_argument("--mb_rate", default=0.05, type=number(float, 0, 1, low_allowed=False),
                      help="bank: share of the training pairs it holds")

    training = parser.add_argument_group("training")
    training.add_argument("--num_epochs", default=15, type=number(int, 0), help="epochs in all")
    training.add_argument("--batch_size", default=128, type=count, help="pairs a step")
    training.add_argument("--learning_rate", default=0.0002, type=positive, help="Adam's initial learning rate")
    training.add_argument("--lr_update", default=8, type=count, help="epochs after which it is divided by 10")
    training.add_argument("--grad_clip", default=2.0, type=share, help="largest gradient norm (0: no clipping)")
    training.add_argument("--seed", default=0, type=number(int, 0, 2**63 - 1), help="decides weights, order and bank")
    training.add_argument("--device", default="auto", help="auto, cpu, cuda[:n] or mps")
    training.add_argument("--amp", default="off", choices=["off", "bf16"],
                          help="bf16: the encoders' matrix products in bf16")
    start = training.add_mutually_exclusive_group()
    start.add_argument("--resume", default="", metavar="CHECKPOINT", help="continue this run where it stopped")
    start.add_argument("--init_from", default="", metavar="CHECKPOINT", help="start from these weights (ours, or the "
                                                                             "released code's)")
    training.add_argument("--reset_train", action="store_true", help="accepted as in the released code: no effect")

    output = parser.add_argument_group("output")
    output.add_argument("--logger_name", default="runs/runX", help="run folder: checkpoints and TensorBoard")
    output.add_argument("--log_step", default=10, type=count, help="steps between log lines")
    output.add_argument("--val_step", default=500, type=count, help="steps between validations")
    output.add_argument("--save_all", action="store_true", help="keep Epoch-<n>-model.pth.tar of every epoch")
    output.add_argument("--record_val", action="store_true", help="append every epoch's rsum to rst_val_<run>")
    opt = parser.parse_args(argv)
    opt.cache_dir = opt.cache_dir or os.path.join(opt.data_path, ".cache")
    _check(opt)
    return opt


def _check(opt):
    """Raise InputError for flags that do not go together."""
    hal = not (opt.max_violation or opt.sum_violation)
    if hal and opt.measure == "order":
        raise InputError("--measure order does not go with HAL, whose positive term can never act on a similarity that "
                         "is never positive: add --max_violation or --sum_violation")
    if opt.memory_bank and not hal:
        raise InputError("--memory_bank goes with HAL only: leave out --max_violation and --sum_violation, or the bank")
    if opt.cnn_type != "vgg19" and opt.cnn_type not in cnn_types():
        raise InputError(f"--cnn_type is {opt.cnn_type}: choose one of {', '.join(cnn_types())}")


# Setting up -------------------------------------------------------------------------------------

def log(message):
    """A line on stderr, past the progress bar."""
    tqdm.write(message, file=sys.stderr)


def load_start(opt):
    """The checkpoint to start from, or None; its caption reading is taken over unless a flag forces one."""
    content = checkpoint.load(opt.resume or opt.init_from) if opt.resume or opt.init_from else None
    if opt.caption_reading is None:
        opt.caption_reading = checkpoint.caption_reading(content) if content else "text"
    if opt.caption_reading == "released":
        log("Captions are read as the released code reads them (--caption_reading released)")
    return content


def get_vocabulary(opt, start):
    """The start checkpoint's words, else the vocabulary file's, else a new file's; sets opt.vocab_size."""
    vocabulary = checkpoint.vocabulary(start, opt.resume or opt.init_from) if start else None
    vocabulary = vocabulary or find_vocabulary(opt.vocab_path, opt.data_name)
    if vocabulary is None:
        vocabulary = build_vocab(opt.data_path, opt.data_name)
        path = vocabulary_path(opt.vocab_path, opt.data_name)
        write_vocabulary(vocabulary, path)
        log(f"There was no vocabulary: built {path} with {len(vocabulary)} words")
    if start and start["opt"].vocab_size != len(vocabulary):
        raise InputError(f"the vocabulary for {opt.data_name} in {opt.vocab_path} has {len(vocabulary)} words, the "
                         f"checkpoint {opt.resume or opt.init_from} was trained with {start['opt'].vocab_size}: name "
                         "the right one with --vocab_path")
    opt.vocab_size = len(vocabulary)
    return vocabulary


def build_model(opt, start, device):
    """The model, with the start checkpoint's weights if any; a checkpoint spares the CNN's download."""
    if start:
        opt = type(opt)(**{**vars(opt), "cnn_weights": "none"})
    torch.manual_seed(opt.seed)
    model = VSE(opt)
    if opt.init_from:
        for name in checkpoint.MODEL_OPTIONS[1:]:
            if name != "finetune" and getattr(opt, name) != getattr(start["opt"], name):
                raise InputError(f"--init_from {opt.init_from} has --{name} {getattr(start['opt'], name)}, this run "
                                 f"has {getattr(opt, name)}: give the same")
        checkpoint.load_weights(model, start, opt.init_from)
    return model.to(device)


def tensorboard(folder):
    """A TensorBoard logger: `.log_value(tag, value, step)`. The one place that imports tensorboard_logger."""
    os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")  # its protobuf files are of an old make
    try:
        os.makedirs(folder, exist_ok=True)
        from tensorboard_logger import Logger
        return Logger(folder, flush_secs=5)
    except OSError as error:
        raise InputError(f"--logger_name {folder} cannot be written ({error.strerror}): name another folder") from error


# Training ---------------------------------------------------------------------------------------

class Run:
    """What a run carries from step to step."""

    def __init__(self, opt, model, loaders, vocabulary, scalars):
        self.opt, self.model, self.vocabulary, self.scalars = opt, model, vocabulary, scalars
        self.train_loader, self.val_loader = loaders
        self.criterion = ContrastiveLoss(opt)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=opt.learning_rate,
                                          fused=model.device.type in ("cpu", "cuda"))
        self.epoch, self.steps, self.best_rsum = 0, 0, 0.0


def adjust_learning_rate(run):
    """learning_rate * 0.1 ** (epoch // lr_update)"""
    for group in run.optimizer.param_groups:
        group["lr"] = run.opt.learning_rate * 0.1 ** (run.epoch // run.opt.lr_update)


def draw_bank(run):
    """This epoch's memory bank: None without --memory_bank and in the first epoch."""
    if not run.opt.memory_bank or run.epoch == 0:
        return None
    generator = torch.Generator().manual_seed(seed_for(run.opt.seed, run.epoch, KEEP_DRAW))
    run.train_loader.epoch = run.epoch
    batches = draw_batches(run.train_loader.batches(BANK_DRAW), run.opt.mb_rate, generator)
    bank = build_bank(run.model, run.train_loader.load(batches))
    log(f"Memory bank: {len(bank.indices)} pairs")
    return bank


def train_step(run, batch, bank):
    """One update; returns the loss, still on its device."""
    images, captions, lengths, _, indices = batch
    embeddings = run.model.forward_emb(images, captions, lengths)
    loss = run.criterion(*embeddings, *(bank or (None,) * 3), indices)
    run.optimizer.zero_grad()
    loss.backward()
    if run.opt.grad_clip > 0:
        torch.nn.utils.clip_grad_norm_(run.parameters, run.opt.grad_clip)
    run.optimizer.step()
    run.steps += 1
    return loss.detach()


def train_epoch(run, bank):
    """All batches of an epoch, with a validation every `val_step` steps."""
    run.train_loader.epoch = run.epoch
    meters, pending, end = LogCollector(), [], time.time()
    steps = len(run.train_loader)
    for i, batch in enumerate(tqdm(run.train_loader, f"Epoch {run.epoch}", steps, leave=False, disable=None)):
        run.model.train_start()
        data_time = time.time() - end
        loss = train_step(run, batch, bank)
        pending.append((run.steps, i, loss, len(batch[1]), time.time() - end, data_time))
        end = time.time()
        if run.steps % run.opt.log_step == 0 or i + 1 == steps:
            record(run, meters, pending)
            pending = []
        if run.steps % run.opt.log_step == 0:
            log(f"Epoch: [{run.epoch}][{i}/{steps}]  {meters}")
        if run.steps % run.opt.val_step == 0 and i + 1 < steps:
            validate(run, bank)
            end = time.time()


def record(run, meters, pending):
    """Meters and TensorBoard take in the steps since the last record; reading their losses waits for them."""
    lr = run.optimizer.param_groups[0]["lr"]
    losses = torch.stack([loss for _, _, loss, *_ in pending]).tolist()
    for loss, (step, i, _, size, batch_time, data_time) in zip(losses, pending):
        meters.update("Eit", step)
        meters.update("lr", lr)
        meters.update("Loss", loss, size)
        meters.update("Time", batch_time, 1)
        meters.update("Data", data_time, 1)
        scalars = {"epoch": run.epoch, "step": i, "batch_time": batch_time, "data_time": data_time, "Eit": step,
                   "lr": lr, "Loss": loss}
        for tag, value in scalars.items():
            run.scalars.log_value(tag, value, step)


def validate(run, bank):
    """Recalls on the dev split, logged and printed; returns rsum."""
    started = time.time()
    images, captions = embed(run.model, run.val_loader)
    with torch.no_grad():
        loss = split_loss(images, captions, run.criterion, run.opt.batch_size, bank)
    metrics, _ = metrics_of(images, captions, run.opt.measure)
    log(f"Dev: Loss {loss:.4f}  Time {time.time() - started:.3f}")
    for title, recall in (("Image to text", metrics.i2t), ("Text to image", metrics.t2i)):
        log(f"{title}: " + ", ".join(f"{value:.1f}" for value in recall))
    tqdm.write(f"rsum: {metrics.rsum:.1f}", file=sys.stdout)
    sys.stdout.flush()
    scalars = {**metrics.i2t._asdict(), **{f"{name}i": value for name, value in metrics.t2i._asdict().items()},
               "rsum": metrics.rsum}
    for name, value in scalars.items():
        run.scalars.log_value(name, value, run.steps)
    return metrics.rsum


def save_epoch(run, rsum):
    """End the epoch: write its checkpoint, the best one, and what --save_all and --record_val ask for."""
    run.epoch += 1
    folder = run.opt.logger_name
    path = os.path.join(folder, "checkpoint.pth.tar")
    best, run.best_rsum = rsum > run.best_rsum, max(rsum, run.best_rsum)
    checkpoint.save(path, checkpoint.content_of(run.model, run.optimizer, run.opt, run.vocabulary, run.epoch,
                                                run.steps, run.best_rsum))
    if best:
        checkpoint.copy(path, os.path.join(folder, "model_best.pth.tar"))
    if run.opt.save_all:
        checkpoint.copy(path, os.path.join(folder, f"Epoch-{run.epoch}-model.pth.tar"))
    if run.opt.record_val:
        name = folder.removeprefix("./").removeprefix("runs/").strip("/").replace("/", "_")
        with open(os.path.join(folder, f"rst_val_{name}"), "a", encoding="utf-8") as file:
            file.write(f"Epoch: {run.epoch - 1} ; rsum: {rsum:.1f}\n")


def main(argv=None):
    """Train as the flags say."""
    opt = parse_args(argv)
    device = choose_device(opt.device)
    log(f"Device: {device}, float32 products: {choose_matmul_precision(device)}, amp: {opt.amp}")
    if opt.data_name in sample_data.WRITERS:
        sample_data.draw(opt.data_path)
    start = load_start(opt)
    vocabulary = get_vocabulary(opt, start)
    loaders = get_loaders(opt.data_name, vocabulary, opt.crop_size, opt.batch_size,
                          min(opt.workers, os.cpu_count()), opt)
    for loader in loaders:
        loader.dataset.place(device, opt.features_on_device)
    run = Run(opt, build_model(opt, start, device), loaders, vocabulary, tensorboard(opt.logger_name))
    if opt.resume:
        run.epoch, run.steps, run.best_rsum = checkpoint.restore(start, opt.resume, run.model, run.optimizer, opt)
        log(f"Resumed {opt.resume}: {run.epoch} epochs, {run.steps} steps, best rsum {run.best_rsum:.1f}")
    while run.epoch < opt.num_epochs:
        adjust_learning_rate(run)
        bank = draw_bank(run)
        train_epoch(run, bank)
        save_epoch(run, validate(run, bank))


if __name__ == "__main__":
    run_script(main)
