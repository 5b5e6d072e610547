"""Separable residual nets as PyTorch exports them, and the answers PyTorch itself gives.

    python torch_separable.py             writes torch_separable.onnx and .json beside this file
    python torch_separable.py DIR         writes many variants to DIR, for trying the compiler by hand

Each .json holds a policy, and logits with and without it: the network is evaluated group by group in
PyTorch, with the exchange written out (equations 2 and 3 of the paper), independently of the ONNX file.
The image is sin(0.1 i), i = 0, 1, ... Needs torch and onnx (and onnxscript for the newer exporter).
"""

import json
import pathlib
import sys

import torch
from torch import nn
from torch.nn import functional as F

ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "hardswish": F.hardswish, "relu6": F.relu6,
               "leaky": lambda x: F.leaky_relu(x, 0.1), "hardsigmoid": F.hardsigmoid, "gelu": F.gelu}


class Block(nn.Module):
    def __init__(self, groups, inner, entry, width, stride, act):
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.c1 = nn.Conv2d(groups * entry, groups * inner, 1, groups=groups, bias=False)
        self.b1 = nn.BatchNorm2d(groups * inner)
        self.c2 = nn.Conv2d(groups * inner, groups * inner, 3, stride, 1, groups=2 * groups, bias=False)
        self.b2 = nn.BatchNorm2d(groups * inner)
        self.c3 = nn.Conv2d(groups * inner, groups * width, 1, groups=groups, bias=False)
        self.b3 = nn.BatchNorm2d(groups * width)
        self.shortcut = nn.Sequential()
        if stride != 1 or entry != width:
            conv = nn.Conv2d(groups * entry, groups * width, 1, stride, groups=groups, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(groups * width))

    def sum(self, x):
        y = self.act(self.b1(self.c1(x)))
        y = self.act(self.b2(self.c2(y)))
        return self.b3(self.c3(y)) + self.shortcut(x)

    def forward(self, x):
        return self.act(self.sum(x))


class Net(nn.Module):
    def __init__(self, groups=4, blocks=((8, 1), (8, 1), (16, 2), (16, 1)), act="relu", join="cat",
                 head="slice", pool="adaptive", flat="flatten"):
        super().__init__()
        self.groups, self.join, self.head, self.pool, self.flat = groups, join, head, pool, flat
        self.act = ACTIVATIONS[act]
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
        widths = [8] + [width for width, _ in blocks]
        self.blocks = nn.ModuleList(
            Block(groups, 8, widths[i], width, stride, act) for i, (width, stride) in enumerate(blocks))
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(widths[-1], 10)

    def features(self, x):
        x = self.act(self.stem(x))
        if self.join == "cat":
            return torch.cat([x] * self.groups, 1)
        if self.join == "expand":
            n, c, h, w = x.shape
            return x.unsqueeze(1).expand(n, self.groups, c, h, w).reshape(n, self.groups * c, h, w)
        return x.repeat(1, self.groups, 1, 1)

    def classify(self, x):
        x = {"adaptive": lambda: F.adaptive_avg_pool2d(x, 1), "mean": lambda: x.mean((2, 3), keepdim=True),
             "pool": lambda: F.avg_pool2d(x, x.shape[-1])}[self.pool]()
        x = {"flatten": lambda: torch.flatten(x, 1), "view": lambda: x.view(x.size(0), -1),
             "squeeze": lambda: x.squeeze(3).squeeze(2)}[self.flat]()
        return self.fc(self.drop(x))

    def forward(self, x):
        x = self.features(x)
        for block in self.blocks:
            x = block(x)
        width = x.shape[1] // self.groups
        x = {"slice": lambda: x[:, :width], "chunk": lambda: x.chunk(self.groups, 1)[0],
             "split": lambda: torch.split(x, width, 1)[0]}[self.head]()
        return self.classify(x)

    def exchanged(self, x, policy):
        """The answer when the groups exchange what `policy` says."""
        g, alpha = self.groups, policy["staleness"]
        x = self.features(x)
        for b, block in enumerate(self.blocks):
            z = block.sum(x)
            parts = list(z.chunk(g, 1))
            step = b // alpha
            if step < len(policy["steps"]):
                send_to, level = policy["steps"][step]["send_to"], policy["steps"][step]["level"]
                if b == step * alpha:
                    sent = [self.encode(self.act(part), level, policy["dtype"]) for part in parts]
                if b == step * alpha + alpha - 1:
                    for i, to in enumerate(send_to):
                        if i != to:
                            parts[to] = parts[to] + sent[i]
            x = self.act(torch.cat(parts, 1))
        return self.classify(x.chunk(g, 1)[0])

    @staticmethod
    def encode(part, level, dtype):
        keep = int(part.shape[1] * (50 + 6.25 * level) / 100)
        part = part.clone()
        part[:, keep:] = 0
        return part.half().float() if dtype == "f16" else part


