"""tools/report.py: what the page shows, what is refused, and how a browser displays it."""

from __future__ import annotations

import base64
import html
import html.parser
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import intrada_postprocess as postprocess
from support import LABEL_IDS, ROOT, error_of, refusal, run
from tools import report

SCRIPT = "tools/report.py"
NAMES = report.NAMES
HOSTILE = "<img src=x onerror=alert(1)>&\"'"
LABEL_ID_OF = np.array([*LABEL_IDS, 3], np.uint8)
SIZE = 128, 64  # width, height of the frames
FRAMES = [f"ulm_000000_{n:06}" for n in range(7)]
ROAD, SIDEWALK, BUILDING, SKY, IGNORED = 0, 1, 2, 10, 19
OURS = "x.onnx, batch 1, ONNX Runtime, CPU"


class Page(html.parser.HTMLParser):
    """A page's elements, text and tables."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(self.source)
        self.text = " ".join(self.words)
        rows = (re.findall("<tr>.*?</tr>", table, re.DOTALL) for table in self.source.split("<table")[1:])
        self.tables = [[[text_of(cell) for cell in re.split("<t[hd]", row)[1:]] for row in table] for table in rows]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    def images(self, title: str) -> dict[str, Image.Image]:
        """Decode the images of a kind, by frame."""
        found = {}
        for tag, image in self.elements:
            if tag == "img" and image["alt"].startswith(f"{title} of "):
                content = base64.b64decode(image["src"].split(",")[1])
                found[image["alt"][len(f"{title} of ") :]] = Image.open(io.BytesIO(content))
        return found


def text_of(cell: str) -> str:
    """Return the text of a table's cell, given from its attributes on."""
    return " ".join(html.unescape(re.sub("<[^>]*>|^[^>]*>", " ", cell)).split())


