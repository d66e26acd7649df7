# Agent distillation, the whole pipeline. `make help` lists the targets; `make reproduce` runs the miniature.
#
#   make reproduce                               15 minutes on 2 CPU cores, after the set-up
#   make reproduce SIZES="S M L" SEEDS="0 1 2"   three sizes, three seeds
#   make test                                    the tests
#
# On a machine that already has the packages: make PYTHON=python3 VENV= test

PYTHON ?= python3
VENV ?= .venv
SIZES ?= S M
SEEDS ?= 0
# Stages that do not depend on each other run at the same time, each on its share of the cores.
JOBS ?= 2
THREADS ?= 1
RUNS ?= runs/miniature

ifeq ($(VENV),)
RUN := $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
endif
export OMP_NUM_THREADS := $(THREADS)
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup reproduce miniature-seed report test test-interop bench lint clean
.DELETE_ON_ERROR:
.SECONDARY:

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

setup: $(READY)  ## make .venv with the pinned packages
$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# ------------------------------------------------------------------------------------------------
# The miniature. Every file below is made by the line under it; whatever is there already is kept, so
# that an interrupted `make reproduce` continues. One recursion a seed, pattern rules over sizes (%).
# ------------------------------------------------------------------------------------------------

# A make that was killed may leave stages at work; the lock makes the next one wait for them.
LOCK = $(if $(shell command -v flock),flock $(RUNS)/.lock)
reproduce: $(READY)  ## the miniature, offline: world, teacher, students, evaluation, table
	@mkdir -p $(RUNS)
	@for seed in $(SEEDS); do \
	  $(LOCK) $(MAKE) --no-print-directory -j$(JOBS) miniature-seed SEED=$$seed || exit; \
	done
	@$(RUN) evaluate.py report $(RUNS)

SEED ?= 0
D := $(RUNS)/seed$(SEED)
EVALUATIONS := agent.greedy agent.sc8 cot.cot cot.cot-rag base.cot base.agent
# The first-thought prefix is a second agent student: at one size by default, so that the miniature stays short.
PREFIX_SIZES ?= S
miniature-seed: $(foreach size,$(SIZES),$(EVALUATIONS:%=$(D)/eval/$(size).%/results.json)) \
  $(foreach size,$(filter $(PREFIX_SIZES),$(SIZES)),$(D)/eval/$(size).prefix.greedy/results.json)

# 1. World: passages, training questions, eight test sets.
$(D)/world/.done:
	$(RUN) miniature.py world --out $(@D) --seed $(SEED)
	touch $@

# 2. Retriever: TF-IDF over the passages.
$(D)/index/.done: $(D)/world/.done
	$(RUN) retriever.py build $(D)/world/passages.jsonl $(@D)
	touch $@

# 3. Teacher: CoT traces (Eq. 2), agent trajectories (Eq. 3), and those with first-thought prefix (Eq. 5), over HTTP.
COLLECT = $(RUN) agent_distill.py collect $(D)/world/train.jsonl --url \$$TEACHER_URL --seed $(SEED) --concurrency 3
$(D)/teacher/cot.train.jsonl: $(D)/world/.done
	$(RUN) miniature.py teacher $(D)/world --then "$(COLLECT) --method cot --out $(D)/teacher/cot.jsonl"
	$(RUN) agent_distill.py filter $(D)/teacher/cot.jsonl --out $@
$(D)/teacher/agent.train.jsonl: $(D)/index/.done
	$(RUN) miniature.py teacher $(D)/world \
	  --then "$(COLLECT) --search $(D)/index --top-k 2 --out $(D)/teacher/agent.jsonl"
	$(RUN) agent_distill.py filter $(D)/teacher/agent.jsonl --out $@
$(D)/teacher/prefix.train.jsonl: $(D)/index/.done $(D)/teacher/cot.train.jsonl
	$(RUN) miniature.py teacher $(D)/world --then "$(COLLECT) --search $(D)/index --top-k 2 \
	  --first-thought --cot $(D)/teacher/cot.jsonl --out $(D)/teacher/prefix.jsonl"
	$(RUN) agent_distill.py filter $(D)/teacher/prefix.jsonl --out $@

# 4. Students: a base from scratch, then fine-tuned on assistant tokens only (Eq. 2 and Eq. 4).
TRAIN = $(RUN) train.py --tuning full --schedule cosine --lr 3e-3 --warmup-steps 30 --weight-decay 0.05 --beta2 0.98 \
        --batch-tokens 2048 --epochs 1 --seed $(SEED)
$(D)/%/base/.done: $(D)/world/.done
	$(RUN) miniature.py base --world $(D)/world --size $* --out $(@D) --seed $(SEED)
	touch $@
