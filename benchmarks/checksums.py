"""What listing and comparing files costs, beside the stages that do it.

    python benchmarks/checksums.py --extracted output/stages/extracted/large --model examples/models/large

Runs stage 3, stage 4 and the flattening on what stage 2 wrote, in this process, and times within them the listing
(utils/manifest.py: size and CRC-32 of every file written). Then it times what the next stage does with the list:
comparing sizes, and reading everything with --verify_checksums.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import make_token_trie
import save_token_trie_info
from benchmarks.common import seconds_of, table, write_json
from utils.cli import Parser, run_script
from utils.datastore import flattened
from utils.datastore.store import open_datastore
from utils.datastore.trie_files import HIDDEN_STATES_MANIFEST, HIDDEN_STATES_STAGE, MANIFEST, STAGE, trie_folder_path
from utils.manifest import list_files, read_list, read_manifest, require_as_written


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--extracted", type=Path, required=True, help="stage 2's --output_dir, with the .h5")
    parser.add_argument("--partition", default="train", help="of the extracted text")
    parser.add_argument("--model", required=True, help="whose tokenizer stage 2 used")
    parser.add_argument("--tok_prob_threshold", type=float, default=0.1, help="γ")
    parser.add_argument("--output", type=Path, default=Path("checksums.json"), help="file for the figures")
    return parser.parse_args(argv)


class Listing:
    """Stands in for `list_files` and sums up how long it took."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for module in (save_token_trie_info, make_token_trie, flattened):
            module.list_files = self  # type: ignore[attr-defined]

    def __call__(self, *arguments: Any) -> dict[str, Any]:
        started = time.perf_counter()
        found = list_files(*arguments)
        self.seconds += time.perf_counter() - started
        return found

    def taken(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    listing, rows, results = Listing(), [], {}
    with tempfile.TemporaryDirectory() as tries, redirect_stdout(sys.stderr):
        names = ["--dataset_name", "d", "--model_ds", "m", "--model_gen", "m", "--partition", args.partition]
        names += ["--tok_prob_threshold", str(args.tok_prob_threshold)]
        stem = args.extracted / args.partition
        maps = ["--idx_to_seqlen_path", f"{stem}_index_to_seqlen.json"]
        maps += [
            "--index_to_acc_index_path",
            f"{stem}_index_to_acc_index.json",
            "--all_hidden_states_path",
            f"{stem}.h5",
        ]
        folder = trie_folder_path(Path(tries), "d", "m", "m", args.partition, args.tok_prob_threshold)
        pickles = folder / flattened.FOLDER
        stage_3 = ["--token_prob_dir", str(stem), "--output_dir", tries, "--model_name", args.model, *names]
        steps: list[tuple[str, Callable[[], object], Path, str]] = [
            ("3 tries", lambda: save_token_trie_info.main(stage_3), folder / MANIFEST, STAGE),
            (
                "4 vectors",
                lambda: make_token_trie.main(["--save_dir", tries, *names, *maps]),
                folder / HIDDEN_STATES_MANIFEST,
                HIDDEN_STATES_STAGE,
            ),
            (
                "5 flattening",
                lambda: open_datastore(folder, device=torch.device("cpu"), max_bytes=10**9),
                pickles / MANIFEST,
                flattened.FLATTENING_STAGE,
            ),
        ]
        for name, run, path, stage in steps:
            seconds = seconds_of(run)
            listed_s = listing.taken()
            manifest = read_manifest(path, stage)
            files = [path.parent / each for each in read_list(path, manifest)]
            sizes_s, verify_s = (
                seconds_of(lambda: require_as_written(path, manifest, files, verify=verify))  # noqa: B023
                for verify in (False, True)
            )
            n_bytes = manifest.files["n_bytes"]
            figures = {"seconds": seconds, "listing": listed_s, "sizes": sizes_s, "verify": verify_s}
            results[name] = {"files": len(files), "bytes": n_bytes, **figures}
            share = f"{listed_s / seconds:.1%}"
            shown = (f"{seconds:.2f}", f"{listed_s:.2f}", share, f"{sizes_s:.2f}", f"{verify_s:.2f}")
            rows.append((name, len(files), f"{n_bytes / 1e6:.1f}", *shown))
    header = (
        "stage",
        "files",
        "MB",
        "stage, s",
        "listing in it, s",
        "share",
        "comparing sizes, s",
        "--verify_checksums, s",
    )
    print(table(header, rows))
    write_json(args.output, torch.device("cpu"), argv, results)


if __name__ == "__main__":
    run_script(main)
