#!/usr/bin/env bash
# All stages, from nothing to an evaluated model folder. Start again after a stop: every stage resumes its checkpoint.
#
#   RUN=runs/tiny demos/train/train_all.sh                              # CPU, one thread
#   RUN=runs/tiny DEVICE=cuda VIT_BATCH=128 demos/train/train_all.sh    # GPU
#   RUN=/tmp/try VIT_STEPS=30 SCENES=64 CLIPS=8 LM_STEPS=30 demos/train/train_all.sh    # a minute: does it run?
set -euo pipefail

RUN=${RUN:?set RUN to a folder for checkpoints, features (2 MiB per 16 scenes) and curves}
OUT=${OUT:-$RUN/model}
DEVICE=${DEVICE:-cpu}
VIT_STEPS=${VIT_STEPS:-3500} VIT_BATCH=${VIT_BATCH:-16}
SCENES=${SCENES:-16000} CLIPS=${CLIPS:-1200}
LM_STEPS=${LM_STEPS:-4000}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

resume() { if [[ -e $1 ]]; then echo --resume; fi; }

[[ -e $RUN/start/config.json ]] || python -m demos.train.model --out "$RUN/start"
python -m demos.train.train_vit --out "$RUN" --steps "$VIT_STEPS" --batch "$VIT_BATCH" --device "$DEVICE" $(resume "$RUN/vit.pt")
[[ -e $RUN/features.json ]] || python -m demos.train.cache_features --run "$RUN" --scenes "$SCENES" --clips "$CLIPS" --device "$DEVICE"
python -m demos.train.train_lm --run "$RUN" --start "$RUN/start" --steps "$LM_STEPS" --device "$DEVICE" $(resume "$RUN/lm.pt")
python -m demos.train.export --run "$RUN" --start "$RUN/start" --out "$OUT"
python -m demos.train.evaluate --model "$OUT" --device "$DEVICE" --json "$RUN/evaluation.json"