def add_frame(folder: Path, frame: str, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Add the image, label and label map of (64, 128) train ids, and count their pixels."""
    paths = [f"leftImg8bit/val/ulm/{frame}_leftImg8bit.png", f"gtFine/val/ulm/{frame}_gtFine_labelIds.png"]
    paths += [f"labels/{frame}_predicted_labelIds.png"]
    image = Image.effect_noise(SIZE, 60).convert("RGB")
    for name, content in zip(paths, (image, *map(Image.fromarray, (LABEL_ID_OF[truth], LABEL_ID_OF[prediction])))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content.save(folder / name)
    confusion = np.zeros((20, 20), int)
    np.add.at(confusion, (truth, prediction), 1)
    return confusion[:19, :19]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Seven frames of four classes, the n-th with 5 n columns of sidewalk predicted as road; m.json and labels/."""
    monkeypatch.chdir(tmp_path)
    truth = np.full((64, 128), ROAD)
    truth[:, :40] = SIDEWALK
    truth[:20, 40:] = SKY
    truth[20:24, 40:] = BUILDING
    truth[60:] = IGNORED
    confusions = []
    for n, frame in enumerate(FRAMES):
        wrong = (truth == SIDEWALK) & (np.arange(128) < 5 * n) | (truth == BUILDING) & (np.arange(128) > 110)
        confusions.append(add_frame(tmp_path, frame, truth, np.where(wrong, ROAD, truth % 19)))
    frames = [postprocess.Frame(frame, tmp_path, tmp_path) for frame in FRAMES]
    metrics = {"split": "val", "result_dir": "result/result_bs1", **postprocess.summarise(frames, confusions)}
    (tmp_path / "m.json").write_text(json.dumps(metrics))
    return tmp_path


def read(folder: Path, name: str = "m.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def change(folder: Path, name: str, **changes: Any) -> Path:
    """Write the metrics again with changes, under another name."""
    (folder / name).write_text(json.dumps({**read(folder), **changes}))
    return folder / name


def add_summary(path: Path, fps: float = 43.64, mean_ms: float = 91.66, **more: Any) -> Path:
    """Write a summary as ais_bench does, or with `more` as tools/infer.py does."""
    times = {"mean": mean_ms, "percentile(99%)": mean_ms + 1, "count": 50}
    args = ["ais_bench", "--model", "/models/x_bs4.om", "--batchsize", "4", "--device", "1"]
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps({"NPU_compute_time": times, "throughput": fps, "args": args, **more}))
    os.utime(path, (1e9, 1e9))  # 2001-09-09
    return path


def add_infer_summary(path: Path, **more: Any) -> Path:
    ours = {"model": "/secret/x.onnx", "model_sha256": "0123456789abcdef" * 4, "date": "2026-11-25", "batchsize": 1}
    ours |= {"provider": "cpu", "device": 0, "end_to_end_throughput": 0.24, "versions": {"onnxruntime": "1.32.0"}}
    return add_summary(path, 0.25, 4000, **{**ours, **more})


def make_page(folder: Path, *args: object, metrics: tuple[str, ...] = ("m.json",), frames: bool = True) -> Page:
    images = ("--labels", folder / "labels", "--data", folder) if frames else ()
    command = [*(folder / name for name in metrics), *images, *args, "--output", folder / "page.html"]
    assert report.main([str(arg) for arg in command]) == 0
    return Page(folder / "page.html")


# ---------------------------------------------------------------------------------------------------- what is shown


def test_the_page_shows_the_metrics(folder):
    metrics = read(folder)
    expected = {"percent": 47.01, "tolerance": 0.1, "passed": False}
    change(folder, "m.json", expected=expected)
    page = make_page(folder)
    assert f"{100 * metrics['miou']:.2f} % mIoU of 7 frames of val" in page.text
    assert f"expected: 47.01 %, {100 * metrics['miou'] - 47.01:+.2f} points, tolerance 0.1: FAIL" in page.text
    assert f"pixel accuracy {100 * metrics['pixel_accuracy']:.2f} %" in page.text
    change(folder, "m.json", expected={**expected, "passed": True})
    assert "tolerance 0.1: PASS" in make_page(folder).text


def test_the_table_of_classes_begins_with_the_lowest_iou(folder):
    metrics = read(folder)
    confusion = np.array(metrics["confusion_matrix"])
    head, *rows, mean = make_page(folder).tables[0]
    assert head == ["class", "IoU %", "recall %", "precision %", "GT pixels %"]
    iou = {name: value for name, value in metrics["iou"].items() if value is not None}
    assert [row[0] for row in rows][:4] == sorted(iou, key=iou.get)
    assert len(rows) == 19
    sidewalk = next(row for row in rows if row[0] == "sidewalk")
    share = confusion[1].sum() / confusion.sum()
    figures = iou["sidewalk"], confusion[1, 1] / confusion[1].sum(), confusion[1, 1] / confusion[:, 1].sum(), share
    assert sidewalk == ["sidewalk", *(f"{100 * figure:.2f}" for figure in figures)]
    assert rows[-1][1:] == ["-", "-", "-", "0.00"]
    assert mean[:3] == ["mean", f"{100 * metrics['miou']:.2f}", f"{100 * metrics['mean_class_accuracy']:.2f}"]


def test_the_matrix_has_a_row_for_each_class_of_the_ground_truth(folder):
    confusion = np.array(read(folder)["confusion_matrix"])
    page = make_page(folder)
    head, *rows = page.tables[1]
    assert head == ["ground truth", *NAMES]
    assert [row[0] for row in rows] == NAMES
    share = f"{100 * confusion[1, 0] / confusion[1].sum():.1f}"
    assert (rows[1][1 + 0], rows[0][1 + 1]) == (share, "")  # sidewalk predicted as road, and not the reverse
    assert f"{share} % of sidewalk is predicted as road" in page.text
    assert "is predicted as sidewalk" not in page.text


def test_a_published_miou_is_shown_for_500_frames_of_val_only(folder):
    rows = [{"frame": f"{n}", "miou": 0.5} for n in range(500)]
    change(folder, "val.json", per_frame=rows)
    change(folder, "train.json", per_frame=rows, split="train")
    page = make_page(folder, metrics=("val.json", "train.json", "m.json"), frames=False)
    assert page.text.count(f"published: 47.01 %, {100 * read(folder)['miou'] - 47.01:+.2f} points") == 1
    assert page.text.count("published: ") == 1
    assert "the 500 frames of val: 47.01 %; 47.52 frames/s at batch 1, 43.64 frames/s at batch 4, " in page.text
    assert "Published figures" not in make_page(folder, frames=False).text


def test_what_ran_is_read_from_the_summary_of_the_run_s_folder(folder):
    change(folder, "b.json", result_dir="elsewhere/result_bs4/")
    change(folder, "c.json", result_dir="elsewhere/result_bs1")
    ours = add_infer_summary(folder / "result" / "result_bs1_summary.json")
    ais_bench = add_summary(folder / "elsewhere" / "result_bs4_summary.json")
    page = make_page(folder, "--perf", ais_bench, ours, metrics=("m.json", "b.json", "c.json"))
    ran = "model x.onnx SHA-256 0123456789ab batch size 1 device ONNX Runtime, CPU versions onnxruntime 1.32.0"
    assert f"{ran} date 2026-11-25 results result/result_bs1 x_bs4.om, batch 4, Ascend, ais_bench" in page.text
    assert "model x_bs4.om batch size 4 device Ascend, ais_bench, device 1 date 2001-09-09 results" in page.text
    assert "elsewhere/result_bs1, model unknown" in page.text
    assert "secret" not in page.source
    head, *rows = page.tables[0]
    assert head[-1] == "end to end, frames/s"
    assert rows == [
        [OURS, "1", "0.25", "4000.00", "4001.00", "0.24"],
        ["x_bs4.om, batch 4, Ascend, ais_bench, device 1", "4", "43.64", "91.66", "92.66", "-"],
    ]


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"args": ["--model=/m/y.om", "--device=0,1"]}, "y.om, batch 4, Ascend, ais_bench, device 0,1"),
        ({"args": []}, "model unknown, batch 4, Ascend, ais_bench, device 0"),
        ({"provider": "cann", "device": 3}, "x_bs4.om, batch 4, ONNX Runtime, CANN, device 3"),
    ],
)
def test_a_run_is_named_after_its_model_batch_size_and_device(folder, more, name):
    row = make_page(folder, "--perf", add_summary(folder / "result_bs1_summary.json", **more), frames=False).tables[0][
        1
    ]
    assert row[0] == name


