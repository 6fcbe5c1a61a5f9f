"""atc_convert.sh with stand-ins for atc and npu-smi that refuse what the real ones refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from support import ROOT, ascend_environment, shift_mtime

SCRIPT = ROOT / "atc_convert.sh"
SIZES = 1, 4, 8, 16, 32, 64


def save_model(path: Path) -> None:
    shape = ["batch", 3, 512, 1024]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("image", "output_1")]
    graph = helper.make_graph([helper.make_node("Relu", ["image"], ["output_1"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)]), path)
    shift_mtime(path, -60)


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(tmp_path / "intraDA_deeplabv2.onnx")
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
    dry = convert(folder, "--dry_run").stdout.splitlines()  # all commands, although all files are current
    assert dry == printed[:6]
    for size in (1, 64):
        (folder / f"intraDA_deeplabv2_bs{size}.om").unlink()
    for command in (dry[0], dry[-1]):
        subprocess.run(command, shell=True, cwd=folder, env=ascend_environment(), check=True, capture_output=True)
    assert contents(folder) == made


def test_a_path_and_an_atc_option_that_need_quotes_can_be_pasted(folder):
    args = "x y.onnx", 4, "--output_dir=a (b)", "--dry_run", "--", "--precision_mode_v2=mixed, float16"
    assert "no such file" in convert(folder, *args, status=1).stderr
    save_model(folder / "x y.onnx")
    printed = convert(folder, *args).stdout
    words = subprocess.run(f"printf '%s\\n' {printed}", shell=True, capture_output=True, text=True).stdout.splitlines()
    assert {"--model=x y.onnx", "--output=a (b)/x y_bs4", "--precision_mode_v2=mixed, float16"} <= set(words)
    assert contents(folder) == {}


def test_a_failed_batch_size_leaves_no_om_and_is_made_next_time(folder):
    done = convert(folder, 1, 4, 8, status=1, FAKE_ATC_FAIL="4:late")
    assert [line.split()[2] for line in done.stdout.splitlines()[3:]] == ["made", "FAILED;", "made"]
    assert "E19999" in done.stderr  # atc's own message, which it prints to stdout
    assert contents(folder).keys() == {"intraDA_deeplabv2_bs1.om", "intraDA_deeplabv2_bs8.om"}
    assert convert(folder, 4, 1).stdout.splitlines() == [
        command_for(4), "bs 4: made intraDA_deeplabv2_bs4.om", "bs 1: kept intraDA_deeplabv2_bs1.om",
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["EL0004", "silent"])
def test_atc_that_leaves_no_file_has_failed(folder, how):
    (folder / "intraDA_deeplabv2_bs4.om").write_text("of an earlier run")
    assert "bs 4: FAILED" in convert(folder, 4, status=1, FAKE_ATC_FAIL=f"4:{how}").stdout
    assert contents(folder) == {}


def test_an_interrupted_conversion_is_made_again(folder):
    om = folder / "intraDA_deeplabv2_bs4.om"
    process = subprocess.Popen(
        ["bash", SCRIPT, "4"], cwd=folder, env=ascend_environment(FAKE_ATC_FAIL="4:hang"), start_new_session=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while not om.exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # atc too
    process.wait()
    assert om.exists()
    assert "made" in convert(folder, 4).stdout
    assert json.loads(om.read_text())["batch"] == 4


def test_an_om_is_kept_only_if_it_has_the_time_of_its_onnx(folder):
    (folder / "store").mkdir()
    onnx_path = folder / "store" / "v3.onnx"
    (folder / "intraDA_deeplabv2.onnx").rename(onnx_path)
    (folder / "intraDA_deeplabv2.onnx").symlink_to(onnx_path)
    assert "made" in convert(folder, 1).stdout
    assert convert(folder, 1).stdout == "bs 1: kept intraDA_deeplabv2_bs1.om\n"
    assert "made" in convert(folder, 1, "--overwrite").stdout
    assert "made" in convert(folder, 1, "--", "--buffer_optimize=off_optimize").stdout  # another model
    assert "made" in convert(folder, 1).stdout
    shift_mtime(onnx_path, -3600)  # replaced by an older file
    assert "made" in convert(folder, 1).stdout


def test_another_model_and_folder_whatever_the_umask(folder):
    save_model(folder / "x.onnx")
    command = f"umask 0; bash {SCRIPT} x.onnx 4 --output_dir models/om"
    subprocess.run(command, shell=True, cwd=folder, env=ascend_environment(), check=True, capture_output=True)
    paths = folder / "models" / "om", folder / "models" / "om" / "x_bs4.om"
    assert [oct(path.stat().st_mode & 0o777) for path in paths] == ["0o755", "0o644"]


@pytest.mark.parametrize("option", [["--soc_version", "310B4"], ["--soc_version=Ascend310B4"]])
def test_the_chip_is_prefixed_once(folder, option):
    assert convert(folder, 1, "--dry_run", *option).stdout == command_for(1, "Ascend310B4") + "\n"


@pytest.mark.parametrize(
    ("chips", "soc_version"),
    [
        ("0:310P3:OK", "Ascend310P3"),
        ("0:310P1:Warning 1:310B4:OK", "Ascend310P1"),
        ("32800:310P3:Alarm", "Ascend310P3"),
        ("0:310B4:UNKNOWN", "Ascend310B4"),
        ("7:910B3:Critical", "Ascend910B3"),
    ],
)
def test_the_chip_is_read_from_every_form_of_npu_smi_s_table(folder, chips, soc_version):
    assert convert(folder, 1, "--dry_run", FAKE_CHIPS=chips).stdout == command_for(1, soc_version) + "\n"


@pytest.mark.parametrize("chips", ["", "broken"])
def test_without_a_chip_the_option_is_required(folder, chips):
    stderr = convert(folder, 1, "--dry_run", status=1, FAKE_CHIPS=chips).stderr
    assert "--soc_version" in stderr
    assert stderr.count("\n") == 1


def test_a_missing_atc_is_one_line_that_names_set_env_sh(folder):
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    stderr = convert(folder, 1, "--soc_version", "310P3", status=1, PATH=path).stderr
    assert stderr.startswith("atc_convert.sh: error: no atc on PATH")
    assert "set_env.sh" in stderr
    assert stderr.count("\n") == 1
    home = ROOT / "tests" / "fake_ascend" / "home" / "Ascend" / "ascend-toolkit"
    command = f"source {home}/set_env.sh && bash {SCRIPT} 1"
    subprocess.run(["bash", "-c", command], cwd=folder, env=ascend_environment(PATH=path), check=True)
    assert contents(folder).keys() == {"intraDA_deeplabv2_bs1.om"}


def test_a_missing_model_is_one_line(tmp_path):
    stderr = convert(tmp_path, status=1).stderr
    assert stderr.startswith("atc_convert.sh: error: intraDA_deeplabv2.onnx: no such file")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("args", [["0"], ["--fast"], ["--soc_version"], ["x.onnx", "y.onnx"]], ids=" ".join)
def test_wrong_usage_exits_2(tmp_path, args):
    stderr = convert(tmp_path, *args, status=2).stderr
    assert stderr.startswith("atc_convert.sh: error: ")
    assert args[-1] in stderr
