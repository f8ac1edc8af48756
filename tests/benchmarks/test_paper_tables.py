"""The paper's tables: kNN-LM and the removal of near-duplicates equal what loops give, and the commands run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXTS
from decoding_cases import trie

from benchmarks.paper import chunk_length, composition, datastores, knn_lm, ngrams, perplexity
from benchmarks.paper.common import Reader, mean_interval, of_passages, ratio, works_of
from benchmarks.paper.knn_lm import Choice, Keys, best_weight, knn_probabilities, nearest_keys
from benchmarks.paper.near_duplicates import PartOfDatastore, SharedRuns, runs_of
from utils.datastore.store import Datastore
from utils.evaluation.perplexity import Positions
from utils.files import InputError
from utils.lm.model import load_tokenizer
from utils.text.corpora import Passage
from utils.text.windows import WindowShape, plan_windows

RNG = np.random.default_rng


# ---- kNN-LM


@pytest.mark.parametrize("stride", [30, 40])
def test_every_token_with_a_next_one_is_a_key_once(gpt2_folder, tmp_path, stride):
    tokenizer = load_tokenizer(str(gpt2_folder))
    plan = plan_windows([Passage(text) for text in TEXTS], tokenizer, WindowShape(40, stride, 2), tmp_path)
    vectors = RNG(0).normal(size=(plan.n_tokens, 3)).astype(np.float32)
    keys = Keys.of_windows(plan, vectors)
    passages = [tokenizer.encode(text) for text in TEXTS]
    tokens, ends = (
        [token for passage in passages for token in passage],
        np.cumsum([len(passage) for passage in passages]),
    )
    seen = []
    firsts = np.cumsum(plan.lengths) - plan.lengths
    for row, next_id in zip(keys.kept.tolist(), keys.next_ids.tolist(), strict=True):
        window = int(np.searchsorted(firsts, row, side="right")) - 1
        place = int(plan.starts[window] + row - firsts[window])
        assert tokens[place + 1] == next_id
        seen.append(place)
    wanted = set(range(int(ends[-1]))) - set((ends - 1).tolist())
    if stride == 40:  # windows that share nothing: what follows a window's last token is not read with it
        wanted -= set((plan.starts + plan.lengths - 1).tolist())
    assert sorted(seen) == sorted(wanted)


def made_keys(n_keys: int, n_ids: int = 6) -> Keys:
    vectors = RNG(1).normal(size=(n_keys + 7, 5)).astype(np.float16)
    kept = np.sort(RNG(2).choice(n_keys + 7, n_keys, replace=False))
    return Keys(vectors, kept, RNG(3).integers(0, n_ids, n_keys))


@pytest.mark.parametrize("n_keys", [3, 50, 200])
def test_knn_probabilities_are_those_of_loops(monkeypatch, n_keys):
    monkeypatch.setattr(knn_lm, "KEYS_AT_ONCE", 16)
    keys, queries = made_keys(n_keys), RNG(4).normal(size=(9, 5)).astype(np.float32)
    targets = RNG(5).integers(0, 6, 9)
    found = knn_probabilities(
        *nearest_keys(keys, torch.from_numpy(queries), 20), torch.from_numpy(targets), (1, 8, 20), (0.5, 3.0)
    )
    for q, query in enumerate(queries.astype(np.float64)):
        distances = ((keys.vectors[keys.kept].astype(np.float64) - query) ** 2).sum(axis=1)
        for i, k in enumerate((1, 8, 20)):
            nearest = np.argsort(distances)[:k]
            for j, temperature in enumerate((0.5, 3.0)):
                weights = np.exp(-distances[nearest] / temperature)
                wanted = weights[keys.next_ids[nearest] == targets[q]].sum() / weights.sum()
                assert found[i, j, q] == pytest.approx(wanted, rel=1e-4, abs=1e-7)


def test_probabilities_of_all_tokens_add_up_to_one():
    keys, queries = made_keys(60), torch.from_numpy(RNG(4).normal(size=(4, 5)).astype(np.float32))
    nearest = nearest_keys(keys, queries, 10)
    each = [knn_probabilities(*nearest, torch.full((4,), token), [10], [1.0]) for token in range(6)]
    assert sum(each[1:], each[0]).ravel().tolist() == pytest.approx([1.0] * 4)


def test_the_weight_is_that_of_a_fine_grid():
    rng = RNG(6)
    of_knn = np.where(rng.random(400) < 0.4, rng.random(400), 0.0)
    of_lm = np.log(rng.uniform(0.05, 0.5, 400))
    grid = np.linspace(0.001, 0.999, 999)
    likelihood = [Choice(1, 1.0, weight).log_probs(of_knn, of_lm, np.zeros(400)).sum() for weight in grid]
    assert best_weight(of_knn, of_lm) == pytest.approx(grid[int(np.argmax(likelihood))], abs=2e-3)
    assert best_weight(np.zeros(400), of_lm) < 1e-6


def test_tuning_finds_the_best_of_its_grid_and_scores_by_it():
    keys = made_keys(300)
    rng = RNG(7)
    hidden, following = rng.normal(size=(40, 5)).astype(np.float32), rng.integers(0, 6, 40)
    of_lm = np.log(rng.uniform(0.02, 0.3, 40))
    places = rng.permutation(40)
    parts = [
        Positions(following[at], at, hidden[at], following[at], of_lm[at], at, at) for at in (places[:25], places[25:])
    ]
    choice, by_distance = knn_lm.tune(keys, parts, of_lm, torch.device("cpu"))
    others = [replace(choice, n_neighbors=16), replace(choice, temperature=choice.temperature / 2)]
    tuned, of_map, *worse = knn_lm.log_probs(keys, parts, of_lm, [choice, by_distance, *others], torch.device("cpu"))
    assert all(each.sum() <= tuned.sum() + 1e-5 for each in worse)
    assert tuned.sum() >= of_lm.sum() - 1e-5
    # A constant is a map too.
    assert of_map.sum() >= tuned.sum() - 1e-2
    assert by_distance.weight_map is not None
    assert list(by_distance.weight_map.probabilities) == sorted(by_distance.weight_map.probabilities)


# ---- n-grams


def counted(passages: list[list[int]], context: list[int], token: int) -> tuple[int, int]:
    """How often a context stands before some token, and before this one."""
    n = len(context)
    found = [p[i + n] for p in passages for i in range(len(p) - n) if p[i : i + n] == context]
    return len(found), found.count(token)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_ngrams_are_counted_as_loops_count_them(order):
    rng = RNG(11)
    passages = [rng.integers(0, 3, n).tolist() for n in (40, 2, 1, 17)]
    counts = ngrams.NGramCounts.of([np.array(p) for p in passages], order)
    for length in (2, 3, 12):
        window = rng.integers(0, 4, length).tolist()
        contexts, of_token = counts.lookup(np.array(window), order)
        for at in range(1, length):
            wanted = (0, 0)
            if at >= order - 1:
                wanted = counted(passages, window[at - order + 1 : at], window[at])
            assert (contexts[at - 1], of_token[at - 1]) == wanted


def test_probabilities_of_all_tokens_under_lm_and_ngrams_add_up_to_one():
    rng = RNG(12)
    passages = [rng.integers(0, 4, 60)]
    lm = np.log(rng.dirichlet(np.ones(4)))
    windows = [rng.integers(0, 4, 30)]
    mixed = ngrams.fit(passages, windows, lm[windows[0][1:]], orders=4)
    before = windows[0][:9]
    total = sum(
        np.exp(mixed.log_probs([np.append(before, token)], np.append(lm[before[1:]], lm[token]))[-1])
        for token in range(4)
    )
    assert total == pytest.approx(1.0)


def test_em_of_ngram_weights_is_no_worse_than_weights_near_it():
    rng = RNG(13)
    passages = [np.tile(rng.integers(0, 6, 15), 5), rng.integers(0, 6, 50)]
    windows = [np.concatenate([passages[0][4:30], rng.integers(0, 6, 20)])]
    of_lm = np.log(rng.uniform(0.05, 0.4, len(windows[0]) - 1))
    fitted = ngrams.fit(passages, windows, of_lm, orders=3)
    best = fitted.log_probs(windows, of_lm).sum()
    assert best > of_lm.sum()
    for change in np.eye(3 * ngrams.N_BUCKETS).reshape(-1, 3, ngrams.N_BUCKETS):
        for step in (-0.1, 0.1):
            near = replace(fitted, weights=(fitted.weights + step * change).clip(1e-9, 1 - 1e-9))
            assert near.log_probs(windows, of_lm).sum() <= best + 1e-3


# ---- Intervals


def test_a_mean_lies_in_its_interval_which_narrows_with_more_values():
    rng = RNG(8)
    few, many = mean_interval(rng.normal(3, 1, 20)), mean_interval(rng.normal(3, 1, 2000))
    assert few.lower < few.value < few.upper
    assert many.upper - many.lower < 0.2 * (few.upper - few.lower)
    assert many.upper - many.lower == pytest.approx(2 * 1.96 / np.sqrt(2000), rel=0.15)


def test_the_ratio_of_perplexities_weighs_windows_by_their_tokens():
    log_p, other, lengths = np.array([-10.0, -2.0]), np.array([-12.0, -2.5]), np.array([5, 1])
    found = ratio(log_p, other, lengths)
    assert found.value == pytest.approx(np.exp(-(12 + 2.5 - 10 - 2) / 6))
    assert found.lower <= found.value <= found.upper < 1


def test_sums_over_passages_are_those_of_their_windows():
    assert of_passages(np.array([1.0, 2.0, 4.0, 8.0]), np.array([0, 0, 3, 5])).tolist() == [3.0, 4.0, 8.0]


# ---- Near-duplicates


def runs_by_sets(token_ids: list[int], n: int) -> set[tuple[int, ...]]:
    return {tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)}


def test_overlap_is_that_of_sets_of_runs():
    rng = RNG(9)
    passages = [rng.integers(0, 3, length).tolist() for length in (40, 6, 2, 25, 0)]
    shared = SharedRuns([np.array(passage) for passage in passages], 4)
    theirs = [runs_by_sets(passage, 4) for passage in passages]
    for length in (3, 4, 9, 30):
        own_ids = rng.integers(0, 3, length).tolist()
        own = runs_by_sets(own_ids, 4)
        shares = [len(own & each) / len(each) for each in theirs if each]
        of_own = len(own & set().union(*theirs)) / len(own) if own else 0.0
        assert shared.overlap(np.array(own_ids)) == pytest.approx(max([of_own, *shares]) if own else 0.0)
    assert shared.overlap(np.array(passages[0])) == 1.0


def test_runs_that_differ_by_leading_or_trailing_zeros_are_others():
    runs = [np.array(ids) for ids in ([0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0])]
    assert len({int(runs_of(ids, 3)[0]) for ids in runs}) == 4
    assert len(runs_of(np.zeros(10, dtype=np.int64), 3)) == 1


def test_a_datastore_without_some_windows_is_one_of_the_other_rows():
    rng = RNG(10)
    rows = [(unit, rng.integers(0, 9, int(rng.integers(1, 4))).tolist()) for unit in np.eye(6)]
    whole = trie(3, rows)
    whole = replace(whole, windows=np.array([0, 1, 2, 1, 0, 2]))
    part = PartOfDatastore(Datastore.of([whole], 6), np.array([False, True, False])).trie(3)
    assert part is not None
    assert part.windows.tolist() == [0, 2, 0, 2]
    for i, row in enumerate((0, 2, 4, 5)):
        assert part.chunk(i) == whole.chunk(row)
        assert part.context_vectors[i].tolist() == whole.context_vectors[row].tolist()
    nothing = PartOfDatastore(Datastore.of([whole], 6), np.array([True, True, True]))
    assert nothing.trie(3) is None
    assert nothing.trie(4) is None


# ---- The commands


@pytest.fixture(scope="module")
def table_flags(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Flags of a small text, half of whose test split stands in its train split too."""
    root = tmp_path_factory.mktemp("paper")
    splits = {"train": TEXTS, "validation": [TEXTS[0][:300], TEXTS[3][:300]], "test": [TEXTS[1], TEXTS[3]]}
    for split, texts in splits.items():
        (root / f"{split}.json").write_text(json.dumps([{"text": text} for text in texts]))
    models = ["--model_ds", gpt2_folder, "--model_gen", gpt2_folder, "--device", "cpu", "--work", root / "work"]
    windows = ["--chunk_size", 64, "--stride", 48, "--min_length", 10, "--perplexity_window", 60]
    return [*models, *windows, "--text", f"toy={root}", "--tok_prob_threshold", 0.01]


