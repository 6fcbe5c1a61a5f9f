"""intrada_report.py: what the page says and shows, what it refuses, and how a browser sees it."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import os
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from cityscapesscripts.helpers.labels import trainId2label
from PIL import Image

import intrada_postprocess as postprocess
import intrada_report as report
from support import ROOT, error_of, refusal, run

SCRIPT = "intrada_report.py"
SVG = "{http://www.w3.org/2000/svg}"
NAMES = report.NAMES
HOSTILE = "<img src=x onerror=alert(1)>&\"'"
LABEL_IDS = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33, 3], np.uint8)
SIZE = 128, 64  # width, height of the frames


class Page(html.parser.HTMLParser):
    """A page's elements and their text, read as a browser would."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    def images(self, title: str) -> dict[str, list[Image.Image]]:
        """Decode the pictures of a kind, by frame, the large one first where there is one."""
        found: dict[str, list[Image.Image]] = {}
        for tag, attributes in self.elements:
            if tag == "img" and attributes["alt"].startswith(f"{title} of "):
                content = base64.b64decode(attributes["src"].split(",")[1])
                found.setdefault(attributes["alt"][len(f"{title} of ") :], []).append(Image.open(io.BytesIO(content)))
        return found


def add_frame(folder: Path, frame: str, truth: np.ndarray | None, prediction: np.ndarray) -> None:
    """Add a picture, a label and logits of (64, 128) train ids, 19 for one that is no class; no label for None."""
    split = "val" if truth is not None else "test"
    paths = {
        kind: folder / kind / split / "ulm" / f"{frame}_{ending}.png"
        for kind, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds"))
    }
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(SIZE, 60).convert("RGB").save(paths["leftImg8bit"])
    if truth is not None:
        Image.fromarray(LABEL_IDS[truth]).save(paths["gtFine"])
    coarse = np.asarray(Image.fromarray(prediction.astype(np.uint8)).resize((129, 65), Image.NEAREST))
    (folder / "r").mkdir(exist_ok=True)
    for output in (0, 1):
        (8 * (np.arange(19)[:, None, None] == coarse)).astype("<f4").tofile(
            folder / "r" / f"{frame}_leftImg8bit_{output}.bin"
        )


@pytest.fixture
def folder(tmp_path) -> Path:
    """Seven frames of four classes, the n-th with 5 n columns of sidewalk called road; labels/ and m.json."""
    for n in range(7):
        truth = np.zeros((64, 128), int)
        truth[:, :40] = 1
        truth[:20, 40:] = 10
        truth[20:24, 40:] = 2
        truth[60:] = 19
        wrong = (truth == 1) & (np.arange(128) < 5 * n) | (truth == 2) & (np.arange(128) > 110)
        prediction = np.where(wrong, 0, truth % 19)
        add_frame(tmp_path, f"ulm_000000_{n:06}", truth, prediction)
    score(tmp_path, "m.json")
    return tmp_path


def score(folder: Path, name: str, *options: object, status: int = 0, labels: str = "labels") -> dict:
    files = folder, folder / "r", "--json", folder / name, "--save_labels", folder / labels
    assert postprocess.main([str(arg) for arg in (*files, *options)]) == status
    return json.loads((folder / name).read_text())


def add_summary(folder: Path, name: str, fps: float, mean_ms: float, **ours: object) -> Path:
    """Add a summary as ais_bench writes it, and what intrada_infer.py adds."""
    times = {"min": mean_ms, "max": mean_ms, "mean": mean_ms, "median": mean_ms, "percentile(99%)": mean_ms + 1}
    args = ["ais_bench", "--model", f"x_{HOSTILE}.om", "--batchsize", "4"]
    content = {"NPU_compute_time": {**times, "count": 50}, "throughput": fps, "args": args, **ours}
    (folder / name).write_text(json.dumps(content))
    return folder / name


def svgs_of(page: Page) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)


def texts_of(svg: ElementTree.Element) -> list[tuple[str, float, float]]:
    """List a chart's texts with their places, x and y in its own units."""
    places = []
    for element in svg.iter(f"{SVG}text"):
        x, y = element.get("x"), element.get("y")
        if x is None:
            x, y = re.search(r"translate\(([-\d.]+) ([-\d.]+)\)", element.get("transform")).groups()
        places.append((element.text, float(x), float(y)))
    return places


def make_page(folder: Path, *args: object, metrics: tuple[str, ...] = ("m.json",)) -> Page:
    files = [folder / name for name in metrics]
    pictures = "--labels", folder / "labels", "--data", folder
    assert report.main([str(arg) for arg in (*files, *pictures, *args, "--output", folder / "page.html")]) == 0
    return Page(folder / "page.html")


