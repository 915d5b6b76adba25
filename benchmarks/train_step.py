"""Training steps of one evaluation network per second of processor time, which other jobs on the machine hardly change.

python benchmarks/train_step.py [--data fashion-mnist] [--network convnet] [--images 100] [--steps 15] [--precision bf16] [--compile on]

To compare two versions of the library, run it alternately with PYTHONPATH set to either one's `src`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

from potstill.compiling import PRECISIONS, keep_memory
from potstill.data import load_data
from potstill.functional import Key
from potstill.networks import network
from potstill.training import PROTOCOLS, Trainer


def main() -> None:
    """Warm up, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--network", default="convnet")
    parser.add_argument("--protocol", default="dsa")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--precision", default="bf16", choices=tuple(PRECISIONS))
    parser.add_argument("--compile", default="on", choices=("on", "off"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_memory()
    data = load_data(args.data)
    net = network(args.network, data.shape, data.task.outputs).at(PRECISIONS[args.precision])
    trainer = Trainer(net, PROTOCOLS[args.protocol], data.task, args.compile == "on", "cpu")
    pair = (data.prepare(data.train.inputs[: args.images]), data.train.labels[: args.images])
    for epochs in (3, args.steps):  # the first makes graphs and takes memory
        trainer.protocol = replace(trainer.protocol, epochs=epochs)
        begin, steps = time.process_time(), trainer.steps(args.images)
        trainer.fit([pair], [Key(0)], lambda n: None)
        spent = time.process_time() - begin
    print(f"{net.name}, {args.images} images, {args.precision}: {steps / spent:.2f} steps per second of processor time")


if __name__ == "__main__":
    main()
