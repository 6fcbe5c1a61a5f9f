"""atc_convert.sh with stand-ins for atc, npu-smi and CANN's set_env.sh that refuse what the real ones refuse."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from support import ROOT, ascend_environment, make_older

FAKES = ROOT / "tests" / "fake_ascend"


def save_model(path: Path, name: str = "image", operator: str = "Relu", opset: int = 11) -> Path:
    """Save a model as small as atc's rules allow."""
    shape = ["batch", 3, 512, 1024]
    values = [helper.make_tensor_value_info(value, TensorProto.FLOAT, shape) for value in (name, "output_1")]
    graph = helper.make_graph([helper.make_node(operator, [name], ["output_1"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), path)
    make_older(path, 60)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(tmp_path / "intraDA_deeplabv2.onnx")
    return tmp_path


def convert(folder: Path, *args: object, status: int = 0, **settings: str) -> subprocess.CompletedProcess:
    """Run the script in a folder, with the stand-ins on PATH."""
    command = ["bash", str(ROOT / "atc_convert.sh"), *map(str, args)]
    environment = ascend_environment(**settings)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")
    assert done.returncode == status, done.stdout + done.stderr
    return done


def error_of(folder: Path, *args: object, **settings: str) -> str:
    stderr = convert(folder, *args, status=1, **settings).stderr
    assert stderr.startswith("atc_convert.sh: error: "), stderr
    assert stderr.count("\n") == 1, stderr
    return stderr[len("atc_convert.sh: error: ") : -1]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def command_for(folder: Path, batch_size: int, soc_version: str = "Ascend310P3") -> str:
    return (
        f"atc --model={folder}/intraDA_deeplabv2.onnx --framework=5 --output=intraDA_deeplabv2_bs{batch_size} "
        f"--input_format=NCHW --input_shape=image:{batch_size},3,512,1024 --log=error --soc_version={soc_version}"
    )


def test_all_six_batch_sizes_are_made_and_nothing_else_is_left(folder):
    lines = convert(folder).stdout.splitlines()
    assert lines[:6] == [command_for(folder, bs) for bs in (1, 4, 8, 16, 32, 64)]
    assert lines[6:] == [f"bs {bs}: made {folder}/intraDA_deeplabv2_bs{bs}.om" for bs in (1, 4, 8, 16, 32, 64)]
    made = {f"intraDA_deeplabv2_bs{bs}.om" for bs in (1, 4, 8, 16, 32, 64)}
    assert names(folder) == {"intraDA_deeplabv2.onnx"} | made
    about = json.loads((folder / "intraDA_deeplabv2_bs16.om").read_text())
    assert about == {"onnx": f"{folder}/intraDA_deeplabv2.onnx", "batch": 16, "soc_version": "Ascend310P3"}
    assert oct((folder / "intraDA_deeplabv2_bs16.om").stat().st_mode & 0o777) == "0o644"


def test_what_it_prints_can_be_pasted(folder):
    printed = convert(folder, 4, "--dry_run", "--", "--precision_mode_v2=mixed_float16").stdout
    assert printed == command_for(folder, 4) + " --precision_mode_v2=mixed_float16\n"
    assert names(folder) == {"intraDA_deeplabv2.onnx"}
    subprocess.run(printed, shell=True, cwd=folder, env=ascend_environment(), check=True, capture_output=True)
    assert "intraDA_deeplabv2_bs4.om" in names(folder)
    assert convert(folder, "--dry_run", "--overwrite", 4, "--", "--log=a b").stdout.endswith(" --log=a\\ b\n")


def test_one_failing_batch_size_does_not_stop_the_others_and_is_made_alone_afterwards(folder):
    done = convert(folder, status=1, FAKE_ATC_FAIL="64:EL0004", HOME="/nowhere")
    lines = done.stdout.splitlines()[6:]
    assert [line.split(":")[1].split()[0] for line in lines] == ["made"] * 5 + ["FAILED"]
    assert re.fullmatch(
        r"bs 64: FAILED: EL0004: \[PID: \d+\] told to fail "
        r"\(out of memory: take a smaller batch size; log: /nowhere/ascend/log\)",
        lines[5],
    )
    assert "intraDA_deeplabv2_bs64.om" not in names(folder)

    again = convert(folder).stdout.splitlines()
    assert again[0] == command_for(folder, 64)
    assert again[1:] == [f"bs {bs}: kept {folder}/intraDA_deeplabv2_bs{bs}.om" for bs in (1, 4, 8, 16, 32)] + [
        f"bs 64: made {folder}/intraDA_deeplabv2_bs64.om"
    ]


def test_a_model_older_than_its_onnx_is_made_anew(folder):
    convert(folder, 1)
    assert "kept" in convert(folder, 1).stdout
    make_older(folder / "intraDA_deeplabv2_bs1.om", 3600)
    assert "made" in convert(folder, 1).stdout
    assert "made" in convert(folder, 1, "--overwrite").stdout


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("E10001", "a bad value, path or chip: look at --soc_version and at what stands behind --"),
        ("E10007", "an argument is missing or unquoted: look at what stands behind --"),
        ("E10054", "an argument is missing or unquoted: look at what stands behind --"),
        ("E10016", "the ONNX's input must be called image: export it with intrada_pth2onnx.py"),
        ("E10041", "the ONNX cannot be read: export it again, copy it whole"),
        ("E19010", "an operator or opset that this CANN does not know: export with --opset 11"),
        ("EZ9010", "an operator or opset that this CANN does not know: export with --opset 11"),
        ("EZ3002", "not on this chip: install the ops package of Ascend310P3 (CANN 8.5 and later)"),
        ("EZ3003", "not on this chip: install the ops package of Ascend310P3 (CANN 8.5 and later)"),
        ("EC0010", "pip3 install decorator attrs scipy sympy cffi psutil 'numpy<2'"),
        ("E40000", "pip3 install decorator attrs scipy sympy cffi psutil 'numpy<2'"),
        ("EL0004", "out of memory: take a smaller batch size"),
        ("E19999", "the log tells more"),
    ],
)
def test_each_code_of_atc_comes_with_advice(folder, code, advice):
    done = convert(folder, 1, status=1, FAKE_ATC_FAIL=f"1:{code}", ASCEND_PROCESS_LOG_PATH="/logs")
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"bs 1: FAILED: {code}: ")
    assert last.endswith(f"({advice}; log: /logs)")
    assert f"{code}: " in done.stderr  # atc's own words pass through


