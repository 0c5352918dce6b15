#!/usr/bin/env bash
# All stages, from nothing to an evaluated model folder. Start again after a stop: every stage resumes its checkpoint.
#
#   RUN=runs/tiny demos/train/train_all.sh                              # CPU, one thread
#   RUN=runs/tiny DEVICE=cuda VIT_BATCH=128 demos/train/train_all.sh    # GPU
#   RUN=runs/tiny TOWER=mm/models/weights/tiny demos/train/train_all.sh     # with a tower that is trained already
#   RUN=runs/plain ATTENTION_WEIGHT=0 demos/train/train_all.sh          # the second model, without the attention loss
#   RUN=/tmp/try VIT_STEPS=30 SCENES=64 CLIPS=8 LM_STEPS=30 EVAL_SCENES=4 EVAL_CLIPS=2 EVAL_SEVERAL=2 demos/train/train_all.sh  # try it
set -euo pipefail

RUN=${RUN:?set RUN to a folder for checkpoints, features (2 MiB per 16 scenes) and curves}
OUT=${OUT:-$RUN/model}
DEVICE=${DEVICE:-cpu}
VIT_STEPS=${VIT_STEPS:-8000} VIT_BATCH=${VIT_BATCH:-16}
SCENES=${SCENES:-20000} CLIPS=${CLIPS:-2500}
LM_STEPS=${LM_STEPS:-7200} ATTENTION_WEIGHT=${ATTENTION_WEIGHT:-0.5}
EVAL_SCENES=${EVAL_SCENES:-150} EVAL_CLIPS=${EVAL_CLIPS:-60} EVAL_SEVERAL=${EVAL_SEVERAL:-40}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

resume() { if [[ -e $1 ]]; then echo --resume; fi; }

[[ -e $RUN/start/config.json ]] || python -m demos.train.model --out "$RUN/start"
python -m demos.train.train_vit --out "$RUN" --steps "$VIT_STEPS" --batch "$VIT_BATCH" --device "$DEVICE" \
    ${TOWER:+--init "$TOWER"} $(resume "$RUN/vit.pt")
[[ -e $RUN/features.json ]] || \
    python -m demos.train.cache_features --run "$RUN" --scenes "$SCENES" --clips "$CLIPS" --device "$DEVICE"
python -m demos.train.train_lm --run "$RUN" --start "$RUN/start" --steps "$LM_STEPS" --device "$DEVICE" \
    --attention-weight "$ATTENTION_WEIGHT" $(resume "$RUN/lm.pt")
python -m demos.train.export --run "$RUN" --start "$RUN/start" --out "$OUT"
for wordings in "" --unseen; do
    python -m demos.train.evaluate --model "$OUT" --device "$DEVICE" --scenes "$EVAL_SCENES" --clips "$EVAL_CLIPS" \
        --several "$EVAL_SEVERAL" --json "$RUN/evaluation${wordings:+_unseen}.json" $wordings
done
python -m demos.train.curves --run "$RUN" --out "$OUT/curves.png"
