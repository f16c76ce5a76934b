# Everything runs in .venv, which is made on first use and kept while pyproject.toml is unchanged.
PYTHON ?= python3
PIP_FLAGS ?=
ARGS ?=
ready := .venv/.installed

.PHONY: demo compare bench style check test docs clean

demo: $(ready)
	.venv/bin/python examples/demo.py $(ARGS)

compare: $(ready)
	.venv/bin/python examples/compare.py $(ARGS)

bench: $(ready)
	.venv/bin/python -m benchmarks $(ARGS)

style: $(ready)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# What a minute or two tell: style, types, and the tests of axes, blocks, tracing and imports.
check: style
	.venv/bin/python -m pytest -n 2 tests/test_architecture.py tests/test_axes.py tests/test_tracing.py $(ARGS)

test: $(ready)
	.venv/bin/python -m pytest $(ARGS)

docs: .venv/.installed-docs
	.venv/bin/python -m mkdocs build --strict $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info demo-output .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(ready): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x .venv/bin/python || $(PYTHON) -m venv --without-pip .venv
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || { $(get_pip); }
	.venv/bin/python -m pip install $(PIP_FLAGS) -e '.[test,demo]'
	@touch $@

.venv/.installed-docs: $(ready)
	.venv/bin/python -m pip install $(PIP_FLAGS) -e '.[docs]'
	@touch $@

# Debian keeps ensurepip in python3-venv; where that is missing, pip comes from its own project.
define get_pip
.venv/bin/python -m ensurepip >/dev/null 2>&1 || { \
	.venv/bin/python -c 'import urllib.request as u; u.urlretrieve("https://bootstrap.pypa.io/get-pip.py", ".venv/get-pip.py")' \
	&& .venv/bin/python .venv/get-pip.py --quiet; \
} || { echo "Python has no pip; install python3-venv, then try again." >&2; exit 1; }
endef
