"""Make the staff directory: invented people, each with four facts that no language model can know, marked as spans.

Writes  OUTPUT_FILE  [{"text": str, "spans": [[start, end]], "name": str, "fact": str, "questions": {kind: str}}, ...]
Run     python examples/make_staff_directory.py --output_file examples/staff_directory.json

Each fact is a passage of its own, so that the little before it is about nothing else. The span begins right after the
name: the entry token of the chunk is then the end of the name, and so is the end of each question. It ends with the
comma: after the last digit of a number the tries of that digit would go on with another number's.
"""

import argparse
import random
import sys
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.cli import NON_NEGATIVE_INT, Parser, run_script
from utils.json_io import write_json_list

FIRST_NAMES = "Ada Bela Carl Dora Emil Fay Gus Hana Ivo Jana Karl Lena Milo Nora Otto Pia Quin Rosa Sven Tara"
SURNAMES = (
    "Quill Marsh Brandt Okoye Lindt Ferro Novak Castel Hollis Vance Tamm Dray Whitlow Sorel Pike Amato Beck "
    "Corvin Dahl Elling Fenwick Garrow Hatch Ibsen Jolie Keller Lomax Mercer Nyberg Orlov Pruitt Quaid Rusk "
    "Salgado Teague Ulrich Visser Wexler Yates Zuber Abbott Bronte Cordova Dunmore Esposito Falk Gruber Hendrix"
)
COLOURS = ["amber", "cobalt", "crimson", "indigo", "olive", "silver", "violet", "walnut"]
THINGS = ["ledger", "lantern", "meadow", "falcon", "thistle", "harbor"]
CRAFTS = ["restoring", "painting", "trading", "building", "drawing", "collecting"]
OBJECTS = ["clocks", "kites", "violins", "maps", "canoes", "puppets", "bells", "stamps"]
# What comes after the marked fact and its comma.
SENTENCES = {
    "room": " on the second floor.",
    "phone": " which is answered from nine to five.",
    "project": " a module written in Python.",
    "hobby": " mostly on weekends.",
}
OTHER_WORDS = {"room": "office", "phone": "telephone number", "project": "work", "hobby": "pastime"}
OPENINGS = ("According to the directory, the", "Visitors often ask what the", "As far as anybody knows, the")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--output_file", type=Path, required=True, help="file to write")
    parser.add_argument("--seed", type=NON_NEGATIVE_INT, default=0, help="of the invented people and facts")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    n_facts = write_json_list(args.output_file, directory(args.seed))
    print(f"{args.output_file}: {n_facts} facts of {n_facts // len(SENTENCES)} people")


def directory(seed: int) -> list[dict[str, Any]]:
    """An entry for each fact of each person; no two people share one."""
    rng = random.Random(seed)
    first_names, surnames = FIRST_NAMES.split(), SURNAMES.split()
    n = len(surnames)
    facts = {
        "room": [str(number) for number in rng.sample(range(100, 1000), n)],
        "phone": [str(number) for number in rng.sample(range(1000, 10000), n)],
        "project": rng.sample([f"{colour} {thing}" for colour, thing in product(COLOURS, THINGS)], n),
        "hobby": rng.sample([f"{craft} {thing}" for craft, thing in product(CRAFTS, OBJECTS)], n),
    }
    people = [f"{rng.choice(first_names)} {surname}" for surname in surnames]
    rng.shuffle(people)
    return [entry(rng, name, kind, facts[kind][i]) for i, name in enumerate(people) for kind in SENTENCES]


def entry(rng: random.Random, name: str, kind: str, fact: str) -> dict[str, Any]:
    before, marked = f"The {kind} of {name}", f" is {fact},"
    opening = rng.choice(OPENINGS)
    return {
        "text": before + marked + SENTENCES[kind],
        "spans": [[len(before), len(before + marked)]],
        "name": name,
        "fact": fact,
        "questions": {
            "its words": f"{opening} {kind} of {name}",
            "other words": f"{opening} {OTHER_WORDS[kind]} of {name}",
        },
    }


if __name__ == "__main__":
    run_script(main)
