"""One line in an existing model: a tagger of bracket depth with torch.nn's LSTM, trained with statefeed.

    python examples/swap_tagger.py

Prints the seconds of training and the accuracy on unseen sequences, of the restored model and of one that torch.nn
trained.
"""

import copy
import time

import torch
from torch import nn

import statefeed as sf

TOKENS, DEPTHS, T = 6, 5, 60  # two kinds of brackets open and close among two words; depth 0 to 4


class Tagger(nn.Module):
    """tokens (B, T) -> logits (B, T, DEPTHS)"""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 16)
        self.lstm = nn.LSTM(16, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, DEPTHS)

    def forward(self, tokens):
        y, _ = self.lstm(self.embed(tokens))
        return self.head(y)


def sequences(B):
    """Random tokens, and after each how many brackets are open; one that would leave 0..4 is not counted."""
    tokens = torch.randint(0, TOKENS, (B, T))
    depth, depths = torch.zeros(B, dtype=torch.int64), []
    for token in tokens.T:
        depth = (depth + (token < 2).long() - ((token >= 2) & (token < 4)).long()).clamp(0, DEPTHS - 1)
        depths.append(depth)
    return tokens, torch.stack(depths, 1)


def train(model):
    """Seconds of the steps after the first, which may have kernels to load."""
    torch.manual_seed(1)  # the same sequences for every model
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(151):
        tokens, depths = sequences(32)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), depths.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:3d}: loss {loss:.3f}")
        if step == 0:
            start = time.perf_counter()
    return time.perf_counter() - start


def main():
    torch.manual_seed(0)
    plain = Tagger()
    model = copy.deepcopy(plain)
    print(sf.swap(model, feedback="gate+1"))  # the one line
    seconds = {"statefeed": train(model), "torch.nn": train(plain)}

    sf.restore(model)  # torch.nn.LSTM again: nothing of statefeed is needed to run it
    assert type(model.lstm) is nn.LSTM
    tokens, depths = sequences(500)
    for name, trained in (("statefeed", model), ("torch.nn", plain)):
        with torch.no_grad():
            accuracy = (trained(tokens).argmax(-1) == depths).float().mean()
        print(f"{name:9s}  {seconds[name]:5.1f} s  accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
