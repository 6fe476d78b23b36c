"""All pairs of columns in DuckDB beside `tabmesh-sim bench marginals`: the same counts of the same file.

    python3 -m venv peers && peers/bin/pip install duckdb
    peers/bin/python simulations/peers/marginals_duckdb.py --ours PATH/TO/tabmesh-sim --data FILE.parquet --rows 1000000

Our program runs first, writes FILE.parquet if it isn't there, and says how values become cells and which ids are on the
training side: DuckDB can't know them, since both cap and gate are keyed hashes in the agent. DuckDB then reads the file once into a
table of small codes, joined with these ids, and counts every pair by one GROUP BY. Our time contains finding out which rows
count; DuckDB's contains reading the list of them. Counts must agree to the last one. Prints JSON.

`--no-ours` takes `query.json` and `training.parquet` from `--peer` as an earlier run left them and prints the digest of the counts alone.
"""

import argparse
import array
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time

import duckdb


def ours(args, folder):
    command = [args.ours, "bench", "marginals", "--rows", str(args.rows), "--columns", str(args.columns)]
    command += ["--data", args.data, "--peer", folder, "--output", "json"]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def coded(attribute):
    """The cell of a value as an expression, and how many cells there are."""
    column = f'"{attribute["column"]}"'
    if "edges" in attribute:
        edges = attribute["edges"]
        whens = " ".join(f"WHEN {column} < {edge!r} THEN {at}" for at, edge in enumerate(edges))
        return f"CASE WHEN {column} IS NULL THEN {len(edges) + 1} {whens} ELSE {len(edges)} END", len(edges) + 2
    levels = attribute.get("levels") or attribute["classes"]
    whens = " ".join(f"WHEN '{level}' THEN {at}" for at, level in enumerate(levels))
    if "classes" in attribute:
        return f"CASE {column} {whens} END", len(levels)
    missing = f"CASE WHEN {column} IS NULL THEN {len(levels) + 1} ELSE {len(levels)} END"
    return f"CASE {column} {whens} ELSE {missing} END", len(levels) + 2


def counted(args, folder):
    with open(f"{folder}/query.json") as file:
        query = json.load(file)
    attributes = [coded(attribute) for attribute in query["attributes"]]
    label = next(f'"{a["column"]}"' for a in query["attributes"] if "classes" in a)
    database = duckdb.connect()
    database.execute(f"SET threads = {args.threads}")
    database.execute("SET preserve_insertion_order = false")
    start = time.perf_counter(), time.process_time()
    columns = ", ".join(f"({code})::UTINYINT AS a{at}" for at, (code, _) in enumerate(attributes))
    database.execute(
        f"CREATE TEMP TABLE codes AS SELECT {columns} FROM read_parquet('{args.data}') "
        f"WHERE id IN (SELECT id FROM read_parquet('{folder}/training.parquet')) AND {label} IN ('0', '1')"
    )
    read = time.perf_counter(), time.process_time()
    counts = array.array("q")
    for a, b in query["marginals"]:
        cells = [0] * (attributes[a][1] * attributes[b][1])
        for x, y, count in database.execute(f"SELECT a{a}, a{b}, count(*) FROM codes GROUP BY a{a}, a{b}").fetchall():
            cells[x * attributes[b][1] + y] = count
        counts.extend(cells)
    end = time.perf_counter(), time.process_time()
    if sys.byteorder == "big":
        counts.byteswap()
    wall, cpu = end[0] - start[0], end[1] - start[1]
    return {
        "duckdb": duckdb.__version__,
        "threads": args.threads,
        "wall_s": round(wall, 2),
        "cpu_s": round(cpu, 2),
        "of_it_reading_cpu_s": round(read[1] - start[1], 2),
        "rows_per_s": round(args.rows / wall),
        "rows_per_cpu_s": round(args.rows / cpu),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "sha256": hashlib.sha256(counts.tobytes()).hexdigest(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", help="the tabmesh-sim program to run beside")
    parser.add_argument("--no-ours", action="store_true", help="count what an earlier run left in --peer")
    parser.add_argument("--data", required=True, help="Parquet file; our program writes it if it isn't there")
    parser.add_argument("--peer", help="folder for query.json and training.parquet; a temporary one if not given")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--columns", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.no_ours != (args.ours is None) or (args.no_ours and args.peer is None):
        parser.error("give --ours PATH, or --no-ours with --peer FOLDER")

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.peer or temporary
        outcome = {} if args.no_ours else {"ours": ours(args, folder)}
        outcome["duckdb"] = counted(args, folder)
    if "ours" in outcome:
        outcome["same_counts"] = outcome["ours"]["sha256"] == outcome["duckdb"]["sha256"]
        outcome["cpu_ratio"] = round(outcome["duckdb"]["cpu_s"] / outcome["ours"]["cpu_s"], 2)
    print(json.dumps(outcome, indent=2))
    if not outcome.get("same_counts", True):
        sys.exit("the counts differ")


if __name__ == "__main__":
    main()