def test_a_summary_belongs_to_the_run_of_its_name_also_after_both_were_copied(folder):
    change(folder, "m.json", result_dir="/elsewhere/result/result_bs1")
    summary = add_infer_summary(folder / "copies" / "result_bs1_summary.json")
    assert OURS in make_page(folder, "--perf", summary, frames=False).text


def test_the_summaries_of_devices_add_up(folder):
    paths = [add_summary(folder / f"result_bs1/device{n}_summary.json", fps=40 + n, mean_ms=90 + n) for n in (0, 1)]
    row = make_page(folder, "--perf", *paths, frames=False).tables[0][1]
    assert row[0].endswith(" and 1 more")
    assert row[2:5] == ["81.00", "90.50", "92.00"]


def test_a_device_s_folder_scored_by_itself_has_its_own_summary(folder):
    change(folder, "m.json", result_dir=str(folder / "result_bs1/device0"))
    path = add_summary(folder / "result_bs1/device0_summary.json", fps=40, mean_ms=90)
    assert make_page(folder, "--perf", path, frames=False).tables[0][1][2] == "40.00"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x_summary.json"], "x_summary.json: is the summary of 0 of the runs"),
        (["a/result_bs1_summary.json", "b/result_bs1_summary.json"], "several summaries of one run"),
    ],
)
def test_a_summary_of_no_run_and_a_second_one_are_refused(folder, names, message):
    paths = [add_infer_summary(folder / name) for name in names]
    assert message in refusal(report, folder / "m.json", "--perf", *paths)


def test_a_summary_of_another_model_than_was_scored_is_refused(folder):
    summary = add_infer_summary(folder / "result_bs1_summary.json")
    change(folder, "m.json", model_sha256="0123456789abcdef" * 4)
    make_page(folder, "--perf", summary, frames=False)
    change(folder, "m.json", model_sha256="f" * 64)
    assert "of another model than" in refusal(report, folder / "m.json", "--perf", summary)


