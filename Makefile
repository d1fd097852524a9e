# Each target's work is a Python command, so that it can be had without make: python -m course_lib.run TARGET
# PYTHON is any Python 3.11 or newer; the course builds an environment of its own from it (.venv).
# TORCH=cpu takes the CPU-only PyTorch from its own index: a tenth of the download. ARGS is passed on.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
ARGS ?=
TARGETS := lab test progress reset run data bench docs docs-serve clean edit outputs test-slow test-all setup help

.DEFAULT_GOAL := help
.PHONY: $(TARGETS)

$(TARGETS):
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found. Install one, or name it: make $@ PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m course_lib.run $@ $(if $(filter cpu,$(TORCH)),--torch-index https://download.pytorch.org/whl/cpu) $(ARGS)
