# Agent distillation, the whole pipeline. `make help` lists the targets; `make reproduce` runs the miniature.
#
#   make reproduce                               12 minutes on 2 CPU cores, after the set-up
#   make reproduce SIZES="S M L" SEEDS="0 1 2"   three sizes, three seeds
#   make test                                    the tests
#
# On a machine that already has the packages: make PYTHON=python3 VENV= test

PYTHON ?= python3
VENV ?= .venv
SIZES ?= S M
SEEDS ?= 0
# Training questions, and test questions for each of the eight tasks.
QUESTIONS ?= 8000
TESTS ?= 50
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
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 27

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
	@printf '\nThe teacher without and with first-thought prefix:\n'; cat $(SEEDS:%=$(RUNS)/seed%/teacher/gain.md)

SEED ?= 0
D := $(RUNS)/seed$(SEED)
EVALUATIONS := agent.greedy agent.sc8 cot.cot cot.cot-rag base.cot base.agent
# What the first-thought prefix gains the teacher is measured on some of the questions. A second agent student that
# learns from such trajectories (PREFIX_SIZES=S) takes three minutes more.
PREFIX_QUESTIONS ?= 2000
PREFIX_SIZES ?=
miniature-seed: $(foreach size,$(SIZES),$(EVALUATIONS:%=$(D)/eval/$(size).%/results.json)) $(D)/teacher/gain.md \
  $(foreach size,$(filter $(PREFIX_SIZES),$(SIZES)),$(D)/eval/$(size).prefix.greedy/results.json)

# 1. World: passages, training questions, eight test sets.
$(D)/world/.done:
	$(RUN) miniature.py world --out $(@D) --seed $(SEED) --train-questions $(QUESTIONS) --test-questions $(TESTS)
	touch $@

# 2. Retriever: TF-IDF over the passages.
$(D)/index/.done: $(D)/world/.done
	$(RUN) retriever.py build $(D)/world/passages.jsonl $(@D)
	touch $@

# 3. Teacher: CoT traces (Eq. 2), agent trajectories (Eq. 3), and those with first-thought prefix (Eq. 5), over HTTP.
SEARCH = --search $(D)/index --top-k 1
COLLECT = $(RUN) agent_distill.py collect $(D)/world/train.jsonl --url \$$TEACHER_URL --seed $(SEED) --concurrency 3
$(D)/teacher/cot.train.jsonl: $(D)/world/.done
	$(RUN) miniature.py teacher $(D)/world --then "$(COLLECT) --method cot --out $(D)/teacher/cot.jsonl"
	$(RUN) agent_distill.py filter $(D)/teacher/cot.jsonl --out $@
$(D)/teacher/agent.train.jsonl: $(D)/index/.done
	$(RUN) miniature.py teacher $(D)/world \
	  --then "$(COLLECT) $(SEARCH) --out $(D)/teacher/agent.jsonl"
	$(RUN) agent_distill.py filter $(D)/teacher/agent.jsonl --out $@
COLLECT_PREFIX = $(COLLECT) $(SEARCH) --first-thought --cot $(D)/teacher/cot.jsonl \
  --out $(D)/teacher/prefix.jsonl
$(D)/teacher/gain.md: $(D)/teacher/agent.train.jsonl $(D)/teacher/cot.train.jsonl
	$(RUN) miniature.py teacher $(D)/world --then "$(COLLECT_PREFIX) --limit $(PREFIX_QUESTIONS)"
	$(RUN) agent_distill.py prefix-gain $(D)/teacher/agent.jsonl $(D)/teacher/prefix.jsonl > $@.new
	mv $@.new $@
$(D)/teacher/prefix.train.jsonl: $(D)/teacher/gain.md
	$(RUN) miniature.py teacher $(D)/world --then "$(COLLECT_PREFIX)"
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
AGENT_PROMPT = --system-prompt prompts/agent_student_system.txt
$(D)/eval/%.base.cot/results.json: $(D)/%/base/.done
	$(EVALUATE) --model $(D)/$*/base --method cot --training none
$(D)/eval/%.base.agent/results.json: $(D)/%/base/.done $(D)/index/.done
	$(EVALUATE) --model $(D)/$*/base --method agent --training none $(SEARCH) $(AGENT_PROMPT) --max-tokens 40 --max-steps 3
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
# The paper: its models, data and tasks, on one GPU and with a network. `make paper` prints what it
# will take and asks (YES=1: does not); each stage is a target, kept when done, continued when cut off.
# `make rehearse` runs these same lines offline, on stand-ins, in minutes.
#
#   make paper STUDENT=Qwen/Qwen2.5-0.5B-Instruct               the authors' published trajectories
#   make paper PASSAGES=e5                                      their retriever: 65 GB of RAM or GPU memory
#   make paper TEACHER_URL=http://... TEACHER_MODEL=...         trajectories of your own teacher
# ------------------------------------------------------------------------------------------------