def run_table(module, flags, tmp_path, monkeypatch, run_stage) -> dict:
    """The results of a table's command, its stages run in this process, which spares their imports."""
    monkeypatch.setattr(datastores, "run_script", run_stage)
    module.main([str(flag) for flag in (*flags, "--output", tmp_path / "table.json")])
    return json.loads((tmp_path / "table.json").read_text())["results"]["toy"]


def test_the_table_of_perplexity(table_flags, tmp_path, monkeypatch, run_stage, capsys):
    flags = (*table_flags, "--knn_tuning_windows", 3, "--neighbors", 2, 8)
    found = run_table(perplexity, flags, tmp_path, monkeypatch, run_stage)
    rows = found["rows"]
    assert (
        rows["small LM"]["tokens"] == rows["kNN-LM"]["tokens"] == rows["KCD, fitted map"]["tokens"] == found["tokens"]
    )
    # The text is the datastore's own.
    assert rows["KCD, fitted map"]["ratio_upper"] < 0.9
    assert rows["kNN-LM"]["ratio_upper"] < 0.9
    assert rows["LM + n-grams"]["ratio_upper"] < 0.9
    assert rows["KCD, 8 rows"]["mixture"]["n_neighbors"] == 8
    assert rows["KCD, 8 rows"]["ratio"] < rows["KCD, 2 rows"]["ratio"] < rows["KCD, prefixes"]["ratio"]
    assert rows["KCD, random rows, 8"]["ratio"] < 1
    assert rows["kNN-LM, λ(distance)"]["ratio"] < 0.9
    assert found["most_rows_to"]["small LM"]["upper"] < 0.9
    ratio_to_base = found["fitted_map_to"]["small LM"]
    assert ratio_to_base["value"] == pytest.approx(rows["KCD, fitted map"]["ratio"])
    assert ratio_to_base["lower"] == pytest.approx(rows["KCD, fitted map"]["ratio_lower"])
    assert found["passages"] == 2
    assert ratio_to_base["lower_over_passages"] <= ratio_to_base["value"] <= ratio_to_base["upper_over_passages"]
    shown = capsys.readouterr().out
    assert all(row["shown"] in shown for row in rows.values())


