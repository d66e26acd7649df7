# Quick experiments beyond the paper, on the world and the student of `make reproduce`: see experiments/README.md.
#
#   make experiment NAME=agree_early SEEDS="0 1 2"
#
# With real models, run the file itself: python -m experiments.on_policy --help

EXPERIMENTS := $(filter-out __init__ table,$(basename $(notdir $(wildcard experiments/*.py))))
# Further options of an experiment, such as --limit 50.
EXPERIMENT_OPTIONS ?=

ifneq ($(filter experiment,$(MAKECMDGOALS)),)
  $(if $(filter $(NAME),$(EXPERIMENTS)),,$(error make experiment NAME=...: one of $(EXPERIMENTS)))
  $(if $(filter-out prompts,$(PROMPTS)),$(error make experiment does not use PROMPTS))
endif

.PHONY: experiment one-experiment
experiment: $(READY)  ## NAME=...: a quick experiment beyond the paper; see experiments/README.md
	@mkdir -p $(RUNS); for seed in $(SEEDS); do $(LOCK) $(MAKE) --no-print-directory one-experiment SEED=$$seed || exit; done
	@$(RUN) -m experiments.table $(RUNS)-experiments

E := $(RUNS)-experiments/seed$(SEED)/$(NAME)
# The trajectories that some experiments start from: the scripted teacher's mistakes, and what is collected.
TEACHER_OPTIONS_mask_failed_steps := --run-error 0.3
COLLECT_OPTIONS_mask_failed_steps := --limit 200
TEACHER_OPTIONS_always_search := --from-memory 0.5
COLLECT_OPTIONS_always_search := --limit 200
TEACHER_OPTIONS_choose_trajectory := --run-error 0.2 --slip 0.2
COLLECT_OPTIONS_choose_trajectory := --limit 200 --samples 3 --temperature 1
COLLECT_OPTIONS_template := --limit 100
$(E)/.collected: TEACHER_OPTIONS := $(TEACHER_OPTIONS_$(NAME))
$(E)/.collected: $(D)/index/.done
	$(call ASK,$(AGENT) --out $(@D)/agent.jsonl $(COLLECT_OPTIONS_$(NAME)))
	touch $@

# What each experiment needs, and its own arguments. By default, it trains the base model on collected trajectories, in
# two epochs, because they are fewer than those of `make reproduce`.
ifeq ($(NAME),agree_early)
ARGUMENTS := --model $(S)/agent
NEEDS := $(S)/agent/.done
else ifeq ($(NAME),on_policy)
ARGUMENTS := $(D)/teacher/agent.train.jsonl --model $(MODEL) --teacher $(S)/agent
NEEDS := $(S)/agent/.done
else
ARGUMENTS := $(E)/agent.jsonl --model $(MODEL) --epochs 2
NEEDS := $(E)/.collected
endif
one-experiment: $(D)/index/.done $(MODEL_DONE) $(NEEDS)
	$(RUN) -m experiments.$(NAME) $(TRAIN_OPTIONS) $(EVALUATE_OPTIONS) $(ARGUMENTS) $(SEARCH) --out $(E) \
	  --seed $(SEED) --tests $(D)/world/test/*.jsonl $(EXPERIMENT_OPTIONS)