def test_the_page_tells_the_figures_of_the_metrics(folder):
    page = make_page(folder)
    metrics = json.loads((folder / "m.json").read_text())
    miou = 100 * metrics["miou"]
    accuracy = 100 * metrics["pixel_accuracy"]
    assert f"m {miou:.2f} % mIoU of 7 frames of val, pixel accuracy {accuracy:.2f} %" in page.text
    assert "published on 310P3, of the 500 frames of val: 47.01 % Classes" in page.text
    assert f"sidewalk {100 * metrics['iou']['sidewalk']:.2f} " in page.text
    confusion = np.array(metrics["confusion_matrix"])
    share = confusion[1, 0] / confusion[1].sum()
    assert f"The largest of m: {100 * share:.0f} % of sidewalk is called road" in page.text
    assert "is called sidewalk" not in page.text  # nothing is
    assert "does not occur" in page.text  # the other classes, in the chart


def test_the_charts_begin_with_the_worst_class_and_hold_the_matrix_by_rows_of_truth(folder):
    metrics = json.loads((folder / "m.json").read_text())
    classes, confusion = (ElementTree.fromstring(svg) for svg in svgs_of(make_page(folder)))
    heights = {text: y for text, _, y in texts_of(classes)}
    iou = {name: value for name, value in metrics["iou"].items() if value is not None}
    assert sorted(iou, key=heights.get) == sorted(iou, key=iou.get)
    assert [heights[f"{100 * value:.1f}"] for value in iou.values()] == pytest.approx(
        [heights[name] for name in iou], abs=4
    )
    bars = [path.get("style") for path in classes.iter(f"{SVG}path") if "fill: #" in (path.get("style") or "")]
    colours = [re.search("#......", bar)[0] for bar in bars]
    assert colours == [report.BAR] * (len(colours) - 3) + [report.WORST_BAR] * 3  # drawn from below
    assert len(iou) == 4

    cells = {text: (x, y) for text, x, y in texts_of(confusion)}
    matrix = np.array(metrics["confusion_matrix"])
    x, y = cells[f"{100 * matrix[1, 0] / matrix[1].sum():.0f}"]  # sidewalk called road
    rows, columns = ({name: [p for t, *p in texts_of(confusion) if t == name] for name in NAMES} for _ in range(2))
    assert y == pytest.approx(max(y for x, y in rows["sidewalk"] if x < 100), abs=6)
    assert x == pytest.approx(min((x for x, y in columns["road"] if y > 400), default=0), abs=8)


def test_a_published_figure_is_compared_with_500_frames_of_val_alone(folder):
    metrics = json.loads((folder / "m.json").read_text())
    (folder / "val.json").write_text(json.dumps({**metrics, "frames": 500}))
    (folder / "train.json").write_text(json.dumps({**metrics, "frames": 500, "split": "train"}))
    run(SCRIPT, folder / "val.json", folder / "train.json", "--output", folder / "page.html")
    points = f"47.01 %, {100 * metrics['miou'] - 47.01:+.2f} points"
    assert Page(folder / "page.html").text.count(points) == 1


def test_runs_of_one_name_are_told_apart_by_their_paths(folder):
    (folder / "b").mkdir()
    shutil.copy(folder / "m.json", folder / "b" / "m.json")
    page = make_page(folder, metrics=("m.json", "b/m.json"))
    assert f"{folder}/b/m.json {100 * json.loads((folder / 'm.json').read_text())['miou']:.2f} %" in page.text


def test_a_run_without_metrics_stands_beside_one_with_them(folder):
    metrics = json.loads((folder / "m.json").read_text())
    empty = {**metrics, "miou": None, "pixel_accuracy": None, "iou": dict.fromkeys(metrics["iou"])}
    (folder / "empty.json").write_text(json.dumps({**empty, "confusion_matrix": [[0] * 19] * 19}))
    for names in (["m.json", "empty.json"], ["empty.json", "m.json"]):
        run(SCRIPT, *[folder / name for name in names], "--output", folder / "page.html")
        page = Page(folder / "page.html")
        assert "no mIoU 7 frames, and no pixel of the split has a class." in page.text
        assert "The largest of m: " in page.text
        assert not {text for text, *_ in texts_of(ElementTree.fromstring(svgs_of(page)[0]))} & {"o", "|"}


