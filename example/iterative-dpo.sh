#!/usr/bin/env bash
# Iterative DPO: the model answers, a reward picks the best and the worst of n answers to each prompt, DPO
# learns from these pairs, and the next round begins with what it learned. Both the start and the reference of
# a round are the model of the round before.
#
#   bash example/iterative-dpo.sh                                # the embedded model, minutes on two CPU cores
#   MODEL=Qwen/Qwen2.5-0.5B-Instruct CONFIG=example/qwen2.5-dpo.yml PROMPTS=gsm8k HELD_OUT=gsm8k:test \
#       REWARD=gsm8k bash example/iterative-dpo.sh max_length=1024      # words go to every training
#
# Interrupted, the same command goes on where it was. OUTPUT/sampled-2 are the answers of round 2, OUTPUT/dpo-2
# is its run, OUTPUT/held-out-2 how it answers new prompts (0: the start). python report.py OUTPUT/dpo-* compares
# the rounds.
set -euo pipefail
MODEL=${MODEL:-example/tiny/model}
CONFIG=${CONFIG:-example/tiny-dpo.yml}
PROMPTS=${PROMPTS:-example/tiny/prompts.jsonl}
HELD_OUT=${HELD_OUT:-example/tiny/eval-prompts.jsonl}
REWARD=${REWARD:-r1_zero}
OUTPUT=${OUTPUT:-runs/iterative-dpo}
ROUNDS=${ROUNDS:-3}
N=${N:-8}                        # answers per prompt
LIMIT=${LIMIT:-500}              # prompts per round

held_out() {
    python evaluate.py "$MODEL" data="$HELD_OUT" reward="$REWARD" output="$OUTPUT/held-out-$1"
}

held_out 0
for round in $(seq "$ROUNDS"); do
    echo "round $round of $ROUNDS, from $MODEL"
    python sample.py "$MODEL" data="$PROMPTS" limit="$LIMIT" n="$N" reward="$REWARD" seed="$round" \
        output="$OUTPUT/sampled-$round"
    python train.py "$CONFIG" model="$MODEL" data="$OUTPUT/sampled-$round/preference.jsonl" eval_data=null \
        output="$OUTPUT/dpo-$round" "$@"
    MODEL=$OUTPUT/dpo-$round
    held_out "$round"
done
