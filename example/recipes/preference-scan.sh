#!/usr/bin/env bash
# Three losses and ten values of beta on the same pairs, and one page that compares them: the scan of the alignment
# handbook (recipes/pref_align_scan/launch_scan.sh), whose kto_pair is kto here, with every answer as a row of its own.
#   bash example/recipes/preference-scan.sh                   # LOSSES, BETAS, TRAIN, CONFIG and OUTPUT may be set
# Interrupted, the same command goes on where it was; further words go to every training.
set -euo pipefail
CONFIG=${CONFIG:-example/recipes/preference-scan.yml}
TRAIN=${TRAIN:-python train.py}
LOSSES=${LOSSES:-dpo ipo kto}
BETAS=${BETAS:-0.01 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9}
OUTPUT=${OUTPUT:-runs/preference-scan}

for loss in $LOSSES; do
    for beta in $BETAS; do
        $TRAIN "$CONFIG" algorithm="$loss" beta="$beta" output="$OUTPUT/$loss-$beta" "$@"
    done
done
python report.py "$OUTPUT"/*/ output="$OUTPUT/report.html"
