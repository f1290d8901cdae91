#!/usr/bin/env bash
# Everything that needs a GPU, in one go: tools/gpu_check.sh [--dry-run] OUTDIR
#
# Builds for the card found, tests on it, checks memory accesses, measures kernels, training steps
# and inference, profiles the slowest kernels. Every stage has a time limit, ten minutes in all, and a failed
# stage stops none of the others. OUTDIR gets results.jsonl (a row per measurement), roofline.png,
# table.txt, stages.tsv (stage, outcome, seconds) and a log per stage. Exit status: 0 if no stage
# failed. PYTHON names the interpreter (default: .venv's, else python3).
#
# --dry-run goes the same way without a GPU: tiny shapes on the CPU, and stages that only a GPU can
# serve are listed as skipped.
set -uo pipefail

usage() {
  echo "usage: tools/gpu_check.sh [--dry-run] OUTDIR" >&2
  exit 2
}

dry=0
out=
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry=1 ;;
    -*) usage ;;
    *)
      [[ -z "$out" ]] || usage
      out=$argument
      ;;
  esac
done
[[ -n "$out" ]] || usage
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

python=${PYTHON:-}
if [[ -z "$python" ]]; then
  python=python3
  [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi
rows=$out/results.jsonl
stages=$out/stages.tsv
: >"$stages"
failures=0

# stage NAME LIMIT COMMAND...: runs the command with its output in NAME.log.
stage() {
  local name=$1 limit=$2 began=$SECONDS status outcome
  shift 2
  echo "== $name (at most $limit s): $*"
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  case $status in
    0) outcome=ok ;;
    124 | 137) outcome="out of time" ;;
    *) outcome="failed ($status)" ;;
  esac
  if [[ $status -ne 0 ]]; then
    failures=$((failures + 1))
    tail -n 15 "$out/$name.log"
  fi
  printf '%s\t%s\t%s\n' "$name" "$outcome" "$((SECONDS - began))" >>"$stages"
}

# skip NAME WHY
skip() {
  echo "== $1: skipped, $2"
  printf '%s\t%s\t0\n' "$1" "skipped: $2" >>"$stages"
}

# gpu_stage: a stage that the CPU cannot stand in for. with TOOL: where the tool is installed.
gpu_stage() {
  if ((dry)); then skip "$1" "needs a GPU"; else stage "$@"; fi
}
with() {
  local tool=$1
  shift
  if ((dry)) || command -v "$tool" >/dev/null; then gpu_stage "$@"; else skip "$1" "no $tool"; fi
}

cuda_tests=(-q -p no:cacheprovider --maxfail=40 tests/test_add_relu.py tests/test_batch_norm_act.py
  tests/test_autograd.py tests/test_conv_bn_act.py tests/test_determinism.py tests/test_gradcheck.py
  tests/test_properties.py tests/test_gpu.py tests/test_cuda_binding.py)
# Unaligned starts, odd planes, both layouts: what runs off the end of a tensor.
small_tests=(-q -p no:cacheprovider -x tests/test_determinism.py tests/test_add_relu.py
  -k "cuda and (where_a_tensor_lies or special_values or mixed_layouts)")

if ((dry)); then
  skip build "the installed build is used"
  stage tests 60 "$python" -m pytest "${cuda_tests[@]}" --collect-only
  bench=(--device cpu --quick --no-compile --rows "$rows")
  stage kernels 120 "$python" -m bench.gpu kernels "${bench[@]}" --dtypes bfloat16
  stage models 120 "$python" -m bench.gpu models "${bench[@]}"
  stage inference 120 "$python" -m bench.gpu inference "${bench[@]}" --dtypes bfloat16
else
  capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  stage build 150 env RESNET_FAST_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST="$capability" \
    "$python" setup.py build_ext --inplace
  stage tests 105 env RESNET_FAST_REQUIRE=1 "$python" -m pytest "${cuda_tests[@]}" \
    -k "(cuda or gpu) and not emulated"
  bench=(--rows "$rows")
  # bfloat16 first and with torch.compile, then the rest as far as the time goes.
  stage kernels 70 "$python" -m bench.gpu kernels "${bench[@]}" --dtypes bfloat16 --batches 256 \
    --seconds 55
  stage kernels_more 40 "$python" -m bench.gpu kernels "${bench[@]}" --batches 32 256 \
    --no-compile --seconds 28
  stage models 85 "$python" -m bench.gpu models "${bench[@]}" --seconds 35
  # torch.compile's max-autotune comes last: what it does not finish is a row that says so.
  stage inference 60 "$python" -m bench.gpu inference "${bench[@]}" --seconds 50
fi
with compute-sanitizer sanitizer 40 compute-sanitizer --error-exitcode 9 \
  "$python" -m pytest "${small_tests[@]}"
device=cuda
((dry)) && device=cpu
with ncu profile 20 ncu --kernel-name 'regex:bn_|add_relu|channel_reduce|merge_partials' \
  --metrics gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed \
  "$python" -m bench.gpu slowest --rows "$rows"
stage table 15 "$python" -m bench.gpu table --device "$device" --rows "$rows"
stage plot 15 "$python" -m bench.gpu plot --device "$device" --rows "$rows"
[[ -f "$out/results.png" ]] && mv "$out/results.png" "$out/roofline.png"

{
  cat "$out/table.log"
  echo
  column -t -s $'\t' "$stages" 2>/dev/null || cat "$stages"
} >"$out/table.txt"
cat "$out/table.txt"
((failures == 0))
