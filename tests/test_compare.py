"""tools/compare.py: every figure against torch, the verdict at Huawei's limits, pairing and refusals."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from support import ROOT, error_of, refusal, run
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
    """A folder with equal results of one frame in ours and theirs."""
    add_results(tmp_path / "ours")
    add_results(tmp_path / "theirs")
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
    assert stdout.splitlines()[-1].startswith("PASS")


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
        (lambda logits: turn(logits, 0.9901), ["relative distance"]),
        (lambda logits: turn(logits, 0.9899), ["cosine similarity 0.9899", "relative distance"]),
        (lambda logits: logits * 0, ["cosine similarity 0 ", "relative distance 1 "]),
    ],
    ids=["distance_within", "distance_beyond", "cosine_within", "cosine_beyond", "zeros"],
)
def test_the_verdict_is_of_each_frame_and_output_at_huawei_s_limits(tmp_path, capsys, output, change, failures):
    logits = add_results(tmp_path / "ours", 2)
    add_results(tmp_path / "theirs", 2)
    name = "ulm_000000_000001_leftImg8bit"
    change(logits[name, str(output)].astype(float)).astype("<f4").tofile(tmp_path / "ours" / f"{name}_{output}.bin")
    comparison_of(tmp_path, status=1 if failures else 0)
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith("FAIL" if failures else "PASS")
    found = [
        part for part in verdict[len("FAIL: ") :].partition(" (limits")[0].split("; ") if part.startswith("output ")
    ]
    assert len(found) == len(failures)
    for part, failure in zip(found, failures):
        assert part.startswith(f"output {output}: {failure}") and part.endswith(name)


def test_zero_outputs_are_equal_to_each_other_only(folder):
    for name, status, figures in (("theirs", 1, [0, 1]), ("ours", 0, [1, 0])):
        np.zeros(SHAPE, "<f4").tofile(folder / name / "ulm_000000_000000_leftImg8bit_1.bin")
        measures = comparison_of(folder, status)["outputs"]["1"]
        assert [measures[measure]["worst"] for measure in ("cosine", "relative_distance")] == figures


@pytest.mark.parametrize(
    ("device", "ending", "half"),
    [(".", "bin", True), (".", "npy", False), ("device0", "bin", False), ("device1_1", "npy", True)],
)
def test_every_layout_of_ais_bench_is_compared_with_flat_float32(folder, device, ending, half):
    for path in sorted((folder / "ours").iterdir()):
        logits = np.fromfile(path, "<f4").reshape(1, *SHAPE).astype("<f2" if half else "<f4")
        path.unlink()
        new = folder / "ours" / device / f"{path.stem}.{ending}"
        new.parent.mkdir(exist_ok=True)
        logits.tofile(new) if ending == "bin" else np.save(new, logits)
    for measures in comparison_of(folder)["outputs"].values():
        assert (0 < measures["relative_distance"]["worst"] < 3e-4) == half
        assert (measures["largest_difference"]["worst"] == 0) != half


@pytest.mark.parametrize("complete", ["ours", "theirs"])
def test_what_is_only_in_one_folder_is_counted_and_five_are_named(tmp_path, complete):
    for name in ("ours", "theirs"):
        add_results(tmp_path / name, 4 if name == complete else 1)
    message = refusal(compare, tmp_path / "ours", tmp_path / "theirs")
    assert str(tmp_path / complete) in message and " 6 " in message
    extra = [f"ulm_000000_{n:06}_leftImg8bit_{output}" for n in range(1, 4) for output in (0, 1)]
    assert [name in message for name in extra] == [True] * 5 + [False]


def test_the_same_folder_twice_is_one_line_and_status_1(folder):
    (folder / "link").symlink_to(folder / "ours")
    assert "same folder" in error_of(SCRIPT, folder / "ours", folder / "link")


def test_an_output_that_a_frame_lacks_in_both_folders_is_named(tmp_path):
    for name in ("ours", "theirs"):
        add_results(tmp_path / name, 2)
        (tmp_path / name / "ulm_000000_000001_leftImg8bit_1.bin").unlink()
    assert refusal(compare, tmp_path / "ours", tmp_path / "theirs").endswith(": ulm_000000_000001_leftImg8bit_1")


def test_results_of_two_devices_that_differ_are_refused(folder):
    name = "ulm_000000_000000_leftImg8bit_0.bin"
    (folder / "ours" / "device1").mkdir()
    np.fromfile(folder / "ours" / name, "<f4").tofile(folder / "ours" / "device1" / name)
    comparison_of(folder)
    np.zeros(SHAPE, "<f4").tofile(folder / "ours" / "device1" / name)
    message = refusal(compare, folder / "ours", folder / "theirs")
    assert str(folder / "ours" / name) in message and f"device1/{name}" in message


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("ulm_000000_000000_leftImg8bit_1.bin", bytes(212420), "212420 bytes"),
        ("ulm_000000_000000_leftImg8bit_1.bin", np.full(SHAPE, np.inf, "<f2").tobytes(), "NaN or Inf"),
        ("ulm_000000_000000_leftImg8bit_1.npy", b"\x93NUMPY", "not a complete .npy"),
        ("ulm_000000_000000_leftImg8bit_1.npy", np.zeros(SHAPE), "float64"),
        ("ulm_000000_000000_leftImg8bit_1.npy", np.zeros((65, 129, 19), "<f4"), "(65, 129, 19)"),
    ],
    ids=["cut", "half_inf", "cut_npy", "float64", "hwc"],
)
def test_damaged_logits_are_reported(folder, name, content, word):
    for path in (folder / "ours" / name, folder / "theirs" / name):
        path.with_suffix(".bin").unlink()
        np.save(path, content) if isinstance(content, np.ndarray) else path.write_bytes(content)
    message = refusal(compare, folder / "ours", folder / "theirs")
    assert f"ours/{name}" in message and word in message


def test_a_folder_without_results_is_refused(folder):
    (folder / "ours" / "readme.txt").touch()
    for empty in ("none", "ours"):
        for path in folder.glob("ours/*.bin"):
            path.unlink()
        assert str(folder / empty) in refusal(compare, folder / empty, folder / "theirs")


@pytest.mark.parametrize("path", ["/no/c.json", "/tmp"])
def test_json_must_be_a_file_in_an_existing_folder(capsys, path):
    with pytest.raises(SystemExit, match="2"):
        compare.main(["ours", "theirs", "--json", path])
    assert f"--json {path}" in capsys.readouterr().err


def test_a_closed_stdout_loses_no_json(folder):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-u", ROOT / SCRIPT, folder / "ours", folder / "theirs", "--json", folder / "c.json"]
    subprocess.run(command, stdout=writer, stderr=subprocess.DEVNULL)
    os.close(writer)
    assert json.loads((folder / "c.json").read_text())["passed"] is True


def test_a_link_to_stdout_or_to_a_file_is_written_to_and_stays(folder):
    (folder / "link").symlink_to("/proc/self/fd/1")
    assert '"passed": true' in run(SCRIPT, folder / "ours", folder / "theirs", "--json", folder / "link").stdout
    (folder / "file").touch()
    (folder / "c.json").symlink_to("file")
    comparison_of(folder)
    assert (folder / "link").is_symlink() and (folder / "c.json").is_symlink()


def test_a_full_disk_leaves_no_part_of_the_json(folder):
    done = run(SCRIPT, folder / "ours", folder / "theirs", "--json", folder / "c.json", status=1,
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)))  # fmt: skip
    assert "c.json" in done.stderr and done.stderr.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["ours", "theirs"]
