#!/usr/bin/env bash
# What CI cannot run: checks and benchmarks that need a GPU, part by part.
#
#   benchmarks/on_gpu.sh OUT PART...          benchmarks/on_gpu.sh --list
#
# Each part has a log and, where it measures, a JSON file in OUT; one line says how it ended. The
# exit code is 1 if a part failed. LIMIT is the seconds that a part may take (default 600). Several
# GPUs: one call for each with CUDA_VISIBLE_DEVICES, and SHARD=0/2, SHARD=1/2 for parts that share
# their rows.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

declare -A parts=(
  [tests]='pytest -q -n 12 --maxfail 20 tests/test_triton_*.py tests/test_operator_key_order.py
    tests/test_over_query.py tests/test_launches.py tests/test_compatibility_gpu.py'
  [memcheck]='compute-sanitizer --tool memcheck --leak-check no --error-exitcode 1
    python3 benchmarks/memory_check.py'
  [tuning]='python3 benchmarks/tune_check.py --json $out/tuning.json'
  [operator]='python3 -m sla_video.cli bench --json $out/operator.json'
  [operator-fp8]='python3 -m sla_video.cli bench --sparse-dtype int8_fp8 --json $out/operator-fp8.json'
  [launches]='python3 benchmarks/operator_parts.py --formats int8 --launches --json $out/launches.json'
  [parts]='python3 benchmarks/operator_parts.py --formats int8 int8_fp8 --json $out/parts.json'
  [models]='python3 benchmarks/end_to_end.py --models 1.3B 14B --variants cudnn flash sla2-97
    --profile --json $out/models.json'
  [peak]='python3 benchmarks/peak_memory.py --json $out/peak.json'
  [parallel]='torchrun --nproc_per_node gpu benchmarks/context_parallel.py --model 14B --compile
    --sparse-dtype int8 --repeats 1 --json $out/parallel.json'
  [training]='torchrun --nproc_per_node gpu benchmarks/finetune_scale.py --json $out/training.json'
  [orders]='python3 benchmarks/combinations.py --out $out/orders --prompts 100 --shard $shard'
  [compression]='python3 benchmarks/combinations.py --out $out/compression --prompts 100
    --combinations benchmarks/combinations_compression.json --shard $shard'
)
names=$(printf '%s\n' "${!parts[@]}" | sort)
if [[ "${1:-}" == --list ]]; then
  printf '%s\n' "$names"
  exit
fi
out=${1:?usage: benchmarks/on_gpu.sh OUT PART...; --list names the parts}
shift
limit=${LIMIT:-600} shard=${SHARD:-0/1}
for part in "$@"; do
  if [[ -z "${parts[$part]:-}" ]]; then
    echo "on_gpu.sh: no part ${part@Q}; there are: ${names//$'\n'/, }" >&2
    exit 2
  fi
done
mkdir -p "$out"
failed=0
for part in "$@"; do
  began=$SECONDS
  eval "set -- ${parts[$part]//$'\n'/ }"
  timeout "$limit" "$@" >"$out/$part.log" 2>&1
  code=$?
  echo "$part: $([[ $code == 0 ]] && echo ok || echo "failed, exit code $code, see $out/$part.log")," \
    "$((SECONDS - began)) s"
  ((code == 0)) || failed=1
done
exit $failed
