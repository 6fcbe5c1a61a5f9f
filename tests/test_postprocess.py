"""intrada_postprocess.py: golden evaluation, the prediction against torch, metrics by hand, refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as CityscapesEvaluation
from cityscapesscripts.helpers.labels import id2label, trainId2label
from PIL import Image

import intrada_postprocess as postprocess
from support import GOLDEN, GOLDEN_DATA_DIR, GOLDEN_FRAME, LABEL_IDS, add_frame, error_of, golden_logits, refusal, run

SCRIPT = "intrada_postprocess.py"
FRAME = "ulm_000000_000000"
LABEL, LOGITS = f"gtFine/val/ulm/{FRAME}_gtFine_labelIds.png", f"r/{FRAME}_leftImg8bit_1.bin"
ROAD = np.zeros((65, 129), int)
HALF_ROAD = np.where(np.arange(65)[:, None] < 32, 0, np.full((65, 129), 10))


@pytest.fixture
def golden(tmp_path) -> Path:
    """A folder with the golden label in gtFine and the golden frame's main logits, float32, in r."""
    shutil.copytree(GOLDEN_DATA_DIR / "gtFine", tmp_path / "gtFine")
    (tmp_path / "r").mkdir()
    golden_logits().tofile(tmp_path / "r" / f"{GOLDEN_FRAME}_leftImg8bit_1.bin")
    (tmp_path / "r_summary.json").write_text('{"args": [], "throughput": 1.0, "NPU_compute_time": {"mean": 1}}')
    return tmp_path


@pytest.fixture
def quarter(tmp_path) -> Path:
    """A folder with one frame whose mIoU is 25 %: half of all road is predicted as sky."""
    add_frame(tmp_path, FRAME, np.where(np.arange(65)[:, None] == 32, 255, ROAD), HALF_ROAD)
    return tmp_path


def score(folder: Path, *options: object) -> int:
    """Score folder/r in-process."""
    return postprocess.main([str(arg) for arg in (folder, folder / "r", *options)])


def metrics_of(folder: Path, *options: object, status: int = 0) -> dict:
    assert score(folder, "--json", folder / "m.json", *options) == status
    return json.loads((folder / "m.json").read_text())


# ---------------------------------------------------------------------------------------------------- the golden frame


def test_the_golden_frame_gives_the_reference_matrix_iou_and_table(golden):
    (golden / "r" / "pure_infer_data_1.bin").touch()  # of ais_bench's run on zeros
    done = run(SCRIPT, golden, golden / "r", "--json", golden / "m.json")
    metrics, expected = json.loads((golden / "m.json").read_text()), GOLDEN["evaluate"]
    assert metrics["confusion_matrix"] == expected["confusion"]
    assert list(metrics["iou"].values()) == pytest.approx(expected["iou"], abs=1e-12)
    assert metrics["miou"] == pytest.approx(expected["miou"], abs=1e-12)
    of_frame = {key: metrics[key] for key in ("miou", "pixel_accuracy", "iou")}  # of one frame the same as of the split
    truth = [sum(row) for row in expected["confusion"]]
    assert metrics["per_frame"] == [{"frame": GOLDEN_FRAME, **of_frame, "truth": truth}]
    assert (metrics["frames"], metrics["split"]) == (1, "val")
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["road", "98.16", "98.94", "26.11"]
    assert lines[7].split() == ["traffic", "light", "69.97", "79.92", "0.17"]
    assert lines[20].split() == ["mean", "83.87", "90.85"]
    assert lines[-1] == "mIoU = 83.87"
    assert done.stderr == ""


def test_the_classes_are_those_of_cityscapesscripts():
    labels = [trainId2label[train_id] for train_id in range(19)]
    found = [(label.id, label.name, label.category, "#" + bytes(label.color).hex()) for label in labels]
    assert list(postprocess.CLASSES) == found


# ---------------------------------------------------------------------------------------------------- the prediction


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


