#!/usr/bin/env python3
"""Compare two folders of logits of the same frames, e.g. an .om's with ONNX Runtime's: how much did a conversion lose?

    RESULT_DIR/<frame>_<i>.bin     output i, float32 or float16, (19, 65, 129)
    BASELINE_DIR/<frame>_<i>.bin   the same outputs of the same frames
 -> a table on stdout, PASS or FAIL in the last line and in the exit status, and with --json a file of the same

The verdict is Huawei's: every frame and output has a cosine similarity of at least 0.99 and a relative Euclidean
distance of at most 0.05. ais_bench's folders for several devices (device0, device1_1, ...) are read as well.

    $ python3 tools/compare.py result/result_bs1 baseline/result_bs1 | tail -n 1
    PASS: cosine similarity at least 0.99, relative distance at most 0.05 everywhere
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from intrada_postprocess import InputError, find_logits, first_five, make_parent, read_logits, run_script

# Source: Huawei's MindStudio 7.0.0, Model Accuracy Analyzer, Computation Accuracy Evaluation Indicators.
MIN_COSINE, MAX_DISTANCE = 0.99, 0.05

# Which of the frames' values is the worst.
WORST = {"cosine": min, "relative_distance": max, "largest_difference": max, "agreement": min}


def find_pairs(result_dir: Path, baseline_dir: Path) -> dict[tuple[str, str], tuple[Path, Path]]:
    """Pair the files of each frame and output, sorted by name; InputError for none, one missing, or the same ones."""
    results, baselines = find_logits(result_dir), find_logits(baseline_dir)
    for folder, found in ((result_dir, results), (baseline_dir, baselines)):
        if not found:
            raise InputError(f"{folder}: no <frame>_<output>.bin; expected what ais_bench or tools/infer.py wrote")
    for folder, extra in ((result_dir, results.keys() - baselines), (baseline_dir, baselines.keys() - results)):
        if extra:
            raise InputError(f"only {folder} has {len(extra)} of the results: {first_five(sorted(extra))}")
    pairs = {tuple(name.rsplit("_", 1)): (results[name], baselines[name]) for name in sorted(results)}
    frames, outputs = map(set, zip(*pairs))
    missing = {f"{frame}_{output}" for frame in frames for output in outputs} - results.keys()
    if missing:
        raise InputError(f"both folders lack {len(missing)} of the results: {first_five(sorted(missing))}")
    same = [result.name for result, baseline in pairs.values() if result.samefile(baseline)]
    if same:
        raise InputError(f"{result_dir} and {baseline_dir} have the same files: {first_five(same)}")
    return pairs


def measure(result: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """Compare two outputs of a frame.

    `cosine` is the cosine similarity; `relative_distance` the Euclidean distance divided by the baseline's norm;
    `largest_difference` the largest absolute difference; `agreement` the fraction of the grid points at which the same
    class has the largest logit. Where an output is all zeros, and so has no direction, equal ones have cosine 1 and
    distance 0, others 0 and 1.

    Args:
        result, baseline: (19, 65, 129) float32, finite.
    """
    result, baseline = result.astype(np.float64), baseline.astype(np.float64)
    difference = np.abs(result - baseline)
    norms = np.linalg.norm(result), np.linalg.norm(baseline)
    equal = not difference.any()
    return {
        "cosine": float(np.vdot(result, baseline) / np.prod(norms)) if all(norms) else float(equal),
        "relative_distance": float(np.linalg.norm(difference) / norms[1]) if all(norms) else float(not equal),
        "largest_difference": float(difference.max()),
        "agreement": float(np.mean(result.argmax(axis=0) == baseline.argmax(axis=0))),
    }


def summarise(measured: dict[tuple[str, str], dict[str, float]]) -> dict[str, dict]:
    """Find the worst frame and the mean of every measure, output by output."""
    outputs: dict[str, dict] = {}
    for output in sorted({output for _, output in measured}, key=int):
        outputs[output] = {}
        for key, find_worst in WORST.items():
            values = {frame: measures[key] for (frame, of), measures in measured.items() if of == output}
            worst = find_worst(values, key=values.__getitem__)
            mean = float(np.mean(list(values.values())))
            outputs[output][key] = {"worst": values[worst], "mean": mean, "worst_frame": worst}
    return outputs


def find_failures(outputs: dict[str, dict]) -> list[str]:
    """List what is outside of Huawei's limits."""
    failures = []
    for output, stats in outputs.items():
        cosine, distance = stats["cosine"], stats["relative_distance"]
        if cosine["worst"] < MIN_COSINE:
            failures.append(f"output {output}: cosine similarity {cosine['worst']:.8g} at {cosine['worst_frame']}")
        if distance["worst"] > MAX_DISTANCE:
            failures.append(f"output {output}: relative distance {distance['worst']:.8g} at {distance['worst_frame']}")
    return failures


def format_report(frames: int, outputs: dict[str, dict], failures: list[str]) -> str:
    """Format the comparison, the verdict in the last line."""
    lines = [f"{'output':<8}{'measure':<20}{'worst':>12}{'mean':>12}  worst frame"]
    for output, measures in outputs.items():
        for measure, stats in measures.items():
            name = f"{output:<8}{measure.replace('_', ' '):<20}"
            lines.append(f"{name}{stats['worst']:>12.6f}{stats['mean']:>12.6f}  {stats['worst_frame']}")
    limits = f"cosine similarity at least {MIN_COSINE}, relative distance at most {MAX_DISTANCE}"
    verdict = f"FAIL: {'; '.join(failures)} (limits: {limits})" if failures else f"PASS: {limits} everywhere"
    return "\n".join([*lines, f"\nframes: {frames}", f"\n{verdict}"])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare two folders of logits of the same frames.")
    parser.add_argument("result_dir", metavar="RESULT_DIR", type=Path, help="folder of logits, e.g. result/result_bs1")
    parser.add_argument("baseline_dir", metavar="BASELINE_DIR", type=Path, help="folder of logits to compare with")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the comparison here too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.json:
        make_parent(args.json)
    pairs = find_pairs(args.result_dir, args.baseline_dir)
    progress = tqdm(pairs.items(), unit="file", disable=None)  # shown if stderr is a terminal
    measured = {frame_and_output: measure(*map(read_logits, paths)) for frame_and_output, paths in progress}
    outputs = summarise(measured)
    failures = find_failures(outputs)
    frames = len({frame for frame, _ in pairs})
    if args.json:  # before printing, which a closed pipe ends
        folders = {"result_dir": str(args.result_dir), "baseline_dir": str(args.baseline_dir)}
        comparison = {**folders, "frames": frames, "outputs": outputs, "passed": not failures}
        args.json.write_text(json.dumps(comparison, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(format_report(frames, outputs, failures))
    return 1 if failures else 0


if __name__ == "__main__":
    run_script(main)
