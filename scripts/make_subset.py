"""Copy a folder of splits with fewer rows of some, drawn with a fixed seed.

    python scripts/make_subset.py DATA/arc_easy subset/arc_easy validation=64 test=200

Splits that are not named are copied whole. docs/results.md says which sizes its figures used.
"""

import argparse
import json
from pathlib import Path

from fedsp.seeding import numpy_stream
from fedsp.sources import Files

SPLITS = ("train", "validation", "test")


def copy_split(source: Path, target: Path, num_rows: int | None) -> int:
    """Write a split's rows, or `num_rows` of them in their order, as JSON lines.

    Args:
        source: Data file that `fedsp.sources.Files` reads.
        target: File to write.
        num_rows: How many; None or too many: all.

    Returns:
        Rows written.
    """
    rows = list(Files(str(source)).load())
    chosen = range(len(rows))
    if num_rows is not None and num_rows < len(rows):
        drawn = numpy_stream(0, "subset").permutation(len(rows))[:num_rows]
        chosen = sorted(drawn.tolist())
    target.write_text("".join(json.dumps(rows[idx]) + "\n" for idx in chosen))
    return len(chosen)


def main() -> None:
    """Copy all splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("sizes", nargs="*", metavar="SPLIT=ROWS")
    given = parser.parse_args()
    sizes = {name: int(rows) for name, rows in (size.split("=") for size in given.sizes)}
    given.target.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        for path in given.source.glob(f"{split}.jsonl*"):
            count = copy_split(path, given.target / f"{split}.jsonl", sizes.get(split))
            print(f"{split}: {count} rows")


if __name__ == "__main__":
    main()
