"""Pre-training in PyTorch beside `tabmesh-sim bench pretrain`: tables a second of processor time.

    python3 -m venv peers && peers/bin/pip install torch
    OMP_NUM_THREADS=1 peers/bin/python simulations/peers/pretrain_torch.py --ours PATH/TO/tabmesh-sim

Our program runs first and prints the sizes of all its tables; the twin then makes the same steps on random tables of these
sizes: forward and backward slice by slice, gradients summed and clipped, AdamW (fused), a running average of the weights. Drawing
tables counts for ours and not for the twin. Our program runs once more afterwards. One thread each. Prints JSON.
"""

import argparse
import itertools
import json
import os
import subprocess
import time

import torch
import torch.nn.functional as F

import twin


def ours(program, steps):
    command = [program, "bench", "pretrain", "--steps", str(steps), "--output", "json"]
    answer = subprocess.run(command, env={**os.environ, "RAYON_NUM_THREADS": "1"}, capture_output=True, check=True)
    return json.loads(answer.stdout)


def tables(sizes):
    shape = sizes["tables"], sizes["rows"]
    return torch.randn(*shape, sizes["columns"]), torch.randint(sizes["classes"], shape)


def trained(steps, fused):
    """Processor seconds of all steps but the first."""
    twin.FUSED = fused
    model = twin.Twin(**twin.NANO)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    average = [weight.detach().clone() for weight in weights]
    optimiser = torch.optim.AdamW(weights, 1.5e-3, betas=(0.9, 0.98), weight_decay=1e-3, fused=True)
    began = None
    for slices in steps:
        drawn = [(tables(sizes), sizes) for sizes in slices]
        start = time.process_time()
        optimiser.zero_grad()
        for (values, labels), sizes in drawn:
            context = sizes["context"]
            scores = model(values, labels[:, :context])[..., : sizes["classes"]]
            loss = F.cross_entropy(scores.flatten(0, 1), labels[:, context:].flatten())
            (loss / len(slices)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 0.002)
        spent = time.process_time() - start
        began = 0.0 if began is None else began + spent
    return began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", required=True, help="the tabmesh-sim program to run beside")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)

    before = ours(args.ours, args.steps)
    steps = before["slices"]
    # The first step warms up; it is one that both have seen the like of.
    seconds = {fused: trained(itertools.chain(steps[:1], steps), fused) for fused in (True, False)}
    after = ours(args.ours, args.steps)
    rate = before["tables"] / min(seconds.values())
    mean = (before["tables_per_cpu_s"] + after["tables_per_cpu_s"]) / 2
    outcome = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parameters": {"ours": before["parameters"], "twin": sum(w.numel() for w in twin.Twin(**twin.NANO).parameters())},
        "tables": before["tables"],
        "twin_tables_per_cpu_s": round(rate, 2),
        "twin_cpu_s": {"fused attention": round(seconds[True], 2), "written out": round(seconds[False], 2)},
        "ours_tables_per_cpu_s": [round(run["tables_per_cpu_s"], 2) for run in (before, after)],
        "ratio": round(mean / rate, 2),
    }
    print(json.dumps(outcome, indent=2))


if __name__ == "__main__":
    main()
