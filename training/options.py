"""train.py's flags, and which of them go together."""

import argparse
import os

from inputs.captions import data_set_name, is_precomputed
from inputs.tokenizer import READINGS
from layers.cross_attention import AGGREGATIONS, NORMS
from layers.pretrained import cnn_types
from loss import LOSSES, find_loss, loss_kind
from model import ENC_TYPES, IMAGE_POOLINGS, TEXT_ENCODERS, TEXT_POOLINGS
from runtime import distributed
from runtime.errors import ArgumentParser, InputError, check_choice, number, path_type
from training.families import FAMILIES, add_family_flags, take_family
from training.model_folder import model_type

# Largest values: width of a vector, layers, pixels of a side.
WIDEST, DEEPEST, LARGEST_CROP = 2**16, 100, 4096
MOST = 2**31 - 1  # largest count that a checkpoint may have
EXTREME = 1e6  # largest scale or margin; with larger ones, float32 has no precision left
COUNT = number(int, 1)


# SCAN's flags that do nothing without --cross_attn.
SCAN_DEFAULTS = {
    "model_name": None,
    "raw_feature_norm": "clipped_l2norm",
    "agg_func": "LogSumExp",
    "lambda_lse": 6.0,
    "lambda_softmax": 9.0,
}


def parse_args(argv=None):
    """The options of a run; names and defaults are the released code's."""
    parser = ArgumentParser("Train a visual-semantic embedding with HAL or a margin loss.")
    group = parser.add_argument_group
    add_family_flags(group("whose defaults"))  # first, since --resume compares flags in this order
    add_data_flags(group("data"))
    add_photo_flags(group("photos, for data sets without precomputed features"))
    add_model_flags(group("model"))
    add_image_flags(group("image encoder"))
    add_text_flags(group("text encoder"))
    add_attention_flags(group("cross attention over regions (SCAN), instead of VSE"))
    add_loss_flags(group("loss"))
    add_bank_flags(group("memory bank, for HAL's global weights"))
    add_batch_flags(group("epochs and batches"))
    add_optimizer_flags(group("optimizer"))
    add_augmentation_flags(group("augmentation and warm-up"))
    add_alarm_flags(group("steps that go wrong"))
    add_machine_flags(group("seed and machine"))
    add_start_flags(group("start"))
    add_output_flags(group("output"))
    opt = parser.parse_args(argv)
    if opt.model_family:
        parser.set_defaults(**FAMILIES[opt.model_family].defaults)
        opt = parser.parse_args(argv)
    take_family(opt)
    opt.cache_dir = opt.cache_dir or os.path.join(opt.data_path, ".cache")
    opt.loss = check_loss_flags(opt)
    check_text_features(opt)
    check_model_flags(opt)
    check_run_flags(opt)
    return opt


def add_data_flags(group):
    """Where the data are, and how captions are read."""
    group.add_argument(
        "--data_path", type=path_type, default="data", help="folder that holds the data sets"
    )
    group.add_argument(
        "--data_name",
        default="sample_precomp",
        type=data_set_name,
        help="data set: *_precomp (features), coco, f8k, f30k, or any folder with "
        "dataset_<name>.json",
    )
    group.add_argument(
        "--vocab_path",
        type=path_type,
        default="./vocab/",
        help="folder of <data_name>_vocab.json or .pkl; without one, it is built and kept there",
    )
    group.add_argument(
        "--caption_reading",
        choices=READINGS,
        help="how captions are split into words: text, or as the released code does (default: as "
        "in the checkpoint to start from, else text)",
    )
    group.add_argument(
        "--cache_dir",
        type=path_type,
        help="folder that keeps tokenized captions for the next start (default: "
        "<data_path>/.cache)",
    )
    group.add_argument(
        "--features_on_device",
        action=argparse.BooleanOptionalAction,
        help="keep the features in GPU memory (default: if they fit in half of what is free)",
    )


