"""Perplexity: of a text under the LM, and under CD-LM with the proposals of a datastore (paper section 5).

The LM reads every window once. The proposals of all positions are found together, one matrix product for each entry
token; any number of acceptance settings is then evaluated from them (`utils.segmentations`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from utils.acceptance import Acceptance, AcceptanceMap
from utils.datastore import Datastore, TokenTrie
from utils.extraction import require_sound, score_windows
from utils.models import CausalLM
from utils.progress import ProgressBar
from utils.segmentations import Proposals, log_likelihoods, posteriors
from utils.windows import WindowPlan, plan_batches

# Positions whose logits are turned into float32 probabilities at a time.
SLICE_POSITIONS = 256
# Hidden states kept until their proposals are looked up together: 512 MB.
HIDDEN_NUMBERS_AT_ONCE = 2**27
N_RESAMPLES = 2000


@torch.inference_mode()
def negative_log_likelihood(lm: CausalLM, prompt_ids: list[int], new_token_ids: list[int]) -> float:
    """-log p(new tokens | prompt) in nats, from one pass over the whole text; the prompt must hold a token."""
    token_ids = torch.tensor([prompt_ids + new_token_ids], device=lm.device)
    _, logits = lm.forward(token_ids[:, :-1], logits_to_keep=len(new_token_ids), use_cache=False)
    targets = token_ids[0, -len(new_token_ids) :]
    total = 0.0
    for start in range(0, len(targets), SLICE_POSITIONS):
        part = slice(start, start + SLICE_POSITIONS)
        losses = torch.nn.functional.cross_entropy(logits[0, part].float(), targets[part], reduction="none")
        total += float(losses.double().sum())
    return total


# ---- Proposals


def find_proposals(lm: CausalLM, datastore: Datastore | None, plan: WindowPlan, batch_size: int) -> Proposals:
    """What the LM and the datastore (None: none) say at every position of every window from its second token on.

    Raises InputError where the model computes NaN or infinity.
    """
    lengths = plan.lengths - 1
    n = int(lengths.sum())
    found = Proposals(lengths, np.zeros(n), np.full(n, np.nan), *np.zeros((2, n), dtype=np.int64))
    for positions in gathered(read_positions(lm, plan, batch_size)):
        found.log_probs[positions.places] = positions.log_probs
        if datastore is not None:
            look_up(found, datastore, positions)
    return found


@dataclass(frozen=True)
class Positions:
    """What the LM makes of some positions, those of a window together in order; each array is of length n."""

    entries: np.ndarray  # token ids
    places: np.ndarray  # in the proposals' arrays
    hidden_states: np.ndarray  # (n, D) float32: the entry tokens'
    following: np.ndarray  # the next tokens
    log_probs: np.ndarray  # what the LM gives to these
    left: np.ndarray  # tokens left in the window


def read_positions(lm: CausalLM, plan: WindowPlan, batch_size: int) -> Iterator[Positions]:
    """Read every window once, some that are equally long at a time; what follows is the positions of these.

    Raises InputError where the model computes NaN or infinity.
    """
    firsts = np.cumsum(plan.lengths - 1) - (plan.lengths - 1)
    with ProgressBar(total=plan.n_tokens, desc="reading windows", unit="tok", unit_scale=True) as bar:
        for windows in plan_batches(plan.lengths, batch_size):
            token_ids = plan.batch_token_ids(windows)
            scores = score_windows(lm, token_ids, np.dtype(np.float32))
            for row, window in enumerate(windows.tolist()):
                require_sound(window, row, scores)
            assert scores.hidden_states is not None
            n = token_ids.shape[1] - 1
            yield Positions(
                token_ids[:, :-1].ravel(),
                (firsts[windows][:, None] + np.arange(n)).ravel(),
                scores.hidden_states[:, :-1].reshape(-1, lm.hidden_size),
                token_ids[:, 1:].ravel(),
                scores.log_probs[:, 1:].ravel(),
                np.tile(np.arange(n, 0, -1), len(windows)),
            )
            bar.update(token_ids.size)


def gathered(parts: Iterable[Positions]) -> Iterator[Positions]:
    """As many positions together as their hidden states fit in memory, so that those of an entry token come together."""
    group: list[Positions] = []
    n_numbers = 0
    for part in parts:
        if group and n_numbers + part.hidden_states.size > HIDDEN_NUMBERS_AT_ONCE:
            yield _joined(group)
            group, n_numbers = [], 0
        group.append(part)
        n_numbers += part.hidden_states.size
    if group:
        yield _joined(group)


def _joined(group: list[Positions]) -> Positions:
    columns = zip(*(vars(part).values() for part in group), strict=True)
    return Positions(*(np.concatenate(column) for column in columns))


def look_up(found: Proposals, datastore: Datastore, asked: Positions) -> None:
    """Fill in the proposals of some positions, one search for all those of an entry token."""
    order = np.argsort(asked.entries, kind="stable")
    borders = np.flatnonzero(np.diff(asked.entries[order])) + 1
    for positions in np.split(order, borders):
        trie = datastore.trie(int(asked.entries[positions[0]]))
        if trie is None:
            continue
        rows, similarities = trie.index.nearest_batch(torch.from_numpy(asked.hidden_states[positions]))
        at = asked.places[positions]
        chosen = rows.cpu().numpy()
        found.similarities[at] = similarities.cpu().numpy()
        found.chunk_lengths[at] = np.minimum(trie.chunk_lengths(chosen), asked.left[positions])
        found.agreeing[at] = _agreeing(trie, chosen, found.chunk_lengths[at], asked.following, positions)


def _agreeing(
    trie: TokenTrie, rows: np.ndarray, lengths: np.ndarray, following: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """(n,) int64: how many tokens of each row's chunk, cut to its length, stand in the text after its position."""
    longest = int(lengths.max())
    chunks = trie.continuations(rows, longest, first=0)
    ahead = np.arange(longest)
    text = following[np.minimum(positions[:, None] + ahead, len(following) - 1)]
    differs = (chunks != text) | (ahead >= lengths[:, None])
    return np.where(differs.any(axis=1), differs.argmax(axis=1), longest)


