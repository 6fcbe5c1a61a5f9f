"""intrada_postprocess.py: golden evaluation, the fused loop against plain ways, metrics by hand, refusals."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as CityscapesEvaluation
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import intrada_postprocess as postprocess
from support import GOLDEN, GOLDEN_DATA_DIR, GOLDEN_FRAME, error_of, golden_logits, refusal, run

SCRIPT = "intrada_postprocess.py"
LABEL_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


@pytest.fixture
def golden_results(tmp_path) -> Path:
    """The golden frame's main logits, float32, as ais_bench lays them out."""
    (tmp_path / "r").mkdir()
    golden_logits().tofile(tmp_path / "r" / f"{GOLDEN_FRAME}_leftImg8bit_1.bin")
    return tmp_path / "r"


def add_frame(folder: Path, frame: str, truth: np.ndarray, prediction: np.ndarray) -> None:
    """Add labels (65, 129) of train ids, 255 for ignored, and logits that predict (65, 129) train ids."""
    label_path = folder / "gtFine" / "val" / frame.split("_")[0] / f"{frame}_gtFine_labelIds.png"
    label_path.parent.mkdir(parents=True, exist_ok=True)
    ids = np.array([*LABEL_IDS, *[0] * 237], np.uint8)
    Image.fromarray(ids[truth]).save(label_path)
    logits = (np.arange(19)[:, None, None] == prediction).astype("<f4")
    (folder / "r").mkdir(exist_ok=True)
    logits.tofile(folder / "r" / f"{frame}_leftImg8bit_1.bin")


def metrics_of(data_dir: Path, result_dir: Path, *args: object, status: int = 0) -> dict:
    """Score in this process, which saves the start of another, and read the JSON."""
    options = "--json", data_dir.parent / "metrics.json", *args
    assert postprocess.main([str(arg) for arg in (data_dir, result_dir, *options)]) == status

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((data_dir.parent / "metrics.json").read_text(), parse_constant=refuse)


# ---------------------------------------------------------------------------------------------------- the golden frame


def test_the_golden_frame_gives_the_reference_matrix_and_iou(golden_results, tmp_path):
    shutil.copytree(GOLDEN_DATA_DIR, tmp_path / "data")
    metrics = metrics_of(tmp_path / "data", golden_results)
    expected = GOLDEN["evaluate"]
    assert metrics["confusion_matrix"] == expected["confusion"]
    assert list(metrics["iou"].values()) == pytest.approx(expected["iou"], abs=1e-12)
    assert metrics["miou"] == pytest.approx(expected["miou"], abs=1e-12)
    logits = golden_logits()
    assert metrics["per_frame"] == [
        {
            "frame": GOLDEN_FRAME,
            "miou": metrics["miou"],
            "ignored_pixels": expected["ignored_pixels"],
            "predicted_classes": 19,
            "smallest_logit": logits.min(),
            "largest_logit": logits.max(),
        }
    ]
    assert (metrics["frames"], metrics["split"]) == (1, "val")


def test_the_golden_prediction_is_the_reference_one_at_every_pixel():
    prediction = np.empty((1024, 2048), np.uint8)
    postprocess.predict(golden_logits(), prediction)
    assert hashlib.sha256(prediction.tobytes()).hexdigest() == GOLDEN["evaluate"]["prediction_sha256"]


def test_the_table_ends_with_the_miou_by_itself(golden_results):
    lines = run(SCRIPT, GOLDEN_DATA_DIR, golden_results).stdout.splitlines()
    assert lines[0].split() == ["class", "IoU", "%", "recall", "%", "of", "truth", "%"]
    assert lines[1].split() == ["road", "98.16", "98.94", "26.11"]
    assert lines[7].split() == ["traffic", "light", "69.97", "79.92", "0.17"]
    assert lines[20].split() == ["mean", "83.87", "90.85"]
    assert lines[-1] == "mIoU = 83.87"


# ---------------------------------------------------------------------------------------------------- the fused loop


