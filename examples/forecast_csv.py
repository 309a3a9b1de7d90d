"""Forecasts the last column of a CSV of hourly readings, a day ahead, with a GRU; made for files like ETTh1.csv.

    python examples/forecast_csv.py [FILE.csv]

The file has a header, a date in the first column, numbers in the others and one row per hour. Without a file, it
uses a synthetic one. Prints the error on the last fifth of the rows, and the error of repeating the last day.
"""

import argparse
import csv
import math
import random
import tempfile
from pathlib import Path

import torch
from torch import nn

import statefeed as sf

PAST, FUTURE, BATCH, STEPS = 96, 24, 64, 250  # hours, hours, windows, training steps


def synthetic(path):
    """A year of loads with a daily and a weekly rhythm, and an oil temperature that follows them slowly."""
    draw = random.Random(0)
    drift, oil = [0.0] * 6, 20.0
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["date", "HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"])
        for hour in range(8760):
            day = math.sin(math.tau * hour / 24)
            week = 1.0 if hour // 24 % 7 < 5 else 0.4
            drift = [0.97 * d + draw.gauss(0, 0.3) for d in drift]
            loads = [(3 + k) * (1.5 + day) * week + d for k, d in enumerate(drift)]
            oil += 0.1 * (10 + 0.6 * sum(loads) - oil) + draw.gauss(0, 0.2)
            date = f"2024-{1 + hour // 730:02d}-{1 + hour // 24 % 30:02d} {hour % 24:02d}:00:00"
            rows.writerow([date, *(f"{value:.4f}" for value in [*loads, oil])])


def read(path):
    """The numbers of the file, (rows, columns)."""
    with path.open(newline="") as file:
        _, *rows = csv.reader(file)
    return torch.tensor([[float(value) for value in row[1:]] for row in rows])


class Forecaster(nn.Module):
    """x (B, PAST, I) -> the target's change from now, (B, FUTURE)"""

    def __init__(self, columns):
        super().__init__()
        self.gru = sf.GRU(columns, 48, batch_first=True, feedback="dsf")
        self.head = nn.Linear(48, FUTURE)

    def forward(self, x):
        y, _ = self.gru(x)
        return x[:, -1, -1:] + self.head(y[:, -1])


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("file", nargs="?", type=Path, help="CSV of hourly readings")
    path = arguments.parse_args().file
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "readings.csv"
            synthetic(path)
            series = read(path)
    else:
        series = read(path)

    split = len(series) * 4 // 5
    series = (series - series[:split].mean(0)) / series[:split].std(0)
    windows = series.unfold(0, PAST + FUTURE, 1).transpose(1, 2)  # (N, PAST + FUTURE, columns)
    train, test = windows[: split - PAST - FUTURE], windows[split - PAST :: 6]

    torch.manual_seed(0)
    model = Forecaster(series.shape[1])
    schedule = sf.Schedule("dsf@0.5/gate+1")
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        schedule.apply(model, step / STEPS)
        batch = train[torch.randint(len(train), (BATCH,))]
        loss = (model(batch[:, :PAST]) - batch[:, PAST:, -1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if step % 50 == 0:
            print(f"step {step:3d}: feedback {model.gru.feedback}, mean squared error {loss:.3f}")

    with torch.no_grad():
        error = (model(test[:, :PAST]) - test[:, PAST:, -1]).square().mean()
    repeated = (test[:, PAST - FUTURE : PAST, -1] - test[:, PAST:, -1]).square().mean()
    print(f"mean squared error {error:.3f}, of repeating the last day {repeated:.3f}")


if __name__ == "__main__":
    main()
