#!/usr/bin/env bash
# Everything that a machine with a GPU should run, without a network: benchmarks/gpu.sh OUT [STAGE ...]
#
# Stages, in order: build tests ops capture sanitize tune kernels passes blocks models record record400 train. Without
# any: all. Each is bounded so that it can be run alone in under 9 minutes; one that fails does not keep the next from running. Results and logs go
# to the folder OUT, which afterwards holds at most 8 files; OUT/summary.txt says what passed and how long it took.
# PYTHON chooses the interpreter, whose torch must be a CUDA build (default: python3).
# Exit status: 0 all passed, 1 a stage failed, 2 misuse, 3 no GPU.
set -uo pipefail

readonly STAGES="build tests ops capture sanitize tune kernels passes blocks models record record400 train"
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
read -ra chosen <<<"${*:-$STAGES}"
printf '%-10s %-8s %8s\n' stage status seconds >"$OUT/summary.txt"
if ! "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
  echo "benchmarks/gpu.sh needs a GPU that torch sees: $PYTHON sees none" >&2
  printf '%-10s no-gpu          0\n' "${chosen[@]}" >>"$OUT/summary.txt"
  cat "$OUT/summary.txt"
  exit 3
fi
mkdir -p "$LOGS"
# In build/, not in OUT: what one call has tuned need not be tuned again by the next.
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD XDG_CACHE_HOME=${XDG_CACHE_HOME:-$PWD/build/cache}
export PATH=$PATH:/usr/local/cuda/bin
# nvcc on PATH may be a script that lies elsewhere than its libraries.
[ -x /usr/local/cuda/bin/nvcc ] && export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
export RESNET_FUSED_BENCH_BATCH=${RESNET_FUSED_BENCH_BATCH:-256}
export QUICK_IMPLS=resnet_fused,eager,eager_channels_last,compile_default,cudnn_frontend,apex,inplace_abn,attorch
export PYTHON OUT LOGS

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

# Most of the time of a test on a GPU is compiling on the CPU: many workers, where pytest-xdist is there.
gpu_tests() {
  local name=$1 workers=()
  shift
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n $(((3 * $(nproc) + 3) / 4)))
  "$PYTHON" -m pytest "$@" "${workers[@]}" -q -m gpu --maxfail=50 -p no:cacheprovider --junitxml="$LOGS/$name.xml"
}
export -f gpu_tests

tests() {
  gpu_tests tests tests --ignore tests/ops
}

# With every kernel of ours, then with none; what is measured to be the fastest is used by all later stages.
ops() {
  local status=0
  RESNET_FUSED_BACKEND=triton gpu_tests ops tests/ops || status=1
  RESNET_FUSED_BACKEND=vendor gpu_tests ops-vendor tests/ops/test_residual_block.py || status=1
  return $status
}

# A training step as a CUDA graph, replayed on other images.
capture() {
  "$PYTHON" -m pytest tests/kernels -q -m gpu -k captured -p no:cacheprovider
}

sanitize() {
  local tool log status=0
  # Without a tool first: what Triton compiles now, the tools find in its cache.
  timeout 130 "$PYTHON" -m tests.gpu_small || return 1
  for tool in memcheck racecheck initcheck; do
    log=$LOGS/sanitize-$tool.log
    if PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=5 125 compute-sanitizer --tool "$tool" --print-limit 50 \
      --error-exitcode 1 "$PYTHON" -m tests.gpu_small >"$log" 2>&1; then
      echo "$tool: passed"
    else
      echo "$tool: failed with status $? (124: out of time); the first report and the end of it:"
      grep -m 1 -A 15 '^========= [A-Z]' "$log"
      tail -n 8 "$log"
      status=1
    fi
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
  local arch status=0
  for arch in resnet50 resnet18; do
    "$PYTHON" -m benchmarks.kernel_times --arch $arch --json "$LOGS/kernels-$arch.json" || status=1
  done
  return $status
}

# Everybody who can be imported but the slowest compiler: what was measured goes to OUT/NAME.json.
suite() {
  local name=$1
  shift
  "$PYTHON" -m pytest "$@" -q --device cuda --benchmark-disable-gc -p no:cacheprovider --results "$OUT/$name.json"
}
export -f suite

passes() {
  suite ops benchmarks/test_ops.py --dtypes bf16 --impls "$QUICK_IMPLS"
}

blocks() {
  suite blocks benchmarks/test_blocks.py --dtypes bf16 --impls "$QUICK_IMPLS"
}

models() {
  suite models benchmarks/test_models.py --dtypes bf16 --impls "$QUICK_IMPLS"
}

# The training step that is compared with others' records, beside the fastest that PyTorch offers.
record() {
  suite record benchmarks/test_models.py -k "resnet50 and train" --dtypes bf16 \
    --impls resnet_fused,eager_channels_last,compile_max_autotune
}

record400() {
  RESNET_FUSED_BENCH_BATCH=400 suite record400 benchmarks/test_models.py -k "resnet50 and train" --dtypes bf16 \
    --impls resnet_fused,eager_channels_last,compile_max_autotune
}

train() {
  "$PYTHON" -m resnet_fused train --impl compare --data digits --precision bf16 --out "$LOGS/train" --overwrite
}

seconds_of() {
  case $1 in
    capture) echo 180 ;;
    train) echo 300 ;;
    *) echo 520 ;;
  esac
}

started=$(date +%s)
environment >"$LOGS/environment.txt" 2>&1
failed=0
for stage in "${chosen[@]}"; do
  begin=$(date +%s)
  echo "== $stage, $((begin - started)) s after the start, at most $(seconds_of "$stage") s"
  # A function in a shell of its own, so that timeout can end it with all that it started. An interrupt lets pytest
  # write what it has measured so far.
  export -f "${stage?}"
  timeout --signal=INT --kill-after=15 "$(seconds_of "$stage")" bash -uo pipefail -c "$stage" 2>&1 |
    tee "$LOGS/$stage.log"
  status=${PIPESTATUS[0]}
  case $status in
    0) word=passed ;;
    124 | 137) word=timeout failed=1 ;;
    *) word=failed failed=1 ;;
  esac
  printf '%-10s %-8s %8d\n' "$stage" "$word" $(($(date +%s) - begin)) >>"$OUT/summary.txt"
done
# Checkpoints are large, and of no use once their run is compared.
find "$LOGS" -name '*.pt' -delete
tar -C "$OUT" -czf "$OUT/logs.tar.gz" logs && rm -rf "$LOGS"
cat "$OUT/summary.txt"
exit $failed