def test_runs_of_one_name_are_distinguished_by_folder_and_file(folder):
    paths = folder / "m.json", change(folder, "b.json")
    page = make_page(folder, metrics=("m.json", "b.json"), frames=False)
    names = [f"result/result_bs1, model unknown (result/result_bs1) ({path})" for path in paths]
    assert re.findall(r"<h3>(result/.*)</h3>", page.source) == names


def test_the_runs_iou_stand_side_by_side_with_the_change_of_each_class(folder):
    metrics = read(folder)
    iou = {**metrics["iou"], "sidewalk": metrics["iou"]["sidewalk"] + 0.01, "sky": metrics["iou"]["sky"] - 0.02}
    change(folder, "b.json", result_dir="result/b", iou=iou | {"road": None}, miou=metrics["miou"] + 0.003)
    page = make_page(folder, metrics=("m.json", "b.json"))
    assert "+0.30 points against result/result_bs1, model unknown" in page.text
    head, *rows, mean = page.tables[0]
    assert head[1:5] == ["IoU %, run 1", "IoU %, run 2", "change, points", "recall %"]
    changes = {row[0]: row[2:4] for row in rows}
    assert changes["sidewalk"] == [f"{100 * iou['sidewalk']:.2f}", "+1.00"]
    assert changes["sky"] == [f"{100 * iou['sky']:.2f}", "-2.00"]
    assert (changes["road"], changes["train"], changes["building"][1]) == (["-", "-"], ["-", "-"], "+0.00")
    marked = re.findall(r'<td class="(\w*)">([-+].*?)</td>', page.source)
    assert set(marked) == {("bad", "-2.00"), ("good", "+1.00"), ("", "-"), ("", "+0.00"), ("good", "+0.30")}
    assert mean[3] == "+0.30"


def test_frames_have_their_miou_in_every_run_and_those_that_changed_most_are_linked(folder):
    rows = read(folder)["per_frame"]
    changed = [
        {**row, "miou": row["miou"] + step} for row, step in zip(rows, (0.01, -0.02, 0, 0, 0, 0))
    ]  # one is missing
    change(folder, "b.json", result_dir="result/b", per_frame=changed)
    page = make_page(folder, metrics=("m.json", "b.json"))
    listed = page.source.split("Changed most in run 2")[1].split("</div>")[0]
    assert re.findall(r'class="(\w+)">(.*?)</b>\s*<a href="#(.*?)"', listed) == [
        ("bad", "-2.00", FRAMES[1]),
        ("good", "+1.00", FRAMES[0]),
    ]
    both = f"{FRAMES[0]} {100 * rows[0]['miou']:.2f}, {100 * changed[0]['miou']:.2f}"
    assert both in page.text and f"{FRAMES[6]} {100 * rows[6]['miou']:.2f}, -" in page.text


def test_large_frames_show_the_predictions_of_both_runs_and_where_they_differ(folder):
    shutil.copytree(folder / "labels", folder / "labels_b")
    path = folder / "labels_b" / f"{FRAMES[6]}_predicted_labelIds.png"
    label_map = np.asarray(Image.open(path)).copy()
    label_map[60:, 100:] = 23  # sky, where nothing is scored
    Image.fromarray(label_map).save(path)
    change(folder, "b.json", result_dir="result/b")
    page = make_page(folder, "--labels", folder / "labels_b", metrics=("m.json", "b.json"))
    assert list(page.images("prediction of run 2")) == FRAMES[:1:-1]
    drawn = page.images("changes in run 2")[FRAMES[6]].convert("RGB")
    width, height = drawn.size
    assert drawn.getpixel((width - 1, height - 1)) == (70, 130, 180)
    assert drawn.getpixel((0, 0)) == (255, 255, 255)
    assert len(drawn.getcolors()) == 2
    done = run(SCRIPT, "m.json", *["--labels", folder / "labels"] * 2, "--data", folder, status=2)
    assert "--labels was given more often" in done.stderr


def test_frames_are_sorted_from_the_lowest_miou_and_the_first_five_are_large(folder):
    ignored = np.full((64, 128), IGNORED)
    add_frame(folder, "a", ignored, ignored % 19)
    change(folder, "m.json", per_frame=[{"frame": "a", "miou": None}, *read(folder)["per_frame"]])
    page = make_page(folder)
    for kind in ("image", "ground truth", "prediction", "errors"):
        assert list(page.images(kind)) == [*FRAMES[::-1], "a"]
        assert [image.size == report.LARGE for image in page.images(kind).values()] == [True] * 5 + [False] * 3
    assert list(page.images("overlay")) == FRAMES[:1:-1]