STUDENT ?= Qwen/Qwen2.5-0.5B-Instruct
# wiki: Wikipedia 2018, its sparse index built here; e5: the published vectors; or a JSONL file; or a /retrieve URL.
PASSAGES ?= wiki
TEACHER_URL ?=
TEACHER_MODEL ?=
# An LLM judge for factual answers, as in the paper; without it, exact match. The key: $OPENAI_API_KEY.
JUDGE_URL ?=
JUDGE_MODEL ?= gpt-4o-mini
GPUS ?= 1
PAPER ?= runs/paper
# Another table of sources; hub=https://... or github=https://..., tried before the host. The Hub's key: $HF_TOKEN.
SOURCES ?=
MIRRORS ?=
MAX_TOKENS ?= 1024
PAPER_ROWS ?= base.cot base.agent base.agent.sc8 cot.cot cot.cot-rag agent.greedy agent.sc8 prefix.greedy prefix.sc8

.PHONY: paper paper-plan paper-data paper-passages paper-trajectories paper-train paper-evaluate \
  paper-authors paper-report rehearse
FETCH_OPTIONS = --to $(PAPER) $(SOURCES:%=--sources %) $(MIRRORS:%=--mirror %)
# Models are found by their names in what was downloaded, and nowhere else.
OFFLINE = HF_HUB_CACHE=$(abspath $(PAPER))/hub HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$(shell getconf _NPROCESSORS_ONLN)
TORCHRUN = $(if $(filter-out 1,$(GPUS)),-m torch.distributed.run --standalone --nproc-per-node $(GPUS))
SERVED := $(filter http://% https://%,$(PASSAGES))
PASSAGES_NAME := $(if $(SERVED),served,$(basename $(notdir $(PASSAGES))))
TEACHER := $(if $(TEACHER_URL),$(or $(notdir $(TEACHER_MODEL)),teacher)-$(PASSAGES_NAME),published)
PLAN := $(PAPER)/plan/$(notdir $(STUDENT)).$(PASSAGES_NAME).json
INDEX := $(PAPER)/index/$(PASSAGES_NAME)
INDEX_DONE := $(if $(SERVED),,$(INDEX)/.done)
SEARCH_PASSAGES = --search $(or $(SERVED),$(INDEX)) --top-k 3
TRAJECTORIES := $(PAPER)/trajectories/$(TEACHER)
TRAINED := $(PAPER)/students/$(TEACHER)/$(notdir $(STUDENT))
RESULTS := $(PAPER)/results/$(TEACHER).$(PASSAGES_NAME)

paper: paper-report  ## the paper's experiment: asks first, then everything below, on one GPU

paper-plan: $(PLAN)  ## hours, disk, memory and download here, for each kind of passages
$(PLAN): | $(READY)
	$(RUN) paper.py plan --student $(STUDENT) --passages $(PASSAGES) --out $@ --gpus $(GPUS) $(if $(YES),--yes) \
	  $(if $(TEACHER_URL),--teacher) $(FETCH_OPTIONS)

paper-data: $(PAPER)/tasks/.done $(PAPER)/hub/$(notdir $(STUDENT)).done  ## download the questions and the student
$(PAPER)/tasks/.done: | $(PLAN)
	$(RUN) sources.py download benchmarks $(FETCH_OPTIONS)
	$(RUN) paper.py tasks $(PAPER)/download/Nardien/agent-distillation --out $(@D)
	touch $@
$(PAPER)/hub/$(notdir $(STUDENT)).done: | $(PLAN)
	$(RUN) sources.py download $(STUDENT) $(FETCH_OPTIONS)
	mkdir -p $(@D) && touch $@

paper-passages: $(INDEX_DONE)  ## download and index the passages
$(PAPER)/passages.jsonl: | $(PLAN)
	$(RUN) sources.py download wiki-18 $(FETCH_OPTIONS)
	$(RUN) paper.py unpack $(PAPER)/download/PeterJinGo/wiki-18-corpus/wiki-18.jsonl.gz --out $@
$(PAPER)/index/wiki/.done: $(PAPER)/passages.jsonl
	$(RUN) retriever.py build $< $(@D) --kind bm25
	touch $@
$(PAPER)/index/e5/.done: $(PAPER)/passages.jsonl
	$(RUN) sources.py download e5-index intfloat/e5-base-v2 $(FETCH_OPTIONS)
	$(OFFLINE) $(RUN) retriever.py build $< $(@D) --kind dense --encoder intfloat/e5-base-v2 \
	  --vectors $(abspath $(PAPER))/download/PeterJinGo/wiki-18-e5-index/e5_Flat.index
	touch $@
ifeq ($(filter wiki e5,$(PASSAGES))$(SERVED),)
$(INDEX)/.done: $(PASSAGES) | $(PLAN)
	$(RUN) retriever.py build $< $(@D) --kind bm25
	touch $@
endif

# One trajectory a question, right answers only: as published, or asked of a teacher (Eq. 2, Eq. 3, Eq. 5).
paper-trajectories: $(foreach kind,cot agent prefix,$(TRAJECTORIES)/$(kind).train.jsonl)  ## download or generate them
TEACHER_DATA = $(PAPER)/download/agent-distillation/Qwen2.5-32B-Instruct_
PUBLISHED_cot = cot_trajectories_2k
PUBLISHED_agent = agent_trajectories_2k
PUBLISHED_prefix = agent_trajectories_2k_prefix
$(PAPER)/trajectories/published/%.train.jsonl: | $(PLAN)
	$(RUN) sources.py download $*-trajectories $(FETCH_OPTIONS)
	$(RUN) paper.py trajectories $(TEACHER_DATA)$(PUBLISHED_$*) --out $@
ifneq ($(TEACHER_URL),)
COLLECT_PAPER = $(RUN) agent_distill.py collect $(PAPER)/tasks/train/*.jsonl --url $(TEACHER_URL) \
  $(TEACHER_MODEL:%=--model %) --max-steps 5 --max-tokens 1024
$(TRAJECTORIES)/cot.train.jsonl: $(PAPER)/tasks/.done
	$(COLLECT_PAPER) --method cot --out $(@D)/cot.jsonl
	$(RUN) agent_distill.py filter $(@D)/cot.jsonl --out $@
$(TRAJECTORIES)/agent.train.jsonl: $(PAPER)/tasks/.done $(INDEX_DONE)
	$(OFFLINE) $(COLLECT_PAPER) $(SEARCH_PASSAGES) --out $(@D)/agent.jsonl
	$(RUN) agent_distill.py filter $(@D)/agent.jsonl --out $@
$(TRAJECTORIES)/prefix.train.jsonl: $(TRAJECTORIES)/cot.train.jsonl $(INDEX_DONE)
	$(OFFLINE) $(COLLECT_PAPER) $(SEARCH_PASSAGES) --first-thought --cot $(@D)/cot.jsonl --out $(@D)/prefix.jsonl
	$(RUN) agent_distill.py filter $(@D)/prefix.jsonl --out $@
endif

# LoRA on all linear layers, loss on assistant tokens only (Eq. 2 and Eq. 4).
paper-train: $(foreach kind,cot agent prefix,$(TRAINED)/$(kind)/summary.json)  ## fine-tune the student, three times
TRAIN_PAPER = $(OFFLINE) $(RUN) $(TORCHRUN) train.py $< --model $(STUDENT) --out $(@D) $(TRAIN_OPTIONS) \
  --tuning lora --rank 64 --alpha 128 --dropout 0.05 --lr 2e-4 --batch-size 8 --epochs 2 --precision bf16
$(TRAINED)/cot/summary.json: $(TRAJECTORIES)/cot.train.jsonl $(PAPER)/hub/$(notdir $(STUDENT)).done
	$(TRAIN_PAPER) --max-length 4096 --system-prompt prompts/cot_system.txt
$(TRAINED)/%/summary.json: $(TRAJECTORIES)/%.train.jsonl $(PAPER)/hub/$(notdir $(STUDENT)).done
	$(TRAIN_PAPER) --max-length 10240 --system-prompt prompts/agent_student_system.txt

paper-evaluate: $(PAPER_ROWS:%=$(RESULTS)/$(notdir $(STUDENT)).%/.done)  ## all rows of the table, on all eight tasks
EVALUATE_PAPER = $(OFFLINE) $(RUN) $(TORCHRUN) evaluate.py $(PAPER)/tasks/test/*.jsonl --out $(@D) \
  --name $(notdir $(STUDENT)) --max-steps 5 --max-tokens $(MAX_TOKENS) \
  $(if $(JUDGE_URL),--judge-url $(JUDGE_URL) --judge-model $(JUDGE_MODEL)) $(EVALUATE_OPTIONS)
SC_ACTION = --sc 8 --temperature 0.4 --top-p 0.8
ROW := $(RESULTS)/$(notdir $(STUDENT))
$(ROW).base.%/.done: $(PAPER)/tasks/.done $(PAPER)/hub/$(notdir $(STUDENT)).done $(INDEX_DONE)
	$(EVALUATE_PAPER) --model $(STUDENT) --training none --method $(basename $*) \
	  $(if $(filter cot,$*),,$(SEARCH_PASSAGES)) $(if $(filter %.sc8,$*),$(SC_ACTION))
	touch $@
$(ROW).cot.%/.done: $(TRAINED)/cot/summary.json $(PAPER)/tasks/.done $(INDEX_DONE)
	$(EVALUATE_PAPER) --model $(TRAINED)/cot --method $* $(if $(filter cot,$*),,$(SEARCH_PASSAGES))
	touch $@
$(ROW).agent.%/.done: $(TRAINED)/agent/summary.json $(PAPER)/tasks/.done $(INDEX_DONE)
	$(EVALUATE_PAPER) --model $(TRAINED)/agent --method agent $(SEARCH_PASSAGES) $(if $(filter sc8,$*),$(SC_ACTION))
	touch $@
$(ROW).prefix.%/.done: $(TRAINED)/prefix/summary.json $(PAPER)/tasks/.done $(INDEX_DONE)
	$(EVALUATE_PAPER) --model $(TRAINED)/prefix --method agent --training distill+prefix $(SEARCH_PASSAGES) \
	  $(if $(filter sc8,$*),$(SC_ACTION))
	touch $@

# The authors' own student, as an adapter that names its base; it knows search results in their wording.
AUTHORS := agent-distillation/agent_distilled_Qwen2.5-1.5B-Instruct
AUTHORS_FOLDER := $(PAPER)/hub/models--$(subst /,--,$(AUTHORS))/snapshots
AUTHORS_ROWS ?= greedy sc8
paper-authors: $(foreach row,$(AUTHORS_ROWS),$(RESULTS)/authors-1.5B.$(row)/.done)  ## evaluate the authors' 1.5B student
$(PAPER)/prompts-authors/.done: | $(PLAN)
	$(RUN) sources.py download $(AUTHORS) Qwen/Qwen2.5-1.5B-Instruct $(FETCH_OPTIONS)
	mkdir -p $(@D) && cp prompts/*.txt $(@D)
	cp prompts/authors/*.txt $(@D)
	touch $@
$(RESULTS)/authors-1.5B.%/.done: $(PAPER)/prompts-authors/.done $(PAPER)/tasks/.done $(INDEX_DONE)
	$(EVALUATE_PAPER) --name authors-1.5B --model $$(echo $(AUTHORS_FOLDER)/*) --method agent \
	  --prompts $(PAPER)/prompts-authors $(SEARCH_PASSAGES) $(if $(filter sc8,$*),$(SC_ACTION))
	touch $@

paper-report: paper-evaluate  ## the table and the page, beside the paper's figures
	@$(RUN) evaluate.py report $(RESULTS)

REHEARSAL ?= runs/rehearsal
REHEARSED = $(MAKE) --no-print-directory -j$(JOBS) YES=1 MAX_TOKENS=12 PAPER=$(REHEARSAL)/paper \
  SOURCES=$(REHEARSAL)/stand-ins/sources.json
rehearse: $(READY)  ## make paper on small stand-ins, offline: every stage, both indexes, a teacher
	$(RUN) rehearsal.py $(REHEARSAL)/stand-ins --then '$(REHEARSED) paper && \
	  $(REHEARSED) paper PASSAGES=e5 PAPER_ROWS=agent.greedy && \
	  $(REHEARSED) paper-passages PASSAGES=$(REHEARSAL)/stand-ins/world/passages.jsonl && \
	  $(REHEARSED) paper-authors && $(RUN) miniature.py teacher $(REHEARSAL)/stand-ins/world \
	  --then "$(REHEARSED) paper-trajectories TEACHER_URL=\$$TEACHER_URL"'

# ------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------

test: $(READY)  ## the tests, 6 minutes on 2 CPU cores
	$(RUN) -m pytest tests --ignore-glob='*_interop.py'

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
$(VENV)-dev/.ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(DEV)
	$(DEV_RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@
$(VENV)-ruff/bin/ruff:
	$(PYTHON) -m venv $(VENV)-ruff
	$(VENV)-ruff/bin/python -m pip install --quiet --disable-pip-version-check ruff==0.17.5

test-interop: $(DEV_READY)  ## the tests against trl, peft, scikit-learn, bm25s, faiss, math-verify, transformers serve
	$(DEV_RUN) -m pytest tests/*_interop.py

bench: $(DEV_READY)  ## speed and memory beside the peers; RETRIEVAL and BENCHMARKS name folders with real questions
	$(DEV_RUN) bench/sandbox.py own
	$(DEV_RUN) bench/sandbox.py peers
	$(DEV_RUN) bench/train.py
	$(DEV_RUN) bench/evaluate.py
	$(DEV_RUN) bench/collect.py rate
	$(DEV_RUN) bench/collect.py kills
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

clean:  ## remove the miniature's and the rehearsal's runs; environments and runs/paper stay
	rm -rf $(RUNS) $(REHEARSAL)
