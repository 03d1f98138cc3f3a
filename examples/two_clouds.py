"""Train a 1-Lipschitz classifier of two point clouds with plain PyTorch, and certify it.

The clouds are 2 apart, so that no 1-Lipschitz function separates their means by more than about 2 + their spread.
"""

import torch
from torch import nn

from otnn.lipschitz import bound
from otnn.losses import HKRLoss
from otnn.manifold import keep_on_manifold
from otnn.nn import MaxMin, OrthoLinear, UnitNormLinear


def main(steps: int = 300) -> dict[str, float]:
    torch.manual_seed(0)
    labels = torch.arange(400) % 2
    points = 0.2 * torch.randn(400, 2) + torch.tensor([[-1.0, 0.0], [1.0, 0.0]])[labels]

    network = nn.Sequential(OrthoLinear(2, 32), MaxMin(), OrthoLinear(32, 32), MaxMin(), UnitNormLinear(32, 1))
    loss = HKRLoss(margin=0.3, hinge_weight=10.0)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    keep_on_manifold(optimizer, network, loss)  # the one line that an ordinary training loop lacks
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network(points), labels).backward()
        optimizer.step()

    scores = network(points).squeeze(1).detach()
    constant = bound(network).constant
    figures = {
        "accuracy": float(((scores > 0).long() == labels).double().mean()),
        "lipschitz_bound": constant,
        "mean_radius": float(scores.abs().mean()) / constant,
    }
    for name, value in figures.items():
        print(f"{name}: {value:.4f}")
    return figures


if __name__ == "__main__":
    main()
