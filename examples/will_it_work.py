"""Will it work with my network? Says which layers are gated, and which weights are frozen after the first task."""

import torch
from torch import nn

from avalanche_sp.gate import PlasticityGate


class Tagger(nn.Module):
    """Your network in the place of this one: embedding, attention, norm, linear layers with and without weight norm."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.hidden = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.embedding(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.hidden(self.norm(x).mean(1)).relu())


model = Tagger()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
gate = PlasticityGate(model, optimizer)
batches = [(torch.randint(100, (32, 12)), torch.randint(5, (32,))) for _ in range(4)]
for x, y in batches:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
gate.consolidate(batches, nn.CrossEntropyLoss())  # a warning names the weights that are not gated
print("gated:", *gate.memory.layers)
