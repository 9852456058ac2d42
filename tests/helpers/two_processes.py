"""What each of two processes runs in tests/test_your_own_model.py: the page's code with gloo.

python tests/helpers/two_processes.py RANK FOLDER

FOLDER/batch.pt holds the whole batch and the two encoders' weights. Each process takes its half of
the pairs, runs both blocks and saves its losses and gradients as FOLDER/found<RANK>.pt.
"""

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from loss import HAL
from tests.helpers.pages import code


class Both(nn.Module):
    """An image and a text encoder, a linear layer each."""

    def __init__(self, weights):
        super().__init__()
        self.image, self.text = (nn.Linear(*w.shape[::-1], False).double() for w in weights)
        self.load_state_dict({"image.weight": weights[0], "text.weight": weights[1]})

    def forward(self, images, texts):
        return normalize(self.image(images)), normalize(self.text(texts))


def main(rank, folder):
    """Run the page's blocks on this process's half of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    images, texts, image_ids, *weights = torch.load(f"{folder}/batch.pt")
    half = slice(rank * len(images) // 2, (rank + 1) * len(images) // 2)
    model = DistributedDataParallel(Both(weights))
    names, found = {"image_ids": image_ids[half], "criterion": HAL(30, 0.7)}, {}
    for block, result in enumerate(("loss", "share")):
        model.zero_grad()
        names["im"], names["s"] = model(images[half], texts[half])
        exec(code("Several processes", block), names)
        found[result] = names[result].detach()
        found[f"slopes of {result}"] = [one.grad.clone() for one in model.parameters()]
    torch.save(found, f"{folder}/found{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads may still run, and then end the interpreter's way out with SIGABRT


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    main(int(sys.argv[1]), sys.argv[2])
