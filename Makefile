# Everything works from a fresh clone; each target does only what is not done yet.
ENGINE ?= auto
PYTHON ?= python3
ARGS   ?=
TESTS  ?= tests/e2e tests/integration tests/unit
export PYTHON ARGS ENGINE TESTS
MODEL  := .models/SmolLM2-135M-Instruct
# Debian's releases for test-broker, and what it runs there.
RELEASES     ?= bookworm trixie
BROKER_TESTS := $(wildcard $(addprefix tests/integration/test_,broker_faults.py collector.py \
    consumer.py policies.py private_node.py producer_faults.py publisher.py roles.py tls.py worker.py))

.DEFAULT_GOAL := help
.PHONY: help setup demo adapter secrets test test-debian13 test-ubuntu test-broker broker-tests test-hpc test-compose test-monitoring check docs dashboards previews lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## system packages, .venv with an engine (ENGINE=cpu|cuda|auto), the demo model
	@setup/system.sh
	@setup/python.sh $(ENGINE)
	@.venv/bin/python setup/demo_model.py

demo: setup ## verify the sample claims with a real broker and a real engine
	@rm -rf results/demo # a finished run would only be reported again
	.venv/bin/keepwarm run samples/claims.jsonl --model $(MODEL) --adapter samples/adapter --prompt samples/prompt.yaml --out results/demo

adapter: setup ## train samples/adapter anew, in under an hour on two cores
	.venv/bin/python -m pip install -qq --editable '.[training]'
	.venv/bin/python training/claims.py --out results/adapter
	.venv/bin/python training/train_adapter.py results/adapter/train.jsonl \
	    --development results/adapter/development.jsonl \
	    --development results/adapter/validation.jsonl \
	    --model $(MODEL) --prompt samples/prompt.yaml --out samples/adapter \
	    --first-layer 15 --epochs 1

secrets: ## passwords and .env for docker compose; what is there is kept
	@$(PYTHON) setup/compose_secrets.py

test: ## all tests but those of clusters, containers and monitoring, with a real broker, engine and PostgreSQL (ARGS='-k drain')
	@setup/system.sh --with-tests
	@setup/python.sh $(ENGINE)
	@.venv/bin/python setup/demo_model.py
	.venv/bin/pytest $(TESTS) -n 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-debian13: ## make test in a Debian 13, made by debootstrap in .debian/trixie; as root
	@setup/system.sh --with-debootstrap
	$(PYTHON) -m tests.in_debian trixie make test

test-ubuntu: ## make test in an Ubuntu 24.04, made by debootstrap in .debian/noble; as root
	@setup/system.sh --with-debootstrap
	$(PYTHON) -m tests.in_debian noble make test

test-broker: ## the broker's tests on RabbitMQ 3.10 (Debian 12) and 4.0 (Debian 13); as root
	@setup/system.sh --with-debootstrap
	for release in $(RELEASES); do $(PYTHON) -m tests.in_debian $$release make broker-tests || exit; done

broker-tests:
	@setup/system.sh --with-tests
	@setup/python.sh services
	@dpkg-query --show rabbitmq-server
	.venv/bin/pytest $(BROKER_TESTS) -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-hpc: ## batch jobs on a real Slurm, and what builds the images of apptainer/; as root
	@setup/system.sh --with-hpc
	@setup/python.sh services
	.venv/bin/pytest tests/hpc tests/images -n 2 --dist loadfile $(ARGS)

test-compose: ## docker-compose.yml on a Docker daemon of its own, with the CPU engine; as root
	@setup/system.sh --with-compose
	@setup/python.sh cpu
	@.venv/bin/python setup/demo_model.py
	.venv/bin/pytest tests/compose $(ARGS)

test-monitoring: ## dashboards and alert rules, against a real Prometheus
	@setup/system.sh --with-prometheus
	@setup/python.sh $(ENGINE)
	@.venv/bin/python setup/demo_model.py
	.venv/bin/pytest tests/monitoring -n 2 --dist loadfile $(ARGS)

check: ## lint, types and unit tests, in seconds and without an engine
	@setup/python.sh services
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy --strict services
	.venv/bin/pytest tests/unit -q $(ARGS)

docs: ## make the tables of docs/settings.md and the screens of docs/screens.md anew
	@.venv/bin/python setup/settings_page.py
	@.venv/bin/python setup/screens_page.py

dashboards: ## make grafana/dashboards/*.json anew
	@.venv/bin/python -m grafana.make

previews: ## make docs/dashboard-*.png anew, from a run that takes some minutes
	@setup/system.sh --with-prometheus
	@setup/python.sh $(ENGINE)
	@.venv/bin/python setup/demo_model.py
	.venv/bin/python -m tests.monitoring.previews

lock: ## rewrite setup/requirements/*.lock (ARGS=--upgrade for newer versions)
	@setup/lock.sh $(ARGS)

clean: ## remove .venv, the demo model and caches; results stay
	rm -rf .venv .debian .models .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
