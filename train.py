"""Train a visual-semantic embedding with HAL or a margin loss.

    python3 train.py                                  # the embedded sample data
    python3 train.py --data_name f30k_precomp --data_path data --batch_size 128 \\
        --learning_rate 0.001 --lr_update 8 --num_epochs 13 --local_alpha 60.00 --local_ep 0.7

HAL: Liu et al., "Improved Text-Image Matching by Mitigating Visual Semantic Hubs", AAAI 2020.
Flags and defaults are the released code's. Log lines go to stderr, rsum to stdout, scalars to
TensorBoard, checkpoints to --logger_name.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports ends the script without a traceback; run_script undoes this.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hashlib
import os
import sys
import time
from contextlib import nullcontext, suppress

import torch
from tqdm import tqdm

from data import found_form, get_loaders, with_found
from evaluation import embed, split_loss
from features.description import features_of
from features.texts import frozen_texts
from inputs import sample_data
from inputs.word_ids import unknown_in_words
from inputs.word_vectors import read_word_vectors
from layers.batch_norm import share_batch_norm
from memory_bank import draw_batches
from model import build
from retrieval.hubness import DEPTHS, hubness_both_ways
from retrieval.metrics import metrics_of
from retrieval.ranking import rank_shifted
from retrieval.similarity import similarity_source
from runtime import distributed
from runtime.device import amp_in_words, choose_device, choose_products
from runtime.errors import InputError, run_script
from runtime.files import lock
from runtime.finite import check_size
from runtime.seeds import own_draws, seed_for
from training import checkpoint, run_record
from training.families import FAMILIES, model_in_words
from training.options import SCAN_DEFAULTS, parse_args
from training.run import (
    Run,
    bring_best,
    end_epoch,
    epoch_criterion,
    giving_up,
    log,
    record,
    save,
    stoppable,
    tensorboard,
)
from training.shares import gradients, shared_bank, shared_batches
from training.watch import GaveUp, figures_of
from vocab import (
    MASK,
    build_vocab,
    find_vocabulary,
    vocabulary_of,
    vocabulary_path,
    write_vocabulary,
)

# These may differ between the machines of one run.
LOCAL_FLAGS = {
    *("data_path", "vocab_path", "texts_path", "cache_dir", "workers", "features_on_device")
}
# Streams of an epoch's random numbers, so that the bank does not change training's order (0).
BANK_DRAW = 1  # order of the bank's batches
KEEP_DRAW = 2  # which of them are kept


def load_start(opt):
    """What a run starts from: (checkpoint, features, {"resume": path, "caption_reading": reading}).

    The checkpoint and features, which is the features' description, may be None. The checkpoint
    also decides how captions are read, unless --caption_reading does. If the data have no
    features.json, a resumed run keeps the description in its checkpoint.
    """
    content, resume = None, opt.resume
    if resume == "auto":
        content, resume = checkpoint.newest(opt.logger_name, log)
        log(
            f"Resuming {resume}"
            if resume
            else f"No checkpoint in {opt.logger_name}: starting from {opt.init_from or 'scratch'}"
        )
    path = resume or opt.init_from
    if path and content is None:
        content = checkpoint.load(path)
    known = content and content.get("features")
    features = features_of(opt.data_path, opt.data_name, known, path)
    reading = opt.caption_reading or (checkpoint.caption_reading(content) if content else "text")
    if reading == "released":
        log("Captions are read as the released code reads them (--caption_reading released)")
    found = {"resume": resume, "caption_reading": reading}
    return content, features or (known if resume else None), found


def get_vocabulary(opt, start):
    """(The Vocabulary; whether it is new, so that its file is still to be written).

    It is the start checkpoint's, else that of the file in --vocab_path, else built from the
    training captions.
    """
    if opt.text_features and not start:
        folder = os.path.join(opt.data_path, opt.data_name)
        return frozen_texts(opt.texts_path, folder), False
    if start:
        start["opt"].vocab_path = opt.vocab_path
        start["opt"].texts_path = opt.texts_path
        vocabulary, is_new = checkpoint.vocabulary(start, opt.resume or opt.init_from), False
    else:
        vocabulary = find_vocabulary(opt.vocab_path, opt.vocab_name or opt.data_name)
        is_new = vocabulary is None
        vocabulary = vocabulary or build_vocab(opt.data_path, opt.data_name)
        if opt.drop_words:
            vocabulary.add_word(MASK)
    return vocabulary, is_new


def build_model(opt, start, device, vocabulary=None):
    """The model on its device, with the start checkpoint's weights if there is one.

    vocabulary: its words begin with their --word_vectors in a new model.
    """
    if start:  # its weights replace the CNN's, which need no download then
        opt = with_found(opt, cnn_weights="none")
    torch.manual_seed(opt.seed)
    model = build(opt)
    if opt.init_from and not opt.resume:
        for name in checkpoint.MODEL_OPTIONS:
            if getattr(opt, name) != getattr(start["opt"], name):
                raise InputError(
                    f"--init_from {opt.init_from} has --{name} {getattr(start['opt'], name)}, this "
                    f"run has {getattr(opt, name)}: give the same"
                )
        checkpoint.load_weights(model, start, opt.init_from)
    if opt.word_vectors and not start:
        begin_with_word_vectors(model, vocabulary.words, opt)
    return model.to(device)


def begin_with_word_vectors(model, words, opt):
    """Put the vectors of --word_vectors into the text encoder, and log how many words have one."""
    rows, found = read_word_vectors(opt.word_vectors, words)
    if rows.shape[1] != opt.word_dim:
        raise InputError(
            f"--word_vectors {opt.word_vectors} has {rows.shape[1]} numbers a word, and --word_dim "
            f"is {opt.word_dim}: add --word_dim {rows.shape[1]}"
        )
    model.txt_enc.take_word_vectors(rows, found)
    if distributed.is_first():
        log(
            f"Word vectors: {int(found.sum()):,} of the vocabulary's {len(words):,} words are in "
            f"{opt.word_vectors}; the others begin at random"
        )


def adjust_learning_rate(run):
    """Set this step's learning rate and return it.

    It is learning_rate * 0.1 ** (epoch // lr_update), after a linear rise over the first
    --lr_warmup_steps.
    """
    lr = run.opt.learning_rate * 0.1 ** (run.epoch // run.opt.lr_update)
    if run.steps < run.opt.lr_warmup_steps:
        lr *= (run.steps + 1) / run.opt.lr_warmup_steps
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    return lr


def draw_bank(run):
    """This epoch's MemoryBank; None without --memory_bank, in the first and in warm-up epochs."""
    if not run.opt.memory_bank or run.epoch == 0 or epoch_criterion(run) is not run.criterion:
        return None
    generator = torch.Generator().manual_seed(seed_for(run.opt.seed, run.epoch, KEEP_DRAW))
    batches = draw_batches(run.train_loader.batches(BANK_DRAW), run.opt.mb_rate, generator)
    bank = shared_bank(run.model, run.train_loader, batches)
    log(f"Memory bank: {len(bank.indices)} pairs")
    return bank


def backward_scale(run, criterion, batch):
    """The factor of the loss in the backward pass: 1 unless the GRU computes in float16.

    In float16 the gradients of a mean over the batch, such as HAL, would underflow. Multiplied by
    the batch size, they are as large as those of the margin losses, which are sums. The factor is
    the next power of two, so that nothing is rounded.
    """
    half = run.opt.amp == "bf16" and run.model.device.type == "cuda"
    return 1 << (batch - 1).bit_length() if half and criterion.entry.is_mean else 1


def backward(loss, parameters, scale=1):
    """Leave the loss's gradients in the parameters; scale: as `backward_scale` gives it."""
    if scale == 1:
        return loss.backward()
    (loss * scale).backward()
    for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
        gradient /= scale


def batches_of(run):
    """The rest of this epoch's batches, whole or as Shares."""
    batches = run.train_loader.batches()[run.step_in_epoch :]
    if run.shared:
        return shared_batches(run.train_loader, batches, run.opt.micro_batch, run.model.device)
    return run.train_loader.load(batches, augmented=True)


def whole_gradients(run, batch, criterion):
    """(A batch's loss, its similarities (B, B)); leaves the gradients in the parameters."""
    images, captions, lengths, _, indices = batch
    embeddings = run.model.forward_emb(images, captions, lengths)
    similarities = run.similarity(*embeddings)
    loss = criterion.of_similarities(
        similarities, *embeddings[:2], *(run.bank or (None,) * 3), indices
    )
    run.optimizer.zero_grad()
    backward(loss, run.parameters, backward_scale(run, criterion, len(indices)))
    return loss, similarities


def shared_gradients(run, share, criterion):
    """(Loss, similarities, flags) of the whole batch, from this process's Share of it.

    Leaves the gradients of the whole batch in the parameters, as `whole_gradients` does. flags:
    (processes, 2), each one's error and signal, as `distributed.agree` takes them.
    """
    own_draws(run.opt.seed, run.steps)
    run.optimizer.zero_grad()
    dataset, crop = run.train_loader.dataset, run.opt.crop_size
    shape = dataset.images.shape[1:] if hasattr(dataset, "images") else (3, crop, crop)
    no_image = torch.empty(0, *shape, device=run.model.device, dtype=run.model.txt_enc.dtype)
    return gradients(
        run.model,
        share,
        criterion,
        run.similarity,
        run.bank,
        backward_scale(run, criterion, len(share.indices)),
        run.parameters,
        no_image,
        run.stop.came or 0,
    )


def train_step(run, batch, criterion):
    """Update the weights, unless the loss or its gradient is not finite.

    Returns the step's StepFigures as a tensor (5,), still on its device.
    """
    loss, similarities, *flags = (shared_gradients if run.shared else whole_gradients)(
        run, batch, criterion
    )
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, run.opt.grad_clip or torch.inf)
    figures = figures_of(loss, norm, similarities)
    if run.optimizer.defaults["fused"]:
        # 1 makes the fused step change nothing; an `if` here would wait for the GPU.
        run.optimizer.found_inf = (1 - figures[1]).float()
        run.optimizer.step()
    elif figures[1]:
        run.optimizer.step()
    run.steps += 1
    run.step_in_epoch += 1
    if distributed.launched():
        run.stop.signal = distributed.agree(*flags, batch.error) or None
    return figures


