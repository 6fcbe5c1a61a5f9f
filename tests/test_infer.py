"""tools/infer.py against ais_bench's rules, with a model small enough to compute by hand."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import intrada_postprocess
import tools.infer as tool
from support import error_of, run, save_frames, save_small_model

SCRIPT = "tools/infer.py"
FRAMES = ["ulm_10", "ulm_8", "ulm_9"]  # sorted plainly
RUN = "--model", "x.onnx", "--input", "prep", "--output", "result", "--output_dirname", "r"
AZURE = "AzureExecutionProvider"
NOTE, SUMMARY = Path("result/r_model.json"), Path("result/r_summary.json")


@pytest.fixture
def images(tmp_path, monkeypatch) -> list[np.ndarray]:
    """x.onnx and prep/ with three frames in the current folder; the frames' contents."""
    monkeypatch.chdir(tmp_path)
    save_small_model(Path("x.onnx"))
    return save_frames(Path("prep"), FRAMES)


def infer(*args: object) -> str:
    """Infer prep into result/r in this process; return what is printed, or the message of an InputError."""
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            tool.main([*RUN, *map(str, args)])
        return printed.getvalue()
    except tool.InputError as error:
        return str(error)


def result_of(frame: str, output: int) -> Path:
    return Path("result/r", f"{frame}_leftImg8bit_{output}.bin")


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def expected(weights: np.ndarray, images: list[np.ndarray]) -> dict[str, bytes]:
    """Compute the results by hand: every eighth pixel, and zeros beyond the last ones."""
    points = [np.pad(image, ((0, 0), (0, 1), (0, 1)))[:, ::8, ::8] for image in images]
    return {
        result_of(frame, i).name: np.tensordot(weights[i], image, 1).astype("<f4").tobytes()
        for frame, image in zip(FRAMES, points)
        for i in (0, 1)
    }


@pytest.mark.parametrize("batch", [2, 4])
def test_every_frame_gets_its_own_outputs_at_a_fixed_batch(images, batch):
    weights = save_small_model(Path("x.onnx"), batch)  # as an .om has
    assert "failed at --batchsize 1: " in infer()
    infer("--batchsize", batch)
    assert contents("result/r") == expected(weights, images)


def test_the_summary_has_the_figures_and_what_ran_and_the_note_the_digests(images):
    start = time.perf_counter()
    printed = infer("--batchsize", 2, "--loop", 3)
    elapsed_s = time.perf_counter() - start
    summary, note = json.loads(SUMMARY.read_text()), json.loads(NOTE.read_text())
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    listed = "".join(f"{frame}_leftImg8bit.bin {digest}\n" for frame, digest in zip(FRAMES, digests))
    assert note == {
        "model_sha256": hashlib.sha256(Path("x.onnx").read_bytes()).hexdigest(),
        "provider": "cpu",
        "inputs_sha256": hashlib.sha256(listed.encode()).hexdigest(),
    }
    assert note.items() <= summary.items()
    assert summary["NPU_compute_time"]["count"] == 2 * 3
    assert summary["throughput"] == pytest.approx(2000 / summary["NPU_compute_time"]["mean"])
    assert 3 * 3 / elapsed_s < summary["end_to_end_throughput"] < summary["throughput"]
    assert (summary["batchsize"], summary["device"], Path(summary["model"])) == (2, 0, Path("x.onnx").resolve())
    assert summary["versions"]["onnxruntime"] == onnxruntime.__version__
    speeds = f"{summary['throughput']:.2f} frames/s (model), {summary['end_to_end_throughput']:.2f} ("
    assert printed.startswith(f"provider cpu, frames: 3 (3 inferred, 0 kept), {speeds}")


def test_the_times_are_those_of_ais_bench_s_summary():
    args = tool.parse_args(["--model", "x.onnx"])
    times_ms = [*range(100), 1110]
    expected = {"min": 0, "max": 1110, "mean": 60, "median": 50, "percentile(99%)": 99, "count": 101}
    assert tool.summarise([tool.ZEROS], times_ms, 1, args)["NPU_compute_time"] == expected


def test_results_are_as_closed_as_ais_bench_requires_whatever_the_umask(images):
    run(SCRIPT, *RUN, umask=0o002)
    made = "result", "result/r", NOTE, SUMMARY, result_of("ulm_8", 1)
    assert [oct(Path(path).stat().st_mode & 0o777) for path in made] == ["0o750"] * 2 + ["0o640"] * 3


