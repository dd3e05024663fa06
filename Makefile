# make app   creates .venv, installs requirements.txt and serves the app on http://127.0.0.1:7860
# make test  installs requirements-dev.txt as well, then runs the test suite; make test-all runs its long tests too

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: app test test-all lint screenshots

app: .venv/installed
	.venv/bin/python app.py

test: .venv/installed-dev lint
	.venv/bin/python -m pytest -n 2 --dist loadfile

test-all: .venv/installed-dev lint
	.venv/bin/python -m pytest -n 2 --dist loadfile -m ''

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/oxlint --deny-warnings app/static vca/explorer/static
	.venv/bin/mypy vca

screenshots: .venv/installed-dev
	.venv/bin/python -m scripts.screenshots docs

.venv/installed: requirements.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; found: $$(python3 --version 2>&1). Install one, or name it: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