@pytest.mark.parametrize(
    ("model", "code"),
    [({"name": "data"}, "E10016"), ({"opset": 17}, "EZ9010"), ({"operator": "Sigmoid"}, "E19010"), (None, "E10041")],
)
def test_what_atc_refuses_in_a_model_is_told(folder, model, code):
    path = folder / "intraDA_deeplabv2.onnx"
    save_model(path, **model) if model else path.write_bytes(b"<html>")
    assert f"bs 1: FAILED: {code}: " in convert(folder, 1, status=1).stdout


def test_atc_that_dies_or_leaves_no_file_has_failed(folder):
    assert "bs 4: FAILED: atc was ended by signal 9 (" in convert(folder, 4, status=1, FAKE_ATC_FAIL="4:9").stdout
    silent = convert(folder, 4, status=1, FAKE_ATC_FAIL="4:silent").stdout
    assert "bs 4: FAILED: atc ended with status 0 and left no .om (" in silent
    assert names(folder) == {"intraDA_deeplabv2.onnx"}


def test_atc_that_fails_after_it_wrote_has_failed(folder):
    assert "bs 4: FAILED: atc ended with status 1" in convert(folder, 4, status=1, FAKE_ATC_FAIL="4:late").stdout
    assert names(folder) == {"intraDA_deeplabv2.onnx"}


def test_a_message_that_is_no_text_hides_nothing(folder):
    done = convert(folder, 4, status=1, FAKE_ATC_FAIL="4:bytes", LC_ALL="C.UTF-8")
    assert "bs 4: FAILED: EZ9999: " in done.stdout


