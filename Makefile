# Every target sets up .venv from nothing by itself; nothing else knows how to install.
#   make demo | test | test-configs | lint | setup      (PYTHON=python3.12 chooses that of a new .venv)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.setup-done
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10))

.PHONY: setup demo test test-configs lint

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/python tools/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest tests

test-configs: $(STAMP)
	$(BIN)/python -m pytest tests/test_configs.py

# Type checkers cannot follow setup.py's package_dir in place, hence the installed copy.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lib build/typed
	$(PIP) install --quiet --no-deps --no-build-isolation --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy -p instseg

# The stamp is written last, so that an interrupted setup starts again.  The folder projects/ changes when
# a paper is added, which an editable install has to be told.
$(STAMP): constraints.txt setup.py pyproject.toml instseg/install_detectron2.py projects
	@rm -f $@
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { \
		echo "error: instseg needs Python 3.10 or newer, and '$(PYTHON)' is not one; type: make PYTHON=python3.12" >&2; \
		exit 1; }
	@# The metadata of pip are its last files: an environment whose creation was interrupted has none.
	@$(BIN)/python -c 'import importlib.metadata as m; m.version("pip"); $(NEW_ENOUGH)' 2>/dev/null \
		|| $(PYTHON) -m venv --clear $(VENV)
	@echo "setup: installing into $(VENV) (the first time some minutes and 5 GB, most of it torch)"
	@$(PIP) install --quiet --constraint constraints.txt setuptools wheel torch torchvision
	@$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[convert,demo,lint,test]'
	@$(BIN)/python instseg/install_detectron2.py --constraint constraints.txt
	@# opencv-python needs libGL and libglib of the system; the headless wheel is the same without them.
	@reason=$$($(BIN)/python -c 'import cv2' 2>&1) || case "$$reason" in \
		*"cannot open shared object file"*) \
			echo "setup: a system library is missing, taking opencv-python-headless ($${reason##*ImportError: })"; \
			$(PIP) install --quiet --constraint constraints.txt --no-deps --force-reinstall opencv-python-headless && \
			$(BIN)/python -c 'import cv2';; \
		*) echo "$$reason" >&2; exit 1;; \
	esac
	@touch $@
