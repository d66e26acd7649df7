# The paper's experiment: its models, data and tasks, on one GPU and with a network. `make paper` says what it needs and
# asks (YES=1: does not ask). Each stage is a target: what is finished is kept, what was interrupted continues.
# `make rehearse` runs these same rules offline, on small stand-ins.
#
#   make paper STUDENT=Qwen/Qwen2.5-0.5B-Instruct               the authors' published trajectories
#   make paper PASSAGES=e5                                      their retriever: 65 GB of RAM or GPU memory
#   make paper TEACHER_URL=http://... TEACHER_MODEL=...         trajectories of your own teacher

PAPER ?= runs/paper
# One student. The Makefile's default is the miniature's.
PAPER_STUDENT := $(if $(filter file,$(origin STUDENT)),Qwen/Qwen2.5-0.5B-Instruct,$(firstword $(STUDENT)))
# wiki: Wikipedia 2018, BM25 built here; e5: the published vectors; or a JSONL file; or the URL of a /retrieve server.
PASSAGES ?= wiki
# An LLM judge for factual answers, as in the paper; without it, exact match. Its key: $OPENAI_API_KEY.
JUDGE_URL ?=
JUDGE_MODEL ?= gpt-4o-mini
GPUS ?= 1
PAPER_ROWS ?= base.cot base.agent base.agent.sc8 cot.cot cot.cot-rag agent.greedy agent.sc8 prefix.greedy prefix.sc8
# Further options; they override those of the rules.
PAPER_TRAIN_OPTIONS ?=
PAPER_EVALUATE_OPTIONS ?=

.PHONY: paper paper-data paper-passages paper-trajectories paper-train paper-evaluate paper-report paper-authors rehearse

# Models are found by their names in what was downloaded, and nowhere else.
OFFLINE = HF_HUB_CACHE=$(abspath $(PAPER))/hub HF_HUB_OFFLINE=1
TORCHRUN = $(if $(filter-out 1,$(GPUS)),-m torch.distributed.run --standalone --nproc-per-node $(GPUS))
SERVED := $(filter http://% https://%,$(PASSAGES))
PASSAGES_NAME := $(if $(SERVED),served,$(basename $(notdir $(PASSAGES))))
INDEX := $(PAPER)/index/$(PASSAGES_NAME)
INDEX_DONE := $(if $(SERVED),,$(INDEX)/.done)
PAPER_SEARCH = --search $(or $(SERVED),$(INDEX)) --top-k 3
TEACHER := $(if $(TEACHER_URL),$(or $(notdir $(TEACHER_MODEL)),teacher)-$(PASSAGES_NAME),published)
TRAJECTORIES := $(PAPER)/trajectories/$(TEACHER)
TRAINED := $(PAPER)/students/$(TEACHER)/$(notdir $(PAPER_STUDENT))
RESULTS := $(PAPER)/results/$(TEACHER).$(PASSAGES_NAME)
DOWNLOADED := $(PAPER)/download
# A student that is a folder is not downloaded.
STUDENT_DONE := $(if $(wildcard $(PAPER_STUDENT)/config.json),,$(DOWNLOADED)/$(PAPER_STUDENT).done)

paper: paper-report  ## the paper's experiment: says what it needs, asks, then runs everything below

AGREED := $(PAPER)/agreed/$(notdir $(PAPER_STUDENT)).$(PASSAGES_NAME)
# wiki: archive, passages and index. e5: also the vectors, twice on the disk while their two parts are joined.
NEEDS_wiki := 5.1 GB to download, 50 GB of disk, 6 GB of memory
NEEDS_e5 := 70.1 GB to download, 150 GB of disk, 65 GB of RAM or 81 GB on a GPU
$(AGREED): | $(READY) $(if $(NEEDS_$(PASSAGES))$(SERVED),,$(PASSAGES))
	@mkdir -p $(@D)
	@echo 'passages $(PASSAGES): $(or $(NEEDS_$(PASSAGES)),small)'
	@echo 'student $(PAPER_STUDENT): 2 GB per billion parameters, on the disk and on one GPU; other data: 0.1 GB'
	@df -h $(PAPER)
ifndef YES
	@printf 'Continue? [y/N] '; read answer; case "$$answer" in [yY]|[yY]es) ;; \
	  *) echo 'not agreed; YES=1 continues without asking' >&2; exit 2;; esac