def test_the_histogram_counts_frames_by_miou(folder):
    rows = [{"frame": f"f{n}", "miou": miou} for n, miou in enumerate((0, 0.04999, 0.05, 0.999, 1, None))]
    change(folder, "m.json", per_frame=rows)
    page = make_page(folder, frames=False)
    titles = [attributes["title"] for tag, attributes in page.elements if tag == "a" and "title" in attributes]
    assert (titles[0], titles[1], titles[-1]) == ("0 to 5 %", "5 to 10 %", "95 to 100 %")
    bars = page.source.split('class="histogram"')[1].split("</ol>")[0]
    assert re.findall(r">(\d*)</a>", bars) == ["2", "1", *[""] * 17, "2"]
    assert "f5 -" in page.text


def test_the_panels_show_cityscapes_colors_and_errors_in_the_true_one(folder):
    page = make_page(folder)
    width, height = report.LARGE
    road, sidewalk, sky, black, white = (128, 64, 128), (244, 35, 232), (70, 130, 180), (0, 0, 0), (255, 255, 255)

    def colors_at(kind: str, places: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        image = page.images(kind)[FRAMES[6]].convert("RGB")
        return [image.getpixel((int((x + 0.5) * width / 128), int((y + 0.5) * height / 64))) for x, y in places]

    places = [(5, 30), (35, 30), (80, 5), (80, 30), (80, 63)]  # wrong, correct, correct, correct, not scored
    assert colors_at("ground truth", places) == [sidewalk, sidewalk, sky, road, black]
    assert colors_at("prediction", places[:4]) == [road, sidewalk, sky, road]
    assert colors_at("errors", places) == [sidewalk, white, white, white, black]
    blended = [(np.array(a) + b) / 2 for a, b in zip(colors_at("image", places), colors_at("prediction", places))]
    assert np.abs(np.array(blended) - colors_at("overlay", places)).max() < 60  # JPEG of noise
    assert "of the pixels: sidewalk is predicted as road" in page.text


def test_names_in_files_are_data_and_never_markup(folder):
    add_frame(folder, HOSTILE, np.zeros((64, 128), int), np.ones((64, 128), int))
    change(folder, "m.json", result_dir=HOSTILE, per_frame=[{"frame": HOSTILE, "miou": 0}])
    summary = add_infer_summary(folder / f"{HOSTILE}_summary.json", model=HOSTILE, provider=HOSTILE, date=HOSTILE)
    page = make_page(folder, "--perf", summary)
    assert f"{HOSTILE}, batch 1, ONNX Runtime, {HOSTILE.upper()}, device 0" in page.text
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object"}
    sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert len(sources) == 5
    assert all(source.startswith("data:image/") for source in sources)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_the_same_inputs_give_the_same_bytes_and_no_clock(folder):
    summary = add_summary(folder / "result" / "result_bs1_summary.json")
    pages = set()
    for name, zone in (("a.html", "UTC"), ("b.html", "WEST12")):
        files = folder / "m.json", "--labels", folder / "labels", "--data", folder, "--perf", summary
        done = run(SCRIPT, *files, "--output", folder / name, env={**os.environ, "TZ": zone})
        pages.add((folder / name).read_bytes())
        assert re.fullmatch(rf"{folder}/{name}: 1 run, 7 frames, \d\.\d MB\n", done.stdout)
    assert len(pages) == 1


# ---------------------------------------------------------------------------------------------------- what is refused


def refusal_with_frames(folder: Path) -> str:
    images = "--labels", folder / "labels", "--data", folder
    return refusal(report, folder / "m.json", *images, "--output", folder / "page.html")


def test_missing_files_are_counted_and_named(folder):
    (folder / "labels" / f"{FRAMES[2]}_predicted_labelIds.png").unlink()
    (folder / "leftImg8bit" / "val" / "ulm" / f"{FRAMES[4]}_leftImg8bit.png").unlink()
    (folder / "gtFine" / "val" / "ulm" / f"{FRAMES[3]}_gtFine_labelIds.png").unlink()
    missing = f"image in {folder} of {FRAMES[4]}, label in {folder} of {FRAMES[3]}"
    missing += f", label map in {folder}/labels of {FRAMES[2]}"
    assert refusal_with_frames(folder) == f"files missing: 3: {missing}"


def test_label_maps_of_another_run_or_size_are_refused(folder):
    path = folder / "labels" / f"{FRAMES[5]}_predicted_labelIds.png"
    shutil.copy(folder / "labels" / f"{FRAMES[6]}_predicted_labelIds.png", path)
    assert refusal_with_frames(folder).startswith(f"{path}: not the prediction of these metrics; ")
    Image.new("L", (32, 16)).save(path)
    assert refusal_with_frames(folder) == f"{path}: found (16, 32), expected its label's (64, 128)"


@pytest.mark.parametrize("kind", ["leftImg8bit/val/ulm", "gtFine/val/ulm", "labels"])
def test_a_flipped_bit_in_a_png_is_refused(folder, kind):
    path = next((folder / kind).glob(f"{FRAMES[0]}*"))
    content = bytearray(path.read_bytes())
    content[content.index(b"IEND") - 5] ^= 1  # the checksum of IDAT, which decoding alone does not read
    path.write_bytes(content)
    Image.open(path).load()
    assert refusal_with_frames(folder).startswith(f"{path}: damaged")


def test_json_that_is_no_metrics_or_no_summary_is_one_line(folder):
    add_infer_summary(folder / "s.json")
    for name, args, maker, wrong in (
        ("m.json", (), "intrada_postprocess.py --json", (
            {"miou": "x"}, {"miou": 10**400}, {"iou": {"road": 1}}, {"confusion_matrix": [[1, 0], [0, 1]]},
            {"per_frame": [{"frame": "f", "miou": "x"}]}, {"expected": {"percent": 47.01}},
        )),
        ("s.json", ("m.json", "--perf"), "ais_bench or tools/infer.py", (
            {"throughput": None}, {"NPU_compute_time": {"mean": 1}}, {"args": 7}, {"provider": 7}, {"versions": []},
        )),
    ):  # fmt: skip
        contents = [json.dumps({**read(folder, name), **changes}).encode() for changes in wrong]
        for content in (b"{", b"[]", b"\xff", b"[" * 10**5, *contents):
            (folder / "wrong.json").write_bytes(content)
            assert refusal(report, *args, "wrong.json").startswith(f"wrong.json: not what {maker} wrote: ")


def test_a_missing_file_is_one_line_and_status_1_and_wrong_usage_is_2(folder):
    assert error_of(SCRIPT, "none.json").endswith("none.json: No such file or directory")
    assert "--labels and --data go together" in run(SCRIPT, "m.json", "--labels", "labels", status=2).stderr


# ---------------------------------------------------------------------------------------------------- in a browser

# The texts whose contrast with what is behind them is below WCAG AA: 4.5, or 3 for large text.
LOW_CONTRAST = """
const parse = color => (color.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, n) => sum + v * [.2126, .7152, .0722][n], 0);
const mix = (over, under) => over.slice(0, 3).map((v, n) => v * (over[3] ?? 1) + under[n] * (1 - (over[3] ?? 1)));
const behind = element => element ? mix(parse(getComputedStyle(element).backgroundColor), behind(element.parentElement))
  : [255, 255, 255];
return [...document.querySelectorAll('body *')].filter(element => element.checkVisibility() &&
  [...element.childNodes].some(node => node.nodeType == 3 && node.data.trim())).map(element => {
    const style = getComputedStyle(element), under = behind(element);
    const [low, high] = [light(under), light(mix(parse(style.color), under))].sort((a, b) => a - b);
    return [(high + .05) / (low + .05) / (parseFloat(style.fontSize) >= 24 ? 3 : 4.5), element.outerHTML.slice(0, 99)];
  });
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """Chromium, with its requests and console messages logged; all its files are in a folder of pytest's."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver_path = shutil.which("chromedriver")
    if not (browser and driver_path):
        pytest.skip("no Chromium with chromedriver on PATH; `make browser` installs Debian's")
    from selenium import webdriver

    folder = tmp_path_factory.mktemp("chromium")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in (
        "headless=new hide-scrollbars no-sandbox disable-dev-shm-usage disable-gpu disable-quic no-first-run "
        f"disable-sync disable-background-networking disable-component-update user-data-dir={folder}/profile"
    ).split():
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(driver_path, env={**os.environ, "TMPDIR": str(folder)})
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def set_screen(chromium, width: int, scheme: str, media: str = "screen") -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def make_full_page(folder: Path) -> str:
    """Make a page of two runs with everything in it, and return its address."""
    change(folder, "b.json", result_dir="b", expected={"percent": 47.01, "tolerance": 0.1, "passed": False})
    summaries = add_infer_summary(folder / "result_bs1_summary.json"), add_summary(folder / "b_summary.json")
    make_page(folder, "--perf", *summaries, metrics=("m.json", "b.json"))
    return (folder / "page.html").as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_page_whole_and_requests_nothing_else(folder, chromium, width, scheme):
    address = make_full_page(folder)
    set_screen(chromium, width, scheme)
    for log in ("browser", "performance"):
        chromium.get_log(log)
    chromium.get(address)
    assert chromium.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    urls = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} == {address}
    images = chromium.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth)")
    assert sorted(images) == [report.SMALL[0]] * 2 * 4 + [report.LARGE[0]] * 5 * 5
    assert chromium.execute_script("return document.documentElement.scrollWidth") == width
    beyond = "return [...document.querySelectorAll('body *:not(.wide *)')].filter(e => e.getBoundingClientRect().right"
    assert chromium.execute_script(f"{beyond} > innerWidth).map(e => e.outerHTML.slice(0, 99))") == []
    contrasts = chromium.execute_script(LOW_CONTRAST)
    assert len(contrasts) > 300
    assert [text for ratio, text in contrasts if ratio < 1] == []
    background = chromium.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) > 384) == (scheme == "light")
    set_screen(chromium, 718, scheme, media="print")  # A4 with Chromium's margins
    assert chromium.execute_script("return document.documentElement.scrollWidth") == 718
    assert [text for ratio, text in chromium.execute_script(LOW_CONTRAST) if ratio < 1] == []


