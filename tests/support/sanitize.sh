#!/bin/sh
# `make sanitize`: builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer next to a copy of fastlm/
# (build/sanitize/site) and runs the op tests with it. Each op has its own process; one process per core runs at a time.
# The tests of an op stop at the first report. The exit status is non-zero if any op had one.
#     sh tests/support/sanitize.sh [op ...]
set -eu
root=$PWD
site=$root/build/sanitize/site
logs=$root/build/sanitize/logs
python=$root/.venv/bin/python
# ops with the longest tests first
all="attention decode_step linear_cross_entropy linear_distillation linear_logprobs cross_entropy varlen_attention paged_attention quantized_linear linear boundary adamw optim glu rope rms_norm layer_norm matmul sample"
test $# -gt 0 || set -- $all

start=$(date +%s)
rm -rf "$site" "$logs"
mkdir -p "$site" "$logs"
cp -a fastlm "$site"
rm -f "$site"/fastlm/*.so
FASTLM_SANITIZE=address,undefined,float-cast-overflow FASTLM_CUDA=0 "$python" setup.py -q build_ext --build-lib "$site"

# Disabled checks: leaks, because the interpreter has some; new/delete pairs, because they cross torch's uninstrumented
# libraries; use-after-return, because GCC 12 aligns its frames to 32 bytes and then accesses them with 64-byte moves, which
# fault. Wide redzones: an access far outside a block, past the start of the neighbouring block, is also detected.
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:detect_stack_use_after_return=0:halt_on_error=1:redzone=256
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive # two threads split every kernel's work; waiting threads release the core
export PYTHONPATH="$site" # precedes the editable install, which maps fastlm to the tree; from the root, `kernels` would be imported
preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
LD_PRELOAD=$preload "$python" -P -c "import fastlm; assert fastlm.__file__.startswith('$site'), fastlm.__file__"

# Not run: torch.compile (it has its own compiler and calls these kernels) and, with `not slow`, lengths above 4000.
# pytest captures only Python's output and its fault handler is off, because a process with a report ends immediately.
build_end=$(date +%s)
status=0
export preload logs
printf '%s\n' "$@" | xargs -P "$(getconf _NPROCESSORS_ONLN)" -I{} sh -c '
  LD_PRELOAD=$preload "$0" -P -m pytest -v --capture=sys -p no:faulthandler --tb=short -m "not slow" -k "not compile" --kernels cpu tests/kernels/test_{}.py >"$logs/{}" 2>&1
  status=$?
  last=$(tail -n 1 "$logs/{}" | tr -d = | grep -E " (passed|failed)") || last="stopped by the report that follows"
  echo "{}: $last"
  exit $status' "$python" || status=1

for op in "$@"; do
  grep -sE -B 2 -A 14 'ERROR: AddressSanitizer|runtime error:|^FAILED|^ERROR ' "$logs/$op" || true
done
passed=$(cat "$logs"/* | grep -oE '[0-9]+ passed' | awk '{n += $1} END {print n + 0}')
echo "sanitize: $([ $status = 0 ] && echo clean || echo FINDINGS), $# test files, $passed tests passed in $(($(date +%s) - build_end)) s, built in $((build_end - start)) s"
exit $status