def test_the_table_of_chunk_length(table_flags, tmp_path, monkeypatch, run_stage):
    lengths = run_table(chunk_length, table_flags, tmp_path, monkeypatch, run_stage)["lengths"]
    assert list(lengths) == ["1", "2", "4", "0"]
    means = [found["mean_chunk_length"] for found in lengths.values()]
    matched = [found["matched"] for found in lengths.values()]
    assert means == sorted(means)
    assert matched == sorted(matched, reverse=True)
    assert lengths["0"]["fitted_map_to_uncut"]["value"] == 1.0


def test_the_table_of_what_the_gain_is_made_of(table_flags, tmp_path, monkeypatch, run_stage):
    found = run_table(composition, table_flags, tmp_path, monkeypatch, run_stage)
    total = found["groups"][""]["all positions"]["gain"]["fitted map"]["value"]
    stores = found["datastores"]
    assert np.exp(-total / 1000) == pytest.approx(stores["all passages"]["rows"]["fitted map"]["ratio"])
    for kind in ("proposal", "tokens of the chunk", "rows of the entry token's trie"):
        parts = found["groups"][kind].values()
        assert sum(part["gain"]["fitted map"]["value"] for part in parts) == pytest.approx(total)
    assert found["near_duplicates"]["passages"] == 3
    assert stores["without near-duplicates"]["rows"]["fitted map"]["ratio"] > np.exp(-total / 1000)


