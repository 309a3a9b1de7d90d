"""Credit by lag under each rule: the gradient of the last output with respect to the input k steps earlier.

    python examples/credit_by_lag.py [FIGURE.png]

A GRU is trained briefly with exact BPTT, so that it has some memory: after 50 vectors it predicts whether the sum of
their entries, with smaller weights for early ones, is positive. Then `statefeed.alignment` measures every rule on it.
Prints the mean cosine with BPTT over lags 1 to 10 for every rule; with a file name it also draws the decay and the
cosine by lag (needs matplotlib).
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import statefeed as sf

T, B, I, H = 50, 64, 8, 32
RULES = ["ft-bptt", "dsf", "calibrated", "gate", "jacobian", "gate+1", "jacobian+3"]


class Model(nn.Module):
    """x (T, B, I) -> (B,), a logit"""

    def __init__(self):
        super().__init__()
        self.gru = sf.GRU(I, H, feedback="bptt")
        self.head = nn.Linear(H, 1)

    def forward(self, x):
        _, h = self.gru(x)
        return self.head(h[-1]).squeeze(-1)


def batch():
    x = torch.randn(T, B, I)
    fading = 0.95 ** torch.arange(T).flip(0)
    return x, ((x.sum(-1).T @ fading) > 0).float()


def loss(model, batch):
    x, y = batch
    return nn.functional.binary_cross_entropy_with_logits(model(x), y)


def draw(measured, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    decay, cosine = figure.subplots(1, 2)
    exact = next(iter(measured.values())).exact
    decay.semilogy([norm / exact[0] for norm in exact], "k", linewidth=2.5, label="bptt")
    for rule, lags in measured.items():
        decay.semilogy([norm / exact[0] or None for norm in lags.rule], label=rule)
        cosine.plot([at.cosine for at in lags.agreement], label=rule)
    decay.set(xlabel="lag k, steps", ylabel="norm of the gradient, of lag 0 exact = 1", ylim=(1e-4, 10))
    cosine.set(xlabel="lag k, steps", ylabel="cosine with exact BPTT", ylim=(-0.1, 1.05))
    decay.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("figure", nargs="?", type=Path, help="file to draw into")
    figure = arguments.parse_args().figure

    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model, batch()).backward()
        optimizer.step()

    measured, held_out = {}, batch()
    for rule in RULES:
        model.gru.feedback = rule
        torch.manual_seed(1)  # the same direction at the last output for every rule
        measured[rule] = sf.alignment(model, loss, held_out, lags=T).lags["gru"]
        # A rule that sends nothing back has no cosine (NaN): it counts as 0.
        cosines = [max(at.cosine, 0.0) if at.cosine == at.cosine else 0.0 for at in measured[rule].agreement[1:11]]
        print(f"{rule:10s} mean cosine with BPTT over lags 1 to 10: {sum(cosines) / 10:.3f}")
    if figure is not None:
        draw(measured, figure)
        print(f"drawn into {figure}")


if __name__ == "__main__":
    main()