def add_photo_flags(group):
    """Data sets of photos, which a CNN encodes."""
    group.add_argument(
        "--cnn_type", default="vgg19", help="the CNN: a VGG or ResNet of torchvision's"
    )
    group.add_argument(
        "--cnn_weights",
        type=path_type,
        default="imagenet",
        help="the CNN's first weights: imagenet, none (random), or a state dict file",
    )
    group.add_argument("--finetune", action="store_true", help="also train the CNN")
    group.add_argument(
        "--crop_size",
        default=224,
        type=number(int, 32, LARGEST_CROP),
        help="side of the random training crop, in pixels",
    )
    group.add_argument(
        "--workers", default=10, type=number(int, 0, MOST - 1), help="processes that decode photos"
    )
    group.add_argument("--use_restval", action="store_true", help="also train on the split restval")
    group.add_argument(
        "--skip_broken_images",
        action="store_true",
        help="check all photos at the start and leave out those that cannot be decoded, instead of "
        "ending at one",
    )


def add_model_flags(group):
    """The joint embedding."""
    group.add_argument(
        "--embed_size",
        default=1024,
        type=number(int, 2, WIDEST),
        help="width of the joint embedding",
    )
    group.add_argument(
        "--measure",
        default="cosine",
        choices=["cosine", "order"],
        help="similarity; order goes with --max_violation or --sum_violation",
    )
    group.add_argument(
        "--use_abs", action="store_true", help="take the absolute values of the embeddings"
    )
    group.add_argument(
        "--no_imgnorm", action="store_true", help="do not normalise image embeddings to length 1"
    )
    group.add_argument(
        "--no_txtnorm", action="store_true", help="do not normalise caption embeddings to length 1"
    )


def add_image_flags(group):
    """The encoder of precomputed features."""
    group.add_argument(
        "--img_dim",
        type=number(int, 1),
        help="width of the precomputed features (default: that of the file)",
    )
    group.add_argument(
        "--precomp_enc_type",
        default="basic",
        choices=[*ENC_TYPES, "weight_norm"],
        help="basic: one linear layer; mlp: VSE-infinity's encoder of regions; weight_norm: SCAN's",
    )
    group.add_argument(
        "--img_layers",
        default=1,
        type=number(int, 1, DEEPEST),
        help="linear layers over the features, with ReLU between them",
    )
    group.add_argument(
        "--image_pooling",
        choices=IMAGE_POOLINGS,
        help="how an image's regions become one vector (default: mean)",
    )


def add_text_flags(group):
    """The encoder of captions."""
    group.add_argument(
        "--text_encoder",
        default="gru",
        choices=[name for name in TEXT_ENCODERS if name != "features"],
        help="what reads the words",
    )
    group.add_argument(
        "--text_features",
        action="store_true",
        help="train on {split}_txts.npy, a frozen text model's vectors of the captions, in place "
        "of words",
    )
    group.add_argument(
        "--texts_path",
        type=path_type,
        metavar="FOLDER",
        help="folder of {split}_txts.npy (default: the captions')",
    )
    group.add_argument(
        "--txt_layers",
        default=1,
        type=number(int, 1, DEEPEST),
        help="linear layers over --text_features, with ReLU between them",
    )
    group.add_argument(
        "--word_dim", default=300, type=number(int, 1, WIDEST), help="width of a word's embedding"
    )
    group.add_argument(
        "--word_vectors",
        type=path_type,
        metavar="FILE",
        help="begin with these vectors of words: GloVe's .txt, or a .npy with its words in a .txt "
        "beside it (default: random)",
    )
    group.add_argument(
        "--num_layers",
        default=1,
        type=number(int, 1, DEEPEST),
        help="layers of the GRU or transformer",
    )
    group.add_argument(
        "--text_pooling",
        default="last",
        choices=TEXT_POOLINGS,
        help="how a caption's words become one vector",
    )
    group.add_argument(
        "--bi_gru",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="read captions in both directions and take the mean of the states",
    )


