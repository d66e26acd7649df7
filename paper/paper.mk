# The paper's experiment: its models, data and tasks, on one GPU and with a network. `make paper` says what it needs and
# asks (YES=1: does not ask). Each stage is a target: what is finished is kept, what was interrupted continues.
# `make rehearse` runs these same rules offline, on small stand-ins.
#
#   make paper STUDENT=Qwen/Qwen2.5-0.5B-Instruct               the authors' published trajectories
#   make paper PASSAGES=pooled                                  small: 27,586 passages, 100 questions per task
#   make paper PASSAGES=e5                                      their retriever: 65 GB of RAM or GPU memory
#   make paper TEACHER_URL=http://... TEACHER_MODEL=...         trajectories of your own teacher
#   make paper TRAJECTORIES=folder QUESTIONS=folder PASSAGES=file.jsonl.gz STUDENT=folder    no network, no question

PAPER ?= runs/paper
# The Makefile's own defaults of STUDENT, QUESTIONS, TESTS and SC_TESTS are the miniature's.
given = $(if $(filter file undefined,$(origin $(1))),,$($(1)))
PAPER_STUDENT := $(patsubst %/,%,$(or $(firstword $(call given,STUDENT)),Qwen/Qwen2.5-0.5B-Instruct))
# wiki: Wikipedia 2018, BM25 built here; e5: the published vectors; pooled: the paragraphs of the pooled questions; or a
# JSONL file, also gzipped; or the URL of a /retrieve server.
PASSAGES ?= wiki
# A folder with agent.jsonl and cot.jsonl, of `agent_distill.py collect` or in the authors' format (or *.parquet).
TRAJECTORIES ?=
# A folder of task files (*.jsonl) to test on.
PAPER_QUESTIONS := $(call given,QUESTIONS)
# The first n questions of each task, and of those n for the rows with SC-action; all without them.
PAPER_TESTS := $(or $(call given,TESTS),$(if $(filter pooled,$(PASSAGES)),100))
PAPER_SC_TESTS := $(or $(call given,SC_TESTS),$(PAPER_TESTS))
# New tokens: of one step of an agent, and of one chain of thought.
AGENT_TOKENS ?= 1024
COT_TOKENS ?= 1024
# An LLM judge for factual answers, as in the paper; without it, exact match. Its key: $OPENAI_API_KEY.
JUDGE_URL ?=
JUDGE_MODEL ?= gpt-4o-mini
GPUS ?= 1
# What the student learned from, then how it answers. `prefix`: trajectories with the first-thought prefix.
PAPER_ROWS ?= base.cot base.agent cot.cot cot.cot-rag agent.greedy agent.sc8 \
  $(if $(filter pooled,$(PASSAGES))$(TRAJECTORIES),,base.agent.sc8 prefix.greedy prefix.sc8)
# Further options; they override those of the rules.
PAPER_TRAIN_OPTIONS ?=
PAPER_EVALUATE_OPTIONS ?=

.PHONY: paper paper-data paper-passages paper-trajectories paper-train paper-evaluate paper-report paper-authors \
  rehearse rehearse-wiki rehearse-e5 rehearse-pooled rehearse-local rehearse-authors

# Models are found by their names in what was downloaded, and nowhere else.
OFFLINE = HF_HUB_CACHE=$(abspath $(PAPER))/hub HF_HUB_OFFLINE=1
TORCHRUN = $(if $(filter-out 1,$(GPUS)),-m torch.distributed.run --standalone --nproc-per-node $(GPUS))
DOWNLOADED := $(PAPER)/download
# What local data is called below $(PAPER). The number stands for the whole path: two folders may share their last part.
path_name = $(notdir $(abspath $(1)))-$(firstword $(shell echo $(abspath $(1)) | cksum))

