"""Rounds without training in Flower's simulation engine: what `tabmesh-sim bench null` counts, on its Ray backend.

Every client returns the vector it got plus a constant, with 100 examples; the server runs Flower's own FedAvg.

    python3 -m venv peers && peers/bin/pip install 'flwr[simulation]==1.41.0' ray==2.55.1 numpy==2.4.6
    peers/bin/python simulations/peers/null_flower.py --clients 1000 --values 50000 --rounds 3

Prints one JSON object. The first round starts the actors and is left out of the rate.
"""

import argparse
import json
import os
import resource
import sys
import time

os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    RAY_USAGE_STATS_ENABLED="0",
    OMP_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
)

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

CONSTANT = np.float32(0.001)

client = ClientApp()


@client.train()
def train(message, context):
    (vector,) = message.content["arrays"].to_numpy_ndarrays()
    content = {
        "arrays": ArrayRecord(numpy_ndarrays=[vector + CONSTANT]),
        "metrics": MetricRecord({"num-examples": 100}),
    }
    return Message(content=RecordDict(content), reply_to=message)


class Timed(FedAvg):
    """FedAvg that notes when rounds begin and end, and how many answered."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.seconds, self.answers = [], 0

    def configure_train(self, *args, **kwargs):
        self.began = time.perf_counter()
        return super().configure_train(*args, **kwargs)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.answers += sum(not reply.has_error() for reply in replies)
        done = super().aggregate_train(server_round, replies)
        self.seconds.append(time.perf_counter() - self.began)
        return done


def main():
    from flwr.simulation import run_simulation

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--clients", type=int, default=1_000)
    parser.add_argument("--values", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found = {}
    server = ServerApp()

    @server.main()
    def run(grid, context):
        strategy = Timed(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=args.clients,
            min_available_nodes=args.clients,
        )
        start = ArrayRecord(numpy_ndarrays=[np.zeros(args.values, np.float32)])
        end = strategy.start(grid=grid, initial_arrays=start, num_rounds=args.rounds)
        found["first"] = float(end.arrays.to_numpy_ndarrays()[0][0])
        found["seconds"], found["answers"] = strategy.seconds, strategy.answers

    ray = {"num_cpus": os.cpu_count(), "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    resources = {"num_cpus": 1, "num_gpus": 0.0}
    run_simulation(server, client, num_supernodes=args.clients, backend_config={"client_resources": resources, "init_args": ray})
    assert found["answers"] == args.clients * args.rounds, found
    assert abs(found["first"] - 0.001 * args.rounds) < 1e-5, found
    later = found["seconds"][1:]
    print(
        json.dumps(
            {
                "clients_per_s": round(args.clients * len(later) / sum(later), 1),
                "round_s": [round(s, 2) for s in found["seconds"]],
                "driver_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            }
        )
    )


if __name__ == "__main__":
    # Actors of the backend import this file by its name.
    here = os.path.dirname(os.path.abspath(__file__))
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, here)
    import null_flower

    null_flower.main()
