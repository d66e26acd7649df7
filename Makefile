# Agent distillation, the whole pipeline. `make help` lists the targets.
#
#   make reproduce                                        the miniature, on 2 CPU cores; its time: see README.md
#   make reproduce STUDENT=Qwen/Qwen2.5-0.5B-Instruct     another student, on the same questions (one GPU)
#   make reproduce TEACHER_URL=http://... TEACHER_MODEL=...  a real teacher instead of the scripted one
#   make test                                             the tests
#
# On a machine that already has the packages: make PYTHON=python3 VENV= test

PYTHON ?= python3
VENV ?= .venv
# One or several students: Hugging Face names or folders. The default comes from the Python package index.
PACKAGED := SmolLM2-135M-Instruct
STUDENT ?= $(PACKAGED)
TEACHER_URL ?=
TEACHER_MODEL ?=
SEEDS ?= 0
# Training questions, and test questions for each of the eight tasks; of these, SC-action answers the first SC_TESTS.
QUESTIONS ?= 200
TESTS ?= 8
SC_TESTS ?= 2
RUNS ?= runs/miniature
# Every text that a model is shown. Another folder needs another RUNS.
PROMPTS ?= prompts
# A student of 135M on a CPU has time for one pass over few questions, so it takes more steps at a higher rate:
#                    the paper    here (other students: as the paper)
#   epochs           2            1
#   batch size       8            2
#   learning rate    2e-4         2e-3, after 5 steps of warm-up
#   LoRA             rank 64      rank 16
#   dropout          0.05         0
# And for every student: 2 passages per search (3), and 128 new tokens (1,024). No reply of the teacher has more.
FAST := --epochs 1 --batch-size 2 --lr 2e-3 --warmup-steps 5 --rank 16 --alpha 32 --dropout 0
TRAIN_OPTIONS ?= $(if $(filter $(PACKAGED),$(STUDENT)),$(FAST))
COLLECT_OPTIONS ?=
# Of agents alone, the teacher's and the students': --tools, --choose, --episode, ...
AGENT_OPTIONS ?=
EVALUATE_OPTIONS ?= --max-tokens 128

ifeq ($(VENV),)
RUN := $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
endif
export TOKENIZERS_PARALLELISM := false
export OMP_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN)
# Idle threads stop spinning early. On idle cores this changes nothing; beside another busy process, SC-action ran at 98
# tokens per second instead of 44.
export GOMP_SPINCOUNT ?= 3000

.PHONY: help setup reproduce one report pictures test test-interop test-real bench lint clean
.DELETE_ON_ERROR:
.SECONDARY:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 27

# The student's wheel asks for packages that the project does not use, so it is installed without them.
setup: $(READY)  ## make .venv with the pinned packages
$(VENV)/.ready: requirements.txt requirements-miniature.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-miniature.txt
	touch $@

# ------------------------------------------------------------------------------------------------
# make reproduce. Every file below is made by the command under it, and kept: an interrupted run continues.
# One recursion for each seed and each student.
# ------------------------------------------------------------------------------------------------

# A killed make may leave a running stage behind. The lock makes the next make wait for it.
LOCK = $(if $(shell command -v flock),flock $(RUNS)/.lock)
# Finished stages are not run again, so a folder of runs keeps one value of what they depend on.
SETTINGS = $(strip questions $(QUESTIONS); tests $(TESTS), $(SC_TESTS); prompts $(PROMPTS); teacher \
  $(if $(TEACHER_URL),$(or $(TEACHER_MODEL),served),$(if $(TEACHER_MODEL),$(error TEACHER_MODEL needs TEACHER_URL),script)); \
  options $(COLLECT_OPTIONS) $(AGENT_OPTIONS) $(EVALUATE_OPTIONS) $(if $(filter file,$(origin TRAIN_OPTIONS)),,$(TRAIN_OPTIONS)))
reproduce: $(READY)  ## the miniature, offline: world, teacher, students, evaluation, table
	@mkdir -p $(RUNS); test -f $(RUNS)/settings || echo '$(SETTINGS)' > $(RUNS)/settings
	@test "$$(cat $(RUNS)/settings)" = '$(SETTINGS)' || { echo "error: $(RUNS) has results with: $$(cat $(RUNS)/settings)"; \
	  echo 'These would be: $(SETTINGS). Give another RUNS='; exit 2; } >&2
	@for seed in $(SEEDS); do for student in $(STUDENT); do \
	  $(LOCK) $(MAKE) --no-print-directory one SEED=$$seed STUDENT=$$student || exit; \
	done; done
	@$(RUN) evaluate.py report $(RUNS)
	@printf '\nThe teacher without and with the first-thought prefix:\n'; cat $(SEEDS:%=$(RUNS)/seed%/teacher/gain.md) < /dev/null

