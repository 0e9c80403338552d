# Two commands do everything: `make demo` and `make test`. Both make .venv/ when it is missing.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo test lint clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,app]"
	touch $@

# The whole story: simulate cells, convert, train, sample, evaluate.
demo: .venv/installed
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	$(BIN)/dcm-simulate --out $(DEMO)/cells.h5ad --num-cells 5000 --num-genes 100
	$(BIN)/dcm-convert $(DEMO)/cells.h5ad --out $(DEMO)/shards --cell-type-key cell_type --perturbation-key perturbation --control control
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		training/train.py --config training/configs/demo.yaml --data $(DEMO)/shards --out $(DEMO)/checkpoint
	$(BIN)/dcm-sample $(DEMO)/checkpoint --out $(DEMO)/generated.h5ad --like $(DEMO)/shards/test.h5ad
	$(BIN)/dcm-evaluate $(DEMO)/generated.h5ad --real $(DEMO)/shards/test.h5ad --train $(DEMO)/shards/train.h5ad --out $(DEMO)/results

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal --durations=10

lint: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv $(DEMO)
