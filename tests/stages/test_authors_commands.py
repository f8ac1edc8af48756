"""The five commands of the authors' README run one after the other with exactly its flags, in a folder where its hub
names are folders: so nothing is fetched, and no flag is added."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from synthetic_corpus import LENGTHS, all_bytes, write_corpus

from save_token_trie_info import parse_args

MODELS = ("gpt2", "gpt2-xl-conversational")
README_OF_WIKITEXT = """---
configs:
- config_name: wikitext-103-v1
  data_files:
  - {split: train, path: "wikitext-103-v1/train-*"}
  - {split: validation, path: "wikitext-103-v1/validation-*"}
  - {split: test, path: "wikitext-103-v1/test-*"}
---
"""
PREPROCESS = """preprocess_dataset.py --dataset wikitext-103-v1 --cache_dir HERE/cache --output_dir HERE/data"""
EXTRACT = """extract_token_probs_and_memmap.py --model_path gpt2-xl-conversational --data_dir HERE/data
    --output_dir HERE/output --save_hidden_states --partition train --construct_memmap True --cache_dir HERE/cache"""
TRIES = """save_token_trie_info.py --token_prob_dir HERE/output/train --output_dir HERE/trie_info --model_name gpt2
    --dataset_name wikitext-103 --model_ds gpt2 --partition train --tok_prob_threshold 0.3"""
VECTORS = """make_token_trie.py --save_dir HERE/trie_info/token_trie_wikitext-103_DSgpt2_Hgpt2/train_0.3
    --dataset_name wikitext-103 --model_ds gpt2 --model_gen gpt2 --partition train --tok_prob_threshold 0.3
    --idx_to_seqlen_path HERE/output/train_index_to_seqlen.json
    --index_to_acc_index_path HERE/output/train_index_to_acc_index.json
    --all_hidden_states_path HERE/output/train.h5 --max_workers 16"""
EVALUATE = """eval.py --model_path gpt2 --cache_dir HERE/cache
    --token_trie_dir HERE/trie_info/token_trie_wikitext-103_DSgpt2_Hgpt2/train_0.3 --dataset wikitext-103
    --partition test --tok_prob_threshold 0.3 --model_ds gpt2 --model_gen gpt2 --prompt_file HERE/prompts.json
    --save_dir HERE/results --similarity_threshold 0.5 --max_new_tokens 50"""
RunStage = Callable[..., None]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with the models, the dataset as the hub has it, and prompts."""
    for name in MODELS:
        shutil.copytree(ROOT / "examples/models/small", tmp_path / name)
    dataset = tmp_path / "Salesforce/wikitext"
    (dataset / "wikitext-103-v1").mkdir(parents=True)
    (dataset / "README.md").write_text(README_OF_WIKITEXT)
    # A text that the example's model knows, so that many tokens are above γ.
    article = [f"{line}\n" for line in (ROOT / "LICENSE").read_text().splitlines()[:40]]
    for split in ("train", "validation", "test"):
        lines = ["", f" = The {split} article = \n", "", *article, *article]
        pq.write_table(pa.table({"text": lines}), dataset / "wikitext-103-v1" / f"{split}-00000-of-00001.parquet")
    prompts = ["".join(article[:4]), "Return a new list of"]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_five_commands_of_the_authors_readme_run(here: Path, run_stage: RunStage) -> None:
    for command in (PREPROCESS, EXTRACT, TRIES, VECTORS, EVALUATE):
        run_stage(*command.replace("HERE", str(here)).split())
    windows = len(list((here / "output/train").glob("token_probs_*.json")))
    assert len(list((here / "output/train").glob("hidden_states_*.npy"))) == windows > 0
    for name in ("train.h5", "train_index_to_seqlen.json", "train_index_to_acc_index.json"):
        assert (here / "output" / name).is_file()
    folder = here / "trie_info/token_trie_wikitext-103_DSgpt2_Hgpt2/train_0.3"
    for ending in ("token_prob_list", "all_phrases_0.3", "all_filtered_tok_probs_0.3"):
        assert (here / f"trie_info/gpt2_wikitext-103_train_{ending}.json").is_file()
    entry_tokens = [int(path.stem) for path in folder.glob("[0-9]*.json")]
    assert len(entry_tokens) > 10
    for token in entry_tokens:
        assert (folder / f"tok_pos_{token}.json").is_file()
        assert (folder / f"{token}.h5").is_file()
    for i in range(2):
        found = json.loads((here / f"results/prompt_{i}.json").read_text(encoding="utf-8"))
        assert set(found["time"]) == {"generation_t0.5"}
        assert found["metrics"]["generation_t0.5"]["new_tokens"] <= 50
    # It says to add this flag for the baseline, which joins the same files.
    run_stage(*EVALUATE.replace("HERE", str(here)).split(), "--gen_baseline_only")
    found = json.loads((here / "results/prompt_1.json").read_text(encoding="utf-8"))
    assert set(found["time"]) == {"baseline_generation_time", "generation_t0.5"}


def test_without_model_gen_stage_3_takes_model_ds_for_both(
    gpt2_folder: Path, tmp_path: Path, run_stage: RunStage
) -> None:
    corpus = write_corpus(tmp_path / "stage_2", gpt2_folder, LENGTHS, n_ids=4)
    assert "--model_gen" not in corpus.stage_3_flags(tmp_path, model_gen=None)
    for name, model_gen in (("without", None), ("with", "org/large")):
        run_stage("save_token_trie_info.py", *corpus.stage_3_flags(tmp_path / name, model_gen=model_gen))
    assert all_bytes(tmp_path / "without") == all_bytes(tmp_path / "with")
    assert (tmp_path / "without/token_trie_toy_DSorg_large_Horg_large/train_0.5/manifest.json").is_file()
    args = parse_args([str(flag) for flag in corpus.stage_3_flags(tmp_path, model_gen="small")])
    assert (args.model_ds, args.model_gen) == ("org/large", "small")