def add_attention_flags(group):
    """SCAN, Lee et al., ECCV 2018."""
    group.add_argument(
        "--cross_attn",
        choices=["t2i", "i2t"],
        help="train SCAN; t2i: words attend to regions, i2t: regions to words (default: train VSE)",
    )
    group.add_argument(
        "--raw_feature_norm",
        default="clipped_l2norm",
        choices=NORMS,
        help="how similarities of words and regions are normalised before the softmax",
    )
    group.add_argument(
        "--agg_func",
        default="LogSumExp",
        choices=[*AGGREGATIONS],
        help="how a pair's scores, one for each word (t2i) or region (i2t), become one",
    )
    group.add_argument(
        "--lambda_lse",
        default=6.0,
        type=number(float, 0, EXTREME, low_allowed=False),
        help="sharpness of LogSumExp",
    )
    group.add_argument(
        "--lambda_softmax",
        default=9.0,
        type=number(float, 0, EXTREME),
        help="sharpness of the attention",
    )


def add_loss_flags(group):
    """The loss and its numbers."""
    group.add_argument(
        "--loss",
        metavar="NAME",
        help=f"{', '.join(LOSSES)}, or module:function in a file of your own (default: hal)",
    )
    group.add_argument(
        "--max_violation",
        action="store_true",
        help="same as --loss max: VSE++'s max-margin loss, of the hardest negatives",
    )
    group.add_argument(
        "--sum_violation",
        action="store_true",
        help="same as --loss sum: the sum-margin loss, of all negatives",
    )
    for flag in dict.fromkeys(flag for entry in LOSSES.values() for flag in entry.flags):
        group.add_argument(
            f"--{flag.name}",
            default=flag.default,
            help=flag.help,
            type=number(float, max(flag.low, -EXTREME), EXTREME, low_allowed=flag.low_allowed),
        )


def add_bank_flags(group):
    """The memory bank."""
    positive = number(float, 0, EXTREME, low_allowed=False)
    finite = number(float, -EXTREME, EXTREME)
    group.add_argument(
        "--memory_bank",
        action="store_true",
        help="weight HAL's pairs by a memory bank, from the second epoch on",
    )
    group.add_argument(
        "--mb_rate",
        default=0.05,
        type=number(float, 0, 1, low_allowed=False),
        help="share of the training pairs in the bank",
    )
    group.add_argument(
        "--mb_k",
        default=250,
        type=COUNT,
        help="nearest entries of the bank that count, at most --batch_size",
    )
    group.add_argument(
        "--global_alpha", default=40.0, type=positive, help="scale g of the positive weights w_i"
    )
    group.add_argument(
        "--global_beta", default=40.0, type=positive, help="scale b of the pair weights W_ij"
    )
    group.add_argument(
        "--global_ep_nega", default=0.1, type=finite, help="e- in exp(b P_ik - e-), for W_ij"
    )
    group.add_argument(
        "--global_ep_posi",
        default=0.2,
        type=finite,
        help="e+ of w_i: no effect, since it cancels; accepted as in the released code",
    )


def add_batch_flags(group):
    """How long it is trained, and on how much at a time."""
    group.add_argument(
        "--num_epochs",
        type=number(int, 0),
        help="epochs in all (default: 15, with --cross_attn 30; or --model_family's)",
    )
    group.add_argument(
        "--batch_size",
        default=128,
        type=number(int, 1, MOST),
        help="pairs in a batch, over all processes",
    )
    group.add_argument(
        "--micro_batch",
        type=COUNT,
        metavar="N",
        help="encode N pairs at a time: the exact loss of a large batch in the memory of a small "
        "one, for a second pass through the encoders (default: the whole batch)",
    )


def add_optimizer_flags(group):
    """The steps of Adam."""
    not_negative = number(float, 0)
    group.add_argument(
        "--learning_rate",
        default=0.0002,
        type=number(float, 0, low_allowed=False),
        help="Adam's initial learning rate",
    )
    group.add_argument(
        "--lr_update",
        type=COUNT,
        metavar="N",
        help="divide the learning rate by 10 every N epochs (default: 8, with --cross_attn 15; "
        "or --model_family's)",
    )
    group.add_argument(
        "--lr_warmup_steps",
        default=0,
        type=number(int, 0),
        metavar="N",
        help="raise the learning rate linearly over the first N steps",
    )
    group.add_argument(
        "--weight_decay", default=0.0, type=not_negative, help="weight decay of AdamW; 0 is Adam"
    )
    group.add_argument(
        "--grad_clip",
        default=2.0,
        type=not_negative,
        help="largest norm of the gradient; 0 does not clip",
    )


