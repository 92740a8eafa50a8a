"""A training script of the shape of Opacus' MNIST example, with the three lines more. Its test kills it and starts it again.

python tests/peers/opacus_script.py CHECKPOINT mix-self --epochs 3 [--die-at STEP]
"""

import argparse
import hashlib
import json
import os
import signal
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpmix.core.views import Recipe
from dpmix.images import data
from dpmix.peers.opacus import ViewSet, average_views, exact_sampling

RECIPES = {"self-aug": Recipe(k_base=2, transform="crop"), "mix-self": Recipe(k_base=2, k_self=2, transform="crop")}
BATCH, SIGMA, DELTA, PHYSICAL = 256, 1.0, 1e-5, 48


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10),
    )  # fmt: skip


def train(checkpoint: Path, method: str, epochs: int, die_at: int | None = None) -> dict:
    digits, recipe = data.load("digits"), RECIPES[method]
    train_set = ViewSet(TensorDataset(digits.train.images, digits.train.labels), recipe, num_classes=10, seed=1)  # 1
    engine, model = PrivacyEngine(accountant="rdp"), network()
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5),
        data_loader=DataLoader(train_set, batch_size=BATCH), noise_multiplier=SIGMA, max_grad_norm=1.0,
    )  # fmt: skip
    optimizer = average_views(model, optimizer, recipe.views)  # 2
    exact_sampling(engine, optimizer, loader, batch_size=BATCH, noise_multiplier=SIGMA)
    first = 0
    if checkpoint.exists():
        first = engine.load_checkpoint(path=checkpoint, module=model, optimizer=optimizer)["epoch"]
    steps = 0
    for epoch in range(first, epochs):
        torch.manual_seed(epoch)  # sampling and noise of the epoch: known to the test, so never for a release
        train_set.set_epoch(epoch)
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=PHYSICAL, optimizer=optimizer) as pieces:
            for images, targets in pieces:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), targets.flatten(0, 1))  # 3
                loss.backward()
                optimizer.step()
                steps += 1
                if steps == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        part = checkpoint.with_suffix(".part")
        engine.save_checkpoint(path=part, module=model, optimizer=optimizer, checkpoint_dict={"epoch": epoch + 1})
        part.replace(checkpoint)
    with torch.no_grad():
        right = model.eval()(digits.test.images.float() / 255).argmax(1) == digits.test.labels
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return {
        "epsilon": engine.get_epsilon(DELTA), "history": engine.accountant.history, "n": len(train_set), "first": first,
        "accuracy": float(right.float().mean()), "weights": hashlib.sha256(weights).hexdigest(),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("method", choices=RECIPES)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--die-at", type=int)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Secure RNG|Full backward hook|Optimal order", category=UserWarning)
    print(json.dumps(train(options.checkpoint, options.method, options.epochs, options.die_at)))
