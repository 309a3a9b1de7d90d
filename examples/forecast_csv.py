"""Forecasts the last column of a CSV of hourly readings, a day ahead, with a GRU; made for files like ETTh1.csv.

    python examples/forecast_csv.py [FILE.csv]

The file has a header, a date in the first column, numbers in the others and one row per hour. Without a file, it
uses a synthetic one. Prints the seconds of training and the error on the last fifth of the rows, of statefeed's GRU and
of torch.nn's, and the error of repeating the last day.
"""

import argparse
import csv
import math
import random
import tempfile
import time
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

    def __init__(self, gru):
        super().__init__()
        self.gru = gru
        self.head = nn.Linear(48, FUTURE)

    def forward(self, x):
        y, _ = self.gru(x)
        return x[:, -1, -1:] + self.head(y[:, -1])


def fit(model, schedule, train):
    """Seconds of training; the schedule changes the rule of statefeed's layers, and no other."""
    model(train[:1, :PAST]).sum().backward()  # may have kernels to load
    torch.manual_seed(1)  # the same windows for every model
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    start = time.perf_counter()
    for step in range(STEPS):
        if schedule is not None:
            schedule.apply(model, step / STEPS)
        batch = train[torch.randint(len(train), (BATCH,))]
        loss = (model(batch[:, :PAST]) - batch[:, PAST:, -1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if step % 50 == 0:
            print(f"step {step:3d}: {model.gru}, mean squared error {loss:.3f}")
    return time.perf_counter() - start


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

    rules = sf.Schedule("dsf@0.5/gate+1")
    for name, layer, schedule in (("statefeed", sf.GRU, rules), ("torch.nn", nn.GRU, None)):
        torch.manual_seed(0)
        model = Forecaster(layer(series.shape[1], 48, batch_first=True))
        seconds = fit(model, schedule, train)
        with torch.no_grad():
            error = (model(test[:, :PAST]) - test[:, PAST:, -1]).square().mean()
        print(f"{name:9s}  {seconds:5.1f} s  mean squared error {error:.3f}")
    repeated = (test[:, PAST - FUTURE : PAST, -1] - test[:, PAST:, -1]).square().mean()
    print(f"repeating the last day:  mean squared error {repeated:.3f}")


if __name__ == "__main__":
    main()