def add_augmentation_flags(group):
    """What makes training harder, or its beginning easier."""
    rate = number(float, 0, 1)
    group.add_argument(
        "--drop_regions",
        default=0.0,
        type=rate,
        help="share of an image's regions left out in training (for SCAN, replaced by zeros)",
    )
    group.add_argument(
        "--drop_words",
        default=0.0,
        type=rate,
        help="share of words changed in training: half of them become <mask>, a tenth a random "
        "word, and the others are left out",
    )
    group.add_argument(
        "--warmup_epochs",
        default=0,
        type=number(int, 0),
        metavar="N",
        help="train the first N epochs with the sum-margin loss",
    )


def add_alarm_flags(group):
    """What to do about a step or a run that fails."""
    group.add_argument(
        "--skip_bad_steps",
        default=0,
        type=number(int, 0),
        metavar="N",
        help="skip up to N steps in a row whose loss or gradient is not finite, instead of ending "
        "at the first",
    )
    group.add_argument(
        "--collapse_patience",
        default=50,
        type=COUNT,
        help="steps in a row that must look collapsed before --on_collapse acts",
    )
    group.add_argument(
        "--on_collapse",
        choices=["stop", "warn"],
        help="end a collapsed run, or only say so (default: stop; with --max_violation, which may "
        "recover, warn)",
    )


def add_machine_flags(group):
    """What decides random numbers, and on what is computed."""
    group.add_argument(
        "--seed",
        default=0,
        type=number(int, 0, 2**63 - 1),
        help="decides initial weights, order of the data, and bank",
    )
    group.add_argument(
        "--device", default="auto", help="where to compute: auto, cpu, cuda[:n] or mps"
    )
    group.add_argument(
        "--amp",
        default="off",
        choices=["off", "bf16"],
        help="bf16: compute the encoders' matrix products in bf16, on CUDA the GRU's in float16",
    )
    group.add_argument(
        "--dist_timeout",
        default=distributed.TIMEOUT,
        type=COUNT,
        metavar="SECONDS",
        help="under torchrun, how long to wait for a process before giving it up",
    )


def add_start_flags(group):
    """From what a run starts."""
    group.add_argument(
        "--resume",
        default="",
        metavar="CHECKPOINT|auto",
        help="continue a run from its checkpoint; auto: from the one in --logger_name, if there is "
        "one (default: start a new run)",
    )
    group.add_argument(
        "--init_from",
        type=model_type,
        metavar="CHECKPOINT",
        help="start a new run from these weights, ours or the released code's; with --resume auto, "
        "only if there is nothing to continue",
    )
    group.add_argument(
        "--reset_train", action="store_true", help="no effect; accepted as in the released code"
    )


def add_output_flags(group):
    """What is written, and when."""
    group.add_argument(
        "--logger_name",
        type=path_type,
        default="runs/runX",
        help="folder for checkpoints, logs and TensorBoard",
    )
    group.add_argument(
        "--model_name", help="no effect, since files go to --logger_name; accepted as in SCAN"
    )
    group.add_argument("--log_step", default=10, type=COUNT, help="steps between log lines")
    group.add_argument("--val_step", default=500, type=COUNT, help="steps between validations")
    group.add_argument(
        "--save_step",
        type=COUNT,
        help="steps between checkpoints within an epoch (default: only after an epoch)",
    )
    group.add_argument(
        "--save_all", action="store_true", help="also keep Epoch-<n>-model.pth.tar of every epoch"
    )
    group.add_argument(
        "--keep",
        type=COUNT,
        metavar="N",
        help="with --save_all, keep only the last N (default: all)",
    )
    group.add_argument(
        "--record_val", action="store_true", help="append every epoch's rsum to rst_val_<run>"
    )


# Flags that do not go together ------------------------------------------------------------------


