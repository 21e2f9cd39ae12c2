"""A function of a module of checks, run by some processes that have formed a group."""

import importlib

import torch
from helpers import in_processes


def work(rank, count, folder, module, check, *args):
    from torch.distributed import destroy_process_group, init_process_group

    torch.set_num_threads(1)
    init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    try:
        getattr(importlib.import_module(module), check)(rank, *args)  # there, since DTensor takes long to import
    finally:
        destroy_process_group()


def in_a_group(count, folder, module, check, *args):
    in_processes(count, work, count, str(folder), module, check, *args)