def make(seed, **options):
    torch.manual_seed(seed)
    net = Net(**options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.9)
            nn.init.uniform_(module.bias, -0.1, 0.3)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def write(path, net, size=8, alpha=2, **options):
    """Exports `net` to `path`, and its answers to a .json of the same name."""
    image = torch.sin(0.1 * torch.arange(3 * size * size)).reshape(1, 3, size, size)
    groups, steps = net.groups, len(net.blocks) // alpha
    ring = [(i + 1) % groups for i in range(groups)]
    cross = [groups - 1 - i for i in range(groups)]
    policy = {"version": 1, "groups": groups, "staleness": alpha, "dtype": "f16", "steps": [
        {"send_to": (ring if t % 2 == 1 else cross), "level": (4 + t) % 9} for t in range(steps)]}
    with torch.no_grad():
        answers = {"policy": policy, "plain": net(image)[0].tolist(),
                   "exchanged": net.exchanged(image, policy)[0].tolist()}
    torch.onnx.export(net, (image,), str(path), input_names=["image"], output_names=["logits"], **options)
    path.with_suffix(".json").write_text(json.dumps(answers, indent=1) + "\n")


def variants(folder):
    old, new = {"dynamo": False}, {"dynamo": True, "external_data": False}
    training = torch.onnx.TrainingMode
    for opset in (11, 13, 16, 18, 20):
        write(folder / f"old_{opset}.onnx", make(1), opset_version=opset, **old)
    for opset in (18, 20, 21, 22, 23):
        write(folder / f"new_{opset}.onnx", make(1), opset_version=opset, **new)
    batch = torch.export.Dim("batch")
    for kind, export in (("old", old), ("new", new)):
        for act in ACTIVATIONS:
            write(folder / f"{kind}_{act}.onnx", make(2, act=act), **export)
        for option, values in (("join", ["repeat", "expand"]), ("head", ["chunk", "split"]),
                               ("pool", ["mean", "pool"]), ("flat", ["view", "squeeze"])):
            for value in values:
                write(folder / f"{kind}_{option}_{value}.onnx", make(3, **{option: value}), **export)
        for groups in (2, 3, 8):
            write(folder / f"{kind}_g{groups}.onnx", make(4, groups=groups), alpha=1, **export)
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    write(folder / "old_dynamic.onnx", make(5, flat="view", join="repeat"), dynamic_axes=axes, **old)
    write(folder / "new_dynamic.onnx", make(5, flat="view", join="repeat"), dynamic_shapes=({0: batch},), **new)
    write(folder / "old_inputs.onnx", make(6), keep_initializers_as_inputs=True, **old)
    write(folder / "old_unfolded.onnx", make(6), do_constant_folding=False,
          training=training.PRESERVE, **old)
    write(folder / "old_function.onnx", make(6), export_params=True, opset_version=17, **old)
    write(folder / "new_unoptimised.onnx", make(6), optimize=False, **new)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        target = pathlib.Path(sys.argv[1])
        target.mkdir(parents=True, exist_ok=True)
        variants(target)
    else:
        here = pathlib.Path(__file__).parent
        write(here / "torch_separable.onnx", make(0), dynamo=False, opset_version=17)
