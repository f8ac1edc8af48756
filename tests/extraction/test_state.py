"""The state of stage 2's output, against loops over what was put into the folder: what is there, wanted and left."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from utils.extraction.hidden_states import (
    HiddenStateShape,
    PartialH5,
    hidden_states_path,
    write_dat,
    write_hidden_states,
    write_index_maps,
)
from utils.extraction.state import ExtractionFiles, ExtractionState, RequestedOutputs
from utils.extraction.token_probs import token_probs_path
from utils.files import InputError
from utils.text.expert_spans import expert_spans_path

LENGTHS = np.array([3, 1, 5, 2])
N = len(LENGTHS)
FIRSTS = np.cumsum(LENGTHS) - LENGTHS
SHAPE = HiddenStateShape(N, int(LENGTHS.sum()), 6, np.dtype("float32"))
OTHER_SHAPES = [
    HiddenStateShape(N, 12, 6, SHAPE.dtype),
    HiddenStateShape(N, 11, 7, SHAPE.dtype),
    HiddenStateShape(N, 11, 6, np.dtype("float16")),
]
CUT, OTHER, WHOLE = "cut off", "of another shape", "whole"


@dataclass(frozen=True)
class Content:
    """What lies in an output folder."""

    token_probs: frozenset[int] = frozenset()
    hidden_states: frozenset[int] = frozenset()
    part: frozenset[int] | None = None  # windows with rows; None: there is no .h5.part
    h5: str | None = None
    maps: str | None = None
    dat: str | None = None
    spans: bool = False
    n_spans: int | None = None  # that the results speak of; None: those of a version without
    noted: tuple[str, ...] | None = None  # outputs in the manifest of a run that finished; None: none has

    def write(self, files: ExtractionFiles) -> None:
        files.folder.mkdir(parents=True)
        rows = [np.full((length, 6), window + 1, "f4") for window, length in enumerate(LENGTHS)]
        for window in self.token_probs:
            token_probs_path(files.folder, window).write_text("[]")
        for window in self.hidden_states:
            write_hidden_states(files.folder, window, rows[window])
        if self.h5 is not None:
            shape = OTHER_SHAPES[len(self.token_probs) % 3] if self.h5 == OTHER else SHAPE
            PartialH5.begin(files.part, shape)
            content = files.part.read_bytes()[: -shape.n_windows]
            files.h5.write_bytes(content[:-1] if self.h5 == CUT else content)
            files.part.unlink()
        if self.part is not None:
            PartialH5.begin(files.part, SHAPE)
            with PartialH5(files.part, SHAPE) as part:
                for window in self.part:
                    part.write(window, int(FIRSTS[window]), rows[window])
        if self.maps is not None:
            lengths = LENGTHS + (self.maps == OTHER)
            write_index_maps(files.index_to_seqlen, files.index_to_acc_index, lengths)
            if self.maps == CUT:
                files.index_to_acc_index.unlink()
        if self.dat is not None:
            files.dat.write_bytes(bytes(SHAPE.n_bytes - (self.dat == CUT)))
        if self.spans:
            expert_spans_path(files.folder).write_text("[]")

    @property
    def results(self) -> dict[str, Any]:
        if self.noted is None:
            return {}
        spans = {} if self.n_spans is None else {"n_expert_spans": self.n_spans}
        return {"n_windows": N, "n_tokens": 11, "hidden_size": 6, "outputs": list(self.noted), **spans}


def some(rng: random.Random) -> frozenset[int]:
    """All windows, often; else some of them."""
    return frozenset(range(N) if rng.random() < 0.5 else rng.sample(range(N), rng.randrange(N)))


def random_content(rng: random.Random) -> Content:
    noted = [name for name in ("token_probs", "hidden_states", "memmap") if rng.random() < 0.7]
    return Content(
        token_probs=some(rng),
        hidden_states=some(rng) if rng.random() < 0.6 else frozenset(),
        part=some(rng) if rng.random() < 0.5 else None,
        h5=rng.choice([None, CUT, OTHER, WHOLE, WHOLE]),
        maps=rng.choice([None, CUT, OTHER, WHOLE, WHOLE, WHOLE]),
        dat=rng.choice([None, CUT, WHOLE]),
        spans=rng.random() < 0.5,
        n_spans=rng.choice([None, 0, 0, 2]),
        noted=tuple(noted) if rng.random() < 0.7 else None,
    )


def random_request(rng: random.Random) -> RequestedOutputs:
    memmap = rng.random() < 0.6
    return RequestedOutputs(rng.random() < 0.5, memmap, memmap and rng.random() < 0.4, SHAPE.dtype)


# ---- What the folder should be said to be, in words


def wants_hidden_states(content: Content, requested: RequestedOutputs) -> bool:
    gave_them_up = content.noted is not None and "memmap" in content.noted and "hidden_states" not in content.noted
    stands_for_them = content.h5 == WHOLE and content.maps == WHOLE
    return requested.hidden_states and not (gave_them_up and stands_for_them)


def is_left(content: Content, requested: RequestedOutputs, window: int, has_begun: bool) -> bool:
    if window not in content.token_probs:
        return True
    if wants_hidden_states(content, requested) and window not in content.hidden_states:
        return True
    if not requested.memmap or not has_begun or content.h5 == WHOLE:
        return False
    return window not in (content.part or ()) and window not in content.hidden_states


def is_complete(content: Content, requested: RequestedOutputs) -> bool:
    if content.noted is None or content.n_spans is None or (content.n_spans and not content.spans):
        return False
    wants_npy = wants_hidden_states(content, requested)
    needed = {"token_probs": True, "hidden_states": wants_npy, "memmap": requested.memmap}
    return (
        all(name in content.noted for name, is_needed in needed.items() if is_needed)
        and len(content.token_probs) == N
        and (not wants_npy or len(content.hidden_states) == N)
        and (not requested.memmap or content.h5 == content.maps == WHOLE)
        and (not requested.dat or content.dat == WHOLE)
    )


@pytest.mark.parametrize("seed", range(8))
def test_state_is_what_loops_over_the_folders_content_say(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    n_complete = n_left = 0
    for case in range(40):
        content, requested = random_content(rng), random_request(rng)
        files = ExtractionFiles(tmp_path / str(case), "train")
        content.write(files)
        state, results = ExtractionState(files, requested), content.results
        assert state.has_h5(SHAPE) == (content.h5 == WHOLE)
        assert state.has_index_maps(SHAPE) == (content.maps == WHOLE)
        assert state.has_dat(SHAPE) == (content.dat == WHOLE)
        assert state.wants_hidden_states(results) == wants_hidden_states(content, requested), content
        for hidden_size in (None, SHAPE.hidden_size):
            expected = [is_left(content, requested, window, hidden_size is not None) for window in range(N)]
            assert state.windows_left(LENGTHS, hidden_size, results).tolist() == expected, (content, requested)
            n_left += sum(expected)
        assert state.is_complete(results) == is_complete(content, requested), (content, requested)
        n_complete += is_complete(content, requested)
        assert set(state.files_there) == paths_there(files, content)
        if results:
            whole = {
                "token_probs": len(content.token_probs) == N,
                "hidden_states": len(content.hidden_states) == N,
                "memmap": content.h5 == content.maps == WHOLE,
            }
            assert state.whole_outputs(results) == [name for name, is_whole in whole.items() if is_whole]
        for outputs in (["token_probs"], ["token_probs", "hidden_states"]):
            assert set(state.listed_files(outputs)) == listed(files, content, "hidden_states" in outputs)
    assert n_complete > 0
    assert n_left > 0


def paths_there(files: ExtractionFiles, content: Content) -> set[Path]:
    folder = {files.folder} if content.token_probs or content.hidden_states else set()
    return single_files(files) | folder


def single_files(files: ExtractionFiles) -> set[Path]:
    return {path for path in files.output_dir.iterdir() if path not in (files.folder, files.part)}


def listed(files: ExtractionFiles, content: Content, with_hidden_states: bool) -> set[Path]:
    of_windows = {token_probs_path(files.folder, window) for window in content.token_probs}
    if with_hidden_states:
        of_windows |= {hidden_states_path(files.folder, window) for window in content.hidden_states}
    return single_files(files) | of_windows


# ---- Edges


ALL = frozenset(range(N))
FINISHED = Content(ALL, ALL, h5=WHOLE, maps=WHOLE, n_spans=0, noted=("token_probs", "hidden_states", "memmap"))
MEMMAP = RequestedOutputs(True, True, False, SHAPE.dtype)


def state_of(content: Content, requested: RequestedOutputs, output_dir: Path) -> ExtractionState:
    files = ExtractionFiles(output_dir, "train")
    content.write(files)
    return ExtractionState(files, requested)


def test_a_finished_run_has_all_and_leaves_nothing(tmp_path: Path) -> None:
    state = state_of(FINISHED, MEMMAP, tmp_path)
    assert state.is_complete(FINISHED.results)
    assert not state.windows_left(LENGTHS, 6, FINISHED.results).any()
    assert state.whole_outputs(FINISHED.results) == ["token_probs", "hidden_states", "memmap"]


@pytest.mark.parametrize("shape", [*OTHER_SHAPES, HiddenStateShape(5, 11, 6, SHAPE.dtype)])
def test_the_whole_memmap_of_another_text_or_model_is_not_this_ones(shape: HiddenStateShape, tmp_path: Path) -> None:
    state = state_of(FINISHED, MEMMAP, tmp_path)
    assert state.has_h5(SHAPE)
    assert state.has_index_maps(SHAPE)
    assert not (state.has_h5(shape) and state.has_index_maps(shape))


@pytest.mark.parametrize("bytes_more", [-7, -1, 1, 8])
def test_a_dat_of_another_length_is_not_whole(bytes_more: int, tmp_path: Path) -> None:
    files = ExtractionFiles(tmp_path, "train")
    FINISHED.write(files)
    write_dat(files.h5, files.dat)
    assert ExtractionState(files, MEMMAP).has_dat(SHAPE)
    files.dat.write_bytes((files.dat.read_bytes() + bytes(8))[: SHAPE.n_bytes + bytes_more])
    assert not ExtractionState(files, MEMMAP).has_dat(SHAPE)


@pytest.mark.parametrize("name", ["index_to_seqlen", "index_to_acc_index"])
@pytest.mark.parametrize("content", [b"", b"{", b'{"0": 3}', b'{"0": 3, "1": 1, "2": 5, "3": -2}'])
def test_maps_that_are_cut_off_or_do_not_fit_are_not_whole(name: str, content: bytes, tmp_path: Path) -> None:
    files = ExtractionFiles(tmp_path, "train")
    FINISHED.write(files)
    getattr(files, name).write_bytes(content)
    assert not ExtractionState(files, MEMMAP).has_index_maps(SHAPE)


def test_rows_lost_from_the_part_leave_their_window(tmp_path: Path) -> None:
    content = Content(token_probs=ALL, part=ALL)
    direct = replace(MEMMAP, hidden_states=False)
    state = state_of(content, direct, tmp_path)
    assert not state.windows_left(LENGTHS, 6, {}).any()
    with open(state.files.part, "r+b") as file:  # as a power cut may: the marks are there, all rows are zero
        start = state.files.part.stat().st_size - N - SHAPE.n_bytes
        file.seek(start)
        file.write(bytes(SHAPE.n_bytes))
    assert state.windows_left(LENGTHS, 6, {}).all()


def test_files_of_windows_beyond_the_text_are_refused(tmp_path: Path) -> None:
    for name, paths in (("token_probs", token_probs_path), ("hidden_states", hidden_states_path)):
        state = state_of(FINISHED, MEMMAP, tmp_path / name)
        paths(state.files.folder, 9).write_bytes(b"")
        with pytest.raises(InputError, match="holds a file of window 9, but the text has only 4; delete"):
            ExtractionState(state.files, MEMMAP).windows_left(LENGTHS, 6, {})


def test_the_folder_is_scanned_once(tmp_path: Path) -> None:
    """What was found is what is said, whatever another process writes meanwhile."""
    state = state_of(FINISHED, MEMMAP, tmp_path)
    for path in (state.files.h5, token_probs_path(state.files.folder, 0), hidden_states_path(state.files.folder, 1)):
        path.unlink()
    assert state.is_complete(FINISHED.results)
    assert not ExtractionState(state.files, MEMMAP).is_complete(FINISHED.results)
