"""The training steps of step.rs in PyTorch, on as many threads as this machine has cores.

    python pytorch.py                     needs torch; says the smallest and the median time of a step

The same networks, batches, optimiser and classifier; layers and memory format are PyTorch's own choice, in both formats
that it has. Run it beside `cargo bench -p snn-trainer`, one after the other on a machine that does nothing else.
"""

import time

import torch
from torch import nn
from torch.nn import functional as F

GROUPS, STEM, CLASSES, STEPS = 4, 16, 10, 24


class Block(nn.Module):
    def __init__(self, entry, inner, output, stride, paths):
        super().__init__()
        self.reduce = nn.Conv2d(entry, inner, 1, groups=GROUPS, bias=False)
        self.paths = nn.Conv2d(inner, inner, 3, stride, 1, groups=paths, bias=False)
        self.expand = nn.Conv2d(inner, output, 1, groups=GROUPS, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (inner, inner, output))
        self.shortcut = nn.Sequential()
        if stride != 1 or entry != output:
            conv = nn.Conv2d(entry, output, 1, stride, groups=GROUPS, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(output))

    def forward(self, x):
        y = F.relu(self.norms[0](self.reduce(x)))
        y = F.relu(self.norms[1](self.paths(y)))
        return F.relu(self.norms[2](self.expand(y)) + self.shortcut(x))


class SepResNeXt(nn.Module):
    def __init__(self, depth, cardinality, path_width, trunk_width):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, STEM, 3, 1, 1, bias=False), nn.BatchNorm2d(STEM))
        blocks, entry = [], GROUPS * STEM
        for stage in range(3):
            inner, output = cardinality * path_width << stage, GROUPS * trunk_width << stage
            for block in range((depth - 2) // 9):
                stride = 2 if stage and not block else 1
                blocks.append(Block(entry, inner, output, stride, cardinality))
                entry = output
        self.blocks = nn.Sequential(*blocks)
        self.read = entry // GROUPS
        self.classifier = nn.Linear(self.read, CLASSES)

    def forward(self, x):
        x = F.relu(self.stem(x)).repeat(1, GROUPS, 1, 1)
        return self.classifier(self.blocks(x)[:, : self.read].mean((2, 3)))


def measure(name, net, batch, memory_format):
    net = net.to(memory_format=memory_format).train()
    images = torch.linspace(-1, 1, batch * 3 * 32 * 32).reshape(batch, 3, 32, 32)
    images = images.contiguous(memory_format=memory_format)
    labels = torch.arange(batch) % CLASSES
    sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        sgd.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        sgd.step()
        times.append(time.perf_counter() - start)
    times.sort()
    count = sum(parameter.numel() for parameter in net.parameters())
    least, median = times[0], times[STEPS // 2]
    print(f"{name}, {str(memory_format).removeprefix('torch.')}: {count} parameters, smallest {least * 1e3:.0f} ms, "
          f"median {median * 1e3:.0f} ms, {batch / least:.0f} images a second at best", flush=True)


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        small = SepResNeXt(20, 4, 4, 16)
        measure("Sep-ResNeXt-20 4x4d width 16, batch 64", small, 64, memory_format)
        paper = SepResNeXt(56, 4, 16, 64)
        measure("Sep-ResNeXt-56 4x16d, batch 32", paper, 32, memory_format)