ABOVE_ONE = np.nextafter(np.float32(1), np.float32(2))
VALUES = {
    "usual": lambda rng, shape: rng.uniform(-30, 30, shape),
    "ties": lambda rng, shape: rng.integers(-1, 2, shape),
    "leads that rounding can erase": lambda rng, shape: rng.choice([1, ABOVE_ONE], shape),
    "large": lambda rng, shape: rng.uniform(-1e37, 1e37, shape),
    "denormal": lambda rng, shape: rng.integers(-9, 10, shape) * 2.0**-149,
    "of every magnitude": lambda rng, shape: rng.choice([-1, 1], shape) * 10 ** rng.uniform(-40, 37, shape),
}


@pytest.mark.parametrize("kind", VALUES)
def test_the_prediction_is_that_of_full_size_logits(kind):
    for seed in range(150):
        rng = np.random.default_rng(seed)
        shape, (height, width) = tuple(rng.integers(1, 6, 3)), map(int, rng.integers(1, 41, 2))
        logits_chw = VALUES[kind](rng, shape).astype(np.float32)
        prediction = postprocess.predict(logits_chw, (height, width))
        np.testing.assert_array_equal(prediction, interpolate_plainly(logits_chw, height, width).argmax(axis=0))

        # torch may fuse a multiplication with an addition, so its values may differ in the last bits
        by_torch = torch.nn.functional.interpolate(
            torch.from_numpy(logits_chw)[None], (height, width), mode="bilinear", align_corners=True
        )[0].numpy()
        predicted = np.take_along_axis(by_torch, prediction[None].astype(int), axis=0)[0]
        assert (by_torch.max(axis=0) - predicted <= 1e-6 * np.abs(logits_chw).max() + np.finfo(np.float32).tiny).all()


# ---------------------------------------------------------------------------------------------------- metrics by hand


def test_classes_are_scored_over_all_frames_at_once(tmp_path, capsys):
    road, bicycle, sky, ignored = 0, 18, 10, 255
    truth, prediction = ROAD.copy(), ROAD.copy()
    truth[:, :29] = bicycle
    prediction[:, :9] = bicycle  # 9 of its 29 columns are found
    prediction[:, 119:] = sky  # 10 of the 100 columns of road
    add_frame(tmp_path, "bonn_000000_000000", truth, prediction)
    truth, prediction = ROAD.copy(), ROAD.copy()
    truth[:30] = ignored  # predicted as sky, and counts nowhere
    prediction[:30] = sky
    add_frame(tmp_path, FRAME, truth, prediction)
    metrics = metrics_of(tmp_path)

    road_hits, road_truth, bicycle_truth = 65 * 90 + 35 * 129, 65 * 100 + 35 * 129, 65 * 29
    confusion = np.zeros((19, 19), int)
    confusion[road, [road, sky]] = road_hits, 65 * 10
    confusion[bicycle, [bicycle, road]] = 65 * 9, 65 * 20
    assert metrics["confusion_matrix"] == confusion.tolist()
    iou = {"road": road_hits / (road_truth + 65 * 20), "sky": 0, "bicycle": 9 / 29}
    assert {name: value for name, value in metrics["iou"].items() if value is not None} == pytest.approx(iou)
    categories = {name: value for name, value in metrics["category_iou"].items() if value is not None}
    assert categories == pytest.approx({"flat": iou["road"], "sky": 0, "vehicle": iou["bicycle"]})
    for key, value in {
        "miou": (iou["road"] + 0 + iou["bicycle"]) / 3,
        "pixel_accuracy": (road_hits + 65 * 9) / (road_truth + bicycle_truth),
        "mean_class_accuracy": (road_hits / road_truth + 9 / 29) / 2,
    }.items():
        assert metrics[key] == pytest.approx(value), key
    of_frame = {"frame": FRAME, "miou": 1.0, "pixel_accuracy": 1.0, "truth": [35 * 129, *[0] * 18]}
    assert metrics["per_frame"][1] == {**of_frame, "iou": {**dict.fromkeys(metrics["iou"]), "road": 1.0}}
    printed = "classes that are only predicted, and count 0: 1; mean over the others: "
    assert f"\n{printed}{50 * (iou['road'] + iou['bicycle']):.2f} %\n" in capsys.readouterr().out