endif
	@touch $@

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
WANTED := *.json *.jsonl *.gz *.safetensors *.txt *.model *.jinja part_*
GET = $(RUN) -m huggingface_hub.cli.hf download --quiet $(WANTED:%=--include '%')
DATA_DONE := $(patsubst FROM_%,$(DOWNLOADED)/%.done,$(filter FROM_%,$(.VARIABLES)))
$(DATA_DONE): $(DOWNLOADED)/%.done: | $(AGREED)
	$(GET) $(word 1,$(FROM_$*)) --type $(word 2,$(FROM_$*)) --revision $(word 3,$(FROM_$*)) --local-dir $(DOWNLOADED)/$*
	touch $@
# The authors' questions. Their repository's newest commit is read, and the sha256 of each file is pinned.
QUESTIONS_URL ?= https://raw.githubusercontent.com/Nardien/agent-distillation/main/data_processor
$(DOWNLOADED)/benchmarks.done: | $(AGREED)
	mkdir -p $(DOWNLOADED)/benchmarks
	cut -c 67- paper/benchmarks.sha256 | (cd $(DOWNLOADED)/benchmarks && \
	  while read file; do curl -fsS --retry 5 --create-dirs -o $$file $(QUESTIONS_URL)/$$file || exit; done)
	cd $(DOWNLOADED)/benchmarks && sha256sum --check --quiet $(CURDIR)/paper/benchmarks.sha256
	touch $@
# Models. refs/main names the commit that transformers takes for a model's name.
MODEL_FOLDER = $(PAPER)/hub/models--$(subst /,--,$*)
$(DOWNLOADED)/%.done: | $(AGREED)
	$(GET) $* --cache-dir $(PAPER)/hub $(COMMIT_$*:%=--revision %)
	$(if $(COMMIT_$*),mkdir -p $(MODEL_FOLDER)/refs && printf %s $(COMMIT_$*) > $(MODEL_FOLDER)/refs/main)
	mkdir -p $(@D) && touch $@

# 1. Questions and student.
paper-data: $(PAPER)/tasks/.done $(STUDENT_DONE)  ## download the questions and the student
$(PAPER)/tasks/.done: $(DOWNLOADED)/benchmarks.done
	$(RUN) -m paper.data tasks $(DOWNLOADED)/benchmarks --out $(@D)
	touch $@

# 2. Passages. Despite its name, the archive is a tar of one file.
paper-passages: $(INDEX_DONE)  ## download and index the passages
$(PAPER)/passages.jsonl: $(DOWNLOADED)/wiki-18.done
	tar -xzOf $(DOWNLOADED)/wiki-18/wiki-18.jsonl.gz > $@.partial
	mv $@.partial $@
$(PAPER)/index/wiki/.done: $(PAPER)/passages.jsonl
	$(RUN) retriever.py build $< $(@D) --kind bm25
	touch $@
# The vectors are published in two parts, 64.6 GB together.
$(PAPER)/e5_Flat.index: $(DOWNLOADED)/e5-index.done
	cat $(DOWNLOADED)/e5-index/part_* > $@.partial
	mv $@.partial $@
	rm $(DOWNLOADED)/e5-index/part_*
$(PAPER)/index/e5/.done: $(PAPER)/passages.jsonl $(PAPER)/e5_Flat.index $(DOWNLOADED)/intfloat/e5-base-v2.done
	$(OFFLINE) $(RUN) retriever.py build $< $(@D) --kind dense --encoder intfloat/e5-base-v2 \
	  --vectors $(PAPER)/e5_Flat.index
	touch $@
