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

from support import OWN_GROUP, ROOT, ascend_environment, save_small_model

SCRIPT = ROOT / "atc_convert.sh"
SIZES = 1, 4, 8, 16, 32, 64
WITHOUT_ATC = f"{Path(sys.executable).parent}:/usr/bin:/bin"


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
    summary = [f"bs {size}: made intraDA_deeplabv2_bs{size}.om" for size in SIZES]
    assert printed == [*map(command_for, SIZES), *summary]
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
    assert [line.split()[2] for line in done.stdout.splitlines()[3:]] == ["made", "FAILED,", "made"]
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
    om, earlier = folder / "intraDA_deeplabv2_bs4.om", folder / "intraDA_deeplabv2_bs4.om.old"
    om.write_text("of an earlier run")
    command = ["bash", SCRIPT, "4", "8"]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, **OWN_GROUP)
    while not (earlier.exists() and om.exists()):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal_number)
    stdout, _ = process.communicate(timeout=30)
    assert process.returncode == -signal_number  # by which a shell ends its loop too
    interrupted = f"bs 4: interrupted, no .om; the earlier one is {earlier.name}"
    assert stdout.decode().splitlines() == [command_for(4), interrupted]
    assert contents(folder) == {}
    assert earlier.read_text() == "of an earlier run"


def test_a_signal_to_the_script_alone_keeps_the_om_that_atc_finishes(folder):
    (folder / "atc").write_text(FINISHES)
    (folder / "atc").chmod(0o755)
    environment = ascend_environment()
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    (folder / "intraDA_deeplabv2_bs4.om").write_text("of an earlier run")
    process = subprocess.Popen(
        ["bash", SCRIPT, "4", "8"], cwd=folder, env=environment, stdout=subprocess.PIPE, **OWN_GROUP
    )
    while not (folder / "started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    (folder / "go").touch()
    stdout, _ = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    assert stdout.decode().splitlines()[1:] == ["bs 4: made intraDA_deeplabv2_bs4.om"]
    assert contents(folder) == {"intraDA_deeplabv2_bs4.om": b"finished"}


FINISHES = """#!/bin/sh
touch started
while [ ! -e go ]; do sleep 0.02; done
printf finished > intraDA_deeplabv2_bs4.om
"""


@pytest.mark.parametrize(("option", "printed"), [("8", b"bs 4: interrupted\n"), ("--dry_run", b"")])
def test_an_interruption_before_atc_starts_removes_nothing(folder, option, printed):
    (folder / "sed").write_text("#!/bin/sh\ntouch printing\nsleep 60\n")  # by which a command is printed
    (folder / "sed").chmod(0o755)
    (folder / "intraDA_deeplabv2_bs4.om").write_text("of an earlier run")
    environment = ascend_environment()
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    command = ["bash", SCRIPT, "4", option]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, **OWN_GROUP)
    while not (folder / "printing").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    stdout, _ = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (-signal.SIGTERM, printed)
    assert contents(folder) == {"intraDA_deeplabv2_bs4.om": b"of an earlier run"}


def test_an_earlier_om_is_kept_until_a_conversion_succeeds(folder):
    om, earlier = folder / "intraDA_deeplabv2_bs4.om", folder / "intraDA_deeplabv2_bs4.om.old"
    om.write_text("of an earlier run")
    for settings in ({}, {"FAKE_ATC_FAIL": "4:late"}):  # the second failure finds no .om
        options = [] if settings else ["--", "--precison_mode=force_fp32"]
        done = convert(folder, 4, *options, status=1, **settings)
        assert done.stdout.splitlines()[-1].startswith("bs 4: FAILED")
        assert done.stdout.endswith("; the earlier one is intraDA_deeplabv2_bs4.om.old\n")
        assert (om.exists(), earlier.read_text()) == (False, "of an earlier run")
    made = f"bs 4: made {om.name}"
    assert [convert(folder, 4).stdout.splitlines()[-1] for _ in range(2)] == [f"{made}; removed {earlier.name}", made]
    assert (om.exists(), earlier.exists()) == (True, False)


def test_of_two_earlier_oms_none_is_overwritten(folder):
    paths = [folder / f"intraDA_deeplabv2_bs4.om{ending}" for ending in ("", ".old")]
    for path in paths:  # as kill -9 leaves them
        path.write_text(path.name)
    done = convert(folder, 1, 4, status=1)
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert "intraDA_deeplabv2_bs4.om.old" in done.stderr
    assert [path.read_text() for path in paths] == [path.name for path in paths]


