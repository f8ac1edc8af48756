"""Small datastores made by the stages themselves, for tests of what reads them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GAMMA, SKIP, MAX_CHUNK = 0.004, 8, 5
LABELS = ("--model_ds", "ds", "--model_gen", "gen", "--partition", "train", "--tok_prob_threshold", GAMMA)


@dataclass
class Pipeline:
    """Folders of one model's pipeline up to stage 4."""

    model: Path
    root: Path

    @property
    def windows(self) -> Path:
        return self.root / "extracted" / "train"

    @property
    def tries(self) -> Path:
        return self.root / "tries" / "token_trie_texts_DSds_Hgen" / f"train_{GAMMA}"

    def eval_flags(self, save_dir: Path, *flags: object) -> list[object]:
        datastore = ("--token_trie_dir", self.root / "tries", "--dataset", "texts", *LABELS)
        prompts = ("--prompt_file", self.root / "prompts.json", "--save_dir", save_dir)
        return ["--model_path", self.model, *datastore, *prompts, "--device", "cpu", *flags]


def build(model: Path, root: Path, run_stage: Callable[..., None], texts: list[str], chunk_size: int = 64) -> Pipeline:
    pipeline = Pipeline(model, root)
    data = root / "data"
    data.mkdir(parents=True)
    (data / "train.json").write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")
    prompts = ["The quick brown fox", "東京は", "def add(a, b):\n", "the cat sat on"]
    (root / "prompts.json").write_text(json.dumps(prompts, ensure_ascii=False), encoding="utf-8")
    extract = ("--model_path", model, "--data_dir", data, "--output_dir", root / "extracted", "--partition", "train")
    sizes = ("--chunk_size", chunk_size, "--stride", chunk_size - 16, "--min_length", 20, "--device", "cpu")
    run_stage("extract_token_probs_and_memmap.py", *extract, *sizes, "--save_hidden_states", "--construct_memmap")
    chunks = ("--token_prob_dir", root / "extracted" / "train", "--output_dir", root / "tries", "--model_name", model)
    bounds = ("--skip_first_tokens", SKIP, "--max_chunk_length", MAX_CHUNK)
    run_stage("save_token_trie_info.py", *chunks, "--dataset_name", "texts", *LABELS, *bounds)
    maps = {
        "--idx_to_seqlen_path": "train_index_to_seqlen.json",
        "--index_to_acc_index_path": "train_index_to_acc_index.json",
        "--all_hidden_states_path": "train.h5",
    }
    states = [part for flag, name in maps.items() for part in (flag, root / "extracted" / name)]
    run_stage("make_token_trie.py", "--save_dir", root / "tries", "--dataset_name", "texts", *LABELS, *states)
    return pipeline