def test_a_model_is_writable_by_one_whatever_the_umask(folder):
    command = ["bash", str(ROOT / "atc_convert.sh"), "1", "--output_dir", "om"]
    subprocess.run(
        ["bash", "-c", 'umask 0; exec "$@"', "-", *command], cwd=folder, env=ascend_environment(), check=True
    )
    paths = folder / "om", folder / "om" / "intraDA_deeplabv2_bs1.om"
    assert [oct(path.stat().st_mode & 0o777) for path in paths] == ["0o755", "0o644"]


def test_a_model_is_named_after_the_link_that_was_given(folder):
    (folder / "store").mkdir()
    (folder / "intraDA_deeplabv2.onnx").rename(folder / "store" / "v3.onnx")
    (folder / "intraDA_deeplabv2.onnx").symlink_to("store/v3.onnx")
    convert(folder, 1)
    assert names(folder) == {"store", "intraDA_deeplabv2.onnx", "intraDA_deeplabv2_bs1.om"}


def test_the_same_batch_size_twice_is_made_twice(folder):
    done = convert(folder, 1, 1, "--overwrite")
    assert done.stdout.splitlines()[2:] == [f"bs 1: made {folder}/intraDA_deeplabv2_bs1.om"] * 2


def test_a_name_with_the_host_s_architecture_is_taken_too(folder):
    convert(folder, 1, FAKE_ATC_SUFFIX="_linux_x86_64")
    assert names(folder) == {"intraDA_deeplabv2.onnx", "intraDA_deeplabv2_bs1.om"}


@pytest.mark.parametrize("soc_version", ["310P3", "310p3", "Ascend310P3", "ascend310p3", "ASCEND310P3"])
def test_the_chip_may_be_given_in_every_spelling(folder, soc_version):
    for option in (["--soc_version", soc_version], [f"--soc_version={soc_version}"]):
        assert convert(folder, 1, "--dry_run", *option).stdout == command_for(folder, 1) + "\n"


@pytest.mark.parametrize(
    ("given", "soc_version"), [("910b2c", "Ascend910B2C"), ("910b3", "Ascend910B3"), ("910ProA", "Ascend910ProA")]
)
def test_the_chip_s_letters_become_those_of_its_name(folder, given, soc_version):
    assert convert(folder, 1, "--dry_run", "--soc_version", given).stdout == command_for(folder, 1, soc_version) + "\n"


@pytest.mark.parametrize(
    ("chips", "soc_version"),
    [
        ("0:310P3:OK", "Ascend310P3"),
        ("0:310P1:Warning 1:310P1:OK", "Ascend310P1"),
        ("32800:310P3:Alarm", "Ascend310P3"),
        ("0:310B4:UNKNOWN", "Ascend310B4"),
        ("7:910B3:Critical", "Ascend910B3"),
        ("0:910ProA:OK", "Ascend910ProA"),
        ("0:310:OK", "Ascend310"),
    ],
)
def test_the_chip_is_read_from_every_form_of_npu_smi_s_table(folder, chips, soc_version):
    done = convert(folder, 1, FAKE_CHIPS=chips)
    assert done.stdout.splitlines()[0] == command_for(folder, 1, soc_version)
    assert "warning" not in done.stderr


def test_of_different_chips_the_first_is_taken_and_named(folder):
    done = convert(folder, 1, "--dry_run", FAKE_CHIPS="0:310P3:OK 1:310P3:OK 2:310B4:OK")
    assert done.stderr == "warning: different chips (310P3, 310B4): taking 310P3\n"
    assert done.stdout == command_for(folder, 1) + "\n"


@pytest.mark.parametrize("chips", ["", "broken"])
def test_without_a_chip_the_option_is_asked_for(folder, chips):
    message = "npu-smi info shows no chip; say which one the model is for, as --soc_version 310P3"
    assert error_of(folder, FAKE_CHIPS=chips) == message
    assert "made" in convert(folder, 1, "--soc_version", "310P3", FAKE_CHIPS=chips).stdout