PUBLISHED := $(filter wiki e5 pooled,$(PASSAGES))
SERVED := $(filter http://% https://%,$(PASSAGES))
PASSAGES_NAME := $(if $(SERVED),served,$(or $(PUBLISHED),$(call path_name,$(PASSAGES))))
INDEX := $(PAPER)/index/$(PASSAGES_NAME)
INDEX_DONE := $(if $(SERVED),,$(INDEX)/.done)
PAPER_SEARCH = --search $(or $(SERVED),$(INDEX)) --top-k 3

ifneq ($(and $(TRAJECTORIES),$(TEACHER_URL)),)
$(error TRAJECTORIES and TEACHER_URL were given: name one of them)
endif
TEACHER := $(or $(and $(TRAJECTORIES),$(call path_name,$(TRAJECTORIES))),\
  $(and $(TEACHER_URL),$(or $(notdir $(TEACHER_MODEL)),teacher)-$(PASSAGES_NAME)),published)
COLLECTED := $(PAPER)/trajectories/$(TEACHER)
learned_from = $(firstword $(subst ., ,$(1)))
KINDS := $(sort $(filter-out base,$(foreach row,$(PAPER_ROWS),$(call learned_from,$(row)))))

# A student that is a folder is not downloaded. Names on the hub start with neither / nor a dot.
STUDENT_FOLDER := $(or $(filter /% ./% ../%,$(PAPER_STUDENT)),\
  $(patsubst %/config.json,%,$(wildcard $(PAPER_STUDENT)/config.json)))
STUDENT_DONE := $(if $(STUDENT_FOLDER),$(STUDENT_FOLDER)/config.json,$(DOWNLOADED)/$(PAPER_STUDENT).done)
STUDENT_IN_PATHS := $(if $(STUDENT_FOLDER),$(call path_name,$(STUDENT_FOLDER)),$(notdir $(PAPER_STUDENT)))
TRAINED := $(PAPER)/students/$(TEACHER)/$(STUDENT_IN_PATHS)

# Pooled passages have questions of their own.
TASKS := $(PAPER)/tasks$(if $(filter pooled,$(PASSAGES)),-pooled)
TEST_FILES := $(or $(PAPER_QUESTIONS),$(TASKS)/test)/*.jsonl
QUESTIONS_DONE := $(if $(PAPER_QUESTIONS),$(or $(wildcard $(TEST_FILES)),$(TEST_FILES)),$(TASKS)/.done)
RESULTS := $(PAPER)/results/$(TEACHER).$(PASSAGES_NAME)$(and $(PAPER_QUESTIONS),.$(call path_name,$(PAPER_QUESTIONS)))

ROWS_KNOWN := base.cot base.agent base.agent.sc8 cot.cot cot.cot-rag agent.greedy agent.sc8 prefix.greedy prefix.sc8
ifneq ($(filter paper paper-evaluate paper-report,$(MAKECMDGOALS)),)
  $(if $(filter-out $(ROWS_KNOWN),$(PAPER_ROWS)),$(error PAPER_ROWS may be: $(ROWS_KNOWN)))
  given_in_vain := $(strip $(foreach name,PROMPTS COLLECT_OPTIONS AGENT_OPTIONS TRAIN_OPTIONS EVALUATE_OPTIONS SEEDS,\
    $(if $(filter command,$(firstword $(origin $(name)))),$(name))))
  $(if $(given_in_vain),$(error make paper does not use $(given_in_vain)))
endif

paper: paper-report  ## the paper's experiment: says what it needs, asks, then runs everything below

# Only a download asks.
AGREED := $(PAPER)/agreed/$(STUDENT_IN_PATHS).$(PASSAGES_NAME)
# wiki: archive, passages and index. e5: also the vectors, twice on the disk while their two parts are joined.
NEEDS_wiki := 5.1 GB to download, 50 GB of disk, 6 GB of memory
NEEDS_e5 := 70.1 GB to download, 150 GB of disk, 65 GB of RAM or 81 GB on a GPU
NEEDS_pooled := 0.05 GB to download, 0.1 GB of disk, 1 GB of memory
$(AGREED): | $(READY) $(if $(PUBLISHED)$(SERVED),,$(PASSAGES))
	@mkdir -p $(@D)
	@echo 'passages $(PASSAGES): $(or $(NEEDS_$(PASSAGES)),small)'
	@echo 'student $(PAPER_STUDENT): 2 GB per billion parameters, on the disk and on one GPU; other data: 0.1 GB'
	@df -h $(PAPER)
ifndef YES
	@printf 'Continue? [y/N] '; read answer; case "$$answer" in [yY]|[yY]es) ;; \
	  *) echo 'not agreed; YES=1 continues without asking' >&2; exit 2;; esac
endif
	@touch $@

# Run a command. If it fails, its last line of output is the error: no network, no such file, no more disk, ...
try = @message=$$({ $(1); } 2>&1) || { echo "error: $(2): $$(echo "$$message" | tail -n 1)" >&2; exit 2; }

# Downloads: repositories on the Hugging Face Hub, with kind and commit. main: no commit is known, the newest is taken.
FROM_cot-trajectories := agent-distillation/Qwen2.5-32B-Instruct_cot_trajectories_2k dataset main
FROM_agent-trajectories := agent-distillation/Qwen2.5-32B-Instruct_agent_trajectories_2k dataset main
FROM_prefix-trajectories := agent-distillation/Qwen2.5-32B-Instruct_agent_trajectories_2k_prefix dataset main
FROM_authors-student := agent-distillation/agent_distilled_Qwen2.5-1.5B-Instruct model main
# Wikipedia 2018 in 21,015,324 passages of 100 words, and e5-base-v2's vectors of them; published with Search-R1.
FROM_wiki-18 := PeterJinGo/wiki-18-corpus dataset 69c1c00ffe7c5554c68d8548355cb22e46aabc51
FROM_e5-index := PeterJinGo/wiki-18-e5-index dataset a4d31160a035f30764604f4827cd8f1d0315eb86
COMMIT_intfloat/e5-base-v2 := f52bf8ec8c7124536f0efb74aca902b2995e5bcd
COMMIT_Qwen/Qwen2.5-0.5B-Instruct := 7ae557604adf67be50417f59c2c2f167def9a775
COMMIT_Qwen/Qwen2.5-1.5B-Instruct := 989aa7980e4cf806f80c7fef2b1adb7bc71aa306
COMMIT_Qwen/Qwen2.5-3B-Instruct := aa8e72537993ba99e69dfaafa59ed015b17504d1
COMMIT_Qwen/Qwen2.5-7B-Instruct := a09a35458c702b33eeacc393d103063234e8bc28
WANTED := *.json *.jsonl *.parquet *.gz *.safetensors *.txt *.model *.jinja part_*
GET = $(RUN) -m huggingface_hub.cli.hf download --quiet $(WANTED:%=--include '%')
DATA_DONE := $(patsubst FROM_%,$(DOWNLOADED)/%.done,$(filter FROM_%,$(.VARIABLES)))
$(DATA_DONE): $(DOWNLOADED)/%.done: | $(AGREED)
	$(call try,$(GET) $(word 1,$(FROM_$*)) --type $(word 2,$(FROM_$*)) --revision $(word 3,$(FROM_$*)) \
	  --local-dir $(DOWNLOADED)/$*,$(word 1,$(FROM_$*)))
	touch $@
# Single files, each with its sha256. benchmarks: the authors' questions, from their repository's newest commit. pooled:
# HippoRAG's questions and passages. paper/README.md says where each sum comes from.
URL_benchmarks ?= https://raw.githubusercontent.com/Nardien/agent-distillation/main/data_processor
URL_pooled ?= https://raw.githubusercontent.com/OSU-NLP-Group/HippoRAG/$(POOLED_COMMIT)/reproduce/dataset
POOLED_COMMIT := c617143f01477243992a63b2e2151cc003dd3b21
FETCH = for file in $$(cut -c 67- paper/$*.sha256); do \
  curl -fsS --retry 5 --create-dirs -o $(DOWNLOADED)/$*/$$file $(URL_$*)/$$file || exit; done
$(DOWNLOADED)/benchmarks.done $(DOWNLOADED)/pooled.done: $(DOWNLOADED)/%.done: | $(AGREED)
	$(call try,$(FETCH),$(URL_$*))
	cd $(DOWNLOADED)/$* && sha256sum --check --quiet $(CURDIR)/paper/$*.sha256
	touch $@
# Models. refs/main names the commit that transformers takes for a model's name.
MODEL_FOLDER = $(PAPER)/hub/models--$(subst /,--,$*)
$(DOWNLOADED)/%.done: | $(AGREED)
	$(call try,$(GET) $* --cache-dir $(PAPER)/hub $(COMMIT_$*:%=--revision %),$*)
	$(if $(COMMIT_$*),mkdir -p $(MODEL_FOLDER)/refs && printf %s $(COMMIT_$*) > $(MODEL_FOLDER)/refs/main)
	mkdir -p $(@D) && touch $@

# 1. Questions and student.
paper-data: $(QUESTIONS_DONE) $(STUDENT_DONE)  ## download the questions and the student
$(TASKS)/.done: $(DOWNLOADED)/benchmarks.done $(if $(filter pooled,$(PASSAGES)),$(DOWNLOADED)/pooled.done)
	$(RUN) -m paper.data tasks $(DOWNLOADED)/benchmarks --out $(@D) \
	  $(if $(filter pooled,$(PASSAGES)),--pooled $(DOWNLOADED)/pooled)
	touch $@

# 2. Passages. retriever.py reads plain JSON lines.
paper-passages: $(INDEX_DONE)  ## download and index the passages
PASSAGES_FILE := $(PASSAGES)
ifneq ($(filter wiki e5,$(PASSAGES)),)
PASSAGES_FILE := $(PAPER)/passages.jsonl
# Despite its name, the archive is a tar of one file.
$(PASSAGES_FILE): $(DOWNLOADED)/wiki-18.done
	tar -xzOf $(DOWNLOADED)/wiki-18/wiki-18.jsonl.gz > $@.partial
	mv $@.partial $@
else ifeq ($(PASSAGES),pooled)
PASSAGES_FILE := $(TASKS)/passages.jsonl
$(PASSAGES_FILE): $(TASKS)/.done
else ifneq ($(filter %.gz,$(PASSAGES)),)
PASSAGES_FILE := $(PAPER)/passages/$(PASSAGES_NAME).jsonl
$(PASSAGES_FILE): $(PASSAGES)
	mkdir -p $(@D)
	gzip -dc $< > $@.partial
	mv $@.partial $@
endif
# The vectors are published in two parts, 64.6 GB together.
$(PAPER)/e5_Flat.index: $(DOWNLOADED)/e5-index.done
	cat $(DOWNLOADED)/e5-index/part_* > $@.partial
	mv $@.partial $@
	rm $(DOWNLOADED)/e5-index/part_*
ifeq ($(PASSAGES),e5)
$(INDEX)/.done: $(PASSAGES_FILE) $(PAPER)/e5_Flat.index $(DOWNLOADED)/intfloat/e5-base-v2.done
	$(OFFLINE) $(RUN) retriever.py build $< $(@D) --kind dense --encoder intfloat/e5-base-v2 \
	  --vectors $(PAPER)/e5_Flat.index
	touch $@
else ifeq ($(SERVED),)
$(INDEX)/.done: $(PASSAGES_FILE) | $(READY)
	$(RUN) retriever.py build $< $(@D) --kind bm25
	touch $@
endif

# 3. Trajectories, one per question, right answers only: published, local, or from a teacher (Eq. 2, Eq. 3, Eq. 5).
paper-trajectories: $(KINDS:%=$(COLLECTED)/%.train.jsonl)  ## download or collect them
# Nothing but parquet files needs pyarrow, so it is installed only where there is one.
INSTALL_PYARROW = $(call try,test -z "$$(find $(1) -name '*.parquet')" || $(RUN) -c 'import pyarrow' || \
  $(RUN) -m pip install --quiet --disable-pip-version-check pyarrow==26.0.1,$(1) needs pyarrow)
CONVERT = $(RUN) -m paper.data trajectories $(1) --out $@ $(if $(filter prefix,$*),--prefix)
ifneq ($(TRAJECTORIES),)
$(foreach kind,$(KINDS),$(eval $(COLLECTED)/$(kind).train.jsonl: \
  $(or $(wildcard $(TRAJECTORIES)/$(kind).parquet),$(TRAJECTORIES)/$(kind).jsonl)))
$(KINDS:%=$(COLLECTED)/%.train.jsonl): $(COLLECTED)/%.train.jsonl: | $(READY)
	$(call INSTALL_PYARROW,$<)
	$(call CONVERT,$<)
else ifneq ($(TEACHER_URL),)
PAPER_COLLECT = $(OFFLINE) $(RUN) agent_distill.py collect $(TASKS)/train/*.jsonl --url $(TEACHER_URL) \
  $(TEACHER_MODEL:%=--model %) --max-steps 5
$(COLLECTED)/cot.train.jsonl: $(TASKS)/.done
	$(PAPER_COLLECT) --method cot --max-tokens $(COT_TOKENS) --out $(@D)/cot.jsonl
	$(RUN) agent_distill.py filter $(@D)/cot.jsonl --out $@
$(COLLECTED)/agent.train.jsonl: $(TASKS)/.done $(INDEX_DONE)
	$(PAPER_COLLECT) $(PAPER_SEARCH) --max-tokens $(AGENT_TOKENS) --out $(@D)/agent.jsonl
	$(RUN) agent_distill.py filter $(@D)/agent.jsonl --out $@
$(COLLECTED)/prefix.train.jsonl: $(COLLECTED)/cot.train.jsonl $(INDEX_DONE)
	$(PAPER_COLLECT) $(PAPER_SEARCH) --max-tokens $(AGENT_TOKENS) --first-thought $(@D)/cot.jsonl --out $(@D)/prefix.jsonl
	$(RUN) agent_distill.py filter $(@D)/prefix.jsonl --out $@
else
$(COLLECTED)/%.train.jsonl: $(DOWNLOADED)/%-trajectories.done
	$(call INSTALL_PYARROW,$(<:.done=))
	$(call CONVERT,$(<:.done=))
endif

# 4. Students: LoRA on all linear layers, loss on the assistant's tokens only (Eq. 2 and Eq. 4).
paper-train: $(KINDS:%=$(TRAINED)/%/.done)  ## fine-tune the student, once for each kind of trajectories
PAPER_TRAIN = $(OFFLINE) $(RUN) $(TORCHRUN) train.py $< --model $(PAPER_STUDENT) --out $(@D) --tuning lora --rank 64 \
  --alpha 128 --dropout 0.05 --lr 2e-4 --batch-size 8 --epochs 2 --precision bf16
$(TRAINED)/cot/.done: $(COLLECTED)/cot.train.jsonl $(STUDENT_DONE)
	$(PAPER_TRAIN) --max-length 4096 $(PAPER_TRAIN_OPTIONS)
	touch $@
$(TRAINED)/%/.done: $(COLLECTED)/%.train.jsonl $(STUDENT_DONE)
	$(PAPER_TRAIN) --max-length 10240 $(PAPER_TRAIN_OPTIONS)
	touch $@

# 5. Evaluation. The name of a row: what the student learned from, the method, the decoding. The mark of a finished row
# has the number of questions: with a larger TESTS, the row continues.
row_tests = $(if $(filter %.sc8,$(1)),$(PAPER_SC_TESTS),$(PAPER_TESTS))
row_done = $(RESULTS)/$(STUDENT_IN_PATHS).$(1)/.done$(addprefix .,$(row_tests))
row_method = $(or $(filter cot cot-rag,$(wordlist 2,3,$(subst ., ,$(1)))),agent)
paper-evaluate: $(foreach row,$(PAPER_ROWS),$(call row_done,$(row)))  ## all rows of the table
PAPER_EVALUATE = $(OFFLINE) $(RUN) $(TORCHRUN) evaluate.py $(TEST_FILES) --out $(@D) --max-steps 5 \
  $(if $(JUDGE_URL),--judge-url $(JUDGE_URL) --judge-model $(JUDGE_MODEL))
SC_ACTION := --sc 8 --temperature 0.4 --top-p 0.8
# $(1): the row. $(2): the model. $(3): what is there when the model is.
define EVALUATED
$(row_done): $(3) $(QUESTIONS_DONE) $(if $(filter cot,$(row_method)),,$(INDEX_DONE)) | $(READY)
	$$(PAPER_EVALUATE) --name $(notdir $(PAPER_STUDENT)) --model $(2) --method $(row_method) \
	  --max-tokens $(if $(filter agent,$(row_method)),$(AGENT_TOKENS),$(COT_TOKENS)) $(addprefix --limit ,$(row_tests)) \
	  $(if $(filter cot,$(row_method)),,$(PAPER_SEARCH)) $(if $(filter %.sc8,$(1)),$(SC_ACTION)) $$(PAPER_EVALUATE_OPTIONS)
	touch $$@
endef
$(foreach row,$(PAPER_ROWS),$(if $(filter base.%,$(row)),\
  $(eval $(call EVALUATED,$(row),$(PAPER_STUDENT),$(STUDENT_DONE))),\
  $(eval $(call EVALUATED,$(row),$(TRAINED)/$(call learned_from,$(row)),$(TRAINED)/$(call learned_from,$(row))/.done))))

paper-report: paper-evaluate  ## the table and the page, beside the paper's figures
	@$(RUN) evaluate.py report $(RESULTS)
	@printf '\nThe paper, averages of the eight tasks in %%, students of 0.5B / 1.5B / 3B / 7B:\n'
	@printf '%-38s%s\n' 'CoT distilled' '13.64 / 21.28 / 27.72 / 33.54' 'CoT + RAG distilled' '15.90 / 24.64 / 28.53 / 32.16' \
	  'agent distilled' '19.24 / 28.06 / 33.60 / 39.85' 'agent distilled + prefix + SC-action' '21.90 / 30.55 / 36.60 / 42.68'

# The authors' 1.5B student, an adapter that names its base. It learned search results in their wording. They publish no
# system prompt, so it gets our short one. training.json says what evaluate.py reads there of students trained here.
AUTHORS := $(DOWNLOADED)/authors-student
AUTHORS_ROWS ?= greedy sc8
AUTHORS_DONE := .done$(addprefix .,$(PAPER_TESTS))
paper-authors: $(AUTHORS_ROWS:%=$(RESULTS)/authors-1.5B.%/$(AUTHORS_DONE))  ## evaluate the authors' 1.5B student
$(AUTHORS)/.done: $(AUTHORS).done $(DOWNLOADED)/Qwen/Qwen2.5-1.5B-Instruct.done
	mkdir -p $(PAPER)/prompts-authors
	cp -r prompts/*.txt prompts/tools $(PAPER)/prompts-authors
	cp prompts/authors/*.txt $(PAPER)/prompts-authors
	printf '{"method": "agent", "training": "distill"}\n' > $(AUTHORS)/training.json
	touch $@
$(RESULTS)/authors-1.5B.%/$(AUTHORS_DONE): $(AUTHORS)/.done $(QUESTIONS_DONE) $(INDEX_DONE)
	$(PAPER_EVALUATE) --name authors-1.5B --model $(AUTHORS) --method agent --prompts $(PAPER)/prompts-authors \
	  --max-tokens $(AGENT_TOKENS) $(addprefix --limit ,$(PAPER_TESTS)) $(PAPER_SEARCH) \
	  $(if $(filter sc8,$*),$(SC_ACTION)) $(PAPER_EVALUATE_OPTIONS)
	touch $@

# Everything but the downloads, with stand-ins in their place. A scripted teacher's trajectories for the pooled
# questions also stand in for the authors' and for local ones, and a student trained on them for the authors'.
REHEARSAL ?= runs/rehearsal
STAND_INS := $(REHEARSAL)/paper/download
COLLECTED_HERE := $(REHEARSAL)/paper/trajectories/teacher-pooled
MARKS := benchmarks pooled wiki-18 e5-index intfloat/e5-base-v2 cot-trajectories agent-trajectories \
  prefix-trajectories authors-student Qwen/Qwen2.5-0.5B-Instruct Qwen/Qwen2.5-1.5B-Instruct
REHEARSED = $(MAKE) --no-print-directory YES=1 PAPER=$(REHEARSAL)/paper STUDENT=Qwen/Qwen2.5-0.5B-Instruct \
  TESTS=1 AGENT_TOKENS=12 COT_TOKENS=12
$(REHEARSAL)/.done: | $(READY)
	$(RUN) -m paper.rehearse $(@D)
	mkdir -p $(STAND_INS)/wiki-18 $(sort $(dir $(MARKS:%=$(STAND_INS)/%)))
	tar -czf $(STAND_INS)/wiki-18/wiki-18.jsonl.gz -C $(@D)/world passages.jsonl
	touch $(MARKS:%=$(STAND_INS)/%.done)
	$(RUN) -m miniature.teacher $(@D)/world --then "$(REHEARSED) paper-trajectories PASSAGES=pooled \
	  PAPER_ROWS=cot.cot\ agent.greedy\ prefix.greedy AGENT_TOKENS=1024 COT_TOKENS=1024 TEACHER_URL=\$$TEACHER_URL"
	$(RUN) -m paper.rehearse $(@D) --collected $(COLLECTED_HERE)
	gzip -c $(@D)/world/passages.jsonl > $(@D)/passages.jsonl.gz
	touch $@
# Run one variant; STAGES limits it to some stages: make rehearse-local STAGES="paper-passages paper-trajectories".
STAGES ?= paper
WAY_e5 := PASSAGES=e5 PAPER_ROWS=cot.cot-rag
WAY_pooled := PASSAGES=pooled PAPER_ROWS=base.agent
WAY_local := YES= TRAJECTORIES=$(COLLECTED_HERE) QUESTIONS=$(REHEARSAL)/world/test PAPER_ROWS=agent.sc8 \
  PASSAGES=$(REHEARSAL)/passages.jsonl.gz \
  STUDENT=$(REHEARSAL)/paper/hub/models--Qwen--Qwen2.5-0.5B-Instruct/snapshots/rehearsal
# The plus sign: with -n, too, the inner make says what it would run.
rehearse-wiki rehearse-e5 rehearse-pooled rehearse-local: rehearse-%: $(REHEARSAL)/.done
	+$(REHEARSED) $(STAGES) $(WAY_$*) < /dev/null
rehearse-authors: $(REHEARSAL)/.done
	mkdir -p $(STAND_INS)/authors-student
	cp $(REHEARSAL)/paper/students/published/*/prefix/adapter_* $(STAND_INS)/authors-student
	+$(REHEARSED) paper-authors
rehearse:  ## make paper on small stand-ins, offline: every stage, minutes on 2 CPU cores
	for way in wiki e5 pooled local authors; do $(MAKE) --no-print-directory -j2 rehearse-$$way || exit; done
