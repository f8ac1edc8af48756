"""Perplexity as a command: fit an acceptance map to one text, evaluate base LM and CD-LM on another, say what came out."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from utils.acceptance import Acceptance, AcceptanceMap, save_map
from utils.corpora import read_passages
from utils.datastore import Datastore
from utils.files import InputError, file_fingerprint, write_json
from utils.models import CausalLM, require_known_ids
from utils.perplexity import TextSize, base_figures, cdlm_figures, find_proposals, setting_probabilities, settings_of
from utils.segmentations import Proposals, fit_map, log_likelihoods
from utils.windows import WindowPlan, WindowShape, plan_windows

FITTED_MAP = "acceptance_map.json"
PERPLEXITY = "perplexity.json"


@dataclass(frozen=True)
class TextReader:
    """What turns a file of passages into proposals: the model, its datastore (None: none) and the windows' shape."""

    lm: CausalLM
    tokenizer: PreTrainedTokenizerBase
    datastore: Datastore | None
    shape: WindowShape
    max_windows: int | None
    batch_size: int
    folder: Path  # for temporary files

    def read(self, path: Path) -> tuple[Proposals, TextSize]:
        """Raises InputError where the file holds no passages, none is long enough, or the model has no such ids."""
        plan, size = plan_text(path, self.tokenizer, self.shape, self.max_windows, self.folder)
        require_known_ids(self.lm.model.config, self.lm.name, plan.largest_id)
        return find_proposals(self.lm, self.datastore, plan, self.batch_size), size


def plan_text(
    path: Path, tokenizer: PreTrainedTokenizerBase, shape: WindowShape, max_windows: int | None, folder: Path
) -> tuple[WindowPlan, TextSize]:
    """The windows of a file of passages that predict something, the first of them where there is a bound, and their size.

    folder: for a temporary file. Raises InputError where the file holds no passages or none is long enough.
    """
    plan = plan_windows(read_passages(path), tokenizer, shape, folder)
    # A window of one token predicts nothing.
    kept = np.flatnonzero(plan.lengths > 1)[:max_windows]
    plan = replace(plan, starts=plan.starts[kept], lengths=plan.lengths[kept])
    texts = (tokenizer.decode(plan.token_ids(window)[1:]) for window in range(plan.n_windows))
    n_bytes = sum(len(str(text).encode()) for text in texts)
    return plan, TextSize(plan.n_tokens - plan.n_windows, n_bytes)


def fit_maps(path: Path, proposals: Proposals, q_max: float) -> tuple[AcceptanceMap, float]:
    """The map under which a text, the file's, is likeliest, and the best constant q; the map's origin says how likely.

    Raises InputError where the datastore proposes nothing in that text.
    """
    try:
        fitted, history = fit_map(proposals, q_max)
        constant, _ = fit_map(proposals, q_max, n_knots=1)
    except ValueError as error:
        raise InputError(f"{path}: {error}; give a text of the datastore's domain") from error
    best = constant.probabilities[0]
    of_constant = float(log_likelihoods(proposals, np.where(np.isnan(proposals.similarities), 0, best)[None]).sum())
    origin = {
        "text": file_fingerprint(path),
        "file": path.name,
        "tokens": len(proposals.log_probs),
        "steps": len(history),
        "log_likelihood_base": float(proposals.log_probs.sum()),
        "log_likelihood_constant": of_constant,
        "log_likelihood_fitted": history[-1],
        "constant": best,
    }
    return AcceptanceMap(fitted.similarities, fitted.probabilities, origin), best


def fit_acceptance(reader: TextReader, path: Path, save_dir: Path, q_max: float) -> AcceptanceMap:
    """Fit g to a text, save it in save_dir with the text's fingerprint and the likelihoods, and return it."""
    proposals, _ = reader.read(path)
    fitted, _ = fit_maps(path, proposals, q_max)
    save_map(save_dir / FITTED_MAP, fitted)
    return fitted


def evaluate_perplexity(
    reader: TextReader, path: Path, save_dir: Path, thresholds: list[float], acceptance: Acceptance
) -> dict[str, Any]:
    """Perplexity of the text under the base LM and, for each setting, under CD-LM; saved as perplexity.json.

    Raises InputError where the acceptance map was fitted to this very text.
    """
    fitted = acceptance.fitted
    if fitted is not None and fitted.origin.get("text") == file_fingerprint(path):
        raise InputError(f"{path}: the acceptance map was fitted to this text; evaluate on another one")
    proposals, size = reader.read(path)
    constant = None if fitted is None else fitted.origin.get("constant")
    settings = settings_of(thresholds, acceptance, constant)
    probabilities = [setting_probabilities(setting, proposals) for setting in settings.values()]
    figures = cdlm_figures(proposals, np.stack(probabilities), size) if settings else []
    found = proposals.similarities[~np.isnan(proposals.similarities)]
    quantiles = np.percentile(found, [5, 25, 50, 75, 95]).tolist() if len(found) else None
    report = {
        "text": {"file": path.name, "sha256": file_fingerprint(path), "windows": len(proposals.lengths)},
        "acceptance": acceptance.policy,
        "q_max": acceptance.q_max,
        "similarity_quantiles": quantiles,
        "base": base_figures(proposals, size),
        "cdlm": dict(zip(settings, figures, strict=True)),
    }
    write_json(save_dir / PERPLEXITY, report, indent=2)
    return report


COLUMNS = (
    ("perplexity", "perplexity", 1, 3),
    ("95% from", "perplexity_lower", 1, 3),
    ("to", "perplexity_upper", 1, 3),
    ("to base LM", "ratio", 1, 4),
    ("95% from", "ratio_lower", 1, 4),
    ("to", "ratio_upper", 1, 4),
    ("mean per window", "mean_window_perplexity", 1, 3),
    ("bits/byte", "bits_per_byte", 1, 4),
    ("accepted %", "accepted", 100, 1),
    ("from chunks %", "from_chunks", 100, 1),
)


def format_perplexity(report: dict[str, Any]) -> str:
    """The table: a row for the base LM and one for each setting, and what the proposals were like."""
    named = {"base LM": report["base"]} | {_label(name): found for name, found in report["cdlm"].items()}
    rows = [["", *(heading for heading, *_ in COLUMNS)]]
    for name, figures in named.items():
        cells = (
            f"{figures[key] * scale:,.{decimals}f}" if key in figures else "-" for _, key, scale, decimals in COLUMNS
        )
        rows.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    text = report["text"]
    lines.append(f"{report['base']['tokens']:,} tokens in {text['windows']:,} windows of {text['file']}")
    if not report["cdlm"]:
        return "\n".join(lines)
    first = next(iter(report["cdlm"].values()))
    lines.append(
        f"proposals at {first['coverage']:.1%} of them, {first['matched']:.1%} of which are what the text says"
    )
    if report["similarity_quantiles"]:
        shown = zip((5, 25, 50, 75, 95), report["similarity_quantiles"], strict=True)
        lines.append("best similarity, quantiles: " + ", ".join(f"{share}% {value:.3f}" for share, value in shown))
    if report["acceptance"] == "threshold":
        lines.append(
            f"θ accepts with probability {report['q_max']} (--q_max), since with 1 a wrong chunk is impossible"
        )
    return "\n".join(lines)


def _label(name: str) -> str:
    return {"constant": "CD-LM, best constant q", "fitted": "CD-LM, fitted map"}.get(name, f"CD-LM, θ {name}")
