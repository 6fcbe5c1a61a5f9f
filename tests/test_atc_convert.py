"""atc_convert.sh with stand-ins for atc and npu-smi that refuse what the real ones refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import ROOT, ascend_environment, save_small_model

SCRIPT = ROOT / "atc_convert.sh"
SIZES = 1, 4, 8, 16, 32, 64


@pytest.fixture
def folder(tmp_path) -> Path:
    save_small_model(tmp_path / "intraDA_deeplabv2.onnx")
    return tmp_path


def convert(folder: Path, *args: object, status: int = 0, **settings: str) -> subprocess.CompletedProcess:
    """Run the script in a folder, with the stand-ins on PATH."""
    command = ["bash", str(SCRIPT), *map(str, args)]
    environment = ascend_environment(**settings)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.om")}


def command_for(size: int, soc_version: str = "Ascend310P3") -> str:
    return (
        f"atc --model=intraDA_deeplabv2.onnx --framework=5 --output=intraDA_deeplabv2_bs{size} --input_format=NCHW "
        f"--input_shape=image:{size},3,512,1024 --log=error --soc_version={soc_version}"
    )


def test_the_printed_commands_pasted_make_the_same_files(folder):
    printed = convert(folder).stdout.splitlines()
    assert printed == [command_for(size) for size in SIZES] + [
        f"bs {size}: made intraDA_deeplabv2_bs{size}.om" for size in SIZES
    ]
    made = contents(folder)
    assert [json.loads(made[f"intraDA_deeplabv2_bs{size}.om"])["batch"] for size in SIZES] == list(SIZES)
    for size in (1, 64):
        (folder / f"intraDA_deeplabv2_bs{size}.om").unlink()
    for command in (printed[0], printed[5]):
        subprocess.run(command, shell=True, cwd=folder, env=ascend_environment(), check=True, capture_output=True)
    assert contents(folder) == made


def test_a_path_and_an_atc_option_that_need_quotes_can_be_pasted(folder):
    save_small_model(folder / "x y.onnx")
    args = "x y.onnx", 4, "--output_dir=a (b)", "--dry_run", "--", "--precision_mode_v2=mixed, float16"
    printed = convert(folder, *args).stdout
    words = subprocess.run(f"printf '%s\\n' {printed}", shell=True, capture_output=True, text=True).stdout.splitlines()
    assert {"--model=x y.onnx", "--output=a (b)/x y_bs4", "--precision_mode_v2=mixed, float16"} <= set(words)
    assert not (folder / "a (b)").exists()


@pytest.mark.parametrize("how", ["late", "EL0004", "silent"])
def test_a_failed_batch_size_leaves_no_om_and_the_others_are_made(folder, how):
    for size in (1, 4):
        (folder / f"intraDA_deeplabv2_bs{size}.om").write_text("of an earlier run")
    done = convert(folder, 1, 4, 8, status=1, FAKE_ATC_FAIL=f"4:{how}")
    assert [line.split()[2] for line in done.stdout.splitlines()[3:]] == ["made", "FAILED;", "made"]
    made = {name: json.loads(content)["batch"] for name, content in contents(folder).items()}
    assert made == {"intraDA_deeplabv2_bs1.om": 1, "intraDA_deeplabv2_bs8.om": 8}
    assert how == "silent" or "as FAKE_ATC_FAIL requires" in done.stderr  # atc's own message, which it prints to stdout


HANDLES_SIGNALS = """#!/bin/bash
trap 'exit 1' INT TERM
touch intraDA_deeplabv2_bs4.om
sleep 60
"""


@pytest.mark.parametrize("signal_number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("atc", [None, HANDLES_SIGNALS], ids=["dies", "exits_with_1"])
def test_an_interrupted_conversion_leaves_no_om_and_ends_a_loop_around_it(folder, signal_number, atc):
    environment = ascend_environment(FAKE_ATC_FAIL="4:hang")
    if atc:
        (folder / "atc").write_text(atc)
        (folder / "atc").chmod(0o755)
        environment["PATH"] = f"{folder}:{environment['PATH']}"
    process = subprocess.Popen(
        ["bash", SCRIPT, "4", "8"], cwd=folder, env=environment, start_new_session=True, stdout=subprocess.PIPE
    )
    while not contents(folder):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal_number)
    stdout, _ = process.communicate(timeout=30)
    assert process.returncode == -signal_number  # by which a shell ends its loop too
    assert stdout.decode().splitlines() == [command_for(4), "bs 4: interrupted, no .om"]
    assert contents(folder) == {}


def test_another_model_and_folder_whatever_the_umask(folder):
    save_small_model(folder / "x.onnx")
    command = f"umask 0; bash {SCRIPT} x.onnx 4 --output_dir models/om"
    subprocess.run(command, shell=True, cwd=folder, env=ascend_environment(), check=True, capture_output=True)
    paths = folder / "models" / "om", folder / "models" / "om" / "x_bs4.om"
    assert [oct(path.stat().st_mode & 0o777) for path in paths] == ["0o755", "0o644"]


@pytest.mark.parametrize("option", [["--soc_version", "310B4"], ["--soc_version=Ascend310B4"]])
def test_the_chip_is_prefixed_once(folder, option):
    assert convert(folder, 1, "--dry_run", *option).stdout == command_for(1, "Ascend310B4") + "\n"


@pytest.mark.parametrize(
    ("name", "soc_version"),
    [
        ("ascend310p3", "Ascend310P3"),
        ("310p3", "Ascend310P3"),
        ("Ascend910ProA", "Ascend910ProA"),
        ("ascend910_9391", "Ascend910_9391"),
    ],
)
def test_a_chip_means_the_same_in_either_case(folder, name, soc_version):
    assert convert(folder, 1, "--dry_run", "--soc_version", name).stdout == command_for(1, soc_version) + "\n"


def test_an_interrupted_dry_run_removes_nothing(folder):
    sizes = [str(size) for size in range(1, 600)]  # more than the pipe takes, from which nobody reads
    for size in sizes:
        (folder / f"intraDA_deeplabv2_bs{size}.om").write_text("of an earlier run")
    command = ["bash", SCRIPT, *sizes, "--dry_run", "--soc_version=310P3"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, start_new_session=True)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert len(contents(folder)) == len(sizes)


def test_sh_starts_bash(folder):
    command = ["sh", SCRIPT, "1", "--dry_run"]
    done = subprocess.run(command, cwd=folder, env=ascend_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, command_for(1) + "\n", "")


def test_an_option_that_atc_rejects_leaves_no_om_and_says_so(folder):
    done = convert(folder, 1, "--", "--no_such=1", status=1)
    assert done.stdout.splitlines()[-1].startswith("bs 1: FAILED")
    assert contents(folder) == {}


def test_atc_s_options_without_the_dashes_before_them_are_wrong_usage(folder):
    assert "-- --precision_mode_v2=fp16" in convert(folder, "--precision_mode_v2=fp16", status=2).stderr


def test_what_is_missing_is_named_in_the_order_atc_model_chip(folder):
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    assert "no atc" in convert(folder, "none.onnx", status=1, FAKE_CHIPS="", PATH=path).stderr
    assert "none.onnx: no such file" in convert(folder, "none.onnx", status=1, FAKE_CHIPS="").stderr


@pytest.mark.parametrize(
    "chips", ["0:310P3:OK", "0:310P1:Warning 1:310B4:OK", "32800:310P3:Alarm", "0:310B4:UNKNOWN", "7:910B3:Critical"]
)
def test_the_chip_is_read_from_every_form_of_npu_smi_s_table(folder, chips):
    first = chips.split(":")[1]
    assert convert(folder, 1, "--dry_run", FAKE_CHIPS=chips).stdout == command_for(1, f"Ascend{first}") + "\n"


@pytest.mark.parametrize(
    ("args", "settings", "words"),
    [
        (["x.onnx"], {}, ["x.onnx: no such file", "intrada_pth2onnx.py"]),
        ([], {"FAKE_CHIPS": ""}, ["--soc_version"]),
        ([], {"FAKE_CHIPS": "broken"}, ["--soc_version"]),
        (["--soc_version=310P3"], {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}, ["no atc", "set_env.sh"]),
    ],
    ids=["model", "chip", "broken_npu_smi", "atc"],
)
def test_what_is_missing_is_one_line_with_the_remedy(folder, args, settings, words):
    stderr = convert(folder, *args, status=1, **settings).stderr
    assert stderr.startswith("atc_convert.sh: error: ")
    assert all(word in stderr for word in words)
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [["0"], ["--fast"], ["--soc_version"], ["--output_dir", ""], ["--soc_version", "--dry_run"], ["x.onnx", "y.onnx"]],
    ids=" ".join,
)
def test_wrong_usage_exits_2(tmp_path, args):
    stderr = convert(tmp_path, *args, status=2).stderr
    assert stderr.startswith("atc_convert.sh: error: ")
    assert any(arg in stderr for arg in args if arg)