def test_in_a_browser_every_link_hits_and_a_click_enlarges_and_closes(folder, chromium):
    chromium.get(make_full_page(folder))
    set_screen(chromium, 1280, "light")
    links = chromium.execute_script("return [...document.links].map(link => decodeURIComponent(link.hash.slice(1)))")
    assert {"runs", "speed", "classes", "confusions", "frames", *FRAMES} <= set(links)
    assert chromium.execute_script("return arguments[0].filter(id => !document.getElementById(id))", links) == []
    panel = "document.querySelectorAll('.zoom img')[7]"
    assert chromium.execute_script(f"return {panel}.getBoundingClientRect().width") < 400
    chromium.execute_script(f"{panel}.scrollIntoView({{block: 'center'}})")
    click_at(chromium, panel)
    box = chromium.execute_script(f"return {panel}.getBoundingClientRect().toJSON()")
    assert (box["left"], box["right"]) == (0, 1280)
    assert chromium.execute_script("return document.elementFromPoint(640, 400).hash") == f"#{FRAMES[5]}"
    click_at(chromium, panel)
    assert chromium.execute_script(f"return {panel}.getBoundingClientRect().width") < 400
    top = chromium.execute_script(f"return document.getElementById('{FRAMES[5]}').getBoundingClientRect().top")
    assert 0 <= top < 450


def click_at(chromium, element: str) -> None:
    """Click on what is displayed at the middle of an element, as a mouse does."""
    box = chromium.execute_script(f"return {element}.getBoundingClientRect().toJSON()")
    place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
    for kind in ("mousePressed", "mouseReleased"):
        chromium.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind, **place})


def test_the_report_s_image_in_the_readme_fits_one_screen():
    path = "docs/report.jpg"
    width, height = Image.open(ROOT / path).size
    assert (1200 <= width <= 1300) and (650 <= height <= 800)
    assert (ROOT / path).stat().st_size < 200_000
