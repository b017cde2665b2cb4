PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.set-up
CONFIG = configs/quick/deqdet_shapes.yaml
OUTPUT = output/demo
# Keeps freed tensors in the heap: without it, CPU training spends much of its time in page faults.
MALLOC = MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824

DOWNLOAD_FAILED = { echo "make setup: pip failed (its error is above): check the network and the disk, then say make again" >&2; exit 1; }

.PHONY: help setup demo test lint

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(STAMP)  ## make .venv with torch, detectron2 and this package (about 6 GB, some minutes, once)

$(STAMP): setup.py pyproject.toml tools/install_detectron2.py tools/detectron2-28fd05ee.sha256
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make setup needs Python 3.10 or later: PYTHON=$(PYTHON) is missing or older; say make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo "make setup could not make $(VENV): on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --no-compile torchvision || $(DOWNLOAD_FAILED)
	$(BIN)/python tools/install_detectron2.py
	@$(BIN)/python -m pip install --no-compile -e '.[dev]' || $(DOWNLOAD_FAILED)
	@# Bytecode is made here, by all cores, and not by pip, which uses one. A few files are for other releases of Python.
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true
	@touch $@

demo: setup  ## train DEQDet on generated shapes with two CPU processes, and report what came of it
	$(MALLOC) OMP_NUM_THREADS=1 $(BIN)/python tools/train_net.py --config-file $(CONFIG) --num-gpus 2 --resume OUTPUT_DIR $(OUTPUT)
	OMP_NUM_THREADS=1 $(BIN)/python tools/report.py --config-file $(CONFIG) OUTPUT_DIR $(OUTPUT)

# The tests start many commands, so Python stores the package's bytecode, even where it is told not to.
test: setup  ## run the tests, in two processes
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup  ## check the style
	$(BIN)/python -m ruff check .
