"""Handwritten digits read pixel by pixel: 64 steps of one value, classified after the last step.

    python examples/sequential_digits.py

Needs scikit-learn, which includes 1,797 digits of 8 x 8 pixels. Prints the accuracy on 360 held-out digits.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import statefeed as sf

EPOCHS, BATCH = 40, 32


class Reader(nn.Module):
    """pixels (T, B, 1) -> logits (B, 10)"""

    def __init__(self):
        super().__init__()
        self.gru = sf.GRU(1, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, pixels):
        _, h = self.gru(pixels)
        return self.head(h[-1])


def main():
    torch.manual_seed(0)
    pixels, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    pixels = (pixels.float() / 8 - 1).T[..., None]
    order = torch.randperm(len(digits))
    train, test = order[360:], order[:360]

    model = Reader()
    schedule = sf.Schedule("dsf@0.2/gate+1")  # the cheapest gradient leads early, a better one ends better
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for epoch in range(EPOCHS):
        schedule.apply(model, epoch / EPOCHS)
        for rows in train[torch.randperm(len(train))].split(BATCH):
            loss = nn.functional.cross_entropy(model(pixels[:, rows]), digits[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        decay.step()
        if epoch % 5 == 4:
            print(f"epoch {epoch + 1}: feedback {model.gru.feedback}, loss of the last batch {loss:.3f}")

    with torch.no_grad():
        print(f"accuracy {(model(pixels[:, test]).argmax(-1) == digits[test]).float().mean():.3f}")


if __name__ == "__main__":
    main()