def check_loss_flags(opt):
    """The name of the loss; raises InputError if the flags of the loss do not go together."""
    kind = loss_kind(opt)
    if opt.loss not in (None, kind):
        raise InputError(
            f"--loss {opt.loss} and --{kind}_violation name two losses: leave one of them out"
        )
    try:
        loss = find_loss(kind)
    except ValueError as error:
        raise InputError(f"--loss {kind}: {error}") from error
    if kind == "hal" and opt.measure == "order":
        raise InputError(
            "--measure order does not go with HAL, whose positive term has no gradient for a "
            "similarity that is never positive: add --max_violation or --sum_violation"
        )
    if opt.memory_bank and not loss.takes_weights:
        raise InputError(
            f"--memory_bank goes with HAL only, and --loss is {kind}: leave one of them out"
        )
    return kind


def check_text_features(opt):
    """Choose the text encoder of --text_features; raises InputError if other flags contradict it."""
    if not opt.text_features:
        if opt.txt_layers > 1 or opt.texts_path:
            flag = "--texts_path" if opt.texts_path else "--txt_layers"
            raise InputError(f"{flag} goes with --text_features: add that, or leave it out")
        return
    of_words = {
        "--cross_attn": opt.cross_attn,
        "--text_encoder transformer": opt.text_encoder != "gru",
        "--bi_gru": opt.bi_gru,
        "--text_pooling": opt.text_pooling != "last",
        "--drop_words": opt.drop_words,
        "--num_layers": opt.num_layers > 1,
        "--caption_reading": opt.caption_reading,
        "--word_vectors": opt.word_vectors,
    }
    for flag, given in of_words.items():
        if given:
            raise InputError(
                f"{flag} does not go with --text_features, which gives one vector a caption "
                "instead of words: leave one of them out"
            )
    if not is_precomputed(opt.data_name):
        raise InputError(
            f"--text_features is for precomputed features (*_precomp), and {opt.data_name} holds "
            "photos: make features of them with extract_features.py"
        )
    opt.text_encoder, opt.num_layers = "features", opt.txt_layers


def check_model_flags(opt):
    """Raise InputError if the flags of the model do not go together."""
    useless = {
        "--measure order": opt.measure == "order",
        "--image_pooling": opt.image_pooling is not None,
        "--text_pooling": opt.text_pooling != "last",
        "--text_encoder transformer": opt.text_encoder != "gru",
        "--use_abs": opt.use_abs,
        "--precomp_enc_type mlp": opt.precomp_enc_type == "mlp",
        "--img_layers": opt.img_layers > 1,
    }
    if opt.cross_attn and any(useless.values()):
        raise InputError(
            f"{next(flag for flag in useless if useless[flag])} does not go with --cross_attn, "
            "which compares regions with words one by one: leave one of them out"
        )
    if opt.cross_attn and opt.memory_bank:
        raise InputError(
            "--memory_bank does not go with --cross_attn: each image and caption of a step would "
            "attend to the whole bank, which costs many times the step itself; leave one of them "
            "out"
        )
    if opt.precomp_enc_type == "weight_norm" and not opt.cross_attn:
        raise InputError(
            "--precomp_enc_type weight_norm is SCAN's: add --cross_attn, or choose basic or mlp"
        )
    if opt.precomp_enc_type == "mlp" and opt.img_layers > 1:
        raise InputError(
            "--img_layers is for --precomp_enc_type basic, and mlp has layers of its own: leave "
            "one of them out"
        )
    if opt.cnn_type != "vgg19":
        check_choice("cnn_type", opt.cnn_type, cnn_types())


def check_run_flags(opt):
    """Raise InputError if the flags of start, output and batch do not go together."""
    if opt.init_from and opt.resume not in ("", "auto"):
        raise InputError(
            "--init_from and --resume both name a checkpoint to start from: leave one of them out, "
            "or say --resume auto"
        )
    if opt.keep and not opt.save_all:
        raise InputError("--keep does nothing without --save_all: add that, or leave it out")
    if opt.batch_size < distributed.size():
        raise InputError(
            f"--batch_size {opt.batch_size} is too small for {distributed.size()} processes, which "
            "share one batch: give at least as many pairs, or start fewer processes"
        )
    if opt.batch_size == 1:
        raise InputError(
            "--batch_size 1 leaves every loss without negatives, which are the other pairs of the "
            "batch: give 2 or more (--micro_batch 1 encodes one at a time)"
        )