# ---------------------------------------------------------------------------------------------------- resuming


def test_another_batch_size_or_path_of_the_same_bytes_changes_nothing(images):
    infer()
    before = contents("result")
    Path("prep").rename("other")
    Path("x.onnx").rename("y.onnx")
    assert "(0 inferred, 3 kept), in result/r" in infer("--model", "y.onnx", "--input", "other", "--batchsize", 2)
    assert contents("result") == before


def test_only_frames_that_lack_an_output_are_inferred_again(images):
    infer()
    before = contents("result/r")
    result_of("ulm_8", 0).unlink()
    result_of("ulm_9", 1).write_bytes(b"kept")
    assert "(1 inferred, 2 kept)" in infer()
    assert contents("result/r") == {**before, result_of("ulm_9", 1).name: b"kept"}
    assert json.loads(SUMMARY.read_text())["NPU_compute_time"]["count"] == 1


@pytest.mark.parametrize("summary", [None, "", "[]"])
def test_without_a_whole_summary_as_after_a_kill_the_last_group_is_inferred_again(images, summary):
    infer()
    before = contents("result/r")
    SUMMARY.unlink() if summary is None else SUMMARY.write_text(summary)
    assert "(2 inferred, 1 kept)" in infer("--batchsize", 2)
    assert json.loads(SUMMARY.read_text())["throughput"] > 0
    assert contents("result/r") == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: save_small_model(Path("x.onnx"), seed=1), "another model; "),
        (lambda: Path("prep/ulm_9_leftImg8bit.bin").rename("prep/ulm_7_leftImg8bit.bin"), "another input; "),
        (lambda: NOTE.write_text(NOTE.read_text().replace("cpu", "cuda")), "another provider; "),
        (lambda: NOTE.unlink(), "unknown origin; "),
        (lambda: NOTE.write_text("{"), "unknown origin; "),
        (lambda: SUMMARY.write_text('{"throughput": 1.0}'), "ais_bench or "),  # which has written over the results
    ],
)
def test_results_of_something_else_are_refused_unless_overwritten(images, change: Callable[[], object], words):
    infer()
    change()
    before = contents("result")
    message = infer()
    assert message.startswith("result/r: holds results of ")
    assert all(part in message for part in (words, "--output_dirname", "--overwrite"))
    assert contents("result") == before
    assert "(3 inferred, 0 kept)" in infer("--overwrite")
    assert "(0 inferred, 3 kept)" in infer()


def test_an_interrupted_overwrite_leaves_only_results_that_the_note_names(images):
    """A folder in a file's place stops it as a kill at that moment does."""
    infer()
    old_note = NOTE.read_text()
    weights = save_small_model(Path("x.onnx"), seed=1)
    obstacle = result_of("ulm_9", 1)  # cannot be removed
    obstacle.unlink()
    obstacle.mkdir()
    with pytest.raises(OSError, match=obstacle.name):
        infer("--overwrite")
    assert (NOTE.read_text(), SUMMARY.exists(), contents("result/r")) == (old_note, False, {})
    obstacle.rmdir()
    obstacle = obstacle.with_name("ulm_9_leftImg8bit_0.bin.part")  # cannot be written
    obstacle.mkdir()
    with pytest.raises(OSError, match=obstacle.stem):
        infer("--overwrite")
    new = expected(weights, images)
    assert contents("result/r") == {name: new[name] for name in new if not name.startswith("ulm_9")}
    assert json.loads(NOTE.read_text())["model_sha256"] == hashlib.sha256(Path("x.onnx").read_bytes()).hexdigest()
    obstacle.rmdir()
    assert "(1 inferred, 2 kept)" in infer()
    assert contents("result/r") == new


# ---------------------------------------------------------------------------------------------------- options


def test_zeros_are_timed_as_often_as_loop_requires_and_their_logits_are_not_saved(images, capsys):
    for loop in (5, 2):  # never kept
        options = "--output", "perf", "--output_dirname", "bs4", "--batchsize", "4", "--loop", str(loop)
        tool.main(["--model", "x.onnx", *options])
        assert f"runs on zeros: {loop}, " in capsys.readouterr().out
        assert [path.name for path in Path("perf").iterdir()] == ["bs4_summary.json"]
        summary = json.loads(Path("perf/bs4_summary.json").read_text())
        assert summary["NPU_compute_time"]["count"] == loop