def test_a_frame_without_any_class_has_no_miou_and_changes_nothing(quarter):
    add_frame(quarter, "ulm_000000_000001", np.full((65, 129), 255), ROAD)
    metrics = metrics_of(quarter)
    assert metrics["miou"] == 0.25
    assert [frame["miou"] for frame in metrics["per_frame"]] == [0.25, None]


def test_the_json_is_the_same_bytes_for_any_number_of_workers(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(7):
        add_frame(tmp_path, f"ulm_000000_{n:06}", *rng.integers(0, 19, (2, 65, 129)))
    written = set()
    for workers in (1, 3, 3):
        metrics_of(tmp_path, "--workers", workers)
        written.add((tmp_path / "m.json").read_bytes())
    assert len(written) == 1


def test_cityscapes_own_evaluator_gives_the_same_iou_of_every_class_and_category(golden):
    rng = np.random.default_rng(0)
    for n in range(3):
        truth = rng.choice([*range(19), 255], (65, 129))
        prediction = np.where(rng.random((65, 129)) < 0.6, truth % 19, rng.integers(0, 19, (65, 129)))
        add_frame(golden, f"ulm_000000_{n:06}", truth, prediction)
    metrics = metrics_of(golden, "--save_labels", golden / "labels")

    settings = CityscapesEvaluation.args
    settings.evalInstLevelScore, settings.quiet, settings.predictionPath = False, True, str(golden / "labels")
    truths = [str(path) for path in sorted(golden.glob("gtFine/val/*/*_labelIds.png"))]
    predictions = [CityscapesEvaluation.getPrediction(settings, path) for path in truths]
    found = CityscapesEvaluation.evaluateImgLists(predictions, truths, settings)
    assert metrics["iou"] == {name: found["classScores"][name] for name in metrics["iou"]}
    assert metrics["category_iou"] == {name: found["categoryScores"][name] for name in metrics["category_iou"]}
    assert metrics["miou"] == pytest.approx(found["averageScoreClasses"], abs=1e-15)
    assert metrics["frames"] == 4


# ---------------------------------------------------------------------------------------------------- maps


def test_the_maps_are_the_golden_prediction_in_label_ids_and_in_cityscapes_colors(golden, capsys):
    assert score(golden, "--save_labels", golden / "new" / "labels", "--save_colors", golden / "colors") == 0
    (label_path,), (color_path,) = (golden / "new" / "labels").iterdir(), (golden / "colors").iterdir()
    assert label_path.name == f"{GOLDEN_FRAME}_predicted_labelIds.png"
    assert color_path.name == f"{GOLDEN_FRAME}_predicted_color.png"
    label_map, color_map = np.asarray(Image.open(label_path)), Image.open(color_path)
    assert (label_map.dtype, label_map.shape) == (np.uint8, (1024, 2048))
    train_ids = np.searchsorted(LABEL_IDS, label_map).astype(np.uint8)
    assert hashlib.sha256(train_ids.tobytes()).hexdigest() == GOLDEN["evaluate"]["prediction_sha256"]
    colors = np.array([id2label[label_id].color for label_id in range(34)], np.uint8)
    assert color_map.mode == "P"
    np.testing.assert_array_equal(np.asarray(color_map.convert("RGB")), colors[label_map])
    assert capsys.readouterr().out.endswith("\nmIoU = 83.87\n")


def test_blank_labels_as_of_cityscapes_test_give_maps_only(tmp_path, capsys):
    add_frame(tmp_path, FRAME, np.full((65, 129), 255), HALF_ROAD)
    maps, metrics = tmp_path / "maps", tmp_path / "m.json"
    for options in ([], ["--json", metrics], ["--save_labels", maps, "--expect", 25]):
        assert "gtFine/val: no pixel" in refusal(postprocess, tmp_path, tmp_path / "r", *options)
    assert (len(list(maps.iterdir())), metrics.exists()) == (1, False)
    assert score(tmp_path, "--save_labels", maps) == 0
    assert "IoU" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- expectations


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
def test_an_expected_miou_passes_up_to_the_bounds_of_the_tolerance(quarter, capsys, expect, tolerance, passed):
    options = ["--tolerance", tolerance] if tolerance != 0.1 else []  # the default
    metrics = metrics_of(quarter, "--expect", expect, *options, status=int(not passed))
    assert metrics["expected"] == {"percent": expect, "tolerance": tolerance, "passed": passed}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("PASS: 25.0000 " if passed else "FAIL: 25.0000 ")
    assert ("docs/troubleshooting.md" in last) != passed


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--expect", "nan", "must be finite"),
        ("--tolerance", "inf", "must be finite"),
        ("--workers", "x", "must be an integer, 1 or more"),
        ("--workers", "0", "must be an integer, 1 or more"),
    ],
)
def test_a_number_that_makes_no_sense_is_wrong_usage(capsys, option, value, words):
    with pytest.raises(SystemExit, match="2"):
        postprocess.main(["data", "r", option, value])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("classes", "word"), [((0, 0), "road:"), ((3, 3), "wall:"), ((3, 4), None)])