def interpolate_plainly(logits_chw: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear with align_corners at full size, (C, height, width) float32, in torch's order of operations."""

    def corners(points: int, pixels: int):
        scale = np.float32(points - 1) / np.float32(max(pixels - 1, 1)) if pixels > 1 else np.float32(0)
        position = scale * np.arange(pixels, dtype=np.float32)
        lower = np.minimum(np.floor(position).astype(int), points - 1)
        return lower, np.minimum(lower + 1, points - 1), np.clip(position - lower.astype(np.float32), 0, 1)

    top, bottom, y = corners(logits_chw.shape[1], height)
    left, right, x = corners(logits_chw.shape[2], width)
    one, y = np.float32(1), y[:, None]
    upper = logits_chw[:, top][:, :, left] * (one - x) + logits_chw[:, top][:, :, right] * x
    lower = logits_chw[:, bottom][:, :, left] * (one - x) + logits_chw[:, bottom][:, :, right] * x
    return upper * (one - y) + lower * y


ABOVE_ONE = float(np.nextafter(np.float32(1), np.float32(2)))
LOGITS = st.sampled_from(
    [
        st.floats(-30, 30, width=32),
        st.sampled_from([-1.0, 0.0, 1.0]),  # ties
        st.sampled_from([1.0, ABOVE_ONE]),  # leads that rounding may level out
        st.floats(-(2.0**100), 2.0**100, width=32),
    ]
).flatmap(lambda values: hnp.arrays(np.float32, st.tuples(*[st.integers(1, 5)] * 3), elements=values))


@settings(max_examples=500, deadline=None)
@given(logits_chw=LOGITS, height=st.integers(1, 40), width=st.integers(1, 40))
@example(logits_chw=np.array([[[1, 1]] * 2, [[ABOVE_ONE, ABOVE_ONE]] * 2], np.float32), height=37, width=37)
def test_the_fused_loop_predicts_what_full_size_logits_predict(logits_chw, height, width):
    prediction = np.full((height, width), 255, np.uint8)
    postprocess.predict(logits_chw, prediction)
    full_size = interpolate_plainly(logits_chw, height, width)
    np.testing.assert_array_equal(prediction, full_size.argmax(axis=0))

    # torch may fuse a multiplication with an addition, so its values may differ in the last bits
    by_torch = torch.nn.functional.interpolate(
        torch.from_numpy(logits_chw)[None], (height, width), mode="bilinear", align_corners=True
    )[0].numpy()
    predicted = np.take_along_axis(by_torch, prediction[None].astype(int), axis=0)[0]
    assert (by_torch.max(axis=0) - predicted <= 1e-6 * np.abs(logits_chw).max()).all()


@pytest.mark.parametrize("noise", [0.0, 0.3, 5.0])
def test_the_fused_loop_predicts_what_torch_predicts_at_full_size(noise):
    rng = np.random.default_rng(7)
    coarse = torch.from_numpy(rng.normal(0, 5, (1, 19, 17, 33)).astype(np.float32))
    logits = torch.nn.functional.interpolate(coarse, (65, 129), mode="bicubic", align_corners=True)
    logits += torch.from_numpy(rng.normal(0, noise, logits.shape).astype(np.float32))
    prediction = np.empty((1024, 2048), np.uint8)
    postprocess.predict(logits[0].numpy(), prediction)
    expected = torch.nn.functional.interpolate(logits, (1024, 2048), mode="bilinear", align_corners=True)[0].argmax(0)
    assert (prediction != expected.numpy()).sum() <= 2  # of 2 million, where two classes tie to the last bit


# ---------------------------------------------------------------------------------------------------- metrics by hand


def test_classes_are_scored_over_all_frames_at_once(tmp_path):
    road, bicycle, sky, ignored = 0, 18, 10, 255
    blank = np.full((65, 129), road)
    half_truth = blank.copy()
    half_truth[:, :29] = bicycle  # 65 x 29 pixels
    half_prediction = blank.copy()
    half_prediction[:, :9] = bicycle  # 65 x 9 of them found
    half_prediction[:, 119:] = sky  # 65 x 10 of the 65 x 100 of road called sky
    add_frame(tmp_path / "data", "bonn_000000_000000", half_truth, half_prediction)
    ignored_truth = blank.copy()
    ignored_truth[:30] = ignored  # predicted as sky, and counts nowhere
    ignored_prediction = blank.copy()
    ignored_prediction[:30] = sky
    add_frame(tmp_path / "data", "ulm_000000_000000", ignored_truth, ignored_prediction)
    metrics = metrics_of(tmp_path / "data", tmp_path / "data" / "r")

    road_hits, road_truth = 65 * 90 + 35 * 129, 65 * 100 + 35 * 129
    confusion = np.zeros((19, 19), int)
    confusion[road, road], confusion[road, sky] = road_hits, 65 * 10
    confusion[bicycle, bicycle], confusion[bicycle, road] = 65 * 9, 65 * 20
    assert metrics["confusion_matrix"] == confusion.tolist()
    road_iou, bicycle_iou = road_hits / (road_truth + 65 * 20), 9 / 29
    assert {name: value for name, value in metrics["iou"].items() if value is not None} == {
        "road": pytest.approx(road_iou),
        "bicycle": pytest.approx(bicycle_iou),
        "sky": 0.0,
    }
    assert metrics["miou"] == pytest.approx((road_iou + bicycle_iou + 0) / 3)
    truth_total = road_truth + 65 * 29
    assert metrics["pixel_accuracy"] == pytest.approx((road_hits + 65 * 9) / truth_total)
    assert metrics["mean_class_accuracy"] == pytest.approx((road_hits / road_truth + 9 / 29) / 2)
    assert metrics["frequency_weighted_iou"] == pytest.approx(
        (road_truth * road_iou + 65 * 29 * bicycle_iou) / truth_total
    )
    assert metrics["category_iou"]["flat"] == pytest.approx(road_iou)
    assert metrics["category_iou"]["vehicle"] == pytest.approx(bicycle_iou)
    assert metrics["category_iou"]["human"] is None
    assert [frame["ignored_pixels"] for frame in metrics["per_frame"]] == [0, 30 * 129]
    assert metrics["per_frame"][1]["miou"] == 1.0
    assert [frame["predicted_classes"] for frame in metrics["per_frame"]] == [3, 2]  # sky is predicted where ignored


def test_confusion_inside_a_category_does_not_hurt_the_category(tmp_path):
    add_frame(tmp_path / "data", "bonn_000000_000000", np.full((65, 129), 13), np.full((65, 129), 14))  # car, truck
    metrics = metrics_of(tmp_path / "data", tmp_path / "data" / "r")
    assert (metrics["iou"]["car"], metrics["iou"]["truck"], metrics["category_iou"]["vehicle"]) == (0.0, 0.0, 1.0)


def test_every_class_is_in_its_category():
    assert {name: category for _, name, category in postprocess.CLASSES} == {
        **dict.fromkeys(["road", "sidewalk"], "flat"),
        **dict.fromkeys(["building", "wall", "fence"], "construction"),
        **dict.fromkeys(["pole", "traffic light", "traffic sign"], "object"),
        **dict.fromkeys(["vegetation", "terrain"], "nature"),
        "sky": "sky",
        **dict.fromkeys(["person", "rider"], "human"),
        **dict.fromkeys(["car", "truck", "bus", "train", "motorcycle", "bicycle"], "vehicle"),
    }


def test_a_frame_without_any_class_has_no_miou_and_changes_nothing(tmp_path):
    add_frame(tmp_path / "data", "bonn_000000_000000", np.full((65, 129), 3), np.full((65, 129), 3))
    add_frame(tmp_path / "data", "ulm_000000_000000", np.full((65, 129), 255), np.full((65, 129), 3))
    metrics = metrics_of(tmp_path / "data", tmp_path / "data" / "r")
    assert metrics["miou"] == 1.0
    assert [frame["miou"] for frame in metrics["per_frame"]] == [1.0, None]


def test_no_pixel_with_a_class_is_refused(tmp_path):
    add_frame(tmp_path, "ulm_000000_000000", np.full((65, 129), 255), np.full((65, 129), 3))
    assert refusal(postprocess, tmp_path, tmp_path / "r").startswith("no pixel of split val has a class")


def test_the_json_is_the_same_bytes_for_any_number_of_workers(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(7):
        truth, prediction = rng.integers(0, 19, (2, 65, 129))
        add_frame(tmp_path, f"ulm_000000_{n:06}", truth, prediction)
    written = set()
    for workers in (1, 3, 3):
        run(SCRIPT, tmp_path, tmp_path / "r", "--workers", workers, "--json", tmp_path / "m.json")
        written.add((tmp_path / "m.json").read_bytes())
    assert len(written) == 1


# ---------------------------------------------------------------------------------------------------- label maps


def test_cityscapes_own_evaluator_gives_the_same_iou_of_every_class_and_category(golden_results, tmp_path):
    data = shutil.copytree(GOLDEN_DATA_DIR, tmp_path / "data")
    rng = np.random.default_rng(0)
    for n in range(3):
        truth = rng.choice([*range(19), 255], (65, 129))
        prediction = np.where(rng.random((65, 129)) < 0.6, truth % 19, rng.integers(0, 19, (65, 129)))
        add_frame(data, f"ulm_000000_{n:06}", truth, prediction)
    for path in golden_results.iterdir():
        shutil.copy(path, data / "r")
    metrics = metrics_of(data, data / "r", "--save_labels", tmp_path / "labels")

    settings = CityscapesEvaluation.args
    settings.evalInstLevelScore, settings.quiet, settings.predictionPath = False, True, str(tmp_path / "labels")
    truths = [str(path) for path in sorted(data.glob("gtFine/val/*/*_labelIds.png"))]
    predictions = [CityscapesEvaluation.getPrediction(settings, path) for path in truths]
    found = CityscapesEvaluation.evaluateImgLists(predictions, truths, settings)
    assert metrics["iou"] == {name: found["classScores"][name] for name in metrics["iou"]}
    assert metrics["category_iou"] == {name: found["categoryScores"][name] for name in metrics["category_iou"]}
    assert metrics["miou"] == pytest.approx(found["averageScoreClasses"], abs=1e-15)
    assert metrics["frames"] == 4


def test_a_label_map_is_the_golden_prediction_in_label_ids(golden_results, tmp_path):
    done = run(SCRIPT, GOLDEN_DATA_DIR, golden_results, "--save_labels", tmp_path / "new" / "labels")
    (path,) = (tmp_path / "new" / "labels").iterdir()
    assert path.name == f"{GOLDEN_FRAME}_predicted_labelIds.png"
    label_map = np.asarray(Image.open(path))
    assert (label_map.dtype, label_map.shape) == (np.uint8, (1024, 2048))
    train_ids = np.searchsorted(LABEL_IDS, label_map).astype(np.uint8)
    assert hashlib.sha256(train_ids.tobytes()).hexdigest() == GOLDEN["evaluate"]["prediction_sha256"]
    assert f"\n1 label maps in {tmp_path}/new/labels\n" in done.stdout
    assert done.stdout.endswith("\nmIoU = 83.87\n")


def test_a_split_without_labels_gets_label_maps_of_its_pictures_size_and_no_metrics(tmp_path):
    add_frame(tmp_path, "ulm_000000_000000", np.zeros((65, 129), int), np.full((65, 129), 18))
    shutil.rmtree(tmp_path / "gtFine")
    picture = tmp_path / "leftImg8bit" / "test" / "ulm" / "ulm_000000_000000_leftImg8bit.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (48, 32)).save(picture)
    options = "--split", "test", "--save_labels", tmp_path / "labels", "--json", tmp_path / "m.json"
    done = run(SCRIPT, tmp_path, tmp_path / "r", *options)
    assert done.stdout == f"1 label maps in {tmp_path}/labels\n\nno metrics: no pixel of split test has a class\n"
    (label_map,) = (tmp_path / "labels").iterdir()
    np.testing.assert_array_equal(np.asarray(Image.open(label_map)), np.full((32, 48), 33))
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert (metrics["frames"], metrics["miou"], set(metrics["iou"].values())) == (1, None, {None})
    assert metrics["pixel_accuracy"] is None
    for refused in ([], ["--expect", 47.01], [*options, "--expect", 47.01]):
        assert f"{tmp_path}/gtFine/test: no <city>/<frame>_gtFine_labelIds.png here; DATA_DIR is the folder" in refusal(
            postprocess, tmp_path, tmp_path / "r", "--split", "test", *refused
        )


def test_a_picture_without_results_is_named_where_there_are_no_labels(golden_results, tmp_path):
    for name in (GOLDEN_FRAME, "frankfurt_999999_000002"):
        picture = tmp_path / "leftImg8bit" / "test" / "frankfurt" / f"{name}_leftImg8bit.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 32)).save(picture)
    message = refusal(postprocess, tmp_path, golden_results, "--split", "test", "--save_labels", tmp_path / "labels")
    assert message.startswith(f"{golden_results}: 1 of 2 frames have no ")
    assert message.endswith("frankfurt_999999_000002")
    assert not (tmp_path / "labels").exists()


def test_blank_labels_as_of_cityscapes_test_give_label_maps_and_no_metrics(tmp_path):
    add_frame(tmp_path, "ulm_000000_000000", np.full((65, 129), 255), np.full((65, 129), 3))
    done = run(SCRIPT, tmp_path, tmp_path / "r", "--save_labels", tmp_path / "labels")
    assert done.stdout.endswith("\nno metrics: no pixel of split val has a class\n")
    message = refusal(postprocess, tmp_path, tmp_path / "r", "--save_labels", tmp_path / "labels", "--expect", 47.01)
    assert message.startswith("no pixel of split val has a class")


def test_a_label_map_that_cannot_be_written_is_told(golden_results, tmp_path):
    blocked = tmp_path / "labels" / f"{GOLDEN_FRAME}_predicted_labelIds.png"
    blocked.mkdir(parents=True)
    message = refusal(postprocess, GOLDEN_DATA_DIR, golden_results, "--save_labels", tmp_path / "labels")
    assert message.startswith(f"1 of 1 frames cannot be scored: {blocked}: cannot be written: ")


# ---------------------------------------------------------------------------------------------------- expectations


@pytest.fixture
def quarter(tmp_path) -> Path:
    """A folder whose mIoU is 25 %: half of all road is called sky."""
    prediction = np.zeros((65, 130), int)[:, :129]
    prediction[32:] = 10
    truth = np.zeros((65, 129), int)
    truth[32] = 255
    add_frame(tmp_path, "ulm_000000_000000", truth, prediction)
    return tmp_path


@pytest.mark.parametrize(
    ("expect", "tolerance", "passed"),
    [
        (25, 0, True),
        (25.1, 0.1, True),  # in floats 25.1 - 25 is more than 0.1
        (24.9, 0.1, True),
        (25.11, 0.1, False),
        (24.89, 0.1, False),
        (25.0001, 0, False),
    ],
)
def test_an_expected_miou_passes_up_to_the_tolerance_s_edges(quarter, capsys, expect, tolerance, passed):
    options = "--expect", expect, "--tolerance", tolerance
    metrics = metrics_of(quarter, quarter / "r", *options, status=0 if passed else 1)
    stdout = capsys.readouterr().out
    verdict = f"PASS: mIoU 25.0000 is within {float(tolerance)} of {float(expect)}"
    if not passed:
        verdict = f"FAIL: mIoU 25.0000 is not within {float(tolerance)} of {float(expect)}"
    assert f"\nmIoU = 25.00\n\n{verdict}\n" in stdout
    assert stdout.endswith(f"{verdict}\n") == passed
    assert metrics["expected"] == {"percent": expect, "tolerance": tolerance, "passed": passed}


def test_a_folder_for_json_that_is_not_there_is_told_before_anything_runs(golden_results):
    stderr = run(SCRIPT, GOLDEN_DATA_DIR, golden_results, "--json", "/no/m.json", status=2).stderr
    assert "--json /no/m.json: no such folder" in stderr


@pytest.mark.parametrize("value", ["-1", "101", "nan", "many"])
def test_an_expectation_that_is_no_percentage_is_wrong_usage(golden_results, value):
    run(SCRIPT, GOLDEN_DATA_DIR, golden_results, f"--expect={value}", status=2)


@pytest.fixture
def found_causes(quarter, capsys) -> Callable[[], list[str]]:
    """Tell what is found in the data to explain a missed expectation."""
    return lambda: causes_in(metrics_of(quarter, quarter / "r", "--expect", 100, status=1) and capsys.readouterr().out)


def causes_in(stdout: str) -> list[str]:
    found, likely = re.search(r"\nfound:\n(.*)\nlikely causes.*?:\n(.*)", stdout, re.DOTALL).groups()
    assert len(likely.splitlines()) == len(postprocess.CAUSES)
    return found.splitlines()


def test_no_cause_is_found_where_the_data_tells_none(found_causes):
    assert found_causes() == ["- nothing in the data at hand tells the cause"]


def test_an_auxiliary_output_that_scores_better_is_told(quarter, found_causes):
    auxiliary = quarter / "r" / "ulm_000000_000000_leftImg8bit_0.bin"
    logits = np.zeros((19, 65, 129), "<f4")
    logits[0] = 1
    logits[1, 0, 0] = 2  # some pixels wrong, but fewer than of the main output
    logits.tofile(auxiliary)
    (cause,) = found_causes()
    assert re.match(r"- the auxiliary output, _0, scores better, mIoU 49\.\d\d: were the outputs swapped\?", cause)
    (quarter / "r" / "ulm_000000_000000_leftImg8bit_1.bin").replace(auxiliary)
    logits.tofile(quarter / "r" / "ulm_000000_000000_leftImg8bit_1.bin")
    assert found_causes() == ["- nothing in the data at hand tells the cause"]


def test_frames_of_one_class_each_are_told(quarter, found_causes):
    for n, train_id in enumerate((3, 4)):
        add_frame(quarter, f"ulm_000000_{n:06}", np.zeros((65, 129), int), np.full((65, 129), train_id))
    assert found_causes() == [
        "- every frame predicts one class: the weights are not loaded, or the input is not the picture"
    ]
    add_frame(quarter, "ulm_000000_000002", np.zeros((65, 129), int), np.arange(65 * 129).reshape(65, 129) % 2)
    assert found_causes() == ["- nothing in the data at hand tells the cause"]


def test_constant_logits_are_told(quarter, found_causes):
    add_frame(quarter, "ulm_000000_000000", np.ones((65, 129), int), np.zeros((65, 129), int))
    np.full((19, 65, 129), 7, "<f4").tofile(quarter / "r" / "ulm_000000_000000_leftImg8bit_1.bin")
    assert found_causes() == [
        "- the logits of every frame are constant: the model did not compute, or its input was not read"
    ]


@pytest.mark.parametrize("value", [1100, -65504])
def test_huge_logits_are_told(quarter, found_causes, value):
    path = quarter / "r" / "ulm_000000_000000_leftImg8bit_1.bin"
    logits = np.fromfile(path, "<f4").reshape(19, 65, 129)
    logits[5, 0, 0] = value
    logits.tofile(path)
    assert found_causes() == [f"- logits up to {abs(value)}, beyond 1000: overflow of FP16, or another network"]


def test_a_damaged_auxiliary_output_does_not_hide_that_the_expectation_is_missed(quarter, found_causes):
    np.full((19, 65, 129), np.inf, "<f4").tofile(quarter / "r" / "ulm_000000_000000_leftImg8bit_0.bin")
    assert found_causes() == ["- nothing in the data at hand tells the cause"]


def test_too_high_a_miou_is_not_explained_by_what_lowers_it(quarter, capsys):
    auxiliary = np.zeros((19, 65, 129), "<f4")
    auxiliary[0] = 1
    auxiliary.tofile(quarter / "r" / "ulm_000000_000000_leftImg8bit_0.bin")  # scores better
    metrics_of(quarter, quarter / "r", "--expect", 10, status=1)
    likely = capsys.readouterr().out.split("found:\n")[1].splitlines()
    assert likely[0] == "- nothing in the data at hand tells the cause"
    assert [line.split(":")[0] for line in likely[2:]] == [
        "- another split than the results are of",
        "- another checkpoint",
    ]


# ---------------------------------------------------------------------------------------------------- baselines


def add_results(folder: Path, name: str, frames: int, noise: float) -> dict[tuple[int, int], np.ndarray]:
    """Add both outputs' logits of frames, smooth, and with noise on top that differs from folder to folder."""
    (folder / name).mkdir()
    logits = {}
    for n in range(frames):
        for output in (0, 1):
            coarse = torch.from_numpy(np.random.default_rng(10 * n + output).normal(0, 5, (1, 19, 9, 17)))
            smooth = torch.nn.functional.interpolate(coarse, (65, 129), mode="bilinear", align_corners=True)[0].numpy()
            rough = np.random.default_rng([n, output, 7]).normal(0, noise * (n + 1), smooth.shape)
            logits[n, output] = (smooth + rough).astype("<f4")
            logits[n, output].tofile(folder / name / f"ulm_000000_{n:06}_leftImg8bit_{output}.bin")
    return logits


def add_labels(folder: Path, frames: int) -> list[np.ndarray]:
    """Add labels (130, 258) of random classes; return them as train ids."""
    truths = []
    for n in range(frames):
        truths.append(np.random.default_rng(n).choice([0, 1, 2, 18, 255], (130, 258)))
        add_frame(folder, f"ulm_000000_{n:06}", truths[-1], np.zeros((65, 129), int))
    return truths


def test_a_result_compared_with_itself_agrees_wholly(tmp_path):
    add_labels(tmp_path, 2)
    add_results(tmp_path, "ours", 2, noise=0.1)
    baseline = metrics_of(tmp_path, tmp_path / "ours", "--baseline", tmp_path / "ours")["baseline"]
    assert baseline["agreement"] == 1
    assert (baseline["flips"], baseline["harmless_flips"]) == (0, None)
    assert {change for change in baseline["iou_change"].values()} == {0}
    for output in baseline["outputs"]:
        figures = {measure: (of["worst"], of["mean"]) for measure, of in output.items()}
        assert figures == {
            "cosine": (1, 1), "relative_distance": (0, 0), "largest_difference": (0, 0), "mean_difference": (0, 0),
        }  # fmt: skip
    assert baseline["passed"] is True


def test_with_noise_the_comparison_is_what_an_independent_computation_gives(tmp_path):
    truths = add_labels(tmp_path, 3)
    ours, theirs = add_results(tmp_path, "ours", 3, noise=0.05), add_results(tmp_path, "theirs", 3, noise=0)
    options = "--baseline", tmp_path / "theirs", "--json", tmp_path / "m.json"
    done = run(SCRIPT, tmp_path, tmp_path / "ours", *options)
    metrics = json.loads((tmp_path / "m.json").read_text())
    baseline = metrics["baseline"]

    for output in (0, 1):
        expected = {"cosine": [], "relative_distance": [], "largest_difference": [], "mean_difference": []}
        for n in range(3):
            a, b = (torch.from_numpy(logits[n, output]).double().flatten() for logits in (ours, theirs))
            expected["cosine"].append(torch.nn.functional.cosine_similarity(a, b, dim=0).item())
            expected["relative_distance"].append((torch.dist(a, b) / b.norm()).item())
            expected["largest_difference"].append(torch.dist(a, b, p=float("inf")).item())
            expected["mean_difference"].append(torch.nn.functional.l1_loss(a, b).item())
        for measure, values in expected.items():
            found = baseline["outputs"][output][measure]
            worst = min(values) if measure == "cosine" else max(values)
            assert found["worst"] == pytest.approx(worst, rel=1e-9)
            assert found["mean"] == pytest.approx(np.mean(values), rel=1e-9)
            assert found["worst_frame"] == "ulm_000000_000002"  # the noisiest

    flips, harmless, agreement, confusion = 0, 0, {}, np.zeros((2, 19, 19))
    for n in range(3):
        full = [
            torch.nn.functional.interpolate(
                torch.from_numpy(logits[n, 1])[None], (130, 258), mode="bilinear", align_corners=True
            )[0]
            for logits in (ours, theirs)
        ]
        labels = [logits.argmax(0).numpy() for logits in full]
        differ = labels[0] != labels[1]
        first, second = full[1].topk(2, dim=0).values.numpy()
        flips += differ.sum()
        harmless += (differ & (first - second <= np.abs(ours[n, 1] - theirs[n, 1]).max())).sum()
        agreement[f"ulm_000000_{n:06}"] = 1 - differ.mean()
        known = truths[n] != 255
        for which in (0, 1):
            np.add.at(confusion[which], (truths[n][known], labels[which][known]), 1)
    assert flips > 100
    assert baseline["flips"] == pytest.approx(flips, abs=2)  # torch may round a tie otherwise
    assert baseline["harmless_flips"] == pytest.approx(harmless / flips, abs=0.01)
    assert baseline["agreement"] == pytest.approx(1 - flips / (3 * 130 * 258), abs=1e-4)
    least = {row["frame"]: row["agreement"] for row in baseline["least_agreeing"]}
    assert list(least) == sorted(agreement, key=agreement.get)
    assert least == pytest.approx(agreement, abs=1e-4)
    hits = np.array([np.diag(matrix) for matrix in confusion])
    iou = hits / (confusion.sum(axis=1) + confusion.sum(axis=2) - hits)
    assert list(metrics["iou"].values()) == pytest.approx(list(iou[0]), abs=1e-4)
    assert list(baseline["iou"].values()) == pytest.approx(list(iou[1]), abs=1e-4)
    assert list(baseline["iou_change"].values()) == pytest.approx(list(iou[0] - iou[1]), abs=1e-4)
    assert baseline["miou"] == pytest.approx(iou[1].mean(), abs=1e-4)
    assert baseline["passed"] is True
    assert done.stdout.endswith(
        "\nPASS: logits like the baseline's "
        "(cosine at least 0.99 and relative distance at most 0.05 at every frame and output)\n"
    )


def test_only_the_flips_within_the_largest_difference_are_harmless(tmp_path):
    add_labels(tmp_path, 1)
    theirs = np.zeros((2, 19, 65, 129), "<f4")
    theirs[1, 0] = 8
    margins = np.repeat([1, 4.8, 8], [40, 40, 49])  # between the two largest logits of each column
    theirs[1, 1] = 8 - margins
    ours = theirs.copy()
    ours[1, 0] -= 5
    ours[1, 1] += 5  # turns both; the largest difference is 5
    for name, logits in (("ours", ours), ("theirs", theirs)):
        (tmp_path / name).mkdir()
        for output in (0, 1):
            logits[output].tofile(tmp_path / name / f"ulm_000000_000000_leftImg8bit_{output}.bin")
    baseline = metrics_of(tmp_path, tmp_path / "ours", "--baseline", tmp_path / "theirs", status=1)["baseline"]
    assert (baseline["flips"], baseline["agreement"]) == (130 * 258, 0)
    assert baseline["harmless_flips"] == (np.interp(np.linspace(0, 128, 258), range(129), margins) <= 5).mean()


@pytest.mark.parametrize("output", [0, 1])
def test_a_baseline_too_far_off_fails_and_says_where(tmp_path, output):
    add_labels(tmp_path, 2)
    add_results(tmp_path, "ours", 2, noise=0)
    theirs = add_results(tmp_path, "theirs", 2, noise=0)
    path = tmp_path / "theirs" / f"ulm_000000_000001_leftImg8bit_{output}.bin"
    (theirs[1, output] * 1.04).tofile(path)  # cosine 1, relative distance 0.038
    metrics_of(tmp_path, tmp_path / "ours", "--baseline", tmp_path / "theirs")
    (theirs[1, output] * 1.06).tofile(path)  # 0.057
    done = run(SCRIPT, tmp_path, tmp_path / "ours", "--baseline", tmp_path / "theirs", status=1)
    assert done.stdout.splitlines()[-1].startswith(
        "FAIL: logits unlike the baseline's (cosine at least 0.99 and relative distance at most 0.05 asked for): "
        f"output {output}: relative distance 0.056603"
    )
    assert done.stdout.endswith(" at ulm_000000_000001\n")
    assert done.stderr == ""


def test_logits_of_another_direction_fail_by_cosine_too(tmp_path, capsys):
    add_labels(tmp_path, 1)
    add_results(tmp_path, "ours", 1, noise=2)
    add_results(tmp_path, "theirs", 1, noise=0)
    baseline = metrics_of(tmp_path, tmp_path / "ours", "--baseline", tmp_path / "theirs", status=1)["baseline"]
    cosine = baseline["outputs"][0]["cosine"]["worst"]
    assert cosine < 0.99
    assert f": output 0: cosine {cosine:.8g} at ulm_000000_000000; output 0: relative" in capsys.readouterr().out


def test_the_five_frames_that_agree_least_and_each_class_s_change_are_printed(tmp_path, capsys):
    add_labels(tmp_path, 6)
    add_results(tmp_path, "ours", 6, noise=0.02)
    add_results(tmp_path, "theirs", 6, noise=0)
    metrics = metrics_of(tmp_path, tmp_path / "ours", "--baseline", tmp_path / "theirs")
    baseline, stdout = metrics["baseline"], capsys.readouterr().out
    assert len(baseline["least_agreeing"]) == 5
    assert f"{baseline['flips']} pixels differ, {100 * baseline['harmless_flips']:.2f} % of them where" in stdout
    row = next(line.split() for line in stdout.splitlines() if line.startswith("bicycle"))
    iou, other, change = (100 * found["bicycle"] for found in (metrics["iou"], baseline["iou"], baseline["iou_change"]))
    assert (row[1], row[4]) == (f"{iou:.2f}", f"{other:.2f}")
    assert float(row[5]) == pytest.approx(change, abs=0.006)
    assert change != 0


def test_logits_without_direction_are_compared(tmp_path):
    add_labels(tmp_path, 1)
    add_results(tmp_path, "ours", 1, noise=0)
    (tmp_path / "theirs").mkdir()
    for output in (0, 1):
        np.zeros((19, 65, 129), "<f4").tofile(tmp_path / "theirs" / f"ulm_000000_000000_leftImg8bit_{output}.bin")
    baseline = metrics_of(tmp_path, tmp_path / "ours", "--baseline", tmp_path / "theirs", status=1)["baseline"]
    output = baseline["outputs"][1]
    assert (output["cosine"]["worst"], output["relative_distance"]["worst"]) == (0, 1)
    metrics_of(tmp_path, tmp_path / "theirs", "--baseline", tmp_path / "theirs")


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("folder", ["ours", "theirs"])
def test_a_frame_without_one_of_the_results_to_compare_is_named(tmp_path, folder, output):
    add_labels(tmp_path, 2)
    for name in ("ours", "theirs"):
        add_results(tmp_path, name, 2, noise=0)
    (tmp_path / folder / f"ulm_000000_000001_leftImg8bit_{output}.bin").unlink()
    message = refusal(postprocess, tmp_path, tmp_path / "ours", "--baseline", tmp_path / "theirs")
    assert message.startswith(f"{tmp_path}/{folder}: 1 of 2 frames have no <frame>_leftImg8bit_{output}.bin or .npy")
    assert message.endswith(": ulm_000000_000001")


# ---------------------------------------------------------------------------------------------------- finding results


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("ending", ["bin", "npy"])
@pytest.mark.parametrize("folder", [".", "device0", "device1_1"])
def test_every_layout_of_ais_bench_is_read(tmp_path, capsys, half, ending, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    logits = golden_logits().astype(np.float16 if half else np.float32)
    path = tmp_path / folder / f"{GOLDEN_FRAME}_leftImg8bit_1.{ending}"
    logits.tofile(path) if ending == "bin" else np.save(path, logits)
    assert postprocess.main([str(GOLDEN_DATA_DIR), str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("\nmIoU = 83.87\n")


def test_missing_frames_are_counted_and_named(tmp_path):
    (tmp_path / "r").mkdir()
    for n in range(7):
        add_frame(tmp_path, f"ulm_000000_{n:06}", np.zeros((65, 129), int), np.zeros((65, 129), int))
        if n != 3:
            (tmp_path / "r" / f"ulm_000000_{n:06}_leftImg8bit_1.bin").unlink()
    assert refusal(postprocess, tmp_path, tmp_path / "r") == (
        f"{tmp_path}/r: 6 of 7 frames have no <frame>_leftImg8bit_1.bin or .npy (infer them first; RESULT_DIR is what "
        "ais_bench filled, as result/result_bs1): ulm_000000_000000, ulm_000000_000001, ulm_000000_000002, "
        "ulm_000000_000004, ulm_000000_000005, ..."
    )


def test_the_auxiliary_output_alone_is_told(golden_results):
    path = golden_results / f"{GOLDEN_FRAME}_leftImg8bit_1.bin"
    path.rename(golden_results / f"{GOLDEN_FRAME}_leftImg8bit_0.bin")
    assert "(only the auxiliary output, _0: the model must have both)" in refusal(
        postprocess, GOLDEN_DATA_DIR, golden_results
    )


def test_the_same_frame_of_two_devices_counts_once_if_equal_and_is_refused_if_not(golden_results):
    path = golden_results / f"{GOLDEN_FRAME}_leftImg8bit_1.bin"
    for device in ("device0_0", "device1_1"):
        (golden_results / device).mkdir()
        shutil.copy(path, golden_results / device)
    path.unlink()
    assert run(SCRIPT, GOLDEN_DATA_DIR, golden_results).stdout.endswith("\nmIoU = 83.87\n")
    np.zeros((19, 65, 129), "<f4").tofile(golden_results / "device1_1" / path.name)
    assert refusal(postprocess, GOLDEN_DATA_DIR, golden_results) == (
        f"{golden_results}/device0_0/{path.name} and {golden_results}/device1_1/{path.name} differ: "
        "results of two runs; empty the folder and infer again, for several devices with ais_bench's --divide_input 1"
    )


def test_results_of_no_frame_are_warned_of(golden_results):
    (golden_results / "ulm_000000_000000_leftImg8bit_1.bin").write_bytes(b"")
    assert run(SCRIPT, GOLDEN_DATA_DIR, golden_results).stderr == (
        f"warning: {golden_results}: 1 results belong to no frame of this split and count nowhere: "
        "ulm_000000_000000_leftImg8bit_1\n"
    )


# ---------------------------------------------------------------------------------------------------- broken files


def fault_of(data_dir: Path, result_dir: Path) -> str:
    """Return what is said of the only frame."""
    start = "1 of 1 frames cannot be scored: "
    message = refusal(postprocess, data_dir, result_dir)
    assert message.startswith(start), message
    return message[len(start) :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "float32 (0,); expected (19, 65, 129), 637260 bytes of float32 or 318630 of float16; infer"),
        (bytes(637260 // 3), "float32 (53105,); expected (19, 65, 129), 637260 bytes of float32"),
        (bytes(4 * 19 * 64 * 128), "64 x 128 logits: the conversion lost the max pool's ceil_mode"),
        (bytes(2 * 19 * 64 * 128), "64 x 128 logits: the conversion lost the max pool's ceil_mode"),
        (np.full(19 * 65 * 129, np.nan, "<f4").tobytes(), "logits that are not finite, as an overflow of FP16"),
        (np.full(19 * 65 * 129, np.inf, "<f2").tobytes(), "logits that are not finite, as an overflow of FP16"),
    ],
    ids=["empty", "cut", "ceil_mode", "half_ceil_mode", "nan", "half_inf"],
)
def test_damaged_logits_are_told(golden_results, content, message):
    path = golden_results / f"{GOLDEN_FRAME}_leftImg8bit_1.bin"
    path.write_bytes(content)
    assert fault_of(GOLDEN_DATA_DIR, golden_results).startswith(f"{path}: {message}")


def test_a_damaged_npy_is_told(golden_results):
    (golden_results / f"{GOLDEN_FRAME}_leftImg8bit_1.bin").unlink()
    path = golden_results / f"{GOLDEN_FRAME}_leftImg8bit_1.npy"
    path.write_bytes(b"\x93NUMPY")
    assert fault_of(GOLDEN_DATA_DIR, golden_results).startswith(f"{path}: not a whole .npy: ")
    np.save(path, golden_logits().astype(np.float64))
    assert fault_of(GOLDEN_DATA_DIR, golden_results).startswith(
        f"{path}: float64 (19, 65, 129); expected (19, 65, 129)"
    )
    np.save(path, golden_logits().transpose(1, 2, 0))
    assert fault_of(GOLDEN_DATA_DIR, golden_results).startswith(
        f"{path}: float32 (65, 129, 19); expected (19, 65, 129)"
    )


def test_labels_that_are_no_label_ids_are_told(tmp_path):
    add_frame(tmp_path, "ulm_000000_000000", np.zeros((65, 129), int), np.zeros((65, 129), int))
    path = tmp_path / "gtFine" / "val" / "ulm" / "ulm_000000_000000_gtFine_labelIds.png"
    Image.fromarray(np.array([[0, 1, 255, 35]], np.uint8)).save(path)
    assert fault_of(tmp_path, tmp_path / "r") == (
        f"{path}: label ids 35, 255; expected 0 to 34, so labelIds and not labelTrainIds or colours"
    )
    Image.new("RGB", (8, 8)).save(path)
    assert fault_of(tmp_path, tmp_path / "r") == (f"{path}: found mode RGB, expected L, one 8-bit label id a pixel")
    path.write_bytes(b"")
    assert fault_of(tmp_path, tmp_path / "r").startswith(f"{path}: not a whole PNG: ")


def test_all_damaged_files_are_counted_and_named(tmp_path):
    for n in range(4):
        add_frame(tmp_path, f"ulm_000000_{n:06}", np.zeros((65, 129), int), np.zeros((65, 129), int))
    for n in (1, 3):
        (tmp_path / "r" / f"ulm_000000_{n:06}_leftImg8bit_1.bin").write_bytes(b"cut")
    message = refusal(postprocess, tmp_path, tmp_path / "r")
    assert message.startswith(f"2 of 4 frames cannot be scored: {tmp_path}/r/ulm_000000_000001_leftImg8bit_1.bin: ")
    assert f"; {tmp_path}/r/ulm_000000_000003_leftImg8bit_1.bin: " in message


def test_a_name_in_two_cities_is_refused(tmp_path):
    add_frame(tmp_path, "ulm_000000_000000", np.zeros((65, 129), int), np.zeros((65, 129), int))
    shutil.copytree(tmp_path / "gtFine" / "val" / "ulm", tmp_path / "gtFine" / "val" / "bonn")
    assert refusal(postprocess, tmp_path, tmp_path / "r") == f"{tmp_path}/gtFine/val: 1 frame names occur in two cities"


def test_the_same_frame_in_two_formats_is_refused(golden_results):
    np.save(golden_results / f"{GOLDEN_FRAME}_leftImg8bit_1.npy", golden_logits())
    assert refusal(postprocess, GOLDEN_DATA_DIR, golden_results).endswith(": results of two runs; remove one of them")


def test_folders_that_are_not_there_are_told(golden_results, tmp_path):
    assert error_of(SCRIPT, tmp_path, golden_results) == (
        f"{tmp_path}/gtFine/val: no <city>/<frame>_gtFine_labelIds.png here; DATA_DIR is the folder that holds gtFine"
    )
    assert error_of(SCRIPT, GOLDEN_DATA_DIR, tmp_path / "none") == (
        f"{tmp_path}/none: no such folder; RESULT_DIR is what ais_bench filled, as result/result_bs1"
    )


def test_without_a_folder_to_keep_machine_code_it_still_runs(golden_results, tmp_path):
    script = shutil.copy(Path(postprocess.__file__), tmp_path)
    (tmp_path / "__pycache__").write_text("a file, so that nothing can be kept here")
    nowhere = {"PATH": os.environ["PATH"], "HOME": "/proc/none", "LOCALAPPDATA": "/proc/none"}
    assert run(script, GOLDEN_DATA_DIR, golden_results, env=nowhere).stdout.endswith("\nmIoU = 83.87\n")