def train_epoch(run, stop):
    """Train on the rest of an epoch's batches.

    Validates every --val_step steps; saves every --save_step steps and when a signal stops the run.
    """
    criterion, steps = epoch_criterion(run), len(run.train_loader)
    batches, end = batches_of(run), time.time()
    for batch in tqdm(
        batches, f"Epoch {run.epoch}", steps, initial=run.step_in_epoch, leave=False, disable=None
    ):
        run.model.train_start()
        data_time, lr = time.time() - end, adjust_learning_rate(run)
        figures = train_step(run, batch, criterion)
        size, seconds = len(batch[-1]), time.time() - end  # batch[-1]: the whole batch's indices
        run.pending.append(
            (run.steps, run.step_in_epoch - 1, lr, figures, size, seconds, data_time)
        )
        end = time.time()
        logged = run.steps % run.opt.log_step == 0
        if logged or run.step_in_epoch == steps:
            record(run, criterion.entry.collapse)
        if logged:
            log(f"Epoch: [{run.epoch}][{run.step_in_epoch - 1}/{steps}]  {run.meters}")
        if run.step_in_epoch == steps:
            return
        if run.steps % run.opt.val_step == 0:
            show(*validate(run))
        if stop.signal or run.opt.save_step and run.steps % run.opt.save_step == 0:
            record(run, criterion.entry.collapse)
            save(run, must_succeed=bool(stop.signal))
        if stop.signal:
            return
        end = time.time()


