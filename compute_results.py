"""Evaluate a checkpoint: recall@K both ways, over a whole split or five folds of it.

    python3 compute_results.py --model_path runs/runX/model_best.pth.tar --data_path data

COCO's two settings are `--split testall` (5K) and `--split testall --fold5` (mean of five 1Ks).
Reads checkpoints of the released scripts, too.
"""

from errors import ArgumentParser, number, run_script
from evaluation import evalrank
from vocab import READINGS


def parse_args(argv=None):
    """The script's flags."""
    parser = ArgumentParser("Evaluate a checkpoint of train.py or of the released code.")
    source = parser.add_argument_group("what to evaluate")
    source.add_argument("--model_path", default="runs/runX/model_best.pth.tar", help="checkpoint file")
    source.add_argument("--data_path", help="folder that holds the data sets (default: the checkpoint's)")
    source.add_argument("--vocab_path", help="folder of the vocabulary (default: the checkpoint's own words, or its "
                                             "vocab_path where it carries none)")
    source.add_argument("--split", default="test", choices=["train", "dev", "val", "test", "testall"],
                        help="split of the data set")
    source.add_argument("--fold5", action="store_true", help="mean over five equal folds (COCO 1K)")
    source.add_argument("--skip_broken_images", action="store_true",
                        help="leave out raw images that cannot be decoded")
    source.add_argument("--caption_reading", choices=READINGS,
                        help="how captions become words (default: as in the checkpoint's training)")
    machine = parser.add_argument_group("how")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda[:n] or mps")
    machine.add_argument("--batch_size", type=number(int, 1),
                         help="items encoded at a time (default: the checkpoint's)")
    output = parser.add_argument_group("what to write")
    output.add_argument("--save_csv", metavar="FILE", help="append the figures to FILE (FILE_fold1 and FILE_fold5 "
                                                           "with --fold5)")
    output.add_argument("--save_json", metavar="FILE", help="write all figures at full precision")
    output.add_argument("--save_embeddings", action="store_true",
                        help="write <run folder's name>_img_and_cap_embeddings.npz, one row a caption")
    return parser.parse_args(argv)


def main(argv=None):
    """Evaluate what the flags name."""
    options = parse_args(argv)
    evalrank(options, options.split)


if __name__ == "__main__":
    run_script(main)