def test_results_of_a_model_that_did_not_compute_are_warned_of(tmp_path, capsys, classes, word):
    for n, train_id in enumerate(classes):
        add_frame(tmp_path, f"ulm_000000_{n:06}", ROAD, ROAD + train_id)
    assert score(tmp_path) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "every pixel" in line]
    assert len(warnings) == (1 if word else 0)
    assert all(line.startswith("warning: ") and word in line for line in warnings)


# ---------------------------------------------------------------------------------------------------- reading files


@pytest.mark.parametrize("folder", [".", "device0", "device1_1"])
@pytest.mark.parametrize("kind", ["<f4", "<f2"])
def test_every_layout_of_ais_bench_is_read(quarter, folder, kind):
    logits = np.fromfile(quarter / LOGITS, "<f4").astype(kind)
    (quarter / LOGITS).unlink()
    path = quarter / "r" / folder / Path(LOGITS).name
    path.parent.mkdir(exist_ok=True)
    logits.tofile(path)
    assert metrics_of(quarter)["miou"] == 0.25


@pytest.mark.parametrize("missing", ["_leftImg8bit_1.bin", "_gtFine_labelIds.png", "_leftImg8bit.png"])
def test_frames_that_lack_a_file_are_counted_and_five_are_named(tmp_path, missing):
    frames = [f"ulm_000000_{n:06}" for n in range(7)]
    (tmp_path / "leftImg8bit/val/ulm").mkdir(parents=True)
    for frame in frames:
        add_frame(tmp_path, frame, ROAD, ROAD)
        (tmp_path / f"leftImg8bit/val/ulm/{frame}_leftImg8bit.png").touch()
    for path in tmp_path.rglob(f"*{missing}"):
        if not path.name.startswith(frames[3]):
            path.unlink()
    limit = [] if missing == "_leftImg8bit_1.bin" else ["--limit", 1]  # after labels and images are matched
    message = refusal(postprocess, tmp_path, tmp_path / "r", *limit)
    assert "6 of 7 frames" in message or "6 in all" in message
    assert [frame in message for frame in frames] == [True, True, True, False, True, True, False]


def test_float16_among_float32_logits_is_refused_as_truncated(tmp_path):
    for n in range(2):
        add_frame(tmp_path, f"ulm_000000_{n:06}", np.zeros((65, 129), int), np.zeros((65, 129), int))
    path = tmp_path / "r" / "ulm_000000_000001_leftImg8bit_1.bin"
    logits = np.random.default_rng(0).normal(0, 5, (19, 65, 129)).astype("<f2")  # computed in float16, saved in float32
    path.write_bytes(logits.astype("<f4").tobytes()[: logits.nbytes])
    assert np.isfinite(np.fromfile(path, "<f2")).all()  # the check of NaN and Inf does not find it
    assert refusal(postprocess, tmp_path, tmp_path / "r").endswith(f": {path.name}")