SEED ?= 0
STUDENT_NAME := $(notdir $(patsubst %/,%,$(firstword $(STUDENT))))
D := $(RUNS)/seed$(SEED)
S := $(D)/$(STUDENT_NAME)
ROWS ?= base.agent base.cot agent.greedy agent.sc8 cot.cot cot.cot-rag prefix.greedy prefix.sc8
one: $(D)/seen $(ROWS:%=$(D)/eval/$(STUDENT_NAME).%/.done) $(D)/teacher/gain.md

# 1. World: passages, training questions, eight test sets.
$(D)/world/.done:
	$(RUN) -m miniature.world --out $(@D) --seed $(SEED) --train-questions $(QUESTIONS) --test-questions $(TESTS)
	touch $@

# 2. Retriever: BM25 over the passages.
$(D)/index/.done: $(D)/world/.done
	$(RUN) retriever.py build $(D)/world/passages.jsonl $(@D) --kind bm25
	touch $@

# 3. Teacher: CoT (Eq. 2), agent trajectories (Eq. 3), and some with the first-thought prefix (Eq. 5), over HTTP.
COLLECT = $(RUN) agent_distill.py collect $(D)/world/train.jsonl --seed $(SEED) --prompts $(PROMPTS) $(COLLECT_OPTIONS)
FILTER = $(RUN) agent_distill.py filter --prompts $(PROMPTS)
ifeq ($(TEACHER_URL),)
ASK = $(RUN) -m miniature.teacher $(D)/world --prompts $(PROMPTS) $(TEACHER_OPTIONS) --then "$(COLLECT) --url \$$TEACHER_URL --concurrency 4 $(1)"
else
ASK = $(COLLECT) --url $(TEACHER_URL) $(TEACHER_MODEL:%=--model %) $(1)
endif
SEARCH = --search $(D)/index --top-k 2
AGENT = $(SEARCH) $(AGENT_OPTIONS)
$(D)/teacher/cot.train.jsonl: $(D)/world/.done
	$(call ASK,--method cot --out $(@D)/cot.jsonl)
	$(FILTER) $(@D)/cot.jsonl --out $@
$(D)/teacher/agent.train.jsonl: $(D)/index/.done
	$(call ASK,$(AGENT) --out $(@D)/agent.jsonl)
	$(FILTER) $(@D)/agent.jsonl --out $@
$(D)/teacher/prefix.train.jsonl: $(D)/teacher/cot.train.jsonl $(D)/index/.done
	$(call ASK,$(AGENT) --first-thought $(@D)/cot.jsonl --out $(@D)/prefix.jsonl)
	$(FILTER) $(@D)/prefix.jsonl --out $@
$(D)/teacher/gain.md: $(D)/teacher/agent.train.jsonl $(D)/teacher/prefix.train.jsonl
	$(RUN) evaluate.py compare $(@D)/agent.jsonl $(@D)/prefix.jsonl > $@.new
	mv $@.new $@

# 4. Students: LoRA, loss on the assistant's tokens only (Eq. 2 and Eq. 4).
ifeq ($(STUDENT),$(PACKAGED))
MODEL := $(RUNS)/$(PACKAGED)
$(MODEL)/.done: | $(READY)
	$(RUN) -m miniature.student --out $(@D)
	touch $@
else
MODEL := $(STUDENT)
endif
MODEL_DONE := $(if $(filter $(PACKAGED),$(STUDENT)),$(MODEL)/.done)
# A first look: one of the teacher's trajectories, as the student reads it. Between the marks are the tokens in the loss.
$(D)/seen: $(D)/teacher/agent.train.jsonl $(MODEL_DONE)
	$(RUN) train.py show $< --model $(MODEL) --example 2
	touch $@
$(S)/%/.done: $(D)/teacher/%.train.jsonl $(MODEL_DONE)
	$(RUN) train.py $< --model $(MODEL) --out $(@D) --seed $(SEED) $(TRAIN_OPTIONS)
	touch $@

