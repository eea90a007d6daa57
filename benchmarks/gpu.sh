#!/usr/bin/env bash
# Everything that a machine with a GPU should run, without a network: benchmarks/gpu.sh OUT [STAGE ...]
#
# Stages, in order: build tests ops sanitize tune kernels blocks models train. Without any: all. Each is bounded so that it
# can be run alone in under 9 minutes; one that fails does not keep the next from running. Results and logs go to the
# folder OUT, which afterwards holds at most 8 files; OUT/summary.txt says what passed and how long it took.
# PYTHON chooses the interpreter, whose torch must be a CUDA build (default: python3).
set -uo pipefail

readonly STAGES="build tests ops sanitize tune kernels blocks models train"
if [ $# -lt 1 ]; then
  echo "usage: benchmarks/gpu.sh OUT [STAGE ...]; stages: $STAGES" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
LOGS=$OUT/logs
for stage in "$@"; do
  case " $STAGES " in
    *" $stage "*) ;;
    *) echo "unknown stage $stage: choose some of $STAGES" >&2; exit 2 ;;
  esac
done
if ! "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
  echo "benchmarks/gpu.sh needs a GPU that torch sees: $PYTHON sees none" >&2
  exit 3
fi
mkdir -p "$LOGS"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD XDG_CACHE_HOME=$OUT/cache
export RESNET_FUSED_BENCH_BATCH=${RESNET_FUSED_BENCH_BATCH:-256}

environment() {
  nvidia-smi
  "$PYTHON" - <<'PY'
import platform, torch, triton
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__, "CUDA", torch.version.cuda)
print(torch.cuda.get_device_properties(0))
PY
  nvcc --version | tail -2
  git log -1 --format='commit %H %cI' && git status --short
}

build() {
  local arch
  arch=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  TORCH_CUDA_ARCH_LIST=$arch MAX_JOBS=$(nproc) RESNET_FUSED_BUILD=cuda "$PYTHON" setup.py -q build_ext --inplace &&
    "$PYTHON" -m resnet_fused info
}

tests() {
  "$PYTHON" -m pytest tests --ignore tests/ops -q -m gpu --maxfail=50 -p no:cacheprovider --junitxml="$LOGS/tests.xml"
}

ops() {
  "$PYTHON" -m pytest tests/ops -q -m gpu --maxfail=50 -p no:cacheprovider --junitxml="$LOGS/ops.xml"
}

sanitize() {
  local tool status=0
  for tool in memcheck racecheck initcheck; do
    echo "== $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 170 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$PYTHON" -m tests.gpu_small || status=1
  done
  return $status
}

# Chooses configurations for the batch sizes that people use, and keeps them with what lost.
tune() {
  "$PYTHON" - "$OUT/tuned.json" <<'PY'
import sys
import torch
from pathlib import Path
from benchmarks.kernel_times import make_step
from resnet_fused.kernels import tuning
for arch in ("resnet50", "resnet18"):
    for batch in (256, 64):
        step = make_step(arch, batch, 224, "bf16", torch.device("cuda"))
        step()
        torch.cuda.synchronize()
        print(arch, batch, len(tuning.entries()), "problems", flush=True)
        tuning.write_table(Path(sys.argv[1]))
PY
}

kernels() {
  "$PYTHON" -m benchmarks.kernel_times --arch resnet50 --json "$OUT/kernels.json" &&
    "$PYTHON" -m benchmarks.kernel_times --arch resnet18
}

blocks() {
  "$PYTHON" -m pytest benchmarks/test_blocks.py -q -k bf16 --device cuda --benchmark-disable-gc -p no:cacheprovider \
    --results "$OUT/blocks.json"
}

models() {
  "$PYTHON" -m pytest benchmarks/test_models.py -q -k "bf16 or first_step" --device cuda --benchmark-disable-gc \
    -p no:cacheprovider --results "$OUT/models.json"
}

train() {
  "$PYTHON" -m resnet_fused train --impl compare --data digits --precision bf16 --out "$LOGS/train" --overwrite
}

started=$(date +%s)
environment >"$OUT/environment.txt" 2>&1
printf '%-10s %-8s %8s\n' stage status seconds >"$OUT/summary.txt"
failed=0
for stage in ${*:-$STAGES}; do
  begin=$(date +%s)
  echo "== $stage, $((begin - started)) s after the start"
  # A function in a shell of its own, so that timeout can end it with all that it started.
  export -f "${stage?}"
  export PYTHON OUT LOGS
  timeout --kill-after=10 530 bash -uo pipefail -c "$stage" 2>&1 | tee "$LOGS/$stage.log"
  status=${PIPESTATUS[0]}
  word=passed
  if [ "$status" -ne 0 ]; then
    failed=1
    word=$([ "$status" -eq 124 ] && echo timeout || echo "failed")
  fi
  printf '%-10s %-8s %8d\n' "$stage" "$word" $(($(date +%s) - begin)) >>"$OUT/summary.txt"
done
tar -C "$OUT" -czf "$OUT/logs.tar.gz" logs && rm -rf "$LOGS" "$OUT/cache"
cat "$OUT/summary.txt"
exit $failed