def test_another_model_and_folder_whatever_the_umask(folder):
    save_small_model(folder / "x.onnx")
    command = f"umask 0; bash {SCRIPT} x.onnx 4 --output_dir models/om"
    subprocess.run(command, shell=True, cwd=folder, env=ascend_environment(), check=True, capture_output=True)
    paths = folder / "models" / "om", folder / "models" / "om" / "x_bs4.om"
    assert [oct(path.stat().st_mode & 0o777) for path in paths] == ["0o755", "0o644"]


@pytest.mark.parametrize(
    ("option", "soc_version"),
    [
        (["--soc_version", "310B4"], "Ascend310B4"),
        (["--soc_version=Ascend310B4"], "Ascend310B4"),
        (["--soc_version=310p3"], "Ascend310P3"),
        (["--soc_version=ascend310p3"], "Ascend310P3"),
        (["--soc_version=Ascend910ProA"], "Ascend910ProA"),
        (["--soc_version=ascend910_9391"], "Ascend910_9391"),
        (["--soc_version=Ascend910"], "Ascend910"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_chip_that_was_given_is_prefixed_once(folder, option, soc_version):
    done = convert(folder, 1, "--dry_run", *option, FAKE_CHIPS="A3")
    assert done.stdout == command_for(1, soc_version) + "\n"


def test_sh_starts_bash(folder):
    command = ["sh", SCRIPT, "1", "--dry_run"]
    done = subprocess.run(command, cwd=folder, env=ascend_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, command_for(1) + "\n", "")


@pytest.mark.parametrize("option", ["--precision_mode=force_fp32", "--precision_mode_v2=mixed_float16"])
def test_a_precision_option_reaches_atc(folder, option):
    done = convert(folder, 1, "--", option)
    assert done.stdout.splitlines()[0] == f"{command_for(1)} {option}"
    name, value = option[2:].split("=")
    assert json.loads(contents(folder)["intraDA_deeplabv2_bs1.om"])[name] == value


def test_without_a_driver_atc_s_message_and_the_summary_are_shown(folder):
    done = convert(folder, 1, 4, "--soc_version=310P3", status=1, FAKE_ATC_FAIL="devlib")
    assert done.stderr.count("error while loading shared libraries: libascend_hal.so") == 2
    assert [line[:12] for line in done.stdout.splitlines()[2:]] == ["bs 1: FAILED", "bs 4: FAILED"]
    assert "libascend_hal.so" in (ROOT / "docs" / "ascend.md").read_text()  # to which the summary leads


def test_atc_s_options_without_the_dashes_before_them_are_wrong_usage(folder):
    assert "-- --precision_mode_v2=fp16" in convert(folder, "--precision_mode_v2=fp16", status=2).stderr


@pytest.mark.parametrize(
    "chips", ["0:310P3:OK", "0:310P1:Warning 1:310B4:OK", "32800:310P3:Alarm", "0:310B4:UNKNOWN", "7:910B3:Critical"]
)
def test_the_chip_is_read_from_every_form_of_npu_smi_s_table(folder, chips):
    first = chips.split(":")[1]
    assert convert(folder, 1, "--dry_run", FAKE_CHIPS=chips).stdout == command_for(1, f"Ascend{first}") + "\n"


def test_an_older_server_s_chip_is_read_as_its_table_has_it(folder):
    assert convert(folder, 1, "--dry_run", FAKE_CHIPS="older").stdout == command_for(1, "Ascend910ProB") + "\n"


@pytest.mark.parametrize(
    ("args", "settings", "words"),
    [
        (["x.onnx"], {"FAKE_CHIPS": "", "PATH": WITHOUT_ATC}, ["no atc", "set_env.sh"]),
        (["x.onnx"], {"FAKE_CHIPS": ""}, ["x.onnx: no such file", "intrada_pth2onnx.py"]),
        ([], {"FAKE_CHIPS": ""}, ["no chip", "--soc_version 310P3"]),
        ([], {"FAKE_CHIPS": "broken"}, ["no chip", "--soc_version 310P3"]),
        ([], {"FAKE_CHIPS": "A3"}, ["npu-smi info -t board -i 0 -c 0", "--soc_version Ascend910_9391"]),
    ],
    ids=["atc", "model", "chip", "broken_npu_smi", "full_name"],
)
def test_what_is_missing_is_one_line_with_the_remedy_atc_and_model_first(folder, args, settings, words):
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