ifeq ($(filter wiki e5,$(PASSAGES))$(SERVED),)
$(INDEX)/.done: $(PASSAGES) | $(AGREED)
	$(RUN) retriever.py build $< $(@D) --kind bm25
	touch $@
endif

# 3. Trajectories, one per question, right answers only: as published, or from a teacher (Eq. 2, Eq. 3, Eq. 5).
paper-trajectories: $(foreach kind,cot agent prefix,$(TRAJECTORIES)/$(kind).train.jsonl)  ## download or collect them
$(PAPER)/trajectories/published/%.train.jsonl: $(DOWNLOADED)/%-trajectories.done
	$(RUN) -m paper.data trajectories $(DOWNLOADED)/$*-trajectories --out $@ $(if $(filter prefix,$*),--prefix)
ifneq ($(TEACHER_URL),)
PAPER_COLLECT = $(OFFLINE) $(RUN) agent_distill.py collect $(PAPER)/tasks/train/*.jsonl --url $(TEACHER_URL) \
  $(TEACHER_MODEL:%=--model %) --max-steps 5 --max-tokens 1024
$(TRAJECTORIES)/cot.train.jsonl: $(PAPER)/tasks/.done
	$(PAPER_COLLECT) --method cot --out $(@D)/cot.jsonl
	$(RUN) agent_distill.py filter $(@D)/cot.jsonl --out $@
$(TRAJECTORIES)/agent.train.jsonl: $(PAPER)/tasks/.done $(INDEX_DONE)
	$(PAPER_COLLECT) $(PAPER_SEARCH) --out $(@D)/agent.jsonl
	$(RUN) agent_distill.py filter $(@D)/agent.jsonl --out $@
$(TRAJECTORIES)/prefix.train.jsonl: $(TRAJECTORIES)/cot.train.jsonl $(INDEX_DONE)
	$(PAPER_COLLECT) $(PAPER_SEARCH) --first-thought $(@D)/cot.jsonl --out $(@D)/prefix.jsonl
	$(RUN) agent_distill.py filter $(@D)/prefix.jsonl --out $@
endif

# 4. Students: LoRA on all linear layers, loss on the assistant's tokens only (Eq. 2 and Eq. 4).
paper-train: $(foreach kind,cot agent prefix,$(TRAINED)/$(kind)/.done)  ## fine-tune the student, three times
PAPER_TRAIN = $(OFFLINE) $(RUN) $(TORCHRUN) train.py $< --model $(PAPER_STUDENT) --out $(@D) --tuning lora --rank 64 \
  --alpha 128 --dropout 0.05 --lr 2e-4 --batch-size 8 --epochs 2 --precision bf16
$(TRAINED)/cot/.done: $(TRAJECTORIES)/cot.train.jsonl $(STUDENT_DONE)
	$(PAPER_TRAIN) --max-length 4096 $(PAPER_TRAIN_OPTIONS)
	touch $@
$(TRAINED)/%/.done: $(TRAJECTORIES)/%.train.jsonl $(STUDENT_DONE)
	$(PAPER_TRAIN) --max-length 10240 $(PAPER_TRAIN_OPTIONS)
	touch $@

# 5. Evaluation: eight tasks. The name of a row: what the student learned from, the method, the decoding.
paper-evaluate: $(PAPER_ROWS:%=$(RESULTS)/$(notdir $(PAPER_STUDENT)).%/.done)  ## all rows of the table
PAPER_EVALUATE = $(OFFLINE) $(RUN) $(TORCHRUN) evaluate.py $(PAPER)/tasks/test/*.jsonl --out $(@D) \
  --name $(notdir $(PAPER_STUDENT)) --max-steps 5 --max-tokens 1024 \
  $(if $(JUDGE_URL),--judge-url $(JUDGE_URL) --judge-model $(JUDGE_MODEL))
SC_ACTION = --sc 8 --temperature 0.4 --top-p 0.8
PAPER_ROW := $(RESULTS)/$(notdir $(PAPER_STUDENT))
$(PAPER_ROW).base.%/.done: $(PAPER)/tasks/.done $(STUDENT_DONE) $(INDEX_DONE)
	$(PAPER_EVALUATE) --model $(PAPER_STUDENT) --method $(basename $*) $(if $(filter cot,$*),,$(PAPER_SEARCH)) \
	  $(if $(filter %.sc8,$*),$(SC_ACTION)) $(PAPER_EVALUATE_OPTIONS)
	touch $@
$(PAPER_ROW).cot.%/.done: $(TRAINED)/cot/.done $(PAPER)/tasks/.done $(INDEX_DONE)
	$(PAPER_EVALUATE) --model $(<D) --method $* $(if $(filter cot,$*),,$(PAPER_SEARCH)) $(PAPER_EVALUATE_OPTIONS)
	touch $@
define AGENT_ROW
$(PAPER_ROW).$(1).%/.done: $(TRAINED)/$(1)/.done $(PAPER)/tasks/.done $(INDEX_DONE)
	$$(PAPER_EVALUATE) --model $$(<D) --method agent $$(PAPER_SEARCH) $$(if $$(filter sc8,$$*),$$(SC_ACTION)) \
	  $$(PAPER_EVALUATE_OPTIONS)
	touch $$@
endef
$(foreach kind,agent prefix,$(eval $(call AGENT_ROW,$(kind))))

paper-report: paper-evaluate  ## the table and the page, beside the paper's figures
	@$(RUN) evaluate.py report $(RESULTS)

# The authors' 1.5B student, an adapter that names its base. It learned search results in their wording. They publish no
# system prompt, so it gets our short one. training.json says what evaluate.py reads there of students trained here.
AUTHORS := $(DOWNLOADED)/authors-student
AUTHORS_ROWS ?= greedy sc8
paper-authors: $(AUTHORS_ROWS:%=$(RESULTS)/authors-1.5B.%/.done)  ## evaluate the authors' 1.5B student
$(AUTHORS)/.done: $(AUTHORS).done $(DOWNLOADED)/Qwen/Qwen2.5-1.5B-Instruct.done
	mkdir -p $(PAPER)/prompts-authors
	cp -r prompts/*.txt prompts/tools $(PAPER)/prompts-authors
	cp prompts/authors/*.txt $(PAPER)/prompts-authors
	printf '{"method": "agent", "training": "distill"}\n' > $(AUTHORS)/training.json
	touch $@
$(RESULTS)/authors-1.5B.%/.done: $(AUTHORS)/.done $(PAPER)/tasks/.done $(INDEX_DONE)
	$(PAPER_EVALUATE) --name authors-1.5B --model $(AUTHORS) --method agent --prompts $(PAPER)/prompts-authors \
	  $(PAPER_SEARCH) $(if $(filter sc8,$*),$(SC_ACTION)) $(PAPER_EVALUATE_OPTIONS)
	touch $@

# Everything but the downloads, with stand-ins in their place: both indexes, a file of passages, a teacher.
REHEARSAL ?= runs/rehearsal
REHEARSED = $(MAKE) --no-print-directory YES=1 PAPER=$(REHEARSAL)/paper STUDENT=Qwen/Qwen2.5-0.5B-Instruct \
  PAPER_EVALUATE_OPTIONS='--max-tokens 12'
$(REHEARSAL)/.done: | $(READY)
	$(RUN) -m paper.rehearse $(@D)
	touch $@
rehearse: $(REHEARSAL)/.done  ## make paper on small stand-ins, offline: every stage, minutes on 2 CPU cores
	$(REHEARSED) paper
	$(REHEARSED) paper PASSAGES=e5 PAPER_ROWS=cot.cot-rag
	$(REHEARSED) paper-passages PASSAGES=$(REHEARSAL)/world/passages.jsonl
	$(REHEARSED) paper-authors
	$(RUN) -m miniature.teacher $(REHEARSAL)/world --then "$(REHEARSED) paper-trajectories TEACHER_URL=\$$TEACHER_URL"
