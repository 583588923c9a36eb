"""Run a function in two processes joined by gloo, for tests."""

import os
import socket

import torch
import torch.multiprocessing as mp

from training import start_ranks


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _run(rank, world_size, port, function, config, args, out):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with start_ranks(config) as ranks:
        torch.save(function(ranks, *args), f"{out}/{rank}.pt")


def on_ranks(world_size, function, config, args, out):
    """Call function(ranks, *args) on each of world_size processes; returns what each returned.

    out: an empty directory.
    """
    mp.start_processes(_run, (world_size, free_port(), function, config, args, str(out)), world_size)
    return [torch.load(f"{out}/{rank}.pt", weights_only=False) for rank in range(world_size)]