# ---- Figures


@dataclass(frozen=True)
class TextSize:
    """What a text's likelihood is divided by: tokens that were predicted, and their bytes in UTF-8."""

    n_tokens: int
    n_bytes: int


def base_figures(proposals: Proposals, size: TextSize) -> dict[str, float]:
    """Perplexity of the base LM."""
    return _figures(-base_log_likelihoods(proposals), proposals.lengths, size)


def base_log_likelihoods(proposals: Proposals) -> np.ndarray:
    """(W,) log p of each window under the base LM alone."""
    return np.array([proposals.log_probs[part].sum() for part in proposals.windows()])


def compared_figures(log_p: np.ndarray, proposals: Proposals, size: TextSize) -> dict[str, float]:
    """Perplexity where the windows of these proposals have log-likelihoods log_p (W,).

    ratio: to the base LM's perplexity, its interval over the same windows of both.
    """
    gained = base_log_likelihoods(proposals) - log_p
    lower, upper = _interval(gained, proposals.lengths)
    ratio = {"ratio": float(np.exp(gained.sum() / size.n_tokens)), "ratio_lower": lower, "ratio_upper": upper}
    return _figures(-log_p, proposals.lengths, size) | ratio


def cdlm_figures(proposals: Proposals, probabilities: np.ndarray, size: TextSize) -> list[dict[str, float]]:
    """Perplexity of CD-LM under each setting, compared with the base LM's; probabilities (S, N): q at each position.

    coverage and accepted: shares of positions with a proposal, and with one of q >= 1/2; matched: share of the
    proposals that are what the text says; from_chunks: expected share of the tokens that chunks brought.
    """
    log_p = log_likelihoods(proposals, probabilities)
    found = ~np.isnan(proposals.similarities)
    shares = {
        "coverage": float(found.mean()),
        "matched": float(proposals.matches[found].mean()) if found.any() else 0.0,
    }
    figures = []
    for q, of_windows in zip(probabilities, log_p, strict=True):
        brought = float((posteriors(proposals, q).accepted * proposals.chunk_lengths).sum())
        extra = {"accepted": float((q >= 0.5).mean()), "from_chunks": brought / size.n_tokens}
        figures.append(compared_figures(of_windows, proposals, size) | shares | extra)
    return figures


def _figures(nll: np.ndarray, n_tokens: np.ndarray, size: TextSize) -> dict[str, float]:
    """nll (W,) in nats, n_tokens (W,) of each window."""
    lower, upper = _interval(nll, n_tokens)
    return {
        "perplexity": float(np.exp(nll.sum() / n_tokens.sum())),
        "perplexity_lower": lower,
        "perplexity_upper": upper,
        "mean_window_perplexity": float(np.exp(nll / n_tokens).mean()),
        "bits_per_byte": float(nll.sum() / np.log(2) / size.n_bytes),
        "nll": float(nll.sum()),
        "tokens": int(n_tokens.sum()),
    }


def _interval(nll: np.ndarray, n_tokens: np.ndarray) -> tuple[float, float]:
    """Bootstrap 95% interval of the perplexity over windows drawn with replacement; the draws are the same each time."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(nll), np.full(len(nll), 1 / len(nll)), size=N_RESAMPLES)  # (R, W)
    resampled = np.exp(counts @ nll / (counts @ n_tokens))
    lower, upper = np.percentile(resampled, [2.5, 97.5])
    return float(lower), float(upper)


def settings_of(
    thresholds: list[float], acceptance: Acceptance, constant: float | None
) -> dict[str, Acceptance | AcceptanceMap]:
    """The settings of a table by name: each θ, and where a map was fitted, that and the best constant q beside it."""
    settings: dict[str, Acceptance | AcceptanceMap] = {
        str(float(theta) + 0.0): Acceptance(theta, acceptance.policy, acceptance.q_max) for theta in thresholds
    }
    if constant is not None:
        settings["constant"] = AcceptanceMap((0.0,), (constant,))
    if acceptance.fitted is not None:
        settings["fitted"] = acceptance.fitted
    return settings


def setting_probabilities(setting: Acceptance | AcceptanceMap, proposals: Proposals) -> np.ndarray:
    """(N,) q at each position, 0 where nothing is proposed."""
    q = setting.probability if isinstance(setting, Acceptance) else setting
    return np.where(np.isnan(proposals.similarities), 0.0, q(proposals.similarities))