def test_label_maps_of_another_run_are_refused(folder):
    path = folder / "labels" / "ulm_000000_000005_predicted_labelIds.png"
    shutil.copy(folder / "labels" / "ulm_000000_000006_predicted_labelIds.png", path)
    options = "--labels", folder / "labels", "--data", folder, "--output", folder / "page.html"
    assert refusal(report, folder / "m.json", *options) == (
        f"{path}: not the prediction that the metrics are of; --labels of another run?"
    )


def test_the_worst_frames_come_first_and_every_frame_has_its_line(folder):
    page = make_page(folder)
    frames = [f"ulm_000000_{n:06}" for n in range(7)]
    order = re.findall(r"ulm_\d{6}_\d{6}", re.sub(r"alt=\"[^\"]*\"", "", page.text.split("The lowest mIoU")[1]))
    assert order == [*frames[:1:-1], *frames]
    for kind in ("picture", "truth", "prediction", "errors"):
        assert {frame: len(images) for frame, images in page.images(kind).items()} == {
            frame: 1 + (n >= 2) for n, frame in enumerate(frames)
        }


def test_the_pictures_show_labels_in_cityscapes_colours_and_errors_in_the_true_one(folder):
    page = make_page(folder)
    frame = "ulm_000000_000006"
    road, sidewalk, sky = (128, 64, 128), (244, 35, 232), (70, 130, 180)
    width, height = report.LARGE

    def colour_at(kind: str, x: int, y: int) -> tuple[int, int, int]:
        """Look the colour of a frame's pixel up in its large picture."""
        image = page.images(kind)[frame][0]
        assert image.size == report.LARGE
        return image.convert("RGB").getpixel((int((x + 0.5) * width / SIZE[0]), int((y + 0.5) * height / SIZE[1])))

    places = [(5, 30), (35, 30), (80, 5), (80, 30), (80, 63)]  # wrong, right, right, right, not scored
    assert [colour_at("truth", *place) for place in places] == [sidewalk, sidewalk, sky, road, (0, 0, 0)]
    assert [colour_at("prediction", *place) for place in places[:4]] == [road, sidewalk, sky, road]
    white = 255, 255, 255
    assert [colour_at("errors", *place) for place in places] == [sidewalk, white, white, white, (0, 0, 0)]


def test_the_palette_is_cityscapes_own():
    for n, (label_id, name, colour) in enumerate(report.CLASSES):
        label = trainId2label[n]
        assert (label.id, label.name) == (label_id, name)
        assert label.color == tuple(bytes.fromhex(colour[1:]))


def test_several_runs_stand_side_by_side_with_baseline_expectation_and_speed(folder):
    (folder / "r").rename(folder / "baseline")
    shutil.copytree(folder / "baseline", folder / "r")
    for output in (0, 1):
        shutil.copy(
            folder / "r" / f"ulm_000000_000006_leftImg8bit_{output}.bin",
            folder / "r" / f"ulm_000000_000000_leftImg8bit_{output}.bin",
        )
    changed = score(
        folder, "changed.json", "--baseline", folder / "baseline", "--expect", 47.01, status=1, labels="other"
    )
    ais = add_summary(folder, "perf_bs4_summary.json", 43.64, 91.66)
    ours = add_summary(
        folder, "perf_bs1_summary.json", 0.25, 4000, batchsize=1, end_to_end_throughput=0.24, provider="cpu",
        versions={"onnxruntime": "1.32.0"}, model="/m/x.onnx",
    )  # fmt: skip
    page = make_page(folder, "--perf", ais, ours, metrics=("m.json", "changed.json"))
    for name in ("m", "changed"):
        metrics = json.loads((folder / f"{name}.json").read_text())
        assert f"{name} {100 * metrics['miou']:.2f} % mIoU of 7 frames of val" in page.text
    assert f"expected: 47.01 %, {100 * changed['miou'] - 47.01:+.2f} points, at most 0.1 allowed: FAIL" in page.text
    assert page.text.count("FAIL") == 3  # expectation and baseline on the card, baseline in its chapter
    miou = changed["baseline"]["miou"]
    assert f"baseline: {100 * miou:.2f} %, {100 * (changed['miou'] - miou):+.2f} points" in page.text
    agreement = changed["baseline"]["agreement"]
    assert f"like the baseline's: FAIL labels like the baseline's: {100 * agreement:.2f} % of the pixels" in page.text
    assert f"changed against {folder}/baseline" in page.text
    assert "colour m changed Classes" not in page.text
    assert "in another colour m changed " in page.text  # the chart's legend
    change = changed["baseline"]["iou_change"]["sidewalk"]
    assert f"{100 * change:+.2f}" in page.text.split("sidewalk")[2]
    cosine = changed["baseline"]["outputs"][1]["cosine"]["worst"]
    assert f"output 1, cosine {cosine:.6f}" in page.text
    assert f"{100 * changed['baseline']['least_agreeing'][0]['agreement']:.2f} %: ulm_000000_000000" in page.text
    speed = page.text.split("Speed")[1]
    assert "perf_bs1_summary 1 0.25 4000.00 4001.00 0.24 47.52 perf_bs4_summary 4 43.64 91.66 92.66 - 43.64" in speed
    assert "perf_bs1_summary: /m/x.onnx, cpu, onnxruntime 1.32.0" in page.text
    assert f"perf_bs4_summary: x_{HOSTILE}.om, Ascend, by ais_bench, versions unknown" in page.text


