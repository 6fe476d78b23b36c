"""Single-row latency of the public package (PyPI tabicl) with its own caches.

    python3 -m venv peers && peers/bin/pip install tabicl==2.2.0
    OMP_NUM_THREADS=1 peers/bin/python simulations/peers/serving_tabicl.py

Random weights of the published shape (`TabICL()` with its defaults), a context of 1,000 rows x 20 columns with two classes, one
thread, mixed precision off and as its default. Timed is the model's own call with a ready cache: the least the package
can do, without its preprocessing. One view, and two views side by side, which is what `tabmesh-sim bench serving`
measures. Prints JSON, times in milliseconds.
"""

import argparse
import importlib.metadata
import json
import statistics
import time

import numpy as np
import torch


def quantiles(seconds):
    ordered = sorted(seconds)
    at = lambda share: ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1e3
    return {"p50": round(at(0.5), 3), "p99": round(at(0.99), 3)}


def timed(ask, queries, warm_up):
    for row in queries[:warm_up]:
        ask(row)
    wall, before = [], time.process_time()
    for row in queries:
        began = time.perf_counter()
        ask(row)
        wall.append(time.perf_counter() - began)
    cpu = (time.process_time() - before) / len(queries)
    return {"ms": quantiles(wall), "cpu_ms": round(cpu * 1e3, 3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--columns", type=int, default=20)
    parser.add_argument("--singles", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)

    from tabicl import InferenceConfig
    from tabicl._model.tabicl import TabICL

    model = TabICL().eval()
    # Weights that start at zero would be no cheaper; noise keeps every path alive.
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    rng = np.random.default_rng(1)
    context = rng.uniform(-2, 2, (args.rows, args.columns)).astype(np.float32)
    labels = (rng.random(args.rows) < 0.4).astype(np.float32)
    labels[:2] = [0, 1]
    queries = rng.uniform(-2, 2, (args.singles, args.columns)).astype(np.float32)

    outcome = {
        "package": f"tabicl {importlib.metadata.version('tabicl')}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "context": [args.rows, args.columns],
        "singles": args.singles,
        "ways": {},
    }
    for amp in (False, True):
        config = InferenceConfig()
        for stage in (config.COL_CONFIG, config.ROW_CONFIG, config.ICL_CONFIG):
            stage.use_amp, stage.device, stage.offload = amp, "cpu", False
        for views, mode in ((1, "kv"), (2, "kv"), (2, "repr")):
            # The second view has the classes swapped.
            x = torch.from_numpy(context)[None].repeat(views, 1, 1)
            y = torch.stack([torch.from_numpy(labels), 1 - torch.from_numpy(labels)][:views])
            with torch.inference_mode():
                before, began = time.process_time(), time.perf_counter()
                model.forward_with_cache(
                    X_train=x, y_train=y, use_cache=False, store_cache=True, cache_mode=mode, inference_config=config
                )
                built, cpu = time.perf_counter() - began, time.process_time() - before
                cache = model._cache

                def ask(row):
                    row = torch.from_numpy(row)[None, None].repeat(views, 1, 1)
                    return model.forward_with_cache(X_test=row, cache=cache, inference_config=config)

                some = queries if mode == "kv" else queries[:5]
                outcome["ways"][f"{views} views, {mode}, amp {'on' if amp else 'off'}"] = {
                    "build_s": round(built, 3),
                    "build_cpu_s": round(cpu, 3),
                    **timed(ask, some, 5 if mode == "kv" else 1),
                }
    print(json.dumps(outcome, indent=2))


if __name__ == "__main__":
    main()