$(D)/%/cot/.done: $(D)/%/base/.done $(D)/teacher/cot.train.jsonl
	$(TRAIN) $(D)/teacher/cot.train.jsonl --model $(D)/$*/base --out $(@D)
	touch $@
$(D)/%/agent/.done: $(D)/%/base/.done $(D)/teacher/agent.train.jsonl
	$(TRAIN) $(D)/teacher/agent.train.jsonl --model $(D)/$*/base --out $(@D) \
	  --system-prompt prompts/agent_student_system.txt
	touch $@
$(D)/%/prefix/.done: $(D)/%/base/.done $(D)/teacher/prefix.train.jsonl
	$(TRAIN) $(D)/teacher/prefix.train.jsonl --model $(D)/$*/base --out $(@D) \
	  --system-prompt prompts/agent_student_system.txt
	touch $@

# 5. Evaluation: eight tasks, greedy and SC-action; the untrained base under the same prompts.
EVALUATE = $(RUN) evaluate.py $(D)/world/test/*.jsonl --out $(@D) --name $* --max-tokens 150 --batch 32 --seed $(SEED)
SEARCH = --search $(D)/index --top-k 2
AGENT_PROMPT = --system-prompt prompts/agent_student_system.txt
$(D)/eval/%.base.cot/results.json: $(D)/%/base/.done
	$(EVALUATE) --model $(D)/$*/base --method cot --training none
$(D)/eval/%.base.agent/results.json: $(D)/%/base/.done $(D)/index/.done
	$(EVALUATE) --model $(D)/$*/base --method agent --training none $(SEARCH) $(AGENT_PROMPT) --max-tokens 60
$(D)/eval/%.cot.cot/results.json: $(D)/%/cot/.done
	$(EVALUATE) --model $(D)/$*/cot --method cot
$(D)/eval/%.cot.cot-rag/results.json: $(D)/%/cot/.done $(D)/index/.done
	$(EVALUATE) --model $(D)/$*/cot --method cot-rag $(SEARCH)
$(D)/eval/%.agent.greedy/results.json: $(D)/%/agent/.done $(D)/index/.done
	$(EVALUATE) --model $(D)/$*/agent --method agent $(SEARCH)
$(D)/eval/%.agent.sc8/results.json: $(D)/%/agent/.done $(D)/index/.done
	$(EVALUATE) --model $(D)/$*/agent --method agent $(SEARCH) --sc 8
$(D)/eval/%.prefix.greedy/results.json: $(D)/%/prefix/.done $(D)/index/.done
	$(EVALUATE) --model $(D)/$*/prefix --method agent --training distill+prefix $(SEARCH)

report: $(READY)  ## the tables of what has been run so far
	@$(RUN) evaluate.py report $(RUNS)

# ------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------

test: $(READY)  ## the tests, 3 minutes on 2 CPU cores
	$(RUN) -m pytest tests --ignore-glob='*_interop.py'

# Peers (trl, peft, bm25s, faiss, math-verify, ...) and ruff, in environments of their own.
ifneq ($(VENV),)
DEV := $(VENV)-dev
DEV_READY := $(DEV)/.ready
DEV_RUN := $(DEV)/bin/python
RUFF := $(VENV)-ruff/bin/ruff
else
DEV_RUN := $(PYTHON)
RUFF := ruff
endif
$(VENV)-dev/.ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(DEV)
	$(DEV_RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@
$(VENV)-ruff/bin/ruff:
	$(PYTHON) -m venv $(VENV)-ruff
	$(VENV)-ruff/bin/python -m pip install --quiet --disable-pip-version-check ruff==0.17.5

test-interop: $(DEV_READY)  ## the tests against trl, peft, scikit-learn, bm25s, faiss, math-verify
	$(DEV_RUN) -m pytest tests/*_interop.py

bench: $(DEV_READY)  ## speed and memory beside the peers; RETRIEVAL and BENCHMARKS name folders with real questions
	$(DEV_RUN) bench/sandbox.py own
	$(DEV_RUN) bench/sandbox.py peers
	$(DEV_RUN) bench/train.py
	$(DEV_RUN) bench/retriever.py dense
ifdef RETRIEVAL
	for what in recall speed serve; do $(DEV_RUN) bench/retriever.py $$what \
	  --questions $(RETRIEVAL)/hotpotqa_train.json --corpus $(RETRIEVAL)/hotpotqa_train_corpus.json || exit; done
endif
ifdef BENCHMARKS
	for what in speed agree; do $(DEV_RUN) bench/grade.py $$what --data $(BENCHMARKS) || exit; done
endif

lint: $(if $(VENV),$(RUFF))  ## ruff, format and rules
	$(RUFF) check .
	$(RUFF) format --check .

clean:  ## remove the runs; environments stay
	rm -rf runs
