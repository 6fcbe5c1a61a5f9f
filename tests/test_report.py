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
AIS_BENCH = {
    "file": "result_bs1_summary.json",
    "date": "2001-09-09",
    "args": ["ais_bench", "--model", "/models/x_bs4.om", "--batchsize", "4", "--device", "1"],
    "NPU_compute_time": {"mean": 91.66, "percentile(99%)": 92.66, "count": 50},
    "throughput": 43.64,
}
INFER = {
    **AIS_BENCH,
    "date": "2026-11-25",
    "NPU_compute_time": {"mean": 4000, "percentile(99%)": 4001, "count": 50},
    "throughput": 0.25,
    "end_to_end_throughput": 0.24,
    "model": "/secret/x.onnx",
    "model_sha256": "0123456789abcdef" * 4,
    "batchsize": 8,
    "provider": "cpu",
    "device": 0,
    "versions": {"onnxruntime": "1.32.0"},
}


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
    record = {"split": "val", "data_dir": str(tmp_path), "result_dir": "result/result_bs1", "summaries": []}
    record["label_maps"] = str(tmp_path / "labels")
    (tmp_path / "m.json").write_text(json.dumps({**record, **postprocess.summarise(frames, confusions)}))
    return tmp_path


def read(folder: Path, name: str = "m.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def change(folder: Path, name: str, **changes: Any) -> Path:
    """Write the metrics again with changes, under another name."""
    (folder / name).write_text(json.dumps({**read(folder), **changes}))
    return folder / name


def make_page(folder: Path, *args: object, metrics: tuple[str, ...] = ("m.json",)) -> Page:
    assert report.main([*metrics, *map(str, args), "--output", "page.html"]) == 0
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


def test_confusions_are_in_a_matrix_and_the_largest_of_the_run_and_of_a_frame_in_lists(folder):
    """Of 512 pixels of the n-th class, n are predicted as the next one."""
    pixels = np.arange(64 * 128).reshape(64, 128)
    truth = pixels // 512
    confusion = add_frame(folder, FRAMES[0], truth, truth + (pixels % 512 < truth))
    frame = postprocess.Frame(FRAMES[0], folder, folder)
    change(folder, "m.json", **postprocess.summarise([frame], [confusion]))
    page = make_page(folder)
    head, *rows = page.tables[1]
    assert head == ["ground truth", *NAMES]
    assert [row[0] for row in rows] == NAMES
    shares = [f"{n / 5.12:.1f}" for n in range(16)]
    assert [rows[n][1 + n + 1] for n in range(16)] == ["", "", "", *shares[3:]]  # those below 0.5 % are left out
    assert not any(rows[n + 1][1 + n] for n in range(16))  # the reverse
    of_run = [f"{shares[n]} % of {NAMES[n]} is predicted as {NAMES[n + 1]}" for n in range(15, 7, -1)]
    of_frame = [f"0.2 % of the pixels: {NAMES[n]} is predicted as {NAMES[n + 1]}" for n in (15, 14, 13)]
    assert f"in percent of a class's pixels {' '.join(of_run)} How the" in page.text
    score = np.mean(postprocess.compute_iou(confusion)[:16])  # without train, which is only predicted
    measure = f"{100 * score:.2f} % mIoU over the classes in the frame's ground truth"
    assert f"{measure}; pixel accuracy 98.54 % {' '.join(of_frame)} image" in page.text


def test_a_published_miou_is_shown_for_500_frames_of_val_only(folder):
    rows = [{"frame": f"{n}", "miou": 0.5, "pixel_accuracy": 0.5} for n in range(500)]
    change(folder, "val.json", per_frame=rows)
    change(folder, "train.json", per_frame=[{**row, "miou": 0.6} for row in rows], split="train")
    page = make_page(folder, metrics=("val.json", "train.json"))
    assert page.text.count(f"published: 47.01 %, {100 * read(folder)['miou'] - 47.01:+.2f} points") == 1
    assert page.text.count("published: ") == 1
    assert page.text.count(" +10.00 ") == 10  # the frames that changed most
    assert "the 500 frames of val: 47.01 %; 47.52 frames/s at batch 1, 43.64 frames/s at batch 4, " in page.text
    assert "Published figures" not in make_page(folder).text


def test_what_ran_and_how_fast_is_what_the_record_says(folder):
    names = ["m.json", "b.json", "c.json"]
    for name, summaries in zip(names, ([INFER], [AIS_BENCH], [])):
        change(folder, name, summaries=summaries)
    page = make_page(folder, metrics=tuple(names))
    ran = "model x.onnx SHA-256 0123456789ab batch size 8 device ONNX Runtime, CPU versions onnxruntime 1.32.0"
    assert f"{ran} date 2026-11-25 results result/result_bs1 b " in page.text
    assert "model x_bs4.om batch size 4 device Ascend, ais_bench, device 1 date 2001-09-09 results" in page.text
    assert "run 3 model unknown results" in page.text
    assert "secret" not in page.source
    head, *rows = page.tables[0]
    assert head[-1] == "with reading and writing, frames/s"
    assert rows == [
        ["b", "4", "43.64", "91.66", "92.66", "-"],
        ["m", "8", "0.25", "4000.00", "4001.00", "0.24"],
    ]


@pytest.mark.parametrize(
    ("summary", "shown"),
    [
        ({"args": ["--model=/m/y.om", "--device=0,1"]}, "y.om batch size 4 device Ascend, ais_bench, device 0,1 "),
        ({"args": []}, "model unknown batch size 4 device Ascend, ais_bench, device 0 "),
        ({"provider": "cann", "device": 3}, "device ONNX Runtime, CANN, device 3 "),
    ],
)
def test_a_run_is_described_by_model_batch_size_and_devices(folder, summary, shown):
    change(folder, "m.json", summaries=[{**AIS_BENCH, **summary}])
    assert shown in make_page(folder).text


def test_the_frames_of_several_devices_add_up(folder):
    figures = (40.0, 400.0, 500.0, 30.0), (16000 / 350, 350.0, 450.0, 31.0)
    summaries = [
        {**AIS_BENCH, "provider": "cuda", "device": n, "throughput": fps, "end_to_end_throughput": end_to_end,
         "NPU_compute_time": {"mean": mean_ms, "percentile(99%)": p99_ms}}
        for n, (fps, mean_ms, p99_ms, end_to_end) in enumerate(figures)
    ]  # fmt: skip
    change(folder, "m.json", summaries=summaries)
    page = make_page(folder)
    assert "batch size 16 device ONNX Runtime, CUDA, device 0, 1 date" in page.text
    assert page.tables[0][1] == ["m", "16", "85.71", "375.00", "500.00", "61.00"]


def test_runs_are_called_by_their_file_and_by_the_path_where_two_share_the_name(folder):
    (folder / "other").mkdir()
    metrics = "m.json", str(change(folder, "metrics_fp16.json")), str(change(folder, "other/m.json"))
    page = make_page(folder, metrics=metrics)
    assert re.findall(r"<h3>(.*)</h3>", page.source)[:3] == ["m.json", "metrics_fp16", metrics[2]]


def test_the_runs_iou_stand_side_by_side_with_the_change_of_each_class(folder):
    metrics = read(folder)
    iou = {**metrics["iou"], "sidewalk": metrics["iou"]["sidewalk"] + 0.01, "sky": metrics["iou"]["sky"] - 0.02}
    change(folder, "b.json", iou=iou | {"road": None}, miou=metrics["miou"] + 0.003)
    page = make_page(folder, metrics=("m.json", "b.json"))
    assert "+0.30 points against m " in page.text
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
    rows = read(folder)["per_frame"]  # of four classes each
    steps = zip(rows, (0.01, -0.02, *[0] * 5))
    changed = [{**row, "iou": {**row["iou"], "sky": row["iou"]["sky"] + 4 * step}} for row, step in steps]
    change(folder, "b.json", per_frame=changed, label_maps=None)
    page = make_page(folder, metrics=("m.json", "b.json"))
    assert {name for name, image in page.images("image").items() if image.size == report.LARGE} == set(FRAMES)
    listed = page.source.split("Changed most in run 2")[1].split("</div>")[0]
    assert re.findall(r'class="(\w+)">(.*?)</b>\s*<a href="#(.*?)">', listed) == [
        ("bad", "-2.00", FRAMES[1]),
        ("good", "+1.00", FRAMES[0]),
    ]
    assert f"{FRAMES[0]} {100 * rows[0]['miou']:.2f}, {100 * rows[0]['miou'] + 1:.2f}" in page.text


def test_large_frames_show_both_predictions_and_what_became_of_each_pixel(folder):
    frame, confusions = FRAMES[6], []
    shutil.copytree(folder / "labels", folder / "labels_b")
    for name in FRAMES:
        path = folder / "labels_b" / f"{name}_predicted_labelIds.png"
        label_path = folder / f"gtFine/val/ulm/{name}_gtFine_labelIds.png"
        label_map, label = (np.asarray(Image.open(file)).copy() for file in (path, label_path))
        if name == frame:  # of 64 x 128, without the 4 rows that are not scored
            label_map[24:26, :30] = 8  # fixed: sidewalk, predicted as road in the first run
            label_map[60:, 100:] = 23  # sky, where nothing is scored
            label_map[:20, 100:] = 11  # broken: sky
            label_map[20:24, 111:113] = 23  # wrong in both: building
            Image.fromarray(label_map).save(path)
        confusions.append(postprocess.count_pixels(label, np.searchsorted(LABEL_IDS, label_map)))
    frames = [postprocess.Frame(name, folder, folder) for name in FRAMES]
    change(folder, "b.json", label_maps=str(folder / "labels_b"), **postprocess.summarise(frames, confusions))
    change(folder, "c.json", label_maps=None)  # and so has no images of its own
    metrics, in_order = ("m.json", "c.json", "b.json"), ("labels", "labels", "labels_b")
    page = make_page(folder, metrics=metrics)
    assert list(page.images("prediction of run 3")) == FRAMES[:1:-1]
    assert not page.images("prediction of run 2")
    assert make_page(folder, "--labels", *in_order, metrics=metrics).images("prediction of run 2")
    assert "not the prediction of these metrics" in refusal(report, *metrics, "--labels", *in_order[::-1])
    drawn = page.images("changes in run 3")[frame].convert("RGB").resize(SIZE, Image.NEAREST)
    places = {"correct": (60, 30), "fixed": (5, 25), "broken": (120, 5), "wrong": (112, 21), "ignored": (127, 63)}
    colors = [drawn.getpixel(place) for place in places.values()]
    assert colors == [(255, 255, 255), (26, 150, 65), (215, 25, 28), (160, 160, 160), (0, 0, 0)]
    shares = [100 * n / (60 * 128) for n in (2 * 30, 20 * 28, 58 * 30 + 4 * 17)]
    assert "changes in run 3: fixed {:.2f} %, broken {:.2f} %, wrong in both {:.2f} %".format(*shares) in page.text


def test_frames_are_ranked_over_the_classes_of_their_ground_truth(folder):
    """By hand: a clean frame of two classes with two stray pixels, and a noisy one of four."""
    clean = np.full((64, 128), ROAD)
    clean[:32] = SKY
    stray = clean.copy()
    stray[0, :2] = 13, 14  # car and truck, which the frame does not have
    noisy = np.repeat([ROAD, SIDEWALK, BUILDING, SKY], 16)[:, None].repeat(128, axis=1)
    noise = noisy.copy()
    noise[:, :32] = SIDEWALK  # a quarter of road, building and sky
    frames = {"clean": (clean, stray), "noisy": (noisy, noise)}
    confusions = [add_frame(folder, frame, *maps) for frame, maps in frames.items()]
    files = [postprocess.Frame(frame, folder, folder) for frame in frames]
    change(folder, "two.json", **postprocess.summarise(files, confusions))
    page = make_page(folder, metrics=("two.json",))
    sky, road = 4094 / 4096, 1
    by_hand = {"noisy": (3 * 0.75 + 2048 / (2048 + 3 * 512)) / 4, "clean": (sky + road) / 2}
    assert list(page.images("image")) == list(by_hand)  # the worst first
    for frame, score in by_hand.items():
        accuracy = f"pixel accuracy {100 * np.mean(np.equal(*frames[frame])):.2f} %"
        assert f"{frame} {100 * score:.2f} % mIoU over the classes in the frame's ground truth; {accuracy}" in page.text
    rows = [row[0] for row in page.tables[0]]
    assert {"car only predicted: 0", "truck only predicted: 0"} <= set(rows) and "road" in rows
    old = read(folder, "two.json")["per_frame"]
    assert [row["miou"] for row in old] == pytest.approx([(sky + road) / 4, by_hand["noisy"]])
    for row in old:
        del row["truth"]
    change(folder, "old.json", **{**read(folder, "two.json"), "per_frame": old})  # a record of an earlier version
    page = make_page(folder, metrics=("old.json",))
    assert list(page.images("image")) == ["clean", "noisy"]
    assert "the frame's ground truth" not in page.text
    runs = [report.read_metrics(folder / name) for name in ("two.json", "old.json")]
    report.join_runs(runs)  # the first one's ground truth is the second one's too
    assert all(len(set(row["scores"])) == 1 for row in runs[0]["per_frame"])


def test_each_class_links_to_what_it_is_confused_with_and_to_its_worst_frames(folder):
    confusion = np.array(read(folder)["confusion_matrix"])
    page = make_page(folder)
    card = page.source.split('id="class-road"')[1].split("</dl>")[0]
    in_fact = [(confusion[n, ROAD] / confusion[:, ROAD].sum(), NAMES[n]) for n in (SIDEWALK, BUILDING)]
    shown = ", ".join(f"{name} {100 * share:.1f} %" for share, name in in_fact)
    assert re.search(r"predicted as</dt><dd>\s*-\s*</dd>", card)
    assert text_of(f">{card.split('in fact</dt>')[1].split('</dd>')[0]}") == shown
    card = page.source.split('id="class-sidewalk"')[1].split("</dl>")[0]
    assert f"road&nbsp;{100 * confusion[1, 0] / confusion[1].sum():.1f}&nbsp;%" in card
    assert re.findall('href="#(.*?)"', card) == FRAMES[:1:-1]  # five, the worst first
    assert {"class-road", "class-sidewalk"} <= set(re.findall('href="#(.*?)"', page.source.split("<table")[1]))
    rows = read(folder)["per_frame"]
    rows[6]["truth"][SIDEWALK] = 5  # of 5285 pixels, below 0.1 %
    change(folder, "m.json", per_frame=rows)
    card = make_page(folder).source.split('id="class-sidewalk"')[1].split("</dl>")[0]
    assert re.findall('href="#(.*?)"', card) == FRAMES[5:0:-1]


def test_frames_are_sorted_from_the_lowest_miou_and_the_first_five_are_large(folder):
    ignored = np.full((64, 128), IGNORED)
    add_frame(folder, "a", ignored, ignored % 19)
    blank = {"frame": "a", "miou": None, "pixel_accuracy": None}
    change(folder, "m.json", per_frame=[blank, *read(folder)["per_frame"]])
    page = make_page(folder)
    for kind in ("image", "ground truth", "prediction", "errors"):
        assert list(page.images(kind)) == [*FRAMES[::-1], "a"]
        assert [image.size == report.LARGE for image in page.images(kind).values()] == [True] * 5 + [False] * 3
    assert list(page.images("overlay")) == FRAMES[:1:-1]


def test_the_histogram_counts_frames_by_miou(folder):
    mious = 0, 0.04999, 0.05, 0.999, 1, None
    rows = [{"frame": f"f{n}", "miou": miou, "pixel_accuracy": miou} for n, miou in enumerate(mious)]
    change(folder, "m.json", per_frame=rows)
    page = make_page(folder)
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
    summary = {**INFER, "provider": HOSTILE, **dict.fromkeys(("model", "model_sha256", "date", "device"), HOSTILE)}
    rows = [{"frame": HOSTILE, "miou": 0, "pixel_accuracy": 0}]
    change(folder, f"{HOSTILE}.json", result_dir=HOSTILE, per_frame=rows, summaries=[summary])
    page = make_page(folder, metrics=(f"{HOSTILE}.json",))
    assert f"ONNX Runtime, {HOSTILE.upper()}, device {HOSTILE}" in page.text
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object"}
    sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert len(sources) == 5
    assert all(source.startswith("data:image/") for source in sources)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_a_link_to_the_script_writes_the_same_page(folder):
    make_page(folder)
    (folder / "link.py").symlink_to(ROOT / SCRIPT)
    run(folder / "link.py", "m.json")
    assert Path("report.html").read_bytes() == Path("page.html").read_bytes()


def test_the_same_inputs_give_the_same_bytes_and_no_clock(folder):
    change(folder, "m.json", summaries=[AIS_BENCH])
    pages = set()
    for name, zone in (("a.html", "UTC"), ("b.html", "WEST12")):
        done = run(SCRIPT, "m.json", "--output", folder / name, env={**os.environ, "TZ": zone})
        pages.add((folder / name).read_bytes())
        assert re.fullmatch(rf"{folder}/{name}: 1 run, 7 frames, \d\.\d MB\n", done.stdout)
    assert len(pages) == 1


# ---------------------------------------------------------------------------------------------------- what is refused


def unfit(folder: Path, capsys: pytest.CaptureFixture) -> str:
    """Make a page of a record whose images do not fit; return the warning, which is the error where --data is given."""
    capsys.readouterr()
    assert not make_page(folder).images("image")
    warning = capsys.readouterr().err
    error = refusal(report, "m.json", "--data", folder, "--output", "other.html")
    assert warning == f"warning: no images: {error}; pass --data and --labels if they are elsewhere now\n"
    assert not Path("other.html").exists()
    return error


def test_missing_files_are_counted_and_named(folder, capsys):
    (folder / "labels" / f"{FRAMES[2]}_predicted_labelIds.png").unlink()
    (folder / "leftImg8bit" / "val" / "ulm" / f"{FRAMES[4]}_leftImg8bit.png").unlink()
    (folder / "gtFine" / "val" / "ulm" / f"{FRAMES[3]}_gtFine_labelIds.png").unlink()
    folders = {4: "leftImg8bit/val", 3: "gtFine/val", 2: "labels"}
    missing = ", ".join(f"{FRAMES[n]} in {folder}/{name}" for n, name in folders.items())
    assert unfit(folder, capsys) == f"files missing: 3: {missing}"


def test_label_maps_with_one_other_pixel_or_of_another_size_are_refused(folder, capsys):
    path = folder / "labels" / f"{FRAMES[5]}_predicted_labelIds.png"
    label_map = np.array(Image.open(path))
    label_map[40, 100] = 23  # one pixel of road as sky
    Image.fromarray(label_map).save(path)
    assert unfit(folder, capsys).startswith(f"{path}: not the prediction of these metrics; ")
    Image.new("L", (32, 16)).save(path)
    assert unfit(folder, capsys) == f"{path}: found (16, 32), expected its label's (64, 128)"


def test_a_record_moved_elsewhere_is_told_where_its_images_are(folder, capsys):
    Path("moved").mkdir()
    for name in ("leftImg8bit", "gtFine", "labels"):
        Path(name).rename(f"moved/{name}")
    assert not make_page(folder).images("image")
    assert f"No such file or directory: '{folder}/leftImg8bit/val'; pass --data and --labels" in capsys.readouterr().err
    assert len(make_page(folder, "--data", "moved", "--labels", "moved/labels").images("image")) == 7
    change(folder, "m.json", data_dir="moved")
    assert refusal(report, "m.json", "--labels", "none").startswith("none: No such file")
    change(folder, "m.json", label_maps=None)
    assert not make_page(folder).images("image")
    assert capsys.readouterr().err == ""
    assert "m.json: scored without --save_labels; pass --labels" in refusal(report, "m.json", "--data", "moved")


def test_runs_of_other_frames_or_ground_truth_are_refused(folder):
    rows, confusion = read(folder)["per_frame"], np.array(read(folder)["confusion_matrix"])
    confusion[0, 0] += 1
    renamed = [{**rows[0], "frame": "other"}, *rows[1:]]
    for changes in ({"per_frame": rows[1:]}, {"per_frame": renamed}, {"confusion_matrix": confusion.tolist()}):
        change(folder, "b.json", **changes)
        assert refusal(report, "m.json", "b.json") == "b.json: of other frames or other ground truth than m.json"


def test_json_that_is_no_record_is_one_line(folder):
    wrong = (
        {"miou": "x"}, {"miou": 10**400}, {"iou": {"road": 1}}, {"confusion_matrix": [[1, 0], [0, 1]]},
        {"per_frame": [{"frame": "f", "miou": "x"}]}, {"expected": {"percent": 47.01}},
        {"data_dir": 7}, {"summaries": 7},
        *({"summaries": [{**INFER, **changes}]} for changes in (
            {"throughput": None}, {"NPU_compute_time": {"mean": None}}, {"args": 7}, {"versions": []},
        )),
    )  # fmt: skip
    contents = [json.dumps({**read(folder), **changes}).encode() for changes in wrong]
    for content in (b"{", b"[]", b"\xff", *contents):
        Path("wrong.json").write_bytes(content)
        assert refusal(report, "wrong.json").startswith("wrong.json: not what intrada_postprocess.py --json wrote: ")


def test_a_record_of_an_earlier_version_says_score_again(folder):
    old = read(folder)
    del old["summaries"]
    Path("m.json").write_text(json.dumps(old))
    assert "score the results again" in refusal(report, "m.json")


def test_the_page_s_folder_is_made_before_and_a_folder_of_its_name_refused(folder):
    assert report.main(["m.json", "--output", "new/page.html"]) == 0
    Path("folder.html").mkdir()
    assert refusal(report, "none.json", "--output", "folder.html").startswith("folder.html: is a folder; ")


def test_a_missing_file_is_one_line_and_status_1_and_wrong_usage_is_2(folder):
    assert error_of(SCRIPT, "none.json").endswith("none.json: No such file or directory")
    before = Path("m.json").read_bytes()
    assert "--output must end in .html" in run(SCRIPT, "m.json", "--output", "m.json", status=2).stderr
    assert Path("m.json").read_bytes() == before
    assert "--labels: 2 given" in run(SCRIPT, "m.json", "--labels", "labels", "labels", status=2).stderr


# ---------------------------------------------------------------------------------------------------- in a browser


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


def set_screen(chromium, width: int, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def make_full_page(folder: Path) -> str:
    """Make a page of two runs with everything in it, and return its address."""
    expected = {"percent": 47.01, "tolerance": 0.1, "passed": False}
    change(folder, "b.json", expected=expected, summaries=[AIS_BENCH])
    change(folder, "m.json", summaries=[INFER])
    make_page(folder, metrics=("m.json", "b.json"))
    return (folder / "page.html").as_uri()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
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
    assert sorted(images) == [report.SMALL[0]] * 2 * 4 + [report.LARGE[0]] * 5 * 7
    assert chromium.execute_script("return document.documentElement.scrollWidth") == width
    beyond = "return [...document.querySelectorAll('body *:not(.wide *)')].filter(e => e.getBoundingClientRect().right"
    assert chromium.execute_script(f"{beyond} > innerWidth).map(e => e.outerHTML.slice(0, 99))") == []
    background = chromium.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) > 384) == (scheme == "light")


def test_in_a_browser_every_link_hits_and_a_click_enlarges_and_closes(folder, chromium):
    chromium.get(make_full_page(folder))
    set_screen(chromium, 1280, "light")
    links = chromium.execute_script("return [...document.links].map(link => decodeURIComponent(link.hash.slice(1)))")
    assert {"runs", "speed", "classes", "confusions", "frames", *FRAMES} <= set(links)
    assert chromium.execute_script("return arguments[0].filter(id => !document.getElementById(id))", links) == []
    panel = chromium.find_elements("css selector", ".zoom img")[7]
    small = panel.rect["width"]
    panel.click()
    assert (panel.rect["x"], panel.rect["width"]) == (0, 1280)
    chromium.find_element("css selector", ".zoom:target + .close").click()
    assert panel.rect["width"] == small < 400
