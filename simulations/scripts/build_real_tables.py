"""Builds the real tables of the prior, crates/tfm/data/real/*.json, from files that ship inside PyPI packages.

    python -m venv venv && venv/bin/pip install scikit-learn==1.9.1 statsmodels==0.15.0 palmerpenguins==0.1.6
    venv/bin/python simulations/scripts/build_real_tables.py

Each file holds one table by columns: numbers (null = missing), or a category's levels and the level index of each
row. Sources and licences are in crates/tfm/data/real/PROVENANCE.md. Equal package versions give equal bytes.
"""

import csv
import gzip
import io
import json
import pathlib
import sys
from importlib import metadata, resources

OUT = pathlib.Path(__file__).parents[2] / "crates/tfm/data/real"
MAX_ROWS = 1000


def text(package, path):
    raw = resources.files(package).joinpath(path).read_bytes()
    return (gzip.decompress(raw) if path.endswith(".gz") else raw).decode()


def number(cell):
    if cell in ("", "NA", "nan"):
        return None
    value = float(cell)
    return int(value) if value == int(value) else value


def numeric(name, cells):
    return {"name": name, "kind": "numeric", "values": [number(c) for c in cells]}


def category(name, cells):
    levels = sorted({c for c in cells if c not in ("", "NA")})
    index = {level: i for i, level in enumerate(levels)}
    return {"name": name, "kind": "category", "levels": levels, "codes": [index.get(c) for c in cells]}


def table(rows, categories, dropped=()):
    """Columns of a list of dictionaries of texts."""
    return [
        (category if name in categories else numeric)(name, [row[name] for row in rows])
        for name in rows[0]
        if name not in dropped
    ]


def read(package, path, delimiter=","):
    reader = csv.DictReader(io.StringIO(text(package, path)), delimiter=delimiter, quotechar="'" if delimiter == "\t" else '"')
    return [{(k or "").strip().strip("'\""): v.strip() for k, v in row.items()} for row in reader]


def sklearn_classic(path, features):
    """scikit-learn's own layout: a first line with counts and class names, then features and the class index."""
    lines = list(csv.reader(io.StringIO(text("sklearn.datasets.data", path))))
    names = lines[0][2:]
    rows = [dict(zip([*features, "class"], [*line[:-1], names[int(line[-1])]])) for line in lines[1:]]
    return table(rows, {"class"})


def digits():
    lines = list(csv.reader(io.StringIO(text("sklearn.datasets.data", "digits.csv.gz"))))[:MAX_ROWS]
    # 16 of 64 pixels, which keeps the file small: every second line, the middle half of it.
    kept = [8 * y + x for y in range(1, 8, 2) for x in range(2, 6)]
    columns = [numeric(f"pixel_{k // 8}_{k % 8}", [line[k] for line in lines]) for k in kept]
    return [*columns, category("digit", [str(int(float(line[64]))) for line in lines])]


WINE = ["alcohol", "malic_acid", "ash", "alcalinity_of_ash", "magnesium", "total_phenols", "flavanoids"]
WINE += ["nonflavanoid_phenols", "proanthocyanins", "color_intensity", "hue", "od280_od315", "proline"]
TABLES = {
    "iris": lambda: sklearn_classic("iris.csv", ["sepal_length", "sepal_width", "petal_length", "petal_width"]),
    "wine": lambda: sklearn_classic("wine_data.csv", WINE),
    "digits": digits,
    "penguins": lambda: table(read("palmerpenguins", "data/penguins.csv"), {"species", "island", "sex", "year"}),
    "anes96": lambda: table(read("statsmodels.datasets.anes96", "anes96.csv", "\t"), {"vote"}),
    "modechoice": lambda: table(
        read("statsmodels.datasets.modechoice", "modechoice.csv", ";"), {"mode", "choice"}, {"individual"}
    ),
    "grunfeld": lambda: table(read("statsmodels.datasets.grunfeld", "grunfeld.csv"), {"firm"}),
    "macrodata": lambda: table(read("statsmodels.datasets.macrodata", "macrodata.csv"), {"quarter"}),
}


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    for name, build in TABLES.items():
        columns = build()
        sizes = {len(c.get("values", c.get("codes"))) for c in columns}
        assert len(sizes) == 1, (name, sizes)
        body = json.dumps({"name": name, "columns": columns}, separators=(",", ":"), ensure_ascii=True)
        (OUT / f"{name}.json").write_text(body + "\n")
        kinds = [c["kind"] for c in columns]
        print(f"{name}: {sizes.pop()} rows, {kinds.count('numeric')} numbers, {kinds.count('category')} categories, {len(body)} bytes")
    for package in ("scikit-learn", "statsmodels", "palmerpenguins"):
        print(package, metadata.version(package), file=sys.stderr)


if __name__ == "__main__":
    main()