def validate(run):
    """Evaluate on the dev split; returns (rsum, the lines to print).

    Writes all figures to log.jsonl and TensorBoard. Raises GaveUp if the weights are too large or
    the embeddings not finite, and if training has collapsed.
    """
    started = time.time()
    check_weights(run.model, run.criterion)
    with giving_up(run):
        check_size(run.model)
        images, captions = embed(run.model, run.val_loader)
    image_of = run.val_loader.dataset.image_of
    loss = split_loss(images, captions, run.criterion, run.opt.batch_size, run.bank, image_of)
    (rankings,) = rank_shifted(
        similarity_source(run.opt, images, captions), top=max(DEPTHS), image_of=image_of
    )
    metrics, hubs = metrics_of(rankings), hubness_both_ways(rankings)
    run.watch.see_recalls(
        run.steps,
        run.optimizer.param_groups[0]["lr"],
        (metrics.i2t.r10, metrics.t2i.r10),
        run.val_loader.dataset.n_images,
        epoch_criterion(run).entry.collapse,
    )
    lines = [f"Dev: Loss {loss:.4f}  Time {time.time() - started:.3f}", *in_words(metrics, hubs)]
    scalars = scalars_of(metrics, hubs)
    for name, value in scalars.items():
        run.scalars.log_value(name, value, run.steps)
    run.log.write(kind="validation", step=run.steps, epoch=run.epoch, loss=loss, **scalars)
    return metrics.rsum, lines


