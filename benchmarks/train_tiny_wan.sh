#!/usr/bin/env bash
# Train the embedded model from nothing, judge it on the held-out prompts, and write it as a
# pipeline folder. Stops after MINUTES; the same command goes on from there.
#
#   benchmarks/train_tiny_wan.sh RUN_FOLDER [MINUTES] [GPUS]
#
# PLAN_VAE (minutes), PLAN_STAGES, PLAN_FINAL and SETTINGS may be set to change the plan.
set -euo pipefail
run=${1:?usage: benchmarks/train_tiny_wan.sh RUN_FOLDER [MINUTES] [GPUS]}
minutes=${2:-1000}
gpus=${3:-$(nvidia-smi -L | wc -l)}
tiny=sla_video.pipelines.tiny_wan
vae_minutes=${PLAN_VAE:-3}
read -ra stages <<<"${PLAN_STAGES:-64:256:8:2:2e-3 128:96:7:3.5:1.5e-3 256:32:6:6:1e-3:0.9}"
read -ra settings <<<"${SETTINGS:-dense 0.80 0.85 0.90 0.95 0.97 0.90/1}"

left() { python3 -c "print($minutes - $SECONDS / 60)"; }
launch() { torchrun --nproc_per_node "$gpus" -m "$@"; }

[[ -d "$run/text" ]] || python3 -m $tiny.train_text_encoder --out "$run/text"
launch $tiny.train_vae --out "$run/vae" --minutes "$vae_minutes" --wall-minutes "$(left)" \
  --channels-last
# The transformer is trained on the latents of the finished VAE only.
python3 - "$run/vae/state.json" "$vae_minutes" <<'PY' || { echo "run again to go on"; exit 0; }
import json, sys
done = json.load(open(sys.argv[1]))["progress"]["minutes"]
sys.exit(done < 0.999 * float(sys.argv[2]))
PY
launch $tiny.train_transformer --vae "$run/vae" --text-encoder "$run/text" --out "$run/model" \
  --stages "${stages[@]}" --wall-minutes "$(left)"
trained="$run/model"
# Only from a finished model, since a final run that exists is gone on with.
if python3 - "$run/model/state.json" "${#stages[@]}" <<'PY'; then
import json, sys
stages = json.load(open(sys.argv[1]))["stages"]
sys.exit(sum(bool(stage["finished"]) for stage in stages) < int(sys.argv[2]))
PY
  # Single objects more often than before, or they come out doubled.
  launch $tiny.train_transformer --vae "$run/vae" --init "$run/model" --out "$run/final" \
    --stages "${PLAN_FINAL:-256:32:1:6:5e-4:0.9}" --pairs 0.5 --dense-share 0.3 --cooldown 0.8 \
    --ema 0.995 --wall-minutes "$(left)"
  trained="$run/final"
fi
python3 -m $tiny.export --vae "$run/vae" --transformer "$trained" --out "$run/tiny-wan"
if python3 -c "import sys; sys.exit($(left) < 1.5)"; then
  launch $tiny.evaluate --model "$run/tiny-wan" --prompts 200 --settings "${settings[@]}" \
    --json "$run/adherence.json" --sheet "$run/sheet.png"
fi
