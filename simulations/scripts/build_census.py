#!/usr/bin/env python3
"""Cuts the quickstart's census tables out of the domain-split Census-Income set.

Usage: build_census.py SOURCE [OUT]

SOURCE holds `train/industry_*.parquet` and `test/industry_*.parquet`: the employed people of the KDD
Census-Income files (US Current Population Survey 1994-95) split by major industry of the employer, 70/30 by
label, one file a domain, empty cells as nulls. OUT defaults to `data/census_income` beside this script's folder.

Nothing here is random: rows are chosen by SHA-256 of their row id, without a look at any other value, so label
rates stay what they are. Equal input and pyarrow version give equal bytes.
"""

import hashlib
import pathlib
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

# shipped name -> source file, training rows kept
DOMAINS = {
    "education": ("industry_education", 3000),
    "finance": ("industry_finance_insurance_and_real_estate", 3000),
    "manufacturing": ("industry_manufacturing_durable_goods", 3000),
    "retail": ("industry_retail_trade", 3000),
    "transportation": ("industry_transportation", 3000),
    # The newcomer: takes part in no release and no round.
    "communications": ("industry_communications", 64),
}
TEST_ROWS = 1500
SALT = "tabmesh-census-1"

NUMERIC = [
    "age",
    "capital_gains",
    "capital_losses",
    "dividends_from_stocks",
    "num_persons_worked_for_employer",
    "wage_per_hour",
    "weeks_worked_in_year",
]
CATEGORICAL = [
    "class_of_worker",
    "education",
    "major_occupation_code",
    "marital_stat",
    "migration_code_change_in_msa",
    "sex",
    "tax_filer_stat",
]
SCHEMA = pa.schema(
    [("row_id", pa.int64())]
    + [(name, pa.int64()) for name in NUMERIC]
    + [(name, pa.string()) for name in CATEGORICAL]
    + [("label", pa.int8())]
)


def rank(row_id):
    """Position of a row in the order rows are drawn in; depends on the id alone."""
    return hashlib.sha256(f"{SALT}:{row_id}".encode()).hexdigest()


def draw(frame, rows):
    """The first `rows` rows in drawing order, given back in row id order."""
    order = sorted(frame.row_id, key=rank)[:rows]
    return frame[frame.row_id.isin(set(order))].sort_values("row_id")


def write(frame, path):
    """Writes the shipped columns; trailing blanks of category names are cut off."""
    columns = {}
    for field in SCHEMA:
        values = frame[field.name]
        if pa.types.is_string(field.type):
            values = values.str.rstrip()
        columns[field.name] = pa.array(values, type=field.type, from_pandas=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pydict(columns, schema=SCHEMA)
    pq.write_table(table, path, compression="zstd", compression_level=19, use_dictionary=True,
                   write_statistics=False, store_schema=False)


def information(frame, column):
    """Mutual information of a column with the label in millibits, Miller-Madow corrected; 12 quantile bins and
    a cell of its own for zero and for missing."""
    values = frame[column]
    if pd.api.types.is_numeric_dtype(values):
        edges = np.unique(np.quantile(values.dropna(), np.linspace(0, 1, 13)))[1:-1]
        cells = np.where(values.isna(), -2, np.where(values == 0, -1, np.searchsorted(edges, values, side="right")))
    else:
        cells = values.fillna("?").to_numpy()
    joint = pd.crosstab(cells, frame.label.to_numpy()).to_numpy(dtype=float)
    cells_used = joint.shape[0]
    joint = joint / joint.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    bits = (joint[seen] * np.log2(joint[seen] / independent[seen])).sum()
    return 1000 * (bits - (cells_used - 1) / (2 * len(frame) * np.log(2)))


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    source = pathlib.Path(sys.argv[1])
    default = pathlib.Path(__file__).resolve().parent.parent / "data" / "census_income"
    out = pathlib.Path(sys.argv[2]) if len(sys.argv) == 3 else default
    train, ranked = {}, []
    print("| domain | train rows | positive | test rows | positive | test rows whose features a train row shares |")
    print("|---|---|---|---|---|---|")
    for name, (origin, rows) in DOMAINS.items():
        full = pd.read_parquet(source / "train" / f"{origin}.parquet")
        train[name] = draw(full, rows)
        test = draw(pd.read_parquet(source / "test" / f"{origin}.parquet"), TEST_ROWS)
        assert train[name].label.nunique() == 2 and test.label.nunique() == 2, name
        assert not set(train[name].row_id) & set(test.row_id), name
        write(train[name], out / "train" / f"{name}.parquet")
        write(test, out / "test" / f"{name}.parquet")
        keys = [tuple(row) for row in test[NUMERIC + CATEGORICAL].astype(str).to_numpy()]
        seen = {tuple(row) for row in train[name][NUMERIC + CATEGORICAL].astype(str).to_numpy()}
        shared = np.mean([key in seen for key in keys])
        print(f"| {name} | {len(train[name])} | {train[name].label.mean():.3f} | {len(test)} "
              f"| {test.label.mean():.3f} | {shared:.1%} |")
        if rows > 64:
            ranked.append(full)
    pooled = pd.concat(ranked)
    scores = {c: information(pooled, c) for c in pooled.columns if c not in ("row_id", "label")}
    print("\n| column | information, millibits | missing | shipped |")
    print("|---|---|---|---|")
    for column, score in sorted(scores.items(), key=lambda item: -item[1]):
        shipped = "yes" if column in NUMERIC + CATEGORICAL else ""
        print(f"| {column} | {score:.1f} | {pooled[column].isna().mean():.1%} | {shipped} |")


if __name__ == "__main__":
    main()