def test_without_output_nothing_is_saved_and_without_a_name_the_folder_is_dated(images):
    tool.main(["--model", "x.onnx", "--input", "prep"])
    assert sorted(path.name for path in Path().iterdir()) == ["prep", "x.onnx"]
    tool.main(["--model", "x.onnx", "--input", "prep", "--output", "result"])
    folder, note, summary = sorted(Path("result").iterdir())
    assert re.fullmatch(r"\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d", folder.name)
    assert (note.name, summary.name) == (f"{folder.name}_model.json", f"{folder.name}_summary.json")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "prep/ulm_8_leftImg8bit.bin"], "prep/ulm_8_leftImg8bit.bin: --provider cpu cannot run it: "),
        (["--model", "one.onnx"], "one.onnx: has image tensor(float) ['batch', 3, 512, 1024], output_0 "),
        (["--model", "swapped.onnx"], "float) ['batch', 19, 65, 129], output_0 tensor"),
        (["--model", "external.onnx"], "external.onnx: has weights in another file; "),
        (["--input", "wrong"], "wrong: 2 of 3 files are not 6291456 bytes: cut.bin, long.bin"),
        pytest.param(["--provider", "azure"], "--provider azure cannot run it: ", marks=pytest.mark.skipif(
            AZURE not in onnxruntime.get_available_providers(), reason="needs a provider that leaves all to the CPU")),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name_before_anything_is_written(images, monkeypatch, args, words):
    monkeypatch.setitem(tool.PROVIDERS, "azure", AZURE)  # not offered, but it leaves all to the CPU
    onnx.save(onnx.load("x.onnx"), "external.onnx", save_as_external_data=True, size_threshold=0)
    model = onnx.load("x.onnx")
    model.graph.output.append(model.graph.output.pop(0))
    onnx.save(model, "swapped.onnx")
    del model.graph.output[0]
    onnx.save(model, "one.onnx")
    Path("wrong").mkdir()
    for name, size in {"cut": 6291452, "right": 6291456, "long": 6291460, ".hidden": 1}.items():
        with Path(f"wrong/{name}.bin").open("wb") as file:
            file.truncate(size)
    assert words in infer(*args)
    assert not Path("result").exists()


@pytest.mark.parametrize(("provider", "settings"), [("cann", {"device_id": "3"}), ("openvino", {})])
def test_only_devices_get_a_warm_up_and_only_some_a_device_id(images, monkeypatch, provider, settings):
    def show(*_: object, providers: list) -> None:
        raise RuntimeError(providers)

    monkeypatch.setitem(tool.PROVIDERS, provider, "X")
    monkeypatch.setattr(onnxruntime, "InferenceSession", show)  # no build has both
    assert infer("--provider", provider, "--device", 3).endswith(f" cannot run it: {[('X', settings)]}")
    warmups = [tool.parse_args([*RUN, "--provider", name]).warmup_count for name in ("cpu", provider)]
    assert warmups == [0, 1]


def test_a_missing_model_and_a_batch_beyond_memory_are_one_line(images):
    assert "none.onnx" in error_of(SCRIPT, "--model", "none.onnx")
    message = error_of(SCRIPT, "--model", "x.onnx", "--batchsize", 10**8)
    assert message == "out of memory at --batchsize 100000000; pass a smaller one"


# ---------------------------------------------------------------------------------------------------- the user's files


def test_overwrite_removes_results_alone(images):
    infer()
    others = [Path("result/r", name) for name in ("my_model.bin", "scan_12.bin", "weights_3.bin", "notes.txt")]
    for path in others:
        path.write_bytes(b"the user's")
    Path("result/r/old_0.bin").touch()
    assert "(3 inferred, 0 kept)" in infer("--overwrite")
    assert [path.read_bytes() for path in others] == [b"the user's"] * 4
    assert not Path("result/r/old_0.bin").exists()


def test_results_into_the_input_folder_are_refused(images, capsys):
    before = contents("prep")
    Path("result").mkdir()
    for output in (".", "result/.."):
        with pytest.raises(SystemExit, match="2"):
            infer("--output", output, "--output_dirname", "prep", "--overwrite")
        assert "is --input; pass another --output_dirname" in capsys.readouterr().err
    assert contents("prep") == before


