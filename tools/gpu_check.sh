#!/usr/bin/env bash
# Everything that needs a GPU, in one go: tools/gpu_check.sh [--dry-run] OUTDIR
#
# Builds for the card found, tests on it, measures kernels, training steps and inference, checks
# memory accesses, profiles the slowest kernels. Every stage has a time limit; what one leaves over
# goes to those after it, and all end within SECONDS_IN_ALL (default 570). A failed stage stops none
# of the others. OUTDIR gets results.jsonl (a row per measurement, written as it is taken), table.txt,
# roofline.png, ncu.csv, stages.tsv (stage, outcome, seconds) and log.txt (what the stages said).
# Exit status: 0 if no stage failed. PYTHON names the interpreter (default: .venv's, else python3),
# COMMIT the commit where the copy has no .git.
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
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # compute-sanitizer and ncu lie beside nvcc
rows=$out/results.jsonl
stages=$out/stages.tsv
log=$out/log.txt
: >"$stages"
: >"$log"
: >"$out/table.txt"
failures=0
deadline=$((SECONDS + ${SECONDS_IN_ALL:-570}))
reserve=60 # for the table and the plot

# within N: N seconds, or as many as are left.
within() {
  local left=$((deadline - reserve - SECONDS))
  echo $(($1 < left ? $1 : left))
}

# stage NAME LIMIT COMMAND...: runs the command; its output goes to $log, or to $to where it is set.
stage() {
  local name=$1 began=$SECONDS file=${to:-$log} limit status outcome
  limit=$(within "$2")
  shift 2
  if ((limit < 10)); then
    skip "$name" "no time left"
    return
  fi
  echo "== $name (at most $limit s): $*" | tee -a "$log"
  # INT, so that pytest still says what failed; a command that ignores it is killed.
  timeout --signal=INT --kill-after=5 "$limit" "$@" >>"$file" 2>&1
  status=$?
  case $status in
    0) outcome=ok ;;
    124 | 137) outcome="out of time" ;;
    *) outcome="failed ($status)" ;;
  esac
  if [[ $status -ne 0 ]]; then
    failures=$((failures + 1))
    tail -n 15 "$file"
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
# Unaligned starts, odd planes, both layouts, the one launch of small maps: what runs off the end of
# a tensor.
small_tests=(-q -p no:cacheprovider -x tests/test_determinism.py tests/test_add_relu.py
  tests/test_gpu.py
  -k "(cuda and (where_a_tensor_lies or special_values or mixed_layouts)) or over_the_gradient or the_phases")
# REQUIRE: what stands in a row as ours is never the reference. A model's rows say it themselves.
kernels=(env RESNET_FAST_REQUIRE=1 "$python" -m bench.gpu kernels)
bench=(--rows "$rows")
[[ -z "${COMMIT:-}" ]] || bench+=(--commit "$COMMIT")

if ((dry)); then
  bench+=(--device cpu --quick --no-compile)
  skip build "the installed build is used"
  stage tests 60 "$python" -m pytest "${cuda_tests[@]}" --collect-only
  stage kernels 120 "${kernels[@]}" "${bench[@]}" --dtypes bfloat16
  stage models 120 "$python" -m bench.gpu models "${bench[@]}"
  stage inference 120 "$python" -m bench.gpu inference "${bench[@]}" --dtypes bfloat16
else
  # The first import of torch reads gigabytes where nothing has read them yet.
  capability=$(timeout 120 "$python" -c \
    'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>>"$log")
  if [[ ! "$capability" =~ ^[0-9]+\.[0-9]+$ ]]; then
    tail -n 5 "$log"
    echo "$python finds no CUDA device; --dry-run is for machines without" >&2
    exit 1
  fi
  stage build 200 env RESNET_FAST_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST="$capability" \
    "$python" setup.py build_ext --inplace
  "$python" -c 'import xdist' 2>/dev/null && cuda_tests+=(-n 8)
  stage tests 120 env RESNET_FAST_REQUIRE=1 "$python" -m pytest "${cuda_tests[@]}" \
    -k "(cuda or gpu) and not emulated"
  # First what must be there, without torch.compile, whose compilations take longer than all else.
  stage kernels 100 "${kernels[@]}" "${bench[@]}" --no-compile --dtypes bfloat16 \
    --seconds "$(within 75)"
  stage models 90 "$python" -m bench.gpu models "${bench[@]}" --no-compile --seconds 36
  stage inference 60 "$python" -m bench.gpu inference "${bench[@]}" --no-compile \
    --seconds "$(within 45)"
fi
# NOTE: without PyTorch's caching, or what lies behind a tensor is another part of the same block.
with compute-sanitizer sanitizer 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  compute-sanitizer --error-exitcode 9 "$python" -m pytest "${small_tests[@]}"
device=cuda
((dry)) && device=cpu
with ncu profile 50 ncu --clock-control none --profile-from-start off --csv --print-units base \
  --log-file "$out/ncu.csv" \
  --metrics gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed \
  "$python" -m bench.gpu slowest "${bench[@]}"
[[ ! -s "$out/ncu.csv" ]] ||
  stage profile_rows 20 "$python" -m bench.gpu profile "${bench[@]}" --csv "$out/ncu.csv"
gpu_stage models_compile 150 "$python" -m bench.gpu models "${bench[@]}" --seconds 36
gpu_stage kernels_compile 120 "${kernels[@]}" "${bench[@]}" --dtypes bfloat16 \
  --batches 256 --seconds "$(within 95)"
gpu_stage kernels_more 90 "${kernels[@]}" "${bench[@]}" --no-compile \
  --dtypes float16 float32 --batches 256 --seconds "$(within 70)"
reserve=0
to=$out/table.txt stage table 40 "$python" -m bench.gpu table --device "$device" --rows "$rows"
stage plot 40 "$python" -m bench.gpu plot --device "$device" --rows "$rows"
[[ -f "$out/results.png" ]] && mv "$out/results.png" "$out/roofline.png"

{
  echo
  column -t -s $'\t' "$stages" 2>/dev/null || cat "$stages"
} >>"$out/table.txt"
cat "$out/table.txt"
((failures == 0))