def test_names_in_files_are_data_and_never_markup(folder):
    frame = f"{HOSTILE}_000000_000000"
    add_frame(folder, frame, np.zeros((64, 128), int), np.ones((64, 128), int))
    (folder / HOSTILE).mkdir()
    (folder / "r").rename(folder / HOSTILE / "r")
    (folder / "r").symlink_to(folder / HOSTILE / "r")
    files = folder, folder / HOSTILE / "r", "--json", folder / f"{HOSTILE}.json", "--save_labels", folder / "labels"
    run("intrada_postprocess.py", *files, "--baseline", folder / HOSTILE / "r")
    page = make_page(
        folder, "--perf", add_summary(folder, f"{HOSTILE}_summary.json", 1, 1), metrics=(f"{HOSTILE}.json",)
    )
    assert f"{HOSTILE} against {folder}/{HOSTILE}/r" in page.text
    assert f"0.00 % {frame}" in page.text
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "a"}
    sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert len(sources) == 4 * (8 + 5)
    assert all(source.startswith("data:image/") for source in sources)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_a_split_without_labels_is_shown_without_metrics(tmp_path):
    add_frame(tmp_path, "ulm_000000_000000", None, np.zeros((64, 128), int))
    score(tmp_path, "m.json", "--split", "test")
    page = make_page(tmp_path)
    assert "no mIoU 1 frames, and no pixel of the split has a class." in page.text
    assert "Confusions" not in page.text
    assert (list(page.images("picture")), list(page.images("truth"))) == (["ulm_000000_000000"], [])
    assert page.images("prediction")["ulm_000000_000000"][0].convert("RGB").getpixel((0, 0)) == (128, 64, 128)


def test_the_metrics_alone_make_a_page_the_same_each_time(folder):
    pages = set()
    for name in ("a.html", "b.html"):
        done = run(SCRIPT, folder / "m.json", "--output", folder / name)
        pages.add((folder / name).read_bytes())
        assert re.fullmatch(rf"{folder}/{name}: 1 run, 0 frames, 0\.\d MB\n", done.stdout)
    assert len(pages) == 1
    assert "img" not in [tag for tag, _ in Page(folder / "a.html").elements]


def test_files_that_are_missing_are_counted_and_named(folder):
    (folder / "labels" / "ulm_000000_000002_predicted_labelIds.png").unlink()
    (folder / "leftImg8bit" / "val" / "ulm" / "ulm_000000_000004_leftImg8bit.png").unlink()
    (folder / "gtFine" / "val" / "ulm" / "ulm_000000_000003_gtFine_labelIds.png").unlink()
    options = "--labels", folder / "labels", "--data", folder, "--output", folder / "page.html"
    assert error_of(SCRIPT, folder / "m.json", *options) == (
        f"3 files are not in {folder} and {folder}/labels: label map of ulm_000000_000002, "
        "label of ulm_000000_000003, picture of ulm_000000_000004"
    )
    assert not (folder / "page.html").exists()


def test_a_label_map_of_another_size_or_kind_is_told(folder):
    path = folder / "labels" / "ulm_000000_000002_predicted_labelIds.png"
    options = "--labels", folder / "labels", "--data", folder, "--output", folder / "page.html"
    Image.new("L", (32, 16)).save(path)
    assert refusal(report, folder / "m.json", *options) == (
        f"{path}: (16, 32), its label (64, 128); of another data set?"
    )
    Image.new("RGB", (32, 16)).save(path)
    assert refusal(report, folder / "m.json", *options).startswith(f"{path}: found mode RGB, expected L")
    path.write_bytes(path.read_bytes()[:50])
    assert refusal(report, folder / "m.json", *options).startswith(f"{path}: not a whole PNG: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON: "),
        ("[]", "no split, result_dir, frames, miou, iou, ... in it; expected what intrada_postprocess.py --json"),
        ("{}", "no split, result_dir, frames, miou, iou, ... in it; expected what intrada_postprocess.py --json"),
    ],
)
def test_what_are_no_metrics_is_told(tmp_path, content, message):
    (tmp_path / "m.json").write_text(content)
    assert refusal(report, tmp_path / "m.json").startswith(f"{tmp_path}/m.json: {message}")