def test_an_empty_image_folder_matches_no_label(quarter):
    (quarter / "leftImg8bit" / "val").mkdir(parents=True)
    assert refusal(postprocess, quarter, quarter / "r").endswith(f"only one of image and label: {FRAME}")


@pytest.mark.parametrize("device", ["device0_0", "device1_1"])
def test_a_frame_found_twice_is_refused_with_both_files_and_the_remedy(quarter, device):
    other = quarter / "r" / device / Path(LOGITS).name
    other.parent.mkdir()
    shutil.copy(quarter / LOGITS, other)
    message = refusal(postprocess, quarter, quarter / "r")
    assert str(quarter / LOGITS) in message and str(other) in message and "--divide_input 1" in message


def test_results_of_another_split_are_warned_of(quarter, capsys):
    (quarter / "r" / "bonn_000000_000000_leftImg8bit_1.bin").touch()
    assert metrics_of(quarter)["miou"] == 0.25
    assert "bonn_000000_000000" in capsys.readouterr().err


def test_label_maps_of_other_frames_are_warned_of(quarter, capsys):
    for name in ("old_predicted_labelIds.png", "notes.png", f"{FRAME}_predicted_labelIds.png"):
        (quarter / "maps").mkdir(exist_ok=True)
        (quarter / "maps" / name).touch()
    assert score(quarter, "--save_labels", quarter / "maps", "--save_colors", quarter / "maps") == 0
    warning = f"warning: {quarter}/maps: has label maps of other frames: old_predicted_labelIds.png\n"
    assert warning in capsys.readouterr().err


def test_the_json_s_folder_is_made_before_and_a_folder_of_its_name_refused(quarter):
    assert score(quarter, "--json", quarter / "new" / "m.json") == 0
    assert (quarter / "new/m.json").is_file()
    for folder, maps in (("new", []), ("maps", ["--save_labels", quarter / "maps"])):
        message = refusal(postprocess, quarter, quarter / "r", "--json", quarter / folder, *maps)
        assert message == f"{quarter}/{folder}: is a folder; expected a file to write"


def test_a_name_in_two_cities_is_refused(quarter):
    shutil.copytree(quarter / "gtFine" / "val" / "ulm", quarter / "gtFine" / "val" / "bonn")
    assert Path(LABEL).name in refusal(postprocess, quarter, quarter / "r")


def test_folders_without_data_are_one_line_and_status_1(quarter):
    assert error_of(SCRIPT, quarter / "none", quarter / "r").startswith(f"{quarter}/none/gtFine/val: no <city>/")
    assert refusal(postprocess, quarter, quarter / "none") == f"{quarter}/none: No such file or directory"


def test_damaged_files_are_counted_and_named(tmp_path):
    frames = [f"ulm_000000_{n:06}" for n in range(6)]
    for frame in frames:
        add_frame(tmp_path, frame, ROAD, ROAD)
    labels = [tmp_path / f"gtFine/val/ulm/{frame}_gtFine_labelIds.png" for frame in frames[:3]]
    logits = [tmp_path / f"r/{frame}_leftImg8bit_1.bin" for frame in frames[3:5]]
    Image.fromarray(np.array([[0, 1, 34, 35]], np.uint8)).save(labels[0])
    Image.new("RGB", (8, 8)).save(labels[1])
    labels[2].write_bytes(labels[2].read_bytes()[:-20])
    logits[0].write_bytes(bytes(4 * 19 * 64 * 128))  # as without ceil_mode
    np.full(19 * 65 * 129, np.nan, "<f4").tofile(logits[1])
    message = refusal(postprocess, tmp_path, tmp_path / "r")
    assert "5 of 6 frames" in message
    words = "label id 35", "found mode RGB, 8 bits", "damaged, too large, or not a PNG: ", "622592 bytes", "NaN or Inf"
    assert all(f"{path}: {word}" in message for path, word in zip([*labels, *logits], words))


def test_float16_logits_that_overflowed_are_refused(quarter):
    np.full(19 * 65 * 129, np.inf, "<f2").tofile(quarter / LOGITS)
    assert f"{quarter / LOGITS}: NaN or Inf" in refusal(postprocess, quarter, quarter / "r")
