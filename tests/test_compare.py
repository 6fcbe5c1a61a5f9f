"""tools/compare.py: every figure against torch, the verdict at Huawei's limits, and what cannot be paired."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from support import error_of, refusal
from tools import compare

SCRIPT = "tools/compare.py"
SHAPE = 19, 65, 129


def add_results(folder: Path, frames: int = 1, noise: float = 0) -> dict[tuple[str, str], np.ndarray]:
    """Add both outputs of frames, the same in every folder but for the noise, which grows with the frame."""
    folder.mkdir()
    logits = {}
    for n in range(frames):
        for output in (0, 1):
            clean = np.random.default_rng([n, output]).normal(0, 5, SHAPE)
            rough = np.random.default_rng([n, output, 7]).normal(0, noise * (n + 1), SHAPE)
            logits[f"ulm_000000_{n:06}_leftImg8bit", str(output)] = (clean + rough).astype("<f4")
    for (frame, output), values in logits.items():
        values.tofile(folder / f"{frame}_{output}.bin")
    return logits


def comparison_of(folder: Path, status: int = 0) -> dict:
    """Compare folder/ours with folder/theirs in-process."""
    args = folder / "ours", folder / "theirs", "--json", folder / "c.json"
    assert compare.main([str(arg) for arg in args]) == status
    comparison = json.loads((folder / "c.json").read_text())
    assert comparison["passed"] == (status == 0)
    return comparison


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with equal results of two frames in ours and theirs."""
    for name in ("ours", "theirs"):
        add_results(tmp_path / name, 2)
    return tmp_path


def test_every_figure_is_what_torch_computes(tmp_path, capsys):
    ours, theirs = add_results(tmp_path / "ours", 3, noise=0.05), add_results(tmp_path / "theirs", 3)
    comparison = comparison_of(tmp_path)
    assert comparison["frames"] == 3
    assert list(comparison["outputs"]) == ["0", "1"]
    stdout = capsys.readouterr().out
    for output, measures in comparison["outputs"].items():
        expected = {"cosine": [], "relative_distance": [], "largest_difference": [], "agreement": []}
        for key in ours:
            if key[1] == output:
                a, b = (torch.from_numpy(logits[key]).double() for logits in (ours, theirs))
                expected["cosine"].append(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item())
                expected["relative_distance"].append((torch.dist(a, b) / b.norm()).item())
                expected["largest_difference"].append(torch.dist(a, b, p=float("inf")).item())
                expected["agreement"].append((a.argmax(0) == b.argmax(0)).double().mean().item())
        for measure, values in expected.items():
            worst = max(values) if measure in ("relative_distance", "largest_difference") else min(values)
            frame = "ulm_000000_000002_leftImg8bit"  # the noisiest
            assert measures[measure] == {
                "worst": pytest.approx(worst, rel=1e-9),
                "mean": pytest.approx(np.mean(values), rel=1e-9),
                "worst_frame": frame,
            }
            row = [output, *measure.split("_"), f"{worst:.6f}", f"{np.mean(values):.6f}", frame]
            assert row in [line.split() for line in stdout.splitlines()]
        assert 0.9 < measures["agreement"]["worst"] < 1
    assert stdout.splitlines()[-1].startswith("PASS: ")


def turn(logits: np.ndarray, cosine: float) -> np.ndarray:
    """Turn logits by an angle of this cosine, of the same length."""
    other = np.random.default_rng(3).normal(size=SHAPE)
    other -= logits * (np.vdot(other, logits) / np.vdot(logits, logits))
    return cosine * logits + np.sqrt(1 - cosine**2) * np.linalg.norm(logits) / np.linalg.norm(other) * other


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize(
    ("change", "failures"),
    [
        (lambda logits: logits * 1.0499, []),
        (lambda logits: logits * 1.0501, ["relative distance 0.0501"]),
        (lambda logits: turn(logits, 0.9901), ["relative distance 0.14"]),
        (lambda logits: turn(logits, 0.9899), ["cosine similarity 0.9899", "relative distance 0.14"]),
        (lambda logits: logits * 0, ["cosine similarity 0 ", "relative distance 1 "]),
    ],
    ids=["distance_within", "distance_beyond", "cosine_within", "cosine_beyond", "zeros"],
)
def test_the_verdict_is_of_each_frame_and_output_at_huawei_s_limits(folder, capsys, output, change, failures):
    frame = "ulm_000000_000001_leftImg8bit"
    path = folder / "ours" / f"{frame}_{output}.bin"
    change(np.fromfile(path, "<f4").reshape(SHAPE).astype(float)).astype("<f4").tofile(path)
    comparison_of(folder, status=1 if failures else 0)
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith("FAIL: " if failures else "PASS: ")
    found = verdict[len("FAIL: ") :].partition(" (limits")[0].split("; ") if failures else []
    assert len(found) == len(failures)
    for part, failure in zip(found, failures):
        assert part.startswith(f"output {output}: {failure}") and part.endswith(f" at {frame}")


def test_zero_outputs_are_equal_to_each_other_only(folder):
    for name, status, figures in (("theirs", 1, [0, 1]), ("ours", 0, [1, 0])):
        np.zeros(SHAPE, "<f4").tofile(folder / name / "ulm_000000_000000_leftImg8bit_1.bin")
        measures = comparison_of(folder, status)["outputs"]["1"]
        assert [measures[measure]["worst"] for measure in ("cosine", "relative_distance")] == pytest.approx(figures)


@pytest.mark.parametrize("complete", ["ours", "theirs"])
def test_what_is_only_in_one_folder_is_counted_and_five_are_named(tmp_path, complete):
    for name in ("ours", "theirs"):
        add_results(tmp_path / name, 4 if name == complete else 1)
    message = refusal(compare, tmp_path / "ours", tmp_path / "theirs")
    assert str(tmp_path / complete) in message and " 6 " in message
    extra = [f"ulm_000000_{n:06}_leftImg8bit_{output}" for n in range(1, 4) for output in (0, 1)]
    assert [name in message for name in extra] == [True] * 5 + [False]


def test_an_output_that_a_frame_lacks_in_both_folders_is_named(folder):
    for name in ("ours", "theirs"):
        (folder / name / "ulm_000000_000001_leftImg8bit_1.bin").unlink()
    assert refusal(compare, folder / "ours", folder / "theirs").endswith(": ulm_000000_000001_leftImg8bit_1")


def test_an_empty_folder_and_the_same_files_twice_are_refused(folder):
    (folder / "empty").mkdir()
    assert refusal(compare, folder / "ours", folder / "empty").startswith(f"{folder}/empty: no ")
    (folder / "link").symlink_to(folder / "ours")
    assert " have the same files: ulm_" in error_of(SCRIPT, folder / "ours", folder / "link")
    (folder / "theirs").rename(folder / "both")
    (folder / "ours").rename(folder / "both" / "device0")
    for path in (folder / "both").glob("*.bin"):
        path.unlink()
    assert " have the same files: ulm_" in refusal(compare, folder / "both", folder / "both" / "device0")


def test_the_json_s_folder_is_made_before_and_a_folder_of_its_name_refused(folder):
    compare.main([*map(str, (folder / "ours", folder / "theirs", "--json", folder / "new" / "c.json"))])
    assert (folder / "new" / "c.json").is_file()
    message = refusal(compare, folder / "ours", folder / "none", "--json", folder / "new")
    assert message == f"{folder}/new: is a folder; expected a file to write"
