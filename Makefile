# The whole pipeline and its checks. `make` lists the targets.

PYTHON      ?= python3
VENV        := .venv
OLD         ?= python3.7
CONSTRAINTS ?= requirements/constraints.txt

# What `make run` works on; without DATA and WEIGHTS, a tiny data set that it makes.
DATA     :=
WEIGHTS  :=
BS       := 1
PROVIDER := cpu
SPLIT    := val
LIMIT    :=
OUT      := out/$(if $(DATA),$(shell echo "$$(basename "$(WEIGHTS)" .pth)_on_$$(basename "$(DATA)")" | tr ' :;' ___),tiny)
override OUT := $(strip $(OUT))

BIN     := $(VENV)/bin
STAMP   := $(VENV)/installed
DEV     := $(VENV)/installed-dev
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
TINY    := $(OUT)/tiny_cityscapes
ONNX    := $(OUT)/intraDA_deeplabv2.onnx
FRAMES  := $(SPLIT)$(if $(LIMIT),_first$(LIMIT))
RUN     := $(FRAMES)_$(PROVIDER)_bs$(BS)
PREP    := $(OUT)/prep_$(FRAMES)
REPORT  := $(OUT)/report_$(RUN).html

frames  := --split $(SPLIT) $(if $(LIMIT),--limit $(LIMIT))
data    := $(or $(DATA),$(TINY))
weights := $(or $(WEIGHTS),$(TINY)/tiny_intrada.pth)
expect  := $(if $(DATA)$(LIMIT),,--expect 90.2 --tolerance 0.8)

.PHONY: help setup run test old-python soak browser bench lint clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with the pinned packages, once

$(STAMP): requirements.txt $(CONSTRAINTS)
	test -f $@ || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -U pip
	$(INSTALL) -r requirements.txt -c $(CONSTRAINTS)
	@touch $@

$(DEV): requirements/dev.txt $(STAMP)
	$(INSTALL) -r requirements/dev.txt -c $(CONSTRAINTS)
	@touch $@

ifneq ($(if $(DATA),x),$(if $(WEIGHTS),x))
$(error DATA= and WEIGHTS= go together)
endif
ifneq ($(words $(OUT)) $(findstring :,$(OUT)),1 )
$(error OUT="$(OUT)": expected a path without blanks and colons)
endif
ifneq ($(if $(DATA),,$(wildcard $(OUT)/made_of)),)
$(error $(OUT): has results of another data set; pass another OUT=)
endif

# With DATA=, before anything is made: the labels are there, and OUT is of no other checkpoint or data set.
define CHECK
import hashlib, pathlib, sys
from intrada_postprocess import InputError, find_labels
data, split, weights, out = sys.argv[1:]
try:
    find_labels(pathlib.Path(data), split)
    made_of = f"{hashlib.sha256(pathlib.Path(weights).read_bytes()).hexdigest()} {pathlib.Path(data).resolve()}"
    note = pathlib.Path(out, "made_of")
    if note.exists():
        fits = note.read_text("utf-8", "surrogateescape") == made_of
    else:
        fits = not pathlib.Path(out, "result").exists()  # or it is of an earlier version
    if not fits:
        raise InputError(f"{out}: has results of another checkpoint, data set or version; pass another OUT=")
    pathlib.Path(out, "made_of.part").write_text(made_of, "utf-8", "surrogateescape")
except (InputError, OSError) as error:
    sys.exit(f"error: {error}")
endef
export CHECK
export PIP_USER := 0

run: $(STAMP) $(if $(DATA),,$(TINY)/tiny_intrada.pth)  ## checkpoint to mIoU and report; DATA=cityscapes WEIGHTS=x.pth [LIMIT=20] [BS=4] [PROVIDER=cuda] [SPLIT=val] [OUT=dir]
	@test -f "$(weights)" || { echo "$(weights): no such file" >&2; exit 1; }
	@$(BIN)/python tools/infer.py --provider $(PROVIDER) --batchsize $(BS) --help > /dev/null  # refuses bad ones at once
	@mkdir -p "$(OUT)"
	$(if $(DATA),@$(BIN)/python -c "$$CHECK" "$(DATA)" "$(SPLIT)" "$(WEIGHTS)" "$(OUT)")
	$(BIN)/python intrada_preprocess.py "$(data)" "$(PREP)" $(frames)
	$(BIN)/python intrada_pth2onnx.py "$(weights)" "$(ONNX)"
	$(if $(DATA),@mv "$(OUT)/made_of.part" "$(OUT)/made_of" 2>/dev/null || test -f "$(OUT)/made_of")
	$(BIN)/python tools/infer.py --model "$(ONNX)" --input "$(PREP)" --output "$(OUT)/result" \
		--output_dirname $(RUN) --batchsize $(BS) --provider $(PROVIDER)
	$(BIN)/python intrada_postprocess.py "$(data)" "$(OUT)/result/$(RUN)" $(frames) --json "$(OUT)/metrics_$(RUN).json" \
		--save_labels "$(OUT)/labels_$(RUN)" $(expect)
	$(BIN)/python tools/report.py "$(OUT)/metrics_$(RUN).json" --output "$(REPORT)"
	@$(BIN)/python -c 'import pathlib, sys; print("report:", pathlib.Path(sys.argv[1]).resolve().as_uri())' "$(REPORT)"

$(TINY)/tiny_intrada.pth: tests/tiny_cityscapes.py tests/tiny_fit.npz $(wildcard tests/tiny/*.png) intrada_pth2onnx.py | $(STAMP)
	$(BIN)/python tests/tiny_cityscapes.py "$(TINY)"

test: $(DEV)  ## run the tests
	$(BIN)/python -m pytest

old-python: $(DEV)  ## run the scripts on an older Python with the oldest packages; OLD=python3.7
	test -x .venv-old/bin/pip || $(OLD) -m venv .venv-old
	.venv-old/bin/python -m pip install -U pip
	.venv-old/bin/python -m pip install -r requirements.txt -c requirements/constraints-oldest.txt
	OLD_PYTHON=$$PWD/.venv-old/bin/python $(BIN)/python -m pytest tests/test_old_python.py

soak: $(DEV)  ## slow tests: random bit flips and kills, the tiny checkpoint fitted again
	SOAK=1 $(BIN)/python -m pytest -rP tests/test_damage.py tests/test_tiny_cityscapes.py

browser:  ## install Debian's Chromium, in which the tests open the report (as root)
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends chromium chromium-driver

lint: $(DEV)  ## check style and shell scripts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/shellcheck .ci/run $(wildcard *.sh)

bench: $(DEV)  ## time each stage against a straightforward loop
	$(BIN)/python tests/speed/bench.py

clean:  ## remove .venv, caches and the tiny data set's output, not that of runs with DATA=
	rm -rf .venv .venv-old out/tiny .pytest_cache .ruff_cache __pycache__ */__pycache__ tests/*/__pycache__
	@rmdir out 2>/dev/null || true