def in_words(metrics, hubs):
    """Yield a validation's lines: the recalls of both directions, and the hubness N_10."""
    for title, recall in (("Image to text", metrics.i2t), ("Text to image", metrics.t2i)):
        yield f"{title}: " + ", ".join(f"{value:.1f}" for value in recall)
    sides = ((side, hubs[side][10]) for side in ("i2t", "t2i"))
    yield "N_10: " + ", ".join(
        f"{side} skewness {own.skewness:.2f}, anti-hubs {own.anti_hubs:.1%}" for side, own in sides
    )


def scalars_of(metrics, hubs):
    """{name: value} of a validation, for log.jsonl and TensorBoard; `i` marks text to image."""
    return {
        **metrics.i2t._asdict(),
        **{f"{name}i": value for name, value in metrics.t2i._asdict().items()},
        "rsum": metrics.rsum,
        **{
            f"{side}_n10_{name}": getattr(hubs[side][10], name)
            for side in ("i2t", "t2i")
            for name in ("skewness", "anti_hubs")
        },
    }


def show(rsum, lines):
    """Print a validation's lines to stderr and its rsum to stdout."""
    log("\n".join(lines))
    tqdm.write(f"rsum: {rsum:.1f}", file=sys.stdout)
    sys.stdout.flush()


# ------------------------------------------------------------------------------------------------


def main(argv=None):
    """Train as the flags say, in this process or in all that torchrun has started."""
    with distributed.session():
        opt = parse_args(argv)
        distributed.wait_at_most(opt.dist_timeout)
        check_flags(opt)
        carry_out(opt)


def check_flags(opt):
    """Raise InputError if the processes have different flags, LOCAL_FLAGS aside."""
    distributed.check_alike(
        {
            f"--{name}": digest(repr(value))
            for name, value in sorted(vars(opt).items())
            if name not in LOCAL_FLAGS
        }
    )


def check_data(loaders, vocabulary):
    """Raise InputError if the data cannot be trained on.

    There must be more than one image, and all processes must have read the same data and number
    the words alike.
    """
    if loaders[0].dataset.n_images == 1:
        raise InputError(
            f"the training split has one image, with {len(loaders[0].dataset)} captions: every "
            "loss compares it with others, so give two images or more"
        )
    if distributed.launched():
        distributed.check_alike(
            {
                "training data": digest(run_record.fingerprint(loaders[0].dataset)),
                "dev data": digest(run_record.fingerprint(loaders[1].dataset)),
                "vocabulary": digest("\n".join(vocabulary.words)),
            }
        )