def test_metrics_of_other_classes_and_what_is_no_summary_are_told(folder):
    metrics = json.loads((folder / "m.json").read_text())
    (folder / "other.json").write_text(json.dumps({**metrics, "iou": {"road": 1}}))
    message = f"{folder}/other.json: other classes than Cityscapes' 19"
    assert refusal(report, folder / "other.json").startswith(message)
    assert refusal(report, folder / "m.json", "--perf", folder / "m.json").startswith(
        f"{folder}/m.json: no NPU_compute_time, throughput in it; expected what ais_bench or intrada_infer.py wrote"
    )


@pytest.mark.parametrize("times", [{}, {"mean": float("nan"), "percentile(99%)": 1}, 3])
def test_a_summary_that_is_not_whole_is_told(folder, times):
    (folder / "s.json").write_text(json.dumps({"NPU_compute_time": times, "throughput": 1}))
    message = refusal(report, folder / "m.json", "--perf", folder / "s.json")
    assert message.startswith(f"{folder}/s.json: not a whole summary: ")


def test_a_name_that_is_no_text_is_shown_as_far_as_it_can_be(folder):
    shutil.copy(folder / "m.json", os.fsencode(folder) + b"/\xff.json")
    run(SCRIPT, os.fsdecode(os.fsencode(folder) + b"/\xff.json"), "--output", folder / "page.html")
    miou = 100 * json.loads((folder / "m.json").read_text())["miou"]
    assert f"? {miou:.2f} % mIoU" in Page(folder / "page.html").text


def test_a_folder_for_the_page_that_is_not_there_is_told_before_anything_runs(folder):
    assert (
        "--output /no/p.html: no such folder"
        in run(SCRIPT, folder / "m.json", "--output", "/no/p.html", status=2).stderr
    )


def test_labels_without_data_are_wrong_usage(folder):
    done = run(SCRIPT, folder / "m.json", "--labels", folder / "labels", status=2)
    assert "--labels and --data go together" in done.stderr


# ---------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium():
    """Chromium, driven over its own protocol, with everything that it asks for and complains of on record."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver_path = shutil.which("chromedriver")
    if not (browser and driver_path):
        pytest.skip("no Chromium with chromedriver on PATH; `make browser` installs Debian's")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    yield driver
    driver.quit()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_page_whole_and_asks_for_nothing_else(folder, chromium, width, scheme):
    score(folder, "same.json", "--baseline", folder / "r", "--expect", 47.01, status=1)
    make_page(folder, "--perf", add_summary(folder, "perf.json", 43.64, 91.66), metrics=("m.json", "same.json"))
    page = folder / "page.html"
    scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme_feature]})
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    for log in ("browser", "performance"):
        chromium.get_log(log)
    chromium.get(page.as_uri())

    assert chromium.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    urls = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} == {page.as_uri()}
    images = chromium.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth)")
    assert len(images) == 4 * (7 + 5)
    assert set(images) == {report.SMALL[0], report.LARGE[0]}
    beyond = "return [...document.querySelectorAll('body *:not(.wide *)')].filter(e => e.getBoundingClientRect().right"
    assert chromium.execute_script(f"{beyond} > innerWidth).map(e => e.outerHTML.slice(0, 99))") == []
    assert chromium.execute_script("return document.documentElement.scrollWidth") == width
    background = chromium.execute_script("return getComputedStyle(document.body).backgroundColor")
    ink = chromium.execute_script("return getComputedStyle(document.querySelector('svg text')).fill")
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (background, ink)]
    assert (brightness[0] > brightness[1]) == (scheme == "light")

    paper = {"media": "print", "features": [scheme_feature]}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", paper)
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**screen, "width": 718})  # A4, by default's margins
    assert chromium.execute_script("return document.documentElement.scrollWidth") == 718
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen", "features": [scheme_feature]})
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    height = chromium.execute_script("return document.documentElement.scrollHeight")
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**screen, "height": height})
    screenshot = Image.open(io.BytesIO(base64.b64decode(chromium.get_screenshot_as_base64())))
    assert screenshot.size == (width, height)
    assert len(screenshot.convert("RGB").getcolors(1 << 24)) > 300  # of a page that is not blank


def test_the_report_s_picture_in_the_readme_is_there():
    (path,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert Image.open(ROOT / path).size[0] >= 1000