def test_taking_windows_out_is_making_the_datastore_without_them(table_flags, tmp_path, monkeypatch, run_stage):
    monkeypatch.setattr(datastores, "run_script", run_stage)
    args = composition.parse_args([str(flag) for flag in table_flags])
    (work,) = works_of(args).values()
    reader = Reader.of(work, args)
    lm = reader.load(work.model_gen)
    passages = composition.read_overlaps(reader, 13)
    is_left_out = np.array([False, True, False, True])
    part = passages.without(reader.datastore(lm), is_left_out)
    for split, texts in (("train", [TEXTS[0], TEXTS[2]]), ("validation", TEXTS[:1]), ("test", TEXTS[:1])):
        (tmp_path / f"{split}.json").write_text(json.dumps([{"text": text} for text in texts]))
    again = reader.datastore(lm, work.of_text(tmp_path, "other_passages"))
    found, wanted = (reader.proposals(lm, store, reader.test) for store in (part, again))
    assert found.similarities == pytest.approx(wanted.similarities, abs=1e-6, nan_ok=True)
    assert found.chunk_lengths.tolist() == wanted.chunk_lengths.tolist()
    assert found.agreeing.tolist() == wanted.agreeing.tolist()
    assert (
        0
        < (wanted.chunk_lengths > 0).sum()
        < (reader.proposals(lm, reader.datastore(lm), reader.test).chunk_lengths > 0).sum()
    )


def test_a_text_without_a_split_is_refused_before_anything_is_read(tmp_path, table_flags):
    at = table_flags.index("--text")
    with pytest.raises(InputError, match=r"train\.json: does not exist"):
        perplexity.main([str(flag) for flag in (*table_flags[:at], "--text", f"none={tmp_path}")])