def check_weights(*parts):
    """Raise RunBroken unless all processes have the same weights, to the bit."""
    if distributed.launched():
        total = torch.stack(
            [
                value.flatten().view(torch.int32).sum(dtype=torch.int64)
                for part in parts
                for value in part.state_dict().values()
            ]
        )
        totals = distributed.gather(total.unsqueeze(0), [1] * distributed.size())
        if (totals != totals[0]).any():
            raise distributed.RunBroken(
                "the processes' weights have come apart: are the machines of one kind? Go on "
                "from the last checkpoint with --resume auto"
            )


def digest(text):
    """A text's fingerprint: 63 bits of its SHA-256, as an int."""
    return (
        int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
        >> 1
    )


def set_up(opt, device):
    """(The Run, whether its vocabulary is new, the kind of its float32 products).

    Reads the data and, if there is one, the checkpoint to start from.
    """
    if opt.data_name in sample_data.WRITERS:
        distributed.machine_by_machine(lambda: sample_data.draw(opt.data_path))
    noted = run_record.noted_products(opt.logger_name) if opt.resume == "auto" else None
    start, features, found = distributed.from_first(lambda: load_start(opt), checkpoint.ADMITTED)
    opt = with_found(opt, **found)
    kept = start.get("float32_products") if start and opt.resume else noted
    products = choose_products(device, kept, opt.amp, opt.batch_size, opt.embed_size)
    vocabulary, is_new = get_vocabulary(opt, start)
    opt = with_found(opt, vocab_size=len(vocabulary))
    loaders = distributed.machine_by_machine(
        lambda: get_loaders(
            opt.data_name,
            vocabulary,
            opt.crop_size,
            opt.batch_size,
            min(opt.workers, os.cpu_count()),
            opt,
        )
    )
    opt = with_found(opt, **found_form(loaders[0].dataset, opt))
    check_data(loaders, vocabulary)
    for loader in loaders:
        loader.dataset.place(device, opt.features_on_device)
    run = Run(opt, build_model(opt, start, device, vocabulary), loaders, vocabulary, features)
    share_batch_norm(run.model)
    if opt.resume:
        run.restore(start)
    return run, is_new, products


def warnings_of(run):
    """Yield a line for each flag that does less than its user may expect."""
    opt = run.opt
    if run.epoch >= opt.num_epochs:
        yield (
            "Warning: nothing is trained and no checkpoint written: --num_epochs is "
            f"{opt.num_epochs}, and this run has {run.epoch} epochs behind it"
        )
    if opt.max_violation and opt.sum_violation:
        yield (
            "Warning: --max_violation wins over --sum_violation, as in the released code: the "
            "loss is max-margin"
        )
    if opt.memory_bank and opt.num_epochs <= max(1, opt.warmup_epochs):
        yield (
            "Warning: the memory bank comes with the second epoch, after any --warmup_epochs: "
            "this run ends before, and trains without it"
        )


def first_look(run, device, products):
    """Yield the log's first lines: unknown words, what is trained, and on what it is computed."""
    opt = run.opt
    for loader, split in ((run.train_loader, "train"), (run.val_loader, "dev")):
        yield unknown_in_words(loader.dataset.word_ids, split)
    photos = run.train_loader.dataset.n_images
    yield (
        f"Training {model_in_words(opt)}, {opt.embed_size:,} dimensions, on {opt.data_name} "
        f"({photos:,} photos), {device}"
    )
    yield from hints(opt)
    yield (
        f"Device: {device}, float32 products: {products}, amp: "
        f"{amp_in_words(opt.amp, device, products)}"
    )


