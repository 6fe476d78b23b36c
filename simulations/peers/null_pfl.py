"""Rounds without training in pfl-research: what `tabmesh-sim bench null` counts, in its simulation loop.

Every client takes the model's vector, adds a constant, and has a weight of 100; the server takes the weighted mean.

    python3 -m venv peers && peers/bin/pip install pfl==0.6.0
    peers/bin/python simulations/peers/null_pfl.py --clients 20000 --values 50000 --rounds 3

Prints one JSON object. The model's first value must be a thousandth for each round, or the run counts for nothing.
"""

import argparse
import json
import os
import resource
import time

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import numpy as np
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import FederatedAlgorithm
from pfl.common_types import Population
from pfl.context import CentralContext
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import ArtificialFederatedDataset
from pfl.hyperparam.base import AlgorithmHyperParams, ModelHyperParams
from pfl.internal.ops import numpy_ops
from pfl.internal.ops.selector import set_framework_module
from pfl.metrics import Metrics
from pfl.model.base import Model
from pfl.stats import MappedVectorStatistics

CONSTANT = np.float32(0.001)
WEIGHT = 100


class Vector(Model):
    """The global vector."""

    def __init__(self, values):
        self.values = np.zeros(values, np.float32)

    def apply_model_update(self, statistics):
        self.values = statistics["values"] / statistics.weight
        return self, Metrics()


class WithoutTraining(FederatedAlgorithm):
    """Federated averaging whose clients do nothing but add a constant; notes when each round begins."""

    def __init__(self, clients, rounds):
        super().__init__()
        self.clients, self.rounds, self.began = clients, rounds, []

    def get_next_central_contexts(self, model, iteration, params, train_params, eval_params=None):
        self.began.append(time.perf_counter())
        if iteration == self.rounds:
            return None, model, Metrics()
        context = CentralContext(
            current_central_iteration=iteration,
            do_evaluation=False,
            cohort_size=self.clients,
            population=Population.TRAIN,
            model_train_params=train_params,
            model_eval_params=eval_params,
            algorithm_params=params,
            seed=iteration,
        )
        return (context,), model, Metrics()

    def process_aggregated_statistics(self, context, metrics, model, statistics):
        return model.apply_model_update(statistics)

    def simulate_one_user(self, model, dataset, context):
        values = (model.values + CONSTANT) * np.float32(WEIGHT)
        return MappedVectorStatistics({"values": values}, weight=WEIGHT), Metrics()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--clients", type=int, default=20_000)
    parser.add_argument("--values", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    set_framework_module(numpy_ops)
    one_row = [np.zeros((1_000, 1), np.float32)]
    data = ArtificialFederatedDataset.from_slices(one_row, lambda n: np.arange(n) % 1_000, lambda: WEIGHT)
    backend = SimulatedBackend(training_data=data, val_data=data)
    algorithm, model = WithoutTraining(args.clients, args.rounds), Vector(args.values)
    algorithm.run(AlgorithmHyperParams(), backend, model, ModelHyperParams(), send_metrics_to_platform=False)
    assert abs(float(model.values[0]) - 0.001 * args.rounds) < 1e-5, model.values[0]
    seconds = np.diff(algorithm.began)
    print(
        json.dumps(
            {
                "clients_per_s": round(args.clients * len(seconds) / float(seconds.sum()), 1),
                "round_s": [round(float(s), 3) for s in seconds],
                "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
                "cpu_s": round(time.process_time(), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
