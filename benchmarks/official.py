"""The official code of DC, DSA and DM at work, for comparison only: nothing of it is in this repository.

It is `VICO-UoE/DatasetCondensation` at the commit below. Its `utils.py` and `networks.py` are imported as they are, from a
folder that is named; networks, augmentation, gradient distance and training loop are its functions. One outer step of its
programs is played by calling them. All shapes here have three channels and more than one image per class, where that code
runs on today's PyTorch as it stands; what it needs to be imported is put in place while the program runs.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import time
import types
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

REPOSITORY = "VICO-UoE/DatasetCondensation"
COMMIT = "53f63a672eab9ade02aabe6432706ef56f317d64"
BLOBS = {  # git's own hashes of the files at that commit
    "utils.py": "2fc134f88fc77c5dc6bb8833f7a88392f549da6a",
    "networks.py": "cdebf2ea016b337517d419301e6996c096b777ba",
}
STRATEGY = "color_crop_cutout_flip_scale_rotate"
Go = Callable[[], dict[str, float]]


def commit_of(folder: Path) -> str:
    """The commit, where both files are what it has.

    Raises:
        SystemExit: They are not there, or others.
    """
    for name, blob in BLOBS.items():
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise SystemExit(f"--official {folder}: no {name} there; a checkout of {REPOSITORY} is needed") from error
        if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != blob:
            raise SystemExit(f"--official {folder}: {name} is not that of commit {COMMIT}")
    return COMMIT


def load(folder: Path) -> Any:
    """Its `utils`, after a check of what it is."""
    commit_of(folder)
    try:
        importlib.import_module("torchvision")
    except ImportError:  # needed by functions that are not called
        fake = types.ModuleType("torchvision")
        fake.datasets = fake.transforms = types.ModuleType("nothing")  # type: ignore[attr-defined]
        sys.modules["torchvision"] = fake
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            importlib.import_module("scipy.ndimage.interpolation")
        except ImportError:  # a name that newer versions of SciPy no longer have
            old = types.ModuleType("scipy.ndimage.interpolation")
            old.rotate = importlib.import_module("scipy.ndimage").rotate  # type: ignore[attr-defined]
            sys.modules["scipy.ndimage.interpolation"] = old
        sys.path.insert(0, str(folder))
        try:
            return importlib.import_module("utils")
        finally:
            sys.path.remove(str(folder))


class Official:
    """The official code with real and synthetic images before it.

    Args:
        folder: Its checkout.
        network: One of its networks, by its own name.
        real: Standardised training images (N, 3, side, side).
        labels: (N,).
        ipc: Synthetic images per class.
        batch: Real images per class and step.
        augment: Whether Siamese augmentation is on.
    """

    def __init__(
        self, folder: Path, network: str, real: Tensor, labels: Tensor, ipc: int, batch: int, augment: bool
    ) -> None:
        self.code, self.network, self.real, self.batch, self.ipc = load(folder), network, real, batch, ipc
        self.classes = int(labels.max()) + 1
        self.members = [(labels == c).nonzero().flatten().numpy() for c in range(self.classes)]
        picked = np.concatenate([m[:ipc] for m in self.members])
        self.synthetic = real[picked].clone().requires_grad_()
        self.labels = labels[picked]
        self.settings = Namespace(
            device="cpu", dis_metric="ours", dsa=augment, dsa_strategy=STRATEGY if augment else "None",
            dsa_param=self.code.ParamDiffAug(), dc_aug_param=None, lr_net=0.01, batch_train=256,
        )  # fmt: skip
        self.loss = torch.nn.CrossEntropyLoss()

    def fresh(self) -> Any:
        """A network of its own making."""
        return self.code.get_network(self.network, self.real.shape[1], self.classes, tuple(self.real.shape[2:]))

    def pair(self, c: int) -> tuple[Tensor, Tensor]:
        """Real images of a class, drawn as it draws them, and the synthetic ones, augmented alike."""
        both = [self.real[np.random.permutation(self.members[c])[: self.batch]]]
        both.append(self.synthetic[c * self.ipc : (c + 1) * self.ipc])
        if self.settings.dsa:
            seed = int(time.time() * 1000) % 100000
            both = [
                self.code.DiffAugment(x, self.settings.dsa_strategy, seed=seed, param=self.settings.dsa_param)
                for x in both
            ]
        return both[0], both[1]

    def matching_features(self) -> Go:
        """One step of distribution matching, its fresh network included."""
        move = torch.optim.SGD([self.synthetic], lr=1.0, momentum=0.5)

        def step() -> None:
            net = self.fresh()
            net.train()
            for weight in net.parameters():
                weight.requires_grad = False
            total = torch.zeros(())
            for c in range(self.classes):
                real, synthetic = self.pair(c)
                goal = net.embed(real).detach().mean(0)
                total = total + (goal - net.embed(synthetic).mean(0)).square().sum()
            move.zero_grad()
            total.backward()
            move.step()
            total.item()

        return lambda: {"step": _seconds(step)}

    def matching_gradients(self) -> Go:
        """One step of gradient matching, and apart from it one pass of its network over the synthetic images."""
        net = self.fresh()
        net.train()
        weights = list(net.parameters())
        move = torch.optim.SGD([self.synthetic], lr=0.1, momentum=0.5)
        train = torch.optim.SGD(weights, lr=self.settings.lr_net)

        def step() -> None:
            total = torch.zeros(())
            for c in range(self.classes):
                real, synthetic = self.pair(c)
                known = [torch.full((len(x),), c) for x in (real, synthetic)]
                goal = [g.detach() for g in torch.autograd.grad(self.loss(net(real), known[0]), weights)]
                own = torch.autograd.grad(self.loss(net(synthetic), known[1]), weights, create_graph=True)
                total = total + self.code.match_loss(own, goal, self.settings)
            move.zero_grad()
            total.backward()
            move.step()
            total.item()

        def training() -> None:
            images = self.code.TensorDataset(self.synthetic.detach().clone(), self.labels.clone())
            batches = DataLoader(images, batch_size=self.settings.batch_train, shuffle=True)
            self.code.epoch("train", batches, net, train, self.loss, self.settings, aug=self.settings.dsa)

        return lambda: {"step": _seconds(step), "training": _seconds(training)}

    def evaluation(self, epochs: int, test: tuple[Tensor, Tensor]) -> Go:
        """Its training of one network on the synthetic images: seconds of an epoch; and its pass over test images."""
        seen = DataLoader(
            self.code.TensorDataset(self.synthetic, self.labels), batch_size=self.settings.batch_train, shuffle=True
        )
        unseen = DataLoader(self.code.TensorDataset(*test), batch_size=256)

        def go() -> dict[str, float]:
            net = self.fresh()
            rule = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

            def train() -> None:
                for _ in range(epochs):
                    self.code.epoch("train", seen, net, rule, self.loss, self.settings, aug=True)

            def judge() -> None:
                self.code.epoch("test", unseen, net, rule, self.loss, self.settings, aug=False)

            return {"epoch": _seconds(train) / epochs, "test": _seconds(judge)}

        return go


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
