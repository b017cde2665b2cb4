"""Train as tools/train_net.py, then save the gradients of a small DEQDet, one image for each rank.

Rank 0 writes them to OUTPUT_DIR/gradients; each rank adds a line to OUTPUT_DIR/places.
"""

from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from detectron2.utils import comm

from deqdet.engine import argument_parser, load_config, parse_arguments, run
from deqdet.tools import train_net

from helpers.gradients import CASES, batch, build, gradients


def work(args) -> None:
    train_net.work(args)
    folder, rank = Path(load_config(args).OUTPUT_DIR), comm.get_rank()
    torch.set_num_threads(1)
    found = [gradients(DistributedDataParallel(build()), batch(case)[rank : rank + 1]) for case in CASES[:2]]
    if rank == 0:
        torch.save(found, folder / "gradients")
    place = f"{rank} {comm.get_world_size()} {comm.get_local_rank()} {comm.get_local_size()}\n"
    with open(folder / "places", "a") as file:
        file.write(place)


if __name__ == "__main__":
    run(work, parse_arguments(argument_parser(), joins=True))
