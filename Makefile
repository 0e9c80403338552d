# Two commands do everything: `make demo` and `make test`. Both make .venv/ when it is missing.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo test results lint clean

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
		-m training.train --config demo --data $(DEMO)/shards --out $(DEMO)/checkpoint
	$(BIN)/dcm-sample $(DEMO)/checkpoint --out $(DEMO)/generated.h5ad --like $(DEMO)/shards/test.h5ad
	$(BIN)/dcm-evaluate $(DEMO)/generated.h5ad --real $(DEMO)/shards/test.h5ad --train $(DEMO)/shards/train.h5ad --out $(DEMO)/results

# A file of eval/results made anew: three trainings, test cells redrawn from half of their genes, the paper's model, and every baseline (extra `baselines`), e.g.
#   make results DATA=norman_mcfaline_500g.h5ad NAME=norman_mcfaline CONVERT="--cell-type-key cell_type --perturbation-key perturbation --control control"
SEEDS ?= 0 1 2
PROTOCOL ?= paper,log,scldm,cfgen
OUT = results/$(NAME)
LIKE = --like $(OUT)/shards/test.h5ad
TRAINING = $(BIN)/dcm-train --config laptop --data $(OUT)/shards --trackers none $(TRAIN)

results: .venv/installed
	@test -n "$(DATA)" && test -n "$(NAME)" || { echo "make results DATA=cells.h5ad NAME=dataset [CONVERT='--cell-type-key ...'] [TRAIN='--batch-size 32']"; exit 2; }
	$(BIN)/dcm-convert $(DATA) --out $(OUT)/shards --test-fraction 0.25 $(CONVERT)
	for s in $(SEEDS); do \
		$(TRAINING) --out $(OUT)/dcm_$$s --seed $$s && \
		$(BIN)/dcm-sample $(OUT)/dcm_$$s --out $(OUT)/bank_$$s.h5ad $(LIKE) --seed $$s && \
		$(BIN)/dcm-sample $(OUT)/dcm_$$s --out $(OUT)/prior_$$s.h5ad $(LIKE) --seed $$s --state prior && \
		$(BIN)/dcm-impute $(OUT)/dcm_$$s $(OUT)/shards/test.h5ad --out $(OUT)/half_$$s.h5ad --mask-fraction 0.5 --draws 2 --steps 8 --seed $$s || exit 1; \
	done
	$(TRAINING) --out $(OUT)/paper --paper --max-time 10
	for s in $(SEEDS); do \
		$(BIN)/dcm-sample $(OUT)/paper --out $(OUT)/paper_$$s.h5ad $(LIKE) --seed $$s --steps 100 --schedule linear || exit 1; \
	done
	$(BIN)/dcm-evaluate $(foreach s,$(SEEDS),$(OUT)/bank_$(s).h5ad) $(foreach s,$(SEEDS),$(OUT)/prior_$(s).h5ad) $(foreach s,$(SEEDS),$(OUT)/half_$(s).h5ad) $(foreach s,$(SEEDS),$(OUT)/paper_$(s).h5ad) \
		--name $$(for m in dcm dcm_prior dcm_half_masked dcm_paper; do for s in $(SEEDS); do printf '%s,' $$m; done; done | sed 's/,$$//') \
		--real $(OUT)/shards/test.h5ad --train $(OUT)/shards/train.h5ad --out $(OUT)/evaluation --dataset $(NAME) --protocol $(PROTOCOL) --baselines all

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal --durations=10

lint: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv $(DEMO)
