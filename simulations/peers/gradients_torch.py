"""Clipped per-row adapter gradients in PyTorch: torch.func and Opacus beside `tabmesh-sim bench gradients`.

    python3 -m venv peers && peers/bin/pip install torch opacus
    OMP_NUM_THREADS=1 peers/bin/python simulations/peers/gradients_torch.py --ours PATH/TO/tabmesh-sim

The query path of the shipped base: a context of 512 rows x 20 columns whose keys and values are at hand, 512 query rows whose
cells are at hand, one delta per column added to their cells (640 values), the loss of the margin averaged over two
views of the context, each row's gradient clipped to a norm and summed. Ways:

    plain         one step without privacy, the least there is to do
    torch.func    vmap of grad
    opacus        hooks (GradSampleModule) with a sampler for the deltas' layer
    opacus ghost  norms first, then a second backward pass of the weighted loss
    by hand       gradients by each row's own copy of the deltas, which rows that don't meet allow

Each way in the best of several batch sizes with and without fused attention, one thread, processor time, medians. With --ours that program is run right before
and after, on the same machine, and the ratio printed. Prints JSON.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

import twin

ROOT = pathlib.Path(__file__).resolve().parents[2]
BATCHES = (64, 192, 512)


class Deltas(nn.Module):
    """Adds each slot's three columns' deltas to cells (rows, views, H, E)."""

    def __init__(self, columns, width):
        super().__init__()
        self.values = nn.Parameter(torch.empty(columns, width).uniform_(-0.05, 0.05))
        at = torch.arange(columns)
        members = sum(F.one_hot((at + (1 << i)) % columns, columns) for i in range(3)).float()
        # No buffer: Opacus refuses trained layers with one.
        self.members = members

    def forward(self, cells):
        return cells + self.members @ self.values


class Path(nn.Module):
    """Query cells (rows, views, H, E) to the averaged margin (rows)."""

    def __init__(self, model, kept, columns, width):
        super().__init__()
        self.deltas, self.model, self.kept = Deltas(columns, width), model, kept
        self.model.requires_grad_(False)

    def forward(self, cells):
        # Views stand where tables do, rows one after the other.
        scores = self.model.query_scores(self.deltas(cells).transpose(0, 1), self.kept)
        margins = scores[..., 1] - scores[..., 0]
        # The second view has the classes swapped.
        return (margins[0] - margins[1]) / 2


def loss_of(margins, labels):
    return F.binary_cross_entropy_with_logits(margins, labels, reduction="none")


def measured(step, rows, turns):
    """Rows a second of processor time: median of turns of at least half a second."""
    step()
    rates = []
    for _ in range(turns):
        began, runs = time.process_time(), 0
        while time.process_time() - began < 0.5:
            step()
            runs += 1
        rates.append(rows * runs / (time.process_time() - began))
    return statistics.median(rates)


def ways(path, cells, labels, norm):
    """Each way as a function of a batch size that sums over all rows; the sums must agree."""
    rows, values = len(labels), path.deltas.values
    batches = lambda size: ((cells[i : i + size], labels[i : i + size]) for i in range(0, rows, size))

    def clipped(per_row):
        flat = per_row.flatten(1)
        return ((norm / flat.norm(dim=1)).clamp(max=1.0) @ flat).view_as(values)

    def plain(size):
        total = torch.zeros_like(values)
        for some, known in batches(size):
            total += torch.autograd.grad(loss_of(path(some), known).sum(), values)[0]
        return total

    frozen = {name: weight.detach() for name, weight in path.named_parameters() if name != "deltas.values"}

    def one(delta, cell, label):
        margin = torch.func.functional_call(path, {**frozen, "deltas.values": delta}, (cell[None],))
        return loss_of(margin, label[None])[0]

    per_row = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))

    def by_func(size):
        return sum(clipped(per_row(values.detach(), some, known)) for some, known in batches(size))

    def by_hand(size):
        total = torch.zeros_like(values)
        for some, known in batches(size):
            copies = torch.zeros(len(known), *values.shape, requires_grad=True)
            margins = path(some + (path.deltas.members @ copies)[:, None])
            total += clipped(torch.autograd.grad(loss_of(margins, known).sum(), copies)[0])
        return total

    found = {"plain": plain, "torch.func": by_func, "by hand": by_hand}
    try:
        found.update(by_opacus(path, batches, clipped, norm))
    except ImportError as missing:
        print(f"opacus: {missing}")
    return found


def by_opacus(path, batches, clipped, norm):
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.grad_sample.utils import register_grad_sampler, register_norm_sampler

    def per_row(layer, _, backprops):
        return torch.einsum("sc,nvse->nce", layer.members, backprops)

    @register_grad_sampler(Deltas)
    def sample(layer, activations, backprops):
        return {layer.values: per_row(layer, activations, backprops)}

    @register_norm_sampler(Deltas)
    def norms(layer, activations, backprops):
        return {layer.values: per_row(layer, activations, backprops).flatten(1).norm(dim=1)}

    def hooks(size):
        module, total = GradSampleModule(path, loss_reduction="sum"), torch.zeros_like(path.deltas.values)
        for some, known in batches(size):
            loss_of(module(some), known).sum().backward()
            total += clipped(path.deltas.values.grad_sample)
            module.zero_grad()
        module.to_standard_module()
        return total

    def ghost(size):
        module = GradSampleModuleFastGradientClipping(
            path, loss_reduction="sum", max_grad_norm=norm, use_ghost_clipping=True
        )
        total = torch.zeros_like(path.deltas.values)
        for some, known in batches(size):
            losses = loss_of(module(some), known)
            losses.sum().backward(retain_graph=True)
            weights = module.get_clipping_coef()
            module.zero_grad()
            module.disable_hooks()
            (weights * losses).sum().backward()
            total += path.deltas.values.grad
            module.enable_hooks()
            module.zero_grad()
        module.to_standard_module()
        return total

    return {"opacus": hooks, "opacus ghost": ghost}


def ours(program):
    command = [program, "bench", "gradients", "--kind", "feature_tokens", "--output", "json"]
    answer = subprocess.run(command, env={**os.environ, "RAYON_NUM_THREADS": "1"}, capture_output=True, check=True)
    return json.loads(answer.stdout)["kinds"][0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=ROOT / "models/nano/base.safetensors")
    parser.add_argument("--ours", help="the tabmesh-sim program to run beside")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=20)
    parser.add_argument("--way", action="append", help="only this way; may be given several times")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)

    before = ours(args.ours) if args.ours else None
    model = twin.load(args.model, **twin.NANO).eval()
    draw = lambda rows: torch.empty(rows, args.columns).uniform_(-2, 2)
    labels = (torch.rand(args.context) < 0.4).long()
    with torch.no_grad():
        summaries, kept = model.context(draw(args.context).expand(2, -1, -1), torch.stack([labels, 1 - labels]))
        cells = model.query_cells(draw(args.rows).expand(2, -1, -1), summaries).transpose(0, 1).contiguous()
    targets = (torch.rand(args.rows) < 0.4).float()
    path = Path(model, kept, args.columns, cells.shape[-1])

    # A norm that clips one row in twenty, as the bench beside has it.
    copies = torch.zeros(args.rows, args.columns, cells.shape[-1], requires_grad=True)
    margins = path(cells + (path.deltas.members @ copies)[:, None])
    per_row = torch.autograd.grad(loss_of(margins, targets).sum(), copies)[0]
    norm = per_row.flatten(1).norm(dim=1).quantile(0.95).item()

    outcome = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": args.rows, "ways": {}}
    reference = None
    sizes = [size for size in BATCHES if size <= args.rows]
    for name, way in ways(path, cells, targets, norm).items():
        if args.way and name not in args.way:
            continue
        rates = {}
        for fused, size in itertools.product((True, False), sizes):
            twin.FUSED = fused
            rates[fused, size] = measured(lambda: way(size), args.rows, args.turns)
        fused, best = max(rates, key=rates.get)
        twin.FUSED = fused
        found = {"rows_per_cpu_s": round(rates[fused, best]), "batch": best, "fused_attention": fused}
        print(name, found, file=sys.stderr)
        outcome["ways"][name] = found
        if name != "plain":
            total = way(best).detach()
            reference = total if reference is None else reference
            gap = ((total - reference).norm() / reference.norm()).item()
            assert gap < 1e-3, f"{name} gives another sum: {gap}"
    if args.ours:
        after = ours(args.ours)
        figure = "clipped_samples_per_cpu_s"
        rate = (before[figure] + after[figure]) / 2
        rivals = {name: way["rows_per_cpu_s"] for name, way in outcome["ways"].items()}
        outcome["ours"] = {"before": before[figure], "after": after[figure]}
        outcome["ratio"] = {name: round(rate / rival, 2) for name, rival in rivals.items()}
    print(json.dumps(outcome, indent=2))


if __name__ == "__main__":
    main()