# 5. Evaluation: eight tasks. The name of a row: what the student learned from, the method, the decoding.
EVALUATE = $(RUN) evaluate.py $(D)/world/test/*.jsonl --out $(@D) --name $(STUDENT_NAME) --seed $(SEED) \
  --prompts $(PROMPTS) $(EVALUATE_OPTIONS)
ROW := $(D)/eval/$(STUDENT_NAME)
# After each row, the table so far.
define FINISHED
touch $@
-@$(RUN) -c 'from common import report; print(report.averages_table("$(RUNS)"))'
endef
# Given the long prompt with examples, the untrained model writes no code that runs: one question per task shows that.
BASE_AGENT ?= --limit 1 --max-steps 3
$(ROW).base.cot/.done: $(D)/world/.done $(MODEL_DONE)
	$(EVALUATE) --model $(MODEL) --method cot
	$(FINISHED)
$(ROW).base.agent/.done: $(D)/index/.done $(MODEL_DONE)
	$(EVALUATE) --model $(MODEL) --method agent $(AGENT) $(BASE_AGENT)
	$(FINISHED)
$(ROW).cot.cot/.done: $(S)/cot/.done
	$(EVALUATE) --model $(<D) --method cot
	$(FINISHED)
$(ROW).cot.cot-rag/.done: $(S)/cot/.done $(D)/index/.done
	$(EVALUATE) --model $(<D) --method cot-rag $(SEARCH)
	$(FINISHED)
$(ROW).%.greedy/.done: $(S)/%/.done $(D)/index/.done
	$(EVALUATE) --model $(<D) --method agent $(AGENT)
	$(FINISHED)
$(ROW).%.sc8/.done: $(S)/%/.done $(D)/index/.done
	$(EVALUATE) --model $(<D) --method agent $(AGENT) --sc 8 --limit $(SC_TESTS)
	$(FINISHED)

report: $(READY)  ## the tables of what has been run so far
	@$(RUN) evaluate.py report $(RUNS)

pictures: $(READY)  ## the README's pictures, from the runs
	@$(RUN) evaluate.py report $(RUNS) > /dev/null
	cp $(RUNS)/bars.svg $(RUNS)/episode.svg pictures/

include paper/paper.mk
include experiments/experiments.mk

# ------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------

# ROOM=train runs tests/test_train.py only. The sandbox's tests mostly wait, so they run beside the others.
OTHER_TESTS := tests --ignore=tests/test_sandbox.py --ignore-glob='*_interop.py' --ignore-glob='*_real.py'
test: $(READY)  ## the tests, 3 minutes on 2 CPU cores
ifdef ROOM
	$(RUN) -m pytest tests/test_$(ROOM).py
else
	@log=$$(mktemp); $(RUN) -m pytest tests/test_sandbox.py > $$log 2>&1 & \
	  $(RUN) -m pytest $(OTHER_TESTS); others=$$?; wait $$!; sandbox=$$?; cat $$log; rm $$log; exit $$((others + sandbox))
endif

# Peers (trl, peft, bm25s, faiss, math-verify, transformers serve, ...) and ruff, in environments of their own.
ifneq ($(VENV),)
DEV := $(VENV)-dev
DEV_READY := $(DEV)/.ready
DEV_RUN := $(DEV)/bin/python
RUFF := $(VENV)-ruff/bin/ruff
else
DEV_RUN := $(PYTHON)
RUFF := ruff
endif
$(VENV)-dev/.ready: requirements.txt requirements-dev.txt requirements-miniature.txt
	$(PYTHON) -m venv $(DEV)
	$(DEV_RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(DEV_RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-miniature.txt
	touch $@
$(VENV)-ruff/bin/ruff:
	$(PYTHON) -m venv $(VENV)-ruff
	$(VENV)-ruff/bin/python -m pip install --quiet --disable-pip-version-check ruff==0.17.5

test-interop: $(DEV_READY)  ## the tests against trl, peft, scikit-learn, bm25s, faiss, math-verify
	$(DEV_RUN) -m pytest tests/*_interop.py

test-real: $(DEV_READY)  ## the tests with a real model: SmolLM2-135M-Instruct, transformers serve, trl, peft
	$(DEV_RUN) -m pytest tests/*_real.py

bench: $(DEV_READY)  ## speed and memory beside the peers; RETRIEVAL and BENCHMARKS name folders with real questions
	$(DEV_RUN) bench/sandbox.py own
	$(DEV_RUN) bench/train.py
	$(DEV_RUN) bench/evaluate.py
	$(DEV_RUN) bench/retriever.py dense
ifdef RETRIEVAL
	for what in recall speed; do $(DEV_RUN) bench/retriever.py $$what \
	  --questions $(RETRIEVAL)/hotpotqa_train.json --corpus $(RETRIEVAL)/hotpotqa_train_corpus.json || exit; done
endif
ifdef BENCHMARKS
	$(DEV_RUN) bench/grading.py agree --data $(BENCHMARKS)
endif

lint: $(if $(VENV),$(RUFF))  ## ruff, format and rules
	$(RUFF) check .
	$(RUFF) format --check .

clean:  ## remove the runs of miniature, experiments and rehearsal; environments and runs/paper stay
	rm -rf $(RUNS) $(RUNS)-experiments $(REHEARSAL)