def test_atc_is_found_through_a_set_env_that_breaks_under_strict_bash(folder):
    tools = folder / "tools"  # what the script needs, and no atc
    tools.mkdir()
    (tools / "npu-smi").symlink_to(FAKES / "bin" / "npu-smi")
    home = FAKES / "home"
    found = convert(
        folder, 1, PATH=f"{tools}:/usr/bin:/bin", HOME=str(home), FAKE_CANN_BIN=ascend_environment()["PATH"]
    )
    assert f"bs 1: made {folder}/intraDA_deeplabv2_bs1.om" in found.stdout
    assert error_of(folder, 4, PATH=f"{tools}:/usr/bin:/bin", HOME="/nowhere") == (
        "no atc on PATH nor by a set_env.sh below /usr/local/Ascend or ~/Ascend; install CANN"
    )


@pytest.mark.parametrize("first", ["cann", "ascend-toolkit"])
def test_the_newer_set_env_comes_first(folder, first):
    home = folder / "home"
    for name in ("cann", "ascend-toolkit"):
        script = home / "Ascend" / name / "set_env.sh"
        if name == first or first == "cann":
            script.parent.mkdir(parents=True)
            script.write_text(f"echo sourced {name}; export PATH={FAKES / 'bin'}:$PATH\n")
    done = convert(
        folder, 1, "--soc_version", "310P3", PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin", HOME=str(home)
    )
    assert done.stdout.count(f"sourced {first}\n") == 1
    assert done.stdout.count("sourced") == 1


def test_the_log_lies_where_cann_s_variables_say(folder):
    for settings, log in (({}, "/h/ascend/log"), ({"ASCEND_WORK_PATH": "/w"}, "/w/log")):
        done = convert(folder, 1, status=1, FAKE_ATC_FAIL="1:E19999", HOME="/h", **settings)
        assert done.stdout.splitlines()[-1].endswith(f"; log: {log})")


def test_paths_that_atc_refuses_are_told_before_it_runs(folder):
    spaced = folder / "my models"
    spaced.mkdir()
    shutil.copy(folder / "intraDA_deeplabv2.onnx", spaced)
    assert error_of(spaced) == (
        f"{spaced}/intraDA_deeplabv2.onnx: atc refuses ' ' in a path; only letters, digits and . _ - / will do"
    )
    assert error_of(folder, "--output_dir", "out (1)").startswith(f"{folder}/out (1): atc refuses ' ()' in a path")
    chinese = folder / "模型"
    chinese.mkdir()
    assert "made" in convert(folder, 1, "--output_dir", chinese).stdout
    assert names(chinese) == {"intraDA_deeplabv2_bs1.om"}


def test_another_model_and_folder_may_be_given(folder):
    save_model(folder / "x.onnx")
    convert(folder, "x.onnx", 4, "--output_dir=models/om")
    assert names(folder / "models" / "om") == {"x_bs4.om"}
    (folder / "models" / "om" / "x_bs4.om").unlink()
    printed = convert(folder, "x.onnx", 4, "--output_dir=models/om", "--dry_run").stdout
    subprocess.run(printed, shell=True, cwd=folder, env=ascend_environment(), check=True, capture_output=True)
    assert names(folder / "models" / "om") == {"x_bs4.om"}


def test_a_missing_model_is_told(tmp_path):
    assert error_of(tmp_path) == "intraDA_deeplabv2.onnx: no such file; export it with intrada_pth2onnx.py"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["0"], "neither an option, a batch size nor an .onnx: 0"),
        (["--fast"], "neither an option, a batch size nor an .onnx: --fast"),
        (["--soc_version"], "--soc_version wants a value"),
        (["x.onnx", "y.onnx"], "two models, x.onnx and y.onnx"),
    ],
)
def test_wrong_usage_exits_2(tmp_path, args, message):
    assert convert(tmp_path, *args, status=2).stderr == f"atc_convert.sh: error: {message}; see --help\n"