def test_a_summary_of_zeros_is_not_replaced_unasked(images):
    speed = ["--model", "x.onnx", "--output", "result", "--output_dirname", "r", "--loop", "2"]
    tool.main(speed)
    message = "result/r: only a summary is here, as of a speed test; pass another --output_dirname, or --overwrite"
    assert infer() == message
    assert json.loads(SUMMARY.read_text())["NPU_compute_time"]["count"] == 2
    save_small_model(Path("x.onnx"), seed=1)
    for content in (SUMMARY.read_text(), '{"throughput": 1.0}'):  # another model's, ais_bench's
        SUMMARY.write_text(content)
        with pytest.raises(tool.InputError, match="of another run; pass another --output_dirname, or --overwrite"):
            tool.main(speed)
        assert SUMMARY.read_text() == content
    tool.main([*speed, "--overwrite"])
    assert json.loads(SUMMARY.read_text())["model_sha256"] == hashlib.sha256(Path("x.onnx").read_bytes()).hexdigest()


def test_a_full_disk_is_one_line_and_leaves_no_part(images):
    Path("result/r").mkdir(parents=True)
    result_of("ulm_10", 0).with_name("ulm_10_leftImg8bit_0.bin.part").symlink_to("/dev/full")
    assert error_of(SCRIPT, *RUN) == "result/r/ulm_10_leftImg8bit_0.bin: No space left on device"
    assert list(Path("result/r").iterdir()) == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--provider", "cuda"], "only cpu; pip3 uninstall onnxruntime, then pip3 install onnxruntime-gpu\n"),
        (["--provider", "azure"], "argument --provider: this onnxruntime supports only cpu\n"),
        (["--provider", "cdua", "--help"], "argument --provider: this onnxruntime supports only cpu\n"),
    ],
)
def test_a_model_or_provider_of_another_package_is_wrong_usage(images, args, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        infer(*args)
    assert words in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- ranks


def infer_as_rank(rank: int, ranks: int, *args: object, status: int = 0) -> str:
    settings = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "1"}
    done = run(SCRIPT, *args, status=status, env={**os.environ, **settings})
    return done.stdout or done.stderr


def test_the_results_of_two_ranks_are_those_of_one_process(images):
    infer("--output_dirname", "alone")
    shares = [["ulm_10", "ulm_9"], ["ulm_8"]]
    for rank, share in enumerate(shares):
        for inferred in (len(share), 0):
            counts = f"frames: {len(share)} ({inferred} inferred, {len(share) - inferred} kept)"
            printed = infer_as_rank(rank, 2, *RUN, "--device", 4)
            assert printed.startswith(f"rank {rank} of 2: provider cpu, {counts}")
        names = sorted(result_of(frame, i).name for frame in share for i in (0, 1))
        assert sorted(path.name for path in Path(f"result/r/device{rank}").iterdir()) == names
        assert json.loads(Path(f"result/r/device{rank}_summary.json").read_text())["device"] == 4 + 1
        assert Path(f"result/r/device{rank}_model.json").is_file()
    found = contents("result/r")
    assert {name: found[name] for name in found if name.endswith(".bin")} == contents("result/alone")


def test_a_rank_without_frames_ends_well(images):
    assert "rank 3 of 4: provider cpu, frames: 0 (0 inferred, 0 kept)" in infer_as_rank(3, 4, *RUN)


def test_wrong_usage_exits_2(images):
    assert "--output_dirname needs --output" in run(SCRIPT, *RUN[:4], *RUN[6:], status=2).stderr
    assert "--output_dirname is required" in infer_as_rank(0, 4, *RUN[:-2], status=2)


def test_the_ranks_of_a_host_share_its_cpus(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert tool.parse_args(["--model", "x.onnx"]).threads == max(1, intrada_postprocess.count_cpus() // 2)


@pytest.mark.parametrize("ranks", ["x 2 0 1", "0 0 0 1", "5 2 0 1", "-1 2 0 1", "0 2 x 1", "0 2 0 0"])
def test_ranks_that_do_not_fit_are_wrong_usage(images, monkeypatch, capsys, ranks):
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), ranks.split()):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        infer()
    assert f"no rank of a launcher: RANK={ranks.split()[0]} WORLD_SIZE=" in capsys.readouterr().err


def test_rank_alone_is_one_process(images):
    printed = run(SCRIPT, *RUN, env={**os.environ, "RANK": "1"}).stdout
    assert printed.startswith("provider cpu, frames: 3 (3 inferred, 0 kept)")