def hints(opt):
    """Yield a line for flags of SCAN's that have no effect, and for VSE++'s loss with HAL's epochs.

    Either may be a command of that code, and means another run there.
    """
    of_scan = [name for name, value in SCAN_DEFAULTS.items() if getattr(opt, name) != value]
    if of_scan and not opt.cross_attn and opt.model_family != "vse_infty":
        flags = ", ".join(f"--{name}" for name in of_scan)
        yield (
            f"Note: {flags} would be SCAN's and has no effect here, since a VSE is trained: "
            "add --model_family scan for SCAN with its defaults, or --cross_attn t2i or i2t"
        )
    of_hal = FAMILIES["hal"].defaults
    if (
        (opt.max_violation or opt.sum_violation)
        and not (opt.model_family or opt.cross_attn)
        and all(getattr(opt, name) == value for name, value in of_hal.items())
    ):
        yield (
            f"Note: {opt.num_epochs} epochs and --lr_update {opt.lr_update} are HAL's code's: add "
            "--model_family vsepp for VSE++'s, 30 and 15"
        )


def write_new(vocabulary, opt):
    """Write the vocabulary that training has built; called once its data have proved good."""
    path = vocabulary_path(opt.vocab_path, opt.vocab_name or opt.data_name)
    write_vocabulary(vocabulary_of([word for word in vocabulary.words if word != MASK]), path)
    log(f"There was no vocabulary: built {path} with {len(vocabulary)} words")


def carry_out(opt):
    """Set up the run, train, and record how it ended."""
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
    held = run.held = lock(opt.logger_name)
    if resuming and checkpoint.written(last) != written:
        raise InputError(
            f"--resume auto: another run has written {last} in the meantime: start again"
        )
    if run.opt.resume:
        bring_best(run)
    for line in (*warnings_of(run), *first_look(run, device, products)):
        log(line)
    run.scalars = tensorboard(opt.logger_name)
    run.log = run_record.step_log(opt.logger_name, run.steps)
    if opt.record_val:
        run.rsums = run_record.epoch_log(opt.logger_name, run.epoch)
    note = run_record.Record(
        opt.logger_name,
        run.opt,
        device,
        run.train_loader.dataset,
        run.steps,
        device.type == "cpu" and products.kind or None,
        held,
    )
    train_and_note(run, note)


def train_and_note(run, note):
    """Train the run, and write to its Record how it ended."""
    outcome, why = "failed", {}
    try:
        with stoppable() as stop:
            train(run, stop)
        outcome = signal.Signals(stop.signal).name if stop.signal else "finished"
    except GaveUp as error:
        outcome, why = "gave up", {"why": str(error)}
        raise
    finally:
        # After a failure, its own error says more than a run.json that cannot be written.
        with suppress(InputError) if outcome in ("failed", "gave up") else nullcontext():
            note.end(
                outcome=outcome, epochs=run.epoch, steps=run.steps, best_rsum=run.best_rsum, **why
            )
        run.held.close()
    if stop.signal:
        log(f"Stopped. Go on with: --resume {run.path}")
        if not distributed.launched():  # torchrun restarts processes that end with another code
            sys.exit(128 + stop.signal)


def train(run, stop):
    """Train epoch after epoch, until the last one or a signal."""
    run.stop = stop
    distributed.sync()  # wait until the first process has opened its files
    while run.epoch < run.opt.num_epochs and not stop.signal:
        run.train_loader.epoch = run.epoch
        if run.step_in_epoch == 0:
            run.bank = draw_bank(run)
        train_epoch(run, stop)
        if run.step_in_epoch == len(run.train_loader):
            rsum, lines = validate(run)
            try:
                end_epoch(run, rsum)  # before printing, which may fail
            finally:
                show(rsum, lines)
            stop.signal = distributed.sync(flag=stop.came or 0) or stop.signal


if __name__ == "__main__":
    run_script(main, outlasts_reader=True)
